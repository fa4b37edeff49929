package nbd

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/nbd"
	"github.com/thaw-project/thaw/nbd/kernel"
	"github.com/thaw-project/thaw/target/bdev"
	server "github.com/thaw-project/thaw/target/nbd"
)

// disk is one nbd device.
//
// Whoever holds its id in Presenter.locks changes it; its links run beside.
type disk struct {
	stateDisk
	p *Presenter

	lost atomic.Bool // the kernel has no such device of ours any more

	// ctx ends the links; links waits for them.
	ctx    context.Context
	cancel context.CancelFunc
	links  sync.WaitGroup

	mu     sync.Mutex
	device bdev.Device // guarded by mu: nil until an adopted disk's is open, and after it is closed
	ended  []chan struct{}
	// guarded by mu; ended[i] is closed when nothing of connection i is left
}

// Bounds of the pause between attempts to open a device or to replace a connection:
// short enough that a store which is just starting is a hiccup, long enough that one
// which is broken costs nothing.
const (
	minBackoff = 10 * time.Millisecond
	maxBackoff = 2 * time.Second
)

// handshakeWait bounds the handshake with ourselves.
const handshakeWait = 10 * time.Second

func newDisk(p *Presenter, s stateDisk) *disk {
	d := &disk{stateDisk: s, p: p}
	d.ctx, d.cancel = context.WithCancel(p.ctx)
	return d
}

// config is what the kernel is told; sizes are added by connect.
func (d *disk) config(sockets ...int) kernel.Config {
	return kernel.Config{
		Timeout: d.p.options.RequestTimeout, DeadConnTimeout: d.p.options.DeadTimeout,
		Sockets: sockets, Backend: d.p.backend(d.ID),
	}
}

// serve makes device an export of our server and keeps it.
func (d *disk) serve(device bdev.Device) error {
	err := d.p.server.AddExport(server.Export{Name: d.ID, Device: device, ReadOnly: d.ReadOnly})
	if err != nil {
		return err
	}
	d.mu.Lock()
	d.device = device
	d.mu.Unlock()
	return nil
}

// connect shows device as a new nbd device. On failure it closes device.
func (d *disk) connect(device bdev.Device) (err error) {
	if size := device.SizeBytes(); size <= 0 || size%logicalBlockBytes != 0 {
		return errors.Join(kind.Errorf(kind.Invalid, "a size of %d bytes: must be a multiple of %d", size, logicalBlockBytes), device.Close())
	}
	if err := d.serve(device); err != nil {
		return errors.Join(err, device.Close())
	}
	connected := false
	defer func() {
		if err != nil {
			if connected {
				err = errors.Join(err, d.p.options.driver.Disconnect(d.Index))
			}
			err = errors.Join(err, d.dismiss(context.Background(), false))
		}
	}()
	config := d.config()
	config.SizeBytes, config.BlockBytes = d.SizeBytes, logicalBlockBytes
	ended := make([]chan struct{}, 0, d.Connections)
	for range d.Connections {
		end, e, gone, err := d.pair()
		if err != nil {
			return err
		}
		defer end.Close()
		config.Sockets = append(config.Sockets, int(end.Fd()))
		config.ServerFlags = e.Flags & kernelFlags
		ended = append(ended, gone)
	}
	if d.Index, err = d.p.options.driver.Connect(config); err != nil {
		return err
	}
	connected = true
	seen, err := d.p.options.driver.Look(d.Index)
	if err != nil {
		return fmt.Errorf("look at the new device: %w", err)
	}
	if seen.Backend != config.Backend {
		return kind.Errorf(kind.Unsupported, "the kernel does not keep backend identifiers: Linux 5.14 is needed")
	}
	d.Path = kernel.Path(d.Index)
	d.startLinks(ended)
	return nil
}

// kernelFlags are the transmission flags that the kernel's client knows.
const kernelFlags = nbd.FlagHasFlags | nbd.FlagReadOnly | nbd.FlagSendFlush | nbd.FlagSendFUA | nbd.FlagSendTrim |
	nbd.FlagSendWriteZeroes | nbd.FlagCanMultiConn

