package rpcerr

import (
	"context"
	"errors"
	"fmt"
	"io"
	"syscall"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/thaw-project/thaw/kind"
)

func TestKindsSurviveTheWire(t *testing.T) {
	for _, k := range []kind.Kind{
		kind.Invalid, kind.NotFound, kind.Exists, kind.InUse, kind.ReadOnly, kind.NoSpace, kind.Corrupt,
		kind.Unsupported, kind.Denied, kind.Unavailable, kind.Canceled, kind.IO,
	} {
		sent := fmt.Errorf("doing: %w", kind.Errorf(k, "it failed"))
		s := ToStatus(sent)
		if c := status.Code(s); c == codes.OK || c == codes.Unknown {
			t.Errorf("%s has code %s", k, c)
		}
		// What a client sees is made from the code, message and details alone.
		got := FromStatus(status.FromProto(status.Convert(s).Proto()).Err())
		if kind.Of(got) != k || !errors.Is(got, k) || got.Error() != sent.Error() {
			t.Errorf("%s came back as %q (%s)", k, got, kind.Of(got))
		}
		if again := FromStatus(ToStatus(got)); kind.Of(again) != k || again.Error() != sent.Error() {
			t.Errorf("%s passed on came back as %q (%s)", k, again, kind.Of(again))
		}
	}
}

func TestErrorsOfOthers(t *testing.T) {
	for _, c := range []struct {
		err  error
		kind kind.Kind
		code codes.Code
	}{
		{syscall.ENOSPC, kind.NoSpace, codes.ResourceExhausted},
		{fmt.Errorf("wait: %w", context.Canceled), kind.Canceled, codes.Canceled},
		{fmt.Errorf("wait: %w", context.DeadlineExceeded), kind.Unavailable, codes.DeadlineExceeded},
		{errors.New("who knows"), "", codes.Unknown},
		{status.Error(codes.Aborted, "a peer of another make"), kind.Unavailable, codes.Aborted},
	} {
		s := ToStatus(c.err)
		got := FromStatus(s)
		if status.Code(s) != c.code || kind.Of(got) != c.kind {
			t.Errorf("%v: code %s, kind %q; want %s, %q", c.err, status.Code(s), kind.Of(got), c.code, c.kind)
		}
	}
	if err := FromStatus(ToStatus(context.Canceled)); !errors.Is(err, context.Canceled) {
		t.Errorf("%v is not context.Canceled any more", err)
	}
	if err := FromStatus(ToStatus(context.DeadlineExceeded)); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v is not context.DeadlineExceeded any more", err)
	}
	if ToStatus(nil) != nil || FromStatus(nil) != nil || FromStatus(io.EOF) != io.EOF {
		t.Error("nil or io.EOF changed")
	}
}

// TestUnreached: what gRPC wraps around the reason that there is no connection is no help.
func TestUnreached(t *testing.T) {
	for text, want := range map[string]string{
		`connection error: desc = "transport: Error while dialing: dial tcp 127.0.0.1:1: connect: connection refused"`: "dial tcp 127.0.0.1:1: connect: connection refused",
		`connection error: desc = "transport: authentication handshake failed: tls: candidate \"A\""`:                  `authentication handshake failed: tls: candidate "A"`,
		`waited: connection error: desc = "error reading server preface: EOF"`:                                         "waited: whoever listens there does not answer: it is starting, or it is another program: error reading server preface: EOF",
		`latest balancer error: connection error: desc = "transport: x" and more`:                                      "latest balancer error: x and more",
		`connection error: desc = "cut off`:                                                                            `connection error: desc = "cut off`,
	} {
		if got := FromStatus(status.Error(codes.Unavailable, text)); got.Error() != want || !errors.Is(got, kind.Unavailable) {
			t.Errorf("%q, want %q", got, want)
		}
	}
}
