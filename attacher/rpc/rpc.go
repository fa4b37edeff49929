// Package rpc is how the attacher's contract travels: over a Unix socket, over TCP with
// both ends' certificates checked, within size limits, or within a process, with the error
// kinds of package kind intact.
//
// Both ends use it. It knows nothing of what an attacher does.
package rpc

import (
	"context"
	"fmt"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"

	"github.com/thaw-project/thaw/attacher/rpcerr"
)

const (
	// MaxMessageBytes bounds one message. The largest is a list of lvols: 100
	// bytes each, 100,000 of them.
	MaxMessageBytes = 16 << 20

	// maxStreams bounds the calls that one connection has in flight: a converter
	// has a hold and a few calls.
	maxStreams = 64

	// A peer on the same machine that died without closing its socket is noticed
	// by the kernel at once; keepalive is for a peer that stopped answering.
	keepaliveEvery   = 20 * time.Second
	keepaliveTimeout = 20 * time.Second

	// A server that restarts is back within seconds, and connecting to a Unix socket
	// costs nothing: gRPC's own pauses, of up to two minutes, are for networks.
	reconnectFirst = 100 * time.Millisecond
	reconnectMost  = time.Second

	// How long an attempt to connect over a network may take, handshake included. Attempts
	// that are shorter than a handshake takes, on a slow network or to a busy store, never
	// succeed; after longer ones it takes longer to notice that a network is back, since
	// the kernel repeats what is lost after 1 and 3 s, and then after 7.
	handshakeMost = 5 * time.Second
)

// connecting sets how long attempts to connect may take.
func connecting(most time.Duration) grpc.DialOption {
	return grpc.WithConnectParams(grpc.ConnectParams{
		Backoff:           backoff.Config{BaseDelay: reconnectFirst, Multiplier: 1.6, Jitter: 0.2, MaxDelay: reconnectMost},
		MinConnectTimeout: most,
	})
}

// ServerOptions are the options of a server that serves attachers: limits,
// keepalive, and handlers' errors by rpcerr.ToStatus.
func ServerOptions() []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.MaxRecvMsgSize(MaxMessageBytes),
		grpc.MaxSendMsgSize(MaxMessageBytes),
		grpc.MaxConcurrentStreams(maxStreams),
		grpc.StatsHandler(conns{}),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: keepaliveEvery, Timeout: keepaliveTimeout}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: keepaliveEvery / 2, PermitWithoutStream: true}),
		grpc.ChainUnaryInterceptor(func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
			resp, err := next(ctx, req)
			return resp, rpcerr.ToStatus(err)
		}),
		grpc.ChainStreamInterceptor(func(srv any, stream grpc.ServerStream, _ *grpc.StreamServerInfo, next grpc.StreamHandler) error {
			return rpcerr.ToStatus(next(srv, stream))
		}),
	}
}

// DialOptions are the options of a client connection: limits, keepalive, and call
// errors by rpcerr.FromStatus. Calls made while the server restarts fail with kind.Unavailable
// unless they ask to wait (grpc.WaitForReady).
func DialOptions() []grpc.DialOption {
	return []grpc.DialOption{
		grpc.WithTransportCredentials(insecure.NewCredentials()), // the socket's mode is the access control
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(MaxMessageBytes), grpc.MaxCallSendMsgSize(MaxMessageBytes)),
		connecting(reconnectMost),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: keepaliveEvery, Timeout: keepaliveTimeout}),
		grpc.WithChainUnaryInterceptor(func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
			return rpcerr.FromStatus(invoke(ctx, method, req, reply, cc, opts...))
		}),
		grpc.WithChainStreamInterceptor(func(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, open grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
			s, err := open(ctx, desc, cc, method, opts...)
			if err != nil {
				return nil, rpcerr.FromStatus(err)
			}
			return &clientStream{s}, nil
		}),
	}
}

type clientStream struct{ grpc.ClientStream }

func (s *clientStream) RecvMsg(m any) error { return rpcerr.FromStatus(s.ClientStream.RecvMsg(m)) }
func (s *clientStream) SendMsg(m any) error { return rpcerr.FromStatus(s.ClientStream.SendMsg(m)) }

// Dial returns a connection to the Unix socket at path. It does not wait for the
// server: the first call does.
func Dial(path string) (*grpc.ClientConn, error) {
	conn, err := grpc.NewClient("unix:"+path, DialOptions()...)
	if err != nil {
		return nil, fmt.Errorf("connect to attacher at %s: %w", path, err)
	}
	return conn, nil
}
