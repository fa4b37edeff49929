package daemon

import (
	"context"
	"log/slog"

	"github.com/thaw-project/thaw/kind"
)

func openSPDK(context.Context, Config, bool, *slog.Logger) (storage, error) {
	return storage{}, kind.Errorf(kind.Unsupported, "pool.backend %s is not part of this build", BackendSPDK)
}
