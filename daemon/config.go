package daemon

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/docker/go-units"
	"github.com/pelletier/go-toml/v2"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/node/cache"
	"github.com/thaw-project/thaw/node/present/choose"
)

// Defaults that need no file.
const (
	DefaultRoot = "/var/lib/thaw"
	DefaultRun  = "/run/thaw"
	// DefaultConfigPath is read when it exists and no --config is given.
	DefaultConfigPath = "/etc/thaw/config.toml"
)

// Size is a number of bytes that reads and writes as "20GiB".
type Size int64

// UnmarshalText parses "20GiB", "512 MiB" or a plain number of bytes.
func (s *Size) UnmarshalText(text []byte) error {
	n, err := ParseSize(string(text))
	*s = Size(n)
	return err
}

// MarshalText writes the size in binary units.
func (s Size) MarshalText() ([]byte, error) {
	return []byte(units.CustomSize("%.4g%s", float64(s), 1024, []string{"B", "KiB", "MiB", "GiB", "TiB", "PiB"})), nil
}

// maxSize bounds a size: what is more overflows as soon as anything is added.
const maxSize = 1 << 62

// ParseSize parses a size as the configuration and the command line write it; K, M,
// G and T are powers of 1024 with or without "iB".
func ParseSize(text string) (int64, error) {
	n, err := units.RAMInBytes(text)
	if err != nil || n <= 0 || n > maxSize {
		return 0, kind.Errorf(kind.Invalid, "size %.40q: write it as 20GiB or 512MiB", text)
	}
	return n, nil
}

// Duration is a time.Duration that reads as "10s".
type Duration time.Duration

// UnmarshalText parses a duration as time.ParseDuration does.
func (d *Duration) UnmarshalText(text []byte) error {
	v, err := time.ParseDuration(string(text))
	if err != nil || v <= 0 {
		return kind.Errorf(kind.Invalid, "duration %.40q: write it as 10s or 2m", text)
	}
	*d = Duration(v)
	return nil
}

// MarshalText writes the duration as "10s".
func (d Duration) MarshalText() ([]byte, error) { return []byte(time.Duration(d).String()), nil }

// Config is the server's configuration; docs/configuration.md describes each key.
type Config struct {
	// Root holds what survives a reboot, Run what does not.
	Root string `toml:"root"`
	Run  string `toml:"run"`
	// Process is which process of a machine this is; ProcessServer is all in one.
	Process Process `toml:"-"`
	// Roles are what this machine does.
	Roles []string `toml:"roles"`
	// Target is the name by which annotations call this store.
	Target   string     `toml:"target"`
	LogLevel slog.Level `toml:"log_level"`

	// Node is the name by which the store of this machine knows its other processes.
	NodeName string `toml:"node"`

	Export ExportConfig   `toml:"export"`
	Remote []RemoteConfig `toml:"remote"`
	Cache  CacheConfig    `toml:"cache"`

	Presentation PresentationConfig `toml:"presentation"`
	Pool         PoolConfig         `toml:"pool"`
	Snapshotter  SnapshotterConfig  `toml:"snapshotter"`
	Metrics      MetricsConfig      `toml:"metrics"`

	CardPart   CardConfig    `toml:"card"`
	ImagesPart ImagesConfig  `toml:"images"`
	PCIe       PCIeConfig    `toml:"pcie"`
	Convert    ConvertConfig `toml:"convert"`
}

// PoolConfig describes the lvol store. Everything but IO matters only when the pool
// is created.
type PoolConfig struct {
	// Backend is what keeps lvols: BackendEmbedded, whose keys follow, or another with a
	// table of its own.
	Backend string `toml:"backend"`
	// Device is a block device to use instead of the file <root>/pool/data.
	Device string `toml:"device"`
	// Capacity of the (sparse) file; 0 takes the size of the file system it is on.
	Capacity Size `toml:"capacity"`
	Cluster  Size `toml:"cluster"`
	// IO is "file" (pread and pwrite) or "uring" (io_uring where the kernel allows
	// it, else file).
	IO string `toml:"io"`

	SPDK SPDKConfig `toml:"spdk"`
	RBD  RBDConfig  `toml:"rbd"`
}

