package card_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/opencontainers/go-digest"
	"google.golang.org/grpc"

	attacherv1 "github.com/thaw-project/thaw/api/attacher/v1"
	"github.com/thaw-project/thaw/attacher"
	cardattacher "github.com/thaw-project/thaw/attacher/card"
	"github.com/thaw-project/thaw/attacher/export"
	"github.com/thaw-project/thaw/attacher/identity"
	attacherrpc "github.com/thaw-project/thaw/attacher/rpc"
	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/lvol"
	"github.com/thaw-project/thaw/node/imagemgmt"
	"github.com/thaw-project/thaw/node/imagemgmt/clone"
	"github.com/thaw-project/thaw/node/present"
	"github.com/thaw-project/thaw/node/present/card"
	"github.com/thaw-project/thaw/node/present/presenttest"
	"github.com/thaw-project/thaw/node/remote"
	"github.com/thaw-project/thaw/nvme/host"
	"github.com/thaw-project/thaw/opi"
	"github.com/thaw-project/thaw/opi/functiontest"
	"github.com/thaw-project/thaw/spdk"
	"github.com/thaw-project/thaw/target"
	"github.com/thaw-project/thaw/target/bdev"
	"github.com/thaw-project/thaw/target/rpc"
)

const (
	hostName     = "host1"
	targetName   = "rack-7"
	blockBytes   = 8 << 20
	clusterBytes = 64 << 10
	functions    = 8
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func wantKind(t testing.TB, err error, want kind.Kind) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Fatalf("got %v (kind %q), want kind %q", err, kind.Of(err), want)
	}
}

// lab is a store, and a card with a target, a bridge and an attacher, each behind its
// socket in one directory. Only the functions, which need the hardware, are in memory.
type lab struct {
	testing.TB
	dir       string
	lvols     *lvol.Store
	attacher  *attacher.Attacher
	functions *functiontest.Memory
	spdk      *spdk.Client
	card      *cardattacher.Card
	endCard   func()
}

