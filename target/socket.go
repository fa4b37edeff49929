package target

import (
	"context"
	"encoding/json"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/thaw-project/thaw/failpoint"
	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/target/nbd"
	"github.com/thaw-project/thaw/target/rpc"
)

// A bdev may be served by NBD on a Unix socket of its own: thaw_nbd_export,
// thaw_nbd_unexport and thaw_nbd_get_exports, which SPDK does not have. It is what plays
// a card's PCIe function with: see opi/dpusim.

const (
	// maxSockets bounds the exports, each of which has a server.
	maxSockets = 1024
	// socketConnections bounds the clients of one export: a machine emulator, and
	// somebody who looks.
	socketConnections = 16
	// socketBufferBytes bounds what the requests in flight of one export take.
	socketBufferBytes = 32 << 20
	// socketPatience is how long connections may finish what they serve when their
	// export ends.
	socketPatience = 10 * time.Second
	// maxSocketPath is what the kernel takes (sun_path, with its zero byte), less what
	// nbd.ListenUnix appends while the socket is made.
	maxSocketPath = 107 - len(".4194304")
)

// socketExport is a bdev that is served on a socket.
type socketExport struct {
	lease  *lease // nil for a disk on which all fails
	p      socketParams
	server *nbd.Server
}

type socketParams struct {
	Bdev   string `json:"bdev_name,omitempty"`
	Socket string `json:"socket"`
	// NQN is a subsystem that shows the bdev: the socket is another way to the same
	// nvmeNamespace, has part in its claim, and goes with it.
	NQN string `json:"nqn,omitempty"`
	// FailingBytes, without a bdev, is the size of a disk on which all fails. It takes the
	// place of a bdev that is gone: a client that waits for the server's return waits
	// no more. QEMU, for one, stands still when it is to close a disk whose server is away.
	FailingBytes int64 `json:"failing_bytes,omitempty"`
}

// failingDevice is a disk on which all fails.
type failingDevice int64

func (failingDevice) fail() error {
	return kind.Errorf(kind.IO, "the disk of this NBD export is gone")
}

func (d failingDevice) ReadAt([]byte, int64) (int, error)  { return 0, d.fail() }
func (d failingDevice) WriteAt([]byte, int64) (int, error) { return 0, d.fail() }
func (d failingDevice) Flush() error                       { return d.fail() }
func (d failingDevice) Discard(_, _ int64) error           { return d.fail() }
func (d failingDevice) WriteZeroes(_, _ int64) error       { return d.fail() }
func (d failingDevice) SizeBytes() int64                   { return int64(d) }
func (failingDevice) ReadOnly() bool                       { return false }
func (failingDevice) Close() error                         { return nil }

func (t *Target) exportSocket(params json.RawMessage) (any, error) {
	var p socketParams
	if err := decode(params, &p); err != nil {
		return nil, err
	}
	if !filepath.IsAbs(p.Socket) || filepath.Clean(p.Socket) != p.Socket || len(p.Socket) > maxSocketPath {
		return nil, rpc.Errno(syscall.EINVAL, kind.Errorf(kind.Invalid, "socket %.128q: it must be an absolute path of at most %d bytes, in its shortest form", p.Socket, maxSocketPath))
	}
	if (p.Bdev == "") == (p.FailingBytes == 0) || p.FailingBytes < 0 || p.FailingBytes%512 != 0 || p.FailingBytes > 0 && p.NQN != "" {
		return nil, rpc.Errno(syscall.EINVAL, kind.Errorf(kind.Invalid, "either bdev_name or failing_bytes, a multiple of 512, must be given"))
	}
	var d *disk
	if p.Bdev != "" {
		var err error
		if d, err = t.find(p.Bdev); err != nil {
			return nil, err
		}
		p.Bdev = d.name
	}
	if have := t.sockets[p.Socket]; have != nil {
		if have.p == p {
			return true, nil
		}
		return nil, rpc.Errno(syscall.EEXIST, kind.Errorf(kind.Exists, "socket %s serves bdev %q", p.Socket, have.p.Bdev))
	}
	if len(t.sockets) >= maxSockets {
		return nil, rpc.Errno(syscall.ENOSPC, kind.Errorf(kind.NoSpace, "there are %d NBD exports", maxSockets))
	}
	x := &socketExport{p: p, server: nbd.New(nbd.Config{MaxConnections: socketConnections, MaxBufferBytes: socketBufferBytes, Engine: t.o.Engine, Log: t.log})}
	e := nbd.Export{Device: failingDevice(p.FailingBytes), MinBlock: 512}
	if d != nil {
		if err := t.leaseSocket(x, d); err != nil {
			return nil, err
		}
		e = nbd.Export{Description: d.name, Device: x.lease.dev, MinBlock: int(d.blockBytes), PreferredBlock: max(int(d.blockBytes), 4096)}
	}
	err := x.server.AddExport(e)
	if err == nil {
		err = x.server.ListenUnix(p.Socket)
	}
	if err != nil {
		t.endSocket(x)
		if kind.Of(err) == kind.InUse {
			return nil, rpc.Errno(syscall.EADDRINUSE, err)
		}
		return nil, errnoOfKernel(err)
	}
	failpoint.Reach("target.nbd_export: listening")
	t.sockets[p.Socket] = x
	if err := t.keep(classSocket, p.Socket, "thaw_nbd_export", p); err != nil {
		delete(t.sockets, p.Socket)
		t.endSocket(x)
		return nil, err
	}
	return true, nil
}

