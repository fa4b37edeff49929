package lvol

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"go.etcd.io/bbolt"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/lvol/device"
)

// The fuzz targets also give each input a right checksum, to get past it.
func FuzzSuperblock(f *testing.F) {
	good := superblock{uuid: newUUID(), clusterBytes: 65536, totalClusters: 100, created: 5, name: "default"}
	f.Add(good.encode()[:superblockBytes-4])
	f.Add([]byte(superblockMagic))
	f.Fuzz(func(t *testing.T, p []byte) {
		block := make([]byte, superblockBytes)
		copy(block, p)
		copy(block[superblockBytes-4:], superblockSum(block))
		for _, in := range [][]byte{p, block} {
			b, err := decodeSuperblock(in)
			if err != nil {
				if k := kind.Of(err); k != kind.Corrupt && k != kind.Unsupported {
					t.Fatalf("kind %q: %v", k, err)
				}
				continue
			}
			again, err := decodeSuperblock(b.encode())
			if err != nil || again != b {
				t.Fatalf("%+v became %+v, %v", b, again, err)
			}
		}
	})
}

func FuzzRecord(f *testing.F) {
	good := record{name: "a", uuid: newUUID(), size: 1 << 20, delta: 2, parent: 3, overlap: 512, created: 9, snapshot: true}
	v := good.encode(1)
	f.Add(v[:len(v)-sealBytes])
	f.Fuzz(func(t *testing.T, p []byte) {
		for _, in := range [][]byte{p, seal(tagLvol, key64(1), bytes.Clone(p))} {
			r, err := decodeRecord(1, in)
			if err == nil && !bytes.Equal(r.encode(1), in) {
				t.Fatalf("%+v does not encode to what it came from", r)
			}
		}
	})
}

func FuzzPage(f *testing.F) {
	g := newGeometry(65536, 1000)
	pg := g.newPage(&delta{id: 5}, 7)
	pg.store(0, stateZeroed|ownBit)
	pg.store(3, stateAllocated|ownBit|17)
	pg.store(63, stateDamaged|ownBit)
	v := g.appendPage(nil, pg)
	f.Add(v[:len(v)-sealBytes])
	f.Fuzz(func(t *testing.T, p []byte) {
		for _, in := range [][]byte{p, seal(tagPage, pageKey(5, 7), bytes.Clone(p))} {
			pg := g.newPage(&delta{id: 5}, 7)
			if err := g.decodePage(pg, in); err != nil {
				continue
			}
			for i := range pg.entries {
				if e := pg.load(i); e.allocated() && (e.phys() == 0 || e.phys() >= g.totalClusters) {
					t.Fatalf("cluster %d outside the pool", e.phys())
				}
			}
			out := g.appendPage(nil, pg)
			again := g.newPage(&delta{id: 5}, 7)
			if len(out) > 0 {
				if err := g.decodePage(again, out); err != nil {
					t.Fatal(err)
				}
			}
		}
	})
}

func FuzzRedo(f *testing.F) {
	g := newGeometry(65536, 1000)
	f.Add(appendRedoSet(nil, 1, 2, 3, 4, 5, []uint32{6, 7}))
	f.Add(appendRedoClear(nil, 1, 2, 3, 4, stateZeroed))
	f.Fuzz(func(t *testing.T, p []byte) {
		r, err := g.decodeRedo(p)
		if err != nil {
			return
		}
		if r.set && (r.phys == 0 || r.phys >= g.totalClusters || r.first+len(r.sums) > g.clusterBlocks) {
			t.Fatalf("%+v", r)
		}
	})
}

