// Package attacher is the storage side's front: lvols, access to them for
// converters, and the record of converted images, as idempotent and crash-safe
// operations.
//
// It serves api/attacher/v1 over an lvol store. Every mutation reads what is there,
// compares it with the wish, acts, and says what it found when they cannot meet.
// What must be undone after a crash is recorded before it is begun, in a database
// of its own. The package must not know how lvols are stored, which presentation
// shows them, what is inside a block, or anything of containerd.
//
// docs/attacher.md describes the operations for their users.
package attacher

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"time"

	attacherv1 "github.com/thaw-project/thaw/api/attacher/v1"
	"github.com/thaw-project/thaw/attacher/hold"
	"github.com/thaw-project/thaw/failpoint"
	"github.com/thaw-project/thaw/keylock"
	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/lvol"
	"github.com/thaw-project/thaw/node/present"
	"github.com/thaw-project/thaw/statedb"
	"github.com/thaw-project/thaw/target/bdev"
)

const (
	// DefaultHoldGrace is how long the owners of a killed attacher have to hold
	// again; part of the contract. A converter that died together with the attacher is
	// known to be dead after it: all must be as before within 10 s.
	DefaultHoldGrace = 7 * time.Second

	// sweepInterval is how often what could not be removed is tried again: a block
	// that a node still had attached, a disk the kernel still had open.
	sweepInterval = time.Minute

	// retryInterval is how soon that is tried again when the store or the exporter was
	// away: what a restart of theirs interrupted is in order within 10 s of their return.
	retryInterval = 3 * time.Second

	// withdrawWait is how long a withdrawal waits for a kernel that has the disk
	// open: a loop device detaches itself a moment after its unmount.
	withdrawWait = 5 * time.Second

	// endWait is how long the end of a hold insists on removing what was held
	// before it leaves the rest to the sweep.
	endWait = 30 * time.Second

	// syncWait bounds the flush of a disk's page cache before a snapshot.
	syncWait = 2 * time.Minute
)

// LvolStore is what the attacher needs of an lvol store; *lvol.Store is one. Errors
// carry kinds, and Delete of an lvol that is open is kind.InUse.
type LvolStore interface {
	Create(name string, sizeBytes int64) (lvol.Info, error)
	Snapshot(name, snapshot string) (lvol.Info, error)
	Clone(snapshot, name string) (lvol.Info, error)
	SetReadOnly(name string, readOnly bool) (lvol.Info, error)
	Delete(name string) error
	Rename(name, newName string) (lvol.Info, error)
	Resize(name string, sizeBytes int64) (lvol.Info, error)
	Inflate(ctx context.Context, name string) (lvol.Info, error)
	Decouple(ctx context.Context, name string) (lvol.Info, error)
	Get(name string) (lvol.Info, error)
	List() ([]lvol.Info, error)
	Stat() lvol.Stat
	Check(ctx context.Context, o lvol.CheckOptions) (lvol.Report, error)
	Map(name string, offset int64, maxRuns int) (lvol.BlockMap, error)
}

// Backend is an lvol store that also opens its lvols in this process. The stores that
// there are (package lvol here, packages of attacher/backend) pass the suite in
// attacher/backend/backendtest. Methods may be called concurrently and are bounded in
// time where they reach out of the process: kind.Unavailable then.
type Backend interface {
	LvolStore

	// OpenLvol opens an lvol. One that is a snapshot or read-only can be opened readOnly
	// only. It may be open several times; while it is, Delete is kind.InUse, and Snapshot
	// leaves the device open on what is now the snapshot's clone.
	OpenLvol(name string, readOnly bool) (bdev.Device, error)

	// Close gives back what the process holds. Lvols stay.
	Close() error
}

// Options says what an Attacher works with.
type Options struct {
	Lvols LvolStore
	// Presenter shows exports. Their ids begin with "w-".
	Presenter present.Presenter
	// DBPath is the database, attacher.db.
	DBPath string
	// Target is the name by which annotations call this store.
	Target string
	// HoldGrace is how long owners known from before a restart have to hold again;
	// 0 is DefaultHoldGrace.
	HoldGrace time.Duration
	// Attached tells whether this machine has block attached; nil means that it never
	// has. It is called while locks are held and must not call the Attacher.
	Attached func(block string) bool
	// Exporter shows blocks to other machines; nil when this store serves none.
	Exporter Exporter
	// Sync makes the kernel write what it caches for a presented file to the disk
	// behind it, and the disk make it durable. nil runs sync(1) on the path: never
	// a system call of this process, which may be the one that serves the file, and
	// which the kernel could not kill while it waits for itself.
	Sync func(ctx context.Context, path string) error
	// Logger is where repairs and failures in the background go; nil is silence.
	Logger *slog.Logger
	Now    func() time.Time // nil is time.Now

	step func(name string) // of Attacher; nil is failpoint.Reach
	idle bool              // no background work: what tests abandon must not go on
}

