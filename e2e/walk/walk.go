// Package walk describes a file tree so completely that two trees with equal
// descriptions cannot be told apart by a program: type, mode, owner, size, times,
// device numbers, extended attributes, hard links and content.
//
// It is what the tests compare root file systems with, and must know nothing of how
// a tree came about.
package walk

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"strings"

	"golang.org/x/sys/unix"
)

// Entry describes one file of a tree.
type Entry struct {
	Path    string // relative to the root, "." for the root itself
	Type    string // dir, file, symlink, fifo, socket, char, block
	Mode    uint32 // permission bits with setuid, setgid and sticky
	UID     uint32
	GID     uint32
	Size    int64  // of files and symlinks; a directory's size is its file system's affair
	Mtime   string // seconds.nanoseconds
	Device  string // major:minor of device nodes
	Target  string // of symlinks
	Xattrs  []string
	Links   string // first path of the hard link group in order of name; empty for a file with one name in the tree
	Content string // SHA-256 of files
}

// String is one line with everything in it.
func (e Entry) String() string {
	return fmt.Sprintf("%s %s mode=%04o owner=%d:%d size=%d mtime=%s device=%s target=%q xattrs=%v links=%q content=%s",
		e.Path, e.Type, e.Mode, e.UID, e.GID, e.Size, e.Mtime, e.Device, e.Target, e.Xattrs, e.Links, e.Content)
}

// Options leave things out of a walk.
type Options struct {
	// Skip reports paths, relative to the root, that are left out with all below.
	Skip func(path string) bool
	// NoTimes leaves modification times out, of paths for which it reports true.
	NoTimes func(path string) bool
}

// Tree describes everything below root, in order of path. It stays on root's file
// system.
func Tree(root string, o Options) ([]Entry, error) {
	var rootStat unix.Stat_t
	if err := unix.Lstat(root, &rootStat); err != nil {
		return nil, err
	}
	var entries []Entry
	inodes := map[uint64][]int{} // of files with several links: indexes in entries
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		relative, err := filepath.Rel(root, path)
		if err != nil {
			return err
		}
		if o.Skip != nil && relative != "." && o.Skip(relative) {
			if d.IsDir() {
				return fs.SkipDir
			}
			return nil
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return fmt.Errorf("lstat %s: %w", path, err)
		}
		e, err := describe(path, relative, &st)
		if err != nil {
			return err
		}
		if o.NoTimes != nil && o.NoTimes(relative) {
			e.Mtime = ""
		}
		if st.Nlink > 1 && e.Type != "dir" {
			inodes[st.Ino] = append(inodes[st.Ino], len(entries))
		}
		entries = append(entries, e)
		if d.IsDir() && st.Dev != rootStat.Dev {
			return fs.SkipDir
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	for _, group := range inodes {
		if len(group) == 1 { // its other names are not in this tree
			continue
		}
		for _, i := range group {
			entries[i].Links = entries[group[0]].Path
		}
	}
	sort.Slice(entries, func(i, j int) bool { return entries[i].Path < entries[j].Path })
	return entries, nil
}

func describe(path, relative string, st *unix.Stat_t) (Entry, error) {
	e := Entry{
		Path: relative, Mode: st.Mode & 0o7777, UID: st.Uid, GID: st.Gid,
		Mtime: fmt.Sprintf("%d.%09d", st.Mtim.Sec, st.Mtim.Nsec),
	}
	var err error
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		e.Type = "dir"
	case unix.S_IFREG:
		e.Type, e.Size = "file", st.Size
		e.Content, err = hashFile(path)
	case unix.S_IFLNK:
		e.Type, e.Size = "symlink", st.Size
		e.Target, err = os.Readlink(path)
	case unix.S_IFIFO:
		e.Type = "fifo"
	case unix.S_IFSOCK:
		e.Type = "socket"
	case unix.S_IFCHR, unix.S_IFBLK:
		e.Type = "char"
		if st.Mode&unix.S_IFMT == unix.S_IFBLK {
			e.Type = "block"
		}
		e.Device = fmt.Sprintf("%d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev))
	}
	if err != nil {
		return e, err
	}
	e.Xattrs, err = xattrs(path)
	return e, err
}

func hashFile(path string) (string, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", fmt.Errorf("read %s: %w", path, err)
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// xattrs returns "name=value" in order of name. overlayfs's own attributes are
// bookkeeping, not content.
func xattrs(path string) ([]string, error) {
	names := make([]byte, 64<<10) // the kernel's limit on a list of names
	n, err := unix.Llistxattr(path, names)
	if errors.Is(err, unix.ENOTSUP) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list xattrs of %s: %w", path, err)
	}
	var out []string
	value := make([]byte, 64<<10) // the kernel's limit on a value
	for name := range strings.SplitSeq(string(names[:n]), "\x00") {
		if name == "" || strings.HasPrefix(name, "trusted.overlay.") {
			continue
		}
		n, err := unix.Lgetxattr(path, name, value)
		if err != nil {
			return nil, fmt.Errorf("read xattr %s of %s: %w", name, path, err)
		}
		out = append(out, fmt.Sprintf("%s=%x", name, value[:n]))
	}
	slices.Sort(out)
	return out, nil
}

// maxDifferences bounds what Diff returns; more than this is never read.
const maxDifferences = 40

// Diff compares two walks and returns a line for each difference, none when the
// trees are equal. The names say whose each tree is.
func Diff(nameA string, a []Entry, nameB string, b []Entry) []string {
	var lines []string
	add := func(format string, args ...any) { lines = append(lines, fmt.Sprintf(format, args...)) }
	i, j := 0, 0
	for i < len(a) || j < len(b) {
		switch {
		case j == len(b) || i < len(a) && a[i].Path < b[j].Path:
			add("%s: only in %s (%s)", a[i].Path, nameA, a[i].Type)
			i++
		case i == len(a) || b[j].Path < a[i].Path:
			add("%s: only in %s (%s)", b[j].Path, nameB, b[j].Type)
			j++
		default:
			if d := fields(a[i], b[j]); len(d) > 0 {
				add("%s: %s: %s", a[i].Path, nameA+" / "+nameB, strings.Join(d, ", "))
			}
			i, j = i+1, j+1
		}
	}
	if len(lines) > maxDifferences {
		more := len(lines) - maxDifferences
		lines = append(lines[:maxDifferences], fmt.Sprintf("... and %d more", more))
	}
	return lines
}

func fields(a, b Entry) []string {
	var d []string
	differ := func(name string, x, y any) {
		if x, y := fmt.Sprint(x), fmt.Sprint(y); x != y {
			d = append(d, fmt.Sprintf("%s %s / %s", name, x, y))
		}
	}
	differ("type", a.Type, b.Type)
	differ("mode", fmt.Sprintf("%04o", a.Mode), fmt.Sprintf("%04o", b.Mode))
	differ("uid", a.UID, b.UID)
	differ("gid", a.GID, b.GID)
	differ("size", a.Size, b.Size)
	differ("mtime", a.Mtime, b.Mtime)
	differ("device", a.Device, b.Device)
	differ("target", a.Target, b.Target)
	differ("xattrs", a.Xattrs, b.Xattrs)
	differ("links", a.Links, b.Links)
	differ("content", a.Content, b.Content)
	return d
}
