package opi_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	opiv1 "github.com/opiproject/opi-api/storage/v1alpha1/gen/go"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/fieldmaskpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/opi"
	"github.com/thaw-project/thaw/spdk"
)

func TestSubsystem(t *testing.T) {
	l := start(t, nil)
	ctx := t.Context()
	made := l.subsystem(nqn)
	if made.Name != sub || made.Spec.SerialNumber != "S1" || made.Spec.ModelNumber != "M1" || made.Spec.MaxNamespaces != 16 || made.Spec.Hostnqn != hostNQN {
		t.Errorf("%v", made)
	}
	if again := l.subsystem(nqn); !proto.Equal(again, made) {
		t.Errorf("made again: %v", again)
	}
	if have := must[*opiv1.NvmeSubsystem](t)(l.fe.GetNvmeSubsystem(ctx, &opiv1.GetNvmeSubsystemRequest{Name: sub})); !proto.Equal(have, made) {
		t.Errorf("%v", have)
	}
	s := must[[]spdk.Subsystem](t)(l.spdk.NvmfGetSubsystems(ctx, nqn))[0]
	if s.AllowAnyHost || len(s.Hosts) != 1 {
		t.Errorf("any host may connect: %+v", s)
	}
	create := func(id string, change func(*opiv1.NvmeSubsystemSpec)) (*opiv1.NvmeSubsystem, error) {
		spec := proto.CloneOf(made.Spec)
		change(spec)
		return l.fe.CreateNvmeSubsystem(ctx, &opiv1.CreateNvmeSubsystemRequest{NvmeSubsystemId: id, NvmeSubsystem: &opiv1.NvmeSubsystem{Spec: spec}})
	}
	exists, invalid := want[*opiv1.NvmeSubsystem](t, codes.AlreadyExists), want[*opiv1.NvmeSubsystem](t, codes.InvalidArgument)
	exists(create("", func(s *opiv1.NvmeSubsystemSpec) { s.SerialNumber = "S2" }))
	exists(create("", func(s *opiv1.NvmeSubsystemSpec) { s.ModelNumber = "M2" }))
	exists(create("", func(s *opiv1.NvmeSubsystemSpec) { s.MaxNamespaces = 17 }))
	exists(create("", func(s *opiv1.NvmeSubsystemSpec) { s.Hostnqn = "" }))
	exists(create("", func(s *opiv1.NvmeSubsystemSpec) { s.Hostnqn += "2" }))
	invalid(create("other", func(*opiv1.NvmeSubsystemSpec) {}))
	invalid(create("", func(s *opiv1.NvmeSubsystemSpec) { s.Nqn = "disk" }))
	invalid(create("", func(s *opiv1.NvmeSubsystemSpec) { s.Nqn += strings.Repeat("x", 223) }))
	invalid(create("", func(s *opiv1.NvmeSubsystemSpec) { s.SerialNumber = strings.Repeat("x", 21) }))
	invalid(create("", func(s *opiv1.NvmeSubsystemSpec) { s.MaxNamespaces = -1 }))
	want[*opiv1.NvmeSubsystem](t, codes.Unimplemented)(create("", func(s *opiv1.NvmeSubsystemSpec) { s.Psk = []byte("k") }))
	invalid(l.fe.CreateNvmeSubsystem(ctx, &opiv1.CreateNvmeSubsystemRequest{}))
	if _, err := create(nqn, func(*opiv1.NvmeSubsystemSpec) {}); err != nil {
		t.Errorf("its own id: %v", err)
	}

	// A maker that was killed before it came to the host is completed.
	if err := l.spdk.NvmfSubsystemRemoveHost(ctx, nqn, hostNQN); err != nil {
		t.Error(err)
	}
	if again := l.subsystem(nqn); again.Spec.Hostnqn != hostNQN {
		t.Errorf("%v", again)
	}

	update := func(mask []string, change func(*opiv1.NvmeSubsystem)) (*opiv1.NvmeSubsystem, error) {
		s := proto.CloneOf(made)
		change(s)
		return l.fe.UpdateNvmeSubsystem(ctx, &opiv1.UpdateNvmeSubsystemRequest{NvmeSubsystem: s, UpdateMask: &fieldmaskpb.FieldMask{Paths: mask}})
	}
	if s := must[*opiv1.NvmeSubsystem](t)(update([]string{"spec.hostnqn"}, func(s *opiv1.NvmeSubsystem) { s.Spec.Hostnqn, s.Spec.SerialNumber = hostNQN+"2", "not in the mask" })); s.Spec.Hostnqn != hostNQN+"2" || s.Spec.SerialNumber != "S1" {
		t.Errorf("%v", s)
	}
	if s := must[*opiv1.NvmeSubsystem](t)(update([]string{"spec.hostnqn"}, func(s *opiv1.NvmeSubsystem) { s.Spec.Hostnqn = "" })); s.Spec.Hostnqn != "" {
		t.Errorf("%v", s)
	}
	if s := must[*opiv1.NvmeSubsystem](t)(update(nil, func(*opiv1.NvmeSubsystem) {})); s.Spec.Hostnqn != hostNQN {
		t.Errorf("%v", s)
	}
	want[*opiv1.NvmeSubsystem](t, codes.Unimplemented)(update([]string{"spec.serial_number"}, func(s *opiv1.NvmeSubsystem) { s.Spec.SerialNumber = "S2" }))
	want[*opiv1.NvmeSubsystem](t, codes.InvalidArgument)(update([]string{"spec.nonsense"}, func(*opiv1.NvmeSubsystem) {}))
	want[*opiv1.NvmeSubsystem](t, codes.InvalidArgument)(update([]string{"spec"}, func(s *opiv1.NvmeSubsystem) { s.Spec = nil }))
	want[*opiv1.NvmeSubsystem](t, codes.NotFound)(update(nil, func(s *opiv1.NvmeSubsystem) { s.Name += "2" }))
	other := proto.CloneOf(made)
	other.Name, other.Spec.Nqn = sub+"2", nqn+"2"
	if s := must[*opiv1.NvmeSubsystem](t)(l.fe.UpdateNvmeSubsystem(ctx, &opiv1.UpdateNvmeSubsystemRequest{NvmeSubsystem: other, AllowMissing: true})); s.Name != sub+"2" {
		t.Errorf("%v", s)
	}

	want[*emptypb.Empty](t, codes.OK)(l.fe.DeleteNvmeSubsystem(ctx, &opiv1.DeleteNvmeSubsystemRequest{Name: sub}))
	want[*emptypb.Empty](t, codes.NotFound)(l.fe.DeleteNvmeSubsystem(ctx, &opiv1.DeleteNvmeSubsystemRequest{Name: sub}))
	want[*emptypb.Empty](t, codes.OK)(l.fe.DeleteNvmeSubsystem(ctx, &opiv1.DeleteNvmeSubsystemRequest{Name: sub, AllowMissing: true}))
	want[*emptypb.Empty](t, codes.InvalidArgument)(l.fe.DeleteNvmeSubsystem(ctx, &opiv1.DeleteNvmeSubsystemRequest{Name: "disk", AllowMissing: true}))
	want[*opiv1.NvmeSubsystem](t, codes.NotFound)(l.fe.GetNvmeSubsystem(ctx, &opiv1.GetNvmeSubsystemRequest{Name: sub}))
}

