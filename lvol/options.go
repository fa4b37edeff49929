package lvol

import (
	"io"
	"log/slog"
	"path/filepath"
	"strings"
	"time"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/lvol/device"
)

// Bounds of a pool's geometry.
const (
	MinClusterBytes     = 16 << 10
	MaxClusterBytes     = 4 << 20
	DefaultClusterBytes = 64 << 10

	// MaxLvolBytes bounds the virtual size: the top level of a map is one pointer
	// per 2 GiB, so this is 1 MiB of memory for an empty lvol of the largest size.
	MaxLvolBytes = 256 << 40

	// MaxCapacityBytes bounds the pool: its bitmap is 512 KiB of memory per 256 GiB
	// of 64 KiB clusters.
	MaxCapacityBytes = 256 << 40

	// MaxNameBytes bounds lvol and pool names.
	MaxNameBytes = 128
)

// CreateOptions says how to format a pool.
type CreateOptions struct {
	// Dir holds meta.db, redo.N and, unless Device is set, data. It is created
	// with mode 0700 if absent.
	Dir string
	// Device is an existing block device or file to keep the clusters on. It is
	// remembered in the pool, so that Open needs only Dir.
	Device string
	// OpenDevice, if set, supplies the device instead of Device or Dir/data.
	// Create closes it.
	OpenDevice func() (device.Device, error)
	// CapacityBytes is the size of the data file to create; it is sparse. 0 with
	// Device or OpenDevice: all of it.
	CapacityBytes int64
	// ClusterBytes is a power of two from MinClusterBytes to MaxClusterBytes; 0 is
	// DefaultClusterBytes.
	ClusterBytes int64
	// Name of the pool; empty is "default".
	Name string
	// Force formats a device that holds a pool already.
	Force bool
	// Now is the clock; nil is time.Now.
	Now func() time.Time
}

func (o *CreateOptions) ensureDefaults() {
	if o.ClusterBytes == 0 {
		o.ClusterBytes = DefaultClusterBytes
	}
	if o.Name == "" {
		o.Name = "default"
	}
	if o.Now == nil {
		o.Now = time.Now
	}
}

func (o *CreateOptions) validate() error {
	switch {
	case o.Dir == "":
		return kind.Errorf(kind.Invalid, "create pool: no directory given")
	case o.Device != "" && !filepath.IsAbs(o.Device):
		return kind.Errorf(kind.Invalid, "create pool: device %q must be an absolute path", o.Device)
	case !validClusterBytes(o.ClusterBytes):
		return kind.Errorf(kind.Invalid, "create pool: cluster size %d must be a power of two from %d to %d", o.ClusterBytes, MinClusterBytes, MaxClusterBytes)
	case o.CapacityBytes < 0 || o.CapacityBytes > MaxCapacityBytes:
		return kind.Errorf(kind.Invalid, "create pool: capacity %d must be at most %d", o.CapacityBytes, int64(MaxCapacityBytes))
	case o.CapacityBytes == 0 && o.Device == "" && o.OpenDevice == nil:
		return kind.Errorf(kind.Invalid, "create pool: capacity must be given")
	}
	return checkName(o.Name)
}

