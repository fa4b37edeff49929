//go:build ceph

package rbd

import (
	"context"
	"testing"
	"time"

	"github.com/ceph/go-ceph/rbd"

	"github.com/thaw-project/thaw/kind"
)

// TestKinds is what callers are told of what librbd says, and of their own end.
func TestKinds(t *testing.T) {
	b := &Backend{pending: make(chan struct{}, 1)}
	defer b.own.Wait()
	failing := func(err error) kind.Kind {
		return kind.Of(b.do(t.Context(), "try", time.Minute, nil, func(context.Context) error { return err }))
	}
	for err, want := range map[error]kind.Kind{
		rbd.ErrNotFound: kind.NotFound, rbd.ErrImageNotOpen: kind.Unavailable, context.Canceled: kind.Canceled,
		kind.Errorf(kind.InUse, "it is open"): kind.InUse, nil: "",
	} {
		if got := failing(err); got != want {
			t.Errorf("%v: kind %q, want %q", err, got, want)
		}
	}
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	if err := b.do(gone, "try", 0, nil, func(ctx context.Context) error { <-ctx.Done(); return nil }); err != nil && kind.Of(err) != kind.Canceled {
		t.Error(err)
	}
}
