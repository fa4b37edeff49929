package lvol

import (
	"sort"
	"sync"
	"sync/atomic"
	"time"
)

// stripes is how many locks the clusters of an lvol share. More than 64 gains
// nothing: the lock is held for one device access, and the two or three writers a
// disk sees at once seldom meet.
const stripes = 64

// volume is an lvol in memory, open or not.
type volume struct {
	id      uint64
	uuid    uuid
	created int64 // Unix nanoseconds
	// damage, if set, is why the lvol cannot be used. Fixed when the pool is opened.
	damage error

	name     string             // guarded by Store.mu
	parent   *volume            // changed under Store.mu and quiesce
	clones   map[uint64]*volume // guarded by Store.mu: by id
	snapshot bool               // guarded by Store.mu
	readOnly bool               // guarded by Store.mu
	handles  int                // guarded by Store.mu
	busy     string             // guarded by Store.mu: the long operation under way, which others must not cross
	leaving  bool               // guarded by Store.mu: may not be opened now
	overlap  int64              // changed under Store.mu and quiesce: below it what the delta lacks is the parent's

	// quiesce is shared by I/O and taken by structural changes.
	quiesce sync.RWMutex
	delta   *delta // changed under quiesce
	deleted bool   // changed under quiesce
	size    atomic.Int64
	root    atomic.Pointer[root]
	mapMu   sync.Mutex // guards making tables and pages of root

	allocated atomic.Int64  // clusters that delta owns
	hint      atomic.Uint64 // where the next cluster would best lie
	locks     [stripes]sync.RWMutex
}

// lockRange locks the stripes of n clusters from c, n at most stripes, in ascending
// order of stripe.
func (v *volume) lockRange(c uint64, n int) {
	first := int(c % stripes)
	for i := 0; i < first+n-stripes; i++ { // the part that wraps around
		v.locks[i].Lock()
	}
	for i := first; i < min(first+n, stripes); i++ {
		v.locks[i].Lock()
	}
}

func (v *volume) unlockRange(c uint64, n int) {
	first := int(c % stripes)
	for i := 0; i < first+n-stripes; i++ {
		v.locks[i].Unlock()
	}
	for i := first; i < min(first+n, stripes); i++ {
		v.locks[i].Unlock()
	}
}

func (v *volume) rlockRange(c uint64, n int) {
	first := int(c % stripes)
	for i := 0; i < first+n-stripes; i++ {
		v.locks[i].RLock()
	}
	for i := first; i < min(first+n, stripes); i++ {
		v.locks[i].RLock()
	}
}

func (v *volume) runlockRange(c uint64, n int) {
	first := int(c % stripes)
	for i := 0; i < first+n-stripes; i++ {
		v.locks[i].RUnlock()
	}
	for i := first; i < min(first+n, stripes); i++ {
		v.locks[i].RUnlock()
	}
}

// recordLocked is what meta.db should hold of v. The caller holds Store.mu or
// Store.admin, under which alone these fields change.
func (v *volume) recordLocked() record {
	r := record{
		name: v.name, uuid: v.uuid, size: v.size.Load(), delta: v.delta.id, overlap: v.overlap,
		created: v.created, snapshot: v.snapshot, readOnly: v.readOnly,
	}
	if v.parent != nil {
		r.parent = v.parent.id
	}
	return r
}

// infoLocked describes v. The caller holds Store.mu.
func (v *volume) infoLocked(g *geometry) Info {
	i := Info{
		Name:              v.name,
		UUID:              v.uuid.String(),
		SizeBytes:         v.size.Load(),
		AllocatedClusters: v.allocated.Load(),
		ClusterBytes:      g.clusterBytes,
		Snapshot:          v.snapshot,
		ReadOnly:          v.snapshot || v.readOnly,
		Created:           time.Unix(0, v.created),
		Open:              v.handles > 0,
	}
	if v.parent != nil {
		i.Parent = v.parent.name
	}
	for _, c := range v.clones {
		i.Clones = append(i.Clones, c.name)
	}
	sort.Strings(i.Clones)
	if v.damage != nil {
		i.Damage = v.damage.Error()
	}
	return i
}

// parentEntry is what v would show of cluster c without its own delta. The caller
// holds v.quiesce.
func (v *volume) parentEntry(g *geometry, c uint64) (entry, *page) {
	if v.parent == nil || int64(c)<<g.clusterShift >= v.overlap {
		return 0, nil
	}
	pg := v.parent.root.Load().page(uint32(c / uint64(g.pageClusters)))
	if pg == nil {
		return 0, nil
	}
	return pg.load(int(c % uint64(g.pageClusters))), pg
}
