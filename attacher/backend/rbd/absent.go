//go:build !ceph

package rbd

import (
	"context"

	"github.com/thaw-project/thaw/attacher"
	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/target/bdev"
)

// Present tells whether this build has Ceph.
const Present = false

// absent is what every function says, about options that make sense.
func absent(o Options) error {
	o.ensureDefaults()
	if err := o.validate(); err != nil {
		return err
	}
	return errAbsent()
}

func errAbsent() error {
	return kind.Errorf(kind.Unsupported, "this build has no Ceph: build with 'make ceph', or with -tags ceph and CGO_ENABLED=1")
}

// Backend exists in builds with Ceph only.
type Backend struct{ attacher.Backend }

// New returns kind.Unsupported.
func New(_ context.Context, o Options) (*Backend, error) { return nil, absent(o) }

// Exporter returns kind.Unsupported.
func (*Backend) Exporter() (attacher.Exporter, error) { return nil, errAbsent() }

// Opener exists in builds with Ceph only.
type Opener struct{}

// NewOpener returns kind.Unsupported.
func NewOpener(_ context.Context, o Options) (*Opener, error) { return nil, absent(o) }

// Open returns kind.Unsupported.
func (*Opener) Open(context.Context, attacher.RBDImage, bool) (bdev.Device, error) {
	return nil, errAbsent()
}

// Close does nothing.
func (*Opener) Close() error { return nil }
