// Package present is how a disk becomes something the host kernel can mount.
//
// Each subpackage is one presentation (fuse here; ublk, nbd, nvme-fabrics and
// nvme-pcie beside it). Callers see Presenter and must not know which one serves.
// A presentation outlives the process that serves it: see design decision 4.
package present

import (
	"context"

	"github.com/thaw-project/thaw/target/bdev"
)

// SourceKind says what stands behind a presented disk.
type SourceKind string

// The kinds of source.
const (
	SourceLvol  SourceKind = "lvol"  // an lvol by name
	SourceQcow2 SourceKind = "qcow2" // a qcow2 file over an lvol
	// SourceWritable is a writable layer that the target keeps itself: a clone of the lvol,
	// known by the disk's id.
	SourceWritable SourceKind = "writable"
)

// Source names what stands behind a presented disk, well enough to open it again
// in a new process. It is stored as JSON.
type Source struct {
	Kind SourceKind `json:"kind"`
	// Lvol is the lvol's name; for qcow2, the backing lvol's name.
	Lvol string `json:"lvol"`
	// Target is the name of the target that stores the lvol; empty is this machine's
	// own store.
	Target string `json:"target,omitempty"`
	// Path is the qcow2 file's absolute path.
	Path string `json:"path,omitempty"`
}

// Opener opens the device behind a source. The presenter closes it.
type Opener func(source Source, readOnly bool) (bdev.Device, error)

// Disk is a presented disk.
type Disk struct {
	// ID is the caller's name for it: letters, digits, '.', '_' and '-', at most
	// 128 bytes.
	ID     string `json:"id"`
	Source Source `json:"source"`
	// Path is where the kernel sees it: a regular file (Block false), which needs
	// a loop device unless the file system can mount a file, or a block device.
	Path      string `json:"path"`
	Block     bool   `json:"block"`
	SizeBytes int64  `json:"size_bytes"`
	ReadOnly  bool   `json:"read_only"`
	// NVMe says how the host knows a drive that a card shows; Path is empty where only
	// the host can tell it.
	NVMe *NVMe `json:"nvme,omitempty"`
}

// NVMe is what makes a drive known to the host that sees it, whatever device number the
// kernel gave it.
type NVMe struct {
	UUID     string `json:"uuid"`               // of the nvmeNamespace; its NGUID is the same 16 bytes
	Serial   string `json:"serial"`             // of the controller
	Function string `json:"function,omitempty"` // port:physical:virtual of the card
}

// Presenter shows disks to the host kernel. All methods are idempotent and may be
// called concurrently.
type Presenter interface {
	// Present shows source as disk id. The same id with the same source and
	// access returns the disk that is there; with others it is kind.Exists.
	Present(ctx context.Context, id string, source Source, readOnly bool) (Disk, error)

	// Withdraw takes disk id away and closes its device; an unknown id is no
	// error. A disk that something still holds open is kind.InUse.
	Withdraw(ctx context.Context, id string) error

	// List returns the disks in order of id.
	List(ctx context.Context) ([]Disk, error)
}
