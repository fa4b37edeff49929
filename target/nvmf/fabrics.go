package nvmf

import (
	"time"

	"github.com/thaw-project/thaw/nvme"
)

// connect handles the first command of a connection, which must be Connect
// (Base 6.3).
func (c *conn) connect(cmd *nvme.Command, l nvme.Layout) error {
	if cmd.Opcode != nvme.OpFabrics || cmd.FabricsType() != nvme.FabricsConnect {
		return c.refuse(cmd, l, nvme.SequenceError|nvme.DNR)
	}
	if cmd.Flags&nvme.FlagFuse != 0 || cmd.Flags&nvme.FlagPSDT != nvme.FlagSGL {
		return c.refuse(cmd, l, nvme.InvalidField|nvme.DNR)
	}
	if s := checkSGL(cmd, l, nvme.ConnectDataLen, false); s != nvme.Success {
		return c.refuse(cmd, l, s)
	}
	if cmd.SGL.ID != nvme.SGLInCapsule {
		return c.refuse(cmd, l, nvme.SGLTypeInvalid|nvme.DNR)
	}
	var p [nvme.ConnectDataLen]byte
	s, err := c.receive(p[:], l.Digest > 0)
	if err != nil {
		return err
	}
	var d nvme.ConnectData
	if err := d.Parse(p[:]); err != nil {
		return err
	}
	var f nvme.Connect
	f.Parse(cmd)
	var result uint64
	if s == nvme.Success {
		result, s = c.associate(&f, &d)
	}
	if s != nvme.Success {
		c.t.o.Log.Warn("connect refused", "peer", c.raw.RemoteAddr(), "host", d.HostNQN, "subsystem", d.SubNQN, "queue", f.QID, "status", s)
		c.reply(cmd.CID, result, s)
		return nil
	}
	// The response carries SQHD 0xffff when flow control is off (Base 6.3).
	c.sqhd.Store(1) // Connect took the first entry
	cqe := c.completion(cmd.CID, result, nvme.Success)
	if c.noFlow {
		cqe.SQHD = nvme.SQHDDisabled
	}
	b := c.space(respMax)
	c.batch.n += nvme.PutCapsuleResp(b, &cqe, c.digests)
	c.connected.Store(true)
	c.t.o.Log.Info("host connected", "peer", c.raw.RemoteAddr(), "host", d.HostNQN, "subsystem", d.SubNQN, "controller", c.ctrl.id, "queue", c.qid)
	return nil
}

