package qcow2

import (
	"github.com/thaw-project/thaw/kind"
)

// Bits of L1 and L2 entries (section "Cluster mapping").
//
//	L1        9-55 offset of the L2 table          63 copied: its refcount is one
//	standard  0 reads as zeros    9-55 offset      62 clear   63 copied
//	compressed  0 to x-1 offset   x to 61 further sectors of 512   62 set   63 clear
//	            x = 62 - (cluster_bits - 8)
const (
	entryZero       = 1 << 0
	entryCompressed = 1 << 62
	entryCopied     = 1 << 63
	entryOffset     = 0x00ff_ffff_ffff_fe00
	entryReserved   = 0x3f00_0000_0000_01fe // of a standard cluster
	l1Reserved      = 0x7f00_0000_0000_01ff

	maxHostBytes = 1 << 56 // a standard cluster lies below
)

// class is what an L2 entry says about its cluster.
type class uint8

const (
	classUnallocated class = iota // read from the base
	classZero                     // zeros; may hold a cluster in reserve
	classData
	classCompressed
)

// classify decodes an L2 entry as far as the entry alone can tell.
func (h *header) classify(entry uint64) (class, error) {
	switch {
	case entry == 0:
		return classUnallocated, nil
	case entry&entryCompressed != 0:
		if entry&entryCopied != 0 {
			return 0, kind.Errorf(kind.Corrupt, "L2 entry %#x: compressed and copied", entry)
		}
		return classCompressed, nil
	case entry&entryReserved != 0 || entry&entryZero != 0 && h.version == 2:
		return 0, kind.Errorf(kind.Corrupt, "L2 entry %#x: reserved bits set", entry)
	case int64(entry&entryOffset)&(h.clusterBytes()-1) != 0:
		return 0, kind.Errorf(kind.Corrupt, "L2 entry %#x: offset not at a cluster", entry)
	case entry&entryCopied != 0 && entry&entryOffset == 0:
		return 0, kind.Errorf(kind.Corrupt, "L2 entry %#x: copied without an offset", entry)
	case entry&entryZero != 0:
		return classZero, nil
	}
	return classData, nil
}

func hostOffset(entry uint64) int64 { return int64(entry & entryOffset) }

// compressedExtent returns where the compressed bytes of an entry lie. The last
// sector is counted whole, so the extent may reach behind the end of the file.
func (h *header) compressedExtent(entry uint64) (off, lengthBytes int64) {
	x := 62 - (h.clusterBits - 8)
	off = int64(entry & (1<<x - 1))
	sectors := int64(entry&(entryCompressed-1)>>x) + 1
	return off, sectors*512 - off&511
}

// checkL1 validates an L1 entry that is not 0.
func (h *header) checkL1(entry uint64, fileBytes int64) error {
	off := hostOffset(entry)
	if entry&l1Reserved != 0 || off == 0 || off&(h.clusterBytes()-1) != 0 || off > fileBytes-h.clusterBytes() {
		return kind.Errorf(kind.Corrupt, "L1 entry %#x: no L2 table can be there", entry)
	}
	return nil
}
