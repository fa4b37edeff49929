package cache

import (
	"bytes"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/lvol/device"
)

var (
	seedFlag  = flag.Uint64("seed", 0, "seed of the random tests; 0 picks one")
	roundFlag = flag.Int("rounds", 0, "rounds of the random tests; 0 is the default of each")
)

// seeds returns the seeds of a random test and says how to run one again.
func seeds(t *testing.T, rounds int) []uint64 {
	if *seedFlag != 0 {
		return []uint64{*seedFlag}
	}
	if *roundFlag != 0 {
		rounds = *roundFlag
	}
	first := rand.Uint64N(1<<40) + 1
	t.Logf("seeds %d to %d; repeat one with -run %s -args -seed N", first, first+uint64(rounds)-1, t.Name())
	list := make([]uint64, rounds)
	for i := range list {
		list[i] = first + uint64(i)
	}
	return list
}

func ok(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// content fills p with what an owner has at off: the same wherever it is seen.
func content(owner [16]byte, p []byte, off int64) {
	if owner == ([16]byte{}) {
		clear(p)
		return
	}
	seed := binary.LittleEndian.Uint64(owner[:])
	for i := range p {
		at := uint64(off) + uint64(i)
		x := (seed ^ at>>3) * 0x9e3779b97f4a7c15
		x ^= x >> 31
		p[i] = byte(x * 0xbf58476d1ce4e5b9 >> (8 * (at & 7)))
	}
}

func owner(n int) (o [16]byte) {
	binary.LittleEndian.PutUint64(o[:], uint64(n)*0x1234567+1)
	return o
}

// remote is a device on another machine: what its runs say, faults, and counts.
type remote struct {
	runs []Run
	// private is whose data is in runs of nobody.
	private [16]byte
	fault   func(off int64, n int) (got int, err error) // nil, or got < n makes it short
	read    func(off int64, n int)                      // called before each read

	bytes, calls atomic.Int64
	closed       atomic.Bool
}

func (r *remote) SizeBytes() int64 {
	last := r.runs[len(r.runs)-1]
	return last.OffsetBytes + last.LengthBytes
}

func (r *remote) fill(p []byte, off int64) {
	for _, x := range r.runs {
		from, to := max(off, x.OffsetBytes), min(off+int64(len(p)), x.OffsetBytes+x.LengthBytes)
		if from >= to {
			continue
		}
		o := x.Owner
		if x.Data && o == ([16]byte{}) {
			o = r.private
		}
		content(o, p[from-off:to-off], from)
	}
}

func (r *remote) ReadAt(p []byte, off int64) (int, error) {
	if r.closed.Load() {
		return 0, kind.Errorf(kind.Unavailable, "the remote is closed")
	}
	if off < 0 || off+int64(len(p)) > r.SizeBytes() {
		return 0, kind.Errorf(kind.Invalid, "read of %d at %d of %d", len(p), off, r.SizeBytes())
	}
	r.calls.Add(1)
	r.bytes.Add(int64(len(p)))
	if r.read != nil {
		r.read(off, len(p))
	}
	if r.fault != nil {
		if n, err := r.fault(off, len(p)); n < len(p) || err != nil {
			r.fill(p[:n], off)
			return n, err
		}
	}
	r.fill(p, off)
	return len(p), nil
}

func (r *remote) Close() error {
	if r.closed.Swap(true) {
		return errors.New("closed twice")
	}
	return nil
}

func (r *remote) WriteAt([]byte, int64) (int, error) { panic("written") }
func (r *remote) Flush() error                       { panic("flushed") }
func (r *remote) Discard(int64, int64) error         { panic("discarded") }
func (r *remote) WriteZeroes(int64, int64) error     { panic("zeroed") }
func (r *remote) ReadOnly() bool                     { return true }

// disks are the files of a cache as devices that can fail and lose.
type disks struct {
	data, index *device.Crash
	faults      [2]*device.Fault
}

func newDisks(sizeBytes int64, unit int) *disks {
	slots := sizeBytes / int64(unit)
	index := (headerBytes + slots*int64(recordBytes(unit)) + 511) &^ 511
	return (&disks{data: device.NewCrash(sizeBytes), index: device.NewCrash(index)}).wrap()
}

func (d *disks) wrap() *disks {
	d.faults = [2]*device.Fault{device.NewFault(d.data), device.NewFault(d.index)}
	return d
}

// open is Options.openFile.
func (d *disks) open(name string, _ int64) (file, error) {
	if name == "data" {
		return d.faults[0], nil
	}
	return d.faults[1], nil
}

// after is the disks after a crash: of the machine, or only of the process.
func (d *disks) after(power bool, r *rand.Rand) *disks {
	n := &disks{}
	if power {
		n.data, n.index = device.FromImage(d.data.Image(r.Uint64())), device.FromImage(d.index.Image(r.Uint64()))
	} else {
		n.data, n.index = device.FromImage(d.data.Now()), device.FromImage(d.index.Now())
	}
	return n.wrap()
}

// chain makes the runs of a random image: what it owns itself lies over a base that
// others share. Everything is a multiple of cluster, but for the end.
func chain(r *rand.Rand, base, top int, sizeBytes, cluster int64) []Run {
	var runs []Run
	shared := rand.New(rand.NewPCG(uint64(base), 1)) // the base's runs are the same for all
	for at := int64(0); at < sizeBytes; {
		n := min((shared.Int64N(12)+1)*cluster, sizeBytes-at)
		x := Run{OffsetBytes: at, LengthBytes: n, Data: true, Owner: owner(base)}
		switch shared.IntN(5) {
		case 0:
			x.Data, x.Owner = false, [16]byte{}
		}
		switch r.IntN(6) {
		case 0:
			x.Data, x.Owner = true, owner(top)
		case 1:
			if r.IntN(3) == 0 {
				x.Data, x.Owner = true, [16]byte{} // nobody's
			}
		}
		runs = append(runs, x)
		at += n
	}
	return runs
}

// world is a cache with devices that are read and checked.
type world struct {
	t       *testing.T
	r       *rand.Rand
	o       Options
	disks   *disks
	c       *Cache
	remotes []*remote
	devices []*Device
	broken  atomic.Bool // remotes may fail
	now     atomic.Int64
	cluster int64
	next    int
}

func (w *world) open() {
	w.o.openFile = w.disks.open
	c, err := Open(w.o)
	if errors.Is(err, syscall.EIO) || errors.Is(err, syscall.ENOSPC) { // injected: nothing can be kept
		w.heal()
		c, err = Open(w.o)
	}
	if err != nil {
		w.t.Fatal(err)
	}
	w.c = c
	w.devices = nil
	for _, r := range w.remotes {
		r.closed.Store(false)
		w.attach(r)
	}
}

func (w *world) attach(r *remote) {
	d, err := w.c.Device(r, Map{Domain: "store", Runs: r.runs})
	if err != nil {
		w.t.Fatal(err)
	}
	w.devices = append(w.devices, d)
}

func (w *world) add() {
	size := (w.r.Int64N(3<<20/512) + 1) * 512
	w.next++
	x := &remote{runs: chain(w.r, w.r.IntN(2)+1, 10+w.next, size, w.cluster), private: owner(1000 + w.next)}
	var calls atomic.Uint64
	x.fault = func(_ int64, n int) (int, error) {
		if !w.broken.Load() {
			return n, nil
		}
		switch calls.Add(1) % 4 {
		case 0:
			return 0, kind.Errorf(kind.Unavailable, "injected")
		case 1:
			return n / 2, nil
		case 2:
			return n / 3, io.ErrUnexpectedEOF
		}
		return n, nil
	}
	w.remotes = append(w.remotes, x)
	w.attach(x)
}

// readers reads from all devices at once.
func (w *world) readers() {
	var wg sync.WaitGroup
	for i := range 4 {
		seed := w.r.Uint64()
		wg.Go(func() {
			r := rand.New(rand.NewPCG(seed, 2))
			k := r.IntN(len(w.devices))
			at := int64(0)
			for range 30 {
				if r.IntN(3) == 0 {
					k, at = r.IntN(len(w.devices)), r.Int64N(w.devices[k].SizeBytes())
				}
				n := []int{1, 512, 4096, 16 << 10, 100001, 300 << 10}[r.IntN(6)]
				at = min(at, w.devices[k].SizeBytes())
				if err := w.check(k, at, n); err != nil {
					w.t.Errorf("reader %d: %v", i, err)
					return
				}
				at += int64(n)
			}
		})
	}
	wg.Wait()
}

func (w *world) check(k int, at int64, n int) error {
	d := w.devices[k]
	p, want := make([]byte, n), make([]byte, n)
	for i := range p {
		p[i] = 0xa5
	}
	got, err := d.ReadAt(p, at)
	should := int(min(int64(n), d.SizeBytes()-at))
	switch {
	case err == io.EOF && got == should && got < n:
	case err == nil && got == n:
	case err != nil && err != io.EOF && w.broken.Load():
	default:
		return fmt.Errorf("device %d: %d bytes of %d at %d of %d: %v", k, got, n, at, d.SizeBytes(), err)
	}
	w.remotes[k].fill(want[:got], at)
	if !bytes.Equal(p[:got], want[:got]) {
		return fmt.Errorf("device %d: wrong bytes in %d at %d", k, got, at)
	}
	return nil
}

func (w *world) heal() {
	for _, f := range w.disks.faults {
		f.Heal()
	}
	w.now.Add(int64(2 * retryInterval))
}

// event is what happens between rounds of reads.
func (w *world) event() string {
	what := w.r.IntN(12)
	switch what {
	case 0:
		ok(w.t, w.c.Close())
		w.open()
		return "reopened"
	case 1, 2:
		power := what == 1
		left := w.disks.after(power, w.r)
		ok(w.t, w.c.Close())
		w.disks = left
		w.open()
		return fmt.Sprintf("crashed, power %v", power)
	case 3:
		f := w.disks.faults[w.r.IntN(2)]
		rule := device.Rule{Op: []device.Op{device.OpRead, device.OpWrite, device.OpPunch}[w.r.IntN(3)], Err: syscall.EIO, After: w.r.IntN(20), Count: w.r.IntN(5), Torn: w.r.IntN(2) == 0}
		if w.r.IntN(2) == 0 {
			rule.Err = syscall.ENOSPC
		}
		f.Inject(rule)
		return fmt.Sprintf("fault %+v", rule)
	case 4, 5:
		w.heal()
		return "healed"
	case 6:
		w.broken.Store(!w.broken.Load())
		return "remotes broken or not"
	case 7:
		_, _ = w.c.Prune(w.r.Int64N(w.o.SizeBytes))
		return "pruned"
	case 8:
		if len(w.devices) > 5 {
			i := w.r.IntN(len(w.devices))
			ok(w.t, w.devices[i].Close())
			w.devices = slices.Delete(w.devices, i, i+1)
			w.remotes = slices.Delete(w.remotes, i, i+1)
			return "device closed"
		}
		w.add()
		return "device added"
	}
	return "nothing"
}

// TestModel reads concurrently through small caches over random images that share
// bases, while disk and remotes fail, the cache is closed, killed and loses power, and
// holds every byte to what it must be.
func TestModel(t *testing.T) {
	for _, seed := range seeds(t, 12) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) { modelRun(t, seed) })
	}
}

