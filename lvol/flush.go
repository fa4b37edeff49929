package lvol

import (
	"cmp"
	"fmt"
	"slices"
	"sync"
	"time"

	"go.etcd.io/bbolt"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/redo"
)

// closing says which open marks a flush takes away beyond those of idle pages.
type closing struct {
	all   bool
	delta *delta
}

var closeAll = closing{all: true}

// Flush is a barrier: every write, discard and zeroing of any lvol that returned
// before the call survives a power loss once it returns nil.
func (s *Store) Flush() error {
	if err := s.failure(); err != nil {
		return err
	}
	if err := s.flushFor(closing{}); err != nil {
		return fmt.Errorf("flush pool %s: %w", s.o.Dir, err)
	}
	return nil
}

// flushFor flushes, or waits for a flush that captured after the call.
func (s *Store) flushFor(c closing) error {
	before := s.captures.Load()
	s.flushMu.Lock()
	defer s.flushMu.Unlock()
	if c == (closing{}) && s.captures.Load() > before {
		return s.lastFlush
	}
	return s.flushLocked(c)
}

// capture is what one flush makes durable.
type capture struct {
	pages   []capturedPage
	marks   []*page // become open with this commit
	closed  []*page // stop being open with this commit
	freed   []extent
	seq     uint64
	segment redo.Segment
	gap     bool
}

type capturedPage struct {
	page  *page
	value []byte
}

func (s *Store) flushLocked(c closing) (err error) {
	defer func() { s.lastFlush = err }()
	if err := s.failure(); err != nil {
		return err
	}
	captured, err := s.captureLocked(c)
	if err != nil || captured == nil {
		return err
	}
	if err := s.dev.Sync(); err != nil {
		s.restore(captured)
		s.fail(err)
		return err
	}
	err = s.update(func(tx *bbolt.Tx) error {
		for _, p := range captured.pages {
			if err := putPage(tx, p.page.delta.id, p.page.index, p.value); err != nil {
				return err
			}
		}
		for _, pg := range captured.marks {
			if err := putMark(tx, pg.delta.id, pg.index); err != nil {
				return err
			}
		}
		for _, pg := range captured.closed {
			if err := deleteMark(tx, pg.delta.id, pg.index); err != nil {
				return err
			}
		}
		return putPool64(tx, keyCheckpoint, captured.seq)
	})
	if err != nil {
		s.restore(captured)
		return err
	}
	s.openCount.Store(int64(len(s.openPages)))
	if err := s.redo.Release(captured.segment); err != nil {
		// Harmless: the checkpoint keeps its records from being replayed.
		s.log.Warn("lvol redo segment not removed", "dir", s.o.Dir, "err", err)
	}
	s.giveBack(captured.freed)
	s.pendCount.Add(-int64(extentClusters(captured.freed)))
	s.ball.refill()
	return nil
}

// captureLocked takes, at one instant, everything that a flush is to make durable,
// and starts a new redo segment. It returns nil when there is nothing. The caller
// holds flushMu.
func (s *Store) captureLocked(c closing) (*capture, error) {
	s.commit.Lock()
	defer s.commit.Unlock()
	s.captures.Add(1)
	s.dirtyMu.Lock()
	dirty, pending := s.dirty, s.pending
	s.dirtyMu.Unlock()
	out := &capture{seq: s.seq.Load(), gap: s.redoGap.Load()}
	// Over the bound, busy pages are closed too: what they hold becomes durable
	// with this very flush, and their writers mark them open again.
	tight := len(s.openPages) > s.o.MaxOpenPages
	for pg := range s.openPages {
		if pg.inflight.Load() == 0 && (!pg.dirty.Load() || tight || c.all || c.delta == pg.delta) {
			out.closed = append(out.closed, pg)
		}
	}
	if len(dirty) == 0 && len(pending) == 0 && len(out.closed) == 0 && !out.gap {
		return nil, nil
	}
	segment, err := s.redo.Rotate()
	if kind.Of(err) == kind.NoSpace && s.ball.release() {
		segment, err = s.redo.Rotate()
	}
	if err != nil {
		return nil, err
	}
	out.segment = segment
	s.redoGap.Store(false)
	s.dirtyMu.Lock()
	s.dirty, s.pending = nil, nil
	s.dirtyMu.Unlock()
	s.dirtyCount.Store(0)
	out.freed = pending

	slices.SortFunc(dirty, func(a, b *page) int { // bbolt likes its keys in order
		return cmp.Or(cmp.Compare(a.delta.id, b.delta.id), cmp.Compare(a.index, b.index))
	})
	var arena []byte
	ends := make([]int, 0, len(dirty))
	for _, pg := range dirty {
		pg.dirty.Store(false)
		if pg.delta.gone {
			continue
		}
		arena = s.appendPage(arena, pg)
		ends = append(ends, len(arena))
		out.pages = append(out.pages, capturedPage{page: pg})
		for i := range pg.entries {
			if e := pg.load(i); e.own() {
				pg.store(i, e|durableBit)
			}
		}
		// An overwrite in place is under way that needed no mark because its
		// cluster was not durable; with this commit it is.
		if pg.inflight.Load() > 0 && !pg.open.Load() {
			out.marks = append(out.marks, pg)
			pg.open.Store(true)
			s.openPages[pg] = struct{}{}
		}
	}
	start := 0
	for i, end := range ends {
		out.pages[i].value = arena[start:end:end]
		start = end
	}
	for _, pg := range out.closed {
		pg.open.Store(false)
		delete(s.openPages, pg)
	}
	return out, nil
}

