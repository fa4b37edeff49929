package e2e

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"hash/crc32"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.etcd.io/bbolt"
	"golang.org/x/sys/unix"

	"github.com/thaw-project/thaw/doctor"
	"github.com/thaw-project/thaw/e2e/lab"
)

// place is a pair of directories for a server that must not start.
type place struct{ dir, root, run string }

// place makes directories below the lab's, so that what is left in them is seen.
func (b *bench) place(t *testing.T) place {
	t.Helper()
	dir, err := os.MkdirTemp(b.lab.Dir, "p")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return place{dir, filepath.Join(dir, "root"), filepath.Join(dir, "run")}
}

func (p place) args(verb ...string) []string {
	return append(verb, "--root", p.root, "--run", p.run)
}

// noServer runs thaw server, which must refuse, and checks that nothing is left of it.
func (b *bench) noServer(t *testing.T, c bad, p place, command *exec.Cmd) {
	t.Helper()
	mounts, err := b.lab.LeftoversBelow(p.dir)
	if err != nil {
		t.Fatal(err)
	}
	processes := b.lab.Pids("")
	sockets := p.sockets(t)
	c.refused(t, run(t, command))
	if now := p.sockets(t); !slices.Equal(now, sockets) {
		t.Errorf("sockets were left: %q, before %q", now, sockets)
	}
	// A keeper that has nothing to keep ends by itself.
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		now, err := b.lab.LeftoversBelow(p.dir)
		if err != nil {
			t.Fatal(err)
		}
		pids := b.lab.Pids("")
		if slices.Equal(now, mounts) && sameProcesses(pids, processes) {
			return
		}
		if time.Now().After(deadline) {
			t.Errorf("left behind: %q, before %q; processes %v, before %v", now, mounts, pids, processes)
			return
		}
	}
}

func sameProcesses(a, b []int) bool {
	slices.Sort(a)
	slices.Sort(b)
	return slices.Equal(a, b)
}

func (p place) sockets(t *testing.T) []string {
	t.Helper()
	list, err := filepath.Glob(filepath.Join(p.run, "*.sock"))
	if err != nil {
		t.Fatal(err)
	}
	return list
}

