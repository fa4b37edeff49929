package erofs

import (
	"encoding/binary"
	"hash/crc32"
	"strings"

	"github.com/thaw-project/thaw/image/layer"
	"github.com/thaw-project/thaw/kind"
)

// The on-disk format, little-endian throughout. References: the kernel's
// Documentation/filesystems/erofs.rst and fs/erofs/erofs_fs.h. What Thaw puts where
// is drawn in docs/erofs-layout.md.
const (
	blockBits = 12
	blockSize = 1 << blockBits

	superMagic  = 0xE0F5E1E2
	superOffset = 1024
	superSize   = 128

	compatChecksum = 0x1 // sb_chksum
	compatMTime    = 0x2 // inode times are mtimes

	incompatChunked = 0x4 // chunk-based files, since Linux 5.15
	incompatKnown   = incompatChunked

	// nidBits: the inode nid lies at byte nid << nidBits, as meta_blkaddr is 0.
	nidBits = 5

	// rootNid is the slot right after the superblock, so that the superblock's
	// checksum, which covers the rest of block 0, covers the root inode too.
	rootNid = (superOffset + superSize) >> nidBits

	inodeSize        = 64
	inodeCompactSize = 32
	direntSize       = 12
	maxNameLen       = 255

	xattrHeaderSize = 12
	xattrEntrySize  = 4
	maxXattrWords   = 1<<16 - 2 // i_xattr_icount counts one more than this
)

// Data layouts, bits 1 to 3 of i_format; bit 0 tells the extended inode.
const (
	layoutPlain  = 0
	layoutInline = 2
	layoutChunk  = 4
)

// chunkHole is the block address of a chunk of zeros.
const chunkHole = ^uint32(0)

// maxChunkBits bounds chunk sizes to 1 GiB, which tools that compute 1<<bits in
// an int can handle.
const maxChunkBits = 30

// File types of stat's st_mode.
const (
	modeType    = 0o170000
	modeSocket  = 0o140000
	modeSymlink = 0o120000
	modeRegular = 0o100000
	modeBlock   = 0o060000
	modeDir     = 0o040000
	modeChar    = 0o020000
	modeFIFO    = 0o010000
)

