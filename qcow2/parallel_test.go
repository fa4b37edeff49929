package qcow2

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/thaw-project/thaw/kind"
)

// TestParallel runs writers that share clusters, writers that allocate and discard
// whole clusters, readers of everything, and flushes. Each writer alone owns its
// pieces of the disk and knows what they hold. Nobody may ever read what was written
// for another place, which is what a cluster reused too early would show.
func TestParallel(t *testing.T) {
	needQemu(t)
	seed := seedOf(t)
	for _, bits := range []int{12, 16} {
		for _, lazy := range []bool{true, false} {
			t.Run(fmt.Sprintf("bits=%d,lazy=%t", bits, lazy), func(t *testing.T) {
				parallel(t, seed, bits, lazy)
			})
		}
	}
}

func parallel(t *testing.T, seed uint64, bits int, lazy bool) {
	const (
		size    = 4 << 20
		writers = 5
	)
	rounds := 1500
	if testing.Short() {
		rounds = 300
	}
	fx := newFixture(t, newRand(seed), size, 0, CreateOptions{ClusterBits: bits, LazyRefcounts: lazy})
	fx.options.CacheBytes = 1
	i := fx.open(t)
	want := make([]uint64, size/sector) // each element is touched by its owner alone
	var done atomic.Bool
	var work, helpers sync.WaitGroup
	var failed atomic.Pointer[error]
	fail := func(err error) {
		if err != nil {
			failed.CompareAndSwap(nil, &err)
			done.Store(true)
		}
	}
	for w := range writers {
		work.Go(func() { fail(parallelWriter(i, want, seed, w, writers, rounds, &done)) })
	}
	for n := range 2 {
		helpers.Go(func() {
			r := rand.New(rand.NewPCG(seed, uint64(100+n)))
			p := make([]byte, 128<<10)
			for !done.Load() {
				off := r.Int64N(size/sector) * sector
				q := p[:min(int64(len(p)), size-off)]
				if _, err := i.ReadAt(q, off); err != nil {
					fail(err)
					return
				}
				for k := int64(0); k < int64(len(q)); k += sector {
					v, at := binary.LittleEndian.Uint64(q[k:]), int64(binary.LittleEndian.Uint64(q[k+8:]))
					if v != 0 && at != (off+k)/sector || v == 0 && at != 0 {
						fail(fmt.Errorf("sector %d reads as version %d of sector %d", (off+k)/sector, v, at))
						return
					}
				}
			}
		})
	}
	helpers.Go(func() {
		for !done.Load() {
			fail(i.Flush())
		}
	})
	work.Wait()
	done.Store(true)
	helpers.Wait()
	if err := failed.Load(); err != nil {
		t.Fatal(*err)
	}
	for k, v := range want {
		copy(fx.want[k*sector:], versionSector(v, int64(k)))
	}
	if err := verify(i, fx.want, 0, size); err != nil {
		t.Fatal(err)
	}
	if err := i.Close(); err != nil {
		t.Fatal(err)
	}
	qemuAgrees(t, fx.path, fx.want)
}

// parallelWriter owns stripes of 2 KiB in the first half of the disk, so that all
// writers meet in each cluster, and stripes of 256 KiB in the second.
func parallelWriter(i *Image, want []uint64, seed uint64, w, writers, rounds int, done *atomic.Bool) error {
	r := rand.New(rand.NewPCG(seed, uint64(w)))
	half := int64(len(want)) / 2
	for round := 1; round <= rounds && !done.Load(); round++ {
		stripe, base := int64(4), int64(0)
		if r.IntN(2) == 0 {
			stripe, base = 512, half
		}
		stripes := half / stripe
		s := r.Int64N((stripes+int64(writers)-1)/int64(writers))*int64(writers) + int64(w)
		if s >= stripes {
			continue
		}
		first := base + s*stripe
		n := stripe
		if base > 0 {
			part := r.Int64N(stripe)
			first, n = first+part, 1+r.Int64N(stripe-part)
		}
		version := uint64(w)<<32 | uint64(round)
		var err error
		switch r.IntN(4) {
		case 0:
			version = 0
			err = i.Discard(first*sector, n*sector)
		default:
			var data []byte
			for k := first; k < first+n; k++ {
				data = append(data, versionSector(version, k)...)
			}
			_, err = i.WriteAt(data, first*sector)
		}
		if err != nil {
			return err
		}
		for k := first; k < first+n; k++ {
			want[k] = version
		}
		got := make([]byte, n*sector)
		if _, err := i.ReadAt(got, first*sector); err != nil {
			return err
		}
		for k := first; k < first+n; k++ {
			if string(got[(k-first)*sector:(k-first+1)*sector]) != string(versionSector(want[k], k)) {
				return fmt.Errorf("writer %d, round %d: sector %d is not the version %#x just written", w, round, k, version)
			}
		}
	}
	return nil
}

