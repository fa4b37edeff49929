package choose

import (
	"context"
	"errors"
	"strings"
	"testing"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/node/present"
	"github.com/thaw-project/thaw/node/present/presenttest"
	"github.com/thaw-project/thaw/target/bdev"
)

var (
	no     = kind.Errorf(kind.Unsupported, "the kernel has none")
	remote = present.Source{Kind: present.SourceLvol, Lvol: "r", Target: "store"}
	local  = present.Source{Kind: present.SourceLvol, Lvol: "l"}
	qcow   = present.Source{Kind: present.SourceQcow2, Lvol: "r", Target: "store", Path: "/q"}
)

func names(list []Decision) string {
	var s []string
	for _, d := range list {
		s = append(s, d.Name)
	}
	return strings.Join(s, " ")
}

func TestDecide(t *testing.T) {
	for _, c := range []struct {
		unusable map[string]error
		force    string
		want     string // for remote, local, writable
		kind     kind.Kind
	}{
		{map[string]error{Fabrics: nil, Ublk: nil, NBD: nil, Fuse: nil}, "", "nvme-fabrics ublk ublk", ""},
		{map[string]error{Fabrics: nil, Ublk: no, NBD: nil, Fuse: nil}, "", "nvme-fabrics fuse fuse", ""},
		{map[string]error{Fabrics: no, Ublk: no, NBD: nil, Fuse: nil}, "", "fuse fuse fuse", ""},
		{map[string]error{Fabrics: no, Ublk: no, NBD: nil, Fuse: no}, "", "nbd nbd nbd", ""},
		{map[string]error{Fuse: nil}, "", "fuse fuse fuse", ""},
		{map[string]error{Fabrics: nil, Ublk: no, NBD: no, Fuse: no}, "", "nvme-fabrics  ", kind.Unsupported},
		{map[string]error{Fabrics: nil, Ublk: nil, NBD: nil, Fuse: nil}, NBD, "nbd nbd nbd", ""},
		{map[string]error{Fabrics: nil, Ublk: nil, NBD: nil, Fuse: nil}, Fabrics, "nvme-fabrics ublk ublk", ""},
		{map[string]error{Fabrics: no, Ublk: nil, NBD: nil, Fuse: nil}, Fabrics, "", kind.Unsupported},
		{map[string]error{Fuse: nil}, Ublk, "", kind.Unsupported},
		{map[string]error{Fuse: nil}, "floppy", "", kind.Invalid},
	} {
		got, err := Decide(c.unusable, c.force)
		if names(got) != c.want || kind.Of(err) != c.kind {
			t.Errorf("%v, force %q: %q, %v; want %q, %q", c.unusable, c.force, names(got), err, c.want, c.kind)
		}
		for _, d := range got {
			if d.Name != "" && d.Why == "" {
				t.Errorf("%+v has no reason", d)
			}
		}
	}
	got, _ := Decide(map[string]error{Fabrics: no, Fuse: nil}, "")
	if r := got[0].Rejected; len(r) != 2 || r[0].Name != Fabrics || r[0].Why != no.Error() || r[1].Name != Ublk {
		t.Errorf("rejected: %+v", r)
	}
}

type null struct{ bdev.Device }

func (null) SizeBytes() int64 { return 4096 }
func (null) Close() error     { return nil }

// chosen adds what choose wants to presenttest's presenter.
type chosen struct {
	*presenttest.Presenter
	closed, torn bool
	fail         error // of Present
}

func (c *chosen) Close() error { c.closed = true; return nil }
func (c *chosen) Teardown(context.Context) error {
	if list, _ := c.List(context.Background()); len(list) > 0 {
		return kind.Errorf(kind.InUse, "has disks")
	}
	c.torn = true
	return nil
}
func (c *chosen) Present(ctx context.Context, id string, s present.Source, readOnly bool) (present.Disk, error) {
	if c.fail != nil {
		return present.Disk{}, c.fail
	}
	return c.Presenter.Present(ctx, id, s, readOnly)
}

func newChosen() *chosen {
	return &chosen{Presenter: presenttest.New(func(present.Source, bool) (bdev.Device, error) { return null{}, nil })}
}

