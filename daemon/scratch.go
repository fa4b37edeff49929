package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/thaw-project/thaw/attacher"
	"github.com/thaw-project/thaw/keylock"
	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/target/bdev"
)

// A machine without a store has its scratch volume, over which writable layers are
// made, in a sparse file of its own: <root>/scratch/<name>. It holds an empty file
// system and is never written to again.

// scratchFiles are those in a directory.
type scratchFiles struct {
	dir    string
	making keylock.Set // one key, "": one is made at a time
}

// ensure makes the scratch volume of a size once, and returns its name.
func (s *scratchFiles) ensure(ctx context.Context, sizeBytes int64) (string, error) {
	if sizeBytes < attacher.MinScratchBytes || sizeBytes > attacher.MaxScratchBytes || sizeBytes%(1<<20) != 0 {
		return "", kind.Errorf(kind.Invalid, "scratch of %d bytes: must be a multiple of 1 MiB from %d to %d", sizeBytes, attacher.MinScratchBytes, int64(attacher.MaxScratchBytes))
	}
	unlock, err := s.making.Lock(ctx, "")
	if err != nil {
		return "", fmt.Errorf("wait for another scratch: %w", err)
	}
	defer unlock()
	dir, name := s.dir, attacher.ScratchName(sizeBytes)
	path := filepath.Join(dir, name)
	if info, err := os.Stat(path); err == nil && info.Size() == sizeBytes {
		return name, nil
	} else if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", err
	}
	// Under another name until it is complete: this process may be killed.
	temp := path + ".new"
	f, err := os.OpenFile(temp, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return "", err
	}
	err = f.Truncate(sizeBytes)
	if err == nil {
		err = attacher.FormatScratch(ctx, temp)
	}
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return "", errors.Join(fmt.Errorf("make %s: %w", name, err), os.Remove(temp))
	}
	return name, os.Rename(temp, path)
}

// openScratchFile opens a scratch volume; the error is kind.NotFound for other names.
func openScratchFile(dir, name string) (bdev.Device, error) {
	if filepath.Base(name) != name {
		return nil, kind.Errorf(kind.Invalid, "volume %.160q", name)
	}
	f, err := os.Open(filepath.Join(dir, name))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, kind.Errorf(kind.NotFound, "this machine has no store, and no volume %.160q", name)
	}
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err == nil && (!info.Mode().IsRegular() || info.Size()%512 != 0) {
		err = kind.Errorf(kind.Invalid, "volume %s is no file of whole sectors", name)
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return &scratchFile{f, info.Size()}, nil
}

// scratchFile is a read-only device on a file.
type scratchFile struct {
	file      *os.File
	sizeBytes int64
}

var _ bdev.Device = (*scratchFile)(nil)

func (s *scratchFile) ReadAt(p []byte, off int64) (int, error) {
	n, err := s.file.ReadAt(p, off)
	if err != nil && !errors.Is(err, io.EOF) {
		err = kind.Wrap(kind.IO, err)
	}
	return n, err
}

func (s *scratchFile) WriteAt([]byte, int64) (int, error) { return 0, s.refuse() }
func (s *scratchFile) Flush() error                       { return nil }
func (s *scratchFile) Discard(int64, int64) error         { return s.refuse() }
func (s *scratchFile) WriteZeroes(int64, int64) error     { return s.refuse() }
func (s *scratchFile) SizeBytes() int64                   { return s.sizeBytes }
func (s *scratchFile) ReadOnly() bool                     { return true }
func (s *scratchFile) Close() error                       { return s.file.Close() }
func (s *scratchFile) refuse() error {
	return kind.Errorf(kind.ReadOnly, "volume %s is read-only", s.file.Name())
}
