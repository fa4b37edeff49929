//go:build !ceph

package rbd_test

import (
	"context"
	"errors"
	"strings"
	"testing"

	"github.com/thaw-project/thaw/attacher/backend/rbd"
	"github.com/thaw-project/thaw/kind"
)

// TestAbsent: a build without Ceph says what is missing, and what is wrong anyway.
func TestAbsent(t *testing.T) {
	_, err := rbd.New(context.Background(), rbd.Options{Pool: "thaw"})
	if !errors.Is(err, kind.Unsupported) || !strings.Contains(err.Error(), "make ceph") {
		t.Errorf("open a store: %v", err)
	}
	if _, err := rbd.NewOpener(context.Background(), rbd.Options{Pool: "thaw"}); !errors.Is(err, kind.Unsupported) {
		t.Errorf("connect as a node: %v", err)
	}
	for _, o := range []rbd.Options{{}, {Pool: "p", Prefix: "a/b"}, {Pool: "p", ObjectBytes: 100_000}, {Pool: "p", Timeout: 1}} {
		if _, err := rbd.New(context.Background(), o); !errors.Is(err, kind.Invalid) {
			t.Errorf("options %+v: %v", o, err)
		}
	}
}
