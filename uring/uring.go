// Package uring is a thin binding to the kernel's io_uring: set up a ring, queue
// entries, submit them, take completions. It knows no operation; callers fill the
// entries.
//
// It makes plain system calls: giouring, the Go binding there is, has neither 128-byte
// entries nor commands (uring_cmd), and links against an internal of package syscall
// that the linker refuses since Go 1.23.
//
// The layouts are those of include/uapi/linux/io_uring.h.
package uring

import (
	"errors"
	"fmt"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/thaw-project/thaw/kind"
)

// Operations that the package's users need (enum io_uring_op).
const (
	OpRead     = 22
	OpWrite    = 23
	OpUringCmd = 46
)

// From struct io_uring_params and io_uring_enter(2).
const (
	setupClamp        = 1 << 4
	setupSQE128       = 1 << 10
	setupSingleIssuer = 1 << 12
	setupDeferTaskrun = 1 << 13

	featSingleMmap = 1 << 0
	featNoDrop     = 1 << 1
	featExtArg     = 1 << 8

	enterGetEvents = 1 << 0
	enterExtArg    = 1 << 3

	registerProbe  = 8
	probeSupported = 1 << 0
	probeOps       = 64

	offRings = 0
	offSQEs  = 0x10000000

	sqeBytes    = 64
	bigSQEBytes = 128
)

type sqOffsets struct {
	head, tail, ringMask, ringEntries, flags, dropped, array, resv uint32
	userAddr                                                       uint64
}

type cqOffsets struct {
	head, tail, ringMask, ringEntries, overflow, cqes, flags, resv uint32
	userAddr                                                       uint64
}