func modelRun(t *testing.T, seed uint64) {
	r := rand.New(rand.NewPCG(seed, 1))
	unit := int64(4<<10) << (2 * r.IntN(3))
	size := unit * (16 + r.Int64N(60))
	if r.IntN(4) == 0 { // many shards
		unit = 4 << 10
		size = unit * manyShards * groupUnits * 8
	}
	w := &world{t: t, r: r, cluster: 4 << 10 << r.IntN(5), disks: newDisks(size, int(unit))}
	w.o = Options{Dir: filepath.Join(t.TempDir(), "cache"), SizeBytes: size, UnitBytes: unit, Now: w.clock}
	if r.IntN(3) == 0 {
		w.o.ReadAheadBytes = -1
	}
	w.open()
	defer func() { w.c.Close() }()
	w.add()
	w.add()
	for round := range 25 {
		what := w.event()
		w.readers()
		if t.Failed() {
			t.Fatalf("seed %d, round %d, after: %s", seed, round, what)
		}
		wantSound(t, w.c)
	}
}

func (w *world) clock() time.Time { return time.Unix(0, w.now.Load()+1) }

// wantSound holds the index to what it must be when nobody reads.
func wantSound(t *testing.T, c *Cache) {
	t.Helper()
	idle(c)
	for n, s := range c.shards {
		if err := s.sound(); err != nil {
			t.Fatalf("shard %d: %v", n, err)
		}
	}
}

