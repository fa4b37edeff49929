//go:build ceph

package rbd

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ceph/go-ceph/rbd"
	"golang.org/x/sync/errgroup"

	"github.com/thaw-project/thaw/attacher"
	"github.com/thaw-project/thaw/failpoint"
	"github.com/thaw-project/thaw/keylock"
	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/lvol"
)

const (
	// maxPending bounds the calls that wait for the cluster, so that an outage does not
	// take a thread for each of any number of callers.
	maxPending = 64

	// statAge is how old the pool's free space may be that Stat tells.
	statAge = time.Second

	// countAge is how old the count of a writable lvol's clusters may be.
	countAge = time.Second

	// sweepInterval is how often it is tried again to remove what somebody had open.
	sweepInterval = time.Minute

	// parallel is how many images are looked at together.
	parallel = 8
)

// Backend is a store in a pool of Ceph.
type Backend struct {
	o       Options
	log     *slog.Logger
	c       *cluster
	session *session

	open    *table        // images by the UUIDs of their lvols; its lock is the innermost
	names   keylock.Set   // one operation at a time on an lvol, by its name
	pending chan struct{} // full of calls that wait for the cluster

	commits sync.Mutex    // one change of the index at a time; before mu
	sweeps  sync.Mutex    // one collect at a time
	wake    chan struct{} // capacity 1: there may be something to collect

	mu       sync.RWMutex
	index    *index                          // guarded by mu
	making   map[string]int                  // guarded by mu: images that collect must leave alone
	exported map[string]map[string]exportUse // guarded by mu: by name of the lvol and node
	counts   map[string]count                // guarded by mu: of clusters, by the lvol's UUID
	closed   bool                            // guarded by mu

	stat     sync.Mutex // one look at the pool's space at a time
	lastStat atomic.Pointer[space]

	life context.Context // ends with Close
	end  context.CancelFunc
	own  sync.WaitGroup // the backend's goroutines; Add under mu while not closed
}

var _ attacher.Backend = (*Backend)(nil)

type space struct {
	at          time.Time
	total, free int64 // bytes
}

// count is how many objects an lvol owns. One of a fixed lvol has no time.
type count struct {
	at       time.Time
	clusters int64
	final    bool
}

