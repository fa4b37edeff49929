package attacher

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"go.etcd.io/bbolt"
	"google.golang.org/grpc"

	attacherv1 "github.com/thaw-project/thaw/api/attacher/v1"
	"github.com/thaw-project/thaw/attacher/identity"
	"github.com/thaw-project/thaw/attacher/rpc"
	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/lvol"
	"github.com/thaw-project/thaw/node/present"
)

// Hold implements attacherv1.AttacherServer.
func (a *Attacher) Hold(r *attacherv1.HoldRequest, stream grpc.ServerStreamingServer[attacherv1.HoldResponse]) error {
	if err := checkName("owner", r.GetOwner()); err != nil {
		return err
	}
	if r.GetOwner() == scratchOwner {
		return kind.Errorf(kind.Invalid, "owner %s is the attacher's own", scratchOwner)
	}
	if err := a.enter(); err != nil {
		return err
	}
	defer a.calls.Done()
	return a.holds.Serve(r.GetOwner(), stream)
}

// endHeld removes what an owner held that is gone.
func (a *Attacher) endHeld(ctx context.Context, owner string) {
	ctx, cancel := context.WithTimeout(ctx, endWait)
	defer cancel()
	if err := a.removeHeld(ctx, owner); err != nil {
		a.retryAfter(err)
		a.o.Logger.Warn("cannot remove all that an ended hold left, will try again", "owner", owner, "error", err)
	}
}

// use keeps owner's hold from ending until the returned function is called. The
// empty owner needs no hold.
func (a *Attacher) use(owner string) (done func(), err error) {
	if owner != "" {
		if err := checkName("owner", owner); err != nil {
			return nil, err
		}
	}
	return a.holds.Use(owner)
}

// recover takes up what the records say a predecessor left.
func (a *Attacher) recover() error {
	// First: nodes' reads wait for it.
	if err := a.restoreExports(); err != nil {
		return err
	}
	owners, err := a.owners()
	if err != nil {
		return err
	}
	for owner := range owners {
		a.holds.Expect(owner)
	}
	if err := a.dropUnfinished(); err != nil {
		return err
	}
	disks, err := a.o.Presenter.List(context.Background())
	if err != nil {
		return fmt.Errorf("list presented disks: %w", err)
	}
	for _, d := range disks {
		if !isExport(d) {
			continue
		}
		if r, ok, err := lookup[exportRecord](a.db, exportsBucket, d.Source.Lvol); err != nil {
			return err
		} else if ok && r.Node == "" {
			continue
		}
		if err := a.o.Presenter.Withdraw(context.Background(), d.ID); err != nil {
			a.o.Logger.Warn("an export that nobody holds stays", "disk", d.ID, "error", err)
		}
	}
	return nil
}

// owners are those that have a record.
func (a *Attacher) owners() (map[string]bool, error) {
	owners := make(map[string]bool)
	err := a.db.View(func(tx *bbolt.Tx) error {
		work, err := all[workRecord](tx, workBucket)
		if err != nil {
			return err
		}
		for _, r := range work {
			owners[r.Owner] = true
		}
		exports, err := all[exportRecord](tx, exportsBucket)
		if err != nil {
			return err
		}
		for _, r := range exports {
			owners[r.Owner] = true
		}
		return nil
	})
	return owners, err
}

// dropUnfinished reads every record once, so that damage shows at start and not in
// the middle of a removal, and drops those of lvols that a predecessor did not live to
// create.
func (a *Attacher) dropUnfinished() error {
	infos, err := a.o.Lvols.List()
	if err != nil {
		return fmt.Errorf("list lvols: %w", err)
	}
	exists := make(map[string]bool, len(infos))
	for _, i := range infos {
		exists[i.Name] = true
	}
	var stale [][2]string // bucket, name
	err = a.db.View(func(tx *bbolt.Tx) error {
		blocks, err := all[blockRecord](tx, blocksBucket)
		if err != nil {
			return err
		}
		renames, err := all[renameRecord](tx, renamesBucket)
		if err != nil {
			return err
		}
		if _, err := all[removalRecord](tx, removalsBucket); err != nil {
			return err
		}
		images, err := allImages(tx)
		if err != nil {
			return err
		}
		for _, i := range images {
			a.noteImage(nil, i.Blocks)
		}
		work, err := all[workRecord](tx, workBucket)
		if err != nil {
			return err
		}
		for name := range work {
			if !exists[name] {
				stale = append(stale, [2]string{string(workBucket), name})
			}
		}
		for name := range blocks {
			if !exists[name] {
				stale = append(stale, [2]string{string(blocksBucket), name})
			}
		}
		for name := range renames {
			if !exists[name] {
				stale = append(stale, [2]string{string(renamesBucket), name})
			}
		}
		return nil
	})
	if err != nil || len(stale) == 0 {
		return err
	}
	return a.db.Update(func(tx *bbolt.Tx) error {
		for _, s := range stale {
			if err := tx.Bucket([]byte(s[0])).Delete([]byte(s[1])); err != nil {
				return err
			}
		}
		return nil
	})
}

