package backendtest

import (
	"context"
	"errors"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/lvol"
)

func (s *suite) create() {
	st := s.b().Stat()
	if _, err := uuid.Parse(st.UUID); err != nil || st.ClusterBytes <= 0 || st.TotalClusters <= 0 || st.FreeClusters <= 0 || st.FreeClusters > st.TotalClusters {
		s.t.Errorf("stat: %+v", st)
	}
	if list, err := s.b().List(); err != nil || len(list) != 0 {
		s.t.Fatalf("a fresh store lists %v, %v", list, err)
	}
	i := s.mustCreate("b", s.size)
	if _, err := uuid.Parse(i.UUID); err != nil || i.Name != "b" || i.SizeBytes != s.size || i.Snapshot || i.ReadOnly || i.Parent != "" || len(i.Clones) != 0 || i.Open || i.ClusterBytes <= 0 {
		s.t.Errorf("created %+v", i)
	}
	// A store that cannot tell when says nothing.
	if age := time.Since(i.Created); !i.Created.IsZero() && (age < -time.Minute || age > time.Minute) {
		s.t.Errorf("created at %v", i.Created)
	}
	s.same("get", s.get("b"), i)
	_, err := s.b().Create("b", s.size)
	s.is("create what exists", err, kind.Exists)
	_, err = s.b().Create("b", s.size+s.unit)
	s.is("create what exists with another size", err, kind.Exists)
	s.holds("b", newContent(s.size))

	a, c := s.mustCreate("a", s.unit), s.mustCreate("C", 2*s.unit)
	list, err := s.b().List()
	s.ok("list", err)
	if len(list) != 3 {
		s.t.Fatalf("list: %+v", list)
	}
	for n, want := range []lvol.Info{c, a, s.get("b")} { // in order of name
		s.same("list", list[n], want)
	}
	if a.UUID == i.UUID || a.UUID == c.UUID {
		s.t.Error("two lvols have the same UUID")
	}
	s.mustDelete("a")
	if again := s.mustCreate("a", s.unit); again.UUID == a.UUID {
		s.t.Error("an lvol made again has the UUID of the old one")
	}
	s.absent("d")
}

// same compares what must not change by looking.
func (s *suite) same(what string, have, want lvol.Info) {
	s.t.Helper()
	if have.Name != want.Name || have.UUID != want.UUID || have.SizeBytes != want.SizeBytes || have.Snapshot != want.Snapshot || have.ReadOnly != want.ReadOnly ||
		have.Parent != want.Parent || !slices.Equal(have.Clones, want.Clones) || !have.Created.Equal(want.Created) {
		s.t.Errorf("%s: %+v, want %+v", what, have, want)
	}
}

