package lvol

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"slices"

	"go.etcd.io/bbolt"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/lvol/device"
)

// Check looks at all metadata for leaks, double use and damage, and with
// CheckOptions.Scrub reads all data. I/O waits while the metadata is looked at;
// scrubbing lets it pass. What it finds is in the report; the error says that it
// could not look.
func (s *Store) Check(ctx context.Context, o CheckOptions) (Report, error) {
	c := &checker{s: s, o: o}
	if o.Repair {
		if err := s.failure(); err != nil {
			return Report{}, fmt.Errorf("check with repair: %w", err)
		}
	}
	volumes, err := c.metadata()
	if err != nil {
		return c.report, fmt.Errorf("check pool %s: %w", s.o.Dir, err)
	}
	if o.Scrub {
		for _, v := range volumes {
			if err := c.scrub(ctx, v); err != nil {
				return c.report, fmt.Errorf("scrub pool %s: %w", s.o.Dir, err)
			}
		}
	}
	return c.report, nil
}

type checker struct {
	s      *Store
	o      CheckOptions
	report Report
}

func (c *checker) add(p Problem) {
	if len(c.report.Problems) >= MaxProblems {
		c.report.More++
		return
	}
	c.report.Problems = append(c.report.Problems, p)
}

func (c *checker) damage(lvol string, off int64, format string, args ...any) {
	c.add(Problem{Type: ProblemDamage, Lvol: lvol, OffsetBytes: off, Detail: fmt.Sprintf(format, args...)})
}

// metadata checks everything but data, with all I/O stopped.
func (c *checker) metadata() ([]*volume, error) {
	s := c.s
	s.admin.Lock()
	defer s.admin.Unlock()
	s.mu.RLock()
	closed := s.closed
	volumes := make([]*volume, 0, len(s.byID))
	for _, v := range s.byID {
		volumes = append(volumes, v)
	}
	s.mu.RUnlock()
	if closed {
		return nil, errClosed(s.o.Dir)
	}
	slices.SortFunc(volumes, func(a, b *volume) int { return int(a.id) - int(b.id) })
	for _, v := range volumes {
		v.quiesce.Lock()
		defer v.quiesce.Unlock()
	}
	flushed := s.failure() == nil
	if flushed {
		if err := s.flushFor(closing{}); err != nil {
			s.log.Warn("lvol check without flush", "dir", s.o.Dir, "err", err)
			flushed = false
		}
	}
	s.flushMu.Lock()
	defer s.flushMu.Unlock()
	if err := c.superblocks(); err != nil {
		return nil, err
	}
	for _, v := range volumes {
		if v.damage != nil {
			c.damage(v.name, 0, "%v", v.damage)
		}
		if err := c.stored(v, flushed); err != nil {
			c.damage(v.name, 0, "its map cannot be read: %v", err)
		}
	}
	if err := c.names(); err != nil {
		c.damage("", 0, "names: %v", err)
	}
	if err := c.orphans(volumes); err != nil {
		return nil, err
	}
	c.clusters(volumes)
	return volumes, c.leftovers()
}

// superblocks checks both copies, and repairs a damaged one.
func (c *checker) superblocks() error {
	s := c.s
	want := s.super.encode()
	have := make([]byte, superblockBytes)
	if err := s.dev.ReadAt(have, 0); err != nil {
		c.damage("", 0, "superblock on the device: %v", err)
	} else if _, err := decodeSuperblock(have); err != nil || !slices.Equal(have, want) {
		p := Problem{Type: ProblemDamage, Detail: "superblock on the device is damaged"}
		if c.o.Repair {
			err := s.dev.WriteAt(want, 0)
			if err == nil {
				err = s.dev.Sync()
			}
			if err != nil {
				return fmt.Errorf("repair superblock: %w", err)
			}
			p.Repaired = true
		}
		c.add(p)
	}
	err := s.meta.view(func(tx *bbolt.Tx) error {
		p, err := getPool(tx, keySuperblock)
		if err == nil && !slices.Equal(p, want) {
			err = kind.Errorf(kind.Corrupt, "it differs")
		}
		return err
	})
	if err != nil {
		p := Problem{Type: ProblemDamage, Detail: fmt.Sprintf("superblock in meta.db: %v", err)}
		if c.o.Repair {
			if err := s.update(func(tx *bbolt.Tx) error { return putPool(tx, keySuperblock, want) }); err != nil {
				return fmt.Errorf("repair superblock: %w", err)
			}
			p.Repaired = true
		}
		c.add(p)
	}
	return nil
}

