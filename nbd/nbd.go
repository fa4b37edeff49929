// Package nbd is the wire format of the NBD protocol: what the server (target/nbd)
// and the client (nbd/client) share. It knows no sockets and no devices.
//
// It covers fixed newstyle negotiation, simple replies, structured replies and
// extended headers. Names follow the protocol's own document, without its prefix.
package nbd

import (
	"encoding/binary"

	"github.com/thaw-project/thaw/kind"
)

// Magic numbers.
const (
	MagicServer          = 0x4e42444d41474943 // "NBDMAGIC", the first eight bytes a server sends
	MagicOption          = 0x49484156454F5054 // "IHAVEOPT"
	MagicOptionReply     = 0x0003e889045565a9
	MagicRequest         = 0x25609513
	MagicSimpleReply     = 0x67446698
	MagicStructuredReply = 0x668e33ef
	MagicExtendedRequest = 0x21e41c71
	MagicExtendedReply   = 0x6e8a278c
)

// Handshake flags, of server and client alike.
const (
	HandshakeFixedNewstyle = 1 << 0
	HandshakeNoZeroes      = 1 << 1
)

// Options a client may send during negotiation.
const (
	OptExportName      = 1
	OptAbort           = 2
	OptList            = 3
	OptStartTLS        = 5
	OptInfo            = 6
	OptGo              = 7
	OptStructuredReply = 8
	OptListMetaContext = 9
	OptSetMetaContext  = 10
	OptExtendedHeaders = 11
)

// Replies to options; those with the top bit set are errors.
const (
	RepAck                = 1
	RepServer             = 2
	RepInfo               = 3
	RepMetaContext        = 4
	RepErrBit             = 1 << 31
	RepErrUnsup           = RepErrBit | 1
	RepErrPolicy          = RepErrBit | 2
	RepErrInvalid         = RepErrBit | 3
	RepErrPlatform        = RepErrBit | 4
	RepErrTLSReqd         = RepErrBit | 5
	RepErrUnknown         = RepErrBit | 6
	RepErrShutdown        = RepErrBit | 7
	RepErrBlockSizeReqd   = RepErrBit | 8
	RepErrTooBig          = RepErrBit | 9
	RepErrExtHeaderReqd   = RepErrBit | 10
	RepMaxBytes           = 64 << 10 // what this package's users accept in one option reply
	OptionHeaderBytes     = 16
	OptReplyHeaderBytes   = 20
	NameMaxBytes          = 4096 // the protocol's limit on names and descriptions
	MetaContextAllocation = "base:allocation"
)

// Kinds of information in RepInfo.
const (
	InfoExport      = 0
	InfoName        = 1
	InfoDescription = 2
	InfoBlockSize   = 3
)

// Transmission flags of an export.
const (
	FlagHasFlags        = 1 << 0
	FlagReadOnly        = 1 << 1
	FlagSendFlush       = 1 << 2
	FlagSendFUA         = 1 << 3
	FlagRotational      = 1 << 4
	FlagSendTrim        = 1 << 5
	FlagSendWriteZeroes = 1 << 6
	FlagSendDF          = 1 << 7
	FlagCanMultiConn    = 1 << 8
	FlagSendResize      = 1 << 9
	FlagSendCache       = 1 << 10
	FlagSendFastZero    = 1 << 11
)

// Commands.
const (
	CmdRead        = 0
	CmdWrite       = 1
	CmdDisc        = 2
	CmdFlush       = 3
	CmdTrim        = 4
	CmdCache       = 5
	CmdWriteZeroes = 6
	CmdBlockStatus = 7
)

// Command flags.
const (
	CmdFlagFUA        = 1 << 0
	CmdFlagNoHole     = 1 << 1
	CmdFlagDF         = 1 << 2
	CmdFlagReqOne     = 1 << 3
	CmdFlagFastZero   = 1 << 4
	CmdFlagPayloadLen = 1 << 5
)

// Chunks of structured and extended replies.
const (
	ReplyFlagDone       = 1 << 0
	ReplyNone           = 0
	ReplyOffsetData     = 1
	ReplyOffsetHole     = 2
	ReplyBlockStatus    = 5
	ReplyBlockStatusExt = 6
	ReplyErrorBit       = 1 << 15
	ReplyError          = ReplyErrorBit | 1
	ReplyErrorOffset    = ReplyErrorBit | 2
)

