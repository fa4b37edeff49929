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
	"github.com/thaw-project/thaw/attacher/card"
	"github.com/thaw-project/thaw/keeper"
	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/node/cache"
	"github.com/thaw-project/thaw/node/imagemgmt"
	"github.com/thaw-project/thaw/node/present"
	"github.com/thaw-project/thaw/node/present/choose"
	"github.com/thaw-project/thaw/node/present/fuse"
	"github.com/thaw-project/thaw/node/remote"
	"github.com/thaw-project/thaw/node/snapshotter"
	"github.com/thaw-project/thaw/qcow2"
	"github.com/thaw-project/thaw/target/bdev"
)

// Server is a running thaw server: what its roles need, in one process.
type Server struct {
	config Config
	logger *slog.Logger

	// closers run in reverse at Close.
	closers []closer

	keeper    *keeper.Client
	fuse      *fuse.Presenter // nil without FUSE, and noFuse says why
	noFuse    error
	presenter *choose.Presenter // of the role node: shows each disk with what suits it
	closeData func() error      // closes what shows disks; nil when there is nothing
	services  services

	// Of the role store, else nil.
	store    attacher.Backend
	export   func() (attacher.Exporter, error) // nil when nothing is to be exported, as exporter
	exporter attacher.Exporter
	attacher *attacher.Attacher

	// Of the role card, else nil.
	card *card.Card

	// Of the role node, else nil.
	remote *remote.Remote // nil without remote targets, as cache
	cache  *cache.Cache   // nil when not enabled
	images *imagemgmt.Manager
	// scratches are this machine's own, when it has no store.
	scratches scratchFiles
	// elsewhereImages is what the snapshotter uses instead when there is no images.
	elsewhereImages imagemgmt.Service
	snapshots       *snapshotter.Snapshotter
}

type closer struct {
	what  string
	close func() error
}

// Serve runs a server until ctx ends. KeeperCommand is how a keeper process is
// started.
func Serve(ctx context.Context, config Config, keeperCommand []string, logger *slog.Logger) error {
	s := &Server{config: config, logger: logger, scratches: scratchFiles{dir: config.Paths().Scratch}}
	err := s.start(ctx, keeperCommand)
	if err == nil {
		logger.Info("ready", s.about()...)
		// Without a service manager both return false and no error.
		if _, nerr := systemd.SdNotify(false, systemd.SdNotifyReady); nerr != nil {
			logger.Warn("tell the service manager", "error", nerr)
		}
		err = s.services.wait(ctx, s.gone())
		_, _ = systemd.SdNotify(false, systemd.SdNotifyStopping)
	}
	return errors.Join(err, s.close())
}

