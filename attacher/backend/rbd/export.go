//go:build ceph

package rbd

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/ceph/go-ceph/rbd"

	"github.com/thaw-project/thaw/attacher"
	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/target/bdev"
)

// OpenLvol implements attacher.Backend. An lvol that a node writes is kind.InUse.
func (b *Backend) OpenLvol(name string, readOnly bool) (bdev.Device, error) {
	var mu sync.Mutex
	var opened *device // guarded by mu
	var left bool      // guarded by mu: the caller waits no more
	err := b.do(b.life, "open lvol "+clip(name), b.o.Timeout, []string{name}, func(context.Context) error {
		r, err := b.find(name)
		if err != nil {
			return err
		}
		if !readOnly && r.fixed() {
			return kind.Errorf(kind.ReadOnly, "it is read-only: open it for reading, or clone it")
		}
		b.mu.RLock()
		node, written := b.writableExport(name)
		b.mu.RUnlock()
		if written {
			return kind.Errorf(kind.InUse, "node %s writes it", node)
		}
		image, snap := b.source(r)
		d, err := b.open.open(r.UUID, image, snap, readOnly, func() (*rbd.Image, error) { return b.openImage(image, snap) })
		if err != nil {
			return wrap(err, "open image %s", b.imageName(r.Image))
		}
		b.forgetCount(r.UUID)
		mu.Lock()
		defer mu.Unlock()
		if left {
			d.begin()
			return nil
		}
		opened = d
		return nil
	})
	mu.Lock()
	defer mu.Unlock()
	left = true
	if err != nil {
		if opened != nil { // at the very moment that the time was up
			opened.begin()
		}
		return nil, err
	}
	return opened, nil
}

// exportUse is how a node has an lvol.
type exportUse struct{ writable bool }

// writableExport names the node that writes an lvol. The caller holds mu.
func (b *Backend) writableExport(name string) (node string, ok bool) {
	for n, u := range b.exported[name] {
		if u.writable {
			return n, true
		}
	}
	return "", false
}

// exporter tells nodes which image to open.
type exporter struct{ b *Backend }

// Exporter returns the one exporter of this store: it shows nothing, since nodes open
// images themselves, but knows who has what.
func (b *Backend) Exporter() (attacher.Exporter, error) { return exporter{b}, nil }

func (x exporter) Transports() []string { return []string{attacher.TransportRBD} }

// Restore implements attacher.Exporter.
func (x exporter) Restore(exports []attacher.Export) error {
	x.b.mu.Lock()
	defer x.b.mu.Unlock()
	clear(x.b.exported)
	for _, e := range exports {
		x.b.noteExportLocked(e)
	}
	return nil
}

func (b *Backend) noteExportLocked(e attacher.Export) {
	if b.exported[e.Block] == nil {
		b.exported[e.Block] = make(map[string]exportUse)
	}
	b.exported[e.Block][e.Node] = exportUse{writable: e.Writable}
}

// Export implements attacher.Exporter.
func (x exporter) Export(e attacher.Export, _ string) (attacher.Exported, error) {
	b := x.b
	var out attacher.Exported
	err := b.do(b.life, fmt.Sprintf("export lvol %s to node %s", clip(e.Block), e.Node), b.o.Timeout, []string{e.Block}, func(ctx context.Context) error {
		r, err := b.find(e.Block)
		switch {
		case err != nil:
			return err
		case e.Transport != "" && e.Transport != attacher.TransportRBD:
			return kind.Errorf(kind.Unsupported, "images of Ceph are shown by transport %s, not %.40q", attacher.TransportRBD, e.Transport)
		case e.Writable && r.fixed():
			return kind.Errorf(kind.ReadOnly, "it is read-only")
		case !e.Writable && !r.fixed():
			return kind.Errorf(kind.Invalid, "it can be written: a node may only write it, or read a snapshot")
		case e.Writable && b.open.has(r.UUID):
			return kind.Errorf(kind.InUse, "it is open here")
		}
		b.mu.Lock()
		defer b.mu.Unlock()
		if node, ok := b.writableExport(e.Block); ok && node != e.Node {
			return kind.Errorf(kind.InUse, "node %s writes it", node)
		}
		if ctx.Err() != nil {
			return kind.Wrap(kind.Canceled, context.Cause(ctx))
		}
		b.noteExportLocked(e)
		delete(b.counts, r.UUID)
		image, snap := b.sourceLocked(r)
		out = attacher.Exported{
			SizeBytes: r.SizeBytes,
			RBD:       &attacher.RBDImage{Cluster: b.c.fsid, Pool: b.o.Pool, Image: b.imageName(image), Snapshot: snap},
		}
		return nil
	})
	if err != nil {
		return attacher.Exported{}, err
	}
	return out, nil
}

// Withdraw implements attacher.Exporter. A node that has written an lvol loses the
// exclusive lock, and Ceph refuses what it still sends; of a snapshot there is nothing
// to take away, as it never changes.
func (x exporter) Withdraw(e attacher.Export) error {
	b := x.b
	return b.do(b.life, fmt.Sprintf("withdraw lvol %s from node %s", clip(e.Block), e.Node), b.o.Timeout, []string{e.Block}, func(ctx context.Context) error {
		b.mu.RLock()
		use, ok := b.exported[e.Block][e.Node]
		r := b.index.names[e.Block]
		b.mu.RUnlock()
		if !ok {
			return nil
		}
		if use.writable && r != nil {
			if err := b.breakLock(r); err != nil {
				return err
			}
		}
		b.mu.Lock()
		defer b.mu.Unlock()
		if delete(b.exported[e.Block], e.Node); len(b.exported[e.Block]) == 0 {
			delete(b.exported, e.Block)
		}
		if r != nil {
			delete(b.counts, r.UUID)
		}
		return nil
	})
}

