package device

import (
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/thaw-project/thaw/kind"
)

// Uring is a File that reads and writes through io_uring. Each access takes a ring of
// its own from a pool, submits and waits in one system call: a ring shared by all
// needs a goroutine to reap it, and waking the caller from there costs more than
// the system call it saves.
//
// The rings are set up with plain system calls: the Go binding there is, giouring,
// links against an internal of package syscall that the linker refuses since Go 1.23.
type Uring struct {
	*File
	rings chan *ring // the idle ones; all of them when no access is under way
	count int
}

// uringRings bounds the accesses under way; more wait. A disk's queue gains nothing
// beyond this on the machines Thaw runs on.
const uringRings = 16

// OpenUring opens path as OpenFile does, for access through io_uring; where the
// kernel, a seccomp filter or a limit does not allow that it returns a File.
func OpenUring(path string, readOnly bool, log *slog.Logger) (Device, error) {
	f, err := OpenFile(path, readOnly)
	if err != nil {
		return nil, err
	}
	u, err := newUring(f)
	if err != nil {
		if log != nil {
			log.Info("io_uring not available; using pread and pwrite", "path", path, "err", err)
		}
		return f, nil
	}
	return u, nil
}

func newUring(f *File) (*Uring, error) {
	u := &Uring{File: f, rings: make(chan *ring, uringRings)}
	for range uringRings {
		r, err := newRing()
		if err != nil {
			u.exit()
			return nil, err
		}
		u.rings <- r
		u.count++
	}
	return u, nil
}

func (u *Uring) exit() {
	for range u.count {
		(<-u.rings).close()
	}
	u.count = 0
}

func (u *Uring) ReadAt(p []byte, off int64) error {
	if err := checkRange("read", off, int64(len(p)), u.sizeBytes); err != nil {
		return err
	}
	return u.transfer("read", opRead, p, off)
}

func (u *Uring) WriteAt(p []byte, off int64) error {
	if err := checkRange("write", off, int64(len(p)), u.sizeBytes); err != nil {
		return err
	}
	return u.transfer("write", opWrite, p, off)
}

func (u *Uring) transfer(name string, op uint8, p []byte, off int64) error {
	r := <-u.rings
	const maxTransfer = 1 << 30 // a length is 32 bits, and the kernel stops at 2 GiB
	var err error
	for n := 0; n < len(p) && err == nil; {
		var m int
		m, err = r.do(op, int(u.f.Fd()), p[n:min(len(p), n+maxTransfer)], off+int64(n))
		if err == nil && m == 0 {
			err = fmt.Errorf("device ended at %d", off+int64(n))
		}
		n += m
	}
	u.rings <- r
	if err != nil {
		return u.fail(name, len(p), off, err)
	}
	return nil
}

// Close waits for accesses under way and releases the rings and the file.
func (u *Uring) Close() error {
	u.exit()
	return u.File.Close()
}

// ring is an io_uring that has at most one access under way.
type ring struct {
	fd       int
	rings    []byte // the shared mapping of both rings
	sqes     []byte
	sqTail   *atomic.Uint32
	sqMask   uint32
	sqArray  []uint32
	cqHead   *atomic.Uint32
	cqTail   *atomic.Uint32
	cqMask   uint32
	cqes     []cqe
	buf      []byte // keeps the buffer of the access under way on the heap and alive
	sequence uint64 // of the access under way
}

// From linux/io_uring.h.
const (
	opRead  = 22
	opWrite = 23

	featSingleMmap = 1 << 0
	enterGetEvents = 1 << 0
	registerProbe  = 8
	probeSupported = 1 << 0
	offSQRing      = 0
	offSQEs        = 0x10000000
	ringEntries    = 2
	probeOps       = 64
	sizeofSQE      = 64
)

type sqOffsets struct {
	head, tail, ringMask, ringEntries, flags, dropped, array, resv uint32
	userAddr                                                       uint64
}

type cqOffsets struct {
	head, tail, ringMask, ringEntries, overflow, cqes, flags, resv uint32
	userAddr                                                       uint64
}

type uringParams struct {
	sqEntries, cqEntries, flags, sqThreadCPU, sqThreadIdle, features, wqFd uint32
	resv                                                                   [3]uint32
	sq                                                                     sqOffsets
	cq                                                                     cqOffsets
}

type sqe struct {
	opcode, flags uint8
	ioprio        uint16
	fd            int32
	off, addr     uint64
	len, rwFlags  uint32
	userData      uint64
	pad           [3]uint64
}

type cqe struct {
	userData uint64
	res      int32
	flags    uint32
}

type probe struct {
	lastOp, opsLen uint8
	resv           uint16
	resv2          [3]uint32
	ops            [probeOps]struct {
		op, resv uint8
		flags    uint16
		resv2    uint32
	}
}

