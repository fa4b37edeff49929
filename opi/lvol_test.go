package opi_test

import (
	"os"
	"path/filepath"
	"testing"

	opiv1 "github.com/opiproject/opi-api/storage/v1alpha1/gen/go"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"

	lvolv1 "github.com/thaw-project/thaw/api/lvol/v1"
)

const cluster = 1 << 20

func (l *lab) lvstore(volume string) {
	l.t.Helper()
	must[*lvolv1.LvolStore](l.t)(l.lvol.CreateLvolStore(l.t.Context(), &lvolv1.CreateLvolStoreRequest{LvolStoreId: "s", LvolStore: &lvolv1.LvolStore{VolumeNameRef: volume, ClusterSizeBytes: cluster}}))
}

func TestLvolStore(t *testing.T) {
	l := start(t, nil)
	ctx := t.Context()
	v := l.mallocVolume("m0")
	create := func(id string, s *lvolv1.LvolStore) (*lvolv1.LvolStore, error) {
		return l.lvol.CreateLvolStore(ctx, &lvolv1.CreateLvolStoreRequest{LvolStoreId: id, LvolStore: s})
	}
	made := must[*lvolv1.LvolStore](t)(create("s", &lvolv1.LvolStore{VolumeNameRef: v.Name, ClusterSizeBytes: cluster}))
	if made.Name != "lvolStores/s" || made.VolumeNameRef != v.Name || made.ClusterSizeBytes != cluster || made.FreeClustersCount == 0 || made.Uuid == "" {
		t.Errorf("%v", made)
	}
	for _, ref := range []string{v.Name, "m0"} {
		if again := must[*lvolv1.LvolStore](t)(create("s", &lvolv1.LvolStore{VolumeNameRef: ref})); !proto.Equal(again, made) {
			t.Errorf("%v", again)
		}
	}
	if have := must[*lvolv1.LvolStore](t)(l.lvol.GetLvolStore(ctx, &lvolv1.GetLvolStoreRequest{Name: made.Name})); !proto.Equal(have, made) {
		t.Errorf("%v", have)
	}
	if r := must[*lvolv1.ListLvolStoresResponse](t)(l.lvol.ListLvolStores(ctx, &lvolv1.ListLvolStoresRequest{})); len(r.LvolStores) != 1 || !proto.Equal(r.LvolStores[0], made) {
		t.Errorf("%v", r)
	}
	l.mallocVolume("m1")
	code := want[*lvolv1.LvolStore]
	code(t, codes.AlreadyExists)(create("s", &lvolv1.LvolStore{VolumeNameRef: "m1"}))
	code(t, codes.AlreadyExists)(create("s", &lvolv1.LvolStore{VolumeNameRef: "m0", ClusterSizeBytes: 2 * cluster}))
	code(t, codes.FailedPrecondition)(create("s2", &lvolv1.LvolStore{VolumeNameRef: "m0"}))
	code(t, codes.NotFound)(create("s2", &lvolv1.LvolStore{VolumeNameRef: "no"}))
	code(t, codes.InvalidArgument)(create("s/2", &lvolv1.LvolStore{VolumeNameRef: "m1"}))
	code(t, codes.InvalidArgument)(create("s2", nil))
	want[*emptypb.Empty](t, codes.OK)(l.lvol.DeleteLvolStore(ctx, &lvolv1.DeleteLvolStoreRequest{Name: made.Name}))
	want[*emptypb.Empty](t, codes.NotFound)(l.lvol.DeleteLvolStore(ctx, &lvolv1.DeleteLvolStoreRequest{Name: made.Name}))
	want[*emptypb.Empty](t, codes.OK)(l.lvol.DeleteLvolStore(ctx, &lvolv1.DeleteLvolStoreRequest{Name: made.Name, AllowMissing: true}))
}

const store = "lvolStores/s"

func lvolName(id string) string { return store + "/lvols/" + id }

