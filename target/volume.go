package target

import (
	"context"
	"encoding/json"
	"strings"
	"sync/atomic"
	"syscall"

	"github.com/google/uuid"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/lvol"
	"github.com/thaw-project/thaw/target/bdev"
	"github.com/thaw-project/thaw/target/rpc"
)

// lvolDisk is an lvol as a disk, named by its UUID, with the alias lvstore/name.
type lvolDisk struct {
	s    *lvstore
	id   string
	name string // guarded by Target.mu
	// What handles of an lvol over an external parent share.
	locks  clusterLocks
	window atomic.Int64
}

// named is the lvol's name in its lvstore.
func (l *lvolDisk) named() string {
	l.s.t.mu.RLock()
	defer l.s.t.mu.RUnlock()
	return l.name
}

// info describes the lvol; a zero Info when it is gone.
func (l *lvolDisk) info() lvol.Info {
	i, err := l.s.store.Get(l.named())
	if err != nil {
		return lvol.Info{}
	}
	return i
}

func (l *lvolDisk) open() (bdev.Device, error) {
	i := l.info()
	h, err := l.s.store.OpenLvol(i.Name, i.ReadOnly || l.s.base.dev.ReadOnly())
	if err != nil {
		return nil, err
	}
	e, _, err := l.s.external(i, l.s.store.Get)
	if err == nil && e.External == "" {
		return h, nil
	}
	p := l.s.parents[e.External]
	if err == nil && p == nil {
		err = kind.Errorf(kind.Unavailable, "lvol %s: its external parent %s is not here", i.Name, e.External)
	}
	if err != nil {
		h.Close()
		return nil, err
	}
	l.window.Store(e.Bytes)
	return &externalLvol{Lvol: h, below: p.dev, window: &l.window, cluster: i.ClusterBytes, locks: &l.locks}, nil
}

func (l *lvolDisk) sizeBytes() int64 { return l.info().SizeBytes }
func (l *lvolDisk) readOnly() bool   { return l.info().ReadOnly || l.s.base.dev.ReadOnly() }
func (l *lvolDisk) close() error     { return nil }

func (l *lvolDisk) supports() ioSupport {
	return ioSupport{unmap: true, flush: true, writeZeroes: true}
}

// specific has the shape of SPDK's vbdev_lvol_dump_info_json.
func (l *lvolDisk) specific() any {
	type detail struct {
		StoreUUID    string   `json:"lvol_store_uuid"`
		BaseBdev     string   `json:"base_bdev"`
		Thin         bool     `json:"thin_provision"`
		Allocated    int64    `json:"num_allocated_clusters"`
		Snapshot     bool     `json:"snapshot"`
		Clone        bool     `json:"clone"`
		BaseSnapshot string   `json:"base_snapshot,omitempty"`
		Clones       []string `json:"clones,omitempty"`
		EsnapClone   bool     `json:"esnap_clone"`
		ExternalName string   `json:"external_snapshot_name,omitempty"`
	}
	i, a := l.info(), l.s.attrs.get(l.id)
	d := detail{StoreUUID: l.s.id, BaseBdev: l.s.base.disk.name, Thin: !a.Thick, Allocated: i.AllocatedClusters,
		Snapshot: i.Snapshot, Clone: i.Parent != "", BaseSnapshot: i.Parent, Clones: i.Clones}
	if d.EsnapClone = isExternalClone(i, a); d.EsnapClone {
		d.ExternalName = a.External
	}
	return struct {
		Lvol detail `json:"lvol"`
	}{d}
}

// isExternalClone is SPDK's is_esnap_clone: the external disk is the very parent.
func isExternalClone(i lvol.Info, a attribute) bool { return a.External != "" && i.Parent == "" }

