package nbd

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// fill writes random data to three quarters of a device, leaving holes.
func fill(t testing.TB, m *memory) {
	t.Helper()
	r := rand.New(rand.NewPCG(1, 2))
	p := make([]byte, memoryBlock)
	for off := 0; off < len(m.b); off += memoryBlock {
		if (off/memoryBlock)%64 >= 48 {
			continue
		}
		for i := range p {
			p[i] = byte(r.Uint32())
		}
		n := min(memoryBlock, len(m.b)-off)
		if _, err := m.WriteAt(p[:n], int64(off)); err != nil {
			t.Fatal(err)
		}
	}
}

func uri(socket, export string) string { return "nbd+unix:///" + export + "?socket=" + socket }

func TestNbdinfo(t *testing.T) {
	m := newMemory(8<<20 + 512)
	fill(t, m)
	ro := newMemory(1 << 20)
	ro.readOnly = true
	_, socket := start(t, Config{},
		Export{Name: "disk", Description: "a disk", Device: sparse{m}},
		Export{Name: "blocks", Device: newMemory(1 << 20), MinBlock: 4096},
		Export{Name: "ro", Device: ro})
	var info struct {
		Protocol string
		TLS      bool
		Exports  []struct {
			Name             string `json:"export-name"`
			Description      string
			Size             int64 `json:"export-size"`
			Contexts         []string
			ReadOnly         bool `json:"is_read_only"`
			MultiConn        bool `json:"can_multi_conn"`
			Cache            bool `json:"can_cache"`
			DF               bool `json:"can_df"`
			FastZero         bool `json:"can_fast_zero"`
			Flush            bool `json:"can_flush"`
			FUA              bool `json:"can_fua"`
			Trim             bool `json:"can_trim"`
			Zero             bool `json:"can_zero"`
			MinimumBlockSize int  `json:"block_size_minimum"`
			PreferredSize    int  `json:"block_size_preferred"`
			MaximumSize      int  `json:"block_size_maximum"`
		}
	}
	out := tool(t, "nbdinfo", "--list", "--json", uri(socket, ""))
	if err := json.Unmarshal([]byte(out), &info); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if info.Protocol != "newstyle-fixed" || len(info.Exports) != 3 {
		t.Fatalf("nbdinfo: %s", out)
	}
	b, d, r := info.Exports[0], info.Exports[1], info.Exports[2]
	if b.Name != "blocks" || b.MinimumBlockSize != 4096 || b.PreferredSize != 4096 || b.MaximumSize != 32<<20 {
		t.Errorf("blocks: %+v", b)
	}
	if d.Name != "disk" || d.Description != "a disk" || d.Size != 8<<20+512 || d.ReadOnly || d.MinimumBlockSize != 1 ||
		!(d.MultiConn && d.Cache && d.DF && d.FastZero && d.Flush && d.FUA && d.Trim && d.Zero) ||
		len(d.Contexts) != 1 || d.Contexts[0] != "base:allocation" {
		t.Errorf("disk: %+v", d)
	}
	if r.Name != "ro" || !r.ReadOnly || r.Trim || r.Zero || !r.MultiConn {
		t.Errorf("ro: %+v", r)
	}
	var extents []struct {
		Offset, Length int64
		Type           int
	}
	out = tool(t, "nbdinfo", "--map", "--json", uri(socket, "disk"))
	if err := json.Unmarshal([]byte(out), &extents); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	at := int64(0)
	for _, e := range extents {
		hole := (e.Offset/memoryBlock)%64 >= 48
		if e.Offset != at || hole != (e.Type == 3) {
			t.Errorf("extent %+v", e)
		}
		at += e.Length
	}
	if at != 8<<20+512 || len(extents) != 65 {
		t.Errorf("%d extents up to %d", len(extents), at)
	}
	if out, err := try(t, "nbdinfo", uri(socket, "none")); err == nil {
		t.Errorf("nbdinfo of no export: %s", out)
	}
}

