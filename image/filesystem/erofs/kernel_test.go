package erofs

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/pkg/archive"
	"golang.org/x/sys/unix"

	"github.com/thaw-project/thaw/image/block"
	"github.com/thaw-project/thaw/image/filesystem"
	"github.com/thaw-project/thaw/image/layer/torture"
)

var ctx = context.Background()

const testBlock = 4 << 30

func options(mode block.Mode) filesystem.Options {
	return filesystem.Options{Mode: mode, SizeBytes: testBlock, UUID: [16]byte{1, 2, 3}}
}

// newBlock makes an empty, formatted block.
func newBlock(t testing.TB, dir string, o filesystem.Options) *os.File {
	t.Helper()
	f, err := os.CreateTemp(dir, "block")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if err := f.Truncate(o.SizeBytes); err != nil {
		t.Fatal(err)
	}
	if err := New().Format(ctx, f, o); err != nil {
		t.Fatal(err)
	}
	return f
}

func apply(t testing.TB, f *os.File, o filesystem.Options, index int, tar []byte) {
	t.Helper()
	if err := New().Apply(ctx, f, o, index, bytes.NewReader(tar)); err != nil {
		t.Fatalf("apply layer %d: %v", index, err)
	}
}

func needMount(t testing.TB) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("mounts EROFS and overlay: run as root")
	}
	fs, err := os.ReadFile("/proc/filesystems")
	if err != nil || !strings.Contains(string(fs), "\terofs\n") || !strings.Contains(string(fs), "\toverlay\n") {
		t.Skip("needs a kernel with EROFS and overlayfs")
	}
}

// mountErofs mounts a block: the file itself where the kernel can (6.12 and
// later), a loop device otherwise.
func mountErofs(t testing.TB, file, at string) {
	t.Helper()
	if err := os.MkdirAll(at, 0o755); err != nil {
		t.Fatal(err)
	}
	err := unix.Mount(file, at, "erofs", unix.MS_RDONLY, "")
	if errors.Is(err, unix.ENOTBLK) {
		out, lerr := exec.Command("mount", "-t", "erofs", "-o", "ro,loop", file, at).CombinedOutput()
		if lerr != nil {
			t.Skipf("this kernel mounts no EROFS file, and there is no loop device: %v: %s", lerr, out)
		}
		err = nil
	}
	if err != nil {
		t.Fatalf("mount %s: %v", file, err)
	}
	t.Cleanup(func() { unmount(t, at) })
}

func unmount(t testing.TB, at string) {
	if err := unix.Unmount(at, 0); err != nil && !errors.Is(err, unix.EINVAL) {
		t.Errorf("unmount %s: %v", at, err)
	}
}

