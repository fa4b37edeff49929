package guest_test

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/thaw-project/thaw/e2e/guest"
	"github.com/thaw-project/thaw/e2e/recipe"
)

// hostName is what the guest's snapshotter is called at the card's image-mgmt.
const hostName = "guest-host"

// cardNode is a card with all that a DPU runs, and the guest as the host it is plugged into.
type cardNode struct {
	*node
	card             *simulatedCard
	attacher, images *daemon
	config           string // of the card's processes
	attacherPort     string
}

// newCardNode starts a card's processes on this machine, boots the guest, and starts
// containerd and `thaw snapshotter` in it: that is all that the host runs.
func newCardNode(t *testing.T, store *storeHost) *cardNode {
	t.Helper()
	c := newCard(t, filepath.Join(store.lab.Bin, "thaw"))
	port, attacherPort := freePort(t), freePort(t)
	store.run(t, "certificate", "issue", "--ca", store.ca, "--node", "dpu", "--address", guest.HostAddress, "--out", filepath.Join(store.ca, "dpu"))
	store.run(t, "certificate", "issue", "--ca", store.ca, "--node", hostName, "--out", filepath.Join(store.ca, "host"))
	var functions []string
	for i := range cardFunctions {
		functions = append(functions, fmt.Sprintf("%q", fmt.Sprintf("0:%d:0", i)))
	}
	config := filepath.Join(c.dir, "card.toml")
	if err := os.WriteFile(config, []byte(fmt.Sprintf(`
root = %q
run = %q
roles = ["card", "images"]
log_level = "debug"
[card]
bridge = %q
host = %q
functions = [%s]
[card.listen]
address = %[11]q
certificate = "%[7]s/dpu/dpu.crt"
key = "%[7]s/dpu/dpu.key"
client_ca = "%[7]s/ca.crt"
clients = [%[4]q]
[images]
mode = "dpu"
[images.listen]
address = %[6]q
certificate = "%[7]s/dpu/dpu.crt"
key = "%[7]s/dpu/dpu.key"
client_ca = "%[7]s/ca.crt"
clients = [%[8]q]
[[remote]]
name = %[9]q
attacher = %[10]q
certificate = "%[7]s/node/%[4]s.crt"
key = "%[7]s/node/%[4]s.key"
ca = "%[7]s/ca.crt"
`, filepath.Join(c.dir, "root"), filepath.Join(c.dir, "run"), filepath.Join(c.dir, "bridge"), nodeName, strings.Join(functions, ", "),
		net.JoinHostPort("127.0.0.1", port), store.ca, hostName, storeName, net.JoinHostPort(store.address, "7443"), net.JoinHostPort("127.0.0.1", attacherPort))), 0o600); err != nil {
		t.Fatal(err)
	}
	n := &cardNode{card: c, config: config, attacherPort: attacherPort,
		attacher: &daemon{program: c.program, log: filepath.Join(c.dir, "attacher.log"), args: []string{"attacher", "--config", config, "--role", "card"}},
		images:   &daemon{program: c.program, log: filepath.Join(c.dir, "images.log"), args: []string{"image-mgmt", "--config", config}}}
	g := guest.New(t, guest.Options{
		// Nothing that could reach a store, or show a disk by itself.
		Modules:   []string{"nvme", "overlay", "erofs", "ext4"},
		Files:     map[string]string{"bin": store.lab.Bin, "host": filepath.Join(store.ca, "host"), "node": filepath.Join(store.ca, "node"), "ca.crt": filepath.Join(store.ca, "ca.crt")},
		Args:      rootPorts(c.qmp),
		MemoryMB:  1536,
		ScratchMB: 2048,
	})
	n.node = &node{g: g, store: store}
	c.start(t, n.attacher)
	c.start(t, n.images)
	if err := g.WriteFile(t.Context(), "/tmp/thaw.toml", 0o600, strings.NewReader(fmt.Sprintf(`
root = %q
run = %q
roles = ["snapshots"]
log_level = "debug"
[snapshotter]
attach_timeout = "2m" # programs run up to 100 times slower
targets = [%q]
[snapshotter.images]
address = %q
certificate = "/host/host/%s.crt"
key = "/host/host/%[5]s.key"
ca = "/host/ca.crt"
`, thawRoot, thawRun, storeName, net.JoinHostPort(guest.HostAddress, port), hostName))); err != nil {
		t.Fatal(err)
	}
	n.containerd(t)
	n.do(t, "server snapshotter")
	return n
}

// wantPassesOf waits until containers have read all of their data again, and that not
// from the cache.
func (n *cardNode) wantPassesOf(t *testing.T, ids []string) {
	t.Helper()
	for _, id := range ids {
		n.do(t, fmt.Sprintf(`now=$(passes %[1]s)
			await 'echo 1 >/proc/sys/vm/drop_caches; [ $(passes %[1]s) -ge $((now + 2)) ] || grep FAILED /tmp/%[1]s.log'
			! grep FAILED /tmp/%[1]s.log`, id))
	}
}

