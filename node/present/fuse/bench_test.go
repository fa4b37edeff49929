package fuse

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/thaw-project/thaw/node/mount"
	"github.com/thaw-project/thaw/node/present"
)

// fio runs one job and returns its operations and MiB per second and its median and
// 99th percentile latency in microseconds.
func fio(b *testing.B, file string, args ...string) (iops, mibs, p50, p99 float64) {
	b.Helper()
	cmd := exec.Command("fio", append([]string{"--name=b", "--filename=" + file, "--output-format=json", "--group_reporting",
		"--ioengine=psync", "--thread", "--allow_file_create=0"}, args...)...)
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		b.Fatalf("fio: %v\n%s", err, out)
	}
	type side struct {
		IOPS float64 `json:"iops"`
		BW   float64 `json:"bw_bytes"`
		Clat struct {
			Percentile map[string]float64 `json:"percentile"`
		} `json:"clat_ns"`
	}
	var report struct {
		Jobs []struct {
			Error int  `json:"error"`
			Read  side `json:"read"`
			Write side `json:"write"`
		} `json:"jobs"`
	}
	if err := json.Unmarshal(out, &report); err != nil || len(report.Jobs) == 0 || report.Jobs[0].Error != 0 {
		b.Fatalf("fio: %v\n%s", err, out)
	}
	s := report.Jobs[0].Read
	if s.IOPS == 0 {
		s = report.Jobs[0].Write
	}
	return s.IOPS, s.BW / (1 << 20), s.Clat.Percentile["50.000000"] / 1e3, s.Clat.Percentile["99.000000"] / 1e3
}

func dropPages(b *testing.B, paths ...string) {
	b.Helper()
	for _, path := range paths {
		f, err := os.Open(path)
		if err != nil {
			b.Fatal(err)
		}
		unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)
		f.Close()
	}
}

const benchFileBytes = 256 << 20

// BenchmarkRead reads a file of random bytes once, through each way to it. The file
// at the bottom is in the page cache, everything above it is not: what is measured
// is the way and not the disk.
func BenchmarkRead(b *testing.B) {
	needFUSE(b)
	needTools(b, "fio", "mkfs.erofs", "mke2fs")
	pl := newPlace(b)
	k := pl.keeper(b)
	defer pl.endKeeper(b, k)
	p := pl.start(b, k)
	ctx := context.Background()
	tree := filepath.Join(pl.base, "tree")
	if err := os.Mkdir(tree, 0o755); err != nil {
		b.Fatal(err)
	}
	raw := pl.file(b, "tree/data", benchFileBytes).Path
	erofs, ext4 := filepath.Join(pl.base, "erofs.img"), filepath.Join(pl.base, "ext4.img")
	run(b, "mkfs.erofs", "--quiet", erofs, tree)
	padTo512(b, erofs)
	run(b, "mke2fs", "-q", "-t", "ext4", "-F", "-d", tree, ext4, "320M")
	for _, warm := range []string{erofs, ext4} {
		run(b, "cat", warm, "/dev/null")
	}
	de := mustPresent(b, p, "erofs", fileSource(erofs), true)
	dx := mustPresent(b, p, "ext4", fileSource(ext4), true)

	type way struct {
		name  string
		under string // the FUSE file, whose pages are dropped
		mount func(target string) error
	}
	loop := func(disk present.Disk, fs, data string, direct bool) func(string) error {
		return func(target string) error {
			l, err := mount.OpenLoop(disk.Path, mount.LoopOptions{ReadOnly: true, DirectIO: direct, AutoClear: true})
			if err != nil {
				return err
			}
			defer l.Close()
			return unix.Mount(l.Name(), target, fs, unix.MS_RDONLY, data)
		}
	}
	for _, w := range []way{
		{"raw", "", nil},
		{"fuse", de.Path, nil},
		{"erofs", de.Path, func(target string) error { return unix.Mount(de.Path, target, "erofs", unix.MS_RDONLY, "") }},
		{"erofs-directio", de.Path, func(target string) error {
			return unix.Mount(de.Path, target, "erofs", unix.MS_RDONLY, "directio")
		}},
		{"erofs-loop-direct", de.Path, loop(de, "erofs", "", true)},
		{"ext4-loop-direct", dx.Path, loop(dx, "ext4", "noload", true)},
		{"ext4-loop-buffered", dx.Path, loop(dx, "ext4", "noload", false)},
	} {
		b.Run(w.name, func(b *testing.B) {
			file := raw
			switch {
			case w.mount != nil:
				target := filepath.Join(pl.base, "mnt")
				os.Mkdir(target, 0o755)
				if err := w.mount(target); err != nil {
					b.Fatal(err)
				}
				defer mount.Unmount(ctx, target)
				file = filepath.Join(target, "data")
			case w.under != "":
				file = w.under
			}
			for _, j := range []struct {
				name string
				args []string
			}{
				{"4k-rand-1", []string{"--rw=randread", "--bs=4k", "--io_size=48m"}},
				{"4k-rand-8", []string{"--rw=randread", "--bs=4k", "--numjobs=8", "--io_size=8m"}},
				{"128k-seq-1", []string{"--rw=read", "--bs=128k"}},
				{"128k-seq-8", []string{"--rw=read", "--bs=128k", "--numjobs=8", "--size=32m", "--offset_increment=32m"}},
			} {
				b.Run(j.name, func(b *testing.B) {
					for range b.N {
						if w.under != "" {
							dropPages(b, w.under)
						}
						if w.mount != nil {
							dropPages(b, file)
						}
						args := append([]string{"--readonly", "--size=" + strconv.Itoa(benchFileBytes)}, j.args...)
						if w.name == "raw" {
							args = append(args, "--invalidate=0")
						}
						iops, mibs, p50, p99 := fio(b, file, args...)
						b.ReportMetric(iops, "IOPS")
						b.ReportMetric(mibs, "MiB/s")
						b.ReportMetric(p50, "p50-us")
						b.ReportMetric(p99, "p99-us")
					}
					b.ReportMetric(0, "ns/op")
				})
			}
		})
	}
	for _, d := range []string{"erofs", "ext4"} {
		if err := p.Withdraw(ctx, d); err != nil {
			b.Error(err)
		}
	}
}

