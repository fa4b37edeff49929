package nvmf_test

import (
	"bytes"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/nvme"
	"github.com/thaw-project/thaw/target/nvmf"
)

// TestConnectRefused goes through what Connect has to refuse and how.
func TestConnectRefused(t *testing.T) {
	tg, addr := start(t, nvmf.Options{MaxQueues: 2, QueueDepth: 64})
	if err := tg.CreateSubsystem(nvmf.SubsystemConfig{NQN: "nqn.2014-08.org.example:closed"}); err != nil {
		t.Fatal(err)
	}
	if _, err := tg.AddListener("nqn.2014-08.org.example:closed", nvmf.ListenerConfig{Address: addr}); err != nil {
		t.Fatal(err)
	}
	if err := tg.CreateSubsystem(nvmf.SubsystemConfig{NQN: "nqn.2014-08.org.example:elsewhere", AllowAnyHost: true}); err != nil {
		t.Fatal(err)
	}
	a := admin(t, addr, subNQN, 0)
	fresh := func() *peer { p := dial(t, addr); p.init(nvme.Digests{}, 0); return p }
	good := nvme.Connect{SQSize: 31}
	for _, c := range []struct {
		what   string
		f      nvme.Connect
		data   []byte
		status nvme.Status
		result uint64
	}{
		{"format", nvme.Connect{Format: 1, SQSize: 31}, connectData(subNQN, hostNQN, 0xffff), nvme.ConnectFormat, 0},
		{"queue of one entry", nvme.Connect{}, connectData(subNQN, hostNQN, 0xffff), nvme.ConnectInvalidParm, nvme.ConnectParm(44, false)},
		{"long admin queue", nvme.Connect{SQSize: 4095}, connectData(subNQN, hostNQN, 0xffff), nvme.ConnectInvalidParm, nvme.ConnectParm(44, false)},
		{"long queue", nvme.Connect{QID: 1, SQSize: 64}, connectData(subNQN, hostNQN, a.cntlid), nvme.ConnectInvalidParm, nvme.ConnectParm(44, false)},
		{"queue that was not granted", nvme.Connect{QID: 3, SQSize: 31}, connectData(subNQN, hostNQN, a.cntlid), nvme.ConnectInvalidParm, nvme.ConnectParm(42, false)},
		{"unknown subsystem", good, connectData(subNQN+"x", hostNQN, 0xffff), nvme.ConnectInvalidParm, nvme.ConnectParm(256, true)},
		{"subsystem of another listener", good, connectData("nqn.2014-08.org.example:elsewhere", hostNQN, 0xffff), nvme.ConnectInvalidParm, nvme.ConnectParm(256, true)},
		{"no host NQN", good, connectData(subNQN, "", 0xffff), nvme.ConnectInvalidParm, nvme.ConnectParm(512, true)},
		{"host not allowed", good, connectData("nqn.2014-08.org.example:closed", hostNQN, 0xffff), nvme.ConnectInvalidHost, 0},
		{"static controller", good, connectData(subNQN, hostNQN, 1), nvme.ConnectInvalidParm, nvme.ConnectParm(16, true)},
		{"unknown controller", nvme.Connect{QID: 1, SQSize: 31}, connectData(subNQN, hostNQN, a.cntlid+1), nvme.ConnectInvalidParm, nvme.ConnectParm(16, true)},
		{"controller of another host", nvme.Connect{QID: 1, SQSize: 31}, connectData(subNQN, hostNQN+"x", a.cntlid), nvme.ConnectInvalidParm, nvme.ConnectParm(16, true)},
	} {
		r := fresh().status(c.status, c.what, connectCommand(c.f), c.data)
		if r.Result != c.result || r.Status&nvme.DNR == 0 {
			t.Errorf("%s: result %#x, status %v; want %#x and do not retry", c.what, r.Result, r.Status, c.result)
		}
	}
	p := fresh()
	p.status(nvme.SequenceError, "read before connect", rw(nvme.OpRead, 1, 0, 1, nvme.SGLTransport), nil)
	p.status(nvme.SequenceError, "write with data before connect", rw(nvme.OpWrite, 1, 0, 1, nvme.SGLInCapsule), make([]byte, 512))
	short := connectCommand(good)
	short.SGL.Length = 512
	p.status(nvme.SGLLengthInvalid, "short connect data", short, make([]byte, 512))
	p.status(nvme.Success, "connect after refusals", connectCommand(good), connectData(subNQN, hostNQN, 0xffff))
	p.status(nvme.SequenceError, "second connect", connectCommand(good), connectData(subNQN, hostNQN, 0xffff))
	p.status(nvme.SequenceError, "identify before enable", nvme.Command{Opcode: nvme.AdminIdentify, CDW10: 1, SGL: nvme.SGL{Length: 4096, ID: nvme.SGLTransport}}, nil)
	q := queue(t, addr, a, 1, 31, nvme.Digests{})
	r := fresh().status(nvme.InvalidQueue, "queue that exists", connectCommand(nvme.Connect{QID: 1, SQSize: 31}), connectData(subNQN, hostNQN, a.cntlid))
	if r.Status&nvme.DNR == 0 {
		t.Errorf("%v", r.Status)
	}
	q.status(nvme.Success, "disconnect", nvme.Command{Opcode: nvme.OpFabrics, NSID: nvme.FabricsDisconnect}, nil)
	q.gone()
	a.status(nvme.InvalidQueueType, "disconnect the admin queue", nvme.Command{Opcode: nvme.OpFabrics, NSID: nvme.FabricsDisconnect}, nil)
	eventually(t, "the queue can be connected again", func() bool {
		for _, c := range tg.Subsystems()[1].Controllers {
			if c.CNTLID == a.cntlid {
				return c.Queues == 0
			}
		}
		return false
	})
	queue(t, addr, a, 1, 31, nvme.Digests{})
}

