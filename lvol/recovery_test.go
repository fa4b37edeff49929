package lvol

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/lvol/device"
)

// crashPool is a pool on a Crash device.
func crashPool(t *testing.T, change func(*Options)) (*Store, *device.Crash) {
	dev := device.NewCrash(16 << 20)
	o := Options{Dir: filepath.Join(fastDir(t), "pool"), FlushInterval: -1, BallastBytes: -1}
	o.OpenDevice = func() (device.Device, error) { return dev, nil }
	if change != nil {
		change(&o)
	}
	ok(t, Create(CreateOptions{Dir: o.Dir, OpenDevice: o.OpenDevice}))
	s, err := Open(o)
	ok(t, err)
	t.Cleanup(func() { s.Close() })
	return s, dev
}

// powerLoss opens what a power loss would leave of s now.
func powerLoss(t *testing.T, s *Store, dev *device.Crash, seed uint64) *Store {
	t.Helper()
	image := device.FromImage(dev.Image(seed))
	o := s.o
	o.Dir = copyDir(t, s.o.Dir, true)
	o.OpenDevice = func() (device.Device, error) { return image, nil }
	n, err := Open(o)
	ok(t, err)
	t.Cleanup(func() { n.Close() })
	return n
}

// TestFlushDuringOverwrite flushes while an overwrite in place, of a cluster that no
// flush has seen, is on its way to the device: the flush makes the cluster durable
// with its old checksums, so it must also mark its page open.
func TestFlushDuringOverwrite(t *testing.T) {
	for seed := range uint64(20) {
		s, dev := crashPool(t, nil)
		must[Info](t)(s.Create("a", 1<<20))
		l := openLvol(t, s, "a", false)
		write(t, l, 0, pattern(1, 65536))
		dev.OnOp = func(what device.Op, _ int) {
			if what == device.OpWrite {
				dev.OnOp = nil
				ok(t, s.Flush())
			}
		}
		write(t, l, 8192, pattern(2, 8192))
		n := powerLoss(t, s, dev, seed)
		read(t, openLvol(t, n, "a", true), 0, 65536)
		wantClean(t, n)
	}
}

// TestStaleRedoSegment puts a redo segment back whose records a flush has made
// durable, as if its removal had failed: they must not be applied over what
// happened since.
func TestStaleRedoSegment(t *testing.T) {
	s, _ := crashPool(t, nil)
	must[Info](t)(s.Create("a", 1<<20))
	l := openLvol(t, s, "a", false)
	write(t, l, 0, pattern(1, 65536))
	write(t, l, 65536, pattern(2, 65536))
	names, _ := filepath.Glob(filepath.Join(s.o.Dir, "redo.*"))
	if len(names) != 1 {
		t.Fatal(names)
	}
	segment, err := os.ReadFile(names[0])
	ok(t, err)
	ok(t, s.Flush())
	must[Info](t)(s.Create("b", 1<<20))
	ok(t, l.Discard(0, 65536))
	ok(t, s.Flush())
	b := openLvol(t, s, "b", false)
	write(t, b, 0, pattern(3, 65536)) // may take the cluster that a gave up
	ok(t, s.Flush())
	kill(s)
	ok(t, os.WriteFile(names[0], segment, 0o600))
	s = openPool(t, s.o.Dir, func(o *Options) { o.OpenDevice = s.o.OpenDevice })
	if !bytes.Equal(read(t, openLvol(t, s, "a", true), 0, 65536), make([]byte, 65536)) {
		t.Fatal("an old record was applied again")
	}
	if !bytes.Equal(read(t, openLvol(t, s, "b", true), 0, 65536), pattern(3, 65536)) {
		t.Fatal("b differs")
	}
	wantClean(t, s)
}