func TestPages(t *testing.T) {
	l := start(t, nil)
	ctx := t.Context()
	for i := range 60 {
		l.subsystem(fmt.Sprintf("%s%02d", nqn, i))
	}
	for _, size := range []int32{0, 1, 7, 59, 60, 61, 5000} {
		var names []string
		token := ""
		for {
			r := must[*opiv1.ListNvmeSubsystemsResponse](t)(l.fe.ListNvmeSubsystems(ctx, &opiv1.ListNvmeSubsystemsRequest{PageSize: size, PageToken: token}))
			for _, s := range r.NvmeSubsystems {
				names = append(names, s.Name)
			}
			if most := max(int(size), 0); most > 0 && len(r.NvmeSubsystems) > most || size == 0 && len(r.NvmeSubsystems) > 50 {
				t.Fatalf("a page of %d has %d", size, len(r.NvmeSubsystems))
			}
			if token = r.NextPageToken; token == "" {
				break
			}
		}
		if len(names) != 60 {
			t.Errorf("pages of %d: %d names", size, len(names))
		}
		for i, n := range names {
			if n != fmt.Sprintf("%s%02d", sub, i) {
				t.Errorf("pages of %d: %d is %s", size, i, n)
			}
		}
	}
	invalid := want[*opiv1.ListNvmeSubsystemsResponse](t, codes.InvalidArgument)
	invalid(l.fe.ListNvmeSubsystems(ctx, &opiv1.ListNvmeSubsystemsRequest{PageSize: -1}))
	invalid(l.fe.ListNvmeSubsystems(ctx, &opiv1.ListNvmeSubsystemsRequest{PageToken: "!"}))
}

