package qcow2

import (
	"encoding/binary"
	"fmt"
	"math/bits"
	"strings"

	"github.com/thaw-project/thaw/kind"
)

// The header (section "Header"), all numbers big endian:
//
//	 0  4  magic "QFI\xfb"            56  4  refcount_table_clusters
//	 4  4  version, 2 or 3            60  4  nb_snapshots
//	 8  8  backing_file_offset        64  8  snapshots_offset
//	16  4  backing_file_size          72  8  incompatible_features   version 3 from here on
//	20  4  cluster_bits               80  8  compatible_features
//	24  8  size                       88  8  autoclear_features
//	32  4  crypt_method               96  4  refcount_order
//	36  4  l1_size                   100  4  header_length
//	40  8  l1_table_offset           104  1  compression_type        if header_length > 104
//	48  8  refcount_table_offset
//
// then header extensions: type (4), length (4), data padded to 8.
const (
	magic = "QFI\xfb"

	headerV2Bytes    = 72
	headerV3Bytes    = 104
	headerWriteBytes = 112 // what Create writes: compression_type and its padding included

	offIncompatible  = 72
	offAutoclear     = 88
	offRefcountTable = 48

	minClusterBits = 9
	maxClusterBits = 21 // QEMU's limit

	// maxL1Bytes is QEMU's limit of an L1 table. Its entries are kept in memory.
	maxL1Bytes = 32 << 20
	// maxRefcountTableBytes is QEMU's limit too.
	maxRefcountTableBytes = 8 << 20
	maxBackingNameBytes   = 1023
	maxSnapshots          = 65536 // QEMU's limit
)

// Feature bits of the three fields.
const (
	incompatDirty       = 1 << 0
	incompatCorrupt     = 1 << 1
	incompatDataFile    = 1 << 2
	incompatCompression = 1 << 3
	incompatExtendedL2  = 1 << 4

	compatLazyRefcounts = 1 << 0

	incompatKnown = incompatDirty | incompatCorrupt | incompatCompression
)

// Header extension types.
const (
	extEnd           = 0
	extBackingFormat = 0xe2792aca
	extFeatureNames  = 0x6803f857
	extBitmaps       = 0x23852875
	extEncryption    = 0x0537be77
	extDataFile      = 0x44415441
)

// featureNames is what Create puts into the feature name table, so that a program
// that does not know a bit can name it. The names are QEMU's.
var featureNames = []featureName{
	{0, 0, "dirty bit"},
	{0, 1, "corrupt bit"},
	{0, 2, "external data file"},
	{0, 3, "compression type"},
	{0, 4, "extended L2 entries"},
	{1, 0, "lazy refcounts"},
	{2, 0, "bitmaps"},
	{2, 1, "raw external data"},
}

// featureName is one entry: field (1), bit (1), name padded with zeros (46).
type featureName struct {
	field, bit byte // field: 0 incompatible, 1 compatible, 2 autoclear
	name       string
}

const featureNameBytes = 48

// Compression types.
const (
	compressionDeflate = 0
	compressionZstd    = 1
)

type header struct {
	version          int
	clusterBits      uint
	sizeBytes        int64
	l1Entries        int64
	l1Offset         int64
	refTableOffset   int64
	refTableClusters int64
	snapshots        int64
	snapshotsOffset  int64
	incompatible     uint64
	compatible       uint64
	autoclear        uint64
	refcountOrder    uint
	compression      byte
	backingFile      string
	backingFormat    string
	bitmaps          bool // a bitmaps extension is present
	headerBytes      int
}

func (h *header) clusterBytes() int64 { return 1 << h.clusterBits }
func (h *header) dirty() bool         { return h.incompatible&incompatDirty != 0 }
func (h *header) corrupt() bool       { return h.incompatible&incompatCorrupt != 0 }
func (h *header) lazy() bool          { return h.compatible&compatLazyRefcounts != 0 }

// l2Bits is the logarithm of the entries of an L2 table.
func (h *header) l2Bits() uint { return h.clusterBits - 3 }

// guestClusters is the number of clusters of the disk, the last one perhaps partial.
func (h *header) guestClusters() int64 {
	return (h.sizeBytes + h.clusterBytes() - 1) >> h.clusterBits
}

// l1Needed is the number of L1 entries that the disk's size asks for.
func (h *header) l1Needed() int64 {
	n := h.guestClusters()
	return (n + 1<<h.l2Bits() - 1) >> h.l2Bits()
}

func (h *header) compressionName() string {
	if h.compression == compressionZstd {
		return "zstd"
	}
	return "deflate"
}