// stored checks that meta.db has v's record and pages as memory has them. If not all
// was flushed, only that they verify.
func (c *checker) stored(v *volume, flushed bool) error {
	s := c.s
	return s.meta.view(func(tx *bbolt.Tx) error {
		lvols, err := bucket(tx, bucketLvol)
		if err != nil {
			return err
		}
		r, err := decodeRecord(v.id, lvols.Get(key64(v.id)))
		if err != nil {
			if v.damage == nil {
				c.damage(v.name, 0, "its record: %v", err)
			}
			return nil
		}
		if v.damage == nil && r != v.recordLocked() {
			c.damage(v.name, 0, "its record differs from what is in memory")
		}
		deltas, err := bucket(tx, bucketDelta)
		if err != nil {
			return err
		}
		if err := s.meta.bad[r.delta]; err != nil {
			return err
		}
		b := deltas.Bucket(key64(r.delta))
		if b == nil {
			return nil
		}
		return b.ForEach(func(k, value []byte) error {
			if len(k) != 4 {
				c.damage(v.name, 0, "its map has a key %x", k)
				return nil
			}
			pi := binary.BigEndian.Uint32(k)
			pg := s.newPage(&delta{id: r.delta}, pi)
			if err := s.decodePage(pg, value); err != nil {
				c.damage(v.name, int64(pi)<<pageShift, "map page: %v", err)
				return nil
			}
			for i := range pg.entries {
				if pg.load(i).state() == stateDamaged {
					c.damage(v.name, int64(pi)<<pageShift+int64(i)<<s.clusterShift, "its place was lost when a map page was damaged")
				}
			}
			if flushed && v.damage == nil && !s.samePage(pg, v) {
				c.damage(v.name, int64(pi)<<pageShift, "map page differs from what is in memory")
			}
			return nil
		})
	})
}

// samePage compares what pg, read from meta.db, owns with v's map.
func (s *Store) samePage(pg *page, v *volume) bool {
	have := v.root.Load().page(pg.index)
	if have == nil || have.delta != v.delta {
		return false
	}
	for i := range pg.entries {
		a, b := pg.load(i)&^durableBit, have.load(i)&^durableBit
		if a.own() != b.own() || a.own() && a != b {
			return false
		}
		if k := i * s.clusterBlocks; a.allocated() && a.own() && !slices.Equal(pg.sums[k:k+s.clusterBlocks], have.sums[k:k+s.clusterBlocks]) {
			return false
		}
	}
	return true
}

// names checks that each name leads to an lvol that bears it.
func (c *checker) names() error {
	s := c.s
	var stray [][]byte
	err := s.meta.view(func(tx *bbolt.Tx) error {
		b, err := bucket(tx, bucketName)
		if err != nil {
			return err
		}
		return b.ForEach(func(k, value []byte) error {
			id, err := idOfName(k, value)
			s.mu.RLock()
			v := s.byID[id]
			s.mu.RUnlock()
			switch {
			case err == nil && v != nil && (v.damage != nil || v.name == string(k)):
				return nil
			case err == nil:
				err = kind.Errorf(kind.Corrupt, "name %q leads to lvol %d, which does not bear it", k, id)
			}
			stray = append(stray, slices.Clone(k))
			c.add(Problem{Type: ProblemDamage, Detail: err.Error(), Repaired: c.o.Repair})
			return nil
		})
	})
	if err != nil || !c.o.Repair || len(stray) == 0 {
		return err
	}
	return s.update(func(tx *bbolt.Tx) error {
		for _, k := range stray {
			if err := deleteName(tx, string(k)); err != nil {
				return err
			}
			s.mu.RLock()
			v := s.byName[string(k)]
			s.mu.RUnlock()
			if v != nil && v.damage == nil {
				if err := putRecord(tx, v.id, v.recordLocked()); err != nil {
					return err
				}
			}
		}
		return nil
	})
}

// orphans reports deltas that no lvol has. If some lvol's record is damaged they may
// be its; otherwise they are leaks.
func (c *checker) orphans(volumes []*volume) error {
	s := c.s
	lost := slices.ContainsFunc(volumes, func(v *volume) bool { return v.damage != nil })
	var keep []*volume
	for _, o := range s.orphans {
		n := o.allocated.Load()
		p := Problem{Type: ProblemLeak, Detail: fmt.Sprintf("%s with %d clusters belongs to no lvol", o.name, n)}
		switch {
		case s.meta.bad[o.delta.id] != nil:
			p.Type, p.Detail = ProblemDamage, fmt.Sprintf("%s belongs to no lvol and cannot be removed: %v", o.name, s.meta.bad[o.delta.id])
		case lost:
			p.Type = ProblemDamage
			p.Detail += "; perhaps to one whose record is damaged: delete that first"
		case c.o.Repair:
			if err := s.update(func(tx *bbolt.Tx) error { return s.meta.deleteDelta(tx, o.delta.id) }); err != nil {
				return fmt.Errorf("remove %s: %w", o.name, err)
			}
			var freed []extent
			o.root.Load().each(func(_ uint32, pg *page) { freed = s.ownExtents(freed, pg) })
			s.giveBack(freed)
			p.Repaired = true
		}
		if !p.Repaired {
			keep = append(keep, o)
		}
		c.add(p)
	}
	s.orphans = keep
	return nil
}

