package lvol

import (
	"bytes"
	"errors"
	"testing"

	"github.com/thaw-project/thaw/kind"
)

func fill(t *testing.T, s *Store, name string, off int64, b byte, n int) {
	t.Helper()
	l, err := s.OpenLvol(name, false)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if _, err := l.WriteAt(bytes.Repeat([]byte{b}, n), off); err != nil {
		t.Fatal(err)
	}
}

// firstBytes is the first byte of each cluster.
func firstBytes(t *testing.T, s *Store, name string, cluster int64) (got []byte) {
	t.Helper()
	l, err := s.OpenLvol(name, true)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	for off := int64(0); off < l.SizeBytes(); off += cluster {
		b := make([]byte, 1)
		if _, err := l.ReadAt(b, off); err != nil {
			t.Fatal(err)
		}
		got = append(got, b[0])
	}
	return got
}

func TestSetParent(t *testing.T) {
	const cluster = 64 << 10
	s := newPool(t, 64<<20, cluster, nil)
	must := func(_ Info, err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"a", "b"} {
		must(s.Create(name, 4*cluster))
		fill(t, s, name, 0, name[0], 3*cluster)
		must(s.Snapshot(name, name+"-snap"))
	}
	must(s.Clone("a-snap", "x"))
	fill(t, s, "x", cluster, 'x', cluster)
	l, err := s.OpenLvol("x", false)
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Discard(2*cluster, cluster); err != nil { // hides what a-snap has, and later what b-snap has
		t.Fatal(err)
	}
	check := func(want, parent string) {
		t.Helper()
		if got := firstBytes(t, s, "x", cluster); string(got) != want {
			t.Errorf("x shows %q, want %q", got, want)
		}
		if i, err := s.Get("x"); err != nil || i.Parent != parent {
			t.Errorf("parent is %q, %v, want %q", i.Parent, err, parent)
		}
	}
	check("ax\x00\x00", "a-snap")
	must(s.SetParent("x", "b-snap"))
	check("bx\x00\x00", "b-snap")
	if _, err := s.SetParent("x", "b-snap"); !errors.Is(err, kind.Exists) {
		t.Errorf("the same parent again: %v", err)
	}
	if _, err := s.SetParent("x", "a"); !errors.Is(err, kind.Invalid) {
		t.Errorf("a parent that is no snapshot: %v", err)
	}
	must(s.Create("big", 8*cluster))
	must(s.Snapshot("big", "big-snap"))
	if _, err := s.SetParent("x", "big-snap"); !errors.Is(err, kind.Invalid) {
		t.Errorf("a parent of another size: %v", err)
	}
	// The open handle goes on, and what it writes counts.
	if _, err := l.WriteAt([]byte{'y'}, 3*cluster); err != nil {
		t.Fatal(err)
	}
	check("bx\x00y", "b-snap")
	l.Close()
	s = reopen(t, s)
	check("bx\x00y", "b-snap")
	must(s.SetParent("x", ""))
	check("\x00x\x00y", "")
	if err := s.Delete("b-snap"); err != nil { // it has one clone again: b
		t.Fatal(err)
	}
	s = reopen(t, s)
	check("\x00x\x00y", "")
	if r, err := s.Check(t.Context(), CheckOptions{Scrub: true}); err != nil || len(r.Problems) > 0 {
		t.Errorf("check: %v %v", r, err)
	}
}

func TestCovered(t *testing.T) {
	const cluster = 64 << 10
	s := newPool(t, 64<<20, cluster, nil)
	if _, err := s.Create("a", 8*cluster); err != nil {
		t.Fatal(err)
	}
	fill(t, s, "a", cluster, 1, 2*cluster)
	if _, err := s.Snapshot("a", "snap"); err != nil {
		t.Fatal(err)
	}
	l, err := s.OpenLvol("a", false)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if err := l.Discard(2*cluster, cluster); err != nil { // zeros over what the snapshot has: they count
		t.Fatal(err)
	}
	if _, err := l.WriteAt([]byte{1}, 7*cluster); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		off, length, n int64
		covered        bool
	}{
		{0, 8 * cluster, cluster, false},
		{100, 50, 50, false},
		{cluster, 7 * cluster, 2 * cluster, true},
		{cluster + 1, cluster, cluster, true},
		{3 * cluster, 5 * cluster, 4 * cluster, false},
		{7 * cluster, cluster, cluster, true},
	} {
		n, covered, err := l.Covered(c.off, c.length)
		if err != nil || n != c.n || covered != c.covered {
			t.Errorf("%d bytes at %d: %d %v %v, want %d %v", c.length, c.off, n, covered, err, c.n, c.covered)
		}
	}
	if _, _, err := l.Covered(7*cluster, cluster+1); !errors.Is(err, kind.Invalid) {
		t.Errorf("beyond the end: %v", err)
	}
}

func TestProbe(t *testing.T) {
	s := newPool(t, 64<<20, 64<<10, nil)
	block := make([]byte, ProbeBytes)
	if err := s.dev.ReadAt(block, 0); err != nil {
		t.Fatal(err)
	}
	if id, name, err := Probe(block); err != nil || id != s.UUID() || name != "default" {
		t.Errorf("%s %s %v", id, name, err)
	}
	block[200] ^= 1
	if _, _, err := Probe(block); !errors.Is(err, kind.Corrupt) {
		t.Errorf("a damaged superblock: %v", err)
	}
	if _, _, err := Probe(make([]byte, ProbeBytes)); !errors.Is(err, kind.NotFound) {
		t.Errorf("zeros: %v", err)
	}
}
