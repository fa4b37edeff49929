package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/thaw-project/thaw/e2e/lab"
	"github.com/thaw-project/thaw/e2e/recipe"
)

// processes are all parts of a machine in processes of their own, in an order in which each
// has to wait for the next.
var processes = []string{"snapshotter", "image-mgmt", "attacher"}

// TestProcesses runs the parts of one machine in processes of their own, under the limits
// that their units set, and containers through them; each process is killed meanwhile.
func TestProcesses(t *testing.T) {
	b := start(t)
	s := b.thawWith(t, lab.ThawOptions{
		Parts: processes, PartBefore: unitsBefore(t), Config: fmt.Sprintf("[export]\nnvme_tcp = [%q]\n", freePort(t)),
	})
	testParts(t, b, s, func(t *testing.T, source string, v variant) string {
		dest, _ := b.convert(t, s, source, v)
		return dest
	})
	t.Run("another", func(t *testing.T) {
		out, err := b.lab.Command(t.Context(), "thaw", "server", "--root", s.Root, "--run", s.Run).CombinedOutput()
		if err == nil || !strings.Contains(string(out), "another thaw server") || !strings.Contains(string(out), fmt.Sprint("attacher pid ", s.Part("attacher").Pid())) {
			t.Errorf("thaw server beside its parts: %v, %s", err, out)
		}
	})
}

// testParts starts containers in both modes by split processes, kills each process, and
// looks that the containers go on.
func testParts(t *testing.T, b *bench, s *lab.Thaw, convert func(*testing.T, string, variant) string) {
	t.Helper()
	source := b.image(t, recipe.Small("a"))
	n := b.node(t, s)
	for i, v := range []variant{variants[0], variants[2]} {
		t.Run(v.String(), func(t *testing.T) {
			c, timing := coldStart(t, n, fmt.Sprintf("parts%d", i), convert(t, source, v))
			if body, err := c.Ready(t.Context()); err != nil || !strings.Contains(body, "hello from a") {
				t.Fatalf("the container answers %q, %v", body, err)
			}
			t.Logf("pull %v, create %v, ready %v", timing.Pull, timing.Create, timing.Ready)
			wantNoLayers(t, b, n.Containerd.Root, "64k")
			if i > 0 {
				return
			}
			for _, part := range processes {
				p := s.Part(part)
				p.Kill()
				if err := p.Launch(); err != nil {
					t.Fatal(err)
				}
				out, err := c.Exec(t.Context(), "/bin/sh", "-c", "echo "+part+" >/written && cat /written /srv/web/data | wc -c")
				if err != nil || strings.TrimSpace(out) == "0" {
					t.Errorf("after %s was killed: %q, %v", part, out, err)
				}
			}
			if err := s.WaitReady(t.Context()); err != nil {
				t.Fatal(err)
			}
		})
	}
	if out, err := s.Do(t.Context(), "doctor", "--json"); !strings.Contains(string(out), "thaw image-mgmt") || !strings.Contains(string(out), "thaw snapshotter") {
		t.Errorf("thaw doctor does not look at each process: %s, %v", out, err)
	}
}

// TestTarget keeps lvols in thaw target, through thaw bridge: with all parts in processes of
// their own, and with the others in one.
func TestTarget(t *testing.T) {
	b := start(t)
	t.Run("processes", func(t *testing.T) {
		s := b.thawWith(t, lab.ThawOptions{Parts: processes, PartBefore: unitsBefore(t), Elsewhere: true, Config: b.target(t)})
		e := &elsewhere{cluster: &cluster{b: b, store: s}}
		testParts(t, b, s, func(t *testing.T, source string, v variant) string {
			// By a converter that shows disks itself, as on another machine.
			dest := source + "-target-" + v.String()
			if _, err := e.convert(t.Context(), t, source, dest, v, "--attacher", filepath.Join(s.Run, "attacher.sock")); err != nil {
				t.Fatal(err)
			}
			return dest
		})
	})
	t.Run("server", func(t *testing.T) {
		s := b.thawWith(t, lab.ThawOptions{Elsewhere: true, Config: b.target(t)})
		n := b.node(t, s)
		for i, v := range []variant{variants[0], variants[2]} {
			dest, _ := b.convert(t, s, b.image(t, recipe.Small("a")), v)
			c, _ := coldStart(t, n, fmt.Sprintf("target%d", i), dest)
			if body, err := c.Ready(t.Context()); err != nil || !strings.Contains(body, "hello from a") {
				t.Fatalf("%s: the container answers %q, %v", v, body, err)
			}
		}
	})
}

// target starts thaw target and thaw bridge, and returns the configuration of a store that
// keeps its lvols there.
func (b *bench) target(t *testing.T) string {
	t.Helper()
	// A short path, for sockets.
	dir, err := os.MkdirTemp(b.lab.Dir, "target")
	if err != nil {
		t.Fatal(err)
	}
	disk := filepath.Join(dir, "disk")
	if err := os.WriteFile(disk, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(disk, 16<<30); err != nil {
		t.Fatal(err)
	}
	program, socket, bridge := filepath.Join(b.lab.Bin, "thaw"), filepath.Join(dir, "t.sock"), filepath.Join(dir, "b.sock")
	for _, args := range [][]string{
		{"bridge", "--target", socket, "--socket", bridge},
		{"target", "--root", filepath.Join(dir, "root"), "--socket", socket},
	} {
		p, err := b.lab.Start(lab.Spec{Name: filepath.Base(dir) + "-" + args[0], Args: append([]string{program}, args...)})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if t.Failed() {
				t.Logf("the end of the log of thaw %s:\n%s", args[0], p.Log(3000))
			}
			if err := p.Stop(); err != nil {
				t.Error(err)
			}
		})
	}
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		if _, err := os.Stat(socket); err == nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("thaw target does not listen")
		}
	}
	return fmt.Sprintf("[pool]\nbackend = \"spdk\"\n[pool.spdk]\nbridge = %q\nlvstore = \"thaw\"\naio = %q\nportals = [\"tcp://%s\"]\n", bridge, disk, freePort(t))
}
