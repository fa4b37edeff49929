package opi_test

import (
	"context"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	opiv1 "github.com/opiproject/opi-api/storage/v1alpha1/gen/go"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	lvolv1 "github.com/thaw-project/thaw/api/lvol/v1"
)

var (
	rounds = flag.Int("rounds", 100, "operations of a random test")
	seed   = flag.Uint64("seed", 0, "seed of a random test; 0 chooses one")
)

// model is what there should be.
type model struct {
	volumes    map[string]bool
	lvols      map[string]string            // parent snapshot, or nothing, by id
	snapshots  map[string]bool              // of those
	subsystems map[string]map[string]string // volume by UUID of the nvmeNamespace, by NQN
	listeners  map[string]bool              // "NQN port"
}

func (m *model) users(volume string) (n int) {
	for _, s := range m.subsystems {
		for _, v := range s {
			if v == volume {
				n++
			}
		}
	}
	return n
}

func (m *model) clones(id string) (n int) {
	for _, p := range m.lvols {
		if p == id {
			n++
		}
	}
	return n
}

// op is a random operation: what to call, again and again until it is answered, and what
// is then.
type op struct {
	what   string
	call   func(ctx context.Context) error
	effect func()
}

func oneOf[V any](r *rand.Rand, m map[string]V) (string, bool) {
	if len(m) == 0 {
		return "", false
	}
	keys := slices.Sorted(maps.Keys(m))
	return keys[r.IntN(len(keys))], true
}

// next chooses an operation that must succeed.
func (m *model) next(l *lab, r *rand.Rand, ports []string) op {
	for {
		if o, ok := m.try(l, r, ports); ok {
			return o
		}
	}
}

func (m *model) try(l *lab, r *rand.Rand, ports []string) (o op, ok bool) {
	volume, subNQN, id := fmt.Sprintf("m%d", r.IntN(4)), fmt.Sprintf("%s%d", nqn, r.IntN(3)), fmt.Sprintf("l%d", r.IntN(8))
	switch r.IntN(10) {
	case 0:
		return op{"create " + volume, func(ctx context.Context) error {
			_, err := l.malloc.CreateMallocVolume(ctx, &opiv1.CreateMallocVolumeRequest{MallocVolumeId: volume, MallocVolume: &opiv1.MallocVolume{BlockSize: 4096, BlocksCount: 16}})
			return err
		}, func() { m.volumes[volume] = true }}, true
	case 1:
		return op{"delete " + volume, func(ctx context.Context) error {
			_, err := l.malloc.DeleteMallocVolume(ctx, &opiv1.DeleteMallocVolumeRequest{Name: "mallocVolumes/" + volume, AllowMissing: true})
			return err
		}, func() { delete(m.volumes, volume) }}, m.users("mallocVolumes/"+volume) == 0
	case 2:
		if _, there := m.lvols[id]; there {
			return o, false
		}
		return op{"create " + id, func(ctx context.Context) error {
			_, err := l.lvol.CreateLvol(ctx, &lvolv1.CreateLvolRequest{Parent: store, LvolId: id, Lvol: &lvolv1.Lvol{SizeBytes: 4 * cluster}})
			return err
		}, func() { m.lvols[id] = "" }}, true
	case 3:
		of, some := oneOf(r, m.lvols)
		if _, there := m.lvols[id]; there || !some || m.snapshots[of] {
			return o, false
		}
		return op{"snapshot " + of + " " + id, func(ctx context.Context) error {
			_, err := l.lvol.SnapshotLvol(ctx, &lvolv1.SnapshotLvolRequest{Name: lvolName(of), SnapshotId: id})
			return err
		}, func() { m.lvols[id], m.snapshots[id], m.lvols[of] = m.lvols[of], true, id }}, true
	case 4:
		of, some := oneOf(r, m.snapshots)
		if _, there := m.lvols[id]; there || !some {
			return o, false
		}
		return op{"clone " + of + " " + id, func(ctx context.Context) error {
			_, err := l.lvol.CloneLvol(ctx, &lvolv1.CloneLvolRequest{Name: lvolName(of), LvolId: id})
			return err
		}, func() { m.lvols[id] = of }}, true
	case 5:
		return op{"delete " + id, func(ctx context.Context) error {
			_, err := l.lvol.DeleteLvol(ctx, &lvolv1.DeleteLvolRequest{Name: lvolName(id), AllowMissing: true})
			return err
		}, func() { delete(m.lvols, id); delete(m.snapshots, id) }}, m.clones(id) == 0 && m.users(lvolName(id)) == 0
	case 6:
		return op{"create " + subNQN, func(ctx context.Context) error {
			_, err := l.fe.CreateNvmeSubsystem(ctx, &opiv1.CreateNvmeSubsystemRequest{NvmeSubsystem: &opiv1.NvmeSubsystem{Spec: &opiv1.NvmeSubsystemSpec{Nqn: subNQN, Hostnqn: hostNQN, SerialNumber: "S"}}})
			return err
		}, func() {
			if m.subsystems[subNQN] == nil {
				m.subsystems[subNQN] = map[string]string{}
			}
		}}, true
	case 7:
		return op{"delete " + subNQN, func(ctx context.Context) error {
			_, err := l.fe.DeleteNvmeSubsystem(ctx, &opiv1.DeleteNvmeSubsystemRequest{Name: "nvmeSubsystems/" + subNQN, AllowMissing: true})
			return err
		}, func() {
			delete(m.subsystems, subNQN)
			maps.DeleteFunc(m.listeners, func(k string, _ bool) bool { return strings.HasPrefix(k, subNQN+" ") })
		}}, r.IntN(3) == 0
	case 8:
		return m.tryNamespace(l, r)
	}
	port := ports[r.IntN(len(ports))]
	parent, key := "nvmeSubsystems/"+subNQN, subNQN+" "+port
	if m.subsystems[subNQN] == nil {
		return o, false
	}
	if m.listeners[key] {
		return op{"stop listening " + key, func(ctx context.Context) error {
			_, err := l.fe.DeleteNvmeController(ctx, &opiv1.DeleteNvmeControllerRequest{Name: parent + "/nvmeControllers/tcp:127.0.0.1:" + port, AllowMissing: true})
			return err
		}, func() { delete(m.listeners, key) }}, true
	}
	return op{"listen " + key, func(ctx context.Context) error {
		_, err := l.fe.CreateNvmeController(ctx, &opiv1.CreateNvmeControllerRequest{Parent: parent, NvmeController: fabrics(port)})
		return err
	}, func() { m.listeners[key] = true }}, true
}

