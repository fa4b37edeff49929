// Package fabrics presents read-only lvols that other machines store through the kernel's
// own NVMe initiator, nvme-tcp or nvme-rdma: /dev/nvmeXnY.
//
// There is one subsystem per target and node, with one controller for each of its portals
// (the kernel's native multipath joins them), and one nvmeNamespace for each block, which
// comes and goes on the live connection. A disk is found by its nvmeNamespace's UUID from
// the kernel's events and in sysfs, never by its number.
//
// The kernel moves the data, so the death of this process changes nothing for the users of
// a disk. The process that comes next finds controllers by the NQNs of subsystem and host,
// and never connects twice nor takes away what somebody else connected.
//
// How a block is exported is somebody else's: see Options.Attach. The package must not know
// what a disk holds, and opens none of them itself: see package blockdev.
package fabrics

import (
	"cmp"
	"context"
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
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/thaw-project/thaw/keylock"
	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/node/present"
	"github.com/thaw-project/thaw/node/present/nvmesys"
	"github.com/thaw-project/thaw/node/present/runstate"
)

// Options configures New.
type Options struct {
	// StatePath is the state file: an absolute path, best on a tmpfs. Files of the same
	// name with ".lock" and ".tmp" appended belong to it.
	StatePath string
	// Attach makes a target show block to this node and says how to reach it. It is
	// idempotent. Its error's kind is Present's.
	Attach func(ctx context.Context, target, block string) (Export, error)
	// Detach ends that: when it returns, the target no longer shows the block to this
	// node, and says so to connected hosts. A block that is not attached is no error.
	Detach func(ctx context.Context, target, block string) error
	// Timeouts are the kernel's; see there.
	Timeouts Timeouts
	// IOQueues of each controller, 1 to 128; 0 means one per CPU, at most 8.
	IOQueues int
	// HeaderDigest and DataDigest ask for CRCs on NVMe/TCP connections.
	HeaderDigest, DataDigest bool
	// Logger gets what an operator should know; nil discards it.
	Logger *slog.Logger
	// Registerer, if not nil, gets the metrics (thaw_fabrics_*).
	Registerer prometheus.Registerer

	driver driver // tests replace the kernel
}

