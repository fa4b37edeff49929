package attacher_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	attacherv1 "github.com/thaw-project/thaw/api/attacher/v1"
	"github.com/thaw-project/thaw/attacher"
	"github.com/thaw-project/thaw/attacher/export"
	"github.com/thaw-project/thaw/attacher/rpc"
	"github.com/thaw-project/thaw/image/block"
	"github.com/thaw-project/thaw/keeper"
	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/lvol"
	"github.com/thaw-project/thaw/node/present"
	"github.com/thaw-project/thaw/node/present/fuse"
	"github.com/thaw-project/thaw/nvme/host"
	"github.com/thaw-project/thaw/target/bdev"
)

// The test binary is also the keeper and the server that tests kill.
const (
	keeperArg = "test-keeper"
	serverArg = "test-server"
)

// portalFile is where the server's directory says at which address it exports, if it does.
const portalFile = "portal"

func childMain() {
	if len(os.Args) != 3 {
		return
	}
	var err error
	switch os.Args[1] {
	case keeperArg:
		err = keeper.Run(context.Background(), keeper.Options{Socket: os.Args[2]})
	case serverArg:
		err = serve(os.Args[2])
	default:
		return
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// data is the store and the presentation of a directory.
type data struct {
	store     *lvol.Store
	keeper    *keeper.Client
	presenter *fuse.Presenter
}

func openData(dir string) (*data, error) {
	var d data
	var err error
	if d.store, err = lvol.Open(lvol.Options{Dir: filepath.Join(dir, "pool")}); err != nil {
		return nil, err
	}
	socket := filepath.Join(dir, "keeper.sock")
	if d.keeper, err = keeper.Ensure(context.Background(), keeper.Options{Socket: socket, Command: []string{os.Args[0], keeperArg, socket}}); err != nil {
		return nil, err
	}
	d.presenter, err = fuse.New(fuse.Options{
		Dir: filepath.Join(dir, "dev"), StatePath: filepath.Join(dir, "fuse.json"), Keeper: d.keeper,
		Open: func(source present.Source, readOnly bool) (bdev.Device, error) {
			v, err := d.store.OpenLvol(source.Lvol, readOnly)
			if err != nil {
				return nil, err
			}
			return v, nil
		},
	})
	return &d, err
}

// serve is the server process: store, presentation and attacher of a directory.
func serve(dir string) error {
	d, err := openData(dir)
	if err != nil {
		return err
	}
	o := attacher.Options{
		Lvols: d.store, Presenter: d.presenter, DBPath: filepath.Join(dir, "attacher.db"), Target: "here", HoldGrace: 5 * time.Second,
	}
	if portal, err := os.ReadFile(filepath.Join(dir, portalFile)); err == nil {
		if o.Exporter, err = export.New(export.Options{
			Store: d.store.Stat().UUID, Portals: []string{string(portal)},
			Open: func(name string, readOnly bool) (bdev.Device, uuid.UUID, error) {
				v, err := d.store.OpenLvol(name, readOnly)
				if err != nil {
					return nil, uuid.UUID{}, err
				}
				return v, uuid.MustParse(v.UUID()), nil
			},
		}); err != nil {
			return err
		}
	}
	a, err := attacher.New(o)
	if err != nil {
		return err
	}
	socket := filepath.Join(dir, "thaw.sock")
	os.Remove(socket)
	listener, err := net.Listen("unix", socket)
	if err != nil {
		return err
	}
	fmt.Println("ready")
	server := attacher.NewServer(a)
	attacherv1.RegisterNodeServer(server, a)
	return server.Serve(listener)
}

func needFUSE(t testing.TB) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root: run the tests as root")
	}
	if _, err := os.Stat("/dev/fuse"); err != nil {
		t.Skip("no /dev/fuse: load the fuse module")
	}
	dir, err := os.MkdirTemp("", "thaw-attacher-") // short, for the sockets in it
	must(t, err)
	must(t, lvol.Create(lvol.CreateOptions{Dir: filepath.Join(dir, "pool"), CapacityBytes: 4 << 30}))
	t.Cleanup(func() {
		unix.Unmount(filepath.Join(dir, "dev"), unix.MNT_DETACH) // of a failed test
		os.RemoveAll(dir)
	})
	return dir
}

// finish ends the presentation and the keeper.
func (d *data) finish(t testing.TB) {
	t.Helper()
	if err := d.presenter.Teardown(ctx); err != nil {
		t.Error(err)
	}
	if err := d.keeper.Exit(ctx); err != nil {
		t.Error(err)
	}
	if err := d.store.Close(); err != nil {
		t.Error(err)
	}
}

