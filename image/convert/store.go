package convert

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"time"

	"google.golang.org/grpc"

	attacherv1 "github.com/thaw-project/thaw/api/attacher/v1"
	"github.com/thaw-project/thaw/attacher/rpcerr"
	"github.com/thaw-project/thaw/kind"
)

const (
	// outage is how long the attacher may be away: a server that is upgraded or
	// killed is back within seconds, and the data file only pauses meanwhile.
	outage = 30 * time.Second
	// retryFirst and retryMost bound the pauses between attempts.
	retryFirst = 50 * time.Millisecond
	retryMost  = time.Second
	// cleanup bounds what is done after a conversion failed or was cancelled. The
	// end of the hold does the same, later.
	cleanup = 10 * time.Second
)

// store is the attacher as one conversion sees it: calls that outlast a restart of
// the server, and a hold that is renewed after one.
type store struct {
	client attacherv1.AttacherClient
	owner  string
	logger *slog.Logger
}

// call makes a unary call again while the attacher cannot be reached, for outage.
// Every mutation of the contract is idempotent, so it is safe to repeat one that
// may have taken effect.
func call[Q, A any](ctx context.Context, f func(context.Context, Q, ...grpc.CallOption) (A, error), request Q) (A, error) {
	var answer A
	err := again(ctx, func() (err error) {
		answer, err = f(ctx, request)
		return err
	})
	return answer, err
}

// owned is call for requests that need the hold. A restarted attacher refuses them
// with kind.InUse until the hold is taken again, which may be a moment later.
func owned[Q, A any](ctx context.Context, f func(context.Context, Q, ...grpc.CallOption) (A, error), request Q) (A, error) {
	var answer A
	err := again(ctx, func() (err error) {
		answer, err = f(ctx, request)
		return err
	}, kind.InUse)
	return answer, err
}

// again repeats f while it fails with kind.Unavailable or one of also.
func again(ctx context.Context, f func() error, also ...kind.Kind) error {
	deadline := time.Now().Add(outage)
	pause := retryFirst
	for {
		err := rpcerr.FromStatus(f())
		k := kind.Of(err)
		if k != kind.Unavailable && !slices.Contains(also, k) || err == nil || time.Now().After(deadline) {
			return err
		}
		select {
		case <-ctx.Done():
			return kind.Wrap(kind.Canceled, context.Cause(ctx))
		case <-time.After(pause):
		}
		pause = min(2*pause, retryMost)
	}
}

// hold takes the hold and keeps it until release, which waits until no goroutine is
// left.
func (s *store) hold(ctx context.Context) (release func(), err error) {
	ctx, cancel := context.WithCancel(ctx)
	stream, err := s.take(ctx)
	if err != nil {
		cancel()
		return nil, err
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			for {
				if _, err = stream.Recv(); err != nil {
					break
				}
			}
			if ctx.Err() != nil {
				return
			}
			s.logger.Warn("hold on the attacher was lost, taking it again", "error", rpcerr.FromStatus(err))
			if stream, err = s.take(ctx); err != nil {
				if ctx.Err() == nil {
					// What is being written is about to disappear, and fails then.
					s.logger.Error("hold on the attacher could not be taken again", "error", err)
				}
				return
			}
		}
	}()
	return func() {
		cancel()
		<-done
	}, nil
}

func (s *store) take(ctx context.Context) (grpc.ServerStreamingClient[attacherv1.HoldResponse], error) {
	var stream grpc.ServerStreamingClient[attacherv1.HoldResponse]
	err := again(ctx, func() (err error) {
		if stream, err = s.client.Hold(ctx, &attacherv1.HoldRequest{Owner: s.owner}); err == nil {
			_, err = stream.Recv()
		}
		return err
	}, kind.InUse) // the attacher may not have noticed the end of the stream before
	return stream, err
}

// lvol returns the lvol called name, or nil.
func (s *store) lvol(ctx context.Context, name string) (*attacherv1.Lvol, error) {
	l, err := call(ctx, s.client.GetLvol, &attacherv1.GetLvolRequest{Name: name})
	if errors.Is(err, kind.NotFound) {
		return nil, nil
	}
	return l, err
}

func (s *store) remove(ctx context.Context, name string) error {
	_, err := call(ctx, s.client.DeleteLvol, &attacherv1.DeleteLvolRequest{Name: name})
	if errors.Is(err, kind.NotFound) {
		return nil
	}
	return err
}

func (s *store) unexport(ctx context.Context, name string) error {
	_, err := owned(ctx, s.client.Unexport, &attacherv1.UnexportRequest{Lvol: name, Owner: s.owner})
	if errors.Is(err, kind.NotFound) {
		return nil
	}
	return err
}
