package convert

import (
	"sync"
	"time"
)

// reportEvery is the pause between two events of one layer that differ in bytes
// only: what an eye can follow.
const reportEvery = 100 * time.Millisecond

// tracker turns what happens to the layers of an image into events.
type tracker struct {
	sink *sync.Mutex // held while progress is called: calls do not overlap
	call func(Event)

	mu     sync.Mutex
	layers []tracked // guarded by mu
}

type tracked struct {
	event Event
	last  time.Time // of the last event
}

func newTracker(sink *sync.Mutex, call func(Event), i *image) *tracker {
	t := &tracker{sink: sink, call: call}
	for n, l := range i.layers {
		t.layers = append(t.layers, tracked{event: Event{
			Platform:  i.platform,
			Index:     n,
			Count:     len(i.layers),
			Digest:    l.descriptor.Digest.String(),
			Block:     l.block,
			State:     StateWaiting,
			SizeBytes: l.descriptor.Size,
		}})
	}
	return t
}

// update changes layer n's event by change and reports it, at once if force.
func (t *tracker) update(n int, force bool, change func(*Event)) {
	t.mu.Lock()
	l := &t.layers[n]
	change(&l.event)
	now := time.Now()
	if !force && now.Sub(l.last) < reportEvery {
		t.mu.Unlock()
		return
	}
	l.last = now
	event := l.event
	// Taken before mu is let go, so that events of a layer come in order.
	t.sink.Lock()
	t.mu.Unlock()
	defer t.sink.Unlock()
	t.call(event)
}

func (t *tracker) get(n int) Event {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.layers[n].event
}
