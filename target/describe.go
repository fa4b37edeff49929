package target

import (
	"context"
	"encoding/json"
	"time"

	"github.com/thaw-project/thaw/target/rpc"
)

// The shapes that SPDK's rpc_dump_bdev_info writes (lib/bdev/bdev_rpc.c).

type diskInfo struct {
	Name         string   `json:"name"`
	Aliases      []string `json:"aliases"`
	ProductName  string   `json:"product_name"`
	BlockSize    uint32   `json:"block_size"`
	NumBlocks    uint64   `json:"num_blocks"`
	UUID         string   `json:"uuid"`
	RateLimits   limits   `json:"assigned_rate_limits"`
	Claimed      bool     `json:"claimed"`
	ClaimType    string   `json:"claim_type,omitempty"`
	Zoned        bool     `json:"zoned"`
	SupportedIO  ioTypes  `json:"supported_io_types"`
	DriverDetail any      `json:"driver_specific"`
}

type limits struct {
	RWIOs    uint64 `json:"rw_ios_per_sec"`
	RWMBytes uint64 `json:"rw_mbytes_per_sec"`
	RMBytes  uint64 `json:"r_mbytes_per_sec"`
	WMBytes  uint64 `json:"w_mbytes_per_sec"`
}

type ioTypes struct {
	Read            bool `json:"read"`
	Write           bool `json:"write"`
	Unmap           bool `json:"unmap"`
	Flush           bool `json:"flush"`
	Reset           bool `json:"reset"`
	NvmeAdmin       bool `json:"nvme_admin"`
	NvmeIO          bool `json:"nvme_io"`
	NvmeIOMD        bool `json:"nvme_io_md"`
	WriteZeroes     bool `json:"write_zeroes"`
	Zcopy           bool `json:"zcopy"`
	GetZoneInfo     bool `json:"get_zone_info"`
	ZoneManagement  bool `json:"zone_management"`
	ZoneAppend      bool `json:"zone_append"`
	Compare         bool `json:"compare"`
	CompareAndWrite bool `json:"compare_and_write"`
	Abort           bool `json:"abort"`
	SeekHole        bool `json:"seek_hole"`
	SeekData        bool `json:"seek_data"`
	Copy            bool `json:"copy"`
	NvmeIOVMD       bool `json:"nvme_iov_md"`
}

func (t *Target) describe(d *disk) diskInfo {
	s := d.driver.supports()
	write := !d.driver.readOnly()
	i := diskInfo{
		Name: d.name, Aliases: []string{}, ProductName: d.product, BlockSize: d.blockBytes,
		NumBlocks: uint64(d.driver.sizeBytes()) / uint64(d.blockBytes), UUID: d.id.String(),
		SupportedIO:  ioTypes{Read: true, Write: write, Unmap: s.unmap && write, Flush: s.flush, Reset: true, WriteZeroes: s.writeZeroes && write, NvmeIO: s.nvme},
		DriverDetail: d.driver.specific(),
	}
	t.mu.RLock()
	defer t.mu.RUnlock()
	if d.alias != "" {
		i.Aliases = append(i.Aliases, d.alias)
	}
	for l := range d.leases {
		if l.claim != shared {
			i.Claimed, i.ClaimType = true, string(l.claim)
		}
	}
	return i
}

// maxWait bounds bdev_get_bdevs' timeout, so that a forgotten client does not hold its
// connection for ever.
const maxWait = time.Hour

func (t *Target) getBdevs(ctx context.Context, params json.RawMessage) (any, error) {
	var p struct {
		Name    string `json:"name,omitempty"`
		Timeout uint64 `json:"timeout,omitempty"` // milliseconds
	}
	if err := decode(params, &p); err != nil {
		return nil, err
	}
	if p.Name == "" {
		t.mu.RLock()
		disks := append([]*disk(nil), t.disks...)
		t.mu.RUnlock()
		list := make([]diskInfo, 0, len(disks))
		for _, d := range disks {
			list = append(list, t.describe(d))
		}
		return list, nil
	}
	deadline := time.NewTimer(min(time.Duration(min(p.Timeout, uint64(maxWait/time.Millisecond)))*time.Millisecond, maxWait))
	defer deadline.Stop()
	for {
		t.mu.RLock()
		d, arrived := t.names[nameKey(p.Name)], t.arrived
		t.mu.RUnlock()
		if d != nil {
			return []diskInfo{t.describe(d)}, nil
		}
		select {
		case <-arrived:
		case <-deadline.C:
			_, err := t.find(p.Name)
			return nil, err
		case <-ctx.Done():
			return nil, rpc.Internal("", ctx.Err())
		}
	}
}
