package card

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	opiv1 "github.com/opiproject/opi-api/storage/v1alpha1/gen/go"
	"github.com/prometheus/client_golang/prometheus"
	"go.etcd.io/bbolt"
	"google.golang.org/protobuf/proto"

	attacherv1 "github.com/thaw-project/thaw/api/attacher/v1"
	"github.com/thaw-project/thaw/attacher/identity"
	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/opi"
	"github.com/thaw-project/thaw/spdk"
	"github.com/thaw-project/thaw/statedb"
)

const block = attacherv1.Purpose_PURPOSE_BLOCK

// TestDisk is the life of a disk, and that each call may be repeated.
func TestDisk(t *testing.T) {
	s := newStore(t, 1, "a", "b")
	l := newLab(t, 4)
	l.strangers(s)
	c := l.card().Client()
	ctx := t.Context()
	a := attach(t, c, fromStore(s, "a"))
	check(t, l.whole(a))
	if len(a.Serial) != 20 || a.Uuid == s.disks["a"].Uuid || a.SizeBytes != diskBytes || !a.ReadOnly || a.AttachmentId == "" {
		t.Errorf("%v", a)
	}
	var steps []string
	for _, st := range a.Steps {
		steps = append(steps, st.Step)
		if st.Nanos <= 0 {
			t.Errorf("step %v took no time", st)
		}
	}
	if got := strings.Join(steps, " "); got != "leased connected found subsystem nvmeNamespace controller recorded" {
		t.Errorf("steps %s", got)
	}
	if !bytes.Equal(l.read(a), s.content("a")) {
		t.Error("a host reads something else than the store has")
	}
	again := attach(t, c, fromStore(s, "a"))
	again.Steps, a.Steps = nil, nil
	if !proto.Equal(again, a) {
		t.Errorf("attached again it is %v, not %v", again, a)
	}
	b := attach(t, c, fromStore(s, "b"))
	check(t, l.whole(b))
	if !bytes.Equal(l.read(b), s.content("b")) {
		t.Error("a host reads something else than the store has")
	}
	if remotes := strings.Count(l.dump(true), "controller thaw."); remotes != 1 {
		t.Errorf("%d connections to one subsystem", remotes)
	}
	list, err := c.ListDisks(ctx, &attacherv1.ListDisksRequest{})
	check(t, err)
	if len(list.Disks) != 2 || !proto.Equal(list.Disks[0], a) || list.Disks[1].Problem != "" {
		t.Errorf("%v", list)
	}
	functions, err := c.ListFunctions(ctx, &attacherv1.ListFunctionsRequest{})
	check(t, err)
	if f := functions.Functions; len(f) != 4 || f[0].Id != "a" || f[1].Id != "b" || f[2].Id != "" || f[0].Purpose != block || f[0].ForeignNqn != "" {
		t.Errorf("%v", functions)
	}
	for range 2 {
		detach(t, c, "a")
		if l.functions.Shown()[function(a)] != "" || strings.Contains(l.dump(true), a.SubsystemNqn) {
			t.Fatal("a disk that was detached is shown")
		}
		check(t, l.whole(b))
	}
	back := attach(t, c, fromStore(s, "a"))
	if !proto.Equal(back.Function, a.Function) || back.Uuid != a.Uuid || back.AttachmentId == a.AttachmentId {
		t.Errorf("attached anew it is %v, was %v", back, a)
	}
	_, err = c.DetachDisk(ctx, &attacherv1.DetachDiskRequest{Id: "a", Purpose: block, AttachmentId: a.AttachmentId})
	want(t, kind.InUse, err) // a replay
	check(t, l.whole(back))
	_, err = c.DetachDisk(ctx, &attacherv1.DetachDiskRequest{Id: "a", Purpose: block, AttachmentId: back.AttachmentId})
	check(t, err)
	detach(t, c, "b")
	l.clean()
}

