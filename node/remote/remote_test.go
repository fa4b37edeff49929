package remote

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	attacherv1 "github.com/thaw-project/thaw/api/attacher/v1"
	"github.com/thaw-project/thaw/attacher/identity"
	"github.com/thaw-project/thaw/attacher/rpc"
	"github.com/thaw-project/thaw/certificate"
	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/nvme/host"
	"github.com/thaw-project/thaw/target/bdev"
)

func wantKind(t *testing.T, err error, k kind.Kind) {
	t.Helper()
	if !errors.Is(err, k) {
		t.Fatalf("got %v, want %s", err, k)
	}
}

func TestAttachReadDetach(t *testing.T) {
	s := newStore(t)
	one, two := s.image(1), s.image(2)
	n := s.node("node-a")
	must(t, n.attachBlock(one))
	n.check(one, 1)
	must(t, n.attachBlock(two)) // appears on the live connection
	n.check(two, 2)
	must(t, n.attachBlock(one))
	if got := s.attachments(); !slices.Equal(got, []string{"node-a " + one, "node-a " + two}) {
		t.Fatalf("the store has %q", got)
	}
	_, err := n.Open(targetName, "soldier-none")
	wantKind(t, err, kind.NotFound)
	wantKind(t, n.attachBlock("soldier-none"), kind.NotFound)
	wantKind(t, n.Attach(t.Context(), "nowhere", one), kind.NotFound)

	d, err := n.Open(targetName, two)
	must(t, err)
	for _, err := range []error{d.Discard(0, 512), d.WriteZeroes(0, 512), func() error { _, err := d.WriteAt(make([]byte, 512), 0); return err }()} {
		wantKind(t, err, kind.ReadOnly)
	}
	must(t, d.Flush())

	n.use(one, false)
	eventually(t, "detaching", func() bool { return slices.Equal(s.attachments(), []string{"node-a " + two}) })
	n.check(two, 2)
	n.use(two, false)
	eventually(t, "detaching the last", func() bool { return len(s.attachments()) == 0 })
	_, err = d.ReadAt(make([]byte, 512), 0)
	wantKind(t, err, kind.NotFound)
	must(t, n.attachBlock(one)) // and again from nothing
	n.check(one, 1)
}

// TestMapOfBlock: clusters have the owners that the store gave them.
func TestMapOfBlock(t *testing.T) {
	s := newStore(t)
	soldier := s.image(1)
	n := s.node("node-a")
	must(t, n.attachBlock(soldier))
	runs, err := n.Map(targetName, soldier)
	must(t, err)
	want, err := s.lvols.Map(soldier, 0, 0)
	must(t, err)
	if len(runs) != len(want.Runs) || len(runs) < 9 {
		t.Fatalf("%d runs, the store has %d", len(runs), len(want.Runs))
	}
	owners := map[[16]byte]bool{}
	for i, r := range runs {
		if w := want.Runs[i]; r != (Run{w.OffsetBytes, w.LengthBytes, w.Data, w.Owner}) {
			t.Errorf("run %d: %+v, the store says %+v", i, r, w)
		}
		if r.Data {
			owners[r.Owner] = true
		}
	}
	if len(owners) != 2 {
		t.Errorf("%d owners, want those of two blocks", len(owners))
	}
}

// TestStoreAway: with a record a node needs no store to open, and reads wait for it.
func TestStoreAway(t *testing.T) {
	s := newStore(t)
	one, two := s.image(1), s.image(2)
	n := s.node("node-a")
	must(t, n.attachBlock(one))
	n.check(one, 1)
	s.stop()
	n.reopen()
	must(t, n.attachBlock(one))
	d, err := n.Open(targetName, one)
	must(t, err)
	if _, err := n.Map(targetName, one); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	n.use(two, true)
	wantKind(t, n.Attach(ctx, targetName, two), kind.Unavailable)
	n.use(two, false)

	read := make(chan error, 1)
	go func() { _, err := d.ReadAt(make([]byte, 4096), 0); read <- err }()
	select {
	case err := <-read:
		t.Fatalf("a read from a store that is away returned %v", err)
	case <-time.After(300 * time.Millisecond):
	}
	s.start()
	must(t, <-read)
	checkDevice(t, d, 1)
	// What the attempt for the other may have left is taken back.
	eventually(t, "only one attachment", func() bool { return slices.Equal(s.attachments(), []string{"node-a " + one}) })
}