// TestFailedSyncIsFinal: after a failed sync the store takes no more changes, since
// the kernel may have dropped what it could not write; reads go on.
func TestFailedSyncIsFinal(t *testing.T) {
	mem := device.NewMem(16 << 20)
	f := device.NewFault(mem)
	o := Options{Dir: filepath.Join(fastDir(t), "pool"), FlushInterval: -1, BallastBytes: -1}
	o.OpenDevice = func() (device.Device, error) { return f, nil }
	ok(t, Create(CreateOptions{Dir: o.Dir, OpenDevice: o.OpenDevice}))
	s, err := Open(o)
	ok(t, err)
	must[Info](t)(s.Create("a", 1<<20))
	l := openLvol(t, s, "a", false)
	write(t, l, 0, pattern(1, 4096))
	f.Inject(device.Rule{Op: device.OpSync, Count: 1, Err: syscall.EIO})
	wantKind(t, kind.IO, l.Flush())
	wantKind(t, kind.IO, l.Flush())
	_, err = l.WriteAt([]byte("x"), 0)
	wantKind(t, kind.IO, err)
	_, err = s.Create("b", 512)
	wantKind(t, kind.IO, err)
	if !bytes.Equal(read(t, l, 0, 4096), pattern(1, 4096)) {
		t.Fatal("differs")
	}
	ok(t, s.Close())
	s, err = Open(o) // the redo log kept it
	ok(t, err)
	defer s.Close()
	if !bytes.Equal(read(t, openLvol(t, s, "a", true), 0, 4096), pattern(1, 4096)) {
		t.Fatal("differs after reopening")
	}
	wantClean(t, s)
}

// TestFailedWrite: a write that fails, even half way, leaves each sector old or new
// and everything readable.
func TestFailedWrite(t *testing.T) {
	f := device.NewFault(device.NewMem(16 << 20))
	o := Options{Dir: filepath.Join(fastDir(t), "pool"), FlushInterval: -1, BallastBytes: -1}
	o.OpenDevice = func() (device.Device, error) { return f, nil }
	ok(t, Create(CreateOptions{Dir: o.Dir, OpenDevice: o.OpenDevice}))
	s, err := Open(o)
	ok(t, err)
	defer s.Close()
	must[Info](t)(s.Create("a", 1<<20))
	l := openLvol(t, s, "a", false)
	old := pattern(1, 131072)
	write(t, l, 0, old)
	for round := range 2 { // in place before and after a flush
		f.Inject(device.Rule{Op: device.OpWrite, Count: 1, Err: syscall.EIO, Torn: true})
		_, err = l.WriteAt(pattern(2, 65536), 0)
		wantKind(t, kind.IO, err)
		f.Heal()
		got := read(t, l, 0, 131072)
		if !bytes.Equal(got[:32768], pattern(2, 65536)[:32768]) || !bytes.Equal(got[32768:], old[32768:]) {
			t.Fatal("round", round, "neither old nor new")
		}
		ok(t, s.Flush())
	}
	f.Inject(device.Rule{Op: device.OpWrite, Err: syscall.ENOSPC})
	_, err = l.WriteAt(pattern(2, 4096), 1<<19) // a fresh cluster
	wantKind(t, kind.NoSpace, err)
	f.Heal()
	if !bytes.Equal(read(t, l, 1<<19, 4096), make([]byte, 4096)) {
		t.Fatal("a failed write of a fresh cluster shows")
	}
	f.Inject(device.Rule{Op: device.OpRead, Err: syscall.EIO})
	_, err = l.ReadAt(make([]byte, 10), 0)
	wantKind(t, kind.IO, err)
	f.Heal()
	wantClean(t, s)
}

