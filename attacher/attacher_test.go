package attacher_test

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	attacherv1 "github.com/thaw-project/thaw/api/attacher/v1"
	"github.com/thaw-project/thaw/attacher"
	"github.com/thaw-project/thaw/image/block"
	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/node/present"
)

func TestMain(m *testing.M) {
	childMain()
	goleak.VerifyTestMain(m)
}

// both runs a test in the process and through a socket: callers must see no difference.
func both(t *testing.T, f func(t *testing.T, l *lab)) {
	for _, socket := range []bool{false, true} {
		t.Run(fmt.Sprintf("socket=%v", socket), func(t *testing.T) { f(t, newLab(t, socket)) })
	}
}

func TestLvolsByHand(t *testing.T) {
	both(t, func(t *testing.T, l *lab) {
		v, err := l.CreateLvol(ctx, &attacherv1.CreateLvolRequest{Name: "a", SizeBytes: size})
		must(t, err)
		again, err := l.CreateLvol(ctx, &attacherv1.CreateLvolRequest{Name: "a", SizeBytes: size})
		must(t, err)
		if v.GetUuid() != again.GetUuid() || v.GetSizeBytes() != size || v.GetOwner() != "" || v.GetCreatedUnixNanos() == 0 {
			t.Fatalf("%v and %v", v, again)
		}
		_, err = l.CreateLvol(ctx, &attacherv1.CreateLvolRequest{Name: "a", SizeBytes: 2 * size})
		wantKind(t, err, kind.Exists, "create lvol a", fmt.Sprint(size))
		_, err = l.CreateLvol(ctx, &attacherv1.CreateLvolRequest{Name: "a/b", SizeBytes: size})
		wantKind(t, err, kind.Invalid)
		_, err = l.CreateLvol(ctx, &attacherv1.CreateLvolRequest{Name: "b", SizeBytes: 5})
		wantKind(t, err, kind.Invalid)

		_, err = l.CloneLvol(ctx, &attacherv1.CloneLvolRequest{Snapshot: "a", Name: "c"})
		wantKind(t, err, kind.Invalid, "not a snapshot")
		_, err = l.CloneLvol(ctx, &attacherv1.CloneLvolRequest{Snapshot: "s", Name: "c"})
		wantKind(t, err, kind.NotFound)
		for range 2 {
			s, err := l.SnapshotLvol(ctx, &attacherv1.SnapshotLvolRequest{Lvol: "a", Snapshot: "s"})
			must(t, err)
			if !s.GetSnapshot() || s.GetName() != "s" || !slices.Equal(s.GetClones(), []string{"a"}) {
				t.Fatalf("%v", s)
			}
		}
		for range 2 {
			c, err := l.CloneLvol(ctx, &attacherv1.CloneLvolRequest{Snapshot: "s", Name: "c", ReadOnly: true})
			must(t, err)
			if !c.GetReadOnly() || c.GetSnapshot() || c.GetParent() != "s" {
				t.Fatalf("%v", c)
			}
		}
		_, err = l.SnapshotLvol(ctx, &attacherv1.SnapshotLvolRequest{Lvol: "c", Snapshot: "s"})
		wantKind(t, err, kind.Exists, "clone") // it was there before c
		_, err = l.CreateLvol(ctx, &attacherv1.CreateLvolRequest{Name: "c", SizeBytes: size})
		wantKind(t, err, kind.Exists, "clone of s")
		_, err = l.SnapshotLvol(ctx, &attacherv1.SnapshotLvolRequest{Lvol: "absent", Snapshot: "s2"})
		wantKind(t, err, kind.NotFound)

		for range 2 {
			_, err = l.RenameLvol(ctx, &attacherv1.RenameLvolRequest{Name: "c", NewName: "d"})
			must(t, err)
		}
		_, err = l.RenameLvol(ctx, &attacherv1.RenameLvolRequest{Name: "absent", NewName: "d"})
		wantKind(t, err, kind.NotFound)
		_, err = l.RenameLvol(ctx, &attacherv1.RenameLvolRequest{Name: "a", NewName: "d"})
		wantKind(t, err, kind.Exists)
		for range 2 {
			r, err := l.ResizeLvol(ctx, &attacherv1.ResizeLvolRequest{Name: "a", SizeBytes: 2 * size})
			must(t, err)
			if r.GetSizeBytes() != 2*size {
				t.Fatalf("%v", r)
			}
		}
		_, err = l.ResizeLvol(ctx, &attacherv1.ResizeLvolRequest{Name: "s", SizeBytes: 2 * size})
		wantKind(t, err, kind.ReadOnly)
		_, err = l.DecoupleLvol(ctx, &attacherv1.DecoupleLvolRequest{Name: "d"})
		wantKind(t, err, kind.ReadOnly)
		_, err = l.CloneLvol(ctx, &attacherv1.CloneLvolRequest{Snapshot: "s", Name: "e"})
		must(t, err)
		d, err := l.DecoupleLvol(ctx, &attacherv1.DecoupleLvolRequest{Name: "e"})
		must(t, err)
		if d.GetParent() != "" {
			t.Fatalf("%v", d)
		}
		for range 2 {
			i, err := l.InflateLvol(ctx, &attacherv1.InflateLvolRequest{Name: "a"})
			must(t, err)
			if i.GetParent() != "" || i.GetAllocatedClusters() != 2*size/i.GetClusterBytes() {
				t.Fatalf("%v", i)
			}
		}
		l.wantNames("a", "d", "e", "s")
		for _, name := range []string{"a", "d", "e", "s", "s"} {
			_, err := l.DeleteLvol(ctx, &attacherv1.DeleteLvolRequest{Name: name})
			must(t, err)
		}
		l.wantNames()
		_, err = l.GetLvol(ctx, &attacherv1.GetLvolRequest{Name: "a"})
		wantKind(t, err, kind.NotFound, "a")
		s, err := l.GetStore(ctx, &attacherv1.GetStoreRequest{})
		must(t, err)
		if s.GetTarget() != "here" || s.GetUuid() == "" || s.GetFreeClusters() != s.GetTotalClusters() {
			t.Fatalf("%v", s)
		}
		l.wantClean()
	})
}

