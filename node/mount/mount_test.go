package mount

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/node/present"
)

func needRoot(t *testing.T, tools ...string) {
	t.Helper()
	if !hasSysAdmin() {
		t.Skip("mounting needs CAP_SYS_ADMIN: run the tests as root")
	}
	if _, err := os.Stat("/dev/loop-control"); err != nil {
		t.Skip("no /dev/loop-control: load the loop module")
	}
	for _, tool := range tools {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("%s is not installed: run make deps", tool)
		}
	}
}

func run(t *testing.T, name string, args ...string) {
	t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
}

// images makes an EROFS and an ext4 that hold one file, "hello".
func images(t *testing.T) (erofs, ext4 present.Disk) {
	t.Helper()
	dir := t.TempDir()
	tree := filepath.Join(dir, "tree")
	if err := os.Mkdir(tree, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(tree, "hello"), []byte("hello"), 0o644); err != nil {
		t.Fatal(err)
	}
	erofs.Path, ext4.Path = filepath.Join(dir, "erofs.img"), filepath.Join(dir, "ext4.img")
	run(t, "mkfs.erofs", "--quiet", erofs.Path, tree)
	run(t, "mke2fs", "-q", "-t", "ext4", "-F", "-d", tree, ext4.Path, "16M")
	erofs.ReadOnly = true
	t.Cleanup(func() {
		for _, d := range []present.Disk{erofs, ext4} {
			for deadline := time.Now().Add(2 * time.Second); ; time.Sleep(time.Millisecond) {
				device, err := FindLoop(d.Path)
				if errors.Is(err, kind.NotFound) {
					break
				}
				if time.Now().After(deadline) {
					t.Errorf("%s still shows %s", device, d.Path)
					detach(d.Path)
					break
				}
			}
		}
	})
	return erofs, ext4
}

func target(t *testing.T) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "mnt")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unmount(dir) })
	return dir
}

func wantKind(t *testing.T, err error, k kind.Kind) {
	t.Helper()
	if kind.Of(err) != k {
		t.Errorf("got error %v, want kind %q", err, k)
	}
}

func wantHello(t *testing.T, dir string) {
	t.Helper()
	if got, err := os.ReadFile(filepath.Join(dir, "hello")); err != nil || string(got) != "hello" {
		t.Errorf("hello has %q, %v", got, err)
	}
}

func TestMountAndUnmount(t *testing.T) {
	needRoot(t, "mkfs.erofs", "mke2fs")
	ctx := context.Background()
	erofs, ext4 := images(t)
	ext4ro := ext4
	ext4ro.ReadOnly = true
	for _, c := range []struct {
		name     string
		mount    func(context.Context, present.Disk, string) error
		disk     present.Disk
		writable bool
	}{
		{"erofs", ErofsReadOnly, erofs, false},
		{"ext4 read-only", Ext4ReadOnly, ext4ro, false},
		{"ext4", Ext4, ext4, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := target(t)
			for range 2 { // the second finds it done
				if err := c.mount(ctx, c.disk, dir); err != nil {
					t.Fatal(err)
				}
				wantHello(t, dir)
			}
			mounts, err := Mounts(dir)
			if err != nil || len(mounts) != 1 || mounts[0].Target != dir || strings.Contains(mounts[0].Options, "ro") == c.writable {
				t.Errorf("mounts %+v, %v", mounts, err)
			}
			err = os.WriteFile(filepath.Join(dir, "new"), []byte("x"), 0o644)
			if c.writable && err != nil || !c.writable && !errors.Is(err, unix.EROFS) {
				t.Errorf("write: %v", err)
			}
			other := c.disk
			other.Path += "-other"
			wantKind(t, c.mount(ctx, other, dir), kind.Exists)
			f, err := os.Open(filepath.Join(dir, "hello"))
			if err != nil {
				t.Fatal(err)
			}
			wantKind(t, Unmount(ctx, dir), kind.InUse)
			f.Close()
			for range 2 {
				if err := Unmount(ctx, dir); err != nil {
					t.Fatal(err)
				}
			}
			if mounts, err := Mounts(dir); err != nil || len(mounts) != 0 {
				t.Errorf("after unmounting: %+v, %v", mounts, err)
			}
		})
	}
	if err := Unmount(ctx, filepath.Join(t.TempDir(), "missing")); err != nil {
		t.Errorf("unmount what is not there: %v", err)
	}
}