func (o *Options) ensureDefaults() {
	if o.HoldGrace == 0 {
		o.HoldGrace = DefaultHoldGrace
	}
	if o.Attached == nil {
		o.Attached = func(string) bool { return false }
	}
	if o.Sync == nil {
		o.Sync = syncPath
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.step == nil {
		o.step = func(name string) { failpoint.Reach("attacher." + name) }
	}
}

func (o *Options) validate() error {
	switch {
	case o.Lvols == nil || o.Presenter == nil:
		return kind.Errorf(kind.Invalid, "attacher needs an lvol store and a presenter")
	case o.DBPath == "":
		return kind.Errorf(kind.Invalid, "attacher needs a database path")
	case o.HoldGrace < 0:
		return kind.Errorf(kind.Invalid, "attacher: hold grace %s is negative", o.HoldGrace)
	}
	return nil
}

// Attacher implements attacherv1.AttacherServer and attacherv1.NodeServer. Its methods may be called
// concurrently, and return errors with kinds: NewServer's interceptors turn them
// into statuses.
type Attacher struct {
	attacherv1.UnsafeAttacherServer
	attacherv1.UnsafeNodeServer

	o  Options
	db *statedb.DB

	// images is the lock of whoever changes which image has which blocks, or
	// deletes blocks; taken before names.
	images keylock.Set
	// names are locks of lvols: one operation at a time on each.
	names keylock.Set

	// holds are the owners; never called with mu locked, but for Stop.
	holds *hold.Set

	mu      sync.Mutex
	uses    map[string]map[string]struct{} // guarded by mu: who has a block attached, by block
	nsids   map[string]map[uint32]struct{} // guarded by mu: identifiers in use, by node
	named   map[string]int                 // guarded by mu: how many images name a block
	doubts  map[string]struct{}            // guarded by mu: lvols whose records may be of none
	closing bool                           // guarded by mu
	calls   sync.WaitGroup                 // Add under mu while not closing

	life context.Context // ends with Stop
	end  context.CancelFunc
	wake chan struct{}  // capacity 1: there may be something to sweep
	soon chan struct{}  // capacity 1: something was unavailable, sweep again before long
	own  sync.WaitGroup // the attacher's goroutines; Add under mu while not closing

	// step is called between the steps of an operation; tests stop there.
	step func(name string)
}

// New opens the database, takes up what a predecessor left, and starts the
// background work. Owners that the predecessor knew have HoldGrace to hold again.
func New(o Options) (*Attacher, error) {
	o.ensureDefaults()
	if err := o.validate(); err != nil {
		return nil, err
	}
	db, err := openDB(o.DBPath)
	if err != nil {
		return nil, err
	}
	a := &Attacher{
		o: o, db: db, uses: make(map[string]map[string]struct{}), nsids: make(map[string]map[uint32]struct{}), named: make(map[string]int), doubts: make(map[string]struct{}),
		wake: make(chan struct{}, 1), soon: make(chan struct{}, 1),
		step: o.step,
	}
	a.life, a.end = context.WithCancel(context.Background())
	a.holds = hold.New(hold.Options{Server: "the attacher", Grace: o.HoldGrace, End: a.endHeld, Logger: o.Logger})
	if err := a.recover(); err != nil {
		a.Stop()
		db.Close()
		return nil, fmt.Errorf("start attacher from %s: %w", o.DBPath, err)
	}
	if !o.idle {
		a.own.Go(a.sweeper)
	}
	return a, nil
}

// Stop ends all holds without touching what they hold, because their owners will
// hold again at the next attacher, and refuses further calls. Call it before the
// gRPC server is stopped: afterwards the end of a connection could not be told from
// the death of its client.
func (a *Attacher) Stop() {
	a.mu.Lock()
	defer a.mu.Unlock()
	if !a.closing {
		a.closing = true
		a.end()
		a.holds.Stop()
	}
}

// Close stops, waits for calls and the background work, and closes the database.
func (a *Attacher) Close() error {
	a.Stop()
	a.calls.Wait()
	a.own.Wait()
	a.holds.Wait()
	return a.db.Close()
}

// enter counts a call in; leave it with a.calls.Done.
func (a *Attacher) enter() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.closing {
		return kind.Errorf(kind.Unavailable, "the attacher is stopping: try again when it is back")
	}
	a.calls.Add(1)
	return nil
}

