package backendtest

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"sync"
	"time"

	"github.com/google/uuid"

	"github.com/thaw-project/thaw/attacher"
	"github.com/thaw-project/thaw/attacher/identity"
	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/target/bdev"
)

// restore is what an attacher does first.
func (s *suite) restore(exports ...attacher.Export) {
	s.t.Helper()
	s.ok("restore", s.f.Exporter.Restore(exports))
}

func (s *suite) exportOf(node, name string, nsid uint32, writable bool) attacher.Export {
	s.t.Helper()
	transports := s.f.Exporter.Transports()
	if len(transports) == 0 {
		s.t.Fatal("the exporter has no transport")
	}
	return attacher.Export{Node: node, Block: name, NSID: nsid, Transport: transports[0], Writable: writable}
}

func (s *suite) mustExport(e attacher.Export) attacher.Exported {
	s.t.Helper()
	x, err := s.f.Exporter.Export(e, "127.0.0.1")
	s.ok("export "+e.Block+" to "+e.Node, err)
	return x
}

func (s *suite) mustWithdraw(e attacher.Export) {
	s.t.Helper()
	s.ok("withdraw "+e.Block+" from "+e.Node, s.f.Exporter.Withdraw(e))
}

// dial opens an export. What was just shown may take a moment until a node sees it.
func (s *suite) dial(node string, x attacher.Exported) (bdev.Device, error) {
	ctx, cancel := context.WithTimeout(s.t.Context(), 20*time.Second)
	defer cancel()
	return s.f.Open(ctx, node, x)
}

func (s *suite) mustDial(node string, x attacher.Exported) bdev.Device {
	s.t.Helper()
	d, err := s.dial(node, x)
	s.ok("open as "+node, err)
	return d
}

// soldier makes a block with a soldier over it, as conversions do.
func (s *suite) soldier(prefix string, seed uint64) content {
	s.t.Helper()
	s.mustCreate(prefix+"-work", s.size)
	c := s.fill(prefix+"-work", seed)
	s.mustSnapshot(prefix+"-work", prefix+"-block")
	s.mustDelete(prefix + "-work")
	s.mustClone(prefix+"-block", prefix)
	s.mustReadOnly(prefix)
	return c
}

func (s *suite) export() {
	s.restore()
	c := s.soldier("a", 1)
	_, err := s.f.Exporter.Export(s.exportOf("node-1", "none", 1, false), "127.0.0.1")
	s.is("export nothing", err, kind.NotFound)
	e := s.exportOf("node-1", "a", 1, false)
	x := s.mustExport(e)
	if x.SizeBytes != s.size {
		s.t.Errorf("exported %+v", x)
	}
	if x.RBD == nil {
		st := identity.Store{UUID: uuid.MustParse(s.b().Stat().UUID)}
		lvol := uuid.MustParse(s.get("a").UUID)
		if x.Subsystem != st.Subsystem("node-1") || x.HostNQN != identity.HostNQN("node-1") || x.HostID != identity.HostID("node-1").String() ||
			x.UUID != st.NvmeNamespace(lvol, "node-1").String() || len(x.Portals) == 0 {
			s.t.Errorf("exported as %+v", x)
		}
	}
	if again := s.mustExport(e); !reflect.DeepEqual(again, x) {
		s.t.Errorf("exported again: %+v, first %+v", again, x)
	}
	d := s.mustDial("node-1", x)
	c.check(s.t, "a on node-1", d)
	if _, err := d.WriteAt(make([]byte, 4096), 0); err == nil {
		s.t.Error("a node wrote to a read-only export")
	}
	if err := d.WriteZeroes(0, 4096); err == nil {
		s.t.Error("a node zeroed a read-only export")
	}
	c.check(s.t, "a on node-1", d)

	// A second disk of the node, and the blocks below, while the first is in use.
	second := s.soldier("b", 2)
	y := s.mustExport(s.exportOf("node-1", "b", 2, false))
	z := s.mustExport(s.exportOf("node-1", "a-block", 3, false))
	e2 := s.mustDial("node-1", y)
	second.check(s.t, "b on node-1", e2)
	d3 := s.mustDial("node-1", z)
	c.check(s.t, "a-block on node-1", d3)
	c.check(s.t, "a on node-1", d)
	if x.RBD == nil && (y.Subsystem != x.Subsystem || x.UUID == y.UUID || x.UUID == z.UUID) {
		s.t.Errorf("a node's disks: %+v, %+v", x, y)
	}
	s.close(e2)
	s.mustWithdraw(s.exportOf("node-1", "b", 2, false))
	c.check(s.t, "a after b was withdrawn", d)
	s.close(d)
	s.close(d3)
	s.holds("a", c)
}

