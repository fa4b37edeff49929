package fabrics

import (
	"context"
	"io/fs"
	"os"
	"time"

	"github.com/thaw-project/thaw/node/present/blockdev"
	"github.com/thaw-project/thaw/node/present/nvmesys"
)

// driver is what the presenter needs of the kernel. Tests on a machine without NVMe put
// something else in its place.
type driver interface {
	// Load makes sure that the kernel has a transport.
	Load(ctx context.Context, transport string) error
	// Sys is /sys.
	Sys() fs.FS
	// Connect makes a controller.
	Connect(ctx context.Context, options string) error
	// Write writes an attribute below /sys.
	Write(ctx context.Context, name, data string) error
	// Claim keeps everybody from using the block device at path until release is
	// called, and makes it read-only if asked.
	Claim(ctx context.Context, path string, wait time.Duration, readOnly bool) (release func() error, err error)
	Watch(ctx context.Context, ready, changed func()) error
}

// linux is the driver that a presenter has.
type linux struct{}

var sysfs = os.DirFS("/sys")

func (linux) Sys() fs.FS { return sysfs }

func (linux) Connect(ctx context.Context, options string) error {
	reply, err := blockdev.Ask(ctx, controlPath, options)
	if err != nil {
		return err
	}
	return parseReply(reply)
}

func (linux) Write(ctx context.Context, name, data string) error {
	return blockdev.Write(ctx, "/sys/"+name, data)
}

func (linux) Claim(ctx context.Context, path string, wait time.Duration, readOnly bool) (func() error, error) {
	c, err := blockdev.Take(ctx, path, blockdev.ClaimOptions{Wait: wait, ReadOnly: readOnly})
	if err != nil {
		return nil, err
	}
	return c.Release, nil
}

func (linux) Watch(ctx context.Context, ready, changed func()) error {
	return nvmesys.Watch(ctx, nvmesys.Event.NVMe, ready, changed)
}
