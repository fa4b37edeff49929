package card

import (
	"context"
	"errors"
	"maps"
	"net/url"
	"strings"
	"sync"
	"time"

	opiv1 "github.com/opiproject/opi-api/storage/v1alpha1/gen/go"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/wrapperspb"

	lvolv1 "github.com/thaw-project/thaw/api/lvol/v1"
	"github.com/thaw-project/thaw/attacher/rpcerr"
	"github.com/thaw-project/thaw/kind"
)

// bridge is OPI's storage API as the card uses it. What it names needs no escaping: NQNs,
// UUIDs, addresses, and names that derive from them.
type bridge struct {
	fe     opiv1.FrontendNvmeServiceClient
	remote opiv1.NvmeRemoteControllerServiceClient
	aio    opiv1.AioVolumeServiceClient
	malloc opiv1.MallocVolumeServiceClient
	null   opiv1.NullVolumeServiceClient
	lvol   lvolv1.LogicalVolumeServiceClient
}

func newBridge(conn grpc.ClientConnInterface) *bridge {
	return &bridge{
		opiv1.NewFrontendNvmeServiceClient(conn), opiv1.NewNvmeRemoteControllerServiceClient(conn), opiv1.NewAioVolumeServiceClient(conn),
		opiv1.NewMallocVolumeServiceClient(conn), opiv1.NewNullVolumeServiceClient(conn), lvolv1.NewLogicalVolumeServiceClient(conn),
	}
}

// pageSize is the most that the bridge lists at once.
const pageSize = 1000

// call calls within callMost; errors have kinds.
func call[Req, Resp any](ctx context.Context, f func(context.Context, Req, ...grpc.CallOption) (Resp, error), r Req) (Resp, error) {
	return callWithin(ctx, callMost, f, r)
}

func callWithin[Req, Resp any](ctx context.Context, most time.Duration, f func(context.Context, Req, ...grpc.CallOption) (Resp, error), r Req) (Resp, error) {
	ctx, cancel := context.WithTimeout(ctx, most)
	defer cancel()
	resp, err := f(ctx, r)
	return resp, answered(err)
}

// answered is an error of the bridge with its kind, but not as the status that it came as:
// what the card's callers get is the card's own.
func answered(err error) error {
	if err == nil {
		return nil
	}
	err = rpcerr.FromStatus(err)
	if k := kind.Of(err); k != "" {
		return kind.Errorf(k, "%s", err.Error())
	}
	return kind.Errorf(kind.IO, "%s", err.Error())
}

// pages calls f with the token of each page.
func pages(f func(token string) (next string, err error)) error {
	for token := ""; ; {
		next, err := f(token)
		if err != nil || next == "" {
			return err
		}
		token = next
	}
}

// tail is the part of a resource's name after its last slash.
func tail(name string) string { return name[strings.LastIndexByte(name, '/')+1:] }

func subsystemName(nqn string) string         { return "nvmeSubsystems/" + nqn }
func remoteName(controller string) string     { return "nvmeRemoteControllers/" + controller }
func nvmeNamespaceName(nqn, id string) string { return subsystemName(nqn) + "/nvmeNamespaces/" + id }
func controllerName(nqn string, f Function) string {
	return subsystemName(nqn) + "/nvmeControllers/pcie:" + f.String()
}

// subsystems lists all, by NQN.
func (b *bridge) subsystems(ctx context.Context) (map[string]*opiv1.NvmeSubsystemSpec, error) {
	all := make(map[string]*opiv1.NvmeSubsystemSpec)
	return all, pages(func(token string) (string, error) {
		r, err := call(ctx, b.fe.ListNvmeSubsystems, &opiv1.ListNvmeSubsystemsRequest{PageSize: pageSize, PageToken: token})
		for _, s := range r.GetNvmeSubsystems() {
			all[s.GetSpec().GetNqn()] = s.GetSpec()
		}
		return r.GetNextPageToken(), err
	})
}

// nvmeNamespaces lists those of all subsystems: their UUIDs, by NQN.
func (b *bridge) nvmeNamespaces(ctx context.Context) (map[string][]string, error) {
	all := make(map[string][]string)
	return all, pages(func(token string) (string, error) {
		r, err := call(ctx, b.fe.ListNvmeNamespaces, &opiv1.ListNvmeNamespacesRequest{Parent: subsystemName("-"), PageSize: pageSize, PageToken: token})
		for _, n := range r.GetNvmeNamespaces() {
			if parts := strings.Split(n.GetName(), "/"); len(parts) == 4 {
				all[parts[1]] = append(all[parts[1]], n.GetSpec().GetUuid())
			}
		}
		return r.GetNextPageToken(), err
	})
}

