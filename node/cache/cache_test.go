package cache

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/lvol/device"
)

func openCache(t testing.TB, o Options) *Cache {
	t.Helper()
	c, err := Open(o)
	ok(t, err)
	t.Cleanup(func() { c.Close() })
	return c
}

func attach(t testing.TB, c *Cache, r *remote) *Device {
	t.Helper()
	r.closed.Store(false)
	d, err := c.Device(r, Map{Domain: "store", Runs: r.runs})
	ok(t, err)
	return d
}

// readAll reads the device in parts of n bytes and checks every byte.
func readAll(t testing.TB, d *Device, r *remote, n int) {
	t.Helper()
	p, want := make([]byte, n), make([]byte, n)
	for at := int64(0); at < d.SizeBytes(); at += int64(n) {
		got, err := d.ReadAt(p, at)
		if err != nil && err != io.EOF {
			t.Fatal(err)
		}
		r.fill(want[:got], at)
		if !bytes.Equal(p[:got], want[:got]) {
			t.Fatalf("wrong bytes at %d", at)
		}
	}
}

const mib = 1 << 20

// image is a remote of one owner's data, but for a hole in the middle.
func image(n int, sizeBytes int64) *remote {
	third := sizeBytes / 3 &^ (64<<10 - 1)
	return &remote{runs: []Run{
		{0, third, true, owner(n)}, {third, third, false, [16]byte{}}, {2 * third, sizeBytes - 2*third, true, owner(n)},
	}}
}

func TestSecondReadNeedsNoNetwork(t *testing.T) {
	for _, unit := range []int64{4 << 10, 32 << 10, 64 << 10, 256 << 10} {
		o := Options{Dir: filepath.Join(t.TempDir(), "cache"), SizeBytes: 64 * mib, UnitBytes: unit, ReadAheadBytes: -1}
		c := openCache(t, o)
		a, b := image(1, 9*mib+512), image(1, 9*mib+512)
		readAll(t, attach(t, c, a), a, 10000)
		if got, hole := a.bytes.Load(), a.runs[1].LengthBytes; got != 9*mib+512-hole {
			t.Errorf("unit %d: %d bytes fetched for a first read, without the hole of %d", unit, got, hole)
		}
		readAll(t, attach(t, c, b), b, 128<<10) // another image of the same owner
		ok(t, c.Close())
		c = openCache(t, o)
		readAll(t, attach(t, c, b), b, 70000)
		if got := b.bytes.Load(); got != 0 {
			t.Errorf("unit %d: %d bytes fetched for what is there", unit, got)
		}
		// In another domain the same owner is somebody else.
		other := image(1, 9*mib+512)
		d, err := c.Device(other, Map{Domain: "other", Runs: other.runs})
		ok(t, err)
		readAll(t, d, other, mib)
		if other.bytes.Load() == 0 {
			t.Error("a domain reads what another fetched")
		}
		ok(t, c.Close())
	}
}

// TestKill starts a process that reads through a cache and is killed the moment it has:
// what it read is there for the next.
func TestKill(t *testing.T) {
	dir := os.Getenv("THAW_TEST_CACHE_DIR")
	o := Options{Dir: filepath.Join(dir, "cache"), SizeBytes: 64 * mib, ReadAheadBytes: -1}
	if dir != "" {
		r := image(7, 6*mib)
		readAll(t, attach(t, openCache(t, o), r), r, 50000)
		fmt.Println("read")
		time.Sleep(time.Hour) // until killed
	}
	dir = t.TempDir()
	o.Dir = filepath.Join(dir, "cache")
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	child := exec.CommandContext(ctx, os.Args[0], "-test.run=^TestKill$")
	child.Env = append(os.Environ(), "THAW_TEST_CACHE_DIR="+dir)
	out, err := child.StdoutPipe()
	ok(t, err)
	ok(t, child.Start())
	for in := bufio.NewScanner(out); in.Scan() && in.Text() != "read"; {
		t.Log(in.Text())
	}
	if _, err := Open(o); !errors.Is(err, kind.InUse) {
		t.Errorf("opened while another process has it: %v", err)
	}
	if st, err := Inspect(o.Dir); err != nil || st.UsedBytes != 6*mib-image(7, 6*mib).runs[1].LengthBytes {
		t.Errorf("inspected while in use: %+v, %v", st, err)
	}
	ok(t, child.Process.Kill())
	_ = child.Wait()
	c := openCache(t, o)
	r := image(7, 6*mib)
	readAll(t, attach(t, c, r), r, 128<<10)
	if st := c.Stat(); r.bytes.Load() != 0 || st.BadBlocks != 0 {
		t.Errorf("after a kill: %d bytes fetched, %+v", r.bytes.Load(), st)
	}
}