// Flags of the metadata context base:allocation.
const (
	StateHole = 1 << 0 // nothing is allocated here
	StateZero = 1 << 1 // reads as zeros
)

// Header lengths in bytes.
const (
	RequestBytes         = 28
	ExtendedRequestBytes = 32
	SimpleReplyBytes     = 16
	ChunkBytes           = 20
	ExtendedChunkBytes   = 32
)

// Request is the header of a request. Length counts bytes of the export, or of the
// payload where the request carries one.
type Request struct {
	Flags  uint16
	Type   uint16
	Cookie uint64
	Offset uint64
	Length uint64
}

// RequestLen is the length of a request header in bytes.
func RequestLen(extended bool) int {
	if extended {
		return ExtendedRequestBytes
	}
	return RequestBytes
}

// Decode reads a header from b, which holds at least RequestLen bytes. It returns
// false when the magic number is wrong: the stream is out of step and of no more use.
func (r *Request) Decode(b []byte, extended bool) bool {
	r.Flags = binary.BigEndian.Uint16(b[4:])
	r.Type = binary.BigEndian.Uint16(b[6:])
	r.Cookie = binary.BigEndian.Uint64(b[8:])
	r.Offset = binary.BigEndian.Uint64(b[16:])
	if extended {
		r.Length = binary.BigEndian.Uint64(b[24:])
		return binary.BigEndian.Uint32(b) == MagicExtendedRequest
	}
	r.Length = uint64(binary.BigEndian.Uint32(b[24:]))
	return binary.BigEndian.Uint32(b) == MagicRequest
}

// Encode writes the header to b and returns its length. Without extended headers
// Length must fit 32 bits.
func (r *Request) Encode(b []byte, extended bool) int {
	magic := uint32(MagicRequest)
	if extended {
		magic = MagicExtendedRequest
	}
	binary.BigEndian.PutUint32(b, magic)
	binary.BigEndian.PutUint16(b[4:], r.Flags)
	binary.BigEndian.PutUint16(b[6:], r.Type)
	binary.BigEndian.PutUint64(b[8:], r.Cookie)
	binary.BigEndian.PutUint64(b[16:], r.Offset)
	if extended {
		binary.BigEndian.PutUint64(b[24:], r.Length)
		return ExtendedRequestBytes
	}
	binary.BigEndian.PutUint32(b[24:], uint32(r.Length))
	return RequestBytes
}

// PutSimple writes the header of a simple reply to b and returns its length.
func PutSimple(b []byte, errno Errno, cookie uint64) int {
	binary.BigEndian.PutUint32(b, MagicSimpleReply)
	binary.BigEndian.PutUint32(b[4:], uint32(errno))
	binary.BigEndian.PutUint64(b[8:], cookie)
	return SimpleReplyBytes
}

// Chunk is the header of one chunk of a structured or extended reply. Length counts
// the bytes that follow. Offset is the request's, and only sent in extended headers.
type Chunk struct {
	Flags  uint16
	Type   uint16
	Cookie uint64
	Offset uint64
	Length uint64
}

// ChunkLen is the length of a chunk header in bytes.
func ChunkLen(extended bool) int {
	if extended {
		return ExtendedChunkBytes
	}
	return ChunkBytes
}

// Encode writes the chunk header to b and returns its length.
func (c *Chunk) Encode(b []byte, extended bool) int {
	magic := uint32(MagicStructuredReply)
	if extended {
		magic = MagicExtendedReply
	}
	binary.BigEndian.PutUint32(b, magic)
	binary.BigEndian.PutUint16(b[4:], c.Flags)
	binary.BigEndian.PutUint16(b[6:], c.Type)
	binary.BigEndian.PutUint64(b[8:], c.Cookie)
	if extended {
		binary.BigEndian.PutUint64(b[16:], c.Offset)
		binary.BigEndian.PutUint64(b[24:], c.Length)
		return ExtendedChunkBytes
	}
	binary.BigEndian.PutUint32(b[16:], uint32(c.Length))
	return ChunkBytes
}

