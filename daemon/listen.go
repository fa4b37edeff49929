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
	"github.com/thaw-project/thaw/attacher/rpc"
	"github.com/thaw-project/thaw/kind"
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
		options := rpc.ServerOptions()
		options = append(options, grpc.UnknownServiceHandler(func(_ any, stream grpc.ServerStream) error {
			method, _ := grpc.MethodFromServerStream(stream)
			return s.elsewhere(method)
		}))
		local := grpc.NewServer(options...)
		if s.attacher != nil {
			attacherv1.RegisterAttacherServer(local, s.attacher)
			attacherv1.RegisterNodeServer(local, s.attacher)
		}
		s.services.addGRPC("commands", control, local)
	}
	if e := s.config.Export; s.attacher != nil && s.config.Exports() {
		files := rpc.Files{Certificate: e.Certificate, Key: e.Key, CA: e.ClientCA}
		return s.serveTLS("export.attacher", e.Attacher, files, func(method, name string) bool {
			// What nodes need and no more: whoever deletes or creates is named.
			return !strings.HasPrefix(method, "/"+attacherv1.Attacher_ServiceDesc.ServiceName+"/") || slices.Contains(e.Converters, name)
		}, func(server *grpc.Server) {
			attacherv1.RegisterNodeServer(server, s.attacher)
			if len(e.Converters) > 0 {
				attacherv1.RegisterAttacherServer(server, s.attacher)
			}
		})
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
	}
	return kind.Errorf(kind.Unsupported, "this server does not serve %.80q", method)
}

// serveTLS serves what register registers at the address that the configuration's key
// says, to those whose certificate's name admit lets call a method.
func (s *Server) serveTLS(key, address string, files rpc.Files, admit func(method, name string) bool, register func(*grpc.Server)) error {
	credentials, err := rpc.ServerTLS(files)
	if err != nil {
		return err
	}
	l, err := listenTCP(key, address)
	if err != nil {
		return err
	}
	check := func(ctx context.Context, method string) error {
		name, ok, err := rpc.Node(ctx)
		if err == nil && (!ok || !admit(method, name)) {
			err = kind.Errorf(kind.Denied, "%.128q may not call %s here: it is not named in the configuration", name, method)
		}
		return err
	}
	server := grpc.NewServer(append(rpc.ServerOptions(), credentials,
		grpc.ChainUnaryInterceptor(func(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
			if err := check(ctx, info.FullMethod); err != nil {
				return nil, err
			}
			return next(ctx, req)
		}),
		grpc.ChainStreamInterceptor(func(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, next grpc.StreamHandler) error {
			if err := check(stream.Context(), info.FullMethod); err != nil {
				return err
			}
			return next(srv, stream)
		}))...)
	register(server)
	s.services.addGRPC(key, l, server)
	return nil
}