type server struct {
	t   testing.TB
	dir string
	cmd *exec.Cmd
}

func startServer(t testing.TB, dir string) *server {
	t.Helper()
	s := &server{t: t, dir: dir, cmd: exec.Command(os.Args[0], serverArg, dir)}
	s.cmd.Stderr = os.Stderr
	out, err := s.cmd.StdoutPipe()
	must(t, err)
	must(t, s.cmd.Start())
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil || line != "ready\n" {
		s.kill()
		t.Fatalf("server said %q, %v", line, err)
	}
	return s
}

func (s *server) kill() {
	s.cmd.Process.Signal(syscall.SIGKILL)
	s.cmd.Wait()
}

// outlast repeats calls while the server is away, or back and without the hold yet:
// the contract says that every call may be repeated.
func outlast(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		err := invoke(ctx, method, req, reply, cc, opts...)
		c := status.Code(err)
		if c != codes.Unavailable && !(c == codes.FailedPrecondition && strings.Contains(err.Error(), "holds nothing")) || time.Now().After(deadline) {
			return err
		}
	}
}

// killedConverter converts chains of its own while the server is killed under it.
type killedConverter struct {
	attacherv1.AttacherClient
	t     testing.TB
	id    int
	owner string
}

// keepHold holds until ctx ends, again after each restart.
func (c *killedConverter) keepHold(ctx context.Context, held func()) {
	for ctx.Err() == nil {
		s, err := c.Hold(ctx, &attacherv1.HoldRequest{Owner: c.owner})
		for err == nil {
			if _, err = s.Recv(); err == nil {
				held()
			}
		}
		time.Sleep(time.Millisecond)
	}
}

func (c *killedConverter) fill(n int) []byte {
	return bytes.Repeat([]byte(fmt.Sprintf("%d:%08d\n", c.id, n)), 8192)
}

// chain converts layers into the image called reference.
func (c *killedConverter) chain(reference string, first, layers int) ([]string, error) {
	below := ""
	var blocks []string
	for n := first; n < first+layers; n++ {
		scope := block.Local
		if below == "" {
			scope = block.Global
		}
		name, work := blockName(scope, c.id*1000+n), fmt.Sprintf("work-%d-%d", c.id, n)
		blocks = append(blocks, name)
		var err error
		if below == "" {
			_, err = c.CreateLvol(ctx, &attacherv1.CreateLvolRequest{Name: work, SizeBytes: size, Owner: c.owner})
		} else {
			_, err = c.CloneLvol(ctx, &attacherv1.CloneLvolRequest{Snapshot: below, Name: work, Owner: c.owner})
		}
		if err != nil {
			return nil, err
		}
		x, err := c.Export(ctx, &attacherv1.ExportRequest{Lvol: work, Owner: c.owner})
		if err != nil {
			return nil, err
		}
		f, err := os.OpenFile(x.GetPath(), os.O_RDWR, 0)
		if err != nil {
			return nil, err
		}
		_, err = f.WriteAt(c.fill(n), int64(n-first)*1<<20)
		if cerr := f.Close(); err == nil {
			err = cerr
		}
		if err != nil {
			return nil, err
		}
		if _, err = c.SnapshotLvol(ctx, &attacherv1.SnapshotLvolRequest{Lvol: work, Snapshot: name}); err != nil {
			return nil, err
		}
		if _, err = c.Unexport(ctx, &attacherv1.UnexportRequest{Lvol: work, Owner: c.owner}); err != nil {
			return nil, err
		}
		below = name
		if n == first+layers-1 {
			soldier := blockName(block.Soldier, c.id*1000+n)
			if _, err = c.CloneLvol(ctx, &attacherv1.CloneLvolRequest{Snapshot: below, Name: soldier, ReadOnly: true}); err != nil {
				return nil, err
			}
			blocks = append(blocks, soldier)
		}
		if _, err = c.DeleteLvol(ctx, &attacherv1.DeleteLvolRequest{Name: work}); err != nil {
			return nil, err
		}
	}
	_, err := c.PutImage(ctx, &attacherv1.PutImageRequest{Image: image(reference, blocks)})
	return blocks, err
}

