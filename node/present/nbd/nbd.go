// Package nbd presents disks as /dev/nbdN: the kernel's NBD client, connected by netlink to
// our own NBD server in this process.
//
// A disk outlives the process that serves it. When the process is killed, the kernel
// finds its connections dead and keeps requests waiting; the next process finds the device
// by its backend identifier, gives it new connections (NBD_CMD_RECONFIGURE), and the kernel
// sends again what had no answer. Users of the disk see a pause: what was under way when the
// process died is sent again once its time is over (Options.RequestTimeout), the rest at once.
//
// A connection is replaced only when nothing of the old one is left in this process, so
// that a write which was sent twice can never take effect after a later write. For the
// same reason a writable disk has one connection, and a read-only one several.
//
// The package must not know what a disk holds, and this process must never open its own
// devices: see package blockdev.
package nbd

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/thaw-project/thaw/keylock"
	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/nbd/kernel"
	"github.com/thaw-project/thaw/node/present"
	"github.com/thaw-project/thaw/node/present/blockdev"
	"github.com/thaw-project/thaw/node/present/runstate"
	"github.com/thaw-project/thaw/target/bdev"
	server "github.com/thaw-project/thaw/target/nbd"
)

// Options configures New.
type Options struct {
	// StatePath is the state file: an absolute path, best on a tmpfs. Files of the same
	// name with ".lock" and ".tmp" appended belong to it. Devices are known by it: it must
	// be the same for the process that takes over.
	StatePath string
	// Open opens what is behind a disk.
	Open present.Opener
	// Interrupt, if set, makes devices that wait for another machine fail at once. Close
	// calls it when their answers can no longer reach the kernel, which keeps the requests for
	// the next process.
	Interrupt func()
	// Connections of a read-only disk, 1 to 16; 0 means one per CPU, at most 4.
	Connections int
	// RequestTimeout is for how long a request may be without an answer before the
	// kernel takes its connection for dead: whole seconds, from 1 s to 1 h; 0 means
	// 5 s. Storage that is slower than that costs requests sent twice, no errors. It is
	// also the longest pause after this process was killed and started again.
	RequestTimeout time.Duration
	// DeadTimeout is for how long users of a disk wait when nobody serves it, before
	// they get errors: 1 s to 24 h; 0 means 10 minutes.
	DeadTimeout time.Duration
	// Logger gets what an operator should know; nil discards it.
	Logger *slog.Logger
	// Registerer, if not nil, gets the metrics (thaw_nbd_*).
	Registerer prometheus.Registerer

	driver driver // tests replace the kernel
}