func (s *suite) names() {
	s.mustCreate("a", s.unit)
	s.mustSnapshot("a", "s")
	ctx := s.t.Context()
	for _, name := range []string{"", "a/b", "a b", "a\x00b", "a\n", "ä", "a@b", "a%41", "a:b", "a*", "../a", strings.Repeat("n", 129), strings.Repeat("n", 70000)} {
		_, err := s.b().Create(name, s.unit)
		s.is("create "+show(name), err, kind.Invalid)
		_, err = s.b().Clone("s", name)
		s.is("clone as "+show(name), err, kind.Invalid)
		_, err = s.b().Snapshot("a", name)
		s.is("snapshot as "+show(name), err, kind.Invalid)
		_, err = s.b().Rename("a", name)
		s.is("rename to "+show(name), err, kind.Invalid)

		none := []kind.Kind{kind.NotFound, kind.Invalid}
		_, err = s.b().Get(name)
		s.is("get "+show(name), err, none...)
		s.is("delete "+show(name), s.b().Delete(name), none...)
		_, err = s.b().Clone(name, "x")
		s.is("clone "+show(name), err, none...)
		_, err = s.b().Snapshot(name, "x")
		s.is("snapshot "+show(name), err, none...)
		_, err = s.b().Rename(name, "x")
		s.is("rename "+show(name), err, none...)
		_, err = s.b().Resize(name, s.unit)
		s.is("resize "+show(name), err, none...)
		_, err = s.b().SetReadOnly(name, true)
		s.is("set read-only "+show(name), err, none...)
		_, err = s.b().Inflate(ctx, name)
		s.is("inflate "+show(name), err, none...)
		_, err = s.b().Decouple(ctx, name)
		s.is("decouple "+show(name), err, kind.NotFound, kind.Invalid, kind.Unsupported)
		_, err = s.b().Map(name, 0, 0)
		s.is("map "+show(name), err, kind.NotFound, kind.Invalid, kind.Unsupported)
		_, err = s.b().OpenLvol(name, true)
		s.is("open "+show(name), err, none...)
	}
	// 63 bytes is what every store takes. Dots and dashes mean nothing.
	long := "." + strings.Repeat("A-z_9.", 10) + "-x"
	for _, name := range []string{long, "-", "0", "global-ba870cf5-6c3c-4cf6-95f3-d3963086b4e9", "a.b", "A"} {
		s.mustCreate(name, s.unit)
		if s.get(name).Name != name {
			s.t.Errorf("%s is called %s", name, s.get(name).Name)
		}
		s.mustSnapshot(name, "of")
		s.mustDelete(name)
		s.mustDelete("of")
	}
	list, err := s.b().List()
	s.ok("list", err)
	if len(list) != 2 {
		s.t.Errorf("there is %+v", list)
	}
}

func show(name string) string {
	if len(name) > 20 {
		name = name[:20] + "..."
	}
	return "\"" + name + "\""
}

func (s *suite) sizes() {
	for _, size := range []int64{0, -1, -s.unit, s.unit + 1, s.unit - 1, 1 << 62} {
		_, err := s.b().Create("a", size)
		s.is("create an odd size", err, kind.Invalid, kind.NoSpace)
		s.absent("a")
	}
	for _, size := range []int64{s.unit, 3 * s.unit, 1 << 40} { // thin: larger than the store
		if i := s.mustCreate("a", size); i.SizeBytes != size {
			s.t.Errorf("an lvol of %d bytes has %d", size, i.SizeBytes)
		}
		d := s.mustOpen("a", false)
		if d.SizeBytes() != size || d.ReadOnly() {
			s.t.Errorf("a device of %d bytes has %d, read-only %t", size, d.SizeBytes(), d.ReadOnly())
		}
		tail := min(5000, size)
		p := randomBytes(uint64(size), tail)
		if _, err := d.WriteAt(p, size-tail); err != nil {
			s.t.Errorf("write the end of %d bytes: %v", size, err)
		}
		got := make([]byte, tail)
		if n, err := d.ReadAt(got, size-tail); int64(n) != tail || mismatch(got, p) >= 0 {
			s.t.Errorf("read the end of %d bytes: %d, %v", size, n, err)
		}
		_, err := d.WriteAt(p, size-tail+1)
		s.is("write past the end", err, kind.Invalid)
		_, err = d.WriteAt(p, -1)
		s.is("write before the start", err, kind.Invalid)
		_, err = d.ReadAt(p, -1)
		s.is("read before the start", err, kind.Invalid)
		s.is("discard past the end", d.Discard(size-512, 1024), kind.Invalid)
		s.close(d)
		s.mustDelete("a")
	}
}