// pair makes a connection with our server and returns its other end, in transmission,
// for the kernel, what our server says of the disk, and a channel that is closed when
// nothing of the connection is left in this process.
func (d *disk) pair() (*os.File, kernel.Export, chan struct{}, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, kernel.Export{}, nil, fmt.Errorf("make a connection: %w", err)
	}
	ours, end := os.NewFile(uintptr(fds[0]), "nbd-server"), os.NewFile(uintptr(fds[1]), "nbd-client")
	conn, err := net.FileConn(ours)
	ours.Close()
	if err != nil {
		end.Close()
		return nil, kernel.Export{}, nil, fmt.Errorf("make a connection: %w", err)
	}
	gone := make(chan struct{})
	go func() { // ends with the connection; Presenter.Close waits in server.Shutdown
		defer close(gone)
		d.p.server.ServeConn(conn)
	}()
	var e kernel.Export
	tv := unix.NsecToTimeval(int64(handshakeWait))
	err = errors.Join(unix.SetsockoptTimeval(fds[1], unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv),
		unix.SetsockoptTimeval(fds[1], unix.SOL_SOCKET, unix.SO_SNDTIMEO, &tv))
	if err == nil {
		e, err = kernel.Negotiate(rawSocket(fds[1]), d.ID)
	}
	if err == nil && e.SizeBytes != d.SizeBytes {
		err = kind.Errorf(kind.Corrupt, "the export has %d bytes, the disk %d", e.SizeBytes, d.SizeBytes)
	}
	var never unix.Timeval
	err = errors.Join(err, unix.SetsockoptTimeval(fds[1], unix.SOL_SOCKET, unix.SO_RCVTIMEO, &never),
		unix.SetsockoptTimeval(fds[1], unix.SOL_SOCKET, unix.SO_SNDTIMEO, &never))
	if err != nil {
		end.Close()
		return nil, kernel.Export{}, nil, err
	}
	return end, e, gone, nil
}

// rawSocket reads and writes a blocking socket.
type rawSocket int

func (s rawSocket) Read(p []byte) (int, error) {
	n, err := retry(func() (int, error) { return unix.Read(int(s), p) })
	if n == 0 && err == nil && len(p) > 0 {
		err = errPeer
	}
	return n, err
}

func (s rawSocket) Write(p []byte) (done int, err error) {
	for done < len(p) {
		n, err := retry(func() (int, error) { return unix.Write(int(s), p[done:]) })
		if err != nil {
			return done, err
		}
		done += n
	}
	return done, nil
}

func retry(f func() (int, error)) (int, error) {
	for {
		n, err := f()
		if err != unix.EINTR {
			return max(n, 0), err
		}
	}
}

var errPeer = kind.Errorf(kind.Unavailable, "our server closed the connection")

// startLinks keeps the connections up; ended tells when each has to be replaced.
func (d *disk) startLinks(ended []chan struct{}) {
	d.mu.Lock()
	d.ended = ended
	d.mu.Unlock()
	for i := range ended {
		d.links.Go(func() { d.link(i) })
	}
}

// stopLinks returns when no connection will be replaced any more. Those there are go on.
func (d *disk) stopLinks() {
	d.cancel()
	d.links.Wait()
}

// link replaces connection i each time it has ended.
func (d *disk) link(i int) {
	for backoff := minBackoff; ; {
		d.mu.Lock()
		gone := d.ended[i]
		d.mu.Unlock()
		up := time.Now()
		select {
		case <-gone:
		case <-d.ctx.Done():
			return
		}
		if time.Since(up) > maxBackoff {
			backoff = minBackoff
		}
		// A first attempt may come before the kernel has noticed that its end is
		// dead; then it drops what we give it, and our end ends again.
		select {
		case <-time.After(backoff):
		case <-d.ctx.Done():
			return
		}
		backoff = min(2*backoff, maxBackoff)
		if err := d.reconnect(i); err != nil {
			if d.vanished() {
				d.lost.Store(true)
				d.p.log.Error("nbd: somebody disconnected a device of ours", "disk", d.ID, "device", d.Path)
				return
			}
			d.p.log.Warn("nbd: connection not replaced", "disk", d.ID, "device", d.Path, "again_in", backoff, "error", err)
		}
	}
}

