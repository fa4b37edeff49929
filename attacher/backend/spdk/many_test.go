package spdk_test

import (
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/thaw-project/thaw/attacher"
	"github.com/thaw-project/thaw/attacher/backend/backendtest"
	"github.com/thaw-project/thaw/kind"
)

// TestMany has 1,000 lvols and 200 exports: how long what an attacher does often takes,
// and how long until all is shown by a target that was killed.
func TestMany(t *testing.T) {
	if testing.Short() {
		t.Skip("1,000 lvols take seconds: run without -short")
	}
	p := newPlace(t)
	tg := spawn(t, childTarget, p.root, "target")
	spawn(t, childBridge, p.root, "bridge")
	b := p.open(t, p.conn(t))
	defer b.Close()
	x := b.Exporter()
	if err := x.Restore(nil); err != nil {
		t.Fatal(err)
	}
	prepare(t, b)
	const lvols, exports = 1000, 200
	timed := func(what string, f func() error) time.Duration {
		t.Helper()
		begin := time.Now()
		if err := f(); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		d := time.Since(begin)
		t.Logf("%s: %s", what, d.Round(10*time.Microsecond))
		return d
	}
	timed("create 995, 200 of them read-only", func() error {
		for i := range lvols - 6 + 1 {
			if _, err := b.Create(fmt.Sprintf("c-%d", i), 1<<20); err != nil {
				return err
			}
			if i >= exports {
				continue
			}
			if _, err := b.SetReadOnly(fmt.Sprintf("c-%d", i), true); err != nil {
				return err
			}
		}
		return nil
	})
	timed("list", func() error {
		list, err := b.List()
		if err == nil && len(list) != lvols+1 {
			err = fmt.Errorf("%d lvols", len(list))
		}
		return err
	})
	timed("get", func() error { _, err := b.Get("c-500"); return err })
	timed("get nothing", func() error {
		if _, err := b.Get("none"); !errors.Is(err, kind.NotFound) {
			return fmt.Errorf("it is %w", err)
		}
		return nil
	})
	told := make([]attacher.Exported, exports)
	all := make([]attacher.Export, exports)
	for i := range all {
		all[i] = attacher.Export{Node: fmt.Sprintf("node-%d", i), Block: fmt.Sprintf("c-%d", i), NSID: 1, Transport: attacher.TransportTCP}
	}
	took := make([]time.Duration, exports)
	each := func(workers int, f func(i int) error) {
		t.Helper()
		var wg sync.WaitGroup
		next := make(chan int)
		for range workers {
			wg.Go(func() {
				for i := range next {
					begin := time.Now()
					if err := f(i); err != nil {
						t.Errorf("%d: %v", i, err)
					}
					took[i] = time.Since(begin)
				}
			})
		}
		for i := range all {
			next <- i
		}
		close(next)
		wg.Wait()
		sorted := slices.Sorted(slices.Values(took))
		t.Logf("  with %d callers: p50 %s, p99 %s", workers, sorted[len(sorted)/2].Round(10*time.Microsecond), sorted[len(sorted)*99/100].Round(10*time.Microsecond))
	}
	for _, workers := range []int{1, 32} {
		timed("export 200 to as many nodes", func() error {
			each(workers, func(i int) (err error) { told[i], err = x.Export(all[i], ""); return err })
			return nil
		})
		if workers == 1 {
			timed("withdraw them", func() error {
				each(workers, func(i int) error { return x.Withdraw(all[i]) })
				return nil
			})
		}
	}
	timed("export one again", func() error { _, err := x.Export(all[7], ""); return err })
	timed("compare all", func() error { return x.Restore(all) })
	tg.kill()
	begin := time.Now()
	tg.start()
	for _, i := range []int{0, exports / 2, exports - 1} {
		for {
			d, err := backendtest.OpenNVMe(t.Context(), all[i].Node, told[i])
			if err == nil {
				d.Close()
				break
			}
			if time.Since(begin) > within {
				t.Fatalf("%s has nothing after %s: %v", all[i].Node, within, err)
			}
			time.Sleep(5 * time.Millisecond)
		}
	}
	t.Logf("all is shown again after %s", time.Since(begin).Round(time.Millisecond))
	timed("delete 500", func() error {
		for i := range 500 {
			if err := b.Delete(fmt.Sprintf("c-%d", exports+i)); err != nil {
				return err
			}
		}
		return nil
	})
	timed("withdraw all", func() error {
		each(32, func(i int) error { return x.Withdraw(all[i]) })
		return nil
	})
}
