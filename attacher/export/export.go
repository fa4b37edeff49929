// Package export shows a store's blocks to other machines over NVMe/TCP, from a target
// inside this process.
//
// Each node has a subsystem of its own, which only its host NQN may connect to, with one
// nvmeNamespace for each block that it has attached, read-only, and for each lvol that it
// may write. Everything is derived
// from package identity and from what the attacher has on record, so the package keeps
// no state of its own. It must not know what a block holds or who decides on it.
package export

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"sync"

	"github.com/google/uuid"

	"github.com/thaw-project/thaw/attacher"
	"github.com/thaw-project/thaw/attacher/identity"
	"github.com/thaw-project/thaw/keylock"
	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/target/bdev"
	"github.com/thaw-project/thaw/target/nvmf"
)

// Options says what an NVMe exports and where.
type Options struct {
	// Store is the UUID of the lvol store.
	Store string
	// Open opens an lvol and tells its UUID; the error is kind.NotFound when there is
	// none.
	Open func(lvol string, readOnly bool) (bdev.Device, uuid.UUID, error)
	// Portals are the addresses to listen at, each an IP address with a port. One
	// that is unspecified (0.0.0.0, ::) listens everywhere, and a node is told the address
	// by which it reached the attacher.
	Portals []string
	// Target has the limits of the NVMe/TCP target.
	Target nvmf.Options
	Logger *slog.Logger // nil is silence
}

// shown is a block as a node has it.
type shown struct {
	device bdev.Device
	id     uuid.UUID // of the nvmeNamespace
}

// NVMe is an attacher.Exporter.
type NVMe struct {
	o        Options
	store    identity.Store
	target   *nvmf.Target
	portals  []netip.AddrPort // those that it listens at, with the ports taken
	nodes    keylock.Set      // one change at a time to a node's subsystem
	restored bool             // listeners are there; set before anything is concurrent

	mu      sync.Mutex
	devices map[string]map[string]shown // guarded by mu: by node and block
}

var _ attacher.Exporter = (*NVMe)(nil)

// New makes an exporter that does not listen before Restore. Close it.
func New(o Options) (*NVMe, error) {
	if o.Open == nil || len(o.Portals) == 0 {
		return nil, kind.Errorf(kind.Invalid, "export needs a way to open blocks and a portal")
	}
	id, err := uuid.Parse(o.Store)
	if err != nil {
		return nil, kind.Errorf(kind.Invalid, "export: store %.80q is not a UUID", o.Store)
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Target.Log == nil {
		o.Target.Log = o.Logger
	}
	target, err := nvmf.New(o.Target)
	if err != nil {
		return nil, err
	}
	return &NVMe{o: o, store: identity.Store{UUID: id}, target: target, devices: make(map[string]map[string]shown)}, nil
}

// Transports implements attacher.Exporter.
func (x *NVMe) Transports() []string { return []string{attacher.TransportTCP} }

// Restore implements attacher.Exporter: all nvmeNamespaces first, listeners last. A host
// that reconnects must find each of its disks, for one that is missing is gone for good.
func (x *NVMe) Restore(exports []attacher.Export) error {
	for _, e := range exports {
		if err := x.show(e); err != nil {
			x.o.Logger.Error("cannot export a block that a node has attached", "block", e.Block, "node", e.Node, "error", err)
		}
	}
	anchor := x.store.Anchor()
	if err := x.target.CreateSubsystem(nvmf.SubsystemConfig{NQN: anchor}); err != nil {
		return fmt.Errorf("export: %w", err)
	}
	for _, portal := range x.o.Portals {
		address, err := x.target.AddListener(anchor, nvmf.ListenerConfig{Address: portal})
		if err != nil {
			return fmt.Errorf("export: %w", err)
		}
		bound, err := netip.ParseAddrPort(address)
		if err != nil {
			return fmt.Errorf("export: %w", err)
		}
		x.portals = append(x.portals, bound)
	}
	x.restored = true
	for _, s := range x.target.Subsystems() {
		if s.NQN != anchor {
			if err := x.listen(s.NQN); err != nil {
				return err
			}
		}
	}
	x.o.Logger.Info("exporting blocks", "portals", x.portals, "attachments", len(exports))
	return nil
}

// Portals are the addresses it listens at, after Restore.
func (x *NVMe) Portals() []netip.AddrPort { return x.portals }

func (x *NVMe) listen(nqn string) error {
	for _, p := range x.portals {
		if _, err := x.target.AddListener(nqn, nvmf.ListenerConfig{Address: p.String()}); err != nil && !errors.Is(err, kind.Exists) {
			return fmt.Errorf("export %s: %w", nqn, err)
		}
	}
	return nil
}

// lockNode keeps others from a node's subsystem. Nobody holds it for long.
func (x *NVMe) lockNode(node string) func() {
	unlock, _ := x.nodes.Lock(context.Background(), node) // fails only with its context
	return unlock
}

// show makes the block an nvmeNamespace of its node, whose subsystem it makes if need be.
func (x *NVMe) show(e attacher.Export) error {
	defer x.lockNode(e.Node)()
	if _, ok := x.device(e); ok {
		return nil
	}
	nqn := x.store.Subsystem(e.Node)
	err := x.target.CreateSubsystem(nvmf.SubsystemConfig{NQN: nqn, Serial: x.store.Serial(e.Node), Model: "Thaw"})
	fresh := err == nil
	if err != nil && !errors.Is(err, kind.Exists) {
		return err
	}
	if err := x.target.AddHost(nqn, identity.HostNQN(e.Node)); err != nil && !errors.Is(err, kind.Exists) {
		return err
	}
	device, lvol, err := x.o.Open(e.Block, !e.Writable)
	if err == nil && device.ReadOnly() == e.Writable {
		err = errors.Join(kind.Errorf(kind.Invalid, "lvol %s: writable is %t, and should be %t", e.Block, !device.ReadOnly(), e.Writable), device.Close())
	}
	id := x.store.NvmeNamespace(lvol, e.Node)
	if err == nil {
		if _, err = x.target.AddNvmeNamespace(nqn, nvmf.NvmeNamespaceConfig{NSID: e.NSID, Device: device, Name: e.Block, UUID: id, NGUID: id, Adaptive: true}); err != nil {
			err = errors.Join(err, device.Close())
		}
	}
	if err == nil {
		x.remember(e, shown{device: device, id: id})
		if x.restored {
			err = x.listen(nqn)
		}
		return err
	}
	if fresh {
		err = errors.Join(err, x.target.DeleteSubsystem(nqn))
	}
	return err
}

func (x *NVMe) device(e attacher.Export) (shown, bool) {
	x.mu.Lock()
	defer x.mu.Unlock()
	d, ok := x.devices[e.Node][e.Block]
	return d, ok
}

func (x *NVMe) remember(e attacher.Export, d shown) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.devices[e.Node] == nil {
		x.devices[e.Node] = make(map[string]shown)
	}
	x.devices[e.Node][e.Block] = d
}

