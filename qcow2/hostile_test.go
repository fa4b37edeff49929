package qcow2

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/thaw-project/thaw/kind"
)

// patch changes an image in place.
func patch(t testing.TB, path string, off int64, data ...byte) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(data, off); err != nil {
		t.Fatal(err)
	}
}

func patch64(t testing.TB, path string, off int64, v uint64) {
	t.Helper()
	patch(t, path, off, binary.BigEndian.AppendUint64(nil, v)...)
}

func TestWhatIsRefused(t *testing.T) {
	for _, c := range []struct {
		name   string
		off    int64
		data   []byte
		want   kind.Kind
		says   string
		onlyRW bool // a read-only open may go on
	}{
		{"magic", 0, []byte("QFI\xfa"), kind.Invalid, "not a qcow2", false},
		{"version 4", 7, []byte{4}, kind.Unsupported, "version 4", false},
		{"tiny clusters", 23, []byte{8}, kind.Unsupported, "cluster_bits 8", false},
		{"huge clusters", 23, []byte{22}, kind.Unsupported, "cluster_bits 22", false},
		{"AES", 35, []byte{1}, kind.Unsupported, "crypt_method 1", false},
		{"LUKS", 35, []byte{2}, kind.Unsupported, "crypt_method 2", false},
		{"data file", 79, []byte{1 << 2}, kind.Unsupported, `bit 2 ("external data file")`, false},
		{"extended L2", 79, []byte{1 << 4}, kind.Unsupported, `bit 4 ("extended L2 entries")`, false},
		{"unknown bit", 72, []byte{1 << 7}, kind.Unsupported, "bit 63", false},
		{"corrupt bit", 79, []byte{1 << 1}, kind.Corrupt, "bit 1", true},
		{"compression without its bit", 104, []byte{1}, kind.Corrupt, "compression", false},
		{"compression type 0 with the bit", 79, []byte{1 << 3}, kind.Corrupt, "compression", false},
		{"refcount order", 99, []byte{7}, kind.Corrupt, "refcount_order 7", false},
		{"header length", 103, []byte{105}, kind.Corrupt, "header_length", false},
		{"L1 behind the end", 41, []byte{1}, kind.Corrupt, "L1 table", false},
		{"L1 not at a cluster", 47, []byte{8}, kind.Corrupt, "L1 table", false},
		{"L1 too small", 36, []byte{0, 0, 0, 1}, kind.Corrupt, "L1 table of 1 entries", false},
		{"L1 too large", 36, []byte{255, 255, 255, 255}, kind.Unsupported, "L1 table", false},
		{"size", 24, []byte{255}, kind.Unsupported, "a disk of", false},
		{"refcount table too large", 56, []byte{1}, kind.Unsupported, "refcount table", false},
		{"refcount table behind the end", 49, []byte{1}, kind.Corrupt, "refcount table", false},
		{"snapshots behind the end", 63, []byte{1}, kind.Corrupt, "snapshot table", false},
		{"backing name", 16, []byte{0, 0, 4, 0}, kind.Corrupt, "backing file name of 1024", false},
		{"extension", 116, []byte{255}, kind.Corrupt, "extension", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			fx := newFixture(t, newRand(1), 1<<30, 4096, CreateOptions{LazyRefcounts: true})
			patch(t, fx.path, c.off, c.data...)
			before, err := os.ReadFile(fx.path)
			if err != nil {
				t.Fatal(err)
			}
			for _, readOnly := range []bool{true, false} {
				o := fx.options
				o.ReadOnly = readOnly
				i, err := Open(fx.path, o)
				if readOnly && c.onlyRW {
					if err != nil {
						t.Errorf("read-only: %v", err)
					} else {
						i.Close()
					}
					continue
				}
				if !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.says) {
					t.Errorf("read-only %t: got %v, want %s saying %q", readOnly, err, c.want, c.says)
				}
			}
			after, err := os.ReadFile(fx.path)
			if err != nil || !bytes.Equal(before, after) {
				t.Errorf("a refused image was changed (%v)", err)
			}
			if left, _ := filepath.Glob(fx.path + ".redo*"); len(left) > 0 && c.want != kind.Corrupt {
				t.Errorf("left %v", left)
			}
		})
	}
}