func TestNbdcopy(t *testing.T) {
	m := newMemory(16<<20 + 1536)
	fill(t, m)
	w := newMemory(16<<20 + 1536)
	_, socket := start(t, Config{}, Export{Name: "r", Device: sparse{m}}, Export{Name: "w", Device: sparse{w}})
	file := filepath.Join(t.TempDir(), "copy")
	for _, args := range [][]string{
		{"--connections=4", "--requests=16"},
		{"--synchronous"},
		{"--request-size=8388608"},
	} {
		os.Remove(file)
		tool(t, "nbdcopy", append(args, uri(socket, "r"), file)...)
		got, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if sha256.Sum256(got) != sha256.Sum256(m.b) {
			t.Errorf("nbdcopy %v: read what was not there", args)
		}
		w.mu.Lock()
		for i := range w.b {
			w.b[i] = 0xee
		}
		w.mu.Unlock()
		tool(t, "nbdcopy", append(append([]string{"--flush"}, args...), file, uri(socket, "w"))...)
		if !bytes.Equal(w.content(), m.b) {
			t.Errorf("nbdcopy %v: wrote something else", args)
		}
	}
	if w.flushes.Load() == 0 {
		t.Error("no flush arrived")
	}
}

func TestQemu(t *testing.T) {
	m := newMemory(16<<20 + 512)
	fill(t, m)
	_, socket := start(t, Config{}, Export{Name: "d", Device: sparse{m}})
	u := uri(socket, "d")
	if out := tool(t, "qemu-img", "info", "-f", "raw", u); !strings.Contains(out, "(16777728 bytes)") {
		t.Errorf("qemu-img info: %s", out)
	}
	file := filepath.Join(t.TempDir(), "f.qcow2")
	tool(t, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", u, file)
	tool(t, "qemu-img", "compare", "-f", "raw", "-F", "qcow2", u, file)
	out := tool(t, "qemu-io", "-f", "raw", "-t", "none",
		"-c", "write -P 0x5a 1M 100k", "-c", "write -f -P 0x5b 1024512 512", "-c", "flush", "-c", "read -P 0x5a 1M 50k",
		"-c", "write -z 2M 1M", "-c", "read -P 0 2M 1M", "-c", "write -z -u 4M 64k", "-c", "discard 5M 1M", "-c", "read -P 0 5M 1M",
		"-c", "aio_write -P 7 6M 3M", "-c", "aio_write -P 8 9M 512", "-c", "aio_flush", "-c", "read -P 7 6M 3M", "-c", "read -P 8 9M 512", u)
	if strings.Contains(out, "fail") || strings.Contains(out, "rror") {
		t.Errorf("qemu-io: %s", out)
	}
	b := m.content()
	if !bytes.Equal(b[1<<20:1<<20+100<<10], bytes.Repeat([]byte{0x5a}, 100<<10)) || b[1024512] != 0x5b || b[6<<20] != 7 {
		t.Error("what qemu-io wrote is not there")
	}
	if out, err := try(t, "qemu-img", "compare", "-f", "raw", "-F", "qcow2", u, file); err == nil {
		t.Errorf("qemu-img finds the changed disk equal: %s", out)
	}
	if m.flushes.Load() == 0 {
		t.Error("no flush arrived")
	}
}

func TestFio(t *testing.T) {
	m := newMemory(16 << 20)
	_, socket := start(t, Config{}, Export{Device: m})
	args := []string{"--name=v", "--ioengine=nbd", "--uri=" + uri(socket, ""), "--rw=randwrite", "--bsrange=512-128k", "--bs_unaligned=0",
		"--iodepth=32", "--size=16M", "--verify=crc32c", "--verify_fatal=1", "--thread=1", "--fsync=64", "--verify_state_save=0"}
	out, err := try(t, "fio", args...)
	if err != nil && strings.Contains(out, "engine nbd not loadable") {
		t.Skip("this fio has no nbd engine")
	}
	if err != nil || !strings.Contains(out, "err= 0") {
		t.Fatalf("fio: %v\n%s", err, out)
	}
}
