package target

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/lvol/device"
	"github.com/thaw-project/thaw/target/bdev"
	"github.com/thaw-project/thaw/target/nbd"
	"github.com/thaw-project/thaw/target/rpc"
)

// What users of a bdev read and wrote is counted, as SPDK does in bdev_io: reads, writes
// and unmaps; zeroes and flushes are not. A user is a front-end or an lvstore. What the
// target copies for itself (inflate, shallow copies) is not counted.

// tickRate is how many ticks a second has, for latencies.
const tickRate = uint64(time.Second)

// started is when ticks began.
var started = time.Now()

// figures count one kind of I/O.
type figures struct {
	ops, bytes, ticks, most, least atomic.Uint64 // least is 0 when there was none
}

func (f *figures) add(n int, took uint64) {
	f.ops.Add(1)
	f.bytes.Add(uint64(n))
	f.ticks.Add(took)
	for most := f.most.Load(); took > most && !f.most.CompareAndSwap(most, took); most = f.most.Load() {
	}
	for least := f.least.Load(); (least == 0 || took < least) && !f.least.CompareAndSwap(least, took); least = f.least.Load() {
	}
}

// plus adds what another has counted.
func (f *figures) plus(o *figures) {
	f.ops.Add(o.ops.Load())
	f.bytes.Add(o.bytes.Load())
	f.ticks.Add(o.ticks.Load())
	f.most.Store(max(f.most.Load(), o.most.Load()))
	if l, least := o.least.Load(), f.least.Load(); l != 0 && (least == 0 || l < least) {
		f.least.Store(l)
	}
}

func (f *figures) reset(all bool) {
	if all {
		f.ops.Store(0)
		f.bytes.Store(0)
		f.ticks.Store(0)
	}
	f.most.Store(0)
	f.least.Store(0)
}

// stripe is what some of the I/O is counted in: 128 bytes, so that two processors seldom
// write to one cache line.
type stripe struct {
	read, write, unmap figures
	failed             atomic.Uint64
}

func (s *stripe) kinds() [3]*figures { return [...]*figures{&s.read, &s.write, &s.unmap} }

// ioStat is what was done with a disk since it came, or since it was reset.
type ioStat [4]stripe

// stripe is any one.
func (s *ioStat) stripe() *stripe { return &s[rand.Uint32()%uint32(len(s))] }

func (s *ioStat) sum() *stripe {
	total := &stripe{}
	for i := range s {
		for k, f := range total.kinds() {
			f.plus(s[i].kinds()[k])
		}
		total.failed.Add(s[i].failed.Load())
	}
	return total
}

func (s *ioStat) reset(mode string) {
	for i := range s {
		if mode == "all" || mode == "maxmin" {
			for _, f := range s[i].kinds() {
				f.reset(mode == "all")
			}
		}
		if mode == "all" || mode == "error" {
			s[i].failed.Store(0)
		}
	}
}

// ioStat returns a disk's figures. They are made for the first who counts: most disks of
// an lvstore are never used.
func (d *disk) ioStat() *ioStat {
	if s := d.stat.Load(); s != nil {
		return s
	}
	d.stat.CompareAndSwap(nil, new(ioStat))
	return d.stat.Load()
}

// now is the time in ticks. A wall clock, which time.Now reads too, would cost as much
// again.
func now() time.Duration { return time.Since(started) }

// succeeded tells what SPDK counts as read or written; else it is a failure.
func (s *stripe) succeeded(err error) bool {
	if err != nil && !errors.Is(err, io.EOF) {
		s.failed.Add(1)
		return false
	}
	return true
}

func took(began time.Duration) uint64 { return uint64(max(now()-began, 1)) }

// countedDevice is a user's device, whose I/O is counted.
type countedDevice struct {
	bdev.Device
	s *ioStat
}

// countedMapper is a countedDevice that tells what it holds.
type countedMapper struct {
	countedDevice
	nbd.Mapper
}

