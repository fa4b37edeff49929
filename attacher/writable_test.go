package attacher

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"go.etcd.io/bbolt"

	attacherv1 "github.com/thaw-project/thaw/api/attacher/v1"
	"github.com/thaw-project/thaw/kind"
)

func attachRW(node, id, block string) func(*Attacher) error {
	return func(a *Attacher) error {
		_, err := a.AttachWritable(background, &attacherv1.AttachWritableRequest{Node: node, Id: id, Block: block})
		return err
	}
}

func detachRW(node, id string) func(*Attacher) error {
	return func(a *Attacher) error {
		_, err := a.DetachWritable(background, &attacherv1.DetachWritableRequest{Node: node, Id: id})
		return err
	}
}

func deleteRW(node, id string) func(*Attacher) error {
	return func(a *Attacher) error {
		_, err := a.DeleteWritable(background, &attacherv1.DeleteWritableRequest{Node: node, Id: id})
		return err
	}
}

// layers are the writable layers on record, as node id block nsid.
func layers(t *testing.T, a *Attacher) (out []string) {
	t.Helper()
	r, err := a.ListAttachments(background, &attacherv1.ListAttachmentsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for _, x := range r.GetAttachments() {
		if x.GetWritable() {
			out = append(out, fmt.Sprintf("%s %s %s %d %s", x.GetNode(), x.GetWritableId(), x.GetBlock(), x.GetNsid(), x.GetTransport()))
		}
	}
	return out
}

func (h *host) has(name string) bool {
	_, err := h.store.Get(name)
	return err == nil
}

func TestWritable(t *testing.T) {
	h, l := exporting(t)
	h.crash("", 0, convertedImage)
	a := h.start(time.Hour)
	defer func() { a.Close() }()
	do := func(call func(*Attacher) error) {
		t.Helper()
		if err := call(a); err != nil {
			t.Fatal(err)
		}
	}
	refused := func(call func(*Attacher) error, k kind.Kind) {
		t.Helper()
		if err := call(a); kind.Of(err) != k {
			t.Fatalf("got %v, want kind %q", err, k)
		}
	}
	wantLayers := func(want ...string) {
		t.Helper()
		if got := layers(t, a); !slices.Equal(got, want) {
			t.Fatalf("layers %q, want %q", got, want)
		}
	}
	rw := writableLvol("n", "c1")
	x, err := a.AttachWritable(background, &attacherv1.AttachWritableRequest{Node: "n", Id: "c1", Block: soldier})
	if err != nil || !x.GetWritable() || x.GetBlock() != soldier || x.GetWritableId() != "c1" || x.GetNsid() != 1 || x.GetUuid() != "u" || x.GetAttachmentId() == "" {
		t.Fatalf("%v, %v", x, err)
	}
	// A soldier is a clone itself: its layer is a sibling.
	if info, err := h.store.Get(rw); err != nil || info.Parent != second || info.ReadOnly || !l.shown["n "+rw].Writable {
		t.Fatalf("%+v, %v, %v", info, err, l.shown)
	}
	d, err := h.store.OpenLvol(rw, false)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := d.WriteAt([]byte("kept"), 0); err != nil {
		t.Fatal(err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	do(chain(attachRW("n", "c1", soldier), attachTo("n", soldier), attachRW("m", "c1", second), attachRW("n", "c2", lowest)))
	wantLayers("m c1 "+second+" 1 nvme-tcp", "n c1 "+soldier+" 1 nvme-tcp", "n c2 "+lowest+" 3 nvme-tcp")
	refused(attachRW("n", "c1", second), kind.Exists)
	refused(attachRW("n", "c3", "w2"), kind.NotFound) // being written
	refused(attachRW("n", "c3", rw), kind.NotFound)
	refused(attachRW("n", "c3", "scratch-1"), kind.NotFound)
	refused(attachRW("n", "c/3", soldier), kind.Invalid)
	refused(attachRW("n", strings.Repeat("c", 65), soldier), kind.Invalid)
	refused(attachRW("", "c3", soldier), kind.Invalid)
	if _, err := a.AttachWritable(background, &attacherv1.AttachWritableRequest{Node: "n", Id: "c1", Block: soldier, Transport: TransportRDMA}); kind.Of(err) != kind.Exists {
		t.Fatal(err)
	}

	// What a node writes is nobody else's, and what is below stays.
	holdNow(h, a, "c")
	refused(exportTo("m", rw, false), kind.InUse)
	refused(exportTo("", rw, true), kind.InUse)
	refused(remove2(rw), kind.InUse)
	for _, call := range []func() error{
		func() error {
			_, err := a.CreateLvol(background, &attacherv1.CreateLvolRequest{Name: "rw-x", SizeBytes: 64 << 20})
			return err
		},
		func() error {
			_, err := a.CloneLvol(background, &attacherv1.CloneLvolRequest{Name: "rw-x", Snapshot: second})
			return err
		},
		func() error {
			_, err := a.RenameLvol(background, &attacherv1.RenameLvolRequest{Name: "w2", NewName: "rw-x"})
			return err
		},
		func() error {
			_, err := a.SnapshotLvol(background, &attacherv1.SnapshotLvolRequest{Lvol: "w2", Snapshot: "rw-x"})
			return err
		},
	} {
		if err := call(); kind.Of(err) != kind.Invalid {
			t.Fatalf("the name of a writable layer: %v", err)
		}
	}
	if _, err := a.RenameLvol(background, &attacherv1.RenameLvolRequest{Name: rw, NewName: "mine"}); kind.Of(err) != kind.InUse {
		t.Fatal(err)
	}
	do(detachFrom("n", soldier))
	refused(deleteImage, kind.InUse)
	do(detachRW("n", "c1"))
	do(detachRW("n", "c1"))
	refused(deleteImage, kind.InUse)
	refused(remove2(rw), kind.InUse)
	wantLayers("m c1 "+second+" 1 nvme-tcp", "n c1 "+soldier+" 0 ", "n c2 "+lowest+" 3 nvme-tcp")

	a.Close()
	a = h.start(time.Hour)
	wantLayers("m c1 "+second+" 1 nvme-tcp", "n c1 "+soldier+" 0 ", "n c2 "+lowest+" 3 nvme-tcp")
	if got := l.list(); len(got) != 2 {
		t.Fatalf("shown are %v", got)
	}
	refused(deleteImage, kind.InUse)
	y, err := a.AttachWritable(background, &attacherv1.AttachWritableRequest{Node: "n", Id: "c1", Block: soldier, Transport: TransportRDMA})
	if err != nil || y.GetAttachmentId() == x.GetAttachmentId() || y.GetTransport() != TransportRDMA {
		t.Fatalf("%v, %v", y, err)
	}
	r, err := a.ListAttachments(background, &attacherv1.ListAttachmentsRequest{Node: "n"})
	if err != nil || len(r.GetAttachments()) != 2 || r.GetAttachments()[0].GetAllocatedBytes() == 0 || r.GetAttachments()[1].GetAllocatedBytes() != 0 || r.GetAttachments()[0].GetSizeBytes() != 64<<20 {
		t.Fatalf("%v, %v", r, err)
	}
	d, err = h.store.OpenLvol(rw, true)
	if err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 4)
	if _, err := d.ReadAt(got, 0); err != nil || string(got) != "kept" {
		t.Fatalf("%q, %v", got, err)
	}
	d.Close()

	// Requests that come again after their time.
	old := x.GetAttachmentId()
	if _, err := a.DetachWritable(background, &attacherv1.DetachWritableRequest{Node: "n", Id: "c1", AttachmentId: old}); kind.Of(err) != kind.InUse {
		t.Fatal(err)
	}
	if _, err := a.DeleteWritable(background, &attacherv1.DeleteWritableRequest{Node: "n", Id: "c1", AttachmentId: old}); kind.Of(err) != kind.InUse || !h.has(rw) {
		t.Fatal(err)
	}
	for range 2 {
		if _, err := a.DeleteWritable(background, &attacherv1.DeleteWritableRequest{Node: "n", Id: "c1", AttachmentId: y.GetAttachmentId()}); err != nil {
			t.Fatal(err)
		}
	}
	if h.has(rw) {
		t.Fatal("it is there")
	}
	refused(deleteImage, kind.InUse)

	// An image that is replaced goes when the last layer over its blocks does.
	holdNow(h, a, "c")
	do(chain(attachRW("n", "c1", soldier), soldierOf(other), putImage(other), deleteRW("m", "c1"), deleteRW("n", "c2"), deleteRW("n", "absent")))
	refused(attachRW("n", "c9", "none"), kind.NotFound)
	if !h.has(soldier) {
		t.Fatal("the soldier of a layer is gone")
	}
	do(deleteRW("n", "c1"))
	for deadline := time.Now().Add(10 * time.Second); h.has(soldier); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the soldier of a replaced image stays")
		}
	}
	wantLayers()
	do(chain(endHold, deleteImage))
	if got := h.lvols(); len(got) != 0 {
		t.Fatalf("%q", got)
	}
}

