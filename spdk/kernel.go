package spdk

import "context"

// NBDDisk is a bdev that is shown as /dev/nbdN.
type NBDDisk struct {
	Device   string `json:"nbd_device"`
	BdevName string `json:"bdev_name"`
}

// NBDStartDisk shows a bdev as a device, whose path it returns; an empty device lets the
// target choose. kind.NotFound where the kernel has no nbd, too.
func (c *Client) NBDStartDisk(ctx context.Context, bdev, device string) (string, error) {
	return get[string](ctx, c, "nbd_start_disk", struct {
		Bdev   string `json:"bdev_name"`
		Device string `json:"nbd_device,omitempty"`
	}{bdev, device})
}

type nbdDevice struct {
	Device string `json:"nbd_device,omitempty"`
}

// NBDStopDisk takes a device away.
func (c *Client) NBDStopDisk(ctx context.Context, device string) error {
	return c.do(ctx, "nbd_stop_disk", nbdDevice{device})
}

// NBDGetDisks returns the disk of a device, or all when it is empty.
func (c *Client) NBDGetDisks(ctx context.Context, device string) ([]NBDDisk, error) {
	return get[[]NBDDisk](ctx, c, "nbd_get_disks", nbdDevice{device})
}

// UblkDisk is a bdev that is shown as /dev/ublkbN.
type UblkDisk struct {
	Device     string `json:"ublk_device"`
	ID         uint32 `json:"id"`
	QueueDepth uint32 `json:"queue_depth"`
	NumQueues  uint32 `json:"num_queues"`
	BdevName   string `json:"bdev_name"`
}

// UblkCreateTarget must come before the first UblkStartDisk; an empty mask leaves the
// choice of CPUs to the target.
func (c *Client) UblkCreateTarget(ctx context.Context, cpuMask string) error {
	var p any // without parameters there is no object
	if cpuMask != "" {
		p = struct {
			Mask string `json:"cpumask"`
		}{cpuMask}
	}
	return c.do(ctx, "ublk_create_target", p)
}

// UblkDestroyTarget takes all disks away.
func (c *Client) UblkDestroyTarget(ctx context.Context) error {
	return c.do(ctx, "ublk_destroy_target", nil)
}

// UblkStartParams describe a disk; 0 leaves SPDK's default of queues and depth.
type UblkStartParams struct {
	BdevName   string `json:"bdev_name"`
	ID         uint32 `json:"ublk_id"`
	QueueDepth uint32 `json:"queue_depth,omitempty"`
	NumQueues  uint32 `json:"num_queues,omitempty"`
}

// UblkStartDisk shows a bdev as /dev/ublkbN and returns N.
func (c *Client) UblkStartDisk(ctx context.Context, p UblkStartParams) (uint32, error) {
	return get[uint32](ctx, c, "ublk_start_disk", p)
}

// UblkStopDisk takes /dev/ublkbN away.
func (c *Client) UblkStopDisk(ctx context.Context, id uint32) error {
	return c.do(ctx, "ublk_stop_disk", struct {
		ID uint32 `json:"ublk_id"`
	}{id})
}

// UblkGetDisks returns all disks.
func (c *Client) UblkGetDisks(ctx context.Context) ([]UblkDisk, error) {
	return get[[]UblkDisk](ctx, c, "ublk_get_disks", nil)
}

// RPCGetMethods returns the names of the target's methods that may be called now, or of
// all.
func (c *Client) RPCGetMethods(ctx context.Context, current bool) ([]string, error) {
	return get[[]string](ctx, c, "rpc_get_methods", struct {
		Current bool `json:"current,omitempty"`
	}{current})
}

// Version is what a target says of itself.
type Version struct {
	Version string `json:"version"`
	Fields  struct {
		Major  int    `json:"major"`
		Minor  int    `json:"minor"`
		Patch  int    `json:"patch"`
		Suffix string `json:"suffix"`
	} `json:"fields"`
}

// GetVersion returns the target's version.
func (c *Client) GetVersion(ctx context.Context) (Version, error) {
	return get[Version](ctx, c, "spdk_get_version", nil)
}

// FrameworkWaitInit returns when the target takes all methods.
func (c *Client) FrameworkWaitInit(ctx context.Context) error {
	return c.do(ctx, "framework_wait_init", nil)
}
