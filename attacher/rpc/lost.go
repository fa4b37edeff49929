package rpc

import (
	"context"
	"time"

	"google.golang.org/grpc/stats"
)

// lostWait is how long the end of a connection may come after the end of its calls.
const lostWait = 250 * time.Millisecond

// Lost tells whether a call whose context is done ended with its connection, rather than by
// its caller. It takes up to 250 ms to say that it did not. The server must have been made
// with ServerOptions.
func Lost(ctx context.Context) bool {
	ended, ok := ctx.Value(connKey{}).(chan struct{})
	if !ok {
		return false
	}
	late := time.NewTimer(lostWait)
	defer late.Stop()
	select {
	case <-ended:
		return true
	case <-late.C:
		return false
	}
}

// conns is a stats.Handler that has each connection's context say when it ends.
type conns struct{}

type connKey struct{} // of a chan struct{}, closed with the connection

func (conns) TagConn(ctx context.Context, _ *stats.ConnTagInfo) context.Context {
	return context.WithValue(ctx, connKey{}, make(chan struct{}))
}

func (conns) HandleConn(ctx context.Context, s stats.ConnStats) {
	if _, end := s.(*stats.ConnEnd); end {
		close(ctx.Value(connKey{}).(chan struct{}))
	}
}

func (conns) TagRPC(ctx context.Context, _ *stats.RPCTagInfo) context.Context { return ctx }
func (conns) HandleRPC(context.Context, stats.RPCStats)                       {}
