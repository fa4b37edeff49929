// Package qcow2 reads and writes qcow2 images: the writable layer of a container, a
// file per container over a read-only base that it shares with others.
//
// The format is that of QEMU's docs/interop/qcow2.txt, version 3; its section names
// are quoted where bytes are read or written. An Image is a target/bdev.Device; what
// the base is and who mounts the result the package must not know.
//
// # What survives
//
// Data goes to the file at once, changes of the tables stay in memory until a flush,
// with a record in a redo log beside the file (package redo). So a killed process
// loses nothing that it acknowledged. A flush syncs the data first, then writes the
// tables that point to it and syncs again: after a power loss an unflushed cluster
// reads as before and never as what the file held there earlier. A cluster that a
// table let go is reused only after the flush that made this durable. While an image
// is open for writing it carries the dirty mark, since its reference counts are
// written by Close alone, or with lazy refcounts off at each flush too.
package qcow2

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"sync"
	"sync/atomic"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/redo"
	"github.com/thaw-project/thaw/target/bdev"
)

// OpenOptions says how to open an image.
type OpenOptions struct {
	// ReadOnly opens without changing the file. A file that a killed writer left with
	// a redo log must be opened writable once first.
	ReadOnly bool

	// Backing holds what unallocated clusters read as, BackingSizeBytes of it and
	// zeros beyond. It is needed exactly when the image names a backing file, and
	// must not change while the image is open; Close does not close it. The path in
	// the image is never opened by this package.
	Backing          io.ReaderAt
	BackingSizeBytes int64

	// CacheBytes bounds the cached part of the L2 tables, DefaultCacheBytes if 0.
	// 1 MiB maps 8 GiB of a disk with 64 KiB clusters.
	CacheBytes int

	// Logger is told about recovery and damage; nil is silence.
	Logger *slog.Logger
}

// Image is an open image. It is a bdev.Device with its rules for concurrent use.
type Image struct {
	name         string
	file         file
	logger       *slog.Logger
	readOnly     bool
	backing      io.ReaderAt
	backingBytes int64 // of the base that the disk can see
	clusterBytes int64

	// head is fixed after Open but for incompatible and autoclear (headMu) and the
	// place of the refcount table (flushMu).
	head   *header
	headMu sync.Mutex
	marked atomic.Bool // the file carries our dirty mark

	// l1 is the active L1 table, read and written atomically; an entry changes once,
	// from 0 to a table, under tableMu and metaMu.
	l1      []uint64
	tableMu sync.Mutex
	cache   *cache
	alloc   allocator
	spans   spans
	epoch   epoch

	// metaMu orders changes of the tables with their records and with checkpoints.
	metaMu      sync.Mutex
	log         *redo.Log
	record      []byte       // guarded by metaMu: scratch
	dirtySlices []*slice     // guarded by metaMu: differ from the file; pinned
	dirtyL1     []int64      // guarded by metaMu: indexes that differ from the file
	retired     []clusterRun // guarded by metaMu: let go by changes since the last checkpoint

	// flushMu lets one flush run at a time.
	flushMu    sync.Mutex
	flushBuf   []byte      // guarded by metaMu
	graced     []graced    // guarded by flushMu: oldest first
	counts     refStore    // guarded by flushMu
	grownTable *clusterRun // guarded by flushMu: a larger refcount table, not in place yet

	wrote   atomic.Bool           // data was written since the last sync
	broken  atomic.Pointer[error] // why nothing may be written any more
	exposed bool                  // Open is done: damage found now is news

	scannedBytes int64 // length of the file when its references were counted
}

var _ bdev.Device = (*Image)(nil)

// Info describes an image.
type Info struct {
	SizeBytes         int64  `json:"size_bytes"`         // of the disk
	ClusterBytes      int64  `json:"cluster_bytes"`      //
	FileBytes         int64  `json:"file_bytes"`         // length of the file
	AllocatedBytes    int64  `json:"allocated_bytes"`    // what the file occupies in its file system
	Version           int    `json:"version"`            // 2 or 3
	RefcountBits      int    `json:"refcount_bits"`      //
	LazyRefcounts     bool   `json:"lazy_refcounts"`     //
	Dirty             bool   `json:"dirty"`              // open for writing now, or its writer died
	Corrupt           bool   `json:"corrupt"`            //
	InternalSnapshots int    `json:"internal_snapshots"` // qcow2's own, which Thaw never makes
	BackingFile       string `json:"backing_file"`       // as written in the image
	BackingFormat     string `json:"backing_format"`     //
	Compression       string `json:"compression"`        // of compressed clusters, if it has any
}

