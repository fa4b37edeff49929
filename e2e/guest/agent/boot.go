package main

import (
	_ "embed"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"sort"
	"strings"

	"golang.org/x/sys/unix"
)

type mount struct {
	source, target, fstype string
	flags                  uintptr
	data                   string
}

func mountAll(mounts []mount) error {
	for _, m := range mounts {
		if err := os.MkdirAll(m.target, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(m.source, m.target, m.fstype, m.flags, m.data); err != nil {
			return fmt.Errorf("mount %s on %s: %w", m.fstype, m.target, err)
		}
	}
	return nil
}

// agentPath is where the agent lies in the real root.
const agentPath = "/run/agent"

// enterRoot is what an initramfs does: the root is a tmpfs over the EROFS of the disk
// called root.
func enterRoot() error {
	if err := mountAll([]mount{
		{"proc", "/proc", "proc", 0, ""},
		{"sysfs", "/sys", "sysfs", 0, ""},
		{"devtmpfs", "/dev", "devtmpfs", 0, ""},
	}); err != nil {
		return err
	}
	modules, err := filepath.Glob("/modules/*.ko")
	if err != nil {
		return err
	}
	sort.Strings(modules) // their names begin with a number
	for _, m := range modules {
		if err := loadModule(m); err != nil {
			return fmt.Errorf("load %s: %w", m, err)
		}
	}
	root, err := disk("root")
	if err != nil {
		return err
	}
	if err := mountAll([]mount{
		{root, "/ro", "erofs", unix.MS_RDONLY, ""},
		{"tmpfs", "/rw", "tmpfs", 0, ""},
	}); err != nil {
		return err
	}
	for _, d := range []string{"/rw/upper", "/rw/work"} {
		if err := os.Mkdir(d, 0o755); err != nil {
			return err
		}
	}
	if err := mountAll([]mount{
		{"overlay", "/new", "overlay", 0, "lowerdir=/ro,upperdir=/rw/upper,workdir=/rw/work"},
		{"tmpfs", "/new/run", "tmpfs", 0, "mode=755"},
		{"tmpfs", "/new/tmp", "tmpfs", 0, "mode=1777"},
	}); err != nil {
		return err
	}
	if err := copyFile("/new"+agentPath, "/proc/self/exe"); err != nil {
		return err
	}
	for _, d := range []string{"/dev", "/proc", "/sys"} {
		if err := unix.Mount(d, "/new"+d, "", unix.MS_MOVE, ""); err != nil {
			return fmt.Errorf("move %s: %w", d, err)
		}
	}
	if err := errors.Join(os.Chdir("/new"), unix.Mount(".", "/", "", unix.MS_MOVE, ""), unix.Chroot("."), os.Chdir("/")); err != nil {
		return fmt.Errorf("change root: %w", err)
	}
	env := []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LC_ALL=C", "TERM=dumb", "BASH_ENV=" + functionsPath}
	return unix.Exec(agentPath, []string{agentPath, "init"}, env)
}

func loadModule(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.FinitModule(int(f.Fd()), "", 0); err != nil && err != unix.EEXIST {
		return err
	}
	return nil
}

func copyFile(to, from string) error {
	r, err := os.Open(from)
	if err != nil {
		return err
	}
	defer r.Close()
	w, err := os.OpenFile(to, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o755)
	if err != nil {
		return err
	}
	_, err = io.Copy(w, r)
	return errors.Join(err, w.Close())
}

// disk finds a virtio disk by the serial number that the driver gave it.
func disk(serial string) (string, error) {
	paths, err := filepath.Glob("/sys/block/vd*/serial")
	if err != nil {
		return "", err
	}
	for _, p := range paths {
		text, err := os.ReadFile(p)
		if err == nil && strings.TrimSpace(string(text)) == serial {
			return "/dev/" + filepath.Base(filepath.Dir(p)), nil
		}
	}
	return "", fmt.Errorf("no disk %q among %v", serial, paths)
}

// option returns the value of name=value of the kernel's command line.
func option(name string) string {
	text, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return ""
	}
	for _, word := range strings.Fields(string(text)) {
		if value, ok := strings.CutPrefix(word, "guest."+name+"="); ok {
			return value
		}
	}
	return ""
}

// functions are known to every script of bash, by BASH_ENV.
//
//go:embed guest.sh
var functions []byte

const functionsPath = "/run/guest.sh"

// setUp does what an init system does.
func setUp() error {
	if err := os.WriteFile(functionsPath, functions, 0o644); err != nil {
		return err
	}
	if err := mountAll([]mount{
		{"devpts", "/dev/pts", "devpts", 0, ""},
		{"tmpfs", "/dev/shm", "tmpfs", 0, "mode=1777"},
		{"cgroup2", "/sys/fs/cgroup", "cgroup2", 0, ""},
	}); err != nil {
		return err
	}
	if modules := option("modules"); modules != "" {
		if err := run("", "modprobe", append([]string{"-a"}, strings.Split(modules, ",")...)...); err != nil {
			return err
		}
	}
	if err := unix.Sethostname([]byte("guest")); err != nil {
		return err
	}
	// The addresses are those of QEMU's user networking.
	if err := run("link set lo up\nlink set eth0 up\naddr add 10.0.2.15/24 dev eth0\nroute add default via 10.0.2.2\n", "ip", "-batch", "-"); err != nil {
		return err
	}
	// Containers get memory and pids limits only from what the root passes on.
	if err := os.WriteFile("/sys/fs/cgroup/cgroup.subtree_control", []byte("+cpu +memory +pids"), 0); err != nil {
		return err
	}
	if err := nameDisks(); err != nil {
		return err
	}
	for _, m := range []mount{
		{"host", "/host", "erofs", unix.MS_RDONLY, ""},
		{"scratch", "/scratch", "ext4", unix.MS_NOATIME, ""},
	} {
		device, err := disk(m.source)
		if err != nil {
			continue // the driver gave none
		}
		m.source = device
		if err := mountAll([]mount{m}); err != nil {
			return err
		}
	}
	return nil
}

// nameDisks makes /dev/disk/NAME for every disk that the driver named.
func nameDisks() error {
	if err := os.MkdirAll("/dev/disk", 0o755); err != nil {
		return err
	}
	paths, err := filepath.Glob("/sys/block/vd*/serial")
	if err != nil {
		return err
	}
	for _, p := range paths {
		text, err := os.ReadFile(p)
		if err != nil {
			return err
		}
		if err := os.Symlink("/dev/"+filepath.Base(filepath.Dir(p)), "/dev/disk/"+strings.TrimSpace(string(text))); err != nil {
			return err
		}
	}
	return nil
}

func run(input, name string, args ...string) error {
	c := exec.Command(name, args...)
	c.Stdin = strings.NewReader(input)
	if out, err := c.CombinedOutput(); err != nil {
		return fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, out)
	}
	return nil
}
