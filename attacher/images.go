package attacher

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"go.etcd.io/bbolt"

	attacherv1 "github.com/thaw-project/thaw/api/attacher/v1"
	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/lvol"
)

// lockImages counts a call in and keeps images as they are until the returned
// function is called.
func (a *Attacher) lockImages(ctx context.Context) (func(), error) {
	if err := a.enter(); err != nil {
		return nil, err
	}
	unlock, err := a.images.Lock(ctx, "")
	if err != nil {
		a.calls.Done()
		return nil, fmt.Errorf("wait for another operation on images: %w", err)
	}
	return func() { unlock(); a.calls.Done() }, nil
}

// PutImage implements attacherv1.AttacherServer. The blocks must exist and be
// read-only. They belong to the image from then on and to no hold. What the image had
// before under this reference and platform is deleted as soon as nothing uses it.
func (a *Attacher) PutImage(ctx context.Context, r *attacherv1.PutImageRequest) (*attacherv1.Image, error) {
	image := imageFromProto(r.GetImage())
	if err := image.validate(); err != nil {
		return nil, kind.Wrap(kind.Invalid, err)
	}
	done, err := a.lockImages(ctx)
	if err != nil {
		return nil, err
	}
	defer done()
	if err := a.putImage(ctx, &image); err != nil {
		return nil, fmt.Errorf("record image %s: %w", image.Reference, err)
	}
	a.step("put image: recorded")
	if _, err := a.release(ctx); err != nil {
		// The image is recorded; the sweep goes on with the rest.
		a.o.Logger.Warn("cannot remove what an image replaced yet", "image", image.Reference, "error", err)
	}
	return image.proto(), nil
}

// putImage records the image and what it makes superfluous in one transaction.
func (a *Attacher) putImage(ctx context.Context, image *imageRecord) error {
	unlock, err := a.names.Lock(ctx, image.Blocks...)
	if err != nil {
		return err
	}
	defer unlock()
	for _, name := range image.Blocks {
		info, err := a.o.Lvols.Get(name)
		if err != nil {
			return fmt.Errorf("block %s: %w", name, err)
		}
		if !info.Snapshot && !info.ReadOnly {
			return kind.Errorf(kind.Invalid, "block %s is writable: images share only what cannot change", name)
		}
	}
	key := imageKey(image.Reference, image.Platform)
	var result, old imageRecord
	err = a.db.Update(func(tx *bbolt.Tx) error {
		result, old = *image, imageRecord{}
		if raw := tx.Bucket(imagesBucket).Get([]byte(key)); raw != nil {
			if old, err = decodeImage([]byte(key), raw); err != nil {
				return err
			}
			if equalImages(old, result) {
				result = old
				return nil
			}
		}
		if result.CreatedUnixNanos == 0 {
			result.CreatedUnixNanos = a.o.Now().UnixNano()
		}
		for _, name := range result.Blocks {
			// A hold's lvol becomes the image's.
			if tx.Bucket(workBucket).Get([]byte(name)) != nil {
				if err := tx.Bucket(workBucket).Delete([]byte(name)); err != nil {
					return err
				}
				if err := put(tx, blocksBucket, name, blockRecord{CompletedUnixNanos: a.o.Now().UnixNano()}); err != nil {
					return err
				}
			}
			if err := tx.Bucket(removalsBucket).Delete([]byte(name)); err != nil {
				return err
			}
		}
		for depth, name := range old.Blocks {
			if !slices.Contains(result.Blocks, name) {
				if err := put(tx, removalsBucket, name, removalRecord{Depth: depth}); err != nil {
					return err
				}
			}
		}
		return put(tx, imagesBucket, key, result)
	})
	if err != nil {
		return err
	}
	a.noteImage(old.Blocks, result.Blocks)
	*image = result
	return nil
}

// noteImage notes that an image names blocks other than before.
func (a *Attacher) noteImage(before, after []string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, name := range after {
		a.named[name]++
	}
	for _, name := range before {
		if a.named[name]--; a.named[name] == 0 {
			delete(a.named, name)
		}
	}
}

// inImage tells whether an image names block. Whoever must know that none will soon has
// images locked.
func (a *Attacher) inImage(block string) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.named[block] > 0
}

