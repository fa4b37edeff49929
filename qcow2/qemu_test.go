package qcow2

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/thaw-project/thaw/kind"
)

// qemuIO runs operations with one qemu-io. Its unmapping zero write is what we do for
// both zero and discard; its own discard leaves partial clusters alone.
func qemuIO(t testing.TB, path string, ops []op) {
	t.Helper()
	args := []string{"-f", "qcow2"}
	for _, o := range ops {
		switch o.name {
		case "write":
			args = append(args, "-c", fmt.Sprintf("write -P %#x %d %d", o.pattern, o.off, o.n))
		case "zero":
			args = append(args, "-c", fmt.Sprintf("write -z %d %d", o.off, o.n))
		case "discard":
			args = append(args, "-c", fmt.Sprintf("write -z -u %d %d", o.off, o.n))
		case "flush":
			args = append(args, "-c", "flush")
		}
	}
	out := tool(t, "qemu-io", append(args, path)...)
	if strings.Contains(out, "failed") {
		t.Fatalf("qemu-io: %s", out)
	}
}

func TestSameOperationsByQemuAndByUs(t *testing.T) {
	needQemu(t)
	seed := seedOf(t)
	for _, bits := range []int{9, 12, 16, 18} {
		for _, lazy := range []bool{true, false} {
			t.Run(fmt.Sprintf("bits=%d,lazy=%t", bits, lazy), func(t *testing.T) {
				r := newRand(seed)
				const size = 6 << 20
				ours := newFixture(t, r, size, 5<<20, CreateOptions{ClusterBits: bits, LazyRefcounts: lazy})
				theirs := filepath.Join(filepath.Dir(ours.path), "qemu.qcow2")
				tool(t, "qemu-img", "create", "-q", "-f", "qcow2", "-b", ours.base, "-F", "raw",
					"-o", fmt.Sprintf("cluster_size=%d,lazy_refcounts=%t", 1<<bits, lazy), theirs, fmt.Sprint(size))
				// Turns: we write a part of the sequence to both files, then QEMU does.
				for turn := range 6 {
					var ops []op
					for range 30 {
						o := randomOp(r, size, 1<<bits, "write write write zero discard flush")
						ops = append(ops, o)
						ours.want.apply(o)
					}
					if turn%2 == 0 {
						for _, path := range []string{ours.path, theirs} {
							fx := *ours
							fx.path = path
							i := fx.open(t)
							for _, o := range ops {
								if err := do(i, o); err != nil {
									t.Fatalf("%v: %v", o, err)
								}
							}
							if err := i.Close(); err != nil {
								t.Fatal(err)
							}
						}
					} else {
						qemuIO(t, ours.path, ops)
						qemuIO(t, theirs, ops)
					}
					tool(t, "qemu-img", "compare", ours.path, theirs)
				}
				qemuAgrees(t, ours.path, ours.want)
				qemuAgrees(t, theirs, ours.want)
				i := ours.open(t)
				defer i.Close()
				if err := verify(i, ours.want, 0, size); err != nil {
					t.Fatal(err)
				}
			})
		}
	}
}

