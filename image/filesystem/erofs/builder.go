// Package erofs writes image layers into a block as EROFS, the kernel's read-only
// file system, and reads back what it wrote.
//
// A layer is appended: its file data as it arrives, then its metadata, and last
// block 0 with superblock and root inode, so that a clone shares all that was
// below and an interrupted Apply leaves the file system as it was. The layout is
// drawn in docs/erofs-layout.md.
//
// The package knows the on-disk format, OCI layer rules and a file to write to.
// It must not know how that file is stored, mounted or named.
package erofs

import (
	"context"
	"fmt"
	"io"
	"os"
	"strconv"

	"github.com/thaw-project/thaw/image/block"
	"github.com/thaw-project/thaw/image/filesystem"
	"github.com/thaw-project/thaw/image/layer"
	"github.com/thaw-project/thaw/kind"
)

// clusterSize is lvol's cluster: what a layer appends starts at a multiple of it,
// so that no cluster of the layers below is written but the first.
const clusterSize = 64 << 10

type builder struct{}

// New returns the builder of EROFS blocks. It keeps no state.
func New() filesystem.Builder { return builder{} }

func check(o filesystem.Options) error {
	if o.Mode != block.ModeOverlayfs && o.Mode != block.ModeOverlaybd {
		return kind.Errorf(kind.Invalid, "erofs: unknown image mode %.40q", o.Mode)
	}
	if o.SizeBytes < 2*clusterSize || o.SizeBytes > maxFileBytes {
		return kind.Errorf(kind.Invalid, "erofs: a block of %d bytes: must be %d to %d", o.SizeBytes, 2*clusterSize, int64(maxFileBytes))
	}
	return nil
}

func newRoot() *inode {
	root := newDir(0o755)
	root.nid = rootNid
	return root
}

// Format writes an empty file system: block 0 and an empty table of layers.
func (builder) Format(ctx context.Context, disk *os.File, options filesystem.Options) error {
	if err := check(options); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return kind.Errorf(kind.Canceled, "erofs: format: %w", err)
	}
	m := newMetadata(nil, blockSize)
	m.placeRoot(newRoot())
	if _, err := disk.WriteAt((&table{}).encode(), blockSize); err != nil {
		return fmt.Errorf("erofs: write the table of layers: %w", err)
	}
	return m.commit(disk, &superblock{inos: 1, blocks: 2, uuid: options.UUID})
}

// Apply implements filesystem.Builder. A layer that goes wrong is an error of
// kind.Invalid or kind.Corrupt, one that does not fit is kind.NoSpace.
func (builder) Apply(ctx context.Context, disk *os.File, options filesystem.Options, index int, r io.Reader) error {
	if err := check(options); err != nil {
		return err
	}
	m, err := openImage(disk)
	if err != nil {
		return err
	}
	if index != int(m.table.layers) || index >= maxLayers {
		return kind.Errorf(kind.Invalid, "erofs: layer %d cannot follow the %d that the block holds (at most %d)", index, m.table.layers, maxLayers)
	}
	lower := newLoader(m)
	root, err := lower.root()
	if err != nil {
		return err
	}
	below, err := layersBelow(root, options.Mode, index)
	if err != nil {
		return err
	}

	space := newSpace(disk, alignUp(m.sizeBytes(), clusterSize), options.SizeBytes)
	super, meta, err := appendLayer(ctx, space, lower.image, root, below, options, index, layer.NewReader(r, layer.DefaultLimits(options.SizeBytes)))
	// The writer must have written everything before block 0 says so, and its
	// goroutine must end in any case.
	if late := space.finish(); err == nil {
		err = late
	}
	if err != nil {
		return err
	}
	return meta.commit(disk, super)
}

// layersBelow returns the directories that the new layer is laid over, the
// topmost first.
func layersBelow(root *inode, mode block.Mode, index int) (view, error) {
	if index == 0 {
		return nil, nil
	}
	if mode == block.ModeOverlaybd {
		return view{root}, root.loadAll(0)
	}
	below := make(view, 0, index)
	for i := index - 1; i >= 0; i-- {
		dir, err := root.child(strconv.Itoa(i))
		if err != nil {
			return nil, err
		}
		if dir == nil || !dir.isDir() {
			return nil, kind.Errorf(kind.Corrupt, "erofs: the block has no directory for its layer %d", i)
		}
		below = append(below, dir)
	}
	return below, nil
}

// appendLayer writes data, metadata and table of a layer and returns what block 0
// has to say then.
func appendLayer(ctx context.Context, s *space, old *image, root *inode, below view, options filesystem.Options, index int, r *layer.Reader) (*superblock, *metadata, error) {
	a := newApplier(below, newFileWriter(s))
	if err := a.run(ctx, r); err != nil {
		return nil, nil, err
	}
	if err := s.align(); err != nil {
		return nil, nil, err
	}
	super := &superblock{uuid: options.UUID}
	t := &table{layers: uint32(index) + 1}
	m := newMetadata(old, s.at)
	if options.Mode == block.ModeOverlaybd {
		merge(root, a.top)
		m.placeRoot(root)
		if err := m.placeChildren(root, 0); err != nil {
			return nil, nil, err
		}
	} else {
		root.children[strconv.Itoa(index)] = a.top
		m.placeRoot(root)
		if err := m.placeTree(a.top, rootNid); err != nil {
			return nil, nil, err
		}
		super.inos = old.super.inos - 1
		t.ranges = old.table.ranges
	}
	super.inos += uint64(len(m.placed))

	start := s.block()
	if err := m.write(s); err != nil {
		return nil, nil, err
	}
	t.ranges = append([]blockRange{{start, s.block() - start}}, t.ranges...)
	if err := s.append(t.encode()); err != nil {
		return nil, nil, err
	}
	super.blocks = s.block()
	return super, m, nil
}

// commit writes block 0, the one write that makes the new layer visible.
func (m *metadata) commit(disk *os.File, super *superblock) error {
	b := make([]byte, superOffset+superSize, blockSize)
	b, err := m.appendInode(b, m.placed[0])
	if err != nil {
		return err
	}
	b = b[:blockSize]
	super.encode(b)
	if _, err := disk.WriteAt(b, 0); err != nil {
		return fmt.Errorf("erofs: write the superblock: %w", err)
	}
	return nil
}
