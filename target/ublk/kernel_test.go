package ublk

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/target/bdev"
	"github.com/thaw-project/thaw/target/malloc"
)

// Tests named TestKernel need a kernel with ublk, and root. On a machine without they
// run in a guest: see TestGuest.

// serverArg makes the test binary a process that serves a device, and can be killed.
const serverArg = "ublk-test-server"

func TestMain(m *testing.M) {
	if len(os.Args) == 3 && os.Args[1] == serverArg {
		serverMain(os.Args[2])
	}
	flag.Parse()
	os.Exit(m.Run())
}

func needUblk(t *testing.T) {
	t.Helper()
	if err := Probe(); err != nil {
		t.Skipf("no ublk here: %v", err)
	}
	t.Cleanup(func() { leftovers(t) })
}

// leftovers fails a test that leaves devices.
func leftovers(t *testing.T) {
	list, err := List()
	if err != nil {
		t.Error(err)
	}
	for _, i := range list {
		t.Errorf("left behind: %+v", i)
		Delete(context.Background(), i.ID)
	}
}

func testLog() *slog.Logger {
	return slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug}))
}

// start shows a device for the length of a test.
func start(t *testing.T, o Options) *Server {
	t.Helper()
	o.Logger = testLog()
	if o.ID == 0 {
		o.ID = -1
	}
	s, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Stop(context.Background()); err != nil && !errors.Is(err, kind.Unavailable) {
			t.Errorf("stop: %v", err)
		}
	})
	if err := s.Start(context.Background()); err != nil {
		t.Fatal(err)
	}
	path, data := s.Tuning()
	if err := os.WriteFile(path, []byte(data), 0); err != nil {
		t.Fatal(err)
	}
	return s
}

// direct opens a block device without the page cache.
func direct(t *testing.T, path string, flags int) *os.File {
	t.Helper()
	f, err := os.OpenFile(path, flags|unix.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// aligned is memory for direct I/O.
func aligned(t *testing.T, n int) []byte {
	t.Helper()
	b, err := unix.Mmap(-1, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Munmap(b) })
	return b
}

func blockIoctl(t *testing.T, f *os.File, req uint, arg unsafe.Pointer) {
	t.Helper()
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), uintptr(req), uintptr(arg)); errno != 0 {
		t.Fatalf("ioctl %#x: %v", req, errno)
	}
}

func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

const testBytes = 16 << 20

// TestKernelIO compares the disk with what is behind it, for each way that requests are
// handled.
func TestKernelIO(t *testing.T) {
	needUblk(t)
	for name, o := range map[string]Options{
		"adaptive":   {},
		"by queue":   {dispatch: byQueue},
		"by workers": {dispatch: byWorkers},
		"two queues": {anyQueues: true, Queues: 2},
		"shallow":    {Depth: 1, MaxIOBytes: 4096},
		"4k blocks":  {BlockBytes: 4096},
	} {
		t.Run(name, func(t *testing.T) {
			d := memory(t, testBytes)
			o.Device = d
			s := start(t, o)
			f := direct(t, s.Path(), os.O_RDWR)
			var size uint64
			blockIoctl(t, f, unix.BLKGETSIZE64, unsafe.Pointer(&size))
			block, err := unix.IoctlGetInt(int(f.Fd()), unix.BLKSSZGET)
			if err != nil || size != testBytes || block != s.o.BlockBytes {
				t.Errorf("%d bytes in blocks of %d, %v", size, block, err)
			}
			random := rand.New(rand.NewPCG(1, 2))
			buf, behind := aligned(t, 256<<10), make([]byte, 256<<10)
			for range 50 {
				n := (1 + random.IntN(64)) * 4096
				off := int64(random.IntN((testBytes-n)/4096)) * 4096
				for i := range buf[:n] {
					buf[i] = byte(random.Uint32())
				}
				if _, err := f.WriteAt(buf[:n], off); err != nil {
					t.Fatal(err)
				}
				if _, err := d.ReadAt(behind[:n], off); err != nil && err != io.EOF || !bytes.Equal(buf[:n], behind[:n]) {
					t.Fatalf("%d bytes at %d are not behind the disk: %v", n, off, err)
				}
				clear(buf[:n])
				if _, err := f.ReadAt(buf[:n], off); err != nil || !bytes.Equal(buf[:n], behind[:n]) {
					t.Fatalf("%d bytes at %d read otherwise: %v", n, off, err)
				}
			}
			for req, name := range map[uint]string{unix.BLKDISCARD: "discard", unix.BLKZEROOUT: "zeroes"} {
				for i := range behind {
					behind[i] = 0xff
				}
				d.WriteAt(behind, 1<<20)
				span := [2]uint64{1<<20 + 4096, 64 << 10}
				blockIoctl(t, f, req, unsafe.Pointer(&span[0]))
				d.ReadAt(behind, 1<<20)
				if behind[4095] != 0xff || !bytes.Equal(behind[4096:4096+64<<10], make([]byte, 64<<10)) || behind[4096+64<<10] != 0xff {
					t.Errorf("%s did something else", name)
				}
			}
			if err := unix.Fsync(int(f.Fd())); err != nil || s.Stats().Flushes.Load() == 0 {
				t.Errorf("flush: %v, %d flushes", err, s.Stats().Flushes.Load())
			}
			st := s.Stats()
			t.Logf("%d by the queue, %d by workers", st.ByQueue.Load(), st.ByWorkers.Load())
			if st.Errors.Load() != 0 {
				t.Errorf("%d errors", st.Errors.Load())
			}
		})
	}
}