// badServer: servers that cannot start.
func (b *bench) badServer(t *testing.T) {
	refuse := func(name string, c bad, prepare func(t *testing.T, p *place) []string) {
		t.Run(name, func(t *testing.T) {
			p := b.place(t)
			args := prepare(t, &p)
			ctx, cancel := context.WithTimeout(t.Context(), commandLimit)
			defer cancel()
			b.noServer(t, c, p, b.lab.Command(ctx, "thaw", append(p.args("server"), args...)...))
		})
	}
	config := func(text string) func(t *testing.T, p *place) []string {
		return func(t *testing.T, p *place) []string {
			return []string{"--config", writeFile(t, filepath.Join(p.dir, "config.toml"), text)}
		}
	}
	refuse("unknown key", bad{code: exitInvalid, says: []string{"config.toml", "line 3", "capcity", "does not exist"}},
		config("# sizes\n[pool]\ncapcity = \"1GiB\"\n"))
	refuse("several unknown keys", bad{code: exitInvalid, says: []string{"config.toml", "rot", "poool"}},
		config("rot = \"/x\"\n[poool]\ncapacity = \"1GiB\"\n"))
	refuse("not TOML", bad{code: exitInvalid, says: []string{"config.toml", "line 2"}}, config("[pool]\ncapacity = = 1\n"))
	refuse("value of another type", bad{code: exitInvalid, says: []string{"config.toml", "line 1"}}, config("root = 7\n"))
	refuse("bad size", bad{code: exitInvalid, says: []string{"config.toml", "line 2", "many", "20GiB"}}, config("[pool]\ncapacity = \"many\"\n"))
	refuse("pool too small", bad{code: exitInvalid, says: []string{"pool.capacity", "1024", "4 clusters"}}, config("[pool]\ncapacity = \"1KiB\"\n"))
	refuse("no such device", bad{code: exitNotFound, says: []string{"/dev/thaw-none"}}, config("[pool]\ndevice = \"/dev/thaw-none\"\n"))
	refuse("no such configuration", bad{code: exitNotFound, says: []string{"/none.toml"}}, func(*testing.T, *place) []string { return []string{"--config", "/none.toml"} })
	refuse("bad log level", bad{code: exitInvalid, says: []string{"loud"}}, func(*testing.T, *place) []string { return []string{"--log-level", "loud"} })

	refuse("read-only root", bad{code: exitDenied, says: []string{"root", "read-only", "--root"}}, func(t *testing.T, p *place) []string {
		readOnly(t, p.root)
		return nil
	})
	refuse("read-only root of a pool that exists", bad{code: exitDenied, says: []string{"root", "read-only", "--root"}}, func(t *testing.T, p *place) []string {
		b.once(t, *p)
		readOnly(t, p.root)
		return nil
	})
	refuse("read-only run directory", bad{code: exitDenied, says: []string{"run", "read-only", "--run"}}, func(t *testing.T, p *place) []string {
		readOnly(t, p.run)
		return nil
	})
	refuse("root is a file", bad{code: exitInvalid, says: []string{"root", "not a directory"}}, func(t *testing.T, p *place) []string {
		writeFile(t, p.root, "")
		return nil
	})
	refuse("no room for a pool", bad{code: exitNoSpace, says: []string{"root", "no space left", "--root"}}, func(t *testing.T, p *place) []string {
		mountTmpfs(t, p.root, 16<<10)
		return nil
	})
	refuse("port in use", bad{code: exitInUse, says: []string{"metrics.address", "in use", "choose another"}}, func(t *testing.T, p *place) []string {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
		return config(fmt.Sprintf("[metrics]\naddress = %q\n", l.Addr()))(t, p)
	})
	for _, name := range []string{"thaw.sock", "snapshotter.sock", "metrics.sock"} {
		refuse(name+" in use", bad{code: exitInUse, says: []string{name, "in use", "--run"}}, func(t *testing.T, p *place) []string {
			if err := os.Mkdir(p.run, 0o700); err != nil {
				t.Fatal(err)
			}
			l, err := net.Listen("unix", filepath.Join(p.run, name))
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { l.Close() })
			return nil
		})
	}
	refuse("a file in the place of a socket", bad{code: exitInUse, says: []string{"thaw.sock", "not a socket"}}, func(t *testing.T, p *place) []string {
		if err := os.Mkdir(p.run, 0o700); err != nil {
			t.Fatal(err)
		}
		path := writeFile(t, filepath.Join(p.run, "thaw.sock"), "precious")
		t.Cleanup(func() {
			if content, err := os.ReadFile(path); err != nil || string(content) != "precious" {
				t.Errorf("the file is gone: %q, %v", content, err)
			}
		})
		return nil
	})
	refuse("run directory with a long name", bad{code: exitInvalid, says: []string{"107"}}, func(_ *testing.T, p *place) []string {
		p.run = filepath.Join(p.dir, strings.Repeat("r", 100))
		return nil
	})

	running := b.thaw(t)
	second := bad{code: exitInUse, says: []string{"another thaw server", fmt.Sprint(running.Pid())}}
	refuse("second server on one root", bad{code: exitInUse, says: append(second.says, running.Root, "--root")}, func(_ *testing.T, p *place) []string {
		p.root = running.Root
		return nil
	})
	refuse("second server on one run directory", bad{code: exitInUse, says: append(second.says, running.Run, "--run")}, func(_ *testing.T, p *place) []string {
		p.run = running.Run
		return nil
	})
	t.Run("teardown under a running server", func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), commandLimit)
		defer cancel()
		second.refused(t, run(t, running.Command(ctx, "server", "teardown")))
	})
	t.Run("the first server goes on", func(t *testing.T) {
		if _, err := running.Do(t.Context(), "lvol", "list"); err != nil {
			t.Error(err)
		}
	})

	refuse("newer pool", bad{code: exitUnsupported, says: []string{"pool", "format version 2", "this program knows 1", "newer"}}, func(t *testing.T, p *place) []string {
		b.once(t, *p)
		changeSuperblock(t, p.root, func(block []byte) {
			binary.LittleEndian.PutUint32(block[8:], 2)
			sum := crc32.Checksum(block[:len(block)-4], crc32.MakeTable(crc32.Castagnoli))
			binary.LittleEndian.PutUint32(block[len(block)-4:], sum)
		})
		return nil
	})
	for _, name := range []string{"attacher.db", "imagemgmt.db"} {
		refuse("newer "+name, bad{code: exitUnsupported, says: []string{name, "version", "newer"}}, func(t *testing.T, p *place) []string {
			b.once(t, *p)
			db, err := bbolt.Open(filepath.Join(p.root, name), 0o600, &bbolt.Options{Timeout: time.Second})
			if err != nil {
				t.Fatal(err)
			}
			defer db.Close()
			err = db.Update(func(tx *bbolt.Tx) error {
				return tx.Bucket([]byte("thaw")).Put([]byte("version"), []byte{99, 0, 0, 0})
			})
			if err != nil {
				t.Fatal(err)
			}
			return nil
		})
	}
	refuse("damaged attacher.db", bad{code: exitCorrupt, says: []string{"attacher.db", "backup", "--root"}}, func(t *testing.T, p *place) []string {
		b.once(t, *p)
		writeFile(t, filepath.Join(p.root, "attacher.db"), strings.Repeat("no database ", 4096))
		return nil
	})
	refuse("damaged pool database", bad{code: exitCorrupt, says: []string{"meta.db", "backup"}}, func(t *testing.T, p *place) []string {
		b.once(t, *p)
		writeFile(t, filepath.Join(p.root, "pool/meta.db"), strings.Repeat("no database ", 4096))
		return nil
	})
	t.Run("no room for the scratch volume", func(t *testing.T) {
		// Only the size limit of some writable layers is lost: it is said once, and
		// the server works.
		s := b.thaw(t, "--config", writeFile(t, filepath.Join(t.TempDir(), "c.toml"), "[pool]\ncapacity = \"512KiB\"\n"))
		if log := s.Log(1 << 20); strings.Count(log, "no scratch volume") != 1 || !strings.Contains(log, "No space left") {
			t.Errorf("the log should say once that there is no room:\n%s", log)
		}
		if _, err := s.Do(t.Context(), "lvol", "list"); err != nil {
			t.Error(err)
		}
	})
}