// equalImages compares what identifies an image, which is not when it was recorded.
func equalImages(a, b imageRecord) bool {
	return a.Source == b.Source && a.ManifestDigest == b.ManifestDigest && a.Mode == b.Mode && a.Filesystem == b.Filesystem &&
		a.VirtualSizeBytes == b.VirtualSizeBytes && slices.Equal(a.Blocks, b.Blocks) && slices.Equal(a.ChainIDs, b.ChainIDs)
}

// findImages returns the images of reference, of one platform or, if it is empty, all.
func (a *Attacher) findImages(reference, platform string) (found []imageRecord, err error) {
	prefix := []byte(imageKey(reference, platform))
	err = a.db.View(func(tx *bbolt.Tx) error {
		c := tx.Bucket(imagesBucket).Cursor()
		for k, v := c.Seek(prefix); k != nil && bytes.HasPrefix(k, prefix); k, v = c.Next() {
			i, err := decodeImage(k, v)
			if err != nil {
				return err
			}
			if platform == "" || i.Platform == platform {
				found = append(found, i)
			}
		}
		return nil
	})
	return found, err
}

func (a *Attacher) readImages() (images []imageRecord, err error) {
	err = a.db.View(func(tx *bbolt.Tx) error {
		images, err = allImages(tx)
		return err
	})
	return images, err
}

// GetImage implements attacherv1.AttacherServer.
func (a *Attacher) GetImage(_ context.Context, r *attacherv1.GetImageRequest) (*attacherv1.Image, error) {
	if err := a.enter(); err != nil {
		return nil, err
	}
	defer a.calls.Done()
	found, err := a.findImages(r.GetReference(), r.GetPlatform())
	if err != nil {
		return nil, err
	}
	switch {
	case len(found) == 1:
		return found[0].proto(), nil
	case len(found) > 1:
		var platforms []string
		for _, i := range found {
			platforms = append(platforms, i.Platform)
		}
		return nil, kind.Errorf(kind.Invalid, "image %s has platforms %s: choose one", r.GetReference(), strings.Join(platforms, ", "))
	case r.GetPlatform() != "":
		return nil, kind.Errorf(kind.NotFound, "image %.300s for %.80s has not been converted here", r.GetReference(), r.GetPlatform())
	}
	return nil, kind.Errorf(kind.NotFound, "image %.300s has not been converted here", r.GetReference())
}

// ListImages implements attacherv1.AttacherServer.
func (a *Attacher) ListImages(context.Context, *attacherv1.ListImagesRequest) (*attacherv1.ListImagesResponse, error) {
	if err := a.enter(); err != nil {
		return nil, err
	}
	defer a.calls.Done()
	images, err := a.readImages()
	if err != nil {
		return nil, err
	}
	out := &attacherv1.ListImagesResponse{}
	for _, i := range images {
		out.Images = append(out.Images, i.proto())
	}
	return out, nil
}

// DeleteImage implements attacherv1.AttacherServer. Only blocks that came from
// conversions are deleted; an lvol made by hand stays whatever its name.
func (a *Attacher) DeleteImage(ctx context.Context, r *attacherv1.DeleteImageRequest) (*attacherv1.DeleteImageResponse, error) {
	done, err := a.lockImages(ctx)
	if err != nil {
		return nil, err
	}
	defer done()
	going, err := a.findImages(r.GetReference(), r.GetPlatform())
	if err != nil {
		return nil, err
	}
	named := make(map[string]int) // by how many of those that go
	for _, i := range going {
		for _, name := range i.Blocks {
			named[name]++
		}
	}
	kept := make(map[string]bool)
	a.mu.Lock()
	for name, n := range named {
		kept[name] = a.named[name] > n
	}
	a.mu.Unlock()
	depths := make(map[string]int)
	for _, i := range going {
		for depth, name := range i.Blocks {
			if kept[name] {
				continue
			}
			if node := a.attachedBy(name); node != "" {
				return nil, kind.Errorf(kind.InUse, "remove image %s: its block %s is attached on a node (%s): remove the containers and containerd's copy of the image there first", i.Reference, name, node)
			}
			depths[name] = max(depths[name], depth)
		}
	}
	if err := a.db.Update(func(tx *bbolt.Tx) error {
		for _, i := range going {
			if err := tx.Bucket(imagesBucket).Delete([]byte(imageKey(i.Reference, i.Platform))); err != nil {
				return err
			}
		}
		for name, depth := range depths {
			if err := put(tx, removalsBucket, name, removalRecord{Depth: depth}); err != nil {
				return err
			}
		}
		return nil
	}); err != nil {
		return nil, fmt.Errorf("remove image %s: %w", r.GetReference(), err)
	}
	for _, i := range going {
		a.noteImage(i.Blocks, nil)
	}
	a.step("delete image: recorded")
	// The image is gone whatever comes next; what cannot be deleted now, the sweep
	// deletes. Blocks of earlier removals may be among the deleted.
	deleted, err := a.release(ctx)
	if err != nil {
		return nil, fmt.Errorf("image %s is removed, but not all of its blocks yet: %w", r.GetReference(), err)
	}
	return &attacherv1.DeleteImageResponse{DeletedBlocks: deleted}, nil
}

