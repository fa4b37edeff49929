package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/continuity/fs"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/thaw-project/thaw/image/block"
	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/node/imagemgmt"
	"github.com/thaw-project/thaw/node/present"
)

// reboot takes away what a reboot takes away: mounts, loop devices, presented disks.
// What image-mgmt has recorded stays, unless forget.
func (l *lab) reboot(forget bool) {
	l.t.Helper()
	if err := l.s.Close(); err != nil {
		l.t.Fatal(err)
	}
	mounts := must(systemMounter{}.Mounts(l.dir))(l.t)
	slices.Reverse(mounts)
	for _, m := range mounts {
		if err := unix.Unmount(m.Target, 0); err != nil {
			l.t.Fatal(m.Target, err)
		}
	}
	for _, loop := range must(systemMounter{}.Loops())(l.t) {
		if filepath.Dir(loop.File) == l.storage.dev() {
			if err := (systemMounter{}).DetachLoop(l.t.Context(), loop.File); err != nil {
				l.t.Fatal(err)
			}
		}
	}
	if err := os.RemoveAll(l.storage.dev()); err != nil {
		l.t.Fatal(err)
	}
	if forget {
		os.Remove(filepath.Join(l.storage.dir, "state.json"))
	}
	l.storage = must(openStorage(l.storage.dir))(l.t)
	for block, st := range l.storage.state {
		for _, user := range st.Users { // as image-mgmt does at start
			if user == attachUser {
				must(l.storage.Attach(l.t.Context(), imagemgmt.Block{Name: block}, user))(l.t)
			}
		}
	}
	l.open()
}

func TestReboot(t *testing.T) {
	for _, v := range variants {
		for _, forget := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/forget=%v", v.name, forget), func(t *testing.T) {
				l := newLab(t)
				ctx := t.Context()
				im := l.addImage("image", v.mode, v.filesystem, threeLayers...)
				l.pull(im)
				want := tree{"written": "before the reboot"}
				for p, c := range merged {
					want[p] = c
				}
				withMounts(t, must(l.s.Prepare(ctx, "container", im.top()))(t), func(root string) {
					if err := os.WriteFile(filepath.Join(root, "written"), []byte("before the reboot"), 0o600); err != nil {
						t.Error(err)
					}
				})
				must(l.s.View(ctx, "view", im.chainIDs[1]))(t)
				l.reboot(forget)
				withMounts(t, must(l.s.Mounts(ctx, "container"))(t), func(root string) { expect(t, root, want) })
				if err := l.s.Commit(ctx, "image-2", "container"); err != nil {
					t.Fatal(err)
				}
				must(l.s.Prepare(ctx, "child", "image-2"))(t)
				l.reboot(forget)
				withMounts(t, must(l.s.Mounts(ctx, "view"))(t), func(root string) { expect(t, root, layersUpTo(2)) })
				withMounts(t, must(l.s.Mounts(ctx, "child"))(t), func(root string) { expect(t, root, want) })
				l.reboot(forget)
				// Commit and remove of what nobody brought up since.
				if err := l.s.Commit(ctx, "image-3", "child"); err != nil {
					t.Fatal(err)
				}
				if err := l.s.Remove(ctx, "view"); err != nil {
					t.Fatal(err)
				}
			})
		}
	}
}

// faultyMounter fails what fail names.
type faultyMounter struct {
	systemMounter
	failUnmount atomic.Bool
}

func (m *faultyMounter) Unmount(ctx context.Context, target string) error {
	if m.failUnmount.Load() {
		return kind.Errorf(kind.InUse, "unmount %s: injected", target)
	}
	return m.systemMounter.Unmount(ctx, target)
}

func (l *lab) pending() (n int) {
	err := l.s.view(context.Background(), func(_ context.Context, r records) error {
		gone, err := r.removed()
		n = len(gone)
		return err
	})
	if err != nil {
		l.t.Fatal(err)
	}
	return n
}

