package qcow2

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/thaw-project/thaw/kind"
)

// TestFullDisk fills a real file system: the writer is told, everything else goes on,
// and what a discard frees can be written again.
func TestFullDisk(t *testing.T) {
	needQemu(t)
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=8m"); err != nil {
		t.Skipf("cannot mount a small tmpfs (%v): run as root", err)
	}
	defer unix.Unmount(dir, unix.MNT_DETACH)
	const size, chunk = 64 << 20, 96 << 10
	fx := &fixture{path: filepath.Join(dir, "rw.qcow2"), want: make(model, size)}
	if err := Create(fx.path, CreateOptions{SizeBytes: size, LazyRefcounts: true}); err != nil {
		t.Fatal(err)
	}
	reserve := filepath.Join(dir, "reserve")
	if err := os.WriteFile(reserve, make([]byte, 65536), 0o600); err != nil {
		t.Fatal(err)
	}
	i := fx.open(t)
	fill := func(from int64) int64 {
		t.Helper()
		for off := from; ; off += chunk {
			o := op{name: "write", off: off, n: chunk, pattern: byte(off/chunk%250 + 1)}
			err := do(i, o)
			if errors.Is(err, kind.NoSpace) || kind.Of(err) == kind.NoSpace {
				// Part of it may have been written: make it definite in the model.
				got := make([]byte, chunk)
				if _, err := i.ReadAt(got, off); err != nil {
					t.Fatal(err)
				}
				for k, b := range got {
					if b != 0 && b != o.pattern {
						t.Fatalf("byte %d of a failed write is %#x", k, b)
					}
				}
				copy(fx.want[off:], got)
				return off
			}
			if err != nil {
				t.Fatal(err)
			}
			fx.want.apply(o)
		}
	}
	full := fill(0)
	if full < 4<<20 {
		t.Fatalf("full after %d bytes", full)
	}
	// Not a byte is left, for a redo segment either.
	if f, err := os.Create(filepath.Join(dir, "ballast")); err == nil {
		for {
			if _, err := f.Write(make([]byte, 4096)); err != nil {
				break
			}
		}
		f.Close()
	}
	if err := i.Flush(); err != nil {
		t.Fatalf("flush on a full disk: %v", err)
	}
	if err := verify(i, fx.want, 0, size); err != nil {
		t.Fatal(err)
	}
	o := op{name: "discard", off: 0, n: 2 << 20}
	fx.want.apply(o)
	if err := do(i, o); err != nil {
		t.Fatalf("discard on a full disk: %v", err)
	}
	if err := i.Flush(); err != nil {
		t.Fatal(err)
	}
	again := fill(32 << 20)
	if again < 33<<20 {
		t.Fatalf("2 MiB were discarded, and only %d bytes could be written", again-32<<20)
	}
	if err := i.Abandon(); err != nil { // killed with a full disk
		t.Fatal(err)
	}
	if i, err := Open(fx.path, fx.options); err == nil {
		i.Abandon()
	} else if kind.Of(err) != kind.NoSpace {
		t.Fatal(err)
	}
	os.Remove(reserve) // the next redo segment needs a block
	i = fx.open(t)
	if err := verify(i, fx.want, 0, size); err != nil {
		t.Fatal(err)
	}
	if err := i.Close(); err != nil {
		t.Fatal(err)
	}
	qemuAgrees(t, fx.path, fx.want)
}
