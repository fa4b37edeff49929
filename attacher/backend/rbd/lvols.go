//go:build ceph

package rbd

import (
	"context"
	"errors"
	"maps"
	"slices"

	"github.com/ceph/go-ceph/rbd"
	"github.com/google/uuid"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/lvol"
)

// maxSizeBytes bounds lvols: with the smallest objects it is what librbd keeps a map of.
const maxSizeBytes = 16 << 40

func checkName(name string) error {
	if len(name) > lvol.MaxNameBytes || !plain(name) {
		return kind.Errorf(kind.Invalid, "lvol name %.160q: must be 1 to %d of A-Z a-z 0-9 . _ -", name, lvol.MaxNameBytes)
	}
	return nil
}

func checkSize(name string, sizeBytes int64) error {
	if sizeBytes <= 0 || sizeBytes%512 != 0 || sizeBytes > maxSizeBytes {
		return kind.Errorf(kind.Invalid, "lvol %.160q: a size of %d bytes: must be a multiple of 512 up to %d", name, sizeBytes, int64(maxSizeBytes))
	}
	return nil
}

// vacant is nil when no lvol has that name.
func (b *Backend) vacant(name string) error {
	if _, err := b.find(name); err == nil {
		return kind.Errorf(kind.Exists, "lvol %s exists already", name)
	}
	return nil
}

// Create implements attacher.Backend. kind.Exists when name is taken.
func (b *Backend) Create(name string, sizeBytes int64) (lvol.Info, error) {
	if err := errors.Join(checkName(name), checkSize(name, sizeBytes)); err != nil {
		return lvol.Info{}, kind.Wrap(kind.Invalid, err)
	}
	err := b.do(b.life, "create lvol "+name, b.o.Timeout, []string{name}, func(ctx context.Context) error {
		if err := b.vacant(name); err != nil {
			return err
		}
		id := uuid.NewString()
		return b.make(ctx, lvolRecord{UUID: id, Name: name, SizeBytes: sizeBytes, Image: id}, imageRecord{ID: id}, func() error {
			o, err := b.imageOptions(false)
			if err != nil {
				return err
			}
			defer o.Destroy()
			return rbd.CreateImage(b.c.pool, b.imageName(id), uint64(sizeBytes), o)
		})
	})
	if err != nil {
		return lvol.Info{}, err
	}
	return b.info(name)
}

// Clone implements attacher.Backend.
func (b *Backend) Clone(snapshot, name string) (lvol.Info, error) {
	if err := checkName(name); err != nil {
		return lvol.Info{}, err
	}
	err := b.do(b.life, "clone lvol "+clip(snapshot), b.o.Timeout, []string{snapshot, name}, func(ctx context.Context) error {
		from, err := b.find(snapshot)
		switch {
		case err != nil:
			return err
		case !from.snapshot():
			return kind.Errorf(kind.Invalid, "it is not a snapshot")
		}
		if err := b.vacant(name); err != nil {
			return err
		}
		id := uuid.NewString()
		r := lvolRecord{UUID: id, Name: name, SizeBytes: from.SizeBytes, Parent: from.UUID, Image: id}
		return b.make(ctx, r, imageRecord{ID: id, Parent: from.Image, ParentSnap: from.Snap}, func() error {
			o, err := b.imageOptions(true)
			if err != nil {
				return err
			}
			defer o.Destroy()
			return rbd.CloneImage(b.c.pool, b.imageName(from.Image), from.Snap, b.c.pool, b.imageName(id), o)
		})
	})
	if err != nil {
		return lvol.Info{}, err
	}
	return b.info(name)
}

// make enters an image in the index, makes it, and enters the lvol that it is for. On
// failure nothing stays.
func (b *Backend) make(ctx context.Context, r lvolRecord, i imageRecord, create func() error) error {
	r.CreatedUnixNanos = created()
	release := b.hold(i.ID)
	err := b.commit(ctx, func(c *change) error { c.putImage(i); return nil })
	if err == nil {
		reach("create: entered")
		if err = wrap(create(), "make image %s", b.imageName(i.ID)); err == nil {
			reach("create: made")
			err = b.commit(ctx, func(c *change) error { c.put(r); return nil })
		}
	}
	release()
	if err != nil {
		b.sweepLater()
		return err
	}
	reach("create: done")
	b.noteCount(&r, 0)
	return nil
}

