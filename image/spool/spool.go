// Package spool fetches blobs and lets them be read, any number of times, while
// they arrive.
//
// A blob goes into a file without a name, so that a killed process leaves nothing,
// or is read where it is when it is on this machine already. Either way it is
// verified as it goes by; Verified tells the outcome. Memory does not grow with
// the size of blobs. The package knows nothing of images.
package spool

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/thaw-project/thaw/kind"
)

const (
	// parallel is how many blobs are fetched at once: enough to fill a link that
	// one TCP connection does not, few enough that the lowest layer, which is
	// applied first, is not starved.
	parallel = 3
	// attempts is how often in a row a blob may fail without any progress.
	attempts = 4
	// copyBytes is the buffer of one fetch.
	copyBytes = 256 << 10
)

// Source is where blobs come from. Blob opens one at offset; what is read is not
// verified. An error of kind.Unavailable is tried again.
type Source interface {
	Blob(ctx context.Context, d ocispec.Descriptor, offset int64) (io.ReadCloser, error)
}

// Local is a Source whose blobs are on this machine and need no copy.
type Local interface {
	File(d ocispec.Descriptor) (File, error)
}

// File is a blob on this machine.
type File interface {
	io.ReaderAt
	io.Closer
}

// Fetcher fetches blobs of one source, in the order asked for. Its methods may be
// called concurrently.
type Fetcher struct {
	ctx    context.Context // ends all fetches
	cancel context.CancelFunc
	source Source
	dir    string

	wg sync.WaitGroup

	mu      sync.Mutex
	blobs   map[digest.Digest]*Blob // guarded by mu: those in use
	queue   []*Blob                 // guarded by mu: bounded by the blobs of an image
	workers int                     // guarded by mu: at most parallel
	fetched int64                   // guarded by mu: bytes
}

// NewFetcher returns a fetcher that spools into dir until ctx ends or Close.
func NewFetcher(ctx context.Context, s Source, dir string) *Fetcher {
	ctx, cancel := context.WithCancel(ctx)
	return &Fetcher{ctx: ctx, cancel: cancel, source: s, dir: dir, blobs: map[digest.Digest]*Blob{}}
}

// Close ends all fetches and waits for them.
func (f *Fetcher) Close() {
	f.cancel()
	f.wg.Wait()
}

// FetchedBytes is how much was fetched so far.
func (f *Fetcher) FetchedBytes() int64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.fetched
}

// Get returns blob d and starts to fetch it unless that was done. Every Get needs
// a Release. progress, if not nil, is called from the fetching goroutine with the
// bytes so far, when this Get is the one that starts the fetch.
func (f *Fetcher) Get(d ocispec.Descriptor, progress func(fetchedBytes int64)) *Blob {
	f.mu.Lock()
	defer f.mu.Unlock()
	if b := f.blobs[d.Digest]; b != nil {
		b.uses++
		return b
	}
	b := &Blob{fetcher: f, descriptor: d, progress: progress, uses: 1}
	b.changed = sync.NewCond(&b.mu)
	f.blobs[d.Digest] = b
	f.queue = append(f.queue, b)
	if f.workers < parallel {
		f.workers++
		f.wg.Go(f.work)
	}
	return b
}

func (f *Fetcher) work() {
	for {
		f.mu.Lock()
		if len(f.queue) == 0 {
			f.workers--
			f.mu.Unlock()
			return
		}
		b := f.queue[0]
		f.queue = f.queue[1:]
		unused := b.uses == 0
		if !unused {
			b.uses++ // ours
		}
		f.mu.Unlock()
		if unused {
			b.finish(kind.Errorf(kind.Canceled, "not needed any more"))
			continue
		}
		b.finish(b.fetch(f.ctx))
		b.Release()
	}
}

// Blob is a blob that arrives.
type Blob struct {
	fetcher    *Fetcher
	descriptor ocispec.Descriptor
	progress   func(int64)

	uses int // guarded by fetcher.mu

	mu      sync.Mutex
	changed *sync.Cond
	file    File  // guarded by mu: nil until the fetch begins
	arrived int64 // guarded by mu: bytes of file that may be read
	done    bool  // guarded by mu
	err     error // guarded by mu: why the fetch failed, once done
}

