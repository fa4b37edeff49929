package nvmf

import (
	"math/bits"
	"net"
	"sort"
	"strconv"
	"time"

	"github.com/thaw-project/thaw/nvme"
)

// firmware is what Identify and the firmware log say.
const firmware = "1"

// adminCommand handles a command of the admin queue. None waits for a device.
func (c *conn) adminCommand(cmd *nvme.Command, l nvme.Layout) error {
	if !c.ctrl.ready() {
		return c.refuse(cmd, l, c.ctrl.refusal())
	}
	if l.Length != 0 {
		// No command that is supported takes data; Set Features of the host
		// identifier does, and Fabrics refuses it (Base 5.27.1.25).
		s := nvme.InvalidField
		if cmd.Opcode == nvme.AdminSetFeatures && uint8(cmd.CDW10) == nvme.FeatHostID {
			s = nvme.SequenceError
		}
		return c.refuse(cmd, l, s|nvme.DNR)
	}
	var result uint64
	var s nvme.Status
	switch cmd.Opcode {
	case nvme.AdminIdentify:
		c.identify(cmd)
		return nil
	case nvme.AdminGetLogPage:
		c.logPage(cmd)
		return nil
	case nvme.AdminKeepAlive:
	case nvme.AdminAsyncEvent:
		if s = c.ctrl.await(cmd.CID); s == nvme.Success {
			c.ctrl.report()
			return nil
		}
	case nvme.AdminSetFeatures:
		result, s = c.ctrl.setFeature(cmd)
	case nvme.AdminGetFeatures:
		if uint8(cmd.CDW10) == nvme.FeatHostID {
			c.getHostID(cmd)
			return nil
		}
		result, s = c.ctrl.feature(cmd)
	case nvme.AdminAbort:
		if !c.ctrl.abort(uint16(cmd.CDW10), uint16(cmd.CDW10>>16)) {
			result = 1
		}
	case nvme.AdminCrossReset:
		c.crossReset(cmd)
		return nil
	default:
		s = nvme.InvalidOpcode | nvme.DNR
	}
	if s != nvme.Success {
		c.fail(cmd, s)
		return nil
	}
	c.reply(cmd.CID, result, nvme.Success)
	return nil
}

// sendData answers with the data that put writes, of length bytes, which the data
// pointer must have room for exactly.
func (c *conn) sendData(cmd *nvme.Command, length int, put func(b []byte)) {
	if s := checkSGL(cmd, nvme.Layout{}, length, true); s != nvme.Success {
		c.fail(cmd, s)
		return
	}
	b := c.space(c.dataOff + length + nvme.DigestLen + respMax)
	put(b[c.dataOff : c.dataOff+length])
	c.batch.n += c.putRead(b, cmd.CID, length)
}

// identify answers Identify (Base 5.17).
func (c *conn) identify(cmd *nvme.Command) {
	cns := uint8(cmd.CDW10)
	send := func(put func(b []byte)) { c.sendData(cmd, nvme.IdentifyLen, put) }
	zeros := func(b []byte) { clear(b) }
	if cns == nvme.CNSController {
		id := c.ctrl.identify()
		send(id.Put)
		return
	}
	if c.sub.discovery {
		c.fail(cmd, nvme.InvalidField|nvme.DNR)
		return
	}
	switch cns {
	case nvme.CNSSetNvmeNamespace, nvme.CNSSetController, nvme.CNSSetActiveList:
		if cmd.CDW11>>24 != nvme.CommandSetNVM {
			c.fail(cmd, nvme.InvalidField|nvme.DNR)
			return
		}
	}
	switch cns {
	case nvme.CNSActiveList, nvme.CNSSetActiveList:
		if cmd.NSID >= nvme.NSIDAll-1 {
			c.fail(cmd, nvme.InvalidNvmeNamespace|nvme.DNR)
			return
		}
		ids := c.sub.ids()
		i := sort.Search(len(ids), func(i int) bool { return ids[i] > cmd.NSID })
		send(func(b []byte) { nvme.PutList(b, ids[i:]) })
	case nvme.CNSNvmeNamespace, nvme.CNSSetNvmeNamespace, nvme.CNSIndependent, nvme.CNSDescriptors:
		if cmd.NSID == 0 || cmd.NSID > c.sub.c.MaxNvmeNamespaces {
			c.fail(cmd, nvme.InvalidNvmeNamespace|nvme.DNR)
			return
		}
		n := c.sub.lookup(cmd.NSID)
		if n == nil {
			if cns == nvme.CNSDescriptors {
				c.fail(cmd, nvme.InvalidNvmeNamespace|nvme.DNR)
				return
			}
			send(zeros) // inactive (NVM 4.1.5.1)
			return
		}
		id := n.identify()
		switch cns {
		case nvme.CNSNvmeNamespace:
			send(id.Put)
		case nvme.CNSIndependent:
			send(id.PutIndependent)
		case nvme.CNSDescriptors:
			d := nvme.Descriptors{EUI64: n.EUI64, NGUID: n.NGUID, UUID: n.UUID}
			send(d.Put)
		default:
			send(zeros) // the NVM command set's part has nothing to say without protection information
		}
	case nvme.CNSSetController:
		send(zeros) // no limits beside MDTS
	case nvme.CNSCommandSets:
		send(func(b []byte) {
			clear(b)
			b[0] = 1 << nvme.CommandSetNVM
		})
	default:
		c.fail(cmd, nvme.InvalidField|nvme.DNR)
	}
}

