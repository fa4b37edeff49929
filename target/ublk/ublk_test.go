package ublk

import (
	"bytes"
	"errors"
	"io"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/target/malloc"
)

// TestEncoding compares with what a C compiler makes of include/uapi/linux/ublk_cmd.h.
func TestEncoding(t *testing.T) {
	for name, n := range map[string][2]uint64{
		"GET_DEV_INFO":         {cmdGetDevInfo, 0x80207502},
		"ADD_DEV":              {cmdAddDev, 0xc0207504},
		"DEL_DEV":              {cmdDelDev, 0xc0207505},
		"START_DEV":            {cmdStartDev, 0xc0207506},
		"STOP_DEV":             {cmdStopDev, 0xc0207507},
		"SET_PARAMS":           {cmdSetParams, 0xc0207508},
		"GET_PARAMS":           {cmdGetParams, 0x80207509},
		"START_USER_RECOVERY":  {cmdStartRecovery, 0xc0207510},
		"END_USER_RECOVERY":    {cmdEndRecovery, 0xc0207511},
		"GET_DEV_INFO2":        {cmdGetDevInfo2, 0x80207512},
		"GET_FEATURES":         {cmdGetFeatures, 0x80207513},
		"DEL_DEV_ASYNC":        {cmdDelDevAsync, 0x80207514},
		"FETCH_REQ":            {ioFetch, 0xc0107520},
		"COMMIT_AND_FETCH_REQ": {ioCommitAndFetch, 0xc0107521},

		"ublksrv_ctrl_cmd":      {uint64(unsafe.Sizeof(ctrlCmd{})), ctrlCmdBytes},
		"ublksrv_ctrl_dev_info": {uint64(unsafe.Sizeof(devInfo{})), 64},
		"dev_info.flags":        {uint64(unsafe.Offsetof(devInfo{}.flags)), 24},
		"dev_info.srv_flags":    {uint64(unsafe.Offsetof(devInfo{}.owner)), 32},
		"ublksrv_io_cmd":        {uint64(unsafe.Sizeof(ioCmd{})), ioCmdBytes},
		"io_cmd.addr":           {uint64(unsafe.Offsetof(ioCmd{}.addr)), 8},
		"ublksrv_io_desc":       {uint64(unsafe.Sizeof(ioDesc{})), ioDescBytes},
		"ublk_param_basic":      {uint64(unsafe.Sizeof(paramBasic{})), 32},
		"basic.dev_sectors":     {uint64(unsafe.Offsetof(paramBasic{}.devSectors)), 16},
		"ublk_param_discard":    {uint64(unsafe.Sizeof(paramDiscard{})), 20},
		"params.discard":        {uint64(unsafe.Offsetof(params{}.discard)), 40},
		"ctrl_cmd.dev_path_len": {uint64(unsafe.Offsetof(ctrlCmd{}.pathLen)), 24},
	} {
		if n[0] != n[1] {
			t.Errorf("%s is %#x, must be %#x", name, n[0], n[1])
		}
	}
}

func TestDenied(t *testing.T) {
	for kernel, bad := range map[string]bool{
		"6.12.117+deb12-amd64": false,
		"6.18.3":               false,
		"6.18.4":               true,
		"6.18.4-arch1-1":       true,
		"6.18.5":               true,
		"6.18.6":               false,
		"6.18.44":              false,
		"6.18":                 false,
		"6.17.0-1015-azure":    true,
		"6.17.0-1017-aws":      true,
		"6.17.0-8-generic":     true,
		"6.17.0":               false,
		"6.17.0-rc5":           false,
		"6.17.9-arch1-1":       false,
		"7.1.0":                false,
		"":                     false,
	} {
		if got := denied(kernel); (got != "") != bad {
			t.Errorf("%q: %q", kernel, got)
		}
	}
}

