package opi_test

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"

	opiv1 "github.com/opiproject/opi-api/storage/v1alpha1/gen/go"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	lvolv1 "github.com/thaw-project/thaw/api/lvol/v1"
	"github.com/thaw-project/thaw/spdk"
	"github.com/thaw-project/thaw/target/rpc"
)

// cutter stands between a bridge and its target and cuts the connection at one call:
// before the target gets it, or after the target has answered it and the bridge has not.
type cutter struct {
	target string

	mu    sync.Mutex
	at    int  // guarded by mu, as are all below: calls until the cut; negative for none
	after bool // cut after the target's answer
	cut   string
}

func (c *cutter) arm(at int, after bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.at, c.after, c.cut = at, after, ""
}

// now tells whether to cut at a call.
func (c *cutter) now(method string, after bool) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if after != c.after {
		return false
	}
	c.at--
	if c.at != -1 {
		return false
	}
	c.cut = method
	return true
}

func (c *cutter) reached() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.cut
}

func (c *cutter) serve(t *testing.T, path string) {
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	var owned sync.WaitGroup
	t.Cleanup(func() {
		l.Close()
		owned.Wait()
	})
	owned.Go(func() {
		for {
			nc, err := l.Accept()
			if err != nil {
				return
			}
			owned.Go(func() {
				defer nc.Close()
				c.relay(nc)
			})
		}
	})
}

// relay passes on one call after the other.
func (c *cutter) relay(near net.Conn) {
	far, err := net.Dial("unix", c.target)
	if err != nil {
		return
	}
	defer far.Close()
	requests, answers := bufio.NewReader(near), bufio.NewReader(far)
	for {
		request, err := requests.ReadBytes('\n')
		var r struct{ Method string }
		if err != nil || json.Unmarshal(request, &r) != nil || c.now(r.Method, false) {
			return
		}
		if _, err := far.Write(request); err != nil {
			return
		}
		answer, err := answers.ReadBytes('\n')
		if err != nil || c.now(r.Method, true) {
			return
		}
		if _, err := near.Write(answer); err != nil {
			return
		}
	}
}

// TestEveryStep cuts the connection at every call that a life of a disk takes, before and
// after the target did what it asks. Each request is repeated until it is answered, and
// in the end everything is as if nothing had happened.
func TestEveryStep(t *testing.T) {
	root := shortDir(t)
	stop, err := serveTarget(root, false)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { stop() })
	behind := filepath.Join(root, "behind")
	if err := os.Mkdir(behind, 0o700); err != nil {
		t.Fatal(err)
	}
	c := &cutter{target: filepath.Join(root, "target"), at: -1}
	c.serve(t, filepath.Join(behind, "target"))
	stopBridge, err := serveBridge(behind, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer stopBridge()
	l := newLab(t, behind)
	life(t, l, freePort(t)) // unhurt
	step := 3               // a sample, unless all are asked for
	if os.Getenv("THAW_TEST_EVERY_STEP") != "" {
		step = 1
	}
	for i, after := range []bool{false, true} {
		cuts := i
		for ; ; cuts += step {
			c.arm(cuts, after)
			life(t, l, freePort(t))
			if c.reached() == "" {
				break
			}
			if t.Failed() {
				t.Fatalf("cut at call %d, %s, after the answer: %t", cuts, c.reached(), after)
			}
		}
		t.Logf("%d calls, every %d. cut, after the answer: %t", cuts, step, after)
		if cuts < 50 {
			t.Errorf("only %d calls", cuts)
		}
	}
}

