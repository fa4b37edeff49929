// Package nvme holds the wire structures of NVM Express that Thaw speaks: PDUs of
// NVMe/TCP, submission and completion entries, Fabrics commands, identify data,
// features and log pages.
//
// It encodes and decodes, nothing more: it opens no connection, keeps no state and
// knows neither target nor host. Decoding never reads past what it was given and
// encoding never allocates; both fill values that the caller owns. All integers on
// the wire are little endian.
//
// Clauses are cited as "Base 5.17" (NVM Express Base Specification 2.0), "NVM 3.2.4"
// (NVM Command Set Specification 1.0) and "TCP 3.6.2.1" (NVMe/TCP Transport
// Specification 1.0).
package nvme

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"

	"github.com/thaw-project/thaw/kind"
)

var le = binary.LittleEndian

// PDUType is the first byte of every PDU (TCP 3.6.1).
type PDUType uint8

// PDU types.
const (
	TypeICReq       PDUType = 0x00
	TypeICResp      PDUType = 0x01
	TypeH2CTermReq  PDUType = 0x02
	TypeC2HTermReq  PDUType = 0x03
	TypeCapsuleCmd  PDUType = 0x04
	TypeCapsuleResp PDUType = 0x05
	TypeH2CData     PDUType = 0x06
	TypeC2HData     PDUType = 0x07
	TypeR2T         PDUType = 0x09
)

func (t PDUType) String() string {
	switch t {
	case TypeICReq:
		return "ICReq"
	case TypeICResp:
		return "ICResp"
	case TypeH2CTermReq:
		return "H2CTermReq"
	case TypeC2HTermReq:
		return "C2HTermReq"
	case TypeCapsuleCmd:
		return "CapsuleCmd"
	case TypeCapsuleResp:
		return "CapsuleResp"
	case TypeH2CData:
		return "H2CData"
	case TypeC2HData:
		return "C2HData"
	case TypeR2T:
		return "R2T"
	}
	return fmt.Sprintf("PDU type %#02x", uint8(t))
}

// Flags of the common header (TCP 3.6.1 and the clause of each PDU).
const (
	FlagHeaderDigest uint8 = 1 << 0 // HDGSTF: a header digest follows the header
	FlagDataDigest   uint8 = 1 << 1 // DDGSTF: a data digest follows the data
	FlagLast         uint8 = 1 << 2 // LAST_PDU: the last data PDU of the command or of the R2T
	FlagSuccess      uint8 = 1 << 3 // SUCCESS: no CapsuleResp follows (TCP 3.3)
)

// Lengths on the wire, in bytes.
const (
	CommonLen      = 8   // the common header
	ICLen          = 128 // ICReq and ICResp, header and PDU
	TermLen        = 24  // the header of H2CTermReq and C2HTermReq
	MaxTermLen     = 152 // the longest H2CTermReq or C2HTermReq (TCP 3.6.2.4)
	CapsuleCmdLen  = 72  // the header of CapsuleCmd
	CapsuleRespLen = 24  // the header of CapsuleResp
	DataLen        = 24  // the header of H2CData and C2HData
	R2TLen         = 24  // the header of R2T
	DigestLen      = 4   // a header or data digest

	// MaxHeaderLen is the longest header any PDU has.
	MaxHeaderLen = ICLen
)

// headerLens is the length that each type's HLEN must have; 0 is an unknown type.
var headerLens = [10]uint8{ICLen, ICLen, TermLen, TermLen, CapsuleCmdLen, CapsuleRespLen, DataLen, DataLen, 0, R2TLen}

// HeaderLen returns the header length of t in bytes, 0 for an unknown type.
func (t PDUType) HeaderLen() int {
	if int(t) >= len(headerLens) {
		return 0
	}
	return int(headerLens[t])
}

// FatalError is the FES of a termination request (TCP 3.6.2.4).
type FatalError uint16

// Fatal error status values.
const (
	FatalInvalidHeader   FatalError = 0x01
	FatalSequence        FatalError = 0x02
	FatalHeaderDigest    FatalError = 0x03
	FatalOutOfRange      FatalError = 0x04
	FatalLimitExceeded   FatalError = 0x05 // data transfer limit (host) or R2T limit (controller)
	FatalUnsupportedParm FatalError = 0x06
)