// endForgotten tries again where the end of a hold could not remove everything.
func (a *Attacher) endForgotten() {
	owners, err := a.owners()
	if err != nil {
		a.o.Logger.Warn("cannot read who holds what", "error", err)
		return
	}
	for owner := range owners {
		a.holds.Forgotten(owner)
	}
}

// removeHeld withdraws owner's exports and deletes its lvols. It goes on past errors, unless
// the store is away, and returns them.
func (a *Attacher) removeHeld(ctx context.Context, owner string) error {
	var names []string
	err := a.db.View(func(tx *bbolt.Tx) error {
		work, err := all[workRecord](tx, workBucket)
		if err != nil {
			return err
		}
		exports, err := all[exportRecord](tx, exportsBucket)
		if err != nil {
			return err
		}
		held := make(map[string]bool)
		for name, r := range work {
			if r.Owner == owner {
				held[name] = true
			}
		}
		for name, r := range exports {
			if r.Owner == owner {
				held[name] = true
			}
		}
		names = slices.Sorted(maps.Keys(held))
		return nil
	})
	if err != nil {
		return err
	}
	return untilAway(names, func(name string) error {
		a.step("end: next")
		return a.removeOneHeld(ctx, name, owner)
	})
}

func (a *Attacher) removeOneHeld(ctx context.Context, name, owner string) error {
	unlock, err := a.names.Lock(ctx, name)
	if err != nil {
		return fmt.Errorf("remove lvol %s: %w", name, err)
	}
	defer unlock()
	// Read again under the lock: a new owner may have taken the lvol over.
	if r, ok, err := lookup[exportRecord](a.db, exportsBucket, name); err != nil {
		return err
	} else if ok && r.Owner == owner {
		// The kernel may still write out what a killed owner had mounted, which takes
		// as long as the disk below takes.
		if err := a.withdraw(ctx, name, endWait); err != nil {
			return err
		}
	}
	if r, ok, err := lookup[workRecord](a.db, workBucket, name); err != nil || !ok || r.Owner != owner {
		return err
	}
	return a.deleteWork(ctx, name)
}

// deleteWork deletes a held lvol and then its record. The caller has the name locked.
func (a *Attacher) deleteWork(ctx context.Context, name string) error {
	for pause := 5 * time.Millisecond; ; pause = min(2*pause, time.Second) {
		err := a.o.Lvols.Delete(name)
		if err == nil || errors.Is(err, kind.NotFound) {
			break
		}
		if !errors.Is(err, kind.InUse) {
			return fmt.Errorf("delete lvol %s: %w", name, err)
		}
		select {
		case <-time.After(pause):
		case <-a.life.Done():
			return fmt.Errorf("delete lvol %s: %w", name, err)
		case <-ctx.Done():
			return fmt.Errorf("delete lvol %s: %w", name, err)
		}
	}
	a.step("delete work: deleted")
	return a.drop(name, workBucket, renamesBucket)
}

// diskPrefix begins the ids of the attacher's disks.
const diskPrefix = "w-"

// diskID is the id under which an lvol is exported. It must not be the name of a
// block, under which nodes show it, and fit a disk's id.
func diskID(name string) string {
	if len(diskPrefix)+len(name) <= lvol.MaxNameBytes {
		return diskPrefix + name
	}
	sum := sha256.Sum256([]byte(name))
	return diskPrefix + hex.EncodeToString(sum[:])
}

func isExport(d present.Disk) bool {
	return d.Source.Kind == present.SourceLvol && strings.HasPrefix(d.ID, diskPrefix) && d.ID == diskID(d.Source.Lvol)
}

func exportSource(name string) present.Source {
	return present.Source{Kind: present.SourceLvol, Lvol: name}
}

