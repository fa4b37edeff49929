package opi

import (
	"context"
	"fmt"

	opiv1 "github.com/opiproject/opi-api/storage/v1alpha1/gen/go"

	"github.com/thaw-project/thaw/kind"
)

// Functions are the PCIe functions of a card as NVMe controllers: what plugs them is a
// vendor's SPDK, or something that plays a card. The bridge keeps nothing, so whoever
// implements this answers from what is plugged. All methods may be called concurrently.
type Functions interface {
	// Plug makes a function an NVMe controller of the subsystem of an NQN. To plug one
	// that is plugged so already succeeds, and completes what is plugged in part; one that shows another subsystem is
	// kind.InUse, one that the card does not have is kind.NotFound.
	Plug(ctx context.Context, nqn string, f Function) error
	// Unplug takes the controller off a function that Plugged returned. One that is not
	// plugged is kind.NotFound.
	Unplug(ctx context.Context, nqn string, f Function) error
	// Plugged returns the functions that show the subsystem, wholly or in part, in any
	// order.
	Plugged(ctx context.Context, nqn string) ([]Function, error)
}

// Function is a PCIe function of a card (opi_api.storage.v1.PciEndpoint).
type Function struct {
	Port     uint16
	Physical uint16
	Virtual  uint16 // from 1; 0 is the physical function itself
}

func (f Function) String() string { return fmt.Sprintf("pcie:%d:%d:%d", f.Port, f.Physical, f.Virtual) }

func functionOf(p *opiv1.PciEndpoint) (f Function, err error) {
	for _, v := range []struct {
		name string
		n    int32
		into *uint16
	}{
		{"port_id", p.GetPortId().GetValue(), &f.Port},
		{"physical_function", p.GetPhysicalFunction().GetValue(), &f.Physical},
		{"virtual_function", p.GetVirtualFunction().GetValue(), &f.Virtual},
	} {
		if v.n < 0 || v.n > 1<<16-1 {
			return f, kind.Errorf(kind.Invalid, "pcie_id: %s %d is not in 0 to 65535", v.name, v.n)
		}
		*v.into = uint16(v.n)
	}
	return f, nil
}

// noFunctions is for targets without a card.
type noFunctions struct{}

func (noFunctions) Plug(_ context.Context, nqn string, f Function) error {
	return kind.Errorf(kind.Unsupported, "show %.223q on %s: the target behind this bridge has no PCIe functions: use a fabrics address, or the bridge of a card", nqn, f)
}

func (n noFunctions) Unplug(_ context.Context, nqn string, f Function) error {
	return kind.Errorf(kind.NotFound, "%s does not show %.223q: the target behind this bridge has no PCIe functions", f, nqn)
}

func (noFunctions) Plugged(context.Context, string) ([]Function, error) { return nil, nil }
