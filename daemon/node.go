package daemon

import (
	"context"
	"errors"
	"slices"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	attacherv1 "github.com/thaw-project/thaw/api/attacher/v1"
	"github.com/thaw-project/thaw/attacher/rpc"
	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/node/cache"
	"github.com/thaw-project/thaw/node/imagemgmt"
	"github.com/thaw-project/thaw/node/imagemgmt/client"
	"github.com/thaw-project/thaw/node/imagemgmt/clone"
	showcard "github.com/thaw-project/thaw/node/present/card"
	"github.com/thaw-project/thaw/node/present/pcie"
	"github.com/thaw-project/thaw/node/remote"
	"github.com/thaw-project/thaw/node/snapshotter"
	"github.com/thaw-project/thaw/target/bdev"
)

// openRemote opens the record of what is attached at other machines.
func (s *Server) openRemote(registry *prometheus.Registry) (err error) {
	remotes := s.config.Remotes()
	if len(remotes) == 0 {
		return nil
	}
	o := remote.Options{DBPath: s.config.Paths().RemoteDB, Logger: s.logger.With("part", "remote"), Registerer: registry}
	for _, r := range remotes {
		o.Targets = append(o.Targets, remote.TargetOptions{
			Name: r.Name, Attacher: r.Attacher, Files: rpc.Files{Certificate: r.Certificate, Key: r.Key, CA: r.CA}, Node: s.config.NodeName,
			Transport: r.Transport, LossTimeout: time.Duration(r.LossTimeout),
		})
	}
	if s.showsDisks() {
		o.OpenRBD = s.rbdOpener(remotes)
	}
	if s.remote, err = remote.New(o); err != nil {
		return err
	}
	s.onClose("remote targets", s.remote.Close)
	if !s.showsDisks() {
		s.remote.SetKernelHost(true) // nothing is read here
		return nil
	}
	return s.openCache(registry)
}

// cacheUnit is what the cache fetches at a time: a cluster of a store. The kernel reads
// around what is touched a little differently at each start, since that depends on what
// has arrived when; with units of half the size one start in twenty misses what the one
// before did not read, and the first start reads an eighth less.
const cacheUnit = 64 << 10

// openCache opens the cache of what other machines store. A node without it works, only
// slower.
func (s *Server) openCache(registry *prometheus.Registry) error {
	if !s.config.Cache.Enabled || !slices.ContainsFunc(s.config.Remotes(), func(r RemoteConfig) bool { return !r.local() }) {
		return nil
	}
	c, err := cache.Open(cache.Options{
		Dir: s.config.cacheDir(), SizeBytes: int64(s.config.Cache.Size), UnitBytes: cacheUnit, Logger: s.logger.With("part", "cache"), Registerer: registry,
		// The kernel above reads ahead as far as pays. Reading further by the reader's
		// pace would fetch something else at each start of the same image.
		ReadAheadBytes: -1,
	})
	if errors.Is(err, kind.Invalid) || errors.Is(err, kind.InUse) || errors.Is(err, kind.Unsupported) {
		return err // an operator's mistake
	}
	if err != nil {
		s.logger.Error("no cache: every start reads from the network", "error", err)
		return nil
	}
	s.cache = c
	s.onClose("cache", c.Close)
	return nil
}

// openRemoteLvol opens a block that another machine stores, through the cache.
func (s *Server) openRemoteLvol(target, block string) (bdev.Device, error) {
	d, err := s.remote.Open(target, block)
	if err != nil || s.cache == nil || s.localTarget(target) {
		return d, err
	}
	runs, err := s.remote.Map(target, block)
	if err != nil {
		s.logger.Warn("a block is not cached", "block", block, "target", target, "error", err)
		return d, nil
	}
	// Owners are one store's: what the node calls the target keeps stores apart.
	m := cache.Map{Domain: target, Runs: make([]cache.Run, len(runs))}
	for i, r := range runs {
		m.Runs[i] = cache.Run(r)
	}
	cached, err := s.cache.Device(d, m)
	if err != nil {
		return nil, err
	}
	return cached, nil
}

