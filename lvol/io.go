package lvol

import (
	"fmt"
	"hash/crc32"
	"io"

	"github.com/thaw-project/thaw/kind"
)

// Lvol is an open lvol: a target/bdev.Device. Offsets and lengths are in bytes and
// need no alignment; 4 KiB is the cheapest. After Close, or after the store's, all
// methods but SizeBytes and ReadOnly fail with kind.Unavailable.
type Lvol struct {
	s        *Store
	v        *volume
	readOnly bool
	locking  bool // the lvol can change while this handle is open
	gate     gate // Close waits for the handle's operations
}

// zeroSum is the checksum of a block of zeros.
var zeroSum = crc32.Checksum(make([]byte, blockBytes), castagnoli)

// zeros is a source of zeros to write; never written.
var zeros [256 << 10]byte

// scratch is what one write or unaligned read needs beside the caller's buffer.
type scratch struct {
	cluster []byte   // of a cluster, made on first need
	block   []byte   // of one block
	sums    []uint32 // of a cluster's blocks
	record  []byte   // a redo record
}

func (s *Store) newScratch() any {
	return &scratch{block: make([]byte, blockBytes), sums: make([]uint32, s.clusterBlocks)}
}

func (s *Store) getScratch() *scratch { return s.scratch.Get().(*scratch) }

func (sc *scratch) clusterBuf(g *geometry) []byte {
	if sc.cluster == nil {
		sc.cluster = make([]byte, g.clusterBytes)
	}
	return sc.cluster
}

// SizeBytes is the virtual size.
func (l *Lvol) SizeBytes() int64 { return l.v.size.Load() }

// UUID is the lvol's, as in Info.
func (l *Lvol) UUID() string { return l.v.uuid.String() }

// ReadOnly tells whether this handle refuses writes.
func (l *Lvol) ReadOnly() bool { return l.readOnly }

// enter begins an operation on an open handle; leave ends it.
func (l *Lvol) enter() error {
	if !l.gate.enter() {
		return kind.Errorf(kind.Unavailable, "lvol %s is closed", l.name())
	}
	if l.locking {
		l.v.quiesce.RLock()
	}
	return nil
}

func (l *Lvol) leave() {
	if l.locking {
		l.v.quiesce.RUnlock()
	}
	l.gate.leave()
}

func (l *Lvol) name() string {
	l.s.mu.RLock()
	defer l.s.mu.RUnlock()
	return l.v.name
}

// Close closes the handle, waiting for its operations. It does not flush.
func (l *Lvol) Close() error {
	if !l.gate.close() {
		return nil
	}
	l.s.mu.Lock()
	l.v.handles--
	delete(l.s.open, l)
	l.s.mu.Unlock()
	return nil
}

// Flush is a barrier: what was written to this lvol (and to any other) before the
// call survives a power loss once it returns nil.
func (l *Lvol) Flush() error {
	if !l.gate.enter() {
		return kind.Errorf(kind.Unavailable, "lvol %s is closed", l.name())
	}
	defer l.gate.leave()
	if l.readOnly {
		return nil
	}
	return l.s.Flush()
}

// ReadAt reads as io.ReaderAt does. Where a 4 KiB block does not match its checksum
// it returns kind.Corrupt and the count of good bytes before that block.
func (l *Lvol) ReadAt(p []byte, off int64) (int, error) {
	if err := l.enter(); err != nil {
		return 0, err
	}
	defer l.leave()
	size := l.v.size.Load()
	switch {
	case off < 0:
		return 0, kind.Errorf(kind.Invalid, "read lvol %s at %d", l.name(), off)
	case len(p) == 0:
		return 0, nil
	case off >= size:
		return 0, io.EOF
	}
	atEnd := int64(len(p)) > size-off
	if atEnd {
		p = p[:size-off]
	}
	n, err := l.s.read(l.v, p, off, l.locking)
	if err != nil {
		return n, fmt.Errorf("read lvol %s: %w", l.name(), err)
	}
	if atEnd {
		return n, io.EOF
	}
	return n, nil
}

