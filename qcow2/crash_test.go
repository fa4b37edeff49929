package qcow2

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/thaw-project/thaw/kind"
)

// powerFile is a file in memory that can lose power: what was synced stays, of the rest
// each sector of each write, each change of the length and each punch may have reached
// the disk or not, in any order.
type powerFile struct {
	mu      sync.Mutex
	now     []byte   // guarded by mu: what reads see
	durable []byte   // guarded by mu
	pending []change // guarded by mu: since the last sync
	// fail, if set, is asked before each change and sync.
	fail func(what string) error
}

type change struct {
	what string // write, truncate, punch
	off  int64
	data []byte // of a write
	n    int64  // of a punch
}

const sector = 512

func (f *powerFile) ReadAt(p []byte, off int64) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if off >= int64(len(f.now)) {
		return 0, io.EOF
	}
	n := copy(p, f.now[off:])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (f *powerFile) WriteAt(p []byte, off int64) error { return f.WriteVec([][]byte{p}, off) }

func (f *powerFile) WriteVec(bufs [][]byte, off int64) error {
	return f.change(change{what: "write", off: off, data: bytes.Join(bufs, nil)})
}
func (f *powerFile) Truncate(size int64) error { return f.change(change{what: "truncate", off: size}) }
func (f *powerFile) Punch(off, n int64) error {
	return f.change(change{what: "punch", off: off, n: n})
}

func (f *powerFile) change(c change) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.fail != nil {
		if err := f.fail(c.what); err != nil {
			return err
		}
	}
	f.now = c.apply(f.now)
	f.pending = append(f.pending, c)
	return nil
}

func (c change) apply(b []byte) []byte {
	switch c.what {
	case "write":
		if end := int(c.off) + len(c.data); end > len(b) {
			b = append(b, make([]byte, end-len(b))...)
		}
		copy(b[c.off:], c.data)
	case "truncate":
		if int(c.off) <= len(b) {
			b = b[:c.off:c.off]
		} else {
			b = append(b, make([]byte, int(c.off)-len(b))...)
		}
	case "punch":
		if c.off < int64(len(b)) {
			clear(b[c.off:min(c.off+c.n, int64(len(b)))])
		}
	}
	return b
}

func (f *powerFile) Sync() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.fail != nil {
		if err := f.fail("sync"); err != nil {
			return err
		}
	}
	f.durable = append(f.durable[:0:0], f.now...)
	f.pending = nil
	return nil
}

func (f *powerFile) Stat() (int64, int64, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return int64(len(f.now)), int64(len(f.now)), nil
}

func (f *powerFile) Close() error { return nil }

// crash returns the file after a power loss in which a share of what was not synced
// reached the disk.
func (f *powerFile) crash(r *rand.Rand) *powerFile {
	f.mu.Lock()
	defer f.mu.Unlock()
	share := r.Float64()
	b := append([]byte(nil), f.durable...)
	for _, c := range f.pending {
		if c.what != "write" {
			if r.Float64() < share {
				b = c.apply(b)
			}
			continue
		}
		for at := 0; at < len(c.data); {
			n := min(sector-int((c.off+int64(at))%sector), len(c.data)-at)
			if r.Float64() < share {
				b = change{what: "write", off: c.off + int64(at), data: c.data[at : at+n]}.apply(b)
			}
			at += n
		}
	}
	return &powerFile{now: b, durable: append([]byte(nil), b...)}
}

var errPower = errors.New("the power is off")

// powerOff makes all changes after the next n fail.
func (f *powerFile) powerOff(n int) {
	f.fail = func(string) error {
		if n--; n < 0 {
			return errPower
		}
		return nil
	}
}

// versions is the disk as a set of allowed contents per sector: a sector of version v
// is filled with v and its own number, version 0 with zeros.
type versions struct {
	allowed [][]uint64 // by sector; the last is what a read sees now
	next    uint64
	// unknown are sectors whose newest change failed: a flush settles nothing there.
	unknown map[int64]bool
}

