package lvol

import (
	"github.com/thaw-project/thaw/kind"
)

// MaxMapRuns bounds one answer of Store.Map: about 3 MiB of runs.
const MaxMapRuns = 1 << 16

// Run is a range of an lvol whose clusters are alike.
type Run struct {
	OffsetBytes int64 // a multiple of the cluster size
	LengthBytes int64 // likewise, but for the run that ends with the lvol
	// Data is false where nothing is allocated: the run reads as zeros.
	Data bool
	// Owner is the UUID of the snapshot whose delta holds the run's clusters. It is
	// zero for zeros, and for data that some day may change or cannot be read.
	Owner [16]byte
}

// BlockMap is a part of the map of an lvol that nobody can write now.
type BlockMap struct {
	// UUID is the lvol's own. Another lvol that got the same name after this one was
	// deleted has another: parts of two do not make a map.
	UUID         string
	SizeBytes    int64 // of the whole lvol
	ClusterBytes int64
	Runs         []Run // without gaps, from the offset that was asked for
	NextBytes    int64 // where the next part starts; SizeBytes after the last
}

// Map tells, from offset on, who owns which clusters of a snapshot or read-only
// lvol, in at most maxRuns runs (0, or more than MaxMapRuns, is MaxMapRuns). offset
// is a multiple of the cluster size below the lvol's size. kind.Invalid for an lvol
// that can be written.
//
// What holds for ever, over all that can happen to a pool: an owner and an offset
// mean the same bytes, namely those that the snapshot of this UUID has there, up to
// its size. Caches on other machines rely on it. It follows from these:
//
//   - Owners are snapshots. A snapshot has its UUID from the moment it is taken, when
//     its delta was written for the last time; nothing makes it writable again. The
//     lvol that it was taken of keeps its own UUID, never named here, and gets an
//     empty delta. The delta of a read-only lvol is not named either, since
//     SetReadOnly can make it writable.
//   - A cluster has the same offset in every lvol that shows it.
//   - Deleting a snapshot moves its clusters to its one clone. If that is a snapshot
//     too, it becomes the owner, of bytes that it had at these offsets before, and
//     always will; else they have no owner any more. The old owner's UUID is not
//     used again: UUIDs are random, and a new lvol gets a new one, whatever its name.
//   - An lvol that grew shows nothing of its parent beyond the size that it shared:
//     the cluster in which that size lies is written anew if it held anything.
//   - Inflate and Decouple copy into the delta of a writable lvol.
//
// The parts of one map may be asked for one by one while the pool changes: a
// snapshot below may be deleted in between, but each part is true.
func (s *Store) Map(name string, offset int64, maxRuns int) (BlockMap, error) {
	if maxRuns <= 0 || maxRuns > MaxMapRuns {
		maxRuns = MaxMapRuns
	}
	// No structural change happens meanwhile, so the chain and its maps stand still.
	s.admin.Lock()
	defer s.admin.Unlock()
	s.mu.RLock()
	v, closed := s.byName[name], s.closed
	s.mu.RUnlock()
	switch {
	case closed:
		return BlockMap{}, errClosed(s.o.Dir)
	case v == nil:
		return BlockMap{}, kind.Errorf(kind.NotFound, "map: no lvol %.160q", name)
	case v.damage != nil:
		return BlockMap{}, kind.Errorf(kind.Corrupt, "map lvol %s: %w", name, v.damage)
	case !v.snapshot && !v.readOnly && !s.o.ReadOnly:
		return BlockMap{}, kind.Errorf(kind.Invalid, "map lvol %s: it is not read-only", name)
	}
	size := v.size.Load()
	if offset < 0 || offset >= size || offset&(s.clusterBytes-1) != 0 {
		return BlockMap{}, kind.Errorf(kind.Invalid, "map lvol %s at %d: not a multiple of %d below %d", name, offset, s.clusterBytes, size)
	}
	w := mapWalk{s: s, v: v, root: v.root.Load(), max: maxRuns}
	for at := offset; at < size; {
		next, more := w.page(at)
		if !more {
			break
		}
		at = next
	}
	m := BlockMap{UUID: v.uuid.String(), SizeBytes: size, ClusterBytes: s.clusterBytes, Runs: w.runs}
	last := &m.Runs[len(m.Runs)-1]
	last.LengthBytes = min(last.LengthBytes, size-last.OffsetBytes)
	m.NextBytes = last.OffsetBytes + last.LengthBytes
	return m, nil
}

// mapWalk makes the runs of a map.
type mapWalk struct {
	s      *Store
	v      *volume
	root   *root
	max    int
	runs   []Run
	levels []mapLevel // of the page under way
}

// mapLevel is what one lvol of a chain holds itself of a page.
type mapLevel struct {
	v    *volume
	page *page
	end  int64 // what is from here on is not seen from the leaf
}

// page adds the clusters from at to the end of its page, or of its table where that
// is empty. It returns where to go on; false when the runs are used up.
func (w *mapWalk) page(at int64) (next int64, more bool) {
	pi := uint32(at >> pageShift)
	pg := w.root.page(pi)
	if pg == nil {
		next = int64(pi+1) << pageShift
		if ti := int(pi >> tableShift); ti >= len(w.root.tables) || w.root.tables[ti].Load() == nil {
			next = int64(ti+1) << (tableShift + pageShift)
		}
		return next, w.add(Run{OffsetBytes: at, LengthBytes: next - at})
	}
	w.climb(pi)
	next = int64(pi+1) << pageShift
	for end := min(next, w.v.size.Load()); at < end; at += w.s.clusterBytes {
		r := Run{OffsetBytes: at, LengthBytes: w.s.clusterBytes}
		i := int(at>>w.s.clusterShift) & (w.s.pageClusters - 1)
		switch e := pg.load(i); e.state() {
		case stateAllocated:
			r.Data, r.Owner = true, w.owner(i, at, e)
		case stateDamaged:
			r.Data = true // reads fail; nobody else can tell how
		}
		if !w.add(r) {
			return 0, false
		}
	}
	return next, true
}

// climb collects who in the chain owns anything in page pi. The maps in memory do not
// tell: below a snapshot that was deleted they still name its delta.
func (w *mapWalk) climb(pi uint32) {
	w.levels = w.levels[:0]
	end := w.v.size.Load()
	for v := w.v; v != nil; v = v.parent {
		if pg := v.root.Load().page(pi); pg != nil && pg.delta == v.delta {
			w.levels = append(w.levels, mapLevel{v, pg, end})
		}
		end = min(end, v.overlap)
	}
}

// owner returns the UUID of the snapshot that owns cluster i of the page, which lies
// at offset at and is shown as e.
func (w *mapWalk) owner(i int, at int64, e entry) (none uuid) {
	for _, l := range w.levels {
		own := l.page.load(i)
		if at >= l.end || !own.own() {
			continue
		}
		// The first owner on the way up is what the leaf shows. Were it not, the
		// answer would be wrong data in a cache: rather no owner.
		if !l.v.snapshot || !own.allocated() || own.phys() != e.phys() {
			return none
		}
		return l.v.uuid
	}
	return none
}

// add joins r to the last run if they are alike; false when there is no room.
func (w *mapWalk) add(r Run) bool {
	if n := len(w.runs); n > 0 {
		if last := &w.runs[n-1]; last.Data == r.Data && last.Owner == r.Owner {
			last.LengthBytes += r.LengthBytes
			return true
		}
		if n == w.max {
			return false
		}
	}
	w.runs = append(w.runs, r)
	return true
}