// TestSpuriousPunchFailure: clusters that could not be punched are not taken for
// zeros.
func TestPunchFailure(t *testing.T) {
	f := device.NewFault(device.NewMem(1 << 20))
	o := Options{Dir: filepath.Join(fastDir(t), "pool"), FlushInterval: -1, BallastBytes: -1}
	o.OpenDevice = func() (device.Device, error) { return f, nil }
	ok(t, Create(CreateOptions{Dir: o.Dir, OpenDevice: o.OpenDevice}))
	s, err := Open(o)
	ok(t, err)
	defer s.Close()
	must[Info](t)(s.Create("a", 1<<20))
	l := openLvol(t, s, "a", false)
	write(t, l, 0, pattern(1, 15*65536))
	f.Inject(device.Rule{Op: device.OpPunch, Err: syscall.EIO})
	ok(t, l.Discard(0, 15*65536))
	ok(t, l.Flush())
	for c := range int64(15) {
		write(t, l, c*65536+100, []byte("x"))
	}
	want := make([]byte, 65536)
	want[100] = 'x'
	for c := range int64(15) {
		if !bytes.Equal(read(t, l, c*65536, 65536), want) {
			t.Fatal("old data shows in a fresh cluster")
		}
	}
}

// TestFullFileSystem fills the file system below the pool for real.
func TestFullFileSystem(t *testing.T) {
	dir := t.TempDir()
	if err := unix.Mount("thaw-test", dir, "tmpfs", 0, "size=24m"); err != nil {
		t.Skipf("mount tmpfs: %v; run as root in a mount namespace of your own", err)
	}
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	pool := filepath.Join(dir, "pool")
	ok(t, Create(CreateOptions{Dir: pool, CapacityBytes: 256 << 20})) // far more than there is
	s := openPool(t, pool, func(o *Options) { o.BallastBytes = 1 << 20 })
	for _, n := range []string{"keep", "fill", "fill2"} {
		must[Info](t)(s.Create(n, 128<<20))
	}
	keep, fill, fill2 := openLvol(t, s, "keep", false), openLvol(t, s, "fill", false), openLvol(t, s, "fill2", false)
	write(t, keep, 0, pattern(1, 1<<20))
	ok(t, keep.Flush())
	write(t, fill2, 0, pattern(2, 2<<20))
	var err error
	written := int64(0)
	for off := int64(0); err == nil; off += 65536 {
		if _, err = fill.WriteAt(pattern(3, 65536), off); err == nil {
			written++
		}
	}
	wantKind(t, kind.NoSpace, err)
	if written < 64 {
		t.Fatal("full after", written, "clusters")
	}
	// Another program takes the last bytes too.
	hog, herr := os.Create(filepath.Join(dir, "hog"))
	ok(t, herr)
	for herr == nil {
		_, herr = hog.Write(make([]byte, 4096))
	}
	hog.Close()
	if !bytes.Equal(read(t, keep, 0, 1<<20), pattern(1, 1<<20)) {
		t.Fatal("reads of another lvol differ")
	}
	_, err = keep.WriteAt(pattern(4, 65536), 64<<20)
	wantKind(t, kind.NoSpace, err)
	// A process that dies now and its successor must get out of it too.
	kill(s)
	s = openPool(t, pool, func(o *Options) { o.BallastBytes = 1 << 20 })
	if !bytes.Equal(read(t, openLvol(t, s, "fill2", true), 0, 2<<20), pattern(2, 2<<20)) {
		t.Fatal("acknowledged write lost")
	}
	ok(t, s.Delete("fill"))
	keep = openLvol(t, s, "keep", false)
	write(t, keep, 64<<20, pattern(4, 65536))
	ok(t, keep.Flush())
	ok(t, keep.Close())
	s = reopen(t, s)
	keep = openLvol(t, s, "keep", true)
	if !bytes.Equal(read(t, keep, 0, 1<<20), pattern(1, 1<<20)) || !bytes.Equal(read(t, keep, 64<<20, 65536), pattern(4, 65536)) {
		t.Fatal("differs after reopening")
	}
	wantClean(t, s)
}

