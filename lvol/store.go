package lvol

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"sort"
	"sync"
	"sync/atomic"

	"go.etcd.io/bbolt"

	"github.com/thaw-project/thaw/filelock"
	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/lvol/device"
	"github.com/thaw-project/thaw/redo"
)

// Store is an open pool. Its methods may be called concurrently.
type Store struct {
	geometry
	o     Options
	log   *slog.Logger
	dir   *os.File // locked
	meta  *meta
	dev   device.Device
	redo  *redo.Log // nil in a read-only store
	super superblock
	alloc *allocator
	ball  *ballast

	// admin serialises structural changes.
	admin  sync.Mutex
	nextID uint64 // guarded by admin: the next id of an lvol or delta
	// orphans are deltas whose lvol's record is damaged: their clusters stay
	// claimed. Fixed when the pool is opened, but for Check which may free them.
	orphans     []*volume // guarded by admin
	superDamage string    // guarded by admin: what was wrong with a copy of the superblock

	mu     sync.RWMutex
	byName map[string]*volume // guarded by mu
	byID   map[uint64]*volume // guarded by mu
	open   map[*Lvol]struct{} // guarded by mu: handles
	closed bool               // guarded by mu

	flushMu   sync.Mutex
	lastFlush error              // guarded by flushMu
	openPages map[*page]struct{} // guarded by flushMu: pages durably marked open
	captures  atomic.Uint64      // flushes that captured; raised under commit

	commit    sync.RWMutex
	seq       atomic.Uint64 // the newest redo record
	redoGap   atomic.Bool   // a redo record could not be written: writes must flush
	openCount atomic.Int64  // len(openPages), for Stat

	dirtyMu    sync.Mutex
	dirty      []*page  // guarded by dirtyMu
	pending    []extent // guarded by dirtyMu: freed, but perhaps in durable metadata
	dirtyCount atomic.Int64
	pendCount  atomic.Int64

	markMu sync.Mutex
	marks  []*page // guarded by markMu: waiting to be marked open

	unclean atomic.Bool           // meta.db says that the pool is in use
	failed  atomic.Pointer[error] // set once a device sync failed: nothing can become durable
	scratch sync.Pool             // of *scratch

	flusher *flusher // nil if Options.FlushInterval is negative or the store read-only
}

// fail puts the store out of use for changes: after a failed sync the kernel may
// have dropped what it could not write, and a later sync would lie.
func (s *Store) fail(err error) {
	err = kind.Errorf(kind.IO, "the pool %s takes no more changes since a sync of its device failed: %w; reopen it", s.o.Dir, err)
	if s.failed.CompareAndSwap(nil, &err) {
		s.log.Error("lvol pool failed", "dir", s.o.Dir, "err", err)
	}
}

func (s *Store) failure() error {
	if s.o.ReadOnly {
		return kind.Errorf(kind.ReadOnly, "pool %s is open read-only", s.o.Dir)
	}
	if p := s.failed.Load(); p != nil {
		return *p
	}
	return nil
}

// update commits a change of meta.db, giving up the ballast if the file system is
// full. fn may run twice.
func (s *Store) update(fn func(tx *bbolt.Tx) error) error {
	err := s.meta.update(fn)
	if kind.Of(err) == kind.NoSpace && s.ball.release() {
		err = s.meta.update(fn)
	}
	// A file system that is full, or a value that makes no sense, left the commit
	// undone. After anything else nobody knows what reached the disk.
	if k := kind.Of(err); err != nil && (k == kind.IO || k == "") {
		s.fail(err)
	}
	return err
}

