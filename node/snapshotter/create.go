package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/continuity/fs"
	"github.com/containerd/errdefs"

	"github.com/thaw-project/thaw/image/block"
	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/node/imagemgmt"
)

// Prepare implements snapshots.Snapshotter. With the label containerd.io/snapshot.ref
// and the annotations of a converted image it commits that layer and returns
// errdefs.ErrAlreadyExists, or, when the layer cannot be attached within the attach
// timeout, prepares a snapshot to unpack it into.
func (s *Snapshotter) Prepare(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	labels, err := labelsOf(opts)
	if err != nil {
		return nil, err
	}
	var fellBack string
	if target := labels[snapshots.LabelSnapshotRef]; target != "" {
		done, leaf, err := s.prepareRemote(ctx, target, key, parent, labels, opts)
		if done || err != nil {
			return nil, toErrdefs(err)
		}
		fellBack = leaf
	}
	mounts, err := s.create(ctx, creation{
		kind: snapshots.KindActive, key: key, parent: parent, labels: labels, opts: opts, fellBack: fellBack,
	})
	return mounts, toErrdefs(err)
}

// View implements snapshots.Snapshotter.
func (s *Snapshotter) View(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	labels, err := labelsOf(opts)
	if err != nil {
		return nil, err
	}
	mounts, err := s.create(ctx, creation{kind: snapshots.KindView, key: key, parent: parent, labels: labels, opts: opts})
	return mounts, toErrdefs(err)
}

// creation is a snapshot to be made.
type creation struct {
	kind        snapshots.Kind
	key, parent string
	labels      map[string]string
	opts        []snapshots.Opt
	fellBack    string
}

func (s *Snapshotter) create(ctx context.Context, c creation) ([]mount.Mount, error) {
	var chain []link
	err := s.view(ctx, func(ctx context.Context, r records) (err error) {
		chain, err = r.chain(ctx, c.parent)
		return err
	})
	if err != nil {
		return nil, err
	}
	own := link{record: s.formFor(ctx, c, chain)}
	own.FellBack = c.fellBack
	own.Uses = s.stack("", chain).uses()

	release, err := s.bringUp(ctx, s.stack("", chain))
	if err != nil {
		return nil, err
	}
	defer release()
	s.o.step("parent up")

	temp, err := s.makeDir(ctx, c, own, chain)
	if err != nil {
		return nil, errors.Join(err, removeIfMade(temp))
	}
	s.o.step("directory made")
	err = s.update(ctx, func(ctx context.Context, r records) error {
		snapshot, err := storage.CreateSnapshot(ctx, c.kind, c.key, c.parent, c.opts...)
		if err != nil {
			return fmt.Errorf("create snapshot: %w", err)
		}
		if !slices.EqualFunc(snapshot.ParentIDs, chain, func(id string, l link) bool { return id == l.id }) {
			return kind.Errorf(kind.Unavailable, "create snapshot: parent %q changed meanwhile", c.parent)
		}
		own.id = snapshot.ID
		rec := own.record
		if rec.Form == formDisk {
			// Its disk is up as long as it is active.
			rec.Uses = append(slices.Clone(rec.Uses), s.disk(own).key())
		}
		if err := r.put(own.id, rec); err != nil {
			return err
		}
		if err := os.Rename(temp, s.dir(own.id)); err != nil {
			return fmt.Errorf("create snapshot: %w", err)
		}
		temp = s.dir(own.id)
		s.o.step("directory in place")
		return nil
	})
	if err != nil {
		return nil, errors.Join(err, removeIfMade(temp))
	}
	s.o.step("snapshot recorded")

	device := ""
	if own.Form == formDisk {
		var done func()
		if device, done, err = s.shared.acquire(ctx, s.disk(own)); err != nil {
			// containerd knows nothing of the snapshot yet, so nobody else removes it.
			return nil, errors.Join(err, s.Remove(context.WithoutCancel(ctx), c.key))
		}
		defer done()
	}
	return s.mountList(c.kind, own, s.stack(own.id, chain), device)
}

func removeIfMade(dir string) error {
	if dir == "" {
		return nil
	}
	return os.RemoveAll(dir)
}

