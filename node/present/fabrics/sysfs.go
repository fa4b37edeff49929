package fabrics

import (
	"io/fs"
	"strconv"
	"strings"

	"github.com/thaw-project/thaw/node/present/nvmesys"
)

// controller is what /sys/class/nvme shows of one controller.
type controller struct {
	Name      string // as "nvme3"
	Subsystem string
	HostNQN   string
	Portal
	State string
}

// usable tells whether the kernel keeps the controller up: it is live, or the kernel
// tries to make it so.
func (c *controller) usable() bool {
	switch c.State {
	case "live", "new", "resetting", "connecting":
		return true
	}
	return false // deleting, deleting (no IO), dead
}

// of tells whether the controller is one of a host for a subsystem.
func (c *controller) of(subsystem, hostNQN string) bool {
	return c.Subsystem == subsystem && c.HostNQN == hostNQN
}

// drive is what /sys/block shows of one nvmeNamespace.
type drive struct {
	Name      string // as "nvme0n1"
	UUID      string // in lower case
	Subsystem string
	SizeBytes int64
	ReadOnly  bool
}

func (d *drive) path() string { return "/dev/" + d.Name }

// controllers lists the fabrics controllers in sys, which is /sys. One that vanishes
// meanwhile is left out.
func controllers(sys fs.FS) ([]controller, error) {
	entries, err := nvmesys.List(sys, "class/nvme")
	if err != nil {
		return nil, err
	}
	var list []controller
	for _, e := range entries {
		dir := "class/nvme/" + e.Name() + "/"
		c := controller{Name: e.Name(), Subsystem: nvmesys.Attribute(sys, dir+"subsysnqn"), HostNQN: nvmesys.Attribute(sys, dir+"hostnqn"), State: nvmesys.Attribute(sys, dir+"state")}
		c.Transport = nvmesys.Attribute(sys, dir+"transport")
		c.Address, c.Service = parseAddress(nvmesys.Attribute(sys, dir+"address"))
		if c.Subsystem == "" || c.Transport == "" || c.Transport == "pcie" {
			continue
		}
		list = append(list, c)
	}
	return list, nil
}

// parseAddress takes traddr and trsvcid from a controller's address attribute, such as
// "traddr=10.0.2.2,trsvcid=4420,src_addr=10.0.2.15".
func parseAddress(text string) (address, service string) {
	for part := range strings.SplitSeq(text, ",") {
		switch name, value, _ := strings.Cut(strings.TrimSpace(part), "="); name {
		case "traddr":
			address = value
		case "trsvcid":
			service = value
		}
	}
	return address, service
}

// drives lists the nvmeNamespaces in sys that are of a subsystem. With native multipath
// there is one for all controllers of it; without, one for each.
func drives(sys fs.FS, subsystem string) ([]drive, error) {
	entries, err := nvmesys.List(sys, "block")
	if err != nil {
		return nil, err
	}
	var list []drive
	for _, e := range entries {
		if !nvmesys.IsDrive(e.Name()) {
			continue
		}
		dir := "block/" + e.Name() + "/"
		// The device is the subsystem with native multipath, else the controller.
		if nvmesys.Attribute(sys, dir+"device/subsysnqn") != subsystem {
			continue
		}
		sectors, err := strconv.ParseInt(nvmesys.Attribute(sys, dir+"size"), 10, 64)
		if err != nil || sectors < 0 || sectors > 1<<54 {
			continue // it is coming or going
		}
		d := drive{Name: e.Name(), Subsystem: subsystem, SizeBytes: sectors * 512, ReadOnly: nvmesys.Attribute(sys, dir+"ro") == "1"}
		if id, ok := strings.CutPrefix(nvmesys.Attribute(sys, dir+"wwid"), "uuid."); ok {
			d.UUID = strings.ToLower(id)
		} else {
			d.UUID = strings.ToLower(nvmesys.Attribute(sys, dir+"uuid"))
		}
		if d.UUID != "" {
			list = append(list, d)
		}
	}
	return list, nil
}
