package spdk

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"
	opiv1 "github.com/opiproject/opi-api/storage/v1alpha1/gen/go"

	lvolv1 "github.com/thaw-project/thaw/api/lvol/v1"
	"github.com/thaw-project/thaw/attacher"
	"github.com/thaw-project/thaw/attacher/identity"
	"github.com/thaw-project/thaw/failpoint"
	"github.com/thaw-project/thaw/kind"
)

// hiddenPrefix begins the names of lvols that stand in for others: SPDK shows a volume in
// one subsystem only, so that the second node that has the same block gets a clone of it.
// The rest of the name is the UUID of the nvmeNamespace.
const hiddenPrefix = "thaw-export-"

// standIn is an lvol that stands in for another.
type standIn struct {
	id       string // its UUID
	readOnly bool   // until then no node may see it
}

// node is what a node should see: one subsystem, which admits that node's host only.
type node struct {
	name  string
	disks map[string]*disk // by the lvol's name, those of this process by the lvol's UUID
	ready bool             // the subsystem and its listeners were there when last looked
	next  uint32           // this process: the last nvmeNamespace identifier given out
}

// disk is one nvmeNamespace. Its fields are guarded by Backend.mu.
type disk struct {
	lvol      string // name
	id        string // UUID of the lvol; empty until it was looked up
	nsid      uint32
	writable  bool
	transport string
	size      int64
	shown     bool // it was there when last looked
	leaving   bool // it is to go, and did not yet
	refs      int  // this process: open devices
}

// space is the UUID of an lvol.
func (d *disk) space() uuid.UUID {
	id, err := uuid.Parse(d.id)
	if err != nil {
		return uuid.Nil // looked up before it is used
	}
	return id
}

// userLocked says who uses an lvol, "" when nobody does. The caller holds mu.
func (b *Backend) userLocked(id, name string) string {
	for _, n := range b.nodes {
		for _, d := range n.disks {
			if d.id != id && (d.id != "" || d.lvol != name) {
				continue
			}
			if n.name == b.self {
				return "the attacher has it open"
			}
			return "node " + n.name + " has it"
		}
	}
	return ""
}

// nodeLocked returns a node, made if need be. The caller holds mu.
func (b *Backend) nodeLocked(name string) *node {
	n := b.nodes[name]
	if n == nil {
		n = &node{name: name, disks: map[string]*disk{}}
		b.nodes[name] = n
	}
	return n
}

// Exporter shows lvols to nodes. It is nil when there are no portals.
func (b *Backend) Exporter() *Exporter {
	if len(b.portals) == 0 {
		return nil
	}
	return &Exporter{b}
}

// Exporter is an attacher.Exporter.
type Exporter struct{ b *Backend }

var _ attacher.Exporter = (*Exporter)(nil)

// Transports implements attacher.Exporter.
func (x *Exporter) Transports() (list []string) {
	for _, p := range x.b.portals {
		if !slices.Contains(list, p.transport) {
			list = append(list, p.transport)
		}
	}
	return list
}

// Restore implements attacher.Exporter. What cannot be shown now is shown as soon as the
// target allows.
func (x *Exporter) Restore(exports []attacher.Export) error {
	b := x.b
	b.mu.Lock()
	for name := range b.nodes {
		if name != b.self {
			delete(b.nodes, name)
		}
	}
	for _, e := range exports {
		b.nodeLocked(e.Node).disks[e.Block] = newDisk(e)
	}
	b.restored, b.lost = true, true
	b.mu.Unlock()
	failpoint.Reach("backend.restore: noted")
	ctx, cancel := b.operation()
	defer cancel()
	if err := b.converge(ctx); err != nil {
		b.log.Error("cannot show now all that nodes have attached; trying again", "error", err)
		b.look()
	}
	return nil
}

func newDisk(e attacher.Export) *disk {
	return &disk{lvol: e.Block, nsid: e.NSID, writable: e.Writable, transport: e.Transport}
}

