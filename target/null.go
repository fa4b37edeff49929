package target

import (
	"encoding/json"
	"fmt"
	"io"
	"math"
	"syscall"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/target/bdev"
	"github.com/thaw-project/thaw/target/rpc"
)

// nullDisk is SPDK's null bdev: it reads as zeros, and what is written to it is gone.
type nullDisk struct{ size int64 }

type nullParams struct {
	Name      string `json:"name"`
	NumBlocks uint64 `json:"num_blocks"`
	BlockSize uint32 `json:"block_size"`
	UUID      string `json:"uuid,omitempty"`
	// A hint that means nothing here.
	PhysicalBlock uint32 `json:"physical_block_size,omitempty"`
	// Metadata and protection information, which no disk here has.
	MDSize    uint32 `json:"md_size,omitempty"`
	DIFType   uint32 `json:"dif_type,omitempty"`
	DIFHead   bool   `json:"dif_is_head_of_md,omitempty"`
	DIFFormat uint32 `json:"dif_pi_format,omitempty"`
}

func (t *Target) createNull(params json.RawMessage) (any, error) {
	var p nullParams
	if err := decode(params, &p); err != nil {
		return nil, err
	}
	refuse := func(text string, args ...any) error {
		return &rpc.Error{Code: -int(syscall.EINVAL), Message: fmt.Sprintf(text, args...)}
	}
	switch {
	case p.MDSize > p.BlockSize:
		return nil, refuse("Interleaved metadata size can not be greater than block size")
	case (p.BlockSize-p.MDSize)%512 != 0:
		return nil, refuse("Data block size %d is not a multiple of 512", p.BlockSize)
	case p.NumBlocks == 0:
		return nil, refuse("Disk num_blocks must be greater than 0")
	}
	id, err := parseUUID(p.UUID)
	if err != nil {
		return nil, refuse("Failed to parse bdev UUID")
	}
	switch {
	case p.MDSize != 0 || p.DIFType != 0:
		return nil, rpc.Errno(syscall.EINVAL, kind.Errorf(kind.Unsupported, "null bdev with metadata or protection information"))
	case p.BlockSize < 512 || p.BlockSize > 64<<10 || p.BlockSize&(p.BlockSize-1) != 0 || p.NumBlocks > math.MaxInt64/uint64(p.BlockSize):
		return nil, rpc.Errno(syscall.EINVAL, kind.Errorf(kind.Invalid, "null bdev of %d blocks of %d bytes: a block is a power of two from 512 to 64 KiB, and a disk has less than 8 EiB", p.NumBlocks, p.BlockSize))
	}
	d := &disk{name: p.Name, id: id, product: "Null disk", blockBytes: p.BlockSize, driver: nullDisk{int64(p.NumBlocks) * int64(p.BlockSize)}, inline: true, local: true}
	if err := t.register(d); err != nil {
		return nil, err
	}
	p.UUID = id.String()
	if err := t.keep(classNull, p.Name, "bdev_null_create", p); err != nil {
		t.unregister(d, true)
		return nil, err
	}
	return p.Name, nil
}

func (t *Target) deleteNull(params json.RawMessage) (any, error) {
	return t.deleteDisk(params, classNull, func(d driver) bool { _, ok := d.(nullDisk); return ok })
}

func (d nullDisk) open() (bdev.Device, error) { return d, nil }
func (d nullDisk) sizeBytes() int64           { return d.size }
func (nullDisk) readOnly() bool               { return false }
func (nullDisk) supports() ioSupport          { return ioSupport{flush: false, writeZeroes: true} }
func (nullDisk) specific() any                { return struct{}{} }
func (nullDisk) close() error                 { return nil }

func (d nullDisk) check(op string, off, length int64) error {
	if off < 0 || length < 0 || off > d.size || length > d.size-off {
		return kind.Errorf(kind.Invalid, "%s null bdev: %d bytes at %d do not fit in %d", op, length, off, d.size)
	}
	return nil
}

// ReadAt implements io.ReaderAt.
func (d nullDisk) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, d.check("read", off, 0)
	}
	var eof error
	if left := max(d.size-off, 0); int64(len(p)) > left {
		p, eof = p[:left], io.EOF
	}
	clear(p)
	return len(p), eof
}

// WriteAt implements io.WriterAt.
func (d nullDisk) WriteAt(p []byte, off int64) (int, error) {
	if err := d.check("write", off, int64(len(p))); err != nil {
		return 0, err
	}
	return len(p), nil
}

// Flush implements bdev.Device.
func (nullDisk) Flush() error { return nil }

// Discard implements bdev.Device.
func (d nullDisk) Discard(off, length int64) error { return d.check("discard", off, length) }

// WriteZeroes implements bdev.Device.
func (d nullDisk) WriteZeroes(off, length int64) error { return d.check("write zeroes", off, length) }

// SizeBytes implements bdev.Device.
func (d nullDisk) SizeBytes() int64 { return d.size }

// ReadOnly implements bdev.Device.
func (nullDisk) ReadOnly() bool { return false }

// Close does nothing.
func (nullDisk) Close() error { return nil }

// Extent implements nbd.Mapper: all of it is a hole.
func (d nullDisk) Extent(_, length int64) (n int64, hole, zero bool, err error) {
	return length, true, true, nil
}
