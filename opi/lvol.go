package opi

import (
	"context"
	"errors"
	"slices"
	"strings"

	"google.golang.org/protobuf/types/known/emptypb"

	lvolv1 "github.com/thaw-project/thaw/api/lvol/v1"
	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/spdk"
)

// maxLvolBytes bounds an lvol: 1 PiB, more than any device below.
const maxLvolBytes = 1 << 50

// lvol is an lvol as the target has it.
type lvol struct {
	spdk.Lvol
	store *spdk.LvolStore // its name, UUID and cluster size; other figures may be old
	bdev  *spdk.Bdev      // nil when it is degraded
}

func (l *lvol) alias() string { return l.store.Name + "/" + l.Name }
func (l *lvol) name() string  { return join(lvolStores, l.store.Name, lvols, l.Name) }

// sibling is the name of another lvol of the store.
func (l *lvol) sibling(name string) string {
	if name == "" {
		return ""
	}
	return join(lvolStores, l.store.Name, lvols, name)
}

// detail is what its bdev says; all zero without one.
func (l *lvol) detail() spdk.BdevLvol {
	if l.bdev == nil || l.bdev.Specific.Lvol == nil {
		return spdk.BdevLvol{}
	}
	return *l.bdev.Specific.Lvol
}

func (l *lvol) proto() *lvolv1.Lvol {
	d := l.detail()
	p := &lvolv1.Lvol{Name: l.name(), Uuid: l.UUID, Snapshot: l.IsSnapshot, Degraded: l.IsDegraded, Thick: !l.IsThinProvisioned,
		Parent: l.sibling(d.BaseSnapshot), ExternalParent: d.ExternalSnapshotName, AllocatedBytes: int64(l.NumAllocatedClusters * l.store.ClusterSizeBytes)}
	p.ReadOnly = l.IsSnapshot
	if l.bdev != nil {
		p.SizeBytes = int64(l.bdev.SizeBytes())
		// SPDK has no word for an lvol that bdev_lvol_set_read_only was called for, but
		// does not let it be written.
		p.ReadOnly = p.ReadOnly || !l.bdev.SupportedIO.Write
		p.InUse = l.bdev.Claimed
	}
	for _, c := range slices.Sorted(slices.Values(d.Clones)) {
		p.Clones = append(p.Clones, l.sibling(c))
	}
	return p
}

// lvolsOf reads the lvols of a store, or of all when it is empty.
func (b *Bridge) lvolsOf(ctx context.Context, store string) ([]*lvol, error) {
	stores, err := b.spdk.BdevLvolGetLvstores(ctx, store)
	if err != nil {
		return nil, err
	}
	all, err := b.spdk.BdevLvolGetLvols(ctx, store)
	if err != nil {
		return nil, err
	}
	bdevs, err := b.spdk.BdevGetBdevs(ctx, spdk.BdevGetBdevsParams{})
	if err != nil {
		return nil, err
	}
	byUUID := make(map[string]*spdk.Bdev, len(bdevs))
	for i := range bdevs {
		byUUID[bdevs[i].UUID] = &bdevs[i]
	}
	var list []*lvol
	for i := range all {
		at := slices.IndexFunc(stores, func(s spdk.LvolStore) bool { return s.UUID == all[i].Store.UUID })
		if at >= 0 { // it came between the two calls
			list = append(list, &lvol{all[i], &stores[at], byUUID[all[i].UUID]})
		}
	}
	return list, nil
}

// lvolBdev reads an lvol that has a bdev, by its alias; nil when it finds none.
func (b *Bridge) lvolBdev(ctx context.Context, store, name string) (*lvol, error) {
	if err := checkName(name); err != nil {
		return nil, err
	}
	if err := checkName(store); err != nil {
		return nil, err
	}
	bdev, err := b.spdk.Bdev(ctx, store+"/"+name)
	if err == nil && bdev.Specific.Lvol != nil && slices.Contains(bdev.Aliases, store+"/"+name) {
		d := bdev.Specific.Lvol
		s, err := b.storeOf(ctx, store, d.StoreUUID)
		if err != nil {
			return nil, err
		}
		return &lvol{spdk.Lvol{Name: name, Alias: store + "/" + name, UUID: bdev.UUID, IsThinProvisioned: d.ThinProvision, IsSnapshot: d.Snapshot, IsClone: d.Clone,
			IsEsnapClone: d.EsnapClone, NumAllocatedClusters: d.NumAllocatedClusters}, s, bdev}, nil
	}
	if err != nil && !errors.Is(err, kind.NotFound) {
		return nil, err
	}
	_, err = b.store(ctx, store) // is it that what is missing?
	return nil, err
}

