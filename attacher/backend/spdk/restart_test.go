package spdk_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/thaw-project/thaw/attacher"
	"github.com/thaw-project/thaw/attacher/backend/backendtest"
	"github.com/thaw-project/thaw/attacher/backend/spdk"
	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/target/bdev"
)

// within is how fast what a killed target served must be back, from when it is started.
const within = 10 * time.Second

func block(i int) []byte { return bytes.Repeat([]byte{byte(i), byte(i >> 8), 0x5a, 7}, 1024) }

func prepare(t *testing.T, b *spdk.Backend) {
	t.Helper()
	_, err := b.Create("work", 4<<20)
	if err != nil {
		t.Fatal(err)
	}
	d, err := b.OpenLvol("work", false)
	if err != nil {
		t.Fatal(err)
	}
	for i := range 1024 {
		if _, err := d.WriteAt(block(i), int64(i)*4096); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(d.Flush(), d.Close()); err != nil {
		t.Fatal(err)
	}
	_, err = b.Snapshot("work", "block")
	for i := range 4 {
		if err == nil {
			_, err = b.Clone("block", fmt.Sprintf("w-%d", i))
		}
	}
	if err != nil {
		t.Fatal(err)
	}
}

// load reads and writes a device until stop and compares.
func load(d bdev.Device, seed uint64, writes bool, ops *atomic.Int64, stop <-chan struct{}) error {
	r := rand.New(rand.NewPCG(seed, 1))
	now := map[int]int{}
	p := make([]byte, 4096)
	for {
		select {
		case <-stop:
			return nil
		default:
		}
		i := r.IntN(1024)
		if writes && r.IntN(2) == 0 {
			v := r.IntN(60000)
			if _, err := d.WriteAt(block(v), int64(i)*4096); err != nil {
				return fmt.Errorf("write: %w", err)
			}
			now[i] = v
		} else {
			if _, err := d.ReadAt(p, int64(i)*4096); err != nil {
				return fmt.Errorf("read: %w", err)
			}
			want, written := now[i]
			if !written {
				want = i
			}
			if !bytes.Equal(p, block(want)) {
				return fmt.Errorf("block %d has %x, want %x", i, p[:4], block(want)[:4])
			}
		}
		ops.Add(1)
	}
}

// TestKillTarget kills a target that forgets all, in the middle of what nodes and the
// attacher read and write: nobody sees more than a pause.
func TestKillTarget(t *testing.T) { killUnderLoad(t, childTarget, true, false) }

// TestKillKeepingTarget kills a target that restores what it was told by itself.
func TestKillKeepingTarget(t *testing.T) { killUnderLoad(t, childKeeping, true, false) }

// TestKillBridge kills the bridge: I/O does not pass through it.
func TestKillBridge(t *testing.T) { killUnderLoad(t, childTarget, false, true) }

// TestKillBoth kills both at once.
func TestKillBoth(t *testing.T) { killUnderLoad(t, childTarget, true, true) }

func killUnderLoad(t *testing.T, child string, killTarget, killBridge bool) {
	p := newPlace(t)
	tg := spawn(t, child, p.root, "target")
	br := spawn(t, childBridge, p.root, "bridge")
	conn := p.conn(t)
	b := p.open(t, conn)
	defer b.Close()
	x := b.Exporter()
	if err := x.Restore(nil); err != nil {
		t.Fatal(err)
	}
	prepare(t, b)

	var devices []bdev.Device
	var exports []attacher.Export
	for i := range 6 {
		e := attacher.Export{Node: fmt.Sprintf("node-%d", i/2), Block: "block", NSID: 1, Transport: attacher.TransportTCP}
		if i%2 == 1 {
			e.Block, e.NSID, e.Writable = fmt.Sprintf("w-%d", i/2), 2, true
		}
		exports = append(exports, e)
		told, err := x.Export(e, "")
		if err != nil {
			t.Fatal(err)
		}
		d, err := backendtest.OpenNVMe(t.Context(), e.Node, told)
		if err != nil {
			t.Fatal(err)
		}
		devices = append(devices, d)
	}
	own, err := b.OpenLvol("w-3", false)
	if err != nil {
		t.Fatal(err)
	}
	devices = append(devices, own)
	ops := make([]atomic.Int64, len(devices))
	stop := make(chan struct{})
	var running sync.WaitGroup
	for i, d := range devices {
		running.Go(func() {
			if err := load(d, uint64(i), i%2 == 1 || i == 6, &ops[i], stop); err != nil {
				t.Errorf("device %d: %v", i, err)
			}
		})
	}
	for round := range 3 {
		time.Sleep(200 * time.Millisecond)
		if killTarget {
			tg.kill()
		}
		if killBridge {
			br.kill()
		}
		time.Sleep(time.Duration(round) * 300 * time.Millisecond)
		begin := time.Now()
		if killBridge {
			br.start()
		}
		if killTarget {
			tg.start()
		}
		before := make([]int64, len(ops))
		for i := range ops {
			before[i] = ops[i].Load()
		}
		// A new export at the worst moment must not keep the others from coming back whole.
		late := attacher.Export{Node: "node-0", Block: "block", NSID: uint32(10 + round), Transport: attacher.TransportTCP}
		late.Node = fmt.Sprintf("late-%d", round)
		if _, err := x.Export(late, ""); err != nil {
			t.Errorf("round %d: export: %v", round, err)
		}
		if i, err := b.Get("block"); err != nil || !i.Snapshot {
			t.Errorf("round %d: get: %+v, %v", round, i, err)
		}
		if _, err := b.Get("none"); !errors.Is(err, kind.NotFound) {
			t.Errorf("round %d: get nothing: %v", round, err)
		}
		if list, err := b.List(); err != nil || len(list) != 6 {
			t.Errorf("round %d: list: %d, %v", round, len(list), err)
		}
		for i := range ops {
			for ops[i].Load() <= before[i]+2 && time.Since(begin) < within && !t.Failed() {
				time.Sleep(time.Millisecond)
			}
			if ops[i].Load() <= before[i]+2 {
				t.Fatalf("round %d: device %d is not back after %s", round, i, time.Since(begin))
			}
		}
		t.Logf("round %d: all is back after %s", round, time.Since(begin).Round(time.Millisecond))
	}
	close(stop)
	running.Wait()
	for _, d := range devices {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	}
	for _, e := range exports {
		if err := x.Withdraw(e); err != nil {
			t.Error(err)
		}
	}
	if err := b.Delete("w-0"); err != nil {
		t.Error(err)
	}
}

// TestKilledAttacher: what a killed predecessor had open or half shown goes, what nodes
// have stays.
func TestKilledAttacher(t *testing.T) {
	p := newPlace(t)
	p.serve(t, nil)
	conn := p.conn(t)
	b := p.open(t, conn)
	x := b.Exporter()
	if err := x.Restore(nil); err != nil {
		t.Fatal(err)
	}
	prepare(t, b)
	e := attacher.Export{Node: "node-1", Block: "block", NSID: 1, Transport: attacher.TransportTCP}
	told, err := x.Export(e, "")
	if err != nil {
		t.Fatal(err)
	}
	node, err := backendtest.OpenNVMe(t.Context(), "node-1", told)
	if err != nil {
		t.Fatal(err)
	}
	defer node.Close()
	if _, err := b.OpenLvol("w-0", false); err != nil {
		t.Fatal(err)
	}
	b.Kill()
	b = p.open(t, conn)
	if err := b.Delete("w-0"); err != nil {
		t.Error(err)
	}
	got := make([]byte, 4096)
	if _, err := node.ReadAt(got, 4096); err != nil || !bytes.Equal(got, block(1)) {
		t.Errorf("a node before Restore: %v", err)
	}
	if err := b.Exporter().Restore([]attacher.Export{e}); err != nil {
		t.Fatal(err)
	}
	if _, err := node.ReadAt(got, 8192); err != nil || !bytes.Equal(got, block(2)) {
		t.Errorf("a node after Restore: %v", err)
	}
	if err := b.Close(); err != nil {
		t.Error(err)
	}
	if _, err := node.ReadAt(got, 4096); err != nil {
		t.Errorf("a node without an attacher: %v", err)
	}
}

// TestAway is a backend whose bridge and target come late, and go.
func TestAway(t *testing.T) {
	p := newPlace(t)
	conn := p.conn(t)
	o := p.options(conn)
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	_, err := spdk.New(ctx, o)
	cancel()
	if !errors.Is(err, kind.Unavailable) {
		t.Errorf("nobody there: %v", err)
	}
	come := time.AfterFunc(300*time.Millisecond, func() { p.serve(t, nil) })
	defer come.Stop()
	o.Create = false
	ctx, cancel = context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if _, err := spdk.New(ctx, o); !errors.Is(err, kind.NotFound) {
		t.Errorf("a device without an lvstore: %v", err)
	}
	o.Create, o.Patience = true, 100*time.Millisecond
	b, err := spdk.New(ctx, o)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	o.Create = false
	again, err := spdk.New(ctx, o)
	if err != nil {
		t.Fatal(err)
	}
	if err := again.Close(); err != nil {
		t.Error(err)
	}
}

func TestOptions(t *testing.T) {
	p := newPlace(t)
	conn := p.conn(t)
	for _, change := range []func(*spdk.Options){
		func(o *spdk.Options) { o.Conn = nil },
		func(o *spdk.Options) { o.LvStore = "" },
		func(o *spdk.Options) { o.LvStore = "a/b" },
		func(o *spdk.Options) { o.AIO = "" },
		func(o *spdk.Options) { o.Portals = []string{"127.0.0.1:4420"} },
		func(o *spdk.Options) { o.Portals = []string{"tcp://127.0.0.1"} },
		func(o *spdk.Options) { o.Portals = []string{"fc://127.0.0.1:1"} },
		func(o *spdk.Options) { o.Portals = []string{"tcp://host:1"} },
		func(o *spdk.Options) { o.Portals = make([]string, 17) },
		func(o *spdk.Options) { o.Own = "rdma://127.0.0.1:4420" },
		func(o *spdk.Options) { o.Timeout = -1 },
	} {
		o := p.options(conn)
		change(&o)
		if _, err := spdk.New(t.Context(), o); !errors.Is(err, kind.Invalid) {
			t.Errorf("%+v: %v", o, err)
		}
	}
}

// TestPortals has a portal of any address, one of IPv6, and one for the attacher alone.
func TestPortals(t *testing.T) {
	p := newPlace(t)
	p.serve(t, nil)
	o := p.options(p.conn(t))
	o.Portals = []string{"tcp://0.0.0.0:" + freePort(t), "tcp://[::1]:" + freePort(t), "rdma://127.0.0.1:4420"}
	o.Own = "tcp://[::]:" + freePort(t)
	b, err := spdk.New(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	x := b.Exporter()
	if got := x.Transports(); len(got) != 2 || got[0] != attacher.TransportTCP || got[1] != attacher.TransportRDMA {
		t.Errorf("transports %v", got)
	}
	if err := x.Restore(nil); err != nil {
		t.Fatal(err)
	}
	prepare(t, b)
	e := attacher.Export{Node: "node-1", Block: "block", NSID: 1, Transport: attacher.TransportTCP}
	told, err := x.Export(e, "127.0.0.1")
	if err != nil {
		t.Fatal(err)
	}
	if len(told.Portals) != 2 || told.Portals[0].Address != "127.0.0.1" || told.Portals[1].Address != "::1" || told.Portals[0].Transport != "tcp" {
		t.Errorf("%+v", told)
	}
	for _, at := range told.Portals {
		one := told
		one.Portals = []attacher.Portal{at}
		d, err := backendtest.OpenNVMe(t.Context(), "node-1", one)
		if err != nil {
			t.Errorf("at %+v: %v", at, err)
			continue
		}
		got := make([]byte, 4096)
		if _, err := d.ReadAt(got, 4096); err != nil || !bytes.Equal(got, block(1)) {
			t.Errorf("at %+v: %v", at, err)
		}
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	}
	// This target has no RDMA, and what cannot be shown leaves nothing.
	e.Node, e.Transport = "node-2", attacher.TransportRDMA
	if _, err := x.Export(e, ""); err == nil || errors.Is(err, kind.Unavailable) {
		t.Errorf("over RDMA: %v", err)
	}
	for _, bad := range []attacher.Export{
		{Node: "node-2", Block: "block", NSID: 0}, {Node: "node-2", Block: "block", NSID: attacher.MaxAttachments + 1},
		{Node: "Node", Block: "block", NSID: 1}, {Node: "../x", Block: "block", NSID: 1}, {Node: "", Block: "block", NSID: 1},
	} {
		if _, err := x.Export(bad, ""); !errors.Is(err, kind.Invalid) {
			t.Errorf("%+v: %v", bad, err)
		}
	}
	if _, err := x.Export(attacher.Export{Node: "node-2", Block: "block", NSID: 1, Transport: "fc"}, ""); !errors.Is(err, kind.Unsupported) {
		t.Errorf("over FC: %v", err)
	}
	if nodes, lvols := x.Attached(); nodes != 1 || lvols != 1 {
		t.Errorf("%d nodes have %d lvols", nodes, lvols)
	}
}
