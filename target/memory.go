package target

import (
	"encoding/json"
	"fmt"
	"math"
	"syscall"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/target/bdev"
	"github.com/thaw-project/thaw/target/malloc"
	"github.com/thaw-project/thaw/target/rpc"
)

// memoryDisk is SPDK's malloc bdev.
type memoryDisk struct {
	t   *Target
	dev *malloc.Device
}

type memoryParams struct {
	Name      string `json:"name,omitempty"`
	NumBlocks uint64 `json:"num_blocks"`
	BlockSize uint32 `json:"block_size"`
	UUID      string `json:"uuid,omitempty"`
	// Hints that mean nothing here.
	OptimalIOBoundary uint32 `json:"optimal_io_boundary,omitempty"`
	PhysicalBlock     uint32 `json:"physical_block_size,omitempty"`
	// Metadata and protection information, which no disk here has.
	MDSize       uint32 `json:"md_size,omitempty"`
	MDInterleave bool   `json:"md_interleave,omitempty"`
	DIFType      uint32 `json:"dif_type,omitempty"`
	DIFHead      bool   `json:"dif_is_head_of_md,omitempty"`
	DIFFormat    uint32 `json:"dif_pi_format,omitempty"`
}

func (t *Target) createMemory(params json.RawMessage) (any, error) {
	var p memoryParams
	if err := decode(params, &p); err != nil {
		return nil, err
	}
	id, err := parseUUID(p.UUID)
	if err != nil {
		return nil, err
	}
	if p.NumBlocks == 0 || p.BlockSize < 512 || p.BlockSize > 64<<10 || p.BlockSize&(p.BlockSize-1) != 0 {
		return nil, rpc.Errno(syscall.EINVAL, kind.Errorf(kind.Invalid, "malloc bdev of %d blocks of %d bytes: there must be some, of a power of two from 512 to 64 KiB", p.NumBlocks, p.BlockSize))
	}
	if p.MDSize != 0 || p.DIFType != 0 {
		return nil, rpc.Errno(syscall.EINVAL, kind.Errorf(kind.Unsupported, "malloc bdev with metadata or protection information"))
	}
	if p.NumBlocks > math.MaxInt64/uint64(p.BlockSize) || int64(p.NumBlocks)*int64(p.BlockSize) > t.o.MallocBytes-t.memory {
		return nil, rpc.Errno(syscall.ENOMEM, kind.Errorf(kind.NoSpace, "malloc bdev of %d blocks of %d bytes: of %d bytes for such bdevs %d are in use", p.NumBlocks, p.BlockSize, t.o.MallocBytes, t.memory))
	}
	if p.Name == "" {
		for p.Name = fmt.Sprintf("Malloc%d", t.mallocs); t.lookup(p.Name) != nil; p.Name = fmt.Sprintf("Malloc%d", t.mallocs) {
			t.mallocs++
		}
	}
	size := int64(p.NumBlocks) * int64(p.BlockSize)
	dev, err := malloc.New(size)
	if err != nil {
		return nil, rpc.Errno(syscall.ENOMEM, err)
	}
	d := &disk{name: p.Name, id: id, product: "Malloc disk", blockBytes: p.BlockSize, driver: &memoryDisk{t, dev}, inline: true, local: true}
	if err := t.register(d); err != nil {
		dev.Close()
		return nil, err
	}
	t.memory += size
	p.UUID = id.String()
	if err := t.keep(classMemory, p.Name, "bdev_malloc_create", p); err != nil {
		t.unregister(d, true)
		return nil, err
	}
	return p.Name, nil
}

func (t *Target) deleteMemory(params json.RawMessage) (any, error) {
	return t.deleteDisk(params, classMemory, func(d driver) bool { _, ok := d.(*memoryDisk); return ok })
}

func (d *memoryDisk) open() (bdev.Device, error) { return memoryUser{d.dev}, nil }
func (d *memoryDisk) sizeBytes() int64           { return d.dev.SizeBytes() }
func (d *memoryDisk) readOnly() bool             { return false }
func (d *memoryDisk) supports() ioSupport {
	return ioSupport{unmap: true, flush: true, writeZeroes: true}
}
func (d *memoryDisk) specific() any { return struct{}{} }

func (d *memoryDisk) close() error {
	d.t.memory -= d.dev.SizeBytes()
	return d.dev.Close()
}

// memoryUser is a user's view of memory: closing it keeps the memory.
type memoryUser struct{ *malloc.Device }

// Close does nothing.
func (memoryUser) Close() error { return nil }
