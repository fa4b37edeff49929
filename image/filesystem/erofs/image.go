package erofs

import (
	"encoding/binary"
	"fmt"
	"io"
	"strings"

	"github.com/thaw-project/thaw/image/layer"
	"github.com/thaw-project/thaw/kind"
)

const (
	// maxNodes bounds the inodes that one tree may have in memory; twice what a
	// layer may bring, as a merged tree has many.
	maxNodes = 4_000_000
	// maxDirBytes bounds a directory: 2 million entries of short names.
	maxDirBytes = 64 << 20
	// maxDepth bounds recursion. A path of 4095 bytes has at most 2048 elements.
	maxDepth = 2048
	// maxFileBytes is what 32-bit block addresses can span.
	maxFileBytes = 1 << (32 + blockBits)
)

// image reads the EROFS in a block. Its bytes are not trusted: everything read is
// checked against the used part, and each method does bounded work.
type image struct {
	r     io.ReaderAt
	super *superblock
	table *table
}

// openImage reads block 0 and the table of layers.
func openImage(r io.ReaderAt) (*image, error) {
	m := &image{r: r}
	block := make([]byte, blockSize)
	if err := m.readAt(block, 0); err != nil {
		return nil, err
	}
	var err error
	if m.super, err = decodeSuperblock(block); err != nil {
		return nil, err
	}
	if m.table, err = m.readTable(); err != nil {
		return nil, err
	}
	return m, nil
}

func (m *image) sizeBytes() int64 { return int64(m.super.blocks) << blockBits }

func (m *image) readAt(p []byte, at int64) error {
	n, err := m.r.ReadAt(p, at)
	if n == len(p) {
		return nil
	}
	if err == io.EOF {
		return kind.Errorf(kind.Corrupt, "erofs: the block ends at %d, inside what its superblock says is used", at+int64(n))
	}
	return fmt.Errorf("erofs: read %d bytes at %d: %w", len(p), at, err)
}

// inside checks that a range lies in the used part.
func (m *image) inside(at, length int64) bool {
	return at >= 0 && length >= 0 && at <= m.sizeBytes() && length <= m.sizeBytes()-at
}

// rawInode is an inode as it is on disk, checked so that its parts lie inside the
// image.
type rawInode struct {
	diskInode
	at      int64 // byte offset of the inode
	dataAt  int64 // of inline data, or of the chunk map
	dataLen int64 // of the same
}

func (m *image) inode(nid uint64) (*rawInode, error) {
	corrupt := func(format string, args ...any) error {
		return kind.Errorf(kind.Corrupt, "erofs: inode %d: %w", nid, fmt.Errorf(format, args...))
	}
	if nid >= maxFileBytes>>nidBits || !m.inside(int64(nid)<<nidBits, inodeSize) {
		return nil, corrupt("outside the %d blocks in use", m.super.blocks)
	}
	in := &rawInode{at: int64(nid) << nidBits}
	var b [inodeSize]byte
	if err := m.readAt(b[:], in.at); err != nil {
		return nil, err
	}
	if err := in.decode(b[:]); err != nil {
		return nil, corrupt("%w", err)
	}
	if direntType(in.mode) == 0 {
		return nil, corrupt("mode %#o", in.mode)
	}
	if in.size > maxFileBytes {
		return nil, corrupt("size %d", in.size)
	}
	size := int64(in.size)
	in.dataAt = in.at + inodeSize + int64(xattrSize(in.xattrs))
	if !m.inside(in.at, in.dataAt-in.at) {
		return nil, corrupt("its extended attributes leave the image")
	}
	if t := in.mode & modeType; t != modeRegular && t != modeDir && t != modeSymlink {
		return in, nil
	}
	blocks := size >> blockBits
	switch in.layout {
	case layoutPlain:
		blocks = alignUp(size, blockSize) >> blockBits
	case layoutInline:
		in.dataLen = size & (blockSize - 1)
		if blocks > 0 && in.mode&modeType == modeRegular {
			return nil, corrupt("inline data of %d bytes", size) // Thaw writes small files so, whole
		}
		if in.at>>blockBits != in.dataAt>>blockBits || in.dataAt&(blockSize-1)+in.dataLen > blockSize {
			return nil, corrupt("its inline data crosses a block")
		}
	case layoutChunk:
		bits := uint8(in.u&0x1f) + blockBits
		if in.u&^0x1f != 0 || bits > maxChunkBits || in.mode&modeType != modeRegular {
			return nil, corrupt("chunk format %#x", in.u)
		}
		blocks = 0
		in.dataLen = 4 * ((size + 1<<bits - 1) >> bits)
	default:
		return nil, corrupt("data layout %d", in.layout)
	}
	if !m.inside(in.dataAt, in.dataLen) || blocks > 0 && !m.inside(int64(in.u)<<blockBits, blocks<<blockBits) {
		return nil, corrupt("its data leaves the image")
	}
	return in, nil
}

