package attacher

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"go.etcd.io/bbolt"

	attacherv1 "github.com/thaw-project/thaw/api/attacher/v1"
	"github.com/thaw-project/thaw/attacher/hold"
	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/lvol"
	"github.com/thaw-project/thaw/node/present"
	"github.com/thaw-project/thaw/node/present/presenttest"
	"github.com/thaw-project/thaw/target/bdev"
)

// host is what survives an attacher: the store, the presenter and the database.
type host struct {
	*testing.T
	store     *lvol.Store
	presenter *presenttest.Presenter
	exporter  Exporter // nil: none
	db        string
	wrap      func(LvolStore) LvolStore // nil: none
}

func newHost(t *testing.T) *host {
	t.Helper()
	h := &host{T: t, db: filepath.Join(t.TempDir(), "attacher.db")}
	pool := filepath.Join(t.TempDir(), "pool")
	if err := lvol.Create(lvol.CreateOptions{Dir: pool, CapacityBytes: 1 << 30}); err != nil {
		t.Fatal(err)
	}
	var err error
	if h.store, err = lvol.Open(lvol.Options{Dir: pool}); err != nil {
		t.Fatal(err)
	}
	h.presenter = presenttest.New(func(source present.Source, readOnly bool) (bdev.Device, error) {
		d, err := h.store.OpenLvol(source.Lvol, readOnly)
		if err != nil {
			return nil, err
		}
		return d, nil
	})
	t.Cleanup(func() {
		h.presenter.Reboot()
		h.store.Close()
	})
	return h
}

func (h *host) start(grace time.Duration) *Attacher {
	h.Helper()
	return h.startWith(Options{HoldGrace: grace})
}

func (h *host) startWith(o Options) *Attacher {
	h.Helper()
	var lvols LvolStore = h.store
	if h.wrap != nil {
		lvols = h.wrap(lvols)
	}
	o.Lvols, o.Presenter, o.DBPath, o.Target, o.Exporter = lvols, h.presenter, h.db, "t", h.exporter
	o.Sync = func(context.Context, string) error { return nil }
	a, err := New(o)
	if err != nil {
		h.Fatal(err)
	}
	return a
}

// holdNow makes owner's hold live without a stream, as one that never ends.
func holdNow(h *host, a *Attacher, owner string) *hold.Hold {
	h.Helper()
	held, err := a.holds.Begin(context.Background(), owner, "")
	if err != nil {
		h.Fatal(err)
	}
	return held
}

// crash runs call on an attacher of its own until it reaches the nth step named step,
// or its end for step "", and abandons it there as SIGKILL would. It returns the steps
// it reached.
func (h *host) crash(step string, nth int, call func(*Attacher) error) (steps []string) {
	h.Helper()
	end := make(chan error, 1)
	a := h.startWith(Options{HoldGrace: time.Hour, idle: true, step: func(name string) {
		steps = append(steps, name)
		if name == step {
			if nth--; nth < 0 {
				end <- nil
				runtime.Goexit() // runs unlocks and nothing that writes
			}
		}
	}})
	holdNow(h, a, "c")
	go func() { end <- call(a) }()
	if err := <-end; err != nil {
		h.Fatal(err)
	}
	a.end() // the goroutines of a killed process are dead, too
	a.own.Wait()
	a.holds.Stop()
	a.holds.Wait()
	a.db.Close()
	return steps
}

func (h *host) lvols() (out []string) {
	h.Helper()
	infos, err := h.store.List()
	if err != nil {
		h.Fatal(err)
	}
	for _, i := range infos {
		parent := ""
		if i.Parent != "" {
			parent = " of " + i.Parent
		}
		out = append(out, fmt.Sprintf("%s%s snapshot=%v ro=%v", i.Name, parent, i.Snapshot, i.ReadOnly))
	}
	return out
}

