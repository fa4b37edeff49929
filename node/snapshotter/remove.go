package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/errdefs"

	"github.com/thaw-project/thaw/kind"
)

// Remove implements snapshots.Snapshotter. The snapshot is gone when it returns nil;
// what could not be taken away with it is tried again by Cleanup and at start, and
// is no error.
func (s *Snapshotter) Remove(ctx context.Context, key string) error {
	var gone link
	err := s.update(ctx, func(ctx context.Context, r records) error {
		id, _, err := storage.Remove(ctx, key)
		if err != nil {
			return fmt.Errorf("remove snapshot %q: %w", key, err)
		}
		gone.id = id
		gone.record, err = r.retire(id)
		return err
	})
	if err != nil {
		return toErrdefs(err)
	}
	s.o.step("snapshot retired")
	if !s.o.AsyncRemove {
		s.cleanUpLogged(ctx, gone)
	}
	return nil
}

// Cleanup implements snapshots.Cleaner: it finishes removals, and takes away
// directories, mounts and attachments that nothing needs. What fails is logged and
// tried again next time, for an error would stop containerd's garbage collection.
func (s *Snapshotter) Cleanup(ctx context.Context) error {
	s.housekeep(ctx, true)
	return nil
}

// janitor does between Cleanups what became possible with time.
func (s *Snapshotter) janitor() {
	t := time.NewTicker(s.o.patience)
	defer t.Stop()
	for {
		select {
		case <-t.C:
			s.housekeep(s.ctx, !s.o.AsyncRemove)
		case <-s.ctx.Done():
			return
		}
	}
}

func (s *Snapshotter) housekeep(ctx context.Context, removals bool) {
	if removals {
		var retired []link
		err := s.view(ctx, func(_ context.Context, r records) (err error) {
			retired, err = r.removed()
			return err
		})
		s.warn("list removed snapshots", err)
		for _, l := range retired {
			s.cleanUpLogged(ctx, l)
		}
		s.warn("remove left-over directories", s.removeOrphans(ctx, false))
	}
	s.warn("protect blocks", s.protectAll(ctx))
	s.warn("take down what is unused", errors.Join(s.shared.sweep(ctx), s.reconcileResources(ctx)))
}

func (s *Snapshotter) warn(what string, err error) {
	if err != nil && s.ctx.Err() == nil {
		s.metrics.cleanupFailures.Inc()
		s.log.Warn(what, "error", err)
	}
}

func (s *Snapshotter) cleanUpLogged(ctx context.Context, gone link) {
	// A client that gives up must not leave a mess, nor one disk that hangs hold up
	// the client.
	ctx, cancel := context.WithTimeoutCause(context.WithoutCancel(ctx), s.o.AttachTimeout, errTimeout)
	defer cancel()
	if err := s.cleanUp(ctx, gone); err != nil {
		s.metrics.cleanupFailures.Inc()
		s.log.Warn("clean up a removed snapshot; will try again later", "snapshot", gone.id, "error", err)
	}
}

// cleanUp takes away what a removed snapshot left, step by step, each of which may
// have been done before.
func (s *Snapshotter) cleanUp(ctx context.Context, gone link) error {
	if gone.Form == formDisk {
		nothing := func(context.Context) error { return nil }
		d := s.disk(gone)
		if err := s.shared.takeDown(ctx, d, nothing, func() error { return d.remove(ctx) }); err != nil {
			return err
		}
	}
	blocks := blocksOf(gone.Uses)
	if r := gone.Remote; r != nil {
		if r.Protected {
			// Those below lose their protection with this layer's block.
			if err := s.protect(ctx, r.Leaf); err != nil {
				return err
			}
		}
		blocks = append(blocks, r.Leaf)
		var last bool
		if err := s.view(ctx, func(_ context.Context, rs records) error {
			last = len(rs.leafMembers(r.Leaf)) == 0
			return nil
		}); err != nil {
			return err
		}
		if last {
			s.shared.unkeep(blockPrefix + r.Leaf)
		}
	}
	for _, name := range blocks {
		if gone.Remote == nil || name != gone.Remote.Leaf {
			s.shared.unkeep(blockPrefix + name)
		}
		if err := s.shared.settle(ctx, s.blockMount(blockRef{name: name})); err != nil {
			return err
		}
	}
	for _, id := range disksOf(gone.Uses) {
		if id == gone.id {
			continue
		}
		if err := s.settleDisk(ctx, id); err != nil {
			return err
		}
	}
	s.o.step("uses settled")
	if err := s.removeDir(s.dir(gone.id)); err != nil {
		return err
	}
	s.o.step("directory removed")
	return s.update(ctx, func(_ context.Context, r records) error { return r.forget(gone.id) })
}

// settleDisk takes down a committed disk that no child needs.
func (s *Snapshotter) settleDisk(ctx context.Context, id string) error {
	var l link
	err := s.view(ctx, func(_ context.Context, r records) (err error) {
		l.id = id
		l.record, err = r.get(id)
		return err
	})
	if err != nil || l.Form != formDisk {
		return err // removed itself, and cleaned up by that
	}
	s.shared.unkeep(s.disk(l).key())
	return s.shared.settle(ctx, s.disk(l))
}

func blocksOf(uses []string) []string { return withPrefix(uses, blockPrefix) }
func disksOf(uses []string) []string  { return withPrefix(uses, diskPrefix) }

func withPrefix(uses []string, prefix string) (names []string) {
	for _, u := range uses {
		if name, ok := strings.CutPrefix(u, prefix); ok {
			names = append(names, name)
		}
	}
	return names
}

// removeDir deletes the directory of a snapshot. It never reaches into a mount:
// what is mounted there belongs to somebody.
func (s *Snapshotter) removeDir(dir string) error {
	mounts, err := s.mounter.Mounts(dir)
	if err != nil {
		return err
	}
	if len(mounts) > 0 {
		return kind.Errorf(kind.InUse, "remove %s: %s is a mount", dir, mounts[0].Target)
	}
	if err := os.RemoveAll(dir); err != nil {
		return fmt.Errorf("remove snapshot directory: %w", err)
	}
	return nil
}

// removeOrphans deletes directories that no snapshot has. At start that includes
// those which a killed process was making.
func (s *Snapshotter) removeOrphans(ctx context.Context, start bool) error {
	var orphans []string
	// The write transaction keeps out those who put a directory in place.
	err := s.update(ctx, func(ctx context.Context, r records) error {
		ids, err := storage.IDMap(ctx)
		if err != nil && !errdefs.IsNotFound(err) {
			return err
		}
		retired, err := r.removed()
		if err != nil {
			return err
		}
		keep := map[string]bool{}
		for id := range ids {
			keep[id] = true
		}
		for _, l := range retired {
			keep[l.id] = true
		}
		entries, err := os.ReadDir(s.snapshotsDir())
		for _, e := range entries {
			if !keep[e.Name()] && (start || !strings.HasPrefix(e.Name(), "new-")) {
				orphans = append(orphans, e.Name())
			}
		}
		return err
	})
	errs := []error{err}
	for _, name := range orphans {
		errs = append(errs, s.mounter.Unmount(ctx, filepath.Join(s.dir(name), diskDir)))
		errs = append(errs, s.removeDir(s.dir(name)))
	}
	return errors.Join(errs...)
}
