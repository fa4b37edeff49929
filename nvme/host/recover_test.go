package host_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/nvme/host"
	"github.com/thaw-project/thaw/target/nvmf"
)

// proxy passes connections on until it is told to cut them, and can stop passing
// bytes while it keeps them open.
type proxy struct {
	l      net.Listener
	to     atomic.Pointer[string]
	refuse atomic.Bool
	stall  atomic.Bool
	wg     sync.WaitGroup

	mu    sync.Mutex
	conns map[net.Conn]struct{}
}

func newProxy(t testing.TB, to string) *proxy {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &proxy{l: l, conns: map[net.Conn]struct{}{}}
	p.to.Store(&to)
	p.wg.Add(1)
	go func() {
		defer p.wg.Done()
		for {
			a, err := l.Accept()
			if err != nil {
				return
			}
			if p.refuse.Load() {
				a.Close()
				continue
			}
			b, err := net.Dial("tcp", *p.to.Load())
			if err != nil {
				a.Close()
				continue
			}
			p.mu.Lock()
			p.conns[a], p.conns[b] = struct{}{}, struct{}{}
			p.mu.Unlock()
			p.wg.Add(2)
			go p.copy(a, b)
			go p.copy(b, a)
		}
	}()
	t.Cleanup(func() { l.Close(); p.stall.Store(false); p.cut(); p.wg.Wait() })
	return p
}

func (p *proxy) copy(a, b net.Conn) {
	defer p.wg.Done()
	buf := make([]byte, 64<<10)
	for {
		n, err := a.Read(buf)
		for p.stall.Load() {
			time.Sleep(time.Millisecond)
		}
		if n > 0 {
			if _, err := b.Write(buf[:n]); err != nil {
				break
			}
		}
		if err != nil {
			break
		}
	}
	a.Close()
	b.Close()
	p.mu.Lock()
	delete(p.conns, a)
	delete(p.conns, b)
	p.mu.Unlock()
}

func (p *proxy) cut() {
	p.mu.Lock()
	for c := range p.conns {
		c.Close()
	}
	p.mu.Unlock()
}

func (p *proxy) addr() string { return p.l.Addr().String() }

// quick is a configuration that gives up and comes back fast.
func quick(portals ...string) host.Config {
	return host.Config{Portals: portals, Queues: 2, DataDigest: true, KeepAlive: 400 * time.Millisecond, IOTimeout: 2 * time.Second,
		ReconnectDelay: 5 * time.Millisecond, ReconnectMax: 50 * time.Millisecond, ConnectTimeout: 2 * time.Second, LossTimeout: 30 * time.Second}
}

// load writes numbered blocks at random places of its own part and verifies what it
// reads, until it is stopped. No operation may fail.
type load struct {
	wg   sync.WaitGroup
	stop atomic.Bool
	ops  atomic.Int64
}

func startLoad(t *testing.T, d *host.Device, workers int) *load {
	l := &load{}
	const block, blocks = 4096, 64
	for w := range workers {
		l.wg.Add(1)
		go func() {
			defer l.wg.Done()
			rng := rand.New(rand.NewPCG(uint64(w), 7))
			var want [blocks]uint64
			p := make([]byte, block)
			for i := uint64(1); !l.stop.Load(); i++ {
				b := rng.IntN(blocks)
				off := int64(w*blocks+b) * block
				for j := 0; j < block; j += 8 {
					binary.LittleEndian.PutUint64(p[j:], i<<8|uint64(w))
				}
				if _, err := d.WriteAt(p, off); err != nil {
					t.Errorf("worker %d write %d: %v", w, i, err)
					return
				}
				want[b] = i<<8 | uint64(w)
				b = rng.IntN(blocks)
				if _, err := d.ReadAt(p, int64(w*blocks+b)*block); err != nil && err != io.EOF {
					t.Errorf("worker %d read %d: %v", w, i, err)
					return
				}
				for j := 0; j < block; j += 8 {
					if got := binary.LittleEndian.Uint64(p[j:]); got != want[b] {
						t.Errorf("worker %d block %d holds %#x at %d, want %#x", w, b, got, j, want[b])
						return
					}
				}
				l.ops.Add(1)
			}
		}()
	}
	return l
}

func (l *load) end() {
	l.stop.Store(true)
	l.wg.Wait()
}