func TestHoldKeepsAndItsEndRemoves(t *testing.T) {
	both(t, func(t *testing.T, l *lab) {
		_, err := l.CreateLvol(ctx, &attacherv1.CreateLvolRequest{Name: "w", SizeBytes: size, Owner: "me"})
		wantKind(t, err, kind.InUse, "me", "Hold")
		end := l.hold("me")
		endOther := l.hold("other")
		for range 2 {
			l.create("w", "me")
		}
		for _, r := range []*attacherv1.CreateLvolRequest{{Name: "w", SizeBytes: size, Owner: "other"}, {Name: "w", SizeBytes: size}} {
			_, err = l.CreateLvol(ctx, r)
			wantKind(t, err, kind.Exists, "being written by me")
		}
		l.create("by-hand", "")
		_, err = l.CreateLvol(ctx, &attacherv1.CreateLvolRequest{Name: "by-hand", SizeBytes: size, Owner: "me"})
		wantKind(t, err, kind.Exists)

		_, err = l.Export(ctx, &attacherv1.ExportRequest{Lvol: "w"})
		wantKind(t, err, kind.Invalid)
		_, err = l.Export(ctx, &attacherv1.ExportRequest{Lvol: "w", Owner: "nobody"})
		wantKind(t, err, kind.InUse)
		_, err = l.Export(ctx, &attacherv1.ExportRequest{Lvol: "w", Owner: "other"})
		wantKind(t, err, kind.InUse, "being written by me")
		_, err = l.Export(ctx, &attacherv1.ExportRequest{Lvol: "absent", Owner: "me"})
		wantKind(t, err, kind.NotFound)
		x, err := l.Export(ctx, &attacherv1.ExportRequest{Lvol: "w", Owner: "me"})
		must(t, err)
		again, err := l.Export(ctx, &attacherv1.ExportRequest{Lvol: "w", Owner: "me"})
		must(t, err)
		if x.GetPath() != again.GetPath() || x.GetSizeBytes() != size {
			t.Fatalf("%v and %v", x, again)
		}
		_, err = l.Export(ctx, &attacherv1.ExportRequest{Lvol: "w", Owner: "me", ReadOnly: true})
		wantKind(t, err, kind.Exists)
		_, err = l.Unexport(ctx, &attacherv1.UnexportRequest{Lvol: "w", Owner: "other"})
		wantKind(t, err, kind.InUse, "exported to me")
		_, err = l.DeleteLvol(ctx, &attacherv1.DeleteLvolRequest{Name: "w"})
		wantKind(t, err, kind.InUse, "exported to me")
		_, err = l.ResizeLvol(ctx, &attacherv1.ResizeLvolRequest{Name: "w", SizeBytes: 2 * size})
		wantKind(t, err, kind.InUse)
		_, err = l.RenameLvol(ctx, &attacherv1.RenameLvolRequest{Name: "w", NewName: "v"})
		wantKind(t, err, kind.InUse)

		// Writes go through, and a snapshot of a hold's lvol outlives the hold.
		l.write("w", "first")
		_, err = l.SnapshotLvol(ctx, &attacherv1.SnapshotLvolRequest{Lvol: "w", Snapshot: "s"})
		must(t, err)
		l.write("w", "other")
		if got := l.read("s", 5); got != "first" {
			t.Fatalf("snapshot holds %q", got)
		}
		_, err = l.Export(ctx, &attacherv1.ExportRequest{Lvol: "s", Owner: "me"})
		wantKind(t, err, kind.ReadOnly)
		_, err = l.Export(ctx, &attacherv1.ExportRequest{Lvol: "s", Owner: "me", ReadOnly: true})
		must(t, err)
		for range 2 {
			_, err = l.Unexport(ctx, &attacherv1.UnexportRequest{Lvol: "s", Owner: "me"})
			must(t, err)
		}
		_, err = l.CloneLvol(ctx, &attacherv1.CloneLvolRequest{Snapshot: "s", Name: "w2", Owner: "me"})
		must(t, err)
		got, err := l.GetLvol(ctx, &attacherv1.GetLvolRequest{Name: "w2"})
		must(t, err)
		if got.GetOwner() != "me" {
			t.Fatalf("%v", got)
		}
		l.presenter.SetBusy("w-w", true) // the dead converter's loop device
		time.AfterFunc(30*time.Millisecond, func() { l.presenter.SetBusy("w-w", false) })
		end()
		l.eventuallyNames("by-hand", "s")
		if d := l.disks(); len(d) != 0 {
			t.Fatalf("disks %q", d)
		}
		endOther()
		l.hold("me")()
		l.wantNames("by-hand", "s")
		l.wantClean()
	})
}