// TestJoin lets many readers of two devices want one block at once: one remote read.
func TestJoin(t *testing.T) {
	c := openCache(t, Options{Dir: filepath.Join(t.TempDir(), "cache"), SizeBytes: 16 * mib, ReadAheadBytes: -1})
	a, b := image(1, 3*mib), image(1, 3*mib)
	gate := make(chan struct{})
	a.read = func(int64, int) { <-gate }
	b.read = a.read
	devices := []*Device{attach(t, c, a), attach(t, c, b)}
	var wg sync.WaitGroup
	for i := range 40 {
		wg.Go(func() {
			p, want := make([]byte, 5000), make([]byte, 5000)
			if _, err := devices[i%2].ReadAt(p, 100); err != nil {
				t.Error(err)
			}
			if a.fill(want, 100); !bytes.Equal(p, want) {
				t.Error("wrong bytes")
			}
		})
	}
	for c.Stat().Joins < 39 {
		time.Sleep(time.Millisecond)
	}
	close(gate)
	wg.Wait()
	if n := a.calls.Load() + b.calls.Load(); n != 1 {
		t.Errorf("%d remote reads", n)
	}
}

// TestJoinFailed closes the device that fetches what readers of another wait for: they
// fetch it by their own.
func TestJoinFailed(t *testing.T) {
	c := openCache(t, Options{Dir: filepath.Join(t.TempDir(), "cache"), SizeBytes: 16 * mib, ReadAheadBytes: -1})
	a, b := image(1, 3*mib), image(1, 3*mib)
	gate := make(chan struct{})
	a.fault = func(int64, int) (int, error) {
		<-gate
		return 0, kind.Errorf(kind.Unavailable, "closed meanwhile")
	}
	da, db := attach(t, c, a), attach(t, c, b)
	leader := make(chan error, 1)
	go func() {
		_, err := da.ReadAt(make([]byte, 4096), 0)
		leader <- err
	}()
	for a.calls.Load() == 0 {
		time.Sleep(time.Millisecond)
	}
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			p, want := make([]byte, 4096), make([]byte, 4096)
			if _, err := db.ReadAt(p, 4096); err != nil {
				t.Error(err)
			}
			if b.fill(want, 4096); !bytes.Equal(p, want) {
				t.Error("wrong bytes")
			}
		})
	}
	for c.Stat().Joins < 20 {
		time.Sleep(time.Millisecond)
	}
	close(gate)
	wg.Wait()
	if err := <-leader; !errors.Is(err, kind.Unavailable) {
		t.Errorf("the one whose remote failed: %v", err)
	}
	if n := b.calls.Load(); n != 1 {
		t.Errorf("%d remote reads by those who waited", n)
	}
}

// TestBadBlockOfTheRemote wants neighbours of a block that the remote cannot read.
func TestBadBlockOfTheRemote(t *testing.T) {
	c := openCache(t, Options{Dir: filepath.Join(t.TempDir(), "cache"), SizeBytes: 16 * mib, ReadAheadBytes: -1})
	r := image(1, 3*mib)
	r.fault = func(off int64, n int) (int, error) {
		if bad := int64(8192); off <= bad && bad < off+int64(n) {
			return int(bad - off), kind.Errorf(kind.Corrupt, "block at %d", bad)
		}
		return n, nil
	}
	d := attach(t, c, r)
	p := make([]byte, 4096)
	for _, at := range []int64{0, 4096, 12288, 65536} {
		if _, err := d.ReadAt(p, at); err != nil {
			t.Errorf("at %d: %v", at, err)
		}
	}
	if n, err := d.ReadAt(make([]byte, 32<<10), 0); n != 8192 || !errors.Is(err, kind.Corrupt) {
		t.Errorf("across the bad block: %d, %v", n, err)
	}
}

