package daemon

import (
	"errors"
	"net"

	"github.com/google/uuid"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"

	attacherv1 "github.com/thaw-project/thaw/api/attacher/v1"
	"github.com/thaw-project/thaw/attacher"
	"github.com/thaw-project/thaw/attacher/export"
	"github.com/thaw-project/thaw/attacher/rpc"
	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/target/bdev"
)

// openExport opens a block for the exporter.
func (s *Server) openExport(block string) (bdev.Device, uuid.UUID, error) {
	device, err := s.store.OpenLvol(block, true)
	if err != nil {
		return nil, uuid.UUID{}, err
	}
	id, err := uuid.Parse(device.UUID())
	if err != nil {
		return nil, id, errors.Join(kind.Errorf(kind.Corrupt, "lvol %s: %w", block, err), device.Close())
	}
	return device, id, nil
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
	if s.config.Exports() {
		s.exporter, err = export.New(export.Options{
			Store: s.store.Stat().UUID, Portals: s.config.Export.NVMeTCP, Logger: s.logger.With("part", "export"),
			Open: s.openExport,
		})
		if err != nil {
			return err
		}
		s.onClose("export", s.exporter.Close)
		o.Exporter = s.exporter
		registry.MustRegister(exportCollector{s.exporter})
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
	if s.exporter == nil {
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
