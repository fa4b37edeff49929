package guest_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/thaw-project/thaw/e2e/guest"
	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/nvme/host"
	"github.com/thaw-project/thaw/target/bdev"
)

// kernelNQN is the subsystem of the guest's own target.
const kernelNQN = "nqn.2014-08.org.thaw-project:kernel"

// eventually fails the test when f does not return nil in a minute. f is asked again
// whatever it says; there is nothing that tells when.
func eventually(t *testing.T, what string, f func() error) {
	t.Helper()
	deadline := time.Now().Add(time.Minute)
	for {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: %v", what, err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// exercise writes, reads, zeroes and discards at random and compares with memory.
func exercise(t *testing.T, d bdev.Device, rounds int, r *rand.Rand) {
	t.Helper()
	size := int(d.SizeBytes())
	model := make([]byte, size)
	if _, err := d.ReadAt(model, 0); err != nil {
		t.Fatal(err)
	}
	for i := range rounds {
		// Some accesses begin and end inside blocks.
		n := 1 + r.IntN(300<<10)
		if i%3 == 0 {
			n = 1 + r.IntN(32<<10) // around what a capsule can hold
		}
		off := r.IntN(size - n)
		if r.IntN(4) > 0 {
			off, n = off&^511, (n+511)&^511
		}
		n = min(n, size-off)
		var err error
		p := make([]byte, n)
		switch r.IntN(5) {
		case 0, 1:
			for j := range p {
				p[j] = byte(r.Uint32())
			}
			copy(model[off:], p)
			_, err = d.WriteAt(p, int64(off))
		case 2:
			clear(model[off : off+n])
			err = d.WriteZeroes(int64(off), int64(n))
		case 3:
			clear(model[off : off+n])
			err = d.Discard(int64(off), int64(n))
		case 4:
			if _, err = d.ReadAt(p, int64(off)); !bytes.Equal(p, model[off:off+n]) {
				t.Fatalf("operation %d: %d bytes at %d differ", i, n, off)
			}
		}
		if err != nil {
			t.Fatalf("operation %d: %v", i, err)
		}
	}
	got := make([]byte, size)
	if err := d.Flush(); err != nil {
		t.Fatal(err)
	}
	if _, err := d.ReadAt(got, 0); err != nil || !bytes.Equal(got, model) {
		t.Fatalf("the whole disk differs: %v", err)
	}
}

// TestHostByLinux drives Linux's target in the guest with our host on this machine.
func TestHostByLinux(t *testing.T) {
	g := guest.New(t, guest.Options{Modules: []string{"nvmet-tcp"}, ScratchMB: 512, Forward: []int{4420, 4421}})
	ctx := t.Context()
	me := uuid.New()
	config := host.Config{
		Portals: []string{g.Address(4420)}, SubNQN: kernelNQN, HostID: me, HostNQN: "nqn.2014-08.org.nvmexpress:uuid:" + me.String(),
		Queues: 1, Depth: 64, ReconnectMax: time.Second, Log: slog.New(slog.NewTextHandler(t.Output(), nil)),
	}
	k := guest.KernelTarget{NQN: kernelNQN, Transport: "tcp", Hosts: []string{config.HostNQN}}
	second := k
	second.Service = "4421"
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	// A file, read and written directly, and a file through the guest's page cache.
	g.Must(t, "modprobe loop; truncate -s 24M /scratch/a /scratch/b; losetup --direct-io=on /dev/loop0 /scratch/a")
	must(g.ServeNVMe(ctx, k))
	first, other := uuid.New(), uuid.New()
	must(g.AddNvmeNamespace(ctx, k, 1, first.String(), "/dev/loop0"))

	connect := func(t *testing.T, c host.Config) *host.Host {
		t.Helper()
		limit, cancel := context.WithTimeout(ctx, time.Minute)
		defer cancel()
		h, err := host.Connect(limit, c)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := h.Close(); err != nil {
				t.Error(err)
			}
		})
		return h
	}
	open := func(t *testing.T, h *host.Host, id uuid.UUID) *host.Device {
		t.Helper()
		d, err := h.OpenUUID(id)
		if err != nil {
			t.Fatal(err)
		}
		return d
	}

	t.Run("discover", func(t *testing.T) {
		found, err := host.Discover(ctx, g.Address(4420), config)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range found {
			if e.SubNQN == kernelNQN && e.Address == "10.0.2.15" && e.Service == "4420" {
				return
			}
		}
		t.Errorf("discovered %+v", found)
	})
	t.Run("refused", func(t *testing.T) {
		c := config
		c.HostID = uuid.New()
		c.HostNQN = ""
		if h, err := host.Connect(ctx, c); !errors.Is(err, kind.Denied) {
			t.Errorf("a host that is not allowed: %v", err)
			if err == nil {
				h.Close()
			}
		}
	})
	for _, test := range []struct {
		name   string
		change func(*host.Config)
	}{
		{"plain", func(*host.Config) {}},
		{"digests", func(c *host.Config) { c.HeaderDigest, c.DataDigest = true, true }},
		{"one R2T, data digest", func(c *host.Config) { c.MaxR2T, c.DataDigest = 1, true }},
	} {
		t.Run(test.name, func(t *testing.T) {
			c := config
			test.change(&c)
			h := connect(t, c)
			d := open(t, h, first)
			if info := d.Info(); info.NSID != 1 || info.SizeBytes != 24<<20 || info.BlockBytes != 512 {
				t.Errorf("%+v", info)
			}
			seed := rand.Uint64()
			t.Logf("seed %d", seed)
			exercise(t, d, 100, rand.New(rand.NewPCG(seed, 1)))
		})
	}
	t.Run("what was written is there", func(t *testing.T) {
		h := connect(t, config)
		d := open(t, h, first)
		text := "written by our host, read by Linux"
		if _, err := d.WriteAt([]byte(text), 12345); err != nil {
			t.Fatal(err)
		}
		if err := d.Flush(); err != nil {
			t.Fatal(err)
		}
		if out := g.Must(t, fmt.Sprintf("dd if=/scratch/a bs=1 skip=12345 count=%d status=none iflag=direct 2>/dev/null || dd if=/scratch/a bs=1 skip=12345 count=%[1]d status=none", len(text))); out != text {
			t.Errorf("the guest reads %q", out)
		}
	})
	t.Run("nvmeNamespaces come and go", func(t *testing.T) {
		var told atomic.Int32
		c := config
		c.Changed = func() { told.Add(1) }
		h := connect(t, c)
		for range 3 {
			before := told.Load()
			must(g.AddNvmeNamespace(ctx, k, 2, other.String(), "/scratch/b"))
			eventually(t, "new nvmeNamespace", func() error { _, err := h.OpenUUID(other); return err })
			d := open(t, h, other)
			if _, err := d.WriteAt([]byte("hello"), 0); err != nil {
				t.Fatal(err)
			}
			must(g.RemoveNvmeNamespace(ctx, k, 2))
			eventually(t, "nvmeNamespace goes", func() error {
				if _, err := h.OpenUUID(other); !errors.Is(err, kind.NotFound) {
					return fmt.Errorf("open it: %v", err)
				}
				return nil
			})
			if _, err := d.ReadAt(make([]byte, 512), 0); err == nil {
				t.Error("a device that is gone can be read")
			}
			if told.Load() < before+2 {
				t.Errorf("told %d times", told.Load()-before)
			}
		}
		if _, err := open(t, h, first).ReadAt(make([]byte, 512), 0); err != nil {
			t.Error(err)
		}
	})
	// background writes and verifies until stopped; it returns how often, and fails on
	// any error.
	background := func(t *testing.T, d *host.Device) (done func() int32, count *atomic.Int32) {
		stop, ended := make(chan struct{}), make(chan error, 1)
		count = new(atomic.Int32)
		go func() {
			p, q := make([]byte, 16<<10), make([]byte, 16<<10)
			for i := uint32(0); ; i++ {
				select {
				case <-stop:
					ended <- nil
					return
				default:
				}
				for j := range p {
					p[j] = byte(i) + byte(j)
				}
				off := int64(i%256) * int64(len(p))
				if _, err := d.WriteAt(p, off); err != nil {
					ended <- err
					return
				}
				if _, err := d.ReadAt(q, off); err != nil || !bytes.Equal(p, q) {
					ended <- fmt.Errorf("round %d reads something else: %w", i, err)
					return
				}
				count.Add(1)
			}
		}()
		return func() int32 {
			close(stop)
			if err := <-ended; err != nil {
				t.Error(err)
			}
			return count.Load()
		}, count
	}
	more := func(t *testing.T, count *atomic.Int32) {
		from := count.Load()
		eventually(t, "I/O goes on", func() error {
			if count.Load() < from+10 {
				return fmt.Errorf("%d rounds since", count.Load()-from)
			}
			return nil
		})
	}
	t.Run("port away and back", func(t *testing.T) {
		h := connect(t, config)
		done, count := background(t, open(t, h, first))
		more(t, count)
		for range 3 {
			must(g.SuspendNVMe(ctx, k))
			eventually(t, "path lost", func() error {
				if h.Paths()[0] {
					return errors.New("it is there")
				}
				return nil
			})
			must(g.ResumeNVMe(ctx, k))
			more(t, count)
		}
		t.Logf("%d rounds of I/O", done())
	})
	t.Run("failover", func(t *testing.T) {
		// The second port of the same subsystem.
		g.Must(t, fmt.Sprintf(`mkdir /sys/kernel/config/nvmet/ports/14421; cd /sys/kernel/config/nvmet/ports/14421
			echo ipv4 >addr_adrfam; echo tcp >addr_trtype; echo 10.0.2.15 >addr_traddr; echo 4421 >addr_trsvcid
			ln -s /sys/kernel/config/nvmet/subsystems/%s subsystems/`, kernelNQN))
		c := config
		c.Portals = []string{g.Address(4420), g.Address(4421)}
		h := connect(t, c)
		eventually(t, "both paths", func() error {
			if p := h.Paths(); !p[0] || !p[1] {
				return fmt.Errorf("paths %v", p)
			}
			return nil
		})
		done, count := background(t, open(t, h, first))
		more(t, count)
		must(g.SuspendNVMe(ctx, k))
		eventually(t, "path lost", func() error {
			if h.Paths()[0] {
				return errors.New("it is there")
			}
			return nil
		})
		more(t, count) // over the other path
		must(g.ResumeNVMe(ctx, k))
		must(g.SuspendNVMe(ctx, second))
		more(t, count)
		done()
	})
	if out := g.Must(t, "dmesg"); strings.Contains(out, "nvmet") && strings.Contains(out, "WARNING") {
		t.Errorf("the guest's kernel complains:\n%s", out)
	}
}

