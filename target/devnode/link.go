package devnode

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/nbd"
	"github.com/thaw-project/thaw/nbd/kernel"
	"github.com/thaw-project/thaw/target"
	server "github.com/thaw-project/thaw/target/nbd"
)

// link is the connection between an nbd node and our server. When it ends, because a
// request took the kernel's patience, another takes its place: only then, so that no
// write that was sent twice takes effect after a later one.
type link struct {
	n      *Nodes
	name   string // of the export
	view   target.View
	index  uint32
	gone   chan struct{} // closed when nothing of the connection is left
	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup
}

func newLink(n *Nodes, v target.View) *link {
	l := &link{n: n, name: uuid.NewString(), view: v}
	l.ctx, l.cancel = context.WithCancel(context.Background())
	return l
}

// kernelFlags are the transmission flags that the kernel's client knows.
const kernelFlags = nbd.FlagHasFlags | nbd.FlagReadOnly | nbd.FlagSendFlush | nbd.FlagSendFUA | nbd.FlagSendTrim | nbd.FlagSendWriteZeroes

const (
	handshakeWait = 10 * time.Second // for our own server
	minPause      = 100 * time.Millisecond
	maxPause      = 5 * time.Second
)

// first exports the device and connects it.
func (l *link) first(connect func(kernel.Config) error) error {
	err := l.n.server.AddExport(server.Export{Name: l.name, Device: l.view.Device, ReadOnly: l.view.ReadOnly, MinBlock: int(min(l.view.BlockBytes, 4096))})
	if err != nil {
		return err
	}
	if err = l.connect(connect); err != nil {
		l.n.server.RemoveExport(context.Background(), l.name) // nobody is connected
	}
	return err
}

// connect makes a connection to our server and gives its other end to the kernel.
func (l *link) connect(give func(kernel.Config) error) error {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("make a connection: %w", err)
	}
	ours, end := os.NewFile(uintptr(fds[0]), "nbd-server"), os.NewFile(uintptr(fds[1]), "nbd-kernel")
	defer end.Close() // the kernel holds it by then
	conn, err := net.FileConn(ours)
	ours.Close()
	if err != nil {
		return fmt.Errorf("make a connection: %w", err)
	}
	gone := make(chan struct{})
	go func() { // ends with the connection; Server.Shutdown waits for it
		defer close(gone)
		l.n.server.ServeConn(conn)
	}()
	e, err := negotiate(fds[1], l.name)
	if err != nil {
		return err
	}
	c := kernel.Config{SizeBytes: e.SizeBytes, BlockBytes: int64(min(l.view.BlockBytes, 4096)), Timeout: requestTimeout, DeadConnTimeout: deadTimeout,
		ServerFlags: e.Flags & kernelFlags, Sockets: []int{fds[1]}, Backend: l.n.mark}
	if err := give(c); err != nil {
		return err
	}
	l.gone = gone
	return nil
}

// negotiate does the handshake on a blocking socket, whose file must not get into the
// poller: the kernel's client wants it as it is.
func negotiate(fd int, export string) (e kernel.Export, err error) {
	tv := unix.NsecToTimeval(int64(handshakeWait))
	var never unix.Timeval
	for _, o := range []int{unix.SO_RCVTIMEO, unix.SO_SNDTIMEO} {
		if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, o, &tv); err != nil {
			return e, err
		}
	}
	e, err = kernel.Negotiate(rawSocket(fd), export)
	for _, o := range []int{unix.SO_RCVTIMEO, unix.SO_SNDTIMEO} {
		err = errors.Join(err, unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, o, &never))
	}
	return e, err
}

// rawSocket reads and writes a blocking socket.
type rawSocket int

func (s rawSocket) Read(p []byte) (int, error) {
	for {
		n, err := unix.Read(int(s), p)
		switch {
		case err == unix.EINTR:
			continue
		case n == 0 && err == nil && len(p) > 0:
			return 0, kind.Errorf(kind.Unavailable, "our server closed the connection")
		}
		return max(n, 0), err
	}
}

func (s rawSocket) Write(p []byte) (done int, err error) {
	for done < len(p) {
		n, err := unix.Write(int(s), p[done:])
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return done, err
		}
		done += n
	}
	return done, nil
}

// start keeps the connection up until stop.
func (l *link) start() {
	l.wg.Go(func() {
		pause := minPause
		for {
			select {
			case <-l.ctx.Done():
				return
			case <-l.gone:
			}
			select {
			case <-l.ctx.Done():
				return
			case <-time.After(pause):
			}
			pause = min(2*pause, maxPause)
			seen, err := kernel.Look(sysfs, l.index)
			if err != nil || !seen.Connected || seen.Backend != l.n.mark {
				l.n.log.Error("somebody disconnected a device node of ours", "path", kernel.Path(l.index))
				return
			}
			if err := l.connect(func(c kernel.Config) error { return kernel.Reconfigure(l.index, c) }); err != nil {
				l.n.log.Warn("nbd connection not replaced", "path", kernel.Path(l.index), "err", err)
			}
		}
	})
}

// stop ends start's work. The connection stays as it is.
func (l *link) stop() {
	l.cancel()
	l.wg.Wait()
}