// leaseSocket takes a bdev for an export.
func (t *Target) leaseSocket(x *socketExport, d *disk) error {
	l := &lease{what: "NBD socket " + x.p.Socket, claim: exclusiveWrite, write: !d.driver.readOnly(), fixed: true}
	if x.p.NQN != "" {
		if l.with = t.exportOf(x.p.NQN, d); l.with == nil {
			return rpc.Errno(syscall.ENODEV, kind.Errorf(kind.NotFound, "subsystem %.223q does not show bdev %s", x.p.NQN, d.name))
		}
	}
	l.evict = func(wanted bool) { t.socketGone(x, wanted) }
	if err := t.acquire(d, l); err != nil {
		return err
	}
	x.lease = l
	return nil
}

// exportOf finds a subsystem's hold of a bdev.
func (t *Target) exportOf(nqn string, d *disk) *lease {
	t.mu.RLock()
	defer t.mu.RUnlock()
	for e, l := range t.exports {
		if e.nqn == nqn && l.disk == d {
			return l
		}
	}
	return nil
}

// endSocket ends the connections and the server of an export, and lets go of its bdev.
func (t *Target) endSocket(x *socketExport) {
	ctx, cancel := context.WithTimeout(context.Background(), socketPatience)
	defer cancel()
	if err := x.server.Shutdown(ctx); err != nil {
		t.log.Warn("end NBD export", "socket", x.p.Socket, "err", err)
	}
	if x.lease != nil {
		x.lease.release()
	}
}

// socketGone ends an export whose bdev, or whose nvmeNamespace, goes.
func (t *Target) socketGone(x *socketExport, wanted bool) {
	if t.sockets[x.p.Socket] != x {
		return // with its nvmeNamespace
	}
	delete(t.sockets, x.p.Socket)
	t.endSocket(x)
	key := objectKey(classSocket, x.p.Socket)
	if !wanted {
		t.lost(key)
	} else if err := t.forgetKeys(key); err != nil {
		t.log.Error("NBD export stays on record", "socket", x.p.Socket, "err", err)
	}
}

// partnersOf returns the keys of exports that go with a subsystem, made or not. The
// caller holds admin.
func (t *Target) partnersOf(nqn string) (keys []string) {
	for path, x := range t.sockets {
		if x.p.NQN == nqn {
			keys = append(keys, objectKey(classSocket, path))
		}
	}
	for key, o := range t.pending {
		var p socketParams
		if strings.HasPrefix(key, objectKey(classSocket)) && json.Unmarshal(o.Params, &p) == nil && p.NQN == nqn {
			keys = append(keys, key)
		}
	}
	return keys
}

// endPartners ends the exports that have part in a lease. The caller holds admin.
func (t *Target) endPartners(l *lease, wanted bool) {
	for _, path := range slices.Sorted(maps.Keys(t.sockets)) {
		if x := t.sockets[path]; x.lease != nil && x.lease.with == l {
			t.socketGone(x, wanted)
		}
	}
}

func (t *Target) unexportSocket(params json.RawMessage) (any, error) {
	var p struct {
		Bdev   string `json:"bdev_name,omitempty"`
		Socket string `json:"socket,omitempty"`
	}
	if err := decode(params, &p); err != nil {
		return nil, err
	}
	if (p.Bdev == "") == (p.Socket == "") {
		return nil, rpc.Errno(syscall.EINVAL, kind.Errorf(kind.Invalid, "either bdev_name or socket must be given"))
	}
	var paths []string
	if p.Socket != "" {
		if t.sockets[p.Socket] != nil || t.isPending(classSocket, p.Socket) {
			paths = append(paths, p.Socket)
		}
	} else if d := t.lookup(p.Bdev); d != nil {
		for path, x := range t.sockets {
			if x.lease != nil && x.lease.disk == d {
				paths = append(paths, path)
			}
		}
	}
	if len(paths) == 0 {
		return nil, rpc.Errno(syscall.ENODEV, kind.Errorf(kind.NotFound, "%.160q is not served by NBD", p.Bdev+p.Socket))
	}
	slices.Sort(paths)
	for _, path := range paths {
		if err := t.forget(classSocket, path); err != nil {
			return nil, err
		}
		if x := t.sockets[path]; x != nil {
			delete(t.sockets, path)
			t.endSocket(x)
		}
	}
	return true, nil
}

func (t *Target) getSockets(params json.RawMessage) (any, error) {
	var p struct {
		Bdev   string `json:"bdev_name,omitempty"`
		Socket string `json:"socket,omitempty"`
	}
	if err := decode(params, &p); err != nil {
		return nil, err
	}
	var only *disk
	if p.Bdev != "" {
		var err error
		if only, err = t.find(p.Bdev); err != nil {
			return nil, err
		}
	}
	type info struct {
		Bdev        string `json:"bdev_name"`
		Socket      string `json:"socket"`
		NQN         string `json:"nqn,omitempty"`
		Failing     int64  `json:"failing_bytes,omitempty"`
		ReadOnly    bool   `json:"read_only"`
		Connections int    `json:"connections"`
	}
	list := []info{}
	for _, path := range slices.Sorted(maps.Keys(t.sockets)) {
		if x := t.sockets[path]; (only == nil || only.name == x.p.Bdev) && (p.Socket == "" || p.Socket == path) {
			list = append(list, info{x.p.Bdev, path, x.p.NQN, x.p.FailingBytes, x.lease != nil && !x.lease.write, x.server.Connections()})
		}
	}
	return list, nil
}

// closeSockets ends all exports; what is on record stays.
func (t *Target) closeSockets() {
	for path, x := range t.sockets {
		delete(t.sockets, path)
		t.endSocket(x)
	}
}