func (m *model) tryNamespace(l *lab, r *rand.Rand) (o op, ok bool) {
	subNQN, some := oneOf(r, m.subsystems)
	if !some {
		return o, false
	}
	parent, shown := "nvmeSubsystems/"+subNQN, m.subsystems[subNQN]
	if id, some := oneOf(r, shown); some && r.IntN(2) == 0 {
		return op{"hide " + id, func(ctx context.Context) error {
			_, err := l.fe.DeleteNvmeNamespace(ctx, &opiv1.DeleteNvmeNamespaceRequest{Name: parent + "/nvmeNamespaces/" + id, AllowMissing: true})
			return err
		}, func() { delete(shown, id) }}, true
	}
	ref := ""
	if v, some := oneOf(r, m.volumes); some && r.IntN(2) == 0 {
		ref = "mallocVolumes/" + v
	} else if v, some := oneOf(r, m.lvols); some && !m.snapshots[v] {
		ref = lvolName(v)
	}
	if ref == "" || m.users(ref) > 0 {
		return o, false
	}
	id := fmt.Sprintf("00000000-0000-4000-8000-%012x", r.Uint64()>>16)
	return op{"show " + ref + " as " + id, func(ctx context.Context) error {
		_, err := l.fe.CreateNvmeNamespace(ctx, &opiv1.CreateNvmeNamespaceRequest{Parent: parent, NvmeNamespace: &opiv1.NvmeNamespace{Spec: &opiv1.NvmeNamespaceSpec{Uuid: id, VolumeNameRef: ref, Nguid: strings.ReplaceAll(id, "-", "")}}})
		return err
	}, func() { shown[id] = ref }}, true
}

// repeat calls until somebody answers.
func repeat(t *testing.T, what string, call func(ctx context.Context) error) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(2 * time.Millisecond) {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		err := call(ctx)
		cancel()
		switch c := status.Code(err); {
		case err == nil:
			return
		case c != codes.Unavailable || time.Now().After(deadline):
			t.Fatalf("%s: %v", what, err)
		}
	}
}

// check compares all that the bridge lists with the model.
func (m *model) check(t *testing.T, l *lab) {
	t.Helper()
	var have, want []string
	repeat(t, "list", func(ctx context.Context) (err error) {
		have, err = l.everything(ctx)
		return err
	})
	for v := range m.volumes {
		want = append(want, "volume "+v)
	}
	for id, parent := range m.lvols {
		if parent != "" {
			parent = lvolName(parent)
		}
		want = append(want, fmt.Sprintf("lvol %s of %q, snapshot %t", id, parent, m.snapshots[id]))
	}
	for n, s := range m.subsystems {
		want = append(want, "subsystem "+n+" of "+hostNQN)
		for id, v := range s {
			want = append(want, "nvmeNamespace "+n+" "+id+" "+v+" "+strings.ReplaceAll(id, "-", ""))
		}
	}
	for k := range m.listeners {
		want = append(want, "listener "+k)
	}
	slices.Sort(have)
	slices.Sort(want)
	if !slices.Equal(have, want) {
		t.Fatalf("there is\n\t%s\nnot\n\t%s", strings.Join(have, "\n\t"), strings.Join(want, "\n\t"))
	}
}

