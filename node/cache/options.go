package cache

import (
	"io"
	"log/slog"
	"path/filepath"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/thaw-project/thaw/kind"
)

// Bounds of a cache.
const (
	// MinUnitBytes and MaxUnitBytes bound what is fetched and kept at a time.
	MinUnitBytes     = 4 << 10
	MaxUnitBytes     = 256 << 10
	DefaultUnitBytes = 32 << 10

	DefaultSizeBytes = 10 << 30
	// MaxSizeBytes bounds the memory of the index: 2.3 GiB of it at the default unit.
	MaxSizeBytes = 1 << 40
	// minSlots is the smallest useful cache: one read of the longest kind.
	minSlots = 16

	// DefaultReadAheadBytes covers the round trip of a 10 Gbit/s link several times.
	DefaultReadAheadBytes = 2 << 20
)

// Options says what to open.
type Options struct {
	// Dir is the cache's own directory, made with mode 0700 if absent.
	Dir string
	// SizeBytes bounds the data on disk; the index takes 0.2 % more. 0 is
	// DefaultSizeBytes. A cache that was larger loses what does not fit.
	SizeBytes int64
	// UnitBytes is what is fetched and kept at a time, a power of two; 0 is what the
	// cache has, or DefaultUnitBytes. Another than it has empties it.
	UnitBytes int64
	// ReadAheadBytes is the largest window of sequential read-ahead of one stream;
	// 0 is DefaultReadAheadBytes, negative is none.
	ReadAheadBytes int64
	// Logger is for what an operator should know; nil is silence.
	Logger *slog.Logger
	// Now is the clock; nil is time.Now.
	Now func() time.Time
	// Registerer, if set, gets the metrics (thaw_cache_*) until Close.
	Registerer prometheus.Registerer

	// openFile, if set, is what a test gives instead of the files data and index.
	openFile func(name string, sizeBytes int64) (file, error)
}

func (o *Options) ensureDefaults() {
	if o.SizeBytes == 0 {
		o.SizeBytes = DefaultSizeBytes
	}
	if o.ReadAheadBytes == 0 {
		o.ReadAheadBytes = DefaultReadAheadBytes
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.NewTextHandler(io.Discard, &slog.HandlerOptions{Level: slog.LevelError + 1}))
	}
	if o.Now == nil {
		o.Now = time.Now
	}
}

// Validate reports kind.Invalid for what Open would refuse.
func (o Options) Validate() error {
	o.ensureDefaults()
	unit := o.UnitBytes
	if unit == 0 {
		unit = DefaultUnitBytes
	}
	switch {
	case o.Dir == "" || !filepath.IsAbs(o.Dir):
		return kind.Errorf(kind.Invalid, "node cache: directory %q must be an absolute path", o.Dir)
	case !validUnit(unit):
		return kind.Errorf(kind.Invalid, "node cache %s: unit %d must be a power of two from %d to %d", o.Dir, unit, MinUnitBytes, MaxUnitBytes)
	case o.SizeBytes < minSlots*unit || o.SizeBytes > MaxSizeBytes:
		return kind.Errorf(kind.Invalid, "node cache %s: size %d must be %d to %d", o.Dir, o.SizeBytes, minSlots*unit, int64(MaxSizeBytes))
	case o.ReadAheadBytes > 64<<20:
		return kind.Errorf(kind.Invalid, "node cache %s: read-ahead of %d must be at most %d", o.Dir, o.ReadAheadBytes, 64<<20)
	}
	return nil
}

func validUnit(n int64) bool { return n >= MinUnitBytes && n <= MaxUnitBytes && n&(n-1) == 0 }