// TestCloseEndsReads closes device and cache while the remote hangs.
func TestCloseEndsReads(t *testing.T) {
	c := openCache(t, Options{Dir: filepath.Join(t.TempDir(), "cache"), SizeBytes: 16 * mib})
	r := image(1, 3*mib)
	r.fault = func(int64, int) (int, error) {
		for !r.closed.Load() {
			time.Sleep(time.Millisecond)
		}
		return 0, kind.Errorf(kind.Unavailable, "closed")
	}
	d := attach(t, c, r)
	done := make(chan error, 1)
	go func() {
		_, err := d.ReadAt(make([]byte, 4096), 0)
		done <- err
	}()
	for r.calls.Load() == 0 {
		time.Sleep(time.Millisecond)
	}
	ok(t, c.Close())
	if err := <-done; !errors.Is(err, kind.Unavailable) {
		t.Error(err)
	}
	if _, err := d.ReadAt(make([]byte, 1), 0); !errors.Is(err, kind.Unavailable) {
		t.Errorf("read of a closed device: %v", err)
	}
	r.closed.Store(false)
	if _, err := c.Device(r, Map{Domain: "x", Runs: r.runs}); !errors.Is(err, kind.Unavailable) || !r.closed.Load() {
		t.Errorf("device of a closed cache: %v, remote closed: %v", err, r.closed.Load())
	}
}

// logLines counts lines of a log.
type logLines struct {
	mu sync.Mutex
	b  strings.Builder // guarded by mu
}

func (l *logLines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logLines) lines() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Split(strings.TrimSpace(l.b.String()), "\n")
}

// TestFullDisk fills the disk, which costs nothing but the cache, is told once, and
// ends by itself.
func TestFullDisk(t *testing.T) {
	disks := newDisks(32*mib, 32<<10)
	var log logLines
	var now atomic.Int64
	o := Options{
		Dir: filepath.Join(t.TempDir(), "cache"), SizeBytes: 32 * mib, UnitBytes: 32 << 10, openFile: disks.open, ReadAheadBytes: -1,
		Logger: slog.New(slog.NewTextHandler(&log, nil)), Now: func() time.Time { return time.Unix(0, now.Load()+1) },
	}
	c := openCache(t, o)
	disks.faults[0].Inject(device.Rule{Op: device.OpWrite, Err: syscall.ENOSPC})
	r := image(1, 9*mib)
	d := attach(t, c, r)
	for range 3 {
		readAll(t, d, r, 64<<10)
		now.Add(int64(2 * retryInterval)) // it tries again, and fails again
	}
	if st := c.Stat(); !st.Paused || st.UsedBytes != 0 || st.DiskErrors < 3 || st.DiskErrors > 10 {
		t.Errorf("%+v", st)
	}
	// While it keeps nothing it fetches what is asked for and no more, in as few reads.
	_, err := d.ReadAt(make([]byte, 1), 0)
	ok(t, err)
	wantFetched := func(part int, calls int64) {
		t.Helper()
		bytes0, calls0 := r.bytes.Load(), r.calls.Load()
		readAll(t, d, r, part)
		if n := r.bytes.Load() - bytes0; n != 9*mib-r.runs[1].LengthBytes {
			t.Errorf("in parts of %d: %d bytes fetched past the cache", part, n)
		}
		if n := r.calls.Load() - calls0; n > calls {
			t.Errorf("in parts of %d: %d remote reads, want %d", part, n, calls)
		}
	}
	wantFetched(4096, 6*mib/4096)
	wantFetched(mib, 6)
	disks.faults[0].Heal()
	now.Add(int64(2 * retryInterval))
	readAll(t, d, r, 64<<10)
	before := r.bytes.Load()
	readAll(t, d, r, 64<<10)
	if st := c.Stat(); st.Paused || r.bytes.Load() != before {
		t.Errorf("there is space again: %+v", st)
	}
	if l := log.lines(); len(l) != 2 || !strings.Contains(l[0], "passes through") || !strings.Contains(l[1], "again") {
		t.Errorf("log: %q", l)
	}
}

