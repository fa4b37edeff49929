package target_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/nvme/host"
	"github.com/thaw-project/thaw/target"
	"github.com/thaw-project/thaw/target/bdev"
	"github.com/thaw-project/thaw/target/engine"
)

const nqn = "nqn.2014-08.org.example:disks"

// freePort is a port that nobody listens on now.
func freePort(t testing.TB) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	_, port, _ := net.SplitHostPort(l.Addr().String())
	return port
}

// export makes a subsystem with bdevs behind a listener.
func (l *lab) export(port string, bdevs ...string) {
	l.t.Helper()
	l.call("nvmf_create_transport", `{"trtype":"TCP"}`)
	l.call("nvmf_create_subsystem", `{"nqn":%q,"allow_any_host":true}`, nqn)
	for _, b := range bdevs {
		l.call("nvmf_subsystem_add_ns", `{"nqn":%q,"namespace":{"bdev_name":%q}}`, nqn, b)
	}
	l.listen(port)
}

func (l *lab) listen(port string) {
	l.t.Helper()
	l.call("nvmf_subsystem_add_listener", `{"nqn":%q,"listen_address":{"trtype":"TCP","adrfam":"IPv4","traddr":"127.0.0.1","trsvcid":%q}}`, nqn, port)
}

func connect(t testing.TB, port string) *host.Host {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	h, err := host.Connect(ctx, host.Config{Portals: []string{"127.0.0.1:" + port}, SubNQN: nqn, ReconnectDelay: 5 * time.Millisecond, ReconnectMax: 50 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { h.Close() })
	return h
}

// open opens the nvmeNamespace of a bdev, whose UUID it has.
func (l *lab) open(h *host.Host, name string) bdev.Device {
	l.t.Helper()
	var list []struct{ UUID uuid.UUID }
	l.into(&list, "bdev_get_bdevs", `{"name":%q}`, name)
	d, err := h.OpenUUID(list[0].UUID)
	if err != nil {
		l.t.Fatal(err)
	}
	return d
}

func write(t testing.TB, d bdev.Device, off int64, p []byte) {
	t.Helper()
	if _, err := d.WriteAt(p, off); err != nil {
		t.Fatal(err)
	}
}

func read(t testing.TB, d bdev.Device, off, n int64) []byte {
	t.Helper()
	p := make([]byte, n)
	if m, err := d.ReadAt(p, off); int64(m) != n || err != nil && !errors.Is(err, io.EOF) {
		t.Fatalf("read %d bytes at %d: %d, %v", n, off, m, err)
	}
	return p
}

// expect compares a range with what it should hold throughout.
func expect(t testing.TB, d bdev.Device, off, n int64, b byte) {
	t.Helper()
	if got := read(t, d, off, n); !bytes.Equal(got, bytes.Repeat([]byte{b}, int(n))) {
		at := bytes.IndexFunc(got, func(r rune) bool { return byte(r) != b })
		t.Errorf("%d bytes at %d: not all %#x, first other at %d: %#x", n, off, b, at, got[max(at, 0)])
	}
}

const mib = 1 << 20

// TestData writes to lvols over NVMe/TCP and reads them through snapshots and clones,
// with both engines.
func TestData(t *testing.T) {
	for _, e := range []engine.Kind{engine.SharedNothing, engine.ThreadPool} {
		t.Run(e.String(), func(t *testing.T) {
			l := start(t, target.Options{Engine: e})
			l.call("bdev_aio_create", `{"name":"aio0","filename":%q,"block_size":512}`, file(t, l.root, "disk", 256*mib))
			l.call("bdev_lvol_create_lvstore", `{"bdev_name":"aio0","lvs_name":"lvs","cluster_sz":65536}`)
			for _, name := range []string{"a", "b"} {
				l.call("bdev_lvol_create", `{"lvol_name":%q,"size_in_mib":16,"thin_provision":true,"lvs_name":"lvs"}`, name)
			}
			port := freePort(t)
			l.export(port, "lvs/a", "lvs/b", l.call("bdev_malloc_create", `{"num_blocks":4096,"block_size":4096}`))
			h := connect(t, port)
			a := l.open(h, "lvs/a")
			write(t, a, 0, bytes.Repeat([]byte{'a'}, mib))
			l.call("bdev_lvol_snapshot", `{"lvol_name":"lvs/a","snapshot_name":"s"}`)
			write(t, a, 0, bytes.Repeat([]byte{'b'}, mib/2))
			l.call("bdev_lvol_clone", `{"snapshot_name":"lvs/s","clone_name":"c"}`)
			for _, name := range []string{"lvs/s", "lvs/c"} {
				l.call("nvmf_subsystem_add_ns", `{"nqn":%q,"namespace":{"bdev_name":%q}}`, nqn, name)
			}
			eventually(t, "the host sees five disks", func() bool { return len(h.NvmeNamespaces()) == 5 })
			expect(t, a, 0, mib/2, 'b')
			expect(t, a, mib/2, mib/2, 'a')
			expect(t, l.open(h, "lvs/s"), 0, mib, 'a')
			expect(t, l.open(h, "lvs/c"), 0, mib, 'a')
			expect(t, l.open(h, "lvs/b"), 0, mib, 0)
			if _, err := l.open(h, "lvs/s").WriteAt([]byte("x"), 0); !errors.Is(err, kind.ReadOnly) {
				t.Errorf("write to a snapshot: %v", err)
			}
			m := l.open(h, "Malloc0")
			write(t, m, 4096, []byte("hello"))
			if got := read(t, m, 4096, 5); string(got) != "hello" {
				t.Errorf("malloc holds %q", got)
			}
			// The size grows under the host, and a deleted lvol goes.
			l.call("bdev_lvol_resize", `{"name":"lvs/a","size_in_mib":32}`)
			eventually(t, "the host sees the size", func() bool { return a.SizeBytes() == 32*mib })
			expect(t, a, 16*mib, mib, 0)
			l.call("bdev_lvol_delete", `{"name":"lvs/b"}`)
			eventually(t, "the host sees it gone", func() bool { return len(h.NvmeNamespaces()) == 4 })
			expect(t, a, 0, mib/2, 'b')
		})
	}
}

// TestBlockDevice keeps an lvstore on a block device.
func TestBlockDevice(t *testing.T) {
	root := shortDir(t)
	image := filepath.Join(t.TempDir(), "image") // a loop device wants a file of a real file system
	if err := os.WriteFile(image, bytes.Repeat([]byte{'o'}, 64*mib), 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("losetup", "--find", "--show", image).CombinedOutput()
	if err != nil {
		t.Skipf("no loop device here: %v %s", err, out)
	}
	loop := strings.TrimSpace(string(out))
	t.Cleanup(func() {
		if out, err := exec.Command("losetup", "--detach", loop).CombinedOutput(); err != nil {
			t.Errorf("detach %s: %v %s", loop, err, out)
		}
	})
	l := start(t, target.Options{Root: root})
	l.call("bdev_aio_create", `{"name":"raw","filename":%q}`, loop)
	port := freePort(t)
	l.export(port, "raw")
	h := connect(t, port)
	raw := l.open(h, "raw")
	expect(t, raw, mib, mib, 'o')
	if err := raw.Discard(mib, mib/2); err != nil { // reads as zeros, whatever the device does
		t.Fatal(err)
	}
	expect(t, raw, mib, mib/2, 0)
	expect(t, raw, mib+mib/2, mib/2, 'o')
	if err := raw.Flush(); err != nil {
		t.Fatal(err)
	}
	l.fails(-16, "bdev_aio_create", `{"name":"again","filename":%q}`, loop)
	l.call("nvmf_subsystem_remove_ns", `{"nqn":%q,"nsid":1}`, nqn)
	l.call("bdev_lvol_create_lvstore", `{"bdev_name":"raw","lvs_name":"lvs","cluster_sz":65536}`)
	l.call("bdev_lvol_create", `{"lvol_name":"a","size_in_mib":16,"lvs_name":"lvs"}`)
	l.call("nvmf_subsystem_add_ns", `{"nqn":%q,"namespace":{"bdev_name":"lvs/a","nsid":2}}`, nqn)
	eventually(t, "the host sees it", func() bool { _, err := h.Open(2); return err == nil })
	a := l.open(h, "lvs/a")
	expect(t, a, 0, 16*mib, 0) // not what was on the device before
	write(t, a, 12345, []byte("hello"))
	before := l.answer("bdev_lvol_get_lvols", "")
	l.stop()
	l = start(t, target.Options{Root: root})
	l.call("bdev_aio_create", `{"name":"raw","filename":%q}`, loop)
	if got := l.answer("bdev_lvol_get_lvols", ""); got != before {
		t.Errorf("lvols are %s, were %s", got, before)
	}
	l.export(port, "lvs/a")
	if got := read(t, l.open(connect(t, port), "lvs/a"), 12345, 5); string(got) != "hello" {
		t.Errorf("it holds %q", got)
	}
}

// TestDiscovery asks discovery at an address of its own.
func TestDiscovery(t *testing.T) {
	l := start(t, target.Options{})
	port, other := freePort(t), freePort(t)
	l.export(port)
	l.call("nvmf_subsystem_add_listener", `{"nqn":"nqn.2014-08.org.nvmexpress.discovery","listen_address":{"trtype":"TCP","traddr":"127.0.0.1","trsvcid":%q}}`, other)
	for _, p := range []string{port, other} {
		list, err := host.Discover(t.Context(), "127.0.0.1:"+p, host.Config{})
		if err != nil || len(list) != 1 || list[0].SubNQN != nqn || list[0].Service != port {
			t.Errorf("discovery at %s: %+v %v", p, list, err)
		}
	}
	// The subsystem itself is not to be had there.
	if _, err := host.Connect(t.Context(), host.Config{Portals: []string{"127.0.0.1:" + other}, SubNQN: nqn}); err == nil {
		t.Error("connected at discovery's address")
	}
}

// TestManyNodes exports one read-only lvol by many subsystems, and refuses a second
// export of one that can be written.
func TestManyNodes(t *testing.T) {
	l := start(t, target.Options{})
	l.call("bdev_malloc_create", `{"name":"m","num_blocks":16384,"block_size":4096}`)
	l.call("bdev_lvol_create_lvstore", `{"bdev_name":"m","lvs_name":"lvs","cluster_sz":65536}`)
	l.call("bdev_lvol_create", `{"lvol_name":"a","size_in_mib":4,"thin_provision":true,"lvs_name":"lvs"}`)
	l.call("bdev_lvol_snapshot", `{"lvol_name":"lvs/a","snapshot_name":"s"}`)
	for i := range 10 {
		l.call("nvmf_create_subsystem", `{"nqn":"nqn.2014-08.org.example:node%d"}`, i)
		l.call("nvmf_subsystem_add_ns", `{"nqn":"nqn.2014-08.org.example:node%d","namespace":{"bdev_name":"lvs/s","uuid":%q}}`, i, uuid.New())
	}
	l.call("nvmf_subsystem_add_ns", `{"nqn":"nqn.2014-08.org.example:node0","namespace":{"bdev_name":"lvs/a"}}`)
	l.fails(-32602, "nvmf_subsystem_add_ns", `{"nqn":"nqn.2014-08.org.example:node1","namespace":{"bdev_name":"lvs/a"}}`)
	l.fails(-1, "bdev_lvol_create_lvstore", `{"bdev_name":"lvs/a","lvs_name":"nested"}`)
	l.fails(-32602, "bdev_lvol_set_read_only", `{"name":"lvs/a"}`) // somebody writes to it
	l.call("nvmf_delete_subsystem", `{"nqn":"nqn.2014-08.org.example:node0"}`)
	l.call("bdev_lvol_set_read_only", `{"name":"lvs/a"}`)
	l.call("nvmf_subsystem_add_ns", `{"nqn":"nqn.2014-08.org.example:node1","namespace":{"bdev_name":"lvs/a"}}`)
	l.call("nvmf_subsystem_add_ns", `{"nqn":"nqn.2014-08.org.example:node2","namespace":{"bdev_name":"lvs/a"}}`)
}

// TestNested puts an lvstore on an lvol, and takes everything away from below.
func TestNested(t *testing.T) {
	l := start(t, target.Options{})
	l.call("bdev_aio_create", `{"name":"aio0","filename":%q,"block_size":4096}`, file(t, l.root, "disk", 256*mib))
	l.call("bdev_lvol_create_lvstore", `{"bdev_name":"aio0","lvs_name":"outer","cluster_sz":65536}`)
	l.call("bdev_lvol_create", `{"lvol_name":"disk","size_in_mib":64,"thin_provision":true,"lvs_name":"outer"}`)
	l.call("bdev_lvol_create_lvstore", `{"bdev_name":"outer/disk","lvs_name":"inner","cluster_sz":65536}`)
	l.call("bdev_lvol_create", `{"lvol_name":"a","size_in_mib":16,"thin_provision":true,"lvs_name":"inner"}`)
	l.fails(-32602, "bdev_lvol_resize", `{"name":"outer/disk","size_in_mib":32}`) // the inner lvstore lies on it
	port := freePort(t)
	l.export(port, "inner/a")
	h := connect(t, port)
	write(t, l.open(h, "inner/a"), 0, []byte("nested"))
	l.call("bdev_aio_delete", `{"name":"aio0"}`)
	if got := l.answer("bdev_get_bdevs", ""); got != "[]" {
		t.Errorf("left: %s", got)
	}
	eventually(t, "the host sees it gone", func() bool { return len(h.NvmeNamespaces()) == 0 })
	l.call("bdev_aio_create", `{"name":"aio0","filename":%q,"block_size":4096}`, filepath.Join(l.root, "disk"))
	l.call("nvmf_subsystem_add_ns", `{"nqn":%q,"namespace":{"bdev_name":"inner/a"}}`, nqn)
	eventually(t, "the host sees it again", func() bool { return len(h.NvmeNamespaces()) == 1 })
	if got := read(t, l.open(h, "inner/a"), 0, 6); string(got) != "nested" {
		t.Errorf("it holds %q", got)
	}
}

// TestExternal makes clones of a disk outside the lvstore and compares them with a model
// while they are written, snapshotted, cloned, resized and cut off.
func TestExternal(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 2))
	const cluster, size = 64 << 10, 4 * mib
	l := start(t, target.Options{})
	parent := uuid.NewString()
	base := filepath.Join(l.root, "parent")
	image := make([]byte, size)
	for i := range image {
		image[i] = byte(r.Uint32())
	}
	if err := os.WriteFile(base, image, 0o600); err != nil {
		t.Fatal(err)
	}
	l.call("bdev_aio_create", `{"name":"parent","filename":%q,"block_size":512,"readonly":true,"uuid":%q}`, base, parent)
	l.call("bdev_aio_create", `{"name":"aio0","filename":%q,"block_size":512}`, file(t, l.root, "disk", 256*mib))
	l.call("bdev_lvol_create_lvstore", `{"bdev_name":"aio0","lvs_name":"lvs","cluster_sz":%d}`, cluster)
	l.fails(-32602, "bdev_lvol_clone_bdev", `{"bdev":"nosuch","lvs_name":"lvs","clone_name":"c"}`)
	l.call("bdev_lvol_clone_bdev", `{"bdev":"parent","lvs_name":"lvs","clone_name":"c"}`)
	l.fails(-32602, "bdev_lvol_clone_bdev", `{"bdev":"lvs/c","lvs_name":"lvs","clone_name":"d"}`)
	port := freePort(t)
	l.export(port, "lvs/c")
	h := connect(t, port)
	models := map[string][]byte{"c": append([]byte(nil), image...)}
	devices := map[string]bdev.Device{"c": l.open(h, "lvs/c")}
	scribble := func(name string) {
		d, m := devices[name], models[name]
		for range 40 {
			off := r.Int64N(int64(len(m)))
			n := 1 + r.Int64N(min(int64(len(m))-off, 3*cluster))
			switch r.IntN(4) {
			case 0:
				if err := d.Discard(off, n); err != nil {
					t.Fatal(err)
				}
				clear(m[off : off+n])
			case 1:
				if got := read(t, d, off, n); !bytes.Equal(got, m[off:off+n]) {
					t.Fatalf("%s: %d bytes at %d differ from the model", name, n, off)
				}
			default:
				p := bytes.Repeat([]byte{byte(r.Uint32())}, int(n))
				write(t, d, off, p)
				copy(m[off:], p)
			}
		}
	}
	check := func() {
		t.Helper()
		for name, m := range models {
			if d := devices[name]; d != nil && !bytes.Equal(read(t, d, 0, int64(len(m))), m) {
				t.Errorf("%s differs from the model", name)
			}
		}
	}
	show := func(name string) {
		l.call("nvmf_subsystem_add_ns", `{"nqn":%q,"namespace":{"bdev_name":"lvs/%s"}}`, nqn, name)
		id := l.uuidOf("lvs/" + name)
		eventually(t, "the host sees "+name, func() (ok bool) {
			d, err := h.OpenUUID(id)
			devices[name] = d
			return err == nil
		})
	}
	scribble("c")
	check()
	l.call("bdev_lvol_snapshot", `{"lvol_name":"lvs/c","snapshot_name":"s"}`)
	models["s"] = append([]byte(nil), models["c"]...)
	show("s")
	scribble("c")
	l.call("bdev_lvol_clone", `{"snapshot_name":"lvs/s","clone_name":"k"}`)
	models["k"] = append([]byte(nil), models["s"]...)
	show("k")
	scribble("k")
	check()
	kinds := l.kinds()
	if kinds["s"] != "snapshot esnap" || kinds["c"] != "clone" || kinds["k"] != "clone" {
		t.Errorf("kinds are %v", kinds)
	}
	// Shrink and grow: what was cut off is zeros, not the parent's again.
	l.call("bdev_lvol_resize", `{"name":"lvs/k","size_in_mib":2}`)
	l.call("bdev_lvol_resize", `{"name":"lvs/k","size_in_mib":5}`)
	models["k"] = append(models["k"][:2*mib], make([]byte, 3*mib)...)
	eventually(t, "the host sees the size", func() bool { return devices["k"].SizeBytes() == 5*mib })
	scribble("k")
	check()
	// Decouple c from s: it is over the parent itself now. Inflate k: it needs nobody.
	l.call("bdev_lvol_decouple_parent", `{"name":"lvs/c"}`)
	l.call("bdev_lvol_inflate", `{"name":"lvs/k"}`)
	check()
	if kinds = l.kinds(); kinds["c"] != "esnap" || kinds["k"] != "" {
		t.Errorf("kinds are %v", kinds)
	}
	// Without the parent, what is over it is degraded and has no bdev; with it, it is back.
	l.call("bdev_aio_delete", `{"name":"parent"}`)
	delete(devices, "c")
	delete(devices, "s")
	if kinds = l.kinds(); kinds["c"] != "esnap degraded" || kinds["s"] != "snapshot esnap degraded" || kinds["k"] != "" {
		t.Errorf("kinds are %v", kinds)
	}
	l.fails(-19, "bdev_get_bdevs", `{"name":"lvs/c"}`)
	scribble("k")
	check()
	l.call("bdev_lvol_clone_bdev", `{"bdev":%q,"lvs_name":"lvs","clone_name":"m"}`, l.call("bdev_malloc_create", `{"num_blocks":128,"block_size":512}`))
	l.call("bdev_aio_create", `{"name":"parent","filename":%q,"block_size":512,"readonly":true,"uuid":%q}`, base, parent)
	show("c")
	show("s")
	scribble("c")
	check()
	// The snapshot's one clone-less end: deleting it leaves the parent to nobody but c.
	l.call("bdev_lvol_delete", `{"name":"lvs/s"}`)
	delete(models, "s")
	l.call("bdev_lvol_decouple_parent", `{"name":"lvs/c"}`)
	check()
	l.call("bdev_lvol_delete", `{"name":"lvs/m"}`)
	l.call("bdev_aio_delete", `{"name":"parent"}`)
	check()
	if kinds = l.kinds(); kinds["c"] != "" || len(kinds) != 2 {
		t.Errorf("kinds are %v", kinds)
	}
}