// sync registers, renames and unregisters the lvstore's disks so that they are what it
// holds. The caller holds admin.
func (s *lvstore) sync() {
	list, err := s.store.List()
	if err != nil {
		s.t.log.Error("list lvols", "lvstore", s.name, "err", err)
		return
	}
	byName := make(map[string]lvol.Info, len(list))
	for _, i := range list {
		byName[i.Name] = i
	}
	look := func(name string) (lvol.Info, error) { return byName[name], nil }
	present := map[string]bool{}
	for _, i := range list {
		present[i.UUID] = s.place(i, look)
	}
	for _, d := range s.disks() {
		if id := d.driver.(*lvolDisk).id; !present[id] {
			s.remove(d, true)
		}
	}
}

// place makes one lvol known as a disk under its present name; false when it can have
// none. look describes other lvols by name.
func (s *lvstore) place(i lvol.Info, look func(name string) (lvol.Info, error)) bool {
	if s.making[i.Name] || i.Damage != "" || !s.connectParent(i, look) {
		return false // as in SPDK, a degraded lvol has no bdev
	}
	t := s.t
	alias := s.named() + "/" + i.Name
	t.mu.RLock()
	l := s.lvols[i.UUID]
	t.mu.RUnlock()
	if l == nil {
		s.add(i, alias)
		return true
	}
	t.mu.Lock()
	l.name = i.Name
	d := t.names[i.UUID]
	t.mu.Unlock()
	if d != nil {
		t.setAlias(d, alias)
	}
	return true
}

// placeOne is place for a change of one lvol.
func (s *lvstore) placeOne(i lvol.Info) { s.place(i, s.store.Get) }

func (s *lvstore) add(i lvol.Info, alias string) {
	id, err := uuid.Parse(i.UUID)
	if err != nil {
		s.t.log.Error("lvol has no UUID", "lvol", alias, "err", err)
		return
	}
	l := &lvolDisk{s: s, id: i.UUID, name: i.Name}
	s.t.mu.Lock()
	s.lvols[i.UUID] = l
	s.t.mu.Unlock()
	local := s.base.disk.local
	if e, _, err := s.external(i, s.store.Get); err == nil && e.External != "" {
		local = local && s.parents[e.External].disk.local
	}
	if err := s.t.register(&disk{name: i.UUID, id: id, alias: alias, product: "Logical Volume", blockBytes: s.block, driver: l, local: local}); err != nil {
		s.t.log.Error("lvol not registered", "lvol", alias, "err", err)
		s.t.mu.Lock()
		delete(s.lvols, i.UUID)
		s.t.mu.Unlock()
	}
}

func (s *lvstore) remove(d *disk, wanted bool) {
	s.t.unregister(d, wanted)
	s.t.mu.Lock()
	delete(s.lvols, d.driver.(*lvolDisk).id)
	s.t.mu.Unlock()
}

// findLvol finds an lvol by the name, alias or UUID of its bdev.
func (t *Target) findLvol(name string) (*disk, *lvolDisk, error) {
	d, err := t.find(name)
	if err != nil {
		return nil, nil, err
	}
	l, ok := d.driver.(*lvolDisk)
	if !ok {
		return nil, nil, rpc.Errno(syscall.ENODEV, kind.Errorf(kind.Invalid, "bdev %s is no lvol", d.name))
	}
	return d, l, nil
}

// checkNew tells whether an lvstore may get an lvol of that name.
func (s *lvstore) checkNew(name string) error {
	if name == "" || len(name) > maxNameBytes {
		return kind.Errorf(kind.Invalid, "lvol name %.80q must have 1 to %d characters", name, maxNameBytes)
	}
	if _, err := s.store.Get(name); err == nil {
		return kind.Errorf(kind.Exists, "lvol %s/%s exists", s.name, name)
	}
	return nil
}

