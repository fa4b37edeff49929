package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/thaw-project/thaw/image/annotation"
	"github.com/thaw-project/thaw/image/block"
	"github.com/thaw-project/thaw/kind"
)

var threeLayers = []tree{
	{"etc/hosts": "localhost", "bin/sh": "shell 1", "empty/": "", "gone": "soon"},
	{"bin/sh": "shell 2", "gone": whiteout, "lib/c": "libc"},
	{"app": "the application"},
}

var merged = tree{"etc/hosts": "localhost", "bin/sh": "shell 2", "empty/": "", "lib/c": "libc", "app": "the application"}

// layersUpTo is what the lowest n of threeLayers look like together.
func layersUpTo(n int) tree {
	all := []tree{threeLayers[0], {"etc/hosts": "localhost", "bin/sh": "shell 2", "empty/": "", "lib/c": "libc"}, merged}
	return all[n-1]
}

func TestRemote(t *testing.T) {
	for _, v := range variants {
		t.Run(v.name, func(t *testing.T) {
			l := newLab(t)
			ctx := t.Context()
			im := l.addImage("image", v.mode, v.filesystem, threeLayers...)
			l.pull(im)

			for i, id := range im.chainIDs {
				info := must(l.s.Stat(ctx, id))(t)
				if info.Kind != snapshots.KindCommitted || info.Labels[labelRemote] == "" || info.Labels[snapshots.LabelSnapshotRef] != id {
					t.Errorf("layer %d: got %+v, want a committed remote snapshot", i, info)
				}
				// containerd finds it so.
				found := 0
				filter := fmt.Sprintf("labels.%q==%s,parent==%q", snapshots.LabelSnapshotRef, id, info.Parent)
				if err := l.s.Walk(ctx, func(context.Context, snapshots.Info) error { found++; return nil }, filter); err != nil || found != 1 {
					t.Errorf("walk %s: found %d, error %v", filter, found, err)
				}
				if u := must(l.s.Usage(ctx, id))(t); u.Size != 0 {
					t.Errorf("layer %d occupies %d bytes", i, u.Size)
				}
				key := fmt.Sprint("view-", i)
				withMounts(t, must(l.s.View(ctx, key, id))(t), func(root string) { expect(t, root, layersUpTo(i+1)) })
				if err := l.s.Remove(ctx, key); err != nil {
					t.Fatal(err)
				}
			}

			// A container writes, deletes, and sees it again after a restart of us.
			mounts := must(l.s.Prepare(ctx, "container", im.top()))(t)
			wantType := "overlay"
			if v.mode == block.ModeOverlaybd && v.filesystem == block.Ext4 {
				wantType = "ext4"
			}
			if len(mounts) != 1 || mounts[0].Type != wantType {
				t.Errorf("got mounts %v, want one %s", mounts, wantType)
			}
			withMounts(t, mounts, func(root string) {
				expect(t, root, merged)
				for _, err := range []error{
					os.WriteFile(filepath.Join(root, "new"), []byte("written"), 0o600),
					os.Remove(filepath.Join(root, "app")),
					os.Rename(filepath.Join(root, "lib/c"), filepath.Join(root, "lib/d")),
				} {
					if err != nil {
						t.Error(err)
					}
				}
			})
			want := tree{"etc/hosts": "localhost", "bin/sh": "shell 2", "empty/": "", "lib/d": "libc", "new": "written"}
			l.reopen()
			withMounts(t, must(l.s.Mounts(ctx, "container"))(t), func(root string) { expect(t, root, want) })
			if u := must(l.s.Usage(ctx, "container"))(t); u.Size == 0 {
				t.Error("a container that wrote occupies nothing")
			}
			// Another container of the image is not touched by it.
			withMounts(t, must(l.s.Prepare(ctx, "other", im.top()))(t), func(root string) { expect(t, root, merged) })
			// What it committed is the parent of further ones.
			if err := l.s.Commit(ctx, "image-2", "container"); err != nil {
				t.Fatal(err)
			}
			withMounts(t, must(l.s.Prepare(ctx, "child", "image-2"))(t), func(root string) { expect(t, root, want) })
			withMounts(t, must(l.s.View(ctx, "child-view", "image-2"))(t), func(root string) { expect(t, root, want) })
		})
	}
}

