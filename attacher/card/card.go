// Package card is a DPU's attacher: it shows disks to the host that the card is plugged
// into, as NVMe drives, each on a PCIe function of its own.
//
// It serves the Card service of api/attacher/v1 and works by OPI's storage API, spoken to
// the bridge of the card's own target: connect to the store's subsystem, find the
// nvmeNamespace there, and show it in a subsystem of its own on a leased function. It must
// not know what is on a disk, who stores it, which target the card runs, or how a function
// becomes a controller.
//
// # What survives
//
// A disk is on record (card.db) from before the first step until after the last, and every
// name that is made for it derives from the record (attacher/identity). So a step may be
// repeated, a successor knows what its predecessor may have made, and what bears the card's
// names without being on record is an orphan. Nothing else is ever changed or deleted. What
// the target lost, because it was restarted, is made again.
//
// docs/dpu.md describes it for its users.
package card

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.etcd.io/bbolt"
	"google.golang.org/grpc"

	attacherv1 "github.com/thaw-project/thaw/api/attacher/v1"
	"github.com/thaw-project/thaw/attacher/hold"
	"github.com/thaw-project/thaw/attacher/identity"
	"github.com/thaw-project/thaw/failpoint"
	"github.com/thaw-project/thaw/keylock"
	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/statedb"
)

const (
	// DefaultHoldGrace is how long the owners of a killed attacher have to hold again, and
	// callers that got no answer to ask again; part of the contract.
	DefaultHoldGrace = 7 * time.Second

	// DefaultInterval is how often what the target has is compared with what is on record.
	DefaultInterval = 2 * time.Second

	// downInterval is the same while the target does not answer: one that is back is
	// noticed soon.
	downInterval = 200 * time.Millisecond

	// callMost bounds a call to the bridge that reaches no other machine, and plugMost one
	// for which the host may have to do something.
	callMost = 15 * time.Second
	plugMost = 25 * time.Second

	// connectMost bounds an attempt to connect to a portal; connectNext is when the next
	// portal is tried too.
	connectMost = 12 * time.Second
	connectNext = 300 * time.Millisecond

	// findMost is how long a store may take to show an nvmeNamespace to a card that is
	// connected: it is told to at once.
	findMost = 10 * time.Second

	// attachMost and detachMost bound AttachDisk and DetachDisk as a whole, and undoMost the
	// removal of what was made when AttachDisk fails, after which that goes on in the
	// background.
	attachMost = 45 * time.Second
	detachMost = time.Minute
	undoMost   = 5 * time.Second

	// releaseMost is how long DetachDisk tries when the function is in use.
	releaseMost = 3 * time.Second

	// maxParallel bounds the disks that are repaired or removed at the same time
	// in the background.
	maxParallel = 8

	maxNameBytes = 128 // of ids and owners: what lvol names have
	maxPortals   = 16  // of one attachment
	maxFunctions = 4096
)

// Options says what a Card works with.
type Options struct {
	// Bridge is a connection to the OPI bridge of the card's own target.
	Bridge grpc.ClientConnInterface
	// DBPath is the database, card.db.
	DBPath string
	// Host is the node that the card is plugged into, as stores know it: attachments are
	// for it, and the card's names derive from it.
	Host string
	// Functions are those that may be given to disks. Whatever shows somebody else's
	// subsystem is not.
	Functions []Function
	// HoldGrace is how long owners known from before a restart have to hold again; 0 is
	// DefaultHoldGrace.
	HoldGrace time.Duration
	// Interval is how often what the target has is compared with what is on record; 0 is
	// DefaultInterval.
	Interval time.Duration
	// Logger is where repairs and failures in the background go; nil is silence.
	Logger *slog.Logger
	// Registerer takes the card's metrics; nil for none.
	Registerer prometheus.Registerer
	Now        func() time.Time // nil is time.Now
}

