package lvol

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/lvol/device"
	"github.com/thaw-project/thaw/target/bdev"
)

var _ bdev.Device = (*Lvol)(nil)

// fastDir is a directory in memory where there is one: tests whose device is not a
// file need no disk to sync meta.db to.
func fastDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "lvol-test-")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// newPool formats and opens a pool in a fresh directory.
func newPool(t testing.TB, capacity, cluster int64, change func(*Options)) *Store {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "pool")
	if err := Create(CreateOptions{Dir: dir, CapacityBytes: capacity, ClusterBytes: cluster}); err != nil {
		t.Fatal(err)
	}
	return openPool(t, dir, change)
}

func openPool(t testing.TB, dir string, change func(*Options)) *Store {
	t.Helper()
	o := Options{Dir: dir, FlushInterval: -1, BallastBytes: 1 << 20}
	if change != nil {
		change(&o)
	}
	s, err := Open(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func reopen(t testing.TB, s *Store) *Store {
	t.Helper()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	o := s.o
	n, err := Open(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { n.Close() })
	return n
}

// crashPool drops the store as SIGKILL would: nothing is flushed, closed or removed
// that the next Open could rely on.
func kill(s *Store) {
	if s.flusher != nil {
		s.flusher.stop()
	}
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	s.closeFiles()
}

func must[T any](t testing.TB) func(v T, err error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func ok(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func wantKind(t testing.TB, k kind.Kind, err error) {
	t.Helper()
	if kind.Of(err) != k {
		t.Fatalf("got %v (%q), want kind %q", err, kind.Of(err), k)
	}
}

func openLvol(t testing.TB, s *Store, name string, ro bool) *Lvol {
	t.Helper()
	l, err := s.OpenLvol(name, ro)
	ok(t, err)
	return l
}

func write(t testing.TB, l *Lvol, off int64, p []byte) {
	t.Helper()
	if n, err := l.WriteAt(p, off); err != nil || n != len(p) {
		t.Fatalf("write %d at %d: %d, %v", len(p), off, n, err)
	}
}

func read(t testing.TB, l *Lvol, off, n int64) []byte {
	t.Helper()
	p := make([]byte, n)
	if _, err := l.ReadAt(p, off); err != nil && err != io.EOF {
		t.Fatalf("read %d at %d: %v", n, off, err)
	}
	return p
}

func pattern(seed uint64, n int) []byte {
	p := make([]byte, n)
	r := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), byte(seed >> 16), 1})
	r.Read(p)
	return p
}

// wantClean fails unless Check with scrub finds nothing.
func wantClean(t testing.TB, s *Store) {
	t.Helper()
	r, err := s.Check(context.Background(), CheckOptions{Scrub: true})
	ok(t, err)
	for _, p := range r.Problems {
		t.Errorf("check: %+v", p)
	}
	if t.Failed() {
		t.FailNow()
	}
}

func TestFirstUse(t *testing.T) {
	s := newPool(t, 64<<20, 0, nil)
	must[Info](t)(s.Create("a", 8<<20))
	l := openLvol(t, s, "a", false)
	p := pattern(1, 300000)
	write(t, l, 12345, p)
	if got := read(t, l, 12345, int64(len(p))); !bytes.Equal(got, p) {
		t.Fatal("read back differs")
	}
	if got := read(t, l, 0, 12345); !bytes.Equal(got, make([]byte, 12345)) {
		t.Fatal("not zeros before")
	}
	snap := must[Info](t)(s.Snapshot("a", "snap"))
	if !snap.Snapshot || snap.AllocatedClusters != 5 {
		t.Fatalf("%+v", snap)
	}
	write(t, l, 20000, []byte("hello"))
	c := must[Info](t)(s.Clone("snap", "c"))
	if c.Parent != "snap" || c.SizeBytes != 8<<20 {
		t.Fatalf("%+v", c)
	}
	lc := openLvol(t, s, "c", false)
	if got := read(t, lc, 12345, int64(len(p))); !bytes.Equal(got, p) {
		t.Fatal("clone differs")
	}
	wantKind(t, kind.InUse, s.Delete("c"))
	ok(t, lc.Close())
	wantKind(t, kind.InUse, s.Delete("snap"))
	ok(t, s.Delete("c"))
	copy(p[20000-12345:], "hello")
	s = reopen(t, s)
	l = openLvol(t, s, "a", false)
	if got := read(t, l, 12345, int64(len(p))); !bytes.Equal(got, p) {
		t.Fatal("differs after reopen")
	}
	wantClean(t, s)
	ok(t, s.Delete("snap"))
	if got := read(t, l, 12345, int64(len(p))); !bytes.Equal(got, p) {
		t.Fatal("differs after the snapshot's end")
	}
	write(t, l, 30000, []byte("again"))
	copy(p[30000-12345:], "again")
	wantClean(t, s)
	dir := s.o.Dir
	kill(s)
	s = openPool(t, dir, nil)
	l = openLvol(t, s, "a", false)
	if got := read(t, l, 12345, int64(len(p))); !bytes.Equal(got, p) {
		t.Fatal("acknowledged write lost in a kill")
	}
	wantClean(t, s)
	ok(t, l.Close())
	ok(t, s.Delete("a"))
	if st := s.Stat(); st.FreeClusters != st.TotalClusters {
		t.Fatalf("%+v", st)
	}
	wantClean(t, s)
}

func TestErrorKinds(t *testing.T) {
	s := newPool(t, 16<<20, 0, nil)
	must[Info](t)(s.Create("a", 1<<20))
	_, err := s.Create("a", 1<<20)
	wantKind(t, kind.Exists, err)
	_, err = s.Create("b/", 1<<20)
	wantKind(t, kind.Invalid, err)
	_, err = s.Create("b", 1000)
	wantKind(t, kind.Invalid, err)
	_, err = s.Clone("a", "b")
	wantKind(t, kind.Invalid, err)
	_, err = s.Clone("x", "b")
	wantKind(t, kind.NotFound, err)
	_, err = s.Snapshot("x", "b")
	wantKind(t, kind.NotFound, err)
	_, err = s.Snapshot("a", "a")
	wantKind(t, kind.Exists, err)
	must[Info](t)(s.Snapshot("a", "s"))
	_, err = s.Snapshot("s", "b")
	wantKind(t, kind.Invalid, err)
	_, err = s.OpenLvol("s", false)
	wantKind(t, kind.ReadOnly, err)
	_, err = s.OpenLvol("x", true)
	wantKind(t, kind.NotFound, err)
	_, err = s.Get("x")
	wantKind(t, kind.NotFound, err)
	wantKind(t, kind.NotFound, s.Delete("x"))
	_, err = s.Rename("x", "y")
	wantKind(t, kind.NotFound, err)
	_, err = s.Rename("a", "s")
	wantKind(t, kind.Exists, err)
	_, err = s.Resize("s", 2<<20)
	wantKind(t, kind.ReadOnly, err)
	_, err = s.SetReadOnly("s", false)
	wantKind(t, kind.Invalid, err)
	must[Info](t)(s.Create("lone", 1<<20))
	_, err = s.Decouple(context.Background(), "lone")
	wantKind(t, kind.Invalid, err)
	l := openLvol(t, s, "a", false)
	_, err = s.SetReadOnly("a", true)
	wantKind(t, kind.InUse, err)
	_, err = l.WriteAt(make([]byte, 2), 1<<20-1)
	wantKind(t, kind.Invalid, err)
	if n, err := l.ReadAt(make([]byte, 2), 1<<20-1); n != 1 || err != io.EOF {
		t.Fatal(n, err)
	}
	if n, err := l.ReadAt(make([]byte, 2), 1<<20); n != 0 || err != io.EOF {
		t.Fatal(n, err)
	}
	wantKind(t, kind.Invalid, l.Discard(0, 1<<20+1))
	ro := openLvol(t, s, "a", true)
	_, err = ro.WriteAt([]byte("x"), 0)
	wantKind(t, kind.ReadOnly, err)
	wantKind(t, kind.ReadOnly, ro.Discard(0, 512))
	ok(t, l.Close())
	ok(t, ro.Close())
	_, err = l.ReadAt(make([]byte, 1), 0)
	wantKind(t, kind.Unavailable, err)
	i := must[Info](t)(s.SetReadOnly("a", true))
	if !i.ReadOnly {
		t.Fatalf("%+v", i)
	}
	_, err = s.OpenLvol("a", false)
	wantKind(t, kind.ReadOnly, err)
	_, err = Open(Options{Dir: s.o.Dir})
	wantKind(t, kind.InUse, err)
	if !bytes.Contains([]byte(err.Error()), []byte(s.o.Dir)) {
		t.Fatalf("%v does not name the path", err)
	}
	wantKind(t, kind.Exists, func() error {
		s.Close()
		return Create(CreateOptions{Dir: s.o.Dir, CapacityBytes: 1 << 20})
	}())
	_, err = s.Get("a")
	if err != nil {
		t.Fatal("Get after Close shows what was:", err)
	}
	_, err = s.Create("z", 1<<20)
	wantKind(t, kind.Unavailable, err)
	_, err = s.OpenLvol("a", true)
	wantKind(t, kind.Unavailable, err)
}

func TestCreateOnDevice(t *testing.T) {
	dir := t.TempDir()
	dev := filepath.Join(dir, "disk")
	ok(t, os.WriteFile(dev, nil, 0o600))
	ok(t, os.Truncate(dev, 8<<20))
	ok(t, Create(CreateOptions{Dir: dir + "/a", Device: dev}))
	s := openPool(t, dir+"/a", nil)
	if st := s.Stat(); st.TotalClusters != 127 {
		t.Fatalf("%+v", st)
	}
	_, err := device.OpenFile(dev, false)
	wantKind(t, kind.InUse, err)
	ok(t, s.Close())
	wantKind(t, kind.Exists, Create(CreateOptions{Dir: dir + "/b", Device: dev}))
	ok(t, Create(CreateOptions{Dir: dir + "/b", Device: dev, Force: true}))
	_, err = Open(Options{Dir: dir + "/a"})
	wantKind(t, kind.Corrupt, err)
}

func TestNoSpaceInPool(t *testing.T) {
	s := newPool(t, 1<<20, 0, nil) // 15 clusters
	must[Info](t)(s.Create("a", 4<<20))
	must[Info](t)(s.Create("b", 4<<20))
	a, b := openLvol(t, s, "a", false), openLvol(t, s, "b", false)
	write(t, b, 0, pattern(1, 64<<10))
	n, err := a.WriteAt(pattern(2, 2<<20), 0)
	wantKind(t, kind.NoSpace, err)
	if n != 14*64<<10 {
		t.Fatal(n)
	}
	write(t, b, 100, []byte("in place goes on"))
	_, err = b.WriteAt([]byte("x"), 1<<20)
	wantKind(t, kind.NoSpace, err)
	if !bytes.Equal(read(t, a, 0, 14*64<<10), pattern(2, 2<<20)[:14*64<<10]) {
		t.Fatal("reads differ")
	}
	ok(t, a.Discard(0, 64<<10)) // free only after a flush, which the next write does
	write(t, b, 1<<20, []byte("x"))
	ok(t, a.Close())
	ok(t, s.Delete("a"))
	write(t, b, 2<<20, pattern(3, 1<<19))
	wantClean(t, s)
}

func TestSequentialIsContiguous(t *testing.T) {
	s := newPool(t, 64<<20, 0, nil)
	var ls []*Lvol
	for i := range 3 {
		must[Info](t)(s.Create(fmt.Sprint("l", i), 4<<20))
		ls = append(ls, openLvol(t, s, fmt.Sprint("l", i), false))
	}
	for off := int64(0); off < 4<<20; off += 64 << 10 {
		for _, l := range ls {
			write(t, l, off, pattern(uint64(off), 64<<10))
		}
	}
	for _, l := range ls {
		pg := l.v.root.Load().page(0)
		for i := 1; i < 64; i++ {
			if pg.load(i).phys() != pg.load(i-1).phys()+1 {
				t.Fatalf("cluster %d of %s is not behind the one before", i, l.v.name)
			}
		}
	}
}

func TestContextStopsInflate(t *testing.T) {
	s := newPool(t, 64<<20, 0, nil)
	must[Info](t)(s.Create("a", 32<<20))
	ctx, cancel := context.WithCancelCause(context.Background())
	cancel(errors.New("enough"))
	_, err := s.Inflate(ctx, "a")
	wantKind(t, kind.Canceled, err)
	i := must[Info](t)(s.Inflate(context.Background(), "a"))
	if i.AllocatedClusters != 512 {
		t.Fatalf("%+v", i)
	}
	wantClean(t, reopen(t, s))
}
