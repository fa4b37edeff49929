// Package functiontest holds implementations of opi.Functions to one behaviour, and has one
// that keeps functions in memory, for tests of what is above them.
//
// What relies on the behaviour is package attacher/card. The package must not know how a
// function becomes a controller.
package functiontest

import (
	"context"
	"errors"
	"slices"
	"sync"
	"testing"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/opi"
)

// Subject is an implementation and what it may be tried with.
type Subject struct {
	Functions opi.Functions
	// NQNs are two subsystems of the target, each with one nvmeNamespace, which no
	// function shows.
	NQNs [2]string
	// Have are two functions that the card has and that show nothing, Lacks is one that it
	// does not have.
	Have  [2]opi.Function
	Lacks opi.Function
	// Lose makes the target below lose the subsystem of NQNs[0] and have it again, as a
	// restart does, while the functions stay as they are; nil where functions are lost too.
	Lose func()
}

// Run tries what Functions promises. make is called once for each part.
func Run(t *testing.T, make func(t *testing.T) Subject) {
	parts := []struct {
		name string
		run  func(*testing.T, Subject)
	}{
		{"Plug", plug}, {"Refused", refused}, {"Two", two}, {"Again", again}, {"Lost", lost},
	}
	for _, p := range parts {
		t.Run(p.name, func(t *testing.T) { p.run(t, make(t)) })
	}
}

func plugged(t *testing.T, s Subject, nqn string, want ...opi.Function) {
	t.Helper()
	have, err := s.Functions.Plugged(t.Context(), nqn)
	if err != nil {
		t.Fatal(err)
	}
	slices.SortFunc(have, func(a, b opi.Function) int { return slices.Compare(words(a), words(b)) })
	slices.SortFunc(want, func(a, b opi.Function) int { return slices.Compare(words(a), words(b)) })
	if !slices.Equal(have, want) {
		t.Fatalf("%s is shown by %v, want %v", nqn, have, want)
	}
}

func words(f opi.Function) []uint16 { return []uint16{f.Port, f.Physical, f.Virtual} }

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func want(t *testing.T, k kind.Kind, err error) {
	t.Helper()
	if !errors.Is(err, k) {
		t.Fatalf("%v, want %s", err, k)
	}
}

// plug is the life of a controller; each call may be repeated.
func plug(t *testing.T, s Subject) {
	plugged(t, s, s.NQNs[0])
	for range 2 {
		must(t, s.Functions.Plug(t.Context(), s.NQNs[0], s.Have[0]))
		plugged(t, s, s.NQNs[0], s.Have[0])
	}
	plugged(t, s, s.NQNs[1])
	must(t, s.Functions.Unplug(t.Context(), s.NQNs[0], s.Have[0]))
	plugged(t, s, s.NQNs[0])
	want(t, kind.NotFound, s.Functions.Unplug(t.Context(), s.NQNs[0], s.Have[0]))
}

// refused is what does not go, and changes nothing.
func refused(t *testing.T, s Subject) {
	want(t, kind.NotFound, s.Functions.Plug(t.Context(), s.NQNs[0], s.Lacks))
	must(t, s.Functions.Plug(t.Context(), s.NQNs[0], s.Have[0]))
	want(t, kind.InUse, s.Functions.Plug(t.Context(), s.NQNs[1], s.Have[0]))
	want(t, kind.NotFound, s.Functions.Unplug(t.Context(), s.NQNs[1], s.Have[0]))
	want(t, kind.NotFound, s.Functions.Unplug(t.Context(), s.NQNs[0], s.Have[1]))
	plugged(t, s, s.NQNs[0], s.Have[0])
	plugged(t, s, s.NQNs[1])
	must(t, s.Functions.Unplug(t.Context(), s.NQNs[0], s.Have[0]))
}

// two are shown side by side, plugged at the same time.
func two(t *testing.T, s Subject) {
	var errs [2]error
	var wg sync.WaitGroup
	for i := range errs {
		wg.Go(func() { errs[i] = s.Functions.Plug(t.Context(), s.NQNs[i], s.Have[i]) })
	}
	wg.Wait()
	must(t, errors.Join(errs[:]...))
	plugged(t, s, s.NQNs[0], s.Have[0])
	plugged(t, s, s.NQNs[1], s.Have[1])
	must(t, s.Functions.Unplug(t.Context(), s.NQNs[0], s.Have[0]))
	plugged(t, s, s.NQNs[1], s.Have[1])
	must(t, s.Functions.Unplug(t.Context(), s.NQNs[1], s.Have[1]))
}

