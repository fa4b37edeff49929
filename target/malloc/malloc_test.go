package malloc

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"testing"

	"github.com/thaw-project/thaw/kind"
)

// TestModel does random accesses to a device and to a slice.
func TestModel(t *testing.T) {
	const size = 1<<20 + 512
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 1))
	d, err := New(size)
	if err != nil {
		t.Fatal(err)
	}
	model := make([]byte, size)
	for range 2000 {
		off := r.Int64N(size)
		n := r.Int64N(min(size-off, 200<<10) + 1)
		switch r.IntN(4) {
		case 0:
			p := bytes.Repeat([]byte{byte(r.Uint32())}, int(n))
			if _, err := d.WriteAt(p, off); err != nil {
				t.Fatal(err)
			}
			copy(model[off:], p)
		case 1:
			err = errors.Join(d.Discard(off, n), err)
			clear(model[off : off+n])
		case 2:
			err = errors.Join(d.WriteZeroes(off, n), err)
			clear(model[off : off+n])
		case 3:
			got := make([]byte, n)
			if m, err := d.ReadAt(got, off); int64(m) != n || err != nil || !bytes.Equal(got, model[off:off+n]) {
				t.Fatalf("read %d at %d: %d, %v, or not what was written", n, off, m, err)
			}
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	if n, err := d.ReadAt(make([]byte, 1024), size-512); n != 512 || err != io.EOF {
		t.Errorf("read over the end: %d %v", n, err)
	}
	if _, err := d.WriteAt(make([]byte, 1024), size-512); !errors.Is(err, kind.Invalid) {
		t.Errorf("write over the end: %v", err)
	}
	if _, err := d.ReadAt(make([]byte, 1), -1); !errors.Is(err, kind.Invalid) {
		t.Errorf("read before the start: %v", err)
	}
	if err := errors.Join(d.Close(), d.Close()); err != nil {
		t.Fatal(err)
	}
	if _, err := d.ReadAt(make([]byte, 1), 0); !errors.Is(err, kind.Unavailable) {
		t.Errorf("read after Close: %v", err)
	}
}

func TestSizes(t *testing.T) {
	for _, size := range []int64{0, -512, 513, MaxBytes + 512} {
		if _, err := New(size); !errors.Is(err, kind.Invalid) {
			t.Errorf("%d bytes: %v", size, err)
		}
	}
	d, err := New(1 << 40) // costs what is written
	if err != nil {
		t.Skipf("this machine does not map 1 TiB: %v", err)
	}
	defer d.Close()
	if _, err := d.WriteAt([]byte{1}, 1<<40-1); err != nil {
		t.Error(err)
	}
}
