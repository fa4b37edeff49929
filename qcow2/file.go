package qcow2

import (
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"

	"github.com/thaw-project/thaw/filelock"
	"github.com/thaw-project/thaw/kind"
)

// file is what an Image does to its file. osFile is the real one; tests put a file
// that loses power in its place. All methods may be called concurrently.
type file interface {
	io.ReaderAt
	// WriteAt writes all of p or fails.
	WriteAt(p []byte, off int64) error
	// WriteVec writes the buffers one after the other from off on, all or an error.
	// It may consume the slice of buffers, not their bytes.
	WriteVec(bufs [][]byte, off int64) error
	// Sync makes what was written durable, the length of the file included.
	Sync() error
	Truncate(sizeBytes int64) error
	// Punch frees a range, which then reads as zeros. A file system that cannot do
	// it is no error, so the caller must not rely on the zeros.
	Punch(off, lengthBytes int64) error
	// Stat returns the length and what the file occupies.
	Stat() (sizeBytes, allocatedBytes int64, err error)
	Close() error
}

// osFile is a file of the operating system, used through bare system calls: the read
// path then allocates nothing and takes no lock of the runtime's poller.
type osFile struct {
	name string
	fd   int
}

func openOSFile(path string, readOnly bool) (*osFile, error) {
	flags := unix.O_RDWR | unix.O_CLOEXEC
	if readOnly {
		flags = unix.O_RDONLY | unix.O_CLOEXEC
	}
	fd, err := retry(func() (int, error) { return unix.Open(path, flags, 0) })
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	f := &osFile{name: path, fd: fd}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		f.Close()
		return nil, f.failed("stat", err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		f.Close()
		return nil, kind.Errorf(kind.Invalid, "%s is not a regular file", path)
	}
	return f, nil
}

// retry repeats a system call that a signal interrupted. The runtime sends signals
// of its own for preemption; file systems in user space let them through.
func retry(call func() (int, error)) (int, error) {
	for {
		n, err := call()
		if err != unix.EINTR {
			return n, err
		}
	}
}

func (f *osFile) failed(op string, err error) error {
	return &os.PathError{Op: op, Path: f.name, Err: err}
}

func (f *osFile) ReadAt(p []byte, off int64) (int, error) {
	n := 0
	for n < len(p) {
		m, err := unix.Pread(f.fd, p[n:], off+int64(n))
		switch {
		case err == unix.EINTR:
		case err != nil:
			return n, f.failed("read", err)
		case m == 0:
			return n, io.EOF
		default:
			n += m
		}
	}
	return n, nil
}

func (f *osFile) WriteAt(p []byte, off int64) error {
	for len(p) > 0 {
		n, err := unix.Pwrite(f.fd, p, off)
		switch {
		case err == unix.EINTR:
			continue
		case err != nil:
			return f.failed("write", err)
		case n == 0:
			return f.failed("write", io.ErrShortWrite)
		}
		p, off = p[n:], off+int64(n)
	}
	return nil
}

func (f *osFile) WriteVec(bufs [][]byte, off int64) error {
	for len(bufs) > 0 {
		if len(bufs[0]) == 0 {
			bufs = bufs[1:]
			continue
		}
		var n int
		var err error
		if len(bufs) == 1 {
			n, err = unix.Pwrite(f.fd, bufs[0], off)
		} else {
			n, err = unix.Pwritev(f.fd, bufs, off)
		}
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return f.failed("write", err)
		}
		if n == 0 {
			return f.failed("write", io.ErrShortWrite)
		}
		off += int64(n)
		for n > 0 {
			if n < len(bufs[0]) {
				bufs[0] = bufs[0][n:]
				break
			}
			n -= len(bufs[0])
			bufs = bufs[1:]
		}
	}
	return nil
}

func (f *osFile) Sync() error {
	_, err := retry(func() (int, error) { return 0, unix.Fdatasync(f.fd) })
	if err != nil {
		return f.failed("sync", err)
	}
	return nil
}

func (f *osFile) Truncate(sizeBytes int64) error {
	_, err := retry(func() (int, error) { return 0, unix.Ftruncate(f.fd, sizeBytes) })
	if err != nil {
		return f.failed("truncate", err)
	}
	return nil
}

