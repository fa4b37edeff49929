package nbd

import (
	"encoding/binary"
	"io"
	"time"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/nbd"
)

const (
	// holeBytes is from what length on a read looks for holes. Finding one saves
	// copying zeros; asking costs about as much as copying a few blocks.
	holeBytes = 32 << 10
	// maxReadChunks bounds the chunks of one reply; their headers fit headRoom.
	maxReadChunks = 64
	// maxExtents bounds the extents told in one reply; clients ask again.
	maxExtents = 256
	statusRoom = nbd.ExtendedChunkBytes + 8 + maxExtents*16
)

// warnEvery is how often a connection logs that its device fails.
const warnEvery = time.Second

// zeroes is what NO_HOLE writes.
var zeroes [64 << 10]byte

// allowed lists the flags each command may carry besides FUA.
var allowed = [...]uint16{
	nbd.CmdRead:        nbd.CmdFlagDF,
	nbd.CmdWrite:       nbd.CmdFlagPayloadLen,
	nbd.CmdDisc:        0,
	nbd.CmdFlush:       0,
	nbd.CmdTrim:        0,
	nbd.CmdCache:       0,
	nbd.CmdWriteZeroes: nbd.CmdFlagNoHole | nbd.CmdFlagFastZero,
	nbd.CmdBlockStatus: nbd.CmdFlagReqOne,
}

// check tells why a request cannot be served, or 0.
func (c *conn) check(req *nbd.Request) nbd.Errno {
	if int(req.Type) >= len(allowed) || req.Flags&^(allowed[req.Type]|nbd.CmdFlagFUA) != 0 {
		return nbd.EINVAL
	}
	if req.Flags&nbd.CmdFlagDF != 0 && !c.structured ||
		req.Type == nbd.CmdWrite && c.extended != (req.Flags&nbd.CmdFlagPayloadLen != 0) ||
		req.Type == nbd.CmdBlockStatus && !c.allocation {
		return nbd.EINVAL
	}
	if req.Type == nbd.CmdFlush {
		if req.Offset != 0 || req.Length != 0 {
			return nbd.EINVAL
		}
		return 0
	}
	changes := req.Type == nbd.CmdWrite || req.Type == nbd.CmdTrim || req.Type == nbd.CmdWriteZeroes
	size, mask := uint64(c.x.size), uint64(c.x.MinBlock-1)
	switch {
	case changes && c.x.ReadOnly:
		return nbd.EPERM
	case req.Offset > size || req.Length > size-req.Offset:
		if req.Type == nbd.CmdWrite || req.Type == nbd.CmdWriteZeroes {
			return nbd.ENOSPC
		}
		return nbd.EINVAL
	case req.Length == 0 || (req.Offset|req.Length)&mask != 0:
		return nbd.EINVAL
	case req.Type == nbd.CmdRead && req.Length > uint64(c.s.cfg.MaxRequestBytes):
		return nbd.EINVAL
	case req.Flags&nbd.CmdFlagDF != 0 && req.Length > chunkBytes:
		return nbd.EOVERFLOW
	}
	return 0
}

// errno maps a device's error, and logs those that somebody has to look at.
func (c *conn) errno(what string, err error) nbd.Errno {
	if err == nil {
		return 0
	}
	e := nbd.ErrnoOf(err)
	// A disk that is gone fails thousands of requests a second: one line will do.
	if now := time.Now().UnixNano(); e == nbd.EIO && now-c.warned.Load() > int64(warnEvery) {
		c.warned.Store(now)
		c.s.log.Warn("a device failed an NBD request", "export", c.x.Name, "request", what, "error", err)
	}
	return e
}

// readAt fills p from the device.
func (c *conn) readAt(p []byte, offset int64) nbd.Errno {
	n, err := c.dev.ReadAt(p, offset)
	if n == len(p) {
		return 0
	}
	if err == nil || err == io.EOF {
		err = kind.Errorf(kind.IO, "read %d of %d bytes at %d", n, len(p), offset)
	}
	return c.errno("read", err)
}

// write writes p at the request's offset, and flushes where FUA asks.
func (c *conn) write(req *nbd.Request, p []byte) nbd.Errno {
	if _, err := c.dev.WriteAt(p, int64(req.Offset)); err != nil {
		return c.errno("write", err)
	}
	return c.fua(req)
}