const loadBytes = 8 * 64 * 4096

// progress waits until the load has done n more operations.
func (l *load) progress(t *testing.T, n int64) {
	t.Helper()
	from := l.ops.Load()
	eventually(t, "operations go on", func() error {
		done := l.ops.Load() - from
		return expect(done >= n || t.Failed(), "%d of %d", done, n)
	})
}

// TestCut cuts all connections under load, again and again.
func TestCut(t *testing.T) {
	l := newLab(t, nvmf.Options{R2TBytes: 2048, InCapsule: -1})
	id := l.add(nvmf.NvmeNamespaceConfig{Device: newMemory(loadBytes)})
	p := newProxy(t, l.addr)
	h := l.connect(quick(p.addr()))
	ld := startLoad(t, l.open(h, id), 8)
	for range 10 {
		ld.progress(t, 20)
		p.cut()
	}
	ld.progress(t, 20)
	ld.end()
}

// TestRestart ends the target under load and starts another at the same address with
// the same device: the load sees a pause.
func TestRestart(t *testing.T) {
	l := newLab(t, nvmf.Options{})
	m, u := newMemory(loadBytes), uuid.New()
	id := l.add(nvmf.NvmeNamespaceConfig{Device: m, UUID: u})
	h := l.connect(quick(l.addr))
	ld := startLoad(t, l.open(h, id), 8)
	for range 4 {
		ld.progress(t, 20)
		l.t1.Close()
		l.start()
		l.add(nvmf.NvmeNamespaceConfig{NSID: id, Device: m, UUID: u})
	}
	ld.progress(t, 20)
	ld.end()
}

// TestFailover has two portals: the load goes on over the one that is left, and
// comes back to neither if the other returns.
func TestFailover(t *testing.T) {
	l := newLab(t, nvmf.Options{})
	id := l.add(nvmf.NvmeNamespaceConfig{Device: newMemory(loadBytes)})
	a, b := newProxy(t, l.addr), newProxy(t, l.addr)
	h := l.connect(quick(a.addr(), b.addr()))
	both := func() error {
		up := h.Paths()
		return expect(up[0] && up[1], "paths are %v", up)
	}
	eventually(t, "both paths come up", both)
	ld := startLoad(t, l.open(h, id), 8)
	for i := range 6 {
		ld.progress(t, 20)
		p := []*proxy{a, b}[i%2]
		p.refuse.Store(true)
		p.cut()
		ld.progress(t, 50)
		if up := h.Paths(); up[i%2] {
			t.Errorf("path %d is up without a portal", i%2)
		}
		p.refuse.Store(false)
		eventually(t, "the path comes back", both)
	}
	ld.end()
}

// TestStall has a path that keeps its connection and passes nothing: deadline and
// keep alive find out, on both sides, and the other path takes over.
func TestStall(t *testing.T) {
	l := newLab(t, nvmf.Options{})
	id := l.add(nvmf.NvmeNamespaceConfig{Device: newMemory(loadBytes)})
	a, b := newProxy(t, l.addr), newProxy(t, l.addr)
	b.refuse.Store(true)
	h := l.connect(quick(a.addr(), b.addr()))
	ld := startLoad(t, l.open(h, id), 4)
	ld.progress(t, 20)
	a.stall.Store(true)
	a.refuse.Store(true)
	b.refuse.Store(false)
	ld.progress(t, 20)
	eventually(t, "the target drops the silent controller", func() error {
		n := len(l.t1.Subsystems()[0].Controllers)
		return expect(n == 1, "there are %d", n)
	})
	ld.end()
}

// TestLoss fails I/O when no path comes back in time, and when the host is closed.
func TestLoss(t *testing.T) {
	l := newLab(t, nvmf.Options{})
	id := l.add(nvmf.NvmeNamespaceConfig{Device: newMemory(1 << 20)})
	p := newProxy(t, l.addr)
	c := quick(p.addr())
	c.LossTimeout = 100 * time.Millisecond
	h := l.connect(c)
	d := l.open(h, id)
	p.refuse.Store(true)
	p.cut()
	if _, err := d.ReadAt(make([]byte, 512), 0); !errors.Is(err, kind.Unavailable) {
		t.Errorf("read without a path: %v", err)
	}
	p.refuse.Store(false)
	eventually(t, "I/O works again", func() error {
		_, err := d.ReadAt(make([]byte, 512), 0)
		return err
	})
	c.LossTimeout = time.Minute
	h2 := l.connect(c)
	d2 := l.open(h2, id)
	p.refuse.Store(true)
	p.cut()
	failed := make(chan error, 1)
	go func() { _, err := d2.ReadAt(make([]byte, 512), 0); failed <- err }()
	h2.Close()
	if err := <-failed; err != nil && !errors.Is(err, kind.Unavailable) {
		t.Errorf("read while the host closes: %v", err)
	}
}