// TestFreedClustersAreReusedOnlyAfterAFlushAndTheReadersOfBefore pins the rule down
// that TestParallel and TestPowerLoss test by chance.
func TestFreedClustersAreReusedOnlyAfterAFlushAndTheReadersOfBefore(t *testing.T) {
	fx := newFixture(t, newRand(1), 1<<20, 0, CreateOptions{LazyRefcounts: true})
	i := fx.open(t)
	defer i.Close()
	data := make([]byte, 65536)
	data[0] = 1
	write := func(c int64) int64 {
		t.Helper()
		if _, err := i.WriteAt(data, c<<16); err != nil {
			t.Fatal(err)
		}
		e, err := i.lookup(c<<16, 1)
		if err != nil || e.class != classData {
			t.Fatal(e, err)
		}
		return e.host
	}
	flush := func() {
		t.Helper()
		if err := i.Flush(); err != nil {
			t.Fatal(err)
		}
	}
	freed := write(0)
	reader := i.epoch.enter()
	if err := i.Discard(0, 65536); err != nil {
		t.Fatal(err)
	}
	if host := write(1); host == freed {
		t.Fatal("reused before a flush")
	}
	flush()
	flush()
	if host := write(2); host == freed {
		t.Fatal("reused under a reader")
	}
	before, err := i.AllocatedBytes()
	if err != nil {
		t.Fatal(err)
	}
	i.epoch.leave(reader)
	flush()
	after, err := i.AllocatedBytes()
	if err != nil {
		t.Fatal(err)
	}
	if after > before-65536+8192 {
		t.Errorf("the file occupies %d bytes after the discard, %d before: nothing was punched", after, before)
	}
	if host := write(3); host != freed {
		t.Fatalf("the freed cluster at %d is not reused: %d", freed, host)
	}
}

func TestSequentialWritesAreContiguousInTheFile(t *testing.T) {
	fx := newFixture(t, newRand(1), 64<<20, 0, CreateOptions{LazyRefcounts: true})
	i := fx.open(t)
	defer i.Close()
	for off := int64(0); off < 64<<20; off += 96 << 10 {
		if _, err := i.WriteAt(make([]byte, min(96<<10, 64<<20-off)), off); err != nil {
			t.Fatal(err)
		}
	}
	runs := 0
	for off := int64(0); off < 64<<20; {
		e, err := i.lookup(off, 64<<20-off)
		if err != nil {
			t.Fatal(err)
		}
		off += e.bytes
		runs++
	}
	// A lookup ends with its slice of 512 entries.
	if runs != 2 {
		t.Fatalf("64 MiB written in order lie in %d runs", runs)
	}
}

func TestReadHitAllocatesNothing(t *testing.T) {
	fx := newFixture(t, newRand(1), 1<<20, 0, CreateOptions{})
	i := fx.open(t)
	defer i.Close()
	p := make([]byte, 8192)
	if _, err := i.WriteAt(p, 61440); err != nil {
		t.Fatal(err)
	}
	if n := testing.AllocsPerRun(100, func() {
		if _, err := i.ReadAt(p, 61440); err != nil {
			t.Fatal(err)
		}
	}); n != 0 {
		t.Errorf("a read allocates %v times", n)
	}
	if n := testing.AllocsPerRun(100, func() {
		if _, err := i.WriteAt(p, 61440); err != nil {
			t.Fatal(err)
		}
	}); n != 0 {
		t.Errorf("a write in place allocates %v times", n)
	}
}

// TestBounds: what reaches past the disk is refused, as bdev.Device says.
func TestBounds(t *testing.T) {
	fx := newFixture(t, newRand(1), 1<<20, 0, CreateOptions{})
	i := fx.open(t)
	p := make([]byte, 1024)
	for name, err := range map[string]error{
		"write past the end": func() error { _, err := i.WriteAt(p, 1<<20-512); return err }(),
		"write at -1":        func() error { _, err := i.WriteAt(p, -1); return err }(),
		"read at -1":         func() error { _, err := i.ReadAt(p, -1); return err }(),
		"discard past":       i.Discard(1<<20, 1),
		"zero overflow":      i.WriteZeroes(1, 1<<63-1),
		"negative length":    i.WriteZeroes(1, -1),
	} {
		if !errors.Is(err, kind.Invalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if n, err := i.ReadAt(p, 1<<20-512); n != 512 || err == nil || err.Error() != "EOF" {
		t.Errorf("read over the end: %d, %v", n, err)
	}
	if err := i.Close(); err != nil {
		t.Fatal(err)
	}
	if left, _ := filepath.Glob(filepath.Dir(fx.path) + "/*"); len(left) != 1 {
		t.Errorf("Close left %v", left)
	}
}
