// Package backendtest is the contract of lvols and exports as a test: what every
// attacher.Backend and attacher.Exporter must do, whatever stores the bytes.
//
// A backend's own test hands Run a Factory:
//
//	func TestConformance(t *testing.T) {
//		backendtest.Run(t, func(t *testing.T) *backendtest.Fixture {
//			s := start(t) // an empty store; its end is t.Cleanup's
//			f := &backendtest.Fixture{Backend: s.backend, Exporter: s.exporter, UnitBytes: 1 << 20}
//			f.Restart = func(t *testing.T) { s.restart(t); f.Backend, f.Exporter = s.backend, s.exporter }
//			return f
//		})
//	}
//
// What a backend cannot do it says with kind.Unsupported, and only where the contract
// leaves that open: Map, Check, Decouple, and SetReadOnly back to writable. An lvol that
// can be written may be shown at one place at a time only (an OpenLvol, or one node): the
// second is kind.InUse then.
//
// The package knows the interfaces, bdev.Device and how a node opens an export over
// NVMe/TCP. It must not know any backend.
package backendtest

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/thaw-project/thaw/attacher"
	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/lvol"
	"github.com/thaw-project/thaw/target/bdev"
)

// Fixture is a store under test.
type Fixture struct {
	// Backend is open and has no lvols.
	Backend attacher.Backend
	// Exporter exports the lvols of Backend. Restore was not called.
	Exporter attacher.Exporter

	// Restart ends the process that has Backend and Exporter, as if killed, and starts the
	// next on the same store: it sets Backend and Exporter anew, Restore not called. What
	// was acknowledged before is there; handles and connections are gone. The exporter
	// serves at the same addresses.
	Restart func(t *testing.T)

	// Open opens an export as node does. The device is of its own: closing it ends all
	// that was opened. nil is OpenNVMe.
	Open func(ctx context.Context, node string, x attacher.Exported) (bdev.Device, error)

	// Stranger makes something in the same place that is not the store's: a subsystem,
	// an image. unharmed fails the test unless it is as it was. nil where nobody else can
	// have anything.
	Stranger func(t *testing.T) (unharmed func(t *testing.T))

	// UnitBytes: sizes are multiples of it, others kind.Invalid. At most 4 MiB.
	UnitBytes int64
	// CapacityBytes is what all lvols can hold, at most 1 GiB; 0 where that is not known
	// or not to be used up.
	CapacityBytes int64
}

// Factory makes a Fixture, each time a fresh one, and cleans up with t.Cleanup.
type Factory func(t *testing.T) *Fixture

// Run runs the suite. Every test has a Fixture of its own.
func Run(t *testing.T, factory Factory) {
	tests := []struct {
		name string
		run  func(*suite)
	}{
		{"create", (*suite).create},
		{"names", (*suite).names},
		{"sizes", (*suite).sizes},
		{"snapshot and clone", (*suite).family},
		{"read-only", (*suite).readOnly},
		{"delete", (*suite).deletion},
		{"rename", (*suite).rename},
		{"resize", (*suite).resize},
		{"inflate", (*suite).inflate},
		{"decouple", (*suite).decouple},
		{"open", (*suite).open},
		{"random io", (*suite).randomIO},
		{"chain", (*suite).chain},
		{"snapshot under writes", (*suite).snapshotUnderWrites},
		{"space", (*suite).space},
		{"map", (*suite).blockMap},
		{"concurrent", (*suite).concurrent},
		{"restart", (*suite).restart},

		{"export", (*suite).export},
		{"export writable", (*suite).exportWritable},
		{"export holds", (*suite).exportHolds},
		{"export access", (*suite).exportAccess},
		{"export withdrawn", (*suite).exportWithdrawn},
		{"export concurrent", (*suite).exportConcurrent},
		{"export restart", (*suite).exportRestart},
		{"export orphans", (*suite).exportOrphans},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			f := factory(t)
			if f.UnitBytes <= 0 || f.UnitBytes > 4<<20 {
				t.Fatalf("UnitBytes %d is not in 1 to 4 MiB", f.UnitBytes)
			}
			if f.Open == nil {
				f.Open = OpenNVMe
			}
			tt.run(&suite{t: t, f: f, unit: f.UnitBytes, size: (4<<20 + f.UnitBytes - 1) / f.UnitBytes * f.UnitBytes})
		})
	}
}

// suite is a test with its fixture.
type suite struct {
	t    *testing.T
	f    *Fixture
	unit int64
	size int64 // of most lvols: about 4 MiB
}

func (s *suite) b() attacher.Backend { return s.f.Backend }

func (s *suite) ok(what string, err error) {
	s.t.Helper()
	if err != nil {
		s.t.Fatalf("%s: %v (%s)", what, err, kind.Of(err))
	}
}

// is checks the kind of an error.
func (s *suite) is(what string, err error, kinds ...kind.Kind) {
	s.t.Helper()
	for _, k := range kinds {
		if errors.Is(err, k) {
			return
		}
	}
	s.t.Errorf("%s: %v (%s), want %v", what, err, kind.Of(err), kinds)
}

func (s *suite) mustCreate(name string, size int64) lvol.Info {
	s.t.Helper()
	i, err := s.b().Create(name, size)
	s.ok("create "+name, err)
	return i
}

func (s *suite) mustSnapshot(name, snapshot string) lvol.Info {
	s.t.Helper()
	i, err := s.b().Snapshot(name, snapshot)
	s.ok("snapshot "+name+" as "+snapshot, err)
	return i
}

func (s *suite) mustClone(snapshot, name string) lvol.Info {
	s.t.Helper()
	i, err := s.b().Clone(snapshot, name)
	s.ok("clone "+snapshot+" as "+name, err)
	return i
}

func (s *suite) mustReadOnly(name string) lvol.Info {
	s.t.Helper()
	i, err := s.b().SetReadOnly(name, true)
	s.ok("set read-only "+name, err)
	return i
}

func (s *suite) mustDelete(name string) {
	s.t.Helper()
	s.ok("delete "+name, s.b().Delete(name))
}

func (s *suite) get(name string) lvol.Info {
	s.t.Helper()
	i, err := s.b().Get(name)
	s.ok("get "+name, err)
	return i
}

func (s *suite) absent(name string) {
	s.t.Helper()
	_, err := s.b().Get(name)
	s.is("get "+name, err, kind.NotFound)
}

func (s *suite) mustOpen(name string, readOnly bool) bdev.Device {
	s.t.Helper()
	d, err := s.b().OpenLvol(name, readOnly)
	s.ok("open "+name, err)
	return d
}

func (s *suite) close(d bdev.Device) {
	s.t.Helper()
	s.ok("close", d.Close())
}

// fill writes random bytes all over an lvol and returns them.
func (s *suite) fill(name string, seed uint64) content {
	s.t.Helper()
	d := s.mustOpen(name, false)
	c := newContent(d.SizeBytes())
	c.write(s.t, d, randomBytes(seed, d.SizeBytes()), 0)
	s.ok("flush "+name, d.Flush())
	s.close(d)
	return c
}

// holds checks what an lvol holds.
func (s *suite) holds(name string, c content) {
	s.t.Helper()
	d := s.mustOpen(name, true)
	defer s.close(d)
	c.check(s.t, name, d)
}

// eventually waits for what happens by itself.
func (s *suite) eventually(what string, f func() error) {
	s.t.Helper()
	var err error
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		if err = f(); err == nil {
			return
		}
	}
	s.t.Fatalf("%s: %v", what, err)
}

func nameOf(prefix string, i int) string { return fmt.Sprintf("%s-%d", prefix, i) }
