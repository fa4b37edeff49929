package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/google/uuid"
)

const (
	killEnv = "THAW_TEST_KILL_AT" // step number, in the process to be killed
	dirEnv  = "THAW_TEST_DIR"
	// everyEnv set makes TestKill kill at every step instead of a sample.
	everyEnv = "THAW_TEST_EVERY_STEP"
)

func TestMain(m *testing.M) {
	if at := os.Getenv(killEnv); at != "" {
		os.Exit(killMain(os.Getenv(dirEnv), at))
	}
	os.Exit(m.Run())
}

// killMain runs the script and kills this process with SIGKILL at step number at. It
// exits with 3 when the script ended before.
func killMain(dir, at string) int {
	last, err := strconv.Atoi(at)
	if err != nil {
		return 2
	}
	im := testImageOf(variants[must2(strconv.Atoi(os.Getenv("THAW_TEST_VARIANT")))].name)
	st, err := openStorage(filepath.Join(dir, "storage"))
	if err == nil {
		o := labOptions(dir, st)
		step := 0
		o.step = func(name string) {
			step++
			if step == last {
				fmt.Println(name)
				syscall.Kill(os.Getpid(), syscall.SIGKILL)
				select {}
			}
		}
		var s *Snapshotter
		if s, err = New(context.Background(), o); err == nil {
			err = script(s, im)
		}
	}
	if err != nil {
		fmt.Println(err)
		return 1
	}
	return 3
}

func must2[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// script is the life of an image and its containers as containerd drives it. It can
// be run again from the start after being killed anywhere, and then goes on from
// what is there.
func script(s *Snapshotter, im testImage) error {
	ctx := context.Background()
	there := func(name string) bool {
		_, err := s.Stat(ctx, name)
		return err == nil
	}
	prepare := func(key, parent string) error {
		if there(key) {
			return nil
		}
		_, err := s.Prepare(ctx, key, parent)
		return err
	}
	parent := ""
	if !there("removing") {
		for i := range im.refs {
			_, err := s.Prepare(ctx, "extract-"+uuid.NewString(), parent, snapshots.WithLabels(im.labels(i)))
			if !errdefs.IsAlreadyExists(err) {
				return fmt.Errorf("layer %d: %w", i, err)
			}
			parent = im.chainIDs[i]
		}
		if !there("image-2") {
			if err := prepare("container", im.top()); err != nil {
				return err
			}
			mounts, err := s.Mounts(ctx, "container")
			if err != nil {
				return err
			}
			if err := mount.WithTempMount(ctx, mounts, func(root string) error {
				return os.WriteFile(filepath.Join(root, "written"), []byte("by a container"), 0o644)
			}); err != nil {
				return err
			}
			if err := s.Commit(ctx, "image-2", "container"); err != nil {
				return err
			}
		}
		for _, p := range [][2]string{{"other", im.top()}, {"child", "image-2"}, {"on-layer-1", im.chainIDs[0]}} {
			if err := prepare(p[0], p[1]); err != nil {
				return err
			}
		}
		if !there("view") {
			if _, err := s.View(ctx, "view", "image-2"); err != nil {
				return err
			}
		}
		if err := prepare("removing", ""); err != nil {
			return err
		}
	}
	// The child of the lowest layer outlives the image.
	for _, name := range []string{"view", "child", "other", "image-2", im.chainIDs[2], im.chainIDs[1]} {
		if err := s.Remove(ctx, name); err != nil && !errdefs.IsNotFound(err) {
			return err
		}
	}
	if err := s.Cleanup(ctx); err != nil {
		return err
	}
	for _, name := range []string{"on-layer-1", im.chainIDs[0], "removing"} {
		if err := s.Remove(ctx, name); err != nil && !errdefs.IsNotFound(err) {
			return err
		}
	}
	return s.Cleanup(ctx)
}

// check mounts everything that is there, as it is promised.
func check(t *testing.T, s *Snapshotter, im testImage) {
	t.Helper()
	ctx := t.Context()
	written := tree{"written": "by a container"}
	for p, c := range merged {
		written[p] = c
	}
	want := map[string]tree{"image-2": written, "child": written, "view": written, "other": merged, "on-layer-1": layersUpTo(1), "removing": {}}
	for i, id := range im.chainIDs {
		want[id] = layersUpTo(i + 1)
	}
	var infos []snapshots.Info
	if err := s.Walk(ctx, func(_ context.Context, i snapshots.Info) error { infos = append(infos, i); return nil }); err != nil {
		t.Fatal(err)
	}
	for _, info := range infos {
		var mounts []mount.Mount
		var err error
		if info.Kind == snapshots.KindCommitted {
			mounts, err = s.View(ctx, "check", info.Name)
		} else {
			mounts, err = s.Mounts(ctx, info.Name)
		}
		if err != nil {
			t.Errorf("%s: %v", info.Name, err)
			continue
		}
		withMounts(t, mounts, func(root string) {
			if w, ok := want[info.Name]; ok {
				expect(t, root, w)
			} else if info.Name == "container" {
				// Killed before or after it wrote.
				if _, err := os.Stat(filepath.Join(root, "app")); err != nil {
					t.Error(err)
				}
			} else {
				t.Errorf("a snapshot %s is there", info.Name)
			}
		})
		if info.Kind == snapshots.KindCommitted {
			if err := s.Remove(ctx, "check"); err != nil {
				t.Error(err)
			}
		}
	}
}

func testImageOf(variant string) testImage {
	for _, v := range variants {
		if v.name == variant {
			return describeImage("image", v.mode, v.filesystem, len(threeLayers))
		}
	}
	panic("no variant " + variant)
}

// TestKill kills a process with SIGKILL at each of its steps through the life of an
// image, and continues in another.
func TestKill(t *testing.T) {
	requireKernel(t)
	seed := uint64(time.Now().UnixNano())
	every := os.Getenv(everyEnv) != ""
	if !every {
		t.Logf("seed %d; set %s=1 to kill at every step", seed, everyEnv)
	}
	random := rand.New(rand.NewPCG(seed, 0))
	for n, v := range variants {
		t.Run(v.name, func(t *testing.T) {
			at := 0
			for {
				if at++; !every {
					at += random.IntN(24)
				}
				done := false
				if !t.Run(fmt.Sprint("step ", at), func(t *testing.T) { done = killAt(t, n, at) }) || done {
					return
				}
			}
		})
	}
}

func killAt(t *testing.T, variant, at int) (done bool) {
	l := newLab(t)
	im := l.addImage("image", variants[variant].mode, variants[variant].filesystem, threeLayers...)
	if err := l.s.Close(); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), fmt.Sprint(killEnv, "=", at), dirEnv+"="+l.dir, fmt.Sprint("THAW_TEST_VARIANT=", variant))
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit) && exit.ExitCode() == 3:
		done = true
	case errors.As(err, &exit) && exit.Sys().(syscall.WaitStatus).Signal() == syscall.SIGKILL:
		t.Logf("killed at %s", out)
	default:
		t.Fatalf("script: %v: %s", err, out)
	}
	l.storage = must(openStorage(filepath.Join(l.dir, "storage")))(t)
	l.open()
	check(t, l.s, im)
	if err := script(l.s, im); err != nil {
		t.Fatal(err)
	}
	return done
}
