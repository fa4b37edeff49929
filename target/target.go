package target

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/thaw-project/thaw/filelock"
	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/statedb"
	"github.com/thaw-project/thaw/target/engine"
	"github.com/thaw-project/thaw/target/nvmf"
	"github.com/thaw-project/thaw/target/rpc"
)

// Options say where a target keeps things. Zero fields take the defaults that each
// names.
type Options struct {
	// Root is the directory that survives: lvstores' metadata in lvstore/, and
	// target.db with Persist. It is made with mode 0700, and one target uses it.
	Root string
	// Persist keeps the configuration and restores it at the next New.
	Persist bool
	Engine  engine.Kind
	// Version is this program's, for spdk_get_version.
	Version string
	// MallocBytes bounds bdev_malloc_create, all together; default half of the
	// machine's memory.
	MallocBytes int64
	// RetryInterval is how often what could not be restored is tried again; default
	// 5 s.
	RetryInterval time.Duration
	// ListenerGrace is how long a restored listener waits for nvmeNamespaces of its
	// subsystem that could not be restored yet. A host that finds no listener waits; one
	// that finds a subsystem without its disk drops the disk. Default 30 s.
	ListenerGrace time.Duration
	// Kernel shows devices as /dev/nbdN and /dev/ublkbN; nil where there is none of
	// either.
	Kernel Kernel
	Log    *slog.Logger // default: none
}

func (o *Options) fill() error {
	if o.Root == "" {
		return kind.Errorf(kind.Invalid, "target: no root directory given")
	}
	root, err := filepath.Abs(o.Root)
	if err != nil {
		return fmt.Errorf("target: root directory: %w", err)
	}
	o.Root = root
	if o.MallocBytes == 0 {
		var si unix.Sysinfo_t
		if err := unix.Sysinfo(&si); err != nil {
			return fmt.Errorf("target: size of memory: %w", err)
		}
		o.MallocBytes = int64(si.Totalram) * int64(si.Unit) / 2
	}
	if o.RetryInterval == 0 {
		o.RetryInterval = 5 * time.Second
	}
	if o.ListenerGrace == 0 {
		o.ListenerGrace = 30 * time.Second
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	return o.Engine.Validate()
}

// Target is the storage process without its socket. Methods returns what to serve. All
// methods may be called concurrently.
type Target struct {
	o      Options
	log    *slog.Logger
	lock   *os.File
	db     *statedb.DB // nil without Persist
	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup // copies, retries
	kicked chan struct{}  // something came that pending objects may wait for

	admin      sync.Mutex
	closed     bool                     // guarded by admin, as are all below
	replaying  bool                     // the calls come from the record
	pending    map[string]object        // on record, but not made yet, by key
	memory     int64                    // bytes of malloc bdevs
	remotes    map[string]*remote       // by name
	mallocs    int                      // number of the next malloc bdev without a name
	kernel     map[string]*shown        // by path: disks shown by the kernel
	sockets    map[string]*socketExport // by path: disks served by NBD
	ublkOn     bool                     // ublk_create_target was called
	copies     map[uint32]*copying      // by operation
	copySeq    uint32
	connecting map[string]bool // recorded controllers that are being attached, by key

	mu        sync.RWMutex
	names     map[string]*disk    // guarded by mu, as are all below: by name, alias and UUID
	disks     []*disk             // in order of arrival
	arrived   chan struct{}       // closed and replaced when a name comes
	stores    map[string]*lvstore // by UUID
	nvmf      *nvmf.Target
	transport *transport // nil before nvmf_create_transport
	exports   map[export]*lease
}

// New opens the target in o.Root and restores what is on record. kind.InUse when
// another process has it. Close it.
func New(o Options) (_ *Target, err error) {
	if err := o.fill(); err != nil {
		return nil, err
	}
	t := &Target{
		o: o, log: o.Log, kicked: make(chan struct{}, 1),
		pending: map[string]object{}, remotes: map[string]*remote{}, kernel: map[string]*shown{}, sockets: map[string]*socketExport{}, copies: map[uint32]*copying{}, connecting: map[string]bool{},
		names: map[string]*disk{}, arrived: make(chan struct{}), stores: map[string]*lvstore{}, exports: map[export]*lease{},
	}
	if err := os.MkdirAll(filepath.Join(o.Root, "lvstore"), 0o700); err != nil {
		return nil, fmt.Errorf("target: %w", err)
	}
	if t.lock, err = lockRoot(o.Root); err != nil {
		return nil, err
	}
	t.ctx, t.cancel = context.WithCancel(context.Background())
	defer func() {
		if err != nil {
			t.Close()
		}
	}()
	if err := removeUnfinished(filepath.Join(o.Root, "lvstore")); err != nil {
		return nil, fmt.Errorf("target: %w", err)
	}
	if t.nvmf, err = nvmf.New(t.nvmfOptions()); err != nil {
		return nil, err
	}
	if o.Persist {
		if err := t.openRecord(); err != nil {
			return nil, err
		}
		if err := t.restore(); err != nil {
			return nil, err
		}
	}
	return t, nil
}

// lockRoot takes the root directory for this process.
func lockRoot(root string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(root, "target.lock"), os.O_RDWR|os.O_CREATE|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, fmt.Errorf("target: %w", err)
	}
	if err := filelock.Exclusive(f, filelock.Patience); err != nil {
		defer f.Close()
		if !errors.Is(err, kind.InUse) {
			return nil, fmt.Errorf("target: lock %s: %w", root, err)
		}
		pid := make([]byte, 16)
		n, _ := f.ReadAt(pid, 0) // an empty file only makes the message poorer
		return nil, kind.Errorf(kind.InUse, "another thaw target (pid %s) uses %s: stop it, or choose another --root", strings.TrimSpace(string(pid[:n])), root)
	}
	if err = f.Truncate(0); err == nil {
		_, err = fmt.Fprintf(f, "%d\n", os.Getpid())
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("target: lock %s: %w", root, err)
	}
	return f, nil
}

