package fuse

import (
	"errors"
	"io"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/thaw-project/thaw/kind"
)

// worker serves one request at a time in its own buffer.
//
// A request is read to inOffset, its reply is built at outOffset, over it: a handler
// takes what it needs out of the request before it writes to w.data.
type worker struct {
	c   *conn
	p   *Presenter
	buf []byte

	events [1]unix.EpollEvent // scratch of conn.next
}

// data is where the data of a reply goes.
func (w *worker) data() []byte { return w.buf[dataOffset:] }

// serve handles one request as it was read from the kernel.
func (w *worker) serve(b []byte) {
	start := time.Now()
	r, err := parseRequest(b)
	if err != nil {
		// The kernel does not do this; whoever does gets one answer if it can be
		// addressed at all.
		w.p.log.Error("fuse: bad request", "error", err)
		w.p.metrics.done(0, syscall.EINVAL, start)
		if len(b) >= inHeaderBytes && r.op.hasReply() {
			w.reply(&r, 0, syscall.EINVAL)
		}
		return
	}
	op, unique := r.op, r.unique
	n, errno := w.handle(&r)
	w.p.metrics.done(op, errno, start)
	if !op.hasReply() {
		return
	}
	if errno != 0 && op.repeatable() && w.c.interrupted.Load() && w.p.Survives() {
		return // the next process gets it again
	}
	err = w.reply(&r, n, errno)
	if op == opOpen && errno == 0 {
		handle := unique &^ (uniqueResent | handleUnsure)
		if err == unix.ENOENT {
			w.p.opens.remove(handle) // the kernel no longer wants it
		} else {
			w.p.opens.answered(handle)
		}
	}
}

// reply sends n bytes of w.data, or an error. The kernel answers ENOENT when the
// request is gone, which only open has to know.
func (w *worker) reply(r *request, n int, errno syscall.Errno) error {
	if errno != 0 {
		n = 0
	}
	b := w.buf[outOffset : dataOffset+n]
	le.PutUint32(b, uint32(len(b)))
	le.PutUint32(b[4:], uint32(-int32(errno)))
	le.PutUint64(b[8:], r.unique)
	for {
		_, err := unix.Write(w.c.fd, b)
		switch err {
		case unix.EINTR, unix.EAGAIN:
			continue
		case nil, unix.ENOENT, unix.ENODEV:
		default:
			w.p.log.Error("fuse: reply refused by the kernel", "op", r.op, "bytes", n, "error", err)
			if n > 0 { // then at least let the caller go
				n, b = 0, b[:outHeaderBytes]
				le.PutUint32(b, outHeaderBytes)
				errno = syscall.EIO
				le.PutUint32(b[4:], uint32(-int32(errno)))
				continue
			}
		}
		return err
	}
}

// handle does the request and leaves n bytes in w.data.
func (w *worker) handle(r *request) (n int, errno syscall.Errno) {
	switch r.op {
	case opRead:
		return w.read(r)
	case opWrite:
		return w.write(r)
	case opFsync:
		return w.fsync(r)
	case opFallocate:
		return w.fallocate(r)
	case opLookup:
		return w.lookup(r)
	case opGetattr:
		return w.getattr(r)
	case opSetattr:
		return w.setattr(r)
	case opOpen:
		return w.open(r)
	case opRelease:
		w.p.opens.remove(le.Uint64(r.body))
		return 0, 0
	case opInit:
		return w.init(r)
	case opStatfs:
		return encodeStatfs(w.data(), len(w.p.disks.Load().byID)), 0
	case opOpendir:
		// Told ENOSYS, the kernel would open directories by itself and keep what it
		// read of them for ever, disks that are long gone too (FOPEN_CACHE_DIR).
		return encodeOpen(w.data(), 0, 0), 0
	case opReaddir:
		return w.readdir(r)
	case opFsyncdir, opReleasedir, opAccess, opDestroy:
		return 0, 0
	case opForget, opBatchForget, opNotifyReply:
		// Nodes live until Withdraw, whether the kernel remembers them or not.
		return 0, 0
	case opInterrupt:
		// Requests are short, none is worth interrupting. The kernel takes this
		// answer to mean that it should not ask again.
		w.reply(r, 0, syscall.ENOSYS)
		return 0, 0
	case opIoctl:
		return 0, syscall.ENOTTY
	}
	// Flush, xattrs, lseek, locks, ...: the kernel then does without, and
	// mostly remembers not to ask again.
	return 0, syscall.ENOSYS
}

// disk finds the disk of a request.
func (w *worker) disk(r *request) (*disk, syscall.Errno) {
	d := w.p.disks.Load().byNode[r.node]
	if d == nil {
		return nil, syscall.ESTALE
	}
	return d, 0
}

