package e2e

import (
	"context"
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/thaw-project/thaw/e2e/lab"
	"github.com/thaw-project/thaw/e2e/launch"
	"github.com/thaw-project/thaw/e2e/recipe"
)

// cluster is a store and nodes that are machines of their own as far as the network
// goes.
type cluster struct {
	b     *bench
	star  *lab.Star
	store *lab.Thaw
	ca    string // folder of the certificate authority

	converted map[string]string // by source and variant
}

// convert converts a pushed image, once for all tests of the cluster.
func (c *cluster) convert(t *testing.T, r recipe.Recipe, v variant) string {
	t.Helper()
	source := c.b.image(t, r)
	key := source + " " + v.String()
	if c.converted[key] == "" {
		c.converted[key], _ = c.b.convert(t, c.store, source, v)
	}
	return c.converted[key]
}

// TestRemote runs containers on machines that store nothing.
func TestRemote(t *testing.T) {
	b := start(t)
	c := b.newCluster(t)
	t.Run("start", func(t *testing.T) { testRemoteStart(t, c) })
	t.Run("ten", func(t *testing.T) { testRemoteTen(t, c) })
	t.Run("lossy", func(t *testing.T) { testRemoteLossy(t, c) })
	t.Run("faults", func(t *testing.T) { testRemoteFaults(t, c) })
}

const (
	storeTarget  = "store-1"
	attacherPort = "7443"
	nvmePort     = "4420"
)

// newCluster starts a store in a network of its own.
func (b *bench) newCluster(t *testing.T) *cluster {
	t.Helper()
	star, err := b.lab.NewStar()
	if err != nil {
		t.Fatal(err)
	}
	c := &cluster{b: b, star: star, ca: filepath.Join(t.TempDir(), "ca"), converted: map[string]string{}}
	c.thaw(t, "certificate", "authority", "--out", c.ca)
	files := c.issue(t, storeTarget, "--address", star.Host)
	c.store = b.thawWith(t, lab.ThawOptions{StoreOnly: true, Network: star.Enter(), Config: fmt.Sprintf(`
roles = ["store"]
target = %q
[export]
nvme_tcp = [%q]
attacher = %q
certificate = %q
key = %q
client_ca = %q
`, storeTarget, star.Host+":"+nvmePort, star.Host+":"+attacherPort, files+".crt", files+".key", filepath.Join(c.ca, "ca.crt"))})
	return c
}

// thaw runs a thaw command that needs no server.
func (c *cluster) thaw(t *testing.T, args ...string) string {
	t.Helper()
	out, err := c.b.lab.Command(t.Context(), "thaw", args...).CombinedOutput()
	if err != nil {
		t.Fatalf("thaw %s: %v: %s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

// issue makes a certificate and returns the path of its files without extension.
func (c *cluster) issue(t *testing.T, name string, more ...string) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), name)
	c.thaw(t, append([]string{"certificate", "issue", "--ca", c.ca, "--node", name, "--out", dir}, more...)...)
	return filepath.Join(dir, name)
}

// member is a node of a cluster.
type member struct {
	*launch.Node
	port *lab.Port
	thaw *lab.Thaw
}

// nodeConfig is the configuration of a node whose link to the store is at address.
func (c *cluster) nodeConfig(t *testing.T, name, more string) string {
	files := c.issue(t, name)
	// On a machine busy with other tests ten nodes at once need longer than the default.
	return fmt.Sprintf(`
roles = ["node"]
[snapshotter]
attach_timeout = "1m"
[[remote]]
name = %q
attacher = %q
certificate = %q
key = %q
ca = %q
%s`, storeTarget, c.star.Host+":"+attacherPort, files+".crt", files+".key", filepath.Join(c.ca, "ca.crt"), more)
}

// join starts a node behind a link of that rate.
func (c *cluster) join(t *testing.T, name, rate string) *member {
	t.Helper()
	return c.joinAt(t, c.star, name, rate, "")
}

// joinAt is join in the network of a star that looks like the store's, with an addition
// to the node's configuration.
func (c *cluster) joinAt(t *testing.T, star *lab.Star, name, rate, more string) *member {
	t.Helper()
	port, err := star.Add(rate)
	if err != nil {
		t.Fatal(err)
	}
	s := c.b.thawWith(t, lab.ThawOptions{NodeOnly: true, Network: port.Enter(), Config: c.nodeConfig(t, name, more)})
	return &member{Node: c.b.node(t, s), port: port, thaw: s}
}

