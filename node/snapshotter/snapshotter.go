// Package snapshotter is containerd's snapshots.Snapshotter for Thaw.
//
// Ordinary images get what containerd's overlayfs snapshotter gives. A Prepare that
// carries the annotations of a converted image attaches the image's blocks instead
// of having its layers unpacked, and answers that the layer is there. Whatever a
// committed snapshot promises can be mounted: a container of the image, a child
// image on any of its layers, a diff.
//
// The package sees blocks through imagemgmt.Service and the kernel through Mounter,
// and must not know storage, transports or registries.
package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/containerd/v2/plugins/snapshots/overlay/overlayutils"
	"github.com/containerd/continuity/fs"
	"github.com/containerd/errdefs"
	"github.com/prometheus/client_golang/prometheus"
	bolt "go.etcd.io/bbolt"

	"github.com/thaw-project/thaw/failpoint"
	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/node/imagemgmt"
)

// Options configures New.
type Options struct {
	// Root holds metadata.db and snapshots/, on a file system that overlayfs takes
	// as an upperdir.
	Root string
	// MountDir holds one mount point per attached block.
	MountDir string
	// Images attaches blocks.
	Images imagemgmt.Service
	// Mounter is the kernel's, nil takes the real one.
	Mounter Mounter
	// Targets are the names of the targets that this node can attach blocks of;
	// annotations that name another fall back to ordinary layers.
	Targets []string
	// AttachTimeout bounds attaching and mounting one block, 10 s if 0.
	AttachTimeout time.Duration
	// LeafHold is how long an image's leaf block stays attached after the last
	// remote Prepare while its top layer is not committed yet, 10 min if 0.
	LeafHold time.Duration
	// WritableBytes is the size of the writable layer of a container on an EROFS block in
	// mode overlaybd, which is a disk with an ext4. When it is 0, or image-mgmt has no scratch
	// block for it, such containers write to a directory.
	WritableBytes int64
	// AsyncRemove leaves the cleaning up after a Remove to Cleanup.
	AsyncRemove bool
	// MountOptions are appended to the options of every overlay.
	MountOptions []string
	Logger       *slog.Logger
	// Registerer takes the metrics, nil for none.
	Registerer prometheus.Registerer

	// step is called at each point where a test may kill the process.
	step func(string)
	// patience is how often the janitor looks, and linger how long an unused block
	// stays mounted after a commit.
	patience, linger time.Duration
}

func (o *Options) ensureDefaults() {
	if o.AttachTimeout == 0 {
		o.AttachTimeout = 10 * time.Second
	}
	if o.LeafHold == 0 {
		o.LeafHold = 10 * time.Minute
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.step == nil {
		o.step = func(name string) { failpoint.Reach("snapshotter: " + name) }
	}
	if o.patience == 0 {
		o.patience = 30 * time.Second
	}
	if o.linger == 0 {
		o.linger = 10 * time.Second
	}
}

func (o *Options) validate() error {
	for _, p := range []struct{ what, path string }{{"root", o.Root}, {"mount directory", o.MountDir}} {
		// Overlay options separate paths by ',' and ':'.
		if !filepath.IsAbs(p.path) || strings.ContainsAny(p.path, ",:\\") {
			return kind.Errorf(kind.Invalid, "snapshotter %s %q: must be absolute, without , : or \\", p.what, p.path)
		}
	}
	if o.Images == nil {
		return kind.Errorf(kind.Invalid, "snapshotter without image-mgmt")
	}
	if o.WritableBytes < 0 || o.WritableBytes%512 != 0 {
		return kind.Errorf(kind.Invalid, "writable size of %d bytes: must be a multiple of 512", o.WritableBytes)
	}
	return nil
}

// Snapshotter implements snapshots.Snapshotter and snapshots.Cleaner. All methods
// may be called concurrently.
type Snapshotter struct {
	o       Options
	mounter Mounter
	ms      *storage.MetaStore
	metrics metrics
	log     *slog.Logger
	shared  *shared
	seen    seenLayers
	drives  drives

	overlayOptions []string
	scratch        scratchBlocks
	// diskIDPrefix begins the ids under which image-mgmt knows this snapshotter's
	// writable disks.
	diskIDPrefix string

	// ctx ends at Close; every goroutine is in wg and heeds it.
	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup

	// closeMu guards closed; go holds it while adding to wg, so that no goroutine
	// starts after Close began to wait.
	closeMu sync.Mutex
	closed  bool
}

var (
	_ snapshots.Snapshotter = (*Snapshotter)(nil)
	_ snapshots.Cleaner     = (*Snapshotter)(nil)
)

// New opens the snapshotter at o.Root, finishes what an earlier process left half
// done, and takes away mounts and attachments that no snapshot needs. Blocks that
// snapshots need are mounted again when somebody asks for them. ctx bounds New only.
func New(ctx context.Context, o Options) (*Snapshotter, error) {
	o.ensureDefaults()
	if err := o.validate(); err != nil {
		return nil, err
	}
	for _, dir := range []string{o.Root, filepath.Join(o.Root, "snapshots"), o.MountDir} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, fmt.Errorf("make snapshotter directory: %w", err)
		}
	}
	dtype, err := fs.SupportsDType(o.Root)
	if err != nil {
		return nil, fmt.Errorf("check %s for d_type: %w", o.Root, err)
	}
	if !dtype {
		return nil, kind.Errorf(kind.Unsupported, "%s: its file system has no d_type; format xfs with ftype=1", o.Root)
	}
	ms, err := newMetaStore(o.Root)
	if err != nil {
		return nil, err
	}
	s := &Snapshotter{o: o, mounter: o.Mounter, ms: ms, log: o.Logger, overlayOptions: overlayOptions(o)}
	if s.mounter == nil {
		s.mounter = systemMounter{}
	}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	s.shared = newShared(s)
	if err = s.metrics.init(s, o.Registerer); err == nil {
		err = s.update(ctx, func(_ context.Context, r records) error {
			err := r.init()
			s.diskIDPrefix = "snapshot-" + r.instance() + "-"
			return err
		})
	}
	if err == nil {
		err = s.reconcile(ctx)
	}
	if err != nil {
		return nil, errors.Join(err, s.Close())
	}
	s.run(s.janitor)
	return s, nil
}

