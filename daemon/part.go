package daemon

import (
	"net"
	"path/filepath"

	"github.com/thaw-project/thaw/attacher/card"
	"github.com/thaw-project/thaw/attacher/identity"
	"github.com/thaw-project/thaw/attacher/rpc"
	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/node/present/pcie"
)

// The modes of image-mgmt.
const (
	ImagesHost = "host" // disks are shown by this machine
	ImagesDPU  = "dpu"  // disks are shown by the card that this machine is on, to its host
)

// PeerConfig says how to reach a part that may be in another process.
type PeerConfig struct {
	// Address is the path of a Unix socket, or host:port, which needs the three files.
	Address     string `toml:"address"`
	Certificate string `toml:"certificate"`
	Key         string `toml:"key"`
	CA          string `toml:"ca"`
}

// Local tells whether the peer is on a Unix socket.
func (p *PeerConfig) Local() bool { return filepath.IsAbs(p.Address) }

// Files are the peer's certificates, as package rpc wants them.
func (p *PeerConfig) Files() rpc.Files {
	return rpc.Files{Certificate: p.Certificate, Key: p.Key, CA: p.CA}
}

// Check is nil for an address with what it needs. Key is how the configuration calls it.
func (p *PeerConfig) Check(key string) error {
	return checkPeer(key, p.Address, &p.Certificate, &p.Key, &p.CA)
}

// ListenConfig says where a part serves other machines besides its Unix socket. Without
// an address it does not.
type ListenConfig struct {
	Address     string `toml:"address"`
	Certificate string `toml:"certificate"`
	Key         string `toml:"key"`
	// ClientCA has signed the certificates of those that call, Clients are the names in
	// them that may.
	ClientCA string   `toml:"client_ca"`
	Clients  []string `toml:"clients"`
}

func (l *ListenConfig) check(key string) error {
	if l.Address == "" {
		return nil
	}
	if _, _, err := net.SplitHostPort(l.Address); err != nil {
		return kind.Errorf(kind.Invalid, "%s.address %.80q: must be an address with a port, as 10.0.0.1:7444", key, l.Address)
	}
	if l.Certificate == "" || l.Key == "" || l.ClientCA == "" {
		return kind.Errorf(kind.Invalid, "%s.address serves those that prove who they are only: set %s.certificate, %s.key and %s.client_ca ('thaw certificate' makes them)", key, key, key, key)
	}
	if err := checkNames(key+".clients", l.Clients, true); err != nil {
		return err
	}
	return absolute(&l.Certificate, &l.Key, &l.ClientCA)
}

// maxClients bounds the names that may call a part.
const maxClients = 256

func checkNames(key string, names []string, required bool) error {
	if len(names) == 0 && required {
		return kind.Errorf(kind.Invalid, "%s must hold the names in the certificates of those that may call", key)
	}
	if len(names) > maxClients {
		return kind.Errorf(kind.Invalid, "%s has %d names: must be at most %d", key, len(names), maxClients)
	}
	for _, n := range names {
		if err := identity.CheckNode(n); err != nil {
			return kind.Errorf(kind.Invalid, "%s: %w", key, err)
		}
	}
	return nil
}

// CardConfig describes the role RoleCard.
type CardConfig struct {
	// Bridge is the socket of the bridge of the card's target, or its host:port, which
	// needs the three files.
	Bridge      string `toml:"bridge"`
	Certificate string `toml:"certificate"`
	Key         string `toml:"key"`
	CA          string `toml:"ca"`
	// Host is the name of the machine that the card is plugged into.
	Host string `toml:"host"`
	// Functions are the PCIe functions that may show disks, as
	// "port:physical:virtual".
	Functions []string     `toml:"functions"`
	Listen    ListenConfig `toml:"listen"`
}

// ImagesConfig describes the role RoleImages.
type ImagesConfig struct {
	// Mode is ImagesHost or ImagesDPU.
	Mode string `toml:"mode"`
	// Card is the attacher that has the card, for ImagesDPU; by default that of this machine.
	Card   PeerConfig   `toml:"card"`
	Listen ListenConfig `toml:"listen"`
}