func TestKernelReadOnly(t *testing.T) {
	needUblk(t)
	s := start(t, Options{Device: memory(t, testBytes), ReadOnly: true})
	if _, err := os.OpenFile(s.Path(), os.O_RDWR, 0); err == nil {
		// Linux lets it be opened; writing is what fails.
		f := direct(t, s.Path(), os.O_RDWR)
		if _, err := f.WriteAt(aligned(t, 4096), 0); err == nil {
			t.Error("a read-only disk was written")
		}
	}
	f := direct(t, s.Path(), os.O_RDONLY)
	if ro, err := unix.IoctlGetInt(int(f.Fd()), unix.BLKROGET); err != nil || ro != 1 {
		t.Errorf("read-only is %d, %v", ro, err)
	}
	if _, err := f.ReadAt(aligned(t, 4096), 0); err != nil {
		t.Error(err)
	}
}

// broken fails as told.
type broken struct {
	*malloc.Device
	err atomic.Pointer[error]
}

func (b *broken) ReadAt(p []byte, off int64) (int, error) {
	if err := b.err.Load(); err != nil {
		return 0, *err
	}
	return b.Device.ReadAt(p, off)
}

func (b *broken) WriteAt(p []byte, off int64) (int, error) {
	if err := b.err.Load(); err != nil {
		return 0, *err
	}
	return b.Device.WriteAt(p, off)
}

func TestKernelErrors(t *testing.T) {
	needUblk(t)
	d := &broken{Device: memory(t, testBytes)}
	s := start(t, Options{Device: d})
	f, buf := direct(t, s.Path(), os.O_RDWR), aligned(t, 4096)
	for k, errno := range map[kind.Kind]unix.Errno{kind.NoSpace: unix.ENOSPC, kind.Unavailable: unix.EIO, kind.Corrupt: unix.EIO} {
		err := kind.Errorf(k, "a test")
		d.err.Store(&err)
		if _, err := f.WriteAt(buf, 0); !errors.Is(err, errno) {
			t.Errorf("%s: write gives %v", k, err)
		}
		if _, err := f.ReadAt(buf, 0); k != kind.NoSpace && !errors.Is(err, errno) {
			t.Errorf("%s: read gives %v", k, err)
		}
	}
	d.err.Store(nil)
	if _, err := f.ReadAt(buf, 0); err != nil {
		t.Errorf("after the errors: %v", err)
	}
}

// stuck keeps reads at 1 MiB until it is let go.
type stuck struct {
	*malloc.Device
	entered, release chan struct{}
}

func (s *stuck) ReadAt(p []byte, off int64) (int, error) {
	if off == 1<<20 {
		s.entered <- struct{}{}
		<-s.release
	}
	return s.Device.ReadAt(p, off)
}

// TestKernelSlow shows that a request which takes long keeps no other waiting.
func TestKernelSlow(t *testing.T) {
	needUblk(t)
	d := &stuck{memory(t, testBytes), make(chan struct{}), make(chan struct{})}
	s := start(t, Options{Device: d, Depth: 8, dispatch: byWorkers})
	var all sync.WaitGroup
	for range 4 {
		f, buf := direct(t, s.Path(), os.O_RDONLY), aligned(t, 4096)
		all.Go(func() {
			if _, err := f.ReadAt(buf, 1<<20); err != nil {
				t.Error(err)
			}
		})
		<-d.entered
	}
	f, buf := direct(t, s.Path(), os.O_RDONLY), aligned(t, 4096)
	for i := range 20 {
		if _, err := f.ReadAt(buf, int64(i)*4096); err != nil {
			t.Fatal(err)
		}
	}
	// Nor does a stop that cannot finish.
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	if err := s.Halt(ctx); !errors.Is(err, kind.Unavailable) {
		t.Errorf("halt: %v", err)
	}
	close(d.release)
	all.Wait()
	if err := s.Stop(context.Background()); err != nil {
		t.Error(err)
	}
}

