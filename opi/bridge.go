package opi

import (
	"context"
	"errors"
	"log/slog"
	"strconv"
	"strings"
	"sync"

	opiv1 "github.com/opiproject/opi-api/storage/v1alpha1/gen/go"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	lvolv1 "github.com/thaw-project/thaw/api/lvol/v1"
	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/spdk"
)

// Options say what a bridge is between. Zero fields take the defaults that each names.
type Options struct {
	// Target is the SPDK. Whoever made it closes it, after the bridge's server.
	Target *spdk.Client
	// Functions are the card's PCIe functions; nil for a target that has none.
	Functions Functions
	Log       *slog.Logger // default: none
}

// Validate says what is wrong with the options.
func (o *Options) Validate() error {
	if o.Target == nil {
		return kind.Errorf(kind.Invalid, "opi: no target given")
	}
	return nil
}

// Bridge serves OPI's storage API. It has no goroutines, and no state but what can be
// asked for again.
type Bridge struct {
	opiv1.UnimplementedFrontendNvmeServiceServer
	opiv1.UnimplementedNvmeRemoteControllerServiceServer
	opiv1.UnimplementedAioVolumeServiceServer
	opiv1.UnimplementedMallocVolumeServiceServer
	opiv1.UnimplementedNullVolumeServiceServer
	lvolv1.UnimplementedLogicalVolumeServiceServer

	spdk      *spdk.Client
	functions Functions
	log       *slog.Logger

	mu       sync.Mutex
	clusters map[string]uint64 // guarded by mu: cluster sizes by lvstore's UUID
}

// New returns a bridge to a target. It does not wait for the target: requests do.
func New(o Options) (*Bridge, error) {
	if err := o.Validate(); err != nil {
		return nil, err
	}
	if o.Functions == nil {
		o.Functions = noFunctions{}
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	return &Bridge{spdk: o.Target, functions: o.Functions, log: o.Log, clusters: map[string]uint64{}}, nil
}

// Register makes a gRPC server serve the bridge. The server maps errors of package kind
// to codes (attacher/rpc.ServerOptions does), after Refusals.
func (b *Bridge) Register(s grpc.ServiceRegistrar) {
	opiv1.RegisterFrontendNvmeServiceServer(s, b)
	opiv1.RegisterNvmeRemoteControllerServiceServer(s, b)
	opiv1.RegisterAioVolumeServiceServer(s, b)
	opiv1.RegisterMallocVolumeServiceServer(s, b)
	opiv1.RegisterNullVolumeServiceServer(s, b)
	lvolv1.RegisterLogicalVolumeServiceServer(s, b)
}

// Refusals is a server's interceptor that says of errors of SPDK without a kind what can
// be said: the target refused the request in its present state, FAILED_PRECONDITION. SPDK's
// code and method are in an ErrorInfo of the domain "spdk.io". Where an lvstore is not found
// a ResourceInfo of the type "lvolStores" names it. It logs what failed.
func (b *Bridge) Refusals(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
	resp, err := next(ctx, req)
	if err == nil {
		return resp, nil
	}
	level := slog.LevelWarn
	if errors.Is(err, kind.NotFound) && strings.Contains(info.FullMethod, "/Get") { // who looks for what is not there does nothing wrong
		level = slog.LevelDebug
	}
	b.log.Log(ctx, level, "request failed", "method", info.FullMethod, "err", err)
	var none *noStore
	if errors.As(err, &none) {
		s, derr := status.New(codes.NotFound, err.Error()).WithDetails(&errdetails.ResourceInfo{ResourceType: lvolStores, ResourceName: join(lvolStores, none.name)})
		if derr != nil {
			return resp, status.Error(codes.NotFound, err.Error())
		}
		return resp, s.Err()
	}
	var e *spdk.Error
	if kind.Of(err) != "" || !errors.As(err, &e) {
		return resp, err
	}
	s, derr := status.New(codes.FailedPrecondition, err.Error()).WithDetails(&errdetails.ErrorInfo{
		Reason: "REFUSED", Domain: "spdk.io", Metadata: map[string]string{"code": strconv.Itoa(e.Code), "method": e.Method}})
	if derr != nil { // only for a detail that cannot be marshalled
		return resp, status.Error(codes.FailedPrecondition, err.Error())
	}
	return resp, s.Err()
}

// ensure makes what is not there. read returns it, or kind.NotFound; same tells in what
// it differs from what is wanted, and may complete it.
func ensure[T any](read func() (T, error), same func(T) error, create func() error) (T, error) {
	var none T
	have, err := read()
	if errors.Is(err, kind.NotFound) {
		cerr := create()
		have, err = read()
		if err != nil {
			if cerr != nil {
				err = cerr // why it is not there
			}
			return none, err
		}
	}
	if err != nil {
		return none, err
	}
	if err := same(have); err != nil {
		return none, err
	}
	return have, nil
}

// remove removes what read returns; read says kind.NotFound when there is nothing.
func remove[T any](allowMissing bool, read func() (T, error), del func(T) error) error {
	have, err := read()
	if err == nil {
		derr := del(have)
		if derr == nil {
			return nil
		}
		if _, err = read(); !errors.Is(err, kind.NotFound) {
			return derr
		}
		return nil
	}
	if allowMissing && errors.Is(err, kind.NotFound) {
		return nil
	}
	return err
}

// differs is the error of what exists with another property.
func differs(name, what string, have, want any) error {
	return kind.Errorf(kind.Exists, "%s exists with %s %v, not %v: delete it first", name, what, have, want)
}
