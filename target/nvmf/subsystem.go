package nvmf

import (
	"math/rand/v2"
	"sort"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/nvme"
	"github.com/thaw-project/thaw/target/bdev"
	"github.com/thaw-project/thaw/target/engine"
)

type subsystem struct {
	t         *Target
	discovery bool

	mu          sync.RWMutex
	c           SubsystemConfig // AllowAnyHost is guarded by mu, the rest is fixed
	hosts       map[string]struct{}
	listeners   map[*listener]string
	namespaces  map[uint32]*nvmeNamespace
	controllers map[uint16]*controller
	nextID      uint16
}

func newSubsystem(t *Target, c SubsystemConfig) *subsystem {
	if c.MinCNTLID == 0 {
		c.MinCNTLID, c.MaxCNTLID = 1, maxCNTLID
	}
	return &subsystem{t: t, c: c, hosts: map[string]struct{}{}, listeners: map[*listener]string{},
		namespaces: map[uint32]*nvmeNamespace{}, controllers: map[uint16]*controller{}, nextID: c.MinCNTLID}
}

// nvmeNamespace is a device under an identifier. A removed one is never used again.
type nvmeNamespace struct {
	NvmeNamespaceConfig
	dev      bdev.Device
	shift    uint // log2 of BlockBytes
	blocks   atomic.Uint64
	readOnly bool
	removed  atomic.Bool
	owner    engine.Owner  // of a writable device, for commands that readers carry out
	ops      chan struct{} // one for each command of a worker
	drained  chan struct{} // told when a use ends after removal

	mu    sync.Mutex
	users map[*use]struct{} // guarded by mu
}

// use is one connection's use of an nvmeNamespace. The count is the connection's
// own, so that connections share nothing while they work.
type use struct {
	ns       *nvmeNamespace
	inflight atomic.Int32
	costs    [operations]engine.Cost
}

// operation is a kind of command that takes about as long each time.
type operation uint8

const (
	opRead operation = iota
	opWrite
	opFlush
	opOther
	operations
)

func operationOf(cmd *nvme.Command) operation {
	switch cmd.Opcode {
	case nvme.OpRead:
		return opRead
	case nvme.OpWrite:
		if cmd.CDW12&nvme.CDW12FUA != 0 {
			return opFlush
		}
		return opWrite
	case nvme.OpFlush:
		return opFlush
	}
	return opOther
}

// acquire lets the device be used until release, or returns false.
func (u *use) acquire() bool {
	u.inflight.Add(1)
	if u.ns.removed.Load() {
		u.release()
		return false
	}
	return true
}

func (u *use) release() {
	if u.inflight.Add(-1) == 0 && u.ns.removed.Load() {
		select {
		case u.ns.drained <- struct{}{}:
		default:
		}
	}
}

// register makes a use known; nil when the nvmeNamespace is gone.
func (n *nvmeNamespace) register() *use {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.removed.Load() {
		return nil
	}
	u := &use{ns: n}
	n.users[u] = struct{}{}
	return u
}

func (n *nvmeNamespace) unregister(u *use) {
	n.mu.Lock()
	delete(n.users, u)
	n.mu.Unlock()
}

// drain waits until nobody uses the device. removed is set.
func (n *nvmeNamespace) drain() {
	n.mu.Lock()
	users := make([]*use, 0, len(n.users))
	for u := range n.users {
		users = append(users, u)
	}
	n.mu.Unlock()
	// One signal may stand for several uses, so look again now and then.
	again := time.NewTicker(10 * time.Millisecond)
	defer again.Stop()
	for _, u := range users {
		for u.inflight.Load() != 0 {
			select {
			case <-n.drained:
			case <-again.C:
			}
		}
	}
}

func (n *nvmeNamespace) identify() nvme.NvmeNamespace {
	return nvme.NvmeNamespace{Blocks: n.blocks.Load(), BlockBytes: n.BlockBytes, Shared: true, DLFEAT: nvme.DLFEATZeros | nvme.DLFEATDeallocate,
		ReadOnly: n.readOnly, NGUID: n.NGUID, EUI64: n.EUI64}
}

func (s *subsystem) add(c NvmeNamespaceConfig) (uint32, error) {
	n := &nvmeNamespace{dev: c.Device, shift: 9, readOnly: c.Device.ReadOnly(),
		ops: make(chan struct{}, namespaceOps), drained: make(chan struct{}, 1), users: map[*use]struct{}{}}
	if c.BlockBytes == 4096 {
		n.shift = 12
	}
	n.blocks.Store(uint64(c.Device.SizeBytes()) >> n.shift)
	s.mu.Lock()
	if c.NSID == 0 {
		for c.NSID = 1; s.namespaces[c.NSID] != nil; {
			c.NSID++
		}
	}
	var err error
	if c.NSID > s.c.MaxNvmeNamespaces {
		err = kind.Errorf(kind.NoSpace, "nvmeNamespace %d of %s: there can be %d", c.NSID, s.c.NQN, s.c.MaxNvmeNamespaces)
	} else if s.namespaces[c.NSID] != nil {
		err = kind.Errorf(kind.Exists, "nvmeNamespace %d of %s exists", c.NSID, s.c.NQN)
	}
	for _, o := range s.namespaces {
		if err == nil && (o.UUID == c.UUID || o.NGUID == c.NGUID) {
			err = kind.Errorf(kind.Exists, "nvmeNamespace %d of %s has UUID %s already", o.NSID, s.c.NQN, o.UUID)
		}
	}
	if err != nil {
		s.mu.Unlock()
		return 0, err
	}
	n.NvmeNamespaceConfig = c
	s.namespaces[c.NSID] = n
	s.mu.Unlock()
	s.changed(c.NSID)
	return c.NSID, nil
}

