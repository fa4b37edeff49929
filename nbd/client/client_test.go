package client

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/nbd"
	server "github.com/thaw-project/thaw/target/nbd"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// process is a server in a process of its own on a Unix socket.
type process struct {
	socket string
	args   []string
	cmd    *exec.Cmd
}

// launch runs a server; SOCKET in args is replaced. Its first argument is the program, and
// the test is skipped where it is not installed.
func launch(t testing.TB, dir string, args ...string) *process {
	t.Helper()
	if _, err := exec.LookPath(args[0]); err != nil {
		t.Skipf("%s is not installed: run make deps", args[0])
	}
	p := &process{socket: filepath.Join(dir, "s")}
	for _, a := range args {
		if a == "SOCKET" {
			a = p.socket
		}
		p.args = append(p.args, a)
	}
	p.start(t)
	t.Cleanup(p.kill)
	return p
}

func (p *process) start(t testing.TB) {
	t.Helper()
	os.Remove(p.socket)
	p.cmd = exec.Command(p.args[0], p.args[1:]...)
	var out bytes.Buffer
	p.cmd.Stderr, p.cmd.Stdout = &out, &out
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	for range 1000 {
		if c, err := net.Dial("unix", p.socket); err == nil {
			c.Close()
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	p.kill()
	t.Fatalf("%v does not listen: %s", p.args, out.String())
}

func (p *process) kill() {
	if p.cmd != nil {
		p.cmd.Process.Kill()
		p.cmd.Wait()
		p.cmd = nil
	}
}

// shortDir is a directory whose path fits a socket address.
func shortDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "nbd")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func image(t testing.TB, dir string, size int64) string {
	t.Helper()
	path := filepath.Join(dir, "image")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	return path
}

func open(t testing.TB, cfg Config) *Device {
	t.Helper()
	d, err := Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
	return d
}

// exercise runs random operations of any alignment and compares with a model.
func exercise(t *testing.T, d *Device, size int64) {
	t.Helper()
	if d.SizeBytes() != size {
		t.Fatalf("size %d, want %d", d.SizeBytes(), size)
	}
	r := rand.New(rand.NewPCG(3, uint64(size)))
	model := make([]byte, size)
	if _, err := d.ReadAt(model, 0); err != nil {
		t.Fatal(err)
	}
	span := func() (int64, int64) {
		n := 1 + r.Int64N(1<<uint(1+r.IntN(17)))
		off := r.Int64N(size)
		if r.IntN(2) == 0 {
			off, n = off&^4095, (n+4095)&^4095
		}
		return off, min(n, size-off)
	}
	for i := range 250 {
		off, n := span()
		var err error
		switch r.IntN(6) {
		case 0, 1:
			p := make([]byte, n)
			for j := range p {
				p[j] = byte(r.Uint32())
			}
			copy(model[off:], p)
			_, err = d.WriteAt(p, off)
		case 2:
			clear(model[off : off+n])
			err = d.WriteZeroes(off, n)
		case 3:
			clear(model[off : off+n])
			err = d.Discard(off, n)
		case 4:
			if i%8 == 0 {
				if err := d.Flush(); err != nil {
					t.Fatal(err)
				}
			}
			var m int64
			var zero bool
			m, _, zero, err = d.Extent(off, n)
			if err == nil && (m <= 0 || m > n || zero && len(bytes.Trim(model[off:off+m], "\x00")) > 0) {
				t.Fatalf("extent of %d at %d: %d bytes, zero %v", n, off, m, zero)
			}
		default:
			p := make([]byte, n)
			_, err = d.ReadAt(p, off)
			if err == nil && !bytes.Equal(p, model[off:off+n]) {
				t.Fatalf("read of %d bytes at %d gives something else", n, off)
			}
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	got := make([]byte, size+100)
	if n, err := d.ReadAt(got, 0); int64(n) != size || err != io.EOF {
		t.Fatalf("read past the end: %d, %v", n, err)
	}
	if !bytes.Equal(got[:size], model) {
		t.Fatal("the disk differs at the end")
	}
	if _, err := d.WriteAt(make([]byte, 1024), size-512); kind.Of(err) != kind.Invalid {
		t.Errorf("write past the end: %v", err)
	}
	if _, err := d.ReadAt(got[:1], size); err != io.EOF {
		t.Errorf("read at the end: %v", err)
	}
}

func TestServers(t *testing.T) {
	const size = 1<<20 + 512
	for name, args := range map[string][]string{
		"nbdkit memory":            {"nbdkit", "-f", "-U", "SOCKET", "memory", "1049088"},
		"nbdkit simple replies":    {"nbdkit", "-f", "--no-sr", "-U", "SOCKET", "memory", "1049088"},
		"nbdkit file":              {"nbdkit", "-f", "-U", "SOCKET", "file", "IMAGE"},
		"nbdkit blocks":            {"nbdkit", "-f", "-U", "SOCKET", "--filter=blocksize-policy", "memory", "1048576", "blocksize-minimum=4096", "blocksize-maximum=65536", "blocksize-error-policy=error"},
		"nbdkit without zeroes":    {"nbdkit", "-f", "-U", "SOCKET", "--filter=nozero", "memory", "1049088"},
		"nbdkit single connection": {"nbdkit", "-f", "-U", "SOCKET", "--filter=multi-conn", "memory", "1049088", "multi-conn-mode=disable"},
		"qemu-nbd":                 {"qemu-nbd", "-f", "raw", "-t", "-e", "8", "--discard=unmap", "-k", "SOCKET", "IMAGE"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := shortDir(t)
			size := int64(size)
			for i, a := range args {
				if a == "IMAGE" {
					args[i] = image(t, dir, size)
				}
				if a == "1048576" {
					size = 1 << 20
				}
			}
			p := launch(t, dir, args...)
			d := open(t, Config{Network: "unix", Address: p.socket})
			if single := name == "nbdkit single connection"; single != (len(d.links) == 1) {
				t.Errorf("%d connections", len(d.links))
			}
			exercise(t, d, size)
		})
	}
}

// ram is the smallest device: memory.
type ram struct {
	mu sync.RWMutex
	b  []byte
}

func (m *ram) ReadAt(p []byte, off int64) (int, error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return copy(p, m.b[off:]), nil
}

func (m *ram) WriteAt(p []byte, off int64) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return copy(m.b[off:], p), nil
}

func (m *ram) WriteZeroes(off, n int64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	clear(m.b[off : off+n])
	return nil
}
func (m *ram) Discard(off, n int64) error { return m.WriteZeroes(off, n) }
func (m *ram) Flush() error               { return nil }
func (m *ram) SizeBytes() int64           { return int64(len(m.b)) }
func (m *ram) ReadOnly() bool             { return false }
func (m *ram) Close() error               { return nil }

// own serves a device with our server, until the returned function is called.
func own(t testing.TB, socket string, e server.Export) func() {
	t.Helper()
	s := server.New(server.Config{})
	if err := s.AddExport(e); err != nil {
		t.Fatal(err)
	}
	if err := s.ListenUnix(socket); err != nil {
		t.Fatal(err)
	}
	return sync.OnceFunc(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		if err := s.Shutdown(ctx); err != nil {
			t.Error(err)
		}
	})
}

