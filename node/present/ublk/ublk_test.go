package ublk

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/node/mount"
	"github.com/thaw-project/thaw/node/present"
	"github.com/thaw-project/thaw/node/present/presenttest"
	"github.com/thaw-project/thaw/target/malloc"
	"github.com/thaw-project/thaw/target/ublk"
)

// Tests named TestKernel need a kernel with ublk, and root. On a machine without they
// run in a guest: see TestGuest.

var subject = presenttest.Subject{
	Serve: func(dir string) (presenttest.Served, error) { return New(testOptions(dir)) },
	Left:  left,
	Abandon: func(dir string) {
		for _, i := range ours(dir) {
			ublk.Delete(context.Background(), i.ID)
		}
	},
}

func testOptions(dir string) Options {
	return Options{
		StatePath: filepath.Join(dir, "ublk.json"), Open: presenttest.OpenFile,
		Logger: slog.New(slog.NewTextHandler(os.Stderr, nil)),
	}
}

// ours are the devices that belong to a directory.
func ours(dir string) (list []ublk.Info) {
	all, err := ublk.List()
	if err != nil {
		panic(err)
	}
	for _, i := range all {
		if i.Owner == owner(testOptions(dir).StatePath) {
			list = append(list, i)
		}
	}
	return list
}

func left(t testing.TB, dir string) {
	t.Helper()
	for _, i := range ours(dir) {
		t.Errorf("left behind: %+v", i)
	}
	if _, err := os.Stat(testOptions(dir).StatePath); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the state was left behind: %v", err)
	}
}

// stepArg makes the test binary a process that presents or withdraws disk "d" and kills
// itself at a step.
const stepArg = "ublk-test-step"

func TestMain(m *testing.M) {
	if len(os.Args) == 5 && os.Args[1] == stepArg {
		stepMain(os.Args[2], os.Args[3], os.Args[4])
	}
	presenttest.Child(subject)
	flag.Parse()
	os.Exit(m.Run())
}

func stepMain(dir, op, step string) {
	reached = func(s string) {
		if s == step {
			syscall.Kill(os.Getpid(), syscall.SIGKILL)
			select {}
		}
	}
	p, err := New(testOptions(dir))
	if err == nil && op == "present" {
		_, err = p.Present(context.Background(), "d", stepSource(dir), false)
	} else if err == nil {
		err = p.Withdraw(context.Background(), "d")
	}
	fmt.Println(err)
	os.Exit(1)
}

func stepSource(dir string) present.Source {
	return presenttest.DefaultSource(filepath.Join(dir, "image"), false)
}

func needUblk(t *testing.T) {
	t.Helper()
	if err := Probe(); err != nil {
		t.Skipf("no ublk here: %v", err)
	}
}

