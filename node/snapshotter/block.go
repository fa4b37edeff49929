package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/thaw-project/thaw/image/block"
	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/node/imagemgmt"
	"github.com/thaw-project/thaw/node/mount"
	"github.com/thaw-project/thaw/node/present"
)

// attachUser is the name under which image-mgmt counts this snapshotter's use of a
// block; which snapshots are behind it is in the records.
const attachUser = "snapshotter"

// blockRef is a block, the file system in it, and the target that stores it. The name
// alone decides which block it is; who only takes one away needs no more.
type blockRef struct {
	name   string
	fs     block.Filesystem
	target string
}

const blockPrefix = "block/"

func (b blockRef) key() string { return blockPrefix + b.name }

// blockMount is the shared read-only mount of one block.
type blockMount struct {
	s *Snapshotter
	blockRef
}

func (s *Snapshotter) blockMount(ref blockRef) blockMount { return blockMount{s, ref} }

func (s *Snapshotter) blockDir(name string) string { return filepath.Join(s.o.MountDir, name) }

// validName keeps names out of other directories; block names proper are checked
// where annotations are parsed.
func validName(name string) bool {
	ok := func(r rune) bool {
		return r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '-' || r == '_' || r == '.'
	}
	return name != "" && len(name) <= 128 && name[0] != '.' && strings.IndexFunc(name, func(r rune) bool { return !ok(r) }) < 0
}

func (b blockMount) up(ctx context.Context) (string, error) {
	if !validName(b.name) {
		return "", kind.Errorf(kind.Invalid, "mount block %.80q: not a block name", b.name)
	}
	disk, err := b.s.o.Images.Attach(ctx, imagemgmt.Block{Target: b.target, Name: b.name}, attachUser)
	if err != nil {
		return "", fmt.Errorf("attach block %s: %w", b.name, err)
	}
	b.s.o.step("block attached")
	dir := b.s.blockDir(b.name)
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return "", fmt.Errorf("mount block %s: %w", b.name, err)
	}
	b.s.o.step("block directory made")
	err = b.s.mountOnce(ctx, b.key(), disk, dir, func() error {
		b.s.seen.drop(b.name)
		switch b.fs {
		case block.Erofs:
			return b.s.mounter.ErofsReadOnly(ctx, disk, dir)
		case block.Ext4:
			return b.s.mounter.Ext4ReadOnly(ctx, disk, dir)
		}
		return kind.Errorf(kind.Unsupported, "file system %.40q", b.fs)
	})
	if err != nil {
		return "", fmt.Errorf("mount block %s: %w", b.name, err)
	}
	b.s.o.step("block mounted")
	return "", nil
}

func (b blockMount) down(ctx context.Context) error {
	if !validName(b.name) {
		return nil // was never up
	}
	b.s.seen.drop(b.name)
	dir := b.s.blockDir(b.name)
	if err := b.s.unmount(ctx, b.key(), dir); err != nil {
		return fmt.Errorf("unmount block %s: %w", b.name, err)
	}
	b.s.o.step("block unmounted")
	if err := b.s.o.Images.Detach(ctx, b.name, attachUser); err != nil {
		return fmt.Errorf("detach block %s: %w", b.name, err)
	}
	b.s.o.step("block detached")
	// Remove, not RemoveAll: whatever is in there is not ours to delete.
	if err := os.Remove(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("unmount block %s: %w", b.name, err)
	}
	return nil
}

func (b blockMount) intact(string) bool { return isLiveMount(b.s.blockDir(b.name)) }

// isLiveMount tells whether something is mounted at dir whose disk the kernel still has: a
// drive may be unplugged under its file system. A file system that is on no block device
// has number 0.
func isLiveMount(dir string) bool {
	var at syscall.Stat_t
	if !isMountPoint(dir) || syscall.Lstat(dir, &at) != nil {
		return false
	}
	if unix.Major(at.Dev) == 0 {
		return true
	}
	_, err := os.Lstat(fmt.Sprintf("/sys/dev/block/%d:%d", unix.Major(at.Dev), unix.Minor(at.Dev)))
	return err == nil
}

// isMountOf tells whether the file system at dir is on the block device at path. As long
// as it is mounted, no other device gets its device's number.
func isMountOf(dir, path string) bool {
	var at, device syscall.Stat_t
	return syscall.Lstat(dir, &at) == nil && syscall.Lstat(path, &device) == nil && at.Dev == device.Rdev
}

// isMountPoint tells whether something is mounted at dir. The root inode of a mount
// is in memory, so that this never waits for a disk.
func isMountPoint(dir string) bool {
	var at, above syscall.Stat_t
	if syscall.Lstat(dir, &at) != nil || syscall.Lstat(filepath.Dir(dir), &above) != nil {
		return false
	}
	return at.Dev != above.Dev
}

