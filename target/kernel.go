package target

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"syscall"
	"time"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/target/bdev"
	"github.com/thaw-project/thaw/target/rpc"
)

// Kernel shows devices as block devices of this machine. Errors are
// kind.Unsupported where the kernel lacks what is needed, kind.Exists for a node that
// is taken, kind.Denied without the rights. Methods are not called concurrently.
type Kernel interface {
	// StartNBD shows a device at path, /dev/nbdN, or where there is room when path is
	// empty, and returns the path. A node that an earlier process of the same owner
	// left behind is taken over with what its users have under way.
	StartNBD(ctx context.Context, path string, v View) (string, error)
	// StopNBD takes the node away; its users get errors.
	StopNBD(ctx context.Context, path string) error
	// ProbeUblk tells whether StartUblk can work.
	ProbeUblk(ctx context.Context) error
	// StartUblk shows a device as /dev/ublkb<id>; otherwise as StartNBD.
	StartUblk(ctx context.Context, id uint32, queues, depth uint32, v View) error
	StopUblk(ctx context.Context, id uint32) error
	// Close stops serving and leaves the nodes to the next process, whose users wait.
	Close() error
}

// View is what is shown of a disk.
type View struct {
	Device     bdev.Device
	BlockBytes uint32
	ReadOnly   bool
}

// shown is a disk shown by the kernel.
type shown struct {
	lease  *lease
	path   string
	id     uint32 // of ublk
	queues uint32
	depth  uint32
	nbd    bool
}

const (
	enodev = syscall.ENODEV
	// kernelPatience bounds a call of Kernel: the kernel flushes and waits for users.
	kernelPatience = 60 * time.Second
	// SPDK's defaults, and its limits.
	ublkDepth     = 128
	ublkQueues    = 1
	maxUblkDepth  = 1024
	maxUblkQueues = 64
)

var nbdPath = regexp.MustCompile(`^/dev/nbd(0|[1-9][0-9]{0,5})$`)

// errnoOfKernel is the answer for what Kernel returns: the errno below if there is one.
func errnoOfKernel(err error) error {
	var errno syscall.Errno
	switch {
	case errors.Is(err, kind.Unsupported):
		return rpc.Errno(syscall.ENOENT, err)
	case errors.As(err, &errno):
		return rpc.Errno(errno, err)
	case errors.Is(err, kind.Denied):
		return rpc.Errno(syscall.EPERM, err)
	}
	return errnoOf(err)
}

var errNoKernel = kind.Errorf(kind.Unsupported, "this target shows nothing by the kernel")

// lend takes a disk for the kernel.
func (t *Target) lend(name, what string) (*lease, View, error) {
	d, err := t.find(name)
	if err != nil {
		return nil, View{}, err
	}
	ro := d.driver.readOnly()
	l := &lease{what: what, write: !ro}
	if err := t.acquire(d, l); err != nil {
		return nil, View{}, err
	}
	return l, View{Device: l.dev, BlockBytes: d.blockBytes, ReadOnly: ro}, nil
}

type nbdParams struct {
	Bdev   string `json:"bdev_name"`
	Device string `json:"nbd_device,omitempty"`
}

func (t *Target) startNBD(params json.RawMessage) (any, error) {
	var p nbdParams
	if err := decode(params, &p); err != nil {
		return nil, err
	}
	if p.Device != "" && !nbdPath.MatchString(p.Device) {
		return nil, rpc.Errno(syscall.ENOENT, kind.Errorf(kind.Invalid, "%.64q is no /dev/nbdN", p.Device))
	}
	if p.Device != "" && t.kernel[p.Device] != nil {
		return nil, rpc.Errno(syscall.EBUSY, kind.Errorf(kind.InUse, "%s is in use", p.Device))
	}
	l, v, err := t.lend(p.Bdev, "nbd "+p.Device)
	if err != nil {
		return nil, err
	}
	path, err := "", errNoKernel
	if t.o.Kernel != nil {
		ctx, cancel := context.WithTimeout(t.ctx, kernelPatience)
		path, err = t.o.Kernel.StartNBD(ctx, p.Device, v)
		cancel()
	}
	if err != nil {
		l.release()
		return nil, errnoOfKernel(err)
	}
	p.Bdev, p.Device = l.disk.name, path
	t.show(&shown{lease: l, path: path, nbd: true})
	if err := t.keep(classKernel, path, "nbd_start_disk", p); err != nil {
		t.hide(path)
		return nil, err
	}
	return path, nil
}

