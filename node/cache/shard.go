package cache

import (
	"math/bits"
	"sync"
)

// State of a slot.
const (
	slotFree    uint8 = iota // in the free list, or owned by whoever took it off
	slotValid                // in table and a queue
	slotDropped              // in a queue only: not to be used again for its key
)

// Flags of a slot.
const (
	flagMain       uint8 = 1 << iota // in the main queue
	flagReadAhead                    // nobody asked for it yet
	flagHasRecord                    // its record on disk may be believed
	flagStateShift = 4
)

// none is no slot.
const none = ^uint32(0)

// slot is what the index knows of one. 32 bytes, of which a cache of 10 GiB has
// 327,680, without pointers so that the collector does not look at them.
type slot struct {
	key     key
	next    uint32 // in its bucket
	link    uint32 // in its queue or the free list
	sectors uint16 // of 512 bytes that it holds
	readers uint16 // not to be reused while there are any
	// read is which sixteenths of the unit were read since the last use was counted.
	read uint16
	uses uint8 // beyond the first, at most maxUses
	bits uint8 // flags, and the state above them
}

func (s *slot) state() uint8      { return s.bits >> flagStateShift }
func (s *slot) setState(st uint8) { s.bits = s.bits&(1<<flagStateShift-1) | st<<flagStateShift }
func (s *slot) has(f uint8) bool  { return s.bits&f != 0 }

// maxUses bounds what a slot's popularity is worth: that many rounds of the main queue
// without a further use.
const maxUses = 3

// maxReaders bounds readers of one slot; more are served from the network.
const maxReaders = 1<<16 - 1

// maxEvictSteps bounds how long the lock is held to find a victim. Half of them respect
// popularity.
const maxEvictSteps = 128

// fifo is a queue of slots linked through slot.link.
type fifo struct{ head, tail, n uint32 }

// manyShards is how many shards a cache has that is not small: more than the cores that
// read from it at once, so that they seldom meet.
const manyShards = 16

// groupUnits is how many neighbouring units go to one shard, and how many neighbouring
// slots on disk: what is read in sequence lies in sequence.
const groupUnits = 32

// shard is a part of the slots with what is in them. Its arrays have an element per
// slot; see number.
type shard struct {
	nth, of uint32 // of how many
	blocks  int    // checksums of a slot
	unit    int    // bytes of a slot
	// sums holds the checksums of all slots. Written only while the slot is neither
	// in the table nor read.
	sums []uint32

	mu    sync.Mutex
	slots []slot   // guarded by mu
	heads []uint32 // guarded by mu: buckets, a power of two
	free  fifo     // guarded by mu
	// fresh is the first slot that was never in a list: those from there on cost no
	// memory until the cache grows into them.
	fresh   uint32            // guarded by mu
	small   fifo              // guarded by mu
	main    fifo              // guarded by mu
	ghosts  []uint32          // guarded by mu: fingerprints of what left the small queue unused; 0 is none
	flights map[key]flightRef // guarded by mu: what is being fetched
	count   shardCount        // guarded by mu
}

// shardCount is a shard's share of Stat.
type shardCount struct {
	valid                         int64 // slots
	bytes                         int64 // in them
	hits, hitBytes                uint64
	readAheadUsed, readAheadWaste uint64 // bytes
	evictions                     uint64
}

// newShard makes the nth of so many shards, with n slots that hold nothing.
func newShard(nth, of, n uint32, unitBytes int) *shard {
	s := &shard{
		nth: nth, of: of, unit: unitBytes, blocks: unitBytes >> blockShift, slots: make([]slot, n),
		heads: make([]uint32, 1<<bits.Len32(n-1)), ghosts: make([]uint32, n),
		flights: map[key]flightRef{},
	}
	s.sums = make([]uint32, int(n)*s.blocks)
	for i := range s.heads {
		s.heads[i] = none
	}
	return s
}

// mix spreads a key: hi is as good as random, lo counts up from something as good.
func mix(k key) uint64 {
	h := (k.hi ^ k.lo) * 0x9e3779b97f4a7c15
	return h ^ h>>29
}

func (s *shard) bucket(k key) *uint32 { return &s.heads[mix(k)&uint64(len(s.heads)-1)] }

// number is the number on disk of the shard's slot i.
func (s *shard) number(i uint32) uint32 {
	return (i/groupUnits*s.of+s.nth)*groupUnits + i%groupUnits
}

func (s *shard) sumsOf(i uint32) []uint32 {
	return s.sums[int(i)*s.blocks : (int(i)+1)*s.blocks]
}

// find returns the slot of k, or none. The caller holds mu.
func (s *shard) find(k key) uint32 {
	i := *s.bucket(k)
	for i != none && s.slots[i].key != k {
		i = s.slots[i].next
	}
	return i
}

// taken is a slot that is pinned for a read.
type taken struct {
	slot  uint32
	valid int  // bytes that it has
	ahead bool // it was read ahead, and this is the first to ask for it
}

// take finds k and pins its slot for a read of n bytes at in; false when it is not there
// or has less. The caller holds mu.
func (s *shard) take(k key, in, n int) (taken, bool) {
	i := s.find(k)
	if i == none {
		return taken{}, false
	}
	e := &s.slots[i]
	t := taken{slot: i, valid: int(e.sectors) * sector, ahead: e.has(flagReadAhead)}
	if in+n > t.valid || e.readers == maxReaders {
		return taken{}, false
	}
	e.readers++
	s.use(e, in, n)
	s.count.hits++
	s.count.hitBytes += uint64(n)
	return t, true
}

