package ublk

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/node/present/blockdev"
	"github.com/thaw-project/thaw/target/bdev"
	"github.com/thaw-project/thaw/target/ublk"
)

// disk is one ublk device.
//
// Whoever holds its id in Presenter.locks changes it; an adopted disk's taking over runs
// beside until ready is closed.
type disk struct {
	stateDisk
	p *Presenter

	ctx    context.Context // ends the taking over and the tuning
	cancel context.CancelFunc
	ready  chan struct{} // closed when the taking over has ended
	tuning sync.WaitGroup

	mu     sync.Mutex
	device bdev.Device  // guarded by mu: nil until an adopted disk's is open, and after it is closed
	server *ublk.Server // guarded by mu until ready is closed: nil until the device is taken over
	gone   bool         // guarded by mu: an adopted device that is no more
}

// Bounds of the pause between attempts to take a disk over: short enough that a store
// which is just starting is a hiccup, long enough that one which is broken costs nothing.
const (
	minBackoff = 10 * time.Millisecond
	maxBackoff = 2 * time.Second
	// recoverTimeout bounds one attempt. The kernel may need 30 s to notice that a
	// server is dead that had all its requests in hand, if nobody tuned the device.
	recoverTimeout = 40 * time.Second
)

func newDisk(p *Presenter, s stateDisk) *disk {
	d := &disk{stateDisk: s, p: p, ready: make(chan struct{})}
	d.ctx, d.cancel = context.WithCancel(p.ctx)
	return d
}

func (d *disk) options(device bdev.Device, id int) ublk.Options {
	o := &d.p.options
	return ublk.Options{
		Device: device, ID: id, Owner: d.p.owner, ReadOnly: d.ReadOnly, BlockBytes: blockBytes,
		Queues: o.Queues, Depth: o.Depth, MaxIOBytes: o.MaxIOBytes, Workers: o.Workers, Logger: d.p.log,
	}
}

// create makes the device, which nobody sees yet. On failure it does not close device.
func (d *disk) create(device bdev.Device) error {
	server, err := ublk.New(d.options(device, -1))
	if err != nil {
		return err
	}
	d.device, d.server = device, server
	d.Device, d.Path = server.ID(), server.Path()
	close(d.ready)
	return nil
}

// tune has the kernel notice our death early. It is done by a child, because the kernel may
// have the writer wait for the device, and beside, because nobody need wait for it.
func (d *disk) tune(server *ublk.Server) {
	path, data := server.Tuning()
	if path == "" {
		return
	}
	d.tuning.Go(func() {
		if d.p.takeChild(d.ctx) != nil {
			return
		}
		defer func() { <-d.p.child }()
		ctx, cancel := context.WithTimeout(d.ctx, tuneTimeout)
		defer cancel()
		if err := blockdev.Write(ctx, path, data); err != nil && d.ctx.Err() == nil {
			d.p.log.Warn("ublk: if this process is killed under full load, users of a disk wait longer", "disk", d.ID, "error", err)
		}
	})
}

// adopted takes over a disk of a process before us, as soon as its device opens. Until
// then its users wait: that is better than an error.
func (d *disk) adopted() {
	go func() { // takenOver and leave wait for it
		defer close(d.ready)
		for backoff := minBackoff; ; backoff = min(2*backoff, maxBackoff) {
			err := d.takeOver()
			if err == nil || d.ctx.Err() != nil {
				return
			}
			if errors.Is(err, kind.NotFound) && d.vanished() {
				d.mu.Lock()
				d.gone = true
				d.mu.Unlock()
				return
			}
			d.p.log.Error("ublk: disk cannot be taken over, its users wait", "disk", d.ID, "device", d.Path, "again_in", backoff, "error", err)
			select {
			case <-time.After(backoff):
			case <-d.ctx.Done():
				return
			}
		}
	}()
}

func (d *disk) takeOver() error {
	select {
	case d.p.opens <- struct{}{}:
	case <-d.ctx.Done():
		return d.ctx.Err()
	}
	defer func() { <-d.p.opens }()
	device, err := d.open()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(d.ctx, recoverTimeout)
	defer cancel()
	begin := time.Now()
	server, err := ublk.Recover(ctx, d.options(device, d.Device))
	if err != nil {
		return errors.Join(err, device.Close())
	}
	d.p.log.Info("ublk: disk taken over", "disk", d.ID, "device", d.Path, "took", time.Since(begin))
	d.mu.Lock()
	d.device, d.server = device, server
	d.mu.Unlock()
	d.tune(server)
	return nil
}

