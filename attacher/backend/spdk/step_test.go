package spdk_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	opiv1 "github.com/opiproject/opi-api/storage/v1alpha1/gen/go"
	"google.golang.org/grpc"

	lvolv1 "github.com/thaw-project/thaw/api/lvol/v1"
	"github.com/thaw-project/thaw/attacher"
	"github.com/thaw-project/thaw/attacher/backend/backendtest"
	"github.com/thaw-project/thaw/attacher/backend/spdk"
	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/target/rpc"
)

// errDead is what a call of a dead process cannot return.
var errDead = kind.Errorf(kind.Unavailable, "the process is dead")

// cut is a connection of a process that dies at the nth call that changes something,
// before or after the bridge did it.
type cut struct {
	*grpc.ClientConn
	after bool

	mu   sync.Mutex
	left int // guarded by mu: calls until death
	dead chan struct{}
}

func (c *cut) Invoke(ctx context.Context, method string, args, reply any, opts ...grpc.CallOption) error {
	name := method[strings.LastIndexByte(method, '/')+1:]
	changes := !strings.HasPrefix(name, "Get") && !strings.HasPrefix(name, "List")
	c.mu.Lock()
	if changes && c.left > 0 {
		if c.left--; c.left == 0 {
			if c.after {
				_ = c.ClientConn.Invoke(ctx, method, args, reply, opts...) // nobody hears of it
			}
			close(c.dead)
		}
	}
	c.mu.Unlock()
	select {
	case <-c.dead:
		return errDead
	default:
	}
	return c.ClientConn.Invoke(ctx, method, args, reply, opts...)
}

// journey is the life of an attacher: what it would have on record when it dies.
type journey struct {
	t      *testing.T
	b      *spdk.Backend
	record map[attacher.Export]bool
}

func (j *journey) export(e attacher.Export) error {
	j.record[e] = true
	_, err := j.b.Exporter().Export(e, "")
	return err
}

func (j *journey) withdraw(e attacher.Export) error {
	err := j.b.Exporter().Withdraw(e)
	if err == nil {
		delete(j.record, e)
	}
	return err
}

var (
	toNode1 = attacher.Export{Node: "node-1", Block: "soldier", NSID: 1, Transport: attacher.TransportTCP}
	toNode2 = attacher.Export{Node: "node-2", Block: "soldier", NSID: 1, Transport: attacher.TransportTCP}
	writer  = attacher.Export{Node: "node-1", Block: "w", NSID: 2, Transport: attacher.TransportTCP, Writable: true}
)

// run goes on until something fails.
func (j *journey) run() error {
	steps := []func() error{
		func() error { return j.b.Exporter().Restore(nil) },
		func() error { _, err := j.b.Create("work", 1<<20); return err },
		func() error {
			d, err := j.b.OpenLvol("work", false)
			if err != nil {
				return err
			}
			_, err = d.WriteAt(block(1), 4096)
			return errors.Join(err, d.Close())
		},
		func() error { _, err := j.b.Snapshot("work", "block"); return err },
		func() error { return j.b.Delete("work") },
		func() error { _, err := j.b.Clone("block", "soldier"); return err },
		func() error { _, err := j.b.SetReadOnly("soldier", true); return err },
		func() error { _, err := j.b.Clone("block", "w"); return err },
		func() error { return j.export(toNode1) },
		func() error { return j.export(toNode2) },
		func() error { return j.export(writer) },
		func() error { return j.withdraw(toNode1) },
		func() error { return j.withdraw(toNode2) },
		func() error { return j.export(toNode2) },
		func() error { return j.withdraw(writer) },
		func() error { return j.b.Delete("w") },
	}
	for i, f := range steps {
		if err := f(); err != nil {
			return fmt.Errorf("step %d: %w", i, err)
		}
	}
	return nil
}

// TestEveryStep kills the attacher at each call that changes something, before and after
// it was done: the next one shows what is on record, and nothing else is left.
func TestEveryStep(t *testing.T) {
	for _, c := range []struct {
		name   string
		change func(map[string]rpc.Method)
	}{{"thaw target", nil}, {"each volume once", once}} {
		t.Run(c.name, func(t *testing.T) {
			p := newPlace(t)
			p.serve(t, c.change)
			plain := p.conn(t)
			everyStep(t, p, plain)
		})
	}
}

func everyStep(t *testing.T, p *place, plain *grpc.ClientConn) {
	b := p.open(t, plain) // makes the lvstore
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	deaths, step := 0, 3 // a sample, unless all are asked for
	if os.Getenv("THAW_TEST_EVERY_STEP") != "" {
		step = 1
	}
	for n := 1; ; n += step {
		ended := false
		for _, after := range []bool{false, true} {
			died := death(t, p, plain, n, after)
			ended = ended || !died
			if died {
				deaths++
			}
			if t.Failed() {
				t.Fatalf("at call %d, after %t", n, after)
			}
		}
		if ended {
			break
		}
	}
	t.Logf("%d deaths", deaths)
	if deaths < 40/step {
		t.Errorf("only %d deaths", deaths)
	}
}