func TestMountErrorsSayWhatToDo(t *testing.T) {
	needRoot(t)
	ctx := context.Background()
	dir := target(t)
	junk := present.Disk{Path: filepath.Join(t.TempDir(), "junk"), ReadOnly: true}
	if err := os.WriteFile(junk.Path, bytes.Repeat([]byte("junk"), 1<<18), 0o600); err != nil {
		t.Fatal(err)
	}
	wantKind(t, ErofsReadOnly(ctx, junk, dir), kind.Invalid)
	wantKind(t, Ext4ReadOnly(ctx, junk, dir), kind.Invalid)
	wantKind(t, ErofsReadOnly(ctx, present.Disk{Path: junk.Path + "-missing"}, dir), kind.NotFound)
	wantKind(t, Ext4(ctx, present.Disk{Path: junk.Path + "-missing"}, dir), kind.NotFound)
	err := explain("erofs", unix.ENODEV)
	if kind.Of(err) != kind.Unsupported || !strings.Contains(err.Error(), "modprobe erofs") {
		t.Errorf("no erofs in the kernel: %v", err)
	}
	canceled, cancel := context.WithCancel(ctx)
	cancel()
	wantKind(t, Unmount(canceled, dir), kind.Canceled)
	if device, err := FindLoop(junk.Path); err == nil {
		t.Errorf("%s is left", device)
	}
}

func TestLoop(t *testing.T) {
	needRoot(t, "mkfs.erofs", "mke2fs")
	ctx := context.Background()
	_, disk := images(t)
	if _, err := FindLoop(disk.Path); !errors.Is(err, kind.NotFound) {
		t.Fatal(err)
	}
	device, err := AttachLoop(ctx, disk.Path, LoopOptions{DirectIO: true})
	if err != nil {
		t.Fatal(err)
	}
	if again, err := AttachLoop(ctx, disk.Path, LoopOptions{}); err != nil || again != device {
		t.Errorf("again: %s, %v; first %s", again, err, device)
	}
	if found, err := FindLoop(disk.Path); err != nil || found != device {
		t.Errorf("find: %s, %v", found, err)
	}
	_, err = AttachLoop(ctx, disk.Path, LoopOptions{ReadOnly: true})
	wantKind(t, err, kind.Exists)
	for range 2 {
		if err := DetachLoop(ctx, disk.Path); err != nil {
			t.Error(err)
		}
	}
	if found, err := FindLoop(disk.Path); err == nil {
		t.Errorf("still there: %s", found)
	}
}

// TestLoopRaces attaches many files at once, each by several callers.
// TestLoopOfOneSetReadOnly: a device that its user before set read-only stays so until
// told otherwise.
func TestLoopOfOneSetReadOnly(t *testing.T) {
	needRoot(t, "mke2fs", "mkfs.erofs", "blockdev")
	ctx := context.Background()
	_, disk := images(t)
	for range 2 { // most likely the same device
		device, err := AttachLoop(ctx, disk.Path, LoopOptions{})
		if err != nil {
			t.Fatal(err)
		}
		ro, err := os.ReadFile("/sys/block/" + filepath.Base(device) + "/ro")
		if err != nil || strings.TrimSpace(string(ro)) != "0" {
			t.Errorf("%s is read-only: %q, %v", device, ro, err)
		}
		run(t, "blockdev", "--setro", device)
		if err := DetachLoop(ctx, disk.Path); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { run(t, "blockdev", "--setrw", device) })
	}
}