func TestOneHoldPerOwner(t *testing.T) {
	both(t, func(t *testing.T, l *lab) {
		end := l.hold("me")
		s, err := l.Hold(ctx, &attacherv1.HoldRequest{Owner: "me"})
		if err == nil {
			_, err = s.Recv()
		}
		wantKind(t, err, kind.InUse, "me")
		end()
		// The next hold waits for the end of the one before.
		l.eventually("the end of the hold", func() bool {
			c, cancel := context.WithCancel(ctx)
			defer cancel()
			s, err := l.Hold(c, &attacherv1.HoldRequest{Owner: "me"})
			if err == nil {
				_, err = s.Recv()
			}
			return err == nil
		})
	})
}

func TestOwnersHaveTheGraceAfterARestart(t *testing.T) {
	both(t, func(t *testing.T, l *lab) {
		l.hold("back")
		l.hold("gone")
		l.create("w-back", "back")
		l.create("w-gone", "gone")
		for name, owner := range map[string]string{"w-back": "back", "w-gone": "gone"} {
			_, err := l.Export(ctx, &attacherv1.ExportRequest{Lvol: name, Owner: owner})
			must(t, err)
		}
		l.write("w-back", "kept")
		l.grace = 300 * time.Millisecond
		l.restart()
		if d := l.disks(); !slices.Equal(d, []string{"w-w-back", "w-w-gone"}) {
			t.Fatalf("a restart took disks away: %q", d)
		}
		l.hold("third")
		_, err := l.CreateLvol(ctx, &attacherv1.CreateLvolRequest{Name: "w-gone", SizeBytes: size, Owner: "third"})
		wantKind(t, err, kind.Exists, "was being written by gone")
		_, err = l.Export(ctx, &attacherv1.ExportRequest{Lvol: "w-back", Owner: "back"})
		wantKind(t, err, kind.InUse)
		l.hold("back")
		_, err = l.Export(ctx, &attacherv1.ExportRequest{Lvol: "w-back", Owner: "back"})
		must(t, err)
		l.eventuallyNames("w-back")
		if d := l.disks(); !slices.Equal(d, []string{"w-w-back"}) {
			t.Fatalf("disks %q", d)
		}
		if got := l.read("w-back", 4); got != "kept" {
			t.Fatalf("%q", got)
		}
		l.create("w-gone", "third")
	})
}