// TestRefused is what cannot be attached, and leaves nothing.
func TestRefused(t *testing.T) {
	s := newStore(t, 1, "a", "b")
	l := newLab(t, 2)
	l.strangers(s)
	c := l.card().Client()
	change := func(f func(*attacherv1.AttachDiskRequest, *attacherv1.Attachment)) *attacherv1.AttachDiskRequest {
		r := proto.CloneOf(fromStore(s, "a"))
		f(r, r.GetAttachment())
		return r
	}
	for name, v := range map[string]struct {
		k kind.Kind
		r *attacherv1.AttachDiskRequest
	}{
		"another node's":  {kind.Denied, change(func(_ *attacherv1.AttachDiskRequest, a *attacherv1.Attachment) { a.Node = "host2" })},
		"as another host": {kind.Denied, change(func(_ *attacherv1.AttachDiskRequest, a *attacherv1.Attachment) { a.HostNqn = identity.HostNQN("host2") })},
		"rbd":             {kind.Unsupported, change(func(_ *attacherv1.AttachDiskRequest, a *attacherv1.Attachment) { a.Transport = "rbd" })},
		"no portal":       {kind.Invalid, change(func(_ *attacherv1.AttachDiskRequest, a *attacherv1.Attachment) { a.Portals = nil })},
		"portal":          {kind.Invalid, change(func(_ *attacherv1.AttachDiskRequest, a *attacherv1.Attachment) { a.Portals[0].Address = "localhost" })},
		"uuid":            {kind.Invalid, change(func(_ *attacherv1.AttachDiskRequest, a *attacherv1.Attachment) { a.Uuid = "" })},
		"subsystem":       {kind.Invalid, change(func(_ *attacherv1.AttachDiskRequest, a *attacherv1.Attachment) { a.SubsystemNqn = "a/b" })},
		"purpose":         {kind.Invalid, change(func(r *attacherv1.AttachDiskRequest, _ *attacherv1.Attachment) { r.Purpose = 0 })},
		"id":              {kind.Invalid, change(func(r *attacherv1.AttachDiskRequest, _ *attacherv1.Attachment) { r.Id = "a/b" })},
		"no source":       {kind.Invalid, &attacherv1.AttachDiskRequest{Id: "a", Purpose: block}},
		"no volume":       {kind.NotFound, &attacherv1.AttachDiskRequest{Id: "a", Purpose: block, Source: &attacherv1.AttachDiskRequest_Volume{Volume: "mallocVolumes/none"}}},
		"bare bdev":       {kind.Invalid, &attacherv1.AttachDiskRequest{Id: "a", Purpose: block, Source: &attacherv1.AttachDiskRequest_Volume{Volume: "theirs"}}},
		"no such store": {kind.Unavailable, change(func(_ *attacherv1.AttachDiskRequest, a *attacherv1.Attachment) {
			a.Portals[0].Service, a.SubsystemNqn = freePort(t), s.id.Subsystem("x")
		})},
		"store knows no such subsystem": {kind.Unavailable, change(func(_ *attacherv1.AttachDiskRequest, a *attacherv1.Attachment) { a.SubsystemNqn = s.id.Subsystem("y") })},
		"owner without hold":            {kind.InUse, change(func(r *attacherv1.AttachDiskRequest, _ *attacherv1.Attachment) { r.Owner = "nobody" })},
	} {
		_, err := c.AttachDisk(t.Context(), v.r)
		if !errors.Is(err, v.k) {
			t.Errorf("%s: %v, want %s", name, err, v.k)
		}
	}
	l.clean()
	a := attach(t, c, fromStore(s, "a"))
	other := proto.CloneOf(fromStore(s, "b"))
	other.Id = "a"
	_, err := c.AttachDisk(t.Context(), other)
	want(t, kind.Exists, err)
	check(t, l.whole(a))
	// The same lvol for another purpose is another disk.
	twice := proto.CloneOf(fromStore(s, "a"))
	twice.Purpose = attacherv1.Purpose_PURPOSE_CONVERSION
	b, err := c.AttachDisk(t.Context(), twice)
	if err == nil && (b.Uuid == a.Uuid || b.SubsystemNqn == a.SubsystemNqn || b.Serial == a.Serial || proto.Equal(a.Function, b.Function)) {
		t.Errorf("%v is like %v", b, a)
	}
	_, err = c.DetachDisk(t.Context(), &attacherv1.DetachDiskRequest{Id: "a", Purpose: twice.Purpose})
	check(t, err)
	detach(t, c, "a")
	l.clean()
}