func ids(t *testing.T, p present.Presenter) string {
	t.Helper()
	list, err := p.List(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	var s []string
	for _, d := range list {
		s = append(s, d.ID)
	}
	return strings.Join(s, " ")
}

func TestRouting(t *testing.T) {
	ctx := context.Background()
	fabrics, fuse, nbd := newChosen(), newChosen(), newChosen()
	candidates := []Candidate{{Name: Fuse, Presenter: fuse}, {Name: Fabrics, Presenter: fabrics}, {Name: Ublk, Unusable: no}, {Name: NBD, Presenter: nbd}}
	p, err := New(ctx, Options{Candidates: candidates})
	if err != nil {
		t.Fatal(err)
	}
	present := func(id string, s present.Source, readOnly bool) {
		t.Helper()
		if _, err := p.Present(ctx, id, s, readOnly); err != nil {
			t.Fatal(err)
		}
	}
	present("c", remote, true)
	present("b", local, true)
	present("a", qcow, false)
	if ids(t, fabrics) != "c" || ids(t, fuse) != "a b" || ids(t, p) != "a b c" {
		t.Errorf("fabrics %q, fuse %q, all %q", ids(t, fabrics), ids(t, fuse), ids(t, p))
	}
	// One id is one disk, whoever shows it.
	if _, err := p.Present(ctx, "c", local, true); !errors.Is(err, kind.Exists) {
		t.Errorf("another source: %v", err)
	}
	// The next process forces another: what is there stays where it is.
	if p, err = New(ctx, Options{Candidates: candidates, Force: NBD}); err != nil {
		t.Fatal(err)
	}
	present("c", remote, true)
	present("d", remote, true)
	if ids(t, fabrics) != "c" || ids(t, nbd) != "d" {
		t.Errorf("fabrics %q, nbd %q", ids(t, fabrics), ids(t, nbd))
	}
	fuse.SetBusy("a", true)
	if err := p.Withdraw(ctx, "a"); !errors.Is(err, kind.InUse) {
		t.Errorf("in use: %v", err)
	}
	fuse.SetBusy("a", false)
	for _, id := range []string{"a", "b", "c", "d", "never"} {
		if err := p.Withdraw(ctx, id); err != nil {
			t.Error(err)
		}
	}
	if ids(t, p) != "" {
		t.Errorf("left: %s", ids(t, p))
	}
	// After a withdrawal it is chosen again.
	present("c", remote, true)
	if ids(t, nbd) != "c" {
		t.Errorf("nbd %q", ids(t, nbd))
	}
	if err := p.Teardown(ctx); !errors.Is(err, kind.InUse) {
		t.Errorf("teardown: %v", err)
	}
	if err := p.Withdraw(ctx, "c"); err != nil {
		t.Error(err)
	}
	if err := p.Teardown(ctx); err != nil || !fuse.torn || !fabrics.torn || !nbd.torn {
		t.Errorf("teardown: %v", err)
	}
}

func TestNextBest(t *testing.T) {
	ctx := context.Background()
	fabrics, fuse := newChosen(), newChosen()
	candidates := []Candidate{{Name: Fuse, Presenter: fuse}, {Name: Fabrics, Presenter: fabrics}}
	p, err := New(ctx, Options{Candidates: candidates})
	if err != nil {
		t.Fatal(err)
	}
	fabrics.fail = kind.Errorf(kind.Unavailable, "network")
	if _, err := p.Present(ctx, "a", remote, true); !errors.Is(err, kind.Unavailable) || ids(t, fuse) != "" {
		t.Errorf("a network that is down is no reason for another presentation: %v", err)
	}
	fabrics.fail = no
	if _, err := p.Present(ctx, "a", remote, true); err != nil || ids(t, fuse) != "a" {
		t.Errorf("%v, fuse %q", err, ids(t, fuse))
	}
	if p, err = New(ctx, Options{Candidates: candidates, Force: Fabrics}); err != nil {
		t.Fatal(err)
	}
	if _, err := p.Present(ctx, "b", remote, true); !errors.Is(err, kind.Unsupported) {
		t.Errorf("forced: %v", err)
	}
	if err := p.Close(); err != nil || !fuse.closed || !fabrics.closed {
		t.Errorf("close: %v", err)
	}
	if _, err := New(ctx, Options{Candidates: candidates, Force: Ublk}); !errors.Is(err, kind.Unsupported) || !strings.Contains(err.Error(), "forces") {
		t.Errorf("forcing what is not there: %v", err)
	}
	if _, err := New(ctx, Options{Candidates: []Candidate{{Name: Fuse}}}); !errors.Is(err, kind.Invalid) {
		t.Errorf("%v", err)
	}
	twice := newChosen()
	fuse.Presenter.Present(ctx, "x", local, true)
	twice.Presenter.Present(ctx, "x", local, true)
	if _, err := New(ctx, Options{Candidates: []Candidate{{Name: Fuse, Presenter: fuse}, {Name: NBD, Presenter: twice}}}); !errors.Is(err, kind.Corrupt) {
		t.Errorf("one disk twice: %v", err)
	}
}
