package qcow2

import (
	"math/bits"
	"sync"
	"sync/atomic"
)

// DefaultCacheBytes is the part of the L2 tables that an image keeps in memory unless
// told otherwise.
const DefaultCacheBytes = 1 << 20

const (
	// sliceBytes is the unit of caching: a piece of an L2 table, as small as the
	// kernel's page, because a whole table of 64 KiB is mostly not asked for.
	sliceBytes = 4096
	// minCacheSlices keeps the clock turning when many accesses pin at once.
	minCacheSlices = 16
	// maxDirtySlices bounds what a checkpoint writes and a killed writer leaves to
	// replay, whatever the cache's size.
	maxDirtySlices = 1024
)

// slice is a cached piece of an L2 table.
type slice struct {
	number  int64         // entries of it before this slice; set under cache.mu
	entries []uint64      // decoded; read and written atomically
	loaded  chan struct{} // closed when entries or err are set
	err     error         // why loading failed; then the slice is not in the map
	ready   atomic.Bool   // entries are valid
	used    atomic.Bool   // since the clock's hand last passed
	pins    int           // guarded by cache.mu: users that forbid eviction
	dirty   bool          // guarded by Image.metaMu: differs from the file; holds a pin
}

// cache holds slices, evicting by the clock algorithm.
type cache struct {
	entryBits uint // logarithm of the entries in a slice
	capacity  int  // slices; exceeded only while that many are pinned

	mu     sync.RWMutex
	slices map[int64]*slice // guarded by mu
	ring   []*slice         // guarded by mu: all slices of the map, in no order
	hand   int              // guarded by mu
}

func newCache(clusterBits uint, cacheBytes int) *cache {
	entryBits := min(clusterBits-3, uint(bits.TrailingZeros(sliceBytes/8)))
	return &cache{
		entryBits: entryBits,
		capacity:  max(cacheBytes>>(entryBits+3), minCacheSlices),
		slices:    map[int64]*slice{},
	}
}

// dirtyLimit is how many slices may be dirty before writers make a checkpoint.
func (c *cache) dirtyLimit() int { return min(c.capacity/2, maxDirtySlices) }

// run returns the entry of a guest cluster and how many clusters from it on, at most
// limit, continue it: unallocated, zero, or data next to each other in the file. It
// reports false when the slice is not in memory.
func (c *cache) run(cluster, limit int64, clusterBytes uint64) (entry uint64, n int64, ok bool) {
	c.mu.RLock()
	s := c.slices[cluster>>c.entryBits]
	if s == nil || !s.ready.Load() {
		c.mu.RUnlock()
		return 0, 0, false
	}
	if !s.used.Load() {
		s.used.Store(true)
	}
	entry, n = s.run(cluster&(1<<c.entryBits-1), limit, clusterBytes)
	c.mu.RUnlock()
	return entry, n, true
}

func (s *slice) run(index, limit int64, clusterBytes uint64) (entry uint64, n int64) {
	entry = atomic.LoadUint64(&s.entries[index])
	limit = min(limit, int64(len(s.entries))-index)
	if entry&entryCompressed != 0 {
		return entry, 1
	}
	step := clusterBytes
	if entry == 0 || entry&entryZero != 0 {
		step = 0
	}
	for n = 1; n < limit; n++ {
		e := atomic.LoadUint64(&s.entries[index+n])
		if e != entry+uint64(n)*step {
			break
		}
	}
	return entry, n
}

// pin returns a slice and keeps it in memory until unpin. It calls fill when the slice
// is not there, once however many callers ask.
func (c *cache) pin(number int64, fill func(number int64, entries []uint64) error) (*slice, error) {
	c.mu.Lock()
	s := c.slices[number]
	if s != nil {
		s.pins++
		c.mu.Unlock()
		<-s.loaded
		if s.err != nil {
			return nil, s.err // it left the map; its pins no longer matter
		}
		s.used.Store(true)
		return s, nil
	}
	s = c.take()
	s.number, s.pins = number, 1
	s.loaded = make(chan struct{})
	c.slices[number] = s
	c.mu.Unlock()

	err := fill(number, s.entries)
	if err != nil {
		c.mu.Lock()
		delete(c.slices, number)
		for k := range c.ring {
			if c.ring[k] == s {
				c.drop(k)
				break
			}
		}
		c.mu.Unlock()
		s.err = err
		close(s.loaded)
		return nil, err
	}
	s.used.Store(true)
	s.ready.Store(true)
	close(s.loaded)
	return s, nil
}

func (c *cache) unpin(s *slice) {
	c.mu.Lock()
	s.pins--
	c.mu.Unlock()
}

// peek returns a slice only if it is in memory.
func (c *cache) peek(number int64) *slice {
	c.mu.RLock()
	defer c.mu.RUnlock()
	if s := c.slices[number]; s != nil && s.ready.Load() {
		return s
	}
	return nil
}

// take returns a slice in the ring for a new tenant. mu is held for writing, so no
// reader is inside a slice that is taken from its tenant.
func (c *cache) take() *slice {
	for turns := 2 * len(c.ring); turns > 0 && len(c.ring) >= c.capacity; turns-- {
		if c.hand >= len(c.ring) {
			c.hand = 0
		}
		s := c.ring[c.hand]
		if s.pins > 0 || s.used.Swap(false) {
			c.hand++
			continue
		}
		delete(c.slices, s.number)
		if len(c.ring) > c.capacity {
			c.drop(c.hand) // an earlier crowd of pins is over
			continue
		}
		s.ready.Store(false)
		c.hand++
		return s
	}
	s := &slice{entries: make([]uint64, 1<<c.entryBits)}
	c.ring = append(c.ring, s)
	return s
}

func (c *cache) drop(k int) {
	last := len(c.ring) - 1
	c.ring[k] = c.ring[last]
	c.ring[last] = nil
	c.ring = c.ring[:last]
}
