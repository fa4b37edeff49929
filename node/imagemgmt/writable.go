package imagemgmt

import (
	"context"
	"errors"
	"fmt"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/node/present"
)

// layer is what w shows, as far as its record says.
func (w *writer) layer() Layer { return Layer{Block: w.block(), Path: w.Path} }

// diskLocked is w's disk, which is not shown when it has nothing but id.
func (w *writer) diskLocked(id string) present.Disk {
	if w.disk.ID == "" {
		return present.Disk{ID: id}
	}
	return w.disk
}

// AttachWritable implements Service. id must not be the name of a block or of
// another disk.
func (m *Manager) AttachWritable(ctx context.Context, l Layer, id string) (present.Disk, error) {
	l, err := m.ownLayer(l)
	if err := errors.Join(err, checkName("disk", id)); err != nil {
		return present.Disk{}, kind.Wrap(kind.Invalid, err)
	}
	if l.Block.Name == id {
		return present.Disk{}, kind.Errorf(kind.Invalid, "writable disk %s cannot have the name of its block", id)
	}
	if err := m.enter(); err != nil {
		return present.Disk{}, err
	}
	defer m.calls.Done()
	unlock, err := m.keys.Lock(ctx, id)
	if err != nil {
		return present.Disk{}, fmt.Errorf("attach writable disk %s: %w", id, err)
	}
	defer unlock()
	disk, err := m.attachWritable(ctx, id, l)
	if err != nil {
		return present.Disk{}, fmt.Errorf("attach writable disk %s over block %s: %w", id, l.Block.Name, err)
	}
	return disk, nil
}

func (m *Manager) attachWritable(ctx context.Context, id string, l Layer) (present.Disk, error) {
	m.mu.Lock()
	w, known := m.writers[id]
	if known && (w.block() != l.Block || w.Path != l.Path) {
		m.mu.Unlock()
		return present.Disk{}, kind.Errorf(kind.Exists, "it is there over block %s with %s", w.Block, w.Path)
	}
	if known && w.disk.ID != "" {
		defer m.mu.Unlock()
		return w.disk, nil
	}
	if r := m.layers[id]; r.Made && r.Block != l.Block.Name {
		m.mu.Unlock()
		return present.Disk{}, kind.Errorf(kind.Exists, "its layer was made over block %s", r.Block)
	}
	if !known {
		w = &writer{writerRecord: writerRecord{Block: l.Block.Name, Target: l.Block.Target, Path: l.Path}}
		m.writers[id] = w // before anything else: from here on Attached says so
	}
	m.mu.Unlock()

	disk, stays, err := m.showWritable(ctx, id, w, l, known)
	m.mu.Lock()
	defer m.mu.Unlock()
	if err != nil {
		if !known && !stays {
			delete(m.writers, id)
			m.released(l.Block)
		}
		return present.Disk{}, err
	}
	w.disk = disk
	return disk, nil
}

// showWritable does it. stays tells of one that was not known and failed whether its
// record had to stay, since its disk may be there.
func (m *Manager) showWritable(ctx context.Context, id string, w *writer, l Layer, known bool) (disk present.Disk, stays bool, err error) {
	if err := m.takeSlot(ctx); err != nil {
		return present.Disk{}, false, err
	}
	defer m.leaveSlot()
	if !known {
		m.mu.Lock()
		r := m.layers[id]
		m.mu.Unlock()
		if !r.Made {
			r = layerRecord{Block: l.Block.Name, Target: l.Block.Target, SizeBytes: l.SizeBytes}
		}
		r.Path = l.Path
		if err := m.putWriter(id, w.writerRecord, r); err != nil {
			return present.Disk{}, false, err
		}
		m.mu.Lock()
		m.layers[id] = r
		m.mu.Unlock()
		m.step("attach writable: recorded")
	}
	disk, err = m.presentLayer(ctx, id, l)
	if err == nil {
		m.step("attach writable: shown")
		return disk, false, nil
	}
	if !known {
		cleanup, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupWait)
		defer cancel()
		var werr error
		if !errors.Is(err, kind.Exists) { // else the disk of this id is somebody else's
			werr = m.withdraw(cleanup, id, 0)
		}
		if werr == nil {
			werr = m.o.Layers.Release(cleanup, id, l)
		}
		if werr != nil {
			m.o.Logger.Warn("a disk may be left from a call that failed, until its owner calls again", "disk", id, "error", werr)
			return present.Disk{}, true, err
		}
		if derr := m.dropWriter(id); derr != nil {
			m.o.Logger.Warn("cannot forget a writable disk", "disk", id, "error", derr)
		}
	}
	return present.Disk{}, false, err
}

// presentLayer makes the layer id unless it was made before, and shows it.
func (m *Manager) presentLayer(ctx context.Context, id string, l Layer) (present.Disk, error) {
	m.mu.Lock()
	r, recorded := m.layers[id]
	m.mu.Unlock()
	if recorded {
		l.SizeBytes = r.SizeBytes
	}
	// One that is attached without a record is of version 2, which made it before.
	if err := m.o.Layers.Make(ctx, id, l, r.Made || !recorded); err != nil {
		return present.Disk{}, err
	}
	if recorded && !r.Made {
		m.step("attach writable: made")
		r.Made = true
		if err := m.putLayer(id, r); err != nil {
			return present.Disk{}, err
		}
		m.mu.Lock()
		m.layers[id] = r
		m.mu.Unlock()
		m.step("attach writable: recorded as made")
	}
	return m.o.Presenter.Present(ctx, id, m.o.Layers.Source(id, l), false)
}