// New opens the store of that prefix, or makes it. What a process that died left undone
// is completed or undone. kind.InUse while another process has the store.
func New(ctx context.Context, o Options) (*Backend, error) {
	o.ensureDefaults()
	if err := o.validate(); err != nil {
		return nil, err
	}
	c, err := connect(ctx, o)
	if err != nil {
		return nil, err
	}
	b := &Backend{
		o: o, log: o.Logger, c: c, pending: make(chan struct{}, maxPending), wake: make(chan struct{}, 1), index: newIndex(), making: make(map[string]int),
		open: newTable(o.Timeout), exported: make(map[string]map[string]exportUse), counts: make(map[string]count),
	}
	b.life, b.end = context.WithCancel(context.Background())
	err = b.do(ctx, "open store "+b.oid(), b.o.Timeout, nil, func(ctx context.Context) error { return b.begin(ctx) })
	if err != nil {
		return nil, errors.Join(err, b.Close())
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.own.Go(func() { b.sweeper(b.life) })
	b.own.Go(func() {
		b.session.keep(b.life, o.Lease, func(err error) { b.log.Error("cannot renew the lock on the store", "store", b.oid(), "error", err) })
	})
	return b, nil
}

func (b *Backend) oid() string { return b.o.Prefix + "store" }

func (b *Backend) begin(ctx context.Context) error {
	if err := createIndex(b.c.pool, b.oid(), b.o.ObjectBytes); err != nil {
		return err
	}
	s, err := beginSession(b.c, b.oid(), b.o.Lease)
	if err != nil {
		return err
	}
	x, _, err := readIndex(b.c.pool, b.oid())
	if err == nil {
		err = ctx.Err()
	}
	if err != nil {
		return errors.Join(err, s.end())
	}
	b.mu.Lock()
	b.session, b.index = s, x
	b.mu.Unlock()
	return b.finishResizes(ctx)
}

// Close closes devices and gives the store back. When the cluster does not answer it
// returns after Options.Timeout with kind.Unavailable, and what waits ends with the process
// or when the cluster is back.
func (b *Backend) Close() error {
	b.mu.Lock()
	if b.closed {
		b.mu.Unlock()
		return nil
	}
	b.closed = true
	b.mu.Unlock()
	b.end()
	return within(b.o.Timeout, "close store "+b.oid(), func() error {
		b.own.Wait() // none opens an image any more
		err := b.open.close()
		if b.session != nil {
			err = errors.Join(err, b.session.end())
		}
		b.c.close()
		return err
	})
}

// within runs f and waits for it at most so long: it outlives that only while the cluster
// is away, and the process seldom outlives it.
func within(timeout time.Duration, what string, f func() error) error {
	done := make(chan error, 1)
	go func() { done <- f() }()
	timer := time.NewTimer(timeout)
	defer timer.Stop()
	select {
	case err := <-done:
		return err
	case <-timer.C:
		return kind.Errorf(kind.Unavailable, "%s: Ceph does not answer", what)
	}
}

// do runs f with the lvols of these names locked and waits for it as long as ctx and
// timeout (0: none) allow. f goes on then, its context ended, and keeps the locks until it
// returns.
func (b *Backend) do(ctx context.Context, what string, timeout time.Duration, names []string, f func(ctx context.Context) error) error {
	cancel := context.CancelFunc(func() {})
	if timeout > 0 {
		ctx, cancel = context.WithTimeoutCause(ctx, timeout,
			kind.Errorf(kind.Unavailable, "Ceph did not answer within %v", timeout))
	}
	defer cancel()
	fail := func(err error) error {
		switch {
		case kind.Of(err) != "":
		case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
			err = kind.Wrap(kind.Canceled, err)
		default: // of librbd, as it came
			return wrap(err, "%s", what)
		}
		return fmt.Errorf("%s: %w", what, err)
	}
	select {
	case b.pending <- struct{}{}:
	case <-ctx.Done():
		return fail(context.Cause(ctx))
	}
	unlock, err := b.names.Lock(ctx, names...)
	if err != nil {
		<-b.pending
		return fail(err)
	}
	done := make(chan error, 1)
	b.mu.Lock()
	if b.closed {
		b.mu.Unlock()
		unlock()
		<-b.pending
		return fail(kind.Errorf(kind.Unavailable, "the store is closed"))
	}
	b.own.Go(func() {
		defer func() { <-b.pending }()
		defer unlock()
		done <- f(ctx)
	})
	b.mu.Unlock()
	select {
	case err = <-done:
	case <-ctx.Done():
		select {
		case err = <-done: // it was in time
		default:
			err = context.Cause(ctx)
		}
	}
	if err != nil {
		return fail(err)
	}
	return nil
}

// reach is a step of an operation: something was just done.
func reach(step string) { failpoint.Reach("rbd." + step) }

// Get describes an lvol; kind.NotFound if there is none of that name.
func (b *Backend) Get(name string) (lvol.Info, error) {
	r, err := b.find(name)
	if err != nil {
		return lvol.Info{}, err
	}
	b.refresh([]*lvolRecord{r})
	return b.info(name)
}

// info describes an lvol by what is known.
func (b *Backend) info(name string) (lvol.Info, error) {
	b.mu.RLock()
	defer b.mu.RUnlock()
	r := b.index.names[name]
	if r == nil {
		return lvol.Info{}, kind.Errorf(kind.NotFound, "no lvol %.160q", name)
	}
	return b.infoLocked(r), nil
}

func (b *Backend) infoLocked(r *lvolRecord) lvol.Info {
	i := lvol.Info{
		Name: r.Name, UUID: r.UUID, SizeBytes: r.SizeBytes, ClusterBytes: b.index.store.ObjectBytes,
		AllocatedClusters: b.counts[r.UUID].clusters,
		Snapshot:          r.snapshot(), ReadOnly: r.fixed(), Created: time.Unix(0, r.CreatedUnixNanos), Open: b.open.has(r.UUID),
	}
	if p := b.index.lvols[r.Parent]; p != nil {
		i.Parent = p.Name
	}
	for _, c := range b.index.clones[r.UUID] {
		i.Clones = append(i.Clones, c.Name)
	}
	slices.Sort(i.Clones)
	return i
}

// List describes all lvols in order of name.
func (b *Backend) List() ([]lvol.Info, error) {
	b.mu.RLock()
	records := slices.Collect(maps.Values(b.index.lvols))
	b.mu.RUnlock()
	b.refresh(records)
	b.mu.RLock()
	defer b.mu.RUnlock()
	out := make([]lvol.Info, 0, len(b.index.lvols))
	for _, name := range slices.Sorted(maps.Keys(b.index.names)) {
		out = append(out, b.infoLocked(b.index.names[name]))
	}
	return out, nil
}

// refresh counts the clusters of those whose count is not known or too old. What
// cannot be counted keeps the count that it had.
func (b *Backend) refresh(records []*lvolRecord) {
	b.mu.RLock()
	records = slices.DeleteFunc(slices.Clone(records), func(r *lvolRecord) bool {
		c, known := b.counts[r.UUID]
		return known && (c.final || time.Since(c.at) < countAge)
	})
	b.mu.RUnlock()
	if len(records) == 0 {
		return
	}
	err := b.do(b.life, "count clusters", b.o.Timeout, nil, func(ctx context.Context) error {
		g, ctx := errgroup.WithContext(ctx)
		g.SetLimit(parallel)
		for _, r := range records {
			g.Go(func() error {
				if ctx.Err() != nil {
					return ctx.Err()
				}
				n, err := b.countObjects(r)
				switch {
				case isNotFound(err): // deleted meanwhile
				case err != nil:
					return wrap(err, "count the clusters of lvol %s", r.Name)
				default:
					b.noteCount(r, n)
				}
				return nil
			})
		}
		return g.Wait()
	})
	if err != nil {
		b.log.Warn("how much lvols occupy is not known", "error", err)
	}
}

// noteCount notes a count of r. That of an lvol which may be written here or elsewhere is
// true for a moment only.
func (b *Backend) noteCount(r *lvolRecord, clusters int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if now := b.index.lvols[r.UUID]; now == nil || now.Snap != r.Snap || now.ReadOnly != r.ReadOnly {
		return
	}
	_, written := b.writableExport(r.Name)
	b.counts[r.UUID] = count{time.Now(), clusters, r.fixed() || !b.open.has(r.UUID) && !written}
}

// forgetCount has the clusters of an lvol counted again.
func (b *Backend) forgetCount(uuid string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.counts, uuid)
}

