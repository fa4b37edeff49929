// Package keylock is locks by name: whoever works on "a" keeps others from "a" and
// nobody from "b". Waiting ends when the waiter's context does.
package keylock

import (
	"context"
	"slices"
	"sync"
)

// Set is a set of named locks. The zero value is ready for use.
type Set struct {
	mu    sync.Mutex
	locks map[string]*lock // guarded by mu: those held or waited for
}

type lock struct {
	refs int           // guarded by Set.mu: holder and waiters
	held chan struct{} // capacity 1: full while held
}

// Lock takes the locks of all names, in their order, so that two callers never wait
// for each other, and returns what lets go of them. It fails only with ctx's error.
func (s *Set) Lock(ctx context.Context, names ...string) (unlock func(), err error) {
	sorted := slices.Compact(slices.Sorted(slices.Values(names)))
	for i, name := range sorted {
		if err := s.lock(ctx, name); err != nil {
			s.unlock(sorted[:i])
			return nil, err
		}
	}
	var once sync.Once
	return func() { once.Do(func() { s.unlock(sorted) }) }, nil
}

func (s *Set) lock(ctx context.Context, name string) error {
	s.mu.Lock()
	if s.locks == nil {
		s.locks = make(map[string]*lock)
	}
	l := s.locks[name]
	if l == nil {
		l = &lock{held: make(chan struct{}, 1)}
		s.locks[name] = l
	}
	l.refs++
	s.mu.Unlock()
	select {
	case l.held <- struct{}{}: // free: a caller that is late already may still have it
		return nil
	default:
	}
	select {
	case l.held <- struct{}{}:
		return nil
	case <-ctx.Done():
		s.drop(name, l)
		return context.Cause(ctx)
	}
}

func (s *Set) unlock(names []string) {
	for _, name := range names {
		s.mu.Lock()
		l := s.locks[name]
		s.mu.Unlock()
		<-l.held
		s.drop(name, l)
	}
}

func (s *Set) drop(name string, l *lock) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if l.refs--; l.refs == 0 {
		delete(s.locks, name)
	}
}