func (s *suite) family() {
	base := s.mustCreate("base", s.size)
	was := s.fill("base", 1)
	snap := s.mustSnapshot("base", "snap")
	if !snap.Snapshot || !snap.ReadOnly || snap.Name != "snap" || snap.SizeBytes != s.size || snap.UUID == base.UUID || !slices.Equal(snap.Clones, []string{"base"}) {
		s.t.Errorf("snapshot %+v", snap)
	}
	if i := s.get("base"); i.Parent != "snap" || i.Snapshot || i.ReadOnly || i.UUID != base.UUID || i.SizeBytes != s.size {
		s.t.Errorf("base after its snapshot: %+v", i)
	}
	s.holds("snap", was)
	s.holds("base", was)
	clone := s.mustClone("snap", "clone")
	if clone.Parent != "snap" || clone.Snapshot || clone.ReadOnly || clone.SizeBytes != s.size || clone.UUID == snap.UUID {
		s.t.Errorf("clone %+v", clone)
	}
	if i := s.get("snap"); !slices.Equal(i.Clones, []string{"base", "clone"}) {
		s.t.Errorf("snapshot with two clones: %+v", i)
	}
	s.holds("clone", was)
	mine := s.fill("clone", 2)
	s.holds("snap", was)
	s.holds("base", was)
	s.holds("clone", mine)
	theirs := s.fill("base", 3)
	s.holds("clone", mine)
	s.holds("snap", was)

	_, err := s.b().Snapshot("base", "snap")
	s.is("snapshot under a name that is taken", err, kind.Exists)
	_, err = s.b().Snapshot("base", "base")
	s.is("snapshot under its own name", err, kind.Exists, kind.Invalid)
	_, err = s.b().Snapshot("snap", "of-snap")
	s.is("snapshot of a snapshot", err, kind.Invalid)
	_, err = s.b().Snapshot("none", "of-none")
	s.is("snapshot of nothing", err, kind.NotFound)
	_, err = s.b().Clone("snap", "clone")
	s.is("clone under a name that is taken", err, kind.Exists)
	_, err = s.b().Clone("snap", "snap")
	s.is("clone under its own name", err, kind.Exists, kind.Invalid)
	_, err = s.b().Clone("base", "of-base")
	s.is("clone of what is no snapshot", err, kind.Invalid)
	_, err = s.b().Clone("none", "of-none")
	s.is("clone of nothing", err, kind.NotFound)

	// A second snapshot comes between.
	s.mustSnapshot("base", "snap2")
	if i := s.get("base"); i.Parent != "snap2" {
		s.t.Errorf("base after its second snapshot: %+v", i)
	}
	if i := s.get("snap2"); i.Parent != "snap" || !slices.Equal(i.Clones, []string{"base"}) {
		s.t.Errorf("second snapshot: %+v", i)
	}
	if i := s.get("snap"); !slices.Equal(i.Clones, []string{"clone", "snap2"}) || i.UUID != snap.UUID {
		s.t.Errorf("first snapshot: %+v", i)
	}
	s.holds("snap2", theirs)
	s.holds("snap", was)
}

