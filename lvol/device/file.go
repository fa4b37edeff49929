package device

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/thaw-project/thaw/filelock"
	"github.com/thaw-project/thaw/kind"
)

// File is a regular file or a block device, read with pread and written with
// pwrite through the page cache: what a killed process wrote is still there.
type File struct {
	f         *os.File
	sizeBytes int64
	block     bool
	readOnly  bool
	// punchUnsupported is set when the file system cannot punch holes, so that it
	// is asked only once.
	punchUnsupported atomic.Bool
}

// CreateFile creates a sparse file of sizeBytes; kind.Exists if it is there.
func CreateFile(path string, sizeBytes int64) (*File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, fmt.Errorf("create data file: %w", err)
	}
	if err := f.Truncate(sizeBytes); err != nil {
		f.Close()
		os.Remove(path)
		return nil, fmt.Errorf("size data file: %w", err)
	}
	return newFile(f, false)
}

// OpenFile opens a regular file or block device and takes it for this process
// alone: kind.InUse when another holds it. A read-only open is shared.
func OpenFile(path string, readOnly bool) (*File, error) {
	flags, take := os.O_RDWR, filelock.Exclusive
	if readOnly {
		flags, take = os.O_RDONLY, filelock.Shared
	}
	if st, err := os.Stat(path); err == nil && st.Mode()&os.ModeDevice != 0 && !readOnly {
		// On a block device O_EXCL without O_CREAT fails while it is mounted or
		// otherwise claimed in the kernel.
		flags |= os.O_EXCL
	}
	f, err := os.OpenFile(path, flags, 0)
	if err != nil {
		return nil, fmt.Errorf("open data device: %w", err)
	}
	if err := take(f, filelock.Patience); err != nil {
		f.Close()
		if errors.Is(err, kind.InUse) {
			return nil, kind.Errorf(kind.InUse, "open data device: %s is locked by another process", path)
		}
		return nil, fmt.Errorf("lock data device %s: %w", path, err)
	}
	return newFile(f, readOnly)
}

func newFile(f *os.File, readOnly bool) (*File, error) {
	d := &File{f: f, readOnly: readOnly}
	st, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("open data device: %w", err)
	}
	switch mode := st.Mode(); {
	case mode.IsRegular():
		d.sizeBytes = st.Size()
	case mode&os.ModeDevice != 0 && mode&os.ModeCharDevice == 0:
		d.block = true
		if d.sizeBytes, err = f.Seek(0, io.SeekEnd); err != nil {
			f.Close()
			return nil, fmt.Errorf("size of %s: %w", f.Name(), err)
		}
	default:
		f.Close()
		return nil, kind.Errorf(kind.Invalid, "open data device: %s is neither a regular file nor a block device", f.Name())
	}
	return d, nil
}

// checkRange is shared by the implementations: it keeps an access inside the device.
func checkRange(op string, off, length, sizeBytes int64) error {
	if off < 0 || length < 0 || off > sizeBytes || length > sizeBytes-off {
		return kind.Errorf(kind.Invalid, "%s of %d bytes at %d: device has %d", op, length, off, sizeBytes)
	}
	return nil
}

func (d *File) ReadAt(p []byte, off int64) error {
	if err := checkRange("read", off, int64(len(p)), d.sizeBytes); err != nil {
		return err
	}
	if _, err := d.f.ReadAt(p, off); err != nil {
		return d.fail("read", len(p), off, err)
	}
	return nil
}

func (d *File) WriteAt(p []byte, off int64) error {
	if err := checkRange("write", off, int64(len(p)), d.sizeBytes); err != nil {
		return err
	}
	if _, err := d.f.WriteAt(p, off); err != nil {
		return d.fail("write", len(p), off, err)
	}
	return nil
}

func (d *File) fail(op string, n int, off int64, err error) error {
	k := kind.Of(err)
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || k == "" {
		k = kind.IO // a file that became shorter than its pool is a failed device
	}
	return kind.Errorf(k, "%s %d bytes at %d: %w", op, n, off, err)
}

func (d *File) Sync() error {
	for {
		err := unix.Fdatasync(int(d.f.Fd()))
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return fmt.Errorf("sync %s: %w", d.f.Name(), err)
		}
		return nil
	}
}

func (d *File) Punch(off, length int64) error {
	if err := checkRange("punch", off, length, d.sizeBytes); err != nil {
		return err
	}
	if length == 0 || d.punchUnsupported.Load() {
		return nil
	}
	var err error
	if d.block {
		r := [2]uint64{uint64(off), uint64(length)}
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, d.f.Fd(), unix.BLKDISCARD, uintptr(unsafe.Pointer(&r))); errno != 0 {
			err = errno
		}
	} else {
		for {
			err = unix.Fallocate(int(d.f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, length)
			if err != unix.EINTR {
				break
			}
		}
	}
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.ENOSYS):
		d.punchUnsupported.Store(true)
		return nil
	}
	return fmt.Errorf("punch %d bytes at %d of %s: %w", length, off, d.f.Name(), err)
}

// ZeroesOnPunch is true for a file on a file system that punches holes. A block
// device's discard promises nothing about what is read afterwards.
func (d *File) ZeroesOnPunch() bool { return !d.block && !d.punchUnsupported.Load() }

// NextData implements Mapper with SEEK_DATA.
func (d *File) NextData(off int64) (start, end int64, err error) {
	if d.block {
		return 0, 0, kind.Errorf(kind.Unsupported, "a block device does not tell what it holds")
	}
	// Seek shares the descriptor's offset; pread and pwrite do not use it and
	// Check, the one caller, is serialised by the store.
	start, err = unix.Seek(int(d.f.Fd()), off, unix.SEEK_DATA)
	if errors.Is(err, unix.ENXIO) {
		return 0, 0, io.EOF
	}
	if err != nil {
		return 0, 0, fmt.Errorf("find data in %s: %w", d.f.Name(), err)
	}
	if end, err = unix.Seek(int(d.f.Fd()), start, unix.SEEK_HOLE); err != nil {
		return 0, 0, fmt.Errorf("find a hole in %s: %w", d.f.Name(), err)
	}
	return start, end, nil
}

func (d *File) SizeBytes() int64 { return d.sizeBytes }

func (d *File) Close() error { return d.f.Close() }
