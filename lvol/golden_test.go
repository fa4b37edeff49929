package lvol

import (
	"bytes"
	"compress/gzip"
	"flag"
	"io"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/thaw-project/thaw/lvol/device"
)

var goldenFlag = flag.Bool("golden", false, "write the golden pool of the format anew")

const goldenCapacity = 4 << 20

// goldenContent is what each lvol of the golden pool reads as.
func goldenContent() map[string][]byte {
	base := make([]byte, 1<<20)
	copy(base[4096:], bytes.Repeat([]byte("base"), 20000))
	leaf := bytes.Clone(base)
	copy(leaf[70000:], "changed in the leaf")
	clear(leaf[0:65536])
	copy(leaf[900000:], "new in the leaf")
	frozen := make([]byte, 5<<20)
	copy(frozen[4<<20+100:], "in the second page")
	return map[string][]byte{"base": base, "leaf": leaf, "frozen": frozen}
}

func writeGolden(t *testing.T, to string) {
	dir := filepath.Join(t.TempDir(), "pool")
	mem := device.NewMem(goldenCapacity)
	open := func() (device.Device, error) { return mem, nil }
	now := func() time.Time { return time.Unix(1700000000, 0) }
	ok(t, Create(CreateOptions{Dir: dir, OpenDevice: open, Now: now, Name: "golden"}))
	s := openPool(t, dir, func(o *Options) { o.OpenDevice, o.Now = open, now })
	c := goldenContent()
	must[Info](t)(s.Create("leaf", 1<<20))
	l := openLvol(t, s, "leaf", false)
	write(t, l, 4096, bytes.Repeat([]byte("base"), 20000))
	must[Info](t)(s.Snapshot("leaf", "base"))
	write(t, l, 70000, []byte("changed in the leaf"))
	ok(t, l.Discard(0, 65536))
	write(t, l, 900000, []byte("new in the leaf"))
	must[Info](t)(s.Create("frozen", 5<<20))
	f := openLvol(t, s, "frozen", false)
	write(t, f, 4<<20+100, []byte("in the second page"))
	ok(t, f.Close())
	must[Info](t)(s.SetReadOnly("frozen", true))
	if !bytes.Equal(read(t, l, 0, 1<<20), c["leaf"]) {
		t.Fatal("the golden pool is not what it should be")
	}
	ok(t, s.Close())
	ok(t, os.MkdirAll(to, 0o755))
	pack := func(name string, data []byte) {
		var b bytes.Buffer
		z := gzip.NewWriter(&b)
		z.Write(data)
		ok(t, z.Close())
		ok(t, os.WriteFile(filepath.Join(to, name+".gz"), b.Bytes(), 0o644))
	}
	raw := make([]byte, goldenCapacity)
	ok(t, mem.ReadAt(raw, 0))
	pack("data", raw)
	raw, err := os.ReadFile(filepath.Join(dir, "meta.db"))
	ok(t, err)
	pack("meta.db", raw)
}

func unpackGolden(t *testing.T, from, dir string) *device.Mem {
	unpack := func(name string) []byte {
		p, err := os.ReadFile(filepath.Join(from, name+".gz"))
		ok(t, err)
		z, err := gzip.NewReader(bytes.NewReader(p))
		ok(t, err)
		raw, err := io.ReadAll(z)
		ok(t, err)
		return raw
	}
	ok(t, os.MkdirAll(dir, 0o700))
	ok(t, os.WriteFile(filepath.Join(dir, "meta.db"), unpack("meta.db"), 0o600))
	mem := device.NewMem(goldenCapacity)
	ok(t, mem.WriteAt(unpack("data"), 0))
	return mem
}