func (o *Options) validate() error {
	if !filepath.IsAbs(o.StatePath) {
		return kind.Errorf(kind.Invalid, "fabrics: StatePath %q must be absolute", o.StatePath)
	}
	if o.Attach == nil || o.Detach == nil {
		return kind.Errorf(kind.Invalid, "fabrics: Attach or Detach is missing")
	}
	if err := o.Timeouts.ensureDefaults(); err != nil {
		return err
	}
	o.IOQueues = cmp.Or(o.IOQueues, min(8, runtime.NumCPU()))
	if o.IOQueues < 1 || o.IOQueues > 128 {
		return kind.Errorf(kind.Invalid, "fabrics: IOQueues is %d, must be 1 to 128", o.IOQueues)
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.driver == nil {
		o.driver = linux{}
	}
	return nil
}

// Bounds in time. The kernel does most of its work at once; these are for targets and
// networks that fail.
const (
	// lockWait is how long New waits for a predecessor to be gone.
	lockWait = 10 * time.Second
	// connectWait bounds making one controller.
	connectWait = 15 * time.Second
	// deleteWait bounds taking one away: the kernel waits for the target's answers.
	deleteWait = 30 * time.Second
	// showWait is how long a disk may take to appear, and to vanish.
	showWait = 20 * time.Second
	// undoWait bounds giving back what a failed Present took.
	undoWait = 10 * time.Second
	// usersWait is how long Withdraw waits for the last users of a disk to be gone.
	usersWait = 2 * time.Second
	// claimTimeout bounds the look for users itself.
	claimTimeout = 20 * time.Second
	// lookEvery is how often to look while waiting for an event, in case it was lost:
	// a container may be shut off from them.
	lookEvery = time.Second
	// tendEvery is how often to look whether all controllers are there. The kernel tells
	// when one goes, so this is for what it did not tell.
	tendEvery = time.Minute
	// minRetry and maxRetry bound the pause before a lost portal is tried again.
	minRetry = 2 * time.Second
	maxRetry = time.Minute

	stateVersion = 1
)

// state is what the next process must know.
type state struct {
	Records []record `json:"records"`
	// Links are the controllers that we asked the kernel for, recorded before: only
	// these are ours to delete.
	Links []link `json:"links"`
}

// record is one disk, from before its block is attached until after it is detached.
type record struct {
	ID     string         `json:"id"`
	Source present.Source `json:"source"`
	// Export is zero until Attach has returned.
	Export Export `json:"export,omitzero"`
}

func (r *record) attached() bool { return r.Export.UUID != "" }

// link names a controller.
type link struct {
	Subsystem string `json:"subsystem"`
	HostNQN   string `json:"host_nqn"`
	Portal
}

// Presenter is a present.Presenter whose disks are the kernel's.
type Presenter struct {
	options  Options
	settings settings
	log      *slog.Logger
	lock     *os.File

	// ctx ends with Close; work waits for what runs until then.
	ctx    context.Context
	cancel context.CancelFunc
	work   sync.WaitGroup
	news   nvmesys.News
	kick   chan struct{} // capacity 1: controllers are to be looked after

	// These are taken in this order.
	disks   keylock.Set // by id: held while a disk comes or goes
	blocks  keylock.Set // by target and block: held while one is attached or detached
	targets keylock.Set // by subsystem: held while controllers come or go

	mu      sync.Mutex
	closed  bool              // guarded by mu
	records map[string]record // guarded by mu
	links   map[link]bool     // guarded by mu
	leaving map[string]bool   // guarded by mu: disks that hide is at, which need no controller
	calls   sync.WaitGroup    // Add is guarded by mu: calls that change disks

	stateMu sync.Mutex // held while the state file is replaced
}

var _ present.Presenter = (*Presenter)(nil)

// New takes over what a process before us left. It is kind.InUse while another process
// has it. It does not ask whether the kernel has NVMe: Present does, and Probe.
func New(ctx context.Context, options Options) (*Presenter, error) {
	return newPresenter(ctx, options, lockWait)
}

func newPresenter(ctx context.Context, options Options, lockWait time.Duration) (_ *Presenter, err error) {
	if err := options.validate(); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = fmt.Errorf("fabrics: %w", err)
		}
	}()
	p := &Presenter{
		options: options, log: options.Logger, kick: make(chan struct{}, 1),
		settings: settings{options.Timeouts, options.IOQueues, options.HeaderDigest, options.DataDigest},
		records:  make(map[string]record), links: make(map[link]bool), leaving: make(map[string]bool),
	}
	if p.lock, err = runstate.Lock(options.StatePath, lockWait); err != nil {
		return nil, err
	}
	if err := p.load(); err != nil {
		p.lock.Close()
		return nil, err
	}
	p.ctx, p.cancel = context.WithCancel(context.Background())
	if options.Registerer != nil {
		if err := options.Registerer.Register(collector{p}); err != nil {
			p.options.Registerer = nil // what is registered is another's
			return nil, errors.Join(fmt.Errorf("register metrics: %w", err), p.Close())
		}
	}
	ready := make(chan struct{})
	p.work.Go(func() { p.watch(sync.OnceFunc(func() { close(ready) })) })
	p.work.Go(p.tend)
	select {
	case <-ready:
	case <-ctx.Done():
		return nil, errors.Join(kind.Errorf(kind.Canceled, "%w", ctx.Err()), p.Close())
	}
	p.wake()
	if n := len(p.records); n > 0 {
		p.log.Info("fabrics: disks taken over", "disks", n)
	}
	return p, nil
}

func (p *Presenter) load() error {
	var s state
	if _, err := runstate.Load(p.options.StatePath, stateVersion, &s); err != nil {
		return err
	}
	for _, r := range s.Records {
		err := runstate.CheckID(r.ID)
		if err == nil && r.attached() {
			err = r.Export.validate()
		}
		if _, twice := p.records[r.ID]; twice || err != nil {
			return kind.Errorf(kind.Corrupt, "%s: disk %.140q contradicts the rest: %v", p.options.StatePath, r.ID, err)
		}
		p.records[r.ID] = r
	}
	for _, l := range s.Links {
		p.links[l] = true
	}
	return nil
}

// watch listens to the kernel until Close. ready is called once it does, or cannot.
func (p *Presenter) watch(ready func()) {
	for {
		err := p.options.driver.Watch(p.ctx, func() { ready(); p.news.Tell() }, func() { p.news.Tell(); p.wake() })
		ready()
		if p.ctx.Err() != nil {
			return
		}
		p.log.Warn("fabrics: no kernel events, disks are found more slowly", "error", err)
		select {
		case <-time.After(maxRetry):
		case <-p.ctx.Done():
			return
		}
	}
}

