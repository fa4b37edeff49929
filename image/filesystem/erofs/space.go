package erofs

import (
	"fmt"
	"os"

	"github.com/thaw-project/thaw/kind"
)

const (
	// windowSize is the size and the alignment of the writes: large enough that a
	// network or FUSE round trip does not count.
	windowSize = 1 << 20
	// windows bounds the buffers: one being filled, one being written and one
	// between them.
	windows = 3
)

// space appends to the unused part of a block. Bytes that are skipped are never
// written: behind the used part of a thin volume they read as zeros.
//
// Writes happen in one goroutine, in order; finish waits for it.
type space struct {
	at    int64 // where the next byte goes
	limit int64 // the size of the block

	buf   []byte // filled from bufAt on; buf[:at-bufAt] is valid
	bufAt int64

	jobs chan job
	free chan []byte // windows that have been written
	made int         // windows there are, at most windows
	fail chan error  // holds the writer's first error
	done chan struct{}
}

type job struct {
	buf []byte
	at  int64
}

func newSpace(disk *os.File, at, limit int64) *space {
	s := &space{
		at: at, limit: limit, bufAt: at, buf: make([]byte, windowSize), made: 1,
		jobs: make(chan job, windows), free: make(chan []byte, windows),
		fail: make(chan error, 1), done: make(chan struct{}),
	}
	go s.write(disk)
	return s
}

// write is the goroutine that writes; it ends when jobs is closed. After an error
// it only hands buffers back.
func (s *space) write(disk *os.File) {
	defer close(s.done)
	failed := false
	for j := range s.jobs {
		if !failed {
			if _, err := disk.WriteAt(j.buf, j.at); err != nil {
				failed = true
				s.fail <- fmt.Errorf("erofs: write %d bytes at %d: %w", len(j.buf), j.at, err)
			}
		}
		s.free <- j.buf[:windowSize]
	}
}

// room checks that n more bytes fit the block.
func (s *space) room(n int64) error {
	if n > s.limit-s.at {
		return kind.Errorf(kind.NoSpace, "erofs: the layer does not fit: %d bytes are needed behind offset %d of a block of %d; choose a larger virtual size", n, s.at, s.limit)
	}
	return nil
}

func (s *space) append(p []byte) error {
	if err := s.room(int64(len(p))); err != nil {
		return err
	}
	for len(p) > 0 {
		// A window ends at a multiple of its size on the disk.
		end := windowSize - int(s.bufAt%windowSize)
		n := copy(s.buf[s.at-s.bufAt:end], p)
		s.at += int64(n)
		p = p[n:]
		if s.at-s.bufAt == int64(end) {
			if err := s.flush(); err != nil {
				return err
			}
		}
	}
	return nil
}

// skip leaves n bytes unwritten.
func (s *space) skip(n int64) error {
	if err := s.room(n); err != nil {
		return err
	}
	if err := s.flush(); err != nil {
		return err
	}
	s.at += n
	s.bufAt = s.at
	return nil
}

var zeros [64 << 10]byte

// align pads with zeros to the next block.
func (s *space) align() error {
	return s.append(zeros[:alignUp(s.at, blockSize)-s.at])
}

// block is the address of the block at the next byte, which must be aligned.
func (s *space) block() uint32 { return uint32(s.at >> blockBits) }

// flush hands what is buffered to the writer.
func (s *space) flush() error {
	if n := s.at - s.bufAt; n > 0 {
		s.jobs <- job{s.buf[:n], s.bufAt}
		if s.made < windows && len(s.free) == 0 {
			s.made++
			s.buf = make([]byte, windowSize)
		} else {
			s.buf = <-s.free
		}
		s.bufAt = s.at
	}
	select {
	case err := <-s.fail:
		return err
	default:
		return nil
	}
}

// finish writes what is buffered and waits for all writes. It must be called
// once, whatever happened before.
func (s *space) finish() error {
	err := s.flush()
	close(s.jobs)
	<-s.done
	select {
	case late := <-s.fail:
		if err == nil {
			err = late
		}
	default:
	}
	return err
}
