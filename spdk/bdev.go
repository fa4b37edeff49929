package spdk

import (
	"context"
	"encoding/json"
	"errors"
	"syscall"

	"github.com/thaw-project/thaw/kind"
)

// get calls a method and returns its result.
func get[R any](ctx context.Context, c *Client, method string, params any) (r R, err error) {
	err = c.Call(ctx, method, params, &r)
	return r, err
}

// do calls a method whose result is true.
func (c *Client) do(ctx context.Context, method string, params any) error {
	ok, err := get[bool](ctx, c, method, params)
	if err == nil && !ok {
		err = c.describe(method, kind.Errorf(kind.IO, "the target answered false"))
	}
	return err
}

// Bdev is a block device of the target.
type Bdev struct {
	Name           string   `json:"name"` // an lvol's is its UUID
	Aliases        []string `json:"aliases"`
	ProductName    string   `json:"product_name"`
	BlockSizeBytes uint32   `json:"block_size"`
	NumBlocks      uint64   `json:"num_blocks"`
	UUID           string   `json:"uuid"`
	Claimed        bool     `json:"claimed"`
	ClaimType      string   `json:"claim_type"`
	SupportedIO    IOTypes  `json:"supported_io_types"`
	Specific       Specific `json:"driver_specific"`
}

// IOTypes says what a bdev can be asked for.
type IOTypes struct {
	Write bool `json:"write"` // false of what is read-only
}

// SizeBytes is the device's size, or 0 when the product does not fit.
func (b *Bdev) SizeBytes() uint64 {
	if b.BlockSizeBytes == 0 || b.NumBlocks > (1<<64-1)/uint64(b.BlockSizeBytes) {
		return 0
	}
	return uint64(b.BlockSizeBytes) * b.NumBlocks
}

// The product names that SPDK gives bdevs.
const (
	ProductAIO    = "AIO disk"
	ProductMalloc = "Malloc disk"
	ProductNull   = "Null disk"
	ProductLvol   = "Logical Volume"
	ProductNVMe   = "NVMe disk"
	ProductRBD    = "Ceph Rbd Disk"
)

// Specific is what a bdev's module says of it; what is not of its module is nil.
type Specific struct {
	Lvol *BdevLvol
	AIO  *BdevAIO
	NVMe []BdevNVMe // one for each path
	RBD  *BdevRBD
}

// UnmarshalJSON takes what it knows and leaves out what modules show in other shapes:
// this is a list of whatever is compiled into the target.
func (s *Specific) UnmarshalJSON(raw []byte) error {
	*s = Specific{}
	var modules map[string]json.RawMessage
	if json.Unmarshal(raw, &modules) != nil {
		return nil
	}
	for name, v := range map[string]any{"lvol": &s.Lvol, "aio": &s.AIO, "nvme": &s.NVMe, "rbd": &s.RBD} {
		if m, ok := modules[name]; ok {
			if err := json.Unmarshal(m, v); err != nil {
				return err
			}
		}
	}
	return nil
}

// BdevLvol is what an lvol says of itself.
type BdevLvol struct {
	StoreUUID            string   `json:"lvol_store_uuid"`
	BaseBdev             string   `json:"base_bdev"`
	ThinProvision        bool     `json:"thin_provision"`
	NumAllocatedClusters uint64   `json:"num_allocated_clusters"`
	Snapshot             bool     `json:"snapshot"`
	Clone                bool     `json:"clone"`
	BaseSnapshot         string   `json:"base_snapshot"` // name without the lvstore's
	Clones               []string `json:"clones"`        // names without the lvstore's
	EsnapClone           bool     `json:"esnap_clone"`
	ExternalSnapshotName string   `json:"external_snapshot_name"`
}

// BdevAIO is what a bdev over a file says of itself.
type BdevAIO struct {
	Filename          string `json:"filename"`
	BlockSizeOverride bool   `json:"block_size_override"`
	ReadOnly          bool   `json:"readonly"`
}

// BdevNVMe is what a bdev of a remote nvmeNamespace says of one path to it.
type BdevNVMe struct {
	TransportID TransportID `json:"trid"`
	Namespace   struct {
		ID       uint32 `json:"id"`
		CanShare bool   `json:"can_share"`
	} `json:"ns_data"`
}

// BdevRBD is what a bdev of a Ceph image says of itself.
type BdevRBD struct {
	PoolName    string `json:"pool_name"`
	RBDName     string `json:"rbd_name"`
	ClusterName string `json:"cluster_name"`
}

// BdevGetBdevsParams choose bdevs.
type BdevGetBdevsParams struct {
	Name          string `json:"name,omitempty"`    // name, alias or UUID; empty for all
	TimeoutMillis uint64 `json:"timeout,omitempty"` // how long to wait for it to appear
}

