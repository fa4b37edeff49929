package nvme

import (
	"bytes"
	"encoding/hex"
	"errors"
	"testing"

	"github.com/google/uuid"

	"github.com/thaw-project/thaw/kind"
)

// TestDigest compares with the vectors of RFC 3720 B.4, the digest that NVMe/TCP took
// over.
func TestDigest(t *testing.T) {
	ascending := make([]byte, 32)
	for i := range ascending {
		ascending[i] = byte(i)
	}
	for want, p := range map[uint32][]byte{
		0x8a9136aa: make([]byte, 32),
		0x62a8ab43: bytes.Repeat([]byte{0xff}, 32),
		0x46dd794e: ascending,
	} {
		if got := CRC32C(p); got != want {
			t.Errorf("CRC32C is %#x, want %#x", got, want)
		}
		if got := CRC32CUpdate(CRC32C(p[:7]), p[7:]); got != want {
			t.Errorf("CRC32C in two steps is %#x, want %#x", got, want)
		}
	}
}

func wire(t *testing.T, got []byte, want string) {
	t.Helper()
	w, err := hex.DecodeString(want)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.HasPrefix(got, w) {
		t.Errorf("wire is\n%x, want\n%x", got[:min(len(got), len(w))], w)
	}
}

// TestWire holds the encodings to bytes written down by hand from the figures.
func TestWire(t *testing.T) {
	b := make([]byte, 4096)
	(&ICReq{HPDA: 3, Digests: Digests{Header: true, Data: true}, MaxR2T: 15}).Put(b)
	wire(t, b, "00008000"+"80000000"+"0000"+"03"+"03"+"0f000000"+"0000")
	(&ICResp{CPDA: 1, Digests: Digests{Data: true}, MaxH2CData: 0x20000}).Put(b)
	wire(t, b, "01008000"+"80000000"+"0000"+"01"+"02"+"00000200"+"0000")

	cmd := Command{Opcode: OpRead, Flags: FlagSGL, CID: 0x1234, NSID: 7, SGL: SGL{Length: 4096, ID: SGLTransport}, CDW12: 7}
	cmd.SetSLBA(0x1_0000_0002)
	if pdo := PutCapsuleCmd(b, &cmd, 0, Digests{}, 4); pdo != 72 {
		t.Errorf("data would start at %d", pdo)
	}
	wire(t, b, "04004800"+"48000000"+"02403412"+"07000000"+"0000000000000000"+"0000000000000000"+
		"0000000000000000"+"00100000"+"0000005a"+"02000000"+"01000000"+"07000000")
	if pdo := PutCapsuleCmd(b, &cmd, 512, Digests{Header: true, Data: true}, 16); pdo != 80 {
		t.Errorf("data starts at %d, want it aligned to 16", pdo)
	}
	wire(t, b, "04034850"+"54020000") // 80 + 512 + 4

	cqe := Completion{Result: 0x0102030405060708, SQHD: 9, SQID: 3, CID: 0x1234, Status: InvalidField | DNR}
	if n := PutCapsuleResp(b, &cqe, Digests{}); n != 24 {
		t.Errorf("response has %d bytes", n)
	}
	wire(t, b, "05001800"+"18000000"+"0807060504030201"+"0900"+"0300"+"3412"+"0480")

	d := Data{CID: 0x1234, TTAG: 5, Offset: 8192, Length: 4096}
	if pdo := PutData(b, TypeC2HData, FlagLast|FlagSuccess, &d, Digests{Header: true}, 4); pdo != 28 {
		t.Errorf("data starts at %d", pdo)
	}
	wire(t, b, "070d181c"+"1c100000"+"34120500"+"00200000"+"00100000"+"00000000")
	if n := PutR2T(b, &d, Digests{}); n != 24 {
		t.Errorf("R2T has %d bytes", n)
	}
	wire(t, b, "09001800"+"18000000"+"34120500"+"00200000"+"00100000"+"00000000")
	if n := (&Term{Type: TypeC2HTermReq, Status: FatalHeaderDigest, Info: 0xaabbccdd}).Put(b, make([]byte, 200)); n != MaxTermLen {
		t.Errorf("termination request has %d bytes", n)
	}
	wire(t, b, "03001800"+"98000000"+"0300"+"ddccbbaa"+"0000000000000000")

	(&Connect{QID: 2, SQSize: 127, Attr: ConnectNoFlowControl, KeepAlive: 5000}).Put(&cmd)
	cmd.Put(b)
	wire(t, b[:64], "7f400000"+"01000000")
	wire(t, b[24:], "0000000000000000"+"00040000"+"00000001"+"0000"+"0200"+"7f00"+"04"+"00"+"88130000")
	cmd = PropertySet(PropCC, 0x460001)
	cmd.Put(b)
	wire(t, b[40:], "00000000"+"14000000"+"01004600")
	cmd = PropertyGet(PropCAP, true)
	cmd.Put(b)
	wire(t, b, "7f400000"+"04000000")
	wire(t, b[40:], "01000000"+"00000000")
	(&Range{Blocks: 3, SLBA: 4}).Put(b)
	wire(t, b, "00000000"+"03000000"+"0400000000000000")
}