func TestKernelFio(t *testing.T) {
	needUblk(t)
	needTool(t, "fio")
	for name, how := range map[string]dispatch{"by queue": byQueue, "by workers": byWorkers} {
		t.Run(name, func(t *testing.T) {
			s := start(t, Options{Device: memory(t, testBytes), dispatch: how})
			out := run(t, "fio", "--name=v", "--filename="+s.Path(), "--direct=1", "--ioengine=libaio", "--iodepth=16", "--rw=randwrite",
				"--bsrange=4k-64k", "--bs_unaligned=0", "--size=8m", "--verify=crc32c", "--verify_fatal=1", "--fsync=32", "--allow_file_create=0")
			if !strings.Contains(out, "err= 0") {
				t.Error(out)
			}
		})
	}
}

func needTool(t *testing.T, tool string) {
	t.Helper()
	if _, err := exec.LookPath(tool); err != nil {
		t.Skipf("%s is not installed: run make deps", tool)
	}
}

// TestKernelHandover passes a device from one server to the next in one process while
// it is read.
func TestKernelHandover(t *testing.T) {
	needUblk(t)
	d := memory(t, testBytes)
	o := Options{Device: d, ID: -1, Owner: 42, Logger: testLog()}
	s := start(t, o)
	o.ID = s.ID()
	f, buf := direct(t, s.Path(), os.O_RDONLY), aligned(t, 4096)
	var reads atomic.Int64
	stop := make(chan struct{})
	var reader sync.WaitGroup
	reader.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			if _, err := f.ReadAt(buf, 8192); err != nil {
				t.Errorf("read: %v", err)
				return
			}
			reads.Add(1)
		}
	})
	for range 5 {
		for seen := reads.Load(); reads.Load() < seen+3; {
			time.Sleep(time.Millisecond)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		wrong := o
		wrong.Owner = 43
		if _, err := Recover(context.Background(), wrong); !errors.Is(err, kind.Denied) {
			t.Fatalf("with another owner: %v", err)
		}
		wrong = o
		wrong.Device = memory(t, testBytes/2)
		if _, err := Recover(context.Background(), wrong); !errors.Is(err, kind.Corrupt) {
			t.Fatalf("with another size: %v", err)
		}
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		var err error
		s, err = Recover(ctx, o)
		cancel()
		if err != nil {
			t.Fatal(err)
		}
	}
	for seen := reads.Load(); reads.Load() < seen+3; {
		time.Sleep(time.Millisecond)
	}
	close(stop)
	reader.Wait()
	f.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	if _, err := Recover(ctx, o); !errors.Is(err, kind.InUse) {
		t.Errorf("while it is served: %v", err)
	}
	if err := s.Stop(context.Background()); err != nil {
		t.Fatal(err)
	}
	if _, err := Recover(context.Background(), o); !errors.Is(err, kind.NotFound) {
		t.Errorf("when it is gone: %v", err)
	}
}

// TestKernelRounds makes and removes devices, one after the other and many at once.
func TestKernelRounds(t *testing.T) {
	needUblk(t)
	d := memory(t, testBytes)
	for range 100 {
		s, err := New(Options{Device: d, ID: -1})
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Start(context.Background()); err != nil {
			t.Fatal(err)
		}
		if err := s.Stop(context.Background()); err != nil {
			t.Fatal(err)
		}
		select {
		case <-s.Gone():
		default:
			t.Fatal("stopped and not gone")
		}
	}
	leftovers(t)
	var all sync.WaitGroup
	servers := make([]*Server, 50)
	for i := range servers {
		all.Go(func() {
			s, err := New(Options{Device: d, ID: 100 + i, Depth: 4})
			if err == nil {
				err = s.Start(context.Background())
			}
			if err != nil {
				t.Errorf("%d: %v", i, err)
			}
			servers[i] = s
		})
	}
	all.Wait()
	if _, err := New(Options{Device: d, ID: 100}); !errors.Is(err, kind.Exists) {
		t.Errorf("a number that is taken: %v", err)
	}
	list, err := List()
	if err != nil || len(list) != len(servers) {
		t.Errorf("%d devices, %v", len(list), err)
	}
	for _, i := range list {
		if i.State != Live || i.Depth != 4 || i.PID != os.Getpid() || !i.Recoverable {
			t.Errorf("%+v", i)
		}
	}
	for _, s := range servers {
		if s != nil {
			all.Go(func() {
				if err := s.Stop(context.Background()); err != nil {
					t.Error(err)
				}
			})
		}
	}
	all.Wait()
}

