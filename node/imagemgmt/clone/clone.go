// Package clone keeps writable layers where the blocks are: as writable clones at a store,
// shown to the host by whoever shows it blocks. Nothing of them lies on this machine.
//
// The package must not know how stores are called, nor how disks are shown.
package clone

import (
	"context"

	attacherv1 "github.com/thaw-project/thaw/api/attacher/v1"
	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/node/imagemgmt"
	"github.com/thaw-project/thaw/node/present"
)

// Store is what is needed of stores; see node/remote.
type Store interface {
	AttachWritable(ctx context.Context, target, block, id string, made bool) (*attacherv1.Attachment, error)
	DetachWritable(ctx context.Context, target, id string) error
	DeleteWritable(ctx context.Context, target, id string) error
	WritableBytes(ctx context.Context, target, id string) (int64, error)
}

// Layers is imagemgmt.Layers.
type Layers struct{ Store Store }

var _ imagemgmt.Layers = Layers{}

// Source implements imagemgmt.Layers.
func (Layers) Source(_ string, l imagemgmt.Layer) present.Source {
	return present.Source{Kind: present.SourceWritable, Lvol: l.Block.Name, Target: l.Block.Target}
}

// Make implements imagemgmt.Layers. A layer has its block's size: another is
// kind.Unsupported.
func (c Layers) Make(ctx context.Context, id string, l imagemgmt.Layer, made bool) error {
	a, err := c.Store.AttachWritable(ctx, l.Block.Target, l.Block.Name, id, made)
	if err == nil && l.SizeBytes > 0 && l.SizeBytes != a.GetSizeBytes() {
		err = kind.Errorf(kind.Unsupported, "writable layer of %d bytes over block %s of %d", l.SizeBytes, l.Block.Name, a.GetSizeBytes())
	}
	return err
}

// Release implements imagemgmt.Layers.
func (c Layers) Release(ctx context.Context, id string, l imagemgmt.Layer) error {
	return c.Store.DetachWritable(ctx, l.Block.Target, id)
}

// Delete implements imagemgmt.Layers.
func (c Layers) Delete(ctx context.Context, id string, l imagemgmt.Layer) error {
	return c.Store.DeleteWritable(ctx, l.Block.Target, id)
}

// Usage implements imagemgmt.Layers. There are no files: a layer that is there counts as one.
func (c Layers) Usage(ctx context.Context, id string, l imagemgmt.Layer) (allocatedBytes, files int64, err error) {
	n, err := c.Store.WritableBytes(ctx, l.Block.Target, id)
	if n > 0 {
		files = 1
	}
	return n, files, err
}
