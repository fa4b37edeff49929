package kill

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"
)

const (
	// workers are chains that are killed at the same time: one for each of the CPUs that
	// any machine has.
	workers = 2
	// sample is how many pairs of each direction are tried unless all are.
	sample = 12
	// maxNth bounds how often a point of the same name is killed at in a flow: what comes
	// later is the same on another object. Pairs are of the first time of each, unless
	// THAW_KILL=every.
	maxNth = 3
	// maxFailures ends a proof that fails everywhere.
	maxFailures = 5
)

// direction is what of a subject is killed at.
type direction int

const (
	forth direction = iota
	back
)

func (d direction) String() string { return [...]string{"do", "undo"}[d] }

// job is a run with kills.
type job struct {
	way   direction
	kills []kill
}

// proof is the work of killing a subject at all its points.
type proof struct {
	t     *testing.T
	make  func(t *testing.T) (*chain, subject)
	rng   *rand.Rand
	start time.Time

	mu       sync.Mutex
	jobs     [2][]job // guarded by mu, as all below
	pairs    [2][]job // found by single kills
	failures int
	done     [2]map[int]int // by direction: runs by number of deaths
	planned  int            // runs that somebody was to die in
	killed   int            // those in which somebody did
	longest  time.Duration
	slowest  string
	again    time.Duration // until a member served again
}

// prove kills at each point, of which there must be at least least, and at pairs of points.
func prove(t *testing.T, least int, setUp func(t *testing.T) (*chain, subject)) {
	if os.Getenv("THAW_E2E") == "" {
		t.Skip("killing the chain's processes needs root and minutes: run make e2e, or make test-kill")
	}
	seed := uint64(time.Now().UnixNano())
	if text := os.Getenv("THAW_SEED"); text != "" {
		n, err := strconv.ParseUint(text, 10, 64)
		if err != nil {
			t.Fatalf("THAW_SEED: %v", err)
		}
		seed = n
	}
	t.Logf("THAW_SEED=%d", seed)
	p := &proof{t: t, make: setUp, rng: rand.New(rand.NewPCG(seed, 0)), start: time.Now()}
	p.done = [2]map[int]int{{}, {}}
	w := p.worker()
	if w == nil {
		return
	}
	names := 0
	for _, way := range []direction{forth, back} {
		for _, k := range kills(w.points[way]) {
			p.jobs[way] = append(p.jobs[way], job{way, []kill{k}})
			names++
		}
	}
	if names < least {
		t.Fatalf("only %d points of %d: %v", names, least, w.points)
	}
	t.Logf("%d points forth, %d back", len(p.jobs[forth]), len(p.jobs[back]))
	p.work(w)
	found := len(p.pairs[forth]) + len(p.pairs[back])
	if how := os.Getenv("THAW_KILL"); how != "all" && how != "every" {
		sample := sample
		if n, err := strconv.Atoi(how); err == nil {
			sample = n
		}
		for way := range p.pairs {
			p.rng.Shuffle(len(p.pairs[way]), func(i, k int) { p.pairs[way][i], p.pairs[way][k] = p.pairs[way][k], p.pairs[way][i] })
			p.pairs[way] = p.pairs[way][:min(sample, len(p.pairs[way]))]
		}
	}
	p.jobs, p.pairs = p.pairs, [2][]job{}
	if p.failures == 0 {
		p.work(nil)
	}
	// A few points are not reached every time; where hardly any is, nothing was proved.
	if p.failures == 0 && p.killed < (p.planned+1)/2 {
		t.Errorf("somebody was killed in %d of %d runs only", p.killed, p.planned)
	}
	t.Logf("%d pairs are possible; runs by number of deaths: forth %v, back %v; at most %s from the last kill until all was as without (%s), %s until a process served again; %s in all",
		found, p.done[forth], p.done[back], p.longest.Round(time.Millisecond), p.slowest, p.again.Round(time.Millisecond), time.Since(p.start).Round(time.Second))
}

// inSample skips a test whose points are among those of another, unless all are asked for.
func inSample(t *testing.T, of string) {
	t.Helper()
	if os.Getenv("THAW_KILL") == "" {
		t.Skipf("its steps are sampled by %s: run make test-kill", of)
	}
}

// kills are the points of a trace.
func kills(trace map[string][]string) []kill {
	var all []kill
	for _, member := range slices.Sorted(maps.Keys(trace)) {
		count := map[string]int{}
		for _, point := range trace[member] {
			if count[point]++; count[point] <= maxNth {
				all = append(all, kill{member, point, count[point]})
			}
		}
	}
	return all
}