// associate makes the connection a queue of a controller, or says why not.
func (c *conn) associate(f *nvme.Connect, d *nvme.ConnectData) (result uint64, s nvme.Status) {
	sqe := func(off uint16) (uint64, nvme.Status) {
		return nvme.ConnectParm(off, false), nvme.ConnectInvalidParm | nvme.DNR
	}
	data := func(off uint16) (uint64, nvme.Status) {
		return nvme.ConnectParm(off, true), nvme.ConnectInvalidParm | nvme.DNR
	}
	if f.Format != 0 {
		return 0, nvme.ConnectFormat | nvme.DNR
	}
	limit := AdminDepth
	if f.QID != 0 {
		limit = c.t.o.QueueDepth
	}
	if f.SQSize == 0 || int(f.SQSize) >= limit {
		return sqe(nvme.ConnectOffSQSize)
	}
	sub := c.t.discovery
	if d.SubNQN != nvme.DiscoveryNQN {
		var err error
		if sub, err = c.t.subsystem(d.SubNQN); err != nil || !sub.listens(c.ln) {
			return data(nvme.ConnectOffSubNQN)
		}
	}
	if nvme.CheckNQN(d.HostNQN) != nil {
		return data(nvme.ConnectOffHostNQN)
	}
	if !sub.allows(d.HostNQN) {
		return 0, nvme.ConnectInvalidHost | nvme.DNR
	}
	depth := int(f.SQSize) + 1
	if f.QID == 0 {
		if d.CNTLID != nvme.CNTLIDDynamic {
			return data(nvme.ConnectOffCNTLID)
		}
		ctrl := &controller{s: sub, ln: c.ln, hostNQN: d.HostNQN, hostID: d.HostID, admin: c, created: time.Now(), queues: map[uint16]*conn{},
			ended: make(chan struct{}), members: 1,
			maxQueues: c.t.o.MaxQueues, kato: katoOf(f.KeepAlive), pending: map[uint32]bool{}, masked: map[uint32]bool{}, changedNS: map[uint32]struct{}{}}
		ctrl.last.Store(c.clock())
		ctrl.renew()
		c.sub, c.qid, c.depth = sub, 0, depth
		c.noFlow = f.Attr&nvme.ConnectNoFlowControl != 0
		if !sub.attach(ctrl) {
			return 0, nvme.ConnectBusy
		}
		c.ctrl = ctrl
		// The host may have lost its right while it was let in.
		if !sub.allows(d.HostNQN) || !sub.listens(c.ln) || sub.gone() {
			ctrl.drop("host not allowed")
		}
		return uint64(ctrl.id), nvme.Success
	}
	ctrl := sub.controller(d.CNTLID)
	if ctrl == nil || ctrl.hostNQN != d.HostNQN || ctrl.hostID != d.HostID || sub.discovery {
		return data(nvme.ConnectOffCNTLID)
	}
	if !ctrl.ready() {
		return 0, nvme.SequenceError | nvme.DNR
	}
	ctrl.mu.Lock()
	defer ctrl.mu.Unlock()
	switch {
	case int(f.QID) > ctrl.maxQueues:
		return sqe(nvme.ConnectOffQID)
	case ctrl.dropped:
		return data(nvme.ConnectOffCNTLID)
	case ctrl.queues[f.QID] != nil:
		return 0, nvme.InvalidQueue | nvme.DNR
	}
	c.sub, c.ctrl, c.qid, c.depth = sub, ctrl, f.QID, depth
	c.noFlow = f.Attr&nvme.ConnectNoFlowControl != 0
	c.inCap = c.t.o.InCapsule
	ctrl.queues[f.QID] = c
	ctrl.members++
	return uint64(ctrl.id), nvme.Success
}

// katoUnit is the granularity of the keep alive timer (KAS 1).
const katoUnit = 100 * time.Millisecond

// katoOf rounds a KATO in milliseconds up to katoUnit; 0 is no timer.
func katoOf(ms uint32) time.Duration {
	d := time.Duration(ms) * time.Millisecond
	return (d + katoUnit - 1) / katoUnit * katoUnit
}

// check drops the controller when its host was silent for longer than its keep alive
// timeout (Base 3.9). Any command counts (CTRATT.TBKAS).
func (c *controller) check(now int64) {
	if c.seen.Swap(false) {
		c.last.Store(now)
		return
	}
	c.mu.Lock()
	kato := c.kato
	c.mu.Unlock()
	if kato == 0 || now-c.last.Load() <= int64(kato) {
		return
	}
	c.mu.Lock()
	c.csts |= nvme.CSTSFatal
	c.mu.Unlock()
	c.s.t.o.Log.Warn("keep alive timeout", "host", c.hostNQN, "subsystem", c.s.c.NQN, "controller", c.id, "timeout", kato)
	c.drop("keep alive timeout")
}

