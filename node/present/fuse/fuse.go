// Package fuse presents disks as files of one FUSE mount, for kernels that have
// none of the block device presentations, and for all others because EROFS mounts
// such a file with no block device at all.
//
// The mount outlives the process that serves it. The open /dev/fuse is also in the
// keeper; which file is which disk, and what INIT agreed, is in a state file; which
// files the kernel has open is in a table beside it. A process that starts after
// another was killed takes these, asks the kernel to send again what was in flight
// (FUSE_NOTIFY_RESEND, Linux 6.9) and goes on. See docs/presentation.md.
//
// The package speaks the FUSE protocol itself, because a library that insists on
// its own INIT cannot take over a connection. It must not know what a disk holds.
package fuse

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sys/unix"

	"github.com/thaw-project/thaw/keeper"
	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/node/present"
)

const pageBytes = 4096

// Options configures New.
type Options struct {
	// Dir is where the disks appear: an absolute path, made if need be.
	Dir string
	// StatePath is the state file, best on a tmpfs. Files of the same name with
	// ".lock", ".opens" and ".tmp" appended belong to it.
	StatePath string
	// Keeper holds the connection while nobody serves it. Without one the mount
	// does not outlive the process.
	Keeper *keeper.Client
	// Open opens what is behind a disk.
	Open present.Opener
	// Interrupt, if set, makes devices that wait for another machine fail at once. Close
	// calls it when it no longer answers requests with errors: those that a keeper
	// holds for the next process stay with the kernel until then.
	Interrupt func()
	// Workers bounds the requests handled at once; 0 means 64, which keeps a
	// device with high latency busy and costs at most 64 MiB while it does.
	Workers int
	// MaxRequestBytes bounds one read or write, a power of two from 4 KiB to 1
	// MiB; 0 means 1 MiB, the most a kernel allows by default.
	MaxRequestBytes int
	// Logger gets what an operator should know; nil discards it.
	Logger *slog.Logger
	// Registerer, if not nil, gets the metrics (thaw_fuse_*).
	Registerer prometheus.Registerer
}

