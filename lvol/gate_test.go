package lvol

import (
	"sync"
	"sync/atomic"
	"testing"
)

// TestGate has goroutines, some of whose stacks grow while they are inside, use a thing
// that is taken away once the gate is closed.
func TestGate(t *testing.T) {
	for range 50 {
		var g gate
		var gone atomic.Bool
		var wg sync.WaitGroup
		for i := range 8 {
			wg.Go(func() {
				for g.enter() {
					if i%2 == 0 {
						deep(20)
					}
					if gone.Load() {
						t.Error("inside after close")
					}
					g.leave()
				}
			})
		}
		deep(3)
		if !g.close() || g.close() {
			t.Error("closed twice, or not once")
		}
		gone.Store(true)
		wg.Wait()
		if n := g.inside(); n != 0 {
			t.Errorf("%d inside at the end", n)
		}
	}
}

// deep uses n KiB of stack, and returns something so that it is not optimised away.
func deep(n int) byte {
	var room [1 << 10]byte
	room[n] = byte(n)
	if n > 0 {
		room[0] = deep(n - 1)
	}
	return room[0] + room[n]
}

// TestImmutableReads: a read of a snapshot allocates nothing.
func TestImmutableReads(t *testing.T) {
	s := newPool(t, 16<<20, 0, nil)
	must[Info](t)(s.Create("a", 1<<20))
	l := openLvol(t, s, "a", false)
	write(t, l, 0, pattern(1, 1<<20))
	ok(t, l.Close())
	must[Info](t)(s.Snapshot("a", "snap"))
	snap := openLvol(t, s, "snap", true)
	for _, n := range []int{4 << 10, 128 << 10} {
		p := make([]byte, n)
		if got := testing.AllocsPerRun(200, func() {
			if _, err := snap.ReadAt(p, 64<<10); err != nil {
				t.Fatal(err)
			}
		}); got != 0 {
			t.Errorf("a read of %d bytes makes %v allocations", n, got)
		}
	}
}
