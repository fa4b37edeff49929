package sockio

import (
	"runtime"
	"sync/atomic"
	"time"
)

const (
	// pollMax is how long one poll lasts at most: what a peer on the same machine takes
	// for its next request, and no more than what sleeping and waking costs.
	pollMax = 50 * time.Microsecond

	// A poll that found something adds one to the credit, one that did not takes
	// missCost. With credit every wait is polled, so polls go on while two of three
	// succeed.
	maxCredit = 16
	missCost  = 2

	// Without credit one wait in probeEvery is polled to see whether it would help now,
	// as long as waits are shorter than probeWithin: polling makes waits shorter
	// that seem too long for it. A tenth of a percent of a CPU for a peer that sends
	// a request a millisecond.
	probeEvery  = 32
	probeWithin = time.Millisecond

	// awakeMax is for how long a goroutine goes on without having slept. The scheduler
	// looks at sockets when it finds nothing else to run, and a goroutine that polls
	// is something: where all CPUs are busy like that, others would wait for the
	// 10 ms after which the runtime looks anyway.
	awakeMax = 500 * time.Microsecond
)

// polling is how many Pollers of the process poll now. A goroutine that polls keeps the
// scheduler from looking at other sockets meanwhile, so there is one at most, or where
// there are many CPUs one for every second of them.
var polling atomic.Int32

func maxPolling() int32 { return int32(max(1, runtime.GOMAXPROCS(0)/2)) }

// Poller decides whether to poll before a goroutine sleeps. The zero value is ready. One
// goroutine may use it.
type Poller struct {
	credit  int
	skipped int
	since   time.Time // the start of the present wait, zero if there is none
	slept   time.Time // when it last was to sleep
	last    time.Duration
}

// Wait is called each time try found nothing. It returns true once try did, and false
// when the goroutine should sleep.
func (p *Poller) Wait(try func() bool) bool {
	if !p.since.IsZero() {
		return false // it slept already, and woke for nothing
	}
	p.since = time.Now()
	if !p.should() {
		p.slept = p.since
		return false
	}
	defer polling.Add(-1)
	for {
		runtime.Gosched() // others first: what they do may be what the peer waits for
		if try() {
			p.credit = min(p.credit+1, maxCredit)
			p.Done()
			return true
		}
		if time.Since(p.since) > pollMax {
			p.credit = max(p.credit-missCost, 0)
			p.slept = p.since
			return false
		}
	}
}

// should tells whether to poll in the wait that begins, and counts that in polling.
func (p *Poller) should() bool {
	switch {
	case p.since.Sub(p.slept) > awakeMax && !p.slept.IsZero():
		return false
	case p.credit == 0 && p.last > probeWithin:
		return false
	case p.credit == 0:
		if p.skipped++; p.skipped < probeEvery {
			return false
		}
	}
	p.skipped = 0
	if polling.Add(1) > maxPolling() {
		polling.Add(-1)
		return false
	}
	return true
}

// Done ends a wait: try found something.
func (p *Poller) Done() {
	if !p.since.IsZero() {
		p.last = time.Since(p.since)
		p.since = time.Time{}
	}
}