// Create formats a pool in o.Dir; kind.Exists if there is one. Killed in the
// middle, it leaves nothing that keeps the next Create from succeeding.
func Create(o CreateOptions) (err error) {
	o.ensureDefaults()
	if err := o.validate(); err != nil {
		return err
	}
	if err := os.MkdirAll(o.Dir, 0o700); err != nil {
		return fmt.Errorf("create pool: %w", err)
	}
	lock, err := lockDir(o.Dir, true)
	if err != nil {
		return err
	}
	defer lock.Close()
	path := filepath.Join(o.Dir, "meta.db")
	if _, err := os.Lstat(path); err == nil {
		return kind.Errorf(kind.Exists, "create pool: %s is there already", path)
	} else if !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("create pool: %w", err)
	}
	dev, err := o.openDevice()
	if err != nil {
		return fmt.Errorf("create pool %s: %w", o.Dir, err)
	}
	defer func() {
		if cerr := dev.Close(); err == nil {
			err = cerr
		}
	}()
	capacity := dev.SizeBytes()
	if o.CapacityBytes != 0 && o.CapacityBytes < capacity {
		capacity = o.CapacityBytes
	}
	if o.CapacityBytes > capacity {
		return kind.Errorf(kind.Invalid, "create pool %s: capacity %d exceeds the device's %d", o.Dir, o.CapacityBytes, capacity)
	}
	super := superblock{
		uuid: newUUID(), clusterBytes: o.ClusterBytes, totalClusters: uint64(capacity / o.ClusterBytes),
		created: o.Now().UnixNano(), name: o.Name,
	}
	if super.totalClusters < 2 || capacity > MaxCapacityBytes {
		return kind.Errorf(kind.Invalid, "create pool %s: %d bytes are not 2 clusters of %d to %d bytes", o.Dir, capacity, o.ClusterBytes, int64(MaxCapacityBytes))
	}
	block := super.encode()
	if o.Device != "" && !o.Force {
		old := make([]byte, superblockBytes)
		if err := dev.ReadAt(old, 0); err != nil {
			return fmt.Errorf("create pool %s: %w", o.Dir, err)
		}
		if hasSuperblock(old) {
			return kind.Errorf(kind.Exists, "create pool %s: device %s holds a pool already; force to overwrite it", o.Dir, o.Device)
		}
	}
	if err := dev.WriteAt(block, 0); err != nil {
		return fmt.Errorf("create pool %s: write superblock: %w", o.Dir, err)
	}
	if err := dev.Sync(); err != nil {
		return fmt.Errorf("create pool %s: %w", o.Dir, err)
	}
	// The name meta.db appears last, complete: only then does the pool exist.
	temp := path + ".new"
	if err := os.Remove(temp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("create pool: %w", err)
	}
	if err := createMeta(temp, block, o.Device); err != nil {
		return err
	}
	if err := os.Rename(temp, path); err != nil {
		return fmt.Errorf("create pool: %w", err)
	}
	if err := lock.Sync(); err != nil {
		return fmt.Errorf("create pool: sync %s: %w", o.Dir, err)
	}
	return nil
}

func createMeta(path string, block []byte, devicePath string) error {
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{FreelistType: bbolt.FreelistMapType})
	if err != nil {
		return fmt.Errorf("create pool metadata: %w", err)
	}
	err = db.Update(func(tx *bbolt.Tx) error {
		for _, b := range [][]byte{bucketPool, bucketLvol, bucketName, bucketDelta, bucketOpen} {
			if _, err := tx.CreateBucket(b); err != nil {
				return err
			}
		}
		return errors.Join(
			putPool(tx, keySuperblock, block),
			putPool(tx, keyDevice, []byte(devicePath)),
			putPool64(tx, keyNext, 1),
			putPool64(tx, keyCheckpoint, 0),
			putPool(tx, keyClean, []byte{1}),
		)
	})
	if cerr := db.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return fmt.Errorf("create pool metadata: %w", err)
	}
	return nil
}

func (o *CreateOptions) openDevice() (device.Device, error) {
	switch {
	case o.OpenDevice != nil:
		return o.OpenDevice()
	case o.Device != "":
		return device.OpenFile(o.Device, false)
	}
	path := filepath.Join(o.Dir, "data")
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err // left by a Create that did not get as far as meta.db
	}
	return device.CreateFile(path, o.CapacityBytes/o.ClusterBytes*o.ClusterBytes)
}

// lockDir takes the pool's directory for this process.
func lockDir(dir string, exclusive bool) (*os.File, error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("open pool: %w", err)
	}
	take := filelock.Shared
	if exclusive {
		take = filelock.Exclusive
	}
	if err := take(f, filelock.Patience); err != nil {
		f.Close()
		if errors.Is(err, kind.InUse) {
			return nil, kind.Errorf(kind.InUse, "open pool: %s is in use by another process or store", dir)
		}
		return nil, fmt.Errorf("lock pool %s: %w", dir, err)
	}
	return f, nil
}

