package spdk

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"runtime"
	"sync"
	"time"

	"github.com/thaw-project/thaw/attacher"
	"github.com/thaw-project/thaw/attacher/identity"
	"github.com/thaw-project/thaw/failpoint"
	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/nvme/host"
	"github.com/thaw-project/thaw/target/bdev"
)

// maxQueues bounds the I/O queues of this process's connection.
const maxQueues = 4

// access is the connection by which this process opens lvols.
type access struct {
	mu      sync.Mutex
	host    *host.Host    // guarded by mu; nil until the first open
	changed chan struct{} // guarded by mu: closed and replaced when nvmeNamespaces come and go
	closed  bool          // guarded by mu
}

// connect returns the host, connected.
func (b *Backend) connect(ctx context.Context) (*host.Host, error) {
	a := &b.access
	a.mu.Lock()
	h, closed := a.host, a.closed
	a.mu.Unlock()
	if h != nil || closed {
		if closed {
			return nil, kind.Errorf(kind.Unavailable, "the backend is closed")
		}
		return h, nil
	}
	// Opens of different lvols may come here at once: they hold the lock of the node.
	addr := b.own.addr
	switch ip := addr.Addr(); {
	case ip == netip.IPv4Unspecified():
		addr = netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), addr.Port())
	case ip.IsUnspecified():
		addr = netip.AddrPortFrom(netip.IPv6Loopback(), addr.Port())
	}
	h, err := host.Connect(ctx, host.Config{
		Portals: []string{addr.String()}, SubNQN: b.store.Subsystem(b.self), HostNQN: identity.HostNQN(b.self), HostID: identity.HostID(b.self),
		Queues: min(maxQueues, runtime.GOMAXPROCS(0)), LossTimeout: b.o.LossTimeout, ReconnectMax: time.Second, Log: b.log, Changed: a.wake,
	})
	if err != nil {
		return nil, err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.closed {
		return nil, errors.Join(kind.Errorf(kind.Unavailable, "the backend is closed"), h.Close())
	}
	a.host = h
	return h, nil
}

// wait returns a channel that is closed at the next change.
func (a *access) wait() <-chan struct{} {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.changed == nil {
		a.changed = make(chan struct{})
	}
	return a.changed
}

func (a *access) wake() {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.changed != nil {
		close(a.changed)
		a.changed = nil
	}
}

func (a *access) close() error {
	a.mu.Lock()
	h := a.host
	a.host, a.closed = nil, true
	a.mu.Unlock()
	if h == nil {
		return nil
	}
	return h.Close()
}

// OpenLvol implements attacher.Backend: the target shows the lvol to this process, which
// opens it over NVMe/TCP. All devices of an lvol share that.
func (b *Backend) OpenLvol(name string, readOnly bool) (bdev.Device, error) {
	if b.own == nil {
		return nil, kind.Errorf(kind.Unsupported, "open lvol %.80s: no portal of TCP is configured for it", name)
	}
	ctx, cancel := b.operation()
	defer cancel()
	l, err := b.lookup(ctx, name)
	if err != nil {
		return nil, err
	}
	fixed := l.GetReadOnly() || l.GetSnapshot()
	if fixed && !readOnly {
		return nil, kind.Errorf(kind.ReadOnly, "open lvol %s for writing: it is read-only", name)
	}
	id := l.GetUuid()
	unlock, err := b.opens.Lock(ctx, id)
	if err != nil {
		return nil, kind.Wrap(kind.Unavailable, err)
	}
	defer unlock()
	d, err := b.hold(name, id, l.GetSizeBytes(), !fixed)
	if err == nil {
		failpoint.Reach("backend.open: wanted")
		var dev *host.Device
		if dev, err = b.attach(ctx, d); err == nil {
			return &device{b: b, d: d, dev: dev, readOnly: readOnly}, nil
		}
		err = errors.Join(err, b.release(d))
	}
	return nil, fmt.Errorf("open lvol %s: %w", name, err)
}

// hold notes one more device of an lvol. The caller has its opens locked.
func (b *Backend) hold(name, id string, size int64, writable bool) (*disk, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return nil, kind.Errorf(kind.Unavailable, "the backend is closed")
	}
	if b.changing[id] {
		return nil, kind.Errorf(kind.InUse, "it is being deleted or changed")
	}
	n := b.nodeLocked(b.self)
	if d := n.disks[id]; d != nil && d.refs > 0 {
		d.refs++
		return d, nil
	}
	nsid, err := n.freeLocked()
	if err != nil {
		return nil, err
	}
	d := &disk{lvol: name, id: id, nsid: nsid, writable: writable, transport: attacher.TransportTCP, size: size, refs: 1}
	n.disks[id] = d // of one that is leaving, the nvmeNamespace is not the same and goes
	return d, nil
}

