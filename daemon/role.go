package daemon

import (
	"net"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/node/remote"
)

// What a machine does.
const (
	RoleStore     = "store"     // keeps lvols, converts, exports
	RoleCard      = "card"      // shows disks to the host that this card is plugged into
	RoleImages    = "images"    // image-mgmt: attaches blocks and has them shown
	RoleSnapshots = "snapshots" // containerd's snapshotter
	RoleNode      = "node"      // runs containers: RoleImages and RoleSnapshots
)

var allRoles = []string{RoleStore, RoleNode, RoleCard, RoleImages, RoleSnapshots}

// ExportConfig says how a store serves other machines. Nothing is served unless both
// addresses are set.
type ExportConfig struct {
	// NVMeTCP are IP addresses with ports, for the blocks.
	NVMeTCP []string `toml:"nvme_tcp"`
	// Attacher is the address for the calls of nodes, over TLS only.
	Attacher    string `toml:"attacher"`
	Certificate string `toml:"certificate"`
	Key         string `toml:"key"`
	// ClientCA has signed the certificates of the nodes, whose common names are the
	// names of the nodes.
	ClientCA string `toml:"client_ca"`
	// Converters are the names in certificates of those that may convert images on other
	// machines: they can change and delete everything that the store has.
	Converters []string `toml:"converters"`
}

// RemoteConfig is a store on another machine.
type RemoteConfig struct {
	// Name is the store's target, as the annotations of its images call it.
	Name        string `toml:"name"`
	Attacher    string `toml:"attacher"`
	Certificate string `toml:"certificate"`
	Key         string `toml:"key"`
	CA          string `toml:"ca"`
	// Transport is what blocks are asked for by: nvme-tcp, nvme-rdma (the kernel's NVMe host or
	// a card only) or rbd.
	Transport string `toml:"transport"`
	// RBD is how this machine reaches the pool of a store in Ceph, with rbd.
	RBD RBDConfig `toml:"rbd"`
	// LossTimeout is how long reads wait for the store before they fail.
	LossTimeout Duration `toml:"loss_timeout"`
}

func (c *Config) has(role string) bool { return slices.Contains(c.Roles, role) }

// local tells whether the store's attacher is on this machine.
func (r *RemoteConfig) local() bool { return filepath.IsAbs(r.Attacher) }

// Store tells whether this process has the role, as do the others.
func (c *Config) Store() bool { return c.has(RoleStore) }

// Card is like Store.
func (c *Config) Card() bool { return c.has(RoleCard) }

// Images is like Store.
func (c *Config) Images() bool { return c.has(RoleImages) || c.has(RoleNode) }

// Snapshots is like Store.
func (c *Config) Snapshots() bool { return c.has(RoleSnapshots) || c.has(RoleNode) }

// Remotes are the stores whose blocks this process attaches: those that are configured, and
// for image-mgmt in a process of its own that of this machine when none is.
func (c *Config) Remotes() []RemoteConfig {
	if len(c.Remote) > 0 || c.Process != ProcessImages {
		return c.Remote
	}
	return []RemoteConfig{{
		Name: c.Target, Attacher: c.Sockets(RoleStore)[0], Transport: remote.TransportTCP, LossTimeout: Duration(remote.DefaultLossTimeout),
	}}
}

// Exports tells whether the store serves other machines.
func (c *Config) Exports() bool { return c.Export.Attacher != "" }

// maxRemotes bounds the stores of one node: each costs connections and a goroutine.
const maxRemotes = 64

// maxPortals bounds the addresses at which a store serves blocks: as many as a node takes.
const maxPortals = 16

// validateRoles checks roles and what belongs to each, and fills in defaults.
func (c *Config) validateRoles() error {
	if len(c.Roles) == 0 {
		return kind.Errorf(kind.Invalid, "roles is empty: must hold some of %s", strings.Join(allRoles, ", "))
	}
	for _, r := range c.Roles {
		if !slices.Contains(allRoles, r) {
			return kind.Errorf(kind.Invalid, "roles: %.40q is none: must be some of %s", r, strings.Join(allRoles, ", "))
		}
	}
	if err := c.validateExport(); err != nil {
		return err
	}
	switch {
	case len(c.Remote) > 0 && !c.Images() && c.Process == ProcessServer:
		return kind.Errorf(kind.Invalid, "[[remote]] is for machines with the role %s or %s", RoleNode, RoleImages)
	case len(c.Remote) > maxRemotes:
		return kind.Errorf(kind.Invalid, "%d tables [[remote]]: must be at most %d", len(c.Remote), maxRemotes)
	case c.Process == ProcessServer && len(c.Remotes()) == 0 && c.Images() && !c.Store():
		return kind.Errorf(kind.Invalid, "a machine without the role %s needs a [[remote]] store", RoleStore)
	}
	names := map[string]bool{}
	if c.Store() {
		names[c.Target] = true
	}
	for i := range c.Remote {
		r := &c.Remote[i]
		if err := r.validate(names); err != nil {
			return err
		}
		if r.Transport == remote.TransportRBD && r.RBD.Pool == "" && c.ImagesPart.Mode == ImagesHost {
			return kind.Errorf(kind.Invalid, "remote %s: rbd.pool must be set: the pool of Ceph that the store is in", r.Name)
		}
		names[c.Remote[i].Name] = true
	}
	return nil
}