// TestWritableKilledAtEveryStep: repeated, an operation ends as an undisturbed one does; and
// whatever was interrupted, its node can delete.
func TestWritableKilledAtEveryStep(t *testing.T) {
	made := chain(convertedImage, endHold, attachRW("n", "c1", soldier))
	for _, o := range nodeOperations()[2:] {
		t.Run(o.name, func(t *testing.T) {
			h, _ := exporting(t)
			h.crash("", 0, o.before)
			steps := h.crash("", 0, o.crash)
			wantLvols, wantDisks := h.lvols(), h.disks()
			if len(steps) == 0 {
				t.Fatal("it has no steps")
			}
			for _, step := range steps {
				where := fmt.Sprintf("killed at %q", step)
				h, _ := exporting(t)
				h.crash("", 0, o.before)
				h.crash(step, 0, o.crash)
				a := h.start(time.Hour)
				for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
					err := o.crash(a)
					if err == nil {
						break
					}
					if time.Now().After(deadline) {
						t.Fatalf("%s, again: %v", where, err)
					}
				}
				if got := h.lvols(); !slices.Equal(got, wantLvols) {
					t.Errorf("%s, again: lvols %q, want %q", where, got, wantLvols)
				}
				if got := h.disks(); !slices.Equal(got, wantDisks) {
					t.Errorf("%s, again: shown %q, want %q", where, got, wantDisks)
				}
				a.Close()

				h, l := exporting(t)
				h.crash("", 0, o.before)
				h.crash(step, 0, o.crash)
				a = h.start(time.Hour)
				if err := chain(deleteRW("n", "c1"), deleteImage)(a); err != nil {
					t.Errorf("%s, deleted: %v", where, err)
				}
				if got := l.list(); len(got) > 0 || len(layers(t, a)) > 0 {
					t.Errorf("%s, deleted: shown %v, recorded %q", where, got, layers(t, a))
				}
				if got := h.lvols(); len(got) != 0 {
					t.Errorf("%s, deleted: lvols %q", where, got)
				}
				a.Close()
			}
		})
	}
	// A deletion that was begun ends by itself.
	for _, step := range []string{"delete writable: recorded", "detach writable: withdrawn", "delete writable: deleted"} {
		h, l := exporting(t)
		h.crash("", 0, made)
		h.crash(step, 0, deleteRW("n", "c1"))
		a := h.start(time.Hour)
		for deadline := time.Now().Add(10 * time.Second); h.has(writableLvol("n", "c1")) || len(layers(t, a)) > 0 || len(l.list()) > 0; time.Sleep(time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("killed at %q: %q and %v are left", step, layers(t, a), l.list())
			}
		}
		a.Close()
	}
}

