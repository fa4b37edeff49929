package erofs

import (
	"context"
	"io"
	"path"
	"strings"

	"github.com/thaw-project/thaw/image/layer"
	"github.com/thaw-project/thaw/kind"
)

// applier makes the tree of one layer out of its tar, in overlayfs's own form:
// what containerd's overlayfs snapshotter would find in the upper directory after
// unpacking. docs/erofs-layout.md lists where the two may differ.
type applier struct {
	top *inode
	// below are the roots of the layers below, the topmost first. In mode
	// overlaybd it is one, the merged tree.
	below view
	files *fileWriter

	// dirTimes are the times of directory entries in order; see setDirTimes.
	dirTimes []dirTime

	// dirPath and dir remember the parent of the entry before, as most entries
	// have the same one. Forgotten when anything is removed.
	dirPath string
	dir     *inode
}

type dirTime struct {
	name  string
	mtime uint64
	nsec  uint32
}

func newApplier(below view, files *fileWriter) *applier {
	return &applier{top: newDir(0o755), below: below, files: files}
}

// upper is the layer's own tree.
func (a *applier) upper() view { return view{a.top} }

// base tells the lowest layer, where a whiteout has nothing to hide and containerd
// unpacks without overlayfs's marks.
func (a *applier) base() bool { return len(a.below) == 0 }

// run applies all entries of the layer.
func (a *applier) run(ctx context.Context, r *layer.Reader) error {
	for {
		if err := ctx.Err(); err != nil {
			return kind.Errorf(kind.Canceled, "erofs: apply layer: %w", err)
		}
		e, err := r.Next()
		if err == io.EOF {
			return a.setDirTimes()
		}
		if err != nil {
			return err
		}
		if err := a.entry(ctx, r, e); err != nil {
			return err
		}
	}
}

// setDirTimes gives the time of each directory entry to what its name leads to at
// the end of the layer. containerd does so because files made in a directory
// change its time; as there, a file that replaced the directory gets it too.
func (a *applier) setDirTimes() error {
	for _, d := range a.dirTimes {
		n, s, err := a.upper().find(d.name)
		if err != nil {
			return err
		}
		if s == found && n.isSymlink() || s == blocked {
			resolved, err := a.upper().resolve(d.name)
			if err != nil {
				continue // no longer leads anywhere
			}
			if n, s, err = a.upper().find(resolved); err != nil {
				return err
			}
		}
		if s == found {
			n.mtime, n.nsec = d.mtime, d.nsec
		}
	}
	return nil
}

// entry applies one entry. Errors name it: those of the stream do already.
func (a *applier) entry(ctx context.Context, r io.Reader, e *layer.Entry) error {
	if e.Whiteout == layer.Opaque {
		dir, err := a.parent(e.Name)
		if err == nil && !a.base() {
			dir.opaque = true
		}
		return nameEntry(e, err)
	}
	if e.Name == "" {
		return nil // containerd leaves the root as the snapshotter made it
	}
	dirName, base := splitName(e.Name)
	dir, err := a.parent(dirName)
	if err != nil {
		return nameEntry(e, err)
	}
	switch old := dir.children[base]; {
	case e.Whiteout == layer.Hide:
		a.hide(dir, base, e)
	case e.Type == layer.Directory && old != nil && old.isDir():
		err = old.setAttributes(e)
	case e.Type == layer.HardLink:
		err = a.link(dir, base, e)
	case e.Type == layer.Regular:
		n := &inode{mode: modeRegular, size: uint64(e.Size)}
		if n.content, err = a.files.write(ctx, r, e); err != nil {
			return err
		}
		err = a.put(dir, base, n, e)
	default:
		err = a.put(dir, base, newNode(e), e)
	}
	if err == nil && e.Type == layer.Directory && e.Whiteout == layer.None {
		a.dirTimes = append(a.dirTimes, dirTime{e.Name, uint64(e.MTime.Unix()), uint32(e.MTime.Nanosecond())})
	}
	return nameEntry(e, err)
}

func nameEntry(e *layer.Entry, err error) error {
	if err == nil {
		return nil
	}
	k := kind.Of(err)
	if k == "" {
		k = kind.IO
	}
	return kind.Errorf(k, "layer entry %.200q: %w", e.Name, err)
}

// splitName splits a name into directory and last element. The element is a copy:
// trees keep it, and should not keep the whole name with it.
func splitName(name string) (dir, base string) {
	dir, base = path.Split(name)
	return strings.TrimSuffix(dir, "/"), strings.Clone(base)
}