func (h *host) disks() (out []string) {
	h.Helper()
	disks, err := h.presenter.List(context.Background())
	if err != nil {
		h.Fatal(err)
	}
	for _, d := range disks {
		out = append(out, d.ID)
	}
	if l, ok := h.exporter.(*ledger); ok {
		for where, e := range l.list() {
			out = append(out, fmt.Sprintf("%s (%d)", where, e))
		}
	}
	slices.Sort(out)
	return out
}

// records are the keys in the buckets that must be empty when nothing is going on.
func (h *host) records(a *Attacher) (out []string) {
	h.Helper()
	if err := a.db.View(func(tx *bbolt.Tx) error {
		for _, b := range [][]byte{workBucket, exportsBucket, removalsBucket} {
			if err := tx.Bucket(b).ForEach(func(k, _ []byte) error {
				out = append(out, fmt.Sprintf("%s/%s", b, k))
				return nil
			}); err != nil {
				return err
			}
		}
		// A block that is recorded exists.
		return tx.Bucket(blocksBucket).ForEach(func(k, _ []byte) error {
			if _, err := h.store.Get(string(k)); err != nil {
				out = append(out, "blocks/"+string(k))
			}
			return nil
		})
	}); err != nil {
		h.Fatal(err)
	}
	return out
}

const (
	lowest  = "global-00000000-0000-4000-8000-000000000001"
	second  = "local-00000000-0000-4000-8000-000000000002"
	soldier = "soldier-00000000-0000-4000-8000-000000000003"
	other   = "soldier-00000000-0000-4000-8000-000000000004"
)

var background = context.Background()

func create(a *Attacher) error {
	_, err := a.CreateLvol(background, &attacherv1.CreateLvolRequest{Name: "w", SizeBytes: 64 << 20, Owner: "c"})
	return err
}

func clone(a *Attacher) error {
	_, err := a.CloneLvol(background, &attacherv1.CloneLvolRequest{Snapshot: lowest, Name: "w2", Owner: "c"})
	return err
}

func export(a *Attacher) error {
	_, err := a.Export(background, &attacherv1.ExportRequest{Lvol: "w", Owner: "c"})
	return err
}

func unexport(a *Attacher) error {
	_, err := a.Unexport(background, &attacherv1.UnexportRequest{Lvol: "w", Owner: "c"})
	return err
}

func snapshot(a *Attacher) error {
	_, err := a.SnapshotLvol(background, &attacherv1.SnapshotLvolRequest{Lvol: "w", Snapshot: lowest})
	return err
}

func snapshot2(a *Attacher) error {
	_, err := a.SnapshotLvol(background, &attacherv1.SnapshotLvolRequest{Lvol: "w2", Snapshot: second})
	return err
}

func remove(a *Attacher) error {
	_, err := a.DeleteLvol(background, &attacherv1.DeleteLvolRequest{Name: "w"})
	return err
}

func soldierOf(name string) func(*Attacher) error {
	return func(a *Attacher) error {
		_, err := a.CloneLvol(background, &attacherv1.CloneLvolRequest{Snapshot: second, Name: name, ReadOnly: true})
		return err
	}
}

func putImage(name string) func(*Attacher) error {
	return func(a *Attacher) error {
		_, err := a.PutImage(background, &attacherv1.PutImageRequest{Image: testImage(name)})
		return err
	}
}

func testImage(soldier string) *attacherv1.Image {
	return &attacherv1.Image{
		Reference: "r", Platform: "linux/amd64", Mode: "overlaybd", Filesystem: "ext4", VirtualSizeBytes: 64 << 20,
		ManifestDigest: "sha256:" + strings.Repeat("0", 64), Blocks: []string{lowest, second, soldier},
	}
}

func deleteImage(a *Attacher) error {
	_, err := a.DeleteImage(background, &attacherv1.DeleteImageRequest{Reference: "r"})
	return err
}

func rename(a *Attacher) error {
	_, err := a.RenameLvol(background, &attacherv1.RenameLvolRequest{Name: "w", NewName: "renamed"})
	return err
}

