package opi

import (
	"context"
	"errors"
	"strings"

	opiv1 "github.com/opiproject/opi-api/storage/v1alpha1/gen/go"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/spdk"
)

// A controller is where hosts find a subsystem: a listener on a fabrics address,
// "nvmeSubsystems/{NQN}/nvmeControllers/tcp:192.0.2.1:4420", or a PCIe function of a card,
// ".../pcie:{port}:{physical function}:{virtual function}".

// place is a controller without its subsystem.
type place struct {
	nqn      string
	fabrics  spdk.TransportID // zero for a function
	function *Function
}

func (p *place) id() string {
	if p.function != nil {
		return p.function.String()
	}
	return addressID(p.fabrics)
}

func (p *place) proto() *opiv1.NvmeController {
	c := &opiv1.NvmeController{
		Name:   join(subsystems, p.nqn, controllers, p.id()),
		Spec:   &opiv1.NvmeControllerSpec{},
		Status: &opiv1.NvmeControllerStatus{Active: true},
	}
	if f := p.function; f != nil {
		c.Spec.Trtype = opiv1.NvmeTransportType_NVME_TRANSPORT_TYPE_PCIE
		c.Spec.Endpoint = &opiv1.NvmeControllerSpec_PcieId{PcieId: &opiv1.PciEndpoint{
			PortId: wrapperspb.Int32(int32(f.Port)), PhysicalFunction: wrapperspb.Int32(int32(f.Physical)), VirtualFunction: wrapperspb.Int32(int32(f.Virtual))}}
		return c
	}
	a := normal(p.fabrics)
	c.Spec.Trtype = transportOf(a.Type)
	c.Spec.Endpoint = &opiv1.NvmeControllerSpec_FabricsId{FabricsId: &opiv1.FabricsEndpoint{Traddr: a.Address, Trsvcid: a.Service, Adrfam: familyOf(a.Family)}}
	return c
}

// placeOf reads what a caller wants.
func placeOf(nqn string, spec *opiv1.NvmeControllerSpec) (*place, error) {
	if spec.GetNvmeControllerId() != 0 || spec.GetMaxNsq() != 0 || spec.GetMaxNcq() != 0 || spec.GetSqes() != 0 || spec.GetCqes() != 0 || spec.GetMaxNamespaces() != 0 ||
		spec.GetMinLimit() != nil || spec.GetMaxLimit() != nil {
		return nil, kind.Errorf(kind.Unsupported, "a controller's id, queues, entry sizes, max_namespaces and limits are the target's: leave them out")
	}
	switch e := spec.GetEndpoint().(type) {
	case *opiv1.NvmeControllerSpec_PcieId:
		if t := spec.GetTrtype(); t != opiv1.NvmeTransportType_NVME_TRANSPORT_TYPE_PCIE {
			return nil, kind.Errorf(kind.Invalid, "trtype %s with a pcie_id: must be PCIE", t)
		}
		f, err := functionOf(e.PcieId)
		return &place{nqn: nqn, function: &f}, err
	case *opiv1.NvmeControllerSpec_FabricsId:
		a, err := addressOf(spec.GetTrtype(), e.FabricsId.GetAdrfam(), e.FabricsId.GetTraddr(), e.FabricsId.GetTrsvcid())
		return &place{nqn: nqn, fabrics: a}, err
	}
	return nil, kind.Errorf(kind.Invalid, "a controller has a pcie_id or a fabrics_id")
}

// placesOf reads the controllers of a subsystem.
func (b *Bridge) placesOf(ctx context.Context, s *spdk.Subsystem) ([]*place, error) {
	nqn := s.NQN
	plugged, err := b.functions.Plugged(ctx, nqn)
	if err != nil {
		return nil, err
	}
	var list []*place
	for _, l := range s.Listeners {
		list = append(list, &place{nqn: nqn, fabrics: l})
	}
	for _, f := range plugged {
		list = append(list, &place{nqn: nqn, function: &f})
	}
	return list, nil
}

func (b *Bridge) place(ctx context.Context, nqn, id string) (*place, error) {
	s, err := b.subsystem(ctx, nqn)
	if err != nil {
		return nil, err
	}
	return b.placeIn(ctx, s, id)
}

func (b *Bridge) placeIn(ctx context.Context, s *spdk.Subsystem, id string) (*place, error) {
	list, err := b.placesOf(ctx, s)
	if err != nil {
		return nil, err
	}
	for _, p := range list {
		if p.id() == id {
			return p, nil
		}
	}
	return nil, kind.Errorf(kind.NotFound, "subsystem %s has no controller %.100q", s.NQN, id)
}

func (b *Bridge) placeNamed(ctx context.Context, name string) (*place, error) {
	texts, err := parse(name, subsystems, controllers)
	if err != nil {
		return nil, err
	}
	return b.place(ctx, texts[0], texts[1])
}