func TestDeadOwnersLvolIsTakenOver(t *testing.T) {
	l := newLab(t, false)
	end := l.hold("dead")
	l.create("w", "dead")
	_, err := l.Export(ctx, &attacherv1.ExportRequest{Lvol: "w", Owner: "dead"})
	must(t, err)
	l.write("w", "stale")
	stuck := make(chan struct{})
	var once sync.Once
	l.presenter.Hook(func(c context.Context, op, id string) error {
		if op == "withdraw" {
			select { // the end of the hold is slow
			case <-stuck:
			case <-c.Done():
			}
		}
		return nil
	})
	defer once.Do(func() { close(stuck) })
	end()
	l.hold("new")
	l.eventually("the end of the hold", func() bool {
		c, cancel := context.WithTimeout(ctx, 10*time.Millisecond)
		defer cancel()
		_, err := l.CreateLvol(c, &attacherv1.CreateLvolRequest{Name: "w", SizeBytes: size, Owner: "new"})
		return kind.Of(err) != kind.Exists
	})
	once.Do(func() { close(stuck) })
	l.create("w", "new")
	if got := l.read("w", 5); strings.Trim(got, "\x00") != "" {
		t.Fatalf("the new owner's lvol holds %q", got)
	}
	time.Sleep(50 * time.Millisecond) // the dead one's end must not take it away
	l.wantNames("w")
}

func TestImages(t *testing.T) {
	both(t, func(t *testing.T, l *lab) {
		l.hold("c")
		a := l.convert("c", 1, 2, 3, 100)
		ia := l.put("reg/app:a", a)
		if ia.GetCreatedUnixNanos() == 0 {
			t.Fatalf("%v", ia)
		}
		time.Sleep(time.Millisecond)
		if again := l.put("reg/app:a", a); again.GetCreatedUnixNanos() != ia.GetCreatedUnixNanos() {
			t.Fatal("a repeated call changed the record")
		}
		b := l.convert("c", 1, 2, 4, 101)
		l.put("reg/app:b", b)
		l.create("by-hand", "")

		got, err := l.GetImage(ctx, &attacherv1.GetImageRequest{Reference: "reg/app:a"})
		must(t, err)
		if !slices.Equal(got.GetBlocks(), a) {
			t.Fatalf("%v", got)
		}
		_, err = l.GetImage(ctx, &attacherv1.GetImageRequest{Reference: "reg/app:c"})
		wantKind(t, err, kind.NotFound, "reg/app:c")
		list, err := l.ListImages(ctx, &attacherv1.ListImagesRequest{})
		must(t, err)
		if len(list.GetImages()) != 2 || list.GetImages()[0].GetReference() != "reg/app:a" {
			t.Fatalf("%v", list)
		}
		_, err = l.DeleteLvol(ctx, &attacherv1.DeleteLvolRequest{Name: a[3]})
		wantKind(t, err, kind.InUse, "reg/app:a")
		_, err = l.DeleteLvol(ctx, &attacherv1.DeleteLvolRequest{Name: a[0]})
		wantKind(t, err, kind.InUse)

		l.setAttached(a[3], true)
		_, err = l.DeleteImage(ctx, &attacherv1.DeleteImageRequest{Reference: "reg/app:a"})
		wantKind(t, err, kind.InUse, a[3], "attached")
		l.setAttached(a[3], false)
		l.setAttached(a[0], true) // shared with b: no reason to keep a
		if d := l.remove("reg/app:a"); !slices.Equal(d, []string{a[2], a[3]}) {
			t.Fatalf("deleted %q", d)
		}
		l.wantNames(append(slices.Clone(b), "by-hand")...)
		if d := l.remove("reg/app:a"); len(d) != 0 {
			t.Fatalf("deleted %q", d)
		}
		l.setAttached(a[0], false)
		if d := l.remove("reg/app:b"); !slices.Equal(d, slices.Sorted(slices.Values(b))) {
			t.Fatalf("deleted %q", d)
		}
		l.wantNames("by-hand")
		l.wantClean()
	})
}

