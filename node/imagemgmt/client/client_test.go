package client_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"reflect"
	"slices"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/grpc"

	imagemgmtv1 "github.com/thaw-project/thaw/api/imagemgmt/v1"
	"github.com/thaw-project/thaw/attacher/rpc"
	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/node/imagemgmt"
	"github.com/thaw-project/thaw/node/imagemgmt/client"
	"github.com/thaw-project/thaw/node/imagemgmt/server"
	"github.com/thaw-project/thaw/node/present"
	"github.com/thaw-project/thaw/node/present/presenttest"
	"github.com/thaw-project/thaw/target/bdev"
	"github.com/thaw-project/thaw/target/malloc"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var ctx = context.Background()

const blockBytes = 1 << 20

// lab is image-mgmt behind a socket, and a client of it.
type lab struct {
	testing.TB
	dir       string
	presenter *presenttest.Presenter
	card      *card // nil: a host that shows disks itself
	manager   *imagemgmt.Manager
	server    *grpc.Server
	served    sync.WaitGroup
	*client.Client
}

func open(present.Source, bool) (bdev.Device, error) { return malloc.New(blockBytes) }

func newLab(t testing.TB, change func(*imagemgmt.Options, *client.Options)) *lab {
	l := &lab{TB: t, dir: t.TempDir(), presenter: presenttest.New(open)}
	o := imagemgmt.Options{
		Presenter: l.presenter, DBPath: filepath.Join(l.dir, "imagemgmt.db"), Open: open,
		Lookup: func(_ context.Context, b imagemgmt.Block) error {
			if b.Name == "absent" {
				return kind.Errorf(kind.NotFound, "no block %s", b.Name)
			}
			return nil
		},
	}
	var co client.Options
	if change != nil {
		change(&o, &co)
	}
	if p, ok := o.Presenter.(*card); ok {
		l.card, p.Presenter = p, l.presenter
	}
	var err error
	if l.manager, err = imagemgmt.New(o); err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(l.dir, "s")
	listener, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	l.server = grpc.NewServer(rpc.ServerOptions()...)
	imagemgmtv1.RegisterImageManagementServer(l.server, server.New(l.manager))
	l.served.Go(func() { l.server.Serve(listener) })
	conn, err := rpc.Dial(socket)
	if err != nil {
		t.Fatal(err)
	}
	l.Client = client.New(conn, co)
	t.Cleanup(func() {
		conn.Close()
		l.server.Stop()
		l.served.Wait()
		l.manager.Close()
		l.presenter.Reboot()
	})
	return l
}

func (l *lab) shown() (ids []string) {
	l.Helper()
	disks, err := l.presenter.List(ctx)
	if err != nil {
		l.Fatal(err)
	}
	for _, d := range disks {
		ids = append(ids, d.ID)
	}
	return ids
}