// TestTimeout has a device that hangs: the command is ended on its path and sent
// again until the device answers.
func TestTimeout(t *testing.T) {
	l := newLab(t, nvmf.Options{})
	m := newMemory(1 << 20)
	id := l.add(nvmf.NvmeNamespaceConfig{Device: m})
	c := quick(l.addr)
	c.IOTimeout = 150 * time.Millisecond
	h := l.connect(c)
	d := l.open(h, id)
	m.slow.Store(int64(400 * time.Millisecond))
	time.AfterFunc(300*time.Millisecond, func() { m.slow.Store(0) })
	if _, err := d.WriteAt(bytes.Repeat([]byte{7}, 4096), 0); err != nil {
		t.Errorf("write through a slow device: %v", err)
	}
	p := make([]byte, 4096)
	if _, err := d.ReadAt(p, 0); err != nil || p[4095] != 7 {
		t.Errorf("read back: %v", err)
	}
}

// TestLive adds, removes and replaces nvmeNamespaces under a connected host.
func TestLive(t *testing.T) {
	l := newLab(t, nvmf.Options{})
	var changes atomic.Int64
	h := l.connect(host.Config{Changed: func() { changes.Add(1) }})
	ids := func(want ...uint32) {
		t.Helper()
		eventually(t, "the list changes", func() error {
			all := h.NvmeNamespaces()
			ok := len(all) == len(want)
			for i := range all {
				ok = ok && all[i].NSID == want[i]
			}
			return expect(ok, "nvmeNamespaces are %+v, want %v", all, want)
		})
	}
	ids()
	first := l.add(nvmf.NvmeNamespaceConfig{Device: newMemory(1 << 20)})
	ids(1)
	l.add(nvmf.NvmeNamespaceConfig{Device: newMemory(1 << 20)})
	l.add(nvmf.NvmeNamespaceConfig{Device: newMemory(1 << 20)})
	ids(1, 2, 3)
	d := l.open(h, first)
	var wg sync.WaitGroup
	for range 4 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			for {
				if _, err := d.ReadAt(make([]byte, 4096), 0); err != nil {
					if !errors.Is(err, kind.NotFound) {
						t.Errorf("read of a removed nvmeNamespace: %v", err)
					}
					return
				}
			}
		}()
	}
	l.must(l.t1.RemoveNvmeNamespace(subNQN, first))
	wg.Wait()
	ids(2, 3)
	// Another disk under the same number is not the old one.
	l.add(nvmf.NvmeNamespaceConfig{NSID: first, Device: newMemory(2 << 20)})
	ids(1, 2, 3)
	if _, err := d.ReadAt(make([]byte, 4096), 0); !errors.Is(err, kind.NotFound) {
		t.Errorf("the old device reads the new disk: %v", err)
	}
	m := newMemory(1 << 20)
	fourth := l.add(nvmf.NvmeNamespaceConfig{Device: m})
	ids(1, 2, 3, fourth)
	grown := l.open(h, fourth)
	m.resize(3 << 20)
	if _, err := grown.WriteAt(make([]byte, 4096), 1<<20); !errors.Is(err, kind.Invalid) {
		t.Errorf("write past the old end: %v", err)
	}
	l.must(l.t1.ResizeNvmeNamespace(subNQN, fourth))
	eventually(t, "the host sees the new size", func() error { return expect(grown.SizeBytes() == 3<<20, "%d", grown.SizeBytes()) })
	if _, err := grown.WriteAt(make([]byte, 4096), 3<<20-4096); err != nil {
		t.Errorf("write at the new end: %v", err)
	}
	if l.open(h, first).SizeBytes() != 2<<20 || changes.Load() < 4 {
		t.Errorf("size is %d after %d changes", l.open(h, first).SizeBytes(), changes.Load())
	}
}

