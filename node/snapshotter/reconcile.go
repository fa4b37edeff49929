package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/thaw-project/thaw/node/imagemgmt"
)

// reconcile finishes what an earlier process left half done. It brings nothing up:
// that happens when somebody asks for it. What fails is logged and left to the
// janitor, for a node must start while its storage is away.
func (s *Snapshotter) reconcile(ctx context.Context) error {
	var retired []link
	err := s.view(ctx, func(_ context.Context, r records) (err error) {
		retired, err = r.removed()
		return err
	})
	if err != nil {
		return fmt.Errorf("read snapshot records: %w", err)
	}
	for _, l := range retired {
		s.cleanUpLogged(ctx, l)
	}
	s.warn("compare records with mounts and attachments", s.reconcileResources(ctx))
	s.warn("remove left-over directories", s.removeOrphans(ctx, true))
	return nil
}

// reconcileResources compares what is recorded with what is mounted and attached and
// takes away the difference, within this snapshotter's own directories and names. A
// killed process may leave a child that mounts something a moment later, so once at
// start is not enough.
func (s *Snapshotter) reconcileResources(ctx context.Context) error {
	needed := map[string]bool{} // resource keys
	disks := map[string]bool{}  // ids of snapshots with a disk
	err := s.view(ctx, func(_ context.Context, r records) error {
		for _, key := range r.names(bucketUses) {
			needed[key] = true
		}
		for _, leaf := range r.names(bucketLeaves) {
			member, err := r.toProtect(leaf)
			if err != nil {
				return err
			}
			if member.id != "" {
				needed[blockPrefix+leaf] = true
			}
		}
		return r.all(func(l link) error {
			if l.Form == formDisk {
				disks[l.id] = true
			}
			return nil
		})
	})
	if err != nil {
		return fmt.Errorf("read snapshot records: %w", err)
	}
	return errors.Join(s.reconcileMounts(ctx, needed), s.reconcileAttachments(ctx, needed, disks))
}

// reconcileMounts takes down every block whose mount point is there but which nobody
// needs.
func (s *Snapshotter) reconcileMounts(ctx context.Context, needed map[string]bool) error {
	entries, err := os.ReadDir(s.o.MountDir)
	errs := []error{err}
	for _, e := range entries {
		if b := (blockRef{name: e.Name()}); validName(b.name) && !needed[b.key()] {
			errs = append(errs, s.settleInTime(ctx, s.blockMount(b)))
		}
	}
	return errors.Join(errs...)
}

// reconcileAttachments ends attachments of ours that no record explains.
func (s *Snapshotter) reconcileAttachments(ctx context.Context, needed, disks map[string]bool) error {
	attachments, err := s.o.Images.List(ctx)
	errs := []error{err}
	for _, a := range attachments {
		for _, user := range a.Users {
			id, ours := strings.CutPrefix(user, s.diskIDPrefix)
			switch b := (blockRef{name: a.Block}); {
			case user == attachUser && !needed[b.key()]:
				errs = append(errs, s.settleInTime(ctx, s.blockMount(b)))
			case ours && !disks[id] && validName(id):
				// Its record is gone: at most a process died before it recorded the
				// snapshot at all.
				errs = append(errs, s.settleInTime(ctx, disk{s, id, imagemgmt.Block{Name: a.Block}}))
			case ours && disks[id] && !needed[diskPrefix+id]:
				// A committed disk without children.
				errs = append(errs, s.settleInTime(ctx, disk{s, id, imagemgmt.Block{Name: a.Block}}))
			}
		}
	}
	return errors.Join(errs...)
}

func (s *Snapshotter) settleInTime(ctx context.Context, r resource) error {
	ctx, cancel := context.WithTimeoutCause(ctx, s.o.AttachTimeout, errTimeout)
	defer cancel()
	return s.shared.settle(ctx, r)
}
