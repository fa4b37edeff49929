// Package client is image-mgmt for a snapshotter in another process than image-mgmt's, and
// on the other side of the PCIe bus where a card shows the disks.
//
// There image-mgmt says how the host knows a drive, and a Finder which device node that is.
// The package must not know how drives are found, nor who shows them.
package client

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"time"

	"google.golang.org/grpc"

	imagemgmtv1 "github.com/thaw-project/thaw/api/imagemgmt/v1"
	"github.com/thaw-project/thaw/failpoint"
	"github.com/thaw-project/thaw/keylock"
	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/node/imagemgmt"
	"github.com/thaw-project/thaw/node/present"
)

const (
	// findWait bounds the wait for a drive of a caller who waits without bounds.
	findWait = 30 * time.Second
	// goneWait bounds the wait for a drive to vanish. One that stays longer is somebody
	// else's trouble: nobody can use it.
	goneWait = 10 * time.Second
)

// Finder finds the drives that a card shows this host; see node/present/pcie.
type Finder interface {
	// Find waits until the kernel shows the drive d.NVMe and returns its device node.
	Find(ctx context.Context, d present.Disk) (path string, err error)
	// Leave makes ready for a drive to go: it is kind.InUse while something has it open,
	// and nobody can open it before release is called.
	Leave(ctx context.Context, n present.NVMe) (release func() error, err error)
	// Gone waits until the kernel shows the drive no more.
	Gone(ctx context.Context, n present.NVMe) error
}

// Options configures New.
type Options struct {
	// Finder finds drives; nil where image-mgmt is on the same machine and shows disks
	// itself.
	Finder Finder
	Logger *slog.Logger // nil is silence
}

// Client is an imagemgmt.Service. When Attach or AttachWritable fail because the drive
// could not be found, image-mgmt has its user recorded: detach, or call again.
type Client struct {
	rpc  imagemgmtv1.ImageManagementClient
	o    Options
	keys keylock.Set // blocks and disk ids: their drive comes or goes
}

var _ imagemgmt.Service = (*Client)(nil)

// New returns a client over a connection that restores error kinds (attacher/rpc.Dial).
func New(conn grpc.ClientConnInterface, o Options) *Client {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	return &Client{rpc: imagemgmtv1.NewImageManagementClient(conn), o: o}
}

func blockOf(b imagemgmt.Block) *imagemgmtv1.Block {
	return &imagemgmtv1.Block{Target: b.Target, Name: b.Name}
}

func layerOf(l imagemgmt.Layer) *imagemgmtv1.Layer {
	return &imagemgmtv1.Layer{Block: blockOf(l.Block), Path: l.Path, SizeBytes: l.SizeBytes}
}

func diskOf(d *imagemgmtv1.Disk) present.Disk {
	if d == nil {
		return present.Disk{}
	}
	out := present.Disk{
		ID: d.GetId(), Path: d.GetPath(), Block: d.GetBlockDevice(), SizeBytes: d.GetSizeBytes(), ReadOnly: d.GetReadOnly(),
		Source: present.Source{Kind: present.SourceKind(d.GetSource().GetKind()), Lvol: d.GetSource().GetLvol(), Target: d.GetSource().GetTarget(), Path: d.GetSource().GetPath()},
	}
	if n := d.GetNvme(); n != nil {
		out.NVMe = &present.NVMe{UUID: n.GetUuid(), Serial: n.GetSerial(), Function: n.GetFunction()}
	}
	return out
}

func attachmentOf(a *imagemgmtv1.Attachment) imagemgmt.Attachment {
	out := imagemgmt.Attachment{Block: a.GetBlock(), Disk: diskOf(a.GetDisk()), Users: a.GetUsers()}
	for _, d := range a.GetLayers() {
		out.Layers = append(out.Layers, diskOf(d))
	}
	return out
}

