package erofs

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/iotest"

	goerofs "github.com/erofs/go-erofs"
	"golang.org/x/sys/unix"

	"github.com/thaw-project/thaw/image/block"
	"github.com/thaw-project/thaw/image/filesystem"
	"github.com/thaw-project/thaw/image/layer/torture"
	"github.com/thaw-project/thaw/kind"
)

var bothModes = []block.Mode{block.ModeOverlayfs, block.ModeOverlaybd}

// used reads the used part of a block.
func used(t testing.TB, f *os.File) []byte {
	t.Helper()
	m, err := openImage(f)
	if err != nil {
		t.Fatal(err)
	}
	b := make([]byte, m.sizeBytes())
	if _, err := f.ReadAt(b, 0); err != nil {
		t.Fatal(err)
	}
	return b
}

func TestBadLayers(t *testing.T) {
	for _, mode := range bothModes {
		o := filesystem.Options{Mode: mode, SizeBytes: 1 << 40}
		f := newBlock(t, t.TempDir(), o)
		apply(t, f, o, 0, torture.NewBuilder().Dir("d").File("d/f", []byte("kept")).Tar())
		before := sha256.Sum256(used(t, f))
		for _, bad := range torture.Bad() {
			for i, r := range []io.Reader{bytes.NewReader(bad.Tar), iotest.HalfReader(bytes.NewReader(bad.Tar))} {
				err := New().Apply(ctx, f, o, 1, r)
				if !errors.Is(err, bad.Kind) || !strings.Contains(fmt.Sprint(err), bad.Entry) {
					t.Errorf("%s, %s, reader %d: error %v, want %q about %q", mode, bad.Name, i, err, bad.Kind, bad.Entry)
				}
				if sha256.Sum256(used(t, f)) != before {
					t.Fatalf("%s, %s: the failed layer changed the file system", mode, bad.Name)
				}
			}
		}
		apply(t, f, o, 1, torture.NewBuilder().File("new", nil).Tar())
	}
}

func TestWrongCalls(t *testing.T) {
	o := options(block.ModeOverlayfs)
	f := newBlock(t, t.TempDir(), o)
	for _, tc := range []struct {
		name  string
		index int
		o     filesystem.Options
	}{
		{"index ahead", 1, o},
		{"index negative", -1, o},
		{"mode", 0, filesystem.Options{Mode: "x", SizeBytes: testBlock}},
		{"small", 0, filesystem.Options{Mode: block.ModeOverlayfs, SizeBytes: 4096}},
		{"large", 0, filesystem.Options{Mode: block.ModeOverlayfs, SizeBytes: 32 << 40}},
	} {
		if err := New().Apply(ctx, f, tc.o, tc.index, bytes.NewReader(nil)); !errors.Is(err, kind.Invalid) {
			t.Errorf("%s: %v", tc.name, err)
		}
	}
	empty, err := os.CreateTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	defer empty.Close()
	if err := New().Apply(ctx, empty, o, 0, bytes.NewReader(nil)); !errors.Is(err, kind.Corrupt) {
		t.Errorf("unformatted: %v", err)
	}
}

func TestNoSpace(t *testing.T) {
	for _, mode := range bothModes {
		o := filesystem.Options{Mode: mode, SizeBytes: 4 << 20}
		f := newBlock(t, t.TempDir(), o)
		apply(t, f, o, 0, torture.NewBuilder().File("a", torture.Data(1, 2<<20)).Tar())
		before := used(t, f)
		err := New().Apply(ctx, f, o, 1, bytes.NewReader(torture.NewBuilder().File("b", torture.Data(1, 3<<20)).Tar()))
		if !errors.Is(err, kind.NoSpace) {
			t.Errorf("%s: %v", mode, err)
		}
		if !bytes.Equal(used(t, f), before) {
			t.Errorf("%s: the file system changed", mode)
		}
	}
}

// TestWriteError uses a file that cannot be written.
func TestWriteError(t *testing.T) {
	o := options(block.ModeOverlayfs)
	f := newBlock(t, t.TempDir(), o)
	ro, err := os.Open(f.Name())
	if err != nil {
		t.Fatal(err)
	}
	defer ro.Close()
	stream := torture.Synthetic(20, 1<<20)
	defer stream.Close()
	if err := New().Apply(ctx, ro, o, 0, stream); err == nil {
		t.Error("no error from a file that cannot be written")
	}
}

