//go:build ceph

package rbd

import (
	"context"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/lvol"
)

func (b *Backend) Map(name string, offset int64, maxRuns int) (lvol.BlockMap, error) {
	return lvol.BlockMap{}, kind.Errorf(kind.Unsupported, "todo")
}

func (b *Backend) Check(ctx context.Context, o lvol.CheckOptions) (lvol.Report, error) {
	return lvol.Report{}, kind.Errorf(kind.Unsupported, "todo")
}
