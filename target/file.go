package target

import (
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"sync"
	"syscall"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/lvol/device"
	"github.com/thaw-project/thaw/target/bdev"
	"github.com/thaw-project/thaw/target/rpc"
)

// fileDisk is a file or block device as a disk: SPDK's AIO bdev. Reads and writes go
// through the page cache, so what a killed process wrote is there; a flush syncs.
type fileDisk struct {
	p     fileParams
	f     *device.File
	fixed bool // read-only

	mu     sync.Mutex
	failed error // guarded by mu: of the first sync that failed
}

type fileParams struct {
	Name      string `json:"name"`
	Filename  string `json:"filename"`
	BlockSize uint32 `json:"block_size,omitempty"`
	ReadOnly  bool   `json:"readonly,omitempty"`
	Fallocate bool   `json:"fallocate,omitempty"`
	UUID      string `json:"uuid,omitempty"`
}

func (t *Target) createFile(params json.RawMessage) (any, error) {
	var p fileParams
	if err := decode(params, &p); err != nil {
		return nil, err
	}
	id, err := parseUUID(p.UUID)
	if err != nil {
		return nil, err
	}
	if p.Name == "" || p.Filename == "" {
		return nil, rpc.Errno(syscall.EINVAL, kind.Errorf(kind.Invalid, "bdev_aio_create: name and filename must not be empty"))
	}
	if t.lookup(p.Name) != nil {
		return nil, rpc.Errno(syscall.EEXIST, kind.Errorf(kind.Exists, "bdev %s exists", p.Name))
	}
	if p.Filename, err = filepath.Abs(p.Filename); err != nil {
		return nil, errnoOf(err)
	}
	d, err := openFileDisk(p)
	if err != nil {
		return nil, err
	}
	p.UUID = id.String() // what was chosen goes on record
	d.id = id
	if err := t.register(d); err != nil {
		d.driver.close()
		return nil, err
	}
	if err := t.keep(classFile, p.Name, "bdev_aio_create", p); err != nil {
		t.unregister(d, true)
		return nil, err
	}
	return p.Name, nil
}

// parseUUID reads an optional UUID; without one it is random.
func parseUUID(s string) (uuid.UUID, error) {
	if s == "" {
		return uuid.New(), nil
	}
	id, err := uuid.Parse(s)
	if err != nil || len(s) != 36 {
		return uuid.Nil, rpc.Internal("spdk_json_decode_object failed", kind.Errorf(kind.Invalid, "%.64q is no UUID", s))
	}
	return id, nil
}

