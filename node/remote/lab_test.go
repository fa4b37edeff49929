package remote

import (
	"context"
	"fmt"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/opencontainers/go-digest"
	"google.golang.org/grpc"

	attacherv1 "github.com/thaw-project/thaw/api/attacher/v1"
	"github.com/thaw-project/thaw/attacher"
	"github.com/thaw-project/thaw/attacher/export"
	"github.com/thaw-project/thaw/attacher/rpc"
	"github.com/thaw-project/thaw/certificate"
	"github.com/thaw-project/thaw/lvol"
	"github.com/thaw-project/thaw/node/present"
	"github.com/thaw-project/thaw/node/present/presenttest"
	"github.com/thaw-project/thaw/target/bdev"
)

const (
	targetName   = "store-1"
	blockBytes   = 16 << 20
	clusterBytes = 64 << 10
)

// store is a whole store on the loopback: lvols, attacher, NVMe/TCP target and the
// calls of nodes over TLS. It can be stopped and started again at the same addresses.
type store struct {
	*testing.T
	dir, ca   string
	lvols     *lvol.Store
	presenter *presenttest.Presenter
	attacher  *attacher.Attacher
	exporter  *export.NVMe
	server    *grpc.Server
	served    sync.WaitGroup
	attach    string // address of the attacher
	data      string // address of the target
	running   bool
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func freeAddress(t *testing.T) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	defer l.Close()
	return l.Addr().String()
}

func newStore(t *testing.T) *store {
	s := &store{T: t, dir: t.TempDir(), attach: freeAddress(t), data: freeAddress(t)}
	s.ca = filepath.Join(s.dir, "ca")
	_, err := certificate.NewAuthority(s.ca, time.Now())
	must(t, err)
	s.issue("store", "127.0.0.1")
	pool := filepath.Join(s.dir, "pool")
	must(t, lvol.Create(lvol.CreateOptions{Dir: pool, CapacityBytes: 1 << 30, ClusterBytes: clusterBytes}))
	s.lvols, err = lvol.Open(lvol.Options{Dir: pool})
	must(t, err)
	s.presenter = presenttest.New(func(source present.Source, readOnly bool) (bdev.Device, error) {
		return s.lvols.OpenLvol(source.Lvol, readOnly)
	})
	s.start()
	t.Cleanup(func() {
		s.stop()
		must(t, s.lvols.Close())
	})
	return s
}

// issue makes a certificate and returns its files.
func (s *store) issue(name string, addresses ...string) rpc.Files {
	s.Helper()
	f, err := certificate.New(s.ca, filepath.Join(s.dir, "certificates"), certificate.Issue{Node: name, Addresses: addresses}, time.Now())
	must(s, err)
	return rpc.Files{Certificate: f.Certificate, Key: f.Key, CA: f.CA}
}

func (s *store) start() {
	s.Helper()
	if s.running {
		return
	}
	var err error
	s.exporter, err = export.New(export.Options{
		Store: s.lvols.Stat().UUID, Portals: []string{s.data},
		Open: func(name string, readOnly bool) (bdev.Device, uuid.UUID, error) {
			d, err := s.lvols.OpenLvol(name, readOnly)
			if err != nil {
				return nil, uuid.UUID{}, err
			}
			return d, uuid.MustParse(d.UUID()), nil
		},
	})
	must(s, err)
	s.attacher, err = attacher.New(attacher.Options{
		Lvols: s.lvols, Presenter: s.presenter, DBPath: filepath.Join(s.dir, "attacher.db"), Target: targetName, Exporter: s.exporter,
		Sync: func(context.Context, string) error { return nil },
	})
	must(s, err)
	dir := filepath.Join(s.dir, "certificates")
	credentials, err := rpc.ServerTLS(rpc.Files{Certificate: filepath.Join(dir, "store.crt"), Key: filepath.Join(dir, "store.key"), CA: filepath.Join(s.ca, "ca.crt")})
	must(s, err)
	s.server = grpc.NewServer(append(rpc.ServerOptions(), credentials)...)
	attacherv1.RegisterNodeServer(s.server, s.attacher)
	l, err := net.Listen("tcp", s.attach)
	must(s, err)
	server := s.server
	s.served.Go(func() { server.Serve(l) })
	s.running = true
}

func (s *store) stop() {
	s.Helper()
	if !s.running {
		return
	}
	s.running = false
	s.attacher.Stop()
	s.server.Stop()
	s.served.Wait()
	must(s, s.attacher.Close())
	must(s, s.exporter.Close())
}

func (s *store) restart() {
	s.Helper()
	s.stop()
	s.start()
}

// content is what cluster i of block n holds.
func content(n, i int) []byte {
	return []byte(strings.Repeat(fmt.Sprintf("block %d cluster %d;", n, i), clusterBytes/64))[:clusterBytes/4]
}

