package qcow2

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/thaw-project/thaw/kind"
)

// DefaultClusterBits makes clusters of 64 KiB, QEMU's own default.
const DefaultClusterBits = 16

// CreateOptions describes a new image.
type CreateOptions struct {
	// SizeBytes is the size of the disk, a positive multiple of 512.
	SizeBytes int64
	// BackingFile is recorded in the image, at most 1023 bytes; "" means no backing.
	BackingFile string
	// BackingFormat is recorded beside it, "raw" if empty.
	BackingFormat string
	// ClusterBits is the binary logarithm of the cluster size, 9 to 21,
	// DefaultClusterBits if 0.
	ClusterBits int
	// LazyRefcounts leaves reference counts to Close, so that a flush writes less.
	LazyRefcounts bool
}

// header validates the options and lays out the image but for its refcounts: the
// header in the first cluster, the L1 table behind it.
func (o CreateOptions) header() (*header, error) {
	if o.ClusterBits == 0 {
		o.ClusterBits = DefaultClusterBits
	}
	if o.BackingFile == "" {
		o.BackingFormat = ""
	} else if o.BackingFormat == "" {
		o.BackingFormat = "raw"
	}
	switch {
	case o.ClusterBits < minClusterBits || o.ClusterBits > maxClusterBits:
		return nil, kind.Errorf(kind.Invalid, "cluster bits %d: must be %d to %d", o.ClusterBits, minClusterBits, maxClusterBits)
	case o.SizeBytes <= 0 || o.SizeBytes%512 != 0:
		return nil, kind.Errorf(kind.Invalid, "a disk of %d bytes: must be a positive multiple of 512", o.SizeBytes)
	case len(o.BackingFile) > maxBackingNameBytes:
		return nil, kind.Errorf(kind.Invalid, "backing file name of %d bytes: at most %d", len(o.BackingFile), maxBackingNameBytes)
	case len(o.BackingFormat) > 15:
		return nil, kind.Errorf(kind.Invalid, "backing format %q: at most 15 bytes", o.BackingFormat)
	}
	h := &header{
		version: 3, clusterBits: uint(o.ClusterBits), sizeBytes: o.SizeBytes,
		refcountOrder: 4, backingFile: o.BackingFile, backingFormat: o.BackingFormat,
	}
	if o.LazyRefcounts {
		h.compatible = compatLazyRefcounts
	}
	if need := h.l1Needed(); need > maxL1Bytes/8 {
		return nil, kind.Errorf(kind.Invalid, "a disk of %d bytes with clusters of %d: needs %d L1 entries, at most %d", o.SizeBytes, h.clusterBytes(), need, maxL1Bytes/8)
	}
	h.l1Entries, h.l1Offset = h.l1Needed(), h.clusterBytes()
	return h, nil
}

// Create makes an empty image at path, durably and in one step: the file is there
// whole or not at all. A path that exists is kind.Exists.
func Create(path string, o CreateOptions) error {
	h, err := o.header()
	if err == nil {
		err = create(path, h)
	}
	if err != nil {
		return fmt.Errorf("create qcow2 %s: %w", path, err)
	}
	return nil
}

// create writes a nameless file and then gives it its name, which fails if the name is
// taken. A killed process leaves nothing.
func create(path string, h *header) error {
	dir := filepath.Dir(path)
	if _, err := os.Lstat(path); err == nil {
		return kind.Errorf(kind.Exists, "the file exists")
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	fd, err := retry(func() (int, error) {
		return unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	})
	temp := "/proc/self/fd/" + strconv.Itoa(fd)
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EISDIR) {
		// A file system without nameless files.
		var f *os.File
		if f, err = os.CreateTemp(dir, "."+filepath.Base(path)+".tmp-*"); err == nil {
			defer os.Remove(f.Name())
			defer f.Close()
			temp = f.Name()
			fd, err = unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
		}
	}
	if err != nil {
		return &os.PathError{Op: "create in", Path: dir, Err: err}
	}
	f := &osFile{name: path, fd: fd}
	defer f.Close()
	if err := writeEmpty(f, h); err != nil {
		return err
	}
	if err := unix.Linkat(unix.AT_FDCWD, temp, unix.AT_FDCWD, path, unix.AT_SYMLINK_FOLLOW); err != nil {
		if err == unix.EEXIST {
			return kind.Errorf(kind.Exists, "the file exists")
		}
		return &os.PathError{Op: "link", Path: path, Err: err}
	}
	if err := d.Sync(); err != nil {
		return err
	}
	return nil
}

// writeEmpty writes an image without data to an empty file and syncs it.
func writeEmpty(f file, h *header) error {
	i := &Image{file: nosync{f}, head: h, clusterBytes: h.clusterBytes(), logger: slog.New(slog.DiscardHandler)}
	i.alloc.file, i.alloc.clusterBits = i.file, h.clusterBits
	i.counts = refStore{h: h, unsaved: map[int64]bool{}}
	first, err := h.encode()
	if err != nil {
		return err
	}
	l1Clusters := (h.l1Entries*8 + h.clusterBytes() - 1) >> h.clusterBits
	if _, err := i.alloc.allocEnd(1 + l1Clusters); err != nil {
		return err
	}
	if err := f.WriteAt(first, 0); err != nil {
		return err
	}
	// The file reads as zeros, as an empty L1 table does, but a flush on a full disk
	// must find the table's blocks there.
	for off, end := h.l1Offset, h.l1Offset+h.l1Entries*8; off < end; off += int64(len(zeroCluster)) {
		if err := f.WriteAt(zeroCluster[:min(int64(len(zeroCluster)), end-off)], off); err != nil {
			return err
		}
	}
	if _, err := i.saveCounts(true); err != nil {
		return err
	}
	if err := i.alloc.trim(); err != nil {
		return err
	}
	return f.Sync()
}

// nosync is for a file that nobody can see yet: the order of its writes is no matter.
type nosync struct{ file }

func (nosync) Sync() error { return nil }
