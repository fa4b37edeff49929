// Package hold keeps the holds of an attacher: who is there, so that what was made for an
// owner lives as long as the owner does.
//
// An owner holds by an open stream. What it holds ends with the stream, but neither with a
// restart of the attacher nor, on a network, with a broken connection: the owner then has the
// grace to hold again. The stores' and the cards' attachers use it. It must not know what is
// held, where that is recorded, or how it is removed: whoever has the set does that.
package hold

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"google.golang.org/grpc"

	attacherv1 "github.com/thaw-project/thaw/api/attacher/v1"
	"github.com/thaw-project/thaw/attacher/rpc"
	"github.com/thaw-project/thaw/kind"
)

// state is where an owner is in its life.
type state int

const (
	// returning: known from before a restart or an interruption; it may hold again.
	returning state = iota
	// live: a stream is open.
	live
	// ending: what it held is being removed.
	ending
)

// owner is one that the set knows.
type owner struct {
	name  string
	state state          // guarded by Set.mu
	node  string         // guarded by Set.mu: whose stream it lives by, "" for one of this machine
	taken chan struct{}  // guarded by Set.mu: of the stream that it lives, or lived, by, nil before the first; closed when another has it
	calls sync.WaitGroup // calls that use the hold; Add under Set.mu while live
	gone  chan struct{}  // closed when an ending owner has left Set.owners
}

// Options says what a Set works with.
type Options struct {
	// Server is who holds are for, as errors call it: "the attacher".
	Server string
	// Grace is how long owners that were interrupted have to hold again.
	Grace time.Duration
	// End removes what an owner held that is gone. It runs in a goroutine of the set, for
	// several owners at once, when no call uses the owner's hold any more; until it returns
	// the owner cannot hold again. ctx ends with Stop. It deals with its failures itself:
	// Forgotten has it called again.
	End    func(ctx context.Context, owner string)
	Logger *slog.Logger
}

// Set is the holds of one attacher. Its methods may be called concurrently, and from within
// End.
type Set struct {
	o Options

	mu      sync.Mutex
	owners  map[string]*owner // guarded by mu: by name
	closing bool              // guarded by mu

	life context.Context // ends with Stop
	end  context.CancelFunc
	own  sync.WaitGroup // the set's goroutines; Add under mu while not closing
}

// New returns a set that knows no owner. Stop it, and Wait.
func New(o Options) *Set {
	s := &Set{o: o, owners: make(map[string]*owner)}
	s.life, s.end = context.WithCancel(context.Background())
	return s
}

// Stop ends the set without the end of any owner: they hold again at the next attacher, which
// knows them by its records.
func (s *Set) Stop() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closing = true
	s.end()
}

// Wait waits, after Stop, until no End runs any more.
func (s *Set) Wait() { s.own.Wait() }

func (s *Set) stopping() error {
	return kind.Errorf(kind.Unavailable, "%s is stopping: hold again when it is back", s.o.Server)
}

// addLocked makes an owner that has no stream yet. The caller has mu locked.
func (s *Set) addLocked(name string) *owner {
	w := &owner{name: name, state: returning, gone: make(chan struct{})}
	s.owners[name] = w
	return w
}

// Expect adds an owner of whom a predecessor left records, and who may hold again.
func (s *Set) Expect(owner string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.owners[owner] == nil {
		s.addLocked(owner)
	}
}

// Absent waits for the grace, from now, and ends the owners that were expected and have not
// held since. It returns early, with false, when the set is stopped.
func (s *Set) Absent() bool {
	if !s.pause() {
		return false
	}
	var absent []string
	s.mu.Lock()
	for _, w := range s.owners {
		if w.state == returning && w.taken == nil { // others have a grace of their own
			absent = append(absent, w.name)
			s.endLocked(w)
		}
	}
	s.mu.Unlock()
	for _, name := range absent {
		s.o.Logger.Info("an owner did not come back, ending its hold", "owner", name)
	}
	return true
}

// pause waits for the grace; it returns false when the set was stopped first.
func (s *Set) pause() bool {
	grace := time.NewTimer(s.o.Grace)
	defer grace.Stop()
	select {
	case <-s.life.Done():
		return false
	case <-grace.C:
		return true
	}
}

// Forgotten has End called for an owner of whom something is left, unless it is known: it may
// still want that, or is ending already.
func (s *Set) Forgotten(owner string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.owners[owner] == nil && !s.closing {
		s.endLocked(s.addLocked(owner))
	}
}