func (l *lab) uuidOf(name string) uuid.UUID {
	l.t.Helper()
	var list []struct{ UUID uuid.UUID }
	l.into(&list, "bdev_get_bdevs", `{"name":%q}`, name)
	return list[0].UUID
}

// kinds describes the lvols by name.
func (l *lab) kinds() map[string]string {
	l.t.Helper()
	var list []struct {
		Name     string
		Snapshot bool `json:"is_snapshot"`
		Clone    bool `json:"is_clone"`
		Esnap    bool `json:"is_esnap_clone"`
		Degraded bool `json:"is_degraded"`
	}
	l.into(&list, "bdev_lvol_get_lvols", "")
	kinds := map[string]string{}
	for _, i := range list {
		var words []string
		for word, is := range map[string]bool{"1snapshot": i.Snapshot, "2clone": i.Clone, "3esnap": i.Esnap, "4degraded": i.Degraded} {
			if is {
				words = append(words, word)
			}
		}
		slices.Sort(words)
		for n := range words {
			words[n] = words[n][1:]
		}
		kinds[i.Name] = strings.Join(words, " ")
	}
	return kinds
}

// TestDeleteSnapshotOverExternal deletes a snapshot of an external clone: its one clone
// takes over the parent.
func TestDeleteSnapshotOverExternal(t *testing.T) {
	l := start(t, target.Options{})
	l.call("bdev_malloc_create", `{"name":"parent","num_blocks":2048,"block_size":512}`)
	port := freePort(t)
	l.export(port, "parent")
	h := connect(t, port)
	write(t, l.open(h, "parent"), 0, bytes.Repeat([]byte{'p'}, mib))
	l.call("bdev_malloc_create", `{"name":"base","num_blocks":65536,"block_size":512}`)
	l.call("bdev_lvol_create_lvstore", `{"bdev_name":"base","lvs_name":"lvs","cluster_sz":65536}`)
	// Somebody may write to the parent: then the clone is degraded, and the answer success.
	l.call("bdev_lvol_clone_bdev", `{"bdev":"parent","lvs_name":"lvs","clone_name":"c"}`)
	if k := l.kinds()["c"]; k != "esnap degraded" {
		t.Errorf("over a parent that is written: %q", k)
	}
	l.call("nvmf_subsystem_remove_ns", `{"nqn":%q,"nsid":1}`, nqn)
	l.call("bdev_lvol_delete", `{"name":"lvs/c"}`)
	l.call("bdev_lvol_clone_bdev", `{"bdev":"parent","lvs_name":"lvs","clone_name":"c"}`)
	if k := l.kinds()["c"]; k != "esnap" {
		t.Errorf("it is %q", k)
	}
	l.fails(-32602, "nvmf_subsystem_add_ns", `{"nqn":"nqn.2014-08.org.example:disks","namespace":{"bdev_name":"parent"}}`)
	l.call("bdev_lvol_snapshot", `{"lvol_name":"lvs/c","snapshot_name":"s"}`)
	l.call("bdev_lvol_delete", `{"name":"lvs/s"}`)
	if k := l.kinds()["c"]; k != "esnap" {
		t.Errorf("it is %q", k)
	}
	l.call("nvmf_subsystem_add_ns", `{"nqn":%q,"namespace":{"bdev_name":"lvs/c"}}`, nqn)
	id := l.uuidOf("lvs/c")
	eventually(t, "the host sees it", func() bool { _, err := h.OpenUUID(id); return err == nil })
	expect(t, l.open(h, "lvs/c"), 0, mib, 'p')
}