// freeLocked returns the identifier after the last: one that was just given up is not
// used again soon. The caller holds mu.
func (n *node) freeLocked() (uint32, error) {
	used := make(map[uint32]bool, len(n.disks))
	for _, d := range n.disks {
		used[d.nsid] = true
	}
	for range attacher.MaxAttachments {
		n.next = n.next%attacher.MaxAttachments + 1
		if !used[n.next] {
			return n.next, nil
		}
	}
	return 0, kind.Errorf(kind.NoSpace, "%d lvols are open, which is the most", len(n.disks))
}

// attach makes a disk visible to this process and opens it.
func (b *Backend) attach(ctx context.Context, d *disk) (*host.Device, error) {
	if err := b.show(ctx, b.self, d); err != nil {
		return nil, err
	}
	failpoint.Reach("backend.open: shown")
	unlock, err := b.shows.Lock(ctx, b.self)
	if err != nil {
		return nil, kind.Wrap(kind.Unavailable, err)
	}
	h, err := b.connect(ctx)
	unlock()
	if err != nil {
		return nil, err
	}
	b.mu.Lock()
	want := b.store.NvmeNamespace(d.space(), b.self)
	b.mu.Unlock()
	for {
		changed := b.access.wait()
		for _, n := range h.NvmeNamespaces() {
			if n.NSID == d.nsid && n.UUID == want {
				return h.Open(d.nsid)
			}
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, kind.Errorf(kind.Unavailable, "the target shows nvmeNamespace %d and this process does not see it: %w", d.nsid, ctx.Err())
		}
	}
}

// release ends one device's use. The caller has the lvol's opens locked.
func (b *Backend) release(d *disk) error {
	b.mu.Lock()
	d.refs--
	left, closed := d.refs, b.closed
	b.mu.Unlock()
	if left > 0 || closed {
		return nil
	}
	ctx, cancel := b.operation()
	defer cancel()
	err := b.withdraw(ctx, b.self, d.id, d)
	failpoint.Reach("backend.close: withdrawn")
	return err
}

// device is an open lvol.
type device struct {
	b        *Backend
	d        *disk
	dev      *host.Device
	readOnly bool

	gate   sync.RWMutex // Close waits for what is under way
	closed bool         // guarded by gate
}

var _ bdev.Device = (*device)(nil)

func (v *device) enter() error {
	v.gate.RLock()
	if v.closed {
		v.gate.RUnlock()
		return kind.Errorf(kind.Unavailable, "lvol %s is closed", v.d.lvol)
	}
	return nil
}

// changing begins what changes the lvol.
func (v *device) changing(op string) error {
	if v.readOnly {
		return kind.Errorf(kind.ReadOnly, "%s lvol %s: open read-only", op, v.d.lvol)
	}
	return v.enter()
}

func (v *device) SizeBytes() int64 { return v.dev.SizeBytes() }
func (v *device) ReadOnly() bool   { return v.readOnly }

func (v *device) ReadAt(p []byte, off int64) (int, error) {
	if err := v.enter(); err != nil {
		return 0, err
	}
	defer v.gate.RUnlock()
	return v.dev.ReadAt(p, off)
}

func (v *device) WriteAt(p []byte, off int64) (int, error) {
	if err := v.changing("write"); err != nil {
		return 0, err
	}
	defer v.gate.RUnlock()
	return v.dev.WriteAt(p, off)
}

func (v *device) Flush() error {
	if err := v.enter(); err != nil {
		return err
	}
	defer v.gate.RUnlock()
	if v.readOnly {
		return nil
	}
	return v.dev.Flush()
}

func (v *device) Discard(off, length int64) error {
	if err := v.changing("discard"); err != nil {
		return err
	}
	defer v.gate.RUnlock()
	return v.dev.Discard(off, length)
}

func (v *device) WriteZeroes(off, length int64) error {
	if err := v.changing("write zeroes"); err != nil {
		return err
	}
	defer v.gate.RUnlock()
	return v.dev.WriteZeroes(off, length)
}

// Close ends what waits for a target that is away. When the last device of an lvol is
// closed, the lvol is taken away from this process; a target that cannot be told now is
// told later.
func (v *device) Close() error {
	if err := v.dev.Close(); err != nil {
		return err
	}
	v.gate.Lock()
	if v.closed {
		v.gate.Unlock()
		return nil
	}
	v.closed = true
	v.gate.Unlock()
	unlock, err := v.b.opens.Lock(context.Background(), v.d.id)
	if err != nil {
		return err
	}
	defer unlock()
	if err := v.b.release(v.d); err != nil {
		v.b.log.Warn("an lvol that was closed is still shown to this process; trying again", "lvol", v.d.lvol, "error", err)
	}
	return nil
}