func openFileDisk(p fileParams) (*disk, error) {
	f, err := device.OpenFile(p.Filename, p.ReadOnly)
	if err != nil {
		var errno syscall.Errno
		if errors.As(err, &errno) {
			return nil, rpc.Errno(errno, err)
		}
		return nil, errnoOf(err)
	}
	block, err := fileBlock(p)
	switch {
	case err != nil:
	case f.SizeBytes() == 0 || f.SizeBytes()%int64(block) != 0:
		err = rpc.Errno(syscall.EINVAL, kind.Errorf(kind.Invalid, "%s has %d bytes, no multiple of a block of %d", p.Filename, f.SizeBytes(), block))
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return &disk{name: p.Name, product: "AIO disk", blockBytes: block, local: true, driver: &fileDisk{p: p, f: f, fixed: p.ReadOnly}}, nil
}

// fileBlock is the block size asked for, or the device's own, or that of the file's
// file system.
func fileBlock(p fileParams) (uint32, error) {
	own := uint32(0)
	if h, err := os.Open(p.Filename); err == nil {
		if st, err := h.Stat(); err == nil && st.Mode()&os.ModeDevice != 0 {
			if n, err := unix.IoctlGetInt(int(h.Fd()), unix.BLKSSZGET); err == nil {
				own = uint32(n)
			}
		}
		h.Close()
	}
	block := p.BlockSize
	if block == 0 {
		block = max(own, 512)
		if own == 0 {
			block = 4096
			if st, err := os.Stat(p.Filename); err == nil && st.Size()%4096 != 0 {
				block = 512
			}
		}
	}
	if block < 512 || block > 64<<10 || block&(block-1) != 0 || block < own {
		return 0, rpc.Errno(syscall.EINVAL, kind.Errorf(kind.Invalid, "block size %d of %s: it must be a power of two from 512 to 64 KiB, and at least the device's %d", block, p.Filename, own))
	}
	return block, nil
}

func (t *Target) deleteFile(params json.RawMessage) (any, error) {
	return t.deleteDisk(params, classFile, func(d driver) bool { _, ok := d.(*fileDisk); return ok })
}

// deleteDisk deletes a disk of one kind, or what is on record of it but could not be
// made.
func (t *Target) deleteDisk(params json.RawMessage, class int, mine func(driver) bool) (any, error) {
	var p struct {
		Name string `json:"name"`
	}
	if err := decode(params, &p); err != nil {
		return nil, err
	}
	d := t.lookup(p.Name)
	if d == nil && t.isPending(class, p.Name) {
		return true, t.forget(class, p.Name)
	}
	if d == nil || !mine(d.driver) {
		return nil, rpc.Errno(syscall.ENODEV, kind.Errorf(kind.NotFound, "no such bdev %.160q", p.Name))
	}
	if err := t.forget(class, d.name); err != nil {
		return nil, err
	}
	t.unregister(d, true)
	return true, nil
}

func (d *fileDisk) open() (bdev.Device, error) { return d, nil }
func (d *fileDisk) sizeBytes() int64           { return d.f.SizeBytes() }
func (d *fileDisk) readOnly() bool             { return d.fixed }
func (d *fileDisk) close() error               { return d.f.Close() }

func (d *fileDisk) supports() ioSupport {
	return ioSupport{unmap: d.p.Fallocate, flush: true, writeZeroes: true}
}

func (d *fileDisk) specific() any {
	type aio struct {
		Filename  string `json:"filename"`
		Override  bool   `json:"block_size_override"`
		ReadOnly  bool   `json:"readonly"`
		Fallocate bool   `json:"fallocate"`
	}
	return struct {
		AIO aio `json:"aio"`
	}{aio{d.p.Filename, d.p.BlockSize != 0, d.p.ReadOnly, d.p.Fallocate}}
}

// below is the file itself, for an lvstore.
func (d *fileDisk) below() device.Device { return d.f }

// Close does nothing: users share the file, and the disk closes it.
func (d *fileDisk) Close() error { return nil }

// SizeBytes implements bdev.Device.
func (d *fileDisk) SizeBytes() int64 { return d.f.SizeBytes() }

// ReadOnly implements bdev.Device.
func (d *fileDisk) ReadOnly() bool { return d.fixed }

// ReadAt implements io.ReaderAt.
func (d *fileDisk) ReadAt(p []byte, off int64) (int, error) {
	size := d.f.SizeBytes()
	var eof error
	switch {
	case off > size:
		return 0, io.EOF
	case off >= 0 && int64(len(p)) > size-off:
		p, eof = p[:size-off], io.EOF
	}
	if err := d.f.ReadAt(p, off); err != nil {
		return 0, err
	}
	return len(p), eof
}

func (d *fileDisk) writable(op string) error {
	if d.fixed {
		return kind.Errorf(kind.ReadOnly, "%s bdev %s: it is read-only", op, d.p.Name)
	}
	return nil
}

// WriteAt implements io.WriterAt.
func (d *fileDisk) WriteAt(p []byte, off int64) (int, error) {
	if err := d.writable("write"); err != nil {
		return 0, err
	}
	if err := d.f.WriteAt(p, off); err != nil {
		return 0, err
	}
	return len(p), nil
}

// Flush implements bdev.Device. After a sync that failed the kernel may have dropped
// what it could not write, and a later sync would lie: the disk stays failed.
func (d *fileDisk) Flush() error {
	if d.fixed {
		return nil
	}
	d.mu.Lock()
	failed := d.failed
	d.mu.Unlock()
	if failed != nil {
		return failed
	}
	err := d.f.Sync()
	if err != nil {
		err = kind.Errorf(kind.IO, "bdev %s cannot be flushed since a sync failed: %w: delete and create it", d.p.Name, err)
		d.mu.Lock()
		d.failed = err
		d.mu.Unlock()
	}
	return err
}

// Discard implements bdev.Device.
func (d *fileDisk) Discard(off, length int64) error { return d.zero("discard", off, length) }

// WriteZeroes implements bdev.Device.
func (d *fileDisk) WriteZeroes(off, length int64) error { return d.zero("write zeroes", off, length) }

var zeros [256 << 10]byte // never written

func (d *fileDisk) zero(op string, off, length int64) error {
	if err := d.writable(op); err != nil {
		return err
	}
	if d.f.ZeroesOnPunch() {
		if err := d.f.Punch(off, length); err != nil || d.f.ZeroesOnPunch() {
			return err
		} // the file system cannot punch holes after all
	}
	if size := d.f.SizeBytes(); off < 0 || length < 0 || off > size || length > size-off {
		return kind.Errorf(kind.Invalid, "%s: %d bytes at %d do not fit in %d", op, length, off, size)
	}
	for length > 0 {
		n := min(length, int64(len(zeros)))
		if err := d.f.WriteAt(zeros[:n], off); err != nil {
			return err
		}
		off, length = off+n, length-n
	}
	return nil
}

// Extent implements nbd.Mapper.
func (d *fileDisk) Extent(off, length int64) (n int64, hole, zero bool, err error) {
	start, end, err := d.f.NextData(off)
	switch {
	case errors.Is(err, io.EOF):
		return length, true, true, nil
	case errors.Is(err, kind.Unsupported):
		return length, false, false, nil
	case err != nil:
		return 0, false, false, err
	case start > off:
		return min(start-off, length), true, true, nil
	}
	return min(end-off, length), false, false, nil
}