// fail maps a device's error for the kernel and tells the operator, at most once a
// second for each disk.
func (w *worker) fail(d *disk, what string, offset int64, size int64, err error) syscall.Errno {
	errno := kind.Errno(err)
	switch errno {
	case syscall.EAGAIN, syscall.ENOSYS, syscall.ECANCELED, syscall.ENOENT, syscall.EEXIST, syscall.EBUSY, syscall.EACCES:
		// These mean something else to who reads or writes a file: EAGAIN makes
		// him try for ever, ENOSYS makes the kernel drop the operation.
		errno = syscall.EIO
	}
	now := time.Now().Unix()
	if last := d.lastLog.Load(); now > last && !w.c.interrupted.Load() && d.lastLog.CompareAndSwap(last, now) {
		w.p.log.Error("fuse: "+what+" failed", "disk", d.ID, "offset", offset, "bytes", size, "errno", errno.Error(), "error", err)
	}
	return errno
}

func (w *worker) read(r *request) (int, syscall.Errno) {
	d, errno := w.disk(r)
	if errno != 0 {
		return 0, errno
	}
	at, errno := parseRange(r.body)
	if errno != 0 {
		return 0, errno
	}
	if at.size > maxIOBytes {
		return 0, syscall.EINVAL
	}
	if at.offset >= d.SizeBytes {
		return 0, 0
	}
	size := int(min(int64(at.size), d.SizeBytes-at.offset))
	device, err := d.acquire()
	if err != nil {
		return 0, w.fail(d, "read", at.offset, int64(size), err)
	}
	n, err := device.ReadAt(w.buf[dataOffset:dataOffset+size], at.offset)
	d.mu.RUnlock()
	if n < size {
		// A short reply would be taken for the end of the file.
		if err == nil || errors.Is(err, io.EOF) {
			err = kind.Errorf(kind.IO, "short read of %d bytes", n)
		}
		return 0, w.fail(d, "read", at.offset, int64(size), err)
	}
	w.p.metrics.bytesRead.Add(int64(size))
	return size, 0
}

func (w *worker) write(r *request) (int, syscall.Errno) {
	d, errno := w.disk(r)
	if errno != 0 {
		return 0, errno
	}
	at, errno := parseRange(r.body)
	if errno != 0 {
		return 0, errno
	}
	data := r.body[40:]
	if at.size != len(data) {
		return 0, syscall.EINVAL
	}
	if d.ReadOnly {
		return 0, syscall.EROFS
	}
	if at.offset+int64(at.size) > d.SizeBytes {
		return 0, syscall.ENOSPC // as a block device does
	}
	device, err := d.acquire()
	if err != nil {
		return 0, w.fail(d, "write", at.offset, int64(at.size), err)
	}
	n, err := device.WriteAt(data, at.offset)
	d.mu.RUnlock()
	if n < at.size {
		if err == nil {
			err = kind.Errorf(kind.IO, "short write of %d bytes", n)
		}
		return 0, w.fail(d, "write", at.offset, int64(at.size), err)
	}
	w.p.metrics.bytesWritten.Add(int64(n))
	le.PutUint64(w.data(), uint64(n)) // struct fuse_write_out: size 4, padding 4
	return 8, 0
}

func (w *worker) fsync(r *request) (int, syscall.Errno) {
	if r.node == rootNode {
		return 0, 0
	}
	d, errno := w.disk(r)
	if errno != 0 {
		return 0, errno
	}
	if d.ReadOnly {
		return 0, 0
	}
	device, err := d.acquire()
	if err == nil {
		err = device.Flush()
		d.mu.RUnlock()
	}
	if err != nil {
		return 0, w.fail(d, "flush", 0, 0, err)
	}
	return 0, 0
}

// fallocate punches holes and writes zeros: handle 8, offset 8, length 8, mode 4.
func (w *worker) fallocate(r *request) (int, syscall.Errno) {
	d, errno := w.disk(r)
	if errno != 0 {
		return 0, errno
	}
	offset, length, mode := le.Uint64(r.body[8:]), le.Uint64(r.body[16:]), le.Uint32(r.body[24:])
	size := uint64(d.SizeBytes)
	switch {
	case d.ReadOnly:
		return 0, syscall.EROFS
	case mode&^(falKeepSize|falPunchHole|falZeroRange) != 0 || mode&(falPunchHole|falZeroRange) == 0:
		return 0, syscall.EOPNOTSUPP
	case length == 0:
		return 0, syscall.EINVAL
	case mode&falKeepSize == 0 && (offset > size || length > size-offset):
		return 0, syscall.ENOSPC
	case offset >= size:
		return 0, 0
	}
	length = min(length, size-offset)
	device, err := d.acquire()
	if err == nil {
		if mode&falPunchHole != 0 {
			err = device.Discard(int64(offset), int64(length))
		} else {
			err = device.WriteZeroes(int64(offset), int64(length))
		}
		d.mu.RUnlock()
	}
	if err != nil {
		return 0, w.fail(d, "discard", int64(offset), int64(length), err)
	}
	return 0, 0
}