// TestIdentifyOffsets holds the identify structures to the byte offsets of their
// figures.
func TestIdentifyOffsets(t *testing.T) {
	b := make([]byte, IdentifyLen)
	c := Controller{Serial: "S1", Model: "M1", Firmware: "F1", CMIC: 2, MDTS: 5, CNTLID: 0x1122, Version: Version200, OAES: 0x100, CTRATT: 1,
		Type: 1, AbortLimit: 3, AsyncLimit: 3, LPA: 4, ErrorEntries: 63, KeepAliveUnit: 1, MaxCommands: 128, NvmeNamespaces: 1024,
		ONCS: 0xd, VWC: 7, SGLS: SGLSupported | SGLOffset, MaxActive: 1024, SubNQN: "nqn.2014-08.org:x", CapsuleSize: 516, ResponseSize: 1, MSDBD: 1, OFCS: 1}
	c.Put(b)
	for off, want := range map[int]string{4: "5331202020", 24: "4d312020", 64: "463120", 76: "0205" + "2211" + "00000200", 92: "00010000" + "01000000",
		111: "01", 258: "0303" + "0004" + "3f", 320: "0100", 512: "6644" + "8000" + "00040000" + "0d00", 525: "07", 536: "01001000" + "00040000",
		768: hex.EncodeToString([]byte("nqn.2014-08.org:x\x00")), 1792: "04020000" + "01000000" + "0000" + "00" + "01" + "0100"} {
		wire(t, b[off:], want)
	}
	var back Controller
	if err := back.Parse(b); err != nil || back != c {
		t.Errorf("parsed %+v, %v; want %+v", back, err, c)
	}

	n := NvmeNamespace{Blocks: 1 << 21, BlockBytes: 4096, Shared: true, DLFEAT: 9, ReadOnly: true, Granularity: 256, NGUID: [16]byte{1}, EUI64: [8]byte{2}}
	n.Put(b)
	for off, want := range map[int]string{0: "0000200000000000" + "0000200000000000" + "0000200000000000" + "10", 30: "01", 33: "09", 68: "ff00ff00", 99: "01",
		104: "01", 120: "02", 128: "00000c00"} {
		wire(t, b[off:], want)
	}
	var ns NvmeNamespace
	if err := ns.Parse(b); err != nil || ns != n {
		t.Errorf("parsed %+v, %v; want %+v", ns, err, n)
	}
	n.PutIndependent(b)
	for off, want := range map[int]string{0: "0001", 3: "00", 8: "01", 14: "0100"} {
		wire(t, b[off:], want)
	}
	d := Descriptors{UUID: uuid.MustParse("00112233-4455-6677-8899-aabbccddeeff"), NGUID: [16]byte{7}, EUI64: [8]byte{8}}
	d.Put(b)
	wire(t, b, "03100000"+"00112233445566778899aabbccddeeff"+"02100000"+"07")
	var db Descriptors
	if err := db.Parse(b); err != nil || db != d {
		t.Errorf("parsed %+v, %v; want %+v", db, err, d)
	}
	b[1] = 17
	if err := db.Parse(b); !errors.Is(err, kind.Invalid) {
		t.Errorf("a UUID of 17 bytes: %v", err)
	}
	PutList(b, []uint32{1, 9})
	wire(t, b, "01000000"+"09000000"+"00000000")
	if l := ParseList(b, nil); len(l) != 2 || l[1] != 9 {
		t.Errorf("list is %v", l)
	}
	e := ErrorEntry{Count: 3, SQID: 1, CID: 2, Status: LBAOutOfRange | DNR, LBA: 77, NSID: 5, Where: 0x28, Opcode: OpRead}
	e.Put(b)
	var eb ErrorEntry
	if eb.Parse(b); eb != e {
		t.Errorf("parsed %+v, want %+v", eb, e)
	}
	g := GetLogPage(LogDiscovery, 0, 1<<33, 1<<20, true)
	if g.LogLength() != 1<<20 || g.LogOffset() != 1<<33 || g.CDW10&LogRetain == 0 {
		t.Errorf("get log page reads %d from %d", g.LogLength(), g.LogOffset())
	}
	de := DiscoveryEntry{Transport: TransportTCP, Family: FamilyIPv4, SubType: SubNVM, PortID: 1, CNTLID: CNTLIDDynamic, AdminSQSize: 32,
		Service: "4420", SubNQN: "nqn.2014-08.org:x", Address: "10.0.0.1"}
	de.Put(b)
	wire(t, b, "030102000100ffff2000")
	var deb DiscoveryEntry
	if err := deb.Parse(b); err != nil || deb != de {
		t.Errorf("parsed %+v, want %+v", deb, de)
	}
	cd := ConnectData{HostID: uuid.New(), CNTLID: 4, SubNQN: "nqn.2014-08.org:a", HostNQN: "nqn.2014-08.org:b"}
	cd.Put(b)
	var cb ConnectData
	if err := cb.Parse(b); err != nil || cb != cd {
		t.Errorf("parsed %+v, want %+v", cb, cd)
	}
}

