package target

import (
	"errors"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"

	"github.com/google/uuid"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/target/bdev"
	"github.com/thaw-project/thaw/target/rpc"
)

// driver is what is behind a disk.
type driver interface {
	// open returns a device for one user, who closes it.
	open() (bdev.Device, error)
	sizeBytes() int64
	readOnly() bool
	// supports says which of SPDK's I/O types work beside reading and writing.
	supports() ioSupport
	// specific is what bdev_get_bdevs shows as driver_specific.
	specific() any
	// close lets go of what is behind, once the last user is gone.
	close() error
}

type ioSupport struct{ unmap, flush, writeZeroes, nvme bool }

// disk is a bdev: a device under a name.
type disk struct {
	name       string
	id         uuid.UUID
	product    string
	blockBytes uint32
	driver     driver
	inline     bool // answers from memory
	local      bool // does not wait for a network
	stat       atomic.Pointer[ioStat]

	alias  string              // guarded by Target.mu
	leases map[*lease]struct{} // guarded by Target.mu
}

// claim is how much of a disk a user wants for itself. The texts are SPDK's.
type claim string

const (
	shared         claim = ""
	exclusiveWrite claim = "exclusive_write"      // nobody else writes
	nobodyWrites   claim = "read_many_write_none" // not even the claimant
)

// lease is one user's hold of a disk.
type lease struct {
	t     *Target
	disk  *disk
	dev   bdev.Device
	claim claim
	what  string // who it is, for messages
	write bool
	own   bool // the target's own work, which keeps order by other means: no claim stops it
	fixed bool // the disk must not shrink under it
	// with is a lease of the same disk in whose claim this one has part, or nil.
	with *lease
	// evict makes the user let go and release the lease, because the disk goes;
	// wanted says that somebody asked for it. It is called with admin held.
	evict func(wanted bool)
}

// release ends a lease and closes its device. A second call does nothing.
func (l *lease) release() {
	l.t.mu.Lock()
	_, held := l.disk.leases[l]
	delete(l.disk.leases, l)
	l.t.mu.Unlock()
	if held {
		if err := l.dev.Close(); err != nil {
			l.t.log.Warn("close device", "bdev", l.disk.name, "err", err)
		}
	}
}

// acquire gives a user the device of a disk: EPERM as in SPDK when a claim forbids it.
// The caller holds admin.
func (t *Target) acquire(d *disk, l *lease) error {
	t.mu.RLock()
	var refused error
	for o := range d.leases {
		if !l.own && !o.own && !compatible(o, l) && !d.driver.readOnly() {
			refused = kind.Errorf(kind.InUse, "bdev %s is used by %s", d.name, o.what)
		}
	}
	t.mu.RUnlock()
	if refused != nil {
		return rpc.Errno(syscall.EPERM, refused)
	}
	dev, err := d.driver.open()
	if err != nil {
		return errnoOf(err)
	}
	if !l.own {
		dev = counted(dev, d.ioStat())
	}
	l.t, l.disk, l.dev = t, d, dev
	t.mu.Lock()
	d.leases[l] = struct{}{}
	t.mu.Unlock()
	return nil
}

// compatible tells whether two may use a disk that can be written. What nobody can
// write, many may use: that is what a snapshot is for.
func compatible(a, b *lease) bool {
	return b.with == a || a.with == b || allows(a, b) && allows(b, a)
}

func allows(holder, other *lease) bool {
	switch holder.claim {
	case shared:
		return true
	case exclusiveWrite:
		return !other.write && other.claim == shared
	}
	return !other.write // nobodyWrites
}

// lookup finds a disk by name, alias or UUID.
func (t *Target) lookup(name string) *disk {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return t.names[nameKey(name)]
}

// nameKey makes the spellings of a UUID one.
func nameKey(name string) string {
	if len(name) == 36 {
		if id, err := uuid.Parse(name); err == nil {
			return id.String()
		}
	}
	return name
}

// find is lookup for methods that answer -19.
func (t *Target) find(name string) (*disk, error) {
	if d := t.lookup(name); d != nil {
		return d, nil
	}
	return nil, rpc.Errno(syscall.ENODEV, kind.Errorf(kind.NotFound, "no bdev %.160q", name))
}

// maxDisks bounds the registry: each costs a few hundred bytes, and a list of all is
// one answer.
const maxDisks = 65536