// read fills p from v. It goes page by page and at most stripes clusters at a time,
// which is what one set of locks covers. The caller has bounded the range.
func (s *Store) read(v *volume, p []byte, off int64, lock bool) (n int, err error) {
	for n < len(p) {
		at := off + int64(n)
		end := min(off+int64(len(p)), (at>>pageShift+1)<<pageShift)
		c := uint64(at >> s.clusterShift)
		if limit := int64(c+stripes) << s.clusterShift; end > limit {
			end = limit
		}
		part := p[n : n+int(end-at)]
		clusters := int(uint64(end-1)>>s.clusterShift-c) + 1
		if lock {
			v.rlockRange(c, clusters)
		}
		m, err := s.readPage(v.root.Load().page(uint32(at>>pageShift)), part, at)
		if lock {
			v.runlockRange(c, clusters)
		}
		n += m
		if err != nil {
			return n, err
		}
	}
	return n, nil
}

// readPage fills p, which lies within one page, joining neighbours on the device
// into one access.
func (s *Store) readPage(pg *page, p []byte, off int64) (n int, err error) {
	if pg == nil {
		clear(p)
		return len(p), nil
	}
	inPage := off & (pageBytes - 1)
	for n < len(p) {
		at := inPage + int64(n)
		i := int(at >> s.clusterShift)
		in := at & (s.clusterBytes - 1)
		length := min(s.clusterBytes-in, int64(len(p)-n))
		e := pg.load(i)
		switch e.state() {
		case stateAllocated:
			for next := i + 1; int64(n)+length < int64(len(p)); next++ {
				f := pg.load(next)
				if !f.allocated() || f.phys() != e.phys()+uint64(next-i) {
					break
				}
				length = min(length+s.clusterBytes, int64(len(p)-n))
			}
			m, err := s.readRun(pg, int(at>>blockShift), p[n:n+int(length)], int64(e.phys())<<s.clusterShift+in, off+int64(n))
			if err != nil {
				return n + m, err
			}
		case stateDamaged:
			return n, kind.Errorf(kind.Corrupt, "the map at offset %d is damaged", off+int64(n))
		default:
			clear(p[n : n+int(length)])
		}
		n += int(length)
	}
	return n, nil
}

// readRun fills p from the device at devOff and verifies it: block is the first
// block's index in pg, off what the caller asked for, for messages.
func (s *Store) readRun(pg *page, block int, p []byte, devOff, off int64) (n int, err error) {
	if in := int(devOff & (blockBytes - 1)); in != 0 || len(p) < blockBytes {
		n = min(len(p), blockBytes-in)
		if err := s.readPart(pg, block, p[:n], in, devOff, off); err != nil {
			return 0, err
		}
		block++
	}
	if whole := (len(p) - n) &^ (blockBytes - 1); whole > 0 {
		q := p[n : n+whole]
		if err := s.dev.ReadAt(q, devOff+int64(n)); err != nil {
			return n, err
		}
		for len(q) > 0 {
			if sum := crc32.Checksum(q[:blockBytes], castagnoli); sum != pg.sums[block] {
				return n, badBlock(off+int64(n), sum, pg.sums[block])
			}
			q = q[blockBytes:]
			n += blockBytes
			block++
		}
	}
	if n < len(p) {
		if err := s.readPart(pg, block, p[n:], 0, devOff+int64(n), off+int64(n)); err != nil {
			return n, err
		}
		n = len(p)
	}
	return n, nil
}

// readPart fills p, a part of one block that starts in bytes into it.
func (s *Store) readPart(pg *page, block int, p []byte, in int, devOff, off int64) error {
	sc := s.getScratch()
	defer s.scratch.Put(sc)
	if err := s.dev.ReadAt(sc.block, devOff-int64(in)); err != nil {
		return err
	}
	if sum := crc32.Checksum(sc.block, castagnoli); sum != pg.sums[block] {
		return badBlock(off, sum, pg.sums[block])
	}
	copy(p, sc.block[in:])
	return nil
}

func badBlock(off int64, have, want uint32) error {
	return kind.Errorf(kind.Corrupt, "block at offset %d: checksum %08x, want %08x", off&^(blockBytes-1), have, want)
}

