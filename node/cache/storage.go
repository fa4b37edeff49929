package cache

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/thaw-project/thaw/filelock"
	"github.com/thaw-project/thaw/kind"
)

// file is one of the two files of a cache. Methods may be called concurrently.
type file interface {
	// ReadAt fills p or fails.
	ReadAt(p []byte, off int64) error
	// WriteAt writes all of p or fails; what is there afterwards is anything.
	WriteAt(p []byte, off int64) error
	// Punch gives the space of a range back, if it can.
	Punch(off, lengthBytes int64) error
	Close() error
}

// diskFile is a file read and written through the page cache, which a killed process
// leaves behind.
type diskFile struct{ f *os.File }

func (d diskFile) ReadAt(p []byte, off int64) error {
	n, err := d.f.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if errors.Is(err, io.EOF) {
		return kind.Errorf(kind.IO, "%s ends at %d", d.f.Name(), off+int64(n))
	}
	return err
}

func (d diskFile) WriteAt(p []byte, off int64) error {
	_, err := d.f.WriteAt(p, off)
	return err
}

func (d diskFile) Punch(off, lengthBytes int64) error {
	err := unix.Fallocate(int(d.f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, lengthBytes)
	if errors.Is(err, unix.EOPNOTSUPP) {
		return nil
	}
	return err
}

func (d diskFile) Close() error { return d.f.Close() }

// lockDir takes dir for this process alone.
func lockDir(dir string) (*os.File, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("open node cache: %w", err)
	}
	f, err := os.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("open node cache: %w", err)
	}
	if err := filelock.Exclusive(f, filelock.Patience); err != nil {
		f.Close()
		if errors.Is(err, kind.InUse) {
			return nil, kind.Errorf(kind.InUse, "open node cache: %s is in use by another process", dir)
		}
		return nil, fmt.Errorf("lock node cache %s: %w", dir, err)
	}
	return f, nil
}

// openDisk opens a file of the cache in dir, made with mode 0600 if absent, and gives
// it that size; it is sparse.
func openDisk(dir, name string, sizeBytes int64) (file, error) {
	f, err := os.OpenFile(filepath.Join(dir, name), os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open node cache: %w", err)
	}
	st, err := f.Stat()
	if err == nil && !st.Mode().IsRegular() {
		err = kind.Errorf(kind.Invalid, "%s is not a regular file", f.Name())
	}
	if err == nil && st.Size() != sizeBytes {
		err = f.Truncate(sizeBytes)
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("open node cache: %w", err)
	}
	return diskFile{f}, nil
}

// readHeader looks at what cache is in dir before its size is known.
func readHeader(dir string) (header, error) {
	f, err := os.Open(filepath.Join(dir, "index"))
	if errors.Is(err, fs.ErrNotExist) {
		return header{}, kind.Errorf(kind.NotFound, "there is none")
	} else if err != nil {
		return header{}, err
	}
	defer f.Close()
	b := make([]byte, headerBytes)
	n, err := io.ReadFull(f, b)
	if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
		return header{}, err
	}
	return decodeHeader(b[:n])
}

// room is how much the data file in dir may take: what it has and nine tenths of what
// is free, since a cache should not be what fills a node's disk.
func room(dir string) (int64, error) {
	var fsys unix.Statfs_t
	if err := unix.Statfs(dir, &fsys); err != nil {
		return 0, fmt.Errorf("open node cache: free space of %s: %w", dir, err)
	}
	free := int64(fsys.Bavail) * fsys.Bsize / 10 * 9
	var st unix.Stat_t
	if err := unix.Stat(filepath.Join(dir, "data"), &st); err == nil {
		free += st.Blocks * 512
	}
	return free, nil
}

// Inspect describes the cache in dir, which another process may have open: what it holds,
// about, since that process goes on. kind.NotFound when there is none.
func Inspect(dir string) (Contents, error) {
	fail := func(err error) (Contents, error) { return Contents{}, fmt.Errorf("node cache %s: %w", dir, err) }
	h, err := readHeader(dir)
	if err != nil {
		return fail(err)
	}
	f, err := os.Open(filepath.Join(dir, "index"))
	if err != nil {
		return fail(err)
	}
	defer f.Close()
	if _, err := f.Seek(headerBytes, io.SeekStart); err != nil {
		return fail(err)
	}
	st := Contents{Dir: dir, UnitBytes: int64(h.unitBytes)}
	r := record{sums: make([]uint32, h.unitBytes>>blockShift)}
	b := make([]byte, recordBytes(h.unitBytes))
	in := bufio.NewReaderSize(f, 1<<20)
	for slot := uint32(0); ; slot++ {
		if _, err := io.ReadFull(in, b); errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return st, nil
		} else if err != nil {
			return fail(err)
		}
		st.CapacityBytes += st.UnitBytes
		if decodeRecord(&r, b, slot, h.unitBytes) {
			st.Units++
			st.UsedBytes += int64(r.bytes)
		}
	}
}
