package nvme

import (
	"math/bits"

	"github.com/google/uuid"

	"github.com/thaw-project/thaw/kind"
)

// IdentifyLen is the length of every identify data structure in bytes.
const IdentifyLen = 4096

// CNS values of Identify (Base 5.17.1).
const (
	CNSNvmeNamespace     = 0x00
	CNSController        = 0x01
	CNSActiveList        = 0x02
	CNSDescriptors       = 0x03
	CNSSetNvmeNamespace  = 0x05 // specific to the command set of CDW11 31:24
	CNSSetController     = 0x06
	CNSSetActiveList     = 0x07
	CNSIndependent       = 0x08 // independent of the command set
	CNSCommandSets       = 0x1c
	CommandSetNVM        = 0
	ControllerTypeIO     = 1
	ControllerTypeDisc   = 2
	CMICMultiCtrl        = 1 << 1
	OAESNvmeNamespace    = 1 << 8
	OAESDiscovery        = 1 << 31
	CTRATTHostID128      = 1 << 0
	CTRATTTrafficKeepAlv = 1 << 6
	LPAExtended          = 1 << 2
	FRMWReadOnlySlot1    = 1<<1 | 1
	ONCSCompare          = 1 << 0
	ONCSDatasetMgmt      = 1 << 2
	ONCSWriteZeroes      = 1 << 3
	VWCPresent           = 1 << 0
	VWCFlushOne          = 2 << 1 // Flush names one nvmeNamespace, never all
	SGLSupported         = 1 << 0
	SGLOffset            = 1 << 20
	OFCSDisconnect       = 1 << 0
)

// Controller is the identify controller data structure (Base 5.17.2.1):
// what Thaw's target sets and its host looks at.
type Controller struct {
	VendorID, SubsystemVendorID uint16
	Serial                      string // 20 bytes
	Model                       string // 40 bytes
	Firmware                    string // 8 bytes
	CMIC                        uint8
	MDTS                        uint8 // log2 of the pages of one transfer, 0 without limit
	CNTLID                      uint16
	Version                     uint32
	OAES                        uint32
	CTRATT                      uint32
	Type                        uint8 // CNTRLTYPE
	AbortLimit                  uint8 // ACL, 0's based
	AsyncLimit                  uint8 // AERL, 0's based
	FRMW                        uint8
	LPA                         uint8
	ErrorEntries                uint8  // ELPE, 0's based
	KeepAliveUnit               uint16 // KAS, in 100 ms
	MaxCommands                 uint16 // MAXCMD
	NvmeNamespaces              uint32 // NN
	ONCS                        uint16
	VWC                         uint8
	SGLS                        uint32
	MaxActive                   uint32 // MNAN
	SubNQN                      string
	CapsuleSize                 uint32 // IOCCSZ, in 16 bytes
	ResponseSize                uint32 // IORCSZ, in 16 bytes
	ICDOFF                      uint16
	MSDBD                       uint8
	OFCS                        uint16

	// For Cross-Controller Reset (Base 2.3): the controller's instance, and how many
	// resets may be under way, 0 where the command is not supported.
	CIU             uint8
	CIRN            uint64
	CrossResetLimit uint8  // CCRL
	QuiesceMs       uint16 // CQT: how long commands may go on after the host is lost
}

// Put encodes c into the first IdentifyLen bytes of b.
func (c *Controller) Put(b []byte) {
	clear(b[:IdentifyLen])
	le.PutUint16(b, c.VendorID)
	le.PutUint16(b[2:], c.SubsystemVendorID)
	putASCII(b[4:24], c.Serial)
	putASCII(b[24:64], c.Model)
	putASCII(b[64:72], c.Firmware)
	b[76], b[77] = c.CMIC, c.MDTS
	le.PutUint16(b[78:], c.CNTLID)
	le.PutUint32(b[80:], c.Version)
	le.PutUint32(b[92:], c.OAES)
	le.PutUint32(b[96:], c.CTRATT)
	b[111] = c.Type
	b[135] = c.CIU
	le.PutUint64(b[136:], c.CIRN)
	b[258], b[259], b[260], b[261], b[262] = c.AbortLimit, c.AsyncLimit, c.FRMW, c.LPA, c.ErrorEntries
	le.PutUint16(b[266:], 343) // WCTEMP and CCTEMP, in kelvin: never reached
	le.PutUint16(b[268:], 373)
	le.PutUint16(b[320:], c.KeepAliveUnit)
	le.PutUint16(b[386:], c.QuiesceMs)
	b[512], b[513] = SQELog2<<4|SQELog2, CQELog2<<4|CQELog2
	le.PutUint16(b[514:], c.MaxCommands)
	le.PutUint32(b[516:], c.NvmeNamespaces)
	le.PutUint16(b[520:], c.ONCS)
	b[525] = c.VWC
	le.PutUint32(b[536:], c.SGLS)
	le.PutUint32(b[540:], c.MaxActive)
	copy(b[768:768+MaxNQN], c.SubNQN)
	le.PutUint32(b[1792:], c.CapsuleSize)
	le.PutUint32(b[1796:], c.ResponseSize)
	le.PutUint16(b[1800:], c.ICDOFF)
	b[1803] = c.MSDBD
	le.PutUint16(b[1804:], c.OFCS)
	b[1807] = c.CrossResetLimit
}