// TestSIGKILL starts a process that writes and tells what was acknowledged, kills
// it at a random moment, and looks whether that is there. Nothing is ever flushed
// by the writer.
func TestSIGKILL(t *testing.T) {
	if os.Getenv("LVOL_TEST_CHILD") != "" {
		childWrites(os.Getenv("LVOL_TEST_CHILD"))
		return
	}
	dir := filepath.Join(t.TempDir(), "pool")
	ok(t, Create(CreateOptions{Dir: dir, CapacityBytes: 64 << 20}))
	s := openPool(t, dir, nil)
	must[Info](t)(s.Create("a", childSlots*4096))
	ok(t, s.Close())
	latest := make([]uint64, childSlots) // by slot: the last acknowledged value
	started := make([]uint64, childSlots)
	next := uint64(1)
	for _, seed := range seeds(t, 15) {
		r := rand.New(rand.NewPCG(seed, 5))
		cmd := exec.Command(os.Args[0], "-test.run=^TestSIGKILL$")
		cmd.Env = append(os.Environ(), "LVOL_TEST_CHILD="+dir, fmt.Sprint("LVOL_TEST_NEXT=", next), fmt.Sprint("LVOL_TEST_SEED=", seed))
		out, err := cmd.StdoutPipe()
		ok(t, err)
		ok(t, cmd.Start())
		timer := time.AfterFunc(time.Duration(50+r.IntN(400))*time.Millisecond, func() { cmd.Process.Kill() })
		lines := bufio.NewScanner(out)
		acked := 0
		for lines.Scan() {
			var what string
			var slot int
			var value uint64
			if n, _ := fmt.Sscanf(lines.Text(), "%s %d %d", &what, &slot, &value); n != 3 {
				continue
			}
			if what == "start" {
				started[slot] = value
			} else {
				latest[slot] = value
				acked++
			}
			next = value + 1
		}
		timer.Stop()
		cmd.Wait()
		s := openPool(t, dir, nil)
		l := openLvol(t, s, "a", true)
		for slot := range latest {
			got := read(t, l, int64(slot)*4096, 4096)
			v := binary.LittleEndian.Uint64(got)
			if v != latest[slot] && v != started[slot] {
				t.Fatalf("seed %d: slot %d holds %d; acknowledged was %d, begun %d (of %d acknowledged)", seed, slot, v, latest[slot], started[slot], acked)
			}
			if v != 0 && !bytes.Equal(got, childBlock(v)) && !(v == started[slot] || v == latest[slot]) {
				t.Fatalf("seed %d: slot %d is torn", seed, slot)
			}
			latest[slot] = v
		}
		wantClean(t, s)
		ok(t, s.Close())
	}
}

const childSlots = 2048

func childBlock(v uint64) []byte {
	p := make([]byte, 4096)
	for i := 0; i < len(p); i += 8 {
		binary.LittleEndian.PutUint64(p[i:], v)
	}
	return p
}

func childWrites(dir string) {
	s, err := Open(Options{Dir: dir, FlushInterval: 20 * time.Millisecond})
	if err != nil {
		fmt.Println("open", err)
		os.Exit(1)
	}
	l, err := s.OpenLvol("a", false)
	if err != nil {
		fmt.Println("open", err)
		os.Exit(1)
	}
	next, _ := strconv.ParseUint(os.Getenv("LVOL_TEST_NEXT"), 10, 64)
	seed, _ := strconv.ParseUint(os.Getenv("LVOL_TEST_SEED"), 10, 64)
	r := rand.New(rand.NewPCG(seed, 6))
	for v := next; ; v++ {
		slot := r.IntN(childSlots)
		fmt.Printf("start %d %d\n", slot, v)
		if _, err := l.WriteAt(childBlock(v), int64(slot)*4096); err != nil {
			fmt.Println("write", err)
			os.Exit(1)
		}
		fmt.Printf("acked %d %d\n", slot, v)
	}
}