// TestSetParent moves an lvol from one parent to another, and to a disk outside.
func TestSetParent(t *testing.T) {
	l := start(t, target.Options{})
	l.call("bdev_malloc_create", `{"name":"base","num_blocks":131072,"block_size":512}`)
	l.call("bdev_malloc_create", `{"name":"outside","num_blocks":8192,"block_size":512}`)
	l.call("bdev_lvol_create_lvstore", `{"bdev_name":"base","lvs_name":"lvs","cluster_sz":65536}`)
	for _, name := range []string{"a", "b", "x"} {
		l.call("bdev_lvol_create", `{"lvol_name":%q,"size_in_mib":4,"thin_provision":true,"lvs_name":"lvs"}`, name)
	}
	port := freePort(t)
	l.export(port, "lvs/a", "lvs/b", "lvs/x", "outside")
	h := connect(t, port)
	for _, name := range []string{"lvs/a", "lvs/b", "outside"} {
		write(t, l.open(h, name), 0, bytes.Repeat([]byte{name[len(name)-1]}, 2*mib))
	}
	x := l.open(h, "lvs/x")
	write(t, x, mib, bytes.Repeat([]byte{'x'}, mib/2))
	for _, name := range []string{"a", "b"} {
		l.call("bdev_lvol_snapshot", `{"lvol_name":"lvs/%s","snapshot_name":"%s-snap"}`, name, name)
	}
	for _, name := range []string{"a", "b"} {
		l.call("bdev_lvol_set_parent", `{"lvol_name":"lvs/x","parent_name":"lvs/%s-snap"}`, name)
		expect(t, x, 0, mib, name[0])
		expect(t, x, mib, mib/2, 'x')
		expect(t, x, mib+mib/2, mib/2, name[0])
	}
	l.fails(-32602, "bdev_lvol_set_parent", `{"lvol_name":"lvs/x","parent_name":"lvs/b-snap"}`)
	l.fails(-32602, "bdev_lvol_set_parent", `{"lvol_name":"lvs/x","parent_name":"lvs/a"}`)
	l.fails(-19, "bdev_lvol_set_parent", `{"lvol_name":"lvs/x","parent_name":"lvs/nosuch"}`)
	l.fails(-32602, "bdev_lvol_set_parent_bdev", `{"lvol_name":"lvs/x","parent_name":"outside"}`) // both in use
	l.call("nvmf_subsystem_remove_ns", `{"nqn":%q,"nsid":4}`, nqn)
	l.call("nvmf_subsystem_remove_ns", `{"nqn":%q,"nsid":3}`, nqn)
	l.call("bdev_lvol_set_parent_bdev", `{"lvol_name":"lvs/x","parent_name":"outside"}`)
	if k := l.kinds()["x"]; k != "esnap" {
		t.Errorf("x is %q", k)
	}
	l.call("nvmf_subsystem_add_ns", `{"nqn":%q,"namespace":{"bdev_name":"lvs/x","nsid":5}}`, nqn)
	eventually(t, "the host sees it", func() bool { _, err := h.Open(5); return err == nil })
	x = l.open(h, "lvs/x")
	expect(t, x, 0, mib, 'e')
	expect(t, x, mib, mib/2, 'x')
	// And back, which needs it closed.
	l.fails(-32602, "bdev_lvol_set_parent", `{"lvol_name":"lvs/x","parent_name":"lvs/a-snap"}`)
	l.call("nvmf_subsystem_remove_ns", `{"nqn":%q,"nsid":5}`, nqn)
	l.call("bdev_lvol_set_parent", `{"lvol_name":"lvs/x","parent_name":"lvs/a-snap"}`)
	if k := l.kinds()["x"]; k != "clone" {
		t.Errorf("x is %q", k)
	}
	l.call("nvmf_subsystem_add_ns", `{"nqn":%q,"namespace":{"bdev_name":"outside"}}`, nqn) // free again
}

