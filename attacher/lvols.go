package attacher

import (
	"context"
	"errors"
	"fmt"

	"go.etcd.io/bbolt"

	attacherv1 "github.com/thaw-project/thaw/api/attacher/v1"
	"github.com/thaw-project/thaw/image/block"
	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/lvol"
)

func protoLvol(i lvol.Info, owner string) *attacherv1.Lvol {
	created := int64(0) // not every store tells
	if !i.Created.IsZero() {
		created = i.Created.UnixNano()
	}
	return &attacherv1.Lvol{
		Name: i.Name, Uuid: i.UUID, SizeBytes: i.SizeBytes, AllocatedClusters: i.AllocatedClusters, ClusterBytes: i.ClusterBytes,
		Snapshot: i.Snapshot, ReadOnly: i.ReadOnly, Parent: i.Parent, Clones: i.Clones,
		CreatedUnixNanos: created, Owner: owner,
	}
}

// begin checks names, counts the call in, takes owner's hold and locks the names. The
// returned function undoes that.
func (a *Attacher) begin(ctx context.Context, owner string, names ...string) (func(), error) {
	for _, n := range names {
		if err := checkName("lvol name", n); err != nil {
			return nil, err
		}
	}
	if err := a.enter(); err != nil {
		return nil, err
	}
	done, err := a.use(owner)
	if err != nil {
		a.calls.Done()
		return nil, err
	}
	unlock, err := a.names.Lock(ctx, names...)
	if err != nil {
		done()
		a.calls.Done()
		return nil, fmt.Errorf("wait for another operation on lvol %s: %w", names[0], err)
	}
	return func() {
		unlock()
		done()
		a.calls.Done()
	}, nil
}

// isBlock tells names that images can have.
func isBlock(name string) bool {
	_, err := block.ParseName(name)
	return err == nil
}

// beginImages is begin for an operation that may take a block from under an image:
// it also keeps images as they are when one of the names is a block's.
func (a *Attacher) beginImages(ctx context.Context, names ...string) (func(), error) {
	unlock := func() {}
	for _, n := range names {
		if isBlock(n) {
			var err error
			if unlock, err = a.images.Lock(ctx, ""); err != nil {
				return nil, fmt.Errorf("wait for another operation on images: %w", err)
			}
			break
		}
	}
	done, err := a.begin(ctx, "", names...)
	if err != nil {
		unlock()
		return nil, err
	}
	return func() { done(); unlock() }, nil
}

func (a *Attacher) ownerOf(name string) (string, error) {
	r, _, err := lookup[workRecord](a.db, workBucket, name)
	return r.Owner, err
}

// vacate makes way for owner to create name: it deletes what a dead hold left under
// the name and refuses what a live one has there. The caller has the name locked.
func (a *Attacher) vacate(ctx context.Context, name, owner string) error {
	have, err := a.ownerOf(name)
	if err != nil || have == "" || have == owner {
		return err
	}
	if a.holds.Alive(have) {
		return kind.Wrap(kind.Exists, a.heldError(name, have))
	}
	if err := a.withdraw(ctx, name, withdrawWait); err != nil {
		return err
	}
	return a.deleteWork(ctx, name)
}