func (l *lab) everything(ctx context.Context) (list []string, err error) {
	volumes, err := l.malloc.ListMallocVolumes(ctx, &opiv1.ListMallocVolumesRequest{})
	if err != nil {
		return nil, err
	}
	for _, v := range volumes.MallocVolumes {
		list = append(list, "volume "+strings.TrimPrefix(v.Name, "mallocVolumes/"))
	}
	lvols, err := l.lvol.ListLvols(ctx, &lvolv1.ListLvolsRequest{Parent: store})
	if err != nil {
		return nil, err
	}
	for _, v := range lvols.Lvols {
		list = append(list, fmt.Sprintf("lvol %s of %q, snapshot %t", strings.TrimPrefix(v.Name, lvolName("")), v.Parent, v.Snapshot))
	}
	subs, err := l.fe.ListNvmeSubsystems(ctx, &opiv1.ListNvmeSubsystemsRequest{})
	if err != nil {
		return nil, err
	}
	for _, s := range subs.NvmeSubsystems {
		list = append(list, "subsystem "+s.Spec.Nqn+" of "+s.Spec.Hostnqn)
		shown, err := l.fe.ListNvmeNamespaces(ctx, &opiv1.ListNvmeNamespacesRequest{Parent: s.Name})
		if err != nil {
			return nil, err
		}
		for _, n := range shown.NvmeNamespaces {
			list = append(list, "nvmeNamespace "+s.Spec.Nqn+" "+n.Spec.Uuid+" "+n.Spec.VolumeNameRef+" "+n.Spec.Nguid)
		}
		at, err := l.fe.ListNvmeControllers(ctx, &opiv1.ListNvmeControllersRequest{Parent: s.Name})
		if err != nil {
			return nil, err
		}
		for _, c := range at.NvmeControllers {
			list = append(list, "listener "+s.Spec.Nqn+" "+c.Spec.GetFabricsId().Trsvcid)
		}
	}
	return list, nil
}

// random does random operations while others kill what does them, and compares with the
// model now and then.
func random(t *testing.T, root string, victims ...*process) {
	s := *seed
	if s == 0 {
		s = rand.Uint64()
	}
	t.Logf("-seed %d", s)
	r := rand.New(rand.NewPCG(s, 1))
	l := newLab(t, root)
	file := filepath.Join(root, "disk")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(file, 256<<20); err != nil {
		t.Fatal(err)
	}
	repeat(t, "aio", func(ctx context.Context) error {
		_, err := l.aio.CreateAioVolume(ctx, &opiv1.CreateAioVolumeRequest{AioVolumeId: "a", AioVolume: &opiv1.AioVolume{Filename: file, BlockSize: 4096}})
		return err
	})
	repeat(t, "lvstore", func(ctx context.Context) error {
		_, err := l.lvol.CreateLvolStore(ctx, &lvolv1.CreateLvolStoreRequest{LvolStoreId: "s", LvolStore: &lvolv1.LvolStore{VolumeNameRef: "aioVolumes/a", ClusterSizeBytes: cluster}})
		return err
	})
	m := &model{volumes: map[string]bool{}, lvols: map[string]string{}, snapshots: map[string]bool{}, subsystems: map[string]map[string]string{}, listeners: map[string]bool{}}
	ports := []string{freePort(t), freePort(t)}

	// At every other operation somebody is killed, at some moment of it or soon after.
	k, kills := rand.New(rand.NewPCG(s, 2)), 0
	var killing sync.WaitGroup
	defer killing.Wait()
	kill := func() {
		time.Sleep(time.Duration(k.IntN(3000)) * time.Microsecond)
		v := victims[k.IntN(len(victims))]
		v.kill()
		v.start()
	}
	for i := range *rounds {
		o := m.next(l, r, ports)
		if r.IntN(2) == 0 {
			kills++
			killing.Go(kill)
		}
		repeat(t, fmt.Sprintf("%d: %s", i, o.what), o.call)
		killing.Wait()
		o.effect()
		if i%20 == 19 {
			m.check(t, l)
		}
	}
	m.check(t, l)
	t.Logf("%d operations, %d kills", *rounds, kills)
}

// TestKillBridge kills the bridge in the middle of random operations.
func TestKillBridge(t *testing.T) {
	root := shortDir(t)
	stop, err := serveTarget(root, false)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { stop() })
	random(t, root, spawn(t, childBridge, root, "bridge"))
}

// TestKillTarget kills the bridge or a target that keeps its configuration.
func TestKillTarget(t *testing.T) {
	root := shortDir(t)
	tg := spawn(t, childTarget, root, "target")
	random(t, root, tg, spawn(t, childBridge, root, "bridge"))
}