func TestImagePlatforms(t *testing.T) {
	l := newLab(t, true)
	l.hold("c")
	amd, arm := l.convert("c", 1, 100), l.convert("c", 2, 101)
	l.put("r", amd)
	i := image("r", arm)
	i.Platform = "linux/arm64/v8"
	_, err := l.PutImage(ctx, &attacherv1.PutImageRequest{Image: i})
	must(t, err)
	_, err = l.GetImage(ctx, &attacherv1.GetImageRequest{Reference: "r"})
	wantKind(t, err, kind.Invalid, "linux/amd64", "linux/arm64/v8")
	got, err := l.GetImage(ctx, &attacherv1.GetImageRequest{Reference: "r", Platform: "linux/arm64/v8"})
	must(t, err)
	if !slices.Equal(got.GetBlocks(), arm) {
		t.Fatalf("%v", got)
	}
	_, err = l.DeleteImage(ctx, &attacherv1.DeleteImageRequest{Reference: "r", Platform: "linux/amd64"})
	must(t, err)
	l.wantNames(arm...)
	l.remove("r")
	l.wantNames()
}

func TestBadImagesAreRefused(t *testing.T) {
	l := newLab(t, false)
	l.hold("c")
	good := l.convert("c", 1, 100)
	for name, spoil := range map[string]func(i *attacherv1.Image){
		"no reference":       func(i *attacherv1.Image) { i.Reference = "" },
		"reference with nul": func(i *attacherv1.Image) { i.Reference = "a\x00b" },
		"long reference":     func(i *attacherv1.Image) { i.Reference = strings.Repeat("r", 5000) },
		"platform":           func(i *attacherv1.Image) { i.Platform = "linux" },
		"digest":             func(i *attacherv1.Image) { i.ManifestDigest = "sha256:12" },
		"mode":               func(i *attacherv1.Image) { i.Mode = "ext4" },
		"file system":        func(i *attacherv1.Image) { i.Filesystem = "xfs" },
		"no blocks":          func(i *attacherv1.Image) { i.Blocks = nil },
		"foreign block":      func(i *attacherv1.Image) { i.Blocks = []string{"../../x"} },
		"no soldier":         func(i *attacherv1.Image) { i.Blocks = good[:1] },
		"soldier first":      func(i *attacherv1.Image) { i.Blocks = []string{good[1], good[0]} },
		"twice":              func(i *attacherv1.Image) { i.Blocks = []string{good[0], good[0], good[1]} },
		"chain id":           func(i *attacherv1.Image) { i.ChainIds = []string{"x"} },
		"size":               func(i *attacherv1.Image) { i.VirtualSizeBytes = -1 },
	} {
		i := image("r", slices.Clone(good))
		spoil(i)
		if _, err := l.PutImage(ctx, &attacherv1.PutImageRequest{Image: i}); kind.Of(err) != kind.Invalid {
			t.Errorf("%s: got %v", name, err)
		}
	}
	_, err := l.PutImage(ctx, &attacherv1.PutImageRequest{})
	wantKind(t, err, kind.Invalid)
	_, err = l.PutImage(ctx, &attacherv1.PutImageRequest{Image: image("r", []string{blockName(block.Global, 7), good[1]})})
	wantKind(t, err, kind.NotFound, blockName(block.Global, 7))
	l.create(blockName(block.Soldier, 200), "")
	_, err = l.PutImage(ctx, &attacherv1.PutImageRequest{Image: image("r", []string{good[0], blockName(block.Soldier, 200)})})
	wantKind(t, err, kind.Invalid, "writable")
	list, err := l.ListImages(ctx, &attacherv1.ListImagesRequest{})
	must(t, err)
	if len(list.GetImages()) != 0 {
		t.Fatalf("%v", list)
	}
}

