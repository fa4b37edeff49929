package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"

	"github.com/thaw-project/thaw/e2e/lab"
)

// inventory is a line for everything there is on behalf of Thaw and containerd:
// mounts, loop devices, processes, containers' processes, lvols, converted images,
// containerd snapshots, and files in folders that have one per something. What
// differs between two equal states, such as process ids, is left out.
func (c *crash) inventory(ctx context.Context) ([]string, error) {
	var lines []string
	for _, dir := range []string{filepath.Dir(c.s.Root), filepath.Dir(c.n.Containerd.Root)} {
		left, err := c.b.lab.LeftoversBelow(dir)
		if err != nil {
			return nil, err
		}
		for _, line := range left {
			lines = append(lines, stripNumber.ReplaceAllString(line, "$1"))
		}
	}
	for _, id := range c.b.lab.ContainerIDs() {
		lines = append(lines, "container process of "+id)
	}
	for what, args := range map[string][]string{"lvol": {"lvol", "list"}, "image": {"image", "list"}} {
		out, err := c.s.Do(ctx, append(args, "--json")...)
		if err != nil {
			return nil, err
		}
		var list []struct{ Name, Reference string }
		if err := json.Unmarshal(out, &list); err != nil {
			return nil, fmt.Errorf("thaw %s: %w in %.200q", strings.Join(args, " "), err, out)
		}
		for _, e := range list {
			lines = append(lines, what+" "+e.Name+e.Reference)
		}
	}
	s, done, err := c.s.Snapshotter()
	if err != nil {
		return nil, err
	}
	defer done()
	err = s.Walk(namespaces.WithNamespace(ctx, lab.Namespace), func(_ context.Context, info snapshots.Info) error {
		// containerd counts up in the names it gives.
		lines = append(lines, "snapshot "+info.Name[strings.LastIndexByte(info.Name, '/')+1:])
		return nil
	})
	if err != nil {
		return nil, err
	}
	for _, dir := range []string{filepath.Join(c.s.Root, "mnt"), filepath.Join(c.s.Root, "snapshotter", "snapshots"),
		filepath.Join(c.s.Run, "dev"), c.s.Run, c.s.Root, c.temporary} {
		entries, err := os.ReadDir(dir)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, err
		}
		for _, e := range entries {
			lines = append(lines, "file "+filepath.Join(dir, e.Name()))
		}
	}
	slices.Sort(lines)
	return lines, nil
}

// stripNumber takes away the number of a process or a loop device.
var stripNumber = regexp.MustCompile(`^(process|loop) \S+`)

// ownLine tells what there is when nothing is in use.
func ownLine(line string) bool {
	return ownLines.MatchString(line)
}

var ownLines = regexp.MustCompile(`^(mount \S+/run/dev$|process \S*/thaw (server|keeper) |process \S*/containerd --config |lvol scratch-|` +
	`file \S+/root/(attacher.db|imagemgmt.db|lock|pool|snapshotter|mnt)$|file \S+/run/[a-z.]+$)`)

// stable waits until the inventory is the same for a while: what is kept for a moment
// after a start is gone then.
func (c *crash) stable(t *testing.T) []string {
	t.Helper()
	var last []string
	since := time.Now()
	c.eventually(t, "everything comes to rest", func() error {
		lines, err := c.inventory(t.Context())
		if err != nil {
			return permanent{err}
		}
		if !slices.Equal(lines, last) {
			last, since = lines, time.Now()
		}
		if time.Since(since) < 2*time.Second {
			return errors.New("still changing")
		}
		return nil
	})
	return last
}