func TestLoopRaces(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	const files, callers = 8, 4
	var mu sync.Mutex
	got := make(map[string]string)
	var wg sync.WaitGroup
	var open []*os.File
	for i := range files {
		path := filepath.Join(dir, string(rune('a'+i)))
		if err := os.WriteFile(path, make([]byte, 1<<20), 0o600); err != nil {
			t.Fatal(err)
		}
		for range callers {
			wg.Go(func() {
				loop, err := OpenLoop(path, LoopOptions{AutoClear: true})
				if err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				defer mu.Unlock()
				open = append(open, loop)
				if before, ok := got[path]; ok && before != loop.Name() {
					t.Errorf("%s is shown by %s and %s", path, before, loop.Name())
				}
				got[path] = loop.Name()
			})
		}
	}
	wg.Wait()
	devices := make(map[string]bool)
	for _, device := range got {
		devices[device] = true
	}
	if len(devices) != files {
		t.Errorf("%d devices for %d files: %v", len(devices), files, got)
	}
	for _, f := range open {
		f.Close()
	}
	for path := range got {
		for deadline := time.Now().Add(2 * time.Second); ; time.Sleep(time.Millisecond) {
			if _, err := FindLoop(path); errors.Is(err, kind.NotFound) {
				break
			}
			if time.Now().After(deadline) {
				t.Errorf("%s is still attached", path)
				detach(path)
				break
			}
		}
	}
}

func TestExt4Detached(t *testing.T) {
	needRoot(t, "mkfs.erofs", "mke2fs")
	ctx := context.Background()
	_, disk := images(t)
	loop, err := OpenLoop(disk.Path, LoopOptions{DirectIO: true, AutoClear: true})
	if err != nil {
		t.Fatal(err)
	}
	root, err := Ext4Detached(ctx, loop.Name(), Ext4Options{Data: []string{"commit=30", "nodelalloc"}})
	if err != nil {
		t.Fatal(err)
	}
	loop.Close()
	path := filepath.Join("/proc/self/fd", strconv.Itoa(int(root.Fd())))
	wantHello(t, path)
	if err := os.WriteFile(filepath.Join(path, "new"), []byte("new"), 0o600); err != nil {
		t.Error(err)
	}
	if err := Syncfs(root); err != nil {
		t.Error(err)
	}
	root.Close()
	for deadline := time.Now().Add(2 * time.Second); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		if _, err := FindLoop(disk.Path); err != nil {
			break
		}
	}
	dir := target(t)
	if err := Ext4ReadOnly(ctx, disk, dir); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(filepath.Join(dir, "new")); err != nil || string(got) != "new" {
		t.Errorf("new has %q, %v", got, err)
	}
	if err := Unmount(ctx, dir); err != nil {
		t.Error(err)
	}
	if _, err := Ext4Detached(ctx, "/dev/null", Ext4Options{}); err == nil {
		t.Error("mounted /dev/null")
	}
}

func TestProbe(t *testing.T) {
	facts := Probe()
	names := []string{FactRoot, FactFUSE, FactFUSEResend, FactErofs, FactErofsFile, FactLoop, FactOverlay, FactExt4, FactDetached, FactIOUring}
	if len(facts) != len(names) {
		t.Fatalf("%d facts, want %d", len(facts), len(names))
	}
	for i, f := range facts {
		t.Logf("%-18s %-5t %s", f.Name, f.OK, f.Detail)
		if f.Name != names[i] || f.Need == "" || f.Detail == "" {
			t.Errorf("fact %d is %+v", i, f)
		}
	}
	if _, err := os.Stat("/dev/fuse"); (err == nil) != facts[1].OK && os.Geteuid() == 0 {
		t.Errorf("fuse: %+v, but stat says %v", facts[1], err)
	}
	for _, f := range facts { // one that says no must say what to do
		if !f.OK && !strings.ContainsAny(f.Detail, ":") {
			t.Errorf("%s is missing and nothing is said about it: %s", f.Name, f.Detail)
		}
	}
}

