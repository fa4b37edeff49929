package lvol

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

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
	} else if testing.Short() {
		rounds = max(1, rounds/5)
	}
	first := rand.Uint64N(1<<40) + 1
	t.Logf("seeds %d to %d; repeat one with -run %s -seed N", first, first+uint64(rounds)-1, t.Name())
	list := make([]uint64, rounds)
	for i := range list {
		list[i] = first + uint64(i)
	}
	return list
}

type config struct {
	name    string
	cluster int64
	device  string // file, uring, mem, stale, block
	change  func(*Options)
}

func configs() []config {
	return []config{
		{"64k-file", 64 << 10, "file", nil},
		{"16k-mem", 16 << 10, "mem", nil},
		{"1m-uring", 1 << 20, "uring", func(o *Options) { o.Uring = true }},
		{"4m-mem", 4 << 20, "mem", nil},
		{"64k-mem-tight", 64 << 10, "mem", func(o *Options) { o.MaxDirtyPages, o.MaxRedoBytes, o.MaxOpenPages = 1, 4096, 1 }},
		{"64k-mem-stale", 64 << 10, "stale", nil},
		{"64k-block", 64 << 10, "block", nil},
	}
}

// stale is a device whose punched ranges read as anything, as a disk's may.
type stale struct{ *device.Mem }

func (d stale) ZeroesOnPunch() bool { return false }
func (d stale) Punch(off, length int64) error {
	p := make([]byte, min(length, 64<<10))
	for i := range p {
		p[i] = 0xdb
	}
	for length > 0 {
		n := min(length, int64(len(p)))
		if err := d.WriteAt(p[:n], off); err != nil {
			return err
		}
		off, length = off+n, length-n
	}
	return nil
}

// blockDevice is a loop device full of what somebody left there.
func blockDevice(t *testing.T, sizeBytes int64) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "disk")
	old := make([]byte, 1<<20)
	for i := range old {
		old[i] = byte(i*7 + 1)
	}
	f, err := os.Create(file)
	ok(t, err)
	for range sizeBytes / int64(len(old)) {
		_, err = f.Write(old)
		ok(t, err)
	}
	ok(t, f.Close())
	out, err := exec.Command("losetup", "--find", "--show", file).CombinedOutput()
	if err != nil {
		t.Skipf("needs root and loop devices: losetup: %v: %s", err, out)
	}
	loop := strings.TrimSpace(string(out))
	t.Cleanup(func() {
		if out, err := exec.Command("losetup", "--detach", loop).CombinedOutput(); err != nil {
			t.Errorf("losetup --detach %s: %v: %s", loop, err, out)
		}
	})
	return loop
}

// TestMetamorphic does the same random operations under every configuration; each
// must answer as the model does, whatever its cluster size, device and bounds, and
// whenever it is closed or killed in between.
func TestMetamorphic(t *testing.T) {
	const capacity = 256 << 20
	for _, seed := range seeds(t, 3) {
		g := newGenerator(seed, 6<<20)
		m := newModel()
		var ops []op
		var kinds []kind.Kind
		for range 150 {
			o := g.op(m)
			if len(m.lvols) > 6 && (o.verb == "create" || o.verb == "clone" || o.verb == "snapshot") {
				continue
			}
			ops = append(ops, o)
			kinds = append(kinds, m.apply(o))
		}
		for _, c := range configs() {
			t.Run(fmt.Sprintf("%d/%s", seed, c.name), func(t *testing.T) {
				run(t, seed, c, capacity, ops, kinds)
			})
		}
	}
}

func run(t *testing.T, seed uint64, c config, capacity int64, ops []op, kinds []kind.Kind) {
	dir := filepath.Join(t.TempDir(), "pool")
	if c.device == "mem" || c.device == "stale" {
		dir = filepath.Join(fastDir(t), "pool")
	}
	var dev device.Device
	switch c.device {
	case "mem":
		dev = device.NewMem(capacity)
	case "stale":
		dev = stale{device.NewMem(capacity)}
	}
	o := Options{Dir: dir, FlushInterval: -1, BallastBytes: -1}
	co := CreateOptions{Dir: dir, ClusterBytes: c.cluster, CapacityBytes: capacity}
	if c.device == "block" {
		co.CapacityBytes, co.Device = 0, blockDevice(t, capacity)
	}
	if dev != nil {
		co.OpenDevice = func() (device.Device, error) { return dev, nil }
		o.OpenDevice = co.OpenDevice
	}
	if c.change != nil {
		c.change(&o)
	}
	ok(t, Create(co))
	s, err := Open(o)
	ok(t, err)
	defer func() { s.Close() }()
	m := newModel()
	r := rand.New(rand.NewPCG(seed, 9))
	for i, op := range ops {
		if op.verb == "reopen" {
			if op.cut {
				kill(s)
			} else {
				ok(t, s.Close())
			}
			if s, err = Open(o); err != nil {
				t.Fatalf("op %d %v: %v", i, op, err)
			}
		} else if got := kind.Of(applyStore(s, op)); got != kinds[i] {
			t.Fatalf("op %d %v: kind %q, want %q", i, op, got, kinds[i])
		}
		m.apply(op)
		if r.IntN(8) == 0 {
			if err := m.compare(s, true); err != nil {
				t.Fatalf("after op %d %v: %v", i, op, err)
			}
		}
		if r.IntN(20) == 0 {
			wantClean(t, s)
		}
	}
	if err := m.compare(s, true); err != nil {
		t.Fatalf("at the end: %v", err)
	}
	wantClean(t, s)
	ok(t, s.Close())
	if s, err = Open(o); err != nil {
		t.Fatal(err)
	}
	if err := m.compare(s, true); err != nil {
		t.Fatalf("after reopening: %v", err)
	}
	for len(m.lvols) > 0 { // and all of it can go
		for name, l := range m.lvols {
			if n, _ := m.children(l); n == 0 {
				ok(t, s.Delete(name))
				delete(m.lvols, name)
			}
		}
	}
	if st := s.Stat(); st.FreeClusters != st.TotalClusters {
		t.Fatalf("clusters left: %+v", st)
	}
	wantClean(t, s)
}