func (f FatalError) String() string {
	switch f {
	case FatalInvalidHeader:
		return "invalid PDU header field"
	case FatalSequence:
		return "PDU sequence error"
	case FatalHeaderDigest:
		return "header digest error"
	case FatalOutOfRange:
		return "data transfer out of range"
	case FatalLimitExceeded:
		return "data transfer or R2T limit exceeded"
	case FatalUnsupportedParm:
		return "unsupported parameter"
	}
	return fmt.Sprintf("fatal error status %#x", uint16(f))
}

// PDUError is what is wrong with a PDU, in the words of a termination request: the
// receiver sends Status and Info to the peer and closes the connection (TCP 3.5).
type PDUError struct {
	Status FatalError
	Info   uint32 // FEI: the offset of the bad field, or the digest received
	What   string
}

func (e *PDUError) Error() string {
	return fmt.Sprintf("%s: %s (information %#x)", e.Status, e.What, e.Info)
}

// Is makes a PDUError an error of kind.Invalid.
func (e *PDUError) Is(target error) bool { return target == error(kind.Invalid) }

// Offsets in the common header, which a PDUError names.
const (
	offType  = 0
	offFlags = 1
	offHLEN  = 2
	offPDO   = 3
	offPLEN  = 4
)

// Common is the common header (TCP 3.6.1).
type Common struct {
	Type  PDUType
	Flags uint8
	HLEN  uint8  // length of the header, without digest
	PDO   uint8  // offset of the data from the start of the PDU, 0 without data
	PLEN  uint32 // length of the whole PDU
}

// ParseCommon decodes the first CommonLen bytes of b and nothing else.
func ParseCommon(b []byte) Common {
	_ = b[7]
	return Common{Type: PDUType(b[0]), Flags: b[1], HLEN: b[2], PDO: b[3], PLEN: le.Uint32(b[4:])}
}

// Put encodes c into the first CommonLen bytes of b.
func (c *Common) Put(b []byte) {
	_ = b[7]
	b[0], b[1], b[2], b[3] = byte(c.Type), c.Flags, c.HLEN, c.PDO
	le.PutUint32(b[4:], c.PLEN)
}

// Digests tells which digests a connection negotiated (TCP 3.6.2.2).
type Digests struct {
	Header, Data bool
}

const (
	digestHeader = 1 << 0
	digestData   = 1 << 1
)

func (d Digests) bits() (b uint8) {
	if d.Header {
		b |= digestHeader
	}
	if d.Data {
		b |= digestData
	}
	return b
}

// Layout says where the parts of a PDU are.
type Layout struct {
	Header int // header with its digest, in bytes from the start
	Data   int // offset of the data
	Length int // bytes of data
	Digest int // bytes of the data digest, 0 or DigestLen
}

