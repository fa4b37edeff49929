package opi

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"

	opiv1 "github.com/opiproject/opi-api/storage/v1alpha1/gen/go"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/spdk"
)

// A remote controller is a subsystem that the target is connected to,
// "nvmeRemoteControllers/{controller}"; each connection is a path,
// "nvmeRemoteControllers/{controller}/nvmePaths/tcp:192.0.2.1:4420", and each disk there a
// volume, ".../nvmeRemoteNamespaces/{bdev}". SPDK knows a controller from its first path
// on, so one is created with that path, and gone with the last.

// How paths behave that break: the target tries for ever, every 2 s, and keeps what hosts
// ask for meanwhile. Without these SPDK takes the disk away when it first fails.
const reconnectDelaySec = 2

var lossTimeoutSec = int32(-1)

// controllerOf returns the remote controller of a bdev, or nothing for other bdevs. SPDK
// names the bdevs of a controller: its name, n, the NSID.
func controllerOf(bdev *spdk.Bdev) string {
	if len(bdev.Specific.NVMe) == 0 {
		return ""
	}
	c, ok := strings.CutSuffix(bdev.Name, fmt.Sprintf("n%d", bdev.Specific.NVMe[0].Namespace.ID))
	if !ok {
		return ""
	}
	return c
}

func (b *Bridge) remote(ctx context.Context, name string) (*spdk.NVMeController, error) {
	list, err := b.spdk.BdevNVMeGetControllers(ctx, name)
	if err != nil {
		return nil, err
	}
	for i := range list {
		if list[i].Name == name {
			return &list[i], nil
		}
	}
	return nil, kind.Errorf(kind.NotFound, "the target has no controller %.100q", name)
}

func (b *Bridge) remoteNamed(ctx context.Context, name string) (*spdk.NVMeController, error) {
	id, err := parse1(name, remotes)
	if err != nil {
		return nil, err
	}
	return b.remote(ctx, id)
}

func remoteProto(name string) *opiv1.NvmeRemoteController {
	return &opiv1.NvmeRemoteController{Name: join(remotes, name), Multipath: opiv1.NvmeMultipath_NVME_MULTIPATH_MULTIPATH}
}

// checkRemote refuses what would have to be kept until the first path comes: the target
// has no place for it.
func checkRemote(c *opiv1.NvmeRemoteController) error {
	switch m := c.GetMultipath(); {
	case m != opiv1.NvmeMultipath_NVME_MULTIPATH_UNSPECIFIED && m != opiv1.NvmeMultipath_NVME_MULTIPATH_MULTIPATH:
		return kind.Errorf(kind.Unsupported, "multipath %s: a controller of this bridge always has multipath", m)
	case c.GetTcp().GetHdgst() || c.GetTcp().GetDdgst() || len(c.GetTcp().GetPsk()) > 0 || c.GetIoQueuesCount() != 0 || c.GetQueueSize() != 0:
		return kind.Errorf(kind.Unsupported, "tcp, io_queues_count, queue_size: SPDK takes them with a path and tells them to nobody, and the bridge keeps nothing: leave them out")
	}
	return nil
}

// CreateNvmeRemoteController checks the name. The controller is there when its first path
// is.
func (b *Bridge) CreateNvmeRemoteController(ctx context.Context, r *opiv1.CreateNvmeRemoteControllerRequest) (*opiv1.NvmeRemoteController, error) {
	name, err := unescape(r.GetNvmeRemoteControllerId())
	if err != nil {
		return nil, err
	}
	if err := checkController(name); err != nil {
		return nil, err
	}
	if err := checkRemote(r.GetNvmeRemoteController()); err != nil {
		return nil, err
	}
	if _, err := b.remote(ctx, name); err != nil && !errors.Is(err, kind.NotFound) {
		return nil, err // the target cannot be asked: say it now
	}
	return remoteProto(name), nil
}

// checkController bounds a controller's name, from which those of its bdevs are made.
func checkController(name string) error {
	if len(name) > 63 || !strings.ContainsFunc(name, func(r rune) bool { return r < '0' || r > '9' }) || strings.ContainsAny(name, "/ ") {
		return kind.Errorf(kind.Invalid, "controller name %.100q: must have at most 63 bytes, no slash or space, and not only digits", name)
	}
	return checkBdev(name)
}