// Parse decodes IdentifyLen bytes; the error is kind.Invalid.
func (c *Controller) Parse(b []byte) error {
	if len(b) < IdentifyLen {
		return kind.Errorf(kind.Invalid, "identify data of %d bytes is too short", len(b))
	}
	*c = Controller{
		VendorID: le.Uint16(b), SubsystemVendorID: le.Uint16(b[2:]), Serial: ascii(b[4:24]), Model: ascii(b[24:64]), Firmware: ascii(b[64:72]),
		CMIC: b[76], MDTS: b[77], CNTLID: le.Uint16(b[78:]), Version: le.Uint32(b[80:]), OAES: le.Uint32(b[92:]), CTRATT: le.Uint32(b[96:]),
		Type: b[111], AbortLimit: b[258], AsyncLimit: b[259], FRMW: b[260], LPA: b[261], ErrorEntries: b[262],
		KeepAliveUnit: le.Uint16(b[320:]), MaxCommands: le.Uint16(b[514:]), NvmeNamespaces: le.Uint32(b[516:]), ONCS: le.Uint16(b[520:]),
		VWC: b[525], SGLS: le.Uint32(b[536:]), MaxActive: le.Uint32(b[540:]), SubNQN: cString(b[768:1024]),
		CapsuleSize: le.Uint32(b[1792:]), ResponseSize: le.Uint32(b[1796:]), ICDOFF: le.Uint16(b[1800:]), MSDBD: b[1803], OFCS: le.Uint16(b[1804:]),
		CIU: b[135], CIRN: le.Uint64(b[136:]), QuiesceMs: le.Uint16(b[386:]), CrossResetLimit: b[1807],
	}
	return nil
}

// NvmeNamespace is the identify nvmeNamespace data structure of the NVM command set
// (NVM 4.1.5.1).
type NvmeNamespace struct {
	Blocks      uint64 // NSZE, NCAP and NUSE
	BlockBytes  uint32 // of LBA format 0, a power of two
	Shared      bool   // NMIC bit 0: several controllers may attach it
	DLFEAT      uint8
	ReadOnly    bool   // NSATTR bit 0
	Granularity uint32 // NPDG and NPDA: preferred deallocation, in blocks; 0 unknown
	NGUID       [16]byte
	EUI64       [8]byte
}

// DLFEAT bits: a deallocated block reads as zeros, and Write Zeroes may deallocate.
const (
	DLFEATZeros      = 1
	DLFEATZerosMask  = 7
	DLFEATDeallocate = 1 << 3
)

const nsfeatOptPerf = 1 << 4 // OPTPERF: NPDG and its like are there

// Put encodes n into the first IdentifyLen bytes of b.
func (n *NvmeNamespace) Put(b []byte) {
	clear(b[:IdentifyLen])
	le.PutUint64(b, n.Blocks)
	le.PutUint64(b[8:], n.Blocks)
	le.PutUint64(b[16:], n.Blocks)
	if n.Shared {
		b[30] = 1
	}
	b[33] = n.DLFEAT
	if g := min(n.Granularity, 1<<16); g > 0 {
		b[24] = nsfeatOptPerf
		le.PutUint16(b[68:], uint16(g-1))
		le.PutUint16(b[70:], uint16(g-1))
	}
	if n.ReadOnly {
		b[99] = 1
	}
	copy(b[104:120], n.NGUID[:])
	copy(b[120:128], n.EUI64[:])
	b[130] = uint8(bits.TrailingZeros32(n.BlockBytes)) // LBADS
}

