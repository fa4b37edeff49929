package remote

import (
	"context"
	"path/filepath"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/thaw-project/thaw/attacher/rpc"
)

// Dial connects to a store's attacher: over TLS, where the certificate says which node
// calls, or on the Unix socket of this machine's, where the calls say it.
func Dial(t TargetOptions) (*grpc.ClientConn, error) {
	if !filepath.IsAbs(t.Attacher) {
		return rpc.DialTLS(t.Attacher, t.Files)
	}
	return grpc.NewClient("unix:"+t.Attacher, append(rpc.DialOptions(), grpc.WithChainUnaryInterceptor(asNode(t.Node)))...)
}

// asNode says in every request that has room for it which node calls.
func asNode(node string) grpc.UnaryClientInterceptor {
	return func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
		if m, ok := req.(proto.Message); ok {
			if f := m.ProtoReflect().Descriptor().Fields().ByName("node"); f != nil && f.Kind() == protoreflect.StringKind {
				m.ProtoReflect().Set(f, protoreflect.ValueOfString(node))
			}
		}
		return invoke(ctx, method, req, reply, cc, opts...)
	}
}