func (t *Target) createLvol(params json.RawMessage) (any, error) {
	var p struct {
		UUID        string `json:"uuid,omitempty"`
		StoreName   string `json:"lvs_name,omitempty"`
		Name        string `json:"lvol_name"`
		SizeMiB     uint64 `json:"size_in_mib"`
		Thin        bool   `json:"thin_provision,omitempty"`
		ClearMethod string `json:"clear_method,omitempty"`
	}
	if err := decode(params, &p); err != nil {
		return nil, err
	}
	switch strings.ToLower(p.ClearMethod) {
	case "", "none", "unmap", "write_zeroes": // an lvol reads as zeros whatever it is
	default:
		return nil, &rpc.Error{Code: -int(syscall.EINVAL), Message: "Invalid clean_method option"}
	}
	var s *lvstore
	var i lvol.Info
	_, err := t.change(func() (_ any, err error) {
		if s, err = t.findStore(p.UUID, p.StoreName); err != nil {
			return nil, err
		}
		if err = s.checkNew(p.Name); err != nil {
			return nil, errnoOf(err)
		}
		size, err := s.sizeOf(p.SizeMiB)
		if err != nil {
			return nil, err
		}
		if !p.Thin && size/s.store.Stat().ClusterBytes > s.store.Stat().FreeClusters {
			return nil, invalidOf(kind.Errorf(kind.NoSpace, "lvol %s/%s of %d MiB: %d clusters are free", s.name, p.Name, p.SizeMiB, s.store.Stat().FreeClusters))
		}
		if p.Thin {
			if i, err = s.store.Create(p.Name, size); err != nil {
				return nil, invalidOf(err)
			}
			s.placeOne(i)
			return nil, nil
		}
		if err := s.attrs.intend(p.Name); err != nil {
			return nil, invalidOf(err)
		}
		if i, err = s.store.Create(p.Name, size); err != nil {
			return nil, invalidOf(s.giveUp(p.Name, err))
		}
		s.making[p.Name] = true
		return nil, nil
	})
	if err != nil || p.Thin {
		return i.UUID, err
	}
	// Allocating everything may take long; nobody can see the lvol meanwhile.
	_, inflateErr := s.store.Inflate(t.ctx, p.Name)
	_, err = t.change(func() (any, error) {
		delete(s.making, p.Name)
		if inflateErr == nil {
			inflateErr = s.attrs.put(map[string]attribute{i.UUID: {Thick: true}}, p.Name)
		}
		if inflateErr != nil {
			return nil, invalidOf(s.giveUp(p.Name, inflateErr))
		}
		s.placeOne(i)
		return nil, nil
	})
	return i.UUID, err
}

// giveUp deletes an lvol that could not be made wholly, and its intent. It returns err.
func (s *lvstore) giveUp(name string, err error) error {
	deleted := s.store.Delete(name)
	if deleted == nil || kind.Of(deleted) == kind.NotFound {
		deleted = s.attrs.put(nil, name)
	}
	if deleted != nil {
		s.t.log.Warn("lvol that was not wholly made stays until the lvstore is opened again", "lvstore", s.name, "lvol", name, "err", deleted)
	}
	return err
}

// sizeOf is a size in MiB in bytes, rounded up to clusters as SPDK does.
func (s *lvstore) sizeOf(mib uint64) (int64, error) {
	cluster := s.store.Stat().ClusterBytes
	if mib == 0 || mib > lvol.MaxLvolBytes>>20 {
		return 0, invalidOf(kind.Errorf(kind.Invalid, "size of %d MiB: it must be from 1 to %d", mib, int64(lvol.MaxLvolBytes>>20)))
	}
	return (int64(mib)<<20 + cluster - 1) / cluster * cluster, nil
}

