package fuse

import (
	"bytes"
	"encoding/binary"
	"math"
	"syscall"

	"github.com/thaw-project/thaw/kind"
)

// The part of the FUSE protocol, version 7, that one directory of fixed-size files
// needs. Layouts are those of include/uapi/linux/fuse.h; integers are in the
// machine's byte order, which is little endian on every platform we build for.
//
// A request is a header and a body:
//
//	 0  4  length of the whole request
//	 4  4  opcode
//	 8  8  unique: names the request; bit 63 marks one that is sent again
//	16  8  node
//	24  4  uid      28  4  gid     32  4  pid
//	36  2  length of extensions after the body, in units of 8 bytes   38  2  padding
//
// and a reply is a header and data:
//
//	0  4  length of the whole reply
//	4  4  0 or a negated errno; for a notification (unique 0) its code
//	8  8  unique of the request
const (
	inHeaderBytes  = 40
	outHeaderBytes = 16

	protocolMajor    = 7
	protocolMinor    = 41 // the newest we know; 36 (Linux 5.17) is what we need
	protocolMinorMin = 36

	// uniqueResent is set in a request's unique when the kernel sends it again
	// after notifyResend; the rest is as it was.
	uniqueResent = 1 << 63

	rootNode = 1
)

type opcode uint32

const (
	opLookup      opcode = 1
	opForget      opcode = 2
	opGetattr     opcode = 3
	opSetattr     opcode = 4
	opOpen        opcode = 14
	opRead        opcode = 15
	opWrite       opcode = 16
	opStatfs      opcode = 17
	opRelease     opcode = 18
	opFsync       opcode = 20
	opFlush       opcode = 25
	opInit        opcode = 26
	opOpendir     opcode = 27
	opReaddir     opcode = 28
	opReleasedir  opcode = 29
	opFsyncdir    opcode = 30
	opAccess      opcode = 34
	opInterrupt   opcode = 36
	opDestroy     opcode = 38
	opIoctl       opcode = 39
	opNotifyReply opcode = 41
	opBatchForget opcode = 42
	opFallocate   opcode = 43

	// opcodeCount bounds the tables indexed by opcode; what is above is counted
	// as 0.
	opcodeCount = 64
)

var opcodeNames = [opcodeCount]string{
	0: "other", opLookup: "lookup", opForget: "forget", opGetattr: "getattr", opSetattr: "setattr", opOpen: "open",
	opRead: "read", opWrite: "write", opStatfs: "statfs", opRelease: "release", opFsync: "fsync", opFlush: "flush",
	opInit: "init", opOpendir: "opendir", opReaddir: "readdir", opReleasedir: "releasedir", opFsyncdir: "fsyncdir",
	opAccess: "access", opInterrupt: "interrupt", opDestroy: "destroy", opIoctl: "ioctl", opNotifyReply: "notify_reply",
	opBatchForget: "batch_forget", opFallocate: "fallocate",
}

// bodyBytes is the least length of each body that is looked into.
var bodyBytes = [opcodeCount]int{
	opLookup:      2,  // name and its terminating zero
	opForget:      8,  // lookups
	opSetattr:     88, // struct fuse_setattr_in
	opOpen:        8,  // flags 4, open flags 4
	opRead:        40, // struct fuse_read_in
	opWrite:       40, // struct fuse_write_in, then the data
	opRelease:     8,  // handle 8, then flags and lock owner, which say nothing to us
	opFsync:       12, // handle 8, flags 4
	opInit:        16, // major 4, minor 4, max_readahead 4, flags 4, then flags2 4
	opReaddir:     40, // struct fuse_read_in
	opBatchForget: 8,  // count 4, dummy 4, then count times node 8, lookups 8
	opFallocate:   32, // struct fuse_fallocate_in
}

// Flags of INIT; those from bit 32 on travel in flags2.
const (
	flagAsyncRead      = 1 << 0
	flagBigWrites      = 1 << 5
	flagAsyncDIO       = 1 << 15
	flagParallelDirops = 1 << 18
	flagAbortError     = 1 << 21
	flagMaxPages       = 1 << 22
	flagExplicitInval  = 1 << 25
	flagInitExt        = 1 << 30
	flagHasResend      = 1 << 39

	// wantFlags is what we ask for where the kernel offers it. Left out on purpose:
	// PASSTHROUGH, because the kernel then counts the mount as stacked and EROFS
	// refuses to be mounted on its files; WRITEBACK_CACHE, because an acknowledged
	// write must have reached the device; AUTO_INVAL_DATA, because nothing changes a
	// file but its own writers; NO_OPEN_SUPPORT, because opens are counted;
	// NO_OPENDIR_SUPPORT, because the kernel then keeps old listings.
	wantFlags = flagAsyncRead | flagBigWrites | flagAsyncDIO | flagParallelDirops | flagAbortError | flagMaxPages |
		flagExplicitInval | flagInitExt | flagHasResend
)