// find gives a drive its path.
func (c *Client) find(ctx context.Context, d present.Disk, readOnly bool) (present.Disk, error) {
	switch {
	case d.ID == "" || d.ReadOnly != readOnly:
		return present.Disk{}, kind.Errorf(kind.Corrupt, "image-mgmt answered with disk %.140q, read-only: %v", d.ID, d.ReadOnly)
	case d.NVMe == nil && d.Path == "":
		return present.Disk{}, kind.Errorf(kind.Corrupt, "image-mgmt answered with disk %.140q and not where it is", d.ID)
	case d.NVMe == nil:
		return d, nil
	case c.o.Finder == nil:
		return present.Disk{}, kind.Errorf(kind.Unsupported, "image-mgmt shows drives of a card, and this host is not set up to find them: configure [pcie]")
	}
	failpoint.Reach("imagemgmt/client.attach: answered")
	if _, bounded := ctx.Deadline(); !bounded {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, findWait)
		defer cancel()
	}
	path, err := c.o.Finder.Find(ctx, d)
	if err != nil {
		return present.Disk{}, err
	}
	d.Path, d.Block = path, true
	return d, nil
}

// lock keeps drives of one name from coming and going at the same time.
func (c *Client) lock(ctx context.Context, name string) (unlock func(), err error) {
	if c.o.Finder == nil {
		return func() {}, nil
	}
	if unlock, err = c.keys.Lock(ctx, name); err != nil {
		return nil, fmt.Errorf("%.140s: %w", name, err)
	}
	return unlock, nil
}

// leaving has take make image-mgmt take the drive d away, in the order that spares the host
// a drive that vanishes under its users: they are looked for first, and the kernel lets
// go of it.
func (c *Client) leaving(ctx context.Context, d present.Disk, take func() error) error {
	if c.o.Finder == nil || d.NVMe == nil {
		return take()
	}
	release, err := c.o.Finder.Leave(ctx, *d.NVMe)
	if err != nil {
		return err
	}
	failpoint.Reach("imagemgmt/client.detach: left")
	err = take()
	if err == nil {
		failpoint.Reach("imagemgmt/client.detach: answered")
		gctx, cancel := context.WithTimeout(ctx, goneWait)
		if gerr := c.o.Finder.Gone(gctx, *d.NVMe); gerr != nil {
			c.o.Logger.Warn("the card has taken a drive away and the kernel still shows it", "disk", d.ID, "error", gerr)
		}
		cancel()
	}
	if rerr := release(); rerr != nil {
		c.o.Logger.Warn("cannot let go of a drive", "disk", d.ID, "error", rerr)
	}
	return err
}

// Attach implements imagemgmt.Service.
func (c *Client) Attach(ctx context.Context, block imagemgmt.Block, user string) (present.Disk, error) {
	unlock, err := c.lock(ctx, block.Name)
	if err != nil {
		return present.Disk{}, err
	}
	defer unlock()
	d, err := c.rpc.Attach(ctx, &imagemgmtv1.AttachRequest{Block: blockOf(block), User: user})
	if err != nil {
		return present.Disk{}, err
	}
	disk, err := c.find(ctx, diskOf(d), true)
	if err != nil {
		return present.Disk{}, fmt.Errorf("attach block %s: %w", block.Name, err)
	}
	return disk, nil
}