// WriteAt writes all of p, or returns how much of it was written before the error.
func (l *Lvol) WriteAt(p []byte, off int64) (int, error) {
	if err := l.beginChange("write", off, int64(len(p))); err != nil {
		return 0, err
	}
	defer l.leave()
	sc := l.s.getScratch()
	defer l.s.scratch.Put(sc)
	for n := 0; n < len(p); {
		at := off + int64(n)
		in := at & (l.s.clusterBytes - 1)
		part := p[n:min(len(p), n+int(l.s.clusterBytes-in))]
		if err := l.s.writeCluster(l.v, sc, uint64(at>>l.s.clusterShift), int(in), part); err != nil {
			return n, fmt.Errorf("write lvol %s at %d: %w", l.name(), at, err)
		}
		n += len(part)
	}
	return len(p), l.s.endChange()
}

// beginChange enters an operation that changes the lvol, once the store has room
// for it to be remembered until the next flush.
func (l *Lvol) beginChange(op string, off, length int64) error {
	if l.readOnly {
		return kind.Errorf(kind.ReadOnly, "%s lvol %s: open read-only", op, l.name())
	}
	if err := l.s.makeRoom(); err != nil {
		return fmt.Errorf("%s lvol %s: %w", op, l.name(), err)
	}
	if err := l.enter(); err != nil {
		return err
	}
	if size := l.v.size.Load(); off < 0 || length < 0 || off > size || length > size-off {
		l.leave()
		return kind.Errorf(kind.Invalid, "%s lvol %s: %d bytes at %d do not fit in %d", op, l.name(), length, off, size)
	}
	return nil
}

// makeRoom keeps what waits for a flush within its bounds.
func (s *Store) makeRoom() error {
	if err := s.failure(); err != nil {
		return err
	}
	if s.dirtyCount.Load() >= int64(s.o.MaxDirtyPages) || s.redo.SizeBytes() >= s.o.MaxRedoBytes {
		return s.flushFor(closing{})
	}
	return nil
}

// endChange makes sure, before an operation is acknowledged, that it would survive
// the death of the process: normally its redo record sees to that, but when one
// could not be written only a flush does.
func (s *Store) endChange() error {
	if s.redoGap.Load() {
		return s.flushFor(closing{})
	}
	return nil
}

// writeCluster writes p at in bytes into cluster c of v. The caller holds v.quiesce.
func (s *Store) writeCluster(v *volume, sc *scratch, c uint64, in int, p []byte) error {
	v.lockRange(c, 1)
	defer v.unlockRange(c, 1)
	pi, i := uint32(c/uint64(s.pageClusters)), int(c%uint64(s.pageClusters))
	pg := v.root.Load().page(pi)
	var e entry
	if pg != nil {
		e = pg.load(i)
	}
	if e.state() == stateDamaged && len(p) != int(s.clusterBytes) {
		return kind.Errorf(kind.Corrupt, "the map at offset %d is damaged; only a whole cluster of %d bytes can be written", int64(c)<<s.clusterShift, s.clusterBytes)
	}
	if e.allocated() && pg.delta == v.delta && e.own() && !s.isShared(e.phys()) {
		return s.overwrite(v, sc, pg, c, e, in, p)
	}
	return s.writeFresh(v, sc, pg, c, e, in, p)
}

func (s *Store) isShared(phys uint64) bool {
	if len(s.alloc.shared) == 0 {
		return false
	}
	_, ok := s.alloc.shared[phys]
	return ok
}

// cover returns p widened to whole blocks: the data, where it starts in the cluster
// and the index of its first block. Blocks that p covers in part are completed from
// old, the page that shows the cluster at phys, or from zeros when old is nil.
func (s *Store) cover(sc *scratch, old *page, i int, phys uint64, in int, p []byte) (data []byte, start int, err error) {
	start, end := in&^(blockBytes-1), (in+len(p)+blockBytes-1)&^(blockBytes-1)
	if start == in && end == in+len(p) {
		return p, start, nil
	}
	data = sc.clusterBuf(&s.geometry)[start:end]
	fill := func(b int) error { // b: a block's offset in the cluster
		dst := sc.clusterBuf(&s.geometry)[b : b+blockBytes]
		if old == nil {
			clear(dst)
			return nil
		}
		devOff := int64(phys)<<s.clusterShift + int64(b)
		if err := s.dev.ReadAt(dst, devOff); err != nil {
			return err
		}
		want := old.sums[i*s.clusterBlocks+b>>blockShift]
		if sum := crc32.Checksum(dst, castagnoli); sum != want {
			return badBlock(int64(old.index)<<pageShift+int64(i)<<s.clusterShift+int64(b), sum, want)
		}
		return nil
	}
	if start != in {
		if err := fill(start); err != nil {
			return nil, 0, err
		}
	}
	if last := end - blockBytes; end != in+len(p) && (last != start || start == in) {
		if err := fill(last); err != nil {
			return nil, 0, err
		}
	}
	copy(data[in-start:], p)
	return data, start, nil
}