// Snapshot implements attacher.Backend. It is also a flush.
func (b *Backend) Snapshot(name, snapshot string) (lvol.Info, error) {
	if err := checkName(snapshot); err != nil {
		return lvol.Info{}, err
	}
	err := b.do(b.life, "snapshot lvol "+clip(name), b.o.Timeout, []string{name, snapshot}, func(ctx context.Context) error {
		of, err := b.find(name)
		switch {
		case err != nil:
			return err
		case of.snapshot():
			return kind.Errorf(kind.Invalid, "it is a snapshot itself")
		}
		if err := b.vacant(snapshot); err != nil {
			return err
		}
		defer b.hold(of.Image)()
		b.mu.RLock()
		id := uuid.NewString()
		snap := freeSnap(*b.index.images[of.Image], snapshot, id)
		b.mu.RUnlock()
		if err := b.addSnap(ctx, of.Image, snap); err != nil {
			b.sweepLater()
			return err
		}
		reach("snapshot: taken")
		if err := b.commit(ctx, func(c *change) error {
			r, err := c.lvol(name)
			if err != nil {
				return err
			}
			c.put(lvolRecord{
				UUID: id, Name: snapshot, SizeBytes: r.SizeBytes, Parent: r.Parent, Image: r.Image, Snap: snap, CreatedUnixNanos: created(),
			})
			r.Parent = id
			c.put(r)
			return nil
		}); err != nil {
			b.sweepLater()
			return err
		}
		reach("snapshot: done")
		b.forgetCount(of.UUID)
		return nil
	})
	if err != nil {
		return lvol.Info{}, err
	}
	return b.info(snapshot)
}

// SetReadOnly implements attacher.Backend. kind.InUse while it is open or a node has it, if
// that would change it.
func (b *Backend) SetReadOnly(name string, readOnly bool) (lvol.Info, error) {
	err := b.do(b.life, "set read-only lvol "+clip(name), b.o.Timeout, []string{name}, func(ctx context.Context) error {
		r, err := b.find(name)
		switch {
		case err != nil:
			return err
		case r.snapshot() && !readOnly:
			return kind.Errorf(kind.Invalid, "it is a snapshot and cannot be made writable")
		case r.fixed() == readOnly:
			return nil
		}
		if err := b.unused(r); err != nil {
			return err
		}
		empty := false
		if readOnly {
			if empty, err = b.empty(r); err != nil {
				return err
			}
		}
		if readOnly && !empty {
			// Not while collect removes an earlier one.
			b.sweeps.Lock()
			defer b.sweeps.Unlock()
			defer b.hold(r.Image)()
			if err := b.addSnap(ctx, r.Image, readSnap); err != nil {
				return err
			}
		}
		if err := b.commit(ctx, func(c *change) error {
			r, err := c.lvol(name)
			r.ReadOnly, r.Empty = readOnly, empty
			c.put(r)
			return err
		}); err != nil {
			return err
		}
		reach("read-only: set")
		b.forgetCount(r.UUID)
		if !readOnly {
			b.sweepLater()
		}
		return nil
	})
	if err != nil {
		return lvol.Info{}, err
	}
	return b.info(name)
}

// empty tells whether r is a clone that shows its parent as it is.
func (b *Backend) empty(r *lvolRecord) (bool, error) {
	b.mu.RLock()
	i, p := b.index.images[r.Image], b.index.lvols[r.Parent]
	b.mu.RUnlock()
	if p == nil || p.Image != i.Parent || p.Snap != i.ParentSnap || p.SizeBytes != r.SizeBytes || len(i.Snaps) > 0 {
		return false, nil
	}
	n, err := b.countObjects(r)
	return n == 0, wrap(err, "look what image %s has", b.imageName(r.Image))
}

