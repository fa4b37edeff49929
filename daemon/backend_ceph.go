//go:build ceph

package daemon

import (
	"context"
	"errors"
	"log/slog"
	"sync"

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
	o rbd.Options

	mu     sync.Mutex
	opener *rbd.Opener // guarded by mu; nil until connected
}

func (r *rbdImages) connect(ctx context.Context) (*rbd.Opener, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
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
	r.mu.Lock()
	defer r.mu.Unlock()
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
			images := &rbdImages{o: r.RBD.options(s.logger.With("part", "rbd"))}
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