func prune(a *Attacher) error {
	_, err := a.PruneBlocks(background, &attacherv1.PruneBlocksRequest{})
	return err
}

func endHold(a *Attacher) error { return a.removeHeld(background, "c") }

func chain(calls ...func(*Attacher) error) func(*Attacher) error {
	return func(a *Attacher) error {
		for _, call := range calls {
			if err := call(a); err != nil {
				return err
			}
		}
		return nil
	}
}

type operation struct {
	name          string
	before, crash func(*Attacher) error
}

// operations are all that change something for a converter.
func operations() []operation {
	blocks := chain(create, snapshot, clone, snapshot2)
	converted := chain(blocks, soldierOf(soldier), putImage(soldier))
	return []operation{
		{"create", nil, create},
		{"clone", chain(create, snapshot), clone},
		{"export", create, export},
		{"unexport", chain(create, export), unexport},
		{"snapshot", chain(create, export), snapshot},
		{"export to a node", create, exportTo("n", "w", false)},
		{"unexport of a node", chain(create, exportTo("n", "w", false)), unexport},
		{"end of a node's hold", chain(create, exportTo("n", "w", false), snapshot, clone), endHold},
		{"soldier", blocks, soldierOf(soldier)},
		{"delete", create, remove},
		{"rename", create, rename},
		{"put image", chain(blocks, soldierOf(soldier)), putImage(soldier)},
		{"replace image", chain(converted, soldierOf(other)), putImage(other)},
		{"delete image", converted, deleteImage},
		{"prune", chain(blocks, soldierOf(soldier)), prune},
		{"end of a hold", chain(create, export, snapshot, clone), endHold},
	}
}

// TestKilledAtEveryStep kills each operation at each of its steps. A caller that
// repeats the operation at the next attacher must end where an undisturbed one does;
// if it never comes back, nothing of it may be left.
func TestKilledAtEveryStep(t *testing.T) {
	for _, o := range operations() {
		t.Run(o.name, func(t *testing.T) {
			prepare := func() *host {
				h, _ := exporting(t)
				if o.before != nil {
					h.crash("", 0, o.before)
				}
				return h
			}
			h := prepare()
			steps := h.crash("", 0, o.crash)
			wantLvols, wantDisks := h.lvols(), h.disks()
			seen := make(map[string]int)
			for _, step := range steps {
				nth := seen[step]
				seen[step]++
				where := fmt.Sprintf("killed at %q (%d)", step, nth)

				h := prepare()
				h.crash(step, nth, o.crash)
				a := h.start(time.Hour)
				holdNow(h, a, "c")
				if err := o.crash(a); err != nil {
					t.Errorf("%s, again: %v", where, err)
				}
				if got := h.lvols(); !slices.Equal(got, wantLvols) {
					t.Errorf("%s, again: lvols %q, want %q", where, got, wantLvols)
				}
				if got := h.disks(); !slices.Equal(got, wantDisks) {
					t.Errorf("%s, again: disks %q, want %q", where, got, wantDisks)
				}
				a.Close()

				h = prepare()
				h.crash(step, nth, o.crash)
				a = h.start(time.Nanosecond) // nobody comes back
				for deadline := time.Now().Add(10 * time.Second); len(h.records(a)) > 0 && time.Now().Before(deadline); {
					time.Sleep(time.Millisecond)
				}
				if got := h.records(a); len(got) > 0 {
					t.Errorf("%s, nobody comes back: records %q are left", where, got)
				}
				if got := h.disks(); len(got) > 0 {
					t.Errorf("%s, nobody comes back: disks %q are left", where, got)
				}
				for _, name := range []string{"w ", "w2 ", "renamed "} {
					if slices.ContainsFunc(h.lvols(), func(s string) bool { return strings.HasPrefix(s, name) }) {
						t.Errorf("%s, nobody comes back: lvols %q are left", where, h.lvols())
					}
				}
				// And the blocks that are left can go.
				if err := chain(deleteImage, prune)(a); err != nil {
					t.Errorf("%s, nobody comes back: %v", where, err)
				}
				if got := h.lvols(); len(got) > 0 {
					t.Errorf("%s, after removal: lvols %q are left", where, got)
				}
				a.Close()
			}
			if len(steps) == 0 {
				t.Error("it has no steps")
			}
		})
	}
}