func TestLossTimeout(t *testing.T) {
	s := newStore(t)
	one := s.image(1)
	n := s.node("node-a")
	must(t, n.attachBlock(one))
	s.stop()
	n.options.Targets[0].LossTimeout = 200 * time.Millisecond
	n.reopen()
	d, err := n.Open(targetName, one)
	must(t, err)
	_, err = d.ReadAt(make([]byte, 512), 0)
	wantKind(t, err, kind.Unavailable)
}

// TestCloseEndsReads: a server that stops must not wait for a store that is away.
func TestCloseEndsReads(t *testing.T) {
	s := newStore(t)
	one := s.image(1)
	n := s.node("node-a")
	must(t, n.attachBlock(one))
	n.check(one, 1)
	d, err := n.Open(targetName, one)
	must(t, err)
	fresh, err := n.Open(targetName, one)
	must(t, err)
	checkDevice(t, d, 1)
	s.stop()
	reads := make(chan error, 2)
	go func() { _, err := d.ReadAt(make([]byte, 512), 0); reads <- err }()
	go func() { _, err := fresh.ReadAt(make([]byte, 512), 0); reads <- err }()
	time.Sleep(50 * time.Millisecond) // not needed: a read that comes later fails too
	must(t, n.Close())
	for range 2 {
		wantKind(t, <-reads, kind.Unavailable)
	}
	n.open()
}

// TestDeviceCloseEndsReads: a disk that is taken away must not wait for a store that is
// away, and others over the same connection go on waiting.
func TestDeviceCloseEndsReads(t *testing.T) {
	s := newStore(t)
	one := s.image(1)
	n := s.node("node-a")
	must(t, n.attachBlock(one))
	var devices []bdev.Device
	for range 3 {
		d, err := n.Open(targetName, one)
		must(t, err)
		devices = append(devices, d)
	}
	checkDevice(t, devices[0], 1)
	checkDevice(t, devices[1], 1)
	s.stop()
	reads := make([]chan error, len(devices))
	for i, d := range devices {
		reads[i] = make(chan error, 1)
		go func() { _, err := d.ReadAt(make([]byte, 512), 0); reads[i] <- err }()
	}
	must(t, devices[0].Close()) // connected before
	must(t, devices[2].Close()) // never
	wantKind(t, <-reads[0], kind.Unavailable)
	wantKind(t, <-reads[2], kind.Unavailable)
	s.start()
	must(t, <-reads[1])
	checkDevice(t, devices[1], 1)
}

// TestRestartsUnderReads: readers of several blocks, with the store restarted.
func TestRestartsUnderReads(t *testing.T) {
	s := newStore(t)
	one, two := s.image(1), s.image(2)
	n := s.node("node-a")
	must(t, n.attachBlock(one))
	must(t, n.attachBlock(two))
	stop := make(chan struct{})
	done := make(chan error, 2)
	for i, block := range []string{one, two} {
		d, err := n.Open(targetName, block)
		must(t, err)
		go func() {
			p := make([]byte, len(content(0, 0)))
			for {
				select {
				case <-stop:
					done <- nil
					return
				default:
				}
				if _, err := d.ReadAt(p, 4*clusterBytes); err != nil || string(p) != string(content(i+1, 4)) {
					done <- errors.Join(errors.New("wrong data or error"), err)
					return
				}
			}
		}()
	}
	for range 3 {
		s.restart()
	}
	close(stop)
	must(t, errors.Join(<-done, <-done))
	n.check(one, 1)
}

// TestAttachmentLostAtTheStore: what an operator took away from a node that is alive
// comes back when it reads.
func TestAttachmentLostAtTheStore(t *testing.T) {
	s := newStore(t)
	one, two := s.image(1), s.image(2)
	n := s.node("node-a")
	must(t, n.attachBlock(one))
	must(t, n.attachBlock(two))
	n.check(one, 1)
	_, err := s.attacher.DetachBlock(t.Context(), &attacherv1.DetachBlockRequest{Node: "node-a", Block: one})
	must(t, err)
	n.check(two, 2)
	n.check(one, 1)
	if got := s.attachments(); len(got) != 2 {
		t.Fatalf("the store has %q", got)
	}
}

