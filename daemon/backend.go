package daemon

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"

	"github.com/google/uuid"

	"github.com/thaw-project/thaw/attacher"
	"github.com/thaw-project/thaw/attacher/backend/embedded"
	"github.com/thaw-project/thaw/attacher/export"
	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/target/bdev"
)

// What a store keeps lvols in.
const (
	BackendEmbedded = "embedded" // this process
	BackendSPDK     = "spdk"     // SPDK or thaw target, through a bridge
	BackendRBD      = "rbd"      // Ceph
)

// SPDKConfig is the backend that reaches an SPDK, or thaw target, through a bridge.
type SPDKConfig struct {
	// Bridge is the bridge's Unix socket, or its host:port, which needs the three files.
	Bridge      string `toml:"bridge"`
	Certificate string `toml:"certificate"`
	Key         string `toml:"key"`
	CA          string `toml:"ca"`
	// Lvstore is the name of the lvstore that has the lvols.
	Lvstore string `toml:"lvstore"`
	// AIO is the file or block device that the lvstore lies on, by its path where the target
	// runs. Empty when somebody else makes the lvstore.
	AIO string `toml:"aio"`
	// Portals are where the target serves nodes, as "tcp://10.0.0.1:4420" or
	// "rdma://10.0.0.1:4420". Empty serves none.
	Portals []string `toml:"portals"`
	// Own is the portal, of TCP, by which this process opens lvols itself; by default the
	// first of Portals.
	Own string `toml:"own"`
}

// RBDConfig is the backend that keeps lvols as images of Ceph.
type RBDConfig struct {
	Pool string `toml:"pool"`
	// Config is Ceph's configuration file, User the client's name without "client.".
	Config string `toml:"config"`
	User   string `toml:"user"`
	// Prefix begins the names of this store's images.
	Prefix string `toml:"prefix"`
}

// storage is a backend with how it serves other machines.
type storage struct {
	attacher.Backend
	// export makes what shows lvols to other machines; nil when nothing is to be served.
	// It is closed, if it is an io.Closer, before the backend.
	export func() (attacher.Exporter, error)
}

// openBackend opens what the role store keeps lvols in. The embedded pool is made if there
// is none and create is set.
func openBackend(ctx context.Context, config Config, create bool, logger *slog.Logger) (storage, error) {
	switch config.Pool.Backend {
	case BackendEmbedded:
		return openEmbedded(config, create, logger)
	case BackendSPDK:
		return openSPDK(ctx, config, create, logger)
	case BackendRBD:
		return openRBD(ctx, config, logger)
	}
	return storage{}, kind.Errorf(kind.Invalid, "pool.backend %.40q is none", config.Pool.Backend)
}

func openEmbedded(config Config, create bool, logger *slog.Logger) (storage, error) {
	open := OpenPool
	if create {
		open = ensurePool
	}
	pool, err := open(config, logger)
	if err != nil {
		return storage{}, err
	}
	s := storage{Backend: embedded.Backend{Store: pool}}
	if len(config.Export.NVMeTCP) > 0 {
		s.export = func() (attacher.Exporter, error) {
			return export.New(export.Options{
				Store: pool.Stat().UUID, Portals: config.Export.NVMeTCP, Logger: logger.With("part", "export"),
				Open: func(name string, readOnly bool) (bdev.Device, uuid.UUID, error) {
					device, err := pool.OpenLvol(name, readOnly)
					if err != nil {
						return nil, uuid.UUID{}, err
					}
					id, err := uuid.Parse(device.UUID())
					if err != nil {
						return nil, id, errors.Join(kind.Errorf(kind.Corrupt, "lvol %s: %w", name, err), device.Close())
					}
					return device, id, nil
				},
			})
		}
	}
	return s, nil
}

// validateBackend checks [pool] against the backend it names.
func (c *Config) validateBackend() error {
	p := &c.Pool
	if !slices.Contains([]string{BackendEmbedded, BackendSPDK, BackendRBD}, p.Backend) {
		return kind.Errorf(kind.Invalid, "pool.backend %.40q: must be %s, %s or %s", p.Backend, BackendEmbedded, BackendSPDK, BackendRBD)
	}
	if !c.Store() {
		return nil
	}
	if p.Backend != BackendEmbedded {
		switch {
		case p.Device != "" || p.Capacity != 0:
			return kind.Errorf(kind.Invalid, "pool.device and pool.capacity are for pool.backend %s", BackendEmbedded)
		case len(c.Export.NVMeTCP) > 0 && p.Backend == BackendSPDK:
			return kind.Errorf(kind.Invalid, "export.nvme_tcp is for pool.backend %s: set pool.spdk.portals, where the target serves nodes", BackendEmbedded)
		case len(c.Export.NVMeTCP) > 0:
			return kind.Errorf(kind.Invalid, "export.nvme_tcp is for pool.backend %s: nodes read images of Ceph themselves", BackendEmbedded)
		}
	}
	switch p.Backend {
	case BackendSPDK:
		return p.SPDK.validate()
	case BackendRBD:
		return p.RBD.validate()
	}
	return nil
}

func (s *SPDKConfig) validate() error {
	switch {
	case s.Bridge == "":
		return kind.Errorf(kind.Invalid, "pool.spdk.bridge must be set: the socket or host:port of 'thaw bridge'")
	case s.Lvstore == "":
		return kind.Errorf(kind.Invalid, "pool.spdk.lvstore must be set: the name of the lvstore")
	case len(s.Portals) > maxPortals:
		return kind.Errorf(kind.Invalid, "pool.spdk.portals has %d addresses: must be at most %d", len(s.Portals), maxPortals)
	}
	if err := checkPeer("pool.spdk.bridge", s.Bridge, &s.Certificate, &s.Key, &s.CA); err != nil {
		return err
	}
	for _, p := range append(slices.Clone(s.Portals), s.Own) {
		if p == "" {
			continue
		}
		scheme, address, _ := strings.Cut(p, "://")
		if _, err := netip.ParseAddrPort(address); err != nil || scheme != "tcp" && scheme != "rdma" {
			return kind.Errorf(kind.Invalid, "pool.spdk.portals %.80q: must be as tcp://10.0.0.1:4420 or rdma://10.0.0.1:4420", p)
		}
	}
	return nil
}

func (r *RBDConfig) validate() error {
	if r.Pool == "" {
		return kind.Errorf(kind.Invalid, "pool.rbd.pool must be set: the name of the pool of Ceph")
	}
	if r.Config == "" {
		return nil
	}
	return absolute(&r.Config)
}

// checkPeer checks the address of another process: an absolute path of a Unix socket, or a
// host with a port, which needs the three files.
func checkPeer(key, address string, certificate, private, ca *string) error {
	if filepath.IsAbs(address) {
		return nil
	}
	if _, _, err := net.SplitHostPort(address); err != nil {
		return kind.Errorf(kind.Invalid, "%s %.80q: must be the path of a socket, or an address with a port, as 10.0.0.1:7443", key, address)
	}
	if *certificate == "" || *private == "" || *ca == "" {
		return kind.Errorf(kind.Invalid, "%s %s is on a network: certificate, key and ca must be set beside it ('thaw certificate' makes them)", key, address)
	}
	return absolute(certificate, private, ca)
}
