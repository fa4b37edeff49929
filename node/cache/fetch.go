package cache

import (
	"fmt"
	"math/bits"
	"sync/atomic"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/target/bdev"
)

// maxFetchBytes bounds one remote read. Longer ones save nothing more, and whoever
// joined waits for all of it.
const maxFetchBytes = 1 << 20

// maxTries bounds how often a read waits for others' fetches, or finds what it wanted
// gone again, before it goes to the remote by itself.
const maxTries = 4

// buffer holds what was fetched.
type buffer struct{ b []byte }

// flight is one remote read that is under way, of neighbouring units. Who reads one of
// them meanwhile joins it.
type flight struct {
	done chan struct{} // closed when err and buf are settled
	err  error
	buf  *buffer
	refs atomic.Int32 // of buf: who fetches and who joined
}

// flightRef is one unit of a flight: n bytes at off of its buffer.
type flightRef struct {
	f      *flight
	off, n int
	joined bool // somebody waits for it
}

func newFlight() *flight {
	f := &flight{done: make(chan struct{})}
	f.refs.Store(1)
	return f
}

func (c *Cache) release(f *flight) {
	if f.refs.Add(-1) == 0 && f.buf != nil {
		c.buffers[bits.TrailingZeros(uint(cap(f.buf.b)))].Put(f.buf)
		f.buf = nil
	}
}

// buffer returns one of n bytes, at most maxFetchBytes.
func (c *Cache) buffer(n int) *buffer {
	size := bits.Len(uint(n - 1))
	if b, _ := c.buffers[size].Get().(*buffer); b != nil {
		b.b = b.b[:n]
		return b
	}
	return &buffer{make([]byte, n, 1<<size)}
}

// claim makes f fetch k, want bytes long, unless it is there or being fetched.
func (c *Cache) claim(f *flight, k key, off, want int) bool {
	s := c.shard(k)
	s.mu.Lock()
	defer s.mu.Unlock()
	if i := s.find(k); i != none && int(s.slots[i].sectors)*sector >= want {
		return false
	}
	if _, ok := s.flights[k]; ok {
		return false
	}
	s.flights[k] = flightRef{f: f, off: off, n: want}
	return true
}

func (c *Cache) unclaim(k key) {
	s := c.shard(k)
	s.mu.Lock()
	delete(s.flights, k)
	s.mu.Unlock()
}

// fetch reads what f has claimed, the units keys from start to end, wakes who joined
// and keeps it. Its bytes from first to last are what the caller wants: none is
// read-ahead. The caller's share of f stays.
func (c *Cache) fetch(f *flight, remote bdev.Device, keys []key, start, end int64, first, last int) error {
	f.buf = c.buffer(int(end - start))
	readAhead := first == last
	c.count.fetches.Add(1)
	err := readFull(remote, f.buf.b, start)
	if err != nil {
		c.count.fetchErrors.Add(1)
		f.err = err
		for _, k := range keys { // before anybody is told, so that who tries again does not come back here
			c.unclaim(k)
		}
		close(f.done)
		return err
	}
	c.count.fetchedBytes.Add(uint64(end - start))
	if readAhead {
		c.count.readAheadBytes.Add(uint64(end - start))
	}
	close(f.done)
	rest := f.buf.b
	for i, k := range keys {
		n := min(c.unit, len(rest))
		c.keep(k, rest[:n], max(0, first-i*c.unit), min(n, last-i*c.unit))
		rest = rest[n:]
	}
	return nil
}

// readFull reads all of p or fails.
func readFull(d bdev.Device, p []byte, off int64) error {
	n, err := d.ReadAt(p, off)
	switch {
	case n == len(p):
		return nil
	case err == nil:
		err = kind.Errorf(kind.IO, "only %d bytes of %d arrived", n, len(p))
	}
	return fmt.Errorf("read %d bytes at %d from the remote: %w", len(p), off, err)
}