// TestBadDisk damages what is kept: it is fetched again, never shown.
func TestBadDisk(t *testing.T) {
	disks := newDisks(32*mib, 32<<10)
	o := Options{Dir: filepath.Join(t.TempDir(), "cache"), SizeBytes: 32 * mib, UnitBytes: 32 << 10, openFile: disks.open, ReadAheadBytes: -1}
	c := openCache(t, o)
	r := image(1, 9*mib)
	d := attach(t, c, r)
	readAll(t, d, r, 64<<10)
	for at := int64(0); at < 32*mib; at += 32 << 10 {
		b := make([]byte, 1)
		ok(t, disks.data.ReadAt(b, at+5000))
		b[0] ^= 0x10
		ok(t, disks.data.WriteAt(b, at+5000))
	}
	readAll(t, d, r, 4096)
	if st := c.Stat(); st.BadBlocks != 6*mib>>15 {
		t.Errorf("%d units of %d were found bad", st.BadBlocks, 6*mib>>15)
	}
	before := r.bytes.Load()
	readAll(t, d, r, 64<<10)
	if r.bytes.Load() != before {
		t.Error("what was fetched again is not kept")
	}
	wantSound(t, c)
}

// TestOpen is about what Open finds.
func TestOpen(t *testing.T) {
	fill := func(o Options) *remote {
		c, r := openCache(t, o), image(1, 3*mib)
		readAll(t, attach(t, c, r), r, 64<<10)
		ok(t, c.Close())
		return r
	}
	fetched := func(o Options) int64 {
		t.Helper()
		c, r := openCache(t, o), image(1, 3*mib)
		readAll(t, attach(t, c, r), r, 64<<10)
		ok(t, c.Close())
		return r.bytes.Load()
	}
	o := Options{Dir: filepath.Join(t.TempDir(), "cache"), SizeBytes: 256 * mib, ReadAheadBytes: -1}
	fill(o)
	larger, smaller := o, o
	larger.SizeBytes, smaller.SizeBytes = 300*mib, 200*mib
	if a, b := fetched(larger), fetched(smaller); a != 0 || b != 0 {
		t.Errorf("another size: %d and %d bytes fetched", a, b)
	}
	for _, name := range []string{"data", "index"} {
		if st, err := os.Stat(filepath.Join(o.Dir, name)); err != nil || st.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", name, st.Mode(), err)
		}
	}
	// The header is damaged: made anew.
	index := filepath.Join(o.Dir, "index")
	change := func(at int64, b ...byte) {
		f, err := os.OpenFile(index, os.O_RDWR, 0)
		ok(t, err)
		defer f.Close()
		_, err = f.WriteAt(b, at)
		ok(t, err)
	}
	change(3000, 1)
	if n := fetched(o); n == 0 {
		t.Error("a damaged header is believed")
	}
	// Another unit: made anew, and back.
	unit := o
	unit.UnitBytes = 16 << 10
	if n := fetched(unit); n == 0 {
		t.Error("another unit found something")
	}
	if n := fetched(o); n != 0 { // 0: what it has
		t.Errorf("%d bytes fetched with the unit that the cache has", n)
	}
	// A newer program's, and somebody else's: left alone.
	newer := header{unitBytes: 16 << 10}.encode()
	newer[8] = formatVersion + 1
	reseal(newer)
	change(0, newer...)
	if _, err := Open(o); !errors.Is(err, kind.Unsupported) {
		t.Errorf("a newer version: %v", err)
	}
	newer = header{unitBytes: 16 << 10}.encode()
	newer[16] = 1
	reseal(newer)
	change(0, newer...)
	if _, err := Open(o); !errors.Is(err, kind.Unsupported) {
		t.Errorf("an unknown feature: %v", err)
	}
	ok(t, os.WriteFile(index, []byte("what is this"), 0o600))
	if _, err := Open(o); !errors.Is(err, kind.Invalid) {
		t.Errorf("somebody else's file: %v", err)
	}
	for _, bad := range []Options{
		{}, {Dir: "relative"}, {Dir: "/x", UnitBytes: 5000}, {Dir: "/x", UnitBytes: 2048}, {Dir: "/x", SizeBytes: 4096},
		{Dir: "/x", SizeBytes: MaxSizeBytes + 1}, {Dir: "/x", SizeBytes: -1}, {Dir: "/x", ReadAheadBytes: 1 << 40},
	} {
		if err := bad.Validate(); !errors.Is(err, kind.Invalid) {
			t.Errorf("%+v: %v", bad, err)
		}
	}
}