// Export implements attacher.Exporter.
func (x *NVMe) Export(e attacher.Export, local string) (attacher.Exported, error) {
	if err := x.show(e); err != nil {
		return attacher.Exported{}, err
	}
	d, ok := x.device(e)
	if !ok {
		return attacher.Exported{}, kind.Errorf(kind.Unavailable, "it was withdrawn meanwhile")
	}
	out := attacher.Exported{
		Subsystem: x.store.Subsystem(e.Node), HostNQN: identity.HostNQN(e.Node), HostID: identity.HostID(e.Node).String(),
		UUID: d.id.String(), SizeBytes: d.device.SizeBytes(),
	}
	for _, p := range x.portals {
		address := p.Addr().String()
		if p.Addr().IsUnspecified() && local != "" {
			address = local
		}
		out.Portals = append(out.Portals, attacher.Portal{Transport: "tcp", Address: address, Service: fmt.Sprint(p.Port())})
	}
	return out, nil
}

// Withdraw implements attacher.Exporter.
func (x *NVMe) Withdraw(e attacher.Export) error {
	defer x.lockNode(e.Node)()
	d, ok := x.device(e)
	if !ok {
		return nil
	}
	nqn := x.store.Subsystem(e.Node)
	if err := x.target.RemoveNvmeNamespace(nqn, e.NSID); err != nil && !errors.Is(err, kind.NotFound) {
		return err
	}
	x.mu.Lock()
	delete(x.devices[e.Node], e.Block)
	last := len(x.devices[e.Node]) == 0
	if last {
		delete(x.devices, e.Node)
	}
	x.mu.Unlock()
	err := d.device.Close()
	if last {
		if derr := x.target.DeleteSubsystem(nqn); !errors.Is(derr, kind.NotFound) {
			err = errors.Join(err, derr)
		}
	}
	return err
}

// Attached counts the nodes that have blocks attached, and those blocks, each once for
// each node.
func (x *NVMe) Attached() (nodes, blocks int) {
	x.mu.Lock()
	defer x.mu.Unlock()
	for _, b := range x.devices {
		blocks += len(b)
	}
	return len(x.devices), blocks
}

// Connections is the number of connections of nodes.
func (x *NVMe) Connections() int { return x.target.Connections() }

// Close drops all connections and closes the devices. Nodes reconnect to the next one.
func (x *NVMe) Close() error {
	errs := []error{x.target.Close()}
	x.mu.Lock()
	defer x.mu.Unlock()
	for _, blocks := range x.devices {
		for _, d := range blocks {
			errs = append(errs, d.device.Close())
		}
	}
	clear(x.devices)
	return errors.Join(errs...)
}
