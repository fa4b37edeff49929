// Package convert turns an OCI image into blocks and an ordinary manifest that
// says where they are.
//
// It reads the source through image/source, writes layers into blocks through an
// image/filesystem.Builder, asks the attacher (and nobody else) for lvols, and
// stores manifests and blobs at the destination. It must not know how lvols are
// stored or presented, nor anything of containerd's snapshots beyond the
// annotations of image/annotation.
//
// A conversion that stops at any point leaves nothing that a later one does not
// reuse or remove: a block has its name only once it is complete, what is being
// written lives by the conversion's hold, and spool files have no name.
package convert

import (
	"log/slog"
	"path/filepath"
	"time"

	"github.com/containerd/platforms"

	attacherv1 "github.com/thaw-project/thaw/api/attacher/v1"
	"github.com/thaw-project/thaw/image/block"
	"github.com/thaw-project/thaw/image/filesystem"
	"github.com/thaw-project/thaw/kind"
)

// Bounds of Options.VirtualSizeBytes. The least is what both file systems can be
// made in; the most is what ext4 addresses with 4 KiB blocks and 32-bit counts.
const (
	MinVirtualSizeBytes     = 64 << 20
	MaxVirtualSizeBytes     = 16 << 40
	DefaultVirtualSizeBytes = 100 << 30
)

// AllPlatforms in Options.Platforms converts every platform of an index.
const AllPlatforms = "all"

// Options says what to convert into what. It is validated once, by Convert.
type Options struct {
	// Source is a registry reference, oci:DIR[:TAG], oci-archive:FILE[:TAG] or
	// docker-archive:FILE[:REF].
	Source string
	// Dest is a registry reference with a tag ("latest" if it has none) or
	// oci:DIR:TAG.
	Dest string

	Mode       block.Mode
	Filesystem block.Filesystem
	// VirtualSizeBytes is the size of every block, a multiple of 1 MiB; 0 is
	// DefaultVirtualSizeBytes. Blocks are thin: it costs next to nothing.
	VirtualSizeBytes int64
	// Platforms are os/arch[/variant] of an index to convert, or AllPlatforms;
	// empty is the platform of this machine.
	Platforms []string
	// GlobalLayers is how many of the lowest layers become global blocks, which
	// any repository shares; 0 is 1, negative is none.
	GlobalLayers int

	// PlainHTTP allows registries without TLS, for source and destination.
	PlainHTTP bool
	// CAFile is a PEM file of certificates to trust besides the system's.
	CAFile string
	// DockerConfigDir holds config.json with credentials or the names of
	// credential helpers; empty is $DOCKER_CONFIG or ~/.docker.
	DockerConfigDir string

	// SpoolDir holds blobs while they are applied and pushed, in files without a
	// name; empty is the directory for temporary files.
	SpoolDir string

	Builders map[block.Filesystem]filesystem.Builder
	Attacher attacherv1.AttacherClient

	// Progress, if any, is called for every change of a layer's state and at most
	// ten times a second for its bytes; calls do not overlap.
	Progress func(Event)
	// Logger is where warnings go; nil is nowhere.
	Logger *slog.Logger
}