// show notes what the kernel shows.
func (t *Target) show(s *shown) {
	t.kernel[s.path] = s
	s.lease.what = s.path
	s.lease.evict = func(wanted bool) {
		if err := t.hide(s.path); err != nil {
			t.log.Warn("device node stays", "path", s.path, "err", err)
		}
		key := objectKey(classKernel, s.path)
		if !wanted {
			t.lost(key)
		} else if err := t.forgetKeys(key); err != nil {
			t.log.Error("device node stays on record", "path", s.path, "err", err)
		}
	}
}

// hide takes away what the kernel shows at path.
func (t *Target) hide(path string) error {
	s := t.kernel[path]
	delete(t.kernel, path)
	ctx, cancel := context.WithTimeout(context.Background(), kernelPatience)
	defer cancel()
	var err error
	if s.nbd {
		err = t.o.Kernel.StopNBD(ctx, path)
	} else {
		err = t.o.Kernel.StopUblk(ctx, s.id)
	}
	s.lease.release()
	return err
}

func (t *Target) stopNBD(params json.RawMessage) (any, error) {
	var p struct {
		Device string `json:"nbd_device"`
	}
	if err := decode(params, &p); err != nil {
		return nil, err
	}
	return t.stopShown(p.Device)
}

func (t *Target) stopShown(path string) (any, error) {
	s := t.kernel[path]
	if s == nil && !t.isPending(classKernel, path) {
		return nil, rpc.Errno(syscall.ENODEV, kind.Errorf(kind.NotFound, "%.64q is not shown by this target", path))
	}
	if err := t.forget(classKernel, path); err != nil {
		return nil, err
	}
	if s != nil {
		if err := t.hide(path); err != nil {
			return nil, errnoOfKernel(err)
		}
	}
	return true, nil
}

// listShown lists what the kernel shows by one of its two ways, in order of path.
func (t *Target) listShown(nbd bool) (list []*shown) {
	for _, path := range slices.Sorted(maps.Keys(t.kernel)) {
		if s := t.kernel[path]; s.nbd == nbd {
			list = append(list, s)
		}
	}
	return list
}

func (t *Target) getNBD(params json.RawMessage) (any, error) {
	var p struct {
		Device string `json:"nbd_device,omitempty"`
	}
	if err := decode(params, &p); err != nil {
		return nil, err
	}
	type info struct {
		Device string `json:"nbd_device"`
		Bdev   string `json:"bdev_name"`
	}
	list := []info{}
	for _, s := range t.listShown(true) {
		if p.Device == "" || p.Device == s.path {
			list = append(list, info{s.path, s.lease.disk.name})
		}
	}
	if p.Device != "" && len(list) == 0 {
		return nil, rpc.Errno(syscall.ENODEV, kind.Errorf(kind.NotFound, "%.64q is not shown by this target", p.Device))
	}
	return list, nil
}

func (t *Target) createUblkTarget(params json.RawMessage) (any, error) {
	var p struct {
		CPUMask         string `json:"cpumask,omitempty"` // nothing here is bound to a CPU
		DisableUserCopy bool   `json:"disable_user_copy,omitempty"`
	}
	if err := decode(params, &p); err != nil {
		return nil, err
	}
	if t.ublkOn {
		return nil, rpc.Internal(rpc.Strerror(syscall.EBUSY), kind.Errorf(kind.Exists, "there is a ublk target already"))
	}
	err := errNoKernel
	if t.o.Kernel != nil {
		ctx, cancel := context.WithTimeout(t.ctx, kernelPatience)
		err = t.o.Kernel.ProbeUblk(ctx)
		cancel()
	}
	if err != nil {
		var e *rpc.Error
		errors.As(errnoOfKernel(err), &e)
		return nil, rpc.Internal(e.Message, err)
	}
	if err := t.keep(classUblkTarget, "target", "ublk_create_target", p); err != nil {
		return nil, err
	}
	t.ublkOn = true
	return true, nil
}