func sumBlocks(sums []uint32, data []byte) []uint32 {
	sums = sums[:len(data)>>blockShift]
	for i := range sums {
		sums[i] = crc32.Checksum(data[i<<blockShift:(i+1)<<blockShift], castagnoli)
	}
	return sums
}

// overwrite writes in place. The caller holds the cluster's stripe.
func (s *Store) overwrite(v *volume, sc *scratch, pg *page, c uint64, e entry, in int, p []byte) error {
	i := int(c % uint64(s.pageClusters))
	data, start, err := s.cover(sc, pg, i, e.phys(), in, p)
	if err != nil {
		return err
	}
	for {
		s.commit.RLock()
		if pg.open.Load() || pg.load(i)&durableBit == 0 {
			pg.inflight.Add(1)
			s.commit.RUnlock()
			break
		}
		s.commit.RUnlock()
		if err := s.markOpen(pg); err != nil {
			return err
		}
	}
	devOff := int64(e.phys())<<s.clusterShift + int64(start)
	sums := sumBlocks(sc.sums, data)
	werr := s.dev.WriteAt(data, devOff)
	if werr != nil {
		// Each sector is old or new, so what is there now is good. If it cannot be
		// read either the old checksums stay, and reads fail.
		back := sc.clusterBuf(&s.geometry)[start : start+len(data)]
		if err := s.dev.ReadAt(back, devOff); err == nil {
			sums = sumBlocks(sc.sums, back)
		} else {
			sums = sums[:0]
		}
	}
	s.commit.RLock()
	first := start >> blockShift
	copy(pg.sums[i*s.clusterBlocks+first:], sums)
	s.markDirty(pg)
	s.appendSet(v, sc, c, e.phys(), first, sums)
	pg.inflight.Add(-1)
	s.commit.RUnlock()
	return werr
}

// writeFresh writes to a new cluster what c shows, changed by p, and makes c show
// that. The caller holds the cluster's stripe.
func (s *Store) writeFresh(v *volume, sc *scratch, old *page, c uint64, e entry, in int, p []byte) error {
	i := int(c % uint64(s.pageClusters))
	if !e.allocated() {
		old = nil
	}
	data, start, err := s.cover(sc, old, i, e.phys(), in, p)
	if err != nil {
		return err
	}
	phys, zeroed, err := s.allocate(v)
	if err != nil {
		return err
	}
	sums := sc.sums[:s.clusterBlocks]
	first, last := start>>blockShift, (start+len(data))>>blockShift
	sumBlocks(sums[first:last], data)
	if len(data) < int(s.clusterBytes) {
		if data, start, err = s.complete(sc, old, i, e.phys(), sums, data, start, zeroed); err != nil {
			s.unallocate(phys)
			return err
		}
	}
	if err := s.dev.WriteAt(data, int64(phys)<<s.clusterShift+int64(start)); err != nil {
		s.unallocate(phys)
		return err
	}
	s.install(v, sc, c, phys, sums)
	return nil
}

