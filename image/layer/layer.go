// Package layer reads an OCI layer, an uncompressed tar stream, as what it is:
// bytes that anybody may have written.
//
// Reader yields entries whose names stay inside the root, whose sizes fit and
// whose attributes a file system can hold; everything else is an error that names
// the entry. Filter applies the same rules to a tar that somebody else extracts.
// What is let through, dropped and how whiteouts are read follows containerd's
// archive package, so that a converted image shows the same tree.
//
// The package knows the tar format and the rules of OCI layers. It must not know
// file systems, blocks, or where the stream comes from.
package layer

import (
	"math"
	"time"

	"github.com/thaw-project/thaw/kind"
)

// Type is what an entry makes.
type Type uint8

// The types of entries.
const (
	Regular Type = iota
	Directory
	Symlink
	HardLink
	CharDevice
	BlockDevice
	FIFO
)

func (t Type) String() string {
	switch t {
	case Regular:
		return "file"
	case Directory:
		return "directory"
	case Symlink:
		return "symbolic link"
	case HardLink:
		return "hard link"
	case CharDevice:
		return "character device"
	case BlockDevice:
		return "block device"
	case FIFO:
		return "FIFO"
	}
	return "unknown"
}

// Whiteout says whether an entry removes something of the layers below, see
// https://github.com/opencontainers/image-spec/blob/main/layer.md#whiteouts.
type Whiteout uint8

// The kinds of whiteout.
const (
	None   Whiteout = iota
	Hide            // ".wh.NAME": Name is what is hidden, without the prefix
	Opaque          // ".wh..wh..opq": Name is the directory whose lower content is hidden
)

// Xattr is an extended attribute with its full name, such as "user.mime_type".
type Xattr struct {
	Name  string
	Value string
}

// Entry is one checked entry of a layer.
type Entry struct {
	// Name is the path below the root: elements joined by single slashes, none of
	// them empty, "." or "..", none longer than 255 bytes. It is "" for the root.
	// It need not be UTF-8.
	Name string
	Type Type
	// Mode holds the permission, set-id and sticky bits only.
	Mode     uint16
	UID, GID uint32
	// MTime is at or after 1970 and before 2262; what a tar gives outside that is
	// 1970, as containerd makes it.
	MTime time.Time
	// Size is the number of bytes that Read yields; 0 unless Type is Regular.
	Size int64
	// Linkname is the target of a symbolic link, as it is, or the name of a hard
	// link's target, in the form of Name.
	Linkname string
	// Xattrs are sorted by name, each name once.
	Xattrs             []Xattr
	Devmajor, Devminor uint32
	// Sparse is set when the tar stored the file with holes; Read yields zeros
	// for them.
	Sparse   bool
	Whiteout Whiteout
}

// Limits bound what a layer may ask for.
type Limits struct {
	// MaxFileBytes bounds the size of one file; the size of the disk that the
	// layer goes to is a good choice.
	MaxFileBytes int64
	// MaxTotalBytes bounds the sizes of all files together. A sparse file of a
	// few bytes can claim any size, and reading its zeros takes time.
	MaxTotalBytes int64
	// MaxEntries bounds the number of entries, hence the memory of who keeps a
	// tree of them.
	MaxEntries int
	// MaxMetadataBytes bounds names, link targets and extended attributes of all
	// entries together, for the same reason.
	MaxMetadataBytes int64
}

const (
	// maxName and maxPath are the kernel's NAME_MAX and PATH_MAX.
	maxName = 255
	maxPath = 4096
	// maxXattrs bounds the attributes of an entry; real ones have at most a
	// handful (capabilities, two ACLs, a label).
	maxXattrs = 128
	// maxXattrValue is what an EROFS attribute can hold (16 bits); the kernel's
	// own bound is one more.
	maxXattrValue = math.MaxUint16
	// maxXattrBytes bounds the attributes of one entry together. EROFS stores
	// at most 65534 words of four bytes for an inode.
	maxXattrBytes = 192 << 10
	// maxDevmajor and maxDevminor are what the kernel's 32-bit dev_t holds.
	maxDevmajor = 1<<12 - 1
	maxDevminor = 1<<20 - 1
	// maxTrailer bounds what may follow the end of the archive: tars are padded
	// with zeros to a blocking factor, commonly 10 KiB.
	maxTrailer = 64 << 20
)

// DefaultLimits are the limits for a layer that goes to a disk of sizeBytes. The
// number of entries is several times that of the largest images seen.
func DefaultLimits(sizeBytes int64) Limits {
	total := int64(math.MaxInt64)
	if sizeBytes < math.MaxInt64/4 {
		total = 4 * sizeBytes
	}
	return Limits{
		MaxFileBytes:     sizeBytes,
		MaxTotalBytes:    total,
		MaxEntries:       2_000_000,
		MaxMetadataBytes: 256 << 20,
	}
}

// Validate checks that each limit is set.
func (l Limits) Validate() error {
	if l.MaxFileBytes <= 0 || l.MaxTotalBytes <= 0 || l.MaxEntries <= 0 || l.MaxMetadataBytes <= 0 {
		return kind.Errorf(kind.Invalid, "layer limits %+v: each must be positive", l)
	}
	return nil
}