// verify reads an image's soldier through an export.
func (c *killedConverter) verify(soldier string, first, layers int) error {
	x, err := c.Export(ctx, &attacherv1.ExportRequest{Lvol: soldier, Owner: c.owner, ReadOnly: true})
	if err != nil {
		return err
	}
	f, err := os.Open(x.GetPath())
	if err != nil {
		return err
	}
	for n := first; n < first+layers; n++ {
		want := c.fill(n)
		got := make([]byte, len(want))
		if _, err := f.ReadAt(got, int64(n-first)*1<<20); err != nil || !bytes.Equal(got, want) {
			f.Close()
			return fmt.Errorf("soldier %s, layer %d: holds %.12q (%v), want %.12q", soldier, n, got, err, want)
		}
	}
	f.Close()
	_, err = c.Unexport(ctx, &attacherv1.UnexportRequest{Lvol: soldier, Owner: c.owner})
	return err
}

// TestServerKilledUnderConversions kills the server with SIGKILL again and again while
// converters go on: none may see an error, every block holds what was written, and in
// the end nothing is left.
func TestServerKilledUnderConversions(t *testing.T) {
	dir := needFUSE(t)
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	kills, converters := 12, 2
	if testing.Short() {
		kills = 3
	}
	s := startServer(t, dir)
	defer func() { s.kill() }()

	running, stop := context.WithCancel(ctx)
	defer stop()
	var wg, holds sync.WaitGroup
	rounds := make([]int, converters)
	hold, endHolds := context.WithCancel(ctx)
	defer endHolds()
	for id := range converters {
		conn, err := grpc.NewClient("unix:"+filepath.Join(dir, "thaw.sock"), append(rpc.DialOptions(), grpc.WithChainUnaryInterceptor(outlast))...)
		must(t, err)
		defer conn.Close()
		c := &killedConverter{AttacherClient: attacherv1.NewAttacherClient(conn), t: t, id: id + 1, owner: fmt.Sprintf("c%d", id)}
		held := make(chan struct{}, 1)
		holds.Go(func() {
			c.keepHold(hold, func() {
				select {
				case held <- struct{}{}:
				default:
				}
			})
		})
		<-held
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(seed, uint64(id+1)))
			for n := 0; running.Err() == nil; rounds[id]++ {
				layers := 1 + rng.IntN(3)
				reference := fmt.Sprintf("reg/%d", c.id) // replaces the one before
				blocks, err := c.chain(reference, n, layers)
				if err == nil {
					err = c.verify(blocks[len(blocks)-1], n, layers)
				}
				if err == nil && rng.IntN(3) == 0 {
					_, err = c.DeleteImage(ctx, &attacherv1.DeleteImageRequest{Reference: reference})
				}
				if err != nil {
					t.Errorf("converter %d: %v", c.id, err)
					return
				}
				n += layers
			}
		})
	}
	for range kills {
		time.Sleep(time.Duration(rng.IntN(150)) * time.Millisecond)
		s.kill()
		s = startServer(t, dir)
	}
	stop()
	wg.Wait()
	t.Logf("%d kills, conversions %v", kills, rounds)
	if slices.Contains(rounds, 0) {
		t.Fatal("a converter did not finish a single image")
	}

	// A converter that is killed together with the server leaves its work to the grace.
	conn, err := rpc.Dial(filepath.Join(dir, "thaw.sock"))
	must(t, err)
	defer conn.Close()
	client := attacherv1.NewAttacherClient(conn)
	_, err = client.CreateLvol(ctx, &attacherv1.CreateLvolRequest{Name: "work-left", SizeBytes: size, Owner: "c0"})
	must(t, err)
	_, err = client.Export(ctx, &attacherv1.ExportRequest{Lvol: "work-left", Owner: "c0"})
	must(t, err)
	s.kill()
	endHolds()
	holds.Wait()
	s = startServer(t, dir)
	l := &lab{TB: t, AttacherClient: client}
	for id := range converters {
		if _, err := client.DeleteImage(ctx, &attacherv1.DeleteImageRequest{Reference: fmt.Sprintf("reg/%d", id+1)}, grpc.WaitForReady(true)); err != nil {
			t.Error(err)
		}
	}
	_, err = client.PruneBlocks(ctx, &attacherv1.PruneBlocksRequest{})
	must(t, err)
	for deadline := time.Now().Add(20 * time.Second); len(l.names()) > 0; time.Sleep(50 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("lvols %q are left", l.names())
		}
	}
	l.wantClean()
	store, err := client.GetStore(ctx, &attacherv1.GetStoreRequest{})
	must(t, err)
	if store.GetFreeClusters() != store.GetTotalClusters() {
		t.Errorf("%d of %d clusters are free", store.GetFreeClusters(), store.GetTotalClusters())
	}
	s.kill()
	d, err := openData(dir)
	must(t, err)
	disks, err := d.presenter.List(ctx)
	must(t, err)
	if len(disks) > 0 {
		t.Errorf("disks %v are left", disks)
	}
	d.finish(t)
}

