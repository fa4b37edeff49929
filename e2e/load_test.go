package e2e

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/client"

	"github.com/thaw-project/thaw/e2e/launch"
	"github.com/thaw-project/thaw/e2e/recipe"
)

// The limits: resident memory of all Thaw processes together.
const (
	idleLimit    = 80 << 20
	runningLimit = 300 << 20
)

// TestFiftyFromOneImage starts 50 containers of one image at once, and holds Thaw's
// memory to its limits.
func TestFiftyFromOneImage(t *testing.T) {
	b := start(t)
	source := b.image(t, recipe.Small("a"))
	for _, v := range []variant{variants[0], variants[2]} {
		t.Run(v.String(), func(t *testing.T) {
			s := b.thaw(t)
			if bytes, lines := b.lab.RSS(s.Run); bytes > idleLimit || bytes == 0 {
				t.Errorf("idle Thaw has %d bytes resident, more than %d (or none): %q", bytes, idleLimit, lines)
			} else {
				t.Logf("idle: %.1f MB %q", float64(bytes)/1e6, lines)
			}
			dest, _ := b.convert(t, s, source, v)
			n := b.node(t, s)
			image, err := n.Pull(t.Context(), dest)
			if err != nil {
				t.Fatal(err)
			}
			images := make([]client.Image, 50)
			for i := range images {
				images[i] = image
			}
			begin := time.Now()
			containers := startAll(t, n, "fifty-"+v.String(), images)
			t.Logf("50 containers of one image ready in %v", time.Since(begin))
			bytes, lines := b.lab.RSS(s.Run)
			t.Logf("with 50 running: %.1f MB %q", float64(bytes)/1e6, lines)
			if bytes > runningLimit {
				t.Errorf("with 50 containers Thaw has %d bytes resident, more than %d", bytes, runningLimit)
			}
			for i, c := range containers {
				if _, err := c.Get(t.Context(), "/"); err != nil {
					t.Errorf("container %d: %v", i, err)
				}
			}
		})
	}
}

// TestTwentyImages pulls and starts 20 different images at once.
func TestTwentyImages(t *testing.T) {
	b := start(t)
	s := b.thaw(t)
	n := b.node(t, s)
	refs := make([]string, 20)
	for i := range refs {
		source := b.image(t, recipe.Small(fmt.Sprintf("n%02d", i)))
		refs[i], _ = b.convert(t, s, source, variants[i%len(variants)])
	}
	images := make([]client.Image, len(refs))
	begin := time.Now()
	all(t, len(refs), func(ctx context.Context, i int) error {
		var err error
		images[i], err = n.Pull(ctx, refs[i])
		return err
	})
	t.Logf("20 images pulled at once in %v", time.Since(begin))
	containers := startAll(t, n, "twenty", images)
	t.Logf("and their containers ready after %v", time.Since(begin))
	for i, c := range containers {
		body, err := c.Get(t.Context(), "/")
		want := fmt.Sprintf("hello from n%02d", i)
		if err != nil || !strings.Contains(body, want) {
			t.Errorf("container %d answers %q, %v; want %q", i, body, err, want)
		}
	}
	bytes, lines := b.lab.RSS(s.Run)
	t.Logf("with 20 images: %.1f MB %q", float64(bytes)/1e6, lines)
}

// startAll starts a container of each image at once and waits until all answer.
func startAll(t *testing.T, n *launch.Node, prefix string, images []client.Image) []*launch.Container {
	t.Helper()
	containers := make([]*launch.Container, len(images))
	t.Cleanup(func() {
		var wg sync.WaitGroup
		for _, c := range containers {
			if c != nil {
				wg.Go(func() {
					if err := c.Delete(context.Background()); err != nil {
						t.Error(err)
					}
				})
			}
		}
		wg.Wait()
	})
	all(t, len(images), func(ctx context.Context, i int) (err error) {
		containers[i], _, err = n.Warm(ctx, fmt.Sprintf("%s-%d", prefix, i), images[i])
		return err
	})
	return containers
}

// all runs f for 0 to n-1 at once and fails the test on any error.
func all(t *testing.T, n int, f func(ctx context.Context, i int) error) {
	t.Helper()
	errs := make([]error, n)
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() { errs[i] = f(t.Context(), i) })
	}
	wg.Wait()
	for i, err := range errs {
		if err != nil {
			t.Errorf("%d: %v", i, err)
		}
	}
	if t.Failed() {
		t.FailNow()
	}
}
