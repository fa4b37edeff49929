package fabrics

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/node/present"
	"github.com/thaw-project/thaw/node/present/runstate"
)

func TestPresentAndWithdraw(t *testing.T) {
	defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
	ctx := context.Background()
	m := newMachine()
	p := m.start(t, filepath.Join(t.TempDir(), "fabrics.json"))
	b, err := p.Present(ctx, "b", lvol("b"), true)
	if err != nil || !strings.HasPrefix(b.Path, "/dev/nvme0n") || !b.Block || !b.ReadOnly || b.SizeBytes != testBytes {
		t.Fatalf("%+v, %v", b, err)
	}
	if !m.drives[filepath.Base(b.Path)].ReadOnly {
		t.Error("the drive was not made read-only")
	}
	a, err := p.Present(ctx, "a", lvol("a"), true)
	if err != nil {
		t.Fatal(err)
	}
	if len(m.connects) != 1 {
		t.Errorf("two disks of a target took %d controllers", len(m.connects))
	}
	if again, err := p.Present(ctx, "b", lvol("b"), true); err != nil || again != b {
		t.Errorf("%+v, %v", again, err)
	}
	_, err = p.Present(ctx, "b", lvol("other"), true)
	wantKind(t, err, kind.Exists)
	_, err = p.Present(ctx, "w", lvol("w"), false)
	wantKind(t, err, kind.Unsupported)
	_, err = p.Present(ctx, "q", present.Source{Kind: present.SourceQcow2, Lvol: "w", Target: "store", Path: "/x"}, true)
	wantKind(t, err, kind.Unsupported)
	_, err = p.Present(ctx, "l", present.Source{Kind: present.SourceLvol, Lvol: "w"}, true)
	wantKind(t, err, kind.Unsupported)
	_, err = p.Present(ctx, "missing", lvol("missing"), true)
	wantKind(t, err, kind.NotFound)
	if list, err := p.List(ctx); err != nil || len(list) != 2 || list[0] != a || list[1] != b {
		t.Errorf("%+v, %v", list, err)
	}
	// Another id of the same block is the same disk.
	if b2, err := p.Present(ctx, "b2", lvol("b"), true); err != nil || b2.Path != b.Path {
		t.Errorf("%+v, %v", b2, err)
	}
	m.setBusy(b.Path, true)
	if err := p.Withdraw(ctx, "b2"); err != nil || !m.attached["b"] {
		t.Errorf("one of two ids: %v", err)
	}
	wantKind(t, p.Withdraw(ctx, "b"), kind.InUse)
	wantKind(t, p.Teardown(ctx), kind.InUse)
	if !m.attached["b"] {
		t.Error("a disk in use was detached")
	}
	m.setBusy(b.Path, false)
	if err := p.Withdraw(ctx, "b"); err != nil {
		t.Fatal(err)
	}
	if m.attached["b"] || len(m.ctrls) != 1 {
		t.Errorf("attached %v, controllers %v", m.attached, m.ctrls)
	}
	if err := p.Withdraw(ctx, "b"); err != nil {
		t.Error(err)
	}
	if err := p.Teardown(ctx); err != nil {
		t.Fatal(err)
	}
	if len(m.attached) != 0 || len(m.ctrls) != 0 {
		t.Errorf("left: attached %v, controllers %v", m.attached, m.ctrls)
	}
}

func TestRestartConnectsNothingAgain(t *testing.T) {
	defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
	ctx := context.Background()
	m, state := newMachine(), filepath.Join(t.TempDir(), "fabrics.json")
	p := m.start(t, state)
	d, err := p.Present(ctx, "d", lvol("d"), true)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	p = m.start(t, state)
	if list, err := p.List(ctx); err != nil || len(list) != 1 || list[0] != d {
		t.Fatalf("%+v, %v", list, err)
	}
	if again, err := p.Present(ctx, "d", lvol("d"), true); err != nil || again != d || len(m.connects) != 1 {
		t.Errorf("%+v, %v, %d connects", again, err, len(m.connects))
	}
	// The controller is still known as ours, and goes with the last disk.
	if err := p.Withdraw(ctx, "d"); err != nil || len(m.ctrls) != 0 {
		t.Errorf("%v, controllers %v", err, m.ctrls)
	}
	p.Close()
}

func TestControllersOfOthersStay(t *testing.T) {
	ctx := context.Background()
	m := newMachine()
	// Same subsystem and host, connected by hand; and another host's.
	m.add(controller{Subsystem: testSubsystem, HostNQN: testHost, Portal: m.portals[0], State: "live"})
	m.add(controller{Subsystem: testSubsystem, HostNQN: testHost + "b", Portal: m.portals[0], State: "live"})
	p := m.start(t, filepath.Join(t.TempDir(), "fabrics.json"))
	if _, err := p.Present(ctx, "d", lvol("d"), true); err != nil {
		t.Fatal(err)
	}
	if len(m.connects) != 0 {
		t.Errorf("connected beside a controller that is there: %q", m.connects)
	}
	if err := p.Teardown(ctx); err != nil {
		t.Fatal(err)
	}
	if len(m.deletes) != 0 || len(m.ctrls) != 2 {
		t.Errorf("deleted %v", m.deletes)
	}
}

