package daemon

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/thaw-project/thaw/keeper"
	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/node/imagemgmt"
	"github.com/thaw-project/thaw/node/mount"
	"github.com/thaw-project/thaw/node/present"
	"github.com/thaw-project/thaw/node/present/choose"
	"github.com/thaw-project/thaw/node/present/fabrics"
	"github.com/thaw-project/thaw/node/present/fuse"
	"github.com/thaw-project/thaw/node/present/nbd"
	"github.com/thaw-project/thaw/node/present/ublk"
	"github.com/thaw-project/thaw/node/remote"
)

// PresentationAuto chooses the presentation by what works.
const PresentationAuto = "auto"

// PresentationConfig says how disks are shown to the kernel.
type PresentationConfig struct {
	// Kind is PresentationAuto, or the name of the only presentation to use for the disks
	// that it can show.
	Kind string `toml:"kind"`
}

// Force is what package choose calls the configuration's wish.
func (p PresentationConfig) Force() string {
	if p.Kind == PresentationAuto {
		return ""
	}
	return p.Kind
}

// ProbePresentations asks each presentation whether it works on this machine: nil, or why
// not. Details has what else there is to say of one. Kernel modules are loaded.
func ProbePresentations(ctx context.Context) (unusable map[string]error, details map[string]string) {
	unusable, details = make(map[string]error), make(map[string]string)
	var transports []string
	var errs []error
	for _, transport := range []string{fabrics.TransportTCP, fabrics.TransportRDMA} {
		if err := fabrics.Probe(ctx, transport); err != nil {
			errs = append(errs, err)
		} else {
			transports = append(transports, transport)
		}
	}
	if details[choose.Fabrics] = "over " + strings.Join(transports, " and "); len(transports) == 0 {
		unusable[choose.Fabrics] = errs[0]
	} else {
		unusable[choose.Fabrics] = nil
	}
	unusable[choose.Ublk] = ublk.Probe()
	unusable[choose.NBD] = nbd.Probe(ctx)
	unusable[choose.Fuse] = nil
	for _, f := range mount.Probe() {
		switch {
		case f.Name == mount.FactFUSE && !f.OK, f.Name == mount.FactRoot && !f.OK:
			unusable[choose.Fuse] = kind.Errorf(kind.Unsupported, "%s", f.Detail)
		case f.Name == mount.FactFUSEResend && !f.OK:
			details[choose.Fuse] = "but a killed server loses requests: " + f.Detail
		}
	}
	return unusable, details
}

// showsDisks tells whether this process shows disks to its own machine's kernel.
func (s *Server) showsDisks() bool {
	return s.config.Images() && s.config.ImagesPart.Mode == ImagesHost
}

// startData brings up what containers' I/O passes through.
func (s *Server) startData(ctx context.Context, keeperCommand []string, registry *prometheus.Registry) error {
	if !s.config.Store() && !s.showsDisks() {
		return nil
	}
	if err := s.startFuse(ctx, keeperCommand, registry); err != nil {
		return err
	}
	if !s.showsDisks() {
		return nil // what converters write to are files
	}
	unusable, _ := ProbePresentations(ctx)
	if len(s.config.Remotes()) == 0 {
		unusable[choose.Fabrics] = kind.Errorf(kind.Unsupported, "no other machine's store is configured")
	}
	for _, r := range s.config.Remotes() {
		if r.Transport == remote.TransportRBD {
			unusable[choose.Fabrics] = kind.Errorf(kind.Unsupported, "store %s exports images of Ceph", r.Name)
		}
	}
	if s.fuse == nil {
		unusable[choose.Fuse] = s.noFuse
	}
	// FUSE is last to be closed: closing it ends the wait for other machines.
	var candidates []choose.Candidate
	for _, name := range []string{choose.Fabrics, choose.Ublk, choose.NBD, choose.Fuse} {
		c := choose.Candidate{Name: name, Unusable: unusable[name]}
		if err := s.presentation(ctx, &c, registry); err != nil {
			return err
		}
		candidates = append(candidates, c)
	}
	var err error
	s.presenter, err = choose.New(ctx, choose.Options{
		Candidates: candidates, Force: s.config.Presentation.Force(), Logger: s.logger.With("part", "presentation"),
	})
	if err != nil {
		for _, c := range candidates {
			if c.Presenter != nil && c.Name != choose.Fuse { // FUSE has its own closer
				err = errors.Join(err, c.Presenter.Close())
			}
		}
		return err
	}
	s.closeData = s.closePresenter
	if s.remote != nil {
		for _, d := range s.presenter.Decisions() {
			if d.Class == choose.Remote {
				s.remote.SetKernelHost(d.Name == choose.Fabrics)
			}
		}
	}
	return nil
}

// startFuse mounts the FUSE presentation and has a keeper hold it. Only a store, whose
// converters write to its files, cannot do without.
func (s *Server) startFuse(ctx context.Context, keeperCommand []string, registry *prometheus.Registry) error {
	if _, err := os.Stat("/dev/fuse"); err != nil && !s.config.Store() {
		s.noFuse = kind.Wrap(kind.Unsupported, err)
		return nil
	}
	p := s.config.Paths()
	var err error
	s.keeper, err = keeper.Ensure(ctx, keeper.Options{Socket: p.KeeperSocket, Command: keeperCommand, Logger: s.logger.With("part", "keeper")})
	if err != nil {
		return err
	}
	s.onClose("keeper client", s.keeper.Close)
	s.fuse, err = fuse.New(fuse.Options{
		Dir: p.Dev, StatePath: p.FuseState, Keeper: s.keeper, Open: s.open, Interrupt: s.closeRemote,
		Logger: s.logger.With("part", "fuse"), Registerer: registry,
	})
	if err != nil {
		// A keeper with nothing to keep would wait for ever.
		if held, lerr := s.keeper.List(ctx); lerr == nil && len(held) == 0 {
			err = errors.Join(err, s.keeper.Exit(ctx))
		}
		return err
	}
	s.closeData = s.closeFuse
	s.onClose("presentation", func() error {
		if s.closeData == nil { // torn down
			return nil
		}
		return s.closeData()
	})
	return nil
}

