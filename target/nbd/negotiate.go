package nbd

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"

	"github.com/thaw-project/thaw/nbd"
)

// allocationID is the number of the metadata context base:allocation in this server.
const allocationID = 1

// handshake negotiates one connection. It answers each option before it reads the next,
// and holds at most maxOptionBytes of what the peer sends.
type handshake struct {
	s    *Server
	conn net.Conn
	r    io.Reader // conn, without read-ahead: what follows belongs to transmission
	out  []byte

	noZeroes   bool
	tls        bool
	structured bool
	extended   bool
	allocation bool   // base:allocation was chosen
	contextFor string // the export it was chosen for
	export     *export
}

// run returns with export set when transmission begins, or nil when the peer left in
// good order.
func (h *handshake) run() error {
	h.r = h.conn
	var b [nbd.OptionHeaderBytes]byte
	binary.BigEndian.PutUint64(b[:], nbd.MagicServer)
	binary.BigEndian.PutUint64(b[8:], nbd.MagicOption)
	h.out = append(h.out[:0], b[:]...)
	h.out = binary.BigEndian.AppendUint16(h.out, nbd.HandshakeFixedNewstyle|nbd.HandshakeNoZeroes)
	if err := h.send(); err != nil {
		return err
	}
	if _, err := io.ReadFull(h.r, b[:4]); err != nil {
		return err
	}
	flags := binary.BigEndian.Uint32(b[:])
	if flags&^(nbd.HandshakeFixedNewstyle|nbd.HandshakeNoZeroes) != 0 || flags&nbd.HandshakeFixedNewstyle == 0 {
		return fmt.Errorf("client flags %#x", flags)
	}
	h.noZeroes = flags&nbd.HandshakeNoZeroes != 0
	for range maxOptions {
		if _, err := io.ReadFull(h.r, b[:]); err != nil {
			return err
		}
		if binary.BigEndian.Uint64(b[:]) != nbd.MagicOption {
			return errors.New("an option without its magic number")
		}
		option, length := binary.BigEndian.Uint32(b[8:]), binary.BigEndian.Uint32(b[12:])
		if length > maxOptionBytes {
			if length > maxDrainBytes || option == nbd.OptExportName {
				return fmt.Errorf("option %d has %d bytes", option, length)
			}
			if _, err := io.CopyN(io.Discard, h.r, int64(length)); err != nil {
				return err
			}
			h.reply(option, nbd.RepErrTooBig, nil)
			if err := h.send(); err != nil {
				return err
			}
			continue
		}
		data := make([]byte, length)
		if _, err := io.ReadFull(h.r, data); err != nil {
			return err
		}
		done, err := h.option(option, data)
		if err != nil {
			return err
		}
		if err := h.send(); err != nil {
			return err
		}
		if done {
			return nil
		}
	}
	return fmt.Errorf("more than %d options", maxOptions)
}

func (h *handshake) send() error {
	if len(h.out) == 0 {
		return nil
	}
	_, err := h.conn.Write(h.out)
	h.out = h.out[:0]
	return err
}

func (h *handshake) reply(option, reply uint32, data []byte) {
	h.out = nbd.AppendOptionReply(h.out, option, reply, data)
}

// option answers one option into h.out, and tells whether negotiation is over.
func (h *handshake) option(option uint32, data []byte) (bool, error) {
	if h.s.cfg.RequireTLS && !h.tls {
		switch option {
		case nbd.OptStartTLS, nbd.OptAbort:
		case nbd.OptExportName:
			return false, errors.New("no TLS")
		default:
			h.reply(option, nbd.RepErrTLSReqd, nil)
			return false, nil
		}
	}
	switch option {
	case nbd.OptExportName:
		return true, h.exportName(string(data))
	case nbd.OptAbort:
		h.reply(option, nbd.RepAck, nil)
		return true, nil
	case nbd.OptList:
		return false, h.list(data)
	case nbd.OptStartTLS:
		return false, h.startTLS(data)
	case nbd.OptInfo, nbd.OptGo:
		return h.info(option, data), nil
	case nbd.OptStructuredReply:
		switch {
		case len(data) > 0:
			h.reply(option, nbd.RepErrInvalid, nil)
		case h.extended:
			h.reply(option, nbd.RepErrExtHeaderReqd, nil)
		default:
			h.structured = true
			h.reply(option, nbd.RepAck, nil)
		}
	case nbd.OptExtendedHeaders:
		if len(data) > 0 || h.extended {
			h.reply(option, nbd.RepErrInvalid, nil)
			break
		}
		h.extended, h.structured = true, true
		h.reply(option, nbd.RepAck, nil)
	case nbd.OptListMetaContext, nbd.OptSetMetaContext:
		h.metaContext(option, data)
	default:
		h.reply(option, nbd.RepErrUnsup, nil)
	}
	return false, nil
}

// exportName is the option that knows no error but disconnecting.
func (h *handshake) exportName(name string) error {
	x := h.s.lookup(name)
	if x == nil {
		return fmt.Errorf("no export %.100q", name)
	}
	if x.MinBlock > 512 {
		return fmt.Errorf("export %.100q has blocks of %d bytes, and the client did not ask", name, x.MinBlock)
	}
	h.export = x
	h.keepContext()
	h.out = binary.BigEndian.AppendUint64(h.out, uint64(x.size))
	h.out = binary.BigEndian.AppendUint16(h.out, h.flags(x))
	if !h.noZeroes {
		h.out = append(h.out, make([]byte, 124)...)
	}
	return nil
}