// again is another subsystem on a function that was given back.
func again(t *testing.T, s Subject) {
	for _, nqn := range []string{s.NQNs[0], s.NQNs[1], s.NQNs[0]} {
		must(t, s.Functions.Plug(t.Context(), nqn, s.Have[0]))
		plugged(t, s, nqn, s.Have[0])
		must(t, s.Functions.Unplug(t.Context(), nqn, s.Have[0]))
	}
	plugged(t, s, s.NQNs[0])
	plugged(t, s, s.NQNs[1])
}

// lost is a function whose target was restarted: it goes on showing the subsystem, and to
// plug it again makes anew what is missing below.
func lost(t *testing.T, s Subject) {
	if s.Lose == nil {
		t.Skip("functions of this card are lost with its target: what plugs them does so again")
	}
	must(t, s.Functions.Plug(t.Context(), s.NQNs[0], s.Have[0]))
	s.Lose()
	must(t, s.Functions.Plug(t.Context(), s.NQNs[0], s.Have[0]))
	plugged(t, s, s.NQNs[0], s.Have[0])
	must(t, s.Functions.Unplug(t.Context(), s.NQNs[0], s.Have[0]))
	plugged(t, s, s.NQNs[0])
}

// Memory is a card whose functions are in memory. Physical functions 0 to Physical-1 of
// port 0 exist, with virtual functions 0 to Virtual each.
type Memory struct {
	Physical, Virtual uint16
	// Check, when not nil, is asked before a subsystem is plugged: its error is the answer.
	Check func(ctx context.Context, nqn string) error
	// Busy, when not nil, is asked before a function is unplugged: its error is the answer.
	Busy func(f opi.Function) error

	mu    sync.Mutex
	shown map[opi.Function]string // guarded by mu
	log   []string                // guarded by mu
}

var _ opi.Functions = (*Memory)(nil)

// Plug implements opi.Functions.
func (m *Memory) Plug(ctx context.Context, nqn string, f opi.Function) error {
	if f.Port != 0 || f.Physical >= m.Physical || f.Virtual > m.Virtual {
		return kind.Errorf(kind.NotFound, "the card has no function %s", f)
	}
	if m.Check != nil {
		if err := m.Check(ctx, nqn); err != nil {
			return err
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	switch have, ok := m.shown[f]; {
	case ok && have != nqn:
		return kind.Errorf(kind.InUse, "function %s shows subsystem %s", f, have)
	case ok:
		return nil
	}
	if m.shown == nil {
		m.shown = make(map[opi.Function]string)
	}
	m.shown[f] = nqn
	m.log = append(m.log, "plug "+f.String()+" "+nqn)
	return nil
}

// Unplug implements opi.Functions.
func (m *Memory) Unplug(_ context.Context, nqn string, f opi.Function) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.shown[f] != nqn {
		return kind.Errorf(kind.NotFound, "function %s does not show subsystem %s", f, nqn)
	}
	if m.Busy != nil {
		if err := m.Busy(f); err != nil {
			return err
		}
	}
	delete(m.shown, f)
	m.log = append(m.log, "unplug "+f.String()+" "+nqn)
	return nil
}

// Plugged implements opi.Functions.
func (m *Memory) Plugged(_ context.Context, nqn string) (list []opi.Function, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for f, have := range m.shown {
		if have == nqn {
			list = append(list, f)
		}
	}
	return list, nil
}

// Shown is what functions show.
func (m *Memory) Shown() map[opi.Function]string {
	m.mu.Lock()
	defer m.mu.Unlock()
	shown := make(map[opi.Function]string, len(m.shown))
	for f, nqn := range m.shown {
		shown[f] = nqn
	}
	return shown
}

// Log is what was plugged and unplugged, in order: "plug pcie:0:1:2 NQN".
func (m *Memory) Log() []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Clone(m.log)
}

// Reset makes all functions show nothing, as a card whose SPDK is restarted does.
func (m *Memory) Reset() {
	m.mu.Lock()
	defer m.mu.Unlock()
	clear(m.shown)
}
