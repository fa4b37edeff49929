package keylock

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"
)

func TestExclusionWithoutDeadlock(t *testing.T) {
	var s Set
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	var counts [5]int // each guarded by the lock of its index
	var wg sync.WaitGroup
	const workers, rounds = 8, 500
	total := 0
	var totalMu sync.Mutex
	for w := range workers {
		rng := rand.New(rand.NewPCG(seed, uint64(w)))
		wg.Go(func() {
			for range rounds {
				a, b := rng.IntN(5), rng.IntN(5)
				unlock, err := s.Lock(context.Background(), fmt.Sprint(a), fmt.Sprint(b))
				if err != nil {
					t.Error(err)
					return
				}
				counts[a]++
				if a != b {
					counts[b]++
				}
				unlock()
				unlock() // once is enough, twice does no harm
				totalMu.Lock()
				total++
				if a != b {
					total++
				}
				totalMu.Unlock()
			}
		})
	}
	wg.Wait()
	sum := 0
	for _, n := range counts {
		sum += n
	}
	if sum != total {
		t.Fatalf("counted %d of %d: two held one lock", sum, total)
	}
	if len(s.locks) != 0 {
		t.Fatalf("%d locks left", len(s.locks))
	}
}

func TestWaitEndsWithContext(t *testing.T) {
	var s Set
	unlock, err := s.Lock(context.Background(), "b")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Millisecond)
	defer cancel()
	if _, err := s.Lock(ctx, "a", "b"); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("got %v", err)
	}
	again, err := s.Lock(context.Background(), "a") // not left behind by the one that gave up
	if err != nil {
		t.Fatal(err)
	}
	again()
	unlock()
	if len(s.locks) != 0 {
		t.Fatalf("%d locks left", len(s.locks))
	}
}
