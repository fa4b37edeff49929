package cache

import (
	"bytes"
	"encoding/binary"
	"hash/crc32"
	"path/filepath"
	"slices"
	"testing"

	"github.com/thaw-project/thaw/lvol/device"
)

// reseal makes a changed header's checksum match.
func reseal(b []byte) {
	binary.LittleEndian.PutUint32(b[headerBytes-4:], crc32.Checksum(b[:headerBytes-4], castagnoli))
}

// fuzzBytes is the size of the device: of few units, with a hole and a short end.
const fuzzBytes = 192<<10 + 512

// FuzzDecode decodes anything as a header and a record.
func FuzzDecode(f *testing.F) {
	b := make([]byte, recordBytes(DefaultUnitBytes))
	r := record{key: key{1, 2}, bytes: 4096, sums: make([]uint32, DefaultUnitBytes>>blockShift)}
	r.encode(b, 3)
	f.Add(header{unitBytes: DefaultUnitBytes}.encode(), b, uint32(3))
	f.Fuzz(func(t *testing.T, head, rec []byte, slot uint32) {
		if len(head) >= headerBytes {
			reseal(head)
		}
		if h, err := decodeHeader(head); err == nil && !bytes.Equal(header{unitBytes: h.unitBytes}.encode()[:24], head[:24]) {
			t.Errorf("header %x is taken for %+v", head[:24], h)
		}
		b := make([]byte, len(b))
		copy(b, rec)
		binary.LittleEndian.PutUint32(b[len(b)-4:], recordSum(b, slot))
		if !decodeRecord(&r, b, slot, DefaultUnitBytes) {
			return
		}
		if r.bytes < sector || r.bytes > DefaultUnitBytes || r.key == (key{}) {
			t.Errorf("%+v", r)
		}
		again := make([]byte, len(b))
		r.encode(again, slot)
		var q record
		q.sums = make([]uint32, len(r.sums))
		if !decodeRecord(&q, again, slot, DefaultUnitBytes) || q.key != r.key || q.bytes != r.bytes || !slices.Equal(q.sums, r.sums) {
			t.Errorf("%+v becomes %+v", r, q)
		}
		if decodeRecord(&q, again, slot+1, DefaultUnitBytes) {
			t.Error("a record is believed in another slot")
		}
	})
}

// FuzzOpen opens a cache whose files hold anything and reads through it: it shows the
// right bytes, whatever the files say. To get past the checksum the header is sealed and
// so are records, as somebody could who writes to the disk; the data's checksums remain.
func FuzzOpen(f *testing.F) {
	const unit, slots = 4096, minSlots
	rec := recordBytes(unit)
	k := func(n uint64) key {
		l, _ := newLayout(Map{Domain: "store", Runs: image(1, fuzzBytes).runs}, fuzzBytes, unit)
		return key{l.runs[0].owner.hi, l.runs[0].owner.lo + n}
	}
	seed := make([]byte, slots*rec)
	for i := range uint32(slots) {
		r := record{key: k(uint64(i) / 2), bytes: 4096 - int(i)*512%4096, sums: []uint32{i}}
		r.encode(seed[int(i)*rec:(int(i)+1)*rec], i)
	}
	f.Add(header{unitBytes: unit}.encode()[:64], seed, []byte("data"), true)
	f.Add([]byte{}, seed[:100], []byte{}, false)
	f.Fuzz(func(t *testing.T, head, records, data []byte, sealed bool) {
		disks := newDisks(slots*unit, unit)
		b := make([]byte, headerBytes+slots*rec)
		copy(b[:headerBytes], head)
		if sealed {
			reseal(b[:headerBytes])
		}
		copy(b[headerBytes:], records)
		for i := range uint32(slots) {
			if r := b[headerBytes+int(i)*rec:][:rec]; sealed {
				binary.LittleEndian.PutUint32(r[rec-4:], recordSum(r, i))
			}
		}
		disks.index = device.FromImage(append(b, make([]byte, int(disks.index.SizeBytes())-len(b))...))
		ok(t, disks.data.WriteAt(data[:min(len(data), slots*unit)], 0))
		disks.wrap()
		c, err := Open(Options{Dir: filepath.Join(t.TempDir(), "cache"), SizeBytes: slots * unit, UnitBytes: unit, openFile: disks.open, ReadAheadBytes: -1})
		if err != nil {
			return
		}
		defer c.Close()
		wantSound(t, c)
		r := image(1, fuzzBytes)
		d := attach(t, c, r)
		for range 2 {
			readAll(t, d, r, 5000)
		}
		wantSound(t, c)
	})
}
