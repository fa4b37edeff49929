package attacher

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/thaw-project/thaw/attacher/hold"
	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/lvol"
)

// flight is an lvol store behind a process that goes away: from a certain call on, every one
// fails with kind.Unavailable, the first of them before or after it took effect.
type flight struct {
	LvolStore

	mu    sync.Mutex
	armed bool // guarded by mu, as are all below
	left  int  // calls until it goes away
	late  bool // the call that it goes away in takes effect
	away  bool
	calls int
}

func (f *flight) arm(left int, late bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.armed, f.left, f.late, f.away, f.calls = true, left, late, false, 0
}

func (f *flight) back() (calls int, wentAway bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	wentAway = f.away
	f.armed, f.away = false, false
	return f.calls, wentAway
}

func fly[T any](f *flight, call func() (T, error)) (T, error) {
	var none T
	gone := kind.Errorf(kind.Unavailable, "the target does not answer")
	f.mu.Lock()
	f.calls++
	if f.away {
		f.mu.Unlock()
		return none, gone
	}
	leaves := f.armed && f.left == 0
	f.left--
	f.away = f.away || leaves
	late := f.late
	f.mu.Unlock()
	if leaves && !late {
		return none, gone
	}
	out, err := call()
	if leaves {
		return none, gone
	}
	return out, err
}

func (f *flight) Create(name string, sizeBytes int64) (lvol.Info, error) {
	return fly(f, func() (lvol.Info, error) { return f.LvolStore.Create(name, sizeBytes) })
}

func (f *flight) Snapshot(name, snapshot string) (lvol.Info, error) {
	return fly(f, func() (lvol.Info, error) { return f.LvolStore.Snapshot(name, snapshot) })
}

func (f *flight) Clone(snapshot, name string) (lvol.Info, error) {
	return fly(f, func() (lvol.Info, error) { return f.LvolStore.Clone(snapshot, name) })
}

func (f *flight) SetReadOnly(name string, readOnly bool) (lvol.Info, error) {
	return fly(f, func() (lvol.Info, error) { return f.LvolStore.SetReadOnly(name, readOnly) })
}

func (f *flight) Delete(name string) error {
	_, err := fly(f, func() (struct{}, error) { return struct{}{}, f.LvolStore.Delete(name) })
	return err
}

func (f *flight) Rename(name, newName string) (lvol.Info, error) {
	return fly(f, func() (lvol.Info, error) { return f.LvolStore.Rename(name, newName) })
}

func (f *flight) Get(name string) (lvol.Info, error) {
	return fly(f, func() (lvol.Info, error) { return f.LvolStore.Get(name) })
}

func (f *flight) List() ([]lvol.Info, error) {
	return fly(f, func() ([]lvol.Info, error) { return f.LvolStore.List() })
}

// TestStoreAwayAtEveryCall has the store go away in every call that an operation makes of it,
// before and after it took effect. Repeated when it is back, the operation ends as an
// undisturbed one does; when nobody comes back for it, nothing of it is left within 10 s.
func TestStoreAwayAtEveryCall(t *testing.T) {
	made := chain(convertedImage, endHold, attachRW("n", "c1", soldier))
	all := append(operations(),
		operation{"attach", convertedImage, attachTo("n", soldier)},
		operation{"writable layer", chain(convertedImage, endHold), attachRW("n", "c1", soldier)},
		operation{"end of a writable layer", made, deleteRW("n", "c1")})
	for _, o := range all {
		t.Run(o.name, func(t *testing.T) {
			t.Parallel() // most of the time it waits for a sweep
			prepare := func() (*host, *flight, *Attacher, *hold.Hold) {
				h, _ := exporting(t)
				if o.before != nil {
					h.crash("", 0, o.before)
				}
				f := &flight{}
				h.wrap = func(s LvolStore) LvolStore {
					f.LvolStore = s
					return f
				}
				a := h.start(time.Hour)
				return h, f, a, holdNow(h, a, "c")
			}
			h, f, a, _ := prepare()
			f.arm(1<<30, false)
			if err := o.crash(a); err != nil {
				t.Fatal(err)
			}
			calls, _ := f.back()
			wantLvols, wantDisks := h.lvols(), h.disks()
			a.Close()
			var left sync.WaitGroup
			defer left.Wait()
			for n := range calls {
				for _, late := range []bool{false, true} {
					where := fmt.Sprintf("away in call %d of %d, late %t", n+1, calls, late)
					h, f, a, _ := prepare()
					f.arm(n, late)
					err := o.crash(a)
					if _, away := f.back(); !away {
						t.Errorf("%s: it did not go away", where)
					}
					if err != nil && kind.Of(err) != kind.Unavailable {
						t.Errorf("%s: %v", where, err)
					}
					for begin := time.Now(); err != nil; time.Sleep(time.Millisecond) {
						// A deletion that the sweep goes on with already is in use.
						if err = o.crash(a); err != nil && (kind.Of(err) != kind.InUse || time.Since(begin) > 10*time.Second) {
							t.Fatalf("%s, again: %v", where, err)
						}
					}
					converge(t, where+", again", func() string {
						if lvols, disks := h.lvols(), h.disks(); !slices.Equal(lvols, wantLvols) || !slices.Equal(disks, wantDisks) {
							return fmt.Sprintf("lvols %q, want %q; disks %q, want %q", lvols, wantLvols, disks, wantDisks)
						}
						return ""
					})
					a.Close()

					h, f, a, held := prepare()
					f.arm(n, late)
					_ = o.crash(a)    // it was looked at above
					held.Leave(false) // while it is away
					<-held.Gone()
					f.back()
					left.Go(func() {
						defer a.Close()
						converge(t, where+", nobody comes back", func() string {
							for _, name := range []string{"w ", "w2 "} {
								if slices.ContainsFunc(h.lvols(), func(s string) bool { return strings.HasPrefix(s, name) }) {
									return fmt.Sprintf("lvols %q are left", h.lvols())
								}
							}
							if got := h.records(a); len(got) > 0 {
								return fmt.Sprintf("records %q are left", got)
							}
							return ""
						})
						for _, undo := range []func(*Attacher) error{deleteRW("n", "c1"), detachFrom("n", soldier), deleteImage, prune} {
							converge(t, where+", removal", func() string {
								if err := undo(a); err != nil {
									return err.Error()
								}
								return ""
							})
						}
						converge(t, where+", after removal", func() string {
							if lvols, disks := h.lvols(), h.disks(); len(lvols) > 0 && !slices.Equal(lvols, []string{"renamed snapshot=false ro=false"}) || len(disks) > 0 {
								return fmt.Sprintf("lvols %q and disks %q are left", lvols, disks)
							}
							return ""
						})
					})
				}
			}
		})
	}
}

// converge waits until wrong says nothing, for 10 s.
func converge(t *testing.T, where string, wrong func() string) {
	t.Helper()
	begin := time.Now()
	for what := wrong(); what != ""; what = wrong() {
		if time.Since(begin) > 10*time.Second {
			t.Errorf("%s: %s", where, what)
			return
		}
		time.Sleep(2 * time.Millisecond)
	}
}

var _ LvolStore = (*flight)(nil)