func (m *image) xattrs(in *rawInode) ([]layer.Xattr, error) {
	if in.xattrs == 0 {
		return nil, nil
	}
	b := make([]byte, xattrSize(in.xattrs))
	if err := m.readAt(b, in.at+inodeSize); err != nil {
		return nil, err
	}
	xattrs, err := decodeXattrs(b)
	if err != nil {
		return nil, fmt.Errorf("erofs: inode at %d: %w", in.at, err)
	}
	return xattrs, nil
}

// chunkMap reads and checks the map of a chunked file.
func (m *image) chunkMap(in *rawInode) ([]uint32, error) {
	if in.dataLen > 4*maxMapEntries {
		return nil, kind.Errorf(kind.Corrupt, "erofs: inode at %d: a chunk map of %d bytes", in.at, in.dataLen)
	}
	b := make([]byte, in.dataLen)
	if err := m.readAt(b, in.dataAt); err != nil {
		return nil, err
	}
	bits := uint8(in.u&0x1f) + blockBits
	chunks := make([]uint32, len(b)/4)
	for i := range chunks {
		chunks[i] = binary.LittleEndian.Uint32(b[4*i:])
		n := min(int64(in.size)-int64(i)<<bits, 1<<bits)
		if chunks[i] != chunkHole && !m.inside(int64(chunks[i])<<blockBits, alignUp(n, blockSize)) {
			return nil, kind.Errorf(kind.Corrupt, "erofs: inode at %d: chunk %d leaves the image", in.at, i)
		}
	}
	return chunks, nil
}

// readData reads all data of a directory or symbolic link of at most limit bytes.
func (m *image) readData(in *rawInode, limit int64) ([]byte, error) {
	size := int64(in.size)
	if size > limit || in.layout == layoutChunk {
		return nil, kind.Errorf(kind.Corrupt, "erofs: inode at %d: %d bytes of layout %d", in.at, size, in.layout)
	}
	// size is inside the image, so memory is bounded by what exists on disk.
	b := make([]byte, size)
	flat := size - in.dataLen
	if err := m.readAt(b[:flat], int64(in.u)<<blockBits); err != nil {
		return nil, err
	}
	return b, m.readAt(b[flat:], in.dataAt)
}

// dirent is an entry of a directory; "." and ".." are left out.
type dirent struct {
	name string
	nid  uint64
	kind uint8
}

// readDir reads a directory. Each of its blocks holds dirents (nid u64, nameoff
// u16, file_type u8, reserved u8) and, behind them, their names; names ascend.
func (m *image) readDir(in *rawInode) ([]dirent, error) {
	corrupt := func(why string) error {
		return kind.Errorf(kind.Corrupt, "erofs: directory at %d: %s", in.at, why)
	}
	if in.mode&modeType != modeDir {
		return nil, corrupt("it is none")
	}
	data, err := m.readData(in, maxDirBytes)
	if err != nil {
		return nil, err
	}
	var entries []dirent
	last := ""
	le := binary.LittleEndian
	for ; len(data) > 0; data = data[min(blockSize, len(data)):] {
		b := data[:min(blockSize, len(data))]
		if len(b) < direntSize {
			return nil, corrupt("a block shorter than an entry")
		}
		first := int(le.Uint16(b[8:]))
		if first < direntSize || first%direntSize != 0 || first >= len(b) {
			return nil, corrupt("the first name's offset is bad")
		}
		for at := 0; at < first; at += direntSize {
			start, end := int(le.Uint16(b[at+8:])), len(b)
			if at+direntSize < first {
				end = int(le.Uint16(b[at+direntSize+8:]))
			}
			if start < first || end <= start || end > len(b) {
				return nil, corrupt("a name leaves its block")
			}
			name := string(b[start:end])
			if at+direntSize == first {
				// Only the last name of a block may be padded.
				name = strings.TrimRight(name, "\x00")
			}
			if name == "" || len(name) > maxNameLen || strings.ContainsAny(name, "/\x00") {
				return nil, corrupt("a name is empty, too long or not a name")
			}
			if name <= last {
				return nil, corrupt("names are not in order")
			}
			last = name
			if name != "." && name != ".." {
				entries = append(entries, dirent{name: name, nid: le.Uint64(b[at:]), kind: b[at+10]})
			}
		}
	}
	return entries, nil
}