// GetNvmeRemoteController returns a controller that has a path.
func (b *Bridge) GetNvmeRemoteController(ctx context.Context, r *opiv1.GetNvmeRemoteControllerRequest) (*opiv1.NvmeRemoteController, error) {
	c, err := b.remoteNamed(ctx, r.GetName())
	if err != nil {
		return nil, err
	}
	return remoteProto(c.Name), nil
}

// ListNvmeRemoteControllers lists those that have a path.
func (b *Bridge) ListNvmeRemoteControllers(ctx context.Context, r *opiv1.ListNvmeRemoteControllersRequest) (*opiv1.ListNvmeRemoteControllersResponse, error) {
	all, err := b.spdk.BdevNVMeGetControllers(ctx, "")
	if err != nil {
		return nil, err
	}
	var list []*opiv1.NvmeRemoteController
	for _, c := range all {
		list = append(list, remoteProto(c.Name))
	}
	list, next, err := page(list, (*opiv1.NvmeRemoteController).GetName, r.GetPageSize(), r.GetPageToken())
	return &opiv1.ListNvmeRemoteControllersResponse{NvmeRemoteControllers: list, NextPageToken: next}, err
}

// UpdateNvmeRemoteController changes nothing.
func (b *Bridge) UpdateNvmeRemoteController(ctx context.Context, r *opiv1.UpdateNvmeRemoteControllerRequest) (*opiv1.NvmeRemoteController, error) {
	want := r.GetNvmeRemoteController()
	c, err := b.remoteNamed(ctx, want.GetName())
	if errors.Is(err, kind.NotFound) && r.GetAllowMissing() {
		return b.CreateNvmeRemoteController(ctx, &opiv1.CreateNvmeRemoteControllerRequest{NvmeRemoteController: want, NvmeRemoteControllerId: want.GetName()[len(remotes)+1:]})
	}
	if err != nil {
		return nil, err
	}
	return unchangeable(remoteProto(c.Name), want, r.GetUpdateMask())
}

// DeleteNvmeRemoteController ends all paths; the volumes go with them.
func (b *Bridge) DeleteNvmeRemoteController(ctx context.Context, r *opiv1.DeleteNvmeRemoteControllerRequest) (*emptypb.Empty, error) {
	err := remove(r.GetAllowMissing(), func() (*spdk.NVMeController, error) { return b.remoteNamed(ctx, r.GetName()) },
		func(c *spdk.NVMeController) error {
			return b.spdk.BdevNVMeDetachController(ctx, c.Name, spdk.TransportID{})
		})
	return &emptypb.Empty{}, err
}

// ResetNvmeRemoteController makes all paths anew.
func (b *Bridge) ResetNvmeRemoteController(ctx context.Context, r *opiv1.ResetNvmeRemoteControllerRequest) (*emptypb.Empty, error) {
	c, err := b.remoteNamed(ctx, r.GetName())
	if err == nil {
		err = b.spdk.BdevNVMeResetController(ctx, c.Name)
	}
	return &emptypb.Empty{}, err
}

// remoteDisks lists the bdevs of a controller.
func (b *Bridge) remoteDisks(ctx context.Context, controller string) ([]*spdk.Bdev, error) {
	all, err := b.spdk.BdevGetBdevs(ctx, spdk.BdevGetBdevsParams{})
	var list []*spdk.Bdev
	for i := range all {
		if controllerOf(&all[i]) == controller {
			list = append(list, &all[i])
		}
	}
	return list, err
}

// StatsNvmeRemoteController adds up the figures of its volumes.
func (b *Bridge) StatsNvmeRemoteController(ctx context.Context, r *opiv1.StatsNvmeRemoteControllerRequest) (*opiv1.StatsNvmeRemoteControllerResponse, error) {
	c, err := b.remoteNamed(ctx, r.GetName())
	if err != nil {
		return nil, err
	}
	list, err := b.remoteDisks(ctx, c.Name)
	if err != nil {
		return nil, err
	}
	var names []string
	for _, v := range list {
		names = append(names, v.Name)
	}
	stats, err := b.stats(ctx, names...)
	return &opiv1.StatsNvmeRemoteControllerResponse{Stats: stats}, err
}