// Attached counts the nodes that have lvols attached, and those lvols, each once for each
// node.
func (x *Exporter) Attached() (nodes, lvols int) {
	x.b.mu.Lock()
	defer x.b.mu.Unlock()
	for name, n := range x.b.nodes {
		if name != x.b.self {
			nodes++
			lvols += len(n.disks)
		}
	}
	return nodes, lvols
}

// Export implements attacher.Exporter.
func (x *Exporter) Export(e attacher.Export, local string) (attacher.Exported, error) {
	b := x.b
	if err := identity.CheckNode(e.Node); err != nil {
		return attacher.Exported{}, err
	}
	if e.NSID < 1 || e.NSID > attacher.MaxAttachments {
		return attacher.Exported{}, kind.Errorf(kind.Invalid, "export lvol %.80s: nvmeNamespace %d is not in 1 to %d", e.Block, e.NSID, attacher.MaxAttachments)
	}
	if e.Transport == "" {
		e.Transport = b.portals[0].transport
	}
	if !slices.Contains(x.Transports(), e.Transport) {
		return attacher.Exported{}, kind.Errorf(kind.Unsupported, "export lvol %.80s: there is no portal of transport %.40s", e.Block, e.Transport)
	}
	ctx, cancel := b.operation()
	defer cancel()
	d, err := b.want(ctx, e)
	if err != nil {
		return attacher.Exported{}, fmt.Errorf("export lvol %.80s to node %s: %w", e.Block, e.Node, err)
	}
	failpoint.Reach("backend.export: wanted")
	if err := b.show(ctx, e.Node, d); err != nil {
		if !errors.Is(err, kind.Unavailable) { // else it is shown as soon as that can be, or withdrawn
			err = errors.Join(err, b.withdraw(ctx, e.Node, e.Block, d))
		}
		return attacher.Exported{}, fmt.Errorf("export lvol %s to node %s: %w", e.Block, e.Node, err)
	}
	failpoint.Reach("backend.export: shown")
	out := attacher.Exported{
		Subsystem: b.store.Subsystem(e.Node), HostNQN: identity.HostNQN(e.Node), HostID: identity.HostID(e.Node).String(),
	}
	b.mu.Lock()
	out.UUID, out.SizeBytes = b.store.NvmeNamespace(d.space(), e.Node).String(), d.size
	b.mu.Unlock()
	for _, p := range b.portals {
		if p.transport != e.Transport {
			continue
		}
		address := p.addr.Addr().String()
		if p.addr.Addr().IsUnspecified() && local != "" {
			address = local
		}
		out.Portals = append(out.Portals, attacher.Portal{Transport: strings.TrimPrefix(p.transport, "nvme-"), Address: address, Service: fmt.Sprint(p.addr.Port())})
	}
	return out, nil
}

