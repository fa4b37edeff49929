package engine

import "sync"

// Owner lets one goroutine at a time work on a device, and none wait for another.
//
// Who finds the device free takes it, works, and leaves. Who finds it taken gives its
// request to who has it, and goes on with what else there is to do. So the commands
// of all connections reach a device one after the other, as from one owner, while
// with one connection, the usual case, there is no hop: taking a free device costs
// as much as an uncontended lock.
//
// The zero value is a free device.
type Owner struct {
	mu    sync.Mutex
	taken bool   // guarded by mu, as are all below
	queue []Task // of others, as many as their connections have commands
	spare []Task
}

// runLimit is how many requests of others one owner runs before it hands the device
// to a goroutine of its own: its connection has a peer that waits too.
const runLimit = 32

// Take tells whether the device was free and is now the caller's, until Leave.
func (o *Owner) Take() bool {
	o.mu.Lock()
	free := !o.taken
	o.taken = true
	o.mu.Unlock()
	return free
}

// Submit runs t: at once if the device is free, else it has the present owner do so.
// That must not wait for anything but the device.
func (o *Owner) Submit(t Task) {
	o.mu.Lock()
	if o.taken {
		o.queue = append(o.queue, t)
		o.mu.Unlock()
		return
	}
	o.taken = true
	o.mu.Unlock()
	t.Run()
	o.Leave()
}

// Leave frees the device after running what others submitted meanwhile.
func (o *Owner) Leave() {
	if o.run(runLimit) {
		// It ends when the queue is empty, for which every task's connection waits.
		go func() {
			for o.run(runLimit) {
			}
		}()
	}
}

// run runs at least limit queued tasks, or all and frees the device. It tells whether
// there may be more.
func (o *Owner) run(limit int) bool {
	for done := 0; done < limit; {
		o.mu.Lock()
		tasks := o.queue
		if len(tasks) == 0 {
			o.taken = false
			o.mu.Unlock()
			return false
		}
		o.queue, o.spare = o.spare[:0], nil
		o.mu.Unlock()
		for i, t := range tasks {
			t.Run()
			tasks[i] = nil
		}
		done += len(tasks)
		o.mu.Lock()
		o.spare = tasks[:0]
		o.mu.Unlock()
	}
	return true
}
