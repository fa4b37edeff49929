package qcow2

import (
	"bytes"
	"encoding/binary"
	"fmt"

	"github.com/thaw-project/thaw/kind"
)

// refStore is where the reference counts are in the file: a table of blocks (section
// "Host cluster management"). Only one goroutine uses it at a time: under
// Image.flushMu, or before anyone else sees the image.
type refStore struct {
	h     *header
	table []uint64 // offsets of the blocks; those behind the end are 0
	// unsaved marks table entries that the file does not have yet.
	unsaved map[int64]bool
}

// blockBits is the logarithm of the counts in a block.
func (r *refStore) blockBits() uint { return r.h.clusterBits + 3 - r.h.refcountOrder }

// maxCount is the largest count that the width of the counts can say.
func (h *header) maxCount() uint64 {
	if h.refcountOrder >= 4 {
		return 1<<16 - 1 // what memory holds; wider counts in the file are a matter of encoding
	}
	return 1<<(1<<h.refcountOrder) - 1
}

// encodeCounts writes counts in the width of the image. Below a byte, the first count
// is in the lowest bits.
func encodeCounts(dst []byte, refs []uint16, order uint) {
	clear(dst)
	be := binary.BigEndian
	for k, n := range refs {
		switch order {
		case 0, 1, 2:
			dst[k>>(3-order)] |= byte(n) << (k & (1<<(3-order) - 1) << order)
		case 3:
			dst[k] = byte(n)
		case 4:
			be.PutUint16(dst[2*k:], n)
		case 5:
			be.PutUint32(dst[4*k:], uint32(n))
		case 6:
			be.PutUint64(dst[8*k:], uint64(n))
		}
	}
}

// decodeCount reads the count of index k of a block.
func decodeCount(block []byte, k int, order uint) uint64 {
	be := binary.BigEndian
	switch order {
	case 0, 1, 2:
		return uint64(block[k>>(3-order)] >> (k & (1<<(3-order) - 1) << order) & (1<<(1<<order) - 1))
	case 3:
		return uint64(block[k])
	case 4:
		return uint64(be.Uint16(block[2*k:]))
	case 5:
		return uint64(be.Uint32(block[4*k:]))
	}
	return be.Uint64(block[8*k:])
}

// saveCounts makes the file's reference counts those of memory: all of them, or those
// that changed since the last time. It returns the clusters of a replaced table, which
// are free once the caller has released them.
//
// The order makes every state that a crash can leave readable: blocks are durable
// before the table names them, a new table before the header names it.
func (i *Image) saveCounts(all bool) (replaced clusterRun, err error) {
	grown, err := i.coverCounts()
	if err != nil {
		return replaced, err
	}
	// Taken only now, because coverCounts allocates.
	touched := i.alloc.takeTouched()
	if err := i.saveBlocks(touched, all); err != nil {
		i.alloc.touchAgain(touched)
		return replaced, err
	}
	if grown == nil && len(i.counts.unsaved) == 0 {
		return replaced, nil
	}
	if grown == nil {
		if err := i.sync(); err != nil {
			return replaced, err
		}
		for b := range i.counts.unsaved {
			var raw [8]byte
			binary.BigEndian.PutUint64(raw[:], i.counts.table[b])
			if err := i.file.WriteAt(raw[:], i.head.refTableOffset+b*8); err != nil {
				return replaced, fmt.Errorf("write refcount table: %w", err)
			}
		}
		clear(i.counts.unsaved)
		return replaced, i.sync()
	}

	raw := make([]byte, grown.n<<i.head.clusterBits)
	for b, off := range i.counts.table {
		binary.BigEndian.PutUint64(raw[8*b:], off)
	}
	if err := i.file.WriteAt(raw, grown.first<<i.head.clusterBits); err != nil {
		return replaced, fmt.Errorf("write refcount table: %w", err)
	}
	if err := i.sync(); err != nil {
		return replaced, err
	}
	var field [12]byte // refcount_table_offset and refcount_table_clusters, in one sector
	binary.BigEndian.PutUint64(field[:], uint64(grown.first<<i.head.clusterBits))
	binary.BigEndian.PutUint32(field[8:], uint32(grown.n))
	if err := i.file.WriteAt(field[:], offRefcountTable); err != nil {
		return replaced, fmt.Errorf("write header: %w", err)
	}
	replaced = clusterRun{i.head.refTableOffset >> i.head.clusterBits, i.head.refTableClusters}
	i.head.refTableOffset, i.head.refTableClusters = grown.first<<i.head.clusterBits, grown.n
	i.grownTable = nil
	clear(i.counts.unsaved)
	return replaced, i.sync()
}

