package lvol

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"path/filepath"
	"slices"

	"go.etcd.io/bbolt"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/lvol/device"
	"github.com/thaw-project/thaw/redo"
)

// Open opens the pool in o.Dir and takes it for this process alone: kind.InUse,
// naming the path, when another has it. If the pool was not closed in order it is
// recovered first. Damage that concerns some lvols only is logged and shown in
// Info.Damage; the others can be used.
func Open(o Options) (_ *Store, err error) {
	o.ensureDefaults()
	if err := o.validate(); err != nil {
		return nil, err
	}
	s := &Store{
		o: o, log: o.Logger,
		byName: map[string]*volume{}, byID: map[uint64]*volume{}, open: map[*Lvol]struct{}{}, openPages: map[*page]struct{}{},
		ball: newBallast(o.Dir, o.BallastBytes),
	}
	defer func() {
		if err != nil {
			s.closeFiles()
		}
	}()
	if s.dir, err = lockDir(o.Dir, !o.ReadOnly); err != nil {
		return nil, err
	}
	if s.meta, err = openMeta(filepath.Join(o.Dir, "meta.db"), o.ReadOnly); err != nil {
		return nil, err
	}
	pool, err := s.readPool()
	if err != nil {
		return nil, fmt.Errorf("open pool %s: %w", o.Dir, err)
	}
	if err := s.openDevice(pool); err != nil {
		return nil, fmt.Errorf("open pool %s: %w", o.Dir, err)
	}
	s.nextID = pool.next
	s.seq.Store(pool.checkpoint)
	s.scratch.New = s.newScratch
	marks, err := s.load()
	if err != nil {
		return nil, fmt.Errorf("open pool %s: %w", o.Dir, err)
	}
	if err := s.replay(pool.checkpoint); err != nil {
		return nil, fmt.Errorf("open pool %s: %w", o.Dir, err)
	}
	s.resum(marks)
	s.claimAll()
	if o.ReadOnly {
		return s, nil
	}
	if err := s.settle(pool.clean); err != nil {
		return nil, fmt.Errorf("open pool %s: %w", o.Dir, err)
	}
	if o.FlushInterval > 0 {
		s.startFlusher()
	}
	return s, nil
}

// pool is what bucketPool holds beside the superblock.
type pool struct {
	next, checkpoint uint64
	clean            bool
	device           string
}

func (s *Store) readPool() (p pool, err error) {
	err = s.meta.view(func(tx *bbolt.Tx) error {
		block, err := getPool(tx, keySuperblock)
		if err == nil {
			s.super, err = decodeSuperblock(block)
		}
		if kind.Of(err) == kind.Corrupt {
			s.superDamage = "in meta.db: " + err.Error() // the device may have a good one
			err = nil
		}
		if err != nil {
			return err
		}
		if p.next, err = getPool64(tx, keyNext); err != nil {
			return err
		}
		if p.checkpoint, err = getPool64(tx, keyCheckpoint); err != nil {
			return err
		}
		dev, err := getPool(tx, keyDevice)
		if err != nil {
			return err
		}
		p.device = string(dev)
		clean, err := getPool(tx, keyClean)
		p.clean = err == nil && len(clean) == 1 && clean[0] == 1 // doubt means recovery
		return nil
	})
	return p, err
}

// openDevice opens the data device and agrees the two copies of the superblock.
func (s *Store) openDevice(p pool) (err error) {
	path := filepath.Join(s.o.Dir, "data")
	if p.device != "" {
		path = p.device
	}
	if s.o.Device != "" {
		path = s.o.Device
	}
	switch {
	case s.o.OpenDevice != nil:
		s.dev, err = s.o.OpenDevice()
	case s.o.Uring:
		s.dev, err = device.OpenUring(path, s.o.ReadOnly, s.log)
	default:
		s.dev, err = device.OpenFile(path, s.o.ReadOnly)
	}
	if err != nil {
		return err
	}
	block := make([]byte, superblockBytes)
	if err := s.dev.ReadAt(block, 0); err != nil {
		return fmt.Errorf("read superblock: %w", err)
	}
	super, err := decodeSuperblock(block)
	switch {
	case err == nil && s.superDamage != "":
		s.super = super
	case err == nil && super != s.super:
		return kind.Errorf(kind.Corrupt, "the data device belongs to pool %s (%s), meta.db to %s (%s)", super.uuid, super.name, s.super.uuid, s.super.name)
	case err == nil:
	case kind.Of(err) == kind.Corrupt && s.superDamage == "":
		s.superDamage = "on the device: " + err.Error()
	default:
		return err // newer, or both copies are damaged
	}
	if s.superDamage != "" {
		s.log.Error("lvol superblock damaged; check with repair rewrites it", "dir", s.o.Dir, "damage", s.superDamage)
	}
	if f := s.super.readOnly &^ knownReadOnly; f != 0 && !s.o.ReadOnly {
		return kind.Errorf(kind.Unsupported, "the pool uses features %#x; this program can open it read-only", f)
	}
	s.geometry = newGeometry(s.super.clusterBytes, s.super.totalClusters)
	if need := int64(s.totalClusters) << s.clusterShift; s.dev.SizeBytes() < need {
		return kind.Errorf(kind.Corrupt, "the data device has %d bytes, the pool needs %d", s.dev.SizeBytes(), need)
	}
	s.alloc = newAllocator(s.totalClusters)
	return nil
}