const (
	openDirectIO             = 1 << 0
	openKeepCache            = 1 << 1
	openNoFlush              = 1 << 5 // Linux 5.19; older kernels ask once and are told ENOSYS
	openParallelDirectWrites = 1 << 6

	setattrMode  = 1 << 0
	setattrUID   = 1 << 1
	setattrGID   = 1 << 2
	setattrSize  = 1 << 3
	fsyncData    = 1 << 0
	falKeepSize  = 0x01
	falPunchHole = 0x02
	falZeroRange = 0x10
)

// Notifications: replies with unique 0 and a code for the error.
const (
	notifyInvalInode = 2
	notifyResend     = 7
)

var le = binary.LittleEndian

// request is a decoded request header; body refers to the worker's buffer.
type request struct {
	op     opcode
	unique uint64
	node   uint64
	pid    uint32
	body   []byte
}

// parseRequest decodes and checks what one read of /dev/fuse returned.
func parseRequest(b []byte) (request, error) {
	if len(b) < inHeaderBytes {
		return request{}, kind.Errorf(kind.Invalid, "request of %d bytes is shorter than its header", len(b))
	}
	r := request{
		op:     opcode(le.Uint32(b[4:])),
		unique: le.Uint64(b[8:]),
		node:   le.Uint64(b[16:]),
		pid:    le.Uint32(b[32:]),
	}
	if n := le.Uint32(b); int64(n) != int64(len(b)) {
		return r, kind.Errorf(kind.Invalid, "request of %d bytes says it has %d", len(b), n)
	}
	extensions := int(le.Uint16(b[36:])) * 8
	if extensions > len(b)-inHeaderBytes {
		return r, kind.Errorf(kind.Invalid, "request of %d bytes has %d bytes of extensions", len(b), extensions)
	}
	r.body = b[inHeaderBytes : len(b)-extensions]
	if r.op < opcodeCount && len(r.body) < bodyBytes[r.op] {
		return r, kind.Errorf(kind.Invalid, "%s request with a body of %d bytes", opcodeNames[r.op], len(r.body))
	}
	return r, nil
}

// hasReply tells whether the kernel waits for an answer to op.
func (op opcode) hasReply() bool {
	switch op {
	case opForget, opBatchForget, opInterrupt, opNotifyReply:
		return false
	}
	return true
}

// repeatable tells whether doing op twice is doing it once, and fails only for what the
// device behind a disk does.
func (op opcode) repeatable() bool {
	switch op {
	case opRead, opWrite, opFsync, opFallocate:
		return true
	}
	return false
}

// name decodes a body that is a string.
func name(body []byte) (string, bool) {
	i := bytes.IndexByte(body, 0)
	if i <= 0 || i != len(body)-1 {
		return "", false
	}
	return string(body[:i]), true
}

// ioRange is where a READ or WRITE goes; both start alike.
//
//	0  8  handle   8  8  offset   16  4  size   20  4  flags   24  8  lock owner   32  4  open flags   36  4  padding
type ioRange struct {
	offset int64
	size   int
}

func parseRange(body []byte) (ioRange, syscall.Errno) {
	offset, size := le.Uint64(body[8:]), le.Uint32(body[16:])
	if offset > math.MaxInt64-math.MaxUint32 {
		return ioRange{}, syscall.EINVAL
	}
	return ioRange{offset: int64(offset), size: int(size)}, 0
}

// initRequest is the kernel's side of the handshake.
type initRequest struct {
	major, minor, maxReadahead uint32
	flags                      uint64
}

func parseInit(body []byte) initRequest {
	in := initRequest{
		major:        le.Uint32(body),
		minor:        le.Uint32(body[4:]),
		maxReadahead: le.Uint32(body[8:]),
		flags:        uint64(le.Uint32(body[12:])),
	}
	if in.flags&flagInitExt != 0 && len(body) >= 20 {
		in.flags |= uint64(le.Uint32(body[16:])) << 32
	}
	return in
}

// Negotiated is what INIT agreed on, once in the life of a connection.
type Negotiated struct {
	Minor         uint32 `json:"minor"` // the kernel's protocol version is 7.Minor
	Flags         uint64 `json:"flags"` // FUSE_* flags, those of flags2 from bit 32 on
	MaxReadahead  uint32 `json:"max_readahead"`
	MaxWriteBytes uint32 `json:"max_write_bytes"`
	MaxBackground uint16 `json:"max_background"`
}

