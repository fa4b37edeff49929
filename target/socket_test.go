package target_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/thaw-project/thaw/target"
)

// qemuIO runs commands of qemu-io on an NBD socket, as a machine emulator's disk: it
// waits for a server that went.
func qemuIO(t *testing.T, socket string, commands ...string) (string, error) {
	t.Helper()
	args := []string{"--image-opts", "driver=nbd,server.type=unix,server.path=" + socket + ",reconnect-delay=60,open-timeout=20,discard=unmap"}
	for _, c := range commands {
		args = append(args, "-c", c)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	out, err := exec.CommandContext(ctx, "qemu-io", args...).CombinedOutput()
	if err == nil && (strings.Contains(string(out), "failed") || strings.Contains(string(out), "error")) {
		err = fmt.Errorf("qemu-io: %s", out) // its status is of the last command
	}
	return string(out), err
}

// nbdInfo is what a client is told of an export.
type nbdInfo struct {
	Size      int64 `json:"export-size"`
	ReadOnly  bool  `json:"is_read_only"`
	Flush     bool  `json:"can_flush"`
	FUA       bool  `json:"can_fua"`
	Trim      bool  `json:"can_trim"`
	Zero      bool  `json:"can_zero"`
	MultiConn bool  `json:"can_multi_conn"`
	Block     int   `json:"block_size_minimum"`
}

func infoOf(t *testing.T, socket string) nbdInfo {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "nbdinfo", "--json", "nbd+unix:///?socket="+socket).Output()
	var all struct{ Exports []nbdInfo }
	if err != nil || json.Unmarshal(out, &all) != nil || len(all.Exports) != 1 {
		t.Fatalf("nbdinfo: %v\n%s", err, out)
	}
	return all.Exports[0]
}

func TestSocketExport(t *testing.T) {
	l := start(t, target.Options{})
	dir := shortDir(t)
	l.call("bdev_malloc_create", `{"name":"m","num_blocks":65536,"block_size":512}`)
	l.call("bdev_malloc_create", `{"name":"big","num_blocks":4096,"block_size":4096}`)
	l.call("bdev_lvol_create_lvstore", `{"bdev_name":"m","lvs_name":"lvs","cluster_sz":65536}`)
	l.call("bdev_lvol_create", `{"lvol_name":"a","size_in_mib":8,"thin_provision":true,"lvs_name":"lvs"}`)
	a, snap, big := filepath.Join(dir, "a"), filepath.Join(dir, "snap"), filepath.Join(dir, "big")
	export := `{"bdev_name":%q,"socket":%q}`
	l.call("thaw_nbd_export", export, "lvs/a", a)
	l.call("thaw_nbd_export", export, "lvs/a", a) // is there
	l.fails(-17, "thaw_nbd_export", export, "big", a)
	l.fails(-19, "thaw_nbd_export", export, "nosuch", snap)
	l.fails(-22, "thaw_nbd_export", export, "big", "relative")
	l.fails(-22, "thaw_nbd_export", export, "big", dir+"/../x")
	l.fails(-22, "thaw_nbd_export", export, "big", "/"+strings.Repeat("x", 107))
	longest := filepath.Join(dir, strings.Repeat("x", 98-len(dir)))
	l.fails(-22, "thaw_nbd_export", export, "big", longest+"x")
	l.call("thaw_nbd_export", export, "big", longest)
	l.call("thaw_nbd_unexport", `{"socket":%q}`, longest)
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("somebody's"), 0o600); err != nil {
		t.Fatal(err)
	}
	l.fails(-17, "thaw_nbd_export", export, "big", file)
	if raw, err := os.ReadFile(file); string(raw) != "somebody's" {
		t.Errorf("what was there is %q, %v", raw, err)
	}
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	l.fails(-2, "thaw_nbd_export", export, "big", dir+"/nosuch/x")
	l.fails(-98, "thaw_nbd_export", export, "big", l.socket) // somebody else answers there
	l.fails(-1, "thaw_nbd_export", export, "lvs/a", snap)    // another writer
	l.fails(-32602, "nvmf_subsystem_add_ns", `{"nqn":%q,"namespace":{"bdev_name":"lvs/a"}}`, nqn)
	if st, err := os.Stat(a); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("socket: %v %v", st, err)
	}
	if i, want := infoOf(t, a), (nbdInfo{8 * mib, false, true, true, true, true, true, 512}); i != want {
		t.Errorf("lvs/a: %+v, want %+v", i, want)
	}
	if out, err := qemuIO(t, a, "write -P 7 64k 128k", "flush", "write -z 64k 64k", "discard 1M 1M", "read -P 0 64k 64k", "read -P 7 128k 64k"); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	l.call("bdev_lvol_snapshot", `{"lvol_name":"lvs/a","snapshot_name":"s"}`)
	l.call("thaw_nbd_export", export, "lvs/s", snap)
	l.call("thaw_nbd_export", export, "lvs/s", snap+"2") // what nobody writes, many may read
	l.call("thaw_nbd_export", export, "big", big)
	if i, want := infoOf(t, snap), (nbdInfo{8 * mib, true, true, true, false, false, true, 512}); i != want {
		t.Errorf("lvs/s: %+v, want %+v", i, want)
	}
	if i := infoOf(t, big); i.Block != 4096 {
		t.Errorf("big: %+v", i)
	}
	if out, err := qemuIO(t, snap, "read -P 7 128k 64k"); err == nil {
		t.Errorf("qemu-io opened a read-only disk for writing:\n%s", out)
	}
	if out, err := exec.CommandContext(t.Context(), "qemu-io", "-r", "--image-opts", "driver=nbd,server.type=unix,server.path="+snap, "-c", "read -P 7 128k 64k").CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
	if got, want := l.answer("thaw_nbd_get_exports", `{"bdev_name":"lvs/s"}`), fmt.Sprintf(`[{"bdev_name":%q,"socket":%q,"read_only":true,"connections":0},{"bdev_name":%[1]q,"socket":"%[2]s2","read_only":true,"connections":0}]`, l.uuidOf("lvs/s").String(), snap); got != want {
		t.Errorf("exports of lvs/s:\n got %s\nwant %s", got, want)
	}
	// What is shown does not shrink, and goes with its bdev.
	l.fails(-32602, "bdev_lvol_resize", `{"name":"lvs/a","size_in_mib":4}`)
	l.call("bdev_lvol_delete", `{"name":"lvs/a"}`)
	if _, err := os.Stat(a); !os.IsNotExist(err) {
		t.Errorf("the socket of a deleted bdev: %v", err)
	}
	l.fails(-19, "thaw_nbd_unexport", `{"socket":%q}`, a)
	l.fails(-22, "thaw_nbd_unexport", `{}`)
	l.call("thaw_nbd_unexport", `{"bdev_name":"lvs/s"}`)
	l.call("thaw_nbd_unexport", `{"socket":%q}`, big)
	if got := l.answer("thaw_nbd_get_exports", ""); got != "[]" {
		t.Errorf("left: %s", got)
	}
	left, err := os.ReadDir(dir)
	if err != nil || len(left) != 0 {
		t.Errorf("left: %v %v", left, err)
	}
}

