package keeper

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/thaw-project/thaw/kind"
)

// The test binary is also the keeper it starts.
const keeperArg = "test-keeper"

func TestMain(m *testing.M) {
	if len(os.Args) == 3 && os.Args[1] == keeperArg {
		if err := Run(context.Background(), Options{Socket: os.Args[2]}); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func options(t *testing.T) Options {
	t.Helper()
	dir, err := os.MkdirTemp("", "thaw-keeper-") // short: t.TempDir may be too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	socket := filepath.Join(dir, "s")
	return Options{Socket: socket, Command: []string{os.Args[0], keeperArg, socket}}
}

func ensure(t *testing.T, o Options) *Client {
	t.Helper()
	c, err := Ensure(context.Background(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// alive tells whether pid runs, as something else than a zombie.
func alive(pid int) bool {
	raw, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	return err == nil && !strings.Contains(string(raw), ") Z ")
}

func end(t *testing.T, c *Client) {
	t.Helper()
	pid := c.PID()
	if err := c.Exit(context.Background()); err != nil {
		t.Fatal(err)
	}
	for range 1000 {
		if !alive(pid) {
			return
		}
		time.Sleep(time.Millisecond)
	}
	t.Fatalf("keeper %d did not end", pid)
}

// pipe returns a pipe whose write end is to be kept.
func pipe(t *testing.T) (r, w *os.File) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close(); w.Close() })
	return r, w
}

func checkPipe(t *testing.T, r *os.File, fd int) {
	t.Helper()
	if _, err := unix.Write(fd, []byte("x")); err != nil {
		t.Fatal(err)
	}
	var b [1]byte
	if _, err := r.Read(b[:]); err != nil || b[0] != 'x' {
		t.Fatalf("what came back is not our pipe: %q, %v", b, err)
	}
}

func TestDescriptorOutlivesItsProcess(t *testing.T) {
	o := options(t)
	ctx := context.Background()
	c := ensure(t, o)
	r, w := pipe(t)
	if err := c.Put(ctx, "conn-1", int(w.Fd())); err != nil {
		t.Fatal(err)
	}
	w.Close()
	c.Close() // our process "ends"
	c = ensure(t, o)
	defer end(t, c)
	if names, err := c.List(ctx); err != nil || len(names) != 1 || names[0] != "conn-1" {
		t.Fatalf("list: %v, %v", names, err)
	}
	fd, err := c.Get(ctx, "conn-1")
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err != nil || flags&unix.FD_CLOEXEC == 0 {
		t.Error("the descriptor is inherited by children")
	}
	checkPipe(t, r, fd)
	if _, err := c.Get(ctx, "other"); !errors.Is(err, kind.NotFound) {
		t.Fatalf("get an unknown name: %v", err)
	}
	if err := c.Drop(ctx, "conn-1"); err != nil {
		t.Fatal(err)
	}
	if err := c.Drop(ctx, "conn-1"); err != nil {
		t.Fatalf("drop again: %v", err)
	}
	unix.Close(fd)
	if n, err := r.Read(make([]byte, 1)); n != 0 || err != io.EOF {
		t.Fatalf("after a drop somebody still holds the descriptor: %d, %v", n, err)
	}
}

func TestKeeperDies(t *testing.T) {
	o := options(t)
	ctx := context.Background()
	c := ensure(t, o)
	defer end(t, c)
	r, w := pipe(t)
	if err := c.Put(ctx, "a", int(w.Fd())); err != nil {
		t.Fatal(err)
	}
	for range 10 {
		old := c.PID()
		unix.Kill(old, unix.SIGKILL)
		// A call that falls into the gap waits for the next keeper.
		fd, err := c.Get(ctx, "a")
		if err != nil {
			t.Fatal(err)
		}
		checkPipe(t, r, fd)
		unix.Close(fd)
		for range 1000 {
			if c.PID() != old && c.PID() != 0 {
				break
			}
			time.Sleep(time.Millisecond)
		}
		if now := c.PID(); now == old || now == 0 {
			t.Fatalf("keeper %d is still %d", old, now)
		}
		if err := c.Put(ctx, "b", int(w.Fd())); err != nil {
			t.Fatal(err)
		}
		if names, err := c.List(ctx); err != nil || len(names) != 2 {
			t.Fatalf("list: %v, %v", names, err)
		}
	}
}

func TestManyStartersOneKeeper(t *testing.T) {
	o := options(t)
	var wg sync.WaitGroup
	clients := make([]*Client, 8)
	for i := range clients {
		wg.Go(func() {
			var err error
			if clients[i], err = Ensure(context.Background(), o); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if t.Failed() {
		t.FailNow()
	}
	for _, c := range clients {
		if c.PID() != clients[0].PID() {
			t.Errorf("keepers %d and %d", c.PID(), clients[0].PID())
		}
	}
	err := Run(context.Background(), Options{Socket: o.Socket})
	if !errors.Is(err, kind.InUse) {
		t.Errorf("a second keeper: %v", err)
	}
	for _, c := range clients[1:] {
		c.Close()
	}
	end(t, clients[0])
	// Nobody else became the keeper meanwhile.
	lock, err := lockFile(o.Socket + ".lock")
	if err != nil {
		t.Fatal(err)
	}
	lock.Close()
}

func TestBoundsAndBadRequests(t *testing.T) {
	o := options(t)
	ctx := context.Background()
	c := ensure(t, o)
	defer end(t, c)
	_, w := pipe(t)
	for i := range maxDescriptors {
		if err := c.Put(ctx, strings.Repeat("n", maxNameBytes-3)+fmt.Sprintf("%03d", i), int(w.Fd())); err != nil {
			t.Fatal(err)
		}
	}
	if err := c.Put(ctx, "one-more", int(w.Fd())); !errors.Is(err, kind.NoSpace) {
		t.Fatalf("one more: %v", err)
	}
	if names, err := c.List(ctx); err != nil || len(names) != maxDescriptors {
		t.Fatalf("list: %d, %v", len(names), err)
	}
	for _, name := range []string{"", "a b", "a\nb", strings.Repeat("n", maxNameBytes+1)} {
		if err := c.Put(ctx, name, int(w.Fd())); !errors.Is(err, kind.Invalid) {
			t.Errorf("put %q: %v", name, err)
		}
	}
	st, err := os.Stat(o.Socket)
	if err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("socket mode %v, %v", st.Mode(), err)
	}

	// Peers that talk nonsense are answered or cut off, and hurt nobody.
	for _, b := range [][]byte{{'?'}, {'p'}, {'p', 'x'}, {'l', 'x'}, {0}, make([]byte, maxMessageBytes)} {
		conn, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: o.Socket, Net: "unixpacket"})
		if err != nil {
			t.Fatal(err)
		}
		rights := unix.UnixRights(int(w.Fd()), int(w.Fd()))
		for _, oob := range [][]byte{nil, rights} {
			conn.WriteMsgUnix(b, oob, nil)
			conn.SetReadDeadline(time.Now().Add(5 * time.Second))
			n, err := conn.Read(make([]byte, maxMessageBytes))
			if err == nil && n > 0 {
				continue
			}
			if errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("request %.10q with %d bytes of control: no answer", b, len(oob))
			}
		}
		conn.Close()
	}
	if names, err := c.List(ctx); err != nil || len(names) != maxDescriptors {
		t.Fatalf("afterwards: %d, %v", len(names), err)
	}
}

func TestKeeperIsOnItsOwn(t *testing.T) {
	o := options(t)
	c := ensure(t, o)
	defer end(t, c)
	pid := c.PID()
	if sid, err := unix.Getsid(pid); err != nil || sid != pid {
		t.Errorf("session %d of keeper %d, %v", sid, pid, err)
	}
	for fd := range 3 {
		if to, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/%d", pid, fd)); err != nil || to != "/dev/null" {
			t.Errorf("descriptor %d is %s, %v", fd, to, err)
		}
	}
	_, w := pipe(t)
	if err := c.Put(context.Background(), "x", int(w.Fd())); err != nil {
		t.Fatal(err)
	}
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(status)) {
		if strings.HasPrefix(line, "VmRSS") || strings.HasPrefix(line, "Rss") {
			t.Log(strings.TrimSpace(line))
		}
	}
}

func TestCannotStart(t *testing.T) {
	o := options(t)
	o.Command = []string{"/nonexistent/keeper"}
	if _, err := Ensure(context.Background(), o); !errors.Is(err, syscall.ENOENT) {
		t.Errorf("got %v", err)
	}
	o.Command = []string{"/bin/true"}
	ctx, cancel := context.WithTimeout(context.Background(), 200*time.Millisecond)
	defer cancel()
	if _, err := Ensure(ctx, o); !errors.Is(err, kind.Unavailable) {
		t.Errorf("got %v", err)
	}
	o.Socket = "relative"
	if _, err := Ensure(context.Background(), o); !errors.Is(err, kind.Invalid) {
		t.Errorf("got %v", err)
	}
}

func FuzzParseRights(f *testing.F) {
	f.Add(unix.UnixRights(0)[:16])
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		op, name, err := parseRequest(b)
		if err == nil && (op == opPut || op == opGet || op == opDrop) && !validName(name) {
			t.Fatalf("accepted name %q", name)
		}
		parseReply(b)
	})
}
