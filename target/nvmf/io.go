package nvmf

import (
	"bytes"
	"errors"
	"io"

	"github.com/thaw-project/thaw/nvme"
	"github.com/thaw-project/thaw/target/engine"
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

// lookup finds the connection's use of an nvmeNamespace, nil when there is none.
func (c *conn) lookup(nsid uint32) *use {
	if u := c.lastUse; u != nil && u.ns.NSID == nsid && !u.ns.removed.Load() {
		return u
	}
	u := c.uses[nsid]
	if u == nil || u.ns.removed.Load() {
		if u != nil {
			u.ns.unregister(u)
			delete(c.uses, nsid)
		}
		n := c.sub.lookup(nsid)
		if n == nil {
			return nil
		}
		if u = n.register(); u == nil {
			return nil
		}
		c.uses[nsid] = u
	}
	c.lastUse = u
	return u
}

// plan checks an I/O command and says what it transfers.
func (c *conn) plan(cmd *nvme.Command) (u *use, off int64, length int, s nvme.Status) {
	if !c.ctrl.ready() {
		return nil, 0, 0, c.ctrl.refusal()
	}
	switch cmd.Opcode {
	case nvme.OpRead, nvme.OpWrite, nvme.OpCompare, nvme.OpFlush, nvme.OpWriteZeroes, nvme.OpDatasetManagement:
	default:
		return nil, 0, 0, nvme.InvalidOpcode | nvme.DNR
	}
	if u = c.lookup(cmd.NSID); u == nil {
		return nil, 0, 0, nvme.InvalidNvmeNamespace | nvme.DNR
	}
	n := u.ns
	switch cmd.Opcode {
	case nvme.OpFlush:
		return u, 0, 0, nvme.Success
	case nvme.OpDatasetManagement:
		if n.readOnly && cmd.CDW11&nvme.DSMDeallocate != 0 {
			return nil, 0, 0, nvme.WriteProtected | nvme.DNR
		}
		// Hosts may send room for all ranges that a command can have, as Linux does.
		return u, 0, max(rangesBytes(cmd), min(int(cmd.SGL.Length), maxRangesBytes)), nvme.Success
	}
	lba, blocks := cmd.SLBA(), uint64(cmd.Blocks())
	if all := n.blocks.Load(); blocks > all || lba > all-blocks {
		return nil, 0, 0, nvme.LBAOutOfRange | nvme.DNR
	}
	off, length = int64(lba<<n.shift), int(blocks<<n.shift)
	if n.readOnly && (cmd.Opcode == nvme.OpWrite || cmd.Opcode == nvme.OpWriteZeroes) {
		return nil, 0, 0, nvme.WriteProtected | nvme.DNR
	}
	if cmd.Opcode != nvme.OpWriteZeroes && length > c.t.o.MaxTransfer {
		return nil, 0, 0, nvme.InvalidField | nvme.DNR
	}
	return u, off, length, nvme.Success
}

// maxRangesBytes is the data of a Dataset Management command with 256 ranges, the most
// there can be (NVM Command Set 3.2.3).
const maxRangesBytes = 256 * nvme.RangeLen

// rangesBytes is how much of a Dataset Management command's data are ranges.
func rangesBytes(cmd *nvme.Command) int { return (int(cmd.CDW10&0xff) + 1) * nvme.RangeLen }

// checkSGL says whether a data pointer of length bytes fits the capsule.
func checkSGL(cmd *nvme.Command, l nvme.Layout, length int, toHost bool) nvme.Status {
	switch {
	case cmd.SGL.ID == nvme.SGLTransport:
		if l.Length != 0 {
			return nvme.InvalidField | nvme.DNR
		}
	case cmd.SGL.ID == nvme.SGLInCapsule && !toHost:
		if cmd.SGL.Address != 0 {
			return nvme.SGLOffsetInvalid | nvme.DNR
		}
		if int64(cmd.SGL.Length) != int64(l.Length) {
			return nvme.SGLLengthInvalid | nvme.DNR
		}
	default:
		return nvme.SGLTypeInvalid | nvme.DNR
	}
	if int64(cmd.SGL.Length) != int64(length) {
		return nvme.SGLLengthInvalid | nvme.DNR
	}
	return nvme.Success
}

// inline tells whether the reader carries a command out itself.
func (c *conn) inline(u *use, cmd *nvme.Command) bool {
	return c.t.pool == nil && (u.ns.Inline || u.ns.Adaptive && u.fast(cmd))
}

// own takes the device for a command that the reader carries out. A device that never
// changes has no owner. When it returns false another connection has it.
func (u *use) own() bool { return u.ns.readOnly || u.ns.owner.Take() }

// leave ends own.
func (u *use) leave() {
	if !u.ns.readOnly {
		u.ns.owner.Leave()
	}
}

// start begins a command on the device, to be ended by the result's Stop.
func (u *use) start(cmd *nvme.Command) engine.Watch {
	if u.ns.Inline || !u.ns.Adaptive {
		return engine.Watch{}
	}
	return u.costs[operationOf(cmd)].Start()
}

// fast tells whether such a command is known to keep the reader for no longer than it
// may.
func (u *use) fast(cmd *nvme.Command) bool {
	k := &u.costs[operationOf(cmd)]
	return k.Known() && !k.Slow()
}

// ioCommand handles a command of an I/O queue.
func (c *conn) ioCommand(cmd *nvme.Command, l nvme.Layout) error {
	u, off, length, s := c.plan(cmd)
	if s != nvme.Success {
		return c.refuse(cmd, l, s)
	}
	switch cmd.Opcode {
	case nvme.OpRead:
		if s := checkSGL(cmd, l, length, true); s != nvme.Success {
			return c.refuse(cmd, l, s)
		}
		if c.inline(u, cmd) {
			return c.readInline(cmd, u, off, length)
		}
		return c.readElsewhere(cmd, u, off, length)
	case nvme.OpFlush, nvme.OpWriteZeroes:
		if l.Length != 0 {
			return c.refuse(cmd, l, nvme.InvalidField|nvme.DNR)
		}
		if c.inline(u, cmd) && u.own() {
			c.answer(cmd, c.executeOwned(cmd, u, off, length, nil))
			return nil
		}
		r, err := c.request(cmd, u, off, length)
		if err != nil {
			return c.conflict(cmd, l, err)
		}
		c.start(r)
		return nil
	}
	if s := checkSGL(cmd, l, length, false); s != nvme.Success {
		return c.refuse(cmd, l, s)
	}
	if cmd.SGL.ID == nvme.SGLTransport {
		r, err := c.request(cmd, u, off, length)
		if err != nil {
			return c.conflict(cmd, l, err)
		}
		c.awaitData(r)
		return nil
	}
	if c.inline(u, cmd) {
		return c.writeInline(cmd, u, off, l)
	}
	r, err := c.request(cmd, u, off, length)
	if err != nil {
		return c.conflict(cmd, l, err)
	}
	if err := c.takeMemory(r); err != nil {
		return err
	}
	r.buf = c.t.pools.get(length)
	r.data = r.buf.b[:length]
	if r.status, err = c.receive(r.data, l.Digest > 0); err != nil {
		return err
	}
	c.start(r)
	return nil
}

// receive takes data and its digest from the wire. A digest that does not match
// fails the command, not the connection (TCP 3.3).
func (c *conn) receive(p []byte, digest bool) (nvme.Status, error) {
	if err := c.take(p); err != nil {
		return 0, err
	}
	if !digest {
		return nvme.Success, nil
	}
	if err := c.fill(nvme.DigestLen); err != nil {
		return 0, err
	}
	want := nvme.GetDigest(c.rbuf[c.r:])
	c.r += nvme.DigestLen
	if nvme.CRC32C(p) != want {
		return nvme.TransientTransport, nil
	}
	return nvme.Success, nil
}

// answer replies from the reader.
func (c *conn) answer(cmd *nvme.Command, s nvme.Status) {
	if s != nvme.Success {
		c.fail(cmd, s)
		return
	}
	c.reply(cmd.CID, 0, s)
}

// writeInline serves a command whose data is in its capsule, on the reader.
func (c *conn) writeInline(cmd *nvme.Command, u *use, off int64, l nvme.Layout) error {
	var p []byte
	var buf *buffer
	s := nvme.Success
	if c.w-c.r >= l.Length+l.Digest {
		// All of it is there: write from the receive buffer.
		c.sips = false
		p = c.rbuf[c.r : c.r+l.Length]
		c.r += l.Length
		if l.Digest > 0 {
			if nvme.GetDigest(c.rbuf[c.r:]) != nvme.CRC32C(p) {
				s = nvme.TransientTransport
			}
			c.r += l.Digest
		}
	} else {
		buf = c.t.pools.get(l.Length)
		p = buf.b[:l.Length]
		var err error
		if s, err = c.receive(p, l.Digest > 0); err != nil {
			c.t.pools.put(buf)
			return err
		}
	}
	if s == nvme.Success && !u.own() {
		return c.handOver(cmd, u, off, p, buf)
	}
	if s == nvme.Success {
		s = c.executeOwned(cmd, u, off, l.Length, p)
	}
	c.t.pools.put(buf)
	c.answer(cmd, s)
	return nil
}

// handOver has a command whose data is p carried out by who has the device. p is in
// buf, or in the receive buffer if that is nil.
func (c *conn) handOver(cmd *nvme.Command, u *use, off int64, p []byte, buf *buffer) error {
	r, err := c.request(cmd, u, off, len(p))
	if err != nil {
		c.t.pools.put(buf)
		if err == errConflict {
			c.fail(cmd, nvme.CommandIDConflict|nvme.DNR)
			return nil
		}
		return err
	}
	if buf == nil {
		buf = c.t.pools.get(len(p))
		p = buf.b[:copy(buf.b, p)]
	}
	r.buf, r.data = buf, p
	if err := c.takeMemory(r); err != nil {
		return err
	}
	c.start(r)
	return nil
}

// readInline serves a read on the reader, into the batch.
func (c *conn) readInline(cmd *nvme.Command, u *use, off int64, length int) error {
	// Making room may wait for the peer, and a device that is owned must not.
	b := c.space(c.dataOff + length + nvme.DigestLen + respMax)
	if !u.own() {
		return c.readElsewhere(cmd, u, off, length)
	}
	if !u.acquire() {
		u.leave()
		c.fail(cmd, nvme.InvalidNvmeNamespace|nvme.DNR)
		return nil
	}
	w := u.start(cmd)
	err := readFull(u.ns.dev, b[c.dataOff:c.dataOff+length], off)
	w.Stop()
	u.release()
	u.leave()
	if err != nil {
		c.failDevice(cmd, err, "read", off, length)
		c.fail(cmd, nvme.StatusOf(err, false))
		return nil
	}
	c.batch.n += c.putRead(b, cmd.CID, length)
	c.count(false, length)
	return nil
}

// readElsewhere has a read served by another goroutine.
func (c *conn) readElsewhere(cmd *nvme.Command, u *use, off int64, length int) error {
	r, err := c.request(cmd, u, off, length)
	if err == errConflict {
		c.fail(cmd, nvme.CommandIDConflict|nvme.DNR)
		return nil
	}
	if err != nil {
		return err
	}
	if err := c.takeMemory(r); err != nil {
		return err
	}
	c.start(r)
	return nil
}

// putRead completes a C2HData whose data is at dataOff of b, and the response behind
// it, and returns their length.
func (c *conn) putRead(b []byte, cid uint16, length int) int {
	flags := nvme.FlagLast
	if c.noFlow {
		flags |= nvme.FlagSuccess
	}
	d := nvme.Data{CID: cid, Length: uint32(length)}
	nvme.PutData(b, nvme.TypeC2HData, flags, &d, c.digests, c.align)
	n := c.dataOff + length
	if c.digests.Data {
		nvme.PutDigest(b[n:], nvme.CRC32C(b[c.dataOff:n]))
		n += nvme.DigestLen
	}
	if !c.noFlow {
		cqe := c.completion(cid, 0, nvme.Success)
		n += nvme.PutCapsuleResp(b[n:], &cqe, c.digests)
	}
	return n
}

// readFull reads like io.ReaderAt, where the last byte of a device may come with
// io.EOF.
func readFull(r io.ReaderAt, p []byte, off int64) error {
	n, err := r.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if err == nil || err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return err
}

func (c *conn) failDevice(cmd *nvme.Command, err error, what string, off int64, length int) {
	c.t.o.Log.Warn("device failed", "subsystem", c.sub.c.NQN, "nsid", cmd.NSID, "operation", what, "offset", off, "length", length, "err", err)
}

func (c *conn) count(write bool, length int) {
	if write {
		c.work.writes.Add(1)
		c.work.writtenBytes.Add(uint64(length))
	} else {
		c.work.reads.Add(1)
		c.work.readBytes.Add(uint64(length))
	}
}

// executeOwned is execute by the reader, which owns the device until it returns.
func (c *conn) executeOwned(cmd *nvme.Command, u *use, off int64, length int, p []byte) nvme.Status {
	defer u.leave()
	defer u.start(cmd).Stop()
	return c.execute(cmd, u, off, length, p)
}

// execute runs everything but a read on the device. p is the data of the command.
func (c *conn) execute(cmd *nvme.Command, u *use, off int64, length int, p []byte) nvme.Status {
	if !u.acquire() {
		return nvme.InvalidNvmeNamespace | nvme.DNR
	}
	defer u.release()
	dev := u.ns.dev
	var err error
	what := "write"
	switch cmd.Opcode {
	case nvme.OpWrite:
		if _, err = dev.WriteAt(p, off); err == nil && cmd.CDW12&nvme.CDW12FUA != 0 && !u.ns.readOnly {
			err = dev.Flush()
		}
		if err == nil {
			c.count(true, length)
		}
	case nvme.OpCompare:
		what = "compare"
		buf := c.t.pools.get(length)
		err = readFull(dev, buf.b[:length], off)
		same := bytes.Equal(buf.b[:length], p)
		c.t.pools.put(buf)
		if err == nil && !same {
			return nvme.CompareFailure | nvme.DNR
		}
		if err != nil {
			c.failDevice(cmd, err, what, off, length)
			return nvme.StatusOf(err, false)
		}
	case nvme.OpFlush:
		what = "flush"
		if !u.ns.readOnly {
			err = dev.Flush()
		}
	case nvme.OpWriteZeroes:
		what = "write zeroes"
		if cmd.CDW12&nvme.CDW12Deallocate != 0 {
			err = dev.Discard(off, int64(length))
		} else {
			err = dev.WriteZeroes(off, int64(length))
		}
		if err == nil && cmd.CDW12&nvme.CDW12FUA != 0 {
			err = dev.Flush()
		}
	case nvme.OpDatasetManagement:
		what = "deallocate"
		if cmd.CDW11&nvme.DSMDeallocate == 0 {
			return nvme.Success // hints that there is no use for
		}
		p = p[:rangesBytes(cmd)]
		for q := p; len(q) > 0; q = q[nvme.RangeLen:] {
			var r nvme.Range
			r.Parse(q)
			if all := u.ns.blocks.Load(); uint64(r.Blocks) > all || r.SLBA > all-uint64(r.Blocks) {
				return nvme.LBAOutOfRange | nvme.DNR
			}
		}
		for q := p; len(q) > 0 && err == nil; q = q[nvme.RangeLen:] {
			var r nvme.Range
			if r.Parse(q); r.Blocks > 0 {
				err = dev.Discard(int64(r.SLBA<<u.ns.shift), int64(r.Blocks)<<u.ns.shift)
			}
		}
	}
	if err != nil {
		c.failDevice(cmd, err, what, off, length)
	}
	return nvme.StatusOf(err, true)
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

// awaitData asks for the data of r now, or as soon as there is memory for it.
func (c *conn) awaitData(r *request) {
	c.mu.Lock()
	if len(c.waiting) > 0 || c.writeMem < r.length {
		r.state = stateWaiting
		c.waiting = append(c.waiting, r)
	} else {
		c.ask(r)
	}
	c.mu.Unlock()
	c.flush()
}

// ask takes memory for r and sends its first R2Ts. It is called with mu held.
func (c *conn) ask(r *request) {
	c.writeMem -= r.length
	r.mem = &c.writeMem
	r.state = stateData
	r.buf = c.t.pools.get(r.length)
	r.data = r.buf.b[:r.length]
	for i := range r.r2t {
		r.r2t[i].active = false
	}
	for i := 0; i < c.r2ts && r.asked < r.length; i++ {
		c.sendR2T(r, i)
	}
}

// sendR2T asks for the next part of r's data with its i-th R2T. It is called with mu
// held.
func (c *conn) sendR2T(r *request, i int) {
	n := min(r.length-r.asked, c.t.o.R2TBytes)
	r.r2t[i].active, r.r2t[i].next, r.r2t[i].end = true, r.asked, r.asked+n
	d := nvme.Data{CID: r.cmd.CID, TTAG: r.slot*maxR2T + uint16(i), Offset: uint32(r.asked), Length: uint32(n)}
	r.asked += n
	if c.r2tCount++; c.r2tCount == 1 {
		c.awaiting.Store(c.clock())
	}
	c.wmu.Lock()
	b := c.room()
	l := nvme.PutR2T(b.b[b.n:], &d, c.digests)
	b.n += l
	c.bytes.Add(int64(l))
	c.wmu.Unlock()
}

// h2cData receives data that an R2T asked for (TCP 3.6.2.8).
func (c *conn) h2cData(h *nvme.Common, b []byte, l nvme.Layout) error {
	var d nvme.Data
	if err := d.Parse(b, l.Length); err != nil {
		return err
	}
	slot, i := int(d.TTAG/maxR2T), int(d.TTAG%maxR2T)
	c.mu.Lock()
	if slot >= len(c.slots) || c.slots[slot].state != stateData || !c.slots[slot].r2t[i].active {
		c.mu.Unlock()
		return &nvme.PDUError{Status: nvme.FatalInvalidHeader, Info: 10, What: "no R2T has this transfer tag"}
	}
	r := c.slots[slot]
	c.mu.Unlock()
	// From here on only the reader touches r: its state is left by the reader.
	t := &r.r2t[i]
	switch {
	case d.CID != r.cmd.CID:
		return &nvme.PDUError{Status: nvme.FatalInvalidHeader, Info: 8, What: "the R2T is of another command"}
	case int(d.Offset) != t.next || l.Length == 0:
		return &nvme.PDUError{Status: nvme.FatalOutOfRange, Info: 12, What: "data does not follow what came before"}
	case l.Length > t.end-t.next:
		return &nvme.PDUError{Status: nvme.FatalLimitExceeded, Info: 16, What: "more data than the R2T asked for"}
	case h.Flags&nvme.FlagLast != 0 && l.Length != t.end-t.next:
		return &nvme.PDUError{Status: nvme.FatalInvalidHeader, Info: 1, What: "last PDU before the end of what the R2T asked for"}
	}
	c.r += l.Header
	if err := c.skip(l.Data - l.Header); err != nil {
		return err
	}
	s, err := c.receive(r.data[t.next:t.next+l.Length], l.Digest > 0)
	if err != nil {
		return err
	}
	if s != nvme.Success {
		r.status = s
	}
	t.next += l.Length
	r.received += l.Length
	c.awaiting.Store(c.clock())
	if t.next < t.end {
		return nil
	}
	t.active = false
	c.mu.Lock()
	if c.r2tCount--; c.r2tCount == 0 {
		c.awaiting.Store(0)
	}
	if r.asked < r.length {
		c.sendR2T(r, i)
	}
	done := r.received == r.length
	if done {
		r.state = stateRunning
	}
	c.mu.Unlock()
	switch {
	case !done:
		c.flush()
	case c.inline(r.use, &r.cmd) && r.use.own():
		r.serve()
		r.use.leave()
		c.flush()
	default:
		c.start(r)
	}
	return nil
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
