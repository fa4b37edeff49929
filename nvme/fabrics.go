package nvme

import (
	"strings"
	"unicode/utf8"

	"github.com/google/uuid"

	"github.com/thaw-project/thaw/kind"
)

// DiscoveryNQN is the well-known subsystem NQN of every discovery controller
// (Base 4.5).
const DiscoveryNQN = "nqn.2014-08.org.nvmexpress.discovery"

// MaxNQN is the longest NQN in bytes, without its terminating NUL (Base 4.5).
const MaxNQN = 223

// CheckNQN tells what is wrong with a host NQN or subsystem NQN; the error is
// kind.Invalid. As others do it wants the "nqn." prefix, a date, and no NUL or
// space.
func CheckNQN(nqn string) error {
	switch {
	case len(nqn) > MaxNQN:
		return kind.Errorf(kind.Invalid, "NQN of %d bytes is longer than %d", len(nqn), MaxNQN)
	case !strings.HasPrefix(nqn, "nqn.") || len(nqn) < len("nqn.2014-08.x"):
		return kind.Errorf(kind.Invalid, "NQN %q does not begin with nqn.yyyy-mm.", nqn)
	case !utf8.ValidString(nqn) || strings.ContainsAny(nqn, "\x00 \n\t"):
		return kind.Errorf(kind.Invalid, "NQN %q has characters that no NQN has", nqn)
	}
	d := nqn[4:11]
	for i, c := range []byte(d) {
		if i == 4 && c != '-' || i != 4 && (c < '0' || c > '9') {
			return kind.Errorf(kind.Invalid, "NQN %q has no date after nqn.", nqn)
		}
	}
	return nil
}

// Connect is what a Connect command says in its SQE (Base 6.3).
type Connect struct {
	Format    uint16 // RECFMT, 0
	QID       uint16
	SQSize    uint16 // 0's based
	Attr      uint8
	KeepAlive uint32 // KATO in milliseconds, admin queue only
}

// ConnectNoFlowControl is the bit of Connect.Attr by which the host asks to do
// without submission queue flow control.
const ConnectNoFlowControl = 1 << 2

// Parse takes the fields from cmd.
func (c *Connect) Parse(cmd *Command) {
	*c = Connect{Format: uint16(cmd.CDW10), QID: uint16(cmd.CDW10 >> 16), SQSize: uint16(cmd.CDW11), Attr: uint8(cmd.CDW11 >> 16), KeepAlive: cmd.CDW12}
}

// Put sets cmd to the Connect command, without its CID.
func (c *Connect) Put(cmd *Command) {
	*cmd = Command{Opcode: OpFabrics, Flags: FlagSGL, NSID: FabricsConnect, SGL: SGL{Length: ConnectDataLen, ID: SGLInCapsule},
		CDW10: uint32(c.Format) | uint32(c.QID)<<16, CDW11: uint32(c.SQSize) | uint32(c.Attr)<<16, CDW12: c.KeepAlive}
}

// Offsets of fields that a refused Connect names, in the SQE and in its data.
const (
	ConnectOffQID     = 42
	ConnectOffSQSize  = 44
	ConnectOffKATO    = 48
	ConnectOffCNTLID  = 16
	ConnectOffSubNQN  = 256
	ConnectOffHostNQN = 512
)

// ConnectParm makes the result of a refused Connect: where the bad field is
// (Base 6.3).
func ConnectParm(offset uint16, inData bool) uint64 {
	r := uint64(offset)
	if inData {
		r |= 1 << 16
	}
	return r
}

// ConnectDataLen is the length of ConnectData in bytes.
const ConnectDataLen = 1024

// CNTLIDDynamic asks for any controller (Base 6.3).
const CNTLIDDynamic = 0xffff

// ConnectData is the data of a Connect command (Base 6.3).
type ConnectData struct {
	HostID  uuid.UUID
	CNTLID  uint16
	SubNQN  string
	HostNQN string
}

// Parse decodes b, which has ConnectDataLen bytes; the error is kind.Invalid.
func (d *ConnectData) Parse(b []byte) error {
	if len(b) < ConnectDataLen {
		return kind.Errorf(kind.Invalid, "connect data of %d bytes is too short", len(b))
	}
	copy(d.HostID[:], b)
	d.CNTLID = le.Uint16(b[16:])
	d.SubNQN = cString(b[256:512])
	d.HostNQN = cString(b[512:768])
	return nil
}

// Put encodes d into the first ConnectDataLen bytes of b.
func (d *ConnectData) Put(b []byte) {
	clear(b[:ConnectDataLen])
	copy(b, d.HostID[:])
	le.PutUint16(b[16:], d.CNTLID)
	copy(b[256:256+MaxNQN], d.SubNQN)
	copy(b[512:512+MaxNQN], d.HostNQN)
}

// cString is what stands before the first NUL.
func cString(b []byte) string {
	s, _, _ := strings.Cut(string(b), "\x00")
	return s
}

// putASCII fills b with s, padded with spaces.
func putASCII(b []byte, s string) {
	for i := copy(b, s); i < len(b); i++ {
		b[i] = ' '
	}
}

func ascii(b []byte) string { return strings.TrimRight(cString(b), " ") }

