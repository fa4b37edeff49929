// Package host is an NVMe/TCP host in user space: it connects to the controllers of a
// subsystem and presents its nvmeNamespaces as bdev.Device.
//
// A Host has a path per portal: a controller with an admin queue and I/O queues of
// its own. I/O goes over one path at a time. When it fails, commands that were not
// answered are sent again over the next path that lives, or over the same one once
// it is back; callers wait meanwhile, for at most Config.LossTimeout. Sending again
// is safe for a caller because it does not know of success before the answer: a read
// is read again, a write writes the same bytes.
//
// What a failed path still holds, in the target or on the way there, must not be
// carried out after that, or it would undo newer writes. So a write that was sent
// and not answered is held back until the lost controller is gone: the target is told
// to end it, by Cross-Controller Reset over a path that lives. Targets without that
// command are given time to notice by their keep alive timer (NVM Express TP4129:
// three times its timeout, and what they need to end commands). Reads, and writes
// that were not on the failed path, go on meanwhile.
//
// The package knows bdev.Device and the wire; it does not know who uses the disks.
package host

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"sort"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/nvme"
)

// maxNvmeNamespaces bounds how many nvmeNamespaces of a subsystem are looked at.
const maxNvmeNamespaces = 4096

// Config says how to connect. Zero fields take the defaults that each names.
type Config struct {
	Portals []string // addresses with port; the first that lives is used
	SubNQN  string
	HostNQN string    // default: derived from HostID
	HostID  uuid.UUID // default: random

	Queues       int  // I/O queues; default 1
	Depth        int  // entries per queue; default 128
	HeaderDigest bool //
	DataDigest   bool //
	NoInCapsule  bool // write only by R2T; Linux 6.12's target never asks for data that a capsule could have held
	MaxR2T       int  // outstanding R2Ts per command, 1 to 4; default 4

	KeepAlive      time.Duration // default 5 s, negative for none
	IOTimeout      time.Duration // for one command on one path; default 30 s
	ConnectTimeout time.Duration // for a path to connect; default 10 s
	ReconnectDelay time.Duration // before the first attempt to reconnect, doubled up to ReconnectMax; default 100 ms
	ReconnectMax   time.Duration // default 10 s
	LossTimeout    time.Duration // how long I/O waits for a path before it fails; default 10 min

	// Quiesce is for how long a write that a failed path left unanswered is held back
	// before it is sent again, where the target has no Cross-Controller Reset: see
	// the package comment. Default: 3 times KeepAlive and what the target says it
	// takes, or IOTimeout without KeepAlive; negative for not at all.
	Quiesce time.Duration

	// Dial opens connections; the place of TLS. Default: TCP.
	Dial func(ctx context.Context, addr string) (net.Conn, error)

	// Changed, when set, is called after nvmeNamespaces came, went or changed. It
	// must not block.
	Changed func()

	// Refused, when set, is called when a target answers and says that it has no such
	// subsystem or does not let this host in. The host tries again all the same. It
	// must not block.
	Refused func(err error)

	Log *slog.Logger // default: none
}

func (c *Config) fill() error {
	duration := func(p *time.Duration, d time.Duration) {
		if *p == 0 {
			*p = d
		}
	}
	if c.HostID == uuid.Nil {
		c.HostID = uuid.New()
	}
	if c.HostNQN == "" {
		c.HostNQN = "nqn.2014-08.org.nvmexpress:uuid:" + c.HostID.String()
	}
	if c.Queues == 0 {
		c.Queues = 1
	}
	if c.Depth == 0 {
		c.Depth = 128
	}
	if c.MaxR2T == 0 {
		c.MaxR2T = maxR2T
	}
	duration(&c.KeepAlive, 5*time.Second)
	c.KeepAlive = max(c.KeepAlive, 0)
	duration(&c.IOTimeout, 30*time.Second)
	duration(&c.ConnectTimeout, 10*time.Second)
	duration(&c.ReconnectDelay, 100*time.Millisecond)
	duration(&c.ReconnectMax, 10*time.Second)
	duration(&c.LossTimeout, 10*time.Minute)
	if c.Dial == nil {
		c.Dial = func(ctx context.Context, addr string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "tcp", addr)
		}
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.Queues < 1 || c.Queues > 128 || c.Depth < 4 || c.Depth > 1024 || c.MaxR2T < 1 || c.MaxR2T > maxR2T || len(c.Portals) == 0 {
		return kind.Errorf(kind.Invalid, "%d queues of %d entries with %d R2Ts over %d portals", c.Queues, c.Depth, c.MaxR2T, len(c.Portals))
	}
	return nvme.CheckNQN(c.HostNQN)
}

