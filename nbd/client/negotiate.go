package client

import (
	"bufio"
	"encoding/binary"
	"io"
	"net"
	"strings"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/nbd"
)

// maxOptionReplies bounds what a server may answer to one option.
const maxOptionReplies = 64

// defaultMaxRequest is what the protocol lets clients assume where a server does not
// say what it takes.
const defaultMaxRequest = 32 << 20

// session is what was agreed on one connection.
type session struct {
	size       int64
	flags      uint16
	minBlock   int64
	maxRequest int64
	structured bool
	extended   bool
	allocation bool
	contextID  uint32
}

// negotiator speaks for the client until transmission begins. The caller has set a
// deadline on conn.
type negotiator struct {
	conn net.Conn
	r    *bufio.Reader
	s    session
}

// negotiate chooses an export. Errors have kind.Unsupported for servers that speak
// something else, kind.NotFound and kind.Denied as the server says, kind.Unavailable for the rest.
func negotiate(conn net.Conn, r *bufio.Reader, export string) (session, error) {
	n := negotiator{conn: conn, r: r}
	n.s.minBlock, n.s.maxRequest = 1, defaultMaxRequest
	err := n.run(export)
	if err != nil && kind.Of(err) == "" {
		err = kind.Wrap(kind.Unavailable, err)
	}
	return n.s, err
}

func (n *negotiator) run(export string) error {
	var b [18]byte
	if _, err := io.ReadFull(n.r, b[:]); err != nil {
		return err
	}
	if binary.BigEndian.Uint64(b[:]) != nbd.MagicServer || binary.BigEndian.Uint64(b[8:]) != nbd.MagicOption {
		return kind.Errorf(kind.Unsupported, "no NBD server, or one without newstyle negotiation")
	}
	flags := binary.BigEndian.Uint16(b[16:])
	if flags&nbd.HandshakeFixedNewstyle == 0 {
		return kind.Errorf(kind.Unsupported, "the server does not know fixed newstyle negotiation")
	}
	flags &= nbd.HandshakeFixedNewstyle | nbd.HandshakeNoZeroes
	if _, err := n.conn.Write(binary.BigEndian.AppendUint32(nil, uint32(flags))); err != nil {
		return err
	}
	rep, err := n.option(nbd.OptExtendedHeaders, nil, nil)
	if err != nil {
		return err
	}
	n.s.extended = rep == nbd.RepAck
	n.s.structured = n.s.extended
	if !n.s.structured {
		if rep, err = n.option(nbd.OptStructuredReply, nil, nil); err != nil {
			return err
		}
		n.s.structured = rep == nbd.RepAck
	}
	if n.s.structured {
		data := nbd.AppendString(nil, export)
		data = binary.BigEndian.AppendUint32(data, 1)
		data = nbd.AppendString(data, nbd.MetaContextAllocation)
		if _, err := n.option(nbd.OptSetMetaContext, data, n.context); err != nil {
			return err
		}
	}
	data := nbd.AppendString(nil, export)
	data = binary.BigEndian.AppendUint16(data, 1)
	data = binary.BigEndian.AppendUint16(data, nbd.InfoBlockSize)
	seen := false
	rep, err = n.option(nbd.OptGo, data, func(reply uint32, data []byte) error {
		return n.info(reply, data, &seen)
	})
	switch {
	case err != nil:
		return err
	case rep == nbd.RepAck && !seen:
		return kind.Errorf(kind.Unsupported, "the server does not tell the size of export %q", export)
	case rep == nbd.RepAck:
	case rep == nbd.RepErrUnsup:
		if err := n.exportName(export, flags); err != nil {
			return err
		}
	case rep == nbd.RepErrUnknown:
		return kind.Errorf(kind.NotFound, "the server has no export %q", export)
	case rep == nbd.RepErrPolicy, rep == nbd.RepErrTLSReqd:
		return kind.Errorf(kind.Denied, "the server refuses export %q", export)
	case rep == nbd.RepErrShutdown:
		return kind.Errorf(kind.Unavailable, "the server is shutting down")
	default:
		return kind.Errorf(kind.Invalid, "the server answers %#x to export %q", rep, export)
	}
	if n.s.size < 0 {
		return kind.Errorf(kind.Unsupported, "export %q has more than 8 EiB", export)
	}
	if b := n.s.minBlock; b <= 0 || b&(b-1) != 0 || b > 64<<10 || n.s.maxRequest < b {
		return kind.Errorf(kind.Unsupported, "export %q has blocks of %d bytes, %d at most", export, b, n.s.maxRequest)
	}
	return nil
}

