package card

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	attacherv1 "github.com/thaw-project/thaw/api/attacher/v1"
	attacherrpc "github.com/thaw-project/thaw/attacher/rpc"
	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/spdk"
)

// mortal is the connection of a process that may die.
type mortal struct {
	grpc.ClientConnInterface
	dead *atomic.Bool
}

func (m mortal) Invoke(ctx context.Context, method string, args, reply any, opts ...grpc.CallOption) error {
	if m.dead.Load() {
		return status.Error(codes.Unavailable, "it was killed")
	}
	return m.ClientConnInterface.Invoke(ctx, method, args, reply, opts...)
}

// crash runs call on a card's attacher of its own until that reaches a step, and abandons
// it there as SIGKILL would. It returns the steps that were reached.
func (l *lab) crash(at string, call func(attacherv1.CardClient) error) (steps []string) {
	l.t.Helper()
	o := l.o
	dead := &atomic.Bool{}
	o.Bridge = mortal{l.conn, dead}
	var c *Card
	ready := make(chan struct{})
	seen := make(chan string, 1<<10)
	c, err := open(o, func(step string) {
		<-ready
		if !dead.Load() {
			seen <- step
		}
		if step == at {
			dead.Store(true)
		}
		if dead.Load() {
			c.Stop()
			runtime.Goexit() // runs unlocks and nothing that writes
		}
	})
	check(l.t, err)
	close(ready)
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := call(c.Client()); err != nil && !dead.Load() {
			l.t.Error(err)
		}
	}()
	<-done
	dead.Store(true)
	check(l.t, c.Close())
	close(seen)
	for s := range seen {
		steps = append(steps, s)
	}
	return steps
}

// TestKilledAtEveryStep kills the card's attacher at each step of attach and detach, and
// the next one at each step of what is asked of it, for all pairs. Whoever comes third
// converges, by itself or when it is asked again; nothing is left and nothing of others is
// touched.
func TestKilledAtEveryStep(t *testing.T) {
	s := newStore(t, 1, "a", "b")
	l := newLab(t, 4)
	l.o.Interval, l.o.HoldGrace = 5*time.Millisecond, 20*time.Millisecond
	l.strangers(s)
	c := l.card()
	b := attach(t, c.Client(), fromStore(s, "b"))
	check(t, c.Close())
	onlyB := func() error {
		check(t, l.whole(b))
		l.untouched()
		if own := l.dump(true); strings.Count(own, "\n") != strings.Count(l.dumpOf(b, own), "\n") || strings.Count(own, "function ") != 1 {
			return errors.New(own)
		}
		return nil
	}
	ops := map[string]func(attacherv1.CardClient) error{
		"attach": func(c attacherv1.CardClient) error {
			_, err := c.AttachDisk(context.Background(), fromStore(s, "a"))
			return err
		},
		"detach": func(c attacherv1.CardClient) error {
			_, err := c.DetachDisk(context.Background(), &attacherv1.DetachDiskRequest{Id: "a", Purpose: block})
			return err
		},
	}
	type point struct{ op, step string }
	var points []point
	for _, op := range []string{"attach", "detach"} {
		steps := l.crash("", ops[op])
		for _, st := range steps {
			if !slices.Contains(points, point{op, st}) {
				points = append(points, point{op, st})
			}
		}
	}
	if len(points) < 12 {
		t.Fatalf("there are only these steps: %v", points)
	}
	if err := onlyB(); err != nil {
		t.Fatal(err)
	}
	pairs := 0
	for i, first := range points {
		for j, second := range points {
			if os.Getenv("THAW_TEST_EVERY_STEP") == "" && (i+j)%4 != 0 && i != j {
				continue // a quarter of the pairs, each step in some
			}
			pairs++
			if first.op == "detach" {
				l.crash("", ops["attach"])
			}
			l.crash(first.step, ops[first.op])
			l.crash(second.step, ops[second.op])
			check(t, l.whole(b))
			c := l.card()
			switch (i + j) % 3 {
			case 0: // asked again
				a := attach(t, c.Client(), fromStore(s, "a"))
				check(t, l.whole(a))
				if pairs%8 == 0 && !bytes.Equal(l.read(a), s.content("a")) {
					t.Error("a host reads something else than the store has")
				}
				detach(t, c.Client(), "a")
			case 1:
				detach(t, c.Client(), "a")
			case 2: // by itself: it is whole, or gone
				eventually(t, func() error {
					list, err := c.ListDisks(t.Context(), &attacherv1.ListDisksRequest{})
					if err != nil {
						return err
					}
					for _, d := range list.Disks {
						if d.Problem != "" {
							return fmt.Errorf("%v", d)
						}
						if err := l.whole(d); err != nil {
							return err
						}
					}
					return nil
				})
				detach(t, c.Client(), "a")
			}
			eventually(t, onlyB)
			check(t, c.Close())
			if t.Failed() {
				t.Fatalf("killed at %v, then at %v", first, second)
			}
		}
	}
	t.Logf("%d steps, %d pairs", len(points), pairs)
	c = l.card()
	detach(t, c.Client(), "b")
	l.clean()
}

