package engine

import (
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/thaw-project/thaw/kind"
)

func TestParse(t *testing.T) {
	for name, want := range map[string]Kind{"": SharedNothing, "shared-nothing": SharedNothing, "thread-pool": ThreadPool} {
		if k, err := Parse(name); err != nil || k != want {
			t.Errorf("Parse(%q) = %v, %v", name, k, err)
		}
	}
	for _, k := range []Kind{SharedNothing, ThreadPool} {
		if back, err := Parse(k.String()); err != nil || back != k {
			t.Errorf("Parse(%q) = %v, %v", k, back, err)
		}
	}
	if _, err := Parse("threads"); !errors.Is(err, kind.Invalid) {
		t.Errorf("an unknown engine: %v", err)
	}
	if err := Kind(7).Validate(); !errors.Is(err, kind.Invalid) {
		t.Errorf("engine 7: %v", err)
	}
}

// task notes that it ran, and that nothing else did meanwhile.
type task struct {
	t      *testing.T
	inside *atomic.Int32
	count  *int // the owner's alone: the race detector sees when it is not
	done   sync.WaitGroup
}

func (k *task) Run() {
	if n := k.inside.Add(1); n != 1 {
		k.t.Errorf("%d tasks at a time", n)
	}
	*k.count++
	k.inside.Add(-1)
	k.done.Done()
}

// TestOwner has many connections use one device, each taking it or passing tasks on.
func TestOwner(t *testing.T) {
	const connections, rounds = 8, 2000
	var o Owner
	var inside atomic.Int32
	count := 0
	var wg sync.WaitGroup
	for c := range connections {
		wg.Go(func() {
			k := task{t: t, inside: &inside, count: &count}
			for r := range rounds {
				k.done.Add(1)
				if (r+c)%2 == 0 && o.Take() {
					k.Run()
					o.Leave()
				} else {
					o.Submit(&k)
				}
				k.done.Wait() // its memory is used again
			}
		})
	}
	wg.Wait()
	// The last to leave may be a goroutine that hands the device on.
	for !o.Take() {
	}
	if count != connections*rounds {
		t.Errorf("%d tasks ran of %d", count, connections*rounds)
	}
}

// TestOwnerAllocations: a connection alone pays nothing.
func TestOwnerAllocations(t *testing.T) {
	var o Owner
	if n := testing.AllocsPerRun(100, func() {
		if !o.Take() {
			t.Fatal("taken")
		}
		o.Leave()
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

type counted struct {
	n    *atomic.Int64
	wait chan struct{}
}

func (c *counted) Run() {
	if c.wait != nil {
		<-c.wait
	}
	c.n.Add(1)
}

// TestPool runs what was submitted before Close, and no more than its workers at a time.
func TestPool(t *testing.T) {
	p := NewPool()
	var n atomic.Int64
	wait := make(chan struct{})
	for range PoolWorkers {
		p.Submit(&counted{&n, wait})
	}
	for range poolQueue {
		p.Submit(&counted{n: &n})
	}
	select {
	case p.queue <- &counted{n: &n}:
		t.Error("a full queue took another task while all workers wait")
	default:
	}
	close(wait)
	p.Close()
	if got, want := n.Load(), int64(PoolWorkers+poolQueue); got != want {
		t.Errorf("%d tasks ran of %d", got, want)
	}
}

func BenchmarkOwner(b *testing.B) {
	var o Owner
	b.ReportAllocs()
	for b.Loop() {
		o.Take()
		o.Leave()
	}
}

// TestCost: waiting counts, working does not.
func TestCost(t *testing.T) {
	var c Cost
	if c.Known() || c.Slow() {
		t.Error("knows without a measurement")
	}
	run := func(f func()) {
		for range 2 * mostVotes * sampleEvery {
			w := c.Start()
			f()
			w.Stop()
		}
	}
	run(func() {
		// Half a millisecond of work that no wait interrupts, the machine permitting.
		for n := range 2_000 {
			count += n
		}
	})
	if !c.Known() {
		t.Error("knows nothing of what was measured")
	}
	run(func() { time.Sleep(5 * SlowAfter) })
	if !c.Slow() {
		t.Errorf("a request that sleeps counts %d votes", c.votes.Load())
	}
	if n := testing.AllocsPerRun(100, func() { c.Start().Stop() }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

var count int