func image(t *testing.T, dir, name string, sizeBytes int64) present.Source {
	t.Helper()
	path := filepath.Join(dir, name)
	f, err := os.Create(path)
	if err == nil {
		err = errors.Join(f.Truncate(sizeBytes), f.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
	return presenttest.DefaultSource(path, false)
}

func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

func TestOptions(t *testing.T) {
	for _, o := range []Options{{Open: presenttest.OpenFile}, {StatePath: "relative", Open: presenttest.OpenFile}, {StatePath: "/absolute"}} {
		if _, err := New(o); !errors.Is(err, kind.Invalid) {
			t.Errorf("%+v: %v", o, err)
		}
	}
}

func TestOwner(t *testing.T) {
	a, b := owner("/run/thaw/ublk.json"), owner("/run/thaw2/ublk.json")
	if a == b || a>>63 != 1 || b>>63 != 1 {
		t.Errorf("%#x, %#x", a, b)
	}
	// Another version must find the devices of this one.
	if want := uint64(0xec9c9aafb7c959f1); a != want {
		t.Errorf("the mark has changed: %#x, was %#x", a, want)
	}
}

func TestWithout(t *testing.T) {
	if Probe() == nil {
		t.Skip("this kernel has ublk")
	}
	if _, err := New(testOptions(t.TempDir())); !errors.Is(err, kind.Unsupported) && !errors.Is(err, kind.Denied) {
		t.Errorf("%v", err)
	}
}

func TestKernelConformance(t *testing.T) {
	needUblk(t)
	presenttest.Conformance(t, subject)
}

// TestKernelSteps kills a process at each step of presenting and of withdrawing a disk.
// The next process knows the disk, or nothing is left of it.
func TestKernelSteps(t *testing.T) {
	needUblk(t)
	ctx := context.Background()
	for _, c := range []struct {
		op, step string
		there    bool
	}{
		{"present", "created", false},
		{"present", "recorded", false},
		{"withdraw", "halted", false},
		{"withdraw", "forgotten", false},
		{"withdraw", "nowhere", false},
	} {
		t.Run(c.op+" "+c.step, func(t *testing.T) {
			dir := t.TempDir()
			image(t, dir, "image", 1<<20)
			if c.op == "withdraw" {
				p, err := New(testOptions(dir))
				if err != nil {
					t.Fatal(err)
				}
				if _, err := p.Present(ctx, "d", stepSource(dir), false); err != nil {
					t.Fatal(err)
				}
				if err := p.Close(); err != nil {
					t.Fatal(err)
				}
			}
			out, err := exec.Command("/proc/self/exe", stepArg, dir, c.op, c.step).Output()
			if c.step != "nowhere" && (err == nil || len(out) > 0) {
				t.Fatalf("it did not kill itself: %s, %v", out, err)
			}
			p, err := New(testOptions(dir))
			if err != nil {
				t.Fatal(err)
			}
			if list, _ := p.List(ctx); len(list) != 0 {
				t.Errorf("disks %+v", list)
			}
			if devices := ours(dir); len(devices) != 0 {
				t.Errorf("devices %+v", devices)
			}
			d, err := p.Present(ctx, "d", stepSource(dir), false)
			if err != nil {
				t.Fatal(err)
			}
			run(t, "dd", "if=/dev/zero", "of="+d.Path, "bs=64k", "count=16", "conv=fsync")
			if err := p.Teardown(ctx); err != nil {
				t.Fatal(err)
			}
			left(t, dir)
		})
	}
}

// TestKernelForeign leaves the devices of others alone, and notices when somebody deletes
// one of ours.
func TestKernelForeign(t *testing.T) {
	needUblk(t)
	ctx, dir := context.Background(), t.TempDir()
	m, err := malloc.New(1 << 20)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	foreign, err := ublk.New(ublk.Options{Device: m, ID: -1, Owner: 7})
	if err != nil {
		t.Fatal(err)
	}
	defer foreign.Stop(ctx)
	p, err := New(testOptions(dir))
	if err != nil {
		t.Fatal(err)
	}
	source := image(t, dir, "image", 1<<20)
	d, err := p.Present(ctx, "d", source, true)
	if err != nil {
		t.Fatal(err)
	}
	var n int
	fmt.Sscanf(d.Path, "/dev/ublkb%d", &n)
	if err := ublk.Delete(ctx, n); err != nil {
		t.Fatal(err)
	}
	again, err := p.Present(ctx, "d", source, true)
	if err != nil {
		t.Fatal(err)
	}
	run(t, "dd", "if="+again.Path, "of=/dev/null", "bs=64k")
	fmt.Sscanf(again.Path, "/dev/ublkb%d", &n)
	if err := ublk.Delete(ctx, n); err != nil {
		t.Fatal(err)
	}
	if err := p.Withdraw(ctx, "d"); err != nil {
		t.Errorf("withdraw what somebody deleted: %v", err)
	}
	if err := p.Teardown(ctx); err != nil {
		t.Fatal(err)
	}
	left(t, dir)
	if list, err := ublk.List(); err != nil || len(list) != 1 || list[0].ID != foreign.ID() {
		t.Errorf("devices %+v, %v", list, err)
	}
}

// TestKernelMany presents many disks at once, hands all over, and withdraws them.
func TestKernelMany(t *testing.T) {
	needUblk(t)
	const disks = 50
	ctx, dir := context.Background(), t.TempDir()
	for i := range disks {
		image(t, dir, fmt.Sprint(i), 1<<20)
	}
	each := func(f func(i int) error) time.Duration {
		begin := time.Now()
		var all sync.WaitGroup
		for i := range disks {
			all.Go(func() {
				if err := f(i); err != nil {
					t.Errorf("%d: %v", i, err)
				}
			})
		}
		all.Wait()
		return time.Since(begin).Round(time.Millisecond)
	}
	p, err := New(testOptions(dir))
	if err != nil {
		t.Fatal(err)
	}
	source := func(i int) present.Source {
		return presenttest.DefaultSource(filepath.Join(dir, fmt.Sprint(i)), true)
	}
	t.Logf("%d disks presented in %v", disks, each(func(i int) error {
		_, err := p.Present(ctx, fmt.Sprint(i), source(i), true)
		return err
	}))
	before, _ := p.List(ctx)
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	if p, err = New(testOptions(dir)); err != nil {
		t.Fatal(err)
	}
	after, _ := p.List(ctx)
	if len(before) != disks || !slices.Equal(before, after) {
		t.Errorf("%d disks, then %d, or others", len(before), len(after))
	}
	t.Logf("taken over in %v", each(func(i int) error {
		f, err := os.Open(after[i].Path)
		if err != nil {
			return err
		}
		defer f.Close()
		_, err = io.Copy(io.Discard, f)
		return err
	}))
	t.Logf("withdrawn in %v", each(func(i int) error { return p.Withdraw(ctx, fmt.Sprint(i)) }))
	if err := p.Teardown(ctx); err != nil {
		t.Fatal(err)
	}
	left(t, dir)
}

// TestKernelExt4 has a file system on a disk while its server is killed.
func TestKernelExt4(t *testing.T) {
	needUblk(t)
	for _, tool := range []string{"mkfs.ext4", "fsck.ext4", "fio"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("%s is not installed: run make deps", tool)
		}
	}
	dir := t.TempDir()
	ctx := context.Background()
	source := image(t, dir, "image", 32<<20)
	serve := func() (stop func()) {
		cmd := exec.Command("/proc/self/exe", "presenttest-serve", dir)
		in, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		cmd.Stderr = os.Stderr
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		return func() { cmd.Process.Kill(); cmd.Wait(); in.Close() }
	}
	p, err := New(testOptions(dir))
	if err != nil {
		t.Fatal(err)
	}
	d, err := p.Present(ctx, "fs", source, false)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	stop := serve()
	run(t, "mkfs.ext4", "-q", "-E", "nodiscard", d.Path)
	target := filepath.Join(dir, "mnt")
	if err := os.Mkdir(target, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := mount.Ext4(ctx, d, target); err != nil {
		t.Fatal(err)
	}
	fio := exec.Command("fio", "--name=e", "--directory="+target, "--ioengine=psync", "--rw=randwrite", "--bs=4k", "--size=2m", "--numjobs=2",
		"--fsync=16", "--verify=crc32c", "--verify_fatal=1")
	var out bytes.Buffer
	fio.Stdout, fio.Stderr = &out, &out
	if err := fio.Start(); err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- fio.Wait() }()
	kills := 0
	for ended := false; !ended; {
		select {
		case err := <-done:
			if err != nil {
				t.Errorf("fio: %v\n%s", err, out.String())
			}
			ended = true
		case <-time.After(700 * time.Millisecond):
			stop()
			stop = serve()
			kills++
		}
	}
	t.Logf("%d kills", kills)
	if err := mount.Unmount(ctx, target); err != nil {
		t.Fatal(err)
	}
	run(t, "fsck.ext4", "-n", "-f", d.Path)
	stop()
	if p, err = New(testOptions(dir)); err != nil {
		t.Fatal(err)
	}
	if err := p.Teardown(ctx); err != nil {
		t.Fatal(err)
	}
	run(t, "fsck.ext4", "-n", "-f", source.Path)
	left(t, dir)
}
