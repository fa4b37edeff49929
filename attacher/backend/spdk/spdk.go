// Package spdk is the backend that keeps lvols in an SPDK, or in `thaw target`, which it
// tells what to do through OPI's gRPC: package opi's services of `thaw bridge`.
//
// Lvols are the target's. It shows them to nodes itself, over NVMe/TCP or RDMA; the
// attacher opens one by having it shown to itself. The target may lose all that it was
// told, as SPDK does when it restarts: what should be there is in memory, is compared with
// what is there, and is told again (keep.go). All names follow from package identity, so
// that what a killed predecessor left is known, and nobody else's is touched.
//
// The package must not know what lvols hold, or what the bridge says to the target.
package spdk

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"
	opiv1 "github.com/opiproject/opi-api/storage/v1alpha1/gen/go"
	"google.golang.org/grpc"

	lvolv1 "github.com/thaw-project/thaw/api/lvol/v1"
	"github.com/thaw-project/thaw/attacher"
	"github.com/thaw-project/thaw/attacher/identity"
	"github.com/thaw-project/thaw/keylock"
	"github.com/thaw-project/thaw/kind"
)

const (
	defaultTimeout  = 30 * time.Second // of one operation, but for those that copy
	defaultPatience = 10 * time.Second // for a target that is away
	defaultPoll     = time.Second      // between looks at whether the target lost what it was told
	fullEvery       = time.Minute      // between comparisons of all there is
	retryPause      = 100 * time.Millisecond
	defaultLoss     = 2 * time.Minute // for I/O of this process while the target is away
	maxPortals      = 16
	parallel        = 8 // nodes that are shown at the same time
)

// Options say where the lvols are. Zero fields take the defaults that each names.
type Options struct {
	// Conn is to the bridge, made with package attacher/rpc, which carries kinds of errors.
	// Whoever made it closes it, after the Backend.
	Conn grpc.ClientConnInterface
	// LvStore is the lvstore's name.
	LvStore string
	// AIO is the file or block device below the lvstore, by its path on the target's machine. When
	// the target has forgotten it, it is told again. Empty: somebody else looks after it.
	AIO string
	// BlockBytes is the block size of AIO; default the device's own below /dev, and 512
	// for a file.
	BlockBytes int
	// Create makes the lvstore on AIO when there is none there, and destroys what else is.
	// It is for the first start of a store only: later an lvstore that is not there
	// is one that could not be loaded.
	Create bool
	// ClusterBytes is the cluster size of a created lvstore; default the target's.
	ClusterBytes int64
	// Portals are where the target listens and nodes find it, as "tcp://192.0.2.1:4420" or
	// "rdma://192.0.2.1:4420". For one that is unspecified (0.0.0.0, ::) a node is told the
	// address by which it reached the attacher.
	Portals []string
	// Own is the portal by which this process opens lvols; default the first of TCP, on this
	// machine when that is unspecified. Without either OpenLvol is kind.Unsupported.
	Own string

	Timeout  time.Duration // of an operation; default 30 s
	Patience time.Duration // how long operations wait for a target that is away; default 10 s
	Poll     time.Duration // default 1 s
	// LossTimeout is how long I/O of OpenLvol's devices waits for the target; default 2 min.
	LossTimeout time.Duration
	Logger      *slog.Logger // nil is silence
}

// portal is where the target listens.
type portal struct {
	transport string // attacher.TransportTCP or TransportRDMA
	addr      netip.AddrPort
}

func parsePortal(s string) (portal, error) {
	scheme, address, _ := strings.Cut(s, "://")
	a, err := netip.ParseAddrPort(address)
	p := portal{addr: a}
	switch {
	case err != nil || a.Port() == 0 || a.Addr().Zone() != "":
		return p, kind.Errorf(kind.Invalid, "portal %.80q: must be as tcp://192.0.2.1:4420 or rdma://192.0.2.1:4420", s)
	case scheme == "tcp":
		p.transport = attacher.TransportTCP
	case scheme == "rdma":
		p.transport = attacher.TransportRDMA
	default:
		return p, kind.Errorf(kind.Invalid, "portal %.80q: the transport must be tcp or rdma", s)
	}
	return p, nil
}