// TestFailedCleanup: what cannot be taken away does not stop containerd's garbage
// collection, and is taken away when it can be.
func TestFailedCleanup(t *testing.T) {
	for _, v := range variants {
		for _, later := range []string{"cleanup", "restart"} {
			t.Run(v.name+"/"+later, func(t *testing.T) {
				faults := &faultyMounter{}
				l := newLab(t, func(o *Options) { o.Mounter = faults })
				ctx := t.Context()
				im := l.addImage("image", v.mode, v.filesystem, threeLayers...)
				l.pull(im)
				must(l.s.Prepare(ctx, "container", im.top()))(t)
				faults.failUnmount.Store(true)
				if err := removeAll(ctx, l.s); err != nil {
					t.Fatal(err)
				}
				if err := l.s.Cleanup(ctx); err != nil {
					t.Fatal(err)
				}
				if l.pending() == 0 || !isMountPoint(l.s.blockDir(im.refs[0].Leaf)) {
					t.Error("nothing is pending: the fault was not hit")
				}
				// The names are free at once.
				faults.failUnmount.Store(false)
				if later == "restart" {
					l.reopen()
				} else if err := l.s.Cleanup(ctx); err != nil {
					t.Fatal(err)
				}
				if n := l.pending(); n != 0 {
					t.Errorf("%d removals are still pending", n)
				}
				if err := l.leaks(); err != nil {
					t.Error(err)
				}
			})
		}
	}
}

// TestRemoveWhileMounted: containerd removes a snapshot whose mount somebody still
// has; neither the mount's content nor the collection suffers.
func TestRemoveWhileMounted(t *testing.T) {
	for _, v := range variants {
		t.Run(v.name, func(t *testing.T) {
			l := newLab(t)
			ctx := t.Context()
			im := l.addImage("image", v.mode, v.filesystem, threeLayers...)
			l.pull(im)
			withMounts(t, must(l.s.Prepare(ctx, "container", im.top()))(t), func(root string) {
				if err := removeAll(ctx, l.s); err != nil {
					t.Error(err)
				}
				if v.mode == block.ModeOverlaybd && v.filesystem == block.Ext4 {
					expect(t, root, merged) // others have lost their upper directory
				}
			})
			eventually(t, func() error {
				if err := l.s.Cleanup(ctx); err != nil {
					return err
				}
				return l.leaks()
			})
		})
	}
}

func TestAsyncRemove(t *testing.T) {
	l := newLab(t, func(o *Options) { o.AsyncRemove = true })
	ctx := t.Context()
	im := l.addImage("image", block.ModeOverlaybd, block.Ext4, threeLayers...)
	l.pull(im)
	must(l.s.Prepare(ctx, "container", im.top()))(t)
	if err := l.s.Remove(ctx, "container"); err != nil {
		t.Fatal(err)
	}
	if l.pending() != 1 {
		t.Errorf("%d removals pending, want 1", l.pending())
	}
	must(l.s.Prepare(ctx, "container", im.top()))(t) // the key is free
	if err := l.s.Cleanup(ctx); err != nil {
		t.Fatal(err)
	}
	if l.pending() != 0 {
		t.Errorf("%d removals pending after Cleanup", l.pending())
	}
	withMounts(t, must(l.s.Mounts(ctx, "container"))(t), func(root string) { expect(t, root, merged) })
}

func (l *lab) attachedBlocks() (names []string) {
	for _, a := range must(l.storage.List(context.Background()))(l.t) {
		names = append(names, a.Block)
	}
	return names
}

