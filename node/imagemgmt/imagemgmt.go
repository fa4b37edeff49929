// Package imagemgmt turns a block of a converted image into a disk the host can
// see, and counts who uses it.
//
// The snapshotter calls it through Service and must not know which transport or
// presentation is behind; the package must not know containerd.
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
	Users []string     `json:"users"`
}

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

	// Stat returns one attachment, or kind.NotFound.
	Stat(ctx context.Context, block string) (Attachment, error)

	// List returns all attachments in order of block.
	List(ctx context.Context) ([]Attachment, error)

	// AttachWritable presents the qcow2 file at path, whose backing is block,
	// read-write as the disk id; the file must exist. It holds block for user id.
	AttachWritable(ctx context.Context, block Block, path, id string) (present.Disk, error)

	// DetachWritable ends AttachWritable: the disk is withdrawn, the qcow2 file
	// flushed and closed (its owner removes it), and block's user id released.
	DetachWritable(ctx context.Context, block, id string) error
}