// TestRegisters reads and writes properties through enable, reset and shutdown.
func TestRegisters(t *testing.T) {
	_, addr := start(t, nvmf.Options{QueueDepth: 64})
	p := dial(t, addr)
	p.init(nvme.Digests{}, 0)
	p.status(nvme.Success, "connect", connectCommand(nvme.Connect{SQSize: 31}), connectData(subNQN, hostNQN, 0xffff))
	get := func(off uint32, eight bool) uint64 { c, _ := p.do(nvme.PropertyGet(off, eight), nil); return c.Result }
	if v := get(nvme.PropCAP, true); v&0xffff != 63 || v&nvme.CAPCSSNVM == 0 || v>>24&0xff == 0 {
		t.Errorf("CAP is %#x", v)
	}
	if v := get(nvme.PropVS, false); v != 0x20000 {
		t.Errorf("VS is %#x", v)
	}
	p.status(nvme.InvalidField, "CAP as 4 bytes", nvme.PropertyGet(nvme.PropCAP, false), nil)
	p.status(nvme.InvalidField, "a register that is none", nvme.PropertyGet(0x1000, false), nil)
	p.status(nvme.InvalidField, "set CSTS", nvme.PropertySet(nvme.PropCSTS, 1), nil)
	csts := func(want uint64, what string) {
		t.Helper()
		if v := get(nvme.PropCSTS, false); v != want {
			t.Errorf("CSTS is %#x %s, want %#x", v, what, want)
		}
	}
	csts(0, "before enable")
	p.status(nvme.Success, "enable with bad entry sizes", nvme.PropertySet(nvme.PropCC, 0x110001), nil)
	csts(nvme.CSTSFatal, "after bad entry sizes")
	p.status(nvme.Success, "disable", nvme.PropertySet(nvme.PropCC, 0), nil)
	csts(0, "after reset")
	p.status(nvme.Success, "enable", nvme.PropertySet(nvme.PropCC, 0x460001), nil)
	csts(nvme.CSTSReady, "after enable")
	p.status(nvme.Success, "shutdown", nvme.PropertySet(nvme.PropCC, 0x460001|nvme.CCSHNNormal), nil)
	csts(nvme.CSTSReady|nvme.CSTSShutdownDone, "after shutdown")
	p.status(nvme.Success, "disable", nvme.PropertySet(nvme.PropCC, 0), nil)
	p.status(nvme.Success, "enable", nvme.PropertySet(nvme.PropCC, 0x460001), nil)
	csts(nvme.CSTSReady, "after another enable")
}

// TestReset drops the I/O queues of a controller that is reset.
func TestReset(t *testing.T) {
	_, addr := start(t, nvmf.Options{})
	a := admin(t, addr, subNQN, 0)
	q := queue(t, addr, a, 1, 31, nvme.Digests{})
	a.status(nvme.Success, "disable", nvme.PropertySet(nvme.PropCC, 0), nil)
	q.gone()
	a.nc.Close()
}

// TestCrossReset ends a controller by another of the same host, and no other way.
func TestCrossReset(t *testing.T) {
	_, addr := start(t, nvmf.Options{})
	instance := func(p *peer) (id nvme.Controller) {
		t.Helper()
		cqe, b := p.do(identify(nvme.CNSController, 0), nil)
		if err := errors.Join(cqe.Status.Err(), id.Parse(b)); err != nil {
			t.Fatal(err)
		}
		return id
	}
	a, b, c := admin(t, addr, subNQN, 0), admin(t, addr, subNQN, 0), admin(t, addr, subNQN, 0)
	q := queue(t, addr, b, 1, 31, nvme.Digests{})
	ida, idb, idc := instance(a), instance(b), instance(c)
	if idb.CrossResetLimit == 0 || idb.CIU == 0 || idb.CIRN == 0 || idb.CIRN == idc.CIRN {
		t.Errorf("instances %+v and %+v", idb, idc)
	}
	done := func(what string, cmd nvme.Command) {
		t.Helper()
		if cqe := a.status(nvme.Success, what, cmd, nil); cqe.Result&nvme.CrossResetDone == 0 {
			t.Errorf("%s: result %#x", what, cqe.Result)
		}
	}
	a.status(nvme.InvalidField, "itself", nvme.CrossReset(ida.CNTLID, ida.CIU, ida.CIRN), nil)
	done("an identifier that is not used", nvme.CrossReset(0x1234, 1, 1))
	done("an earlier instance", nvme.CrossReset(idb.CNTLID, idb.CIU-1, idb.CIRN))
	done("another instance", nvme.CrossReset(idb.CNTLID, idb.CIU, idb.CIRN+2))
	b.status(nvme.Success, "keep alive", nvme.Command{Opcode: nvme.AdminKeepAlive}, nil)
	done("the other", nvme.CrossReset(idb.CNTLID, idb.CIU, idb.CIRN))
	b.gone()
	q.gone()
	c.status(nvme.Success, "keep alive", nvme.Command{Opcode: nvme.AdminKeepAlive}, nil)
	// A controller that is reset is another instance.
	c.status(nvme.Success, "disable", nvme.PropertySet(nvme.PropCC, 0), nil)
	c.status(nvme.Success, "enable", nvme.PropertySet(nvme.PropCC, 0x460001), nil)
	if again := instance(c); again.CIU == idc.CIU || again.CIRN == idc.CIRN {
		t.Errorf("%+v is the instance of before the reset", again)
	}
	done("the instance of before", nvme.CrossReset(idc.CNTLID, idc.CIU, idc.CIRN))
	c.status(nvme.Success, "keep alive", nvme.Command{Opcode: nvme.AdminKeepAlive}, nil)
}

