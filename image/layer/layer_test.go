package layer_test

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"reflect"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"github.com/containerd/containerd/v2/pkg/archive"

	"github.com/thaw-project/thaw/image/layer"
	"github.com/thaw-project/thaw/image/layer/torture"
	"github.com/thaw-project/thaw/kind"
)

const tib = 1 << 40

// read returns all entries of a layer, each with its data.
func read(r io.Reader, limits layer.Limits) (entries []*layer.Entry, data [][]byte, err error) {
	lr := layer.NewReader(r, limits)
	for {
		e, err := lr.Next()
		if err == io.EOF {
			return entries, data, nil
		}
		if err != nil {
			return entries, data, err
		}
		b, err := io.ReadAll(lr)
		if err != nil {
			return entries, data, err
		}
		entries, data = append(entries, e), append(data, b)
	}
}

func one(t *testing.T, b *torture.Builder) (*layer.Entry, []byte) {
	t.Helper()
	entries, data, err := read(bytes.NewReader(b.Tar()), layer.DefaultLimits(tib))
	if err != nil {
		t.Fatal(err)
	}
	if len(entries) != 1 {
		t.Fatalf("%d entries, want 1", len(entries))
	}
	return entries[0], data[0]
}

func TestEntry(t *testing.T) {
	when := time.Unix(1234567890, 987654321)
	e, data := one(t, torture.NewBuilder().File("./a//b/./c", []byte("data"), torture.Mode(0o4751), torture.Owner(1<<31, 1<<32-2), torture.MTime(when),
		torture.Xattr("user.b", "2"), torture.Xattr("security.capability", "\x00x"), torture.Xattr("trusted.overlay.opaque", "y"),
		torture.Xattr("user.overlay.metacopy", ""), torture.Xattr("os2.x", "y"), torture.Record("LIBARCHIVE.xattr.user.c", "Mw")))
	want := &layer.Entry{
		Name: "a/b/c", Type: layer.Regular, Mode: 0o4751, UID: 1 << 31, GID: 1<<32 - 2, MTime: when, Size: 4,
		Xattrs: []layer.Xattr{{Name: "security.capability", Value: "\x00x"}, {Name: "user.b", Value: "2"}},
	}
	if !e.MTime.Equal(when) {
		t.Errorf("time %v, want %v", e.MTime, when)
	}
	e.MTime = when
	if !reflect.DeepEqual(e, want) || string(data) != "data" {
		t.Errorf("got %+v %q, want %+v", e, data, want)
	}
}

