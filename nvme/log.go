package nvme

// Log pages (Base 5.16.1).
const (
	LogSupported = 0x00
	LogError     = 0x01
	LogSMART     = 0x02
	LogFirmware  = 0x03
	LogChanged   = 0x04 // changed nvmeNamespace list
	LogDiscovery = 0x70
)

// Lengths of log pages in bytes.
const (
	LogSupportedLen = 1024
	LogErrorLen     = 64 // one entry
	LogSMARTLen     = 512
	LogFirmwareLen  = 512
	LogChangedLen   = 4096
)

// GetLogPage makes the command that reads lengthBytes, a multiple of 4, of log page
// id from offset. retain keeps the asynchronous event of the page (Base 5.16).
func GetLogPage(id uint8, nsid uint32, offset uint64, lengthBytes int, retain bool) Command {
	n := uint32(lengthBytes/4 - 1)
	c := Command{Opcode: AdminGetLogPage, Flags: FlagSGL, NSID: nsid, SGL: SGL{Length: uint32(lengthBytes), ID: SGLTransport},
		CDW10: uint32(id) | n<<16, CDW11: n >> 16, CDW12: uint32(offset), CDW13: uint32(offset >> 32)}
	if retain {
		c.CDW10 |= LogRetain
	}
	return c
}

// LogRetain is RAE in CDW10.
const LogRetain = 1 << 15

// LogLength is how many bytes a Get Log Page asks for; LogOffset is from where.
func (c *Command) LogLength() uint64 {
	return (uint64(c.CDW11&0xffff)<<16|uint64(c.CDW10>>16))*4 + 4
}

// LogOffset is the offset in the page in bytes.
func (c *Command) LogOffset() uint64 { return uint64(c.CDW13)<<32 | uint64(c.CDW12) }

// ErrorEntry is an entry of the error log (Base 5.16.1.2).
type ErrorEntry struct {
	Count   uint64 // of all errors of the controller, from 1
	SQID    uint16
	CID     uint16
	Status  Status
	LBA     uint64
	NSID    uint32
	Where   uint16 // parameter error location: byte in bits 7:0, bit in 10:8; 0xffff none
	Opcode  uint8
	Special uint64
}

// Put encodes e into the first LogErrorLen bytes of b.
func (e *ErrorEntry) Put(b []byte) {
	clear(b[:LogErrorLen])
	le.PutUint64(b, e.Count)
	le.PutUint16(b[8:], e.SQID)
	le.PutUint16(b[10:], e.CID)
	le.PutUint16(b[12:], uint16(e.Status)<<1)
	le.PutUint16(b[14:], e.Where)
	le.PutUint64(b[16:], e.LBA)
	le.PutUint32(b[24:], e.NSID)
	b[29] = TransportTCP
	le.PutUint64(b[32:], e.Special)
	b[42], b[43] = 1, e.Opcode
}

// Parse decodes the first LogErrorLen bytes of b.
func (e *ErrorEntry) Parse(b []byte) {
	_ = b[LogErrorLen-1]
	*e = ErrorEntry{Count: le.Uint64(b), SQID: le.Uint16(b[8:]), CID: le.Uint16(b[10:]), Status: Status(le.Uint16(b[12:]) >> 1),
		Where: le.Uint16(b[14:]), LBA: le.Uint64(b[16:]), NSID: le.Uint32(b[24:]), Special: le.Uint64(b[32:]), Opcode: b[43]}
}

// SMART is what Thaw reports in the SMART log (Base 5.16.1.3).
type SMART struct {
	Warning                   uint8
	ReadBytes, WrittenBytes   uint64 // reported in units of 1000 times 512 bytes, rounded up
	ReadCommands, WriteCmds   uint64
	PowerOnHours, ErrorEvents uint64
}

// Put encodes s into the first LogSMARTLen bytes of b.
func (s *SMART) Put(b []byte) {
	clear(b[:LogSMARTLen])
	b[0] = s.Warning
	le.PutUint16(b[1:], 313) // composite temperature, in kelvin
	b[3], b[4] = 100, 10     // available spare and its threshold, in percent
	const unit = 512 * 1000
	le.PutUint64(b[32:], (s.ReadBytes+unit-1)/unit)
	le.PutUint64(b[48:], (s.WrittenBytes+unit-1)/unit)
	le.PutUint64(b[64:], s.ReadCommands)
	le.PutUint64(b[80:], s.WriteCmds)
	le.PutUint64(b[128:], s.PowerOnHours)
	le.PutUint64(b[176:], s.ErrorEvents)
}

// Features (Base 5.27.1).
const (
	FeatArbitration   = 0x01
	FeatPower         = 0x02
	FeatTemperature   = 0x04
	FeatErrorRecovery = 0x05
	FeatWriteCache    = 0x06
	FeatQueues        = 0x07
	FeatAtomicity     = 0x0a
	FeatAsyncConfig   = 0x0b
	FeatKeepAlive     = 0x0f
	FeatHostID        = 0x81
	FeatWriteProtect  = 0x84
)

// FeatSave is SV in CDW10 of Set Features.
const FeatSave = 1 << 31

// Asynchronous events (Base 5.2): result of the request.
const (
	EventNvmeNamespace = 2 | 0x00<<8 | LogChanged<<16
	EventDiscovery     = 2 | 0xf0<<8 | LogDiscovery<<16
)
