package lvol

import (
	"context"
	"encoding/binary"
	"fmt"

	"go.etcd.io/bbolt"

	"github.com/thaw-project/thaw/kind"
)

// Every structural change is one transaction of meta.db: it happened or it did not,
// whenever the process or the machine dies.

// beginAdmin takes admin for a change; the caller unlocks it.
func (s *Store) beginAdmin() error {
	s.admin.Lock()
	s.mu.RLock()
	closed := s.closed
	s.mu.RUnlock()
	err := s.failure()
	if closed {
		err = errClosed(s.o.Dir)
	}
	if err != nil {
		s.admin.Unlock()
	}
	return err
}

// find returns the lvol of that name for a change. The caller holds admin.
func (s *Store) find(op, name string) (*volume, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	v := s.byName[name]
	switch {
	case v == nil:
		return nil, kind.Errorf(kind.NotFound, "%s: no lvol %.160q", op, name)
	case v.busy != "":
		return nil, kind.Errorf(kind.InUse, "%s lvol %s: %s is under way", op, name, v.busy)
	}
	return v, nil
}

// findSound is find for changes that need the lvol's metadata.
func (s *Store) findSound(op, name string) (*volume, error) {
	v, err := s.find(op, name)
	if err == nil && v.damage != nil {
		err = kind.Errorf(kind.Corrupt, "%s lvol %s: %w", op, name, v.damage)
	}
	return v, err
}

// checkFree tells whether a new lvol may have that name. The caller holds admin.
func (s *Store) checkFree(op, name string) error {
	if err := checkName(name); err != nil {
		return fmt.Errorf("%s: %w", op, err)
	}
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.byName[name] != nil {
		return kind.Errorf(kind.Exists, "%s: lvol %s exists already", op, name)
	}
	return nil
}

// takeIDs reserves n ids; commitIDs in the transaction that uses them makes that
// durable. The caller holds admin.
func (s *Store) takeIDs(n uint64) (first uint64) {
	first = s.nextID
	s.nextID += n
	return first
}

func (s *Store) commitIDs(tx *bbolt.Tx) error { return putPool64(tx, keyNext, s.nextID) }

// info describes v after a change.
func (s *Store) info(v *volume) Info {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return v.infoLocked(&s.geometry)
}

// Create makes a thin lvol of sizeBytes, a multiple of 512, that reads as zeros.
// kind.Exists when name is taken.
func (s *Store) Create(name string, sizeBytes int64) (Info, error) {
	if err := checkSize(name, sizeBytes); err != nil {
		return Info{}, fmt.Errorf("create lvol: %w", err)
	}
	if err := s.beginAdmin(); err != nil {
		return Info{}, err
	}
	defer s.admin.Unlock()
	if err := s.checkFree("create lvol", name); err != nil {
		return Info{}, err
	}
	v := s.newVolume(name, sizeBytes)
	v.root.Store(newRoot(sizeBytes))
	return s.addVolume("create lvol", v)
}

// newVolume makes a volume with new ids. The caller holds admin.
func (s *Store) newVolume(name string, sizeBytes int64) *volume {
	id := s.takeIDs(2)
	v := &volume{id: id, uuid: newUUID(), created: s.o.Now().UnixNano(), name: name, clones: map[uint64]*volume{}, delta: &delta{id: id + 1}}
	v.size.Store(sizeBytes)
	return v
}