// TestResetWaits: a reset is over once no command of the I/O queues runs any more.
func TestResetWaits(t *testing.T) {
	tg, addr := start(t, nvmf.Options{})
	m := &memory{data: make([]byte, 1<<20), gate: make(chan struct{})}
	nsid := add(t, tg, nvmf.NvmeNamespaceConfig{Device: m})
	a := admin(t, addr, subNQN, 0)
	q := queue(t, addr, a, 1, 31, nvme.Digests{})
	q.write(q.capsule(rw(nvme.OpWrite, nsid, 0, 1, nvme.SGLInCapsule), make([]byte, 512)))
	eventually(t, "the write runs", func() bool { return nvmf.Using(tg, subNQN, nsid) == 1 })
	ready := func() uint64 {
		return a.status(nvme.Success, "get CSTS", nvme.PropertyGet(nvme.PropCSTS, false), nil).Result & nvme.CSTSReady
	}
	a.status(nvme.Success, "disable", nvme.PropertySet(nvme.PropCC, 0), nil)
	if ready() == 0 {
		t.Error("the reset is over while a write runs")
	}
	close(m.gate)
	eventually(t, "the reset ends", func() bool { return ready() == 0 })
}

func identify(cns uint8, nsid uint32) nvme.Command {
	return nvme.Command{Opcode: nvme.AdminIdentify, NSID: nsid, CDW10: uint32(cns), SGL: nvme.SGL{Length: 4096, ID: nvme.SGLTransport}}
}

func feature(op uint8, id, cdw11 uint32) nvme.Command {
	return nvme.Command{Opcode: op, CDW10: id, CDW11: cdw11}
}