func (o *Options) validate() error {
	if !filepath.IsAbs(o.StatePath) {
		return kind.Errorf(kind.Invalid, "nbd: StatePath %q must be absolute", o.StatePath)
	}
	if o.Open == nil {
		return kind.Errorf(kind.Invalid, "nbd: Open is missing")
	}
	o.Connections = cmp.Or(o.Connections, min(4, runtime.NumCPU()))
	if o.Connections < 1 || o.Connections > maxConnections {
		return kind.Errorf(kind.Invalid, "nbd: Connections is %d, must be 1 to %d", o.Connections, maxConnections)
	}
	o.RequestTimeout = cmp.Or(o.RequestTimeout, 5*time.Second)
	if o.RequestTimeout < time.Second || o.RequestTimeout > time.Hour {
		return kind.Errorf(kind.Invalid, "nbd: RequestTimeout is %v, must be 1 s to 1 h", o.RequestTimeout)
	}
	o.DeadTimeout = cmp.Or(o.DeadTimeout, 10*time.Minute)
	if o.DeadTimeout < time.Second || o.DeadTimeout > 24*time.Hour {
		return kind.Errorf(kind.Invalid, "nbd: DeadTimeout is %v, must be 1 s to 24 h", o.DeadTimeout)
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.driver == nil {
		o.driver = linux{}
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
	// closeGrace is how long Close lets requests at work finish. Those that do not are
	// sent again to the next process.
	closeGrace = 2 * time.Second
	// drainWait bounds how long Withdraw and Close wait for requests at work.
	drainWait = 30 * time.Second
	// parallelOpens bounds the devices that are opened at once after a start: enough
	// to hide the time each takes, few enough not to flood a store.
	parallelOpens = 8
	// maxServerConnections is no limit of its own: each disk has at most 16.
	maxServerConnections = 1 << 16
	// logicalBlockBytes is the devices' block size. A larger one would refuse file
	// systems with smaller blocks.
	logicalBlockBytes = 512

	// maxConnections bounds the connections of one disk.
	maxConnections = 16

	stateVersion = 1
)

// state is what the next process must know.
type state struct {
	Disks []stateDisk `json:"disks"`
}

type stateDisk struct {
	present.Disk
	Index uint32 `json:"index"`
	// Connections is how many the device has: the kernel takes no more later.
	Connections int `json:"connections"`
}

// Presenter is a present.Presenter whose disks are nbd devices.
type Presenter struct {
	options Options
	log     *slog.Logger
	lock    *os.File
	server  *server.Server
	prefix  string // of the backend identifiers of our devices

	// ctx ends with Close.
	ctx    context.Context
	cancel context.CancelFunc
	opens  chan struct{} // a semaphore of parallelOpens

	locks keylock.Set // by disk id: held while a disk comes or goes

	mu     sync.Mutex
	closed bool             // guarded by mu
	disks  map[string]*disk // guarded by mu
	calls  sync.WaitGroup   // Add is guarded by mu: calls that change disks

	stateMu sync.Mutex // held while the state file is replaced

	reconnects atomic.Int64
}

var _ present.Presenter = (*Presenter)(nil)

// Probe tells whether this machine can present disks with nbd, loading the module if need
// be: nil, or kind.Unsupported or kind.Denied with what to do.
func Probe(ctx context.Context) error { return kernel.Load(ctx) }

// New takes over the disks that a process before us left, and removes devices of ours
// that were never completed. It is kind.InUse while another process serves them, and
// kind.Unsupported or kind.Denied where nbd cannot be used.
func New(ctx context.Context, options Options) (*Presenter, error) {
	return newPresenter(ctx, options, lockWait)
}

func newPresenter(ctx context.Context, options Options, lockWait time.Duration) (_ *Presenter, err error) {
	if err := options.validate(); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = fmt.Errorf("nbd: %w", err)
		}
	}()
	if err := options.driver.Load(ctx); err != nil {
		return nil, err
	}
	sum := sha256.Sum256([]byte(options.StatePath))
	p := &Presenter{
		options: options, log: options.Logger, disks: make(map[string]*disk), opens: make(chan struct{}, parallelOpens),
		prefix: "thaw-" + hex.EncodeToString(sum[:8]) + "/",
		server: server.New(server.Config{Log: options.Logger, MaxConnections: maxServerConnections}),
	}
	p.ctx, p.cancel = context.WithCancel(context.Background())
	if p.lock, err = runstate.Lock(options.StatePath, lockWait); err != nil {
		return nil, err
	}
	if err := blockdev.ServeThroughReclaim(); err != nil {
		p.log.Debug("nbd: writable disks may stall when memory is short", "error", err)
	}
	if err := p.adopt(); err != nil {
		return nil, errors.Join(err, p.Close())
	}
	if options.Registerer != nil {
		if err := options.Registerer.Register(collector{p}); err != nil {
			p.options.Registerer = nil // what is registered is another's
			return nil, errors.Join(fmt.Errorf("register metrics: %w", err), p.Close())
		}
	}
	return p, nil
}

// backend is the identifier of a disk's device.
func (p *Presenter) backend(id string) string { return p.prefix + id }