func (t *Target) snapshotLvol(params json.RawMessage) (any, error) {
	var p struct {
		Lvol     string `json:"lvol_name"`
		Snapshot string `json:"snapshot_name"`
	}
	if err := decode(params, &p); err != nil {
		return nil, err
	}
	_, l, err := t.findLvol(p.Lvol)
	if err != nil {
		return nil, err
	}
	s := l.s
	if err := s.checkNew(p.Snapshot); err != nil {
		return nil, invalidOf(err)
	}
	a := s.attrs.get(l.id)
	if a != (attribute{}) {
		err = s.attrs.intend(p.Snapshot)
	}
	if err != nil {
		return nil, invalidOf(err)
	}
	i, err := s.store.Snapshot(l.named(), p.Snapshot)
	if err != nil {
		if a != (attribute{}) {
			err = s.giveUp(p.Snapshot, err)
		}
		return nil, invalidOf(err)
	}
	if a != (attribute{}) {
		// The snapshot takes over the lvol's part, and with it what lies below.
		if err := s.attrs.put(map[string]attribute{i.UUID: a, l.id: {}}, p.Snapshot); err != nil {
			return nil, invalidOf(s.giveUp(p.Snapshot, err))
		}
	}
	s.placeOne(i)
	return i.UUID, nil
}

func (t *Target) cloneLvol(params json.RawMessage) (any, error) {
	var p struct {
		Snapshot string `json:"snapshot_name"`
		Clone    string `json:"clone_name"`
	}
	if err := decode(params, &p); err != nil {
		return nil, err
	}
	_, l, err := t.findLvol(p.Snapshot)
	if err != nil {
		return nil, err
	}
	if err := l.s.checkNew(p.Clone); err != nil {
		return nil, invalidOf(err)
	}
	i, err := l.s.store.Clone(l.named(), p.Clone)
	if err != nil {
		return nil, invalidOf(err)
	}
	l.s.placeOne(i)
	return i.UUID, nil
}

func (t *Target) deleteLvol(params json.RawMessage) (any, error) {
	var p struct {
		Name string `json:"name"`
	}
	if err := decode(params, &p); err != nil {
		return nil, err
	}
	s, i := t.findAny(p.Name)
	if s == nil {
		return nil, rpc.Errno(syscall.ENODEV, kind.Errorf(kind.NotFound, "no lvol %.160q", p.Name))
	}
	if len(i.Clones) > 1 {
		return nil, rpc.Internal(rpc.Strerror(syscall.EPERM), kind.Errorf(kind.InUse, "lvol %s/%s has %d clones", s.name, i.Name, len(i.Clones)))
	}
	// Its one clone takes over its part, and with it what lies below.
	a := s.attrs.get(i.UUID)
	heir, set := lvol.Info{}, map[string]attribute{i.UUID: {}}
	if a.External != "" && len(i.Clones) == 1 {
		var err error
		if heir, err = s.store.Get(i.Clones[0]); err != nil {
			return nil, rpc.Internal(rpc.Strerror(syscall.EIO), err)
		}
		if s.attrs.get(heir.UUID).External == "" {
			if err := s.attrs.put(map[string]attribute{heir.UUID: {External: a.External, Bytes: a.Bytes}}); err != nil {
				return nil, rpc.Internal(rpc.Strerror(syscall.EIO), err)
			}
		}
	}
	if d := t.lookup(i.UUID); d != nil {
		s.remove(d, true)
	}
	err := s.store.Delete(i.Name)
	if err == nil && a != (attribute{}) {
		err = s.attrs.put(set)
	}
	if err != nil {
		s.sync() // it is still there
		return nil, rpc.Internal(rpc.Strerror(kind.Errno(err)), err)
	}
	s.dropParents()
	return true, nil
}

// findAny finds an lvol, degraded or not, by bdev name, alias or UUID.
func (t *Target) findAny(name string) (*lvstore, lvol.Info) {
	if d := t.lookup(name); d != nil {
		if l, ok := d.driver.(*lvolDisk); ok {
			return l.s, l.info()
		}
	}
	for _, s := range t.listStores() {
		list, err := s.store.List()
		if err != nil {
			continue
		}
		for _, i := range list {
			if !s.making[i.Name] && (i.UUID == nameKey(name) || s.named()+"/"+i.Name == name) {
				return s, i
			}
		}
	}
	return nil, lvol.Info{}
}