// mountOnce runs mount unless dir shows disk already. A disk that is a file belongs to
// the file system of a presentation, and when that was lost and made anew, under the
// same names, a mount of before is dead and must be replaced. Which one a mount is of
// cannot be seen in it, so it is recorded; what is mounted and not recorded is
// replaced too. A block device that went away and came back is another one. Containers
// have mounts of their own and notice nothing.
func (s *Snapshotter) mountOnce(ctx context.Context, key string, disk present.Disk, dir string, mount func() error) error {
	now := "device"
	if !disk.Block {
		var err error
		if now, err = fileSystemOf(disk.Path); err != nil {
			return err
		}
	}
	if isMountPoint(dir) {
		if disk.Block && isMountOf(dir, disk.Path) {
			return nil
		}
		then, err := s.mountedFrom(ctx, key)
		if err != nil {
			return err
		}
		if then == now && !disk.Block {
			return nil
		}
		if err := s.mounter.Unmount(ctx, dir); err != nil {
			return fmt.Errorf("replace a mount of another presentation: %w", err)
		}
		s.o.step("stale mount gone")
	}
	if err := mount(); err != nil {
		return err
	}
	s.o.step("mounted, not recorded")
	return s.update(ctx, func(_ context.Context, r records) error {
		return r.bucket(bucketMounted).Put([]byte(key), []byte(now))
	})
}

func (s *Snapshotter) mountedFrom(ctx context.Context, key string) (from string, err error) {
	err = s.view(ctx, func(_ context.Context, r records) error {
		from = string(r.bucket(bucketMounted).Get([]byte(key)))
		return nil
	})
	return from, err
}

// unmount undoes mountOnce.
func (s *Snapshotter) unmount(ctx context.Context, key, dir string) error {
	if isMountPoint(dir) { // else no child is needed to find out
		if err := s.mounter.Unmount(ctx, dir); err != nil {
			return err
		}
	}
	from, err := s.mountedFrom(ctx, key)
	if err != nil || from == "" {
		return err
	}
	return s.update(ctx, func(_ context.Context, r records) error {
		return r.bucket(bucketMounted).Delete([]byte(key))
	})
}

// fileSystemOf is the device number of the file system that holds path, as
// "major:minor". It asks the mount table and not the file, whose file system may be
// served by this process. As long as a mount of a file on it exists, the file system
// does, and no other has its number.
func fileSystemOf(path string) (string, error) {
	infos, err := mountinfo.GetMounts(mountinfo.ParentsFilter(path))
	if err != nil {
		return "", fmt.Errorf("list mounts: %w", err)
	}
	var holder *mountinfo.Info
	for _, i := range infos { // later ones cover earlier ones
		if holder == nil || len(i.Mountpoint) >= len(holder.Mountpoint) {
			holder = i
		}
	}
	if holder == nil {
		return "", kind.Errorf(kind.NotFound, "no mount holds %s", path)
	}
	return fmt.Sprintf("%d:%d", holder.Major, holder.Minor), nil
}

// layerDirs are the directories of remote layer r inside its mounted base, highest
// layer first.
func (s *Snapshotter) layerDirs(r *remoteInfo) []string {
	root := s.blockDir(r.base().name)
	if r.Mode == block.ModeOverlaybd {
		return []string{root}
	}
	dirs := make([]string, 0, r.Index+1)
	for i := r.Index; i >= 0; i-- {
		dirs = append(dirs, filepath.Join(root, strconv.Itoa(i)))
	}
	return dirs
}

// checkLayers verifies that the base of r, which is mounted, has the directories that
// r promises, and returns the top one. A manifest may name any block there is, also
// one whose content its author chose, so that a layer "directory" could be a symbolic
// link out of it. What was seen once stays true, for a block never changes.
func (s *Snapshotter) checkLayers(ctx context.Context, r *remoteInfo) (mount.Node, error) {
	dirs := s.layerDirs(r)
	if node, ok := s.seen.get(r.base().name, r.Index); ok {
		return node, nil
	}
	nodes, err := s.mounter.Lstat(ctx, dirs)
	if err != nil {
		return mount.Node{}, fmt.Errorf("check block %s: %w", r.base().name, err)
	}
	for i, n := range nodes {
		if !n.Directory {
			return mount.Node{}, kind.Errorf(kind.Corrupt, "block %s: %s is not the directory of a layer", r.base().name, filepath.Base(dirs[i]))
		}
	}
	s.seen.put(r.base().name, r.Index, nodes[0])
	return nodes[0], nil
}

// seenLayers remembers the layers that checkLayers found, of mounted blocks only.
type seenLayers struct {
	mu     sync.Mutex
	blocks map[string]map[int]mount.Node // guarded by mu
}

func (l *seenLayers) get(name string, index int) (mount.Node, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	n, ok := l.blocks[name][index]
	return n, ok
}

func (l *seenLayers) put(name string, index int, n mount.Node) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.blocks == nil {
		l.blocks = map[string]map[int]mount.Node{}
	}
	if l.blocks[name] == nil {
		l.blocks[name] = map[int]mount.Node{}
	}
	l.blocks[name][index] = n
}

func (l *seenLayers) drop(name string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.blocks, name)
}
