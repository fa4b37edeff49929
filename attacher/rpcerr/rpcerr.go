// Package rpcerr carries the error kinds of package kind through gRPC.
//
// Both ends use it, so that the mapping of kinds to gRPC codes and back exists
// once. It knows nothing of any service.
package rpcerr

import (
	"context"
	"errors"
	"regexp"
	"strconv"
	"strings"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/thaw-project/thaw/kind"
)

// domain marks our error details among those of others. Several kinds share a code,
// so the kind itself travels as the reason of an ErrorInfo.
const domain = "thaw"

// The first row of a code is the kind it means when a peer sent no detail.
var kindCodes = []struct {
	kind kind.Kind
	code codes.Code
}{
	{kind.Invalid, codes.InvalidArgument},
	{kind.NotFound, codes.NotFound},
	{kind.Exists, codes.AlreadyExists},
	{kind.InUse, codes.FailedPrecondition},
	{kind.ReadOnly, codes.FailedPrecondition},
	{kind.NoSpace, codes.ResourceExhausted},
	{kind.Corrupt, codes.DataLoss},
	{kind.Unsupported, codes.Unimplemented},
	{kind.Denied, codes.PermissionDenied},
	{kind.Denied, codes.Unauthenticated},
	{kind.Unavailable, codes.Unavailable},
	{kind.Unavailable, codes.Aborted},
	{kind.Unavailable, codes.DeadlineExceeded},
	{kind.Canceled, codes.Canceled},
	{kind.IO, codes.Internal},
}

// ToStatus returns err as a gRPC status error: its kind decides the code and travels
// beside it. An err that is a status already stays as it is; one without a kind is
// codes.Unknown; nil stays nil.
func ToStatus(err error) error {
	if err == nil {
		return nil
	}
	if _, ok := status.FromError(err); ok {
		return err
	}
	switch {
	case errors.Is(err, context.Canceled):
		return status.Error(codes.Canceled, err.Error())
	case errors.Is(err, context.DeadlineExceeded):
		return status.Error(codes.DeadlineExceeded, err.Error())
	}
	k := kind.Of(err)
	for _, row := range kindCodes {
		if row.kind != k {
			continue
		}
		s, derr := status.New(row.code, err.Error()).WithDetails(&errdetails.ErrorInfo{Reason: string(k), Domain: domain})
		if derr != nil { // only for a detail that cannot be marshalled
			return status.Error(row.code, err.Error())
		}
		return s.Err()
	}
	return status.Error(codes.Unknown, err.Error())
}

// remote is an error that a peer sent: its text without gRPC's prefix, its kind,
// and the status below for those who ask.
type remote struct{ status *status.Status }

// unreached is how gRPC says that there is no connection, around the reason for it.
var unreached = regexp.MustCompile(`connection error: desc = ("(?:[^"\\]|\\.)*")`)

func (e *remote) Error() string {
	return unreached.ReplaceAllStringFunc(e.status.Message(), func(text string) string {
		inner, err := strconv.Unquote(strings.TrimPrefix(text, "connection error: desc = "))
		if err != nil {
			return text
		}
		inner = strings.TrimPrefix(strings.TrimPrefix(inner, "transport: "), "Error while dialing: ")
		if strings.HasPrefix(inner, "error reading server preface: ") {
			return "whoever listens there does not answer: it is starting, or it is another program: " + inner
		}
		return inner
	})
}

func (e *remote) GRPCStatus() *status.Status { return e.status }
func (e *remote) Is(target error) bool {
	switch e.status.Code() {
	case codes.Canceled:
		return target == context.Canceled
	case codes.DeadlineExceeded:
		return target == context.DeadlineExceeded
	}
	return false
}

// FromStatus turns an error from a gRPC call into one that carries the kind the peer
// gave it; others, and nil, stay as they are.
func FromStatus(err error) error {
	if err == nil {
		return nil
	}
	s, ok := status.FromError(err)
	if !ok || s.Code() == codes.OK {
		return err
	}
	e := &remote{status: s}
	for _, d := range s.Details() {
		if info, ok := d.(*errdetails.ErrorInfo); ok && info.GetDomain() == domain {
			for _, row := range kindCodes {
				if string(row.kind) == info.GetReason() {
					return kind.Wrap(row.kind, e)
				}
			}
		}
	}
	for _, row := range kindCodes {
		if row.code == s.Code() {
			return kind.Wrap(row.kind, e)
		}
	}
	return e
}