// parseHeader reads a header from the first bytes of a file that is fileBytes long.
// first must hold the first cluster, or all of a shorter file.
func parseHeader(first []byte, fileBytes int64) (*header, error) {
	be := binary.BigEndian
	if len(first) < headerV2Bytes || string(first[:4]) != magic {
		return nil, kind.Errorf(kind.Invalid, "not a qcow2 image")
	}
	h := &header{version: int(be.Uint32(first[4:]))}
	if h.version != 2 && h.version != 3 {
		return nil, kind.Errorf(kind.Unsupported, "qcow2 version %d", be.Uint32(first[4:]))
	}
	clusterBits := be.Uint32(first[20:])
	if clusterBits < minClusterBits || clusterBits > maxClusterBits {
		return nil, kind.Errorf(kind.Unsupported, "cluster_bits %d: must be %d to %d", clusterBits, minClusterBits, maxClusterBits)
	}
	h.clusterBits = uint(clusterBits)
	first = first[:min(int64(len(first)), h.clusterBytes())]

	h.refcountOrder, h.headerBytes = 4, headerV2Bytes
	if h.version == 3 {
		if err := h.parseV3(first); err != nil {
			return nil, err
		}
	}
	switch m := be.Uint32(first[32:]); m {
	case 0:
	case 1, 2:
		return nil, kind.Errorf(kind.Unsupported, "encrypted image (crypt_method %d)", m)
	default:
		return nil, kind.Errorf(kind.Unsupported, "unknown crypt_method %d", m)
	}
	backingOffset, backingBytes := be.Uint64(first[8:]), be.Uint32(first[16:])
	extEndAt := len(first)
	if backingOffset != 0 {
		if backingBytes == 0 || backingBytes > maxBackingNameBytes ||
			backingOffset < uint64(h.headerBytes) || backingOffset > uint64(len(first)) ||
			uint64(backingBytes) > uint64(len(first))-backingOffset {
			return nil, kind.Errorf(kind.Corrupt, "backing file name of %d bytes at %d: must be 1 to %d bytes inside the first cluster", backingBytes, backingOffset, maxBackingNameBytes)
		}
		h.backingFile = string(first[backingOffset : backingOffset+uint64(backingBytes)])
		extEndAt = int(backingOffset)
	}
	names, err := h.parseExtensions(first[:extEndAt])
	if err != nil {
		return nil, err
	}
	if unknown := h.incompatible &^ incompatKnown; unknown != 0 {
		return nil, kind.Errorf(kind.Unsupported, "incompatible feature %s", nameFeatures(unknown, names))
	}
	if err := h.parseTables(first, fileBytes); err != nil {
		return nil, err
	}
	return h, nil
}

func (h *header) parseV3(first []byte) error {
	be := binary.BigEndian
	if len(first) < headerV3Bytes {
		return kind.Errorf(kind.Corrupt, "header of %d bytes: version 3 has at least %d", len(first), headerV3Bytes)
	}
	h.incompatible = be.Uint64(first[offIncompatible:])
	h.compatible = be.Uint64(first[80:])
	h.autoclear = be.Uint64(first[offAutoclear:])
	order, length := be.Uint32(first[96:]), be.Uint32(first[100:])
	if order > 6 {
		return kind.Errorf(kind.Corrupt, "refcount_order %d: must be at most 6", order)
	}
	if length < headerV3Bytes || length%8 != 0 || uint64(length) > uint64(len(first)) {
		return kind.Errorf(kind.Corrupt, "header_length %d: must be %d to a cluster, in steps of 8", length, headerV3Bytes)
	}
	h.refcountOrder, h.headerBytes = uint(order), int(length)
	if length > 104 {
		h.compression = first[104]
	}
	if named := h.incompatible&incompatCompression != 0; named != (h.compression != compressionDeflate) {
		return kind.Errorf(kind.Corrupt, "compression type %d contradicts incompatible feature bit 3", h.compression)
	}
	if h.compression > compressionZstd {
		return kind.Errorf(kind.Unsupported, "compression type %d", h.compression)
	}
	return nil
}

func (h *header) parseTables(first []byte, fileBytes int64) error {
	be := binary.BigEndian
	size := be.Uint64(first[24:])
	if size > 1<<62 {
		return kind.Errorf(kind.Unsupported, "a disk of %d bytes", size)
	}
	// QEMU counts in sectors and drops what does not fill one.
	h.sizeBytes = int64(size) &^ 511
	h.l1Entries = int64(be.Uint32(first[36:]))
	if need := h.l1Needed(); need*8 > maxL1Bytes || h.l1Entries*8 > maxL1Bytes {
		return kind.Errorf(kind.Unsupported, "L1 table of %d entries, %d needed: at most %d bytes are supported", h.l1Entries, need, maxL1Bytes)
	} else if h.l1Entries < need {
		return kind.Errorf(kind.Corrupt, "L1 table of %d entries, %d needed", h.l1Entries, need)
	}
	h.refTableClusters = int64(be.Uint32(first[56:]))
	if h.refTableClusters<<h.clusterBits > max(maxRefcountTableBytes, h.clusterBytes()) {
		return kind.Errorf(kind.Unsupported, "refcount table of %d clusters", h.refTableClusters)
	}
	h.snapshots = int64(be.Uint32(first[60:]))
	if h.snapshots > maxSnapshots {
		return kind.Errorf(kind.Unsupported, "%d internal snapshots", h.snapshots)
	}
	for _, t := range []struct {
		name   string
		at     int
		bytes  int64
		offset *int64
	}{
		{"L1 table", 40, h.l1Entries * 8, &h.l1Offset},
		{"refcount table", offRefcountTable, h.refTableClusters << h.clusterBits, &h.refTableOffset},
		{"snapshot table", 64, h.snapshots * 40, &h.snapshotsOffset},
	} {
		off := be.Uint64(first[t.at:])
		if t.bytes == 0 {
			continue
		}
		if off%uint64(h.clusterBytes()) != 0 || off == 0 || off > uint64(fileBytes) || uint64(t.bytes) > uint64(fileBytes)-off {
			return kind.Errorf(kind.Corrupt, "%s of %d bytes at %d: not at a cluster inside the file of %d bytes", t.name, t.bytes, off, fileBytes)
		}
		*t.offset = int64(off)
	}
	return nil
}

