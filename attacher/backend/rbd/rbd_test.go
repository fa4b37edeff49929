//go:build ceph

package rbd_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync/atomic"
	"testing"
	"time"

	"github.com/thaw-project/thaw/attacher"
	"github.com/thaw-project/thaw/attacher/backend/backendtest"
	"github.com/thaw-project/thaw/attacher/backend/rbd"
	"github.com/thaw-project/thaw/e2e/ceph"
	"github.com/thaw-project/thaw/e2e/lab"
	"github.com/thaw-project/thaw/target/bdev"
)

const pool = "thaw"

// cluster is for all tests, nil when there is none.
var (
	cluster *ceph.Cluster
	stores  atomic.Int64
)

func TestMain(m *testing.M) {
	if childMain() {
		return
	}
	os.Exit(run(m))
}

func run(m *testing.M) int {
	if os.Getenv("THAW_CEPH") == "" {
		return m.Run()
	}
	l, err := lab.New()
	if err == nil {
		defer l.Close()
		ctx := context.Background()
		if cluster, err = ceph.Start(ctx, l, ceph.Options{Pools: []string{pool}, Auth: true}); err == nil {
			err = cluster.User(ctx, "thaw", pool)
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return m.Run()
}

// options are of a store of its own.
func options(t testing.TB) rbd.Options {
	t.Helper()
	if cluster == nil {
		t.Skip("needs a Ceph cluster: make test-ceph")
	}
	return rbd.Options{
		Pool: pool, Config: cluster.Config, User: "thaw",
		Prefix: fmt.Sprintf("t%d.", stores.Add(1)), Timeout: 60 * time.Second,
	}
}

func open(t testing.TB, o rbd.Options) *rbd.Backend {
	t.Helper()
	b, err := rbd.New(context.Background(), o)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// nodeDevice is a device with the connection that is its node's own.
type nodeDevice struct {
	bdev.Device
	o *rbd.Opener
}

func (d nodeDevice) Close() error { return errors.Join(d.Device.Close(), d.o.Close()) }

func openAsNode(o rbd.Options) func(context.Context, string, attacher.Exported) (bdev.Device, error) {
	return func(ctx context.Context, _ string, x attacher.Exported) (bdev.Device, error) {
		opener, err := rbd.NewOpener(ctx, o)
		if err != nil {
			return nil, err
		}
		d, err := opener.Open(ctx, *x.RBD, x.RBD.Snapshot != "")
		if err != nil {
			return nil, errors.Join(err, opener.Close())
		}
		return nodeDevice{d, opener}, nil
	}
}

// TestConformance runs the suite that every backend passes.
func TestConformance(t *testing.T) {
	backendtest.Run(t, func(t *testing.T) *backendtest.Fixture {
		o := options(t)
		f := &backendtest.Fixture{UnitBytes: 512, Open: openAsNode(o)}
		var b *rbd.Backend
		start := func(t *testing.T) {
			t.Helper()
			b = open(t, o)
			x, err := b.Exporter()
			if err != nil {
				t.Fatal(err)
			}
			f.Backend, f.Exporter = b, x
		}
		start(t)
		f.Restart = func(t *testing.T) {
			t.Helper()
			if err := b.Close(); err != nil {
				t.Error(err)
			}
			start(t)
		}
		t.Cleanup(func() {
			if err := b.Close(); err != nil {
				t.Error(err)
			}
		})
		return f
	})
}