// update changes what is on record and saves it; on failure nothing has changed.
func (p *Presenter) update(change func(records map[string]record, links map[link]bool)) error {
	p.stateMu.Lock()
	defer p.stateMu.Unlock()
	p.mu.Lock()
	records, links := maps.Clone(p.records), maps.Clone(p.links)
	p.mu.Unlock()
	change(records, links)
	s := state{Records: make([]record, 0, len(records)), Links: make([]link, 0, len(links))}
	for _, id := range slices.Sorted(maps.Keys(records)) {
		s.Records = append(s.Records, records[id])
	}
	for l := range links {
		s.Links = append(s.Links, l)
	}
	if err := runstate.Save(p.options.StatePath, stateVersion, s); err != nil {
		return err
	}
	p.mu.Lock()
	p.records, p.links = records, links
	p.mu.Unlock()
	return nil
}

func (p *Presenter) record(id string) (record, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	r, ok := p.records[id]
	return r, ok
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
	unlock, err := p.disks.Lock(ctx, id)
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

// Supports tells why source cannot be presented here, or nil.
func Supports(source present.Source, readOnly bool) error {
	if source.Kind != present.SourceLvol || source.Target == "" || !readOnly {
		return kind.Errorf(kind.Unsupported, "nvme-fabrics shows read-only lvols of other machines, and nothing else")
	}
	return nil
}

// Present implements present.Presenter for sources that Supports; others are
// kind.Unsupported. It is kind.Unavailable when the target cannot be reached.
func (p *Presenter) Present(ctx context.Context, id string, source present.Source, readOnly bool) (present.Disk, error) {
	d, err := p.present(ctx, id, source, readOnly)
	if err != nil {
		return present.Disk{}, fmt.Errorf("present %.140s with nvme-fabrics: %w", id, err)
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
	r, known := p.record(id)
	if known && (r.Source != source || !readOnly) {
		return present.Disk{}, kind.Errorf(kind.Exists, "it is there with source %+v, read-only", r.Source)
	}
	if err := Supports(source, readOnly); err != nil {
		return present.Disk{}, err
	}
	if known && r.attached() {
		if d, ok, err := p.find(&r.Export); err != nil {
			return present.Disk{}, err
		} else if ok && d.ReadOnly && d.SizeBytes == r.Export.SizeBytes {
			return r.disk(d), nil
		}
	}
	unlock, err := p.blocks.Lock(ctx, blockKey(source))
	if err != nil {
		return present.Disk{}, kind.Errorf(kind.Canceled, "%w", err)
	}
	defer unlock()
	r.ID, r.Source = id, source
	d, err := p.show(ctx, &r)
	if err != nil {
		if !known {
			err = p.undo(ctx, r, err)
		}
		return present.Disk{}, err
	}
	return r.disk(d), nil
}

// blockKey names a block of a target; neither name has a zero byte.
func blockKey(source present.Source) string { return source.Target + "\x00" + source.Lvol }

// undo gives back what a failed Present took. What cannot be given back stays on record,
// where List shows it.
func (p *Presenter) undo(ctx context.Context, r record, err error) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoWait)
	defer cancel()
	if uerr := p.hide(ctx, r); uerr != nil {
		p.log.Warn("fabrics: what a failed presentation took could not be given back yet", "disk", r.ID, "error", uerr)
	}
	return err
}

// show attaches the block of r, which is on record from before, and returns its drive.
func (p *Presenter) show(ctx context.Context, r *record) (drive, error) {
	if err := p.update(func(records map[string]record, _ map[link]bool) { records[r.ID] = *r }); err != nil {
		return drive{}, err
	}
	export, err := p.options.Attach(ctx, r.Source.Target, r.Source.Lvol)
	if err != nil {
		return drive{}, fmt.Errorf("attach %s of target %s: %w", r.Source.Lvol, r.Source.Target, err)
	}
	if err := export.validate(); err != nil {
		return drive{}, fmt.Errorf("target %s: %w", r.Source.Target, err)
	}
	export.UUID = strings.ToLower(export.UUID)
	unlock, err := p.targets.Lock(ctx, export.Subsystem)
	if err != nil {
		return drive{}, kind.Errorf(kind.Canceled, "%w", err)
	}
	r.Export = export
	err = p.update(func(records map[string]record, _ map[link]bool) { records[r.ID] = *r })
	if err == nil {
		err = p.connect(ctx, &export, false)
	}
	unlock()
	if err != nil {
		return drive{}, err
	}
	d, err := p.await(ctx, &export)
	if err != nil {
		return drive{}, err
	}
	if d.SizeBytes != export.SizeBytes {
		return drive{}, kind.Errorf(kind.Corrupt, "%s has %d bytes, and the target said %d", d.path(), d.SizeBytes, export.SizeBytes)
	}
	if !d.ReadOnly {
		// Not every target says so.
		ctx, cancel := context.WithTimeout(ctx, claimTimeout)
		defer cancel()
		release, err := p.options.driver.Claim(ctx, d.path(), usersWait, true)
		if err == nil {
			err = release()
		}
		if errors.Is(err, kind.NotFound) { // the drive, not the block
			err = kind.Errorf(kind.Unavailable, "it vanished again: %w", err)
		}
		if err != nil {
			return drive{}, fmt.Errorf("make it read-only: %w", err)
		}
	}
	return d, nil
}