// TestLayoutRefuses gives Layout headers that are wrong in one field each.
func TestLayoutRefuses(t *testing.T) {
	ok := Common{Type: TypeH2CData, Flags: FlagHeaderDigest | FlagDataDigest, HLEN: 24, PDO: 28, PLEN: 28 + 512 + 4}
	both := Digests{Header: true, Data: true}
	if l, err := ok.Layout(both, 512); err != nil || l != (Layout{Header: 28, Data: 28, Length: 512, Digest: 4}) {
		t.Fatalf("layout is %+v, %v", l, err)
	}
	for _, c := range []struct {
		name   string
		change func(*Common)
		status FatalError
		offset uint32
	}{
		{"unknown type", func(c *Common) { c.Type = 8 }, FatalInvalidHeader, offType},
		{"type past the table", func(c *Common) { c.Type = 200 }, FatalInvalidHeader, offType},
		{"header length", func(c *Common) { c.HLEN = 72 }, FatalInvalidHeader, offHLEN},
		{"no header digest", func(c *Common) { c.Flags = FlagDataDigest }, FatalInvalidHeader, offFlags},
		{"no data digest", func(c *Common) { c.Flags = FlagHeaderDigest }, FatalInvalidHeader, offFlags},
		{"data in the header", func(c *Common) { c.PDO = 24 }, FatalInvalidHeader, offPDO},
		{"data not aligned", func(c *Common) { c.PDO = 30 }, FatalInvalidHeader, offPDO},
		{"PDU shorter than its data", func(c *Common) { c.PLEN = 29 }, FatalInvalidHeader, offPLEN},
		{"more than agreed", func(c *Common) { c.PLEN = 28 + 513 + 4 }, FatalLimitExceeded, offPLEN},
		{"as long as can be said", func(c *Common) { c.PLEN = 1<<32 - 1 }, FatalLimitExceeded, offPLEN},
		{"data where none may be", func(c *Common) { c.Type, c.Flags = TypeR2T, FlagHeaderDigest }, FatalInvalidHeader, offPLEN},
		{"a long termination request", func(c *Common) { c.Type = TypeH2CTermReq }, FatalInvalidHeader, offPLEN},
	} {
		h := ok
		c.change(&h)
		_, err := h.Layout(both, 512)
		var p *PDUError
		if !errors.As(err, &p) || p.Status != c.status || p.Info != c.offset || !errors.Is(err, kind.Invalid) {
			t.Errorf("%s: %v, want status %v at %d", c.name, err, c.status, c.offset)
		}
	}
	var r ICReq
	b := make([]byte, ICLen)
	for off, v := range map[int]byte{8: 1, 10: 32, 11: 4, 0: 1, 2: 64} {
		(&ICReq{}).Put(b)
		b[off] = v
		if err := r.Parse(b); err == nil {
			t.Errorf("an ICReq with %d at offset %d is accepted", v, off)
		}
	}
	var resp ICResp
	(&ICResp{MaxH2CData: 4095}).Put(b)
	if err := resp.Parse(b); err == nil {
		t.Error("an ICResp that allows less than 4096 bytes is accepted")
	}
}