// Layout checks the common header against its type and the negotiated digests, and
// says where the parts are. No more than maxData bytes of data are accepted. It
// checks only what holds for every PDU of the type; the error is nil or a *PDUError.
func (c *Common) Layout(d Digests, maxData int) (l Layout, err error) {
	want := c.Type.HeaderLen()
	if want == 0 {
		return l, &PDUError{FatalInvalidHeader, offType, "unknown PDU type"}
	}
	if int(c.HLEN) != want {
		return l, &PDUError{FatalInvalidHeader, offHLEN, "header length does not fit the PDU type"}
	}
	switch c.Type {
	case TypeICReq, TypeICResp:
		if c.PLEN != ICLen {
			return l, &PDUError{FatalInvalidHeader, offPLEN, "PDU length is not 128"}
		}
		return Layout{Header: ICLen, Data: ICLen}, nil
	case TypeH2CTermReq, TypeC2HTermReq:
		// A termination request carries no digest and at most 128 bytes of the
		// header that was wrong (TCP 3.6.2.4).
		if c.PLEN < TermLen || c.PLEN > MaxTermLen {
			return l, &PDUError{FatalInvalidHeader, offPLEN, "PDU length of a termination request"}
		}
		return Layout{Header: TermLen, Data: TermLen, Length: int(c.PLEN) - TermLen}, nil
	}
	l.Header = want
	if d.Header != (c.Flags&FlagHeaderDigest != 0) {
		return l, &PDUError{FatalInvalidHeader, offFlags, "header digest flag is not as negotiated"}
	}
	if d.Header {
		l.Header += DigestLen
	}
	l.Data = l.Header
	carries := c.Type == TypeH2CData || c.Type == TypeC2HData || c.Type == TypeCapsuleCmd
	if !carries || c.Type == TypeCapsuleCmd && int64(c.PLEN) == int64(l.Header) {
		if int64(c.PLEN) != int64(l.Header) {
			return l, &PDUError{FatalInvalidHeader, offPLEN, "PDU length of a PDU without data"}
		}
		return l, nil
	}
	if d.Data {
		if c.Flags&FlagDataDigest == 0 {
			return l, &PDUError{FatalInvalidHeader, offFlags, "data digest flag is not set"}
		}
		l.Digest = DigestLen
	} else if c.Flags&FlagDataDigest != 0 {
		return l, &PDUError{FatalInvalidHeader, offFlags, "data digest flag was not negotiated"}
	}
	if int(c.PDO) < l.Header || c.PDO%4 != 0 {
		return l, &PDUError{FatalInvalidHeader, offPDO, "data offset lies in the header or is not aligned"}
	}
	l.Data = int(c.PDO)
	length := int64(c.PLEN) - int64(l.Data) - int64(l.Digest)
	if length < 0 {
		return l, &PDUError{FatalInvalidHeader, offPLEN, "PDU ends before its data"}
	}
	if length > int64(maxData) {
		return l, &PDUError{FatalLimitExceeded, offPLEN, "more data than agreed"}
	}
	l.Length = int(length)
	return l, nil
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// CRC32C is the digest of header and data (TCP 3.3).
func CRC32C(p []byte) uint32 { return crc32.Update(0, castagnoli, p) }

// CRC32CUpdate continues a digest with p.
func CRC32CUpdate(crc uint32, p []byte) uint32 { return crc32.Update(crc, castagnoli, p) }

// PutDigest encodes a digest into b.
func PutDigest(b []byte, crc uint32) { le.PutUint32(b, crc) }

// GetDigest decodes a digest from b.
func GetDigest(b []byte) uint32 { return le.Uint32(b) }

// CheckHeaderDigest checks the digest that follows the header in b, where hlen is
// the header's length. The error is a *PDUError.
func CheckHeaderDigest(b []byte, hlen int) error {
	if got := le.Uint32(b[hlen:]); got != CRC32C(b[:hlen]) {
		return &PDUError{FatalHeaderDigest, got, "header digest does not match"}
	}
	return nil
}

// ICReq opens a connection (TCP 3.6.2.2).
type ICReq struct {
	PFV     uint16 // PDU format version, 0
	HPDA    uint8  // host PDU data alignment, in dwords, 0's based
	Digests Digests
	MaxR2T  uint32 // outstanding R2Ts per command, 0's based
}

// Put encodes r into the first ICLen bytes of b.
func (r *ICReq) Put(b []byte) {
	clear(b[:ICLen])
	(&Common{Type: TypeICReq, HLEN: ICLen, PLEN: ICLen}).Put(b)
	le.PutUint16(b[8:], r.PFV)
	b[10], b[11] = r.HPDA, r.Digests.bits()
	le.PutUint32(b[12:], r.MaxR2T)
}

// MaxPDA is the largest HPDA or CPDA (TCP 3.6.2.2).
const MaxPDA = 31

// Parse decodes a whole ICReq PDU. The error is nil or a *PDUError.
func (r *ICReq) Parse(b []byte) error {
	if err := parseIC(b, TypeICReq); err != nil {
		return err
	}
	*r = ICReq{PFV: le.Uint16(b[8:]), HPDA: b[10], MaxR2T: le.Uint32(b[12:]),
		Digests: Digests{Header: b[11]&digestHeader != 0, Data: b[11]&digestData != 0}}
	switch {
	case r.PFV != 0:
		return &PDUError{FatalUnsupportedParm, 8, "PDU format version"}
	case r.HPDA > MaxPDA:
		return &PDUError{FatalInvalidHeader, 10, "host PDU data alignment"}
	case b[11]&^(digestHeader|digestData) != 0:
		return &PDUError{FatalUnsupportedParm, 11, "digest type"}
	}
	return nil
}

func parseIC(b []byte, t PDUType) error {
	if len(b) < ICLen {
		return &PDUError{FatalInvalidHeader, offPLEN, "short PDU"}
	}
	c := ParseCommon(b)
	if c.Type != t {
		return &PDUError{FatalSequence, offType, "not the PDU that opens a connection"}
	}
	_, err := c.Layout(Digests{}, 0)
	return err
}

// ICResp answers an ICReq (TCP 3.6.2.3).
type ICResp struct {
	PFV        uint16
	CPDA       uint8 // controller PDU data alignment, in dwords, 0's based
	Digests    Digests
	MaxH2CData uint32 // bytes of data in one H2CData at most
}

// MinH2CData is the least MAXH2CDATA (TCP 3.6.2.3).
const MinH2CData = 4096

// Put encodes r into the first ICLen bytes of b.
func (r *ICResp) Put(b []byte) {
	clear(b[:ICLen])
	(&Common{Type: TypeICResp, HLEN: ICLen, PLEN: ICLen}).Put(b)
	le.PutUint16(b[8:], r.PFV)
	b[10], b[11] = r.CPDA, r.Digests.bits()
	le.PutUint32(b[12:], r.MaxH2CData)
}

// Parse decodes a whole ICResp PDU. The error is nil or a *PDUError.
func (r *ICResp) Parse(b []byte) error {
	if err := parseIC(b, TypeICResp); err != nil {
		return err
	}
	*r = ICResp{PFV: le.Uint16(b[8:]), CPDA: b[10], MaxH2CData: le.Uint32(b[12:]),
		Digests: Digests{Header: b[11]&digestHeader != 0, Data: b[11]&digestData != 0}}
	switch {
	case r.PFV != 0:
		return &PDUError{FatalUnsupportedParm, 8, "PDU format version"}
	case r.CPDA > MaxPDA:
		return &PDUError{FatalInvalidHeader, 10, "controller PDU data alignment"}
	case b[11]&^(digestHeader|digestData) != 0:
		return &PDUError{FatalUnsupportedParm, 11, "digest type"}
	case r.MaxH2CData < MinH2CData || r.MaxH2CData%4 != 0:
		return &PDUError{FatalInvalidHeader, 12, "maximum host to controller data length"}
	}
	return nil
}

// Term is a termination request, either way (TCP 3.6.2.4 and 3.6.2.5).
type Term struct {
	Type   PDUType // TypeH2CTermReq or TypeC2HTermReq
	Status FatalError
	Info   uint32
}

// Put encodes t with as much of the bad PDU's header as fits, and returns the length
// of the PDU. b has room for MaxTermLen bytes.
func (t *Term) Put(b, bad []byte) int {
	n := copy(b[TermLen:MaxTermLen], bad)
	clear(b[:TermLen])
	(&Common{Type: t.Type, HLEN: TermLen, PLEN: uint32(TermLen + n)}).Put(b)
	le.PutUint16(b[8:], uint16(t.Status))
	le.PutUint32(b[10:], t.Info)
	return TermLen + n
}

// Parse decodes the header of a termination request, TermLen bytes.
func (t *Term) Parse(b []byte) error {
	if len(b) < TermLen {
		return &PDUError{FatalInvalidHeader, offPLEN, "short PDU"}
	}
	c := ParseCommon(b)
	if c.Type != TypeH2CTermReq && c.Type != TypeC2HTermReq {
		return &PDUError{FatalSequence, offType, "not a termination request"}
	}
	if _, err := c.Layout(Digests{}, 0); err != nil {
		return err
	}
	*t = Term{Type: c.Type, Status: FatalError(le.Uint16(b[8:])), Info: le.Uint32(b[10:])}
	return nil
}

// Data is the header of H2CData and C2HData behind the common header
// (TCP 3.6.2.8 and 3.6.2.9).
type Data struct {
	CID    uint16 // CCCID: the command the data belongs to
	TTAG   uint16 // transfer tag of the R2T; reserved in C2HData
	Offset uint32 // DATAO: from the start of the command's data
	Length uint32 // DATAL: of this PDU
}

// Parse decodes the header of a data PDU, DataLen bytes, whose layout says that it
// carries length bytes. The error is nil or a *PDUError.
func (d *Data) Parse(b []byte, length int) error {
	if len(b) < DataLen {
		return &PDUError{FatalInvalidHeader, offPLEN, "short PDU"}
	}
	*d = Data{CID: le.Uint16(b[8:]), TTAG: le.Uint16(b[10:]), Offset: le.Uint32(b[12:]), Length: le.Uint32(b[16:])}
	if int64(d.Length) != int64(length) {
		return &PDUError{FatalInvalidHeader, 16, "data length does not fit the PDU length"}
	}
	if d.Offset%4 != 0 {
		return &PDUError{FatalInvalidHeader, 12, "data offset is not a multiple of 4"}
	}
	return nil
}

// put encodes the fields that data PDUs and R2T share.
func (d *Data) put(b []byte) {
	le.PutUint16(b[8:], d.CID)
	le.PutUint16(b[10:], d.TTAG)
	le.PutUint32(b[12:], d.Offset)
	le.PutUint32(b[16:], d.Length)
	le.PutUint32(b[20:], 0)
}

// PutData encodes the header of a data PDU into b with its digest, if negotiated,
// and padding up to the next multiple of align bytes, and returns the offset of the
// data. PLEN covers the data and its digest, which the caller appends. b has room
// for MaxHeaderLen bytes; flags are FlagLast and FlagSuccess.
func PutData(b []byte, t PDUType, flags uint8, d *Data, g Digests, align int) int {
	n := DataLen
	plen := int(d.Length)
	if g.Header {
		n += DigestLen
		flags |= FlagHeaderDigest
	}
	if g.Data {
		flags |= FlagDataDigest
		plen += DigestLen
	}
	pdo := n
	if r := pdo % align; r != 0 {
		pdo += align - r
	}
	(&Common{Type: t, Flags: flags, HLEN: DataLen, PDO: uint8(pdo), PLEN: uint32(pdo + plen)}).Put(b)
	d.put(b)
	if g.Header {
		PutDigest(b[DataLen:], CRC32C(b[:DataLen]))
	}
	clear(b[n:pdo])
	return pdo
}

// PutR2T encodes an R2T with its digest, if negotiated, and returns its length
// (TCP 3.6.2.10). b has room for R2TLen and DigestLen bytes.
func PutR2T(b []byte, d *Data, g Digests) int {
	c := Common{Type: TypeR2T, HLEN: R2TLen, PLEN: R2TLen}
	if g.Header {
		c.Flags, c.PLEN = FlagHeaderDigest, R2TLen+DigestLen
	}
	c.Put(b)
	d.put(b)
	if g.Header {
		PutDigest(b[R2TLen:], CRC32C(b[:R2TLen]))
	}
	return int(c.PLEN)
}

// ParseR2T decodes the header of an R2T, R2TLen bytes.
func (d *Data) ParseR2T(b []byte) error {
	if len(b) < R2TLen {
		return &PDUError{FatalInvalidHeader, offPLEN, "short PDU"}
	}
	*d = Data{CID: le.Uint16(b[8:]), TTAG: le.Uint16(b[10:]), Offset: le.Uint32(b[12:]), Length: le.Uint32(b[16:])}
	if d.Length == 0 {
		return &PDUError{FatalInvalidHeader, 16, "an R2T for no data"}
	}
	if d.Offset%4 != 0 {
		return &PDUError{FatalInvalidHeader, 12, "R2T offset is not a multiple of 4"}
	}
	return nil
}

// PutCapsuleCmd encodes the header of a command capsule that carries inCapsule bytes
// of data, with the header's digest and padding up to a multiple of align, and
// returns the offset of the data (TCP 3.6.2.6). The caller appends data and its
// digest.
func PutCapsuleCmd(b []byte, cmd *Command, inCapsule int, g Digests, align int) int {
	c := Common{Type: TypeCapsuleCmd, HLEN: CapsuleCmdLen}
	n := CapsuleCmdLen
	if g.Header {
		n += DigestLen
		c.Flags |= FlagHeaderDigest
	}
	pdo := n
	if inCapsule > 0 {
		if r := pdo % align; r != 0 {
			pdo += align - r
		}
		c.PDO = uint8(pdo)
	}
	c.PLEN = uint32(pdo + inCapsule)
	if inCapsule > 0 && g.Data {
		c.Flags |= FlagDataDigest
		c.PLEN += DigestLen
	}
	c.Put(b)
	cmd.Put(b[CommonLen:])
	if g.Header {
		PutDigest(b[CapsuleCmdLen:], CRC32C(b[:CapsuleCmdLen]))
	}
	clear(b[n:pdo])
	return pdo
}

// PutCapsuleResp encodes a response capsule with its digest and returns its length
// (TCP 3.6.2.7). b has room for CapsuleRespLen and DigestLen bytes.
func PutCapsuleResp(b []byte, cqe *Completion, g Digests) int {
	c := Common{Type: TypeCapsuleResp, HLEN: CapsuleRespLen, PLEN: CapsuleRespLen}
	if g.Header {
		c.Flags, c.PLEN = FlagHeaderDigest, CapsuleRespLen+DigestLen
	}
	c.Put(b)
	cqe.Put(b[CommonLen:])
	if g.Header {
		PutDigest(b[CapsuleRespLen:], CRC32C(b[:CapsuleRespLen]))
	}
	return int(c.PLEN)
}