// killedNode attaches, writes and reads over NVMe/TCP while the server is killed under it.
type killedNode struct {
	attacherv1.NodeClient
	converter *killedConverter
	name      string
}

// disk connects to what a says and opens it.
func (n *killedNode) disk(a *attacherv1.Attachment) (*host.Host, *host.Device, error) {
	id, err := uuid.Parse(a.GetHostId())
	if err != nil {
		return nil, nil, err
	}
	p := a.GetPortals()[0]
	config := host.Config{
		Portals: []string{net.JoinHostPort(p.GetAddress(), p.GetService())}, SubNQN: a.GetSubsystemNqn(), HostNQN: a.GetHostNqn(), HostID: id,
		KeepAlive: time.Second, ReconnectMax: 100 * time.Millisecond, LossTimeout: 30 * time.Second,
		Quiesce: -1, // the target that may have had a write is dead
	}
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		h, err := host.Connect(ctx, config)
		if err == nil {
			d, oerr := h.OpenUUID(uuid.MustParse(a.GetUuid()))
			if oerr == nil {
				return h, d, nil
			}
			h.Close()
			err = oerr
		}
		if time.Now().After(deadline) {
			return nil, nil, fmt.Errorf("connect to %s: %w", a.GetSubsystemNqn(), err)
		}
	}
}

// with attaches a disk, has f use it and disconnects.
func (n *killedNode) with(a *attacherv1.Attachment, err error, f func(*host.Device) error) error {
	if err != nil {
		return err
	}
	h, d, err := n.disk(a)
	if err != nil {
		return err
	}
	defer h.Close()
	return f(d)
}

func readBack(d *host.Device, want []byte, off int64) error {
	got := make([]byte, len(want))
	if _, err := d.ReadAt(got, off); err != nil {
		return err
	}
	if !bytes.Equal(got, want) {
		return fmt.Errorf("read %.16q at %d, want %.16q", got, off, want)
	}
	return nil
}

// layer writes to a layer over a block that holds below, detaches it, finds it again and
// deletes it.
func (n *killedNode) layer(block, id string, below, data []byte) error {
	x, err := n.AttachWritable(ctx, &attacherv1.AttachWritableRequest{Node: n.name, Block: block, Id: id})
	if err := n.with(x, err, func(d *host.Device) error {
		if err := readBack(d, below, 0); err != nil {
			return err
		}
		if _, err := d.WriteAt(data, 0); err != nil {
			return err
		}
		return d.Flush()
	}); err != nil {
		return fmt.Errorf("layer %s: %w", id, err)
	}
	if _, err := n.DetachWritable(ctx, &attacherv1.DetachWritableRequest{Node: n.name, Id: id, AttachmentId: x.GetAttachmentId()}); err != nil {
		return err
	}
	x, err = n.AttachWritable(ctx, &attacherv1.AttachWritableRequest{Node: n.name, Block: block, Id: id})
	if err := n.with(x, err, func(d *host.Device) error { return readBack(d, data, 0) }); err != nil {
		return fmt.Errorf("layer %s, again: %w", id, err)
	}
	_, err = n.DeleteWritable(ctx, &attacherv1.DeleteWritableRequest{Node: n.name, Id: id, AttachmentId: x.GetAttachmentId()})
	return err
}

