package torture

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Node is what a walk found under one name.
type Node struct {
	Mode     uint32 // st_mode
	UID, GID uint32
	Size     int64 // regular files and symbolic links
	MTime    time.Time
	Rdev     uint64
	Target   string
	Xattrs   map[string]string
	// Link is the first name, in order, of the same inode; "" for directories.
	Link string
	Hash [32]byte // of a regular file's content
}

// Walk describes the tree at root by relative names; the root is ".".
func Walk(root string) (map[string]Node, error) {
	nodes := map[string]Node{}
	inodes := map[[2]uint64]string{}
	// WalkDir goes in lexical order, so the first name of an inode is the same
	// for the same tree.
	err := filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, err := filepath.Rel(root, path)
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			// overlayfs lists the whiteouts of a directory that only one layer
			// has, but what they are is not there.
			if errors.Is(err, unix.ENOENT) {
				return nil
			}
			return fmt.Errorf("lstat %q: %w", name, err)
		}
		n := Node{Mode: st.Mode, UID: st.Uid, GID: st.Gid, MTime: time.Unix(st.Mtim.Unix()), Xattrs: map[string]string{}}
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			n.Size = st.Size
			if n.Hash, err = hash(path); err != nil {
				return err
			}
		case unix.S_IFLNK:
			n.Size = st.Size
			if n.Target, err = os.Readlink(path); err != nil {
				return err
			}
		case unix.S_IFCHR, unix.S_IFBLK:
			n.Rdev = st.Rdev
		}
		if st.Mode&unix.S_IFMT != unix.S_IFDIR {
			key := [2]uint64{st.Dev, st.Ino}
			if inodes[key] == "" {
				inodes[key] = name
			}
			n.Link = inodes[key]
		}
		if err := xattrs(path, n.Xattrs); err != nil {
			return fmt.Errorf("extended attributes of %q: %w", name, err)
		}
		nodes[name] = n
		return nil
	})
	return nodes, err
}

func hash(path string) (sum [32]byte, err error) {
	f, err := os.Open(path)
	if err != nil {
		return sum, err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return sum, fmt.Errorf("read %s: %w", path, err)
	}
	return [32]byte(h.Sum(nil)), nil
}

func xattrs(path string, into map[string]string) error {
	names := make([]byte, 64<<10)
	n, err := unix.Llistxattr(path, names)
	if err != nil || n == 0 {
		return err
	}
	for _, name := range strings.Split(strings.TrimRight(string(names[:n]), "\x00"), "\x00") {
		value := make([]byte, 64<<10)
		n, err := unix.Lgetxattr(path, name, value)
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		into[name] = string(value[:n])
	}
	return nil
}

// Diff lists how got differs from want, at most 50 lines. Modification times of
// directories that want has at or after since are not compared: an extraction
// gives the current time to directories that a layer changes without an entry for
// them. The root's attributes are compared but for its time.
func Diff(want, got map[string]Node, since time.Time) []string {
	var lines []string
	add := func(format string, args ...any) { lines = append(lines, fmt.Sprintf(format, args...)) }
	names := map[string]bool{}
	for name := range want {
		names[name] = true
	}
	for name := range got {
		names[name] = true
	}
	sorted := make([]string, 0, len(names))
	for name := range names {
		sorted = append(sorted, name)
	}
	sort.Strings(sorted)
	for _, name := range sorted {
		w, inWant := want[name]
		g, inGot := got[name]
		switch {
		case !inGot:
			add("%.200q: missing (want mode %o)", name, w.Mode)
			continue
		case !inWant:
			add("%.200q: there (mode %o) but not wanted", name, g.Mode)
			continue
		}
		if w.Mode != g.Mode || w.UID != g.UID || w.GID != g.GID {
			add("%.200q: mode %o %d:%d, want %o %d:%d", name, g.Mode, g.UID, g.GID, w.Mode, w.UID, w.GID)
		}
		if w.Size != g.Size || w.Hash != g.Hash || w.Target != g.Target || w.Rdev != g.Rdev {
			add("%.200q: content differs: %d bytes, target %.50q, device %#x; want %d, %.50q, %#x", name, g.Size, g.Target, g.Rdev, w.Size, w.Target, w.Rdev)
		}
		dir := w.Mode&unix.S_IFMT == unix.S_IFDIR
		if !w.MTime.Equal(g.MTime) && name != "." && !(dir && !w.MTime.Before(since)) {
			add("%.200q: time %v, want %v", name, g.MTime.UTC(), w.MTime.UTC())
		}
		if w.Link != g.Link {
			add("%.200q: hard link of %.100q, want %.100q", name, g.Link, w.Link)
		}
		for k, v := range w.Xattrs {
			if gv, ok := g.Xattrs[k]; !ok || gv != v {
				add("%.200q: attribute %s is %.80q (%v), want %.80q", name, k, gv, ok, v)
			}
		}
		for k := range g.Xattrs {
			if _, ok := w.Xattrs[k]; !ok {
				add("%.200q: attribute %s is not wanted", name, k)
			}
		}
	}
	if len(lines) > 50 {
		lines = append(lines[:50], fmt.Sprintf("and %d more", len(lines)-50))
	}
	return lines
}