// functions lists what PCIe functions show, of all subsystems: NQNs.
func (b *bridge) functions(ctx context.Context) (map[Function]string, error) {
	all := make(map[Function]string)
	return all, pages(func(token string) (string, error) {
		r, err := call(ctx, b.fe.ListNvmeControllers, &opiv1.ListNvmeControllersRequest{Parent: subsystemName("-"), PageSize: pageSize, PageToken: token})
		for _, n := range r.GetNvmeControllers() {
			p := n.GetSpec().GetPcieId()
			parts := strings.Split(n.GetName(), "/")
			if p == nil || len(parts) != 4 {
				continue
			}
			nqn, err := url.PathUnescape(parts[1])
			if err != nil {
				nqn = parts[1]
			}
			all[Function{uint16(p.GetPortId().GetValue()), uint16(p.GetPhysicalFunction().GetValue()), uint16(p.GetVirtualFunction().GetValue())}] = nqn
		}
		return r.GetNextPageToken(), err
	})
}

// remotes lists the names of all remote controllers.
func (b *bridge) remotes(ctx context.Context) (all []string, err error) {
	err = pages(func(token string) (string, error) {
		r, err := call(ctx, b.remote.ListNvmeRemoteControllers, &opiv1.ListNvmeRemoteControllersRequest{PageSize: pageSize, PageToken: token})
		for _, c := range r.GetNvmeRemoteControllers() {
			all = append(all, tail(c.GetName()))
		}
		return r.GetNextPageToken(), err
	})
	return all, err
}

// paths lists the ids of a remote controller's paths; none when there is no such
// controller.
func (b *bridge) paths(ctx context.Context, controller string) (all []string, err error) {
	err = pages(func(token string) (string, error) {
		r, err := call(ctx, b.remote.ListNvmePaths, &opiv1.ListNvmePathsRequest{Parent: remoteName(controller), PageSize: pageSize, PageToken: token})
		for _, p := range r.GetNvmePaths() {
			all = append(all, tail(p.GetName()))
		}
		return r.GetNextPageToken(), err
	})
	if errors.Is(err, kind.NotFound) {
		return nil, nil
	}
	return all, err
}

// connect makes a path, and the controller with its first one.
func (b *bridge) connect(ctx context.Context, controller string, r *remote, p portal) error {
	ctx, cancel := context.WithTimeout(ctx, connectMost)
	defer cancel()
	path := &opiv1.NvmePath{Trtype: opiv1.NvmeTransportType_NVME_TRANSPORT_TYPE_TCP, Traddr: p.Address,
		Fabrics: &opiv1.FabricsPath{Trsvcid: int64(p.Port), Subnqn: r.Subsystem, Hostnqn: r.HostNQN, Adrfam: opiv1.NvmeAddressFamily_NVME_ADDRESS_FAMILY_IPV4}}
	if p.RDMA {
		path.Trtype = opiv1.NvmeTransportType_NVME_TRANSPORT_TYPE_RDMA
	}
	if strings.Contains(p.Address, ":") {
		path.Fabrics.Adrfam = opiv1.NvmeAddressFamily_NVME_ADDRESS_FAMILY_IPV6
	}
	_, err := b.remote.CreateNvmePath(ctx, &opiv1.CreateNvmePathRequest{Parent: remoteName(controller), NvmePath: path})
	return answered(err)
}

// remoteVolumes lists the volumes of a remote controller, by UUID.
func (b *bridge) remoteVolumes(ctx context.Context, controller string) (map[string]string, error) {
	all := make(map[string]string)
	return all, pages(func(token string) (string, error) {
		r, err := call(ctx, b.remote.ListNvmeRemoteNamespaces, &opiv1.ListNvmeRemoteNamespacesRequest{Parent: remoteName(controller), PageSize: pageSize, PageToken: token})
		for _, n := range r.GetNvmeRemoteNamespaces() {
			all[strings.ToLower(n.GetUuid())] = n.GetName()
		}
		return r.GetNextPageToken(), err
	})
}

