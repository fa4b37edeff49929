package guest_test

import (
	"context"
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/thaw-project/thaw/e2e/guest"
)

// Where the guest's node has its things.
const (
	thawRoot      = "/scratch/thaw"
	thawRun       = "/run/thaw"
	containerdDir = "/scratch/containerd"
)

// nodePath has, in the guest, the functions by which tests drive the node.
const nodePath = "/run/node.sh"

const nodeScript = `
export PATH=/host/bin:$PATH CONTAINERD_ADDRESS=/run/c.sock CONTAINERD_NAMESPACE=lab

# server [PROCESS]: starts thaw server, or another process of thaw, and waits until it answers, containerd too: that dials a
# snapshotter that was away with pauses of its own
server() {
	setsid thaw ${1:-server} --config /tmp/thaw.toml >>/tmp/thaw.log 2>&1 &
	echo $! >/run/thaw.pid
	await 'thaw_snapshots || dead'
	! dead || { tail -n 30 /tmp/thaw.log; return 1; }
	await 'ctr snapshots --snapshotter thaw usage >/dev/null 2>&1'
}
dead() { ! kill -0 $(cat /run/thaw.pid) 2>/dev/null; }
thaw_snapshots() { thaw snapshot list --config /tmp/thaw.toml >/dev/null 2>&1; }

# without MODULE...: unloads the modules, and they cannot be loaded again
without() {
	local m
	mkdir -p /etc/modprobe.d
	for m in $*; do echo "install $m /bin/false" >>/etc/modprobe.d/without.conf; done
	for m in $*; do rmmod $m; done
}

# source_of PATH: what is mounted there
source_of() { awk -v p="$1" '$5 == p { for (i = 7; $i != "-"; i++); print $(i+2), $(i+1) }' /proc/self/mountinfo | tail -n 1; }

# passes ID: how often the container has read all of its data
passes() { grep -c '^pass' /tmp/$1.log; }

# stuck ID: a process of the container waits for a disk, and goes on waiting: writing
# to a disk of the guest's own is over sooner
stuck() {
	local pid before
	for pid in $(cat /sys/fs/cgroup/lab/$1/cgroup.procs); do
		before=$(waiting $pid) || continue
		sleep 1
		if [ "$(waiting $pid)" = "$before" ]; then return 0; fi
	done
	return 1
}
# waiting PID: how often it has waited, if it waits for a disk now, or a FUSE server
waiting() {
	grep -q '^State:.D' /proc/$1/status 2>/dev/null || grep -q request_wait_answer /proc/$1/wchan 2>/dev/null || return 1
	grep '^voluntary' /proc/$1/status
}

# devices: every disk that a presentation could have made, one a line
devices() {
	local d
	for d in /sys/block/nvme* /sys/block/ublkb*; do [ ! -e $d ] || echo ${d##*/}; done
	for d in /sys/block/nbd*; do [ ! -e $d/pid ] || echo ${d##*/}; done
	for d in /sys/block/loop*; do [ ! -e $d/loop/backing_file ] || echo ${d##*/} $(cat $d/loop/backing_file); done
}

# left: what is left of containers and images, one a line
left() {
	devices
	for c in /sys/class/nvme/nvme* /dev/ublkc*; do [ ! -e $c ] || echo $c; done
	awk '$5 ~ "^(` + thawRoot + `|/run/containerd)/" { print "mount", $5 }' /proc/self/mountinfo
}
`

// node is the guest as a node.
type node struct {
	g     *guest.Guest
	store *storeHost
}

// do runs a script with the functions of nodeScript.
func (n *node) do(t *testing.T, script string) string {
	t.Helper()
	begin := time.Now()
	out := n.g.MustWithin(t, 2*time.Minute, ". "+nodePath+"\n"+script)
	t.Logf("%.1f s: %.60q", time.Since(begin).Seconds(), strings.TrimSpace(script))
	return out
}