func TestLacks(t *testing.T) {
	if err := lacks(needed | 1<<40); err != nil {
		t.Error(err)
	}
	err := lacks(featIoctlEncode)
	if !errors.Is(err, kind.Unsupported) || !strings.Contains(err.Error(), "user recovery, user recovery with") {
		t.Error(err)
	}
}

// TestProbe runs where there is ublk and where there is none.
func TestProbe(t *testing.T) {
	err := Probe()
	t.Logf("probe: %v", err)
	if err != nil && !errors.Is(err, kind.Unsupported) && !errors.Is(err, kind.Denied) {
		t.Errorf("%v has kind %q", err, kind.Of(err))
	}
	if list, listErr := List(); err != nil && (listErr != nil || len(list) != 0) {
		t.Errorf("without ublk: %v, %v", list, listErr)
	}
}

func memory(t *testing.T, sizeBytes int64) *malloc.Device {
	t.Helper()
	d, err := malloc.New(sizeBytes)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

func TestOptions(t *testing.T) {
	d := memory(t, 1<<20)
	for name, change := range map[string]func(*Options){
		"no device":     func(o *Options) { o.Device = nil },
		"queues":        func(o *Options) { o.Queues = -1 },
		"many queues":   func(o *Options) { o.Queues = maxQueues + 1 },
		"depth":         func(o *Options) { o.Depth = maxDepth + 1 },
		"small request": func(o *Options) { o.MaxIOBytes = 512 },
		"odd request":   func(o *Options) { o.MaxIOBytes = 5000 },
		"block":         func(o *Options) { o.BlockBytes = 1024 },
		"workers":       func(o *Options) { o.Workers = -1 },
		"id":            func(o *Options) { o.ID = 1 << 40 },
		"size":          func(o *Options) { o.Device, o.BlockBytes = memory(t, 4096+512), 4096 },
	} {
		o := Options{Device: d}
		change(&o)
		if err := o.validate(); !errors.Is(err, kind.Invalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	o := Options{Device: d, BlockBytes: 4096}
	if err := o.validate(); err != nil {
		t.Fatal(err)
	}
	p := o.params()
	if p.types != paramTypeBasic|paramTypeDiscard || p.basic.attrs != attrVolatileCache|attrFUA ||
		p.basic.logicalShift != 12 || p.basic.devSectors != 2048 || p.basic.maxSectors != defaultIOBytes/512 || p.discard.maxDiscardSegments != 1 {
		t.Errorf("%+v", p)
	}
	o.ReadOnly = true
	if p = o.params(); p.types != paramTypeBasic || p.basic.attrs != attrReadOnly {
		t.Errorf("%+v", p)
	}
}

// failing is a device with an error to give.
type failing struct {
	*malloc.Device
	err     error
	flushes int
}

func (f *failing) Flush() error {
	f.flushes++
	return f.err
}

func (f *failing) ReadAt(p []byte, off int64) (int, error) {
	if f.err != nil {
		return 0, f.err
	}
	n, err := f.Device.ReadAt(p, off)
	if off+int64(n) == f.SizeBytes() { // as io.ReaderAt allows
		err = io.EOF
	}
	return n, err
}

func TestHandle(t *testing.T) {
	d := &failing{Device: memory(t, 1<<20)}
	o := Options{Device: d}
	if err := o.validate(); err != nil {
		t.Fatal(err)
	}
	s := newServer(o)
	buf := make([]byte, 8192)
	at := func(op uint32, sector uint64, sectors uint32) int32 {
		return s.handle(ioDesc{opFlags: op, startSector: sector, sectors: sectors}, buf)
	}
	for i := range buf {
		buf[i] = byte(i)
	}
	want := bytes.Clone(buf)
	if res := at(opWrite|flagFUA, 2048-16, 16); res != 8192 || d.flushes != 1 {
		t.Fatalf("write at the end: %d, %d flushes", res, d.flushes)
	}
	clear(buf)
	if res := at(opRead, 2048-16, 16); res != 8192 || !bytes.Equal(buf, want) {
		t.Fatalf("read at the end: %d", res)
	}
	if res := at(opWriteZeroes, 2048-16, 1); res != 0 {
		t.Fatalf("write zeroes: %d", res)
	}
	if res := at(opDiscard, 2048-15, 1); res != 0 {
		t.Fatalf("discard: %d", res)
	}
	if at(opRead, 2048-16, 16); !bytes.Equal(buf[:1024], make([]byte, 1024)) || !bytes.Equal(buf[1024:], want[1024:]) {
		t.Error("zeroes are not where they should be, or are elsewhere")
	}
	if res := at(opFlush, 0, 0); res != 0 || d.flushes != 2 {
		t.Errorf("flush: %d", res)
	}
	const eio = -int32(unix.EIO)
	for name, res := range map[string]int32{
		"beyond the end":   at(opRead, 2048, 1),
		"across the end":   at(opWrite, 2047, 2),
		"far away":         at(opRead, 1<<62, 1),
		"nothing":          at(opRead, 0, 0),
		"more than fits":   at(opRead, 0, 17),
		"too long discard": at(opDiscard, 0, 1<<31),
	} {
		if res != eio {
			t.Errorf("%s: %d", name, res)
		}
	}
	if res := at(9, 0, 1); res != -int32(unix.EOPNOTSUPP) {
		t.Errorf("unknown operation: %d", res)
	}
	for k, errno := range map[kind.Kind]unix.Errno{kind.NoSpace: unix.ENOSPC, kind.Unavailable: unix.EIO, kind.Corrupt: unix.EIO, kind.Invalid: unix.EIO} {
		d.err = kind.Errorf(k, "test")
		if res := at(opRead, 0, 1); res != -int32(errno) {
			t.Errorf("%s: %d", k, res)
		}
	}
	if n := s.stats.Errors.Load(); n != 11 {
		t.Errorf("%d errors counted", n)
	}
}

func FuzzHandle(f *testing.F) {
	f.Add(uint32(opRead), uint64(0), uint32(1))
	f.Add(uint32(opWriteZeroes|flagFUA), uint64(1<<40), uint32(1<<31))
	d, err := malloc.New(1 << 20)
	if err != nil {
		f.Fatal(err)
	}
	o := Options{Device: d}
	if err := o.validate(); err != nil {
		f.Fatal(err)
	}
	s := newServer(o)
	buf := make([]byte, 64<<10)
	f.Fuzz(func(t *testing.T, op uint32, sector uint64, sectors uint32) {
		res := s.handle(ioDesc{opFlags: op, startSector: sector, sectors: sectors}, buf)
		if res > int32(len(buf)) || res > 0 && uint64(res) != uint64(sectors)<<9 {
			t.Fatalf("%d", res)
		}
	})
}

// TestJudge plays devices of different speed.
func TestJudge(t *testing.T) {
	play := func(slow func(i int) bool) (byQueue, slowByQueue int) {
		q := &queue{score: slowLimit - slowWeight + 1}
		for i := range 100000 {
			if q.slow > 0 {
				q.slow--
				continue
			}
			byQueue++
			s := slow(i)
			if s {
				slowByQueue++
			}
			q.judge(s)
		}
		return byQueue, slowByQueue
	}
	for name, c := range map[string]struct {
		slow            func(i int) bool
		least, most     int // requests handled by the queue's thread
		mostSlowByQueue int
	}{
		"fast":          {func(int) bool { return false }, 100000, 100000, 0},
		"slow":          {func(int) bool { return true }, 300, 400, 400},
		"rarely slow":   {func(i int) bool { return i%100 == 99 }, 100000, 100000, 1000},
		"often slow":    {func(i int) bool { return i*2654435761%7 == 0 }, 100, 20000, 2000},
		"slow at first": {func(i int) bool { return i < 10000 }, 89000, 91000, 100},
	} {
		n, s := play(c.slow)
		if n < c.least || n > c.most || s > c.mostSlowByQueue {
			t.Errorf("%s: the thread handles %d requests, %d of them slow", name, n, s)
		}
	}
}