func newLab(t testing.TB) *lab {
	dir, err := os.MkdirTemp("", "card-") // short, for the sockets in it
	must(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	l := &lab{TB: t, dir: dir, functions: &functiontest.Memory{Physical: 1, Virtual: functions}}
	l.startStore()
	l.startTarget()
	l.startCard()
	return l
}

// serve serves on a Unix socket until stop is called, at the latest when the test ends.
func (l *lab) serve(name string, register func(*grpc.Server), options ...grpc.ServerOption) (stop func()) {
	l.Helper()
	listener, err := net.Listen("unix", filepath.Join(l.dir, name))
	must(l, err)
	g := grpc.NewServer(append(attacherrpc.ServerOptions(), options...)...)
	register(g)
	var served sync.WaitGroup
	served.Go(func() { g.Serve(listener) })
	stop = sync.OnceFunc(func() {
		g.Stop()
		served.Wait()
	})
	l.Cleanup(stop)
	return stop
}

func (l *lab) startStore() {
	l.Helper()
	pool := filepath.Join(l.dir, "pool")
	must(l, lvol.Create(lvol.CreateOptions{Dir: pool, CapacityBytes: 1 << 30, ClusterBytes: clusterBytes}))
	var err error
	l.lvols, err = lvol.Open(lvol.Options{Dir: pool})
	must(l, err)
	l.Cleanup(func() { must(l, l.lvols.Close()) })
	free, err := net.Listen("tcp", "127.0.0.1:0")
	must(l, err)
	portal := free.Addr().String()
	free.Close()
	exporter, err := export.New(export.Options{
		Store: l.lvols.Stat().UUID, Portals: []string{portal},
		Open: func(name string, readOnly bool) (bdev.Device, uuid.UUID, error) {
			d, err := l.lvols.OpenLvol(name, readOnly)
			if err != nil {
				return nil, uuid.UUID{}, err
			}
			return d, uuid.MustParse(d.UUID()), nil
		},
	})
	must(l, err)
	l.Cleanup(func() { must(l, exporter.Close()) })
	l.attacher, err = attacher.New(attacher.Options{
		Lvols: l.lvols, DBPath: filepath.Join(l.dir, "attacher.db"), Target: targetName, Exporter: exporter,
		Presenter: presenttest.New(func(source present.Source, readOnly bool) (bdev.Device, error) {
			return l.lvols.OpenLvol(source.Lvol, readOnly)
		}),
		Sync: func(context.Context, string) error { return nil },
	})
	must(l, err)
	l.Cleanup(func() { must(l, l.attacher.Close()) })
	l.Cleanup(l.attacher.Stop)
	l.serve("store", func(g *grpc.Server) { attacherv1.RegisterNodeServer(g, l.attacher) })
}

func (l *lab) startTarget() {
	l.Helper()
	t, err := target.New(target.Options{Root: filepath.Join(l.dir, "t")})
	must(l, err)
	listener, err := rpc.Listen(filepath.Join(l.dir, "target"))
	must(l, err)
	s := rpc.Serve(listener, rpc.Options{Methods: t.Methods()})
	l.Cleanup(func() { must(l, errors.Join(s.Close(), t.Close())) })
	l.spdk, err = spdk.New(spdk.Options{Socket: filepath.Join(l.dir, "target")})
	must(l, err)
	l.Cleanup(func() { l.spdk.Close() })
	b, err := opi.New(opi.Options{Target: l.spdk, Functions: l.functions})
	must(l, err)
	l.serve("bridge", func(g *grpc.Server) { b.Register(g) }, grpc.ChainUnaryInterceptor(b.Refusals))
}

func (l *lab) startCard() {
	l.Helper()
	bridge, err := attacherrpc.Dial(filepath.Join(l.dir, "bridge"))
	must(l, err)
	o := cardattacher.Options{Bridge: bridge, DBPath: filepath.Join(l.dir, "card.db"), Host: hostName, Interval: 200 * time.Millisecond, HoldGrace: 300 * time.Millisecond}
	for i := range functions {
		o.Functions = append(o.Functions, cardattacher.Function{Virtual: uint16(i + 1)})
	}
	l.card, err = cardattacher.New(o)
	must(l, err)
	stop := l.serve("card", func(g *grpc.Server) { attacherv1.RegisterCardServer(g, l.card) })
	l.endCard = sync.OnceFunc(func() {
		stop()
		l.card.Close()
		bridge.Close()
	})
	l.Cleanup(func() { l.endCard() })
}

// block makes block n, of an image of its own; its cluster 3 holds its name.
func (l *lab) block(n int) string {
	l.Helper()
	name, work := fmt.Sprintf("soldier-00000000-0000-4000-8000-%012d", n), fmt.Sprintf("work-%d", n)
	_, err := l.lvols.Create(work, blockBytes)
	must(l, err)
	d, err := l.lvols.OpenLvol(work, false)
	must(l, err)
	_, err = d.WriteAt(content(name), 3*clusterBytes)
	must(l, errors.Join(err, d.Flush(), d.Close()))
	_, err = l.lvols.Snapshot(work, name)
	must(l, errors.Join(err, l.lvols.Delete(work)))
	_, err = l.attacher.PutImage(context.Background(), &attacherv1.PutImageRequest{Image: &attacherv1.Image{
		Reference: fmt.Sprintf("registry/image:%d", n), Source: "registry/source:1", ManifestDigest: digest.FromString("m").String(),
		Platform: "linux/amd64", Mode: "overlaybd", Filesystem: "ext4", VirtualSizeBytes: blockBytes, Blocks: []string{name}, ChainIds: []string{digest.FromString(name).String()},
	}})
	must(l, err)
	return name
}

func content(text string) []byte { return []byte((text + strings.Repeat(".", 512))[:512]) }

// onStore lists what the store has for the host: blocks, and ids of writable layers.
func (l *lab) onStore() (attached, layers []string) {
	l.Helper()
	r, err := l.attacher.ListAttachments(context.Background(), &attacherv1.ListAttachmentsRequest{})
	must(l, err)
	for _, a := range r.GetAttachments() {
		switch {
		case !a.GetWritable():
			attached = append(attached, a.GetBlock())
		case a.GetNsid() != 0:
			attached = append(attached, a.GetWritableId())
		}
		if a.GetWritable() {
			layers = append(layers, a.GetWritableId())
		}
	}
	slices.Sort(attached)
	slices.Sort(layers)
	return attached, layers
}

// onCard lists the ids of the disks that the card shows on functions.
func (l *lab) onCard() (ids []string) {
	l.Helper()
	r, err := l.card.Client().ListDisks(context.Background(), &attacherv1.ListDisksRequest{})
	must(l, err)
	shown := l.functions.Shown()
	for _, d := range r.GetDisks() {
		f := d.GetFunction()
		if nqn := shown[opi.Function{Port: uint16(f.GetPort()), Physical: uint16(f.GetPhysicalFunction()), Virtual: uint16(f.GetVirtualFunction())}]; nqn == d.GetSubsystemNqn() {
			ids = append(ids, d.GetId())
		} else {
			ids = append(ids, "unfinished "+d.GetId())
		}
	}
	if len(shown) > len(ids) {
		ids = append(ids, fmt.Sprintf("and functions %v", shown))
	}
	slices.Sort(ids)
	return ids
}

// plug is what a drive's function would be to the host: a connection to what it shows. Its
// subsystem and identity are looked for there, not in what image-mgmt says.
func (l *lab) plug(d present.Disk) *host.Device {
	l.Helper()
	ctx := context.Background()
	var f opi.Function
	if _, err := fmt.Sscanf(d.NVMe.Function, "%d:%d:%d", &f.Port, &f.Physical, &f.Virtual); err != nil {
		l.Fatal(err)
	}
	nqn := l.functions.Shown()[f]
	list, err := l.spdk.NvmfGetSubsystems(ctx, nqn)
	must(l, err)
	if nqn == "" || len(list) != 1 || list[0].SerialNumber != d.NVMe.Serial {
		l.Fatalf("function %s shows %q: %+v, not %+v", d.NVMe.Function, nqn, list, d.NVMe)
	}
	free, err := net.Listen("tcp", "127.0.0.1:0")
	must(l, err)
	_, port, _ := net.SplitHostPort(free.Addr().String())
	free.Close()
	if err := l.spdk.NvmfCreateTransport(ctx, spdk.TransportParams{Type: "TCP"}); err != nil && !strings.Contains(err.Error(), "exist") {
		l.Log(err) // there is one already
	}
	at := spdk.TransportID{Type: "TCP", Family: "IPv4", Address: "127.0.0.1", Service: port}
	must(l, l.spdk.NvmfSubsystemAddListener(ctx, nqn, at))
	h, err := host.Connect(ctx, host.Config{Portals: []string{"127.0.0.1:" + port}, SubNQN: nqn, HostNQN: identity.HostNQN(hostName), HostID: identity.HostID(hostName)})
	must(l, err)
	l.Cleanup(func() { h.Close() })
	device, err := h.OpenUUID(uuid.MustParse(d.NVMe.UUID))
	must(l, err)
	if device.SizeBytes() != d.SizeBytes {
		l.Fatalf("the drive has %d bytes, not %d", device.SizeBytes(), d.SizeBytes)
	}
	return device
}

// images is image-mgmt on the card, of the state in a directory.
type images struct {
	*imagemgmt.Manager
	remote    *remote.Remote
	presenter *card.Presenter
	conn      *grpc.ClientConn
}

func openImages(dir string) (*images, error) {
	var i images
	var err error
	i.remote, err = remote.New(remote.Options{
		DBPath: filepath.Join(dir, "remote.db"), Targets: []remote.TargetOptions{{Name: targetName, Attacher: filepath.Join(dir, "store"), Node: hostName}},
	})
	if err != nil {
		return nil, err
	}
	i.remote.SetKernelHost(true)
	if i.conn, err = attacherrpc.Dial(filepath.Join(dir, "card")); err == nil {
		i.presenter, err = card.New(card.Options{Card: attacherv1.NewCardClient(i.conn), Store: i.remote})
	}
	if err == nil {
		i.Manager, err = imagemgmt.New(imagemgmt.Options{
			Presenter: i.presenter, DBPath: filepath.Join(dir, "imagemgmt.db"), Layers: clone.Layers{Store: i.remote},
			Lookup:   func(ctx context.Context, b imagemgmt.Block) error { return i.remote.Attach(ctx, b.Target, b.Name) },
			Released: func(b imagemgmt.Block) { i.remote.Release(b.Target, b.Name) },
		})
	}
	if err != nil {
		return nil, errors.Join(err, i.remote.Close())
	}
	i.remote.Start(func(target, block string) bool { return i.Uses(imagemgmt.Block{Target: target, Name: block}) })
	return &i, nil
}

func (i *images) close() error {
	return errors.Join(i.Manager.Close(), i.remote.Close(), i.conn.Close())
}

func eventually(t testing.TB, what string, is func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !is(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s did not come within 10 s", what)
		}
	}
}
