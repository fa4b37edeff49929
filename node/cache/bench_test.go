package cache

import (
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"
)

const benchBytes = 256 * mib

// benchDevice is a device of which everything is cached, on disk but in the page cache.
func benchDevice(b *testing.B, unit int64) *Device {
	c := openCache(b, Options{Dir: filepath.Join(b.TempDir(), "cache"), SizeBytes: 2 * benchBytes, UnitBytes: unit})
	r := &remote{runs: []Run{{0, benchBytes, true, owner(1)}}}
	d := attach(b, c, r)
	p := make([]byte, mib)
	for at := int64(0); at < benchBytes; at += mib {
		_, err := d.ReadAt(p, at)
		ok(b, err)
	}
	idle(c)
	return d
}

type readerAt interface {
	ReadAt([]byte, int64) (int, error)
}

func benchReads(b *testing.B, d readerAt, n int, parallel bool) {
	b.SetBytes(int64(n))
	b.ReportAllocs()
	work := func(next func() bool) {
		r := rand.New(rand.NewPCG(rand.Uint64(), 1))
		p := make([]byte, n)
		for next() {
			if _, err := d.ReadAt(p, r.Int64N(benchBytes/int64(n))*int64(n)); err != nil {
				b.Error(err)
				return
			}
		}
	}
	if parallel {
		b.RunParallel(func(pb *testing.PB) { work(pb.Next) })
		return
	}
	work(b.Loop)
}

// BenchmarkHit reads at random what is cached, beside reads of a plain file.
func BenchmarkHit(b *testing.B) {
	for _, u := range []struct {
		name string
		unit int64
	}{{"16k", 16 << 10}, {"32k", 32 << 10}, {"64k", 64 << 10}} {
		d := benchDevice(b, u.unit)
		b.Run("unit="+u.name+"/4k", func(b *testing.B) { benchReads(b, d, 4<<10, false) })
		b.Run("unit="+u.name+"/4k-parallel", func(b *testing.B) { benchReads(b, d, 4<<10, true) })
		b.Run("unit="+u.name+"/128k", func(b *testing.B) { benchReads(b, d, 128<<10, false) })
		ok(b, d.Close())
	}
	f, err := os.Create(filepath.Join(b.TempDir(), "plain"))
	ok(b, err)
	defer f.Close()
	p := make([]byte, mib)
	content(owner(1), p, 0)
	for at := int64(0); at < benchBytes; at += mib {
		_, err := f.WriteAt(p, at)
		ok(b, err)
	}
	b.Run("file/4k", func(b *testing.B) { benchReads(b, f, 4<<10, false) })
	b.Run("file/4k-parallel", func(b *testing.B) { benchReads(b, f, 4<<10, true) })
	b.Run("file/128k", func(b *testing.B) { benchReads(b, f, 128<<10, false) })
}

// BenchmarkMiss fetches from a remote that costs nothing but a copy: what the cache adds
// to a read over the network, eviction included.
func BenchmarkMiss(b *testing.B) {
	c := openCache(b, Options{Dir: filepath.Join(b.TempDir(), "cache"), SizeBytes: 32 * mib, ReadAheadBytes: -1})
	d, err := c.Device(still{}, Map{Domain: "store", Runs: []Run{{0, still{}.SizeBytes(), true, owner(1)}}})
	ok(b, err)
	b.Run("32k", func(b *testing.B) { benchReads(b, at{d, new(int64)}, 32<<10, false) })
	b.Run("1m", func(b *testing.B) { benchReads(b, at{d, new(int64)}, mib, false) })
}

// at reads on, wherever it is told to.
type at struct {
	d    *Device
	next *int64
}

func (a at) ReadAt(p []byte, _ int64) (int, error) {
	*a.next = (*a.next + int64(len(p))) % (a.d.SizeBytes() - mib)
	return a.d.ReadAt(p, *a.next)
}

// still is a remote whose bytes nobody looks at.
type still struct{ *remote }

func (still) SizeBytes() int64                      { return 1 << 40 }
func (still) ReadAt(p []byte, _ int64) (int, error) { return len(p), nil }
func (still) Close() error                          { return nil }

// BenchmarkOpen opens a cache of 10 GiB with nothing in it, or 1 GiB.
func BenchmarkOpen(b *testing.B) {
	for _, u := range []struct {
		name string
		fill int64
	}{{"empty", 0}, {"1GiB", 1 << 30}} {
		b.Run(u.name, func(b *testing.B) {
			o := Options{Dir: filepath.Join(b.TempDir(), "cache"), SizeBytes: 10 << 30, ReadAheadBytes: -1}
			c := openCache(b, o)
			d, err := c.Device(still{}, Map{Domain: "store", Runs: []Run{{0, still{}.SizeBytes(), true, owner(1)}}})
			ok(b, err)
			p := make([]byte, mib)
			for at := int64(0); at < u.fill; at += mib {
				_, err := d.ReadAt(p, at)
				ok(b, err)
			}
			ok(b, c.Close())
			for b.Loop() {
				c, err := Open(o)
				ok(b, err)
				ok(b, c.Close())
			}
		})
	}
}

// link is a remote behind a line of that rate and round trip, which one read after the
// other crosses.
type link struct {
	still
	mu        sync.Mutex
	free      time.Time // guarded by mu: when the line is free again
	perByte   time.Duration
	roundTrip time.Duration
}

func (l *link) ReadAt(p []byte, _ int64) (int, error) {
	l.mu.Lock()
	if now := time.Now(); l.free.Before(now) {
		l.free = now
	}
	l.free = l.free.Add(time.Duration(len(p)) * l.perByte)
	until := l.free.Add(l.roundTrip)
	l.mu.Unlock()
	time.Sleep(time.Until(until))
	return len(p), nil
}

// BenchmarkReadAhead reads in sequence, 128 KiB at a time, over 1 Gbit/s and 1 ms.
func BenchmarkReadAhead(b *testing.B) {
	for _, u := range []struct {
		name  string
		bytes int64
	}{{"off", -1}, {"on", 0}} {
		b.Run(u.name, func(b *testing.B) {
			c := openCache(b, Options{Dir: filepath.Join(b.TempDir(), "cache"), SizeBytes: 32 * mib, ReadAheadBytes: u.bytes})
			d, err := c.Device(&link{perByte: 8 * time.Nanosecond, roundTrip: time.Millisecond}, Map{Domain: "store", Runs: []Run{{0, still{}.SizeBytes(), true, owner(1)}}})
			ok(b, err)
			benchReads(b, at{d, new(int64)}, 128<<10, false)
		})
	}
}
