package daemon

import (
	"context"
	"io"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/thaw-project/thaw/attacher"
	"github.com/thaw-project/thaw/attacher/card"
)

// openStore opens what the attacher's lvols are kept in.
func (s *Server) openStore(ctx context.Context, create bool) error {
	b, err := openBackend(ctx, s.config, create, s.logger.With("part", "store"))
	if err != nil {
		return err
	}
	s.store, s.export = b.Backend, b.export
	s.onClose("store", s.store.Close)
	return nil
}

// startStore brings up the attacher and, if configured, what serves other machines.
func (s *Server) startStore(registry *prometheus.Registry) (err error) {
	o := attacher.Options{
		Lvols: s.store, Presenter: s.fuse, DBPath: s.config.Paths().AttacherDB, Target: s.config.Target,
		Logger: s.logger.With("part", "attacher"),
	}
	if s.images != nil {
		o.Attached = s.images.Attached
	}
	if s.export != nil {
		if s.exporter, err = s.export(); err != nil {
			return err
		}
		if c, ok := s.exporter.(io.Closer); ok {
			s.onClose("export", c.Close)
		}
		o.Exporter = s.exporter
		if c, ok := s.exporter.(counted); ok {
			registry.MustRegister(exportCollector{c})
		}
	}
	if s.attacher, err = attacher.New(o); err != nil {
		return err
	}
	s.onClose("attacher", s.attacher.Close)
	return nil
}

// startCard brings up what shows disks to this card's host.
func (s *Server) startCard(registry *prometheus.Registry) error {
	c := s.config.CardPart
	bridge, err := dialPeer(PeerConfig{Address: c.Bridge, Certificate: c.Certificate, Key: c.Key, CA: c.CA})
	if err != nil {
		return err
	}
	s.onClose("connection to the bridge", bridge.Close)
	o := card.Options{Bridge: bridge, DBPath: s.config.Paths().CardDB, Host: c.Host, Logger: s.logger.With("part", "card"), Registerer: registry}
	for _, f := range c.Functions {
		parsed, err := card.ParseFunction(f)
		if err != nil {
			return err
		}
		o.Functions = append(o.Functions, parsed)
	}
	if s.card, err = card.New(o); err != nil {
		return err
	}
	s.onClose("card", s.card.Close)
	return nil
}