// Open opens the image at path. A writable open locks the file against every other
// open of it, Thaw's or QEMU's (kind.InUse), reads all its tables, and first applies
// the redo log that a killed writer left. It fails with kind.Unsupported for features
// the package does not know and kind.Corrupt for damage.
func Open(path string, o OpenOptions) (*Image, error) {
	i, err := open(path, o)
	if err != nil {
		return nil, fmt.Errorf("open qcow2 %s: %w", path, err)
	}
	return i, nil
}

func open(path string, o OpenOptions) (*Image, error) {
	f, err := openOSFile(path, o.ReadOnly)
	if err != nil {
		return nil, err
	}
	if err := f.lock(o.ReadOnly); err != nil {
		f.Close()
		return nil, err
	}
	i, err := openFile(f, path, redoPrefix(path), o)
	if err != nil {
		f.Close()
		return nil, err
	}
	return i, nil
}

// openFile opens an image in f, which stays the caller's on error.
func openFile(f file, name, prefix string, o OpenOptions) (*Image, error) {
	i, err := load(f, name, o)
	if err != nil {
		return nil, err
	}
	if (i.head.backingFile != "") != (o.Backing != nil) {
		return nil, kind.Errorf(kind.Invalid, "the image names the base %q, a base was given: %t", i.head.backingFile, o.Backing != nil)
	}
	if i.readOnly {
		if i.head.dirty() && redoPending(prefix) {
			return nil, kind.Errorf(kind.Unavailable, "its writer was killed, and a writable open must apply the redo log first")
		}
		i.exposed = true
		return i, nil
	}
	if err := i.refuseWriting(); err != nil {
		return nil, err
	}
	if err := i.recover(prefix); err != nil {
		if i.log != nil {
			i.log.Close()
		}
		return nil, err
	}
	i.exposed = true
	return i, nil
}

