package guest_test

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"

	"github.com/thaw-project/thaw/e2e/guest"
	"github.com/thaw-project/thaw/e2e/lab"
	"github.com/thaw-project/thaw/e2e/recipe"
)

const (
	storeName = "store-1"
	nodeName  = "guest"
)

// storeHost is this machine as the guest's node sees it: a thaw server in the role of a
// store, and a registry. Both are in a network namespace of their own, because a store
// tells nodes the address that it listens on: it must be the same from both sides, and
// the loopback of this machine is another's in the guest.
type storeHost struct {
	lab      *lab.Lab
	address  string
	registry *lab.Registry
	thaw     *lab.Thaw
	ca       string // folder of the certificate authority
}

func newStoreHost(t *testing.T) *storeHost {
	t.Helper()
	l, err := lab.New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Errorf("close lab: %v", err)
		}
	})
	l.Bin = programs(t, l.Bin)
	link, err := l.NewLink("")
	if err != nil {
		t.Fatal(err)
	}
	s := &storeHost{lab: l, address: link.Peer, ca: filepath.Join(t.TempDir(), "ca")}
	if s.registry, err = l.StartRegistry(t.Context(), lab.RegistryOptions{Behind: link}); err != nil {
		t.Fatal(err)
	}
	s.run(t, "certificate", "authority", "--out", s.ca)
	s.run(t, "certificate", "issue", "--ca", s.ca, "--node", storeName, "--address", s.address, "--out", filepath.Join(s.ca, "store"))
	s.run(t, "certificate", "issue", "--ca", s.ca, "--node", nodeName, "--out", filepath.Join(s.ca, "node"))
	s.thaw, err = l.StartThawWith(t.Context(), lab.ThawOptions{StoreOnly: true, Network: link.Enter(), Config: fmt.Sprintf(`
roles = ["store"]
target = %q
[pool]
capacity = "4GiB"
[export]
nvme_tcp = [%q]
attacher = %q
certificate = %q
key = %q
client_ca = %q
converters = [%q]
`, storeName, net.JoinHostPort(s.address, "4420"), net.JoinHostPort(s.address, "7443"),
		filepath.Join(s.ca, "store", storeName+".crt"), filepath.Join(s.ca, "store", storeName+".key"), filepath.Join(s.ca, "ca.crt"), nodeName)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if t.Failed() {
			t.Logf("the end of the store's log:\n%s", s.thaw.Log(4000))
		}
		if err := s.thaw.Shutdown(ctx); err != nil {
			t.Errorf("shut the store down: %v", err)
		}
		if err := s.thaw.CheckStore(ctx); err != nil {
			t.Errorf("the store after the test: %v", err)
		}
	})
	return s
}

// programs makes a folder with thaw, built from the source of the moment, and the tools
// of folder bin, for this machine and the guest.
func programs(t *testing.T, bin string) string {
	t.Helper()
	thaw := guest.Build(t, "cmd/thaw")
	for _, name := range []string{"containerd", "containerd-shim-runc-v2", "ctr"} {
		if _, err := os.Stat(filepath.Join(bin, name)); err != nil {
			t.Fatalf("%v: run make tools", err)
		}
		if err := os.Symlink(filepath.Join(bin, name), filepath.Join(filepath.Dir(thaw), name)); err != nil {
			t.Fatal(err)
		}
	}
	return filepath.Dir(thaw)
}

// run runs a thaw command that needs no server.
func (s *storeHost) run(t *testing.T, args ...string) {
	t.Helper()
	if out, err := s.lab.Command(t.Context(), "thaw", args...).CombinedOutput(); err != nil {
		t.Fatalf("thaw %s: %v: %s", strings.Join(args, " "), err, out)
	}
}

// nodeConfig is the configuration of the guest's node, with a presentation.
func (s *storeHost) nodeConfig(kind string) string {
	return fmt.Sprintf(`
root = %q
run = %q
roles = ["node"]
log_level = "debug"
[presentation]
kind = %q
[snapshotter]
attach_timeout = "2m" # programs run up to 100 times slower
[[remote]]
name = %q
attacher = %q
certificate = "/host/node/%s.crt"
key = "/host/node/%[6]s.key"
ca = "/host/ca.crt"
`, thawRoot, thawRun, kind, storeName, net.JoinHostPort(s.address, "7443"), nodeName)
}

// convert converts a pushed image, and returns the reference of what came out.
func (s *storeHost) convert(t *testing.T, source, mode string) string {
	t.Helper()
	dest := s.registry.Ref("converted", mode)
	if _, err := s.thaw.Convert(t.Context(), source, dest, mode, ""); err != nil {
		t.Fatal(err)
	}
	return dest
}

// wantNoAttachments fails the test unless the store exports nothing to the node.
func (s *storeHost) wantNoAttachments(t *testing.T) {
	t.Helper()
	eventually(t, "the store has no attachments", func() error {
		out, err := s.thaw.Do(t.Context(), "attachment", "list")
		if err == nil && strings.Contains(string(out), nodeName) {
			err = fmt.Errorf("it has:\n%s", out)
		}
		return err
	})
}

