package daemon

import (
	"context"
	"errors"
	"net"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc"

	attacherv1 "github.com/thaw-project/thaw/api/attacher/v1"
	imagemgmtv1 "github.com/thaw-project/thaw/api/imagemgmt/v1"
	"github.com/thaw-project/thaw/attacher/rpc"
	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/node/imagemgmt/server"
)

const (
	// peerWait bounds how long a process that starts waits for another that it cannot do
	// without; its service manager then starts it again.
	peerWait = time.Minute
	// peerAgain is how often it looks, and peerLog how often it says so.
	peerAgain = 200 * time.Millisecond
	peerLog   = 10 * time.Second
)

// await calls try until it returns anything but kind.Unavailable: processes start in any
// order.
func (s *Server) await(ctx context.Context, what string, try func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, peerWait)
	defer cancel()
	var said time.Time
	for {
		err := try(ctx)
		if !errors.Is(err, kind.Unavailable) {
			return err
		}
		if time.Since(said) > peerLog {
			said = time.Now()
			s.logger.Info("waiting for "+what, "error", err)
		}
		select {
		case <-ctx.Done():
			return kind.Errorf(kind.Unavailable, "%s did not answer in %s: %w", what, peerWait, err)
		case <-time.After(peerAgain):
		}
	}
}

// serveParts serves what this process has: to commands and other parts of this machine on
// its socket, which may be nil, and to other machines where that is configured.
func (s *Server) serveParts(control net.Listener) error {
	if control != nil {
		local := grpc.NewServer(append(rpc.ServerOptions(), grpc.UnknownServiceHandler(func(_ any, stream grpc.ServerStream) error {
			method, _ := grpc.MethodFromServerStream(stream)
			return s.elsewhere(method)
		}))...)
		if s.attacher != nil {
			attacherv1.RegisterAttacherServer(local, s.attacher)
			attacherv1.RegisterNodeServer(local, s.attacher)
		}
		if s.card != nil {
			attacherv1.RegisterCardServer(local, s.card)
		}
		if s.images != nil {
			imagemgmtv1.RegisterImageManagementServer(local, server.New(s.images))
		}
		s.services.addGRPC("commands", control, local)
	}
	if e := s.config.Export; s.attacher != nil && s.config.Exports() {
		// What nodes need and no more: whoever deletes or creates is named.
		only := rpc.Allow(attacherv1.Attacher_ServiceDesc.ServiceName, e.Converters...)
		err := s.serveTLS("export.attacher", e.Attacher, rpc.Files{Certificate: e.Certificate, Key: e.Key, CA: e.ClientCA}, only, func(g *grpc.Server) {
			attacherv1.RegisterNodeServer(g, s.attacher)
			attacherv1.RegisterAttacherServer(g, s.attacher)
		})
		if err != nil {
			return err
		}
	}
	if s.images != nil {
		err := s.serveListed("images.listen.address", s.config.ImagesPart.Listen, func(g *grpc.Server) {
			imagemgmtv1.RegisterImageManagementServer(g, server.New(s.images))
		})
		if err != nil {
			return err
		}
	}
	if s.card != nil {
		err := s.serveListed("card.listen.address", s.config.CardPart.Listen, func(g *grpc.Server) {
			attacherv1.RegisterCardServer(g, s.card)
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// elsewhere says who serves what this process does not.
func (s *Server) elsewhere(method string) error {
	switch service, _, _ := strings.Cut(strings.TrimPrefix(method, "/"), "/"); service {
	case attacherv1.Attacher_ServiceDesc.ServiceName, attacherv1.Node_ServiceDesc.ServiceName:
		return kind.Errorf(kind.Unsupported, "this server has no store: run the command on the machine that has it")
	case attacherv1.Card_ServiceDesc.ServiceName:
		return kind.Errorf(kind.Unsupported, "this server has no card: run the command on the card")
	case imagemgmtv1.ImageManagement_ServiceDesc.ServiceName:
		return kind.Errorf(kind.Unsupported, "this server has no image-mgmt: run the command where it runs")
	}
	return kind.Errorf(kind.Unsupported, "this server does not serve %.80q", method)
}

// serveListed serves those that a table of the configuration names, if it has an address.
func (s *Server) serveListed(key string, l ListenConfig, register func(*grpc.Server)) error {
	if l.Address == "" {
		return nil
	}
	return s.serveTLS(key, l.Address, rpc.Files{Certificate: l.Certificate, Key: l.Key, CA: l.ClientCA}, rpc.Allow("", l.Clients...), register)
}

// serveTLS serves what register registers at the address that the configuration's key
// says, to those whose certificates options let call.
func (s *Server) serveTLS(key, address string, files rpc.Files, options []grpc.ServerOption, register func(*grpc.Server)) error {
	credentials, err := rpc.ServerTLS(files)
	if err != nil {
		return err
	}
	l, err := listenTCP(key, address)
	if err != nil {
		return err
	}
	server := grpc.NewServer(slices.Concat(rpc.ServerOptions(), []grpc.ServerOption{credentials}, options)...)
	register(server)
	s.services.addGRPC(key, l, server)
	return nil
}

// dialPeer connects to a part that may be in another process or on another machine.
func dialPeer(p PeerConfig) (*grpc.ClientConn, error) {
	if p.Local() {
		return rpc.Dial(p.Address)
	}
	return rpc.DialTLS(p.Address, p.Files())
}