// life is what an attacher does with a disk: it makes it, shows it, and takes all away.
func life(t *testing.T, l *lab, port string) {
	t.Helper()
	until := func(what string, call func(ctx context.Context) error) {
		t.Helper()
		for range 10 {
			switch err := call(t.Context()); status.Code(err) {
			case codes.OK:
				return
			case codes.Unavailable:
			default:
				t.Errorf("%s: %v", what, err)
				return
			}
		}
		t.Errorf("%s: no answer", what)
	}
	fe, lv := l.fe, l.lvol
	until("volume", func(ctx context.Context) error {
		_, err := l.malloc.CreateMallocVolume(ctx, &opiv1.CreateMallocVolumeRequest{MallocVolumeId: "m", MallocVolume: &opiv1.MallocVolume{BlockSize: 4096, BlocksCount: 16 << 8}})
		return err
	})
	until("lvstore", func(ctx context.Context) error {
		_, err := lv.CreateLvolStore(ctx, &lvolv1.CreateLvolStoreRequest{LvolStoreId: "s", LvolStore: &lvolv1.LvolStore{VolumeNameRef: "m", ClusterSizeBytes: cluster}})
		return err
	})
	until("lvol", func(ctx context.Context) error {
		_, err := lv.CreateLvol(ctx, &lvolv1.CreateLvolRequest{Parent: store, LvolId: "x", Lvol: &lvolv1.Lvol{SizeBytes: cluster}})
		return err
	})
	for _, id := range []string{"s1", "s2"} {
		until(id, func(ctx context.Context) error {
			_, err := lv.SnapshotLvol(ctx, &lvolv1.SnapshotLvolRequest{Name: lvolName("x"), SnapshotId: id})
			return err
		})
	}
	until("clone", func(ctx context.Context) error {
		_, err := lv.CloneLvol(ctx, &lvolv1.CloneLvolRequest{Name: lvolName("s2"), LvolId: "c"})
		return err
	})
	until("decouple", func(ctx context.Context) error {
		v, err := lv.DecoupleLvol(ctx, &lvolv1.DecoupleLvolRequest{Name: lvolName("c"), Parent: lvolName("s2")})
		if err == nil && v.Parent != lvolName("s1") {
			t.Errorf("decoupled: %v", v)
		}
		return err
	})
	until("subsystem", func(ctx context.Context) error {
		_, err := fe.CreateNvmeSubsystem(ctx, &opiv1.CreateNvmeSubsystemRequest{NvmeSubsystem: &opiv1.NvmeSubsystem{Spec: &opiv1.NvmeSubsystemSpec{Nqn: nqn, Hostnqn: hostNQN}}})
		return err
	})
	until("nvmeNamespace", func(ctx context.Context) error {
		_, err := fe.CreateNvmeNamespace(ctx, &opiv1.CreateNvmeNamespaceRequest{Parent: sub, NvmeNamespace: &opiv1.NvmeNamespace{Spec: &opiv1.NvmeNamespaceSpec{Uuid: uid, Nguid: nguid, VolumeNameRef: lvolName("c")}}})
		return err
	})
	until("controller", func(ctx context.Context) error {
		_, err := fe.CreateNvmeController(ctx, &opiv1.CreateNvmeControllerRequest{Parent: sub, NvmeController: fabrics(port)})
		return err
	})
	until("look", func(ctx context.Context) error {
		s, err := fe.GetNvmeSubsystem(ctx, &opiv1.GetNvmeSubsystemRequest{Name: sub})
		if err != nil {
			return err
		}
		n, err := fe.ListNvmeNamespaces(ctx, &opiv1.ListNvmeNamespacesRequest{Parent: sub})
		if err != nil {
			return err
		}
		c, err := fe.ListNvmeControllers(ctx, &opiv1.ListNvmeControllersRequest{Parent: sub})
		if err == nil && (s.Spec.Hostnqn != hostNQN || len(n.NvmeNamespaces) != 1 || n.NvmeNamespaces[0].Spec.VolumeNameRef != lvolName("c") || len(c.NvmeControllers) != 1) {
			t.Errorf("%v %v %v", s, n, c)
		}
		return err
	})
	until("delete controller", func(ctx context.Context) error {
		_, err := fe.DeleteNvmeController(ctx, &opiv1.DeleteNvmeControllerRequest{Name: sub + "/nvmeControllers/tcp:127.0.0.1:" + port, AllowMissing: true})
		return err
	})
	until("delete nvmeNamespace", func(ctx context.Context) error {
		_, err := fe.DeleteNvmeNamespace(ctx, &opiv1.DeleteNvmeNamespaceRequest{Name: sub + "/nvmeNamespaces/" + uid, AllowMissing: true})
		return err
	})
	until("delete subsystem", func(ctx context.Context) error {
		_, err := fe.DeleteNvmeSubsystem(ctx, &opiv1.DeleteNvmeSubsystemRequest{Name: sub, AllowMissing: true})
		return err
	})
	for _, id := range []string{"c", "x", "s2", "s1"} {
		until("delete "+id, func(ctx context.Context) error {
			_, err := lv.DeleteLvol(ctx, &lvolv1.DeleteLvolRequest{Name: lvolName(id), AllowMissing: true})
			return err
		})
	}
	until("delete volume", func(ctx context.Context) error {
		_, err := l.malloc.DeleteMallocVolume(ctx, &opiv1.DeleteMallocVolumeRequest{Name: "mallocVolumes/m", AllowMissing: true})
		return err
	})
	until("nothing is left", func(ctx context.Context) error {
		r, err := l.malloc.ListMallocVolumes(ctx, &opiv1.ListMallocVolumesRequest{})
		if err == nil && len(r.MallocVolumes) > 0 {
			t.Errorf("%v", r)
		}
		return err
	})
}