func (c *conn) fua(req *nbd.Request) nbd.Errno {
	if req.Flags&nbd.CmdFlagFUA == 0 || c.x.ReadOnly {
		return 0
	}
	return c.errno("flush", c.dev.Flush())
}

// control serves a request without data on the wire. scratch is memory it may use, or
// nil.
func (c *conn) control(req *nbd.Request, scratch []byte) nbd.Errno {
	off, n := int64(req.Offset), int64(req.Length)
	switch req.Type {
	case nbd.CmdFlush:
		if c.x.ReadOnly {
			return 0
		}
		return c.errno("flush", c.dev.Flush())
	case nbd.CmdTrim:
		if err := c.dev.Discard(off, n); err != nil {
			return c.errno("trim", err)
		}
		return c.fua(req)
	case nbd.CmdCache:
		return c.cache(off, n, scratch)
	}
	// Write zeroes.
	switch {
	case req.Flags&nbd.CmdFlagFastZero != 0 && (req.Flags&nbd.CmdFlagNoHole != 0 || c.x.fastZero == nil || !c.x.fastZero.FastZero(off, n)):
		return nbd.ENOTSUP
	case req.Flags&nbd.CmdFlagNoHole != 0:
		// WriteZeroes frees what it can; space that shall stay is written.
		for n > 0 {
			if c.draining.Load() {
				return nbd.ESHUTDOWN
			}
			m := min(n, int64(len(zeroes)))
			if _, err := c.dev.WriteAt(zeroes[:m], off); err != nil {
				return c.errno("write zeroes", err)
			}
			off, n = off+m, n-m
		}
	default:
		if err := c.dev.WriteZeroes(off, n); err != nil {
			return c.errno("write zeroes", err)
		}
	}
	return c.fua(req)
}

// cache reads what a client will want, so that the layers below have it at hand.
func (c *conn) cache(off, n int64, scratch []byte) nbd.Errno {
	if len(scratch) < 4<<10 {
		b := c.s.budget.take(arenaBytes)
		if b == nil {
			return 0 // it was but a hint
		}
		defer c.s.budget.give(b)
		scratch = b.b[:arenaBytes]
	}
	for n > 0 && !c.draining.Load() {
		m := min(n, int64(len(scratch)))
		if e := c.readAt(scratch[:m], off); e != 0 {
			return e
		}
		off, n = off+m, n-m
	}
	return 0
}

// putReply writes a reply without data and returns its length, at most smallReply.
func (c *conn) putReply(b []byte, req *nbd.Request, errno nbd.Errno) int {
	if !c.structured || !c.extended && errno == 0 && req.Type != nbd.CmdRead && req.Type != nbd.CmdBlockStatus {
		return nbd.PutSimple(b, errno, req.Cookie)
	}
	chunk := nbd.Chunk{Flags: nbd.ReplyFlagDone, Type: nbd.ReplyNone, Cookie: req.Cookie, Offset: req.Offset}
	head := nbd.ChunkLen(c.extended)
	if errno != 0 {
		text := errno.String()
		chunk.Type, chunk.Length = nbd.ReplyError, uint64(6+len(text))
		binary.BigEndian.PutUint32(b[head:], uint32(errno))
		binary.BigEndian.PutUint16(b[head+4:], uint16(len(text)))
		copy(b[head+6:], text)
	}
	chunk.Encode(b, c.extended)
	return head + int(chunk.Length)
}

// putDataHeader writes the header of a chunk with n bytes of data at offset.
func (c *conn) putDataHeader(b []byte, req *nbd.Request, flags uint16, offset, n uint64) int {
	chunk := nbd.Chunk{Flags: flags, Type: nbd.ReplyOffsetData, Cookie: req.Cookie, Offset: req.Offset, Length: 8 + n}
	head := chunk.Encode(b, c.extended)
	binary.BigEndian.PutUint64(b[head:], offset)
	return head + 8
}

// readRoom is how many bytes of headers the reply to a read may have.
func (c *conn) readRoom(req *nbd.Request) int {
	if c.mapped(req) {
		return headRoom
	}
	return smallReply
}

