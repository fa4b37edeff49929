package qcow2

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"slices"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/redo"
)

// maxKeptBytes is the flush buffer that is kept for the next flush.
const maxKeptBytes = 64 << 10

// checkpoint is the change of the tables that one flush makes durable: a copy, because
// writers go on changing the tables and what they add points to data not yet durable.
type checkpoint struct {
	segment redo.Segment
	slices  []*slice // pinned
	raw     []byte   // their entries as in the file
	l1      []int64
	entries []uint64 // of l1
	retired []clusterRun
}

func (c *checkpoint) empty() bool { return len(c.slices) == 0 && len(c.l1) == 0 }

// graced are clusters that no table refers to any more, durably, but that accesses of
// generation and before may still use.
type graced struct {
	generation uint64
	runs       []clusterRun
}

// Flush implements bdev.Device.
func (i *Image) Flush() error {
	if i.readOnly {
		return nil
	}
	i.flushMu.Lock()
	defer i.flushMu.Unlock()
	if err := i.flush(); err != nil {
		return fmt.Errorf("qcow2 %s: flush: %w", i.name, err)
	}
	return nil
}

// flush makes everything acknowledged durable: first the data, then the tables that
// point to it, so that a power loss finds old or new and never what was in the file
// before. flushMu is held.
func (i *Image) flush() error {
	if err := i.brokenError(); err != nil {
		return err
	}
	wrote := i.wrote.Swap(false)
	c, err := i.capture()
	if err == nil {
		err = i.writeCheckpoint(c, wrote)
	}
	if err != nil {
		i.wrote.Store(true)
		return err
	}
	if len(c.retired) > 0 {
		i.graced = append(i.graced, graced{i.epoch.generation.Load(), c.retired})
	}
	return i.reclaim()
}

func (i *Image) capture() (*checkpoint, error) {
	c := &checkpoint{}
	i.metaMu.Lock()
	defer i.metaMu.Unlock()
	if len(i.dirtySlices) == 0 && len(i.dirtyL1) == 0 {
		return c, nil
	}
	segment, err := i.log.Rotate()
	if err != nil && kind.Of(err) != kind.NoSpace {
		return nil, err
	}
	// On a full disk the flush goes on, with no segment to release: it writes where the
	// file has room already, and may free some. The records stay, and replaying them
	// before those that follow is harmless.
	c.segment = segment
	c.slices, i.dirtySlices = i.dirtySlices, nil
	c.l1, i.dirtyL1 = i.dirtyL1, nil
	c.retired, i.retired = i.retired, nil
	slices.SortFunc(c.slices, func(a, b *slice) int { return cmp.Compare(a.number, b.number) })
	c.raw, i.flushBuf = i.flushBuf[:0], nil
	for _, s := range c.slices {
		s.dirty = false
		for k := range s.entries {
			c.raw = binary.BigEndian.AppendUint64(c.raw, s.entries[k])
		}
	}
	for _, index := range c.l1 {
		c.entries = append(c.entries, i.l1[index])
	}
	return c, nil
}

func (i *Image) writeCheckpoint(c *checkpoint, wrote bool) error {
	err := i.writeOrdered(c, wrote)
	if err == nil && !c.empty() {
		err = i.log.Release(c.segment)
	}
	i.metaMu.Lock()
	defer i.metaMu.Unlock()
	if cap(c.raw) <= maxKeptBytes {
		i.flushBuf = c.raw
	}
	if err != nil {
		i.dirtyL1 = append(i.dirtyL1, c.l1...)
		i.retired = append(i.retired, c.retired...)
	}
	i.cache.mu.Lock()
	defer i.cache.mu.Unlock()
	for _, s := range c.slices {
		if err != nil && !s.dirty {
			s.dirty = true // keeps the pin
			i.dirtySlices = append(i.dirtySlices, s)
			continue
		}
		s.pins--
	}
	return err
}

func (i *Image) writeOrdered(c *checkpoint, wrote bool) error {
	if c.empty() && !wrote {
		return nil
	}
	if !c.empty() && !i.head.lazy() {
		// Counts rise in the file before a table refers to the cluster, and fall after,
		// because a retired cluster stays counted until it is reclaimed.
		replaced, err := i.saveCounts(false)
		if err != nil {
			return err
		}
		if replaced.n > 0 {
			c.retired = append(c.retired, replaced)
		}
	}
	if err := i.sync(); err != nil {
		return err
	}
	if c.empty() {
		return nil
	}
	if err := i.writeTables(c); err != nil {
		return err
	}
	return i.sync()
}

// writeTables writes the captured slices, those next to each other together, and the
// L1 entries. A new L2 table reached the disk as zeros before, so the L1 entry may
// arrive before the slices.
func (i *Image) writeTables(c *checkpoint) error {
	each := int64(8) << i.cache.entryBits
	perTable := i.head.l2Bits() - i.cache.entryBits
	at := func(s *slice) int64 {
		return hostOffset(i.l1[s.number>>perTable]) + s.number&(1<<perTable-1)*each
	}
	for k := 0; k < len(c.slices); {
		m := k + 1
		for m < len(c.slices) && at(c.slices[m]) == at(c.slices[k])+int64(m-k)*each {
			m++
		}
		if err := i.file.WriteAt(c.raw[int64(k)*each:int64(m)*each], at(c.slices[k])); err != nil {
			return fmt.Errorf("write L2 table: %w", err)
		}
		k = m
	}
	for k, index := range c.l1 {
		var raw [8]byte
		binary.BigEndian.PutUint64(raw[:], c.entries[k])
		if err := i.file.WriteAt(raw[:], i.head.l1Offset+index*8); err != nil {
			return fmt.Errorf("write L1 table: %w", err)
		}
	}
	return nil
}

// reclaim frees the retired clusters that no access can be using any more. Those that
// are still in use wait for a later flush; nobody waits for them. flushMu is held.
func (i *Image) reclaim() error {
	for range 2 {
		i.epoch.advance()
	}
	for len(i.graced) > 0 && i.epoch.over(i.graced[0].generation) {
		for _, r := range i.graced[0].runs {
			i.reclaimRun(r)
		}
		i.graced = i.graced[1:]
	}
	return nil
}

// reclaimRun drops one reference to each cluster, punching holes for those that are
// free then. They stay counted meanwhile, so that nobody allocates them.
func (i *Image) reclaimRun(r clusterRun) {
	for r.n > 0 {
		last := i.alloc.count(r.first) == 1
		n := int64(1)
		for n < r.n && (i.alloc.count(r.first+n) == 1) == last {
			n++
		}
		part := clusterRun{r.first, n}
		if last {
			if err := i.file.Punch(part.first<<i.head.clusterBits, part.n<<i.head.clusterBits); err != nil {
				i.logger.Warn("qcow2: cannot free clusters in the file system", "image", i.name, "error", err)
			}
		}
		i.alloc.release(part)
		r.first, r.n = r.first+n, r.n-n
	}
}

// sync makes what was written durable. The kernel reports a failed writeback once and
// then forgets the pages, so after a failure nothing may be called durable any more.
func (i *Image) sync() error {
	if err := i.file.Sync(); err != nil {
		i.breakDown(fmt.Errorf("an earlier sync failed: %w", err))
		return err
	}
	return nil
}
