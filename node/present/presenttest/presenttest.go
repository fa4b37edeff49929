// Package presenttest is for the tests of presenters and of their callers.
//
// Conformance holds any present.Presenter to its contract, from outside of the process
// that serves. Presenter is one that opens and closes real devices and shows them to nobody,
// and can be told to be slow, to fail, or that a kernel has a disk open.
package presenttest

import (
	"context"
	"maps"
	"slices"
	"sync"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/node/present"
	"github.com/thaw-project/thaw/target/bdev"
)

// Presenter implements present.Presenter. Like a real one it outlives its users: a
// test that abandons a user hands the same Presenter to the next.
type Presenter struct {
	open present.Opener

	mu      sync.Mutex
	disks   map[string]*disk // guarded by mu
	busy    map[string]bool  // guarded by mu: a kernel has it open
	counts  map[string]int   // guarded by mu: of "present ID" and "withdraw ID" that acted
	onCall  func(ctx context.Context, op, id string) error
	current int // guarded by mu: calls of onCall
	most    int // guarded by mu
}

type disk struct {
	present.Disk
	device bdev.Device
}

// New returns a presenter without disks.
func New(open present.Opener) *Presenter {
	return &Presenter{open: open, disks: make(map[string]*disk), busy: make(map[string]bool), counts: make(map[string]int)}
}

// Hook is called at the beginning of each Present ("present") and Withdraw
// ("withdraw"), outside of locks; its error is the call's. Set it before use.
func (p *Presenter) Hook(f func(ctx context.Context, op, id string) error) { p.onCall = f }

// SetBusy says whether a kernel has the disk open.
func (p *Presenter) SetBusy(id string, busy bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.busy[id] = busy
}

// Count is how often op ("present", "withdraw") took effect on the disk.
func (p *Presenter) Count(op, id string) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.counts[op+" "+id]
}

// MostAtOnce is the largest number of calls that were in progress together.
func (p *Presenter) MostAtOnce() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.most
}

// Reboot takes all disks away, as a reboot does.
func (p *Presenter) Reboot() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for id, d := range p.disks {
		d.device.Close()
		delete(p.disks, id)
	}
	clear(p.busy)
}

// Device is the device behind a disk, for what a kernel would write, or nil.
func (p *Presenter) Device(id string) bdev.Device {
	p.mu.Lock()
	defer p.mu.Unlock()
	if d := p.disks[id]; d != nil {
		return d.device
	}
	return nil
}

func (p *Presenter) hook(ctx context.Context, op, id string) error {
	if p.onCall == nil {
		return nil
	}
	p.mu.Lock()
	p.current++
	p.most = max(p.most, p.current)
	p.mu.Unlock()
	defer func() {
		p.mu.Lock()
		p.current--
		p.mu.Unlock()
	}()
	return p.onCall(ctx, op, id)
}

// Present implements present.Presenter.
func (p *Presenter) Present(ctx context.Context, id string, source present.Source, readOnly bool) (present.Disk, error) {
	if err := p.hook(ctx, "present", id); err != nil {
		return present.Disk{}, err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if d := p.disks[id]; d != nil {
		if d.Source != source || d.ReadOnly != readOnly {
			return present.Disk{}, kind.Errorf(kind.Exists, "disk %s is there with another source or access", id)
		}
		return d.Disk, nil
	}
	device, err := p.open(source, readOnly)
	if err != nil {
		return present.Disk{}, err
	}
	p.counts["present "+id]++
	p.disks[id] = &disk{device: device, Disk: present.Disk{
		ID: id, Source: source, Path: "/nowhere/" + id, SizeBytes: device.SizeBytes(), ReadOnly: readOnly,
	}}
	return p.disks[id].Disk, nil
}

// Withdraw implements present.Presenter.
func (p *Presenter) Withdraw(ctx context.Context, id string) error {
	if err := p.hook(ctx, "withdraw", id); err != nil {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	d := p.disks[id]
	if d == nil {
		return nil
	}
	if p.busy[id] {
		return kind.Errorf(kind.InUse, "disk %s is open", id)
	}
	delete(p.disks, id)
	p.counts["withdraw "+id]++
	return d.device.Close()
}

// List implements present.Presenter.
func (p *Presenter) List(context.Context) ([]present.Disk, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	out := make([]present.Disk, 0, len(p.disks))
	for _, id := range slices.Sorted(maps.Keys(p.disks)) {
		out = append(out, p.disks[id].Disk)
	}
	return out, nil
}