func TestWhiteouts(t *testing.T) {
	b := torture.NewBuilder().Whiteout("a/b").Whiteout("top").Opaque("a").File(".wh..wh..opq", nil).
		File(".wh..wh.plnk", nil).File("a/.wh..wh.orph", nil).Whiteout(".hidden").File("wh.not", nil)
	entries, _, err := read(bytes.NewReader(b.Tar()), layer.DefaultLimits(tib))
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, e := range entries {
		got = append(got, fmt.Sprintf("%d %s", e.Whiteout, e.Name))
	}
	want := []string{"1 a/b", "1 top", "2 a", "2 ", "1 .hidden", "0 wh.not"}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestSparse(t *testing.T) {
	extents := []torture.Extent{{Offset: 1000, Data: []byte("one")}, {Offset: 70000, Data: []byte("two")}}
	want := make([]byte, 100_000)
	copy(want[1000:], "one")
	copy(want[70000:], "two")
	for name, b := range map[string]*torture.Builder{
		"PAX": torture.NewBuilder().SparsePAX("s", 100_000, extents),
		"GNU": torture.NewBuilder().SparseGNU("s", 100_000, extents),
	} {
		e, data := one(t, b)
		if !e.Sparse || e.Name != "s" || e.Size != 100_000 || !bytes.Equal(data, want) {
			t.Errorf("%s: %+v with %d bytes", name, e, len(data))
		}
	}
}

func TestTimeIsBounded(t *testing.T) {
	for _, when := range []time.Time{time.Unix(-1, 5), time.Unix(1<<40, 0)} {
		e, _ := one(t, torture.NewBuilder().File("f", nil, torture.MTime(when)))
		if !e.MTime.Equal(time.Unix(0, 0)) {
			t.Errorf("%v becomes %v, want 1970", when, e.MTime)
		}
	}
}

// TestBad leaves out what only a tree can tell.
func TestBad(t *testing.T) {
	tree := map[string]bool{"hard link to nothing": true, "hard link to a directory": true, "hard link to itself": true, "below a file": true, "links in a circle": true, "bad ACL": true}
	for _, bad := range torture.Bad() {
		_, _, err := read(bytes.NewReader(bad.Tar), layer.DefaultLimits(tib))
		if tree[bad.Name] {
			if err != nil {
				t.Errorf("%s: %v, though the reader cannot know", bad.Name, err)
			}
			continue
		}
		if !errors.Is(err, bad.Kind) || !strings.Contains(fmt.Sprint(err), bad.Entry) {
			t.Errorf("%s: error %v, want %q about %q", bad.Name, err, bad.Kind, bad.Entry)
		}
	}
}

func TestEveryCutIsFound(t *testing.T) {
	whole := torture.NewBuilder().File("a", torture.Data(1, 700), torture.Xattr("user.x", "y")).Symlink("b", "c").SparsePAX("d", 9000, []torture.Extent{{Offset: 10, Data: torture.Data(2, 600)}}).Tar()
	all, _, err := read(bytes.NewReader(whole), layer.DefaultLimits(tib))
	if err != nil {
		t.Fatal(err)
	}
	for cut := range len(whole) {
		entries, _, err := read(iotest.DataErrReader(bytes.NewReader(whole[:cut])), layer.DefaultLimits(tib))
		if err == nil {
			// Only a cut between entries goes unseen here.
			if cut%512 != 0 {
				t.Errorf("cut at %d: no error", cut)
			}
			continue
		}
		if !errors.Is(err, kind.Corrupt) || len(entries) > len(all) {
			t.Errorf("cut at %d: %v", cut, err)
		}
	}
}

func TestStreamErrorKeepsItsKind(t *testing.T) {
	whole := torture.NewBuilder().File("a", torture.Data(1, 100_000)).Tar()
	r := io.MultiReader(bytes.NewReader(whole[:5000]), iotest.ErrReader(kind.Errorf(kind.Unavailable, "registry went away")))
	_, _, err := read(r, layer.DefaultLimits(tib))
	if kind.Of(err) != kind.Unavailable || !strings.Contains(err.Error(), `"a"`) {
		t.Errorf("got %v", err)
	}
}

func TestLimits(t *testing.T) {
	ten := torture.NewBuilder()
	for i := range 10 {
		ten.File(fmt.Sprint("f", i), make([]byte, 1000))
	}
	tarBytes := ten.Tar()
	base := layer.Limits{MaxFileBytes: 1000, MaxTotalBytes: 10_000, MaxEntries: 10, MaxMetadataBytes: 20}
	for _, tc := range []struct {
		name   string
		change func(*layer.Limits)
		ok     bool
	}{
		{"as large as needed", func(*layer.Limits) {}, true},
		{"file", func(l *layer.Limits) { l.MaxFileBytes-- }, false},
		{"total", func(l *layer.Limits) { l.MaxTotalBytes-- }, false},
		{"entries", func(l *layer.Limits) { l.MaxEntries-- }, false},
		{"metadata", func(l *layer.Limits) { l.MaxMetadataBytes-- }, false},
		{"unset", func(l *layer.Limits) { *l = layer.Limits{} }, false},
	} {
		limits := base
		tc.change(&limits)
		_, _, err := read(bytes.NewReader(tarBytes), limits)
		if tc.ok != (err == nil) || err != nil && !errors.Is(err, kind.Invalid) {
			t.Errorf("%s: %v", tc.name, err)
		}
	}
}

func TestStreamIsReadToItsEnd(t *testing.T) {
	stream := append(torture.NewBuilder().File("a", nil).Tar(), make([]byte, 100_000)...)
	r := bytes.NewReader(stream)
	if _, _, err := read(r, layer.DefaultLimits(tib)); err != nil {
		t.Fatal(err)
	}
	if r.Len() != 0 {
		t.Errorf("%d bytes are left", r.Len())
	}
}

// TestFilter extracts the torture stack with containerd behind a Filter.
func TestFilter(t *testing.T) {
	for _, bad := range torture.Bad() {
		f, err := layer.NewFilter(layer.DefaultLimits(tib))
		if err != nil {
			t.Fatal(err)
		}
		_, err = archive.Apply(t.Context(), t.TempDir(), bytes.NewReader(bad.Tar), archive.WithFilter(f.Accept), archive.WithNoSameOwner())
		// containerd cleans "a/.." to "." before it asks, which stays inside.
		if err == nil && bad.Name != "dot dot last" {
			t.Errorf("%s: accepted", bad.Name)
		}
	}
	hdr := &tar.Header{Typeflag: tar.TypeReg, Name: "x", PAXRecords: map[string]string{
		"SCHILY.xattr.user.overlay.opaque": "y", "SCHILY.xattr.trusted.overlay.opaque": "y", "SCHILY.xattr.user.ok": "y", "mtime": "1",
	}}
	f, err := layer.NewFilter(layer.DefaultLimits(tib))
	if err != nil {
		t.Fatal(err)
	}
	if ok, err := f.Accept(hdr); !ok || err != nil {
		t.Fatalf("refused: %v", err)
	}
	if want := map[string]string{"SCHILY.xattr.user.ok": "y", "mtime": "1"}; !reflect.DeepEqual(hdr.PAXRecords, want) {
		t.Errorf("records %v, want %v", hdr.PAXRecords, want)
	}
	if ok, err := f.Accept(&tar.Header{Typeflag: tar.TypeReg, Name: ".wh..wh.plnk"}); ok || err != nil {
		t.Errorf("AUFS metadata: %v %v, want to skip it", ok, err)
	}
}

// FuzzReader checks what every entry of any stream must be.
func FuzzReader(f *testing.F) {
	for _, bad := range torture.Bad() {
		f.Add(bad.Tar)
	}
	f.Add(torture.NewBuilder().File("a", []byte("x"), torture.Xattr("user.x", "y")).Symlink("b", "a").Link("c", "a").Whiteout("d").Opaque("e").Tar())
	f.Add(torture.NewBuilder().SparsePAX("s", 5000, []torture.Extent{{Offset: 512, Data: []byte("x")}}).SparseGNU("t", 5000, []torture.Extent{{Offset: 1, Data: []byte("x")}}).Tar())
	limits := layer.Limits{MaxFileBytes: 1 << 20, MaxTotalBytes: 4 << 20, MaxEntries: 1000, MaxMetadataBytes: 1 << 20}
	f.Fuzz(func(t *testing.T, stream []byte) {
		entries, data, err := read(bytes.NewReader(stream), limits)
		if err != nil && kind.Of(err) != kind.Invalid && kind.Of(err) != kind.Corrupt {
			t.Fatalf("error without a kind: %v", err)
		}
		for i, e := range entries {
			if i < len(data) && int64(len(data[i])) != e.Size {
				t.Fatalf("%q: %d bytes of %d", e.Name, len(data[i]), e.Size)
			}
			for _, name := range []string{e.Name, e.Linkname} {
				if name == e.Linkname && (e.Type != layer.HardLink || e.Whiteout != layer.None) || name == "" {
					continue
				}
				for _, element := range strings.Split(name, "/") {
					if element == "" || element == "." || element == ".." || len(element) > 255 || strings.ContainsRune(element, 0) {
						t.Fatalf("name %q", name)
					}
				}
			}
			if e.Mode&^0o7777 != 0 || e.MTime.Unix() < 0 || e.Size > limits.MaxFileBytes {
				t.Fatalf("%+v", e)
			}
		}
	})
}