// BenchmarkWrite is a converter that writes 1 MiB at a time, and ext4 read-write on
// a loop device.
func BenchmarkWrite(b *testing.B) {
	needFUSE(b)
	needTools(b, "fio", "mke2fs")
	pl := newPlace(b)
	k := pl.keeper(b)
	defer pl.endKeeper(b, k)
	p := pl.start(b, k)
	ctx := context.Background()
	disk := func(b *testing.B, id string) present.Disk {
		path := filepath.Join(pl.base, id)
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			b.Fatal(err)
		}
		if err := os.Truncate(path, 1<<30); err != nil {
			b.Fatal(err)
		}
		return mustPresent(b, p, id, fileSource(path), false)
	}
	report := func(b *testing.B, iops, mibs, p50, p99 float64) {
		b.ReportMetric(iops, "IOPS")
		b.ReportMetric(mibs, "MiB/s")
		b.ReportMetric(p50, "p50-us")
		b.ReportMetric(p99, "p99-us")
		b.ReportMetric(0, "ns/op")
	}
	for _, direct := range []int{0, 1} {
		b.Run(fmt.Sprintf("raw-1m-direct%d", direct), func(b *testing.B) {
			path := filepath.Join(pl.base, "raw")
			if err := os.WriteFile(path, make([]byte, 256<<20), 0o600); err != nil {
				b.Fatal(err)
			}
			for range b.N {
				i, m, p50, p99 := fio(b, path, "--rw=write", "--bs=1m", "--size=256m", fmt.Sprintf("--direct=%d", direct))
				report(b, i, m, p50, p99)
			}
		})
		b.Run(fmt.Sprintf("fuse-1m-direct%d", direct), func(b *testing.B) {
			d := disk(b, "w"+strconv.Itoa(direct))
			for range b.N {
				i, m, p50, p99 := fio(b, d.Path, "--rw=write", "--bs=1m", "--size=256m", fmt.Sprintf("--direct=%d", direct))
				report(b, i, m, p50, p99)
			}
		})
		b.Run(fmt.Sprintf("ext4-loop-direct%d", direct), func(b *testing.B) {
			d := disk(b, "x"+strconv.Itoa(direct))
			run(b, "mke2fs", "-q", "-t", "ext4", "-F", "-E", "lazy_itable_init=0,nodiscard", filepath.Join(pl.base, d.ID))
			target := filepath.Join(pl.base, "mnt")
			os.Mkdir(target, 0o755)
			l, err := mount.OpenLoop(d.Path, mount.LoopOptions{DirectIO: direct == 1, AutoClear: true})
			if err != nil {
				b.Fatal(err)
			}
			if err := unix.Mount(l.Name(), target, "ext4", 0, ""); err != nil {
				b.Fatal(err)
			}
			l.Close()
			defer mount.Unmount(ctx, target)
			file := filepath.Join(target, "data")
			if err := os.WriteFile(file, make([]byte, 256<<20), 0o600); err != nil {
				b.Fatal(err)
			}
			for range b.N {
				i, m, p50, p99 := fio(b, file, "--rw=write", "--bs=1m", "--size=256m", "--end_fsync=1")
				report(b, i, m, p50, p99)
				i, _, p50, p99 = fio(b, file, "--rw=randwrite", "--bs=4k", "--size=256m", "--io_size=4m", "--fsync=1")
				b.ReportMetric(i, "4k-fsync-IOPS")
				b.ReportMetric(p50, "4k-p50-us")
				b.ReportMetric(p99, "4k-p99-us")
			}
		})
	}
}
