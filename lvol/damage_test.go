package lvol

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"go.etcd.io/bbolt"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/lvol/device"
)

// memPool is a pool on a Mem device.
func memPool(t testing.TB, capacity, cluster int64) (*Store, *device.Mem) {
	mem := device.NewMem(capacity)
	o := Options{Dir: filepath.Join(fastDir(t), "pool"), FlushInterval: -1, BallastBytes: -1}
	o.OpenDevice = func() (device.Device, error) { return mem, nil }
	ok(t, Create(CreateOptions{Dir: o.Dir, ClusterBytes: cluster, OpenDevice: o.OpenDevice}))
	s, err := Open(o)
	ok(t, err)
	t.Cleanup(func() { s.Close() })
	return s, mem
}

func flip(mem *device.Mem, off int64) {
	p := make([]byte, 1)
	mem.ReadAt(p, off)
	p[0] ^= 0x40
	mem.WriteAt(p, off)
}

// TestDamagedBlock: one flipped bit is an error for reads that touch its 4 KiB, for
// the lvol and its clones, and for nothing else; Check finds it; writing the whole
// block heals it.
func TestDamagedBlock(t *testing.T) {
	s, mem := memPool(t, 32<<20, 64<<10)
	must[Info](t)(s.Create("a", 1<<20))
	l := openLvol(t, s, "a", false)
	p := pattern(1, 1<<20)
	write(t, l, 0, p)
	must[Info](t)(s.Snapshot("a", "snap"))
	must[Info](t)(s.Clone("snap", "c"))
	must[Info](t)(s.Create("other", 1<<20))
	phys := l.v.root.Load().page(0).load(3).phys()
	const bad = 3*65536 + 5*4096
	flip(mem, int64(phys)<<16+5*4096+99)
	for _, name := range []string{"a", "snap", "c"} {
		d := openLvol(t, s, name, true)
		for _, r := range [][2]int64{{bad, 4096}, {bad + 4095, 1}, {bad - 10, 20}, {0, 1 << 20}} {
			q := make([]byte, r[1])
			n, err := d.ReadAt(q, r[0])
			wantKind(t, kind.Corrupt, err)
			if want := max(0, bad-r[0]); int64(n) != want || !bytes.Equal(q[:n], p[r[0]:r[0]+want]) {
				t.Fatalf("%s: %d good bytes before the damage, want %d", name, n, want)
			}
			if !strings.Contains(err.Error(), fmt.Sprint(bad)) {
				t.Fatalf("%v does not say where", err)
			}
		}
		if !bytes.Equal(read(t, d, 0, bad), p[:bad]) || !bytes.Equal(read(t, d, bad+4096, 1<<20-bad-4096), p[bad+4096:]) {
			t.Fatal("neighbours differ")
		}
		d.Close()
	}
	r, err := s.Check(context.Background(), CheckOptions{})
	ok(t, err)
	if len(r.Problems) != 0 {
		t.Fatalf("%+v", r.Problems)
	}
	r, err = s.Check(context.Background(), CheckOptions{Scrub: true})
	ok(t, err)
	if len(r.Problems) != 1 || r.Problems[0].Type != ProblemDamage || r.Problems[0].Lvol != "snap" || r.Problems[0].OffsetBytes != bad || r.ScrubbedBytes != 1<<20 || r.CheckedClusters != 16 {
		t.Fatalf("%+v", r)
	}
	_, err = l.WriteAt([]byte("part of a damaged block"), bad+10)
	wantKind(t, kind.Corrupt, err)
	write(t, l, bad-65536, []byte("a neighbour in another cluster"))
	write(t, l, bad+4096, []byte("a neighbour in the same cluster")) // copied, the damage with it
	_, err = l.ReadAt(make([]byte, 10), bad)
	wantKind(t, kind.Corrupt, err)
	write(t, l, bad, pattern(2, 4096))
	if !bytes.Equal(read(t, l, bad, 4096), pattern(2, 4096)) {
		t.Fatal("not healed")
	}
}