func TestNamespace(t *testing.T) {
	l := start(t, nil)
	ctx := t.Context()
	l.subsystem(nqn)
	v := l.mallocVolume("m0")
	create := func(id string, spec *opiv1.NvmeNamespaceSpec) (*opiv1.NvmeNamespace, error) {
		return l.fe.CreateNvmeNamespace(ctx, &opiv1.CreateNvmeNamespaceRequest{Parent: sub, NvmeNamespaceId: id, NvmeNamespace: &opiv1.NvmeNamespace{Spec: spec}})
	}
	spec := &opiv1.NvmeNamespaceSpec{HostNsid: 5, Nguid: nguid, Uuid: uid, Eui64: -2, VolumeNameRef: v.Name}
	made := must[*opiv1.NvmeNamespace](t)(create("", spec))
	if made.Name != sub+"/nvmeNamespaces/"+uid || !proto.Equal(made.Spec, spec) {
		t.Errorf("%v", made)
	}
	n := must[[]spdk.Subsystem](t)(l.spdk.NvmfGetSubsystems(ctx, nqn))[0].Namespaces[0]
	if n.UUID != uid || !strings.EqualFold(n.NGUID, nguid) || n.NSID != 5 || n.BdevName != "m0" {
		t.Errorf("%+v", n)
	}
	for _, ref := range []string{v.Name, "m0", v.Uuid} {
		if again := must[*opiv1.NvmeNamespace](t)(create(uid, &opiv1.NvmeNamespaceSpec{VolumeNameRef: ref})); !proto.Equal(again, made) {
			t.Errorf("made again: %v", again)
		}
	}
	if have := must[*opiv1.NvmeNamespace](t)(l.fe.GetNvmeNamespace(ctx, &opiv1.GetNvmeNamespaceRequest{Name: made.Name})); !proto.Equal(have, made) {
		t.Errorf("%v", have)
	}
	exists, invalid := want[*opiv1.NvmeNamespace](t, codes.AlreadyExists), want[*opiv1.NvmeNamespace](t, codes.InvalidArgument)
	l.mallocVolume("m1")
	exists(create(uid, &opiv1.NvmeNamespaceSpec{VolumeNameRef: "m1"}))
	exists(create(uid, &opiv1.NvmeNamespaceSpec{VolumeNameRef: "m0", HostNsid: 6}))
	exists(create(uid, &opiv1.NvmeNamespaceSpec{VolumeNameRef: "m0", Nguid: strings.Repeat("a", 32)}))
	invalid(create("x", &opiv1.NvmeNamespaceSpec{VolumeNameRef: "m1"}))
	invalid(create("", &opiv1.NvmeNamespaceSpec{VolumeNameRef: "m1", Uuid: strings.ToUpper(uid)}))
	invalid(create("", &opiv1.NvmeNamespaceSpec{VolumeNameRef: "m1", Nguid: "xyz"}))
	invalid(create("", &opiv1.NvmeNamespaceSpec{VolumeNameRef: "m1", HostNsid: -1}))
	invalid(create("", &opiv1.NvmeNamespaceSpec{}))
	want[*opiv1.NvmeNamespace](t, codes.NotFound)(create("", &opiv1.NvmeNamespaceSpec{VolumeNameRef: "nosuch"}))

	// What the target refuses without saying why is told with its code.
	_, err := create("", &opiv1.NvmeNamespaceSpec{VolumeNameRef: "m1", HostNsid: 5})
	if s := status.Convert(err); s.Code() != codes.FailedPrecondition || len(s.Details()) != 1 || s.Details()[0].(*errdetails.ErrorInfo).Metadata["code"] != "-32602" {
		t.Errorf("%v", err)
	}
	// Without a choice the volume's own UUID counts.
	own := must[*opiv1.NvmeNamespace](t)(create("", &opiv1.NvmeNamespaceSpec{VolumeNameRef: "m1"}))
	if b := must[*spdk.Bdev](t)(l.spdk.Bdev(ctx, "m1")); own.Spec.Uuid != b.UUID || own.Spec.HostNsid == 0 {
		t.Errorf("%v", own)
	}
	list := must[*opiv1.ListNvmeNamespacesResponse](t)(l.fe.ListNvmeNamespaces(ctx, &opiv1.ListNvmeNamespacesRequest{Parent: sub}))
	if len(list.NvmeNamespaces) != 2 {
		t.Errorf("%v", list)
	}
	if n := must[*opiv1.NvmeNamespace](t)(l.fe.UpdateNvmeNamespace(ctx, &opiv1.UpdateNvmeNamespaceRequest{NvmeNamespace: made})); !proto.Equal(n, made) {
		t.Errorf("%v", n)
	}
	changed := proto.CloneOf(made)
	changed.Spec.VolumeNameRef = "mallocVolumes/m1"
	want[*opiv1.NvmeNamespace](t, codes.Unimplemented)(l.fe.UpdateNvmeNamespace(ctx, &opiv1.UpdateNvmeNamespaceRequest{NvmeNamespace: changed}))
	if r := must[*opiv1.StatsNvmeNamespaceResponse](t)(l.fe.StatsNvmeNamespace(ctx, &opiv1.StatsNvmeNamespaceRequest{Name: made.Name})); r.GetStats() == nil || r.Stats.WriteOpsCount != 0 {
		t.Errorf("%v", r)
	}
	want[*emptypb.Empty](t, codes.OK)(l.fe.DeleteNvmeNamespace(ctx, &opiv1.DeleteNvmeNamespaceRequest{Name: made.Name}))
	want[*emptypb.Empty](t, codes.NotFound)(l.fe.DeleteNvmeNamespace(ctx, &opiv1.DeleteNvmeNamespaceRequest{Name: made.Name}))
	want[*emptypb.Empty](t, codes.OK)(l.fe.DeleteNvmeNamespace(ctx, &opiv1.DeleteNvmeNamespaceRequest{Name: made.Name, AllowMissing: true}))
	want[*emptypb.Empty](t, codes.OK)(l.malloc.DeleteMallocVolume(ctx, &opiv1.DeleteMallocVolumeRequest{Name: "mallocVolumes/m1"}))
	want[*opiv1.NvmeNamespace](t, codes.NotFound)(l.fe.GetNvmeNamespace(ctx, &opiv1.GetNvmeNamespaceRequest{Name: own.Name}))
}

