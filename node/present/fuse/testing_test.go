package fuse

import (
	"context"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/thaw-project/thaw/keeper"
	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/node/present"
	"github.com/thaw-project/thaw/node/present/presenttest"
	"github.com/thaw-project/thaw/target/bdev"
)

// The test binary is also the keeper and the serving process that tests kill.
const (
	keeperArg = "test-keeper"
	serverArg = "test-server"
)

func TestMain(m *testing.M) {
	presenttest.Child(subject)
	if len(os.Args) > 2 {
		switch os.Args[1] {
		case keeperArg:
			if err := keeper.Run(context.Background(), keeper.Options{Socket: os.Args[2]}); err != nil {
				fmt.Fprintln(os.Stderr, err)
				os.Exit(1)
			}
			os.Exit(0)
		case serverArg:
			serverMain(os.Args[2])
		}
	}
	flag.Parse()
	os.Exit(m.Run())
}

// fileDevice is a bdev.Device on a file, as simple as can be: what is written is in
// the page cache, and so survives SIGKILL.
type fileDevice struct {
	f        *os.File
	size     int64
	readOnly bool
}

func openFile(source present.Source, readOnly bool) (bdev.Device, error) {
	mode := os.O_RDWR
	if readOnly {
		mode = os.O_RDONLY
	}
	f, err := os.OpenFile(source.Path, mode, 0)
	if err != nil {
		return nil, err
	}
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	return &fileDevice{f: f, size: st.Size(), readOnly: readOnly}, nil
}

func (d *fileDevice) ReadAt(b []byte, off int64) (int, error) { return d.f.ReadAt(b, off) }
func (d *fileDevice) WriteAt(b []byte, off int64) (int, error) {
	if d.readOnly {
		return 0, kind.Errorf(kind.ReadOnly, "write")
	}
	return d.f.WriteAt(b, off)
}
func (d *fileDevice) Flush() error { return unix.Fdatasync(int(d.f.Fd())) }
func (d *fileDevice) Discard(off, n int64) error {
	return unix.Fallocate(int(d.f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
}
func (d *fileDevice) WriteZeroes(off, n int64) error { return d.Discard(off, n) }
func (d *fileDevice) SizeBytes() int64               { return d.size }
func (d *fileDevice) ReadOnly() bool                 { return d.readOnly }
func (d *fileDevice) Close() error                   { return d.f.Close() }

func needFUSE(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root: run the tests as root")
	}
	if _, err := os.Stat("/dev/fuse"); err != nil {
		t.Skip("no /dev/fuse: load the fuse module")
	}
}

func needTools(t testing.TB, tools ...string) {
	t.Helper()
	for _, tool := range tools {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("%s is not installed: run make deps", tool)
		}
	}
}