const containerdConfig = `version = 3
root = %q
state = "/run/containerd"
disabled_plugins = ["io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs",
  "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.blockfile", "io.containerd.nri.v1.nri",
  "io.containerd.tracing.processor.v1.otlp", "io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime", "io.containerd.grpc.v1.cri"]
[grpc]
  address = "/run/c.sock"
[ttrpc]
  address = "/run/c.sock.ttrpc"
[proxy_plugins.thaw]
  type = "snapshot"
  address = %q
  [proxy_plugins.thaw.exports]
    root = %q
    enable_remote_snapshot_annotations = "true"
[plugins."io.containerd.transfer.v1.local"]
  [[plugins."io.containerd.transfer.v1.local".unpack_config]]
    platform = "linux"
    snapshotter = "thaw"
# By default containerd collects garbage for at most a fiftieth of the time, which on this slow a
# machine leaves a removed container's snapshot for minutes.
[plugins."io.containerd.gc.v1.scheduler"]
  pause_threshold = 0.5
`

// newNode boots the guest and starts containerd in it.
func newNode(t *testing.T, store *storeHost) *node {
	t.Helper()
	g := guest.New(t, guest.Options{
		Modules:   []string{"nvme-tcp", "ublk_drv", "nbd", "fuse", "loop", "overlay", "erofs", "ext4"},
		Files:     map[string]string{"bin": store.lab.Bin, "node": filepath.Join(store.ca, "node"), "ca.crt": filepath.Join(store.ca, "ca.crt")},
		MemoryMB:  1536,
		ScratchMB: 4096,
	})
	n := &node{g: g, store: store}
	n.containerd(t)
	return n
}

// containerd starts containerd in the guest, with the snapshotter that thaw will be.
func (n *node) containerd(t *testing.T) {
	t.Helper()
	g := n.g
	config := fmt.Sprintf(containerdConfig, containerdDir, filepath.Join(thawRun, "snapshotter.sock"), filepath.Join(thawRoot, "snapshotter"))
	for path, content := range map[string]string{"/tmp/containerd.toml": config, nodePath: nodeScript} {
		if err := g.WriteFile(t.Context(), path, 0o600, strings.NewReader(content)); err != nil {
			t.Fatal(err)
		}
	}
	n.do(t, `setsid containerd --config /tmp/containerd.toml >/tmp/containerd.log 2>&1 &
		await 'ctr version >/dev/null 2>&1'`)
	t.Cleanup(func() {
		if !t.Failed() {
			return
		}
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		out, _, err := g.Run(ctx, ". "+nodePath+`
			for f in /tmp/*.log; do echo "== $f"; tail -n 60 $f; done
			echo == left; left; thaw snapshot list --config /tmp/thaw.toml; dmesg | tail -n 30
			echo == what thaw server is doing; kill -QUIT $(cat /run/thaw.pid); sleep 2; grep -n SIGQUIT -A 300 /tmp/thaw.log`)
		t.Logf("the guest after the failure (%v):\n%s", err, out)
	})
}

// start starts thaw server on an empty disk, with a presentation.
func (n *node) start(t *testing.T, kind string) {
	t.Helper()
	if err := n.g.WriteFile(t.Context(), "/tmp/thaw.toml", 0o600, strings.NewReader(n.store.nodeConfig(kind))); err != nil {
		t.Fatal(err)
	}
	n.do(t, "rm -rf "+thawRoot+"; server")
}

// stop ends thaw server, which has nothing left to hold.
func (n *node) stop(t *testing.T) {
	t.Helper()
	n.do(t, `
		kill -TERM $(cat /run/thaw.pid); await dead; await '! pgrep -f "[t]haw keeper"'
		# an error of one path to a disk (nvme0c0n1) is another attempt, not an error of the disk
		if dmesg | grep -E 'I/O error|WARNING|BUG:|Oops|hung task' | grep -vE 'nvme[0-9]+c[0-9]+n'; then exit 1; fi
		if grep level=ERROR /tmp/thaw.log; then exit 1; fi`)
	t.Logf("warnings of thaw server:\n%s", n.do(t, "grep level=WARN /tmp/thaw.log || true; rm /tmp/thaw.log"))
}
