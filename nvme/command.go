package nvme

// Opcodes of the admin command set (Base 5).
const (
	AdminGetLogPage  = 0x02
	AdminIdentify    = 0x06
	AdminAbort       = 0x08
	AdminSetFeatures = 0x09
	AdminGetFeatures = 0x0a
	AdminAsyncEvent  = 0x0c
	AdminKeepAlive   = 0x18
	AdminCrossReset  = 0x38 // Cross-Controller Reset, new in Base 2.3
	OpFabrics        = 0x7f // on every queue (Base 6)
)

// Opcodes of the NVM command set (NVM 3.2).
const (
	OpFlush             = 0x00
	OpWrite             = 0x01
	OpRead              = 0x02
	OpCompare           = 0x05
	OpWriteZeroes       = 0x08
	OpDatasetManagement = 0x09
)

// Fabrics command types (Base 6).
const (
	FabricsPropertySet = 0x00
	FabricsConnect     = 0x01
	FabricsPropertyGet = 0x04
	FabricsAuthSend    = 0x05
	FabricsAuthReceive = 0x06
	FabricsDisconnect  = 0x08
)

// Lengths of queue entries in bytes, and their logarithms as CC and Identify have
// them.
const (
	SQELen  = 64
	CQELen  = 16
	SQELog2 = 6
	CQELog2 = 4
)

// Bits of Command.Flags (Base 3.3.3.1).
const (
	FlagFuse     = 0x03      // FUSE
	FlagPSDT     = 0xc0      // PSDT: mask
	FlagSGL      = 0x01 << 6 // PSDT: SGL, metadata pointer is a buffer; what Fabrics asks for
	FlagSGLMeta  = 0x02 << 6 // PSDT: SGL, metadata pointer is an SGL
	NSIDAll      = 0xffffffff
	SQHDDisabled = 0xffff // SQHD when submission queue flow control is off (Base 6.3)
)

// SGL is the one descriptor of a command (Base 4.1.2).
type SGL struct {
	Address uint64
	Length  uint32 // bytes
	ID      uint8  // type and sub type
}

// SGL identifiers.
const (
	SGLInCapsule = 0x01 // data block, sub type offset: in the capsule
	SGLTransport = 0x5a // transport data block, transport specific A: by data PDUs (TCP 3.3)
)

// Command is a submission queue entry (Base 3.3.3.1).
type Command struct {
	Opcode uint8
	Flags  uint8
	CID    uint16
	NSID   uint32 // byte 4 is FCTYPE in a Fabrics command
	CDW2   uint32
	CDW3   uint32
	MPTR   uint64
	SGL    SGL
	CDW10  uint32
	CDW11  uint32
	CDW12  uint32
	CDW13  uint32
	CDW14  uint32
	CDW15  uint32
}

// Parse decodes the first SQELen bytes of b. Every pattern is a Command.
func (c *Command) Parse(b []byte) {
	_ = b[SQELen-1]
	c.Opcode, c.Flags = b[0], b[1]
	c.CID = le.Uint16(b[2:])
	c.NSID = le.Uint32(b[4:])
	c.CDW2, c.CDW3 = le.Uint32(b[8:]), le.Uint32(b[12:])
	c.MPTR = le.Uint64(b[16:])
	c.SGL = SGL{Address: le.Uint64(b[24:]), Length: le.Uint32(b[32:]), ID: b[39]}
	c.CDW10, c.CDW11, c.CDW12 = le.Uint32(b[40:]), le.Uint32(b[44:]), le.Uint32(b[48:])
	c.CDW13, c.CDW14, c.CDW15 = le.Uint32(b[52:]), le.Uint32(b[56:]), le.Uint32(b[60:])
}

// Put encodes c into the first SQELen bytes of b.
func (c *Command) Put(b []byte) {
	_ = b[SQELen-1]
	b[0], b[1] = c.Opcode, c.Flags
	le.PutUint16(b[2:], c.CID)
	le.PutUint32(b[4:], c.NSID)
	le.PutUint32(b[8:], c.CDW2)
	le.PutUint32(b[12:], c.CDW3)
	le.PutUint64(b[16:], c.MPTR)
	le.PutUint64(b[24:], c.SGL.Address)
	le.PutUint32(b[32:], c.SGL.Length)
	b[36], b[37], b[38], b[39] = 0, 0, 0, c.SGL.ID
	le.PutUint32(b[40:], c.CDW10)
	le.PutUint32(b[44:], c.CDW11)
	le.PutUint32(b[48:], c.CDW12)
	le.PutUint32(b[52:], c.CDW13)
	le.PutUint32(b[56:], c.CDW14)
	le.PutUint32(b[60:], c.CDW15)
}