// TestNotShown is a store that does not show what it said it would: the caller is told
// after a while, and nothing is left.
func TestNotShown(t *testing.T) {
	s := newStore(t, 1, "a", "b")
	l := newLab(t, 2)
	c := l.card().Client()
	b := attach(t, c, fromStore(s, "b"))
	s.hide("a")
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	_, err := c.AttachDisk(ctx, fromStore(s, "a"))
	want(t, kind.Unavailable, err)
	if list, err := c.ListDisks(t.Context(), &attacherv1.ListDisksRequest{}); err != nil || len(list.Disks) != 1 {
		t.Errorf("%v %v", list, err)
	}
	// It comes while somebody waits.
	time.AfterFunc(100*time.Millisecond, func() { s.show("a") })
	a := attach(t, c, fromStore(s, "a"))
	if !bytes.Equal(l.read(a), s.content("a")) {
		t.Error("a host reads something else than the store has")
	}
	// It goes and comes back while the host has it.
	s.hide("a")
	eventually(t, func() error {
		list, err := c.ListDisks(t.Context(), &attacherv1.ListDisksRequest{})
		if err == nil && (len(list.Disks) != 2 || list.Disks[0].Problem == "" || list.Disks[1].Problem != "") {
			err = fmt.Errorf("%v", list)
		}
		return err
	})
	s.show("a")
	eventually(t, func() error { return l.whole(a) })
	check(t, l.whole(b))
	if !bytes.Equal(l.read(a), s.content("a")) {
		t.Error("a host reads something else than the store has")
	}
}

// TestFunctions is who gets which.
func TestFunctions(t *testing.T) {
	ids := []string{"a", "b", "c", "d"}
	s := newStore(t, 1, ids...)
	l := newLab(t, 4)
	l.strangers(s)
	// One is somebody else's, and another becomes so just before it is plugged.
	fe := opiv1.NewFrontendNvmeServiceClient(l.conn)
	theirs := func(f Function) {
		_, err := fe.CreateNvmeController(t.Context(), &opiv1.CreateNvmeControllerRequest{Parent: subsystemName(foreignNQN), NvmeController: pcie(f)})
		check(t, err)
	}
	theirs(l.o.Functions[0])
	l.others = l.dump(false)
	once := sync.OnceFunc(func() { theirs(l.o.Functions[1]); l.others = l.dump(false) })
	c, err := open(l.o, func(step string) {
		if step == "card.attach: nvmeNamespace" {
			once()
		}
	})
	check(t, err)
	defer c.Close()
	a, b := attach(t, c.Client(), fromStore(s, "a")), attach(t, c.Client(), fromStore(s, "b"))
	check(t, l.whole(a))
	check(t, l.whole(b))
	if a.Function.VirtualFunction != 3 || b.Function.VirtualFunction != 4 {
		t.Errorf("%v %v", a, b)
	}
	_, err = c.AttachDisk(t.Context(), fromStore(s, "c"))
	want(t, kind.NoSpace, err)
	detach(t, c.Client(), "b")
	if d := attach(t, c.Client(), fromStore(s, "c")); !proto.Equal(d.Function, b.Function) {
		t.Errorf("%v", d)
	}
	detach(t, c.Client(), "c")
	detach(t, c.Client(), "a")
	// Of two that are free each disk gets the one it had, whoever comes first.
	if d := attach(t, c.Client(), fromStore(s, "c")); !proto.Equal(d.Function, b.Function) {
		t.Errorf("%v", d)
	}
	if d := attach(t, c.Client(), fromStore(s, "a")); !proto.Equal(d.Function, a.Function) {
		t.Errorf("%v", d)
	}
	functions, err := c.Client().ListFunctions(t.Context(), &attacherv1.ListFunctionsRequest{})
	check(t, err)
	if functions.Functions[0].ForeignNqn != foreignNQN || functions.Functions[1].ForeignNqn != foreignNQN || functions.Functions[2].ForeignNqn != "" {
		t.Errorf("%v", functions)
	}
	detach(t, c.Client(), "c")
	detach(t, c.Client(), "a")
	l.clean()
}