// Serve is the handler of a stream that holds owner: until the stream ends, another of the
// same node has the hold (kind.InUse), or the set is stopped (kind.Unavailable). An owner
// that holds already by another node's stream, or one of this machine, is kind.InUse, also
// while that node has the grace after an interruption.
func (s *Set) Serve(owner string, stream grpc.ServerStreamingServer[attacherv1.HoldResponse]) error {
	ctx := stream.Context()
	node, remote, err := rpc.Node(ctx)
	if err != nil {
		return err
	}
	h, err := s.Begin(ctx, owner, node)
	if err != nil {
		return err
	}
	err = stream.Send(&attacherv1.HoldResponse{})
	if err == nil {
		select {
		case <-s.life.Done():
		case <-h.taken:
			return kind.Errorf(kind.InUse, "owner %s holds by a newer stream of node %s", owner, node)
		case <-ctx.Done():
		}
	}
	if s.life.Err() != nil {
		return s.stopping()
	}
	h.Leave(remote && rpc.Lost(ctx))
	return err
}

// Hold is one stream's hold on its owner.
type Hold struct {
	s     *Set
	w     *owner
	taken chan struct{}
}

// Begin makes owner's hold live for a stream of node ("" for this machine), once an earlier
// one has ended. A live one of the same node it takes over: a node that comes back from an
// interruption may be earlier than the news of its old connection's end.
func (s *Set) Begin(ctx context.Context, owner, node string) (*Hold, error) {
	for {
		s.mu.Lock()
		if s.closing {
			s.mu.Unlock()
			return nil, s.stopping()
		}
		w := s.owners[owner]
		if w == nil {
			w = s.addLocked(owner)
		}
		if w.state == live && node != "" && w.node == node {
			close(w.taken)
			w.state = returning
		}
		switch {
		case w.state == returning && w.taken != nil && w.node != node: // the grace is that node's
			err := kind.Errorf(kind.InUse, "owner %s was interrupted on node %s, which may come back within %s: owners must be unique", owner, w.node, s.o.Grace)
			s.mu.Unlock()
			return nil, err
		case w.state == returning:
			h := &Hold{s: s, w: w, taken: make(chan struct{})}
			w.state, w.node, w.taken = live, node, h.taken
			s.mu.Unlock()
			return h, nil
		case w.state == live:
			s.mu.Unlock()
			return nil, kind.Errorf(kind.InUse, "owner %s holds already: owners must be unique", owner)
		}
		s.mu.Unlock()
		select {
		case <-w.gone:
		case <-s.life.Done():
			return nil, s.stopping()
		case <-ctx.Done():
			return nil, fmt.Errorf("wait for the end of owner %s's earlier hold: %w", owner, context.Cause(ctx))
		}
	}
}

// Taken is closed when another stream has taken the hold over.
func (h *Hold) Taken() <-chan struct{} { return h.taken }

// Gone is closed when the owner has ended.
func (h *Hold) Gone() <-chan struct{} { return h.w.gone }

// Leave is the end of the stream, which ends the owner unless another stream has the hold by
// now: at once, or, when the stream was lost with its connection, after the grace.
func (h *Hold) Leave(lost bool) {
	s, w := h.s, h.w
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closing || w.state != live || w.taken != h.taken {
		return
	}
	if !lost {
		s.endLocked(w)
		return
	}
	w.state = returning
	s.own.Go(func() {
		if !s.pause() {
			return
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		if w.state == returning && w.taken == h.taken { // nobody has held since
			s.o.Logger.Info("an owner whose connection broke did not come back, ending its hold", "owner", w.name)
			s.endLocked(w)
		}
	})
}

// endLocked ends an owner, in a goroutine of the set. The caller has mu locked and knows the
// owner's state.
func (s *Set) endLocked(w *owner) {
	if s.closing {
		return
	}
	w.state = ending
	s.own.Go(func() {
		w.calls.Wait()
		s.o.End(s.life, w.name)
		s.mu.Lock()
		delete(s.owners, w.name)
		s.mu.Unlock()
		close(w.gone)
	})
}

// Use keeps owner from ending until the returned function is called. It is kind.InUse when
// the owner does not hold; the empty owner needs no hold.
func (s *Set) Use(owner string) (done func(), err error) {
	if owner == "" {
		return func() {}, nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	w := s.owners[owner]
	if w == nil || w.state != live {
		return nil, kind.Errorf(kind.InUse, "owner %s holds nothing: open Hold and wait for its first message", owner)
	}
	w.calls.Add(1)
	return w.calls.Done, nil
}

// Alive tells whether owner may still want what it left.
func (s *Set) Alive(owner string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	w := s.owners[owner]
	return w != nil && w.state != ending
}

// Returning tells whether owner was interrupted and has the grace to hold again.
func (s *Set) Returning(owner string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	w := s.owners[owner]
	return w != nil && w.state == returning
}
