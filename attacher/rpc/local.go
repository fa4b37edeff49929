package rpc

import (
	"context"
	"io"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"

	"github.com/thaw-project/thaw/attacher/rpcerr"
)

// local is ctx without the peer of a call that it may be from: who calls is this process.
func local(ctx context.Context) context.Context { return peer.NewContext(ctx, &peer.Peer{}) }

// Local calls a handler in the same process, which is who the handler takes for its caller,
// also within a call of somebody else's. Request and answer are passed, not copied, and
// errors are what a remote client would see.
func Local[Req, Resp any](ctx context.Context, r *Req, handle func(context.Context, *Req) (*Resp, error)) (*Resp, error) {
	if err := ctx.Err(); err != nil {
		return nil, rpcerr.FromStatus(rpcerr.ToStatus(err))
	}
	resp, err := handle(local(ctx), r)
	if err != nil {
		return nil, rpcerr.FromStatus(rpcerr.ToStatus(err))
	}
	return resp, nil
}

// LocalStream is Local for a handler that answers with a stream of Resp. It runs in a
// goroutine, which must end with ctx; who serves waits for it.
func LocalStream[Req, Resp any](ctx context.Context, r *Req, handle func(*Req, grpc.ServerStreamingServer[Resp]) error) grpc.ServerStreamingClient[Resp] {
	s := &localStream[Resp]{ctx: local(ctx), messages: make(chan *Resp), done: make(chan struct{})}
	go func() {
		defer close(s.done)
		s.err = rpcerr.FromStatus(rpcerr.ToStatus(handle(r, s)))
	}()
	return s
}

// localStream is both ends of a stream.
type localStream[Resp any] struct {
	ctx      context.Context
	messages chan *Resp
	done     chan struct{} // closed when the handler has returned
	err      error         // what it returned; read after done
}

// Send is the server's end.
func (s *localStream[Resp]) Send(m *Resp) error {
	select {
	case s.messages <- m:
		return nil
	case <-s.ctx.Done():
		return s.ctx.Err()
	}
}

// Recv is the client's end.
func (s *localStream[Resp]) Recv() (*Resp, error) {
	select {
	case m := <-s.messages:
		return m, nil
	case <-s.done:
		if s.err != nil {
			return nil, s.err
		}
		if err := s.ctx.Err(); err != nil {
			return nil, rpcerr.FromStatus(rpcerr.ToStatus(err))
		}
		return nil, io.EOF
	}
}

func (s *localStream[Resp]) Context() context.Context { return s.ctx }
func (s *localStream[Resp]) SendMsg(m any) error      { return s.Send(m.(*Resp)) }
func (s *localStream[Resp]) RecvMsg(any) error        { _, err := s.Recv(); return err }

func (s *localStream[Resp]) Header() (metadata.MD, error) { return nil, nil }
func (s *localStream[Resp]) Trailer() metadata.MD         { return nil }
func (s *localStream[Resp]) CloseSend() error             { return nil }
func (s *localStream[Resp]) SetHeader(metadata.MD) error  { return nil }
func (s *localStream[Resp]) SendHeader(metadata.MD) error { return nil }
func (s *localStream[Resp]) SetTrailer(metadata.MD)       {}
