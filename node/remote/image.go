package remote

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/target/bdev"
)

// imageDevice is an attached block that is an image of Ceph. It is opened when it is first
// read, and then waits for the cluster by itself.
type imageDevice struct {
	t     *target
	block string
	rec   record
	gate  chan struct{} // capacity 1: who opens

	mu     sync.Mutex
	device bdev.Device // guarded by mu: nil until opened
	closed bool        // guarded by mu

	life   context.Context // ends with Close, or the Remote's
	cancel context.CancelFunc
}

var _ bdev.Device = (*imageDevice)(nil)

func (t *target) imageDevice(block string, rec record) *imageDevice {
	d := &imageDevice{t: t, block: block, rec: rec, gate: make(chan struct{}, 1)}
	d.life, d.cancel = context.WithCancel(t.r.life)
	return d
}

// open returns the device and opens it if need be, until ctx ends.
func (d *imageDevice) open(ctx context.Context) (bdev.Device, error) {
	select {
	case d.gate <- struct{}{}:
		defer func() { <-d.gate }()
	case <-ctx.Done():
		return nil, kind.Errorf(kind.Unavailable, "block %s of target %s cannot be opened: %w", d.block, d.t.o.Name, context.Cause(ctx))
	}
	d.mu.Lock()
	device := d.device
	d.mu.Unlock()
	if device != nil {
		return device, nil
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stop := context.AfterFunc(d.life, cancel)
	defer stop()
	for pause := reconnectFirst; ; pause = min(2*pause, reconnectMost) {
		device, err := d.t.r.o.OpenRBD(ctx, *d.rec.RBD)
		if err == nil {
			return d.keep(device)
		}
		if refused(err) {
			return nil, fmt.Errorf("open block %s of target %s: %w", d.block, d.t.o.Name, err)
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return nil, kind.Errorf(kind.Unavailable, "block %s of target %s cannot be opened: %w", d.block, d.t.o.Name, err)
		}
	}
}

// keep makes device what is read, unless it is not what was attached.
func (d *imageDevice) keep(device bdev.Device) (bdev.Device, error) {
	if n := device.SizeBytes(); n != d.rec.SizeBytes {
		return nil, errors.Join(kind.Errorf(kind.Corrupt, "block %s of target %s has %d bytes and should have %d", d.block, d.t.o.Name, n, d.rec.SizeBytes), device.Close())
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return nil, errors.Join(kind.Errorf(kind.Canceled, "block %s of target %s was closed", d.block, d.t.o.Name), device.Close())
	}
	d.device = device
	return device, nil
}

// ReadAt implements io.ReaderAt. The first waits for a cluster that is away, for the
// target's LossTimeout.
func (d *imageDevice) ReadAt(p []byte, off int64) (int, error) {
	begin := time.Now()
	n, err := d.readAt(p, off)
	d.t.r.metrics.read(n, err, time.Since(begin))
	return n, err
}

func (d *imageDevice) readAt(p []byte, off int64) (int, error) {
	d.mu.Lock()
	device, closed := d.device, d.closed
	d.mu.Unlock()
	if closed || d.life.Err() != nil {
		return 0, kind.Errorf(kind.Canceled, "block %s of target %s was closed", d.block, d.t.o.Name)
	}
	if device == nil {
		ctx, cancel := context.WithTimeout(d.life, d.t.o.LossTimeout)
		defer cancel()
		var err error
		if device, err = d.open(ctx); err != nil {
			return 0, err
		}
	}
	return device.ReadAt(p, off)
}

func (d *imageDevice) readOnly(what string) error {
	return kind.Errorf(kind.ReadOnly, "%s block %s of target %s: blocks never change", what, d.block, d.t.o.Name)
}

// WriteAt refuses.
func (d *imageDevice) WriteAt([]byte, int64) (int, error) { return 0, d.readOnly("write to") }

// Flush does nothing: nothing was written.
func (d *imageDevice) Flush() error { return nil }

// Discard refuses.
func (d *imageDevice) Discard(int64, int64) error { return d.readOnly("discard of") }

// WriteZeroes refuses.
func (d *imageDevice) WriteZeroes(int64, int64) error { return d.readOnly("write zeroes to") }

// SizeBytes is the size on record.
func (d *imageDevice) SizeBytes() int64 { return d.rec.SizeBytes }

// ReadOnly is true.
func (d *imageDevice) ReadOnly() bool { return true }

// Close ends reads that wait for the cluster.
func (d *imageDevice) Close() error {
	d.cancel()
	d.mu.Lock()
	device := d.device
	d.device, d.closed = nil, true
	d.mu.Unlock()
	if device == nil {
		return nil
	}
	return device.Close()
}
