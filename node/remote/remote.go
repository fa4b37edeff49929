// Package remote lets a node read blocks that other machines store: it attaches them at
// the store's attacher, and reads them over the network as devices.
//
// A store is known by its target name, the one that images' annotations use. For each
// block that a node uses there is a record of how to reach it, written once the store
// has agreed. With a record, a block needs no store to be opened: its device waits for
// the network when it is read, so that a node starts, and containers go on, while a
// store is away, and whatever a cache in front of the device has costs nothing. What is
// attached without being used any more (somebody died in between) is found by comparing
// record, store and use, and detached.
//
// Who uses a block is decided elsewhere (Options.InUse). The package must not know
// presentations, images or containers.
package remote

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"

	attacherv1 "github.com/thaw-project/thaw/api/attacher/v1"
	"github.com/thaw-project/thaw/attacher/rpc"
	"github.com/thaw-project/thaw/keylock"
	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/statedb"
	"github.com/thaw-project/thaw/target/bdev"
)

// TransportTCP is NVMe/TCP.
const TransportTCP = "nvme-tcp"

const (
	// DefaultLossTimeout is how long reads wait for a store that is away before they
	// fail: what kernels wait for an NVMe controller.
	DefaultLossTimeout = 10 * time.Minute

	// callTimeout bounds a call that nobody waits for.
	callTimeout = 10 * time.Second

	// sweepFirst and sweepMost are the pauses between attempts to bring a store's
	// attachments in line, doubled while the store is away.
	sweepFirst = 250 * time.Millisecond
	sweepMost  = 30 * time.Second
)

// TargetOptions describes a store.
type TargetOptions struct {
	Name      string // as annotations call it
	Attacher  string // "host:port" of its attacher, or the path of its Unix socket on this machine
	Files     rpc.Files
	Node      string // who calls on a Unix socket; on the network the certificate says it
	Transport string // TransportTCP if empty
	// LossTimeout is DefaultLossTimeout if 0.
	LossTimeout time.Duration
}

// Options configures New.
type Options struct {
	Targets []TargetOptions
	// DBPath is the database of what is attached, remote.db.
	DBPath string
	Logger *slog.Logger // nil is silence
	// Registerer, if not nil, gets the metrics (thaw_remote_*).
	Registerer prometheus.Registerer

	// dial connects to an attacher; tests replace it.
	dial func(TargetOptions) (*grpc.ClientConn, error)
}

// Remote is a node's access to its stores. Methods may be called concurrently.
type Remote struct {
	o       Options
	log     *slog.Logger
	db      *statedb.DB
	targets map[string]*target
	keys    keylock.Set // target \0 block: one change at a time
	metrics *metrics

	kernelHost atomic.Bool

	mu      sync.Mutex
	records map[string]*record // guarded by mu, as what it points to: by key
	closed  bool               // guarded by mu

	life   context.Context // ends with Close
	cancel context.CancelFunc
	wg     sync.WaitGroup
}

