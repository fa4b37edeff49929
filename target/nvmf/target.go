package nvmf

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"sort"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/nvme"
	"github.com/thaw-project/thaw/target/bdev"
	"github.com/thaw-project/thaw/target/engine"
)

// Limits that no option changes.
const (
	// ReceiveBytes is the receive buffer of a connection.
	ReceiveBytes = 16 << 10

	// AdminCapsule is how much data an admin capsule may carry (TCP 3.3
	// wants exactly this).
	AdminCapsule = 8192

	// AdminDepth is the most entries of an admin queue, MinDepth the least of any.
	AdminDepth = 128
	MinDepth   = 2

	// MaxNvmeNamespaces is the largest nvmeNamespace identifier and their number.
	MaxNvmeNamespaces = 1024

	// asyncLimit is how many Asynchronous Event Requests wait, abortLimit is ACL.
	asyncLimit = 4
	abortLimit = 4

	// errorEntries is the length of the error log.
	errorEntries = 64

	// maxR2T is how many R2Ts of one command are outstanding at most, whatever the
	// host allows.
	maxR2T = 4
)

// Options are the limits of a target. Zero fields take the defaults that each names.
type Options struct {
	MaxConnections int           // open connections; default 4096
	MaxQueues      int           // I/O queues per controller; default 16
	QueueDepth     int           // entries of an I/O queue; default 128, at most 1024
	MaxTransfer    int           // bytes per command (MDTS), a power of two of at least 4096; default 128 KiB
	InCapsule      int           // bytes of data in an I/O capsule, a multiple of 16; default 8192, negative for none
	MaxH2CData     int           // bytes of data in one H2CData; default MaxTransfer
	R2TBytes       int           // bytes that one R2T asks for, a multiple of 4; default MaxTransfer
	MemoryPerConn  int           // bytes of data in flight per connection; default and least 8 times MaxTransfer
	Handshake      time.Duration // from accept to a finished Connect; default 10 s
	PDUTimeout     time.Duration // from the first byte of a PDU to its last, and from an R2T to its data; default 30 s
	WriteTimeout   time.Duration // for the peer to take what is sent; default 30 s
	Tick           time.Duration // how often timeouts are looked at; default 250 ms
	NoDigests      bool          // refuse header and data digests
	NoCrossReset   bool          // be a target of before Base 2.3, without Cross-Controller Reset
	Engine         engine.Kind   // where commands run; default engine.SharedNothing
	Log            *slog.Logger  // default: none
}