// TestChain shows a volume in one subsystem and finds it again as a remote one.
func TestChain(t *testing.T) {
	l, near := start(t, nil), start(t, nil)
	ctx := t.Context()
	l.subsystem(nqn)
	l.mallocVolume("m0")
	must[*opiv1.NvmeNamespace](t)(l.fe.CreateNvmeNamespace(ctx, &opiv1.CreateNvmeNamespaceRequest{Parent: sub, NvmeNamespace: &opiv1.NvmeNamespace{Spec: &opiv1.NvmeNamespaceSpec{Uuid: uid, VolumeNameRef: "m0"}}}))
	ports := []string{freePort(t), freePort(t)}
	for _, p := range ports {
		for range 2 {
			c := must[*opiv1.NvmeController](t)(l.fe.CreateNvmeController(ctx, &opiv1.CreateNvmeControllerRequest{Parent: sub, NvmeController: fabrics(p)}))
			if c.Name != sub+"/nvmeControllers/tcp:127.0.0.1:"+p || !c.Status.Active {
				t.Errorf("%v", c)
			}
			if have := must[*opiv1.NvmeController](t)(l.fe.GetNvmeController(ctx, &opiv1.GetNvmeControllerRequest{Name: c.Name})); !proto.Equal(have, c) {
				t.Errorf("%v", have)
			}
		}
	}
	const ctrl = "nvmeRemoteControllers/far"
	want[*opiv1.NvmeRemoteController](t, codes.Unimplemented)(near.remote.CreateNvmeRemoteController(ctx, &opiv1.CreateNvmeRemoteControllerRequest{NvmeRemoteControllerId: "far",
		NvmeRemoteController: &opiv1.NvmeRemoteController{Tcp: &opiv1.TcpController{Hdgst: true}}}))
	want[*opiv1.NvmeRemoteController](t, codes.InvalidArgument)(near.remote.CreateNvmeRemoteController(ctx, &opiv1.CreateNvmeRemoteControllerRequest{NvmeRemoteControllerId: "1"}))
	c := must[*opiv1.NvmeRemoteController](t)(near.remote.CreateNvmeRemoteController(ctx, &opiv1.CreateNvmeRemoteControllerRequest{NvmeRemoteControllerId: "far",
		NvmeRemoteController: &opiv1.NvmeRemoteController{Multipath: opiv1.NvmeMultipath_NVME_MULTIPATH_MULTIPATH}}))
	want[*opiv1.NvmeRemoteController](t, codes.NotFound)(near.remote.GetNvmeRemoteController(ctx, &opiv1.GetNvmeRemoteControllerRequest{Name: ctrl}))
	path := func(port, host string) *opiv1.CreateNvmePathRequest {
		var n int64
		fmt.Sscan(port, &n)
		return &opiv1.CreateNvmePathRequest{Parent: ctrl, NvmePath: &opiv1.NvmePath{Trtype: opiv1.NvmeTransportType_NVME_TRANSPORT_TYPE_TCP, Traddr: "127.0.0.1",
			Fabrics: &opiv1.FabricsPath{Trsvcid: n, Subnqn: nqn, Hostnqn: host}}}
	}
	if _, err := near.remote.CreateNvmePath(ctx, path(ports[0], hostNQN+"2")); err == nil {
		t.Error("a host that is not on the list got in")
	}
	var last *opiv1.NvmePath
	for _, p := range []string{ports[0], ports[0], ports[1]} {
		last = must[*opiv1.NvmePath](t)(near.remote.CreateNvmePath(ctx, path(p, hostNQN)))
		if last.Name != ctrl+"/nvmePaths/tcp:127.0.0.1:"+p || last.Fabrics.Subnqn != nqn {
			t.Errorf("%v", last)
		}
	}
	wrong := path(ports[0], hostNQN)
	wrong.NvmePath.Fabrics.Subnqn += "2"
	want[*opiv1.NvmePath](t, codes.AlreadyExists)(near.remote.CreateNvmePath(ctx, wrong))
	if have := must[*opiv1.NvmeRemoteController](t)(near.remote.GetNvmeRemoteController(ctx, &opiv1.GetNvmeRemoteControllerRequest{Name: ctrl})); !proto.Equal(have, c) {
		t.Errorf("%v", have)
	}
	if r := must[*opiv1.ListNvmePathsResponse](t)(near.remote.ListNvmePaths(ctx, &opiv1.ListNvmePathsRequest{Parent: ctrl})); len(r.NvmePaths) != 2 {
		t.Errorf("%v", r)
	}
	r := must[*opiv1.ListNvmeRemoteNamespacesResponse](t)(near.remote.ListNvmeRemoteNamespaces(ctx, &opiv1.ListNvmeRemoteNamespacesRequest{Parent: ctrl}))
	if len(r.NvmeRemoteNamespaces) != 1 || r.NvmeRemoteNamespaces[0].Uuid != uid {
		t.Fatalf("%v", r)
	}
	disk := r.NvmeRemoteNamespaces[0]
	if have := must[*opiv1.NvmeRemoteNamespace](t)(near.remote.GetNvmeRemoteNamespace(ctx, &opiv1.GetNvmeRemoteNamespaceRequest{Name: disk.Name})); !proto.Equal(have, disk) {
		t.Errorf("%v", have)
	}
	// It is a volume like any other.
	near.subsystem(nqn + "2")
	n := must[*opiv1.NvmeNamespace](t)(near.fe.CreateNvmeNamespace(ctx, &opiv1.CreateNvmeNamespaceRequest{Parent: sub + "2", NvmeNamespace: &opiv1.NvmeNamespace{Spec: &opiv1.NvmeNamespaceSpec{VolumeNameRef: disk.Name}}}))
	if n.Spec.Uuid != uid || n.Spec.VolumeNameRef != disk.Name {
		t.Errorf("%v", n)
	}
	want[*emptypb.Empty](t, codes.OK)(near.remote.DeleteNvmePath(ctx, &opiv1.DeleteNvmePathRequest{Name: last.Name}))
	want[*emptypb.Empty](t, codes.NotFound)(near.remote.DeleteNvmePath(ctx, &opiv1.DeleteNvmePathRequest{Name: last.Name}))
	want[*emptypb.Empty](t, codes.OK)(near.remote.DeleteNvmeRemoteController(ctx, &opiv1.DeleteNvmeRemoteControllerRequest{Name: ctrl}))
	want[*emptypb.Empty](t, codes.OK)(near.remote.DeleteNvmeRemoteController(ctx, &opiv1.DeleteNvmeRemoteControllerRequest{Name: ctrl, AllowMissing: true}))
	want[*emptypb.Empty](t, codes.OK)(l.fe.DeleteNvmeController(ctx, &opiv1.DeleteNvmeControllerRequest{Name: sub + "/nvmeControllers/tcp:127.0.0.1:" + ports[0]}))
	if r := must[*opiv1.ListNvmeControllersResponse](t)(l.fe.ListNvmeControllers(ctx, &opiv1.ListNvmeControllersRequest{Parent: sub})); len(r.NvmeControllers) != 1 {
		t.Errorf("%v", r)
	}
}

