package rpc

import (
	"context"
	"slices"
	"strings"

	"google.golang.org/grpc"

	"github.com/thaw-project/thaw/attacher/rpcerr"
	"github.com/thaw-project/thaw/kind"
)

// Allow returns the options of a server that lets only peers whose certificates carry one of
// names call the methods of service ("package.Service", every service when it is empty);
// others are refused with PERMISSION_DENIED. No names admit nobody. Peers on a Unix
// socket are not asked: the socket's mode is the access control. Options that were given
// before these act around them.
func Allow(service string, names ...string) []grpc.ServerOption {
	names = slices.Clone(names)
	check := func(ctx context.Context, method string) error {
		if service != "" && !strings.HasPrefix(method, "/"+service+"/") {
			return nil
		}
		name, remote, err := Node(ctx)
		if err == nil && remote && !slices.Contains(names, name) {
			err = kind.Errorf(kind.Denied, "%s may not call %s: its name is not on the list of those that may", name, method)
		}
		return rpcerr.ToStatus(err)
	}
	return []grpc.ServerOption{
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
		}),
	}
}