// TestImagesMadeByQemu reads and then writes what qemu-img can make.
func TestImagesMadeByQemu(t *testing.T) {
	needQemu(t)
	seed := seedOf(t)
	const size = 4 << 20
	for _, c := range []struct {
		name     string
		options  string
		convert  bool // qemu-img convert from a raw file, else create and qemu-io
		flags    []string
		readOnly string // why we do not write to it
	}{
		{name: "plain", options: "cluster_size=65536"},
		{name: "refcount 1 bit", options: "refcount_bits=1"},
		{name: "refcount 2 bits", options: "refcount_bits=2,cluster_size=4096"},
		{name: "refcount 4 bits", options: "refcount_bits=4,cluster_size=512"},
		{name: "refcount 8 bits", options: "refcount_bits=8,lazy_refcounts=on"},
		{name: "refcount 32 bits", options: "refcount_bits=32"},
		{name: "refcount 64 bits", options: "refcount_bits=64,cluster_size=512"},
		{name: "preallocated metadata", options: "preallocation=metadata"},
		{name: "preallocated data", options: "preallocation=falloc,lazy_refcounts=on"},
		{name: "deflate", convert: true, flags: []string{"-c"}, options: "cluster_size=65536"},
		{name: "deflate small", convert: true, flags: []string{"-c"}, options: "cluster_size=512"},
		{name: "deflate large", convert: true, flags: []string{"-c"}, options: "cluster_size=2097152"},
		{name: "zstd", convert: true, flags: []string{"-c"}, options: "compression_type=zstd"},
		{name: "zstd lazy", convert: true, flags: []string{"-c"}, options: "compression_type=zstd,lazy_refcounts=on,cluster_size=16384"},
		{name: "version 2", options: "compat=0.10", readOnly: "version 2"},
		{name: "version 2 deflate", convert: true, flags: []string{"-c"}, options: "compat=0.10", readOnly: "version 2"},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newRand(seed)
			fx := newFixture(t, r, size, 0, CreateOptions{})
			os.Remove(fx.path)
			if c.convert {
				for off := 0; off < size; off += 10000 {
					// Compressible, and in part not.
					part := fx.want[off:min(off+10000, size)]
					if r.IntN(3) == 0 {
						fillRandom(r, part[:len(part)/4])
					} else {
						copy(part, bytes.Repeat([]byte(fmt.Sprint(off, " ")), 2000))
					}
				}
				raw := filepath.Join(t.TempDir(), "source.raw")
				if err := os.WriteFile(raw, fx.want, 0o600); err != nil {
					t.Fatal(err)
				}
				tool(t, "qemu-img", append(append([]string{"convert", "-f", "raw", "-O", "qcow2", "-o", c.options}, c.flags...), raw, fx.path)...)
			} else {
				tool(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", c.options, fx.path, fmt.Sprint(size))
			}
			var ops []op
			for range 60 {
				o := randomOp(r, size, 65536, "write write zero discard")
				ops = append(ops, o)
				fx.want.apply(o)
			}
			qemuIO(t, fx.path, ops)

			ro := *fx
			ro.options.ReadOnly = true
			i := ro.open(t)
			if err := verify(i, fx.want, 0, size); err != nil {
				t.Fatal(err)
			}
			if _, err := i.WriteAt([]byte{1}, 0); !errors.Is(err, kind.ReadOnly) {
				t.Fatalf("write to a read-only image: %v", err)
			}
			if err := i.Close(); err != nil {
				t.Fatal(err)
			}
			if c.readOnly != "" {
				if _, err := Open(fx.path, fx.options); !errors.Is(err, kind.Unsupported) || !strings.Contains(err.Error(), c.readOnly) {
					t.Fatalf("got %v", err)
				}
				return
			}
			fx.run(t, r, 150, 65536, "write write write zero discard flush reopen kill")
			qemuAgrees(t, fx.path, fx.want)
		})
	}
}

