// Package pcie is how a host finds the drives that its card (a DPU) shows on PCIe
// functions: it binds the nvme driver to functions that the operator named, and tells by
// which device node a drive can be used.
//
// A drive is known by the UUID or NGUID of its nvmeNamespace, and one without either by
// the serial number of its controller, which follows from the same identity; never by a
// device number, and never by waiting for some time. Nothing is kept: what the kernel
// shows is all there is to know, and that a function was bound by this package is written
// in the function's driver_override.
//
// Devices that are not in the configuration are never touched. The package must not know
// who asked the card to show a drive, nor what is on it.
package pcie

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"regexp"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"

	"github.com/thaw-project/thaw/failpoint"
	"github.com/thaw-project/thaw/keylock"
	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/node/present"
	"github.com/thaw-project/thaw/node/present/nvmesys"
)

// Bounds in time.
const (
	// lookEvery is how often to look while waiting for an event, in case it was lost: a
	// container may be shut off from them.
	lookEvery = time.Second
	// watchAgain is the pause before kernel events are asked for again.
	watchAgain = time.Minute
	// usersWait is how long Leave waits for the last users of a drive to be gone.
	usersWait = 2 * time.Second
	// claimTimeout bounds the look for users itself, and opening the drive.
	claimTimeout = 20 * time.Second
	// bindWait bounds binding the driver: the kernel starts the controller meanwhile.
	bindWait = 60 * time.Second
)

// Options configures New.
type Options struct {
	// Functions are the addresses ("0000:3b:00.2") at which this host sees functions of
	// the card, by what the card calls them ("port:physical:virtual", as "0:1:0"). The nvme
	// driver is bound to these where they have none, and a drive that the card says is on
	// one of them is looked for there only. Functions that are not among them are left to the
	// kernel, which has bound them by itself.
	Functions map[string]string
	Logger    *slog.Logger // nil is silence

	driver driver // tests replace the kernel
}

var (
	functionName = regexp.MustCompile(`^[0-9]{1,5}:[0-9]{1,5}:[0-9]{1,5}$`)
	pciAddress   = regexp.MustCompile(`^[0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]$`)
)

// Check tells whether functions can be Options.Functions; the error is kind.Invalid.
func Check(functions map[string]string) error {
	seen := make(map[string]string)
	for name, address := range functions {
		if !functionName.MatchString(name) || !pciAddress.MatchString(address) {
			return kind.Errorf(kind.Invalid, "PCIe function %.40q at %.40q: must be port:physical:virtual and as 0000:3b:00.2", name, address)
		}
		if other, twice := seen[address]; twice {
			return kind.Errorf(kind.Invalid, "PCIe functions %s and %s are both at %s", other, name, address)
		}
		seen[address] = name
	}
	return nil
}

// Finder finds drives. Methods may be called concurrently.
type Finder struct {
	o      Options
	log    *slog.Logger
	driver driver
	news   nvmesys.News
	keys   keylock.Set // PCI addresses: one change at a time

	cancel context.CancelFunc
	wg     sync.WaitGroup
}

