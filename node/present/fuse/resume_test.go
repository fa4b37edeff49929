package fuse

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sys/unix"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/node/present"
	"github.com/thaw-project/thaw/target/bdev"
)

// TestCloseAndTakeOver ends a presenter in an orderly way while files are open;
// the next one serves them.
func TestCloseAndTakeOver(t *testing.T) {
	needFUSE(t)
	pl := newPlace(t)
	k := pl.keeper(t)
	defer pl.endKeeper(t, k)
	ctx := context.Background()
	p := pl.serveHere(t, pl.options(t, k))
	source := pl.file(t, "disk", 4<<20)
	want, _ := os.ReadFile(source.Path)
	d := mustPresent(t, p, "disk", source, false)
	f, err := os.OpenFile(d.Path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for i := range 5 {
		if err := p.Close(); err != nil {
			t.Fatal(err)
		}
		if err := p.Close(); err != nil {
			t.Fatal(err)
		}
		// A read that starts while nobody serves waits for the next one.
		got := make([]byte, 1<<20)
		read := make(chan error, 1)
		go func() {
			_, err := f.ReadAt(got, 512<<10)
			read <- err
		}()
		select {
		case err := <-read:
			t.Fatalf("read while nobody serves: %v", err)
		case <-time.After(20 * time.Millisecond):
		}
		if p, err = New(pl.options(t, k)); err != nil {
			t.Fatal(err)
		}
		if err := <-read; err != nil || !bytes.Equal(got, want[512<<10:][:1<<20]) {
			t.Fatalf("read across a change of process: %v", err)
		}
		if list, err := p.List(ctx); err != nil || len(list) != 1 || list[0] != d {
			t.Fatalf("round %d: list %+v, %v", i, list, err)
		}
		if again := mustPresent(t, p, "disk", source, false); again != d {
			t.Fatalf("present again: %+v", again)
		}
	}
	wantKind(t, p.Withdraw(ctx, "disk"), kind.InUse)
	f.Close()
	if err := p.Withdraw(ctx, "disk"); err != nil {
		t.Fatal(err)
	}
	second := mustPresent(t, p, "second", source, true)
	if got, err := os.ReadFile(second.Path); err != nil || !bytes.Equal(got, want) {
		t.Fatalf("%d bytes, %v", len(got), err)
	}
	if err := p.Teardown(ctx); err != nil {
		t.Fatal(err)
	}
}

func TestOneServesAtATime(t *testing.T) {
	needFUSE(t)
	pl := newPlace(t)
	k := pl.keeper(t)
	defer pl.endKeeper(t, k)
	p := pl.start(t, k)
	const wait = 300 * time.Millisecond
	start := time.Now()
	_, err := newPresenter(pl.options(t, k), wait)
	wantKind(t, err, kind.InUse)
	if waited := time.Since(start); waited < wait {
		t.Errorf("gave up after %v", waited)
	}
	mustPresent(t, p, "still-served", pl.file(t, "f", 4096), true)
	if err := p.Teardown(context.Background()); err != nil {
		t.Fatal(err)
	}
}

// TestLostMountIsMadeAnew kills server and keeper at once: the connection is lost,
// and the next server starts over instead of failing.
func TestLostMountIsMadeAnew(t *testing.T) {
	needFUSE(t)
	pl := newPlace(t)
	source := pl.file(t, "disk", 1<<20)
	pl.job(t, nil, present.Disk{ID: "disk", Source: source, ReadOnly: true})
	v := pl.victim(t)
	v.wait(t, "ready")
	f, err := os.Open(filepath.Join(pl.dir, "disk"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	k := pl.keeper(t)
	pid := k.PID()
	k.Close()
	unix.Kill(v.cmd.Process.Pid, unix.SIGSTOP) // so that it cannot start another
	unix.Kill(pid, unix.SIGKILL)
	v.kill()
	waitGone(t, pid)
	uncache(f)
	if _, err := f.ReadAt(make([]byte, 4096), 0); err == nil {
		t.Error("somebody still serves")
	}

	k = pl.keeper(t)
	defer pl.endKeeper(t, k)
	p := pl.start(t, k)
	if list, err := p.List(context.Background()); err != nil || len(list) != 0 {
		t.Fatalf("a new mount has %+v, %v", list, err)
	}
	d := mustPresent(t, p, "disk", source, true)
	if got, err := os.ReadFile(d.Path); err != nil || len(got) != 1<<20 {
		t.Fatalf("%d bytes, %v", len(got), err)
	}
	if err := p.Teardown(context.Background()); err != nil {
		t.Fatal(err)
	}
}

// TestKillWhileStarting kills processes at all moments of their start, so that the
// next one finds every possible half of a mount.
func TestKillWhileStarting(t *testing.T) {
	needFUSE(t)
	rnd := seeded(t)
	pl := newPlace(t)
	source := pl.file(t, "disk", 64<<10)
	want, _ := os.ReadFile(source.Path)
	pl.job(t, nil, present.Disk{ID: "disk", Source: source, ReadOnly: true})
	for round := range *killRounds {
		for range rnd.IntN(4) {
			v := pl.victim(t)
			time.Sleep(time.Duration(rnd.Int64N(int64(25 * time.Millisecond))))
			v.kill()
		}
		v := pl.victim(t)
		v.wait(t, "ready")
		got, err := os.ReadFile(filepath.Join(pl.dir, "disk"))
		if err != nil || !bytes.Equal(got, want) {
			t.Fatalf("round %d: %d bytes, %v", round, len(got), err)
		}
		if m := mountsBelow(t, pl.base); len(m) != 1 {
			t.Fatalf("round %d: mounts %v", round, m)
		}
		io.WriteString(v.in, "end\n")
		v.wait(t, "ended")
		v.cmd.Wait()
		if m := mountsBelow(t, pl.base); len(m) != 0 {
			t.Fatalf("round %d: mounts %v", round, m)
		}
	}
}

func TestDamagedState(t *testing.T) {
	needFUSE(t)
	pl := newPlace(t)
	k := pl.keeper(t)
	defer pl.endKeeper(t, k)
	p := pl.start(t, k)
	mustPresent(t, p, "disk", pl.file(t, "disk", 4096), true)
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(pl.state, []byte(`{"version":99}`), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := New(pl.options(t, k))
	wantKind(t, err, kind.Unsupported)
	if err := os.WriteFile(pl.state, []byte(`{"version":`), 0o600); err != nil {
		t.Fatal(err)
	}
	if p, err = New(pl.options(t, k)); err != nil {
		t.Fatalf("a damaged state must not keep us from starting: %v", err)
	}
	if names, err := k.List(context.Background()); err != nil || len(names) != 1 {
		t.Errorf("the keeper holds %v, %v", names, err)
	}
	if err := p.Teardown(context.Background()); err != nil {
		t.Fatal(err)
	}
}

func TestForeignMountPoint(t *testing.T) {
	needFUSE(t)
	pl := newPlace(t)
	if err := os.Mkdir(pl.dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("x", pl.dir, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(pl.dir, 0)
	_, err := New(pl.options(t, nil))
	wantKind(t, err, kind.Exists)
}

// moody is a device, and an opener, that fail when told to.
type moody struct {
	bdev.Device
	fail *atomic.Pointer[error]
}

func (m moody) err() error {
	if e := m.fail.Load(); e != nil {
		return *e
	}
	return nil
}

func (m moody) ReadAt(b []byte, off int64) (int, error) {
	if err := m.err(); err != nil {
		return 0, err
	}
	return m.Device.ReadAt(b, off)
}

func (m moody) WriteAt(b []byte, off int64) (int, error) {
	if err := m.err(); err != nil {
		return 0, err
	}
	return m.Device.WriteAt(b, off)
}

func (m moody) Flush() error {
	if err := m.err(); err != nil {
		return err
	}
	return m.Device.Flush()
}

func TestErrorsOfTheDevice(t *testing.T) {
	needFUSE(t)
	pl := newPlace(t)
	k := pl.keeper(t)
	defer pl.endKeeper(t, k)
	ctx := context.Background()
	var device, opening atomic.Pointer[error]
	options := pl.options(t, k)
	registry := prometheus.NewRegistry()
	options.Registerer = registry
	options.Open = func(source present.Source, readOnly bool) (bdev.Device, error) {
		if source.Lvol == "moody" {
			if e := opening.Load(); e != nil {
				return nil, *e
			}
		}
		d, err := openFile(source, readOnly)
		if source.Lvol == "moody" && err == nil {
			d = moody{d, &device}
		}
		return d, err
	}
	p := pl.serveHere(t, options)
	good, bad := pl.file(t, "good", 1<<20), pl.file(t, "moody", 1<<20)
	dg, db := mustPresent(t, p, "good", good, true), mustPresent(t, p, "bad", bad, false)
	f, err := os.OpenFile(db.Path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, 8192)
	for k, want := range map[kind.Kind]syscall.Errno{
		kind.NoSpace: unix.ENOSPC, kind.Corrupt: unix.EIO, kind.Unavailable: unix.EIO, kind.IO: unix.EIO,
		kind.NotFound: unix.EIO, kind.ReadOnly: unix.EROFS, "": unix.EIO,
	} {
		err := kind.Errorf(k, "told to")
		device.Store(&err)
		if _, err := f.WriteAt(b, 0); !errors.Is(err, want) {
			t.Errorf("write, device says %q: %v, want %v", k, err, want)
		}
		if _, err := f.ReadAt(b, 0); !errors.Is(err, want) {
			t.Errorf("read, device says %q: %v, want %v", k, err, want)
		}
		if err := f.Sync(); !errors.Is(err, want) {
			t.Errorf("sync, device says %q: %v, want %v", k, err, want)
		}
	}
	device.Store(nil)
	if _, err := f.ReadAt(b, 0); err != nil {
		t.Errorf("after the device recovered: %v", err)
	}

	// After a take-over the opener fails: that disk has errors, the other works, and
	// the first recovers by itself.
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	gone := errors.New("gone")
	opening.Store(&gone)
	if p, err = New(options); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if _, err := f.ReadAt(b, 0); !errors.Is(err, unix.EIO) {
			t.Errorf("read of a disk that cannot be opened: %v", err)
		}
	}
	if got, err := os.ReadFile(dg.Path); err != nil || len(got) != 1<<20 {
		t.Errorf("the other disk: %d bytes, %v", len(got), err)
	}
	opening.Store(nil)
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		if _, err := f.ReadAt(b, 0); err == nil {
			break
		} else if time.Now().After(deadline) {
			t.Fatalf("it does not recover: %v", err)
		}
	}

	// One that has another size now is not what the kernel knows.
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(bad.Path, 512<<10); err != nil {
		t.Fatal(err)
	}
	if p, err = New(options); err != nil {
		t.Fatal(err)
	}
	if _, err := f.ReadAt(b, 0); !errors.Is(err, unix.EIO) {
		t.Errorf("read of a disk that shrank: %v", err)
	}

	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	seen := make(map[string]float64)
	for _, f := range families {
		for _, m := range f.Metric {
			name := f.GetName()
			for _, l := range m.Label {
				name += " " + l.GetValue()
			}
			seen[name] = m.GetCounter().GetValue() + float64(m.GetHistogram().GetSampleCount())
		}
	}
	for _, name := range []string{"thaw_fuse_requests_total read", "thaw_fuse_errors_total read", "thaw_fuse_request_seconds read"} {
		if seen[name] == 0 {
			t.Errorf("metric %s is missing: %v", name, seen)
		}
	}
	f.Close()
	if err := p.Withdraw(ctx, "bad"); err == nil {
		t.Error("the flush of a device that cannot be opened succeeded")
	}
	if err := p.Teardown(ctx); err != nil {
		t.Fatal(err)
	}
}

// TestManyAtOnce presents, reads and withdraws many disks at the same time.
func TestManyAtOnce(t *testing.T) {
	needFUSE(t)
	pl := newPlace(t)
	k := pl.keeper(t)
	defer pl.endKeeper(t, k)
	p := pl.start(t, k)
	ctx := context.Background()
	source := pl.file(t, "f", 256<<10)
	want, _ := os.ReadFile(source.Path)
	var wg sync.WaitGroup
	for i := range 32 {
		wg.Go(func() {
			id := fmt.Sprintf("disk-%d", i)
			for range 5 {
				d, err := p.Present(ctx, id, source, true)
				if err != nil {
					t.Error(err)
					return
				}
				if got, err := os.ReadFile(d.Path); err != nil || !bytes.Equal(got, want) {
					t.Errorf("%s: %d bytes, %v", id, len(got), err)
				}
				if _, err := os.ReadDir(pl.dir); err != nil {
					t.Error(err)
				}
				if err := p.Withdraw(ctx, id); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if n := p.conn.workers.Load(); n > int32(p.options.Workers) {
		t.Errorf("%d workers", n)
	}
	if err := p.Teardown(ctx); err != nil {
		t.Fatal(err)
	}
}