// TestChildImages: ordinary layers on each layer of a converted image.
func TestChildImages(t *testing.T) {
	for _, v := range variants {
		t.Run(v.name, func(t *testing.T) {
			l := newLab(t)
			ctx := t.Context()
			im := l.addImage("image", v.mode, v.filesystem, threeLayers...)
			l.pull(im)
			for i := range im.chainIDs {
				parent := im.chainIDs[i]
				want := tree{}
				for p, c := range layersUpTo(i + 1) {
					want[p] = c
				}
				for j := range 3 {
					id := fmt.Sprintf("child-%d-%d", i, j)
					// As containerd's unpacker does.
					opt := snapshots.WithLabels(map[string]string{snapshots.LabelSnapshotRef: id})
					mounts := must(l.s.Prepare(ctx, "extract-"+id, parent, opt))(t)
					if mounts[0].Type != "overlay" {
						t.Errorf("a layer is unpacked into a %s, want an overlay, for its diff", mounts[0].Type)
					}
					withMounts(t, mounts, func(root string) {
						expect(t, root, want)
						if err := os.WriteFile(filepath.Join(root, id), []byte(id), 0o600); err != nil {
							t.Error(err)
						}
						if err := os.Remove(filepath.Join(root, "etc/hosts")); err != nil && j == 0 {
							t.Error(err)
						}
					})
					want[id] = id
					delete(want, "etc/hosts")
					if _, ok := want["etc/"]; !ok {
						want["etc/"] = ""
					}
					if err := l.s.Commit(ctx, id, "extract-"+id, opt); err != nil {
						t.Fatal(err)
					}
					parent = id
				}
				withMounts(t, must(l.s.Prepare(ctx, fmt.Sprint("container-", i), parent))(t), func(root string) { expect(t, root, want) })
				withMounts(t, must(l.s.View(ctx, fmt.Sprint("view-", i), parent))(t), func(root string) { expect(t, root, want) })
			}
			l.reopen()
			for i := range im.chainIDs {
				withMounts(t, must(l.s.Mounts(ctx, fmt.Sprint("container-", i)))(t), func(string) {})
			}
		})
	}
}

func fallbacks(l *lab, reason string) int {
	l.t.Helper()
	registry := prometheus.NewPedanticRegistry()
	registry.MustRegister(l.s.metrics.fallbacks)
	for _, m := range must(registry.Gather())(l.t)[0].GetMetric() {
		if m.GetLabel()[0].GetValue() == reason {
			return int(m.GetCounter().GetValue())
		}
	}
	l.t.Fatalf("no metric for reason %s", reason)
	return 0
}

// unpack is what containerd does with layers: remote where Prepare says so, else an
// ordinary unpack. It returns how many were remote.
func (l *lab) unpack(im testImage, layers []tree) (remote int) {
	l.t.Helper()
	parent, ctx := "", l.t.Context()
	for i, layer := range layers {
		opt := snapshots.WithLabels(im.labels(i))
		key := fmt.Sprint("extract-", i)
		mounts, err := l.s.Prepare(ctx, key, parent, opt)
		switch {
		case errdefs.IsAlreadyExists(err):
			remote++
		case err != nil:
			l.t.Fatal(err)
		default:
			withMounts(l.t, mounts, func(root string) { layer.write(l.t, root, true) })
			if err := l.s.Commit(ctx, im.chainIDs[i], key, opt); err != nil {
				l.t.Fatal(err)
			}
		}
		parent = im.chainIDs[i]
	}
	return remote
}