// TestAdmin goes through identify, features, log pages and what they refuse.
func TestAdmin(t *testing.T) {
	tg, addr := start(t, nvmf.Options{MaxQueues: 4})
	nsid := add(t, tg, nvmf.NvmeNamespaceConfig{NSID: 5, Device: &memory{data: make([]byte, 1<<20)}, NGUID: [16]byte{0xaa}})
	a := admin(t, addr, subNQN, 10000)
	_, b := a.do(identify(nvme.CNSController, 0), nil)
	var id nvme.Controller
	if err := id.Parse(b); err != nil || id.CNTLID != a.cntlid || id.Serial != "SN1" || id.Model != "Model" || id.SubNQN != subNQN || id.Type != 1 ||
		id.MDTS != 5 || id.CapsuleSize != (64+8192)/16 || id.KeepAliveUnit == 0 || id.SGLS&3 == 0 || id.MaxCommands != 128 {
		t.Errorf("controller is %+v, %v", id, err)
	}
	_, b = a.do(identify(nvme.CNSActiveList, 0), nil)
	if l := nvme.ParseList(b, nil); len(l) != 1 || l[0] != nsid {
		t.Errorf("active list is %v", l)
	}
	_, b = a.do(identify(nvme.CNSActiveList, 5), nil)
	if l := nvme.ParseList(b, nil); len(l) != 0 {
		t.Errorf("active list behind 5 is %v", l)
	}
	for _, cns := range []uint8{nvme.CNSNvmeNamespace, nvme.CNSSetNvmeNamespace, nvme.CNSIndependent} {
		if c, b := a.do(identify(cns, 6), nil); !c.Status.OK() || !bytes.Equal(b, make([]byte, 4096)) {
			t.Errorf("CNS %#x of an inactive nvmeNamespace: %v", cns, c.Status)
		}
		a.status(nvme.InvalidNvmeNamespace, "identify past the last nvmeNamespace", identify(cns, 1025), nil)
		a.status(nvme.InvalidNvmeNamespace, "identify nvmeNamespace 0", identify(cns, 0), nil)
	}
	for _, cns := range []uint8{nvme.CNSSetController, nvme.CNSCommandSets, nvme.CNSDescriptors, nvme.CNSSetActiveList} {
		a.status(nvme.Success, "identify", identify(cns, nsid), nil)
	}
	a.status(nvme.InvalidField, "an unknown CNS", identify(0x7e, 0), nil)
	short := identify(nvme.CNSController, 0)
	short.SGL.Length = 512
	a.status(nvme.SGLLengthInvalid, "identify into 512 bytes", short, nil)
	short.SGL.ID = 0
	a.status(nvme.SGLTypeInvalid, "an unknown SGL", short, nil)
	prp := identify(nvme.CNSController, 0)
	prp.Flags = nvme.FlagSGLMeta
	a.status(nvme.InvalidField, "another PSDT", prp, nil)
	fused := identify(nvme.CNSController, 0)
	fused.Flags = nvme.FlagSGL | 1
	a.status(nvme.InvalidField, "a fused command", fused, nil)
	a.status(nvme.InvalidOpcode, "an unknown command", nvme.Command{Opcode: 0xc0}, nil)
	a.status(nvme.InvalidOpcode, "authentication that nobody asked for", nvme.Command{Opcode: nvme.OpFabrics, NSID: nvme.FabricsAuthSend}, nil)

	set := func(f, v uint32) nvme.Command { return feature(nvme.AdminSetFeatures, f, v) }
	if c := a.status(nvme.Success, "queues", set(nvme.FeatQueues, 7<<16|15), nil); c.Result != 3<<16|3 {
		t.Errorf("granted queues are %#x", c.Result)
	}
	a.status(nvme.SequenceError, "queues again", set(nvme.FeatQueues, 0), nil)
	a.status(nvme.InvalidField, "65536 queues", set(nvme.FeatQueues, 0xffff), nil)
	a.status(nvme.FeatureNotSaveable, "a saved feature", set(nvme.FeatKeepAlive|nvme.FeatSave, 0), nil)
	a.status(nvme.Success, "keep alive", set(nvme.FeatKeepAlive, 15001), nil)
	if c := a.status(nvme.Success, "keep alive", feature(nvme.AdminGetFeatures, nvme.FeatKeepAlive, 0), nil); c.Result != 15100 {
		t.Errorf("keep alive timeout is %d", c.Result)
	}
	a.status(nvme.SequenceError, "set host identifier", set(nvme.FeatHostID, 1), nil)
	hostID := feature(nvme.AdminGetFeatures, nvme.FeatHostID, 1)
	hostID.SGL = nvme.SGL{Length: 16, ID: nvme.SGLTransport}
	if c, b := a.do(hostID, nil); !c.Status.OK() || len(b) != 16 || b[0] != 1 {
		t.Errorf("host identifier is %x, %v", b, c.Status)
	}
	a.status(nvme.InvalidField, "an unknown feature", set(0xdd, 0), nil)
	a.status(nvme.Success, "keep alive", nvme.Command{Opcode: nvme.AdminKeepAlive}, nil)

	a.status(nvme.InvalidLogPage, "an unknown log page", nvme.GetLogPage(0xc5, 0, 0, 512, false), nil)
	a.status(nvme.InvalidLogPage, "discovery log of a subsystem", nvme.GetLogPage(nvme.LogDiscovery, 0, 0, 512, false), nil)
	a.status(nvme.InvalidField, "a log page past its end", nvme.GetLogPage(nvme.LogSMART, 0, 1024, 512, false), nil)
	a.status(nvme.InvalidField, "more of a log page than MDTS", nvme.GetLogPage(nvme.LogError, 0, 0, 1<<20, false), nil)
	for id, n := range map[uint8]int{nvme.LogSupported: 1024, nvme.LogSMART: 512, nvme.LogFirmware: 512, nvme.LogChanged: 4096} {
		if c, b := a.do(nvme.GetLogPage(id, nvme.NSIDAll, 0, n, false), nil); !c.Status.OK() || len(b) != n {
			t.Errorf("log page %#x: %v and %d bytes", id, c.Status, len(b))
		}
	}
	_, b = a.do(nvme.GetLogPage(nvme.LogError, nvme.NSIDAll, 0, 128, false), nil)
	var e nvme.ErrorEntry
	if e.Parse(b); e.Count == 0 || e.Status.Code() != nvme.InvalidField || e.Opcode != nvme.AdminGetLogPage || e.CID == 0 {
		t.Errorf("the newest error is %+v", e)
	}
	n := e.Count
	if e.Parse(b[64:]); e.Count != n-1 {
		t.Errorf("the error before %d is %d", n, e.Count)
	}
}

