//go:build ceph

package rbd

import (
	"context"
	"testing"
	"time"

	"github.com/ceph/go-ceph/rbd"

	"github.com/thaw-project/thaw/attacher"
	"github.com/thaw-project/thaw/kind"
)

// What needs no cluster.

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

// TestOpenAfterClose: librbd must not hear of a connection that is gone.
func TestOpenAfterClose(t *testing.T) {
	o := &Opener{o: Options{Timeout: time.Minute}, c: &cluster{}, open: newTable(time.Minute), calls: make(chan struct{}, 1), closed: true}
	for range 2 {
		if _, err := o.Open(t.Context(), attacher.RBDImage{Image: "x"}, true); kind.Of(err) != kind.Unavailable {
			t.Error(err)
		}
	}
}

// TestCycles is an index that was damaged so that it has no end.
func TestCycles(t *testing.T) {
	x := newIndex()
	for id, parent := range map[string]string{"a": "", "b": "a", "c": "b"} {
		x.set(&lvolRecord{UUID: id, Name: id, Parent: parent})
		x.images[id] = &imageRecord{ID: id, Parent: parent}
	}
	if x.endless() {
		t.Error("a chain of three is taken for endless")
	}
	x.images["a"] = &imageRecord{ID: "a", Parent: "c"}
	if !x.endless() {
		t.Error("images go round unnoticed")
	}
	x.images["a"] = &imageRecord{ID: "a"}
	x.set(&lvolRecord{UUID: "b", Name: "b", Parent: "b"})
	if !x.endless() {
		t.Error("lvols go round unnoticed")
	}
}