// TestConcurrent has many callers of two bridges ask for the same: all get it.
func TestConcurrent(t *testing.T) {
	l := start(t, nil)
	second := shortDir(t)
	if err := os.Symlink(filepath.Join(l.root, "target"), filepath.Join(second, "target")); err != nil {
		t.Fatal(err)
	}
	stop, err := serveBridge(second, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(stop)
	labs := []*lab{l, newLab(t, second)}
	port := freePort(t)
	var owned sync.WaitGroup
	var mu sync.Mutex
	var got []*opiv1.NvmeNamespace
	for i := range 16 {
		owned.Go(func() {
			l := labs[i%2]
			fail := func(err error) bool {
				if err != nil {
					t.Error(err)
				}
				return err != nil
			}
			ctx := t.Context()
			_, err := l.malloc.CreateMallocVolume(ctx, &opiv1.CreateMallocVolumeRequest{MallocVolumeId: "m", MallocVolume: &opiv1.MallocVolume{BlockSize: 4096, BlocksCount: 16}})
			if fail(err) {
				return
			}
			_, err = l.fe.CreateNvmeSubsystem(ctx, &opiv1.CreateNvmeSubsystemRequest{NvmeSubsystem: &opiv1.NvmeSubsystem{Spec: &opiv1.NvmeSubsystemSpec{Nqn: nqn, Hostnqn: hostNQN}}})
			if fail(err) {
				return
			}
			n, err := l.fe.CreateNvmeNamespace(ctx, &opiv1.CreateNvmeNamespaceRequest{Parent: sub, NvmeNamespace: &opiv1.NvmeNamespace{Spec: &opiv1.NvmeNamespaceSpec{Uuid: uid, VolumeNameRef: "m"}}})
			if fail(err) {
				return
			}
			_, err = l.fe.CreateNvmeController(ctx, &opiv1.CreateNvmeControllerRequest{Parent: sub, NvmeController: fabrics(port)})
			fail(err)
			mu.Lock()
			defer mu.Unlock()
			got = append(got, n)
		})
	}
	owned.Wait()
	for _, n := range got {
		if !proto.Equal(n, got[0]) {
			t.Errorf("%v and %v", n, got[0])
		}
	}
}

// beyond adds methods that this target does not have, with answers in SPDK's shapes.
func beyond(m map[string]rpc.Method) map[string]rpc.Method {
	var mu sync.Mutex
	extra := map[string]spdk.Bdev{}
	product := func(name string) rpc.Method {
		return rpc.Method{Handle: func(_ context.Context, params json.RawMessage) (any, error) {
			var p struct {
				Name      string
				NumBlocks uint64 `json:"num_blocks"`
				BlockSize uint32 `json:"block_size"`
			}
			if err := json.Unmarshal(params, &p); err != nil {
				return nil, err
			}
			mu.Lock()
			defer mu.Unlock()
			if _, ok := extra[p.Name]; ok {
				return nil, rpc.Internal("", fmt.Errorf("exists"))
			}
			extra[p.Name] = spdk.Bdev{Name: p.Name, ProductName: name, BlockSizeBytes: p.BlockSize, NumBlocks: max(p.NumBlocks, 1), UUID: uid}
			return p.Name, nil
		}}
	}
	remove := rpc.Method{Handle: func(_ context.Context, params json.RawMessage) (any, error) {
		var p struct{ Name string }
		if err := json.Unmarshal(params, &p); err != nil {
			return nil, err
		}
		mu.Lock()
		defer mu.Unlock()
		delete(extra, p.Name)
		return true, nil
	}}
	m["bdev_null_create"], m["bdev_null_delete"] = product(spdk.ProductNull), remove
	m["bdev_rbd_create"], m["bdev_rbd_delete"] = product(spdk.ProductRBD), remove
	get := m["bdev_get_bdevs"].Handle
	m["bdev_get_bdevs"] = rpc.Method{Handle: func(ctx context.Context, params json.RawMessage) (any, error) {
		var p struct{ Name string }
		if err := json.Unmarshal(params, &p); err != nil {
			return nil, err
		}
		mu.Lock()
		defer mu.Unlock()
		var list []any
		for _, b := range extra {
			if p.Name == "" || p.Name == b.Name {
				specific := fmt.Sprintf(`{"name":%q,"product_name":%q,"aliases":[],"block_size":%d,"num_blocks":%d,"uuid":%q,"driver_specific":{"rbd":{"pool_name":"p","rbd_name":"i","cluster_name":"c"}}}`,
					b.Name, b.ProductName, b.BlockSizeBytes, b.NumBlocks, b.UUID)
				list = append(list, json.RawMessage(specific))
			}
		}
		if len(list) > 0 {
			return list, nil
		}
		return get(ctx, params)
	}}
	m["bdev_get_iostat"] = rpc.Method{Handle: func(context.Context, json.RawMessage) (any, error) {
		return json.RawMessage(`{"tick_rate":1000,"ticks":7,"bdevs":[{"name":"m0","bytes_read":4096,"num_read_ops":1,"bytes_written":8589934592,"num_write_ops":2,
			"bytes_unmapped":3,"num_unmap_ops":4,"read_latency_ticks":5,"write_latency_ticks":6,"unmap_latency_ticks":7},{"name":"other","bytes_read":1}]}`), nil
	}}
	return m
}

// TestBeyond goes through what only SPDK has.
func TestBeyond(t *testing.T) {
	root := shortDir(t)
	stop, err := serveMethods(root, false, beyond)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { stop() })
	stopBridge, err := serveBridge(root, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(stopBridge)
	l, ctx := newLab(t, root), t.Context()
	m := l.mallocVolume("m0")
	stats := must[*opiv1.StatsMallocVolumeResponse](t)(l.malloc.StatsMallocVolume(ctx, &opiv1.StatsMallocVolumeRequest{Name: m.Name})).Stats
	if stats.ReadBytesCount != 4096 || stats.WriteBytesCount != 1<<31-1 || stats.UnmapOpsCount != 4 || stats.WriteLatencyTicks != 6 {
		t.Errorf("%v", stats)
	}
	l.subsystem(nqn)
	n := must[*opiv1.NvmeNamespace](t)(l.fe.CreateNvmeNamespace(ctx, &opiv1.CreateNvmeNamespaceRequest{Parent: sub, NvmeNamespace: &opiv1.NvmeNamespace{Spec: &opiv1.NvmeNamespaceSpec{VolumeNameRef: "m0"}}}))
	if s := must[*opiv1.StatsNvmeNamespaceResponse](t)(l.fe.StatsNvmeNamespace(ctx, &opiv1.StatsNvmeNamespaceRequest{Name: n.Name})); s.Stats.ReadOpsCount != 1 {
		t.Errorf("%v", s)
	}
	if s := must[*opiv1.StatsNvmeSubsystemResponse](t)(l.fe.StatsNvmeSubsystem(ctx, &opiv1.StatsNvmeSubsystemRequest{Name: sub})); s.Stats.ReadOpsCount != 1 {
		t.Errorf("%v", s)
	}
	for range 2 {
		v := must[*opiv1.NullVolume](t)(l.null.CreateNullVolume(ctx, &opiv1.CreateNullVolumeRequest{NullVolumeId: "n0", NullVolume: &opiv1.NullVolume{BlockSize: 512, BlocksCount: 8}}))
		if v.BlocksCount != 8 || v.Name != "nullVolumes/n0" {
			t.Errorf("%v", v)
		}
		r := must[*lvolv1.RbdVolume](t)(l.lvol.CreateRbdVolume(ctx, &lvolv1.CreateRbdVolumeRequest{RbdVolumeId: "r0", RbdVolume: &lvolv1.RbdVolume{Pool: "p", Image: "i", Cluster: "c"}}))
		if r.Pool != "p" || r.Cluster != "c" || r.BlockSize != 4096 {
			t.Errorf("%v", r)
		}
	}
	want[*lvolv1.RbdVolume](t, codes.AlreadyExists)(l.lvol.CreateRbdVolume(ctx, &lvolv1.CreateRbdVolumeRequest{RbdVolumeId: "r0", RbdVolume: &lvolv1.RbdVolume{Pool: "p", Image: "j"}}))
	want[*lvolv1.RbdVolume](t, codes.AlreadyExists)(l.lvol.CreateRbdVolume(ctx, &lvolv1.CreateRbdVolumeRequest{RbdVolumeId: "n0", RbdVolume: &lvolv1.RbdVolume{Pool: "p", Image: "i"}}))
	if r := must[*lvolv1.ListRbdVolumesResponse](t)(l.lvol.ListRbdVolumes(ctx, &lvolv1.ListRbdVolumesRequest{})); len(r.RbdVolumes) != 1 {
		t.Errorf("%v", r)
	}
	if _, err := l.null.DeleteNullVolume(ctx, &opiv1.DeleteNullVolumeRequest{Name: "nullVolumes/n0"}); err != nil {
		t.Error(err)
	}
	if _, err := l.lvol.DeleteRbdVolume(ctx, &lvolv1.DeleteRbdVolumeRequest{Name: "rbdVolumes/r0"}); err != nil {
		t.Error(err)
	}
}
