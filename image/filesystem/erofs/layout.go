package erofs

import (
	"encoding/binary"

	"github.com/thaw-project/thaw/image/layer"
	"github.com/thaw-project/thaw/kind"
)

// metadata lays out a tree's inodes and directories in one region:
//
//	[inodes, each with its xattrs and inline data or chunk map][directory and
//	symbolic link blocks][table of layers]
//
// The children of a directory follow each other, then those of its first
// subdirectory and so on, so that listing a directory and looking at its files
// reads neighbouring blocks. An inode, its xattrs and its inline data never cross
// a block unless the xattrs alone are larger than one.
type metadata struct {
	image  *image // where contents that are shared with layers below lie
	start  int64  // of the region
	next   int64  // where the next inode may go
	placed []placement
	blocks uint32 // of directories and long links, behind the inodes
}

// placement is an inode that has a place, in the order of places.
type placement struct {
	inode  *inode
	parent uint64 // nid of a directory's parent
	// data is the index among the blocks of directories and long links of the
	// first block of this one.
	data  uint32
	shape shape
}

func newMetadata(m *image, start int64) *metadata {
	return &metadata{image: m, start: start, next: start}
}

// shape is the size of an inode's parts in bytes.
type shape struct {
	xattrs uint32
	flat   uint32 // data in blocks behind the inodes
	inline uint32 // data right behind the inode
	chunks uint32 // chunk map
}

func (s shape) bytes() int64 {
	return inodeSize + int64(s.xattrs) + int64(s.inline) + int64(s.chunks)
}

// shapeOf decides where the data of a node goes.
func shapeOf(n *inode) shape {
	s := shape{xattrs: uint32(xattrBytes(n.allXattrs()))}
	// Only files may be larger than 32 bits, and those that are have no inline
	// data; directories and their bound: see maxDirBytes.
	size := uint32(n.size)
	switch n.mode & modeType {
	case modeDir:
		size = uint32(dirBytes(n))
		s.inline = size % blockSize
		s.flat = size - s.inline
	case modeSymlink:
		s.inline = size
	case modeRegular:
		switch n.content.layout {
		case layoutInline:
			s.inline = size
		case layoutChunk:
			s.chunks = 4 * uint32((int64(n.size)+1<<n.content.chunkBits-1)>>n.content.chunkBits)
		}
	}
	if s.inline > 0 && s.bytes() > blockSize {
		// Beside large attributes, or a long symbolic link.
		s.flat, s.inline = size, 0
	}
	return s
}

// allXattrs are the attributes as they go to the disk.
func (n *inode) allXattrs() []layer.Xattr {
	if !n.opaque {
		return n.xattrs
	}
	return append([]layer.Xattr{{Name: opaqueXattr, Value: "y"}}, n.xattrs...)
}

// placeTree gives every inode below n, and n itself, a place.
func (m *metadata) placeTree(n *inode, parent uint64) error {
	if err := m.place(n, parent); err != nil {
		return err
	}
	return m.placeChildren(n, 0)
}

func (m *metadata) placeChildren(dir *inode, depth int) error {
	if depth > maxDepth {
		return kind.Errorf(kind.Invalid, "erofs: directories are nested more than %d deep", maxDepth)
	}
	names := dir.names()
	for _, name := range names {
		if err := m.place(dir.children[name], dir.nid); err != nil {
			return err
		}
	}
	for _, name := range names {
		if c := dir.children[name]; c.isDir() {
			if err := m.placeChildren(c, depth+1); err != nil {
				return err
			}
		}
	}
	return nil
}

func (m *metadata) place(n *inode, parent uint64) error {
	if n.isDir() {
		n.nlink = 2
		for _, c := range n.children {
			if c.isDir() {
				n.nlink++
			}
		}
	} else if n.nlink++; n.nlink > 1 {
		return nil // another name of an inode that has its place
	}
	s := shapeOf(n)
	if n.isDir() && int64(s.flat)+int64(s.inline) > maxDirBytes {
		return kind.Errorf(kind.Invalid, "erofs: a directory of %d entries is too large", len(n.children))
	}
	// What must not cross a block: everything, or, when that is larger than one,
	// the inode proper.
	whole := s.bytes()
	if s.chunks > 0 || whole > blockSize {
		whole = inodeSize
	}
	if m.next%blockSize+whole > blockSize {
		m.next = alignUp(m.next, blockSize)
	}
	n.nid = uint64(m.next) >> nidBits
	m.add(n, parent, s)
	m.next = alignUp(m.next+s.bytes(), 1<<nidBits)
	return nil
}

// add notes a place that has been chosen and gives the node its data blocks.
func (m *metadata) add(n *inode, parent uint64, s shape) {
	p := placement{inode: n, parent: parent, shape: s, data: m.blocks}
	m.blocks += uint32(alignUp(int64(s.flat), blockSize) >> blockBits)
	m.placed = append(m.placed, p)
}

// dataBlock is the address of the first of the blocks behind the inodes.
func (m *metadata) dataBlock() int64 { return alignUp(m.next, blockSize) }

// placeRoot puts the root into its slot behind the superblock. It comes first.
func (m *metadata) placeRoot(root *inode) {
	root.nid, root.nlink = rootNid, 2
	for _, c := range root.children {
		if c.isDir() {
			root.nlink++
		}
	}
	s := shapeOf(root)
	if s.bytes() > blockSize-superOffset-superSize {
		s.flat, s.inline = s.flat+s.inline, 0
	}
	m.add(root, rootNid, s)
}