// TestLvols does everything twice: the second call changes nothing.
func TestLvols(t *testing.T) {
	l := start(t, nil)
	ctx := t.Context()
	l.mallocVolume("m0")
	l.lvstore("m0")
	code := want[*lvolv1.Lvol]
	twice := func(f func() (*lvolv1.Lvol, error)) *lvolv1.Lvol {
		t.Helper()
		first, second := must[*lvolv1.Lvol](t)(f()), must[*lvolv1.Lvol](t)(f())
		if !proto.Equal(first, second) {
			t.Errorf("%v, then %v", first, second)
		}
		if have := must[*lvolv1.Lvol](t)(l.lvol.GetLvol(ctx, &lvolv1.GetLvolRequest{Name: second.Name})); !proto.Equal(have, second) {
			t.Errorf("%v, but %v", second, have)
		}
		return second
	}
	create := func(id string, v *lvolv1.Lvol) func() (*lvolv1.Lvol, error) {
		return func() (*lvolv1.Lvol, error) {
			return l.lvol.CreateLvol(ctx, &lvolv1.CreateLvolRequest{Parent: store, LvolId: id, Lvol: v})
		}
	}
	x := twice(create("x", &lvolv1.Lvol{SizeBytes: 3*cluster + 1}))
	if x.SizeBytes != 4*cluster || x.Thick || x.Parent != "" || x.Name != lvolName("x") {
		t.Errorf("%v", x)
	}
	if thick := twice(create("thick", &lvolv1.Lvol{SizeBytes: cluster, Thick: true})); !thick.Thick || thick.AllocatedBytes != cluster {
		t.Errorf("%v", thick)
	}
	code(t, codes.AlreadyExists)(create("x", &lvolv1.Lvol{SizeBytes: 5 * cluster})())
	code(t, codes.AlreadyExists)(create("x", &lvolv1.Lvol{SizeBytes: 4 * cluster, Thick: true})())
	code(t, codes.InvalidArgument)(create("y", &lvolv1.Lvol{SizeBytes: -1})())
	code(t, codes.InvalidArgument)(create("y", &lvolv1.Lvol{SizeBytes: 1 << 60})())
	code(t, codes.InvalidArgument)(create("y y", &lvolv1.Lvol{SizeBytes: 1})())
	code(t, codes.InvalidArgument)(create("y", nil)())

	snapshot := func(of, id string) func() (*lvolv1.Lvol, error) {
		return func() (*lvolv1.Lvol, error) {
			return l.lvol.SnapshotLvol(ctx, &lvolv1.SnapshotLvolRequest{Name: lvolName(of), SnapshotId: id})
		}
	}
	if s := twice(snapshot("x", "s1")); !s.Snapshot || len(s.Clones) != 1 || s.Clones[0] != x.Name {
		t.Errorf("%v", s)
	}
	twice(snapshot("x", "s2"))
	twice(snapshot("x", "s1")) // that it is an older one by now does not matter
	twice(create("x", &lvolv1.Lvol{SizeBytes: 3*cluster + 1}))
	code(t, codes.AlreadyExists)(snapshot("thick", "s1")())
	code(t, codes.NotFound)(snapshot("no", "s3")())
	clone := func(of, id string) func() (*lvolv1.Lvol, error) {
		return func() (*lvolv1.Lvol, error) {
			return l.lvol.CloneLvol(ctx, &lvolv1.CloneLvolRequest{Name: lvolName(of), LvolId: id})
		}
	}
	if c := twice(clone("s2", "c")); c.Parent != lvolName("s2") || c.Snapshot {
		t.Errorf("%v", c)
	}
	code(t, codes.AlreadyExists)(clone("s1", "c")())
	code(t, codes.NotFound)(clone("no", "c2")())

	if c := twice(func() (*lvolv1.Lvol, error) {
		return l.lvol.ResizeLvol(ctx, &lvolv1.ResizeLvolRequest{Name: lvolName("c"), SizeBytes: 6 * cluster})
	}); c.SizeBytes != 6*cluster {
		t.Errorf("%v", c)
	}
	id := must[*lvolv1.Lvol](t)(l.lvol.GetLvol(ctx, &lvolv1.GetLvolRequest{Name: lvolName("c")})).Uuid
	rename := func(to, id string) func() (*lvolv1.Lvol, error) {
		return func() (*lvolv1.Lvol, error) {
			return l.lvol.RenameLvol(ctx, &lvolv1.RenameLvolRequest{Name: lvolName("c"), LvolId: to, Uuid: id})
		}
	}
	code(t, codes.NotFound)(rename("d", uid)())
	code(t, codes.AlreadyExists)(rename("x", id)())
	if d := twice(rename("d", id)); d.Name != lvolName("d") || d.Uuid != id {
		t.Errorf("%v", d)
	}
	decouple := func(parent string) func() (*lvolv1.Lvol, error) {
		return func() (*lvolv1.Lvol, error) {
			return l.lvol.DecoupleLvol(ctx, &lvolv1.DecoupleLvolRequest{Name: lvolName("d"), Parent: parent})
		}
	}
	// A repeated call must not take the next parent too.
	if d := twice(decouple(lvolName("s2"))); d.Parent != lvolName("s1") {
		t.Errorf("%v", d)
	}
	if d := twice(decouple(lvolName("s1"))); d.Parent != "" {
		t.Errorf("%v", d)
	}
	code(t, codes.OK)(l.lvol.ResizeLvol(ctx, &lvolv1.ResizeLvolRequest{Name: lvolName("d"), SizeBytes: 4 * cluster})) // the parent's
	if d := twice(func() (*lvolv1.Lvol, error) {
		return l.lvol.SetLvolParent(ctx, &lvolv1.SetLvolParentRequest{Name: lvolName("d"), Parent: lvolName("s2")})
	}); d.Parent != lvolName("s2") {
		t.Errorf("%v", d)
	}
	if d := twice(func() (*lvolv1.Lvol, error) {
		return l.lvol.InflateLvol(ctx, &lvolv1.InflateLvolRequest{Name: lvolName("d")})
	}); d.Parent != "" {
		t.Errorf("%v", d)
	}
	if v := must[*lvolv1.Lvol](t)(l.lvol.GetLvol(ctx, &lvolv1.GetLvolRequest{Name: lvolName("thick")})); v.ReadOnly || v.InUse {
		t.Errorf("%v", v)
	}
	if v := twice(func() (*lvolv1.Lvol, error) {
		return l.lvol.SetLvolReadOnly(ctx, &lvolv1.SetLvolReadOnlyRequest{Name: lvolName("thick")})
	}); !v.ReadOnly || v.Snapshot {
		t.Errorf("%v", v)
	}
	for _, parent := range []string{store, "lvolStores/-"} {
		r := must[*lvolv1.ListLvolsResponse](t)(l.lvol.ListLvols(ctx, &lvolv1.ListLvolsRequest{Parent: parent}))
		if len(r.Lvols) != 5 {
			t.Errorf("%v", r)
		}
		for _, v := range r.Lvols {
			if have := must[*lvolv1.Lvol](t)(l.lvol.GetLvol(ctx, &lvolv1.GetLvolRequest{Name: v.Name})); !proto.Equal(have, v) {
				t.Errorf("listed %v, got %v", v, have)
			}
		}
	}
	// It is a volume for a subsystem.
	l.subsystem(nqn)
	n := must[*opiv1.NvmeNamespace](t)(l.fe.CreateNvmeNamespace(ctx, &opiv1.CreateNvmeNamespaceRequest{Parent: sub, NvmeNamespace: &opiv1.NvmeNamespace{Spec: &opiv1.NvmeNamespaceSpec{VolumeNameRef: x.Name}}}))
	if n.Spec.VolumeNameRef != x.Name || n.Spec.Uuid != x.Uuid {
		t.Errorf("%v", n)
	}
	del := func(id string, missing bool) (*emptypb.Empty, error) {
		return l.lvol.DeleteLvol(ctx, &lvolv1.DeleteLvolRequest{Name: lvolName(id), AllowMissing: missing})
	}
	must[*lvolv1.Lvol](t)(clone("s2", "e")())
	want[*emptypb.Empty](t, codes.FailedPrecondition)(del("s2", false)) // two clones
	for _, id := range []string{"e", "x", "d", "s2", "s1", "thick"} {
		want[*emptypb.Empty](t, codes.OK)(del(id, false))
		want[*emptypb.Empty](t, codes.NotFound)(del(id, false))
		want[*emptypb.Empty](t, codes.OK)(del(id, true))
	}
}

