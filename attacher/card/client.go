package card

import (
	"context"
	"io"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	attacherv1 "github.com/thaw-project/thaw/api/attacher/v1"
	"github.com/thaw-project/thaw/attacher/rpcerr"
)

// Client returns a client of c in the same process. Requests and answers are passed, not
// copied, and errors are what a remote client would see.
func (c *Card) Client() attacherv1.CardClient { return client{c} }

type client struct{ c *Card }

func inProcess[Req, Resp any](ctx context.Context, r *Req, f func(context.Context, *Req) (*Resp, error)) (*Resp, error) {
	if err := ctx.Err(); err != nil {
		return nil, rpcerr.FromStatus(rpcerr.ToStatus(err))
	}
	resp, err := f(ctx, r)
	if err != nil {
		return nil, rpcerr.FromStatus(rpcerr.ToStatus(err))
	}
	return resp, nil
}

func (c client) AttachDisk(ctx context.Context, r *attacherv1.AttachDiskRequest, _ ...grpc.CallOption) (*attacherv1.CardDisk, error) {
	return inProcess(ctx, r, c.c.AttachDisk)
}

func (c client) DetachDisk(ctx context.Context, r *attacherv1.DetachDiskRequest, _ ...grpc.CallOption) (*attacherv1.DetachDiskResponse, error) {
	return inProcess(ctx, r, c.c.DetachDisk)
}

func (c client) ListDisks(ctx context.Context, r *attacherv1.ListDisksRequest, _ ...grpc.CallOption) (*attacherv1.ListDisksResponse, error) {
	return inProcess(ctx, r, c.c.ListDisks)
}

func (c client) ListFunctions(ctx context.Context, r *attacherv1.ListFunctionsRequest, _ ...grpc.CallOption) (*attacherv1.ListFunctionsResponse, error) {
	return inProcess(ctx, r, c.c.ListFunctions)
}

// Hold runs the handler in a goroutine that ends with ctx or the card's attacher.
func (c client) Hold(ctx context.Context, r *attacherv1.HoldRequest, _ ...grpc.CallOption) (grpc.ServerStreamingClient[attacherv1.HoldResponse], error) {
	s := &holdStream{ctx: ctx, messages: make(chan *attacherv1.HoldResponse), done: make(chan struct{})}
	go func() {
		defer close(s.done)
		s.err = rpcerr.FromStatus(rpcerr.ToStatus(c.c.Hold(r, s)))
	}()
	return s, nil
}

// holdStream is both ends of a Hold in one process.
type holdStream struct {
	ctx      context.Context
	messages chan *attacherv1.HoldResponse
	done     chan struct{} // closed when the handler has returned
	err      error         // what it returned; read after done
}

// Send is the server's end.
func (s *holdStream) Send(m *attacherv1.HoldResponse) error {
	select {
	case s.messages <- m:
		return nil
	case <-s.ctx.Done():
		return s.ctx.Err()
	}
}

// Recv is the client's end.
func (s *holdStream) Recv() (*attacherv1.HoldResponse, error) {
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

func (s *holdStream) Context() context.Context { return s.ctx }
func (s *holdStream) SendMsg(m any) error      { return s.Send(m.(*attacherv1.HoldResponse)) }
func (s *holdStream) RecvMsg(any) error        { _, err := s.Recv(); return err }

func (s *holdStream) Header() (metadata.MD, error) { return nil, nil }
func (s *holdStream) Trailer() metadata.MD         { return nil }
func (s *holdStream) CloseSend() error             { return nil }
func (s *holdStream) SetHeader(metadata.MD) error  { return nil }
func (s *holdStream) SendHeader(metadata.MD) error { return nil }
func (s *holdStream) SetTrailer(metadata.MD)       {}
