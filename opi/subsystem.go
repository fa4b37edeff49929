package opi

import (
	"context"
	"errors"
	"slices"
	"strings"

	opiv1 "github.com/opiproject/opi-api/storage/v1alpha1/gen/go"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/spdk"
)

// A subsystem is "nvmeSubsystems/{NQN}".

// subsystem reads one: kind.NotFound when there is none.
func (b *Bridge) subsystem(ctx context.Context, nqn string) (*spdk.Subsystem, error) {
	list, err := b.spdk.NvmfGetSubsystems(ctx, nqn)
	var e *spdk.Error
	// Versions differ in the code for none, which must not be taken for another failure.
	if errors.As(err, &e) && !errors.Is(err, kind.NotFound) {
		list, err = b.spdk.NvmfGetSubsystems(ctx, "")
	}
	if err != nil && !errors.Is(err, kind.NotFound) {
		return nil, err
	}
	for i := range list {
		if list[i].NQN == nqn && list[i].Subtype == spdk.SubtypeNVMe {
			return &list[i], nil
		}
	}
	return nil, kind.Errorf(kind.NotFound, "the target has no subsystem %.223q", nqn)
}

func (b *Bridge) subsystemNamed(ctx context.Context, name string) (*spdk.Subsystem, error) {
	nqn, err := parse1(name, subsystems)
	if err != nil {
		return nil, err
	}
	return b.subsystem(ctx, nqn)
}

// every is the id that stands for all resources of a collection, in the parent of a list.
const every = "-"

// subsystemsOf reads the subsystem of a name, or all for that of every.
func (b *Bridge) subsystemsOf(ctx context.Context, name string) ([]*spdk.Subsystem, error) {
	nqn, err := parse1(name, subsystems)
	if err != nil {
		return nil, err
	}
	if nqn != every {
		s, err := b.subsystem(ctx, nqn)
		return []*spdk.Subsystem{s}, err
	}
	all, err := b.spdk.NvmfGetSubsystems(ctx, "")
	var list []*spdk.Subsystem
	for i := range all {
		if all[i].Subtype == spdk.SubtypeNVMe {
			list = append(list, &all[i])
		}
	}
	return list, err
}

func subsystemProto(s *spdk.Subsystem) *opiv1.NvmeSubsystem {
	host := ""
	for _, h := range s.Hosts {
		if host == "" || h.NQN < host { // OPI has one; the others are somebody else's
			host = h.NQN
		}
	}
	return &opiv1.NvmeSubsystem{
		Name: join(subsystems, s.NQN),
		Spec: &opiv1.NvmeSubsystemSpec{Nqn: s.NQN, SerialNumber: s.SerialNumber, ModelNumber: s.ModelNumber, MaxNamespaces: int64(s.MaxNamespaces), Hostnqn: host},
	}
}

// checkSubsystem bounds what goes to the target (NVMe Base 2.0, 4.5 and figure 275).
func checkSubsystem(s *opiv1.NvmeSubsystemSpec) error {
	switch nqn := s.GetNqn(); {
	case !validNQN(nqn):
		return kind.Errorf(kind.Invalid, "nqn %.223q: must begin with nqn. and have at most 223 bytes", nqn)
	case s.Hostnqn != "" && !validNQN(s.Hostnqn):
		return kind.Errorf(kind.Invalid, "hostnqn %.223q: must begin with nqn. and have at most 223 bytes", s.Hostnqn)
	case len(s.SerialNumber) > 20 || len(s.ModelNumber) > 40:
		return kind.Errorf(kind.Invalid, "a serial number has at most 20 bytes, a model number 40")
	case s.MaxNamespaces < 0 || s.MaxNamespaces > 1<<32-2:
		return kind.Errorf(kind.Invalid, "max_namespaces %d is not in 0 to 2^32-2", s.MaxNamespaces)
	case len(s.Psk) > 0:
		return kind.Errorf(kind.Unsupported, "psk: SPDK takes keys from its keyring, not from a request")
	}
	return nil
}

func validNQN(s string) bool {
	return strings.HasPrefix(s, "nqn.") && len(s) <= 223 && !strings.ContainsFunc(s, func(r rune) bool { return r <= ' ' || r == 0x7f })
}

