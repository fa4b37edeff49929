package qcow2

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"testing"
	"time"
)

const benchBytes = 1 << 30

// benchDisk makes an image of benchBytes over a base as large, every second MiB of the
// image written, and the same content as a raw file. The page cache holds all of it.
func benchDisk(b *testing.B) (path, base string, o OpenOptions) {
	b.Helper()
	dir := b.TempDir()
	path, base = filepath.Join(dir, "rw.qcow2"), filepath.Join(dir, "base.raw")
	f, err := os.Create(base)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { f.Close() })
	chunk := make([]byte, 1<<20)
	fillRandom(newRand(1), chunk)
	for off := int64(0); off < benchBytes; off += 1 << 20 {
		if _, err := f.WriteAt(chunk, off); err != nil {
			b.Fatal(err)
		}
	}
	if err := Create(path, CreateOptions{SizeBytes: benchBytes, BackingFile: base, LazyRefcounts: true}); err != nil {
		b.Fatal(err)
	}
	o = OpenOptions{Backing: f, BackingSizeBytes: benchBytes}
	i, err := Open(path, o)
	if err != nil {
		b.Fatal(err)
	}
	for off := int64(0); off < benchBytes; off += 2 << 20 {
		if _, err := i.WriteAt(chunk, off); err != nil {
			b.Fatal(err)
		}
	}
	if err := i.Close(); err != nil {
		b.Fatal(err)
	}
	return path, base, o
}

