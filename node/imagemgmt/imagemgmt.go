// Package imagemgmt turns a block of a converted image into a disk the host can
// see, and counts who uses it; and it makes, shows and deletes the writable layers of
// containers.
//
// The snapshotter calls it through Service and must not know which transport,
// presentation or kind of writable layer is behind, nor in which process it runs; the
// package must not know containerd.
package imagemgmt

import (
	"context"

	"github.com/thaw-project/thaw/node/present"
)

// Block names a block of a converted image and who stores it.
type Block struct {
	// Target is the name of the target that stores it; empty is this machine's own
	// store.
	Target string
	Name   string
}

// Attachment is one attached block with its users.
type Attachment struct {
	Block string       `json:"block"`
	Disk  present.Disk `json:"disk"`
	// Users are those of Attach, and the ids of the writable layers over the block.
	Users []string `json:"users"`
	// Layers are the disks of the latter in order of id, those that are not shown with
	// nothing else.
	Layers []present.Disk `json:"layers,omitempty"`
}

// Layer is what a writable disk consists of.
type Layer struct {
	// Block is what it is over.
	Block Block
	// Path is where it lies when layers are files of this host: absolute, in a directory
	// that is there and the caller's. It means nothing elsewhere.
	Path string
	// SizeBytes is the disk's, a multiple of 512; 0 is the block's.
	SizeBytes int64
}

// Writable is a writable layer as it is now.
type Writable struct {
	Disk           present.Disk // zero while it is not attached
	AllocatedBytes int64        // what was written occupies
	Files          int64        // in how many files; 0 when there is no layer, or it is none
}

// Range is a part of a block.
type Range struct{ OffsetBytes, LengthBytes int64 }

// MaxRanges bounds those of one Prefetch.
const MaxRanges = 1 << 16

// Service attaches blocks. Methods are idempotent, may be called concurrently, and
// what they record survives a restart.
type Service interface {
	// Attach makes block readable on this host for user and returns its disk. It
	// is kind.NotFound when the storage side has no such block and
	// kind.Unavailable when the storage side cannot be reached. Blocks of one name
	// hold the same, so one that is attached already is shared whoever stores it.
	Attach(ctx context.Context, block Block, user string) (present.Disk, error)

	// Detach ends user's use of block; the last user's Detach takes the disk away.
	// An unknown block or user is no error.
	Detach(ctx context.Context, block, user string) error

	// Stat returns one attachment, or kind.NotFound. Where a card shows the disks, the
	// disk's Path is empty: Attach tells it.
	Stat(ctx context.Context, block string) (Attachment, error)

	// List returns all attachments in order of block, disks as Stat.
	List(ctx context.Context) ([]Attachment, error)

	// AttachWritable makes the writable layer id, once, and presents it read-write as
	// the disk id. It holds layer.Block for user id. What was written stays until
	// DeleteWritable, and a layer may have come about also when the call fails. It is
	// kind.NotFound when the layer was made before and is gone, or its block is, and
	// kind.Exists when id is over another block.
	AttachWritable(ctx context.Context, layer Layer, id string) (present.Disk, error)

	// DetachWritable ends AttachWritable: what was written is flushed, the disk is
	// withdrawn, and block's user id released. The layer stays. A disk that the kernel has
	// open is kind.InUse, one that is unknown no error.
	DetachWritable(ctx context.Context, block, id string) error

	// DeleteWritable is DetachWritable and deletes the layer. One that does not exist is no
	// error.
	DeleteWritable(ctx context.Context, layer Layer, id string) error

	// StatWritable tells what a layer occupies, and its disk as Stat does. A layer that does
	// not exist occupies nothing.
	StatWritable(ctx context.Context, layer Layer, id string) (Writable, error)

	// EnsureScratch makes, once for each size, a block with an empty ext4, over which
	// writable layers for containers of target's images are made.
	EnsureScratch(ctx context.Context, target string, sizeBytes int64) (Block, error)

	// Prefetch reads ranges of an attached block, in order, so that this machine has them
	// when they are needed. progress, if not nil, is told now and then, by one goroutine at
	// a time, how many bytes were read so far. It ends with ctx, and with the last user's
	// Detach, as kind.Canceled; attaches go first. It is kind.NotFound for a block that is
	// not attached, and kind.Unsupported where nothing would keep what was read.
	Prefetch(ctx context.Context, block string, ranges []Range, progress func(readBytes int64)) error
}

// Layers makes and deletes writable layers. Methods are idempotent and may be called
// concurrently, though never at the same time for one id.
type Layers interface {
	// Source is what a presenter shows of a layer that is there, as disk id.
	Source(id string, l Layer) present.Source

	// Make makes the layer, of l.SizeBytes or its block's size, unless it is there, and makes
	// it ready to be presented. made says that it was made before: then one that is not there is
	// kind.NotFound.
	Make(ctx context.Context, id string, l Layer, made bool) error

	// Release undoes what Make did to have it presented.
	Release(ctx context.Context, id string, l Layer) error

	// Delete deletes a layer that is released.
	Delete(ctx context.Context, id string, l Layer) error

	// Usage tells what a layer occupies, nothing when there is none.
	Usage(ctx context.Context, id string, l Layer) (allocatedBytes, files int64, err error)
}
