// Package engine decides where a request for a device runs once a connection's
// reader has taken it off the wire.
//
// SharedNothing is what Thaw uses: the goroutine of the connection carries its
// requests out itself, one after the other, and nothing is shared with other
// connections on the way. ThreadPool is what most servers do: a queue that all
// connections share, workers that take from it, and a writer per connection that
// sends what is done. It is here so that the two can be measured in one run; see
// docs/engine.md for what was found.
//
// The package knows neither devices nor protocols.
package engine

import (
	"sync"

	"github.com/thaw-project/thaw/kind"
)

// Kind names an engine. The zero value is SharedNothing.
type Kind uint8

// The engines.
const (
	SharedNothing Kind = iota
	ThreadPool
)

var names = [...]string{SharedNothing: "shared-nothing", ThreadPool: "thread-pool"}

// String returns the name that Parse takes.
func (k Kind) String() string {
	if int(k) < len(names) {
		return names[k]
	}
	return "unknown engine"
}

// Parse turns a name into a Kind; the empty name is SharedNothing. The error is
// kind.Invalid.
func Parse(name string) (Kind, error) {
	if name == "" {
		return SharedNothing, nil
	}
	for k, n := range names {
		if n == name {
			return Kind(k), nil
		}
	}
	return 0, kind.Errorf(kind.Invalid, "engine %q: it is shared-nothing or thread-pool", name)
}

// Validate tells whether k is an engine; the error is kind.Invalid.
func (k Kind) Validate() error {
	if int(k) >= len(names) {
		return kind.Errorf(kind.Invalid, "engine %d does not exist", k)
	}
	return nil
}

// Task is a request that is ready to run. Whoever submits it keeps it in memory of
// its own, so that a queue of tasks costs no allocation.
type Task interface {
	// Run carries the request out and passes the answer on. It may wait for a device.
	Run()
}

const (
	// PoolWorkers is how many requests a Pool runs at a time: what nbdkit takes by
	// default, and enough to keep a disk's queue filled.
	PoolWorkers = 16
	// poolQueue bounds what waits for a worker. Readers that find it full wait, and
	// their peers with them.
	poolQueue = 1024
)

// Pool is the ThreadPool engine: one bounded queue and a fixed number of workers. Its
// methods may be called concurrently, but for Close.
type Pool struct {
	queue chan Task
	wg    sync.WaitGroup
}

// NewPool starts a pool. Close it.
func NewPool() *Pool {
	p := &Pool{queue: make(chan Task, poolQueue)}
	for range PoolWorkers {
		p.wg.Go(func() {
			for t := range p.queue {
				t.Run()
			}
		})
	}
	return p
}

// Submit queues a task; it waits while the queue is full.
func (p *Pool) Submit(t Task) { p.queue <- t }

// Close runs what is queued, ends the workers and waits for them. Nothing may be
// submitted from then on.
func (p *Pool) Close() {
	close(p.queue)
	p.wg.Wait()
}