func TestChildRefusesNonsense(t *testing.T) {
	for in, code := range map[string]int{
		"{": 1, "[]": 1, strings.Repeat(" ", maxMessageBytes+1): 1, // then nothing that follows can be trusted
		`{"op":"format"}`: 0, `{"op":"erofs","disk":{"path":"/nonexistent"},"target":"/nonexistent"}`: 0,
	} {
		var out bytes.Buffer
		if got := childMain(strings.NewReader(in), &out); got != code || !strings.Contains(out.String(), `"error"`) {
			t.Errorf("%.50q: exit %d, %s", in, got, &out)
		}
	}
	var out bytes.Buffer
	if code := childMain(strings.NewReader(""), &out); code != 0 || out.Len() > 0 {
		t.Errorf("nothing to do: exit %d, %s", code, &out)
	}
}

func idlePids() (pids []int) {
	idle.Lock()
	defer idle.Unlock()
	for _, c := range idle.children {
		pids = append(pids, c.cmd.Process.Pid)
	}
	return pids
}

// TestChildAgain does many operations with one child, one after another's death, and
// sees the children go when there is nothing to do.
func TestChildAgain(t *testing.T) {
	ctx := t.Context()
	do := func() []int {
		t.Helper()
		if err := Unmount(ctx, t.TempDir()); err != nil {
			t.Fatal(err)
		}
		return idlePids()
	}
	first := do()
	for range 20 {
		if now := do(); !slices.Equal(now, first) {
			t.Fatalf("children %v, then %v", first, now)
		}
	}
	for _, pid := range first {
		if err := unix.Kill(pid, unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
	}
	after := do()
	if len(after) == 0 || slices.Contains(first, after[len(after)-1]) {
		t.Fatalf("killed children %v, then %v", first, after)
	}

	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			if err := Unmount(ctx, "/nonexistent"); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	pids := idlePids()
	if len(pids) > maxIdle {
		t.Errorf("%d children wait, more than %d", len(pids), maxIdle)
	}
	for _, pid := range pids {
		for deadline := time.Now().Add(10 * idleTime); unix.Kill(pid, 0) == nil; time.Sleep(10 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("child %d waits for ever", pid)
			}
		}
	}
}

func BenchmarkChild(b *testing.B) {
	for b.Loop() {
		if err := Unmount(context.Background(), "/nonexistent"); err != nil {
			b.Fatal(err)
		}
	}
}

func TestOverlayDirs(t *testing.T) {
	needRoot(t)
	ctx := t.Context()
	for _, made := range []bool{false, true} { // by us, or there before, root's
		root := t.TempDir()
		upper, work := filepath.Join(root, "upper"), filepath.Join(root, "work")
		if made {
			for _, dir := range []string{upper, work} {
				if err := os.Mkdir(dir, 0o755); err != nil {
					t.Fatal(err)
				}
			}
		}
		want := func(uid, gid int) {
			t.Helper()
			nodes, err := Lstat(ctx, []string{upper, work, filepath.Join(root, "nothing"), filepath.Join(upper, "x")})
			if err != nil {
				t.Fatal(err)
			}
			if !slices.Equal(nodes, []Node{{true, uid, gid}, {Directory: true}, {}, {}}) {
				t.Errorf("directories made before %t: %+v", made, nodes)
			}
		}
		for _, id := range []int{12, 34} { // the second because the first may have been killed half-way
			if err := OverlayDirs(ctx, root, id, id+1); err != nil {
				t.Fatal(err)
			}
			want(id, id+1)
		}
		// Now an overlay was mounted, in which a container may have changed the owner.
		if err := os.Mkdir(filepath.Join(work, "work"), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := OverlayDirs(ctx, root, 0, 0); err != nil {
			t.Fatal(err)
		}
		want(34, 35)
		if info, err := os.Stat(upper); err != nil || info.Mode().Perm() != 0o755 {
			t.Errorf("upper is %v, %v", info.Mode(), err)
		}
	}
}
