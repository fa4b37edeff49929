package e2e

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/thaw-project/thaw/e2e/launch"
	"github.com/thaw-project/thaw/e2e/recipe"
	"github.com/thaw-project/thaw/e2e/walk"
	"github.com/thaw-project/thaw/image/layer/torture"
)

// TestSameTree compares the file system that containerd's overlayfs gives with Thaw's:
// as an image, and after writing, deleting and renaming in it.
func TestSameTree(t *testing.T) {
	b := start(t)
	var tars [][]byte
	for _, l := range torture.Stack() {
		tars = append(tars, l.Tar)
	}
	image, err := recipe.Layers(tars)
	if err != nil {
		t.Fatal(err)
	}
	for _, source := range []struct{ name, ref string }{
		{"torture", b.push(t, "torture", image)},
		{"debian", b.image(t, recipe.Web())},
	} {
		t.Run(source.name, func(t *testing.T) { sameTree(t, b, source.ref) })
	}
}

// trees are an image's trees: as it is, and after alter.
type trees struct{ plain, altered []walk.Entry }

func sameTree(t *testing.T, b *bench, ref string) {
	since := time.Now()
	want := imageTrees(t, b.plainNode(t), ref)
	clock := clockTimes(t, want.plain, since)
	t.Logf("directories whose time containerd takes from the clock, and that are compared without: %q", slices.Sorted(maps.Keys(clock)))
	want.forget(clock)
	if len(diff(want.plain, want.altered)) == 0 {
		t.Fatal("altering a tree changes nothing: the comparison is worthless")
	}
	t.Logf("%d files", len(want.plain))
	for _, v := range variants {
		t.Run(v.String(), func(t *testing.T) {
			s := b.thaw(t)
			dest, _ := b.convert(t, s, ref, v)
			n := b.node(t, s)
			got := imageTrees(t, n, dest)
			got.forget(clock)
			for _, line := range diff(want.plain, got.plain) {
				t.Error(line)
			}
			for _, line := range diff(want.altered, got.altered) {
				t.Errorf("after changes: %s", line)
			}
			if err := n.RemoveImage(t.Context(), dest); err != nil {
				t.Error(err)
			}
		})
	}
}

// clockTimes finds the directories that no layer gives a time, or that a later layer
// touches without naming them: containerd leaves them the time at which it unpacked,
// so that they differ between two pulls of the same image, and there is nothing to
// compare.
func clockTimes(t *testing.T, entries []walk.Entry, since time.Time) map[string]bool {
	t.Helper()
	paths := map[string]bool{}
	for _, e := range entries {
		var seconds, nanoseconds int64
		if _, err := fmt.Sscanf(e.Mtime, "%d.%d", &seconds, &nanoseconds); err != nil {
			t.Fatalf("mtime %q of %s: %v", e.Mtime, e.Path, err)
		}
		if seconds < since.Unix() || seconds > time.Now().Unix() {
			continue
		}
		if e.Type != "dir" {
			t.Errorf("%s %s has the time of the unpacking", e.Type, e.Path)
		}
		paths[e.Path] = true
	}
	return paths
}

// forget takes the modification times of some paths away.
func (t *trees) forget(paths map[string]bool) {
	for _, list := range [][]walk.Entry{t.plain, t.altered} {
		for i := range list {
			if paths[list[i].Path] {
				list[i].Mtime = ""
			}
		}
	}
}

func diff(a, b []walk.Entry) []string { return walk.Diff("overlayfs", a, "thaw", b) }