func newRing() (*ring, error) {
	var p uringParams
	fd, _, errno := unix.Syscall(unix.SYS_IO_URING_SETUP, ringEntries, uintptr(unsafe.Pointer(&p)), 0)
	if errno != 0 {
		return nil, fmt.Errorf("set up io_uring: %w", errno)
	}
	r := &ring{fd: int(fd)}
	unix.CloseOnExec(r.fd)
	if err := r.init(&p); err != nil {
		r.close()
		return nil, err
	}
	return r, nil
}

func (r *ring) init(p *uringParams) (err error) {
	if p.features&featSingleMmap == 0 {
		return kind.Errorf(kind.Unsupported, "io_uring of this kernel is too old")
	}
	var ops probe
	if _, _, errno := unix.Syscall6(unix.SYS_IO_URING_REGISTER, uintptr(r.fd), registerProbe, uintptr(unsafe.Pointer(&ops)), probeOps, 0, 0); errno != 0 {
		return fmt.Errorf("probe io_uring: %w", errno)
	}
	if ops.ops[opRead].flags&probeSupported == 0 || ops.ops[opWrite].flags&probeSupported == 0 {
		return kind.Errorf(kind.Unsupported, "io_uring of this kernel does not read and write")
	}
	size := max(p.sq.array+p.sqEntries*4, p.cq.cqes+p.cqEntries*uint32(unsafe.Sizeof(cqe{})))
	if r.rings, err = unix.Mmap(r.fd, offSQRing, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE); err != nil {
		return fmt.Errorf("map io_uring: %w", err)
	}
	if r.sqes, err = unix.Mmap(r.fd, offSQEs, int(p.sqEntries*sizeofSQE), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE); err != nil {
		return fmt.Errorf("map io_uring entries: %w", err)
	}
	word := func(off uint32) *atomic.Uint32 { return (*atomic.Uint32)(unsafe.Pointer(&r.rings[off])) }
	r.sqTail, r.sqMask = word(p.sq.tail), word(p.sq.ringMask).Load()
	r.sqArray = unsafe.Slice((*uint32)(unsafe.Pointer(&r.rings[p.sq.array])), p.sqEntries)
	r.cqHead, r.cqTail, r.cqMask = word(p.cq.head), word(p.cq.tail), word(p.cq.ringMask).Load()
	r.cqes = unsafe.Slice((*cqe)(unsafe.Pointer(&r.rings[p.cq.cqes])), p.cqEntries)
	return nil
}

// do performs one access and returns how many bytes it moved. It does not return
// before the kernel is done with the buffer.
func (r *ring) do(op uint8, fd int, p []byte, off int64) (int, error) {
	r.buf = p
	defer func() { r.buf = nil }()
	for {
		r.sequence++
		tail := r.sqTail.Load()
		i := tail & r.sqMask
		*(*sqe)(unsafe.Pointer(&r.sqes[i*sizeofSQE])) = sqe{
			opcode: op, fd: int32(fd), off: uint64(off), addr: uint64(uintptr(unsafe.Pointer(&r.buf[0]))), len: uint32(len(r.buf)), userData: r.sequence,
		}
		r.sqArray[i] = i
		r.sqTail.Store(tail + 1)
		res, err := r.wait()
		if err != nil {
			return 0, err
		}
		runtime.KeepAlive(r.buf)
		switch {
		case res >= 0:
			return int(res), nil
		case unix.Errno(-res) == unix.EINTR, unix.Errno(-res) == unix.EAGAIN:
			continue
		}
		return 0, unix.Errno(-res)
	}
}

// wait submits the one queued entry and waits for its completion.
func (r *ring) wait() (int32, error) {
	submit := uintptr(1)
	for {
		n, _, errno := unix.Syscall6(unix.SYS_IO_URING_ENTER, uintptr(r.fd), submit, 1, enterGetEvents, 0, 0)
		switch {
		case errno == 0:
			submit -= min(submit, n)
		case errors.Is(errno, unix.EINTR), errors.Is(errno, unix.EAGAIN), errors.Is(errno, unix.EBUSY):
			// EINTR comes only when nothing was submitted by this call: a call that
			// submits and is then interrupted reports what it submitted.
		case submit == 0:
			// The kernel owns the buffer until the completion comes, and this call
			// cannot wait for it any more. It never happens on a sound ring.
			panic(fmt.Sprintf("io_uring: wait for completion: %v", errno))
		default:
			r.sqTail.Add(^uint32(0)) // nothing was taken: withdraw the entry
			return 0, fmt.Errorf("submit to io_uring: %w", errno)
		}
		if head := r.cqHead.Load(); head != r.cqTail.Load() {
			c := r.cqes[head&r.cqMask]
			r.cqHead.Store(head + 1)
			if c.userData == r.sequence {
				return c.res, nil
			}
		}
	}
}

func (r *ring) close() {
	if r.rings != nil {
		unix.Munmap(r.rings)
	}
	if r.sqes != nil {
		unix.Munmap(r.sqes)
	}
	unix.Close(r.fd)
}