func TestReplacedImageReleasesItsOldBlocks(t *testing.T) {
	l := newLab(t, false)
	l.hold("c")
	v1 := l.convert("c", 1, 2, 100)
	l.put("r", v1)
	v2 := l.convert("c", 1, 3, 101)
	l.setAttached(v1[2], true) // a container still runs the old one
	l.put("r", v2)
	l.wantNames(append(slices.Clone(v2), v1[1:]...)...)
	l.setAttached(v1[2], false)
	l.restart() // the sweep of the next attacher goes on
	l.eventuallyNames(v2...)
	// A block on its way out that comes back into use stays.
	l.hold("c")
	v3 := l.convert("c", 1, 4, 102)
	l.setAttached(v2[2], true)
	l.put("r", v3)
	l.put("r", v2)
	l.setAttached(v2[2], false)
	l.restart()
	l.eventuallyNames(v2...)
	l.wantClean()
}

func TestLvolsMadeByHandStay(t *testing.T) {
	l := newLab(t, false)
	l.hold("c")
	// Somebody made blocks with names of ours without the attacher's conversions.
	hand := []string{blockName(block.Global, 1), blockName(block.Soldier, 100)}
	l.create("x", "")
	_, err := l.SnapshotLvol(ctx, &attacherv1.SnapshotLvolRequest{Lvol: "x", Snapshot: hand[0]})
	must(t, err)
	_, err = l.CloneLvol(ctx, &attacherv1.CloneLvolRequest{Snapshot: hand[0], Name: hand[1], ReadOnly: true})
	must(t, err)
	l.put("r", hand)
	if d := l.remove("r"); len(d) != 0 {
		t.Fatalf("deleted %q", d)
	}
	p, err := l.PruneBlocks(ctx, &attacherv1.PruneBlocksRequest{})
	must(t, err)
	if len(p.GetBlocks()) != 0 {
		t.Fatalf("pruned %q", p.GetBlocks())
	}
	l.wantNames(hand[0], hand[1], "x")
}

func TestHeldSoldierBecomesTheImages(t *testing.T) {
	l := newLab(t, false)
	end := l.hold("c")
	blocks := l.convert("c", 1, 100)
	soldier := blockName(block.Soldier, 101)
	_, err := l.CloneLvol(ctx, &attacherv1.CloneLvolRequest{Snapshot: blocks[0], Name: soldier, Owner: "c", ReadOnly: true})
	must(t, err)
	l.put("r", []string{blocks[0], soldier})
	l.create("w", "c")
	end()
	l.eventuallyNames(append(slices.Clone(blocks), soldier)...)
	if d := l.remove("r"); !slices.Equal(d, []string{soldier}) {
		t.Fatalf("deleted %q", d)
	}
}