// breakLock takes the exclusive lock from whoever has the head of r, and fences it.
func (b *Backend) breakLock(r *lvolRecord) error {
	img, err := b.openImage(r.Image, "")
	if isNotFound(err) {
		return nil
	}
	if err != nil {
		return wrap(err, "open image %s", b.imageName(r.Image))
	}
	owners, err := img.LockGetOwners()
	for _, o := range owners {
		if err == nil {
			err = img.LockBreak(o.Mode, o.Owner)
			if isNotFound(err) {
				err = nil
			}
		}
	}
	return errors.Join(wrap(err, "take image %s from its writer", b.imageName(r.Image)), wrap(img.Close(), "close image %s", b.imageName(r.Image)))
}

// Opener opens images as a node does, with a connection and credentials of its own.
type Opener struct {
	o     Options
	c     *cluster
	open  *table
	calls chan struct{} // full of opens that wait for the cluster
	next  atomic.Int64

	mu     sync.Mutex
	closed bool           // guarded by mu
	opens  sync.WaitGroup // images that are being opened; Add under mu while not closed

	once sync.Once
	err  error // of Close
}

// NewOpener connects to the cluster. Prefix, ObjectBytes and Lease of the options mean
// nothing here.
func NewOpener(ctx context.Context, o Options) (*Opener, error) {
	o.ensureDefaults()
	if err := o.validate(); err != nil {
		return nil, err
	}
	c, err := connect(ctx, o)
	if err != nil {
		return nil, err
	}
	return &Opener{o: o, c: c, open: newTable(o.Timeout), calls: make(chan struct{}, maxPending)}, nil
}

// Open opens what an exporter told: a snapshot for reading, or an image to be written,
// of which others keep off as the store says. kind.Unavailable when the cluster does not
// answer in time; the device's own I/O waits for it.
func (o *Opener) Open(ctx context.Context, image attacher.RBDImage, readOnly bool) (bdev.Device, error) {
	switch {
	case image.Cluster != "" && image.Cluster != o.c.fsid:
		return nil, kind.Errorf(kind.Invalid, "open image %s: it is in the cluster %s, and this node's is %s", image.Image, image.Cluster, o.c.fsid)
	case image.Pool != o.o.Pool:
		return nil, kind.Errorf(kind.Invalid, "open image %s: it is in the pool %s, and this node's is %s", image.Image, image.Pool, o.o.Pool)
	case image.Snapshot != "" && !readOnly:
		return nil, kind.Errorf(kind.ReadOnly, "open image %s: a snapshot is read-only", image.Image)
	}
	ctx, cancel := context.WithTimeoutCause(ctx, o.o.Timeout, kind.Errorf(kind.Unavailable, "Ceph did not answer within %v", o.o.Timeout))
	defer cancel()
	select {
	case o.calls <- struct{}{}:
	case <-ctx.Done():
		return nil, fmt.Errorf("open image %s: %w", image.Image, context.Cause(ctx))
	}
	type answer struct {
		d   *device
		err error
	}
	answers := make(chan answer)     // handed over or kept, never lost
	key := fmt.Sprint(o.next.Add(1)) // no two share an image: each ends alone
	o.mu.Lock()
	if o.closed {
		o.mu.Unlock()
		<-o.calls
		return nil, kind.Errorf(kind.Unavailable, "open image %s: the connection to Ceph is closed", image.Image)
	}
	o.opens.Go(func() {
		defer func() { <-o.calls }()
		d, err := o.open.open(key, image.Image, image.Snapshot, readOnly, func() (*rbd.Image, error) {
			if readOnly {
				return rbd.OpenImageReadOnly(o.c.pool, image.Image, image.Snapshot)
			}
			return rbd.OpenImage(o.c.pool, image.Image, rbd.NoSnapshot)
		})
		select {
		case answers <- answer{d, err}:
		case <-ctx.Done():
			if err == nil {
				d.begin() // the caller has left
			}
		}
	})
	o.mu.Unlock()
	select {
	case a := <-answers:
		if a.err != nil {
			return nil, wrap(a.err, "open image %s", image.Image)
		}
		return a.d, nil
	case <-ctx.Done():
		return nil, fmt.Errorf("open image %s: %w", image.Image, context.Cause(ctx))
	}
}

// Close closes what is open and the connection; Open is kind.Unavailable then. When the cluster does not answer it
// returns after Options.Timeout with kind.Unavailable.
func (o *Opener) Close() error {
	o.once.Do(func() {
		o.mu.Lock()
		o.closed = true
		o.mu.Unlock()
		o.err = within(o.o.Timeout, "close the connection to Ceph", func() error {
			o.opens.Wait() // an image must not outlive the connection
			err := o.open.close()
			o.c.close()
			return err
		})
	})
	return o.err
}