// TestInUse is a function that the host does not let go: the caller is told, and it goes
// when it can.
func TestInUse(t *testing.T) {
	s := newStore(t, 1, "a")
	l := newLab(t, 2)
	var mu sync.Mutex
	busy := true
	l.functions.Busy = func(opi.Function) error {
		mu.Lock()
		defer mu.Unlock()
		if busy {
			return kind.Errorf(kind.InUse, "the host has it open")
		}
		return nil
	}
	c := l.card().Client()
	a := attach(t, c, fromStore(s, "a"))
	_, err := c.DetachDisk(t.Context(), &attacherv1.DetachDiskRequest{Id: "a", Purpose: block})
	want(t, kind.InUse, err)
	check(t, l.whole(a))
	// Whoever wants it again has it.
	back := attach(t, c, fromStore(s, "a"))
	if !proto.Equal(back.Function, a.Function) || back.AttachmentId == a.AttachmentId {
		t.Errorf("%v", back)
	}
	time.Sleep(2 * l.o.Interval)
	check(t, l.whole(back))
	_, err = c.DetachDisk(t.Context(), &attacherv1.DetachDiskRequest{Id: "a", Purpose: block})
	want(t, kind.InUse, err)
	mu.Lock()
	busy = false
	mu.Unlock()
	eventually(t, func() error {
		if left := l.dump(true); left != "" {
			return errors.New(left)
		}
		return nil
	})
}

// TestVolume is a disk of the card's own.
func TestVolume(t *testing.T) {
	l := newLab(t, 2)
	c := l.card()
	malloc := func() {
		_, err := l.spdk.BdevMallocCreate(t.Context(), spdk.BdevMallocCreateParams{Name: "mine", NumBlocks: 256, BlockSizeBytes: 512})
		check(t, err)
	}
	malloc()
	r := &attacherv1.AttachDiskRequest{Id: "v", Purpose: attacherv1.Purpose_PURPOSE_CONVERSION, Source: &attacherv1.AttachDiskRequest_Volume{Volume: "mallocVolumes/mine"}}
	d := attach(t, c.Client(), r)
	check(t, l.whole(d))
	if d.SizeBytes != 256*512 || d.ReadOnly {
		t.Errorf("%v", d)
	}
	file := filepath.Join(l.root, "pool")
	check(t, os.WriteFile(file, make([]byte, 64<<20), 0o600))
	_, err := l.spdk.BdevAIOCreate(t.Context(), spdk.BdevAIOCreateParams{Name: "base", Filename: file, BlockSizeBytes: 512})
	check(t, err)
	_, err = l.spdk.BdevLvolCreateLvstore(t.Context(), spdk.LvolStoreCreateParams{BdevName: "base", Name: "lvs"})
	check(t, err)
	lvol := func() {
		_, err := l.spdk.BdevLvolCreate(t.Context(), spdk.LvolCreateParams{StoreName: "lvs", Name: "x", SizeMiB: 8, ThinProvision: true})
		check(t, err)
	}
	lvol()
	on := &attacherv1.AttachDiskRequest{Id: "x", Purpose: block, Source: &attacherv1.AttachDiskRequest_Volume{Volume: "lvolStores/lvs/lvols/x"}}
	x := attach(t, c.Client(), on)
	check(t, l.whole(x))
	// An lvol that is made again under the name holds other bytes: the host must not find
	// them as the disk that it knows.
	check(t, l.spdk.NvmfDeleteSubsystem(t.Context(), x.SubsystemNqn))
	for { // unless the card was faster
		err := l.spdk.BdevLvolDelete(t.Context(), "lvs/x")
		if err == nil {
			break
		}
		if s, serr := l.spdk.NvmfGetSubsystems(t.Context(), x.SubsystemNqn); serr == nil && len(s) == 1 {
			_ = l.spdk.NvmfDeleteSubsystem(t.Context(), x.SubsystemNqn)
		}
	}
	lvol()
	eventually(t, func() error {
		list, err := c.ListDisks(t.Context(), &attacherv1.ListDisksRequest{})
		if err == nil && !strings.Contains(list.Disks[0].Problem+list.Disks[1].Problem, "made anew") {
			err = fmt.Errorf("%v", list)
		}
		return err
	})
	_, err = c.Client().AttachDisk(t.Context(), on)
	want(t, kind.Exists, err)
	detach(t, c.Client(), "x")
	if y := attach(t, c.Client(), on); y.Uuid == x.Uuid {
		t.Error("two lvols have one identity")
	}
	check(t, l.whole(d))
	// One that the target does not let anybody write, without being a snapshot.
	detach(t, c.Client(), "x")
	_, err = l.spdk.BdevLvolCreate(t.Context(), spdk.LvolCreateParams{StoreName: "lvs", Name: "fixed", SizeMiB: 8, ThinProvision: true})
	check(t, err)
	check(t, l.spdk.BdevLvolSetReadOnly(t.Context(), "lvs/fixed"))
	on.Source = &attacherv1.AttachDiskRequest_Volume{Volume: "lvolStores/lvs/lvols/fixed"}
	if z := attach(t, c.Client(), on); !z.ReadOnly {
		t.Errorf("a read-only lvol is a disk to be written: %v", z)
	}
}