// unused is nil when no device of r is open and no node has it.
func (b *Backend) unused(r *lvolRecord) error {
	b.mu.RLock()
	defer b.mu.RUnlock()
	if b.open.has(r.UUID) {
		return kind.Errorf(kind.InUse, "lvol %s is open", r.Name)
	}
	if nodes := b.exported[r.Name]; len(nodes) > 0 {
		return kind.Errorf(kind.InUse, "node %s has lvol %s", slices.Min(slices.Collect(maps.Keys(nodes))), r.Name)
	}
	return nil
}

// Delete implements attacher.Backend: kind.InUse when it is open, has more than one
// clone, or a node has it.
func (b *Backend) Delete(name string) error {
	return b.do(b.life, "delete lvol "+clip(name), b.o.Timeout, []string{name}, func(ctx context.Context) error {
		r, err := b.find(name)
		if err != nil {
			return err
		}
		if err := b.unused(r); err != nil {
			return err
		}
		var heirs []string
		if err := b.commit(ctx, func(c *change) error {
			clones := b.clonesOf(r.UUID)
			if len(clones) > 1 {
				return kind.Errorf(kind.InUse, "it has %d clones", len(clones))
			}
			now, err := c.lvol(name)
			if err != nil {
				return err
			}
			for _, heir := range clones {
				heir.Parent = now.Parent
				c.put(heir)
				heirs = append(heirs, heir.UUID)
			}
			c.remove(now.UUID)
			return nil
		}); err != nil {
			return err
		}
		reach("delete: gone")
		for _, id := range append(heirs, r.UUID) {
			b.forgetCount(id)
		}
		b.sweepLater()
		return nil
	})
}

func (b *Backend) clonesOf(id string) []lvolRecord {
	b.mu.RLock()
	defer b.mu.RUnlock()
	var out []lvolRecord
	for _, r := range b.index.clones[id] {
		out = append(out, *r)
	}
	return out
}

// Rename implements attacher.Backend. The image keeps its name, which is no lvol's.
func (b *Backend) Rename(name, newName string) (lvol.Info, error) {
	if err := checkName(newName); err != nil {
		return lvol.Info{}, err
	}
	err := b.do(b.life, "rename lvol "+clip(name), b.o.Timeout, []string{name, newName}, func(ctx context.Context) error {
		r, err := b.find(name)
		if err != nil {
			return err
		}
		if err := b.vacant(newName); err != nil {
			return err
		}
		b.mu.RLock()
		nodes := len(b.exported[r.Name])
		b.mu.RUnlock()
		if nodes > 0 {
			return kind.Errorf(kind.InUse, "%d nodes have it by this name", nodes)
		}
		return b.commit(ctx, func(c *change) error {
			r, err := c.lvol(name)
			r.Name = newName
			c.put(r)
			return err
		})
	})
	if err != nil {
		return lvol.Info{}, err
	}
	return b.info(newName)
}

// Resize implements attacher.Backend: kind.ReadOnly for what is.
func (b *Backend) Resize(name string, sizeBytes int64) (lvol.Info, error) {
	if err := checkSize(name, sizeBytes); err != nil {
		return lvol.Info{}, err
	}
	err := b.do(b.life, "resize lvol "+clip(name), b.o.Timeout, []string{name}, func(ctx context.Context) error {
		r, err := b.find(name)
		switch {
		case err != nil:
			return err
		case r.fixed():
			return kind.Errorf(kind.ReadOnly, "it is read-only")
		case r.SizeBytes == sizeBytes && r.ResizeBytes == 0:
			return nil
		}
		if err := b.commit(ctx, func(c *change) error {
			r, err := c.lvol(name)
			r.ResizeBytes = sizeBytes
			c.put(r)
			return err
		}); err != nil {
			return err
		}
		reach("resize: entered")
		return b.finishResize(ctx, name)
	})
	if err != nil {
		return lvol.Info{}, err
	}
	return b.info(name)
}