// lvol reads one. What has a bdev is found without a list of all.
func (b *Bridge) lvol(ctx context.Context, store, name string) (*lvol, error) {
	l, err := b.lvolBdev(ctx, store, name)
	if err != nil || l != nil {
		return l, err
	}
	s, err := b.store(ctx, store)
	if err != nil {
		return nil, err
	}
	all, err := b.spdk.BdevLvolGetLvols(ctx, store)
	for _, l := range all {
		if l.Name == name {
			return &lvol{l, s, nil}, nil
		}
	}
	if err == nil {
		err = kind.Errorf(kind.NotFound, "lvstore %s has no lvol %s", store, name)
	}
	return nil, err
}

// sureLvol is lvol for those who only read: what an lvstore does not have while it is
// being loaded is not taken for missing.
func (b *Bridge) sureLvol(ctx context.Context, store, name string) (*lvol, error) {
	l, err := b.lvolBdev(ctx, store, name)
	if l != nil || err != nil && !errors.Is(err, kind.NotFound) {
		return l, err
	}
	if err := b.spdk.BdevWaitForExamine(ctx); err != nil {
		return nil, err
	}
	return b.lvol(ctx, store, name)
}

// ensureLvol is ensure for an lvol. One without a bdev is looked for only when creating
// fails: the list of all is long.
func (b *Bridge) ensureLvol(ctx context.Context, store, name string, same func(*lvol) error, create func() error) (*lvol, error) {
	l, err := b.lvolBdev(ctx, store, name)
	if err != nil {
		return nil, err
	}
	if l == nil {
		cerr := create()
		if l, err = b.lvol(ctx, store, name); err != nil {
			if cerr != nil {
				err = cerr // why it is not there
			}
			return nil, err
		}
	}
	if err := same(l); err != nil {
		return nil, err
	}
	return l, nil
}

func (b *Bridge) lvolNamed(ctx context.Context, name string) (*lvol, error) {
	texts, err := parse(name, lvolStores, lvols)
	if err != nil {
		return nil, err
	}
	return b.lvol(ctx, texts[0], texts[1])
}

// again reads an lvol that was changed.
func (b *Bridge) again(ctx context.Context, l *lvol) (*lvolv1.Lvol, error) {
	l, err := b.lvol(ctx, l.store.Name, l.Name)
	if err != nil {
		return nil, err
	}
	return l.proto(), nil
}

// checkSize bounds the size that a caller asks for.
func checkSize(bytes int64) error {
	if bytes <= 0 || bytes > maxLvolBytes {
		return kind.Errorf(kind.Invalid, "size_bytes %d is not in 1 to 1 PiB", bytes)
	}
	return nil
}

// mebibytes rounds up to what SPDK counts in.
func mebibytes(bytes int64) uint64 { return (uint64(bytes) + 1<<20 - 1) >> 20 }

// rounded is the size that an lvol gets: in whole MiB, then in whole clusters.
func (l *lvol) rounded(bytes int64) uint64 {
	cluster := max(l.store.ClusterSizeBytes, 1)
	return (mebibytes(bytes)<<20 + cluster - 1) / cluster * cluster
}