func (c *card) Plug(_ context.Context, nqn string, f opi.Function) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch have, ok := c.plugged[f]; {
	case f.Physical > 3:
		return kind.Errorf(kind.NotFound, "no function %s", f)
	case ok && have != nqn:
		return kind.Errorf(kind.InUse, "%s shows %s", f, have)
	}
	c.plugged[f] = nqn
	return nil
}

func (c *card) Unplug(_ context.Context, nqn string, f opi.Function) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.plugged[f] != nqn {
		return kind.Errorf(kind.NotFound, "%s does not show %s", f, nqn)
	}
	delete(c.plugged, f)
	return nil
}

func (c *card) Plugged(_ context.Context, nqn string) (list []opi.Function, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for f, n := range c.plugged {
		if n == nqn {
			list = append(list, f)
		}
	}
	return list, nil
}

func pcie(port, physical, virtual int32) *opiv1.NvmeController {
	return &opiv1.NvmeController{Spec: &opiv1.NvmeControllerSpec{Trtype: opiv1.NvmeTransportType_NVME_TRANSPORT_TYPE_PCIE,
		Endpoint: &opiv1.NvmeControllerSpec_PcieId{PcieId: &opiv1.PciEndpoint{PortId: wrapperspb.Int32(port), PhysicalFunction: wrapperspb.Int32(physical), VirtualFunction: wrapperspb.Int32(virtual)}}}}
}