// formFor decides how a new snapshot keeps what is written to it. On a converted
// parent of mode overlaybd that is a disk, unless the snapshot is to take an image
// layer, whose diff is then read from the upper directory, or its owner is to be
// changed, which overlayfs does and a disk does not.
func (s *Snapshotter) formFor(ctx context.Context, c creation, chain []link) record {
	_, uidMap := c.labels[snapshots.LabelSnapshotUIDMapping]
	_, gidMap := c.labels[snapshots.LabelSnapshotGIDMapping]
	if c.kind != snapshots.KindActive || len(chain) == 0 || chain[0].Form != formRemote ||
		chain[0].Remote.Mode != block.ModeOverlaybd || c.labels[snapshots.LabelSnapshotRef] != "" || uidMap || gidMap {
		return record{Form: formDirectory}
	}
	switch base := chain[0].Remote.base(); {
	case base.fs == block.Ext4:
		return record{Form: formDisk, Disk: &diskInfo{Backing: base.name, Target: base.target, Layout: layoutRoot}}
	case s.o.WritableBytes > 0:
		b, err := s.scratchFor(ctx, base.target)
		if err == nil {
			return record{Form: formDisk, Disk: &diskInfo{Backing: b.Name, Target: b.Target, Layout: layoutUpper}}
		}
		// It misses a limit on its size and nothing else.
		s.log.Warn("no scratch block: a container over an erofs block writes to a directory", "snapshot", c.key, "target", base.target, "error", err)
	}
	return record{Form: formDirectory}
}

// makeDir makes the whole directory of a new snapshot under a temporary name; what
// a record names is complete. The name is returned with an error too.
func (s *Snapshotter) makeDir(ctx context.Context, c creation, own link, chain []link) (string, error) {
	temp, err := os.MkdirTemp(s.snapshotsDir(), "new-")
	if err != nil {
		return "", fmt.Errorf("make snapshot directory: %w", err)
	}
	if own.Form == formDisk {
		own.Disk.UID, own.Disk.GID, err = s.owner(ctx, chain, s.stack("", chain))
		if err != nil {
			return temp, err
		}
		return temp, nil
	}
	upper := filepath.Join(temp, "fs")
	if err := os.Mkdir(upper, 0o755); err != nil {
		return temp, fmt.Errorf("make snapshot directory: %w", err)
	}
	// As containerd does, whatever the umask is: the root of a container must be
	// readable for its users.
	if err := os.Chmod(upper, 0o755); err != nil {
		return temp, fmt.Errorf("make snapshot directory: %w", err)
	}
	if c.kind == snapshots.KindActive {
		if err := os.Mkdir(filepath.Join(temp, "work"), 0o711); err != nil {
			return temp, fmt.Errorf("make snapshot directory: %w", err)
		}
	}
	st := s.stack("", chain)
	if st.linked {
		if err := os.Symlink(s.blockDir(st.base.base().name), filepath.Join(temp, lowerLink)); err != nil {
			return temp, fmt.Errorf("make snapshot directory: %w", err)
		}
	}
	uid, gid, mapped, err := mappedRoot(c.labels)
	if err != nil {
		return temp, err
	}
	if !mapped && len(chain) > 0 {
		if uid, gid, err = s.owner(ctx, chain, st); err != nil {
			return temp, err
		}
		mapped = true
	}
	if mapped {
		if err := os.Lchown(upper, uid, gid); err != nil {
			return temp, fmt.Errorf("make snapshot directory: %w", err)
		}
	}
	return temp, nil
}

// scratchBlocks are those that image-mgmt named, by target.
type scratchBlocks struct {
	mu     sync.Mutex
	blocks map[string]imagemgmt.Block // guarded by mu
}

// scratchFor is the block over which writable layers for images of target are made. Each
// is asked for once.
func (s *Snapshotter) scratchFor(ctx context.Context, target string) (imagemgmt.Block, error) {
	s.scratch.mu.Lock()
	b, ok := s.scratch.blocks[target]
	s.scratch.mu.Unlock()
	if ok {
		return b, nil
	}
	ctx, cancel := context.WithTimeoutCause(ctx, s.o.AttachTimeout, errTimeout)
	defer cancel()
	b, err := s.o.Images.EnsureScratch(ctx, target, s.o.WritableBytes)
	if err != nil {
		return imagemgmt.Block{}, err
	}
	if !validName(b.Name) {
		return imagemgmt.Block{}, kind.Errorf(kind.Corrupt, "scratch block %.80q is not a block name", b.Name)
	}
	s.scratch.mu.Lock()
	defer s.scratch.mu.Unlock()
	if s.scratch.blocks == nil {
		s.scratch.blocks = map[string]imagemgmt.Block{}
	}
	s.scratch.blocks[target] = b
	return b, nil
}

