package spdk

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"
	opiv1 "github.com/opiproject/opi-api/storage/v1alpha1/gen/go"

	lvolv1 "github.com/thaw-project/thaw/api/lvol/v1"
	"github.com/thaw-project/thaw/attacher/identity"
	"github.com/thaw-project/thaw/failpoint"
	"github.com/thaw-project/thaw/kind"
)

// The target keeps what it is told in memory. Whether it still knows is told by the
// anchor: a subsystem without listeners and nvmeNamespaces that is made after all else. A
// target without it is told all again, listeners last: a host that reconnects finds each
// of its disks, for one that is missing from a subsystem is gone for it.

// keep looks after the target until Close.
func (b *Backend) keep() {
	tick := time.NewTicker(b.o.Poll)
	defer tick.Stop()
	away := time.Time{} // since when
	for {
		err := b.glance()
		switch {
		case b.life.Err() != nil:
			return
		case err != nil && away.IsZero():
			away = time.Now()
			b.log.Warn("the target, or the bridge to it, does not answer as it should", "error", err)
		case err == nil && !away.IsZero():
			b.log.Info("the target has all again", "after", time.Since(away))
			away = time.Time{}
		}
		if err != nil {
			if b.pause(b.life) != nil {
				return
			}
			continue
		}
		select {
		case <-b.life.Done():
			return
		case <-tick.C:
		case <-b.kick:
		}
	}
}

// glance looks at the anchor, and compares everything when that is due.
func (b *Backend) glance() error {
	ctx, cancel := b.operation()
	defer cancel()
	gone, err := b.missing(ctx, b.store.Anchor())
	b.mu.Lock()
	if err != nil || gone {
		b.lost = true // after an error too: something may have happened meanwhile
	}
	due := time.Since(b.checked) > fullEvery
	b.mu.Unlock()
	if err != nil {
		return err
	}
	return b.compare(ctx, due)
}

// base makes the volume below the lvstore known to a target that forgot it, and with
// create the lvstore.
func (b *Backend) base(ctx context.Context, create bool) error {
	get := &lvolv1.GetLvolStoreRequest{Name: b.storeName()}
	_, err := b.lvols.GetLvolStore(ctx, get)
	if !errors.Is(err, kind.NotFound) || b.o.AIO == "" {
		return err
	}
	id := b.o.LvStore + "-base"
	_, err = b.aio.CreateAioVolume(ctx, &opiv1.CreateAioVolumeRequest{AioVolumeId: id, AioVolume: &opiv1.AioVolume{Filename: b.o.AIO, BlockSize: int64(b.o.BlockBytes)}})
	if err != nil {
		return fmt.Errorf("use %s: %w", b.o.AIO, err)
	}
	failpoint.Reach("backend.base: volume made")
	if _, err = b.lvols.GetLvolStore(ctx, get); !errors.Is(err, kind.NotFound) {
		return err
	}
	if !create {
		return kind.Errorf(kind.NotFound, "%s holds no lvstore %s that the target can load: its log says why; only a store that is new is made", b.o.AIO, b.o.LvStore)
	}
	_, err = b.lvols.CreateLvolStore(ctx, &lvolv1.CreateLvolStoreRequest{LvolStoreId: b.o.LvStore,
		LvolStore: &lvolv1.LvolStore{VolumeNameRef: "aioVolumes/" + id, ClusterSizeBytes: b.o.ClusterBytes}})
	failpoint.Reach("backend.base: lvstore made")
	return err
}

// converge makes the target show what it should, if something of that is lost.
func (b *Backend) converge(ctx context.Context) error { return b.compare(ctx, false) }

// compare is converge, also when nothing is known to be lost if all is set. When the
// attacher has said what nodes have, nothing else of the store's stays. When it fails it
// is done again soon.
func (b *Backend) compare(ctx context.Context, all bool) error {
	select { // one at a time
	case b.replay <- struct{}{}:
		defer func() { <-b.replay }()
	case <-ctx.Done():
		return kind.Wrap(kind.Unavailable, ctx.Err())
	}
	b.mu.Lock()
	lost := b.lost
	b.lost = false // who finds another loss meanwhile says so
	b.mu.Unlock()
	if !lost && !all {
		return nil
	}
	if err := b.replayAll(context.WithValue(ctx, keeping{}, true)); err != nil {
		b.forget()
		return err
	}
	b.mu.Lock()
	b.checked = time.Now()
	b.mu.Unlock()
	return nil
}