// keep writes a unit that was fetched to the disk and ends its flight. Its bytes from
// first to last, if any, were read by somebody.
func (c *Cache) keep(k key, data []byte, first, last int) {
	s := c.shard(k)
	if c.paused() {
		c.count.skipped.Add(1)
		c.unclaim(k)
		return
	}
	s.mu.Lock()
	i, ok := s.alloc()
	hasRecord := ok && s.slots[i].has(flagHasRecord)
	s.mu.Unlock()
	if !ok {
		c.count.skipped.Add(1)
		c.unclaim(k)
		return
	}
	if err := c.write(s, i, hasRecord, k, data); err != nil {
		s.giveBack(i, true)
		c.unclaim(k)
		c.pause(err)
		return
	}
	s.mu.Lock()
	flags := flagHasRecord
	switch wanted := first < last; {
	case !wanted && s.flights[k].joined:
		s.count.readAheadUsed += uint64(len(data))
	case !wanted:
		flags |= flagReadAhead
	}
	s.put(i, k, len(data), flags, false)
	if first < last {
		s.use(&s.slots[i], first, last-first)
	}
	delete(s.flights, k)
	s.mu.Unlock()
	if c.pausedUntil.Load() != 0 && c.pausedUntil.Swap(0) != 0 {
		c.log.Info("the node cache keeps blocks again", "dir", c.o.Dir)
	}
}

// write fills slot i, which the caller owns.
func (c *Cache) write(s *shard, i uint32, hasRecord bool, k key, data []byte) error {
	sc := c.scratch.Get().(*scratch)
	defer c.scratch.Put(sc)
	if hasRecord {
		// Without this a process killed between the next two writes would leave data
		// that does not match its record, which looks like a failing disk.
		clear(sc.record)
		if err := c.index.WriteAt(sc.record, c.recordAt(s, i)); err != nil {
			return err
		}
	}
	if err := c.data.WriteAt(data, c.dataAt(s, i)); err != nil {
		return err
	}
	r := record{key: k, bytes: len(data), sums: s.sumsOf(i)}
	sumBlocks(r.sums, data)
	r.encode(sc.record, s.number(i))
	return c.index.WriteAt(sc.record, c.recordAt(s, i))
}

// paused tells whether there is no use in fetching more than a reader wants.
func (c *Cache) paused() bool {
	until := c.pausedUntil.Load()
	return until != 0 && c.o.Now().UnixNano() < until
}

// pause lets the disk alone for a while, with one line in the log until it works again.
func (c *Cache) pause(err error) {
	c.count.diskErrors.Add(1)
	if c.pausedUntil.Swap(c.o.Now().Add(retryInterval).UnixNano()) == 0 {
		c.log.Warn("the node cache passes through: it cannot write; it tries again now and then", "dir", c.o.Dir, "err", err)
	}
}

// read fills p from in bytes into a slot, which has enough of them, and lets go of it.
// False: the slot was bad and is dropped.
func (c *Cache) read(s *shard, t taken, p []byte, in int) bool {
	i := t.slot
	first := in &^ (blockBytes - 1)
	last := min((in+len(p)+blockBytes-1)&^(blockBytes-1), t.valid)
	b := p
	var sc *scratch
	if first != in || last != in+len(p) {
		sc = c.scratch.Get().(*scratch)
		b = sc.unit[:last-first]
	}
	err := c.data.ReadAt(b, c.dataAt(s, i)+int64(first))
	bad := err != nil || !verify(s.sumsOf(i), first>>blockShift, b)
	if sc != nil {
		if !bad {
			copy(p, b[in-first:])
		}
		c.scratch.Put(sc)
	}
	s.release(i, bad)
	if bad {
		c.bad(err)
	}
	return !bad
}

// bad notes a slot that could not be read or did not verify.
func (c *Cache) bad(err error) {
	if err != nil {
		c.count.diskErrors.Add(1)
	} else {
		c.count.badBlocks.Add(1)
		err = kind.Errorf(kind.Corrupt, "a checksum does not match")
	}
	now, last := c.o.Now().UnixNano(), c.lastLoud.Load()
	if (last == 0 || now-last >= int64(loudInterval)) && c.lastLoud.CompareAndSwap(last, now) {
		c.log.Warn("the node cache dropped a bad block and fetches it again; some are expected after a power loss", "dir", c.o.Dir, "err", err,
			"bad", c.count.badBlocks.Load(), "disk_errors", c.count.diskErrors.Load())
	}
}