// badMachine: what the machine lacks.
func (b *bench) badMachine(t *testing.T) {
	for _, how := range []struct{ name, setup string }{
		{"no /dev/fuse", `rm -f "$new/fuse"`},
		// The node is there, and no driver behind it.
		{"no driver behind /dev/fuse", `rm -f "$new/fuse"; mknod "$new/fuse" c 10 251`},
	} {
		t.Run(how.name, func(t *testing.T) {
			p := b.place(t)
			without := func(args ...string) *exec.Cmd {
				ctx, cancel := context.WithTimeout(t.Context(), commandLimit)
				t.Cleanup(cancel)
				return b.withoutFuse(ctx, t, p.dir, how.setup, args...)
			}
			c := bad{code: exitUnsupported, says: []string{"/dev/fuse", "modprobe fuse", "CONFIG_FUSE_FS"}}
			b.noServer(t, c, p, without(p.args("server")...))
			o := run(t, without(p.args("doctor", "--json")...))
			f := finding(t, o, "fuse")
			if o.code != exitUnsupported || f.State != doctor.Fail || !strings.Contains(f.Advice, "modprobe fuse") {
				t.Errorf("thaw doctor: exit %d, %+v", o.code, f)
			}
			// Nothing is broken by the attempt.
			b.once(t, p)
			c = bad{code: exitNotFound, says: []string{p.root}}
			if err := os.RemoveAll(p.root); err != nil {
				t.Fatal(err)
			}
			c.refused(t, run(t, without(p.args("lvol", "check")...)))
		})
	}
	t.Run("doctor on a read-only root", func(t *testing.T) {
		p := b.place(t)
		readOnly(t, p.root)
		o := run(t, b.lab.Command(t.Context(), "thaw", p.args("doctor", "--json")...))
		if f := finding(t, o, "disk"); f.State != doctor.Fail || !strings.Contains(f.Detail, p.root) || !strings.Contains(f.Advice, "--root") {
			t.Errorf("%+v", f)
		}
	})
	t.Run("no containerd", func(t *testing.T) {
		g := b.ground(t) // with no containerd at all
		none := filepath.Join(g.dir, "containerd.sock")
		dead := filepath.Join(g.dir, "dead.sock")
		l, err := net.ListenUnix("unix", &net.UnixAddr{Name: dead, Net: "unix"})
		if err != nil {
			t.Fatal(err)
		}
		l.SetUnlinkOnClose(false)
		l.Close()
		for _, socket := range []string{none, dead} {
			o := run(t, g.server.Command(t.Context(), "doctor", "--containerd", socket, "--json"))
			c := bad{code: exitUnsupported, says: []string{"1 check failed: containerd"}}
			c.refused(t, outcome{o.code, "", o.stderr})
			f := finding(t, o, "containerd")
			if f.State != doctor.Fail || !strings.Contains(f.Detail, socket) || !strings.Contains(f.Advice, "containerd") {
				t.Errorf("thaw doctor: %+v", f)
			}
			if f := finding(t, o, "thaw server"); f.State != doctor.OK {
				t.Errorf("the server is not well without containerd: %+v", f)
			}
		}
		if _, err := g.server.Do(t.Context(), g.convertArgs(g.good(t, "alone"), "alone-dest")...); err != nil {
			t.Errorf("convert without containerd: %v", err)
		}
	})
}

// finding returns what thaw doctor --json found about one check.
func finding(t *testing.T, o outcome, check string) doctor.Finding {
	t.Helper()
	var all []doctor.Finding
	if err := json.Unmarshal([]byte(o.stdout), &all); err != nil {
		t.Fatalf("thaw doctor --json: %v: %.300s %s", err, o.stdout, o.stderr)
	}
	for _, f := range all {
		if f.Check == check {
			return f
		}
	}
	t.Fatalf("thaw doctor does not check %s: %.1000s", check, o.stdout)
	return doctor.Finding{}
}