func (c *controller) identify() nvme.Controller {
	o := &c.s.t.o
	id := nvme.Controller{Serial: c.s.c.Serial, Model: c.s.c.Model, Firmware: firmware, MDTS: uint8(bits.TrailingZeros(uint(o.MaxTransfer)) - nvme.CAPMPSMINLog),
		CNTLID: c.id, Version: nvme.Version200, OAES: nvme.OAESDiscovery, CTRATT: nvme.CTRATTHostID128 | nvme.CTRATTTrafficKeepAlv,
		Type: nvme.ControllerTypeDisc, AsyncLimit: asyncLimit - 1, AbortLimit: abortLimit - 1, LPA: nvme.LPAExtended, ErrorEntries: errorEntries - 1, KeepAliveUnit: uint16(katoUnit / (100 * time.Millisecond)),
		MaxCommands: uint16(o.QueueDepth), SGLS: nvme.SGLSupported | nvme.SGLOffset, SubNQN: c.s.c.NQN, FRMW: nvme.FRMWReadOnlySlot1}
	if c.s.discovery {
		return id
	}
	id.Type, id.OAES, id.CMIC = nvme.ControllerTypeIO, nvme.OAESNvmeNamespace, nvme.CMICMultiCtrl
	id.NvmeNamespaces, id.MaxActive = c.s.c.MaxNvmeNamespaces, c.s.c.MaxNvmeNamespaces
	id.ONCS, id.VWC = nvme.ONCSCompare|nvme.ONCSDatasetMgmt|nvme.ONCSWriteZeroes, nvme.VWCPresent|nvme.VWCFlushOne
	c.mu.Lock()
	id.CIU, id.CIRN = c.ciu, c.cirn
	c.mu.Unlock()
	if id.QuiesceMs = uint16(quiesce / time.Millisecond); !o.NoCrossReset {
		id.CrossResetLimit = crossResets
	}
	id.CapsuleSize, id.ResponseSize, id.MSDBD, id.OFCS = uint32(nvme.SQELen+o.InCapsule)/16, nvme.CQELen/16, 1, nvme.OFCSDisconnect
	return id
}

const (
	// crossResets is how many Cross-Controller Resets of one controller are under way
	// at most.
	crossResets = 4
	// crossResetWait is how long one waits for the commands of the other controller. The
	// host asks again.
	crossResetWait = 500 * time.Millisecond
	// quiesce is what is announced as the time in which commands end after their host
	// was lost: what a disk takes, and the janitor's tick.
	quiesce = 2 * time.Second
)