// encodeInit writes struct fuse_init_out, 64 bytes.
//
//	 0  4  major           4  4  minor         8  4  max_readahead      12  4  flags
//	16  2  max_background 18  2  congestion   20  4  max_write          24  4  time_gran
//	28  2  max_pages      30  2  alignment    32  4  flags2             36 28  unused
func encodeInit(b []byte, n Negotiated) int {
	clear(b[:64])
	le.PutUint32(b, protocolMajor)
	le.PutUint32(b[4:], min(n.Minor, protocolMinor))
	le.PutUint32(b[8:], n.MaxReadahead)
	le.PutUint32(b[12:], uint32(n.Flags))
	le.PutUint16(b[16:], n.MaxBackground)
	le.PutUint16(b[18:], n.MaxBackground/4*3)
	le.PutUint32(b[20:], n.MaxWriteBytes)
	le.PutUint32(b[24:], 1)
	le.PutUint16(b[28:], uint16(n.MaxWriteBytes/pageBytes))
	le.PutUint32(b[32:], uint32(n.Flags>>32))
	return 64
}

// attributes of a file or the root directory.
type attributes struct {
	node      uint64
	sizeBytes int64
	mode      uint32
	unixTime  int64
}

const attributesBytes = 88

// encodeAttributes writes struct fuse_attr.
//
//	 0  8  ino    8  8  size    16  8  blocks    24  8  atime    32  8  mtime    40  8  ctime
//	48  4  atimensec   52  4  mtimensec   56  4  ctimensec   60  4  mode   64  4  nlink
//	68  4  uid   72  4  gid   76  4  rdev   80  4  blksize   84  4  flags
func encodeAttributes(b []byte, a attributes) {
	clear(b[:attributesBytes])
	le.PutUint64(b, a.node)
	le.PutUint64(b[8:], uint64(a.sizeBytes))
	le.PutUint64(b[16:], uint64(a.sizeBytes/512))
	le.PutUint64(b[24:], uint64(a.unixTime))
	le.PutUint64(b[32:], uint64(a.unixTime))
	le.PutUint64(b[40:], uint64(a.unixTime))
	le.PutUint32(b[60:], a.mode)
	le.PutUint32(b[64:], 1)
	le.PutUint32(b[80:], pageBytes)
}

// encodeEntry writes struct fuse_entry_out: node 8, generation 8, entry_valid 8,
// attr_valid 8, their nanoseconds 4 and 4, attributes.
//
// The entry is valid for no time: every open by path asks again, which is rare and
// cheap, and in return a withdrawn name needs no notification, which would take the
// kernel's lock of the directory, which a process may hold that waits for us.
func encodeEntry(b []byte, a attributes) int {
	clear(b[:40])
	le.PutUint64(b, a.node)
	le.PutUint64(b[24:], attributesValidSeconds)
	encodeAttributes(b[40:], a)
	return 40 + attributesBytes
}

// encodeAttr writes struct fuse_attr_out: attr_valid 8, nanoseconds 4, dummy 4,
// attributes.
func encodeAttr(b []byte, a attributes) int {
	clear(b[:16])
	le.PutUint64(b, attributesValidSeconds)
	encodeAttributes(b[16:], a)
	return 16 + attributesBytes
}

// attributesValidSeconds is how long the kernel may believe attributes, which never
// change as long as the node exists.
const attributesValidSeconds = 24 * 3600

// encodeOpen writes struct fuse_open_out: handle 8, flags 4, backing id 4.
func encodeOpen(b []byte, handle uint64, flags uint32) int {
	clear(b[:16])
	le.PutUint64(b, handle)
	le.PutUint32(b[8:], flags)
	return 16
}

// encodeStatfs writes struct fuse_statfs_out: blocks, bfree, bavail, files, ffree of
// 8 bytes, bsize, namelen, frsize, padding of 4, spare 24. The block size is what a
// loop device takes for its discard granularity.
func encodeStatfs(b []byte, files int) int {
	clear(b[:80])
	le.PutUint64(b[24:], uint64(files))
	le.PutUint32(b[40:], pageBytes)
	le.PutUint32(b[44:], maxIDBytes)
	le.PutUint32(b[48:], pageBytes)
	return 80
}

// appendDirent appends struct fuse_dirent: ino 8, offset of the next entry 8, length
// of name 4, type 4, name padded to a multiple of 8. It tells whether it fit.
func appendDirent(b []byte, limit int, node, next uint64, dtype uint32, name string) ([]byte, bool) {
	size := (24 + len(name) + 7) &^ 7
	if len(b)+size > limit {
		return b, false
	}
	b = le.AppendUint64(b, node)
	b = le.AppendUint64(b, next)
	b = le.AppendUint32(b, uint32(len(name)))
	b = le.AppendUint32(b, dtype)
	b = append(b, name...)
	return append(b, make([]byte, size-24-len(name))...), true
}