// TestWritableForeign: an lvol that has a layer's name and no record is not taken for one.
func TestWritableForeign(t *testing.T) {
	h, _ := exporting(t)
	h.crash("", 0, convertedImage)
	rw := writableLvol("n", "c1")
	if _, err := h.store.Clone(second, rw); err != nil {
		t.Fatal(err)
	}
	a := h.start(time.Hour)
	defer a.Close()
	if err := attachRW("n", "c1", soldier)(a); kind.Of(err) != kind.Exists {
		t.Fatal(err)
	}
	if err := deleteRW("n", "c1")(a); err != nil || !h.has(rw) || len(layers(t, a)) > 0 {
		t.Fatalf("%v, %q", err, layers(t, a))
	}
	// It can be removed by hand.
	if err := chain(remove2(rw), attachRW("n", "c1", soldier))(a); err != nil {
		t.Fatal(err)
	}
}

// TestWritableLost: a layer whose lvol is gone is not made again, empty, behind its user's back.
func TestWritableLost(t *testing.T) {
	h, l := exporting(t)
	h.crash("", 0, chain(convertedImage, attachRW("n", "c1", soldier), detachRW("n", "c1")))
	if err := h.store.Delete(writableLvol("n", "c1")); err != nil {
		t.Fatal(err)
	}
	l.set(kind.Errorf(kind.NotFound, "no such lvol"), nil) // as package export says
	a := h.start(time.Hour)
	defer a.Close()
	if err := attachRW("n", "c1", soldier)(a); kind.Of(err) != kind.NotFound || len(l.list()) > 0 {
		t.Fatal(err, l.list())
	}
	if h.has(writableLvol("n", "c1")) {
		t.Fatal("it is made again")
	}
	r, err := a.CheckStore(background, &attacherv1.CheckStoreRequest{})
	if err != nil || len(r.GetProblems()) != 1 || r.GetProblems()[0].GetType() != ProblemMissing || r.GetProblems()[0].GetLvol() != writableLvol("n", "c1") {
		t.Fatal(r, err)
	}
	if err := chain(deleteRW("n", "c1"), deleteImage)(a); err != nil {
		t.Fatal(err)
	}
}

