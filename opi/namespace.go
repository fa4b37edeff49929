package opi

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/google/uuid"
	opiv1 "github.com/opiproject/opi-api/storage/v1alpha1/gen/go"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/spdk"
)

// An nvmeNamespace is "nvmeSubsystems/{NQN}/nvmeNamespaces/{UUID}". Every one has a UUID:
// the volume's, when none is asked for.

// shown is an nvmeNamespace and where it is.
type shown struct {
	nqn string
	ns  spdk.NvmeNamespace
}

func (b *Bridge) nvmeNamespace(ctx context.Context, nqn, id string) (*shown, error) {
	s, err := b.subsystem(ctx, nqn)
	if err != nil {
		return nil, err
	}
	return nvmeNamespaceOf(s, id)
}

func nvmeNamespaceOf(s *spdk.Subsystem, id string) (*shown, error) {
	for _, n := range s.Namespaces {
		if strings.EqualFold(n.UUID, id) {
			return &shown{s.NQN, n}, nil
		}
	}
	return nil, kind.Errorf(kind.NotFound, "subsystem %s has no nvmeNamespace %.100q", s.NQN, id)
}

func (b *Bridge) nvmeNamespaceNamed(ctx context.Context, name string) (*shown, error) {
	texts, err := parse(name, subsystems, nvmeNamespaces)
	if err != nil {
		return nil, err
	}
	if err := canonical(texts[1]); err != nil {
		return nil, err
	}
	return b.nvmeNamespace(ctx, texts[0], texts[1])
}

// canonical wants a UUID in its one spelling, so that an nvmeNamespace has one name.
func canonical(id string) error {
	u, err := uuid.Parse(id)
	if err != nil || u.String() != id {
		return kind.Errorf(kind.Invalid, "uuid %.40q: must be 8-4-4-4-12 hex digits, in lower case", id)
	}
	return nil
}

// proto describes an nvmeNamespace; volumes has the names of the volumes behind, by bdev.
func (n *shown) proto(volumes map[string]string) *opiv1.NvmeNamespace {
	spec := &opiv1.NvmeNamespaceSpec{HostNsid: int32(n.ns.NSID), Uuid: strings.ToLower(n.ns.UUID), Nguid: strings.ToLower(n.ns.NGUID), VolumeNameRef: n.ns.BdevName}
	if name := volumes[n.ns.BdevName]; name != "" {
		spec.VolumeNameRef = name
	}
	if e, err := strconv.ParseUint(n.ns.EUI64, 16, 64); err == nil {
		spec.Eui64 = int64(e)
	}
	return &opiv1.NvmeNamespace{
		Name: join(subsystems, n.nqn, nvmeNamespaces, spec.Uuid), Spec: spec,
		Status: &opiv1.NvmeNamespaceStatus{State: opiv1.NvmeNamespaceStatus_STATE_ENABLED, OperState: opiv1.NvmeNamespaceStatus_OPER_STATE_ONLINE},
	}
}

// namespaceOf reads what a caller wants: with all that SPDK would choose but the NSID.
func namespaceOf(id string, spec *opiv1.NvmeNamespaceSpec, bdev *spdk.Bdev) (n spdk.NvmeNamespace, err error) {
	n = spdk.NvmeNamespace{NSID: uint32(spec.GetHostNsid()), BdevName: bdev.Name, UUID: spec.GetUuid()}
	if spec.GetHostNsid() < 0 {
		return n, kind.Errorf(kind.Invalid, "host_nsid %d is negative", spec.GetHostNsid())
	}
	if n.UUID == "" {
		n.UUID = id
	}
	if n.UUID == "" {
		n.UUID = bdev.UUID
	}
	if err := canonical(n.UUID); err != nil {
		return n, err
	}
	if err := chosen(id, n.UUID, "an nvmeNamespace with this uuid"); err != nil {
		return n, err
	}
	if g := spec.GetNguid(); g != "" {
		n.NGUID = strings.ToUpper(strings.ReplaceAll(g, "-", "")) // a UUID's spelling is common
		if len(n.NGUID) != 32 || strings.Trim(n.NGUID, "0123456789ABCDEF") != "" {
			return n, kind.Errorf(kind.Invalid, "nguid %.40q: must be 32 hex digits", g)
		}
	}
	if e := spec.GetEui64(); e != 0 {
		n.EUI64 = fmt.Sprintf("%016X", uint64(e))
	}
	return n, nil
}