// convert makes a block over an export to this node, and reads it as an attachment.
func (n *killedNode) convert(number int) error {
	c := n.converter
	name, work := blockName(block.Global, c.id*1000+number), fmt.Sprintf("work-%d-%d", c.id, number)
	if _, err := c.CreateLvol(ctx, &attacherv1.CreateLvolRequest{Name: work, SizeBytes: size, Owner: c.owner}); err != nil {
		return err
	}
	x, err := c.Export(ctx, &attacherv1.ExportRequest{Lvol: work, Owner: c.owner, Node: n.name})
	if err := n.with(x.GetAttachment(), err, func(d *host.Device) error {
		if _, err := d.WriteAt(c.fill(number), 0); err != nil {
			return err
		}
		return d.Flush()
	}); err != nil {
		return fmt.Errorf("export of %s: %w", work, err)
	}
	if _, err := c.SnapshotLvol(ctx, &attacherv1.SnapshotLvolRequest{Lvol: work, Snapshot: name}); err != nil {
		return err
	}
	if _, err := c.Unexport(ctx, &attacherv1.UnexportRequest{Lvol: work, Owner: c.owner}); err != nil {
		return err
	}
	if _, err := c.DeleteLvol(ctx, &attacherv1.DeleteLvolRequest{Name: work}); err != nil {
		return err
	}
	a, err := n.AttachBlock(ctx, &attacherv1.AttachBlockRequest{Node: n.name, Block: name})
	if err := n.with(a, err, func(d *host.Device) error { return readBack(d, c.fill(number), 0) }); err != nil {
		return fmt.Errorf("block %s: %w", name, err)
	}
	if err := n.layer(name, fmt.Sprintf("c%d", number), c.fill(number), bytes.Repeat([]byte{byte(number)}, 64<<10)); err != nil {
		return err
	}
	_, err = n.DetachBlock(ctx, &attacherv1.DetachBlockRequest{Node: n.name, Block: name, AttachmentId: a.GetAttachmentId()})
	return err
}

// TestServerKilledUnderNodes kills the server with SIGKILL again and again while nodes
// convert over exports, attach, write and delete: none may see an error or other data, and in
// the end nothing is left.
func TestServerKilledUnderNodes(t *testing.T) {
	dir := needFUSE(t)
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	kills, nodes := 12, 2
	if testing.Short() {
		kills = 3
	}
	free, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	must(t, os.WriteFile(filepath.Join(dir, portalFile), []byte(free.Addr().String()), 0o600))
	must(t, free.Close())
	s := startServer(t, dir)
	defer func() { s.kill() }()

	running, stop := context.WithCancel(ctx)
	defer stop()
	hold, endHolds := context.WithCancel(ctx)
	defer endHolds()
	var wg, holds sync.WaitGroup
	rounds := make([]int, nodes)
	for id := range nodes {
		conn, err := grpc.NewClient("unix:"+filepath.Join(dir, "thaw.sock"), append(rpc.DialOptions(), grpc.WithChainUnaryInterceptor(outlast))...)
		must(t, err)
		defer conn.Close()
		c := &killedConverter{AttacherClient: attacherv1.NewAttacherClient(conn), t: t, id: id + 1, owner: fmt.Sprintf("c%d", id)}
		n := &killedNode{NodeClient: attacherv1.NewNodeClient(conn), converter: c, name: fmt.Sprintf("n%d", id)}
		held := make(chan struct{}, 1)
		holds.Go(func() {
			c.keepHold(hold, func() {
				select {
				case held <- struct{}{}:
				default:
				}
			})
		})
		<-held
		wg.Go(func() {
			for ; running.Err() == nil; rounds[id]++ {
				if err := n.convert(rounds[id]); err != nil {
					t.Errorf("node %s: %v", n.name, err)
					return
				}
			}
		})
	}
	for range kills {
		time.Sleep(time.Duration(rng.IntN(150)) * time.Millisecond)
		s.kill()
		s = startServer(t, dir)
	}
	stop()
	wg.Wait()
	t.Logf("%d kills, conversions %v", kills, rounds)
	if slices.Contains(rounds, 0) {
		t.Fatal("a node did not finish a single block")
	}

	conn, err := rpc.Dial(filepath.Join(dir, "thaw.sock"))
	must(t, err)
	defer conn.Close()
	client := attacherv1.NewAttacherClient(conn)
	// One that is killed together with the server leaves its export to the grace.
	_, err = client.CreateLvol(ctx, &attacherv1.CreateLvolRequest{Name: "work-left", SizeBytes: size, Owner: "c0"})
	must(t, err)
	_, err = client.Export(ctx, &attacherv1.ExportRequest{Lvol: "work-left", Owner: "c0", Node: "n0"})
	must(t, err)
	s.kill()
	endHolds()
	holds.Wait()
	s = startServer(t, dir)
	_, err = client.PruneBlocks(ctx, &attacherv1.PruneBlocksRequest{}, grpc.WaitForReady(true))
	must(t, err)
	l := &lab{TB: t, AttacherClient: client}
	for deadline := time.Now().Add(20 * time.Second); len(l.names()) > 0; time.Sleep(50 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("lvols %q are left", l.names())
		}
	}
	list, err := attacherv1.NewNodeClient(conn).ListAttachments(ctx, &attacherv1.ListAttachmentsRequest{})
	if err != nil || len(list.GetAttachments()) > 0 {
		t.Fatalf("attachments %v are left, %v", list, err)
	}
	l.wantClean()
	s.kill()
	d, err := openData(dir)
	must(t, err)
	d.finish(t)
}

