package engine

import (
	"runtime"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// SlowAfter is from what wait on a request is better handed to another goroutine:
// handing over costs a few microseconds of CPU on both sides, and is made up for when
// the device waits for longer.
const SlowAfter = 50 * time.Microsecond

const (
	// sampleEvery is how many requests there are for one that is measured.
	sampleEvery = 8
	// A sample that waited adds a vote, any other takes one away. What is slow is so by
	// majority: on a busy machine a thread loses its CPU, or the runtime's leave to
	// run, now and then, and that says nothing of the device.
	mostVotes = 16
	slowVotes = mostVotes / 2
)

// Cost learns whether requests of one kind make a device wait: for a disk, a
// network, a lock. Time in which the CPU works for them does not count, since
// another goroutine would need it as well. The zero value knows nothing. All methods
// may be called concurrently.
type Cost struct {
	votes atomic.Int32 // and one, from 1 to mostVotes; 0 when nothing is known
	tick  atomic.Uint32
}

// Known tells whether anything was measured.
func (c *Cost) Known() bool { return c.votes.Load() != 0 }

// Slow tells whether most requests wait for longer than SlowAfter.
func (c *Cost) Slow() bool { return c.votes.Load() > slowVotes }

// Start begins a request that the calling goroutine carries out, and Stop of what it
// returns ends it. Now and then that is measured.
func (c *Cost) Start() Watch {
	if c.tick.Add(1)%sampleEvery != 1 && c.Known() {
		return Watch{}
	}
	// What the thread waited is only known while the goroutine stays on it.
	runtime.LockOSThread()
	return Watch{c: c, waits: waits(), start: time.Now()}
}

// Watch is a request under way. The zero value measures nothing.
type Watch struct {
	c     *Cost
	waits int64
	start time.Time
}

// Stop ends the request, on the goroutine that began it.
func (w Watch) Stop() {
	if w.c == nil {
		return
	}
	// A thread that never left the CPU of its own will worked all the time.
	slow := time.Since(w.start) > SlowAfter && waits() != w.waits
	runtime.UnlockOSThread()
	w.c.vote(slow)
}

// waits is how often the calling thread has gone to sleep.
func waits() int64 {
	var u unix.Rusage
	if unix.Getrusage(unix.RUSAGE_THREAD, &u) != nil {
		return 0
	}
	return u.Nvcsw
}

// vote counts a sample; the first decides alone. A vote lost between two goroutines does
// no harm.
func (c *Cost) vote(slow bool) {
	n := c.votes.Load()
	switch {
	case n == 0 && slow:
		n = slowVotes + 1
	case slow:
		n = min(n+1, mostVotes)
	default:
		n = max(n-1, 1)
	}
	c.votes.Store(n)
}