func TestOwnServer(t *testing.T) {
	for name, e := range map[string]server.Export{
		"bytes":  {Device: &ram{b: make([]byte, 3<<20+512)}},
		"blocks": {Device: &ram{b: make([]byte, 3<<20)}, MinBlock: 4096},
	} {
		t.Run(name, func(t *testing.T) {
			socket := filepath.Join(shortDir(t), "s")
			t.Cleanup(own(t, socket, e))
			d := open(t, Config{Network: "unix", Address: socket})
			if !d.s.extended || !d.s.allocation || len(d.links) != 4 {
				t.Errorf("agreed on %+v, %d connections", d.s, len(d.links))
			}
			exercise(t, d, e.Device.SizeBytes())
		})
	}
}

// TestRestart kills the server again and again under readers and writers, none of which
// may notice.
func TestRestart(t *testing.T) {
	const size, workers = 4 << 20, 8
	dir := shortDir(t)
	p := launch(t, dir, "nbdkit", "-f", "-U", "SOCKET", "file", image(t, dir, size))
	d := open(t, Config{Network: "unix", Address: p.socket, BackoffMax: 50 * time.Millisecond})
	var stop atomic.Bool
	var done [workers]int
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(4, uint64(w)))
			const part = size / workers
			model := make([]byte, part)
			for !stop.Load() {
				off := r.Int64N(part - 8192)
				p := make([]byte, 1+r.IntN(8192))
				if r.IntN(2) == 0 {
					for i := range p {
						p[i] = byte(r.Uint32())
					}
					copy(model[off:], p)
					if _, err := d.WriteAt(p, int64(w*part)+off); err != nil {
						t.Error(err)
						return
					}
				} else if _, err := d.ReadAt(p, int64(w*part)+off); err != nil {
					t.Error(err)
					return
				} else if !bytes.Equal(p, model[off:off+int64(len(p))]) {
					t.Errorf("worker %d reads something else at %d", w, off)
					return
				}
				done[w]++
			}
		})
	}
	for range 4 {
		time.Sleep(100 * time.Millisecond)
		p.kill()
		time.Sleep(30 * time.Millisecond)
		p.start(t)
	}
	time.Sleep(200 * time.Millisecond)
	stop.Store(true)
	wg.Wait()
	for w, n := range done {
		if n == 0 {
			t.Errorf("worker %d did nothing", w)
		}
	}
	if err := d.Flush(); err != nil {
		t.Error(err)
	}
}