// cardLog returns the lines of a card's process that hold a text, since a time.
func cardLog(d *daemon, text string) string {
	log, err := os.ReadFile(d.log)
	if err != nil {
		return err.Error()
	}
	var found []string
	for line := range strings.Lines(string(log)) {
		if strings.Contains(line, text) {
			found = append(found, strings.TrimSpace(line))
		}
	}
	return strings.Join(found, "\n")
}

var journeyLine = regexp.MustCompile(`msg="(block attached|drive shown|drive found)".* (?:block|disk)=(\S+) .*?took=(\S+)(?: steps="([^"]*)")?`)

// journeys says, from logs of image-mgmt and the host, how long the first way of each disk to
// its device node took, and where.
func journeys(log string) string {
	type way struct {
		store, card, kernel time.Duration
		steps               string
	}
	ways := map[string]*way{}
	var order []string
	for line := range strings.Lines(log) {
		m := journeyLine.FindStringSubmatch(line)
		if m == nil {
			continue
		}
		took, err := time.ParseDuration(m[3])
		if err != nil {
			return err.Error() + ": " + line
		}
		w := ways[m[2]]
		if w == nil {
			w = &way{}
			ways[m[2]], order = w, append(order, m[2])
		}
		switch {
		case m[1] == "block attached" && w.store == 0:
			w.store = took
		case m[1] == "drive shown" && w.card == 0:
			w.card, w.steps = took, m[4]
		case m[1] == "drive found" && w.kernel == 0:
			w.kernel = took
		}
	}
	var out strings.Builder
	ms := func(d time.Duration) float64 { return float64(d.Microseconds()) / 1e3 }
	for _, name := range order {
		w := ways[name]
		fmt.Fprintf(&out, "%-44s %6.1f ms: store %.1f, card %.1f (%s), the host's kernel %.1f\n", name, ms(w.store+w.card+w.kernel), ms(w.store), ms(w.card), w.steps, ms(w.kernel))
	}
	return out.String()
}