// CreateNvmeNamespace shows a volume in a subsystem.
func (b *Bridge) CreateNvmeNamespace(ctx context.Context, r *opiv1.CreateNvmeNamespaceRequest) (*opiv1.NvmeNamespace, error) {
	nqn, err := parse1(r.GetParent(), subsystems)
	if err != nil {
		return nil, err
	}
	s, err := b.subsystem(ctx, nqn)
	if err != nil {
		return nil, err
	}
	spec := r.GetNvmeNamespace().GetSpec()
	bdev, err := b.volume(ctx, spec.GetVolumeNameRef())
	if err != nil {
		return nil, err
	}
	want, err := namespaceOf(r.GetNvmeNamespaceId(), spec, bdev)
	if err != nil {
		return nil, err
	}
	// A subsystem of many is long, and read no more often than must be.
	var made *shown
	read := func() (*shown, error) {
		if made != nil {
			return made, nil
		}
		at := s
		if s = nil; at != nil {
			return nvmeNamespaceOf(at, want.UUID)
		}
		return b.nvmeNamespace(ctx, nqn, want.UUID)
	}
	n, err := ensure(read, func(have *shown) error {
		name := join(subsystems, nqn, nvmeNamespaces, want.UUID)
		switch {
		case have.ns.BdevName != want.BdevName:
			return differs(name, "volume", have.ns.BdevName, want.BdevName)
		case want.NSID != 0 && have.ns.NSID != want.NSID:
			return differs(name, "host_nsid", have.ns.NSID, want.NSID)
		case want.NGUID != "" && !strings.EqualFold(have.ns.NGUID, want.NGUID):
			return differs(name, "nguid", have.ns.NGUID, want.NGUID)
		case want.EUI64 != "" && !strings.EqualFold(have.ns.EUI64, want.EUI64):
			return differs(name, "eui64", have.ns.EUI64, want.EUI64)
		}
		return nil
	}, func() error {
		nsid, err := b.spdk.NvmfSubsystemAddNs(ctx, nqn, want)
		if err == nil && want.NGUID != "" { // else the target chooses one
			made = &shown{nqn, want}
			made.ns.NSID = nsid
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	return n.proto(map[string]string{bdev.Name: volumeName(bdev)}), nil
}

// GetNvmeNamespace returns an nvmeNamespace.
func (b *Bridge) GetNvmeNamespace(ctx context.Context, r *opiv1.GetNvmeNamespaceRequest) (*opiv1.NvmeNamespace, error) {
	n, err := b.nvmeNamespaceNamed(ctx, r.GetName())
	if err != nil {
		return nil, err
	}
	volumes := map[string]string{}
	if bdev, err := b.spdk.Bdev(ctx, n.ns.BdevName); err == nil {
		volumes[bdev.Name] = volumeName(bdev)
	} else if !errors.Is(err, kind.NotFound) { // it is just going
		return nil, err
	}
	return n.proto(volumes), nil
}

// ListNvmeNamespaces lists the nvmeNamespaces of a subsystem, or of all ("nvmeSubsystems/-").
func (b *Bridge) ListNvmeNamespaces(ctx context.Context, r *opiv1.ListNvmeNamespacesRequest) (*opiv1.ListNvmeNamespacesResponse, error) {
	of, err := b.subsystemsOf(ctx, r.GetParent())
	if err != nil {
		return nil, err
	}
	bdevs, err := b.spdk.BdevGetBdevs(ctx, spdk.BdevGetBdevsParams{})
	if err != nil {
		return nil, err
	}
	volumes := make(map[string]string, len(bdevs))
	for i := range bdevs {
		volumes[bdevs[i].Name] = volumeName(&bdevs[i])
	}
	var list []*opiv1.NvmeNamespace
	for _, s := range of {
		for _, n := range s.Namespaces {
			list = append(list, (&shown{s.NQN, n}).proto(volumes))
		}
	}
	list, next, err := page(list, (*opiv1.NvmeNamespace).GetName, r.GetPageSize(), r.GetPageToken())
	return &opiv1.ListNvmeNamespacesResponse{NvmeNamespaces: list, NextPageToken: next}, err
}

// UpdateNvmeNamespace changes nothing: hosts know a disk by what could be changed.
func (b *Bridge) UpdateNvmeNamespace(ctx context.Context, r *opiv1.UpdateNvmeNamespaceRequest) (*opiv1.NvmeNamespace, error) {
	want := r.GetNvmeNamespace()
	have, err := b.GetNvmeNamespace(ctx, &opiv1.GetNvmeNamespaceRequest{Name: want.GetName()})
	if errors.Is(err, kind.NotFound) && r.GetAllowMissing() {
		parent, id, _ := strings.Cut(want.GetName(), "/"+nvmeNamespaces+"/")
		return b.CreateNvmeNamespace(ctx, &opiv1.CreateNvmeNamespaceRequest{Parent: parent, NvmeNamespaceId: id, NvmeNamespace: want})
	}
	if err != nil {
		return nil, err
	}
	return unchangeable(have, want, r.GetUpdateMask())
}

// DeleteNvmeNamespace hides a volume from the subsystem's hosts.
func (b *Bridge) DeleteNvmeNamespace(ctx context.Context, r *opiv1.DeleteNvmeNamespaceRequest) (*emptypb.Empty, error) {
	err := remove(r.GetAllowMissing(), func() (*shown, error) { return b.nvmeNamespaceNamed(ctx, r.GetName()) },
		func(n *shown) error { return b.spdk.NvmfSubsystemRemoveNs(ctx, n.nqn, n.ns.NSID) })
	return &emptypb.Empty{}, err
}

// StatsNvmeNamespace has the figures of the volume behind, whoever used it.
func (b *Bridge) StatsNvmeNamespace(ctx context.Context, r *opiv1.StatsNvmeNamespaceRequest) (*opiv1.StatsNvmeNamespaceResponse, error) {
	n, err := b.nvmeNamespaceNamed(ctx, r.GetName())
	if err != nil {
		return nil, err
	}
	stats, err := b.stats(ctx, n.ns.BdevName)
	return &opiv1.StatsNvmeNamespaceResponse{Stats: stats}, err
}
