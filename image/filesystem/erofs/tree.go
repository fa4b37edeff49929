package erofs

import (
	"path"
	"sort"
	"strings"

	"github.com/thaw-project/thaw/image/layer"
	"github.com/thaw-project/thaw/kind"
)

// opaqueXattr is overlayfs's mark of a directory that hides what is below it. In
// memory it is inode.opaque.
const opaqueXattr = "trusted.overlay.opaque"

// inode is a node of a tree in memory, shared by the names that are hard links of
// each other.
type inode struct {
	mode    uint16 // type and permissions
	opaque  bool   // directories: what lower layers have here is hidden
	nsec    uint32
	uid     uint32
	gid     uint32
	rdev    uint32 // in the kernel's new_encode_dev form
	nlink   uint32 // counted when the tree is laid out
	mtime   uint64
	size    uint64
	nid     uint64 // where the inode lies on disk; 0 while it has no place
	xattrs  []layer.Xattr
	content *content // regular files and symbolic links
	// children by name, directories only. A child that lies on disk may be a
	// stub: see load.
	children map[string]*inode
	// lazy is set while only nid and, for a directory, mode are known.
	lazy *loader
	// origin is the inode of the merged layers below that this one was copied up
	// from.
	origin *inode
}

func newDir(mode uint16) *inode {
	return &inode{mode: modeDir | mode, children: make(map[string]*inode)}
}

func (n *inode) isDir() bool { return n.mode&modeType == modeDir }

func (n *inode) isSymlink() bool { return n.mode&modeType == modeSymlink }

// isWhiteout tells overlayfs's form of a deletion, a character device 0:0.
func (n *inode) isWhiteout() bool { return n.mode&modeType == modeChar && n.rdev == 0 }

// target is that of a symbolic link.
func (n *inode) target() string { return string(n.content.tail) }

// child returns the loaded child of a directory, or nil.
func (n *inode) child(name string) (*inode, error) {
	c := n.children[name]
	if c == nil {
		return nil, nil
	}
	return c, c.load()
}

// names returns the names of a directory's children in the order of bytes.
func (n *inode) names() []string {
	names := make([]string, 0, len(n.children))
	for name := range n.children {
		names = append(names, name)
	}
	sort.Strings(names)
	return names
}

// setXattr sets or replaces an attribute; the list stays sorted.
func (n *inode) setXattr(x layer.Xattr) {
	i := sort.Search(len(n.xattrs), func(i int) bool { return n.xattrs[i].Name >= x.Name })
	if i < len(n.xattrs) && n.xattrs[i].Name == x.Name {
		// The list may be shared with the inode it was copied from.
		n.xattrs = append([]layer.Xattr(nil), n.xattrs...)
		n.xattrs[i] = x
		return
	}
	xattrs := make([]layer.Xattr, 0, len(n.xattrs)+1)
	xattrs = append(append(append(xattrs, n.xattrs[:i]...), x), n.xattrs[i:]...)
	n.xattrs = xattrs
}

func (n *inode) removeXattr(name string) {
	for i, x := range n.xattrs {
		if x.Name == name {
			n.xattrs = append(append([]layer.Xattr(nil), n.xattrs[:i]...), n.xattrs[i+1:]...)
			return
		}
	}
}

func (n *inode) xattr(name string) (string, bool) {
	for _, x := range n.xattrs {
		if x.Name == name {
			return x.Value, true
		}
	}
	return "", false
}

// state is what a path leads to.
type state uint8

const (
	found   state = iota
	missing       // nothing there
	hidden        // a whiteout there or on the way
	blocked       // an element before the last is not a directory
)

// view is one directory as overlayfs shows it: the directories it is made of, the
// topmost first. One directory alone is a view too.
type view []*inode

// step goes to name in a view. What it leads to is the first of the view returned,
// if it was found.
func (v view) step(name string) (view, state, error) {
	if err := v[0].load(); err != nil {
		return nil, missing, err
	}
	if !v[0].isDir() {
		return v, blocked, nil
	}
	if len(v) == 1 {
		c, err := v[0].child(name)
		switch {
		case err != nil || c == nil:
			return nil, missing, err
		case c.isWhiteout():
			return nil, hidden, nil
		}
		return view{c}, found, nil
	}
	var below view
	for _, dir := range v {
		c, err := dir.child(name)
		if err != nil {
			return nil, missing, err
		}
		if c == nil {
			continue
		}
		if c.isWhiteout() && len(below) == 0 {
			return nil, hidden, nil
		}
		if c.isWhiteout() || !c.isDir() && len(below) > 0 {
			break
		}
		below = append(below, c)
		if !c.isDir() || c.opaque {
			break
		}
	}
	if len(below) == 0 {
		return nil, missing, nil
	}
	return below, found, nil
}

// walk follows the elements of a path, but no symbolic links. With blocked it
// returns what is in the way.
func (v view) walk(p string) (view, state, error) {
	for p = strings.Trim(p, "/"); p != ""; {
		var element string
		element, p, _ = strings.Cut(p, "/")
		next, s, err := v.step(element)
		if err != nil || s != found {
			return next, s, err
		}
		v = next
	}
	return v, found, nil
}

// find is walk for who needs the topmost inode only.
func (v view) find(p string) (*inode, state, error) {
	v, s, err := v.walk(p)
	if err != nil || s != found {
		return nil, s, err
	}
	return v[0], found, v[0].load()
}

// maxLinks bounds the symbolic links followed in one path, as containerd does.
const maxLinks = 255

// maxResolved bounds a path whose symbolic links are resolved: PATH_MAX.
const maxResolved = 4096

// resolve returns p without symbolic links; what does not exist is taken as it is.
// Links never lead out of the view: an absolute target starts at it, and ".." at
// its top stays there. It follows continuity's fs.RootPath, which containerd uses,
// to the point of treating ".." lexically and of going over the whole path again
// when a link was in it.
func (v view) resolve(p string) (string, error) {
	for links := 0; ; {
		at, followed := "/", false
		cur, s := v, found
		for _, element := range strings.Split(p, "/") {
			if element == "" {
				continue
			}
			next := path.Join(at, element)
			if len(next) >= maxResolved {
				return "", kind.Errorf(kind.Invalid, "path %.100q... is longer than %d bytes once symbolic links are followed", next, maxResolved-1)
			}
			if s != found {
				at = next
				continue
			}
			var err error
			if cur, s, err = cur.step(element); err != nil {
				return "", err
			}
			if s == blocked {
				return "", kind.Errorf(kind.Invalid, "path %.200q leads through something that is not a directory", next)
			}
			if s != found {
				at = next
				continue
			}
			if err := cur[0].load(); err != nil {
				return "", err
			}
			if !cur[0].isSymlink() {
				at = next
				continue
			}
			if links++; links > maxLinks {
				return "", kind.Errorf(kind.Invalid, "path %.200q leads through more than %d symbolic links", next, maxLinks)
			}
			followed = true
			if target := cur[0].target(); strings.HasPrefix(target, "/") {
				at = path.Clean(target)
			} else {
				at = path.Join(at, target)
			}
			// The target may have links in it: they are for the next round.
			if cur, s, err = v.walk(at); err != nil {
				return "", err
			}
			if s == blocked {
				if !cur[0].isSymlink() {
					return "", kind.Errorf(kind.Invalid, "path %.200q leads through something that is not a directory", at)
				}
				s = missing
			}
			if s == found {
				if err := cur[0].load(); err != nil {
					return "", err
				}
				if cur[0].isSymlink() {
					s = missing
				}
			}
		}
		if !followed {
			return at, nil
		}
		p = at
	}
}
