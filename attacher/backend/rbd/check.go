//go:build ceph

package rbd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"

	"github.com/ceph/go-ceph/rbd"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/lvol"
)

// Check compares the index with the images in the pool: what an lvol needs and is not
// there is damage, what nothing needs is a leak that Repair removes. Scrub reads all that
// there is, which has Ceph verify its checksums.
func (b *Backend) Check(ctx context.Context, o lvol.CheckOptions) (lvol.Report, error) {
	var out lvol.Report
	err := b.do(ctx, "check store "+b.oid(), 0, nil, func(ctx context.Context) error {
		c := &check{b: b, o: o}
		err := c.run(ctx)
		out = c.report
		return err
	})
	if err != nil {
		return lvol.Report{}, err
	}
	return out, nil
}

type check struct {
	b      *Backend
	o      lvol.CheckOptions
	report lvol.Report
}

func (c *check) problem(p lvol.Problem) {
	if len(c.report.Problems) < lvol.MaxProblems {
		c.report.Problems = append(c.report.Problems, p)
	} else {
		c.report.More++
	}
}

func (c *check) run(ctx context.Context) error {
	b := c.b
	if c.o.Repair {
		if err := b.collect(ctx); err != nil {
			b.log.Info("not all that nothing needs could be removed", "error", err)
		}
	}
	names, err := rbd.GetImageNames(b.c.pool)
	if err != nil {
		return wrap(err, "list the pool's images")
	}
	there := make(map[string]bool, len(names))
	for _, n := range names {
		if id, ok := strings.CutPrefix(n, b.o.Prefix); ok {
			there[id] = true
		}
	}
	n, _ := b.needed()
	b.mu.RLock()
	lvols := slices.Collect(maps.Values(b.index.lvols))
	images := maps.Clone(b.index.images)
	making := maps.Clone(b.making)
	b.mu.RUnlock()
	slices.SortFunc(lvols, func(x, y *lvolRecord) int { return strings.Compare(x.Name, y.Name) })
	for _, r := range lvols {
		if ctx.Err() != nil {
			return kind.Wrap(kind.Canceled, context.Cause(ctx))
		}
		if !there[r.Image] && b.lvolByID(r.UUID) != nil {
			c.problem(lvol.Problem{Type: lvol.ProblemDamage, Lvol: r.Name, Detail: "its image " + b.imageName(r.Image) + " is not in the pool"})
			continue
		}
		if err := c.lvol(ctx, r); err != nil {
			return err
		}
	}
	for _, id := range slices.Sorted(maps.Keys(images)) {
		needs := n.heads[id]
		for _, s := range images[id].Snaps {
			needs = needs || n.snaps[[2]string{id, s}]
		}
		if !needs && there[id] && making[id] == 0 {
			c.problem(lvol.Problem{Type: lvol.ProblemLeak, Detail: "image " + b.imageName(id) + " is needed by nothing and could not be removed yet"})
		}
		delete(there, id)
	}
	for _, id := range slices.Sorted(maps.Keys(there)) {
		b.mu.RLock()
		known := b.index.images[id] != nil // made meanwhile
		b.mu.RUnlock()
		if !known {
			c.problem(lvol.Problem{Type: lvol.ProblemLeak, Detail: "image " + b.imageName(id) + " has this store's prefix and is not of it: 'rbd rm' it if it is nobody's"})
		}
	}
	return nil
}

// lvol checks that what shows r can be opened and has its size.
func (c *check) lvol(ctx context.Context, r *lvolRecord) error {
	b := c.b
	image, snap := b.source(r)
	damaged := func(offset int64, detail string) {
		if now := b.lvolByID(r.UUID); now == r { // else it was changed or deleted meanwhile
			c.problem(lvol.Problem{Type: lvol.ProblemDamage, Lvol: r.Name, OffsetBytes: offset, Detail: detail})
		}
	}
	img, err := rbd.OpenImageReadOnly(b.c.pool, b.imageName(image), snap)
	if err != nil {
		if isNotFound(err) {
			damaged(0, fmt.Sprintf("image %s has no snapshot %s", b.imageName(image), snap))
			return nil
		}
		return wrap(err, "open image %s", b.imageName(image))
	}
	err = c.image(ctx, r, img, damaged)
	return errors.Join(err, wrap(img.Close(), "close image %s", b.imageName(image)))
}

func (c *check) image(ctx context.Context, r *lvolRecord, img *rbd.Image, damaged func(int64, string)) error {
	size, err := img.GetSize()
	if err != nil {
		return wrap(err, "size of image %s", img.GetName())
	}
	if int64(size) != r.SizeBytes && r.ResizeBytes == 0 {
		damaged(0, fmt.Sprintf("its image has %d bytes, not %d", size, r.SizeBytes))
	}
	n, err := objects(img, c.b.snapBelow(r), size)
	if err != nil {
		return wrap(err, "look what image %s has", img.GetName())
	}
	c.report.CheckedClusters += n
	if !c.o.Scrub || r.Empty {
		return nil
	}
	extents, err := extentsOf(img, c.b.snapBelow(r), size)
	if err != nil {
		return wrap(err, "look what image %s has", img.GetName())
	}
	buf := make([]byte, 1<<20)
	for _, e := range extents {
		for off := e[0]; off < e[1]; off += int64(len(buf)) {
			if ctx.Err() != nil {
				return kind.Wrap(kind.Canceled, context.Cause(ctx))
			}
			n, err := img.ReadAt(buf[:min(int64(len(buf)), e[1]-off)], off)
			if err != nil && !errors.Is(err, io.EOF) {
				damaged(off, err.Error())
			}
			c.report.ScrubbedBytes += int64(n)
		}
	}
	return nil
}

// extentsOf are the ranges, from and to, in which an image differs from an older snapshot
// of it, or that it has at all when from is empty.
func extentsOf(img *rbd.Image, from string, size uint64) ([][2]int64, error) {
	var out [][2]int64
	if size == 0 {
		return nil, nil
	}
	err := img.DiffIterate(rbd.DiffIterateConfig{
		SnapName: from, Length: size, IncludeParent: rbd.ExcludeParent, WholeObject: rbd.EnableWholeObject,
		Callback: func(offset, length uint64, exists int, _ any) int {
			at, end := int64(offset), int64(offset+length)
			switch {
			case from == "" && exists == 0:
			case len(out) > 0 && out[len(out)-1][1] == at:
				out[len(out)-1][1] = end
			default:
				out = append(out, [2]int64{at, end})
			}
			return 0
		},
	})
	return out, err
}
