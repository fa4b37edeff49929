// Package ublk presents disks as /dev/ublkbN: block devices that this process serves over
// io_uring (package target/ublk).
//
// A disk outlives the process that serves it. When the process is killed, the kernel keeps
// the requests of its devices, those under way too; the next process takes the devices over
// and the kernel issues the requests again. Users of the disk see a pause.
//
// Which device is which disk is in a state file; that a device is ours at all is in a
// mark that the kernel keeps with it from its first moment, so that a process killed
// between the two leaves nothing behind. Devices with another mark are never touched.
//
// The package must not know what a disk holds, and this process must never open its own
// devices: see package blockdev.
package ublk

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/thaw-project/thaw/keylock"
	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/node/present"
	"github.com/thaw-project/thaw/node/present/blockdev"
	"github.com/thaw-project/thaw/node/present/runstate"
	"github.com/thaw-project/thaw/target/ublk"
)

// Options configures New.
type Options struct {
	// StatePath is the state file: an absolute path, best on a tmpfs. Files of the same
	// name with ".lock" and ".tmp" appended belong to it. Devices are known by it: it must
	// be the same for the process that takes over.
	StatePath string
	// Open opens what is behind a disk.
	Open present.Opener
	// Queues, Depth, MaxIOBytes and Workers are those of package target/ublk, for each
	// disk; 0 means its defaults.
	Queues, Depth, MaxIOBytes, Workers int
	// Logger gets what an operator should know; nil discards it.
	Logger *slog.Logger
	// Registerer, if not nil, gets the metrics (thaw_ublk_*).
	Registerer prometheus.Registerer
}