func (d *disk) reconnect(i int) error {
	end, _, gone, err := d.pair()
	if err != nil {
		return err
	}
	defer end.Close()
	if err := d.p.options.driver.Reconfigure(d.Index, d.config(int(end.Fd()))); err != nil {
		return err
	}
	d.p.reconnects.Add(1)
	d.mu.Lock()
	d.ended[i] = gone
	d.mu.Unlock()
	return nil
}

// vanished tells whether the device is no longer connected as ours.
func (d *disk) vanished() bool {
	seen, err := d.p.options.driver.Look(d.Index)
	if errors.Is(err, fs.ErrNotExist) {
		return true
	}
	return err == nil && (!seen.Connected || seen.Backend != d.p.backend(d.ID))
}

// adopted starts serving a disk of a process before us, as soon as its device opens.
// Until then its users wait: that is better than an error.
func (d *disk) adopted() {
	d.links.Go(func() {
		for backoff := minBackoff; ; backoff = min(2*backoff, maxBackoff) {
			device, err := d.p.open(d.ctx, d)
			if err == nil {
				if err = d.serve(device); err == nil {
					break
				}
				err = errors.Join(err, device.Close())
			}
			if d.ctx.Err() != nil {
				return
			}
			d.p.log.Error("nbd: disk cannot be opened again, its users wait", "disk", d.ID, "again_in", backoff, "error", err)
			select {
			case <-time.After(backoff):
			case <-d.ctx.Done():
				return
			}
		}
		over := make(chan struct{})
		close(over)
		ended := make([]chan struct{}, d.Connections)
		for i := range ended {
			ended[i] = over
		}
		d.startLinks(ended)
	})
}

// claim makes sure that nobody uses the device, and that nobody begins to.
func (d *disk) claim(ctx context.Context) (release func() error, err error) {
	ctx, cancel := context.WithTimeout(ctx, claimTimeout)
	defer cancel()
	release, err = d.p.options.driver.Claim(ctx, d.Path, usersWait)
	if errors.Is(err, kind.NotFound) || err != nil && d.vanished() {
		return func() error { return nil }, nil
	}
	return release, err
}

// disconnect takes the device from the kernel; on failure it is served as before.
func (d *disk) disconnect() error {
	d.stopLinks()
	if d.vanished() {
		return nil
	}
	err := d.p.options.driver.Disconnect(d.Index)
	if err != nil && d.p.ctx.Err() == nil {
		d.ctx, d.cancel = context.WithCancel(d.p.ctx)
		d.mu.Lock()
		ended, open := d.ended, d.device != nil
		d.mu.Unlock()
		if open {
			d.startLinks(ended)
		} else {
			d.adopted()
		}
	}
	return err
}

// remove disconnects and dismisses a disk that nobody knows of yet.
func (d *disk) remove(ctx context.Context, flush bool) error {
	return errors.Join(d.disconnect(), d.dismiss(ctx, flush))
}

// dismiss ends serving a disk whose device is disconnected, and closes what is behind it.
// A writable disk that was adopted and not opened since is opened for the flush: our
// predecessor may have left something unflushed.
func (d *disk) dismiss(ctx context.Context, flush bool) error {
	d.stopLinks()
	d.mu.Lock()
	open := d.device != nil
	d.mu.Unlock()
	if !open {
		if !flush {
			return nil
		}
		device, err := d.p.open(ctx, d)
		if err != nil {
			return fmt.Errorf("open for a last flush: %w", err)
		}
		return errors.Join(device.Flush(), device.Close())
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), drainWait)
	defer cancel()
	if err := d.p.server.RemoveExport(ctx, d.ID); err != nil && !errors.Is(err, kind.NotFound) {
		return err
	}
	return d.closeDevice(flush)
}

func (d *disk) closeDevice(flush bool) error {
	d.mu.Lock()
	device := d.device
	d.device = nil
	d.mu.Unlock()
	if device == nil {
		return nil
	}
	var errs []error
	if flush {
		if err := device.Flush(); err != nil {
			errs = append(errs, fmt.Errorf("flush: %w", err))
		}
	}
	if err := device.Close(); err != nil {
		errs = append(errs, fmt.Errorf("close: %w", err))
	}
	return errors.Join(errs...)
}