func (d *disk) open() (bdev.Device, error) {
	device, err := d.p.options.Open(d.Source, d.ReadOnly)
	if err == nil && device.SizeBytes() != d.SizeBytes {
		err = errors.Join(kind.Errorf(kind.Corrupt, "it has %d bytes, and had %d", device.SizeBytes(), d.SizeBytes), device.Close())
	}
	if err != nil {
		return nil, fmt.Errorf("open: %w", err)
	}
	return device, nil
}

// vanished tells whether the kernel has no such device of ours any more.
func (d *disk) vanished() bool {
	list, err := ublk.List()
	if err != nil {
		return false
	}
	for _, i := range list {
		if i.ID == d.Device && i.Owner == d.p.owner && i.State != ublk.Dead {
			return false
		}
	}
	return true
}

// lost tells whether somebody has deleted the device. Its server notices a moment after
// its node in /dev is gone.
func (d *disk) lost() bool {
	if _, err := os.Lstat(d.Path); errors.Is(err, os.ErrNotExist) {
		return true
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.server == nil {
		return d.gone
	}
	select {
	case <-d.server.Gone():
		return true
	default:
		return false
	}
}

// takenOver waits until an adopted disk is served, for as long as claimTimeout. One that
// cannot be is still withdrawn.
func (d *disk) takenOver(ctx context.Context) error {
	timer := time.NewTimer(claimTimeout)
	defer timer.Stop()
	select {
	case <-d.ready:
		return nil
	case <-timer.C:
	case <-ctx.Done():
		return kind.Errorf(kind.Canceled, "%w", context.Cause(ctx))
	}
	return nil
}

// claim makes sure that nobody uses the device, and that nobody begins to.
func (d *disk) claim(ctx context.Context) (release func() error, err error) {
	if err := d.p.takeChild(ctx); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			<-d.p.child
		}
	}()
	ctx, cancel := context.WithTimeout(ctx, claimTimeout)
	defer cancel()
	c, err := blockdev.Take(ctx, d.Path, blockdev.ClaimOptions{Wait: usersWait})
	if errors.Is(err, kind.NotFound) || err != nil && d.lost() {
		return func() error { <-d.p.child; return nil }, nil
	}
	if err != nil {
		return nil, err
	}
	return func() error { defer func() { <-d.p.child }(); return c.Release() }, nil
}

// takeChild waits until another child may be started; a receive from p.child gives that back.
func (p *Presenter) takeChild(ctx context.Context) error {
	select {
	case p.child <- struct{}{}:
		return nil
	case <-ctx.Done():
		return kind.Errorf(kind.Canceled, "%w", context.Cause(ctx))
	}
}

// halt takes the device from the kernel; on failure it is served as before.
func (d *disk) halt(ctx context.Context) error {
	select {
	case <-d.ready:
	default: // not taken over yet: end deletes it
		return nil
	}
	if d.server == nil {
		return nil
	}
	return d.server.Halt(ctx)
}

// stop ends what runs beside.
func (d *disk) stop() {
	d.cancel()
	<-d.ready
	d.tuning.Wait()
}

// end deletes the device and closes what is behind it. A writable disk that was adopted and
// not opened since is opened for the flush: our predecessor may have left something
// unflushed.
func (d *disk) end(ctx context.Context, flush bool) error {
	d.stop()
	var errs []error
	if d.server != nil {
		errs = append(errs, d.server.Stop(ctx))
	} else {
		errs = append(errs, ublk.Delete(ctx, d.Device))
	}
	if d.device == nil && flush {
		device, err := d.open()
		if err != nil {
			return errors.Join(append(errs, fmt.Errorf("for a last flush: %w", err))...)
		}
		d.device = device
	}
	return errors.Join(append(errs, d.closeDevice(flush))...)
}

// leave stops serving and leaves the device to the next process.
func (d *disk) leave() error {
	d.stop()
	var errs []error
	if d.server != nil {
		errs = append(errs, d.server.Close())
	}
	return errors.Join(append(errs, d.closeDevice(false))...)
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