// TestFunctions is with a card, and without.
func TestFunctions(t *testing.T) {
	ctx := t.Context()
	plain := start(t, nil)
	plain.subsystem(nqn)
	create := func(l *lab, parent string, c *opiv1.NvmeController) (*opiv1.NvmeController, error) {
		return l.fe.CreateNvmeController(ctx, &opiv1.CreateNvmeControllerRequest{Parent: parent, NvmeController: c})
	}
	_, err := create(plain, sub, pcie(0, 1, 2))
	if status.Code(err) != codes.Unimplemented || !strings.Contains(err.Error(), "no PCIe functions") {
		t.Errorf("%v", err)
	}
	dpu := &card{plugged: map[opi.Function]string{}}
	l := start(t, dpu)
	l.subsystem(nqn)
	l.subsystem(nqn + "2")
	for range 2 {
		c := must[*opiv1.NvmeController](t)(create(l, sub, pcie(0, 1, 2)))
		if c.Name != sub+"/nvmeControllers/pcie:0:1:2" || c.Spec.GetPcieId().GetVirtualFunction().GetValue() != 2 {
			t.Errorf("%v", c)
		}
	}
	code := want[*opiv1.NvmeController]
	code(t, codes.FailedPrecondition)(create(l, sub+"2", pcie(0, 1, 2)))
	code(t, codes.NotFound)(create(l, sub, pcie(0, 9, 0)))
	code(t, codes.InvalidArgument)(create(l, sub, pcie(0, -1, 0)))
	mixed := pcie(0, 1, 0)
	mixed.Spec.Trtype = opiv1.NvmeTransportType_NVME_TRANSPORT_TYPE_TCP
	code(t, codes.InvalidArgument)(create(l, sub, mixed))
	code(t, codes.InvalidArgument)(create(l, sub, &opiv1.NvmeController{}))
	code(t, codes.NotFound)(create(l, sub+"3", pcie(0, 1, 0)))
	tuned := pcie(0, 1, 0)
	tuned.Spec.MaxNsq = 4
	code(t, codes.Unimplemented)(create(l, sub, tuned))
	bad := fabrics("0")
	code(t, codes.InvalidArgument)(create(l, sub, bad))
	bad = fabrics("4420")
	bad.Spec.GetFabricsId().Traddr = "localhost"
	code(t, codes.InvalidArgument)(create(l, sub, bad))
	must[*opiv1.NvmeController](t)(create(l, sub, fabrics(freePort(t))))
	if r := must[*opiv1.ListNvmeControllersResponse](t)(l.fe.ListNvmeControllers(ctx, &opiv1.ListNvmeControllersRequest{Parent: sub})); len(r.NvmeControllers) != 2 {
		t.Errorf("%v", r)
	}
	must[*opiv1.NvmeController](t)(create(l, sub+"2", pcie(0, 2, 0)))
	if r := must[*opiv1.ListNvmeControllersResponse](t)(l.fe.ListNvmeControllers(ctx, &opiv1.ListNvmeControllersRequest{Parent: "nvmeSubsystems/-"})); len(r.NvmeControllers) != 3 ||
		r.NvmeControllers[0].Name != sub+"/nvmeControllers/pcie:0:1:2" || r.NvmeControllers[2].Name != sub+"2/nvmeControllers/pcie:0:2:0" {
		t.Errorf("%v", r)
	}
	for _, nqn := range []string{nqn, nqn + "2"} {
		must[*opiv1.NvmeNamespace](t)(l.fe.CreateNvmeNamespace(ctx, &opiv1.CreateNvmeNamespaceRequest{Parent: "nvmeSubsystems/" + nqn,
			NvmeNamespace: &opiv1.NvmeNamespace{Spec: &opiv1.NvmeNamespaceSpec{VolumeNameRef: l.mallocVolume("m" + nqn[len(nqn)-1:]).Name}}}))
	}
	if r := must[*opiv1.ListNvmeNamespacesResponse](t)(l.fe.ListNvmeNamespaces(ctx, &opiv1.ListNvmeNamespacesRequest{Parent: "nvmeSubsystems/-"})); len(r.NvmeNamespaces) != 2 ||
		r.NvmeNamespaces[0].Spec.VolumeNameRef != "mallocVolumes/mk" || r.NvmeNamespaces[1].Spec.VolumeNameRef != "mallocVolumes/m2" {
		t.Errorf("%v", r)
	}
	name := sub + "/nvmeControllers/pcie:0:1:2"
	want[*emptypb.Empty](t, codes.OK)(l.fe.DeleteNvmeController(ctx, &opiv1.DeleteNvmeControllerRequest{Name: name}))
	want[*emptypb.Empty](t, codes.NotFound)(l.fe.DeleteNvmeController(ctx, &opiv1.DeleteNvmeControllerRequest{Name: name}))
	must[*opiv1.NvmeController](t)(create(l, sub, pcie(0, 1, 2)))
	want[*emptypb.Empty](t, codes.OK)(l.fe.DeleteNvmeSubsystem(ctx, &opiv1.DeleteNvmeSubsystemRequest{Name: sub}))
	if n, _ := dpu.Plugged(ctx, nqn); len(n) != 0 {
		t.Errorf("a function shows a subsystem that is gone: %v", n)
	}
}