// presentation makes the presenter of a candidate that can be used, or that has disks
// from before.
func (s *Server) presentation(ctx context.Context, c *choose.Candidate, registry *prometheus.Registry) error {
	p := s.config.Paths()
	state := map[string]string{choose.Fabrics: p.FabricsState, choose.Ublk: p.UblkState, choose.NBD: p.NBDState}[c.Name]
	if c.Name != choose.Fuse && c.Unusable != nil {
		if _, err := os.Stat(state); err != nil {
			return nil // nothing to serve, and nothing to serve it with
		}
	}
	logger := s.logger.With("part", c.Name)
	var presenter choose.Chosen
	var err error
	switch c.Name {
	case choose.Fuse:
		if s.fuse == nil {
			return nil
		}
		presenter = s.fuse
	case choose.Fabrics:
		presenter, err = fabrics.New(ctx, fabrics.Options{
			StatePath: state, Attach: s.attachForKernel, Detach: s.detachFromKernel,
			Timeouts: fabrics.Timeouts{ControllerLoss: s.lossTimeout()}, Logger: logger, Registerer: registry,
		})
	case choose.Ublk:
		presenter, err = ublk.New(ublk.Options{StatePath: state, Open: s.open, Logger: logger, Registerer: registry})
	case choose.NBD:
		presenter, err = nbd.New(ctx, nbd.Options{StatePath: state, Open: s.open, Interrupt: s.closeRemote, DeadTimeout: s.lossTimeout(), Logger: logger, Registerer: registry})
	}
	if err == nil {
		c.Presenter = presenter
		return nil
	}
	if c.Unusable != nil {
		logger.Error("disks of an earlier server cannot be served", "error", err)
		return nil
	}
	return fmt.Errorf("presentation %s: %w", c.Name, err)
}

// lossTimeout is the longest of the configured remote targets.
func (s *Server) lossTimeout() (longest time.Duration) {
	for _, r := range s.config.Remotes() {
		longest = max(longest, time.Duration(r.LossTimeout))
	}
	return longest
}

// attachForKernel makes a block visible to the kernel's own NVMe host.
func (s *Server) attachForKernel(ctx context.Context, target, block string) (fabrics.Export, error) {
	if s.remote == nil {
		return fabrics.Export{}, kind.Errorf(kind.NotFound, "target %s is not configured on this node", target)
	}
	if err := s.remote.Attach(ctx, target, block); err != nil {
		return fabrics.Export{}, err
	}
	x, err := s.remote.Export(target, block)
	if err != nil {
		return fabrics.Export{}, err
	}
	if x.RBD != nil {
		return fabrics.Export{}, kind.Errorf(kind.Unsupported, "block %s of target %s is an image of Ceph, which nvme-fabrics does not reach", block, target)
	}
	out := fabrics.Export{Subsystem: x.Subsystem, HostNQN: x.HostNQN, HostID: x.HostID, NSID: x.NSID, UUID: x.UUID, SizeBytes: x.SizeBytes}
	for _, p := range x.Portals {
		out.Portals = append(out.Portals, fabrics.Portal(p))
	}
	return out, nil
}

// detachFromKernel ends that, unless a writable layer still reads the block.
func (s *Server) detachFromKernel(ctx context.Context, target, block string) error {
	if s.remote == nil {
		return nil
	}
	if s.images != nil && s.images.Layered(imagemgmt.Block{Target: target, Name: block}) {
		return kind.Errorf(kind.InUse, "a writable layer is over it")
	}
	return s.remote.Detach(ctx, target, block)
}

// closePresenter leaves disks that are in use to the next server; with none left
// nothing of this one stays behind.
func (s *Server) closePresenter() error {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	disks, err := s.presenter.List(ctx)
	if err == nil && len(disks) == 0 {
		return errors.Join(s.presenter.Teardown(ctx), s.exitKeeper(ctx))
	}
	s.logger.Info("disks stay attached and wait for the next server", "disks", len(disks))
	return errors.Join(err, s.presenter.Close())
}

// closeFuse is closePresenter for a store without containers.
func (s *Server) closeFuse() error {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	disks, err := s.fuse.List(ctx)
	if err == nil && len(disks) == 0 {
		return errors.Join(s.fuse.Teardown(ctx), s.exitKeeper(ctx))
	}
	s.logger.Info("disks stay attached and wait for the next server", "disks", len(disks))
	return errors.Join(err, s.fuse.Close())
}

func (s *Server) exitKeeper(ctx context.Context) error {
	if s.keeper == nil {
		return nil
	}
	return s.keeper.Exit(ctx)
}

// gone is closed when the FUSE mount was ended from outside.
func (s *Server) gone() <-chan struct{} {
	if s.fuse == nil {
		return nil
	}
	return s.fuse.Gone()
}

// shown lists what is presented, by all presentations.
func (s *Server) shown(ctx context.Context) ([]present.Disk, error) {
	switch {
	case s.presenter != nil:
		return s.presenter.List(ctx)
	case s.fuse != nil:
		return s.fuse.List(ctx)
	}
	return nil, nil
}

// teardownData takes all disks away.
func (s *Server) teardownData(ctx context.Context) error {
	var err error
	if s.presenter != nil {
		err = s.presenter.Teardown(ctx)
	} else {
		err = s.fuse.Teardown(ctx)
	}
	if err == nil {
		s.closeData = nil
	}
	return err
}