// TestCardContainers starts containers of converted images from the drives of a simulated
// DPU: the store on this machine, the card's processes too, and in the guest containerd and
// the snapshotter. Each of the card's processes is killed while containers read.
func TestCardContainers(t *testing.T) {
	guest.Require(t)
	store := newStoreHost(t)
	box := busybox(t)
	type image struct{ id, mode, filesystem, ref string }
	images := []*image{
		{id: "overlayfs-erofs", mode: "overlayfs", filesystem: "erofs"}, {id: "overlayfs-ext4", mode: "overlayfs", filesystem: "ext4"},
		{id: "overlaybd-ext4", mode: "overlaybd", filesystem: "ext4"}, {id: "overlaybd-erofs", mode: "overlaybd", filesystem: "erofs"},
	}
	for _, i := range images {
		source := store.registry.Ref("source", i.id)
		if err := recipe.Push(t.Context(), containerImage(t, box, i.id), source); err != nil {
			t.Fatal(err)
		}
		i.ref = store.registry.Ref("converted", i.id)
		if _, err := store.thaw.Convert(t.Context(), source, i.ref, i.mode, i.filesystem); err != nil {
			t.Fatal(err)
		}
	}
	n := newCardNode(t, store)
	var ids []string
	for _, i := range images {
		ids = append(ids, i.id)
		ok := t.Run(i.id, func(t *testing.T) {
			n.do(t, fmt.Sprintf(`ctr images pull --plain-http --snapshotter thaw %[1]s >/tmp/pull.log 2>&1 || { cat /tmp/pull.log; exit 1; }
				: >/tmp/%[2]s.log
				ctr run -d --snapshotter thaw --log-uri file:///tmp/%[2]s.log %[1]s %[2]s
				await '[ $(passes %[2]s) -ge 1 ] || grep FAILED /tmp/%[2]s.log' && ! grep FAILED /tmp/%[2]s.log`, i.ref, i.id))
			out := strings.TrimSpace(n.do(t, fmt.Sprintf(`
				rootfs=/run/containerd/io.containerd.runtime.v2.task/lab/%s/rootfs
				lower=$(awk -v p=$rootfs '$5 == p { print $NF }' /proc/self/mountinfo | tr , '\n' | sed -n 's/^lowerdir=\([^:]*\).*/\1/p')
				if [ -z "$lower" ]; then source_of $rootfs; else d=$lower; while ! awk -v p=$d '$5 == p { f = 1 } END { exit !f }' /proc/self/mountinfo; do d=${d%%/*}; done; source_of $d; fi`, i.id)))
			if !strings.HasPrefix(out, nvmeDevice) {
				t.Errorf("the container's file system is %s, not on %s*", out, nvmeDevice)
			}
			// What mode overlaybd writes to is a drive too.
			upper := ""
			if i.mode == "overlaybd" {
				upper = strings.TrimSpace(n.do(t, fmt.Sprintf(`
					rootfs=/run/containerd/io.containerd.runtime.v2.task/lab/%s/rootfs
					upper=$(awk -v p=$rootfs '$5 == p { print $NF }' /proc/self/mountinfo | tr , '\n' | sed -n 's/^upperdir=//p')
					if [ -z "$upper" ]; then source_of $rootfs; else d=$upper; while ! awk -v p=$d '$5 == p { f = 1 } END { exit !f }' /proc/self/mountinfo; do d=${d%%/*}; done; source_of $d; fi`, i.id)))
				if !strings.HasPrefix(upper, nvmeDevice) {
					t.Errorf("the container writes to %s, not to %s*", upper, nvmeDevice)
				}
			}
			t.Logf("the container's file system: %s, and its writable layer: %q", out, upper)
		})
		if !ok {
			t.FailNow()
		}
	}
	t.Run("host", func(t *testing.T) {
		out := n.do(t, `ps -eo pid,rss,args | grep -v '\[' | cut -c 1-120`)
		t.Logf("what the host runs:\n%s", out)
		if got := n.do(t, `pgrep -fa '[t]haw ' | grep -v 'thaw snapshotter' || true; pgrep -a 'nbd|qemu|iscsi' || true; ls -d /sys/module/nvme_tcp /sys/module/nvme_fabrics /sys/module/ublk_drv /sys/module/nbd 2>/dev/null || true`); strings.TrimSpace(got) != "" {
			t.Errorf("on the host there is\n%s", got)
		}
		t.Logf("drives:\n%s", n.do(t, `for c in /sys/class/nvme/nvme*; do echo "${c##*/} $(cat $c/serial) $(cat $c/address) $(cat /sys/block/${c##*/}n1/size) sectors, ro $(cat /sys/block/${c##*/}n1/ro)"; done`))
	})
	t.Run("steps", func(t *testing.T) {
		host := n.do(t, "grep 'drive found' /tmp/thaw.log")
		t.Logf("from call to device node, on a machine that is emulated:\n%s", journeys(cardLog(n.images, "took=")+"\n"+host))
		t.Logf("of the card's step controller, in the bridge:\n%s", cardLog(n.card.bridge, "function plugged"))
	})
	for _, victim := range []*daemon{n.card.target, n.card.bridge, n.attacher, n.images} {
		t.Run("killed "+victim.args[0], func(t *testing.T) {
			n.do(t, "echo 3 >/proc/sys/vm/drop_caches")
			victim.kill()
			time.Sleep(2 * time.Second) // containers read, or wait
			if victim != n.card.target {
				n.wantPassesOf(t, ids[:1]) // nobody misses it
			}
			victim.start(t)
			n.wantPassesOf(t, ids)
		})
	}
	t.Run("killed snapshotter", func(t *testing.T) {
		n.do(t, "kill -9 $(cat /run/thaw.pid); await dead; server snapshotter")
		n.wantPassesOf(t, ids)
	})
	t.Run("convert", func(t *testing.T) { testCardConversion(t, n, box) })
	t.Run("removed", func(t *testing.T) {
		n.do(t, fmt.Sprintf(`
			for id in %s; do
				root=/run/containerd/io.containerd.runtime.v2.task/lab/$id/rootfs
				grep -qx changed $root/data/greeting; [ ! -e $root/data/gone ]; [ $(cat $root/data/written) -ge 1 ]
				ctr task rm -f $id >/dev/null || true # says how it ended
				ctr container rm $id
			done
			await 'thaw snapshot list --config /tmp/thaw.toml >/tmp/snapshots && ! grep -q active /tmp/snapshots'`, strings.Join(ids, " ")))
		var refs []string
		for _, i := range images {
			refs = append(refs, i.ref)
		}
		n.do(t, "ctr images rm --sync "+strings.Join(refs, " ")+`
			await '[ -z "$(left)" ]'`)
		store.wantNoAttachments(t)
		eventually(t, "the card shows nothing", func() error {
			left, err := os.ReadDir(filepath.Join(n.card.dir, "s"))
			if err == nil && len(left) > 0 {
				err = fmt.Errorf("left: %v", left)
			}
			return err
		})
		if out := n.do(t, "dmesg | grep -E 'I/O error|WARNING|BUG:|Oops|hung task' || true"); out != "" {
			t.Errorf("the kernel says:\n%s", out)
		}
		if out := n.do(t, "grep level=ERROR /tmp/thaw.log || true"); out != "" {
			t.Errorf("the snapshotter says:\n%s", out)
		}
	})
}

// freePort is a port of this machine's loopback that nobody listens at.
func freePort(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", anyAddress)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	_, port, err := net.SplitHostPort(l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	return port
}