// crossReset answers Cross-Controller Reset: a host that lost a path makes sure over
// another that no command of the lost one is carried out later, before it sends those
// again (Base 2.3, 5.4.3). The other controller must be of the same host. One that does
// not exist any more has no commands.
func (c *conn) crossReset(cmd *nvme.Command) {
	if c.sub.discovery || c.t.o.NoCrossReset {
		c.fail(cmd, nvme.InvalidOpcode|nvme.DNR)
		return
	}
	id, ciu, cirn := cmd.CrossReset()
	o := c.sub.controller(id)
	if o == nil || o.hostNQN != c.ctrl.hostNQN || o.hostID != c.ctrl.hostID || !o.is(ciu, cirn) {
		c.reply(cmd.CID, nvme.CrossResetDone, nvme.Success)
		return
	}
	if o == c.ctrl {
		c.fail(cmd, nvme.InvalidField|nvme.DNR)
		return
	}
	if c.ctrl.resets.Add(1) > crossResets {
		c.ctrl.resets.Add(-1)
		c.fail(cmd, nvme.CrossResetLimit)
		return
	}
	o.drop("cross-controller reset")
	cid := cmd.CID
	c.wg.Go(func() {
		var result uint64
		t := time.NewTimer(crossResetWait)
		defer t.Stop()
		select {
		case <-o.ended:
			result = nvme.CrossResetDone
		case <-t.C:
		}
		c.ctrl.resets.Add(-1)
		c.respond(cid, result, nvme.Success)
		c.kick()
	})
}

// is tells whether a host means this instance of the controller.
func (c *controller) is(ciu uint8, cirn uint64) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.ciu == ciu && c.cirn == cirn
}

// await keeps an Asynchronous Event Request (Base 5.2).
func (c *controller) await(cid uint16) nvme.Status {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.aers) >= asyncLimit {
		return nvme.AsyncEventLimit | nvme.DNR
	}
	c.aers = append(c.aers, cid)
	return nvme.Success
}

// abort ends a command that did not begin (Base 5.1).
func (c *controller) abort(sqid, cid uint16) bool {
	c.mu.Lock()
	if sqid == 0 {
		defer c.mu.Unlock()
		for i, a := range c.aers {
			if a == cid {
				c.aers = append(c.aers[:i], c.aers[i+1:]...)
				c.admin.respond(cid, 0, nvme.AbortRequested)
				c.admin.kick()
				return true
			}
		}
		return false
	}
	q := c.queues[sqid]
	c.mu.Unlock()
	return q != nil && q.abort(cid)
}