// SnapshotterConfig describes the containerd snapshotter.
type SnapshotterConfig struct {
	// AttachTimeout bounds how long a remote Prepare may take before the image is
	// unpacked the ordinary way.
	AttachTimeout Duration `toml:"attach_timeout"`
	// WritableSize is the size of a container's block-level writable layer over an
	// EROFS block; over ext4 it is the block's own virtual size.
	WritableSize Size `toml:"writable_size"`
	// AsyncRemove defers the deletion of directories to Cleanup.
	AsyncRemove bool `toml:"async_remove"`
	// Targets are the names of the stores that image-mgmt attaches blocks of when it is not
	// in this process; by default those of [[remote]], or else that of this machine.
	Targets []string `toml:"targets"`
	// Images is where image-mgmt is when it is not in this process; by default on this
	// machine.
	Images PeerConfig `toml:"images"`
}

// MetricsConfig describes the metrics listener; <run>/metrics.sock always exists.
type MetricsConfig struct {
	// Address is a TCP address such as "127.0.0.1:9477", off when empty.
	Address string `toml:"address"`
}

// CacheConfig describes the cache of what other machines store.
type CacheConfig struct {
	Enabled bool `toml:"enabled"`
	// Dir is <root>/cache if empty.
	Dir  string `toml:"dir"`
	Size Size   `toml:"size"`
}

func (c *Config) cacheDir() string {
	if c.Cache.Dir != "" {
		return c.Cache.Dir
	}
	return c.Paths().Cache
}

// DefaultConfig is the configuration without a file.
func DefaultConfig() Config {
	return Config{
		Process:      ProcessServer,
		Root:         DefaultRoot,
		Run:          DefaultRun,
		Roles:        []string{RoleStore, RoleNode},
		Target:       "local",
		NodeName:     "localhost",
		ImagesPart:   ImagesConfig{Mode: ImagesHost},
		LogLevel:     slog.LevelInfo,
		Presentation: PresentationConfig{Kind: PresentationAuto},
		Cache:        CacheConfig{Enabled: true, Size: cache.DefaultSizeBytes},
		Pool:         PoolConfig{Backend: BackendEmbedded, Cluster: 64 << 10, IO: "file"},
		Snapshotter: SnapshotterConfig{
			AttachTimeout: Duration(10 * time.Second),
			WritableSize:  20 << 30,
		},
	}
}

// LoadConfig reads the TOML file at path over the defaults; unknown keys are errors.
// With path empty the file at DefaultConfigPath is read if it exists.
func LoadConfig(path string) (Config, error) {
	config := DefaultConfig()
	optional := path == ""
	if optional {
		path = DefaultConfigPath
	}
	f, err := os.Open(path)
	if optional && errors.Is(err, fs.ErrNotExist) {
		return config, nil
	}
	if err != nil {
		return Config{}, fmt.Errorf("read configuration: %w", err)
	}
	defer f.Close()
	if err := toml.NewDecoder(f).DisallowUnknownFields().Decode(&config); err != nil {
		var strict *toml.StrictMissingError
		if errors.As(err, &strict) {
			var keys []string
			for _, e := range strict.Errors[:min(len(strict.Errors), 5)] { // enough to start with
				row, _ := e.Position()
				keys = append(keys, fmt.Sprintf("line %d: key %.80q does not exist", row, strings.Join(e.Key(), ".")))
			}
			return Config{}, kind.Errorf(kind.Invalid, "configuration %s, %s: 'thaw server --print-config' shows those that do", path, strings.Join(keys, ", "))
		}
		var decode *toml.DecodeError
		if errors.As(err, &decode) {
			row, _ := decode.Position()
			where := fmt.Sprintf("line %d", row)
			if key := strings.Join(decode.Key(), "."); key != "" {
				where += fmt.Sprintf(", key %.80q", key)
			}
			// The parser's words for a value of another type name this program's types.
			text := strings.TrimPrefix(err.Error(), "toml: ")
			text = goType.ReplaceAllString(goTable.ReplaceAllString(text, " into a table"), " into a $1")
			text = strings.ReplaceAll(text, " into a []string", " into a list of strings")
			text = goLevel.ReplaceAllString(text, "level $1: must be DEBUG, INFO, WARN or ERROR")
			return Config{}, kind.Errorf(kind.Invalid, "configuration %s, %s: %s", path, where, text)
		}
		return Config{}, kind.Errorf(kind.Invalid, "configuration %s: %w", path, err)
	}
	return config, nil
}