// TestSocketExportOfNamespace exports what a subsystem shows: both are the same disk to
// the same host, and go together.
func TestSocketExportOfNamespace(t *testing.T) {
	l := start(t, target.Options{})
	socket := filepath.Join(shortDir(t), "s")
	l.call("bdev_malloc_create", `{"name":"m","num_blocks":65536,"block_size":512}`)
	port := freePort(t)
	params := fmt.Sprintf(`{"bdev_name":"m","socket":%q,"nqn":%q}`, socket, nqn)
	l.fails(-19, "thaw_nbd_export", params)
	l.export(port, "m")
	l.fails(-1, "thaw_nbd_export", `{"bdev_name":"m","socket":%q}`, socket)
	l.call("thaw_nbd_export", params)
	d := l.open(connect(t, port), "m")
	write(t, d, 0, bytes.Repeat([]byte{9}, mib))
	if out, err := qemuIO(t, socket, "read -P 9 0 1M", "write -P 8 1M 1M"); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
	expect(t, d, mib, mib, 8)
	l.call("nvmf_subsystem_remove_ns", `{"nqn":%q,"nsid":1}`, nqn)
	if got := l.answer("thaw_nbd_get_exports", ""); got != "[]" {
		t.Errorf("without its nvmeNamespace: %s", got)
	}
	l.call("nvmf_subsystem_add_ns", `{"nqn":%q,"namespace":{"bdev_name":"m"}}`, nqn)
	l.call("thaw_nbd_export", params)
	l.call("nvmf_delete_subsystem", `{"nqn":%q}`, nqn)
	if got := l.answer("thaw_nbd_get_exports", ""); got != "[]" {
		t.Errorf("without its subsystem: %s", got)
	}
}

