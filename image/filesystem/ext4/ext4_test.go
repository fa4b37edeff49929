package ext4

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/pkg/archive"
	"golang.org/x/sys/unix"

	"github.com/thaw-project/thaw/image/block"
	"github.com/thaw-project/thaw/image/filesystem"
	"github.com/thaw-project/thaw/image/layer/torture"
	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/node/mount"
)

func need(t testing.TB) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("mounts ext4 on loop devices: run as root")
	}
	if _, err := os.Stat("/dev/loop-control"); err != nil {
		t.Skip("needs loop devices: modprobe loop")
	}
	if _, err := (&Builder{}).find(); err != nil {
		t.Skip("needs mkfs.ext4: apt-get install e2fsprogs")
	}
}

func newDisk(t testing.TB, o filesystem.Options) *os.File {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "disk"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if err := f.Truncate(o.SizeBytes); err != nil {
		t.Fatal(err)
	}
	if err := new(Builder).Format(t.Context(), f, o); err != nil {
		t.Fatal(err)
	}
	return f
}

func allocated(t testing.TB, f *os.File) int64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		t.Fatal(err)
	}
	return st.Blocks * 512
}

func fsck(t testing.TB, f *os.File) {
	t.Helper()
	if out, err := exec.Command("e2fsck", "-f", "-n", f.Name()).CombinedOutput(); err != nil {
		t.Errorf("e2fsck: %v: %s", err, out)
	}
}

// readOnly mounts disk and calls f with where.
func readOnly(t testing.TB, disk *os.File, f func(root string)) {
	t.Helper()
	loop, err := mount.OpenLoop(disk.Name(), mount.LoopOptions{ReadOnly: true, AutoClear: true})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		loop.Close()
		if err := waitLoopGone(disk.Name()); err != nil {
			t.Error(err)
		}
	}()
	at := t.TempDir()
	if err := unix.Mount(loop.Name(), at, "ext4", unix.MS_RDONLY, "noload"); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unix.Unmount(at, 0); err != nil {
			t.Error(err)
		}
	}()
	f(at)
}

func overlay(t testing.TB, lower []string, f func(root string)) {
	t.Helper()
	if len(lower) == 1 {
		f(lower[0])
		return
	}
	at := t.TempDir()
	if err := unix.Mount("overlay", at, "overlay", unix.MS_RDONLY, "lowerdir="+strings.Join(lower, ":")); err != nil {
		t.Fatalf("overlay of %v: %v", lower, err)
	}
	defer func() {
		if err := unix.Unmount(at, 0); err != nil {
			t.Error(err)
		}
	}()
	f(at)
}

func walk(t testing.TB, root string) map[string]torture.Node {
	t.Helper()
	nodes, err := torture.Walk(root)
	if err != nil {
		t.Fatal(err)
	}
	return nodes
}