// TestProtect: when only lower layers of an image remain, their own blocks are held
// and the image's leaf is free to be deleted.
func TestProtect(t *testing.T) {
	l := newLab(t)
	ctx := t.Context()
	im := l.addImage("image", block.ModeOverlayfs, block.Erofs, threeLayers...)
	l.pull(im)
	leaf := im.refs[0].Leaf
	if got := l.attachedBlocks(); !slices.Equal(got, []string{leaf}) {
		t.Errorf("a pulled image has %v attached, want its leaf %s", got, leaf)
	}
	opt := snapshots.WithLabels(map[string]string{snapshots.LabelSnapshotRef: "child"})
	must(l.s.Prepare(ctx, "extract", im.chainIDs[1], opt))(t)
	if err := l.s.Commit(ctx, "child", "extract", opt); err != nil {
		t.Fatal(err)
	}
	if err := l.s.Remove(ctx, im.top()); err != nil {
		t.Fatal(err)
	}
	if err := l.s.Cleanup(ctx); err != nil {
		t.Fatal(err)
	}
	if got := l.attachedBlocks(); !slices.Equal(got, []string{im.refs[1].Block}) {
		t.Errorf("layers 0 and 1 of an image have %v attached, want the block of layer 1, %s", got, im.refs[1].Block)
	}
	l.reopen()
	if got := l.attachedBlocks(); !slices.Equal(got, []string{im.refs[1].Block}) {
		t.Errorf("after a restart %v is attached, want the block of layer 1, %s", got, im.refs[1].Block)
	}
	if err := l.s.Remove(ctx, "child"); err != nil {
		t.Fatal(err)
	}
	if err := l.s.Remove(ctx, im.chainIDs[1]); err != nil {
		t.Fatal(err)
	}
	if got := l.attachedBlocks(); !slices.Equal(got, []string{im.refs[0].Block}) {
		t.Errorf("layer 0 of an image has %v attached, want its block %s", got, im.refs[0].Block)
	}
	// Pulled again, the leaf is back and the layer below is its.
	l.pull(im)
	if got := l.attachedBlocks(); !slices.Contains(got, leaf) {
		t.Errorf("the image pulled again has %v attached, want its leaf %s too", got, leaf)
	}
	withMounts(t, must(l.s.Prepare(ctx, "container", im.top()))(t), func(root string) { expect(t, root, merged) })
}

// TestAbandonedPull: the leaf of an image of which only a layer was prepared is given
// back after a while.
func TestAbandonedPull(t *testing.T) {
	l := newLab(t, func(o *Options) { o.LeafHold = 300 * time.Millisecond })
	ctx := t.Context()
	im := l.addImage("image", block.ModeOverlayfs, block.Erofs, threeLayers...)
	if _, err := l.s.Prepare(ctx, "extract", "", snapshots.WithLabels(im.labels(0))); !errdefs.IsAlreadyExists(err) {
		t.Fatal(err)
	}
	if err := l.s.Cleanup(ctx); err != nil {
		t.Fatal(err)
	}
	if got := l.attachedBlocks(); !slices.Equal(got, []string{im.refs[0].Leaf}) {
		t.Errorf("during a pull %v is attached, want the leaf", got)
	}
	time.Sleep(l.options.LeafHold)
	if err := l.s.Cleanup(ctx); err != nil {
		t.Fatal(err)
	}
	if got := l.attachedBlocks(); !slices.Equal(got, []string{im.refs[0].Block}) {
		t.Errorf("after an abandoned pull %v is attached, want the block of layer 0", got)
	}
}

// downService is an image-mgmt that does not answer.
type downService struct {
	imagemgmt.Service
	down atomic.Bool
}

var errDown = kind.Errorf(kind.Unavailable, "injected")

func (s *downService) Attach(ctx context.Context, block imagemgmt.Block, user string) (d present.Disk, err error) {
	if s.down.Load() {
		return d, errDown
	}
	return s.Service.Attach(ctx, block, user)
}

func (s *downService) Detach(ctx context.Context, block, user string) error {
	if s.down.Load() {
		return errDown
	}
	return s.Service.Detach(ctx, block, user)
}

func (s *downService) List(ctx context.Context) ([]imagemgmt.Attachment, error) {
	if s.down.Load() {
		return nil, errDown
	}
	return s.Service.List(ctx)
}

