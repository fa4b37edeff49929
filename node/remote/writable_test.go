package remote

import (
	"context"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	"go.etcd.io/bbolt"
	"google.golang.org/grpc"

	attacherv1 "github.com/thaw-project/thaw/api/attacher/v1"
	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/nvme/host"
	"github.com/thaw-project/thaw/statedb"
	"github.com/thaw-project/thaw/target/bdev"
	"github.com/thaw-project/thaw/target/malloc"
)

// connect opens the nvmeNamespace of an attachment as a card does.
func connect(t *testing.T, a *attacherv1.Attachment) *host.Device {
	t.Helper()
	h, err := host.Connect(t.Context(), host.Config{
		Portals: []string{a.GetPortals()[0].GetAddress() + ":" + a.GetPortals()[0].GetService()}, SubNQN: a.GetSubsystemNqn(), HostNQN: a.GetHostNqn(), HostID: uuid.MustParse(a.GetHostId()),
	})
	must(t, err)
	t.Cleanup(func() { h.Close() })
	d, err := h.OpenUUID(uuid.MustParse(a.GetUuid()))
	must(t, err)
	return d
}

// TestWritable goes through the life of a writable layer at a real store.
func TestWritable(t *testing.T) {
	s := newStore(t)
	one, two := s.image(1), s.image(2)
	n := s.node("node-a")
	n.SetKernelHost(true) // whoever connects, it is not this process
	ctx, id := t.Context(), "snapshot-0-1"
	_, err := n.WritableAttachment(targetName, id)
	wantKind(t, err, kind.NotFound)
	_, err = n.AttachWritable(ctx, targetName, one, id, true)
	wantKind(t, err, kind.NotFound) // it was never made
	a, err := n.AttachWritable(ctx, targetName, one, id, false)
	must(t, err)
	if !a.GetWritable() || a.GetWritableId() != id || a.GetBlock() != one || a.GetSizeBytes() != blockBytes || a.GetAttachmentId() == "" || a.GetNode() != "node-a" || len(a.GetPortals()) == 0 {
		t.Fatalf("%+v", a)
	}
	d := connect(t, a)
	want := []byte("written by the card")
	want = append(want, make([]byte, 512-len(want))...)
	if _, err := d.WriteAt(want, 1<<20); err != nil {
		t.Fatal(err)
	}
	must(t, d.Flush())

	// On record, nothing is asked: not by this process, nor by the next.
	s.stop()
	for range 2 {
		again, err := n.AttachWritable(ctx, targetName, one, id, true)
		must(t, err)
		if again.GetUuid() != a.GetUuid() || again.GetAttachmentId() != a.GetAttachmentId() {
			t.Fatalf("%+v", again)
		}
		_, err = n.AttachWritable(ctx, targetName, two, id, true)
		wantKind(t, err, kind.Exists)
		n.reopen()
		n.SetKernelHost(true)
	}
	short, cancel := context.WithTimeout(ctx, 100*time.Millisecond)
	defer cancel()
	wantKind(t, n.DetachWritable(short, targetName, id), kind.Unavailable)
	s.start()
	var bytes int64
	eventually(t, "the store", func() bool {
		bytes, err = n.WritableBytes(ctx, targetName, id)
		return err == nil
	})
	if bytes < clusterBytes {
		t.Fatalf("it occupies %d bytes", bytes)
	}

	// Detached, and kept.
	for range 2 {
		must(t, n.DetachWritable(ctx, targetName, id))
	}
	b, err := n.AttachWritable(ctx, targetName, one, id, true)
	must(t, err)
	if b.GetAttachmentId() == a.GetAttachmentId() {
		t.Error("the attachment is the one that ended")
	}
	got := make([]byte, 512)
	if _, err := connect(t, b).ReadAt(got, 1<<20); err != nil || string(got) != string(want) {
		t.Fatalf("%.20q, %v", got, err)
	}

	// The sweep, which knows nothing of it, leaves it alone.
	n.use(one, true)
	must(t, n.Attach(ctx, targetName, one))
	n.use(one, false)
	eventually(t, "the sweep", func() bool { return slices.Equal(s.attachments(), []string{"node-a " + one}) })

	// An answer was lost: what is on record is an attachment that ended.
	n.mu.Lock()
	n.Remote.mu.Lock()
	n.writables[key(targetName, id)].Attachment = a.GetAttachmentId()
	n.Remote.mu.Unlock()
	n.mu.Unlock()
	for range 2 {
		must(t, n.DeleteWritable(ctx, targetName, id))
	}
	if got := s.attachments(); len(got) != 0 {
		t.Fatalf("the store has %q", got)
	}
	if bytes, err := n.WritableBytes(ctx, targetName, id); err != nil || bytes != 0 {
		t.Fatal(bytes, err)
	}
	// Making one needs a presentation that mkfs can write to; this one is there.
	_, err = s.lvols.Create("work", 64<<20)
	must(t, err)
	_, err = s.lvols.Snapshot("work", "scratch-67108864")
	must(t, err)
	if b, err := n.EnsureScratch(ctx, targetName, 64<<20); err != nil || b == "" {
		t.Fatal(b, err)
	} else if _, err := n.AttachWritable(ctx, targetName, b, id, false); err != nil {
		t.Fatal(err)
	}
	must(t, n.DeleteWritable(ctx, targetName, id))
	for _, err := range []error{
		n.DeleteWritable(ctx, "nowhere", id),
		func() error { _, err := n.AttachWritable(ctx, "nowhere", one, id, false); return err }(),
		func() error { _, err := n.EnsureScratch(ctx, "nowhere", 1<<20); return err }(),
	} {
		wantKind(t, err, kind.NotFound)
	}
}