func TestFallback(t *testing.T) {
	for _, tc := range []struct {
		name, reason string
		options      func(*Options)
		image        func(*lab, *testImage)
		labels       func(map[string]string)
	}{
		{name: "newer version", reason: reasonLabels, labels: func(m map[string]string) { m[annotation.Version] = "2" }},
		{name: "unknown key", reason: reasonLabels, labels: func(m map[string]string) { m[annotation.Prefix+"compression"] = "zstd" }},
		{name: "missing key", reason: reasonLabels, labels: func(m map[string]string) { delete(m, annotation.Leaf) }},
		{name: "path as block", reason: reasonLabels, labels: func(m map[string]string) { m[annotation.Block] = "../../etc" }},
		{name: "unknown mode", reason: reasonLabels, labels: func(m map[string]string) { m[annotation.Mode] = "fuse" }},
		{name: "other target", reason: reasonTarget, labels: func(m map[string]string) { m[annotation.Target] = "elsewhere" }},
		{name: "no such block", reason: reasonAttach, image: func(l *lab, im *testImage) {
			os.Remove(filepath.Join(l.storage.blocks(), im.refs[0].Leaf))
		}},
		{name: "not a file system", reason: reasonAttach, image: func(l *lab, im *testImage) {
			os.Truncate(filepath.Join(l.storage.blocks(), im.refs[0].Leaf), 0)
			os.Truncate(filepath.Join(l.storage.blocks(), im.refs[0].Leaf), 1<<20)
		}},
		{name: "other file system", reason: reasonAttach, labels: func(m map[string]string) { m[annotation.Filesystem] = "ext4" }},
		{name: "fewer layers than promised", reason: reasonAttach, labels: func(m map[string]string) {
			m[annotation.Layer] = strings.Replace(m[annotation.Layer], "/3", "/4", 1)
		}},
		{name: "storage down", reason: reasonAttach, image: func(l *lab, _ *testImage) {
			l.storage.attach = func(context.Context, string) error { return kind.Errorf(kind.Unavailable, "injected") }
		}},
		{name: "storage slow", reason: reasonTimeout, options: func(o *Options) { o.AttachTimeout = 300 * time.Millisecond },
			image: func(l *lab, _ *testImage) {
				l.storage.attach = func(ctx context.Context, _ string) error { <-ctx.Done(); return ctx.Err() }
			}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			registry := prometheus.NewRegistry()
			l := newLab(t, func(o *Options) {
				o.Registerer = registry
				if tc.options != nil {
					tc.options(o)
				}
			})
			im := l.addImage("image", block.ModeOverlayfs, block.Erofs, threeLayers...)
			if tc.image != nil {
				tc.image(l, &im)
			}
			ctx := t.Context()
			parent := ""
			started := time.Now()
			for i, layer := range threeLayers {
				labels := im.labels(i)
				if tc.labels != nil {
					tc.labels(labels)
				}
				key := fmt.Sprint("extract-", i)
				mounts, err := l.s.Prepare(ctx, key, parent, snapshots.WithLabels(labels))
				if err != nil {
					t.Fatalf("prepare layer %d: %v", i, err)
				}
				withMounts(t, mounts, func(root string) { layer.write(t, root, true) })
				if err := l.s.Commit(ctx, im.chainIDs[i], key, snapshots.WithLabels(labels)); err != nil {
					t.Fatal(err)
				}
				parent = im.chainIDs[i]
			}
			if took := time.Since(started); tc.reason == reasonTimeout && took > 2*l.options.AttachTimeout+time.Second {
				t.Errorf("three layers took %v: each waited for the storage", took)
			}
			if fallbacks(l, tc.reason) == 0 {
				t.Errorf("no fallback is counted for reason %s", tc.reason)
			}
			withMounts(t, must(l.s.Prepare(ctx, "container", parent))(t), func(root string) { expect(t, root, merged) })
		})
	}
}

// TestFallbackKeepsImageTogether: a layer above one that fell back does so at once,
// also after a restart, and a later pull of the same image is remote again.
func TestFallbackKeepsImageTogether(t *testing.T) {
	l := newLab(t)
	im := l.addImage("image", block.ModeOverlayfs, block.Erofs, threeLayers...)
	down := func(context.Context, string) error { return kind.Errorf(kind.Unavailable, "injected") }
	l.storage.attach = down
	ctx := t.Context()
	opt := snapshots.WithLabels(im.labels(0))
	mounts := must(l.s.Prepare(ctx, "extract", "", opt))(t)
	withMounts(t, mounts, func(root string) { threeLayers[0].write(t, root, true) })
	if err := l.s.Commit(ctx, im.chainIDs[0], "extract", opt); err != nil {
		t.Fatal(err)
	}
	l.reopen() // the storage is there again
	if mounts, err := l.s.Prepare(ctx, "extract", im.chainIDs[0], snapshots.WithLabels(im.labels(1))); err != nil || mounts[0].Type != "overlay" {
		t.Fatalf("got mounts %v, error %v, want an overlay to unpack into", mounts, err)
	}
	if n := fallbacks(l, reasonParent); n != 1 {
		t.Errorf("%d fallbacks for the parent, want 1", n)
	}
	if err := removeAll(ctx, l.s); err != nil {
		t.Fatal(err)
	}
	if n := l.unpack(im, threeLayers); n != 3 {
		t.Errorf("%d layers of the second pull are remote, want 3", n)
	}
}