func imageTrees(t *testing.T, n *launch.Node, ref string) trees {
	t.Helper()
	image, err := n.Pull(t.Context(), ref)
	if err != nil {
		t.Fatal(err)
	}
	var out trees
	// ext4 has lost+found where it is the whole root file system.
	options := walk.Options{Skip: func(path string) bool { return path == "lost+found" }}
	err = n.View(t.Context(), image, func(root string) error {
		out.plain, err = walk.Tree(root, options)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	// What happens now is at a time of its own in every tree.
	changed := map[string]bool{}
	options.NoTimes = func(path string) bool { return changed[path] }
	err = n.Active(t.Context(), image, func(root string) error {
		if err := alter(root, out.plain, changed); err != nil {
			return fmt.Errorf("alter %s: %w", root, err)
		}
		out.altered, err = walk.Tree(root, options)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// alter changes a tree in every way a container can, the same way each time. It
// records the paths whose modification time it has set to now.
func alter(root string, entries []walk.Entry, changed map[string]bool) error {
	touch := func(path string) { changed[path] = true; changed[filepath.Dir(path)] = true }
	var files, dirs, links []string
	for _, e := range entries {
		switch {
		case strings.Contains(e.Path, "\n"):
		case e.Type == "file" && e.Links == "" && e.Size < 1<<20:
			files = append(files, e.Path)
		case e.Type == "dir" && e.Path != ".":
			dirs = append(dirs, e.Path)
		case e.Type == "symlink":
			links = append(links, e.Path)
		}
	}
	if len(files) < 10 || len(dirs) < 5 {
		return fmt.Errorf("only %d files and %d directories", len(files), len(dirs))
	}
	full := func(path string) string { return filepath.Join(root, path) }
	pick := func(list []string, i int) string { return list[i*len(list)/10] }

	// Append, overwrite in the middle, truncate.
	for i, flag := range []int{os.O_APPEND, 0, os.O_TRUNC} {
		path := pick(files, i)
		f, err := os.OpenFile(full(path), os.O_WRONLY|flag, 0)
		if err != nil {
			return err
		}
		_, err = f.WriteString("written by the container")
		if cerr := f.Close(); err == nil {
			err = cerr
		}
		if err != nil {
			return err
		}
		touch(path)
	}
	steps := []func() error{
		func() error { touch(pick(files, 3)); return os.Remove(full(pick(files, 3))) },
		func() error { touch(pick(files, 4)); return os.Rename(full(pick(files, 4)), full("renamed")) },
		func() error { return os.Chmod(full(pick(files, 5)), 0o4711) },
		func() error { return os.Lchown(full(pick(files, 6)), 123456, 654321) },
		func() error { return unix.Setxattr(full(pick(files, 7)), "trusted.thaw", []byte("x"), 0) },
		func() error { touch("linked"); return os.Link(full(pick(files, 8)), full("linked")) },
		func() error { touch("new/deep/file"); return os.MkdirAll(full("new/deep"), 0o711) },
		func() error {
			touch("new/x")
			touch("new")
			return os.WriteFile(full("new/deep/file"), make([]byte, 1<<20), 0o600)
		},
		func() error { touch("fifo"); return unix.Mkfifo(full("fifo"), 0o600) },
		func() error {
			touch("node")
			return unix.Mknod(full("node"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3)))
		},
		func() error { touch("symlink"); return os.Symlink("/nowhere", full("symlink")) },
		func() error { // a whole directory away, and another in its place
			path := pick(dirs, 5)
			touch(path)
			if err := os.RemoveAll(full(path)); err != nil {
				return err
			}
			if err := os.MkdirAll(full(path), 0o755); err != nil {
				return err
			}
			touch(filepath.Join(path, "fresh"))
			return os.WriteFile(full(filepath.Join(path, "fresh")), []byte("fresh"), 0o644)
		},
	}
	if len(links) > 0 {
		steps = append(steps, func() error { touch(links[0]); return os.Remove(full(links[0])) })
	}
	for i, step := range steps {
		if err := step(); err != nil {
			return fmt.Errorf("step %d: %w", i, err)
		}
	}
	return nil
}

// TestContainerChanges lets a container itself change its file system, and compares
// what it then is.
func TestContainerChanges(t *testing.T) {
	b := start(t)
	source := b.image(t, recipe.Web())
	want := changedByContainer(t, b.plainNode(t), "changes-plain", source)
	for i, v := range variants {
		t.Run(v.String(), func(t *testing.T) {
			s := b.thaw(t)
			dest, _ := b.convert(t, s, source, v)
			got := changedByContainer(t, b.node(t, s), fmt.Sprintf("changes%d", i), dest)
			for _, line := range diff(want, got) {
				t.Error(line)
			}
		})
	}
}

const changeScript = `set -e
touch -d '2 seconds ago' /dev/shm/begin
echo more >>/etc/passwd
rm -r /usr/share/zoneinfo /srv/web/templates
mkdir /srv/web/templates && echo new >/srv/web/templates/page
mv /etc/hostname.old /tmp 2>/dev/null || true
cp -a /usr/lib/python3 /usr/lib/python3.copy && rm -r /usr/lib/python3 && mv /usr/lib/python3.copy /usr/lib/python3
dd if=/dev/zero of=/var/tmp/big bs=1M count=8 2>/dev/null
ln /var/tmp/big /var/tmp/big2
mv /usr/bin/make /usr/bin/make.moved
chmod 700 /srv && chown 5:6 /srv/web/greeting
sync
# Times of what was touched depend on now.
find / -xdev -newer /dev/shm/begin ! -path '/proc*' ! -path '/sys*' ! -path '/dev*' -exec touch -h -d @1700000000 {} +
`

func changedByContainer(t *testing.T, n *launch.Node, id, ref string) []walk.Entry {
	t.Helper()
	c, _ := coldStart(t, n, id, ref)
	if out, err := c.Exec(t.Context(), "/bin/sh", "-c", changeScript); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	entries, err := walk.Tree(c.Rootfs(), walk.Options{
		Skip: func(path string) bool { return path == "lost+found" },
		// runc makes mount points in these when it starts the container, and
		// python may write its caches.
		NoTimes: func(path string) bool {
			return path == "." || path == "dev" || path == "proc" || path == "sys" || path == "run"
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	return entries
}
