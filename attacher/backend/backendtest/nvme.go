package backendtest

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"time"

	"github.com/google/uuid"

	"github.com/thaw-project/thaw/attacher"
	"github.com/thaw-project/thaw/attacher/identity"
	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/nvme/host"
	"github.com/thaw-project/thaw/target/bdev"
)

// lossTimeout is how long I/O waits for a target that is away: longer than any restart.
const lossTimeout = 20 * time.Second

// OpenNVMe opens an export over NVMe/TCP as node, which is whom identity.HostNQN says.
func OpenNVMe(ctx context.Context, node string, x attacher.Exported) (bdev.Device, error) {
	h, err := connect(ctx, x, identity.HostNQN(node), identity.HostID(node))
	if err != nil {
		return nil, err
	}
	id, err := uuid.Parse(x.UUID)
	if err != nil {
		return nil, errors.Join(kind.Errorf(kind.Invalid, "UUID %q of an export", x.UUID), h.Close())
	}
	d, err := h.OpenUUID(id)
	if err != nil {
		return nil, errors.Join(err, h.Close())
	}
	return &nvmeDevice{d, h}, nil
}

func connect(ctx context.Context, x attacher.Exported, nqn string, id uuid.UUID) (*host.Host, error) {
	c := host.Config{
		SubNQN: x.Subsystem, HostNQN: nqn, HostID: id, LossTimeout: lossTimeout, KeepAlive: time.Second, Quiesce: -1,
		ReconnectDelay: 20 * time.Millisecond, ReconnectMax: 200 * time.Millisecond, Log: slog.New(slog.DiscardHandler),
	}
	for _, p := range x.Portals {
		if p.Transport == "tcp" {
			c.Portals = append(c.Portals, net.JoinHostPort(p.Address, p.Service))
		}
	}
	return host.Connect(ctx, c)
}

// nvmeDevice is a device with the host that it is of.
type nvmeDevice struct {
	*host.Device
	h *host.Host
}

func (d *nvmeDevice) Close() error { return errors.Join(d.Device.Close(), d.h.Close()) }
