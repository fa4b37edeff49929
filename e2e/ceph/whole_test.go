package ceph_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/thaw-project/thaw/e2e/ceph"
	"github.com/thaw-project/thaw/e2e/lab"
	"github.com/thaw-project/thaw/e2e/launch"
	"github.com/thaw-project/thaw/e2e/recipe"
)

const pool = "thaw"

// world is what the tests share: a cluster and a registry with an image.
type world struct {
	lab     *lab.Lab
	cluster *ceph.Cluster
	source  string // reference of the image
	stores  atomic.Int64
}

var shared *world // nil when the tests are not to run

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) int {
	if os.Getenv("THAW_CEPH") == "" {
		return m.Run()
	}
	l, err := lab.New()
	if err == nil {
		defer func() {
			if err := l.Close(); err != nil {
				fmt.Fprintln(os.Stderr, "clean up:", err)
			}
		}()
		shared, err = newWorld(context.Background(), l)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return m.Run()
}

func newWorld(ctx context.Context, l *lab.Lab) (*world, error) {
	bin, err := programs(l)
	if err != nil {
		return nil, err
	}
	l.Bin = bin
	w := &world{lab: l}
	if w.cluster, err = ceph.Start(ctx, l, ceph.Options{Pools: []string{pool, "other"}, Auth: true}); err != nil {
		return nil, err
	}
	if err := w.cluster.User(ctx, "thaw", "profile rbd pool="+pool); err != nil {
		return nil, err
	}
	registry, err := l.StartRegistry(ctx, lab.RegistryOptions{})
	if err != nil {
		return nil, err
	}
	root, err := lab.ModuleRoot()
	if err != nil {
		return nil, err
	}
	builder := recipe.Builder{Cache: filepath.Join(root, "out/cache/images"), Log: os.Stderr}
	image, err := builder.Build(ctx, recipe.Small("a"))
	if err != nil {
		return nil, err
	}
	w.source = registry.Ref("small-a", "1")
	return w, recipe.Push(ctx, image, w.source)
}

// programs makes a folder of the lab's programs in which thaw is the one with Ceph.
func programs(l *lab.Lab) (string, error) {
	dir, err := l.Path("bin", "thaw")
	if err != nil {
		return "", err
	}
	bin := filepath.Dir(dir)
	for name, of := range map[string]string{"thaw": "thaw-ceph", "containerd": "containerd", "containerd-shim-runc-v2": "containerd-shim-runc-v2", "ctr": "ctr"} {
		target := filepath.Join(l.Bin, of)
		if _, err := os.Stat(target); err != nil {
			return "", fmt.Errorf("%w: run make ceph tools", err)
		}
		if err := os.Symlink(target, filepath.Join(bin, name)); err != nil {
			return "", err
		}
	}
	return bin, nil
}

func start(t *testing.T) *world {
	t.Helper()
	if shared == nil {
		t.Skip("needs a Ceph cluster and a program with Ceph: make test-ceph")
	}
	return shared
}

// server starts thaw server on a store of its own, in Ceph or embedded, until the test ends.
func (w *world) server(t *testing.T, inCeph bool) (_ *lab.Thaw, prefix string) {
	t.Helper()
	o := lab.ThawOptions{}
	if inCeph {
		prefix = fmt.Sprintf("e%d.", w.stores.Add(1))
		o.Elsewhere = true
		o.Config = fmt.Sprintf("[pool]\nbackend = \"rbd\"\n[pool.rbd]\npool = %q\nconfig = %q\nuser = \"thaw\"\nprefix = %q\n", pool, w.cluster.Config, prefix)
	}
	s, err := w.lab.StartThawWith(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
		defer cancel()
		if t.Failed() {
			t.Logf("the end of the server's log:\n%s", s.Log(6000))
		} else if err := s.CheckStore(ctx); err != nil && inCeph {
			t.Errorf("the store at the end of the test: %v", err)
		}
		// The kernel gives a file back a moment after its last user has closed it.
		err := s.Shutdown(ctx)
		for deadline := time.Now().Add(15 * time.Second); err != nil && time.Now().Before(deadline); err = s.Shutdown(ctx) {
			time.Sleep(200 * time.Millisecond)
		}
		if err != nil {
			t.Errorf("shut thaw server down: %v", err)
		}
	})
	return s, prefix
}

