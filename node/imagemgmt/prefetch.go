package imagemgmt

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"

	"github.com/thaw-project/thaw/kind"
)

const (
	// maxPrefetches bounds the calls of Prefetch that are under way, as many as containers
	// start at once on a node that is busy.
	maxPrefetches = 32
	// prefetchReads bounds the reads of all of them together: enough to hide a network's
	// round trip, little beside what containers themselves read.
	prefetchReads = 4
	// prefetchBytes is the most that one of them reads: a late read of a container waits
	// behind that much.
	prefetchBytes = 1 << 20
)

// Prefetch implements Service.
func (m *Manager) Prefetch(ctx context.Context, block string, ranges []Range, progress func(int64)) error {
	if err := checkName("block", block); err != nil {
		return err
	}
	if len(ranges) > MaxRanges {
		return kind.Errorf(kind.Invalid, "prefetch %d ranges of block %s: at most %d", len(ranges), block, MaxRanges)
	}
	if err := m.enter(); err != nil {
		return err
	}
	defer m.calls.Done()
	select {
	case m.prefetches <- struct{}{}:
		defer func() { <-m.prefetches }()
	default:
		return kind.Errorf(kind.Unavailable, "prefetch block %s: %d prefetches are under way, which is the most", block, maxPrefetches)
	}
	if err := m.prefetch(ctx, block, ranges, progress); err != nil {
		return fmt.Errorf("prefetch block %s: %w", block, err)
	}
	return nil
}

func (m *Manager) prefetch(ctx context.Context, block string, ranges []Range, progress func(int64)) error {
	if m.o.Cached == nil {
		return kind.Errorf(kind.Unsupported, "nothing here would keep what was read")
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	m.mu.Lock()
	e := m.blocks[block]
	if m.closed || e == nil || len(e.users) == 0 {
		m.mu.Unlock()
		return kind.Errorf(kind.NotFound, "it is not attached")
	}
	if e.prefetches == nil {
		e.prefetches = make(map[*context.CancelCauseFunc]struct{})
	}
	e.prefetches[&cancel] = struct{}{}
	b := e.block
	m.mu.Unlock()
	defer func() {
		m.mu.Lock()
		delete(e.prefetches, &cancel)
		m.mu.Unlock()
	}()
	d, err := m.o.Cached(b)
	if err != nil {
		return err
	}
	// A read may wait for a store that is away; closing the device ends it.
	var once sync.Once
	closeDevice := func() { once.Do(func() { d.Close() }) }
	defer closeDevice()
	stop := context.AfterFunc(ctx, closeDevice)
	defer stop()
	for _, r := range ranges {
		if r.OffsetBytes < 0 || r.LengthBytes < 0 || r.LengthBytes > d.SizeBytes() || r.OffsetBytes > d.SizeBytes()-r.LengthBytes {
			return kind.Errorf(kind.Invalid, "range of %d bytes at %d of %d", r.LengthBytes, r.OffsetBytes, d.SizeBytes())
		}
	}
	err = m.readRanges(ctx, d, ranges, progress)
	if ctx.Err() != nil {
		cause := context.Cause(ctx)
		if kind.Of(cause) == "" {
			cause = kind.Wrap(kind.Canceled, cause)
		}
		return cause
	}
	return err
}

// readRanges reads what each worker takes in its turn, so that the order is kept but for
// what is under way.
func (m *Manager) readRanges(ctx context.Context, d io.ReaderAt, ranges []Range, progress func(int64)) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var read atomic.Int64
	var told sync.Mutex
	pieces := make(chan Range)
	var wg sync.WaitGroup
	for range prefetchReads {
		wg.Go(func() {
			var buffer []byte
			for r := range pieces {
				if buffer == nil {
					buffer = make([]byte, prefetchBytes)
				}
				if err := m.await(ctx); err != nil {
					return
				}
				n, err := d.ReadAt(buffer[:r.LengthBytes], r.OffsetBytes)
				<-m.reads
				if err != nil && !errors.Is(err, io.EOF) {
					cancel(err)
					return
				}
				read.Add(int64(n))
				if progress != nil && told.TryLock() {
					progress(read.Load())
					told.Unlock()
				}
			}
		})
	}
	err := func() error {
		defer wg.Wait()
		defer close(pieces)
		for _, r := range ranges {
			for r.LengthBytes > 0 {
				piece := Range{r.OffsetBytes, min(r.LengthBytes, prefetchBytes)}
				select {
				case pieces <- piece:
				case <-ctx.Done():
					return context.Cause(ctx)
				}
				r.OffsetBytes += piece.LengthBytes
				r.LengthBytes -= piece.LengthBytes
			}
		}
		return nil
	}()
	if err == nil {
		err = context.Cause(ctx) // of the last reads
	}
	if err == nil && progress != nil {
		progress(read.Load())
	}
	return err
}

// await waits until no disk is being shown or taken away, and for its turn among the
// reads.
func (m *Manager) await(ctx context.Context) error {
	for {
		m.mu.Lock()
		idle := m.idle
		m.mu.Unlock()
		if idle == nil {
			break
		}
		select {
		case <-idle:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	select {
	case m.reads <- struct{}{}:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
