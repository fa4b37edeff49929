package hold

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"

	attacherv1 "github.com/thaw-project/thaw/api/attacher/v1"
	"github.com/thaw-project/thaw/attacher/rpc"
	"github.com/thaw-project/thaw/kind"
)

const grace = 7 * time.Second

// ends is the owners that ended, in order.
type ends struct {
	mu    sync.Mutex
	names []string
}

func (e *ends) end(_ context.Context, owner string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.names = append(e.names, owner)
}

// want waits until nothing goes on, and checks who ended since the last time.
func (e *ends) want(t *testing.T, names ...string) {
	t.Helper()
	synctest.Wait()
	e.mu.Lock()
	defer e.mu.Unlock()
	slices.Sort(e.names)
	if !slices.Equal(e.names, names) {
		t.Errorf("ended are %q, want %q", e.names, names)
	}
	e.names = nil
}

func set(t *testing.T, end func(context.Context, string)) *Set {
	s := New(Options{Server: "the attacher", Grace: grace, End: end, Logger: slog.New(slog.DiscardHandler)})
	t.Cleanup(func() { s.Stop(); s.Wait() })
	return s
}

func begin(t *testing.T, s *Set, owner, node string) *Hold {
	t.Helper()
	h, err := s.Begin(t.Context(), owner, node)
	if err != nil {
		t.Fatal(err)
	}
	return h
}

func wantKind(t *testing.T, err error, want kind.Kind) {
	t.Helper()
	if kind.Of(err) != want {
		t.Errorf("%v, want kind %s", err, want)
	}
}

func TestBrokenConnection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := &ends{}
		s := set(t, e.end)
		first := begin(t, s, "far", "host1")
		_, err := s.Begin(t.Context(), "far", "host2")
		wantKind(t, err, kind.InUse)
		// It is back before its old connection is known to be broken.
		second := begin(t, s, "far", "host1")
		<-first.Taken()
		first.Leave(false)
		first.Leave(true)
		time.Sleep(2 * grace)
		e.want(t)
		// It is back within the grace, and each interruption has a grace of its own.
		second.Leave(true)
		time.Sleep(grace / 2)
		begin(t, s, "far", "host1").Leave(true)
		time.Sleep(grace - 1)
		if !s.Alive("far") || !s.Returning("far") {
			t.Error("it may not come back any more")
		}
		_, err = s.Use("far")
		wantKind(t, err, kind.InUse)
		third := begin(t, s, "far", "host1")
		time.Sleep(2 * grace)
		e.want(t)
		third.Leave(true)
		for _, other := range []string{"host2", ""} { // the grace is host1's
			_, err = s.Begin(t.Context(), "far", other)
			wantKind(t, err, kind.InUse)
		}
		time.Sleep(grace - 1)
		e.want(t)
		time.Sleep(time.Nanosecond)
		e.want(t, "far")
		if s.Alive("far") {
			t.Error("it is alive after its end")
		}
		<-third.Gone()
		// Owners of this machine are told apart by nothing: there is one of each.
		begin(t, s, "near", "")
		_, err = s.Begin(t.Context(), "near", "")
		wantKind(t, err, kind.InUse)
	})
}

func TestRestart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := &ends{}
		s := set(t, e.end)
		for _, owner := range []string{"back", "gone", "lost"} {
			s.Expect(owner)
			s.Expect(owner)
		}
		done := make(chan bool)
		go func() { done <- s.Absent() }()
		begin(t, s, "back", "")
		s.Expect("back") // it is live, and stays so
		time.Sleep(grace - 1)
		begin(t, s, "lost", "host1").Leave(true)
		e.want(t)
		time.Sleep(time.Nanosecond)
		if !<-done {
			t.Error("the set was not stopped")
		}
		e.want(t, "gone")
		time.Sleep(grace - 2)
		e.want(t)
		time.Sleep(time.Nanosecond)
		e.want(t, "lost")
		s.Forgotten("back")
		s.Forgotten("gone")
		e.want(t, "gone")
	})
}

// TestEnd is that it waits for calls, and the next hold for it.
func TestEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, removing := &ends{}, make(chan struct{})
		s := set(t, func(ctx context.Context, owner string) {
			e.end(ctx, owner)
			<-removing
		})
		h := begin(t, s, "o", "")
		done, err := s.Use("o")
		if err != nil {
			t.Fatal(err)
		}
		h.Leave(false)
		if s.Alive("o") || s.Returning("o") {
			t.Error("an owner that left is alive")
		}
		_, err = s.Use("o")
		wantKind(t, err, kind.InUse)
		e.want(t)
		done()
		e.want(t, "o")
		s.Forgotten("o")
		ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
		defer cancel()
		if _, err := s.Begin(ctx, "o", ""); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("a hold did not wait for the one before: %v", err)
		}
		close(removing)
		begin(t, s, "o", "")
		<-h.Gone()
		e.want(t)
		if done, err := s.Use(""); err != nil {
			t.Error(err)
		} else {
			done()
		}
		if s.Alive("") {
			t.Error("nobody is an owner")
		}
	})
}