// TestIO goes through what I/O commands do and refuse.
func TestIO(t *testing.T) {
	for _, inline := range []bool{true, false} {
		tg, addr := start(t, nvmf.Options{R2TBytes: 512})
		m := &memory{data: make([]byte, 1<<20)}
		nsid := add(t, tg, nvmf.NvmeNamespaceConfig{Device: m, Inline: inline})
		ro := add(t, tg, nvmf.NvmeNamespaceConfig{Device: &memory{data: make([]byte, 4096), ro: true}, Inline: inline})
		a := admin(t, addr, subNQN, 0)
		q := queue(t, addr, a, 1, 31, nvme.Digests{Header: true, Data: true})
		data := bytes.Repeat([]byte("0123456789abcdef"), 64)
		q.status(nvme.Success, "write", rw(nvme.OpWrite, nsid, 3, 2, nvme.SGLInCapsule), data)
		if _, got := q.do(rw(nvme.OpRead, nsid, 3, 2, nvme.SGLTransport), nil); !bytes.Equal(got, data) {
			t.Errorf("read back %d bytes that differ", len(got))
		}
		q.status(nvme.Success, "compare", rw(nvme.OpCompare, nsid, 3, 2, nvme.SGLInCapsule), data)
		q.status(nvme.CompareFailure, "compare with other data", rw(nvme.OpCompare, nsid, 4, 2, nvme.SGLInCapsule), data)
		fua := rw(nvme.OpWrite, nsid, 3, 2, nvme.SGLInCapsule)
		fua.CDW12 |= nvme.CDW12FUA
		q.status(nvme.Success, "write with FUA", fua, data)
		q.status(nvme.Success, "flush", nvme.Command{Opcode: nvme.OpFlush, NSID: nsid}, nil)
		r := make([]byte, 32)
		(&nvme.Range{Blocks: 1, SLBA: 3}).Put(r)
		(&nvme.Range{Blocks: 1, SLBA: 100}).Put(r[16:])
		dsm := nvme.Command{Opcode: nvme.OpDatasetManagement, NSID: nsid, CDW10: 1, CDW11: nvme.DSMDeallocate, SGL: nvme.SGL{Length: 32, ID: nvme.SGLInCapsule}}
		q.status(nvme.Success, "deallocate", dsm, r)
		same(t, "after deallocate", m.data[3*512:5*512], append(make([]byte, 512), data[512:]...))
		(&nvme.Range{Blocks: 2, SLBA: 2047}).Put(r[16:])
		q.status(nvme.LBAOutOfRange, "deallocate past the end", dsm, r)
		// Linux sends a page whatever the number of ranges.
		page := make([]byte, 4096)
		(&nvme.Range{Blocks: 1, SLBA: 3}).Put(page)
		(&nvme.Range{Blocks: 1, SLBA: 4}).Put(page[16:])
		q.status(nvme.Success, "write", rw(nvme.OpWrite, nsid, 3, 2, nvme.SGLInCapsule), data)
		roomy := nvme.Command{Opcode: nvme.OpDatasetManagement, NSID: nsid, CDW11: nvme.DSMDeallocate, SGL: nvme.SGL{Length: 4096, ID: nvme.SGLInCapsule}}
		q.status(nvme.Success, "deallocate with room for more ranges", roomy, page)
		same(t, "after deallocate of the first range", m.data[3*512:5*512], append(make([]byte, 512), data[512:]...))
		roomy.SGL.Length = 4096 + 16
		q.status(nvme.SGLLengthInvalid, "deallocate with room for 257 ranges", roomy, append(page, make([]byte, 16)...))
		wz := rw(nvme.OpWriteZeroes, nsid, 4, 1, 0)
		wz.SGL = nvme.SGL{}
		q.status(nvme.Success, "write zeroes", wz, nil)
		same(t, "after write zeroes", m.data[4*512:5*512], make([]byte, 512))

		q.status(nvme.LBAOutOfRange, "read past the end", rw(nvme.OpRead, nsid, 2047, 2, nvme.SGLTransport), nil)
		q.status(nvme.LBAOutOfRange, "read where the block number wraps", rw(nvme.OpRead, nsid, 1<<64-1, 2, nvme.SGLTransport), nil)
		q.status(nvme.LBAOutOfRange, "write past the end", rw(nvme.OpWrite, nsid, 2048, 1, nvme.SGLInCapsule), data[:512])
		q.status(nvme.InvalidField, "read more than MDTS", rw(nvme.OpRead, nsid, 0, 257, nvme.SGLTransport), nil)
		q.status(nvme.InvalidNvmeNamespace, "read nvmeNamespace 9", rw(nvme.OpRead, 9, 0, 1, nvme.SGLTransport), nil)
		q.status(nvme.InvalidNvmeNamespace, "flush all", nvme.Command{Opcode: nvme.OpFlush, NSID: nvme.NSIDAll}, nil)
		q.status(nvme.InvalidOpcode, "an unknown command", nvme.Command{Opcode: 0x99, NSID: nsid}, nil)
		q.status(nvme.WriteProtected, "write to a read-only nvmeNamespace", rw(nvme.OpWrite, ro, 0, 1, nvme.SGLInCapsule), data[:512])
		q.status(nvme.SGLLengthInvalid, "less data than blocks", rw(nvme.OpWrite, nsid, 0, 2, nvme.SGLInCapsule), data[:512])
		q.status(nvme.SGLTypeInvalid, "read into the capsule", rw(nvme.OpRead, nsid, 0, 1, nvme.SGLInCapsule), nil)
		q.status(nvme.InvalidField, "data beside a transport SGL", rw(nvme.OpWrite, nsid, 0, 1, nvme.SGLTransport), data[:512])
		off := rw(nvme.OpWrite, nsid, 0, 1, nvme.SGLInCapsule)
		off.SGL.Address = 4
		q.status(nvme.SGLOffsetInvalid, "an offset in the capsule", off, data[:512])
		q.status(nvme.InvalidField, "property get on an I/O queue", nvme.PropertyGet(nvme.PropCAP, true), nil)

		// A wrong data digest fails the command and nothing else.
		b := q.capsule(func() nvme.Command {
			c := rw(nvme.OpWrite, nsid, 8, 1, nvme.SGLInCapsule)
			c.CID = 900
			return c
		}(), data[:512])
		b[len(b)-1] ^= 1
		q.write(b)
		if c, _ := q.response(); c.CID != 900 || c.Status.Code() != nvme.TransientTransport {
			t.Errorf("a wrong data digest: %v", c.Status)
		}
		same(t, "a block whose data digest was wrong", m.data[8*512:9*512], make([]byte, 512))

		// R2Ts: up to 4 outstanding, answered in any order.
		w := rw(nvme.OpWrite, nsid, 16, 6, nvme.SGLTransport)
		w.CID = 901
		q.write(q.capsule(w, nil))
		payload := bytes.Repeat([]byte("R2T!"), 6*128)
		var asked []nvme.Data
		for range 4 {
			u := q.must(nvme.TypeR2T)
			var d nvme.Data
			if err := d.ParseR2T(u.header); err != nil || d.CID != 901 || d.Length != 512 {
				t.Fatalf("R2T %+v, %v", d, err)
			}
			asked = append(asked, d)
		}
		for len(asked) > 0 {
			d := asked[len(asked)-1]
			asked = asked[:len(asked)-1]
			q.write(h2c(q, d, nvme.FlagLast, payload[d.Offset:d.Offset+d.Length]))
			if d.Offset == 2*512 || d.Offset == 3*512 {
				// Answering one lets the target ask for the rest.
				u := q.must(nvme.TypeR2T)
				var more nvme.Data
				if err := more.ParseR2T(u.header); err != nil {
					t.Fatal(err)
				}
				asked = append(asked, more)
			}
		}
		if c, _ := q.response(); c.CID != 901 || !c.Status.OK() {
			t.Errorf("write by R2T: %v", c.Status)
		}
		same(t, "data by R2T", m.data[16*512:22*512], payload)
		if c, _ := a.do(nvme.GetLogPage(nvme.LogSMART, nvme.NSIDAll, 0, 512, false), nil); !c.Status.OK() {
			t.Errorf("SMART log: %v", c.Status)
		}
	}
}

