// Package malloc is a bdev.Device in memory, for tests, measurements and scratch data.
// Its bytes are gone with the process.
//
// The memory is a mapping of its own, beside Go's heap: it costs what was written, the
// collector never looks at it, and a discard gives it back. The package knows nothing
// of who uses the device.
package malloc

import (
	"io"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/target/bdev"
)

// MaxBytes bounds a device: a quarter of what a process can map.
const MaxBytes = 32 << 40

const (
	// Accesses lock stripes of 64 KiB, so that one that overlaps another sees old or
	// new for each sector; 64 of them keep a queue's worth of writers apart.
	stripeShift = 16
	stripes     = 64
	pageBytes   = 4096
)

// Device is memory. All methods may be called concurrently; after Close all but
// SizeBytes and ReadOnly fail with kind.Unavailable.
type Device struct {
	sizeBytes int64
	locks     [stripes]sync.RWMutex

	mu  sync.RWMutex
	mem []byte // guarded by mu: nil once closed; its bytes by locks
}

var _ bdev.Device = (*Device)(nil)

// New returns a device of sizeBytes, a multiple of 512, that reads as zeros. kind.NoSpace
// when the address space or the system's memory commitment does not allow it.
func New(sizeBytes int64) (*Device, error) {
	if sizeBytes <= 0 || sizeBytes%512 != 0 || sizeBytes > MaxBytes {
		return nil, kind.Errorf(kind.Invalid, "memory device of %d bytes: it must be a positive multiple of 512 up to %d", sizeBytes, int64(MaxBytes))
	}
	mem, err := unix.Mmap(-1, 0, int(sizeBytes), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON|unix.MAP_NORESERVE)
	if err != nil {
		return nil, kind.Errorf(kind.NoSpace, "memory device of %d bytes: %w", sizeBytes, err)
	}
	return &Device{sizeBytes: sizeBytes, mem: mem}, nil
}

// SizeBytes implements bdev.Device.
func (d *Device) SizeBytes() int64 { return d.sizeBytes }

// ReadOnly is false.
func (d *Device) ReadOnly() bool { return false }

// each calls f with the parts of a range that lie in one stripe each. The range is
// checked.
func (d *Device) each(op string, off, length int64, write bool, f func(mem []byte, done int64)) error {
	d.mu.RLock()
	defer d.mu.RUnlock()
	if d.mem == nil {
		return kind.Errorf(kind.Unavailable, "%s: memory device is closed", op)
	}
	if off < 0 || length < 0 || off > d.sizeBytes || length > d.sizeBytes-off {
		return kind.Errorf(kind.Invalid, "%s: %d bytes at %d do not fit in %d", op, length, off, d.sizeBytes)
	}
	for done := int64(0); done < length; {
		at := off + done
		n := min(length-done, (at>>stripeShift+1)<<stripeShift-at)
		l := &d.locks[at>>stripeShift%stripes]
		if write {
			l.Lock()
			f(d.mem[at:at+n], done)
			l.Unlock()
		} else {
			l.RLock()
			f(d.mem[at:at+n], done)
			l.RUnlock()
		}
		done += n
	}
	return nil
}

// ReadAt implements io.ReaderAt.
func (d *Device) ReadAt(p []byte, off int64) (int, error) {
	var eof error
	if off > d.sizeBytes {
		return 0, io.EOF
	}
	if off >= 0 && int64(len(p)) > d.sizeBytes-off {
		p, eof = p[:d.sizeBytes-off], io.EOF
	}
	if err := d.each("read", off, int64(len(p)), false, func(mem []byte, done int64) { copy(p[done:], mem) }); err != nil {
		return 0, err
	}
	return len(p), eof
}

// WriteAt implements io.WriterAt.
func (d *Device) WriteAt(p []byte, off int64) (int, error) {
	if err := d.each("write", off, int64(len(p)), true, func(mem []byte, done int64) { copy(mem, p[done:]) }); err != nil {
		return 0, err
	}
	return len(p), nil
}

// Flush does nothing: nothing survives a power loss anyway.
func (d *Device) Flush() error { return nil }

// Discard gives the memory of the range back; it reads as zeros.
func (d *Device) Discard(off, length int64) error { return d.zero("discard", off, length) }

// WriteZeroes does what Discard does.
func (d *Device) WriteZeroes(off, length int64) error { return d.zero("write zeroes", off, length) }

func (d *Device) zero(op string, off, length int64) error {
	return d.each(op, off, length, true, func(mem []byte, done int64) {
		at := off + done
		head := min(int64(len(mem)), (at+pageBytes-1)/pageBytes*pageBytes-at)
		clear(mem[:head])
		mem = mem[head:]
		whole := len(mem) / pageBytes * pageBytes
		if whole > 0 && unix.Madvise(mem[:whole], unix.MADV_DONTNEED) != nil {
			clear(mem[:whole])
		}
		clear(mem[whole:])
	})
}

// Close gives all memory back.
func (d *Device) Close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.mem == nil {
		return nil
	}
	mem := d.mem
	d.mem = nil
	return unix.Munmap(mem)
}
