package blockdev

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/thaw-project/thaw/kind"
)

// device sets up a loop device, which is the block device every kernel has.
func device(t *testing.T) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("loop devices need root: run as root")
	}
	file := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(file, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("losetup", "-f", "--show", file).Output()
	if err != nil {
		if _, serr := os.Stat("/dev/loop-control"); serr != nil {
			t.Skipf("no loop devices here: load the module loop: %v", serr)
		}
		t.Fatalf("losetup: %v", err)
	}
	dev := strings.TrimSpace(string(out))
	t.Cleanup(func() {
		// A loop device stays read-only for whoever gets it next.
		if out, err := exec.Command("blockdev", "--setrw", dev).CombinedOutput(); err != nil {
			t.Errorf("blockdev --setrw %s: %v %s", dev, err, out)
		}
		if out, err := exec.Command("losetup", "-d", dev).CombinedOutput(); err != nil {
			t.Errorf("losetup -d %s: %v %s", dev, err, out)
		}
	})
	return dev
}

func TestClaim(t *testing.T) {
	dev := device(t)
	ctx := context.Background()
	c, err := Take(ctx, dev, ClaimOptions{Wait: 10 * time.Second})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Take(ctx, dev, ClaimOptions{}); !errors.Is(err, kind.InUse) {
		t.Errorf("a second claim: %v", err)
	}
	if err := c.Release(); err != nil {
		t.Fatal(err)
	}
	// An ordinary open is a use, too.
	f, err := os.Open(dev)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Take(ctx, dev, ClaimOptions{}); !errors.Is(err, kind.InUse) || !strings.Contains(err.Error(), "process") {
		t.Errorf("while a process has it open: %v", err)
	}
	go func() { time.Sleep(30 * time.Millisecond); f.Close() }()
	if c, err = Take(ctx, dev, ClaimOptions{Wait: 10 * time.Second}); err != nil {
		t.Fatalf("while the last user leaves: %v", err)
	}
	c.Release()
	other, err := exec.Command("losetup", "-f", "--show", dev).Output()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Take(ctx, dev, ClaimOptions{}); !errors.Is(err, kind.InUse) {
		t.Errorf("under a loop device: %v", err)
	}
	exec.Command("losetup", "-d", strings.TrimSpace(string(other))).Run()
	if c, err = Take(ctx, dev, ClaimOptions{Wait: 10 * time.Second, ReadOnly: true}); err != nil {
		t.Fatal(err)
	}
	c.Release()
	if fd, err := unix.Open(dev, unix.O_RDWR|unix.O_CLOEXEC, 0); err == nil {
		if _, err := unix.Pwrite(fd, []byte("x"), 0); err == nil {
			t.Error("a read-only device takes a write")
		}
		unix.Close(fd)
	}
}

func TestClaimSeesMounts(t *testing.T) {
	dev := device(t)
	if out, err := exec.Command("mke2fs", "-q", dev).CombinedOutput(); errors.Is(err, exec.ErrNotFound) {
		t.Skip("mke2fs is not installed: run make deps")
	} else if err != nil {
		t.Fatalf("mke2fs: %v %s", err, out)
	}
	dir := t.TempDir()
	if err := unix.Mount(dev, dir, "ext4", 0, ""); err != nil {
		t.Fatalf("mount: %v", err)
	}
	_, err := Take(context.Background(), dev, ClaimOptions{})
	unix.Unmount(dir, 0)
	if !errors.Is(err, kind.InUse) || !strings.Contains(err.Error(), dir) {
		t.Errorf("a mounted device: %v", err)
	}
}

func TestClaimWhatIsNotThere(t *testing.T) {
	_, err := Take(context.Background(), "/dev/there-is-none", ClaimOptions{})
	if !errors.Is(err, kind.NotFound) || !errors.Is(err, syscall.ENOENT) {
		t.Errorf("%v", err)
	}
	file := filepath.Join(t.TempDir(), "f")
	os.WriteFile(file, nil, 0o600)
	if _, err := Take(context.Background(), file, ClaimOptions{}); !errors.Is(err, kind.Invalid) {
		t.Errorf("a file: %v", err)
	}
}

func TestWrite(t *testing.T) {
	ctx := context.Background()
	file := filepath.Join(t.TempDir(), "f")
	os.WriteFile(file, []byte("....reply"), 0o600)
	if err := Write(ctx, file, "abc"); err != nil {
		t.Fatal(err)
	}
	if reply, err := Ask(ctx, file, "abcd"); err != nil || reply != "reply" {
		t.Errorf("%q, %v", reply, err)
	}
	if err := Write(ctx, file+"x", "abc"); !errors.Is(err, syscall.ENOENT) || kind.Of(err) != kind.NotFound {
		t.Errorf("a missing file: %v", err)
	}
	// A pipe that nobody reads blocks in open: the caller does not.
	fifo := filepath.Join(t.TempDir(), "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
	defer cancel()
	if err := Write(ctx, fifo, "x"); !errors.Is(err, kind.Canceled) {
		t.Errorf("a call that blocks: %v", err)
	}
}

func TestMountOf(t *testing.T) {
	text := "22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/root rw\n" +
		"40 22 43:16 / /mnt/a\\040b ro - erofs /dev/nbd1 ro\n" +
		"41 22 0:44 / /mnt/btrfs rw - btrfs /dev/nbd2 rw\n" +
		"short line\n"
	for _, c := range []struct{ number, path, want string }{
		{"43:16", "/dev/x", "/mnt/a\\040b"}, {"9:9", "/dev/nbd2", "/mnt/btrfs"}, {"43:1", "/dev/nbd", ""},
	} {
		if got := mountOf(text, c.number, c.path); got != c.want {
			t.Errorf("%s %s: %q, want %q", c.number, c.path, got, c.want)
		}
	}
}

func FuzzMountOf(f *testing.F) {
	f.Add("40 22 43:16 / /mnt ro - erofs /dev/nbd1 ro\n", "43:16")
	f.Fuzz(func(t *testing.T, text, number string) { mountOf(text, number, "/dev/nbd1") })
}

// TestSetReadOnly makes a device read-only that somebody looks at, as programs do at every
// new one.
func TestSetReadOnly(t *testing.T) {
	path := device(t)
	looker, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer looker.Close()
	for range 2 {
		if err := SetReadOnly(t.Context(), path); err != nil {
			t.Fatal(err)
		}
		if raw, err := os.ReadFile("/sys/block/" + filepath.Base(path) + "/ro"); err != nil || strings.TrimSpace(string(raw)) != "1" {
			t.Fatalf("read-only is %q, %v", raw, err)
		}
	}
	if err := SetReadOnly(t.Context(), "/dev/absent-1"); !errors.Is(err, kind.NotFound) {
		t.Errorf("no device: %v", err)
	}
	if err := SetReadOnly(t.Context(), "/dev/null"); err == nil {
		t.Error("a device without blocks was made read-only")
	}
}