// BenchmarkImage compares with the raw base file, accessed the same way.
func BenchmarkImage(b *testing.B) {
	path, base, o := benchDisk(b)
	raw, err := os.OpenFile(base, os.O_RDWR, 0)
	if err != nil {
		b.Fatal(err)
	}
	defer raw.Close()
	i, err := Open(path, o)
	if err != nil {
		b.Fatal(err)
	}
	defer i.Close()
	r := newRand(2)
	written := func() int64 { return r.Int64N(benchBytes/(2<<20))*(2<<20) + r.Int64N(256)*4096 }
	based := func() int64 { return written() + 1<<20 }
	run := func(name string, n int, next func() int64, access func(p []byte, off int64) (int, error)) {
		b.Run(name, func(b *testing.B) {
			p := make([]byte, n)
			b.SetBytes(int64(n))
			b.ReportAllocs()
			for b.Loop() {
				if _, err := access(p, next()); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
	sequence := func() func() int64 {
		at := int64(-128 << 10)
		return func() int64 { at = (at + 128<<10) % benchBytes; return at }
	}
	run("read4k/raw", 4096, written, raw.ReadAt)
	run("read4k/data", 4096, written, i.ReadAt)
	run("read4k/base", 4096, based, i.ReadAt)
	run("read128k-seq/raw", 128<<10, sequence(), raw.ReadAt)
	run("read128k-seq/image", 128<<10, sequence(), i.ReadAt)
	run("write4k/raw", 4096, written, raw.WriteAt)
	run("write4k/in-place", 4096, written, i.WriteAt)
	run("write4k/first", 4096, based, i.WriteAt) // 8192 clusters, then in place too
	run("write128k-seq/raw", 128<<10, sequence(), raw.WriteAt)
	run("write128k-seq/image", 128<<10, sequence(), i.WriteAt)
}

// BenchmarkFirstWrite writes into each cluster once: allocation, copy on write, redo
// record; and the same pattern into a raw sparse file.
func BenchmarkFirstWrite(b *testing.B) {
	const disk = 256 << 20
	for _, n := range []int{4096, 65536, 1 << 20} {
		for _, format := range []string{"raw", "image"} {
			b.Run(fmt.Sprintf("%dk/%s", n>>10, format), func(b *testing.B) {
				dir := b.TempDir()
				backing, err := os.Create(filepath.Join(dir, "base"))
				if err != nil {
					b.Fatal(err)
				}
				defer backing.Close()
				if err := backing.Truncate(disk); err != nil {
					b.Fatal(err)
				}
				b.SetBytes(int64(n))
				var d interface {
					WriteAt(p []byte, off int64) (int, error)
				}
				stop := func() error { return nil }
				p := make([]byte, n)
				at := int64(disk)
				path := filepath.Join(dir, "top")
				for b.Loop() {
					if at >= disk {
						b.StopTimer()
						if err := stop(); err != nil {
							b.Fatal(err)
						}
						os.Remove(path)
						if format == "raw" {
							f, err := os.Create(path)
							if err != nil {
								b.Fatal(err)
							}
							d, stop = f, f.Close
						} else {
							if err := Create(path, CreateOptions{SizeBytes: disk, BackingFile: "base", LazyRefcounts: true}); err != nil {
								b.Fatal(err)
							}
							i, err := Open(path, OpenOptions{Backing: backing, BackingSizeBytes: disk})
							if err != nil {
								b.Fatal(err)
							}
							d, stop = i, i.Abandon
						}
						at = 0
						b.StartTimer()
					}
					if _, err := d.WriteAt(p, at); err != nil {
						b.Fatal(err)
					}
					at += max(int64(n), 65536)
				}
				if err := stop(); err != nil {
					b.Fatal(err)
				}
			})
		}
	}
}

// BenchmarkLife is what a container costs beside its I/O: create, open, one write and
// flush, close.
func BenchmarkLife(b *testing.B) {
	dir := b.TempDir()
	var spent [4]time.Duration
	n := 0
	for b.Loop() {
		path := filepath.Join(dir, fmt.Sprint(n))
		n++
		start := time.Now()
		step := func(k int) { spent[k] += time.Since(start); start = time.Now() }
		if err := Create(path, CreateOptions{SizeBytes: 100 << 30, LazyRefcounts: true}); err != nil {
			b.Fatal(err)
		}
		step(0)
		i, err := Open(path, OpenOptions{})
		if err != nil {
			b.Fatal(err)
		}
		step(1)
		if _, err := i.WriteAt(make([]byte, 4096), 1<<20); err != nil {
			b.Fatal(err)
		}
		if err := i.Flush(); err != nil {
			b.Fatal(err)
		}
		step(2)
		if err := i.Close(); err != nil {
			b.Fatal(err)
		}
		step(3)
	}
	for k, name := range []string{"create", "open", "write+flush", "close"} {
		b.ReportMetric(float64(spent[k].Microseconds())/float64(n), name+"-µs")
	}
}

// BenchmarkQemu is qemu-img bench on the same kind of image, one request at a time.
func BenchmarkQemu(b *testing.B) {
	needQemu(b)
	path, base, _ := benchDisk(b)
	took := regexp.MustCompile(`completed in ([0-9.]+) seconds`)
	for _, c := range []struct {
		name, format, file string
		args               []string
		n                  int
	}{
		// Steps of 4 MiB and 4 KiB meet data of the image; qemu-img knows no random offsets.
		{"read4k/raw", "raw", base, []string{"-s", "4096", "-S", "4198400"}, 4096},
		{"read4k/data", "qcow2", path, []string{"-s", "4096", "-S", "4198400"}, 4096},
		{"read4k/base", "qcow2", path, []string{"-s", "4096", "-S", "4198400", "-o", "1048576"}, 4096},
		{"read128k-seq/image", "qcow2", path, []string{"-s", "131072"}, 131072},
		{"write4k/in-place", "qcow2", path, []string{"-w", "-s", "4096", "-S", "4198400"}, 4096},
		{"write128k-seq/image", "qcow2", path, []string{"-w", "-s", "131072"}, 131072},
	} {
		b.Run(c.name, func(b *testing.B) {
			const count = 20000
			var ns float64
			n := 0
			for b.Loop() {
				args := append([]string{"bench", "-f", c.format, "-d", "1", "-c", strconv.Itoa(count)}, append(c.args, c.file)...)
				out, err := exec.Command("qemu-img", args...).CombinedOutput()
				m := took.FindSubmatch(out)
				if err != nil || m == nil {
					b.Fatalf("%v: %s", err, out)
				}
				seconds, err := strconv.ParseFloat(string(m[1]), 64)
				if err != nil {
					b.Fatal(err)
				}
				ns += seconds * 1e9 / count
				n++
			}
			b.ReportMetric(ns/float64(n), "ns/request")
			b.ReportMetric(float64(c.n)/(ns/float64(n))*1e3, "MB/s")
			b.ReportMetric(0, "ns/op")
		})
	}
}

// TestMemoryOfManyImages: of 50 images open at once the idle ones hold next to nothing,
// and one that was written all over at most 2 MiB.
func TestMemoryOfManyImages(t *testing.T) {
	const images, busy, disk = 50, 8, int64(100) << 30
	heap := func() uint64 {
		runtime.GC()
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapInuse
	}
	dir := t.TempDir()
	var open []*Image
	before := heap()
	for n := range images {
		path := filepath.Join(dir, fmt.Sprint(n))
		if err := Create(path, CreateOptions{SizeBytes: disk, LazyRefcounts: true}); err != nil {
			t.Fatal(err)
		}
		i, err := Open(path, OpenOptions{})
		if err != nil {
			t.Fatal(err)
		}
		open = append(open, i)
	}
	idle := heap()
	for _, i := range open[:busy] {
		// A write in each of 300 slices: more than the cache of 256 holds.
		for k := range int64(300) {
			if _, err := i.WriteAt(make([]byte, 512), k*(32<<20)); err != nil {
				t.Fatal(err)
			}
		}
	}
	full := heap()
	perIdle, perFull := int64(idle-before)/images, int64(full-idle)/busy
	t.Logf("an idle image holds %d KiB, one with a full cache %d KiB", perIdle>>10, perFull>>10)
	if perIdle > 64<<10 || perFull > 2<<20 {
		t.Errorf("an idle image holds %d bytes, one with a full cache %d", perIdle, perFull)
	}
	for _, i := range open {
		if err := i.Abandon(); err != nil {
			t.Fatal(err)
		}
	}
}
