package kill

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"testing"
	"time"

	opiv1 "github.com/opiproject/opi-api/storage/v1alpha1/gen/go"

	lvolv1 "github.com/thaw-project/thaw/api/lvol/v1"
	"github.com/thaw-project/thaw/attacher/rpc"
	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/nvme/host"
	"github.com/thaw-project/thaw/spdk"
)

const (
	clusterBytes = 64 << 10
	lvstoreBytes = 256 << 20
	lvstoreName  = "pool"
	foreignNQN   = "nqn.2014-08.org.example:foreign"
	foreignHost  = "nqn.2014-08.org.example:somebody"
	foreignLvol  = "foreign"
	foreignBytes = 1 << 20
)

// storage is a target with a bridge, an lvstore, and what belongs to somebody else.
type storage struct {
	c           *chain
	target      *spdk.Client
	bridge      string // socket
	aio         string // file of the lvstore
	foreign     string // file of somebody's bdev
	port        string // of the chain
	foreignPort string
	pattern     []byte // what the foreign file holds
}

// newStorage adds target and bridge to a chain. Names of members begin with prefix.
func newStorage(c *chain, prefix string, targetArgs, bridgeArgs []string) *storage {
	t := c.t
	t.Helper()
	s := &storage{c: c, bridge: c.path(prefix + "bridge.sock"), aio: c.path(prefix + "lvstore"), foreign: c.path(prefix + "foreign"),
		port: freePort(t), foreignPort: freePort(t), pattern: bytes.Repeat([]byte("somebody"), foreignBytes/8)}
	if err := errors.Join(os.WriteFile(s.foreign, s.pattern, 0o600), os.WriteFile(s.aio, nil, 0o600), os.Truncate(s.aio, lvstoreBytes)); err != nil {
		t.Fatal(err)
	}
	socket := c.path(prefix + "target.sock")
	client, err := spdk.New(spdk.Options{Socket: socket})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	s.target = client
	c.add(&member{name: prefix + "target", socket: socket, started: s.putForeign,
		args: append([]string{"target", "--root", c.path(prefix + "t"), "--socket", socket}, targetArgs...)})
	c.add(&member{name: prefix + "bridge", socket: s.bridge,
		args: append([]string{"bridge", "--target", socket, "--socket", s.bridge}, bridgeArgs...)})
	return s
}

// lvstore makes the lvstore, with somebody's lvol in it.
func (s *storage) lvstore(ctx context.Context) error {
	if _, err := s.target.BdevAIOCreate(ctx, spdk.BdevAIOCreateParams{Name: "base", Filename: s.aio, BlockSizeBytes: 4096}); err != nil {
		return err
	}
	if _, err := s.target.BdevLvolCreateLvstore(ctx, spdk.LvolStoreCreateParams{BdevName: "base", Name: lvstoreName, ClusterSizeBytes: clusterBytes}); err != nil {
		return err
	}
	return s.foreignLvol(ctx)
}

// foreignLvol makes somebody's lvol in the lvstore.
func (s *storage) foreignLvol(ctx context.Context) error {
	_, err := s.target.BdevLvolCreate(ctx, spdk.LvolCreateParams{Name: foreignLvol, SizeMiB: 1, ThinProvision: true, StoreName: lvstoreName})
	return err
}

