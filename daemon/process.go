package daemon

import (
	"path/filepath"

	"github.com/thaw-project/thaw/kind"
)

// Process is one of the processes that the parts of a machine can run in.
type Process string

// The processes. They may run beside each other with the same root and run directories, but
// none beside ProcessServer. The zero value is a command, which is none of them and
// takes any configuration of its machine.
const (
	ProcessServer    Process = "server"
	ProcessAttacher  Process = "attacher"
	ProcessImages    Process = "image-mgmt"
	ProcessSnapshots Process = "snapshotter"
)

// As makes the configuration of a machine that of one of its processes: its roles are
// those that the process can have.
func (c *Config) As(p Process) error {
	c.Process = p
	switch p {
	case ProcessAttacher:
		var roles []string
		for _, r := range []string{RoleStore, RoleCard} {
			if c.has(r) {
				roles = append(roles, r)
			}
		}
		if len(roles) == 0 {
			return kind.Errorf(kind.Invalid, "roles %q: an attacher needs %s, %s or both", c.Roles, RoleStore, RoleCard)
		}
		c.Roles = roles
	case ProcessImages:
		c.Roles = []string{RoleImages}
	case ProcessSnapshots:
		c.Roles = []string{RoleSnapshots}
	}
	return nil
}

// Paths names every file and directory that a process uses: docs/architecture.md.
type Paths struct {
	RootLock, RunLock string
	// ProcessRootLock and ProcessRunLock are empty for ProcessServer, which has the others
	// alone.
	ProcessRootLock, ProcessRunLock                            string
	Pool, AttacherDB, CardDB, ImagemgmtDB, Snapshotter, Mounts string
	RemoteDB, Scratch, Cache                                   string
	FabricsState, UblkState, NBDState                          string
	// Socket is where commands and other parts of this machine call; ProcessSnapshots
	// has none.
	Socket, SnapshotterSocket, KeeperSocket, MetricSock string
	Dev, FuseState                                      string
}

// Paths returns the paths under the root and run directories.
func (c *Config) Paths() Paths {
	root := func(s string) string { return filepath.Join(c.Root, s) }
	run := func(s string) string { return filepath.Join(c.Run, s) }
	p := Paths{
		RootLock: root("lock"), RunLock: run("lock"),
		Pool: root("pool"), AttacherDB: root("attacher.db"), CardDB: root("card.db"), ImagemgmtDB: root("imagemgmt.db"),
		Snapshotter: root("snapshotter"), Mounts: root("mnt"),
		RemoteDB: root("remote.db"), Scratch: root("scratch"), Cache: root("cache"),
		Socket: run("thaw.sock"), SnapshotterSocket: run("snapshotter.sock"),
		KeeperSocket: run("keeper.sock"), MetricSock: run("metrics.sock"),
		Dev: run("dev"), FuseState: run("fuse.json"),
		FabricsState: run("fabrics.json"), UblkState: run("ublk.json"), NBDState: run("nbd.json"),
	}
	if c.Process == ProcessServer || c.Process == "" {
		return p
	}
	name := string(c.Process)
	p.ProcessRootLock, p.ProcessRunLock = root(name+".lock"), run(name+".lock")
	p.MetricSock = run(name + "-metrics.sock")
	p.Socket = run(name + ".sock")
	switch c.Process {
	case ProcessAttacher:
		// What converters write to is shown apart from what containers read.
		p.Dev, p.FuseState, p.KeeperSocket = run("attacher-dev"), run("attacher-fuse.json"), run("attacher-keeper.sock")
	case ProcessSnapshots:
		p.Socket = ""
	}
	return p
}

// Sockets are where a part of this machine may be found that role names: in its own process,
// or in the server that has all.
func (c *Config) Sockets(role string) []string {
	process := map[string]Process{RoleStore: ProcessAttacher, RoleCard: ProcessAttacher, RoleImages: ProcessImages}[role]
	own := *c
	own.Process = process
	all := *c
	all.Process = ProcessServer
	return []string{own.Paths().Socket, all.Paths().Socket}
}

// MetricsSockets are those of the processes that may run, by name.
func (c *Config) MetricsSockets() map[Process]string {
	sockets := make(map[Process]string)
	for _, p := range []Process{ProcessServer, ProcessAttacher, ProcessImages, ProcessSnapshots} {
		other := *c
		other.Process = p
		sockets[p] = other.Paths().MetricSock
	}
	return sockets
}
