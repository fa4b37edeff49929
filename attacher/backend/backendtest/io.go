package backendtest

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"github.com/thaw-project/thaw/kind"
)

func (s *suite) open() {
	_, err := s.b().OpenLvol("none", true)
	s.is("open nothing", err, kind.NotFound)
	s.mustCreate("a", s.size)
	c := newContent(s.size)
	one, two := s.mustOpen("a", false), s.mustOpen("a", true)
	c.write(s.t, one, randomBytes(1, 9000), 100)
	c.check(s.t, "the other device", two)
	if !two.ReadOnly() || one.ReadOnly() {
		s.t.Error("the devices mix up who may write")
	}
	_, err = two.WriteAt([]byte{1}, 0)
	s.is("write to the read-only device of a writable lvol", err, kind.ReadOnly)
	three := s.mustOpen("a", false)
	s.close(one)
	_, err = one.ReadAt(make([]byte, 512), 0)
	s.is("read of a closed device", err, kind.Unavailable)
	_, err = one.WriteAt(make([]byte, 512), 0)
	s.is("write to a closed device", err, kind.Unavailable)
	s.ok("close again", one.Close())
	c.write(s.t, three, randomBytes(2, 9000), 5000)
	c.check(s.t, "the other device", two)
	s.is("delete", s.b().Delete("a"), kind.InUse)
	s.close(two)
	s.is("delete", s.b().Delete("a"), kind.InUse)
	if !s.get("a").Open {
		s.t.Error("it is open and does not say so")
	}

	// A snapshot leaves the device open, on the clone.
	before := c.clone()
	s.mustSnapshot("a", "snap")
	c.write(s.t, three, randomBytes(3, 9000), 2000)
	c.check(s.t, "the open device", three)
	s.holds("snap", before)
	s.close(three)
	s.holds("a", c)
	s.eventually("it is closed", func() error {
		if i, err := s.b().Get("a"); err != nil || i.Open {
			return fmt.Errorf("open %t, %w", i.Open, err)
		}
		return nil
	})

	// Read-only lvols are open as often as need be.
	var all []interface{ Close() error }
	for range 5 {
		all = append(all, s.mustOpen("snap", true))
	}
	for _, d := range all {
		s.ok("close", d.Close())
	}
}

// randomIO compares reads with what was written, at any alignment.
func (s *suite) randomIO() {
	size := 4 * s.size
	s.mustCreate("a", size)
	d := s.mustOpen("a", false)
	c := newContent(size)
	r := rand.New(rand.NewPCG(1, 2))
	span := func(most int64) (off, n int64) {
		n = 1 + r.Int64N(most)
		if r.IntN(3) == 0 {
			n = (n + 4095) &^ 4095
		}
		off = r.Int64N(size)
		if r.IntN(3) == 0 {
			off &^= 4095
		}
		return off, min(n, size-off)
	}
	for i := range 400 {
		switch r.IntN(10) {
		default:
			off, n := span(64 << 10)
			c.write(s.t, d, randomBytes(uint64(i), n), off)
		case 0:
			off, n := span(600 << 10)
			s.ok("discard", d.Discard(off, n))
			clear(c[off : off+n])
		case 1:
			off, n := span(600 << 10)
			s.ok("write zeroes", d.WriteZeroes(off, n))
			clear(c[off : off+n])
		case 2:
			s.ok("flush", d.Flush())
		case 3, 4, 5:
			off, n := span(600 << 10)
			p := make([]byte, n)
			if got, err := d.ReadAt(p, off); int64(got) != n {
				s.t.Fatalf("read %d bytes at %d: %d, %v", n, off, got, err)
			}
			if at := mismatch(p, c[off:off+n]); at >= 0 {
				s.t.Fatalf("step %d: read of %d bytes at %d differs at %d", i, n, off, at)
			}
		}
		if i%100 == 50 {
			was := c.clone()
			name := nameOf("snap", i)
			s.mustSnapshot("a", name)
			defer s.holds(name, was)
		}
	}
	c.check(s.t, "a", d)
	s.close(d)
	s.holds("a", c)
}

