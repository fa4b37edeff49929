package walk

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// plant makes the same small tree in dir; its times are fixed.
func plant(t *testing.T, dir string) {
	t.Helper()
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	check(os.Mkdir(filepath.Join(dir, "d"), 0o755))
	check(os.WriteFile(filepath.Join(dir, "d/f"), []byte("hello"), 0o644))
	check(os.Link(filepath.Join(dir, "d/f"), filepath.Join(dir, "g")))
	check(os.Symlink("d/f", filepath.Join(dir, "s")))
	check(unix.Mkfifo(filepath.Join(dir, "p"), 0o600))
	check(unix.Setxattr(filepath.Join(dir, "d/f"), "user.thaw", []byte("v"), 0))
	for _, p := range []string{"d/f", "p", "d", "."} {
		when := time.Unix(1_600_000_000, 123_456_789)
		check(os.Chtimes(filepath.Join(dir, p), when, when))
	}
	ts := []unix.Timespec{{Sec: 1}, {Sec: 2, Nsec: 3}}
	check(unix.UtimesNanoAt(unix.AT_FDCWD, filepath.Join(dir, "s"), ts, unix.AT_SYMLINK_NOFOLLOW))
}

func TestDiffSeesEveryField(t *testing.T) {
	reference := t.TempDir()
	plant(t, reference)
	want, err := Tree(reference, Options{})
	if err != nil {
		t.Fatal(err)
	}
	root := os.Geteuid() == 0
	touch := func(dir, path string) error {
		when := time.Unix(1_600_000_000, 123_456_789)
		return os.Chtimes(filepath.Join(dir, path), when, when)
	}
	cases := []struct {
		name, want string
		needRoot   bool
		change     func(dir string) error
	}{
		{"nothing", "", false, func(string) error { return nil }},
		{"mode", "mode 0644 / 4755", false, func(d string) error { return unix.Chmod(d+"/d/f", 0o4755) }},
		{"owner", "uid 0 / 70000", true, func(d string) error { return os.Lchown(d+"/s", 70000, 0) }},
		{"mtime by a nanosecond", "mtime 1600000000.123456789 / 1600000000.123456790", false, func(d string) error {
			when := time.Unix(1_600_000_000, 123_456_790)
			return os.Chtimes(d+"/d/f", when, when)
		}},
		{"content of the same size", "content ", false, func(d string) error {
			if err := os.WriteFile(d+"/d/f", []byte("jello"), 0o644); err != nil {
				return err
			}
			return touch(d, "d/f")
		}},
		{"size", "size 5 / 6", false, func(d string) error { return os.WriteFile(d+"/d/f", []byte("hello!"), 0o644) }},
		{"xattr", "xattrs [user.thaw=76] / [user.thaw=77]", false, func(d string) error {
			return unix.Setxattr(d+"/d/f", "user.thaw", []byte("w"), 0)
		}},
		{"link broken", `links d/f / `, false, func(d string) error {
			if err := os.Remove(d + "/g"); err != nil {
				return err
			}
			if err := os.WriteFile(d+"/g", []byte("hello"), 0o644); err != nil {
				return err
			}
			return touch(d, "g")
		}},
		{"symlink", "target d/f / d/g", false, func(d string) error {
			if err := os.Remove(d + "/s"); err != nil {
				return err
			}
			return os.Symlink("d/g", d+"/s")
		}},
		{"type", "type fifo / file", false, func(d string) error {
			if err := os.Remove(d + "/p"); err != nil {
				return err
			}
			return os.WriteFile(d+"/p", nil, 0o600)
		}},
		{"missing", "g: only in a", false, func(d string) error { return os.Remove(d + "/g") }},
		{"more", "new: only in b", false, func(d string) error { return os.WriteFile(d+"/new", nil, 0o600) }},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			if c.needRoot && !root {
				t.Skip("changing owners needs root: run as root")
			}
			dir := t.TempDir()
			plant(t, dir)
			if err := c.change(dir); err != nil {
				t.Fatal(err)
			}
			got, err := Tree(dir, Options{NoTimes: nil})
			if err != nil {
				t.Fatal(err)
			}
			diff := strings.Join(Diff("a", want, "b", got), "\n")
			if c.want == "" && diff != "" || !strings.Contains(diff, c.want) {
				t.Errorf("diff is\n%s\nwant %q in it", diff, c.want)
			}
		})
	}
}