// TestShallowCopy copies what each of two snapshots holds itself: together they make the
// newer one.
func TestShallowCopy(t *testing.T) {
	l := start(t, target.Options{})
	l.call("bdev_malloc_create", `{"name":"base","num_blocks":131072,"block_size":512}`)
	l.call("bdev_malloc_create", `{"name":"copy","num_blocks":8192,"block_size":512}`)
	l.call("bdev_lvol_create_lvstore", `{"bdev_name":"base","lvs_name":"lvs","cluster_sz":65536}`)
	l.call("bdev_lvol_create", `{"lvol_name":"a","size_in_mib":4,"thin_provision":true,"lvs_name":"lvs"}`)
	port := freePort(t)
	l.export(port, "lvs/a")
	h := connect(t, port)
	a := l.open(h, "lvs/a")
	write(t, a, 0, bytes.Repeat([]byte{'1'}, mib))
	l.call("bdev_lvol_snapshot", `{"lvol_name":"lvs/a","snapshot_name":"s1"}`)
	write(t, a, mib/2, bytes.Repeat([]byte{'2'}, mib))
	if err := a.Discard(0, mib/4); err != nil {
		t.Fatal(err)
	}
	l.call("bdev_lvol_snapshot", `{"lvol_name":"lvs/a","snapshot_name":"s2"}`)
	l.fails(-32602, "bdev_lvol_start_shallow_copy", `{"src_lvol_name":"lvs/a","dst_bdev_name":"copy"}`)
	l.fails(-32602, "bdev_lvol_start_shallow_copy", `{"src_lvol_name":"lvs/s1","dst_bdev_name":"nosuch"}`)
	l.fails(-19, "bdev_lvol_start_shallow_copy", `{"src_lvol_name":"lvs/nosuch","dst_bdev_name":"copy"}`)
	l.fails(-19, "bdev_lvol_check_shallow_copy", `{"operation_id":77}`)
	for i, c := range []struct {
		name  string
		total int64
	}{{"s1", 16}, {"s2", 16}} {
		var op struct {
			ID int `json:"operation_id"`
		}
		l.into(&op, "bdev_lvol_start_shallow_copy", `{"src_lvol_name":"lvs/%s","dst_bdev_name":"copy"}`, c.name)
		if op.ID != i+1 {
			t.Errorf("operation %d is %d", i+1, op.ID)
		}
		var state struct {
			State         string
			Copied, Total int64
		}
		eventually(t, "the copy is complete", func() bool {
			l.into(&state, "bdev_lvol_check_shallow_copy", fmt.Sprintf(`{"operation_id":%d}`, op.ID))
			return state.State == "complete"
		})
		l.fails(-19, "bdev_lvol_check_shallow_copy", `{"operation_id":1}`)
	}
	l.call("nvmf_subsystem_add_ns", `{"nqn":%q,"namespace":{"bdev_name":"copy"}}`, nqn)
	id := l.uuidOf("copy")
	eventually(t, "the host sees it", func() bool { _, err := h.OpenUUID(id); return err == nil })
	if !bytes.Equal(read(t, l.open(h, "copy"), 0, 4*mib), read(t, a, 0, 4*mib)) {
		t.Error("the copy differs")
	}
}