// want notes that a node is to see an lvol, which may be shown to it.
func (b *Backend) want(ctx context.Context, e attacher.Export) (*disk, error) {
	l, err := b.lookup(ctx, e.Block)
	if err != nil {
		return nil, err
	}
	if err := b.fits(l, e.Writable); err != nil {
		return nil, err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.changing[l.GetUuid()] {
		return nil, kind.Errorf(kind.InUse, "it is being deleted or changed")
	}
	n := b.nodeLocked(e.Node)
	d := n.disks[e.Block]
	if d == nil || d.nsid != e.NSID || d.writable != e.Writable || d.id != "" && d.id != l.GetUuid() {
		d = newDisk(e)
		n.disks[e.Block] = d
	}
	if d.transport != e.Transport {
		d.transport, n.ready = e.Transport, false
	}
	d.id, d.size, d.leaving = l.GetUuid(), l.GetSizeBytes(), false
	return d, nil
}

// fits tells whether an lvol can be shown for reading, or for writing.
func (b *Backend) fits(l *lvolv1.Lvol, writable bool) error {
	switch readOnly := l.GetReadOnly() || l.GetSnapshot(); {
	case l.GetDegraded():
		return kind.Errorf(kind.Corrupt, "its external parent is missing")
	case readOnly && writable:
		return kind.Errorf(kind.ReadOnly, "it is read-only")
	case !readOnly && !writable:
		return kind.Errorf(kind.Invalid, "it can be written, and the target shows it for writing only")
	}
	return nil
}

// Withdraw implements attacher.Exporter.
func (x *Exporter) Withdraw(e attacher.Export) error {
	ctx, cancel := x.b.operation()
	defer cancel()
	if err := x.b.withdraw(ctx, e.Node, e.Block, nil); err != nil {
		return fmt.Errorf("withdraw lvol %s from node %s: %w", e.Block, e.Node, err)
	}
	return nil
}

// withdraw takes a disk from a node; only is the one that it must be, nil for any. The
// subsystem goes with the last, but that of this process.
func (b *Backend) withdraw(ctx context.Context, name, key string, only *disk) error {
	unlock, err := b.shows.Lock(ctx, name)
	if err != nil {
		return kind.Wrap(kind.Unavailable, err)
	}
	defer unlock()
	b.mu.Lock()
	n := b.nodes[name]
	if n == nil || n.disks[key] == nil || only != nil && n.disks[key] != only {
		b.mu.Unlock()
		return nil
	}
	d := n.disks[key]
	d.leaving, d.shown = true, false
	looked := d.id != ""
	id := b.store.NvmeNamespace(d.space(), name)
	last := name != b.self
	for _, other := range n.disks {
		last = last && other.leaving
	}
	b.mu.Unlock()
	failpoint.Reach("backend.withdraw: noted")
	nqn := b.store.Subsystem(name)
	err = b.again(ctx, func() error {
		if last { // and what of it was never looked up
			return b.deleteSubsystem(ctx, nqn)
		}
		if !looked {
			return b.deleteUnknown(ctx, n)
		}
		return b.deleteNamespace(ctx, nqn, id.String())
	})
	if err != nil {
		b.look()
		return err
	}
	failpoint.Reach("backend.withdraw: withdrawn")
	if err := b.again(ctx, func() error { return b.dropClone(ctx, id) }); err != nil {
		return err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if n.disks[key] == d {
		delete(n.disks, key)
	}
	if last {
		n.ready = false
		if len(n.disks) == 0 && b.nodes[name] == n {
			delete(b.nodes, name)
		}
	}
	return nil
}

// deleteUnknown removes the nvmeNamespaces of a node that it should not see. The caller
// has the node locked.
func (b *Backend) deleteUnknown(ctx context.Context, n *node) error {
	nqn := b.store.Subsystem(n.name)
	for token := ""; ; {
		r, err := b.fe.ListNvmeNamespaces(ctx, &opiv1.ListNvmeNamespacesRequest{Parent: subsystemName(nqn), PageSize: pageSize, PageToken: token})
		if errors.Is(err, kind.NotFound) {
			return nil
		}
		if err != nil {
			return err
		}
		for _, have := range r.GetNvmeNamespaces() {
			s := have.GetSpec()
			b.mu.Lock()
			wanted := b.wantedLocked(n, s) != nil
			b.mu.Unlock()
			if wanted {
				continue
			}
			b.log.Info("taking away what a node should not see", "node", n.name, "nsid", s.GetHostNsid(), "volume", s.GetVolumeNameRef())
			if err := b.deleteNamespace(ctx, nqn, s.GetUuid()); err != nil {
				return err
			}
		}
		if token = r.GetNextPageToken(); token == "" {
			return nil
		}
	}
}

// wantedLocked returns the disk that an nvmeNamespace of the node is; nil when it should
// not be there, or not so. The caller holds mu.
func (b *Backend) wantedLocked(n *node, s *opiv1.NvmeNamespaceSpec) *disk {
	for _, d := range n.disks {
		if !d.leaving && d.id != "" && uint32(s.GetHostNsid()) == d.nsid && s.GetUuid() == b.store.NvmeNamespace(d.space(), n.name).String() {
			return d
		}
	}
	return nil
}

// errLost says that the target forgot what it was told: all is told again before any
// node can connect.
var errLost = kind.Errorf(kind.Unavailable, "the target was started anew, and what nodes have is not all shown again yet")

// show makes a disk visible to its node.
func (b *Backend) show(ctx context.Context, name string, d *disk) error {
	return b.again(ctx, func() error {
		err := b.showNode(ctx, name, d)
		if errors.Is(err, errLost) {
			if err = b.converge(ctx); err == nil {
				err = b.showNode(ctx, name, d)
			}
		}
		return err
	})
}

// showNode shows one disk of a node whose subsystem may have to be made.
func (b *Backend) showNode(ctx context.Context, name string, d *disk) error {
	unlock, err := b.shows.Lock(ctx, name)
	if err != nil {
		return kind.Wrap(kind.Unavailable, err)
	}
	defer unlock()
	b.mu.Lock()
	n := b.nodes[name]
	lost, gone := b.lost, n == nil || d.leaving || !slices.Contains(slices.Collect(maps.Values(n.disks)), d)
	done := !gone && n.ready && d.shown
	ready := !gone && n.ready
	b.mu.Unlock()
	switch {
	case gone:
		return kind.Errorf(kind.NotFound, "it was withdrawn meanwhile")
	case lost:
		return errLost
	case done:
		return b.verify(ctx, n, d)
	}
	if !ready {
		if err := b.anchored(ctx); err != nil {
			return err
		}
		if err := b.makeSubsystem(ctx, n); err != nil {
			return err
		}
	}
	if err := b.showDisk(ctx, n, d); err != nil || ready {
		return err
	}
	// Who may connect from now on must find all its disks.
	b.mu.Lock()
	var missing []*disk
	for _, other := range n.disks {
		if !other.leaving && !other.shown {
			missing = append(missing, other)
		}
	}
	b.mu.Unlock()
	for _, other := range missing {
		if err := b.fillDisk(ctx, n, other); err != nil {
			return err
		}
	}
	return b.makeListeners(ctx, n)
}

// verify is for a disk that was shown before: it says whether it still is.
func (b *Backend) verify(ctx context.Context, n *node, d *disk) error {
	b.mu.Lock()
	id := b.store.NvmeNamespace(d.space(), n.name)
	b.mu.Unlock()
	_, err := b.fe.GetNvmeNamespace(ctx, &opiv1.GetNvmeNamespaceRequest{Name: subsystemName(b.store.Subsystem(n.name)) + "/nvmeNamespaces/" + id.String()})
	if errors.Is(err, kind.NotFound) {
		b.forget()
		return errLost
	}
	return err
}

// forget notes that the target lacks something.
func (b *Backend) forget() {
	b.mu.Lock()
	b.lost = true
	b.mu.Unlock()
	b.look()
}

// anchored is nil when the target has all that it was told, as far as its anchor tells.
func (b *Backend) anchored(ctx context.Context) error {
	gone, err := b.missing(ctx, b.store.Anchor())
	if err == nil && gone {
		b.forget()
		err = errLost
	}
	return err
}

// makeSubsystem makes a node's subsystem with its host, without listeners.
func (b *Backend) makeSubsystem(ctx context.Context, n *node) error {
	err := b.createSubsystem(ctx, b.store.Subsystem(n.name), identity.HostNQN(n.name), b.store.Serial(n.name))
	failpoint.Reach("backend.show: subsystem made")
	return err
}

// listenersLocked are where a node may connect. The caller holds mu.
func (b *Backend) listenersLocked(n *node) (list []portal) {
	if n.name == b.self {
		return []portal{*b.own}
	}
	for _, p := range b.portals {
		for _, d := range n.disks {
			if d.transport == p.transport || d.transport == "" {
				list = append(list, p)
				break
			}
		}
	}
	return list
}

// makeListeners lets a node connect.
func (b *Backend) makeListeners(ctx context.Context, n *node) error {
	b.mu.Lock()
	want := b.listenersLocked(n)
	b.mu.Unlock()
	for _, p := range want {
		if err := b.listen(ctx, b.store.Subsystem(n.name), p); err != nil {
			return fmt.Errorf("listen at %s: %w", p.addr, err)
		}
		failpoint.Reach("backend.show: listening")
	}
	b.mu.Lock()
	n.ready = true
	b.mu.Unlock()
	return nil
}

// showDisk adds an nvmeNamespace to a subsystem that is there. The caller has the node
// locked.
func (b *Backend) showDisk(ctx context.Context, n *node, d *disk) error {
	b.mu.Lock()
	looked := d.id != ""
	b.mu.Unlock()
	if !looked { // restored
		l, err := b.lookup(ctx, d.lvol)
		if err == nil {
			err = b.fits(l, d.writable)
		}
		if err != nil {
			return err
		}
		b.mu.Lock()
		d.id, d.size = l.GetUuid(), l.GetSizeBytes()
		b.mu.Unlock()
	}
	b.mu.Lock()
	id := b.store.NvmeNamespace(d.space(), n.name)
	b.mu.Unlock()
	unlock, err := b.lockClone(ctx, id)
	if err != nil {
		return err
	}
	defer unlock()
	err = b.place(ctx, n, d, id)
	// The target may look into a volume that is new to it, and requests of a bridge or attacher
	// that was killed may still be on their way in it: for that moment it is in use.
	for pause := refusedPause; errors.Is(err, kind.InUse) && pause <= refusedMost; pause *= 2 {
		if !sleep(ctx, pause) {
			break
		}
		err = b.place(ctx, n, d, id)
	}
	failpoint.Reach("backend.show: nvmeNamespace made")
	if errors.Is(err, kind.NotFound) {
		// The subsystem, or the volume, which both were there a moment ago. A stand-in may have
		// been deleted by who did not hear of it.
		b.mu.Lock()
		delete(b.clones, id)
		b.mu.Unlock()
		b.forget()
		return kind.Errorf(kind.Unavailable, "the target lost something: %w", hide(err))
	}
	if err != nil {
		return err
	}
	b.mu.Lock()
	d.shown = true
	b.mu.Unlock()
	return nil
}

// How long a refusal may be one of the moment: 50, 100 and 200 ms.
const refusedPause, refusedMost = 50 * time.Millisecond, 200 * time.Millisecond

// sleep is false when ctx ended before.
func sleep(ctx context.Context, d time.Duration) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(d):
		return true
	}
}

