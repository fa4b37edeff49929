// Package filesystem is the seam between image conversion and the file systems it
// writes into blocks; each subpackage (erofs, ext4) is one.
//
// Layout of a block, for both file systems. Mode overlayfs: the root directory
// holds one directory per layer, "0" for the lowest, "1", and so on, each with
// that layer's tree in overlayfs's own form (whiteouts are character devices 0:0,
// opaque directories have trusted.overlay.opaque=y). Mode overlaybd: the root
// directory is the merged root file system of all layers so far.
package filesystem

import (
	"context"
	"io"
	"os"

	"github.com/thaw-project/thaw/image/block"
)

// Options is what a Builder needs to know about the block it writes.
type Options struct {
	Mode      block.Mode
	SizeBytes int64 // the block's virtual size
	// UUID goes into the superblock, so that the same input gives the same bytes
	// where the file system allows it.
	UUID [16]byte
}

// Builder writes layers into a block, one call of Apply per block of the chain.
type Builder interface {
	// Format writes an empty file system for options into an empty block.
	Format(ctx context.Context, disk *os.File, options Options) error

	// Apply adds the layer with this index (0 is the lowest) to the block, which
	// holds the layers below it. layer is the uncompressed tar stream and is
	// untrusted: a name that is absolute or has a ".." element, a size that
	// cannot be, or a stream that ends early fails with kind.Invalid or
	// kind.Corrupt and says which entry. It is read to its end. Memory does not
	// grow with the bytes of the layer, only with its number of entries. When
	// Apply fails or is cancelled the block is to be thrown away.
	Apply(ctx context.Context, disk *os.File, options Options, index int, layer io.Reader) error
}