// NvmeNamespace describes an nvmeNamespace of the subsystem.
type NvmeNamespace struct {
	NSID       uint32
	UUID       uuid.UUID // from the NGUID when the target gives none
	NGUID      [16]byte
	EUI64      [8]byte
	SizeBytes  int64
	BlockBytes uint32
	ReadOnly   bool

	id nvme.NvmeNamespace
}

// Host is a connected host of one subsystem. All methods may be called concurrently.
type Host struct {
	c      Config
	ctx    context.Context // ends with Close
	cancel context.CancelFunc
	wg     sync.WaitGroup

	live atomic.Pointer[controller] // what I/O uses, nil when no path lives
	max  atomic.Int64               // bytes per command of the path that came up last

	scan sync.Mutex

	mu         sync.Mutex
	paths      []*controller // by portal, nil when down; guarded by mu, as are all below
	portals    []portal
	change     chan struct{} // closed and replaced when a path comes up
	closed     bool
	namespaces map[uint32]*shared
}

// shared is what all devices of an nvmeNamespace see of it.
type shared struct {
	ns   atomic.Pointer[NvmeNamespace]
	gone atomic.Bool
	edit sync.RWMutex // writers of part of a block hold it alone
}

// Connect connects to a subsystem over every portal and returns when one path lives;
// ctx bounds only that. If none does, the errors of all are joined. Close the Host.
func Connect(ctx context.Context, c Config) (*Host, error) {
	if err := errors.Join(c.fill(), nvme.CheckNQN(c.SubNQN)); err != nil {
		return nil, kind.Wrap(kind.Invalid, err)
	}
	run, cancel := context.WithCancel(context.Background())
	h := &Host{c: c, ctx: run, cancel: cancel, change: make(chan struct{}), namespaces: map[uint32]*shared{}}
	first := make(chan error, len(c.Portals))
	for _, addr := range c.Portals {
		h.addPath(addr, first)
	}
	var errs []error
	for range c.Portals {
		select {
		case err := <-first:
			if err == nil {
				return h, nil
			}
			errs = append(errs, err)
		case <-ctx.Done():
			h.Close()
			return nil, kind.Wrap(kind.Unavailable, fmt.Errorf("connect to %s: %w", c.SubNQN, errors.Join(append(errs, ctx.Err())...)))
		}
	}
	h.Close()
	return nil, errors.Join(errs...)
}

// Close tells the target and ends all paths. Waiting I/O fails with kind.Unavailable.
func (h *Host) Close() error {
	h.mu.Lock()
	h.closed = true
	h.mu.Unlock()
	h.cancel()
	h.wg.Wait()
	h.wake()
	return nil
}

// run keeps the path of one portal: connect, watch, back off, again. The outcome of
// the first attempt goes to first.
func (h *Host) run(ctx context.Context, portal int, addr string, first chan<- error) {
	delay := h.c.ReconnectDelay
	for {
		cctx, cancel := context.WithTimeout(ctx, h.c.ConnectTimeout)
		ct, err := connectController(cctx, &h.c, addr, h.c.SubNQN, h.c.Queues)
		if err == nil {
			stop := context.AfterFunc(cctx, func() { ct.fail(context.Cause(cctx)) })
			err = h.rescan(ct)
			if !stop() && err == nil {
				err = context.Cause(cctx)
			}
			if err != nil {
				ct.close()
			}
		}
		cancel()
		if err == nil {
			h.c.Log.Info("path is up", "subsystem", h.c.SubNQN, "portal", addr, "controller", ct.cntlid, "queues", len(ct.io), "depth", ct.depth)
			h.up(portal, ct)
		}
		if first != nil {
			first <- err
			first = nil
		}
		if err == nil {
			begin := time.Now()
			err = ct.watch(ctx, func() error { return h.rescan(ct) })
			if time.Since(begin) > h.c.ReconnectMax {
				delay = h.c.ReconnectDelay // it was not just another failed attempt
			}
			h.down(portal)
			if ctx.Err() != nil {
				ct.shutdown()
				return
			}
			ct.close()
			h.c.Log.Warn("path is down", "subsystem", h.c.SubNQN, "portal", addr, "err", err)
		} else if ctx.Err() == nil {
			h.c.Log.Warn("path does not connect", "subsystem", h.c.SubNQN, "portal", addr, "again", delay, "err", err)
			var status *nvme.StatusError
			if h.c.Refused != nil && errors.As(err, &status) && status.Status.Refuses() {
				h.c.Refused(err)
			}
		}
		// Hosts that lost a target together come back apart.
		select {
		case <-ctx.Done():
			return
		case <-time.After(delay/2 + rand.N(delay/2+1)):
		}
		delay = min(2*delay, h.c.ReconnectMax)
	}
}