func (h *handshake) flags(x *export) uint16 {
	if h.structured {
		return x.flags | nbd.FlagSendDF
	}
	return x.flags
}

// keepContext drops a metadata context that was chosen for another export.
func (h *handshake) keepContext() {
	h.allocation = h.allocation && h.s.lookup(h.contextFor) == h.export
}

func (h *handshake) list(data []byte) error {
	if len(data) > 0 {
		h.reply(nbd.OptList, nbd.RepErrInvalid, nil)
		return nil
	}
	for _, e := range h.s.Exports() {
		h.reply(nbd.OptList, nbd.RepServer, append(nbd.AppendString(nil, e.Name), e.Description...))
		if len(h.out) > maxOptionBytes { // a long list is not held in memory
			if err := h.send(); err != nil {
				return err
			}
		}
	}
	h.reply(nbd.OptList, nbd.RepAck, nil)
	return nil
}

// startTLS is the seam for TLS: what was negotiated before does not count after.
func (h *handshake) startTLS(data []byte) error {
	switch {
	case len(data) > 0 || h.tls:
		h.reply(nbd.OptStartTLS, nbd.RepErrInvalid, nil)
		return nil
	case h.s.cfg.TLS == nil:
		h.reply(nbd.OptStartTLS, nbd.RepErrUnsup, nil)
		return nil
	}
	h.reply(nbd.OptStartTLS, nbd.RepAck, nil)
	if err := h.send(); err != nil {
		return err
	}
	c, err := h.s.cfg.TLS(h.conn)
	if err != nil {
		return fmt.Errorf("TLS: %w", err)
	}
	h.conn, h.r, h.tls = c, c, true
	h.structured, h.extended, h.allocation = false, false, false
	return nil
}

// info answers INFO and GO, and tells whether transmission begins.
func (h *handshake) info(option uint32, data []byte) bool {
	name, rest, ok := nbd.CutString(data)
	if !ok || len(rest) < 2 || len(rest) != 2+2*int(binary.BigEndian.Uint16(rest)) {
		h.reply(option, nbd.RepErrInvalid, nil)
		return false
	}
	var wanted [nbd.InfoBlockSize + 1]bool
	for rest = rest[2:]; len(rest) > 0; rest = rest[2:] {
		if i := binary.BigEndian.Uint16(rest); int(i) < len(wanted) {
			wanted[i] = true
		}
	}
	x := h.s.lookup(name)
	switch {
	case x == nil:
		h.reply(option, nbd.RepErrUnknown, nil)
		return false
	case option == nbd.OptGo && x.MinBlock > 512 && !wanted[nbd.InfoBlockSize]:
		h.reply(option, nbd.RepErrBlockSizeReqd, nil)
		return false
	}
	b := binary.BigEndian.AppendUint16(nil, nbd.InfoExport)
	b = binary.BigEndian.AppendUint64(b, uint64(x.size))
	h.reply(option, nbd.RepInfo, binary.BigEndian.AppendUint16(b, h.flags(x)))
	if wanted[nbd.InfoName] {
		h.reply(option, nbd.RepInfo, append(binary.BigEndian.AppendUint16(nil, nbd.InfoName), x.Name...))
	}
	if wanted[nbd.InfoDescription] && x.Description != "" {
		h.reply(option, nbd.RepInfo, append(binary.BigEndian.AppendUint16(nil, nbd.InfoDescription), x.Description...))
	}
	if wanted[nbd.InfoBlockSize] {
		b := binary.BigEndian.AppendUint16(nil, nbd.InfoBlockSize)
		b = binary.BigEndian.AppendUint32(b, uint32(x.MinBlock))
		b = binary.BigEndian.AppendUint32(b, uint32(x.PreferredBlock))
		h.reply(option, nbd.RepInfo, binary.BigEndian.AppendUint32(b, uint32(h.s.cfg.MaxRequestBytes)))
	}
	h.reply(option, nbd.RepAck, nil)
	if option != nbd.OptGo {
		return false
	}
	h.export = x
	h.keepContext()
	return true
}

// metaContext answers LIST_META_CONTEXT and SET_META_CONTEXT. There is one context.
func (h *handshake) metaContext(option uint32, data []byte) {
	name, rest, ok := nbd.CutString(data)
	if !ok || len(rest) < 4 || !h.structured {
		h.reply(option, nbd.RepErrInvalid, nil)
		return
	}
	count := binary.BigEndian.Uint32(rest)
	rest = rest[4:]
	match := option == nbd.OptListMetaContext && count == 0
	for ; count > 0; count-- {
		var query string
		if query, rest, ok = nbd.CutString(rest); !ok {
			h.reply(option, nbd.RepErrInvalid, nil)
			return
		}
		match = match || query == nbd.MetaContextAllocation ||
			option == nbd.OptListMetaContext && query != "" && strings.HasSuffix(query, ":") && strings.HasPrefix(nbd.MetaContextAllocation, query)
	}
	if len(rest) > 0 {
		h.reply(option, nbd.RepErrInvalid, nil)
		return
	}
	if h.s.lookup(name) == nil {
		h.reply(option, nbd.RepErrUnknown, nil)
		return
	}
	if option == nbd.OptSetMetaContext {
		h.allocation, h.contextFor = match, name
	}
	if match {
		id := uint32(0) // reserved in lists
		if option == nbd.OptSetMetaContext {
			id = allocationID
		}
		h.reply(option, nbd.RepMetaContext, append(binary.BigEndian.AppendUint32(nil, id), nbd.MetaContextAllocation...))
	}
	h.reply(option, nbd.RepAck, nil)
}