func TestBackingIsTheCallersToGive(t *testing.T) {
	fx := newFixture(t, newRand(1), 1<<20, 4096, CreateOptions{})
	if _, err := Open(fx.path, OpenOptions{}); !errors.Is(err, kind.Invalid) {
		t.Errorf("without the base: %v", err)
	}
	fx = newFixture(t, newRand(1), 1<<20, 0, CreateOptions{})
	if _, err := Open(fx.path, OpenOptions{Backing: bytes.NewReader(nil)}); !errors.Is(err, kind.Invalid) {
		t.Errorf("with a base too many: %v", err)
	}
	// A base that is shorter than it was said to be must not read as zeros.
	fx = newFixture(t, newRand(1), 1<<20, 65536, CreateOptions{})
	fx.options.Backing = bytes.NewReader(make([]byte, 10))
	i := fx.open(t)
	defer i.Close()
	if _, err := i.ReadAt(make([]byte, 512), 4096); !errors.Is(err, kind.IO) {
		t.Errorf("read behind the end of the base: %v", err)
	}
	if _, err := i.WriteAt(make([]byte, 512), 4096); !errors.Is(err, kind.IO) {
		t.Errorf("copy on write behind the end of the base: %v", err)
	}
}

func TestCreate(t *testing.T) {
	needQemu(t)
	dir := t.TempDir()
	path := filepath.Join(dir, "a.qcow2")
	for _, o := range []CreateOptions{
		{}, {SizeBytes: -512}, {SizeBytes: 100}, {SizeBytes: 512, ClusterBits: 8}, {SizeBytes: 512, ClusterBits: 22},
		{SizeBytes: 1 << 62}, {SizeBytes: 512, BackingFile: strings.Repeat("x", 1024)},
		{SizeBytes: 512, ClusterBits: 9, BackingFile: strings.Repeat("x", 500)}, {SizeBytes: 512, BackingFile: "x", BackingFormat: "a very long format name"},
	} {
		if err := Create(path, o); !errors.Is(err, kind.Invalid) {
			t.Errorf("%+v: %v", o, err)
		}
	}
	if left, _ := os.ReadDir(dir); len(left) > 0 {
		t.Fatalf("refused creations left %v", left)
	}
	for n, o := range []CreateOptions{
		{SizeBytes: 512}, {SizeBytes: 100 << 30, LazyRefcounts: true}, {SizeBytes: 1 << 50},
		{SizeBytes: 128 << 20, ClusterBits: 9}, {SizeBytes: 1 << 40, ClusterBits: 21}, {SizeBytes: 8 << 30, ClusterBits: 12},
		{SizeBytes: 512, BackingFile: strings.Repeat("x", 1023), BackingFormat: "qcow2"},
	} {
		path := filepath.Join(dir, fmt.Sprint(n))
		if err := Create(path, o); err != nil {
			t.Fatalf("%+v: %v", o, err)
		}
		if err := Create(path, o); !errors.Is(err, kind.Exists) {
			t.Fatalf("second time: %v", err)
		}
		if r, err := Check(path); err != nil || !r.Clean {
			t.Fatalf("%+v, %v", r, err)
		}
		if o.BackingFile != "" {
			// The base does not exist, so info is all that QEMU can do.
			if out := tool(t, "qemu-img", "info", path); !strings.Contains(out, "backing file: "+o.BackingFile) {
				t.Fatal(out)
			}
		} else {
			if out := tool(t, "qemu-img", "check", path); !strings.Contains(out, "No errors") {
				t.Fatal(out)
			}
			fx := fixture{path: path}
			i := fx.open(t)
			if i.SizeBytes() != o.SizeBytes {
				t.Fatalf("size %d", i.SizeBytes())
			}
			if _, err := i.WriteAt([]byte("x"), o.SizeBytes-1); err != nil {
				t.Fatal(err)
			}
			if err := i.Close(); err != nil {
				t.Fatal(err)
			}
			if out := tool(t, "qemu-img", "check", path); !strings.Contains(out, "No errors") {
				t.Fatal(out)
			}
		}
	}
	if err := Create(filepath.Join(dir, "missing", "x"), CreateOptions{SizeBytes: 512}); !errors.Is(err, kind.NotFound) && kind.Of(err) != kind.NotFound {
		t.Errorf("in a missing directory: %v", err)
	}
}

