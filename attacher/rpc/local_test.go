package rpc

import (
	"context"
	"net"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"

	attacherv1 "github.com/thaw-project/thaw/api/attacher/v1"
)

// TestLocalCaller calls a handler of the same process from within a call of a node's: the
// handler must not take the node for its caller.
func TestLocalCaller(t *testing.T) {
	ctx, cancel := context.WithCancel(peer.NewContext(t.Context(), &peer.Peer{AuthInfo: credentials.TLSInfo{}, LocalAddr: &net.TCPAddr{IP: net.IPv4(192, 0, 2, 1)}}))
	defer cancel()
	if _, remote, err := Node(ctx); !remote && err == nil {
		t.Fatal("the call is from nowhere")
	}
	own := func(ctx context.Context) {
		if name, remote, err := Node(ctx); name != "" || remote || err != nil {
			t.Errorf("the caller is %q, %t, %v", name, remote, err)
		}
		if a := LocalAddress(ctx); a != "" {
			t.Errorf("it was reached at %s", a)
		}
	}
	r := &attacherv1.HoldRequest{}
	if _, err := Local(ctx, r, func(ctx context.Context, _ *attacherv1.HoldRequest) (*attacherv1.HoldResponse, error) {
		own(ctx)
		return &attacherv1.HoldResponse{}, nil
	}); err != nil {
		t.Error(err)
	}
	s := LocalStream(ctx, r, func(_ *attacherv1.HoldRequest, s grpc.ServerStreamingServer[attacherv1.HoldResponse]) error {
		own(s.Context())
		return s.Send(&attacherv1.HoldResponse{})
	})
	if _, err := s.Recv(); err != nil {
		t.Error(err)
	}
}