// place adds a disk's nvmeNamespace, with what is in its way removed, or with a stand-in
// where the volume has another place. The caller has the node and the stand-in locked.
func (b *Backend) place(ctx context.Context, n *node, d *disk, id uuid.UUID) error {
	b.mu.Lock()
	volume := d.id // also after a rename
	c := b.clones[id]
	b.mu.Unlock()
	if c.id != "" {
		volume = c.id
		if !c.readOnly { // whoever made it did not live to do that
			if err := b.fixClone(ctx, id, c.id); err != nil {
				return err
			}
		}
	}
	err := b.createNamespace(ctx, n, d, id, volume)
	if err != nil && !errors.Is(err, kind.Unavailable) && !errors.Is(err, kind.NotFound) {
		// Something has its place or identity; or the volume, where it can be only once.
		first := err
		if err = b.deleteUnknown(ctx, n); err == nil {
			err = b.createNamespace(ctx, n, d, id, volume)
		}
		if err != nil && !errors.Is(err, kind.Unavailable) && !errors.Is(err, kind.NotFound) && !d.writable {
			if volume, err = b.makeClone(ctx, d, id); err == nil {
				err = b.createNamespace(ctx, n, d, id, volume)
			} else if !errors.Is(err, kind.Unavailable) {
				err = errors.Join(first, err)
			}
		}
	}
	return err
}