// overlay shows lower directories, the topmost first, as one tree and returns
// where. A single one is itself.
func overlay(t testing.TB, at string, lower []string) string {
	t.Helper()
	if len(lower) == 1 {
		return lower[0]
	}
	if err := os.MkdirAll(at, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("overlay", at, "overlay", unix.MS_RDONLY, "lowerdir="+strings.Join(lower, ":")); err != nil {
		t.Fatalf("overlay of %v: %v", lower, err)
	}
	t.Cleanup(func() { unmount(t, at) })
	return at
}

func walk(t testing.TB, root string) map[string]torture.Node {
	t.Helper()
	nodes, err := torture.Walk(root)
	if err != nil {
		t.Fatal(err)
	}
	return nodes
}

func fsck(t testing.TB, file string) {
	t.Helper()
	if _, err := exec.LookPath("fsck.erofs"); err != nil {
		t.Log("fsck.erofs is not installed: apt-get install erofs-utils")
		return
	}
	out, err := exec.Command("fsck.erofs", "--extract", file).CombinedOutput()
	if err != nil || len(out) > 0 && !bytes.Contains(out, []byte("No errors found")) {
		t.Errorf("fsck.erofs: %v: %s", err, tailOf(out))
	}
	if out, err := exec.Command("dump.erofs", "-s", "-S", file).CombinedOutput(); err != nil {
		t.Errorf("dump.erofs: %v: %s", err, tailOf(out))
	}
}

func tailOf(b []byte) []byte { return b[max(0, len(b)-2000):] }

// reference unpacks layers as containerd's overlayfs snapshotter does and returns
// the upper directories, the lowest first.
func reference(t testing.TB, dir string, layers []torture.Layer) ([]string, error) {
	t.Helper()
	var uppers, parents []string
	for i, l := range layers {
		upper := filepath.Join(dir, fmt.Sprint(i))
		if err := os.Mkdir(upper, 0o755); err != nil {
			t.Fatal(err)
		}
		var opts []archive.ApplyOpt
		if i > 0 {
			opts = append(opts, archive.WithConvertWhiteout(archive.OverlayConvertWhiteout), archive.WithParents(parents))
		}
		if _, err := archive.Apply(ctx, upper, bytes.NewReader(l.Tar), opts...); err != nil {
			return nil, fmt.Errorf("layer %d (%s): %w", i, l.Name, err)
		}
		uppers = append(uppers, upper)
		parents = append([]string{upper}, parents...)
	}
	return uppers, nil
}

func reverse(s []string) []string {
	r := make([]string, 0, len(s))
	for i := len(s) - 1; i >= 0; i-- {
		r = append(r, s[i])
	}
	return r
}

// compareStack applies layers in both modes and with containerd and compares the
// trees after each layer.
func compareStack(t *testing.T, layers []torture.Layer) {
	dir := t.TempDir()
	since := time.Now().Add(-time.Second)
	uppers, err := reference(t, dir, layers)
	if err != nil {
		t.Fatalf("containerd: %v", err)
	}
	fsLayers, fsMerged := newBlock(t, dir, options(block.ModeOverlayfs)), newBlock(t, dir, options(block.ModeOverlaybd))
	for i, l := range layers {
		apply(t, fsLayers, options(block.ModeOverlayfs), i, l.Tar)
		apply(t, fsMerged, options(block.ModeOverlaybd), i, l.Tar)
		fsck(t, fsLayers.Name())
		fsck(t, fsMerged.Name())
		t.Run(fmt.Sprintf("%d", i), func(t *testing.T) {
			want := walk(t, overlay(t, filepath.Join(dir, fmt.Sprint("want", i)), reverse(uppers[:i+1])))

			at := filepath.Join(dir, fmt.Sprint("layers", i))
			mountErofs(t, fsLayers.Name(), at)
			var lower []string
			for j := i; j >= 0; j-- {
				lower = append(lower, filepath.Join(at, fmt.Sprint(j)))
			}
			got := walk(t, overlay(t, filepath.Join(dir, fmt.Sprint("overlay", i)), lower))
			for _, line := range torture.Diff(want, got, since) {
				t.Errorf("layer %q, mode overlayfs: %s", l.Name, line)
			}

			at = filepath.Join(dir, fmt.Sprint("merged", i))
			mountErofs(t, fsMerged.Name(), at)
			for _, line := range torture.Diff(want, walk(t, at), since) {
				t.Errorf("layer %q, mode overlaybd: %s", l.Name, line)
			}
		})
		if t.Failed() {
			return
		}
	}
}

// TestRealLayers compares the uncompressed layer tars named, the lowest first and
// with commas between them, in THAW_TEST_LAYERS.
func TestRealLayers(t *testing.T) {
	needMount(t)
	names := os.Getenv("THAW_TEST_LAYERS")
	if names == "" {
		t.Skip("set THAW_TEST_LAYERS=FILE,FILE,... to layer tars")
	}
	var layers []torture.Layer
	for _, name := range strings.Split(names, ",") {
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		layers = append(layers, torture.Layer{Name: name, Tar: b})
	}
	compareStack(t, layers)
}

// overlayfs ignores an opaque mark on the root of a layer, and so does the merged
// tree.
func TestOpaqueRootHidesNothing(t *testing.T) {
	needMount(t)
	compareStack(t, []torture.Layer{
		{Name: "base", Tar: torture.NewBuilder().File("old", []byte("x")).Dir("d").File("d/old", nil).Tar()},
		{Name: "opaque root", Tar: torture.NewBuilder().File("new", []byte("x")).File(".wh..wh..opq", nil).Dir("d").File("d/new", nil).Tar()},
		{Name: "above", Tar: torture.NewBuilder().File("newer", []byte("x")).Tar()},
	})
}

// TestRandomStacks compares random layers. One that containerd refuses, with
// whatever it left behind, is taken away and another tried.
func TestRandomStacks(t *testing.T) {
	needMount(t)
	seed := time.Now().UnixNano()
	if s := os.Getenv("SEED"); s != "" {
		seed, _ = strconv.ParseInt(s, 10, 64)
	}
	t.Logf("SEED=%d", seed)
	rounds := 12
	if s := os.Getenv("ROUNDS"); s != "" {
		rounds, _ = strconv.Atoi(s)
	}
	for round := range rounds {
		t.Run(fmt.Sprint(round), func(t *testing.T) {
			randomStack(t, rand.New(rand.NewSource(seed+int64(round))))
		})
	}
}

func randomStack(t *testing.T, rng *rand.Rand) {
	dir := t.TempDir()
	since := time.Now().Add(-time.Second)
	fsLayers, fsMerged := newBlock(t, dir, options(block.ModeOverlayfs)), newBlock(t, dir, options(block.ModeOverlaybd))
	var uppers []string
	var layers []torture.Layer
	for tries := 0; len(uppers) < 5 && tries < 200; tries++ {
		l := torture.Layer{Tar: torture.Random(rng, len(uppers) == 0)}
		upper := filepath.Join(dir, fmt.Sprint("upper", len(uppers)))
		if err := os.Mkdir(upper, 0o755); err != nil {
			t.Fatal(err)
		}
		var opts []archive.ApplyOpt
		if len(uppers) > 0 {
			opts = append(opts, archive.WithConvertWhiteout(archive.OverlayConvertWhiteout), archive.WithParents(reverse(uppers)))
		}
		if _, err := archive.Apply(ctx, upper, bytes.NewReader(l.Tar), opts...); err != nil {
			if err := os.RemoveAll(upper); err != nil {
				t.Fatal(err)
			}
			continue
		}
		apply(t, fsLayers, options(block.ModeOverlayfs), len(uppers), l.Tar)
		apply(t, fsMerged, options(block.ModeOverlaybd), len(uppers), l.Tar)
		uppers, layers = append(uppers, upper), append(layers, l)
	}
	fsck(t, fsLayers.Name())
	fsck(t, fsMerged.Name())
	want := walk(t, overlay(t, filepath.Join(dir, "want"), reverse(uppers)))
	at := filepath.Join(dir, "layers")
	mountErofs(t, fsLayers.Name(), at)
	var lower []string
	for i := len(uppers) - 1; i >= 0; i-- {
		lower = append(lower, filepath.Join(at, fmt.Sprint(i)))
	}
	for _, line := range torture.Diff(want, walk(t, overlay(t, filepath.Join(dir, "overlay"), lower)), since) {
		t.Errorf("mode overlayfs: %s", line)
	}
	at = filepath.Join(dir, "merged")
	mountErofs(t, fsMerged.Name(), at)
	got := walk(t, at)
	for name, w := range want {
		// The attributes of a directory that a layer implies come from a layer
		// below, and the merged tree does not know what an opaque mark has hidden
		// there.
		if g, ok := got[name]; ok && w.Mode&unix.S_IFMT == unix.S_IFDIR && g.Mode&unix.S_IFMT == unix.S_IFDIR && !w.MTime.Before(since) {
			g.Mode, g.UID, g.GID, g.Xattrs = w.Mode, w.UID, w.GID, w.Xattrs
			got[name] = g
		}
	}
	for _, line := range torture.Diff(want, got, since) {
		t.Errorf("mode overlaybd: %s", line)
	}
	if t.Failed() {
		for i, l := range layers {
			tr := tar.NewReader(bytes.NewReader(l.Tar))
			for h, err := tr.Next(); err == nil; h, err = tr.Next() {
				t.Logf("layer %d: %c %s -> %q mode %o %d:%d time %v", i, h.Typeflag, h.Name, h.Linkname, h.Mode, h.Uid, h.Gid, h.ModTime.UTC())
			}
		}
	}
}

func TestSameTreeAsContainerd(t *testing.T) {
	needMount(t)
	compareStack(t, torture.Stack())
}
