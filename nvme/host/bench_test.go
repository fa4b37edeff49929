package host_test

import (
	"fmt"
	"io"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/thaw-project/thaw/nvme/host"
	"github.com/thaw-project/thaw/target/nvmf"
)

// The benchmarks run target and host in one process over loopback: one operation is
// 4 KiB at a random place of a device in memory, or 128 KiB for the Large ones.
// Allocations are those of both sides.
func BenchmarkRead(b *testing.B)       { benchmark(b, 4096, false, 1, 8, 32) }
func BenchmarkWrite(b *testing.B)      { benchmark(b, 4096, true, 1, 8, 32) }
func BenchmarkLargeRead(b *testing.B)  { benchmark(b, 128<<10, false, 8) }
func BenchmarkLargeWrite(b *testing.B) { benchmark(b, 128<<10, true, 8) }

func benchmark(b *testing.B, block int64, write bool, depths ...int) {
	for _, inline := range []bool{true, false} {
		for _, depth := range depths {
			b.Run(fmt.Sprintf("inline=%t/qd=%d", inline, depth), func(b *testing.B) {
				const size = 64 << 20
				l := newLab(b, nvmf.Options{})
				id := l.add(nvmf.NvmeNamespaceConfig{Device: newMemory(size), Inline: inline})
				d := l.open(l.connect(host.Config{Depth: 64}), id)
				b.SetBytes(block)
				b.ReportAllocs()
				b.ResetTimer()
				var wg sync.WaitGroup
				var left atomic.Int64
				left.Store(int64(b.N))
				for g := range depth {
					wg.Add(1)
					go func() {
						defer wg.Done()
						rng := rand.New(rand.NewPCG(uint64(g), 1))
						p := make([]byte, block)
						for left.Add(-1) >= 0 {
							off := rng.Int64N(size/block) * block
							var err error
							if write {
								_, err = d.WriteAt(p, off)
							} else {
								_, err = d.ReadAt(p, off)
							}
							if err != nil && err != io.EOF {
								b.Error(err)
								return
							}
						}
					}()
				}
				wg.Wait()
			})
		}
	}
}
