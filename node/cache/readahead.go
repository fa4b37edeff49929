package cache

import (
	"sync"
	"sync/atomic"

	"github.com/thaw-project/thaw/kind"
)

const (
	// maxStreams bounds the sequential readers of one device that are told apart.
	maxStreams = 8
	// firstWindow is how far ahead of a new stream is read; it doubles as the reader
	// keeps up.
	firstWindow = 128 << 10
	// aheadChunkBytes is one remote read of read-ahead: 2 ms of a 1 Gbit/s link, which
	// is what a reader that wants something else may have to wait behind it.
	aheadChunkBytes = 256 << 10
	// aheadWorkers bounds what read-ahead has under way on the node: 1 MiB, the
	// bandwidth-delay product of 10 Gbit/s and 0.8 ms.
	aheadWorkers = 4
	// aheadQueue bounds the streams that wait for a worker; more are not read ahead.
	aheadQueue = 64
	// gapBytes is what a sequential reader may skip, or how far back a request may
	// come late: the kernel's own read-ahead keeps two of 128 KiB under way.
	gapBytes = 256 << 10
	// steadyReads is how many reads in sequence make a stream.
	steadyReads = 2
	// staleReads is after how many reads of others in the device a stream has ended.
	staleReads = 4 * maxStreams
)

// stream is a sequential reader of a device, as far as one can tell.
type stream struct {
	next   int64  // where it would go on
	ahead  int64  // read ahead up to here
	window int64  // how far ahead of next to read; 0 while it is none yet
	steady int    // reads in sequence
	used   uint64 // streams.clock at its last read
	queued bool   // waits for a worker
}

// streams are those of a device.
type streams struct {
	mu    sync.Mutex
	clock uint64             // guarded by mu: reads
	list  [maxStreams]stream // guarded by mu
}

// note tells of a read, and returns which stream it belongs to.
func (st *streams) note(d *Device, off, n int64) (stream int) {
	if d.c.o.ReadAheadBytes <= 0 {
		return 0
	}
	st.mu.Lock()
	defer st.mu.Unlock()
	st.clock++
	i := st.match(off, n)
	s := &st.list[i]
	s.used = st.clock
	if end := off + n; end > s.next { // else it came late
		s.next = end
		s.steady++
	}
	return i
}

// push reads on ahead of a stream whose reader wants what is not there, or what
// only read-ahead had brought. What a reader finds that others read before is no reason:
// a second start of an image would, at another pace, fetch what the first did not.
func (st *streams) push(d *Device, i int) {
	limit := d.c.o.ReadAheadBytes
	if limit <= 0 || d.c.paused() {
		return
	}
	st.mu.Lock()
	s := &st.list[i]
	submit := s.steady >= steadyReads && !s.queued && s.ahead-s.next <= s.window/2 && s.next < d.layout.sizeBytes
	if submit {
		s.window = min(max(2*s.window, firstWindow), limit)
		s.queued = true
	}
	st.mu.Unlock()
	if submit && !d.c.pace.submit(d, i) {
		st.unqueue(i)
	}
}

// match returns the stream that a read belongs to, a new one in the place of the
// one that was unused longest if there is none. The caller holds mu.
func (st *streams) match(off, n int64) int {
	oldest := 0
	for i := range st.list {
		s := &st.list[i]
		// A gap may be as long as the read, so that small reads here and there are no
		// stream.
		if s.used != 0 && off >= s.next-gapBytes && off <= s.next+min(n, gapBytes) {
			return i
		}
		if s.used < st.list[oldest].used {
			oldest = i
		}
	}
	st.list[oldest] = stream{next: off, queued: st.list[oldest].queued}
	return oldest
}

func (st *streams) unqueue(i int) {
	st.mu.Lock()
	st.list[i].queued = false
	st.mu.Unlock()
}

// advance takes the next part to read ahead of stream i; false when there is none, or
// its reader has gone.
func (st *streams) advance(i int, sizeBytes int64) (start, end int64, ok bool) {
	st.mu.Lock()
	defer st.mu.Unlock()
	s := &st.list[i]
	start = max(s.ahead, s.next)
	end = min(start+aheadChunkBytes, s.next+s.window, sizeBytes)
	if start >= end || st.clock-s.used > staleReads {
		s.queued = false
		return 0, 0, false
	}
	s.ahead = end
	return start, end, true
}