func (o *Options) validate() error {
	if !filepath.IsAbs(o.StatePath) {
		return kind.Errorf(kind.Invalid, "ublk: StatePath %q must be absolute", o.StatePath)
	}
	if o.Open == nil {
		return kind.Errorf(kind.Invalid, "ublk: Open is missing")
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	return nil
}

const (
	// lockWait is how long New waits for a predecessor to be gone.
	lockWait = 10 * time.Second
	// usersWait is how long Withdraw waits for the last users of a device to be gone.
	// udev looks at every device that appears, and takes its time on a busy machine.
	usersWait = 2 * time.Second
	// claimTimeout bounds the look for users itself.
	claimTimeout = 20 * time.Second
	// parallelChildren bounds the processes that look for users or write to sysfs at once.
	parallelChildren = 4
	// tuneTimeout bounds a write to sysfs, which nothing depends on.
	tuneTimeout = 5 * time.Second
	// parallelOpens bounds the disks that are taken over at once after a start: enough
	// to hide the time each takes, few enough not to flood a store.
	parallelOpens = 8
	// blockBytes is the disks' logical block size. A larger one would refuse file
	// systems with smaller blocks.
	blockBytes = 512

	stateVersion = 1
)

// Probe tells whether this machine can present disks with ublk, loading the module if need
// be: nil, or kind.Unsupported or kind.Denied with what to do.
func Probe() error { return ublk.Probe() }

// state is what the next process must know.
type state struct {
	Disks []stateDisk `json:"disks"`
}

type stateDisk struct {
	present.Disk
	Device int `json:"device"` // the N of /dev/ublkbN
}

// Presenter is a present.Presenter whose disks are ublk devices.
type Presenter struct {
	options Options
	log     *slog.Logger
	lock    *os.File
	owner   uint64 // the mark of our devices

	// ctx ends with Close.
	ctx    context.Context
	cancel context.CancelFunc
	opens  chan struct{} // a semaphore of parallelOpens
	child  chan struct{} // a semaphore of parallelChildren

	locks keylock.Set // by disk id: held while a disk comes or goes

	mu     sync.Mutex
	closed bool             // guarded by mu
	disks  map[string]*disk // guarded by mu
	calls  sync.WaitGroup   // Add is guarded by mu: calls that change disks

	stateMu sync.Mutex // held while the state file is replaced
}

var _ present.Presenter = (*Presenter)(nil)

// reached is told the steps of presenting and withdrawing, for tests that end the process
// there.
var reached = func(step string) {}

// New takes over the disks that a process before us left, and deletes devices of ours
// that were never completed. It is kind.InUse while another process serves them, and
// kind.Unsupported or kind.Denied where ublk cannot be used. Disks are taken over one by
// one after New has returned; their users wait meanwhile.
func New(options Options) (_ *Presenter, err error) {
	if err := options.validate(); err != nil {
		return nil, err
	}
	if err := ublk.Probe(); err != nil {
		return nil, err
	}
	p := &Presenter{
		options: options, log: options.Logger, disks: make(map[string]*disk),
		opens: make(chan struct{}, parallelOpens), child: make(chan struct{}, parallelChildren), owner: owner(options.StatePath),
	}
	p.ctx, p.cancel = context.WithCancel(context.Background())
	if p.lock, err = runstate.Lock(options.StatePath, lockWait); err != nil {
		return nil, fmt.Errorf("ublk: %w", err)
	}
	if err := blockdev.ServeThroughReclaim(); err != nil {
		p.log.Debug("ublk: writable disks may stall when memory is short", "error", err)
	}
	if err := p.adopt(); err != nil {
		return nil, errors.Join(fmt.Errorf("ublk: %w", err), p.Close())
	}
	if options.Registerer != nil {
		if err := options.Registerer.Register(collector{p}); err != nil {
			p.options.Registerer = nil // what is registered is another's
			return nil, errors.Join(fmt.Errorf("ublk: register metrics: %w", err), p.Close())
		}
	}
	return p, nil
}

// owner is the mark of the devices whose state is at statePath: 64 bits that nobody else
// uses by chance. Other servers keep small numbers there, or none.
func owner(statePath string) uint64 {
	sum := sha256.Sum256([]byte("thaw ublk " + statePath))
	return binary.BigEndian.Uint64(sum[:]) | 1<<63
}

// adopt makes the disks of the state ours.
func (p *Presenter) adopt() error {
	var s state
	if _, err := runstate.Load(p.options.StatePath, stateVersion, &s); err != nil {
		return err
	}
	devices, err := ublk.List()
	if err != nil {
		return fmt.Errorf("look for devices: %w", err)
	}
	ours := make(map[int]ublk.Info)
	for _, d := range devices {
		if d.Owner == p.owner {
			ours[d.ID] = d
		}
	}
	changed := false
	for _, sd := range s.Disks {
		if runstate.CheckID(sd.ID) != nil || p.disks[sd.ID] != nil || sd.SizeBytes <= 0 || sd.Device < 0 {
			return kind.Errorf(kind.Corrupt, "%s: disk %.140q contradicts the rest", p.options.StatePath, sd.ID)
		}
		device, there := ours[sd.Device]
		if !there || device.State == ublk.Dead {
			// Present or Withdraw did not return, or somebody deleted it.
			p.log.Warn("ublk: a disk's device is gone", "disk", sd.ID, "device", sd.Path)
			changed = true
			continue
		}
		delete(ours, sd.Device)
		d := newDisk(p, sd)
		p.disks[sd.ID] = d
		d.adopted()
	}
	for id, d := range ours {
		// Not recorded, or never started: nobody was told of it.
		p.log.Info("ublk: delete a device that was not completed", "device", d.Path, "state", d.State)
		if err := ublk.Delete(p.ctx, id); err != nil {
			return err
		}
	}
	if len(p.disks) > 0 {
		p.log.Info("ublk: taking over disks", "disks", len(p.disks))
	}
	if changed {
		return p.save()
	}
	return nil
}

// save stores the disks there are.
func (p *Presenter) save() error {
	p.stateMu.Lock()
	defer p.stateMu.Unlock()
	p.mu.Lock()
	s := state{Disks: make([]stateDisk, 0, len(p.disks))}
	for _, id := range slices.Sorted(maps.Keys(p.disks)) {
		s.Disks = append(s.Disks, p.disks[id].stateDisk)
	}
	p.mu.Unlock()
	return runstate.Save(p.options.StatePath, stateVersion, s)
}

// begin starts a call on disk id; end ends it.
func (p *Presenter) begin(ctx context.Context, id string) (end func(), err error) {
	p.mu.Lock()
	if p.closed {
		p.mu.Unlock()
		return nil, kind.Errorf(kind.Unavailable, "the presenter is closed")
	}
	p.calls.Add(1)
	p.mu.Unlock()
	unlock, err := p.locks.Lock(ctx, id)
	if err == nil {
		if err = ctx.Err(); err != nil {
			unlock()
		}
	}
	if err != nil {
		p.calls.Done()
		return nil, kind.Errorf(kind.Canceled, "%w", err)
	}
	return func() { unlock(); p.calls.Done() }, nil
}

func (p *Presenter) get(id string) *disk {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.disks[id]
}

// put records d under its id, or with nil that there is none, and saves the state; on
// failure nothing has changed.
func (p *Presenter) put(id string, d *disk) error {
	set := func(d *disk) (old *disk) {
		p.mu.Lock()
		defer p.mu.Unlock()
		old = p.disks[id]
		if d == nil {
			delete(p.disks, id)
		} else {
			p.disks[id] = d
		}
		return old
	}
	old := set(d)
	err := p.save()
	if err != nil {
		set(old)
	}
	return err
}

// Present implements present.Presenter.
func (p *Presenter) Present(ctx context.Context, id string, source present.Source, readOnly bool) (present.Disk, error) {
	d, err := p.present(ctx, id, source, readOnly)
	if err != nil {
		return present.Disk{}, fmt.Errorf("present %.140s with ublk: %w", id, err)
	}
	return d, nil
}

func (p *Presenter) present(ctx context.Context, id string, source present.Source, readOnly bool) (present.Disk, error) {
	if err := runstate.CheckID(id); err != nil {
		return present.Disk{}, err
	}
	end, err := p.begin(ctx, id)
	if err != nil {
		return present.Disk{}, err
	}
	defer end()
	if d := p.get(id); d != nil {
		if d.Source != source || d.ReadOnly != readOnly {
			return present.Disk{}, kind.Errorf(kind.Exists, "it is there with source %+v, read-only %t", d.Source, d.ReadOnly)
		}
		if !d.lost() {
			return d.Disk, nil
		}
		// Somebody deleted the device. What used it has failed already.
		p.log.Error("ublk: somebody deleted a device of ours", "disk", id, "device", d.Path)
		if err := d.end(ctx, false); err != nil {
			return present.Disk{}, err
		}
		if err := p.put(id, nil); err != nil {
			return present.Disk{}, err
		}
	}
	device, err := p.options.Open(source, readOnly)
	if err != nil {
		return present.Disk{}, fmt.Errorf("open: %w", err)
	}
	d := newDisk(p, stateDisk{Disk: present.Disk{ID: id, Source: source, Block: true, SizeBytes: device.SizeBytes(), ReadOnly: readOnly}})
	if err := d.create(device); err != nil {
		return present.Disk{}, errors.Join(err, device.Close())
	}
	reached("created")
	// The device is on record before the kernel shows it to anybody.
	if err := p.put(id, d); err != nil {
		return present.Disk{}, errors.Join(err, d.end(ctx, false))
	}
	reached("recorded")
	if err := d.server.Start(ctx); err != nil {
		return present.Disk{}, errors.Join(err, d.end(context.WithoutCancel(ctx), false), p.put(id, nil))
	}
	d.tune(d.server)
	return d.Disk, nil
}

// Withdraw implements present.Presenter. A writable device is flushed before it is
// closed; an error of that is returned although the disk is gone.
func (p *Presenter) Withdraw(ctx context.Context, id string) error {
	end, err := p.begin(ctx, id)
	if err == nil {
		defer end()
		if d := p.get(id); d != nil {
			err = p.withdraw(ctx, d)
		}
	}
	if err != nil {
		return fmt.Errorf("withdraw %.140s with ublk: %w", id, err)
	}
	return nil
}

func (p *Presenter) withdraw(ctx context.Context, d *disk) error {
	if err := d.takenOver(ctx); err != nil {
		return err
	}
	release, err := d.claim(ctx)
	if err != nil {
		return err
	}
	// From here nobody can mount it.
	err = d.halt(ctx)
	if rerr := release(); err == nil {
		err = rerr
	}
	if err != nil {
		return err
	}
	reached("halted")
	if err := p.put(d.ID, nil); err != nil {
		return err
	}
	reached("forgotten")
	return d.end(ctx, !d.ReadOnly)
}

// List implements present.Presenter.
func (p *Presenter) List(context.Context) ([]present.Disk, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	list := make([]present.Disk, 0, len(p.disks))
	for _, id := range slices.Sorted(maps.Keys(p.disks)) {
		list = append(list, p.disks[id].Disk)
	}
	return list, nil
}

// Close stops serving and closes the devices without flushing them. The disks stay:
// their users wait for the next process.
func (p *Presenter) Close() error {
	p.mu.Lock()
	if p.closed {
		p.mu.Unlock()
		return nil
	}
	p.closed = true
	p.mu.Unlock()
	p.cancel()
	p.calls.Wait()
	if p.options.Registerer != nil {
		p.options.Registerer.Unregister(collector{p})
	}
	var mu sync.Mutex
	var errs []error
	var all sync.WaitGroup
	for _, d := range p.disks { // nobody else changes it any more
		all.Go(func() {
			err := d.leave()
			mu.Lock()
			defer mu.Unlock()
			errs = append(errs, err)
		})
	}
	all.Wait()
	return errors.Join(append(errs, p.lock.Close())...)
}

// Teardown withdraws everything and forgets the state. A disk that something uses is
// kind.InUse, and then nothing has changed. The presenter is closed afterwards.
func (p *Presenter) Teardown(ctx context.Context) error {
	list, _ := p.List(ctx)
	for _, d := range list {
		// Looked at before any is withdrawn: all or none.
		c, err := blockdev.Take(ctx, d.Path, blockdev.ClaimOptions{Wait: usersWait})
		if err == nil {
			err = c.Release()
		}
		if err != nil && !errors.Is(err, kind.NotFound) {
			return fmt.Errorf("tear down ublk: %s: %w", d.ID, err)
		}
	}
	for _, d := range list {
		if err := p.Withdraw(ctx, d.ID); err != nil {
			return fmt.Errorf("tear down ublk: %w", err)
		}
	}
	err := p.Close()
	if rerr := os.Remove(p.options.StatePath); rerr != nil && !errors.Is(rerr, os.ErrNotExist) {
		err = errors.Join(err, rerr)
	}
	return err
}