func TestLongChain(t *testing.T) {
	s := newPool(t, 64<<20, 16<<10, nil)
	const depth = 128
	must[Info](t)(s.Create("top", 4<<20))
	l := openLvol(t, s, "top", false)
	want := make([]byte, 4<<20)
	r := rand.New(rand.NewPCG(1, 1))
	for i := range depth {
		off := r.Int64N(4<<20 - 20000)
		p := pattern(uint64(i), 20000)
		write(t, l, off, p)
		copy(want[off:], p)
		must[Info](t)(s.Snapshot("top", fmt.Sprintf("s%03d", i)))
	}
	s = reopen(t, s)
	l = openLvol(t, s, "top", false)
	if !bytes.Equal(read(t, l, 0, 4<<20), want) {
		t.Fatal("differs at the end of the chain")
	}
	if n := testing.AllocsPerRun(100, func() { l.ReadAt(want[:65536], 4096) }); n > 0 {
		t.Fatalf("%v allocations in an aligned read", n)
	}
	for _, i := range r.Perm(depth) { // in any order: clusters move to the child
		ok(t, s.Delete(fmt.Sprintf("s%03d", i)))
	}
	if !bytes.Equal(read(t, l, 0, 4<<20), read(t, openLvol(t, reopenCopy(t, s), "top", true), 0, 4<<20)) {
		t.Fatal("differs after the chain's end")
	}
	wantClean(t, s)
}

// reopenCopy opens a copy of the pool's files.
func reopenCopy(t *testing.T, s *Store) *Store {
	t.Helper()
	ok(t, s.Flush())
	dir := copyDir(t, s.o.Dir, false)
	in, err := os.Open(filepath.Join(s.o.Dir, "data"))
	ok(t, err)
	defer in.Close()
	out, err := os.Create(filepath.Join(dir, "data"))
	ok(t, err)
	_, err = io.Copy(out, in)
	ok(t, err)
	ok(t, out.Close())
	return openPool(t, dir, nil)
}

func TestReadAllocatesNothing(t *testing.T) {
	s := newPool(t, 64<<20, 0, nil)
	must[Info](t)(s.Create("a", 8<<20))
	l := openLvol(t, s, "a", false)
	write(t, l, 0, pattern(1, 8<<20))
	must[Info](t)(s.Snapshot("a", "s"))
	for _, l := range []*Lvol{l, openLvol(t, s, "s", true)} {
		p := make([]byte, 128<<10)
		if n := testing.AllocsPerRun(100, func() { l.ReadAt(p, 1<<20) }); n > 0 {
			t.Fatalf("%v allocations", n)
		}
	}
}

func TestReadOnlyStore(t *testing.T) {
	s := newPool(t, 16<<20, 0, nil)
	must[Info](t)(s.Create("a", 1<<20))
	l := openLvol(t, s, "a", false)
	write(t, l, 0, pattern(1, 100000))
	kill(s)
	before := snapshotDir(t, s.o.Dir)
	for range 2 {
		ro := openPool(t, s.o.Dir, func(o *Options) { o.ReadOnly = true })
		l := openLvol(t, ro, "a", true)
		if !bytes.Equal(read(t, l, 0, 100000), pattern(1, 100000)) {
			t.Fatal("acknowledged write not seen")
		}
		_, err := ro.OpenLvol("a", false)
		wantKind(t, kind.ReadOnly, err)
		_, err = ro.Create("b", 512)
		wantKind(t, kind.ReadOnly, err)
		r, err := ro.Check(context.Background(), CheckOptions{Scrub: true})
		ok(t, err)
		for _, p := range r.Problems {
			if p.Type != ProblemLeak { // leftovers of the dead process are expected
				t.Fatalf("%+v", p)
			}
		}
		ok(t, ro.Close())
	}
	if after := snapshotDir(t, s.o.Dir); before != after {
		t.Fatalf("a read-only open changed files:\n%s\n%s", before, after)
	}
}

func snapshotDir(t *testing.T, dir string) string {
	var b strings.Builder
	entries, err := os.ReadDir(dir)
	ok(t, err)
	for _, e := range entries {
		p, err := os.ReadFile(filepath.Join(dir, e.Name()))
		ok(t, err)
		fmt.Fprintf(&b, "%s %d %x\n", e.Name(), len(p), sealSum('T', nil, p))
	}
	return b.String()
}