func (o *Options) validate() error {
	if !filepath.IsAbs(o.Dir) || !filepath.IsAbs(o.StatePath) {
		return kind.Errorf(kind.Invalid, "fuse: Dir %q and StatePath %q must be absolute", o.Dir, o.StatePath)
	}
	if o.Open == nil {
		return kind.Errorf(kind.Invalid, "fuse: Open is missing")
	}
	o.Workers = cmp.Or(o.Workers, 64)
	if o.Workers < 1 || o.Workers > 1024 {
		return kind.Errorf(kind.Invalid, "fuse: Workers is %d, must be 1 to 1024", o.Workers)
	}
	o.MaxRequestBytes = cmp.Or(o.MaxRequestBytes, 1<<20)
	if n := o.MaxRequestBytes; n < pageBytes || n > 1<<20 || n&(n-1) != 0 {
		return kind.Errorf(kind.Invalid, "fuse: MaxRequestBytes is %d, must be a power of two from 4 KiB to 1 MiB", n)
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	return nil
}

const (
	// lockWait is how long New waits for a predecessor to be gone.
	lockWait = 10 * time.Second
	// initWait bounds the handshake with the kernel, which answers at once.
	initWait = 10 * time.Second
	// releaseWait is how long Withdraw waits for the kernel to tell that a file
	// was closed, which it does some time after the close or unmount.
	releaseWait = time.Second
)

// Presenter is a present.Presenter whose disks are files.
type Presenter struct {
	options Options
	log     *slog.Logger
	lock    *os.File // the right to serve this connection
	opens   *openTable
	metrics *metrics
	conn    *conn

	// presentMu serialises changes of the set of disks; it is held while devices
	// are opened, so the serving workers must never take it.
	presentMu sync.Mutex
	// stateMu guards state and is held while it is saved, which takes
	// microseconds.
	stateMu sync.Mutex
	state   *state

	// disks is replaced by the holder of presentMu.
	disks atomic.Pointer[diskSet]

	initDone   chan struct{} // closed when negotiated is known
	negotiated Negotiated    // valid once initDone is closed

	closed atomic.Bool
}

// diskSet is never changed once it is published.
type diskSet struct {
	byID   map[string]*disk
	byNode map[uint64]*disk
}

// sorted returns the disks in order of node.
func (s *diskSet) sorted() []*disk {
	return slices.SortedFunc(maps.Values(s.byNode), func(a, b *disk) int { return cmp.Compare(a.node, b.node) })
}

var _ present.Presenter = (*Presenter)(nil)

// New mounts on options.Dir, or takes over the mount that a process before us left
// there, and serves it until Close or Teardown. It is kind.InUse while another
// process does.
func New(options Options) (*Presenter, error) {
	return newPresenter(options, lockWait)
}

func newPresenter(options Options, lockWait time.Duration) (_ *Presenter, err error) {
	if err := options.validate(); err != nil {
		return nil, err
	}
	p := &Presenter{options: options, log: options.Logger, initDone: make(chan struct{}), metrics: newMetrics()}
	p.disks.Store(&diskSet{})
	if p.lock, err = lockState(options.StatePath+".lock", lockWait); err != nil {
		return nil, fmt.Errorf("fuse: %w", err)
	}
	defer func() {
		if err != nil {
			p.giveUp()
			err = fmt.Errorf("fuse: %s: %w", options.Dir, err)
		}
	}()
	fd, resumed, err := p.connect()
	if err != nil {
		return nil, err
	}
	if p.conn, err = newConn(p, fd); err != nil {
		return nil, err
	}
	if p.opens, err = loadOpens(options.StatePath+".opens", p.state.Token); err != nil {
		return nil, err
	}
	if resumed {
		p.adopt()
		if err := p.conn.notify(notifyResend, nil); err != nil {
			return nil, fmt.Errorf("ask the kernel to send again: %w", err)
		}
	}
	p.conn.start()
	select {
	case <-p.initDone:
	case <-time.After(initWait):
		return nil, kind.Errorf(kind.Unavailable, "the kernel did not start the conversation in %v", initWait)
	case <-p.conn.gone:
		return nil, kind.Errorf(kind.Unavailable, "the kernel closed the connection")
	}
	p.tune()
	if options.Registerer != nil {
		if err := options.Registerer.Register(p.metrics); err != nil {
			return nil, fmt.Errorf("register metrics: %w", err)
		}
	}
	switch {
	case resumed:
		p.log.Info("fuse: mount taken over", "dir", options.Dir, "disks", len(p.disks.Load().byID))
	case !p.Survives():
		p.log.Warn("fuse: mounted, but requests in flight are lost if this process is killed", "dir", options.Dir, "reason", p.whyNot())
	default:
		p.log.Info("fuse: mounted", "dir", options.Dir)
	}
	return p, nil
}

// Survives tells whether a SIGKILL of this process is only a pause for the users of
// its disks. It needs a keeper and Linux 6.9.
func (p *Presenter) Survives() bool { return p.whyNot() == "" }

func (p *Presenter) whyNot() string {
	switch {
	case p.options.Keeper == nil:
		return "no keeper holds the connection"
	case p.negotiated.Flags&flagHasResend == 0:
		return "this kernel cannot send requests again: that needs Linux 6.9"
	}
	return ""
}

// Negotiated returns what the kernel and we agreed on.
func (p *Presenter) Negotiated() Negotiated { return p.negotiated }

// adopt makes the disks of the state known; their devices are opened by the first
// request.
func (p *Presenter) adopt() {
	set := &diskSet{byID: make(map[string]*disk), byNode: make(map[uint64]*disk)}
	for _, s := range p.state.Disks {
		d := newDisk(p, s)
		set.byID[d.ID], set.byNode[d.node] = d, d
	}
	p.disks.Store(set)
	if p.state.Init != nil {
		p.setNegotiated(*p.state.Init)
	}
}

func (p *Presenter) setNegotiated(n Negotiated) {
	select {
	case <-p.initDone:
	default:
		p.negotiated = n
		close(p.initDone)
	}
}

// save stores the state after change; on failure the change is undone.
func (p *Presenter) save(change func(*state)) error {
	p.stateMu.Lock()
	defer p.stateMu.Unlock()
	next := *p.state
	next.Disks = slices.Clone(p.state.Disks)
	change(&next)
	if err := next.save(p.options.StatePath); err != nil {
		return err
	}
	p.state = &next
	return nil
}

// publish replaces the set of disks by one with, or without, d.
func (p *Presenter) publish(d *disk, there bool) {
	old := p.disks.Load()
	set := &diskSet{byID: maps.Clone(old.byID), byNode: maps.Clone(old.byNode)}
	if set.byID == nil {
		set.byID, set.byNode = make(map[string]*disk), make(map[uint64]*disk)
	}
	if there {
		set.byID[d.ID], set.byNode[d.node] = d, d
	} else {
		delete(set.byID, d.ID)
		delete(set.byNode, d.node)
	}
	p.disks.Store(set)
}

// Present implements present.Presenter.
func (p *Presenter) Present(ctx context.Context, id string, source present.Source, readOnly bool) (present.Disk, error) {
	if !validID(id) {
		return present.Disk{}, kind.Errorf(kind.Invalid, "present: bad id %q: letters, digits, '.', '_' and '-', at most %d bytes", id, maxIDBytes)
	}
	p.presentMu.Lock()
	defer p.presentMu.Unlock()
	if err := p.usable(ctx); err != nil {
		return present.Disk{}, fmt.Errorf("present %s: %w", id, err)
	}
	if d := p.disks.Load().byID[id]; d != nil {
		if d.Source != source || d.ReadOnly != readOnly {
			return present.Disk{}, kind.Errorf(kind.Exists, "present %s: it is there with source %+v, read-only %t", id, d.Source, d.ReadOnly)
		}
		return d.Disk, nil
	}
	device, err := p.options.Open(source, readOnly)
	if err != nil {
		return present.Disk{}, fmt.Errorf("present %s: open: %w", id, err)
	}
	s := stateDisk{
		Disk: present.Disk{
			ID: id, Source: source, Path: filepath.Join(p.options.Dir, id),
			SizeBytes: device.SizeBytes(), ReadOnly: readOnly,
		},
		UnixTime: time.Now().Unix(),
	}
	// The node is on record before the kernel can learn of it.
	err = p.save(func(st *state) {
		s.Node = st.NextNode
		st.NextNode++
		st.Disks = append(st.Disks, s)
	})
	if err != nil {
		return present.Disk{}, fmt.Errorf("present %s: %w", id, errors.Join(err, device.Close()))
	}
	d := newDisk(p, s)
	d.device = device
	p.publish(d, true)
	return d.Disk, nil
}

// Withdraw implements present.Presenter. Opens are counted exactly, also across the
// death of a process, but for one case in which what the kernel shows in /proc
// decides (see openTable). A writable device is flushed before it is closed; an
// error of that is returned although the disk is gone.
func (p *Presenter) Withdraw(ctx context.Context, id string) error {
	p.presentMu.Lock()
	defer p.presentMu.Unlock()
	if err := p.usable(ctx); err != nil {
		return fmt.Errorf("withdraw %s: %w", id, err)
	}
	d := p.disks.Load().byID[id]
	if d == nil {
		return nil
	}
	if err := p.quiesce(ctx, d); err != nil {
		return fmt.Errorf("withdraw %s: %w", id, err)
	}
	// From here no open succeeds and none is left.
	err := p.save(func(st *state) {
		st.Disks = slices.DeleteFunc(st.Disks, func(s stateDisk) bool { return s.Node == d.node })
	})
	if err != nil {
		d.leaving.Store(false)
		return fmt.Errorf("withdraw %s: %w", id, err)
	}
	p.publish(d, false)
	p.opens.forgetNode(d.node)
	p.conn.invalidate(d.node)
	if err := d.close(!d.ReadOnly); err != nil {
		return fmt.Errorf("withdraw %s: %w", id, err)
	}
	return nil
}

// quiesce waits a moment until nothing has d open and makes sure that it stays so.
func (p *Presenter) quiesce(ctx context.Context, d *disk) error {
	deadline := time.Now().Add(releaseWait)
	for pause := time.Millisecond; ; pause = min(2*pause, 20*time.Millisecond) {
		// An OPEN records itself before it looks at leaving, and we look at the
		// record after setting leaving: one of the two sees the other.
		d.leaving.Store(true)
		o := p.opens.count(d.node)
		if o == (opens{}) {
			return nil
		}
		if o.sure == 0 && time.Now().After(deadline) {
			user, err := findUser(d.Path)
			if err == nil && user == "" {
				return nil
			}
			d.leaving.Store(false)
			return kind.Errorf(kind.InUse, "it may be open (%s): %w", user, err)
		}
		d.leaving.Store(false)
		if time.Now().After(deadline) {
			user, _ := findUser(d.Path)
			return kind.Errorf(kind.InUse, "%d open files (%s)", o.sure+o.unsure, cmp.Or(user, "no user found in /proc"))
		}
		select {
		case <-ctx.Done():
			return kind.Errorf(kind.Canceled, "%w", ctx.Err())
		case <-p.conn.gone: // the kernel side is gone, and all opens with it
			d.leaving.Store(true)
			return nil
		case <-time.After(pause):
		}
	}
}

// List implements present.Presenter.
func (p *Presenter) List(ctx context.Context) ([]present.Disk, error) {
	set := p.disks.Load()
	list := make([]present.Disk, 0, len(set.byID))
	for _, d := range set.byID {
		list = append(list, d.Disk)
	}
	slices.SortFunc(list, func(a, b present.Disk) int { return cmp.Compare(a.ID, b.ID) })
	return list, nil
}

func (p *Presenter) usable(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return kind.Errorf(kind.Canceled, "%w", err)
	}
	if p.closed.Load() {
		return kind.Errorf(kind.Unavailable, "the presenter is closed")
	}
	select {
	case <-p.conn.gone:
		return kind.Errorf(kind.Unavailable, "the mount on %s is gone", p.options.Dir)
	default:
		return nil
	}
}

