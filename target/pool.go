package target

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/google/uuid"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/lvol"
	"github.com/thaw-project/thaw/lvol/device"
	"github.com/thaw-project/thaw/target/bdev"
	"github.com/thaw-project/thaw/target/rpc"
)

// An lvstore has its clusters on a disk, and its metadata in
//
//	<root>/lvstore/<uuid>/meta.db, redo.N    package lvol's
//	<root>/lvstore/<uuid>/attributes.db      what package lvol does not know (attributes.go)
//
// The disk's first block names the UUID. A disk that appears is examined for it.

// defaultClusterBytes is SPDK's.
const defaultClusterBytes = 4 << 20

// maxNameBytes bounds names of lvstores and lvols, as in SPDK.
const maxNameBytes = 63

// unfinished marks a directory in which an lvstore is being created.
const unfinished = ".new-"

// lvstore is an open lvol store. Its fields are guarded by Target.admin where nothing
// else is said.
type lvstore struct {
	t     *Target
	id    string
	name  string // guarded by Target.mu
	base  *lease
	block uint32
	store *lvol.Store
	attrs *attributes
	lvols map[string]*lvolDisk // by UUID; guarded by Target.mu
	// making are lvols that are there but not wholly made yet, by name.
	making map[string]bool
	// parents are the external parents that are there, by UUID.
	parents map[string]*lease
}

// removeUnfinished removes what killed bdev_lvol_create_lvstore calls left.
func removeUnfinished(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), unfinished) {
			if err := os.RemoveAll(filepath.Join(dir, e.Name())); err != nil {
				return err
			}
		}
	}
	return nil
}

func (t *Target) storeDir(id string) string { return filepath.Join(t.o.Root, "lvstore", id) }

// baseDevice is the device of a lease for package lvol, which closes it when it is done;
// the lease stays.
func baseDevice(l *lease) device.Device {
	if f, ok := l.disk.driver.(*fileDisk); ok {
		return keptBase{countedBase{f.below(), l.disk.ioStat()}}
	}
	return bdevBase{l.dev}
}

// keptBase is a device that stays open.
type keptBase struct{ countedBase }

func (keptBase) Close() error { return nil }

// NextData implements device.Mapper where the device does.
func (k keptBase) NextData(off int64) (start, end int64, err error) {
	if m, ok := k.Device.(device.Mapper); ok {
		return m.NextData(off)
	}
	return 0, 0, kind.Errorf(kind.Unsupported, "the device does not tell what it holds")
}

// bdevBase is any disk as a device of package lvol.
type bdevBase struct{ dev bdev.Device }