// TestSubsystemLostAtTheStore: the last block that an operator takes away takes the
// subsystem along, so that the node is refused when it connects.
func TestSubsystemLostAtTheStore(t *testing.T) {
	s := newStore(t)
	one := s.image(1)
	n := s.node("node-a")
	must(t, n.attachBlock(one))
	n.check(one, 1)
	_, err := s.attacher.DetachBlock(t.Context(), &attacherv1.DetachBlockRequest{Node: "node-a", Block: one})
	must(t, err)
	n.check(one, 1)
}

// TestOrphans: what a store has for a node that nobody there uses goes when it starts.
// TestBlockMadeAgain: under the name of a block that a node reads there is another one
// all of a sudden. The node must get errors and not a mixture of the two.
func TestBlockMadeAgain(t *testing.T) {
	s := newStore(t)
	n := s.node("node-1")
	block := s.image(1)
	must(t, n.attachBlock(block))
	n.check(block, 1)
	before, err := n.Map(targetName, block)
	must(t, err)

	ctx := context.Background()
	// The node attaches again at once what is taken from it, and may be faster than who deletes.
	deleted := false
	eventually(t, "the block goes", func() bool {
		_, err := s.attacher.DetachBlock(ctx, &attacherv1.DetachBlockRequest{Block: block, Node: "node-1"})
		must(t, err)
		if !deleted {
			_, err = s.attacher.DeleteImage(ctx, &attacherv1.DeleteImageRequest{Reference: "registry/image:1"})
			deleted = err == nil
		}
		if deleted {
			err = s.lvols.Delete(block) // made by hand, so not the attacher's to delete
		}
		if err != nil {
			wantKind(t, err, kind.InUse)
		}
		return err == nil
	})
	must(t, s.lvols.Delete(strings.Replace(block, "soldier", "global", 1)))
	s.image(1)

	d, err := n.Open(targetName, block)
	must(t, err)
	defer d.Close()
	if _, err := d.ReadAt(make([]byte, 4096), 0); kind.Of(err) != kind.IO || !strings.Contains(err.Error(), "made again") {
		t.Fatalf("a read of the block that is gone: %v", err)
	}
	n.use(block, false)
	eventually(t, "nobody has it attached", func() bool { return len(s.attachments()) == 0 })
	must(t, n.attachBlock(block))
	n.check(block, 1)
	after, err := n.Map(targetName, block)
	must(t, err)
	if before[0].Owner == after[0].Owner {
		t.Fatal("two blocks have one owner")
	}
}

func TestOrphans(t *testing.T) {
	s := newStore(t)
	one, two := s.image(1), s.image(2)
	n := s.node("node-a")
	must(t, n.attachBlock(one))
	for _, node := range []string{"node-a", "node-b"} {
		_, err := s.attacher.AttachBlock(t.Context(), &attacherv1.AttachBlockRequest{Node: node, Block: two})
		must(t, err)
	}
	n.reopen()
	eventually(t, "taking the orphan back", func() bool {
		return slices.Equal(s.attachments(), []string{"node-a " + one, "node-b " + two})
	})
	n.check(one, 1)
}