// complete widens data, whose checksums are in sums already, to what must be
// written of a fresh cluster, and fills in the other checksums. Blocks copied from
// the parent keep its checksums unverified: a damaged one stays damaged, and does
// not keep its neighbours from being written.
func (s *Store) complete(sc *scratch, old *page, i int, phys uint64, sums []uint32, data []byte, start int, zeroed bool) ([]byte, int, error) {
	first, last := start>>blockShift, (start+len(data))>>blockShift
	rest := func(b int) uint32 {
		if old == nil {
			return zeroSum
		}
		return old.sums[i*s.clusterBlocks+b]
	}
	for b := range s.clusterBlocks {
		if b < first || b >= last {
			sums[b] = rest(b)
		}
	}
	if old == nil && zeroed {
		return data, start, nil
	}
	buf := sc.clusterBuf(&s.geometry)
	end := start + len(data)
	copy(buf[start:end], data) // a no-op where cover used buf itself
	if old == nil {
		clear(buf[:start])
		clear(buf[end:])
		return buf, 0, nil
	}
	base := int64(phys) << s.clusterShift
	if start > 0 {
		if err := s.dev.ReadAt(buf[:start], base); err != nil {
			return nil, 0, err
		}
	}
	if end < len(buf) {
		if err := s.dev.ReadAt(buf[end:], base+int64(end)); err != nil {
			return nil, 0, err
		}
	}
	return buf, 0, nil
}

// allocate takes a cluster for v, flushing if only that frees some.
func (s *Store) allocate(v *volume) (phys uint64, zeroed bool, err error) {
	if !s.ball.refill() {
		return 0, false, kind.Errorf(kind.NoSpace, "the file system of %s is full", s.o.Dir)
	}
	if err := s.markUnclean(); err != nil {
		return 0, false, err
	}
	for attempt := 0; ; attempt++ {
		phys, zeroed, ok := s.alloc.alloc(v.hint.Load())
		if ok {
			v.hint.Store(phys + 1)
			return phys, zeroed, nil
		}
		if attempt > 0 || s.pendCount.Load() == 0 {
			return 0, false, kind.Errorf(kind.NoSpace, "no free cluster left in pool %s of %d", s.o.Dir, s.totalClusters-1)
		}
		if err := s.flushFor(closing{}); err != nil {
			return 0, false, err
		}
	}
}

// unallocate gives back a cluster that nothing came to name. It may hold a part of
// what was to be written.
func (s *Store) unallocate(phys uint64) { s.giveBack([]extent{{phys, 1}}) }

// install makes cluster c of v show phys. The caller holds the cluster's stripe.
func (s *Store) install(v *volume, sc *scratch, c, phys uint64, sums []uint32) {
	i := int(c % uint64(s.pageClusters))
	s.commit.RLock()
	defer s.commit.RUnlock()
	pg := s.ownPage(v, uint32(c/uint64(s.pageClusters)))
	before := pg.load(i)
	copy(pg.sums[i*s.clusterBlocks:], sums)
	pg.store(i, stateAllocated|ownBit|entry(phys))
	if !(before.allocated() && before.own()) {
		v.allocated.Add(1)
	}
	s.markDirty(pg)
	s.appendSet(v, sc, c, phys, 0, sums)
}

// appendSet writes the redo record of an allocated cluster. The caller holds commit.
func (s *Store) appendSet(v *volume, sc *scratch, c, phys uint64, first int, sums []uint32) {
	if len(sums) == 0 {
		return
	}
	sc.record = appendRedoSet(sc.record[:0], s.seq.Add(1), v.delta.id, c, phys, first, sums)
	s.appendRedo(sc.record)
}

// appendRedo writes a record. When it cannot the change is in memory all the same,
// and only a flush can make it outlive the process: endChange does that.
func (s *Store) appendRedo(record []byte) {
	if err := s.redo.Append(record); err != nil && !s.redoGap.Swap(true) {
		s.log.Warn("lvol redo record not written; flushing instead", "dir", s.o.Dir, "err", err)
	}
}

// Discard tells that the range need not be kept: it reads as zeros, and whole
// clusters are freed.
func (l *Lvol) Discard(offset, lengthBytes int64) error {
	return l.zero("discard", offset, lengthBytes)
}

// WriteZeroes makes the range read as zeros, freeing whole clusters.
func (l *Lvol) WriteZeroes(offset, lengthBytes int64) error {
	return l.zero("zero", offset, lengthBytes)
}