// register makes a disk known, then looks whether it holds an lvstore and whether
// something waited for it. The caller holds admin. The driver stays the caller's when
// it fails: -17 when a name or the UUID is taken.
func (t *Target) register(d *disk) error {
	d.leases = map[*lease]struct{}{}
	keys := d.keys()
	t.mu.Lock()
	for _, k := range keys {
		if o := t.names[k]; o != nil {
			t.mu.Unlock()
			return rpc.Errno(syscall.EEXIST, kind.Errorf(kind.Exists, "bdev %s: %s is the name, alias or UUID of bdev %s", d.name, k, o.name))
		}
	}
	if len(t.disks) >= maxDisks {
		t.mu.Unlock()
		return rpc.Errno(syscall.ENOSPC, kind.Errorf(kind.NoSpace, "bdev %s: there are %d already", d.name, maxDisks))
	}
	for _, k := range keys {
		t.names[k] = d
	}
	t.disks = append(t.disks, d)
	t.arrivedLocked()
	t.mu.Unlock()
	t.log.Info("bdev added", "name", d.name, "alias", d.alias, "product", d.product, "bytes", d.driver.sizeBytes())
	t.examine(d)
	t.resolve(d)
	t.kick()
	return nil
}

// arrivedLocked wakes those who wait for a disk by name. The caller holds mu.
func (t *Target) arrivedLocked() {
	close(t.arrived)
	t.arrived = make(chan struct{})
}

func (d *disk) keys() []string {
	keys := []string{nameKey(d.name)}
	for _, k := range []string{d.alias, d.id.String()} {
		if k != "" && !slices.Contains(keys, k) {
			keys = append(keys, k)
		}
	}
	return keys
}

// setAlias renames what a disk is also called. The caller holds admin.
func (t *Target) setAlias(d *disk, alias string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if d.alias == alias {
		return
	}
	if t.names[d.alias] == d {
		delete(t.names, d.alias)
	}
	d.alias = alias
	t.names[alias] = d
	t.arrivedLocked()
}

// unregister takes a disk away from all its users and closes it. wanted says that
// somebody asked for it: then what was made of it goes from the record too. The caller
// holds admin.
func (t *Target) unregister(d *disk, wanted bool) {
	t.mu.Lock()
	for _, k := range d.keys() {
		if t.names[k] == d {
			delete(t.names, k)
		}
	}
	t.disks = slices.DeleteFunc(t.disks, func(o *disk) bool { return o == d })
	leases := make([]*lease, 0, len(d.leases))
	for l := range d.leases {
		leases = append(leases, l)
	}
	t.mu.Unlock()
	// In a fixed order, so that what a log shows is the same each time.
	slices.SortFunc(leases, func(a, b *lease) int { return strings.Compare(a.what, b.what) })
	for _, l := range leases {
		l.evict(wanted)
		l.release()
	}
	if err := d.driver.close(); err != nil {
		t.log.Warn("close bdev", "name", d.name, "err", err)
	}
	t.log.Info("bdev removed", "name", d.name)
}

// pinned returns who needs a disk to keep its size, or nothing.
func (t *Target) pinned(d *disk) string {
	t.mu.RLock()
	defer t.mu.RUnlock()
	for l := range d.leases {
		if l.fixed {
			return l.what
		}
	}
	return ""
}

// busy returns who uses a disk, or nothing.
func (t *Target) busy(d *disk) string {
	t.mu.RLock()
	defer t.mu.RUnlock()
	for l := range d.leases {
		return l.what
	}
	return ""
}

// errnoOf turns an error of a device or a store into an answer: an rpc.Error as it is,
// others by kind.
func errnoOf(err error) error {
	if err == nil {
		return nil
	}
	var e *rpc.Error
	if errors.As(err, &e) {
		return err
	}
	switch kind.Of(err) {
	case kind.NotFound:
		return rpc.Errno(syscall.ENODEV, err)
	case kind.Denied:
		return rpc.Errno(syscall.EACCES, err)
	case kind.Unavailable:
		return rpc.Errno(syscall.ENODEV, err)
	}
	return rpc.Errno(kind.Errno(err), err)
}

// invalidOf is errnoOf for SPDK's asynchronous failures: the code is -32602 and the
// text strerror's.
func invalidOf(err error) error {
	var e *rpc.Error
	if !errors.As(errnoOf(err), &e) {
		return nil
	}
	return &rpc.Error{Code: rpc.CodeInvalidParams, Message: e.Message, Cause: err}
}