// CreateLvol implements attacherv1.AttacherServer.
func (a *Attacher) CreateLvol(ctx context.Context, r *attacherv1.CreateLvolRequest) (*attacherv1.Lvol, error) {
	name, owner := r.GetName(), r.GetOwner()
	done, err := a.begin(ctx, owner, name)
	if err != nil {
		return nil, err
	}
	defer done()
	if err := checkNewName(name); err != nil {
		return nil, err
	}
	if err := a.vacate(ctx, name, owner); err != nil {
		return nil, fmt.Errorf("create lvol %s: %w", name, err)
	}
	info, err := a.o.Lvols.Get(name)
	if err == nil {
		if err := a.same(info, owner, ""); err != nil {
			return nil, fmt.Errorf("create lvol %s: %w", name, err)
		}
		if info.SizeBytes != r.GetSizeBytes() {
			return nil, kind.Errorf(kind.Exists, "create lvol %s: it is there with %d bytes, not %d", name, info.SizeBytes, r.GetSizeBytes())
		}
		return protoLvol(info, owner), nil
	}
	if !errors.Is(err, kind.NotFound) {
		return nil, fmt.Errorf("create lvol %s: %w", name, err)
	}
	err = a.withIntent(name, owner, false, func() (err error) {
		info, err = a.o.Lvols.Create(name, r.GetSizeBytes())
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("create lvol %s: %w", name, err)
	}
	return protoLvol(info, owner), nil
}

// same tells whether an lvol that is there is what a repeated call created.
func (a *Attacher) same(info lvol.Info, owner, parent string) error {
	have, err := a.ownerOf(info.Name)
	switch {
	case err != nil:
		return err
	case have != owner && have == "":
		return kind.Errorf(kind.Exists, "it is there and belongs to no hold")
	case have != owner:
		return kind.Wrap(kind.Exists, a.heldError(info.Name, have))
	case info.Snapshot:
		return kind.Errorf(kind.Exists, "it is there as a snapshot")
	case info.Parent != parent && parent == "":
		return kind.Errorf(kind.Exists, "it is there as a clone of %s", info.Parent)
	case info.Parent != parent:
		return kind.Errorf(kind.Exists, "it is there and no clone of %s", parent)
	}
	return nil
}

// withIntent records that name is about to exist, as work of owner or as a block, and
// runs create. When create fails the record goes again.
func (a *Attacher) withIntent(name, owner string, asBlock bool, create func() error) error {
	bucket, record := workBucket, any(workRecord{Owner: owner})
	if asBlock {
		bucket, record = blocksBucket, blockRecord{CompletedUnixNanos: a.o.Now().UnixNano()}
	}
	if err := a.db.Update(func(tx *bbolt.Tx) error {
		// What an interrupted operation said of the name is about another lvol.
		for _, stale := range [][]byte{workBucket, blocksBucket, renamesBucket, removalsBucket} {
			if err := tx.Bucket(stale).Delete([]byte(name)); err != nil {
				return err
			}
		}
		if !asBlock && owner == "" {
			return nil
		}
		return put(tx, bucket, name, record)
	}); err != nil {
		return err
	}
	a.step("create: recorded")
	err := create()
	if err != nil {
		if _, gerr := a.o.Lvols.Get(name); errors.Is(gerr, kind.NotFound) {
			err = errors.Join(err, a.drop(name, bucket))
		}
		a.doubt(name, err)
		return err
	}
	a.step("create: created")
	return nil
}

// CloneLvol implements attacherv1.AttacherServer. A clone of a conversion's block that
// has a block's name and no owner is a block itself: an image's soldier.
func (a *Attacher) CloneLvol(ctx context.Context, r *attacherv1.CloneLvolRequest) (*attacherv1.Lvol, error) {
	snapshot, name, owner := r.GetSnapshot(), r.GetName(), r.GetOwner()
	done, err := a.begin(ctx, owner, snapshot, name)
	if err != nil {
		return nil, err
	}
	defer done()
	if err := checkNewName(name); err != nil {
		return nil, err
	}
	if snapshot == name {
		return nil, kind.Errorf(kind.Invalid, "clone lvol %s: a clone needs another name", name)
	}
	info, err := a.clone(ctx, snapshot, name, owner)
	if err == nil && r.GetReadOnly() && !info.ReadOnly {
		info, err = a.o.Lvols.SetReadOnly(name, true)
	}
	if err != nil {
		return nil, fmt.Errorf("clone lvol %s from %s: %w", name, snapshot, err)
	}
	return protoLvol(info, owner), nil
}

func (a *Attacher) clone(ctx context.Context, snapshot, name, owner string) (lvol.Info, error) {
	if err := a.vacate(ctx, name, owner); err != nil {
		return lvol.Info{}, err
	}
	info, err := a.o.Lvols.Get(name)
	if err == nil {
		return info, a.same(info, owner, snapshot)
	}
	if !errors.Is(err, kind.NotFound) {
		return lvol.Info{}, err
	}
	parent, err := a.o.Lvols.Get(snapshot)
	if err != nil {
		return lvol.Info{}, err
	}
	if !parent.Snapshot {
		return lvol.Info{}, kind.Errorf(kind.Invalid, "%s is not a snapshot: take one of it first", snapshot)
	}
	asBlock := false
	if owner == "" && isBlock(name) {
		if _, asBlock, err = lookup[blockRecord](a.db, blocksBucket, snapshot); err != nil {
			return lvol.Info{}, err
		}
	}
	err = a.withIntent(name, owner, asBlock, func() (err error) {
		info, err = a.o.Lvols.Clone(snapshot, name)
		return err
	})
	return info, err
}

// SnapshotLvol implements attacherv1.AttacherServer. It returns the snapshot. A
// snapshot of a hold's lvol under a block's name is a block, complete from then on.
func (a *Attacher) SnapshotLvol(ctx context.Context, r *attacherv1.SnapshotLvolRequest) (*attacherv1.Lvol, error) {
	name, snapshot := r.GetLvol(), r.GetSnapshot()
	done, err := a.begin(ctx, "", name, snapshot)
	if err != nil {
		return nil, err
	}
	defer done()
	if err := checkNewName(snapshot); err != nil {
		return nil, err
	}
	info, err := a.snapshot(ctx, name, snapshot)
	if err != nil {
		return nil, fmt.Errorf("snapshot lvol %s as %s: %w", name, snapshot, err)
	}
	return protoLvol(info, ""), nil
}

func (a *Attacher) snapshot(ctx context.Context, name, snapshot string) (lvol.Info, error) {
	if name == snapshot {
		return lvol.Info{}, kind.Errorf(kind.Invalid, "a snapshot needs another name")
	}
	info, err := a.o.Lvols.Get(name)
	if err != nil {
		return lvol.Info{}, err
	}
	if info.Parent == snapshot {
		made, err := a.o.Lvols.Get(snapshot)
		// A repeated call finds a snapshot younger than the lvol; one that is older is
		// what the lvol was cloned from. Where the store does not tell, it is taken for a
		// repeated call.
		if err == nil && made.Created.Before(info.Created) {
			err = kind.Errorf(kind.Exists, "%s is there and it is a clone of it", snapshot)
		}
		return made, err
	}
	if info.Snapshot {
		return lvol.Info{}, kind.Errorf(kind.Invalid, "it is a snapshot: clone it")
	}
	if err := a.vacate(ctx, snapshot, ""); err != nil {
		return lvol.Info{}, err
	}
	if _, err := a.o.Lvols.Get(snapshot); err == nil {
		return lvol.Info{}, kind.Errorf(kind.Exists, "%s is there and is not a snapshot of it", snapshot)
	} else if !errors.Is(err, kind.NotFound) {
		return lvol.Info{}, err
	}
	if x, ok, err := lookup[exportRecord](a.db, exportsBucket, name); err != nil {
		return lvol.Info{}, err
	} else if ok && !x.ReadOnly && x.Node == "" {
		disk, err := a.o.Presenter.Present(ctx, diskID(name), exportSource(name), false)
		if err != nil {
			return lvol.Info{}, err
		}
		if err := a.o.Sync(ctx, disk.Path); err != nil {
			return lvol.Info{}, err
		}
		a.step("snapshot: flushed")
	}
	owner, err := a.ownerOf(name)
	if err != nil {
		return lvol.Info{}, err
	}
	err = a.withIntent(snapshot, "", owner != "" && isBlock(snapshot), func() error {
		info, err = a.o.Lvols.Snapshot(name, snapshot)
		return err
	})
	if err != nil {
		return lvol.Info{}, err
	}
	return a.o.Lvols.Get(snapshot)
}

// GetLvol implements attacherv1.AttacherServer.
func (a *Attacher) GetLvol(_ context.Context, r *attacherv1.GetLvolRequest) (*attacherv1.Lvol, error) {
	if err := checkName("lvol name", r.GetName()); err != nil {
		return nil, err
	}
	if err := a.enter(); err != nil {
		return nil, err
	}
	defer a.calls.Done()
	info, err := a.o.Lvols.Get(r.GetName())
	if err != nil {
		return nil, fmt.Errorf("get lvol %s: %w", r.GetName(), err)
	}
	owner, err := a.ownerOf(info.Name)
	if err != nil {
		return nil, err
	}
	return protoLvol(info, owner), nil
}

// ListLvols implements attacherv1.AttacherServer.
func (a *Attacher) ListLvols(context.Context, *attacherv1.ListLvolsRequest) (*attacherv1.ListLvolsResponse, error) {
	if err := a.enter(); err != nil {
		return nil, err
	}
	defer a.calls.Done()
	infos, err := a.o.Lvols.List()
	if err != nil {
		return nil, fmt.Errorf("list lvols: %w", err)
	}
	var work map[string]workRecord
	if err := a.db.View(func(tx *bbolt.Tx) (err error) {
		work, err = all[workRecord](tx, workBucket)
		return err
	}); err != nil {
		return nil, err
	}
	out := &attacherv1.ListLvolsResponse{Lvols: make([]*attacherv1.Lvol, 0, len(infos))}
	for _, i := range infos {
		out.Lvols = append(out.Lvols, protoLvol(i, work[i.Name].Owner))
	}
	return out, nil
}

// DeleteLvol implements attacherv1.AttacherServer. An lvol that an image, an export,
// a node or a clone needs is kind.InUse.
func (a *Attacher) DeleteLvol(ctx context.Context, r *attacherv1.DeleteLvolRequest) (*attacherv1.DeleteLvolResponse, error) {
	name := r.GetName()
	done, err := a.beginImages(ctx, name)
	if err != nil {
		return nil, err
	}
	defer done()
	if err := a.deleteLvol(name); err != nil {
		return nil, fmt.Errorf("delete lvol %s: %w", name, err)
	}
	return &attacherv1.DeleteLvolResponse{}, nil
}

func (a *Attacher) deleteLvol(name string) error {
	info, err := a.o.Lvols.Get(name)
	if err != nil && !errors.Is(err, kind.NotFound) {
		return err
	}
	if err == nil {
		// The store merges a snapshot with its only clone. Not under an image: its
		// blocks are what other images are built on.
		if len(info.Clones) > 0 && isBlock(name) {
			return kind.Errorf(kind.InUse, "%s and %d others are clones of it", info.Clones[0], len(info.Clones)-1)
		}
		if err := a.unused(name); err != nil {
			return err
		}
		if err := a.o.Lvols.Delete(name); err != nil && !errors.Is(err, kind.NotFound) {
			a.doubt(name, err)
			return err
		}
		a.step("delete: deleted")
	}
	return a.drop(name, workBucket, blocksBucket, removalsBucket, renamesBucket)
}

// unused is nil when no image, export or node knows the lvol by its name. The caller
// has the name locked and, for a block's name, images.
func (a *Attacher) unused(name string) error {
	if x, ok, err := lookup[exportRecord](a.db, exportsBucket, name); err != nil {
		return err
	} else if ok {
		return kind.Errorf(kind.InUse, "it is exported to %s", x.Owner)
	}
	if node := a.attachedBy(name); node != "" {
		return kind.Errorf(kind.InUse, "a node uses it (%s)", node)
	}
	if !a.inImage(name) {
		return nil
	}
	return a.db.View(func(tx *bbolt.Tx) error {
		images, err := allImages(tx)
		if err != nil {
			return err
		}
		for _, i := range images {
			for _, b := range i.Blocks {
				if b == name {
					return kind.Errorf(kind.InUse, "it is a block of image %s: remove the image", i.Reference)
				}
			}
		}
		return nil
	})
}

// RenameLvol implements attacherv1.AttacherServer.
func (a *Attacher) RenameLvol(ctx context.Context, r *attacherv1.RenameLvolRequest) (*attacherv1.Lvol, error) {
	from, to := r.GetName(), r.GetNewName()
	done, err := a.beginImages(ctx, from, to)
	if err != nil {
		return nil, err
	}
	defer done()
	if err := checkNewName(to); err != nil {
		return nil, err
	}
	out, err := a.rename(ctx, from, to)
	if err != nil {
		return nil, fmt.Errorf("rename lvol %s to %s: %w", from, to, err)
	}
	return out, nil
}

func (a *Attacher) rename(ctx context.Context, from, to string) (*attacherv1.Lvol, error) {
	past, begun, err := lookup[renameRecord](a.db, renamesBucket, to)
	if err != nil {
		return nil, err
	}
	begun = begun && past.From == from // this very rename, by a call that may have died
	info, err := a.o.Lvols.Get(from)
	if errors.Is(err, kind.NotFound) && begun {
		if done, derr := a.o.Lvols.Get(to); derr == nil {
			return a.finishRename(done, from, to)
		}
	}
	if err != nil {
		return nil, err
	}
	if from == to {
		owner, err := a.ownerOf(to)
		return protoLvol(info, owner), err
	}
	if err := a.unused(from); err != nil {
		return nil, err
	}
	if !begun {
		if err := a.vacate(ctx, to, ""); err != nil {
			return nil, err
		}
	}
	if _, err := a.o.Lvols.Get(to); err == nil {
		return nil, kind.Errorf(kind.Exists, "there is an lvol of that name")
	} else if !errors.Is(err, kind.NotFound) {
		return nil, err
	}
	// Under both names until it has one: whichever exists after a crash has its owner.
	if err := a.db.Update(func(tx *bbolt.Tx) error {
		for _, bucket := range [][]byte{workBucket, blocksBucket} {
			b := tx.Bucket(bucket)
			if raw := b.Get([]byte(from)); raw != nil {
				if err := b.Put([]byte(to), append([]byte(nil), raw...)); err != nil {
					return err
				}
			}
		}
		return put(tx, renamesBucket, to, renameRecord{From: from})
	}); err != nil {
		return nil, err
	}
	a.step("rename: recorded")
	if info, err = a.o.Lvols.Rename(from, to); err != nil {
		if _, gerr := a.o.Lvols.Get(to); errors.Is(gerr, kind.NotFound) {
			err = errors.Join(err, a.drop(to, workBucket, blocksBucket, renamesBucket))
		}
		a.doubt(from, err)
		a.doubt(to, err)
		return nil, err
	}
	a.step("rename: renamed")
	return a.finishRename(info, from, to)
}

func (a *Attacher) finishRename(info lvol.Info, from, to string) (*attacherv1.Lvol, error) {
	if err := a.drop(from, workBucket, blocksBucket, renamesBucket, removalsBucket); err != nil {
		return nil, err
	}
	owner, err := a.ownerOf(to)
	return protoLvol(info, owner), err
}

// ResizeLvol implements attacherv1.AttacherServer.
func (a *Attacher) ResizeLvol(ctx context.Context, r *attacherv1.ResizeLvolRequest) (*attacherv1.Lvol, error) {
	name, size := r.GetName(), r.GetSizeBytes()
	done, err := a.beginImages(ctx, name)
	if err != nil {
		return nil, err
	}
	defer done()
	info, err := a.o.Lvols.Get(name)
	if err == nil && info.SizeBytes != size {
		switch {
		case info.Snapshot || info.ReadOnly:
			err = kind.Errorf(kind.ReadOnly, "it is read-only")
		default:
			if err = a.unused(name); err == nil {
				info, err = a.o.Lvols.Resize(name, size)
			}
		}
	}
	if err != nil {
		return nil, fmt.Errorf("resize lvol %s to %d bytes: %w", name, size, err)
	}
	owner, err := a.ownerOf(name)
	return protoLvol(info, owner), err
}

// InflateLvol implements attacherv1.AttacherServer.
func (a *Attacher) InflateLvol(ctx context.Context, r *attacherv1.InflateLvolRequest) (*attacherv1.Lvol, error) {
	return a.detachParent(ctx, "inflate", r.GetName(), a.o.Lvols.Inflate)
}

// DecoupleLvol implements attacherv1.AttacherServer.
func (a *Attacher) DecoupleLvol(ctx context.Context, r *attacherv1.DecoupleLvolRequest) (*attacherv1.Lvol, error) {
	return a.detachParent(ctx, "decouple", r.GetName(), a.o.Lvols.Decouple)
}

func (a *Attacher) detachParent(ctx context.Context, verb, name string, act func(context.Context, string) (lvol.Info, error)) (*attacherv1.Lvol, error) {
	done, err := a.begin(ctx, "", name)
	if err != nil {
		return nil, err
	}
	defer done()
	info, err := act(ctx, name)
	if err != nil {
		return nil, fmt.Errorf("%s lvol %s: %w", verb, name, err)
	}
	owner, err := a.ownerOf(name)
	return protoLvol(info, owner), err
}
