package spdk_test

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/thaw-project/thaw/attacher"
	"github.com/thaw-project/thaw/attacher/backend/backendtest"
	"github.com/thaw-project/thaw/attacher/backend/spdk"
	"github.com/thaw-project/thaw/kind"
)

var (
	rounds = flag.Int("rounds", 30, "of TestRandomKills, for each worker")
	seed   = flag.Uint64("seed", 0, "of TestRandomKills; 0 is a new one")
)

// worker does what attachers do, with lvols and a node of its own, and knows what there
// should be.
type worker struct {
	b      *spdk.Backend
	r      *rand.Rand
	name   string // of its node, and beginning of its lvols' names
	serial int
	blocks map[string]byte            // read-only lvols by name, and what they are filled with
	shown  map[string]attacher.Export // to its node
}

// persist calls until somebody answers. What an unanswered call did already is no error.
func persist(already kind.Kind, f func() error) error {
	tried := false
	for deadline := time.Now().Add(60 * time.Second); ; {
		err := f()
		switch {
		case errors.Is(err, kind.Unavailable) && time.Now().Before(deadline):
			tried = true
			time.Sleep(5 * time.Millisecond)
		case tried && already != "" && errors.Is(err, already):
			return nil
		default:
			return err
		}
	}
}

func (w *worker) fresh(what string) string {
	w.serial++
	return fmt.Sprintf("%s-%s-%d", w.name, what, w.serial)
}

func (w *worker) pick() string {
	for name := range w.blocks {
		return name
	}
	return ""
}

// convert makes a block, as a conversion of one layer does.
func (w *worker) convert() error {
	work, block := w.fresh("work"), w.fresh("block")
	below := ""
	if len(w.blocks) > 0 && w.r.IntN(2) == 0 {
		below = w.pick()
	}
	if err := persist(kind.Exists, func() (err error) {
		if below == "" {
			_, err = w.b.Create(work, 2<<20)
		} else {
			_, err = w.b.Clone(below, work)
		}
		return err
	}); err != nil {
		return fmt.Errorf("make %s of %q: %w", work, below, err)
	}
	fill := byte(w.r.IntN(256))
	if err := persist("", func() error {
		d, err := w.b.OpenLvol(work, false)
		if err != nil {
			return err
		}
		_, err = d.WriteAt(bytes.Repeat([]byte{fill}, 100_000), 33)
		return errors.Join(err, d.Flush(), d.Close())
	}); err != nil {
		return fmt.Errorf("write %s: %w", work, err)
	}
	if err := persist(kind.Exists, func() error { _, err := w.b.Snapshot(work, block); return err }); err != nil {
		return fmt.Errorf("snapshot %s: %w", work, err)
	}
	if err := w.delete(work); err != nil {
		return err
	}
	w.blocks[block] = fill
	return nil
}

func (w *worker) delete(name string) error {
	if err := persist(kind.NotFound, func() error {
		err := w.b.Delete(name)
		if errors.Is(err, kind.InUse) { // a device that was closed while the target was away
			err = kind.Wrap(kind.Unavailable, err)
		}
		return err
	}); err != nil {
		return fmt.Errorf("delete %s: %w", name, err)
	}
	return nil
}

func (w *worker) export() error {
	name := w.pick()
	if name == "" {
		return nil
	}
	e, known := w.shown[name]
	if !known {
		w.serial++
		e = attacher.Export{Node: w.name, Block: name, NSID: uint32(w.serial%attacher.MaxAttachments + 1), Transport: attacher.TransportTCP}
	}
	w.shown[name] = e
	return persist("", func() error {
		x, err := w.b.Exporter().Export(e, "")
		if err != nil {
			return err
		}
		return w.read(x, w.blocks[name])
	})
}

// read reads as the node does. A target that is killed meanwhile makes it wait.
func (w *worker) read(x attacher.Exported, fill byte) error {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	d, err := backendtest.OpenNVMe(ctx, w.name, x)
	if err != nil {
		return kind.Wrap(kind.Unavailable, err) // killed just now
	}
	defer d.Close()
	p := make([]byte, 4096)
	if _, err := d.ReadAt(p, 50_000); err != nil {
		return fmt.Errorf("read: %w", err)
	}
	if !bytes.Equal(p, bytes.Repeat([]byte{fill}, 4096)) {
		return fmt.Errorf("it reads %x, want %x", p[0], fill)
	}
	return nil
}