// TestMaps refuses what does not describe a device.
func TestMaps(t *testing.T) {
	c := openCache(t, Options{Dir: filepath.Join(t.TempDir(), "cache"), SizeBytes: 16 * mib})
	o := owner(1)
	for name, m := range map[string]Map{
		"no domain":   {Runs: []Run{{0, mib, true, o}}},
		"no runs":     {Domain: "x"},
		"gap":         {Domain: "x", Runs: []Run{{0, 4096, true, o}, {8192, mib - 8192, true, o}}},
		"overlap":     {Domain: "x", Runs: []Run{{0, 8192, true, o}, {4096, mib - 4096, true, o}}},
		"negative":    {Domain: "x", Runs: []Run{{0, -4096, true, o}, {-4096, mib + 4096, true, o}}},
		"empty":       {Domain: "x", Runs: []Run{{0, 0, true, o}, {0, mib, true, o}}},
		"overflow":    {Domain: "x", Runs: []Run{{0, 4096, true, o}, {4096, 1<<63 - 1, true, o}}},
		"too long":    {Domain: "x", Runs: []Run{{0, 2 * mib, true, o}}},
		"too short":   {Domain: "x", Runs: []Run{{0, mib / 2, true, o}}},
		"unaligned":   {Domain: "x", Runs: []Run{{0, 512, true, o}, {512, mib - 512, true, o}}},
		"late start":  {Domain: "x", Runs: []Run{{4096, mib - 4096, true, o}}},
		"long domain": {Domain: strings.Repeat("x", 257), Runs: []Run{{0, mib, true, o}}},
		"many runs":   {Domain: "x", Runs: make([]Run, MaxRuns+1)},
	} {
		r := &remote{runs: []Run{{0, mib, true, o}}}
		if _, err := c.Device(r, m); !errors.Is(err, kind.Invalid) || !r.closed.Load() {
			t.Errorf("%s: %v, remote closed: %v", name, err, r.closed.Load())
		}
	}
}

// TestReadOnly holds Device to what it says.
func TestReadOnly(t *testing.T) {
	c := openCache(t, Options{Dir: filepath.Join(t.TempDir(), "cache"), SizeBytes: 16 * mib})
	r := image(1, 3*mib)
	d := attach(t, c, r)
	_, err := d.WriteAt(make([]byte, 1), 0)
	for _, err := range []error{err, d.Discard(0, 512), d.WriteZeroes(0, 512)} {
		if !errors.Is(err, kind.ReadOnly) {
			t.Error(err)
		}
	}
	ok(t, d.Flush())
	if _, err := d.ReadAt(make([]byte, 1), -1); !errors.Is(err, kind.Invalid) {
		t.Error(err)
	}
	third := r.runs[0].LengthBytes
	for _, x := range []struct {
		at, n, want int64
		hole        bool
	}{{0, 3 * mib, third, false}, {100, 50, 50, false}, {third, 3 * mib, third, true}, {2*third + 512, 3 * mib, 3*mib - 2*third - 512, false}} {
		if n, hole, zero, err := d.Extent(x.at, x.n); err != nil || n != x.want || hole != x.hole || zero != x.hole {
			t.Errorf("extent of %d at %d: %d, %v, %v, %v", x.n, x.at, n, hole, zero, err)
		}
	}
	ok(t, d.Close())
	ok(t, d.Close())
}

// TestOneScanDoesNotFlush reads a lot once beside what is read again and again.
func TestOneScanDoesNotFlush(t *testing.T) {
	const unit = 32 << 10
	c := openCache(t, Options{Dir: filepath.Join(t.TempDir(), "cache"), SizeBytes: 16 * mib, UnitBytes: unit, ReadAheadBytes: -1})
	hot := &remote{runs: []Run{{0, 4 * mib, true, owner(1)}}}
	h := attach(t, c, hot)
	for i := range 3 {
		readAll(t, h, hot, 4096)
		cold := &remote{runs: []Run{{0, 5 * mib, true, owner(10 + i)}}}
		d := attach(t, c, cold)
		readAll(t, d, cold, 4096)
		ok(t, d.Close())
	}
	scan := &remote{runs: []Run{{0, 100 * mib, true, owner(2)}}}
	readAll(t, attach(t, c, scan), scan, 128<<10)
	before := hot.bytes.Load()
	readAll(t, h, hot, 4096)
	if n := hot.bytes.Load() - before; n > mib/2 {
		t.Errorf("a scan of 100 MiB flushed %d bytes of 4 MiB that were read three times", n)
	}
	st := c.Stat()
	if st.UsedBytes > 16*mib || st.CapacityBytes > 16*mib || st.Evictions == 0 {
		t.Errorf("%+v", st)
	}
	wantSound(t, c)
}