// mappedRoot is the host's id of the root of the user namespace that labels
// describe, each as "container:host:size[,...]"; mapped is false without one.
func mappedRoot(labels map[string]string) (uid, gid int, mapped bool, err error) {
	for _, l := range []struct {
		label string
		id    *int
	}{{snapshots.LabelSnapshotUIDMapping, &uid}, {snapshots.LabelSnapshotGIDMapping, &gid}} {
		text, ok := labels[l.label]
		if !ok {
			continue
		}
		mapped = true
		found := text == ""
		for m := range strings.SplitSeq(text, ",") {
			if text == "" {
				break
			}
			var n [3]uint64
			parts := strings.Split(m, ":")
			for i := range parts {
				if len(parts) != 3 {
					break
				}
				if n[i], err = strconv.ParseUint(parts[i], 10, 32); err != nil {
					break
				}
			}
			if len(parts) != 3 || err != nil {
				return 0, 0, false, fmt.Errorf("label %s=%.80q is not container:host:size: %w", l.label, text, errdefs.ErrInvalidArgument)
			}
			if n[0] == 0 && n[2] > 0 && !found {
				*l.id, found = int(n[1]), true
			}
		}
		if !found {
			return 0, 0, false, fmt.Errorf("label %s=%.80q does not map root: %w", l.label, text, errdefs.ErrInvalidArgument)
		}
	}
	return uid, gid, mapped, nil
}

// Commit implements snapshots.Snapshotter. A snapshot on a disk that is still
// mounted is errdefs.ErrFailedPrecondition.
func (s *Snapshotter) Commit(ctx context.Context, name, key string, opts ...snapshots.Opt) error {
	return toErrdefs(s.commit(ctx, name, key, opts))
}

func (s *Snapshotter) commit(ctx context.Context, name, key string, opts []snapshots.Opt) error {
	var own link
	err := s.view(ctx, func(ctx context.Context, r records) error {
		id, info, _, err := storage.GetInfo(ctx, key)
		if err != nil {
			return err
		}
		if info.Kind != snapshots.KindActive {
			return fmt.Errorf("commit snapshot %q: it is not active: %w", key, errdefs.ErrFailedPrecondition)
		}
		if _, _, _, err := storage.GetInfo(ctx, name); err == nil {
			return fmt.Errorf("commit snapshot %q: %q: %w", key, name, errdefs.ErrAlreadyExists)
		}
		own.id = id
		own.record, err = r.get(id)
		return err
	})
	if err != nil {
		return err
	}
	if own.Form != formDisk {
		usage, err := fs.DiskUsage(ctx, s.upperDir(own.id))
		if err != nil {
			return fmt.Errorf("commit snapshot %q: %w", key, err)
		}
		return s.recordCommit(ctx, name, key, own, snapshots.Usage(usage), opts)
	}

	d := s.disk(own)
	// Both ends of the disk's life meet here: nobody may write to it any more, and
	// what was written is in the file before the commit is recorded.
	return s.shared.takeDown(ctx, d, func(ctx context.Context) error { return d.clean(ctx) }, func() error {
		s.o.step("disk down")
		usage, err := d.usage(ctx)
		if err != nil {
			return err
		}
		return s.recordCommit(ctx, name, key, own, usage, opts)
	})
}

func (s *Snapshotter) recordCommit(ctx context.Context, name, key string, own link, usage snapshots.Usage, opts []snapshots.Opt) error {
	uses := own.Uses
	err := s.update(ctx, func(ctx context.Context, r records) error {
		id, err := storage.CommitActive(ctx, key, name, usage, opts...)
		if err != nil {
			return fmt.Errorf("commit snapshot %q as %q: %w", key, name, err)
		}
		rec, err := r.get(id)
		if err != nil {
			return err
		}
		rec.Uses = nil // a committed snapshot is mounted for its children only
		if rec.Disk != nil {
			rec.Disk.Committed = true
		}
		return r.put(id, rec)
	})
	if err != nil {
		return err
	}
	s.o.step("snapshot committed")
	// The next layer of a child image, or its container, will want the same blocks.
	for _, u := range uses {
		s.shared.lingerFor(u, s.o.linger)
	}
	return nil
}