// TestStartWithoutStorage: a node starts while its storage is away; what needs it
// fails until it is back.
func TestStartWithoutStorage(t *testing.T) {
	l := newLab(t)
	ctx := t.Context()
	im := l.addImage("image", block.ModeOverlayfs, block.Erofs, threeLayers...)
	l.pull(im)
	must(l.s.View(ctx, "view", im.chainIDs[1]))(t)
	must(l.s.Prepare(ctx, "ordinary", ""))(t)
	service := &downService{}
	service.down.Store(true)
	l.reopen(func(o *Options) {
		service.Service = o.Images
		o.Images = service
	})
	must(l.s.Mounts(ctx, "ordinary"))(t)
	if err := unix.Unmount(l.s.blockDir(im.refs[1].Block), 0); err != nil {
		t.Fatal(err)
	}
	if _, err := l.s.Mounts(ctx, "view"); !errdefs.IsUnavailable(err) {
		t.Errorf("mounts of a view without storage: %v, want unavailable", err)
	}
	if err := removeAll(ctx, l.s); err != nil {
		t.Errorf("removal without storage: %v", err)
	}
	service.down.Store(false)
	if err := l.s.Cleanup(ctx); err != nil {
		t.Fatal(err)
	}
	if err := l.leaks(); err != nil {
		t.Error(err)
	}
}

// TestCloseWhileAttaching: Close ends what is under way and waits for it.
func TestCloseWhileAttaching(t *testing.T) {
	l := newLab(t)
	im := l.addImage("image", block.ModeOverlayfs, block.Erofs, threeLayers...)
	entered, left := make(chan struct{}), atomic.Bool{}
	l.storage.attach = func(ctx context.Context, _ string) error {
		close(entered)
		<-ctx.Done()
		time.Sleep(50 * time.Millisecond)
		left.Store(true)
		return ctx.Err()
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_, _ = l.s.Prepare(t.Context(), "extract", "", snapshots.WithLabels(im.labels(0)))
	}()
	<-entered
	if err := l.s.Close(); err != nil {
		t.Error(err)
	}
	if !left.Load() {
		t.Error("Close returned before the attach did")
	}
	<-done
}

func TestNewerRecords(t *testing.T) {
	l := newLab(t)
	l.s.Close()
	set := func(version string) {
		t.Helper()
		s := rawOpen(t, l.options)
		if err := s.update(t.Context(), func(_ context.Context, r records) error {
			return r.tx.Bucket(bucketThaw).Put(keyVersion, []byte(version))
		}); err != nil {
			t.Fatal(err)
		}
		s.Close()
	}
	for _, tc := range []struct {
		version string
		kind    kind.Kind
	}{{"2", kind.Unsupported}, {"x", kind.Corrupt}} {
		set(tc.version)
		if s, err := New(t.Context(), l.options); !errors.Is(err, tc.kind) {
			t.Errorf("records of version %s: got %v, error %v, want %s", tc.version, s, err, tc.kind)
		}
	}
	set("1")
	l.open()
}

// rawOpen opens the metadata without looking at it.
func rawOpen(t *testing.T, o Options) *Snapshotter {
	t.Helper()
	s := &Snapshotter{o: o, log: o.Logger}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	s.ms = must(newMetaStore(o.Root))(t)
	return s
}

func TestDamagedRecord(t *testing.T) {
	for _, raw := range []string{"{", `{"form":"remote"}`, `{"form":"disk"}`, `{"form":"cloud"}`, `{"remote":7}`} {
		if _, err := decodeRecord("1", []byte(raw)); !errors.Is(err, kind.Corrupt) {
			t.Errorf("record %s: got error %v, want corrupt", raw, err)
		}
	}
}