func (o *Options) fill() error {
	set := func(p *int, v int) {
		if *p == 0 {
			*p = v
		}
	}
	set(&o.MaxConnections, 4096)
	set(&o.MaxQueues, 16)
	set(&o.QueueDepth, 128)
	set(&o.MaxTransfer, 128<<10)
	set(&o.InCapsule, 8192)
	if o.InCapsule < 0 {
		o.InCapsule = 0
	}
	set(&o.MaxH2CData, o.MaxTransfer)
	set(&o.R2TBytes, o.MaxTransfer)
	o.MemoryPerConn = max(o.MemoryPerConn, 8*o.MaxTransfer)
	for p, v := range map[*time.Duration]time.Duration{&o.Handshake: 10 * time.Second, &o.PDUTimeout: 30 * time.Second,
		&o.WriteTimeout: 30 * time.Second, &o.Tick: 250 * time.Millisecond} {
		if *p == 0 {
			*p = v
		}
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	switch {
	case o.MaxTransfer < 4096 || o.MaxTransfer > 1<<20 || o.MaxTransfer&(o.MaxTransfer-1) != 0:
		return kind.Errorf(kind.Invalid, "largest transfer of %d bytes is no power of two from 4096 to 1 MiB", o.MaxTransfer)
	case o.QueueDepth < MinDepth || o.QueueDepth > 1024:
		return kind.Errorf(kind.Invalid, "queue depth %d is not from %d to 1024", o.QueueDepth, MinDepth)
	case o.MaxQueues < 1 || o.MaxQueues > 1024:
		return kind.Errorf(kind.Invalid, "%d I/O queues are not from 1 to 1024", o.MaxQueues)
	case o.InCapsule%16 != 0 || o.InCapsule > o.MaxTransfer:
		return kind.Errorf(kind.Invalid, "%d bytes in a capsule are no multiple of 16 up to the largest transfer", o.InCapsule)
	case o.MaxH2CData < nvme.MinH2CData || o.MaxH2CData%4 != 0 || o.R2TBytes < 512 || o.R2TBytes%4 != 0:
		return kind.Errorf(kind.Invalid, "H2CData of %d and R2T of %d bytes", o.MaxH2CData, o.R2TBytes)
	}
	return o.Engine.Validate()
}

// Target is a set of subsystems and the listeners that lead to them. All methods may
// be called concurrently.
type Target struct {
	o     Options
	pools pools
	now   atomic.Int64 // coarse clock, ns since start, written by the janitor
	start time.Time
	wg    sync.WaitGroup // listeners, connections, janitor
	quit  chan struct{}
	ops   chan struct{} // one for each command on a device
	pool  *engine.Pool  // nil unless that is the engine

	mu         sync.Mutex
	closed     bool                  // guarded by mu, as are all below
	subsystems map[string]*subsystem // by NQN, without discovery
	listeners  map[string]*listener  // by address asked for
	conns      map[*conn]struct{}
	generation uint64 // GENCTR of the discovery log
	nextPort   uint16

	discovery *subsystem
}

// New makes a target without subsystems; the error is kind.Invalid for bad options.
// Close it.
func New(o Options) (*Target, error) {
	if err := o.fill(); err != nil {
		return nil, err
	}
	t := &Target{o: o, start: time.Now(), quit: make(chan struct{}), ops: make(chan struct{}, deviceOps), subsystems: map[string]*subsystem{},
		listeners: map[string]*listener{}, conns: map[*conn]struct{}{}, generation: 1}
	t.pools.init(o.MaxTransfer)
	if o.Engine == engine.ThreadPool {
		t.pool = engine.NewPool()
	}
	t.discovery = newSubsystem(t, SubsystemConfig{NQN: nvme.DiscoveryNQN, AllowAnyHost: true, Model: "Thaw discovery"})
	t.discovery.discovery = true
	t.wg.Add(1)
	go t.janitor()
	return t, nil
}

// Close drops every connection and waits until no goroutine of the target is left
// and no device is used. It closes no device.
func (t *Target) Close() error {
	t.mu.Lock()
	if t.closed {
		t.mu.Unlock()
		return nil
	}
	t.closed = true
	close(t.quit)
	for _, l := range t.listeners {
		l.nl.Close()
	}
	for c := range t.conns {
		c.close("target closes")
	}
	t.mu.Unlock()
	t.wg.Wait()
	if t.pool != nil {
		t.pool.Close()
	}
	return nil
}

// janitor keeps the coarse clock and looks at every timeout.
func (t *Target) janitor() {
	defer t.wg.Done()
	tick := time.NewTicker(t.o.Tick)
	defer tick.Stop()
	var conns []*conn
	for {
		select {
		case <-t.quit:
			return
		case <-tick.C:
		}
		now := int64(time.Since(t.start))
		t.now.Store(now)
		conns = conns[:0]
		t.mu.Lock()
		for c := range t.conns {
			conns = append(conns, c)
		}
		t.mu.Unlock()
		for _, c := range conns {
			c.check(now)
		}
		clear(conns)
	}
}

// SubsystemConfig describes a subsystem.
type SubsystemConfig struct {
	NQN               string
	Serial            string // at most 20 bytes of ASCII; default "00000000000000000000"
	Model             string // at most 40; default "Thaw"
	MaxNvmeNamespaces uint32 // default and at most MaxNvmeNamespaces
	AllowAnyHost      bool
	MinCNTLID         uint16 // default 1
	MaxCNTLID         uint16 // default 0xffef
}

const maxCNTLID = 0xffef

func checkASCII(what, s string, n int) error {
	if len(s) > n {
		return kind.Errorf(kind.Invalid, "%s %q is longer than %d", what, s, n)
	}
	for _, c := range []byte(s) {
		if c < 0x20 || c > 0x7e {
			return kind.Errorf(kind.Invalid, "%s %q is not printable ASCII", what, s)
		}
	}
	return nil
}

// CreateSubsystem adds a subsystem; errors are kind.Invalid and kind.Exists.
func (t *Target) CreateSubsystem(c SubsystemConfig) error {
	if err := nvme.CheckNQN(c.NQN); err != nil {
		return err
	}
	if c.Serial == "" {
		c.Serial = "00000000000000000000"
	}
	if c.Model == "" {
		c.Model = "Thaw"
	}
	if c.MaxNvmeNamespaces == 0 {
		c.MaxNvmeNamespaces = MaxNvmeNamespaces
	}
	if c.MinCNTLID == 0 {
		c.MinCNTLID = 1
	}
	if c.MaxCNTLID == 0 {
		c.MaxCNTLID = maxCNTLID
	}
	if err := errors.Join(checkASCII("serial number", c.Serial, 20), checkASCII("model number", c.Model, 40)); err != nil {
		return kind.Wrap(kind.Invalid, err)
	}
	if c.MaxNvmeNamespaces > MaxNvmeNamespaces || c.MinCNTLID > c.MaxCNTLID || c.MaxCNTLID > maxCNTLID {
		return kind.Errorf(kind.Invalid, "subsystem %s with %d nvmeNamespaces and controllers %d to %d", c.NQN, c.MaxNvmeNamespaces, c.MinCNTLID, c.MaxCNTLID)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.subsystems[c.NQN] != nil || c.NQN == nvme.DiscoveryNQN {
		return kind.Errorf(kind.Exists, "subsystem %s exists", c.NQN)
	}
	t.subsystems[c.NQN] = newSubsystem(t, c)
	return nil
}

// DeleteSubsystem drops the subsystem's controllers and returns once none of its
// devices is used; the error is kind.NotFound.
func (t *Target) DeleteSubsystem(nqn string) error {
	t.mu.Lock()
	s := t.subsystems[nqn]
	delete(t.subsystems, nqn)
	t.mu.Unlock()
	if s == nil {
		return kind.Errorf(kind.NotFound, "subsystem %s does not exist", nqn)
	}
	s.dropControllers(func(*controller) bool { return true }, "subsystem deleted")
	for _, id := range s.ids() {
		// An nvmeNamespace that somebody else removes meanwhile is as good.
		_ = s.remove(id)
	}
	for _, a := range s.addresses() {
		_ = t.dropListener(s, a)
	}
	t.discoveryChanged()
	return nil
}

func (t *Target) subsystem(nqn string) (*subsystem, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	s := t.subsystems[nqn]
	if s == nil {
		return nil, kind.Errorf(kind.NotFound, "subsystem %s does not exist", nqn)
	}
	return s, nil
}

// NvmeNamespaceConfig describes an nvmeNamespace.
type NvmeNamespaceConfig struct {
	NSID       uint32 // default: the lowest that is free
	Device     bdev.Device
	Name       string    // what the device is called, for Subsystems
	UUID       uuid.UUID // default: derived from NGUID, or random
	NGUID      [16]byte  // default: the UUID
	EUI64      [8]byte
	BlockBytes uint32 // 512 (default) or 4096; divides the device's size

	// Inline serves commands on the connection's reader. Right for devices that
	// answer from memory; any other makes the commands behind it wait.
	Inline bool

	// Adaptive does so too, for each kind of command as long as the device waits less
	// than engine.SlowAfter for it, as measured. Right for files, whose data
	// is mostly in memory; a device that may suddenly hang, as one behind a
	// network, would make commands of other nvmeNamespaces wait.
	Adaptive bool
}

// AddNvmeNamespace attaches a device and tells every connected host. It returns the
// nvmeNamespace's identifier. Errors are kind.NotFound, kind.Exists, kind.Invalid
// and kind.NoSpace.
func (t *Target) AddNvmeNamespace(nqn string, c NvmeNamespaceConfig) (uint32, error) {
	s, err := t.subsystem(nqn)
	if err != nil {
		return 0, err
	}
	if c.BlockBytes == 0 {
		c.BlockBytes = 512
	}
	if c.Device == nil || c.BlockBytes != 512 && c.BlockBytes != 4096 || c.Device.SizeBytes() <= 0 || c.Device.SizeBytes()%int64(c.BlockBytes) != 0 {
		return 0, kind.Errorf(kind.Invalid, "nvmeNamespace %s of %s: no device, or its size is no multiple of a block of %d bytes", c.Name, nqn, c.BlockBytes)
	}
	if c.UUID == uuid.Nil {
		if c.UUID = uuid.New(); c.NGUID != [16]byte{} {
			c.UUID = c.NGUID
		}
	}
	if c.NGUID == [16]byte{} {
		c.NGUID = c.UUID
	}
	return s.add(c)
}

// RemoveNvmeNamespace detaches a device, tells every connected host, and returns once
// no command uses the device. The error is kind.NotFound.
func (t *Target) RemoveNvmeNamespace(nqn string, nsid uint32) error {
	s, err := t.subsystem(nqn)
	if err != nil {
		return err
	}
	return s.remove(nsid)
}

// ResizeNvmeNamespace takes over the present size of a device, rounded down to whole
// blocks, and tells every connected host if it changed. A device that shrinks must
// still answer what was checked against its old size. The error is kind.NotFound.
func (t *Target) ResizeNvmeNamespace(nqn string, nsid uint32) error {
	s, err := t.subsystem(nqn)
	if err != nil {
		return err
	}
	n := s.lookup(nsid)
	if n == nil {
		return kind.Errorf(kind.NotFound, "nvmeNamespace %d of %s does not exist", nsid, nqn)
	}
	if size := uint64(n.dev.SizeBytes()) >> n.shift; n.blocks.Swap(size) != size {
		s.changed(nsid)
	}
	return nil
}

// AddHost allows a host NQN to connect. Errors are kind.NotFound, kind.Invalid and
// kind.Exists.
func (t *Target) AddHost(nqn, host string) error {
	if err := nvme.CheckNQN(host); err != nil {
		return err
	}
	s, err := t.subsystem(nqn)
	if err != nil {
		return err
	}
	s.mu.Lock()
	_, ok := s.hosts[host]
	s.hosts[host] = struct{}{}
	s.mu.Unlock()
	if ok {
		return kind.Errorf(kind.Exists, "host %s is allowed at %s already", host, nqn)
	}
	t.discoveryChanged()
	return nil
}

// RemoveHost no longer allows a host NQN and drops its controllers, unless any host
// may connect. The error is kind.NotFound.
func (t *Target) RemoveHost(nqn, host string) error {
	s, err := t.subsystem(nqn)
	if err != nil {
		return err
	}
	s.mu.Lock()
	_, ok := s.hosts[host]
	delete(s.hosts, host)
	anyHost := s.c.AllowAnyHost
	s.mu.Unlock()
	if !ok {
		return kind.Errorf(kind.NotFound, "host %s is not allowed at %s", host, nqn)
	}
	if !anyHost {
		s.dropControllers(func(c *controller) bool { return c.hostNQN == host }, "host removed")
	}
	t.discoveryChanged()
	return nil
}

// AllowAnyHost sets whether hosts need to be on the list. Taking the right away drops
// the controllers of those that are not.
func (t *Target) AllowAnyHost(nqn string, allow bool) error {
	s, err := t.subsystem(nqn)
	if err != nil {
		return err
	}
	s.mu.Lock()
	s.c.AllowAnyHost = allow
	s.mu.Unlock()
	if !allow {
		s.dropControllers(func(c *controller) bool { return !s.allows(c.hostNQN) }, "host not allowed")
	}
	t.discoveryChanged()
	return nil
}

// ListenerConfig says where to listen.
type ListenerConfig struct {
	Address string // IP address and port; port 0 takes a free one

	// Advertise is the address and port that the discovery log gives instead, for hosts
	// that reach this one through a translation of addresses; port 0 is the one that was
	// taken. Default: Address, or for an unspecified one the address that the host came
	// to. Subsystems that share an address share the first one's.
	Advertise string

	// Upgrade, when set, turns an accepted connection into the one that speaks
	// NVMe/TCP: the place of TLS (TCP 3.6.1.4 and 3.6.1.5). It runs on the
	// connection's goroutine under the handshake timeout of ctx. Subsystems that share an
	// address share the first one's.
	Upgrade func(ctx context.Context, nc net.Conn) (net.Conn, error)
}

type listener struct {
	nl      net.Listener
	upgrade func(context.Context, net.Conn) (net.Conn, error)
	told    string // what discovery tells instead of the address, if anything
	port    uint16 // PORTID
	users   int    // subsystems, guarded by Target.mu
}

// AddListener makes the subsystem, or discovery by its NQN, reachable at an address,
// which several subsystems may share, and returns the address with the port that was taken. Errors are
// kind.NotFound, kind.Invalid, kind.Exists and those of listening.
func (t *Target) AddListener(nqn string, lc ListenerConfig) (string, error) {
	var err error
	if lc.Address, err = canonical(lc.Address); err != nil {
		return "", err
	}
	if lc.Advertise != "" {
		if lc.Advertise, err = canonical(lc.Advertise); err != nil {
			return "", err
		}
	}
	s, err := t.reachable(nqn)
	if err != nil {
		return "", err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return "", kind.Errorf(kind.Unavailable, "listen at %s: target is closed", lc.Address)
	}
	l := t.listeners[lc.Address]
	if l == nil {
		nl, err := net.Listen("tcp", lc.Address)
		if err != nil {
			return "", fmt.Errorf("listen at %s for %s: %w", lc.Address, nqn, err)
		}
		t.nextPort++
		l = &listener{nl: nl, upgrade: lc.Upgrade, told: lc.Advertise, port: t.nextPort}
		// As it was asked for, with the port that was taken: 0.0.0.0 is also IPv6's ::, and the
		// next subsystem asks for 0.0.0.0 again.
		asked, bound := netip.MustParseAddrPort(lc.Address), nl.Addr().(*net.TCPAddr)
		lc.Address = netip.AddrPortFrom(asked.Addr(), uint16(bound.Port)).String()
		t.listeners[lc.Address] = l
		t.wg.Add(1)
		go t.accept(l)
	}
	s.mu.Lock()
	_, ok := s.listeners[l]
	s.listeners[l] = lc.Address
	s.mu.Unlock()
	if ok {
		return "", kind.Errorf(kind.Exists, "%s listens at %s already", nqn, lc.Address)
	}
	l.users++
	t.generation++
	t.notifyDiscoveryLocked()
	return lc.Address, nil
}

// canonical is the one way to write an address.
func canonical(address string) (string, error) {
	a, err := netip.ParseAddrPort(address)
	if err != nil || a.Addr().Zone() != "" {
		return "", kind.Errorf(kind.Invalid, "listen address %q is not an IP address with a port", address)
	}
	return a.String(), nil
}

// RemoveListener makes the subsystem unreachable at an address, as AddListener
// returned it, and drops the controllers that came that way. The error is
// kind.NotFound.
func (t *Target) RemoveListener(nqn, address string) error {
	s, err := t.reachable(nqn)
	if err != nil {
		return err
	}
	if address, err = canonical(address); err != nil {
		return err
	}
	if err := t.dropListener(s, address); err != nil {
		return err
	}
	t.discoveryChanged()
	return nil
}

func (t *Target) dropListener(s *subsystem, address string) error {
	t.mu.Lock()
	l := t.listeners[address]
	s.mu.Lock()
	_, ok := s.listeners[l]
	delete(s.listeners, l)
	s.mu.Unlock()
	if !ok {
		t.mu.Unlock()
		return kind.Errorf(kind.NotFound, "%s does not listen at %s", s.c.NQN, address)
	}
	if l.users--; l.users == 0 {
		delete(t.listeners, address)
		l.nl.Close()
		// Discovery controllers came this way too: the address is gone for all.
		for c := range t.conns {
			if c.ln == l {
				c.close("listener removed")
			}
		}
	}
	t.mu.Unlock()
	s.dropControllers(func(c *controller) bool { return c.ln == l }, "listener removed")
	return nil
}

// acceptPause is how long accepting rests after an error that may pass, such as too
// many open files.
const acceptPause = 50 * time.Millisecond

func (t *Target) accept(l *listener) {
	defer t.wg.Done()
	for {
		nc, err := l.nl.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			t.o.Log.Warn("accept failed", "address", l.nl.Addr(), "err", err)
			select {
			case <-t.quit:
				return
			case <-time.After(acceptPause):
			}
			continue
		}
		c := newConn(t, l, nc)
		t.mu.Lock()
		full := t.closed || len(t.conns) >= t.o.MaxConnections
		if !full {
			t.conns[c] = struct{}{}
			t.wg.Add(1)
		}
		t.mu.Unlock()
		if full {
			t.o.Log.Warn("connection refused: there are too many", "peer", nc.RemoteAddr(), "limit", t.o.MaxConnections)
			nc.Close()
			continue
		}
		go func() {
			defer t.wg.Done()
			c.run()
			t.mu.Lock()
			delete(t.conns, c)
			t.mu.Unlock()
		}()
	}
}

// discoveryChanged tells discovery controllers that their log page changed.
func (t *Target) discoveryChanged() {
	t.mu.Lock()
	t.generation++
	t.notifyDiscoveryLocked()
	t.mu.Unlock()
}

func (t *Target) notifyDiscoveryLocked() {
	for _, c := range t.discovery.all() {
		c.event(nvme.EventDiscovery, 0)
	}
}

// SubsystemInfo is the present state of a subsystem.
type SubsystemInfo struct {
	SubsystemConfig
	Hosts          []string
	Listeners      []string
	NvmeNamespaces []NvmeNamespaceConfig
	Controllers    []ControllerInfo
}

// ControllerInfo is a connected host's controller.
type ControllerInfo struct {
	CNTLID  uint16
	HostNQN string
	HostID  uuid.UUID
	Peer    string // address of the admin queue's other end
	Queues  int    // connected I/O queues
}

// Subsystems returns all subsystems but discovery, sorted by NQN.
func (t *Target) Subsystems() []SubsystemInfo {
	t.mu.Lock()
	var all []*subsystem
	for _, s := range t.subsystems {
		all = append(all, s)
	}
	t.mu.Unlock()
	sort.Slice(all, func(i, j int) bool { return strings.Compare(all[i].c.NQN, all[j].c.NQN) < 0 })
	infos := make([]SubsystemInfo, 0, len(all))
	for _, s := range all {
		infos = append(infos, s.info())
	}
	return infos
}

// Connections is the number of open connections.
func (t *Target) Connections() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.conns)
}