// setFeature answers Set Features (Base 5.27).
func (c *controller) setFeature(cmd *nvme.Command) (uint64, nvme.Status) {
	if cmd.CDW10&nvme.FeatSave != 0 {
		return 0, nvme.FeatureNotSaveable | nvme.DNR
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	switch uint8(cmd.CDW10) {
	case nvme.FeatAsyncConfig:
		c.asyncCfg = cmd.CDW11
		return 0, nvme.Success
	case nvme.FeatKeepAlive:
		c.kato = katoOf(cmd.CDW11)
		return 0, nvme.Success
	case nvme.FeatHostID:
		return 0, nvme.SequenceError | nvme.DNR
	}
	if c.s.discovery {
		return 0, nvme.InvalidField | nvme.DNR
	}
	switch uint8(cmd.CDW10) {
	case nvme.FeatQueues:
		sq, cq := cmd.CDW11&0xffff, cmd.CDW11>>16
		if sq == 0xffff || cq == 0xffff {
			return 0, nvme.InvalidField | nvme.DNR
		}
		if len(c.queues) > 0 || c.queuesSet {
			return 0, nvme.SequenceError | nvme.DNR
		}
		c.queuesSet = true
		c.maxQueues = min(int(min(sq, cq))+1, c.s.t.o.MaxQueues)
		n := uint64(c.maxQueues - 1)
		return n<<16 | n, nvme.Success
	case nvme.FeatWriteCache:
		if cmd.CDW11&1 == 0 {
			return 0, nvme.FeatureNotChanging | nvme.DNR // the cache is below the device and cannot be turned off
		}
		return 0, nvme.Success
	case nvme.FeatArbitration, nvme.FeatTemperature, nvme.FeatErrorRecovery, nvme.FeatAtomicity:
		return 0, nvme.Success // accepted, and without effect
	case nvme.FeatPower:
		if cmd.CDW11&0x1f != 0 {
			return 0, nvme.InvalidField | nvme.DNR // there is power state 0 only
		}
		return 0, nvme.Success
	case nvme.FeatWriteProtect:
		return 0, nvme.FeatureNotChanging | nvme.DNR
	}
	return 0, nvme.InvalidField | nvme.DNR
}

// feature answers Get Features (Base 5.15).
func (c *controller) feature(cmd *nvme.Command) (uint64, nvme.Status) {
	if cmd.CDW10>>8&7 != 0 {
		return 0, nvme.InvalidField | nvme.DNR // ONCS does not offer Select
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	switch uint8(cmd.CDW10) {
	case nvme.FeatAsyncConfig:
		return uint64(c.asyncCfg), nvme.Success
	case nvme.FeatKeepAlive:
		return uint64(c.kato / time.Millisecond), nvme.Success
	}
	if c.s.discovery {
		return 0, nvme.InvalidField | nvme.DNR
	}
	switch uint8(cmd.CDW10) {
	case nvme.FeatQueues:
		n := uint64(c.maxQueues - 1)
		return n<<16 | n, nvme.Success
	case nvme.FeatWriteCache:
		return 1, nvme.Success
	case nvme.FeatTemperature:
		if cmd.CDW11>>20&3 == 1 || cmd.CDW11>>16&0xf > 0 {
			return 0, nvme.Success // under threshold, or a sensor that is not there
		}
		return 0x157, nvme.Success // the default over threshold: WCTEMP
	case nvme.FeatArbitration, nvme.FeatPower, nvme.FeatErrorRecovery, nvme.FeatAtomicity:
		return 0, nvme.Success
	case nvme.FeatWriteProtect:
		n := c.s.lookup(cmd.NSID)
		if n == nil {
			return 0, nvme.InvalidNvmeNamespace | nvme.DNR
		}
		if n.readOnly {
			return 1, nvme.Success
		}
		return 0, nvme.Success
	}
	return 0, nvme.InvalidField | nvme.DNR
}

// getHostID answers with the 128 bit host identifier of Connect.
func (c *conn) getHostID(cmd *nvme.Command) {
	if cmd.CDW11&1 == 0 || c.sub.discovery {
		c.fail(cmd, nvme.InvalidField|nvme.DNR) // EXHID is a must (Base 5.27.1.25)
		return
	}
	c.sendData(cmd, len(c.ctrl.hostID), func(b []byte) { copy(b, c.ctrl.hostID[:]) })
}

// logPage answers Get Log Page (Base 5.16).
func (c *conn) logPage(cmd *nvme.Command) {
	length, off := cmd.LogLength(), cmd.LogOffset()
	if length > uint64(c.t.o.MaxTransfer) || off%4 != 0 {
		c.fail(cmd, nvme.InvalidField|nvme.DNR)
		return
	}
	retain := cmd.CDW10&nvme.LogRetain != 0
	var page []byte
	id := uint8(cmd.CDW10)
	switch {
	case id == nvme.LogDiscovery && c.sub.discovery:
		page = c.t.discoveryLog(c)
	case id == nvme.LogError:
		page = c.ctrl.errorLog()
	case c.sub.discovery && id != nvme.LogSupported:
		c.fail(cmd, nvme.InvalidLogPage|nvme.DNR)
		return
	case id == nvme.LogSupported:
		page = make([]byte, nvme.LogSupportedLen)
		ids := []uint8{nvme.LogSupported, nvme.LogError, nvme.LogSMART, nvme.LogFirmware, nvme.LogChanged}
		if c.sub.discovery {
			ids = []uint8{nvme.LogSupported, nvme.LogError, nvme.LogDiscovery}
		}
		for _, i := range ids {
			page[4*int(i)] = 1
		}
	case id == nvme.LogSMART && cmd.NSID != 0 && cmd.NSID != nvme.NSIDAll:
		c.fail(cmd, nvme.InvalidField|nvme.DNR) // there is none per nvmeNamespace (LPA)
		return
	case id == nvme.LogSMART:
		page = c.ctrl.smart()
	case id == nvme.LogFirmware:
		page = make([]byte, nvme.LogFirmwareLen)
		page[0] = 1
		copy(page[8:16], firmware+"       ")
	case id == nvme.LogChanged:
		page = c.ctrl.changedLog(!retain)
	default:
		c.fail(cmd, nvme.InvalidLogPage|nvme.DNR)
		return
	}
	if off > uint64(len(page)) {
		c.fail(cmd, nvme.InvalidField|nvme.DNR)
		return
	}
	c.sendData(cmd, int(length), func(b []byte) { clear(b[copy(b, page[off:]):]) })
	if !retain {
		switch id {
		case nvme.LogChanged:
			c.ctrl.unmask(nvme.EventNvmeNamespace)
		case nvme.LogDiscovery:
			c.ctrl.unmask(nvme.EventDiscovery)
		}
	}
}

// changedLog is the changed nvmeNamespace list (Base 5.16.1.5).
func (c *controller) changedLog(reset bool) []byte {
	c.mu.Lock()
	defer c.mu.Unlock()
	page := make([]byte, nvme.LogChangedLen)
	if c.overflow {
		nvme.PutList(page, []uint32{nvme.NSIDAll})
	} else {
		ids := make([]uint32, 0, len(c.changedNS))
		for id := range c.changedNS {
			ids = append(ids, id)
		}
		sort.Slice(ids, func(i, j int) bool { return ids[i] < ids[j] })
		nvme.PutList(page, ids)
	}
	if reset {
		c.overflow = false
		clear(c.changedNS)
	}
	return page
}

// errorLog is the error log, the newest entry first (Base 5.16.1.2).
func (c *controller) errorLog() []byte {
	c.mu.Lock()
	defer c.mu.Unlock()
	page := make([]byte, errorEntries*nvme.LogErrorLen)
	for i := range uint64(min(c.errCount, errorEntries)) {
		c.errors[(c.errCount-i)%errorEntries].Put(page[i*nvme.LogErrorLen:])
	}
	return page
}

// smart is the SMART log since the controller was made (Base 5.16.1.3).
func (c *controller) smart() []byte {
	c.mu.Lock()
	s := nvme.SMART{PowerOnHours: uint64(time.Since(c.created) / time.Hour), ErrorEvents: c.errCount}
	sum := c.gone
	for _, q := range c.queues {
		sum.add(&q.work)
	}
	c.mu.Unlock()
	s.ReadCommands, s.WriteCmds, s.ReadBytes, s.WrittenBytes = sum.reads, sum.writes, sum.readBytes, sum.writtenBytes
	page := make([]byte, nvme.LogSMARTLen)
	s.Put(page)
	return page
}

// discoveryLog lists what the host of c may connect to (Base 5.16.1.23).
func (t *Target) discoveryLog(c *conn) []byte {
	t.mu.Lock()
	defer t.mu.Unlock()
	page := make([]byte, nvme.DiscoveryHeader)
	nqns := make([]string, 0, len(t.subsystems))
	for nqn := range t.subsystems {
		nqns = append(nqns, nqn)
	}
	sort.Strings(nqns)
	n := uint64(0)
	for _, nqn := range nqns {
		s := t.subsystems[nqn]
		if !s.allows(c.ctrl.hostNQN) {
			continue
		}
		for _, a := range s.addresses() {
			l := t.listeners[a]
			host, port, _ := net.SplitHostPort(a) // as net.Listen wrote it
			if l.told != "" {
				h, p, _ := net.SplitHostPort(l.told) // as canonical wrote it
				if host = h; p != "0" {
					port = p
				}
			}
			ip := net.ParseIP(host)
			if ip.IsUnspecified() {
				// What a host can use is the address it came to.
				if h, _, err := net.SplitHostPort(c.nc.LocalAddr().String()); err == nil {
					host, ip = h, net.ParseIP(h)
				}
			}
			family := uint8(nvme.FamilyIPv6)
			if ip.To4() != nil {
				family, host = nvme.FamilyIPv4, ip.To4().String()
			}
			if _, err := strconv.Atoi(port); err != nil {
				continue
			}
			e := nvme.DiscoveryEntry{Transport: nvme.TransportTCP, Family: family, SubType: nvme.SubNVM, TREQ: nvme.TREQNoFlow, PortID: l.port,
				CNTLID: nvme.CNTLIDDynamic, AdminSQSize: AdminDepth, Service: port, SubNQN: nqn, Address: host}
			page = append(page, make([]byte, nvme.DiscoveryLen)...)
			e.Put(page[len(page)-nvme.DiscoveryLen:])
			n++
		}
	}
	(&nvme.DiscoveryLog{Generation: t.generation, Entries: n}).Put(page)
	return page
}