// Detach implements imagemgmt.Service. A drive that this host has in use is kind.InUse,
// and then user is still recorded.
func (c *Client) Detach(ctx context.Context, block, user string) error {
	take := func() error {
		_, err := c.rpc.Detach(ctx, &imagemgmtv1.DetachRequest{Block: block, User: user})
		return err
	}
	if c.o.Finder == nil {
		return take()
	}
	unlock, err := c.lock(ctx, block)
	if err != nil {
		return err
	}
	defer unlock()
	a, err := c.Stat(ctx, block)
	if errors.Is(err, kind.NotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, u := range a.Users {
		if u != user && !slices.ContainsFunc(a.Layers, func(d present.Disk) bool { return d.ID == u }) {
			return take() // somebody else has the disk, and it stays
		}
	}
	if err := c.leaving(ctx, a.Disk, take); err != nil {
		return fmt.Errorf("detach block %s: %w", block, err)
	}
	return nil
}

// Stat implements imagemgmt.Service.
func (c *Client) Stat(ctx context.Context, block string) (imagemgmt.Attachment, error) {
	a, err := c.rpc.Stat(ctx, &imagemgmtv1.StatRequest{Block: block})
	if err != nil {
		return imagemgmt.Attachment{}, err
	}
	return attachmentOf(a), nil
}

// List implements imagemgmt.Service.
func (c *Client) List(ctx context.Context) ([]imagemgmt.Attachment, error) {
	resp, err := c.rpc.List(ctx, &imagemgmtv1.ListRequest{})
	if err != nil {
		return nil, err
	}
	out := make([]imagemgmt.Attachment, 0, len(resp.GetAttachments()))
	for _, a := range resp.GetAttachments() {
		out = append(out, attachmentOf(a))
	}
	return out, nil
}

// AttachWritable implements imagemgmt.Service.
func (c *Client) AttachWritable(ctx context.Context, layer imagemgmt.Layer, id string) (present.Disk, error) {
	unlock, err := c.lock(ctx, id)
	if err != nil {
		return present.Disk{}, err
	}
	defer unlock()
	d, err := c.rpc.AttachWritable(ctx, &imagemgmtv1.AttachWritableRequest{Layer: layerOf(layer), Id: id})
	if err != nil {
		return present.Disk{}, err
	}
	disk, err := c.find(ctx, diskOf(d), false)
	if err != nil {
		return present.Disk{}, fmt.Errorf("attach writable disk %s: %w", id, err)
	}
	return disk, nil
}

// leavingWritable is leaving for the disk of a writable layer.
func (c *Client) leavingWritable(ctx context.Context, block, id string, take func() error) error {
	if c.o.Finder == nil {
		return take()
	}
	unlock, err := c.lock(ctx, id)
	if err != nil {
		return err
	}
	defer unlock()
	a, err := c.Stat(ctx, block)
	if err != nil && !errors.Is(err, kind.NotFound) {
		return err
	}
	var d present.Disk // none when it is not attached
	if i := slices.IndexFunc(a.Layers, func(d present.Disk) bool { return d.ID == id }); i >= 0 {
		d = a.Layers[i]
	}
	return c.leaving(ctx, d, take)
}

// DetachWritable implements imagemgmt.Service.
func (c *Client) DetachWritable(ctx context.Context, block, id string) error {
	return c.leavingWritable(ctx, block, id, func() error {
		_, err := c.rpc.DetachWritable(ctx, &imagemgmtv1.DetachWritableRequest{Block: block, Id: id})
		return err
	})
}

// DeleteWritable implements imagemgmt.Service.
func (c *Client) DeleteWritable(ctx context.Context, layer imagemgmt.Layer, id string) error {
	return c.leavingWritable(ctx, layer.Block.Name, id, func() error {
		_, err := c.rpc.DeleteWritable(ctx, &imagemgmtv1.DeleteWritableRequest{Layer: layerOf(layer), Id: id})
		return err
	})
}

// StatWritable implements imagemgmt.Service.
func (c *Client) StatWritable(ctx context.Context, layer imagemgmt.Layer, id string) (imagemgmt.Writable, error) {
	w, err := c.rpc.StatWritable(ctx, &imagemgmtv1.StatWritableRequest{Layer: layerOf(layer), Id: id})
	if err != nil {
		return imagemgmt.Writable{}, err
	}
	return imagemgmt.Writable{Disk: diskOf(w.GetDisk()), AllocatedBytes: w.GetAllocatedBytes(), Files: w.GetFiles()}, nil
}

// EnsureScratch implements imagemgmt.Service.
func (c *Client) EnsureScratch(ctx context.Context, target string, sizeBytes int64) (imagemgmt.Block, error) {
	b, err := c.rpc.EnsureScratch(ctx, &imagemgmtv1.EnsureScratchRequest{Target: target, SizeBytes: sizeBytes})
	if err != nil {
		return imagemgmt.Block{}, err
	}
	return imagemgmt.Block{Target: b.GetTarget(), Name: b.GetName()}, nil
}

// Prefetch implements imagemgmt.Service.
func (c *Client) Prefetch(ctx context.Context, block string, ranges []imagemgmt.Range, progress func(int64)) error {
	ctx, cancel := context.WithCancel(ctx) // the stream ends when this returns
	defer cancel()
	r := &imagemgmtv1.PrefetchRequest{Block: block, Ranges: make([]*imagemgmtv1.Range, len(ranges))}
	for i, x := range ranges {
		r.Ranges[i] = &imagemgmtv1.Range{OffsetBytes: x.OffsetBytes, LengthBytes: x.LengthBytes}
	}
	stream, err := c.rpc.Prefetch(ctx, r)
	if err != nil {
		return err
	}
	for {
		p, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if progress != nil {
			progress(p.GetReadBytes())
		}
	}
}
