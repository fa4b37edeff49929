//go:build ceph

package rbd_test

import (
	"io"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/thaw-project/thaw/target/bdev"
)

// TestObjectSizes measures what the size of objects changes: writing a layer, the first
// writes to a clone of it (each copies an object up), and reading the clone. It decides
// nothing; docs/ceph.md quotes it.
func TestObjectSizes(t *testing.T) {
	const (
		layer = 64 << 20
		block = 4096
	)
	for _, size := range []int64{64 << 10, 256 << 10, 1 << 20, 4 << 20} {
		o := options(t)
		o.ObjectBytes = size
		b := open(t, o)
		defer b.Close()
		if _, err := b.Create("work", 100<<30); err != nil {
			t.Fatal(err)
		}
		d, err := b.OpenLvol("work", false)
		if err != nil {
			t.Fatal(err)
		}
		write := rate(t, 128<<10, layer/(128<<10), func(p []byte, i int) error {
			_, err := d.WriteAt(p, int64(i)*int64(len(p)))
			return err
		})
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
		if _, err := b.Snapshot("work", "layer"); err != nil {
			t.Fatal(err)
		}
		if _, err := b.Clone("layer", "clone"); err != nil {
			t.Fatal(err)
		}
		if d, err = b.OpenLvol("clone", false); err != nil {
			t.Fatal(err)
		}
		random := rand.New(rand.NewPCG(1, uint64(size)))
		copies := rate(t, block, 100, func(p []byte, _ int) error {
			_, err := d.WriteAt(p, random.Int64N(layer/block)*block)
			return err
		})
		reads := rate(t, block, 1000, func(p []byte, _ int) error { return read(d, p, random.Int64N(layer/block)*block) })
		sequential := rate(t, 128<<10, layer/(128<<10), func(p []byte, i int) error { return read(d, p, int64(i)*int64(len(p))) })
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
		t.Logf("objects of %4d KiB: write %6.1f MiB/s, 4 KiB into a clone %6.1f/s, 4 KiB read %6.0f/s, read %6.1f MiB/s",
			size>>10, write/8, copies, reads, sequential/8)
	}
}

func read(d bdev.Device, p []byte, off int64) error {
	n, err := d.ReadAt(p, off)
	if err == io.EOF && n == len(p) {
		err = nil
	}
	return err
}

// rate is how often f runs in a second, one call after the other.
func rate(t *testing.T, length, n int, f func(p []byte, i int) error) float64 {
	t.Helper()
	p := make([]byte, length)
	r := rand.NewChaCha8([32]byte{1})
	_, _ = r.Read(p) // never fails
	begin := time.Now()
	for i := range n {
		if err := f(p, i); err != nil {
			t.Fatal(err)
		}
	}
	return float64(n) / time.Since(begin).Seconds()
}