func (b bdevBase) ReadAt(p []byte, off int64) error {
	n, err := b.dev.ReadAt(p, off)
	if n == len(p) && errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

func (b bdevBase) WriteAt(p []byte, off int64) error {
	_, err := b.dev.WriteAt(p, off)
	return err
}

func (b bdevBase) Sync() error                   { return b.dev.Flush() }
func (b bdevBase) Punch(off, length int64) error { return b.dev.Discard(off, length) }
func (b bdevBase) ZeroesOnPunch() bool           { return true } // what bdev.Device asks of Discard
func (b bdevBase) SizeBytes() int64              { return b.dev.SizeBytes() }
func (b bdevBase) Close() error                  { return nil }

func (t *Target) createStore(params json.RawMessage) (any, error) {
	var p struct {
		BdevName    string `json:"bdev_name"`
		Name        string `json:"lvs_name"`
		ClusterSize uint32 `json:"cluster_sz,omitempty"`
		ClearMethod string `json:"clear_method,omitempty"`
		// Sizes SPDK's metadata region; ours is no region of the disk.
		MDPagesRatio uint32 `json:"num_md_pages_per_cluster_ratio,omitempty"`
		MDPageSize   uint32 `json:"md_page_size,omitempty"`
	}
	if err := decode(params, &p); err != nil {
		return nil, err
	}
	switch strings.ToLower(p.ClearMethod) {
	case "", "none", "unmap", "write_zeroes":
	default:
		return nil, &rpc.Error{Code: -int(syscall.EINVAL), Message: "Invalid clear_method parameter"}
	}
	d, err := t.find(p.BdevName)
	if err != nil {
		return nil, err
	}
	if p.ClusterSize == 0 {
		p.ClusterSize = defaultClusterBytes
	}
	if len(p.Name) > maxNameBytes {
		return nil, rpc.Errno(syscall.EINVAL, kind.Errorf(kind.Invalid, "lvstore name %.80q has more than %d characters", p.Name, maxNameBytes))
	}
	if t.storeByName(p.Name) != nil {
		return nil, rpc.Errno(syscall.EPERM, kind.Errorf(kind.Exists, "lvstore %s exists", p.Name))
	}
	l := &lease{what: "lvstore " + p.Name, claim: exclusiveWrite, write: true, fixed: true}
	if err := t.acquire(d, l); err != nil {
		return nil, err
	}
	id, err := t.formatStore(l, p.Name, int64(p.ClusterSize), strings.EqualFold(p.ClearMethod, "write_zeroes"))
	if err == nil {
		err = t.openStore(l, id)
	}
	if err != nil {
		l.release()
		return nil, errnoOf(err)
	}
	t.kick()
	return id, nil
}

// formatStore makes an lvstore on a disk. Its directory gets its name last.
func (t *Target) formatStore(l *lease, name string, clusterBytes int64, writeZeroes bool) (id string, err error) {
	if l.dev.ReadOnly() {
		return "", kind.Errorf(kind.ReadOnly, "bdev %s is read-only", l.disk.name)
	}
	base := baseDevice(l)
	// Package lvol takes a device that punches for one that reads as zeros before its
	// first write, so the disk is cleared whatever clear_method says.
	if writeZeroes {
		err = l.dev.WriteZeroes(0, l.dev.SizeBytes())
	} else {
		err = base.Punch(0, base.SizeBytes())
	}
	if err != nil {
		return "", fmt.Errorf("clear bdev %s: %w", l.disk.name, err)
	}
	temp := t.storeDir(unfinished + uuid.NewString())
	defer os.RemoveAll(temp)
	err = lvol.Create(lvol.CreateOptions{Dir: temp, OpenDevice: func() (device.Device, error) { return base, nil }, ClusterBytes: clusterBytes, Name: name})
	if err != nil {
		return "", err
	}
	block := make([]byte, lvol.ProbeBytes)
	if err := base.ReadAt(block, 0); err != nil {
		return "", err
	}
	if id, _, err = lvol.Probe(block); err != nil {
		return "", err
	}
	if err := os.Rename(temp, t.storeDir(id)); err != nil {
		return "", err
	}
	return id, syncDir(filepath.Dir(temp))
}

func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// examine opens the lvstore on a disk that appeared, if it holds one. What keeps it
// from being opened is logged: the disk itself is there all the same.
func (t *Target) examine(d *disk) {
	if d.driver.sizeBytes() < lvol.ProbeBytes {
		return
	}
	l := &lease{what: "examination", own: true, evict: func(bool) {}}
	if err := t.acquire(d, l); err != nil {
		t.log.Warn("bdev not examined", "name", d.name, "err", err)
		return
	}
	block := make([]byte, lvol.ProbeBytes)
	_, err := l.dev.ReadAt(block, 0)
	l.release()
	if err != nil && !errors.Is(err, io.EOF) {
		t.log.Warn("bdev not examined", "name", d.name, "err", err)
		return
	}
	id, name, err := lvol.Probe(block)
	if errors.Is(err, kind.NotFound) {
		return
	}
	log := t.log.With("bdev", d.name, "lvstore", name, "uuid", id)
	if err != nil {
		log.Error("lvstore not opened: its superblock", "err", err)
		return
	}
	if _, err := os.Stat(filepath.Join(t.storeDir(id), "meta.db")); err != nil {
		log.Error("lvstore not opened: its metadata is not here; bring the directory from where it was", "dir", t.storeDir(id), "err", err)
		return
	}
	if s := t.stores[id]; s != nil {
		log.Error("lvstore not opened: it is open on another bdev, of which this one seems a copy", "open", s.base.disk.name)
		return
	}
	claim := &lease{what: "lvstore " + name, claim: exclusiveWrite, write: true, fixed: true}
	if d.driver.readOnly() {
		claim.claim, claim.write = nobodyWrites, false
	}
	if err = t.acquire(d, claim); err == nil {
		if err = t.openStore(claim, id); err != nil {
			claim.release()
		}
	}
	if err != nil {
		log.Error("lvstore not opened", "err", err)
		return
	}
	log.Info("lvstore opened", "lvols", len(t.stores[id].lvols))
}

// openStore opens the lvstore of that UUID on a disk and registers its lvols. When it
// fails the lease is the caller's.
func (t *Target) openStore(l *lease, id string) error {
	dir := t.storeDir(id)
	store, err := lvol.Open(lvol.Options{Dir: dir, OpenDevice: func() (device.Device, error) { return baseDevice(l), nil }, ReadOnly: l.dev.ReadOnly(), Logger: t.log})
	if err != nil {
		return err
	}
	attrs, err := openAttributes(filepath.Join(dir, "attributes.db"), store.Stat().Name)
	if err != nil {
		store.Close()
		return err
	}
	s := &lvstore{t: t, id: id, name: attrs.name(), base: l, block: l.disk.blockBytes, store: store, attrs: attrs,
		lvols: map[string]*lvolDisk{}, making: map[string]bool{}, parents: map[string]*lease{}}
	if o := t.storeByName(s.name); o != nil {
		err = kind.Errorf(kind.Exists, "lvstore %s (%s) has the same name", o.id, o.name)
	} else if !l.dev.ReadOnly() {
		err = s.clean()
	}
	if err != nil {
		attrs.close()
		store.Close()
		return err
	}
	l.evict = func(wanted bool) { s.close(wanted) }
	t.mu.Lock()
	t.stores[id] = s
	t.mu.Unlock()
	s.sync()
	return nil
}

// close takes the lvstore's lvols away and closes it. Its base's lease stays. The
// caller holds admin.
func (s *lvstore) close(wanted bool) {
	t := s.t
	t.mu.Lock()
	delete(t.stores, s.id)
	t.mu.Unlock()
	for _, d := range s.disks() {
		t.unregister(d, wanted)
	}
	for _, l := range s.parents {
		l.release()
	}
	if err := errors.Join(s.store.Close(), s.attrs.close()); err != nil {
		t.log.Error("close lvstore", "lvstore", s.name, "err", err)
	}
}

// disks are the lvstore's disks, clones before what they are clones of.
func (s *lvstore) disks() (list []*disk) {
	s.t.mu.RLock()
	defer s.t.mu.RUnlock()
	for i := len(s.t.disks) - 1; i >= 0; i-- {
		if l, ok := s.t.disks[i].driver.(*lvolDisk); ok && l.s == s {
			list = append(list, s.t.disks[i])
		}
	}
	return list
}

func (t *Target) storeByName(name string) *lvstore {
	t.mu.RLock()
	defer t.mu.RUnlock()
	for _, s := range t.stores {
		if s.name == name {
			return s
		}
	}
	return nil
}

// findStore finds an lvstore by UUID or name, exactly one of which is given: -22 and -19
// as in SPDK.
func (t *Target) findStore(id, name string) (*lvstore, error) {
	var s *lvstore
	switch {
	case (id == "") == (name == ""):
		return nil, rpc.Errno(syscall.EINVAL, kind.Errorf(kind.Invalid, "give either the lvstore's UUID or its name"))
	case id != "":
		t.mu.RLock()
		s = t.stores[nameKey(id)]
		t.mu.RUnlock()
	default:
		s = t.storeByName(name)
	}
	if s == nil {
		return nil, rpc.Errno(syscall.ENODEV, kind.Errorf(kind.NotFound, "no lvstore %.80q", id+name))
	}
	return s, nil
}

func (t *Target) deleteStore(params json.RawMessage) (any, error) {
	var p struct {
		UUID string `json:"uuid,omitempty"`
		Name string `json:"lvs_name,omitempty"`
	}
	if err := decode(params, &p); err != nil {
		return nil, err
	}
	s, err := t.findStore(p.UUID, p.Name)
	if err != nil {
		return nil, err
	}
	s.close(true)
	// The superblock first: a disk without it holds no lvstore, whatever else is left.
	base := baseDevice(s.base)
	err = base.Punch(0, base.SizeBytes())
	if err == nil && !base.ZeroesOnPunch() {
		err = base.WriteAt(make([]byte, lvol.ProbeBytes), 0)
	}
	if err == nil {
		err = base.Sync()
	}
	s.base.release()
	if err == nil {
		err = os.RemoveAll(t.storeDir(s.id))
	}
	if err != nil {
		return nil, invalidOf(err)
	}
	return true, nil
}

func (t *Target) renameStore(params json.RawMessage) (any, error) {
	var p struct {
		OldName string `json:"old_name"`
		NewName string `json:"new_name"`
	}
	if err := decode(params, &p); err != nil {
		return nil, err
	}
	s := t.storeByName(p.OldName)
	if s == nil {
		return nil, &rpc.Error{Code: -int(syscall.ENOENT), Message: fmt.Sprintf("Lvol store %.80s not found", p.OldName)}
	}
	if p.NewName == p.OldName {
		return true, nil
	}
	if p.NewName == "" || len(p.NewName) > maxNameBytes || strings.Contains(p.NewName, "/") {
		return nil, invalidOf(kind.Errorf(kind.Invalid, "lvstore name %.80q must have 1 to %d characters without a slash", p.NewName, maxNameBytes))
	}
	if t.storeByName(p.NewName) != nil {
		return nil, invalidOf(kind.Errorf(kind.Exists, "lvstore %s exists", p.NewName))
	}
	if err := s.attrs.rename(p.NewName); err != nil {
		return nil, invalidOf(err)
	}
	t.mu.Lock()
	s.name = p.NewName
	t.mu.Unlock()
	s.sync()
	return true, nil
}

func (t *Target) getStores(params json.RawMessage) (any, error) {
	var p struct {
		UUID string `json:"uuid,omitempty"`
		Name string `json:"lvs_name,omitempty"`
	}
	if err := decode(params, &p); err != nil {
		return nil, err
	}
	type info struct {
		UUID              string `json:"uuid"`
		Name              string `json:"name"`
		BaseBdev          string `json:"base_bdev"`
		TotalDataClusters int64  `json:"total_data_clusters"`
		FreeClusters      int64  `json:"free_clusters"`
		BlockSize         uint32 `json:"block_size"`
		ClusterSize       int64  `json:"cluster_size"`
	}
	stores := t.listStores()
	if params != nil {
		s, err := t.findStore(p.UUID, p.Name)
		if err != nil {
			return nil, err
		}
		stores = []*lvstore{s}
	}
	list := make([]info, 0, len(stores))
	for _, s := range stores {
		st := s.store.Stat()
		list = append(list, info{s.id, s.named(), s.base.disk.name, st.TotalClusters, st.FreeClusters, s.block, st.ClusterBytes})
	}
	return list, nil
}

func (s *lvstore) named() string {
	s.t.mu.RLock()
	defer s.t.mu.RUnlock()
	return s.name
}

// listStores returns all lvstores in the order in which their disks came.
func (t *Target) listStores() (list []*lvstore) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	for _, d := range t.disks {
		for _, s := range t.stores {
			if s.base.disk == d {
				list = append(list, s)
			}
		}
	}
	return list
}
