package host_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"sync"
	"testing"

	"github.com/google/uuid"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/nvme"
	"github.com/thaw-project/thaw/nvme/host"
	"github.com/thaw-project/thaw/target/bdev"
	"github.com/thaw-project/thaw/target/engine"
	"github.com/thaw-project/thaw/target/nvmf"
)

// conform holds a device to the contract of bdev.Device: operations of any offset and
// length against a model, and what has to be refused.
func conform(t *testing.T, d bdev.Device, rounds int) {
	t.Helper()
	size := d.SizeBytes()
	model := make([]byte, size)
	if err := d.WriteZeroes(0, size); err != nil {
		t.Fatal(err)
	}
	rng := rand.New(rand.NewPCG(1, uint64(rounds)))
	for i := range rounds {
		n := 1 + rng.Int64N(9000)
		switch rng.IntN(8) {
		case 0:
			n = 1 + rng.Int64N(size/2)
		case 1:
			n = 4096
		}
		off := rng.Int64N(size - n + 1)
		if rng.IntN(2) == 0 {
			off, n = off/512*512, max(n/512*512, 512)
		}
		var err error
		op := rng.IntN(6)
		switch op {
		case 0, 1:
			p := make([]byte, n)
			for j := range p {
				p[j] = byte(rng.Uint32())
			}
			copy(model[off:], p)
			_, err = d.WriteAt(p, off)
		case 2:
			clear(model[off : off+n])
			err = d.WriteZeroes(off, n)
		case 3:
			clear(model[off : off+n])
			err = d.Discard(off, n)
		case 4:
			err = d.Flush()
		}
		if err != nil {
			t.Fatalf("round %d: operation %d of %d bytes at %d: %v", i, op, n, off, err)
		}
		p := make([]byte, n)
		if m, err := d.ReadAt(p, off); m != len(p) || err != nil && err != io.EOF {
			t.Fatalf("round %d: read %d of %d bytes at %d: %v", i, m, n, off, err)
		}
		if !bytes.Equal(p, model[off:off+n]) {
			t.Fatalf("round %d: %d bytes at %d differ after operation %d", i, n, off, op)
		}
	}
	p := make([]byte, size)
	if n, err := d.ReadAt(p, 0); n != len(p) || err != nil && err != io.EOF || !bytes.Equal(p, model) {
		t.Fatalf("the whole device: %d bytes, %v", n, err)
	}
	if n, err := d.ReadAt(p[:1024], size-512); n != 512 || err != io.EOF {
		t.Errorf("a read past the end: %d bytes, %v", n, err)
	}
	for _, err := range []error{
		func() error { _, err := d.WriteAt(p[:1024], size-512); return err }(),
		func() error { _, err := d.WriteAt(p[:512], -512); return err }(),
		func() error { _, err := d.ReadAt(p[:512], -512); return err }(),
		d.Discard(size, 512), d.WriteZeroes(-1, 1), d.Discard(0, -1),
	} {
		if !errors.Is(err, kind.Invalid) {
			t.Errorf("an access outside the device: %v", err)
		}
	}
}

// TestOptions runs the conformance suite for every combination of digests, capsule
// data, R2T sizes, inline or workers and block size.
func TestOptions(t *testing.T) {
	n := 0
	for _, digests := range []nvme.Digests{{}, {Header: true}, {Data: true}, {Header: true, Data: true}} {
		for _, inCapsule := range []int{-1, 4096, 16384} {
			for _, r2t := range []struct{ size, h2c, outstanding int }{{0, 0, 1}, {4096, 4096, 4}, {1536, 8192, 2}} {
				for _, inline := range []bool{true, false} {
					n++
					block, depth := uint32(512), []int{4, 32, 128}[n%3]
					if n%4 == 0 {
						block = 4096
					}
					name := fmt.Sprintf("header=%t,data=%t,capsule=%d,r2t=%d/%d/%d,inline=%t,block=%d,depth=%d", digests.Header, digests.Data,
						inCapsule, r2t.size, r2t.h2c, r2t.outstanding, inline, block, depth)
					t.Run(name, func(t *testing.T) {
						l := newLab(t, nvmf.Options{InCapsule: inCapsule, R2TBytes: r2t.size, MaxH2CData: r2t.h2c, MaxTransfer: 32 << 10, QueueDepth: depth})
						id := l.add(nvmf.NvmeNamespaceConfig{Device: newMemory(256 << 10), Inline: inline, BlockBytes: block})
						h := l.connect(host.Config{HeaderDigest: digests.Header, DataDigest: digests.Data, MaxR2T: r2t.outstanding, Queues: 1 + n%3})
						conform(t, l.open(h, id), 40)
					})
				}
			}
		}
	}
}