func TestCancel(t *testing.T) {
	o := options(block.ModeOverlaybd)
	f := newBlock(t, t.TempDir(), o)
	c, cancel := context.WithCancel(ctx)
	stream := torture.Synthetic(100, 1<<20)
	defer stream.Close()
	n := 0
	r := readerFunc(func(p []byte) (int, error) {
		if n++; n == 50 {
			cancel()
		}
		return stream.Read(p)
	})
	if err := New().Apply(c, f, o, 0, r); !errors.Is(err, kind.Canceled) || !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

// TestDeterministic applies the stack twice, the second time from a reader of odd
// pieces.
func TestDeterministic(t *testing.T) {
	for _, mode := range bothModes {
		a, b := newBlock(t, t.TempDir(), options(mode)), newBlock(t, t.TempDir(), options(mode))
		for i, l := range torture.Stack() {
			apply(t, a, options(mode), i, l.Tar)
			if err := New().Apply(ctx, b, options(mode), i, iotest.HalfReader(bytes.NewReader(l.Tar))); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(used(t, a), used(t, b)) {
				t.Fatalf("%s: layer %d gives different bytes", mode, i)
			}
		}
	}
}

// TestLowerClustersStay checks what sharing rests on: of the clusters in use, a
// further layer changes the first only.
func TestLowerClustersStay(t *testing.T) {
	for _, mode := range bothModes {
		f := newBlock(t, t.TempDir(), options(mode))
		var before []byte
		for i, l := range torture.Stack() {
			apply(t, f, options(mode), i, l.Tar)
			after := used(t, f)
			if i > 0 && !bytes.Equal(before[clusterSize:], after[clusterSize:len(before)]) {
				t.Errorf("%s: layer %d changed a cluster below", mode, i)
			}
			before = after
		}
	}
}

// TestHolesAreNotStored counts what files of zeros take.
func TestHolesAreNotStored(t *testing.T) {
	for _, mode := range bothModes {
		f := newBlock(t, t.TempDir(), options(mode))
		half := make([]byte, 32<<20)
		copy(half[31<<20:], torture.Data(1, 1<<20))
		apply(t, f, options(mode), 0, torture.NewBuilder().
			File("zeros", make([]byte, 64<<20)).File("half", half).
			SparsePAX("sparse", 3<<30, []torture.Extent{{Offset: 1 << 30, Data: []byte("x")}, {Offset: 3 << 30}}).Tar())
		if n := len(used(t, f)); n > 2<<20 {
			t.Errorf("%s: %d bytes in use", mode, n)
		}
		var st unix.Stat_t
		if err := unix.Fstat(int(f.Fd()), &st); err != nil {
			t.Fatal(err)
		}
		if st.Blocks*512 > 2<<20 {
			t.Errorf("%s: %d bytes written", mode, st.Blocks*512)
		}
	}
}

// recorder notes which bytes are read.
type recorder struct {
	r     io.ReaderAt
	reads []Range
}

func (r *recorder) ReadAt(p []byte, at int64) (int, error) {
	r.reads = append(r.reads, Range{at, int64(len(p))})
	return r.r.ReadAt(p, at)
}

// TestMetadataRanges reads every inode, directory, link and chunk map and checks
// that they lie where MetadataRanges says.
func TestMetadataRanges(t *testing.T) {
	for _, mode := range bothModes {
		f := newBlock(t, t.TempDir(), options(mode))
		stack := torture.Stack()
		for i, l := range stack {
			apply(t, f, options(mode), i, l.Tar)
		}
		ranges, err := MetadataRanges(f)
		if err != nil {
			t.Fatal(err)
		}
		if want := map[block.Mode]int{block.ModeOverlayfs: 1 + len(stack), block.ModeOverlaybd: 2}[mode]; len(ranges) != want {
			t.Errorf("%s: %d ranges, want %d", mode, len(ranges), want)
		}
		m, err := openImage(f)
		if err != nil {
			t.Fatal(err)
		}
		rec := &recorder{r: f}
		m.r = rec
		root, err := (&loader{image: m, nodes: map[uint64]*inode{}}).root()
		if err != nil {
			t.Fatal(err)
		}
		if err := root.loadAll(0); err != nil {
			t.Fatal(err)
		}
		for _, read := range rec.reads {
			if read.Length > 0 && !slices.ContainsFunc(ranges, func(r Range) bool {
				return read.Offset >= r.Offset && read.Offset+read.Length <= r.Offset+r.Length
			}) {
				t.Errorf("%s: metadata at %+v is in none of %+v", mode, read, ranges)
			}
		}
	}
}

// TestLinksAcrossLayers links to files of layers below, which containerd refuses.
func TestLinksAcrossLayers(t *testing.T) {
	needMount(t)
	layers := [][]byte{
		torture.NewBuilder().Dir("d", torture.Mode(0o711)).File("d/large", torture.Data(1, 100_000), torture.Mode(0o644)).File("d/small", []byte("small")).
			File("d/hole", make([]byte, 1<<20)).Symlink("d/sym", "large").Symlink("to", "d").Link("d/other", "d/large").Tar(),
		torture.NewBuilder().File("unrelated", nil).Tar(),
		torture.NewBuilder().Link("large", "d/large", torture.Mode(0o600), torture.Owner(5, 6)).Link("small", "to/small").Link("hole", "/d/hole").Link("sym", "d/sym").Link("again", "large", torture.Mode(0o600), torture.Owner(5, 6)).Tar(),
	}
	for _, mode := range bothModes {
		dir := t.TempDir()
		f := newBlock(t, dir, options(mode))
		for i, l := range layers {
			apply(t, f, options(mode), i, l)
		}
		fsck(t, f.Name())
		at := filepath.Join(dir, "m")
		mountErofs(t, f.Name(), at)
		root := at
		if mode == block.ModeOverlayfs {
			root = overlay(t, filepath.Join(dir, "o"), []string{at + "/2", at + "/1", at + "/0"})
		}
		nodes := walk(t, root)
		for name, want := range map[string]string{"large": "again", "d/large": "again", "again": "again", "small": "d/small", "hole": "d/hole", "sym": "d/sym"} {
			if nodes[name].Link != want {
				t.Errorf("%s: %s is a link of %q, want %q", mode, name, nodes[name].Link, want)
			}
		}
		if mode == block.ModeOverlaybd && nodes["d/other"].Link != "again" {
			t.Errorf("%s: d/other is a link of %q", mode, nodes["d/other"].Link)
		}
		if n := nodes["d/large"]; n.Mode != unix.S_IFREG|0o600 || n.UID != 5 || n.Hash != sha256.Sum256(torture.Data(1, 100_000)) {
			t.Errorf("%s: d/large is %+v", mode, n)
		}
		if n := nodes["hole"]; n.Hash != sha256.Sum256(make([]byte, 1<<20)) {
			t.Errorf("%s: hole has other content", mode)
		}
		if n := nodes["d"]; n.Mode != unix.S_IFDIR|0o711 {
			t.Errorf("%s: d has mode %o", mode, n.Mode)
		}
	}
}

// TestManyLayers outgrows the root directory beside the superblock.
func TestManyLayers(t *testing.T) {
	needMount(t)
	for _, mode := range bothModes {
		dir := t.TempDir()
		f := newBlock(t, dir, options(mode))
		for i := range maxLayers {
			apply(t, f, options(mode), i, torture.NewBuilder().File(fmt.Sprintf("file-of-layer-%d", i), []byte(fmt.Sprint(i))).File("shared", []byte(fmt.Sprint(i))).Tar())
		}
		if err := New().Apply(ctx, f, options(mode), maxLayers, bytes.NewReader(torture.NewBuilder().Tar())); !errors.Is(err, kind.Invalid) {
			t.Errorf("%s: one layer too many: %v", mode, err)
		}
		fsck(t, f.Name())
		at := filepath.Join(dir, "m")
		mountErofs(t, f.Name(), at)
		for i := range maxLayers {
			name := fmt.Sprintf("file-of-layer-%d", i)
			if mode == block.ModeOverlayfs {
				name = fmt.Sprintf("%d/%s", i, name)
			}
			if b, err := os.ReadFile(filepath.Join(at, name)); err != nil || string(b) != fmt.Sprint(i) {
				t.Fatalf("%s: %s: %q, %v", mode, name, b, err)
			}
		}
	}
}

// TestOtherReader reads the stack with go-erofs and compares it with the kernel.
func TestOtherReader(t *testing.T) {
	needMount(t)
	dir := t.TempDir()
	f := newBlock(t, dir, options(block.ModeOverlaybd))
	for i, l := range torture.Stack() {
		apply(t, f, options(block.ModeOverlaybd), i, l.Tar)
	}
	at := filepath.Join(dir, "m")
	mountErofs(t, f.Name(), at)
	want := walk(t, at)
	img, err := goerofs.Open(f)
	if err != nil {
		t.Fatal(err)
	}
	seen := 0
	err = fs.WalkDir(img, ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		w, ok := want[name]
		if !ok {
			t.Errorf("%q is not there for the kernel", name)
			return nil
		}
		if !fs.ValidPath(name) {
			return nil // io/fs takes UTF-8 only
		}
		seen++
		info, err := d.Info()
		if err != nil {
			return err
		}
		in, ok := info.(interface {
			UID() uint32
			GID() uint32
			GetAllXattr() map[string]string
		})
		if !ok {
			t.Fatalf("go-erofs gives a %T", info)
		}
		if uint32(info.Mode().Perm()) != w.Mode&0o777 || in.UID() != w.UID || in.GID() != w.GID || !info.ModTime().Equal(w.MTime) {
			t.Errorf("%q: %v %d:%d %v", name, info.Mode(), in.UID(), in.GID(), info.ModTime())
		}
		xattrs := map[string]string{}
		for k, v := range in.GetAllXattr() {
			xattrs[strings.TrimSuffix(k, ".")] = v // its names of ACLs end in a dot
		}
		if !maps.Equal(xattrs, w.Xattrs) {
			t.Errorf("%q: attributes %q, want %q", name, xattrs, w.Xattrs)
		}
		if d.Type().IsRegular() {
			b, err := fs.ReadFile(img, name)
			if err != nil {
				return err
			}
			if sha256.Sum256(b) != w.Hash {
				t.Errorf("%q: content differs", name)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if seen < len(want)-10 {
		t.Errorf("saw %d of %d names", seen, len(want))
	}
}
