package card

import (
	"context"

	"google.golang.org/grpc"

	attacherv1 "github.com/thaw-project/thaw/api/attacher/v1"
	"github.com/thaw-project/thaw/attacher/rpc"
)

// Client returns a client of c in the same process. Requests and answers are passed, not
// copied, and errors are what a remote client would see.
func (c *Card) Client() attacherv1.CardClient { return client{c} }

type client struct{ c *Card }

func (c client) AttachDisk(ctx context.Context, r *attacherv1.AttachDiskRequest, _ ...grpc.CallOption) (*attacherv1.CardDisk, error) {
	return rpc.Local(ctx, r, c.c.AttachDisk)
}

func (c client) DetachDisk(ctx context.Context, r *attacherv1.DetachDiskRequest, _ ...grpc.CallOption) (*attacherv1.DetachDiskResponse, error) {
	return rpc.Local(ctx, r, c.c.DetachDisk)
}

func (c client) ListDisks(ctx context.Context, r *attacherv1.ListDisksRequest, _ ...grpc.CallOption) (*attacherv1.ListDisksResponse, error) {
	return rpc.Local(ctx, r, c.c.ListDisks)
}

func (c client) ListFunctions(ctx context.Context, r *attacherv1.ListFunctionsRequest, _ ...grpc.CallOption) (*attacherv1.ListFunctionsResponse, error) {
	return rpc.Local(ctx, r, c.c.ListFunctions)
}

// Hold runs the handler in a goroutine that ends with ctx or the card's attacher.
func (c client) Hold(ctx context.Context, r *attacherv1.HoldRequest, _ ...grpc.CallOption) (grpc.ServerStreamingClient[attacherv1.HoldResponse], error) {
	return rpc.LocalStream(ctx, r, c.c.Hold), nil
}
