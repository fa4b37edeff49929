// Package mount mounts presented disks: EROFS directly on a file where the kernel
// can, ext4 and everything else through loop devices.
//
// A disk may be a file that this very process serves through FUSE. A thread that
// waits in the kernel for such a file cannot be killed until the request is
// answered, and a process with such a thread cannot end, so that its successor,
// which would answer, waits for its locks in vain. Therefore no exported function
// of this package that may touch a disk does so in the calling process, except
// Ext4Detached: the work is done by a child, the same executable with another name,
// which is recognised before main runs. It waits some seconds for further work and
// then ends. A killed server leaves a child that finishes its one operation.
//
// The package must not know images, containerd or who presents the disk.
package mount

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sort"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/thaw-project/thaw/filelock"
	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/node/present"
)

// Mount is one line of /proc/self/mountinfo.
type Mount struct {
	Target  string `json:"target"`
	Type    string `json:"type"`
	Source  string `json:"source"`
	Options string `json:"options"` // those of the mount, as "ro,relatime"
}

// ErofsReadOnly mounts the EROFS on disk at target, which must be an existing
// directory. It uses the file itself where the kernel has file-backed mounts (6.12)
// and a read-only loop device otherwise. A target that shows this disk already is no
// error; one that shows something else is kind.Exists.
func ErofsReadOnly(ctx context.Context, disk present.Disk, target string) error {
	_, err := call(ctx, request{Op: opErofs, Disk: disk, Target: target})
	return err
}

// Ext4ReadOnly mounts the ext4 on disk at target read-only and without replaying
// its journal: what was snapshotted is what is shown. Otherwise as ErofsReadOnly.
func Ext4ReadOnly(ctx context.Context, disk present.Disk, target string) error {
	_, err := call(ctx, request{Op: opExt4ReadOnly, Disk: disk, Target: target})
	return err
}

// Ext4 mounts the ext4 on disk at target read-write. Otherwise as ErofsReadOnly.
func Ext4(ctx context.Context, disk present.Disk, target string) error {
	_, err := call(ctx, request{Op: opExt4, Disk: disk, Target: target})
	return err
}

// Unmount unmounts what is at target, and again while something is; a target that
// is no mount is no error. It is kind.InUse while a process uses it. A loop device
// that the mount used goes away with it.
func Unmount(ctx context.Context, target string) error {
	_, err := call(ctx, request{Op: opUnmount, Target: target})
	return err
}

// Mounts returns the mounts at prefix and below it, in order of target.
func Mounts(prefix string) ([]Mount, error) {
	prefix = filepath.Clean(prefix)
	infos, err := mountinfo.GetMounts(mountinfo.PrefixFilter(prefix))
	if err != nil {
		return nil, fmt.Errorf("list mounts below %s: %w", prefix, err)
	}
	mounts := make([]Mount, 0, len(infos))
	for _, i := range infos {
		mounts = append(mounts, Mount{Target: i.Mountpoint, Type: i.FSType, Source: i.Source, Options: i.Options})
	}
	sort.SliceStable(mounts, func(a, b int) bool { return mounts[a].Target < mounts[b].Target })
	return mounts, nil
}

// Ext4Options are the options of Ext4Detached.
type Ext4Options struct {
	ReadOnly bool
	// Data holds further ext4 options, as "noload" or "data=writeback".
	Data []string
}

// Ext4Detached mounts the ext4 on a block device nowhere: the file it returns is
// the root directory, reached by this process as /proc/self/fd/N, and the mount ends
// when the last descriptor for it is closed, if need be by SIGKILL. It needs Linux
// 5.2. Unlike the rest of the package it works in the calling process, so that must
// not be the one which serves the device.
func Ext4Detached(ctx context.Context, device string, options Ext4Options) (*os.File, error) {
	if err := ctx.Err(); err != nil {
		return nil, kind.Errorf(kind.Canceled, "mount ext4 on %s: %w", device, err)
	}
	fail := func(what string, err error) (*os.File, error) {
		return nil, fmt.Errorf("mount ext4 on %s: %s: %w", device, what, explain("ext4", err))
	}
	fs, err := unix.Fsopen("ext4", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return fail("fsopen", err)
	}
	defer unix.Close(fs)
	if err := unix.FsconfigSetString(fs, "source", device); err != nil {
		return fail("source", err)
	}
	if options.ReadOnly {
		if err := unix.FsconfigSetFlag(fs, "ro"); err != nil {
			return fail("ro", err)
		}
	}
	for _, o := range options.Data {
		if key, value, ok := strings.Cut(o, "="); ok {
			err = unix.FsconfigSetString(fs, key, value)
		} else {
			err = unix.FsconfigSetFlag(fs, key)
		}
		if err != nil {
			return fail("option "+o, err)
		}
	}
	if err := unix.FsconfigCreate(fs); err != nil {
		return fail("create", err)
	}
	attributes := 0
	if options.ReadOnly {
		attributes |= unix.MOUNT_ATTR_RDONLY
	}
	fd, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, attributes)
	if err != nil {
		return fail("fsmount", err)
	}
	return os.NewFile(uintptr(fd), device), nil
}

