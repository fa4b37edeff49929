//go:build ceph

package daemon

import (
	"context"
	"errors"
	"log/slog"

	"github.com/thaw-project/thaw/attacher"
	"github.com/thaw-project/thaw/attacher/backend/rbd"
	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/node/remote"
	"github.com/thaw-project/thaw/target/bdev"
)

// openRBD opens the store in Ceph.
func openRBD(ctx context.Context, config Config, logger *slog.Logger) (storage, error) {
	wait, cancel := context.WithTimeout(ctx, peerWait)
	defer cancel()
	b, err := rbd.New(wait, config.Pool.RBD.options(logger))
	if err != nil {
		return storage{}, err
	}
	return storage{Backend: b, export: b.Exporter}, nil
}

func (r *RBDConfig) options(logger *slog.Logger) rbd.Options {
	return rbd.Options{Pool: r.Pool, Config: r.Config, User: r.User, Prefix: r.Prefix, Logger: logger}
}

// rbdImages opens images of Ceph that stores export. It connects when it first has to, so
// that a node starts while Ceph is away.
type rbdImages struct {
	o      rbd.Options
	gate   chan struct{} // capacity 1: who fills it connects, which may take as long as its context
	opener *rbd.Opener   // only inside the gate; nil until connected
}

func (r *rbdImages) connect(ctx context.Context) (*rbd.Opener, error) {
	select {
	case r.gate <- struct{}{}:
		defer func() { <-r.gate }()
	case <-ctx.Done():
		return nil, kind.Wrap(kind.Unavailable, context.Cause(ctx))
	}
	if r.opener == nil {
		opener, err := rbd.NewOpener(ctx, r.o)
		if err != nil {
			return nil, err
		}
		r.opener = opener
	}
	return r.opener, nil
}

func (r *rbdImages) open(ctx context.Context, image remote.RBDImage) (bdev.Device, error) {
	opener, err := r.connect(ctx)
	if err != nil {
		return nil, err
	}
	return opener.Open(ctx, attacher.RBDImage(image), true)
}

func (r *rbdImages) close() error {
	r.gate <- struct{}{} // those who connect end with the Remote, which was closed before
	defer func() { <-r.gate }()
	if r.opener == nil {
		return nil
	}
	return r.opener.Close()
}

// rbdOpener is what opens images of Ceph for this node, nil when none of its stores exports
// any, or others read them for it.
func (s *Server) rbdOpener(remotes []RemoteConfig) func(context.Context, remote.RBDImage) (bdev.Device, error) {
	if !s.showsDisks() {
		return nil
	}
	var all []*rbdImages
	for _, r := range remotes {
		if r.Transport == remote.TransportRBD {
			images := &rbdImages{o: r.RBD.options(s.logger.With("part", "rbd")), gate: make(chan struct{}, 1)}
			s.onClose("images of Ceph", images.close)
			all = append(all, images)
		}
	}
	if len(all) == 0 {
		return nil
	}
	return func(ctx context.Context, image remote.RBDImage) (d bdev.Device, err error) {
		// An image says in which pool of which cluster it is, and one that has another is
		// kind.Invalid.
		for _, images := range all {
			if d, err = images.open(ctx, image); !errors.Is(err, kind.Invalid) {
				return d, err
			}
		}
		return nil, err
	}
}
