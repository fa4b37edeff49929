package snapshotter

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/contrib/snapshotservice"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/proxy"
	"github.com/containerd/containerd/v2/core/snapshots/testsuite"
	"github.com/containerd/containerd/v2/pkg/filters"
	"github.com/containerd/errdefs"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

// The suite calls itself overlayfs so that it leaves out what overlayfs cannot do
// and containerd's own does not either: renaming a directory of a lower layer.
const suiteName = "overlayfs"

// TestSuite runs containerd's conformance suite on ordinary layers.
func TestSuite(t *testing.T) {
	requireKernel(t)
	testsuite.SnapshotterSuite(t, suiteName, func(_ context.Context, root string) (snapshots.Snapshotter, func() error, error) {
		l := suiteLab(t, root)
		return l.s, l.tearDown, nil
	})
}

// TestSuiteProxy runs it the way containerd talks to a proxy plugin.
func TestSuiteProxy(t *testing.T) {
	requireKernel(t)
	testsuite.SnapshotterSuite(t, suiteName, func(_ context.Context, root string) (snapshots.Snapshotter, func() error, error) {
		l := suiteLab(t, root)
		sn, stop := serve(t, l.s, root)
		return sn, func() error { return errors.Join(stop(), l.tearDown()) }, nil
	})
}

// TestSuiteConverted runs it with every layer on top of a converted image.
func TestSuiteConverted(t *testing.T) {
	requireKernel(t)
	for _, v := range variants {
		t.Run(v.name, func(t *testing.T) {
			testsuite.SnapshotterSuite(t, suiteName, func(ctx context.Context, root string) (snapshots.Snapshotter, func() error, error) {
				l := suiteLab(t, root)
				sn := l.onConverted(l.s, v.name)
				return sn, l.tearDown, nil
			})
		})
	}
}

// TestSuiteConvertedProxy runs both at once, in the mode with the most parts.
func TestSuiteConvertedProxy(t *testing.T) {
	requireKernel(t)
	testsuite.SnapshotterSuite(t, suiteName, func(_ context.Context, root string) (snapshots.Snapshotter, func() error, error) {
		l := suiteLab(t, root)
		client, stop := serve(t, l.s, root)
		return l.onConverted(client, "overlaybd-ext4"), func() error { return errors.Join(stop(), l.tearDown()) }, nil
	})
}

func suiteLab(t *testing.T, root string) *lab {
	l := &lab{t: t, dir: root}
	l.open()
	return l
}

// serve puts a Unix socket with containerd's service and client in front of sn.
func serve(t *testing.T, sn snapshots.Snapshotter, dir string) (snapshots.Snapshotter, func() error) {
	socket := filepath.Join(dir, "s")
	listener, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer()
	snapshotsapi.RegisterSnapshotsServer(server, snapshotservice.FromSnapshotter(sn))
	done := make(chan error, 1)
	go func() { done <- server.Serve(listener) }()
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	return proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(conn), "thaw"), func() error {
		err := conn.Close()
		server.Stop()
		return errors.Join(err, <-done)
	}
}

// onConverted pulls a converted image whose second layer deletes all of the first,
// and gives back a snapshotter on which it takes the place of the empty parent.
func (l *lab) onConverted(sn snapshots.Snapshotter, variant string) snapshots.Snapshotter {
	l.t.Helper()
	for _, v := range variants {
		if v.name != variant {
			continue
		}
		im := l.addImage("base", v.mode, v.filesystem,
			tree{"etc/hosts": "localhost", "bin": "sh", "foo": "of the base", "lib/hidden": "x"},
			tree{"etc": whiteout, "bin": whiteout, "foo": whiteout, "lib": whiteout})
		l.pull(im)
		return &rebased{Snapshotter: sn, base: im.top(), hidden: im.chainIDs}
	}
	l.t.Fatalf("no variant %s", variant)
	return nil
}

// rebased makes a snapshotter believe that base is the bottom of the world.
type rebased struct {
	snapshots.Snapshotter
	base   string
	hidden []string
}

func (r *rebased) down(parent string) string {
	if parent == "" {
		return r.base
	}
	return parent
}

func (r *rebased) up(info snapshots.Info) snapshots.Info {
	if info.Parent == r.base {
		info.Parent = ""
	}
	return info
}

func (r *rebased) Prepare(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	return r.Snapshotter.Prepare(ctx, key, r.down(parent), opts...)
}

func (r *rebased) View(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	return r.Snapshotter.View(ctx, key, r.down(parent), opts...)
}

func (r *rebased) Stat(ctx context.Context, key string) (snapshots.Info, error) {
	info, err := r.Snapshotter.Stat(ctx, key)
	return r.up(info), err
}

func (r *rebased) Update(ctx context.Context, info snapshots.Info, fieldpaths ...string) (snapshots.Info, error) {
	info, err := r.Snapshotter.Update(ctx, info, fieldpaths...)
	return r.up(info), err
}

func (r *rebased) Walk(ctx context.Context, fn snapshots.WalkFunc, fs ...string) error {
	filter, err := filters.ParseAll(fs...)
	if err != nil {
		return err
	}
	return r.Snapshotter.Walk(ctx, func(ctx context.Context, info snapshots.Info) error {
		for _, h := range r.hidden {
			if info.Name == h {
				return nil
			}
		}
		info = r.up(info)
		if !filter.Match(infoAdaptor(info)) {
			return nil
		}
		return fn(ctx, info)
	})
}

func infoAdaptor(info snapshots.Info) filters.Adaptor {
	return filters.AdapterFunc(func(path []string) (string, bool) {
		switch path[0] {
		case "kind":
			return strings.ToLower(info.Kind.String()), true
		case "name":
			return info.Name, true
		case "parent":
			return info.Parent, true
		case "labels":
			v, ok := info.Labels[strings.Join(path[1:], ".")]
			return v, ok
		}
		return "", false
	})
}

// TestCommitMounted: what a container still writes to is not committed.
func TestCommitMounted(t *testing.T) {
	l := newLab(t)
	im := l.addImage("base", variants[3].mode, variants[3].filesystem, tree{"a": "1"})
	l.pull(im)
	mounts := must(l.s.Prepare(t.Context(), "c", im.top()))(t)
	withMounts(t, mounts, func(string) {
		if err := l.s.Commit(t.Context(), "n", "c"); !errdefs.IsFailedPrecondition(err) {
			t.Errorf("commit of a mounted snapshot: got error %v, want failed precondition", err)
		}
	})
	withMounts(t, must(l.s.Mounts(t.Context(), "c"))(t), func(root string) {
		if err := os.WriteFile(filepath.Join(root, "b"), []byte("2"), 0o600); err != nil {
			t.Error(err)
		}
	})
	if err := l.s.Commit(t.Context(), "n", "c"); err != nil {
		t.Fatal(err)
	}
	withMounts(t, must(l.s.View(t.Context(), "v", "n"))(t), func(root string) { expect(t, root, tree{"a": "1", "b": "2"}) })
}