// nodeOperations are all that change something for a node.
func nodeOperations() []operation {
	finished := chain(convertedImage, endHold)
	made := chain(finished, attachRW("n", "c1", soldier))
	return []operation{
		{"attach", finished, attachTo("n", soldier)},
		{"detach", chain(finished, attachTo("n", soldier)), detachFrom("n", soldier)},
		{"attach writable", finished, attachRW("n", "c1", soldier)},
		{"attach writable again", chain(made, detachRW("n", "c1")), attachRW("n", "c1", soldier)},
		{"detach writable", made, detachRW("n", "c1")},
		{"delete writable", made, deleteRW("n", "c1")},
		{"delete detached writable", chain(made, detachRW("n", "c1")), deleteRW("n", "c1")},
	}
}

// TestKilledAtEveryPair kills each operation at one step, and its repetition at the next
// attacher at another: the third ends as an undisturbed one does.
func TestKilledAtEveryPair(t *testing.T) {
	for _, o := range append(operations(), nodeOperations()...) {
		t.Run(o.name, func(t *testing.T) {
			t.Parallel()
			prepare := func() *host {
				h, _ := exporting(t)
				if o.before != nil {
					h.crash("", 0, o.before)
				}
				return h
			}
			h := prepare()
			steps := slices.Compact(slices.Sorted(slices.Values(h.crash("", 0, o.crash))))
			wantLvols, wantDisks := h.lvols(), h.disks()
			for _, first := range steps {
				if testing.Short() && first != steps[len(steps)/2] {
					continue
				}
				for _, second := range steps {
					where := fmt.Sprintf("killed at %q and %q", first, second)
					h := prepare()
					h.crash(first, 0, o.crash)
					h.crash(second, 0, retried(o.crash))
					a := h.start(time.Hour)
					holdNow(h, a, "c")
					if err := retried(o.crash)(a); err != nil {
						t.Errorf("%s: %v", where, err)
					}
					converge(t, where, func() string {
						if lvols, disks := h.lvols(), h.disks(); !slices.Equal(lvols, wantLvols) || !slices.Equal(disks, wantDisks) {
							return fmt.Sprintf("lvols %q, want %q; disks %q, want %q", lvols, wantLvols, disks, wantDisks)
						}
						return ""
					})
					a.Close()
				}
			}
		})
	}
}

// retried is a call that finds the sweep at its own work and waits for it.
func retried(call func(*Attacher) error) func(*Attacher) error {
	return func(a *Attacher) error {
		for begin := time.Now(); ; time.Sleep(time.Millisecond) {
			if err := call(a); kind.Of(err) != kind.InUse || time.Since(begin) > 10*time.Second {
				return err
			}
		}
	}
}

func TestDamagedRecordIsRefused(t *testing.T) {
	for bucket, value := range map[string]string{
		"work": `{"owner":`, "exports": `[]`, "blocks": `{"completed":"x"}`, "removals": `{"unknown":1}`, "renames": `{} {}`,
		"attachments": `{"nsid":0}`, "writables": `{"block":""}`,
	} {
		h := newHost(t)
		a := h.start(time.Hour)
		if err := a.db.Update(func(tx *bbolt.Tx) error { return tx.Bucket([]byte(bucket)).Put([]byte("x"), []byte(value)) }); err != nil {
			t.Fatal(err)
		}
		a.Close()
		_, err := New(Options{Lvols: h.store, Presenter: h.presenter, DBPath: h.db})
		if kind.Of(err) != kind.Corrupt || !strings.Contains(err.Error(), bucket) || !strings.Contains(err.Error(), h.db) {
			t.Errorf("%s: got %v", bucket, err)
		}
	}
}

