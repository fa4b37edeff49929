package fabrics

import (
	"bytes"
	"context"
	"crypto/rand"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/thaw-project/thaw/node/present"
)

// kernelPresenter is one on the real kernel, for the store that the environment names.
func kernelPresenter(t *testing.T, timeouts Timeouts) *Presenter {
	t.Helper()
	s := envStore()
	p, err := New(context.Background(), Options{
		StatePath: filepath.Join(t.TempDir(), "fabrics.json"), Timeouts: timeouts,
		// The socket's path is that of the target of now.
		Attach: func(ctx context.Context, target, block string) (Export, error) {
			return envStore().Attach(ctx, target, block)
		},
		Detach: func(ctx context.Context, target, block string) error { return envStore().Detach(ctx, target, block) },
	})
	if err != nil {
		t.Fatalf("%T: %v", s, err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			subject.Abandon("")
		}
		p.Close()
	})
	return p
}

func image(t *testing.T) (string, []byte) {
	t.Helper()
	data := make([]byte, 4<<20)
	rand.Read(data)
	path := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	return path, data
}

// readAll reads a disk past the page cache.
func readAll(path string, n int) ([]byte, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", path, err)
	}
	defer unix.Close(fd)
	unix.Fadvise(fd, 0, 0, unix.FADV_DONTNEED)
	b := make([]byte, n)
	for done := 0; done < n; {
		m, err := unix.Pread(fd, b[done:], int64(done))
		if err == unix.EINTR {
			continue
		}
		if err != nil || m == 0 {
			return nil, fmt.Errorf("read %s at %d: %d bytes, %w", path, done, m, err)
		}
		done += m
	}
	return b, nil
}

func until(t *testing.T, what string, cond func() bool) {
	t.Helper()
	for deadline := time.Now().Add(2 * time.Minute); !cond(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not in two minutes", what)
		}
	}
}

// TestTargetRestarts kills the target under readers and starts another: they see a pause.
func TestTargetRestarts(t *testing.T) {
	needKernel(t, TransportTCP)
	ctx := context.Background()
	path, data := image(t)
	kill := startTarget(t)
	p := kernelPresenter(t, Timeouts{KeepAlive: 5 * time.Second, ReconnectDelay: time.Second})
	d, err := p.Present(ctx, "d", present.Source{Kind: present.SourceLvol, Lvol: path, Target: "store"}, true)
	if err != nil {
		t.Fatal(err)
	}
	until(t, "both portals are connected", func() bool {
		list, _ := controllers(sysfs)
		return len(list) == 2 && list[0].State == "live" && list[1].State == "live"
	})
	stop := make(chan struct{})
	var reader sync.WaitGroup
	reads, failed := make(chan struct{}, 1000), make(chan error, 1)
	reader.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			if got, err := readAll(d.Path, len(data)); err != nil || !bytes.Equal(got, data) {
				failed <- fmt.Errorf("%w, or other content", err)
				return
			}
			select {
			case reads <- struct{}{}:
			default:
			}
		}
	})
	next := func() {
		t.Helper()
		for len(reads) > 0 {
			<-reads
		}
		select {
		case <-reads:
		case err := <-failed:
			t.Fatal(err)
		case <-time.After(2 * time.Minute):
			t.Fatal("no read in two minutes")
		}
	}
	for range 2 {
		next()
		kill()
		kill = startTarget(t, path)
		next()
	}
	close(stop)
	reader.Wait()
	if again, err := p.Present(ctx, "d", d.Source, true); err != nil || again != d {
		t.Errorf("the same again: %+v, %v; was %+v", again, err, d)
	}
	if err := p.Teardown(ctx); err != nil {
		t.Error(err)
	}
	subject.Left(t, "")
}

// TestTargetLost has the kernel give up a target that stays away. It is connected anew when
// it is back, and the disk is there again.
func TestTargetLost(t *testing.T) {
	needKernel(t, TransportTCP)
	ctx := context.Background()
	path, data := image(t)
	kill := startTarget(t)
	p := kernelPresenter(t, Timeouts{ControllerLoss: 3 * time.Second, KeepAlive: 2 * time.Second, ReconnectDelay: time.Second})
	d, err := p.Present(ctx, "d", present.Source{Kind: present.SourceLvol, Lvol: path, Target: "store"}, true)
	if err != nil {
		t.Fatal(err)
	}
	kill()
	until(t, "the kernel gives up", func() bool {
		list, err := p.List(ctx)
		return err == nil && len(list) == 1 && list[0].Path == ""
	})
	kill = startTarget(t, path)
	defer kill()
	until(t, "the disk is back without anybody asking", func() bool {
		list, err := p.List(ctx)
		return err == nil && list[0].Path != ""
	})
	again, err := p.Present(ctx, "d", d.Source, true)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := readAll(again.Path, len(data)); err != nil || !bytes.Equal(got, data) {
		t.Errorf("%v, or other content", err)
	}
	if err := p.Teardown(ctx); err != nil {
		t.Error(err)
	}
	subject.Left(t, "")
}