// PCIeConfig says which functions of a card this machine sees where.
type PCIeConfig struct {
	// Functions are addresses on this machine's bus, as "0000:01:00.0", by function of the
	// card, as "0:1:0". The nvme driver is bound to them where they are listed; disks are
	// found without.
	Functions map[string]string `toml:"functions"`
}

// ConvertConfig says how conversions reach a store on another machine.
type ConvertConfig struct {
	// Attacher is the store's; without an address that of this machine.
	Attacher PeerConfig `toml:"attacher"`
	// Card is the attacher of the card that shows this machine disks; without an address
	// this machine shows them itself.
	Card PeerConfig `toml:"card"`
	// Transport is how the store shows them; empty is the store's choice.
	Transport string `toml:"transport"`
}

// maxFunctions bounds the functions of a card: what PCIe allows one to have.
const maxFunctions = 4096

func (c *Config) validateCard() error {
	if !c.Card() {
		return nil
	}
	k := &c.CardPart
	switch {
	case k.Bridge == "":
		return kind.Errorf(kind.Invalid, "card.bridge must be set: the socket or host:port of the bridge of the card's target")
	case len(k.Functions) == 0:
		return kind.Errorf(kind.Invalid, "card.functions must hold the PCIe functions that may show disks, as 0:1:0")
	case len(k.Functions) > maxFunctions:
		return kind.Errorf(kind.Invalid, "card.functions has %d: must be at most %d", len(k.Functions), maxFunctions)
	}
	seen := make(map[card.Function]bool)
	for _, f := range k.Functions {
		parsed, err := card.ParseFunction(f)
		if err != nil {
			return kind.Errorf(kind.Invalid, "card.functions: %w", err)
		}
		if seen[parsed] {
			return kind.Errorf(kind.Invalid, "card.functions has %s twice", f)
		}
		seen[parsed] = true
	}
	if err := identity.CheckNode(k.Host); err != nil {
		return kind.Errorf(kind.Invalid, "card.host: %w", err)
	}
	if err := checkPeer("card.bridge", k.Bridge, &k.Certificate, &k.Key, &k.CA); err != nil {
		return err
	}
	return k.Listen.check("card.listen")
}

func (c *Config) validateImages() error {
	i := &c.ImagesPart
	switch {
	case i.Mode != ImagesHost && i.Mode != ImagesDPU:
		return kind.Errorf(kind.Invalid, "images.mode %.40q: must be %s or %s", i.Mode, ImagesHost, ImagesDPU)
	case c.Process == ProcessServer && c.Images() && c.Snapshots() && i.Mode == ImagesDPU:
		return kind.Errorf(kind.Invalid, "images.mode %s shows disks to the card's host: the role %s belongs there", ImagesDPU, RoleSnapshots)
	case c.Process == ProcessServer && c.Images() && c.Store() && i.Mode == ImagesDPU:
		return kind.Errorf(kind.Invalid, "images.mode %s attaches at a [[remote]] store: run the role %s in a process of its own", ImagesDPU, RoleStore)
	}
	if i.Card.Address != "" {
		if err := i.Card.Check("images.card.address"); err != nil {
			return err
		}
	}
	if c.Images() {
		if err := i.Listen.check("images.listen"); err != nil {
			return err
		}
		if i.Listen.Address != "" && i.Mode != ImagesDPU {
			// Who calls chooses files of this machine, and uses disks by their paths.
			return kind.Errorf(kind.Invalid, "images.listen is for images.mode %s: in mode %s the snapshotter is on the same machine, and calls on its socket", ImagesDPU, ImagesHost)
		}
	}
	if c.Snapshotter.Images.Address != "" {
		if err := c.Snapshotter.Images.Check("snapshotter.images.address"); err != nil {
			return err
		}
	}
	for _, t := range c.Snapshotter.Targets {
		if !targetName.MatchString(t) {
			return kind.Errorf(kind.Invalid, "snapshotter.targets %.80q: must be 1 to 64 of a-z 0-9 . -", t)
		}
	}
	if err := pcie.Check(c.PCIe.Functions); err != nil {
		return err
	}
	for _, p := range []struct {
		key  string
		peer *PeerConfig
	}{{"convert.attacher.address", &c.Convert.Attacher}, {"convert.card.address", &c.Convert.Card}} {
		if p.peer.Address != "" {
			if err := p.peer.Check(p.key); err != nil {
				return err
			}
		}
	}
	return nil
}
