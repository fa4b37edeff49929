package attacher

import (
	"context"
	"io"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	attacherv1 "github.com/thaw-project/thaw/api/attacher/v1"
	"github.com/thaw-project/thaw/attacher/rpc"
	"github.com/thaw-project/thaw/attacher/rpcerr"
)

// NewServer returns a gRPC server that serves a. Call a.Stop before the server is
// stopped.
func NewServer(a *Attacher) *grpc.Server {
	s := grpc.NewServer(rpc.ServerOptions()...)
	attacherv1.RegisterAttacherServer(s, a)
	return s
}

// Client returns a client of a in the same process. Requests and answers are passed,
// not copied, and errors are what a remote client would see.
func (a *Attacher) Client() attacherv1.AttacherClient { return client{a} }

type client struct{ a *Attacher }

var _ attacherv1.AttacherClient = client{}

func call[Req, Resp any](ctx context.Context, r *Req, f func(context.Context, *Req) (*Resp, error)) (*Resp, error) {
	if err := ctx.Err(); err != nil {
		return nil, rpcerr.FromStatus(rpcerr.ToStatus(err))
	}
	resp, err := f(ctx, r)
	if err != nil {
		return nil, rpcerr.FromStatus(rpcerr.ToStatus(err))
	}
	return resp, nil
}

func (c client) CreateLvol(ctx context.Context, r *attacherv1.CreateLvolRequest, _ ...grpc.CallOption) (*attacherv1.Lvol, error) {
	return call(ctx, r, c.a.CreateLvol)
}

func (c client) CloneLvol(ctx context.Context, r *attacherv1.CloneLvolRequest, _ ...grpc.CallOption) (*attacherv1.Lvol, error) {
	return call(ctx, r, c.a.CloneLvol)
}

func (c client) SnapshotLvol(ctx context.Context, r *attacherv1.SnapshotLvolRequest, _ ...grpc.CallOption) (*attacherv1.Lvol, error) {
	return call(ctx, r, c.a.SnapshotLvol)
}

func (c client) GetLvol(ctx context.Context, r *attacherv1.GetLvolRequest, _ ...grpc.CallOption) (*attacherv1.Lvol, error) {
	return call(ctx, r, c.a.GetLvol)
}

func (c client) ListLvols(ctx context.Context, r *attacherv1.ListLvolsRequest, _ ...grpc.CallOption) (*attacherv1.ListLvolsResponse, error) {
	return call(ctx, r, c.a.ListLvols)
}

func (c client) DeleteLvol(ctx context.Context, r *attacherv1.DeleteLvolRequest, _ ...grpc.CallOption) (*attacherv1.DeleteLvolResponse, error) {
	return call(ctx, r, c.a.DeleteLvol)
}

func (c client) RenameLvol(ctx context.Context, r *attacherv1.RenameLvolRequest, _ ...grpc.CallOption) (*attacherv1.Lvol, error) {
	return call(ctx, r, c.a.RenameLvol)
}

func (c client) ResizeLvol(ctx context.Context, r *attacherv1.ResizeLvolRequest, _ ...grpc.CallOption) (*attacherv1.Lvol, error) {
	return call(ctx, r, c.a.ResizeLvol)
}

func (c client) InflateLvol(ctx context.Context, r *attacherv1.InflateLvolRequest, _ ...grpc.CallOption) (*attacherv1.Lvol, error) {
	return call(ctx, r, c.a.InflateLvol)
}

func (c client) DecoupleLvol(ctx context.Context, r *attacherv1.DecoupleLvolRequest, _ ...grpc.CallOption) (*attacherv1.Lvol, error) {
	return call(ctx, r, c.a.DecoupleLvol)
}

func (c client) Export(ctx context.Context, r *attacherv1.ExportRequest, _ ...grpc.CallOption) (*attacherv1.ExportResponse, error) {
	return call(ctx, r, c.a.Export)
}

func (c client) Unexport(ctx context.Context, r *attacherv1.UnexportRequest, _ ...grpc.CallOption) (*attacherv1.UnexportResponse, error) {
	return call(ctx, r, c.a.Unexport)
}

func (c client) PutImage(ctx context.Context, r *attacherv1.PutImageRequest, _ ...grpc.CallOption) (*attacherv1.Image, error) {
	return call(ctx, r, c.a.PutImage)
}

func (c client) GetImage(ctx context.Context, r *attacherv1.GetImageRequest, _ ...grpc.CallOption) (*attacherv1.Image, error) {
	return call(ctx, r, c.a.GetImage)
}

func (c client) ListImages(ctx context.Context, r *attacherv1.ListImagesRequest, _ ...grpc.CallOption) (*attacherv1.ListImagesResponse, error) {
	return call(ctx, r, c.a.ListImages)
}

func (c client) DeleteImage(ctx context.Context, r *attacherv1.DeleteImageRequest, _ ...grpc.CallOption) (*attacherv1.DeleteImageResponse, error) {
	return call(ctx, r, c.a.DeleteImage)
}

func (c client) PruneBlocks(ctx context.Context, r *attacherv1.PruneBlocksRequest, _ ...grpc.CallOption) (*attacherv1.PruneBlocksResponse, error) {
	return call(ctx, r, c.a.PruneBlocks)
}

func (c client) GetStore(ctx context.Context, r *attacherv1.GetStoreRequest, _ ...grpc.CallOption) (*attacherv1.Store, error) {
	return call(ctx, r, c.a.GetStore)
}

func (c client) CheckStore(ctx context.Context, r *attacherv1.CheckStoreRequest, _ ...grpc.CallOption) (*attacherv1.CheckStoreResponse, error) {
	return call(ctx, r, c.a.CheckStore)
}

// Hold runs the handler in a goroutine that ends with ctx or the attacher.
func (c client) Hold(ctx context.Context, r *attacherv1.HoldRequest, _ ...grpc.CallOption) (grpc.ServerStreamingClient[attacherv1.HoldResponse], error) {
	s := &holdStream{ctx: ctx, messages: make(chan *attacherv1.HoldResponse), done: make(chan struct{})}
	go func() {
		defer close(s.done)
		s.err = rpcerr.FromStatus(rpcerr.ToStatus(c.a.Hold(r, s)))
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