func (s *suite) exportWritable() {
	s.restore()
	was := s.soldier("a", 1)
	// What AttachWritable does: a clone of the block below.
	s.mustClone("a-block", "w")
	e := s.exportOf("node-1", "w", 7, true)
	x := s.mustExport(e)
	d := s.mustDial("node-1", x)
	c := was.clone()
	c.check(s.t, "w", d)
	c.write(s.t, d, randomBytes(2, 200_001), 77)
	c.write(s.t, d, randomBytes(3, 8192), 1<<20)
	s.ok("discard", d.Discard(2<<20, 1<<20))
	clear(c[2<<20 : 3<<20])
	s.ok("flush", d.Flush())
	c.check(s.t, "w", d)
	if again := s.mustExport(e); !reflect.DeepEqual(again, x) {
		s.t.Errorf("exported again: %+v, first %+v", again, x)
	}
	// A snapshot of what a node writes.
	s.mustSnapshot("w", "w-snap")
	before := c.clone()
	c.write(s.t, d, randomBytes(4, 4096), 4096)
	s.ok("flush", d.Flush())
	s.close(d)
	s.mustWithdraw(e)
	s.holds("w", c)
	s.holds("w-snap", before)
	s.holds("a", was)
	s.mustExport(e) // again, the same disk
	d = s.mustDial("node-1", x)
	c.check(s.t, "w exported again", d)
	s.close(d)
	s.mustWithdraw(e)
	d = s.mustOpen("w", false) // the store's own use is possible again
	c.write(s.t, d, randomBytes(5, 512), 0)
	s.close(d)

	_, err := s.f.Exporter.Export(s.exportOf("node-1", "a", 8, true), "127.0.0.1")
	s.is("export a read-only lvol for writing", err, kind.ReadOnly)
	_, err = s.f.Exporter.Export(s.exportOf("node-1", "a-block", 8, true), "127.0.0.1")
	s.is("export a snapshot for writing", err, kind.ReadOnly)
	// A read-only view of what can be written is refused, or is one.
	e = s.exportOf("node-1", "w", 9, false)
	if x, err := s.f.Exporter.Export(e, "127.0.0.1"); err == nil {
		d := s.mustDial("node-1", x)
		if _, err := d.WriteAt(make([]byte, 512), 0); err == nil {
			s.t.Error("a node wrote to a read-only export")
		}
		s.close(d)
		s.mustWithdraw(e)
	} else {
		s.is("export a writable lvol for reading", err, kind.Invalid)
	}
	s.eventually("delete what no node has", func() error { return s.b().Delete("w") })
}

// exportHolds: what a node has stays.
func (s *suite) exportHolds() {
	s.restore()
	c := s.soldier("a", 1)
	e := s.exportOf("node-1", "a", 1, false)
	s.mustExport(e)
	s.is("delete what a node has", s.b().Delete("a"), kind.InUse)
	s.mustClone("a-block", "w")
	w := s.exportOf("node-1", "w", 2, true)
	s.mustExport(w)
	s.is("delete what a node writes", s.b().Delete("w"), kind.InUse)
	_, err := s.b().SetReadOnly("w", true)
	s.is("set read-only what a node writes", err, kind.InUse)
	d := s.mustOpen("a", true) // the store reads it meanwhile
	c.check(s.t, "a", d)
	s.close(d)
	s.mustWithdraw(w)
	s.mustWithdraw(w) // twice is once
	s.mustReadOnly("w")
	s.mustDelete("w")
	s.mustWithdraw(e)
	s.mustDelete("a")
	s.mustDelete("a-block")
	s.mustWithdraw(e)
	_, err = s.f.Exporter.Export(e, "127.0.0.1")
	s.is("export what was deleted", err, kind.NotFound)
	// Made again it is another disk.
	s.soldier("a", 2)
	s.mustExport(e)
	s.mustWithdraw(e)
	if list, err := s.b().List(); err != nil || len(list) != 2 {
		s.t.Errorf("there is %+v, %v", list, err)
	}
}