// direntType maps the type bits of a mode to a dirent's file_type.
func direntType(mode uint16) uint8 {
	switch mode & modeType {
	case modeRegular:
		return 1
	case modeDir:
		return 2
	case modeChar:
		return 3
	case modeBlock:
		return 4
	case modeFIFO:
		return 5
	case modeSocket:
		return 6
	case modeSymlink:
		return 7
	}
	return 0
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// superblock is what Thaw uses of erofs_super_block, 128 bytes at offset 1024:
//
//	 0 magic u32            4 checksum u32         8 feature_compat u32
//	12 blkszbits u8        13 sb_extslots u8      14 root_nid u16
//	16 inos u64            24 build_time u64      32 build_time_nsec u32
//	36 blocks u32          40 meta_blkaddr u32    44 xattr_blkaddr u32
//	48 uuid [16]           64 volume_name [16]    80 feature_incompat u32
//	84 available_compr_algs u16                   86 extra_devices u16
//	88 devt_slotoff u16    90 dirblkbits u8       91 and up: zero
type superblock struct {
	inos   uint64
	blocks uint32 // the used part; the next layer goes behind it
	uuid   [16]byte
}

// encode writes the superblock into block 0 and then the checksum over all of it
// from offset 1024 on, so the root inode must be there already.
func (s *superblock) encode(block []byte) {
	b := block[superOffset : superOffset+superSize]
	clear(b)
	le := binary.LittleEndian
	le.PutUint32(b[0:], superMagic)
	le.PutUint32(b[8:], compatChecksum|compatMTime)
	b[12] = blockBits
	le.PutUint16(b[14:], rootNid)
	le.PutUint64(b[16:], s.inos)
	// build_time stays 0: it only serves compact inodes, and the same input
	// must give the same bytes.
	le.PutUint32(b[36:], s.blocks)
	copy(b[48:64], s.uuid[:])
	copy(b[64:80], "thaw")
	le.PutUint32(b[80:], incompatChunked)
	le.PutUint32(b[4:], superChecksum(block))
}

// superChecksum is the kernel's crc32c without the final inversion, computed with
// the checksum field as zero.
func superChecksum(block []byte) uint32 {
	crc := crc32.Update(0, castagnoli, block[superOffset:superOffset+4])
	crc = crc32.Update(crc, castagnoli, []byte{0, 0, 0, 0})
	return ^crc32.Update(crc, castagnoli, block[superOffset+8:blockSize])
}

func decodeSuperblock(block []byte) (*superblock, error) {
	b := block[superOffset : superOffset+superSize]
	le := binary.LittleEndian
	if le.Uint32(b) != superMagic {
		return nil, kind.Errorf(kind.Corrupt, "erofs: no superblock: magic %#x", le.Uint32(b))
	}
	if le.Uint32(b[8:])&compatChecksum != 0 && le.Uint32(b[4:]) != superChecksum(block) {
		return nil, kind.Errorf(kind.Corrupt, "erofs: the superblock's checksum does not hold")
	}
	if unknown := le.Uint32(b[80:]) &^ incompatKnown; unknown != 0 || b[12] != blockBits || b[13] != 0 ||
		b[90] != 0 || le.Uint16(b[86:]) != 0 || le.Uint32(b[40:]) != 0 || le.Uint16(b[14:]) != rootNid {
		return nil, kind.Errorf(kind.Unsupported, "erofs: not written by Thaw: features %#x, block bits %d, root %d, metadata at block %d",
			le.Uint32(b[80:]), b[12], le.Uint16(b[14:]), le.Uint32(b[40:]))
	}
	s := &superblock{inos: le.Uint64(b[16:]), blocks: le.Uint32(b[36:])}
	copy(s.uuid[:], b[48:64])
	if s.blocks < 1 {
		return nil, kind.Errorf(kind.Corrupt, "erofs: the superblock says %d blocks", s.blocks)
	}
	return s, nil
}

// diskInode is erofs_inode_extended, 64 bytes:
//
//	 0 i_format u16    2 i_xattr_icount u16   4 i_mode u16     6 reserved u16
//	 8 i_size u64     16 i_u u32             20 i_ino u32
//	24 i_uid u32      28 i_gid u32           32 i_mtime u64
//	40 i_mtime_nsec u32                      44 i_nlink u32   48 reserved [16]
type diskInode struct {
	layout   uint8
	xattrs   uint16 // i_xattr_icount
	mode     uint16
	size     uint64
	u        uint32 // block address, device number or chunk format
	uid, gid uint32
	mtime    uint64
	nsec     uint32
	nlink    uint32
}

func (d *diskInode) encode(b []byte, ino uint32) {
	le := binary.LittleEndian
	clear(b[:inodeSize])
	le.PutUint16(b[0:], uint16(d.layout)<<1|1)
	le.PutUint16(b[2:], d.xattrs)
	le.PutUint16(b[4:], d.mode)
	le.PutUint64(b[8:], d.size)
	le.PutUint32(b[16:], d.u)
	le.PutUint32(b[20:], ino)
	le.PutUint32(b[24:], d.uid)
	le.PutUint32(b[28:], d.gid)
	le.PutUint64(b[32:], d.mtime)
	le.PutUint32(b[40:], d.nsec)
	le.PutUint32(b[44:], d.nlink)
}

// decode reads an extended inode; Thaw writes no compact ones, as they have no
// time of their own.
func (d *diskInode) decode(b []byte) error {
	le := binary.LittleEndian
	format := le.Uint16(b[0:])
	if format&1 == 0 || format>>4 != 0 {
		return kind.Errorf(kind.Corrupt, "format %#x is not an extended inode", format)
	}
	*d = diskInode{
		layout: uint8(format >> 1), xattrs: le.Uint16(b[2:]), mode: le.Uint16(b[4:]), size: le.Uint64(b[8:]),
		u: le.Uint32(b[16:]), uid: le.Uint32(b[24:]), gid: le.Uint32(b[28:]),
		mtime: le.Uint64(b[32:]), nsec: le.Uint32(b[40:]), nlink: le.Uint32(b[44:]),
	}
	return nil
}

// xattrSize is the size in bytes of what i_xattr_icount counts.
func xattrSize(icount uint16) int {
	if icount == 0 {
		return 0
	}
	return xattrHeaderSize + 4*(int(icount)-1)
}

// xattrIndexes are the name prefixes that EROFS stores as a number, whole names
// first.
var xattrIndexes = []struct {
	prefix string
	whole  bool
	index  uint8
}{
	{"system.posix_acl_access", true, 2},
	{"system.posix_acl_default", true, 3},
	{"user.", false, 1},
	{"trusted.", false, 4},
	{"security.", false, 6},
}

func splitXattr(name string) (index uint8, rest string, ok bool) {
	for _, x := range xattrIndexes {
		if x.whole && name == x.prefix {
			return x.index, "", true
		}
		if !x.whole && strings.HasPrefix(name, x.prefix) {
			return x.index, name[len(x.prefix):], true
		}
	}
	return 0, "", false
}

// xattrBytes is the size of the inline xattr area: erofs_xattr_ibody_header
// (12 bytes, all zero: no filter, no shared attributes) and, per attribute,
// erofs_xattr_entry (name length u8, name index u8, value size u16), name and
// value, padded to 4 bytes.
func xattrBytes(xattrs []layer.Xattr) int {
	if len(xattrs) == 0 {
		return 0
	}
	n := xattrHeaderSize
	for _, x := range xattrs {
		_, rest, _ := splitXattr(x.Name)
		n += (xattrEntrySize + len(rest) + len(x.Value) + 3) &^ 3
	}
	return n
}

// appendXattrs appends the inline xattr area.
func appendXattrs(b []byte, xattrs []layer.Xattr) []byte {
	if len(xattrs) == 0 {
		return b
	}
	b = append(b, make([]byte, xattrHeaderSize)...)
	for _, x := range xattrs {
		index, rest, _ := splitXattr(x.Name)
		b = append(b, uint8(len(rest)), index)
		b = binary.LittleEndian.AppendUint16(b, uint16(len(x.Value)))
		b = append(b, rest...)
		b = append(b, x.Value...)
		for len(b)&3 != 0 {
			b = append(b, 0)
		}
	}
	return b
}

// decodeXattrs reads an inline xattr area.
func decodeXattrs(b []byte) ([]layer.Xattr, error) {
	if len(b) < xattrHeaderSize || b[4] != 0 {
		return nil, kind.Errorf(kind.Corrupt, "extended attributes: %d bytes with shared ones", len(b))
	}
	var xattrs []layer.Xattr
	for b = b[xattrHeaderSize:]; len(b) >= xattrEntrySize; {
		nameLen, index, valueLen := int(b[0]), b[1], int(binary.LittleEndian.Uint16(b[2:]))
		end := xattrEntrySize + nameLen + valueLen
		if end > len(b) {
			return nil, kind.Errorf(kind.Corrupt, "extended attributes: an entry of %d bytes where %d are left", end, len(b))
		}
		prefix := ""
		for _, x := range xattrIndexes {
			if x.index == index && x.whole == (nameLen == 0) {
				prefix = x.prefix
			}
		}
		if prefix == "" {
			return nil, kind.Errorf(kind.Corrupt, "extended attributes: name index %d with %d bytes", index, nameLen)
		}
		name := prefix + string(b[xattrEntrySize:xattrEntrySize+nameLen])
		xattrs = append(xattrs, layer.Xattr{Name: name, Value: string(b[xattrEntrySize+nameLen : end])})
		b = b[min((end+3)&^3, len(b)):]
	}
	return xattrs, nil
}

// encodeDev is the kernel's new_encode_dev.
func encodeDev(major, minor uint32) uint32 {
	return minor&0xff | major<<8 | minor&^0xff<<12
}

func alignUp(n, to int64) int64 { return (n + to - 1) / to * to }