func (p BdevGetBdevsParams) waits() bool { return p.TimeoutMillis > 0 }

// BdevGetBdevs returns all bdevs, or the one that is asked for: kind.NotFound when there
// is none.
func (c *Client) BdevGetBdevs(ctx context.Context, p BdevGetBdevsParams) ([]Bdev, error) {
	return get[[]Bdev](ctx, c, "bdev_get_bdevs", p)
}

// Bdev returns the bdev of a name, alias or UUID: kind.NotFound when there is none.
func (c *Client) Bdev(ctx context.Context, name string) (*Bdev, error) {
	if name == "" { // which would mean all
		return nil, kind.Errorf(kind.Invalid, "bdev without a name")
	}
	list, err := c.BdevGetBdevs(ctx, BdevGetBdevsParams{Name: name})
	if err != nil {
		return nil, err
	}
	if len(list) != 1 {
		return nil, c.describe("bdev_get_bdevs", kind.Errorf(kind.Corrupt, "%d bdevs of the name %.160q", len(list), name))
	}
	return &list[0], nil
}

// BdevWaitForExamine returns when the lvstores on all bdevs that are there were found.
func (c *Client) BdevWaitForExamine(ctx context.Context) error {
	return c.do(ctx, "bdev_wait_for_examine", nil)
}

// IOStat is what was read and written of a bdev since it came.
type IOStat struct {
	Name              string `json:"name"`
	BytesRead         uint64 `json:"bytes_read"`
	NumReadOps        uint64 `json:"num_read_ops"`
	BytesWritten      uint64 `json:"bytes_written"`
	NumWriteOps       uint64 `json:"num_write_ops"`
	BytesUnmapped     uint64 `json:"bytes_unmapped"`
	NumUnmapOps       uint64 `json:"num_unmap_ops"`
	ReadLatencyTicks  uint64 `json:"read_latency_ticks"`
	WriteLatencyTicks uint64 `json:"write_latency_ticks"`
	UnmapLatencyTicks uint64 `json:"unmap_latency_ticks"`
}

// BdevGetIOStat returns the figures of the bdev of a name, or of all when it is empty,
// and how many ticks a second has.
func (c *Client) BdevGetIOStat(ctx context.Context, name string) (list []IOStat, tickRate uint64, err error) {
	var r struct {
		TickRate uint64   `json:"tick_rate"`
		Bdevs    []IOStat `json:"bdevs"`
	}
	err = c.Call(ctx, "bdev_get_iostat", struct {
		Name string `json:"name,omitempty"`
	}{name}, &r)
	return r.Bdevs, r.TickRate, err
}

type named struct {
	Name string `json:"name"`
}

// BdevAIOCreateParams describe a bdev over a file or a block device.
type BdevAIOCreateParams struct {
	Name           string `json:"name"`
	Filename       string `json:"filename"`
	BlockSizeBytes uint32 `json:"block_size,omitempty"`
	ReadOnly       bool   `json:"readonly,omitempty"`
	Fallocate      bool   `json:"fallocate,omitempty"`
	UUID           string `json:"uuid,omitempty"`
}

// BdevAIOCreate makes a bdev over a file and returns its name.
func (c *Client) BdevAIOCreate(ctx context.Context, p BdevAIOCreateParams) (string, error) {
	return get[string](ctx, c, "bdev_aio_create", p)
}

// BdevAIODelete removes a bdev, not its file.
func (c *Client) BdevAIODelete(ctx context.Context, name string) error {
	return c.do(ctx, "bdev_aio_delete", named{name})
}

// BdevMallocCreateParams describe a bdev in memory.
type BdevMallocCreateParams struct {
	Name           string `json:"name,omitempty"` // empty: the target chooses one
	NumBlocks      uint64 `json:"num_blocks"`
	BlockSizeBytes uint32 `json:"block_size"`
	UUID           string `json:"uuid,omitempty"`
}

// BdevMallocCreate makes a bdev in memory and returns its name: kind.NoSpace when the
// target has too little.
func (c *Client) BdevMallocCreate(ctx context.Context, p BdevMallocCreateParams) (string, error) {
	return get[string](ctx, c, "bdev_malloc_create", p)
}

// BdevMallocDelete removes a bdev and what it holds.
func (c *Client) BdevMallocDelete(ctx context.Context, name string) error {
	return c.do(ctx, "bdev_malloc_delete", named{name})
}

// BdevNullCreateParams describe a bdev that keeps nothing.
type BdevNullCreateParams struct {
	Name           string `json:"name"`
	NumBlocks      uint64 `json:"num_blocks"`
	BlockSizeBytes uint32 `json:"block_size"`
	UUID           string `json:"uuid,omitempty"`
}