// loader makes tree nodes out of an image, each when it is first asked for.
type loader struct {
	image *image
	// nodes holds each inode met, so that hard links share one node.
	nodes map[uint64]*inode
}

func newLoader(m *image) *loader {
	cached := *m
	cached.r = newPageCache(m.r)
	return &loader{image: &cached, nodes: make(map[uint64]*inode)}
}

// stub returns the node of an inode that is not read yet. A directory may be met
// once only, which keeps what is made of an image a tree.
func (l *loader) stub(d dirent) (*inode, error) {
	if n := l.nodes[d.nid]; n != nil {
		if d.kind == direntType(modeDir) || n.mode&modeType == modeDir {
			return nil, kind.Errorf(kind.Corrupt, "erofs: directory %d is in two places", d.nid)
		}
		return n, nil
	}
	if len(l.nodes) == maxNodes {
		return nil, kind.Errorf(kind.Invalid, "erofs: more than %d inodes", maxNodes)
	}
	n := &inode{nid: d.nid, lazy: l}
	if d.kind == direntType(modeDir) {
		n.mode = modeDir
	}
	l.nodes[d.nid] = n
	return n, nil
}

// root returns the root directory.
func (l *loader) root() (*inode, error) {
	n, err := l.stub(dirent{nid: rootNid, kind: direntType(modeDir)})
	if err != nil {
		return nil, err
	}
	if err := n.load(); err != nil {
		return nil, err
	}
	if !n.isDir() {
		return nil, kind.Errorf(kind.Corrupt, "erofs: the root is no directory")
	}
	return n, nil
}

// load reads a stub's inode. The children of a directory become stubs.
func (n *inode) load() error {
	l := n.lazy
	if l == nil {
		return nil
	}
	in, err := l.image.inode(n.nid)
	if err != nil {
		return err
	}
	if (n.mode == modeDir) != (in.mode&modeType == modeDir) {
		return kind.Errorf(kind.Corrupt, "erofs: inode %d: a directory in one place and not in another", n.nid)
	}
	n.mode, n.uid, n.gid, n.mtime, n.nsec, n.size = in.mode, in.uid, in.gid, in.mtime, in.nsec, in.size
	xattrs, err := l.image.xattrs(in)
	if err != nil {
		return err
	}
	for _, x := range xattrs {
		if x.Name == opaqueXattr {
			n.opaque = x.Value == "y"
			continue
		}
		n.xattrs = append(n.xattrs, x)
	}
	switch in.mode & modeType {
	case modeDir:
		entries, err := l.image.readDir(in)
		if err != nil {
			return err
		}
		n.size = 0
		n.children = make(map[string]*inode, len(entries))
		for _, d := range entries {
			if n.children[d.name], err = l.stub(d); err != nil {
				return err
			}
		}
	case modeSymlink:
		target, err := l.image.readData(in, blockSize)
		if err != nil {
			return err
		}
		if len(target) == 0 || strings.IndexByte(string(target), 0) >= 0 {
			return kind.Errorf(kind.Corrupt, "erofs: inode %d: a symbolic link of %d bytes", n.nid, len(target))
		}
		n.content = &content{layout: layoutInline, tail: target}
	case modeRegular:
		n.content = &content{layout: in.layout}
		if in.size == 0 {
			n.content.layout = layoutPlain
			break
		}
		switch in.layout {
		case layoutChunk:
			if _, err := l.image.chunkMap(in); err != nil {
				return err
			}
			n.content.chunkBits = uint8(in.u&0x1f) + blockBits
			n.content.stored = in.dataAt
		case layoutInline:
			n.content.stored = in.dataAt
		default:
			n.content.block = in.u
		}
	case modeChar, modeBlock:
		n.rdev = in.u
	}
	n.lazy = nil
	return nil
}

// loadAll loads the whole tree below n.
func (n *inode) loadAll(depth int) error {
	if depth > maxDepth {
		return kind.Errorf(kind.Corrupt, "erofs: directories are nested more than %d deep", maxDepth)
	}
	if err := n.load(); err != nil {
		return err
	}
	// The order is that of the map; loading is the same in any.
	for _, c := range n.children {
		if err := c.loadAll(depth + 1); err != nil {
			return err
		}
	}
	return nil
}
