// Package remote lets a conversion run on another machine than the store: it is an
// attacher whose exports are disks of this machine.
//
// The store exports an lvol to this machine, and Disks shows it here. What this machine's
// kernel caches of a disk is written back before the store freezes it or takes it away,
// because the store cannot do that from where it is. Both ends hold what a conversion works
// on, so that nothing is left of one that dies. The package must not know what is written,
// nor how disks are shown.
package remote

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"

	attacherv1 "github.com/thaw-project/thaw/api/attacher/v1"
	"github.com/thaw-project/thaw/kind"
)

// syncWait bounds how long the kernel may take to write back what it caches of a disk.
const syncWait = 2 * time.Minute

// Disks shows what a store exported to this machine. Methods may be called concurrently,
// but never at the same time for one lvol.
type Disks interface {
	// Transport is what the store is asked to export by; empty leaves it the choice.
	Transport() string
	// Show returns where this machine finds an lvol: a file or a block device. What is
	// shown already is returned again.
	Show(ctx context.Context, lvol string, a *attacherv1.Attachment) (path string, err error)
	// Hide takes it away; what is not shown is no error. The error is kind.InUse while
	// something has it open.
	Hide(ctx context.Context, lvol string) error
	// Hold keeps what Show shows while ctx lives; nil when nothing outlives this process.
	Hold(ctx context.Context, owner string) error
}

// Options says where lvols are and how they are shown.
type Options struct {
	Attacher attacherv1.AttacherClient
	// Node is what this machine is called by an attacher that no certificate tells it;
	// empty on a network.
	Node  string
	Disks Disks
}

// Client is an attacherv1.AttacherClient.
type Client struct {
	attacherv1.AttacherClient
	o Options

	mu    sync.Mutex
	shown map[string]string // guarded by mu: paths by lvol
}

// New returns a client whose exports are on this machine.
func New(o Options) *Client {
	return &Client{AttacherClient: o.Attacher, o: o, shown: make(map[string]string)}
}

// Hold holds lvols at the store, and disks where they are shown.
func (c *Client) Hold(ctx context.Context, r *attacherv1.HoldRequest, opts ...grpc.CallOption) (grpc.ServerStreamingClient[attacherv1.HoldResponse], error) {
	if err := c.o.Disks.Hold(ctx, r.GetOwner()); err != nil {
		return nil, err
	}
	return c.AttacherClient.Hold(ctx, r, opts...)
}

// Export has the store export the lvol to this machine and shows it.
func (c *Client) Export(ctx context.Context, r *attacherv1.ExportRequest, opts ...grpc.CallOption) (*attacherv1.ExportResponse, error) {
	there, err := c.AttacherClient.Export(ctx, &attacherv1.ExportRequest{
		Lvol: r.GetLvol(), Owner: r.GetOwner(), ReadOnly: r.GetReadOnly(), Node: c.o.Node, Transport: c.o.Disks.Transport(),
	}, opts...)
	if err != nil {
		return nil, err
	}
	if there.GetAttachment() == nil {
		return nil, kind.Errorf(kind.Unsupported, "export lvol %s: the store did not export it to this machine", r.GetLvol())
	}
	path, err := c.o.Disks.Show(ctx, r.GetLvol(), there.GetAttachment())
	if err != nil {
		return nil, fmt.Errorf("show lvol %s: %w", r.GetLvol(), err)
	}
	c.mu.Lock()
	c.shown[r.GetLvol()] = path
	c.mu.Unlock()
	return &attacherv1.ExportResponse{Path: path, SizeBytes: there.GetSizeBytes(), Attachment: there.GetAttachment()}, nil
}

// Unexport writes back what this machine caches of the lvol, takes its disk away and ends the
// store's export.
func (c *Client) Unexport(ctx context.Context, r *attacherv1.UnexportRequest, opts ...grpc.CallOption) (*attacherv1.UnexportResponse, error) {
	if err := c.flush(ctx, r.GetLvol()); err != nil {
		return nil, err
	}
	if err := c.o.Disks.Hide(ctx, r.GetLvol()); err != nil {
		return nil, fmt.Errorf("take lvol %s away: %w", r.GetLvol(), err)
	}
	c.mu.Lock()
	delete(c.shown, r.GetLvol())
	c.mu.Unlock()
	return c.AttacherClient.Unexport(ctx, r, opts...)
}

// SnapshotLvol writes back what this machine caches of the lvol first.
func (c *Client) SnapshotLvol(ctx context.Context, r *attacherv1.SnapshotLvolRequest, opts ...grpc.CallOption) (*attacherv1.Lvol, error) {
	if err := c.flush(ctx, r.GetLvol()); err != nil {
		return nil, err
	}
	return c.AttacherClient.SnapshotLvol(ctx, r, opts...)
}

// flush has the kernel write back what it caches of an lvol that is shown, and the store
// make it durable. sync(1) does it: a process that can be killed while the store is away.
func (c *Client) flush(ctx context.Context, lvol string) error {
	c.mu.Lock()
	path := c.shown[lvol]
	c.mu.Unlock()
	if path == "" {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, syncWait)
	defer cancel()
	cmd := exec.CommandContext(ctx, "sync", path)
	cmd.WaitDelay = time.Second
	if out, err := cmd.CombinedOutput(); err != nil {
		return kind.Wrap(kind.IO, errors.Join(fmt.Errorf("write lvol %s back: %w: %.300s", lvol, err, strings.TrimSpace(string(out))), ctx.Err()))
	}
	return nil
}