// releasePending is release for the sweep.
func (a *Attacher) releasePending(ctx context.Context) error {
	unlock, err := a.images.Lock(ctx, "")
	if err != nil {
		return err
	}
	defer unlock()
	_, err = a.release(ctx)
	return err
}

// fate is what release decided about a block.
type fate int

const (
	fateDeleted fate = iota // it is gone
	fateKept                // something else needs it, which has its own way to end it
	fateBusy                // try again later
)

// release deletes the blocks recorded for removal that nothing uses, clones before
// their parents, and returns their names. Those a node has attached stay recorded.
// The caller has images locked.
func (a *Attacher) release(ctx context.Context) (deleted []string, err error) {
	defer func() { a.retryAfter(err) }()
	var removals map[string]removalRecord
	ours := make(map[string]bool) // of the removals, those that came from conversions
	if err := a.db.View(func(tx *bbolt.Tx) (err error) {
		if removals, err = all[removalRecord](tx, removalsBucket); err != nil {
			return err
		}
		for name := range removals {
			if _, ours[name], err = get[blockRecord](tx, blocksBucket, name); err != nil {
				return err
			}
		}
		return nil
	}); err != nil {
		return nil, err
	}
	if len(removals) == 0 {
		return nil, nil
	}
	order := slices.SortedFunc(maps.Keys(removals), func(x, y string) int {
		if d := removals[y].Depth - removals[x].Depth; d != 0 {
			return d
		}
		return strings.Compare(x, y)
	})
	var errs []error
	fates := make(map[string]fate)
	// Depths of different images are not one order, so a parent may come before its
	// last clone: go on as long as a round deletes something.
	for progress := true; progress; {
		progress = false
		for _, name := range order {
			if f, ok := fates[name]; ok && f == fateDeleted {
				continue
			}
			if err := ctx.Err(); err != nil {
				return deleted, errors.Join(append(errs, a.settle(fates))...)
			}
			if !ours[name] || a.inImage(name) {
				fates[name] = fateKept
				continue
			}
			f, err := a.releaseOne(ctx, name, fates, removals)
			if err != nil {
				errs = append(errs, fmt.Errorf("delete block %s: %w", name, err))
			}
			fates[name] = f
			if f == fateDeleted {
				progress = true
				deleted = append(deleted, name)
			}
			if errors.Is(err, kind.Unavailable) { // so it is for the rest
				break
			}
		}
		if len(errs) > 0 {
			break
		}
	}
	return deleted, errors.Join(append(errs, a.settle(fates))...)
}

func (a *Attacher) releaseOne(ctx context.Context, name string, fates map[string]fate, removals map[string]removalRecord) (fate, error) {
	unlock, err := a.names.Lock(ctx, name)
	if err != nil {
		return fateBusy, err
	}
	defer unlock()
	info, err := a.o.Lvols.Get(name)
	if err == nil {
		// First: a writable layer over it is a clone of it that somebody deletes.
		if a.attached(name) {
			return fateBusy, nil
		}
		for _, c := range info.Clones {
			// A clone that waits for its own removal must find its parent waiting too.
			if _, waits := removals[c]; waits && fates[c] != fateKept {
				return fateBusy, nil
			}
		}
		if len(info.Clones) > 0 {
			return fateKept, nil
		}
		err = a.o.Lvols.Delete(name)
	}
	switch {
	case errors.Is(err, kind.InUse): // a node was faster
		return fateBusy, nil
	case err != nil && !errors.Is(err, kind.NotFound):
		return fateBusy, err
	}
	a.step("release: deleted")
	// Under the lock: once it is free, a conversion may make the block anew.
	return fateDeleted, a.drop(name, removalsBucket, blocksBucket, renamesBucket)
}