func newMetaStore(root string) (*storage.MetaStore, error) {
	ms, err := storage.NewMetaStore(filepath.Join(root, "metadata.db"), func(b *bolt.Options) error {
		b.Timeout = 5 * time.Second // another server on this root is an error, not a wait
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("open snapshot metadata: %w", err)
	}
	return ms, nil
}

// overlayOptions are containerd's: index=off, and userxattr in a user namespace.
func overlayOptions(o Options) []string {
	options := append([]string(nil), o.MountOptions...)
	if !hasOption(options, "userxattr") {
		userxattr, err := overlayutils.NeedsUserXAttr(o.Root)
		if err != nil {
			o.Logger.Warn("cannot tell whether overlays need userxattr", "assumed", userxattr, "error", err)
		}
		if userxattr {
			options = append(options, "userxattr")
		}
	}
	if _, err := os.Stat("/sys/module/overlay/parameters/index"); err == nil && !hasOption(options, "index") {
		options = append(options, "index=off")
	}
	return options
}

func hasOption(options []string, key string) bool {
	for _, o := range options {
		if name, _, _ := strings.Cut(o, "="); name == key {
			return true
		}
	}
	return false
}

// run starts f as a goroutine that Close waits for; after Close it does nothing and
// returns false.
func (s *Snapshotter) run(f func()) bool {
	s.closeMu.Lock()
	defer s.closeMu.Unlock()
	if !s.closed {
		s.wg.Go(f)
	}
	return !s.closed
}

// Close stops background work and closes the metadata. Mounts and attachments stay,
// for containers run on; the next New takes them over.
func (s *Snapshotter) Close() error {
	s.closeMu.Lock()
	s.closed = true
	s.closeMu.Unlock()
	s.cancel()
	s.wg.Wait()
	s.metrics.unregister()
	return s.ms.Close()
}

// Stat implements snapshots.Snapshotter.
func (s *Snapshotter) Stat(ctx context.Context, key string) (info snapshots.Info, err error) {
	err = s.view(ctx, func(ctx context.Context, _ records) error {
		_, info, _, err = storage.GetInfo(ctx, key)
		return err
	})
	return info, toErrdefs(err)
}

// Update implements snapshots.Snapshotter.
func (s *Snapshotter) Update(ctx context.Context, info snapshots.Info, fieldpaths ...string) (updated snapshots.Info, err error) {
	err = s.update(ctx, func(ctx context.Context, _ records) error {
		updated, err = storage.UpdateInfo(ctx, info, fieldpaths...)
		return err
	})
	return updated, toErrdefs(err)
}

// Usage implements snapshots.Snapshotter. An active snapshot's is what its directory
// or its disk's file occupies now; a remote layer occupies nothing on this node.
func (s *Snapshotter) Usage(ctx context.Context, key string) (usage snapshots.Usage, err error) {
	var own link
	var info snapshots.Info
	err = s.view(ctx, func(ctx context.Context, r records) error {
		if own.id, info, usage, err = storage.GetInfo(ctx, key); err == nil {
			own.record, err = r.get(own.id)
		}
		return err
	})
	if err != nil || info.Kind != snapshots.KindActive {
		return usage, toErrdefs(err)
	}
	if own.Form == formDisk {
		usage, err = s.disk(own).usage(ctx)
		return usage, toErrdefs(err)
	}
	du, err := fs.DiskUsage(ctx, s.upperDir(own.id))
	return snapshots.Usage(du), toErrdefs(err)
}

// Walk implements snapshots.Snapshotter. fn sees the snapshots of one moment, and may
// call the snapshotter.
func (s *Snapshotter) Walk(ctx context.Context, fn snapshots.WalkFunc, filters ...string) error {
	var infos []snapshots.Info
	err := s.view(ctx, func(ctx context.Context, _ records) error {
		return storage.WalkInfo(ctx, func(_ context.Context, info snapshots.Info) error {
			infos = append(infos, info)
			return nil
		}, filters...)
	})
	if errdefs.IsNotFound(err) {
		return nil // no snapshot was ever made
	}
	if err != nil {
		return toErrdefs(err)
	}
	for _, info := range infos {
		if err := fn(ctx, info); err != nil {
			return err
		}
	}
	return nil
}

// Mounts implements snapshots.Snapshotter. Blocks and disks that the snapshot needs
// are brought up first if they are not.
func (s *Snapshotter) Mounts(ctx context.Context, key string) ([]mount.Mount, error) {
	mounts, err := s.mounts(ctx, key)
	return mounts, toErrdefs(err)
}

func (s *Snapshotter) mounts(ctx context.Context, key string) ([]mount.Mount, error) {
	var own link
	var info snapshots.Info
	var chain []link
	err := s.view(ctx, func(ctx context.Context, r records) (err error) {
		if own.id, info, _, err = storage.GetInfo(ctx, key); err != nil {
			return err
		}
		if info.Kind == snapshots.KindCommitted {
			return fmt.Errorf("mounts of snapshot %q: it is committed: %w", key, errdefs.ErrFailedPrecondition)
		}
		if own.record, err = r.get(own.id); err != nil {
			return err
		}
		chain, err = r.chain(ctx, info.Parent)
		return err
	})
	if err != nil {
		return nil, err
	}
	st := s.stack(own.id, chain)
	release, err := s.bringUp(ctx, st)
	if err != nil {
		return nil, err
	}
	defer release()
	device := ""
	if own.Form == formDisk {
		var done func()
		if device, done, err = s.shared.acquire(ctx, s.disk(own)); err != nil {
			return nil, err
		}
		defer done()
	}
	return s.mountList(info.Kind, own, st, device)
}

// toErrdefs gives errors of Thaw's kinds the class that containerd tells a client.
// What image-mgmt or the kernel did not find is not a snapshot that was not found.
func toErrdefs(err error) error {
	if err == nil {
		return nil
	}
	for _, known := range []error{
		errdefs.ErrAlreadyExists, errdefs.ErrNotFound, errdefs.ErrFailedPrecondition,
		errdefs.ErrInvalidArgument, context.Canceled, context.DeadlineExceeded,
	} {
		if errors.Is(err, known) {
			return err
		}
	}
	switch kind.Of(err) {
	case kind.InUse:
		return fmt.Errorf("%w: %w", err, errdefs.ErrFailedPrecondition)
	case kind.NoSpace:
		return fmt.Errorf("%w: %w", err, errdefs.ErrResourceExhausted)
	case kind.Unsupported:
		return fmt.Errorf("%w: %w", err, errdefs.ErrNotImplemented)
	case kind.Corrupt:
		return fmt.Errorf("%w: %w", err, errdefs.ErrDataLoss)
	case kind.NotFound, kind.Unavailable, kind.Canceled:
		return fmt.Errorf("%w: %w", err, errdefs.ErrUnavailable)
	}
	return err
}