// Release ends one use. With the last one the bytes are gone.
func (b *Blob) Release() {
	f := b.fetcher
	f.mu.Lock()
	b.uses--
	last := b.uses == 0
	if last && f.blobs[b.descriptor.Digest] == b {
		delete(f.blobs, b.descriptor.Digest)
	}
	f.mu.Unlock()
	if !last {
		return
	}
	b.mu.Lock()
	file := b.file
	b.file = nil
	b.mu.Unlock()
	if file != nil {
		file.Close()
	}
}

func (b *Blob) finish(err error) {
	b.mu.Lock()
	b.done, b.err = true, err
	b.mu.Unlock()
	b.changed.Broadcast()
}

// Verified waits until all of the blob is there and its digest is right.
func (b *Blob) Verified(ctx context.Context) error {
	_, err := b.wait(ctx, 1<<62)
	if err == io.EOF {
		err = nil
	}
	return err
}

// wait waits until more than offset bytes arrived and returns how many did; io.EOF
// when there will be no more and all is well.
func (b *Blob) wait(ctx context.Context, offset int64) (int64, error) {
	stop := context.AfterFunc(ctx, b.changed.Broadcast)
	defer stop()
	b.mu.Lock()
	defer b.mu.Unlock()
	for {
		switch {
		case ctx.Err() != nil:
			return 0, kind.Wrap(kind.Canceled, context.Cause(ctx))
		case b.done && b.err != nil:
			return 0, b.err
		case b.arrived > offset:
			return b.arrived, nil
		case b.done:
			return 0, io.EOF
		}
		b.changed.Wait()
	}
}

// NewReader reads the blob from its start, waiting for what has not arrived. What
// it returns is not verified until Verified says so. Use it before Release, from
// one goroutine.
func (b *Blob) NewReader(ctx context.Context) io.Reader { return &reader{ctx: ctx, blob: b} }

type reader struct {
	ctx     context.Context
	blob    *Blob
	offset  int64
	arrived int64
}

func (r *reader) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	if r.offset >= r.arrived || r.ctx.Err() != nil {
		arrived, err := r.blob.wait(r.ctx, r.offset)
		if err != nil {
			return 0, err
		}
		r.arrived = arrived
	}
	r.blob.mu.Lock()
	file := r.blob.file
	r.blob.mu.Unlock()
	if file == nil {
		return 0, kind.Errorf(kind.Invalid, "read of blob %s after its release", r.blob.descriptor.Digest)
	}
	n, err := file.ReadAt(p[:min(int64(len(p)), r.arrived-r.offset)], r.offset)
	r.offset += int64(n)
	if n > 0 {
		err = nil
	}
	return n, err
}

// fetch brings the blob in. Errors name it.
func (b *Blob) fetch(ctx context.Context) error {
	if local, ok := b.fetcher.source.(Local); ok {
		file, err := local.File(b.descriptor)
		if err != nil {
			return err
		}
		b.mu.Lock()
		b.file = file
		b.mu.Unlock()
		return b.verifyFile(ctx, file)
	}
	file, err := Create(b.fetcher.dir)
	if err != nil {
		return err
	}
	b.mu.Lock()
	b.file = file
	b.mu.Unlock()
	return b.download(ctx, file)
}

// verifyFile hashes a blob that is here already, so that readers, a little behind,
// find it in the page cache.
func (b *Blob) verifyFile(ctx context.Context, file File) error {
	d, buf := b.descriptor, make([]byte, copyBytes)
	verifier := d.Digest.Algorithm().Digester()
	r := io.NewSectionReader(file, 0, d.Size)
	for {
		if ctx.Err() != nil {
			return kind.Wrap(kind.Canceled, context.Cause(ctx))
		}
		n, err := r.Read(buf)
		verifier.Hash().Write(buf[:n])
		b.advance(int64(n))
		if err == io.EOF {
			break
		}
		if err != nil {
			return fmt.Errorf("read blob %s: %w", d.Digest, err)
		}
	}
	var one [1]byte
	if n, _ := file.ReadAt(one[:], d.Size); n > 0 {
		return b.tooLong()
	}
	return b.verdict(verifier.Digest())
}

func (b *Blob) tooLong() error {
	return kind.Errorf(kind.Corrupt, "blob %s: it is longer than the %d bytes its manifest says", b.descriptor.Digest, b.descriptor.Size)
}

