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

// The transports of a store's blocks.
const (
	TransportTCP  = "nvme-tcp"
	TransportRDMA = "nvme-rdma" // for a kernel's NVMe host or a card, not for this process
	TransportRBD  = "rbd"       // Ceph's, through Options.OpenRBD
)

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
	Transport string // by which blocks are asked for; TransportTCP if empty
	// LossTimeout is DefaultLossTimeout if 0.
	LossTimeout time.Duration
}

// Options configures New.
type Options struct {
	Targets []TargetOptions
	// DBPath is the database of what is attached, remote.db.
	DBPath string
	// OpenRBD opens an image of Ceph for reading; nil when this program cannot
	// (kind.Unsupported). It heeds ctx, which ends with the device.
	OpenRBD func(ctx context.Context, image RBDImage) (bdev.Device, error)
	Logger  *slog.Logger // nil is silence
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

	mu        sync.Mutex
	records   map[string]*record  // guarded by mu, as what it points to: by key
	writables map[string]*record  // guarded by mu, as what it points to: by key of target and id
	doubts    map[string]struct{} // guarded by mu: keys of writables that could not be reached
	closed    bool                // guarded by mu

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
	r := &Remote{o: o, log: o.Logger, targets: make(map[string]*target), doubts: make(map[string]struct{}), metrics: newMetrics()}
	for _, t := range o.Targets {
		if t.Transport == "" {
			t.Transport = TransportTCP
		}
		if t.LossTimeout == 0 {
			t.LossTimeout = DefaultLossTimeout
		}
		if t.Name == "" || t.LossTimeout < 0 || r.targets[t.Name] != nil {
			return nil, kind.Errorf(kind.Invalid, "remote target %.80q: name twice or empty", t.Name)
		}
		if t.Transport != TransportTCP && t.Transport != TransportRDMA && t.Transport != TransportRBD {
			return nil, kind.Errorf(kind.Invalid, "remote target %s: transport %.40q is not %s, %s or %s", t.Name, t.Transport, TransportTCP, TransportRDMA, TransportRBD)
		}
		r.targets[t.Name] = newTarget(r, t)
	}
	var err error
	if r.db, err = openDB(o.DBPath); err != nil {
		return nil, err
	}
	if r.records, r.writables, err = load(r.db); err != nil {
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

// SetKernelHost says whether the host's kernel or a card connects to the stores, and this
// process does not. Attach then does not wait for this process to see a block.
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
	if err = r.usable(t.o.Transport); err == nil {
		err = t.attach(ctx, block)
	}
	if rec, ok := r.record(targetName, block); err == nil && ok && r.readsItself(rec.Transport) {
		err = r.visible(ctx, t, block)
	}
	if err != nil {
		t.wake(true) // the store may have it as attached
		return fmt.Errorf("attach block %s of target %s: %w", block, targetName, err)
	}
	return nil
}

// readsItself tells whether this process is who reads what is attached by a transport.
// Ceph's images are never the kernel's here; with a card OpenRBD is not set.
func (r *Remote) readsItself(transport string) bool {
	return !r.kernelHost.Load() || transport == TransportRBD && r.o.OpenRBD != nil
}

// usable tells whether somebody here can read what is attached by a transport.
func (r *Remote) usable(transport string) error {
	switch {
	case r.kernelHost.Load():
	case transport == TransportRDMA:
		return kind.Errorf(kind.Unsupported, "transport %s needs presentation nvme-fabrics or a card", transport)
	case transport == TransportRBD && r.o.OpenRBD == nil:
		return kind.Errorf(kind.Unsupported, "this program was built without Ceph: transport %s needs the build tag ceph", transport)
	}
	return nil
}

// visible waits until this process reaches a block that was just attached, so that a
// store that answers calls and serves no data is found out before somebody mounts it.
func (r *Remote) visible(ctx context.Context, t *target, block string) error {
	var err error
	if rec, ok := r.record(t.o.Name, block); ok && rec.RBD != nil {
		d := t.imageDevice(block, rec)
		_, err = d.open(ctx)
		d.Close()
	} else {
		d := t.device(block, 0)
		_, err = d.host(ctx)
		d.Close()
	}
	if err != nil {
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
	rec, ok := r.record(targetName, block)
	if !ok {
		return nil
	}
	if err := t.detach(ctx, block, rec.Attachment); err != nil {
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
	if err := r.usable(rec.Transport); err != nil {
		return nil, fmt.Errorf("block %s of target %s: %w", block, targetName, err)
	}
	if rec.RBD != nil {
		return t.imageDevice(block, rec), nil
	}
	return t.device(block, rec.SizeBytes), nil
}

// Export is how a host's own initiator, or a client of Ceph, reaches an attached block.
type Export struct {
	Transport                  string
	Subsystem, HostNQN, HostID string
	Portals                    []Portal
	NSID                       uint32
	UUID                       string
	SizeBytes                  int64
	Writable                   bool
	RBD                        *RBDImage // with TransportRBD, instead of what NVMe needs
}

// RBDImage is an image of Ceph: a snapshot of one, or one that is written to.
type RBDImage struct {
	Cluster  string `json:"cluster,omitempty"` // its fsid
	Pool     string `json:"pool"`
	Image    string `json:"image"`
	Snapshot string `json:"snapshot,omitempty"`
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

// Attachment is Attach, and returns what the store answered, for who reaches the store
// instead of this machine.
func (r *Remote) Attachment(ctx context.Context, targetName, block string) (*attacherv1.Attachment, error) {
	if err := r.Attach(ctx, targetName, block); err != nil {
		return nil, err
	}
	rec, ok := r.record(targetName, block)
	if !ok {
		return nil, kind.Errorf(kind.Unavailable, "block %s of target %s was detached meanwhile", block, targetName)
	}
	return rec.proto(block, ""), nil
}

// Doubt has the store asked again for an attached block that could not be reached by what is
// on record. It does not wait.
func (r *Remote) Doubt(targetName, block string) {
	if t := r.targets[targetName]; t != nil {
		_ = t.doubt(block)
	}
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
	if ok && !old.sameBytes(rec) {
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
