// Package daemon wires Thaw's parts into the processes that run: only cmd and e2e
// import it. It holds no logic of its own beyond order of start and stop.
package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"time"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/contrib/snapshotservice"
	systemd "github.com/coreos/go-systemd/v22/daemon"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"google.golang.org/grpc"

	attacherv1 "github.com/thaw-project/thaw/api/attacher/v1"
	"github.com/thaw-project/thaw/attacher"
	"github.com/thaw-project/thaw/attacher/rpc"
	"github.com/thaw-project/thaw/keeper"
	"github.com/thaw-project/thaw/lvol"
	"github.com/thaw-project/thaw/node/imagemgmt"
	"github.com/thaw-project/thaw/node/present"
	"github.com/thaw-project/thaw/node/present/fuse"
	"github.com/thaw-project/thaw/node/snapshotter"
	"github.com/thaw-project/thaw/qcow2"
	"github.com/thaw-project/thaw/target/bdev"
)

// Server is a running thaw server: target, attacher, image-mgmt and snapshotter in
// one process.
type Server struct {
	config Config
	logger *slog.Logger

	// closers run in reverse at Close.
	closers []closer

	store     *lvol.Store
	keeper    *keeper.Client
	presenter *fuse.Presenter
	images    *imagemgmt.Manager
	attacher  *attacher.Attacher
	snapshots *snapshotter.Snapshotter
	services  services
}

type closer struct {
	what  string
	close func() error
}

// Serve runs a server until ctx ends. KeeperCommand is how a keeper process is
// started.
func Serve(ctx context.Context, config Config, keeperCommand []string, logger *slog.Logger) error {
	s := &Server{config: config, logger: logger}
	err := s.start(ctx, keeperCommand)
	if err == nil {
		logger.Info("ready", "root", config.Root, "run", config.Run, "snapshotter", config.Paths().SnapshotterSocket)
		// Without a service manager both return false and no error.
		if _, nerr := systemd.SdNotify(false, systemd.SdNotifyReady); nerr != nil {
			logger.Warn("tell the service manager", "error", nerr)
		}
		err = s.services.wait(ctx, s.presenter.Gone())
		_, _ = systemd.SdNotify(false, systemd.SdNotifyStopping)
	}
	return errors.Join(err, s.close())
}

func (s *Server) onClose(what string, f func() error) {
	s.closers = append(s.closers, closer{what, f})
}

func (s *Server) close() error {
	var errs []error
	for i := len(s.closers) - 1; i >= 0; i-- {
		c := s.closers[i]
		started := time.Now()
		if err := c.close(); err != nil {
			errs = append(errs, fmt.Errorf("stop %s: %w", c.what, err))
		}
		s.logger.Debug("stopped", "part", c.what, "took", time.Since(started))
	}
	return errors.Join(errs...)
}

// lock takes root and run for this process alone.
func (s *Server) lock() error {
	p := s.config.Paths()
	for _, l := range []struct{ path, what string }{{p.RootLock, "root"}, {p.RunLock, "run"}} {
		f, err := lock(l.path, l.what)
		if err != nil {
			return err
		}
		s.onClose(l.what+" lock", f.Close)
	}
	return nil
}

func (s *Server) start(ctx context.Context, keeperCommand []string) error {
	p := s.config.Paths()
	if err := s.lock(); err != nil {
		return err
	}
	registry := prometheus.NewRegistry()
	registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))

	// Listeners first: the cheapest thing that can fail, and containerd's calls
	// queue while the rest starts.
	control, err := s.listen(p.Socket)
	if err != nil {
		return err
	}
	snapshots, err := s.listen(p.SnapshotterSocket)
	if err != nil {
		return err
	}
	metrics, err := s.listen(p.MetricSock)
	if err != nil {
		return err
	}

	if s.store, err = ensurePool(s.config, s.logger.With("part", "lvol")); err != nil {
		return err
	}
	s.onClose("pool", s.store.Close)
	registry.MustRegister(storeCollector{s.store})

	if err := s.startData(ctx, keeperCommand, registry); err != nil {
		return err
	}
	if err := s.startControl(ctx, registry); err != nil {
		return err
	}

	controlServer := grpc.NewServer(rpc.ServerOptions()...)
	attacherv1.RegisterAttacherServer(controlServer, s.attacher)
	s.services.addGRPC("attacher", control, controlServer)
	snapshotServer := grpc.NewServer()
	snapshotsapi.RegisterSnapshotsServer(snapshotServer, snapshotservice.FromSnapshotter(s.snapshots))
	s.services.addGRPC("snapshotter", snapshots, snapshotServer)
	handler := observability(registry, s.health)
	s.services.addHTTP("metrics", metrics, handler)
	if s.config.Metrics.Address != "" {
		l, err := listenTCP(s.config.Metrics.Address)
		if err != nil {
			return err
		}
		s.services.addHTTP("metrics", l, handler)
	}
	s.services.start()
	s.onClose("services", func() error {
		// Before the server: a hold that ends with its connection is a dead converter's.
		s.attacher.Stop()
		s.services.stop()
		return nil
	})
	return nil
}