// worker is a chain with what its states are.
type worker struct {
	c      *chain
	s      subject
	states [2]state // after do, after undo
	points [2]map[string][]string
}

// worker makes a chain and learns what it is like when nobody is killed. It returns nil
// when that fails.
func (p *proof) worker() *worker {
	c, s := p.make(p.t)
	w := &worker{c: c, s: s}
	err := func() error {
		// The first round makes what is made once.
		for range 2 {
			for _, way := range []direction{forth, back} {
				if _, err := run(c, s, w.what(way), nil, nil); err != nil {
					return fmt.Errorf("%s: %w", way, err)
				}
				have, err := w.resting()
				if err != nil {
					return err
				}
				// What goes on in the background belongs to it.
				if w.points[way], err = c.reached(c.marks()); err != nil {
					return err
				}
				w.states[way] = have
				if way == forth {
					if err := s.check(context.Background()); err != nil {
						return fmt.Errorf("check: %w", err)
					}
				}
			}
		}
		return nil
	}()
	if err != nil {
		p.fail(c, "without kills: %v", err)
		return nil
	}
	return w
}

// resting is the state once it does not change any more.
func (w *worker) resting() (state, error) {
	var last state
	for range 100 {
		have, err := w.s.state(context.Background())
		if err != nil {
			return nil, err
		}
		if last != nil && have.diff(last) == "" {
			return have, nil
		}
		last = have
		time.Sleep(50 * time.Millisecond)
	}
	return nil, fmt.Errorf("the state does not come to rest")
}

func (w *worker) what(way direction) func(context.Context) error {
	if way == forth {
		return w.s.do
	}
	return w.s.undo
}

// fail counts a failure and has the logs of the chain kept.
func (p *proof) fail(c *chain, format string, a ...any) {
	c.mu.Lock()
	c.failed = true
	c.mu.Unlock()
	p.mu.Lock()
	defer p.mu.Unlock()
	p.failures++
	p.t.Errorf(format, a...)
}

// next takes a job of a direction; without one left, nothing is killed. It returns false
// when there is no job at all.
func (p *proof) next(way direction) (job, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.failures >= maxFailures || len(p.jobs[forth])+len(p.jobs[back]) == 0 {
		return job{way: way}, false
	}
	if len(p.jobs[way]) == 0 {
		return job{way: way}, true
	}
	j := p.jobs[way][0]
	p.jobs[way] = p.jobs[way][1:]
	return j, true
}

// work does all jobs on workers, of which there may be one already.
func (p *proof) work(w *worker) {
	var wg sync.WaitGroup
	for i := range workers {
		mine := w
		if i > 0 {
			mine = nil
		}
		wg.Go(func() {
			for {
				if mine == nil {
					if mine = p.worker(); mine == nil {
						return
					}
				}
				for _, way := range []direction{forth, back} {
					j, more := p.next(way)
					if !more && way == forth {
						mine.c.close()
						return
					}
					if !p.do(mine, j) {
						mine.c.close()
						mine = nil // the next begins afresh
						break
					}
				}
			}
		})
	}
	wg.Wait()
}

// do does one job and takes note.
func (p *proof) do(w *worker, j job) bool {
	o, err := run(w.c, w.s, w.what(j.way), j.kills, w.states[j.way])
	if err == nil && j.way == forth {
		err = outlast(context.Background(), w.c, w.s.check)
	}
	if err != nil {
		p.fail(w.c, "%s, killed %v: %v", j.way, o.dead, err)
		return false
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.done[j.way][len(o.dead)]++
	if len(j.kills) > 0 {
		p.planned++
	}
	if len(o.dead) > 0 {
		p.killed++
	}
	if len(o.dead) > 0 && o.took > p.longest {
		p.longest, p.slowest = o.took, fmt.Sprintf("%s, %v", j.way, j.kills)
	}
	for _, d := range o.dead {
		p.again = max(p.again, d.again)
	}
	every := os.Getenv("THAW_KILL") == "every"
	if len(j.kills) == 1 && len(o.dead) == 1 && (every || j.kills[0].nth == 1) {
		for _, q := range kills(o.after) {
			if !every && q.nth > 1 {
				continue
			}
			p.pairs[j.way] = append(p.pairs[j.way], job{j.way, []kill{j.kills[0], q}})
		}
	}
	return true
}
