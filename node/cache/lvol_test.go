package cache

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/thaw-project/thaw/lvol"
	"github.com/thaw-project/thaw/lvol/device"
)

// TestLvols puts one cache, which is never emptied, in front of a pool whose lvols are
// written, snapshotted, cloned, resized, merged and deleted at random: what it shows of
// every read-only lvol is what the lvol has. The store promises that owners and
// offsets mean the same bytes for ever, and the cache that it believes no more.
func TestLvols(t *testing.T) {
	var hits uint64
	for _, seed := range seeds(t, 6) {
		hits += lvolRun(t, seed)
	}
	if hits == 0 {
		t.Error("nothing was read from the cache")
	}
}

type pool struct {
	*lvol.Store
	r     *rand.Rand
	names []string
}

func (p *pool) name() string { return p.names[p.r.IntN(len(p.names))] }

func lvolRun(t *testing.T, seed uint64) uint64 {
	r := rand.New(rand.NewPCG(seed, 4))
	dir, err := os.MkdirTemp("/dev/shm", "cache-test-")
	if err != nil {
		dir = t.TempDir()
	}
	defer os.RemoveAll(dir)
	dev := device.NewMem(128 * mib)
	open := func() (device.Device, error) { return dev, nil }
	ok(t, lvol.Create(lvol.CreateOptions{Dir: dir, OpenDevice: open, ClusterBytes: 16 << 10 << r.IntN(4)}))
	s, err := lvol.Open(lvol.Options{Dir: dir, OpenDevice: open, FlushInterval: -1, BallastBytes: -1})
	ok(t, err)
	defer s.Close()
	p := &pool{Store: s, r: r, names: []string{"a", "b", "c", "d", "e", "f"}}
	c := openCache(t, Options{Dir: filepath.Join(dir, "cache"), SizeBytes: 64 * mib, UnitBytes: 4 << 10 << r.IntN(6)})
	defer c.Close()
	for step := range 120 {
		what := p.step()
		list, err := s.List()
		ok(t, err)
		for _, i := range list {
			if !i.ReadOnly {
				continue
			}
			if err := p.compare(c, i); err != nil {
				t.Fatalf("seed %d, after step %d, %s: lvol %s: %v", seed, step, what, i.Name, err)
			}
		}
	}
	return c.Stat().Hits
}

// step does something to the pool. That it works is for others to test.
func (p *pool) step() string {
	a, b := p.name(), p.name()
	size := (p.r.Int64N(2*mib/512) + 1) * 512
	switch p.r.IntN(12) {
	case 0:
		_, _ = p.Create(a, size)
		return "create " + a
	case 1, 2:
		_, _ = p.Snapshot(a, b)
		return "snapshot " + a + " " + b
	case 3, 4:
		_, _ = p.Clone(a, b)
		return "clone " + a + " " + b
	case 5:
		_ = p.Delete(a)
		return "delete " + a
	case 6:
		_, _ = p.Rename(a, b)
		return "rename " + a + " " + b
	case 7:
		_, _ = p.Resize(a, size)
		return "resize " + a
	case 8:
		if p.r.IntN(2) == 0 {
			_, _ = p.Inflate(context.Background(), a)
		} else {
			_, _ = p.Decouple(context.Background(), a)
		}
		return "detach " + a
	case 9:
		_, _ = p.SetReadOnly(a, p.r.IntN(2) == 0)
		return "read-only or not " + a
	}
	l, err := p.OpenLvol(a, false)
	if err != nil {
		return "nothing"
	}
	defer l.Close()
	for range 4 {
		n := min(p.r.Int64N(200<<10)+1, l.SizeBytes())
		q := bytes.Repeat([]byte{byte(p.r.Uint32())}, int(n))
		at := p.r.Int64N(l.SizeBytes() - n + 1)
		if p.r.IntN(4) == 0 {
			_ = l.Discard(at, n)
		} else {
			_, _ = l.WriteAt(q, at)
		}
	}
	return "write " + a
}

func (p *pool) compare(c *Cache, i lvol.Info) error {
	l, err := p.OpenLvol(i.Name, true)
	if err != nil {
		return err
	}
	m := Map{Domain: "pool"}
	for at := int64(0); at < i.SizeBytes; {
		part, err := p.Map(i.Name, at, 1+p.r.IntN(20))
		if err != nil {
			return err
		}
		for _, r := range part.Runs {
			m.Runs = append(m.Runs, Run(r))
		}
		at = part.NextBytes
	}
	want := make([]byte, i.SizeBytes)
	if _, err := l.ReadAt(want, 0); err != nil && err != io.EOF {
		return err
	}
	d, err := c.Device(l, m)
	if err != nil {
		return err
	}
	defer d.Close()
	got := make([]byte, i.SizeBytes)
	parts := []int64{0, i.SizeBytes, p.r.Int64N(i.SizeBytes + 1), p.r.Int64N(i.SizeBytes + 1)}
	slices.Sort(parts)
	for k := range parts[:len(parts)-1] {
		if q := got[parts[k]:parts[k+1]]; len(q) > 0 {
			if _, err := d.ReadAt(q, parts[k]); err != nil {
				return err
			}
		}
	}
	if !bytes.Equal(got, want) {
		return fmt.Errorf("the cache shows other bytes than it has")
	}
	return nil
}
