package export_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/opencontainers/go-digest"
	"go.uber.org/goleak"
	"google.golang.org/grpc"

	attacherv1 "github.com/thaw-project/thaw/api/attacher/v1"
	"github.com/thaw-project/thaw/attacher"
	"github.com/thaw-project/thaw/attacher/export"
	"github.com/thaw-project/thaw/attacher/identity"
	"github.com/thaw-project/thaw/attacher/rpc"
	"github.com/thaw-project/thaw/certificate"
	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/lvol"
	"github.com/thaw-project/thaw/node/present"
	"github.com/thaw-project/thaw/node/present/presenttest"
	"github.com/thaw-project/thaw/nvme/host"
	"github.com/thaw-project/thaw/target/bdev"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const blockBytes = 4 << 20

// shop is a whole store on the loopback: lvols, attacher and NVMe/TCP target, with nodes'
// calls and converters' over TLS.
type shop struct {
	*testing.T
	dir, ca  string
	lvols    *lvol.Store
	attacher *attacher.Attacher
	exporter *export.NVMe
	address  string
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func wantKind(t testing.TB, err error, want ...kind.Kind) {
	t.Helper()
	for _, k := range want {
		if kind.Of(err) == k {
			return
		}
	}
	t.Fatalf("got %v (%q), want %q", err, kind.Of(err), want)
}

// openShop starts a store that lets converters of these names in.
func openShop(t *testing.T, converters ...string) *shop {
	return openShopFor(t, attacher.DefaultHoldGrace, converters...)
}

func openShopFor(t *testing.T, grace time.Duration, converters ...string) *shop {
	s := &shop{T: t, dir: t.TempDir()}
	s.ca = filepath.Join(s.dir, "ca")
	_, err := certificate.NewAuthority(s.ca, time.Now())
	must(t, err)
	pool := filepath.Join(s.dir, "pool")
	must(t, lvol.Create(lvol.CreateOptions{Dir: pool, CapacityBytes: 1 << 30}))
	s.lvols, err = lvol.Open(lvol.Options{Dir: pool})
	must(t, err)
	s.exporter, err = export.New(export.Options{
		Store: s.lvols.Stat().UUID, Portals: []string{"127.0.0.1:0"},
		Open: func(name string, readOnly bool) (bdev.Device, uuid.UUID, error) {
			d, err := s.lvols.OpenLvol(name, readOnly)
			if err != nil {
				return nil, uuid.UUID{}, err
			}
			return d, uuid.MustParse(d.UUID()), nil
		},
	})
	must(t, err)
	presenter := presenttest.New(func(source present.Source, readOnly bool) (bdev.Device, error) {
		return s.lvols.OpenLvol(source.Lvol, readOnly)
	})
	s.attacher, err = attacher.New(attacher.Options{
		Lvols: s.lvols, Presenter: presenter, DBPath: filepath.Join(s.dir, "attacher.db"), Target: "s", Exporter: s.exporter, HoldGrace: grace,
		Sync: func(context.Context, string) error { return nil },
	})
	must(t, err)
	credentials, err := rpc.ServerTLS(s.files(s.ca, "store", "127.0.0.1"))
	must(t, err)
	options := append(append(rpc.ServerOptions(), credentials), rpc.Allow(attacherv1.Attacher_ServiceDesc.ServiceName, converters...)...)
	server := grpc.NewServer(options...)
	attacherv1.RegisterNodeServer(server, s.attacher)
	attacherv1.RegisterAttacherServer(server, s.attacher)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	s.address = l.Addr().String()
	var served sync.WaitGroup
	served.Go(func() { _ = server.Serve(l) }) // ends with Stop
	t.Cleanup(func() {
		s.attacher.Stop()
		server.Stop()
		served.Wait()
		must(t, s.attacher.Close())
		must(t, s.exporter.Close())
		must(t, s.lvols.Close())
	})
	return s
}

func (s *shop) files(ca, name string, addresses ...string) rpc.Files {
	s.Helper()
	f, err := certificate.New(ca, s.TempDir(), certificate.Issue{Node: name, Addresses: addresses}, time.Now())
	must(s, err)
	return rpc.Files{Certificate: f.Certificate, Key: f.Key, CA: f.CA}
}

func (s *shop) dial(f rpc.Files) *grpc.ClientConn {
	s.Helper()
	conn, err := rpc.DialTLS(s.address, f)
	must(s, err)
	s.Cleanup(func() { conn.Close() })
	return conn
}

// image makes an image of one layer that holds text, and returns its soldier.
func (s *shop) image(n int, text string) string {
	s.Helper()
	layer, soldier := fmt.Sprintf("global-00000000-0000-4000-8000-%012d", n), fmt.Sprintf("soldier-00000000-0000-4000-8000-%012d", n)
	work := fmt.Sprintf("work-%d", n)
	_, err := s.lvols.Create(work, blockBytes)
	must(s, err)
	d, err := s.lvols.OpenLvol(work, false)
	must(s, err)
	_, err = d.WriteAt([]byte(text), 0)
	must(s, err)
	must(s, d.Close())
	_, err = s.lvols.Snapshot(work, layer)
	must(s, err)
	must(s, s.lvols.Delete(work))
	_, err = s.lvols.Clone(layer, soldier)
	must(s, err)
	_, err = s.lvols.SetReadOnly(soldier, true)
	must(s, err)
	_, err = s.attacher.PutImage(s.Context(), &attacherv1.PutImageRequest{Image: &attacherv1.Image{
		Reference: fmt.Sprintf("registry/image:%d", n), ManifestDigest: digest.FromString(text).String(), Platform: "linux/amd64",
		Mode: "overlaybd", Filesystem: "ext4", VirtualSizeBytes: blockBytes, Blocks: []string{layer, soldier},
	}})
	must(s, err)
	return soldier
}

// node is a machine with a certificate of its own.
type node struct {
	attacherv1.NodeClient
	t    *testing.T
	name string
}

func (s *shop) node(name string) *node {
	return &node{NodeClient: attacherv1.NewNodeClient(s.dial(s.files(s.ca, name))), t: s.T, name: name}
}

func (n *node) attach(block string) *attacherv1.Attachment {
	n.t.Helper()
	a, err := n.AttachBlock(n.t.Context(), &attacherv1.AttachBlockRequest{Block: block})
	must(n.t, err)
	return a
}

// connect connects as the host that hostNQN and hostID say to the subsystem of a.
func connect(t *testing.T, a *attacherv1.Attachment, hostNQN, hostID string) (*host.Host, error) {
	t.Helper()
	id, err := uuid.Parse(hostID)
	must(t, err)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	p := a.GetPortals()[0]
	h, err := host.Connect(ctx, host.Config{
		Portals: []string{net.JoinHostPort(p.GetAddress(), p.GetService())}, SubNQN: a.GetSubsystemNqn(), HostNQN: hostNQN, HostID: id,
		IOTimeout: 5 * time.Second, LossTimeout: 5 * time.Second,
	})
	if err == nil {
		t.Cleanup(func() { h.Close() })
	}
	return h, err
}

// turnedAway holds the target to refusing that host: it answers, and says that there is no such
// subsystem or that the host is not let in.
func turnedAway(t *testing.T, a *attacherv1.Attachment, hostNQN, hostID string) {
	t.Helper()
	if _, err := connect(t, a, hostNQN, hostID); !errors.Is(err, kind.Denied) && !errors.Is(err, kind.Invalid) || !strings.Contains(err.Error(), "connect invalid") {
		t.Fatalf("host %s at %s: %v", hostNQN, a.GetSubsystemNqn(), err)
	}
}

func (n *node) connect(a *attacherv1.Attachment) *host.Host {
	n.t.Helper()
	h, err := connect(n.t, a, a.GetHostNqn(), a.GetHostId())
	must(n.t, err)
	return h
}

func open(t *testing.T, h *host.Host, a *attacherv1.Attachment) *host.Device {
	t.Helper()
	d, err := h.OpenUUID(uuid.MustParse(a.GetUuid()))
	must(t, err)
	return d
}

func wantText(t *testing.T, d *host.Device, text string) {
	t.Helper()
	got := make([]byte, 512)
	if _, err := d.ReadAt(got, 0); err != nil || !strings.HasPrefix(string(got), text+"\x00") {
		t.Fatalf("read %.40q, %v, want %q", got, err, text)
	}
}

// TestIsolationOfBlocks: what one node has attached no other one reads.
func TestIsolationOfBlocks(t *testing.T) {
	s := openShop(t)
	first, second := s.image(1, "first"), s.image(2, "second")
	a, b := s.node("node-a"), s.node("node-b")
	of, other := a.attach(first), b.attach(second)
	if of.GetSubsystemNqn() == other.GetSubsystemNqn() || of.GetHostNqn() == other.GetHostNqn() || of.GetUuid() == other.GetUuid() {
		t.Fatalf("%v and %v", of, other)
	}
	ha, hb := a.connect(of), b.connect(other)
	wantText(t, open(t, ha, of), "first")
	wantText(t, open(t, hb, other), "second")
	if seen := ha.NvmeNamespaces(); len(seen) != 1 || seen[0].UUID.String() != of.GetUuid() {
		t.Fatalf("node A sees %+v", seen)
	}
	// B's nvmeNamespace, by its UUID and by its identifier, on A's connection.
	if _, err := ha.OpenUUID(uuid.MustParse(other.GetUuid())); kind.Of(err) != kind.NotFound {
		t.Fatalf("node B's nvmeNamespace on node A's connection: %v", err)
	}
	more := b.attach(first) // has another identifier than anything that A has
	if _, err := ha.Open(more.GetNsid()); kind.Of(err) != kind.NotFound {
		t.Fatalf("identifier %d on node A's connection: %v", more.GetNsid(), err)
	}
	// B's subsystem, as A, as somebody that nobody knows, as a host without a name, and as the
	// anchor that keeps the listeners.
	stranger := uuid.New()
	for _, h := range [][2]string{
		{of.GetHostNqn(), of.GetHostId()}, {"nqn.2014-08.org.nvmexpress:uuid:" + stranger.String(), stranger.String()},
		{other.GetHostNqn() + "0", other.GetHostId()},
	} {
		turnedAway(t, other, h[0], h[1])
	}
	store := identity.Store{UUID: uuid.MustParse(s.lvols.Stat().UUID)}
	turnedAway(t, &attacherv1.Attachment{SubsystemNqn: store.Anchor(), Portals: of.GetPortals()}, of.GetHostNqn(), of.GetHostId())
	// Blocks are read-only, whoever reads them.
	if _, err := open(t, ha, of).WriteAt(make([]byte, 512), 0); err == nil {
		t.Fatal("a block is written")
	}
	wantText(t, open(t, ha, of), "first")

	// A block that is taken away is gone for a connection that stays.
	kept := a.attach(second)
	d := open(t, ha, of)
	_, err := a.DetachBlock(t.Context(), &attacherv1.DetachBlockRequest{Block: first, AttachmentId: of.GetAttachmentId()})
	must(t, err)
	if _, err := d.ReadAt(make([]byte, 512), 0); err == nil {
		t.Fatal("a block that was detached is read")
	}
	_, err = a.DetachBlock(t.Context(), &attacherv1.DetachBlockRequest{Block: second, AttachmentId: kept.GetAttachmentId()})
	must(t, err)
	// And with the last one the node.
	turnedAway(t, of, of.GetHostNqn(), of.GetHostId())
	wantText(t, open(t, hb, more), "first")
}

// TestIsolationOfCalls: a node's certificate is good for its own attachments.
func TestIsolationOfCalls(t *testing.T) {
	s := openShop(t, "builder")
	soldier := s.image(1, "text")
	a, b := s.node("node-a"), s.node("node-b")
	of := a.attach(soldier)
	ctx := t.Context()

	// In another's name.
	_, err := b.AttachBlock(ctx, &attacherv1.AttachBlockRequest{Block: soldier, Node: "node-a"})
	wantKind(t, err, kind.Denied)
	_, err = b.DetachBlock(ctx, &attacherv1.DetachBlockRequest{Block: soldier, Node: "node-a", AttachmentId: of.GetAttachmentId()})
	wantKind(t, err, kind.Denied)
	_, err = b.ListAttachments(ctx, &attacherv1.ListAttachmentsRequest{Node: "node-a"})
	wantKind(t, err, kind.Denied)
	_, err = b.AttachWritable(ctx, &attacherv1.AttachWritableRequest{Block: soldier, Id: "c", Node: "node-a"})
	wantKind(t, err, kind.Denied)
	// In its own: what another has is not touched by it.
	_, err = b.DetachBlock(ctx, &attacherv1.DetachBlockRequest{Block: soldier, AttachmentId: of.GetAttachmentId()})
	must(t, err)
	list, err := b.ListAttachments(ctx, &attacherv1.ListAttachmentsRequest{})
	if err != nil || len(list.GetAttachments()) != 0 {
		t.Fatalf("node B sees %v, %v", list, err)
	}
	wantText(t, open(t, a.connect(of), of), "text")

	// What is no complete block, by a name that somebody found out.
	_, err = s.lvols.Create("work", blockBytes)
	must(t, err)
	layer, err := a.AttachWritable(ctx, &attacherv1.AttachWritableRequest{Block: soldier, Id: "c"})
	must(t, err)
	infos, err := s.lvols.List()
	must(t, err)
	stolen := 0
	for _, i := range infos {
		if i.Name != "work" && !strings.HasPrefix(i.Name, "rw-") {
			continue
		}
		stolen++
		_, err = b.AttachBlock(ctx, &attacherv1.AttachBlockRequest{Block: i.Name})
		wantKind(t, err, kind.NotFound)
		_, err = b.AttachWritable(ctx, &attacherv1.AttachWritableRequest{Block: i.Name, Id: "c"})
		wantKind(t, err, kind.NotFound)
		_, err = b.GetBlockMap(ctx, &attacherv1.GetBlockMapRequest{Block: i.Name})
		wantKind(t, err, kind.NotFound)
		_, err = b.DetachBlock(ctx, &attacherv1.DetachBlockRequest{Block: i.Name})
		must(t, err)
	}
	if stolen != 2 {
		t.Fatalf("%+v", infos)
	}

	// The service of converters is for those that are named.
	for _, f := range []rpc.Files{s.files(s.ca, "node-a"), s.files(s.ca, "builder-2")} {
		c := attacherv1.NewAttacherClient(s.dial(f))
		_, err = c.DeleteImage(ctx, &attacherv1.DeleteImageRequest{Reference: "registry/image:1"})
		wantKind(t, err, kind.Denied)
		_, err = c.Export(ctx, &attacherv1.ExportRequest{Lvol: "work", Owner: "o"})
		wantKind(t, err, kind.Denied)
		hold, err := c.Hold(ctx, &attacherv1.HoldRequest{Owner: "o"})
		if err == nil {
			_, err = hold.Recv()
		}
		wantKind(t, err, kind.Denied)
	}

	// Certificates of others, and none.
	foreign := filepath.Join(s.dir, "other")
	_, err = certificate.NewAuthority(foreign, time.Now())
	must(t, err)
	f := s.files(foreign, "node-a")
	f.CA = filepath.Join(s.ca, "ca.crt")
	if _, err := attacherv1.NewNodeClient(s.dial(f)).ListAttachments(ctx, &attacherv1.ListAttachmentsRequest{}); err == nil {
		t.Fatal("another authority's certificate is let in")
	}
	plain, err := grpc.NewClient("passthrough:///"+s.address, rpc.DialOptions()...)
	must(t, err)
	defer plain.Close()
	if _, err := attacherv1.NewNodeClient(plain).ListAttachments(ctx, &attacherv1.ListAttachmentsRequest{}); err == nil {
		t.Fatal("a peer without certificate is let in")
	}
	wantText(t, open(t, a.connect(layer), layer), "text")
}

// TestIsolationOfReplays: a request that comes again after its time takes nothing away.
func TestIsolationOfReplays(t *testing.T) {
	s := openShop(t)
	soldier := s.image(1, "text")
	a := s.node("node-a")
	ctx := t.Context()
	old := a.attach(soldier)
	_, err := a.DetachBlock(ctx, &attacherv1.DetachBlockRequest{Block: soldier, AttachmentId: old.GetAttachmentId()})
	must(t, err)
	now := a.attach(soldier)
	d := open(t, a.connect(now), now)
	_, err = a.DetachBlock(ctx, &attacherv1.DetachBlockRequest{Block: soldier, AttachmentId: old.GetAttachmentId()})
	wantKind(t, err, kind.InUse)
	wantText(t, d, "text")

	layer, err := a.AttachWritable(ctx, &attacherv1.AttachWritableRequest{Block: soldier, Id: "c"})
	must(t, err)
	_, err = a.DetachWritable(ctx, &attacherv1.DetachWritableRequest{Id: "c", AttachmentId: layer.GetAttachmentId()})
	must(t, err)
	again, err := a.AttachWritable(ctx, &attacherv1.AttachWritableRequest{Block: soldier, Id: "c"})
	must(t, err)
	d = open(t, a.connect(again), again)
	_, err = a.DetachWritable(ctx, &attacherv1.DetachWritableRequest{Id: "c", AttachmentId: layer.GetAttachmentId()})
	wantKind(t, err, kind.InUse)
	_, err = a.DeleteWritable(ctx, &attacherv1.DeleteWritableRequest{Id: "c", AttachmentId: layer.GetAttachmentId()})
	wantKind(t, err, kind.InUse)
	wantText(t, d, "text")
}

// TestIsolationOfWriters: what a node writes, in its layers and as a converter, is its own.
func TestIsolationOfWriters(t *testing.T) {
	s := openShop(t, "node-a", "node-b")
	soldier := s.image(1, "text")
	a, b := s.node("node-a"), s.node("node-b")
	ctx := t.Context()
	attach := func(n *node) (*attacherv1.Attachment, *host.Device) {
		t.Helper()
		x, err := n.AttachWritable(ctx, &attacherv1.AttachWritableRequest{Block: soldier, Id: "same"})
		must(t, err)
		return x, open(t, n.connect(x), x)
	}
	xa, da := attach(a)
	_, db := attach(b)
	_, err := da.WriteAt(append([]byte("of A"), make([]byte, 508)...), 0)
	must(t, err)
	must(t, da.Flush())
	wantText(t, db, "text")
	wantText(t, da, "of A")
	of := b.attach(soldier)
	wantText(t, open(t, b.connect(of), of), "text")
	turnedAway(t, xa, of.GetHostNqn(), of.GetHostId())
	_, err = b.DeleteWritable(ctx, &attacherv1.DeleteWritableRequest{Id: "same"})
	must(t, err)
	wantText(t, da, "of A")
	// It stays when it is detached, and is the same one when it is back.
	_, err = a.DetachWritable(ctx, &attacherv1.DetachWritableRequest{Id: "same"})
	must(t, err)
	if _, err := da.ReadAt(make([]byte, 512), 0); err == nil {
		t.Fatal("a layer that was detached is read")
	}
	if _, da = attach(a); da.ReadOnly() {
		t.Fatal("it is read-only")
	}
	wantText(t, da, "of A")

	// Two converters on machines of their own.
	hold := func(n *node, owner string) attacherv1.AttacherClient {
		t.Helper()
		c := attacherv1.NewAttacherClient(s.dial(s.files(s.ca, n.name)))
		h, err := c.Hold(ctx, &attacherv1.HoldRequest{Owner: owner})
		must(t, err)
		_, err = h.Recv()
		must(t, err)
		return c
	}
	ca, cb := hold(a, "convert-a"), hold(b, "convert-b")
	_, err = ca.CreateLvol(ctx, &attacherv1.CreateLvolRequest{Name: "work", SizeBytes: blockBytes, Owner: "convert-a"})
	must(t, err)
	_, err = ca.Export(ctx, &attacherv1.ExportRequest{Lvol: "work", Owner: "convert-a", Node: "node-b"})
	wantKind(t, err, kind.Denied)
	r, err := ca.Export(ctx, &attacherv1.ExportRequest{Lvol: "work", Owner: "convert-a"})
	must(t, err)
	x := r.GetAttachment()
	if r.GetPath() != "" || x.GetNode() != "node-a" || !x.GetWritable() {
		t.Fatalf("%v", r)
	}
	h := a.connect(x)
	w := open(t, h, x)
	_, err = w.WriteAt(append([]byte("converted"), make([]byte, 503)...), 0)
	must(t, err)
	turnedAway(t, x, of.GetHostNqn(), of.GetHostId())
	for _, owner := range []string{"convert-a", "convert-b"} {
		_, err = cb.Export(ctx, &attacherv1.ExportRequest{Lvol: "work", Owner: owner})
		wantKind(t, err, kind.InUse, kind.Exists)
		_, err = cb.Unexport(ctx, &attacherv1.UnexportRequest{Lvol: "work", Owner: owner})
		wantKind(t, err, kind.InUse, kind.Denied)
	}
	wantText(t, w, "converted")
	// A snapshot has what was written, and the export goes on below it.
	must(t, w.Flush())
	_, err = ca.SnapshotLvol(ctx, &attacherv1.SnapshotLvolRequest{Lvol: "work", Snapshot: "global-00000000-0000-4000-8000-000000000009"})
	must(t, err)
	_, err = w.WriteAt(append([]byte("later"), make([]byte, 507)...), 0)
	must(t, err)
	done := b.attach("global-00000000-0000-4000-8000-000000000009")
	wantText(t, open(t, b.connect(done), done), "converted")
	_, err = ca.Unexport(ctx, &attacherv1.UnexportRequest{Lvol: "work", Owner: "convert-a"})
	must(t, err)
	if _, err := w.WriteAt(make([]byte, 512), 0); err == nil {
		t.Fatal("an lvol that is exported no more is written")
	}
}
