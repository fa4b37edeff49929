package attacher

import (
	"fmt"
	"maps"
	"slices"
	"sync"
	"testing"
	"time"

	"go.etcd.io/bbolt"

	attacherv1 "github.com/thaw-project/thaw/api/attacher/v1"
	"github.com/thaw-project/thaw/kind"
)

// ledger is an Exporter that only notes what it shows; package export has the real one,
// and node/remote tests both together.
type ledger struct {
	mu    sync.Mutex
	shown map[string]uint32 // guarded by mu: nsid by node and block
	fail  error             // guarded by mu: of Export
}

func (l *ledger) Transports() []string { return []string{"nvme-tcp"} }

func (l *ledger) Restore(exports []Export) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.shown = make(map[string]uint32)
	for _, e := range exports {
		l.shown[e.Node+" "+e.Block] = e.NSID
	}
	return nil
}

func (l *ledger) Export(e Export, _ string) (Exported, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.fail != nil {
		return Exported{}, l.fail
	}
	l.shown[e.Node+" "+e.Block] = e.NSID
	return Exported{Subsystem: "s", UUID: "u", SizeBytes: 1}, nil
}

func (l *ledger) Withdraw(e Export) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.shown, e.Node+" "+e.Block)
	return nil
}

func (l *ledger) list() map[string]uint32 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return maps.Clone(l.shown)
}

// exporting is a host whose attachers export.
func exporting(t *testing.T) (*host, *ledger) {
	h := newHost(t)
	l := &ledger{}
	h.exporter = l
	return h, l
}

func attachTo(node, block string) func(*Attacher) error {
	return func(a *Attacher) error {
		_, err := a.AttachBlock(background, &attacherv1.AttachBlockRequest{Node: node, Block: block})
		return err
	}
}

func detachFrom(node, block string) func(*Attacher) error {
	return func(a *Attacher) error {
		_, err := a.DetachBlock(background, &attacherv1.DetachBlockRequest{Node: node, Block: block})
		return err
	}
}

var convertedImage = chain(create, snapshot, clone, snapshot2, soldierOf(soldier), putImage(soldier))

func listed(t *testing.T, a *Attacher, node string) map[string]uint32 {
	t.Helper()
	r, err := a.ListAttachments(background, &attacherv1.ListAttachmentsRequest{Node: node})
	if err != nil {
		t.Fatal(err)
	}
	out := make(map[string]uint32)
	for _, x := range r.GetAttachments() {
		out[x.GetNode()+" "+x.GetBlock()] = x.GetNsid()
	}
	return out
}

func TestAttachmentKilledAtEveryStep(t *testing.T) {
	for _, o := range []struct {
		name          string
		before, crash func(*Attacher) error
	}{
		{"attach", convertedImage, attachTo("n", soldier)},
		{"detach", chain(convertedImage, attachTo("n", soldier)), detachFrom("n", soldier)},
	} {
		t.Run(o.name, func(t *testing.T) {
			h, l := exporting(t)
			h.crash("", 0, o.before)
			steps := h.crash("", 0, o.crash)
			want := l.list()
			if len(steps) == 0 {
				t.Fatal("it has no steps")
			}
			for _, step := range steps {
				h, l := exporting(t)
				h.crash("", 0, o.before)
				h.crash(step, 0, o.crash)
				a := h.start(time.Hour)
				// What is on record is shown, at once and before anybody asks.
				if got, shown := listed(t, a, ""), l.list(); !maps.Equal(got, shown) {
					t.Errorf("killed at %q: %v is recorded and %v shown", step, got, shown)
				}
				if err := o.crash(a); err != nil {
					t.Errorf("killed at %q, again: %v", step, err)
				}
				if got := l.list(); !maps.Equal(got, want) || !maps.Equal(listed(t, a, ""), want) {
					t.Errorf("killed at %q, again: %v, want %v", step, got, want)
				}
				a.Close()
			}
		})
	}
}