func must[T any](v T, err error) func(testing.TB) T {
	return func(t testing.TB) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func wantKind(t testing.TB, err error, want kind.Kind) {
	t.Helper()
	if kind.Of(err) != want {
		t.Fatalf("got %v (kind %q), want kind %q", err, kind.Of(err), want)
	}
}

// TestSameAsInProcess asks the manager itself and through the socket: answers and errors
// are the same.
func TestSameAsInProcess(t *testing.T) {
	l := newLab(t, func(o *imagemgmt.Options, _ *client.Options) {
		o.Own = "local"
		o.Scratch = func(_ context.Context, target string, n int64) (imagemgmt.Block, error) {
			return imagemgmt.Block{Target: target, Name: fmt.Sprint("scratch-", n)}, nil
		}
		o.Cached = func(imagemgmt.Block) (bdev.Device, error) { return open(present.Source{}, true) }
	})
	b := imagemgmt.Block{Target: "rack-7", Name: "soldier-1"}
	layer := imagemgmt.Layer{Block: b, Path: filepath.Join(l.dir, "rw.qcow2")}
	same := func(what string, f func(imagemgmt.Service) (any, error)) any {
		t.Helper()
		here, herr := f(l.manager)
		there, terr := f(l.Client)
		if !reflect.DeepEqual(here, there) || kind.Of(herr) != kind.Of(terr) || (herr == nil) != (terr == nil) || herr != nil && herr.Error() != terr.Error() {
			t.Errorf("%s: in the process %+v, %v; through the socket %+v, %v", what, here, herr, there, terr)
		}
		return there
	}
	attach := func(b imagemgmt.Block, user string) func(imagemgmt.Service) (any, error) {
		return func(s imagemgmt.Service) (any, error) { return s.Attach(ctx, b, user) }
	}
	same("attach", attach(b, "u"))
	same("absent", attach(imagemgmt.Block{Name: "absent"}, "u"))
	same("invalid", attach(imagemgmt.Block{Name: "a/b"}, "u"))
	same("no user", attach(b, ""))
	same("writable", func(s imagemgmt.Service) (any, error) { return s.AttachWritable(ctx, layer, "rw-1") })
	same("writable of another", func(s imagemgmt.Service) (any, error) {
		return s.AttachWritable(ctx, imagemgmt.Layer{Block: imagemgmt.Block{Name: "other"}, Path: layer.Path}, "rw-1")
	})
	if a := same("stat", func(s imagemgmt.Service) (any, error) { return s.Stat(ctx, b.Name) }).(imagemgmt.Attachment); len(a.Users) != 2 || len(a.Layers) != 1 {
		t.Errorf("%+v", a)
	}
	same("stat of none", func(s imagemgmt.Service) (any, error) { return s.Stat(ctx, "none") })
	same("list", func(s imagemgmt.Service) (any, error) { return s.List(ctx) })
	if w := same("stat of a layer", func(s imagemgmt.Service) (any, error) { return s.StatWritable(ctx, layer, "rw-1") }).(imagemgmt.Writable); w.AllocatedBytes == 0 || w.Files == 0 || w.Disk.ID == "" {
		t.Errorf("%+v", w)
	}
	same("scratch", func(s imagemgmt.Service) (any, error) { return s.EnsureScratch(ctx, "local", 1<<20) })
	same("scratch of no size", func(s imagemgmt.Service) (any, error) { return s.EnsureScratch(ctx, "local", 1) })
	same("prefetch", func(s imagemgmt.Service) (any, error) {
		var last int64
		err := s.Prefetch(ctx, b.Name, []imagemgmt.Range{{OffsetBytes: 4096, LengthBytes: 8192}, {LengthBytes: 512}}, func(n int64) { last = n })
		if last != 8192+512 {
			t.Errorf("told %d bytes", last)
		}
		return last, err
	})
	same("prefetch of none", func(s imagemgmt.Service) (any, error) { return nil, s.Prefetch(ctx, "none", nil, nil) })
	l.presenter.SetBusy("rw-1", true)
	same("busy", func(s imagemgmt.Service) (any, error) { return nil, s.DetachWritable(ctx, b.Name, "rw-1") })
	l.presenter.SetBusy("rw-1", false)
	same("detach writable", func(s imagemgmt.Service) (any, error) { return nil, s.DetachWritable(ctx, b.Name, "rw-1") })
	same("delete writable", func(s imagemgmt.Service) (any, error) { return nil, s.DeleteWritable(ctx, layer, "rw-1") })
	same("detach", func(s imagemgmt.Service) (any, error) { return nil, s.Detach(ctx, b.Name, "u") })
	if s := l.shown(); len(s) != 0 {
		t.Errorf("left %q", s)
	}
}

// TestPrefetchEndsWithTheCall cancels a call, and looks whether the reads of the other
// process end.
func TestPrefetchEndsWithTheCall(t *testing.T) {
	stuck := &stuckDevice{reading: make(chan struct{}, 64), closed: make(chan struct{})}
	l := newLab(t, func(o *imagemgmt.Options, _ *client.Options) {
		o.Cached = func(imagemgmt.Block) (bdev.Device, error) { return stuck, nil }
	})
	must(l.Attach(ctx, imagemgmt.Block{Name: "b"}, "u"))(t)
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan error, 1)
	go func() { done <- l.Prefetch(ctx, "b", []imagemgmt.Range{{LengthBytes: 4096}}, nil) }()
	<-stuck.reading
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	select {
	case <-stuck.closed:
	case <-time.After(10 * time.Second):
		t.Fatal("the other process goes on reading")
	}
}

// stuckDevice answers no read until it is closed.
type stuckDevice struct {
	bdev.Device
	reading, closed chan struct{}
}

func (d *stuckDevice) SizeBytes() int64 { return blockBytes }
func (d *stuckDevice) Close() error     { close(d.closed); return nil }
func (d *stuckDevice) ReadAt([]byte, int64) (int, error) {
	d.reading <- struct{}{}
	<-d.closed
	return 0, kind.Errorf(kind.Canceled, "closed")
}