func h2c(p *peer, d nvme.Data, flags uint8, data []byte) []byte {
	b := make([]byte, 128)
	d.Length = uint32(len(data))
	n := nvme.PutData(b, nvme.TypeH2CData, flags, &d, p.g, 4)
	b = append(b[:n], data...)
	if p.g.Data {
		c := make([]byte, 4)
		nvme.PutDigest(c, nvme.CRC32C(data))
		b = append(b, c...)
	}
	return b
}

// TestEvents reports each change once, until the log page is read.
func TestEvents(t *testing.T) {
	tg, addr := start(t, nvmf.Options{})
	a := admin(t, addr, subNQN, 0)
	aer := func(cid uint16) { a.write(a.capsule(nvme.Command{Opcode: nvme.AdminAsyncEvent, CID: cid}, nil)) }
	a.status(nvme.Success, "configure", feature(nvme.AdminSetFeatures, nvme.FeatAsyncConfig, nvme.OAESNvmeNamespace), nil)
	for i := range uint16(4) {
		aer(500 + i)
	}
	aer(504)
	if c, _ := a.response(); c.CID != 504 || c.Status.Code() != nvme.AsyncEventLimit {
		t.Fatalf("a fifth request: %d, %v", c.CID, c.Status)
	}
	add(t, tg, nvmf.NvmeNamespaceConfig{NSID: 3, Device: &memory{data: make([]byte, 4096)}})
	if c, _ := a.response(); c.CID != 500 || uint32(c.Result) != nvme.EventNvmeNamespace {
		t.Fatalf("event is %d, %#x", c.CID, c.Result)
	}
	// Masked until the page is read; then the change that came meanwhile is told.
	add(t, tg, nvmf.NvmeNamespaceConfig{NSID: 4, Device: &memory{data: make([]byte, 4096)}})
	if c := a.status(nvme.Success, "keep alive", nvme.Command{Opcode: nvme.AdminKeepAlive}, nil); !c.Status.OK() {
		t.Fatal("an event came while masked")
	}
	page := nvme.GetLogPage(nvme.LogChanged, nvme.NSIDAll, 0, 4096, false)
	page.CID = 77
	a.write(a.capsule(page, nil))
	seen := map[uint16]bool{}
	var list []uint32
	for range 2 {
		c, b := a.response()
		if seen[c.CID] = true; c.CID == 77 {
			list = nvme.ParseList(b, nil)
		}
	}
	if !seen[77] || !seen[501] || len(list) != 2 || list[0] != 3 || list[1] != 4 {
		t.Fatalf("completions %v, list %v", seen, list)
	}
	c := a.status(nvme.Success, "abort", nvme.Command{Opcode: nvme.AdminAbort, CDW10: 9999 << 16}, nil)
	if c.Result != 1 {
		t.Errorf("abort of nothing: %d", c.Result)
	}
	abort := nvme.Command{Opcode: nvme.AdminAbort, CDW10: 503 << 16, CID: 78}
	a.write(a.capsule(abort, nil))
	first, _ := a.response()
	second, _ := a.response()
	if first.CID == 78 {
		first, second = second, first
	}
	if first.CID != 503 || first.Status.Code() != nvme.AbortRequested || second.CID != 78 || second.Result != 0 {
		t.Errorf("abort of an event request: %+v and %+v", first, second)
	}

	// A discovery controller hears of listeners and hosts.
	d := admin(t, addr, nvme.DiscoveryNQN, 0)
	d.status(nvme.Success, "configure", feature(nvme.AdminSetFeatures, nvme.FeatAsyncConfig, nvme.OAESDiscovery), nil)
	d.write(d.capsule(nvme.Command{Opcode: nvme.AdminAsyncEvent, CID: 500}, nil))
	if err := tg.AddHost(subNQN, hostNQN); err != nil {
		t.Fatal(err)
	}
	if c, _ := d.response(); uint32(c.Result) != nvme.EventDiscovery {
		t.Errorf("discovery event is %#x", c.Result)
	}
	d.status(nvme.InvalidField, "identify an nvmeNamespace by discovery", identify(nvme.CNSNvmeNamespace, 1), nil)
}