// poke changes meta.db of a closed pool.
func poke(t testing.TB, dir string, fn func(tx *bbolt.Tx)) {
	t.Helper()
	db, err := bbolt.Open(filepath.Join(dir, "meta.db"), 0o600, nil)
	ok(t, err)
	ok(t, db.Update(func(tx *bbolt.Tx) error { fn(tx); return nil }))
	ok(t, db.Close())
}

func spoil(v []byte) []byte {
	v = bytes.Clone(v)
	v[len(v)/2] ^= 1
	return v
}

// TestDamagedMetadata damages what meta.db holds of one lvol; the others go on.
func TestDamagedMetadata(t *testing.T) {
	s, _ := memPool(t, 64<<20, 64<<10)
	o := s.o
	for _, n := range []string{"page", "record", "fine"} {
		must[Info](t)(s.Create(n, 8<<20))
		l := openLvol(t, s, n, false)
		write(t, l, 0, pattern(uint64(n[0]), 6<<20))
	}
	must[Info](t)(s.Snapshot("record", "record-snap"))
	page, rec := s.byName["page"].delta.id, s.byName["record-snap"].id
	ok(t, s.Close())
	poke(t, o.Dir, func(tx *bbolt.Tx) {
		b := tx.Bucket(bucketDelta).Bucket(key64(page))
		k := []byte{0, 0, 0, 1}
		ok(t, b.Put(k, spoil(b.Get(k))))
		b = tx.Bucket(bucketLvol)
		ok(t, b.Put(key64(rec), spoil(b.Get(key64(rec)))))
	})
	s, err := Open(o)
	ok(t, err)
	defer func() { s.Close() }()
	fine := openLvol(t, s, "fine", false)
	if !bytes.Equal(read(t, fine, 0, 6<<20), pattern('f', 6<<20)) {
		t.Fatal("fine differs")
	}
	write(t, fine, 7<<20, pattern(9, 65536))
	l := openLvol(t, s, "page", false)
	if !bytes.Equal(read(t, l, 0, 4<<20), pattern('p', 6<<20)[:4<<20]) {
		t.Fatal("the sound page differs")
	}
	_, err = l.ReadAt(make([]byte, 1), 4<<20)
	wantKind(t, kind.Corrupt, err)
	_, err = l.WriteAt(make([]byte, 1), 4<<20)
	wantKind(t, kind.Corrupt, err)
	write(t, l, 5<<20, pattern(8, 65536)) // a whole cluster can be written anew
	ok(t, l.Flush())
	for _, n := range []string{"record-snap", "record"} {
		_, err := s.OpenLvol(n, true)
		wantKind(t, kind.Corrupt, err)
		if i := must[Info](t)(s.Get(n)); i.Damage == "" {
			t.Fatalf("%+v", i)
		}
	}
	r, err := s.Check(context.Background(), CheckOptions{Repair: true})
	ok(t, err)
	got := map[string]bool{}
	for _, p := range r.Problems {
		if p.Type == ProblemLeak && strings.Contains(p.Detail, "free clusters occupy space") {
			continue // what the damaged page named
		}
		if p.Type != ProblemDamage || p.Repaired {
			t.Fatalf("%+v", p)
		}
		got[p.Lvol] = true
	}
	if !got["page"] || !got["record"] || !got["record-snap"] || got["fine"] {
		t.Fatalf("%v", got)
	}
	ok(t, s.Close())
	s, err = Open(o)
	ok(t, err)
	l = openLvol(t, s, "page", true)
	if !bytes.Equal(read(t, l, 5<<20, 65536), pattern(8, 65536)) {
		t.Fatal("differs")
	}
	_, err = l.ReadAt(make([]byte, 1), 4<<20)
	wantKind(t, kind.Corrupt, err) // not silently zeros
	ok(t, l.Close())
	for _, n := range []string{"page", "record", "record-snap"} {
		ok(t, s.Delete(n))
	}
	r, err = s.Check(context.Background(), CheckOptions{Repair: true})
	ok(t, err)
	if len(r.Problems) != 1 || r.Problems[0].Type != ProblemLeak || !r.Problems[0].Repaired {
		t.Fatalf("the delta that the damaged record named: %+v", r.Problems)
	}
	wantClean(t, s)
	if i := must[Info](t)(s.Get("fine")); s.Stat().TotalClusters-s.Stat().FreeClusters != i.AllocatedClusters {
		t.Fatalf("%+v", s.Stat())
	}
}

