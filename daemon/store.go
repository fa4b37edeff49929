package daemon

import (
	"context"
	"io"
	"net"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"

	attacherv1 "github.com/thaw-project/thaw/api/attacher/v1"
	"github.com/thaw-project/thaw/attacher"
	"github.com/thaw-project/thaw/attacher/rpc"
	"github.com/thaw-project/thaw/kind"
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

// serveControl serves the commands of this machine, and the calls of nodes.
func (s *Server) serveControl(control net.Listener) error {
	options := rpc.ServerOptions()
	if s.attacher == nil {
		options = append(options, grpc.UnknownServiceHandler(func(any, grpc.ServerStream) error {
			return kind.Errorf(kind.Unsupported, "this server has no store: run the command on the machine that has it")
		}))
	}
	local := grpc.NewServer(options...)
	if s.attacher != nil {
		attacherv1.RegisterAttacherServer(local, s.attacher)
		attacherv1.RegisterNodeServer(local, s.attacher)
	}
	s.services.addGRPC("attacher", control, local)
	if !s.config.Exports() {
		return nil
	}
	e := s.config.Export
	credentials, err := rpc.ServerTLS(rpc.Files{Certificate: e.Certificate, Key: e.Key, CA: e.ClientCA})
	if err != nil {
		return err
	}
	l, err := listenTCP("export.attacher", e.Attacher)
	if err != nil {
		return err
	}
	// What nodes need and no more: whoever deletes or creates does it on the store.
	nodes := grpc.NewServer(append(rpc.ServerOptions(), credentials)...)
	attacherv1.RegisterNodeServer(nodes, s.attacher)
	s.services.addGRPC("attacher for nodes", l, nodes)
	return nil
}
