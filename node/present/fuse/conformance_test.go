package fuse

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/thaw-project/thaw/keeper"
	"github.com/thaw-project/thaw/node/present/presenttest"
)

// subject is the presenter with its keeper.
var subject = presenttest.Subject{
	Serve: func(dir string) (presenttest.Served, error) {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, err
		}
		socket := filepath.Join(dir, "keeper.sock")
		k, err := keeper.Ensure(context.Background(), keeper.Options{Socket: socket, Command: []string{os.Args[0], keeperArg, socket}})
		if err != nil {
			return nil, err
		}
		p, err := New(Options{Dir: filepath.Join(dir, "dev"), StatePath: filepath.Join(dir, "fuse.json"), Keeper: k, Open: presenttest.OpenFile})
		if err != nil {
			return nil, err
		}
		return kept{p, k}, nil
	},
	Left: func(t testing.TB, dir string) {
		if left := mountsBelow(t, dir); len(left) > 0 {
			t.Errorf("mounts left: %v", left)
		}
	},
	Abandon: func(dir string) {
		raw, _ := os.ReadFile("/proc/self/mountinfo")
		for line := range strings.Lines(string(raw)) {
			if f := strings.Fields(line); strings.HasPrefix(f[4], dir+"/") {
				unix.Unmount(f[4], unix.MNT_FORCE|unix.MNT_DETACH)
			}
		}
		socket := filepath.Join(dir, "keeper.sock")
		if k, err := keeper.Ensure(context.Background(), keeper.Options{Socket: socket, Command: []string{os.Args[0], keeperArg, socket}}); err == nil {
			k.Exit(context.Background())
		}
	},
}

type kept struct {
	*Presenter
	keeper *keeper.Client
}

func (k kept) Close() error { return errors.Join(k.Presenter.Close(), k.keeper.Close()) }

func (k kept) Teardown(ctx context.Context) error {
	if err := k.Presenter.Teardown(ctx); err != nil {
		return err
	}
	return k.keeper.Exit(ctx)
}

func TestConformance(t *testing.T) {
	needFUSE(t)
	presenttest.Conformance(t, subject)
}

func BenchmarkPresented(b *testing.B) {
	needFUSE(b)
	presenttest.Benchmark(b, subject)
}