func TestPruneAndCheckReport(t *testing.T) {
	both(t, func(t *testing.T, l *lab) {
		l.hold("c")
		kept := l.convert("c", 1, 2, 100)
		l.put("r", kept)
		left := l.convert("c", 1, 3, 4, 101) // interrupted before PutImage
		l.create("w", "c")
		r, err := l.CheckStore(ctx, &attacherv1.CheckStoreRequest{})
		must(t, err)
		if !slices.Equal(r.GetReusableBlocks(), slices.Sorted(slices.Values(left[1:]))) || len(r.GetProblems()) != 0 || r.GetCheckedClusters() == 0 {
			t.Fatalf("%v", r)
		}
		p, err := l.PruneBlocks(ctx, &attacherv1.PruneBlocksRequest{MinAgeNanos: int64(time.Hour)})
		must(t, err)
		if len(p.GetBlocks()) != 0 {
			t.Fatalf("%v", p)
		}
		_, err = l.PruneBlocks(ctx, &attacherv1.PruneBlocksRequest{MinAgeNanos: -1})
		wantKind(t, err, kind.Invalid)
		for _, dry := range []bool{true, false} {
			p, err = l.PruneBlocks(ctx, &attacherv1.PruneBlocksRequest{DryRun: dry})
			must(t, err)
			if !slices.Equal(slices.Sorted(slices.Values(p.GetBlocks())), slices.Sorted(slices.Values(left[1:]))) {
				t.Fatalf("dry run %v: %v", dry, p)
			}
		}
		l.wantNames(append(slices.Clone(kept), "w")...)

		// A conversion that goes on from a reusable block keeps it.
		more := l.convert("c", 1, 5, 102)
		_, err = l.DeleteLvol(ctx, &attacherv1.DeleteLvolRequest{Name: more[2]})
		must(t, err)
		_, err = l.CloneLvol(ctx, &attacherv1.CloneLvolRequest{Snapshot: more[1], Name: "w5", Owner: "c"})
		must(t, err)
		p, err = l.PruneBlocks(ctx, &attacherv1.PruneBlocksRequest{})
		must(t, err)
		if len(p.GetBlocks()) != 0 {
			t.Fatalf("%v", p)
		}

		// Whatever happened behind the attacher's back shows.
		must(t, l.store.Delete(kept[2]))
		r, err = l.CheckStore(ctx, &attacherv1.CheckStoreRequest{})
		must(t, err)
		if len(r.GetProblems()) != 1 || r.GetProblems()[0].GetType() != attacher.ProblemMissing || r.GetProblems()[0].GetLvol() != kept[2] {
			t.Fatalf("%v", r)
		}
		l.remove("r")
	})
}

func TestStoppedAttacherSaysSo(t *testing.T) {
	l := newLab(t, true)
	l.hold("c")
	l.create("w", "c")
	l.attacher.Stop()
	_, err := l.GetLvol(ctx, &attacherv1.GetLvolRequest{Name: "w"})
	wantKind(t, err, kind.Unavailable)
	l.restart()
	l.wantNames("w") // the end of the hold was the attacher's, not the client's
}

func TestSecondAttacherOnOneDatabaseIsRefused(t *testing.T) {
	l := newLab(t, false)
	_, err := attacher.New(l.options())
	wantKind(t, err, kind.InUse)
}

func TestExportOfALongName(t *testing.T) {
	l := newLab(t, false)
	name := strings.Repeat("n", 128)
	end := l.hold("c")
	l.create(name, "c")
	_, err := l.Export(ctx, &attacherv1.ExportRequest{Lvol: name, Owner: "c"})
	must(t, err)
	if d := l.disks(); len(d) != 1 || len(d[0]) > 128 {
		t.Fatalf("disks %q", d)
	}
	end()
	l.eventuallyNames()
}

func TestStartWithdrawsExportsOfNobody(t *testing.T) {
	l := newLab(t, false)
	l.create("a", "")
	l.stop()
	for _, id := range []string{"w-a", "a"} {
		_, err := l.presenter.Present(ctx, id, present.Source{Kind: present.SourceLvol, Lvol: "a"}, false)
		must(t, err)
	}
	l.start()
	if d := l.disks(); !slices.Equal(d, []string{"a"}) { // "a" is a node's
		t.Fatalf("disks %q", d)
	}
}

// TestConcurrentConversions converts images with common layers from several
// converters, some of which die, while others remove images.
func TestConcurrentConversions(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	l := newLab(t, true)
	const converters = 6
	var wg sync.WaitGroup
	for c := range converters {
		rng := rand.New(rand.NewPCG(seed, uint64(c)))
		wg.Go(func() {
			for round := range 6 {
				l.convertRandom(rng, fmt.Sprintf("c%d-%d", c, round), fmt.Sprintf("img%d", rng.IntN(3)))
			}
		})
	}
	wg.Wait()
	l.eventually("the end of all holds", func() bool {
		return !slices.ContainsFunc(l.names(), func(n string) bool { return strings.HasPrefix(n, "work") })
	})
	for i := range 3 {
		l.remove(fmt.Sprintf("img%d", i))
	}
	_, err := l.PruneBlocks(ctx, &attacherv1.PruneBlocksRequest{})
	must(t, err)
	l.wantNames()
	if d := l.disks(); len(d) != 0 {
		t.Fatalf("disks %q", d)
	}
	l.wantClean()
}