// CreateNvmeController lets hosts find a subsystem. The transport is made when this is
// its first listener.
func (b *Bridge) CreateNvmeController(ctx context.Context, r *opiv1.CreateNvmeControllerRequest) (*opiv1.NvmeController, error) {
	nqn, err := parse1(r.GetParent(), subsystems)
	if err != nil {
		return nil, err
	}
	want, err := placeOf(nqn, r.GetNvmeController().GetSpec())
	if err != nil {
		return nil, err
	}
	if err := chosen(r.GetNvmeControllerId(), want.id(), "this controller"); err != nil {
		return nil, err
	}
	s, err := b.subsystem(ctx, nqn)
	if err != nil { // which is not the same as a controller that is missing
		return nil, err
	}
	if want.function != nil { // also when it is plugged: what it shows may be there anew
		if err := b.functions.Plug(ctx, nqn, *want.function); err != nil {
			return nil, err
		}
	}
	read := func() (*place, error) {
		at := s
		if s = nil; at != nil { // else as it is now
			return b.placeIn(ctx, at, want.id())
		}
		return b.place(ctx, nqn, want.id())
	}
	p, err := ensure(read, func(*place) error { return nil }, func() error {
		if want.function != nil {
			return kind.Errorf(kind.Unavailable, "%s was plugged and does not show %s: it was unplugged meanwhile", want.id(), nqn)
		}
		if err := b.ensureTransport(ctx, want.fabrics.Type); err != nil {
			return err
		}
		return b.spdk.NvmfSubsystemAddListener(ctx, nqn, want.fabrics)
	})
	if err != nil {
		return nil, err
	}
	return p.proto(), nil
}

func (b *Bridge) ensureTransport(ctx context.Context, t string) error {
	_, err := ensure(func() (bool, error) {
		list, err := b.spdk.NvmfGetTransports(ctx)
		for _, have := range list {
			if strings.EqualFold(have.Type, t) {
				return true, nil
			}
		}
		if err == nil {
			err = kind.Errorf(kind.NotFound, "the target has no transport %s", t)
		}
		return false, err
	}, func(bool) error { return nil }, func() error { return b.spdk.NvmfCreateTransport(ctx, spdk.TransportParams{Type: t}) })
	return err
}

// GetNvmeController returns a controller.
func (b *Bridge) GetNvmeController(ctx context.Context, r *opiv1.GetNvmeControllerRequest) (*opiv1.NvmeController, error) {
	p, err := b.placeNamed(ctx, r.GetName())
	if err != nil {
		return nil, err
	}
	return p.proto(), nil
}

// ListNvmeControllers lists the controllers of a subsystem, or of all ("nvmeSubsystems/-",
// aip.dev/159).
func (b *Bridge) ListNvmeControllers(ctx context.Context, r *opiv1.ListNvmeControllersRequest) (*opiv1.ListNvmeControllersResponse, error) {
	of, err := b.subsystemsOf(ctx, r.GetParent())
	if err != nil {
		return nil, err
	}
	var all []*place
	for _, s := range of {
		list, err := b.placesOf(ctx, s)
		if err != nil {
			return nil, err
		}
		all = append(all, list...)
	}
	var list []*opiv1.NvmeController
	for _, p := range all {
		list = append(list, p.proto())
	}
	list, next, err := page(list, (*opiv1.NvmeController).GetName, r.GetPageSize(), r.GetPageToken())
	return &opiv1.ListNvmeControllersResponse{NvmeControllers: list, NextPageToken: next}, err
}

// UpdateNvmeController changes nothing: a controller is its place.
func (b *Bridge) UpdateNvmeController(ctx context.Context, r *opiv1.UpdateNvmeControllerRequest) (*opiv1.NvmeController, error) {
	want := r.GetNvmeController()
	p, err := b.placeNamed(ctx, want.GetName())
	if errors.Is(err, kind.NotFound) && r.GetAllowMissing() {
		parent, id, _ := strings.Cut(want.GetName(), "/"+controllers+"/")
		return b.CreateNvmeController(ctx, &opiv1.CreateNvmeControllerRequest{Parent: parent, NvmeControllerId: id, NvmeController: want})
	}
	if err != nil {
		return nil, err
	}
	return unchangeable(p.proto(), want, r.GetUpdateMask())
}

// DeleteNvmeController ends the connections that hosts made there.
func (b *Bridge) DeleteNvmeController(ctx context.Context, r *opiv1.DeleteNvmeControllerRequest) (*emptypb.Empty, error) {
	err := remove(r.GetAllowMissing(), func() (*place, error) { return b.placeNamed(ctx, r.GetName()) }, func(p *place) error {
		if p.function != nil {
			return b.functions.Unplug(ctx, p.nqn, *p.function)
		}
		a := p.fabrics
		a.SubNQN = ""
		return b.spdk.NvmfSubsystemRemoveListener(ctx, p.nqn, a)
	})
	return &emptypb.Empty{}, err
}
