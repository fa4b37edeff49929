package guest_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/thaw-project/thaw/e2e/guest"
	"github.com/thaw-project/thaw/kind"
)

func Example() {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	g, err := guest.Start(ctx, guest.Options{Modules: []string{"nvme-tcp"}})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer g.Close()
	out, code, err := g.Run(ctx, "lsmod | grep -c ^nvme_tcp")
	fmt.Println(strings.TrimSpace(out), code, err)
	// No line "Output:" here, so that this is compiled and not run: tests that start
	// guests run on demand.
}

// TestGuest shows what the package promises, in one guest.
func TestGuest(t *testing.T) {
	folder := t.TempDir()
	if err := os.MkdirAll(filepath.Join(folder, "sub"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(folder, "sub/file"), []byte("from here"), 0o644); err != nil {
		t.Fatal(err)
	}
	raw := filepath.Join(folder, "raw")
	if err := os.WriteFile(raw, []byte(strings.Repeat("0123456789abcdef", 1<<16)), 0o644); err != nil {
		t.Fatal(err)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()

	g := guest.New(t, guest.Options{
		Modules:   []string{"loop", "ext4"},
		Files:     map[string]string{"folder": folder, "file": filepath.Join(folder, "sub/file")},
		ScratchMB: 1024,
		Disks:     []guest.Disk{{Name: "raw", Path: raw}},
		Forward:   []int{7000},
	})
	ctx := t.Context()

	t.Run("output and status", func(t *testing.T) {
		out, code, err := g.Run(ctx, "echo out; echo err >&2; exit 7")
		if out != "out\nerr\n" || code != 7 || err != nil {
			t.Errorf("got %q, %d, %v", out, code, err)
		}
		if _, code, err := g.Run(ctx, "kill -TERM $$"); code != 128+int(syscall.SIGTERM) || err != nil {
			t.Errorf("killed by SIGTERM: got %d, %v", code, err)
		}
	})
	t.Run("files", func(t *testing.T) {
		if out := g.Must(t, "cat /host/folder/sub/file; echo; cat /host/file"); out != "from here\nfrom here" {
			t.Errorf("got %q", out)
		}
		content := strings.Repeat("x", 100<<10) + "end"
		if err := g.WriteFile(ctx, "/tmp/new/folder/file", 0o640, strings.NewReader(content)); err != nil {
			t.Fatal(err)
		}
		if out := g.Must(t, "stat -c %s-%a /tmp/new/folder/file; tail -c 3 /tmp/new/folder/file"); out != fmt.Sprintf("%d-640\nend", len(content)) {
			t.Errorf("got %q", out)
		}
	})
	t.Run("disks", func(t *testing.T) {
		out := g.Must(t, "head -c 16 /dev/disk/raw; echo; printf written | dd of=/dev/disk/raw conv=fsync,notrunc 2>&1 | tail -1 | cut -c1-1; stat -f -c %T /scratch; touch /scratch/f")
		if !strings.HasPrefix(out, "0123456789abcdef\n") || !strings.HasSuffix(out, "ext2/ext3\n") {
			t.Errorf("got %q", out)
		}
		b, err := os.ReadFile(raw)
		if err != nil || string(b[:16]) != "written789abcdef" {
			t.Errorf("the disk's file begins with %q: %v", b[:16], err)
		}
	})
	t.Run("commands at a time", func(t *testing.T) {
		// Each waits for the other's file: one after the other they would not end.
		ctx, cancel := context.WithTimeout(ctx, time.Minute)
		defer cancel()
		first, err := g.Start(ctx, "touch /tmp/a; until [ -e /tmp/b ]; do sleep 0.1; done", nil)
		if err != nil {
			t.Fatal(err)
		}
		if _, code, err := g.Run(ctx, "touch /tmp/b; until [ -e /tmp/a ]; do sleep 0.1; done"); code != 0 || err != nil {
			t.Error(code, err)
		}
		if code, err := first.Wait(ctx); code != 0 || err != nil {
			t.Error(code, err)
		}
	})
	t.Run("network", func(t *testing.T) {
		go func() { // ends with the listener
			c, err := listener.Accept()
			if err == nil {
				_, _ = io.WriteString(c, "hello from the host")
				c.Close()
			}
		}()
		_, port, _ := net.SplitHostPort(listener.Addr().String())
		if out := g.Must(t, "exec 3<>/dev/tcp/"+guest.HostAddress+"/"+port+"; cat <&3"); out != "hello from the host" {
			t.Errorf("the guest read %q", out)
		}
		server, err := g.Start(ctx, "busybox nc -l -p 7000 -e echo hello from the guest", nil)
		if err != nil {
			t.Fatal(err)
		}
		g.Must(t, "until ss -ltnH | grep -q :7000; do sleep 0.1; done")
		c, err := net.Dial("tcp", g.Address(7000))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if b, err := io.ReadAll(c); string(b) != "hello from the guest\n" {
			t.Errorf("read %q from the guest: %v", b, err)
		}
		if code, err := server.Wait(ctx); code != 0 || err != nil {
			t.Error(code, err)
		}
	})
	t.Run("cancel", func(t *testing.T) {
		ctx, cancel := context.WithCancel(ctx)
		p, err := g.Start(ctx, "sleep 1000 & echo started; wait", nil)
		if err != nil {
			t.Fatal(err)
		}
		for p.Output() == "" {
			time.Sleep(10 * time.Millisecond)
		}
		cancel()
		if _, err := p.Wait(ctx); !errors.Is(err, context.Canceled) || !strings.Contains(err.Error(), "started") {
			t.Errorf("got %v", err)
		}
		if out := g.Must(t, "pgrep -c -x sleep || true"); out != "0\n" {
			t.Errorf("%s processes are left", out)
		}
	})
	t.Run("a background child does not hold the command", func(t *testing.T) {
		if out := g.Must(t, "sleep 1000 & echo $!"); out == "" {
			t.Error("no output")
		}
		g.Must(t, "pkill -x sleep")
	})
	t.Run("container", func(t *testing.T) {
		out := g.Must(t, `mkdir -p /scratch/containerd /scratch/root/bin
			cp /bin/busybox /scratch/root/bin
			containerd --root /scratch/containerd >/tmp/containerd.log 2>&1 & pid=$!
			await 'ctr version >/dev/null 2>&1'
			ctr run --rm --rootfs --memory-limit 50000000 /scratch/root one /bin/busybox sh -c 'echo hello; cat /proc/self/cgroup'
			kill $pid; wait || true`)
		if !strings.Contains(out, "hello\n0::/default/one\n") {
			t.Errorf("got %q", out)
		}
	})
	// Last, since it ends the guest.
	t.Run("panic", func(t *testing.T) {
		_, _, err := g.Run(ctx, "echo c >/proc/sysrq-trigger; sleep 100")
		if !errors.Is(err, kind.Unavailable) || !strings.Contains(err.Error(), "sysrq triggered crash") {
			t.Errorf("a crash of the guest gave %v", err)
		}
		if _, _, err := g.Run(ctx, "true"); !errors.Is(err, kind.Unavailable) {
			t.Errorf("after a crash: %v", err)
		}
	})
}

func TestOptions(t *testing.T) {
	_, err := guest.Start(t.Context(), guest.Options{Disks: []guest.Disk{{Name: "root", Path: "/dev/null"}}})
	if !errors.Is(err, kind.Invalid) {
		t.Errorf("a disk called root: %v", err)
	}
}

// ownerEnv is set in a child of the test that starts a guest and is killed.
const ownerEnv = "THAW_GUEST_TEST_OWNER"

// own is that child: it says when its guest runs, and waits to be killed.
func own() error {
	g, err := guest.Start(context.Background(), guest.Options{})
	if err != nil {
		return err
	}
	defer g.Close()
	fmt.Println("up")
	time.Sleep(time.Hour)
	return nil
}

// TestOwnerKilled kills the process that started a guest: the guest ends too, its lock
// is free, and the next start removes its files.
func TestOwnerKilled(t *testing.T) {
	guest.Require(t)
	// An own folder for temporary files, so that the guests of other programs do not
	// matter and nothing but this test's is seen.
	folder := t.TempDir()
	t.Setenv("TMPDIR", folder)
	c := exec.Command("/proc/self/exe")
	c.Env = append(os.Environ(), ownerEnv+"=1")
	c.Stderr = os.Stderr
	out, err := c.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil || line != "up\n" {
		t.Errorf("child says %q: %v", line, err)
	}
	qemu := qemuOf(t, folder)
	if err := c.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = c.Wait() // the signal
	eventually(t, "QEMU ends", func() error {
		if _, err := os.Stat(fmt.Sprintf("/proc/%d", qemu)); err == nil {
			return errors.New("it is there")
		}
		return nil
	})
	left := func() []string {
		dirs, err := filepath.Glob(filepath.Join(folder, "thaw-vm-*"))
		if err != nil {
			t.Fatal(err)
		}
		return dirs
	}
	if len(left()) != 1 {
		t.Fatalf("the killed guest left %v", left())
	}
	g := guest.New(t, guest.Options{})
	g.Must(t, "true")
	if len(left()) != 1 {
		t.Errorf("beside the second guest's there are %v", left())
	}
	if err := g.Close(); err != nil {
		t.Error(err)
	}
	if len(left()) != 0 {
		t.Errorf("guests left %v", left())
	}
}

// qemuOf finds the QEMU whose files are in a folder.
func qemuOf(t *testing.T, folder string) int {
	t.Helper()
	lines, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range lines {
		text, err := os.ReadFile(path)
		if err == nil && strings.HasPrefix(string(text), "qemu-system-x86_64\x00") && strings.Contains(string(text), folder) {
			var pid int
			if _, err := fmt.Sscanf(path, "/proc/%d/", &pid); err != nil {
				t.Fatal(err)
			}
			return pid
		}
	}
	t.Fatalf("no QEMU with files in %s", folder)
	return 0
}