func (w *worker) lookup(r *request) (int, syscall.Errno) {
	id, ok := name(r.body)
	if !ok {
		return 0, syscall.EINVAL
	}
	if r.node != rootNode {
		return 0, syscall.ENOTDIR
	}
	d := w.p.disks.Load().byID[id]
	if d == nil || d.leaving.Load() {
		return 0, syscall.ENOENT
	}
	return encodeEntry(w.data(), d.attributes()), 0
}

var rootAttributes = attributes{node: rootNode, mode: 0o040700}

func (w *worker) attributes(node uint64) (attributes, syscall.Errno) {
	if node == rootNode {
		return rootAttributes, 0
	}
	d := w.p.disks.Load().byNode[node]
	if d == nil {
		return attributes{}, syscall.ESTALE
	}
	return d.attributes(), 0
}

func (w *worker) getattr(r *request) (int, syscall.Errno) {
	a, errno := w.attributes(r.node)
	if errno != 0 {
		return 0, errno
	}
	return encodeAttr(w.data(), a), 0
}

// setattr refuses what would change something; times are nobody's business here.
//
//	0  4  which    4  4  padding    8  8  handle    16  8  size    ...    68  4  mode    76  4  uid    80  4  gid
func (w *worker) setattr(r *request) (int, syscall.Errno) {
	a, errno := w.attributes(r.node)
	if errno != 0 {
		return 0, errno
	}
	which := le.Uint32(r.body)
	switch {
	case which&setattrSize != 0 && le.Uint64(r.body[16:]) != uint64(a.sizeBytes),
		which&setattrMode != 0 && le.Uint32(r.body[68:])&0o7777 != a.mode&0o7777,
		which&setattrUID != 0 && le.Uint32(r.body[76:]) != 0,
		which&setattrGID != 0 && le.Uint32(r.body[80:]) != 0:
		return 0, syscall.EPERM
	}
	return encodeAttr(w.data(), a), 0
}

func (w *worker) open(r *request) (int, syscall.Errno) {
	d, errno := w.disk(r)
	if errno != 0 {
		return 0, errno
	}
	flags := le.Uint32(r.body)
	if d.ReadOnly && flags&unix.O_ACCMODE != unix.O_RDONLY {
		return 0, syscall.EROFS
	}
	handle, ok := w.p.opens.add(r.node, r.unique)
	if !ok {
		return 0, syscall.ENFILE
	}
	if d.leaving.Load() { // after add: see Presenter.quiesce
		w.p.opens.remove(handle)
		return 0, syscall.ENOENT
	}
	return encodeOpen(w.data(), handle, d.openFlags()), 0
}

// readdir lists the disks in order of node, which is what the offset counts, so
// that a list read in pieces has each disk that stayed exactly once.
func (w *worker) readdir(r *request) (int, syscall.Errno) {
	if r.node != rootNode {
		return 0, syscall.ENOTDIR
	}
	at, errno := parseRange(r.body)
	if errno != 0 {
		return 0, errno
	}
	limit := min(at.size, maxIOBytes)
	const dtDir, dtReg = 4, 8
	b, fits := w.data()[:0], true
	if at.offset < 1 {
		b, fits = appendDirent(b, limit, rootNode, 1, dtDir, ".")
	}
	if fits && at.offset < 2 {
		b, fits = appendDirent(b, limit, rootNode, 2, dtDir, "..")
	}
	for _, d := range w.p.disks.Load().sorted() {
		if int64(d.node) <= at.offset || d.leaving.Load() {
			continue
		}
		if !fits {
			break
		}
		b, fits = appendDirent(b, limit, d.node, d.node, dtReg, d.ID)
	}
	return len(b), 0
}

// init answers the handshake, always the same way for one connection.
func (w *worker) init(r *request) (int, syscall.Errno) {
	in := parseInit(r.body)
	if in.major > protocolMajor {
		// The kernel will ask again in our version.
		clear(w.data()[:64])
		le.PutUint32(w.data(), protocolMajor)
		le.PutUint32(w.data()[4:], protocolMinor)
		return 64, 0
	}
	if in.major < protocolMajor || in.minor < protocolMinorMin {
		w.p.log.Error("fuse: the kernel's protocol is too old: Linux 5.17 is needed", "major", in.major, "minor", in.minor)
		return 0, syscall.EPROTO
	}
	p := w.p
	var agreed Negotiated
	err := p.save(func(s *state) {
		if s.Init == nil {
			s.Init = &Negotiated{
				Minor:         in.minor,
				Flags:         in.flags & wantFlags,
				MaxReadahead:  min(max(in.maxReadahead, pageBytes), maxIOBytes),
				MaxWriteBytes: uint32(p.options.MaxRequestBytes),
				MaxBackground: maxBackground,
			}
		}
		agreed = *s.Init
	})
	if err != nil {
		p.log.Error("fuse: handshake", "error", err)
		return 0, syscall.EIO
	}
	n := encodeInit(w.data(), agreed)
	defer p.setNegotiated(agreed)
	return n, 0
}

// maxBackground bounds the read-ahead and asynchronous direct requests the kernel
// has in flight; beyond, their callers wait.
const maxBackground = 128
