//go:build !ceph

package daemon

import (
	"context"
	"log/slog"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/node/remote"
	"github.com/thaw-project/thaw/target/bdev"
)

func openRBD(context.Context, Config, *slog.Logger) (storage, error) {
	return storage{}, kind.Errorf(kind.Unsupported, "pool.backend %s needs a program that was built with the tag 'ceph'", BackendRBD)
}

// rbdOpener is nil: blocks of stores in Ceph are kind.Unsupported here.
func (s *Server) rbdOpener([]RemoteConfig) func(context.Context, remote.RBDImage) (bdev.Device, error) {
	return nil
}