// TestSilentServer lets a connection fall silent: its requests move to another.
func TestSilentServer(t *testing.T) {
	socket := filepath.Join(shortDir(t), "s")
	m := &ram{b: bytes.Repeat([]byte{7}, 1<<20)}
	t.Cleanup(own(t, socket, server.Export{Device: m}))
	var silent atomic.Int32
	d := open(t, Config{Address: "silent", Connections: 2, RequestTimeout: 100 * time.Millisecond, Dial: func(ctx context.Context) (net.Conn, error) {
		var nd net.Dialer
		c, err := nd.DialContext(ctx, "unix", socket)
		return &muted{Conn: c, silent: &silent}, err
	}})
	p := make([]byte, 4096)
	if _, err := d.ReadAt(p, 0); err != nil || p[4095] != 7 {
		t.Fatalf("%v, %d", err, p[4095])
	}
	silent.Store(1)
	if _, err := d.ReadAt(p, 8192); err != nil {
		t.Fatal(err)
	}
	if silent.Load() == 1 {
		t.Error("nothing was swallowed: the test shows nothing")
	}
}

// muted swallows one read's data when silent is 1, and blocks instead.
type muted struct {
	net.Conn
	silent *atomic.Int32
}

func (c *muted) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if err == nil && c.silent.CompareAndSwap(1, 2) {
		for err == nil {
			_, err = c.Conn.Read(p) // until it is closed
		}
		return 0, err
	}
	return n, err
}

func TestLoss(t *testing.T) {
	socket := filepath.Join(shortDir(t), "s")
	stop := own(t, socket, server.Export{Device: &ram{b: make([]byte, 1<<20)}})
	t.Cleanup(stop)
	d := open(t, Config{Network: "unix", Address: socket, LossTimeout: 300 * time.Millisecond, BackoffMax: 50 * time.Millisecond})
	stop()
	if _, err := d.WriteAt(make([]byte, 100), 0); kind.Of(err) != kind.Unavailable {
		t.Errorf("write without a server: %v", err)
	}
	// Close ends waiting.
	d2cfg := d.cfg
	d2cfg.LossTimeout = time.Hour
	t.Cleanup(own(t, socket, server.Export{Device: &ram{b: make([]byte, 1<<20)}}))
	d2 := open(t, d2cfg)
	var err error
	for range 20 { // each tries for 300 ms
		if _, err = d.WriteAt(make([]byte, 100), 0); err == nil {
			break
		}
	}
	if err != nil {
		t.Errorf("write with the server back: %v", err)
	}
	errs := make(chan error)
	d2.cancel()
	go func() { errs <- d2.Flush() }()
	d2.Close()
	if err := <-errs; kind.Of(err) != kind.Unavailable {
		t.Errorf("flush of a closed device: %v", err)
	}
}