func (f *osFile) Punch(off, lengthBytes int64) error {
	_, err := retry(func() (int, error) {
		return 0, unix.Fallocate(f.fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, lengthBytes)
	})
	if err != nil && !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.ENOSYS) {
		return f.failed("punch", err)
	}
	return nil
}

func (f *osFile) Stat() (int64, int64, error) {
	var st unix.Stat_t
	if err := unix.Fstat(f.fd, &st); err != nil {
		return 0, 0, f.failed("stat", err)
	}
	return st.Size, st.Blocks * 512, nil
}

func (f *osFile) Close() error {
	if err := unix.Close(f.fd); err != nil && err != unix.EINTR {
		return f.failed("close", err)
	}
	return nil
}

// QEMU's locks on an image (block/file-posix.c): byte 100+p is locked by who uses
// permission p, byte 200+p by who does not share it with others. The locks are all
// shared ones, and a conflict is found by asking whether an exclusive one would be
// granted on the opposite byte. They belong to the open file, so a killed process
// leaves none. Speaking this protocol keeps qemu-img, qemu-nbd and a second Thaw away
// from a file in use.
const (
	lockUsed     = 100
	lockUnshared = 200

	permConsistentRead = 0
	permWrite          = 1
	permResize         = 3
)

// lock takes QEMU's locks for a writer or a reader; neither shares writing.
func (f *osFile) lock(readOnly bool) error {
	return filelock.Retry(filelock.Patience, func() error { return f.tryLock(readOnly) })
}

func (f *osFile) tryLock(readOnly bool) error {
	used := []int64{permConsistentRead}
	if !readOnly {
		used = append(used, permWrite, permResize)
	}
	unshared := []int64{permWrite, permResize}
	for _, p := range used {
		if err := f.lockByte(lockUsed + p); err != nil {
			return err
		}
	}
	for _, p := range unshared {
		if err := f.lockByte(lockUnshared + p); err != nil {
			return err
		}
	}
	for _, p := range used {
		if err := f.probeByte(lockUnshared + p); err != nil {
			return err
		}
	}
	for _, p := range unshared {
		if err := f.probeByte(lockUsed + p); err != nil {
			return err
		}
	}
	return nil
}

func (f *osFile) lockByte(at int64) error {
	l := unix.Flock_t{Type: unix.F_RDLCK, Whence: io.SeekStart, Start: at, Len: 1}
	err := unix.FcntlFlock(uintptr(f.fd), unix.F_OFD_SETLK, &l)
	switch err {
	case nil, unix.ENOLCK, unix.EOPNOTSUPP, unix.EINVAL:
		return nil // a file system without locks: QEMU goes on there too
	case unix.EAGAIN, unix.EACCES:
		return f.inUse()
	}
	return f.failed("lock", err)
}

func (f *osFile) probeByte(at int64) error {
	l := unix.Flock_t{Type: unix.F_WRLCK, Whence: io.SeekStart, Start: at, Len: 1}
	err := unix.FcntlFlock(uintptr(f.fd), unix.F_OFD_GETLK, &l)
	switch err {
	case nil:
		if l.Type != unix.F_UNLCK {
			return f.inUse()
		}
		return nil
	case unix.ENOLCK, unix.EOPNOTSUPP, unix.EINVAL:
		return nil
	}
	return f.failed("lock", err)
}

func (f *osFile) inUse() error {
	return kind.Errorf(kind.InUse, "%s is open in another process", f.name)
}

// readFull reads all of p. What lies behind the end of the file is an error unless
// the file ends inside p and padded is set: QEMU leaves the last cluster short.
func readFull(f file, p []byte, off int64, padded bool) error {
	n, err := f.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if errors.Is(err, io.EOF) || err == nil {
		if padded {
			clear(p[n:])
			return nil
		}
		return kind.Errorf(kind.Corrupt, "the file ends at %d inside a structure at %d of %d bytes", off+int64(n), off, len(p))
	}
	return fmt.Errorf("at %d: %w", off, err)
}
