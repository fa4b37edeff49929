package attacher_test

import (
	"context"
	"fmt"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"

	"github.com/opencontainers/go-digest"

	attacherv1 "github.com/thaw-project/thaw/api/attacher/v1"
	"github.com/thaw-project/thaw/attacher"
	"github.com/thaw-project/thaw/attacher/rpc"
	"github.com/thaw-project/thaw/image/block"
	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/lvol"
	"github.com/thaw-project/thaw/node/present"
	"github.com/thaw-project/thaw/node/present/presenttest"
	"github.com/thaw-project/thaw/target/bdev"
)

const size = 64 << 20

var ctx = context.Background()

// lab is a real lvol store, a presenter that outlives attachers, one attacher at a
// time, and a client of it: in the process, or through a socket.
type lab struct {
	testing.TB
	dir       string
	store     *lvol.Store
	presenter *presenttest.Presenter
	attacher  *attacher.Attacher
	attacherv1.AttacherClient
	socket bool
	grace  time.Duration
	server *grpc.Server
	conn   *grpc.ClientConn
	served sync.WaitGroup

	mu       sync.Mutex
	attached map[string]bool // guarded by mu: what nodes have attached
}

func newLab(t testing.TB, socket bool) *lab {
	t.Helper()
	l := &lab{TB: t, dir: t.TempDir(), socket: socket, grace: time.Hour, attached: make(map[string]bool)}
	pool := filepath.Join(l.dir, "pool")
	must(t, lvol.Create(lvol.CreateOptions{Dir: pool, CapacityBytes: 1 << 30}))
	var err error
	l.store, err = lvol.Open(lvol.Options{Dir: pool})
	must(t, err)
	l.presenter = presenttest.New(func(source present.Source, readOnly bool) (bdev.Device, error) {
		d, err := l.store.OpenLvol(source.Lvol, readOnly)
		if err != nil {
			return nil, err
		}
		return d, nil
	})
	l.start()
	t.Cleanup(func() {
		l.stop()
		l.presenter.Reboot()
		if err := l.store.Close(); err != nil {
			t.Error(err)
		}
	})
	return l
}

func (l *lab) options() attacher.Options {
	return attacher.Options{
		Lvols: l.store, Presenter: l.presenter, DBPath: filepath.Join(l.dir, "attacher.db"), Target: "here", HoldGrace: l.grace,
		Attached: func(block string) bool {
			l.mu.Lock()
			defer l.mu.Unlock()
			return l.attached[block]
		},
		Sync: func(context.Context, string) error { return nil }, // nothing is cached: there is no kernel
	}
}

func (l *lab) start() {
	l.Helper()
	var err error
	l.attacher, err = attacher.New(l.options())
	must(l, err)
	if !l.socket {
		l.AttacherClient = l.attacher.Client()
		return
	}
	listener, err := net.Listen("unix", filepath.Join(l.dir, "thaw.sock"))
	must(l, err)
	l.server = attacher.NewServer(l.attacher)
	server := l.server
	l.served.Go(func() { server.Serve(listener) })
	l.conn, err = rpc.Dial(filepath.Join(l.dir, "thaw.sock"))
	must(l, err)
	l.AttacherClient = attacherv1.NewAttacherClient(l.conn)
}

func (l *lab) stop() {
	l.Helper()
	l.attacher.Stop()
	if l.server != nil {
		l.conn.Close()
		l.server.Stop()
		l.served.Wait()
	}
	must(l, l.attacher.Close())
}

func (l *lab) restart() {
	l.Helper()
	l.stop()
	l.start()
}

func (l *lab) setAttached(block string, attached bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.attached[block] = attached
}

// hold holds owner until the returned function is called, as a converter's death
// would: it does not wait for what the attacher does then.
func (l *lab) hold(owner string) (end func()) {
	l.Helper()
	c, cancel := context.WithCancel(ctx)
	s, err := l.Hold(c, &attacherv1.HoldRequest{Owner: owner})
	if err == nil {
		_, err = s.Recv()
	}
	if err != nil {
		cancel()
		l.Fatalf("hold %s: %v", owner, err)
	}
	l.Cleanup(cancel)
	return func() {
		cancel()
		s.Recv()
	}
}

func (l *lab) create(name, owner string) {
	l.Helper()
	_, err := l.CreateLvol(ctx, &attacherv1.CreateLvolRequest{Name: name, SizeBytes: size, Owner: owner})
	must(l, err)
}

func (l *lab) names() []string {
	l.Helper()
	r, err := l.ListLvols(ctx, &attacherv1.ListLvolsRequest{})
	must(l, err)
	var out []string
	for _, v := range r.GetLvols() {
		out = append(out, v.GetName())
	}
	return out
}

func (l *lab) wantNames(want ...string) {
	l.Helper()
	slices.Sort(want)
	if got := l.names(); !slices.Equal(got, want) {
		l.Fatalf("lvols %q, want %q", got, want)
	}
}