type params struct {
	sqEntries, cqEntries, flags, sqThreadCPU, sqThreadIdle, features, wqFd uint32
	resv                                                                   [3]uint32
	sq                                                                     sqOffsets
	cq                                                                     cqOffsets
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

type getEventsArg struct {
	sigmask     uint64
	sigmaskSize uint32
	minWaitUsec uint32
	timespec    uint64
}

// SQE is a submission entry. Off holds the command in its low half where Opcode is
// OpUringCmd.
//
//	0  1  opcode      8  8  offset, or command   24  4  length     40  8  fixed buffers
//	1  1  flags      16  8  address              28  4  op flags   48 16  command's own
//	2  2  priority                               32  8  user data
//	4  4  descriptor
type SQE struct {
	Opcode, Flags uint8
	IOPriority    uint16
	FD            int32
	Off, Addr     uint64
	Len, OpFlags  uint32
	UserData      uint64
	fixed         uint64
	Cmd           [16]byte
}

// BigSQE is an entry of a ring with Options.BigEntries: 64 bytes more for commands,
// which go on from SQE.Cmd.
type BigSQE struct {
	SQE
	More [64]byte
}

// CQE is a completion.
type CQE struct {
	UserData uint64
	Res      int32 // what the operation returned: not negative, or a negated errno
	Flags    uint32
}

// Options configures New.
type Options struct {
	// Entries is how many submissions fit, rounded up to a power of two. Completions
	// have twice the room.
	Entries uint32
	// BigEntries makes entries BigSQE.
	BigEntries bool
	// OneThread has the kernel do its part of a completion only inside Wait (Linux
	// 6.1). All calls, New too, must then come from one thread.
	OneThread bool
}

// Ring is an io_uring. Its methods may be called by one goroutine at a time.
type Ring struct {
	fd       int
	rings    []byte // the shared mapping of both rings
	sqes     []byte
	entry    uint32 // bytes of a submission entry
	entries  uint32
	features uint32

	sqHead *atomic.Uint32
	sqTail *atomic.Uint32
	sqMask uint32
	tail   uint32 // of what is queued; sqTail follows when it is submitted

	cqHead *atomic.Uint32
	cqTail *atomic.Uint32
	cqMask uint32
	cqes   []CQE

	arg      getEventsArg
	timespec unix.Timespec
}

// New sets up a ring. It is kind.Unsupported where the kernel's io_uring is too old,
// and kind.Denied where a sysctl or a seccomp filter forbids it.
func New(o Options) (*Ring, error) {
	p := params{flags: setupClamp}
	r := &Ring{entry: sqeBytes}
	if o.BigEntries {
		p.flags |= setupSQE128
		r.entry = bigSQEBytes
	}
	if o.OneThread {
		p.flags |= setupSingleIssuer | setupDeferTaskrun
	}
	fd, _, errno := unix.Syscall(unix.SYS_IO_URING_SETUP, uintptr(o.Entries), uintptr(unsafe.Pointer(&p)), 0)
	switch errno {
	case 0:
	case unix.EPERM, unix.EACCES:
		return nil, kind.Errorf(kind.Denied, "set up io_uring: %w: the sysctl kernel.io_uring_disabled or a seccomp filter forbids it", errno)
	case unix.EINVAL, unix.ENOSYS:
		return nil, kind.Errorf(kind.Unsupported, "set up io_uring: %w: this kernel's is too old or left out", errno)
	default:
		return nil, fmt.Errorf("set up io_uring: %w", errno)
	}
	r.fd = int(fd)
	unix.CloseOnExec(r.fd)
	if err := r.init(&p); err != nil {
		r.Close()
		return nil, err
	}
	return r, nil
}

func (r *Ring) init(p *params) (err error) {
	r.features, r.entries = p.features, p.sqEntries
	if p.features&featSingleMmap == 0 || p.features&featNoDrop == 0 {
		return kind.Errorf(kind.Unsupported, "io_uring of this kernel is too old")
	}
	size := max(p.sq.array+p.sqEntries*4, p.cq.cqes+p.cqEntries*uint32(unsafe.Sizeof(CQE{})))
	const rw, shared = unix.PROT_READ | unix.PROT_WRITE, unix.MAP_SHARED | unix.MAP_POPULATE
	if r.rings, err = unix.Mmap(r.fd, offRings, int(size), rw, shared); err != nil {
		return fmt.Errorf("map io_uring: %w", err)
	}
	if r.sqes, err = unix.Mmap(r.fd, offSQEs, int(p.sqEntries*r.entry), rw, shared); err != nil {
		return fmt.Errorf("map io_uring entries: %w", err)
	}
	word := func(off uint32) *atomic.Uint32 { return (*atomic.Uint32)(unsafe.Pointer(&r.rings[off])) }
	r.sqHead, r.sqTail, r.sqMask = word(p.sq.head), word(p.sq.tail), word(p.sq.ringMask).Load()
	r.cqHead, r.cqTail, r.cqMask = word(p.cq.head), word(p.cq.tail), word(p.cq.ringMask).Load()
	r.cqes = unsafe.Slice((*CQE)(unsafe.Pointer(&r.rings[p.cq.cqes])), p.cqEntries)
	// Entry i of the index array is always entry i: they are used in order.
	array := unsafe.Slice((*uint32)(unsafe.Pointer(&r.rings[p.sq.array])), p.sqEntries)
	for i := range array {
		array[i] = uint32(i)
	}
	r.tail = r.sqTail.Load()
	return nil
}

// Supports tells whether the kernel knows all operations.
func (r *Ring) Supports(ops ...uint8) error {
	p := new(probe)
	if _, _, errno := unix.Syscall6(unix.SYS_IO_URING_REGISTER, uintptr(r.fd), registerProbe, uintptr(unsafe.Pointer(p)), probeOps, 0, 0); errno != 0 {
		return fmt.Errorf("probe io_uring: %w", errno)
	}
	for _, op := range ops {
		if op >= probeOps || p.ops[op].flags&probeSupported == 0 {
			return kind.Errorf(kind.Unsupported, "io_uring of this kernel lacks operation %d", op)
		}
	}
	return nil
}

// SQE returns the next free entry, zeroed, or nil when all are queued. The kernel sees
// it at the next Submit or Wait. What it points to must be memory that does not move
// and stays until the completion: mapped, or on the heap and kept alive.
func (r *Ring) SQE() *SQE {
	b := r.next()
	if b == nil {
		return nil
	}
	return (*SQE)(unsafe.Pointer(&b[0]))
}

// BigSQE is SQE for a ring with Options.BigEntries.
func (r *Ring) BigSQE() *BigSQE {
	if r.entry != bigSQEBytes {
		return nil
	}
	b := r.next()
	if b == nil {
		return nil
	}
	return (*BigSQE)(unsafe.Pointer(&b[0]))
}

func (r *Ring) next() []byte {
	if r.tail-r.sqHead.Load() >= r.entries {
		return nil
	}
	at := (r.tail & r.sqMask) * r.entry
	b := r.sqes[at : at+r.entry]
	clear(b)
	r.tail++
	return b
}

// Queued is how many entries wait to be submitted.
func (r *Ring) Queued() uint32 { return r.tail - r.sqHead.Load() }

// Submit hands the queued entries to the kernel.
func (r *Ring) Submit() error {
	r.sqTail.Store(r.tail)
	for r.Queued() > 0 {
		if err := r.enter(0, 0); err != nil && !again(err) {
			return fmt.Errorf("submit to io_uring: %w", err)
		}
	}
	return nil
}

// Wait submits the queued entries, in the same system call, and waits until there is a
// completion. A timeout above 0 bounds the wait (Linux 5.11); it is no error.
func (r *Ring) Wait(timeout time.Duration) error {
	r.sqTail.Store(r.tail)
	for {
		err := r.enter(1, timeout)
		switch {
		case r.cqHead.Load() != r.cqTail.Load() && r.Queued() == 0:
			return nil
		case errors.Is(err, unix.ETIME):
			return nil
		case err == nil, again(err):
		default:
			return fmt.Errorf("wait for io_uring: %w", err)
		}
	}
}

// again tells the errors after which the same call is made again: a signal came, and
// the kernel is short of memory or has completions that should be taken first, of
// which it always can hold back as many as it must.
func again(err error) bool {
	return errors.Is(err, unix.EINTR) || errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EBUSY)
}