// about is what the log says of a process that is ready.
func (s *Server) about() []any {
	p := s.config.Paths()
	about := []any{"root", s.config.Root, "run", s.config.Run}
	if s.config.Snapshots() {
		about = append(about, "snapshotter", p.SnapshotterSocket)
	}
	if s.config.Process != ProcessServer {
		about = append(about, "process", string(s.config.Process), "roles", s.config.Roles)
	}
	return about
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

// lock takes root and run: for this process alone, or for all but a server and others of
// its own name.
func (s *Server) lock() error {
	p := s.config.Paths()
	for _, l := range []struct{ all, own, what string }{{p.RootLock, p.ProcessRootLock, "root"}, {p.RunLock, p.ProcessRunLock, "run"}} {
		f, err := lock(l.all, l.what, l.own != "")
		if err != nil {
			return err
		}
		s.onClose(l.what+" lock", f.Close)
		if l.own == "" {
			continue
		}
		if f, err = lock(l.own, l.what, false); err != nil {
			return err
		}
		s.onClose(l.what+" lock of "+string(s.config.Process), f.Close)
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
	var control net.Listener
	var err error
	if p.Socket != "" {
		if control, err = s.listen(p.Socket); err != nil {
			return err
		}
	}
	var snapshots net.Listener
	if s.config.Snapshots() {
		if snapshots, err = s.listen(p.SnapshotterSocket); err != nil {
			return err
		}
	}
	metrics, err := s.listen(p.MetricSock)
	if err != nil {
		return err
	}
	if err := s.openStorage(ctx, registry); err != nil {
		return err
	}
	if err := s.startData(ctx, keeperCommand, registry); err != nil {
		return err
	}
	if s.config.Card() {
		if err := s.startCard(registry); err != nil {
			return err
		}
	}
	// Before the attacher, which deletes what is in nobody's use.
	if s.config.Images() {
		if err := s.startImages(ctx); err != nil {
			return err
		}
	}
	if s.config.Store() {
		if err := s.startStore(registry); err != nil {
			return err
		}
	}
	s.firstScratch(ctx)
	if s.config.Snapshots() {
		if err := s.startSnapshots(ctx, registry); err != nil {
			return err
		}
		snapshotServer := grpc.NewServer()
		snapshotsapi.RegisterSnapshotsServer(snapshotServer, snapshotservice.FromSnapshotter(s.snapshots))
		s.services.addGRPC("snapshotter", snapshots, snapshotServer)
	}
	s.sweepRemote()
	if err := s.serveParts(control); err != nil {
		return err
	}
	handler := observability(registry, s.health)
	s.services.addHTTP("metrics", metrics, handler)
	if s.config.Metrics.Address != "" {
		l, err := listenTCP("metrics.address", s.config.Metrics.Address)
		if err != nil {
			return err
		}
		s.services.addHTTP("metrics", l, handler)
	}
	s.services.start()
	s.onClose("services", func() error {
		// Before the server: a hold that ends with its connection is a dead converter's.
		if s.attacher != nil {
			s.attacher.Stop()
		}
		if s.card != nil {
			s.card.Stop()
		}
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

// openStorage opens what devices come from. It connects to no other machine's attacher.
func (s *Server) openStorage(ctx context.Context, registry *prometheus.Registry) error {
	if s.config.Store() {
		if err := s.openStore(ctx, true); err != nil {
			return err
		}
		registry.MustRegister(storeCollector{s.store})
	}
	if s.config.Images() {
		return s.openRemote(registry)
	}
	return nil
}

// open opens the device behind a presented disk.
func (s *Server) open(source present.Source, readOnly bool) (bdev.Device, error) {
	switch source.Kind {
	case present.SourceLvol:
		return s.openLvol(source, readOnly)
	case present.SourceQcow2:
		base, err := s.openLvol(source, true)
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

// openLvol opens the lvol of a source, wherever it is stored.
func (s *Server) openLvol(source present.Source, readOnly bool) (bdev.Device, error) {
	switch {
	case source.Target != "" && s.remote != nil && readOnly:
		return s.openRemoteLvol(source.Target, source.Lvol)
	case source.Target != "":
		return nil, kind.Errorf(kind.ReadOnly, "open lvol %s of target %s: lvols of other machines are read-only", source.Lvol, source.Target)
	case s.store != nil:
		return s.store.OpenLvol(source.Lvol, readOnly)
	case !readOnly:
		return nil, kind.Errorf(kind.ReadOnly, "open lvol %s: this machine has no store", source.Lvol)
	}
	return openScratchFile(s.config.Paths().Scratch, source.Lvol)
}

// layered is a writable layer that closes its base with itself.
type layered struct {
	bdev.Device
	base bdev.Device
}

func (l *layered) Close() error { return errors.Join(l.Device.Close(), l.base.Close()) }

func (s *Server) health(ctx context.Context) error {
	if s.attacher != nil {
		if _, err := s.attacher.GetStore(ctx, &attacherv1.GetStoreRequest{}); err != nil {
			return fmt.Errorf("attacher: %w", err)
		}
	}
	if s.elsewhereImages != nil {
		if _, err := s.elsewhereImages.List(ctx); err != nil {
			return fmt.Errorf("image-mgmt: %w", err)
		}
	}
	if s.fuse == nil {
		return nil
	}
	// A path in the mount makes the kernel ask this process.
	if _, err := os.Stat(s.config.Paths().Dev); err != nil {
		return fmt.Errorf("presentation: %w", err)
	}
	return nil
}