// TestRace makes calls of all kinds at once, for the race detector and for deadlocks.
func TestRace(t *testing.T) {
	l := start(t, target.Options{Persist: true})
	l.call("bdev_malloc_create", `{"name":"base","num_blocks":131072,"block_size":512}`)
	l.call("bdev_lvol_create_lvstore", `{"bdev_name":"base","lvs_name":"lvs","cluster_sz":65536}`)
	l.call("nvmf_create_transport", `{"trtype":"TCP"}`)
	var wg sync.WaitGroup
	for w := range 6 {
		wg.Go(func() {
			for i := range 15 {
				name := fmt.Sprintf("v%d", w)
				node := fmt.Sprintf("nqn.2014-08.org.example:%s-%d", name, i%2)
				for _, c := range [][2]string{
					{"bdev_lvol_create", `{"lvol_name":"` + name + `","size_in_mib":1,"thin_provision":` + fmt.Sprint(i%2 == 0) + `,"lvs_name":"lvs"}`},
					{"nvmf_create_subsystem", `{"nqn":"` + node + `"}`},
					{"nvmf_subsystem_add_ns", `{"nqn":"` + node + `","namespace":{"bdev_name":"lvs/` + name + `"}}`},
					{"bdev_lvol_snapshot", `{"lvol_name":"lvs/` + name + `","snapshot_name":"s` + name + `"}`},
					{"bdev_get_bdevs", ``},
					{"bdev_lvol_get_lvols", ``},
					{"nvmf_get_subsystems", ``},
					{"bdev_lvol_inflate", `{"name":"lvs/` + name + `"}`},
					{"bdev_lvol_delete", `{"name":"lvs/s` + name + `"}`},
					{"bdev_lvol_delete", `{"name":"lvs/` + name + `"}`},
					{"nvmf_delete_subsystem", `{"nqn":"` + node + `"}`},
				} {
					if _, err := l.try(c[0], c[1]); err != nil {
						t.Errorf("%s %s: %v", c[0], c[1], err)
					}
				}
			}
		})
	}
	wg.Wait()
	if got := l.answer("bdev_lvol_get_lvols", ""); got != "[]" {
		t.Errorf("left: %s", got)
	}
}
