package device

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing"

	"github.com/thaw-project/thaw/kind"
)

const testBytes = 4 << 20

func implementations(t testing.TB) map[string]func() Device {
	file := func(open func(string) (Device, error)) func() Device {
		return func() Device {
			path := filepath.Join(t.TempDir(), "data")
			f, err := CreateFile(path, testBytes)
			if err != nil {
				t.Fatal(err)
			}
			f.Close()
			d, err := open(path)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { d.Close() })
			return d
		}
	}
	return map[string]func() Device{
		"file":  file(func(p string) (Device, error) { return OpenFile(p, false) }),
		"uring": file(func(p string) (Device, error) { return OpenUring(p, false, nil) }),
		"mem":   func() Device { return NewMem(testBytes) },
		"fault": func() Device { return NewFault(NewMem(testBytes)) },
		"crash": func() Device { return NewCrash(testBytes) },
	}
}

// TestConformance holds every implementation to the contract of Device.
func TestConformance(t *testing.T) {
	for name, open := range implementations(t) {
		t.Run(name+"/random", func(t *testing.T) { conformRandom(t, open()) })
		t.Run(name+"/bounds", func(t *testing.T) { conformBounds(t, open()) })
		t.Run(name+"/concurrent", func(t *testing.T) { conformConcurrent(t, open()) })
		t.Run(name+"/data", func(t *testing.T) { conformData(t, open()) })
	}
}

func conformRandom(t *testing.T, d Device) {
	seed := rand.Uint64()
	t.Log("seed", seed)
	r := rand.New(rand.NewPCG(seed, 1))
	want := make([]byte, testBytes)
	if d.SizeBytes() != testBytes {
		t.Fatal(d.SizeBytes())
	}
	for range 400 {
		n := r.Int64N(200000)
		if r.IntN(2) == 0 {
			n = n / 512 * 512
		}
		off := r.Int64N(testBytes - n + 1)
		switch r.IntN(5) {
		case 0, 1:
			p := make([]byte, n)
			for i := range p {
				p[i] = byte(r.Uint32())
			}
			if err := d.WriteAt(p, off); err != nil {
				t.Fatal(err)
			}
			copy(want[off:], p)
		case 2:
			if !d.ZeroesOnPunch() {
				continue
			}
			if err := d.Punch(off, n); err != nil {
				t.Fatal(err)
			}
			clear(want[off : off+n])
		case 3:
			if err := d.Sync(); err != nil {
				t.Fatal(err)
			}
		default:
			p := make([]byte, n)
			if err := d.ReadAt(p, off); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(p, want[off:off+n]) {
				t.Fatalf("read of %d at %d differs", n, off)
			}
		}
	}
}

func conformBounds(t *testing.T, d Device) {
	for _, c := range []struct{ off, n int64 }{{-1, 1}, {testBytes, 1}, {testBytes - 1, 2}, {1 << 62, 1}} {
		p := make([]byte, c.n)
		if err := d.ReadAt(p, c.off); kind.Of(err) != kind.Invalid {
			t.Errorf("read %+v: %v", c, err)
		}
		if err := d.WriteAt(p, c.off); kind.Of(err) != kind.Invalid {
			t.Errorf("write %+v: %v", c, err)
		}
		if err := d.Punch(c.off, c.n); kind.Of(err) != kind.Invalid {
			t.Errorf("punch %+v: %v", c, err)
		}
	}
	if err := errors.Join(d.ReadAt(nil, testBytes), d.WriteAt(nil, 0), d.Punch(5, 0), d.ReadAt(make([]byte, 1), testBytes-1)); err != nil {
		t.Error(err)
	}
}