// addVolume commits a new volume and makes it known. The caller holds admin.
func (s *Store) addVolume(op string, v *volume) (Info, error) {
	err := s.update(func(tx *bbolt.Tx) error {
		if err := s.commitIDs(tx); err != nil {
			return err
		}
		return putRecord(tx, v.id, v.recordLocked())
	})
	if err != nil {
		return Info{}, fmt.Errorf("%s %s: %w", op, v.name, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.byName[v.name], s.byID[v.id] = v, v
	if v.parent != nil {
		v.parent.clones[v.id] = v
	}
	return v.infoLocked(&s.geometry), nil
}

// Clone makes a writable thin child of a snapshot, of the same size. kind.Invalid
// when snapshot is an lvol that is not one.
func (s *Store) Clone(snapshot, name string) (Info, error) {
	if err := s.beginAdmin(); err != nil {
		return Info{}, err
	}
	defer s.admin.Unlock()
	p, err := s.findSound("clone", snapshot)
	if err != nil {
		return Info{}, err
	}
	if !p.snapshot {
		return Info{}, kind.Errorf(kind.Invalid, "clone lvol %s: it is not a snapshot", snapshot)
	}
	if err := s.checkFree("clone lvol "+snapshot, name); err != nil {
		return Info{}, err
	}
	v := s.newVolume(name, p.size.Load())
	v.parent, v.overlap = p, p.size.Load()
	v.root.Store(p.root.Load().share(p.size.Load()))
	return s.addVolume("clone lvol", v)
}

// Snapshot freezes what lvol name holds now, unflushed writes included, as a
// read-only lvol of its own, of which name becomes a clone. Open handles of name go
// on; their I/O waits for the time of one flush. It is also a Flush.
func (s *Store) Snapshot(name, snapshot string) (Info, error) {
	if err := s.beginAdmin(); err != nil {
		return Info{}, err
	}
	defer s.admin.Unlock()
	v, err := s.findSound("snapshot", name)
	if err != nil {
		return Info{}, err
	}
	if v.snapshot {
		return Info{}, kind.Errorf(kind.Invalid, "snapshot lvol %s: it is a snapshot itself", name)
	}
	if err := s.checkFree("snapshot lvol "+name, snapshot); err != nil {
		return Info{}, err
	}
	v.quiesce.Lock()
	defer v.quiesce.Unlock()
	// A snapshot has no open pages: all its checksums are durable from here on.
	if err := s.flushFor(closing{delta: v.delta}); err != nil {
		return Info{}, fmt.Errorf("snapshot lvol %s: %w", name, err)
	}
	size := v.size.Load()
	snap := s.newVolume(snapshot, size)
	fresh := snap.delta
	snap.delta, snap.snapshot = v.delta, true
	snap.parent, snap.overlap = v.parent, v.overlap
	snap.allocated.Store(v.allocated.Load())
	record := v.recordLocked()
	record.delta, record.parent, record.overlap = fresh.id, snap.id, size
	err = s.update(func(tx *bbolt.Tx) error {
		if err := s.commitIDs(tx); err != nil {
			return err
		}
		if err := putRecord(tx, snap.id, snap.recordLocked()); err != nil {
			return err
		}
		return putRecord(tx, v.id, record)
	})
	if err != nil {
		return Info{}, fmt.Errorf("snapshot lvol %s: %w", name, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	snap.root.Store(v.root.Load())
	v.root.Store(v.root.Load().share(size))
	v.delta = fresh
	v.allocated.Store(0)
	if snap.parent != nil {
		delete(snap.parent.clones, v.id)
		snap.parent.clones[snap.id] = snap
	}
	v.parent, v.overlap = snap, size
	snap.clones[v.id] = v
	s.byName[snapshot], s.byID[snap.id] = snap, snap
	return snap.infoLocked(&s.geometry), nil
}

// SetReadOnly makes an lvol refuse writes, or take them again. kind.InUse while it
// is open, if that would change it; kind.Invalid to make a snapshot writable.
func (s *Store) SetReadOnly(name string, ro bool) (Info, error) {
	if err := s.beginAdmin(); err != nil {
		return Info{}, err
	}
	defer s.admin.Unlock()
	v, err := s.findSound("set read-only", name)
	if err != nil {
		return Info{}, err
	}
	if v.snapshot && !ro {
		return Info{}, kind.Errorf(kind.Invalid, "make lvol %s writable: it is a snapshot", name)
	}
	if v.snapshot || v.readOnly == ro {
		return s.info(v), nil
	}
	err = s.changeRecord(v, "set lvol "+name+" read-only", true, func(r *record) { r.readOnly = ro }, func() { v.readOnly = ro })
	if err != nil {
		return Info{}, err
	}
	return s.info(v), nil
}

// changeRecord commits a change of v's record, then applies it in memory. exclusive
// asks that v is not open. The caller holds admin.
func (s *Store) changeRecord(v *volume, op string, exclusive bool, change func(*record), apply func()) error {
	s.mu.Lock()
	if exclusive {
		if v.handles > 0 {
			s.mu.Unlock()
			return kind.Errorf(kind.InUse, "%s: it is open", op)
		}
		v.leaving = true
	}
	r := v.recordLocked()
	s.mu.Unlock()
	old := r.name
	change(&r)
	err := s.update(func(tx *bbolt.Tx) error {
		if r.name != old {
			if err := deleteName(tx, old); err != nil {
				return err
			}
		}
		return putRecord(tx, v.id, r)
	})
	s.mu.Lock()
	defer s.mu.Unlock()
	if exclusive {
		v.leaving = false
	}
	if err != nil {
		return fmt.Errorf("%s: %w", op, err)
	}
	apply()
	return nil
}

// Rename renames an lvol, open or not. kind.Exists when newName is taken, by name
// itself too.
func (s *Store) Rename(name, newName string) (Info, error) {
	if err := s.beginAdmin(); err != nil {
		return Info{}, err
	}
	defer s.admin.Unlock()
	v, err := s.findSound("rename", name)
	if err != nil {
		return Info{}, err
	}
	if err := s.checkFree("rename lvol "+name, newName); err != nil {
		return Info{}, err
	}
	err = s.changeRecord(v, "rename lvol "+name, false, func(r *record) { r.name = newName }, func() {
		delete(s.byName, name)
		v.name = newName
		s.byName[newName] = v
	})
	if err != nil {
		return Info{}, err
	}
	return s.info(v), nil
}

// Delete deletes an lvol and frees what only it uses. The clusters of a snapshot
// with one clone move to the clone. kind.InUse when it is open or has more clones.
func (s *Store) Delete(name string) error {
	if err := s.beginAdmin(); err != nil {
		return err
	}
	defer s.admin.Unlock()
	v, err := s.find("delete", name)
	if err != nil {
		return err
	}
	s.mu.Lock()
	var heir *volume
	for _, c := range v.clones {
		heir = c
	}
	switch {
	case v.handles > 0:
		err = kind.Errorf(kind.InUse, "delete lvol %s: it is open", name)
	case len(v.clones) > 1:
		err = kind.Errorf(kind.InUse, "delete lvol %s: it has %d clones", name, len(v.clones))
	case heir != nil && heir.busy != "":
		err = kind.Errorf(kind.InUse, "delete lvol %s: of its clone %s, %s is under way", name, heir.name, heir.busy)
	case heir != nil && (v.damage != nil || heir.damage != nil):
		err = kind.Errorf(kind.Corrupt, "delete lvol %s: it or its clone %s is damaged; delete the clone first", name, heir.name)
	default:
		v.leaving = true
	}
	s.mu.Unlock()
	if err != nil {
		return err
	}
	if heir != nil {
		err = s.deleteInto(v, heir)
	} else {
		err = s.deleteLeaf(v)
	}
	if err != nil {
		s.mu.Lock()
		v.leaving = false
		s.mu.Unlock()
		return fmt.Errorf("delete lvol %s: %w", name, err)
	}
	return nil
}

// deleteLeaf deletes v, which has no clones. It needs no flush, so it works where
// flushing does not for want of space. The caller holds admin.
func (s *Store) deleteLeaf(v *volume) error {
	v.quiesce.Lock()
	defer v.quiesce.Unlock()
	if err := s.dropDelta(v); err != nil {
		return err
	}
	v.deleted = true
	s.forget(v)
	var freed []extent
	v.root.Load().each(func(_ uint32, pg *page) {
		if pg.delta == v.delta {
			freed = s.ownExtents(freed, pg)
		}
	})
	s.giveBack(freed)
	s.ball.refill()
	return nil
}

// dropDelta commits the removal of v's record and delta. flushMu keeps a flush from
// writing pages of it afterwards.
func (s *Store) dropDelta(v *volume) error {
	s.flushMu.Lock()
	defer s.flushMu.Unlock()
	err := s.update(func(tx *bbolt.Tx) error {
		if v.delta.id != 0 {
			if err := s.meta.deleteDelta(tx, v.delta.id); err != nil {
				return err
			}
		}
		return deleteRecord(tx, v.id, v.name)
	})
	if err != nil {
		return err
	}
	v.delta.gone = true
	for pg := range s.openPages {
		if pg.delta == v.delta {
			delete(s.openPages, pg)
		}
	}
	s.openCount.Store(int64(len(s.openPages)))
	return nil
}

// ownExtents appends the clusters that pg's delta owns in it, but for those that
// another claims too.
func (s *Store) ownExtents(list []extent, pg *page) []extent {
	for i := range pg.entries {
		if e := pg.load(i); e.own() && e.allocated() && !s.isShared(e.phys()) {
			list = appendExtent(list, e.phys())
		}
	}
	return list
}

// forget takes v out of the store.
func (s *Store) forget(v *volume) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.byName, v.name)
	delete(s.byID, v.id)
	if v.parent != nil {
		delete(v.parent.clones, v.id)
	}
}

// deleteInto deletes snapshot v and makes heir, its one clone, own what v owned and
// heir did not override. The caller holds admin.
func (s *Store) deleteInto(v, heir *volume) error {
	v.quiesce.Lock()
	defer v.quiesce.Unlock()
	heir.quiesce.Lock()
	defer heir.quiesce.Unlock()
	// Both deltas are wholly durable and closed from here on.
	if err := s.flushFor(closing{delta: heir.delta}); err != nil {
		return err
	}
	merged := heir.root.Load().fork(heir.delta)
	var freed []extent
	var changed []*page
	gained := int64(0)
	limit := uint64((min(heir.overlap, heir.size.Load()) + s.clusterBytes - 1) >> s.clusterShift)
	v.root.Load().each(func(pi uint32, from *page) {
		if from.delta != v.delta {
			return
		}
		var into *page
		shown := (*page)(nil)
		if int64(pi)<<pageShift < heir.size.Load() {
			shown = merged.page(pi)
		}
		for i := range from.entries {
			e := from.load(i)
			if !e.own() {
				continue
			}
			overridden := shown != nil && shown.delta == heir.delta && shown.load(i).own()
			if overridden || uint64(pi)*uint64(s.pageClusters)+uint64(i) >= limit {
				if e.allocated() && !s.isShared(e.phys()) {
					freed = appendExtent(freed, e.phys())
				}
				continue
			}
			if into == nil {
				into = s.adopt(heir.delta, pi, shown)
				changed = append(changed, into)
			}
			into.store(i, e|durableBit)
			copy(into.sums[i*s.clusterBlocks:(i+1)*s.clusterBlocks], from.sums[i*s.clusterBlocks:])
			if e.allocated() {
				gained++
			}
		}
		if into != nil {
			merged.put(heir.delta, pi, into)
		}
	})
	r := heir.recordLocked()
	r.parent, r.overlap = 0, 0
	if v.parent != nil {
		r.parent, r.overlap = v.parent.id, min(heir.overlap, v.overlap)
	}
	if err := s.commitMerge(v, heir, r, changed); err != nil {
		return err
	}
	s.mu.Lock()
	heir.root.Store(merged)
	heir.allocated.Add(gained)
	heir.parent, heir.overlap = v.parent, r.overlap
	if v.parent != nil {
		delete(v.parent.clones, v.id)
		v.parent.clones[heir.id] = heir
	}
	delete(s.byName, v.name)
	delete(s.byID, v.id)
	v.deleted = true
	s.mu.Unlock()
	s.giveBack(freed)
	return nil
}

// adopt returns a copy of shown, a page of an heir or what it inherits, that
// belongs to d: entries that d owns stay owned.
func (s *Store) adopt(d *delta, pi uint32, shown *page) *page {
	if shown == nil || shown.delta != d {
		return s.inherit(d, pi, shown)
	}
	c := s.newPage(d, pi)
	for i := range shown.entries {
		c.store(i, shown.load(i))
	}
	copy(c.sums, shown.sums)
	return c
}

func (s *Store) commitMerge(v, heir *volume, r record, changed []*page) error {
	s.flushMu.Lock()
	defer s.flushMu.Unlock()
	values := make([][]byte, len(changed))
	for i, pg := range changed {
		values[i] = s.appendPage(nil, pg)
	}
	err := s.update(func(tx *bbolt.Tx) error {
		if err := s.meta.deleteDelta(tx, v.delta.id); err != nil {
			return err
		}
		if err := deleteRecord(tx, v.id, v.name); err != nil {
			return err
		}
		for i, pg := range changed {
			if err := putPage(tx, heir.delta.id, pg.index, values[i]); err != nil {
				return err
			}
		}
		return putRecord(tx, heir.id, r)
	})
	if err == nil {
		v.delta.gone = true
	}
	return err
}

// Resize changes the virtual size, a multiple of 512; what is added reads as zeros,
// what is cut off is gone. kind.ReadOnly for a snapshot or a read-only lvol. Open
// handles see the new size.
func (s *Store) Resize(name string, sizeBytes int64) (Info, error) {
	if err := checkSize(name, sizeBytes); err != nil {
		return Info{}, fmt.Errorf("resize: %w", err)
	}
	if err := s.beginAdmin(); err != nil {
		return Info{}, err
	}
	defer s.admin.Unlock()
	v, err := s.findWritable("resize", name)
	if err != nil {
		return Info{}, err
	}
	v.quiesce.Lock()
	defer v.quiesce.Unlock()
	switch old := v.size.Load(); {
	case sizeBytes > old:
		err = s.grow(v, old, sizeBytes)
	case sizeBytes < old:
		err = s.shrink(v, sizeBytes)
	}
	if err != nil {
		return Info{}, fmt.Errorf("resize lvol %s: %w", name, err)
	}
	return s.info(v), nil
}

func (s *Store) findWritable(op, name string) (*volume, error) {
	v, err := s.findSound(op, name)
	if err == nil && (v.snapshot || v.readOnly) {
		err = kind.Errorf(kind.ReadOnly, "%s lvol %s: it is read-only", op, name)
	}
	return v, err
}

// grow makes v larger. The rest of the last cluster may hold what an earlier, larger
// size had there; it is zeroed while nobody can see it. The caller holds admin and
// v.quiesce.
func (s *Store) grow(v *volume, old, size int64) error {
	end := min(size, (old+s.clusterBytes-1)&^(s.clusterBytes-1))
	if err := s.zeroRange(v, old, end); err != nil {
		return err
	}
	if err := s.flushFor(closing{delta: v.delta}); err != nil {
		return err
	}
	return s.changeRecord(v, "grow", false, func(r *record) { r.size = size }, func() {
		v.root.Store(v.root.Load().share(size))
		v.size.Store(size)
	})
}

// shrink makes v smaller and frees what it owned beyond. The caller holds admin and
// v.quiesce.
func (s *Store) shrink(v *volume, size int64) error {
	if err := s.flushFor(closing{delta: v.delta}); err != nil {
		return err
	}
	end := uint64((size + s.clusterBytes - 1) >> s.clusterShift)
	cut := v.root.Load().fork(v.delta)
	s.cut(cut, v.delta, end)
	var freed []extent
	var lost []uint32
	first := uint32(end / uint64(s.pageClusters))
	v.root.Load().each(func(pi uint32, pg *page) {
		if pg.delta != v.delta || pi < first {
			return
		}
		if pi > first {
			lost = append(lost, pi)
		}
		for i := range pg.entries {
			c := uint64(pi)*uint64(s.pageClusters) + uint64(i)
			if e := pg.load(i); c >= end && e.own() && e.allocated() && !s.isShared(e.phys()) {
				freed = appendExtent(freed, e.phys())
			}
		}
	})
	var value []byte
	if pg := cut.page(first); pg != nil {
		value = s.appendPage(nil, pg)
	}
	r := v.recordLocked()
	r.size, r.overlap = size, min(r.overlap, size)
	s.flushMu.Lock()
	err := s.update(func(tx *bbolt.Tx) error {
		for _, pi := range lost {
			if err := putPage(tx, v.delta.id, pi, nil); err != nil {
				return err
			}
		}
		if err := putPage(tx, v.delta.id, first, value); err != nil {
			return err
		}
		return putRecord(tx, v.id, r)
	})
	s.flushMu.Unlock()
	if err != nil {
		return err
	}
	s.mu.Lock()
	v.root.Store(cut.share(size))
	v.size.Store(size)
	v.overlap = r.overlap
	v.allocated.Add(-int64(extentClusters(freed)))
	s.mu.Unlock()
	s.giveBack(freed)
	return nil
}

// Inflate allocates every cluster of an lvol, copying what its ancestors have, and
// cuts it off from them. It may be open. When ctx ends, what was copied stays.
func (s *Store) Inflate(ctx context.Context, name string) (Info, error) {
	return s.detach(ctx, "inflate", name, true)
}

// Decouple copies what the parent itself owns of an lvol and makes the parent's
// parent, if any, its parent. kind.Invalid when it has no parent.
func (s *Store) Decouple(ctx context.Context, name string) (Info, error) {
	return s.detach(ctx, "decouple", name, false)
}

func (s *Store) detach(ctx context.Context, op, name string, all bool) (Info, error) {
	if err := s.beginAdmin(); err != nil {
		return Info{}, err
	}
	v, err := s.findWritable(op, name)
	if err == nil && !all && v.parent == nil {
		err = kind.Errorf(kind.Invalid, "%s lvol %s: it has no parent", op, name)
	}
	if err != nil {
		s.admin.Unlock()
		return Info{}, err
	}
	s.mu.Lock()
	v.busy = op
	s.mu.Unlock()
	s.admin.Unlock() // copying may take long; busy keeps others off v and its parent
	err = s.copyUp(ctx, v, all)
	s.admin.Lock()
	defer s.admin.Unlock()
	defer func() {
		s.mu.Lock()
		v.busy = ""
		s.mu.Unlock()
	}()
	if err == nil {
		err = s.failure()
	}
	s.mu.RLock()
	if s.closed {
		err = errClosed(s.o.Dir)
	}
	s.mu.RUnlock()
	if err == nil {
		err = s.cutOff(v, all)
	}
	if err != nil {
		return Info{}, fmt.Errorf("%s lvol %s: %w", op, name, err)
	}
	return s.info(v), nil
}

// copyUp makes v own each cluster that it would miss without its parent, or every
// cluster if all is set.
func (s *Store) copyUp(ctx context.Context, v *volume, all bool) error {
	sc := s.getScratch()
	defer s.scratch.Put(sc)
	clusters := uint64((v.size.Load() + s.clusterBytes - 1) >> s.clusterShift)
	for c := uint64(0); c < clusters; c++ {
		if c%stripes == 0 && ctx.Err() != nil {
			return kind.Wrap(kind.Canceled, context.Cause(ctx))
		}
		v.quiesce.RLock()
		if !all && v.parent.root.Load().page(uint32(c/uint64(s.pageClusters))) == nil {
			v.quiesce.RUnlock()
			c |= uint64(s.pageClusters) - 1 // nothing in this page
			continue
		}
		err := s.makeRoom()
		if err == nil {
			err = s.copyCluster(v, sc, c, all)
		}
		if err == nil {
			err = s.endChange()
		}
		v.quiesce.RUnlock()
		if err != nil {
			return err
		}
	}
	return nil
}

func (s *Store) copyCluster(v *volume, sc *scratch, c uint64, all bool) error {
	v.lockRange(c, 1)
	defer v.unlockRange(c, 1)
	pi, i := uint32(c/uint64(s.pageClusters)), int(c%uint64(s.pageClusters))
	pg := v.root.Load().page(pi)
	var e entry
	if pg != nil {
		e = pg.load(i)
	}
	own := pg != nil && pg.delta == v.delta && e.own()
	if own && (e.allocated() || !all) {
		return nil
	}
	below, from := v.parentEntry(&s.geometry, c)
	parentOwns := from != nil && from.delta == v.parent.delta && below.own()
	switch {
	case !all && !parentOwns:
		return nil
	case e.state() == stateDamaged || !all && below.state() == stateDamaged:
		return kind.Errorf(kind.Corrupt, "the map at offset %d is damaged", int64(c)<<s.clusterShift)
	case !all && !below.allocated():
		s.installZeroed(v, sc, c)
		return nil
	}
	phys, zeroed, err := s.allocate(v)
	if err != nil {
		return err
	}
	buf, sums := sc.clusterBuf(&s.geometry), sc.sums[:s.clusterBlocks]
	if e.allocated() {
		// As in complete, a damaged block is copied with the checksum it fails.
		copy(sums, pg.sums[i*s.clusterBlocks:])
		err = s.dev.ReadAt(buf, int64(e.phys())<<s.clusterShift)
	} else {
		clear(buf)
		for b := range sums {
			sums[b] = zeroSum
		}
	}
	if err == nil && (e.allocated() || !zeroed) {
		err = s.dev.WriteAt(buf, int64(phys)<<s.clusterShift)
	}
	if err != nil {
		s.unallocate(phys)
		return err
	}
	s.install(v, sc, c, phys, sums)
	return nil
}

// installZeroed makes cluster c of v read as zeros by its own map. The caller holds
// the cluster's stripe.
func (s *Store) installZeroed(v *volume, sc *scratch, c uint64) {
	s.commit.RLock()
	defer s.commit.RUnlock()
	pg := s.ownPage(v, uint32(c/uint64(s.pageClusters)))
	pg.store(int(c%uint64(s.pageClusters)), stateZeroed|ownBit)
	s.markDirty(pg)
	sc.record = appendRedoClear(sc.record[:0], s.seq.Add(1), v.delta.id, c, 1, stateZeroed)
	s.appendRedo(sc.record)
}

// cutOff takes v's parent away, or replaces it by the parent's parent. The caller
// holds admin.
func (s *Store) cutOff(v *volume, all bool) error {
	v.quiesce.Lock()
	defer v.quiesce.Unlock()
	if v.parent == nil {
		return s.flushFor(closing{delta: v.delta})
	}
	if err := s.flushFor(closing{delta: v.delta}); err != nil {
		return err
	}
	var heritage *volume
	overlap := int64(0)
	if !all && v.parent.parent != nil {
		heritage, overlap = v.parent.parent, min(v.overlap, v.parent.overlap)
	}
	change := func(r *record) {
		r.parent, r.overlap = 0, overlap
		if heritage != nil {
			r.parent = heritage.id
		}
	}
	return s.changeRecord(v, "cut off", false, change, func() {
		delete(v.parent.clones, v.id)
		v.parent, v.overlap = heritage, overlap
		if heritage != nil {
			heritage.clones[v.id] = v
		}
	})
}

// idOfName decodes what bucketName holds of a name.
func idOfName(key, value []byte) (uint64, error) {
	p, err := unseal(tagName, key, value)
	if err == nil && len(p) != 8 {
		err = kind.Errorf(kind.Corrupt, "name %q: %d bytes", key, len(p))
	}
	if err != nil {
		return 0, err
	}
	return binary.LittleEndian.Uint64(p), nil
}
