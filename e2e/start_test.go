package e2e

import (
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"github.com/thaw-project/thaw/e2e/recipe"
)

// TestColdStart converts an image in every way and starts it, without fetching a
// layer.
func TestColdStart(t *testing.T) {
	b := start(t)
	source := b.image(t, recipe.Small("a"))
	for i, v := range variants {
		t.Run(v.String(), func(t *testing.T) {
			s := b.thaw(t)
			dest, _ := b.convert(t, s, source, v)
			n := b.node(t, s)
			c, timing := coldStart(t, n, fmt.Sprintf("cold%d", i), dest)
			body, err := c.Ready(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if !strings.Contains(body, "hello from a") {
				t.Errorf("the container answers %q", body)
			}
			t.Logf("pull %v, create %v, ready %v", timing.Pull, timing.Create, timing.Ready)
			wantNoLayers(t, b, n.Containerd.Root, "64k")
		})
	}
}

// wantNoLayers fails if containerd's content store holds anything larger than limit, as
// find writes it: manifests and configs are a few kB.
func wantNoLayers(t *testing.T, b *bench, root, limit string) {
	t.Helper()
	out, err := b.lab.Command(t.Context(), "find", filepath.Join(root, "io.containerd.content.v1.content"), "-type", "f", "-size", "+"+limit).Output()
	if err != nil {
		t.Fatal(err)
	}
	if len(out) > 0 {
		t.Errorf("containerd fetched layers:\n%s", out)
	}
}

// TestOrdinaryImage runs an image that was not converted on the same snapshotter, and
// a converted one's ordinary layers when the store does not have its blocks.
func TestOrdinaryImage(t *testing.T) {
	b := start(t)
	source := b.image(t, recipe.Small("a"))
	s := b.thaw(t)
	n := b.node(t, s)
	c, _ := coldStart(t, n, "ordinary", source)
	if body, err := c.Ready(t.Context()); err != nil || !strings.Contains(body, "hello from a") {
		t.Fatalf("%q, %v", body, err)
	}

	t.Run("blocks missing", func(t *testing.T) {
		other := b.thaw(t)
		converted := b.image(t, recipe.Small("missing"))
		dest, _ := b.convert(t, other, converted, variants[0])
		c, _ := coldStart(t, n, "fallback", dest)
		if body, err := c.Ready(t.Context()); err != nil || !strings.Contains(body, "hello from missing") {
			t.Fatalf("%q, %v", body, err)
		}
	})
}

// TestChild builds an ordinary image on a converted image's layers: it unpacks on top
// of blocks.
func TestChild(t *testing.T) {
	b := start(t)
	parent := b.image(t, recipe.Small("a"))
	child := b.image(t, recipe.Child(recipe.Small("a")))
	for i, v := range variants {
		t.Run(v.String(), func(t *testing.T) {
			s := b.thaw(t)
			n := b.node(t, s)
			dest, _ := b.convert(t, s, parent, v)
			if _, err := n.Pull(t.Context(), dest); err != nil {
				t.Fatal(err)
			}
			c, _ := coldStart(t, n, fmt.Sprintf("child%d", i), child)
			body, err := c.Ready(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if !strings.Contains(body, "hello from the child") {
				t.Errorf("the child answers %q", body)
			}
			out, err := c.Exec(t.Context(), "/bin/sh", "-c", "cat /etc/child; test ! -e /etc/issue && echo gone; wc -c </srv/web/data")
			if err != nil {
				t.Fatal(err)
			}
			if !strings.Contains(out, "built on another image\ngone\n") {
				t.Errorf("in the child: %q", out)
			}
		})
	}
}

// TestSharing converts two images with a common base: the second writes only what
// differs.
func TestSharing(t *testing.T) {
	b := start(t)
	for _, v := range []variant{variants[0], variants[2]} {
		t.Run(v.String(), func(t *testing.T) {
			s := b.thaw(t)
			_, first := b.convert(t, s, b.image(t, recipe.Small("a")), v)
			// The same repository, so that local blocks are shared too.
			image, err := b.builder.Build(t.Context(), recipe.Small("b"))
			if err != nil {
				t.Fatal(err)
			}
			ref := b.registry.Ref("small-a", "b")
			if err := recipe.Push(t.Context(), image, ref); err != nil {
				t.Fatal(err)
			}
			_, second := b.convert(t, s, ref, v)
			a, bb := first.Images[0], second.Images[0]
			t.Logf("A wrote %d bytes in %v, B wrote %d bytes in %v", first.WrittenBytes(), first.Took, second.WrittenBytes(), second.Took)
			t.Logf("A's blocks %v", a.Blocks())
			t.Logf("B's blocks %v", bb.Blocks())
			for i := range 2 {
				if a.Layers[i].Block != bb.Layers[i].Block || !bb.Layers[i].Reused {
					t.Errorf("layer %d is not shared: %s and %s (reused: %v)", i, a.Layers[i].Block, bb.Layers[i].Block, bb.Layers[i].Reused)
				}
			}
			if a.Soldier == bb.Soldier {
				t.Error("two images have one leaf")
			}
			// B's own layer is 0.5 MB of 210.
			if limit := first.WrittenBytes() / 10; second.WrittenBytes() > limit {
				t.Errorf("B wrote %d bytes, more than %d", second.WrittenBytes(), limit)
			}
			out, err := s.Do(t.Context(), "lvol", "list")
			if err != nil {
				t.Fatal(err)
			}
			t.Logf("lvols:\n%s", out)

			// Converting again writes nothing, and gives the same digest.
			_, again := b.convert(t, s, ref, v)
			if again.Digest != second.Digest || again.WrittenBytes() != 0 {
				t.Errorf("a second conversion gives %s and wrote %d bytes, the first gave %s", again.Digest, again.WrittenBytes(), second.Digest)
			}

			// Removing B keeps A; removing A frees the rest.
			if _, err := s.Do(t.Context(), "image", "remove", ref+"-"+v.String()); err != nil {
				t.Fatal(err)
			}
			n := b.node(t, s)
			c, _ := coldStart(t, n, "shared-"+v.String(), b.image(t, recipe.Small("a"))+"-"+v.String())
			if _, err := c.Ready(t.Context()); err != nil {
				t.Fatal(err)
			}
		})
	}
}

// TestOldContainerd runs with the containerd that Debian ships.
func TestOldContainerd(t *testing.T) {
	b := start(t)
	bin, err := b.lab.Old(t.Context(), filepath.Dir(b.builder.Cache))
	if err != nil {
		t.Skipf("Debian's containerd cannot be fetched (%v): run where apt-get download works", err)
	}
	source := b.image(t, recipe.Small("a"))
	for i, v := range variants {
		t.Run(v.String(), func(t *testing.T) {
			s := b.thaw(t)
			dest, _ := b.convert(t, s, source, v)
			n := b.oldNode(t, s, bin)
			c, timing := coldStart(t, n, fmt.Sprintf("old%d", i), dest)
			if body, err := c.Ready(t.Context()); err != nil || !strings.Contains(body, "hello from a") {
				t.Fatalf("%q, %v", body, err)
			}
			version, err := n.Containerd.Client.Version(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			t.Logf("containerd %s: pull %v, create %v, ready %v", version.Version, timing.Pull, timing.Create, timing.Ready)
			wantNoLayers(t, b, n.Containerd.Root, "64k")
		})
	}
}