func versionSector(v uint64, sectorNumber int64) []byte {
	b := make([]byte, sector)
	if v != 0 {
		for k := 0; k < sector; k += 16 {
			binary.LittleEndian.PutUint64(b[k:], v)
			binary.LittleEndian.PutUint64(b[k+8:], uint64(sectorNumber))
		}
	}
	return b
}

func (v *versions) flushed() {
	for k, a := range v.allowed {
		if !v.unknown[int64(k)] {
			v.allowed[k] = a[len(a)-1:]
		}
	}
}

// verify reads all and compares; when exact, only the newest version is right. What
// was found becomes the only allowed version.
func (v *versions) verify(d io.ReaderAt, exact bool) error {
	got := make([]byte, len(v.allowed)*sector)
	if _, err := d.ReadAt(got, 0); err != nil && err != io.EOF {
		return err
	}
	for k, allowed := range v.allowed {
		if exact {
			allowed = allowed[len(allowed)-1:]
		}
		is := got[k*sector : (k+1)*sector]
		found := false
		for _, version := range allowed {
			if bytes.Equal(is, versionSector(version, int64(k))) {
				found, v.allowed[k] = true, []uint64{version}
				break
			}
		}
		if !found {
			return fmt.Errorf("sector %d holds %x, allowed are the versions %v", k, is[:16], allowed)
		}
	}
	return nil
}

// step does one random operation on whole sectors.
func (v *versions) step(r *rand.Rand, i *Image, cluster int64) (string, error) {
	o := randomOp(r, int64(len(v.allowed)*sector), cluster, "write write write write zero discard flush")
	first, n := o.off/sector, (o.n+sector-1)/sector
	n = min(n, int64(len(v.allowed))-first)
	what := fmt.Sprintf("%s sectors %d+%d", o.name, first, n)
	if o.name == "flush" {
		if err := i.Flush(); err != nil {
			return what, err
		}
		v.flushed()
		return what, nil
	}
	version := uint64(0)
	if o.name == "write" {
		v.next++
		version = v.next
	}
	var data []byte
	for k := first; k < first+n; k++ {
		v.allowed[k] = append(v.allowed[k], version)
		data = append(data, versionSector(version, k)...)
	}
	var err error
	switch o.name {
	case "write":
		_, err = i.WriteAt(data, first*sector)
	case "zero":
		err = i.WriteZeroes(first*sector, n*sector)
	case "discard":
		err = i.Discard(first*sector, n*sector)
	}
	for k := first; k < first+n; k++ {
		if err != nil {
			v.unknown[k] = true
		} else {
			delete(v.unknown, k)
		}
	}
	return what, err
}

// newVersions makes the versions of a disk over a base, and the base.
func newVersions(size, baseBytes int64) (*versions, []byte) {
	v := &versions{next: 1, unknown: map[int64]bool{}}
	var base []byte
	for k := range size / sector {
		if k*sector < baseBytes && k%7 != 0 {
			v.allowed = append(v.allowed, []uint64{1})
			base = append(base, versionSector(1, k)...)
		} else {
			v.allowed = append(v.allowed, []uint64{0})
			if k*sector < baseBytes {
				base = append(base, make([]byte, sector)...)
			}
		}
	}
	return v, base
}

func emptyPowerFile(t testing.TB, o CreateOptions) *powerFile {
	t.Helper()
	h, err := o.header()
	if err != nil {
		t.Fatal(err)
	}
	f := &powerFile{}
	if err := writeEmpty(f, h); err != nil {
		t.Fatal(err)
	}
	return f
}