func death(t *testing.T, p *place, plain *grpc.ClientConn, n int, after bool) (died bool) {
	conn := &cut{ClientConn: plain, after: after, left: n, dead: make(chan struct{})}
	o := p.options(conn)
	o.Patience, o.Timeout = time.Millisecond, 5*time.Second
	j := &journey{t: t, record: map[attacher.Export]bool{}}
	var err error
	j.b, err = spdk.New(t.Context(), o)
	if err == nil {
		err = j.run()
		j.b.Kill()
	}
	if err != nil && !errors.Is(err, kind.Unavailable) {
		t.Errorf("death came as %v", err)
	}
	select {
	case <-conn.dead:
		died = true
	default:
	}

	b := p.open(t, plain)
	defer func() {
		if err := b.Close(); err != nil {
			t.Error(err)
		}
		leftovers(t, plain)
	}()
	x := b.Exporter()
	var record []attacher.Export
	for e := range j.record {
		if _, err := b.Get(e.Block); err == nil { // the attacher drops what failed for good
			record = append(record, e)
		}
	}
	if err := x.Restore(record); err != nil {
		t.Fatal(err)
	}
	for _, e := range []attacher.Export{toNode1, toNode2, writer} {
		wanted := false
		for _, r := range record {
			wanted = wanted || r == e
		}
		if !wanted {
			continue
		}
		told, err := x.Export(e, "")
		if err != nil {
			t.Errorf("export %+v: %v", e, err)
			continue
		}
		d, err := backendtest.OpenNVMe(t.Context(), e.Node, told)
		if err != nil {
			t.Errorf("open %+v: %v", e, err)
			continue
		}
		got := make([]byte, 4096)
		if _, err := d.ReadAt(got, 4096); err != nil || string(got) != string(block(1)) {
			t.Errorf("read %+v: %v", e, err)
		}
		d.Close()
	}
	if nodes, lvols := x.Attached(); lvols != len(record) || nodes > lvols {
		t.Errorf("%d lvols on %d nodes, want %d", lvols, nodes, len(record))
	}
	// What a client would do again, it can; and all can be taken away.
	for e := range j.record {
		if err := x.Withdraw(e); err != nil {
			t.Errorf("withdraw %+v: %v", e, err)
		}
	}
	for _, name := range []string{"w", "soldier", "work", "block"} {
		if err := b.Delete(name); err != nil && !errors.Is(err, kind.NotFound) {
			t.Errorf("delete %s: %v", name, err)
		}
	}
	return died
}

// leftovers checks that the target has only the lvstore and the anchor.
func leftovers(t *testing.T, conn *grpc.ClientConn) {
	t.Helper()
	subs, err := opiv1.NewFrontendNvmeServiceClient(conn).ListNvmeSubsystems(t.Context(), &opiv1.ListNvmeSubsystemsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range subs.NvmeSubsystems {
		if !strings.HasSuffix(s.Spec.Nqn, "/") {
			t.Errorf("subsystem %s is left", s.Spec.Nqn)
		}
	}
	lvols, err := lvolv1.NewLogicalVolumeServiceClient(conn).ListLvols(t.Context(), &lvolv1.ListLvolsRequest{Parent: "lvolStores/store"})
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range lvols.Lvols {
		t.Errorf("lvol %s is left", l.Name)
	}
}

// dying is a connection of a process that dies before it makes a stand-in read-only.
type dying struct {
	*grpc.ClientConn
	dead atomic.Bool
}

func (c *dying) Invoke(ctx context.Context, method string, args, reply any, opts ...grpc.CallOption) error {
	if r, ok := args.(*lvolv1.SetLvolReadOnlyRequest); ok && strings.Contains(r.GetName(), "/lvols/thaw-export-") {
		c.dead.Store(true)
	}
	if c.dead.Load() {
		return errDead
	}
	return c.ClientConn.Invoke(ctx, method, args, reply, opts...)
}

// TestStandInReadOnly kills the attacher when a stand-in is made and can still be written:
// no node may see it so.
func TestStandInReadOnly(t *testing.T) {
	p := newPlace(t)
	p.serve(t, once)
	plain := p.conn(t)
	conn := &dying{ClientConn: plain}
	o := p.options(conn)
	o.Patience = time.Millisecond
	b, err := spdk.New(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	exports := []attacher.Export{toNode1, toNode2}
	for i := range exports {
		exports[i].Block = "block"
	}
	_, err = b.Create("work", 1<<20)
	if err == nil {
		_, err = b.Snapshot("work", "block")
	}
	if err == nil {
		err = b.Exporter().Restore(nil)
	}
	if err == nil {
		_, err = b.Exporter().Export(exports[0], "")
	}
	if err != nil {
		t.Fatal(err)
	}
	if _, err = b.Exporter().Export(exports[1], ""); !conn.dead.Load() || !errors.Is(err, kind.Unavailable) {
		t.Fatalf("death came as %v", err)
	}
	b.Kill()

	b = p.open(t, plain)
	defer func() {
		if err := b.Close(); err != nil {
			t.Error(err)
		}
		leftovers(t, plain)
	}()
	if err := b.Exporter().Restore(exports); err != nil {
		t.Fatal(err)
	}
	list, err := lvolv1.NewLogicalVolumeServiceClient(plain).ListLvols(t.Context(), &lvolv1.ListLvolsRequest{Parent: "lvolStores/store"})
	if err != nil {
		t.Fatal(err)
	}
	standIns := 0
	for _, l := range list.Lvols {
		if strings.Contains(l.Name, "/lvols/thaw-export-") {
			if standIns++; !l.ReadOnly {
				t.Errorf("a node can write %v", l)
			}
		}
	}
	if standIns != 1 {
		t.Errorf("%d lvols stand in for others, want 1", standIns)
	}
	for _, e := range exports {
		if _, err := b.Exporter().Export(e, ""); err != nil {
			t.Errorf("export %+v: %v", e, err)
		}
		if err := b.Exporter().Withdraw(e); err != nil {
			t.Errorf("withdraw %+v: %v", e, err)
		}
	}
	for _, name := range []string{"work", "block"} {
		if err := b.Delete(name); err != nil {
			t.Errorf("delete %s: %v", name, err)
		}
	}
}
