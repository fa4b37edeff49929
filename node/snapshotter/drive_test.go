package snapshotter

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/testsuite"

	"github.com/thaw-project/thaw/image/block"
	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/node/imagemgmt"
	"github.com/thaw-project/thaw/node/mount"
	"github.com/thaw-project/thaw/node/present"
)

// driveStorage shows the disks of a fakeStorage as block devices, as a card shows drives.
// Loop devices stand in for these; they are on files of other names than the snapshotter's
// own loop devices would be, so that it leaves them alone.
type driveStorage struct {
	*fakeStorage
	mu sync.Mutex // one change of loop devices at a time
}

func (s *driveStorage) file(id string) string { return filepath.Join(s.dir, "drives", "drive-of-"+id) }

func (s *driveStorage) show(ctx context.Context, d present.Disk) (present.Disk, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	file := s.file(d.ID)
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		return present.Disk{}, err
	}
	if err := os.Link(d.Path, file); err != nil && !errors.Is(err, fs.ErrExist) {
		return present.Disk{}, err
	}
	var err error
	d.Path, err = mount.AttachLoop(ctx, file, mount.LoopOptions{})
	d.Block, d.NVMe = true, &present.NVMe{UUID: d.ID}
	return d, err
}

// hide is kind.InUse while the drive is mounted.
func (s *driveStorage) hide(ctx context.Context, id string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	file := s.file(id)
	if users := kernelUsers(file); len(users) > 0 {
		mounts, err := systemMounter{}.Mounts("/")
		if err != nil {
			return err
		}
		for _, m := range mounts {
			if m.Source == users[0] {
				return kind.Errorf(kind.InUse, "%s is mounted at %s", m.Source, m.Target)
			}
		}
		if err := mount.DetachLoop(ctx, file); err != nil {
			return err
		}
	}
	if err := os.Remove(file); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

func (s *driveStorage) Attach(ctx context.Context, b imagemgmt.Block, user string) (present.Disk, error) {
	d, err := s.fakeStorage.Attach(ctx, b, user)
	if err != nil {
		return d, err
	}
	return s.show(ctx, d)
}

func (s *driveStorage) Detach(ctx context.Context, b, user string) error {
	a, err := s.Stat(ctx, b)
	if errors.Is(err, kind.NotFound) {
		return nil
	}
	if err == nil && (len(a.Users) == 0 || len(a.Users) == 1 && a.Users[0] == user) {
		err = s.hide(ctx, b)
	}
	if err != nil {
		return err
	}
	return s.fakeStorage.Detach(ctx, b, user)
}

func (s *driveStorage) AttachWritable(ctx context.Context, l imagemgmt.Layer, id string) (present.Disk, error) {
	d, err := s.fakeStorage.AttachWritable(ctx, l, id)
	if err != nil {
		return d, err
	}
	return s.show(ctx, d)
}

func (s *driveStorage) DetachWritable(ctx context.Context, b, id string) error {
	if err := s.hide(ctx, id); err != nil {
		return err
	}
	return s.fakeStorage.DetachWritable(ctx, b, id)
}

func (s *driveStorage) DeleteWritable(ctx context.Context, l imagemgmt.Layer, id string) error {
	if err := s.hide(ctx, id); err != nil {
		return err
	}
	return s.fakeStorage.DeleteWritable(ctx, l, id)
}

// openDrives opens l over drives.
func (l *lab) openDrives() *driveStorage {
	l.t.Helper()
	l.storage = must(openStorage(filepath.Join(l.dir, "storage")))(l.t)
	makeExt4(l.t, filepath.Join(l.storage.blocks(), scratchBlock), l.t.TempDir())
	s := &driveStorage{fakeStorage: l.storage}
	l.open(func(o *Options) { o.Images = s })
	return s
}

// noLoopsOfItsOwn checks that the snapshotter made no loop device: drives are mounted as
// they are.
func (l *lab) noLoopsOfItsOwn() {
	l.t.Helper()
	for _, d := range must(systemMounter{}.Loops())(l.t) {
		if strings.HasPrefix(d.File, l.dir) && !strings.HasPrefix(filepath.Base(d.File), "drive-of-") {
			l.t.Errorf("%s is on %s", d.Device, d.File)
		}
	}
}

// TestSuiteDrives is containerd's conformance suite with every layer on top of a converted
// image whose disks are block devices, in the mode that also writes to one.
func TestSuiteDrives(t *testing.T) {
	requireKernel(t)
	for _, v := range variants {
		if v.mode != block.ModeOverlaybd {
			continue
		}
		t.Run(v.name, func(t *testing.T) {
			testsuite.SnapshotterSuite(t, suiteName, func(_ context.Context, root string) (snapshots.Snapshotter, func() error, error) {
				l := &lab{t: t, dir: root}
				s := l.openDrives()
				return l.onConverted(l.s, v.name), func() error {
					l.noLoopsOfItsOwn()
					err := l.tearDown()
					left, _ := filepath.Glob(s.file("*"))
					for _, f := range left {
						err = errors.Join(err, mount.DetachLoop(context.Background(), f))
					}
					return err
				}, nil
			})
		})
	}
}

// TestDriveComesBackElsewhere: a drive went away and came back with another name, and its
// old name is another drive's.
func TestDriveComesBackElsewhere(t *testing.T) {
	requireKernel(t)
	if sequence("/dev/loop0") == "" {
		t.Skip("the kernel does not number disks: needs Linux 5.15")
	}
	l := &lab{t: t, dir: shortDir(t)}
	s := l.openDrives()
	ctx := t.Context()
	im := l.addImage("image", block.ModeOverlaybd, block.Ext4, threeLayers...)
	l.pull(im)
	before := must(l.s.Prepare(ctx, "container", im.top()))(t)[0].Source
	var id string
	for _, a := range must(s.List(ctx))(t) {
		for _, u := range a.Users {
			if strings.HasPrefix(u, l.s.diskIDPrefix) {
				id = u
			}
		}
	}
	file := s.file(id)
	if err := mount.DetachLoop(ctx, file); err != nil {
		t.Fatal(err)
	}
	other := filepath.Join(l.dir, "other")
	if err := os.WriteFile(other, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := must(mount.AttachLoop(ctx, other, mount.LoopOptions{}))(t); got != before {
		t.Skipf("the kernel gave another drive the name %s, not %s: another test took it, run again", got, before)
	}
	defer mount.DetachLoop(ctx, other)
	mounts := must(l.s.Mounts(ctx, "container"))(t)
	if mounts[0].Source == before {
		t.Errorf("the container would get another drive: %+v", mounts)
	}
	withMounts(t, mounts, func(root string) { expect(t, root, merged) })
	if err := l.s.Remove(ctx, "container"); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(file); err == nil {
		t.Error("the drive is still there")
	}
	if err := errors.Join(mount.DetachLoop(ctx, other), l.tearDown()); err != nil {
		t.Error(err)
	}
}