// A database of format version 1, as the first release wrote it.
func TestGoldenVersion1(t *testing.T) {
	raw, err := os.ReadFile("testdata/v1.db")
	if err != nil {
		t.Fatal(err)
	}
	h := newHost(t)
	if err := os.WriteFile(h.db, raw, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := h.store.Create("w", 64<<20); err != nil {
		t.Fatal(err)
	}
	a := h.start(time.Hour)
	defer a.Close()
	i, err := a.GetImage(background, &attacherv1.GetImageRequest{Reference: "r"})
	if err != nil || !slices.Equal(i.GetBlocks(), []string{lowest, second, other}) || i.GetCreatedUnixNanos() != 1700000000e9 {
		t.Fatalf("%v, %v", i, err)
	}
	if !a.holds.Alive("c") {
		t.Fatal("its owner is forgotten")
	}
	for bucket, key := range map[string]string{"exports": "w", "work": "w"} {
		if _, ok, err := lookup[map[string]any](a.db, []byte(bucket), key); !ok || err != nil {
			t.Fatalf("record %s/%s: %v, %v", bucket, key, ok, err)
		}
	}
}

// A database of format version 2, whose attachments have no ids.
func TestGoldenVersion2(t *testing.T) {
	raw, err := os.ReadFile("testdata/v2.db")
	if err != nil {
		t.Fatal(err)
	}
	h, l := exporting(t)
	if err := os.WriteFile(h.db, raw, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"w", soldier} {
		if _, err := h.store.Create(name, 64<<20); err != nil {
			t.Fatal(err)
		}
	}
	ids := make(map[string]bool)
	for range 2 { // the second time it is of version 3
		a := h.start(time.Hour)
		if got := l.list(); len(got) != 2 || got["n "+soldier] != 7 || got["m "+soldier] != 1 {
			t.Fatalf("shown are %v", got)
		}
		r, err := a.ListAttachments(background, &attacherv1.ListAttachmentsRequest{})
		if err != nil || len(r.GetAttachments()) != 2 {
			t.Fatal(r, err)
		}
		for _, x := range r.GetAttachments() {
			if x.GetAttachmentId() == "" || x.GetTransport() != TransportTCP || x.GetCreatedUnixNanos() < 1700000000e9 {
				t.Fatalf("%v", x)
			}
			ids[x.GetAttachmentId()] = true
		}
		if !a.holds.Alive("c") || a.attachedBy(soldier) != "m" {
			t.Fatal("what it knew is forgotten")
		}
		a.Close()
	}
	if len(ids) != 2 {
		t.Fatalf("%v: an id changes", ids)
	}
}

func FuzzRecords(f *testing.F) {
	raw, err := json.Marshal(imageFromProto(testImage(soldier)))
	if err != nil {
		f.Fatal(err)
	}
	f.Add([]byte(imageKey("r", "linux/amd64")), raw)
	f.Add([]byte("w"), []byte(`{"owner":"c"}`))
	f.Add([]byte("w"), []byte(`{"owner":"c","read_only":true}`))
	f.Fuzz(func(t *testing.T, key, raw []byte) {
		if i, err := decodeImage(key, raw); err == nil {
			if err := i.validate(); err != nil {
				t.Fatalf("accepted %+v: %v", i, err)
			}
			again := imageFromProto(i.proto())
			if !equalImages(i, again) || imageKey(again.Reference, again.Platform) != string(key) {
				t.Fatalf("%+v came back as %+v", i, again)
			}
		}
		var w workRecord
		var x exportRecord
		var b blockRecord
		var r removalRecord
		var n renameRecord
		for _, into := range []any{&w, &x, &b, &r, &n} {
			decode(raw, into) // must not panic
		}
	})
}