// TestParallel has many goroutines write and read their own parts over several
// queues, with more of them than the queues have entries, by every way a target has to
// carry commands out. What readers carry out reaches a writable device one at a time.
func TestParallel(t *testing.T) {
	for _, way := range []struct {
		engine           engine.Kind
		inline, adaptive bool
	}{{engine.SharedNothing, true, false}, {engine.SharedNothing, false, true}, {engine.SharedNothing, false, false}, {engine.ThreadPool, true, false}} {
		l := newLab(t, nvmf.Options{R2TBytes: 8192, MaxTransfer: 64 << 10, Engine: way.engine})
		const part = 128 << 10
		memory := newMemory(40 * part)
		if memory.alone = func() { t.Errorf("%+v: two commands at a time", way) }; !way.inline || way.engine != engine.SharedNothing {
			memory.alone = nil
		}
		id := l.add(nvmf.NvmeNamespaceConfig{Device: memory, Inline: way.inline, Adaptive: way.adaptive})
		h := l.connect(host.Config{Queues: 3, Depth: 8, DataDigest: true})
		d := l.open(h, id)
		var wg sync.WaitGroup
		for g := range 40 {
			wg.Add(1)
			go func() {
				defer wg.Done()
				rng := rand.New(rand.NewPCG(uint64(g), 0))
				model := make([]byte, part)
				for i := range 30 {
					n := (1 + rng.IntN(160)) * 512
					off := rng.IntN((part-n)/512+1) * 512
					for j := 0; j < n; j += 64 {
						model[off+j] = byte(rng.Uint32())
					}
					if _, err := d.WriteAt(model[off:off+n], int64(g*part+off)); err != nil {
						t.Errorf("goroutine %d write %d: %v", g, i, err)
						return
					}
					p := make([]byte, part)
					if _, err := d.ReadAt(p, int64(g*part)); err != nil && err != io.EOF || !bytes.Equal(p, model) {
						t.Errorf("goroutine %d read %d: %v, or its data differs", g, i, err)
						return
					}
				}
			}()
		}
		wg.Wait()
	}
}

// TestIdentity compares what the host sees with what the target was given, and asks
// discovery.
func TestIdentity(t *testing.T) {
	l := newLab(t, nvmf.Options{})
	id := uuid.New()
	ro := newMemory(8192)
	ro.readOnly = true
	nsid := l.add(nvmf.NvmeNamespaceConfig{NSID: 7, Device: ro, UUID: id, EUI64: [8]byte{1, 2}, BlockBytes: 4096})
	h := l.connect(host.Config{})
	all := h.NvmeNamespaces()
	if len(all) != 1 || all[0].NSID != 7 || nsid != 7 || all[0].UUID != id || all[0].NGUID != id || all[0].EUI64 != [8]byte{1, 2} ||
		all[0].SizeBytes != 8192 || all[0].BlockBytes != 4096 || !all[0].ReadOnly {
		t.Fatalf("nvmeNamespaces are %+v", all)
	}
	d, err := h.OpenUUID(id)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := d.WriteAt(make([]byte, 512), 0); !errors.Is(err, kind.ReadOnly) || !d.ReadOnly() {
		t.Errorf("write to a read-only device: %v", err)
	}
	if err := d.Discard(0, 512); !errors.Is(err, kind.ReadOnly) {
		t.Errorf("discard on a read-only device: %v", err)
	}
	if _, err := h.Open(8); !errors.Is(err, kind.NotFound) {
		t.Errorf("an nvmeNamespace that does not exist: %v", err)
	}
	found, err := host.Discover(context.Background(), l.addr, host.Config{})
	if err != nil || len(found) != 1 || found[0].SubNQN != subNQN || found[0].Address+":"+found[0].Service != l.addr {
		t.Fatalf("discovered %+v, %v", found, err)
	}
}

// TestErrors passes a device's errors to the caller with their kind.
func TestErrors(t *testing.T) {
	l := newLab(t, nvmf.Options{})
	m := newMemory(1 << 20)
	id := l.add(nvmf.NvmeNamespaceConfig{Device: m})
	d := l.open(l.connect(host.Config{}), id)
	for _, k := range []kind.Kind{kind.NoSpace, kind.ReadOnly, kind.IO} {
		err := kind.Errorf(k, "injected")
		m.fail.Store(&err)
		if _, err := d.WriteAt(make([]byte, 512), 0); !errors.Is(err, k) {
			t.Errorf("write with %v: %v", k, err)
		}
	}
	err := kind.Errorf(kind.Corrupt, "injected")
	m.fail.Store(&err)
	if _, err := d.ReadAt(make([]byte, 512), 0); !errors.Is(err, kind.Corrupt) {
		t.Errorf("read of a corrupt block: %v", err)
	}
	m.fail.Store(nil)
	if _, err := d.ReadAt(make([]byte, 512), 0); err != nil {
		t.Errorf("read after errors: %v", err)
	}
	before := m.flushes.Load()
	if err := d.Flush(); err != nil || m.flushes.Load() != before+1 {
		t.Errorf("flush: %v, the device saw %d", err, m.flushes.Load()-before)
	}
}
