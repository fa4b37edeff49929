package fabrics

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/google/uuid"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/node/present/nvmesys"
)

// The transports that this package connects.
const (
	TransportTCP  = "tcp"
	TransportRDMA = "rdma"
)

// controlPath is the kernel's way to make controllers (drivers/nvme/host/fabrics.c).
const controlPath = "/dev/nvme-fabrics"

// maxNQNBytes is the longest NQN (NVMe Base 2.0, 4.5).
const maxNQNBytes = 223

// Portal is an address at which a subsystem can be reached.
type Portal struct {
	// Transport is "tcp" or "rdma".
	Transport string `json:"transport"`
	// Address is an IP address, Service a port.
	Address string `json:"address"`
	Service string `json:"service"`
}

// String is for messages.
func (p Portal) String() string { return p.Transport + "://" + p.Address + ":" + p.Service }

// Export is how a block that a target shows to this node can be reached.
type Export struct {
	// Subsystem and HostNQN are NQNs, HostID a UUID.
	Subsystem string `json:"subsystem"`
	HostNQN   string `json:"host_nqn"`
	HostID    string `json:"host_id"`
	// Portals of the subsystem, at least one.
	Portals []Portal `json:"portals"`
	NSID    uint32   `json:"nsid"`
	// UUID is the nvmeNamespace's: by it the disk is found.
	UUID      string `json:"uuid"`
	SizeBytes int64  `json:"size_bytes"`
}

// maxPortals bounds the controllers of one target.
const maxPortals = 8

// validate refuses what would mean something else to the kernel than to us: values of
// its option string end at a comma.
func (e *Export) validate() error {
	for _, n := range []string{e.Subsystem, e.HostNQN} {
		if !strings.HasPrefix(n, "nqn.") || len(n) > maxNQNBytes || strings.ContainsFunc(n, func(r rune) bool { return r <= ' ' || r == ',' || r >= 0x7f }) {
			return kind.Errorf(kind.Invalid, "%.240q is no NQN", n)
		}
	}
	if _, err := uuid.Parse(e.HostID); err != nil || len(e.HostID) != 36 {
		return kind.Errorf(kind.Invalid, "host identifier %.80q is no UUID", e.HostID)
	}
	if id, err := uuid.Parse(e.UUID); err != nil || len(e.UUID) != 36 || id == uuid.Nil {
		return kind.Errorf(kind.Invalid, "nvmeNamespace UUID %.80q is none", e.UUID)
	}
	if e.SizeBytes <= 0 || e.SizeBytes%512 != 0 {
		return kind.Errorf(kind.Invalid, "a size of %d bytes", e.SizeBytes)
	}
	if len(e.Portals) == 0 || len(e.Portals) > maxPortals {
		return kind.Errorf(kind.Invalid, "%d portals: must be 1 to %d", len(e.Portals), maxPortals)
	}
	for _, p := range e.Portals {
		if err := p.validate(); err != nil {
			return err
		}
	}
	return nil
}

func (p Portal) validate() error {
	if p.Transport != TransportTCP && p.Transport != TransportRDMA {
		return kind.Errorf(kind.Unsupported, "transport %.20q: must be %s or %s", p.Transport, TransportTCP, TransportRDMA)
	}
	if a, err := netip.ParseAddr(p.Address); err != nil || strings.ContainsAny(a.Zone(), ",= ") {
		return kind.Errorf(kind.Invalid, "portal address %.80q is no IP address", p.Address)
	}
	if n, err := strconv.ParseUint(p.Service, 10, 16); err != nil || n == 0 {
		return kind.Errorf(kind.Invalid, "portal service %.20q is no port", p.Service)
	}
	return nil
}

// Timeouts are what the kernel is told for each controller, in seconds, rounded up.
type Timeouts struct {
	// ControllerLoss is for how long the kernel tries to reach a target again before it
	// gives the controller up, and its disks with it; 0 means 30 minutes.
	ControllerLoss time.Duration
	// FastIOFail is for how long users of a disk wait for a target that is not there
	// before they get errors; 0 means 10 minutes, or ControllerLoss where that is less. It
	// must not be above ControllerLoss.
	FastIOFail time.Duration
	// KeepAlive is how soon a silent target is taken for gone; 0 means 10 s.
	KeepAlive time.Duration
	// ReconnectDelay is the pause between attempts; 0 means 2 s.
	ReconnectDelay time.Duration
}

// settings are the options that all controllers share.
type settings struct {
	Timeouts
	ioQueues                 int
	headerDigest, dataDigest bool
}