func TestScratch(t *testing.T) {
	dir := needFUSE(t)
	for _, tool := range []string{"mkfs.ext4", "e2fsck", "debugfs"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("%s is not installed: install e2fsprogs", tool)
		}
	}
	d, err := openData(dir)
	must(t, err)
	defer d.finish(t)
	o := attacher.Options{Lvols: d.store, Presenter: d.presenter, DBPath: filepath.Join(dir, "attacher.db"), Target: "here"}
	a, err := attacher.New(o)
	must(t, err)
	const scratchBytes = 20 << 30
	var wg sync.WaitGroup
	begin := time.Now()
	for range 4 {
		wg.Go(func() {
			if name, err := a.Scratch(ctx, scratchBytes); err != nil || name != attacher.ScratchName(scratchBytes) {
				t.Errorf("%q, %v", name, err)
			}
		})
	}
	wg.Wait()
	t.Logf("made in %s", time.Since(begin))
	infos, err := d.store.List()
	must(t, err)
	if len(infos) != 1 || infos[0].Name != "scratch-21474836480" || !infos[0].Snapshot {
		t.Fatalf("%+v", infos)
	}
	t.Logf("%d clusters of %d bytes", infos[0].AllocatedClusters, infos[0].ClusterBytes)
	if used := infos[0].AllocatedClusters * infos[0].ClusterBytes; used > 16<<20 {
		t.Errorf("an empty file system occupies %d bytes", used)
	}
	disk, err := d.presenter.Present(ctx, "look", present.Source{Kind: present.SourceLvol, Lvol: infos[0].Name}, true)
	must(t, err)
	if out, err := exec.Command("e2fsck", "-fn", disk.Path).CombinedOutput(); err != nil {
		t.Errorf("e2fsck: %v\n%s", err, out)
	}
	for _, name := range []string{"/upper", "/work"} {
		out, err := exec.Command("debugfs", "-R", "stat "+name, disk.Path).CombinedOutput()
		if err != nil || !bytes.Contains(out, []byte("Type: directory    Mode:  0755")) || !bytes.Contains(out, []byte("User:     0   Group:     0")) {
			t.Errorf("%s: %v\n%s", name, err, out)
		}
	}
	must(t, d.presenter.Withdraw(ctx, "look"))
	begin = time.Now()
	_, err = a.Scratch(ctx, scratchBytes)
	must(t, err)
	t.Logf("found in %s", time.Since(begin))
	for _, bad := range []int64{0, -1, 1 << 20, 64<<20 + 512, 16<<40 + 1<<20} {
		_, err = a.Scratch(ctx, bad)
		wantKind(t, err, kind.Invalid)
	}
	// A node may ask, over the network: the store makes it all the same.
	node := &x509.Certificate{Subject: pkix.Name{CommonName: "node-1"}}
	asks := peer.NewContext(ctx, &peer.Peer{AuthInfo: credentials.TLSInfo{State: tls.ConnectionState{
		PeerCertificates: []*x509.Certificate{node}, VerifiedChains: [][]*x509.Certificate{{node}},
	}}})
	r, err := a.EnsureScratch(asks, &attacherv1.EnsureScratchRequest{SizeBytes: 256 << 20})
	must(t, err)
	if info, err := d.store.Get(r.GetBlock()); err != nil || !info.Snapshot {
		t.Fatal(info, err)
	}
	// Not any number of sizes.
	for n := range int64(attacher.MaxScratches - 2) {
		_, err = d.store.Create("tmp", 300<<20+n<<20)
		must(t, err)
		_, err = d.store.Snapshot("tmp", attacher.ScratchName(300<<20+n<<20))
		must(t, err)
		must(t, d.store.Delete("tmp"))
	}
	_, err = a.EnsureScratch(asks, &attacherv1.EnsureScratchRequest{SizeBytes: 512 << 20})
	wantKind(t, err, kind.NoSpace)
	_, err = a.EnsureScratch(asks, &attacherv1.EnsureScratchRequest{SizeBytes: 256 << 20})
	must(t, err)
	_, err = d.store.Create("scratch-134217728", 128<<20)
	must(t, err)
	_, err = a.Scratch(ctx, 128<<20)
	wantKind(t, err, kind.Exists, "scratch-134217728")
	must(t, a.Close())
}
