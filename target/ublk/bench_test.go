package ublk

import (
	"context"
	"log/slog"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/thaw-project/thaw/target/malloc"
)

// BenchmarkKernelRead reads 4 KiB from memory through the block device, one read at a time,
// for each way that requests are handled. Allocations are those of server and reader.
func BenchmarkKernelRead(b *testing.B) {
	if err := Probe(); err != nil {
		b.Skipf("no ublk here: %v", err)
	}
	for name, how := range map[string]dispatch{"adaptive": adaptive, "by-queue": byQueue, "by-workers": byWorkers} {
		b.Run(name, func(b *testing.B) {
			d, err := malloc.New(testBytes)
			if err != nil {
				b.Fatal(err)
			}
			defer d.Close()
			s, err := New(Options{Device: d, ID: -1, dispatch: how, Logger: slog.New(slog.DiscardHandler)})
			if err != nil {
				b.Fatal(err)
			}
			defer s.Stop(context.Background())
			if err := s.Start(context.Background()); err != nil {
				b.Fatal(err)
			}
			fd, err := unix.Open(s.Path(), unix.O_RDONLY|unix.O_DIRECT|unix.O_CLOEXEC, 0)
			if err != nil {
				b.Fatal(&os.PathError{Op: "open", Path: s.Path(), Err: err})
			}
			defer unix.Close(fd)
			mem, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
			if err != nil {
				b.Fatal(err)
			}
			defer unix.Munmap(mem)
			b.ReportAllocs()
			b.SetBytes(4096)
			i := int64(0)
			for b.Loop() {
				if _, err := unix.Pread(fd, mem, i%(testBytes>>12)<<12); err != nil {
					b.Fatal(err)
				}
				i += 1021
			}
		})
	}
}