// option sends an option and returns the reply that ended it, calling each, if given,
// with those before.
func (n *negotiator) option(option uint32, data []byte, each func(reply uint32, data []byte) error) (uint32, error) {
	if _, err := n.conn.Write(nbd.AppendOption(nil, option, data)); err != nil {
		return 0, err
	}
	for range maxOptionReplies {
		var b [nbd.OptReplyHeaderBytes]byte
		if _, err := io.ReadFull(n.r, b[:]); err != nil {
			return 0, err
		}
		reply, length := binary.BigEndian.Uint32(b[12:]), binary.BigEndian.Uint32(b[16:])
		if binary.BigEndian.Uint64(b[:]) != nbd.MagicOptionReply || binary.BigEndian.Uint32(b[8:]) != option || length > nbd.RepMaxBytes {
			return 0, kind.Errorf(kind.Unsupported, "the server's answer to option %d makes no sense", option)
		}
		data := make([]byte, length)
		if _, err := io.ReadFull(n.r, data); err != nil {
			return 0, err
		}
		if reply == nbd.RepAck || reply&nbd.RepErrBit != 0 {
			return reply, nil
		}
		if each != nil {
			if err := each(reply, data); err != nil {
				return 0, err
			}
		}
	}
	return 0, kind.Errorf(kind.Unsupported, "the server's answer to option %d does not end", option)
}

func (n *negotiator) context(reply uint32, data []byte) error {
	if reply == nbd.RepMetaContext && len(data) > 4 && string(data[4:]) == nbd.MetaContextAllocation {
		n.s.allocation, n.s.contextID = true, binary.BigEndian.Uint32(data)
	}
	return nil
}

func (n *negotiator) info(reply uint32, data []byte, seen *bool) error {
	if reply != nbd.RepInfo || len(data) < 2 {
		return nil
	}
	switch data, what := data[2:], binary.BigEndian.Uint16(data); {
	case what == nbd.InfoExport && len(data) == 10:
		n.s.size, n.s.flags = int64(binary.BigEndian.Uint64(data)), binary.BigEndian.Uint16(data[8:])
		*seen = true
	case what == nbd.InfoBlockSize && len(data) == 12:
		n.s.minBlock = int64(binary.BigEndian.Uint32(data))
		if m := int64(binary.BigEndian.Uint32(data[8:])); m < n.s.maxRequest {
			n.s.maxRequest = m &^ (n.s.minBlock - 1)
		}
	}
	return nil
}

// exportName is what servers know that lack GO.
func (n *negotiator) exportName(export string, flags uint16) error {
	if _, err := n.conn.Write(nbd.AppendOption(nil, nbd.OptExportName, []byte(export))); err != nil {
		return err
	}
	b := make([]byte, 10, 134)
	if flags&nbd.HandshakeNoZeroes == 0 {
		b = b[:134]
	}
	if _, err := io.ReadFull(n.r, b); err != nil {
		return err
	}
	n.s.size, n.s.flags = int64(binary.BigEndian.Uint64(b)), binary.BigEndian.Uint16(b[8:])
	return nil
}

// readOnly tells whether the server takes no changes.
func (s *session) readOnly() bool { return s.flags&nbd.FlagReadOnly != 0 }

// same tells what changed between two sessions that must not, or "".
func (s *session) same(o *session) string {
	var what []string
	if s.size != o.size {
		what = append(what, "size")
	}
	if s.readOnly() != o.readOnly() {
		what = append(what, "read-only flag")
	}
	if s.minBlock != o.minBlock {
		what = append(what, "block size")
	}
	return strings.Join(what, ", ")
}