// hide applies a whiteout. What the same layer had under the name before goes as
// well: of two entries for one name the later one counts.
func (a *applier) hide(dir *inode, base string, e *layer.Entry) {
	a.remove(dir, base)
	if !a.base() {
		n := &inode{mode: modeChar, uid: e.UID, gid: e.GID}
		n.setTime(e)
		dir.children[base] = n
	}
}

func (a *applier) remove(dir *inode, base string) {
	if dir.children[base] != nil {
		delete(dir.children, base)
		a.dir = nil
	}
}

func (n *inode) setTime(e *layer.Entry) {
	n.mtime, n.nsec = uint64(e.MTime.Unix()), uint32(e.MTime.Nanosecond())
}

// put makes n, with the entry's attributes, what dir has under base.
func (a *applier) put(dir *inode, base string, n *inode, e *layer.Entry) error {
	a.remove(dir, base)
	n.inheritACL(dir)
	if err := n.setAttributes(e); err != nil {
		return err
	}
	dir.children[base] = n
	return nil
}

// newNode makes the node of an entry that has no data of its own.
func newNode(e *layer.Entry) *inode {
	switch e.Type {
	case layer.Symlink:
		return &inode{
			mode: modeSymlink | 0o777, size: uint64(len(e.Linkname)),
			content: &content{layout: layoutInline, tail: []byte(e.Linkname)},
		}
	case layer.CharDevice:
		return &inode{mode: modeChar, rdev: encodeDev(e.Devmajor, e.Devminor)}
	case layer.BlockDevice:
		return &inode{mode: modeBlock, rdev: encodeDev(e.Devmajor, e.Devminor)}
	case layer.FIFO:
		return &inode{mode: modeFIFO}
	}
	return newDir(0)
}

// keeps tells whether the kernel lets a node of this type have the attribute; the
// layer's own check cannot know what a hard link leads to.
func (n *inode) keeps(name string) bool {
	switch n.mode & modeType {
	case modeRegular, modeDir:
		return true
	case modeSymlink:
		return strings.HasPrefix(name, "security.")
	}
	return !strings.HasPrefix(name, "user.")
}

// setAttributes does what chown, setxattr, chmod and utimensat with the entry's
// values would do, in this order.
func (n *inode) setAttributes(e *layer.Entry) error {
	n.uid, n.gid = e.UID, e.GID
	for _, x := range e.Xattrs {
		if !n.keeps(x.Name) {
			continue
		}
		if x.Name == aclAccess || x.Name == aclDefault {
			if err := checkACL(x.Value); err != nil {
				return err
			}
		}
		n.setXattr(x)
	}
	if words := (xattrBytes(n.xattrs) - xattrHeaderSize) / 4; words > maxXattrWords {
		return kind.Errorf(kind.Invalid, "its extended attributes take more than %d bytes", maxXattrWords*4)
	}
	if !n.isSymlink() {
		n.mode = n.mode&modeType | e.Mode
		n.settleACL()
	}
	n.setTime(e)
	return nil
}

// link makes a hard link. Its attributes go to the inode that is linked, as
// containerd sets them through the new name.
func (a *applier) link(dir *inode, base string, e *layer.Entry) error {
	dirName, targetBase := splitName(e.Linkname)
	resolved, err := a.upper().resolve(dirName)
	if err != nil {
		return err
	}
	targetDir, _, err := a.upper().find(resolved)
	if err != nil {
		return err
	}
	var target *inode
	if targetDir != nil && targetDir.isDir() {
		target = targetDir.children[targetBase]
	}
	if targetDir == dir && targetBase == base {
		return kind.Errorf(kind.Invalid, "it is a hard link to itself; rebuild the layer")
	}
	if target == nil || target.isWhiteout() {
		if target, err = a.copyUp(dirName, targetBase); err != nil {
			return err
		}
		if target == nil {
			return kind.Errorf(kind.Invalid, "its hard link target %.200q does not exist; rebuild the layer", e.Linkname)
		}
	}
	if target.isDir() {
		return kind.Errorf(kind.Invalid, "its hard link target %.200q is a directory", e.Linkname)
	}
	a.remove(dir, base)
	// A change of owner takes file capabilities away.
	target.removeXattr("security.capability")
	if err := target.setAttributes(e); err != nil {
		return err
	}
	dir.children[base] = target
	return nil
}

// copyUp brings a file of the layers below into this one and returns it, or nil
// when there is none. Its data is shared, not copied.
func (a *applier) copyUp(dirName, base string) (*inode, error) {
	all := append(a.upper(), a.below...)
	resolved, err := all.resolve(dirName)
	if err != nil {
		return nil, err
	}
	lower, s, err := all.find(path.Join(resolved, base))
	if err != nil || s != found || lower.isDir() {
		return lower, err
	}
	dir, err := a.parent(strings.TrimPrefix(resolved, "/"))
	if err != nil {
		return nil, err
	}
	if up := dir.children[base]; up != nil {
		// Another name for what this layer has itself.
		return up, nil
	}
	n := *lower
	n.nid, n.nlink, n.origin = 0, 0, lower
	dir.children[base] = &n
	return &n, nil
}