// settle removes all that the rounds made, and waits until everything is as it was
// before the first. The store is clean then.
func (c *crash) settle(t *testing.T) {
	t.Helper()
	begin := time.Now()
	c.waitContainerd(t)
	for _, it := range c.items {
		if err := c.remove(t.Context(), it); err != nil {
			c.fatal(t, "remove %s: %v", it.name, err)
		}
	}
	if err := c.n.Tidy(t.Context()); err != nil {
		c.fatal(t, "%v", err)
	}
	for _, it := range c.items {
		if !it.ordinary {
			if err := c.forget(t.Context(), it.dest); err != nil {
				lines, ierr := c.inventory(t.Context())
				c.fatal(t, "remove %s: %v; there is (%v)\n%s", it.name, err, ierr, strings.Join(difference(c.baseline, lines), "\n"))
			}
		}
	}
	c.items = nil
	c.eventually(t, "everything is as it was", func() error {
		for _, r := range c.residents {
			if err := r.healthy(); err != nil {
				return permanent{err}
			}
		}
		lines, err := c.inventory(t.Context())
		if err != nil {
			return permanent{err}
		}
		if differ := difference(c.baseline, lines); len(differ) > 0 {
			return fmt.Errorf("\n%s", strings.Join(differ, "\n"))
		}
		return nil
	})
	if err := c.s.CheckStore(t.Context(), "--scrub"); err != nil {
		c.fatal(t, "%v", err)
	}
	t.Logf("after round %d everything is removed, nothing is left and the store is clean; %.1f s", c.lastRound, time.Since(begin).Seconds())
}

// difference has a line for each line of an inventory that is in one and not in the
// other; two mounts on one place are two lines.
func difference(before, now []string) (lines []string) {
	count := map[string]int{}
	for _, line := range now {
		count[line]++
	}
	for _, line := range before {
		count[line]--
	}
	for _, line := range slices.Sorted(maps.Keys(count)) {
		for range count[line] {
			lines = append(lines, "left: "+line)
		}
		for range -count[line] {
			lines = append(lines, "gone: "+line)
		}
	}
	return lines
}

// checkQcow2 has QEMU check the writable layers, none of which is in use.
func (c *crash) checkQcow2(t *testing.T) {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(c.s.Root, "snapshotter/snapshots/*/rw.qcow2"))
	if err != nil || len(files) != 2 {
		c.fatal(t, "writable layers: %v, %v; want those of both variants that have one", files, err)
	}
	for _, f := range files {
		out, err := exec.CommandContext(t.Context(), "qemu-img", "info", "--output=json", f).CombinedOutput()
		var info struct {
			Backing string `json:"backing-filename"`
		}
		if err == nil {
			err = json.Unmarshal(out, &info)
		}
		if err != nil {
			c.fatal(t, "qemu-img info %s: %v: %s", f, err, out)
		}
		// The backing file is an lvol, which has no path: something must stand there.
		backing := filepath.Join(filepath.Dir(f), info.Backing)
		if err := os.WriteFile(backing, make([]byte, 4096), 0o600); err != nil {
			t.Fatal(err)
		}
		out, err = exec.CommandContext(t.Context(), "qemu-img", "check", "-f", "qcow2", f).CombinedOutput()
		if err := os.Remove(backing); err != nil {
			t.Fatal(err)
		}
		if err != nil || !strings.Contains(string(out), "No errors") {
			c.fatal(t, "qemu-img check %s: %v: %s", f, err, out)
		}
		t.Logf("qemu-img check of %s: %s", f, strings.ReplaceAll(strings.TrimSpace(string(out)), "\n", "; "))
	}
}

// cleanUp removes what a failed test leaves running. After a success nothing is
// there.
func (c *crash) cleanUp(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if len(c.residents)+len(c.items) == 0 {
		return
	}
	var errs []error
	if !c.s.Running() {
		errs = append(errs, c.s.Start(ctx))
	}
	if !c.n.Containerd.Running() {
		errs = append(errs, c.n.Containerd.Start(ctx))
	}
	for _, r := range c.residents {
		errs = append(errs, c.n.Remove(ctx, r.id))
	}
	for _, it := range c.items {
		errs = append(errs, c.n.Remove(ctx, it.name))
	}
	if err := errors.Join(errs...); err != nil {
		t.Logf("clean up after the failure: %v", err)
	}
}