func (t *Target) renameLvol(params json.RawMessage) (any, error) {
	var p struct {
		OldName string `json:"old_name"`
		NewName string `json:"new_name"`
	}
	if err := decode(params, &p); err != nil {
		return nil, err
	}
	_, l, err := t.findLvol(p.OldName)
	if err != nil {
		return nil, err
	}
	if p.NewName == l.named() {
		return true, nil
	}
	if err := l.s.checkNew(p.NewName); err != nil {
		return nil, invalidOf(err)
	}
	old := l.named()
	i, err := l.s.store.Rename(old, p.NewName)
	if err != nil {
		return nil, invalidOf(err)
	}
	l.s.placeOne(i)
	return true, nil
}

func (t *Target) resizeLvol(params json.RawMessage) (any, error) {
	var p struct {
		Name    string `json:"name"`
		SizeMiB uint64 `json:"size_in_mib"`
	}
	if err := decode(params, &p); err != nil {
		return nil, err
	}
	d, l, err := t.findLvol(p.Name)
	if err != nil {
		return nil, err
	}
	size, err := l.s.sizeOf(p.SizeMiB)
	if err != nil {
		return nil, err
	}
	i := l.info()
	if who := t.pinned(d); who != "" && size < i.SizeBytes {
		return nil, invalidOf(kind.Errorf(kind.InUse, "lvol %s cannot shrink: it is used by %s", i.Name, who))
	}
	undo, err := l.narrow(i, size)
	if err != nil {
		return nil, invalidOf(err)
	}
	if _, err := l.s.store.Resize(i.Name, size); err != nil {
		undo()
		if kind.Of(err) == kind.ReadOnly {
			err = rpc.Errno(syscall.EPERM, err)
		}
		return nil, invalidOf(err)
	}
	t.resized(d)
	return true, nil
}

// narrow makes an lvol show no more than size of an external parent, before it shrinks:
// what is cut off must not show again when it grows. undo takes that back.
func (l *lvolDisk) narrow(i lvol.Info, size int64) (undo func(), err error) {
	e, own, err := l.s.external(i, l.s.store.Get)
	if err != nil || e.External == "" || size >= e.Bytes || i.ReadOnly {
		return func() {}, err
	}
	less := own
	less.External, less.Bytes = e.External, size
	if err := l.s.attrs.put(map[string]attribute{l.id: less}); err != nil {
		return nil, err
	}
	l.window.Store(size)
	return func() {
		if err := l.s.attrs.put(map[string]attribute{l.id: own}); err != nil {
			l.s.t.log.Error("lvol shows less of its external parent than before", "lvol", i.Name, "err", err)
			return
		}
		l.window.Store(e.Bytes)
	}, nil
}

func (t *Target) setReadOnly(params json.RawMessage) (any, error) {
	var p struct {
		Name string `json:"name"`
	}
	if err := decode(params, &p); err != nil {
		return nil, err
	}
	d, l, err := t.findLvol(p.Name)
	if err != nil {
		return nil, err
	}
	if who := t.busy(d); who != "" && !l.readOnly() {
		return nil, invalidOf(kind.Errorf(kind.InUse, "lvol %s is used by %s", l.named(), who))
	}
	if _, err := l.s.store.SetReadOnly(l.named(), true); err != nil {
		return nil, invalidOf(err)
	}
	return true, nil
}

