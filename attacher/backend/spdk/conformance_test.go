package spdk_test

import (
	"context"
	"encoding/json"
	"errors"
	"sync"
	"testing"

	opiv1 "github.com/opiproject/opi-api/storage/v1alpha1/gen/go"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"github.com/thaw-project/thaw/attacher/backend/backendtest"
	"github.com/thaw-project/thaw/target/rpc"
)

// fixture is the backend over a target and a bridge in this process, which are reached
// by their sockets.
func fixture(t *testing.T, change func(map[string]rpc.Method)) *backendtest.Fixture {
	p := newPlace(t)
	p.serve(t, change)
	conn := p.conn(t)
	b := p.open(t, conn)
	t.Cleanup(func() {
		if err := b.Close(); err != nil {
			t.Error(err)
		}
	})
	f := &backendtest.Fixture{Backend: b, Exporter: b.Exporter(), UnitBytes: 1 << 20, CapacityBytes: capacity}
	f.Restart = func(t *testing.T) {
		b.Kill()
		b = p.open(t, conn)
		f.Backend, f.Exporter = b, b.Exporter()
	}
	f.Stranger = func(t *testing.T) func(*testing.T) { return stranger(t, conn) }
	return f
}

// TestThroughOPI is the embedded target through the bridge.
func TestThroughOPI(t *testing.T) {
	backendtest.Run(t, func(t *testing.T) *backendtest.Fixture { return fixture(t, nil) })
}

// once makes a target show each volume in one subsystem only, as SPDK does, also one that
// nobody can write.
func once(m map[string]rpc.Method) {
	add, get := m["nvmf_subsystem_add_ns"].Handle, m["bdev_get_bdevs"].Handle
	var mu sync.Mutex
	m["nvmf_subsystem_add_ns"] = rpc.Method{Handle: func(ctx context.Context, params json.RawMessage) (any, error) {
		mu.Lock()
		defer mu.Unlock()
		var p struct {
			Namespace struct {
				BdevName string `json:"bdev_name"`
			} `json:"namespace"`
		}
		if err := json.Unmarshal(params, &p); err != nil {
			return nil, err
		}
		name, err := json.Marshal(map[string]string{"name": p.Namespace.BdevName})
		if err != nil {
			return nil, err
		}
		if found, err := get(ctx, name); err == nil {
			var bdevs []struct {
				Claimed bool `json:"claimed"`
			}
			raw, err := json.Marshal(found)
			if err := errors.Join(err, json.Unmarshal(raw, &bdevs)); err != nil {
				return nil, err
			}
			if bdevs[0].Claimed {
				return nil, rpc.InvalidParams(errors.New("bdev is claimed"))
			}
		}
		return add(ctx, params)
	}}
}

// TestThroughOPIOnce is such a target: the second node that has a block gets a clone of it.
func TestThroughOPIOnce(t *testing.T) {
	backendtest.Run(t, func(t *testing.T) *backendtest.Fixture { return fixture(t, once) })
}

// stranger makes a subsystem of another store in the same target.
func stranger(t *testing.T, conn *grpc.ClientConn) (unharmed func(*testing.T)) {
	fe, malloc := opiv1.NewFrontendNvmeServiceClient(conn), opiv1.NewMallocVolumeServiceClient(conn)
	const nqn = "nqn.2025-01.io.github.thaw-project:11111111-2222-4333-8444-555555555555:node-1"
	s, err := fe.CreateNvmeSubsystem(t.Context(), &opiv1.CreateNvmeSubsystemRequest{NvmeSubsystem: &opiv1.NvmeSubsystem{
		Spec: &opiv1.NvmeSubsystemSpec{Nqn: nqn, Hostnqn: "nqn.2014-08.org.example:host"}}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := malloc.CreateMallocVolume(t.Context(), &opiv1.CreateMallocVolumeRequest{MallocVolumeId: "theirs", MallocVolume: &opiv1.MallocVolume{BlockSize: 4096, BlocksCount: 256}}); err != nil {
		t.Fatal(err)
	}
	n, err := fe.CreateNvmeNamespace(t.Context(), &opiv1.CreateNvmeNamespaceRequest{Parent: s.Name, NvmeNamespace: &opiv1.NvmeNamespace{
		Spec: &opiv1.NvmeNamespaceSpec{VolumeNameRef: "mallocVolumes/theirs"}}})
	if err != nil {
		t.Fatal(err)
	}
	return func(t *testing.T) {
		t.Helper()
		haveS, err := fe.GetNvmeSubsystem(t.Context(), &opiv1.GetNvmeSubsystemRequest{Name: s.Name})
		if err != nil || !proto.Equal(haveS, s) {
			t.Errorf("a stranger's subsystem is %v, %v", haveS, err)
		}
		haveN, err := fe.GetNvmeNamespace(t.Context(), &opiv1.GetNvmeNamespaceRequest{Name: n.Name})
		if err != nil || !proto.Equal(haveN, n) {
			t.Errorf("a stranger's nvmeNamespace is %v, %v", haveN, err)
		}
	}
}