// choose makes the first living path the one that I/O uses. It is called with mu
// held. A path in use stays in use.
func (h *Host) choose() {
	now := h.live.Load()
	var best *controller
	for _, ct := range h.paths {
		if ct != nil && (best == nil || ct == now) {
			best = ct
		}
	}
	h.live.Store(best)
}

func (h *Host) up(portal int, ct *controller) {
	h.mu.Lock()
	h.paths[portal] = ct
	h.max.Store(int64(ct.max))
	h.choose()
	h.mu.Unlock()
	h.wake()
}

func (h *Host) down(portal int) {
	h.mu.Lock()
	h.paths[portal] = nil
	h.choose()
	h.mu.Unlock()
}

// failed takes a path out of use whose queue failed under a command.
func (h *Host) failed(ct *controller, err error) {
	ct.fail(err)
	h.mu.Lock()
	for i := range h.paths {
		if h.paths[i] == ct {
			h.paths[i] = nil
		}
	}
	h.choose()
	h.mu.Unlock()
}

// wake wakes I/O that waits for a path.
func (h *Host) wake() {
	h.mu.Lock()
	close(h.change)
	h.change = make(chan struct{})
	h.mu.Unlock()
}

// rescan takes over what a controller says of the nvmeNamespaces.
func (h *Host) rescan(ct *controller) error {
	h.scan.Lock() // one at a time, so that what is taken over last is the newest
	defer h.scan.Unlock()
	found, err := ct.scan()
	if err != nil {
		return err
	}
	changed := false
	seen := map[uint32]bool{}
	h.mu.Lock()
	for _, n := range found {
		seen[n.NSID] = true
		s := h.namespaces[n.NSID]
		if s != nil && (s.ns.Load().UUID != n.UUID || s.ns.Load().BlockBytes != n.BlockBytes) {
			// Another disk under the same number: whoever had the old one must not
			// write to the new one.
			s.gone.Store(true)
			s = nil
		}
		if s == nil {
			s = &shared{}
			h.namespaces[n.NSID] = s
		}
		if old := s.ns.Load(); old == nil || *old != n {
			s.ns.Store(&n)
			changed = true
		}
	}
	for id, s := range h.namespaces {
		if !seen[id] {
			s.gone.Store(true)
			delete(h.namespaces, id)
			changed = true
		}
	}
	h.mu.Unlock()
	if changed && h.c.Changed != nil {
		h.c.Changed()
	}
	return nil
}

// NvmeNamespaces lists the active nvmeNamespaces, by NSID, as last heard of.
func (h *Host) NvmeNamespaces() []NvmeNamespace {
	h.mu.Lock()
	all := make([]NvmeNamespace, 0, len(h.namespaces))
	for _, s := range h.namespaces {
		all = append(all, *s.ns.Load())
	}
	h.mu.Unlock()
	sort.Slice(all, func(i, j int) bool { return all[i].NSID < all[j].NSID })
	return all
}

// Paths tells for each portal whether it is connected.
func (h *Host) Paths() []bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	up := make([]bool, len(h.paths))
	for i, ct := range h.paths {
		up[i] = ct != nil
	}
	return up
}

// Open returns the device of an nvmeNamespace; the error is kind.NotFound. Closing
// the device leaves the Host connected.
func (h *Host) Open(nsid uint32) (*Device, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	s := h.namespaces[nsid]
	if s == nil {
		return nil, kind.Errorf(kind.NotFound, "%s has no nvmeNamespace %d", h.c.SubNQN, nsid)
	}
	return &Device{h: h, s: s, nsid: nsid, block: int64(s.ns.Load().BlockBytes)}, nil
}

// OpenUUID is Open by UUID, which stays when numbers change.
func (h *Host) OpenUUID(id uuid.UUID) (*Device, error) {
	for _, n := range h.NvmeNamespaces() {
		if n.UUID == id {
			return h.Open(n.NSID)
		}
	}
	return nil, kind.Errorf(kind.NotFound, "%s has no nvmeNamespace %s", h.c.SubNQN, id)
}

// maxRetries and retryPause are for commands whose status allows a retry.
const (
	maxRetries = 5
	retryPause = 20 * time.Millisecond
)