// Close ends connections, takes kernel disks away, makes lvstores durable and closes
// everything. What is on record stays.
func (t *Target) Close() error {
	t.admin.Lock()
	if t.closed {
		t.admin.Unlock()
		return nil
	}
	t.closed = true
	t.cancel()
	for _, r := range t.remotes {
		defer r.unblock()()
	}
	t.closeSockets()
	t.closeExports()
	t.closeKernel()
	t.admin.Unlock()
	t.wg.Wait() // copies let go of their disks
	t.admin.Lock()
	// Lvols before what they lie on: the last that came goes first.
	for len(t.disks) > 0 {
		t.unregister(t.disks[len(t.disks)-1], false)
	}
	remotes := t.remotes
	t.remotes = nil
	t.admin.Unlock()
	for _, r := range remotes {
		r.stop()
		r.wg.Wait()
	}
	var errs []error
	if t.db != nil {
		errs = append(errs, t.db.Close())
	}
	return errors.Join(append(errs, t.lock.Close())...)
}

// change runs a change that a method asks for: one at a time, and none after Close.
func (t *Target) change(f func() (any, error)) (any, error) {
	t.admin.Lock()
	defer t.admin.Unlock()
	if t.closed {
		return nil, rpc.Internal("", kind.Errorf(kind.Unavailable, "the target stops"))
	}
	return f()
}

// changing is a method that makes a change.
func (t *Target) changing(f func(json.RawMessage) (any, error)) rpc.Method {
	return rpc.Method{Handle: func(_ context.Context, params json.RawMessage) (any, error) {
		return t.change(func() (any, error) { return f(params) })
	}}
}

// listing is a method that does not, or takes admin itself.
func listing(f func(json.RawMessage) (any, error)) rpc.Method {
	return rpc.Method{Handle: func(_ context.Context, params json.RawMessage) (any, error) { return f(params) }}
}