// TestKernelDeletedByOthers has somebody else take a served device away.
func TestKernelDeletedByOthers(t *testing.T) {
	needUblk(t)
	s := start(t, Options{Device: memory(t, testBytes)})
	go Delete(context.Background(), s.ID())
	<-s.Gone()
	if err := s.Stop(context.Background()); err != nil {
		t.Error(err)
	}
}

// file is a bdev.Device on a file: what is written is in the page cache, and so
// survives SIGKILL.
type file struct {
	f     *os.File
	size  int64
	delay time.Duration
}

func (d *file) ReadAt(b []byte, off int64) (int, error) {
	time.Sleep(d.delay)
	return d.f.ReadAt(b, off)
}

func (d *file) WriteAt(b []byte, off int64) (int, error) {
	time.Sleep(d.delay)
	return d.f.WriteAt(b, off)
}
func (d *file) Flush() error { return nil } // a SIGKILL loses nothing
func (d *file) Discard(off, n int64) error {
	return unix.Fallocate(int(d.f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
}
func (d *file) WriteZeroes(off, n int64) error { return d.Discard(off, n) }
func (d *file) SizeBytes() int64               { return d.size }
func (d *file) ReadOnly() bool                 { return false }
func (d *file) Close() error                   { return d.f.Close() }

var _ bdev.Device = (*file)(nil)

const testOwner = 0x7468617774657374

// serverMain serves a file: "path id depth delay step". With an id it takes over, else it
// makes a device; it says the id when it serves, and kills itself at the step.
func serverMain(arg string) {
	fail := func(err error) {
		fmt.Println("error:", err)
		os.Exit(1)
	}
	var path, step string
	var delayUS, depth int
	o := Options{Owner: testOwner, Logger: testLog()}
	if _, err := fmt.Sscan(arg, &path, &o.ID, &depth, &delayUS, &step); err != nil {
		fail(err)
	}
	o.Depth = depth
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		fail(err)
	}
	st, err := f.Stat()
	if err != nil {
		fail(err)
	}
	o.Device = &file{f, st.Size(), time.Duration(delayUS) * time.Microsecond}
	reached = func(s string) {
		if strings.ReplaceAll(s, " ", "-") == step {
			syscall.Kill(os.Getpid(), syscall.SIGKILL)
			select {}
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	var s *Server
	if o.ID >= 0 {
		s, err = Recover(ctx, o)
	} else if s, err = New(o); err == nil {
		err = s.Start(ctx)
	}
	if err != nil {
		fail(err)
	}
	fmt.Println("serving", s.ID())
	io.Copy(io.Discard, os.Stdin)
	os.Exit(0)
}

// process is a running serverMain.
type process struct {
	cmd *exec.Cmd
	in  io.Closer
	id  int
}

// launch starts a server and waits until it serves; step "" is one that does not end.
// With a step it returns nil when the process has killed itself there.
func launch(t *testing.T, path string, id, depth int, delay time.Duration, step string) *process {
	t.Helper()
	arg := fmt.Sprintf("%s %d %d %d %s", path, id, depth, delay.Microseconds(), strings.ReplaceAll(step, " ", "-")+"-")
	if step != "" {
		arg = strings.TrimSuffix(arg, "-")
	}
	p := &process{cmd: exec.Command("/proc/self/exe", serverArg, arg)}
	p.cmd.Stderr = os.Stderr
	in, err := p.cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	p.in = in
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line, _ := bufio.NewReader(out).ReadString('\n')
	if step != "" && line == "" {
		p.cmd.Wait()
		return nil
	}
	if p.id, err = strconv.Atoi(strings.TrimSpace(strings.TrimPrefix(line, "serving"))); err != nil || step != "" {
		p.kill()
		t.Fatalf("server with %q says %q", arg, line)
	}
	return p
}

func (p *process) kill() {
	p.cmd.Process.Kill()
	p.cmd.Wait()
	p.in.Close()
}

func backing(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, testBytes); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestKernelKill kills the server again and again under fio, which must not see an error
// and must read what it wrote.
func TestKernelKill(t *testing.T) {
	needUblk(t)
	needTool(t, "fio")
	for name, c := range map[string]struct {
		depth int
		delay time.Duration
		kills int
	}{
		"busy":      {64, 200 * time.Microsecond, 6},
		"saturated": {2, 50 * time.Millisecond, 3}, // the kernel has no command waiting when it dies
	} {
		t.Run(name, func(t *testing.T) {
			path := backing(t)
			p := launch(t, path, -1, c.depth, c.delay, "")
			id := p.id
			defer func() { p.kill(); Delete(context.Background(), id) }()
			if err := os.WriteFile(fmt.Sprintf("/sys/block/ublkb%d/queue/io_timeout", id), []byte("2000"), 0); err != nil {
				t.Fatal(err)
			}
			fio := exec.Command("fio", "--name=k", fmt.Sprintf("--filename=/dev/ublkb%d", id), "--direct=1", "--ioengine=libaio", "--thread=1",
				"--iodepth=8", "--rw=randwrite", "--bs=4k", "--size=4m", "--time_based=1", "--runtime="+strconv.Itoa(10*c.kills),
				"--verify=crc32c", "--verify_backlog=64", "--verify_fatal=1", "--allow_file_create=0")
			var out bytes.Buffer
			fio.Stdout, fio.Stderr = &out, &out
			if err := fio.Start(); err != nil {
				t.Fatal(err)
			}
			done := make(chan struct{})
			var fioErr error
			go func() { fioErr = fio.Wait(); close(done) }()
			for i := range c.kills {
				waitRequests(t, id, 20, done)
				begin := time.Now()
				p.kill()
				p = launch(t, path, id, c.depth, c.delay, "")
				waitRequests(t, id, 1, done)
				t.Logf("kill %d: %v until requests go on", i, time.Since(begin).Round(time.Millisecond))
			}
			<-done
			if fioErr != nil {
				t.Fatalf("fio: %v\n%s", fioErr, out.String())
			}
			if !strings.Contains(out.String(), "err= 0") {
				t.Error(out.String())
			}
		})
	}
}

// waitRequests waits until n more requests have ended; done says that none will come.
func waitRequests(t *testing.T, id int, n uint64, done <-chan struct{}) {
	t.Helper()
	count := func() uint64 {
		raw, err := os.ReadFile(fmt.Sprintf("/sys/block/ublkb%d/stat", id))
		if err != nil {
			t.Fatal(err)
		}
		f := strings.Fields(string(raw))
		r, _ := strconv.ParseUint(f[0], 10, 64)
		w, _ := strconv.ParseUint(f[4], 10, 64)
		return r + w
	}
	for from := count(); count() < from+n; {
		select {
		case <-done:
			t.Fatal("fio ended too early")
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// TestKernelKillSteps kills a server at each step of making and of taking over a device.
func TestKernelKillSteps(t *testing.T) {
	needUblk(t)
	path := backing(t)
	mine := func() (ids []int, states []State) {
		list, err := List()
		if err != nil {
			t.Fatal(err)
		}
		for _, i := range list {
			if i.Owner == testOwner {
				ids, states = append(ids, i.ID), append(states, i.State)
			}
		}
		return ids, states
	}
	for _, step := range []string{"added", "fetched", "ready"} {
		launch(t, path, -1, 4, 0, step)
		ids, states := mine()
		if len(ids) != 1 || states[0] != Dead {
			t.Fatalf("%s: devices %v %v", step, ids, states)
		}
		if _, err := Recover(context.Background(), Options{ID: ids[0], Owner: testOwner, Device: memory(t, testBytes)}); !errors.Is(err, kind.NotFound) {
			t.Errorf("%s: recover: %v", step, err)
		}
		if err := Delete(context.Background(), ids[0]); err != nil {
			t.Errorf("%s: delete: %v", step, err)
		}
	}
	p := launch(t, path, -1, 4, 0, "")
	id := p.id
	defer func() { p.kill(); Delete(context.Background(), id) }()
	f := direct(t, blockPath(uint32(id)), os.O_RDWR)
	buf, back := aligned(t, 4096), aligned(t, 4096)
	for _, step := range []string{"recovery started", "fetched", "recovery ready"} {
		copy(buf, step)
		written := make(chan error, 1)
		p.kill()
		go func() { // waits for the server that stays
			_, err := f.WriteAt(buf, 4096)
			written <- err
		}()
		launch(t, path, id, 4, 0, step)
		p = launch(t, path, id, 4, 0, "")
		if err := <-written; err != nil {
			t.Fatalf("%s: %v", step, err)
		}
		if _, err := f.ReadAt(back, 4096); err != nil || !bytes.Equal(buf, back) {
			t.Fatalf("%s: read %q, %v", step, back[:20], err)
		}
	}
}
