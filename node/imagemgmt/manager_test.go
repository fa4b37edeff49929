package imagemgmt_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/lvol"
	"github.com/thaw-project/thaw/node/cache"
	"github.com/thaw-project/thaw/node/imagemgmt"
	"github.com/thaw-project/thaw/node/present"
	"github.com/thaw-project/thaw/node/present/presenttest"
	"github.com/thaw-project/thaw/qcow2"
	"github.com/thaw-project/thaw/target/bdev"
)

func TestMain(m *testing.M) {
	childMain()
	goleak.VerifyTestMain(m)
}

// lab is a real lvol store, a presenter that outlives managers, and one manager at a
// time.
type lab struct {
	testing.TB
	dir       string
	store     *lvol.Store
	presenter *presenttest.Presenter
	manager   *imagemgmt.Manager
	lookups   atomic.Int64
	down      atomic.Bool // the storage side does not answer
}

const blockBytes = 64 << 20

func newLab(t testing.TB) *lab {
	l := &lab{TB: t, dir: t.TempDir()}
	pool := filepath.Join(l.dir, "pool")
	if err := lvol.Create(lvol.CreateOptions{Dir: pool, CapacityBytes: 1 << 30}); err != nil {
		t.Fatal(err)
	}
	var err error
	if l.store, err = lvol.Open(lvol.Options{Dir: pool}); err != nil {
		t.Fatal(err)
	}
	l.presenter = presenttest.New(l.open)
	t.Cleanup(func() {
		if l.manager != nil {
			l.manager.Close()
		}
		l.presenter.Reboot()
		if err := l.store.Close(); err != nil {
			t.Error(err)
		}
	})
	return l
}

type layered struct {
	bdev.Device
	base bdev.Device
}

func (d *layered) Close() error { return errors.Join(d.Device.Close(), d.base.Close()) }

// open is what a server's opener does.
func (l *lab) open(source present.Source, readOnly bool) (bdev.Device, error) {
	base, err := l.store.OpenLvol(source.Lvol, readOnly || source.Kind == present.SourceQcow2)
	if err != nil {
		return nil, err
	}
	if source.Kind == present.SourceLvol {
		return base, nil
	}
	image, err := qcow2.Open(source.Path, qcow2.OpenOptions{ReadOnly: readOnly, Backing: base, BackingSizeBytes: base.SizeBytes()})
	if err != nil {
		base.Close()
		return nil, err
	}
	return &layered{image, base}, nil
}

func (l *lab) options() imagemgmt.Options {
	return imagemgmt.Options{
		Presenter: l.presenter, DBPath: filepath.Join(l.dir, "imagemgmt.db"),
		Lookup: func(_ context.Context, block imagemgmt.Block) error {
			l.lookups.Add(1)
			if l.down.Load() {
				return kind.Errorf(kind.Unavailable, "the storage side is down")
			}
			_, err := l.store.Get(block.Name)
			return err
		},
		Open: l.open,
	}
}

func (l *lab) start() *imagemgmt.Manager {
	l.Helper()
	m, err := imagemgmt.New(l.options())
	if err != nil {
		l.Fatal(err)
	}
	l.manager = m
	return m
}

func (l *lab) restart() *imagemgmt.Manager {
	l.Helper()
	if err := l.manager.Close(); err != nil {
		l.Fatal(err)
	}
	return l.start()
}

// block makes a block and returns its name.
func (l *lab) block(n int) string {
	l.Helper()
	name := fmt.Sprintf("soldier-00000000-0000-4000-8000-%012d", n)
	if _, err := l.store.Create(name, blockBytes); err != nil {
		l.Fatal(err)
	}
	if _, err := l.store.SetReadOnly(name, true); err != nil {
		l.Fatal(err)
	}
	return name
}

func (l *lab) qcow2(name string) string {
	l.Helper()
	path := filepath.Join(l.dir, name+".qcow2")
	if err := qcow2.Create(path, qcow2.CreateOptions{SizeBytes: blockBytes, BackingFile: "block"}); err != nil {
		l.Fatal(err)
	}
	return path
}

func (l *lab) shown() []string {
	l.Helper()
	disks, err := l.presenter.List(context.Background())
	if err != nil {
		l.Fatal(err)
	}
	var ids []string
	for _, d := range disks {
		ids = append(ids, d.ID)
	}
	return ids
}

func (l *lab) wantShown(want ...string) {
	l.Helper()
	if got := l.shown(); !slices.Equal(got, want) {
		l.Fatalf("shown: %q, want %q", got, want)
	}
}

func (l *lab) wantUsers(block string, want ...string) {
	l.Helper()
	a, err := l.manager.Stat(context.Background(), block)
	if len(want) == 0 {
		if !errors.Is(err, kind.NotFound) {
			l.Fatalf("block %s: %+v, %v, want not found", block, a, err)
		}
		if l.manager.Attached(block) {
			l.Fatalf("block %s counts as attached", block)
		}
		return
	}
	if err != nil || !slices.Equal(a.Users, want) || !l.manager.Attached(block) {
		l.Fatalf("block %s: users %q, error %v, attached %v; want %q", block, a.Users, err, l.manager.Attached(block), want)
	}
}

