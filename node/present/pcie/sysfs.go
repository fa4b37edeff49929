package pcie

import (
	"encoding/hex"
	"io/fs"
	"strconv"
	"strings"

	"github.com/google/uuid"

	"github.com/thaw-project/thaw/node/present/nvmesys"
)

const (
	nvmeDriver = "nvme"
	nvmeClass  = "0x0108" // mass storage, non-volatile memory
)

// Bounds of what sysfs may show, so that a kernel that shows more is not believed for ever.
const (
	maxDrives      = 4096
	maxControllers = 64 // of one subsystem
)

// drive is what /sys/block shows of one nvmeNamespace.
type drive struct {
	Name        string // as "nvme0n1"
	Number      string // of the device, as "259:3"
	UUID, NGUID uuid.UUID
	Serial      string // of its controllers
	SizeBytes   int64
	ReadOnly    bool
	Addresses   []string // of its controllers on PCI, those that are live or may become so
}

// is tells whether d has the identity. An EUI-64 is nothing that cards are told to show,
// so one that is there says nothing.
func (d *drive) is(id identity) bool {
	if d.UUID != uuid.Nil || d.NGUID != uuid.Nil {
		return d.UUID == id.uuid || d.NGUID == id.uuid
	}
	return id.serial != "" && strings.EqualFold(d.Serial, id.serial)
}

// on returns "" when d is reached through address, or address is empty, and else where
// it is.
func (d *drive) on(address string) string {
	if address == "" {
		return ""
	}
	for _, a := range d.Addresses {
		if a == address {
			return ""
		}
	}
	return d.Addresses[0]
}

// drives lists the nvmeNamespaces in sys, which is /sys, that are reached over PCI. With
// native multipath there is one for all controllers of its subsystem; those that stand for
// one path of it (nvme0c0n1) cannot be used and are left out.
func drives(sys fs.FS) ([]drive, error) {
	entries, err := nvmesys.List(sys, "block")
	if err != nil {
		return nil, err
	}
	var list []drive
	for _, e := range entries {
		if !nvmesys.IsDrive(e.Name()) {
			continue
		}
		if len(list) == maxDrives {
			break
		}
		dir := "block/" + e.Name() + "/"
		d := drive{Name: e.Name(), Addresses: addresses(sys, dir+"device/")}
		if len(d.Addresses) == 0 {
			continue
		}
		d.Number = nvmesys.Attribute(sys, dir+"dev")
		sectors, err := strconv.ParseInt(nvmesys.Attribute(sys, dir+"size"), 10, 64)
		if err != nil || sectors < 0 || sectors > 1<<54 {
			continue // it is coming or going
		}
		d.SizeBytes, d.ReadOnly = sectors*512, nvmesys.Attribute(sys, dir+"ro") == "1"
		d.UUID, d.NGUID = parseUUID(nvmesys.Attribute(sys, dir+"uuid")), parseUUID(nvmesys.Attribute(sys, dir+"nguid"))
		wwid := nvmesys.Attribute(sys, dir+"wwid")
		if id, ok := strings.CutPrefix(wwid, "uuid."); ok && d.UUID == uuid.Nil {
			d.UUID = parseUUID(id)
		}
		if id, ok := strings.CutPrefix(wwid, "eui."); ok && d.NGUID == uuid.Nil && len(id) == 32 {
			if raw, err := hex.DecodeString(id); err == nil {
				d.NGUID = uuid.UUID(raw)
			}
		}
		d.Serial = nvmesys.Attribute(sys, dir+"device/serial")
		list = append(list, d)
	}
	return list, nil
}

func parseUUID(s string) uuid.UUID {
	id, err := uuid.Parse(s)
	if err != nil || len(s) != 36 {
		return uuid.Nil
	}
	return id
}

// addresses lists the PCI addresses of a drive's controllers: its device is the controller,
// or with native multipath the subsystem, which has links to them.
func addresses(sys fs.FS, device string) (list []string) {
	add := func(dir string) {
		if nvmesys.Attribute(sys, dir+"transport") != "pcie" {
			return
		}
		switch nvmesys.Attribute(sys, dir+"state") {
		case "deleting", "deleting (no IO)", "dead":
			return
		}
		if a := nvmesys.Attribute(sys, dir+"address"); pciAddress.MatchString(a) {
			list = append(list, a)
		}
	}
	add(device)
	if len(list) > 0 {
		return list
	}
	entries, err := nvmesys.List(sys, strings.TrimSuffix(device, "/"))
	if err != nil {
		return nil
	}
	for _, e := range entries {
		if n, ok := strings.CutPrefix(e.Name(), "nvme"); ok && nvmesys.Digits(n) && len(list) < maxControllers {
			add(device + e.Name() + "/")
		}
	}
	return list
}

// function is a PCI device.
type function struct {
	address  string
	class    string // as "0x010802"
	driver   string // "" without one
	override string // the only driver that may have it; "" for any
}

func (p *function) dir() string { return "bus/pci/devices/" + p.address + "/" }

func functionAt(sys fs.FS, address string) (p function, there bool) {
	p.address = address
	p.class = nvmesys.Attribute(sys, p.dir()+"class")
	for line := range strings.Lines(nvmesys.Attribute(sys, p.dir()+"uevent")) {
		if name, ok := strings.CutPrefix(strings.TrimSpace(line), "DRIVER="); ok {
			p.driver = name
		}
	}
	if p.override = nvmesys.Attribute(sys, p.dir()+"driver_override"); p.override == "(null)" {
		p.override = ""
	}
	return p, p.class != ""
}