// TestHold is disks that live as long as who wanted them.
func TestHold(t *testing.T) {
	s := newStore(t, 1, "a", "b", "c")
	l := newLab(t, 4)
	l.strangers(s)
	c := l.card()
	hold := func(c *Card, owner string) context.CancelFunc {
		t.Helper()
		ctx, cancel := context.WithCancel(t.Context())
		stream, err := c.Client().Hold(ctx, &attacherv1.HoldRequest{Owner: owner})
		check(t, err)
		_, err = stream.Recv()
		check(t, err)
		return cancel
	}
	owned := func(id, owner string) *attacherv1.AttachDiskRequest {
		r := proto.CloneOf(fromStore(s, id))
		r.Owner = owner
		return r
	}
	end := hold(c, "one")
	a, b := attach(t, c.Client(), owned("a", "one")), attach(t, c.Client(), fromStore(s, "b"))
	_, err := c.Client().AttachDisk(t.Context(), fromStore(s, "a"))
	want(t, kind.InUse, err)
	_, err = c.Client().AttachDisk(t.Context(), owned("b", "one"))
	want(t, kind.Exists, err)
	end()
	eventually(t, func() error { // once the end of the one before was noticed
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		stream, err := c.Client().Hold(ctx, &attacherv1.HoldRequest{Owner: "one"})
		check(t, err)
		_, err = stream.Recv()
		return err
	})
	if strings.Contains(l.dump(true), a.SubsystemNqn) {
		t.Error("a disk outlives its hold")
	}
	check(t, l.whole(b))
	// A connection that broke is no death, but for whoever does not come back; one that is
	// known to be broken late may have been replaced.
	first, err := c.holds.Begin(t.Context(), "far", "host1")
	check(t, err)
	a = attach(t, c.Client(), owned("a", "far"))
	second, err := c.holds.Begin(t.Context(), "far", "host1")
	check(t, err)
	<-first.Taken()
	first.Leave(false)
	_, err = c.holds.Begin(t.Context(), "far", "host2")
	want(t, kind.InUse, err)
	second.Leave(true)
	third, err := c.holds.Begin(t.Context(), "far", "host1")
	check(t, err)
	time.Sleep(2 * l.o.HoldGrace)
	check(t, l.whole(a))
	third.Leave(true)
	eventually(t, func() error {
		if strings.Contains(l.dump(true), a.SubsystemNqn) {
			return errors.New("a disk outlives its hold")
		}
		return nil
	})
	// Over a restart an owner that comes back keeps its disks, another's go.
	end = hold(c, "back")
	gone := hold(c, "gone")
	a = attach(t, c.Client(), owned("a", "back"))
	d := attach(t, c.Client(), owned("c", "gone"))
	check(t, c.Close())
	end()
	gone()
	check(t, l.whole(a))
	check(t, l.whole(d))
	c = l.card()
	defer hold(c, "back")()
	eventually(t, func() error {
		if strings.Contains(l.dump(true), d.SubsystemNqn) {
			return errors.New("a disk outlives its hold")
		}
		return nil
	})
	check(t, l.whole(a))
	check(t, l.whole(b))
	detach(t, c.Client(), "a")
	detach(t, c.Client(), "b")
	l.clean()
}

