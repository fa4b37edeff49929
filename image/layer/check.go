package layer

import (
	"archive/tar"
	"math"
	"path"
	"sort"
	"strings"
	"time"

	"github.com/thaw-project/thaw/kind"
)

const (
	whiteoutPrefix     = ".wh."
	whiteoutMetaPrefix = ".wh..wh."
	whiteoutOpaque     = ".wh..wh..opq"

	paxXattr     = "SCHILY.xattr."
	paxGNUSparse = "GNU.sparse."
)

// Check tells whether hdr is an entry that any layer may hold; it returns
// kind.Invalid naming the entry if not. It keeps no count: the limits on all
// entries together are Filter's and Reader's.
func (l Limits) Check(hdr *tar.Header) error {
	_, _, err := l.entry(hdr)
	return err
}

func invalid(hdr *tar.Header, format string, args ...any) error {
	return kind.Errorf(kind.Invalid, "layer entry %.200q: "+format, append([]any{hdr.Name}, args...)...)
}

// cleanName splits nothing and resolves nothing: it drops "." and empty elements
// and refuses what must not be there. what says which name of hdr it is.
func cleanName(hdr *tar.Header, what, name string) (string, error) {
	if strings.IndexByte(name, 0) >= 0 {
		return "", invalid(hdr, "its %s holds a NUL byte; rebuild the layer", what)
	}
	elements := strings.Split(name, "/")
	kept := elements[:0]
	for _, e := range elements {
		switch {
		case e == "" || e == ".":
			continue
		case e == "..":
			return "", invalid(hdr, "its %s has a \"..\" element, which could leave the root; rebuild the layer with plain relative names", what)
		case len(e) > maxName:
			return "", invalid(hdr, "its %s has an element of %d bytes, more than the %d that file systems hold", what, len(e), maxName)
		}
		kept = append(kept, e)
	}
	clean := strings.Join(kept, "/")
	if len(clean) >= maxPath {
		return "", invalid(hdr, "its %s is %d bytes long, more than the %d that Linux allows", what, len(clean), maxPath-1)
	}
	return clean, nil
}

// entry checks hdr and turns it into an Entry. skip is set for what containerd
// leaves out as well.
func (l Limits) entry(hdr *tar.Header) (e *Entry, skip bool, err error) {
	if hdr.Typeflag == tar.TypeXGlobalHeader {
		return nil, true, nil
	}
	if strings.HasPrefix(hdr.Name, "/") {
		return nil, false, invalid(hdr, "its name is absolute; rebuild the layer with relative names")
	}
	e = &Entry{}
	if e.Name, err = cleanName(hdr, "name", hdr.Name); err != nil {
		return nil, false, err
	}

	dir, base := path.Split(e.Name)
	switch {
	case base == whiteoutOpaque:
		e.Whiteout, e.Name = Opaque, strings.TrimSuffix(dir, "/")
	case strings.HasPrefix(base, whiteoutMetaPrefix):
		// AUFS's own bookkeeping (.wh..wh.plnk, .wh..wh.aufs, .wh..wh.orph) has
		// no meaning outside AUFS.
		return nil, true, nil
	case strings.HasPrefix(base, whiteoutPrefix):
		hidden := base[len(whiteoutPrefix):]
		if hidden == "" || hidden == "." || hidden == ".." {
			return nil, false, invalid(hdr, "it is a whiteout of nothing; rebuild the layer")
		}
		e.Whiteout, e.Name = Hide, dir+hidden
	}

	if hdr.Uid < 0 || hdr.Uid >= math.MaxUint32 || hdr.Gid < 0 || hdr.Gid >= math.MaxUint32 {
		return nil, false, invalid(hdr, "its owner %d:%d is outside 0 to %d", hdr.Uid, hdr.Gid, uint32(math.MaxUint32-1))
	}
	e.UID, e.GID = uint32(hdr.Uid), uint32(hdr.Gid)
	e.Mode = uint16(hdr.Mode & 0o7777)
	e.MTime = boundTime(hdr.ModTime)
	if e.Whiteout != None {
		return e, false, nil
	}

	switch hdr.Typeflag {
	case tar.TypeReg, tar.TypeCont, tar.TypeGNUSparse:
		e.Type = Regular
		if hdr.Size < 0 {
			return nil, false, invalid(hdr, "its size %d is negative", hdr.Size)
		}
		if hdr.Size > l.MaxFileBytes {
			return nil, false, invalid(hdr, "it claims %d bytes, more than the %d that fit; choose a larger virtual size if that is true", hdr.Size, l.MaxFileBytes)
		}
		e.Size = hdr.Size
		e.Sparse = hdr.Typeflag == tar.TypeGNUSparse
	case tar.TypeDir:
		e.Type = Directory
	case tar.TypeSymlink:
		e.Type = Symlink
		if hdr.Linkname == "" || len(hdr.Linkname) >= maxPath || strings.IndexByte(hdr.Linkname, 0) >= 0 {
			return nil, false, invalid(hdr, "its symbolic link target of %d bytes is empty, longer than %d or holds a NUL byte", len(hdr.Linkname), maxPath-1)
		}
		e.Linkname = hdr.Linkname
	case tar.TypeLink:
		e.Type = HardLink
		// An absolute target is anchored at the root: cleanName drops the slash.
		if e.Linkname, err = cleanName(hdr, "hard link target", hdr.Linkname); err != nil {
			return nil, false, err
		}
		if e.Linkname == "" {
			return nil, false, invalid(hdr, "it is a hard link to the root directory")
		}
	case tar.TypeChar, tar.TypeBlock:
		e.Type = CharDevice
		if hdr.Typeflag == tar.TypeBlock {
			e.Type = BlockDevice
		}
		if hdr.Devmajor < 0 || hdr.Devmajor > maxDevmajor || hdr.Devminor < 0 || hdr.Devminor > maxDevminor {
			return nil, false, invalid(hdr, "its device number %d:%d is more than Linux holds (%d:%d)", hdr.Devmajor, hdr.Devminor, maxDevmajor, maxDevminor)
		}
		e.Devmajor, e.Devminor = uint32(hdr.Devmajor), uint32(hdr.Devminor)
	case tar.TypeFifo:
		e.Type = FIFO
	default:
		return nil, false, invalid(hdr, "its type %q is not one of OCI layers", hdr.Typeflag)
	}
	if e.Name == "" && e.Type != Directory {
		return nil, false, invalid(hdr, "it makes the root a %s", e.Type)
	}
	if err := e.takeRecords(hdr); err != nil {
		return nil, false, err
	}
	return e, false, nil
}