// withoutFuse is a thaw command in a mount namespace whose /dev has no working fuse.
func (b *bench) withoutFuse(ctx context.Context, t *testing.T, dir, setup string, args ...string) *exec.Cmd {
	t.Helper()
	script := `set -eu
new=$1; setup=$2; shift 2
mkdir -p "$new"; mount -t tmpfs -o mode=755 tmpfs "$new"
for f in /dev/*; do
  n="$new/${f##*/}"
  if [ -L "$f" ]; then cp -P "$f" "$n"
  elif [ -d "$f" ]; then mkdir "$n"; mount --rbind "$f" "$n"
  elif [ "$f" != /dev/fuse ]; then : >"$n"; mount --bind "$f" "$n"; fi
done
eval "$setup"
mount --rbind "$new" /dev
exec "$@"`
	shell := []string{"--mount", "--propagation", "private", "sh", "-c", script, "sh", filepath.Join(dir, "dev"), setup, filepath.Join(b.lab.Bin, "thaw")}
	return b.lab.Command(ctx, "unshare", append(shell, args...)...)
}

// thawOn starts a server whose root is not the lab's own; it ends with the test, as
// those of bench.thaw do.
func (b *bench) thawOn(t *testing.T, root string, args ...string) *lab.Thaw {
	t.Helper()
	s, err := b.lab.StartThaw(t.Context(), append([]string{"--root", root}, args...)...)
	if err != nil {
		t.Fatal(err)
	}
	s.Root = root
	t.Cleanup(func() { b.end(t, s) })
	return s
}

// end stops a server for good and checks that nothing but its root is left.
func (b *bench) end(t *testing.T, s *lab.Thaw) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	if t.Failed() {
		t.Logf("the end of the server's log:\n%s", s.Log(6000))
	}
	if err := s.Shutdown(ctx); err != nil {
		t.Errorf("shut thaw server down: %v", err)
	}
	if err := s.CheckStore(ctx); err != nil {
		t.Errorf("the store after the test: %v", err)
	}
	for _, dir := range []string{s.Root, filepath.Dir(s.Run)} {
		lines, err := b.lab.LeftoversBelow(dir)
		if err != nil {
			t.Error(err)
		}
		for _, line := range lines {
			t.Errorf("left behind: %s", line)
		}
	}
	if err := os.RemoveAll(filepath.Dir(s.Run)); err != nil {
		t.Error(err)
	}
}

// once runs a server on p's root to its end, so that there is a pool.
func (b *bench) once(t *testing.T, p place) {
	t.Helper()
	s, err := b.lab.StartThaw(t.Context(), "--root", p.root)
	if err != nil {
		t.Fatal(err)
	}
	s.Root = p.root
	b.end(t, s)
}

func changeSuperblock(t *testing.T, root string, change func([]byte)) {
	t.Helper()
	f, err := os.OpenFile(filepath.Join(root, "pool/data"), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	block := make([]byte, 4096)
	if _, err := io.ReadFull(f, block); err != nil {
		t.Fatal(err)
	}
	change(block)
	if _, err := f.WriteAt(block, 0); err != nil {
		t.Fatal(err)
	}
}

// readOnly makes dir, or what is there, read-only: a bind mount on itself.
func readOnly(t *testing.T, dir string) {
	t.Helper()
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount(dir, dir, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	unmountAfter(t, dir)
	if err := unix.Mount("", dir, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
}

func mountTmpfs(t *testing.T, dir string, sizeBytes int64) {
	t.Helper()
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, fmt.Sprintf("mode=0700,size=%d", sizeBytes)); err != nil {
		t.Fatal(err)
	}
	unmountAfter(t, dir)
}

func unmountAfter(t *testing.T, dir string) {
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Errorf("unmount %s: %v", dir, err)
			_ = unix.Unmount(dir, unix.MNT_DETACH)
		}
	})
}

func nobody() *syscall.Credential { return &syscall.Credential{Uid: 65534, Gid: 65534} }

// publicCopy copies a program to where everybody may run it.
func (b *bench) publicCopy(t *testing.T, program string) string {
	t.Helper()
	if err := os.Chmod(b.lab.Dir, 0o711); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.Chmod(b.lab.Dir, 0o700); err != nil {
			t.Error(err)
		}
	})
	p := b.place(t)
	if err := os.Chmod(p.dir, 0o711); err != nil {
		t.Fatal(err)
	}
	content, err := os.ReadFile(program)
	if err != nil {
		t.Fatal(err)
	}
	copied := filepath.Join(p.dir, filepath.Base(program))
	if err := os.WriteFile(copied, content, 0o755); err != nil {
		t.Fatal(err)
	}
	return copied
}
