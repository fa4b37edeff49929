package spdk

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"

	opiv1 "github.com/opiproject/opi-api/storage/v1alpha1/gen/go"

	"github.com/thaw-project/thaw/attacher"
	"github.com/thaw-project/thaw/kind"
)

// What the bridge is asked for subsystems. Its creations and deletions may be repeated.

// subsystemName is the resource of an NQN: bytes other than these are written as %XX.
func subsystemName(nqn string) string {
	var s strings.Builder
	s.WriteString("nvmeSubsystems/")
	for i := range len(nqn) {
		c := nqn[i]
		if c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || strings.IndexByte("-._~:@+", c) >= 0 {
			s.WriteByte(c)
		} else {
			fmt.Fprintf(&s, "%%%02X", c)
		}
	}
	return s.String()
}

const everySubsystem = "nvmeSubsystems/-"

// subsystem is one of the store's as the target has it.
type subsystem struct {
	nqn, host string
	shown     map[string]*opiv1.NvmeNamespaceSpec // by UUID
	listeners map[portal]bool
}

// missing tells whether there is no subsystem of an NQN.
func (b *Backend) missing(ctx context.Context, nqn string) (bool, error) {
	_, err := b.fe.GetNvmeSubsystem(ctx, &opiv1.GetNvmeSubsystemRequest{Name: subsystemName(nqn)})
	if errors.Is(err, kind.NotFound) {
		return true, nil
	}
	return false, err
}

// subsystems reads all of the store's, by NQN.
func (b *Backend) subsystems(ctx context.Context) (map[string]*subsystem, error) {
	all := map[string]*subsystem{}
	for token := ""; ; {
		r, err := b.fe.ListNvmeSubsystems(ctx, &opiv1.ListNvmeSubsystemsRequest{PageSize: pageSize, PageToken: token})
		if err != nil {
			return nil, err
		}
		for _, s := range r.GetNvmeSubsystems() {
			if nqn := s.GetSpec().GetNqn(); b.mine(nqn) {
				all[nqn] = &subsystem{nqn: nqn, host: s.GetSpec().GetHostnqn(), shown: map[string]*opiv1.NvmeNamespaceSpec{}, listeners: map[portal]bool{}}
			}
		}
		if token = r.GetNextPageToken(); token == "" {
			break
		}
	}
	if len(all) == 0 {
		return all, nil
	}
	byName := make(map[string]*subsystem, len(all))
	for _, s := range all {
		byName[subsystemName(s.nqn)] = s
	}
	of := func(name string) *subsystem { // whose a controller or nvmeNamespace is
		at := strings.LastIndexByte(name[:max(0, strings.LastIndexByte(name, '/'))], '/')
		return byName[name[:max(0, at)]]
	}
	for token := ""; ; {
		r, err := b.fe.ListNvmeNamespaces(ctx, &opiv1.ListNvmeNamespacesRequest{Parent: everySubsystem, PageSize: pageSize, PageToken: token})
		if err != nil {
			return nil, err
		}
		for _, n := range r.GetNvmeNamespaces() {
			if s := of(n.GetName()); s != nil {
				s.shown[n.GetSpec().GetUuid()] = n.GetSpec()
			}
		}
		if token = r.GetNextPageToken(); token == "" {
			break
		}
	}
	for token := ""; ; {
		r, err := b.fe.ListNvmeControllers(ctx, &opiv1.ListNvmeControllersRequest{Parent: everySubsystem, PageSize: pageSize, PageToken: token})
		if err != nil {
			return nil, err
		}
		for _, c := range r.GetNvmeControllers() {
			if s := of(c.GetName()); s != nil {
				if p, ok := portalOf(c.GetSpec()); ok {
					s.listeners[p] = true
				}
			}
		}
		if token = r.GetNextPageToken(); token == "" {
			return all, nil
		}
	}
}

// mine tells whether an NQN is one of the store's.
func (b *Backend) mine(nqn string) bool {
	return strings.HasPrefix(nqn, b.store.Subsystem("")) || nqn == b.store.Anchor()
}

func portalOf(c *opiv1.NvmeControllerSpec) (p portal, ok bool) {
	f := c.GetFabricsId()
	switch c.GetTrtype() {
	case opiv1.NvmeTransportType_NVME_TRANSPORT_TYPE_TCP:
		p.transport = attacher.TransportTCP
	case opiv1.NvmeTransportType_NVME_TRANSPORT_TYPE_RDMA:
		p.transport = attacher.TransportRDMA
	default:
		return p, false
	}
	a, err := netip.ParseAddrPort(netAddress(f.GetTraddr(), f.GetTrsvcid()))
	p.addr = a
	return p, err == nil
}

func netAddress(host, port string) string {
	if strings.Contains(host, ":") {
		host = "[" + host + "]"
	}
	return host + ":" + port
}

// createSubsystem makes a subsystem for one host, or keeps it. One that has our name and
// is another is made anew.
func (b *Backend) createSubsystem(ctx context.Context, nqn, host, serial string) error {
	r := &opiv1.CreateNvmeSubsystemRequest{NvmeSubsystem: &opiv1.NvmeSubsystem{Spec: &opiv1.NvmeSubsystemSpec{
		Nqn: nqn, SerialNumber: serial, ModelNumber: "Thaw", MaxNamespaces: attacher.MaxAttachments, Hostnqn: host}}}
	_, err := b.fe.CreateNvmeSubsystem(ctx, r)
	if errors.Is(err, kind.Exists) {
		b.log.Warn("a subsystem of the store is not as it made it: it is made anew", "subsystem", nqn, "error", err)
		if err := b.deleteSubsystem(ctx, nqn); err != nil {
			return err
		}
		_, err = b.fe.CreateNvmeSubsystem(ctx, r)
	}
	return err
}

func (b *Backend) deleteSubsystem(ctx context.Context, nqn string) error {
	_, err := b.fe.DeleteNvmeSubsystem(ctx, &opiv1.DeleteNvmeSubsystemRequest{Name: subsystemName(nqn), AllowMissing: true})
	return err
}

// deleteNamespace returns when no request for it is on its way.
func (b *Backend) deleteNamespace(ctx context.Context, nqn, id string) error {
	_, err := b.fe.DeleteNvmeNamespace(ctx, &opiv1.DeleteNvmeNamespaceRequest{Name: subsystemName(nqn) + "/nvmeNamespaces/" + id, AllowMissing: true})
	return err
}

func (b *Backend) listen(ctx context.Context, nqn string, p portal) error {
	t, family := opiv1.NvmeTransportType_NVME_TRANSPORT_TYPE_TCP, opiv1.NvmeAddressFamily_NVME_ADDRESS_FAMILY_IPV4
	if p.transport == attacher.TransportRDMA {
		t = opiv1.NvmeTransportType_NVME_TRANSPORT_TYPE_RDMA
	}
	if !p.addr.Addr().Is4() {
		family = opiv1.NvmeAddressFamily_NVME_ADDRESS_FAMILY_IPV6
	}
	_, err := b.fe.CreateNvmeController(ctx, &opiv1.CreateNvmeControllerRequest{Parent: subsystemName(nqn), NvmeController: &opiv1.NvmeController{Spec: &opiv1.NvmeControllerSpec{
		Trtype: t, Endpoint: &opiv1.NvmeControllerSpec_FabricsId{FabricsId: &opiv1.FabricsEndpoint{
			Traddr: p.addr.Addr().String(), Trsvcid: fmt.Sprint(p.addr.Port()), Adrfam: family}}}}})
	return err
}