// stored is an lvol as meta.db has it.
type stored struct {
	record record
	err    error
	pages  []*page
}

type mark struct {
	delta uint64
	index uint32
}

// load reads all lvols and builds their maps.
func (s *Store) load() (marks []mark, err error) {
	lvols := map[uint64]*stored{}
	names := map[uint64]string{}
	deltaOf := map[uint64]uint64{} // delta -> lvol
	var ids, deltas []uint64
	err = s.meta.view(func(tx *bbolt.Tx) error {
		b, err := bucket(tx, bucketLvol)
		if err != nil {
			return err
		}
		err = b.ForEach(func(k, v []byte) error {
			if len(k) != 8 {
				return nil
			}
			id := binary.BigEndian.Uint64(k)
			st := &stored{}
			st.record, st.err = decodeRecord(id, v)
			if st.err != nil {
				st.record = record{} // nothing in it can be believed
			} else {
				if other, ok := deltaOf[st.record.delta]; ok {
					st.err = kind.Errorf(kind.Corrupt, "lvols %d and %d share delta %d", id, other, st.record.delta)
				} else {
					deltaOf[st.record.delta] = id
				}
			}
			lvols[id] = st
			ids = append(ids, id)
			return nil
		})
		if err != nil {
			return err
		}
		if b, err = bucket(tx, bucketName); err != nil {
			return err
		}
		err = b.ForEach(func(k, v []byte) error {
			if p, err := unseal(tagName, k, v); err == nil && len(p) == 8 && checkName(string(k)) == nil {
				names[binary.LittleEndian.Uint64(p)] = string(k)
			}
			return nil
		})
		if err != nil {
			return err
		}
		if b, err = bucket(tx, bucketOpen); err != nil {
			return err
		}
		err = b.ForEach(func(k, v []byte) error {
			if _, err := unseal(tagOpen, k, v); len(k) == 12 {
				// A damaged mark counts: it only means to look at the data.
				marks = append(marks, mark{binary.BigEndian.Uint64(k), binary.BigEndian.Uint32(k[8:])})
				if err != nil {
					s.log.Warn("lvol open mark damaged", "dir", s.o.Dir, "err", err)
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
		if b, err = bucket(tx, bucketDelta); err != nil {
			return err
		}
		return b.ForEach(func(k, v []byte) error {
			if v == nil && len(k) == 8 {
				deltas = append(deltas, binary.BigEndian.Uint64(k))
			}
			return nil
		})
	})
	if err != nil {
		return nil, err
	}
	pages := map[uint64][]*page{}
	deltaErr := map[uint64]error{}
	for _, d := range deltas {
		// A transaction each: damage in one lvol's pages stops that one alone.
		if pages[d], err = nil, s.meta.bad[d]; err == nil {
			pages[d], err = s.loadDelta(d)
		}
		if err != nil {
			deltaErr[d] = err
			s.log.Error("lvol map damaged", "dir", s.o.Dir, "delta", d, "lvol", deltaOf[d], "err", err)
		}
		s.nextID = max(s.nextID, d+1)
	}
	for _, id := range ids {
		st := lvols[id]
		s.nextID = max(s.nextID, id+1)
		if st.err == nil {
			st.pages, st.err = pages[st.record.delta], deltaErr[st.record.delta]
			delete(pages, st.record.delta)
		}
	}
	for d, p := range pages {
		s.orphans = append(s.orphans, s.orphan(d, p))
	}
	s.build(ids, lvols, names)
	return marks, nil
}

// orphan holds the clusters of a delta that no sound record names.
func (s *Store) orphan(d uint64, pages []*page) *volume {
	v := &volume{name: fmt.Sprintf("delta %d", d), delta: &delta{id: d}}
	size := int64(pageBytes)
	for _, pg := range pages {
		size = max(size, (int64(pg.index)+1)<<pageShift)
	}
	r := newRoot(size)
	for _, pg := range pages {
		pg.delta = v.delta
		r.put(v.delta, pg.index, pg)
	}
	v.root.Store(r)
	return v
}

// loadDelta reads the pages of a delta. A page that does not verify comes with all
// its entries damaged.
func (s *Store) loadDelta(id uint64) (pages []*page, err error) {
	d := &delta{id: id}
	err = s.meta.view(func(tx *bbolt.Tx) error {
		top, err := bucket(tx, bucketDelta)
		if err != nil {
			return err
		}
		b := top.Bucket(key64(id))
		if b == nil {
			return nil
		}
		return b.ForEach(func(k, v []byte) error {
			if len(k) != 4 || binary.BigEndian.Uint32(k) >= MaxLvolBytes>>pageShift {
				return kind.Errorf(kind.Corrupt, "delta %d has a key %x", id, k)
			}
			pg := s.newPage(d, binary.BigEndian.Uint32(k))
			if err := s.decodePage(pg, v); err != nil {
				if kind.Of(err) != kind.Corrupt {
					return err
				}
				s.log.Error("lvol map page damaged", "dir", s.o.Dir, "delta", id, "page", pg.index, "err", err)
				for i := range pg.entries {
					pg.store(i, stateDamaged|ownBit|durableBit)
				}
			}
			pages = append(pages, pg)
			return nil
		})
	})
	return pages, err
}

// build makes the volumes, parents before children.
func (s *Store) build(ids []uint64, lvols map[uint64]*stored, names map[uint64]string) {
	for _, id := range ids {
		st := lvols[id]
		v := &volume{id: id, clones: map[uint64]*volume{}, delta: &delta{id: st.record.delta}, damage: st.err}
		v.name = st.record.name
		if v.name == "" {
			v.name = names[id]
		}
		if v.name == "" {
			v.name = fmt.Sprintf("lost-%d", id)
		}
		if other := s.byName[v.name]; other != nil {
			v.damage = errors.Join(v.damage, kind.Errorf(kind.Corrupt, "lvols %d and %d are both named %s", other.id, id, v.name))
			v.name = fmt.Sprintf("lost-%d", id)
		}
		v.uuid, v.created, v.snapshot, v.readOnly = st.record.uuid, st.record.created, st.record.snapshot, st.record.readOnly
		v.overlap = st.record.overlap
		v.size.Store(st.record.size)
		s.byID[id], s.byName[v.name] = v, v
	}
	const (
		unseen = iota
		building
		built
	)
	state := map[uint64]int{}
	for _, id := range ids {
		// Walk up to a built ancestor, then build downwards: chains may be long.
		var chain []*volume
		for v := s.byID[id]; v != nil && state[v.id] == unseen; {
			state[v.id] = building
			chain = append(chain, v)
			pid := lvols[v.id].record.parent
			p := s.byID[pid]
			switch {
			case pid == 0:
				v = nil
			case p == nil:
				v.damage = errors.Join(v.damage, kind.Errorf(kind.Corrupt, "the parent of %s, lvol %d, is missing", v.name, pid))
				v = nil
			case state[pid] == building:
				v.damage = errors.Join(v.damage, kind.Errorf(kind.Corrupt, "lvol %s is its own ancestor", v.name))
				v = nil
			default:
				v.parent = p
				v = p
			}
		}
		slices.Reverse(chain)
		for _, v := range chain {
			s.buildOne(v, lvols[v.id])
			state[v.id] = built
		}
	}
}

func (s *Store) buildOne(v *volume, st *stored) {
	var r *root
	if p := v.parent; p != nil {
		p.clones[v.id] = v
		if p.damage != nil {
			v.damage = errors.Join(v.damage, fmt.Errorf("its parent %s is damaged: %w", p.name, p.damage))
		} else if !p.snapshot {
			v.damage = errors.Join(v.damage, kind.Errorf(kind.Corrupt, "its parent %s is not a snapshot", p.name))
		}
		r = p.root.Load().share(v.size.Load())
		if end := uint64((min(v.overlap, v.size.Load()) + s.clusterBytes - 1) >> s.clusterShift); v.overlap < p.size.Load() {
			s.cut(r, v.delta, end)
		}
	} else {
		r = newRoot(v.size.Load())
	}
	v.root.Store(r)
	end := uint64((v.size.Load() + s.clusterBytes - 1) >> s.clusterShift)
	for _, pg := range st.pages {
		if uint64(pg.index)*uint64(s.pageClusters) >= end {
			v.damage = errors.Join(v.damage, kind.Errorf(kind.Corrupt, "it has a map page %d beyond its end", pg.index))
			continue
		}
		pg.delta = v.delta
		below := r.page(pg.index)
		for i := range pg.entries {
			e := pg.load(i)
			switch {
			case e.own() && uint64(pg.index)*uint64(s.pageClusters)+uint64(i) >= end:
				pg.store(i, 0) // only a damaged page has entries there
			case e.own():
			case below != nil:
				pg.store(i, below.load(i)&^(ownBit|durableBit))
				copy(pg.sums[i*s.clusterBlocks:(i+1)*s.clusterBlocks], below.sums[i*s.clusterBlocks:])
			}
		}
		r.put(v.delta, pg.index, pg)
	}
}

// replay applies what a dead process of this boot acknowledged and did not flush.
func (s *Store) replay(checkpoint uint64) error {
	byDelta := map[uint64]*volume{}
	for _, v := range s.byID {
		byDelta[v.delta.id] = v
	}
	records := 0
	apply := func(p []byte) error {
		r, err := s.decodeRedo(p)
		if err != nil {
			return err
		}
		if r.seq <= checkpoint {
			return nil
		}
		s.seq.Store(max(s.seq.Load(), r.seq))
		v := byDelta[r.delta]
		if v == nil || v.damage != nil || v.snapshot || len(v.clones) > 0 {
			return nil // deleted since
		}
		records++
		s.apply(v, r)
		return nil
	}
	prefix := filepath.Join(s.o.Dir, "redo")
	if s.o.ReadOnly {
		return redo.Read(prefix, apply)
	}
	log, err := redo.Open(prefix, apply)
	if kind.Of(err) == kind.NoSpace && s.ball.release() {
		log, err = redo.Open(prefix, apply)
	}
	if err != nil {
		return err
	}
	s.redo = log
	if records > 0 {
		s.log.Info("lvol redo log replayed", "dir", s.o.Dir, "records", records)
	}
	return nil
}

func (s *Store) apply(v *volume, r redoRecord) {
	end := uint64((v.size.Load() + s.clusterBytes - 1) >> s.clusterShift)
	if r.cluster >= end || uint64(r.count) > end-r.cluster {
		return
	}
	if r.set {
		pg := s.ownPage(v, uint32(r.cluster/uint64(s.pageClusters)))
		i := int(r.cluster % uint64(s.pageClusters))
		s.replaced(pg.load(i), r.phys)
		copy(pg.sums[i*s.clusterBlocks+r.first:], r.sums)
		pg.store(i, stateAllocated|ownBit|entry(r.phys))
		s.markDirty(pg)
		return
	}
	for c := r.cluster; c < r.cluster+uint64(r.count); c++ {
		pg := s.ownPage(v, uint32(c/uint64(s.pageClusters)))
		e := r.state
		if e == stateZeroed {
			e |= ownBit
		}
		i := int(c % uint64(s.pageClusters))
		s.replaced(pg.load(i), 0)
		pg.store(i, e)
		s.markDirty(pg)
	}
}

// replaced keeps the cluster that replay took from an lvol until the next flush:
// durable metadata may still name it.
func (s *Store) replaced(e entry, by uint64) {
	if e.own() && e.allocated() && e.phys() != by {
		s.freeLater([]extent{{e.phys(), 1}})
	}
}

// resum takes what the device holds in pages marked open as good: a process or the
// machine died while clusters in them were overwritten in place, and each sector is
// old or new.
func (s *Store) resum(marks []mark) {
	byDelta := map[uint64]*volume{}
	for _, v := range s.byID {
		byDelta[v.delta.id] = v
	}
	buf := make([]byte, s.clusterBytes)
	for _, m := range marks {
		v := byDelta[m.delta]
		var pg *page
		if v != nil && v.damage == nil {
			pg = v.root.Load().page(m.index)
		}
		if pg == nil || pg.delta != v.delta {
			// Nothing is under this mark; a flush takes it away.
			pg = s.newPage(&delta{id: m.delta, gone: true}, m.index)
			s.openPages[pg] = struct{}{}
			continue
		}
		s.openPages[pg] = struct{}{}
		for i := range pg.entries {
			e := pg.load(i)
			if !e.own() || !e.allocated() {
				continue
			}
			if err := s.dev.ReadAt(buf, int64(e.phys())<<s.clusterShift); err != nil {
				s.log.Error("lvol cluster not read during recovery", "dir", s.o.Dir, "lvol", v.name, "err", err)
				continue // its checksums stay: reads tell
			}
			for b := range s.clusterBlocks {
				pg.sums[i*s.clusterBlocks+b] = crc32.Checksum(buf[b<<blockShift:(b+1)<<blockShift], castagnoli)
			}
		}
		s.markDirty(pg)
	}
}

// claimAll marks the clusters of all deltas used and counts them.
func (s *Store) claimAll() {
	claim := func(v *volume) {
		n := int64(0)
		v.root.Load().each(func(_ uint32, pg *page) {
			if pg.delta != v.delta {
				return
			}
			for i := range pg.entries {
				if e := pg.load(i); e.own() && e.allocated() {
					n++
					if !s.alloc.claim(e.phys()) {
						s.log.Error("lvol cluster claimed twice", "dir", s.o.Dir, "cluster", e.phys(), "lvol", v.name)
					}
				}
			}
		})
		v.allocated.Store(n)
	}
	ids := make([]uint64, 0, len(s.byID))
	for id := range s.byID {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	for _, id := range ids {
		claim(s.byID[id])
	}
	for _, o := range s.orphans {
		claim(o)
	}
	// What replay freed stays claimed until a flush gives it back.
	pending := s.pending
	s.pending = nil
	s.pendCount.Store(0)
	for _, x := range pending {
		for c := x.start; c < x.start+x.n; c++ {
			if !s.alloc.isUsed(c) && s.alloc.claim(c) {
				s.freeLater([]extent{{c, 1}})
			}
		}
	}
}

// settle makes durable what replay and resum found, then gives back what a dead
// process left in free clusters, and marks the pool in use.
func (s *Store) settle(clean bool) error {
	s.ball.refill()
	if err := s.flushFor(closeAll); err != nil {
		// A full file system must not keep the pool from being opened: deletes are
		// what makes room. What was not flushed stays in the redo log and in memory.
		if kind.Of(err) != kind.NoSpace {
			return err
		}
		s.log.Warn("lvol pool opened, but not flushed", "dir", s.o.Dir, "err", err)
	}
	if !clean || !s.dev.ZeroesOnPunch() {
		s.cleanFree(clean)
	}
	if err := s.markUnclean(); err != nil && kind.Of(err) != kind.NoSpace {
		return err
	}
	return nil
}

// markUnclean notes durably that the pool is in use, before the first cluster is
// allocated: should the process die, free clusters may hold leftovers.
func (s *Store) markUnclean() error {
	if s.unclean.Load() {
		return nil
	}
	err := s.update(func(tx *bbolt.Tx) error { return putPool(tx, keyClean, []byte{0}) })
	if err != nil {
		return fmt.Errorf("mark pool in use: %w", err)
	}
	s.unclean.Store(true)
	return nil
}

// cleanFree makes free clusters read as zeros, or remembers that they may not. They
// can hold what was written but never acknowledged, and, since replay and resum are
// durable by now, nothing names them.
func (s *Store) cleanFree(clean bool) {
	const batch = 1024
	for start := uint64(1); ; {
		list := s.alloc.freeExtents(start, batch)
		for _, x := range list {
			stale := !s.dev.ZeroesOnPunch()
			if !clean {
				if err := s.dev.Punch(int64(x.start)<<s.clusterShift, int64(x.n)<<s.clusterShift); err != nil {
					s.log.Warn("lvol free clusters not punched", "dir", s.o.Dir, "first", x.start, "count", x.n, "err", err)
					stale = true
				}
			}
			s.alloc.setStale([]extent{x}, stale)
			start = x.start + x.n
		}
		if len(list) < batch {
			return
		}
	}
}
