package erofs

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/pkg/archive"

	"github.com/thaw-project/thaw/image/block"
	"github.com/thaw-project/thaw/image/layer/torture"
)

// smallFiles is a layer of count files of a distribution like a distribution's
// /usr: many small ones.
func smallFiles(count int) []byte {
	var buf bytes.Buffer
	tw := tar.NewWriter(&buf)
	data := torture.Data(1, 64<<10)
	for i := range count {
		if i%50 == 0 {
			if err := tw.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: fmt.Sprintf("usr/share/d%d/", i/50), Mode: 0o755, ModTime: torture.Time.Truncate(time.Second)}); err != nil {
				panic(err)
			}
		}
		size := (i * 7919) % 3000
		if i%20 == 0 {
			size = (i * 104729) % (64 << 10)
		}
		if err := tw.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: fmt.Sprintf("usr/share/d%d/some-file-name-%d", i/50, i), Mode: 0o644, Size: int64(size), ModTime: torture.Time.Truncate(time.Second)}); err != nil {
			panic(err)
		}
		if _, err := tw.Write(data[:size]); err != nil {
			panic(err)
		}
	}
	if err := tw.Close(); err != nil {
		panic(err)
	}
	return buf.Bytes()
}

func BenchmarkApply(b *testing.B) {
	small := smallFiles(20_000)
	for _, bc := range []struct {
		name    string
		entries int
		bytes   int64
		open    func() io.Reader
	}{
		{"small", 20_400, int64(len(small)), func() io.Reader { return bytes.NewReader(small) }},
		{"large", 64, 64 * 16 << 20, func() io.Reader { return torture.Synthetic(64, 16<<20) }},
	} {
		for _, mode := range []block.Mode{block.ModeOverlayfs, block.ModeOverlaybd} {
			b.Run(fmt.Sprintf("erofs/%s/%s", mode, bc.name), func(b *testing.B) {
				b.SetBytes(bc.bytes)
				for b.Loop() {
					b.StopTimer()
					f := newBlock(b, b.TempDir(), options(mode))
					b.StartTimer()
					if err := New().Apply(ctx, f, options(mode), 0, bc.open()); err != nil {
						b.Fatal(err)
					}
					b.StopTimer()
					f.Close()
					os.Remove(f.Name())
					b.StartTimer()
				}
				b.ReportMetric(float64(bc.entries)*float64(b.N)/b.Elapsed().Seconds(), "entries/s")
			})
		}
		b.Run("containerd/"+bc.name, func(b *testing.B) {
			b.SetBytes(bc.bytes)
			for b.Loop() {
				b.StopTimer()
				dir := filepath.Join(b.TempDir(), "x")
				if err := os.Mkdir(dir, 0o755); err != nil {
					b.Fatal(err)
				}
				b.StartTimer()
				if _, err := archive.Apply(ctx, dir, bc.open()); err != nil {
					b.Fatal(err)
				}
				b.StopTimer()
				os.RemoveAll(dir)
				b.StartTimer()
			}
			b.ReportMetric(float64(bc.entries)*float64(b.N)/b.Elapsed().Seconds(), "entries/s")
		})
	}
}

// BenchmarkSecondLayer applies a layer of one file onto 20,000.
func BenchmarkSecondLayer(b *testing.B) {
	small := smallFiles(20_000)
	upper := torture.NewBuilder().File("usr/share/d1/new", []byte("x")).Tar()
	for _, mode := range bothModes {
		b.Run(string(mode), func(b *testing.B) {
			f := newBlock(b, b.TempDir(), options(mode))
			apply(b, f, options(mode), 0, small)
			for i := 1; b.Loop() && i < maxLayers; i++ {
				apply(b, f, options(mode), i, upper)
			}
		})
	}
}

// TestMemory applies a layer of 2 GiB and one of 200,000 entries and bounds how
// much the process grows.
func TestMemory(t *testing.T) {
	if testing.Short() {
		t.Skip("writes 2 GiB")
	}
	for _, tc := range []struct {
		name  string
		count int
		size  int64
		limit uint64
	}{
		{"2 GiB", 32, 64 << 20, 24 << 20},
		{"200,000 entries", 200_000, 500, 170 << 20},
	} {
		t.Run(tc.name, func(t *testing.T) {
			for _, mode := range []block.Mode{block.ModeOverlayfs, block.ModeOverlaybd} {
				f := newBlock(t, t.TempDir(), options(mode))
				peak := measurePeak(func() {
					if err := New().Apply(ctx, f, options(mode), 0, torture.Synthetic(tc.count, tc.size)); err != nil {
						t.Fatal(err)
					}
					if err := New().Apply(ctx, f, options(mode), 1, strings.NewReader("")); err != nil {
						t.Fatal(err)
					}
				})
				t.Logf("%s: heap grew by at most %d KiB", mode, peak>>10)
				if peak > tc.limit {
					t.Errorf("%s: heap grew by %d KiB, more than %d", mode, peak>>10, tc.limit>>10)
				}
			}
		})
	}
}

// measurePeak runs f and returns how far the heap in use grew, sampled often.
func measurePeak(f func()) uint64 {
	defer debug.SetGCPercent(debug.SetGCPercent(20))
	runtime.GC()
	var start, m runtime.MemStats
	runtime.ReadMemStats(&start)
	stop, done := make(chan struct{}), make(chan uint64)
	go func() {
		peak := start.HeapAlloc
		for {
			select {
			case <-stop:
				done <- peak - start.HeapAlloc
				return
			case <-time.After(5 * time.Millisecond):
				runtime.ReadMemStats(&m)
				peak = max(peak, m.HeapAlloc)
			}
		}
	}()
	f()
	close(stop)
	return <-done
}