// Stat describes the store. Its clusters are those of the whole pool, and what is free is as
// Ceph says it, a second ago or, while Ceph does not answer, earlier.
func (b *Backend) Stat() lvol.Stat {
	s := b.space()
	b.mu.RLock()
	defer b.mu.RUnlock()
	cluster := b.index.store.ObjectBytes
	return lvol.Stat{
		UUID: b.index.store.UUID, Name: b.o.Pool + "/" + b.o.Prefix, ClusterBytes: cluster,
		TotalClusters: s.total / cluster, FreeClusters: s.free / cluster, Lvols: len(b.index.lvols),
	}
}

func (b *Backend) space() space {
	b.stat.Lock()
	defer b.stat.Unlock()
	last := b.lastStat.Load()
	if last != nil && time.Since(last.at) < statAge {
		return *last
	}
	err := b.do(b.life, "ask for the free space", b.o.Timeout, nil, func(context.Context) error {
		s, err := b.c.space(b.o.Pool)
		if err == nil {
			b.lastStat.Store(&s)
		}
		return err
	})
	if err != nil {
		b.log.Warn("how much is free is not known", "error", err)
	}
	if last = b.lastStat.Load(); last == nil {
		return space{}
	}
	return *last
}

// openImage opens an image, or one of its snapshots, for an operation. The caller closes it.
func (b *Backend) openImage(id, snap string) (*rbd.Image, error) {
	if snap != "" {
		return rbd.OpenImageReadOnly(b.c.pool, b.imageName(id), snap)
	}
	return rbd.OpenImage(b.c.pool, b.imageName(id), rbd.NoSnapshot)
}

func (b *Backend) imageName(id string) string { return b.o.Prefix + id }