// TestSameTreeAsContainerd unpacks every case of a layer with this package, in both
// modes, and as containerd's overlayfs snapshotter does, and compares the trees.
func TestSameTreeAsContainerd(t *testing.T) {
	need(t)
	o := filesystem.Options{SizeBytes: 4 << 30, UUID: [16]byte{1, 2, 3}}
	layersOptions, mergedOptions := o, o
	layersOptions.Mode, mergedOptions.Mode = block.ModeOverlayfs, block.ModeOverlaybd
	layers, merged := newDisk(t, layersOptions), newDisk(t, mergedOptions)
	since := time.Now().Add(-time.Second)
	var uppers []string // of containerd, the topmost first
	for i, l := range torture.Stack() {
		upper := t.TempDir()
		if err := os.Chmod(upper, 0o755); err != nil {
			t.Fatal(err)
		}
		var opts []archive.ApplyOpt
		if i > 0 {
			opts = append(opts, archive.WithConvertWhiteout(archive.OverlayConvertWhiteout), archive.WithParents(uppers))
		}
		if _, err := archive.Apply(t.Context(), upper, bytes.NewReader(l.Tar), opts...); err != nil {
			t.Fatalf("containerd: layer %d (%s): %v", i, l.Name, err)
		}
		uppers = append([]string{upper}, uppers...)
		var want map[string]torture.Node
		overlay(t, uppers, func(root string) { want = walk(t, root) })

		b := new(Builder)
		if err := b.Apply(t.Context(), layers, layersOptions, i, bytes.NewReader(l.Tar)); err != nil {
			t.Fatalf("layer %d (%s), mode overlayfs: %v", i, l.Name, err)
		}
		if err := b.Apply(t.Context(), merged, mergedOptions, i, bytes.NewReader(l.Tar)); err != nil {
			t.Fatalf("layer %d (%s), mode overlaybd: %v", i, l.Name, err)
		}
		readOnly(t, layers, func(root string) {
			var lower []string
			for j := i; j >= 0; j-- {
				lower = append(lower, filepath.Join(root, fmt.Sprint(j)))
			}
			overlay(t, lower, func(root string) {
				for _, line := range torture.Diff(want, walk(t, root), since) {
					t.Errorf("layer %d (%s), mode overlayfs: %s", i, l.Name, line)
				}
			})
		})
		readOnly(t, merged, func(root string) {
			for _, line := range torture.Diff(want, walk(t, root), since) {
				t.Errorf("layer %d (%s), mode overlaybd: %s", i, l.Name, line)
			}
		})
		fsck(t, layers)
		fsck(t, merged)
		if t.Failed() {
			return
		}
	}
}

// TestFormatIsSmallAndReproducible: a block of any size costs almost nothing, and
// two of the same name hold the same bytes.
func TestFormatIsSmallAndReproducible(t *testing.T) {
	need(t)
	for _, size := range []int64{64 << 20, 1 << 30, 100 << 30, 2 << 40} {
		t.Run(fmt.Sprintf("%dMiB", size>>20), func(t *testing.T) {
			o := filesystem.Options{Mode: block.ModeOverlayfs, SizeBytes: size, UUID: [16]byte{9}}
			begin := time.Now()
			a := newDisk(t, o)
			t.Logf("formatted in %s, %d KiB", time.Since(begin), allocated(t, a)>>10)
			if n := allocated(t, a); n > 4<<20 {
				t.Errorf("%d bytes are allocated after formatting", n)
			}
			b := newDisk(t, o)
			if size <= 1<<30 {
				if out, err := exec.Command("cmp", a.Name(), b.Name()).CombinedOutput(); err != nil {
					t.Errorf("two file systems of one name differ: %s", out)
				}
			}
			fsck(t, a)
			// Mounting must not make the kernel zero inode tables.
			if err := new(Builder).Apply(t.Context(), a, o, 0, bytes.NewReader(torture.NewBuilder().File("f", []byte("x")).Tar())); err != nil {
				t.Fatal(err)
			}
			if n := allocated(t, a); n > 5<<20 {
				t.Errorf("%d bytes are allocated after a layer of one byte", n)
			}
		})
	}
}