// eventually waits for the attacher's own goroutines.
func (l *lab) eventually(what string, is func() bool) {
	l.Helper()
	for deadline := time.Now().Add(10 * time.Second); !is(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			l.Fatalf("%s did not come; lvols %q, disks %q", what, l.names(), l.disks())
		}
	}
}

func (l *lab) eventuallyNames(want ...string) {
	l.Helper()
	slices.Sort(want)
	l.eventually(fmt.Sprintf("lvols %q", want), func() bool { return slices.Equal(l.names(), want) })
}

func (l *lab) disks() (out []string) {
	l.Helper()
	disks, err := l.presenter.List(ctx)
	must(l, err)
	for _, d := range disks {
		out = append(out, d.ID)
	}
	return out
}

// write writes through the export of an lvol, as a converter does.
func (l *lab) write(name, text string) {
	l.Helper()
	if _, err := l.presenter.Device("w-"+name).WriteAt([]byte(text), 0); err != nil {
		l.Fatal(err)
	}
}

func (l *lab) read(name string, n int) string {
	l.Helper()
	d, err := l.store.OpenLvol(name, true)
	must(l, err)
	defer d.Close()
	got := make([]byte, n)
	if _, err := d.ReadAt(got, 0); err != nil {
		l.Fatal(err)
	}
	return string(got)
}

func blockName(scope block.Scope, n int) string {
	return fmt.Sprintf("%s-00000000-0000-4000-8000-%012d", scope, n)
}

// convert makes the blocks of an image as a converter does: numbers name layers, the
// first is global, the last number names the soldier.
func (l *lab) convert(owner string, layers ...int) []string {
	l.Helper()
	soldier := layers[len(layers)-1]
	var blocks []string
	for i, n := range layers[:len(layers)-1] {
		scope := block.Local
		if i == 0 {
			scope = block.Global
		}
		name, work := blockName(scope, n), fmt.Sprintf("work-%d", n)
		blocks = append(blocks, name)
		if _, err := l.GetLvol(ctx, &attacherv1.GetLvolRequest{Name: name}); err == nil {
			continue
		}
		if i == 0 {
			l.create(work, owner)
		} else {
			_, err := l.CloneLvol(ctx, &attacherv1.CloneLvolRequest{Snapshot: blocks[i-1], Name: work, Owner: owner})
			must(l, err)
		}
		_, err := l.Export(ctx, &attacherv1.ExportRequest{Lvol: work, Owner: owner})
		must(l, err)
		l.write(work, name)
		_, err = l.SnapshotLvol(ctx, &attacherv1.SnapshotLvolRequest{Lvol: work, Snapshot: name})
		must(l, err)
		_, err = l.Unexport(ctx, &attacherv1.UnexportRequest{Lvol: work, Owner: owner})
		must(l, err)
		_, err = l.DeleteLvol(ctx, &attacherv1.DeleteLvolRequest{Name: work})
		must(l, err)
	}
	name := blockName(block.Soldier, soldier)
	_, err := l.CloneLvol(ctx, &attacherv1.CloneLvolRequest{Snapshot: blocks[len(blocks)-1], Name: name, ReadOnly: true})
	must(l, err)
	return append(blocks, name)
}

func image(reference string, blocks []string) *attacherv1.Image {
	return &attacherv1.Image{
		Reference: reference, Source: "docker.io/library/x:1", Platform: "linux/amd64",
		ManifestDigest: digest.FromString(strings.Join(blocks, " ")).String(),
		Mode:           "overlayfs", Filesystem: "erofs", VirtualSizeBytes: size, Blocks: blocks,
	}
}

func (l *lab) put(reference string, blocks []string) *attacherv1.Image {
	l.Helper()
	i, err := l.PutImage(ctx, &attacherv1.PutImageRequest{Image: image(reference, blocks)})
	must(l, err)
	return i
}

// remove removes an image and returns what was deleted, sorted.
func (l *lab) remove(reference string) []string {
	l.Helper()
	r, err := l.DeleteImage(ctx, &attacherv1.DeleteImageRequest{Reference: reference})
	must(l, err)
	return slices.Sorted(slices.Values(r.GetDeletedBlocks()))
}

func (l *lab) wantClean() {
	l.Helper()
	r, err := l.CheckStore(ctx, &attacherv1.CheckStoreRequest{Scrub: true})
	must(l, err)
	if len(r.GetProblems()) > 0 {
		l.Fatalf("problems: %v", r.GetProblems())
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func wantKind(t testing.TB, err error, k kind.Kind, mentions ...string) {
	t.Helper()
	if kind.Of(err) != k {
		t.Fatalf("got error %v (kind %q), want kind %q", err, kind.Of(err), k)
	}
	for _, m := range mentions {
		if !strings.Contains(err.Error(), m) {
			t.Fatalf("error %q does not mention %q", err, m)
		}
	}
}
