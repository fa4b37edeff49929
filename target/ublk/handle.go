package ublk

import (
	"errors"
	"io"
	"math"

	"golang.org/x/sys/unix"

	"github.com/thaw-project/thaw/kind"
)

func opName(op uint32) string {
	switch op {
	case opRead:
		return "read"
	case opWrite:
		return "write"
	case opFlush:
		return "flush"
	case opDiscard:
		return "discard"
	case opWriteZeroes:
		return "write zeroes"
	}
	return "unknown"
}

// handle does what a request asks for, with its data in buf, and returns the result:
// bytes moved, or a negated errno.
func (s *Server) handle(d ioDesc, buf []byte) int32 {
	// A sector number too large to shift is as far outside as any.
	start := min(d.startSector, math.MaxInt64>>sectorShift)
	op, off, length := d.opFlags&opMask, int64(start)<<sectorShift, int64(d.sectors)<<sectorShift
	err := s.do(op, d.opFlags&flagFUA != 0, off, length, buf)
	if err != nil {
		s.complain(op, off, length, err)
		return -int32(errno(err))
	}
	if op == opRead || op == opWrite {
		return int32(length)
	}
	return 0
}

func (s *Server) do(op uint32, fua bool, off, length int64, buf []byte) error {
	size := s.o.Device.SizeBytes()
	if op != opFlush && (length == 0 || off > size || length > size-off) {
		return kind.Errorf(kind.Invalid, "%d bytes at %d of a device of %d", length, off, size)
	}
	switch op {
	case opRead, opWrite:
		if length > int64(len(buf)) {
			return kind.Errorf(kind.Invalid, "%d bytes, more than %d", length, len(buf))
		}
		buf = buf[:length]
	}
	switch op {
	case opRead:
		s.stats.Reads.Add(1)
		n, err := s.o.Device.ReadAt(buf, off)
		if errors.Is(err, io.EOF) && n == len(buf) {
			err = nil
		}
		s.stats.BytesRead.Add(int64(n))
		return err
	case opWrite:
		s.stats.Writes.Add(1)
		n, err := s.o.Device.WriteAt(buf, off)
		s.stats.BytesWritten.Add(int64(n))
		if err == nil && fua {
			err = s.o.Device.Flush()
		}
		return err
	case opFlush:
		s.stats.Flushes.Add(1)
		return s.o.Device.Flush()
	case opDiscard:
		s.stats.Discards.Add(1)
		return s.o.Device.Discard(off, length)
	case opWriteZeroes:
		s.stats.Discards.Add(1)
		return s.o.Device.WriteZeroes(off, length)
	}
	return kind.Errorf(kind.Unsupported, "operation %d", op)
}

// errno is what the block layer makes sense of: it turns others, such as EAGAIN, into
// something that would mislead the users of a disk.
func errno(err error) unix.Errno {
	switch kind.Of(err) {
	case kind.NoSpace:
		return unix.ENOSPC
	case kind.Unsupported:
		return unix.EOPNOTSUPP
	}
	return unix.EIO
}
