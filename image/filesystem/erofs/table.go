package erofs

import (
	"encoding/binary"
	"hash/crc32"
	"io"

	"github.com/thaw-project/thaw/kind"
)

// The last block of the used part is Thaw's own table, which the kernel never
// reads:
//
//	 0 magic "THAWEROF"   8 version u32   12 layers applied u32
//	16 ranges n u32      20 crc32c u32 of the block with this field zero
//	24 n times: first block u32, blocks u32: metadata, newest layer first
const (
	tableMagic   = "THAWEROF"
	tableVersion = 1
	// maxLayers is the kernel's bound on the layers of an overlay mount; the
	// table would hold a few more.
	maxLayers = 500
)

type table struct {
	layers uint32
	ranges []blockRange
}

type blockRange struct{ block, blocks uint32 }

func (t *table) encode() []byte {
	b := make([]byte, blockSize)
	le := binary.LittleEndian
	copy(b, tableMagic)
	le.PutUint32(b[8:], tableVersion)
	le.PutUint32(b[12:], t.layers)
	le.PutUint32(b[16:], uint32(len(t.ranges)))
	for i, r := range t.ranges {
		le.PutUint32(b[24+8*i:], r.block)
		le.PutUint32(b[28+8*i:], r.blocks)
	}
	le.PutUint32(b[20:], crc32.Checksum(b, castagnoli))
	return b
}

func (m *image) readTable() (*table, error) {
	b := make([]byte, blockSize)
	if err := m.readAt(b, m.sizeBytes()-blockSize); err != nil {
		return nil, err
	}
	le := binary.LittleEndian
	if string(b[:8]) != tableMagic {
		return nil, kind.Errorf(kind.Unsupported, "erofs: not written by Thaw: no table of layers at the end")
	}
	if v := le.Uint32(b[8:]); v != tableVersion {
		return nil, kind.Errorf(kind.Unsupported, "erofs: the table of layers has version %d; this program knows %d", v, tableVersion)
	}
	sum := le.Uint32(b[20:])
	clear(b[20:24])
	if crc32.Checksum(b, castagnoli) != sum {
		return nil, kind.Errorf(kind.Corrupt, "erofs: the checksum of the table of layers does not hold")
	}
	t := &table{layers: le.Uint32(b[12:])}
	n := le.Uint32(b[16:])
	if n > maxLayers || t.layers > maxLayers {
		return nil, kind.Errorf(kind.Corrupt, "erofs: the table of layers has %d ranges of %d layers", n, t.layers)
	}
	for i := range n {
		r := blockRange{le.Uint32(b[24+8*i:]), le.Uint32(b[28+8*i:])}
		if !m.inside(int64(r.block)<<blockBits, int64(r.blocks)<<blockBits) {
			return nil, kind.Errorf(kind.Corrupt, "erofs: the table of layers points outside the image")
		}
		t.ranges = append(t.ranges, r)
	}
	return t, nil
}

// Range is a part of a block, in bytes.
type Range struct {
	Offset, Length int64
}

// MetadataRanges tells where in a block the metadata lies that a mount reads, so
// that it can be fetched ahead: block 0 first, then that of the newest layer and,
// in mode overlayfs, of each layer below it.
func MetadataRanges(r io.ReaderAt) ([]Range, error) {
	m, err := openImage(r)
	if err != nil {
		return nil, err
	}
	ranges := []Range{{0, blockSize}}
	for _, b := range m.table.ranges {
		ranges = append(ranges, Range{int64(b.block) << blockBits, int64(b.blocks) << blockBits})
	}
	return ranges, nil
}