// Options says how to open a pool.
type Options struct {
	// Dir is the directory given to Create.
	Dir string
	// Device overrides where the pool remembers its device to be.
	Device string
	// OpenDevice, if set, supplies the device; the store closes it.
	OpenDevice func() (device.Device, error)
	// Uring reads and writes through io_uring where the kernel allows it.
	Uring bool
	// ReadOnly opens without changing anything on disk. Writes that a killed
	// process acknowledged but did not flush are seen, and not made durable.
	ReadOnly bool
	// Logger is for what an operator should know; nil is silence.
	Logger *slog.Logger
	// Now is the clock; nil is time.Now.
	Now func() time.Time
	// FlushInterval is how long acknowledged writes may stay unflushed when nobody
	// calls Flush; 0 is 5 s, negative means for ever (for tests).
	FlushInterval time.Duration
	// MaxDirtyPages bounds the map pages (of 4 MiB of an lvol each) that wait for a
	// flush, and with them the memory and the time one flush takes; a writer that
	// would exceed it flushes first. 0 is 2048: about 10 MiB.
	MaxDirtyPages int
	// MaxRedoBytes bounds the redo segment, and with it the time to open after a
	// kill; a writer that would exceed it flushes first. 0 is 64 MiB.
	MaxRedoBytes int64
	// MaxOpenPages bounds the map pages that may be marked open (see the package
	// doc), and with it what recovery after a power loss reads: 4 MiB each. 0 is 512.
	MaxOpenPages int
	// BallastBytes is kept preallocated beside meta.db so that a delete can commit
	// when the file system under the pool is full. 0 is 4 MiB; negative is none.
	BallastBytes int64
}

func (o *Options) ensureDefaults() {
	if o.Logger == nil {
		o.Logger = slog.New(slog.NewTextHandler(io.Discard, &slog.HandlerOptions{Level: slog.LevelError + 1}))
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.FlushInterval == 0 {
		o.FlushInterval = 5 * time.Second
	}
	if o.MaxDirtyPages == 0 {
		o.MaxDirtyPages = 2048
	}
	if o.MaxRedoBytes == 0 {
		o.MaxRedoBytes = 64 << 20
	}
	if o.MaxOpenPages == 0 {
		o.MaxOpenPages = 512
	}
	if o.BallastBytes == 0 {
		o.BallastBytes = 4 << 20
	}
}

func (o *Options) validate() error {
	switch {
	case o.Dir == "":
		return kind.Errorf(kind.Invalid, "open pool: no directory given")
	case o.MaxDirtyPages < 1 || o.MaxDirtyPages > 1<<16:
		return kind.Errorf(kind.Invalid, "open pool %s: MaxDirtyPages %d must be 1 to %d", o.Dir, o.MaxDirtyPages, 1<<16)
	case o.MaxRedoBytes < 4096 || o.MaxRedoBytes > 1<<30:
		return kind.Errorf(kind.Invalid, "open pool %s: MaxRedoBytes %d must be 4096 to %d", o.Dir, o.MaxRedoBytes, 1<<30)
	case o.MaxOpenPages < 1 || o.MaxOpenPages > 1<<16:
		return kind.Errorf(kind.Invalid, "open pool %s: MaxOpenPages %d must be 1 to %d", o.Dir, o.MaxOpenPages, 1<<16)
	case o.BallastBytes > 1<<30:
		return kind.Errorf(kind.Invalid, "open pool %s: BallastBytes %d must be at most %d", o.Dir, o.BallastBytes, 1<<30)
	}
	return nil
}

func validClusterBytes(n int64) bool {
	return n >= MinClusterBytes && n <= MaxClusterBytes && n&(n-1) == 0
}

// checkName holds lvol and pool names to 1 to 128 of [A-Za-z0-9._-].
func checkName(name string) error {
	if name == "" || len(name) > MaxNameBytes {
		return kind.Errorf(kind.Invalid, "name %.160q must have 1 to %d characters", name, MaxNameBytes)
	}
	if i := strings.IndexFunc(name, func(r rune) bool {
		return !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '.' || r == '_' || r == '-')
	}); i >= 0 {
		return kind.Errorf(kind.Invalid, "name %q has a character other than A-Z a-z 0-9 . _ -", name)
	}
	return nil
}

func checkSize(name string, sizeBytes int64) error {
	if sizeBytes <= 0 || sizeBytes%device.SectorBytes != 0 || sizeBytes > MaxLvolBytes {
		return kind.Errorf(kind.Invalid, "size %d of lvol %s must be a positive multiple of %d of at most %d", sizeBytes, name, device.SectorBytes, int64(MaxLvolBytes))
	}
	return nil
}