// exportAccess: nobody else gets at a node's disks.
func (s *suite) exportAccess() {
	s.restore()
	s.soldier("a", 1)
	theirs := s.soldier("b", 2)
	x := s.mustExport(s.exportOf("node-1", "a", 1, false))
	if x.RBD != nil {
		s.t.Skip("access to images is Ceph's to grant")
	}
	y := s.mustExport(s.exportOf("node-2", "b", 1, false))
	s.mustExport(s.exportOf("node-2", "a", 2, false)) // the same block, on two nodes
	if x.Subsystem == y.Subsystem || x.HostNQN == y.HostNQN || x.UUID == y.UUID {
		s.t.Fatalf("two nodes are told %+v and %+v", x, y)
	}
	refused := func(what string, x attacher.Exported, nqn string, id uuid.UUID) {
		s.t.Helper()
		ctx, cancel := context.WithTimeout(s.t.Context(), 2*time.Second)
		defer cancel()
		h, err := connect(ctx, x, nqn, id)
		if err == nil {
			h.Close()
			s.t.Errorf("%s could connect", what)
		}
	}
	refused("node-2 to node-1's subsystem", x, identity.HostNQN("node-2"), identity.HostID("node-2"))
	refused("node-1 to node-2's subsystem", y, identity.HostNQN("node-1"), identity.HostID("node-1"))
	stranger := uuid.New()
	refused("a stranger", x, "nqn.2014-08.org.nvmexpress:uuid:"+stranger.String(), stranger)
	refused("a node without anything", x, identity.HostNQN("node-3"), identity.HostID("node-3"))
	none := x
	none.Subsystem = identity.Store{UUID: uuid.MustParse(s.b().Stat().UUID)}.Subsystem("node-3")
	refused("node-3 to a subsystem of its name", none, identity.HostNQN("node-3"), identity.HostID("node-3"))

	// In its own subsystem a node finds its own disks only.
	ctx, cancel := context.WithTimeout(s.t.Context(), 10*time.Second)
	defer cancel()
	h, err := connect(ctx, x, x.HostNQN, uuid.MustParse(x.HostID))
	s.ok("connect as told", err)
	defer h.Close()
	if list := h.NvmeNamespaces(); len(list) != 1 || list[0].UUID.String() != x.UUID || uuid.UUID(list[0].NGUID).String() != x.UUID || list[0].NSID != 1 || list[0].SizeBytes != s.size {
		s.t.Errorf("node-1 sees %+v", list)
	}
	stolen := y
	stolen.Subsystem = x.Subsystem
	if d, err := s.dial("node-1", stolen); err == nil {
		d.Close()
		s.t.Error("node-1 opened node-2's disk in its own subsystem")
	}
	d := s.mustDial("node-2", y)
	theirs.check(s.t, "b on node-2", d)
	s.close(d)
}

func (s *suite) exportWithdrawn() {
	s.restore()
	c := s.soldier("a", 1)
	keep := s.soldier("b", 2)
	e, k := s.exportOf("node-1", "a", 1, false), s.exportOf("node-1", "b", 2, false)
	x := s.mustExport(e)
	if x.RBD != nil {
		s.t.Skip("access to images is Ceph's to grant")
	}
	y := s.mustExport(k)
	d, kept := s.mustDial("node-1", x), s.mustDial("node-1", y)
	defer d.Close()
	c.check(s.t, "a", d)
	s.mustWithdraw(e)
	if _, err := d.ReadAt(make([]byte, 4096), 0); err == nil {
		s.t.Error("a node read what was withdrawn")
	}
	keep.check(s.t, "b", kept)
	if d, err := s.dial("node-1", x); err == nil {
		d.Close()
		s.t.Error("a node opened what was withdrawn")
	}
	s.close(kept)
	s.mustWithdraw(k)
	ctx, cancel := context.WithTimeout(s.t.Context(), time.Second)
	defer cancel()
	if h, err := connect(ctx, x, x.HostNQN, uuid.MustParse(x.HostID)); err == nil {
		h.Close()
		s.t.Error("a node without disks could connect")
	}
	// A replayed withdrawal of one node takes nothing from another.
	other := s.exportOf("node-2", "a", 1, false)
	z := s.mustExport(other)
	s.mustWithdraw(e)
	d2 := s.mustDial("node-2", z)
	c.check(s.t, "a on node-2", d2)
	s.close(d2)
}

func (s *suite) exportConcurrent() {
	s.restore()
	c := s.soldier("a", 1)
	var wg sync.WaitGroup
	for n := range 8 {
		wg.Go(func() {
			node := nameOf("node", n)
			e := s.exportOf(node, "a", 1, false)
			for range 3 {
				x, err := s.f.Exporter.Export(e, "127.0.0.1")
				if err == nil {
					var d bdev.Device
					if d, err = s.dial(node, x); err == nil {
						p := make([]byte, 64<<10)
						if _, err = d.ReadAt(p, 1<<20); err == nil && mismatch(p, c[1<<20:1<<20+64<<10]) >= 0 {
							err = errors.New("it reads other bytes")
						}
						err = errors.Join(err, d.Close())
					}
				}
				if err = errors.Join(err, s.f.Exporter.Withdraw(e)); err != nil {
					s.t.Errorf("%s: %v", node, err)
					return
				}
			}
		})
	}
	wg.Wait()
	s.mustDelete("a")
	s.mustDelete("a-block")
}

