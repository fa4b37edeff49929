package attacher

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	attacherv1 "github.com/thaw-project/thaw/api/attacher/v1"
	"github.com/thaw-project/thaw/attacher/hold"
	"github.com/thaw-project/thaw/kind"
)

// TestConcurrent has nodes and converters do what they like with the same few blocks, at a
// store and an exporter that go away now and then. In the end what is shown is what is
// on record, and when all is given back nothing is left anywhere.
func TestConcurrent(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	h, l := exporting(t)
	h.crash("", 0, chain(convertedImage, endHold))
	f := &flight{}
	h.wrap = func(s LvolStore) LvolStore {
		f.LvolStore = s
		return f
	}
	a := h.start(time.Hour)
	defer func() { a.Close() }()
	blocks := []string{lowest, second, soldier, other}
	nodes := []string{"n", "m"}
	var wg sync.WaitGroup
	calls := 300 // of each worker
	if testing.Short() {
		calls = 100
	}
	var done [11]atomic.Int64
	for worker := range 6 {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(seed, uint64(worker)))
			owner := fmt.Sprintf("o%d", worker)
			var held *hold.Hold
			defer func() {
				if held != nil {
					held.Leave(false)
					<-held.Gone()
				}
			}()
			for range calls {
				node, block, id := nodes[rng.IntN(len(nodes))], blocks[rng.IntN(len(blocks))], fmt.Sprint("c", rng.IntN(3))
				var err error
				what := rng.IntN(11)
				switch what {
				case 0, 1:
					err = attachTo(node, block)(a)
				case 2:
					err = detachFrom(node, block)(a)
				case 3, 4:
					err = attachRW(node, id, block)(a)
				case 5:
					err = detachRW(node, id)(a)
				case 6:
					err = deleteRW(node, id)(a)
				case 7:
					if held == nil {
						held, err = a.holds.Begin(background, owner, "")
					} else {
						held.Leave(false)
						<-held.Gone()
						held = nil
					}
				case 8:
					name := owner + "-w"
					if _, err = a.CloneLvol(background, &attacherv1.CloneLvolRequest{Snapshot: second, Name: name, Owner: owner}); err == nil {
						_, err = a.Export(background, &attacherv1.ExportRequest{Lvol: name, Owner: owner, Node: node})
					}
				case 9:
					_, err = a.Export(background, &attacherv1.ExportRequest{Lvol: block, Owner: owner, Node: node, ReadOnly: true})
				case 10:
					_, err = a.Unexport(background, &attacherv1.UnexportRequest{Lvol: block, Owner: owner})
				}
				// One block never existed, and what is in use or away is so for a reason.
				if k := kind.Of(err); err != nil && !slices.Contains([]kind.Kind{kind.InUse, kind.Exists, kind.NotFound, kind.Unavailable}, k) {
					t.Errorf("%v", err)
				}
				if err == nil {
					done[what].Add(1)
				}
			}
		})
	}
	rng := rand.New(rand.NewPCG(seed, 99))
	away := kind.Errorf(kind.Unavailable, "the target does not answer")
	finished := make(chan struct{})
	go func() { wg.Wait(); close(finished) }()
	for over := false; !over; {
		select {
		case <-finished:
			over = true
		default:
		}
		time.Sleep(time.Duration(rng.IntN(40)) * time.Millisecond)
		switch rng.IntN(3) {
		case 0:
			l.set(away, away)
		case 1:
			f.arm(rng.IntN(5), rng.IntN(2) == 0)
		case 2:
			if err := prune(a); err != nil { // finds nothing: all are the image's
				t.Error(err)
			}
		}
		time.Sleep(time.Duration(rng.IntN(10)) * time.Millisecond)
		l.set(nil, nil)
		f.back()
	}
	for what := range done {
		if n := done[what].Load(); n == 0 {
			t.Errorf("operation %d succeeded %d times", what, n)
		}
	}

	check := func(when string) {
		t.Helper()
		converge(t, when, func() string {
			shown, recorded := l.list(), make(map[string]uint32)
			r, err := a.ListAttachments(background, &attacherv1.ListAttachmentsRequest{})
			if err != nil {
				return err.Error()
			}
			for _, x := range r.GetAttachments() {
				name := x.GetBlock()
				if x.GetWritable() {
					name = writableLvol(x.GetNode(), x.GetWritableId())
				}
				if x.GetNsid() != 0 {
					recorded[x.GetNode()+" "+name] = x.GetNsid()
				}
			}
			if len(shown) != len(recorded) {
				return fmt.Sprintf("shown are %v, recorded %v", shown, recorded)
			}
			for k, nsid := range recorded {
				if shown[k] != nsid {
					return fmt.Sprintf("shown are %v, recorded %v", shown, recorded)
				}
			}
			if got := h.records(a); len(got) > 0 {
				return fmt.Sprintf("records %q", got)
			}
			return ""
		})
	}
	check("at the end")
	a.Close()
	a = h.start(time.Hour)
	check("after a restart")
	for _, node := range nodes {
		for _, block := range blocks {
			if err := detachFrom(node, block)(a); err != nil {
				t.Error(err)
			}
		}
		for i := range 3 {
			if err := deleteRW(node, fmt.Sprint("c", i))(a); err != nil {
				t.Error(err)
			}
		}
	}
	converge(t, "given back", func() string {
		if err := chain(deleteImage, prune)(a); err != nil {
			return err.Error()
		}
		a.mu.Lock()
		uses, nsids, named, doubts := len(a.uses), len(a.nsids), len(a.named), len(a.doubts)
		a.mu.Unlock()
		if lvols := h.lvols(); len(lvols) > 0 || len(l.list()) > 0 || uses+nsids+named+doubts > 0 {
			return fmt.Sprintf("lvols %q, shown %v, %d uses, %d identifiers, %d named, %d doubts", lvols, l.list(), uses, nsids, named, doubts)
		}
		return ""
	})
}
