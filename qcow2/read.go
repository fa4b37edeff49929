package qcow2

import (
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"

	"github.com/thaw-project/thaw/kind"
)

// extent is a part of the disk that one access to the file or the base covers.
type extent struct {
	class class
	host  int64  // where in the file, if class is classData
	entry uint64 // the L2 entry of the first cluster
	bytes int64
}

// lookup returns the extent at off, at most want bytes. The caller is inside an epoch,
// which keeps what the extent names from being reused.
func (i *Image) lookup(off, want int64) (extent, error) {
	cluster, in := off>>i.head.clusterBits, off&(i.clusterBytes-1)
	index := cluster >> i.head.l2Bits()
	if atomic.LoadUint64(&i.l1[index]) == 0 {
		end := (index + 1) << (i.head.l2Bits() + i.head.clusterBits)
		return extent{class: classUnallocated, bytes: min(want, end-off)}, nil
	}
	limit := (in + want + i.clusterBytes - 1) >> i.head.clusterBits
	entry, n, ok := i.cache.run(cluster, limit, uint64(i.clusterBytes))
	if !ok {
		s, err := i.cache.pin(cluster>>i.cache.entryBits, i.fillSlice)
		if err != nil {
			return extent{}, err
		}
		entry, n = s.run(cluster&(1<<i.cache.entryBits-1), limit, uint64(i.clusterBytes))
		i.cache.unpin(s)
	}
	e := extent{entry: entry, bytes: min(want, n<<i.head.clusterBits-in)}
	class, err := i.head.classify(entry)
	if err != nil {
		return e, i.damaged(fmt.Errorf("guest cluster %d: %w", cluster, err))
	}
	e.class = class
	if class == classData {
		e.host = hostOffset(entry) + in
		if last := hostOffset(entry) + (n-1)<<i.head.clusterBits; last >= i.alloc.fileBytes.Load() {
			return e, i.damaged(kind.Errorf(kind.Corrupt, "guest cluster %d: at %d, behind the end of the file", cluster, last))
		}
	}
	return e, nil
}

// fillSlice loads a slice from the file.
func (i *Image) fillSlice(number int64, entries []uint64) error {
	perTable := i.head.l2Bits() - i.cache.entryBits // logarithm of the slices of a table
	index := number >> perTable
	l1 := atomic.LoadUint64(&i.l1[index])
	if err := i.head.checkL1(l1, i.alloc.fileBytes.Load()); err != nil {
		return i.damaged(fmt.Errorf("L1 entry %d: %w", index, err))
	}
	buf := getBuffer(i.cache.entryBits + 3)
	defer putBuffer(buf)
	at := hostOffset(l1) + (number&(1<<perTable-1))<<(i.cache.entryBits+3)
	if err := readFull(i.file, *buf, at, false); err != nil {
		return fmt.Errorf("read L2 table %d: %w", index, err)
	}
	decodeEntries(entries, *buf)
	return nil
}

// ReadAt implements bdev.Device. It allocates nothing when the mapping is cached and
// the data neither compressed nor in the base.
func (i *Image) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, kind.Errorf(kind.Invalid, "read at %d", off)
	}
	if len(p) == 0 {
		return 0, nil
	}
	if off >= i.head.sizeBytes {
		return 0, io.EOF
	}
	var end error
	if rest := i.head.sizeBytes - off; int64(len(p)) > rest {
		p, end = p[:rest], io.EOF
	}
	g := i.epoch.enter()
	n, err := i.read(p, off)
	i.epoch.leave(g)
	if err != nil {
		return n, fmt.Errorf("qcow2 %s: read %d bytes at %d: %w", i.name, len(p), off, err)
	}
	return n, end
}

func (i *Image) read(p []byte, off int64) (int, error) {
	n := 0
	for n < len(p) {
		e, err := i.lookup(off+int64(n), int64(len(p)-n))
		if err != nil {
			return n, err
		}
		if err := i.readExtent(e, p[n:n+int(e.bytes)], off+int64(n)); err != nil {
			return n, err
		}
		n += int(e.bytes)
	}
	return n, nil
}

func (i *Image) readExtent(e extent, p []byte, off int64) error {
	switch e.class {
	case classData:
		return readFull(i.file, p, e.host, true)
	case classCompressed:
		return i.readCompressed(e.entry, p, off&(i.clusterBytes-1))
	case classUnallocated:
		return i.readBacking(p, off)
	}
	clear(p)
	return nil
}

// readBacking reads from the base, zeros where it ends.
func (i *Image) readBacking(p []byte, off int64) error {
	n := 0
	if off < i.backingBytes {
		part := p[:min(int64(len(p)), i.backingBytes-off)]
		var err error
		if n, err = i.backing.ReadAt(part, off); n < len(part) {
			if err == nil || errors.Is(err, io.EOF) {
				err = kind.Errorf(kind.IO, "it ends at %d, not at %d", off+int64(n), i.backingBytes)
			}
			return fmt.Errorf("read the base: %w", err)
		}
	}
	clear(p[n:])
	return nil
}

// coveredByBacking tells whether any byte of a guest cluster run is the base's.
func (i *Image) coveredByBacking(cluster int64) bool {
	return cluster<<i.head.clusterBits < i.backingBytes
}

// buffers are shared by all images, one pool per size: 50 idle images hold none. The
// largest is for the compressed bytes of a cluster, which may fill two clusters.
var buffers [maxClusterBits + 2]sync.Pool

func getBuffer(bits uint) *[]byte {
	if b, _ := buffers[bits].Get().(*[]byte); b != nil {
		return b
	}
	b := make([]byte, 1<<bits)
	return &b
}

func putBuffer(b *[]byte) {
	for bits := range buffers {
		if len(*b) == 1<<bits {
			buffers[bits].Put(b)
		}
	}
}