// received is what came over the node's link.
func (m *member) received(t *testing.T) int64 {
	t.Helper()
	n, _, err := m.port.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// control bounds what goes over a link when nothing is read: handshakes of TLS and
// NVMe, keep alives, and a call or two.
const control = 64 << 10

// secondStart starts a pulled image after everything of Thaw on the node was stopped
// and unmounted, as by a reboot.
func secondStart(t *testing.T, m *member, name, ref string) {
	t.Helper()
	read, bytes := startAfterReboot(t, m, "second-"+name, ref)
	if read > 0 && read <= readAround {
		// What the kernel reads around what is touched depends on what else it does: now
		// and then it asks for a cluster that it did not ask for before. That one is in
		// the cache now too.
		t.Logf("%.0f bytes were not asked for by the first start: once more", read)
		read, bytes = startAfterReboot(t, m, "third-"+name, ref)
	}
	if read != 0 || bytes > control {
		t.Errorf("a start of what was started before read %.0f bytes from the store, and %d came over the link", read, bytes)
	}
}

// readAround is the most that a second start may read that the first one did not.
const readAround = 512 << 10

// startAfterReboot starts ref when nothing of Thaw runs and nothing is in memory. It
// returns the bytes that were read from the store, and those that came over the link.
func startAfterReboot(t *testing.T, m *member, id, ref string) (read float64, bytes int64) {
	t.Helper()
	if err := m.thaw.Shutdown(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := lab.DropCaches(); err != nil {
		t.Fatal(err)
	}
	before := m.received(t)
	if err := m.thaw.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	// containerd dials a snapshotter that was away with pauses of its own.
	for deadline := time.Now().Add(time.Minute); m.ReachesSnapshotter(t.Context()) != nil; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("containerd does not find the snapshotter again")
		}
	}
	container, timing := coldStart(t, m.Node, id, ref)
	if body, err := container.Ready(t.Context()); err != nil || !strings.Contains(body, "hello") {
		t.Fatalf("%q, %v", body, err)
	}
	bytes = m.received(t) - before
	read, err := m.thaw.Metric(t.Context(), "thaw_remote_read_bytes_total")
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("after a reboot: pull %v, create %v, ready %v; %.0f bytes were read from the store, %d bytes came over the link", timing.Pull, timing.Create, timing.Ready, read, bytes)
	if err := container.Delete(context.Background()); err != nil {
		t.Error(err)
	}
	return read, bytes
}

// testRemoteStart starts an image on a node that has no store, reading over a link only
// what it touches.
func testRemoteStart(t *testing.T, c *cluster) {
	b := c.b
	image, err := b.builder.Build(t.Context(), recipe.Web())
	if err != nil {
		t.Fatal(err)
	}
	unpacked, err := recipe.Unpacked(image)
	if err != nil {
		t.Fatal(err)
	}
	if unpacked < 400e6 {
		t.Fatalf("the image has %d bytes only", unpacked)
	}
	for i, v := range []variant{variants[0], variants[2]} {
		t.Run(v.String(), func(t *testing.T) {
			dest := c.convert(t, recipe.Web(), v)
			for _, rate := range []string{"1gbit", "200mbit"} {
				t.Run(rate, func(t *testing.T) {
					name := fmt.Sprintf("start-%d-%s", i, rate)
					m := c.join(t, name, rate)
					before := m.received(t)
					container, timing := coldStart(t, m.Node, "remote-"+name, dest)
					body, err := container.Ready(t.Context())
					if err != nil || !strings.Contains(body, "hello") {
						t.Fatalf("%q, %v", body, err)
					}
					bytes := m.received(t) - before
					t.Logf("%s over %s: pull %v, create %v, ready %v; %.1f MB of %.1f MB came over the link (%.1f%%)",
						v, rate, timing.Pull, timing.Create, timing.Ready, float64(bytes)/1e6, float64(unpacked)/1e6, 100*float64(bytes)/float64(unpacked))
					if bytes > unpacked/4 {
						t.Errorf("%d of %d bytes came over the link, more than a quarter", bytes, unpacked)
					}
					wantNoLayers(t, b, m.Containerd.Root, "64k")
					if err := container.Delete(context.Background()); err != nil {
						t.Error(err)
					}
					secondStart(t, m, name, dest)
				})
			}
		})
	}
}