// DetachWritable implements Service. While the kernel has the disk open it is
// kind.InUse and nothing changes.
func (m *Manager) DetachWritable(ctx context.Context, block, id string) error {
	if err := errors.Join(checkName("block", block), checkName("disk", id)); err != nil {
		return kind.Wrap(kind.Invalid, err)
	}
	if err := m.enter(); err != nil {
		return err
	}
	defer m.calls.Done()
	unlock, err := m.keys.Lock(ctx, id)
	if err != nil {
		return fmt.Errorf("detach writable disk %s: %w", id, err)
	}
	defer unlock()
	if err := m.detachWritable(ctx, block, id); err != nil {
		return fmt.Errorf("detach writable disk %s: %w", id, err)
	}
	return nil
}

// detachWritable does it; the caller has id locked.
func (m *Manager) detachWritable(ctx context.Context, block, id string) error {
	m.mu.Lock()
	w := m.writers[id]
	m.mu.Unlock()
	if w == nil {
		return nil
	}
	if w.Block != block {
		return kind.Errorf(kind.Invalid, "it is over block %s, not %s", w.Block, block)
	}
	// Withdraw first: should this process die in between, the record brings the
	// disk back and the caller's next try ends it. The other way round a disk that
	// cannot be taken away would be shown for nobody.
	if err := m.withdraw(ctx, id, hideWait); err != nil {
		return err
	}
	m.mu.Lock()
	w.disk = present.Disk{}
	m.mu.Unlock()
	m.step("detach writable: hidden")
	if err := m.o.Layers.Release(ctx, id, w.layer()); err != nil {
		return err
	}
	m.step("detach writable: released")
	if err := m.dropWriter(id); err != nil {
		return err
	}
	m.mu.Lock()
	delete(m.writers, id)
	m.mu.Unlock()
	m.released(w.block())
	return nil
}

// DeleteWritable implements Service.
func (m *Manager) DeleteWritable(ctx context.Context, l Layer, id string) error {
	l, err := m.ownLayer(l)
	if err := errors.Join(err, checkName("disk", id)); err != nil {
		return kind.Wrap(kind.Invalid, err)
	}
	if err := m.enter(); err != nil {
		return err
	}
	defer m.calls.Done()
	unlock, err := m.keys.Lock(ctx, id)
	if err == nil {
		defer unlock()
		err = m.deleteWritable(ctx, l, id)
	}
	if err != nil {
		return fmt.Errorf("delete writable layer %s: %w", id, err)
	}
	return nil
}

func (m *Manager) deleteWritable(ctx context.Context, l Layer, id string) error {
	if err := m.detachWritable(ctx, l.Block.Name, id); err != nil {
		return err
	}
	m.mu.Lock()
	r, recorded := m.layers[id]
	m.mu.Unlock()
	if r.Made && r.Block != l.Block.Name {
		return kind.Errorf(kind.Invalid, "it was made over block %s, not %s", r.Block, l.Block.Name)
	}
	// Without a record too: a process may have died before there was one, and layers of
	// version 2 have none.
	if err := m.o.Layers.Delete(ctx, id, l); err != nil {
		return err
	}
	m.step("delete writable: deleted")
	if !recorded {
		return nil
	}
	if err := m.dropLayer(id); err != nil {
		return err
	}
	m.mu.Lock()
	delete(m.layers, id)
	m.mu.Unlock()
	return nil
}

// StatWritable implements Service.
func (m *Manager) StatWritable(ctx context.Context, l Layer, id string) (Writable, error) {
	l, err := m.ownLayer(l)
	if err := errors.Join(err, checkName("disk", id)); err != nil {
		return Writable{}, kind.Wrap(kind.Invalid, err)
	}
	if err := m.enter(); err != nil {
		return Writable{}, err
	}
	defer m.calls.Done()
	var out Writable
	m.mu.Lock()
	if w := m.writers[id]; w != nil {
		out.Disk = w.disk
	}
	m.mu.Unlock()
	if out.AllocatedBytes, out.Files, err = m.o.Layers.Usage(ctx, id, l); err != nil {
		return Writable{}, fmt.Errorf("writable layer %s: %w", id, err)
	}
	return out, nil
}

// EnsureScratch implements Service.
func (m *Manager) EnsureScratch(ctx context.Context, target string, sizeBytes int64) (Block, error) {
	b := m.own(Block{Target: target, Name: "scratch"})
	if err := checkBlock(b); err != nil {
		return Block{}, err
	}
	if sizeBytes <= 0 || sizeBytes%512 != 0 {
		return Block{}, kind.Errorf(kind.Invalid, "scratch block of %d bytes: must be a multiple of 512", sizeBytes)
	}
	if m.o.Scratch == nil {
		return Block{}, kind.Errorf(kind.Unsupported, "there are no scratch blocks here")
	}
	if err := m.enter(); err != nil {
		return Block{}, err
	}
	defer m.calls.Done()
	return m.o.Scratch(ctx, b.Target, sizeBytes)
}