// restore puts back what a failed flush had captured. Whether its commit reached the
// disk may be unknown, so no page counts as open, while every mark stays listed to
// be deleted later; entries stay marked durable. Both only cost a mark too many.
func (s *Store) restore(c *capture) {
	s.commit.Lock()
	defer s.commit.Unlock()
	for _, p := range c.pages {
		s.markDirty(p.page)
	}
	for _, pg := range append(c.marks, c.closed...) {
		pg.open.Store(false)
		s.openPages[pg] = struct{}{}
	}
	s.dirtyMu.Lock()
	s.pending = append(c.freed, s.pending...)
	s.dirtyMu.Unlock()
	if c.gap {
		s.redoGap.Store(true)
	}
}

// markDirty queues pg for the next flush. The caller holds commit, shared or not.
func (s *Store) markDirty(pg *page) {
	if pg.dirty.Load() || !pg.dirty.CompareAndSwap(false, true) {
		return
	}
	s.dirtyMu.Lock()
	s.dirty = append(s.dirty, pg)
	s.dirtyMu.Unlock()
	if n := s.dirtyCount.Add(1); s.flusher != nil && n >= int64(s.o.MaxDirtyPages/2) {
		s.flusher.kick()
	}
}

// giveBack returns clusters that no durable metadata names any more: to the file
// system below first, so that they read as zeros when they are taken again.
func (s *Store) giveBack(list []extent) {
	zeroes := s.dev.ZeroesOnPunch()
	for _, x := range list {
		x := []extent{x}
		if len(s.alloc.shared) > 0 {
			x = s.alloc.withoutShared(x[0])
		}
		for _, y := range x {
			err := s.dev.Punch(int64(y.start)<<s.clusterShift, int64(y.n)<<s.clusterShift)
			if err != nil {
				s.log.Warn("lvol clusters not punched", "dir", s.o.Dir, "first", y.start, "count", y.n, "err", err)
			}
			s.alloc.release([]extent{y}, zeroes && err == nil)
		}
	}
}

// markOpen durably marks pg open, so that a cluster in it can be overwritten in
// place. Callers that come together share one commit.
func (s *Store) markOpen(pg *page) error {
	s.markMu.Lock()
	s.marks = append(s.marks, pg)
	s.markMu.Unlock()
	s.flushMu.Lock()
	defer s.flushMu.Unlock()
	s.markMu.Lock()
	batch := s.marks
	s.marks = nil
	s.markMu.Unlock()
	if pg.open.Load() && len(batch) == 0 {
		return nil
	}
	if len(batch) == 0 {
		batch = []*page{pg} // the one who took ours failed
	}
	if err := s.failure(); err != nil {
		return err
	}
	if len(s.openPages)+len(batch) > s.o.MaxOpenPages {
		if err := s.flushLocked(closeAll); err != nil {
			return err
		}
	}
	err := s.update(func(tx *bbolt.Tx) error {
		for _, pg := range batch {
			if pg.delta.gone {
				continue
			}
			if err := putMark(tx, pg.delta.id, pg.index); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	for _, pg := range batch {
		if !pg.delta.gone {
			pg.open.Store(true)
			s.openPages[pg] = struct{}{}
		}
	}
	s.openCount.Store(int64(len(s.openPages)))
	return nil
}

// flusher flushes in the background. It is owned by the store, whose Close stops it
// and waits.
type flusher struct {
	wake chan struct{} // of one: more kicks than that mean the same
	quit chan struct{}
	done sync.WaitGroup
}

func (s *Store) startFlusher() {
	f := &flusher{wake: make(chan struct{}, 1), quit: make(chan struct{})}
	s.flusher = f
	f.done.Go(func() {
		tick := time.NewTicker(s.o.FlushInterval)
		defer tick.Stop()
		for {
			select {
			case <-f.quit:
				return
			case <-tick.C:
			case <-f.wake:
			}
			if s.failure() != nil {
				continue
			}
			if err := s.flushFor(closing{}); err != nil {
				s.log.Warn("lvol background flush", "dir", s.o.Dir, "err", err)
			}
		}
	})
}

func (f *flusher) kick() {
	select {
	case f.wake <- struct{}{}:
	default:
	}
}

func (f *flusher) stop() {
	close(f.quit)
	f.done.Wait()
}