// TestDoubtWritable: a layer was detached at the store. What is on record reaches nothing,
// and who found that out has the store asked again.
func TestDoubtWritable(t *testing.T) {
	s := newStore(t)
	one := s.image(1)
	n := s.node("node-a")
	n.SetKernelHost(true)
	ctx, id := t.Context(), "snapshot-0-1"
	n.DoubtWritable(targetName, id) // of nothing
	a, err := n.AttachWritable(ctx, targetName, one, id, false)
	must(t, err)
	_, err = s.attacher.DetachWritable(ctx, &attacherv1.DetachWritableRequest{Node: "node-a", Id: id})
	must(t, err)
	attach := func() *attacherv1.Attachment {
		t.Helper()
		b, err := n.AttachWritable(ctx, targetName, one, id, true)
		must(t, err)
		return b
	}
	if b := attach(); b.GetAttachmentId() != a.GetAttachmentId() {
		t.Fatal("the store was asked without need")
	}
	s.stop()
	n.DoubtWritable(targetName, id)
	if b := attach(); b.GetAttachmentId() != a.GetAttachmentId() {
		t.Fatal("somebody answered for the store")
	}
	s.start()
	var b *attacherv1.Attachment
	eventually(t, "the store", func() bool {
		b = attach()
		return b.GetAttachmentId() != a.GetAttachmentId()
	})
	connect(t, b)
	// One that is another under the same name is not taken for it.
	must(t, n.putWritable(targetName, id, func() *record { r, _ := n.writable(targetName, id); r.UUID = uuid.NewString(); return &r }()))
	n.DoubtWritable(targetName, id)
	_, err = n.AttachWritable(ctx, targetName, one, id, true)
	wantKind(t, err, kind.Corrupt)
	must(t, n.DeleteWritable(ctx, targetName, id))
}

// TestStaleAttachment: a block was attached again and the answer was lost. It is detached
// all the same.
func TestStaleAttachment(t *testing.T) {
	s := newStore(t)
	one := s.image(1)
	n := s.node("node-a")
	must(t, n.attachBlock(one))
	rec, _ := n.record(targetName, one)
	if rec.Attachment == "" || rec.Transport != TransportTCP || rec.Node != "node-a" {
		t.Fatalf("%+v", rec)
	}
	rec.Attachment = uuid.NewString()
	must(t, n.put(targetName, one, rec, nil))
	n.use(one, false)
	eventually(t, "detaching", func() bool { return len(s.attachments()) == 0 })
	must(t, n.attachBlock(one))
	n.check(one, 1)
}

// fakeStore answers as a store of Ceph does, or as one that keeps no maps.
type fakeStore struct {
	attacherv1.UnimplementedNodeServer
	rbd bool

	mu       sync.Mutex
	attached map[string]bool // guarded by mu
}