func (b *Backend) replayAll(ctx context.Context) error {
	if err := b.base(ctx, false); err != nil {
		return unavailable(err)
	}
	if err := b.present(ctx); err != nil {
		return err
	}
	failpoint.Reach("backend.replay: lvstore is there")
	have, err := b.subsystems(ctx)
	if err != nil {
		return unavailable(err)
	}
	list, err := b.all(ctx)
	if err != nil {
		return err
	}
	names := make(map[string]string, len(list)) // of lvols, by UUID
	byName := make(map[string]*lvolv1.Lvol, len(list))
	clones := map[uuid.UUID]standIn{}
	for _, l := range list {
		name := b.shortName(l.GetName())
		names[l.GetUuid()], byName[name] = name, l
		if id, err := uuid.Parse(strings.TrimPrefix(name, hiddenPrefix)); hidden(name) && err == nil {
			clones[id] = standIn{id: l.GetUuid(), readOnly: l.GetReadOnly()}
		}
	}
	b.mu.Lock()
	for id, c := range clones {
		b.clones[id] = c
	}
	var nodes []*node
	for _, n := range b.nodes {
		b.identifyLocked(n, byName)
		b.compareLocked(n, have[b.store.Subsystem(n.name)], names)
		nodes = append(nodes, n)
	}
	restored := b.restored
	b.mu.Unlock()

	// What is nobody's any more first: it may be in the way.
	if err := each(b.strangers(have, restored), func(nqn string) error { return b.sweep(ctx, nqn) }); err != nil {
		return err
	}
	failpoint.Reach("backend.replay: swept")
	if err := each(nodes, func(n *node) error { return b.fillNode(ctx, n, have[b.store.Subsystem(n.name)], names) }); err != nil {
		return err
	}
	failpoint.Reach("backend.replay: nvmeNamespaces are there")
	if err := each(nodes, func(n *node) error { return b.openNode(ctx, n) }); err != nil {
		return err
	}
	failpoint.Reach("backend.replay: listening")
	if restored {
		if err := b.sweepClones(ctx); err != nil {
			return err
		}
	}
	err = b.createSubsystem(ctx, b.store.Anchor(), identity.HostNQN(b.self), b.store.Serial(b.self))
	failpoint.Reach("backend.replay: anchored")
	return unavailable(err)
}

// unavailable is what may be otherwise soon.
func unavailable(err error) error {
	if errors.Is(err, kind.NotFound) {
		return kind.Wrap(kind.Unavailable, hide(err))
	}
	return err
}