// New begins to listen to the kernel's events.
func New(o Options) (*Finder, error) {
	if err := Check(o.Functions); err != nil {
		return nil, err
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.driver == nil {
		o.driver = linux{}
	}
	f := &Finder{o: o, log: o.Logger, driver: o.driver}
	ctx, cancel := context.WithCancel(context.Background())
	f.cancel = cancel
	f.wg.Go(func() { f.watch(ctx) })
	return f, nil
}

// Close stops listening. Drives stay; calls that are under way find what they wait for more
// slowly.
func (f *Finder) Close() error {
	f.cancel()
	f.wg.Wait()
	return nil
}

func (f *Finder) watch(ctx context.Context) {
	for {
		err := f.driver.Watch(ctx, f.news.Tell, f.news.Tell)
		if ctx.Err() != nil {
			return
		}
		f.log.Warn("pcie: no kernel events, drives are found more slowly", "error", err)
		select {
		case <-time.After(watchAgain):
		case <-ctx.Done():
			return
		}
	}
}

// identity is present.NVMe, checked.
type identity struct {
	uuid     uuid.UUID
	serial   string
	function string
	address  string // where the function must be; empty: anywhere
}

func (f *Finder) identity(n present.NVMe) (identity, error) {
	id, err := uuid.Parse(n.UUID)
	if err != nil || id == uuid.Nil || len(n.Serial) > 20 || n.Function != "" && !functionName.MatchString(n.Function) {
		return identity{}, kind.Errorf(kind.Invalid, "drive with nvmeNamespace %.80q, serial number %.80q, function %.40q", n.UUID, n.Serial, n.Function)
	}
	return identity{id, n.Serial, n.Function, f.o.Functions[n.Function]}, nil
}

// notYet is what an event may change.
type notYet struct{ reason string }

func (e *notYet) Error() string { return e.reason }

func waitFor(format string, args ...any) error { return &notYet{fmt.Sprintf(format, args...)} }

// until looks now and after each event until look does not fail with notYet. When ctx ends
// first it is kind.Unavailable, and says for what it waited.
func (f *Finder) until(ctx context.Context, look func() error) error {
	again := time.NewTicker(lookEvery)
	defer again.Stop()
	for {
		event := f.news.Next()
		err := look()
		var wait *notYet
		if !errors.As(err, &wait) {
			return err
		}
		select {
		case <-event:
		case <-again.C:
		case <-ctx.Done():
			return kind.Wrap(kind.Unavailable, fmt.Errorf("%s: %w", wait.reason, context.Cause(ctx)))
		}
	}
}

// Find waits until the kernel shows the drive d.NVMe and returns its device node. A drive
// that must not be written is made read-only where it is not. Errors are kind.Corrupt when
// the drive has another size than d.SizeBytes or several drives claim the identity,
// kind.ReadOnly when it cannot be written and should be, kind.InUse when the function has
// another driver, and kind.Unavailable, saying what is missing, when ctx ends.
func (f *Finder) Find(ctx context.Context, d present.Disk) (path string, err error) {
	if d.NVMe == nil {
		return "", kind.Errorf(kind.Invalid, "disk %.140s is no drive of a card", d.ID)
	}
	id, err := f.identity(*d.NVMe)
	if err == nil {
		begin := time.Now()
		err = f.until(ctx, func() error {
			path, err = f.find(ctx, id, d)
			return err
		})
		if err == nil {
			f.log.Debug("drive found", "disk", d.ID, "path", path, "took", time.Since(begin))
		}
	}
	if err != nil {
		return "", fmt.Errorf("find drive %.140s of the card: %w", d.ID, err)
	}
	return path, nil
}

func (f *Finder) find(ctx context.Context, id identity, d present.Disk) (string, error) {
	if id.address != "" {
		if err := f.bind(ctx, id); err != nil {
			return "", err
		}
	}
	dr, err := f.lookup(id)
	switch {
	case err != nil:
		return "", err
	case dr == nil:
		return "", waitFor("the kernel shows no drive with nvmeNamespace %s or serial number %s", id.uuid, id.serial)
	case dr.SizeBytes == 0:
		return "", waitFor("%s has no size yet", dr.Name)
	case d.SizeBytes > 0 && dr.SizeBytes != d.SizeBytes:
		return "", kind.Errorf(kind.Corrupt, "%s has %d bytes and should have %d", dr.Name, dr.SizeBytes, d.SizeBytes)
	case dr.ReadOnly && !d.ReadOnly:
		return "", kind.Errorf(kind.ReadOnly, "%s cannot be written", dr.Name)
	}
	path := "/dev/" + dr.Name
	if !f.driver.Node(path, dr.Number) {
		return "", waitFor("there is no device node %s for %s", path, dr.Number)
	}
	if d.ReadOnly && !dr.ReadOnly {
		// Its target refuses writes too; this keeps file systems from trying.
		cctx, cancel := context.WithTimeout(ctx, claimTimeout)
		defer cancel()
		err := f.driver.SetReadOnly(cctx, path)
		if errors.Is(err, kind.NotFound) {
			return "", waitFor("%s went away", dr.Name)
		}
		if err != nil {
			return "", err
		}
	}
	return path, nil
}

// lookup returns the drive that is id, nil when there is none.
func (f *Finder) lookup(id identity) (*drive, error) {
	all, err := drives(f.driver.Sys())
	if err != nil {
		return nil, fmt.Errorf("list drives: %w", err)
	}
	var found *drive
	elsewhere := ""
	for i := range all {
		d := &all[i]
		if !d.is(id) {
			continue
		}
		if at := d.on(id.address); at != "" {
			elsewhere = fmt.Sprintf("%s is at %s and function %s is configured to be at %s", d.Name, at, id.function, id.address)
			continue
		}
		if found != nil {
			return nil, kind.Errorf(kind.Corrupt, "%s and %s both are nvmeNamespace %s", found.Name, d.Name, id.uuid)
		}
		found = d
	}
	if found == nil && elsewhere != "" {
		return nil, waitFor("%s", elsewhere)
	}
	return found, nil
}

// Leave makes ready for a drive to go: nobody can mount it any more until release is called,
// and its function has lost the driver if this package bound it. It is kind.InUse while
// something has the drive open, and then nothing has changed. A drive that is not there
// is no error. Call release once the card has taken the drive away, or has failed to.
func (f *Finder) Leave(ctx context.Context, n present.NVMe) (release func() error, err error) {
	id, err := f.identity(n)
	if err == nil {
		release, err = f.leave(ctx, id)
	}
	if err != nil {
		return nil, fmt.Errorf("leave drive with nvmeNamespace %.36s: %w", n.UUID, err)
	}
	return release, nil
}

func (f *Finder) leave(ctx context.Context, id identity) (release func() error, err error) {
	release = func() error { return nil }
	d, err := f.lookup(id)
	var wait *notYet
	if err != nil && !errors.As(err, &wait) {
		return nil, err
	}
	if d != nil && f.driver.Node("/dev/"+d.Name, d.Number) {
		cctx, cancel := context.WithTimeout(ctx, claimTimeout)
		defer cancel()
		r, err := f.driver.Claim(cctx, "/dev/"+d.Name, usersWait)
		switch {
		case errors.Is(err, kind.NotFound): // it went by itself
		case err != nil:
			return nil, err
		default:
			release = r
		}
		failpoint.Reach("pcie.leave: claimed")
	}
	if id.address != "" {
		if err := f.unbind(ctx, id, d); err != nil {
			return nil, errors.Join(err, release())
		}
	}
	return release, nil
}

// Gone waits until the kernel shows the drive no more; when ctx ends first it is
// kind.Unavailable.
func (f *Finder) Gone(ctx context.Context, n present.NVMe) error {
	id, err := f.identity(n)
	if err == nil {
		err = f.until(ctx, func() error {
			d, err := f.lookup(id)
			if err == nil && d != nil {
				err = waitFor("%s is still there", d.Name)
			}
			var wait *notYet
			if d == nil && errors.As(err, &wait) {
				err = nil // elsewhere: another card's
			}
			return err
		})
	}
	if err != nil {
		return fmt.Errorf("drive with nvmeNamespace %.36s: %w", n.UUID, err)
	}
	return nil
}

// bind makes sure that the nvme driver has id's function.
func (f *Finder) bind(ctx context.Context, id identity) error {
	p, err := f.function(id)
	if err != nil || p.driver == nvmeDriver {
		return err
	}
	unlock, err := f.keys.Lock(ctx, id.address)
	if err != nil {
		return kind.Errorf(kind.Canceled, "%w", err)
	}
	defer unlock()
	if p, err = f.function(id); err != nil || p.driver == nvmeDriver {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, bindWait)
	defer cancel()
	if err := f.driver.Load(ctx); err != nil {
		return err
	}
	// Whoever comes next sees by this who bound it. It is written first.
	if err := f.driver.Write(ctx, p.dir()+"driver_override", nvmeDriver); err != nil {
		return fmt.Errorf("choose the driver of function %s at %s: %w", id.function, id.address, err)
	}
	failpoint.Reach("pcie.bind: chosen")
	if err := f.driver.Write(ctx, "bus/pci/drivers/nvme/bind", id.address); err != nil {
		if p, perr := f.function(id); perr == nil && p.driver == nvmeDriver {
			return nil // somebody else did
		}
		// A controller that is not ready yet looks so.
		return waitFor("bind the nvme driver to function %s at %s: %v", id.function, id.address, err)
	}
	failpoint.Reach("pcie.bind: bound")
	f.log.Info("nvme driver bound", "function", id.function, "address", id.address)
	return nil
}

// unbind takes the nvme driver from id's function if bind gave it. d is its drive if it
// has one, which is claimed.
func (f *Finder) unbind(ctx context.Context, id identity, d *drive) error {
	unlock, err := f.keys.Lock(ctx, id.address)
	if err != nil {
		return kind.Errorf(kind.Canceled, "%w", err)
	}
	defer unlock()
	p, err := f.function(id)
	var wait *notYet
	if errors.As(err, &wait) || errors.Is(err, kind.InUse) || errors.Is(err, kind.Invalid) {
		return nil // not there, or not ours
	}
	if err != nil || p.override != nvmeDriver {
		return err
	}
	if p.driver == nvmeDriver {
		// The function may show another drive by now.
		all, err := drives(f.driver.Sys())
		if err != nil {
			return fmt.Errorf("list drives: %w", err)
		}
		for i := range all {
			if all[i].on(id.address) == "" && (d == nil || all[i].Name != d.Name) {
				return nil
			}
		}
		if err := f.driver.Write(ctx, "bus/pci/drivers/nvme/unbind", id.address); err != nil {
			return fmt.Errorf("unbind the nvme driver from function %s at %s: %w", id.function, id.address, err)
		}
		failpoint.Reach("pcie.leave: unbound")
	}
	if err := f.driver.Write(ctx, p.dir()+"driver_override", "\n"); err != nil {
		f.log.Warn("a function keeps its driver_override", "address", id.address, "error", err)
	}
	return nil
}

// function looks at id's function: notYet when there is none, kind.InUse when it has
// another driver, kind.Invalid when it is no NVMe controller.
func (f *Finder) function(id identity) (function, error) {
	p, there := functionAt(f.driver.Sys(), id.address)
	switch {
	case !there:
		return p, waitFor("there is no PCI device at %s, where function %s is configured to be", id.address, id.function)
	case !strings.HasPrefix(p.class, nvmeClass):
		return p, kind.Errorf(kind.Invalid, "the PCI device at %s, where function %s is configured to be, has class %.20q and is no NVMe controller", id.address, id.function, p.class)
	case p.driver != "" && p.driver != nvmeDriver:
		return p, kind.Errorf(kind.InUse, "function %s at %s has the driver %.40s", id.function, id.address, p.driver)
	case p.driver == "" && p.override != "" && p.override != nvmeDriver:
		return p, kind.Errorf(kind.InUse, "function %s at %s is set aside for the driver %.40s", id.function, id.address, p.override)
	}
	return p, nil
}