// TestRemoteOnOrdinary: the converted image's base was unpacked from another,
// ordinary image before.
func TestRemoteOnOrdinary(t *testing.T) {
	for _, v := range variants {
		t.Run(v.name, func(t *testing.T) {
			l := newLab(t)
			ctx := t.Context()
			im := l.addImage("image", v.mode, v.filesystem, threeLayers...)
			opt := snapshots.WithLabels(map[string]string{snapshots.LabelSnapshotRef: im.chainIDs[0]})
			withMounts(t, must(l.s.Prepare(ctx, "extract", "", opt))(t), func(root string) { threeLayers[0].write(t, root, true) })
			if err := l.s.Commit(ctx, im.chainIDs[0], "extract", opt); err != nil {
				t.Fatal(err)
			}
			parent := im.chainIDs[0]
			for i := 1; i < 3; i++ {
				if _, err := l.s.Prepare(ctx, "extract", parent, snapshots.WithLabels(im.labels(i))); !errdefs.IsAlreadyExists(err) {
					t.Fatalf("prepare layer %d: %v, want already exists", i, err)
				}
				parent = im.chainIDs[i]
				withMounts(t, must(l.s.View(ctx, fmt.Sprint("view", i), parent))(t), func(root string) { expect(t, root, layersUpTo(i+1)) })
			}
			withMounts(t, must(l.s.Prepare(ctx, "container", parent))(t), func(root string) { expect(t, root, merged) })
		})
	}
}

// TestRemoteElsewhere: the chainID is taken by a snapshot on another parent, as after
// a fallback in another containerd namespace; answering "already exists" would make
// containerd look for one that is not there.
func TestRemoteElsewhere(t *testing.T) {
	l := newLab(t)
	ctx := t.Context()
	im := l.addImage("image", block.ModeOverlayfs, block.Erofs, threeLayers...)
	l.pull(im)
	withMounts(t, must(l.s.Prepare(ctx, "extract", ""))(t), func(root string) { threeLayers[0].write(t, root, true) })
	if err := l.s.Commit(ctx, "other/base", "extract"); err != nil {
		t.Fatal(err)
	}
	mounts, err := l.s.Prepare(ctx, "extract", "other/base", snapshots.WithLabels(im.labels(1)))
	if err != nil {
		t.Fatal(err)
	}
	withMounts(t, mounts, func(root string) { expect(t, root, threeLayers[0]) })
	if n := fallbacks(l, reasonConflict); n != 1 {
		t.Errorf("%d fallbacks for a conflict, want 1", n)
	}
	// The same image from another namespace is there.
	if _, err := l.s.Prepare(ctx, "again", im.chainIDs[0], snapshots.WithLabels(im.labels(1))); !errdefs.IsAlreadyExists(err) {
		t.Errorf("prepare a layer that is there: %v, want already exists", err)
	}
}

// TestHostileLayerDirectory: a manifest that calls a merged root file system an
// overlayfs block gets none of the host's directories through a symbolic link in it.
func TestHostileLayerDirectory(t *testing.T) {
	l := newLab(t)
	im := l.addImage("image", block.ModeOverlaybd, block.Ext4, tree{"a": "1"})
	content := t.TempDir()
	if err := os.Symlink("/etc", filepath.Join(content, "0")); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{im.refs[0].Block, im.refs[0].Leaf} {
		makeExt4(t, filepath.Join(l.storage.blocks(), name), content)
	}
	im.refs[0].Mode = block.ModeOverlayfs
	mounts, err := l.s.Prepare(t.Context(), "extract", "", snapshots.WithLabels(im.labels(0)))
	if err != nil || len(mounts) != 1 || !strings.HasPrefix(mounts[0].Source, l.options.Root) {
		t.Fatalf("got mounts %v, error %v, want an ordinary snapshot", mounts, err)
	}
}

func TestRemoteTimeoutThenLateSuccess(t *testing.T) {
	l := newLab(t, func(o *Options) { o.AttachTimeout = 200 * time.Millisecond })
	im := l.addImage("image", block.ModeOverlayfs, block.Erofs, threeLayers...)
	gate := make(chan struct{})
	l.storage.attach = func(context.Context, string) error { <-gate; return nil } // heeds no deadline
	started := time.Now()
	if _, err := l.s.Prepare(t.Context(), "extract", "", snapshots.WithLabels(im.labels(0))); err != nil {
		t.Fatal(err)
	}
	if took := time.Since(started); took > time.Second {
		t.Errorf("the Prepare took %v, the attach timeout is %v", took, l.options.AttachTimeout)
	}
	close(gate)
	// What came too late is taken down again.
	eventually(t, func() error {
		if isMountPoint(l.s.blockDir(im.refs[0].Leaf)) {
			return errors.New("the late block is still mounted")
		}
		if _, err := l.storage.Stat(t.Context(), im.refs[0].Leaf); !errors.Is(err, kind.NotFound) {
			return fmt.Errorf("the late block is still attached: %v", err)
		}
		return nil
	})
}