func (b *Backend) createNamespace(ctx context.Context, n *node, d *disk, id uuid.UUID, volume string) error {
	_, err := b.fe.CreateNvmeNamespace(ctx, &opiv1.CreateNvmeNamespaceRequest{Parent: subsystemName(b.store.Subsystem(n.name)), NvmeNamespace: &opiv1.NvmeNamespace{
		Spec: &opiv1.NvmeNamespaceSpec{HostNsid: int32(d.nsid), Uuid: id.String(), Nguid: strings.ReplaceAll(id.String(), "-", ""), VolumeNameRef: volume}}})
	return err
}

// makeClone makes an lvol that shows the same bytes as the disk's read-only one, for a
// target that shows a volume once only. Who else has that one may be gone by now: a clone
// is right all the same.
func (b *Backend) makeClone(ctx context.Context, d *disk, id uuid.UUID) (volume string, err error) {
	l, err := b.lvols.GetLvol(ctx, &lvolv1.GetLvolRequest{Name: b.lvolName(d.lvol)})
	if err != nil {
		return "", err
	}
	source := l.GetName()
	switch {
	case l.GetSnapshot():
	case l.GetReadOnly() && l.GetAllocatedBytes() == 0 && l.GetParent() != "": // a soldier, the same as its block
		source = l.GetParent()
	default:
		return "", kind.Errorf(kind.InUse, "the target shows a volume to one node only, and it is neither a snapshot nor a clone that is like one")
	}
	c, err := b.lvols.CloneLvol(ctx, &lvolv1.CloneLvolRequest{Name: source, LvolId: hiddenPrefix + id.String()})
	if err != nil {
		return "", err
	}
	b.mu.Lock()
	b.clones[id] = standIn{id: c.GetUuid()}
	b.mu.Unlock()
	failpoint.Reach("backend.show: clone made")
	return c.GetUuid(), b.fixClone(ctx, id, c.GetUuid())
}