// localTarget tells whether a target's attacher is on this machine: what is read from there
// is not kept here a second time.
func (s *Server) localTarget(name string) bool {
	return slices.ContainsFunc(s.config.Remotes(), func(r RemoteConfig) bool { return r.Name == name && r.local() })
}

// closeRemote makes whoever waits for another machine fail.
func (s *Server) closeRemote() {
	if s.remote == nil {
		return
	}
	if err := s.remote.Close(); err != nil {
		s.logger.Warn("close remote targets", "error", err)
	}
}

// lookup makes sure that a block can be opened.
func (s *Server) lookup(ctx context.Context, block imagemgmt.Block) error {
	switch {
	case block.Target != "" && s.remote != nil:
		return s.remote.Attach(ctx, block.Target, block.Name)
	case s.store != nil:
		_, err := s.store.Get(block.Name)
		return err
	}
	d, err := openScratchFile(s.config.Paths().Scratch, block.Name)
	if err != nil {
		return err
	}
	return d.Close()
}

// scratch makes the volume over which writable layers are made. This machine's own serves
// for the images of any target.
func (s *Server) scratch(ctx context.Context, _ string, size int64) (b imagemgmt.Block, err error) {
	if s.attacher != nil {
		b.Name, err = s.attacher.Scratch(ctx, size)
	} else {
		b.Name, err = s.scratches.ensure(ctx, size)
	}
	return b, err
}

// firstScratch makes that volume before a container needs it.
func (s *Server) firstScratch(ctx context.Context) {
	if !s.showsDisks() {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, peerWait)
	defer cancel()
	if _, err := s.scratch(ctx, "", int64(s.config.Snapshotter.WritableSize)); err != nil {
		// Only containers in mode overlaybd on EROFS miss it, and only its limit
		// on size: they write to a directory instead.
		s.logger.Warn("no scratch volume: writable layers over erofs blocks have no size limit", "error", err)
	}
}

// cached opens a block for prefetching, if reading it leaves it in the cache.
func (s *Server) cached(b imagemgmt.Block) (bdev.Device, error) {
	if b.Target == "" || s.remote == nil || s.cache == nil || s.localTarget(b.Target) {
		return nil, kind.Errorf(kind.Unsupported, "nothing here caches block %s", b.Name)
	}
	return s.openRemoteLvol(b.Target, b.Name)
}

// startImages brings up what decides which disks of blocks there are.
func (s *Server) startImages(ctx context.Context) (err error) {
	own := ""
	if s.config.Store() {
		own = s.config.Target
	}
	o := imagemgmt.Options{
		Presenter: s.presenter, DBPath: s.config.Paths().ImagemgmtDB, Logger: s.logger.With("part", "imagemgmt"), Own: own, Lookup: s.lookup,
		Open: s.open, Cached: s.cached, Scratch: s.scratch,
		Released: func(b imagemgmt.Block) {
			if s.remote != nil && b.Target != "" {
				s.remote.Release(b.Target, b.Name)
			}
		},
	}
	if s.config.ImagesPart.Mode == ImagesDPU {
		if err := s.throughCard(ctx, &o); err != nil {
			return err
		}
	}
	if s.images, err = imagemgmt.New(o); err != nil {
		return err
	}
	s.onClose("image-mgmt", s.images.Close)
	return nil
}

