package host_test

import (
	"bytes"
	"sync/atomic"
	"testing"
	"time"

	"github.com/thaw-project/thaw/nvme/host"
	"github.com/thaw-project/thaw/target/nvmf"
)

// gated is a memory whose writes wait at a gate, if there is one.
type gated struct {
	*memory
	gate   atomic.Pointer[chan struct{}]
	writes atomic.Int32
}

func (g *gated) WriteAt(p []byte, off int64) (int, error) {
	g.writes.Add(1)
	if c := g.gate.Load(); c != nil {
		<-*c
	}
	return g.memory.WriteAt(p, off)
}

func block(b byte) []byte { return bytes.Repeat([]byte{b}, 4096) }

// TestStaleRunning has a write that its device works on when the path is lost: it is not sent
// again before that is over, by either path, while reads go on.
func TestStaleRunning(t *testing.T) {
	l := newLab(t, nvmf.Options{})
	g := &gated{memory: newMemory(1 << 20)}
	id := l.add(nvmf.NvmeNamespaceConfig{Device: g})
	a, b := newProxy(t, l.addr), newProxy(t, l.addr)
	h := l.connect(quick(a.addr(), b.addr()))
	d := l.open(h, id)
	gate := make(chan struct{})
	g.gate.Store(&gate)
	written := make(chan error, 1)
	go func() {
		_, err := d.WriteAt(block('A'), 0)
		written <- err
	}()
	eventually(t, "the write reaches the device", func() error { return expect(g.writes.Load() == 1, "%d writes", g.writes.Load()) })
	g.gate.Store(nil) // the next write would run
	a.cut()
	b.cut()
	for range 20 {
		if _, err := d.ReadAt(make([]byte, 4096), 8192); err != nil {
			t.Fatal(err)
		}
		if n := g.writes.Load(); n != 1 {
			t.Fatalf("%d writes at the device while the first one runs", n)
		}
		time.Sleep(fenceRounds) // time for what must not happen
	}
	select {
	case err := <-written:
		t.Fatalf("the write ended: %v", err)
	default:
	}
	close(gate)
	if err := <-written; err != nil {
		t.Fatal(err)
	}
	if n := g.writes.Load(); n != 2 {
		t.Errorf("%d writes at the device, want 2", n)
	}
}

const fenceRounds = 20 * time.Millisecond

// TestStaleUnderWay has a write that a network holds back when the host gives the path up:
// it arrives after a newer one, and is not carried out.
func TestStaleUnderWay(t *testing.T) {
	l := newLab(t, nvmf.Options{})
	m := newMemory(1 << 20)
	id := l.add(nvmf.NvmeNamespaceConfig{Device: m})
	a, b := newProxy(t, l.addr), newProxy(t, l.addr)
	b.refuse.Store(true)
	c := quick(a.addr(), b.addr())
	// Only the host gives up in the time of the test.
	c.KeepAlive, c.IOTimeout = -1, 300*time.Millisecond
	h := l.connect(c)
	d := l.open(h, id)
	a.stall.Store(true) // holds what it has read, and passes it on later
	a.refuse.Store(true)
	b.refuse.Store(false)
	if _, err := d.WriteAt(block('A'), 0); err != nil { // by b
		t.Fatal(err)
	}
	if _, err := d.WriteAt(block('B'), 0); err != nil {
		t.Fatal(err)
	}
	if n := len(l.t1.Subsystems()[0].Controllers); n != 1 {
		t.Errorf("%d controllers, of which one was to be reset", n)
	}
	a.stall.Store(false)
	eventually(t, "the stalled connections end", func() error {
		a.mu.Lock()
		defer a.mu.Unlock()
		return expect(len(a.conns) == 0, "%d connections", len(a.conns))
	})
	p := make([]byte, 4096)
	if _, err := d.ReadAt(p, 0); err != nil || !bytes.Equal(p, block('B')) {
		t.Errorf("%v, %c at the start, want B", err, p[0])
	}
}

// TestQuiesce: where the target cannot be asked, a write waits for as long as was
// configured.
func TestQuiesce(t *testing.T) {
	l := newLab(t, nvmf.Options{NoCrossReset: true})
	id := l.add(nvmf.NvmeNamespaceConfig{Device: newMemory(1 << 20)})
	for _, quiesce := range []time.Duration{-1, 400 * time.Millisecond} {
		a, b := newProxy(t, l.addr), newProxy(t, l.addr)
		b.refuse.Store(true)
		c := quick(a.addr(), b.addr())
		c.KeepAlive, c.IOTimeout, c.Quiesce = -1, 200*time.Millisecond, quiesce
		h := l.connect(c)
		d := l.open(h, id)
		a.stall.Store(true)
		a.refuse.Store(true)
		b.refuse.Store(false)
		begin := time.Now()
		if _, err := d.WriteAt(block('A'), 0); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(begin); took < quiesce {
			t.Errorf("sent again after %v, before the %v it was to wait", took, quiesce)
		}
		if _, err := d.ReadAt(make([]byte, 4096), 0); err != nil {
			t.Error(err)
		}
		h.Close()
	}
}

// TestFenceLoss: a write that cannot be sent again in time fails, and so does one that
// waits when the host is closed.
func TestFenceLoss(t *testing.T) {
	l := newLab(t, nvmf.Options{})
	g := &gated{memory: newMemory(1 << 20)}
	id := l.add(nvmf.NvmeNamespaceConfig{Device: g})
	p := newProxy(t, l.addr)
	c := quick(p.addr())
	c.LossTimeout = 300 * time.Millisecond
	h := l.connect(c)
	c.LossTimeout = time.Hour
	h2 := l.connect(c)
	gate := make(chan struct{})
	g.gate.Store(&gate)
	lost, closed := make(chan error, 1), make(chan error, 1)
	for _, w := range []struct {
		h    *host.Host
		done chan error
	}{{h, lost}, {h2, closed}} {
		d := l.open(w.h, id)
		go func() {
			_, err := d.WriteAt(block('A'), 0)
			w.done <- err
		}()
	}
	eventually(t, "both writes reach the device", func() error { return expect(g.writes.Load() == 2, "%d writes", g.writes.Load()) })
	p.cut()
	if err := <-lost; err == nil {
		t.Error("a write succeeded that the device never ended")
	}
	h2.Close()
	if err := <-closed; err == nil {
		t.Error("a write of a closed host succeeded")
	}
	close(gate)
}