func conformConcurrent(t *testing.T, d Device) {
	const workers = 32
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			base := int64(w) * testBytes / workers
			for i := range 30 {
				p := bytes.Repeat([]byte{byte(w), byte(i)}, 8192)
				if err := d.WriteAt(p, base); err != nil {
					t.Error(err)
					return
				}
				q := make([]byte, len(p))
				if err := d.ReadAt(q, base); err != nil || !bytes.Equal(p, q) {
					t.Errorf("worker %d reads another's data: %v", w, err)
					return
				}
				if i%10 == 0 {
					if err := d.Sync(); err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
	wg.Wait()
}

func conformData(t *testing.T, d Device) {
	m, ok := d.(Mapper)
	if !ok {
		t.Skip("does not map its data")
	}
	if _, _, err := m.NextData(0); err != io.EOF {
		t.Fatalf("a fresh device has data: %v", err)
	}
	one := bytes.Repeat([]byte{1}, 65536)
	for _, off := range []int64{1 << 20, 3 << 20} {
		if err := d.WriteAt(one, off); err != nil {
			t.Fatal(err)
		}
	}
	if s, e, err := m.NextData(0); err != nil || s != 1<<20 || e != 1<<20+65536 {
		t.Fatal(s, e, err)
	}
	if s, _, err := m.NextData(2 << 20); err != nil || s != 3<<20 {
		t.Fatal(s, err)
	}
	if err := d.Punch(0, testBytes); err != nil {
		t.Fatal(err)
	}
	if _, _, err := m.NextData(0); err != io.EOF {
		t.Fatalf("a punched device has data: %v", err)
	}
}

func TestFileIsTakenOnce(t *testing.T) {
	path := filepath.Join(t.TempDir(), "data")
	d, err := CreateFile(path, 4096)
	if err != nil {
		t.Fatal(err)
	}
	d.Close()
	a, err := OpenFile(path, false)
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	if _, err := OpenFile(path, true); kind.Of(err) != kind.InUse {
		t.Fatal(err)
	}
	if _, err := CreateFile(path, 4096); kind.Of(err) != kind.Exists {
		t.Fatal(err)
	}
	if _, err := OpenFile(filepath.Dir(path), true); kind.Of(err) != kind.Invalid {
		t.Fatal(err)
	}
	if err := os.Truncate(path, 100); err != nil {
		t.Fatal(err)
	}
	if err := a.ReadAt(make([]byte, 200), 0); kind.Of(err) != kind.IO {
		t.Fatalf("file became shorter: %v", err)
	}
}

func TestUringIsUsedHere(t *testing.T) {
	path := filepath.Join(t.TempDir(), "data")
	f, err := CreateFile(path, 4096)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	u, err := newUring(f)
	if err != nil {
		t.Skipf("%v; run where io_uring is allowed", err)
	}
	u.exit()
}

func TestFaultRules(t *testing.T) {
	f := NewFault(NewMem(65536))
	f.Inject(Rule{Op: OpWrite, Start: 4096, End: 8192, After: 1, Count: 2, Err: syscall.EIO})
	want := []error{nil, syscall.EIO, syscall.EIO, nil}
	for i, w := range want {
		if err := f.WriteAt([]byte("x"), 0); err != nil {
			t.Fatal("outside the range:", err)
		}
		if err := f.WriteAt(make([]byte, 2), 4095); err != w {
			t.Fatalf("%d: %v, want %v", i, err, w)
		}
	}
	f.Inject(Rule{Op: OpWrite, Err: syscall.ENOSPC, Torn: true})
	if err := f.WriteAt(bytes.Repeat([]byte{7}, 2048), 0); err != syscall.ENOSPC {
		t.Fatal(err)
	}
	p := make([]byte, 2048)
	f.ReadAt(p, 0)
	if p[1023] != 7 || p[1024] != 0 {
		t.Fatal("not torn in the middle")
	}
	f.Heal()
	if err := f.WriteAt(p, 4096); err != nil {
		t.Fatal(err)
	}
}

// TestCrashImages: what was synced is in every image; of the rest each sector is one
// of the contents it had; and the images differ, so they test something.
func TestCrashImages(t *testing.T) {
	d := NewCrash(1 << 20)
	d.WriteAt(bytes.Repeat([]byte{1}, 1<<19), 0)
	d.Sync()
	d.WriteAt(bytes.Repeat([]byte{2}, 1<<18), 0)
	d.WriteAt(bytes.Repeat([]byte{3}, 1<<17), 0)
	d.Punch(1<<18, 1<<17)
	counts := map[byte]int{}
	for seed := range uint64(40) {
		image := d.Image(seed)
		if !bytes.Equal(image, d.Image(seed)) {
			t.Fatal("the same seed gives another image")
		}
		for s := 0; s < len(image); s += SectorBytes {
			v := image[s]
			if !bytes.Equal(image[s:s+SectorBytes], bytes.Repeat([]byte{v}, SectorBytes)) {
				t.Fatal("torn inside a sector")
			}
			allowed := []byte{1}
			switch {
			case s < 1<<17:
				allowed = []byte{1, 2, 3}
			case s < 1<<18:
				allowed = []byte{1, 2}
			case s < 1<<18+1<<17:
				allowed = []byte{1, 0}
			case s >= 1<<19:
				allowed = []byte{0}
			}
			if !bytes.Contains(allowed, []byte{v}) {
				t.Fatalf("sector at %d holds %d", s, v)
			}
			if s < 1<<17 {
				counts[v]++
			}
		}
	}
	if counts[1] == 0 || counts[2] == 0 || counts[3] == 0 {
		t.Fatalf("images are all alike: %v", counts)
	}
}