// dumpOf is the part of a dump that is needed for one disk: one subsystem, one controller
// with the volumes of its store, one function.
func (l *lab) dumpOf(d *attacherv1.CardDisk, dump string) string {
	var lines []string
	for line := range strings.Lines(dump) {
		if strings.Contains(line, d.SubsystemNqn) || strings.HasPrefix(line, "controller ") || strings.HasPrefix(line, "bdev ") {
			lines = append(lines, line)
		}
	}
	return strings.Join(lines, "")
}

// TestForgotten is an attach that nobody asks for again after its attacher was killed.
func TestForgotten(t *testing.T) {
	s := newStore(t, 1, "a")
	l := newLab(t, 4)
	l.strangers(s)
	for _, step := range []string{"leased", "connected", "nvmeNamespace", "controller"} {
		l.crash("card.attach: "+step, func(c attacherv1.CardClient) error {
			_, err := c.AttachDisk(context.Background(), fromStore(s, "a"))
			return err
		})
		c := l.card()
		eventually(t, func() error {
			list, err := c.ListDisks(t.Context(), &attacherv1.ListDisksRequest{})
			if err == nil && len(list.Disks) > 0 {
				err = fmt.Errorf("%v", list)
			}
			return err
		})
		l.clean()
		check(t, c.Close())
	}
}

// TestKill kills the process of the card's attacher at each step of an attach; the client
// asks until somebody answers.
func TestKill(t *testing.T) {
	s := newStore(t, 1, "a")
	l := newLab(t, 4)
	l.strangers(s)
	conn, err := attacherrpc.Dial(filepath.Join(l.root, "card"))
	check(t, err)
	defer conn.Close()
	c := attacherv1.NewCardClient(conn)
	for _, step := range []string{"attach: leased", "attach: connected", "attach: controller", "attach: recorded", "detach: recorded", "detach: nvmeNamespace", "detach: freed"} {
		p := spawn(t, childCard, l.root, "card", "THAW_TEST_STEP=card."+step)
		errs := make(chan error, 1)
		go func() {
			_, err := c.AttachDisk(context.Background(), fromStore(s, "a"))
			if err == nil {
				_, err = c.DetachDisk(context.Background(), &attacherv1.DetachDiskRequest{Id: "a", Purpose: block})
			}
			errs <- err
		}()
		want(t, kind.Unavailable, <-errs)
		<-p.ended
		if st, ok := p.cmd.ProcessState.Sys().(syscall.WaitStatus); !ok || st.Signal() != syscall.SIGKILL {
			t.Fatalf("%s: the child ended by itself: %s", step, p.cmd.ProcessState)
		}
		p = spawn(t, childCard, l.root, "card")
		var d *attacherv1.CardDisk
		eventually(t, func() (err error) {
			d, err = c.AttachDisk(t.Context(), fromStore(s, "a"))
			return err
		})
		check(t, l.whole(d))
		detach(t, c, "a")
		l.clean()
		p.kill()
	}
}