// use notes a read. Only a second read of the same bytes is a use: see the package
// documentation.
func (s *shard) use(e *slot, in, n int) {
	if e.has(flagReadAhead) {
		e.bits &^= flagReadAhead
		s.count.readAheadUsed += uint64(e.sectors) * sector
	}
	sixteenth := s.unit / 16
	first, last := in/sixteenth, (in+n-1)/sixteenth
	read := uint16(1<<(last-first+1)-1) << first
	if e.read&read == 0 {
		e.read |= read
		return
	}
	e.read = read
	if e.uses < maxUses {
		e.uses++
	}
}

// release ends a read; bad takes the slot out of use.
func (s *shard) release(i uint32, bad bool) {
	s.mu.Lock()
	s.slots[i].readers--
	if bad && s.slots[i].state() == slotValid {
		s.drop(i)
	}
	s.mu.Unlock()
}

// drop takes a valid slot out of the table; its queue frees it in time. The caller
// holds mu.
func (s *shard) drop(i uint32) {
	s.unlist(i)
	s.slots[i].setState(slotDropped)
}

// unlist takes a valid slot out of the table. The caller holds mu.
func (s *shard) unlist(i uint32) {
	e := &s.slots[i]
	at := s.bucket(e.key)
	for *at != i {
		at = &s.slots[*at].next
	}
	*at = e.next
	s.count.valid--
	s.count.bytes -= int64(e.sectors) * sector
	if e.has(flagReadAhead) {
		s.count.readAheadWaste += uint64(e.sectors) * sector
	}
}

// put makes slot i, which the caller owns and has written, hold k. What k had before
// is dropped. The caller holds mu.
func (s *shard) put(i uint32, k key, bytes int, flags uint8, toMain bool) {
	if old := s.find(k); old != none {
		s.drop(old)
	}
	e := &s.slots[i]
	*e = slot{key: k, next: *s.bucket(k), sectors: uint16(bytes / sector), bits: flags}
	*s.bucket(k) = i
	e.setState(slotValid)
	if g := s.ghost(k); *g == fingerprint(k) {
		*g = 0
		toMain = true
	}
	if toMain {
		e.bits |= flagMain
		s.push(&s.main, i)
	} else {
		s.push(&s.small, i)
	}
	s.count.valid++
	s.count.bytes += int64(bytes)
}

// ghost is where k is remembered when it leaves the small queue: one place per key,
// which another may take over, so a part is forgotten early. The caller holds mu.
func (s *shard) ghost(k key) *uint32 { return &s.ghosts[mix(k)>>32%uint64(len(s.ghosts))] }

// fingerprint is k for a ghost; a wrong one costs a place in the wrong queue.
func fingerprint(k key) uint32 { return uint32(k.lo*0x9e3779b97f4a7c15>>32) | 1 }

// push appends i to a queue. The caller holds mu.
func (s *shard) push(q *fifo, i uint32) {
	s.slots[i].link = none
	if q.n == 0 {
		q.head = i
	} else {
		s.slots[q.tail].link = i
	}
	q.tail = i
	q.n++
}

// pop takes the oldest off a queue that is not empty. The caller holds mu.
func (s *shard) pop(q *fifo) uint32 {
	i := q.head
	q.head = s.slots[i].link
	q.n--
	return i
}

// alloc returns a slot that is in no list, evicting if there is no free one; false if
// none can be had, because reads hold them or others fill them. The caller holds mu.
func (s *shard) alloc() (uint32, bool) {
	if s.free.n > 0 {
		return s.pop(&s.free), true
	}
	if s.fresh < uint32(len(s.slots)) {
		s.fresh++
		return s.fresh - 1, true
	}
	return s.evict()
}

// evict is alloc without free slots. The caller holds mu.
func (s *shard) evict() (uint32, bool) {
	// A tenth for what is new, as S3-FIFO has it.
	smallTarget := max(1, uint32(len(s.slots))/10)
	for step := range maxEvictSteps {
		fromSmall := s.small.n > 0 && (s.small.n >= smallTarget || s.main.n == 0)
		var i uint32
		switch {
		case fromSmall:
			i = s.pop(&s.small)
		case s.main.n > 0:
			i = s.pop(&s.main)
		default:
			return none, false
		}
		e := &s.slots[i]
		wanted := e.state() == slotValid && e.uses > 0 && step < maxEvictSteps/2
		switch {
		case e.readers == 0 && !wanted:
			if e.state() == slotValid {
				if fromSmall {
					*s.ghost(e.key) = fingerprint(e.key)
				}
				s.unlist(i)
				s.count.evictions++
			}
			e.bits &= flagHasRecord
			return i, true
		case fromSmall:
			e.uses = 0
			e.bits |= flagMain
		case e.uses > 0:
			e.uses--
		}
		s.push(&s.main, i)
	}
	return none, false
}

// giveBack frees a slot that alloc returned.
func (s *shard) giveBack(i uint32, hasRecord bool) {
	s.mu.Lock()
	s.slots[i] = slot{}
	if hasRecord {
		s.slots[i].bits = flagHasRecord
	}
	s.push(&s.free, i)
	s.mu.Unlock()
}