// exportRestart: a store that is back serves what it served, and I/O goes on.
func (s *suite) exportRestart() {
	s.restore()
	c := s.soldier("a", 1)
	s.mustClone("a-block", "w")
	all := []attacher.Export{s.exportOf("node-1", "a", 1, false), s.exportOf("node-2", "a", 1, false), s.exportOf("node-1", "w", 2, true)}
	told := make([]attacher.Exported, len(all))
	devices := make([]bdev.Device, len(all))
	for i, e := range all {
		told[i] = s.mustExport(e)
		devices[i] = s.mustDial(e.Node, told[i])
		defer devices[i].Close()
	}
	mine := c.clone()
	mine.write(s.t, devices[2], randomBytes(2, 50_000), 3)
	s.ok("flush", devices[2].Flush())

	stop, done := make(chan struct{}), make(chan error, 1)
	go func() { done <- s.work(devices[2], mine, stop) }()
	s.f.Restart(s.t)
	s.restore(all...)
	for i, e := range all {
		x := s.mustExport(e)
		if !reflect.DeepEqual(x, told[i]) {
			s.t.Errorf("after a restart %+v, before %+v", x, told[i])
		}
		d := s.mustDial(e.Node, x)
		if i < 2 {
			c.check(s.t, e.Block+" on "+e.Node, d)
		}
		s.close(d)
		s.is("delete what a node has", s.b().Delete(e.Block), kind.InUse)
	}
	close(stop)
	s.ok("I/O over the restart", <-done)
	c.check(s.t, "a, opened before the restart", devices[0])
	mine.check(s.t, "w, opened before the restart", devices[2])
	for _, d := range devices {
		s.close(d)
	}
	for _, e := range all {
		s.mustWithdraw(e)
	}
	s.holds("w", mine)
	s.mustDelete("w")
}

// work writes and reads back until stop.
func (s *suite) work(d bdev.Device, c content, stop <-chan struct{}) error {
	for i := uint64(0); ; i++ {
		select {
		case <-stop:
			return nil
		case <-time.After(time.Millisecond):
		}
		p := randomBytes(i, 3000)
		off := int64(i*7919) % (int64(len(c)) - 3000)
		if _, err := d.WriteAt(p, off); err != nil {
			return fmt.Errorf("write: %w", err)
		}
		copy(c[off:], p)
		got := make([]byte, len(p))
		if _, err := d.ReadAt(got, off); err != nil {
			return fmt.Errorf("read: %w", err)
		}
		if mismatch(got, p) >= 0 {
			return fmt.Errorf("at %d other bytes than were just written", off)
		}
	}
}

// exportOrphans: what the attacher does not know of any more goes, and nothing else.
func (s *suite) exportOrphans() {
	s.restore()
	unharmed := func(*suite) {}
	if s.f.Stranger != nil {
		check := s.f.Stranger(s.t)
		unharmed = func(s *suite) { s.t.Helper(); check(s.t) }
	}
	c := s.soldier("a", 1)
	s.soldier("b", 2)
	s.mustClone("a-block", "w")
	keep := s.exportOf("node-1", "a", 1, false)
	lost := []attacher.Export{s.exportOf("node-1", "b", 2, false), s.exportOf("node-2", "a", 1, false), s.exportOf("node-2", "w", 2, true)}
	x := s.mustExport(keep)
	told := make([]attacher.Exported, len(lost))
	for i, e := range lost {
		told[i] = s.mustExport(e)
	}
	s.f.Restart(s.t)
	s.restore(keep)
	s.eventually("what nobody knows of is withdrawn", func() error {
		for _, name := range []string{"b", "w"} {
			if err := s.b().Delete(name); err != nil && !errors.Is(err, kind.NotFound) {
				return err
			}
		}
		return nil
	})
	for i, e := range lost {
		if told[i].RBD != nil {
			continue
		}
		ctx, cancel := context.WithTimeout(s.t.Context(), time.Second)
		d, err := s.f.Open(ctx, e.Node, told[i])
		cancel()
		if err == nil {
			d.Close()
			s.t.Errorf("%s on %s is still there", e.Block, e.Node)
		}
	}
	d := s.mustDial("node-1", x)
	c.check(s.t, "a on node-1", d)
	s.close(d)
	unharmed(s)
	y := s.mustExport(lost[1])
	if !reflect.DeepEqual(y, told[1]) {
		s.t.Errorf("exported again as %+v, before %+v", y, told[1])
	}
	s.mustWithdraw(keep)
	s.mustWithdraw(lost[1])
	s.mustDelete("a")
	unharmed(s)
}