func (w *world) node(t *testing.T, s *lab.Thaw) *launch.Node {
	t.Helper()
	c, err := w.lab.StartContainerd(t.Context(), lab.ContainerdOptions{Thaw: s})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Stop(); err != nil {
			t.Error(err)
		}
	})
	return &launch.Node{Lab: w.lab, Containerd: c, Snapshotter: "thaw"}
}

func cold(t *testing.T, n *launch.Node, id, ref string) (*launch.Container, launch.Timing) {
	t.Helper()
	c, timing, err := n.Cold(t.Context(), id, ref)
	if c != nil {
		t.Cleanup(func() {
			if err := c.Delete(context.Background()); err != nil {
				t.Error(err)
			}
		})
	}
	if err != nil {
		t.Fatal(err)
	}
	return c, timing
}

// TestWhole converts an image into Ceph, shows the chain that Ceph knows of it, starts
// a container from it, kills the server, and restarts the OSD under load.
func TestWhole(t *testing.T) {
	w := start(t)
	s, prefix := w.server(t, true)
	dest := w.source + "-whole"
	converted, err := s.Convert(t.Context(), w.source, dest, "overlayfs", "erofs")
	if err != nil {
		t.Fatal(err)
	}
	image := converted.Images[0]
	w.chain(t, prefix, image.Blocks())

	n := w.node(t, s)
	c, timing := cold(t, n, "whole", dest)
	t.Logf("from Ceph: pull %v, create %v, ready %v", timing.Pull, timing.Create, timing.Ready)
	if body, err := c.Ready(t.Context()); err != nil || !strings.Contains(body, "hello from a") {
		t.Fatalf("%q, %v", body, err)
	}
	want := hashOf(t, c)

	t.Run("server killed", func(t *testing.T) {
		begin := time.Now()
		if err := s.KillAndRestart(t.Context()); err != nil {
			t.Fatal(err)
		}
		t.Logf("killed and serving again after %v", time.Since(begin))
		dropCaches(t)
		if got := hashOf(t, c); got != want {
			t.Errorf("the container reads other bytes after the server was killed")
		}
	})
	for _, how := range []struct {
		name, filesystem string // what is converted meanwhile, and is not in the store yet
		end              func() error
	}{
		{"OSD restarted", "erofs", w.cluster.StopOSD},
		{"OSD killed", "ext4", func() error { w.cluster.KillOSD(); return nil }},
	} {
		t.Run(how.name, func(t *testing.T) { w.osdUnderLoad(t, s, c, want, how.filesystem, how.end) })
	}
}

// chain checks that Ceph shows what the converter says: each block below the next.
func (w *world) chain(t *testing.T, prefix string, blocks []string) {
	t.Helper()
	out, err := w.cluster.RBD(t.Context(), "ls", "-l", pool)
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(out)) {
		if strings.HasPrefix(line, prefix) || strings.HasPrefix(line, "NAME") {
			t.Log(strings.TrimSpace(line))
		}
	}
	image := func(block string) string {
		for line := range strings.Lines(string(out)) {
			columns := strings.Fields(line)
			if name, ok := strings.CutSuffix(columns[0], "@"+block); ok && strings.HasPrefix(name, prefix) {
				return name
			}
		}
		t.Fatalf("no image has a snapshot %s", block)
		return ""
	}
	snapshots := blocks[:len(blocks)-1] // the soldier is a clone
	for i, b := range snapshots {
		spec := pool + "/" + image(b) + "@" + b
		children, err := w.cluster.RBD(t.Context(), "children", spec)
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("rbd children %s: %s", spec, strings.TrimSpace(string(children)))
		if i+1 < len(snapshots) && !strings.Contains(string(children), image(snapshots[i+1])) {
			t.Errorf("block %s is no clone of %s", snapshots[i+1], b)
		}
		if i+1 == len(snapshots) && len(strings.Fields(string(children))) == 0 {
			t.Errorf("block %s has no soldier", b)
		}
		info, err := w.cluster.RBD(t.Context(), "info", spec)
		if err != nil {
			t.Fatal(err)
		}
		if i > 0 && !strings.Contains(string(info), "parent: "+pool+"/"+image(snapshots[i-1])+"@"+snapshots[i-1]) {
			t.Errorf("rbd info %s does not name its parent:\n%s", spec, info)
		}
	}
}

