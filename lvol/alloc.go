package lvol

import (
	"math/bits"
	"sync"
)

// extent is a run of physical clusters.
type extent struct{ start, n uint64 }

// appendExtent adds cluster c, joining it to the last extent where it can.
func appendExtent(list []extent, c uint64) []extent {
	if k := len(list) - 1; k >= 0 && list[k].start+list[k].n == c {
		list[k].n++
		return list
	}
	return append(list, extent{c, 1})
}

func extentClusters(list []extent) (n uint64) {
	for _, x := range list {
		n += x.n
	}
	return n
}

// allocator is the bitmap of physical clusters, made anew when the pool is opened.
type allocator struct {
	mu    sync.Mutex
	used  []uint64 // guarded by mu: a bit per cluster
	stale []uint64 // guarded by mu: a free cluster whose bit is set may not read as zeros
	total uint64
	free  uint64 // guarded by mu
	next  uint64 // guarded by mu: where the search for a free window goes on
	// noWindow is set when no wholly free window is left, so that a full pool is
	// not searched for one on every allocation. Guarded by mu.
	noWindow bool
	// shared holds clusters that two deltas claim: they are never overwritten in
	// place nor given back. Written only before the store is in use.
	shared map[uint64]struct{}
}

func newAllocator(total uint64) *allocator {
	words := (total + 63) / 64
	a := &allocator{used: make([]uint64, words), stale: make([]uint64, words), total: total, free: total - 1, shared: map[uint64]struct{}{}}
	a.used[0] = 1 // the superblock
	for c := total; c < words*64; c++ {
		a.used[c/64] |= 1 << (c % 64)
	}
	return a
}

// claim marks c used while the store is opened, and tells whether it was free.
func (a *allocator) claim(c uint64) bool {
	w, b := c/64, uint64(1)<<(c%64)
	if a.used[w]&b != 0 {
		a.shared[c] = struct{}{}
		return false
	}
	a.used[w] |= b
	a.free--
	return true
}

// alloc takes a cluster. hint is where the lvol would like it: behind the one it
// wrote last, so that a sequential writer gets a contiguous run. Failing that it
// gets the start of a wholly free window of 64, so that several sequential writers
// do not interleave, and failing that any. zeroed tells that it reads as zeros.
func (a *allocator) alloc(hint uint64) (c uint64, zeroed, ok bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.free == 0 {
		return 0, false, false
	}
	if hint == 0 || hint >= a.total || a.used[hint/64]>>(hint%64)&1 != 0 {
		hint = a.windowLocked()
	}
	w, b := hint/64, uint64(1)<<(hint%64)
	a.used[w] |= b
	a.free--
	zeroed = a.stale[w]&b == 0
	return hint, zeroed, true
}

func (a *allocator) windowLocked() uint64 {
	words := uint64(len(a.used))
	start := a.next / 64
	partial := uint64(0)
	found := false
	for i := range words {
		w := (start + i) % words
		if a.used[w] == 0 {
			a.next = w*64 + 64
			if a.next >= a.total {
				a.next = 0
			}
			return w * 64
		}
		if !found && a.used[w] != ^uint64(0) {
			partial, found = w*64+uint64(bits.TrailingZeros64(^a.used[w])), true
			if a.noWindow {
				break
			}
		}
	}
	// The caller saw free > 0, so some word has a hole. The next search starts
	// there.
	a.noWindow = true
	a.next = partial / 64 * 64
	return partial
}

// release gives extents back; zeroed tells that they read as zeros now.
func (a *allocator) release(list []extent, zeroed bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, x := range list {
		for c := x.start; c < x.start+x.n; c++ {
			w, b := c/64, uint64(1)<<(c%64)
			if a.used[w]&b == 0 {
				panic("lvol: cluster given back twice") // would hand one cluster to two lvols
			}
			a.used[w] &^= b
			a.free++
			if a.used[w] == 0 {
				a.noWindow = false
			}
			if zeroed {
				a.stale[w] &^= b
			} else {
				a.stale[w] |= b
			}
		}
	}
}

// freeExtents lists what is free, at most max extents from cluster start on.
func (a *allocator) freeExtents(start uint64, max int) []extent {
	a.mu.Lock()
	defer a.mu.Unlock()
	var list []extent
	for c := start; c < a.total; {
		w := a.used[c/64] >> (c % 64)
		if w&1 != 0 {
			c += uint64(bits.TrailingZeros64(^w))
			continue
		}
		n := uint64(64 - c%64)
		if w != 0 {
			n = uint64(bits.TrailingZeros64(w))
		}
		n = min(n, a.total-c)
		if k := len(list) - 1; k >= 0 && list[k].start+list[k].n == c {
			list[k].n += n
		} else {
			if len(list) == max {
				return list
			}
			list = append(list, extent{c, n})
		}
		c += n
	}
	return list
}

func (a *allocator) setStale(list []extent, stale bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, x := range list {
		for c := x.start; c < x.start+x.n; c++ {
			if b := uint64(1) << (c % 64); stale {
				a.stale[c/64] |= b
			} else {
				a.stale[c/64] &^= b
			}
		}
	}
}

func (a *allocator) freeClusters() uint64 {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.free
}

func (a *allocator) isUsed(c uint64) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.used[c/64]>>(c%64)&1 != 0
}

// withoutShared splits x around the clusters that two deltas claim.
func (a *allocator) withoutShared(x extent) []extent {
	var out []extent
	for c := x.start; c < x.start+x.n; c++ {
		if _, ok := a.shared[c]; !ok {
			out = appendExtent(out, c)
		}
	}
	return out
}