// Export implements attacherv1.AttacherServer.
func (a *Attacher) Export(ctx context.Context, r *attacherv1.ExportRequest) (*attacherv1.ExportResponse, error) {
	name, owner := r.GetLvol(), r.GetOwner()
	node, _, err := caller(ctx, r.GetNode())
	if err != nil {
		return nil, err
	}
	if err := errors.Join(checkName("lvol name", name), checkName("owner", owner)); err != nil {
		return nil, kind.Wrap(kind.Invalid, err)
	}
	switch {
	case node != "":
		if err := identity.CheckNode(node); err != nil {
			return nil, err
		}
	case r.GetTransport() != "":
		return nil, kind.Errorf(kind.Invalid, "export lvol %s: transport %.40q without a node", name, r.GetTransport())
	}
	if err := a.enter(); err != nil {
		return nil, err
	}
	defer a.calls.Done()
	done, err := a.use(owner)
	if err != nil {
		return nil, err
	}
	defer done()
	unlock, err := a.names.Lock(ctx, name)
	if err != nil {
		return nil, fmt.Errorf("export lvol %s: %w", name, err)
	}
	defer unlock()
	out, err := a.export(ctx, name, r.GetTransport(), exportRecord{Owner: owner, ReadOnly: r.GetReadOnly(), Node: node})
	if err != nil {
		return nil, fmt.Errorf("export lvol %s: %w", name, err)
	}
	return out, nil
}

// export records and shows. The caller has the name locked and uses the owner's hold.
func (a *Attacher) export(ctx context.Context, name, transport string, want exportRecord) (*attacherv1.ExportResponse, error) {
	if w, ok, err := lookup[workRecord](a.db, workBucket, name); err != nil {
		return nil, err
	} else if ok && w.Owner != want.Owner {
		return nil, a.heldError(name, w.Owner)
	}
	info, err := a.o.Lvols.Get(name)
	if err != nil {
		return nil, err
	}
	if !want.ReadOnly && (info.Snapshot || info.ReadOnly) {
		return nil, kind.Errorf(kind.ReadOnly, "it is read-only: ask for read access, or clone it")
	}
	if node := a.attachedBy(name); node != "" && isWritableLvol(name) {
		return nil, kind.Errorf(kind.InUse, "it is a writable layer of node %s", node)
	}
	have, ok, err := lookup[exportRecord](a.db, exportsBucket, name)
	if err != nil {
		return nil, err
	}
	if ok && have.Owner != want.Owner {
		if a.holds.Alive(have.Owner) {
			return nil, kind.Errorf(kind.InUse, "it is exported to %s", have.Owner)
		}
		if err := a.withdraw(ctx, name, withdrawWait); err != nil {
			return nil, err
		}
		ok = false
	}
	switch {
	case ok && have.Node != want.Node:
		return nil, kind.Errorf(kind.Exists, "it is exported already, to %s: unexport it first", have.place())
	case ok && have.ReadOnly != want.ReadOnly:
		return nil, kind.Errorf(kind.Exists, "it is exported already, with other access: unexport it first")
	case ok:
		want = have
		if want.Node != "" {
			if err := sameTransport(want.Transport, transport); err != nil {
				return nil, err
			}
		}
	default:
		if want, err = a.recordExport(name, transport, want); err != nil {
			return nil, err
		}
		a.step("export: recorded")
	}
	out, err := a.showExport(ctx, name, want)
	if err != nil {
		a.retryAfter(err)
		if !ok {
			cleanup, cancel := context.WithTimeout(context.WithoutCancel(ctx), withdrawWait)
			defer cancel()
			if werr := a.withdraw(cleanup, name, withdrawWait); werr != nil {
				a.o.Logger.Warn("an export that failed may be left until its hold ends", "lvol", name, "error", werr)
			}
		}
		return nil, err
	}
	a.step("export: presented")
	return out, nil
}

// place says where an export is, for errors.
func (r exportRecord) place() string {
	if r.Node == "" {
		return "the store's machine"
	}
	return "node " + r.Node
}

// recordExport writes the record of a new export and returns it.
func (a *Attacher) recordExport(name, asked string, r exportRecord) (exportRecord, error) {
	if r.Node == "" {
		return r, a.put(exportsBucket, name, r)
	}
	var err error
	if r.Transport, err = a.transport(asked); err != nil {
		return r, err
	}
	e, _, attached, err := a.attachment(r.Node, name)
	if err != nil {
		return r, err
	}
	if attached {
		if !r.ReadOnly {
			return r, kind.Errorf(kind.InUse, "node %s has it attached", r.Node)
		}
		if err := sameTransport(e.Transport, asked); err != nil {
			return r, err
		}
		r.NSID, r.Transport = e.NSID, e.Transport
	} else if r.NSID, err = a.reserveNSID(r.Node); err != nil {
		return r, err
	}
	r.ID, r.CreatedUnixNanos = newAttachmentID(), a.o.Now().UnixNano()
	if err := a.put(exportsBucket, name, r); err != nil {
		if !attached {
			a.freeNSID(r.Node, r.NSID)
		}
		return r, err
	}
	return r, nil
}