func (r *record) disk(d drive) present.Disk {
	disk := present.Disk{ID: r.ID, Source: r.Source, Block: true, SizeBytes: r.Export.SizeBytes, ReadOnly: true}
	if d.Name != "" {
		disk.Path = d.path()
	}
	return disk
}

// find looks for the drive of an export.
func (p *Presenter) find(e *Export) (drive, bool, error) {
	list, err := drives(p.options.driver.Sys(), e.Subsystem)
	if err != nil {
		return drive{}, false, fmt.Errorf("look for nvmeNamespace %s: %w", e.UUID, err)
	}
	for _, d := range list {
		// One that is still made has no size.
		if d.UUID == e.UUID && d.SizeBytes > 0 {
			return d, true, nil
		}
	}
	return drive{}, false, nil
}

// await waits until the drive of an export is there.
func (p *Presenter) await(ctx context.Context, e *Export) (d drive, err error) {
	asked := false
	err = p.until(ctx, func() (done bool, err error) {
		d, done, err = p.find(e)
		if err == nil && !done && !asked {
			// The target told of it already, or its message is on the way; to ask as
			// well costs one command, and helps where it was lost.
			asked = p.rescan(ctx, e)
		}
		return done, err
	})
	if errors.Is(err, errNotYet) {
		err = kind.Errorf(kind.Unavailable, "nvmeNamespace %s of %s did not appear in %v", e.UUID, e.Subsystem, showWait)
	}
	return d, err
}

var errNotYet = errors.New("not yet")

// until looks now and after each event until done says so, for showWait at most: then it
// returns errNotYet.
func (p *Presenter) until(ctx context.Context, done func() (bool, error)) error {
	limit := time.NewTimer(showWait)
	defer limit.Stop()
	again := time.NewTicker(lookEvery)
	defer again.Stop()
	for {
		event := p.news.Next()
		ok, err := done()
		if ok || err != nil {
			return err
		}
		select {
		case <-event:
		case <-again.C:
		case <-limit.C:
			return errNotYet
		case <-ctx.Done():
			return kind.Errorf(kind.Canceled, "%w", context.Cause(ctx))
		}
	}
}

// Withdraw implements present.Presenter. When another id shows the same block, that is the
// same disk, and only the id goes. A disk in use is kind.InUse before anything is
// changed. It is kind.Unavailable when the target cannot be told: the disk stays, and a
// later call goes on.
func (p *Presenter) Withdraw(ctx context.Context, id string) error {
	end, err := p.begin(ctx, id)
	if err == nil {
		defer end()
		if r, ok := p.record(id); ok {
			err = p.withdraw(ctx, r)
		}
	}
	if err != nil {
		return fmt.Errorf("withdraw %.140s with nvme-fabrics: %w", id, err)
	}
	return nil
}

func (p *Presenter) withdraw(ctx context.Context, r record) error {
	unlock, err := p.blocks.Lock(ctx, blockKey(r.Source))
	if err != nil {
		return kind.Errorf(kind.Canceled, "%w", err)
	}
	defer unlock()
	if r.attached() && !p.shared(&r) {
		d, ok, err := p.find(&r.Export)
		if err != nil {
			return err
		}
		if ok {
			release, err := p.claim(ctx, d.path())
			if err != nil {
				return err
			}
			// Held until the drive is gone: nobody mounts it meanwhile.
			defer release()
		}
	}
	return p.hide(ctx, r)
}

// shared tells whether another id shows the same block: then there is one disk for both,
// which goes with the last. The caller holds the block.
func (p *Presenter) shared(r *record) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, other := range p.records {
		if other.ID != r.ID && other.Source == r.Source {
			return true
		}
	}
	return false
}

// claim makes sure that nobody uses a drive and that nobody begins to.
func (p *Presenter) claim(ctx context.Context, path string) (release func() error, err error) {
	ctx, cancel := context.WithTimeout(ctx, claimTimeout)
	defer cancel()
	release, err = p.options.driver.Claim(ctx, path, usersWait, false)
	if errors.Is(err, kind.NotFound) { // it went by itself
		return func() error { return nil }, nil
	}
	return release, err
}

