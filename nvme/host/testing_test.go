package host_test

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/nvme/host"
	"github.com/thaw-project/thaw/target/nvmf"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const subNQN = "nqn.2014-08.org.example:disk"

// memory is a device in memory.
type memory struct {
	mu       sync.RWMutex
	data     []byte // guarded by mu
	readOnly bool
	slow     atomic.Int64 // ns that every access takes
	flushes  atomic.Int64
	fail     atomic.Pointer[error] // what every access fails with
	inside   atomic.Int32
	alone    func() // if set, called when two reads or writes run at a time
}

// visit notes an access until the returned function is called.
func (m *memory) visit() func() {
	if m.alone == nil {
		return func() {}
	}
	if m.inside.Add(1) > 1 {
		m.alone()
	}
	runtime.Gosched() // lets others in, if they may
	return func() { m.inside.Add(-1) }
}

func newMemory(size int64) *memory { return &memory{data: make([]byte, size)} }

func (m *memory) enter(off, n int64) error {
	if d := m.slow.Load(); d > 0 {
		time.Sleep(time.Duration(d))
	}
	if e := m.fail.Load(); e != nil {
		return *e
	}
	if off < 0 || off+n > m.SizeBytes() {
		return kind.Errorf(kind.Invalid, "%d bytes at %d", n, off)
	}
	return nil
}

func (m *memory) resize(n int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.data = append(m.data, make([]byte, n-len(m.data))...)
}

func (m *memory) ReadAt(p []byte, off int64) (int, error) {
	defer m.visit()()
	if err := m.enter(off, int64(len(p))); err != nil {
		return 0, err
	}
	m.mu.RLock()
	defer m.mu.RUnlock()
	n := copy(p, m.data[off:])
	if off+int64(n) == int64(len(m.data)) {
		return n, io.EOF // as io.ReaderAt may
	}
	return n, nil
}

func (m *memory) WriteAt(p []byte, off int64) (int, error) {
	defer m.visit()()
	if err := m.enter(off, int64(len(p))); err != nil {
		return 0, err
	}
	if m.readOnly {
		return 0, kind.Errorf(kind.ReadOnly, "read-only")
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	return copy(m.data[off:], p), nil
}

func (m *memory) Flush() error { m.flushes.Add(1); return m.enter(0, 0) }

func (m *memory) Discard(off, n int64) error {
	if err := m.enter(off, n); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	clear(m.data[off : off+n])
	return nil
}

func (m *memory) WriteZeroes(off, n int64) error { return m.Discard(off, n) }
func (m *memory) SizeBytes() int64               { m.mu.RLock(); defer m.mu.RUnlock(); return int64(len(m.data)) }
func (m *memory) ReadOnly() bool                 { return m.readOnly }
func (m *memory) Close() error                   { return nil }

// logger shows what the packages log when the environment asks for it.
func logger() *slog.Logger {
	if os.Getenv("NVME_LOG") == "" {
		return nil
	}
	return slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug}))
}

// lab is a target with one subsystem.
type lab struct {
	t    testing.TB
	t1   *nvmf.Target
	addr string
	o    nvmf.Options
}

func newLab(t testing.TB, o nvmf.Options) *lab {
	if o.Tick == 0 {
		o.Tick = 20 * time.Millisecond
	}
	o.Log = logger()
	l := &lab{t: t, o: o, addr: "127.0.0.1:0"}
	l.start()
	t.Cleanup(func() { l.t1.Close() })
	return l
}

func (l *lab) start() {
	l.t.Helper()
	var err error
	if l.t1, err = nvmf.New(l.o); err != nil {
		l.t.Fatal(err)
	}
	l.must(l.t1.CreateSubsystem(nvmf.SubsystemConfig{NQN: subNQN, AllowAnyHost: true}))
	if l.addr, err = l.t1.AddListener(subNQN, nvmf.ListenerConfig{Address: l.addr}); err != nil {
		l.t.Fatal(err)
	}
}

func (l *lab) must(err error) {
	l.t.Helper()
	if err != nil {
		l.t.Fatal(err)
	}
}

func (l *lab) add(c nvmf.NvmeNamespaceConfig) uint32 {
	l.t.Helper()
	id, err := l.t1.AddNvmeNamespace(subNQN, c)
	l.must(err)
	return id
}

func (l *lab) connect(c host.Config) *host.Host {
	l.t.Helper()
	if c.Portals == nil {
		c.Portals = []string{l.addr}
	}
	if c.SubNQN == "" {
		c.SubNQN = subNQN
	}
	c.Log = logger()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	h, err := host.Connect(ctx, c)
	l.must(err)
	l.t.Cleanup(func() { h.Close() })
	return h
}

func (l *lab) open(h *host.Host, nsid uint32) *host.Device {
	l.t.Helper()
	d, err := h.Open(nsid)
	l.must(err)
	return d
}

// eventually waits for what happens on other goroutines; the limit is only there to
// end a test that has failed.
func eventually(t testing.TB, what string, f func() error) {
	t.Helper()
	var err error
	for begin := time.Now(); time.Since(begin) < 20*time.Second; time.Sleep(5 * time.Millisecond) {
		if err = f(); err == nil {
			return
		}
	}
	t.Fatalf("%s: %v", what, err)
}

func expect(ok bool, format string, args ...any) error {
	if ok {
		return nil
	}
	return fmt.Errorf(format, args...)
}
