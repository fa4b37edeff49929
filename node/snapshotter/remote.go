package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/errdefs"

	"github.com/thaw-project/thaw/image/annotation"
	"github.com/thaw-project/thaw/image/block"
	"github.com/thaw-project/thaw/kind"
)

// labelRemote is the customary mark of a snapshot that was not unpacked.
const labelRemote = "containerd.io/snapshot/remote"

// Why a converted layer is unpacked the ordinary way; the values of a metric.
const (
	reasonLabels   = "labels"   // annotations of a newer version, or damaged
	reasonTarget   = "target"   // of a target that this node does not know
	reasonParent   = "parent"   // the layer below was unpacked for one of these reasons
	reasonConflict = "conflict" // the chainID is there already, on another parent
	reasonAttach   = "attach"   // attaching or mounting failed
	reasonTimeout  = "timeout"  // or took too long
)

// prepareRemote tries to commit the layer target without unpacking it. done means
// that the Prepare is answered, by err. Otherwise the layer is to be unpacked, and
// leaf is its image, if it is a converted one that could not be used.
func (s *Snapshotter) prepareRemote(ctx context.Context, target, key, parent string, labels map[string]string, opts []snapshots.Opt) (done bool, leaf string, err error) {
	ref, converted, parseErr := annotation.Parse(labels)
	var exists, elsewhere bool
	var parentFellBack string
	err = s.view(ctx, func(ctx context.Context, r records) error {
		_, info, _, err := storage.GetInfo(ctx, target)
		if err == nil && info.Kind == snapshots.KindCommitted {
			exists, elsewhere = info.Parent == parent, info.Parent != parent
		} else if err != nil && !errdefs.IsNotFound(err) {
			return err
		}
		if parent == "" {
			return nil
		}
		id, _, _, err := storage.GetInfo(ctx, parent)
		if err != nil {
			return fmt.Errorf("parent snapshot %q: %w", parent, err)
		}
		rec, err := r.get(id)
		parentFellBack = rec.FellBack
		return err
	})
	if err != nil {
		return true, "", err
	}
	if exists {
		// Whoever asks, for whichever image: the same chainID is the same content.
		return true, "", fmt.Errorf("snapshot %q: %w", target, errdefs.ErrAlreadyExists)
	}
	fallBack := func(reason string, err error) (bool, string, error) {
		s.metrics.fallbacks.WithLabelValues(reason).Inc()
		s.log.Warn("falling back to ordinary layers", "layer", target, "leaf", ref.Leaf, "reason", reason, "error", err)
		return false, ref.Leaf, nil
	}
	switch {
	case !converted:
		return false, "", nil
	case parseErr != nil:
		return fallBack(reasonLabels, parseErr)
	case !slices.Contains(s.o.Targets, ref.Target):
		return fallBack(reasonTarget, kind.Errorf(kind.NotFound, "the image is on target %q, this node knows %q", ref.Target, s.o.Targets))
	case elsewhere:
		return fallBack(reasonConflict, kind.Errorf(kind.Exists, "snapshot %q is there on another parent", target))
	case parentFellBack == ref.Leaf:
		return fallBack(reasonParent, nil)
	case parent == "" && ref.Index != 0:
		// Layers that are unpacked in parallel get their parents later, by Commit;
		// containerd finds a remote snapshot by its parent.
		return fallBack(reasonParent, kind.Errorf(kind.Invalid, "layer %d has no parent", ref.Index))
	}

	info := remoteOf(ref)
	leafMount := s.blockMount(blockRef{ref.Leaf, ref.Filesystem, ref.Target})
	release, err := s.attachLeaf(ctx, leafMount, *info)
	if err != nil {
		if ctx.Err() != nil {
			return true, "", fmt.Errorf("prepare layer %q: %w", target, err)
		}
		if errors.Is(err, errTimeout) {
			return fallBack(reasonTimeout, err)
		}
		return fallBack(reasonAttach, err)
	}
	defer release()
	s.o.step("leaf up")
	if err := s.commitRemote(ctx, target, key, parent, info, labels, opts); err != nil {
		return true, "", err
	}
	s.metrics.remotes.Inc()
	s.o.step("remote committed")
	if !info.top() {
		s.shared.lingerFor(leafMount.key(), s.o.LeafHold)
	} else {
		s.shared.unkeep(leafMount.key())
	}
	return true, "", fmt.Errorf("snapshot %q: %w", target, errdefs.ErrAlreadyExists)
}

