//go:build ceph

package rbd

import (
	"context"
	"errors"
	"slices"

	"github.com/ceph/go-ceph/rbd"
	"github.com/google/uuid"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/lvol"
)

// Map implements attacher.Backend. The owner of what an lvol shows is the oldest lvol
// snapshot below it in which nobody changed the object since, so that what two blocks
// share has one owner; each snapshot shows it for ever. What a read-only lvol has itself
// has none, for it may be made writable.
func (b *Backend) Map(name string, offset int64, maxRuns int) (lvol.BlockMap, error) {
	if maxRuns <= 0 || maxRuns > lvol.MaxMapRuns {
		maxRuns = lvol.MaxMapRuns
	}
	var out lvol.BlockMap
	err := b.do(b.life, "map of lvol "+clip(name), b.o.Timeout, []string{name}, func(context.Context) error {
		r, err := b.find(name)
		if err != nil {
			return err
		}
		b.mu.RLock()
		cluster := b.index.store.ObjectBytes
		b.mu.RUnlock()
		switch {
		case !r.fixed():
			return kind.Errorf(kind.Invalid, "it can be written, so its map may change")
		case offset < 0 || offset >= r.SizeBytes || offset%cluster != 0:
			return kind.Errorf(kind.Invalid, "offset %d: must be a multiple of %d below %d", offset, cluster, r.SizeBytes)
		}
		owners, err := b.owners(r, cluster)
		if err != nil {
			return err
		}
		out = lvol.BlockMap{UUID: r.UUID, SizeBytes: r.SizeBytes, ClusterBytes: cluster}
		at := offset
		for at < r.SizeBytes {
			o := owners[at/cluster]
			end := at + cluster
			for end < r.SizeBytes && owners[end/cluster] == o {
				end += cluster
			}
			if len(out.Runs) == maxRuns {
				break
			}
			end = min(end, r.SizeBytes)
			out.Runs = append(out.Runs, lvol.Run{OffsetBytes: at, LengthBytes: end - at, Data: o.data, Owner: o.id})
			at = end
		}
		out.NextBytes = at
		return nil
	})
	return out, err
}

// owner is whose an object is.
type owner struct {
	data bool
	id   [16]byte
}

// owners tells for each object of r whose it is. A level is one lvol of r's ancestry: what
// changed between it and the one below it.
func (b *Backend) owners(r *lvolRecord, cluster int64) ([]owner, error) {
	out := make([]owner, (r.SizeBytes+cluster-1)/cluster)
	for level := r; level != nil; level = b.lvolByID(level.Parent) {
		extents, err := b.levelExtents(level)
		if err != nil {
			return nil, wrap(err, "look what lvol %s has", level.Name)
		}
		o := owner{data: true}
		if level.snapshot() {
			id, err := uuid.Parse(level.UUID)
			if err != nil {
				return nil, kind.Errorf(kind.Corrupt, "UUID of lvol %s: %w", level.Name, err)
			}
			o.id = id
		}
		for _, e := range extents {
			for i := e[0] / cluster; i <= (e[1]-1)/cluster && i < int64(len(out)); i++ {
				if !out[i].data {
					out[i] = o
				}
			}
		}
	}
	return out, nil
}

// levelExtents are the ranges in which an lvol differs from its parent, or that it has at
// all when it has none. Snapshots in between that are no lvols any more count as its own.
func (b *Backend) levelExtents(r *lvolRecord) ([][2]int64, error) {
	var all [][2]int64
	parent := b.lvolByID(r.Parent)
	image, snap := r.Image, r.ownSnap()
	for {
		from := ""
		if parent != nil && parent.Image == image {
			from = parent.Snap
		}
		extents, err := b.imageExtents(image, from, snap)
		if err != nil {
			return nil, err
		}
		all = append(all, extents...)
		if from != "" {
			return all, nil
		}
		b.mu.RLock()
		i := b.index.images[image]
		b.mu.RUnlock()
		if i == nil || i.Parent == "" || parent != nil && i.Parent == parent.Image && i.ParentSnap == parent.Snap {
			return all, nil
		}
		image, snap = i.Parent, i.ParentSnap
	}
}

func (b *Backend) imageExtents(image, from, snap string) ([][2]int64, error) {
	img, err := rbd.OpenImageReadOnly(b.c.pool, b.imageName(image), snap)
	if err != nil {
		return nil, err
	}
	size, err := img.GetSize()
	var extents [][2]int64
	if err == nil {
		extents, err = extentsOf(img, from, size)
	}
	return slices.Clip(extents), errors.Join(err, img.Close())
}
