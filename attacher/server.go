package attacher

import (
	"context"

	"google.golang.org/grpc"

	attacherv1 "github.com/thaw-project/thaw/api/attacher/v1"
	"github.com/thaw-project/thaw/attacher/rpc"
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

func (c client) CreateLvol(ctx context.Context, r *attacherv1.CreateLvolRequest, _ ...grpc.CallOption) (*attacherv1.Lvol, error) {
	return rpc.Local(ctx, r, c.a.CreateLvol)
}

func (c client) CloneLvol(ctx context.Context, r *attacherv1.CloneLvolRequest, _ ...grpc.CallOption) (*attacherv1.Lvol, error) {
	return rpc.Local(ctx, r, c.a.CloneLvol)
}

func (c client) SnapshotLvol(ctx context.Context, r *attacherv1.SnapshotLvolRequest, _ ...grpc.CallOption) (*attacherv1.Lvol, error) {
	return rpc.Local(ctx, r, c.a.SnapshotLvol)
}

func (c client) GetLvol(ctx context.Context, r *attacherv1.GetLvolRequest, _ ...grpc.CallOption) (*attacherv1.Lvol, error) {
	return rpc.Local(ctx, r, c.a.GetLvol)
}

func (c client) ListLvols(ctx context.Context, r *attacherv1.ListLvolsRequest, _ ...grpc.CallOption) (*attacherv1.ListLvolsResponse, error) {
	return rpc.Local(ctx, r, c.a.ListLvols)
}

func (c client) DeleteLvol(ctx context.Context, r *attacherv1.DeleteLvolRequest, _ ...grpc.CallOption) (*attacherv1.DeleteLvolResponse, error) {
	return rpc.Local(ctx, r, c.a.DeleteLvol)
}

func (c client) RenameLvol(ctx context.Context, r *attacherv1.RenameLvolRequest, _ ...grpc.CallOption) (*attacherv1.Lvol, error) {
	return rpc.Local(ctx, r, c.a.RenameLvol)
}

func (c client) ResizeLvol(ctx context.Context, r *attacherv1.ResizeLvolRequest, _ ...grpc.CallOption) (*attacherv1.Lvol, error) {
	return rpc.Local(ctx, r, c.a.ResizeLvol)
}

func (c client) InflateLvol(ctx context.Context, r *attacherv1.InflateLvolRequest, _ ...grpc.CallOption) (*attacherv1.Lvol, error) {
	return rpc.Local(ctx, r, c.a.InflateLvol)
}

func (c client) DecoupleLvol(ctx context.Context, r *attacherv1.DecoupleLvolRequest, _ ...grpc.CallOption) (*attacherv1.Lvol, error) {
	return rpc.Local(ctx, r, c.a.DecoupleLvol)
}

func (c client) Export(ctx context.Context, r *attacherv1.ExportRequest, _ ...grpc.CallOption) (*attacherv1.ExportResponse, error) {
	return rpc.Local(ctx, r, c.a.Export)
}

func (c client) Unexport(ctx context.Context, r *attacherv1.UnexportRequest, _ ...grpc.CallOption) (*attacherv1.UnexportResponse, error) {
	return rpc.Local(ctx, r, c.a.Unexport)
}

func (c client) PutImage(ctx context.Context, r *attacherv1.PutImageRequest, _ ...grpc.CallOption) (*attacherv1.Image, error) {
	return rpc.Local(ctx, r, c.a.PutImage)
}

func (c client) GetImage(ctx context.Context, r *attacherv1.GetImageRequest, _ ...grpc.CallOption) (*attacherv1.Image, error) {
	return rpc.Local(ctx, r, c.a.GetImage)
}

func (c client) ListImages(ctx context.Context, r *attacherv1.ListImagesRequest, _ ...grpc.CallOption) (*attacherv1.ListImagesResponse, error) {
	return rpc.Local(ctx, r, c.a.ListImages)
}

func (c client) DeleteImage(ctx context.Context, r *attacherv1.DeleteImageRequest, _ ...grpc.CallOption) (*attacherv1.DeleteImageResponse, error) {
	return rpc.Local(ctx, r, c.a.DeleteImage)
}

func (c client) PruneBlocks(ctx context.Context, r *attacherv1.PruneBlocksRequest, _ ...grpc.CallOption) (*attacherv1.PruneBlocksResponse, error) {
	return rpc.Local(ctx, r, c.a.PruneBlocks)
}

func (c client) GetStore(ctx context.Context, r *attacherv1.GetStoreRequest, _ ...grpc.CallOption) (*attacherv1.Store, error) {
	return rpc.Local(ctx, r, c.a.GetStore)
}

func (c client) CheckStore(ctx context.Context, r *attacherv1.CheckStoreRequest, _ ...grpc.CallOption) (*attacherv1.CheckStoreResponse, error) {
	return rpc.Local(ctx, r, c.a.CheckStore)
}

// Hold runs the handler in a goroutine that ends with ctx or the attacher.
func (c client) Hold(ctx context.Context, r *attacherv1.HoldRequest, _ ...grpc.CallOption) (grpc.ServerStreamingClient[attacherv1.HoldResponse], error) {
	return rpc.LocalStream(ctx, r, c.a.Hold), nil
}
