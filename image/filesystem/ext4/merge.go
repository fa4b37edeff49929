package ext4

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/thaw-project/thaw/kind"
)

// staging is where a layer is extracted before it is merged. No layer makes this
// name: those that begin with .wh. never become files.
const staging = "/.wh..wh.thaw"

const (
	overlayPrefix = "trusted.overlay."
	overlayOpaque = "trusted.overlay.opaque"
)

// merge moves the tree at upper, in overlayfs's form, onto the tree at lower, so
// that lower shows what an overlay of the two showed. Extracting onto lower at once
// would not: attributes of a directory that the layer does not repeat would stay, and
// what a whiteout hides would depend on the order of entries.
//
// Both are directories of one file system. upper is gone afterwards, but for itself.
func merge(ctx context.Context, upper, lower string) error {
	if ctx.Err() != nil {
		return kind.Wrap(kind.Canceled, context.Cause(ctx))
	}
	entries, err := os.ReadDir(upper)
	if err != nil {
		return err
	}
	for _, e := range entries {
		u, l := filepath.Join(upper, e.Name()), filepath.Join(lower, e.Name())
		if l == staging {
			continue
		}
		if err := mergeEntry(ctx, e, u, l); err != nil {
			return err
		}
	}
	return nil
}

func mergeEntry(ctx context.Context, e os.DirEntry, u, l string) error {
	switch {
	case e.Type()&os.ModeCharDevice != 0:
		hides, err := isWhiteout(u)
		if err != nil {
			return err
		}
		if hides {
			if err := os.RemoveAll(l); err != nil {
				return err
			}
			return os.Remove(u)
		}
	case e.IsDir():
		opaque, err := takeOpaque(u)
		if err != nil {
			return err
		}
		info, err := os.Lstat(l)
		if err == nil && info.IsDir() && !opaque {
			before, err := timesOf(u) // moving its entries away changes them
			if err != nil {
				return err
			}
			if err := merge(ctx, u, l); err != nil {
				return err
			}
			if err := copyAttributes(u, l); err != nil {
				return err
			}
			if err := setTimes(l, before); err != nil {
				return err
			}
			return os.Remove(u)
		}
		if err := settle(ctx, u); err != nil {
			return err
		}
		if err := os.RemoveAll(l); err != nil {
			return err
		}
		return os.Rename(u, l)
	}
	// What is not a directory replaces what is not one by rename alone.
	err := os.Rename(u, l)
	if err == nil || !errors.Is(err, unix.EISDIR) && !errors.Is(err, unix.ENOTEMPTY) && !errors.Is(err, unix.EEXIST) {
		return err
	}
	if err := os.RemoveAll(l); err != nil {
		return err
	}
	return os.Rename(u, l)
}

// settle removes overlayfs's marks from a tree that has nothing below it.
func settle(ctx context.Context, dir string) error {
	if ctx.Err() != nil {
		return kind.Wrap(kind.Canceled, context.Cause(ctx))
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	before, err := timesOf(dir)
	if err != nil {
		return err
	}
	changed := false
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		switch {
		case e.Type()&os.ModeCharDevice != 0:
			hides, err := isWhiteout(path)
			if err != nil {
				return err
			}
			if hides {
				changed = true
				if err := os.Remove(path); err != nil {
					return err
				}
			}
		case e.IsDir():
			if _, err := takeOpaque(path); err != nil {
				return err
			}
			if err := settle(ctx, path); err != nil {
				return err
			}
		}
	}
	if changed {
		return setTimes(dir, before)
	}
	return nil
}

func isWhiteout(path string) (bool, error) {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return false, &os.PathError{Op: "lstat", Path: path, Err: err}
	}
	return st.Mode&unix.S_IFMT == unix.S_IFCHR && st.Rdev == 0, nil
}

// takeOpaque removes overlayfs's mark from a directory and tells whether it had it.
func takeOpaque(dir string) (bool, error) {
	var value [1]byte
	n, err := unix.Lgetxattr(dir, overlayOpaque, value[:])
	switch {
	case errors.Is(err, unix.ENODATA):
		return false, nil
	case err != nil && !errors.Is(err, unix.ERANGE):
		return false, &os.PathError{Op: "getxattr", Path: dir, Err: err}
	}
	if err := unix.Lremovexattr(dir, overlayOpaque); err != nil {
		return false, &os.PathError{Op: "removexattr", Path: dir, Err: err}
	}
	return err == nil && n == 1 && value[0] == 'y', nil
}

type times [2]unix.Timespec

func timesOf(path string) (times, error) {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return times{}, &os.PathError{Op: "lstat", Path: path, Err: err}
	}
	return times{st.Atim, st.Mtim}, nil
}

func setTimes(path string, t times) error {
	if err := unix.UtimesNanoAt(unix.AT_FDCWD, path, t[:], unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return &os.PathError{Op: "utimensat", Path: path, Err: err}
	}
	return nil
}

// copyAttributes gives directory to the owner, mode and attributes of from.
func copyAttributes(from, to string) error {
	var st unix.Stat_t
	if err := unix.Lstat(from, &st); err != nil {
		return &os.PathError{Op: "lstat", Path: from, Err: err}
	}
	if err := os.Lchown(to, int(st.Uid), int(st.Gid)); err != nil {
		return err
	}
	if err := unix.Chmod(to, st.Mode&0o7777); err != nil {
		return &os.PathError{Op: "chmod", Path: to, Err: err}
	}
	return copyXattrs(from, to)
}

func copyXattrs(from, to string) error {
	have, err := xattrs(from)
	if err != nil {
		return err
	}
	stale, err := xattrs(to)
	if err != nil {
		return err
	}
	for name := range stale {
		if _, ok := have[name]; ok || strings.HasPrefix(name, overlayPrefix) {
			continue
		}
		if err := unix.Lremovexattr(to, name); err != nil && !errors.Is(err, unix.ENODATA) {
			return &os.PathError{Op: "removexattr " + name, Path: to, Err: err}
		}
	}
	for name, value := range have {
		if old, ok := stale[name]; ok && bytes.Equal(old, value) || strings.HasPrefix(name, overlayPrefix) {
			continue
		}
		if err := unix.Lsetxattr(to, name, value, 0); err != nil {
			return &os.PathError{Op: "setxattr " + name, Path: to, Err: err}
		}
	}
	return nil
}

// maxXattrBytes is the kernel's bound on a list of names and on a value.
const maxXattrBytes = 64 << 10

func xattrs(path string) (map[string][]byte, error) {
	n, err := unix.Llistxattr(path, nil)
	if err != nil || n == 0 {
		if err != nil {
			err = &os.PathError{Op: "listxattr", Path: path, Err: err}
		}
		return nil, err
	}
	list := make([]byte, maxXattrBytes)
	if n, err = unix.Llistxattr(path, list); err != nil {
		return nil, &os.PathError{Op: "listxattr", Path: path, Err: err}
	}
	out := map[string][]byte{}
	value := make([]byte, maxXattrBytes)
	for _, name := range strings.Split(strings.TrimSuffix(string(list[:n]), "\x00"), "\x00") {
		n, err := unix.Lgetxattr(path, name, value)
		if err != nil {
			return nil, fmt.Errorf("get attribute %q of %q: %w", name, path, err)
		}
		out[name] = append([]byte(nil), value[:n]...)
	}
	return out, nil
}