// end makes stream i start again from nothing.
func (st *streams) end(i int) {
	st.mu.Lock()
	defer st.mu.Unlock()
	s := &st.list[i]
	s.window, s.steady, s.ahead, s.queued = 0, 0, 0, false
}

// pace decides when read-ahead may use the network. It owns the workers.
type pace struct {
	queue chan aheadTask
	quit  chan struct{}
	wg    sync.WaitGroup
	tasks atomic.Int64 // queued or under way

	mu      sync.Mutex
	cond    sync.Cond // of mu
	demands int       // guarded by mu: remote reads under way that a reader waits for
	running int       // guarded by mu: those of read-ahead
	stopped bool      // guarded by mu
}

// aheadTask asks to read ahead of a device's stream.
type aheadTask struct {
	d      *Device
	stream int
}

func (p *pace) start(c *Cache) {
	p.cond.L = &p.mu
	p.queue, p.quit = make(chan aheadTask, aheadQueue), make(chan struct{})
	if c.o.ReadAheadBytes <= 0 {
		return
	}
	for range aheadWorkers {
		p.wg.Go(func() {
			for {
				select {
				case <-p.quit:
					return
				case t := <-p.queue:
					t.d.readAhead(t.stream)
					p.tasks.Add(-1)
				}
			}
		})
	}
}

func (p *pace) stop() {
	p.mu.Lock()
	p.stopped = true
	p.cond.Broadcast()
	p.mu.Unlock()
	close(p.quit)
	p.wg.Wait()
}

// submit queues a stream; false when the queue is full.
func (p *pace) submit(d *Device, stream int) bool {
	p.tasks.Add(1)
	select {
	case p.queue <- aheadTask{d, stream}:
		return true
	default:
		p.tasks.Add(-1)
		return false
	}
}

// demand counts remote reads that somebody waits for.
func (p *pace) demand(by int) {
	p.mu.Lock()
	if p.demands += by; p.demands == 0 {
		p.cond.Broadcast()
	}
	p.mu.Unlock()
}

// leave keeps read-ahead of d from waiting.
func (p *pace) leave(d *Device) {
	p.mu.Lock()
	d.leaving = true
	p.cond.Broadcast()
	p.mu.Unlock()
}

// acquire waits until one more read of read-ahead, for d, may start: while readers wait
// for the network only one may be under way. False when cache or device are closing.
func (p *pace) acquire(d *Device) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	for !p.stopped && !d.leaving && p.running > 0 && (p.demands > 0 || p.running >= aheadWorkers) {
		p.cond.Wait()
	}
	if p.stopped || d.leaving {
		return false
	}
	p.running++
	return true
}

func (p *pace) release() {
	p.mu.Lock()
	p.running--
	p.cond.Broadcast()
	p.mu.Unlock()
}

// readAhead fetches the next part ahead of a stream, and leaves the one after it to the
// next worker.
func (d *Device) readAhead(stream int) {
	if d.enter() != nil {
		d.streams.unqueue(stream)
		return
	}
	defer d.ops.Done()
	start, end, ok := d.streams.advance(stream, d.layout.sizeBytes)
	if !ok {
		return
	}
	if !d.c.pace.submit(d, stream) {
		d.streams.unqueue(stream)
	}
	unit := int64(d.c.unit)
	for at := start &^ (unit - 1); at < end; {
		class, k := d.layout.unit(at)
		if class != classKept || d.c.has(k, int(min(unit, d.layout.sizeBytes-at))) {
			at += unit
			continue
		}
		next, err := d.fetchAhead(at, end)
		if err != nil {
			// Nobody asked for it. Whoever does is told, or tries again.
			d.streams.end(stream)
			return
		}
		at = max(next, at+unit)
	}
}

// has tells whether n bytes of k are there or being fetched.
func (c *Cache) has(k key, n int) bool {
	s := c.shard(k)
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.flights[k]; ok {
		return true
	}
	i := s.find(k)
	return i != none && int(s.slots[i].sectors)*sector >= n
}

// fetchAhead fetches the units that are missing from at on, up to the first that is
// not, and returns where that is.
func (d *Device) fetchAhead(at, stop int64) (int64, error) {
	if !d.c.pace.acquire(d) {
		return at, kind.Errorf(kind.Canceled, "the cached device is closing")
	}
	defer d.c.pace.release()
	f := newFlight()
	defer d.c.release(f)
	keys, end := d.claimMore(f, nil, at, stop)
	if len(keys) == 0 {
		return at, nil
	}
	return end, d.c.fetch(f, d.remote, keys, at, end, 0, 0)
}