// Decode reads a chunk header from b, which holds at least ChunkLen bytes. It returns
// false when the magic number is wrong.
func (c *Chunk) Decode(b []byte, extended bool) bool {
	c.Flags = binary.BigEndian.Uint16(b[4:])
	c.Type = binary.BigEndian.Uint16(b[6:])
	c.Cookie = binary.BigEndian.Uint64(b[8:])
	if extended {
		c.Offset = binary.BigEndian.Uint64(b[16:])
		c.Length = binary.BigEndian.Uint64(b[24:])
		return binary.BigEndian.Uint32(b) == MagicExtendedReply
	}
	c.Offset = 0
	c.Length = uint64(binary.BigEndian.Uint32(b[16:]))
	return binary.BigEndian.Uint32(b) == MagicStructuredReply
}

// AppendOption appends an option as a client sends it.
func AppendOption(b []byte, option uint32, data []byte) []byte {
	b = binary.BigEndian.AppendUint64(b, MagicOption)
	b = binary.BigEndian.AppendUint32(b, option)
	b = binary.BigEndian.AppendUint32(b, uint32(len(data)))
	return append(b, data...)
}

// AppendOptionReply appends the reply to an option as a server sends it.
func AppendOptionReply(b []byte, option, reply uint32, data []byte) []byte {
	b = binary.BigEndian.AppendUint64(b, MagicOptionReply)
	b = binary.BigEndian.AppendUint32(b, option)
	b = binary.BigEndian.AppendUint32(b, reply)
	b = binary.BigEndian.AppendUint32(b, uint32(len(data)))
	return append(b, data...)
}

// AppendString appends a string behind its 32-bit length.
func AppendString(b []byte, s string) []byte {
	b = binary.BigEndian.AppendUint32(b, uint32(len(s)))
	return append(b, s...)
}

// CutString takes a string behind its 32-bit length from the front of b. It returns
// false where b is too short or the string longer than NameMaxBytes.
func CutString(b []byte) (s string, rest []byte, ok bool) {
	if len(b) < 4 {
		return "", nil, false
	}
	n := binary.BigEndian.Uint32(b)
	if n > NameMaxBytes || int(n) > len(b)-4 {
		return "", nil, false
	}
	return string(b[4 : 4+n]), b[4+n:], true
}

// Errno is an error number as the protocol defines it, which is Linux's for the few
// it allows. It is 0 for success.
type Errno uint32

// The error numbers the protocol allows.
const (
	EPERM     Errno = 1
	EIO       Errno = 5
	ENOMEM    Errno = 12
	EINVAL    Errno = 22
	ENOSPC    Errno = 28
	EOVERFLOW Errno = 75
	ENOTSUP   Errno = 95
	ESHUTDOWN Errno = 108
)

// ErrnoOf maps an error by its kind. What has no number of its own is EIO.
func ErrnoOf(err error) Errno {
	if err == nil {
		return 0
	}
	switch kind.Of(err) {
	case kind.Invalid:
		return EINVAL
	case kind.ReadOnly, kind.Denied:
		return EPERM
	case kind.NoSpace:
		return ENOSPC
	case kind.Unsupported:
		return ENOTSUP
	case kind.Canceled:
		return ESHUTDOWN
	}
	return EIO
}

// Kind maps a number a server sent. Unknown numbers count as EINVAL, as the protocol
// asks.
func (e Errno) Kind() kind.Kind {
	switch e {
	case EPERM:
		return kind.Denied
	case EIO:
		return kind.IO
	case ENOMEM, ESHUTDOWN:
		return kind.Unavailable
	case ENOSPC:
		return kind.NoSpace
	case ENOTSUP:
		return kind.Unsupported
	}
	return kind.Invalid
}

// String is the text sent with errors in structured replies.
func (e Errno) String() string {
	switch e {
	case 0:
		return "success"
	case EPERM:
		return "operation not permitted"
	case EIO:
		return "input/output error"
	case ENOMEM:
		return "out of memory"
	case EINVAL:
		return "invalid argument"
	case ENOSPC:
		return "no space left"
	case EOVERFLOW:
		return "too large"
	case ENOTSUP:
		return "not supported"
	case ESHUTDOWN:
		return "shutting down"
	}
	return "unknown error"
}
