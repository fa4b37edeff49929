package spdk_test

import (
	"context"
	"encoding/json"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"

	lvolv1 "github.com/thaw-project/thaw/api/lvol/v1"
	"github.com/thaw-project/thaw/attacher"
	"github.com/thaw-project/thaw/attacher/backend/backendtest"
	"github.com/thaw-project/thaw/attacher/backend/spdk"
	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/target/rpc"
)

// TestRefusedForAMoment: what a request that is still on its way in the target has is free
// again soon, and no reason to give up; what stays refused is.
func TestRefusedForAMoment(t *testing.T) {
	var refusals atomic.Int64
	p := newPlace(t)
	p.serve(t, func(methods map[string]rpc.Method) {
		m := methods["nvmf_subsystem_add_ns"]
		add := m.Handle
		m.Handle = func(ctx context.Context, params json.RawMessage) (any, error) {
			if refusals.Add(-1) >= 0 {
				return nil, rpc.InvalidParams(kind.Errorf(kind.InUse, "somebody else has it"))
			}
			return add(ctx, params)
		}
		methods["nvmf_subsystem_add_ns"] = m
	})
	b := p.open(t, p.conn(t))
	defer b.Close()
	if err := b.Exporter().Restore(nil); err != nil {
		t.Fatal(err)
	}
	if _, err := b.Create("w", 1<<20); err != nil {
		t.Fatal(err)
	}
	refusals.Store(4)
	told, err := b.Exporter().Export(writer, "")
	if err != nil {
		t.Fatal(err)
	}
	d, err := backendtest.OpenNVMe(t.Context(), writer.Node, told)
	if err != nil {
		t.Fatal(err)
	}
	d.Close()
	if err := b.Exporter().Withdraw(writer); err != nil {
		t.Fatal(err)
	}
	refusals.Store(1000)
	if _, err = b.Exporter().Export(writer, ""); err == nil || !strings.Contains(err.Error(), "-32602") {
		t.Fatalf("what the target refuses was shown: %v", err)
	}
	refusals.Store(0)
	if nodes, lvols := b.Exporter().Attached(); nodes != 0 || lvols != 0 {
		t.Errorf("%d lvols on %d nodes", lvols, nodes)
	}
	if err := b.Delete("w"); err != nil {
		t.Error(err)
	}
}

// deaf is a connection that does not hear that a stand-in was deleted.
type deaf struct {
	*grpc.ClientConn
	on atomic.Bool
}

func (c *deaf) Invoke(ctx context.Context, method string, args, reply any, opts ...grpc.CallOption) error {
	err := c.ClientConn.Invoke(ctx, method, args, reply, opts...)
	if r, ok := args.(*lvolv1.DeleteLvolRequest); ok && c.on.Load() && strings.Contains(r.GetName(), "/lvols/thaw-export-") {
		return errDead
	}
	return err
}

// TestStandInGone: a stand-in that was deleted without the attacher hearing of it is made
// anew when its node has the block again.
func TestStandInGone(t *testing.T) {
	p := newPlace(t)
	p.serve(t, once)
	conn := &deaf{ClientConn: p.conn(t)}
	o := p.options(conn)
	o.Patience = 2 * time.Second
	b, err := spdk.New(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	x := b.Exporter()
	if err := x.Restore(nil); err != nil {
		t.Fatal(err)
	}
	if _, err = b.Create("work", 1<<20); err == nil {
		_, err = b.Snapshot("work", "block")
	}
	if err != nil {
		t.Fatal(err)
	}
	one, two := toNode1, toNode2
	one.Block, two.Block = "block", "block"
	for _, e := range []attacher.Export{one, two} {
		if _, err := x.Export(e, ""); err != nil {
			t.Fatal(err)
		}
	}
	conn.on.Store(true)
	if err := x.Withdraw(two); err == nil {
		t.Fatal("the withdrawal heard that the stand-in is deleted")
	}
	conn.on.Store(false)
	told, err := x.Export(two, "")
	if err != nil {
		t.Fatal(err)
	}
	d, err := backendtest.OpenNVMe(t.Context(), two.Node, told)
	if err != nil {
		t.Fatal(err)
	}
	d.Close()
	for _, e := range []attacher.Export{one, two} {
		if err := x.Withdraw(e); err != nil {
			t.Error(err)
		}
	}
}

// TestStillLoading: an lvol that the target lists and has no bdev of, for it was killed in
// between or is still being started, is waited for, and never taken for one of no size.
func TestStillLoading(t *testing.T) {
	var missing atomic.Int64
	p := newPlace(t)
	p.serve(t, func(methods map[string]rpc.Method) {
		m := methods["bdev_get_bdevs"]
		get := m.Handle
		m.Handle = func(ctx context.Context, params json.RawMessage) (any, error) {
			if strings.Contains(string(params), "/w") && missing.Add(-1) >= 0 {
				return nil, rpc.Errno(unix.ENODEV, nil)
			}
			return get(ctx, params)
		}
		methods["bdev_get_bdevs"] = m
	})
	b := p.open(t, p.conn(t))
	defer b.Close()
	if err := b.Exporter().Restore(nil); err != nil {
		t.Fatal(err)
	}
	if _, err := b.Create("w", 1<<20); err != nil {
		t.Fatal(err)
	}
	missing.Store(8)
	info, err := b.Get("w")
	if err != nil || info.SizeBytes != 1<<20 {
		t.Fatalf("an lvol that is being loaded has %d bytes: %v", info.SizeBytes, err)
	}
	if missing.Load() >= 0 {
		t.Fatal("nobody asked for the bdev")
	}
	missing.Store(8)
	told, err := b.Exporter().Export(writer, "")
	if err != nil || told.SizeBytes != 1<<20 {
		t.Fatalf("it is exported with %d bytes: %v", told.SizeBytes, err)
	}
}
