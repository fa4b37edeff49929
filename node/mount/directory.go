package mount

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/thaw-project/thaw/kind"
)

// Node is what Lstat sees; the zero Node is nothing.
type Node struct {
	Directory bool `json:"directory,omitempty"`
	UID       int  `json:"uid,omitempty"`
	GID       int  `json:"gid,omitempty"`
}

// Lstat looks at each path, in order, without following a last symbolic link. What is
// not there is no error.
func Lstat(ctx context.Context, paths []string) ([]Node, error) {
	req := request{Op: opLstat, Paths: paths}
	resp, err := call(ctx, req)
	if err != nil {
		return nil, err
	}
	if len(resp.Nodes) != len(paths) {
		return nil, fmt.Errorf("%s: %d of %d answers", &req, len(resp.Nodes), len(paths))
	}
	return resp.Nodes, nil
}

// OverlayDirs makes ready, in the directory root, the directories "upper", owned by
// uid and gid, and "work", for an overlay that was never mounted on them. One that was
// keeps its owner.
func OverlayDirs(ctx context.Context, root string, uid, gid int) error {
	_, err := call(ctx, request{Op: opOverlayDirs, Path: root, UID: uid, GID: gid})
	return err
}

// The functions below run in the child.

func lstat(paths []string) ([]Node, error) {
	nodes := make([]Node, 0, len(paths))
	for _, p := range paths {
		var st syscall.Stat_t
		switch err := syscall.Lstat(p, &st); {
		case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ENOTDIR):
			nodes = append(nodes, Node{})
		case err != nil:
			return nil, kind.Errorf(kind.IO, "lstat %s: %w", p, err)
		default:
			nodes = append(nodes, Node{
				Directory: st.Mode&syscall.S_IFMT == syscall.S_IFDIR,
				UID:       int(st.Uid), GID: int(st.Gid),
			})
		}
	}
	return nodes, nil
}

// makeOverlayDirs works on an empty file system and on one that comes with both
// directories. What overlayfs makes in "work" at its first mount tells whether there
// was one; before it, every step may be done again.
func makeOverlayDirs(root string, uid, gid int) error {
	upper, work := filepath.Join(root, "upper"), filepath.Join(root, "work")
	if _, err := os.Lstat(filepath.Join(work, "work")); err == nil {
		return nil
	}
	for _, dir := range []struct {
		path string
		mode os.FileMode
	}{{work, 0o711}, {upper, 0o755}} {
		err := unix.Mkdir(dir.path, uint32(dir.mode))
		if errors.Is(err, fs.ErrExist) {
			continue
		}
		if err == nil {
			err = os.Chmod(dir.path, dir.mode) // whatever the umask is
		}
		if err != nil {
			return fmt.Errorf("make %s: %w", dir.path, err)
		}
	}
	nodes, err := lstat([]string{upper})
	if err != nil || nodes[0] == (Node{Directory: true, UID: uid, GID: gid}) {
		return err // and nothing was written
	}
	return os.Lchown(upper, uid, gid)
}