func pcie(f Function) *opiv1.NvmeController {
	return &opiv1.NvmeController{Spec: &opiv1.NvmeControllerSpec{Trtype: opiv1.NvmeTransportType_NVME_TRANSPORT_TYPE_PCIE,
		Endpoint: &opiv1.NvmeControllerSpec_PcieId{PcieId: &opiv1.PciEndpoint{PortId: wrapperspb.Int32(int32(f.Port)),
			PhysicalFunction: wrapperspb.Int32(int32(f.Physical)), VirtualFunction: wrapperspb.Int32(int32(f.Virtual))}}}}
}

// volume is what a caller's volume is like.
type volume struct {
	source    string // what an nvmeNamespace's identity derives from
	sizeBytes int64
	readOnly  bool
}

// volume asks for a volume by its name. An lvol's UUID is its own and tells it from one
// that was made again; other volumes have one for as long as the target runs at most.
func (b *bridge) volume(ctx context.Context, name string) (v volume, err error) {
	v.source = "volume " + name
	switch collection, _, _ := strings.Cut(name, "/"); collection {
	case "lvolStores":
		var l *lvolv1.Lvol
		l, err = call(ctx, b.lvol.GetLvol, &lvolv1.GetLvolRequest{Name: name})
		v.source += " " + l.GetUuid()
		v.sizeBytes, v.readOnly = l.GetSizeBytes(), l.GetReadOnly() || l.GetSnapshot()
	case "rbdVolumes":
		var r *lvolv1.RbdVolume
		r, err = call(ctx, b.lvol.GetRbdVolume, &lvolv1.GetRbdVolumeRequest{Name: name})
		v.sizeBytes = r.GetBlockSize() * r.GetBlocksCount()
	case "aioVolumes":
		var r *opiv1.AioVolume
		r, err = call(ctx, b.aio.GetAioVolume, &opiv1.GetAioVolumeRequest{Name: name})
		v.sizeBytes = r.GetBlockSize() * r.GetBlocksCount()
	case "mallocVolumes":
		var r *opiv1.MallocVolume
		r, err = call(ctx, b.malloc.GetMallocVolume, &opiv1.GetMallocVolumeRequest{Name: name})
		v.sizeBytes = r.GetBlockSize() * r.GetBlocksCount()
	case "nullVolumes":
		var r *opiv1.NullVolume
		r, err = call(ctx, b.null.GetNullVolume, &opiv1.GetNullVolumeRequest{Name: name})
		v.sizeBytes = r.GetBlockSize() * r.GetBlocksCount()
	default:
		err = kind.Errorf(kind.Invalid, "volume %.160q: must be a name of lvolStores, rbdVolumes, aioVolumes, mallocVolumes or nullVolumes at the card's bridge", name)
	}
	return v, err
}

// busyMost is for how long what functions show is believed: longer than it takes until it is
// read again anyway. A function that somebody else took since is refused when it is plugged.
const busyMost = 2*DefaultInterval + time.Second

// busy is what functions show.
type busy struct {
	mu    sync.Mutex
	shown map[Function]string // guarded by mu, and never changed: NQNs
	read  time.Time           // guarded by mu
}

// shown is what functions show; fresh says that no earlier answer will do.
func (c *Card) shown(ctx context.Context, fresh bool) (map[Function]string, error) {
	c.busy.mu.Lock()
	defer c.busy.mu.Unlock()
	if !fresh && !c.busy.read.IsZero() && time.Since(c.busy.read) < busyMost {
		return c.busy.shown, nil
	}
	shown, err := c.bridge.functions(ctx)
	if err != nil {
		return nil, err
	}
	c.busy.shown, c.busy.read = shown, time.Now()
	return shown, nil
}

// sawUnplugged takes note that a function shows nothing.
func (c *Card) sawUnplugged(f Function) {
	c.busy.mu.Lock()
	defer c.busy.mu.Unlock()
	shown := maps.Clone(c.busy.shown) // others read the old one
	delete(shown, f)
	c.busy.shown = shown
}

// sawShown takes note of what was read anyway.
func (c *Card) sawShown(shown map[Function]string, at time.Time) {
	c.busy.mu.Lock()
	defer c.busy.mu.Unlock()
	if at.After(c.busy.read) {
		c.busy.shown, c.busy.read = shown, at
	}
}