// putForeign makes what somebody else has on the target: whoever that is does it again
// when the target was started again.
func (s *storage) putForeign(ctx context.Context) error {
	have, err := s.target.BdevGetBdevs(ctx, spdk.BdevGetBdevsParams{})
	if err != nil {
		return err
	}
	if !slices.ContainsFunc(have, func(b spdk.Bdev) bool { return b.Name == foreignLvol }) {
		if _, err := s.target.BdevAIOCreate(ctx, spdk.BdevAIOCreateParams{Name: foreignLvol, Filename: s.foreign, BlockSizeBytes: 4096, UUID: "5e6f7081-92a3-44b5-8c6d-7e8f90a1b2c3"}); err != nil {
			return err
		}
	}
	_, err = s.target.NvmfGetSubsystems(ctx, foreignNQN)
	if err == nil {
		return nil
	}
	at := spdk.TransportID{Type: "TCP", Family: "IPv4", Address: "127.0.0.1", Service: s.foreignPort}
	if err := s.target.NvmfCreateTransport(ctx, spdk.TransportParams{Type: "TCP"}); err != nil {
		transports, gerr := s.target.NvmfGetTransports(ctx) // the chain may have been first
		if gerr != nil || len(transports) == 0 {
			return err
		}
	}
	if err := s.target.NvmfCreateSubsystem(ctx, spdk.SubsystemParams{NQN: foreignNQN, SerialNumber: "F1", ModelNumber: "somebody", MaxNamespaces: 4}); err != nil {
		return err
	}
	if _, err := s.target.NvmfSubsystemAddNs(ctx, foreignNQN, spdk.NvmeNamespace{BdevName: foreignLvol, NSID: 3}); err != nil {
		return err
	}
	return errors.Join(s.target.NvmfSubsystemAddHost(ctx, foreignNQN, foreignHost, ""), s.target.NvmfSubsystemAddListener(ctx, foreignNQN, at))
}

// untouched reads what belongs to somebody else.
func (s *storage) untouched() error {
	raw, err := os.ReadFile(s.foreign)
	if err == nil && !bytes.Equal(raw, s.pattern) {
		err = errors.New("somebody's bdev was written to")
	}
	return err
}

func freePort(t testing.TB) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	_, port, _ := net.SplitHostPort(l.Addr().String())
	return port
}

// disk is a subject: an lvol shown to a host by a target, told through a bridge.
type disk struct {
	*storage
	fe   opiv1.FrontendNvmeServiceClient
	aioV opiv1.AioVolumeServiceClient
	lvol lvolv1.LogicalVolumeServiceClient
}

const (
	diskNQN  = "nqn.2014-08.org.example:disk"
	diskHost = "nqn.2014-08.org.example:host"
	diskUUID = "0f1e2d3c-4b5a-6978-8796-a5b4c3d2e1f0"
	diskSub  = "nvmeSubsystems/" + diskNQN
)

func newDisk(t *testing.T) (*chain, subject) {
	c := newChain(t)
	s := newStorage(c, "", nil, nil)
	if err := s.lvstore(t.Context()); err != nil {
		t.Fatal(err)
	}
	conn, err := rpc.Dial(s.bridge)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return c, &disk{s, opiv1.NewFrontendNvmeServiceClient(conn), opiv1.NewAioVolumeServiceClient(conn), lvolv1.NewLogicalVolumeServiceClient(conn)}
}

func (d *disk) base(ctx context.Context) error {
	_, err := d.aioV.CreateAioVolume(ctx, &opiv1.CreateAioVolumeRequest{AioVolumeId: "base",
		AioVolume: &opiv1.AioVolume{BlockSize: 4096, BlocksCount: lvstoreBytes / 4096, Filename: d.aio}})
	return err
}