// eventually waits for what the presenter does in the background.
func eventually(t testing.TB, m *machine, what string, cond func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
		m.mu.Lock()
		ok := cond()
		m.mu.Unlock()
		if ok {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: not in a minute", what)
		}
	}
}

func TestPortals(t *testing.T) {
	defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
	ctx := context.Background()
	m := newMachine()
	m.portals = []Portal{{TransportTCP, "10.0.0.1", "4420"}, {TransportTCP, "10.0.0.2", "4420"}, {TransportRDMA, "10.0.0.3", "4420"}}
	m.refuse["10.0.0.1"] = syscall.ECONNREFUSED
	p := m.start(t, filepath.Join(t.TempDir(), "fabrics.json"))
	if _, err := p.Present(ctx, "d", lvol("d"), true); err != nil {
		t.Fatalf("with one portal down: %v", err)
	}
	eventually(t, m, "the third portal is connected", func() bool { return len(m.ctrls) == 2 })
	m.mu.Lock()
	delete(m.refuse, "10.0.0.1")
	m.mu.Unlock()
	eventually(t, m, "the first portal is connected when it is back", func() bool { return len(m.ctrls) == 3 })
	// The kernel gives all up: they come back without anybody asking.
	m.lose()
	eventually(t, m, "lost controllers are made anew", func() bool { return len(m.ctrls) == 3 && len(m.drives) == 1 })
	if err := p.Teardown(ctx); err != nil || len(m.ctrls) != 0 {
		t.Errorf("%v, controllers %v", err, m.ctrls)
	}
	m.refuse["10.0.0.1"], m.refuse["10.0.0.2"], m.refuse["10.0.0.3"] = syscall.ETIMEDOUT, syscall.EIO, syscall.EINVAL
	p = m.start(t, filepath.Join(t.TempDir(), "fabrics.json"))
	if _, err := p.Present(ctx, "d", lvol("d"), true); !errors.Is(err, kind.Unavailable) {
		t.Errorf("with all portals down: %v", err)
	}
	if list, _ := p.List(ctx); len(list) != 0 || len(m.attached) != 0 {
		t.Errorf("a failed presentation left %+v, attached %v", list, m.attached)
	}
	p.Close()
}

// TestUnfinished: the process dies, or the target goes, in the middle.
func TestUnfinished(t *testing.T) {
	ctx := context.Background()
	m, state := newMachine(), filepath.Join(t.TempDir(), "fabrics.json")
	// On record, not attached yet.
	if err := runstate.Save(state, stateVersion, map[string]any{"records": []record{{ID: "half", Source: lvol("half")}}}); err != nil {
		t.Fatal(err)
	}
	p := m.start(t, state)
	list, err := p.List(ctx)
	if err != nil || len(list) != 1 || list[0].ID != "half" || list[0].Path != "" {
		t.Fatalf("%+v, %v", list, err)
	}
	if err := p.Withdraw(ctx, "half"); err != nil {
		t.Fatal(err)
	}
	d, err := p.Present(ctx, "d", lvol("d"), true)
	if err != nil {
		t.Fatal(err)
	}
	m.mu.Lock()
	m.down = true
	m.mu.Unlock()
	wantKind(t, p.Withdraw(ctx, "d"), kind.Unavailable)
	if list, _ := p.List(ctx); len(list) != 1 || list[0] != d {
		t.Errorf("after a withdrawal that failed: %+v", list)
	}
	_, err = p.Present(ctx, "e", lvol("e"), true)
	wantKind(t, err, kind.Unavailable)
	if list, _ := p.List(ctx); len(list) != 2 || list[1].ID != "e" {
		t.Errorf("what could not be given back is not listed: %+v", list)
	}
	m.mu.Lock()
	m.down = false
	m.mu.Unlock()
	for _, id := range []string{"d", "e"} {
		if err := p.Withdraw(ctx, id); err != nil {
			t.Error(err)
		}
	}
	if err := p.Teardown(ctx); err != nil || len(m.ctrls) != 0 {
		t.Errorf("%v, controllers %v", err, m.ctrls)
	}
}

// TestWithoutEvents: a disk is found all the same, because it was asked for and looked for.
func TestWithoutEvents(t *testing.T) {
	ctx := context.Background()
	m := newMachine()
	m.silent = true
	p := m.start(t, filepath.Join(t.TempDir(), "fabrics.json"))
	if _, err := p.Present(ctx, "d", lvol("d"), true); err != nil {
		t.Fatal(err)
	}
	if err := p.Teardown(ctx); err != nil {
		t.Error(err)
	}
}

func TestConcurrentCalls(t *testing.T) {
	defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
	ctx := context.Background()
	m := newMachine()
	p := m.start(t, filepath.Join(t.TempDir(), "fabrics.json"))
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			id := fmt.Sprint("d", i%4)
			for range 10 {
				if _, err := p.Present(ctx, id, lvol(id), true); err != nil {
					t.Error(err)
				}
				if err := p.Withdraw(ctx, id); err != nil && !errors.Is(err, kind.InUse) {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if err := p.Teardown(ctx); err != nil {
		t.Error(err)
	}
	if len(m.ctrls) != 0 || len(m.drives) != 0 || len(m.attached) != 0 {
		t.Errorf("left: %v %v %v", m.ctrls, m.drives, m.attached)
	}
}