func TestMappedRoot(t *testing.T) {
	uid, gid := snapshots.LabelSnapshotUIDMapping, snapshots.LabelSnapshotGIDMapping
	for _, v := range variants {
		l := newLab(t)
		im := l.addImage("image", v.mode, v.filesystem, threeLayers...)
		l.pull(im)
		opt := snapshots.WithLabels(map[string]string{uid: "0:1000:65536", gid: "10:5:1,0:2000:10"})
		withMounts(t, must(l.s.Prepare(t.Context(), "container", im.top(), opt))(t), func(root string) {
			st := must(os.Stat(root))(t).Sys().(*syscall.Stat_t)
			if st.Uid != 1000 || st.Gid != 2000 {
				t.Errorf("%s: root belongs to %d:%d, want 1000:2000", v.name, st.Uid, st.Gid)
			}
			expect(t, root, merged)
		})
		for _, bad := range []string{"x", "0:1", "0:1:2:3", "1:1000:5", "0:-1:5", "0:1:0", "0:1:2,"} {
			_, err := l.s.Prepare(t.Context(), "bad", "", snapshots.WithLabels(map[string]string{uid: bad}))
			if !errdefs.IsInvalidArgument(err) {
				t.Errorf("uid mapping %q: got error %v, want invalid argument", bad, err)
			}
		}
	}
}

// FuzzMappedRoot: the mapping labels come from clients.
func FuzzMappedRoot(f *testing.F) {
	for _, seed := range []string{"0:1000:65536", "10:5:1,0:2000:10", "", ",", "0:0:0", "0:4294967296:1", "-0:1:1", "0:1:1,x"} {
		f.Add(seed, seed)
	}
	f.Fuzz(func(t *testing.T, uids, gids string) {
		uid, gid, mapped, err := mappedRoot(map[string]string{snapshots.LabelSnapshotUIDMapping: uids, snapshots.LabelSnapshotGIDMapping: gids})
		if err == nil && (!mapped || uid < 0 || gid < 0 || uid > 1<<32-1 || gid > 1<<32-1) {
			t.Errorf("mapping %q, %q: root is %d:%d, mapped %v", uids, gids, uid, gid, mapped)
		}
		if err != nil && !errdefs.IsInvalidArgument(err) {
			t.Errorf("mapping %q, %q: got error %v, want invalid argument", uids, gids, err)
		}
	})
}

// TestDiff: what containerd's walking differ sees between a container and its image,
// also while the container runs.
func TestDiff(t *testing.T) {
	for _, v := range variants {
		t.Run(v.name, func(t *testing.T) {
			l := newLab(t)
			ctx := t.Context()
			im := l.addImage("image", v.mode, v.filesystem, threeLayers...)
			l.pull(im)
			compare := func() {
				t.Helper()
				lower := must(l.s.View(ctx, "lower", im.top()))(t)
				upper := must(l.s.Mounts(ctx, "container"))(t)
				var got []string
				withMounts(t, lower, func(low string) {
					if err := mount.WithReadonlyTempMount(ctx, upper, func(up string) error {
						return fs.Changes(ctx, low, up, func(k fs.ChangeKind, p string, _ os.FileInfo, err error) error {
							if k != fs.ChangeKindUnmodified && p != "/" {
								got = append(got, k.String()+" "+p)
							}
							return err
						})
					}); err != nil {
						t.Error(err)
					}
				})
				slices.Sort(got)
				want := []string{"add /new", "delete /app", "modify /bin", "modify /bin/sh"}
				// A directory is only walked through when its own times are not looked at.
				got = slices.DeleteFunc(got, func(c string) bool { return c == "modify /bin" })
				want = slices.DeleteFunc(want, func(c string) bool { return c == "modify /bin" })
				if !slices.Equal(got, want) {
					t.Errorf("got changes %q, want %q", got, want)
				}
				if err := l.s.Remove(ctx, "lower"); err != nil {
					t.Error(err)
				}
			}
			withMounts(t, must(l.s.Prepare(ctx, "container", im.top()))(t), func(root string) {
				for _, err := range []error{
					os.WriteFile(filepath.Join(root, "new"), []byte("1"), 0o600),
					os.Remove(filepath.Join(root, "app")),
					os.WriteFile(filepath.Join(root, "bin/sh"), []byte("shell of another length"), 0o644),
				} {
					if err != nil {
						t.Error(err)
					}
				}
				unix.Sync()
				compare()
			})
			compare()
		})
	}
}