func (f *fakeStore) AttachBlock(_ context.Context, r *attacherv1.AttachBlockRequest) (*attacherv1.Attachment, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.attached[r.GetBlock()] = true
	a := &attacherv1.Attachment{Block: r.GetBlock(), Node: r.GetNode(), Transport: r.GetTransport(), SizeBytes: 1 << 20, AttachmentId: "id-of-" + r.GetBlock()}
	if f.rbd {
		a.Rbd = &attacherv1.RbdImage{Cluster: "c", Pool: "p", Image: r.GetBlock(), Snapshot: "s"}
		return a, nil
	}
	a.SubsystemNqn, a.HostNqn, a.HostId, a.Nsid, a.Uuid = "nqn.2014-08.org.example:s", "nqn.2014-08.org.example:h", uuid.NewString(), 1, "11111111-2222-4333-8444-555555555555"
	a.Portals = []*attacherv1.Portal{{Transport: "rdma", Address: "127.0.0.1", Service: "4420"}}
	return a, nil
}

func (f *fakeStore) DetachBlock(_ context.Context, r *attacherv1.DetachBlockRequest) (*attacherv1.DetachBlockResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if r.GetAttachmentId() != "id-of-"+r.GetBlock() {
		return nil, kind.Errorf(kind.InUse, "attachment %q", r.GetAttachmentId())
	}
	delete(f.attached, r.GetBlock())
	return &attacherv1.DetachBlockResponse{}, nil
}

func (f *fakeStore) ListAttachments(context.Context, *attacherv1.ListAttachmentsRequest) (*attacherv1.ListAttachmentsResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	out := &attacherv1.ListAttachmentsResponse{Attachments: []*attacherv1.Attachment{{Block: "b", Writable: true, WritableId: "somebody's"}}}
	for b := range f.attached {
		out.Attachments = append(out.Attachments, &attacherv1.Attachment{Block: b, AttachmentId: "id-of-" + b})
	}
	return out, nil
}

func (f *fakeStore) has(block string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.attached[block]
}

// fakeNode is a node of f, over its Unix socket.
func fakeNode(t *testing.T, f *fakeStore, change func(*Options)) *node {
	f.attached = make(map[string]bool)
	socket := filepath.Join(t.TempDir(), "s")
	serve(t, socket, func(g *grpc.Server) { attacherv1.RegisterNodeServer(g, f) })
	n := &node{t: t, users: make(map[string]bool)}
	n.options = Options{DBPath: filepath.Join(t.TempDir(), "remote.db"), Targets: []TargetOptions{{Name: targetName, Attacher: socket, Node: "node-a"}}}
	change(&n.options)
	n.open()
	t.Cleanup(func() { must(t, n.Remote.Close()) })
	return n
}

// TestRBD reads an image of Ceph through an opener, which is not there at first.
func TestRBD(t *testing.T) {
	f := &fakeStore{rbd: true}
	var away atomic.Bool
	var opened, closed atomic.Int64
	n := fakeNode(t, f, func(o *Options) {
		o.Targets[0].Transport, o.Targets[0].LossTimeout = TransportRBD, 10*time.Second
		o.OpenRBD = func(ctx context.Context, i RBDImage) (bdev.Device, error) {
			if away.Load() {
				return nil, kind.Errorf(kind.Unavailable, "no monitor answers")
			}
			if i != (RBDImage{"c", "p", i.Image, "s"}) {
				t.Errorf("%+v", i)
			}
			size := int64(1 << 20)
			if i.Image == "short" {
				size = 512
			}
			d, err := malloc.New(size)
			if err == nil && size > 512 {
				_, err = d.WriteAt([]byte(i.Image), 4096)
			}
			opened.Add(1)
			return &counted{d, &closed}, err
		}
	})
	must(t, n.attachBlock("one"))
	if x, err := n.Export(targetName, "one"); err != nil || x.Transport != TransportRBD || x.RBD == nil || x.RBD.Image != "one" || x.Writable {
		t.Fatalf("%+v, %v", x, err)
	}
	if a, err := n.Attachment(t.Context(), targetName, "one"); err != nil || a.GetRbd().GetImage() != "one" || a.GetTransport() != TransportRBD {
		t.Fatalf("%+v, %v", a, err)
	}
	_, err := n.Map(targetName, "one") // nobody keeps one
	wantKind(t, err, kind.NotFound)
	away.Store(true)
	n.use("two", true)
	short, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	wantKind(t, n.Attach(short, targetName, "two"), kind.Unavailable)
	n.use("two", false)
	n.reopen()
	d, err := n.Open(targetName, "one")
	must(t, err)
	if d.SizeBytes() != 1<<20 || !d.ReadOnly() {
		t.Fatalf("%d bytes", d.SizeBytes())
	}
	for _, err := range []error{d.Discard(0, 512), d.WriteZeroes(0, 512), func() error { _, err := d.WriteAt(make([]byte, 512), 0); return err }()} {
		wantKind(t, err, kind.ReadOnly)
	}
	read := make(chan error, 1)
	got := make([]byte, 3)
	go func() { _, err := d.ReadAt(got, 4096); read <- err }()
	select {
	case err := <-read:
		t.Fatalf("a read did not wait for the cluster: %v", err)
	case <-time.After(50 * time.Millisecond):
	}
	away.Store(false)
	if err := <-read; err != nil || string(got) != "one" {
		t.Fatalf("%q, %v", got, err)
	}
	must(t, d.Close())
	_, err = d.ReadAt(got, 0)
	wantKind(t, err, kind.Canceled)

	// Closing ends a read that waits.
	away.Store(true)
	d, err = n.Open(targetName, "one")
	must(t, err)
	go func() { _, err := d.ReadAt(make([]byte, 3), 4096); read <- err }()
	time.Sleep(10 * time.Millisecond)
	must(t, d.Close())
	if err := <-read; err == nil {
		t.Fatal("a closed device was read")
	}
	away.Store(false)

	// What is not as it was attached.
	n.use("short", true)
	wantKind(t, n.Attach(t.Context(), targetName, "short"), kind.Corrupt)
	n.use("short", false)
	n.use("one", false)
	eventually(t, "detaching", func() bool { return !f.has("one") && !f.has("short") && !f.has("two") })
	if opened.Load() != closed.Load() {
		t.Errorf("%d opened, %d closed", opened.Load(), closed.Load())
	}
}

