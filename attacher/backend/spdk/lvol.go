package spdk

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/status"

	lvolv1 "github.com/thaw-project/thaw/api/lvol/v1"
	"github.com/thaw-project/thaw/attacher"
	"github.com/thaw-project/thaw/failpoint"
	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/lvol"
)

var _ attacher.Backend = (*Backend)(nil)

// pageSize is how many lvols, subsystems or nvmeNamespaces are asked for at once: the
// most that the bridge answers with.
const pageSize = 1000

// sizeUnit is what SPDK counts sizes in.
const sizeUnit = 1 << 20

func (b *Backend) storeName() string            { return "lvolStores/" + b.o.LvStore }
func (b *Backend) lvolName(name string) string  { return b.storeName() + "/lvols/" + name }
func (b *Backend) shortName(name string) string { return strings.TrimPrefix(name, b.lvolName("")) }
func notFound(name string) error                { return kind.Errorf(kind.NotFound, "no lvol %.80q", name) }
func inUse(op, name, by string) error           { return kind.Errorf(kind.InUse, "%s lvol %s: %s", op, name, by) }
func wrong(op, name, format string, a ...any) error {
	return kind.Errorf(kind.Invalid, "%s lvol %s: %s", op, name, fmt.Sprintf(format, a...))
}

// hidden are names of lvols that stand in for others (export.go). Nobody else sees them.
func hidden(name string) bool { return strings.HasPrefix(name, hiddenPrefix) }

// checkNew holds names of new lvols.
func checkNew(name string) error {
	if hidden(name) {
		return kind.Errorf(kind.Invalid, "name %s: those that begin with %s are the store's own", name, hiddenPrefix)
	}
	return checkName(name)
}

// present is nil when the target has the lvstore, and kind.Unavailable when it does not.
func (b *Backend) present(ctx context.Context) error {
	s, err := b.lvols.GetLvolStore(ctx, &lvolv1.GetLvolStoreRequest{Name: b.storeName()})
	switch {
	case errors.Is(err, kind.NotFound):
		return kind.Errorf(kind.Unavailable, "the target does not have lvstore %s now: %w", b.o.LvStore, err)
	case err != nil:
		return err
	case s.GetUuid() != b.id.String():
		return kind.Errorf(kind.Unavailable, "the target has another lvstore %s, of UUID %s, not %s", b.o.LvStore, s.GetUuid(), b.id)
	}
	b.mu.Lock()
	b.figures = s
	b.mu.Unlock()
	return nil
}

// lookup reads an lvol. While a restarted target does not have the lvstore yet, nothing
// is kind.NotFound.
func (b *Backend) lookup(ctx context.Context, name string) (l *lvolv1.Lvol, err error) {
	if checkName(name) != nil || hidden(name) {
		return nil, notFound(name)
	}
	err = b.again(ctx, func() error {
		l, err = b.lvols.GetLvol(ctx, &lvolv1.GetLvolRequest{Name: b.lvolName(name)})
		if noStore(err) {
			return kind.Errorf(kind.Unavailable, "the target does not have lvstore %s now", b.o.LvStore)
		}
		if err == nil {
			err = loaded(l)
		}
		return err
	})
	if errors.Is(err, kind.NotFound) {
		return nil, notFound(name)
	}
	return l, err
}

// loaded is nil for an lvol that has a bdev, and for one that cannot have any. A target that
// is killed between the bridge's questions, and one that has just been started, has lvols
// without: they have no size.
func loaded(l *lvolv1.Lvol) error {
	if l.GetSizeBytes() == 0 && !l.GetDegraded() {
		return kind.Errorf(kind.Unavailable, "the target is still loading lvol %s", l.GetName())
	}
	return nil
}

// noStore tells whether it is the lvstore that the bridge did not find.
func noStore(err error) bool {
	if !errors.Is(err, kind.NotFound) {
		return false
	}
	var s interface{ GRPCStatus() *status.Status }
	if !errors.As(err, &s) {
		return false
	}
	for _, d := range s.GRPCStatus().Details() {
		if r, ok := d.(*errdetails.ResourceInfo); ok && r.GetResourceType() == "lvolStores" {
			return true
		}
	}
	return false
}

