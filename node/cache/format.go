package cache

import (
	"encoding/binary"
	"hash/crc32"

	"github.com/thaw-project/thaw/kind"
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

const (
	blockBytes = 4096 // what has a checksum of its own
	blockShift = 12
	sector     = 512 // sizes of devices are multiples of it

	headerBytes   = 4096
	formatVersion = 1
)

// magic starts the index file.
var magic = [8]byte{'T', 'H', 'A', 'W', 'N', 'C', 'C', 'H'}

// header is the start of the index file, little endian:
//
//	   0   8  magic
//	   8   4  version
//	  12   4  unit in bytes
//	  16   8  features: a program that does not know one refuses the cache
//	  24   8  features: ... may ignore it
//	4092   4  CRC-32C of the 4,092 bytes before
type header struct {
	unitBytes int
}

func (h header) encode() []byte {
	b := make([]byte, headerBytes)
	copy(b, magic[:])
	binary.LittleEndian.PutUint32(b[8:], formatVersion)
	binary.LittleEndian.PutUint32(b[12:], uint32(h.unitBytes))
	binary.LittleEndian.PutUint32(b[headerBytes-4:], crc32.Checksum(b[:headerBytes-4], castagnoli))
	return b
}

// decodeHeader returns kind.NotFound for no header or a damaged one: a cache may be
// made anew. What must not be overwritten is kind.Invalid, somebody else's file, or
// kind.Unsupported, a newer program's.
func decodeHeader(b []byte) (header, error) {
	le := binary.LittleEndian
	if len(b) >= 8 && [8]byte(b[:8]) != magic && [8]byte(b[:8]) != [8]byte{} {
		return header{}, kind.Errorf(kind.Invalid, "its file index is not a node cache's")
	}
	if len(b) < headerBytes || [8]byte(b[:8]) != magic {
		return header{}, kind.Errorf(kind.NotFound, "it has no header of a node cache")
	}
	if le.Uint32(b[headerBytes-4:]) != crc32.Checksum(b[:headerBytes-4], castagnoli) {
		return header{}, kind.Errorf(kind.NotFound, "the checksum of its header does not match")
	}
	if v := le.Uint32(b[8:]); v != formatVersion {
		return header{}, kind.Errorf(kind.Unsupported, "it has format version %d, this program knows %d", v, formatVersion)
	}
	if f := le.Uint64(b[16:]); f != 0 {
		return header{}, kind.Errorf(kind.Unsupported, "it has features %#x that this program does not know", f)
	}
	h := header{unitBytes: int(le.Uint32(b[12:]))}
	if !validUnit(int64(h.unitBytes)) {
		return header{}, kind.Errorf(kind.NotFound, "its unit of %d bytes makes no sense", h.unitBytes)
	}
	return h, nil
}

// key is what a unit is known by: 128 bits of a SHA-256 over whose it is, its number
// in there added to the lower half. Two owners' keys meet only if their upper halves are
// equal and the lower ones nearly so.
type key struct{ hi, lo uint64 }

// record says what a slot holds, little endian:
//
//	 0  16  key, never zero
//	16   4  bytes of it, a multiple of 512
//	20   4  zero
//	24   4  CRC-32C of each 4 KiB block, the last one perhaps short; zero where there is none
//	 -   4  CRC-32C of all before, and of the slot's number (4 bytes)
//
// padded with zeros in front of the checksum to a power of two of at most 512, so that
// none crosses a sector: a record is old or new.
type record struct {
	key   key
	bytes int
	sums  []uint32 // one per block of a unit
}

// recordBytes is the size of a record for a unit.
func recordBytes(unitBytes int) int {
	n := 32
	for n < 24+unitBytes/blockBytes*4+4 {
		n *= 2
	}
	return n
}

func recordSum(b []byte, slot uint32) uint32 {
	var n [4]byte
	binary.LittleEndian.PutUint32(n[:], slot)
	return crc32.Update(crc32.Checksum(b[:len(b)-4], castagnoli), castagnoli, n[:])
}

// encode fills b, recordBytes long.
func (r *record) encode(b []byte, slot uint32) {
	le := binary.LittleEndian
	clear(b)
	le.PutUint64(b, r.key.hi)
	le.PutUint64(b[8:], r.key.lo)
	le.PutUint32(b[16:], uint32(r.bytes))
	for i, s := range r.sums {
		le.PutUint32(b[24+4*i:], s)
	}
	le.PutUint32(b[len(b)-4:], recordSum(b, slot))
}

// decodeRecord fills r, whose sums have the length of a unit's, from b. It reports
// whether the slot holds anything that one can believe.
func decodeRecord(r *record, b []byte, slot uint32, unitBytes int) bool {
	le := binary.LittleEndian
	r.key = key{le.Uint64(b), le.Uint64(b[8:])}
	if r.key == (key{}) || le.Uint32(b[len(b)-4:]) != recordSum(b, slot) {
		return false
	}
	n := le.Uint32(b[16:])
	if n == 0 || n > uint32(unitBytes) || n%sector != 0 || le.Uint32(b[20:]) != 0 {
		return false
	}
	r.bytes = int(n)
	for i := range r.sums {
		r.sums[i] = le.Uint32(b[24+4*i:])
	}
	return true
}

// sumBlocks fills sums with the checksums of data's blocks, and zeros.
func sumBlocks(sums []uint32, data []byte) {
	clear(sums)
	for i := 0; len(data) > 0; i++ {
		n := min(blockBytes, len(data))
		sums[i] = crc32.Checksum(data[:n], castagnoli)
		data = data[n:]
	}
}

// verify holds data, the blocks from first on, to their checksums.
func verify(sums []uint32, first int, data []byte) bool {
	for i := first; len(data) > 0; i++ {
		n := min(blockBytes, len(data))
		if crc32.Checksum(data[:n], castagnoli) != sums[i] {
			return false
		}
		data = data[n:]
	}
	return true
}