func remoteNamespaceProto(controller string, v *spdk.Bdev) *opiv1.NvmeRemoteNamespace {
	return &opiv1.NvmeRemoteNamespace{Name: join(remotes, controller, remoteNamespaces, v.Name), Nsid: int32(v.Specific.NVMe[0].Namespace.ID), Uuid: v.UUID}
}

// ListNvmeRemoteNamespaces lists the volumes of a controller. SPDK tells their UUIDs, not
// their NGUIDs.
func (b *Bridge) ListNvmeRemoteNamespaces(ctx context.Context, r *opiv1.ListNvmeRemoteNamespacesRequest) (*opiv1.ListNvmeRemoteNamespacesResponse, error) {
	c, err := b.remoteNamed(ctx, r.GetParent())
	if err != nil {
		return nil, err
	}
	disks, err := b.remoteDisks(ctx, c.Name)
	if err != nil {
		return nil, err
	}
	var list []*opiv1.NvmeRemoteNamespace
	for _, v := range disks {
		list = append(list, remoteNamespaceProto(c.Name, v))
	}
	list, next, err := page(list, (*opiv1.NvmeRemoteNamespace).GetName, r.GetPageSize(), r.GetPageToken())
	return &opiv1.ListNvmeRemoteNamespacesResponse{NvmeRemoteNamespaces: list, NextPageToken: next}, err
}

// GetNvmeRemoteNamespace returns a volume of a controller.
func (b *Bridge) GetNvmeRemoteNamespace(ctx context.Context, r *opiv1.GetNvmeRemoteNamespaceRequest) (*opiv1.NvmeRemoteNamespace, error) {
	texts, err := parse(r.GetName(), remotes, remoteNamespaces)
	if err != nil {
		return nil, err
	}
	v, err := b.spdk.Bdev(ctx, texts[1])
	if err != nil {
		return nil, err
	}
	if controllerOf(v) != texts[0] || v.Name != texts[1] {
		return nil, kind.Errorf(kind.NotFound, "controller %.100q has no bdev %.100q", texts[0], texts[1])
	}
	return remoteNamespaceProto(texts[0], v), nil
}

// path is one connection of a controller.
type path struct {
	controller string
	spdk.NVMePath
}

func (p *path) proto() *opiv1.NvmePath {
	a := normal(p.TransportID)
	out := &opiv1.NvmePath{Name: join(remotes, p.controller, paths, addressID(a)), Trtype: transportOf(a.Type), Traddr: a.Address}
	if a.Service != "" {
		out.Fabrics = &opiv1.FabricsPath{Subnqn: p.TransportID.SubNQN, Adrfam: familyOf(a.Family), Hostnqn: p.Host.NQN, SourceTraddr: p.Host.Address}
		out.Fabrics.Trsvcid, _ = strconv.ParseInt(a.Service, 10, 64) // 0 for what is no port
	}
	return out
}

func (b *Bridge) path(ctx context.Context, controller, id string) (*path, error) {
	c, err := b.remote(ctx, controller)
	if err != nil {
		return nil, err
	}
	for _, p := range c.Paths {
		if addressID(p.TransportID) == id {
			return &path{controller, p}, nil
		}
	}
	return nil, kind.Errorf(kind.NotFound, "controller %s has no path %.100q", controller, id)
}

func (b *Bridge) pathNamed(ctx context.Context, name string) (*path, error) {
	texts, err := parse(name, remotes, paths)
	if err != nil {
		return nil, err
	}
	return b.path(ctx, texts[0], texts[1])
}