// TestTargetKilled kills the card's target, which forgets everything, with functions that
// it loses or that stay as they are; the disks are back within ten seconds, on the functions
// that they had.
func TestTargetKilled(t *testing.T) {
	ids := []string{"a", "b", "c", "d"}
	s := newStore(t, 2, ids...)
	root := shortDir(t)
	p := spawn(t, childTarget, root, "target")
	l := connectLab(t, root, 8)
	l.run()
	c := l.card()
	disks := make(map[string]*attacherv1.CardDisk)
	for _, id := range ids {
		disks[id] = attach(t, c.Client(), fromStore(s, id))
	}
	for round, lose := range []bool{true, false, true} {
		p.kill()
		if lose {
			l.functions.Reset()
		}
		plugged := len(l.functions.Log())
		_, err := c.Client().AttachDisk(t.Context(), &attacherv1.AttachDiskRequest{Id: "new", Purpose: block, Source: fromStore(s, "d").Source})
		want(t, kind.Unavailable, err)
		_, err = c.Client().DetachDisk(t.Context(), &attacherv1.DetachDiskRequest{Id: "d", Purpose: block})
		want(t, kind.Unavailable, err) // and goes on when the target is back
		p = spawn(t, childTarget, root, "target")
		began := time.Now()
		eventually(t, func() error {
			for _, id := range ids[:3] {
				if err := l.whole(disks[id]); err != nil {
					return err
				}
			}
			list, err := c.ListDisks(t.Context(), &attacherv1.ListDisksRequest{})
			if err == nil && len(list.Disks) != 3 {
				err = fmt.Errorf("%v", list)
			}
			return err
		})
		t.Logf("round %d: back after %s", round, time.Since(began))
		if n := len(l.functions.Log()) - plugged; !lose && n > 1 { // but for the one that was detached
			t.Errorf("functions that stayed were plugged or unplugged %d times", n)
		}
		if !bytes.Equal(l.read(disks["a"]), s.content("a")) {
			t.Error("a host reads something else than the store has")
		}
		disks["d"] = attach(t, c.Client(), fromStore(s, "d"))
	}
	// With the attacher gone too, whatever comes first.
	check(t, c.Close())
	p.kill()
	l.functions.Reset()
	c = l.card()
	time.Sleep(50 * time.Millisecond)
	spawn(t, childTarget, root, "target")
	for _, id := range ids {
		eventually(t, func() error { return l.whole(disks[id]) })
		detach(t, c.Client(), id)
	}
	l.clean()
}

// TestBridgeGone restarts the bridge.
func TestBridgeGone(t *testing.T) {
	s := newStore(t, 1, "a", "b")
	root := shortDir(t)
	l := connectLab(t, root, 4)
	stop, err := serveTarget(root)
	check(t, err)
	t.Cleanup(func() { check(t, stop()) })
	stopBridge := serveBridge(t, root, l.functions)
	l.conn, err = attacherrpc.Dial(filepath.Join(root, "bridge"))
	check(t, err)
	t.Cleanup(func() { l.conn.Close() })
	l.o.Bridge = l.conn
	c := l.card()
	a := attach(t, c.Client(), fromStore(s, "a"))
	stopBridge()
	_, err = c.Client().AttachDisk(t.Context(), fromStore(s, "b"))
	want(t, kind.Unavailable, err)
	_, err = c.Client().DetachDisk(t.Context(), &attacherv1.DetachDiskRequest{Id: "a", Purpose: block})
	want(t, kind.Unavailable, err)
	check(t, l.whole(a))
	t.Cleanup(serveBridge(t, root, l.functions))
	eventually(t, func() error {
		if left := l.dump(true); left != "" {
			return errors.New(left)
		}
		return nil
	})
	eventually(t, func() error { _, err := c.Client().AttachDisk(t.Context(), fromStore(s, "b")); return err })
	detach(t, c.Client(), "b")
	l.clean()
}