// Gone is closed when the kernel has ended the connection: somebody unmounted the
// directory or aborted the connection. Only a new Presenter helps then.
func (p *Presenter) Gone() <-chan struct{} { return p.conn.gone }

// Close stops serving and closes the devices without flushing them. The mount, the
// keeper's descriptor and the state stay, so that the next process goes on; until
// then users of the disks wait. Without a keeper the mount is dead afterwards.
func (p *Presenter) Close() error {
	if p.closed.Swap(true) {
		return nil
	}
	p.presentMu.Lock() // waits for Present and Withdraw to end
	defer p.presentMu.Unlock()
	p.conn.stop(p.options.Interrupt)
	if p.options.Registerer != nil {
		p.options.Registerer.Unregister(p.metrics)
	}
	err := p.closeDisks()
	err = errors.Join(err, p.save(func(s *state) { s.Clean = true }))
	p.release()
	return err
}

func (p *Presenter) closeDisks() error {
	var errs []error
	for _, d := range p.disks.Load().byID {
		errs = append(errs, d.close(false))
	}
	return errors.Join(errs...)
}

// Teardown unmounts and forgets everything. A disk that something holds open is
// kind.InUse, and then nothing has changed.
func (p *Presenter) Teardown(ctx context.Context) error {
	p.presentMu.Lock()
	defer p.presentMu.Unlock()
	if p.closed.Load() {
		return kind.Errorf(kind.Unavailable, "tear down %s: the presenter is closed", p.options.Dir)
	}
	set := p.disks.Load()
	for _, d := range set.byID {
		if err := p.quiesce(ctx, d); err != nil {
			for _, d := range set.byID {
				d.leaving.Store(false)
			}
			return fmt.Errorf("tear down %s: %s: %w", p.options.Dir, d.ID, err)
		}
	}
	p.closed.Store(true)
	var errs []error
	// Detached, because a reader of the directory must not keep the mount.
	if err := unix.Unmount(p.options.Dir, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil && err != unix.EINVAL && err != unix.ENOENT {
		errs = append(errs, fmt.Errorf("unmount %s: %w", p.options.Dir, err))
	}
	p.conn.stop(nil)
	if p.options.Registerer != nil {
		p.options.Registerer.Unregister(p.metrics)
	}
	for _, d := range set.byID {
		errs = append(errs, d.close(!d.ReadOnly))
	}
	if p.options.Keeper != nil {
		errs = append(errs, p.options.Keeper.Drop(ctx, keeperName(p.state.Token)))
	}
	for _, suffix := range []string{"", ".opens"} {
		if err := os.Remove(p.options.StatePath + suffix); err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	p.release()
	return errors.Join(errs...)
}

// giveUp ends a New that failed. A mount that never got through its handshake is of
// no use to anybody, and its readers can be woken in no other way.
func (p *Presenter) giveUp() {
	select {
	case <-p.initDone:
	default:
		if p.conn != nil {
			unix.Unmount(p.options.Dir, unix.MNT_FORCE|unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		}
	}
	p.release()
}

// release gives back what New took, except the mount.
func (p *Presenter) release() {
	if p.conn != nil {
		p.conn.stop(nil)
		p.conn.close()
	}
	if p.opens != nil {
		p.opens.close()
		p.opens = nil
	}
	p.lock.Close()
}

var _ io.Closer = (*Presenter)(nil)