// write appends the region to s, which must stand at its start. The root inode is
// not part of it.
func (m *metadata) write(s *space) error {
	var buf []byte
	for _, p := range m.placed[1:] {
		if err := s.append(zeros[:int64(p.inode.nid)<<nidBits-s.at]); err != nil {
			return err
		}
		var err error
		if buf, err = m.appendInode(buf[:0], p); err != nil {
			return err
		}
		if err := s.append(buf); err != nil {
			return err
		}
	}
	if err := s.align(); err != nil {
		return err
	}
	for _, p := range m.placed {
		if p.shape.flat == 0 {
			continue
		}
		data, err := m.data(p)
		if err != nil {
			return err
		}
		if err := s.append(data[:p.shape.flat]); err != nil {
			return err
		}
		if err := s.align(); err != nil {
			return err
		}
	}
	return nil
}

// appendInode appends the inode, its xattrs and its inline data or chunk map.
func (m *metadata) appendInode(b []byte, p placement) ([]byte, error) {
	n := p.inode
	xattrs := n.allXattrs()
	d := diskInode{
		mode: n.mode, size: n.size, uid: n.uid, gid: n.gid, mtime: n.mtime, nsec: n.nsec, nlink: n.nlink,
	}
	if len(xattrs) > 0 {
		d.xattrs = uint16((xattrBytes(xattrs)-xattrHeaderSize)/4 + 1)
	}
	data, err := m.data(p)
	if err != nil {
		return nil, err
	}
	switch n.mode & modeType {
	case modeDir, modeSymlink:
		d.size = uint64(len(data))
	case modeRegular:
		d.layout, d.u = n.content.layout, n.content.block
		if d.layout == layoutChunk {
			d.u = uint32(n.content.chunkBits - blockBits)
		}
	case modeChar, modeBlock:
		d.u = n.rdev
	}
	if p.shape.inline > 0 {
		d.layout = layoutInline
	} else if d.layout == layoutInline {
		d.layout = layoutPlain
	}
	if p.shape.flat > 0 {
		d.u = uint32(m.dataBlock()>>blockBits) + p.data
	}
	at := len(b)
	b = append(b, make([]byte, inodeSize)...)
	// i_ino only serves stat on 32-bit systems.
	d.encode(b[at:], uint32(n.nid))
	b = appendXattrs(b, xattrs)
	return append(b, data[p.shape.flat:]...), nil
}

// data returns what a node has behind its inode or in the blocks behind all
// inodes: a directory's entries, a link's target, the data of a small file, or a
// chunk map.
func (m *metadata) data(p placement) ([]byte, error) {
	n := p.inode
	if n.isDir() {
		return m.dirData(p), nil
	}
	c := n.content
	switch {
	case c == nil || c.layout == layoutPlain:
		return nil, nil
	case c.stored != 0:
		b := make([]byte, p.shape.flat+p.shape.inline+p.shape.chunks)
		return b, m.image.readAt(b, c.stored)
	case c.layout == layoutInline:
		return c.tail, nil
	}
	b := make([]byte, 0, 4*len(c.chunks))
	for _, block := range c.chunks {
		b = binary.LittleEndian.AppendUint32(b, block)
	}
	return b, nil
}

// dirNames are the names of a directory as they are on disk, in order: names that
// start with "!" or "-", say, come before ".".
func dirNames(n *inode) []string {
	names := n.names()
	out := make([]string, 0, len(names)+2)
	dots := []string{".", ".."}
	for _, name := range names {
		for len(dots) > 0 && dots[0] < name {
			out, dots = append(out, dots[0]), dots[1:]
		}
		out = append(out, name)
	}
	return append(out, dots...)
}

// packDir calls each for every block of a directory with the names in it, and
// returns the size of the directory: every block but the last counts whole.
func packDir(names []string, each func(names []string, last bool)) int64 {
	size, used, first := int64(0), 0, 0
	for i, name := range names {
		need := direntSize + len(name)
		if used+need > blockSize {
			if each != nil {
				each(names[first:i], false)
			}
			size += blockSize
			used, first = 0, i
		}
		used += need
	}
	if each != nil {
		each(names[first:], true)
	}
	return size + int64(used)
}

func dirBytes(n *inode) int64 { return packDir(dirNames(n), nil) }

// dirData encodes a directory.
func (m *metadata) dirData(p placement) []byte {
	n := p.inode
	var out []byte
	packDir(dirNames(n), func(names []string, last bool) {
		start := len(out)
		nameAt := direntSize * len(names)
		for _, name := range names {
			nid, mode := p.parent, uint16(modeDir)
			switch name {
			case ".":
				nid = n.nid
			case "..":
			default:
				nid, mode = n.children[name].nid, n.children[name].mode
			}
			out = binary.LittleEndian.AppendUint64(out, nid)
			out = binary.LittleEndian.AppendUint16(out, uint16(nameAt))
			out = append(out, direntType(mode), 0)
			nameAt += len(name)
		}
		for _, name := range names {
			out = append(out, name...)
		}
		for !last && len(out)-start < blockSize {
			out = append(out, 0)
		}
	})
	return out
}
