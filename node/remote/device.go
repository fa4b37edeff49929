package remote

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync/atomic"
	"time"

	"github.com/google/uuid"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/nvme/host"
	"github.com/thaw-project/thaw/target/bdev"
)

// doubtAfter is how long a block that the connected store does not show is waited for
// before the store is asked again: the news of a block just attached takes less.
const doubtAfter = time.Second

// device is an attached block. It finds the connection when it is read.
type device struct {
	t         *target
	block     string
	sizeBytes int64
	now       atomic.Pointer[opened]

	life   context.Context // ends with Close, or the Remote's
	cancel context.CancelFunc
}

func (t *target) device(block string, sizeBytes int64) *device {
	d := &device{t: t, block: block, sizeBytes: sizeBytes}
	d.life, d.cancel = context.WithCancel(t.r.life)
	return d
}

// opened is what a device reads from at present.
type opened struct {
	*host.Device
	link *link
}

var _ bdev.Device = (*device)(nil)

// host returns what to read from, and waits for it until ctx ends or the store says
// that it does not have the block.
func (d *device) host(ctx context.Context) (*opened, error) {
	missing := time.Time{}
	for {
		rec, ok := d.t.r.record(d.t.o.Name, d.block)
		if !ok {
			return nil, kind.Errorf(kind.NotFound, "block %s of target %s is not attached", d.block, d.t.o.Name)
		}
		id, err := uuid.Parse(rec.UUID)
		if err != nil {
			return nil, kind.Errorf(kind.Corrupt, "nvmeNamespace %.80q is no UUID", rec.UUID)
		}
		l, err := d.t.link(rec)
		if err != nil {
			return nil, err
		}
		h, connected, changed, err := l.open(id)
		if errors.Is(err, kind.Canceled) {
			continue // a link that was just replaced
		}
		if err != nil {
			return nil, err
		}
		if h != nil {
			if h.SizeBytes() != rec.SizeBytes {
				return nil, kind.Errorf(kind.Corrupt, "block %s of target %s has %d bytes and should have %d", d.block, d.t.o.Name, h.SizeBytes(), rec.SizeBytes)
			}
			o := &opened{h, l}
			d.now.Store(o)
			if d.life.Err() != nil { // Close may have come too early for this one
				h.Close()
			}
			return o, nil
		}
		if connected {
			if missing.IsZero() {
				missing = time.Now()
			}
			if time.Since(missing) >= doubtAfter {
				if err := d.t.doubt(d.block); err != nil {
					return nil, kind.Wrap(kind.IO, err)
				}
			}
		}
		again := time.NewTimer(doubtAfter)
		select {
		case <-changed:
		case <-again.C:
		case <-ctx.Done():
			again.Stop()
			return nil, kind.Errorf(kind.Unavailable, "block %s of target %s cannot be reached: %w", d.block, d.t.o.Name, context.Cause(ctx))
		}
		again.Stop()
	}
}

// ReadAt implements io.ReaderAt. It waits for a store that is away.
func (d *device) ReadAt(p []byte, off int64) (int, error) {
	begin := time.Now()
	n, err := d.readAt(p, off)
	d.t.r.metrics.read(n, err, time.Since(begin))
	return n, err
}

func (d *device) readAt(p []byte, off int64) (int, error) {
	var ctx context.Context // made when there is something to wait for
	for {
		h := d.now.Load()
		if h == nil {
			if ctx == nil {
				var cancel context.CancelFunc
				ctx, cancel = context.WithTimeout(d.life, d.t.o.LossTimeout)
				defer cancel()
			}
			var err error
			if h, err = d.host(ctx); err != nil {
				return 0, err
			}
		}
		n, err := h.ReadAt(p, off)
		switch {
		case err == nil || errors.Is(err, io.EOF):
			return n, err
		case errors.Is(err, kind.NotFound), errors.Is(err, kind.Unavailable) && h.link.isClosed() && d.life.Err() == nil:
			// The nvmeNamespace is gone, or the link was replaced: look again.
			d.now.CompareAndSwap(h, nil)
			if ctx != nil && ctx.Err() != nil {
				return 0, err
			}
		default:
			return n, fmt.Errorf("read block %s of target %s: %w", d.block, d.t.o.Name, err)
		}
	}
}

func (d *device) readOnly(what string) error {
	return kind.Errorf(kind.ReadOnly, "%s block %s of target %s: blocks never change", what, d.block, d.t.o.Name)
}

// WriteAt refuses.
func (d *device) WriteAt([]byte, int64) (int, error) { return 0, d.readOnly("write to") }

// Flush does nothing: nothing was written.
func (d *device) Flush() error { return nil }

// Discard refuses.
func (d *device) Discard(int64, int64) error { return d.readOnly("discard of") }

// WriteZeroes refuses.
func (d *device) WriteZeroes(int64, int64) error { return d.readOnly("write zeroes to") }

// SizeBytes is the size on record.
func (d *device) SizeBytes() int64 { return d.sizeBytes }

// ReadOnly is true.
func (d *device) ReadOnly() bool { return true }

// Close ends reads that wait for the store. The link belongs to all devices of its
// subsystem and stays.
func (d *device) Close() error {
	d.cancel()
	if h := d.now.Load(); h != nil {
		return h.Close()
	}
	return nil
}