// TestRepair damages images as crashes and bugs do, and compares with qemu-img check.
func TestRepair(t *testing.T) {
	needQemu(t)
	const size = 2 << 20
	for _, c := range []struct {
		name     string
		damage   func(t *testing.T, path string, h *header)
		repaired bool
	}{
		{"leak", func(t *testing.T, path string, h *header) {
			patch(t, path, refBlock(t, path, h)+2*40, 0, 1)
			if err := os.Truncate(path, 42<<16); err != nil { // QEMU looks no further than the file
				t.Fatal(err)
			}
		}, true},
		{"count too low", func(t *testing.T, path string, h *header) {
			patch(t, path, refBlock(t, path, h)+2*5, 0, 0)
		}, true},
		{"all counts lost", func(t *testing.T, path string, h *header) {
			patch64(t, path, h.refTableOffset, 0)
		}, true},
		{"refcount block behind the end", func(t *testing.T, path string, h *header) {
			patch64(t, path, h.refTableOffset, 1<<40)
		}, true},
		{"refcount block over the L1 table", func(t *testing.T, path string, h *header) {
			patch64(t, path, h.refTableOffset, uint64(h.l1Offset))
		}, true},
		{"refcount table over the L1 table", func(t *testing.T, path string, h *header) {
			patch64(t, path, offRefcountTable, uint64(h.l1Offset))
		}, true},
		{"not marked copied", func(t *testing.T, path string, h *header) {
			l2 := l2Offset(t, path, h)
			patch(t, path, l2, 0)
			patch(t, path, h.l1Offset, 0)
		}, true},
		{"marked corrupt", func(t *testing.T, path string, h *header) {
			patch(t, path, 79, incompatCorrupt)
		}, true},
		{"data over the header", func(t *testing.T, path string, h *header) {
			patch64(t, path, l2Offset(t, path, h), 0|entryCopied|entryZero)
		}, false},
		{"two uses", func(t *testing.T, path string, h *header) {
			raw := readAll(t, path)
			l2 := l2Offset(t, path, h)
			patch64(t, path, l2, beUint64(raw[l2+8:]))
		}, false},
		{"data behind the end", func(t *testing.T, path string, h *header) {
			patch64(t, path, l2Offset(t, path, h), 1<<40|entryCopied)
		}, false},
		{"data not at a cluster", func(t *testing.T, path string, h *header) {
			raw := readAll(t, path)
			l2 := l2Offset(t, path, h)
			patch64(t, path, l2, beUint64(raw[l2:])+512)
		}, false},
		{"L2 table behind the end", func(t *testing.T, path string, h *header) {
			patch64(t, path, h.l1Offset, 1<<40|entryCopied)
		}, false},
		{"L2 table in the L1 table", func(t *testing.T, path string, h *header) {
			patch64(t, path, h.l1Offset, uint64(h.l1Offset)|entryCopied)
		}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newRand(7)
			fx := newFixture(t, r, size, 0, CreateOptions{})
			i := fx.open(t)
			o := op{name: "write", off: 0, n: size, pattern: 9}
			fx.want.apply(o)
			if err := do(i, o); err != nil {
				t.Fatal(err)
			}
			if err := i.Close(); err != nil {
				t.Fatal(err)
			}
			raw := readAll(t, fx.path)
			h, err := parseHeader(raw[:65536], int64(len(raw)))
			if err != nil {
				t.Fatal(err)
			}
			c.damage(t, fx.path, h)
			before, err := Check(fx.path)
			if err != nil {
				t.Fatal(err)
			}
			if before.Clean {
				t.Fatal("Check finds nothing")
			}
			if out, err := exec.Command("qemu-img", "check", fx.path).CombinedOutput(); err == nil && c.name != "marked corrupt" && c.name != "two uses" {
				t.Fatalf("qemu-img check finds nothing: %s", out)
			}
			// A writable open counts anew, so wrong counts alone do not stop it.
			if c.name != "leak" && c.name != "count too low" && c.name != "all counts lost" {
				if _, err := Open(fx.path, fx.options); !errors.Is(err, kind.Corrupt) {
					t.Fatalf("writable open of a damaged image: %v", err)
				}
			}
			damaged := readAll(t, fx.path)
			after, err := Repair(fx.path)
			if err != nil {
				t.Fatal(err)
			}
			if after.Clean != c.repaired {
				t.Fatalf("repaired: %+v", after)
			}
			if !c.repaired {
				if !bytes.Equal(damaged, readAll(t, fx.path)) {
					t.Fatal("Repair changed what it could not repair")
				}
				return
			}
			if before.Corruptions+before.Leaks > 0 && after.FixedCorruptions+after.FixedLeaks == 0 {
				t.Errorf("nothing fixed: %+v", after)
			}
			qemuAgrees(t, fx.path, fx.want)
		})
	}
}