// TestSocketExportFailing puts a disk on which all fails in the place of one that is gone:
// a client that waits for it gets an error.
func TestSocketExportFailing(t *testing.T) {
	l := start(t, target.Options{})
	socket := filepath.Join(shortDir(t), "s")
	l.call("bdev_malloc_create", `{"name":"m","num_blocks":65536,"block_size":512}`)
	l.call("thaw_nbd_export", `{"bdev_name":"m","socket":%q}`, socket)
	for _, p := range []string{`"failing_bytes":100`, `"failing_bytes":-512`, `"failing_bytes":512,"bdev_name":"m"`, `"failing_bytes":512,"nqn":"n"`, `"nqn":"n"`} {
		l.fails(-22, "thaw_nbd_export", `{%s,"socket":%q}`, p, socket+"2")
	}
	l.fails(-17, "thaw_nbd_export", `{"failing_bytes":33554432,"socket":%q}`, socket)
	ended := make(chan string, 1)
	go func() {
		out, _ := qemuIO(t, socket, "write -P 5 0 1M", "sleep 1500", "read 0 1M")
		ended <- out
	}()
	eventually(t, "qemu-io is connected", func() bool { return strings.Contains(l.answer("thaw_nbd_get_exports", ""), `"connections":1`) })
	time.Sleep(500 * time.Millisecond) // it has written
	l.call("bdev_malloc_delete", `{"name":"m"}`)
	l.call("thaw_nbd_export", `{"failing_bytes":33554432,"socket":%q}`, socket)
	if out := <-ended; !strings.Contains(out, "wrote 1048576/1048576") || !strings.Contains(out, "read failed: Input/output error") {
		t.Errorf("qemu-io:\n%s", out)
	}
	if got, want := l.answer("thaw_nbd_get_exports", ""), fmt.Sprintf(`[{"bdev_name":"","socket":%q,"failing_bytes":33554432,"read_only":false,"connections":0}]`, socket); got != want {
		t.Errorf("exports:\n got %s\nwant %s", got, want)
	}
	l.call("thaw_nbd_unexport", `{"socket":%q}`, socket)
}

// TestSocketExportKilled kills a target while a machine emulator's disk is in use: what is
// on record comes back, and the disk has waited.
func TestSocketExportKilled(t *testing.T) {
	root := shortDir(t)
	disk := file(t, root, "disk", 64*mib)
	socket := filepath.Join(root, "s")
	l := spawn(t, root, true)
	l.call("bdev_aio_create", `{"name":"aio0","filename":%q,"block_size":512}`, disk)
	l.call("bdev_null_create", `{"name":"n","num_blocks":8192,"block_size":512}`)
	l.call("nvmf_create_subsystem", `{"nqn":%q}`, nqn)
	l.call("nvmf_subsystem_add_ns", `{"nqn":%q,"namespace":{"bdev_name":"aio0"}}`, nqn)
	l.call("thaw_nbd_export", `{"bdev_name":"aio0","socket":%q,"nqn":%q}`, socket, nqn)
	l.call("thaw_nbd_export", `{"bdev_name":"n","socket":%q}`, socket+"n")
	before := l.answer("thaw_nbd_get_exports", "")
	type outcome struct {
		out string
		err error
	}
	for _, signal := range []syscall.Signal{syscall.SIGKILL, syscall.SIGTERM} {
		ended := make(chan outcome, 1)
		go func() {
			out, err := qemuIO(t, socket, "write -P 5 0 1M", "sleep 1500", "write -P 6 1M 1M", "read -P 5 0 1M", "read -P 6 1M 1M")
			ended <- outcome{out, err}
		}()
		eventually(t, "qemu-io is connected", func() bool { return strings.Contains(l.answer("thaw_nbd_get_exports", ""), `"connections":1`) })
		l.proc.Process.Signal(signal)
		l.stop()
		time.Sleep(2 * time.Second) // the disk is asked while nobody serves it
		l = spawn(t, root, true)
		if o := <-ended; o.err != nil {
			t.Fatalf("%s: %v\n%s", signal, o.err, o.out)
		}
		eventually(t, "the exports are as before", func() bool { return l.answer("thaw_nbd_get_exports", "") == before })
	}
	l.call("thaw_nbd_unexport", `{"socket":%q}`, socket)
	l.kill()
	l = spawn(t, root, true)
	if got := l.answer("thaw_nbd_get_exports", ""); strings.Contains(got, `"`+socket+`"`) || !strings.Contains(got, socket+"n") {
		t.Errorf("after a restart: %s", got)
	}
}

// ioStat is what bdev_get_iostat says of a bdev.
type ioStat struct {
	Name          string
	BytesRead     int64            `json:"bytes_read"`
	ReadOps       int64            `json:"num_read_ops"`
	BytesWritten  int64            `json:"bytes_written"`
	WriteOps      int64            `json:"num_write_ops"`
	BytesUnmapped int64            `json:"bytes_unmapped"`
	ReadTicks     int64            `json:"read_latency_ticks"`
	MaxReadTicks  int64            `json:"max_read_latency_ticks"`
	MinReadTicks  int64            `json:"min_read_latency_ticks"`
	Errors        map[string]int64 `json:"io_error"`
}