func (s *suite) readOnly() {
	before := s.mustCreate("a", s.size)
	was := s.fill("a", 1)
	d := s.mustOpen("a", false)
	_, err := s.b().SetReadOnly("a", true)
	s.is("set read-only what is open", err, kind.InUse)
	s.close(d)
	i := s.mustReadOnly("a")
	if !i.ReadOnly || i.Snapshot || i.UUID != before.UUID {
		s.t.Errorf("set read-only: %+v", i)
	}
	s.mustReadOnly("a")
	s.same("get", s.get("a"), i)
	_, err = s.b().OpenLvol("a", false)
	s.is("open a read-only lvol for writing", err, kind.ReadOnly)
	d = s.mustOpen("a", true)
	if !d.ReadOnly() {
		s.t.Error("its device can be written")
	}
	_, err = d.WriteAt(make([]byte, 512), 0)
	s.is("write", err, kind.ReadOnly)
	s.is("discard", d.Discard(0, s.unit), kind.ReadOnly)
	s.is("write zeroes", d.WriteZeroes(0, s.unit), kind.ReadOnly)
	if err := d.Flush(); err != nil {
		s.t.Errorf("flush of a read-only device: %v", err)
	}
	s.mustReadOnly("a") // no change, so it may be open
	was.check(s.t, "a", d)
	s.close(d)
	_, err = s.b().Resize("a", 2*s.size)
	s.is("resize a read-only lvol", err, kind.ReadOnly)
	_, err = s.b().SetReadOnly("none", true)
	s.is("set read-only nothing", err, kind.NotFound)

	switch i, err := s.b().SetReadOnly("a", false); {
	case errors.Is(err, kind.Unsupported):
		if !s.get("a").ReadOnly {
			s.t.Error("it is writable")
		}
	case err != nil || i.ReadOnly:
		s.t.Errorf("set writable: %+v, %v", i, err)
	default:
		was = s.fill("a", 2)
		s.holds("a", was)
	}

	s.mustCreate("b", s.size)
	if i, err := s.b().SetReadOnly("b", false); err != nil || i.ReadOnly { // no change
		s.t.Errorf("set writable what is: %+v, %v", i, err)
	}
	s.mustSnapshot("b", "snap")
	s.mustReadOnly("snap")
	_, err = s.b().SetReadOnly("snap", false)
	s.is("set a snapshot writable", err, kind.Invalid)
	_, err = s.b().OpenLvol("snap", false)
	s.is("open a snapshot for writing", err, kind.ReadOnly)
	_, err = s.b().Resize("snap", 2*s.size)
	s.is("resize a snapshot", err, kind.ReadOnly)

	// A soldier: a read-only clone, which shows all that is below.
	was = s.fill("b", 4)
	s.mustSnapshot("b", "block")
	s.mustClone("block", "soldier")
	if i := s.mustReadOnly("soldier"); i.Parent != "block" || !i.ReadOnly {
		s.t.Errorf("soldier %+v", i)
	}
	s.holds("soldier", was)
}

func (s *suite) deletion() {
	s.is("delete nothing", s.b().Delete("none"), kind.NotFound)
	s.mustCreate("a", s.size)
	d := s.mustOpen("a", true)
	s.is("delete what is open", s.b().Delete("a"), kind.InUse)
	newContent(s.size).check(s.t, "a", d)
	s.close(d)
	s.mustDelete("a")
	s.absent("a")
	s.is("delete twice", s.b().Delete("a"), kind.NotFound)

	s.mustCreate("a", s.size)
	lowest := s.fill("a", 1)
	s.mustSnapshot("a", "s1")
	c := lowest.clone()
	d = s.mustOpen("a", false)
	c.write(s.t, d, randomBytes(2, 100_000), 12345)
	s.close(d)
	middle := c.clone()
	s.mustSnapshot("a", "s2")
	d = s.mustOpen("a", false)
	c.write(s.t, d, randomBytes(3, 100_000), 60_000)
	s.close(d)
	s.mustClone("s2", "b")
	s.is("delete a snapshot with two clones", s.b().Delete("s2"), kind.InUse)
	s.holds("b", middle)
	s.mustDelete("b")

	// With one clone, what it owned is the clone's.
	s.mustDelete("s2")
	if i := s.get("a"); i.Parent != "s1" {
		s.t.Errorf("a without its snapshot: %+v", i)
	}
	s.holds("a", c)
	s.holds("s1", lowest)
	s.mustDelete("s1")
	if i := s.get("a"); i.Parent != "" {
		s.t.Errorf("a without snapshots: %+v", i)
	}
	s.holds("a", c)
	s.mustDelete("a")
	s.mustCreate("a", s.size)
	s.holds("a", newContent(s.size)) // nothing of the old one shows
}