func (o *Options) ensureDefaults() {
	if o.HoldGrace == 0 {
		o.HoldGrace = DefaultHoldGrace
	}
	if o.Interval == 0 {
		o.Interval = DefaultInterval
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Now == nil {
		o.Now = time.Now
	}
}

// Validate says what is wrong with the options.
func (o *Options) Validate() error {
	switch {
	case o.Bridge == nil || o.DBPath == "":
		return kind.Errorf(kind.Invalid, "a card's attacher needs a connection to its bridge and a database path")
	case len(o.Functions) == 0 || len(o.Functions) > maxFunctions:
		return kind.Errorf(kind.Invalid, "a card's attacher needs 1 to %d PCIe functions that it may use", maxFunctions)
	case o.HoldGrace < 0 || o.Interval < 0:
		return kind.Errorf(kind.Invalid, "a card's attacher: a time is negative")
	}
	seen := make(map[Function]bool)
	for _, f := range o.Functions {
		if seen[f] {
			return kind.Errorf(kind.Invalid, "PCIe function %s is given twice", f)
		}
		seen[f] = true
	}
	return identity.CheckNode(o.Host)
}

// Card implements attacherv1.CardServer. Its methods may be called concurrently, and return
// errors with kinds: rpc.ServerOptions turn them into statuses.
type Card struct {
	attacherv1.UnsafeCardServer

	o      Options
	names  identity.Card
	db     *statedb.DB
	bridge *bridge

	// locks are one for each subsystem, by NQN, that keeps others from its disk, and one
	// for each remote controller, by name, for whoever makes or deletes it; taken in this
	// order.
	locks keylock.Set

	// holds are the owners; never called with mu locked, but for Stop.
	holds *hold.Set

	mu       sync.Mutex
	users    map[string]map[string]struct{} // guarded by mu: NQNs by the remote controller that they need
	mending  map[string]*mending            // guarded by mu: by remote controller
	problems map[string]string              // guarded by mu: by NQN
	left     map[string]bool                // guarded by mu: NQNs that a predecessor was attaching
	paths    map[string][]string            // guarded by mu: ids of paths that were seen, by remote controller
	queued   map[string]bool                // guarded by mu: locks for which something waits or goes on, see aside
	closing  bool                           // guarded by mu
	calls    sync.WaitGroup                 // Add under mu while not closing

	busy busy // what functions show

	slots chan struct{} // maxParallel: an element for each disk that is repaired or removed in the background

	life context.Context // ends with Stop
	end  context.CancelFunc
	wake chan struct{}  // capacity 1: there may be something to do
	own  sync.WaitGroup // the card's goroutines

	metrics *metrics

	// step is called between the steps of an operation; tests stop there.
	step func(name string)
}

var _ attacherv1.CardServer = (*Card)(nil)

// New opens the database and starts the background work, which takes up what a predecessor
// left as soon as the bridge answers. Stop and Close it.
func New(o Options) (*Card, error) { return open(o, failpoint.Reach) }

func open(o Options, step func(string)) (*Card, error) {
	o.ensureDefaults()
	if err := o.Validate(); err != nil {
		return nil, err
	}
	db, err := openDB(o.DBPath)
	if err != nil {
		return nil, err
	}
	c := &Card{
		o: o, names: identity.Card{Host: o.Host}, db: db, bridge: newBridge(o.Bridge),
		users: make(map[string]map[string]struct{}), mending: make(map[string]*mending),
		paths: make(map[string][]string), queued: make(map[string]bool), problems: make(map[string]string), left: make(map[string]bool), wake: make(chan struct{}, 1), slots: make(chan struct{}, maxParallel), step: step,
	}
	c.metrics = newMetrics(c)
	c.life, c.end = context.WithCancel(context.Background())
	c.holds = hold.New(hold.Options{Server: "the card's attacher", Grace: o.HoldGrace, End: c.endHeld, Logger: o.Logger})
	if err = c.takeUp(); err == nil && o.Registerer != nil {
		err = o.Registerer.Register(c.metrics)
	}
	if err != nil {
		c.Stop()
		return nil, errors.Join(fmt.Errorf("start card's attacher from %s: %w", o.DBPath, err), db.Close())
	}
	c.own.Go(c.endAbsent)
	c.own.Go(c.keep)
	return c, nil
}

// takeUp reads every record once, so that damage shows at start.
func (c *Card) takeUp() error {
	all, err := c.disks()
	if err != nil {
		return err
	}
	if err := c.db.View(func(tx *bbolt.Tx) error { _, err := leases(tx); return err }); err != nil {
		return err
	}
	for _, d := range all {
		c.need(d)
		if d.State == attaching {
			c.left[d.nqn] = true
		}
		if d.Owner != "" {
			c.holds.Expect(d.Owner)
		}
	}
	return nil
}

// Stop ends all holds without touching what they hold, because their owners will hold
// again at the next attacher, and refuses further calls. Call it before the gRPC server is
// stopped: afterwards the end of a connection could not be told from the death of its
// client.
func (c *Card) Stop() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.closing {
		c.closing = true
		c.end()
		c.holds.Stop()
	}
}