// attachLeaf brings up the leaf block of an image and checks that it holds all its
// layers.
func (s *Snapshotter) attachLeaf(ctx context.Context, leaf blockMount, info remoteInfo) (release func(), err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, s.o.AttachTimeout, errTimeout)
	defer cancel()
	_, release, err = s.shared.acquire(ctx, leaf)
	if err != nil {
		return nil, err
	}
	info.Index = info.Count - 1
	if info.Mode == block.ModeOverlayfs {
		if _, err := s.checkLayers(ctx, &info); err != nil {
			release()
			return nil, err
		}
	}
	return release, nil
}

// commitRemote records the layer in one step: key is never seen as an active
// snapshot.
func (s *Snapshotter) commitRemote(ctx context.Context, target, key, parent string, info *remoteInfo, labels map[string]string, opts []snapshots.Opt) error {
	labels = maps.Clone(labels)
	labels[labelRemote] = "remote snapshot"
	opts = append(slices.Clone(opts), snapshots.WithLabels(labels))
	return s.update(ctx, func(ctx context.Context, r records) error {
		if _, err := storage.CreateSnapshot(ctx, snapshots.KindActive, key, parent, opts...); err != nil {
			return fmt.Errorf("create snapshot for layer %q: %w", target, err)
		}
		id, err := storage.CommitActive(ctx, key, target, snapshots.Usage{}, opts...)
		if err != nil {
			return fmt.Errorf("commit layer %q: %w", target, err)
		}
		rec := record{Form: formRemote, Remote: info}
		if info.top() {
			rec.Uses = []string{info.base().key()}
		}
		return r.put(id, rec)
	})
}

// protect makes sure that the blocks of the remote layers that came with leaf cannot
// be deleted while the layers are there. The attached leaf does that for all of them,
// being a clone at the end of their chain, and stays while the image's top layer
// does. When only lower layers remain, of which another image or a child was made,
// the highest one's own block takes the leaf's place, so that the image can go.
func (s *Snapshotter) protect(ctx context.Context, leaf string) error {
	var member link
	err := s.view(ctx, func(_ context.Context, r records) error {
		var err error
		member, err = r.toProtect(leaf)
		return err
	})
	if err != nil || member.id == "" {
		return err
	}
	own := s.blockMount(blockRef{member.Remote.Block, member.Remote.Filesystem, member.Remote.Target})
	_, release, err := s.shared.acquire(ctx, own)
	switch {
	case err == nil:
		defer release()
	case errors.Is(err, kind.NotFound), errors.Is(err, kind.Invalid), errors.Is(err, kind.Corrupt):
		// Nothing that holding it could protect.
		s.log.Error("the block of a committed layer is gone", "block", member.Remote.Block, "snapshot", member.id, "error", err)
	default:
		return fmt.Errorf("protect block %s: %w", member.Remote.Block, err)
	}
	s.o.step("own block up")
	return s.update(ctx, func(_ context.Context, r records) error {
		now, err := r.toProtect(leaf)
		if err != nil || now.id != member.id {
			return err // removed meanwhile, or the image was pulled again
		}
		now.Remote.Protected = true
		now.Uses = []string{own.key()}
		return r.put(now.id, now.record)
	})
}

// toProtect returns the remote layer whose own block must take the place of leaf, or
// the zero link.
func (r records) toProtect(leaf string) (link, error) {
	var highest link
	if r.used(blockPrefix + leaf) {
		return highest, nil
	}
	for _, id := range r.leafMembers(leaf) {
		rec, err := r.get(id)
		if err != nil {
			return link{}, err
		}
		if rec.Remote != nil && (highest.id == "" || rec.Remote.Index > highest.Remote.Index) {
			highest = link{id, rec}
		}
	}
	if highest.id != "" && highest.Remote.Protected {
		return link{}, nil
	}
	return highest, nil
}

// protectAll does protect for every leaf whose hold has ended.
func (s *Snapshotter) protectAll(ctx context.Context) error {
	var leaves []string
	err := s.view(ctx, func(_ context.Context, r records) error {
		leaves = r.names(bucketLeaves)
		return nil
	})
	errs := []error{err}
	for _, leaf := range leaves {
		if s.shared.keptUntil(blockPrefix + leaf).After(time.Now()) {
			continue
		}
		errs = append(errs, s.protect(ctx, leaf))
	}
	return errors.Join(errs...)
}