// card is a presenter of drives that the host sees, and the host that sees them.
type card struct {
	*presenttest.Presenter

	mu     sync.Mutex
	broken error
	drives map[string]present.Disk // guarded by mu, as all below: what the host sees, by UUID
	inUse  map[string]bool
	left   map[string]bool // claimed by Leave
	events []string
	blind  bool // the host sees nothing
}

func newCard() *card {
	return &card{drives: map[string]present.Disk{}, inUse: map[string]bool{}, left: map[string]bool{}}
}

func (c *card) note(format string, args ...any) {
	c.events = append(c.events, fmt.Sprintf(format, args...))
}

func (c *card) Present(ctx context.Context, id string, source present.Source, readOnly bool) (present.Disk, error) {
	d, err := c.Presenter.Present(ctx, id, source, readOnly)
	if err != nil {
		return d, err
	}
	d.Path, d.NVMe = "", &present.NVMe{UUID: "uuid-of-" + id, Serial: "serial", Function: "0:1:0"}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.drives[d.NVMe.UUID] = d
	return d, nil
}

func (c *card) Withdraw(ctx context.Context, id string) error {
	c.mu.Lock()
	c.note("withdraw %s", id)
	broken := c.broken
	delete(c.drives, "uuid-of-"+id)
	c.mu.Unlock()
	if broken != nil {
		return broken
	}
	return c.Presenter.Withdraw(ctx, id)
}

func (c *card) Find(ctx context.Context, d present.Disk) (string, error) {
	c.mu.Lock()
	seen, ok := c.drives[d.NVMe.UUID]
	ok = ok && !c.blind
	c.mu.Unlock()
	if !ok {
		<-ctx.Done()
		return "", kind.Wrap(kind.Unavailable, ctx.Err())
	}
	if seen.SizeBytes != d.SizeBytes || seen.ReadOnly != d.ReadOnly {
		return "", kind.Errorf(kind.Corrupt, "%+v is not %+v", seen, d)
	}
	return "/dev/" + d.ID, nil
}

func (c *card) Leave(_ context.Context, n present.NVMe) (func() error, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.inUse[n.UUID] {
		return nil, kind.Errorf(kind.InUse, "%s is mounted", n.UUID)
	}
	c.left[n.UUID] = true
	c.note("leave %s", n.UUID)
	return func() error {
		c.mu.Lock()
		defer c.mu.Unlock()
		delete(c.left, n.UUID)
		c.note("release %s", n.UUID)
		return nil
	}, nil
}

func (c *card) Gone(_ context.Context, n present.NVMe) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.note("gone %s", n.UUID)
	if _, there := c.drives[n.UUID]; there {
		return kind.Errorf(kind.Unavailable, "%s is still there", n.UUID)
	}
	return nil
}

func (c *card) log() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	defer func() { c.events = nil }()
	return c.events
}

func newCardLab(t testing.TB) *lab {
	return newLab(t, func(o *imagemgmt.Options, co *client.Options) {
		c := newCard()
		o.Presenter, co.Finder = c, c
	})
}

