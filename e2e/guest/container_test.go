package guest_test

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/thaw-project/thaw/e2e/guest"
	"github.com/thaw-project/thaw/e2e/lab"
	"github.com/thaw-project/thaw/e2e/recipe"
)

// storage is a store and a registry on this machine, and certificates for a node.
type storage struct {
	address string // of the store, the same here and in the guest
	refs    map[string]string
	files   map[string]string // what the node needs, as Options.Files has it
}

// newStorage serves one image, converted in each mode.
func newStorage(t *testing.T) *storage {
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	l, err := lab.New()
	must(err)
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	// Both have addresses that lead to them from the guest too, which 127.0.0.1 does not.
	link, err := l.NewLink("")
	must(err)
	registry, err := l.StartRegistry(t.Context(), lab.RegistryOptions{Behind: link})
	must(err)
	dir := t.TempDir()
	certificate := func(args ...string) {
		t.Helper()
		out, err := l.Command(t.Context(), "thaw", append([]string{"certificate"}, args...)...).CombinedOutput()
		if err != nil {
			t.Fatalf("thaw certificate %v: %v: %s", args, err, out)
		}
	}
	ca, keys := filepath.Join(dir, "ca"), filepath.Join(dir, "keys")
	certificate("authority", "--out", ca)
	certificate("issue", "--ca", ca, "--node", "store", "--out", keys, "--address", link.Host)
	certificate("issue", "--ca", ca, "--node", "guest", "--out", keys)
	store, err := l.StartThawWith(t.Context(), lab.ThawOptions{StoreOnly: true, Config: fmt.Sprintf(`
roles = ["store"]
target = "store"
[export]
nvme_tcp = ["%[1]s:4420"]
attacher = "%[1]s:7443"
certificate = "%[2]s/store.crt"
key = "%[2]s/store.key"
client_ca = "%[3]s/ca.crt"
`, link.Host, keys, ca)})
	must(err)
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the store's log ends with:\n%s", store.Log(4000))
		}
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if err := store.CheckStore(ctx); err != nil {
			t.Errorf("the store after the test: %v", err)
		}
	})
	root, err := lab.ModuleRoot()
	must(err)
	builder := recipe.Builder{Cache: filepath.Join(root, "out/cache/images"), Log: os.Stderr}
	r := recipe.Small("guest")
	image, err := builder.Build(t.Context(), r)
	must(err)
	source := registry.Ref("small", "1")
	must(recipe.Push(t.Context(), image, source))
	s := &storage{address: link.Host, refs: map[string]string{}, files: map[string]string{
		"keys": keys, "ca.crt": filepath.Join(ca, "ca.crt"),
	}}
	for _, p := range []string{"thaw", "containerd", "containerd-shim-runc-v2", "ctr"} {
		s.files["bin/"+p] = filepath.Join(l.Bin, p)
	}
	for mode, filesystem := range map[string]string{"overlayfs": "erofs", "overlaybd": "ext4"} {
		s.refs[mode] = registry.Ref("small", mode)
		_, err := store.Convert(t.Context(), source, s.refs[mode], mode, filesystem)
		must(err)
	}
	return s
}

// nodeScript starts a node in the guest: thaw server without store, and containerd. It
// takes a name, the presentation, and the store's address.
const nodeScript = `
	export PATH=/host/bin:$PATH
	dir=/scratch/%[1]s; mkdir -p $dir
	cat >$dir/thaw.toml <<-.
		roles = ["node"]
		root = "$dir/thaw"
		run = "/run/%[1]s"
		[presentation]
		kind = "%[2]s"
		[[remote]]
		name = "store"
		attacher = "%[3]s:7443"
		certificate = "/host/keys/guest.crt"
		key = "/host/keys/guest.key"
		ca = "/host/ca.crt"
	.
	cat >$dir/containerd.toml <<-.
		version = 3
		root = "$dir/containerd"
		state = "/run/%[1]s-containerd"
		disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime", "io.containerd.nri.v1.nri"]
		[grpc]
		address = "/run/%[1]s-containerd.sock"
		[ttrpc]
		address = "/run/%[1]s-containerd.ttrpc"
	.
	thaw containerd-config --config $dir/thaw.toml | grep -v ^version >>$dir/containerd.toml
	thaw server --config $dir/thaw.toml >$dir/thaw.log 2>&1 & echo $! >$dir/thaw.pid
	containerd --config $dir/containerd.toml >$dir/containerd.log 2>&1 & echo $! >$dir/containerd.pid
	await '[ -S /run/%[1]s/snapshotter.sock ]'
	await 'ctr -a /run/%[1]s-containerd.sock version >/dev/null 2>&1'
`