func (l *lab) ioStat(name, more string) ioStat {
	l.t.Helper()
	var r struct {
		TickRate int64 `json:"tick_rate"`
		Ticks    int64
		Bdevs    []ioStat
	}
	l.into(&r, "bdev_get_iostat", `{"name":%q%s}`, name, more)
	if r.TickRate != 1e9 || r.Ticks <= 0 || len(r.Bdevs) != 1 {
		l.t.Fatalf("bdev_get_iostat: %+v", r)
	}
	return r.Bdevs[0]
}

// TestIOStat counts what a host and an lvstore do.
func TestIOStat(t *testing.T) {
	l := start(t, target.Options{})
	disk := file(t, shortDir(t), "disk", 64*mib)
	l.call("bdev_aio_create", `{"name":"aio0","filename":%q,"block_size":512}`, disk)
	l.call("bdev_lvol_create_lvstore", `{"bdev_name":"aio0","lvs_name":"lvs","cluster_sz":65536}`)
	l.call("bdev_lvol_create", `{"lvol_name":"a","size_in_mib":8,"thin_provision":true,"lvs_name":"lvs"}`)
	port := freePort(t)
	l.export(port, "lvs/a")
	d := l.open(connect(t, port), "lvs/a")
	base := l.ioStat("aio0", "")
	for i := range int64(4) {
		write(t, d, i*mib, bytes.Repeat([]byte{1}, 4096))
	}
	read(t, d, 0, 64<<10)
	if err := d.Discard(0, mib); err != nil {
		t.Fatal(err)
	}
	s := l.ioStat("lvs/a", "")
	if s.Name != l.uuidOf("lvs/a").String() || s.WriteOps != 4 || s.BytesWritten != 4*4096 || s.ReadOps != 1 || s.BytesRead != 64<<10 || s.BytesUnmapped != mib || len(s.Errors) != 0 ||
		s.MinReadTicks <= 0 || s.MaxReadTicks != s.ReadTicks {
		t.Errorf("lvs/a: %+v", s)
	}
	if b := l.ioStat("aio0", ""); b.BytesWritten < base.BytesWritten+4*4096 {
		t.Errorf("aio0: %+v, before %+v", b, base)
	}
	if s := l.ioStat("lvs/a", `,"reset_mode":"maxmin"`); s.MaxReadTicks == 0 {
		t.Errorf("before a reset: %+v", s)
	}
	if s := l.ioStat("lvs/a", `,"reset_mode":"all"`); s.MaxReadTicks != 0 || s.WriteOps != 4 {
		t.Errorf("after a reset of extremes: %+v", s)
	}
	if s := l.ioStat("lvs/a", ""); s.WriteOps != 0 || s.BytesUnmapped != 0 {
		t.Errorf("after a reset: %+v", s)
	}
	write(t, d, 0, make([]byte, 512))
	l.call("bdev_reset_iostat", `{"name":"lvs/a"}`)
	if s := l.ioStat("lvs/a", ""); s.WriteOps != 0 {
		t.Errorf("after bdev_reset_iostat: %+v", s)
	}
}

// TestResetController makes the paths of a remote subsystem anew under load.
func TestResetController(t *testing.T) {
	far, near := start(t, target.Options{}), start(t, target.Options{})
	far.call("bdev_malloc_create", `{"name":"m","num_blocks":65536,"block_size":512}`)
	port := freePort(t)
	far.export(port, "m")
	near.fails(-19, "bdev_nvme_reset_controller", `{"name":"r"}`)
	near.call("bdev_nvme_attach_controller", attach("r", port, `,"ctrlr_loss_timeout_sec":-1,"reconnect_delay_sec":1`))
	near.fails(-19, "bdev_nvme_reset_controller", `{"name":"r","cntlid":60000}`)
	local := freePort(t)
	near.export(local, "rn1")
	stop := load(t, near.open(connect(t, local), "rn1"), 0, 2)
	controller := func() string {
		var list []struct {
			CNTLID int `json:"cntlid"`
		}
		far.into(&list, "nvmf_subsystem_get_controllers", `{"nqn":%q}`, nqn)
		return fmt.Sprint(list)
	}
	for range 3 {
		before := controller()
		near.call("bdev_nvme_reset_controller", `{"name":"r"}`)
		if after := controller(); after == before {
			t.Errorf("controllers %s, as before", after)
		}
	}
	stop()
}