func (d *disk) do(ctx context.Context) error {
	if err := d.base(ctx); err != nil {
		return err
	}
	store := "lvolStores/" + lvstoreName
	if _, err := d.lvol.CreateLvol(ctx, &lvolv1.CreateLvolRequest{Parent: store, LvolId: "below", Lvol: &lvolv1.Lvol{SizeBytes: 4 << 20}}); err != nil {
		return err
	}
	if _, err := d.lvol.SnapshotLvol(ctx, &lvolv1.SnapshotLvolRequest{Name: store + "/lvols/below", SnapshotId: "snapshot"}); err != nil {
		return err
	}
	if _, err := d.lvol.CloneLvol(ctx, &lvolv1.CloneLvolRequest{Name: store + "/lvols/snapshot", LvolId: "clone"}); err != nil {
		return err
	}
	if _, err := d.fe.CreateNvmeSubsystem(ctx, &opiv1.CreateNvmeSubsystemRequest{NvmeSubsystem: &opiv1.NvmeSubsystem{Spec: &opiv1.NvmeSubsystemSpec{Nqn: diskNQN, Hostnqn: diskHost}}}); err != nil {
		return err
	}
	if _, err := d.fe.CreateNvmeNamespace(ctx, &opiv1.CreateNvmeNamespaceRequest{Parent: diskSub, NvmeNamespace: &opiv1.NvmeNamespace{
		Spec: &opiv1.NvmeNamespaceSpec{Uuid: diskUUID, VolumeNameRef: store + "/lvols/clone"}}}); err != nil {
		return err
	}
	_, err := d.fe.CreateNvmeController(ctx, &opiv1.CreateNvmeControllerRequest{Parent: diskSub, NvmeController: &opiv1.NvmeController{Spec: &opiv1.NvmeControllerSpec{
		Trtype: opiv1.NvmeTransportType_NVME_TRANSPORT_TYPE_TCP,
		Endpoint: &opiv1.NvmeControllerSpec_FabricsId{FabricsId: &opiv1.FabricsEndpoint{
			Traddr: "127.0.0.1", Trsvcid: d.port, Adrfam: opiv1.NvmeAddressFamily_NVME_ADDRESS_FAMILY_IPV4}}}}})
	return err
}

func (d *disk) undo(ctx context.Context) error {
	if err := d.base(ctx); err != nil {
		return err
	}
	if _, err := d.fe.DeleteNvmeController(ctx, &opiv1.DeleteNvmeControllerRequest{Name: diskSub + "/nvmeControllers/tcp:127.0.0.1:" + d.port, AllowMissing: true}); err != nil {
		return err
	}
	if _, err := d.fe.DeleteNvmeNamespace(ctx, &opiv1.DeleteNvmeNamespaceRequest{Name: diskSub + "/nvmeNamespaces/" + diskUUID, AllowMissing: true}); err != nil {
		return err
	}
	if _, err := d.fe.DeleteNvmeSubsystem(ctx, &opiv1.DeleteNvmeSubsystemRequest{Name: diskSub, AllowMissing: true}); err != nil {
		return err
	}
	for _, name := range []string{"clone", "below", "snapshot"} {
		if _, err := d.lvol.DeleteLvol(ctx, &lvolv1.DeleteLvolRequest{Name: "lvolStores/" + lvstoreName + "/lvols/" + name, AllowMissing: true}); err != nil {
			return err
		}
	}
	return nil
}

// check writes to the disk as the host that may.
func (d *disk) check(ctx context.Context) error {
	if err := d.untouched(); err != nil {
		return err
	}
	if err := admitted(ctx, d.port, diskNQN, foreignHost); err == nil || !errors.Is(err, kind.Denied) {
		return fmt.Errorf("another host: %v", err)
	}
	return admitted(ctx, d.port, diskNQN, diskHost)
}

// admitted connects to a subsystem as a host and reads the first bytes of what it shows.
func admitted(ctx context.Context, port, nqn, as string) error {
	h, err := host.Connect(ctx, host.Config{Portals: []string{"127.0.0.1:" + port}, SubNQN: nqn, HostNQN: as, ReconnectDelay: 5 * time.Millisecond, LossTimeout: time.Second})
	if err != nil {
		return err
	}
	defer h.Close()
	for _, n := range h.NvmeNamespaces() {
		dev, err := h.Open(n.NSID)
		if err != nil {
			return err
		}
		_, err = dev.ReadAt(make([]byte, 4096), 0)
		if err := errors.Join(err, dev.Close()); err != nil {
			return err
		}
	}
	return nil
}

func (d *disk) state(ctx context.Context) (state, error) { return targetState(ctx, "", d.target) }

// TestDisk kills target and bridge while somebody makes a disk through OPI.
func TestDisk(t *testing.T) { prove(t, 35, newDisk) }