// FuzzOpen opens and uses a pool of which one value, sealed rightly, is the fuzzer's:
// whatever it says, nothing crashes, and the one lvol it is not about keeps its data.
func FuzzOpen(f *testing.F) {
	f.Add(byte(0), []byte{})
	f.Add(byte(1), []byte{1, 0, 1, 0, 0, 0, 2})
	f.Add(byte(2), []byte{9})
	f.Add(byte(3), []byte{0, 0, 0, 0, 0, 0, 0, 9, 0, 0, 0, 0})
	f.Add(byte(4), binary.LittleEndian.AppendUint64(nil, 1<<63))
	f.Fuzz(func(t *testing.T, which byte, payload []byte) {
		s, _ := memPool(t, 4<<20, 64<<10)
		o := s.o
		for i, n := range []string{"victim", "fine"} {
			must[Info](t)(s.Create(n, 1<<20))
			write(t, openLvol(t, s, n, false), 0, pattern(uint64(i), 100000))
		}
		v := s.byName["victim"]
		id, d := v.id, v.delta.id
		ok(t, s.Close())
		poke(t, o.Dir, func(tx *bbolt.Tx) {
			p := bytes.Clone(payload)
			put := func(b *bbolt.Bucket, tg tag, key, sealKey []byte) {
				ok(t, b.Put(key, seal(tg, sealKey, p)))
			}
			switch which % 7 {
			case 0:
				put(tx.Bucket(bucketLvol), tagLvol, key64(id), key64(id))
			case 1: // patch a good record
				b := tx.Bucket(bucketLvol)
				r := bytes.Clone(b.Get(key64(id)))
				r = r[:len(r)-sealBytes]
				for i := 0; i+1 < len(payload); i += 2 {
					r[int(payload[i])%len(r)] = payload[i+1]
				}
				p = r
				put(b, tagLvol, key64(id), key64(id))
			case 2:
				put(tx.Bucket(bucketDelta).Bucket(key64(d)), tagPage, []byte{0, 0, 0, 0}, pageKey(d, 0))
			case 3: // patch a good page
				b := tx.Bucket(bucketDelta).Bucket(key64(d))
				r := bytes.Clone(b.Get([]byte{0, 0, 0, 0}))
				r = r[:len(r)-sealBytes]
				for i := 0; i+1 < len(payload); i += 2 {
					r[int(payload[i])%len(r)] = payload[i+1]
				}
				p = r
				put(b, tagPage, []byte{0, 0, 0, 0}, pageKey(d, 0))
			case 4:
				if len(payload) > 0 && len(payload) < 100 {
					ok(t, tx.Bucket(bucketOpen).Put(payload, []byte{1}))
				}
			case 5:
				put(tx.Bucket(bucketName), tagName, []byte("victim"), []byte("victim"))
			case 6:
				keys := [][]byte{keyNext, keyCheckpoint, keyClean, keyDevice, keySuperblock}
				if len(payload) > 0 {
					k := keys[int(payload[0])%len(keys)]
					p = p[1:]
					put(tx.Bucket(bucketPool), tagPool, k, k)
				}
			}
		})
		s, err := Open(o)
		if err != nil {
			if k := kind.Of(err); k != kind.Corrupt && k != kind.Unsupported && which%7 != 6 {
				t.Fatalf("kind %q: %v", k, err)
			}
			return
		}
		defer s.Close()
		if l, err := s.OpenLvol("fine", true); err == nil {
			if got := read(t, l, 0, 100000); !bytes.Equal(got, pattern(1, 100000)) {
				t.Fatal("fine differs")
			}
			l.Close()
		} else if which%7 > 3 {
			t.Fatal(err)
		}
		exercise(s)
	})
}

// TestGolden opens a pool that an earlier version of this program wrote, and finds
// what it had: the format holds. To write it anew, which only a new format version
// justifies: go test -run TestGolden -golden
func TestGolden(t *testing.T) {
	src := filepath.Join("testdata", "v1")
	if *goldenFlag {
		writeGolden(t, src)
	}
	dir := filepath.Join(t.TempDir(), "pool")
	mem := unpackGolden(t, src, dir)
	s := openPool(t, dir, func(o *Options) {
		o.OpenDevice = func() (device.Device, error) { return mem, nil }
	})
	for name, want := range goldenContent() {
		l := openLvol(t, s, name, true)
		if got := read(t, l, 0, l.SizeBytes()); !bytes.Equal(got, want) {
			t.Fatalf("%s differs", name)
		}
		l.Close()
	}
	if i := must[Info](t)(s.Get("leaf")); i.Parent != "base" || i.UUID == "" || i.Created.Unix() != 1700000000 || i.AllocatedClusters != 2 {
		t.Fatalf("%+v", i)
	}
	if i := must[Info](t)(s.Get("frozen")); !i.ReadOnly || i.Snapshot {
		t.Fatalf("%+v", i)
	}
	wantClean(t, s)
}

// FuzzTree walks a bbolt file of which the fuzzer changed pages. That it then is
// also safe to open is for TestDamagedFile.
func FuzzTree(f *testing.F) {
	dir := f.TempDir()
	s := newPool(f, 16<<20, 64<<10, nil)
	for i := range 40 {
		must[Info](f)(s.Create(fmt.Sprint("l", i), 1<<20))
		write(f, openLvol(f, s, fmt.Sprint("l", i), false), 0, pattern(uint64(i), 70000))
	}
	ok(f, s.Close())
	whole, err := os.ReadFile(filepath.Join(s.o.Dir, "meta.db"))
	ok(f, err)
	f.Add([]byte{2, 10, 1})
	f.Fuzz(func(t *testing.T, edits []byte) {
		p := bytes.Clone(whole)
		for ; len(edits) >= 3; edits = edits[3:] { // page, offset in its first bytes, value
			p[(int(edits[0])*4096+int(edits[1]))%len(p)] = edits[2]
		}
		path := filepath.Join(dir, "meta.db")
		ok(t, os.WriteFile(path, p, 0o600))
		file, err := os.Open(path)
		ok(t, err)
		defer file.Close()
		if _, err := checkTree(file); err != nil && kind.Of(err) != kind.Corrupt {
			t.Fatalf("kind %q: %v", kind.Of(err), err)
		}
	})
}