// chain builds a chain of 20 as a conversion does, and takes it apart.
func (s *suite) chain() {
	const depth = 20
	was := make([]content, depth)
	c := newContent(s.size)
	r := rand.New(rand.NewPCG(3, 4))
	for i := range depth {
		work := nameOf("work", i)
		if i == 0 {
			s.mustCreate(work, s.size)
		} else {
			s.mustClone(nameOf("layer", i-1), work)
		}
		d := s.mustOpen(work, false)
		for range 3 {
			n := 1 + r.Int64N(200_000)
			c.write(s.t, d, randomBytes(r.Uint64(), n), r.Int64N(s.size-n))
		}
		off := r.Int64N(s.size - 100_000)
		s.ok("discard", d.Discard(off, 100_000))
		clear(c[off : off+100_000])
		s.ok("flush", d.Flush())
		s.close(d)
		was[i] = c.clone()
		s.mustSnapshot(work, nameOf("layer", i))
		s.mustDelete(work)
	}
	s.mustClone(nameOf("layer", depth-1), "soldier")
	s.mustReadOnly("soldier")
	s.holds("soldier", c)
	for i := range depth {
		s.holds(nameOf("layer", i), was[i])
	}
	for i := 1; i < depth; i++ {
		if p := s.get(nameOf("layer", i)).Parent; p != nameOf("layer", i-1) {
			s.t.Errorf("layer %d is a clone of %q", i, p)
		}
	}
	// From below, so that each moves what it has into the next.
	for i := range depth - 1 {
		s.mustDelete(nameOf("layer", i))
	}
	s.holds("soldier", c)
	s.holds(nameOf("layer", depth-1), c)
	s.mustDelete("soldier")
	s.mustDelete(nameOf("layer", depth-1))
	if list, err := s.b().List(); err != nil || len(list) != 0 {
		s.t.Errorf("there is %v, %v", list, err)
	}
}

// snapshotUnderWrites takes snapshots while somebody writes block after block: each has
// all that was acknowledged before, and nothing after what it lacks.
func (s *suite) snapshotUnderWrites() {
	const block, blocks = 4096, 1000
	size := (block*blocks + s.unit - 1) / s.unit * s.unit
	s.mustCreate("a", size)
	d := s.mustOpen("a", false)
	var acked atomic.Int64
	var writer sync.WaitGroup
	stop := make(chan struct{})
	writer.Go(func() {
		p := make([]byte, block)
		for i := range int64(blocks) {
			select {
			case <-stop:
				return
			default:
			}
			for at := 0; at < block; at += 8 {
				binary.LittleEndian.PutUint64(p[at:], uint64(i)+1)
			}
			if _, err := d.WriteAt(p, i*block); err != nil {
				s.t.Errorf("write block %d: %v", i, err)
				return
			}
			acked.Store(i + 1)
			time.Sleep(time.Millisecond)
		}
	})
	least := map[string]int64{}
	for i := range 5 {
		before := acked.Load()
		for acked.Load() < before+20 && acked.Load() < blocks && !s.t.Failed() {
			time.Sleep(time.Millisecond)
		}
		name := nameOf("snap", i)
		least[name] = acked.Load()
		s.mustSnapshot("a", name)
	}
	close(stop)
	writer.Wait()
	s.close(d)
	total := acked.Load()
	least["a"] = total
	for name, n := range least {
		d := s.mustOpen(name, true)
		p := make([]byte, size)
		if got, err := d.ReadAt(p, 0); got != len(p) {
			s.t.Fatalf("read %s: %d, %v", name, got, err)
		}
		s.close(d)
		has := int64(0)
		for has < blocks && binary.LittleEndian.Uint64(p[has*block:]) != 0 {
			has++
		}
		if has < n {
			s.t.Errorf("%s lacks block %d, and %d were written before it", name, has, n)
		}
		for at := 0; at+8 <= len(p); at += 8 {
			want := uint64(0)
			if int64(at) < has*block {
				want = uint64(at/block) + 1
			}
			if got := binary.LittleEndian.Uint64(p[at:]); got != want {
				s.t.Fatalf("%s: %d at %d, want %d of %d blocks", name, got, at, want, has)
			}
		}
	}
}