// CreateLvol makes an lvol.
func (b *Bridge) CreateLvol(ctx context.Context, r *lvolv1.CreateLvolRequest) (*lvolv1.Lvol, error) {
	size := r.GetLvol().GetSizeBytes()
	if err := checkSize(size); err != nil {
		return nil, err
	}
	s, err := b.storeNamed(ctx, r.GetParent())
	if err != nil {
		return nil, err
	}
	l, err := b.ensureLvol(ctx, s.Name, r.GetLvolId(), func(l *lvol) error {
		switch {
		case l.IsSnapshot:
			return kind.Errorf(kind.Exists, "%s exists and is a snapshot: delete it first", l.name())
		case l.bdev != nil && l.bdev.SizeBytes() != l.rounded(size):
			return differs(l.name(), "size", l.bdev.SizeBytes(), l.rounded(size))
		case !l.IsClone && l.IsThinProvisioned == r.Lvol.Thick: // a snapshot makes its lvol thin
			return differs(l.name(), "thick", !l.IsThinProvisioned, r.Lvol.Thick)
		}
		return nil
	}, func() error {
		_, err := b.spdk.BdevLvolCreate(ctx, spdk.LvolCreateParams{Name: r.LvolId, SizeMiB: mebibytes(size), ThinProvision: !r.Lvol.Thick, StoreName: s.Name})
		return err
	})
	if err != nil {
		return nil, err
	}
	return l.proto(), nil
}

// maxAncestors bounds how far back a repeated SnapshotLvol looks for its snapshot.
const maxAncestors = 64

// SnapshotLvol makes a snapshot of an lvol.
func (b *Bridge) SnapshotLvol(ctx context.Context, r *lvolv1.SnapshotLvolRequest) (*lvolv1.Lvol, error) {
	l, err := b.lvolNamed(ctx, r.GetName())
	if err != nil {
		return nil, err
	}
	made, err := b.ensureLvol(ctx, l.store.Name, r.GetSnapshotId(), func(have *lvol) error {
		at, err := b.lvol(ctx, l.store.Name, l.Name) // as it is now
		for range maxAncestors {
			if err != nil {
				return err
			}
			parent := at.detail().BaseSnapshot
			if parent == have.Name {
				return nil
			}
			if parent == "" {
				break
			}
			at, err = b.lvol(ctx, l.store.Name, parent)
		}
		return kind.Errorf(kind.Exists, "%s exists and is no snapshot of %s: delete it first", have.name(), l.name())
	}, func() error {
		_, err := b.spdk.BdevLvolSnapshot(ctx, l.alias(), r.SnapshotId)
		return err
	})
	if err != nil {
		return nil, err
	}
	return made.proto(), nil
}

// CloneLvol makes a clone of a snapshot.
func (b *Bridge) CloneLvol(ctx context.Context, r *lvolv1.CloneLvolRequest) (*lvolv1.Lvol, error) {
	s, err := b.lvolNamed(ctx, r.GetName())
	if err != nil {
		return nil, err
	}
	made, err := b.ensureLvol(ctx, s.store.Name, r.GetLvolId(), func(have *lvol) error {
		if have.detail().BaseSnapshot != s.Name || have.IsSnapshot {
			return kind.Errorf(kind.Exists, "%s exists and is no clone of %s: delete it first", have.name(), s.name())
		}
		return nil
	}, func() error {
		_, err := b.spdk.BdevLvolClone(ctx, s.alias(), r.LvolId)
		return err
	})
	if err != nil {
		return nil, err
	}
	return made.proto(), nil
}

// CloneVolume makes an lvol that is a clone of a volume outside its lvstore.
func (b *Bridge) CloneVolume(ctx context.Context, r *lvolv1.CloneVolumeRequest) (*lvolv1.Lvol, error) {
	s, err := b.storeNamed(ctx, r.GetParent())
	if err != nil {
		return nil, err
	}
	parent, err := b.volume(ctx, r.GetVolumeNameRef())
	if err != nil {
		return nil, err
	}
	ours := false
	made, err := b.ensureLvol(ctx, s.Name, r.GetLvolId(), func(have *lvol) error {
		if !have.IsEsnapClone || have.bdev != nil && !b.isBdev(ctx, have.detail().ExternalSnapshotName, parent) {
			return kind.Errorf(kind.Exists, "%s exists and is no clone of %s: delete it first", have.name(), volumeName(parent))
		}
		return nil
	}, func() error {
		if err := b.spdk.BdevWaitForExamine(ctx); err != nil {
			return err
		}
		if _, err := b.spdk.BdevLvolCloneBdev(ctx, parent.UUID, s.Name, r.LvolId); err != nil {
			return err
		}
		ours = true
		return b.spdk.BdevWaitForExamine(ctx)
	})
	if err != nil {
		return nil, err
	}
	if made.bdev == nil { // SPDK answers success
		err := kind.Errorf(kind.InUse, "%s is a degraded clone: the target does not find its parent, which was to be %s with UUID %s", made.name(), volumeName(parent), parent.UUID)
		if ours { // one that was there may hold somebody's data
			err = kind.Wrap(kind.InUse, errors.Join(err, b.spdk.BdevLvolDelete(ctx, made.alias())))
		}
		return nil, err
	}
	return made.proto(), nil
}