func (o *Options) fill() error {
	if o.BlockBytes == 0 && !strings.HasPrefix(o.AIO, "/dev/") {
		o.BlockBytes = 512
	}
	for p, d := range map[*time.Duration]time.Duration{
		&o.Timeout: defaultTimeout, &o.Patience: defaultPatience, &o.Poll: defaultPoll, &o.LossTimeout: defaultLoss,
	} {
		if *p == 0 {
			*p = d
		}
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	switch {
	case o.Conn == nil:
		return kind.Errorf(kind.Invalid, "spdk backend: no connection to a bridge given")
	case o.Create && o.AIO == "":
		return kind.Errorf(kind.Invalid, "spdk backend: an lvstore can be created only where AIO says")
	case len(o.Portals) > maxPortals:
		return kind.Errorf(kind.Invalid, "spdk backend: %d portals: must be at most %d", len(o.Portals), maxPortals)
	case o.Timeout < 0 || o.Patience < 0 || o.Poll < 0 || o.LossTimeout < 0:
		return kind.Errorf(kind.Invalid, "spdk backend: a negative time")
	}
	return checkName(o.LvStore)
}

// Backend is an attacher.Backend. Make it with New; Close it.
type Backend struct {
	o       Options
	log     *slog.Logger
	lvols   lvolv1.LogicalVolumeServiceClient
	fe      opiv1.FrontendNvmeServiceClient
	aio     opiv1.AioVolumeServiceClient
	portals []portal
	own     *portal // nil: OpenLvol cannot be
	access  access

	id      uuid.UUID // of the lvstore
	store   identity.Store
	cluster int64
	self    string // the node that this process is

	life context.Context // ends with Close
	end  context.CancelFunc
	wg   sync.WaitGroup
	kick chan struct{} // capacity 1: look now

	names  keylock.Set // of lvols: one change at a time to each
	shows  keylock.Set // of nodes: one change at a time to each one's subsystem
	opens  keylock.Set // of lvols' UUIDs: one open or close at a time
	replay chan struct{}

	mu       sync.Mutex
	closed   bool                  // guarded by mu, as are all below
	nodes    map[string]*node      // what should be shown, by name
	changing map[string]bool       // UUIDs of lvols that nobody may begin to use
	clones   map[uuid.UUID]standIn // by nvmeNamespace
	restored bool                  // the attacher said what nodes have
	lost     bool                  // the target lacks what it was told
	checked  time.Time             // when all was compared last
	figures  *lvolv1.LvolStore     // as last heard of
	count    int                   // of lvols, as last heard of
	failing  map[string]struct{}   // exports whose failure was logged
}

// New reaches the target, with its lvstore made if it is to be, and takes away what a
// killed predecessor had open. It waits for a target that is away until ctx ends.
func New(ctx context.Context, o Options) (*Backend, error) {
	if err := o.fill(); err != nil {
		return nil, err
	}
	b := &Backend{
		o: o, log: o.Logger, lvols: lvolv1.NewLogicalVolumeServiceClient(o.Conn), fe: opiv1.NewFrontendNvmeServiceClient(o.Conn),
		aio: opiv1.NewAioVolumeServiceClient(o.Conn), kick: make(chan struct{}, 1), replay: make(chan struct{}, 1),
		nodes: map[string]*node{}, changing: map[string]bool{}, clones: map[uuid.UUID]standIn{}, failing: map[string]struct{}{}, lost: true,
	}
	for _, text := range o.Portals {
		p, err := parsePortal(text)
		if err != nil {
			return nil, err
		}
		b.portals = append(b.portals, p)
	}
	if o.Own != "" {
		p, err := parsePortal(o.Own)
		if err != nil {
			return nil, err
		}
		b.own = &p
	}
	for i, p := range b.portals {
		if b.own == nil && p.transport == attacher.TransportTCP {
			b.own = &b.portals[i]
		}
	}
	if b.own != nil && b.own.transport != attacher.TransportTCP {
		return nil, kind.Errorf(kind.Invalid, "portal %s: this process opens lvols over TCP only", o.Own)
	}
	b.life, b.end = context.WithCancel(context.Background())
	if err := b.first(ctx); err != nil {
		b.end()
		return nil, fmt.Errorf("open lvstore %s: %w", o.LvStore, err)
	}
	b.wg.Go(b.keep)
	return b, nil
}

// first finds or makes the lvstore.
func (b *Backend) first(ctx context.Context) error {
	var s *lvolv1.LvolStore
	for said := false; ; {
		err := b.base(ctx, b.o.Create)
		if err == nil {
			s, err = b.lvols.GetLvolStore(ctx, &lvolv1.GetLvolStoreRequest{Name: b.storeName()})
		}
		if err == nil {
			break
		}
		if !errors.Is(err, kind.Unavailable) || ctx.Err() != nil {
			return err
		}
		if !said {
			b.log.Warn("waiting for the bridge and its target", "error", err)
			said = true
		}
		if werr := b.pause(ctx); werr != nil {
			return err
		}
	}
	id, err := uuid.Parse(s.GetUuid())
	if err != nil || s.GetClusterSizeBytes() <= 0 {
		return kind.Errorf(kind.Corrupt, "the target describes it as %v", s)
	}
	b.id, b.store, b.cluster, b.figures = id, identity.Store{UUID: id}, s.GetClusterSizeBytes(), s
	// No node has such a name, so nobody else is it.
	b.self = "-attacher-" + id.String()
	err = b.converge(ctx)
	if errors.Is(err, kind.Unavailable) { // it will be tried again
		b.log.Warn("the target went away", "error", err)
		err = nil
	}
	return err
}

// Close ends the connections of this process and closes what it has open. What nodes
// have stays.
func (b *Backend) Close() error {
	b.mu.Lock()
	if b.closed {
		b.mu.Unlock()
		return nil
	}
	b.closed = true
	mine := b.nodes[b.self] != nil
	b.mu.Unlock()
	b.end()
	b.wg.Wait()
	err := b.access.close()
	if !mine {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), min(b.o.Timeout, 5*time.Second))
	defer cancel()
	derr := b.deleteSubsystem(ctx, b.store.Subsystem(b.self))
	if errors.Is(derr, kind.Unavailable) { // the next one's start takes it away
		derr = nil
	}
	return errors.Join(err, derr)
}