// TestStoreGone is a store that is away and comes back, and what does not wait for it.
func TestStoreGone(t *testing.T) {
	s, near := newStore(t, 1, "a", "b"), newStore(t, 1, "n")
	l := newLab(t, 4)
	c := l.card()
	a := attach(t, c.Client(), fromStore(s, "a"))
	attach(t, c.Client(), fromStore(s, "b"))
	s.halt()
	began := time.Now()
	n := attach(t, c.Client(), fromStore(near, "n"))
	detach(t, c.Client(), "b") // not the last of its store
	if took := time.Since(began); took > 2*time.Second {
		t.Errorf("a store that is away cost %s", took)
	}
	check(t, l.whole(n))
	s.start()
	eventually(t, func() error { return l.whole(a) })
	if !bytes.Equal(l.read(a), s.content("a")) {
		t.Error("a host reads something else than the store has")
	}
	check(t, l.whole(attach(t, c.Client(), fromStore(s, "b"))))
	s.halt()
	began = time.Now()
	detach(t, c.Client(), "a")
	detach(t, c.Client(), "b") // the last: the connection goes
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("a store that is away cost %s", took)
	}
	// The target is restarted while the store is away: the disk is back when both are.
	s.start()
	a = attach(t, c.Client(), fromStore(s, "a"))
	s.halt()
	check(t, l.spdk.NvmfDeleteSubsystem(t.Context(), a.SubsystemNqn))
	controllers, err := l.spdk.BdevNVMeGetControllers(t.Context(), "")
	check(t, err)
	for _, r := range controllers {
		if strings.HasPrefix(r.Name, "thaw.") && r.Paths[0].TransportID.SubNQN == s.disks["a"].SubsystemNqn {
			check(t, l.spdk.BdevNVMeDetachController(t.Context(), r.Name, spdk.TransportID{}))
		}
	}
	eventually(t, func() error {
		list, err := c.ListDisks(t.Context(), &attacherv1.ListDisksRequest{})
		if err == nil && list.Disks[0].Problem == "" {
			err = fmt.Errorf("%v", list)
		}
		return err
	})
	check(t, l.whole(n))
	s.start()
	eventually(t, func() error { return l.whole(a) })
	detach(t, c.Client(), "a")
	detach(t, c.Client(), "n")
	l.clean()
}

// TestOthersKilledAtEveryStep kills the card's target, or its bridge, at each step of attach
// and of detach. Whoever asks again within ten seconds has what it asked for.
func TestOthersKilledAtEveryStep(t *testing.T) {
	s := newStore(t, 1, "a", "b")
	root := shortDir(t)
	p := spawn(t, childTarget, root, "target")
	l := connectLab(t, root, 4)
	stopBridge := serveBridge(t, root, l.functions)
	t.Cleanup(func() { stopBridge() })
	var err error
	l.conn, err = attacherrpc.Dial(filepath.Join(root, "bridge"))
	check(t, err)
	t.Cleanup(func() { l.conn.Close() })
	l.o.Bridge = l.conn

	var mu sync.Mutex
	var at string
	var kills func()
	c, err := open(l.o, func(step string) {
		mu.Lock()
		defer mu.Unlock()
		if step == at {
			at = ""
			kills()
		}
	})
	check(t, err)
	defer c.Close()
	b := attach(t, c.Client(), fromStore(s, "b"))
	killTarget := func() {
		p.kill()
		l.functions.Reset()
		p.start(filepath.Join(root, "target"))
	}
	killBridge := func() {
		stopBridge()
		stopBridge = serveBridge(t, root, l.functions)
	}
	var steps []string
	for _, of := range []string{"attach: leased", "attach: connected", "attach: found", "attach: subsystem", "attach: nvmeNamespace", "attach: controller", "attach: recorded",
		"detach: recorded", "detach: controller", "detach: nvmeNamespace", "detach: subsystem", "detach: disconnected", "detach: freed"} {
		steps = append(steps, "card."+of)
	}
	for _, who := range []func(){killTarget, killBridge} {
		for _, step := range steps {
			mu.Lock()
			at, kills = step, who
			mu.Unlock()
			var a *attacherv1.CardDisk
			eventually(t, func() (err error) {
				a, err = c.Client().AttachDisk(t.Context(), fromStore(s, "a"))
				return err
			})
			eventually(t, func() error { return errors.Join(l.whole(a), l.whole(b)) })
			eventually(t, func() error {
				_, err := c.Client().DetachDisk(t.Context(), &attacherv1.DetachDiskRequest{Id: "a", Purpose: block})
				return err
			})
			eventually(t, func() error {
				if own := l.dump(true); strings.Count(own, "subsystem ") != 1 || strings.Count(own, "function ") != 1 {
					return errors.New(own)
				}
				return l.whole(b)
			})
			mu.Lock()
			if at != "" {
				t.Errorf("step %s was not reached", at)
			}
			mu.Unlock()
		}
	}
	detach(t, c.Client(), "b")
	l.clean()
}