// image makes an image of two blocks, of which the soldier, number n, is returned. Its
// even clusters up to 8 hold content, of the lower block's for the first two of them.
func (s *store) image(n int) string {
	s.Helper()
	ctx := context.Background()
	lower, soldier := fmt.Sprintf("global-00000000-0000-4000-8000-%012d", n), fmt.Sprintf("soldier-00000000-0000-4000-8000-%012d", n)
	work := fmt.Sprintf("work-%d", n)
	_, err := s.lvols.Create(work, blockBytes)
	must(s, err)
	write := func(name string, clusters ...int) {
		d, err := s.lvols.OpenLvol(name, false)
		must(s, err)
		for _, i := range clusters {
			_, err := d.WriteAt(content(n, i), int64(i)*clusterBytes)
			must(s, err)
		}
		must(s, d.Flush())
		must(s, d.Close())
	}
	write(work, 0, 2)
	_, err = s.lvols.Snapshot(work, lower)
	must(s, err)
	write(work, 4, 6, 8)
	_, err = s.lvols.Snapshot(work, soldier)
	must(s, err)
	must(s, s.lvols.Delete(work))
	_, err = s.attacher.PutImage(ctx, &attacherv1.PutImageRequest{Image: &attacherv1.Image{
		Reference: fmt.Sprintf("registry/image:%d", n), Source: "registry/source:1", ManifestDigest: digest.FromString("m").String(),
		Platform: "linux/amd64", Mode: "overlayfs", Filesystem: "erofs", VirtualSizeBytes: blockBytes,
		Blocks: []string{lower, soldier}, ChainIds: []string{digest.FromString(lower).String(), digest.FromString(soldier).String()},
	}})
	must(s, err)
	return soldier
}

func (s *store) attachments() (out []string) {
	s.Helper()
	r, err := s.attacher.ListAttachments(context.Background(), &attacherv1.ListAttachmentsRequest{})
	must(s, err)
	for _, a := range r.GetAttachments() {
		out = append(out, a.GetNode()+" "+a.GetBlock())
	}
	return out
}

// node is a Remote whose users are a set that the test changes.
type node struct {
	*Remote
	t       *testing.T
	options Options

	mu    sync.Mutex
	users map[string]bool // guarded by mu: blocks in use
}

func (s *store) node(name string) *node {
	s.Helper()
	n := &node{t: s.T, users: make(map[string]bool)}
	n.options = Options{
		DBPath:  filepath.Join(s.TempDir(), "remote.db"),
		Targets: []TargetOptions{{Name: targetName, Attacher: s.attach, Files: s.issue(name)}},
	}
	n.open()
	s.Cleanup(func() { must(s, n.Remote.Close()) })
	return n
}

func (n *node) open() {
	n.t.Helper()
	var err error
	n.Remote, err = New(n.options)
	must(n.t, err)
	n.Start(func(target, block string) bool {
		n.mu.Lock()
		defer n.mu.Unlock()
		return target == targetName && n.users[block]
	})
}

func (n *node) reopen() {
	n.t.Helper()
	must(n.t, n.Remote.Close())
	n.open()
}

func (n *node) use(block string, yes bool) {
	n.mu.Lock()
	n.users[block] = yes
	n.mu.Unlock()
	if !yes {
		n.Release(targetName, block)
	}
}

// attachBlock does what image-mgmt does.
func (n *node) attachBlock(block string) error {
	n.use(block, true)
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	err := n.Attach(ctx, targetName, block)
	if err != nil {
		n.use(block, false)
	}
	return err
}

// check reads a block of an image and compares it.
func (n *node) check(block string, number int) {
	n.t.Helper()
	d, err := n.Open(targetName, block)
	must(n.t, err)
	defer d.Close()
	checkDevice(n.t, d, number)
}

func checkDevice(t *testing.T, d bdev.Device, number int) {
	t.Helper()
	if d.SizeBytes() != blockBytes || !d.ReadOnly() {
		t.Fatalf("%d bytes, read-only %t", d.SizeBytes(), d.ReadOnly())
	}
	p := make([]byte, clusterBytes)
	for i := range 10 {
		if _, err := d.ReadAt(p, int64(i)*clusterBytes); err != nil {
			t.Fatal(err)
		}
		want := make([]byte, clusterBytes)
		if i%2 == 0 && i <= 8 {
			copy(want, content(number, i))
		}
		if string(p) != string(want) {
			t.Fatalf("cluster %d: %.40q, want %.40q", i, p, want)
		}
	}
}

func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !is(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s did not come", what)
		}
	}
}

// serve serves on a Unix socket until the test ends.
func serve(t *testing.T, socket string, register func(*grpc.Server)) {
	t.Helper()
	g := grpc.NewServer(rpc.ServerOptions()...)
	register(g)
	l, err := net.Listen("unix", socket)
	must(t, err)
	var served sync.WaitGroup
	served.Go(func() { g.Serve(l) })
	t.Cleanup(func() {
		g.Stop()
		served.Wait()
	})
}