// TestPinnedSlots has more reads under way than the cache has slots: they are served.
func TestPinnedSlots(t *testing.T) {
	const unit = 4096
	c := openCache(t, Options{Dir: filepath.Join(t.TempDir(), "cache"), SizeBytes: minSlots * unit, UnitBytes: unit, ReadAheadBytes: -1})
	r := image(1, 3*mib)
	d := attach(t, c, r)
	s := c.shards[0]
	readAll(t, d, r, unit)
	s.mu.Lock()
	for i := range s.slots {
		s.slots[i].readers++
	}
	s.mu.Unlock()
	readAll(t, d, r, unit)
	if st := c.Stat(); st.Skipped == 0 {
		t.Errorf("%+v", st)
	}
	for i := range s.slots {
		s.release(uint32(i), false)
	}
	wantSound(t, c)
	if n, err := c.Prune(0); err != nil || n != minSlots*unit || c.Stat().UsedBytes != 0 {
		t.Errorf("pruned %d, %v", n, err)
	}
	wantSound(t, c)
	if st, err := Inspect(c.o.Dir); err != nil || st.Units != 0 || st.CapacityBytes != minSlots*unit {
		t.Errorf("after a prune: %+v, %v", st, err)
	}
}

// TestLongerDevice shares the last unit of a device with a longer one.
func TestLongerDevice(t *testing.T) {
	c := openCache(t, Options{Dir: filepath.Join(t.TempDir(), "cache"), SizeBytes: 16 * mib, ReadAheadBytes: -1})
	short := &remote{runs: []Run{{0, 64<<10 + 512, true, owner(1)}}}
	long := &remote{runs: []Run{{0, 64<<10 + 5000*512, true, owner(1)}}}
	s, l := attach(t, c, short), attach(t, c, long)
	for range 2 {
		readAll(t, s, short, 4096)
		readAll(t, l, long, 4096)
	}
	if a, b := short.bytes.Load(), long.bytes.Load(); a != 64<<10+512 || b != 5000*512 {
		t.Errorf("%d and %d bytes fetched", a, b)
	}
	wantSound(t, c)
}

func TestReadAhead(t *testing.T) {
	c := openCache(t, Options{Dir: filepath.Join(t.TempDir(), "cache"), SizeBytes: 64 * mib})
	r := &remote{runs: []Run{{0, 16 * mib, true, owner(1)}}}
	var under, most atomic.Int64
	r.read = func(_ int64, n int) {
		now := under.Add(int64(n))
		for m := most.Load(); now > m && !most.CompareAndSwap(m, now); m = most.Load() {
		}
		time.Sleep(100 * time.Microsecond)
		under.Add(-int64(n))
	}
	d := attach(t, c, r)
	readAll(t, d, r, 32<<10)
	idle(c)
	st := c.Stat()
	if r.bytes.Load() != 16*mib {
		t.Errorf("%d bytes fetched of %d", r.bytes.Load(), 16*mib)
	}
	if st.ReadAheadBytes < 8*mib || st.ReadAheadUsedBytes < st.ReadAheadBytes*9/10 {
		t.Errorf("sequential: %+v", st)
	}
	if n := most.Load(); n > aheadWorkers*aheadChunkBytes+32<<10 {
		t.Errorf("%d bytes were under way", n)
	}
	// What is there is not read ahead of: another reader, even after a restart, that
	// stops in the middle of what there is fetches nothing.
	for i := range 2 {
		if i == 1 {
			ok(t, c.Close())
			c = openCache(t, c.o)
		}
		before, half := r.bytes.Load(), &remote{runs: []Run{{0, 32 * mib, true, owner(1)}}}
		again := attach(t, c, half)
		for at := int64(0); at < 16*mib; at += 128 << 10 {
			_, err := again.ReadAt(make([]byte, 128<<10), at)
			ok(t, err)
		}
		idle(c)
		if n := half.bytes.Load() + r.bytes.Load() - before; n != 0 {
			t.Errorf("%d bytes fetched behind what a second reader read", n)
		}
	}
	st = c.Stat()
	// Here and there is no stream.
	rnd := rand.New(rand.NewPCG(1, 2))
	q := &remote{runs: []Run{{0, 32 * mib, true, owner(2)}}}
	e := attach(t, c, q)
	for range 200 {
		_, err := e.ReadAt(make([]byte, 4096), rnd.Int64N(32*mib-4096)&^4095)
		ok(t, err)
	}
	idle(c)
	if n := c.Stat().ReadAheadBytes - st.ReadAheadBytes; n > 2*firstWindow {
		t.Errorf("random reads caused %d bytes of read-ahead", n)
	}
	// A stream that ends wastes no more than its window.
	x := &remote{runs: []Run{{0, 32 * mib, true, owner(3)}}}
	f := attach(t, c, x)
	for at := int64(0); at < 4*mib; at += 128 << 10 {
		_, err := f.ReadAt(make([]byte, 128<<10), at)
		ok(t, err)
	}
	idle(c)
	if n := x.bytes.Load(); n > 4*mib+DefaultReadAheadBytes {
		t.Errorf("%d bytes fetched for a stream of 4 MiB", n)
	}
}