// showExport shows an lvol as its record says.
func (a *Attacher) showExport(ctx context.Context, name string, r exportRecord) (*attacherv1.ExportResponse, error) {
	if r.Node == "" {
		disk, err := a.o.Presenter.Present(ctx, diskID(name), exportSource(name), r.ReadOnly)
		return &attacherv1.ExportResponse{Path: disk.Path, SizeBytes: disk.SizeBytes}, err
	}
	if a.o.Exporter == nil {
		return nil, kind.Errorf(kind.Unsupported, "this store exports nothing: set export.nvme_tcp in its configuration")
	}
	e := r.export(name)
	x, err := a.o.Exporter.Export(e, rpc.LocalAddress(ctx))
	if err != nil {
		return nil, err
	}
	return &attacherv1.ExportResponse{SizeBytes: x.SizeBytes, Attachment: attachmentProto(e, r.ID, r.CreatedUnixNanos, x)}, nil
}

// Unexport implements attacherv1.AttacherServer.
func (a *Attacher) Unexport(ctx context.Context, r *attacherv1.UnexportRequest) (*attacherv1.UnexportResponse, error) {
	name := r.GetLvol()
	node, remote, err := caller(ctx, "")
	if err != nil {
		return nil, err
	}
	if err := errors.Join(checkName("lvol name", name), checkName("owner", r.GetOwner())); err != nil {
		return nil, kind.Wrap(kind.Invalid, err)
	}
	if err := a.enter(); err != nil {
		return nil, err
	}
	defer a.calls.Done()
	unlock, err := a.names.Lock(ctx, name)
	if err != nil {
		return nil, fmt.Errorf("unexport lvol %s: %w", name, err)
	}
	defer unlock()
	have, ok, err := lookup[exportRecord](a.db, exportsBucket, name)
	if err != nil {
		return nil, err
	}
	if !ok {
		return &attacherv1.UnexportResponse{}, nil
	}
	if have.Owner != r.GetOwner() {
		return nil, kind.Errorf(kind.InUse, "unexport lvol %s: it is exported to %s", name, have.Owner)
	}
	if remote && have.Node != node {
		return nil, kind.Errorf(kind.Denied, "unexport lvol %s: it is exported to %s, and node %s asks", name, have.place(), node)
	}
	if err := a.withdraw(ctx, name, withdrawWait); err != nil {
		a.retryAfter(err)
		return nil, err
	}
	return &attacherv1.UnexportResponse{}, nil
}

// withdraw takes an lvol's export away and then its record, waiting up to wait for a
// kernel that has the disk open. The caller has the name locked.
func (a *Attacher) withdraw(ctx context.Context, name string, wait time.Duration) error {
	if r, ok, err := lookup[exportRecord](a.db, exportsBucket, name); err != nil {
		return err
	} else if ok && r.Node != "" {
		return a.withdrawFrom(name, r)
	}
	deadline := time.Now().Add(wait)
	for pause := time.Millisecond; ; pause = min(2*pause, 100*time.Millisecond) {
		err := a.o.Presenter.Withdraw(ctx, diskID(name))
		if err == nil {
			break
		}
		if !errors.Is(err, kind.InUse) || time.Until(deadline) < pause {
			return fmt.Errorf("unexport lvol %s: %w", name, err)
		}
		select {
		case <-time.After(pause):
		case <-a.life.Done():
			return fmt.Errorf("unexport lvol %s: %w", name, err)
		case <-ctx.Done():
			return fmt.Errorf("unexport lvol %s: %w", name, err)
		}
	}
	a.step("withdraw: withdrawn")
	err := a.drop(name, exportsBucket)
	a.step("withdraw: forgotten")
	return err
}

// withdrawFrom takes an export away from a node and then its record.
func (a *Attacher) withdrawFrom(name string, r exportRecord) error {
	if err := r.validate(); err != nil {
		return kind.Errorf(kind.Corrupt, "record %.80q of exports is damaged: %w", name, err)
	}
	last, err := a.hide(r.export(name), exportsBucket)
	if err != nil {
		return fmt.Errorf("unexport lvol %s from node %s: %w", name, r.Node, err)
	}
	a.step("withdraw: withdrawn")
	if err := a.drop(name, exportsBucket); err != nil {
		return err
	}
	a.step("withdraw: forgotten")
	if last {
		a.freeNSID(r.Node, r.NSID)
	}
	return nil
}

// heldError says who has an lvol that the caller wants.
func (a *Attacher) heldError(name, owner string) error {
	if a.holds.Returning(owner) {
		return kind.Errorf(kind.InUse, "lvol %s was being written by %s, which may come back within %s", name, owner, a.o.HoldGrace)
	}
	return kind.Errorf(kind.InUse, "lvol %s is being written by %s", name, owner)
}