// hashOf has the container read all of its image.
func hashOf(t *testing.T, c *launch.Container) string {
	t.Helper()
	out, err := c.Exec(t.Context(), "/bin/sh", "-c", readAll)
	if err != nil || len(strings.Fields(out)) == 0 {
		t.Fatalf("read all files in the container: %q, %v", out, err)
	}
	return out
}

// A file that cannot be read is missing in the sum.
const readAll = `find /usr /etc /srv -xdev -type f | LC_ALL=C sort | xargs sha256sum | sha256sum`

func dropCaches(t *testing.T) {
	t.Helper()
	if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("1"), 0); err != nil {
		t.Fatal(err)
	}
}

// osdUnderLoad ends the OSD while the container reads, a file of it at a time past the
// page cache, and a conversion writes, and starts it again after some seconds. Neither
// sees an error.
func (w *world) osdUnderLoad(t *testing.T, s *lab.Thaw, c *launch.Container, want, filesystem string, end func() error) {
	ctx, cancel := context.WithTimeout(t.Context(), 4*time.Minute)
	defer cancel()
	file := deviceOf(t, s)
	stop := make(chan struct{})
	var wg sync.WaitGroup
	var reads atomic.Int64
	var longest time.Duration // read after wg
	wg.Go(func() {
		f, err := os.Open(file)
		if err != nil {
			t.Error(err)
			return
		}
		defer f.Close()
		buf := make([]byte, 64<<10)
		for off := int64(0); ; off = (off + 64<<10) % (32 << 20) {
			select {
			case <-stop:
				return
			default:
			}
			if off == 0 {
				_ = os.WriteFile("/proc/sys/vm/drop_caches", []byte("1"), 0) // checked elsewhere
			}
			begin := time.Now()
			if _, err := f.ReadAt(buf, off); err != nil {
				t.Errorf("read at %d: %v", off, err)
				return
			}
			longest = max(longest, time.Since(begin))
			reads.Add(1)
		}
	})
	wg.Go(func() {
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
			}
			out, err := c.Exec(ctx, "/bin/sh", "-c", readAll+"; dd if=/dev/urandom of=/tmp/w bs=64k count=16 conv=fsync 2>/dev/null && echo written")
			if err != nil || !strings.HasPrefix(out, want) || !strings.Contains(out, "written") {
				t.Errorf("in the container, round %d: %q, %v", i, out, err)
				return
			}
		}
	})
	var took time.Duration // read after wg
	wg.Go(func() {
		begin := time.Now()
		if _, err := s.Convert(ctx, w.source, fmt.Sprintf("%s-load%d", w.source, w.stores.Add(1)), "overlaybd", filesystem); err != nil {
			t.Errorf("convert meanwhile: %v", err)
		}
		took = time.Since(begin)
	})
	time.Sleep(2 * time.Second)
	before := reads.Load()
	if err := end(); err != nil {
		t.Error(err)
	}
	down := time.Now()
	time.Sleep(3 * time.Second)
	if err := w.cluster.StartOSD(ctx); err != nil {
		t.Error(err)
	}
	away := time.Since(down)
	// Until reads go on.
	for after := reads.Load(); reads.Load() < after+200 && ctx.Err() == nil && !t.Failed(); {
		time.Sleep(10 * time.Millisecond)
	}
	time.Sleep(2 * time.Second)
	close(stop)
	wg.Wait()
	if longest < 2*time.Second {
		t.Errorf("the longest read took %v, while the OSD was away for %v: nothing waited for it", longest, away)
	}
	t.Logf("OSD away for %v; %d reads before, %d in all, the longest %v; a conversion over it took %v", away, before, reads.Load(), longest, took)
}

// deviceOf is the file of the block that the container runs from.
func deviceOf(t *testing.T, s *lab.Thaw) string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(s.Run, "dev", "soldier-*"))
	if err != nil || len(files) == 0 {
		t.Fatalf("no disk is shown: %v, %v", files, err)
	}
	return files[0]
}

// figures are of one round.
type figures struct {
	ConvertSeconds, ColdSeconds, PullSeconds float64
	RandomIOPS, SequentialMiB                float64
}