// parseExtensions reads the header extensions, which end at an end mark or where
// area does, and returns the image's own names of features.
func (h *header) parseExtensions(area []byte) ([]featureName, error) {
	be := binary.BigEndian
	var names []featureName
	for at := h.headerBytes; at+8 <= len(area); {
		typ, n := be.Uint32(area[at:]), uint64(be.Uint32(area[at+4:]))
		at += 8
		if typ == extEnd {
			break
		}
		if n > uint64(len(area)-at) {
			return nil, kind.Errorf(kind.Corrupt, "header extension %#x of %d bytes does not fit the first cluster", typ, n)
		}
		data := area[at : at+int(n)]
		switch typ {
		case extBackingFormat:
			if n > maxBackingNameBytes {
				return nil, kind.Errorf(kind.Corrupt, "backing format name of %d bytes", n)
			}
			h.backingFormat = string(data)
		case extFeatureNames:
			for ; len(data) >= featureNameBytes; data = data[featureNameBytes:] {
				name, _, _ := strings.Cut(string(data[2:featureNameBytes]), "\x00")
				names = append(names, featureName{data[0], data[1], name})
			}
		case extBitmaps:
			h.bitmaps = true
		case extEncryption:
			return nil, kind.Errorf(kind.Unsupported, "encrypted image (header extension %#x)", typ)
		case extDataFile:
			return nil, kind.Errorf(kind.Unsupported, "external data file (incompatible feature bit 2)")
		}
		at += (int(n) + 7) &^ 7
	}
	return names, nil
}

// nameFeatures lists set bits, by our own names first, since those of the image may
// say anything.
func nameFeatures(set uint64, names []featureName) string {
	var out []string
	for ; set != 0; set &= set - 1 {
		bit := byte(bits.TrailingZeros64(set))
		name := ""
		for _, n := range append(append([]featureName(nil), featureNames...), names...) {
			if n.field == 0 && n.bit == bit && name == "" {
				name = n.name
			}
		}
		if name == "" {
			out = append(out, fmt.Sprintf("bit %d", bit))
		} else {
			out = append(out, fmt.Sprintf("bit %d (%q)", bit, name))
		}
	}
	return strings.Join(out, ", ")
}

// encode lays out the first cluster of a new image.
func (h *header) encode() ([]byte, error) {
	be := binary.BigEndian
	b := make([]byte, headerWriteBytes, h.clusterBytes())
	copy(b, magic)
	be.PutUint32(b[4:], uint32(h.version))
	be.PutUint32(b[20:], uint32(h.clusterBits))
	be.PutUint64(b[24:], uint64(h.sizeBytes))
	be.PutUint32(b[36:], uint32(h.l1Entries))
	be.PutUint64(b[40:], uint64(h.l1Offset))
	be.PutUint64(b[48:], uint64(h.refTableOffset))
	be.PutUint32(b[56:], uint32(h.refTableClusters))
	be.PutUint64(b[72:], h.incompatible)
	be.PutUint64(b[80:], h.compatible)
	be.PutUint64(b[88:], h.autoclear)
	be.PutUint32(b[96:], uint32(h.refcountOrder))
	be.PutUint32(b[100:], headerWriteBytes)

	extension := func(typ uint32, data []byte) {
		b = be.AppendUint32(b, typ)
		b = be.AppendUint32(b, uint32(len(data)))
		b = append(b, data...)
		b = append(b, make([]byte, -len(data)&7)...)
	}
	if h.backingFormat != "" {
		extension(extBackingFormat, []byte(h.backingFormat))
	}
	// The smallest clusters have no room for the optional table.
	if h.clusterBytes() >= 4096 {
		var table []byte
		for _, n := range featureNames {
			entry := make([]byte, featureNameBytes)
			entry[0], entry[1] = n.field, n.bit
			copy(entry[2:], n.name)
			table = append(table, entry...)
		}
		extension(extFeatureNames, table)
	}
	extension(extEnd, nil)
	if h.backingFile != "" {
		be.PutUint64(b[8:], uint64(len(b)))
		be.PutUint32(b[16:], uint32(len(h.backingFile)))
		b = append(b, h.backingFile...)
	}
	if int64(len(b)) > h.clusterBytes() {
		return nil, kind.Errorf(kind.Invalid, "a backing file name of %d bytes does not fit the first cluster of %d bytes", len(h.backingFile), h.clusterBytes())
	}
	return b, nil
}