// Properties of a controller over Fabrics (Base 3.1.3).
const (
	PropCAP  = 0x00 // 8 bytes
	PropVS   = 0x08
	PropCC   = 0x14
	PropCSTS = 0x1c
	PropNSSR = 0x20
	PropCRTO = 0x68
)

// Version200 is VS of NVM Express 2.0.
const Version200 = 2 << 16

// Bits of CAP (Base 3.1.3.1).
const (
	CAPCQR       = 1 << 16 // contiguous queues required
	CAPTOShift   = 24      // time to become ready, in units of 500 ms
	CAPCSSNVM    = 1 << 37 // the NVM command set
	CAPCRWMS     = 1 << 59 // controller ready with media
	CAPMQESMask  = 0xffff  // entries per queue, 0's based
	CAPTOUnitMs  = 500     //
	CAPMPSMINLog = 12      // CAP.MPSMIN 0 is a page of 4096 bytes
)

// Bits of CC (Base 3.1.3.5).
const (
	CCEnable      = 1 << 0
	CCCSSMask     = 7 << 4
	CCMPSMask     = 0xf << 7
	CCAMSMask     = 7 << 11
	CCSHNMask     = 3 << 14
	CCSHNNormal   = 1 << 14
	CCIOSQESShift = 16
	CCIOCQESShift = 20
)

// Bits of CSTS (Base 3.1.3.6).
const (
	CSTSReady        = 1 << 0
	CSTSFatal        = 1 << 1
	CSTSShutdownMask = 3 << 2
	CSTSShutdownDone = 2 << 2
)

// PropertyGet makes a Property Get command for a property of 4 or 8 bytes
// (Base 6.5).
func PropertyGet(offset uint32, eight bool) Command {
	c := Command{Opcode: OpFabrics, Flags: FlagSGL, NSID: FabricsPropertyGet, CDW11: offset}
	if eight {
		c.CDW10 = 1
	}
	return c
}

// PropertySet makes a Property Set command for a property of 4 bytes (Base 6.6).
func PropertySet(offset, value uint32) Command {
	return Command{Opcode: OpFabrics, Flags: FlagSGL, NSID: FabricsPropertySet, CDW11: offset, CDW12: value}
}

// Transport types, address families and sub types of a discovery log entry
// (Base 5.16.1.23).
const (
	TransportTCP    = 3
	FamilyIPv4      = 1
	FamilyIPv6      = 2
	SubReferral     = 1
	SubNVM          = 2
	SubDiscovery    = 3
	TREQNoFlow      = 1 << 2 // the subsystem can do without flow control
	DiscoveryHeader = 1024   // bytes before the first entry
	DiscoveryLen    = 1024   // bytes of an entry
)

// DiscoveryEntry is one subsystem at one address (Base 5.16.1.23).
type DiscoveryEntry struct {
	Transport, Family, SubType, TREQ uint8
	PortID, CNTLID, AdminSQSize      uint16
	Service                          string // TRSVCID: the port, in decimal
	SubNQN                           string
	Address                          string // TRADDR
}

// Put encodes e into the first DiscoveryLen bytes of b.
func (e *DiscoveryEntry) Put(b []byte) {
	clear(b[:DiscoveryLen])
	b[0], b[1], b[2], b[3] = e.Transport, e.Family, e.SubType, e.TREQ
	le.PutUint16(b[4:], e.PortID)
	le.PutUint16(b[6:], e.CNTLID)
	le.PutUint16(b[8:], e.AdminSQSize)
	putASCII(b[32:64], e.Service)
	copy(b[256:256+MaxNQN], e.SubNQN)
	putASCII(b[512:768], e.Address)
}

// Parse decodes the first DiscoveryLen bytes of b.
func (e *DiscoveryEntry) Parse(b []byte) error {
	if len(b) < DiscoveryLen {
		return kind.Errorf(kind.Invalid, "discovery log entry of %d bytes is too short", len(b))
	}
	*e = DiscoveryEntry{Transport: b[0], Family: b[1], SubType: b[2], TREQ: b[3], PortID: le.Uint16(b[4:]), CNTLID: le.Uint16(b[6:]),
		AdminSQSize: le.Uint16(b[8:]), Service: ascii(b[32:64]), SubNQN: cString(b[256:512]), Address: ascii(b[512:768])}
	return nil
}

// DiscoveryLog is the header of the discovery log page.
type DiscoveryLog struct {
	Generation, Entries uint64
}

// Put encodes l into the first DiscoveryHeader bytes of b.
func (l *DiscoveryLog) Put(b []byte) {
	clear(b[:DiscoveryHeader])
	le.PutUint64(b, l.Generation)
	le.PutUint64(b[8:], l.Entries)
}

// Parse decodes the first 18 bytes of b.
func (l *DiscoveryLog) Parse(b []byte) error {
	if len(b) < 18 {
		return kind.Errorf(kind.Invalid, "discovery log of %d bytes is too short", len(b))
	}
	*l = DiscoveryLog{Generation: le.Uint64(b), Entries: le.Uint64(b[8:])}
	if f := le.Uint16(b[16:]); f != 0 {
		return kind.Errorf(kind.Unsupported, "discovery log of record format %d", f)
	}
	return nil
}
