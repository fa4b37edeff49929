package guest_test

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/thaw-project/thaw/doctor"
	"github.com/thaw-project/thaw/e2e/guest"
	"github.com/thaw-project/thaw/e2e/recipe"
	"github.com/thaw-project/thaw/node/present/choose"
)

// The names of devices, by who makes them.
const (
	nvmeDevice = "/dev/nvme"
	ublkDevice = "/dev/ublkb"
	nbdDevice  = "/dev/nbd"
	fuseFile   = thawRun + "/dev/" // EROFS is mounted on it, ext4 through a loop device
	loopDevice = "/dev/loop"
)

// modes are those of conversion, with the names of their containers.
var modes = []string{"overlayfs", "overlaybd"}

// TestContainers starts containers of converted images, in both modes, on disks that the
// guest's kernel shows in different ways, and kills the node's server while they read.
// Store and registry are on this machine.
//
// In mode overlayfs the root is an overlay over the EROFS on the block's own device. In
// mode overlaybd it is an ext4 on a writable device: a qcow2 file, whose backing the
// server reads over the network.
func TestContainers(t *testing.T) {
	guest.Require(t)
	store := newStoreHost(t)
	box := busybox(t)
	refs := map[string]string{}
	for _, mode := range modes {
		source := store.registry.Ref("source", mode)
		if err := recipe.Push(t.Context(), containerImage(t, box, mode), source); err != nil {
			t.Fatal(err)
		}
		refs[mode] = store.convert(t, source, mode)
	}
	n := newNode(t, store)
	for _, v := range []struct {
		name, kind      string
		block, writable string // how their devices are called
		before          string // script
	}{
		{"nvme-fabrics", "nvme-fabrics", nvmeDevice, ublkDevice, ""},
		{"ublk", "ublk", ublkDevice, ublkDevice, ""},
		{"nbd", "nbd", nbdDevice, nbdDevice, ""},
		{"auto", "auto", nvmeDevice, ublkDevice, ""},
		{"auto without nvme-tcp and ublk", "auto", fuseFile, loopDevice, "without nvme_tcp nvme_fabrics ublk_drv"},
	} {
		ok := t.Run(v.name, func(t *testing.T) {
			n.do(t, v.before)
			n.start(t, v.kind)
			for _, mode := range modes {
				n.do(t, fmt.Sprintf(`ctr images pull --plain-http --snapshotter thaw %[1]s >/tmp/pull.log 2>&1 || { cat /tmp/pull.log; exit 1; }
					: >/tmp/%[2]s.log
					ctr run -d --snapshotter thaw --log-uri file:///tmp/%[2]s.log %[1]s %[2]s
					await '[ $(passes %[2]s) -ge 1 ] || grep FAILED /tmp/%[2]s.log' && ! grep FAILED /tmp/%[2]s.log`, refs[mode], mode))
			}
			if v.kind == "auto" {
				n.wantDoctor(t, v.block, v.writable)
			}
			on := devicesOf(t, n)
			if d := on["overlayfs"]; !strings.HasPrefix(d, v.block) {
				t.Errorf("the layers in mode overlayfs are on %s, not on %s*", d, v.block)
			}
			if d := on["overlaybd"]; !strings.HasPrefix(d, v.writable) {
				t.Errorf("the root in mode overlaybd is on %s, not on %s*", d, v.writable)
			}
			for _, d := range strings.Fields(on["blocks"]) {
				if !strings.HasPrefix(d, v.block) && !(v.block == fuseFile && strings.HasPrefix(d, loopDevice)) {
					t.Errorf("a block is on %s, not on %s*", d, v.block)
				}
			}
			t.Logf("mode overlayfs is on %s, mode overlaybd on %s; devices:\n%s", on["overlayfs"], on["overlaybd"], n.do(t, "devices"))
			if v.name != "auto" { // or it would be the first again
				n.killServer(t, v.block != nvmeDevice)
				if now := devicesOf(t, n); fmt.Sprint(now) != fmt.Sprint(on) {
					t.Errorf("after a restart the containers are on %v, not on %v", now, on)
				}
			}
			if v.name == "nvme-fabrics" {
				n.killStore(t)
			}
			n.removeContainers(t)
			if v.name == "auto" {
				n.teardown(t)
			}
			n.removeImages(t, refs)
			n.stop(t)
			store.wantNoAttachments(t)
		})
		if !ok {
			return // what is left is in the way of the next
		}
	}
}

// devicesOf returns, by mode, which device the container's file system is on, by the
// kernel's own record, and, as "blocks", which ones the images' blocks are on.
func devicesOf(t *testing.T, n *node) map[string]string {
	t.Helper()
	// The block of the layers is mounted once for all containers: it is where the overlay's
	// first lower directory is.
	out := n.do(t, `
		rootfs=/run/containerd/io.containerd.runtime.v2.task/lab
		lower=$(awk -v p=$rootfs/overlayfs/rootfs '$5 == p { print $NF }' /proc/self/mountinfo | tr , '\n' | sed -n 's/^lowerdir=\([^:]*\).*/\1/p')
		source_of ${lower%/*}
		source_of $rootfs/overlaybd/rootfs
		for m in `+thawRoot+`/mnt/*; do source_of $m | cut -d " " -f 1; done`)
	lines := strings.Split(strings.TrimSpace(out), "\n")
	if len(lines) != 4 || !strings.HasSuffix(lines[0], " erofs") || !strings.HasSuffix(lines[1], " ext4") {
		t.Fatalf("the containers' file systems are\n%s", out)
	}
	return map[string]string{"overlayfs": strings.Fields(lines[0])[0], "overlaybd": strings.Fields(lines[1])[0], "blocks": strings.Join(lines[2:], " ")}
}

