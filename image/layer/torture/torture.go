// Package torture builds OCI layers with every case that an image may hold, and
// walks the trees that come out of them, for tests that compare two ways from
// layers to a root file system.
//
// It is imported by tests only.
package torture

import (
	"archive/tar"
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand"
	"strings"
	"time"
)

// Layer is one layer of a stack.
type Layer struct {
	Name string
	Tar  []byte // uncompressed
}

// Builder writes the tar of a layer. Its methods panic on what archive/tar
// refuses, as that is a mistake in a test.
type Builder struct {
	buf bytes.Buffer
	tw  *tar.Writer
}

// NewBuilder starts a layer.
func NewBuilder() *Builder {
	b := &Builder{}
	b.tw = tar.NewWriter(&b.buf)
	return b
}

// Time is the modification time entries get unless they say otherwise, with a
// nanosecond part.
var Time = time.Unix(1_600_000_000, 123_456_789)

// Attr changes a header before it is written.
type Attr func(*tar.Header)

// Mode sets permissions, set-id and sticky bits.
func Mode(mode int64) Attr { return func(h *tar.Header) { h.Mode = mode } }

// Owner sets uid and gid.
func Owner(uid, gid int) Attr { return func(h *tar.Header) { h.Uid, h.Gid = uid, gid } }

// MTime sets the modification time.
func MTime(t time.Time) Attr { return func(h *tar.Header) { h.ModTime = t } }

// Xattr sets an extended attribute.
func Xattr(name, value string) Attr { return Record("SCHILY.xattr."+name, value) }

// Record sets a PAX record.
func Record(key, value string) Attr {
	return func(h *tar.Header) {
		if h.PAXRecords == nil {
			h.PAXRecords = map[string]string{}
		}
		h.PAXRecords[key] = value
	}
}

// Add writes an entry with data.
func (b *Builder) Add(h tar.Header, data []byte, attrs ...Attr) *Builder {
	h.Format = tar.FormatPAX
	if h.ModTime.IsZero() {
		h.ModTime = Time
	}
	if data != nil {
		h.Size = int64(len(data))
	}
	for _, a := range attrs {
		a(&h)
	}
	if err := b.tw.WriteHeader(&h); err != nil {
		panic(fmt.Sprintf("torture: header of %q: %v", h.Name, err))
	}
	if _, err := b.tw.Write(data); err != nil {
		panic(fmt.Sprintf("torture: data of %q: %v", h.Name, err))
	}
	return b
}

// File adds a regular file.
func (b *Builder) File(name string, data []byte, attrs ...Attr) *Builder {
	return b.Add(tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644}, data, attrs...)
}

// Dir adds a directory.
func (b *Builder) Dir(name string, attrs ...Attr) *Builder {
	return b.Add(tar.Header{Typeflag: tar.TypeDir, Name: name + "/", Mode: 0o755}, nil, attrs...)
}

// Symlink adds a symbolic link.
func (b *Builder) Symlink(name, target string, attrs ...Attr) *Builder {
	return b.Add(tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: target, Mode: 0o777}, nil, attrs...)
}

// Link adds a hard link.
func (b *Builder) Link(name, target string, attrs ...Attr) *Builder {
	return b.Add(tar.Header{Typeflag: tar.TypeLink, Name: name, Linkname: target, Mode: 0o644}, nil, attrs...)
}

// Device adds a device node or FIFO.
func (b *Builder) Device(name string, typeflag byte, major, minor int64, attrs ...Attr) *Builder {
	return b.Add(tar.Header{Typeflag: typeflag, Name: name, Mode: 0o600, Devmajor: major, Devminor: minor}, nil, attrs...)
}

// Whiteout hides name of the layers below.
func (b *Builder) Whiteout(name string) *Builder {
	dir, base := "", name
	if i := strings.LastIndexByte(name, '/'); i >= 0 {
		dir, base = name[:i+1], name[i+1:]
	}
	return b.File(dir+".wh."+base, nil)
}

// Opaque hides what the layers below have in directory name.
func (b *Builder) Opaque(name string) *Builder { return b.File(name+"/.wh..wh..opq", nil) }

// Global adds a PAX global header, as "git archive" does.
func (b *Builder) Global(key, value string) *Builder {
	if err := b.tw.WriteHeader(&tar.Header{Typeflag: tar.TypeXGlobalHeader, PAXRecords: map[string]string{key: value}}); err != nil {
		panic(err)
	}
	return b
}

// Raw adds bytes to the stream as they are.
func (b *Builder) Raw(p []byte) *Builder {
	if err := b.tw.Flush(); err != nil {
		panic(err)
	}
	b.buf.Write(p)
	return b
}

// Tar ends the layer.
func (b *Builder) Tar() []byte {
	if err := b.tw.Close(); err != nil {
		panic(err)
	}
	return b.buf.Bytes()
}

