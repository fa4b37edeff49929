package attacher

import (
	"context"
	"errors"
	"fmt"

	"go.etcd.io/bbolt"

	attacherv1 "github.com/thaw-project/thaw/api/attacher/v1"
	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/lvol"
)

// ProblemMissing is the type of problem when an image needs a block that does not
// exist, or a writable layer has lost its lvol; the other types are the store's.
const ProblemMissing = "missing"

// GetStore implements attacherv1.AttacherServer.
func (a *Attacher) GetStore(context.Context, *attacherv1.GetStoreRequest) (*attacherv1.Store, error) {
	if err := a.enter(); err != nil {
		return nil, err
	}
	defer a.calls.Done()
	s := a.o.Lvols.Stat()
	return &attacherv1.Store{
		Uuid: s.UUID, Target: a.o.Target, ClusterBytes: s.ClusterBytes, TotalClusters: s.TotalClusters, FreeClusters: s.FreeClusters,
	}, nil
}

// CheckStore implements attacherv1.AttacherServer.
func (a *Attacher) CheckStore(ctx context.Context, r *attacherv1.CheckStoreRequest) (*attacherv1.CheckStoreResponse, error) {
	if err := a.enter(); err != nil {
		return nil, err
	}
	defer a.calls.Done()
	report, err := a.o.Lvols.Check(ctx, lvol.CheckOptions{Repair: r.GetRepair(), Scrub: r.GetScrub()})
	if err != nil {
		return nil, fmt.Errorf("check the store: %w", err)
	}
	out := &attacherv1.CheckStoreResponse{
		CheckedClusters: report.CheckedClusters, ScrubbedBytes: report.ScrubbedBytes, MoreProblems: report.More,
	}
	for _, p := range report.Problems {
		out.Problems = append(out.Problems, &attacherv1.Problem{
			Type: string(p.Type), Lvol: p.Lvol, OffsetBytes: p.OffsetBytes, Detail: p.Detail, Repaired: p.Repaired,
		})
	}
	if err := a.checkImages(ctx, out); err != nil {
		return nil, fmt.Errorf("check images: %w", err)
	}
	return out, nil
}

// checkThere adds a problem when there is no lvol of that name.
func (a *Attacher) checkThere(out *attacherv1.CheckStoreResponse, name string, detail func() string) error {
	_, err := a.o.Lvols.Get(name)
	switch {
	case errors.Is(err, kind.NotFound) && len(out.Problems) < lvol.MaxProblems:
		out.Problems = append(out.Problems, &attacherv1.Problem{Type: ProblemMissing, Lvol: name, Detail: detail()})
	case errors.Is(err, kind.NotFound):
		out.MoreProblems++
	default:
		return err
	}
	return nil
}

// checkWritables adds writable layers whose lvols are gone.
func (a *Attacher) checkWritables(out *attacherv1.CheckStoreResponse) error {
	var made []writable
	if err := a.db.View(func(tx *bbolt.Tx) error {
		return writables(tx, "", func(w writable) error {
			if w.Made && !w.Deleting {
				made = append(made, w)
			}
			return nil
		})
	}); err != nil {
		return err
	}
	for _, w := range made {
		if err := a.checkThere(out, w.lvol(), func() string {
			return fmt.Sprintf("writable layer %s of node %s had this lvol and it does not exist: what was written is lost", w.id, w.node)
		}); err != nil {
			return err
		}
	}
	return nil
}

// checkImages adds blocks that images miss and blocks that miss an image.
func (a *Attacher) checkImages(ctx context.Context, out *attacherv1.CheckStoreResponse) error {
	unlock, err := a.images.Lock(ctx, "")
	if err != nil {
		return err
	}
	defer unlock()
	images, err := a.readImages()
	if err != nil {
		return err
	}
	for _, i := range images {
		for _, name := range i.Blocks {
			if err := a.checkThere(out, name, func() string {
				return fmt.Sprintf("image %s for %s needs this block and it does not exist: convert the image again", i.Reference, i.Platform)
			}); err != nil {
				return err
			}
		}
	}
	if err := a.checkWritables(out); err != nil {
		return err
	}
	reusable, err := a.reusable(0)
	if err != nil {
		return err
	}
	for _, i := range reusable {
		out.ReusableBlocks = append(out.ReusableBlocks, i.Name)
	}
	return nil
}