func TestAttachedBlocksStay(t *testing.T) {
	h, l := exporting(t)
	a := h.start(time.Hour)
	holdNow(h, a, "c")
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
	do(chain(create, snapshot, clone, snapshot2, soldierOf(soldier)))
	for _, block := range []string{"w", "w2", "none"} { // being written, and nothing
		refused(attachTo("n", block), kind.NotFound)
	}
	refused(attachTo("", soldier), kind.Invalid)
	refused(attachTo("N", soldier), kind.Invalid)
	refused(attachTo("n", "a/b"), kind.Invalid)
	do(putImage(soldier))
	do(chain(attachTo("n", soldier), attachTo("n", soldier), attachTo("m", soldier), attachTo("n", lowest)))
	refused(deleteImage, kind.InUse)

	a.Close()
	a = h.start(time.Hour) // what nodes have survives a restart
	holdNow(h, a, "c")
	want := map[string]uint32{"n " + soldier: 1, "m " + soldier: 1, "n " + lowest: 2}
	if got := l.list(); !maps.Equal(got, want) {
		t.Fatalf("shown are %v, want %v", got, want)
	}
	refused(deleteImage, kind.InUse)
	do(detachFrom("n", lowest))
	// The image is replaced: its soldier goes when the last node lets go of it.
	do(chain(soldierOf(other), putImage(other)))
	has := func(name string) bool { _, err := h.store.Get(name); return err == nil }
	do(detachFrom("m", soldier))
	refused(remove2(soldier), kind.InUse)
	do(attachTo("n", soldier)) // one that has it may ask again
	do(detachFrom("n", soldier))
	for deadline := time.Now().Add(10 * time.Second); has(soldier); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the soldier of a replaced image stays")
		}
	}
	refused(attachTo("n", soldier), kind.NotFound)
	do(deleteImage)
	a.Close()
}

func remove2(name string) func(*Attacher) error {
	return func(a *Attacher) error {
		_, err := a.DeleteLvol(background, &attacherv1.DeleteLvolRequest{Name: name})
		return err
	}
}

func TestAttachFailureLeavesNothing(t *testing.T) {
	h, l := exporting(t)
	h.crash("", 0, convertedImage)
	a := h.start(time.Hour)
	defer a.Close()
	l.fail = kind.Errorf(kind.IO, "no port")
	if err := attachTo("n", soldier)(a); kind.Of(err) != kind.IO {
		t.Fatal(err)
	}
	if got := listed(t, a, ""); len(got) != 0 {
		t.Fatalf("recorded are %v", got)
	}
	if err := deleteImage(a); err != nil {
		t.Fatal(err)
	}
}

func TestStoreThatExportsNothing(t *testing.T) {
	h := newHost(t)
	h.crash("", 0, convertedImage)
	a := h.start(time.Hour)
	defer a.Close()
	if err := attachTo("n", soldier)(a); kind.Of(err) != kind.Unsupported {
		t.Fatal(err)
	}
	if err := detachFrom("n", soldier)(a); err != nil {
		t.Fatal(err)
	}
}

// TestNSIDs: an identifier is a block's as long as it is attached, and rests afterwards.
func TestNSIDs(t *testing.T) {
	h, _ := exporting(t)
	a := h.start(time.Hour)
	defer a.Close()
	give := func(i int) (id uint32, err error) {
		err = a.db.Update(func(tx *bbolt.Tx) error {
			if id, err = freeNSID(tx, "n"); err != nil {
				return err
			}
			return put(tx, attachmentsBucket, string(attachmentKey("n", fmt.Sprintf("b%04d", i))), attachmentRecord{NSID: id})
		})
		return id, err
	}
	for i := 1; i <= MaxAttachments; i++ {
		if id, err := give(i); err != nil || id != uint32(i) {
			t.Fatalf("%d, %v", id, err)
		}
		if i == 3 { // gone, and not given again while there are others
			if err := a.dropAttachment(Export{Node: "n", Block: "b0002"}); err != nil {
				t.Fatal(err)
			}
		}
	}
	if id, err := give(2000); err != nil || id != 2 {
		t.Fatalf("the free one: %d, %v", id, err)
	}
	if _, err := give(2001); kind.Of(err) != kind.NoSpace {
		t.Fatalf("one more than there are: %v", err)
	}
	// Other nodes have identifiers of their own, also one whose name begins the same.
	for _, node := range []string{"m", "n0", "n-1"} {
		if err := a.db.View(func(tx *bbolt.Tx) error {
			id, err := freeNSID(tx, node)
			if err == nil && id != 1 {
				err = fmt.Errorf("%d", id)
			}
			return err
		}); err != nil {
			t.Errorf("%s: %v", node, err)
		}
	}
}

func FuzzAttachment(f *testing.F) {
	f.Add([]byte("n\x00b"), []byte(`{"nsid":1,"transport":"nvme-tcp","created":5}`))
	f.Fuzz(func(t *testing.T, key, raw []byte) {
		e, r, err := decodeAttachment(key, raw)
		if err != nil {
			return
		}
		if !slices.Equal(attachmentKey(e.Node, e.Block), key) || e.NSID < 1 || e.NSID > MaxAttachments || r.NSID != e.NSID {
			t.Fatalf("%q %q: %+v", key, raw, e)
		}
	})
}