// TestNothingOutside: names and links that lead out of the tree.
func TestNothingOutside(t *testing.T) {
	need(t)
	outside := t.TempDir()
	probe := filepath.Join(outside, "probe")
	cases := map[string]struct {
		tar  []byte
		fine bool
	}{
		"dotdot":   {tar: torture.NewBuilder().File("../../../../.."+probe, []byte("x")).Tar()},
		"inner":    {tar: torture.NewBuilder().Dir("a").File("a/../../../../../../.."+probe, []byte("x")).Tar()},
		"absolute": {tar: torture.NewBuilder().File(probe, []byte("x")).Tar()},
		"link":     {tar: torture.NewBuilder().Link("l", "../../../../../etc/passwd").Tar()},
		"symlink": {fine: true, tar: torture.NewBuilder().Symlink("s", outside).File("s/probe", []byte("x")).
			Symlink("up", "../../../../../../../.."+outside).File("up/probe", []byte("x")).Tar()},
	}
	for name, c := range cases {
		for _, mode := range []block.Mode{block.ModeOverlayfs, block.ModeOverlaybd} {
			t.Run(name+"/"+string(mode), func(t *testing.T) {
				o := filesystem.Options{Mode: mode, SizeBytes: 256 << 20}
				disk := newDisk(t, o)
				err := new(Builder).Apply(t.Context(), disk, o, 0, bytes.NewReader(c.tar))
				if !c.fine && kind.Of(err) != kind.Invalid {
					t.Errorf("error %v, want kind invalid", err)
				}
				if c.fine && err != nil {
					t.Error(err)
				}
				if _, err := os.Lstat(probe); err == nil {
					t.Fatal("a layer wrote outside of its tree")
				}
			})
		}
	}
}

func TestFailures(t *testing.T) {
	need(t)
	whole := torture.NewBuilder().File("big", torture.Data(1, 96<<20)).Tar()
	o := filesystem.Options{Mode: block.ModeOverlayfs, SizeBytes: 64 << 20}
	t.Run("full", func(t *testing.T) {
		small := torture.NewBuilder()
		for i := range 100 {
			small.File(fmt.Sprint(i), torture.Data(int64(i), 1<<20))
		}
		err := new(Builder).Apply(t.Context(), newDisk(t, o), o, 0, bytes.NewReader(small.Tar()))
		if kind.Of(err) != kind.NoSpace {
			t.Errorf("%v, want kind no space", err)
		}
	})
	t.Run("too large", func(t *testing.T) {
		err := new(Builder).Apply(t.Context(), newDisk(t, o), o, 0, bytes.NewReader(whole))
		if kind.Of(err) != kind.Invalid {
			t.Errorf("%v, want kind invalid", err)
		}
	})
	large := o
	large.SizeBytes = 512 << 20
	t.Run("truncated", func(t *testing.T) {
		err := new(Builder).Apply(t.Context(), newDisk(t, large), large, 0, bytes.NewReader(whole[:5<<20]))
		if kind.Of(err) != kind.Corrupt {
			t.Errorf("%v, want kind corrupt", err)
		}
	})
	t.Run("garbage", func(t *testing.T) {
		err := new(Builder).Apply(t.Context(), newDisk(t, large), large, 0, bytes.NewReader(torture.Data(3, 1<<20)))
		if kind.Of(err) != kind.Corrupt {
			t.Errorf("%v, want kind corrupt", err)
		}
	})
	t.Run("canceled", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		r := &cancelAt{r: bytes.NewReader(whole), left: 10 << 20, cancel: cancel}
		err := new(Builder).Apply(ctx, newDisk(t, large), large, 0, r)
		if kind.Of(err) != kind.Canceled || !errors.Is(err, context.Canceled) {
			t.Errorf("%v, want kind canceled", err)
		}
	})
}

type cancelAt struct {
	r      *bytes.Reader
	left   int
	cancel func()
}

func (c *cancelAt) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	if c.left -= n; c.left < 0 {
		c.cancel()
	}
	return n, err
}

func BenchmarkApply(b *testing.B) {
	need(b)
	l := torture.NewBuilder()
	total := 0
	for i := range 4000 {
		n := 20_000 + i%7*3000
		l.File(fmt.Sprintf("d%d/f%d", i%64, i), torture.Data(int64(i), n))
		total += n
	}
	tar := l.Tar()
	o := filesystem.Options{Mode: block.ModeOverlayfs, SizeBytes: 100 << 30}
	b.SetBytes(int64(total))
	for b.Loop() {
		b.StopTimer()
		disk := newDisk(b, o)
		b.StartTimer()
		if err := new(Builder).Apply(b.Context(), disk, o, 0, bytes.NewReader(tar)); err != nil {
			b.Fatal(err)
		}
	}
}
