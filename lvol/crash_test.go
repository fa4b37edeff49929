package lvol

import (
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/thaw-project/thaw/lvol/device"
)

// moment is a pool as it was in the middle of an operation.
type moment struct {
	dir     string // copies of meta.db and redo.N
	image   []byte // of the device
	power   bool   // power loss rather than the death of the process
	before  *model // what was acknowledged
	op      op     // what was under way
	at      string
	devSeed uint64
}

// copyDir copies meta.db, and what only a dead process leaves behind: redo.N.
func copyDir(t *testing.T, from string, power bool) string {
	to := fastDir(t)
	entries, err := os.ReadDir(from)
	ok(t, err)
	for _, e := range entries {
		if e.Name() != "meta.db" && (power || !strings.HasPrefix(e.Name(), "redo.")) {
			continue
		}
		in, err := os.Open(filepath.Join(from, e.Name()))
		ok(t, err)
		out, err := os.Create(filepath.Join(to, e.Name()))
		ok(t, err)
		_, err = io.Copy(out, in)
		ok(t, err)
		in.Close()
		out.Close()
	}
	return to
}

// TestCrash runs random operations on a device that can lose what was not synced,
// stops the world in the middle of some of its accesses, and looks at what a power
// loss or a SIGKILL at that moment would leave. meta.db is committed with fsync and
// by one page, so between commits, which is when the device is used, its file is
// what the power loss leaves; the redo log is lost with the power.
func TestCrash(t *testing.T) {
	for _, seed := range seeds(t, 40) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) { crashRun(t, seed) })
	}
}

func crashRun(t *testing.T, seed uint64) {
	const capacity = 24 << 20
	r := rand.New(rand.NewPCG(seed, 11))
	o := Options{Dir: filepath.Join(fastDir(t), "pool"), FlushInterval: -1, BallastBytes: -1}
	cluster := int64(16<<10) << r.IntN(3)
	if r.IntN(3) == 0 {
		o.MaxDirtyPages, o.MaxOpenPages = 1, 1
	}
	dev := device.NewCrash(capacity)
	o.OpenDevice = func() (device.Device, error) { return dev, nil }
	ok(t, Create(CreateOptions{Dir: o.Dir, ClusterBytes: cluster, OpenDevice: o.OpenDevice}))

	wanted := map[int]bool{}
	for range 5 {
		wanted[r.IntN(250)] = true
	}
	m := newModel()
	var current op
	var moments []moment
	capture := func(at string) {
		power := r.IntN(2) == 0
		c := moment{dir: copyDir(t, o.Dir, power), power: power, before: m.clone(), op: current, at: at, devSeed: r.Uint64()}
		if power {
			c.image = dev.Image(c.devSeed)
		} else {
			c.image = dev.Now()
		}
		moments = append(moments, c)
	}
	dev.OnOp = func(what device.Op, i int) {
		if wanted[i] {
			capture(fmt.Sprintf("access %d, a %s", i, what))
		}
	}
	s, err := Open(o)
	ok(t, err)
	g := newGenerator(seed, 1<<20)
	g.crash = true
	if r.IntN(4) == 0 {
		g.maxBytes = 5 << 20
	}
	for range 70 {
		current = g.op(m)
		if len(m.lvols) > 4 && (current.verb == "create" || current.verb == "clone" || current.verb == "snapshot") {
			continue
		}
		if current.verb == "reopen" {
			if current.cut {
				kill(s)
			} else {
				ok(t, s.Close())
			}
			s, err = Open(o)
			ok(t, err)
			m.apply(current)
			m.flushed() // opening makes durable what it finds
			continue
		}
		applyStore(s, current)
		m.apply(current)
	}
	current = op{verb: "nothing"}
	capture("the end")
	dev.OnOp = nil
	if err := m.compare(s, true); err != nil {
		t.Fatalf("without a crash: %v", err)
	}
	kill(s)
	for _, c := range moments {
		checkMoment(t, c, o)
	}
}

// checkMoment opens the pool as it was left and looks for what must be there.
func checkMoment(t *testing.T, c moment, o Options) {
	t.Helper()
	where := fmt.Sprintf("at %s during %v (power loss %v, device seed %d)", c.at, c.op, c.power, c.devSeed)
	if c.power {
		// The kernel died too: redo segments are another boot's, or gone.
		old, err := filepath.Glob(filepath.Join(c.dir, "redo.*"))
		ok(t, err)
		for _, p := range old {
			ok(t, os.Remove(p))
		}
	}
	dev := device.FromImage(c.image)
	o.Dir = c.dir
	o.OpenDevice = func() (device.Device, error) { return dev, nil }
	s, err := Open(o)
	if err != nil {
		t.Fatalf("open %s: %v", where, err)
	}
	defer func() { s.Close() }()
	after := c.before.clone()
	after.apply(c.op)
	errBefore := c.before.compare(s, !c.power)
	if errBefore != nil {
		// The operation under way may have happened, wholly or, if it writes data,
		// for some of its sectors.
		exact := !c.power && c.op.verb != "write" && c.op.verb != "zero" && c.op.verb != "discard"
		if c.power || !exact {
			for name, l := range c.before.lvols {
				if k := after.lvols[name]; k != nil && !c.power && name != c.op.name {
					k.old = map[int64][][]byte{}
				} else if k != nil && c.op.verb == "flush" {
					k.old = l.old
				}
			}
		}
		if !c.power {
			// Everything acknowledged is there; only what this operation touches may
			// be old.
			for name, k := range after.lvols {
				if b := c.before.lvols[name]; b != nil && len(b.data) == len(k.data) {
					k.old = map[int64][][]byte{}
					for off := 0; off < len(k.data); off += 512 {
						if end := min(off+512, len(k.data)); string(b.data[off:end]) != string(k.data[off:end]) {
							k.old[int64(off/512)] = [][]byte{b.data[off:end]}
						}
					}
				}
			}
		}
		if errAfter := after.compare(s, exact); errAfter != nil {
			t.Fatalf("%s: neither before: %v\nnor after: %v", where, errBefore, errAfter)
		}
	}
	wantClean(t, s)
	// What was recovered goes on working, and stays.
	for _, i := range must[[]Info](t)(s.List()) {
		if i.ReadOnly || i.SizeBytes < 20000 {
			continue
		}
		l := openLvol(t, s, i.Name, false)
		write(t, l, 5000, pattern(c.devSeed, 10000))
		ok(t, l.Close())
	}
	ok(t, s.Flush())
	lost := FromCrash(dev, c.devSeed)
	kill(s)
	o.OpenDevice = func() (device.Device, error) { return lost, nil }
	if s, err = Open(o); err != nil {
		t.Fatalf("open again %s: %v", where, err)
	}
	for _, i := range must[[]Info](t)(s.List()) {
		if i.ReadOnly || i.SizeBytes < 20000 {
			continue
		}
		l := openLvol(t, s, i.Name, true)
		if got := read(t, l, 5000, 10000); string(got) != string(pattern(c.devSeed, 10000)) {
			t.Fatalf("%s: %s lost what was flushed after recovery", where, i.Name)
		}
		ok(t, l.Close())
	}
	wantClean(t, s)
}

// FromCrash is dev after a power loss.
func FromCrash(dev *device.Crash, seed uint64) *device.Crash {
	return device.FromImage(dev.Image(seed))
}