// TestAbort ends a write that waits behind others, and not one that runs.
func TestAbort(t *testing.T) {
	tg, addr := start(t, nvmf.Options{QueueDepth: 128})
	m := &memory{data: make([]byte, 1<<20), gate: make(chan struct{})}
	nsid := add(t, tg, nvmf.NvmeNamespaceConfig{Device: m})
	a := admin(t, addr, subNQN, 0)
	q := queue(t, addr, a, 1, 127, nvme.Digests{})
	const n = 70 // more than run at a time
	for i := range uint16(n) {
		c := rw(nvme.OpWrite, nsid, 0, 1, nvme.SGLInCapsule)
		c.CID = i
		q.write(q.capsule(c, make([]byte, 512)))
	}
	dup := rw(nvme.OpWrite, nsid, 0, 1, nvme.SGLInCapsule)
	dup.CID = 0
	q.write(q.capsule(dup, make([]byte, 512)))
	if c, _ := q.response(); c.CID != 0 || c.Status.Code() != nvme.CommandIDConflict {
		t.Errorf("a command identifier in use: %v", c.Status)
	}
	if c := a.status(nvme.Success, "abort", nvme.Command{Opcode: nvme.AdminAbort, CDW10: 1 | 0<<16}, nil); c.Result != 1 {
		t.Error("a running write was aborted")
	}
	if c := a.status(nvme.Success, "abort", nvme.Command{Opcode: nvme.AdminAbort, CDW10: 1 | (n-1)<<16}, nil); c.Result != 0 {
		t.Error("a waiting write was not aborted")
	}
	if c, _ := q.response(); c.CID != n-1 || c.Status.Code() != nvme.AbortRequested {
		t.Errorf("the aborted write ends with %v", c.Status)
	}
	close(m.gate)
	for range n - 1 {
		if c, _ := q.response(); !c.Status.OK() {
			t.Errorf("write %d: %v", c.CID, c.Status)
		}
	}
}

// TestRemoveWaits returns from removal only when the device is no longer used.
func TestRemoveWaits(t *testing.T) {
	tg, addr := start(t, nvmf.Options{})
	m := &memory{data: make([]byte, 1<<20), gate: make(chan struct{})}
	nsid := add(t, tg, nvmf.NvmeNamespaceConfig{Device: m})
	a := admin(t, addr, subNQN, 0)
	q := queue(t, addr, a, 1, 31, nvme.Digests{})
	q.write(q.capsule(rw(nvme.OpWrite, nsid, 0, 1, nvme.SGLInCapsule), make([]byte, 512)))
	removed := make(chan error)
	// The write must hold the device before it is removed.
	m.gate <- struct{}{}
	q.response()
	q.write(q.capsule(rw(nvme.OpWrite, nsid, 0, 1, nvme.SGLInCapsule), make([]byte, 512)))
	eventually(t, "the write runs", func() bool { return nvmf.Using(tg, subNQN, nsid) == 1 })
	go func() { removed <- tg.RemoveNvmeNamespace(subNQN, nsid) }()
	eventually(t, "it is no longer listed", func() bool { return len(tg.Subsystems()[0].NvmeNamespaces) == 0 })
	select {
	case <-removed:
		t.Fatal("removed while a write runs")
	case <-time.After(50 * time.Millisecond):
	}
	m.gate <- struct{}{}
	if err := <-removed; err != nil {
		t.Fatal(err)
	}
	if c, _ := q.response(); !c.Status.OK() {
		t.Errorf("the write that ran: %v", c.Status)
	}
	q.status(nvme.InvalidNvmeNamespace, "write after removal", rw(nvme.OpWrite, nsid, 0, 1, nvme.SGLInCapsule), make([]byte, 512))
}

