package nvmf

import (
	"errors"

	"github.com/thaw-project/thaw/nvme"
)

type state uint8

const (
	stateFree    state = iota
	stateWaiting       // for memory, before its first R2T
	stateData          // for H2CData
	stateQueued        // for a worker
	stateRunning
)

// request is a command that does not end on the reader.
type request struct {
	c    *conn
	slot uint16
	run  func() // r.work, made once so that starting a goroutine allocates nothing

	state  state // guarded by conn.mu
	cmd    nvme.Command
	use    *use
	buf    *buffer
	data   []byte // of a write, in buf
	off    int64  // on the device, in bytes
	length int    // of data, in bytes
	mem    *int   // the budget that length was taken from, nil for none
	status nvme.Status

	asked    int // bytes that R2Ts asked for
	received int
	r2t      [maxR2T]struct {
		active    bool
		next, end int
	}
}

// errConflict is a command identifier that is in use.
var errConflict = errors.New("command identifier is in use")

// request takes a slot for a command. A host with more commands than its queue has
// entries broke the protocol; one with the identifier of another command gets
// errConflict.
func (c *conn) request(cmd *nvme.Command, u *use, off int64, length int) (*request, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, r := range c.slots {
		if r.state != stateFree && r.cmd.CID == cmd.CID {
			return nil, errConflict
		}
	}
	var r *request
	if n := len(c.free); n > 0 {
		r = c.free[n-1]
		c.free = c.free[:n-1]
	} else if len(c.slots) < c.depth {
		r = &request{c: c, slot: uint16(len(c.slots))}
		r.run = r.work
		c.slots = append(c.slots, r)
	} else {
		return nil, &nvme.PDUError{Status: nvme.FatalSequence, What: "more commands than the queue has entries"}
	}
	r.cmd, r.use, r.off, r.length, r.mem = *cmd, u, off, length, nil
	r.status, r.asked, r.received = nvme.Success, 0, 0
	r.state = stateQueued
	return r, nil
}

// conflict answers a command whose identifier is in use, and passes other errors on.
func (c *conn) conflict(cmd *nvme.Command, l nvme.Layout, err error) error {
	if err == errConflict {
		return c.refuse(cmd, l, nvme.CommandIDConflict|nvme.DNR)
	}
	return err
}

// takeMemory waits on the reader until the data of r may be held. What holds memory
// now gets done without the reader.
func (c *conn) takeMemory(r *request) error {
	c.mu.Lock()
	for c.readMem < r.length && !c.closed.Load() {
		c.mu.Unlock()
		c.flushBatch()
		c.mu.Lock()
		if c.readMem < r.length && !c.closed.Load() {
			c.freed.Wait()
		}
	}
	defer c.mu.Unlock()
	if c.closed.Load() {
		return errClosed
	}
	c.readMem -= r.length
	r.mem = &c.readMem
	return nil
}

// start runs r on a worker.
func (c *conn) start(r *request) {
	c.mu.Lock()
	if c.closed.Load() {
		c.mu.Unlock()
		return
	}
	if inline := c.inline(r.use, &r.cmd); c.t.pool != nil || inline {
		r.state = stateRunning
		c.wg.Add(1)
		c.mu.Unlock()
		switch {
		case !inline:
			c.t.pool.Submit(r)
		case r.use.ns.readOnly:
			r.Run()
		default:
			r.use.ns.owner.Submit(r)
		}
		return
	}
	if c.workers >= maxWorkers {
		r.state = stateQueued
		c.queue = append(c.queue, r)
		c.mu.Unlock()
		return
	}
	c.workers++
	r.state = stateRunning
	c.wg.Add(1)
	c.mu.Unlock()
	go r.run()
}

// Run carries r out for an engine, on a goroutine that must not wait for the peer of
// this connection.
func (r *request) Run() {
	c := r.c
	defer c.wg.Done()
	r.serve()
	if c.done == nil {
		c.kick()
		return
	}
	select {
	case c.done <- struct{}{}:
	default: // the writer will look anyway
	}
}

// work runs r and then what is queued.
func (r *request) work() {
	c := r.c
	defer c.wg.Done()
	for r != nil {
		ns := r.use.ns
		ns.ops <- struct{}{}
		c.t.ops <- struct{}{}
		r.serve()
		<-c.t.ops
		<-ns.ops
		c.flush()
		c.mu.Lock()
		if r = nil; len(c.queue) > 0 && !c.closed.Load() {
			r = c.queue[0]
			c.queue = append(c.queue[:0], c.queue[1:]...)
			r.state = stateRunning
		} else {
			c.workers--
		}
		c.mu.Unlock()
	}
}

// serve runs the command on the device and leaves the answer pending.
func (r *request) serve() {
	c := r.c
	defer r.use.start(&r.cmd).Stop()
	cid := r.cmd.CID
	if r.cmd.Opcode == nvme.OpRead {
		var err error
		if r.buf = c.t.pools.get(c.dataOff + r.length + nvme.DigestLen + respMax); !r.use.acquire() {
			r.status = nvme.InvalidNvmeNamespace | nvme.DNR
		} else {
			err = readFull(r.use.ns.dev, r.buf.b[c.dataOff:c.dataOff+r.length], r.off)
			r.use.release()
			if r.status = nvme.StatusOf(err, false); err != nil {
				c.failDevice(&r.cmd, err, "read", r.off, r.length)
			}
		}
		if r.status == nvme.Success {
			c.count(false, r.length)
			buf := r.buf
			r.buf = nil
			buf.n = c.putRead(buf.b, cid, r.length)
			c.finish(r)
			c.enqueue(buf)
			return
		}
	} else if r.status == nvme.Success {
		r.status = c.execute(&r.cmd, r.use, r.off, r.length, r.data)
	}
	s := r.status
	if s != nvme.Success {
		c.logError(&r.cmd, s)
	}
	c.finish(r)
	c.respond(cid, 0, s)
}

// finish frees the slot, before the host can know that the command is done, and
// gives memory to who waits for it.
func (c *conn) finish(r *request) {
	var next *request
	c.mu.Lock()
	buf := r.buf
	r.buf, r.data = nil, nil
	if r.mem != nil {
		*r.mem += r.length
	}
	if r.mem == &c.readMem {
		c.freed.Signal()
	}
	r.mem = nil
	r.state = stateFree
	c.free = append(c.free, r)
	for len(c.waiting) > 0 && c.writeMem >= c.waiting[0].length && !c.closed.Load() {
		next = c.waiting[0]
		c.waiting = append(c.waiting[:0], c.waiting[1:]...)
		c.ask(next)
	}
	c.mu.Unlock()
	c.t.pools.put(buf)
}

// abort ends a command that did not begin, and tells whether it found one. It may be
// called from any goroutine.
func (c *conn) abort(cid uint16) bool {
	c.mu.Lock()
	var found *request
	for _, list := range []*[]*request{&c.waiting, &c.queue} {
		for i, r := range *list {
			if r.cmd.CID == cid {
				found = r
				*list = append((*list)[:i], (*list)[i+1:]...)
				break
			}
		}
	}
	c.mu.Unlock()
	if found == nil {
		return false
	}
	c.finish(found)
	c.respond(cid, 0, nvme.AbortRequested)
	c.kick()
	return true
}
