package lvol

import (
	"encoding/binary"
	"hash/crc32"

	"github.com/thaw-project/thaw/kind"
)

// The superblock is the first 4 KiB of cluster 0 of the data device, and a value in
// meta.db. Little endian:
//
//	   0   8  magic "THAWLVOL"
//	   8   4  version, 1
//	  12   4  cluster size in bytes
//	  16  16  pool UUID
//	  32   8  clusters in the pool, cluster 0 included
//	  40   8  features that make a program that does not know them refuse the pool
//	  48   8  ... that make it open the pool read-only
//	  56   8  ... that it may ignore
//	  64   8  created, Unix nanoseconds
//	  72   1  length of the name, 1 to 128
//	  73 128  name, zero padded
//	 201   -  zeros
//	4092   4  CRC-32C of the 4092 bytes before
//
// Every later version keeps magic, version, UUID and checksum where they are.
const (
	superblockMagic   = "THAWLVOL"
	superblockVersion = 1
	superblockBytes   = 4096
)

// Features this program knows.
const (
	knownRefuse   uint64 = 0
	knownReadOnly uint64 = 0
)

type superblock struct {
	uuid          uuid
	clusterBytes  int64
	totalClusters uint64
	refuse        uint64
	readOnly      uint64
	ignore        uint64
	created       int64
	name          string
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func (b *superblock) encode() []byte {
	p := make([]byte, superblockBytes)
	copy(p, superblockMagic)
	le := binary.LittleEndian
	le.PutUint32(p[8:], superblockVersion)
	le.PutUint32(p[12:], uint32(b.clusterBytes))
	copy(p[16:32], b.uuid[:])
	le.PutUint64(p[32:], b.totalClusters)
	le.PutUint64(p[40:], b.refuse)
	le.PutUint64(p[48:], b.readOnly)
	le.PutUint64(p[56:], b.ignore)
	le.PutUint64(p[64:], uint64(b.created))
	p[72] = byte(len(b.name))
	copy(p[73:73+MaxNameBytes], b.name)
	le.PutUint32(p[superblockBytes-4:], crc32.Checksum(p[:superblockBytes-4], castagnoli))
	return p
}

// hasSuperblock tells whether p looks like a superblock, sound or not.
func hasSuperblock(p []byte) bool {
	return len(p) >= len(superblockMagic) && string(p[:len(superblockMagic)]) == superblockMagic
}

func decodeSuperblock(p []byte) (superblock, error) {
	var b superblock
	if len(p) != superblockBytes || !hasSuperblock(p) {
		return b, kind.Errorf(kind.Corrupt, "superblock: no magic: not an lvol pool, or its first cluster was overwritten")
	}
	le := binary.LittleEndian
	if crc32.Checksum(p[:superblockBytes-4], castagnoli) != le.Uint32(p[superblockBytes-4:]) {
		return b, kind.Errorf(kind.Corrupt, "superblock: checksum does not match")
	}
	if v := le.Uint32(p[8:]); v != superblockVersion {
		return b, kind.Errorf(kind.Unsupported, "superblock: pool has format version %d, this program knows %d: use a newer program", v, superblockVersion)
	}
	b.clusterBytes = int64(le.Uint32(p[12:]))
	copy(b.uuid[:], p[16:32])
	b.totalClusters = le.Uint64(p[32:])
	b.refuse, b.readOnly, b.ignore = le.Uint64(p[40:]), le.Uint64(p[48:]), le.Uint64(p[56:])
	b.created = int64(le.Uint64(p[64:]))
	if f := b.refuse &^ knownRefuse; f != 0 {
		return b, kind.Errorf(kind.Unsupported, "superblock: pool uses features %#x that this program does not know: use a newer program", f)
	}
	if !validClusterBytes(b.clusterBytes) {
		return b, kind.Errorf(kind.Corrupt, "superblock: cluster size %d", b.clusterBytes)
	}
	if b.totalClusters < 2 || b.totalClusters > uint64(MaxCapacityBytes/b.clusterBytes) {
		return b, kind.Errorf(kind.Corrupt, "superblock: %d clusters", b.totalClusters)
	}
	if n := int(p[72]); n > MaxNameBytes {
		return b, kind.Errorf(kind.Corrupt, "superblock: name of %d bytes", n)
	} else {
		b.name = string(p[73 : 73+n])
	}
	if err := checkName(b.name); err != nil {
		return b, kind.Errorf(kind.Corrupt, "superblock: %w", err)
	}
	return b, nil
}