// Close stops, waits for calls and the background work, and closes the database. Drives
// stay.
func (c *Card) Close() error {
	c.Stop()
	c.calls.Wait()
	c.own.Wait()
	c.holds.Wait()
	if c.o.Registerer != nil {
		c.o.Registerer.Unregister(c.metrics)
	}
	return c.db.Close()
}

// enter counts a call in; leave it with c.calls.Done. Who may call is for the server to
// decide: whoever may has all disks of the host.
func (c *Card) enter() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closing {
		return kind.Errorf(kind.Unavailable, "the card's attacher is stopping: try again when it is back")
	}
	c.calls.Add(1)
	return nil
}

// poke wakes the background work.
func (c *Card) poke() {
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

// need notes that a disk needs its remote controller.
func (c *Card) need(d *disk) {
	if d.controller == "" {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.users[d.controller] == nil {
		c.users[d.controller] = make(map[string]struct{})
	}
	c.users[d.controller][d.nqn] = struct{}{}
}

// unneed is the end of that, and tells whether any other disk needs the controller. Whoever
// still tries to connect it for nobody stops.
func (c *Card) unneed(d *disk) (needed bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.users[d.controller], d.nqn)
	if len(c.users[d.controller]) > 0 {
		return true
	}
	delete(c.users, d.controller)
	if m := c.mending[d.controller]; m != nil {
		if m.cancel != nil {
			m.cancel()
		}
		delete(c.mending, d.controller)
	}
	return false
}

func (c *Card) needed(controller string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.users[controller]) > 0
}

// ListDisks implements attacherv1.CardServer.
func (c *Card) ListDisks(ctx context.Context, _ *attacherv1.ListDisksRequest) (*attacherv1.ListDisksResponse, error) {
	if err := c.enter(); err != nil {
		return nil, err
	}
	defer c.calls.Done()
	all, err := c.disks()
	if err != nil {
		return nil, fmt.Errorf("list disks: %w", err)
	}
	out := &attacherv1.ListDisksResponse{}
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, d := range all {
		p := d.proto(c.names)
		p.Problem = c.problems[d.nqn]
		if p.Problem == "" && d.State != attached {
			p.Problem = string(d.State)
		}
		out.Disks = append(out.Disks, p)
	}
	return out, nil
}

// ListFunctions implements attacherv1.CardServer. It lists those that the card may use and
// those that a disk has from when it might.
func (c *Card) ListFunctions(ctx context.Context, _ *attacherv1.ListFunctionsRequest) (*attacherv1.ListFunctionsResponse, error) {
	if err := c.enter(); err != nil {
		return nil, err
	}
	defer c.calls.Done()
	shown, err := c.shown(ctx, false)
	if err != nil {
		return nil, fmt.Errorf("list functions: %w", err)
	}
	all, err := c.disks()
	if err != nil {
		return nil, fmt.Errorf("list functions: %w", err)
	}
	has := make(map[Function]*disk, len(all))
	functions := append([]Function(nil), c.o.Functions...)
	for _, d := range all {
		has[d.Function] = d
		functions = append(functions, d.Function)
	}
	out := &attacherv1.ListFunctionsResponse{}
	listed := make(map[Function]bool, len(functions))
	for _, f := range functions {
		if listed[f] {
			continue
		}
		listed[f] = true
		u := &attacherv1.FunctionUse{Function: f.proto()}
		if d := has[f]; d != nil {
			u.Id, u.Purpose = d.ID, d.Purpose
		}
		if nqn := shown[f]; !c.names.OwnsSubsystem(nqn) {
			u.ForeignNqn = nqn
		}
		out.Functions = append(out.Functions, u)
	}
	return out, nil
}