// counted returns a device whose I/O is counted.
func counted(dev bdev.Device, s *ioStat) bdev.Device {
	c := countedDevice{dev, s}
	if m, ok := dev.(nbd.Mapper); ok {
		return countedMapper{c, m}
	}
	return c
}

// ReadAt implements io.ReaderAt.
func (c countedDevice) ReadAt(p []byte, off int64) (int, error) {
	began := now()
	n, err := c.Device.ReadAt(p, off)
	if s := c.s.stripe(); s.succeeded(err) {
		s.read.add(n, took(began))
	}
	return n, err
}

// WriteAt implements io.WriterAt.
func (c countedDevice) WriteAt(p []byte, off int64) (int, error) {
	began := now()
	n, err := c.Device.WriteAt(p, off)
	if s := c.s.stripe(); s.succeeded(err) {
		s.write.add(n, took(began))
	}
	return n, err
}

// Discard implements bdev.Device.
func (c countedDevice) Discard(off, length int64) error {
	began := now()
	err := c.Device.Discard(off, length)
	if s := c.s.stripe(); s.succeeded(err) {
		s.unmap.add(int(length), took(began))
	}
	return err
}

// countedBase is what an lvstore lies on, whose I/O is counted.
type countedBase struct {
	device.Device
	s *ioStat
}

// ReadAt implements device.Device.
func (c countedBase) ReadAt(p []byte, off int64) error {
	began := now()
	err := c.Device.ReadAt(p, off)
	if s := c.s.stripe(); s.succeeded(err) {
		s.read.add(len(p), took(began))
	}
	return err
}

// WriteAt implements device.Device.
func (c countedBase) WriteAt(p []byte, off int64) error {
	began := now()
	err := c.Device.WriteAt(p, off)
	if s := c.s.stripe(); s.succeeded(err) {
		s.write.add(len(p), took(began))
	}
	return err
}

// Punch implements device.Device.
func (c countedBase) Punch(off, length int64) error {
	began := now()
	err := c.Device.Punch(off, length)
	if s := c.s.stripe(); s.succeeded(err) {
		s.unmap.add(int(length), took(began))
	}
	return err
}

// statInfo has the shape of SPDK's spdk_bdev_dump_io_stat_json.
type statInfo struct {
	BytesRead    uint64            `json:"bytes_read"`
	ReadOps      uint64            `json:"num_read_ops"`
	BytesWritten uint64            `json:"bytes_written"`
	WriteOps     uint64            `json:"num_write_ops"`
	BytesUnmap   uint64            `json:"bytes_unmapped"`
	UnmapOps     uint64            `json:"num_unmap_ops"`
	BytesCopied  uint64            `json:"bytes_copied"`
	CopyOps      uint64            `json:"num_copy_ops"`
	ReadTicks    uint64            `json:"read_latency_ticks"`
	ReadMost     uint64            `json:"max_read_latency_ticks"`
	ReadLeast    uint64            `json:"min_read_latency_ticks"`
	WriteTicks   uint64            `json:"write_latency_ticks"`
	WriteMost    uint64            `json:"max_write_latency_ticks"`
	WriteLeast   uint64            `json:"min_write_latency_ticks"`
	UnmapTicks   uint64            `json:"unmap_latency_ticks"`
	UnmapMost    uint64            `json:"max_unmap_latency_ticks"`
	UnmapLeast   uint64            `json:"min_unmap_latency_ticks"`
	CopyTicks    uint64            `json:"copy_latency_ticks"`
	CopyMost     uint64            `json:"max_copy_latency_ticks"`
	CopyLeast    uint64            `json:"min_copy_latency_ticks"`
	Errors       map[string]uint64 `json:"io_error"` // by SPDK's name of the status, those that there were
}