// TestFigures measures the same in Ceph and in the embedded store, by turns, and writes
// the medians to out/ceph.json.
func TestFigures(t *testing.T) {
	w := start(t)
	all := map[string][]figures{}
	for round := range 3 {
		for _, where := range []string{"embedded", "ceph"} {
			t.Run(fmt.Sprintf("%s %d", where, round), func(t *testing.T) {
				all[where] = append(all[where], w.measure(t, where == "ceph", fmt.Sprintf("%s%d", where, round)))
			})
		}
	}
	out := map[string]figures{}
	for where, list := range all {
		out[where] = figures{
			ConvertSeconds: median(list, func(f figures) float64 { return f.ConvertSeconds }),
			ColdSeconds:    median(list, func(f figures) float64 { return f.ColdSeconds }),
			PullSeconds:    median(list, func(f figures) float64 { return f.PullSeconds }),
			RandomIOPS:     median(list, func(f figures) float64 { return f.RandomIOPS }),
			SequentialMiB:  median(list, func(f figures) float64 { return f.SequentialMiB }),
		}
		f := out[where]
		t.Logf("%-9s convert %.2f s, cold start %.2f s (of which pull %.2f s), 4K random read %.0f IOPS, 128K sequential read %.0f MiB/s",
			where, f.ConvertSeconds, f.ColdSeconds, f.PullSeconds, f.RandomIOPS, f.SequentialMiB)
	}
	root, err := lab.ModuleRoot()
	if err != nil {
		t.Fatal(err)
	}
	raw, err := json.MarshalIndent(out, "", "  ")
	if err == nil {
		err = os.MkdirAll(filepath.Join(root, "out"), 0o755)
	}
	if err == nil {
		err = os.WriteFile(filepath.Join(root, "out", "ceph.json"), append(raw, '\n'), 0o644)
	}
	if err != nil {
		t.Error(err)
	}
}

func median(list []figures, of func(figures) float64) float64 {
	if len(list) == 0 {
		return 0
	}
	var values []float64
	for _, f := range list {
		values = append(values, of(f))
	}
	slices.Sort(values)
	return values[len(values)/2]
}

func (w *world) measure(t *testing.T, inCeph bool, id string) figures {
	s, _ := w.server(t, inCeph)
	var f figures
	dest := w.source + "-" + id
	begin := time.Now()
	if _, err := s.Convert(t.Context(), w.source, dest, "overlayfs", "erofs"); err != nil {
		t.Fatal(err)
	}
	f.ConvertSeconds = time.Since(begin).Seconds()
	dropCaches(t)
	c, timing := cold(t, w.node(t, s), id, dest)
	f.ColdSeconds, f.PullSeconds = timing.Total().Seconds(), timing.Pull.Seconds()
	if _, err := c.Ready(t.Context()); err != nil {
		t.Fatal(err)
	}
	file := deviceOf(t, s)
	dropCaches(t)
	f.RandomIOPS, _ = w.fio(t, file, "--rw=randread", "--bs=4k", "--runtime=5", "--fadvise_hint=random")
	dropCaches(t)
	_, f.SequentialMiB = w.fio(t, file, "--rw=read", "--bs=128k")
	return f
}

// fio reads the first 64 MiB of a file, which the image fills, one request at a time.
func (w *world) fio(t *testing.T, file string, args ...string) (iops, mibs float64) {
	t.Helper()
	command := w.lab.Command(t.Context(), "fio", append([]string{
		"--name=read", "--filename=" + file, "--output-format=json", "--ioengine=psync", "--thread", "--allow_file_create=0",
		"--readonly", "--randseed=1", "--size=64m", "--iodepth=1",
	}, args...)...)
	out, err := command.Output()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		err = fmt.Errorf("%w: %s", err, exit.Stderr)
	}
	if err != nil {
		t.Fatalf("fio: %v", err)
	}
	var report struct {
		Jobs []struct {
			Error int
			Read  struct {
				IOPS float64 `json:"iops"`
				BW   float64 `json:"bw_bytes"`
			}
		}
	}
	if i := strings.IndexByte(string(out), '{'); i > 0 {
		out = out[i:]
	}
	if err := json.Unmarshal(out, &report); err != nil || len(report.Jobs) != 1 || report.Jobs[0].Error != 0 {
		t.Fatalf("fio: %v: %.400s", err, out)
	}
	return report.Jobs[0].Read.IOPS, report.Jobs[0].Read.BW / (1 << 20)
}