// BdevNullCreate makes a bdev that keeps nothing and returns its name.
func (c *Client) BdevNullCreate(ctx context.Context, p BdevNullCreateParams) (string, error) {
	return get[string](ctx, c, "bdev_null_create", p)
}

// BdevNullDelete removes one.
func (c *Client) BdevNullDelete(ctx context.Context, name string) error {
	return c.do(ctx, "bdev_null_delete", named{name})
}

// TransportID says where an NVMe subsystem is.
type TransportID struct {
	Type    string `json:"trtype"`           // TCP, RDMA, PCIE and others, in any case
	Family  string `json:"adrfam,omitempty"` // IPv4, IPv6, in any case
	Address string `json:"traddr"`
	Service string `json:"trsvcid,omitempty"`
	SubNQN  string `json:"subnqn,omitempty"`
}

// BdevNVMeAttachControllerParams describe a path to a remote subsystem. Times are those
// of SPDK: 0 leaves its default, so LossTimeoutSec is a pointer (-1 is "for ever").
type BdevNVMeAttachControllerParams struct {
	Name               string `json:"name"`
	Type               string `json:"trtype"`
	Address            string `json:"traddr"`
	Family             string `json:"adrfam,omitempty"`
	Service            string `json:"trsvcid,omitempty"`
	SubNQN             string `json:"subnqn,omitempty"`
	HostNQN            string `json:"hostnqn,omitempty"`
	HostAddress        string `json:"hostaddr,omitempty"`
	HostService        string `json:"hostsvcid,omitempty"`
	HDGST              bool   `json:"hdgst,omitempty"`
	DDGST              bool   `json:"ddgst,omitempty"`
	Multipath          string `json:"multipath,omitempty"` // disable, failover or multipath
	NumIOQueues        uint32 `json:"num_io_queues,omitempty"`
	LossTimeoutSec     *int32 `json:"ctrlr_loss_timeout_sec,omitempty"`
	ReconnectDelaySec  uint32 `json:"reconnect_delay_sec,omitempty"`
	FastIOFailSec      uint32 `json:"fast_io_fail_timeout_sec,omitempty"`
	PSK                string `json:"psk,omitempty"` // name of a key in the target's keyring
	ConnectTimeoutUsec uint64 `json:"fabrics_connect_timeout_us,omitempty"`
}

// BdevNVMeAttachController connects to a subsystem, or adds a path to it, and returns the
// names of the bdevs that came. It may succeed with none: then something of the target's
// has their UUIDs already.
func (c *Client) BdevNVMeAttachController(ctx context.Context, p BdevNVMeAttachControllerParams) ([]string, error) {
	return get[[]string](ctx, c, "bdev_nvme_attach_controller", p)
}

// BdevNVMeDetachController takes the path of t away, or all of them when t is zero: with
// the last the bdevs go.
func (c *Client) BdevNVMeDetachController(ctx context.Context, name string, t TransportID) error {
	return c.do(ctx, "bdev_nvme_detach_controller", struct {
		Name    string `json:"name"`
		Type    string `json:"trtype,omitempty"`
		Family  string `json:"adrfam,omitempty"`
		Address string `json:"traddr,omitempty"`
		Service string `json:"trsvcid,omitempty"`
		SubNQN  string `json:"subnqn,omitempty"`
	}{name, t.Type, t.Family, t.Address, t.Service, t.SubNQN})
}

// BdevNVMeResetController makes all paths of a controller anew.
func (c *Client) BdevNVMeResetController(ctx context.Context, name string) error {
	return c.do(ctx, "bdev_nvme_reset_controller", named{name})
}

// NVMeController is a remote subsystem that the target is connected to.
type NVMeController struct {
	Name  string     `json:"name"`
	Paths []NVMePath `json:"ctrlrs"`
}

// NVMePath is one connection to it.
type NVMePath struct {
	State       string      `json:"state"` // enabled, failed, resetting and others
	TransportID TransportID `json:"trid"`
	CNTLID      uint16      `json:"cntlid"`
	Host        struct {
		NQN     string `json:"nqn"`
		Address string `json:"addr"`
		Service string `json:"svcid"`
	} `json:"host"`
}

// BdevNVMeGetControllers returns the controller of a name, or all when it is empty.
// kind.NotFound when there is none of the name.
func (c *Client) BdevNVMeGetControllers(ctx context.Context, name string) ([]NVMeController, error) {
	list, err := get[[]NVMeController](ctx, c, "bdev_nvme_get_controllers", struct {
		Name string `json:"name,omitempty"`
	}{name})
	var e *Error
	if errors.As(err, &e) && name != "" && (e.Code == int(syscall.EINVAL) || e.Code == -int(syscall.EINVAL)) { // nothing else can be wrong; SPDK has the sign the wrong way round
		err = kind.Wrap(kind.NotFound, err)
	}
	return list, err
}
