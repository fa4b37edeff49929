package card_test

import (
	"bufio"
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	attacherv1 "github.com/thaw-project/thaw/api/attacher/v1"
	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/node/imagemgmt"
	"github.com/thaw-project/thaw/node/present"
	"github.com/thaw-project/thaw/spdk"
)

// The test binary is also the image-mgmt that a test kills.
const workerArg = "test-images"

func TestMain(m *testing.M) {
	if len(os.Args) > 3 && os.Args[1] == workerArg {
		if err := work(os.Args[2], os.Args[3]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	goleak.VerifyTestMain(m)
}

var ctx = context.Background()

func at(name string) imagemgmt.Block { return imagemgmt.Block{Target: targetName, Name: name} }

// TestThroughTheCard goes from blocks at a store to drives on functions, and back.
func TestThroughTheCard(t *testing.T) {
	l := newLab(t)
	one, two := l.block(1), l.block(2)
	i, err := openImages(l.dir)
	must(t, err)
	defer func() { must(t, i.close()) }()
	var d present.Disk
	for range 2 {
		d, err = i.Attach(ctx, at(one), "u")
		must(t, err)
		if d.Path != "" || !d.ReadOnly || d.SizeBytes != blockBytes || d.NVMe == nil || len(d.NVMe.Serial) != 20 {
			t.Fatalf("%+v", d)
		}
	}
	got := make([]byte, 512)
	read := func(d present.Disk, want string) {
		t.Helper()
		if _, err := l.plug(d).ReadAt(got, 3*clusterBytes); err != nil || string(got) != string(content(want)) {
			t.Fatalf("%.60q, %v; want %s", got, err, want)
		}
	}
	read(d, one)
	if _, err := l.plug(d).WriteAt(got, 0); err == nil {
		t.Fatal("a block was written")
	}
	e, err := i.Attach(ctx, at(two), "u")
	must(t, err)
	read(e, two)

	layer := imagemgmt.Layer{Block: at(one)} // a path means nothing here
	w, err := i.AttachWritable(ctx, layer, "snapshot-0-1")
	must(t, err)
	read(w, one) // what is below shows through
	drive := l.plug(w)
	if _, err := drive.WriteAt(content("written"), 3*clusterBytes); err != nil {
		t.Fatal(err)
	}
	must(t, drive.Flush())
	if s, err := i.StatWritable(ctx, layer, "snapshot-0-1"); err != nil || s.AllocatedBytes < clusterBytes || s.Files != 1 || s.Disk.ID != w.ID {
		t.Fatalf("%+v, %v", s, err)
	}
	if ids, want := l.onCard(), []string{"snapshot-0-1", one, two}; !slices.Equal(ids, want) {
		t.Fatalf("the card shows %q", ids)
	}
	list, err := i.presenter.List(ctx)
	must(t, err)
	if len(list) != 3 || list[0].ID != w.ID || *list[0].NVMe != *w.NVMe || list[0].Source.Kind != present.SourceWritable || list[0].ReadOnly || list[1].Source.Kind != present.SourceLvol || !list[1].ReadOnly {
		t.Fatalf("%+v", list)
	}

	// Another process goes on with the same drives.
	must(t, i.close())
	i, err = openImages(l.dir)
	must(t, err)
	if again, err := i.Attach(ctx, at(one), "v"); err != nil || *again.NVMe != *d.NVMe {
		t.Fatalf("%+v, %v", again, err)
	}
	if again, err := i.AttachWritable(ctx, imagemgmt.Layer{Block: at(one), Path: "no/path"}, "snapshot-0-1"); err != nil || *again.NVMe != *w.NVMe {
		t.Fatalf("%+v, %v", again, err)
	}

	// Detached and attached again, the layer is what it was.
	must(t, i.DetachWritable(ctx, one, "snapshot-0-1"))
	if attached, layers := l.onStore(); !slices.Equal(attached, []string{one, two}) || !slices.Equal(layers, []string{"snapshot-0-1"}) {
		t.Fatalf("the store has %q attached, and layers %q", attached, layers)
	}
	w, err = i.AttachWritable(ctx, layer, "snapshot-0-1")
	must(t, err)
	read(w, "written")
	read(d, one)

	for _, err := range []error{i.Detach(ctx, one, "u"), i.Detach(ctx, one, "v"), i.Detach(ctx, two, "u"), i.DeleteWritable(ctx, layer, "snapshot-0-1"), i.DeleteWritable(ctx, layer, "snapshot-0-1")} {
		must(t, err)
	}
	if ids := l.onCard(); len(ids) != 0 {
		t.Fatalf("the card shows %q", ids)
	}
	eventually(t, "detaching at the store", func() bool {
		attached, layers := l.onStore()
		return len(attached)+len(layers) == 0
	})
}

func TestRefusals(t *testing.T) {
	l := newLab(t)
	one := l.block(1)
	i, err := openImages(l.dir)
	must(t, err)
	defer func() { must(t, i.close()) }()
	_, err = i.Attach(ctx, at("soldier-absent"), "u")
	wantKind(t, err, kind.NotFound)
	_, err = i.Attach(ctx, imagemgmt.Block{Name: one}, "u") // a store of this machine's own
	wantKind(t, err, kind.NotFound)
	_, err = i.presenter.Present(ctx, "x", present.Source{Kind: present.SourceQcow2, Lvol: one, Target: targetName, Path: "/x"}, false)
	wantKind(t, err, kind.Unsupported)
	_, err = i.presenter.Present(ctx, "x", present.Source{Kind: present.SourceLvol, Lvol: one, Target: targetName}, false)
	wantKind(t, err, kind.Unsupported)
	_, err = i.AttachWritable(ctx, imagemgmt.Layer{Block: at(one), Path: "/x", SizeBytes: 2 * blockBytes}, "rw-1")
	wantKind(t, err, kind.Unsupported)
	must(t, i.DeleteWritable(ctx, imagemgmt.Layer{Block: at(one), Path: "/x"}, "rw-1"))
	must(t, i.presenter.Withdraw(ctx, "unknown"))

	// More than the card has functions: the rest works, and nothing is left of the one.
	for n := range functions {
		_, err := i.AttachWritable(ctx, imagemgmt.Layer{Block: at(one), Path: "/x"}, fmt.Sprint("rw-", n))
		must(t, err)
	}
	_, err = i.Attach(ctx, at(one), "u")
	wantKind(t, err, kind.NoSpace)
	for n := range functions {
		must(t, i.DeleteWritable(ctx, imagemgmt.Layer{Block: at(one), Path: "/x"}, fmt.Sprint("rw-", n)))
	}
	eventually(t, "detaching at the store", func() bool {
		attached, layers := l.onStore()
		return len(attached)+len(layers) == 0
	})
	_, err = i.Attach(ctx, at(one), "u")
	must(t, err)
	must(t, i.Detach(ctx, one, "u"))
}

// TestVolumesOfOthers: what somebody had the card show of its own target is none of
// image-mgmt's, whatever its purpose.
func TestVolumesOfOthers(t *testing.T) {
	l := newLab(t)
	_, err := l.spdk.BdevMallocCreate(ctx, spdk.BdevMallocCreateParams{Name: "mine", NumBlocks: 256, BlockSizeBytes: 512})
	must(t, err)
	d, err := l.card.Client().AttachDisk(ctx, &attacherv1.AttachDiskRequest{
		Id: "data", Purpose: attacherv1.Purpose_PURPOSE_WRITABLE, Source: &attacherv1.AttachDiskRequest_Volume{Volume: "mallocVolumes/mine"},
	})
	must(t, err)
	if d.GetVolume() != "mallocVolumes/mine" {
		t.Fatalf("%+v", d)
	}
	one := l.block(1)
	for range 2 {
		i, err := openImages(l.dir)
		must(t, err)
		if list, err := i.presenter.List(ctx); err != nil || len(list) != 0 {
			t.Fatalf("%+v, %v", list, err)
		}
		_, err = i.AttachWritable(ctx, imagemgmt.Layer{Block: at(one)}, "data")
		wantKind(t, err, kind.Exists)
		if attached, _ := l.onStore(); len(attached) != 0 {
			t.Fatalf("the store has %q attached for nobody", attached)
		}
		must(t, i.close())
		if ids := l.onCard(); !slices.Equal(ids, []string{"data"}) {
			t.Fatalf("the card shows %q", ids)
		}
	}
}

// TestCardIsAway has the card's attacher stop: what it shows stays, what was asked of it
// meanwhile fails, and nothing is left once it is back.
func TestCardIsAway(t *testing.T) {
	l := newLab(t)
	one, two := l.block(1), l.block(2)
	i, err := openImages(l.dir)
	must(t, err)
	defer func() { must(t, i.close()) }()
	d, err := i.Attach(ctx, at(one), "u")
	must(t, err)
	drive := l.plug(d)
	l.endCard()
	got := make([]byte, 512)
	if _, err := drive.ReadAt(got, 3*clusterBytes); err != nil || string(got) != string(content(one)) {
		t.Fatalf("%.60q, %v", got, err)
	}
	_, err = i.Attach(ctx, at(two), "u")
	wantKind(t, err, kind.Unavailable)
	wantKind(t, i.Detach(ctx, one, "u"), kind.Unavailable)
	l.startCard()
	eventually(t, "taking away what nobody uses", func() bool {
		attached, _ := l.onStore()
		return len(l.onCard()) == 0 && len(attached) == 0
	})
	d, err = i.Attach(ctx, at(two), "u")
	must(t, err)
	if _, err := l.plug(d).ReadAt(got, 3*clusterBytes); err != nil || string(got) != string(content(two)) {
		t.Fatalf("%.60q, %v", got, err)
	}
	must(t, i.Detach(ctx, two, "u"))
}

const killBlocks, killUsers, killLayers = 2, 2, 2

// work attaches and detaches at random until it is killed, and says before each call what
// it is about to do, and after it that it is done.
func work(dir, seed string) error {
	i, err := openImages(dir)
	if err != nil {
		return err
	}
	n, err := strconv.ParseUint(seed, 10, 64)
	if err != nil {
		return err
	}
	fmt.Println("ready")
	rng := rand.New(rand.NewPCG(n, 0))
	for {
		number := rng.IntN(killBlocks)
		b := fmt.Sprintf("soldier-00000000-0000-4000-8000-%012d", number)
		who, op := fmt.Sprint("user-", rng.IntN(killUsers)), []string{"attach", "detach"}[rng.IntN(2)]
		layer := imagemgmt.Layer{Block: at(b), Path: "/nowhere"}
		if rng.IntN(2) == 0 {
			who, op = fmt.Sprintf("rw-%d-%d", number, rng.IntN(killLayers)), []string{"attach-writable", "detach-writable", "delete-writable"}[rng.IntN(3)]
		}
		fmt.Println("begin", op, b, who)
		switch op {
		case "attach":
			_, err = i.Attach(ctx, at(b), who)
		case "detach":
			err = i.Detach(ctx, b, who)
		case "attach-writable":
			_, err = i.AttachWritable(ctx, layer, who)
		case "detach-writable":
			err = i.DetachWritable(ctx, b, who)
		case "delete-writable":
			err = i.DeleteWritable(ctx, layer, who)
		}
		if err != nil {
			return err
		}
		fmt.Println("done", op, b, who)
	}
}

// TestKilledProcess kills image-mgmt while it works. Whatever it was told is done must be
// so in the next one, what it was about to do may be, and within 10 s card and store have
// exactly what is in use.
func TestKilledProcess(t *testing.T) {
	l := newLab(t)
	used := make(map[string]map[string]bool) // by block, users and layers
	layers := make(map[string]bool)          // those that exist
	for n := range killBlocks {
		used[l.block(n)] = make(map[string]bool)
	}
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 1))
	calls, slowest := 0, time.Duration(0)
	for round := range 10 {
		cmd := exec.Command(os.Args[0], workerArg, l.dir, fmt.Sprint(seed+uint64(round)))
		cmd.Stderr = os.Stderr
		out, err := cmd.StdoutPipe()
		must(t, err)
		must(t, cmd.Start())
		lines := bufio.NewScanner(out)
		if !lines.Scan() || lines.Text() != "ready" {
			cmd.Wait()
			t.Fatalf("the process said %q", lines.Text())
		}
		timer := time.AfterFunc(time.Duration(rng.IntN(300_000))*time.Microsecond, func() { cmd.Process.Kill() })
		var open []string // begun and not done
		for lines.Scan() {
			f := strings.Fields(lines.Text())
			if len(f) != 4 {
				break // cut off
			}
			open = f
			if f[0] == "done" {
				used[f[2]][f[3]] = strings.HasPrefix(f[1], "attach")
				switch f[1] {
				case "attach-writable":
					layers[f[3]] = true
				case "delete-writable":
					delete(layers, f[3])
				}
				open = nil
				calls++
			}
		}
		cmd.Wait()
		timer.Stop()

		begin := time.Now()
		i, err := openImages(l.dir)
		must(t, err)
		list, err := i.List(ctx)
		must(t, err)
		got := make(map[string][]string)
		for _, a := range list {
			got[a.Block] = a.Users
		}
		if open != nil && strings.HasSuffix(open[1], "-writable") { // its caller goes on
			layer := imagemgmt.Layer{Block: at(open[2]), Path: "/nowhere"}
			switch open[1] {
			case "attach-writable":
				_, err = i.AttachWritable(ctx, layer, open[3])
				layers[open[3]] = true
			case "detach-writable":
				err = i.DetachWritable(ctx, open[2], open[3])
			case "delete-writable":
				err = i.DeleteWritable(ctx, layer, open[3])
				delete(layers, open[3])
			}
			must(t, err)
			used[open[2]][open[3]] = open[1] == "attach-writable"
			if list, err = i.List(ctx); err != nil {
				t.Fatal(err)
			}
			clear(got)
			for _, a := range list {
				got[a.Block] = a.Users
			}
		}
		var shown, attached []string
		for b, users := range used {
			if open != nil && open[2] == b && strings.HasPrefix(open[3], "user-") { // either way is right
				users[open[3]] = slices.Contains(got[b], open[3])
			}
			var want []string
			read := false
			for _, u := range slices.Sorted(maps.Keys(users)) {
				if !users[u] {
					continue
				}
				want = append(want, u)
				if strings.HasPrefix(u, "rw-") {
					shown, attached = append(shown, u), append(attached, u)
				} else {
					read = true
				}
			}
			if read {
				shown, attached = append(shown, b), append(attached, b)
			}
			if !slices.Equal(got[b], want) {
				t.Errorf("round %d: block %s has users %q, want %q (interrupted: %q)", round, b, got[b], want, open)
			}
		}
		slices.Sort(shown)
		slices.Sort(attached)
		var have, there []string
		for deadline := begin.Add(10 * time.Second); ; time.Sleep(5 * time.Millisecond) {
			have, there = l.onStore()
			// A block under a layer may be attached at the store although nobody reads it.
			extra := slices.DeleteFunc(slices.Clone(have), func(x string) bool { return slices.Contains(attached, x) })
			under := !slices.ContainsFunc(extra, func(x string) bool { return !slices.ContainsFunc(attached, func(w string) bool { return used[x][w] }) })
			missing := slices.ContainsFunc(attached, func(x string) bool { return !slices.Contains(have, x) })
			if slices.Equal(l.onCard(), shown) && under && !missing && slices.Equal(there, slices.Sorted(maps.Keys(layers))) {
				break
			}
			if time.Now().After(deadline) {
				t.Fatalf("round %d, interrupted %q: after 10 s the card shows %q, want %q; the store has %q attached, want %q, and layers %q, want %v", round, open, l.onCard(), shown, have, attached, there, layers)
			}
		}
		slowest = max(slowest, time.Since(begin))
		must(t, i.close())
	}
	t.Logf("%d calls; agreed again after at most %v", calls, slowest)
	if calls == 0 {
		t.Error("the processes did nothing")
	}
	i, err := openImages(l.dir)
	must(t, err)
	for b, users := range used {
		for u := range users {
			if strings.HasPrefix(u, "rw-") {
				must(t, i.DeleteWritable(ctx, imagemgmt.Layer{Block: at(b), Path: "/nowhere"}, u))
			} else {
				must(t, i.Detach(ctx, b, u))
			}
		}
	}
	eventually(t, "the end", func() bool {
		attached, layers := l.onStore()
		return len(attached)+len(layers)+len(l.onCard()) == 0
	})
	must(t, i.close())
	if left, _ := filepath.Glob(filepath.Join(l.dir, "*.new")); len(left) != 0 {
		t.Errorf("left %q", left)
	}
}

// BenchmarkAttach is Attach of image-mgmt through store and card, whose functions are in
// memory.
func BenchmarkAttach(b *testing.B) {
	l := newLab(b)
	one := l.block(1)
	i, err := openImages(l.dir)
	must(b, err)
	defer func() { must(b, i.close()) }()
	var took []time.Duration
	for b.Loop() {
		begin := time.Now()
		_, err := i.Attach(ctx, at(one), "u")
		must(b, err)
		took = append(took, time.Since(begin))
		must(b, i.Detach(ctx, one, "u"))
	}
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)/2].Microseconds()), "attach-p50-us")
	b.ReportMetric(float64(took[len(took)*99/100].Microseconds()), "attach-p99-us")
}
