package pcie

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/node/present/blockdev"
	"github.com/thaw-project/thaw/node/present/nvmesys"
)

// driver is what the package needs of the kernel. Tests on a machine without NVMe put
// something else in its place.
type driver interface {
	// Sys is /sys.
	Sys() fs.FS
	// Write writes an attribute below /sys.
	Write(ctx context.Context, name, data string) error
	// Load makes sure that the kernel has the nvme driver.
	Load(ctx context.Context) error
	// Node tells whether path is the node of the block device with a number as "259:3".
	Node(path, number string) bool
	// SetReadOnly makes the block device at path read-only.
	SetReadOnly(ctx context.Context, path string) error
	// Claim keeps everybody from using the block device at path until release is called.
	Claim(ctx context.Context, path string, wait time.Duration) (release func() error, err error)
	// Watch calls changed for each event that may matter, until ctx ends.
	Watch(ctx context.Context, ready, changed func()) error
}

// linux is the driver that a finder has.
type linux struct{}

var sysfs = os.DirFS("/sys")

func (linux) Sys() fs.FS { return sysfs }

func (linux) Write(ctx context.Context, name, data string) error {
	return blockdev.Write(ctx, "/sys/"+name, data)
}

func (linux) Load(ctx context.Context) error {
	if _, err := os.Stat("/sys/bus/pci/drivers/nvme"); err == nil {
		return nil
	}
	if out, err := exec.CommandContext(ctx, "modprobe", "nvme").CombinedOutput(); err != nil {
		return kind.Errorf(kind.Unsupported, "the kernel has no nvme driver: modprobe nvme: %w %.200s", err, strings.TrimSpace(string(out)))
	}
	return nil
}

func (linux) Node(path, number string) bool {
	var st unix.Stat_t
	return unix.Lstat(path, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFBLK &&
		fmt.Sprintf("%d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev)) == number
}

func (linux) SetReadOnly(ctx context.Context, path string) error {
	return blockdev.SetReadOnly(ctx, path)
}

func (linux) Claim(ctx context.Context, path string, wait time.Duration) (func() error, error) {
	c, err := blockdev.Take(ctx, path, blockdev.ClaimOptions{Wait: wait})
	if err != nil {
		return nil, err
	}
	return c.Release, nil
}

func (linux) Watch(ctx context.Context, ready, changed func()) error {
	return nvmesys.Watch(ctx, concerns, ready, changed)
}

// concerns tells whether an event may be about a drive or about the function of one.
func concerns(e nvmesys.Event) bool { return e.NVMe() || e.Subsystem == "pci" }