func TestWritablesAreBounded(t *testing.T) {
	h, _ := exporting(t)
	h.crash("", 0, convertedImage)
	a := h.start(time.Hour)
	if err := a.db.Update(func(tx *bbolt.Tx) error {
		for i := range MaxWritables - 1 {
			w := writableRecord{Block: soldier, Base: second}
			if err := put(tx, writablesBucket, string(writableKey("n", fmt.Sprint("f", i))), w); err != nil {
				return err
			}
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if err := chain(attachRW("n", "c1", soldier), attachRW("m", "c1", soldier))(a); err != nil {
		t.Fatal(err)
	}
	if err := attachRW("n", "c2", soldier)(a); kind.Of(err) != kind.NoSpace || h.has(writableLvol("n", "c2")) {
		t.Fatal(err)
	}
	if err := attachRW("n", "c1", soldier)(a); err != nil {
		t.Fatal(err)
	}
	a.Close()
}

func TestWritableNames(t *testing.T) {
	names := make(map[string]bool)
	for _, n := range [][2]string{{"n", "c1"}, {"n", "c2"}, {"m", "c1"}, {"nc", "1"}} {
		name := writableLvol(n[0], n[1])
		if err := checkName("lvol name", name); err != nil || names[name] || !isWritableLvol(name) {
			t.Fatal(name, err)
		}
		names[name] = true
	}
	// It must never change: layers are found by it.
	if got := writableLvol("n", "c1"); got != "rw-19e5cd67193beac03742ac3a3b3cfb0ceefcf913" {
		t.Fatal(got)
	}
}

func TestWritableAway(t *testing.T) {
	h, l := exporting(t)
	h.crash("", 0, convertedImage)
	a := h.start(time.Hour)
	defer a.Close()
	away := kind.Errorf(kind.Unavailable, "the target does not answer")
	l.set(away, away)
	if err := attachRW("n", "c1", soldier)(a); kind.Of(err) != kind.Unavailable {
		t.Fatal(err)
	}
	if err := deleteRW("n", "c1")(a); kind.Of(err) != kind.Unavailable {
		t.Fatal(err)
	}
	l.set(nil, nil)
	begin := time.Now()
	for h.has(writableLvol("n", "c1")) || len(layers(t, a)) > 0 || !maps.Equal(l.list(), map[string]uint32{}) || deleteImage(a) != nil {
		if time.Since(begin) > 10*time.Second {
			t.Fatalf("%q and %v are left", layers(t, a), l.list())
		}
		time.Sleep(time.Millisecond)
	}
}

func FuzzWritable(f *testing.F) {
	f.Add([]byte("n\x00b"), []byte(`{"block":"b","base":"b","created":5,"nsid":1,"transport":"nvme-tcp"}`))
	f.Fuzz(func(t *testing.T, key, raw []byte) {
		w, err := decodeWritable(key, raw)
		if err != nil {
			return
		}
		if !slices.Equal(writableKey(w.node, w.id), key) || w.NSID > MaxAttachments || checkName("", w.lvol()) != nil {
			t.Fatalf("%q %q: %+v", key, raw, w)
		}
	})
}