// TestExternal clones a volume, which then goes and comes.
func TestExternal(t *testing.T) {
	l := start(t, nil)
	ctx := t.Context()
	l.mallocVolume("m0")
	l.lvstore("m0")
	file := filepath.Join(shortDir(t), "f")
	if err := os.WriteFile(file, make([]byte, 4*cluster), 0o600); err != nil {
		t.Fatal(err)
	}
	parent := func() {
		must[*opiv1.AioVolume](t)(l.aio.CreateAioVolume(ctx, &opiv1.CreateAioVolumeRequest{AioVolumeId: "a", AioVolume: &opiv1.AioVolume{Filename: file, BlockSize: 4096, Uuid: uid}}))
	}
	parent()
	clone := func(ref string) (*lvolv1.Lvol, error) {
		return l.lvol.CloneVolume(ctx, &lvolv1.CloneVolumeRequest{Parent: store, LvolId: "e", VolumeNameRef: ref})
	}
	made := must[*lvolv1.Lvol](t)(clone("aioVolumes/a"))
	if made.ExternalParent == "" || made.Degraded || made.SizeBytes != 4*cluster {
		t.Errorf("%v", made)
	}
	for _, ref := range []string{"a", uid} {
		if again := must[*lvolv1.Lvol](t)(clone(ref)); !proto.Equal(again, made) {
			t.Errorf("%v", again)
		}
	}
	want[*lvolv1.Lvol](t, codes.AlreadyExists)(clone("m0"))
	want[*lvolv1.Lvol](t, codes.NotFound)(clone("aioVolumes/b"))
	want[*emptypb.Empty](t, codes.OK)(l.aio.DeleteAioVolume(ctx, &opiv1.DeleteAioVolumeRequest{Name: "aioVolumes/a"}))
	get := func() *lvolv1.Lvol {
		return must[*lvolv1.Lvol](t)(l.lvol.GetLvol(ctx, &lvolv1.GetLvolRequest{Name: lvolName("e")}))
	}
	if e := get(); !e.Degraded || e.Uuid != made.Uuid {
		t.Errorf("%v", e)
	}
	want[*lvolv1.Lvol](t, codes.FailedPrecondition)(clone("m0")) // which must not cost what is there
	if r := must[*lvolv1.ListLvolsResponse](t)(l.lvol.ListLvols(ctx, &lvolv1.ListLvolsRequest{Parent: store})); len(r.Lvols) != 1 || !r.Lvols[0].Degraded {
		t.Errorf("%v", r)
	}
	parent()
	if e := get(); e.Degraded {
		t.Errorf("%v", e)
	}
	d := must[*lvolv1.Lvol](t)(l.lvol.DecoupleLvol(ctx, &lvolv1.DecoupleLvolRequest{Name: lvolName("e"), Parent: "aioVolumes/a"}))
	if d.ExternalParent != "" {
		t.Errorf("%v", d)
	}
	d = must[*lvolv1.Lvol](t)(l.lvol.SetLvolParent(ctx, &lvolv1.SetLvolParentRequest{Name: lvolName("e"), Parent: "aioVolumes/a"}))
	if d.ExternalParent == "" {
		t.Errorf("%v", d)
	}
	want[*lvolv1.RbdVolume](t, codes.Unimplemented)(l.lvol.CreateRbdVolume(ctx, &lvolv1.CreateRbdVolumeRequest{RbdVolumeId: "r", RbdVolume: &lvolv1.RbdVolume{Pool: "p", Image: "i"}}))
	want[*lvolv1.RbdVolume](t, codes.InvalidArgument)(l.lvol.CreateRbdVolume(ctx, &lvolv1.CreateRbdVolumeRequest{RbdVolumeId: "r"}))
	want[*lvolv1.RbdVolume](t, codes.NotFound)(l.lvol.GetRbdVolume(ctx, &lvolv1.GetRbdVolumeRequest{Name: "rbdVolumes/r"}))
}
