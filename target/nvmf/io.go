package nvmf

import (
	"bytes"
	"io"

	"github.com/thaw-project/thaw/nvme"
	"github.com/thaw-project/thaw/target/engine"
)

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