// mapped tells whether a read looks for holes.
func (c *conn) mapped(req *nbd.Request) bool {
	return c.x.mapper != nil && c.structured && req.Length >= holeBytes && req.Flags&nbd.CmdFlagDF == 0
}

// buildRead writes the whole reply to a read into b, which has readRoom more bytes than
// are read, and returns its length.
func (c *conn) buildRead(b []byte, req *nbd.Request) int {
	head := 0
	switch {
	case c.mapped(req):
		return c.buildMapped(b, req)
	case c.structured:
		head = c.putDataHeader(b, req, nbd.ReplyFlagDone, req.Offset, req.Length)
	default:
		head = nbd.PutSimple(b, 0, req.Cookie)
	}
	n := int(req.Length)
	if errno := c.readAt(b[head:head+n], int64(req.Offset)); errno != 0 {
		return c.putReply(b, req, errno)
	}
	return head + n
}

// buildMapped is buildRead that sends holes as such.
func (c *conn) buildMapped(b []byte, req *nbd.Request) int {
	off, left := req.Offset, req.Length
	at := 0
	for i := 0; left > 0; i++ {
		n, zero := left, false
		if i < maxReadChunks-1 {
			m, _, z, err := c.x.mapper.Extent(int64(off), int64(left))
			if err == nil && m > 0 && uint64(m) <= left {
				n, zero = uint64(m), z
			}
		}
		flags := uint16(0)
		if n == left {
			flags = nbd.ReplyFlagDone
		}
		if zero {
			chunk := nbd.Chunk{Flags: flags, Type: nbd.ReplyOffsetHole, Cookie: req.Cookie, Offset: req.Offset, Length: 12}
			at += chunk.Encode(b[at:], c.extended)
			binary.BigEndian.PutUint64(b[at:], off)
			binary.BigEndian.PutUint32(b[at+8:], uint32(n))
			at += 12
		} else {
			at += c.putDataHeader(b[at:], req, flags, off, n)
			if errno := c.readAt(b[at:at+int(n)], int64(off)); errno != 0 {
				return c.putReply(b, req, errno)
			}
			at += int(n)
		}
		off, left = off+n, left-n
	}
	return at
}

// buildStatus writes the reply to a block status request into b, statusRoom bytes, and
// returns its length.
func (c *conn) buildStatus(b []byte, req *nbd.Request) int {
	head := nbd.ChunkLen(c.extended)
	at := head
	binary.BigEndian.PutUint32(b[at:], allocationID)
	at += 4
	if c.extended {
		at += 4 // the count, known at the end
	}
	first := at
	limit := maxExtents
	if req.Flags&nbd.CmdFlagReqOne != 0 {
		limit = 1
	}
	count := 0
	var last, length uint64 // the extent not yet written
	put := func() {
		if c.extended {
			binary.BigEndian.PutUint64(b[at:], length)
			binary.BigEndian.PutUint64(b[at+8:], last)
			at += 16
		} else {
			binary.BigEndian.PutUint32(b[at:], uint32(length))
			binary.BigEndian.PutUint32(b[at+4:], uint32(last))
			at += 8
		}
		count++
	}
	for off, left := req.Offset, req.Length; left > 0; {
		n, flags := left, uint64(0)
		if c.x.mapper != nil {
			m, hole, zero, err := c.x.mapper.Extent(int64(off), int64(left))
			if err != nil || m <= 0 || uint64(m) > left {
				if off == req.Offset {
					return c.putReply(b, req, max(c.errno("block status", err), nbd.EIO))
				}
				break // tell what is known
			}
			n = uint64(m)
			if hole {
				flags |= nbd.StateHole
			}
			if zero {
				flags |= nbd.StateZero
			}
		}
		if length > 0 && flags != last {
			put()
			length = 0
			if count == limit {
				break
			}
		}
		last, length = flags, length+n
		off, left = off+n, left-n
	}
	if length > 0 {
		put()
	}
	chunk := nbd.Chunk{Flags: nbd.ReplyFlagDone, Type: nbd.ReplyBlockStatus, Cookie: req.Cookie, Offset: req.Offset, Length: uint64(at - head)}
	if c.extended {
		chunk.Type = nbd.ReplyBlockStatusExt
		binary.BigEndian.PutUint32(b[first-4:], uint32(count))
	}
	chunk.Encode(b, c.extended)
	return at
}