// TestManagement goes through what the management calls refuse.
func TestManagement(t *testing.T) {
	tg, addr := start(t, nvmf.Options{})
	disk := &memory{data: make([]byte, 4096)}
	nsid := add(t, tg, nvmf.NvmeNamespaceConfig{Device: disk, NGUID: [16]byte{1}})
	_, twice := tg.AddNvmeNamespace(subNQN, nvmf.NvmeNamespaceConfig{Device: disk, NGUID: [16]byte{1}})
	_, taken := tg.AddNvmeNamespace(subNQN, nvmf.NvmeNamespaceConfig{NSID: nsid, Device: disk})
	_, past := tg.AddNvmeNamespace(subNQN, nvmf.NvmeNamespaceConfig{NSID: 1025, Device: disk})
	_, odd := tg.AddNvmeNamespace(subNQN, nvmf.NvmeNamespaceConfig{Device: &memory{data: make([]byte, 4097)}})
	_, none := tg.AddNvmeNamespace(subNQN+"x", nvmf.NvmeNamespaceConfig{Device: disk})
	_, again := tg.AddListener(subNQN, nvmf.ListenerConfig{Address: addr})
	_, name := tg.AddListener(subNQN, nvmf.ListenerConfig{Address: "localhost:1"})
	if err := tg.AddHost(subNQN, hostNQN); err != nil {
		t.Fatal(err)
	}
	for i, c := range []struct {
		err  error
		kind kind.Kind
	}{
		{twice, kind.Exists}, {taken, kind.Exists}, {past, kind.NoSpace}, {odd, kind.Invalid}, {none, kind.NotFound}, {again, kind.Exists}, {name, kind.Invalid},
		{tg.CreateSubsystem(nvmf.SubsystemConfig{NQN: subNQN}), kind.Exists},
		{tg.CreateSubsystem(nvmf.SubsystemConfig{NQN: nvme.DiscoveryNQN}), kind.Exists},
		{tg.CreateSubsystem(nvmf.SubsystemConfig{NQN: "x"}), kind.Invalid},
		{tg.CreateSubsystem(nvmf.SubsystemConfig{NQN: subNQN + "y", Serial: strings.Repeat("s", 21)}), kind.Invalid},
		{tg.DeleteSubsystem(subNQN + "x"), kind.NotFound},
		{tg.RemoveNvmeNamespace(subNQN, 99), kind.NotFound},
		{tg.AddHost(subNQN, "x"), kind.Invalid}, {tg.AddHost(subNQN, hostNQN), kind.Exists}, {tg.RemoveHost(subNQN, hostNQN+"x"), kind.NotFound},
		{tg.RemoveListener(subNQN, "127.0.0.1:1"), kind.NotFound},
	} {
		if !errors.Is(c.err, c.kind) {
			t.Errorf("call %d: %v, want %v", i, c.err, c.kind)
		}
	}
	if _, err := nvmf.New(nvmf.Options{MaxTransfer: 5000}); !errors.Is(err, kind.Invalid) {
		t.Errorf("options: %v", err)
	}
	a := admin(t, addr, subNQN, 0)
	if s := tg.Subsystems()[0]; len(s.Controllers) != 1 || s.Controllers[0].HostNQN != hostNQN || len(s.Hosts) != 1 || len(s.Listeners) != 1 || len(s.NvmeNamespaces) != 1 {
		t.Errorf("subsystem is %+v", s)
	}
	if err := tg.DeleteSubsystem(subNQN); err != nil {
		t.Fatal(err)
	}
	a.gone()
	if len(tg.Subsystems()) != 0 {
		t.Error("the subsystem is still listed")
	}
}

// TestStuckDevice has a device that answers nothing, under as many commands as its
// hosts can send. Other devices and removal of others go on.
func TestStuckDevice(t *testing.T) {
	tg, addr := start(t, nvmf.Options{})
	stuck := &memory{data: make([]byte, 1<<20), gate: make(chan struct{})}
	bad := add(t, tg, nvmf.NvmeNamespaceConfig{Device: stuck})
	good := add(t, tg, nvmf.NvmeNamespaceConfig{Device: &memory{data: make([]byte, 1<<20)}})
	var peers []*peer
	for range 4 {
		q := queue(t, addr, admin(t, addr, subNQN, 0), 1, 127, nvme.Digests{})
		for i := range uint16(50) {
			c := rw(nvme.OpWrite, bad, 0, 1, nvme.SGLInCapsule)
			c.CID = i
			q.write(q.capsule(c, make([]byte, 512)))
		}
		peers = append(peers, q)
	}
	eventually(t, "the device has all it can get", func() bool { return nvmf.Using(tg, subNQN, bad) == 64 })
	q := queue(t, addr, admin(t, addr, subNQN, 0), 1, 127, nvme.Digests{})
	q.status(nvme.Success, "write beside a stuck device", rw(nvme.OpWrite, good, 0, 1, nvme.SGLInCapsule), make([]byte, 512))
	peers[0].cid = 1000
	peers[0].status(nvme.Success, "write on a connection with commands that hang", rw(nvme.OpWrite, good, 0, 1, nvme.SGLInCapsule), make([]byte, 512))
	if err := tg.RemoveNvmeNamespace(subNQN, good); err != nil {
		t.Fatal(err)
	}
	close(stuck.gate)
	for _, p := range peers {
		for range 50 {
			if c, _ := p.response(); !c.Status.OK() {
				t.Errorf("write after the device came back: %v", c.Status)
			}
		}
	}
}