type counted struct {
	bdev.Device
	closed *atomic.Int64
}

func (d *counted) Close() error { d.closed.Add(1); return d.Device.Close() }

// TestTransportsThatNobodyReads: without a kernel or a card, some transports are of no use.
func TestTransportsThatNobodyReads(t *testing.T) {
	for _, transport := range []string{TransportRDMA, TransportRBD} {
		f := &fakeStore{rbd: transport == TransportRBD}
		n := fakeNode(t, f, func(o *Options) { o.Targets[0].Transport = transport })
		n.use("one", true)
		wantKind(t, n.Attach(t.Context(), targetName, "one"), kind.Unsupported)
		if f.has("one") {
			t.Error("the store was asked for nothing")
		}
		n.SetKernelHost(true)
		must(t, n.Attach(t.Context(), targetName, "one"))
		if x, err := n.Export(targetName, "one"); err != nil || x.Transport != transport {
			t.Errorf("%+v, %v", x, err)
		}
		n.SetKernelHost(false)
		_, err := n.Open(targetName, "one")
		wantKind(t, err, kind.Unsupported)
	}
	_, err := New(Options{DBPath: filepath.Join(t.TempDir(), "remote.db"), Targets: []TargetOptions{{Name: "x", Transport: "pigeon"}}})
	wantKind(t, err, kind.Invalid)
}

// TestGoldenVersion1 reads what the first release wrote.
func TestGoldenVersion1(t *testing.T) {
	path := filepath.Join(t.TempDir(), "remote.db")
	old, err := statedb.Open(statedb.Options{Path: path, Part: dbPart, Version: 1, Buckets: []string{"attached", "maps"}})
	must(t, err)
	must(t, old.Update(func(tx *bbolt.Tx) error {
		return tx.Bucket(attachedBucket).Put([]byte(key(targetName, "soldier-1")), []byte(`{"subsystem":"nqn.2014-08.org.example:s","host_nqn":"nqn.2014-08.org.example:h",`+
			`"host_id":"11111111-2222-4333-8444-555555555551","portals":[{"transport":"tcp","address":"10.0.0.1","service":"4420"}],"nsid":7,`+
			`"uuid":"11111111-2222-4333-8444-555555555555","size_bytes":1048576}`))
	}))
	must(t, old.Close())
	r, err := New(Options{DBPath: path, Targets: []TargetOptions{{Name: targetName, Attacher: "127.0.0.1:1"}}})
	must(t, err)
	defer r.Close()
	x, err := r.Export(targetName, "soldier-1")
	if err != nil || x.Transport != TransportTCP || x.NSID != 7 || x.RBD != nil || x.Writable {
		t.Fatalf("%+v, %v", x, err)
	}
}
