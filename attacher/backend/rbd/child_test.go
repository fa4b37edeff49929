//go:build ceph

package rbd_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/thaw-project/thaw/attacher/backend/rbd"
	"github.com/thaw-project/thaw/failpoint"
	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/lvol"
)

const childVariable = "THAW_RBD_CHILD"

// work is what a child does to a store.
type work struct {
	Options rbd.Options
	Do      string
}

// childMain does a child's work when this process is one.
func childMain() bool {
	raw := os.Getenv(childVariable)
	if raw == "" {
		return false
	}
	var w work
	err := json.Unmarshal([]byte(raw), &w)
	if err == nil {
		err = w.run()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	return true
}

func (w work) run() error {
	b, err := rbd.New(context.Background(), w.Options)
	if err != nil {
		return err
	}
	if err := operations[w.Do](b); err != nil {
		return err
	}
	if w.Do == "wait" {
		fmt.Println("ready")
		time.Sleep(time.Hour)
	}
	// What is done in the background has steps too.
	time.Sleep(3 * time.Second)
	return b.Close()
}

// operations begin with lvol base, 4 MiB of ones, its snapshot snap, its clone clone,
// and a snapshot gone without clones.
var operations = map[string]func(*rbd.Backend) error{
	"create":   func(b *rbd.Backend) error { _, err := b.Create("new", 8<<20); return err },
	"clone":    func(b *rbd.Backend) error { _, err := b.Clone("snap", "new"); return err },
	"snapshot": func(b *rbd.Backend) error { _, err := b.Snapshot("base", "new"); return err },
	"delete":   func(b *rbd.Backend) error { return b.Delete("clone") },
	"merge": func(b *rbd.Backend) error {
		if err := b.Delete("clone"); err != nil {
			return err
		}
		return b.Delete("snap")
	},
	"read-only": func(b *rbd.Backend) error { _, err := b.SetReadOnly("base", true); return err },
	"resize":    func(b *rbd.Backend) error { _, err := b.Resize("base", 6<<20); return err },
	"inflate":   func(b *rbd.Backend) error { _, err := b.Inflate(context.Background(), "clone"); return err },
	"wait": func(b *rbd.Backend) error {
		d, err := b.OpenLvol("base", false)
		if err == nil {
			_, err = d.WriteAt(make([]byte, 512), 0)
		}
		return err
	},
}

// steps of each operation, in their order.
var steps = map[string][]string{
	"create":    {"create: entered", "create: made", "create: done"},
	"clone":     {"create: entered", "create: made", "create: done"},
	"snapshot":  {"snapshot: entered", "snapshot: taken", "snapshot: done"},
	"delete":    {"delete: gone", "collect: image removed"},
	"merge":     {"collect: snapshot removed"},
	"read-only": {"snapshot: entered", "read-only: set"},
	"resize":    {"resize: entered", "resize: resized"},
	"inflate":   {"inflate: copied", "inflate: done"},
}

func prepare(t *testing.T, o rbd.Options) {
	t.Helper()
	b := open(t, o)
	defer func() {
		if err := b.Close(); err != nil {
			t.Error(err)
		}
	}()
	do := func(_ lvol.Info, err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	do(b.Create("base", 4<<20))
	d, err := b.OpenLvol("base", false)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := d.WriteAt(ones(4<<20), 0); err != nil {
		t.Fatal(err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	do(b.Snapshot("base", "snap"))
	do(b.Clone("snap", "clone"))
}

func ones(n int) []byte { return bytes.Repeat([]byte{1}, n) }

func (w work) command(t *testing.T, env ...string) *exec.Cmd {
	t.Helper()
	raw, err := json.Marshal(w)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	t.Cleanup(cancel)
	c := exec.CommandContext(ctx, os.Args[0])
	c.Env = append(append(os.Environ(), childVariable+"="+string(raw)), env...)
	c.Stderr = os.Stderr
	return c
}

// TestKilled kills a process at every step of every operation, and looks at the store
// with the next.
func TestKilled(t *testing.T) {
	if !failpoint.Enabled {
		t.Skip("needs the build tag failpoint: make test-ceph")
	}
	for op, list := range steps {
		for _, step := range list {
			t.Run(op+" "+strings.ReplaceAll(step, " ", "-"), func(t *testing.T) {
				o := options(t)
				o.Lease = time.Hour // it is not waited for: the process is seen to be dead
				prepare(t, o)
				w := work{Options: o, Do: op}
				w.Options.Logger = nil
				err := w.command(t, "THAW_FAILPOINTS=rbd."+step+"=kill").Run()
				var exit *exec.ExitError
				if !errors.As(err, &exit) || !exit.Sys().(syscall.WaitStatus).Signaled() {
					t.Fatalf("the process was not killed at %q: %v", step, err)
				}
				begin := time.Now()
				b := open(t, o)
				defer b.Close()
				if took := time.Since(begin); took > 10*time.Second {
					t.Errorf("the next process had the store after %v", took)
				}
				look(t, b, op, step)
			})
		}
	}
}

// look checks a store after an operation that was cut.
func look(t *testing.T, b *rbd.Backend, op, step string) {
	t.Helper()
	list, err := b.List()
	if err != nil {
		t.Fatal(err)
	}
	there := map[string]lvol.Info{}
	for _, i := range list {
		there[i.Name] = i
		want := ones(4 << 20)
		if op == "create" && i.Name == "new" {
			want = make([]byte, 8<<20)
		}
		d, err := b.OpenLvol(i.Name, true)
		if err != nil {
			t.Fatal(err)
		}
		got := make([]byte, len(want))
		if n, err := d.ReadAt(got, 0); n != len(got) || !bytes.Equal(got, want) {
			t.Errorf("lvol %s: read %d bytes, %v, not what was written", i.Name, n, err)
		}
		if d.SizeBytes() != i.SizeBytes {
			t.Errorf("lvol %s has %d bytes and its device %d", i.Name, i.SizeBytes, d.SizeBytes())
		}
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	}
	if _, ok := there["base"]; !ok {
		t.Error("base is lost")
	}
	done := strings.HasSuffix(step, ": done") || op == "resize" || op == "read-only" && step == "read-only: set"
	if _, made := there["new"]; made && !done || !made && done && strings.Contains("create clone snapshot", op) {
		t.Errorf("new is there: %t, at step %q", made, step)
	}
	if op == "resize" && there["base"].SizeBytes != 6<<20 {
		t.Errorf("the resize was not completed: %+v", there["base"])
	}
	// What the caller does: the same again.
	again := operations[op](b)
	if done && (op == "create" || op == "clone" || op == "snapshot") {
		if !errors.Is(again, kind.Exists) {
			t.Errorf("again: %v", again)
		}
	} else if again != nil && !(errors.Is(again, kind.NotFound) && (op == "delete" || op == "merge")) {
		t.Errorf("again: %v", again)
	}
	clean(t, b)
}

// clean waits until a store has no problem.
func clean(t *testing.T, b *rbd.Backend) {
	t.Helper()
	var last any
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(200 * time.Millisecond) {
		r, err := b.Check(context.Background(), lvol.CheckOptions{Repair: true, Scrub: true})
		if err == nil && len(r.Problems) == 0 {
			return
		}
		last = fmt.Sprint(r.Problems, err)
	}
	t.Errorf("the store is not clean: %v", last)
}

// TestOneProcess shows that a second process does not get the store of a living one, that
// one that is stopped for too long loses it, and that nothing it then does has any effect.
func TestOneProcess(t *testing.T) {
	o := options(t)
	o.Lease = 6 * time.Second
	prepare(t, o)
	w := work{Options: o, Do: "wait"}
	c := w.command(t)
	out, err := c.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = c.Process.Kill()
		_ = c.Wait() // it was killed
	}()
	if _, err := out.Read(make([]byte, 16)); err != nil {
		t.Fatal(err)
	}
	if _, err := rbd.New(context.Background(), o); !errors.Is(err, kind.InUse) {
		t.Fatalf("a second process on the store: %v", err)
	}
	if err := c.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	var b *rbd.Backend
	for deadline := time.Now().Add(time.Minute); b == nil; time.Sleep(500 * time.Millisecond) {
		if b, err = rbd.New(context.Background(), o); err != nil && (!errors.Is(err, kind.InUse) || time.Now().After(deadline)) {
			t.Fatal(err)
		}
	}
	defer b.Close()
	// It had the exclusive lock of base. It is refused, so base can be written at once.
	d, err := b.OpenLvol("base", false)
	if err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	if _, err := d.WriteAt(ones(4096), 0); err != nil {
		t.Fatal(err)
	}
	if took := time.Since(begin); took > 10*time.Second {
		t.Errorf("the exclusive lock of a process that lost the store was got after %v", took)
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
}

// TestClusterAway shows that calls are bounded while the OSD is away, that I/O waits and
// is no error, and that all goes on afterwards.
func TestClusterAway(t *testing.T) {
	o := options(t)
	o.Timeout = 2 * time.Second
	b := open(t, o)
	defer b.Close()
	if _, err := b.Create("a", 4<<20); err != nil {
		t.Fatal(err)
	}
	d, err := b.OpenLvol("a", false)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := d.WriteAt(ones(4096), 0); err != nil {
		t.Fatal(err)
	}
	cluster.KillOSD()
	io := make(chan error, 1)
	go func() {
		_, err := d.WriteAt(ones(4096), 8192)
		io <- err
	}()
	bounded := func(what string, f func() error) {
		t.Helper()
		begin := time.Now()
		err := f()
		if !errors.Is(err, kind.Unavailable) {
			t.Errorf("%s while Ceph is away: %v", what, err)
		}
		if took := time.Since(begin); took > 2*o.Timeout {
			t.Errorf("%s took %v", what, took)
		}
	}
	bounded("create", func() error { _, err := b.Create("b", 1<<20); return err })
	bounded("snapshot", func() error { _, err := b.Snapshot("a", "s"); return err })
	bounded("open", func() error { _, err := b.OpenLvol("a", true); return err }) // behind the snapshot
	begin := time.Now()
	if i, err := b.Get("a"); err != nil || i.SizeBytes != 4<<20 {
		t.Errorf("get: %+v, %v", i, err)
	}
	b.Stat()
	if took := time.Since(begin); took > 5*o.Timeout {
		t.Errorf("what is known was told after %v", took)
	}
	select {
	case err := <-io:
		t.Fatalf("a write ended while Ceph is away: %v", err)
	default:
	}
	if err := cluster.StartOSD(context.Background()); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-io:
		if err != nil {
			t.Errorf("a write over the OSD's absence: %v", err)
		}
	case <-time.After(time.Minute):
		t.Fatal("a write does not go on")
	}
	got := make([]byte, 4096)
	if _, err := d.ReadAt(got, 8192); err != nil || !bytes.Equal(got, ones(4096)) {
		t.Errorf("what was written meanwhile is not there: %v", err)
	}
	// Again, each until it is done.
	for _, f := range []func() error{
		func() error { _, err := b.Create("b", 1<<20); return err },
		func() error { _, err := b.Snapshot("a", "s"); return err },
	} {
		var err error
		for deadline := time.Now().Add(30 * time.Second); time.Now().Before(deadline); time.Sleep(100 * time.Millisecond) {
			if err = f(); !errors.Is(err, kind.Unavailable) {
				break
			}
		}
		if err != nil && !errors.Is(err, kind.Exists) {
			t.Error(err)
		}
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	clean(t, b)
}