// coverCounts allocates the blocks, and if need be a larger table, that the clusters in
// use ask for. Allocating may ask for more of them, hence the loop; it ends because a
// block covers many clusters. A larger table is returned until saveCounts put it in
// place.
func (i *Image) coverCounts() (*clusterRun, error) {
	blockBits := i.counts.blockBits()
	for again := true; again; {
		again = false
		for b := int64(0); ; b++ {
			counted, used := i.alloc.inBlock(b, blockBits)
			if !counted {
				break
			}
			for int64(len(i.counts.table)) <= b {
				i.counts.table = append(i.counts.table, 0)
			}
			if !used || i.counts.table[b] != 0 {
				continue
			}
			r, _, err := i.alloc.alloc(1)
			if err != nil {
				return nil, fmt.Errorf("allocate refcount block: %w", err)
			}
			// The whole block is written before anything names it.
			i.counts.table[b] = uint64(r.first << i.head.clusterBits)
			i.counts.unsaved[b] = true
			again = true
		}
		need := int64(len(i.counts.table)) * 8
		have := i.head.refTableClusters << i.head.clusterBits
		if i.grownTable != nil {
			have = i.grownTable.n << i.head.clusterBits
		}
		// Two new entries can reach the disk one without the other, and each block may
		// hold the count of the other's cluster. A copy of the table, put in place at
		// once, brings both; a lazy image is counted anew after a crash anyway.
		if need > have || len(i.counts.unsaved) > 1 && !i.head.lazy() && i.grownTable == nil {
			if i.grownTable != nil {
				i.alloc.release(*i.grownTable)
				i.grownTable = nil
			}
			n := i.head.refTableClusters
			if need > have {
				// Half as much again, so that growing stays rare.
				n = (need + need/2 + i.head.clusterBytes() - 1) >> i.head.clusterBits
			}
			if n<<i.head.clusterBits > max(maxRefcountTableBytes, i.head.clusterBytes()) {
				return nil, kind.Errorf(kind.NoSpace, "the refcount table would have %d clusters", n)
			}
			r, err := i.alloc.allocEnd(n)
			if err != nil {
				return nil, fmt.Errorf("allocate refcount table: %w", err)
			}
			i.grownTable = &r
			again = true
		}
	}
	return i.grownTable, nil
}

// inBlock tells whether block b covers any cluster of the file, and any in use.
func (a *allocator) inBlock(b int64, blockBits uint) (counted, used bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	first := b << blockBits
	if first >= int64(len(a.refs)) {
		return false, false
	}
	for _, n := range a.refs[first:min(first+1<<blockBits, int64(len(a.refs)))] {
		if n != 0 {
			return true, true
		}
	}
	return true, false
}

// copyCounts fills dst with the counts from first on, zeros behind the end.
func (a *allocator) copyCounts(dst []uint16, first int64) {
	a.mu.Lock()
	defer a.mu.Unlock()
	n := 0
	if first < int64(len(a.refs)) {
		n = copy(dst, a.refs[first:])
	}
	clear(dst[n:])
}

// saveBlocks writes the blocks whose content differs from the counts in memory, those
// of the clusters of within or all.
func (i *Image) saveBlocks(within clusterRun, all bool) error {
	blockBits := i.counts.blockBits()
	refs := make([]uint16, 1<<blockBits)
	want := make([]byte, i.head.clusterBytes())
	have := make([]byte, i.head.clusterBytes())
	for b, off := range i.counts.table {
		if off == 0 {
			continue
		}
		first := int64(b) << blockBits
		fresh := i.counts.unsaved[int64(b)]
		if !all && !fresh && (first+1<<blockBits <= within.first || within.first+within.n <= first) {
			continue
		}
		i.alloc.copyCounts(refs, first)
		if limit := i.head.maxCount(); limit < 1<<16-1 {
			for k, n := range refs {
				if uint64(n) > limit {
					return kind.Errorf(kind.Unsupported, "host cluster %d has %d references, refcount_order %d holds %d", first+int64(k), n, i.head.refcountOrder, limit)
				}
			}
		}
		encodeCounts(want, refs, i.head.refcountOrder)
		if !fresh {
			if err := readFull(i.file, have, int64(off), true); err != nil {
				return fmt.Errorf("read refcount block: %w", err)
			}
			if bytes.Equal(have, want) {
				continue
			}
		}
		if err := i.file.WriteAt(want, int64(off)); err != nil {
			return fmt.Errorf("write refcount block: %w", err)
		}
	}
	return nil
}