func (t *Target) destroyUblkTarget(params json.RawMessage) (any, error) {
	if err := without("ublk_destroy_target", params); err != nil {
		return nil, err
	}
	if !t.ublkOn && !t.isPending(classUblkTarget, "target") {
		return nil, rpc.Internal(rpc.Strerror(syscall.ENOENT), kind.Errorf(kind.NotFound, "there is no ublk target"))
	}
	if err := t.forget(classUblkTarget, "target"); err != nil {
		return nil, err
	}
	for _, s := range t.listShown(false) {
		if _, err := t.stopShown(s.path); err != nil {
			return nil, rpc.Internal("", err)
		}
	}
	t.ublkOn = false
	return true, nil
}

type ublkParams struct {
	Bdev   string `json:"bdev_name"`
	ID     uint32 `json:"ublk_id"`
	Queues uint32 `json:"num_queues,omitempty"`
	Depth  uint32 `json:"queue_depth,omitempty"`
}

func ublkPath(id uint32) string { return fmt.Sprintf("/dev/ublkb%d", id) }

func (t *Target) startUblk(params json.RawMessage) (any, error) {
	var p ublkParams
	if err := decode(params, &p); err != nil {
		return nil, err
	}
	path := ublkPath(p.ID)
	if p.Queues == 0 {
		p.Queues = ublkQueues
	}
	if p.Depth == 0 {
		p.Depth = ublkDepth
	}
	switch {
	case !t.ublkOn:
		return nil, rpc.Errno(syscall.ENODEV, kind.Errorf(kind.Invalid, "no ublk target: call ublk_create_target first"))
	case t.kernel[path] != nil:
		return nil, rpc.Errno(syscall.EBUSY, kind.Errorf(kind.Exists, "%s is in use", path))
	case p.Queues > maxUblkQueues || p.Depth > maxUblkDepth:
		return nil, rpc.Errno(syscall.EINVAL, kind.Errorf(kind.Invalid, "%d queues of %d: there can be %d of %d", p.Queues, p.Depth, maxUblkQueues, maxUblkDepth))
	}
	l, v, err := t.lend(p.Bdev, path)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(t.ctx, kernelPatience)
	defer cancel()
	if err := t.o.Kernel.StartUblk(ctx, p.ID, p.Queues, p.Depth, v); err != nil {
		l.release()
		return nil, errnoOfKernel(err)
	}
	p.Bdev = l.disk.name
	t.show(&shown{lease: l, path: path, id: p.ID, queues: p.Queues, depth: p.Depth})
	if err := t.keep(classKernel, path, "ublk_start_disk", p); err != nil {
		t.hide(path)
		return nil, err
	}
	return p.ID, nil
}

func (t *Target) stopUblk(params json.RawMessage) (any, error) {
	var p struct {
		ID uint32 `json:"ublk_id"`
	}
	if err := decode(params, &p); err != nil {
		return nil, err
	}
	return t.stopShown(ublkPath(p.ID))
}

func (t *Target) getUblk(params json.RawMessage) (any, error) {
	var p struct {
		ID *uint32 `json:"ublk_id,omitempty"`
	}
	if err := decode(params, &p); err != nil {
		return nil, err
	}
	type info struct {
		Device string `json:"ublk_device"`
		ID     uint32 `json:"id"`
		Depth  uint32 `json:"queue_depth"`
		Queues uint32 `json:"num_queues"`
		Bdev   string `json:"bdev_name"`
	}
	list := []info{}
	for _, s := range t.listShown(false) {
		if p.ID == nil || *p.ID == s.id {
			list = append(list, info{s.path, s.id, s.depth, s.queues, s.lease.disk.name})
		}
	}
	if p.ID != nil && len(list) == 0 {
		return nil, rpc.Errno(syscall.ENODEV, kind.Errorf(kind.NotFound, "no ublk disk %d", *p.ID))
	}
	return list, nil
}

// closeKernel ends what the kernel shows: with a record the nodes stay for the next
// process, else they go.
func (t *Target) closeKernel() {
	if t.o.Kernel == nil {
		return
	}
	if t.db == nil {
		for _, path := range slices.Sorted(maps.Keys(t.kernel)) {
			if err := t.hide(path); err != nil {
				t.log.Warn("device node stays", "path", path, "err", err)
			}
		}
	}
	if err := t.o.Kernel.Close(); err != nil {
		t.log.Warn("stop serving device nodes", "err", err)
	}
	for path, s := range t.kernel {
		delete(t.kernel, path)
		s.lease.release()
	}
}