func (s *Server) listen(path string) (net.Listener, error) {
	l, err := listenUnix(path)
	if err != nil {
		return nil, err
	}
	s.onClose(path, func() error {
		if err := l.Close(); !errors.Is(err, net.ErrClosed) {
			return err
		}
		return nil
	})
	return l, nil
}

// startData brings up what containers' I/O passes through.
func (s *Server) startData(ctx context.Context, keeperCommand []string, registry *prometheus.Registry) error {
	p := s.config.Paths()
	var err error
	s.keeper, err = keeper.Ensure(ctx, keeper.Options{Socket: p.KeeperSocket, Command: keeperCommand, Logger: s.logger.With("part", "keeper")})
	if err != nil {
		return err
	}
	s.onClose("keeper client", s.keeper.Close)
	s.presenter, err = fuse.New(fuse.Options{
		Dir: p.Dev, StatePath: p.FuseState, Keeper: s.keeper, Open: s.open,
		Logger: s.logger.With("part", "fuse"), Registerer: registry,
	})
	if err != nil {
		// A keeper with nothing to keep would wait for ever.
		if held, lerr := s.keeper.List(ctx); lerr == nil && len(held) == 0 {
			err = errors.Join(err, s.keeper.Exit(ctx))
		}
		return err
	}
	s.onClose("presentation", s.closePresenter)
	return nil
}

// closePresenter leaves disks that are in use to the next server; with none left
// nothing of this one stays behind.
func (s *Server) closePresenter() error {
	if s.presenter == nil { // torn down
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	disks, err := s.presenter.List(ctx)
	if err == nil && len(disks) == 0 {
		return errors.Join(s.presenter.Teardown(ctx), s.keeper.Exit(ctx))
	}
	s.logger.Info("disks stay attached and wait for the next server", "disks", len(disks))
	return errors.Join(err, s.presenter.Close())
}

// open opens the device behind a presented disk.
func (s *Server) open(source present.Source, readOnly bool) (bdev.Device, error) {
	switch source.Kind {
	case present.SourceLvol:
		return s.store.OpenLvol(source.Lvol, readOnly)
	case present.SourceQcow2:
		base, err := s.store.OpenLvol(source.Lvol, true)
		if err != nil {
			return nil, err
		}
		image, err := qcow2.Open(source.Path, qcow2.OpenOptions{
			ReadOnly: readOnly, Backing: base, BackingSizeBytes: base.SizeBytes(), Logger: s.logger.With("part", "qcow2"),
		})
		if err != nil {
			base.Close()
			return nil, err
		}
		return &layered{Device: image, base: base}, nil
	}
	return nil, fmt.Errorf("open disk: unknown source %q", source.Kind)
}

// layered is a writable layer that closes its base with itself.
type layered struct {
	bdev.Device
	base bdev.Device
}

func (l *layered) Close() error { return errors.Join(l.Device.Close(), l.base.Close()) }

// startControl brings up what decides which disks there are.
func (s *Server) startControl(ctx context.Context, registry *prometheus.Registry) error {
	p := s.config.Paths()
	var err error
	s.images, err = imagemgmt.New(imagemgmt.Options{
		Presenter: s.presenter, DBPath: p.ImagemgmtDB, Logger: s.logger.With("part", "imagemgmt"),
		Own: s.config.Target,
		Lookup: func(ctx context.Context, block imagemgmt.Block) error {
			_, err := s.store.Get(block.Name)
			return err
		},
	})
	if err != nil {
		return err
	}
	s.onClose("image-mgmt", s.images.Close)
	s.attacher, err = attacher.New(attacher.Options{
		Lvols: s.store, Presenter: s.presenter, DBPath: p.AttacherDB, Target: s.config.Target,
		Attached: s.images.Attached,
		Logger:   s.logger.With("part", "attacher"),
	})
	if err != nil {
		return err
	}
	s.onClose("attacher", s.attacher.Close)
	scratch, err := s.attacher.EnsureScratch(ctx, int64(s.config.Snapshotter.WritableSize))
	if err != nil {
		// Only containers in mode overlaybd on EROFS miss it, and only its limit
		// on size: they write to a directory instead.
		s.logger.Warn("no scratch volume: writable layers over erofs blocks have no size limit", "error", err)
	}
	s.snapshots, err = snapshotter.New(ctx, snapshotter.Options{
		Root: p.Snapshotter, MountDir: p.Mounts, Images: s.images, Targets: []string{s.config.Target},
		AttachTimeout: time.Duration(s.config.Snapshotter.AttachTimeout),
		AsyncRemove:   s.config.Snapshotter.AsyncRemove,
		ScratchBlock:  scratch,
		Logger:        s.logger.With("part", "snapshotter"), Registerer: registry,
	})
	if err != nil {
		return err
	}
	s.onClose("snapshotter", s.snapshots.Close)
	return nil
}

func (s *Server) health(ctx context.Context) error {
	if _, err := s.attacher.GetStore(ctx, &attacherv1.GetStoreRequest{}); err != nil {
		return fmt.Errorf("attacher: %w", err)
	}
	// A path in the mount makes the kernel ask this process.
	if _, err := os.Stat(s.config.Paths().Dev); err != nil {
		return fmt.Errorf("presentation: %w", err)
	}
	return nil
}
