package attacher

import (
	"fmt"
	"maps"
	"slices"
	"sync"
	"testing"
	"time"

	attacherv1 "github.com/thaw-project/thaw/api/attacher/v1"
	"github.com/thaw-project/thaw/kind"
)

// ledger is an Exporter that only notes what it shows, and keeps it when the attacher dies,
// as one in another process does; package export has a real one, and TestIsolation and
// node/remote test both together.
type ledger struct {
	mu    sync.Mutex
	shown map[string]Export // guarded by mu: by node and lvol
	fail  error             // guarded by mu: of Export, which takes effect nevertheless
	stuck error             // guarded by mu: of Withdraw
}

func (l *ledger) Transports() []string { return []string{TransportTCP, TransportRDMA} }

func (l *ledger) Restore(exports []Export) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.shown = make(map[string]Export)
	for _, e := range exports {
		if _, ok := l.shown[e.Node+" "+e.Block]; ok {
			return fmt.Errorf("%+v comes twice", e)
		}
		l.shown[e.Node+" "+e.Block] = e
	}
	return nil
}

func (l *ledger) Export(e Export, _ string) (Exported, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if have, ok := l.shown[e.Node+" "+e.Block]; ok && have != e {
		return Exported{}, fmt.Errorf("%+v is shown as %+v", e, have)
	}
	for _, x := range l.shown {
		if x.Node == e.Node && x.NSID == e.NSID && x.Block != e.Block {
			return Exported{}, fmt.Errorf("%+v has the identifier of %+v", e, x)
		}
	}
	l.shown[e.Node+" "+e.Block] = e
	if l.fail != nil {
		return Exported{}, l.fail
	}
	return Exported{Subsystem: "s", UUID: "u", SizeBytes: 1}, nil
}

func (l *ledger) Withdraw(e Export) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.stuck != nil {
		return l.stuck
	}
	delete(l.shown, e.Node+" "+e.Block)
	return nil
}

func (l *ledger) set(fail, stuck error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.fail, l.stuck = fail, stuck
}

func (l *ledger) list() map[string]uint32 {
	l.mu.Lock()
	defer l.mu.Unlock()
	out := make(map[string]uint32)
	for k, e := range l.shown {
		out[k] = e.NSID
	}
	return out
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
	l.set(kind.Errorf(kind.IO, "no port"), nil)
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

func exportTo(node, name string, readOnly bool) func(*Attacher) error {
	return func(a *Attacher) error {
		_, err := a.Export(background, &attacherv1.ExportRequest{Lvol: name, Owner: "c", Node: node, ReadOnly: readOnly})
		return err
	}
}

func unexportOf(name string) func(*Attacher) error {
	return func(a *Attacher) error {
		_, err := a.Unexport(background, &attacherv1.UnexportRequest{Lvol: name, Owner: "c"})
		return err
	}
}

// TestExportToNode: an lvol that a converter on another machine writes, beside what its node
// has attached.
func TestExportToNode(t *testing.T) {
	h, l := exporting(t)
	h.crash("", 0, convertedImage)
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
	wantShown := func(want map[string]uint32) {
		t.Helper()
		if got := l.list(); !maps.Equal(got, want) {
			t.Fatalf("shown are %v, want %v", got, want)
		}
	}
	r, err := a.Export(background, &attacherv1.ExportRequest{Lvol: "w2", Owner: "c", Node: "n", Transport: TransportRDMA})
	x := r.GetAttachment()
	if err != nil || r.GetPath() != "" || r.GetSizeBytes() != 1 || !x.GetWritable() || x.GetNode() != "n" || x.GetBlock() != "w2" || x.GetTransport() != TransportRDMA ||
		x.GetNsid() != 1 || x.GetUuid() != "u" || x.GetAttachmentId() == "" {
		t.Fatalf("%v, %v", r, err)
	}
	again, err := a.Export(background, &attacherv1.ExportRequest{Lvol: "w2", Owner: "c", Node: "n"})
	if err != nil || again.GetAttachment().GetAttachmentId() != x.GetAttachmentId() || again.GetAttachment().GetTransport() != TransportRDMA {
		t.Fatalf("%v, %v", again, err)
	}
	refused(exportTo("m", "w2", false), kind.Exists)
	refused(exportTo("", "w2", false), kind.Exists)
	refused(exportTo("n", "w2", true), kind.Exists)
	refused(exportTo("N", "w2", false), kind.Invalid)
	refused(exportTo("n", soldier, false), kind.ReadOnly)
	refused(func(a *Attacher) error {
		_, err := a.Export(background, &attacherv1.ExportRequest{Lvol: "w2", Owner: "c", Node: "n", Transport: TransportTCP})
		return err
	}, kind.Exists)
	refused(func(a *Attacher) error {
		_, err := a.Export(background, &attacherv1.ExportRequest{Lvol: soldier, ReadOnly: true, Owner: "c", Node: "n", Transport: TransportRBD})
		return err
	}, kind.Unsupported)
	refused(remove2("w2"), kind.InUse)
	if got := listed(t, a, ""); len(got) > 0 {
		t.Fatalf("an export is listed as attachment: %v", got)
	}

	// Attachments get other identifiers; what is both is shown once, as long as it is one.
	do(chain(attachTo("n", soldier), exportTo("n", soldier, true), exportTo("n", lowest, true), attachTo("n", lowest)))
	wantShown(map[string]uint32{"n w2": 1, "n " + soldier: 2, "n " + lowest: 3})
	do(chain(detachFrom("n", soldier), unexportOf(lowest)))
	wantShown(map[string]uint32{"n w2": 1, "n " + soldier: 2, "n " + lowest: 3})
	do(attachTo("n", soldier))

	a.Close()
	a = h.start(time.Hour)
	wantShown(map[string]uint32{"n w2": 1, "n " + soldier: 2, "n " + lowest: 3})
	holdNow(h, a, "c")
	do(exportTo("n", "w2", false))
	do(chain(unexportOf("w2"), unexportOf("w2"), unexportOf(soldier)))
	wantShown(map[string]uint32{"n " + soldier: 2, "n " + lowest: 3})
	do(exportTo("n", "w2", false))
	wantShown(map[string]uint32{"n " + soldier: 2, "n " + lowest: 3, "n w2": 4})
	do(chain(detachFrom("n", soldier), detachFrom("n", lowest)))

	// A failure leaves nothing, also one that took effect.
	do(unexportOf("w2"))
	l.set(kind.Errorf(kind.IO, "no port"), nil)
	refused(exportTo("n", "w2", false), kind.IO)
	wantShown(map[string]uint32{})
	l.set(nil, nil)
	do(exportTo("n", "w2", false))
	a.Close()

	a = h.start(time.Nanosecond) // its owner does not come back
	defer a.Close()
	for deadline := time.Now().Add(10 * time.Second); len(l.list()) > 0; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%v is left", l.list())
		}
	}
}