// Parse decodes IdentifyLen bytes; the error is kind.Invalid or kind.Unsupported. A
// block size that no device has, metadata and sizes past 2^63 bytes are refused.
func (n *NvmeNamespace) Parse(b []byte) error {
	if len(b) < IdentifyLen {
		return kind.Errorf(kind.Invalid, "identify data of %d bytes is too short", len(b))
	}
	*n = NvmeNamespace{Blocks: le.Uint64(b), Shared: b[30]&1 != 0, DLFEAT: b[33], ReadOnly: b[99]&1 != 0}
	format := int(b[26]&0xf) | int(b[26]>>5&3)<<4 // FLBAS: bits 3:0 and 6:5
	if format > 63 || format > int(b[25]) && b[25] < 64 {
		return kind.Errorf(kind.Invalid, "nvmeNamespace is of LBA format %d and has %d", format, int(b[25])+1)
	}
	lbaf := b[128+4*format:]
	if ms := le.Uint16(lbaf); ms != 0 {
		return kind.Errorf(kind.Unsupported, "nvmeNamespace has %d bytes of metadata per block", ms)
	}
	if lbaf[2] < 9 || lbaf[2] > 16 {
		return kind.Errorf(kind.Unsupported, "nvmeNamespace has blocks of 2^%d bytes", lbaf[2])
	}
	n.BlockBytes = 1 << lbaf[2]
	if n.Blocks > 1<<(63-lbaf[2])-1 {
		return kind.Errorf(kind.Invalid, "nvmeNamespace has %d blocks of 2^%d bytes", n.Blocks, lbaf[2])
	}
	if b[24]&nsfeatOptPerf != 0 {
		n.Granularity = uint32(le.Uint16(b[68:])) + 1
	}
	copy(n.NGUID[:], b[104:])
	copy(n.EUI64[:], b[120:])
	return nil
}

// PutIndependent encodes the identify structure that does not depend on the command
// set (Base 5.17.2.8): of it Thaw knows sharing, write protection and readiness.
func (n *NvmeNamespace) PutIndependent(b []byte) {
	clear(b[:IdentifyLen])
	if n.Shared {
		b[1] = 1
	}
	if n.ReadOnly {
		b[8] = 1 // NSATTR
	}
	b[14] = 1 // NSTAT: ready
}

// Descriptors are the identifiers of an nvmeNamespace (Base 5.17.2.3).
type Descriptors struct {
	EUI64 [8]byte
	NGUID [16]byte
	UUID  uuid.UUID
}

const (
	descEUI64 = 1
	descNGUID = 2
	descUUID  = 3
	descCSI   = 4
)

// Put encodes d, without what is zero, into the first IdentifyLen bytes of b.
func (d *Descriptors) Put(b []byte) {
	clear(b[:IdentifyLen])
	n := 0
	add := func(t uint8, id []byte) {
		b[n], b[n+1] = t, uint8(len(id))
		n += 4 + copy(b[n+4:], id)
	}
	if d.UUID != uuid.Nil {
		add(descUUID, d.UUID[:])
	}
	if d.NGUID != [16]byte{} {
		add(descNGUID, d.NGUID[:])
	}
	if d.EUI64 != [8]byte{} {
		add(descEUI64, d.EUI64[:])
	}
	add(descCSI, []byte{CommandSetNVM})
}

// Parse decodes a list of descriptors and stops at its end; the error is
// kind.Invalid. Unknown types are skipped.
func (d *Descriptors) Parse(b []byte) error {
	*d = Descriptors{}
	for len(b) >= 4 && b[1] != 0 {
		t, n := b[0], int(b[1])
		if 4+n > len(b) {
			return kind.Errorf(kind.Invalid, "descriptor of type %d reaches past its list", t)
		}
		id := b[4 : 4+n]
		switch {
		case t == descEUI64 && n == 8:
			copy(d.EUI64[:], id)
		case t == descNGUID && n == 16:
			copy(d.NGUID[:], id)
		case t == descUUID && n == 16:
			copy(d.UUID[:], id)
		case t == descCSI && n == 1:
			if id[0] != CommandSetNVM {
				return kind.Errorf(kind.Unsupported, "nvmeNamespace is of command set %d", id[0])
			}
		case t >= descEUI64 && t <= descCSI:
			return kind.Errorf(kind.Invalid, "descriptor of type %d has %d bytes", t, n)
		}
		b = b[4+n:]
	}
	return nil
}

// MaxList is how many identifiers an nvmeNamespace list holds.
const MaxList = 1024

// PutList encodes ids, ascending and at most MaxList, into IdentifyLen bytes of b.
func PutList(b []byte, ids []uint32) {
	clear(b[:IdentifyLen])
	for i, id := range ids[:min(len(ids), MaxList)] {
		le.PutUint32(b[4*i:], id)
	}
}

// ParseList appends the identifiers of a list to ids, until the first 0.
func ParseList(b []byte, ids []uint32) []uint32 {
	for i := 0; i+4 <= len(b) && i < IdentifyLen; i += 4 {
		id := le.Uint32(b[i:])
		if id == 0 {
			break
		}
		ids = append(ids, id)
	}
	return ids
}