// CreateNvmePath connects to a subsystem, or adds a connection.
func (b *Bridge) CreateNvmePath(ctx context.Context, r *opiv1.CreateNvmePathRequest) (*opiv1.NvmePath, error) {
	controller, err := parse1(r.GetParent(), remotes)
	if err != nil {
		return nil, err
	}
	if err := checkController(controller); err != nil {
		return nil, err
	}
	want := r.GetNvmePath()
	f := want.GetFabrics()
	a, err := addressOf(want.GetTrtype(), f.GetAdrfam(), want.GetTraddr(), strconv.FormatInt(f.GetTrsvcid(), 10))
	if err != nil {
		return nil, err
	}
	if !validNQN(f.GetSubnqn()) || f.GetHostnqn() != "" && !validNQN(f.GetHostnqn()) {
		return nil, kind.Errorf(kind.Invalid, "subnqn %.223q, hostnqn %.223q: must begin with nqn. and have at most 223 bytes", f.GetSubnqn(), f.GetHostnqn())
	}
	if err := chosen(r.GetNvmePathId(), addressID(a), "a path to this address"); err != nil {
		return nil, err
	}
	p, err := ensure(func() (*path, error) { return b.path(ctx, controller, addressID(a)) }, func(p *path) error {
		name := join(remotes, controller, paths, addressID(a))
		switch {
		case p.TransportID.SubNQN != f.GetSubnqn():
			return differs(name, "subnqn", p.TransportID.SubNQN, f.GetSubnqn())
		case f.GetHostnqn() != "" && p.Host.NQN != "" && p.Host.NQN != f.GetHostnqn():
			return differs(name, "hostnqn", p.Host.NQN, f.GetHostnqn())
		}
		return nil
	}, func() error {
		params := spdk.BdevNVMeAttachControllerParams{Name: controller, Type: a.Type, Family: a.Family, Address: a.Address, Service: a.Service,
			SubNQN: f.GetSubnqn(), HostNQN: f.GetHostnqn(), HostAddress: f.GetSourceTraddr(), Multipath: "multipath",
			LossTimeoutSec: &lossTimeoutSec, ReconnectDelaySec: reconnectDelaySec}
		if f.GetSourceTrsvcid() != 0 {
			params.HostService = strconv.FormatInt(f.GetSourceTrsvcid(), 10)
		}
		_, err := b.spdk.BdevNVMeAttachController(ctx, params)
		return err
	})
	if err != nil {
		return nil, err
	}
	return p.proto(), nil
}

// GetNvmePath returns a path.
func (b *Bridge) GetNvmePath(ctx context.Context, r *opiv1.GetNvmePathRequest) (*opiv1.NvmePath, error) {
	p, err := b.pathNamed(ctx, r.GetName())
	if err != nil {
		return nil, err
	}
	return p.proto(), nil
}

// ListNvmePaths lists the paths of a controller.
func (b *Bridge) ListNvmePaths(ctx context.Context, r *opiv1.ListNvmePathsRequest) (*opiv1.ListNvmePathsResponse, error) {
	c, err := b.remoteNamed(ctx, r.GetParent())
	if err != nil {
		return nil, err
	}
	var list []*opiv1.NvmePath
	for _, p := range c.Paths {
		list = append(list, (&path{c.Name, p}).proto())
	}
	list, next, err := page(list, (*opiv1.NvmePath).GetName, r.GetPageSize(), r.GetPageToken())
	return &opiv1.ListNvmePathsResponse{NvmePaths: list, NextPageToken: next}, err
}

// UpdateNvmePath changes nothing: a path is its address.
func (b *Bridge) UpdateNvmePath(ctx context.Context, r *opiv1.UpdateNvmePathRequest) (*opiv1.NvmePath, error) {
	want := r.GetNvmePath()
	p, err := b.pathNamed(ctx, want.GetName())
	if errors.Is(err, kind.NotFound) && r.GetAllowMissing() {
		parent, id, _ := strings.Cut(want.GetName(), "/"+paths+"/")
		return b.CreateNvmePath(ctx, &opiv1.CreateNvmePathRequest{Parent: parent, NvmePathId: id, NvmePath: want})
	}
	if err != nil {
		return nil, err
	}
	return unchangeable(p.proto(), want, r.GetUpdateMask())
}

// DeleteNvmePath ends a connection. With the last one the controller and its volumes go.
func (b *Bridge) DeleteNvmePath(ctx context.Context, r *opiv1.DeleteNvmePathRequest) (*emptypb.Empty, error) {
	err := remove(r.GetAllowMissing(), func() (*path, error) { return b.pathNamed(ctx, r.GetName()) },
		func(p *path) error { return b.spdk.BdevNVMeDetachController(ctx, p.controller, p.TransportID) })
	return &emptypb.Empty{}, err
}