// adopt makes the disks of the state ours.
func (p *Presenter) adopt() error {
	var s state
	if _, err := runstate.Load(p.options.StatePath, stateVersion, &s); err != nil {
		return err
	}
	devices, err := p.options.driver.Devices()
	if err != nil {
		return fmt.Errorf("look for devices: %w", err)
	}
	ours := make(map[uint32]kernel.Device)
	for _, d := range devices {
		if d.Connected && strings.HasPrefix(d.Backend, p.prefix) {
			ours[d.Index] = d
		}
	}
	changed := false
	for _, sd := range s.Disks {
		if runstate.CheckID(sd.ID) != nil || p.disks[sd.ID] != nil || sd.SizeBytes <= 0 || sd.Connections < 1 || sd.Connections > maxConnections {
			return kind.Errorf(kind.Corrupt, "%s: disk %.140q contradicts the rest", p.options.StatePath, sd.ID)
		}
		if ours[sd.Index].Backend != p.backend(sd.ID) {
			p.log.Warn("nbd: a disk's device is gone", "disk", sd.ID, "device", sd.Path)
			changed = true
			continue
		}
		delete(ours, sd.Index)
		d := newDisk(p, sd)
		p.disks[sd.ID] = d
		d.adopted()
	}
	for index, d := range ours {
		// Its Present never returned, so nobody uses it.
		p.log.Info("nbd: remove a device that was never completed", "device", kernel.Path(index), "backend", d.Backend)
		if err := p.options.driver.Disconnect(index); err != nil {
			return err
		}
	}
	if len(p.disks) > 0 {
		p.log.Info("nbd: disks taken over", "disks", len(p.disks))
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
		return present.Disk{}, fmt.Errorf("present %.140s with nbd: %w", id, err)
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
		if !d.lost.Load() {
			return d.Disk, nil
		}
		// Somebody disconnected the device. What used it has failed already.
		if err := d.dismiss(ctx, false); err != nil {
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
	d := newDisk(p, stateDisk{
		Disk:        present.Disk{ID: id, Source: source, Block: true, SizeBytes: device.SizeBytes(), ReadOnly: readOnly},
		Connections: 1, // a writable disk has no more: see the package's comment
	})
	if readOnly {
		d.Connections = p.options.Connections
	}
	if err := d.connect(device); err != nil {
		return present.Disk{}, err
	}
	if err := p.put(id, d); err != nil {
		return present.Disk{}, errors.Join(err, d.remove(ctx, false))
	}
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
		return fmt.Errorf("withdraw %.140s with nbd: %w", id, err)
	}
	return nil
}

func (p *Presenter) withdraw(ctx context.Context, d *disk) error {
	release, err := d.claim(ctx)
	if err != nil {
		return err
	}
	// From here nobody can mount it. Closing the claim is what makes the kernel free
	// the device's number, so that comes before the state forgets it.
	err = d.disconnect()
	if rerr := release(); err == nil {
		err = rerr
	}
	if err != nil {
		return err
	}
	if err := p.put(d.ID, nil); err != nil {
		return err
	}
	return d.dismiss(ctx, !d.ReadOnly)
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
// their users wait for the next process, for DeadTimeout at most.
func (p *Presenter) Close() error {
	p.mu.Lock()
	if p.closed {
		p.mu.Unlock()
		return nil
	}
	p.closed = true
	p.mu.Unlock()
	p.cancel()
	grace, cancel := context.WithTimeout(context.Background(), closeGrace)
	err := p.server.Shutdown(grace)
	cancel()
	// What is still at work has lost its connection.
	if p.options.Interrupt != nil {
		p.options.Interrupt()
	}
	p.calls.Wait()
	if p.options.Registerer != nil {
		p.options.Registerer.Unregister(collector{p})
	}
	disks := slices.Collect(maps.Values(p.disks)) // nobody else changes it any more
	for _, d := range disks {
		d.stopLinks()
	}
	if err != nil {
		ctx, cancel := context.WithTimeout(context.Background(), drainWait)
		err = p.server.Shutdown(ctx)
		cancel()
	}
	errs := []error{err}
	for _, d := range disks {
		errs = append(errs, d.closeDevice(false))
	}
	errs = append(errs, p.lock.Close())
	return errors.Join(errs...)
}

// Teardown withdraws everything and forgets the state. A disk that something uses is
// kind.InUse, and then nothing has changed. The presenter is closed afterwards.
func (p *Presenter) Teardown(ctx context.Context) error {
	list, _ := p.List(ctx)
	for _, d := range list {
		// Looked at before any is withdrawn: all or none.
		release, err := p.options.driver.Claim(ctx, d.Path, usersWait)
		if err == nil {
			err = release()
		}
		if err != nil && !errors.Is(err, kind.NotFound) {
			return fmt.Errorf("tear down nbd: %s: %w", d.ID, err)
		}
	}
	for _, d := range list {
		if err := p.Withdraw(ctx, d.ID); err != nil {
			return fmt.Errorf("tear down nbd: %w", err)
		}
	}
	err := p.Close()
	if rerr := os.Remove(p.options.StatePath); rerr != nil && !errors.Is(rerr, os.ErrNotExist) {
		err = errors.Join(err, rerr)
	}
	return err
}

// open opens the device of an adopted disk, not too many at once.
func (p *Presenter) open(ctx context.Context, d *disk) (bdev.Device, error) {
	select {
	case p.opens <- struct{}{}:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	defer func() { <-p.opens }()
	device, err := p.options.Open(d.Source, d.ReadOnly)
	if err == nil && device.SizeBytes() != d.SizeBytes {
		err = errors.Join(kind.Errorf(kind.Corrupt, "it has %d bytes, and had %d", device.SizeBytes(), d.SizeBytes), device.Close())
	}
	if err != nil {
		return nil, err
	}
	return device, nil
}