// TestDoubleUse: two lvols claim a cluster. It is found, and writing one does not
// change the other.
func TestDoubleUse(t *testing.T) {
	s, _ := memPool(t, 16<<20, 64<<10)
	o := s.o
	for i, n := range []string{"a", "b"} {
		must[Info](t)(s.Create(n, 1<<20))
		write(t, openLvol(t, s, n, false), 0, pattern(uint64(i), 65536))
	}
	a, b := s.byName["a"], s.byName["b"]
	pg := a.root.Load().page(0)
	ok(t, s.Flush())
	stolen := s.inherit(b.delta, 0, pg)
	stolen.store(0, pg.load(0)|ownBit)
	value := s.appendPage(nil, stolen)
	bid := b.delta.id
	ok(t, s.Close())
	poke(t, o.Dir, func(tx *bbolt.Tx) { ok(t, putPage(tx, bid, 0, value)) })
	s, err := Open(o)
	ok(t, err)
	defer func() { s.Close() }()
	r, err := s.Check(context.Background(), CheckOptions{})
	ok(t, err)
	double := 0
	for _, p := range r.Problems {
		if p.Type == ProblemDoubleUse {
			double++
		}
	}
	if double != 1 {
		t.Fatalf("%+v", r.Problems)
	}
	write(t, openLvol(t, s, "a", false), 0, []byte("changed"))
	if !bytes.Equal(read(t, openLvol(t, s, "b", true), 0, 65536), pattern(0, 65536)) {
		t.Fatal("b changed with a")
	}
	for _, n := range []string{"a", "b"} {
		for l := range s.open {
			l.Close()
		}
		ok(t, s.Delete(n))
	}
}

func TestLeaksAreFoundAndRepaired(t *testing.T) {
	s, mem := memPool(t, 16<<20, 64<<10)
	o := s.o
	ok(t, mem.WriteAt([]byte("left over"), 100<<16)) // in a free cluster
	c, _, _ := s.alloc.alloc(0)                      // taken and forgotten
	r, err := s.Check(context.Background(), CheckOptions{})
	ok(t, err)
	if len(r.Problems) != 2 || r.Problems[0].Type != ProblemLeak || r.Problems[0].OffsetBytes != int64(c)<<16 || r.Problems[1].OffsetBytes != 100<<16 {
		t.Fatalf("%+v", r.Problems)
	}
	r, err = s.Check(context.Background(), CheckOptions{Repair: true})
	ok(t, err)
	if len(r.Problems) != 2 || !r.Problems[0].Repaired || !r.Problems[1].Repaired {
		t.Fatalf("%+v", r.Problems)
	}
	wantClean(t, s)
	ok(t, s.Close())
	poke(t, o.Dir, func(tx *bbolt.Tx) {
		pg := s.newPage(&delta{id: 77}, 2)
		pg.store(1, stateAllocated|ownBit|9)
		ok(t, putPage(tx, 77, 2, s.appendPage(nil, pg)))
		ok(t, tx.Bucket(bucketName).Put([]byte("ghost"), seal(tagName, []byte("ghost"), bytes.Repeat([]byte{1}, 8))))
	})
	s, err = Open(o)
	ok(t, err)
	defer s.Close()
	if s.Stat().FreeClusters != s.Stat().TotalClusters-1 {
		t.Fatalf("an orphan's cluster counts as free: %+v", s.Stat())
	}
	r, err = s.Check(context.Background(), CheckOptions{Repair: true})
	ok(t, err)
	if len(r.Problems) != 2 {
		t.Fatalf("%+v", r.Problems)
	}
	wantClean(t, s)
}