func (l *Lvol) zero(op string, off, length int64) error {
	if err := l.beginChange(op, off, length); err != nil {
		return err
	}
	defer l.leave()
	end := off + length
	if size := l.v.size.Load(); end == size {
		// What lies between the end and the end of its cluster is nobody's.
		end = (end + l.s.clusterBytes - 1) &^ (l.s.clusterBytes - 1)
	}
	if err := l.s.zeroRange(l.v, off, end); err != nil {
		return fmt.Errorf("%s lvol %s: %w", op, l.name(), err)
	}
	return l.s.endChange()
}

// zeroRange makes [off, end) of v read as zeros. The caller holds v.quiesce.
func (s *Store) zeroRange(v *volume, off, end int64) error {
	sc := s.getScratch()
	defer s.scratch.Put(sc)
	mask := s.clusterBytes - 1
	for off < end {
		switch c := uint64(off >> s.clusterShift); {
		case off&mask == 0 && end-off > mask:
			// Whole clusters of one page, as many as one set of locks covers.
			stop := min(end&^mask, (off>>pageShift+1)<<pageShift, off+stripes<<s.clusterShift)
			s.clearClusters(v, sc, c, int((stop-off)>>s.clusterShift))
			off = stop
		default:
			stop := min(end, (off|mask)+1)
			if err := s.zeroPart(v, sc, c, int(off&mask), int(stop-off)); err != nil {
				return err
			}
			off = stop
		}
	}
	return nil
}

// zeroPart writes zeros to a part of a cluster, unless it reads as zeros anyway.
func (s *Store) zeroPart(v *volume, sc *scratch, c uint64, in, length int) error {
	for length > 0 {
		n := min(length, len(zeros))
		v.rlockRange(c, 1)
		var e entry
		if pg := v.root.Load().page(uint32(c / uint64(s.pageClusters))); pg != nil {
			e = pg.load(int(c % uint64(s.pageClusters)))
		}
		v.runlockRange(c, 1)
		if e.state() == stateAbsent || e.state() == stateZeroed {
			return nil // as it was at one moment of this call, which is all a caller can tell
		}
		if err := s.writeCluster(v, sc, c, in, zeros[:n]); err != nil {
			return err
		}
		in, length = in+n, length-n
	}
	return nil
}

// clearClusters makes n whole clusters of one page, n at most stripes, read as
// zeros and frees those that v owns.
func (s *Store) clearClusters(v *volume, sc *scratch, c uint64, n int) {
	pi := uint32(c / uint64(s.pageClusters))
	v.lockRange(c, n)
	defer v.unlockRange(c, n)
	if v.root.Load().page(pi) == nil {
		return
	}
	s.commit.RLock()
	defer s.commit.RUnlock()
	var pg *page
	var freed []extent
	run, runState := 0, entry(0) // the clusters before c+k that changed to runState
	emit := func(k int) {
		if run > 0 {
			sc.record = appendRedoClear(sc.record[:0], s.seq.Add(1), v.delta.id, c+uint64(k-run), uint32(run), runState)
			s.appendRedo(sc.record)
			run = 0
		}
	}
	for k := range n {
		i := int((c + uint64(k)) % uint64(s.pageClusters))
		shown := v.root.Load().page(pi)
		e := shown.load(i)
		own := shown.delta == v.delta && e.own()
		below, _ := v.parentEntry(&s.geometry, c+uint64(k))
		var to entry
		if below.allocated() || below.state() == stateDamaged {
			to = stateZeroed | ownBit
		}
		if e&^durableBit == to || !own && to == 0 {
			emit(k)
			continue
		}
		if pg == nil {
			pg = s.ownPage(v, pi)
			s.markDirty(pg)
		}
		if own && e.allocated() {
			freed = appendExtent(freed, e.phys())
			v.allocated.Add(-1)
		}
		if to.state() != runState {
			emit(k)
		}
		pg.store(i, to)
		run, runState = run+1, to.state()
	}
	emit(n)
	s.freeLater(freed)
}

// freeLater frees clusters at the next flush: until then durable metadata may name
// them. The caller holds commit.
func (s *Store) freeLater(list []extent) {
	if len(list) == 0 {
		return
	}
	s.pendCount.Add(int64(extentClusters(list)))
	s.dirtyMu.Lock()
	s.pending = append(s.pending, list...)
	s.dirtyMu.Unlock()
}