// clusters compares the claims of all maps with each other and with the bitmap.
func (c *checker) clusters(volumes []*volume) {
	s := c.s
	claimed := make([]uint64, len(s.alloc.used))
	bit := func(phys uint64) (*uint64, uint64) { return &claimed[phys/64], 1 << (phys % 64) }
	claim := func(v *volume) {
		n := int64(0)
		v.root.Load().each(func(pi uint32, pg *page) {
			if pg.delta != v.delta {
				return
			}
			for i := range pg.entries {
				e := pg.load(i)
				if !e.own() || !e.allocated() {
					continue
				}
				off := int64(pi)<<pageShift + int64(i)<<s.clusterShift
				n++
				c.report.CheckedClusters++
				w, b := bit(e.phys())
				if *w&b != 0 {
					c.add(Problem{Type: ProblemDoubleUse, Lvol: v.name, OffsetBytes: off, Detail: fmt.Sprintf("cluster %d belongs to another as well", e.phys())})
				}
				*w |= b
				if !s.alloc.isUsed(e.phys()) {
					c.damage(v.name, off, "cluster %d counts as free", e.phys())
				}
			}
		})
		if have := v.allocated.Load(); have != n {
			c.damage(v.name, 0, "it counts %d clusters and has %d", have, n)
		}
	}
	for _, v := range volumes {
		claim(v)
	}
	for _, o := range s.orphans {
		claim(o)
	}
	s.dirtyMu.Lock()
	for _, x := range s.pending {
		for p := x.start; p < x.start+x.n; p++ {
			w, b := bit(p)
			*w |= b
		}
	}
	s.dirtyMu.Unlock()
	var leaked []extent
	for p := uint64(1); p < s.totalClusters; p++ {
		if w, b := bit(p); *w&b == 0 && s.alloc.isUsed(p) {
			leaked = appendExtent(leaked, p)
		}
	}
	for _, x := range leaked {
		c.add(Problem{Type: ProblemLeak, OffsetBytes: int64(x.start) << s.clusterShift,
			Detail: fmt.Sprintf("%d clusters count as used, but nothing has them", x.n), Repaired: c.o.Repair})
	}
	if c.o.Repair {
		s.giveBack(leaked)
	}
}

// leftovers looks for free clusters that occupy space on the device.
func (c *checker) leftovers() error {
	s := c.s
	m, ok := s.dev.(device.Mapper)
	if !ok || !s.dev.ZeroesOnPunch() {
		return nil
	}
	var found []extent
	for off := s.clusterBytes; ; {
		start, end, err := m.NextData(off)
		if errors.Is(err, io.EOF) || kind.Of(err) == kind.Unsupported {
			break
		}
		if err != nil {
			return err
		}
		last := min(uint64((end+s.clusterBytes-1)>>s.clusterShift), s.totalClusters)
		for p := uint64(start >> s.clusterShift); p < last; p++ {
			if !s.alloc.isUsed(p) {
				found = appendExtent(found, p)
			}
		}
		off = int64(last) << s.clusterShift
		if last >= s.totalClusters {
			break
		}
	}
	for _, x := range found {
		p := Problem{Type: ProblemLeak, OffsetBytes: int64(x.start) << s.clusterShift, Detail: fmt.Sprintf("%d free clusters occupy space", x.n)}
		if c.o.Repair {
			if err := s.dev.Punch(p.OffsetBytes, int64(x.n)<<s.clusterShift); err != nil {
				return fmt.Errorf("free clusters from %d: %w", x.start, err)
			}
			s.alloc.setStale([]extent{x}, false)
			p.Repaired = true
		}
		c.add(p)
	}
	return nil
}

// scrub reads what v's delta owns and verifies it, a page at a time, beside I/O.
func (c *checker) scrub(ctx context.Context, v *volume) error {
	s := c.s
	if v.damage != nil {
		return nil
	}
	buf := make([]byte, s.clusterBytes)
	pages := uint32((v.size.Load() + pageBytes - 1) >> pageShift)
	for pi := range pages {
		if ctx.Err() != nil {
			return kind.Wrap(kind.Canceled, context.Cause(ctx))
		}
		v.quiesce.RLock()
		pg := v.root.Load().page(pi)
		if pg != nil && pg.delta == v.delta && !v.deleted {
			for i := range pg.entries {
				c.scrubCluster(v, pg, i, buf)
			}
		}
		v.quiesce.RUnlock()
	}
	return nil
}

func (c *checker) scrubCluster(v *volume, pg *page, i int, buf []byte) {
	s := c.s
	cluster := uint64(pg.index)*uint64(s.pageClusters) + uint64(i)
	v.rlockRange(cluster, 1)
	defer v.runlockRange(cluster, 1)
	e := pg.load(i)
	if !e.own() || !e.allocated() {
		return
	}
	off := int64(cluster) << s.clusterShift
	s.mu.RLock()
	name := v.name
	s.mu.RUnlock()
	if err := s.dev.ReadAt(buf, int64(e.phys())<<s.clusterShift); err != nil {
		c.damage(name, off, "cluster %d cannot be read: %v", e.phys(), err)
		return
	}
	c.report.ScrubbedBytes += s.clusterBytes
	for b := range s.clusterBlocks {
		sum := crc32.Checksum(buf[b<<blockShift:(b+1)<<blockShift], castagnoli)
		if want := pg.sums[i*s.clusterBlocks+b]; sum != want {
			c.damage(name, off+int64(b)<<blockShift, "checksum %08x, want %08x", sum, want)
		}
	}
}
