package nbd

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/thaw-project/thaw/kind"
)

func TestMain(m *testing.M) {
	if path := os.Getenv("THAW_TEST_NBD_SERVE"); path != "" {
		serveForBenchmark(path)
		return
	}
	goleak.VerifyTestMain(m)
}

// memory is a device in memory with a map of what was written, in blocks of 4 KiB.
type memory struct {
	mu       sync.RWMutex
	b        []byte
	data     []bool
	readOnly bool
	flushes  atomic.Int64
	delay    atomic.Int64 // nanoseconds each read and write takes
	fail     atomic.Pointer[error]
}

const memoryBlock = 4096

func newMemory(size int) *memory {
	return &memory{b: make([]byte, size), data: make([]bool, (size+memoryBlock-1)/memoryBlock)}
}

func (m *memory) enter() error {
	if d := time.Duration(m.delay.Load()); d > 0 {
		time.Sleep(d)
	}
	if err := m.fail.Load(); err != nil {
		return *err
	}
	return nil
}

func (m *memory) ReadAt(p []byte, off int64) (int, error) {
	if err := m.enter(); err != nil {
		return 0, err
	}
	m.mu.RLock()
	defer m.mu.RUnlock()
	n := copy(p, m.b[off:])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (m *memory) WriteAt(p []byte, off int64) (int, error) {
	if err := m.enter(); err != nil {
		return 0, err
	}
	if m.readOnly {
		return 0, kind.Errorf(kind.ReadOnly, "write")
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for i := off / memoryBlock; i*memoryBlock < off+int64(len(p)); i++ {
		m.data[i] = true
	}
	return copy(m.b[off:], p), nil
}

func (m *memory) Flush() error { m.flushes.Add(1); return m.enter() }

func (m *memory) WriteZeroes(off, n int64) error {
	if err := m.enter(); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	clear(m.b[off : off+n])
	for i := range m.data {
		if at := int64(i) * memoryBlock; at >= off && min(at+memoryBlock, int64(len(m.b))) <= off+n {
			m.data[i] = false
		}
	}
	return nil
}

func (m *memory) Discard(off, n int64) error { return m.WriteZeroes(off, n) }
func (m *memory) SizeBytes() int64           { return int64(len(m.b)) }
func (m *memory) ReadOnly() bool             { return m.readOnly }
func (m *memory) Close() error               { return nil }

// content is a copy of what the device holds.
func (m *memory) content() []byte {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return append([]byte(nil), m.b...)
}

// holds tells whether p is at off.
func (m *memory) holds(off int64, p []byte) bool {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return bytes.Equal(m.b[off:off+int64(len(p))], p)
}

// sparse is a memory that tells where it holds data.
type sparse struct{ *memory }

func (m sparse) Extent(off, n int64) (int64, bool, bool, error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	i := off / memoryBlock
	end := i + 1
	for end*memoryBlock < off+n && m.data[end] == m.data[i] {
		end++
	}
	return min(end*memoryBlock, off+n) - off, !m.data[i], !m.data[i], nil
}

// disk is a file, the device of benchmarks.
type disk struct {
	f    *os.File
	size int64
}

func openDisk(path string) (*disk, error) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	return &disk{f, st.Size()}, nil
}

// Plain pread and pwrite: what a device of the store does.
func (d *disk) ReadAt(p []byte, off int64) (int, error)  { return d.f.ReadAt(p, off) }
func (d *disk) WriteAt(p []byte, off int64) (int, error) { return d.f.WriteAt(p, off) }
func (d *disk) Flush() error                             { return unix.Fdatasync(int(d.f.Fd())) }
func (d *disk) Discard(off, n int64) error {
	return unix.Fallocate(int(d.f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
}
func (d *disk) WriteZeroes(off, n int64) error { return d.Discard(off, n) }
func (d *disk) SizeBytes() int64               { return d.size }
func (d *disk) ReadOnly() bool                 { return false }
func (d *disk) Close() error                   { return d.f.Close() }

// start serves the exports on a Unix socket until the test ends.
func start(t testing.TB, cfg Config, exports ...Export) (*Server, string) {
	t.Helper()
	s := New(cfg)
	for _, e := range exports {
		if err := s.AddExport(e); err != nil {
			t.Fatal(err)
		}
	}
	dir, err := os.MkdirTemp("", "nbd") // t.TempDir may be too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "s")
	if err := s.ListenUnix(path); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		if err := s.Shutdown(ctx); err != nil {
			t.Error(err)
		}
		os.RemoveAll(dir)
	})
	return s, path
}

// tool runs a program, or skips the test where it is not installed.
func tool(t testing.TB, name string, args ...string) string {
	t.Helper()
	out, err := try(t, name, args...)
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return out
}

func try(t testing.TB, name string, args ...string) (string, error) {
	t.Helper()
	if _, err := exec.LookPath(name); err != nil {
		t.Skipf("%s is not installed: run make deps", name)
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	out, err := exec.CommandContext(ctx, name, args...).CombinedOutput()
	if ctx.Err() != nil {
		err = errors.Join(err, fmt.Errorf("%s took longer than a minute", name))
	}
	return string(out), err
}

// serveForBenchmark is the process that benchmarks measure: it serves the file named in
// THAW_TEST_NBD_FILE until its standard input ends.
func serveForBenchmark(path string) {
	d, err := openDisk(os.Getenv("THAW_TEST_NBD_FILE"))
	if err == nil {
		s := New(Config{})
		if err = s.AddExport(Export{Device: d}); err == nil {
			if err = s.ListenUnix(path); err == nil {
				io.Copy(io.Discard, os.Stdin)
				err = s.Shutdown(context.Background())
			}
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
