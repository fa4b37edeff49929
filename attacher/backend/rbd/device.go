//go:build ceph

package rbd

import (
	"errors"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ceph/go-ceph/rbd"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/target/bdev"
)

// maxDiscardBytes is how much is discarded at once: librbd takes less than 2 GiB.
const maxDiscardBytes = 1 << 30

// table has the images that are open, by a key of the owner's.
type table struct {
	timeout time.Duration // how long Close of a device waits for the cluster

	mu      sync.Mutex
	handles map[string]*handle // guarded by mu
	own     sync.WaitGroup     // who closes images; Add under mu
}

func newTable(timeout time.Duration) *table {
	return &table{timeout: timeout, handles: make(map[string]*handle)}
}

// handle is an open image, shared by its devices. librbd serves any number of calls on
// it at once; each takes a thread while it waits.
type handle struct {
	t           *table
	key         string
	img         *rbd.Image
	image, snap string
	size        atomic.Int64

	users   int                  // guarded by t.mu: devices and others; the last closes img
	devices map[*device]struct{} // guarded by t.mu
	closed  chan struct{}        // closed after img is
	err     error                // of closing; read after closed
}

// open returns a device of the image under key, which image opens if it is not. Two
// calls for one key must not be made at the same time.
func (t *table) open(key, name, snap string, readOnly bool, image func() (*rbd.Image, error)) (*device, error) {
	for {
		t.mu.Lock()
		h := t.handles[key]
		if h == nil {
			t.mu.Unlock()
			break
		}
		if h.users > 0 {
			d := h.deviceLocked(readOnly)
			t.mu.Unlock()
			return d, nil
		}
		t.mu.Unlock()
		<-h.closed
	}
	img, err := image()
	if err != nil {
		return nil, err
	}
	size, err := img.GetSize()
	if err != nil {
		return nil, errors.Join(err, img.Close())
	}
	h := &handle{t: t, key: key, img: img, image: name, snap: snap, devices: make(map[*device]struct{}), closed: make(chan struct{})}
	h.size.Store(int64(size))
	t.mu.Lock()
	defer t.mu.Unlock()
	t.handles[key] = h
	return h.deviceLocked(readOnly), nil
}

// deviceLocked makes a device. The caller holds t.mu.
func (h *handle) deviceLocked(readOnly bool) *device {
	d := &device{h: h, readOnly: readOnly, idle: make(chan struct{})}
	h.users++
	h.devices[d] = struct{}{}
	return d
}

// use returns the handle of an image's head that is open, to be released, or nil.
func (t *table) use(image string) *handle {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, h := range t.handles {
		if h.image == image && h.snap == "" && h.users > 0 {
			h.users++
			return h
		}
	}
	return nil
}

func (t *table) has(key string) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.handles[key] != nil
}

// resized tells open devices of a new size.
func (t *table) resized(key string, sizeBytes int64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if h := t.handles[key]; h != nil {
		h.size.Store(sizeBytes)
	}
}

// release counts a user out. The last closes the image, in a goroutine, for librbd waits
// for the cluster then.
func (h *handle) release() (last bool) {
	h.t.mu.Lock()
	defer h.t.mu.Unlock()
	if h.users--; h.users > 0 {
		return false
	}
	h.t.own.Go(func() {
		h.err = wrap(h.img.Close(), "close image %s", h.image)
		h.t.mu.Lock()
		delete(h.t.handles, h.key)
		h.t.mu.Unlock()
		close(h.closed)
	})
	return true
}

// close closes all devices and waits until their images are closed, however long their
// calls take.
func (t *table) close() error {
	t.mu.Lock()
	var devices []*device
	var handles []*handle
	for _, h := range t.handles {
		handles = append(handles, h)
		for d := range h.devices {
			devices = append(devices, d)
		}
	}
	t.mu.Unlock()
	for _, d := range devices {
		d.begin()
	}
	var errs []error
	for _, h := range handles {
		<-h.closed
		errs = append(errs, h.err)
	}
	t.own.Wait()
	return errors.Join(errs...)
}

// device is an image as a bdev.Device.
type device struct {
	h        *handle
	readOnly bool

	mu     sync.Mutex
	calls  int           // guarded by mu: I/O on its way
	closed bool          // guarded by mu
	idle   chan struct{} // closed when it is closed and has no calls
	last   bool          // it was the image's last; read after idle
}

var _ bdev.Device = (*device)(nil)

