package daemon

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	attacherv1 "github.com/thaw-project/thaw/api/attacher/v1"
	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/lvol"
)

// OpenPool opens the configured pool, which must exist and be in nobody's use.
func OpenPool(config Config, logger *slog.Logger) (*lvol.Store, error) {
	if logger == nil {
		logger = slog.New(slog.DiscardHandler)
	}
	dir := config.Paths().Pool
	if _, err := os.Stat(filepath.Join(dir, "meta.db")); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil, kind.Errorf(kind.NotFound, "there is no pool in %s: 'thaw server' creates one at its first start; or name its --root directory", dir)
		}
		return nil, fmt.Errorf("open pool: %w", err)
	}
	return lvol.Open(lvol.Options{Dir: dir, Device: config.Pool.Device, Uring: config.Pool.IO == "uring", Logger: logger})
}

// ensurePool opens the pool and creates it first if there is none.
func ensurePool(config Config, logger *slog.Logger) (*lvol.Store, error) {
	store, err := OpenPool(config, logger)
	if !errors.Is(err, kind.NotFound) {
		return store, err
	}
	dir := config.Paths().Pool
	capacity := int64(config.Pool.Capacity)
	if capacity == 0 && config.Pool.Device == "" {
		// The file is sparse and ENOSPC of the file system below is handled, so
		// the file system's own size is an honest upper bound.
		var st unix.Statfs_t
		if err := unix.Statfs(config.Root, &st); err != nil {
			return nil, fmt.Errorf("size of the file system of %s: %w", config.Root, err)
		}
		capacity = int64(st.Blocks) * st.Bsize
		capacity -= capacity % int64(config.Pool.Cluster)
		if capacity < minPoolClusters*int64(config.Pool.Cluster) {
			return nil, kind.Errorf(kind.NoSpace, "no space left for a pool in %s, whose file system has %d bytes: choose another --root", config.Root, capacity)
		}
	}
	logger.Info("creating pool", "dir", dir, "device", config.Pool.Device, "capacity_bytes", capacity)
	err = lvol.Create(lvol.CreateOptions{
		Dir: dir, Device: config.Pool.Device, CapacityBytes: capacity, ClusterBytes: int64(config.Pool.Cluster), Name: config.Target,
	})
	if err != nil {
		return nil, err
	}
	return OpenPool(config, logger)
}

// CheckReport converts a store's report to its form on the wire.
func CheckReport(r lvol.Report) *attacherv1.CheckStoreResponse {
	out := &attacherv1.CheckStoreResponse{CheckedClusters: r.CheckedClusters, ScrubbedBytes: r.ScrubbedBytes}
	for _, p := range r.Problems {
		out.Problems = append(out.Problems, &attacherv1.Problem{
			Type: string(p.Type), Lvol: p.Lvol, OffsetBytes: p.OffsetBytes, Detail: p.Detail, Repaired: p.Repaired,
		})
	}
	return out
}
