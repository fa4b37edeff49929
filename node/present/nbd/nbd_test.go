package nbd

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/nbd"
	"github.com/thaw-project/thaw/node/present"
	"github.com/thaw-project/thaw/node/present/runstate"
	"github.com/thaw-project/thaw/target/bdev"
)

func start(t testing.TB, m *machine, state string, change ...func(*Options)) *Presenter {
	t.Helper()
	o := Options{StatePath: state, Open: openFile, Connections: 3, Logger: testLogger()}
	if m != nil {
		o.driver = m
	}
	for _, c := range change {
		c(&o)
	}
	p, err := New(context.Background(), o)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestPresentAndWithdraw(t *testing.T) {
	defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
	ctx := context.Background()
	m, state := newMachine(), filepath.Join(t.TempDir(), "nbd.json")
	p := start(t, m, state)
	ro, data := image(t, "ro", 1<<20)
	rw, _ := image(t, "rw", 1<<20)
	d, err := p.Present(ctx, "b", ro, true)
	if err != nil || d.Path != "/dev/nbd0" || !d.Block || d.SizeBytes != 1<<20 || !d.ReadOnly {
		t.Fatalf("%+v, %v", d, err)
	}
	if n := len(m.devices[0].sockets); n != 3 {
		t.Errorf("a read-only disk has %d connections, want 3", n)
	}
	for i := range 6 {
		m.wantRead(t, d.Path, int64(i)*4096, data[i*4096:][:4096])
	}
	if err := m.do(d.Path, nbd.CmdWrite, 0, make([]byte, 512)); err == nil {
		t.Error("a read-only disk takes a write")
	}
	w, err := p.Present(ctx, "a", rw, false)
	if err != nil || w.Path != "/dev/nbd1" || w.ReadOnly {
		t.Fatalf("%+v, %v", w, err)
	}
	if n := len(m.devices[1].sockets); n != 1 {
		t.Errorf("a writable disk has %d connections, want 1", n)
	}
	if err := m.do(w.Path, nbd.CmdWrite, 512, []byte(fmt.Sprintf("%512s", "x"))); err != nil {
		t.Fatal(err)
	}
	if raw, _ := os.ReadFile(rw.Path); string(raw[512:1024]) != fmt.Sprintf("%512s", "x") {
		t.Error("what was written is not there")
	}
	if again, err := p.Present(ctx, "b", ro, true); err != nil || again != d {
		t.Errorf("again: %+v, %v", again, err)
	}
	_, err = p.Present(ctx, "b", rw, true)
	wantKind(t, err, kind.Exists)
	_, err = p.Present(ctx, "b", ro, false)
	wantKind(t, err, kind.Exists)
	_, err = p.Present(ctx, "../b", ro, true)
	wantKind(t, err, kind.Invalid)
	odd, _ := image(t, "odd", 1000)
	_, err = p.Present(ctx, "odd", odd, true)
	wantKind(t, err, kind.Invalid)
	if list, err := p.List(ctx); err != nil || len(list) != 2 || list[0] != w || list[1] != d {
		t.Errorf("%+v, %v", list, err)
	}
	m.setBusy(d.Path, true)
	wantKind(t, p.Withdraw(ctx, "b"), kind.InUse)
	wantKind(t, p.Teardown(ctx), kind.InUse)
	m.wantRead(t, d.Path, 0, data[:512])
	m.setBusy(d.Path, false)
	if err := p.Withdraw(ctx, "b"); err != nil {
		t.Fatal(err)
	}
	if m.devices[0] != nil {
		t.Error("the device is still connected")
	}
	if err := p.Withdraw(ctx, "b"); err != nil {
		t.Error(err)
	}
	if err := p.Teardown(ctx); err != nil {
		t.Error(err)
	}
	if len(m.devices) != 0 {
		t.Errorf("%d devices are left", len(m.devices))
	}
	_, err = p.Present(ctx, "b", ro, true)
	wantKind(t, err, kind.Unavailable)
}

// TestTakeOver ends a presenter while readers go on, and starts others.
func TestTakeOver(t *testing.T) {
	defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
	ctx := context.Background()
	m, state := newMachine(), filepath.Join(t.TempDir(), "nbd.json")
	ro, data := image(t, "ro", 1<<20)
	p := start(t, m, state)
	d, err := p.Present(ctx, "ro", ro, true)
	if err != nil {
		t.Fatal(err)
	}
	stop := make(chan struct{})
	var readers sync.WaitGroup
	var reads atomic.Int64
	readers.Go(func() {
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
			}
			off := i * 4096 % len(data)
			m.wantRead(t, d.Path, int64(off), data[off:][:4096])
			reads.Add(1)
		}
	})
	for range 5 {
		before := reads.Load()
		for reads.Load() < before+100 {
			time.Sleep(time.Millisecond)
		}
		if err := p.Close(); err != nil {
			t.Fatal(err)
		}
		// Another number of connections is for new disks only.
		p = start(t, m, state, func(o *Options) { o.Connections = 1 })
		if list, _ := p.List(ctx); len(list) != 1 || list[0] != d {
			t.Fatalf("%+v", list)
		}
	}
	before := reads.Load()
	for reads.Load() < before+100 {
		time.Sleep(time.Millisecond)
	}
	close(stop)
	readers.Wait()
	if again, err := p.Present(ctx, "ro", ro, true); err != nil || again != d {
		t.Errorf("%+v, %v", again, err)
	}
	if err := p.Teardown(ctx); err != nil {
		t.Error(err)
	}
}