// TestStatus maps errors to statuses and back.
func TestStatus(t *testing.T) {
	for _, k := range []kind.Kind{kind.ReadOnly, kind.NoSpace, kind.Corrupt, kind.Invalid, kind.Unsupported, kind.Unavailable, kind.Canceled, kind.IO} {
		s := StatusOf(kind.Errorf(k, "x"), false)
		if err := s.Err(); kind.Of(err) != k || !errors.Is(err, k) {
			t.Errorf("%v becomes %v and then %v (%v)", k, s, err, kind.Of(err))
		}
	}
	if StatusOf(nil, true) != Success || Success.Err() != nil {
		t.Error("no error is an error")
	}
	for s := range statusNames {
		c := Completion{Status: s | DNR}
		var b [CQELen]byte
		c.Put(b[:])
		var back Completion
		if back.Parse(b[:]); back != c || back.Status.Code() != s {
			t.Errorf("%v comes back as %v", c.Status, back.Status)
		}
	}
}

func TestNQN(t *testing.T) {
	for nqn, ok := range map[string]bool{
		DiscoveryNQN: true, "nqn.2014-08.org.nvmexpress:uuid:1b4e28ba-2fa1-11d2-883f-0016d3cca427": true, "nqn.2016-06.io.spdk:cnode1": true,
		"": false, "nqn.": false, "iqn.2014-08.org:x": false, "nqn.20x4-08.org:x": false, "nqn.2014-08.a b": false, "nqn.2014-08.\x00bc": false,
		"nqn.2014-08." + string(bytes.Repeat([]byte("a"), 211)): true, "nqn.2014-08." + string(bytes.Repeat([]byte("a"), 212)): false,
	} {
		if err := CheckNQN(nqn); (err == nil) != ok {
			t.Errorf("%q: %v", nqn, err)
		}
	}
}

// TestAllocations holds coding of the hot path's PDUs to none.
func TestAllocations(t *testing.T) {
	b := make([]byte, 256)
	var cmd, back Command
	var cqe Completion
	var d Data
	g := Digests{Header: true, Data: true}
	if n := testing.AllocsPerRun(100, func() {
		PutCapsuleCmd(b, &cmd, 0, g, 4)
		c := ParseCommon(b)
		if _, err := c.Layout(g, 4096); err != nil {
			t.Fatal(err)
		}
		if err := CheckHeaderDigest(b, CapsuleCmdLen); err != nil {
			t.Fatal(err)
		}
		back.Parse(b[CommonLen:])
		PutData(b, TypeC2HData, FlagLast, &d, g, 4)
		if err := d.Parse(b, 0); err != nil {
			t.Fatal(err)
		}
		PutCapsuleResp(b, &cqe, g)
		cqe.Parse(b[CommonLen:])
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