func TestInternalSnapshotsAreReadAndCheckedButNotWritten(t *testing.T) {
	needQemu(t)
	r := newRand(seedOf(t))
	const size = 4 << 20
	fx := newFixture(t, r, size, 0, CreateOptions{})
	write := func() {
		var ops []op
		for range 20 {
			o := randomOp(r, size, 65536, "write zero")
			ops = append(ops, o)
			fx.want.apply(o)
		}
		qemuIO(t, fx.path, ops)
	}
	write()
	tool(t, "qemu-img", "snapshot", "-c", "one", fx.path)
	write()
	tool(t, "qemu-img", "snapshot", "-c", "two", fx.path)
	write()
	if r, err := Check(fx.path); err != nil || !r.Clean {
		t.Fatalf("Check: %+v, %v", r, err)
	}
	if _, err := Open(fx.path, fx.options); !errors.Is(err, kind.Unsupported) || !strings.Contains(err.Error(), "snapshots") {
		t.Fatalf("got %v", err)
	}
	ro := *fx
	ro.options.ReadOnly = true
	i := ro.open(t)
	if err := verify(i, fx.want, 0, size); err != nil {
		t.Fatal(err)
	}
	if info, err := i.Info(); err != nil || info.InternalSnapshots != 2 {
		t.Fatalf("%+v, %v", info, err)
	}
	i.Close()

	// Damage the counts: Repair must count what the snapshots hold, too.
	raw, err := os.ReadFile(fx.path)
	if err != nil {
		t.Fatal(err)
	}
	h, err := parseHeader(raw[:65536], int64(len(raw)))
	if err != nil {
		t.Fatal(err)
	}
	block := hostOffset(beUint64(raw[h.refTableOffset:]))
	for k := int64(20); k < 60; k++ {
		raw[block+k] = byte(r.IntN(3))
	}
	if err := os.WriteFile(fx.path, raw, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Repair(fx.path); err != nil {
		t.Fatal(err)
	}
	if out := tool(t, "qemu-img", "check", fx.path); !strings.Contains(out, "No errors") {
		t.Fatal(out)
	}
	tool(t, "qemu-img", "snapshot", "-d", "one", fx.path)
	tool(t, "qemu-img", "snapshot", "-d", "two", fx.path)
	fx.run(t, r, 50, 65536, "write zero discard reopen")
	qemuAgrees(t, fx.path, fx.want)
}

func TestBitmapsAreNotWritten(t *testing.T) {
	needQemu(t)
	fx := newFixture(t, newRand(1), 1<<20, 0, CreateOptions{})
	tool(t, "qemu-img", "bitmap", "--add", fx.path, "b0")
	if _, err := Open(fx.path, fx.options); !errors.Is(err, kind.Unsupported) || !strings.Contains(err.Error(), "bitmaps") {
		t.Fatalf("got %v", err)
	}
	if _, err := Check(fx.path); !errors.Is(err, kind.Unsupported) {
		t.Fatalf("got %v", err)
	}
	fx.options.ReadOnly = true
	i := fx.open(t)
	defer i.Close()
	if err := verify(i, fx.want, 0, 1<<20); err != nil {
		t.Fatal(err)
	}
}

// TestQemuRefusesToShare: a file in use is locked against QEMU and the other way round.
func TestQemuRefusesToShare(t *testing.T) {
	needQemu(t)
	fx := newFixture(t, newRand(1), 1<<20, 0, CreateOptions{})
	i := fx.open(t)
	if out, err := exec.Command("qemu-img", "check", fx.path).CombinedOutput(); err == nil || !strings.Contains(string(out), "lock") {
		t.Fatalf("qemu-img check of a file in use: %v %s", err, out)
	}
	if _, err := Open(fx.path, fx.options); !errors.Is(err, kind.InUse) {
		t.Fatalf("second open: %v", err)
	}
	if _, err := Check(fx.path); !errors.Is(err, kind.InUse) {
		t.Fatalf("check of a file in use: %v", err)
	}
	if err := i.Close(); err != nil {
		t.Fatal(err)
	}

	qemu := exec.Command("qemu-io", "-f", "qcow2", fx.path)
	in, err := qemu.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := qemu.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := qemu.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { in.Close(); qemu.Wait() }()
	fmt.Fprintln(in, "length")
	if _, err := out.Read(make([]byte, 64)); err != nil { // it answers, so it has opened
		t.Fatal(err)
	}
	if _, err := Open(fx.path, fx.options); !errors.Is(err, kind.InUse) {
		t.Fatalf("open of a file that qemu-io has open: %v", err)
	}
}

// TestConvertAndInfo: what qemu-img makes of our file is the disk.
func TestConvertAndInfo(t *testing.T) {
	needQemu(t)
	r := newRand(seedOf(t))
	fx := newFixture(t, r, 3<<20, 2<<20, CreateOptions{LazyRefcounts: true})
	fx.run(t, r, 60, 65536, "write zero discard")
	raw := filepath.Join(filepath.Dir(fx.path), "out.raw")
	tool(t, "qemu-img", "convert", "-O", "raw", fx.path, raw)
	got, err := os.ReadFile(raw)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, fx.want) {
		t.Fatal("qemu-img convert gives another disk")
	}
	info := tool(t, "qemu-img", "info", fx.path)
	for _, want := range []string{"virtual size: 3 MiB", "cluster_size: 65536", "backing file format: raw", "lazy refcounts: true", "compat: 1.1", fx.base} {
		if !strings.Contains(info, want) {
			t.Errorf("qemu-img info lacks %q:\n%s", want, info)
		}
	}
	ours, err := Inspect(fx.path)
	if err != nil || ours.BackingFile != fx.base || ours.BackingFormat != "raw" || ours.SizeBytes != 3<<20 || ours.Dirty || !ours.LazyRefcounts || ours.AllocatedBytes == 0 {
		t.Fatalf("%+v, %v", ours, err)
	}
}
