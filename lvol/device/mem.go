package device

import (
	"io"
	"sync"
)

// Mem is a device in memory.
type Mem struct {
	mu   sync.RWMutex
	data []byte // guarded by mu
}

// NewMem returns a zeroed device of sizeBytes.
func NewMem(sizeBytes int64) *Mem { return &Mem{data: make([]byte, sizeBytes)} }

func (d *Mem) ReadAt(p []byte, off int64) error {
	if err := checkRange("read", off, int64(len(p)), int64(len(d.data))); err != nil {
		return err
	}
	d.mu.RLock()
	copy(p, d.data[off:])
	d.mu.RUnlock()
	return nil
}

func (d *Mem) WriteAt(p []byte, off int64) error {
	if err := checkRange("write", off, int64(len(p)), int64(len(d.data))); err != nil {
		return err
	}
	d.mu.Lock()
	copy(d.data[off:], p)
	d.mu.Unlock()
	return nil
}

func (d *Mem) Sync() error { return nil }

func (d *Mem) Punch(off, length int64) error {
	if err := checkRange("punch", off, length, int64(len(d.data))); err != nil {
		return err
	}
	d.mu.Lock()
	clear(d.data[off : off+length])
	d.mu.Unlock()
	return nil
}

func (d *Mem) ZeroesOnPunch() bool { return true }

// NextData implements Mapper: a sector that is not all zeros occupies space.
func (d *Mem) NextData(off int64) (start, end int64, err error) {
	d.mu.RLock()
	defer d.mu.RUnlock()
	size := int64(len(d.data))
	start = off / SectorBytes * SectorBytes
	for start < size && allZero(d.data[start:min(start+SectorBytes, size)]) {
		start += SectorBytes
	}
	if start >= size {
		return 0, 0, io.EOF
	}
	for end = start; end < size && !allZero(d.data[end:min(end+SectorBytes, size)]); {
		end += SectorBytes
	}
	return max(start, off), min(end, size), nil
}

func allZero(p []byte) bool {
	for _, b := range p {
		if b != 0 {
			return false
		}
	}
	return true
}

func (d *Mem) SizeBytes() int64 { return int64(len(d.data)) }

// Close keeps the content: the device can be used again, as a disk can after its
// process ended.
func (d *Mem) Close() error { return nil }