func (s *suite) rename() {
	i := s.mustCreate("a", s.size)
	was := s.fill("a", 1)
	s.mustCreate("taken", s.unit)
	_, err := s.b().Rename("a", "taken")
	s.is("rename to a name that is taken", err, kind.Exists)
	_, err = s.b().Rename("a", "a")
	s.is("rename to its own name", err, kind.Exists)
	_, err = s.b().Rename("none", "x")
	s.is("rename nothing", err, kind.NotFound)
	r, err := s.b().Rename("a", "b")
	s.ok("rename", err)
	if r.Name != "b" || r.UUID != i.UUID || r.SizeBytes != s.size {
		s.t.Errorf("renamed %+v", r)
	}
	s.absent("a")
	s.holds("b", was)
	s.mustSnapshot("b", "snap")
	s.mustClone("snap", "c")
	r, err = s.b().Rename("snap", "block")
	s.ok("rename a snapshot", err)
	if r.Name != "block" || !r.Snapshot || !slices.Equal(r.Clones, []string{"b", "c"}) || s.get("c").Parent != "block" || s.get("b").Parent != "block" {
		s.t.Errorf("renamed snapshot %+v, clone %+v", r, s.get("c"))
	}
	s.holds("c", was)
	s.mustCreate("a", s.unit) // the old name is free
	s.mustCreate("snap", s.unit)
}

func (s *suite) resize() {
	i := s.mustCreate("a", s.size)
	c := s.fill("a", 1)
	for _, size := range []int64{0, -s.unit, s.size + 1} {
		_, err := s.b().Resize("a", size)
		s.is("resize to an odd size", err, kind.Invalid)
	}
	_, err := s.b().Resize("none", s.size)
	s.is("resize nothing", err, kind.NotFound)
	to := func(size int64) {
		s.t.Helper()
		r, err := s.b().Resize("a", size)
		s.ok("resize", err)
		if r.SizeBytes != size || r.UUID != i.UUID {
			s.t.Errorf("resized to %d: %+v", size, r)
		}
		c = append(c[:min(size, int64(len(c)))], make([]byte, max(0, size-int64(len(c))))...)
		s.holds("a", c)
	}
	to(s.size)
	to(2 * s.size)
	to(s.unit)
	to(s.size) // what was cut off is gone
	s.mustSnapshot("a", "snap")
	before := c.clone()
	to(2 * s.size)
	to(s.unit)
	to(s.size)
	s.holds("snap", before)
}

func (s *suite) inflate() {
	s.mustCreate("a", s.size)
	was := s.fill("a", 1)
	s.mustSnapshot("a", "s1")
	i := s.mustClone("s1", "b")
	d := s.mustOpen("b", false)
	c := was.clone()
	c.write(s.t, d, randomBytes(2, 70_000), 1000)
	s.close(d)
	r, err := s.b().Inflate(s.t.Context(), "b")
	s.ok("inflate", err)
	if r.Parent != "" || r.UUID != i.UUID || r.SizeBytes != s.size {
		s.t.Errorf("inflated %+v", r)
	}
	s.holds("b", c)
	if i := s.get("s1"); !slices.Equal(i.Clones, []string{"a"}) {
		s.t.Errorf("its parent still has it: %+v", i)
	}
	_, err = s.b().Inflate(s.t.Context(), "b") // again
	s.ok("inflate again", err)
	s.mustDelete("a")
	s.mustDelete("s1")
	s.holds("b", c)
	_, err = s.b().Inflate(s.t.Context(), "none")
	s.is("inflate nothing", err, kind.NotFound)
}

func (s *suite) decouple() {
	s.mustCreate("a", s.size)
	c := s.fill("a", 1)
	s.mustSnapshot("a", "s1")
	d := s.mustOpen("a", false)
	c.write(s.t, d, randomBytes(2, 300_000), 1000)
	s.close(d)
	s.mustSnapshot("a", "s2")
	i := s.mustClone("s2", "b")
	d = s.mustOpen("b", false)
	mine := c.clone()
	mine.write(s.t, d, randomBytes(3, 70_000), 200_000)
	s.close(d)
	r, err := s.b().Decouple(s.t.Context(), "b")
	if errors.Is(err, kind.Unsupported) {
		return
	}
	s.ok("decouple", err)
	if r.Parent != "s1" || r.UUID != i.UUID {
		s.t.Errorf("decoupled %+v", r)
	}
	s.holds("b", mine)
	s.mustDelete("a")
	s.mustDelete("s2")
	s.holds("b", mine)
	r, err = s.b().Decouple(s.t.Context(), "b")
	s.ok("decouple from the last", err)
	if r.Parent != "" {
		s.t.Errorf("decoupled from all: %+v", r)
	}
	_, err = s.b().Decouple(s.t.Context(), "b")
	s.is("decouple what has no parent", err, kind.Invalid)
	s.mustDelete("s1")
	s.holds("b", mine)
}