// CrossReset makes a Cross-Controller Reset: it ends another controller of the same
// host, with all its commands (Base 2.3, 5.4.3). The controller is named by its
// identifier and, since that may be used again, by what its Identify said.
func CrossReset(cntlid uint16, ciu uint8, cirn uint64) Command {
	return Command{Opcode: AdminCrossReset, CDW10: uint32(ciu)<<16 | uint32(cntlid), CDW12: uint32(cirn), CDW13: uint32(cirn >> 32)}
}

// CrossReset is the controller that such a command names.
func (c *Command) CrossReset() (cntlid uint16, ciu uint8, cirn uint64) {
	return uint16(c.CDW10), uint8(c.CDW10 >> 16), uint64(c.CDW13)<<32 | uint64(c.CDW12)
}

// CrossResetDone in the result says that the controller is gone; without it the reset
// goes on.
const CrossResetDone = 1 << 0

// FabricsType is FCTYPE of a Fabrics command.
func (c *Command) FabricsType() uint8 { return uint8(c.NSID) }

// SLBA is the first logical block of a read, write, compare or write zeroes
// (NVM 3.2.4).
func (c *Command) SLBA() uint64 { return uint64(c.CDW11)<<32 | uint64(c.CDW10) }

// SetSLBA sets what SLBA returns.
func (c *Command) SetSLBA(lba uint64) { c.CDW10, c.CDW11 = uint32(lba), uint32(lba>>32) }

// Blocks is the number of logical blocks, from the 0's based NLB.
func (c *Command) Blocks() uint32 { return c.CDW12&0xffff + 1 }

// MaxBlocks is the most logical blocks one command can name.
const MaxBlocks = 1 << 16

// Bits of CDW12 (NVM 3.2.6 and 3.2.8).
const (
	CDW12FUA        = 1 << 30 // force unit access
	CDW12Deallocate = 1 << 25 // DEAC of Write Zeroes
	CDW12Protection = 0xf << 26
)

// Completion is a completion queue entry (Base 3.3.3.2).
type Completion struct {
	Result uint64 // dwords 0 and 1
	SQHD   uint16
	SQID   uint16
	CID    uint16
	Status Status
}

// Parse decodes the first CQELen bytes of b.
func (c *Completion) Parse(b []byte) {
	_ = b[CQELen-1]
	*c = Completion{Result: le.Uint64(b), SQHD: le.Uint16(b[8:]), SQID: le.Uint16(b[10:]),
		CID: le.Uint16(b[12:]), Status: Status(le.Uint16(b[14:]) >> 1)}
}

// Put encodes c into the first CQELen bytes of b. The phase bit is reserved in
// Fabrics and stays 0.
func (c *Completion) Put(b []byte) {
	_ = b[CQELen-1]
	le.PutUint64(b, c.Result)
	le.PutUint16(b[8:], c.SQHD)
	le.PutUint16(b[10:], c.SQID)
	le.PutUint16(b[12:], c.CID)
	le.PutUint16(b[14:], uint16(c.Status)<<1)
}

// Range is one range of Dataset Management (NVM 3.2.3).
type Range struct {
	Blocks uint32
	SLBA   uint64
}

// RangeLen is the length of a Range on the wire in bytes, MaxRanges how many one
// command carries, DSMDeallocate the attribute AD in CDW11.
const (
	RangeLen      = 16
	MaxRanges     = 256
	DSMDeallocate = 1 << 2
)

// Parse decodes the first RangeLen bytes of b.
func (r *Range) Parse(b []byte) { *r = Range{Blocks: le.Uint32(b[4:]), SLBA: le.Uint64(b[8:])} }

// Put encodes r into the first RangeLen bytes of b.
func (r *Range) Put(b []byte) {
	le.PutUint32(b, 0)
	le.PutUint32(b[4:], r.Blocks)
	le.PutUint64(b[8:], r.SLBA)
}
