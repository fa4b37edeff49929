package nbd

import (
	"context"
	"os"
	"time"

	"github.com/thaw-project/thaw/nbd/kernel"
	"github.com/thaw-project/thaw/node/present/blockdev"
)

// driver is what the presenter needs of the kernel. Tests on a machine without nbd put
// another NBD client in its place.
type driver interface {
	Load(ctx context.Context) error
	Connect(kernel.Config) (uint32, error)
	Reconfigure(uint32, kernel.Config) error
	Disconnect(uint32) error
	Look(uint32) (kernel.Device, error)
	Devices() ([]kernel.Device, error)
	// Claim keeps everybody from using the device at path until release is called.
	Claim(ctx context.Context, path string, wait time.Duration) (release func() error, err error)
}

// linux is the driver that a presenter has.
type linux struct{}

var sysfs = os.DirFS("/sys")

func (linux) Load(ctx context.Context) error              { return kernel.Load(ctx) }
func (linux) Connect(c kernel.Config) (uint32, error)     { return kernel.Connect(c) }
func (linux) Reconfigure(i uint32, c kernel.Config) error { return kernel.Reconfigure(i, c) }
func (linux) Disconnect(index uint32) error               { return kernel.Disconnect(index) }
func (linux) Look(index uint32) (kernel.Device, error)    { return kernel.Look(sysfs, index) }
func (linux) Devices() ([]kernel.Device, error)           { return kernel.Devices(sysfs) }

func (linux) Claim(ctx context.Context, path string, wait time.Duration) (func() error, error) {
	c, err := blockdev.Take(ctx, path, blockdev.ClaimOptions{Wait: wait})
	if err != nil {
		return nil, err
	}
	return c.Release, nil
}