// convertRandom converts a chain of shared layers, and at a random place dies, or
// finds that somebody else works on the block or has removed it, or finishes.
func (l *lab) convertRandom(rng *rand.Rand, owner, reference string) {
	c, cancel := context.WithCancel(ctx)
	defer cancel()
	s, err := l.Hold(c, &attacherv1.HoldRequest{Owner: owner})
	if err == nil {
		_, err = s.Recv()
	}
	if err != nil {
		l.Errorf("hold: %v", err)
		return
	}
	n := 0
	step := func(err error) bool { // whether to go on
		n++
		switch kind.Of(err) {
		case "":
			if err != nil {
				l.Errorf("no kind: %v", err)
			}
		case kind.Exists, kind.InUse, kind.NotFound:
			return false // another converter, or a removal
		default:
			l.Errorf("conversion: %v", err)
			return false
		}
		return rng.IntN(40) != 0
	}
	below := ""
	var blocks []string
	for layer := range 2 + rng.IntN(3) {
		scope := block.Local
		if layer == 0 {
			scope = block.Global
		}
		name, work := blockName(scope, layer), fmt.Sprintf("work-%d", layer)
		blocks = append(blocks, name)
		if _, err := l.GetLvol(ctx, &attacherv1.GetLvolRequest{Name: name}); err != nil {
			if below == "" {
				_, err = l.CreateLvol(ctx, &attacherv1.CreateLvolRequest{Name: work, SizeBytes: size, Owner: owner})
			} else {
				_, err = l.CloneLvol(ctx, &attacherv1.CloneLvolRequest{Snapshot: below, Name: work, Owner: owner})
			}
			if !step(err) {
				return
			}
			if _, err = l.Export(ctx, &attacherv1.ExportRequest{Lvol: work, Owner: owner}); !step(err) {
				return
			}
			if d := l.presenter.Device("w-" + work); d != nil {
				d.WriteAt(bytes.Repeat([]byte{byte(layer)}, 8192), int64(layer)*8192)
			}
			if _, err = l.SnapshotLvol(ctx, &attacherv1.SnapshotLvolRequest{Lvol: work, Snapshot: name}); !step(err) {
				return
			}
			if _, err = l.Unexport(ctx, &attacherv1.UnexportRequest{Lvol: work, Owner: owner}); !step(err) {
				return
			}
			if _, err = l.DeleteLvol(ctx, &attacherv1.DeleteLvolRequest{Name: work}); !step(err) {
				return
			}
		}
		below = name
	}
	soldier := blockName(block.Soldier, 100+len(blocks))
	if _, err := l.CloneLvol(ctx, &attacherv1.CloneLvolRequest{Snapshot: below, Name: soldier, ReadOnly: true}); !step(err) {
		return
	}
	if _, err := l.PutImage(ctx, &attacherv1.PutImageRequest{Image: image(reference, append(blocks, soldier))}); !step(err) {
		return
	}
	if rng.IntN(2) == 0 {
		_, err := l.DeleteImage(ctx, &attacherv1.DeleteImageRequest{Reference: reference})
		step(err)
	}
}

func BenchmarkListLvols1000(b *testing.B) {
	l := newLab(b, true)
	for i := range 1000 {
		l.create(fmt.Sprintf("lvol-%04d", i), "")
	}
	for b.Loop() {
		r, err := l.ListLvols(ctx, &attacherv1.ListLvolsRequest{})
		if err != nil || len(r.GetLvols()) != 1000 {
			b.Fatal(len(r.GetLvols()), err)
		}
	}
}

func BenchmarkGetLvol(b *testing.B) {
	for _, socket := range []bool{false, true} {
		b.Run(fmt.Sprintf("socket=%v", socket), func(b *testing.B) {
			l := newLab(b, socket)
			l.create("a", "")
			for b.Loop() {
				if _, err := l.GetLvol(ctx, &attacherv1.GetLvolRequest{Name: "a"}); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