// New opens the database and connects to nothing yet.
func New(o Options) (*Remote, error) {
	if o.DBPath == "" {
		return nil, kind.Errorf(kind.Invalid, "remote targets need a database path")
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.dial == nil {
		o.dial = Dial
	}
	r := &Remote{o: o, log: o.Logger, targets: make(map[string]*target), metrics: newMetrics()}
	for _, t := range o.Targets {
		if t.Transport == "" {
			t.Transport = TransportTCP
		}
		if t.LossTimeout == 0 {
			t.LossTimeout = DefaultLossTimeout
		}
		if t.Name == "" || t.Transport != TransportTCP || t.LossTimeout < 0 || r.targets[t.Name] != nil {
			return nil, kind.Errorf(kind.Invalid, "remote target %.80q: name twice or empty, or transport %.40q not %s", t.Name, t.Transport, TransportTCP)
		}
		r.targets[t.Name] = newTarget(r, t)
	}
	var err error
	if r.db, err = openDB(o.DBPath); err != nil {
		return nil, err
	}
	if r.records, err = load(r.db); err != nil {
		r.db.Close()
		return nil, fmt.Errorf("start remote targets from %s: %w", o.DBPath, err)
	}
	r.life, r.cancel = context.WithCancel(context.Background())
	if o.Registerer != nil {
		if err := o.Registerer.Register(r.metrics); err != nil {
			r.db.Close()
			return nil, fmt.Errorf("register metrics: %w", err)
		}
	}
	return r, nil
}

// SetKernelHost says whether the host's kernel connects to the stores. Attach then does
// not wait for this process to see a block.
func (r *Remote) SetKernelHost(yes bool) { r.kernelHost.Store(yes) }

// Start begins to bring the stores' attachments in line with inUse, which tells
// whether anybody on this node uses a block or is about to. It must not wait.
func (r *Remote) Start(inUse func(target, block string) bool) {
	for _, t := range r.targets {
		r.wg.Go(func() { t.sweeper(r.life, inUse) })
	}
}

// Close ends all connections. Reads that wait fail with kind.Unavailable; attachments
// stay for the next process.
func (r *Remote) Close() error {
	r.mu.Lock()
	closed := r.closed
	r.closed = true
	r.mu.Unlock()
	if closed {
		return nil
	}
	r.cancel()
	for _, t := range r.targets {
		t.close()
	}
	r.wg.Wait()
	if r.o.Registerer != nil {
		r.o.Registerer.Unregister(r.metrics)
	}
	return r.db.Close()
}

func (r *Remote) target(name string) (*target, error) {
	t := r.targets[name]
	if t == nil {
		return nil, kind.Errorf(kind.NotFound, "target %.80q is not configured on this node: add a [[remote]] of that name", name)
	}
	return t, nil
}

// Attach makes block openable. For one that is on record nothing is asked. Errors are
// kind.NotFound when target or block do not exist, kind.Denied when the store refuses
// this node, and kind.Unavailable when it does not answer within ctx.
func (r *Remote) Attach(ctx context.Context, targetName, block string) error {
	t, err := r.target(targetName)
	if err != nil {
		return err
	}
	unlock, err := r.keys.Lock(ctx, key(targetName, block))
	if err != nil {
		return fmt.Errorf("attach block %s of target %s: %w", block, targetName, err)
	}
	defer unlock()
	if _, ok := r.record(targetName, block); ok {
		return nil
	}
	err = t.attach(ctx, block)
	if err == nil && !r.kernelHost.Load() {
		err = r.visible(ctx, t, block)
	}
	if err != nil {
		t.wake(true) // the store may have it as attached
		return fmt.Errorf("attach block %s of target %s: %w", block, targetName, err)
	}
	return nil
}

// visible waits until this process reaches a block that was just attached, so that a
// store that answers calls and serves no data is found out before somebody mounts it.
func (r *Remote) visible(ctx context.Context, t *target, block string) error {
	d := t.device(block, 0)
	defer d.Close()
	if _, err := d.host(ctx); err != nil {
		return kind.Wrap(kind.Unavailable, fmt.Errorf("it is attached and cannot be reached: %w", err))
	}
	return nil
}

// Detach takes a block away from this node; when it returns, the store has told connected
// hosts. A block that is not attached is no error. Errors are kind.Unavailable when the
// store does not answer within ctx.
func (r *Remote) Detach(ctx context.Context, targetName, block string) error {
	t, err := r.target(targetName)
	if err != nil {
		return err
	}
	unlock, err := r.keys.Lock(ctx, key(targetName, block))
	if err != nil {
		return fmt.Errorf("detach block %s of target %s: %w", block, targetName, err)
	}
	defer unlock()
	if _, ok := r.record(targetName, block); !ok {
		return nil
	}
	if err := t.detach(ctx, block); err != nil {
		return fmt.Errorf("detach block %s of target %s: %w", block, targetName, err)
	}
	return nil
}

// Release says that block may be in nobody's use any more. It does not wait.
func (r *Remote) Release(targetName, block string) {
	if t := r.targets[targetName]; t != nil {
		t.wake(false)
	}
}

// Open returns the device of an attached block; without a record it is kind.NotFound.
// It does not wait: reads do, for up to the target's LossTimeout. Devices fail after
// Close.
func (r *Remote) Open(targetName, block string) (bdev.Device, error) {
	t, err := r.target(targetName)
	if err != nil {
		return nil, err
	}
	rec, ok := r.record(targetName, block)
	if !ok {
		return nil, kind.Errorf(kind.NotFound, "block %s of target %s is not attached", block, targetName)
	}
	return t.device(block, rec.SizeBytes), nil
}

// Export is how a host's own initiator reaches an attached block.
type Export struct {
	Subsystem, HostNQN, HostID string
	Portals                    []Portal
	NSID                       uint32
	UUID                       string
	SizeBytes                  int64
}

// Portal is an address of a store: Transport is "tcp" or "rdma", Address an IP address,
// Service a port.
type Portal struct {
	Transport string `json:"transport"`
	Address   string `json:"address"`
	Service   string `json:"service"`
}

// Export returns how to reach an attached block; without a record it is kind.NotFound.
func (r *Remote) Export(targetName, block string) (Export, error) {
	rec, ok := r.record(targetName, block)
	if !ok {
		return Export{}, kind.Errorf(kind.NotFound, "block %s of target %s is not attached", block, targetName)
	}
	return rec.export(), nil
}

// Node returns the client of a target's attacher.
func (r *Remote) Node(targetName string) (attacherv1.NodeClient, error) {
	t, err := r.target(targetName)
	if err != nil {
		return nil, err
	}
	return t.client()
}

func (r *Remote) record(targetName, block string) (record, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	rec := r.records[key(targetName, block)]
	if rec == nil {
		return record{}, false
	}
	return *rec, true
}

// put records a block as attached, with its map if m is not nil.
func (r *Remote) put(targetName, block string, rec record, m *attacherv1.BlockMap) error {
	old, ok := r.record(targetName, block)
	if ok && old.equal(rec) && m == nil {
		return nil
	}
	if ok && (old.SizeBytes != rec.SizeBytes || old.UUID != rec.UUID) {
		// Whoever has it mounted, and its map, mean the one that is gone.
		return kind.Errorf(kind.Corrupt, "block %s of target %s was deleted there and made again while it is in use here: stop the containers that use it and start them again", block, targetName)
	}
	if err := putRecord(r.db, targetName, block, rec, m); err != nil {
		return err
	}
	r.mu.Lock()
	r.records[key(targetName, block)] = &rec
	r.mu.Unlock()
	return nil
}

func (r *Remote) drop(targetName, block string) error {
	if err := dropRecord(r.db, targetName, block); err != nil {
		return err
	}
	r.mu.Lock()
	delete(r.records, key(targetName, block))
	r.mu.Unlock()
	return nil
}

// blocks lists the recorded blocks of a target.
func (r *Remote) blocks(targetName string) map[string]record {
	r.mu.Lock()
	defer r.mu.Unlock()
	out := make(map[string]record)
	for k, rec := range r.records {
		if t, block := splitKey(k); t == targetName {
			out[block] = *rec
		}
	}
	return out
}

// refused tells whether a store's answer is final: asking again would get the same.
func refused(err error) bool {
	for _, k := range []kind.Kind{kind.NotFound, kind.Denied, kind.Invalid, kind.Unsupported, kind.NoSpace, kind.Corrupt} {
		if errors.Is(err, k) {
			return true
		}
	}
	return false
}
