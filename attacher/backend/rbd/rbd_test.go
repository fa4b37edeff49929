//go:build ceph

package rbd_test

import (
	"bytes"
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
	"github.com/thaw-project/thaw/kind"
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
			err = cluster.User(ctx, "thaw", "profile rbd pool="+pool)
		}
		if err == nil {
			err = cluster.User(ctx, "node", "profile rbd-read-only pool="+pool)
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

// TestReadOnlyNode shows what docs/ceph.md says of a node's capabilities: it reads blocks
// and can change nothing.
func TestReadOnlyNode(t *testing.T) {
	o := options(t)
	prepare(t, o)
	b := open(t, o)
	defer b.Close()
	if _, err := b.SetReadOnly("clone", true); err != nil {
		t.Fatal(err)
	}
	x, err := b.Exporter()
	if err != nil {
		t.Fatal(err)
	}
	told, err := x.Export(attacher.Export{Node: "n", Block: "clone", NSID: 1}, "")
	if err != nil {
		t.Fatal(err)
	}
	node := o
	node.User = "node"
	opener, err := rbd.NewOpener(t.Context(), node)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := opener.Close(); err != nil {
			t.Error(err)
		}
	}()
	d, err := opener.Open(t.Context(), *told.RBD, true)
	if err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 4<<20)
	if n, err := d.ReadAt(got, 0); n != len(got) || !bytes.Equal(got, ones(4<<20)) {
		t.Errorf("read %d bytes, %v", n, err)
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	image := *told.RBD
	image.Snapshot = ""
	if d, err := opener.Open(t.Context(), image, false); err == nil {
		if _, err := d.WriteAt(ones(512), 0); err == nil {
			t.Error("a node without the right to write wrote to an image")
		}
		if err := d.Close(); err != nil {
			t.Log(err)
		}
	}
	other := *told.RBD
	other.Cluster = "00000000-0000-0000-0000-000000000000"
	if _, err := opener.Open(t.Context(), other, true); !errors.Is(err, kind.Invalid) {
		t.Errorf("open an image of another cluster: %v", err)
	}
	none := *told.RBD
	none.Image += "x"
	if _, err := opener.Open(t.Context(), none, true); !errors.Is(err, kind.NotFound) {
		t.Errorf("open an image that is not there: %v", err)
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