// TestConcurrent has many callers at once, for the same and for different disks.
func TestConcurrent(t *testing.T) {
	var ids []string
	for i := range 32 {
		ids = append(ids, fmt.Sprintf("d%02d", i))
	}
	s := newStore(t, 2, ids...)
	l := newLab(t, 32)
	l.strangers(s)
	c := l.card().Client()
	for range 2 {
		var answers [2][]*attacherv1.CardDisk
		var wg sync.WaitGroup
		for twin := range answers {
			answers[twin] = make([]*attacherv1.CardDisk, len(ids))
			for i, id := range ids {
				wg.Go(func() {
					var err error
					if answers[twin][i], err = c.AttachDisk(context.Background(), fromStore(s, id)); err != nil {
						t.Error(err)
					}
				})
			}
		}
		wg.Wait()
		if t.Failed() {
			return
		}
		disks := answers[0]
		for i, d := range answers[1] {
			d.Steps, disks[i].Steps = nil, nil // how long this call took
			if !proto.Equal(disks[i], d) {
				t.Errorf("who asked twice at once was told of %v and %v", disks[i], d)
			}
		}
		for _, d := range disks {
			check(t, l.whole(d))
		}
		if remotes := strings.Count(l.dump(true), "controller thaw."); remotes != 1 {
			t.Errorf("%d connections to one subsystem", remotes)
		}
		if !bytes.Equal(l.read(disks[31]), s.content(ids[31])) {
			t.Error("a host reads something else than the store has")
		}
		for _, id := range ids {
			wg.Go(func() {
				if _, err := c.DetachDisk(context.Background(), &attacherv1.DetachDiskRequest{Id: id, Purpose: block}); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		l.clean()
	}
}

// TestPortals is a store with several: one that answers is enough, the others follow, and
// those that the store gave up go.
func TestPortals(t *testing.T) {
	s := newStore(t, 2, "a", "b")
	l := newLab(t, 2)
	c := l.card().Client()
	dead := freePort(t)
	r := proto.CloneOf(fromStore(s, "a"))
	r.GetAttachment().Portals = append([]*attacherv1.Portal{{Transport: "tcp", Address: "127.0.0.1", Service: dead}, {Transport: "rdma", Address: "127.0.0.1", Service: "1"}}, r.GetAttachment().Portals...)
	began := time.Now()
	attach(t, c, r)
	if took := time.Since(began); took > 3*time.Second {
		t.Errorf("a dead portal cost %s", took)
	}
	paths := func(want ...string) func() error {
		return func() error {
			r, err := opiv1.NewNvmeRemoteControllerServiceClient(l.conn).ListNvmeRemoteControllers(context.Background(), &opiv1.ListNvmeRemoteControllersRequest{})
			if err != nil || len(r.NvmeRemoteControllers) != 1 {
				return fmt.Errorf("%v %w", r, err)
			}
			have, err := opiv1.NewNvmeRemoteControllerServiceClient(l.conn).ListNvmePaths(context.Background(), &opiv1.ListNvmePathsRequest{Parent: r.NvmeRemoteControllers[0].Name})
			if err != nil || len(have.NvmePaths) != len(want) {
				return fmt.Errorf("%v %w", have, err)
			}
			for _, w := range want {
				if !strings.Contains(have.String(), "tcp:127.0.0.1:"+w) {
					return fmt.Errorf("%v lacks %s", have, w)
				}
			}
			return nil
		}
	}
	eventually(t, paths(s.ports...))
	s.listen(dead) // it is alive again
	eventually(t, paths(dead, s.ports[0], s.ports[1]))
	r = fromStore(s, "a")
	r.GetAttachment().Portals = r.GetAttachment().Portals[1:]
	a := attach(t, c, r)
	eventually(t, paths(s.ports[1]))
	if !bytes.Equal(l.read(a), s.content("a")) {
		t.Error("a host reads something else than the store has")
	}
	detach(t, c, "a")
	l.clean()
}

// TestOrphans is what bears the card's names without being on record.
func TestOrphans(t *testing.T) {
	s := newStore(t, 1, "a", "b")
	l := newLab(t, 4)
	l.strangers(s)
	names := identity.Card{Host: hostName}
	c := l.card()
	a := attach(t, c.Client(), fromStore(s, "a"))
	orphan := func() {
		nqn := names.Subsystem("block\x00lost")
		check(t, l.spdk.NvmfCreateSubsystem(t.Context(), spdk.SubsystemParams{NQN: nqn, SerialNumber: "x"}))
		_, err := l.spdk.BdevNVMeAttachController(t.Context(), spdk.BdevNVMeAttachControllerParams{Name: names.Remote("nqn.x", "nqn.y"), Type: "TCP", Family: "IPv4", Address: "127.0.0.1", Service: s.ports[0],
			SubNQN: s.disks["b"].SubsystemNqn, HostNQN: s.disks["b"].HostNqn})
		check(t, err)
		l.functions.Check, l.functions.Busy = nil, nil
		check(t, l.functions.Plug(t.Context(), nqn, opi.Function{Physical: 1, Virtual: 4}))
		check(t, l.functions.Plug(t.Context(), a.SubsystemNqn, opi.Function{Physical: 1, Virtual: 3}))
	}
	gone := func() {
		eventually(t, func() error {
			dump := l.dump(true)
			if strings.Count(dump, "subsystem ") != 1 || strings.Count(dump, "controller ") != 1 || strings.Count(dump, "function ") != 1 {
				return errors.New(dump)
			}
			return l.whole(a)
		})
		l.untouched()
	}
	orphan()
	gone()
	check(t, c.Close())
	orphan()
	l.card()
	gone()
}

// TestRecord is what a start finds.
func TestRecord(t *testing.T) {
	s := newStore(t, 1, "a")
	l := newLab(t, 2)
	registry := prometheus.NewRegistry()
	l.o.Registerer = registry
	c := l.card()
	a := attach(t, c.Client(), fromStore(s, "a"))
	families, err := registry.Gather()
	check(t, err)
	text := fmt.Sprint(families)
	for _, w := range []string{"thaw_card_step_seconds", "thaw_card_disks", "thaw_card_functions", `value:"nvmeNamespace"`} {
		if !strings.Contains(text, w) {
			t.Errorf("no metric %s", w)
		}
	}
	check(t, c.Close())
	_, err = c.AttachDisk(t.Context(), fromStore(s, "a"))
	want(t, kind.Unavailable, err)
	c = l.card()
	list, err := c.ListDisks(t.Context(), &attacherv1.ListDisksRequest{})
	check(t, err)
	a.Steps = nil
	if len(list.Disks) != 1 || !proto.Equal(list.Disks[0], a) {
		t.Errorf("%v, want %v", list, a)
	}
	check(t, l.whole(a))
	check(t, c.save(&disk{ID: "x", Purpose: 7, key: "bad\x00x"}))
	check(t, c.Close())
	_, err = New(l.o)
	want(t, kind.Corrupt, err)
	for _, o := range []Options{{}, {Bridge: l.conn, DBPath: "x", Host: hostName}, {Bridge: l.conn, DBPath: "x", Host: "A", Functions: l.o.Functions}, {Bridge: l.conn, DBPath: "x", Host: hostName, Functions: []Function{{}, {}}}} {
		_, err = New(o)
		want(t, kind.Invalid, err)
	}
	for _, f := range []string{"", "0:1", "0:1:2:3", "0:1:x", "0:1:70000", "0:01:2", "-1:0:0"} {
		_, err := ParseFunction(f)
		want(t, kind.Invalid, err)
	}
	if f, err := ParseFunction("1:2:3"); err != nil || f != (Function{1, 2, 3}) {
		t.Errorf("%v %v", f, err)
	}
}

// TestOtherUUID is a block that was made again at the store under the same number.
func TestOtherUUID(t *testing.T) {
	s := newStore(t, 1, "a")
	l := newLab(t, 2)
	c := l.card().Client()
	a := attach(t, c, fromStore(s, "a"))
	s.hide("a")
	s.disks["a"].Uuid = uuid.NewString()
	s.show("a")
	_, err := c.AttachDisk(t.Context(), fromStore(s, "a"))
	want(t, kind.Exists, err)
	detach(t, c, "a")
	b := attach(t, c, fromStore(s, "a"))
	if a.Uuid == b.Uuid || a.Serial == b.Serial || a.SubsystemNqn != b.SubsystemNqn {
		t.Errorf("%v then %v", a, b)
	}
	check(t, l.whole(b))
}

// TestDetachWhileRead takes a disk from a host that reads it all the time: it goes, and so
// does the host's connection to it.
func TestDetachWhileRead(t *testing.T) {
	s := newStore(t, 1, "a", "b")
	l := newLab(t, 2)
	l.strangers(s)
	c := l.card().Client()
	a, b := attach(t, c, fromStore(s, "a")), attach(t, c, fromStore(s, "b"))
	h := l.connect(a)
	defer h.Close()
	dev, err := h.Open(1)
	check(t, err)
	defer dev.Close()
	var reads atomic.Int64
	ended := make(chan error, 1)
	go func() {
		buf := make([]byte, 64<<10)
		for off := int64(0); ; off = (off + int64(len(buf))) % diskBytes {
			if _, err := dev.ReadAt(buf, off); err != nil {
				ended <- err
				return
			}
			reads.Add(1)
		}
	}()
	eventually(t, func() error {
		if reads.Load() < 100 {
			return errors.New("the host does not read")
		}
		return nil
	})
	began := time.Now()
	detach(t, c, "a")
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("a host that reads held it for %s", took)
	}
	select {
	case <-ended:
	case <-time.After(10 * time.Second):
		h.Close() // what waits for a subsystem that is gone
		<-ended
	}
	check(t, l.whole(b))
	detach(t, c, "b")
	l.clean()
}

// TestFormat reads what version 1 wrote, which must be read for ever.
func TestFormat(t *testing.T) {
	s := newStore(t, 1, "a")
	l := newLab(t, 2)
	db, err := openDB(l.o.DBPath)
	check(t, err)
	a := s.disks["a"]
	names := identity.Card{Host: hostName}
	id := names.NvmeNamespace("block\x00a", a.Uuid)
	check(t, db.Update(func(tx *bbolt.Tx) error {
		return errors.Join(
			tx.Bucket([]byte("disks")).Put([]byte("block\x00a"), fmt.Appendf(nil,
				`{"id":"a","purpose":1,"state":"attached","attachment":"11111111-2222-4333-8444-555555555555","function":"0:1:2",`+
					`"uuid":%q,"remote":{"subsystem":%q,"host_nqn":%q,"portals":[{"address":"127.0.0.1","port":%s}],"nsid":1,"uuid":%q},"size_bytes":1048576,"read_only":true,"created":1}`,
				id, a.SubsystemNqn, a.HostNqn, s.ports[0], a.Uuid)),
			tx.Bucket([]byte("functions")).Put([]byte("0:1:2"), []byte("{\"disk\":\"block\\u0000a\",\"leased\":true}")),
			tx.Bucket([]byte("functions")).Put([]byte("0:1:1"), []byte("{\"disk\":\"block\\u0000gone\",\"free\":1700000000000000000}")))
	}))
	check(t, db.Close())
	c := l.card()
	list, err := c.ListDisks(t.Context(), &attacherv1.ListDisksRequest{})
	check(t, err)
	if len(list.Disks) != 1 || list.Disks[0].AttachmentId != "11111111-2222-4333-8444-555555555555" || list.Disks[0].Function.VirtualFunction != 2 {
		t.Fatalf("%v", list)
	}
	eventually(t, func() error { return l.whole(list.Disks[0]) })
	detach(t, c.Client(), "a")
	l.clean()
	check(t, c.Close())
	// A newer program's is refused.
	newer, err := statedb.Open(statedb.Options{Path: l.o.DBPath, Part: dbPart, Version: dbVersion + 1, Upgrade: func(*bbolt.Tx, uint32) error { return nil }})
	check(t, err)
	check(t, newer.Close())
	_, err = New(l.o)
	want(t, kind.Unsupported, err)
}