// TestRDMA connects Linux's host to Linux's target over software RDMA, which shows that
// the guest can be used to test what attaches with transport rdma.
func TestRDMA(t *testing.T) {
	g := guest.New(t, guest.Options{Modules: []string{"rdma_rxe", "rdma_ucm", "nvmet-rdma", "nvme-rdma"}})
	ctx := t.Context()
	address, err := g.RDMA(ctx)
	if err != nil {
		t.Fatal(err)
	}
	k := guest.KernelTarget{NQN: kernelNQN, Transport: "rdma", Hosts: []string{guest.HostNQN}}
	if err := g.ServeNVMe(ctx, k); err != nil {
		t.Fatal(err)
	}
	g.Must(t, "modprobe brd rd_nr=2 rd_size=65536")
	first, second := uuid.New().String(), uuid.New().String()
	if err := g.AddNvmeNamespace(ctx, k, 1, first, "/dev/ram0"); err != nil {
		t.Fatal(err)
	}
	connect := fmt.Sprintf("nvme connect -t rdma -a %s -s 4420 -n %s", address, kernelNQN)
	out := g.Must(t, fmt.Sprintf("nvme discover -t rdma -a %s -s 4420 | grep -c %s", address, kernelNQN))
	if strings.TrimSpace(out) != "1" {
		t.Errorf("discovered %s", out)
	}
	out = g.MustWithin(t, 3*time.Minute, connect+"\nd=$(nvme_device "+first+")\ncat /sys/class/nvme/*/transport\n"+
		`fio --name=v --filename=$d --ioengine=libaio --direct=1 --rw=randwrite --bsrange=4k-128k --iodepth=8 --size=8m --verify=crc32c --verify_fatal=1 --verify_state_save=0 2>&1`)
	if !strings.Contains(out, "rdma\n") || !strings.Contains(out, "err= 0") {
		t.Errorf("fio:\n%s", out)
	}
	t.Log(summary(out))
	if err := g.AddNvmeNamespace(ctx, k, 2, second, "/dev/ram1"); err != nil {
		t.Fatal(err)
	}
	g.Must(t, "blockdev --getsize64 $(nvme_device "+second+")")
	if err := g.RemoveNvmeNamespace(ctx, k, 2); err != nil {
		t.Fatal(err)
	}
	g.Must(t, "await '! grep -q "+second+" /sys/block/nvme*n*/uuid'; nvme disconnect -n "+kernelNQN)
}