// Get describes an lvol; kind.NotFound if there is none of that name.
func (s *Store) Get(name string) (Info, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	v := s.byName[name]
	if v == nil {
		return Info{}, notFound(name)
	}
	return v.infoLocked(&s.geometry), nil
}

func notFound(name string) error { return kind.Errorf(kind.NotFound, "no lvol %.160q", name) }

// List describes all lvols in order of name.
func (s *Store) List() ([]Info, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	list := make([]Info, 0, len(s.byName))
	for _, v := range s.byName {
		list = append(list, v.infoLocked(&s.geometry))
	}
	sort.Slice(list, func(i, j int) bool { return list[i].Name < list[j].Name })
	return list, nil
}

// Stat describes the pool.
func (s *Store) Stat() Stat {
	st := Stat{
		UUID: s.super.uuid.String(), Name: s.super.name, Dir: s.o.Dir, ClusterBytes: s.clusterBytes,
		TotalClusters: int64(s.totalClusters) - 1,
		FreeClusters:  int64(s.alloc.freeClusters()) + s.pendCount.Load(),
		DirtyPages:    int(s.dirtyCount.Load()),
		OpenPages:     int(s.openCount.Load()),
		ReadOnly:      s.o.ReadOnly,
	}
	if s.redo != nil {
		st.RedoBytes = s.redo.SizeBytes()
	}
	s.mu.RLock()
	st.Lvols = len(s.byName)
	s.mu.RUnlock()
	return st
}

// OpenLvol opens an lvol. A snapshot, a read-only lvol or any lvol of a read-only
// store can only be opened readOnly: kind.ReadOnly otherwise. An lvol may be open
// several times.
func (s *Store) OpenLvol(name string, readOnly bool) (*Lvol, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, errClosed(s.o.Dir)
	}
	v := s.byName[name]
	switch {
	case v == nil:
		return nil, notFound(name)
	case v.damage != nil:
		return nil, kind.Errorf(kind.Corrupt, "open lvol %s: %w", name, v.damage)
	case v.leaving:
		return nil, kind.Errorf(kind.InUse, "open lvol %s: it is being deleted or changed", name)
	case !readOnly && (v.snapshot || v.readOnly || s.o.ReadOnly):
		return nil, kind.Errorf(kind.ReadOnly, "open lvol %s for writing: it is read-only", name)
	}
	v.handles++
	l := &Lvol{s: s, v: v, readOnly: readOnly, locking: !v.snapshot && !v.readOnly}
	s.open[l] = struct{}{}
	return l, nil
}

func errClosed(dir string) error {
	return kind.Errorf(kind.Unavailable, "pool %s is closed", dir)
}

// Close closes all lvols, waiting for their operations, makes everything durable
// and closes the pool. A second Close does nothing.
func (s *Store) Close() error {
	s.admin.Lock()
	defer s.admin.Unlock()
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return nil
	}
	s.closed = true
	handles := make([]*Lvol, 0, len(s.open))
	for l := range s.open {
		handles = append(handles, l)
	}
	s.mu.Unlock()
	for _, l := range handles {
		l.Close()
	}
	if s.flusher != nil {
		s.flusher.stop()
	}
	var errs []error
	if s.failure() == nil {
		if err := s.flushFor(closeAll); err != nil {
			errs = append(errs, fmt.Errorf("close pool %s: %w", s.o.Dir, err))
		} else if err := s.update(func(tx *bbolt.Tx) error { return putPool(tx, keyClean, []byte{1}) }); err != nil {
			errs = append(errs, fmt.Errorf("close pool %s: %w", s.o.Dir, err))
		} else if err := s.redo.Remove(); err != nil {
			errs = append(errs, fmt.Errorf("close pool %s: %w", s.o.Dir, err))
		}
	}
	return errors.Join(append(errs, s.closeFiles())...)
}

// closeFiles closes what open opened.
func (s *Store) closeFiles() error {
	var errs []error
	if s.redo != nil {
		errs = append(errs, s.redo.Close())
	}
	if s.meta != nil {
		errs = append(errs, s.meta.close())
	}
	if s.dev != nil {
		errs = append(errs, s.dev.Close())
	}
	if s.dir != nil {
		errs = append(errs, s.dir.Close())
	}
	return errors.Join(errs...)
}
