//go:build !ceph

package daemon

import (
	"context"
	"log/slog"

	"github.com/thaw-project/thaw/kind"
)

func openRBD(context.Context, Config, *slog.Logger) (storage, error) {
	return storage{}, kind.Errorf(kind.Unsupported, "pool.backend %s needs a program that was built with the tag 'ceph'", BackendRBD)
}