var (
	goTable = regexp.MustCompile(` into struct field \S+ of type daemon\.\S+$`)
	goType  = regexp.MustCompile(` into struct field \S+ of type (\S+)$`)
	goLevel = regexp.MustCompile(`^slog: level string (".*"): .*$`)
)

// minPoolClusters is the least that a pool is made with: one holds its superblock.
const minPoolClusters = 4

// minAttachTimeout is less than any attach takes.
const minAttachTimeout = Duration(time.Millisecond)

var targetName = regexp.MustCompile(`^[a-z0-9.-]{1,64}$`)

// Validate checks the configuration once, before anything starts, and makes its
// paths absolute.
func (c *Config) Validate() error {
	for _, p := range []*string{&c.Root, &c.Run} {
		if *p == "" {
			return kind.Errorf(kind.Invalid, "root and run directories must be set")
		}
		abs, err := filepath.Abs(*p)
		if err != nil {
			return kind.Errorf(kind.Invalid, "path %s: %w", *p, err)
		}
		*p = abs
	}
	// Unix socket paths are limited to 107 bytes (sun_path, unix(7)).
	if len(filepath.Join(c.Run, "snapshotter-metrics.sock")) > 107 {
		return kind.Errorf(kind.Invalid, "run directory %s is too long: sockets in it would exceed 107 bytes", c.Run)
	}
	if err := c.validateRoles(); err != nil {
		return err
	}
	if err := errors.Join(c.validateCard(), c.validateImages()); err != nil {
		return kind.Wrap(kind.Invalid, err)
	}
	if !targetName.MatchString(c.Target) {
		return kind.Errorf(kind.Invalid, "target %.80q: must be 1 to 64 of a-z 0-9 . -", c.Target)
	}
	if s := int64(c.Pool.Cluster); s < 16<<10 || s > 4<<20 || s&(s-1) != 0 {
		return kind.Errorf(kind.Invalid, "pool.cluster of %d bytes: must be a power of two from 16KiB to 4MiB", s)
	}
	if err := c.validateBackend(); err != nil {
		return err
	}
	switch c.Pool.IO {
	case "file", "uring":
	default:
		return kind.Errorf(kind.Invalid, "pool.io %.40q: must be file or uring", c.Pool.IO)
	}
	if s := c.Pool.Capacity; s != 0 && s < minPoolClusters*c.Pool.Cluster {
		return kind.Errorf(kind.Invalid, "pool.capacity of %d bytes: must hold at least %d clusters of %d bytes", s, minPoolClusters, c.Pool.Cluster)
	}
	if k := c.Presentation.Kind; k != PresentationAuto && !slices.Contains(choose.Names(), k) {
		return kind.Errorf(kind.Invalid, "presentation.kind %.40q: must be %s or one of %s", k, PresentationAuto, strings.Join(choose.Names(), ", "))
	}
	if c.Cache.Enabled {
		if err := (cache.Options{Dir: c.cacheDir(), SizeBytes: int64(c.Cache.Size)}).Validate(); err != nil {
			return kind.Errorf(kind.Invalid, "cache: %w", err)
		}
	}
	if c.Pool.Device != "" && c.Pool.Capacity != 0 {
		return kind.Errorf(kind.Invalid, "pool.capacity is the size of a file; with pool.device the device's size counts")
	}
	if s := c.Snapshotter.WritableSize; s < 64<<20 || s > 16<<40 || s%(1<<20) != 0 {
		return kind.Errorf(kind.Invalid, "snapshotter.writable_size of %d bytes: must be whole MiB from 64MiB to 16TiB", s)
	}
	// A number without a unit is nanoseconds to the parser.
	if d := c.Snapshotter.AttachTimeout; d < minAttachTimeout {
		return kind.Errorf(kind.Invalid, "snapshotter.attach_timeout of %s: must be at least %s, written with a unit as \"10s\"", time.Duration(d), time.Duration(minAttachTimeout))
	}
	return nil
}

// PrintConfig writes the configuration in force as TOML.
func PrintConfig(w io.Writer, config Config) error {
	return toml.NewEncoder(w).Encode(config)
}