func (b *Blob) verdict(got digest.Digest) error {
	d := b.descriptor
	b.mu.Lock()
	arrived := b.arrived
	b.mu.Unlock()
	if arrived != d.Size {
		return kind.Errorf(kind.Corrupt, "blob %s: truncated: %d bytes of %d", d.Digest, arrived, d.Size)
	}
	if got != d.Digest {
		return kind.Errorf(kind.Corrupt, "blob %s: the bytes have digest %s", d.Digest, got)
	}
	return nil
}

func (b *Blob) advance(n int64) {
	f := b.fetcher
	f.mu.Lock()
	f.fetched += n
	f.mu.Unlock()
	b.mu.Lock()
	b.arrived += n
	arrived := b.arrived
	b.mu.Unlock()
	b.changed.Broadcast()
	if b.progress != nil {
		b.progress(arrived)
	}
}

// download copies the blob into file, resuming where a broken connection left it.
func (b *Blob) download(ctx context.Context, file *os.File) error {
	d := b.descriptor
	verifier := d.Digest.Algorithm().Digester()
	buf := make([]byte, copyBytes)
	failures := 0
	for {
		before := b.arrived // only this goroutine changes it
		err := b.downloadOnce(ctx, file, verifier, buf)
		if b.arrived == d.Size && (err == nil || retryable(err)) {
			return b.verdict(verifier.Digest())
		}
		if b.arrived > before {
			failures = 0
		}
		failures++
		if !retryable(err) || failures >= attempts || ctx.Err() != nil {
			if errors.Is(err, io.ErrUnexpectedEOF) && ctx.Err() == nil {
				// The registry answers, and ends at the same byte each time.
				err = kind.Errorf(kind.Corrupt, "blob %s: truncated: %d bytes of %d, in each of %d attempts (%w)", d.Digest, b.arrived, d.Size, failures, err)
			}
			return err
		}
		select {
		case <-ctx.Done():
			return kind.Wrap(kind.Canceled, context.Cause(ctx))
		case <-time.After(time.Duration(failures) * 250 * time.Millisecond):
		}
	}
}

func retryable(err error) bool {
	return kind.Of(err) == kind.Unavailable || errors.Is(err, errShort)
}

var errShort = errors.New("the connection ended early")

func (b *Blob) downloadOnce(ctx context.Context, file *os.File, verifier digest.Digester, buf []byte) error {
	d := b.descriptor
	body, err := b.fetcher.source.Blob(ctx, d, b.arrived)
	if err != nil {
		return err
	}
	defer body.Close()
	for {
		n, err := body.Read(buf)
		if n > 0 {
			if b.arrived+int64(n) > d.Size {
				return b.tooLong()
			}
			if _, werr := file.WriteAt(buf[:n], b.arrived); werr != nil {
				return spoolError(b.fetcher.dir, werr)
			}
			verifier.Hash().Write(buf[:n])
			b.advance(int64(n))
		}
		switch {
		case err == io.EOF && b.arrived == d.Size:
			return nil
		case err == io.EOF:
			return kind.Wrap(kind.Corrupt, fmt.Errorf("blob %s: truncated: %d bytes of %d: %w", d.Digest, b.arrived, d.Size, errShort))
		case err != nil:
			return err
		}
	}
}

// Create creates a file without a name in dir, or in the directory for temporary
// files if dir is empty.
func Create(dir string) (*os.File, error) {
	if dir == "" {
		dir = os.TempDir()
	}
	fd, err := unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err == nil {
		return os.NewFile(uintptr(fd), dir+"/(spool)"), nil
	}
	if !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.EISDIR) && !errors.Is(err, unix.EINVAL) {
		return nil, spoolError(dir, err)
	}
	// A file system without O_TMPFILE: the name lives for an instant.
	f, err := os.CreateTemp(dir, ".thaw-spool-")
	if err != nil {
		return nil, spoolError(dir, err)
	}
	if err := os.Remove(f.Name()); err != nil {
		f.Close()
		return nil, spoolError(dir, err)
	}
	return f, nil
}

func spoolError(dir string, err error) error {
	if dir == "" {
		dir = os.TempDir()
	}
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		return kind.Errorf(kind.NoSpace, "no space left to spool blobs in %s: free some, or choose another directory with --spool-dir", dir)
	}
	return fmt.Errorf("spool blobs in %s: %w", dir, err)
}