// load reads the header and the L1 table.
func load(f file, name string, o OpenOptions) (*Image, error) {
	fileBytes, _, err := f.Stat()
	if err != nil {
		return nil, err
	}
	h, err := readHeader(f, fileBytes)
	if err != nil {
		return nil, err
	}
	if o.CacheBytes < 0 || o.BackingSizeBytes < 0 {
		return nil, kind.Errorf(kind.Invalid, "negative size in the options")
	}
	if o.CacheBytes == 0 {
		o.CacheBytes = DefaultCacheBytes
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	i := &Image{
		name: name, file: f, logger: o.Logger, readOnly: o.ReadOnly,
		backing: o.Backing, clusterBytes: h.clusterBytes(),
		head: h, cache: newCache(h.clusterBits, o.CacheBytes),
		scannedBytes: fileBytes,
	}
	if o.Backing != nil {
		i.backingBytes = min(o.BackingSizeBytes, h.sizeBytes)
	}
	i.alloc.file, i.alloc.clusterBits = f, h.clusterBits
	i.alloc.fileBytes.Store(fileBytes)
	i.spans.freed.L = &i.spans.mu
	i.counts = refStore{h: h, unsaved: map[int64]bool{}}
	if i.l1, err = readTable(f, h.l1Offset, h.l1Entries); err != nil {
		return nil, fmt.Errorf("read L1 table: %w", err)
	}
	return i, nil
}

// readHeader reads the first cluster, whose size its own start tells.
func readHeader(f file, fileBytes int64) (*header, error) {
	var start [headerV2Bytes]byte
	if err := readFull(f, start[:], 0, true); err != nil {
		return nil, err
	}
	first := start[:]
	if bits := binary.BigEndian.Uint32(start[20:]); bits >= minClusterBits && bits <= maxClusterBits && string(start[:4]) == magic {
		first = make([]byte, min(int64(1)<<bits, fileBytes))
		if err := readFull(f, first, 0, false); err != nil {
			return nil, err
		}
	}
	return parseHeader(first, fileBytes)
}

// refuseWriting names what the package can read but not change.
func (i *Image) refuseWriting() error {
	h := i.head
	switch {
	case h.version < 3:
		return kind.Errorf(kind.Unsupported, "a version 2 image is read-only here: qemu-img amend -o compat=1.1 makes it version 3")
	case h.corrupt():
		return kind.Errorf(kind.Corrupt, "the image is marked corrupt (incompatible feature bit 1): repair it first")
	case h.snapshots > 0:
		return kind.Errorf(kind.Unsupported, "%d internal snapshots: such an image is read-only here", h.snapshots)
	case h.bitmaps:
		return kind.Errorf(kind.Unsupported, "persistent bitmaps (header extension %#x): such an image is read-only here", uint32(extBitmaps))
	}
	return nil
}

// recover replays the redo log, counts all references, and writes what was replayed.
func (i *Image) recover(prefix string) error {
	if err := i.openLog(prefix); err != nil {
		return err
	}
	var damage error
	s := i.newScan(func(sev severity, format string, args ...any) {
		// Refcounts are made anew, so a dirty image may have any; all else must be
		// right before the first write.
		if sev == leak || sev == recount && i.head.dirty() || damage != nil {
			return
		}
		damage = kind.Errorf(kind.Corrupt, format+": repair it first", args...)
	})
	if err := s.run(); err != nil {
		return err
	}
	if damage != nil {
		return damage
	}
	i.adoptScan(s)
	i.wrote.Store(true) // a killed writer may have left data unsynced, which our flush promises
	if !i.head.dirty() {
		return nil
	}
	i.marked.Store(true)
	i.logger.Info("qcow2: the writer did not close the image; references counted anew", "image", i.name)
	if err := i.alloc.trim(); err != nil {
		return err
	}
	return i.flush()
}

func (i *Image) newScan(found func(severity, string, ...any)) *scan {
	s := &scan{f: i.file, h: i.head, fileBytes: i.scannedBytes, l1: i.l1, found: found}
	if len(i.dirtySlices) > 0 {
		perTable := int64(1) << (i.head.l2Bits() - i.cache.entryBits)
		s.overlay = func(t int64, entries []uint64) {
			for k := range perTable {
				if c := i.cache.peek(t*perTable + k); c != nil {
					copy(entries[k<<i.cache.entryBits:], c.entries)
				}
			}
		}
	}
	return s
}

// adoptScan makes the counts of a scan those to allocate by.
func (i *Image) adoptScan(s *scan) {
	i.alloc.adopt(s.refs)
	i.counts.table = s.refTable
	if !s.refTableSound {
		i.head.refTableOffset, i.head.refTableClusters = 0, 0
	}
}

// mark puts the dirty mark into the file and clears the auto-clear features, before
// the first change of the tables, and cuts off what nothing refers to.
func (i *Image) mark() error {
	i.headMu.Lock()
	defer i.headMu.Unlock()
	if i.marked.Load() {
		return nil
	}
	if err := i.writeFeatures(i.head.incompatible|incompatDirty, 0); err != nil {
		return err
	}
	// The sync before the first table write covers the mark, but the counts of an
	// image that is not lazy are written before that sync, and must not reach the disk
	// without it: nobody would look for the leaks.
	if !i.head.lazy() {
		if err := i.sync(); err != nil {
			return err
		}
	}
	if err := i.alloc.trim(); err != nil {
		return err
	}
	i.marked.Store(true)
	return nil
}

// writeFeatures writes the incompatible and the auto-clear features. headMu is held.
func (i *Image) writeFeatures(incompatible, autoclear uint64) error {
	var raw [24]byte
	be := binary.BigEndian
	be.PutUint64(raw[:], incompatible)
	be.PutUint64(raw[8:], i.head.compatible)
	be.PutUint64(raw[16:], autoclear)
	if err := i.file.WriteAt(raw[:], offIncompatible); err != nil {
		return fmt.Errorf("write header: %w", err)
	}
	i.head.incompatible, i.head.autoclear = incompatible, autoclear
	return nil
}

// damaged is called with damage found in the tables while the image is in use. They
// were sound when it was opened, so somebody else writes the file or the disk fails;
// either way our own writes would spread it.
func (i *Image) damaged(err error) error {
	if i.readOnly || !i.exposed || i.broken.Load() != nil {
		return err
	}
	i.breakDown(fmt.Errorf("the image got corrupt: %w", err))
	i.headMu.Lock()
	defer i.headMu.Unlock()
	if werr := i.writeFeatures(i.head.incompatible|incompatCorrupt, i.head.autoclear); werr != nil {
		i.logger.Error("qcow2: cannot mark the image corrupt", "image", i.name, "error", werr)
	}
	return err
}

func (i *Image) breakDown(err error) {
	if i.broken.CompareAndSwap(nil, &err) {
		i.logger.Error("qcow2: the image takes no more writes", "image", i.name, "error", err)
	}
}

func (i *Image) brokenError() error {
	if err := i.broken.Load(); err != nil {
		return kind.Wrap(kind.IO, *err)
	}
	return nil
}

// SizeBytes implements bdev.Device.
func (i *Image) SizeBytes() int64 { return i.head.sizeBytes }

// ReadOnly implements bdev.Device.
func (i *Image) ReadOnly() bool { return i.readOnly }

// Close flushes, writes the reference counts and marks the image clean. No other
// method may be running or called afterwards. When it fails the file is left as a
// killed writer leaves it, and the next writable Open recovers it.
func (i *Image) Close() error {
	if i.readOnly {
		return i.file.Close()
	}
	err := i.finish(0)
	if err == nil {
		err = i.log.Remove()
	}
	if aerr := i.Abandon(); err == nil {
		err = aerr
	}
	if err != nil {
		return fmt.Errorf("close qcow2 %s: %w", i.name, err)
	}
	return nil
}

// Abandon closes the image as a SIGKILL would: nothing is flushed, the redo log and
// the dirty mark stay, and the next writable Open recovers every acknowledged write.
// It is for an image that is about to be removed.
func (i *Image) Abandon() error {
	var err error
	if i.log != nil {
		err = i.log.Close()
	}
	return errors.Join(err, i.file.Close())
}

// finish makes the file complete and clears the dirty mark and the features in clear.
func (i *Image) finish(clear uint64) error {
	i.flushMu.Lock()
	defer i.flushMu.Unlock()
	if err := i.brokenError(); err != nil {
		return err
	}
	if err := i.flush(); err != nil || !i.marked.Load() && clear == 0 {
		return err
	}
	if len(i.graced) > 0 {
		return kind.Errorf(kind.InUse, "the image is still being read")
	}
	for {
		replaced, err := i.saveCounts(true)
		if err != nil {
			return err
		}
		if replaced.n == 0 {
			break
		}
		i.alloc.release(replaced) // the counts of the old table's clusters fall
	}
	if err := i.alloc.trim(); err != nil {
		return err
	}
	if err := i.sync(); err != nil {
		return err
	}
	i.headMu.Lock()
	defer i.headMu.Unlock()
	if i.head.version >= 3 {
		if err := i.writeFeatures(i.head.incompatible&^(incompatDirty|clear), i.head.autoclear); err != nil {
			return err
		}
	}
	i.marked.Store(false)
	return i.sync()
}

// Info describes the image as it is now.
func (i *Image) Info() (Info, error) {
	fileBytes, allocated, err := i.file.Stat()
	if err != nil {
		return Info{}, err
	}
	i.headMu.Lock()
	defer i.headMu.Unlock()
	info := i.head.info()
	info.FileBytes, info.AllocatedBytes = fileBytes, allocated
	return info, nil
}

func (h *header) info() Info {
	return Info{
		SizeBytes: h.sizeBytes, ClusterBytes: h.clusterBytes(), Version: h.version,
		RefcountBits: 1 << h.refcountOrder, LazyRefcounts: h.lazy(),
		Dirty: h.dirty(), Corrupt: h.corrupt(), InternalSnapshots: int(h.snapshots),
		BackingFile: h.backingFile, BackingFormat: h.backingFormat, Compression: h.compressionName(),
	}
}

// Inspect describes the image at path, which may be in use, from its header alone.
func Inspect(path string) (Info, error) {
	f, err := openOSFile(path, true)
	if err != nil {
		return Info{}, err
	}
	defer f.Close()
	fileBytes, allocated, err := f.Stat()
	if err != nil {
		return Info{}, err
	}
	h, err := readHeader(f, fileBytes)
	if err != nil {
		return Info{}, fmt.Errorf("inspect qcow2 %s: %w", path, err)
	}
	info := h.info()
	info.FileBytes, info.AllocatedBytes = fileBytes, allocated
	return info, nil
}

// AllocatedBytes is what the file occupies in its file system.
func (i *Image) AllocatedBytes() (int64, error) {
	_, allocated, err := i.file.Stat()
	return allocated, err
}
