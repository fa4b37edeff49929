package erofs

import (
	"bytes"
	"context"
	"io"

	"github.com/thaw-project/thaw/image/layer"
	"github.com/thaw-project/thaw/kind"
)

const (
	// inlineFile is the largest file whose data goes next to its inode. See
	// docs/erofs-layout.md for what was measured.
	inlineFile = 512
	// inlineBudget bounds the bytes of such files that are kept in memory until
	// the metadata is written; files beyond get a block of their own.
	inlineBudget = 32 << 20
	// chunkBudget bounds the entries of chunk maps kept in memory likewise;
	// files beyond are flat, their holes unwritten.
	chunkBudget = 8 << 20
	// maxMapEntries bounds one chunk map to 64 KiB.
	maxMapEntries = 16 << 10
	// unitSize is the granularity of looking for zeros: lvol's cluster.
	unitSize = 64 << 10
)

// content is the data of a regular file or symbolic link.
type content struct {
	layout    uint8
	chunkBits uint8
	block     uint32 // first block of flat data
	// tail is inline data: the last size%blockSize bytes.
	tail []byte
	// chunks is the map of a chunked file.
	chunks []uint32
	// stored, when not 0, is the offset in the block where inline data or chunk
	// map lie that this content shares with a layer below, instead of tail and
	// chunks.
	stored int64
}

// isZero tells whether p holds only zeros; len(p) is at most len(zeros).
func isZero(p []byte) bool { return bytes.Equal(p, zeros[:len(p)]) }

// chunkBitsFor chooses the chunk size of a file: small for small sparse files, a
// cluster for others, larger when the map would get too long.
func chunkBitsFor(size int64, sparse bool) uint8 {
	bits := uint8(16)
	if sparse && size <= 4<<20 {
		bits = blockBits
	}
	for size>>bits > maxMapEntries-1 && bits < maxChunkBits {
		bits++
	}
	return bits
}

// fileWriter turns the data of regular files into contents.
type fileWriter struct {
	space  *space
	inline int // bytes of inlineBudget in use
	mapped int // entries of chunkBudget in use
	unit   []byte
}

func newFileWriter(s *space) *fileWriter {
	return &fileWriter{space: s, unit: make([]byte, unitSize)}
}

// write reads the entry's file from r and stores it.
func (w *fileWriter) write(ctx context.Context, r io.Reader, e *layer.Entry) (*content, error) {
	size := e.Size
	if size == 0 {
		return &content{}, nil
	}
	if size <= inlineFile && w.inline+int(size) <= inlineBudget {
		tail := make([]byte, size)
		if _, err := io.ReadFull(r, tail); err != nil {
			return nil, err
		}
		w.inline += int(size)
		return &content{layout: layoutInline, tail: tail}, nil
	}
	c := &content{chunkBits: chunkBitsFor(size, e.Sparse)}
	if (size-1)>>c.chunkBits >= maxMapEntries {
		return nil, kind.Errorf(kind.Invalid, "layer entry %.200q: %d bytes are more than a file here can have", e.Name, size)
	}
	mayHole := w.mapped+int((size-1)>>c.chunkBits)+1 <= chunkBudget
	holes, start := false, w.space.block()
	for at := int64(0); at < size; {
		if err := ctx.Err(); err != nil {
			return nil, kind.Errorf(kind.Canceled, "erofs: write %.200q: %w", e.Name, err)
		}
		n := min(size-at, 1<<c.chunkBits)
		block, err := w.chunk(r, n, mayHole)
		if err != nil {
			return nil, err
		}
		if block == chunkHole && !holes {
			// Until now the file was flat: write its map up to here.
			holes = true
			for i := range uint32(at >> c.chunkBits) {
				c.chunks = append(c.chunks, start+i<<(c.chunkBits-blockBits))
			}
		}
		if holes {
			c.chunks = append(c.chunks, block)
		}
		at += n
	}
	if !holes {
		return &content{layout: layoutPlain, block: start}, nil
	}
	c.layout = layoutChunk
	c.shrinkMap(size)
	w.mapped += len(c.chunks)
	return c, nil
}

// shrinkMap gives a file of one hole a map of few entries.
func (c *content) shrinkMap(size int64) {
	for _, b := range c.chunks {
		if b != chunkHole {
			return
		}
	}
	for (size-1)>>c.chunkBits > 0 && c.chunkBits < maxChunkBits {
		c.chunkBits++
	}
	c.chunks = append([]uint32(nil), c.chunks[:(size-1)>>c.chunkBits+1]...)
}

// chunk stores the next n bytes of r in consecutive blocks and returns the first,
// or chunkHole if all are zero and mayHole is set. Units of zeros are skipped, not
// written.
func (w *fileWriter) chunk(r io.Reader, n int64, mayHole bool) (uint32, error) {
	block := w.space.block()
	skipped := int64(0) // zeros at the start, not placed yet
	placed := !mayHole
	for done := int64(0); done < n; {
		unit := w.unit[:min(n-done, unitSize)]
		if _, err := io.ReadFull(r, unit); err != nil {
			if err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return 0, err
		}
		done += int64(len(unit))
		switch zero := isZero(unit); {
		case zero && !placed:
			skipped += int64(len(unit))
			continue
		case zero && len(unit) == unitSize:
			if err := w.space.skip(unitSize); err != nil {
				return 0, err
			}
			continue
		}
		if skipped > 0 {
			if err := w.space.skip(skipped); err != nil {
				return 0, err
			}
			skipped = 0
		}
		placed = true
		if err := w.space.append(unit); err != nil {
			return 0, err
		}
	}
	if !placed {
		return chunkHole, nil
	}
	return block, w.space.align()
}