// sound reports what is wrong with a shard that nobody uses.
func (s *shard) sound() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	lists := make([]uint8, len(s.slots))
	for _, q := range []*fifo{&s.free, &s.small, &s.main} {
		i := q.head
		for range q.n {
			if lists[i]++; lists[i] > 1 {
				return fmt.Errorf("slot %d is in two lists, or twice in one", i)
			}
			i = s.slots[i].link
		}
	}
	valid, total := 0, int64(0)
	for i, e := range s.slots {
		want := uint8(1)
		if uint32(i) >= s.fresh {
			want = 0
		}
		if lists[i] != want || e.readers != 0 {
			return fmt.Errorf("slot %d is in %d lists and has %d readers", i, lists[i], e.readers)
		}
		if e.state() != slotValid {
			continue
		}
		valid++
		total += int64(e.sectors) * sector
		if s.find(e.key) != uint32(i) {
			return fmt.Errorf("slot %d is not in the table", i)
		}
	}
	if int64(valid) != s.count.valid || total != s.count.bytes || len(s.flights) != 0 {
		return fmt.Errorf("it counts %d slots, %d bytes, and has %d, %d; %d flights", s.count.valid, s.count.bytes, valid, total, len(s.flights))
	}
	return nil
}

// idle waits until no read-ahead is queued or under way.
func idle(c *Cache) {
	for c.pace.tasks.Load() > 0 {
		time.Sleep(time.Millisecond)
	}
}