// CreateNvmeSubsystem makes a subsystem that the host of hostnqn may use, or any host when
// that is empty.
func (b *Bridge) CreateNvmeSubsystem(ctx context.Context, r *opiv1.CreateNvmeSubsystemRequest) (*opiv1.NvmeSubsystem, error) {
	spec := r.GetNvmeSubsystem().GetSpec()
	if err := checkSubsystem(spec); err != nil {
		return nil, err
	}
	if err := chosen(r.GetNvmeSubsystemId(), spec.Nqn, "a subsystem"); err != nil {
		return nil, err
	}
	read := func() (*spdk.Subsystem, error) { return b.subsystem(ctx, spec.Nqn) }
	s, err := ensure(read, func(s *spdk.Subsystem) error { return b.complete(ctx, s, spec) }, func() error {
		return b.spdk.NvmfCreateSubsystem(ctx, spdk.SubsystemParams{NQN: spec.Nqn, SerialNumber: spec.SerialNumber, ModelNumber: spec.ModelNumber,
			MaxNamespaces: uint32(spec.MaxNamespaces), AllowAnyHost: spec.Hostnqn == ""})
	})
	if err != nil {
		return nil, err
	}
	p := subsystemProto(s)
	if len(s.Hosts) == 0 {
		p.Spec.Hostnqn = spec.Hostnqn // it was added since
	}
	return p, nil
}

// complete adds the host to a subsystem that was just made, or whose maker did not come
// to it.
func (b *Bridge) complete(ctx context.Context, s *spdk.Subsystem, spec *opiv1.NvmeSubsystemSpec) error {
	name := join(subsystems, s.NQN)
	switch {
	case spec.SerialNumber != "" && spec.SerialNumber != s.SerialNumber:
		return differs(name, "serial number", s.SerialNumber, spec.SerialNumber)
	case spec.ModelNumber != "" && spec.ModelNumber != s.ModelNumber:
		return differs(name, "model number", s.ModelNumber, spec.ModelNumber)
	case spec.MaxNamespaces != 0 && spec.MaxNamespaces != int64(s.MaxNamespaces):
		return differs(name, "max_namespaces", s.MaxNamespaces, spec.MaxNamespaces)
	case s.AllowAnyHost != (spec.Hostnqn == ""):
		return differs(name, "any host allowed", s.AllowAnyHost, spec.Hostnqn == "")
	case spec.Hostnqn == "" || hasHost(s, spec.Hostnqn):
		return nil
	case len(s.Hosts) > 0:
		return differs(name, "hostnqn", s.Hosts[0].NQN, spec.Hostnqn)
	}
	return b.addHost(ctx, s.NQN, spec.Hostnqn)
}

func hasHost(s *spdk.Subsystem, nqn string) bool {
	return slices.ContainsFunc(s.Hosts, func(h struct {
		NQN string `json:"nqn"`
	}) bool {
		return h.NQN == nqn
	})
}

// addHost succeeds also when somebody else was faster.
func (b *Bridge) addHost(ctx context.Context, nqn, host string) error {
	err := b.spdk.NvmfSubsystemAddHost(ctx, nqn, host, "")
	if err == nil {
		return nil
	}
	if s, rerr := b.subsystem(ctx, nqn); rerr == nil && hasHost(s, host) {
		return nil
	}
	return err
}

// GetNvmeSubsystem returns a subsystem.
func (b *Bridge) GetNvmeSubsystem(ctx context.Context, r *opiv1.GetNvmeSubsystemRequest) (*opiv1.NvmeSubsystem, error) {
	s, err := b.subsystemNamed(ctx, r.GetName())
	if err != nil {
		return nil, err
	}
	return subsystemProto(s), nil
}