// TestDrives has the other side of the bus show drives, which the host finds, and leaves
// before they go.
func TestDrives(t *testing.T) {
	l := newCardLab(t)
	b := imagemgmt.Block{Target: "rack-7", Name: "soldier-1"}
	for range 2 {
		d := must(l.Attach(ctx, b, "u"))(t)
		if d.Path != "/dev/soldier-1" || !d.Block || !d.ReadOnly || d.SizeBytes != blockBytes {
			t.Fatalf("%+v", d)
		}
	}
	must(l.Attach(ctx, b, "v"))(t)
	layer := imagemgmt.Layer{Block: b, Path: filepath.Join(l.dir, "rw")}
	if d := must(l.AttachWritable(ctx, layer, "rw-1"))(t); d.Path != "/dev/rw-1" || d.ReadOnly {
		t.Fatalf("%+v", d)
	}
	// One that others use stays, and nobody looks at it.
	if err := l.Detach(ctx, b.Name, "v"); err != nil {
		t.Fatal(err)
	}
	if e := l.card.log(); len(e) != 0 {
		t.Fatalf("%q", e)
	}
	// In use on this host: nothing changes.
	l.card.inUse["uuid-of-soldier-1"], l.card.inUse["uuid-of-rw-1"] = true, true
	wantKind(t, l.Detach(ctx, b.Name, "u"), kind.InUse)
	wantKind(t, l.DetachWritable(ctx, b.Name, "rw-1"), kind.InUse)
	wantKind(t, l.DeleteWritable(ctx, layer, "rw-1"), kind.InUse)
	if e := l.card.log(); len(e) != 0 {
		t.Fatalf("%q", e)
	}
	if a := must(l.Stat(ctx, b.Name))(t); !slices.Equal(a.Users, []string{"rw-1", "u"}) {
		t.Fatalf("%+v", a)
	}
	clear(l.card.inUse)
	// The last reader goes, though a layer is over the block.
	if err := l.Detach(ctx, b.Name, "u"); err != nil {
		t.Fatal(err)
	}
	order := func(id string) []string {
		return []string{"leave uuid-of-" + id, "withdraw " + id, "gone uuid-of-" + id, "release uuid-of-" + id}
	}
	if e := l.card.log(); !slices.Equal(e, order("soldier-1")) {
		t.Fatalf("%q", e)
	}
	if err := l.DetachWritable(ctx, b.Name, "rw-1"); err != nil {
		t.Fatal(err)
	}
	if e := l.card.log(); !slices.Equal(e, order("rw-1")) {
		t.Fatalf("%q", e)
	}
	// What is gone already.
	if err := errors.Join(l.Detach(ctx, b.Name, "u"), l.DetachWritable(ctx, b.Name, "rw-1"), l.DeleteWritable(ctx, layer, "rw-1"), l.DeleteWritable(ctx, layer, "rw-1")); err != nil {
		t.Fatal(err)
	}
	if e := l.card.log(); len(e) != 0 {
		t.Fatalf("%q", e)
	}
	// Deleted at once.
	must(l.AttachWritable(ctx, layer, "rw-1"))(t)
	if err := l.DeleteWritable(ctx, layer, "rw-1"); err != nil {
		t.Fatal(err)
	}
	if e := l.card.log(); !slices.Equal(e, order("rw-1")) {
		t.Fatalf("%q", e)
	}
	if s := l.shown(); len(s) != 0 || len(l.card.left) != 0 {
		t.Fatalf("left %q, claimed %v", s, l.card.left)
	}
}

func TestDrivesThatAreNotFound(t *testing.T) {
	l := newCardLab(t)
	b := imagemgmt.Block{Name: "soldier-1"}
	l.card.blind = true
	short, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
	defer cancel()
	_, err := l.Attach(short, b, "u")
	wantKind(t, err, kind.Unavailable)
	// It is attached all the same, and whoever gives up takes it away.
	if err := l.Detach(ctx, b.Name, "u"); err != nil {
		t.Fatal(err)
	}
	if s := l.shown(); len(s) != 0 {
		t.Fatalf("left %q", s)
	}
	l.card.blind = false
	must(l.Attach(ctx, b, "u"))(t)

	// The card fails to take it away: nothing stays claimed.
	l.card.broken = kind.Errorf(kind.IO, "broken")
	wantKind(t, l.Detach(ctx, b.Name, "u"), kind.IO)
	if len(l.card.left) != 0 {
		t.Fatalf("claimed %v", l.card.left)
	}
	l.card.broken = nil
	if err := l.Detach(ctx, b.Name, "u"); err != nil {
		t.Fatal(err)
	}

	// Without a finder a drive is of no use.
	l = newLab(t, func(o *imagemgmt.Options, _ *client.Options) { o.Presenter = newCard() })
	_, err = l.Attach(ctx, b, "u")
	wantKind(t, err, kind.Unsupported)
}

func TestNobodyAnswers(t *testing.T) {
	conn, err := rpc.Dial(filepath.Join(t.TempDir(), "absent"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	c := client.New(conn, client.Options{})
	_, err = c.Attach(ctx, imagemgmt.Block{Name: "b"}, "u")
	wantKind(t, err, kind.Unavailable)
	wantKind(t, c.Prefetch(ctx, "b", nil, nil), kind.Unavailable)
}

func BenchmarkAttach(b *testing.B) {
	l := newLab(b, nil)
	var took []time.Duration
	for b.Loop() {
		begin := time.Now()
		must(l.Attach(ctx, imagemgmt.Block{Name: "b"}, "u"))(b)
		took = append(took, time.Since(begin))
		if err := l.Detach(ctx, "b", "u"); err != nil {
			b.Fatal(err)
		}
	}
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)/2].Microseconds()), "attach-p50-us")
	b.ReportMetric(float64(took[len(took)*99/100].Microseconds()), "attach-p99-us")
}