// TestPowerLoss: at random moments the file keeps what was synced and a random part of
// the rest. Flushed sectors must hold what was flushed or something newer, others old
// or new, and no sector ever anything that was not written to it.
func TestPowerLoss(t *testing.T) {
	seed := seedOf(t)
	rounds := 60
	if testing.Short() {
		rounds = 10
	}
	for _, c := range []struct {
		bits int
		lazy bool
		base int64
	}{{16, true, 3 << 19}, {16, false, 3 << 19}, {12, true, 1 << 20}, {9, false, 1 << 20}, {9, true, 0}, {12, false, 0}} {
		t.Run(fmt.Sprintf("bits=%d,lazy=%t,base=%d", c.bits, c.lazy, c.base), func(t *testing.T) {
			t.Parallel()
			r := newRand(seed)
			const size = 2 << 20
			v, base := newVersions(size, c.base)
			o := CreateOptions{SizeBytes: size, ClusterBits: c.bits, LazyRefcounts: c.lazy}
			options := OpenOptions{CacheBytes: 1}
			if c.base > 0 {
				o.BackingFile = "base"
				options.Backing, options.BackingSizeBytes = bytes.NewReader(base), c.base
			}
			f := emptyPowerFile(t, o)
			dir := t.TempDir()
			for round := range rounds {
				prefix := filepath.Join(dir, fmt.Sprint(round)) // a redo log of another boot counts for nothing
				i, err := openFile(f, "image", prefix, options)
				if err != nil {
					t.Fatalf("round %d: %v", round, err)
				}
				if err := v.verify(i, false); err != nil {
					t.Fatalf("round %d, after the power loss: %v", round, err)
				}
				if r.IntN(2) == 0 {
					// Loses power inside an operation, a flush perhaps.
					f.powerOff(r.IntN(200))
				}
				for range r.IntN(60) {
					if r.IntN(20) == 0 && f.fail == nil {
						// A kill on the way to the power loss.
						if err := i.log.Close(); err != nil {
							t.Fatal(err)
						}
						if i, err = openFile(f, "image", prefix, options); err != nil {
							t.Fatalf("round %d, after a kill: %v", round, err)
						}
					}
					if what, err := v.step(r, i, 1<<c.bits); errors.Is(err, errPower) {
						break
					} else if err != nil {
						t.Fatalf("round %d, %s: %v", round, what, err)
					}
				}
				if r.IntN(8) == 0 {
					if f.fail == nil {
						f.powerOff(r.IntN(12))
					}
					if i.finish(0) == nil {
						v.flushed()
					}
				}
				i.log.Remove()
				f = f.crash(r)
				checkCrashed(t, f, c.lazy)
			}
			i, err := openFile(f, "image", filepath.Join(dir, "last"), options)
			if err != nil {
				t.Fatal(err)
			}
			if err := v.verify(i, false); err != nil {
				t.Fatal(err)
			}
			if err := i.Close(); err != nil {
				t.Fatal(err)
			}
			if report, err := checkFile(f, filepath.Join(dir, "last")); err != nil || !report.Clean {
				t.Fatalf("%+v, %v", report, err)
			}
		})
	}
}