// settle forgets the removals of blocks that something else needs.
func (a *Attacher) settle(fates map[string]fate) error {
	kept := slices.DeleteFunc(slices.Collect(maps.Keys(fates)), func(name string) bool { return fates[name] != fateKept })
	if len(kept) == 0 {
		return nil
	}
	return a.db.Update(func(tx *bbolt.Tx) error {
		for _, name := range kept {
			if err := tx.Bucket(removalsBucket).Delete([]byte(name)); err != nil {
				return err
			}
		}
		return nil
	})
}

// reusable are complete blocks that no image names, waits to remove, or has attached.
func (a *Attacher) reusable(minAge time.Duration) ([]lvol.Info, error) {
	infos, err := a.o.Lvols.List()
	if err != nil {
		return nil, fmt.Errorf("list lvols: %w", err)
	}
	var ours map[string]blockRecord
	var removals map[string]removalRecord
	if err := a.db.View(func(tx *bbolt.Tx) (err error) {
		if ours, err = all[blockRecord](tx, blocksBucket); err != nil {
			return err
		}
		removals, err = all[removalRecord](tx, removalsBucket)
		return err
	}); err != nil {
		return nil, err
	}
	oldest := a.o.Now().Add(-minAge)
	return slices.DeleteFunc(infos, func(i lvol.Info) bool {
		b, converted := ours[i.Name]
		_, going := removals[i.Name]
		return !converted || going || a.inImage(i.Name) || time.Unix(0, b.CompletedUnixNanos).After(oldest) || a.attached(i.Name)
	}), nil
}

// PruneBlocks implements attacherv1.AttacherServer.
func (a *Attacher) PruneBlocks(ctx context.Context, r *attacherv1.PruneBlocksRequest) (*attacherv1.PruneBlocksResponse, error) {
	if r.GetMinAgeNanos() < 0 {
		return nil, kind.Errorf(kind.Invalid, "prune blocks: age %d is negative", r.GetMinAgeNanos())
	}
	done, err := a.lockImages(ctx)
	if err != nil {
		return nil, err
	}
	defer done()
	candidates, err := a.reusable(time.Duration(r.GetMinAgeNanos()))
	if err != nil {
		return nil, fmt.Errorf("prune blocks: %w", err)
	}
	candidates = prunable(candidates)
	names := make([]string, 0, len(candidates))
	for _, c := range candidates {
		names = append(names, c.Name)
	}
	if r.GetDryRun() {
		return &attacherv1.PruneBlocksResponse{Blocks: names}, nil
	}
	if err := a.db.Update(func(tx *bbolt.Tx) error {
		for depth, name := range names {
			if err := put(tx, removalsBucket, name, removalRecord{Depth: len(names) - depth}); err != nil {
				return err
			}
		}
		return nil
	}); err != nil {
		return nil, fmt.Errorf("prune blocks: %w", err)
	}
	deleted, err := a.release(ctx)
	if err != nil {
		return nil, fmt.Errorf("prune blocks: %w", err)
	}
	return &attacherv1.PruneBlocksResponse{Blocks: deleted}, nil
}

// prunable orders candidates clones first and leaves out those that a clone outside
// of them needs.
func prunable(candidates []lvol.Info) []lvol.Info {
	left := slices.Clone(candidates)
	gone := make(map[string]bool, len(candidates))
	out := make([]lvol.Info, 0, len(candidates))
	for progress := true; progress; {
		progress = false
		left = slices.DeleteFunc(left, func(i lvol.Info) bool {
			if slices.ContainsFunc(i.Clones, func(c string) bool { return !gone[c] }) {
				return false
			}
			gone[i.Name], progress = true, true
			out = append(out, i)
			return true
		})
	}
	return out
}