// hide detaches the block of r, waits until its drive is gone, and takes it off the record.
// The caller holds the block.
func (p *Presenter) hide(ctx context.Context, r record) error {
	forget := func(records map[string]record, _ map[link]bool) { delete(records, r.ID) }
	if p.shared(&r) {
		return p.update(forget)
	}
	p.setLeaving(r.ID, true)
	defer func() {
		p.setLeaving(r.ID, false)
		p.wake() // if it stays after all, it needs its controllers
	}()
	// The lock keeps others from relying on controllers that are about to go.
	unlock, err := p.targets.Lock(ctx, r.Export.Subsystem)
	if err != nil {
		return kind.Errorf(kind.Canceled, "%w", err)
	}
	err = p.options.Detach(ctx, r.Source.Target, r.Source.Lvol)
	if err != nil && !errors.Is(err, kind.NotFound) {
		unlock()
		return fmt.Errorf("detach %s of target %s: %w", r.Source.Lvol, r.Source.Target, err)
	}
	if r.attached() {
		err = p.disconnectLast(ctx, r)
		p.rescan(ctx, &r.Export)
	}
	unlock()
	if err == nil && r.attached() {
		err = p.until(ctx, func() (bool, error) {
			_, there, err := p.find(&r.Export)
			return !there, err
		})
		if errors.Is(err, errNotYet) {
			err = kind.Errorf(kind.Unavailable, "nvmeNamespace %s of %s did not vanish in %v: its target may be unreachable", r.Export.UUID, r.Export.Subsystem, showWait)
		}
	}
	if err != nil {
		return err
	}
	return p.update(forget)
}

func (p *Presenter) setLeaving(id string, leaving bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if leaving {
		p.leaving[id] = true
	} else {
		delete(p.leaving, id)
	}
}

// List implements present.Presenter. A disk that cannot be seen, because it was not
// completed or its target is lost, has no Path.
func (p *Presenter) List(context.Context) ([]present.Disk, error) {
	p.mu.Lock()
	records := p.records // never changed once it is there
	p.mu.Unlock()
	seen := make(map[string]map[string]drive) // by subsystem and UUID
	list := make([]present.Disk, 0, len(records))
	for _, id := range slices.Sorted(maps.Keys(records)) {
		r := records[id]
		if r.attached() && seen[r.Export.Subsystem] == nil {
			all, err := drives(p.options.driver.Sys(), r.Export.Subsystem)
			if err != nil {
				return nil, fmt.Errorf("list nvme-fabrics disks: %w", err)
			}
			seen[r.Export.Subsystem] = make(map[string]drive)
			for _, d := range all {
				if _, twice := seen[r.Export.Subsystem][d.UUID]; !twice && d.SizeBytes > 0 {
					seen[r.Export.Subsystem][d.UUID] = d
				}
			}
		}
		list = append(list, r.disk(seen[r.Export.Subsystem][r.Export.UUID]))
	}
	return list, nil
}

// Close stops looking after controllers. The disks stay and work.
func (p *Presenter) Close() error {
	p.mu.Lock()
	if p.closed {
		p.mu.Unlock()
		return nil
	}
	p.closed = true
	p.mu.Unlock()
	p.calls.Wait()
	p.cancel()
	p.work.Wait()
	if p.options.Registerer != nil {
		p.options.Registerer.Unregister(collector{p})
	}
	return p.lock.Close()
}

// Teardown withdraws everything and forgets the state. A disk that something uses is
// kind.InUse, and then nothing has changed. The presenter is closed afterwards.
func (p *Presenter) Teardown(ctx context.Context) error {
	list, err := p.List(ctx)
	if err != nil {
		return err
	}
	for _, d := range list {
		// Looked at before any is withdrawn: all or none.
		if d.Path == "" {
			continue
		}
		release, err := p.claim(ctx, d.Path)
		if err == nil {
			err = release()
		}
		if err != nil {
			return fmt.Errorf("tear down nvme-fabrics: %s: %w", d.ID, err)
		}
	}
	for _, d := range list {
		if err := p.Withdraw(ctx, d.ID); err != nil {
			return fmt.Errorf("tear down nvme-fabrics: %w", err)
		}
	}
	err = p.Close()
	if rerr := os.Remove(p.options.StatePath); rerr != nil && !errors.Is(rerr, os.ErrNotExist) {
		err = errors.Join(err, rerr)
	}
	return err
}