// TestCutConnections has connections die under a presenter that lives.
func TestCutConnections(t *testing.T) {
	defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
	ctx := context.Background()
	m := newMachine()
	p := start(t, m, filepath.Join(t.TempDir(), "nbd.json"))
	ro, data := image(t, "ro", 1<<20)
	d, err := p.Present(ctx, "ro", ro, true)
	if err != nil {
		t.Fatal(err)
	}
	for i := range 12 {
		m.cut(0, i%3)
		m.wantRead(t, d.Path, 0, data[:8192])
		for want := int64(i + 1); p.reconnects.Load() < want; {
			time.Sleep(time.Millisecond)
		}
	}
	if err := p.Teardown(ctx); err != nil {
		t.Error(err)
	}
}

// gated is a device whose writes wait for a gate.
type gated struct {
	bdev.Device
	began chan struct{}
	gate  chan struct{}
}

func (g *gated) WriteAt(p []byte, off int64) (int, error) {
	g.began <- struct{}{}
	<-g.gate
	return g.Device.WriteAt(p, off)
}

// TestNoWriteTakesEffectLate: a write hangs in the device and its connection dies. The
// write that the kernel sends again, and those after it, must not pass it.
func TestNoWriteTakesEffectLate(t *testing.T) {
	ctx := context.Background()
	m := newMachine()
	g := &gated{began: make(chan struct{}, 10), gate: make(chan struct{})}
	p := start(t, m, filepath.Join(t.TempDir(), "nbd.json"), func(o *Options) {
		o.Open = func(s present.Source, readOnly bool) (bdev.Device, error) {
			d, err := openFile(s, readOnly)
			g.Device = d
			return g, err
		}
	})
	rw, _ := image(t, "rw", 1<<20)
	d, err := p.Present(ctx, "rw", rw, false)
	if err != nil {
		t.Fatal(err)
	}
	written := make(chan error, 1)
	go func() { written <- m.do(d.Path, nbd.CmdWrite, 0, make([]byte, 512)) }()
	<-g.began
	m.cut(0, 0)
	select {
	case <-g.began:
		t.Fatal("the write was begun again while the first was at work")
	case <-time.After(200 * time.Millisecond): // many times what a new connection takes
	}
	close(g.gate)
	if err := <-written; err != nil {
		t.Fatal(err)
	}
	if err := p.Teardown(ctx); err != nil {
		t.Error(err)
	}
}

// TestCloseKeepsRequests: a read waits for another machine when the presenter is closed.
// The machine's failure must not reach the user, who gets the next process's answer.
func TestCloseKeepsRequests(t *testing.T) {
	ctx := context.Background()
	m, state := newMachine(), filepath.Join(t.TempDir(), "nbd.json")
	gone := make(chan struct{})
	began := make(chan struct{}, 10)
	p := start(t, m, state, func(o *Options) {
		o.Open = func(s present.Source, readOnly bool) (bdev.Device, error) {
			d, err := openFile(s, readOnly)
			return &stuck{d, began, gone}, err
		}
		o.Interrupt = func() { close(gone) }
	})
	ro, data := image(t, "ro", 1<<20)
	d, err := p.Present(ctx, "ro", ro, true)
	if err != nil {
		t.Fatal(err)
	}
	read := make(chan error, 1)
	got := make([]byte, 4096)
	go func() { read <- m.do(d.Path, nbd.CmdRead, 0, got) }()
	<-began
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	p = start(t, m, state)
	if err := <-read; err != nil || !bytes.Equal(got, data[:4096]) {
		t.Errorf("the read: %v", err)
	}
	if err := p.Teardown(ctx); err != nil {
		t.Error(err)
	}
}

// stuck is a device whose reads fail when gone is closed.
type stuck struct {
	bdev.Device
	began chan struct{}
	gone  chan struct{}
}

func (s *stuck) ReadAt([]byte, int64) (int, error) {
	s.began <- struct{}{}
	<-s.gone
	return 0, kind.Errorf(kind.Unavailable, "closed")
}

// TestUsersWaitForTheStore: after a start the store is not there yet.
func TestUsersWaitForTheStore(t *testing.T) {
	ctx := context.Background()
	m, state := newMachine(), filepath.Join(t.TempDir(), "nbd.json")
	p := start(t, m, state)
	ro, data := image(t, "ro", 1<<20)
	d, err := p.Present(ctx, "ro", ro, true)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	var attempts atomic.Int64
	p = start(t, m, state, func(o *Options) {
		o.Open = func(s present.Source, readOnly bool) (bdev.Device, error) {
			if attempts.Add(1) < 4 {
				return nil, kind.Errorf(kind.Unavailable, "the store is not there")
			}
			return openFile(s, readOnly)
		}
	})
	m.wantRead(t, d.Path, 4096, data[4096:8192])
	if n := attempts.Load(); n != 4 {
		t.Errorf("opened %d times", n)
	}
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	// And one whose store never comes can be withdrawn all the same.
	p = start(t, m, state, func(o *Options) {
		o.Open = func(present.Source, bool) (bdev.Device, error) { return nil, kind.Errorf(kind.Unavailable, "no") }
	})
	if err := p.Teardown(ctx); err != nil {
		t.Error(err)
	}
}

