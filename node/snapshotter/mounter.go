package snapshotter

import (
	"context"

	"github.com/thaw-project/thaw/node/mount"
	"github.com/thaw-project/thaw/node/present"
)

// Mounter is what the snapshotter asks of the kernel. The real one is over
// node/mount; tests inject faults through it. Methods may be called concurrently
// and are idempotent.
//
// This process may be the one that serves the disks, so it must never wait in the
// kernel for one: see package mount. That is why even looking at a directory of a
// block is a method here.
type Mounter interface {
	// ErofsReadOnly mounts the EROFS on disk at the directory target.
	ErofsReadOnly(ctx context.Context, disk present.Disk, target string) error

	// Ext4ReadOnly mounts the ext4 on disk at target without replaying its journal.
	Ext4ReadOnly(ctx context.Context, disk present.Disk, target string) error

	// Ext4 mounts the ext4 on disk at target read-write.
	Ext4(ctx context.Context, disk present.Disk, target string) error

	// Unmount unmounts target; what is no mount is no error, what is busy is
	// kind.InUse. Loop devices that the above made go away with the mount.
	Unmount(ctx context.Context, target string) error

	// AttachLoop returns the writable loop device of path, attaching one if there is
	// none; it stays until DetachLoop.
	AttachLoop(ctx context.Context, path string) (device string, err error)

	// Loops lists the attached loop devices.
	Loops() ([]mount.Loop, error)

	// DetachLoop detaches the loop device of path; none is no error, and one in use
	// goes away with its last user.
	DetachLoop(ctx context.Context, path string) error

	// Mounts lists the mounts at prefix and below.
	Mounts(prefix string) ([]mount.Mount, error)

	// Lstat looks at each path, in order, without following a last symbolic link.
	Lstat(ctx context.Context, paths []string) ([]mount.Node, error)

	// OverlayDirs makes ready the directories upper, owned by uid and gid, and work in
	// the directory root, unless an overlay was mounted on them before.
	OverlayDirs(ctx context.Context, root string, uid, gid int) error
}

// systemMounter is the real Mounter.
type systemMounter struct{}

func (systemMounter) ErofsReadOnly(ctx context.Context, disk present.Disk, target string) error {
	return mount.ErofsReadOnly(ctx, disk, target)
}

func (systemMounter) Ext4ReadOnly(ctx context.Context, disk present.Disk, target string) error {
	return mount.Ext4ReadOnly(ctx, disk, target)
}

func (systemMounter) Ext4(ctx context.Context, disk present.Disk, target string) error {
	return mount.Ext4(ctx, disk, target)
}

func (systemMounter) Unmount(ctx context.Context, target string) error {
	return mount.Unmount(ctx, target)
}

func (systemMounter) AttachLoop(ctx context.Context, path string) (string, error) {
	// Direct I/O: the file system above caches, caching the file too would double it.
	return mount.AttachLoop(ctx, path, mount.LoopOptions{DirectIO: true})
}

func (systemMounter) Loops() ([]mount.Loop, error) { return mount.Loops() }

func (systemMounter) DetachLoop(ctx context.Context, path string) error {
	return mount.DetachLoop(ctx, path)
}

func (systemMounter) Mounts(prefix string) ([]mount.Mount, error) { return mount.Mounts(prefix) }

func (systemMounter) Lstat(ctx context.Context, paths []string) ([]mount.Node, error) {
	return mount.Lstat(ctx, paths)
}

func (systemMounter) OverlayDirs(ctx context.Context, root string, uid, gid int) error {
	return mount.OverlayDirs(ctx, root, uid, gid)
}