func (t *Timeouts) ensureDefaults() error {
	for _, f := range []struct {
		name  string
		value *time.Duration
		set   time.Duration
	}{
		{"ControllerLoss", &t.ControllerLoss, 30 * time.Minute},
		{"FastIOFail", &t.FastIOFail, min(10*time.Minute, cmp.Or(t.ControllerLoss, 10*time.Minute))},
		{"KeepAlive", &t.KeepAlive, 10 * time.Second},
		{"ReconnectDelay", &t.ReconnectDelay, 2 * time.Second},
	} {
		if *f.value == 0 {
			*f.value = f.set
		}
		if *f.value < time.Second || *f.value > 30*24*time.Hour {
			return kind.Errorf(kind.Invalid, "fabrics: %s is %v, must be 1 s to 30 days", f.name, *f.value)
		}
	}
	if t.FastIOFail > t.ControllerLoss {
		return kind.Errorf(kind.Invalid, "fabrics: FastIOFail %v is above ControllerLoss %v", t.FastIOFail, t.ControllerLoss)
	}
	return nil
}

// options is what is written to /dev/nvme-fabrics. Everything is explicit: the kernel's
// defaults differ between versions, and some wait for ever.
func (s *settings) options(e *Export, p Portal) string {
	seconds := func(d time.Duration) string { return strconv.FormatInt(int64((d+time.Second-1)/time.Second), 10) }
	o := []string{
		"transport=" + p.Transport, "traddr=" + p.Address, "trsvcid=" + p.Service,
		"nqn=" + e.Subsystem, "hostnqn=" + e.HostNQN, "hostid=" + e.HostID,
		"nr_io_queues=" + strconv.Itoa(s.ioQueues),
		"ctrl_loss_tmo=" + seconds(s.ControllerLoss), "fast_io_fail_tmo=" + seconds(s.FastIOFail),
		"keep_alive_tmo=" + seconds(s.KeepAlive), "reconnect_delay=" + seconds(s.ReconnectDelay),
	}
	// RDMA has no digests: its packets have checksums of their own.
	if s.headerDigest && p.Transport == TransportTCP {
		o = append(o, "hdr_digest")
	}
	if s.dataDigest && p.Transport == TransportTCP {
		o = append(o, "data_digest")
	}
	return strings.Join(o, ",")
}

// connectError says what an errno of /dev/nvme-fabrics means.
func connectError(p Portal, err error) error {
	switch {
	case errors.Is(err, syscall.EALREADY):
		return nil // there is such a controller
	case errors.Is(err, syscall.EINVAL):
		return kind.Errorf(kind.Unsupported, "connect %s: the kernel refuses the options, or has no nvme-%s: the kernel's log says which: %w", p, p.Transport, err)
	case errors.Is(err, kind.Canceled):
		return kind.Errorf(kind.Unavailable, "connect %s: no answer in time: %w", p, err)
	}
	return kind.Errorf(kind.Unavailable, "connect %s: the target is not there or does not know this host: the kernel's log says why: %w", p, err)
}

// modprobeWait bounds loading a module.
const modprobeWait = 30 * time.Second

// Probe tells whether this machine can present disks through its own NVMe initiator over
// a transport ("tcp" or "rdma"), loading modules if need be: nil, or kind.Unsupported or
// kind.Denied with what to do.
func Probe(ctx context.Context, transport string) error { return linux{}.Load(ctx, transport) }

// Load implements driver.
func (linux) Load(ctx context.Context, transport string) error {
	if transport != TransportTCP && transport != TransportRDMA {
		return kind.Errorf(kind.Unsupported, "transport %.20q: must be %s or %s", transport, TransportTCP, TransportRDMA)
	}
	if os.Geteuid() != 0 {
		return kind.Errorf(kind.Denied, "nvme-fabrics: only root may connect: run as root")
	}
	if transport == TransportRDMA {
		if devices, _ := os.ReadDir("/sys/class/infiniband"); len(devices) == 0 {
			return kind.Errorf(kind.Unsupported, "this machine has no RDMA device")
		}
	}
	if _, err := os.Stat("/sys/module/nvme_" + transport); err != nil {
		ctx, cancel := context.WithTimeout(ctx, modprobeWait)
		defer cancel()
		if out, err := exec.CommandContext(ctx, "modprobe", "nvme-"+transport).CombinedOutput(); err != nil {
			return kind.Errorf(kind.Unsupported, "the kernel has no nvme-%s: modprobe nvme-%s: %w %.200s", transport, transport, err, strings.TrimSpace(string(out)))
		}
	}
	if _, err := os.Stat(controlPath); err != nil {
		return kind.Errorf(kind.Unsupported, "the kernel has no %s: %w: modprobe nvme-fabrics", controlPath, err)
	}
	return nil
}

// parseReply checks the kernel's answer to a connect: "instance=0,cntlid=1".
func parseReply(reply string) error {
	for part := range strings.SplitSeq(strings.TrimSpace(reply), ",") {
		if n, ok := strings.CutPrefix(part, "instance="); ok && nvmesys.Digits(n) {
			return nil
		}
	}
	return fmt.Errorf("the kernel answered %.80q", reply)
}