func TestOpenErrors(t *testing.T) {
	socket := filepath.Join(shortDir(t), "s")
	if _, err := Open(t.Context(), Config{Network: "unix", Address: socket}); kind.Of(err) != kind.Unavailable {
		t.Errorf("no server: %v", err)
	}
	t.Cleanup(own(t, socket, server.Export{Name: "a", Device: &ram{b: make([]byte, 1<<20)}, ReadOnly: true}))
	if _, err := Open(t.Context(), Config{Network: "unix", Address: socket, Export: "b"}); kind.Of(err) != kind.NotFound {
		t.Errorf("no such export: %v", err)
	}
	d := open(t, Config{Network: "unix", Address: socket, Export: "a"})
	if _, err := d.WriteAt([]byte("x"), 0); kind.Of(err) != kind.ReadOnly || !d.ReadOnly() {
		t.Errorf("write to a read-only export: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Open(ctx, Config{Network: "unix", Address: socket, Export: "a"}); err == nil {
		t.Error("opened though canceled")
	}
}

func TestOddSize(t *testing.T) {
	p := launch(t, shortDir(t), "nbdkit", "-f", "-U", "SOCKET", "memory", "1000003")
	if _, err := Open(t.Context(), Config{Network: "unix", Address: p.socket}); kind.Of(err) != kind.Unsupported {
		t.Errorf("a size that is no multiple of 512: %v", err)
	}
}

// script is a connection whose peer sends prepared bytes and takes everything.
type script struct {
	io.Reader
	net.Conn
}

func (s *script) Read(p []byte) (int, error)       { return s.Reader.Read(p) }
func (s *script) Write(p []byte) (int, error)      { return len(p), nil }
func (s *script) Close() error                     { return nil }
func (s *script) SetDeadline(time.Time) error      { return nil }
func (s *script) SetWriteDeadline(time.Time) error { return nil }

// FuzzNegotiate plays a server that may send anything.
func FuzzNegotiate(f *testing.F) {
	var hello []byte
	hello = append(hello, "NBDMAGICIHAVEOPT\x00\x03"...)
	f.Add(hello)
	full := nbd.AppendOptionReply(hello, nbd.OptExtendedHeaders, nbd.RepErrUnsup, nil)
	full = nbd.AppendOptionReply(full, nbd.OptStructuredReply, nbd.RepAck, nil)
	full = nbd.AppendOptionReply(full, nbd.OptSetMetaContext, nbd.RepMetaContext, []byte("\x00\x00\x00\x01base:allocation"))
	full = nbd.AppendOptionReply(full, nbd.OptSetMetaContext, nbd.RepAck, nil)
	full = nbd.AppendOptionReply(full, nbd.OptGo, nbd.RepInfo, []byte("\x00\x00\x00\x00\x00\x00\x00\x10\x00\x00\x00\x01"))
	full = nbd.AppendOptionReply(full, nbd.OptGo, nbd.RepInfo, []byte("\x00\x03\x00\x00\x02\x00\x00\x00\x10\x00\x02\x00\x00\x00"))
	full = nbd.AppendOptionReply(full, nbd.OptGo, nbd.RepAck, nil)
	f.Add(full)
	if s, err := negotiate(&script{}, bufio.NewReader(bytes.NewReader(full)), "x"); err != nil || s.size != 1<<20 || s.minBlock != 512 || !s.allocation {
		f.Fatalf("%+v, %v", s, err)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := negotiate(&script{}, bufio.NewReader(bytes.NewReader(b)), "x")
		if err == nil && (s.size < 0 || s.minBlock < 1 || s.maxRequest < s.minBlock || s.maxRequest > defaultMaxRequest) {
			t.Errorf("agreed on %+v", s)
		}
		if err != nil && kind.Of(err) == "" {
			t.Errorf("no kind: %v", err)
		}
	})
}