func wantKind(t testing.TB, err error, k kind.Kind) {
	t.Helper()
	if kind.Of(err) != k {
		t.Fatalf("got error %v (kind %q), want kind %q", err, kind.Of(err), k)
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

var ctx = context.Background()

func TestUsersShareOneDiskAndTheLastOneTakesItAway(t *testing.T) {
	l := newLab(t)
	m, b := l.start(), l.block(1)
	d1, err := m.Attach(ctx, imagemgmt.Block{Name: b}, "u1")
	must(t, err)
	d2, err := m.Attach(ctx, imagemgmt.Block{Name: b}, "u2")
	must(t, err)
	if d1 != d2 || !d1.ReadOnly || d1.ID != b || d1.SizeBytes != blockBytes {
		t.Fatalf("disks %+v and %+v", d1, d2)
	}
	again, err := m.Attach(ctx, imagemgmt.Block{Name: b}, "u1")
	must(t, err)
	if again != d1 || l.presenter.Count("present", b) != 1 || l.lookups.Load() != 1 {
		t.Fatalf("%+v, presented %d times, looked up %d times", again, l.presenter.Count("present", b), l.lookups.Load())
	}
	l.wantUsers(b, "u1", "u2")
	must(t, m.Detach(ctx, b, "u1"))
	must(t, m.Detach(ctx, b, "u1"))
	must(t, m.Detach(ctx, b, "stranger"))
	l.wantUsers(b, "u2")
	l.wantShown(b)
	must(t, m.Detach(ctx, b, "u2"))
	l.wantUsers(b)
	l.wantShown()
	must(t, m.Detach(ctx, "never-seen", "u2"))
}

func TestAttachErrorsLeaveNothing(t *testing.T) {
	l := newLab(t)
	m, b := l.start(), l.block(1)
	_, err := m.Attach(ctx, imagemgmt.Block{Name: "soldier-of-nobody"}, "u")
	wantKind(t, err, kind.NotFound)
	l.down.Store(true)
	_, err = m.Attach(ctx, imagemgmt.Block{Name: b}, "u")
	wantKind(t, err, kind.Unavailable)
	l.down.Store(false)
	l.presenter.Hook(func(context.Context, string, string) error { return kind.Errorf(kind.IO, "no device") })
	_, err = m.Attach(ctx, imagemgmt.Block{Name: b}, "u")
	wantKind(t, err, kind.IO)
	l.presenter.Hook(nil)
	for _, bad := range [][2]string{{"", "u"}, {"a/b", "u"}, {b, ""}, {b, "u\x00v"}, {strings.Repeat("x", 129), "u"}, {b, strings.Repeat("u", 513)}} {
		_, err = m.Attach(ctx, imagemgmt.Block{Name: bad[0]}, bad[1])
		wantKind(t, err, kind.Invalid)
		wantKind(t, m.Detach(ctx, bad[0], bad[1]), kind.Invalid)
	}
	l.wantUsers(b)
	l.restart()
	l.wantUsers(b)
	l.wantShown()
}

func TestRestartAndReboot(t *testing.T) {
	l := newLab(t)
	m, b1, b2 := l.start(), l.block(1), l.block(2)
	for _, u := range []string{"u1", "u2"} {
		_, err := m.Attach(ctx, imagemgmt.Block{Name: b1}, u)
		must(t, err)
	}
	path := l.qcow2("rw")
	_, err := m.AttachWritable(ctx, imagemgmt.Layer{Block: imagemgmt.Block{Name: b2}, Path: path}, "rw-1")
	must(t, err)

	l.restart()
	l.wantUsers(b1, "u1", "u2")
	l.wantUsers(b2, "rw-1")
	if n := l.presenter.Count("present", b1); n != 1 {
		t.Fatalf("a restart presented again, %d times", n)
	}

	must(t, l.manager.Close())
	l.presenter.Reboot()
	m = l.start()
	l.wantShown("rw-1", b1)
	l.wantUsers(b1, "u1", "u2")
	must(t, m.Detach(ctx, b1, "u1"))
	must(t, m.Detach(ctx, b1, "u2"))
	must(t, m.DetachWritable(ctx, b2, "rw-1"))
	l.wantShown()

	// A block that vanished while nobody looked does not keep the others from starting.
	_, err = m.Attach(ctx, imagemgmt.Block{Name: b1}, "u1")
	must(t, err)
	must(t, m.Close())
	l.presenter.Reboot()
	must(t, l.store.Delete(b1))
	m = l.start()
	l.wantUsers(b1, "u1")
	_, err = m.Attach(ctx, imagemgmt.Block{Name: b1}, "u1")
	wantKind(t, err, kind.NotFound)
	must(t, m.Detach(ctx, b1, "u1"))
	l.wantUsers(b1)
}

func TestStartTakesAwayWhatIsOursAndUnrecorded(t *testing.T) {
	l := newLab(t)
	b1, b2, b3 := l.block(1), l.block(2), l.block(3)
	for _, d := range []struct{ id, lvol string }{{b1, b1}, {"w-" + b2, b2}, {b3, b3}} {
		_, err := l.presenter.Present(ctx, d.id, present.Source{Kind: present.SourceLvol, Lvol: d.lvol}, true)
		must(t, err)
	}
	_, err := l.presenter.Present(ctx, "rw-9", present.Source{Kind: present.SourceQcow2, Lvol: b1, Path: l.qcow2("x")}, false)
	must(t, err)
	l.presenter.SetBusy(b3, true)
	m := l.start()
	l.wantShown(b3, "w-"+b2) // b3 is open, w- is the attacher's
	l.presenter.SetBusy(b3, false)
	must(t, m.Detach(ctx, b3, "whoever"))
	l.wantShown("w-" + b2)
}

func TestConcurrentAttachPresentsOnce(t *testing.T) {
	l := newLab(t)
	m, b := l.start(), l.block(1)
	var calls atomic.Int64
	l.presenter.Hook(func(_ context.Context, op, _ string) error {
		if op == "present" {
			calls.Add(1)
			time.Sleep(20 * time.Millisecond)
		}
		return nil
	})
	var wg sync.WaitGroup
	for i := range 50 {
		wg.Go(func() {
			if _, err := m.Attach(ctx, imagemgmt.Block{Name: b}, fmt.Sprintf("u%02d", i)); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if calls.Load() != 1 {
		t.Fatalf("presented %d times", calls.Load())
	}
	if a, _ := m.Stat(ctx, b); len(a.Users) != 50 {
		t.Fatalf("%d users", len(a.Users))
	}
}

func TestPresentationsAtOnceAreBounded(t *testing.T) {
	l := newLab(t)
	m := l.start()
	l.presenter.Hook(func(context.Context, string, string) error { time.Sleep(5 * time.Millisecond); return nil })
	var wg sync.WaitGroup
	for i := range 60 {
		b := l.block(i)
		wg.Go(func() {
			if _, err := m.Attach(ctx, imagemgmt.Block{Name: b}, "u"); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if n := l.presenter.MostAtOnce(); n > 16 || n < 2 {
		t.Fatalf("%d presentations at once", n)
	}
}

func TestCancelledCallerDoesNotPoison(t *testing.T) {
	l := newLab(t)
	m, b := l.start(), l.block(1)
	entered, release := make(chan struct{}, 10), make(chan struct{})
	l.presenter.Hook(func(ctx context.Context, op, _ string) error {
		if op != "present" {
			return nil
		}
		entered <- struct{}{}
		select {
		case <-release:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	})
	first, cancel := context.WithCancel(ctx)
	results := make(chan error, 2)
	go func() { _, err := m.Attach(first, imagemgmt.Block{Name: b}, "gone"); results <- err }()
	<-entered
	waiting, stop := context.WithTimeout(ctx, 20*time.Millisecond)
	defer stop()
	if _, err := m.Attach(waiting, imagemgmt.Block{Name: b}, "impatient"); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("got %v", err)
	}
	go func() { _, err := m.Attach(ctx, imagemgmt.Block{Name: b}, "patient"); results <- err }()
	cancel()
	if err := <-results; !errors.Is(err, context.Canceled) {
		t.Fatalf("got %v", err)
	}
	<-entered // the patient one tries itself
	close(release)
	must(t, <-results)
	l.wantUsers(b, "patient")
	l.restart()
	l.wantUsers(b, "patient")
	must(t, l.manager.Detach(ctx, b, "patient"))
	l.wantShown()
}

func TestDetachWaitsForTheKernelAndThenSaysSo(t *testing.T) {
	l := newLab(t)
	m, b := l.start(), l.block(1)
	_, err := m.Attach(ctx, imagemgmt.Block{Name: b}, "u")
	must(t, err)
	l.presenter.SetBusy(b, true)
	time.AfterFunc(50*time.Millisecond, func() { l.presenter.SetBusy(b, false) }) // autoclear
	must(t, m.Detach(ctx, b, "u"))
	l.wantShown()

	_, err = m.Attach(ctx, imagemgmt.Block{Name: b}, "u")
	must(t, err)
	l.presenter.SetBusy(b, true)
	wantKind(t, m.Detach(ctx, b, "u"), kind.InUse)
	if !m.Attached(b) {
		t.Fatal("a shown block does not count as attached")
	}
	a, err := m.Stat(ctx, b)
	must(t, err)
	if len(a.Users) != 0 || a.Disk.ID != b {
		t.Fatalf("%+v", a)
	}
	_, err = m.Attach(ctx, imagemgmt.Block{Name: b}, "v") // it is still good for the next one
	must(t, err)
	l.presenter.SetBusy(b, false)
	must(t, m.Detach(ctx, b, "v"))
	l.wantUsers(b)
	l.wantShown()
}

func TestWritable(t *testing.T) {
	l := newLab(t)
	m, b, other := l.start(), l.block(1), l.block(2)
	path := l.qcow2("rw")
	d, err := m.AttachWritable(ctx, imagemgmt.Layer{Block: imagemgmt.Block{Name: b}, Path: path}, "rw-1")
	must(t, err)
	if d.ReadOnly || d.ID != "rw-1" || d.Source != (present.Source{Kind: present.SourceQcow2, Lvol: b, Path: path}) {
		t.Fatalf("%+v", d)
	}
	again, err := m.AttachWritable(ctx, imagemgmt.Layer{Block: imagemgmt.Block{Name: b}, Path: path}, "rw-1")
	must(t, err)
	if again != d {
		t.Fatalf("%+v and %+v", d, again)
	}
	_, err = m.AttachWritable(ctx, imagemgmt.Layer{Block: imagemgmt.Block{Name: other}, Path: path}, "rw-1")
	wantKind(t, err, kind.Exists)
	_, err = m.AttachWritable(ctx, imagemgmt.Layer{Block: imagemgmt.Block{Name: b}, Path: l.qcow2("rw2")}, "rw-1")
	wantKind(t, err, kind.Exists)
	_, err = m.AttachWritable(ctx, imagemgmt.Layer{Block: imagemgmt.Block{Name: b}, Path: filepath.Join(l.dir, "absent", "rw")}, "rw-2")
	wantKind(t, err, kind.NotFound)
	_, err = m.AttachWritable(ctx, imagemgmt.Layer{Block: imagemgmt.Block{Name: b}, Path: path, SizeBytes: 100}, "rw-2")
	wantKind(t, err, kind.Invalid)
	_, err = m.AttachWritable(ctx, imagemgmt.Layer{Block: imagemgmt.Block{Name: "soldier-of-nobody"}, Path: path}, "rw-2")
	wantKind(t, err, kind.NotFound)
	_, err = m.AttachWritable(ctx, imagemgmt.Layer{Block: imagemgmt.Block{Name: b}, Path: "relative"}, "rw-2")
	wantKind(t, err, kind.Invalid)
	_, err = m.AttachWritable(ctx, imagemgmt.Layer{Block: imagemgmt.Block{Name: b}, Path: path}, b)
	wantKind(t, err, kind.Invalid)

	must(t, func() error { _, err := m.Attach(ctx, imagemgmt.Block{Name: b}, "reader"); return err }())
	l.wantUsers(b, "reader", "rw-1")
	l.wantUsers(other)
	wantKind(t, l.store.Delete(b), kind.InUse)
	must(t, m.Detach(ctx, b, "reader"))
	l.wantUsers(b, "rw-1")
	a, err := m.Stat(ctx, b)
	must(t, err)
	if a.Disk.ID != "" {
		t.Fatalf("a block under writable layers only has disk %+v", a.Disk)
	}

	if _, err := l.presenter.Device("rw-1").WriteAt([]byte("kept"), 4096); err != nil {
		t.Fatal(err)
	}
	wantKind(t, m.DetachWritable(ctx, other, "rw-1"), kind.Invalid)
	must(t, m.DetachWritable(ctx, b, "rw-1"))
	must(t, m.DetachWritable(ctx, b, "rw-1"))
	l.wantUsers(b)
	l.wantShown()
	must(t, func() error {
		_, err := m.AttachWritable(ctx, imagemgmt.Layer{Block: imagemgmt.Block{Name: b}, Path: path}, "rw-1")
		return err
	}())
	got := make([]byte, 4)
	if _, err := l.presenter.Device("rw-1").ReadAt(got, 4096); err != nil || string(got) != "kept" {
		t.Fatalf("%q, %v", got, err)
	}
	must(t, m.DetachWritable(ctx, b, "rw-1"))
}

// TestLayers goes through the lives of writable layers.
func TestLayers(t *testing.T) {
	l := newLab(t)
	m, b, other := l.start(), l.block(1), l.block(2)
	layer := imagemgmt.Layer{Block: imagemgmt.Block{Name: b}, Path: filepath.Join(l.dir, "rw-1.qcow2")}
	stat := func(there bool) imagemgmt.Writable {
		t.Helper()
		w, err := l.manager.StatWritable(ctx, layer, "rw-1")
		must(t, err)
		if (w.Files > 0) != there || (w.AllocatedBytes > 0) != there {
			t.Fatalf("%+v, there: %v", w, there)
		}
		return w
	}
	stat(false)
	d, err := m.AttachWritable(ctx, layer, "rw-1")
	must(t, err)
	if d.SizeBytes != blockBytes {
		t.Fatalf("it has %d bytes and its block %d", d.SizeBytes, blockBytes)
	}
	if w := stat(true); w.Disk != d {
		t.Fatalf("%+v, want %+v", w.Disk, d)
	}
	before := stat(true).AllocatedBytes
	if _, err := l.presenter.Device("rw-1").WriteAt(make([]byte, 1<<20), 0); err != nil {
		t.Fatal(err)
	}
	if after := stat(true).AllocatedBytes; after < before {
		t.Fatalf("%d bytes before and %d after", before, after)
	}
	// A larger one.
	large := imagemgmt.Layer{Block: imagemgmt.Block{Name: b}, Path: filepath.Join(l.dir, "rw-2.qcow2"), SizeBytes: 2 * blockBytes}
	if d, err = m.AttachWritable(ctx, large, "rw-2"); err != nil || d.SizeBytes != 2*blockBytes {
		t.Fatalf("%+v, %v", d, err)
	}
	// Deleted while it is attached, and once more.
	must(t, m.DeleteWritable(ctx, large, "rw-2"))
	must(t, m.DeleteWritable(ctx, large, "rw-2"))
	if files, _ := filepath.Glob(large.Path + "*"); len(files) != 0 {
		t.Fatalf("left %q", files)
	}
	l.wantShown("rw-1")

	// What was made is never made again: not after a restart, and not when its file is lost.
	must(t, m.DetachWritable(ctx, b, "rw-1"))
	m = l.restart()
	wantKind(t, m.DeleteWritable(ctx, imagemgmt.Layer{Block: imagemgmt.Block{Name: other}, Path: layer.Path}, "rw-1"), kind.Invalid)
	_, err = m.AttachWritable(ctx, imagemgmt.Layer{Block: imagemgmt.Block{Name: other}, Path: layer.Path}, "rw-1")
	wantKind(t, err, kind.Exists)
	must(t, os.Rename(layer.Path, layer.Path+"-lost"))
	_, err = m.AttachWritable(ctx, layer, "rw-1")
	wantKind(t, err, kind.NotFound)
	l.wantUsers(b)
	must(t, os.Rename(layer.Path+"-lost", layer.Path))
	_, err = m.AttachWritable(ctx, layer, "rw-1")
	must(t, err)
	must(t, m.DeleteWritable(ctx, layer, "rw-1"))
	stat(false)
	// The id is free again.
	_, err = m.AttachWritable(ctx, layer, "rw-1")
	must(t, err)

	// In use: nothing changes.
	l.presenter.SetBusy("rw-1", true)
	wantKind(t, m.DeleteWritable(ctx, layer, "rw-1"), kind.InUse)
	stat(true)
	l.presenter.SetBusy("rw-1", false)
	must(t, m.DeleteWritable(ctx, layer, "rw-1"))

	// A layer of before there were records of layers: its file is taken as it is.
	must(t, qcow2.Create(layer.Path, qcow2.CreateOptions{SizeBytes: 3 * blockBytes, BackingFile: b}))
	if d, err = m.AttachWritable(ctx, layer, "rw-1"); err != nil || d.SizeBytes != 3*blockBytes {
		t.Fatalf("%+v, %v", d, err)
	}
	must(t, m.DetachWritable(ctx, b, "rw-1"))
	must(t, m.DeleteWritable(ctx, layer, "rw-1"))
	l.wantShown()
	l.wantUsers(b)
}

// TestUnclear has the presenter be out of reach: whatever it shows for nobody goes once it
// is back, without anybody's asking.
func TestUnclear(t *testing.T) {
	l := newLab(t)
	m, b := l.start(), l.block(1)
	away := kind.Errorf(kind.Unavailable, "the card does not answer")
	var down atomic.Bool
	shown := func(want ...string) {
		t.Helper()
		for deadline := time.Now().Add(10 * time.Second); !slices.Equal(l.shown(), want); time.Sleep(5 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("shown %q, want %q", l.shown(), want)
			}
		}
	}
	// An attach whose answer is lost.
	lost := &lossy{Presenter: l.presenter, lost: &down, err: away}
	o := l.options()
	must(t, m.Close())
	o.Presenter = lost
	m, err := imagemgmt.New(o)
	must(t, err)
	l.manager = m
	down.Store(true)
	_, err = m.Attach(ctx, imagemgmt.Block{Name: b}, "u")
	wantKind(t, err, kind.Unavailable)
	shown(b)
	if !m.Attached(b) {
		t.Fatal("a block that may be shown does not count as attached: its store may take it away")
	}
	down.Store(false)
	shown()
	for m.Attached(b) {
		time.Sleep(time.Millisecond)
	}
	// A detach.
	_, err = m.Attach(ctx, imagemgmt.Block{Name: b}, "u")
	must(t, err)
	down.Store(true)
	wantKind(t, m.Detach(ctx, b, "u"), kind.Unavailable)
	shown(b)
	down.Store(false)
	shown()
	// One that is wanted again meanwhile stays.
	_, err = m.Attach(ctx, imagemgmt.Block{Name: b}, "u")
	must(t, err)
	down.Store(true)
	wantKind(t, m.Detach(ctx, b, "u"), kind.Unavailable)
	_, err = m.Attach(ctx, imagemgmt.Block{Name: b}, "v")
	wantKind(t, err, kind.Unavailable) // it may be going
	down.Store(false)
	_, err = m.Attach(ctx, imagemgmt.Block{Name: b}, "v")
	must(t, err)
	time.Sleep(600 * time.Millisecond)
	shown(b)
	// A writable one: its record stays until its owner calls again.
	layer := imagemgmt.Layer{Block: imagemgmt.Block{Name: b}, Path: filepath.Join(l.dir, "rw-1.qcow2")}
	down.Store(true)
	_, err = m.AttachWritable(ctx, layer, "rw-1")
	wantKind(t, err, kind.Unavailable)
	down.Store(false)
	l.wantUsers(b, "rw-1", "v")
	_, err = m.AttachWritable(ctx, layer, "rw-1")
	must(t, err)
	must(t, m.DeleteWritable(ctx, layer, "rw-1"))
	must(t, m.Detach(ctx, b, "v"))
	l.wantShown()
}

// lossy does what it is asked and loses the answer, or does nothing when it is to take
// away.
type lossy struct {
	present.Presenter
	lost *atomic.Bool
	err  error
}

func (p *lossy) Present(ctx context.Context, id string, source present.Source, readOnly bool) (present.Disk, error) {
	d, err := p.Presenter.Present(ctx, id, source, readOnly)
	if err == nil && p.lost.Load() {
		return present.Disk{}, p.err
	}
	return d, err
}

func (p *lossy) Withdraw(ctx context.Context, id string) error {
	if p.lost.Load() {
		return p.err
	}
	return p.Presenter.Withdraw(ctx, id)
}

func TestPrefetch(t *testing.T) {
	l := newLab(t)
	b := l.block(1)
	source := &slowDevice{size: 64 << 20, gate: make(chan struct{}, 1<<10)}
	o := l.options()
	o.Cached = func(imagemgmt.Block) (bdev.Device, error) { return source, nil }
	m, err := imagemgmt.New(o)
	must(t, err)
	l.manager = m
	open := func(n int) {
		for range n {
			source.gate <- struct{}{}
		}
	}
	wantKind(t, m.Prefetch(ctx, b, nil, nil), kind.NotFound)
	_, err = m.Attach(ctx, imagemgmt.Block{Name: b}, "u")
	must(t, err)
	wantKind(t, m.Prefetch(ctx, b, []imagemgmt.Range{{OffsetBytes: 64 << 20, LengthBytes: 1}}, nil), kind.Invalid)
	wantKind(t, m.Prefetch(ctx, b, []imagemgmt.Range{{OffsetBytes: -1, LengthBytes: 1}}, nil), kind.Invalid)

	open(1 << 9)
	var last int64
	must(t, m.Prefetch(ctx, b, []imagemgmt.Range{{OffsetBytes: 32 << 20, LengthBytes: 3<<20 + 512}, {OffsetBytes: 0, LengthBytes: 4096}}, func(n int64) {
		if n < last {
			t.Errorf("%d after %d", n, last)
		}
		last = n
	}))
	if want := int64(3<<20 + 512 + 4096); last != want || source.read.Load() != want {
		t.Fatalf("read %d, told %d, want %d", source.read.Load(), last, want)
	}
	if n := source.most.Load(); n > 4 {
		t.Fatalf("%d reads at once", n)
	}
	for len(source.gate) > 0 {
		<-source.gate
	}

	// The caller gives up; the last user goes; the manager stops.
	run := func(end func(cancel context.CancelFunc)) error {
		t.Helper()
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		done := make(chan error, 1)
		begin := source.begun.Load()
		go func() { done <- m.Prefetch(ctx, b, []imagemgmt.Range{{LengthBytes: 64 << 20}}, nil) }()
		for source.begun.Load() == begin {
			time.Sleep(time.Millisecond)
		}
		end(cancel)
		return <-done
	}
	source.closed.Store(make(chan struct{}))
	wantKind(t, run(func(cancel context.CancelFunc) { cancel() }), kind.Canceled)
	source.closed.Store(make(chan struct{}))
	wantKind(t, run(func(context.CancelFunc) { must(t, m.Detach(ctx, b, "u")) }), kind.Canceled)
	l.wantShown()
	_, err = m.Attach(ctx, imagemgmt.Block{Name: b}, "u")
	must(t, err)
	source.closed.Store(make(chan struct{}))
	wantKind(t, run(func(context.CancelFunc) { must(t, m.Close()) }), kind.Unavailable)

	// Attaches go first: while one is under way, nothing is read.
	m = l.start()
	must(t, m.Close())
	if m, err = imagemgmt.New(o); err != nil {
		t.Fatal(err)
	}
	l.manager = m
	c := l.block(3)
	enter, leave := make(chan struct{}), make(chan struct{})
	l.presenter.Hook(func(_ context.Context, op, id string) error {
		if op == "present" && id == c {
			close(enter)
			<-leave
		}
		return nil
	})
	attached := make(chan error, 1)
	go func() { _, err := m.Attach(ctx, imagemgmt.Block{Name: c}, "u"); attached <- err }()
	<-enter
	open(8)
	source.closed.Store(make(chan struct{}))
	before := source.begun.Load()
	fetched := make(chan error, 1)
	go func() { fetched <- m.Prefetch(ctx, b, []imagemgmt.Range{{LengthBytes: 4096}}, nil) }()
	time.Sleep(20 * time.Millisecond)
	if source.begun.Load() != before {
		t.Error("a prefetch reads while a disk is being shown")
	}
	close(leave)
	must(t, <-attached)
	must(t, <-fetched)
	l.presenter.Hook(nil)

	// Where nothing keeps what is read.
	must(t, m.Close())
	m = l.start()
	wantKind(t, m.Prefetch(ctx, b, nil, nil), kind.Unsupported)
}

// TestPrefetchedIsThere prefetches through the node's cache: what was asked for is read from
// the store once, what was not is not, and whoever reads it then needs no store.
func TestPrefetchedIsThere(t *testing.T) {
	l := newLab(t)
	b := l.block(1)
	options := cache.Options{Dir: filepath.Join(l.dir, "cache"), SizeBytes: 64 << 20, UnitBytes: 64 << 10, ReadAheadBytes: -1}
	c, err := cache.Open(options)
	must(t, err)
	var fetched atomic.Int64
	cached := func(imagemgmt.Block) (bdev.Device, error) {
		m := cache.Map{Domain: "rack-7", Runs: []cache.Run{{LengthBytes: blockBytes, Data: true, Owner: [16]byte{1}}}}
		base, err := l.open(present.Source{Kind: present.SourceLvol, Lvol: b}, true)
		if err != nil {
			return nil, err
		}
		return c.Device(&countingDevice{base, &fetched}, m)
	}
	o := l.options()
	o.Cached = cached
	m, err := imagemgmt.New(o)
	must(t, err)
	l.manager = m
	_, err = m.Attach(ctx, imagemgmt.Block{Name: b}, "u")
	must(t, err)
	ranges := []imagemgmt.Range{{OffsetBytes: 8 << 20, LengthBytes: 3 << 20}, {OffsetBytes: 0, LengthBytes: 64 << 10}}
	must(t, m.Prefetch(ctx, b, ranges, nil))
	if got, want := fetched.Load(), int64(3<<20+64<<10); got != want {
		t.Errorf("read %d bytes from the store, want %d", got, want)
	}
	// Closed, whatever was on its way is on the disk.
	must(t, c.Close())
	c, err = cache.Open(options)
	must(t, err)
	defer c.Close()
	d, err := cached(imagemgmt.Block{})
	must(t, err)
	defer d.Close()
	before := fetched.Load()
	for _, r := range ranges {
		if _, err := d.ReadAt(make([]byte, r.LengthBytes), r.OffsetBytes); err != nil {
			t.Fatal(err)
		}
	}
	if again := fetched.Load() - before; again != 0 {
		t.Errorf("%d bytes of what was prefetched are read from the store again", again)
	}
}

// countingDevice counts the bytes that are read.
type countingDevice struct {
	bdev.Device
	n *atomic.Int64
}

func (d *countingDevice) ReadAt(p []byte, off int64) (int, error) {
	n, err := d.Device.ReadAt(p, off)
	d.n.Add(int64(n))
	return n, err
}

// slowDevice answers one read for each value in gate, and fails those that wait when it is
// closed.
type slowDevice struct {
	bdev.Device
	size                     int64
	gate                     chan struct{}
	closed                   atomic.Value // chan struct{}
	begun, read, under, most atomic.Int64
}

func (d *slowDevice) SizeBytes() int64 { return d.size }

func (d *slowDevice) ReadAt(p []byte, _ int64) (int, error) {
	d.begun.Add(1)
	n := d.under.Add(1)
	defer d.under.Add(-1)
	for {
		most := d.most.Load()
		if n <= most || d.most.CompareAndSwap(most, n) {
			break
		}
	}
	closed, _ := d.closed.Load().(chan struct{})
	select {
	case <-d.gate:
		d.read.Add(int64(len(p)))
		return len(p), nil
	case <-closed:
		return 0, kind.Errorf(kind.Canceled, "closed")
	}
}

func (d *slowDevice) Close() error {
	if closed, ok := d.closed.Load().(chan struct{}); ok {
		close(closed)
	}
	return nil
}

func TestScratch(t *testing.T) {
	l := newLab(t)
	o := l.options()
	o.Own = "local"
	o.Scratch = func(_ context.Context, target string, size int64) (imagemgmt.Block, error) {
		return imagemgmt.Block{Target: target, Name: fmt.Sprint("scratch-", size)}, nil
	}
	m, err := imagemgmt.New(o)
	must(t, err)
	l.manager = m
	for target, want := range map[string]string{"local": "", "": "", "rack-7": "rack-7"} {
		if got, err := m.EnsureScratch(ctx, target, 1<<20); err != nil || got != (imagemgmt.Block{Target: want, Name: "scratch-1048576"}) {
			t.Errorf("%q: %+v, %v", target, got, err)
		}
	}
	for _, bad := range []int64{0, -1, 100} {
		_, err := m.EnsureScratch(ctx, "", bad)
		wantKind(t, err, kind.Invalid)
	}
	l.restart()
	_, err = l.manager.EnsureScratch(ctx, "", 1<<20)
	wantKind(t, err, kind.Unsupported)
}

func TestListIsInOrder(t *testing.T) {
	l := newLab(t)
	m := l.start()
	var want []string
	for i := range 20 {
		b := l.block(19 - i)
		want = append(want, b)
		if i%2 == 0 {
			_, err := m.Attach(ctx, imagemgmt.Block{Name: b}, "u")
			must(t, err)
		} else {
			_, err := m.AttachWritable(ctx, imagemgmt.Layer{Block: imagemgmt.Block{Name: b}, Path: l.qcow2(b)}, fmt.Sprintf("rw-%d", i))
			must(t, err)
		}
	}
	slices.Sort(want)
	list, err := m.List(ctx)
	must(t, err)
	var got []string
	for _, a := range list {
		got = append(got, a.Block)
		if len(a.Users) != 1 {
			t.Fatalf("%+v", a)
		}
	}
	if !slices.Equal(got, want) {
		t.Fatalf("got %q, want %q", got, want)
	}
}

func TestSecondManagerOnOneDatabaseIsRefused(t *testing.T) {
	l := newLab(t)
	l.start()
	_, err := imagemgmt.New(l.options())
	wantKind(t, err, kind.InUse)
}

// TestRandom runs the same random calls against the manager and against a model, from
// several goroutines that own their users, with restarts and reboots in between.
func TestRandom(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	l := newLab(t)
	m := l.start()
	var blocks []string
	for i := range 4 {
		blocks = append(blocks, l.block(i))
	}
	const workers = 6
	uses := make([]map[string]bool, workers) // by block: worker uses it
	for w := range uses {
		uses[w] = make(map[string]bool)
	}
	for round := range 12 {
		var wg sync.WaitGroup
		for w := range workers {
			rng := rand.New(rand.NewPCG(seed, uint64(round*workers+w)))
			wg.Go(func() {
				for range 40 {
					b, user := blocks[rng.IntN(len(blocks))], fmt.Sprintf("w%d", w)
					call := ctx
					if rng.IntN(8) == 0 {
						var cancel context.CancelFunc
						call, cancel = context.WithTimeout(ctx, time.Duration(rng.IntN(200))*time.Microsecond)
						defer cancel()
					}
					if rng.IntN(2) == 0 {
						_, err := m.Attach(call, imagemgmt.Block{Name: b}, user)
						if err == nil {
							uses[w][b] = true
						} else if call == ctx {
							t.Errorf("attach: %v", err)
						}
					} else if err := m.Detach(call, b, user); err == nil {
						uses[w][b] = false
					} else if call == ctx {
						t.Errorf("detach: %v", err)
					}
				}
			})
		}
		wg.Wait()
		if round%3 == 1 {
			m = l.restart()
		}
		if round%3 == 2 {
			must(t, m.Close())
			l.presenter.Reboot()
			m = l.start()
		}
		var shown []string
		for _, b := range blocks {
			var users []string
			for w := range workers {
				if uses[w][b] {
					users = append(users, fmt.Sprintf("w%d", w))
				}
			}
			if len(users) > 0 {
				shown = append(shown, b)
			}
			l.wantUsers(b, users...)
		}
		l.wantShown(shown...)
	}
}

func BenchmarkAttachDetach(b *testing.B) {
	l := newLab(b)
	m, name := l.start(), l.block(1)
	took := make([]time.Duration, 0, b.N)
	for b.Loop() {
		begin := time.Now()
		if _, err := m.Attach(ctx, imagemgmt.Block{Name: name}, "u"); err != nil {
			b.Fatal(err)
		}
		took = append(took, time.Since(begin))
		if err := m.Detach(ctx, name, "u"); err != nil {
			b.Fatal(err)
		}
	}
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)/2].Microseconds()), "attach-p50-us")
	b.ReportMetric(float64(took[len(took)*99/100].Microseconds()), "attach-p99-us")
}

// BenchmarkAttach50 is fifty containers of one image started at once.
func BenchmarkAttach50(b *testing.B) {
	l := newLab(b)
	m, name := l.start(), l.block(1)
	for b.Loop() {
		var wg sync.WaitGroup
		for i := range 50 {
			wg.Go(func() {
				if _, err := m.Attach(ctx, imagemgmt.Block{Name: name}, fmt.Sprint(i)); err != nil {
					b.Error(err)
				}
			})
		}
		wg.Wait()
		b.StopTimer()
		for i := range 50 {
			if err := m.Detach(ctx, name, fmt.Sprint(i)); err != nil {
				b.Fatal(err)
			}
		}
		b.StartTimer()
	}
}

func BenchmarkList1000(b *testing.B) {
	l := newLab(b)
	m := l.start()
	for i := range 1000 {
		if _, err := m.Attach(ctx, imagemgmt.Block{Name: l.block(i)}, "u"); err != nil {
			b.Fatal(err)
		}
	}
	for b.Loop() {
		if list, err := m.List(ctx); err != nil || len(list) != 1000 {
			b.Fatal(len(list), err)
		}
	}
}

// TestTargets: a block comes with who stores it, also after a restart.
func TestTargets(t *testing.T) {
	l := newLab(t)
	b, path := l.block(1), l.qcow2("rw")
	var mu sync.Mutex
	var released []imagemgmt.Block
	o := l.options()
	o.Own = "here"
	o.Released = func(b imagemgmt.Block) {
		mu.Lock()
		defer mu.Unlock()
		released = append(released, b)
	}
	start := func() *imagemgmt.Manager {
		t.Helper()
		m, err := imagemgmt.New(o)
		must(t, err)
		return m
	}
	m := start()
	far := imagemgmt.Block{Target: "rack-7", Name: b}
	d, err := m.Attach(ctx, far, "u")
	must(t, err)
	if d.Source.Target != "rack-7" {
		t.Fatalf("%+v", d)
	}
	w, err := m.AttachWritable(ctx, imagemgmt.Layer{Block: far, Path: path}, "rw-1")
	must(t, err)
	if w.Source.Target != "rack-7" {
		t.Fatalf("%+v", w)
	}
	_, err = m.AttachWritable(ctx, imagemgmt.Layer{Block: imagemgmt.Block{Target: "rack-8", Name: b}, Path: path}, "rw-1")
	wantKind(t, err, kind.Exists)
	// Who names another target for the same block gets the disk that is there.
	again, err := m.Attach(ctx, imagemgmt.Block{Target: "rack-8", Name: b}, "v")
	must(t, err)
	if again != d {
		t.Fatalf("%+v", again)
	}
	if m.Attached(b) || !m.Uses(far) || m.Uses(imagemgmt.Block{Target: "rack-8", Name: b}) {
		t.Fatal("in use is the wrong target's")
	}
	_, err = m.Attach(ctx, imagemgmt.Block{Target: "Rack 7", Name: b}, "u")
	wantKind(t, err, kind.Invalid)

	must(t, m.Close())
	l.presenter.Reboot()
	m = start()
	defer m.Close()
	a, err := m.Stat(ctx, b)
	must(t, err)
	if a.Disk.Source.Target != "rack-7" || len(a.Users) != 3 {
		t.Fatalf("%+v", a)
	}
	must(t, m.Detach(ctx, b, "u"))
	must(t, m.Detach(ctx, b, "v"))
	if !m.Uses(far) {
		t.Fatal("a block under a writable layer is in nobody's use")
	}
	must(t, m.DetachWritable(ctx, b, "rw-1"))
	if m.Uses(far) {
		t.Fatal("it is still in use")
	}
	mu.Lock()
	defer mu.Unlock()
	if len(released) == 0 || released[len(released)-1] != far {
		t.Fatalf("released were %+v", released)
	}
}

// TestOwnTarget: this machine's own store has a name, and needs none.
func TestOwnTarget(t *testing.T) {
	l := newLab(t)
	b := l.block(1)
	o := l.options()
	o.Own = "here"
	m, err := imagemgmt.New(o)
	must(t, err)
	defer m.Close()
	d, err := m.Attach(ctx, imagemgmt.Block{Target: "here", Name: b}, "u")
	must(t, err)
	again, err := m.Attach(ctx, imagemgmt.Block{Name: b}, "v")
	must(t, err)
	if d.Source.Target != "" || again != d || !m.Attached(b) || !m.Uses(imagemgmt.Block{Target: "here", Name: b}) {
		t.Fatalf("%+v, %+v", d, again)
	}
	must(t, m.Detach(ctx, b, "u"))
	must(t, m.Detach(ctx, b, "v"))
}

// TestLeftoverKeepsItsTarget: what a disk that nobody uses reads from is in use while it is
// shown, whoever comes to share it.
func TestLeftoverKeepsItsTarget(t *testing.T) {
	l := newLab(t)
	m, b := l.start(), l.block(1)
	far, other := imagemgmt.Block{Target: "rack-7", Name: b}, imagemgmt.Block{Target: "rack-8", Name: b}
	_, err := m.Attach(ctx, far, "u")
	must(t, err)
	l.presenter.SetBusy(b, true)
	wantKind(t, m.Detach(ctx, b, "u"), kind.InUse)
	d, err := m.Attach(ctx, other, "v")
	must(t, err)
	if d.Source.Target != far.Target || !m.Uses(far) || m.Uses(other) {
		t.Fatalf("%+v is shown, its target in use: %v, the other: %v", d.Source, m.Uses(far), m.Uses(other))
	}
	l.presenter.SetBusy(b, false)
	must(t, m.Detach(ctx, b, "v"))
	if m.Uses(far) {
		t.Fatal("it is still in use")
	}
}