// throughCard has a card show the disks, and stores keep the writable layers.
func (s *Server) throughCard(ctx context.Context, o *imagemgmt.Options) error {
	if s.remote == nil {
		return kind.Errorf(kind.Invalid, "images.mode %s needs a [[remote]] store", ImagesDPU)
	}
	peer := s.config.ImagesPart.Card
	var c attacherv1.CardClient
	if peer.Address == "" && s.card != nil {
		c = s.card.Client()
	} else {
		if peer.Address == "" {
			peer.Address = s.config.Sockets(RoleCard)[0]
		}
		conn, err := dialPeer(peer)
		if err != nil {
			return err
		}
		s.onClose("connection to the card", conn.Close)
		c = attacherv1.NewCardClient(conn)
	}
	presenter, err := showcard.New(showcard.Options{Card: c, Store: s.remote, Logger: s.logger.With("part", "card")})
	if err != nil {
		return err
	}
	o.Presenter, o.Layers, o.Open, o.Cached = presenter, clone.Layers{Store: s.remote}, nil, nil
	o.Scratch = func(ctx context.Context, target string, size int64) (imagemgmt.Block, error) {
		name, err := s.remote.EnsureScratch(ctx, target, size)
		return imagemgmt.Block{Target: target, Name: name}, err
	}
	// What it shows is compared with what is on record before the snapshotter may ask.
	return s.await(ctx, "the card's attacher at "+peer.Address, func(ctx context.Context) error {
		_, err := c.ListDisks(ctx, &attacherv1.ListDisksRequest{})
		return err
	})
}

// sweepRemote begins to compare what stores have for this machine with what is in use here,
// after those who know that have started.
func (s *Server) sweepRemote() {
	if s.remote != nil {
		s.remote.Start(func(target, block string) bool { return s.images.Uses(imagemgmt.Block{Target: target, Name: block}) })
	}
}

// targets are the names by which annotations may call what this node can attach.
func (s *Server) targets() (names []string) {
	switch {
	case s.config.Images():
	case len(s.config.Snapshotter.Targets) > 0:
		return s.config.Snapshotter.Targets
	case len(s.config.Remote) == 0:
		return []string{s.config.Target}
	}
	if s.config.Store() {
		names = append(names, s.config.Target)
	}
	for _, r := range s.config.Remotes() {
		names = append(names, r.Name)
	}
	return names
}

// imageService is image-mgmt as the snapshotter sees it: here, or in another process that
// is waited for.
func (s *Server) imageService(ctx context.Context) (imagemgmt.Service, error) {
	if s.images != nil {
		return s.images, nil
	}
	peer := s.config.Snapshotter.Images
	if peer.Address == "" {
		peer.Address = s.config.Sockets(RoleImages)[0]
	}
	conn, err := dialPeer(peer)
	if err != nil {
		return nil, err
	}
	s.onClose("connection to image-mgmt", conn.Close)
	finder, err := pcie.New(pcie.Options{Functions: s.config.PCIe.Functions, Logger: s.logger.With("part", "pcie")})
	if err != nil {
		return nil, err
	}
	s.onClose("events of drives", finder.Close)
	c := client.New(conn, client.Options{Finder: finder, Logger: s.logger.With("part", "imagemgmt")})
	s.elsewhereImages = c
	// What is mounted is compared with what image-mgmt has before containerd may ask.
	return c, s.await(ctx, "image-mgmt at "+peer.Address, func(ctx context.Context) error {
		_, err := c.List(ctx)
		return err
	})
}

// startSnapshots brings up what containerd talks to.
func (s *Server) startSnapshots(ctx context.Context, registry *prometheus.Registry) error {
	p := s.config.Paths()
	images, err := s.imageService(ctx)
	if err != nil {
		return err
	}
	s.snapshots, err = snapshotter.New(ctx, snapshotter.Options{
		Root: p.Snapshotter, MountDir: p.Mounts, Images: images, Targets: s.targets(),
		AttachTimeout: time.Duration(s.config.Snapshotter.AttachTimeout),
		AsyncRemove:   s.config.Snapshotter.AsyncRemove,
		WritableBytes: int64(s.config.Snapshotter.WritableSize),
		Logger:        s.logger.With("part", "snapshotter"), Registerer: registry,
	})
	if err != nil {
		return err
	}
	s.onClose("snapshotter", s.snapshots.Close)
	return nil
}
