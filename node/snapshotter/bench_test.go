package snapshotter

import (
	"fmt"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
)

// BenchmarkContainer is what create and remove of a container cost in the snapshotter,
// over the real chain.
func BenchmarkContainer(b *testing.B) {
	requireKernel(b)
	run := func(name, parent string, l *lab) {
		b.Run(name, func(b *testing.B) {
			for i := range b.N {
				key := fmt.Sprint("container-", name, i)
				if _, err := l.s.Prepare(b.Context(), key, parent); err != nil {
					b.Fatal(err)
				}
				if err := l.s.Remove(b.Context(), key); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
	l := &lab{t: b, dir: shortDir(b)}
	end := l.openChain()
	defer func() {
		if err := end(); err != nil {
			b.Error(err)
		}
	}()
	if _, err := l.s.Prepare(b.Context(), "extract", ""); err != nil {
		b.Fatal(err)
	}
	if err := l.s.Commit(b.Context(), "ordinary", "extract"); err != nil {
		b.Fatal(err)
	}
	run("ordinary", "ordinary", l)
	for _, v := range variants {
		im := l.addImage("image-"+v.name, v.mode, v.filesystem, threeLayers...)
		l.pull(im)
		run(v.name, im.top(), l)
	}
}

// BenchmarkPull is what the snapshotter's part of pulling a converted image of three
// layers costs, and of removing it, over the real chain.
func BenchmarkPull(b *testing.B) {
	requireKernel(b)
	l := &lab{t: b, dir: shortDir(b)}
	end := l.openChain()
	defer func() {
		if err := end(); err != nil {
			b.Error(err)
		}
	}()
	for _, v := range variants {
		im := l.addImage("image-"+v.name, v.mode, v.filesystem, threeLayers...)
		b.Run(v.name, func(b *testing.B) {
			for range b.N {
				parent := ""
				for i, id := range im.chainIDs {
					_, err := l.s.Prepare(b.Context(), "extract", parent, snapshots.WithLabels(im.labels(i)))
					if !errdefs.IsAlreadyExists(err) {
						b.Fatal(err)
					}
					parent = id
				}
				b.StopTimer()
				if err := removeAll(b.Context(), l.s); err != nil {
					b.Fatal(err)
				}
				b.StartTimer()
			}
		})
	}
}