// each does something for all of a list, some at the same time, and returns all errors.
func each[T any](list []T, f func(T) error) error {
	var mu sync.Mutex
	var errs []error
	var wg sync.WaitGroup
	slots := make(chan struct{}, parallel)
	for _, e := range list {
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			if err := f(e); err != nil {
				mu.Lock()
				errs = append(errs, err)
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// identifyLocked finds the lvols of restored disks. The caller holds mu.
func (b *Backend) identifyLocked(n *node, byName map[string]*lvolv1.Lvol) {
	for _, d := range n.disks {
		if l := byName[d.lvol]; d.id == "" && l != nil && loaded(l) == nil && !hidden(d.lvol) && b.fits(l, d.writable) == nil {
			d.id, d.size = l.GetUuid(), l.GetSizeBytes()
		}
	}
}

// compareLocked notes what of a node is there. The caller holds mu.
func (b *Backend) compareLocked(n *node, s *subsystem, names map[string]string) {
	right := s != nil && s.host == identity.HostNQN(n.name)
	n.ready = right
	if right {
		for _, p := range b.listenersLocked(n) {
			n.ready = n.ready && s.listeners[p]
		}
	}
	for _, d := range n.disks {
		d.shown = false
		if !right || d.leaving || d.id == "" {
			continue
		}
		id := b.store.NvmeNamespace(d.space(), n.name)
		if v := s.shown[id.String()]; v != nil && uint32(v.GetHostNsid()) == d.nsid {
			d.shown = v.GetVolumeNameRef() == b.lvolName(names[d.id]) || v.GetVolumeNameRef() == b.lvolName(hiddenPrefix+id.String())
		}
	}
}

// strangers are the store's subsystems that nobody should see. Before the attacher said
// what nodes have, only that of this process's predecessor can be one.
func (b *Backend) strangers(have map[string]*subsystem, restored bool) (list []string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for nqn := range have {
		name := strings.TrimPrefix(nqn, b.store.Subsystem(""))
		if nqn != b.store.Anchor() && b.nodes[name] == nil && (restored || name == b.self) {
			list = append(list, nqn)
		}
	}
	return list
}

// sweep deletes a subsystem of a node that should see nothing.
func (b *Backend) sweep(ctx context.Context, nqn string) error {
	name := strings.TrimPrefix(nqn, b.store.Subsystem(""))
	unlock, err := b.shows.Lock(ctx, name)
	if err != nil {
		return kind.Wrap(kind.Unavailable, err)
	}
	defer unlock()
	b.mu.Lock()
	wanted := b.nodes[name] != nil
	b.mu.Unlock()
	if wanted { // meanwhile
		return nil
	}
	b.log.Info("taking away a subsystem that no node should see", "subsystem", nqn)
	return b.deleteSubsystem(ctx, nqn)
}

// sweepClones deletes the lvols that stood in for others and do so no more.
func (b *Backend) sweepClones(ctx context.Context) error {
	b.mu.Lock()
	ids := slices.Collect(maps.Keys(b.clones))
	b.mu.Unlock()
	for _, id := range ids {
		if err := b.dropClone(ctx, id); err != nil {
			return err
		}
	}
	return nil
}

// fillNode makes a node's subsystem and nvmeNamespaces, and removes those that should not
// be there.
func (b *Backend) fillNode(ctx context.Context, n *node, s *subsystem, names map[string]string) error {
	unlock, err := b.shows.Lock(ctx, n.name)
	if err != nil {
		return kind.Wrap(kind.Unavailable, err)
	}
	defer unlock()
	b.mu.Lock()
	if b.nodes[n.name] != n {
		b.mu.Unlock()
		return nil
	}
	tidy := false
	leaving := map[string]*disk{}
	var missing []*disk
	for key, d := range n.disks {
		switch {
		case d.leaving:
			leaving[key] = d
		case !d.shown:
			missing = append(missing, d)
		}
	}
	if s != nil {
		for _, v := range s.shown {
			tidy = tidy || b.wantedLocked(n, v) == nil
		}
	}
	ready := n.ready
	b.mu.Unlock()
	if tidy || len(leaving) > 0 {
		if err := b.deleteUnknown(ctx, n); err != nil {
			return err
		}
	}
	b.mu.Lock()
	for key, d := range leaving {
		if d.leaving && n.disks[key] == d {
			delete(n.disks, key)
		}
	}
	empty := len(n.disks) == 0 && n.name != b.self
	b.mu.Unlock()
	if empty {
		if err := b.deleteSubsystem(ctx, b.store.Subsystem(n.name)); err != nil {
			return err
		}
		b.mu.Lock()
		if len(n.disks) == 0 && b.nodes[n.name] == n {
			delete(b.nodes, n.name)
		}
		b.mu.Unlock()
		return nil
	}
	if !ready {
		if err := b.makeSubsystem(ctx, n); err != nil {
			return unavailable(err)
		}
	}
	for _, d := range missing {
		b.mu.Lock()
		id := d.id
		b.mu.Unlock()
		if id != "" && names[id] == "" {
			b.failed(n, d, kind.Errorf(kind.NotFound, "the lvol of UUID %s is gone", id))
			continue
		}
		if err := b.fillDisk(ctx, n, d); err != nil {
			return err
		}
	}
	return nil
}

// fillDisk shows a disk. One that cannot be shown whatever is tried must not keep the
// others from being shown: it is logged once.
func (b *Backend) fillDisk(ctx context.Context, n *node, d *disk) error {
	err := b.showDisk(ctx, n, d)
	if errors.Is(err, kind.Unavailable) {
		return err
	}
	b.failed(n, d, err)
	return nil
}

// failed logs why a disk cannot be shown, once, until it can.
func (b *Backend) failed(n *node, d *disk, err error) {
	key := n.name + "/" + d.lvol
	b.mu.Lock()
	_, said := b.failing[key]
	if err != nil {
		b.failing[key] = struct{}{}
	} else {
		delete(b.failing, key)
	}
	b.mu.Unlock()
	if err != nil && !said {
		b.log.Error("cannot show an lvol that a node has attached", "lvol", d.lvol, "node", n.name, "error", err)
	}
}

// openNode lets a node connect that is shown all.
func (b *Backend) openNode(ctx context.Context, n *node) error {
	unlock, err := b.shows.Lock(ctx, n.name)
	if err != nil {
		return kind.Wrap(kind.Unavailable, err)
	}
	defer unlock()
	b.mu.Lock()
	done := n.ready || b.nodes[n.name] != n
	b.mu.Unlock()
	if done {
		return nil
	}
	return unavailable(b.makeListeners(ctx, n))
}