// ListNvmeSubsystems lists all but the discovery subsystem.
func (b *Bridge) ListNvmeSubsystems(ctx context.Context, r *opiv1.ListNvmeSubsystemsRequest) (*opiv1.ListNvmeSubsystemsResponse, error) {
	all, err := b.spdk.NvmfGetSubsystems(ctx, "")
	if err != nil {
		return nil, err
	}
	list := make([]*opiv1.NvmeSubsystem, 0, len(all))
	for i := range all {
		if all[i].Subtype == spdk.SubtypeNVMe {
			list = append(list, subsystemProto(&all[i]))
		}
	}
	list, next, err := page(list, (*opiv1.NvmeSubsystem).GetName, r.GetPageSize(), r.GetPageToken())
	return &opiv1.ListNvmeSubsystemsResponse{NvmeSubsystems: list, NextPageToken: next}, err
}

// UpdateNvmeSubsystem changes hostnqn; all else is for good.
func (b *Bridge) UpdateNvmeSubsystem(ctx context.Context, r *opiv1.UpdateNvmeSubsystemRequest) (*opiv1.NvmeSubsystem, error) {
	s, err := b.subsystemNamed(ctx, r.GetNvmeSubsystem().GetName())
	if errors.Is(err, kind.NotFound) && r.GetAllowMissing() {
		return b.CreateNvmeSubsystem(ctx, &opiv1.CreateNvmeSubsystemRequest{NvmeSubsystem: r.GetNvmeSubsystem()})
	}
	if err != nil {
		return nil, err
	}
	have := subsystemProto(s)
	want, err := masked(have, r.GetNvmeSubsystem(), r.GetUpdateMask())
	if err != nil {
		return nil, err
	}
	if err := checkSubsystem(want.GetSpec()); err != nil {
		return nil, err
	}
	from, to := have.Spec.Hostnqn, want.Spec.Hostnqn
	want.Spec.Hostnqn = from
	if _, err := unchangeable(have, want, nil); err != nil {
		return nil, err
	}
	if err := b.changeHost(ctx, s, from, to); err != nil {
		return nil, err
	}
	return b.GetNvmeSubsystem(ctx, &opiv1.GetNvmeSubsystemRequest{Name: have.Name})
}

// changeHost lets the new host in before the old one is shut out: what is in between
// two steps must not be open to any host.
func (b *Bridge) changeHost(ctx context.Context, s *spdk.Subsystem, from, to string) error {
	if to == from {
		return nil
	}
	if to != "" && !hasHost(s, to) {
		if err := b.addHost(ctx, s.NQN, to); err != nil {
			return err
		}
	}
	if s.AllowAnyHost != (to == "") {
		if err := b.spdk.NvmfSubsystemAllowAnyHost(ctx, s.NQN, to == ""); err != nil {
			return err
		}
	}
	if from != "" {
		return b.spdk.NvmfSubsystemRemoveHost(ctx, s.NQN, from)
	}
	return nil
}

// DeleteNvmeSubsystem deletes a subsystem with its controllers and nvmeNamespaces, and
// unplugs its functions before.
func (b *Bridge) DeleteNvmeSubsystem(ctx context.Context, r *opiv1.DeleteNvmeSubsystemRequest) (*emptypb.Empty, error) {
	err := remove(r.GetAllowMissing(), func() (*spdk.Subsystem, error) { return b.subsystemNamed(ctx, r.GetName()) }, func(s *spdk.Subsystem) error {
		plugged, err := b.functions.Plugged(ctx, s.NQN)
		if err != nil {
			return err
		}
		for _, f := range plugged {
			if err := b.functions.Unplug(ctx, s.NQN, f); err != nil && !errors.Is(err, kind.NotFound) {
				return err
			}
		}
		return b.spdk.NvmfDeleteSubsystem(ctx, s.NQN)
	})
	return &emptypb.Empty{}, err
}

// StatsNvmeSubsystem adds up the figures of the volumes behind its nvmeNamespaces.
func (b *Bridge) StatsNvmeSubsystem(ctx context.Context, r *opiv1.StatsNvmeSubsystemRequest) (*opiv1.StatsNvmeSubsystemResponse, error) {
	s, err := b.subsystemNamed(ctx, r.GetName())
	if err != nil {
		return nil, err
	}
	var names []string
	for _, n := range s.Namespaces {
		names = append(names, n.BdevName)
	}
	stats, err := b.stats(ctx, names...)
	return &opiv1.StatsNvmeSubsystemResponse{Stats: stats}, err
}
