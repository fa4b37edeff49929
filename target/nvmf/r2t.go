package nvmf

import "github.com/thaw-project/thaw/nvme"

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