const (
	dataFiles     = 12
	dataFileBytes = 512 << 10
)

// entryScript is what the containers run: it reads all of its data again and again, and
// writes and reads back what it wrote.
const entryScript = `#!/bin/sh
cd /data || exit 1
rm gone && echo changed >greeting || { echo "FAILED to change files of the image"; exit 1; }
n=0
while :; do
	n=$((n + 1))
	sha256sum -c sums >/tmp/sums 2>&1 || { echo "FAILED to read in pass $n"; cat /tmp/sums; exit 1; }
	echo "$n" | dd of=/data/written conv=fsync 2>/dev/null && [ "$(cat /data/written)" = "$n" ] || { echo "FAILED to write in pass $n"; exit 1; }
	[ ! -e gone ] && [ "$(cat greeting)" = changed ] || { echo "FAILED to keep what was changed in pass $n"; exit 1; }
	echo "pass $n"
	sleep 0.5
done
`

// containerImage is an image of two layers: busybox, and data for the script above. Seed
// makes the layers of images differ, for a node has each layer once, in one mode.
func containerImage(t *testing.T, busybox []byte, seed string) v1.Image {
	t.Helper()
	var base, app layerWriter
	base.begin(t)
	for _, d := range []string{"bin", "dev", "proc", "sys", "tmp", "etc", "run"} {
		base.dir(d)
	}
	base.file("bin/busybox", 0o755, busybox)
	for _, applet := range []string{"sh", "cat", "rm", "sha256sum", "dd", "sleep"} {
		base.link("bin/"+applet, "busybox")
	}
	base.file("etc/seed", 0o644, []byte(seed))
	app.begin(t)
	app.dir("data")
	random := rand.NewChaCha8(sha256.Sum256([]byte(seed)))
	var sums bytes.Buffer
	for i := range dataFiles {
		content := make([]byte, dataFileBytes)
		_, _ = random.Read(content) // never fails
		name := fmt.Sprintf("%02d", i)
		app.file("data/"+name, 0o644, content)
		fmt.Fprintf(&sums, "%x  %s\n", sha256.Sum256(content), name)
	}
	app.file("data/sums", 0o644, sums.Bytes())
	app.file("data/greeting", 0o644, []byte("hello\n"))
	app.file("data/gone", 0o644, []byte("to be deleted\n"))
	app.file("entry", 0o755, []byte(entryScript))
	image, err := recipe.Layers([][]byte{base.end(), app.end()})
	if err != nil {
		t.Fatal(err)
	}
	config, err := image.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	config = config.DeepCopy()
	config.Config.Env = []string{"PATH=/bin"}
	config.Config.Entrypoint = []string{"/bin/sh", "/entry"}
	if image, err = mutate.ConfigFile(image, config); err != nil {
		t.Fatal(err)
	}
	return image
}

// busybox returns Debian's static one.
func busybox(t *testing.T) []byte {
	t.Helper()
	dir := t.TempDir()
	c := exec.CommandContext(t.Context(), "sh", "-c", "apt-get -q -o APT::Sandbox::User=root download busybox-static && dpkg-deb -x busybox-static_*.deb tree")
	c.Dir = dir
	if out, err := c.CombinedOutput(); err != nil {
		t.Fatalf("fetch busybox-static: %v: %s", err, out)
	}
	for _, path := range []string{"tree/bin/busybox", "tree/usr/bin/busybox"} {
		if content, err := os.ReadFile(filepath.Join(dir, path)); err == nil {
			return content
		}
	}
	t.Fatal("the package busybox-static has no busybox")
	return nil
}

// layerWriter makes the tar archive of a layer.
type layerWriter struct {
	t *testing.T
	b bytes.Buffer
	w *tar.Writer
}

func (l *layerWriter) begin(t *testing.T) { l.t, l.w = t, tar.NewWriter(&l.b) }

func (l *layerWriter) add(h tar.Header, content []byte) {
	l.t.Helper()
	h.Size = int64(len(content))
	if err := l.w.WriteHeader(&h); err != nil {
		l.t.Fatal(err)
	}
	if _, err := l.w.Write(content); err != nil {
		l.t.Fatal(err)
	}
}

func (l *layerWriter) dir(name string) {
	l.add(tar.Header{Name: name + "/", Typeflag: tar.TypeDir, Mode: 0o755}, nil)
}

func (l *layerWriter) file(name string, mode int64, content []byte) {
	l.add(tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: mode}, content)
}

func (l *layerWriter) link(name, to string) {
	l.add(tar.Header{Name: name, Typeflag: tar.TypeSymlink, Linkname: to, Mode: 0o777}, nil)
}

func (l *layerWriter) end() []byte {
	l.t.Helper()
	if err := l.w.Close(); err != nil {
		l.t.Fatal(err)
	}
	return l.b.Bytes()
}