func (s *subsystem) remove(nsid uint32) error {
	s.mu.Lock()
	n := s.namespaces[nsid]
	delete(s.namespaces, nsid)
	s.mu.Unlock()
	if n == nil {
		return kind.Errorf(kind.NotFound, "nvmeNamespace %d of %s does not exist", nsid, s.c.NQN)
	}
	n.removed.Store(true)
	s.changed(nsid)
	n.drain()
	return nil
}

// changed tells every controller that an nvmeNamespace came or went.
func (s *subsystem) changed(nsid uint32) {
	for _, c := range s.all() {
		c.event(nvme.EventNvmeNamespace, nsid)
	}
}

func (s *subsystem) lookup(nsid uint32) *nvmeNamespace {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.namespaces[nsid]
}

// ids returns the active nvmeNamespaces, ascending.
func (s *subsystem) ids() []uint32 {
	s.mu.RLock()
	ids := make([]uint32, 0, len(s.namespaces))
	for id := range s.namespaces {
		ids = append(ids, id)
	}
	s.mu.RUnlock()
	sort.Slice(ids, func(i, j int) bool { return ids[i] < ids[j] })
	return ids
}

func (s *subsystem) allows(host string) bool {
	s.mu.RLock()
	defer s.mu.RUnlock()
	_, ok := s.hosts[host]
	return ok || s.c.AllowAnyHost
}

func (s *subsystem) listens(l *listener) bool {
	s.mu.RLock()
	defer s.mu.RUnlock()
	_, ok := s.listeners[l]
	return ok || s.discovery
}

func (s *subsystem) addresses() (a []string) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	for _, x := range s.listeners {
		a = append(a, x)
	}
	sort.Strings(a)
	return a
}

// attach gives c an identifier and makes it known; false when none is free.
func (s *subsystem) attach(c *controller) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := int(s.c.MaxCNTLID) - int(s.c.MinCNTLID) + 1
	if len(s.controllers) >= n {
		return false
	}
	for s.controllers[s.nextID] != nil {
		s.advance()
	}
	c.id = s.nextID
	s.advance() // an identifier rests for as long as possible before it is used again
	s.controllers[c.id] = c
	return true
}

func (s *subsystem) advance() {
	if s.nextID++; s.nextID > s.c.MaxCNTLID || s.nextID == 0 {
		s.nextID = s.c.MinCNTLID
	}
}

// gone tells whether the subsystem was deleted.
func (s *subsystem) gone() bool {
	if s.discovery {
		return false
	}
	o, err := s.t.subsystem(s.c.NQN)
	return err != nil || o != s
}

func (s *subsystem) detach(c *controller) {
	s.mu.Lock()
	delete(s.controllers, c.id)
	s.mu.Unlock()
}

func (s *subsystem) controller(id uint16) *controller {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.controllers[id]
}

func (s *subsystem) all() []*controller {
	s.mu.RLock()
	defer s.mu.RUnlock()
	all := make([]*controller, 0, len(s.controllers))
	for _, c := range s.controllers {
		all = append(all, c)
	}
	return all
}

// dropControllers ends the controllers that match. Their connections close by
// themselves.
func (s *subsystem) dropControllers(match func(*controller) bool, why string) {
	for _, c := range s.all() {
		if match(c) {
			c.drop(why)
		}
	}
}

func (s *subsystem) info() SubsystemInfo {
	i := SubsystemInfo{Listeners: s.addresses()}
	s.mu.RLock()
	i.SubsystemConfig = s.c
	for h := range s.hosts {
		i.Hosts = append(i.Hosts, h)
	}
	for _, n := range s.namespaces {
		i.NvmeNamespaces = append(i.NvmeNamespaces, n.NvmeNamespaceConfig)
	}
	s.mu.RUnlock()
	for _, c := range s.all() {
		if info, ok := c.info(); ok {
			i.Controllers = append(i.Controllers, info)
		}
	}
	sort.Strings(i.Hosts)
	sort.Slice(i.NvmeNamespaces, func(a, b int) bool { return i.NvmeNamespaces[a].NSID < i.NvmeNamespaces[b].NSID })
	sort.Slice(i.Controllers, func(a, b int) bool { return i.Controllers[a].CNTLID < i.Controllers[b].CNTLID })
	return i
}