// parent returns the directory of this layer's tree at name, following this
// layer's symbolic links and making what is missing.
func (a *applier) parent(name string) (*inode, error) {
	if a.dir != nil && a.dirPath == name {
		return a.dir, nil
	}
	n, s, err := a.upper().find(name)
	if err != nil {
		return nil, err
	}
	// In the common case every element is a directory.
	if s != found || !n.isDir() {
		resolved, err := a.upper().resolve(name)
		if err != nil {
			return nil, err
		}
		if n, err = a.makeAll(resolved); err != nil {
			return nil, err
		}
	}
	a.dir, a.dirPath = n, name
	return n, nil
}

// makeAll makes the directories of a path without symbolic links that the tar has
// no entries for.
func (a *applier) makeAll(p string) (*inode, error) {
	n := a.top
	for at := 0; at < len(p); {
		if p[at] == '/' {
			at++
			continue
		}
		end := at + strings.IndexByte(p[at:]+"/", '/')
		name := p[at:end]
		if len(name) > maxNameLen {
			return nil, kind.Errorf(kind.Invalid, "path element %.100q... is longer than %d bytes", name, maxNameLen)
		}
		c := n.children[name]
		switch {
		case c == nil:
			var err error
			if c, err = a.implied(n, p[:end]); err != nil {
				return nil, err
			}
			n.children[strings.Clone(name)] = c
		case c.isWhiteout():
			// Removed and, without an entry of its own, made again: nothing of
			// the directory below may show.
			var err error
			if c, err = a.implied(n, p[:end]); err != nil {
				return nil, err
			}
			c.opaque = true
			n.children[name] = c
		case !c.isDir():
			return nil, kind.Errorf(kind.Invalid, "%.200q is not a directory in this layer, so nothing can be in it; rebuild the layer", p[:end])
		}
		n, at = c, end
	}
	return n, nil
}

// implied makes a directory that the tar implies but does not describe: it gets
// the attributes of the topmost layer below that has a directory there.
func (a *applier) implied(parent *inode, p string) (*inode, error) {
	n := newDir(0o755)
	n.inheritACL(parent)
	n.settleACL()
	if parent.mode&0o2000 != 0 {
		n.gid = parent.gid
	}
	for _, root := range a.below {
		lower := view{root}
		resolved, err := lower.resolve(p)
		if kind.Of(err) == kind.Invalid {
			break // it leads through a file: containerd would give up here
		}
		if err != nil {
			return nil, err
		}
		dir, s, err := lower.find(resolved)
		if err != nil {
			return nil, err
		}
		if s == missing {
			continue
		}
		if s == found && dir.isDir() {
			n.copyDir(dir)
		}
		break
	}
	return n, nil
}

func (n *inode) copyDir(from *inode) {
	n.uid, n.gid, n.mode = from.uid, from.gid, from.mode
	n.mtime, n.nsec = from.mtime, from.nsec
	for _, x := range from.xattrs {
		if _, ok := n.xattr(x.Name); !ok && !strings.HasPrefix(x.Name, "trusted.") {
			n.setXattr(x)
		}
	}
}

// merge applies the tree of a layer to the merged tree of those below, as
// overlayfs would show the two.
func merge(lower, upper *inode) {
	for name, u := range upper.children {
		l := lower.children[name]
		switch {
		case u.isWhiteout():
			delete(lower.children, name)
		case u.isDir() && l != nil && l.isDir() && !u.opaque:
			l.takeAttributes(u)
			merge(l, u)
		case u.origin != nil:
			// A hard link across layers is a real one in a merged tree.
			u.origin.takeAttributes(u)
			lower.children[name] = u.origin
		default:
			u.dropMarks()
			lower.children[name] = u
		}
	}
}

func (n *inode) takeAttributes(from *inode) {
	n.mode, n.uid, n.gid, n.mtime, n.nsec, n.xattrs = from.mode, from.uid, from.gid, from.mtime, from.nsec, from.xattrs
}

// dropMarks removes overlayfs's marks from a tree that has nothing below it.
func (n *inode) dropMarks() {
	n.opaque = false
	for name, c := range n.children {
		switch {
		case c.isWhiteout():
			delete(n.children, name)
		case c.origin != nil:
			c.origin.takeAttributes(c)
			n.children[name] = c.origin
		default:
			c.dropMarks()
		}
	}
}