// Syncfs writes out the file system that file is on, and returns its errors. What
// Ext4Detached returned will do.
func Syncfs(file *os.File) error {
	err := unix.Syncfs(int(file.Fd()))
	if err == unix.EBADF {
		// A descriptor that only names a place, as fsmount's, must be opened first.
		var fd int
		if fd, err = unix.Openat(int(file.Fd()), ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0); err == nil {
			err = unix.Syncfs(fd)
			unix.Close(fd)
		}
	}
	if err != nil {
		return fmt.Errorf("sync file system of %s: %w", file.Name(), err)
	}
	return nil
}

// mounted tells whether target already shows disk, and fails if it shows
// something else.
func mounted(disk present.Disk, target, fstype string) (bool, error) {
	infos, err := mountinfo.GetMounts(func(i *mountinfo.Info) (skip, stop bool) { return i.Mountpoint != target, false })
	if err != nil {
		return false, fmt.Errorf("list mounts: %w", err)
	}
	if len(infos) == 0 {
		return false, nil
	}
	top := infos[len(infos)-1]
	if top.FSType == fstype {
		if top.Source == disk.Path {
			return true, nil
		}
		if backing, err := backingFile(top.Source); err == nil && backing == disk.Path {
			return true, nil
		}
	}
	return false, kind.Errorf(kind.Exists, "%s is the mount point of %s (%s)", target, top.Source, top.FSType)
}

// The functions below run in the child.

// unlessMounted calls mount unless target shows disk. Two children may be at it, the
// one of a killed server and the one of its successor: the second must see what the
// first did, so the directory below the mount is locked.
func unlessMounted(disk present.Disk, target, fstype string, mount func() error) error {
	if done, err := mounted(disk, target, fstype); done || err != nil {
		return err
	}
	dir, err := os.OpenFile(target, os.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	defer dir.Close()
	if err := filelock.Exclusive(dir, lockWait); err != nil {
		return err
	}
	if done, err := mounted(disk, target, fstype); done || err != nil {
		return err
	}
	return mount()
}

func mountErofs(disk present.Disk, target string) error {
	// directio reads past the page cache of the file, so that data is cached once,
	// by EROFS; kernels before 6.14 do not know it. A block device has no such cache.
	data := "directio"
	if disk.Block {
		data = ""
	}
	err := unix.Mount(disk.Path, target, "erofs", unix.MS_RDONLY, data)
	if data != "" && errors.Is(err, unix.EINVAL) {
		err = unix.Mount(disk.Path, target, "erofs", unix.MS_RDONLY, "")
	}
	if err == nil || disk.Block || !errors.Is(err, unix.ENOTBLK) {
		return explain("erofs", err)
	}
	return mountLoop(disk, target, "erofs", unix.MS_RDONLY, "")
}

func mountExt4(disk present.Disk, target string, flags uintptr, data string) error {
	if disk.Block {
		return explain("ext4", unix.Mount(disk.Path, target, "ext4", flags, data))
	}
	return mountLoop(disk, target, "ext4", flags, data)
}

// mountLoop mounts through a loop device that goes away with the mount, and, if we
// die before there is one, with us.
func mountLoop(disk present.Disk, target, fstype string, flags uintptr, data string) error {
	loop, err := attach(disk.Path, LoopOptions{
		ReadOnly:  flags&unix.MS_RDONLY != 0 || disk.ReadOnly,
		DirectIO:  true,
		AutoClear: true,
	})
	if err != nil {
		return err
	}
	defer loop.Close()
	return explain(fstype, unix.Mount(loop.Name(), target, fstype, flags, data))
}

func unmount(target string) error {
	// Mounts may be stacked; each turn takes one away. The bound is far above
	// what anybody stacks.
	for range 64 {
		err := unix.Unmount(target, unix.UMOUNT_NOFOLLOW)
		switch err {
		case nil:
			continue
		case unix.EINVAL, unix.ENOENT: // not a mount point
			return nil
		default:
			return err
		}
	}
	return kind.Errorf(kind.InUse, "more than 64 mounts")
}

// explain adds what to do about an error of mount(2).
func explain(fstype string, err error) error {
	switch {
	case errors.Is(err, unix.ENODEV):
		return kind.Errorf(kind.Unsupported, "%w: this kernel has no %s: load the module (modprobe %[2]s) or use a kernel built with CONFIG_%[3]s_FS",
			err, fstype, strings.ToUpper(fstype))
	case errors.Is(err, unix.EPERM):
		return kind.Errorf(kind.Denied, "%w: mounting %s needs CAP_SYS_ADMIN: run as root", err, fstype)
	case errors.Is(err, unix.EUCLEAN), errors.Is(err, unix.EFSCORRUPTED):
		return kind.Errorf(kind.Corrupt, "%w: the %s is damaged or uses a feature this kernel does not know (see dmesg)", err, fstype)
	case errors.Is(err, unix.EINVAL):
		return kind.Errorf(kind.Invalid, "%w: no %s there, or one that this kernel cannot read (see dmesg)", err, fstype)
	}
	return err
}
