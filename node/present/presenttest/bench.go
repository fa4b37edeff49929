package presenttest

import (
	"cmp"
	"context"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Benchmark measures reads and writes of a presented file past the page cache, from
// outside of the process that serves it. In a guest whose processors are emulated by one
// thread, the time of an operation is all the processor time it takes in all processes and
// the kernel together.
func Benchmark(b *testing.B, s Subject) {
	if s.Source == nil {
		s.Source = DefaultSource
	}
	s.ImageBytes = cmp.Or(s.ImageBytes, 64<<20)
	dir := b.TempDir()
	h := startHost(b, filepath.Join(dir, "run"))
	ctx := context.Background()
	open := func(name string, readOnly bool) *user {
		path := filepath.Join(dir, name)
		data := make([]byte, s.ImageBytes)
		fill(data, 1)
		if err := os.WriteFile(path, data, 0o600); err != nil {
			b.Fatal(err)
		}
		d, err := h.Present(ctx, name, s.Source(path, readOnly), readOnly)
		if err != nil {
			b.Fatal(err)
		}
		flags := unix.O_RDWR
		if readOnly {
			flags = unix.O_RDONLY
		}
		f, err := openDisk(d.Path, flags|unix.O_DIRECT)
		if err != nil {
			b.Fatal(err)
		}
		return f
	}
	ro := open("ro", true)
	measure := func(name string, f *user, write bool, blockBytes, depth int, sequential bool) {
		b.Run(name, func(b *testing.B) {
			b.SetBytes(int64(blockBytes))
			var next atomic.Int64
			var wg sync.WaitGroup
			blocks := s.ImageBytes / blockBytes
			for i := range depth {
				buf := aligned(blockBytes)
				r := rand.New(rand.NewPCG(uint64(i), 9))
				wg.Go(func() {
					for {
						n := next.Add(1)
						if n > int64(b.N) {
							return
						}
						at := r.IntN(blocks)
						if sequential {
							at = int(n) % blocks
						}
						var err error
						if write {
							_, err = f.WriteAt(buf, int64(at)*int64(blockBytes))
						} else {
							_, err = f.ReadAt(buf, int64(at)*int64(blockBytes))
						}
						if err != nil {
							b.Error(err)
							return
						}
					}
				})
			}
			wg.Wait()
		})
	}
	measure("read-4k-qd1", ro, false, 4<<10, 1, false)
	measure("read-4k-qd8", ro, false, 4<<10, 8, false)
	measure("read-128k-sequential-qd4", ro, false, 128<<10, 4, true)
	ro.close()
	if !s.ReadOnlyOnly {
		rw := open("rw", false)
		measure("write-4k-qd1", rw, true, 4<<10, 1, false)
		measure("write-4k-qd8", rw, true, 4<<10, 8, false)
		rw.close()
	}
	if err := h.teardown(); err != nil {
		b.Error(err)
	}
}

// aligned returns memory as direct I/O wants it.
func aligned(n int) []byte {
	b := make([]byte, n+4096)
	skip := -int(uintptr(unsafe.Pointer(unsafe.SliceData(b)))) & 4095
	return b[skip:][:n]
}