// Extent is data in a sparse file.
type Extent struct {
	Offset int64
	Data   []byte
}

// SparsePAX adds a sparse file in GNU tar's PAX format 1.0, where the map of data
// is the start of the stored data.
func (b *Builder) SparsePAX(name string, size int64, extents []Extent, attrs ...Attr) *Builder {
	m := fmt.Sprintf("%d\n", len(extents))
	var data []byte
	for _, e := range extents {
		m += fmt.Sprintf("%d\n%d\n", e.Offset, len(e.Data))
		data = append(data, e.Data...)
	}
	stored := append([]byte(m), make([]byte, (512-len(m)%512)%512)...)
	stored = append(stored, data...)
	// archive/tar refuses to write GNU.sparse records, so the header is made here.
	records := record("GNU.sparse.major", "1") + record("GNU.sparse.minor", "0") +
		record("GNU.sparse.name", name) + record("GNU.sparse.realsize", fmt.Sprint(size)) +
		record("mtime", fmt.Sprintf("%d.%09d", Time.Unix(), Time.Nanosecond()))
	b.Raw(rawHeader("PaxHeaders/x", 'x', int64(len(records)), 0))
	b.Raw(pad([]byte(records)))
	b.Raw(rawHeader("GNUSparseFile.0/x", '0', int64(len(stored)), 0))
	return b.Raw(pad(stored))
}

// SparseGNU adds a sparse file in the old GNU format, of at most four extents.
func (b *Builder) SparseGNU(name string, size int64, extents []Extent) *Builder {
	h := rawHeader(name, 'S', 0, 0)
	copy(h[257:], "ustar  \x00")
	var data []byte
	for i, e := range extents {
		copy(h[386+24*i:], fmt.Sprintf("%011o\x00%011o\x00", e.Offset, len(e.Data)))
		data = append(data, e.Data...)
	}
	copy(h[483:], fmt.Sprintf("%011o\x00", size))
	copy(h[124:], fmt.Sprintf("%011o\x00", len(data)))
	seal(h)
	b.Raw(h)
	return b.Raw(pad(data))
}

func record(key, value string) string {
	n := len(key) + len(value) + 3
	for {
		s := fmt.Sprintf("%d %s=%s\n", n, key, value)
		if len(s) == n {
			return s
		}
		n = len(s)
	}
}

func pad(p []byte) []byte { return append(p, make([]byte, (512-len(p)%512)%512)...) }

// rawHeader makes a ustar header block.
func rawHeader(name string, typeflag byte, size, mtime int64) []byte {
	h := make([]byte, 512)
	copy(h, name)
	copy(h[100:], "0000644\x000000000\x000000000\x00")
	if size < 1<<33 {
		copy(h[124:], fmt.Sprintf("%011o\x00", size))
	} else {
		h[124] = 0x80 // GNU's base-256 form
		binary.BigEndian.PutUint64(h[128:], uint64(size))
	}
	copy(h[136:], fmt.Sprintf("%011o\x00", mtime))
	h[156] = typeflag
	copy(h[257:], "ustar\x0000")
	seal(h)
	return h
}

// seal writes the header's checksum.
func seal(h []byte) {
	copy(h[148:156], "        ")
	sum := 0
	for _, c := range h {
		sum += int(c)
	}
	copy(h[148:], fmt.Sprintf("%06o\x00 ", sum))
}

// Data returns n bytes that do not compress and are the same for the same seed.
func Data(seed int64, n int) []byte {
	b := make([]byte, n)
	rand.New(rand.NewSource(seed)).Read(b)
	return b
}

// Synthetic streams a layer of count files of fileBytes each, without ever
// holding it in memory. Every tenth file is zeros.
func Synthetic(count int, fileBytes int64) io.ReadCloser {
	r, w := io.Pipe()
	go func() {
		tw := tar.NewWriter(w)
		chunk := Data(1, 1<<20)
		empty := make([]byte, 1<<20)
		err := func() error {
			for i := range count {
				if i%1000 == 0 {
					if err := tw.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: fmt.Sprintf("d%d/", i/1000), Mode: 0o755, ModTime: Time, Format: tar.FormatPAX}); err != nil {
						return err
					}
				}
				h := &tar.Header{Typeflag: tar.TypeReg, Name: fmt.Sprintf("d%d/file-%06d", i/1000, i), Mode: 0o644, Size: fileBytes, ModTime: Time}
				if err := tw.WriteHeader(h); err != nil {
					return err
				}
				data := chunk
				if i%10 == 9 {
					data = empty
				}
				for left := fileBytes; left > 0; {
					n := min(left, int64(len(data)))
					if _, err := tw.Write(data[:n]); err != nil {
						return err
					}
					left -= n
				}
			}
			return tw.Close()
		}()
		w.CloseWithError(err)
	}()
	return r
}
