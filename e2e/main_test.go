package e2e

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/thaw-project/thaw/e2e/lab"
	"github.com/thaw-project/thaw/e2e/launch"
	"github.com/thaw-project/thaw/e2e/recipe"
)

// bench is what all tests share: a lab, and a registry that images are pushed to once.
type bench struct {
	lab      *lab.Lab
	registry *lab.Registry
	builder  recipe.Builder

	mu     sync.Mutex
	pushed map[string]string // guarded by mu; recipe name to reference
}

var shared *bench // nil when the tests are not to run

func TestMain(m *testing.M) {
	os.Exit(runAll(m))
}

func runAll(m *testing.M) int {
	if os.Getenv("THAW_E2E") == "" {
		return m.Run()
	}
	l, err := lab.New()
	if err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		return 1
	}
	defer func() {
		if err := l.Close(); err != nil {
			fmt.Fprintln(os.Stderr, "e2e: clean up:", err)
		}
	}()
	root, err := lab.ModuleRoot()
	if err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		return 1
	}
	registry, err := l.StartRegistry(context.Background(), lab.RegistryOptions{})
	if err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		return 1
	}
	shared = &bench{
		lab: l, registry: registry, pushed: map[string]string{},
		builder: recipe.Builder{Cache: filepath.Join(root, "out/cache/images"), Log: os.Stderr},
	}
	return m.Run()
}

// start returns the shared bench, or skips the test when there is none.
func start(t *testing.T) *bench {
	t.Helper()
	if shared == nil {
		t.Skip("end-to-end tests need root, built programs and minutes: run make e2e")
	}
	return shared
}

// image builds a recipe, pushes it once and returns its reference.
func (b *bench) image(t *testing.T, r recipe.Recipe) string {
	t.Helper()
	b.mu.Lock()
	defer b.mu.Unlock()
	if ref, ok := b.pushed[r.Name]; ok {
		return ref
	}
	image, err := b.builder.Build(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}
	return b.pushLocked(t, r.Name, image)
}

func (b *bench) push(t *testing.T, name string, image v1.Image) string {
	t.Helper()
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.pushLocked(t, name, image)
}

func (b *bench) pushLocked(t *testing.T, name string, image v1.Image) string {
	t.Helper()
	ref := b.registry.Ref(name, "1")
	if err := recipe.Push(t.Context(), image, ref); err != nil {
		t.Fatal(err)
	}
	b.pushed[name] = ref
	return ref
}

// thaw starts a thaw server that ends with the test; the test fails if the store is
// not clean then, or something is left behind.
func (b *bench) thaw(t *testing.T, args ...string) *lab.Thaw {
	t.Helper()
	return b.thawAs(t, nil, nil, args...)
}

// thawAs is thaw with what lab.StartThawAs takes.
func (b *bench) thawAs(t *testing.T, before, env []string, args ...string) *lab.Thaw {
	t.Helper()
	return b.thawWith(t, lab.ThawOptions{Before: before, Env: env, Args: args})
}

// thawWith is thaw with what lab.StartThawWith takes.
func (b *bench) thawWith(t *testing.T, o lab.ThawOptions) *lab.Thaw {
	t.Helper()
	s, err := b.lab.StartThawWith(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
		defer cancel()
		if t.Failed() {
			t.Logf("the end of the server's log:\n%s", s.Log(6000))
		}
		if o.Elsewhere && !t.Failed() {
			if err := s.CheckStore(ctx); err != nil {
				t.Errorf("the store at the end of the test: %v", err)
			}
		}
		if err := s.Shutdown(ctx); err != nil {
			t.Errorf("shut thaw server down: %v", err)
		}
		if err := s.CheckStore(ctx); err != nil && !o.NodeOnly && !o.Elsewhere {
			t.Errorf("the store after the test: %v", err)
		}
		left := b.leftovers(t, s)
		// A keeper answers that it ends before it has ended.
		for deadline := time.Now().Add(5 * time.Second); len(left) > 0 && time.Now().Before(deadline); left = b.leftovers(t, s) {
			time.Sleep(10 * time.Millisecond)
		}
		for _, line := range left {
			t.Errorf("left behind: %s", line)
		}
		if len(left) > 0 {
			return // to the lab, which unmounts first: what is mounted is not to be deleted
		}
		if err := os.RemoveAll(filepath.Dir(s.Root)); err != nil {
			t.Error(err)
		}
	})
	return s
}

// leftovers returns what is mounted, attached or running of this server.
func (b *bench) leftovers(t *testing.T, s *lab.Thaw) []string {
	t.Helper()
	lines, err := b.lab.LeftoversBelow(filepath.Dir(s.Root))
	if err != nil {
		t.Fatal(err)
	}
	return lines
}

// containerd starts a containerd that ends with the test.
func (b *bench) containerd(t *testing.T, o lab.ContainerdOptions) *lab.Containerd {
	t.Helper()
	c, err := b.lab.StartContainerd(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the end of containerd's log:\n%s", c.Log(3000))
		}
		if err := c.Stop(); err != nil {
			t.Error(err)
		}
	})
	return c
}

// node is a containerd with Thaw as snapshotter.
func (b *bench) node(t *testing.T, s *lab.Thaw) *launch.Node {
	t.Helper()
	return &launch.Node{Lab: b.lab, Containerd: b.containerd(t, lab.ContainerdOptions{Thaw: s}), Snapshotter: "thaw"}
}

// plainNode is a containerd with its own overlayfs.
func (b *bench) plainNode(t *testing.T) *launch.Node {
	t.Helper()
	return &launch.Node{Lab: b.lab, Containerd: b.containerd(t, lab.ContainerdOptions{}), Snapshotter: "overlayfs"}
}

type variant struct{ mode, filesystem string }

func (v variant) String() string { return v.mode + "-" + v.filesystem }

var variants = []variant{{"overlayfs", "erofs"}, {"overlayfs", "ext4"}, {"overlaybd", "ext4"}, {"overlaybd", "erofs"}}

// convert converts a pushed image and returns the result's reference.
func (b *bench) convert(t *testing.T, s *lab.Thaw, source string, v variant) (string, *lab.Converted) {
	t.Helper()
	dest := source + "-" + v.String()
	c, err := s.Convert(t.Context(), source, dest, v.mode, v.filesystem)
	if err != nil {
		t.Fatal(err)
	}
	return dest, c
}

// coldStart pulls and starts an image, which is deleted with the test.
func coldStart(t *testing.T, n *launch.Node, id, ref string) (*launch.Container, launch.Timing) {
	t.Helper()
	c, timing, err := n.Cold(t.Context(), id, ref)
	if c != nil {
		t.Cleanup(func() {
			if err := c.Delete(context.Background()); err != nil {
				t.Error(err)
			}
		})
	}
	if err != nil {
		t.Fatal(err)
	}
	return c, timing
}

// oldNode is the containerd in bin, which has no transfer service, with Thaw.
func (b *bench) oldNode(t *testing.T, s *lab.Thaw, bin string) *launch.Node {
	t.Helper()
	c := b.containerd(t, lab.ContainerdOptions{Thaw: s, BinDir: bin})
	return &launch.Node{Lab: b.lab, Containerd: c, Snapshotter: "thaw", Classic: true}
}