// controller is a host's association: an admin queue and its I/O queues.
type controller struct {
	s       *subsystem
	ln      *listener
	id      uint16
	hostNQN string
	hostID  uuid.UUID
	admin   *conn
	created time.Time
	seen    atomic.Bool  // a command came since the janitor looked
	last    atomic.Int64 // when the janitor last saw one, on the target's clock

	live atomic.Bool // CSTS.RDY, and not dropped

	resets atomic.Int32  // cross-controller resets that it waits for
	ended  chan struct{} // closed when it was dropped and no command of it runs any more

	mu        sync.Mutex
	dropped   bool // guarded by mu, as are all below
	members   int  // connections, admin queue included
	ciu       uint8
	cirn      uint64
	queues    map[uint16]*conn
	maxQueues int // I/O queues the host asked for and got
	queuesSet bool
	gone      total // work of queues that are no more
	kato      time.Duration
	cc, csts  uint32
	asyncCfg  uint32
	aers      []uint16        // command identifiers that wait for an event
	pending   map[uint32]bool // events by result, not yet reported
	masked    map[uint32]bool // reported, until the log page is read
	changedNS map[uint32]struct{}
	overflow  bool // more changed than the list holds
	errors    [errorEntries]nvme.ErrorEntry
	errCount  uint64
}

// ready tells whether commands other than Fabrics may run.
func (c *controller) ready() bool {
	return c.live.Load()
}

// refusal is the status of a command that comes while the controller is not ready. One
// that was dropped takes its connections along, and the host must do again elsewhere
// what it asked of it: an error without a retry would reach its applications.
func (c *controller) refusal() nvme.Status {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.dropped {
		return nvme.AbortedSQDeletion
	}
	return nvme.SequenceError | nvme.DNR
}

// renew makes the controller another instance, as hosts tell them apart (Base 2.3, CIU
// and CIRN). It is called with mu held, or before others know of c.
func (c *controller) renew() {
	if c.ciu++; c.ciu == 0 {
		c.ciu = 1
	}
	c.cirn = rand.Uint64() | 1
}

// leave ends the membership of a connection none of whose commands runs any more.
// The identifier is free again once the last has left.
func (c *controller) leave() {
	c.mu.Lock()
	c.members--
	last := c.members == 0
	c.mu.Unlock()
	if last {
		c.s.detach(c)
		close(c.ended)
	}
}

// drop ends the controller and all its connections. What runs on a device goes on; see
// ended.
func (c *controller) drop(why string) {
	c.mu.Lock()
	if c.dropped {
		c.mu.Unlock()
		return
	}
	c.dropped = true
	c.live.Store(false)
	conns := []*conn{c.admin}
	for _, q := range c.queues {
		conns = append(conns, q)
	}
	c.mu.Unlock()
	for _, q := range conns {
		q.close(why)
	}
}

// info describes the controller; false when it was dropped.
func (c *controller) info() (ControllerInfo, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return ControllerInfo{CNTLID: c.id, HostNQN: c.hostNQN, HostID: c.hostID, Peer: c.admin.raw.RemoteAddr().String(), Queues: len(c.queues)}, !c.dropped
}

// event notes an event and reports it if the host waits for one. It never blocks on
// the peer.
func (c *controller) event(result, nsid uint32) {
	c.mu.Lock()
	if nsid != 0 {
		if len(c.changedNS) >= nvme.MaxList {
			c.overflow = true
		} else {
			c.changedNS[nsid] = struct{}{}
		}
	}
	if c.enabled(result) {
		c.pending[result] = true
	}
	c.mu.Unlock()
	c.report()
}

// report answers waiting requests with events that are enabled and not masked.
func (c *controller) report() {
	for {
		c.mu.Lock()
		var result uint32
		for r := range c.pending {
			if c.enabled(r) && !c.masked[r] {
				result = r
			}
		}
		if result == 0 || len(c.aers) == 0 || c.dropped {
			c.mu.Unlock()
			return
		}
		cid := c.aers[0]
		c.aers = append(c.aers[:0], c.aers[1:]...)
		delete(c.pending, result)
		c.masked[result] = true
		c.mu.Unlock()
		c.admin.respond(cid, uint64(result), nvme.Success)
		c.admin.kick()
	}
}

func (c *controller) enabled(result uint32) bool {
	switch result {
	case nvme.EventNvmeNamespace:
		return c.asyncCfg&nvme.OAESNvmeNamespace != 0
	case nvme.EventDiscovery:
		return c.asyncCfg&nvme.OAESDiscovery != 0
	}
	return false
}

// unmask lets an event be reported again, since its log page was read.
func (c *controller) unmask(result uint32) {
	c.mu.Lock()
	delete(c.masked, result)
	c.mu.Unlock()
	c.report()
}

// logError adds to the error log.
func (c *controller) logError(e nvme.ErrorEntry) {
	c.mu.Lock()
	c.errCount++
	e.Count = c.errCount
	c.errors[c.errCount%errorEntries] = e
	c.mu.Unlock()
}