// do runs an I/O command over whatever path lives, again if need be.
func (h *Host) do(d *Device, cmd *nvme.Command, dir direction, data []byte) error {
	var deadline time.Time
	for tries := 0; ; {
		if d.s.gone.Load() {
			return kind.Errorf(kind.NotFound, "nvmeNamespace %d of %s is gone", cmd.NSID, h.c.SubNQN)
		}
		if d.closed.Load() {
			return kind.Errorf(kind.Unavailable, "device of nvmeNamespace %d of %s is closed", cmd.NSID, h.c.SubNQN)
		}
		ct := h.live.Load()
		if ct == nil {
			if err := h.wait(&deadline); err != nil {
				return err
			}
			continue
		}
		cqe, err := ct.queue().do(cmd, dir, data)
		if err != nil {
			h.failed(ct, err)
			if changes(cmd.Opcode) && !errors.Is(err, errUnsent) {
				if err := h.fence(ct, &deadline); err != nil {
					return err
				}
			}
			continue
		}
		if cqe.Status.OK() {
			return nil
		}
		tries++
		if cqe.Status&nvme.DNR != 0 || tries > maxRetries {
			return cqe.Status.Err()
		}
		time.Sleep(time.Duration(tries) * retryPause)
	}
}

// wait waits until a path lives. The first call of a command sets its deadline.
func (h *Host) wait(deadline *time.Time) error {
	h.mu.Lock()
	change, closed := h.change, h.closed
	h.mu.Unlock()
	if closed {
		return kind.Errorf(kind.Unavailable, "host of %s is closed", h.c.SubNQN)
	}
	if h.live.Load() != nil {
		return nil
	}
	if deadline.IsZero() {
		*deadline = time.Now().Add(h.c.LossTimeout)
	}
	t := time.NewTimer(time.Until(*deadline))
	defer t.Stop()
	select {
	case <-change:
		return nil
	case <-t.C:
		return kind.Errorf(kind.Unavailable, "no path to %s for %v", h.c.SubNQN, h.c.LossTimeout)
	}
}

// Discover asks a discovery controller at addr for what the host may connect to. Of c
// it uses identity, digests, timeouts and Dial.
func Discover(ctx context.Context, addr string, c Config) ([]nvme.DiscoveryEntry, error) {
	c.Portals = []string{addr}
	if err := c.fill(); err != nil {
		return nil, err
	}
	c.KeepAlive = 0
	ctx, cancel := context.WithTimeout(ctx, c.ConnectTimeout)
	defer cancel()
	ct, err := connectController(ctx, &c, addr, nvme.DiscoveryNQN, 0)
	if err != nil {
		return nil, err
	}
	defer ct.shutdown()
	stop := context.AfterFunc(ctx, func() { ct.admin.fail(context.Cause(ctx)) })
	defer stop()
	return ct.discoveryLog()
}

// maxDiscovery bounds the entries of a discovery log, discoveryTries how often it may
// change while it is read.
const (
	maxDiscovery   = 4096
	discoveryTries = 8
)

func (ct *controller) discoveryLog() ([]nvme.DiscoveryEntry, error) {
	get := func(b []byte, off uint64) error {
		_, err := ct.command(nvme.GetLogPage(nvme.LogDiscovery, 0, off, len(b), false), toHost, b)
		if err != nil {
			return fmt.Errorf("read discovery log of %s: %w", ct.addr, err)
		}
		return nil
	}
	head := make([]byte, nvme.DiscoveryHeader)
	for range discoveryTries {
		var log, after nvme.DiscoveryLog
		if err := get(head, 0); err != nil {
			return nil, err
		}
		if err := log.Parse(head); err != nil {
			return nil, err
		}
		if log.Entries > maxDiscovery {
			return nil, kind.Errorf(kind.Invalid, "discovery log of %s has %d entries", ct.addr, log.Entries)
		}
		entries := make([]nvme.DiscoveryEntry, log.Entries)
		b := make([]byte, nvme.DiscoveryLen)
		for i := range entries {
			if err := get(b, uint64(nvme.DiscoveryHeader+i*nvme.DiscoveryLen)); err != nil {
				if errors.Is(err, kind.Invalid) {
					break // it became shorter; the generation tells
				}
				return nil, err
			}
			if err := entries[i].Parse(b); err != nil {
				return nil, err
			}
		}
		if err := get(head, 0); err != nil {
			return nil, err
		}
		if err := after.Parse(head); err != nil {
			return nil, err
		}
		if after == log {
			return entries, nil
		}
	}
	return nil, kind.Errorf(kind.Unavailable, "discovery log of %s changes faster than it can be read", ct.addr)
}