// TestNodesAreApart: a node sees, changes and reads its own only.
func TestNodesAreApart(t *testing.T) {
	s := newStore(t)
	one := s.image(1)
	a, b := s.node("node-a"), s.node("node-b")
	must(t, b.attachBlock(one))
	b.check(one, 1)
	client, err := a.Node(targetName)
	must(t, err)
	ctx := t.Context()
	_, err = client.AttachBlock(ctx, &attacherv1.AttachBlockRequest{Node: "node-b", Block: one})
	wantKind(t, err, kind.Denied)
	_, err = client.DetachBlock(ctx, &attacherv1.DetachBlockRequest{Node: "node-b", Block: one})
	wantKind(t, err, kind.Denied)
	_, err = client.ListAttachments(ctx, &attacherv1.ListAttachmentsRequest{Node: "node-b"})
	wantKind(t, err, kind.Denied)
	if _, err := client.DetachBlock(ctx, &attacherv1.DetachBlockRequest{Block: one}); err != nil { // its own, of which there is none
		t.Fatal(err)
	}
	list, err := client.ListAttachments(ctx, &attacherv1.ListAttachmentsRequest{})
	if err != nil || len(list.GetAttachments()) != 0 {
		t.Fatalf("node-a sees %v, %v", list, err)
	}
	if got := s.attachments(); !slices.Equal(got, []string{"node-b " + one}) {
		t.Fatalf("the store has %q", got)
	}
	// Nor does the network serve what only the store's own machine may do.
	conn, err := rpc.DialTLS(s.attach, a.options.Targets[0].Files)
	must(t, err)
	defer conn.Close()
	_, err = attacherv1.NewAttacherClient(conn).DeleteImage(ctx, &attacherv1.DeleteImageRequest{Reference: "registry/image:1"})
	wantKind(t, err, kind.Unsupported)

	// A host with another NQN than the subsystem's node is refused.
	x, err := b.Export(targetName, one)
	must(t, err)
	for _, c := range []host.Config{
		{HostNQN: identity.HostNQN("node-a"), HostID: identity.HostID("node-a")},
		{HostID: uuid.New()},
	} {
		c.Portals, c.SubNQN = []string{s.data}, x.Subsystem
		h, err := host.Connect(ctx, c)
		if err == nil {
			h.Close()
			t.Fatalf("host %s may read what is %s's", c.HostNQN, x.HostNQN)
		}
	}
	b.check(one, 1)
}

// TestStrangers: who has no certificate of the authority gets no answer.
func TestStrangers(t *testing.T) {
	s := newStore(t)
	one := s.image(1)
	own := s.issue("node-a")
	other := filepath.Join(t.TempDir(), "other")
	_, err := certificate.NewAuthority(other, time.Now())
	must(t, err)
	f, err := certificate.New(other, filepath.Join(other, "out"), certificate.Issue{Node: "node-a"}, time.Now())
	must(t, err)
	stranger := rpc.Files{Certificate: f.Certificate, Key: f.Key, CA: own.CA} // believes the store, is not believed
	suspicious := rpc.Files{Certificate: own.Certificate, Key: own.Key, CA: f.CA}

	attach := func(conn *grpc.ClientConn, err error) error {
		must(t, err)
		defer conn.Close()
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		_, err = attacherv1.NewNodeClient(conn).AttachBlock(ctx, &attacherv1.AttachBlockRequest{Block: one})
		return err
	}
	for what, files := range map[string]rpc.Files{"a node of another authority": stranger, "a store of another authority": suspicious} {
		if err := attach(rpc.DialTLS(s.attach, files)); err == nil {
			t.Errorf("%s was believed", what)
		}
	}
	none := credentials.NewTLS(&tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS12})
	if err := attach(grpc.NewClient("passthrough:///"+s.attach, grpc.WithTransportCredentials(none))); err == nil {
		t.Error("a node without a certificate was believed")
	}
	if err := attach(rpc.DialTLS(s.attach, own)); err != nil {
		t.Error(err)
	}
	// The certificate names its host: another address is another store.
	_, port, err := net.SplitHostPort(s.attach)
	must(t, err)
	if err := attach(rpc.DialTLS(net.JoinHostPort("localhost", port), own)); err == nil {
		t.Error("a certificate was believed for a host that it does not name")
	}
}

func TestDamagedRecords(t *testing.T) {
	s := newStore(t)
	one := s.image(1)
	n := s.node("node-a")
	must(t, n.attachBlock(one))
	must(t, n.Close())
	db, err := openDB(n.options.DBPath)
	must(t, err)
	must(t, putRecord(db, targetName, one, record{Subsystem: "x"}, nil))
	must(t, db.Close())
	_, err = New(n.options)
	if !errors.Is(err, kind.Corrupt) || !strings.Contains(err.Error(), n.options.DBPath) {
		t.Errorf("got %v", err)
	}
	db, err = openDB(n.options.DBPath)
	must(t, err)
	must(t, dropRecord(db, targetName, one))
	must(t, db.Close())
	n.open()
}
