package convert

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash"
	"io"
	"sync"

	"crypto/sha256"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"

	"github.com/thaw-project/thaw/kind"
)

const (
	// chunks of chunkBytes are decompressed ahead of the one being applied, so
	// that both work at once. More would only cost memory.
	chunkBytes = 512 << 10
	chunks     = 4
	// maxWindow bounds the memory a zstd layer may ask for: what zstd --long uses.
	maxWindow = 128 << 20
)

// layerStream is a layer's uncompressed tar. It is decompressed and hashed by a
// goroutine of its own, that Close waits for.
type layerStream struct {
	full   chan chunk  // decompressed chunks, in order; closed after the last
	free   chan []byte // chunks to fill
	stop   <-chan struct{}
	cancel context.CancelFunc
	done   sync.WaitGroup

	current []byte // what is left of the chunk being read
	held    []byte // the whole of it
	err     error  // sticky, of Read
	applied int64  // bytes read
	report  func(appliedBytes int64)

	diffID hash.Hash // of the goroutine until full is closed
}

type chunk struct {
	data []byte
	err  error
}

// newLayerStream decompresses r, by its magic as containerd does, whatever its
// media type says. More than maxBytes are an error.
//
// open's reader must not block beyond the end of its context.
func newLayerStream(ctx context.Context, open func(context.Context) io.Reader, maxBytes int64, report func(int64)) *layerStream {
	ctx, cancel := context.WithCancel(ctx)
	s := &layerStream{
		full:   make(chan chunk, chunks),
		free:   make(chan []byte, chunks),
		cancel: cancel,
		stop:   ctx.Done(),
		report: report,
		diffID: sha256.New(),
	}
	for range chunks {
		s.free <- make([]byte, chunkBytes)
	}
	s.done.Go(func() {
		defer close(s.full)
		s.send(chunk{err: s.decompress(ctx, open(ctx), maxBytes)})
	})
	return s
}

func (s *layerStream) send(c chunk) bool {
	select {
	case s.full <- c:
		return true
	case <-s.stop:
		return false
	}
}

// decompress sends all of r and returns io.EOF, or why it could not.
func (s *layerStream) decompress(ctx context.Context, r io.Reader, maxBytes int64) error {
	in := bufio.NewReaderSize(r, 128<<10)
	out, closeOut, err := decompressor(in)
	if err != nil {
		return err
	}
	defer closeOut()
	total := int64(0)
	for {
		var buf []byte
		select {
		case buf = <-s.free:
		case <-s.stop:
			return kind.Wrap(kind.Canceled, context.Cause(ctx))
		}
		n, err := io.ReadFull(out, buf[:chunkBytes])
		if total += int64(n); total > maxBytes {
			return kind.Errorf(kind.Invalid, "layer decompresses to more than the %d bytes of a block: choose a larger virtual size", maxBytes)
		}
		s.diffID.Write(buf[:n])
		if n > 0 && !s.send(chunk{data: buf[:n]}) {
			return kind.Errorf(kind.Canceled, "stopped")
		}
		switch {
		case err == nil:
		case err == io.EOF, err == io.ErrUnexpectedEOF && n > 0 && atEnd(out):
			return io.EOF
		default:
			return damaged(err)
		}
	}
}

// atEnd tells a short last chunk from a stream cut short: io.ReadFull reports both
// in the same way.
func atEnd(r io.Reader) bool {
	var one [1]byte
	n, err := r.Read(one[:])
	return n == 0 && err == io.EOF
}

// damaged marks what a decompressor complains about; errors of the blob below have
// their kinds.
func damaged(err error) error {
	if kind.Of(err) != "" {
		return err
	}
	if errors.Is(err, io.EOF) { // in the middle of a header: nobody must take it for the end
		err = io.ErrUnexpectedEOF
	}
	return kind.Errorf(kind.Corrupt, "decompress: %w", err)
}

func decompressor(in *bufio.Reader) (io.Reader, func(), error) {
	magic, err := in.Peek(4)
	if err != nil && err != io.EOF {
		return nil, nil, err
	}
	switch {
	case bytes.HasPrefix(magic, []byte{0x1f, 0x8b, 0x08}):
		z, err := gzip.NewReader(in)
		if err != nil {
			return nil, nil, damaged(err)
		}
		return z, func() { z.Close() }, nil
	case bytes.Equal(magic, []byte{0x28, 0xb5, 0x2f, 0xfd}):
		z, err := zstd.NewReader(in, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(maxWindow))
		if err != nil {
			return nil, nil, damaged(err)
		}
		return z, z.Close, nil
	}
	return in, func() {}, nil
}

// Read implements io.Reader.
func (s *layerStream) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	for len(s.current) == 0 {
		if s.err != nil {
			return 0, s.err
		}
		if s.held != nil {
			s.free <- s.held[:chunkBytes]
			s.held = nil
		}
		c, ok := <-s.full
		if !ok {
			c.err = kind.Errorf(kind.Canceled, "stopped")
		}
		if c.err != nil {
			s.err = c.err
			continue
		}
		s.current, s.held = c.data, c.data
	}
	n := copy(p, s.current)
	s.current = s.current[n:]
	s.applied += int64(n)
	s.report(s.applied)
	return n, nil
}

// finish reads what the builder left and returns the digest of the whole.
func (s *layerStream) finish() (digest.Digest, error) {
	if _, err := io.Copy(io.Discard, struct{ io.Reader }{s}); err != nil {
		return "", err
	}
	return digest.NewDigest(digest.SHA256, s.diffID), nil
}

// cause is the error the stream itself failed with, if it did: a builder may have
// wrapped it in a complaint about the tar.
func (s *layerStream) cause() error {
	if s.err == nil || errors.Is(s.err, io.EOF) {
		return nil
	}
	return fmt.Errorf("read layer: %w", s.err)
}

// Close ends the goroutine.
func (s *layerStream) Close() {
	s.cancel()
	s.done.Wait()
}
