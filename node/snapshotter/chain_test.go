package snapshotter

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/testsuite"
	"golang.org/x/sys/unix"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/node/imagemgmt"
	"github.com/thaw-project/thaw/node/present"
	"github.com/thaw-project/thaw/node/present/fuse"
	"github.com/thaw-project/thaw/qcow2"
	"github.com/thaw-project/thaw/target/bdev"
)

// chain is the real way from a snapshot to its bytes, image-mgmt, FUSE and qcow2,
// with a file in place of each lvol.
type chain struct {
	dir       string
	presenter *fuse.Presenter
	manager   *imagemgmt.Manager
}

// fileDevice is an lvol of a storage's blocks directory.
type fileDevice struct {
	*os.File
	sizeBytes int64
	readOnly  bool
}

func (d *fileDevice) WriteAt(p []byte, off int64) (int, error) {
	if d.readOnly {
		return 0, kind.Errorf(kind.ReadOnly, "write to a block")
	}
	return d.File.WriteAt(p, off)
}
func (d *fileDevice) Flush() error { return unix.Fdatasync(int(d.Fd())) }
func (d *fileDevice) Discard(int64, int64) error {
	return kind.Errorf(kind.ReadOnly, "discard of a block")
}
func (d *fileDevice) WriteZeroes(int64, int64) error {
	return kind.Errorf(kind.ReadOnly, "zeroing of a block")
}
func (d *fileDevice) SizeBytes() int64 { return d.sizeBytes }
func (d *fileDevice) ReadOnly() bool   { return d.readOnly }

// overQcow2 closes the base with the image.
type overQcow2 struct {
	bdev.Device
	base *fileDevice
}

func (d *overQcow2) Close() error { return errors.Join(d.Device.Close(), d.base.Close()) }

func newChain(t testing.TB, dir, blocks string) *chain {
	t.Helper()
	lvol := func(name string) (*fileDevice, error) {
		f, err := os.Open(filepath.Join(blocks, name))
		if err != nil {
			return nil, err
		}
		info, err := f.Stat()
		return &fileDevice{f, info.Size() &^ 511, true}, err
	}
	open := func(source present.Source, readOnly bool) (bdev.Device, error) {
		base, err := lvol(source.Lvol)
		if err != nil || source.Kind == present.SourceLvol {
			return base, err
		}
		image, err := qcow2.Open(source.Path, qcow2.OpenOptions{ReadOnly: readOnly, Backing: base, BackingSizeBytes: base.SizeBytes()})
		if err != nil {
			return nil, errors.Join(err, base.Close())
		}
		return &overQcow2{image, base}, nil
	}
	c := &chain{dir: dir}
	var err error
	c.presenter, err = fuse.New(fuse.Options{Dir: filepath.Join(dir, "dev"), StatePath: filepath.Join(dir, "fuse.json"), Open: open})
	if err != nil {
		t.Fatal(err)
	}
	c.manager, err = imagemgmt.New(imagemgmt.Options{
		Presenter: c.presenter, DBPath: filepath.Join(dir, "imagemgmt.db"), Own: "local",
		Lookup: func(_ context.Context, block imagemgmt.Block) error {
			if _, err := os.Stat(filepath.Join(blocks, block.Name)); err != nil {
				return kind.Wrap(kind.NotFound, err)
			}
			return nil
		},
		Open: open,
		Scratch: func(context.Context, string, int64) (imagemgmt.Block, error) {
			return imagemgmt.Block{Name: scratchBlock}, nil
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func (c *chain) close() error {
	ctx := context.Background()
	return errors.Join(c.manager.Close(), c.presenter.Teardown(ctx))
}

// openChain opens l over the real chain and returns what ends both.
func (l *lab) openChain() (tearDown func() error) {
	c := new(chain)
	l.joinChain(c)
	return func() error {
		err := l.tearDown()
		return errors.Join(err, c.close())
	}
}

// joinChain opens l over a chain that it makes in c.
func (l *lab) joinChain(c *chain) {
	l.t.Helper()
	if _, err := os.Stat("/dev/fuse"); err != nil {
		l.t.Skip("needs /dev/fuse: load the module fuse")
	}
	l.storage = must(openStorage(filepath.Join(l.dir, "storage")))(l.t)
	makeExt4(l.t, filepath.Join(l.storage.blocks(), scratchBlock), l.t.TempDir())
	*c = *newChain(l.t, l.dir, l.storage.blocks())
	l.open(func(o *Options) {
		o.Images = c.manager
	})
}

// TestLostPresentation: server and keeper died together, and containers with them;
// what is mounted from the lost presentation is mounted again from the new one.
func TestLostPresentation(t *testing.T) {
	requireKernel(t)
	for _, v := range variants {
		t.Run(v.name, func(t *testing.T) {
			l := &lab{t: t, dir: shortDir(t)}
			c := new(chain)
			l.joinChain(c)
			ctx := t.Context()
			im := l.addImage("image", v.mode, v.filesystem, threeLayers...)
			l.pull(im)
			want := tree{"written": "before"}
			for p, content := range merged {
				want[p] = content
			}
			withMounts(t, must(l.s.Prepare(ctx, "container", im.top()))(t), func(root string) {
				if err := os.WriteFile(filepath.Join(root, "written"), []byte("before"), 0o600); err != nil {
					t.Error(err)
				}
			})
			withMounts(t, must(l.s.Prepare(ctx, "other", im.top()))(t), func(string) {})
			if err := l.s.Commit(ctx, "image-2", "other"); err != nil {
				t.Fatal(err)
			}
			must(l.s.Prepare(ctx, "child", "image-2"))(t)

			// Without a keeper, closing the presenter kills its mount.
			if err := errors.Join(l.s.Close(), c.manager.Close(), c.presenter.Close()); err != nil {
				t.Fatal(err)
			}
			l.joinChain(c)
			withMounts(t, must(l.s.Mounts(ctx, "container"))(t), func(root string) { expect(t, root, want) })
			withMounts(t, must(l.s.Mounts(ctx, "child"))(t), func(root string) { expect(t, root, merged) })
			withMounts(t, must(l.s.Prepare(ctx, "new", im.top()))(t), func(root string) { expect(t, root, merged) })
			if err := errors.Join(l.tearDown(), c.close()); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestSuiteChain is TestSuiteConverted over the real chain.
func TestSuiteChain(t *testing.T) {
	requireKernel(t)
	for _, v := range variants {
		t.Run(v.name, func(t *testing.T) {
			testsuite.SnapshotterSuite(t, suiteName, func(_ context.Context, root string) (snapshots.Snapshotter, func() error, error) {
				l := &lab{t: t, dir: root}
				end := l.openChain()
				return l.onConverted(l.s, v.name), end, nil
			})
		})
	}
}