// Methods returns all methods by name.
func (t *Target) Methods() map[string]rpc.Method {
	m := map[string]rpc.Method{
		"bdev_get_bdevs":        {Handle: t.getBdevs, Waits: true},
		"bdev_wait_for_examine": listing(t.waitForExamine),
		"spdk_get_version":      listing(t.getVersion),
		"framework_wait_init":   listing(t.waitInit),

		"bdev_aio_create":    t.changing(t.createFile),
		"bdev_aio_delete":    t.changing(t.deleteFile),
		"bdev_malloc_create": t.changing(t.createMemory),
		"bdev_malloc_delete": t.changing(t.deleteMemory),
		"bdev_null_create":   t.changing(t.createNull),
		"bdev_null_delete":   t.changing(t.deleteNull),
		"bdev_get_iostat":    listing(t.getIOStat),
		"bdev_reset_iostat":  listing(t.resetIOStat),

		"bdev_lvol_create_lvstore":     t.changing(t.createStore),
		"bdev_lvol_delete_lvstore":     t.changing(t.deleteStore),
		"bdev_lvol_rename_lvstore":     t.changing(t.renameStore),
		"bdev_lvol_get_lvstores":       listing(t.getStores),
		"bdev_lvol_create":             listing(t.createLvol), // may be long: takes admin itself
		"bdev_lvol_snapshot":           t.changing(t.snapshotLvol),
		"bdev_lvol_clone":              t.changing(t.cloneLvol),
		"bdev_lvol_clone_bdev":         t.changing(t.cloneBdev),
		"bdev_lvol_delete":             t.changing(t.deleteLvol),
		"bdev_lvol_rename":             t.changing(t.renameLvol),
		"bdev_lvol_resize":             t.changing(t.resizeLvol),
		"bdev_lvol_set_read_only":      t.changing(t.setReadOnly),
		"bdev_lvol_set_parent":         t.changing(t.setParent),
		"bdev_lvol_set_parent_bdev":    t.changing(t.setParentBdev),
		"bdev_lvol_inflate":            {Handle: t.inflate},
		"bdev_lvol_decouple_parent":    {Handle: t.decouple},
		"bdev_lvol_get_lvols":          listing(t.getLvols),
		"bdev_lvol_start_shallow_copy": t.changing(t.startCopy),
		"bdev_lvol_check_shallow_copy": t.changing(t.checkCopy),

		"bdev_nvme_attach_controller": {Handle: t.attachController},
		"bdev_nvme_detach_controller": listing(t.detachController),
		"bdev_nvme_get_controllers":   t.changing(t.getControllers),
		"bdev_nvme_reset_controller":  {Handle: t.resetController},

		"nvmf_create_transport":          t.changing(t.createTransport),
		"nvmf_get_transports":            listing(t.getTransports),
		"nvmf_create_subsystem":          t.changing(t.createSubsystem),
		"nvmf_delete_subsystem":          t.changing(t.deleteSubsystem),
		"nvmf_get_subsystems":            listing(t.getSubsystems),
		"nvmf_subsystem_add_ns":          t.changing(t.addNvmeNamespace),
		"nvmf_subsystem_remove_ns":       t.changing(t.removeNvmeNamespace),
		"nvmf_subsystem_add_listener":    t.changing(t.addListener),
		"nvmf_subsystem_remove_listener": t.changing(t.removeListener),
		"nvmf_subsystem_add_host":        t.changing(t.addHost),
		"nvmf_subsystem_remove_host":     t.changing(t.removeHost),
		"nvmf_subsystem_allow_any_host":  t.changing(t.allowAnyHost),
		"nvmf_subsystem_get_controllers": listing(t.getSubsystemControllers),
		"nvmf_subsystem_get_listeners":   listing(t.getListeners),

		"nbd_start_disk": t.changing(t.startNBD),
		"nbd_stop_disk":  t.changing(t.stopNBD),
		"nbd_get_disks":  t.changing(t.getNBD),

		"thaw_nbd_export":      t.changing(t.exportSocket),
		"thaw_nbd_unexport":    t.changing(t.unexportSocket),
		"thaw_nbd_get_exports": t.changing(t.getSockets),

		"ublk_create_target":  t.changing(t.createUblkTarget),
		"ublk_destroy_target": t.changing(t.destroyUblkTarget),
		"ublk_start_disk":     t.changing(t.startUblk),
		"ublk_stop_disk":      t.changing(t.stopUblk),
		"ublk_get_disks":      t.changing(t.getUblk),
	}
	names := make([]string, 0, len(m)+1)
	for n := range m {
		names = append(names, n)
	}
	names = append(names, "rpc_get_methods")
	sort.Strings(names)
	m["rpc_get_methods"] = listing(func(params json.RawMessage) (any, error) {
		var p struct {
			Current        bool `json:"current,omitempty"` // only what may be called now: all of them
			IncludeAliases bool `json:"include_aliases,omitempty"`
		}
		if err := decode(params, &p); err != nil {
			return nil, err
		}
		return names, nil
	})
	return m
}

// decode is rpc.Decode with the answer of SPDK's bdev methods.
func decode(params json.RawMessage, v any) error {
	if err := rpc.Decode(params, v); err != nil {
		return rpc.Internal("spdk_json_decode_object failed", err)
	}
	return nil
}

// decodeNvmf is rpc.Decode with the answers of SPDK's nvmf methods: a parameter they do not
// have is refused as elsewhere, one that is missing or of the wrong type with -32602.
func decodeNvmf(params json.RawMessage, v any) error {
	err := rpc.Decode(params, v)
	var p *rpc.ParamError
	switch {
	case errors.As(err, &p) && p.Unknown:
		return rpc.Internal("spdk_json_decode_object failed", err)
	case err != nil:
		return rpc.InvalidParams(err)
	}
	return nil
}

// without is for methods that have no parameters.
func without(method string, params json.RawMessage) error {
	if params != nil {
		return &rpc.Error{Code: rpc.CodeInvalidParams, Message: method + " requires no parameters"}
	}
	return nil
}

func (t *Target) waitForExamine(params json.RawMessage) (any, error) {
	if err := without("bdev_wait_for_examine", params); err != nil {
		return nil, err
	}
	// Examining is part of the change that brings a disk.
	return t.change(func() (any, error) { return true, nil })
}

func (t *Target) waitInit(params json.RawMessage) (any, error) {
	if err := without("framework_wait_init", params); err != nil {
		return nil, err
	}
	return true, nil
}

// getVersion says which SPDK's methods these are, since that is what tools want to know,
// and whose program answers.
func (t *Target) getVersion(params json.RawMessage) (any, error) {
	if err := without("spdk_get_version", params); err != nil {
		return nil, err
	}
	type fields struct {
		Major  int    `json:"major"`
		Minor  int    `json:"minor"`
		Patch  int    `json:"patch"`
		Suffix string `json:"suffix"`
	}
	return struct {
		Version string `json:"version"`
		Fields  fields `json:"fields"`
	}{"SPDK v25.05.1 (thaw " + t.o.Version + ")", fields{25, 5, 1, ""}}, nil
}