func TestLeftovers(t *testing.T) {
	ctx := context.Background()
	m, state := newMachine(), filepath.Join(t.TempDir(), "nbd.json")
	p := start(t, m, state)
	a, _ := image(t, "a", 1<<20)
	b, data := image(t, "b", 1<<20)
	for id, s := range map[string]present.Source{"a": a, "b": b} {
		if _, err := p.Present(ctx, id, s, true); err != nil {
			t.Fatal(err)
		}
	}
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	mine := p.backend("a")
	// A device of ours that no state names, one of somebody else, and one of ours that
	// somebody disconnected.
	pair := func(backend string) uint32 {
		q := start(t, m, filepath.Join(t.TempDir(), "other.json"))
		defer q.Close()
		if _, err := q.Present(ctx, "x", a, true); err != nil {
			t.Fatal(err)
		}
		for i, d := range m.devices {
			if d.Backend == q.backend("x") {
				d.Backend = backend
				return i
			}
		}
		return 0
	}
	orphan, other := pair(p.prefix+"orphan"), pair("thaw-0000000000000000/a")
	for i, d := range m.devices {
		if d.Backend == mine {
			m.Disconnect(i)
		}
	}
	p = start(t, m, state)
	if list, _ := p.List(ctx); len(list) != 1 || list[0].ID != "b" {
		t.Errorf("%+v", list)
	}
	if m.devices[orphan] != nil {
		t.Error("our orphan is still there")
	}
	if m.devices[other] == nil {
		t.Error("somebody else's device was removed")
	}
	// Somebody disconnects b while we serve it: it is shown anew.
	old, _ := p.List(ctx)
	var index uint32
	fmt.Sscanf(old[0].Path, "/dev/nbd%d", &index)
	m.Disconnect(index)
	for p.get("b") != nil && !p.get("b").lost.Load() {
		time.Sleep(time.Millisecond)
	}
	d, err := p.Present(ctx, "b", b, true)
	if err != nil {
		t.Fatal(err)
	}
	m.wantRead(t, d.Path, 512, data[512:1024])
	if err := p.Teardown(ctx); err != nil {
		t.Error(err)
	}
	if m.devices[other] == nil || len(m.devices) != 1 {
		t.Errorf("devices left: %v", m.devices)
	}
}

func TestBadStates(t *testing.T) {
	m := newMachine()
	state := filepath.Join(t.TempDir(), "nbd.json")
	good := stateDisk{Disk: present.Disk{ID: "a", SizeBytes: 512}, Connections: 1}
	for name, change := range map[string]func(*stateDisk){
		"id": func(d *stateDisk) { d.ID = "a/b" }, "size": func(d *stateDisk) { d.SizeBytes = 0 }, "connections": func(d *stateDisk) { d.Connections = 1 << 30 },
	} {
		d := good
		change(&d)
		if err := runstate.Save(state, stateVersion, state1(d)); err != nil {
			t.Fatal(err)
		}
		if _, err := New(context.Background(), Options{StatePath: state, Open: openFile, driver: m}); !errors.Is(err, kind.Corrupt) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := runstate.Save(state, stateVersion+1, state1(good)); err != nil {
		t.Fatal(err)
	}
	if _, err := New(context.Background(), Options{StatePath: state, Open: openFile, driver: m}); !errors.Is(err, kind.Unsupported) {
		t.Errorf("newer: %v", err)
	}
	os.Remove(state)
	p := start(t, m, state)
	if _, err := newPresenter(context.Background(), Options{StatePath: state, Open: openFile, driver: m}, 0); !errors.Is(err, kind.InUse) {
		t.Errorf("a second presenter: %v", err)
	}
	p.Close()
}

func state1(d stateDisk) state { return state{Disks: []stateDisk{d}} }

func TestConcurrentCalls(t *testing.T) {
	defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
	ctx := context.Background()
	m := newMachine()
	p := start(t, m, filepath.Join(t.TempDir(), "nbd.json"))
	ro, _ := image(t, "ro", 1<<20)
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			id := fmt.Sprint("d", i%4)
			for range 20 {
				if d, err := p.Present(ctx, id, ro, true); err != nil {
					t.Error(err)
				} else if i < 4 {
					got := make([]byte, 4096)
					m.do(d.Path, nbd.CmdRead, 0, got) // may be withdrawn by now
				}
				if err := p.Withdraw(ctx, id); err != nil && !errors.Is(err, kind.InUse) {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if err := p.Teardown(ctx); err != nil {
		t.Error(err)
	}
	if len(m.devices) != 0 {
		t.Errorf("%d devices are left", len(m.devices))
	}
}