// FuzzReplies plays a server that answers a read and a block status with anything.
func FuzzReplies(f *testing.F) {
	chunk := func(cookie uint64, kind uint16, flags uint16, data string, extended bool) []byte {
		b := make([]byte, nbd.ExtendedChunkBytes)
		c := nbd.Chunk{Type: kind, Flags: flags, Cookie: cookie, Length: uint64(len(data))}
		return append(b[:c.Encode(b, extended)], data...)
	}
	const at = "\x00\x00\x00\x00\x00\x00\x02\x00"
	f.Add(append(chunk(1<<16, nbd.ReplyOffsetData, 0, at+"abcd", false), chunk(1<<16, nbd.ReplyOffsetHole, 1, "\x00\x00\x00\x00\x00\x00\x02\x04\x00\x00\x01\xfc", false)...), byte(1))
	f.Add(chunk(1<<16, nbd.ReplyError, 1, "\x00\x00\x00\x05\x00\x02hm", false), byte(1))
	f.Add(chunk(2<<16|1, nbd.ReplyBlockStatusExt, 1, "\x00\x00\x00\x01\x00\x00\x00\x01"+at+at, true), byte(3))
	f.Add([]byte("\x67\x44\x66\x98\x00\x00\x00\x00\x00\x00\x00\x00\x00\x01\x00\x00"), byte(0))
	f.Fuzz(func(t *testing.T, b []byte, mode byte) {
		d := &Device{cfg: Config{MaxInflight: 2}}
		l := newLink(d)
		read, status := newCall(), newCall()
		read.req = nbd.Request{Type: nbd.CmdRead, Cookie: 1 << 16, Offset: 512, Length: 512}
		guard := make([]byte, 1536)
		read.into = guard[512:1024]
		status.req = nbd.Request{Type: nbd.CmdBlockStatus, Cookie: 2<<16 | 1, Length: 512}
		var e extent
		status.extent = &e
		l.calls[0], l.calls[1] = read, status
		c := &connection{Conn: &script{}, r: bufio.NewReader(bytes.NewReader(b)), s: session{structured: mode&1 != 0, extended: mode&3 == 3, contextID: 1}}
		if err := l.receive(c); err == nil {
			t.Error("it never ends")
		}
		l.down(c)
		<-read.done
		<-status.done
		if read.err == nil && !read.lost && read.got != 512 {
			t.Errorf("a read ended with %d bytes", read.got)
		}
		if len(bytes.Trim(guard[:512], "\x00")) > 0 || len(bytes.Trim(guard[1024:], "\x00")) > 0 {
			t.Error("wrote beside the buffer")
		}
	})
}

func TestErrors(t *testing.T) {
	for e, want := range map[nbd.Errno]kind.Kind{nbd.EPERM: kind.Denied, nbd.EIO: kind.IO, nbd.ENOSPC: kind.NoSpace, nbd.ENOTSUP: kind.Unsupported, 4711: kind.Invalid} {
		if e.Kind() != want {
			t.Errorf("%d is %v", e, e.Kind())
		}
	}
	if nbd.ErrnoOf(errors.New("?")) != nbd.EIO || nbd.ErrnoOf(kind.Errorf(kind.Corrupt, "x")) != nbd.EIO || nbd.ErrnoOf(kind.Errorf(kind.NoSpace, "x")) != nbd.ENOSPC {
		t.Error("kinds map wrongly")
	}
}

// BenchmarkRead reads 4 KiB blocks from our own server in the same process.
func BenchmarkRead(b *testing.B) {
	socket := filepath.Join(shortDir(b), "s")
	b.Cleanup(own(b, socket, server.Export{Device: &ram{b: make([]byte, 16<<20)}}))
	d, err := Open(b.Context(), Config{Network: "unix", Address: socket})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { d.Close() })
	for _, depth := range []int{1, 8, 32} {
		b.Run(fmt.Sprintf("qd%d", depth), func(b *testing.B) {
			b.ReportAllocs()
			var wg sync.WaitGroup
			for w := range depth {
				wg.Go(func() {
					p := make([]byte, 4096)
					for i := range b.N / depth {
						if _, err := d.ReadAt(p, int64((i*8191+w*97)%4096)*4096); err != nil {
							b.Error(err)
							return
						}
					}
				})
			}
			wg.Wait()
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "IOPS")
		})
	}
}