func (w *worker) withdraw() error {
	for name, e := range w.shown {
		if err := persist("", func() error { return w.b.Exporter().Withdraw(e) }); err != nil {
			return fmt.Errorf("withdraw %s: %w", name, err)
		}
		delete(w.shown, name)
		return nil
	}
	return nil
}

// prune deletes a block that nothing needs.
func (w *worker) prune() error {
	name := w.pick()
	if _, shown := w.shown[name]; name == "" || shown {
		return nil
	}
	err := persist(kind.NotFound, func() error { return w.b.Delete(name) })
	if errors.Is(err, kind.InUse) { // by clones
		return nil
	}
	delete(w.blocks, name)
	return err
}

func (w *worker) look() error {
	name := w.pick()
	if name == "" {
		return nil
	}
	return persist("", func() error {
		d, err := w.b.OpenLvol(name, true)
		if err != nil {
			return err
		}
		p := make([]byte, 4096)
		if _, err = d.ReadAt(p, 50_000); err == nil && p[9] != w.blocks[name] {
			err = fmt.Errorf("%s has %x, want %x", name, p[9], w.blocks[name])
		}
		return errors.Join(err, d.Close())
	})
}

func (w *worker) step() error {
	switch w.r.IntN(7) {
	case 0, 1:
		return w.convert()
	case 2, 3:
		return w.export()
	case 4:
		return w.withdraw()
	case 5:
		return w.prune()
	}
	return w.look()
}

// TestRandomKills has workers do random things while target and bridge are killed again
// and again: all that was answered is so, and in the end nothing is left.
func TestRandomKills(t *testing.T) {
	s := *seed
	if s == 0 {
		s = rand.Uint64()
	}
	t.Logf("-seed %d", s)
	p := newPlace(t)
	victims := []*process{spawn(t, childTarget, p.root, "target"), spawn(t, childBridge, p.root, "bridge")}
	conn := p.conn(t)
	b := p.open(t, conn)
	if err := b.Exporter().Restore(nil); err != nil {
		t.Fatal(err)
	}
	var running sync.WaitGroup
	var steps atomic.Int64
	workers := make([]*worker, 4)
	for i := range workers {
		w := &worker{b: b, r: rand.New(rand.NewPCG(s, uint64(i))), name: fmt.Sprintf("node-%d", i), blocks: map[string]byte{}, shown: map[string]attacher.Export{}}
		workers[i] = w
		running.Go(func() {
			for n := range *rounds {
				steps.Add(1)
				if err := w.step(); err != nil {
					t.Errorf("%s: round %d: %v", w.name, n, err)
					return
				}
			}
		})
	}
	done := make(chan struct{})
	go func() { running.Wait(); close(done) }()
	r, kills, last := rand.New(rand.NewPCG(s, 99)), 0, int64(0)
killing:
	for {
		select {
		case <-done:
			break killing
		case <-time.After(time.Duration(50+r.IntN(500)) * time.Millisecond):
			if steps.Load() < last+3 { // it must get somewhere
				continue
			}
			last = steps.Load()
			v := victims[r.IntN(len(victims))]
			v.kill()
			time.Sleep(time.Duration(r.IntN(100)) * time.Millisecond)
			v.start()
			kills++
		}
	}
	for _, w := range workers {
		for name := range w.blocks {
			if err := persist("", func() error { _, err := b.Get(name); return err }); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
		for len(w.shown) > 0 && !t.Failed() {
			if err := w.withdraw(); err != nil {
				t.Error(err)
			}
		}
	}
	// Clones before what they are clones of.
	for left := 1; left > 0 && !t.Failed(); {
		list, err := b.List()
		if err != nil {
			t.Fatal(err)
		}
		left = len(list)
		for _, i := range list {
			if len(i.Clones) > 1 {
				continue
			}
			if err := b.Delete(i.Name); err != nil {
				t.Errorf("delete %s: %v", i.Name, err)
			}
		}
	}
	if err := b.Close(); err != nil {
		t.Error(err)
	}
	leftovers(t, conn)
	t.Logf("%d kills", kills)
}