// blockMap checks that a map is of the bytes, where a store has maps.
func (s *suite) blockMap() {
	s.mustCreate("a", 8*s.size)
	d := s.mustOpen("a", false)
	c := newContent(8 * s.size)
	c.write(s.t, d, randomBytes(1, 10_000), s.size+100)
	s.close(d)
	_, err := s.b().Map("a", 0, 0)
	if errors.Is(err, kind.Unsupported) {
		return
	}
	s.is("map of what can be written", err, kind.Invalid)
	snap := s.mustSnapshot("a", "s1")
	d = s.mustOpen("a", false)
	c.write(s.t, d, randomBytes(2, 10_000), 6*s.size)
	s.close(d)
	top := s.mustSnapshot("a", "s2")
	_, err = s.b().Map("none", 0, 0)
	s.is("map of nothing", err, kind.NotFound)
	_, err = s.b().Map("s2", 1, 0)
	s.is("map at an odd offset", err, kind.Invalid)
	_, err = s.b().Map("s2", 8*s.size, 0)
	s.is("map at the end", err, kind.Invalid)

	owners := map[string]bool{}
	at := int64(0)
	for at < 8*s.size {
		m, err := s.b().Map("s2", at, 1)
		s.ok("map", err)
		if m.UUID != top.UUID || m.SizeBytes != 8*s.size || m.ClusterBytes <= 0 || len(m.Runs) != 1 || m.Runs[0].OffsetBytes != at || m.Runs[0].LengthBytes <= 0 || m.NextBytes != at+m.Runs[0].LengthBytes {
			s.t.Fatalf("map at %d: %+v", at, m)
		}
		r := m.Runs[0]
		if !r.Data && mismatch(c[at:m.NextBytes], make([]byte, r.LengthBytes)) >= 0 {
			s.t.Errorf("the run at %d has data: %+v", at, r)
		}
		if r.Owner != [16]byte{} {
			owners[uuid.UUID(r.Owner).String()] = true
		}
		at = m.NextBytes
	}
	for o := range owners {
		if o != snap.UUID && o != top.UUID {
			s.t.Errorf("the map names %s, which is no snapshot of it", o)
		}
	}
}

func (s *suite) restart() {
	s.mustCreate("a", s.size)
	was := s.fill("a", 1)
	s.mustSnapshot("a", "snap")
	s.mustClone("snap", "soldier")
	clone := s.mustReadOnly("soldier")
	d := s.mustOpen("a", false)
	c := was.clone()
	c.write(s.t, d, randomBytes(2, 77_777), 999)
	s.ok("flush", d.Flush())
	st := s.b().Stat()
	snap, base := s.get("snap"), s.get("a")
	s.f.Restart(s.t) // with a device open
	if now := s.b().Stat(); now.UUID != st.UUID || now.ClusterBytes != st.ClusterBytes || now.TotalClusters != st.TotalClusters {
		s.t.Errorf("stat after a restart: %+v, before %+v", now, st)
	}
	s.same("base", s.get("a"), base)
	s.same("snapshot", s.get("snap"), snap)
	s.same("clone", s.get("soldier"), clone)
	s.holds("a", c)
	s.holds("snap", was)
	s.holds("soldier", was)
	s.eventually("nothing is open any more", func() error { return s.b().Delete("a") })
	ctx, cancel := context.WithTimeout(s.t.Context(), time.Minute)
	defer cancel()
	switch r, err := s.b().Check(ctx, lvol.CheckOptions{Scrub: true}); {
	case errors.Is(err, kind.Unsupported):
	case err != nil || len(r.Problems) > 0 || r.More > 0:
		s.t.Errorf("check: %+v, %v", r, err)
	}
}