// isBdev tells whether a name or UUID is of a bdev.
func (b *Bridge) isBdev(ctx context.Context, name string, bdev *spdk.Bdev) bool {
	if name == bdev.Name || strings.EqualFold(name, bdev.UUID) || slices.Contains(bdev.Aliases, name) {
		return true
	}
	v, err := b.spdk.Bdev(ctx, name)
	return err == nil && v.UUID == bdev.UUID
}

// GetLvol returns an lvol.
func (b *Bridge) GetLvol(ctx context.Context, r *lvolv1.GetLvolRequest) (*lvolv1.Lvol, error) {
	texts, err := parse(r.GetName(), lvolStores, lvols)
	if err != nil {
		return nil, err
	}
	l, err := b.sureLvol(ctx, texts[0], texts[1])
	if err != nil {
		return nil, err
	}
	return l.proto(), nil
}

// ListLvols lists the lvols of an lvstore, or of all.
func (b *Bridge) ListLvols(ctx context.Context, r *lvolv1.ListLvolsRequest) (*lvolv1.ListLvolsResponse, error) {
	store, err := parse1(r.GetParent(), lvolStores)
	if err != nil {
		return nil, err
	}
	if store == "-" { // aip.dev/159
		store = ""
	} else if err := checkName(store); err != nil {
		return nil, err
	}
	// What an lvstore that is being loaded does not have yet is not missing.
	if err := b.spdk.BdevWaitForExamine(ctx); err != nil {
		return nil, err
	}
	all, err := b.lvolsOf(ctx, store)
	if err != nil {
		return nil, err
	}
	part, next, err := page(all, (*lvol).name, r.GetPageSize(), r.GetPageToken())
	list := make([]*lvolv1.Lvol, 0, len(part))
	for _, l := range part {
		list = append(list, l.proto())
	}
	return &lvolv1.ListLvolsResponse{Lvols: list, NextPageToken: next}, err
}

// ResizeLvol sets an lvol's size.
func (b *Bridge) ResizeLvol(ctx context.Context, r *lvolv1.ResizeLvolRequest) (*lvolv1.Lvol, error) {
	if err := checkSize(r.GetSizeBytes()); err != nil {
		return nil, err
	}
	l, err := b.lvolNamed(ctx, r.GetName())
	if err != nil {
		return nil, err
	}
	if l.bdev != nil && l.bdev.SizeBytes() == l.rounded(r.GetSizeBytes()) {
		return l.proto(), nil
	}
	if err := b.spdk.BdevLvolResize(ctx, l.alias(), mebibytes(r.GetSizeBytes())); err != nil {
		return nil, err
	}
	return b.again(ctx, l)
}

// RenameLvol gives the lvol of a UUID another name.
func (b *Bridge) RenameLvol(ctx context.Context, r *lvolv1.RenameLvolRequest) (*lvolv1.Lvol, error) {
	texts, err := parse(r.GetName(), lvolStores, lvols)
	if err != nil {
		return nil, err
	}
	if err := canonical(r.GetUuid()); err != nil {
		return nil, err
	}
	l, err := b.ensureLvol(ctx, texts[0], r.GetLvolId(), func(have *lvol) error {
		if have.UUID != r.Uuid {
			return differs(have.name(), "uuid", have.UUID, r.Uuid)
		}
		return nil
	}, func() error {
		old, err := b.lvol(ctx, texts[0], texts[1])
		if err != nil {
			return err
		}
		if old.UUID != r.Uuid {
			return kind.Errorf(kind.NotFound, "%s has uuid %s, not %s", old.name(), old.UUID, r.Uuid)
		}
		return b.spdk.BdevLvolRename(ctx, old.alias(), r.LvolId)
	})
	if err != nil {
		return nil, err
	}
	return l.proto(), nil
}

