// Package annotation is the contract between a converted manifest and the
// snapshotters that read it: the annotations on each layer descriptor.
//
// containerd hands a snapshotter only annotations that begin with
// "containerd.io/snapshot/", as labels of Prepare, and stores labels only when key
// plus value stay under 4096 bytes. Annotations hold no address and no secret: a
// node resolves the target's name from its own configuration. Everything parsed
// here comes from a registry and is hostile.
package annotation

import (
	"strconv"
	"strings"

	"github.com/thaw-project/thaw/image/block"
	"github.com/thaw-project/thaw/kind"
)

// The keys. All are on every layer descriptor of a converted manifest.
const (
	Prefix = "containerd.io/snapshot/thaw."

	Version    = Prefix + "version"    // Current
	Block      = Prefix + "block"      // the block that holds this layer and those below
	Leaf       = Prefix + "leaf"       // the image's soldier block
	Mode       = Prefix + "mode"       // overlayfs or overlaybd
	Filesystem = Prefix + "filesystem" // ext4 or erofs
	Layer      = Prefix + "layer"      // "index/count": the place among the manifest's layers, the lowest is 0
	Target     = Prefix + "target"     // name of the target that holds the blocks
)

// Current is the version this package writes. Nodes refuse a newer one, and then
// unpack the ordinary layers.
const Current = 1

// MaxLayers bounds the layers of an image; containerd and overlayfs stop earlier.
const MaxLayers = 4096

// LayerRef says where one layer of a converted image is.
type LayerRef struct {
	Block      string
	Leaf       string
	Mode       block.Mode
	Filesystem block.Filesystem
	Index      int // from 0, the lowest layer
	Count      int
	Target     string
}

// Annotations returns r as annotations of the layer's descriptor.
func (r LayerRef) Annotations() map[string]string {
	return map[string]string{
		Version:    strconv.Itoa(Current),
		Block:      r.Block,
		Leaf:       r.Leaf,
		Mode:       string(r.Mode),
		Filesystem: string(r.Filesystem),
		Layer:      strconv.Itoa(r.Index) + "/" + strconv.Itoa(r.Count),
		Target:     r.Target,
	}
}

// Parse reads a LayerRef from a descriptor's annotations or a Prepare's labels. ok
// is false, without error, when they are not Thaw's at all. An unknown key of ours,
// a missing one or a newer version is an error: the caller falls back to ordinary
// layers.
func Parse(labels map[string]string) (r LayerRef, ok bool, err error) {
	for k := range labels {
		if !strings.HasPrefix(k, Prefix) {
			continue
		}
		ok = true
		switch k {
		case Version, Block, Leaf, Mode, Filesystem, Layer, Target:
		default:
			return LayerRef{}, true, kind.Errorf(kind.Unsupported, "layer annotation %.100q is not known to this version", k)
		}
	}
	if !ok {
		return LayerRef{}, false, nil
	}
	r, err = parse(labels)
	return r, true, err
}

func parse(labels map[string]string) (LayerRef, error) {
	version, err := strconv.Atoi(labels[Version])
	if err != nil || version < 1 {
		return LayerRef{}, kind.Errorf(kind.Invalid, "layer annotation %s=%.20q is not a version", Version, labels[Version])
	}
	if version > Current {
		return LayerRef{}, kind.Errorf(kind.Unsupported, "layer annotations of version %d, this program knows %d: upgrade thaw on this node", version, Current)
	}
	r := LayerRef{Block: labels[Block], Leaf: labels[Leaf], Target: labels[Target]}
	if _, err := block.ParseName(r.Block); err != nil {
		return LayerRef{}, err
	}
	scope, err := block.ParseName(r.Leaf)
	if err != nil {
		return LayerRef{}, err
	}
	if scope != block.Soldier {
		return LayerRef{}, kind.Errorf(kind.Invalid, "leaf block %s is not a soldier", r.Leaf)
	}
	if r.Mode, err = block.ParseMode(labels[Mode]); err != nil {
		return LayerRef{}, err
	}
	if r.Filesystem, err = block.ParseFilesystem(labels[Filesystem]); err != nil {
		return LayerRef{}, err
	}
	if r.Target == "" || len(r.Target) > 64 || strings.ContainsFunc(r.Target, notTargetRune) {
		return LayerRef{}, kind.Errorf(kind.Invalid, "target name %.80q: must be 1 to 64 of a-z 0-9 . -", r.Target)
	}
	index, count, found := strings.Cut(labels[Layer], "/")
	var ierr, cerr error
	r.Index, ierr = strconv.Atoi(index)
	r.Count, cerr = strconv.Atoi(count)
	if !found || ierr != nil || cerr != nil || r.Count < 1 || r.Count > MaxLayers || r.Index < 0 || r.Index >= r.Count {
		return LayerRef{}, kind.Errorf(kind.Invalid, "layer annotation %s=%.40q is not index/count", Layer, labels[Layer])
	}
	return r, nil
}

func notTargetRune(r rune) bool {
	return !(r >= 'a' && r <= 'z' || r >= '0' && r <= '9' || r == '.' || r == '-')
}