// TestStop ends no owner, and whoever waits.
func TestStop(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := &ends{}
		s := set(t, func(ctx context.Context, owner string) {
			e.end(ctx, owner)
			<-ctx.Done()
		})
		s.Expect("absent")
		live, lost := begin(t, s, "live", "host1"), begin(t, s, "lost", "host1")
		lost.Leave(true)
		begin(t, s, "ending", "").Leave(false)
		e.want(t, "ending")
		served, absent, waited := make(chan error), make(chan bool), make(chan error)
		stream := rpc.LocalStream(t.Context(), &attacherv1.HoldRequest{Owner: "served"}, func(r *attacherv1.HoldRequest, stream grpc.ServerStreamingServer[attacherv1.HoldResponse]) error {
			err := s.Serve(r.GetOwner(), stream)
			served <- err
			return err
		})
		if _, err := stream.Recv(); err != nil {
			t.Fatal(err)
		}
		go func() { absent <- s.Absent() }()
		go func() {
			_, err := s.Begin(t.Context(), "ending", "")
			waited <- err
		}()
		synctest.Wait()
		s.Stop()
		wantKind(t, <-served, kind.Unavailable)
		_, err := stream.Recv()
		wantKind(t, err, kind.Unavailable)
		wantKind(t, <-waited, kind.Unavailable)
		if <-absent {
			t.Error("owners were ended while the set stopped")
		}
		live.Leave(false)
		s.Forgotten("forgotten")
		_, err = s.Begin(t.Context(), "late", "")
		wantKind(t, err, kind.Unavailable)
		s.Wait()
		time.Sleep(2 * grace)
		e.want(t)
	})
}

// TestServe is a stream of this machine: its end is the owner's.
func TestServe(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := &ends{}
		s := set(t, e.end)
		serve := func(r *attacherv1.HoldRequest, stream grpc.ServerStreamingServer[attacherv1.HoldResponse]) error {
			return s.Serve(r.GetOwner(), stream)
		}
		ctx, cancel := context.WithCancel(t.Context())
		request := &attacherv1.HoldRequest{Owner: "o"}
		stream := rpc.LocalStream(ctx, request, serve)
		if _, err := stream.Recv(); err != nil {
			t.Fatal(err)
		}
		_, err := rpc.LocalStream(t.Context(), request, serve).Recv()
		wantKind(t, err, kind.InUse)
		if done, err := s.Use("o"); err != nil {
			t.Error(err)
		} else {
			done()
		}
		cancel()
		if _, err := stream.Recv(); !errors.Is(err, context.Canceled) || errors.Is(err, io.EOF) {
			t.Errorf("the caller's end is %v", err)
		}
		e.want(t, "o")
	})
}

// TestConcurrent has many streams come, go and break, with calls: no call of an owner goes
// on while what it held is removed, and no two removals of one owner are at the same time.
func TestConcurrent(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	owners := []string{"a", "b", "c"}
	var calls, removals [3]atomic.Int64
	var ended atomic.Int64
	s := New(Options{Server: "the attacher", Grace: time.Millisecond, Logger: slog.New(slog.DiscardHandler), End: func(_ context.Context, owner string) {
		i := slices.Index(owners, owner)
		if removals[i].Add(1) != 1 {
			t.Errorf("%s is removed twice at once", owner)
		}
		time.Sleep(50 * time.Microsecond)
		if n := calls[i].Load(); n != 0 {
			t.Errorf("%d calls of %s while what it held is removed", n, owner)
		}
		removals[i].Add(-1)
		ended.Add(1)
	}})
	var workers sync.WaitGroup
	for w := range 8 {
		workers.Go(func() {
			rng := rand.New(rand.NewPCG(seed, uint64(w)))
			for range 500 {
				i := rng.IntN(len(owners))
				switch rng.IntN(4) {
				case 0:
					node := []string{"", "n", "m"}[rng.IntN(3)]
					h, err := s.Begin(t.Context(), owners[i], node)
					if err != nil {
						if kind.Of(err) != kind.InUse {
							t.Error(err)
						}
						continue
					}
					time.Sleep(time.Duration(rng.IntN(200)) * time.Microsecond)
					h.Leave(node != "" && rng.IntN(2) == 0)
				case 1:
					s.Forgotten(owners[i])
				default:
					done, err := s.Use(owners[i])
					if err != nil {
						continue
					}
					calls[i].Add(1)
					time.Sleep(time.Duration(rng.IntN(100)) * time.Microsecond)
					calls[i].Add(-1)
					done()
				}
			}
		})
	}
	workers.Wait()
	for deadline := time.Now().Add(10 * time.Second); slices.ContainsFunc(owners, s.Alive); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("an owner outlives all its streams")
		}
	}
	s.Stop()
	s.Wait()
	if ended.Load() == 0 {
		t.Error("nobody ended")
	}
}