func (d *device) enter() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return kind.Errorf(kind.Unavailable, "the device is closed")
	}
	d.calls++
	return nil
}

func (d *device) leave() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.calls--; d.calls == 0 && d.closed {
		d.finishLocked()
	}
}

// begin closes the device once its calls are back.
func (d *device) begin() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return
	}
	d.closed = true
	d.h.t.mu.Lock()
	delete(d.h.devices, d)
	d.h.t.mu.Unlock()
	if d.calls == 0 {
		d.finishLocked()
	}
}

// finishLocked gives the image back. The caller holds mu.
func (d *device) finishLocked() {
	d.last = d.h.release()
	close(d.idle)
}

// Close implements bdev.Device. While the cluster is away it returns after the owner's
// timeout, kind.Unavailable, and the image is closed when the cluster is back.
func (d *device) Close() error {
	d.mu.Lock()
	again := d.closed
	d.mu.Unlock()
	if again {
		return nil
	}
	d.begin()
	timer := time.NewTimer(d.h.t.timeout)
	defer timer.Stop()
	select {
	case <-d.idle:
	case <-timer.C:
		return kind.Errorf(kind.Unavailable, "close image %s: Ceph does not answer", d.h.image)
	}
	if !d.last {
		return nil
	}
	select {
	case <-d.h.closed:
		return d.h.err
	case <-timer.C:
		return kind.Errorf(kind.Unavailable, "close image %s: Ceph does not answer", d.h.image)
	}
}

// check is about a range of n bytes.
func (d *device) check(off, n int64) error {
	if size := d.h.size.Load(); off < 0 || n < 0 || off > size || n > size-off {
		return kind.Errorf(kind.Invalid, "%d bytes at %d of a device of %d", n, off, size)
	}
	return nil
}

func (d *device) ReadAt(p []byte, off int64) (int, error) {
	size := d.h.size.Load()
	if off < 0 {
		return 0, kind.Errorf(kind.Invalid, "read at %d", off)
	}
	if err := d.enter(); err != nil {
		return 0, err
	}
	defer d.leave()
	if off >= size {
		return 0, io.EOF
	}
	short := int64(len(p)) > size-off
	if short {
		p = p[:size-off]
	}
	n, err := d.h.img.ReadAt(p, off)
	switch {
	case err != nil && !errors.Is(err, io.EOF):
		return n, wrap(err, "read %d bytes at %d of image %s", len(p), off, d.h.image)
	case n < len(p) || short:
		return n, io.EOF
	}
	return n, nil
}

// change checks and begins a change of n bytes; d.leave ends it.
func (d *device) change(off, n int64) error {
	if d.readOnly {
		return kind.Errorf(kind.ReadOnly, "the device is read-only")
	}
	if err := d.check(off, n); err != nil {
		return err
	}
	return d.enter()
}

func (d *device) WriteAt(p []byte, off int64) (int, error) {
	if err := d.change(off, int64(len(p))); err != nil {
		return 0, err
	}
	defer d.leave()
	n, err := d.h.img.WriteAt(p, off)
	return n, wrap(err, "write %d bytes at %d of image %s", len(p), off, d.h.image)
}

// Flush implements bdev.Device. There is no cache: what was written is durable in Ceph.
func (d *device) Flush() error {
	if err := d.enter(); err != nil {
		return err
	}
	defer d.leave()
	if d.readOnly {
		return nil
	}
	return wrap(d.h.img.Flush(), "flush image %s", d.h.image)
}

func (d *device) Discard(offset, lengthBytes int64) error {
	if err := d.change(offset, lengthBytes); err != nil {
		return err
	}
	defer d.leave()
	for lengthBytes > 0 {
		n, err := d.h.img.Discard(uint64(offset), uint64(min(lengthBytes, maxDiscardBytes)))
		if err != nil {
			return wrap(err, "discard %d bytes at %d of image %s", lengthBytes, offset, d.h.image)
		}
		if n <= 0 {
			return kind.Errorf(kind.IO, "discard at %d of image %s does nothing", offset, d.h.image)
		}
		offset, lengthBytes = offset+int64(n), lengthBytes-int64(n)
	}
	return nil
}

func (d *device) WriteZeroes(offset, lengthBytes int64) error { return d.Discard(offset, lengthBytes) }

func (d *device) SizeBytes() int64 { return d.h.size.Load() }
func (d *device) ReadOnly() bool   { return d.readOnly }
