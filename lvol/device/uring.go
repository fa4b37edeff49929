package device

import (
	"fmt"
	"log/slog"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/thaw-project/thaw/uring"
)

// Uring is a File that reads and writes through io_uring. Each access takes a ring of
// its own from a pool, submits and waits in one system call: a ring shared by all
// needs a goroutine to reap it, and waking the caller from there costs more than
// the system call it saves.
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
		(<-u.rings).Close()
	}
	u.count = 0
}

func (u *Uring) ReadAt(p []byte, off int64) error {
	if err := checkRange("read", off, int64(len(p)), u.sizeBytes); err != nil {
		return err
	}
	return u.transfer("read", uring.OpRead, p, off)
}

func (u *Uring) WriteAt(p []byte, off int64) error {
	if err := checkRange("write", off, int64(len(p)), u.sizeBytes); err != nil {
		return err
	}
	return u.transfer("write", uring.OpWrite, p, off)
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
	*uring.Ring
	buf      []byte // keeps the buffer of the access under way on the heap and alive
	sequence uint64 // of the access under way
}

// ringEntries is more than the one access under way because the kernel rounds up anyway.
const ringEntries = 2

func newRing() (*ring, error) {
	r, err := uring.New(uring.Options{Entries: ringEntries})
	if err != nil {
		return nil, err
	}
	if err := r.Supports(uring.OpRead, uring.OpWrite); err != nil {
		r.Close()
		return nil, err
	}
	return &ring{Ring: r}, nil
}

// do performs one access and returns how many bytes it moved. It does not return
// before the kernel is done with the buffer.
func (r *ring) do(op uint8, fd int, p []byte, off int64) (int, error) {
	r.buf = p
	defer func() { r.buf = nil }()
	for {
		r.sequence++
		e := r.SQE() // never nil: nothing else is queued
		e.Opcode, e.FD, e.Off, e.UserData = op, int32(fd), uint64(off), r.sequence
		e.Addr, e.Len = uint64(uintptr(unsafe.Pointer(&r.buf[0]))), uint32(len(r.buf))
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
	for {
		err := r.Wait(0)
		switch {
		case err == nil:
		case r.Queued() > 0:
			r.Withdraw()
			return 0, err
		default:
			// The kernel owns the buffer until the completion comes, and this call
			// cannot wait for it any more. It never happens on a sound ring.
			panic(fmt.Sprintf("io_uring: wait for completion: %v", err))
		}
		for c, ok := r.Next(); ok; c, ok = r.Next() {
			if c.UserData == r.sequence {
				return c.Res, nil
			}
		}
	}
}
