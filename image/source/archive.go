package source

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strings"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"

	"github.com/thaw-project/thaw/image/spool"
	"github.com/thaw-project/thaw/kind"
)

const (
	// maxArchiveEntries bounds the index of an archive in memory: a layer is one
	// to three entries and an image has at most a few thousand layers.
	maxArchiveEntries = 1 << 17
	// maxArchiveLinks bounds how many links in a row lead to an entry.
	maxArchiveLinks = 8
)

// archive is a tar file, indexed once and then read at random.
type archive struct {
	file    *os.File
	entries map[string]entry
}

type entry struct {
	offset, size int64
	link         string // of a symbolic or hard link: the entry it leads to
}

func openArchive(ctx context.Context, name, spoolDir string) (_ *archive, err error) {
	d, base := path.Split(name)
	f, size, err := directory(d).open(base)
	if err != nil {
		return nil, fmt.Errorf("open archive: %w", err)
	}
	a := &archive{file: f.(*os.File), entries: map[string]entry{}}
	defer func() {
		if err != nil {
			a.file.Close()
			err = fmt.Errorf("read archive %s: %w", name, err)
		}
	}()
	if err := a.unpack(ctx, spoolDir, &size); err != nil {
		return nil, err
	}
	return a, a.index(ctx, size)
}

// unpack replaces a compressed archive by its content in a spool file.
func (a *archive) unpack(ctx context.Context, spoolDir string, size *int64) error {
	var magic [4]byte
	if _, err := a.file.ReadAt(magic[:], 0); err != nil && err != io.EOF {
		return err
	}
	var r io.Reader
	switch {
	case bytes.HasPrefix(magic[:], []byte{0x1f, 0x8b}):
		z, err := gzip.NewReader(a.file)
		if err != nil {
			return kind.Wrap(kind.Corrupt, err)
		}
		r = z
	case magic == [4]byte{0x28, 0xb5, 0x2f, 0xfd}:
		z, err := zstd.NewReader(a.file, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(128<<20))
		if err != nil {
			return kind.Wrap(kind.Corrupt, err)
		}
		defer z.Close()
		r = z
	default:
		return nil
	}
	f, err := spool.Create(spoolDir)
	if err != nil {
		return err
	}
	n, err := io.Copy(f, &cancelable{ctx, r})
	if err != nil {
		f.Close()
		if kind.Of(err) == "" { // neither the spool's nor ours: the decompressor's
			err = kind.Wrap(kind.Corrupt, err)
		}
		return fmt.Errorf("decompress: %w", err)
	}
	a.file.Close()
	a.file, *size = f, n
	return nil
}

type cancelable struct {
	ctx context.Context
	r   io.Reader
}

func (c *cancelable) Read(p []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, kind.Wrap(kind.Canceled, err)
	}
	return c.r.Read(p)
}

func (a *archive) index(ctx context.Context, size int64) error {
	// tar.Reader reads headers in whole blocks and nothing ahead, so that after
	// Next the file stands at the entry's data.
	if _, err := a.file.Seek(0, io.SeekStart); err != nil {
		return err
	}
	tr := tar.NewReader(a.file)
	for n := 0; ; n++ {
		if ctx.Err() != nil {
			return kind.Wrap(kind.Canceled, ctx.Err())
		}
		h, err := tr.Next()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			if errors.Is(err, tar.ErrHeader) || errors.Is(err, io.ErrUnexpectedEOF) {
				err = kind.Wrap(kind.Corrupt, err)
			}
			return err
		}
		if n >= maxArchiveEntries {
			return kind.Errorf(kind.Invalid, "more than %d entries", maxArchiveEntries)
		}
		name := clean(h.Name)
		switch h.Typeflag {
		case tar.TypeReg:
			offset, err := a.file.Seek(0, io.SeekCurrent)
			if err != nil {
				return err
			}
			if h.Size > size-offset {
				return kind.Errorf(kind.Corrupt, "entry %.200q has %d bytes, the archive ends after %d", h.Name, h.Size, size-offset)
			}
			a.entries[name] = entry{offset: offset, size: h.Size}
		case tar.TypeLink:
			a.entries[name] = entry{link: clean(h.Linkname)}
		case tar.TypeSymlink: // old docker save shares layers this way
			a.entries[name] = entry{link: clean(path.Join(path.Dir(name), h.Linkname))}
		}
	}
}

// clean makes a name relative to the archive's root; ".." cannot leave it.
func clean(name string) string { return strings.TrimPrefix(path.Clean("/"+name), "/") }

func (a *archive) open(name string) (spool.File, int64, error) {
	name = clean(name)
	for range maxArchiveLinks {
		e, ok := a.entries[name]
		if !ok {
			return nil, 0, kind.Errorf(kind.NotFound, "no file %.200q in the archive", name)
		}
		if e.link == "" {
			return inArchive{io.NewSectionReader(a.file, e.offset, e.size)}, e.size, nil
		}
		name = e.link
	}
	return nil, 0, kind.Errorf(kind.Invalid, "more than %d links lead to %.200q in the archive", maxArchiveLinks, name)
}

func (a *archive) Close() error { return a.file.Close() }

// inArchive is an entry; closing it leaves the archive open.
type inArchive struct{ *io.SectionReader }

func (inArchive) Close() error { return nil }