// operation is the context of one operation.
func (b *Backend) operation() (context.Context, context.CancelFunc) {
	return context.WithTimeout(b.life, b.o.Timeout)
}

// operationFor is the context of one that takes as long as the caller allows.
func (b *Backend) operationFor(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(b.life, cancel)
	return ctx, func() { stop(); cancel() }
}

// pause waits before the next try.
func (b *Backend) pause(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return kind.Wrap(kind.Unavailable, ctx.Err())
	case <-b.life.Done():
		return kind.Errorf(kind.Unavailable, "the backend is closed")
	case <-time.After(retryPause):
		return nil
	}
}

// again does what may be repeated until the target answers, for a while. What the
// target lost is told to it meanwhile.
func (b *Backend) again(ctx context.Context, f func() error) error {
	begin := time.Now()
	for {
		err := f()
		if !errors.Is(err, kind.Unavailable) || time.Since(begin) > b.o.Patience || ctx.Value(keeping{}) != nil {
			return err
		}
		b.look()
		if b.pause(ctx) != nil {
			return err
		}
	}
}

// keeping marks the context of who makes the target available again, for whom nobody else
// would.
type keeping struct{}

// look makes the keeper look at the target now.
func (b *Backend) look() {
	select {
	case b.kick <- struct{}{}:
	default:
	}
}

// checkName holds names to what every SPDK takes.
func checkName(name string) error {
	ok := func(r rune) bool {
		return r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("._-", r)
	}
	if name == "" || len(name) > maxNameBytes || strings.IndexFunc(name, func(r rune) bool { return !ok(r) }) >= 0 {
		return kind.Errorf(kind.Invalid, "name %.80q: must be 1 to %d of A-Z a-z 0-9 . _ -", name, maxNameBytes)
	}
	return nil
}

// maxNameBytes bounds names of lvstores and lvols, as in SPDK.
const maxNameBytes = 63