// finishResize gives an lvol the size that it is about to have. The caller has it locked.
func (b *Backend) finishResize(ctx context.Context, name string) error {
	r, err := b.find(name)
	if err != nil || r.ResizeBytes == 0 {
		return err
	}
	if err := b.withImage(r.Image, func(img *rbd.Image) error { return img.Resize(uint64(r.ResizeBytes)) }); err != nil {
		return wrap(err, "resize image %s", b.imageName(r.Image))
	}
	reach("resize: resized")
	err = b.commit(ctx, func(c *change) error {
		r, err := c.lvol(name)
		r.SizeBytes, r.ResizeBytes = r.ResizeBytes, 0
		c.put(r)
		return err
	})
	if err != nil {
		return err
	}
	b.forgetCount(r.UUID)
	b.open.resized(r.UUID, r.ResizeBytes)
	return nil
}

// finishResizes completes what a process that died had begun.
func (b *Backend) finishResizes(ctx context.Context) error {
	b.mu.RLock()
	var names []string
	for _, r := range b.index.lvols {
		if r.ResizeBytes != 0 {
			names = append(names, r.Name)
		}
	}
	b.mu.RUnlock()
	for _, name := range names {
		if err := b.finishResize(ctx, name); err != nil {
			return err
		}
	}
	return nil
}

// Inflate implements attacher.Backend: the lvol gets what it shares with its parent as its
// own. What nobody wrote stays unallocated.
func (b *Backend) Inflate(ctx context.Context, name string) (lvol.Info, error) {
	return b.detach(ctx, "inflate", name, true)
}

// Decouple implements attacher.Backend. RBD has no image independent of its parent and not
// of the parent's: where the parent is another image, everything is copied as Inflate
// does, and the parent's parent is the lvol's in name.
func (b *Backend) Decouple(ctx context.Context, name string) (lvol.Info, error) {
	return b.detach(ctx, "decouple", name, false)
}

func (b *Backend) detach(ctx context.Context, verb, name string, all bool) (lvol.Info, error) {
	err := b.do(ctx, verb+" lvol "+clip(name), 0, []string{name}, func(ctx context.Context) error {
		r, err := b.find(name)
		switch {
		case err != nil:
			return err
		case r.fixed():
			return kind.Errorf(kind.ReadOnly, "it is read-only")
		case r.Parent == "" && !all:
			return kind.Errorf(kind.Invalid, "it has no parent")
		}
		b.mu.RLock()
		parent, image := b.index.lvols[r.Parent], b.index.images[r.Image]
		b.mu.RUnlock()
		// An RBD snapshot of the same image needs nothing of it, nor it of the snapshot.
		flatten := image.Parent != "" && (all || parent != nil && parent.Image != r.Image)
		defer b.hold(r.Image)()
		if flatten {
			if err := b.withImage(r.Image, flattenOnce); err != nil {
				return wrap(err, "flatten image %s", b.imageName(r.Image))
			}
			reach(verb + ": copied")
		}
		if err := b.commit(ctx, func(c *change) error {
			r, err := c.lvol(name)
			if err != nil {
				return err
			}
			if flatten {
				i := c.image(r.Image)
				i.Parent, i.ParentSnap = "", ""
				c.putImage(i)
			}
			above := ""
			if p := b.lvolByID(r.Parent); p != nil && !all {
				above = p.Parent
			}
			r.Parent = above
			c.put(r)
			return nil
		}); err != nil {
			return err
		}
		reach(verb + ": done")
		b.forgetCount(r.UUID)
		b.sweepLater()
		return nil
	})
	if err != nil {
		return lvol.Info{}, err
	}
	return b.info(name)
}

// flattenOnce flattens an image unless it is done: a process may have died after that.
func flattenOnce(img *rbd.Image) error {
	switch _, err := img.GetParent(); {
	case isNotFound(err):
		return nil
	case err != nil:
		return err
	}
	return img.Flatten()
}

func (b *Backend) lvolByID(id string) *lvolRecord {
	b.mu.RLock()
	defer b.mu.RUnlock()
	return b.index.lvols[id]
}

// clip bounds a name of a caller's in a message.
func clip(name string) string {
	if len(name) > lvol.MaxNameBytes {
		name = name[:lvol.MaxNameBytes] + "..."
	}
	return name
}
