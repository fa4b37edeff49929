package daemon

import (
	"context"
	"io"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/thaw-project/thaw/attacher"
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