// sweeper removes in the background what could not be removed at once.
func (a *Attacher) sweeper() {
	a.own.Go(func() { a.holds.Absent() })
	timer := time.NewTimer(sweepInterval)
	defer timer.Stop()
	for {
		a.sweep(a.life)
		timer.Reset(sweepInterval)
		for again := true; again; {
			select {
			case <-a.life.Done():
				return
			case <-a.soon:
				timer.Reset(retryInterval)
			case <-timer.C:
				again = false
			case <-a.wake:
				again = false
			}
		}
	}
}

// poke has the sweeper look at once.
func (a *Attacher) poke() {
	select {
	case a.wake <- struct{}{}:
	default:
	}
}

// retryAfter has the sweeper look before long when err is that something was away.
func (a *Attacher) retryAfter(err error) {
	if !errors.Is(err, kind.Unavailable) {
		return
	}
	select {
	case a.soon <- struct{}{}:
	default:
	}
}

// doubt has the sweeper find out whether there is an lvol of that name, when err leaves open
// whether what it interrupted took effect.
func (a *Attacher) doubt(name string, err error) {
	if !errors.Is(err, kind.Unavailable) {
		return
	}
	a.mu.Lock()
	a.doubts[name] = struct{}{}
	a.mu.Unlock()
	a.retryAfter(err)
}

// untilAway does something for all of a list and returns all errors. It stops at the first
// kind.Unavailable: what is away is so for the rest too, and may take its time to say so.
func untilAway[T any](list []T, do func(T) error) error {
	var errs []error
	for _, t := range list {
		err := do(t)
		errs = append(errs, err)
		if errors.Is(err, kind.Unavailable) {
			break
		}
	}
	return errors.Join(errs...)
}

// settleDoubts drops the records of doubtful lvols that do not exist.
func (a *Attacher) settleDoubts(ctx context.Context) error {
	a.mu.Lock()
	names := slices.Sorted(maps.Keys(a.doubts))
	a.mu.Unlock()
	return untilAway(names, func(name string) error { return a.settleDoubt(ctx, name) })
}

func (a *Attacher) settleDoubt(ctx context.Context, name string) error {
	// Under the lock nobody is between a record and its lvol.
	unlock, err := a.names.Lock(ctx, name)
	if err != nil {
		return err
	}
	defer unlock()
	_, err = a.o.Lvols.Get(name)
	if errors.Is(err, kind.NotFound) {
		err = a.drop(name, workBucket, blocksBucket, removalsBucket, renamesBucket)
	}
	if err != nil {
		return err
	}
	a.mu.Lock()
	delete(a.doubts, name)
	a.mu.Unlock()
	return nil
}

func (a *Attacher) sweep(ctx context.Context) {
	for _, s := range []struct {
		act  func(context.Context) error
		what string
	}{
		{a.settleDoubts, "cannot tell yet which lvols there are"},
		{a.deleteWritables, "cannot delete writable layers yet"},
		{a.endUndone, "cannot take back attachments that failed yet"},
		{a.releasePending, "cannot remove blocks of removed images yet"},
	} {
		if err := s.act(ctx); err != nil && ctx.Err() == nil {
			a.retryAfter(err)
			a.o.Logger.Warn(s.what, "error", err)
		}
	}
	a.endForgotten()
}

// syncPath runs sync(1), which opens the path and calls fsync.
func syncPath(ctx context.Context, path string) error {
	ctx, cancel := context.WithTimeout(ctx, syncWait)
	defer cancel()
	out, err := exec.CommandContext(ctx, "sync", path).CombinedOutput()
	if err != nil {
		return kind.Errorf(kind.IO, "sync %s: %w: %.300s", path, err, strings.TrimSpace(string(out)))
	}
	return nil
}

// checkName holds lvol names and owners to 1 to 128 of [A-Za-z0-9._-].
func checkName(what, name string) error {
	if name == "" || len(name) > lvol.MaxNameBytes || strings.ContainsFunc(name, func(r rune) bool {
		return !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '.' || r == '_' || r == '-')
	}) {
		return kind.Errorf(kind.Invalid, "%s %.160q: must be 1 to %d of A-Z a-z 0-9 . _ -", what, name, lvol.MaxNameBytes)
	}
	return nil
}