func (t *ioStat) info() statInfo {
	s := t.sum()
	i := statInfo{
		BytesRead: s.read.bytes.Load(), ReadOps: s.read.ops.Load(), ReadTicks: s.read.ticks.Load(), ReadMost: s.read.most.Load(), ReadLeast: s.read.least.Load(),
		BytesWritten: s.write.bytes.Load(), WriteOps: s.write.ops.Load(), WriteTicks: s.write.ticks.Load(), WriteMost: s.write.most.Load(), WriteLeast: s.write.least.Load(),
		BytesUnmap: s.unmap.bytes.Load(), UnmapOps: s.unmap.ops.Load(), UnmapTicks: s.unmap.ticks.Load(), UnmapMost: s.unmap.most.Load(), UnmapLeast: s.unmap.least.Load(),
		Errors: map[string]uint64{},
	}
	if n := s.failed.Load(); n > 0 {
		i.Errors["failed"] = n
	}
	return i
}

func (t *Target) getIOStat(params json.RawMessage) (any, error) {
	var p struct {
		Name       string `json:"name,omitempty"`
		PerChannel bool   `json:"per_channel,omitempty"`
		ResetMode  string `json:"reset_mode,omitempty"`
	}
	if err := decode(params, &p); err != nil {
		return nil, err
	}
	if !slices.Contains([]string{"", "none", "all", "maxmin", "error"}, p.ResetMode) {
		return nil, rpc.Internal("spdk_json_decode_object failed", kind.Errorf(kind.Invalid, "reset_mode %.32q: must be all, maxmin, error or none", p.ResetMode))
	}
	if p.PerChannel && p.Name == "" {
		return nil, rpc.Errno(syscall.EINVAL, kind.Errorf(kind.Invalid, "per_channel needs a name"))
	}
	var disks []*disk
	if p.Name != "" {
		d, err := t.find(p.Name)
		if err != nil {
			return nil, err
		}
		disks = append(disks, d)
	} else {
		t.mu.RLock()
		disks = append(disks, t.disks...)
		t.mu.RUnlock()
	}
	type named struct {
		Name string `json:"name"`
		statInfo
	}
	type channel struct {
		Thread uint64 `json:"thread_id"`
		statInfo
	}
	type ticks struct {
		Rate uint64 `json:"tick_rate"`
		Now  uint64 `json:"ticks"`
	}
	clock := ticks{tickRate, uint64(now())}
	if p.PerChannel {
		// Threads here do not belong to a bdev: all that is done is one channel's.
		c := channel{1, disks[0].ioStat().info()}
		disks[0].ioStat().reset(p.ResetMode)
		return struct {
			ticks
			Name     string    `json:"name"`
			Channels []channel `json:"channels"`
		}{clock, disks[0].name, []channel{c}}, nil
	}
	list := make([]named, 0, len(disks))
	for _, d := range disks {
		list = append(list, named{d.name, d.ioStat().info()})
		d.ioStat().reset(p.ResetMode)
	}
	return struct {
		ticks
		Bdevs []named `json:"bdevs"`
	}{clock, list}, nil
}

func (t *Target) resetIOStat(params json.RawMessage) (any, error) {
	p := struct {
		Name string `json:"name,omitempty"`
		Mode string `json:"mode,omitempty"`
	}{Mode: "all"}
	if err := decode(params, &p); err != nil {
		return nil, err
	}
	if !slices.Contains([]string{"none", "all", "maxmin", "error"}, p.Mode) {
		return nil, rpc.Internal("spdk_json_decode_object failed", fmt.Errorf("mode %.32q", p.Mode))
	}
	disks := []*disk{}
	if p.Name != "" {
		d, err := t.find(p.Name)
		if err != nil {
			return nil, err
		}
		disks = append(disks, d)
	} else {
		t.mu.RLock()
		disks = append(disks, t.disks...)
		t.mu.RUnlock()
	}
	for _, d := range disks {
		d.ioStat().reset(p.Mode)
	}
	return true, nil
}