// TestExporterAway: what an exporter that is away may or may not have done is in order soon
// after it is back.
func TestExporterAway(t *testing.T) {
	h, l := exporting(t)
	h.crash("", 0, convertedImage)
	a := h.start(time.Hour)
	defer a.Close()
	away := kind.Errorf(kind.Unavailable, "the target does not answer")
	l.set(away, away)
	for _, node := range []string{"n", "m"} {
		if err := attachTo(node, soldier)(a); kind.Of(err) != kind.Unavailable {
			t.Fatal(err)
		}
	}
	if err := deleteImage(a); kind.Of(err) != kind.InUse {
		t.Fatalf("an image that a node may read is removed: %v", err)
	}
	held := holdNow(h, a, "c")
	if err := exportTo("n", "w2", false)(a); kind.Of(err) != kind.Unavailable {
		t.Fatal(err)
	}
	held.Leave(false)
	<-held.Gone()
	if len(l.list()) != 3 {
		t.Fatalf("%v", l.list())
	}
	l.set(nil, nil)
	if err := attachTo("m", soldier)(a); err != nil { // that one wants it still
		t.Fatal(err)
	}
	begin := time.Now()
	for len(l.list()) > 1 || len(h.records(a)) > 0 {
		if time.Since(begin) > 10*time.Second {
			t.Fatalf("%v and %v are left", l.list(), h.records(a))
		}
		time.Sleep(time.Millisecond)
	}
	t.Logf("in order after %s", time.Since(begin))
	if got := listed(t, a, ""); len(got) != 1 || len(l.list()) != 1 {
		t.Fatalf("recorded are %v, shown %v", got, l.list())
	}
}

func TestReplayedDetach(t *testing.T) {
	h, l := exporting(t)
	h.crash("", 0, convertedImage)
	a := h.start(time.Hour)
	defer a.Close()
	attach := func() string {
		t.Helper()
		r, err := a.AttachBlock(background, &attacherv1.AttachBlockRequest{Node: "n", Block: soldier})
		if err != nil || r.GetAttachmentId() == "" {
			t.Fatal(r, err)
		}
		return r.GetAttachmentId()
	}
	detach := func(id string) error {
		_, err := a.DetachBlock(background, &attacherv1.DetachBlockRequest{Node: "n", Block: soldier, AttachmentId: id})
		return err
	}
	first := attach()
	if attach() != first {
		t.Fatal("a repeated attach is another one")
	}
	for range 2 { // a lost answer
		if err := detach(first); err != nil {
			t.Fatal(err)
		}
	}
	second := attach()
	if err := detach(first); second == first || kind.Of(err) != kind.InUse {
		t.Fatalf("replayed: %v", err)
	}
	if err := detach("x"); kind.Of(err) != kind.Invalid {
		t.Fatal(err)
	}
	if len(l.list()) != 1 || len(listed(t, a, "n")) != 1 {
		t.Fatal("it is gone")
	}
	if err := detach(second); err != nil || len(l.list()) != 0 {
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
	for i := 1; i <= MaxAttachments; i++ {
		if id, err := a.reserveNSID("n"); err != nil || id != uint32(i) {
			t.Fatalf("%d, %v", id, err)
		}
		if i == 3 { // gone, and not given again while there are others
			a.freeNSID("n", 2)
		}
	}
	if id, err := a.reserveNSID("n"); err != nil || id != 2 {
		t.Fatalf("the free one: %d, %v", id, err)
	}
	if _, err := a.reserveNSID("n"); kind.Of(err) != kind.NoSpace {
		t.Fatalf("one more than there are: %v", err)
	}
	for _, node := range []string{"m", "n0", "n-1"} { // other nodes have identifiers of their own
		if id, err := a.reserveNSID(node); err != nil || id != 1 {
			t.Errorf("%s: %d, %v", node, id, err)
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
