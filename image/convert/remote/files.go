package remote

import (
	"context"
	"net"

	attacherv1 "github.com/thaw-project/thaw/api/attacher/v1"
	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/node/present/transient"
)

// Files shows lvols as files that a process of this one's own serves: package transient.
type Files struct{ *transient.Client }

var _ Disks = Files{}

// Transport implements Disks.
func (Files) Transport() string { return "nvme-tcp" }

// Hold implements Disks: with this process everything ends by itself.
func (Files) Hold(context.Context, string) error { return nil }

// Show implements Disks.
func (f Files) Show(ctx context.Context, lvol string, a *attacherv1.Attachment) (string, error) {
	v := transient.Volume{
		Subsystem: a.GetSubsystemNqn(), HostNQN: a.GetHostNqn(), HostID: a.GetHostId(), UUID: a.GetUuid(),
		SizeBytes: a.GetSizeBytes(), ReadOnly: !a.GetWritable(),
	}
	for _, p := range a.GetPortals() {
		if p.GetTransport() == "tcp" {
			v.Portals = append(v.Portals, net.JoinHostPort(p.GetAddress(), p.GetService()))
		}
	}
	if len(v.Portals) == 0 {
		return "", kind.Errorf(kind.Unsupported, "the store exports by %s, and this program reads NVMe/TCP by itself", a.GetTransport())
	}
	return f.Client.Show(ctx, lvol, v)
}