// EnsureDefaults fills in what is not set.
func (o *Options) EnsureDefaults() {
	if o.VirtualSizeBytes == 0 {
		o.VirtualSizeBytes = DefaultVirtualSizeBytes
	}
	switch {
	case o.GlobalLayers == 0:
		o.GlobalLayers = 1
	case o.GlobalLayers < 0:
		o.GlobalLayers = 0
	}
	if o.Progress == nil {
		o.Progress = func(Event) {}
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
}

// Validate returns a kind.Invalid error that says what is wrong and what would be
// right.
func (o *Options) Validate() error {
	if o.Source == "" || o.Dest == "" {
		return kind.Errorf(kind.Invalid, "conversion needs a source and a destination")
	}
	if _, err := block.ParseMode(string(o.Mode)); err != nil {
		return err
	}
	if _, err := block.ParseFilesystem(string(o.Filesystem)); err != nil {
		return err
	}
	if o.Builders[o.Filesystem] == nil {
		return kind.Errorf(kind.Unsupported, "file system %s is not part of this build", o.Filesystem)
	}
	if o.Attacher == nil {
		return kind.Errorf(kind.Invalid, "conversion needs an attacher")
	}
	if o.VirtualSizeBytes < MinVirtualSizeBytes || o.VirtualSizeBytes > MaxVirtualSizeBytes || o.VirtualSizeBytes%(1<<20) != 0 {
		return kind.Errorf(kind.Invalid, "virtual size of %d bytes: must be a whole number of MiB from 64MiB to 16TiB", o.VirtualSizeBytes)
	}
	for _, p := range o.Platforms {
		if _, err := platforms.Parse(p); err != nil && p != AllPlatforms {
			return kind.Errorf(kind.Invalid, "platform %.60q is not os/arch[/variant] or %s", p, AllPlatforms)
		}
	}
	if o.SpoolDir != "" && !filepath.IsAbs(o.SpoolDir) {
		return kind.Errorf(kind.Invalid, "spool directory %q is not absolute", o.SpoolDir)
	}
	return nil
}

// State is where a layer is on its way.
type State string

// The states, in order; a reused layer goes from waiting to reused, a written one
// through the others. Fetching overlaps all of them.
const (
	StateWaiting  State = "waiting"  // for the layer below or the first bytes
	StateApplying State = "applying" // being written into its block
	StateWritten  State = "written"  // its block is complete
	StateReused   State = "reused"   // its block was there
	StateFailed   State = "failed"
)

// Event is the state of one layer after a change. Events of one layer have the
// same Platform and Index.
type Event struct {
	Platform     string
	Index, Count int
	Digest       string // of the layer's blob
	Block        string
	State        State
	SizeBytes    int64 // of the blob
	FetchedBytes int64 // of the blob, so far; stays 0 when nothing needs it
	AppliedBytes int64 // of the uncompressed layer, so far
	Pushed       bool  // the destination has the blob
}

// Result is what a conversion did.
type Result struct {
	Source string `json:"source"`
	Dest   string `json:"dest"`
	// Digest is what Dest names now: of the manifest, or of the index.
	Digest       string        `json:"digest"`
	Images       []Image       `json:"images"`
	FetchedBytes int64         `json:"fetched_bytes"`
	PushedBytes  int64         `json:"pushed_bytes"`
	Duration     time.Duration `json:"duration_ns"`
}

// Image is one converted platform.
type Image struct {
	Platform         string           `json:"platform"`
	ManifestDigest   string           `json:"manifest_digest"`
	Mode             block.Mode       `json:"mode"`
	Filesystem       block.Filesystem `json:"filesystem"`
	VirtualSizeBytes int64            `json:"virtual_size_bytes"`
	Layers           []Layer          `json:"layers"`
	Soldier          string           `json:"soldier"`
}

// Blocks are the image's blocks, lowest first; the last is the soldier.
func (i Image) Blocks() []string {
	var out []string
	for _, l := range i.Layers {
		out = append(out, l.Block)
	}
	return append(out, i.Soldier)
}

// Layer is one converted layer.
type Layer struct {
	Digest  string `json:"digest"`
	DiffID  string `json:"diff_id"`
	ChainID string `json:"chain_id"`
	Block   string `json:"block"`
	Reused  bool   `json:"reused"` // the block was complete before
	// AppliedBytes is the uncompressed size; WrittenBytes is what the block
	// occupies beyond the one below it. Both are 0 when reused.
	AppliedBytes int64         `json:"applied_bytes"`
	WrittenBytes int64         `json:"written_bytes"`
	FetchedBytes int64         `json:"fetched_bytes"` // 0: nothing needed the blob
	PushedBytes  int64         `json:"pushed_bytes"`  // 0: DEST had it or mounted it
	Duration     time.Duration `json:"duration_ns"`   // of writing the block
}