func TestVolumes(t *testing.T) {
	l := start(t, nil)
	ctx := t.Context()
	file := filepath.Join(shortDir(t), "f")
	if err := os.WriteFile(file, make([]byte, 8<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	aio := func(id string, v *opiv1.AioVolume) (*opiv1.AioVolume, error) {
		return l.aio.CreateAioVolume(ctx, &opiv1.CreateAioVolumeRequest{AioVolumeId: id, AioVolume: v})
	}
	code := want[*opiv1.AioVolume]
	wanted := &opiv1.AioVolume{Filename: file, BlockSize: 512, Uuid: uid}
	v := must[*opiv1.AioVolume](t)(aio("a0", wanted))
	if v.Name != "aioVolumes/a0" || v.BlocksCount != 16384 || v.Filename != file || v.Uuid != uid {
		t.Errorf("%v", v)
	}
	if again := must[*opiv1.AioVolume](t)(aio("a0", wanted)); !proto.Equal(again, v) {
		t.Errorf("%v", again)
	}
	code(t, codes.AlreadyExists)(aio("a0", &opiv1.AioVolume{Filename: file + "2"}))
	code(t, codes.AlreadyExists)(aio("a0", &opiv1.AioVolume{Filename: file, BlockSize: 4096}))
	code(t, codes.FailedPrecondition)(aio("a1", &opiv1.AioVolume{Filename: file})) // it is locked
	code(t, codes.NotFound)(aio("a1", &opiv1.AioVolume{Filename: file + "2"}))
	code(t, codes.InvalidArgument)(aio("a 1", &opiv1.AioVolume{Filename: file}))
	code(t, codes.InvalidArgument)(aio("", &opiv1.AioVolume{Filename: file}))
	code(t, codes.InvalidArgument)(aio("a1", nil))
	code(t, codes.InvalidArgument)(aio("a1", &opiv1.AioVolume{Filename: file, Uuid: "x"}))
	if have := must[*opiv1.AioVolume](t)(l.aio.GetAioVolume(ctx, &opiv1.GetAioVolumeRequest{Name: v.Name})); !proto.Equal(have, v) {
		t.Errorf("%v", have)
	}
	code(t, codes.NotFound)(l.aio.GetAioVolume(ctx, &opiv1.GetAioVolumeRequest{Name: "aioVolumes/" + uid})) // an alias
	want[*opiv1.MallocVolume](t, codes.NotFound)(l.malloc.GetMallocVolume(ctx, &opiv1.GetMallocVolumeRequest{Name: "mallocVolumes/a0"}))
	want[*emptypb.Empty](t, codes.NotFound)(l.malloc.DeleteMallocVolume(ctx, &opiv1.DeleteMallocVolumeRequest{Name: "mallocVolumes/a0"}))
	want[*emptypb.Empty](t, codes.OK)(l.aio.DeleteAioVolume(ctx, &opiv1.DeleteAioVolumeRequest{Name: v.Name}))
	want[*emptypb.Empty](t, codes.NotFound)(l.aio.DeleteAioVolume(ctx, &opiv1.DeleteAioVolumeRequest{Name: v.Name}))
	code(t, codes.InvalidArgument)(aio("a0", &opiv1.AioVolume{Filename: file, BlocksCount: 7}))
	code(t, codes.NotFound)(l.aio.GetAioVolume(ctx, &opiv1.GetAioVolumeRequest{Name: v.Name})) // no trace of it

	m := l.mallocVolume("m0")
	if again := l.mallocVolume("m0"); !proto.Equal(again, m) || m.BlocksCount != 16<<8 {
		t.Errorf("%v", again)
	}
	mcode := want[*opiv1.MallocVolume]
	malloc := func(id string, v *opiv1.MallocVolume) (*opiv1.MallocVolume, error) {
		return l.malloc.CreateMallocVolume(ctx, &opiv1.CreateMallocVolumeRequest{MallocVolumeId: id, MallocVolume: v})
	}
	mcode(t, codes.AlreadyExists)(malloc("m0", &opiv1.MallocVolume{BlockSize: 4096, BlocksCount: 17}))
	mcode(t, codes.InvalidArgument)(malloc("m1", &opiv1.MallocVolume{BlockSize: 4096}))
	mcode(t, codes.Unimplemented)(malloc("m1", &opiv1.MallocVolume{BlockSize: 4096, BlocksCount: 8, MetadataSize: 8}))
	mcode(t, codes.ResourceExhausted)(malloc("m1", &opiv1.MallocVolume{BlockSize: 4096, BlocksCount: 1 << 40}))
	if r := must[*opiv1.ListMallocVolumesResponse](t)(l.malloc.ListMallocVolumes(ctx, &opiv1.ListMallocVolumesRequest{})); len(r.MallocVolumes) != 1 {
		t.Errorf("%v", r)
	}
	up := proto.CloneOf(m)
	up.BlocksCount = 1
	mcode(t, codes.Unimplemented)(l.malloc.UpdateMallocVolume(ctx, &opiv1.UpdateMallocVolumeRequest{MallocVolume: up}))
	mcode(t, codes.OK)(l.malloc.UpdateMallocVolume(ctx, &opiv1.UpdateMallocVolumeRequest{MallocVolume: up, UpdateMask: &fieldmaskpb.FieldMask{Paths: []string{"block_size"}}}))
	up.Name, up.Uuid = "mallocVolumes/m2", ""
	mcode(t, codes.OK)(l.malloc.UpdateMallocVolume(ctx, &opiv1.UpdateMallocVolumeRequest{MallocVolume: up, AllowMissing: true}))

	n := must[*opiv1.NullVolume](t)(l.null.CreateNullVolume(ctx, &opiv1.CreateNullVolumeRequest{NullVolumeId: "n0", NullVolume: &opiv1.NullVolume{BlockSize: 512, BlocksCount: 8}}))
	if have := must[*opiv1.NullVolume](t)(l.null.GetNullVolume(ctx, &opiv1.GetNullVolumeRequest{Name: "nullVolumes/n0"})); !proto.Equal(have, n) || have.BlocksCount != 8 {
		t.Errorf("%v, created as %v", have, n)
	}
	want[*opiv1.NullVolume](t, codes.AlreadyExists)(l.null.CreateNullVolume(ctx, &opiv1.CreateNullVolumeRequest{NullVolumeId: "n0", NullVolume: &opiv1.NullVolume{BlockSize: 512, BlocksCount: 9}}))
	want[*emptypb.Empty](t, codes.OK)(l.null.DeleteNullVolume(ctx, &opiv1.DeleteNullVolumeRequest{Name: n.Name}))
	want[*opiv1.NullVolume](t, codes.NotFound)(l.null.GetNullVolume(ctx, &opiv1.GetNullVolumeRequest{Name: n.Name}))
}

func TestUnavailable(t *testing.T) {
	root := shortDir(t)
	stop, err := serveBridge(root, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer stop()
	l := newLab(t, root)
	_, err = l.fe.ListNvmeSubsystems(t.Context(), &opiv1.ListNvmeSubsystemsRequest{})
	if status.Code(err) != codes.Unavailable || !errors.Is(err, kind.Unavailable) {
		t.Errorf("%v", err)
	}
}
