package lvol

import (
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"testing"

	"github.com/thaw-project/thaw/lvol/device"
)

const benchBytes = 256 << 20

// rawDevice is a plain file of benchBytes, filled, through the same device code.
func rawDevice(b *testing.B, uring bool) device.Device {
	path := filepath.Join(b.TempDir(), "raw")
	f, err := device.CreateFile(path, benchBytes)
	ok(b, err)
	p := pattern(1, 1<<20)
	for off := int64(0); off < benchBytes; off += 1 << 20 {
		ok(b, f.WriteAt(p, off))
	}
	ok(b, f.Sync())
	ok(b, f.Close())
	var d device.Device
	if uring {
		d, err = device.OpenUring(path, false, nil)
	} else {
		d, err = device.OpenFile(path, false)
	}
	ok(b, err)
	b.Cleanup(func() { d.Close() })
	return d
}

func benchLvol(b *testing.B, uring bool) *Lvol {
	s := newPool(b, 3*benchBytes, 0, func(o *Options) { o.Uring, o.FlushInterval = uring, 0 })
	must[Info](b)(s.Create("a", benchBytes))
	l := openLvol(b, s, "a", false)
	p := pattern(1, 1<<20)
	for off := int64(0); off < benchBytes; off += 1 << 20 {
		write(b, l, off, p)
	}
	ok(b, l.Flush())
	return l
}

// BenchmarkIO measures an lvol next to the raw file, everything in the page cache:
// what is left is the cost of the code. "immutable" is a snapshot, which is read
// without locks.
func BenchmarkIO(b *testing.B) {
	for _, dev := range []string{"file", "uring"} {
		raw := rawDevice(b, dev == "uring")
		l := benchLvol(b, dev == "uring")
		must[Info](b)(l.s.Snapshot("a", "snap"))
		snap := openLvol(b, l.s, "snap", true)
		p := pattern(1, 1<<20) // the writable one owns its clusters again
		for off := int64(0); off < benchBytes; off += 1 << 20 {
			write(b, l, off, p)
		}
		ok(b, l.Flush())
		type target struct {
			name  string
			read  func([]byte, int64) error
			write func([]byte, int64) error
		}
		lread := func(l *Lvol) func([]byte, int64) error {
			return func(p []byte, off int64) error { _, err := l.ReadAt(p, off); return err }
		}
		for _, t := range []target{
			{"raw", raw.ReadAt, raw.WriteAt},
			{"lvol", lread(l), func(p []byte, off int64) error { _, err := l.WriteAt(p, off); return err }},
			{"immutable", lread(snap), nil},
		} {
			for _, k := range []struct {
				name   string
				size   int64
				random bool
			}{{"rand4k", 4096, true}, {"seq128k", 128 << 10, false}} {
				do := func(op func([]byte, int64) error) func(*testing.B) {
					return func(b *testing.B) {
						r := rand.New(rand.NewPCG(1, 2))
						p := pattern(2, int(k.size))
						b.SetBytes(k.size)
						b.ReportAllocs()
						off := int64(0)
						for b.Loop() {
							if k.random {
								off = r.Int64N(benchBytes/k.size) * k.size
							} else if off += k.size; off >= benchBytes {
								off = 0
							}
							if err := op(p, off); err != nil {
								b.Fatal(err)
							}
						}
					}
				}
				b.Run(fmt.Sprintf("read/%s/%s/%s", k.name, dev, t.name), do(t.read))
				if t.write != nil {
					b.Run(fmt.Sprintf("write/%s/%s/%s", k.name, dev, t.name), do(t.write))
				}
			}
		}
		ok(b, l.s.Close())
	}
}

// BenchmarkFreshWrite writes to clusters that must be allocated: the lvol is
// discarded whenever it is full.
func BenchmarkFreshWrite(b *testing.B) {
	for _, size := range []int64{4096, 64 << 10, 1 << 20} {
		b.Run(fmt.Sprint(size), func(b *testing.B) {
			l := benchLvol(b, false)
			p := pattern(2, int(size))
			b.SetBytes(size)
			off := int64(benchBytes)
			for b.Loop() {
				if off >= benchBytes {
					b.StopTimer()
					ok(b, l.Discard(0, benchBytes))
					ok(b, l.Flush())
					off = 0
					b.StartTimer()
				}
				if _, err := l.WriteAt(p, off); err != nil {
					b.Fatal(err)
				}
				off += max(size, 64<<10)
			}
		})
	}
}

// BenchmarkFlush is one 4 KiB write and a flush, from one and from eight writers.
func BenchmarkFlush(b *testing.B) {
	for _, writers := range []int{1, 8} {
		b.Run(fmt.Sprint(writers), func(b *testing.B) {
			l := benchLvol(b, false)
			p := pattern(2, 4096)
			b.SetParallelism(writers)
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					if _, err := l.WriteAt(p, rand.Int64N(benchBytes/4096)*4096); err != nil {
						b.Error(err)
						return
					}
					if err := l.Flush(); err != nil {
						b.Error(err)
						return
					}
				}
			})
		})
	}
}

// BenchmarkOpenChain opens a pool with a chain of 128 snapshots of 32 MiB each.
func BenchmarkOpenChain(b *testing.B) {
	s := newPool(b, 6<<30, 0, nil)
	must[Info](b)(s.Create("top", 4<<30))
	l := openLvol(b, s, "top", false)
	p := pattern(1, 1<<20)
	for i := range int64(128) {
		for k := range int64(32) {
			write(b, l, i*32<<20+k<<20, p)
		}
		must[Info](b)(s.Snapshot("top", fmt.Sprint("s", i)))
	}
	o := s.o
	ok(b, s.Close())
	for b.Loop() {
		s, err := Open(o)
		ok(b, err)
		ok(b, s.Close())
	}
}

// BenchmarkClone clones (and deletes) an lvol of 1 GiB, all of it allocated.
func BenchmarkClone(b *testing.B) {
	s := newPool(b, 2<<30, 0, nil)
	must[Info](b)(s.Create("a", 1<<30))
	l := openLvol(b, s, "a", false)
	p := pattern(1, 1<<20)
	for off := int64(0); off < 1<<30; off += 1 << 20 {
		write(b, l, off, p)
	}
	must[Info](b)(s.Snapshot("a", "snap"))
	for i := 0; b.Loop(); i++ {
		must[Info](b)(s.Clone("snap", fmt.Sprint("c", i)))
		b.StopTimer()
		ok(b, s.Delete(fmt.Sprint("c", i)))
		b.StartTimer()
	}
}