// wantDoctor fails the test unless thaw doctor says what devices there are.
func (n *node) wantDoctor(t *testing.T, block, writable string) {
	t.Helper()
	presentation := map[string]string{nvmeDevice: "nvme-fabrics", ublkDevice: "ublk", nbdDevice: "nbd", fuseFile: "fuse", loopDevice: "fuse"}
	var findings []doctor.Finding
	out := n.do(t, "thaw doctor --config /tmp/thaw.toml --containerd /run/c.sock --json")
	if err := json.Unmarshal([]byte(out), &findings); err != nil {
		t.Fatalf("%v:\n%s", err, out)
	}
	for check, device := range map[choose.Class]string{choose.Remote: block, choose.Writable: writable} {
		i := slices.IndexFunc(findings, func(f doctor.Finding) bool { return f.Check == string(check) })
		if i < 0 || findings[i].State != doctor.OK || !strings.HasPrefix(findings[i].Detail, "by "+presentation[device]+":") {
			t.Errorf("thaw doctor says of %s, which are %s*:\n%s", check, device, out)
		}
	}
	if i := slices.IndexFunc(findings, func(f doctor.Finding) bool { return f.State == doctor.Fail }); i >= 0 {
		t.Errorf("thaw doctor: %+v", findings[i])
	}
}

// killServer kills the server while the containers read, and starts it again: they may
// wait, and get no error. Blocks that no process serves are read meanwhile, and a teardown
// leaves alone what is in use.
func (n *node) killServer(t *testing.T, served bool) {
	t.Helper()
	wait := `await 'echo 1 >/proc/sys/vm/drop_caches; stuck overlayfs'`
	if !served {
		wait = `now=$(passes overlayfs)
			await 'echo 1 >/proc/sys/vm/drop_caches; [ $(passes overlayfs) -ge $((now + 2)) ]'`
	}
	n.do(t, `
		echo 3 >/proc/sys/vm/drop_caches
		kill -9 $(cat /run/thaw.pid); await dead
		await 'echo 1 >/proc/sys/vm/drop_caches; stuck overlaybd'
		`+wait+`
		if thaw server teardown --config /tmp/thaw.toml >/tmp/teardown.log 2>&1; then cat /tmp/teardown.log; exit 1; fi
		grep 'in use' /tmp/teardown.log`)
	n.do(t, "server")
	n.wantPasses(t)
}

// killStore kills the store, and starts it again: the kernel finds the disks that it
// knows, and goes on.
func (n *node) killStore(t *testing.T) {
	t.Helper()
	n.store.thaw.Kill()
	n.do(t, `await 'echo 1 >/proc/sys/vm/drop_caches; stuck overlayfs'`)
	if err := n.store.thaw.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	n.wantPasses(t)
}

// wantPasses waits until both containers have read all of their data again, and that
// not from the cache.
func (n *node) wantPasses(t *testing.T) {
	t.Helper()
	n.do(t, `
		for id in overlayfs overlaybd; do
			now=$(passes $id)
			await 'echo 1 >/proc/sys/vm/drop_caches; [ $(passes $id) -ge $((now + 2)) ] || grep FAILED /tmp/$id.log'
			if grep FAILED /tmp/$id.log; then exit 1; fi
		done`)
}

// removeContainers checks what they wrote, and removes them. containerd takes snapshots
// away some time after it says so, and does not try again when the snapshotter is away.
func (n *node) removeContainers(t *testing.T) {
	t.Helper()
	n.do(t, `
		for id in overlayfs overlaybd; do
			root=/run/containerd/io.containerd.runtime.v2.task/lab/$id/rootfs
			grep -qx changed $root/data/greeting; [ ! -e $root/data/gone ]; [ $(cat $root/data/written) -ge 1 ]
			ctr task rm -f $id >/dev/null || true # says how it ended
			ctr container rm $id
		done
		await 'thaw snapshot list --config /tmp/thaw.toml >/tmp/snapshots && ! grep -q active /tmp/snapshots'`)
}

// teardown takes away what a killed server left, with images and without containers, and
// starts another.
func (n *node) teardown(t *testing.T) {
	t.Helper()
	n.do(t, `
		kill -9 $(cat /run/thaw.pid); await dead
		thaw server teardown --config /tmp/thaw.toml
		if [ -n "$(left)" ]; then left; exit 1; fi
		server`)
}

// removeImages removes the images, and waits until nothing is left.
func (n *node) removeImages(t *testing.T, refs map[string]string) {
	t.Helper()
	n.do(t, `
		ctr images rm --sync `+refs["overlayfs"]+" "+refs["overlaybd"]+`
		await '[ -z "$(left)" ]'
		[ "$(thaw snapshot list --config /tmp/thaw.toml | wc -l)" -le 1 ]`)
}