// checkCrashed: a file after a crash has leaks at most, and with lazy refcounts counts
// that are too low, under the dirty mark.
func checkCrashed(t *testing.T, f *powerFile, lazy bool) {
	t.Helper()
	i, err := load(f, "", OpenOptions{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	var bad []string
	s := i.newScan(func(sev severity, format string, args ...any) {
		if sev == leak || sev == recount && lazy && i.head.dirty() {
			return
		}
		bad = append(bad, fmt.Sprintf(format, args...))
	})
	if err := s.run(); err != nil {
		t.Fatal(err)
	}
	if err := s.compareCounts(); err != nil {
		t.Fatal(err)
	}
	if len(bad) > 0 {
		t.Fatalf("damage after a crash: %s", strings.Join(bad[:min(len(bad), 5)], "; "))
	}
}

// TestQemuRepairsWhatAPowerLossLeaves: qemu-img check -r all must agree with our own
// recovery about the content of a crashed image.
func TestQemuRepairsWhatAPowerLossLeaves(t *testing.T) {
	needQemu(t)
	seed := seedOf(t)
	r := newRand(seed)
	const size = 2 << 20
	for _, lazy := range []bool{true, false} {
		for range 4 {
			v, _ := newVersions(size, 0)
			f := emptyPowerFile(t, CreateOptions{SizeBytes: size, LazyRefcounts: lazy})
			dir := t.TempDir()
			i, err := openFile(f, "image", filepath.Join(dir, "redo"), OpenOptions{})
			if err != nil {
				t.Fatal(err)
			}
			for range 20 + r.IntN(60) {
				if what, err := v.step(r, i, 65536); err != nil {
					t.Fatalf("%s: %v", what, err)
				}
			}
			i.log.Remove()
			f = f.crash(r)
			path := filepath.Join(dir, "crashed.qcow2")
			if err := os.WriteFile(path, f.now, 0o600); err != nil {
				t.Fatal(err)
			}
			if !lazy {
				// Exit status 3 is leaks only.
				out, err := exec.Command("qemu-img", "check", path).CombinedOutput()
				var exit *exec.ExitError
				if err != nil && (!errors.As(err, &exit) || exit.ExitCode() != 3) {
					t.Fatalf("qemu-img check: %v\n%s", err, out)
				}
			}
			// Status 0 once everything is repaired.
			exec.Command("qemu-img", "check", "-q", "-r", "all", path).Run()
			if out := tool(t, "qemu-img", "check", path); !strings.Contains(out, "No errors") {
				t.Fatal(out)
			}
			j, err := Open(path, OpenOptions{})
			if err != nil {
				t.Fatal(err)
			}
			if err := v.verify(j, false); err != nil {
				t.Fatalf("repaired by QEMU: %v", err)
			}
			if err := j.Close(); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// TestFailingFile: each change or sync of the file fails once in some run. The error
// must reach the caller, the image must go on or refuse writes, and what was
// acknowledged must be there after a kill.
func TestFailingFile(t *testing.T) {
	seed := seedOf(t)
	const size = 1 << 20
	step := 2
	if testing.Short() {
		step = 9
	}
	for at := 0; at < 250; at += step {
		r := newRand(seed + uint64(at))
		lazy, bits := r.IntN(2) == 0, []int{9, 12, 16}[r.IntN(3)]
		v, base := newVersions(size, size/2)
		f := emptyPowerFile(t, CreateOptions{SizeBytes: size, ClusterBits: bits, LazyRefcounts: lazy, BackingFile: "base"})
		options := OpenOptions{CacheBytes: 1, Backing: bytes.NewReader(base), BackingSizeBytes: size / 2}
		prefix := filepath.Join(t.TempDir(), "redo")
		i, err := openFile(f, "image", prefix, options)
		if err != nil {
			t.Fatal(err)
		}
		left, failed := at, ""
		f.fail = func(what string) error {
			if left--; left == -1 {
				failed = what
				return kind.Errorf(kind.NoSpace, "injected")
			}
			return nil
		}
		failures := 0
		for range 60 {
			if what, err := v.step(r, i, 1<<bits); err != nil {
				if failures++; failed == "" {
					t.Fatalf("at %d: %s failed before anything did: %v", at, what, err)
				}
				if failed != "sync" && failures > 1 {
					t.Fatalf("at %d: %s fails after a failed %s: %v", at, what, failed, err)
				}
			}
		}
		if failed != "" && failed != "punch" && failures == 0 {
			t.Fatalf("at %d: a failed %s reached nobody", at, failed)
		}
		if err := i.log.Close(); err != nil {
			t.Fatal(err)
		}
		f.fail = nil
		// A failed write is of unknown outcome; everything else is exact. versions
		// allows both for the unacknowledged, and more for the unflushed, so exactness
		// is what the kill test shows; here nothing foreign may appear.
		j, err := openFile(f, "image", prefix, options)
		if err != nil {
			t.Fatalf("at %d, after a failed %s: %v", at, failed, err)
		}
		if err := v.verify(j, false); err != nil {
			t.Fatalf("at %d, after a failed %s: %v", at, failed, err)
		}
		if err := j.Close(); err != nil {
			t.Fatal(err)
		}
		if report, err := checkFile(f, prefix); err != nil || !report.Clean {
			t.Fatalf("at %d, after a failed %s: %+v, %v", at, failed, report, err)
		}
	}
}

// TestPowerLossInsideAFlush loses power at chosen points of one sequence in which the
// file gets new L2 tables, new refcount blocks and at last a larger refcount table.
func TestPowerLossInsideAFlush(t *testing.T) {
	seed := seedOf(t)
	const size = 3 << 20
	stride := 5
	if testing.Short() {
		stride = 41
	}
	for _, lazy := range []bool{false, true} {
		h, err := CreateOptions{SizeBytes: size, ClusterBits: 9, LazyRefcounts: lazy}.header()
		if err != nil {
			t.Fatal(err)
		}
		h.refcountOrder = 6 // one cluster of table covers 2 MiB of file
		start := &powerFile{}
		if err := writeEmpty(start, h); err != nil {
			t.Fatal(err)
		}
		v, _ := newVersions(size, 0)
		dir := t.TempDir()
		i, err := openFile(start, "image", filepath.Join(dir, "redo"), OpenOptions{})
		if err != nil {
			t.Fatal(err)
		}
		fill := func(i *Image, v *versions, first, n int64) error {
			v.next++
			var data []byte
			for k := first; k < first+n; k++ {
				v.allowed[k] = append(v.allowed[k], v.next)
				data = append(data, versionSector(v.next, k)...)
			}
			_, err := i.WriteAt(data, first*sector)
			return err
		}
		if err := fill(i, v, 0, 3600); err != nil {
			t.Fatal(err)
		}
		if err := i.Close(); err != nil {
			t.Fatal(err)
		}
		v.flushed()
		table := i.head.refTableClusters

		for at, ended := int(seed%uint64(stride)), false; !ended; at += stride {
			r := newRand(seed + uint64(at))
			f := &powerFile{now: append([]byte(nil), start.now...), durable: append([]byte(nil), start.now...)}
			now := &versions{next: v.next, unknown: map[int64]bool{}}
			for _, a := range v.allowed {
				now.allowed = append(now.allowed, append([]uint64(nil), a...))
			}
			prefix := filepath.Join(dir, fmt.Sprint(at))
			i, err := openFile(f, "image", prefix, OpenOptions{})
			if err != nil {
				t.Fatal(err)
			}
			f.powerOff(at)
			steps := func() error {
				for k := int64(0); k < 6; k++ {
					if err := fill(i, now, 3600+k*300, 300); err != nil {
						return err
					}
					if err := i.WriteZeroes(k*100*sector, 3*sector); err != nil {
						return err
					}
					for s := k * 100; s < k*100+3; s++ {
						now.allowed[s] = append(now.allowed[s], 0)
					}
					if err := i.Flush(); err != nil {
						return err
					}
					now.flushed()
				}
				return i.finish(0)
			}
			err = steps()
			if err != nil && !errors.Is(err, errPower) {
				t.Fatalf("lazy=%t, power off at change %d: %v", lazy, at, err)
			}
			if ended = err == nil; ended && i.head.refTableClusters == table {
				t.Fatal("the refcount table did not grow: the test misses its point")
			}
			i.log.Remove()
			// WriteZeroes in flight may have reached any of its sectors.
			for k := int64(0); k < 600; k++ {
				if k%100 < 3 {
					now.allowed[k] = append(now.allowed[k], 0)
				}
			}
			f = f.crash(r)
			checkCrashed(t, f, lazy)
			if i, err = openFile(f, "image", prefix, OpenOptions{}); err != nil {
				t.Fatalf("lazy=%t, power off at change %d: %v", lazy, at, err)
			}
			if err := now.verify(i, false); err != nil {
				t.Fatalf("lazy=%t, power off at change %d: %v", lazy, at, err)
			}
			if err := i.Close(); err != nil {
				t.Fatal(err)
			}
			if report, err := checkFile(f, prefix); err != nil || !report.Clean {
				t.Fatalf("lazy=%t, power off at change %d: %+v, %v", lazy, at, report, err)
			}
		}
	}
}