// takeRecords reads the extended attributes of hdr's PAX records. LIBARCHIVE.xattr
// records are left alone: bsdtar writes each attribute as SCHILY.xattr too, and
// containerd reads only those.
func (e *Entry) takeRecords(hdr *tar.Header) error {
	total := 0
	for key, value := range hdr.PAXRecords {
		if strings.HasPrefix(key, paxGNUSparse) {
			e.Sparse = e.Type == Regular
			continue
		}
		name, ok := strings.CutPrefix(key, paxXattr)
		if !ok || !keepXattr(name, e.Type) {
			continue
		}
		switch {
		case len(name) > maxName || strings.HasSuffix(name, ".") || strings.IndexByte(name, 0) >= 0:
			return invalid(hdr, "its extended attribute name %.300q is not one that Linux takes", name)
		case len(value) > maxXattrValue:
			return invalid(hdr, "its extended attribute %.100q has %d bytes, more than %d", name, len(value), maxXattrValue)
		case len(e.Xattrs) == maxXattrs:
			return invalid(hdr, "it has more than %d extended attributes", maxXattrs)
		}
		if total += len(name) + len(value) + 8; total > maxXattrBytes {
			return invalid(hdr, "its extended attributes take more than %d bytes", maxXattrBytes)
		}
		e.Xattrs = append(e.Xattrs, Xattr{Name: name, Value: value})
	}
	sort.Slice(e.Xattrs, func(i, j int) bool { return e.Xattrs[i].Name < e.Xattrs[j].Name })
	return nil
}

// keepXattr tells whether an extraction keeps the attribute. containerd refuses
// to set trusted.*, which is where overlayfs keeps its own metadata, and ignores
// what the kernel answers with EOPNOTSUPP (unknown name spaces) or, for user.* on
// what is neither file nor directory, EPERM. user.overlay.* is dropped here
// beyond that: it is overlay metadata to a mount with the option userxattr.
func keepXattr(name string, t Type) bool {
	fileOrDir := t == Regular || t == Directory || t == HardLink
	switch {
	case name == "system.posix_acl_access":
		return t != Symlink
	case name == "system.posix_acl_default":
		return t == Directory
	case strings.HasPrefix(name, "user.overlay."):
		return false
	case strings.HasPrefix(name, "user."):
		return fileOrDir
	case strings.HasPrefix(name, "security."):
		return true
	}
	return false
}

var (
	minTime = time.Unix(0, 0)
	maxTime = time.Unix(0, math.MaxInt64)
)

func boundTime(t time.Time) time.Time {
	if t.Before(minTime) || t.After(maxTime) {
		return minTime
	}
	return t
}

// Filter applies the rules of this package to the headers of one layer in order,
// for extractors that read the tar themselves. Not for concurrent use.
type Filter struct {
	limits Limits
	count  counter
}

// NewFilter makes a filter for one layer.
func NewFilter(limits Limits) (*Filter, error) {
	if err := limits.Validate(); err != nil {
		return nil, err
	}
	return &Filter{limits: limits}, nil
}

// Accept checks the next header and tells whether to extract the entry. It
// removes from hdr the extended attributes that an image must not set. It has the
// form of containerd's archive.Filter.
func (f *Filter) Accept(hdr *tar.Header) (bool, error) {
	e, skip, err := f.limits.entry(hdr)
	if err != nil {
		return false, err
	}
	if err := f.count.add(f.limits, hdr, e); err != nil {
		return false, err
	}
	if skip {
		return false, nil
	}
	for key := range hdr.PAXRecords {
		if name, ok := strings.CutPrefix(key, paxXattr); ok && !keepXattr(name, e.Type) {
			delete(hdr.PAXRecords, key)
		}
	}
	return true, nil
}

// counter adds up what Limits bound over a whole layer.
type counter struct {
	entries       int
	bytes         int64
	metadataBytes int64
}

func (c *counter) add(l Limits, hdr *tar.Header, e *Entry) error {
	if c.entries++; c.entries > l.MaxEntries {
		return invalid(hdr, "the layer has more than %d entries", l.MaxEntries)
	}
	if e == nil {
		return nil
	}
	// Both sums stay far below overflow: each step adds at most MaxFileBytes to
	// what is at most MaxTotalBytes.
	if e.Size > l.MaxTotalBytes-c.bytes {
		return invalid(hdr, "the files of the layer claim more than %d bytes; choose a larger virtual size if that is true", l.MaxTotalBytes)
	}
	c.bytes += e.Size
	c.metadataBytes += int64(len(e.Name) + len(e.Linkname))
	for _, x := range e.Xattrs {
		c.metadataBytes += int64(len(x.Name) + len(x.Value))
	}
	if c.metadataBytes > l.MaxMetadataBytes {
		return invalid(hdr, "names and extended attributes of the layer take more than %d bytes", l.MaxMetadataBytes)
	}
	return nil
}