// TestDemandFirst has read-ahead wait for a reader that wants something else.
func TestDemandFirst(t *testing.T) {
	c := openCache(t, Options{Dir: filepath.Join(t.TempDir(), "cache"), SizeBytes: 64 * mib})
	a, b := &remote{runs: []Run{{0, 16 * mib, true, owner(1)}}}, &remote{runs: []Run{{0, 16 * mib, true, owner(2)}}}
	demand := make(chan struct{})
	b.read = func(int64, int) { <-demand }
	var ahead, most atomic.Int64
	a.read = func(_ int64, n int) {
		if n == aheadChunkBytes { // only read-ahead reads so much here
			m := ahead.Add(1)
			most.Store(max(most.Load(), m))
			time.Sleep(2 * time.Millisecond)
			ahead.Add(-1)
		}
	}
	da, db := attach(t, c, a), attach(t, c, b)
	done := make(chan error, 1)
	go func() {
		_, err := db.ReadAt(make([]byte, 4096), 0)
		done <- err
	}()
	for b.calls.Load() == 0 {
		time.Sleep(time.Millisecond)
	}
	readAll(t, da, a, 64<<10)
	if most.Load() > 1 {
		t.Errorf("%d reads of read-ahead at once while a reader waits", most.Load())
	}
	close(demand)
	ok(t, <-done)
}

func TestMetrics(t *testing.T) {
	reg := prometheus.NewPedanticRegistry()
	o := Options{Dir: filepath.Join(t.TempDir(), "cache"), SizeBytes: 16 * mib, Registerer: reg}
	c := openCache(t, o)
	r := image(1, 3*mib)
	readAll(t, attach(t, c, r), r, 4096)
	families, err := reg.Gather()
	ok(t, err)
	found := map[string]float64{}
	for _, f := range families {
		m := f.GetMetric()[0]
		found[f.GetName()] = m.GetCounter().GetValue() + m.GetGauge().GetValue()
	}
	if len(found) != len(metricList) || found["thaw_cache_fetched_bytes_total"] != float64(r.bytes.Load()) || found["thaw_cache_devices"] != 1 {
		t.Error(found)
	}
	ok(t, c.Close())
	openCache(t, o) // and registers again
}

// TestHitsDoNotAllocate holds the hit path to no garbage.
func TestHitsDoNotAllocate(t *testing.T) {
	c := openCache(t, Options{Dir: filepath.Join(t.TempDir(), "cache"), SizeBytes: 16 * mib})
	r := &remote{runs: []Run{{0, 4 * mib, true, owner(1)}}}
	d := attach(t, c, r)
	readAll(t, d, r, mib)
	idle(c)
	p, at := make([]byte, 4096), int64(0)
	if n := testing.AllocsPerRun(1000, func() {
		if _, err := d.ReadAt(p, at); err != nil {
			t.Fatal(err)
		}
		at = (at + 36<<10) % (4*mib - 4096)
	}); n > 0.1 {
		t.Errorf("%v allocations per read", n)
	}
}
