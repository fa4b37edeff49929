package kernel

import (
	"encoding/binary"
	"fmt"
	"io"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/nbd"
)

// Export is what a server says of an export.
type Export struct {
	SizeBytes int64
	Flags     uint16 // nbd.Flag*
}

// maxReplies bounds what a server may answer to one option.
const maxReplies = 64

// Negotiate does the handshake that the kernel's client cannot: it asks the server at the
// other end of conn for an export, with simple replies, and reads not a byte more, so
// that conn can be given to the kernel. The caller sets a deadline on conn. Errors are
// kind.Unsupported where the server speaks something else, kind.NotFound for an unknown
// export, or those of conn.
func Negotiate(conn io.ReadWriter, export string) (Export, error) {
	e, err := negotiate(conn, export)
	if err != nil {
		return Export{}, fmt.Errorf("negotiate NBD export %q: %w", export, err)
	}
	return e, nil
}

func negotiate(conn io.ReadWriter, export string) (Export, error) {
	var b [18]byte
	if _, err := io.ReadFull(conn, b[:]); err != nil {
		return Export{}, err
	}
	flags := binary.BigEndian.Uint16(b[16:])
	if binary.BigEndian.Uint64(b[:]) != nbd.MagicServer || binary.BigEndian.Uint64(b[8:]) != nbd.MagicOption || flags&nbd.HandshakeFixedNewstyle == 0 {
		return Export{}, kind.Errorf(kind.Unsupported, "the peer is no NBD server with fixed newstyle negotiation")
	}
	out := binary.BigEndian.AppendUint32(nil, uint32(flags&(nbd.HandshakeFixedNewstyle|nbd.HandshakeNoZeroes)))
	data := binary.BigEndian.AppendUint16(nbd.AppendString(nil, export), 0) // no further information
	out = nbd.AppendOption(out, nbd.OptGo, data)
	if _, err := conn.Write(out); err != nil {
		return Export{}, err
	}
	var e Export
	seen := false
	for range maxReplies {
		var h [nbd.OptReplyHeaderBytes]byte
		if _, err := io.ReadFull(conn, h[:]); err != nil {
			return Export{}, err
		}
		reply, length := binary.BigEndian.Uint32(h[12:]), binary.BigEndian.Uint32(h[16:])
		if binary.BigEndian.Uint64(h[:]) != nbd.MagicOptionReply || binary.BigEndian.Uint32(h[8:]) != nbd.OptGo || length > nbd.RepMaxBytes {
			return Export{}, kind.Errorf(kind.Unsupported, "the server's answer makes no sense")
		}
		data := make([]byte, length)
		if _, err := io.ReadFull(conn, data); err != nil {
			return Export{}, err
		}
		switch {
		case reply == nbd.RepInfo && length == 12 && binary.BigEndian.Uint16(data) == nbd.InfoExport:
			e = Export{SizeBytes: int64(binary.BigEndian.Uint64(data[2:])), Flags: binary.BigEndian.Uint16(data[10:])}
			seen = true
		case reply == nbd.RepAck && seen && e.SizeBytes >= 0:
			return e, nil
		case reply == nbd.RepAck:
			return Export{}, kind.Errorf(kind.Unsupported, "the server does not tell its size, or one beyond 8 EiB")
		case reply == nbd.RepErrUnknown:
			return Export{}, kind.Errorf(kind.NotFound, "there is none")
		case reply&nbd.RepErrBit != 0:
			return Export{}, kind.Errorf(kind.Unsupported, "the server answers %#x", reply)
		}
	}
	return Export{}, kind.Errorf(kind.Unsupported, "the server's answer does not end")
}