func (t *Target) getLvols(params json.RawMessage) (any, error) {
	var p struct {
		UUID string `json:"lvs_uuid,omitempty"`
		Name string `json:"lvs_name,omitempty"`
	}
	if err := decode(params, &p); err != nil {
		return nil, err
	}
	type store struct {
		Name string `json:"name"`
		UUID string `json:"uuid"`
	}
	type info struct {
		Alias      string `json:"alias"`
		UUID       string `json:"uuid"`
		Name       string `json:"name"`
		Thin       bool   `json:"is_thin_provisioned"`
		Snapshot   bool   `json:"is_snapshot"`
		Clone      bool   `json:"is_clone"`
		EsnapClone bool   `json:"is_esnap_clone"`
		Degraded   bool   `json:"is_degraded"`
		Allocated  int64  `json:"num_allocated_clusters"`
		Store      store  `json:"lvs"`
	}
	stores := t.listStores()
	if p.UUID != "" || p.Name != "" {
		s, err := t.findStore(p.UUID, p.Name)
		if err != nil {
			return nil, err
		}
		stores = []*lvstore{s}
	}
	list := []info{}
	for _, s := range stores {
		lvols, err := s.store.List()
		if err != nil {
			return nil, errnoOf(err)
		}
		name := s.named()
		byName := make(map[string]lvol.Info, len(lvols))
		for _, i := range lvols {
			byName[i.Name] = i
		}
		look := func(name string) (lvol.Info, error) { return byName[name], nil }
		for _, i := range lvols {
			a := s.attrs.get(i.UUID)
			d := t.lookup(i.UUID)
			if d == nil && i.Damage == "" && !s.hasExternal(i, look) {
				continue // still being made
			}
			list = append(list, info{name + "/" + i.Name, i.UUID, i.Name, !a.Thick, i.Snapshot, i.Parent != "", isExternalClone(i, a),
				d == nil, i.AllocatedClusters, store{name, s.id}})
		}
	}
	return list, nil
}

// hasExternal tells whether some disk outside lies below an lvol.
func (s *lvstore) hasExternal(i lvol.Info, look func(name string) (lvol.Info, error)) bool {
	e, _, err := s.external(i, look)
	return err != nil || e.External != ""
}

// setParent makes another snapshot of the lvstore the lvol's parent.
func (t *Target) setParent(params json.RawMessage) (any, error) {
	_, d, l, parent, err := t.parents(params)
	if err != nil {
		return nil, err
	}
	p, ok := parent.driver.(*lvolDisk)
	if !ok {
		return nil, rpc.Errno(syscall.ENODEV, kind.Errorf(kind.Invalid, "bdev %s is no lvol", parent.name))
	}
	if p.s != l.s {
		return nil, invalidOf(kind.Errorf(kind.Invalid, "lvols %s and %s are of different lvstores", l.id, p.id))
	}
	own := l.s.attrs.get(l.id)
	if who := t.busy(d); who != "" && (l.s.hasExternal(l.info(), l.s.store.Get) || l.s.hasExternal(p.info(), l.s.store.Get)) {
		return nil, invalidOf(kind.Errorf(kind.InUse, "lvol %s is used by %s", l.named(), who))
	}
	_, err = l.s.store.SetParent(l.named(), p.named())
	if own.External != "" && (err == nil || kind.Of(err) == kind.Exists) {
		own.External, own.Bytes = "", 0
		err = l.s.attrs.put(map[string]attribute{l.id: own})
	}
	if err != nil {
		return nil, invalidOf(err)
	}
	l.s.dropParents()
	return true, nil
}

// parents decodes the parameters of the methods that set a parent.
func (t *Target) parents(params json.RawMessage) (name string, d *disk, l *lvolDisk, parent *disk, err error) {
	var p struct {
		Lvol   string `json:"lvol_name"`
		Parent string `json:"parent_name"`
	}
	if err = decode(params, &p); err != nil {
		return
	}
	if d, l, err = t.findLvol(p.Lvol); err != nil {
		return
	}
	parent, err = t.find(p.Parent)
	return p.Lvol, d, l, parent, err
}

func (t *Target) inflate(_ context.Context, params json.RawMessage) (any, error) {
	return t.detach(params, true)
}

func (t *Target) decouple(_ context.Context, params json.RawMessage) (any, error) {
	return t.detach(params, false)
}
