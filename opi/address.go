package opi

import (
	"net/netip"
	"strconv"
	"strings"

	opiv1 "github.com/opiproject/opi-api/storage/v1alpha1/gen/go"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/spdk"
)

// addressOf makes SPDK's address of OPI's. The transports over IP are TCP and RDMA.
func addressOf(t opiv1.NvmeTransportType, family opiv1.NvmeAddressFamily, address, service string) (spdk.TransportID, error) {
	id := spdk.TransportID{Service: service}
	switch t {
	case opiv1.NvmeTransportType_NVME_TRANSPORT_TYPE_TCP:
		id.Type = "TCP"
	case opiv1.NvmeTransportType_NVME_TRANSPORT_TYPE_RDMA:
		id.Type = "RDMA"
	default:
		return id, kind.Errorf(kind.Invalid, "trtype %s: a fabrics address is of TCP or RDMA", t)
	}
	ip, err := netip.ParseAddr(address)
	if err != nil || ip.Zone() != "" {
		return id, kind.Errorf(kind.Invalid, "traddr %.100q is no IP address", address)
	}
	id.Family, id.Address = "IPv6", ip.String()
	want := opiv1.NvmeAddressFamily_NVME_ADDRESS_FAMILY_IPV6
	if ip.Is4() {
		id.Family, want = "IPv4", opiv1.NvmeAddressFamily_NVME_ADDRESS_FAMILY_IPV4
	}
	if family != want && family != opiv1.NvmeAddressFamily_NVME_ADDRESS_FAMILY_UNSPECIFIED {
		return id, kind.Errorf(kind.Invalid, "adrfam %s, but traddr %s is %s", family, ip, id.Family)
	}
	if n, err := strconv.ParseUint(service, 10, 16); err != nil || n == 0 || strconv.FormatUint(n, 10) != service {
		return id, kind.Errorf(kind.Invalid, "trsvcid %.40q is no port", service)
	}
	return id, nil
}

// normal is an address as addressOf writes it, whatever the target's spelling.
func normal(id spdk.TransportID) spdk.TransportID {
	id.Type, id.SubNQN = strings.ToUpper(id.Type), ""
	if ip, err := netip.ParseAddr(id.Address); err == nil {
		id.Address, id.Family = ip.String(), "IPv6"
		if ip.Is4() {
			id.Family = "IPv4"
		}
	}
	return id
}

// addressID is the id of what is at an address. An IP address tells its family.
func addressID(id spdk.TransportID) string {
	id = normal(id)
	text := strings.ToLower(id.Type) + ":" + id.Address
	if id.Service != "" {
		text += ":" + id.Service
	}
	return text
}

// transportOf and familyOf are OPI's words for SPDK's.
func transportOf(t string) opiv1.NvmeTransportType {
	switch strings.ToUpper(t) {
	case "TCP":
		return opiv1.NvmeTransportType_NVME_TRANSPORT_TYPE_TCP
	case "RDMA":
		return opiv1.NvmeTransportType_NVME_TRANSPORT_TYPE_RDMA
	case "PCIE":
		return opiv1.NvmeTransportType_NVME_TRANSPORT_TYPE_PCIE
	case "FC":
		return opiv1.NvmeTransportType_NVME_TRANSPORT_TYPE_FC
	}
	return opiv1.NvmeTransportType_NVME_TRANSPORT_TYPE_CUSTOM
}

func familyOf(f string) opiv1.NvmeAddressFamily {
	switch strings.ToUpper(f) {
	case "IPV4":
		return opiv1.NvmeAddressFamily_NVME_ADDRESS_FAMILY_IPV4
	case "IPV6":
		return opiv1.NvmeAddressFamily_NVME_ADDRESS_FAMILY_IPV6
	case "IB":
		return opiv1.NvmeAddressFamily_NVME_ADDRESS_FAMILY_IB
	case "FC":
		return opiv1.NvmeAddressFamily_NVME_ADDRESS_FAMILY_FC
	}
	return opiv1.NvmeAddressFamily_NVME_ADDRESS_FAMILY_UNSPECIFIED
}
