package qcow2

import (
	"math"
	"sync"
	"sync/atomic"

	"github.com/thaw-project/thaw/kind"
)

// maxHostClusters bounds the reference counts held in memory (2 bytes each): 4 TiB of
// file with 64 KiB clusters.
const maxHostClusters = 1 << 26

// growClusters is the step in which the file gets longer. A cluster must lie inside
// the file whole, and setting the length is a journal transaction.
const growClusters = 16

// clusterRun is a run of host clusters.
type clusterRun struct{ first, n int64 }

// allocator hands out host clusters. The counts in memory are those that the tables
// justify; what the file says is rewritten from them.
type allocator struct {
	file        file
	clusterBits uint

	fileBytes atomic.Int64 // length of the file; changed under mu

	mu      sync.Mutex
	refs    []uint16   // guarded by mu: references by host cluster; none behind the end
	free    int64      // guarded by mu: how many of refs are 0
	hint    int64      // guarded by mu: none of refs below is 0
	touched clusterRun // guarded by mu: covers the counts that changed since takeTouched
}

// adopt takes over counts and prepares for allocation.
func (a *allocator) adopt(refs []uint16) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.refs, a.free, a.hint = refs, 0, int64(len(refs))
	for c := len(refs) - 1; c >= 0; c-- {
		if refs[c] == 0 {
			a.free++
			a.hint = int64(c)
		}
	}
	a.touched = clusterRun{0, int64(len(refs))}
}

// trim cuts off what lies behind the last counted cluster: nothing refers to it.
func (a *allocator) trim() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	n := int64(len(a.refs))
	for n > 0 && a.refs[n-1] == 0 {
		n--
		a.free--
	}
	a.refs = a.refs[:n]
	a.hint = min(a.hint, n)
	if end := n << a.clusterBits; end != a.fileBytes.Load() {
		if err := a.file.Truncate(end); err != nil {
			return err
		}
		a.fileBytes.Store(end)
	}
	return nil
}

// alloc takes up to want clusters that lie next to each other. fresh tells that they
// were never used since the file was last trimmed, so that they read as zeros.
func (a *allocator) alloc(want int64) (r clusterRun, fresh bool, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.free > 0 {
		c := a.hint
		for a.refs[c] != 0 {
			c++
		}
		r.first = c
		for ; r.n < want && c < int64(len(a.refs)) && a.refs[c] == 0; c++ {
			a.refs[c] = 1
			r.n++
		}
		a.free -= r.n
		a.hint = c
		a.touch(r)
		return r, false, nil
	}
	r, err = a.extend(want)
	return r, true, err
}

// allocEnd takes exactly n clusters at the end of the file.
func (a *allocator) allocEnd(n int64) (clusterRun, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.extend(n)
}

func (a *allocator) extend(n int64) (clusterRun, error) {
	r := clusterRun{int64(len(a.refs)), n}
	end := r.first + r.n
	if end > maxHostClusters || end<<a.clusterBits > maxHostBytes {
		return clusterRun{}, kind.Errorf(kind.NoSpace, "the file would have %d clusters", end)
	}
	if need := end << a.clusterBits; need > a.fileBytes.Load() {
		need += growClusters << a.clusterBits
		if err := a.file.Truncate(need); err != nil {
			return clusterRun{}, err
		}
		a.fileBytes.Store(need)
	}
	if a.hint == r.first {
		a.hint = end
	}
	for range n {
		a.refs = append(a.refs, 1)
	}
	a.touch(r)
	return r, nil
}

// release gives back clusters that no table on disk or in memory refers to.
func (a *allocator) release(r clusterRun) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for c := r.first; c < r.first+r.n; c++ {
		a.refs[c]--
		if a.refs[c] == 0 {
			a.free++
			a.hint = min(a.hint, c)
		}
	}
	a.touch(r)
}

// count is the reference count of a cluster.
func (a *allocator) count(c int64) uint16 {
	a.mu.Lock()
	defer a.mu.Unlock()
	if c >= int64(len(a.refs)) {
		return 0
	}
	return a.refs[c]
}

func (a *allocator) touch(r clusterRun) {
	if a.touched.n == 0 {
		a.touched = r
		return
	}
	first := min(a.touched.first, r.first)
	end := max(a.touched.first+a.touched.n, r.first+r.n)
	a.touched = clusterRun{first, end - first}
}

// takeTouched returns a run that covers all counts changed since it was last called.
func (a *allocator) takeTouched() clusterRun {
	a.mu.Lock()
	defer a.mu.Unlock()
	r := a.touched
	a.touched = clusterRun{}
	return r
}

// touchAgain takes back takeTouched.
func (a *allocator) touchAgain(r clusterRun) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if r.n > 0 {
		a.touch(r)
	}
}

// reference adds one to a count; it reports false when the count is full.
func reference(refs []uint16, c int64) bool {
	if refs[c] == math.MaxUint16 {
		return false
	}
	refs[c]++
	return true
}

// epoch tells when the accesses that may still use a freed cluster are over, without
// anyone waiting: an access enters before it looks at the tables and leaves after its
// last read or write of the file. What was unlinked in generation g may be reused once
// every access of g and before has left.
type epoch struct {
	generation atomic.Uint64
	active     [2]struct {
		n atomic.Int64
		_ [56]byte // keeps the two counters in different cache lines
	}
}

func (e *epoch) enter() uint64 {
	for {
		g := e.generation.Load()
		e.active[g&1].n.Add(1)
		if e.generation.Load() == g {
			return g
		}
		e.active[g&1].n.Add(-1)
	}
}

func (e *epoch) leave(g uint64) { e.active[g&1].n.Add(-1) }

// advance starts a new generation if the one before the present is over. Calls must
// not run concurrently.
func (e *epoch) advance() {
	g := e.generation.Load()
	if e.active[(g+1)&1].n.Load() == 0 {
		e.generation.Store(g + 1)
	}
}

// over tells whether all accesses of generation g and before have left.
func (e *epoch) over(g uint64) bool {
	now := e.generation.Load()
	return now >= g+2 || now == g+1 && e.active[g&1].n.Load() == 0
}

// spans lets one operation at a time change the mapping of a guest cluster.
type spans struct {
	mu    sync.Mutex
	freed sync.Cond
	owned []clusterRun // guarded by mu; as many as operations run
}

func (s *spans) own(r clusterRun) {
	s.mu.Lock()
	for s.overlaps(r) {
		s.freed.Wait()
	}
	s.owned = append(s.owned, r)
	s.mu.Unlock()
}

func (s *spans) overlaps(r clusterRun) bool {
	for _, o := range s.owned {
		if r.first < o.first+o.n && o.first < r.first+r.n {
			return true
		}
	}
	return false
}

func (s *spans) disown(r clusterRun) {
	s.mu.Lock()
	for k, o := range s.owned {
		if o == r {
			s.owned[k] = s.owned[len(s.owned)-1]
			s.owned = s.owned[:len(s.owned)-1]
			break
		}
	}
	s.mu.Unlock()
	s.freed.Broadcast()
}