func run(t testing.TB, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// place is a directory with a mount point, a state file and a keeper's socket.
type place struct {
	base, dir, state, socket string
}

func newPlace(t testing.TB) place {
	t.Helper()
	base, err := os.MkdirTemp("", "thaw-fuse-")
	if err != nil {
		t.Fatal(err)
	}
	p := place{base: base, dir: filepath.Join(base, "dev"), state: filepath.Join(base, "fuse.json"), socket: filepath.Join(base, "keeper.sock")}
	t.Cleanup(func() {
		// What a failed test left must not stay behind.
		if _, err := os.Stat(p.socket); err == nil {
			if !t.Failed() {
				t.Error("a keeper was left behind")
			}
			p.endKeeper(t, p.keeper(t))
		}
		for _, m := range mountsBelow(t, base) {
			unix.Unmount(m, unix.MNT_FORCE|unix.MNT_DETACH)
			if !t.Failed() {
				t.Errorf("mount %s was left behind", m)
			}
		}
		os.RemoveAll(base)
	})
	return p
}

func mountsBelow(t testing.TB, base string) []string {
	t.Helper()
	raw, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	var found []string
	for line := range strings.Lines(string(raw)) {
		if f := strings.Fields(line); strings.HasPrefix(f[4], base+"/") {
			found = append([]string{f[4]}, found...) // the uppermost first
		}
	}
	return found
}

func (pl place) keeper(t testing.TB) *keeper.Client {
	t.Helper()
	c, err := keeper.Ensure(context.Background(), keeper.Options{
		Socket:  pl.socket,
		Command: []string{os.Args[0], keeperArg, pl.socket},
		Logger:  testLogger(t),
	})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func (pl place) endKeeper(t testing.TB, c *keeper.Client) {
	t.Helper()
	pid := c.PID()
	if err := c.Exit(context.Background()); err != nil {
		t.Errorf("end the keeper: %v", err)
	}
	waitGone(t, pid)
}

func waitGone(t testing.TB, pid int) {
	t.Helper()
	for deadline := time.Now().Add(5 * time.Second); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		raw, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
		if err != nil || strings.Contains(string(raw), ") Z ") { // a zombie is whoever's who started it
			return
		}
	}
	t.Errorf("process %d did not end", pid)
}

func (pl place) options(t testing.TB, k *keeper.Client) Options {
	return Options{Dir: pl.dir, StatePath: pl.state, Keeper: k, Open: openFile, Logger: testLogger(t)}
}

// start serves the place in this process for the length of the test.
func (pl place) start(t testing.TB, k *keeper.Client) *Presenter {
	t.Helper()
	p := pl.serveHere(t, pl.options(t, k))
	t.Cleanup(func() {
		if err := p.Teardown(context.Background()); err != nil && !p.closed.Load() {
			t.Errorf("tear down: %v", err)
		}
	})
	return p
}

// serveHere makes the presenter of a new mount that this process itself will use.
//
// Go registers what it opens with epoll, by a system call that its scheduler does not
// know of: when the kernel asks for FUSE_POLL then, and the garbage collector wants to
// stop the world, the collector waits for the call, the call for a goroutine that
// answers it, and that for the collector. So the kernel is told first, through an
// ordinary call, that there is no FUSE_POLL.
func (pl place) serveHere(t testing.TB, o Options) *Presenter {
	t.Helper()
	p, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	poll, err := openFile(pl.file(t, "poll", 4096), true)
	if err != nil {
		t.Fatal(err)
	}
	open := p.options.Open
	p.options.Open = func(present.Source, bool) (bdev.Device, error) { return poll, nil }
	d := mustPresent(t, p, "poll", present.Source{Kind: present.SourceLvol, Lvol: "poll"}, true)
	p.options.Open = open
	fd, err := unix.Open(d.Path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0); err != nil {
		t.Fatal(err)
	}
	unix.Close(fd)
	if err := p.Withdraw(context.Background(), "poll"); err != nil {
		t.Fatal(err)
	}
	return p
}

// file makes a file of random bytes and returns what presents it.
func (pl place) file(t testing.TB, name string, sizeBytes int64) present.Source {
	t.Helper()
	path := filepath.Join(pl.base, name)
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	random, err := os.Open("/dev/urandom")
	if err != nil {
		t.Fatal(err)
	}
	defer random.Close()
	if _, err := io.CopyN(f, random, sizeBytes); err != nil {
		t.Fatal(err)
	}
	return present.Source{Kind: present.SourceLvol, Lvol: name, Path: path}
}

func mustPresent(t testing.TB, p present.Presenter, id string, source present.Source, readOnly bool) present.Disk {
	t.Helper()
	d, err := p.Present(context.Background(), id, source, readOnly)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func wantKind(t testing.TB, err error, k kind.Kind) {
	t.Helper()
	if kind.Of(err) != k {
		t.Fatalf("got error %v, want kind %q", err, k)
	}
}

func testLogger(t testing.TB) *slog.Logger {
	if !testing.Verbose() {
		return nil
	}
	return slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug}))
}