// disks are patterns of what mount shows for a presentation that is in use.
var disks = map[string]string{"nvme-fabrics": "^/dev/nvme", "ublk": "^/dev/ublkb", "nbd": "^/dev/nbd"}

// TestContainers starts containers of a converted image in the guest, whose blocks come
// from a store on this machine, through each presentation that needs the guest's kernel.
func TestContainers(t *testing.T) {
	guest.Require(t)
	s := newStorage(t)
	g := guest.New(t, guest.Options{
		Modules: []string{"nvme-tcp", "nbd", "ublk_drv", "fuse", "loop", "ext4"}, MemoryMB: 2048, CPUs: 2, ScratchMB: 8192, Files: s.files,
	})
	// Both sides see the store at the same address.
	host, port, err := net.SplitHostPort(net.JoinHostPort(s.address, strconv.Itoa(7443)))
	if err != nil {
		t.Fatal(err)
	}
	g.Must(t, fmt.Sprintf("exec 3<>/dev/tcp/%s/%s", host, port))
	for _, kind := range []string{"nvme-fabrics", "ublk", "nbd"} {
		t.Run(kind, func(t *testing.T) {
			name := "n-" + kind
			defer func() {
				if t.Failed() {
					out, _, err := g.Run(t.Context(), fmt.Sprintf("tail -n 30 /scratch/%s/*.log; mount; dmesg | tail -20", name))
					t.Logf("the guest's logs, %v:\n%s", err, out)
				}
			}()
			g.Must(t, fmt.Sprintf(nodeScript, name, kind, s.address))
			for _, mode := range []string{"overlayfs", "overlaybd"} {
				out := g.MustWithin(t, 4*time.Minute, fmt.Sprintf(`
					export PATH=/host/bin:$PATH; ctr="ctr -a /run/%[1]s-containerd.sock"
					$ctr images pull --plain-http --snapshotter thaw %[2]s >/tmp/pull 2>&1 || { cat /tmp/pull; exit 1; }
					mount | grep -E '%[4]s' >/dev/null || { mount; exit 1; }
					$ctr run --rm --snapshotter thaw %[2]s %[3]s /bin/sh -ec '
						python3 -c "print(open(\"/srv/web/greeting\").read().upper())"
						echo written >/srv/web/greeting; cat /srv/web/greeting; rm /srv/web/data; ls /srv/web'
					$ctr images rm --sync %[2]s`, name, s.refs[mode], "c-"+mode, disks[kind]))
				if !strings.Contains(out, "HELLO FROM GUEST\n") || !strings.Contains(out, "\nwritten\n") || strings.Contains(out, "\ndata\n") {
					t.Errorf("%s: the container said:\n%s", mode, out)
				}
			}
			// With its images gone a node holds no disk.
			g.Must(t, fmt.Sprintf(`await '! mount | grep -qE "%s"'
				kill $(cat /scratch/%[2]s/containerd.pid); await '! kill -0 $(cat /scratch/%[2]s/containerd.pid) 2>/dev/null'
				kill $(cat /scratch/%[2]s/thaw.pid); await '! kill -0 $(cat /scratch/%[2]s/thaw.pid) 2>/dev/null'`, disks[kind], name))
		})
	}
}