func TestSuperblocks(t *testing.T) {
	s, mem := memPool(t, 16<<20, 64<<10)
	o := s.o
	must[Info](t)(s.Create("a", 1<<20))
	ok(t, s.Close())
	good := make([]byte, superblockBytes)
	ok(t, mem.ReadAt(good, 0))
	try := func() (*Store, error) { return Open(o) }

	flip(mem, 50) // the device's copy is damaged: the other serves, and repairs it
	s, err := try()
	ok(t, err)
	r, err := s.Check(context.Background(), CheckOptions{Repair: true})
	ok(t, err)
	if len(r.Problems) != 1 || !r.Problems[0].Repaired {
		t.Fatalf("%+v", r.Problems)
	}
	wantClean(t, s)
	ok(t, s.Close())

	poke(t, o.Dir, func(tx *bbolt.Tx) {
		b := tx.Bucket(bucketPool)
		ok(t, b.Put(keySuperblock, spoil(b.Get(keySuperblock))))
	})
	s, err = try()
	ok(t, err)
	r, err = s.Check(context.Background(), CheckOptions{Repair: true})
	ok(t, err)
	if len(r.Problems) != 1 || !r.Problems[0].Repaired {
		t.Fatalf("%+v", r.Problems)
	}
	ok(t, s.Close())

	b, err := decodeSuperblock(good)
	ok(t, err)
	set := func(change func(*superblock), version byte) {
		n := b
		change(&n)
		block := n.encode()
		if version != 0 {
			block[8] = version
			copy(block[superblockBytes-4:], []byte{0, 0, 0, 0})
			sum := superblockSum(block)
			copy(block[superblockBytes-4:], sum)
		}
		ok(t, mem.WriteAt(block, 0))
		poke(t, o.Dir, func(tx *bbolt.Tx) { ok(t, putPool(tx, keySuperblock, block)) })
	}
	set(func(*superblock) {}, 2)
	_, err = try()
	wantKind(t, kind.Unsupported, err)
	set(func(n *superblock) { n.refuse = 1 << 40 }, 0)
	_, err = try()
	wantKind(t, kind.Unsupported, err)
	set(func(n *superblock) { n.readOnly = 1 }, 0)
	_, err = try()
	wantKind(t, kind.Unsupported, err)
	ro := o
	ro.ReadOnly = true
	s, err = Open(ro)
	ok(t, err)
	ok(t, s.Close())
	set(func(n *superblock) { n.ignore = ^uint64(0) }, 0)
	s, err = try()
	ok(t, err)
	wantClean(t, s)
	ok(t, s.Close())

	other := b
	other.uuid = newUUID()
	ok(t, mem.WriteAt(other.encode(), 0))
	_, err = try()
	wantKind(t, kind.Corrupt, err)
}

func superblockSum(block []byte) []byte {
	return binary.LittleEndian.AppendUint32(nil, crc32.Checksum(block[:superblockBytes-4], castagnoli))
}

// TestDamagedFile damages meta.db itself, byte by byte at random, which bbolt does
// not survive on its own: opening and using it may fail, never crash.
func TestDamagedFile(t *testing.T) {
	s, _ := memPool(t, 16<<20, 64<<10)
	o := s.o
	for i := range 5 {
		n := fmt.Sprint("l", i)
		must[Info](t)(s.Create(n, 1<<20))
		write(t, openLvol(t, s, n, false), 0, pattern(uint64(i), 300000))
		must[Info](t)(s.Snapshot(n, "s"+n))
	}
	ok(t, s.Close())
	path := filepath.Join(o.Dir, "meta.db")
	whole, err := os.ReadFile(path)
	ok(t, err)
	opened := 0
	for _, seed := range seeds(t, 40) {
		r := rand.New(rand.NewPCG(seed, 1))
		spoiled := bytes.Clone(whole)
		for range 1 + r.IntN(4) {
			switch r.IntN(3) {
			case 0:
				spoiled[r.IntN(len(spoiled))] ^= byte(1 << r.IntN(8))
			case 1: // a header of a page
				at := r.IntN(len(spoiled)/4096)*4096 + r.IntN(32)
				spoiled[at] = byte(r.Uint32())
			case 2:
				if r.IntN(4) == 0 {
					spoiled = spoiled[:4096*(1+r.IntN(len(spoiled)/4096))]
				}
			}
		}
		ok(t, os.WriteFile(path, spoiled, 0o600))
		s, err := Open(o)
		if err != nil {
			if k := kind.Of(err); k == kind.InUse || k == "" {
				t.Fatalf("seed %d: kind %q: %v", seed, k, err)
			}
			continue
		}
		opened++
		exercise(s)
		s.Close()
	}
	t.Logf("%d could be opened", opened)
}