// change does something to an lvol that may be done again.
func (b *Bridge) change(ctx context.Context, name string, do func(alias string) error) (*lvolv1.Lvol, error) {
	l, err := b.lvolNamed(ctx, name)
	if err != nil {
		return nil, err
	}
	if err := do(l.alias()); err != nil {
		return nil, err
	}
	return b.again(ctx, l)
}

// SetLvolReadOnly makes an lvol read-only.
func (b *Bridge) SetLvolReadOnly(ctx context.Context, r *lvolv1.SetLvolReadOnlyRequest) (*lvolv1.Lvol, error) {
	return b.change(ctx, r.GetName(), func(alias string) error { return b.spdk.BdevLvolSetReadOnly(ctx, alias) })
}

// InflateLvol makes an lvol independent of all parents.
func (b *Bridge) InflateLvol(ctx context.Context, r *lvolv1.InflateLvolRequest) (*lvolv1.Lvol, error) {
	return b.change(ctx, r.GetName(), func(alias string) error { return b.spdk.BdevLvolInflate(ctx, alias) })
}

// isParent tells whether an lvol's parent goes by a name.
func (b *Bridge) isParent(ctx context.Context, l *lvol, name string) bool {
	d := l.detail()
	if d.BaseSnapshot != "" {
		return l.sibling(d.BaseSnapshot) == name
	}
	if d.ExternalSnapshotName == "" {
		return false
	}
	if d.ExternalSnapshotName == name {
		return true
	}
	v, err := b.volume(ctx, name)
	return err == nil && b.isBdev(ctx, d.ExternalSnapshotName, v)
}

// DecoupleLvol makes an lvol independent of its parent.
func (b *Bridge) DecoupleLvol(ctx context.Context, r *lvolv1.DecoupleLvolRequest) (*lvolv1.Lvol, error) {
	if err := checkBdev(r.GetParent()); err != nil {
		return nil, err
	}
	l, err := b.lvolNamed(ctx, r.GetName())
	if err != nil {
		return nil, err
	}
	if !b.isParent(ctx, l, r.GetParent()) {
		return l.proto(), nil
	}
	if err := b.spdk.BdevLvolDecoupleParent(ctx, l.alias()); err != nil {
		return nil, err
	}
	return b.again(ctx, l)
}

// SetLvolParent makes an lvol the clone of something else.
func (b *Bridge) SetLvolParent(ctx context.Context, r *lvolv1.SetLvolParentRequest) (*lvolv1.Lvol, error) {
	l, err := b.lvolNamed(ctx, r.GetName())
	if err != nil {
		return nil, err
	}
	parent, err := b.volume(ctx, r.GetParent())
	if err != nil {
		return nil, err
	}
	if b.isParent(ctx, l, volumeName(parent)) {
		return l.proto(), nil
	}
	if d := parent.Specific.Lvol; d != nil && d.StoreUUID == l.store.UUID {
		err = b.spdk.BdevLvolSetParent(ctx, l.alias(), parent.Name)
	} else {
		err = b.spdk.BdevLvolSetParentBdev(ctx, l.alias(), parent.Name)
	}
	if err != nil {
		return nil, err
	}
	return b.again(ctx, l)
}

// DeleteLvol deletes an lvol.
func (b *Bridge) DeleteLvol(ctx context.Context, r *lvolv1.DeleteLvolRequest) (*emptypb.Empty, error) {
	err := remove(r.GetAllowMissing(), func() (*lvol, error) { return b.lvolNamed(ctx, r.GetName()) },
		func(l *lvol) error { return b.spdk.BdevLvolDelete(ctx, l.alias()) })
	return &emptypb.Empty{}, err
}
