// Package devnode shows bdevs as /dev/nbdN and /dev/ublkbN of this machine, at the numbers
// that SPDK's methods ask for.
//
// A node outlives the process that serves it: the next process of the same owner takes
// it over, and users see a pause. The package must not know bdevs' names nor methods, and
// this process must never open a node that it serves.
package devnode

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"time"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/nbd/kernel"
	"github.com/thaw-project/thaw/target"
	server "github.com/thaw-project/thaw/target/nbd"
	"github.com/thaw-project/thaw/target/ublk"
)

const (
	// requestTimeout is when the kernel takes a connection whose request has no answer
	// for dead and sends the request again on the next. It is also how long users of
	// a node wait after this process was killed and started again.
	requestTimeout = 10 * time.Second

	// deadTimeout is how long users wait when nobody serves, before they get errors.
	deadTimeout = 10 * time.Minute

	// drainWait bounds how long Close waits for requests under way.
	drainWait = 30 * time.Second

	// tuneWait bounds the child that writes one file of sysfs.
	tuneWait = 5 * time.Second
)

// Options configures New.
type Options struct {
	// Owner tells this target's nodes from those of others on the machine: its root
	// directory.
	Owner string
	Log   *slog.Logger // default: none
}

// Nodes implements target.Kernel.
type Nodes struct {
	log    *slog.Logger
	mark   string // of the owner, as nbd's backend
	number uint64 // of the owner, as ublk's
	server *server.Server
	nbd    map[string]*link
	ublk   map[uint32]*ublk.Server
}

var _ target.Kernel = (*Nodes)(nil)

// New returns a Nodes that shows nothing yet. Close it.
func New(o Options) *Nodes {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	sum := sha256.Sum256([]byte(o.Owner))
	return &Nodes{log: o.Log, mark: "thaw-target " + hex.EncodeToString(sum[:8]), number: binary.LittleEndian.Uint64(sum[:8]),
		server: server.New(server.Config{Log: o.Log}), nbd: map[string]*link{}, ublk: map[uint32]*ublk.Server{}}
}

var sysfs = os.DirFS("/sys")

func indexOf(path string) (uint32, error) {
	n, err := strconv.ParseUint(strings.TrimPrefix(path, "/dev/nbd"), 10, 20)
	if err != nil {
		return 0, kind.Errorf(kind.Invalid, "%q is no /dev/nbdN", path)
	}
	return uint32(n), nil
}

// StartNBD implements target.Kernel.
func (n *Nodes) StartNBD(ctx context.Context, path string, v target.View) (string, error) {
	if err := kernel.Load(ctx); err != nil {
		return "", err
	}
	l := newLink(n, v)
	if path == "" {
		if err := l.first(func(c kernel.Config) (err error) { l.index, err = kernel.Connect(c); return err }); err != nil {
			return "", err
		}
	} else if err := n.startAt(path, l); err != nil {
		return "", err
	}
	path = kernel.Path(l.index)
	n.nbd[path] = l
	l.start()
	return path, nil
}

// startAt connects the node of a number, or takes over ours.
func (n *Nodes) startAt(path string, l *link) (err error) {
	if l.index, err = indexOf(path); err != nil {
		return err
	}
	seen, err := kernel.Look(sysfs, l.index)
	switch {
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		return err
	case err != nil || !seen.Connected:
		return l.first(func(c kernel.Config) error { return kernel.ConnectIndex(l.index, c) })
	case seen.Backend != n.mark:
		return kind.Errorf(kind.InUse, "%s is connected to something else", path)
	case seen.SizeBytes != l.view.Device.SizeBytes():
		return kind.Errorf(kind.InUse, "%s was left behind with %d bytes, the bdev has %d: disconnect it with nbd-client -d", path, seen.SizeBytes, l.view.Device.SizeBytes())
	}
	n.log.Info("device node taken over", "path", path)
	return l.first(func(c kernel.Config) error { return kernel.Reconfigure(l.index, c) })
}

// StopNBD implements target.Kernel.
func (n *Nodes) StopNBD(ctx context.Context, path string) error {
	l := n.nbd[path]
	if l == nil {
		return kind.Errorf(kind.NotFound, "%s is not shown", path)
	}
	delete(n.nbd, path)
	l.stop()
	err := kernel.Disconnect(l.index)
	return errors.Join(err, n.server.RemoveExport(ctx, l.name))
}

// ProbeUblk implements target.Kernel.
func (n *Nodes) ProbeUblk(context.Context) error { return ublk.Probe() }

// StartUblk implements target.Kernel.
func (n *Nodes) StartUblk(ctx context.Context, id, queues, depth uint32, v target.View) error {
	o := ublk.Options{Device: v.Device, ID: int(id), Queues: int(queues), Depth: int(depth), BlockBytes: int(v.BlockBytes), ReadOnly: v.ReadOnly, Owner: n.number, Logger: n.log}
	list, err := ublk.List()
	if err != nil {
		return err
	}
	for _, i := range list {
		if i.ID != int(id) {
			continue
		}
		if i.Owner != n.number {
			return kind.Errorf(kind.InUse, "ublk device %d is somebody else's", id)
		}
		s, err := ublk.Recover(ctx, o)
		if err == nil {
			n.log.Info("device node taken over", "path", s.Path())
			n.ublk[id] = s
			n.tune(ctx, s)
			return nil
		}
		if !errors.Is(err, kind.NotFound) {
			return err
		}
		if err := ublk.Delete(ctx, int(id)); err != nil {
			return err
		}
	}
	s, err := ublk.New(o)
	if err != nil {
		return err
	}
	if err := s.Start(ctx); err != nil {
		return errors.Join(err, s.Stop(ctx))
	}
	n.ublk[id] = s
	n.tune(ctx, s)
	return nil
}

// tune has the kernel notice sooner that this process is gone. It writes from a child
// process, because the kernel may make the writer wait for requests that this one serves.
func (n *Nodes) tune(ctx context.Context, s *ublk.Server) {
	path, data := s.Tuning()
	if path == "" {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, tuneWait)
	defer cancel()
	write := exec.CommandContext(ctx, "/bin/sh", "-c", `printf %s "$2" > "$1"`, "sh", path, data)
	if out, err := write.CombinedOutput(); err != nil {
		n.log.Warn("the end of this process under full load will be noticed after 30 s only", "path", path, "error", err, "output", string(out))
	}
}

// StopUblk implements target.Kernel.
func (n *Nodes) StopUblk(ctx context.Context, id uint32) error {
	s := n.ublk[id]
	if s == nil {
		return kind.Errorf(kind.NotFound, "ublk device %d is not shown", id)
	}
	if err := s.Stop(ctx); err != nil {
		return err // requests hang: it can be tried again
	}
	delete(n.ublk, id)
	return nil
}

// Close implements target.Kernel.
func (n *Nodes) Close() error {
	var errs []error
	for id, s := range n.ublk {
		delete(n.ublk, id)
		errs = append(errs, s.Close())
	}
	for path, l := range n.nbd {
		delete(n.nbd, path)
		l.stop()
	}
	ctx, cancel := context.WithTimeout(context.Background(), drainWait)
	defer cancel()
	if err := n.server.Shutdown(ctx); err != nil {
		errs = append(errs, fmt.Errorf("stop serving nbd: %w", err))
	}
	return errors.Join(errs...)
}