// change asks the target for a change of what lookup found. The bridge's calls may be
// repeated, and what is not found any more is there again soon.
func (b *Backend) change(ctx context.Context, f func() (*lvolv1.Lvol, error)) (l *lvolv1.Lvol, err error) {
	err = b.again(ctx, func() error {
		l, err = f()
		if errors.Is(err, kind.NotFound) {
			return kind.Errorf(kind.Unavailable, "the target does not have now what it had a moment ago: %w", hide(err))
		}
		if err == nil {
			err = loaded(l)
		}
		return err
	})
	return l, err
}

// hide takes the kind off an error.
func hide(err error) error { return errors.New(err.Error()) }

func (b *Backend) info(l *lvolv1.Lvol) lvol.Info {
	i := lvol.Info{
		Name: b.shortName(l.GetName()), UUID: l.GetUuid(), SizeBytes: l.GetSizeBytes(), ClusterBytes: b.cluster,
		AllocatedClusters: l.GetAllocatedBytes() / b.cluster, Snapshot: l.GetSnapshot(), ReadOnly: l.GetReadOnly() || l.GetSnapshot(),
		Parent: b.shortName(l.GetParent()),
	}
	for _, c := range l.GetClones() {
		if n := b.shortName(c); !hidden(n) {
			i.Clones = append(i.Clones, n)
		}
	}
	slices.Sort(i.Clones)
	if l.GetDegraded() {
		i.Damage = "its external parent is missing"
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	i.Open = b.userLocked(i.UUID, i.Name) != ""
	return i
}

// begin locks lvols and starts an operation.
func (b *Backend) begin(names ...string) (context.Context, func(), error) {
	ctx, cancel := b.operation()
	return b.lock(ctx, cancel, names...)
}

// beginFor is begin for one that takes as long as the caller allows.
func (b *Backend) beginFor(ctx context.Context, name string) (context.Context, func(), error) {
	ctx, cancel := b.operationFor(ctx)
	return b.lock(ctx, cancel, name)
}

func (b *Backend) lock(ctx context.Context, cancel context.CancelFunc, names ...string) (context.Context, func(), error) {
	unlock, err := b.names.Lock(ctx, names...)
	if err != nil {
		cancel()
		return nil, nil, kind.Wrap(kind.Unavailable, err)
	}
	return ctx, func() { unlock(); cancel() }, nil
}

// free is nil when there is no lvol of that name yet.
func (b *Backend) free(ctx context.Context, op, name string) error {
	_, err := b.lookup(ctx, name)
	if errors.Is(err, kind.NotFound) {
		return nil
	}
	if err == nil {
		err = kind.Errorf(kind.Exists, "%s: lvol %s exists already", op, name)
	}
	return err
}

// checkSize: SPDK rounds sizes up; here an lvol has the size that was asked for, or there
// is none.
func (b *Backend) checkSize(op, name string, size int64) error {
	unit := max(sizeUnit, b.cluster)
	if size <= 0 || size%unit != 0 {
		return wrong(op, name, "size %d must be a positive multiple of %d", size, unit)
	}
	return nil
}

// result describes what an operation made.
func (b *Backend) result(op string, l *lvolv1.Lvol, err error) (lvol.Info, error) {
	if err != nil {
		return lvol.Info{}, fmt.Errorf("%s: %w", op, err)
	}
	return b.info(l), nil
}

// Create implements attacher.LvolStore. Sizes are multiples of clusters and of 1 MiB.
func (b *Backend) Create(name string, sizeBytes int64) (lvol.Info, error) {
	if err := errors.Join(checkNew(name), b.checkSize("create", name, sizeBytes)); err != nil {
		return lvol.Info{}, kind.Wrap(kind.Invalid, err)
	}
	ctx, done, err := b.begin(name)
	if err != nil {
		return lvol.Info{}, err
	}
	defer done()
	if err := b.free(ctx, "create", name); err != nil {
		return lvol.Info{}, err
	}
	l, err := b.change(ctx, func() (*lvolv1.Lvol, error) {
		return b.lvols.CreateLvol(ctx, &lvolv1.CreateLvolRequest{Parent: b.storeName(), LvolId: name, Lvol: &lvolv1.Lvol{SizeBytes: sizeBytes}})
	})
	failpoint.Reach("backend.create: created")
	if err == nil && l.GetSizeBytes() != sizeBytes {
		err = kind.Errorf(kind.IO, "the target made it with %d bytes", l.GetSizeBytes())
	}
	return b.result("create lvol "+name, l, err)
}

// Snapshot implements attacher.LvolStore.
func (b *Backend) Snapshot(name, snapshot string) (lvol.Info, error) {
	if err := checkNew(snapshot); err != nil {
		return lvol.Info{}, err
	}
	ctx, done, err := b.begin(name, snapshot)
	if err != nil {
		return lvol.Info{}, err
	}
	defer done()
	have, err := b.lookup(ctx, name)
	if err != nil {
		return lvol.Info{}, fmt.Errorf("snapshot: %w", err)
	}
	if have.GetSnapshot() {
		return lvol.Info{}, wrong("snapshot", name, "it is a snapshot itself")
	}
	if err := b.free(ctx, "snapshot lvol "+name, snapshot); err != nil {
		return lvol.Info{}, err
	}
	l, err := b.change(ctx, func() (*lvolv1.Lvol, error) {
		return b.lvols.SnapshotLvol(ctx, &lvolv1.SnapshotLvolRequest{Name: b.lvolName(name), SnapshotId: snapshot})
	})
	failpoint.Reach("backend.snapshot: taken")
	return b.result("snapshot lvol "+name+" as "+snapshot, l, err)
}

// Clone implements attacher.LvolStore.
func (b *Backend) Clone(snapshot, name string) (lvol.Info, error) {
	if err := checkNew(name); err != nil {
		return lvol.Info{}, err
	}
	ctx, done, err := b.begin(name, snapshot)
	if err != nil {
		return lvol.Info{}, err
	}
	defer done()
	have, err := b.lookup(ctx, snapshot)
	if err != nil {
		return lvol.Info{}, fmt.Errorf("clone: %w", err)
	}
	if !have.GetSnapshot() {
		return lvol.Info{}, wrong("clone", snapshot, "it is not a snapshot")
	}
	if err := b.free(ctx, "clone lvol "+snapshot, name); err != nil {
		return lvol.Info{}, err
	}
	l, err := b.change(ctx, func() (*lvolv1.Lvol, error) {
		return b.lvols.CloneLvol(ctx, &lvolv1.CloneLvolRequest{Name: b.lvolName(snapshot), LvolId: name})
	})
	failpoint.Reach("backend.clone: cloned")
	return b.result("clone lvol "+snapshot+" as "+name, l, err)
}

// SetReadOnly implements attacher.LvolStore. What was set read-only stays so:
// kind.Unsupported.
func (b *Backend) SetReadOnly(name string, readOnly bool) (lvol.Info, error) {
	ctx, done, err := b.begin(name)
	if err != nil {
		return lvol.Info{}, err
	}
	defer done()
	l, err := b.lookup(ctx, name)
	if err != nil {
		return lvol.Info{}, fmt.Errorf("set read-only: %w", err)
	}
	switch {
	case l.GetSnapshot() && !readOnly:
		return lvol.Info{}, wrong("make writable", name, "it is a snapshot")
	case l.GetReadOnly() == readOnly || l.GetSnapshot():
		return b.info(l), nil
	case !readOnly:
		return lvol.Info{}, kind.Errorf(kind.Unsupported, "make lvol %s writable: SPDK keeps read-only lvols so", name)
	}
	unlock, err := b.reserve("set read-only", l.GetUuid(), name)
	if err != nil {
		return lvol.Info{}, err
	}
	defer unlock()
	l, err = b.change(ctx, func() (*lvolv1.Lvol, error) {
		return b.lvols.SetLvolReadOnly(ctx, &lvolv1.SetLvolReadOnlyRequest{Name: b.lvolName(name)})
	})
	failpoint.Reach("backend.set-read-only: set")
	return b.result("set lvol "+name+" read-only", l, err)
}

// reserve keeps everybody from beginning to use an lvol; kind.InUse when somebody does.
func (b *Backend) reserve(op, id, name string) (unlock func(), err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if by := b.userLocked(id, name); by != "" {
		return nil, inUse(op, name, "it is open: "+by)
	}
	if b.changing[id] {
		return nil, inUse(op, name, "another change is under way")
	}
	b.changing[id] = true
	return func() {
		b.mu.Lock()
		delete(b.changing, id)
		b.mu.Unlock()
	}, nil
}

// Delete implements attacher.LvolStore.
func (b *Backend) Delete(name string) error {
	ctx, done, err := b.begin(name)
	if err != nil {
		return err
	}
	defer done()
	l, err := b.lookup(ctx, name)
	if err != nil {
		return fmt.Errorf("delete: %w", err)
	}
	if n := len(l.GetClones()); n > 1 {
		return inUse("delete", name, fmt.Sprintf("it has %d clones", n))
	}
	unlock, err := b.reserve("delete", l.GetUuid(), name)
	if err != nil {
		return err
	}
	defer unlock()
	err = b.again(ctx, func() error {
		_, err := b.lvols.DeleteLvol(ctx, &lvolv1.DeleteLvolRequest{Name: b.lvolName(name)})
		switch {
		case noStore(err):
			return kind.Errorf(kind.Unavailable, "the target does not have lvstore %s now", b.o.LvStore)
		case errors.Is(err, kind.NotFound): // by a call that was not answered, or not loaded yet
			_, err = b.lookup(ctx, name)
			if errors.Is(err, kind.NotFound) {
				return nil
			}
			if err == nil {
				err = kind.Errorf(kind.Unavailable, "the target has only now loaded it")
			}
		}
		return err
	})
	failpoint.Reach("backend.delete: deleted")
	if err != nil {
		return fmt.Errorf("delete lvol %s: %w", name, err)
	}
	return nil
}

// Rename implements attacher.LvolStore.
func (b *Backend) Rename(name, newName string) (lvol.Info, error) {
	if err := checkNew(newName); err != nil {
		return lvol.Info{}, err
	}
	ctx, done, err := b.begin(name, newName)
	if err != nil {
		return lvol.Info{}, err
	}
	defer done()
	have, err := b.lookup(ctx, name)
	if err != nil {
		return lvol.Info{}, fmt.Errorf("rename: %w", err)
	}
	if err := b.free(ctx, "rename lvol "+name, newName); err != nil {
		return lvol.Info{}, err
	}
	l, err := b.change(ctx, func() (*lvolv1.Lvol, error) {
		return b.lvols.RenameLvol(ctx, &lvolv1.RenameLvolRequest{Name: b.lvolName(name), LvolId: newName, Uuid: have.GetUuid()})
	})
	failpoint.Reach("backend.rename: renamed")
	return b.result("rename lvol "+name+" to "+newName, l, err)
}

// Resize implements attacher.LvolStore. Sizes are as for Create.
func (b *Backend) Resize(name string, sizeBytes int64) (lvol.Info, error) {
	ctx, done, err := b.begin(name)
	if err != nil {
		return lvol.Info{}, err
	}
	defer done()
	have, err := b.lookup(ctx, name)
	if err != nil {
		return lvol.Info{}, fmt.Errorf("resize: %w", err)
	}
	if err := b.checkSize("resize", name, sizeBytes); err != nil {
		return lvol.Info{}, err
	}
	if have.GetReadOnly() {
		return lvol.Info{}, kind.Errorf(kind.ReadOnly, "resize lvol %s: it is read-only", name)
	}
	l, err := b.change(ctx, func() (*lvolv1.Lvol, error) {
		return b.lvols.ResizeLvol(ctx, &lvolv1.ResizeLvolRequest{Name: b.lvolName(name), SizeBytes: sizeBytes})
	})
	failpoint.Reach("backend.resize: resized")
	return b.result("resize lvol "+name, l, err)
}

// Inflate implements attacher.LvolStore. The target goes on when ctx ends.
func (b *Backend) Inflate(ctx context.Context, name string) (lvol.Info, error) {
	ctx, done, err := b.beginFor(ctx, name)
	if err != nil {
		return lvol.Info{}, err
	}
	defer done()
	have, err := b.lookup(ctx, name)
	if err != nil {
		return lvol.Info{}, fmt.Errorf("inflate: %w", err)
	}
	if have.GetReadOnly() {
		return lvol.Info{}, kind.Errorf(kind.ReadOnly, "inflate lvol %s: it is read-only", name)
	}
	l, err := b.change(ctx, func() (*lvolv1.Lvol, error) {
		return b.lvols.InflateLvol(ctx, &lvolv1.InflateLvolRequest{Name: b.lvolName(name)})
	})
	failpoint.Reach("backend.inflate: inflated")
	return b.result("inflate lvol "+name, l, err)
}

// Decouple implements attacher.LvolStore. The target goes on when ctx ends.
func (b *Backend) Decouple(ctx context.Context, name string) (lvol.Info, error) {
	ctx, done, err := b.beginFor(ctx, name)
	if err != nil {
		return lvol.Info{}, err
	}
	defer done()
	have, err := b.lookup(ctx, name)
	if err != nil {
		return lvol.Info{}, fmt.Errorf("decouple: %w", err)
	}
	parent := have.GetParent()
	if parent == "" {
		parent = have.GetExternalParent()
	}
	switch {
	case have.GetReadOnly():
		return lvol.Info{}, kind.Errorf(kind.ReadOnly, "decouple lvol %s: it is read-only", name)
	case parent == "":
		return lvol.Info{}, wrong("decouple", name, "it has no parent")
	}
	l, err := b.change(ctx, func() (*lvolv1.Lvol, error) {
		return b.lvols.DecoupleLvol(ctx, &lvolv1.DecoupleLvolRequest{Name: b.lvolName(name), Parent: parent})
	})
	failpoint.Reach("backend.decouple: decoupled")
	return b.result("decouple lvol "+name, l, err)
}

// Get implements attacher.LvolStore. SPDK does not tell when an lvol was created.
func (b *Backend) Get(name string) (lvol.Info, error) {
	ctx, cancel := b.operation()
	defer cancel()
	l, err := b.lookup(ctx, name)
	if err != nil {
		return lvol.Info{}, err
	}
	return b.info(l), nil
}

// all lists all lvols, in order of name, those that stand in for others included.
func (b *Backend) all(ctx context.Context) (list []*lvolv1.Lvol, err error) {
	err = b.again(ctx, func() error {
		list = nil
		for token := ""; ; {
			r, err := b.lvols.ListLvols(ctx, &lvolv1.ListLvolsRequest{Parent: b.storeName(), PageSize: pageSize, PageToken: token})
			if errors.Is(err, kind.NotFound) {
				return kind.Errorf(kind.Unavailable, "the target does not have lvstore %s now", b.o.LvStore)
			}
			if err != nil {
				return err
			}
			list = append(list, r.GetLvols()...)
			if token = r.GetNextPageToken(); token == "" {
				return nil
			}
		}
	})
	return list, err
}

// List implements attacher.LvolStore.
func (b *Backend) List() ([]lvol.Info, error) {
	ctx, cancel := b.operation()
	defer cancel()
	all, err := b.all(ctx)
	if err == nil {
		err = b.present(ctx) // it has all its lvols
	}
	if err != nil {
		return nil, fmt.Errorf("list lvols: %w", err)
	}
	list := make([]lvol.Info, 0, len(all))
	for _, l := range all {
		if i := b.info(l); !hidden(i.Name) {
			list = append(list, i)
		}
	}
	b.mu.Lock()
	b.count = len(list)
	b.mu.Unlock()
	return list, nil
}

// Stat implements attacher.LvolStore. While the target is away it is as last heard of; the
// number of lvols is always List's.
func (b *Backend) Stat() lvol.Stat {
	ctx, cancel := context.WithTimeout(b.life, min(b.o.Timeout, 5*time.Second))
	defer cancel()
	if err := b.present(ctx); err != nil {
		b.log.Debug("figures of the lvstore are old", "error", err)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	return lvol.Stat{UUID: b.id.String(), Name: b.o.LvStore, ClusterBytes: b.cluster, TotalClusters: b.figures.GetClustersCount(),
		FreeClusters: b.figures.GetFreeClustersCount(), Lvols: b.count}
}

// Check implements attacher.LvolStore. SPDK checks an lvstore when it loads it and has no
// method for it: the report is empty, and to repair or scrub is kind.Unsupported.
func (b *Backend) Check(ctx context.Context, o lvol.CheckOptions) (lvol.Report, error) {
	if o.Repair || o.Scrub {
		return lvol.Report{}, kind.Errorf(kind.Unsupported, "SPDK can neither repair nor scrub an lvstore")
	}
	ctx, cancel := b.operationFor(ctx)
	defer cancel()
	return lvol.Report{}, b.present(ctx)
}

// Map implements attacher.LvolStore: SPDK does not tell whose clusters an lvol shows.
func (b *Backend) Map(name string, _ int64, _ int) (lvol.BlockMap, error) {
	return lvol.BlockMap{}, kind.Errorf(kind.Unsupported, "map lvol %.80s: SPDK does not tell who owns which clusters", name)
}
