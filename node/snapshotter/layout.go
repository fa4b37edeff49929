package snapshotter

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"

	"github.com/thaw-project/thaw/image/block"
	"github.com/thaw-project/thaw/kind"
)

func (s *Snapshotter) snapshotsDir() string      { return filepath.Join(s.o.Root, "snapshots") }
func (s *Snapshotter) dir(id string) string      { return filepath.Join(s.snapshotsDir(), id) }
func (s *Snapshotter) upperDir(id string) string { return filepath.Join(s.dir(id), "fs") }
func (s *Snapshotter) workDir(id string) string  { return filepath.Join(s.dir(id), "work") }

// lowerLink is a symbolic link in the directory of a snapshot with ordinary layers
// on a block, to the block's mount point. containerd fits many lower directories
// into one page of mount options by changing to the directory common to all; with
// the link that is snapshots/ and not a directory near the root.
const lowerLink = "lower"

// stack is what a chain of parents looks like to overlayfs.
type stack struct {
	lowers []string    // directories, highest first
	needs  []resource  // what must be up for them to be there
	base   *remoteInfo // the remote layer at the end, if any
	linked bool        // the base is reached through lowerLink of snapshot id
}

// stack lays out chain, highest first, for snapshot id. A remote layer ends it,
// whatever its parents are, for its block holds all layers below; so does a disk
// with a whole root file system.
func (s *Snapshotter) stack(id string, chain []link) stack {
	var st stack
	for i, l := range chain {
		switch {
		case l.Form == formRemote:
			st.needs = append(st.needs, s.blockMount(l.Remote.base()))
			st.base = l.Remote
			st.linked = i > 0
			dirs := s.layerDirs(l.Remote)
			if st.linked {
				root, via := s.blockDir(l.Remote.base().name), filepath.Join(s.dir(id), lowerLink)
				for j := range dirs {
					dirs[j] = via + strings.TrimPrefix(dirs[j], root)
				}
			}
			st.lowers = append(st.lowers, dirs...)
			return st
		case l.Form == formDisk:
			d := s.disk(l)
			st.needs = append(st.needs, d)
			if l.Disk.Layout == layoutRoot {
				st.lowers = append(st.lowers, d.mnt())
				return st
			}
			st.lowers = append(st.lowers, filepath.Join(d.mnt(), "upper"))
		default:
			st.lowers = append(st.lowers, s.upperDir(l.id))
		}
	}
	return st
}

func (s *Snapshotter) disk(l link) disk { return disk{s, l.id, l.Disk.block()} }

func (st stack) uses() []string {
	var keys []string
	for _, r := range st.needs {
		keys = append(keys, r.key())
	}
	return keys
}

// bringUp acquires all that the stack needs. release is never nil.
func (s *Snapshotter) bringUp(ctx context.Context, st stack) (release func(), err error) {
	var releases []func()
	release = func() {
		for _, r := range releases {
			r()
		}
	}
	for _, r := range st.needs {
		_, rel, err := s.shared.acquire(ctx, r)
		if err != nil {
			release()
			return func() {}, err
		}
		releases = append(releases, rel)
	}
	if st.base != nil && st.base.Mode == block.ModeOverlayfs {
		if _, err := s.checkLayers(ctx, st.base); err != nil {
			release()
			return func() {}, err
		}
	}
	return release, nil
}

// owner is who owns the root of the stack, which is up.
func (s *Snapshotter) owner(ctx context.Context, chain []link, st stack) (uid, gid int, err error) {
	top := chain[0]
	switch {
	case top.Form == formRemote && top.Remote.Mode == block.ModeOverlayfs:
		n, err := s.checkLayers(ctx, top.Remote)
		return n.UID, n.GID, err
	case top.Form == formDisk && top.Disk.Layout == layoutUpper:
		nodes, err := s.mounter.Lstat(ctx, st.lowers[:1])
		if err != nil {
			return 0, 0, err
		}
		return nodes[0].UID, nodes[0].GID, nil
	}
	// An ordinary directory, or the root of a mount, which is in memory.
	info, err := os.Lstat(st.lowers[0])
	if err != nil {
		return 0, 0, fmt.Errorf("look at parent: %w", err)
	}
	sys, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return 0, 0, fmt.Errorf("look at parent: no owner in %T", info.Sys())
	}
	return int(sys.Uid), int(sys.Gid), nil
}

// mountList is what containerd mounts for snapshot own, whose stack is up. device is
// that of its own disk.
func (s *Snapshotter) mountList(k snapshots.Kind, own link, st stack, device string) ([]mount.Mount, error) {
	if own.Form == formDisk && own.Disk.Layout == layoutRoot {
		return s.deviceMount(own, device)
	}
	if len(st.lowers) == 0 {
		access := "rw"
		if k == snapshots.KindView {
			access = "ro"
		}
		return bind(s.upperDir(own.id), access), nil
	}
	if k == snapshots.KindView && len(st.lowers) == 1 {
		return bind(st.lowers[0], "ro"), nil
	}
	var options []string
	if k == snapshots.KindActive {
		work, upper := s.workDir(own.id), s.upperDir(own.id)
		if own.Form == formDisk {
			mnt := s.disk(own).mnt()
			work, upper = filepath.Join(mnt, "work"), filepath.Join(mnt, "upper")
		}
		options = append(options, "workdir="+work, "upperdir="+upper)
	}
	options = append(options, "lowerdir="+strings.Join(st.lowers, ":"))
	options = append(options, s.overlayOptions...)
	return []mount.Mount{{Type: "overlay", Source: "overlay", Options: options}}, nil
}

func bind(source, access string) []mount.Mount {
	return []mount.Mount{{Type: "bind", Source: source, Options: []string{access, "rbind"}}}
}

// deviceMount is the mount of a root file system on a disk. While a container has it
// mounted, who asks wants to look at it beside the container, for a diff, and the
// kernel does not mount a device read-only that is mounted read-write: they get a
// bind of the container's mount.
func (s *Snapshotter) deviceMount(own link, device string) ([]mount.Mount, error) {
	if device == "" {
		return nil, kind.Errorf(kind.NotFound, "snapshot %s has no device: it is committed", own.id)
	}
	at, err := s.mountsOf(device)
	if err != nil {
		return nil, err
	}
	if len(at) > 0 {
		return []mount.Mount{{Type: "bind", Source: at[0], Options: []string{"rw", "bind"}}}, nil
	}
	return []mount.Mount{{Type: "ext4", Source: device, Options: []string{"rw"}}}, nil
}