func (c *Config) validateExport() error {
	e := &c.Export
	if len(e.NVMeTCP) == 0 && e.Attacher == "" {
		return nil
	}
	switch {
	case !c.Store() && c.Process == ProcessServer:
		return kind.Errorf(kind.Invalid, "[export] is for machines with the role %s", RoleStore)
	case len(e.NVMeTCP) == 0 && c.Pool.Backend == BackendEmbedded:
		return kind.Errorf(kind.Invalid, "[export] needs both nvme_tcp, for blocks, and attacher, for the calls of nodes")
	case len(e.NVMeTCP) > maxPortals:
		return kind.Errorf(kind.Invalid, "export.nvme_tcp has %d addresses: must be at most %d", len(e.NVMeTCP), maxPortals)
	case e.Attacher == "" && c.Process == ProcessServer:
		return kind.Errorf(kind.Invalid, "[export] needs both nvme_tcp, for blocks, and attacher, for the calls of nodes")
	case e.Attacher != "" && (e.Certificate == "" || e.Key == "" || e.ClientCA == ""):
		return kind.Errorf(kind.Invalid, "export.attacher serves nodes that prove who they are only: set export.certificate, export.key and export.client_ca ('thaw certificate' makes them)")
	}
	for _, a := range e.NVMeTCP {
		if _, err := netip.ParseAddrPort(a); err != nil {
			return kind.Errorf(kind.Invalid, "export.nvme_tcp %.80q: must be an IP address with a port, as 10.0.0.1:4420", a)
		}
	}
	if e.Attacher == "" {
		return nil // it serves nodes of this machine only
	}
	if _, _, err := net.SplitHostPort(e.Attacher); err != nil {
		return kind.Errorf(kind.Invalid, "export.attacher %.80q: must be an address with a port, as 10.0.0.1:7443", e.Attacher)
	}
	if err := checkNames("export.converters", e.Converters, false); err != nil {
		return err
	}
	return absolute(&e.Certificate, &e.Key, &e.ClientCA)
}

func (r *RemoteConfig) validate(taken map[string]bool) error {
	switch {
	case !targetName.MatchString(r.Name):
		return kind.Errorf(kind.Invalid, "remote.name %.80q: must be 1 to 64 of a-z 0-9 . -", r.Name)
	case taken[r.Name]:
		return kind.Errorf(kind.Invalid, "remote %s: another target has this name: each needs its own, set by 'target' on the store", r.Name)
	case !filepath.IsAbs(r.Attacher) && (r.Certificate == "" || r.Key == "" || r.CA == ""):
		return kind.Errorf(kind.Invalid, "remote %s: certificate, key and ca must be set ('thaw certificate' makes them)", r.Name)
	}
	if _, _, err := net.SplitHostPort(r.Attacher); err != nil && !filepath.IsAbs(r.Attacher) {
		return kind.Errorf(kind.Invalid, "remote %s: attacher %.80q: must be an address with a port, as 10.0.0.1:7443", r.Name, r.Attacher)
	}
	if r.Transport == "" {
		r.Transport = remote.TransportTCP
	}
	switch r.Transport {
	case remote.TransportTCP, remote.TransportRDMA:
	case remote.TransportRBD:
		if r.RBD.Config != "" {
			if err := absolute(&r.RBD.Config); err != nil {
				return err
			}
		}
	default:
		return kind.Errorf(kind.Invalid, "remote %s: transport %.40q: must be %s, %s or %s", r.Name, r.Transport, remote.TransportTCP, remote.TransportRDMA, remote.TransportRBD)
	}
	if r.LossTimeout == 0 {
		r.LossTimeout = Duration(remote.DefaultLossTimeout)
	}
	if r.LossTimeout < Duration(time.Second) {
		return kind.Errorf(kind.Invalid, "remote %s: loss_timeout must be at least 1s, written with a unit as \"10m\"", r.Name)
	}
	if filepath.IsAbs(r.Attacher) {
		return nil
	}
	return absolute(&r.Certificate, &r.Key, &r.CA)
}

func absolute(paths ...*string) error {
	for _, p := range paths {
		abs, err := filepath.Abs(*p)
		if err != nil {
			return kind.Errorf(kind.Invalid, "path %s: %w", *p, err)
		}
		*p = abs
	}
	return nil
}
