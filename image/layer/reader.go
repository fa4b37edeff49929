package layer

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"

	"github.com/thaw-project/thaw/kind"
)

// blockBytes is the unit of the tar format.
const blockBytes = 512

// Reader reads the entries of one layer in order. Not for concurrent use.
type Reader struct {
	src    *counted
	tar    *tar.Reader
	limits Limits
	count  counter
	last   string // name of the newest entry, for messages
	left   int64  // bytes of it not read yet
	err    error  // sticky
}

// NewReader reads the uncompressed tar stream r.
func NewReader(r io.Reader, limits Limits) *Reader {
	src := &counted{r: r}
	return &Reader{src: src, tar: tar.NewReader(src), limits: limits, err: limits.Validate()}
}

// counted counts what was read of a stream.
type counted struct {
	r io.Reader
	n int64
}

func (c *counted) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	return n, err
}

// Next returns the next entry; what was not read of the one before is skipped.
// At the end of the layer, once the stream has been read to its own end, it
// returns io.EOF. Errors are kind.Invalid for an entry that must not be,
// kind.Corrupt for a stream that is no tar or ends early, or the stream's own.
// A stream that ends between two blocks where no file's data is missing is taken
// for whole, as some programs leave out the zeros at the end; the layer's digest
// tells whether that is so.
func (r *Reader) Next() (*Entry, error) {
	if r.err != nil {
		return nil, r.err
	}
	e, err := r.next()
	if err != nil {
		r.err = err
	}
	return e, err
}

func (r *Reader) next() (*Entry, error) {
	for {
		hdr, err := r.tar.Next()
		if err == io.EOF {
			r.left = 0
			// archive/tar takes a stream that ends in padding for one that ends.
			if r.src.n%blockBytes != 0 {
				return nil, streamError(io.ErrUnexpectedEOF, r.last)
			}
			return nil, r.drain()
		}
		if err != nil && !(errors.Is(err, tar.ErrInsecurePath) && hdr != nil) {
			return nil, streamError(err, r.last)
		}
		r.last = hdr.Name
		e, skip, err := r.limits.entry(hdr)
		if err != nil {
			return nil, err
		}
		if err := r.count.add(r.limits, hdr, e); err != nil {
			return nil, err
		}
		if skip {
			continue
		}
		r.left = e.Size
		return e, nil
	}
}

// Read reads from the file of the entry that Next returned last; io.EOF is its
// end.
func (r *Reader) Read(p []byte) (int, error) {
	if r.err != nil {
		return 0, r.err
	}
	if r.left == 0 {
		return 0, io.EOF
	}
	if int64(len(p)) > r.left {
		p = p[:r.left]
	}
	n, err := r.tar.Read(p)
	r.left -= int64(n)
	if err == io.EOF {
		if r.left > 0 {
			err = io.ErrUnexpectedEOF
		} else {
			err = nil
		}
	}
	if err != nil {
		r.err = streamError(err, r.last)
		return n, r.err
	}
	return n, nil
}

// drain reads what follows the end of the archive, so that who computes a digest
// of the stream sees all of it.
func (r *Reader) drain() error {
	n, err := io.Copy(io.Discard, io.LimitReader(r.src, maxTrailer+1))
	if err != nil {
		return streamError(err, r.last)
	}
	if n > maxTrailer {
		return kind.Errorf(kind.Invalid, "layer: more than %d bytes follow the end of the archive", maxTrailer)
	}
	return io.EOF
}

// StreamError marks an error of reading a layer's tar stream with the kind it
// has: an error that already has one keeps it, a stream that ends early or is no
// tar is kind.Corrupt. last is the name of the newest entry, or "".
func StreamError(err error, last string) error {
	if err == nil {
		return nil
	}
	return streamError(err, last)
}

func streamError(err error, last string) error {
	where := "layer: before the first entry"
	if last != "" {
		where = fmt.Sprintf("layer entry %.200q", last)
	}
	switch {
	case kind.Of(err) != "":
		return kind.Errorf(kind.Of(err), "%s: %w", where, err)
	case errors.Is(err, io.ErrUnexpectedEOF):
		return kind.Errorf(kind.Corrupt, "%s: the stream ends early: %w", where, err)
	case errors.Is(err, tar.ErrHeader), errors.Is(err, tar.ErrFieldTooLong):
		return kind.Errorf(kind.Corrupt, "%s or the header after it: not a tar that can be read: %w", where, err)
	}
	return kind.Errorf(kind.IO, "%s: read: %w", where, err)
}
