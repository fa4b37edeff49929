package device

import (
	"sync"
)

// Op names an operation for Fault.
type Op string

// The operations.
const (
	OpRead  Op = "read"
	OpWrite Op = "write"
	OpSync  Op = "sync"
	OpPunch Op = "punch"
)

// Rule says which operations fail and how.
type Rule struct {
	Op Op
	// Start and End bound the range in bytes, if End is not 0: an operation that
	// touches it matches.
	Start, End int64
	// After lets that many matching operations pass first; Count is how many then
	// fail, 0 for all.
	After, Count int
	// Err is what they fail with.
	Err error
	// Torn makes a failing write change the first half of its sectors.
	Torn bool

	seen int // guarded by Fault.mu
}

// Fault is another device with errors injected by rules. The first rule that
// fails an operation decides.
type Fault struct {
	Device
	mu    sync.Mutex
	rules []*Rule // guarded by mu
}

// NewFault wraps d.
func NewFault(d Device) *Fault { return &Fault{Device: d} }

// Inject adds a rule.
func (f *Fault) Inject(r Rule) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.rules = append(f.rules, &r)
}

// Heal drops all rules.
func (f *Fault) Heal() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.rules = nil
}

func (f *Fault) match(op Op, off, length int64) *Rule {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, r := range f.rules {
		if r.Op != op || r.End != 0 && (off >= r.End || off+length <= r.Start) {
			continue
		}
		r.seen++
		if r.seen > r.After && (r.Count == 0 || r.seen <= r.After+r.Count) {
			return r
		}
	}
	return nil
}

func (f *Fault) ReadAt(p []byte, off int64) error {
	if r := f.match(OpRead, off, int64(len(p))); r != nil {
		return r.Err
	}
	return f.Device.ReadAt(p, off)
}

func (f *Fault) WriteAt(p []byte, off int64) error {
	if r := f.match(OpWrite, off, int64(len(p))); r != nil {
		if half := len(p) / 2 / SectorBytes * SectorBytes; r.Torn && half > 0 {
			f.Device.WriteAt(p[:half], off)
		}
		return r.Err
	}
	return f.Device.WriteAt(p, off)
}

func (f *Fault) Sync() error {
	if r := f.match(OpSync, 0, 0); r != nil {
		return r.Err
	}
	return f.Device.Sync()
}

func (f *Fault) Punch(off, length int64) error {
	if r := f.match(OpPunch, off, length); r != nil {
		return r.Err
	}
	return f.Device.Punch(off, length)
}