func readAll(t testing.TB, path string) []byte {
	t.Helper()
	raw, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

func refBlock(t *testing.T, path string, h *header) int64 {
	return int64(beUint64(readAll(t, path)[h.refTableOffset:]))
}

func l2Offset(t *testing.T, path string, h *header) int64 {
	return hostOffset(beUint64(readAll(t, path)[h.l1Offset:]))
}

// TestDamageWhileOpen: an image whose tables somebody changes under us takes no more
// writes, says so in the file, and goes on being readable elsewhere.
func TestDamageWhileOpen(t *testing.T) {
	fx := newFixture(t, newRand(1), 1<<20, 0, CreateOptions{})
	i := fx.open(t)
	if _, err := i.WriteAt(make([]byte, 1<<20), 0); err != nil {
		t.Fatal(err)
	}
	if err := i.Close(); err != nil {
		t.Fatal(err)
	}
	i = fx.open(t)
	h := *i.head
	patch64(t, fx.path, l2Offset(t, fx.path, &h), 1<<40|entryCopied)
	if _, err := i.ReadAt(make([]byte, 512), 0); !errors.Is(err, kind.Corrupt) {
		t.Errorf("read of a damaged cluster: %v", err)
	}
	if _, err := i.ReadAt(make([]byte, 512), 1<<16); err != nil {
		t.Errorf("read of another cluster: %v", err)
	}
	if _, err := i.WriteAt(make([]byte, 512), 1<<16); !errors.Is(err, kind.Corrupt) && !errors.Is(err, kind.IO) {
		t.Errorf("write after damage: %v", err)
	}
	if err := i.Close(); err == nil {
		t.Error("Close of a broken image says nothing")
	}
	if info, err := Inspect(fx.path); err != nil || !info.Corrupt {
		t.Errorf("%+v, %v", info, err)
	}
}

// TestRedoOfAnotherLifeIsIgnored: records beside an image that is not dirty, left by
// an image of the same name or before another program's repair, must not be applied.
func TestRedoOfAnotherLifeIsIgnored(t *testing.T) {
	needQemu(t)
	fx := newFixture(t, newRand(1), 1<<20, 0, CreateOptions{LazyRefcounts: true})
	i := fx.open(t)
	if _, err := i.WriteAt([]byte("lost by choice"), 70000); err != nil {
		t.Fatal(err)
	}
	if err := i.Abandon(); err != nil {
		t.Fatal(err)
	}
	ro := fx.options
	ro.ReadOnly = true
	if _, err := Open(fx.path, ro); !errors.Is(err, kind.Unavailable) {
		t.Fatalf("read-only open over a redo log: %v", err)
	}
	if r, err := Check(fx.path); err != nil || !r.RedoPending || !r.Dirty {
		t.Fatalf("%+v, %v", r, err)
	}
	tool(t, "qemu-img", "check", "-q", "-r", "all", fx.path) // clears the dirty mark
	for range 2 {
		i = fx.open(t)
		if err := verify(i, fx.want, 0, 1<<20); err != nil {
			t.Fatal(err)
		}
		// Killed in the new life: only its own records count.
		o := op{name: "write", off: 300000, n: 1000, pattern: 3}
		fx.want.apply(o)
		if err := do(i, o); err != nil {
			t.Fatal(err)
		}
		if err := i.Abandon(); err != nil {
			t.Fatal(err)
		}
		i = fx.open(t)
		if err := verify(i, fx.want, 0, 1<<20); err != nil {
			t.Fatal(err)
		}
		if err := i.Close(); err != nil {
			t.Fatal(err)
		}
	}
	qemuAgrees(t, fx.path, fx.want)
}

// TestRepairAppliesTheRedoLog: Repair of a killed image gives what Open would.
func TestRepairAppliesTheRedoLog(t *testing.T) {
	needQemu(t)
	fx := newFixture(t, newRand(2), 1<<20, 1<<19, CreateOptions{LazyRefcounts: true})
	i := fx.open(t)
	for k := range 10 {
		o := op{name: "write", off: int64(k) * 90000, n: 5000, pattern: byte(k + 1)}
		fx.want.apply(o)
		if err := do(i, o); err != nil {
			t.Fatal(err)
		}
	}
	if err := i.Abandon(); err != nil {
		t.Fatal(err)
	}
	if r, err := Repair(fx.path); err != nil || !r.Clean {
		t.Fatalf("%+v, %v", r, err)
	}
	qemuAgrees(t, fx.path, fx.want)
}

// fuzzBytes is a file in memory for fuzzing, which counts what is read, so that work
// without bound shows.
type fuzzBytes struct {
	powerFile
	read int64
}

func (f *fuzzBytes) ReadAt(p []byte, off int64) (int, error) {
	f.read += int64(len(p))
	return f.powerFile.ReadAt(p, off)
}

// fuzzSeeds are small images of several kinds.
func fuzzSeeds(f *testing.F) [][]byte {
	var seeds [][]byte
	for _, o := range []CreateOptions{{SizeBytes: 64 << 10, ClusterBits: 9}, {SizeBytes: 1 << 20, ClusterBits: 12, LazyRefcounts: true}} {
		p := emptyPowerFile(f, o)
		dir := f.TempDir()
		i, err := openFile(p, "seed", filepath.Join(dir, "redo"), OpenOptions{})
		if err != nil {
			f.Fatal(err)
		}
		for k := range int64(4) {
			if _, err := i.WriteAt(bytes.Repeat([]byte{byte(k)}, 700), k*9000); err != nil {
				f.Fatal(err)
			}
		}
		if err := i.WriteZeroes(20000, 9000); err != nil {
			f.Fatal(err)
		}
		if err := i.Close(); err != nil {
			f.Fatal(err)
		}
		seeds = append(seeds, p.now)
	}
	if _, err := exec.LookPath("qemu-img"); err == nil {
		dir := f.TempDir()
		raw := filepath.Join(dir, "raw")
		if err := os.WriteFile(raw, bytes.Repeat([]byte("thaw"), 10000), 0o600); err != nil {
			f.Fatal(err)
		}
		for n, options := range []string{"cluster_size=512", "cluster_size=4096,compression_type=zstd"} {
			path := filepath.Join(dir, fmt.Sprint(n))
			tool(f, "qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, raw, path)
			tool(f, "qemu-img", "snapshot", "-c", "s", path)
			seeds = append(seeds, readAll(f, path))
		}
	}
	return seeds
}

// FuzzHeader: no header makes the parser panic, and what it accepts it can also write.
func FuzzHeader(f *testing.F) {
	for _, s := range fuzzSeeds(f) {
		f.Add(s[:min(len(s), 512)], int64(len(s)))
	}
	f.Fuzz(func(t *testing.T, first []byte, fileBytes int64) {
		if fileBytes < int64(len(first)) {
			return
		}
		h, err := parseHeader(first, fileBytes)
		if err != nil {
			if kind.Of(err) == "" {
				t.Fatalf("an error without a kind: %v", err)
			}
			return
		}
		if h.l1Offset+h.l1Entries*8 > fileBytes || h.l1Needed() > h.l1Entries || len(h.backingFile) > maxBackingNameBytes {
			t.Fatalf("accepted %+v in a file of %d bytes", h, fileBytes)
		}
	})
}

// FuzzImage opens, reads, checks, writes and repairs mutated images: no panic, no read
// without bound, and an image that was writable is sound afterwards.
func FuzzImage(f *testing.F) {
	for _, s := range fuzzSeeds(f) {
		f.Add(s, uint32(0), uint64(0), uint32(40), byte(1))
		f.Add(s, uint32(len(s)/2), uint64(1)<<40, uint32(8), byte(0x80))
	}
	f.Fuzz(func(t *testing.T, image []byte, at uint32, value uint64, at2 uint32, value2 byte) {
		if len(image) > 1<<20 || len(image) < headerV2Bytes {
			return
		}
		image = append([]byte(nil), image...)
		// Two aimed mutations beside the fuzzer's own: a table entry and a byte.
		if k := int(at) &^ 7; k+8 <= len(image) {
			binary.BigEndian.PutUint64(image[k:], beUint64(image[k:])^value)
		}
		if int(at2) < len(image) {
			image[at2] ^= value2
		}
		prefix := filepath.Join(t.TempDir(), "redo")
		ro := &fuzzBytes{powerFile: powerFile{now: image}}
		backing := bytes.NewReader(make([]byte, 4096))
		open := func(f file, readOnly bool) (*Image, error) {
			i, err := openFile(f, "fuzz", prefix, OpenOptions{ReadOnly: readOnly, CacheBytes: 1})
			if errors.Is(err, kind.Invalid) {
				i, err = openFile(f, "fuzz", prefix, OpenOptions{ReadOnly: readOnly, CacheBytes: 1, Backing: backing, BackingSizeBytes: 4096})
			}
			return i, err
		}
		if i, err := open(ro, true); err == nil {
			fuzzRead(t, i)
			i.Close()
		} else if kind.Of(err) == "" {
			t.Fatalf("an error without a kind: %v", err)
		}
		checkFile(ro, prefix)
		if limit := int64(64 << 20); ro.read > limit {
			t.Fatalf("read %d bytes of a file of %d", ro.read, len(image))
		}

		rw := &powerFile{now: append([]byte(nil), image...)}
		if i, err := open(rw, false); err == nil {
			fuzzRead(t, i)
			size := i.SizeBytes()
			for _, off := range []int64{0, size / 3, size - 700} {
				if off < 0 || off+700 > size {
					continue
				}
				if _, err := i.WriteAt(bytes.Repeat([]byte{7}, 700), off); err != nil && kind.Of(err) == "" {
					t.Fatalf("an error without a kind: %v", err)
				}
				i.Discard(off, min(70000, size-off))
			}
			if err := i.Close(); err == nil {
				if r, err := checkFile(rw, prefix); err != nil || !r.Clean {
					t.Fatalf("written and closed, then: %+v, %v", r, err)
				}
			}
		}
		fix := &powerFile{now: append([]byte(nil), image...)}
		if r, err := repairFile(fix, "fuzz", prefix+"2"); err == nil && r.Clean {
			if again, err := checkFile(fix, prefix+"2"); err != nil || !again.Clean {
				t.Fatalf("repaired, then: %+v, %v", again, err)
			}
		}
	})
}

func fuzzRead(t *testing.T, i *Image) {
	p := make([]byte, 100_000)
	for _, off := range []int64{0, i.SizeBytes() / 2, i.SizeBytes() - 1000} {
		if _, err := i.ReadAt(p, max(off, 0)); err != nil && err != io.EOF && kind.Of(err) == "" {
			t.Fatalf("an error without a kind: %v", err)
		}
	}
}

// FuzzRedo replays mutated records onto an image: it is refused or sound.
func FuzzRedo(f *testing.F) {
	le := binary.LittleEndian
	table := le.AppendUint64(le.AppendUint32([]byte{recordL2}, 0), 5<<12|entryCopied)
	entry := le.AppendUint32(le.AppendUint64([]byte{recordMap}, 3), 2)
	entry = le.AppendUint64(le.AppendUint64(entry, 6<<12|entryCopied), 1<<12)
	f.Add(table, entry)
	f.Add(entry, table)
	f.Fuzz(func(t *testing.T, a, b []byte) {
		p := emptyPowerFile(t, CreateOptions{SizeBytes: 1 << 20, ClusterBits: 12})
		p.now = append(p.now, make([]byte, 10<<12)...)
		binary.BigEndian.PutUint64(p.now[offIncompatible:], incompatDirty)
		prefix := filepath.Join(t.TempDir(), "redo")
		raw := redoSegment(t, a, b)
		if err := os.WriteFile(prefix+".1", raw, 0o600); err != nil {
			t.Fatal(err)
		}
		i, err := openFile(p, "fuzz", prefix, OpenOptions{})
		if err != nil {
			if kind.Of(err) == "" {
				t.Fatalf("an error without a kind: %v", err)
			}
			return
		}
		fuzzRead(t, i)
		if _, err := i.WriteAt(make([]byte, 70000), 5000); err != nil {
			t.Fatal(err)
		}
		if err := i.Close(); err != nil {
			t.Fatal(err)
		}
		if r, err := checkFile(p, prefix); err != nil || !r.Clean {
			t.Fatalf("%+v, %v", r, err)
		}
	})
}