// TestAccess refuses hosts that are not on the list and drops those taken off it.
func TestAccess(t *testing.T) {
	l := newLab(t, nvmf.Options{})
	l.must(l.t1.AllowAnyHost(subNQN, false))
	const nqn = "nqn.2014-08.org.example:node1"
	c := quick(l.addr)
	c.SubNQN, c.HostNQN = subNQN, nqn
	if _, err := host.Connect(context.Background(), c); !errors.Is(err, kind.Denied) {
		t.Fatalf("a host that is not allowed: %v", err)
	}
	if found, err := host.Discover(context.Background(), l.addr, c); err != nil || len(found) != 0 {
		t.Errorf("it discovers %+v, %v", found, err)
	}
	l.must(l.t1.AddHost(subNQN, nqn))
	h := l.connect(c)
	if found, err := host.Discover(context.Background(), l.addr, c); err != nil || len(found) != 1 {
		t.Errorf("an allowed host discovers %+v, %v", found, err)
	}
	l.must(l.t1.RemoveHost(subNQN, nqn))
	eventually(t, "the path goes", func() error { return expect(!h.Paths()[0], "it is up") })
	if n := len(l.t1.Subsystems()[0].Controllers); n != 0 {
		t.Errorf("%d controllers are left", n)
	}
	c.SubNQN = "nqn.2014-08.org.example:other"
	if _, err := host.Connect(context.Background(), c); !errors.Is(err, kind.Invalid) {
		t.Errorf("a subsystem that does not exist: %v", err)
	}
}

// TestAnyAddress listens at all addresses: discovery gives the one the host came to,
// and removing the listener ends what came through it.
func TestAnyAddress(t *testing.T) {
	l := newLab(t, nvmf.Options{})
	addr, err := l.t1.AddListener(subNQN, nvmf.ListenerConfig{Address: "0.0.0.0:0"})
	l.must(err)
	_, port, err := net.SplitHostPort(addr)
	l.must(err)
	portal := net.JoinHostPort("127.0.0.1", port)
	found, err := host.Discover(context.Background(), portal, host.Config{})
	if err != nil || len(found) != 2 {
		t.Fatalf("discovered %+v, %v", found, err)
	}
	for _, e := range found {
		if e.Address != "127.0.0.1" || e.SubNQN != subNQN || e.Service != port && net.JoinHostPort(e.Address, e.Service) != l.addr {
			t.Errorf("discovered %+v", e)
		}
	}
	h := l.connect(quick(portal, l.addr))
	up := func(want ...bool) {
		t.Helper()
		eventually(t, "paths change", func() error {
			p := h.Paths()
			return expect(p[0] == want[0] && p[1] == want[1], "they are %v", p)
		})
	}
	up(true, true)
	l.must(l.t1.RemoveListener(subNQN, addr))
	up(false, true)
}

// TestAdvertise gives discovery another address than the one it listens at.
func TestAdvertise(t *testing.T) {
	l := newLab(t, nvmf.Options{})
	addr, err := l.t1.AddListener(subNQN, nvmf.ListenerConfig{Address: "127.0.0.1:0", Advertise: "192.0.2.7:0"})
	l.must(err)
	_, port, err := net.SplitHostPort(addr)
	l.must(err)
	_, err = l.t1.AddListener(subNQN, nvmf.ListenerConfig{Address: "127.0.0.1:0", Advertise: "[2001:db8::1]:4420"})
	l.must(err)
	found, err := host.Discover(context.Background(), addr, host.Config{})
	if err != nil {
		t.Fatal(err)
	}
	told := map[string]bool{}
	for _, e := range found {
		told[net.JoinHostPort(e.Address, e.Service)] = true
	}
	if len(told) != 3 || !told[l.addr] || !told["192.0.2.7:"+port] || !told["[2001:db8::1]:4420"] {
		t.Errorf("discovery tells %v", told)
	}
	if _, err := l.t1.AddListener(subNQN, nvmf.ListenerConfig{Address: "127.0.0.1:0", Advertise: "storage.example:4420"}); !errors.Is(err, kind.Invalid) {
		t.Errorf("a name as advertised address: %v", err)
	}
}
