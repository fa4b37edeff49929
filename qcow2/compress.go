package qcow2

import (
	"bytes"
	"fmt"
	"io"
	"sync"

	"github.com/klauspost/compress/flate"
	"github.com/klauspost/compress/zstd"

	"github.com/thaw-project/thaw/kind"
)

// A compressed cluster is a raw deflate stream, or with compression type 1 a zstd
// frame, that gives one cluster of data. What follows it in its last sector belongs to
// others. Thaw reads such clusters and never writes them.

var inflaters = sync.Pool{New: func() any { return flate.NewReader(bytes.NewReader(nil)) }}

// zstdWindowBytes bounds what a frame may make the decoder allocate: QEMU compresses a
// cluster at a time, so a window never needs to exceed the largest cluster.
const zstdWindowBytes = 1 << maxClusterBits

var unzstders = sync.Pool{New: func() any {
	d, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(zstdWindowBytes))
	if err != nil {
		panic("qcow2: zstd decoder options: " + err.Error()) // constants
	}
	return d
}}

// readCompressed reads p from a compressed cluster, in bytes into it.
func (i *Image) readCompressed(entry uint64, p []byte, in int64) error {
	off, n := i.head.compressedExtent(entry)
	fileBytes := i.alloc.fileBytes.Load()
	if off >= fileBytes {
		return kind.Errorf(kind.Corrupt, "compressed cluster at %d, behind the end of the file", off)
	}
	n = min(n, fileBytes-off)
	in2 := getBuffer(i.head.clusterBits + 1)
	defer putBuffer(in2)
	src := (*in2)[:n]
	if err := readFull(i.file, src, off, true); err != nil {
		return err
	}
	dst := p
	if int64(len(p)) < i.clusterBytes {
		out := getBuffer(i.head.clusterBits)
		defer putBuffer(out)
		dst = *out
	}
	if err := decompress(dst, src, i.head.compression); err != nil {
		return kind.Errorf(kind.Corrupt, "compressed cluster at %d: %w", off, err)
	}
	if int64(len(p)) < i.clusterBytes {
		copy(p, dst[in:])
	}
	return nil
}

// decompress fills dst.
func decompress(dst, src []byte, compression byte) error {
	in := bytes.NewReader(src)
	if compression == compressionZstd {
		d := unzstders.Get().(*zstd.Decoder)
		defer func() {
			d.Reset(nil)
			unzstders.Put(d)
		}()
		if err := d.Reset(in); err != nil {
			return err
		}
		if _, err := io.ReadFull(d, dst); err != nil {
			return fmt.Errorf("zstd: %w", err)
		}
		return nil
	}
	r := inflaters.Get().(io.ReadCloser)
	defer inflaters.Put(r)
	if err := r.(flate.Resetter).Reset(in, nil); err != nil {
		return err
	}
	if _, err := io.ReadFull(r, dst); err != nil {
		return fmt.Errorf("deflate: %w", err)
	}
	return nil
}