// fixClone makes a stand-in, of that UUID, read-only.
func (b *Backend) fixClone(ctx context.Context, id uuid.UUID, clone string) error {
	if _, err := b.lvols.SetLvolReadOnly(ctx, &lvolv1.SetLvolReadOnlyRequest{Name: b.lvolName(hiddenPrefix + id.String())}); err != nil {
		return err
	}
	b.mu.Lock()
	b.clones[id] = standIn{id: clone, readOnly: true}
	b.mu.Unlock()
	failpoint.Reach("backend.show: clone read-only")
	return nil
}

// dropClone deletes the lvol that stood in for one that an nvmeNamespace showed, if no
// node should see that any more.
func (b *Backend) dropClone(ctx context.Context, id uuid.UUID) error {
	unlock, err := b.lockClone(ctx, id)
	if err != nil {
		return err
	}
	defer unlock()
	b.mu.Lock()
	drop := b.clones[id].id != ""
	for _, n := range b.nodes {
		for _, d := range n.disks {
			drop = drop && (d.leaving || b.store.NvmeNamespace(d.space(), n.name) != id)
		}
	}
	b.mu.Unlock()
	if !drop {
		return nil
	}
	_, err = b.lvols.DeleteLvol(ctx, &lvolv1.DeleteLvolRequest{Name: b.lvolName(hiddenPrefix + id.String()), AllowMissing: true})
	if err != nil {
		return err
	}
	b.mu.Lock()
	delete(b.clones, id)
	b.mu.Unlock()
	return nil
}

// lockClone keeps the stand-in of an nvmeNamespace from being deleted, or used. Whoever
// has a node locked too took that before.
func (b *Backend) lockClone(ctx context.Context, id uuid.UUID) (unlock func(), err error) {
	unlock, err = b.shows.Lock(ctx, "/"+id.String()) // no node's name has a slash
	return unlock, kind.Wrap(kind.Unavailable, err)
}