func (r *Ring) enter(wait uintptr, timeout time.Duration) error {
	flags, arg, size := uintptr(0), unsafe.Pointer(nil), uintptr(0)
	if wait > 0 {
		flags = enterGetEvents
	}
	if timeout > 0 && r.features&featExtArg != 0 {
		r.timespec = unix.NsecToTimespec(int64(timeout))
		r.arg.timespec = uint64(uintptr(unsafe.Pointer(&r.timespec)))
		flags, arg, size = flags|enterExtArg, unsafe.Pointer(&r.arg), unsafe.Sizeof(r.arg)
	}
	_, _, errno := unix.Syscall6(unix.SYS_IO_URING_ENTER, uintptr(r.fd), uintptr(r.Queued()), wait, flags, uintptr(arg), size)
	if errno != 0 {
		return errno
	}
	return nil
}

// Withdraw takes back the entries that the kernel has not taken.
func (r *Ring) Withdraw() {
	r.tail = r.sqHead.Load()
	r.sqTail.Store(r.tail)
}

// Next takes a completion, if there is one. It makes no system call.
func (r *Ring) Next() (c CQE, ok bool) {
	head := r.cqHead.Load()
	if head == r.cqTail.Load() {
		return CQE{}, false
	}
	c = r.cqes[head&r.cqMask]
	r.cqHead.Store(head + 1)
	return c, true
}

// Close ends the ring. The kernel cancels what is under way, soon but not at once:
// memory that it may still write to must outlive that.
func (r *Ring) Close() {
	if r.rings != nil {
		unix.Munmap(r.rings)
	}
	if r.sqes != nil {
		unix.Munmap(r.sqes)
	}
	r.rings, r.sqes = nil, nil
	unix.Close(r.fd)
	r.fd = -1
}