// exercise uses a store whose metadata may be damaged in any way.
func exercise(s *Store) {
	list, _ := s.List()
	for i, l := range list {
		if i > 20 {
			break
		}
		if d, err := s.OpenLvol(l.Name, l.ReadOnly); err == nil {
			d.ReadAt(make([]byte, 100000), 0)
			d.WriteAt(make([]byte, 5000), 1000)
			d.Discard(0, min(d.SizeBytes(), 65536))
			d.Close()
		}
		s.Snapshot(l.Name, "x"+l.Name)
		s.Clone(l.Name, "y"+l.Name)
	}
	s.Flush()
	s.Check(context.Background(), CheckOptions{Scrub: true, Repair: true})
	for _, l := range list {
		s.Delete(l.Name)
	}
}

// TestConcurrent uses one pool from many sides at once; run it with -race.
func TestConcurrent(t *testing.T) {
	s := newPool(t, 256<<20, 16<<10, func(o *Options) { o.FlushInterval, o.MaxDirtyPages = 1e6, 8 })
	const lvolBytes = 6 << 20
	stop := make(chan struct{})
	var wg, admin sync.WaitGroup
	for w := range 3 {
		name := fmt.Sprint("w", w)
		must[Info](t)(s.Create(name, lvolBytes))
		l := openLvol(t, s, name, false)
		for part := range 2 { // two writers of one lvol, each in its own half
			wg.Go(func() {
				r := rand.New(rand.NewPCG(uint64(w), uint64(part)))
				base := int64(part) * lvolBytes / 2
				mine := make([]byte, lvolBytes/2)
				for i := range 200 {
					n := r.Int64N(100000) + 1
					off := r.Int64N(int64(len(mine)) - n)
					switch r.IntN(6) {
					case 0:
						if err := l.Discard(base+off, n); err != nil {
							t.Error(err)
						}
						clear(mine[off : off+n])
					case 1:
						if err := l.Flush(); err != nil {
							t.Error(err)
						}
					case 2, 3:
						p := pattern(uint64(i), int(n))
						if _, err := l.WriteAt(p, base+off); err != nil {
							t.Error(err)
						}
						copy(mine[off:], p)
					default:
						p := make([]byte, n)
						if _, err := l.ReadAt(p, base+off); err != nil && err != io.EOF {
							t.Error(err)
						} else if !bytes.Equal(p, mine[off:off+n]) {
							t.Errorf("%s reads another's bytes at %d", name, base+off)
						}
					}
					if t.Failed() {
						return
					}
				}
			})
		}
		admin.Go(func() {
			for i := 0; ; i++ {
				select {
				case <-stop:
					return
				default:
				}
				snap, clone := fmt.Sprintf("%s-s%d", name, i), fmt.Sprintf("%s-c%d", name, i)
				must[Info](t)(s.Snapshot(name, snap))
				must[Info](t)(s.Clone(snap, clone))
				c, err := s.OpenLvol(clone, false)
				if err != nil {
					t.Error(err)
					return
				}
				c.ReadAt(make([]byte, 200000), 1<<20)
				c.WriteAt(pattern(1, 5000), 3000)
				c.Close()
				if i%3 == 0 {
					if _, err := s.Decouple(context.Background(), clone); err != nil {
						t.Error(err)
					}
				}
				if err := s.Delete(clone); err != nil {
					t.Error(err)
				}
				if i%2 == 0 {
					if err := s.Delete(snap); err != nil {
						t.Error(err)
					}
				}
				s.List()
				s.Stat()
			}
		})
	}
	admin.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			r, err := s.Check(context.Background(), CheckOptions{Scrub: true})
			if err != nil || len(r.Problems) > 0 {
				t.Errorf("check beside I/O: %v %+v", err, r.Problems)
				return
			}
		}
	})
	wg.Wait()
	close(stop)
	admin.Wait()
	wantClean(t, s)
	wantClean(t, reopen(t, s))
}