func eventually(t testing.TB, f func() error) {
	t.Helper()
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
}

// TestCancelledPrepare: who gives up gets an error, and takes nothing from others.
func TestCancelledPrepare(t *testing.T) {
	l := newLab(t)
	im := l.addImage("image", block.ModeOverlayfs, block.Erofs, threeLayers...)
	gate := make(chan struct{})
	entered := make(chan struct{}, 8)
	l.storage.attach = func(context.Context, string) error { entered <- struct{}{}; <-gate; return nil }
	ctx, cancel := context.WithCancel(t.Context())
	first := make(chan error, 1)
	go func() {
		_, err := l.s.Prepare(ctx, "first", "", snapshots.WithLabels(im.labels(0)))
		first <- err
	}()
	<-entered
	second := make(chan error, 1)
	go func() {
		_, err := l.s.Prepare(t.Context(), "second", "", snapshots.WithLabels(im.labels(0)))
		second <- err
	}()
	cancel()
	if err := <-first; !errors.Is(err, context.Canceled) {
		t.Errorf("the cancelled Prepare: got error %v, want canceled", err)
	}
	if _, err := l.s.Stat(t.Context(), "first"); !errdefs.IsNotFound(err) {
		t.Errorf("the cancelled Prepare left a snapshot: %v", err)
	}
	close(gate)
	if err := <-second; !errdefs.IsAlreadyExists(err) {
		t.Errorf("the other Prepare: got error %v, want already exists", err)
	}
	l.storage.mu.Lock()
	if n := l.storage.attaches[im.refs[0].Leaf]; n != 1 {
		t.Errorf("the block was attached %d times, want once for both", n)
	}
	l.storage.mu.Unlock()
}

// TestCommitFailure: when the layer cannot be recorded the error is the answer.
func TestCommitFailure(t *testing.T) {
	l := newLab(t)
	im := l.addImage("image", block.ModeOverlayfs, block.Erofs, threeLayers...)
	must(l.s.Prepare(t.Context(), "taken", ""))(t)
	_, err := l.s.Prepare(t.Context(), "taken", "", snapshots.WithLabels(im.labels(0)))
	if err == nil || !strings.Contains(err.Error(), "taken") {
		t.Errorf("got error %v, want one about the key", err)
	}
	if _, err := l.s.Stat(t.Context(), im.chainIDs[0]); !errdefs.IsNotFound(err) {
		t.Errorf("the layer is there: %v", err)
	}
	if _, err := l.s.Prepare(t.Context(), "k", "no such parent", snapshots.WithLabels(im.labels(1))); !errdefs.IsNotFound(err) {
		t.Errorf("got error %v, want not found", err)
	}
	eventually(t, func() error {
		if isMountPoint(l.s.blockDir(im.refs[0].Leaf)) {
			return errors.New("the block stays mounted for a layer that was not recorded")
		}
		return nil
	})
}

func TestParallelPrepares(t *testing.T) {
	for _, v := range variants {
		t.Run(v.name, func(t *testing.T) {
			l := newLab(t)
			var images []testImage
			for i := range 4 {
				images = append(images, l.addImage(fmt.Sprint("image-", i), v.mode, v.filesystem, threeLayers...))
			}
			var attaching atomic.Int32
			l.storage.attach = func(context.Context, string) error {
				attaching.Add(1)
				time.Sleep(10 * time.Millisecond)
				return nil
			}
			var wg sync.WaitGroup
			for p := range 32 {
				wg.Go(func() {
					im := images[p%len(images)]
					parent := ""
					for i := range im.refs {
						_, err := l.s.Prepare(t.Context(), fmt.Sprintf("extract-%d-%d", p, i), parent, snapshots.WithLabels(im.labels(i)))
						if !errdefs.IsAlreadyExists(err) {
							t.Errorf("puller %d, layer %d: %v", p, i, err)
							return
						}
						parent = im.chainIDs[i]
					}
					key := fmt.Sprint("container-", p)
					mounts, err := l.s.Prepare(t.Context(), key, im.top())
					if err != nil {
						t.Errorf("container %d: %v", p, err)
						return
					}
					withMounts(t, mounts, func(root string) { expect(t, root, merged) })
					if p%2 == 0 {
						if err := l.s.Remove(t.Context(), key); err != nil {
							t.Error(err)
						}
					}
				})
			}
			wg.Wait()
			if n := attaching.Load(); n > 32 {
				t.Errorf("4 images were attached %d times", n)
			}
		})
	}
}