// space uses the store up and frees it again.
func (s *suite) space() {
	if s.f.CapacityBytes == 0 {
		s.t.Skip("the fixture names no capacity")
	}
	free := s.b().Stat().FreeClusters
	s.mustCreate("keep", s.size)
	kept := s.fill("keep", 1)
	if now := s.b().Stat().FreeClusters; now >= free {
		s.t.Errorf("%d clusters were free, and after writing %d bytes %d are", free, s.size, now)
	}
	big := (2*s.f.CapacityBytes + s.unit - 1) / s.unit * s.unit
	s.mustCreate("big", big)
	d := s.mustOpen("big", false)
	const step = 1 << 20
	full := error(nil)
	for off := int64(0); off < big && full == nil; off += step {
		if _, full = d.WriteAt(randomBytes(uint64(off), step), off); full == nil {
			full = d.Flush()
		}
	}
	s.is("write more than there is", full, kind.NoSpace, kind.IO)
	s.holds("keep", kept)
	s.close(d)
	s.eventually("delete what filled the store", func() error { return s.b().Delete("big") })
	s.eventually("the space is free again", func() error {
		if now := s.b().Stat().FreeClusters; now*2 < free {
			return fmt.Errorf("%d clusters of %d", now, free)
		}
		return nil
	})
	s.mustCreate("next", s.size)
	s.holds("next", s.fill("next", 2))
	s.holds("keep", kept)
}

// concurrent has many work at the same time, with lvols of their own and with one.
func (s *suite) concurrent() {
	const workers = 8
	s.mustCreate("base", s.size)
	was := s.fill("base", 1)
	s.mustSnapshot("base", "snap")
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			for round := range 3 {
				name, mid := nameOf("w", w), nameOf("m", w)
				if err := s.life(name, mid, was, uint64(w*10+round)); err != nil {
					s.t.Errorf("worker %d: %v", w, err)
					return
				}
			}
		})
	}
	wg.Wait()

	var made, refused atomic.Int64
	for range workers {
		wg.Go(func() {
			switch _, err := s.b().Create("one", s.size); {
			case err == nil:
				made.Add(1)
			case errors.Is(err, kind.Exists):
				refused.Add(1)
			default:
				s.t.Errorf("create the same: %v", err)
			}
		})
	}
	wg.Wait()
	if made.Load() != 1 || refused.Load() != workers-1 {
		s.t.Errorf("%d created the same lvol, %d were refused", made.Load(), refused.Load())
	}
	list, err := s.b().List()
	s.ok("list", err)
	if len(list) != 3 {
		s.t.Errorf("there is %+v", list)
	}
	s.holds("base", was)
}

// life clones, writes, snapshots, reads and deletes.
func (s *suite) life(name, mid string, was content, seed uint64) error {
	b := s.b()
	if _, err := b.Clone("snap", name); err != nil {
		return err
	}
	d, err := b.OpenLvol(name, false)
	if err != nil {
		return err
	}
	c := was.clone()
	p := randomBytes(seed, 50_000)
	_, err = d.WriteAt(p, 4321)
	copy(c[4321:], p)
	if err = errors.Join(err, d.Close()); err != nil {
		return err
	}
	if _, err := b.Snapshot(name, mid); err != nil {
		return err
	}
	if d, err = b.OpenLvol(mid, true); err != nil {
		return err
	}
	got := make([]byte, len(c))
	n, err := d.ReadAt(got, 0)
	if n == len(got) {
		err = nil
	}
	if at := mismatch(got, c); err == nil && at >= 0 {
		err = fmt.Errorf("%s differs at %d", mid, at)
	}
	if err = errors.Join(err, d.Close()); err != nil {
		return err
	}
	for _, n := range []string{mid, name} {
		if err := eventually(func() error { return b.Delete(n) }); err != nil {
			return err
		}
	}
	return nil
}

// eventually tries again what is kind.InUse.
func eventually(f func() error) error {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	for {
		err := f()
		if !errors.Is(err, kind.InUse) {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(5 * time.Millisecond):
		}
	}
}