// fabrics handles Fabrics commands of a connected queue.
func (c *conn) fabrics(cmd *nvme.Command, l nvme.Layout) error {
	if l.Length != 0 {
		s := nvme.InvalidField
		if cmd.FabricsType() == nvme.FabricsConnect {
			s = nvme.SequenceError
		}
		return c.refuse(cmd, l, s|nvme.DNR)
	}
	switch cmd.FabricsType() {
	case nvme.FabricsPropertyGet, nvme.FabricsPropertySet:
		if c.qid != 0 {
			c.fail(cmd, nvme.InvalidField|nvme.DNR)
			return nil
		}
		var v uint64
		var s nvme.Status
		if cmd.FabricsType() == nvme.FabricsPropertyGet {
			v, s = c.ctrl.property(cmd.CDW11, cmd.CDW10&7 == 1)
		} else {
			s = c.ctrl.setProperty(cmd.CDW11, cmd.CDW10&7 == 1, cmd.CDW12)
		}
		if s != nvme.Success {
			c.fail(cmd, s)
			return nil
		}
		c.reply(cmd.CID, v, s)
		return nil
	case nvme.FabricsDisconnect:
		if c.qid == 0 {
			c.fail(cmd, nvme.InvalidQueueType|nvme.DNR)
			return nil
		}
		if uint16(cmd.CDW10) != 0 {
			c.fail(cmd, nvme.ConnectFormat|nvme.DNR)
			return nil
		}
		c.reply(cmd.CID, 0, nvme.Success)
		c.flushBatch()
		return errClosed
	case nvme.FabricsConnect:
		c.fail(cmd, nvme.SequenceError|nvme.DNR)
		return nil
	}
	// Authentication Send and Receive come here too: no controller asks for them.
	c.fail(cmd, nvme.InvalidOpcode|nvme.DNR)
	return nil
}

// readyUnits is CAP.TO and CRTO.CRWMT: a controller is ready within 500 ms.
const readyUnits = 1

// property answers Property Get (Base 6.5).
func (c *controller) property(off uint32, eight bool) (uint64, nvme.Status) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if (off == nvme.PropCAP) != eight {
		return 0, nvme.InvalidField | nvme.DNR
	}
	switch off {
	case nvme.PropCAP:
		return uint64(c.s.t.o.QueueDepth-1) | nvme.CAPCQR | readyUnits<<nvme.CAPTOShift | nvme.CAPCSSNVM | nvme.CAPCRWMS, nvme.Success
	case nvme.PropVS:
		return nvme.Version200, nvme.Success
	case nvme.PropCC:
		return uint64(c.cc), nvme.Success
	case nvme.PropCSTS:
		return uint64(c.csts), nvme.Success
	case nvme.PropCRTO:
		return readyUnits, nvme.Success
	}
	return 0, nvme.InvalidField | nvme.DNR
}

// setProperty answers Property Set, for which CC is the only property (Base 6.6).
func (c *controller) setProperty(off uint32, eight bool, v uint32) nvme.Status {
	if off != nvme.PropCC || eight {
		return nvme.InvalidField | nvme.DNR
	}
	c.mu.Lock()
	old := c.cc
	c.cc = v
	var drop []*conn
	switch {
	case v&nvme.CCEnable != 0 && old&nvme.CCEnable == 0:
		sqes, cqes := v>>nvme.CCIOSQESShift&0xf, v>>nvme.CCIOCQESShift&0xf
		good := v&(nvme.CCCSSMask|nvme.CCMPSMask|nvme.CCAMSMask) == 0 && (c.s.discovery || sqes == nvme.SQELog2 && cqes == nvme.CQELog2)
		c.renew()
		if c.csts = nvme.CSTSReady; !good {
			c.csts = nvme.CSTSFatal
		}
		c.live.Store(good)
	case v&nvme.CCEnable == 0 && old&nvme.CCEnable != 0:
		// Controller reset: I/O queues go, and so does what was set (Base 3.7.2). It is
		// over, and CSTS.RDY 0, once no command of theirs runs.
		c.live.Store(false)
		if c.csts &= nvme.CSTSReady; len(c.queues) == 0 {
			c.csts = 0
		}
		for _, q := range c.queues {
			drop = append(drop, q)
		}
		c.aers, c.asyncCfg, c.overflow, c.maxQueues, c.queuesSet = nil, 0, false, c.s.t.o.MaxQueues, false
		clear(c.pending)
		clear(c.masked)
		clear(c.changedNS)
	}
	if v&nvme.CCSHNMask != 0 && old&nvme.CCSHNMask == 0 {
		// Nothing is held back: what was acknowledged is with the device, and
		// making it durable is the host's to ask with Flush.
		c.csts |= nvme.CSTSShutdownDone
	} else if v&nvme.CCSHNMask == 0 {
		c.csts &^= nvme.CSTSShutdownMask
	}
	c.mu.Unlock()
	for _, q := range drop {
		q.close("controller reset")
	}
	return nvme.Success
}
