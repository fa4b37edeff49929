package guest

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sort"
	"strings"

	"github.com/thaw-project/thaw/e2e/recipe"
)

// kernels are the packages of the kernel wanted, best first: a release has the one
// name or the other.
var kernels = []string{"linux-image-6.12-amd64", "linux-image-amd64"}

// packages are what the guest's root file system holds besides the kernel, with all
// that they depend on.
var packages = []string{
	"base-files", "base-passwd", "bash", "busybox-static", "ca-certificates", "containerd", "coreutils", "dash", "diffutils",
	"dmsetup", "e2fsprogs", "erofs-utils", "findutils", "fio", "gawk", "grep", "hostname", "iproute2", "jq", "kmod", "mount",
	"nbd-client", "netbase", "nvme-cli", "procps", "rdma-core", "runc", "sed", "strace", "tar", "util-linux",
}

// modules are the kernel's modules that the guest can load, with those that they need.
var modules = []string{
	"9p", "9pnet_virtio", "br_netfilter", "brd", "bridge", "configfs", "crc32-pclmul", "crc32_generic", "crc32c-intel",
	"crc32c_generic", "dm-crypt", "dm-delay", "dm-flakey", "dm-mod", "dm-snapshot", "dm-thin-pool", "dm-verity", "dummy",
	"erofs", "ext4", "fuse", "ib_uverbs", "ip_tables", "loop", "nbd", "nf_tables", "null_blk", "nvme", "nvme-loop", "nvme-rdma",
	"nvme-tcp", "nvmet", "nvmet-rdma", "nvmet-tcp", "overlay", "rdma_rxe", "rdma_ucm", "sch_tbf", "sch_netem", "sd_mod", "squashfs",
	"ublk_drv", "veth", "vhost_vdpa", "virtio_blk", "virtio_net", "virtio_rng", "virtio_scsi", "vsock", "xfs",
}

// bootModules are those that the agent loads before there is a root file system.
var bootModules = []string{"virtio_blk", "virtio_net", "erofs", "overlay"}

// imageVersion is part of the cache key: raise it when the code below changes what it
// makes.
const imageVersion = "1"

// Image is what a guest boots from.
type Image struct {
	Kernel string // a bzImage
	Initrd string // a cpio archive with modules; the agent is added at each start
	Root   string // an EROFS file system
	Key    string // names the versions of packages it was made of
}

// BuildImage makes the image in folder cache, or finds it there. It needs root, and the
// packages that "tools/install-deps guest" installs.
func BuildImage(ctx context.Context, cache string) (Image, error) {
	kernel, key, err := imageKey(ctx)
	if err != nil {
		return Image{}, err
	}
	// mmdebstrap wants absolute paths.
	if cache, err = filepath.Abs(cache); err != nil {
		return Image{}, err
	}
	dir := filepath.Join(cache, key)
	image := Image{Kernel: filepath.Join(dir, "vmlinuz"), Initrd: filepath.Join(dir, "initrd"), Root: filepath.Join(dir, "root.erofs"), Key: key}
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return Image{}, err
	}
	lock, err := os.OpenFile(filepath.Join(cache, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return Image{}, err
	}
	defer lock.Close()
	if err := wait(ctx, lock); err != nil {
		return Image{}, err
	}
	if _, err := os.Stat(dir); err == nil {
		return image, nil
	}
	// Older images will not be asked for again. A guest that runs from one keeps its
	// open file.
	entries, err := os.ReadDir(cache)
	if err != nil {
		return Image{}, err
	}
	for _, e := range entries {
		if e.IsDir() {
			if err := os.RemoveAll(filepath.Join(cache, e.Name())); err != nil {
				return Image{}, err
			}
		}
	}
	work := dir + ".new"
	if err := build(ctx, work, kernel); err != nil {
		return Image{}, fmt.Errorf("build guest image: %w", errors.Join(err, os.RemoveAll(work)))
	}
	return image, os.Rename(work, dir)
}

// imageKey chooses the kernel and names the image after everything that decides what
// is in it.
func imageKey(ctx context.Context) (kernel, key string, err error) {
	versions, err := candidates(ctx, append(append([]string{}, kernels...), packages...))
	if err != nil {
		return "", "", err
	}
	for _, k := range kernels {
		if versions[k] != "" {
			kernel = k
			break
		}
	}
	if kernel == "" {
		return "", "", fmt.Errorf("apt knows none of the kernels %s: run apt-get update", strings.Join(kernels, ", "))
	}
	h := sha256.New()
	fmt.Fprintln(h, imageVersion, modules, bootModules, kernel, versions[kernel])
	for _, p := range packages {
		fmt.Fprintln(h, p, versions[p])
	}
	return kernel, hex.EncodeToString(h.Sum(nil)[:12]), nil
}

// candidates returns which version apt would install of each package; none for those
// that it does not know.
func candidates(ctx context.Context, names []string) (map[string]string, error) {
	out, err := exec.CommandContext(ctx, "apt-cache", append([]string{"policy"}, names...)...).Output()
	if err != nil {
		return nil, fmt.Errorf("ask apt for versions: %w", err)
	}
	versions := map[string]string{}
	var name string
	for line := range strings.Lines(string(out)) {
		line = strings.TrimRight(line, "\n")
		if version, ok := strings.CutPrefix(line, "  Candidate: "); ok && version != "(none)" {
			versions[name] = version
		} else if !strings.HasPrefix(line, " ") {
			name = strings.TrimSuffix(line, ":")
		}
	}
	return versions, nil
}

// build makes an image in folder work.
func build(ctx context.Context, work, kernel string) error {
	if os.Getuid() != 0 {
		return errors.New("not root: mmdebstrap must make files of other owners")
	}
	if err := os.RemoveAll(work); err != nil {
		return err
	}
	root := filepath.Join(work, "root")
	if err := os.MkdirAll(root, 0o755); err != nil {
		return err
	}
	if err := recipe.Extract(ctx, root, append([]string{kernel}, packages...)); err != nil {
		return err
	}
	found, err := filepath.Glob(filepath.Join(root, "boot/vmlinuz-*"))
	if err != nil || len(found) != 1 {
		return fmt.Errorf("package %s brings the kernels %v, not one: %w", kernel, found, err)
	}
	release := strings.TrimPrefix(filepath.Base(found[0]), "vmlinuz-")
	if err := os.Rename(found[0], filepath.Join(work, "vmlinuz")); err != nil {
		return err
	}
	if err := takeModules(ctx, root, release, filepath.Join(work, "initrd")); err != nil {
		return err
	}
	if err := configure(ctx, root); err != nil {
		return err
	}
	if err := command(ctx, "mkfs.erofs", "--quiet", "-x-1", filepath.Join(work, "root.erofs"), root); err != nil {
		return err
	}
	return os.RemoveAll(root)
}

// takeModules leaves the wanted modules in the root, decompressed since a guest is slow
// at that, and writes those needed for booting to a cpio archive.
func takeModules(ctx context.Context, root, release, archive string) error {
	if err := command(ctx, "depmod", "-b", root, release); err != nil {
		return err
	}
	keep := map[string]bool{}
	all, err := withDependencies(ctx, root, release, modules)
	if err != nil {
		return err
	}
	for _, path := range all {
		keep[path] = true
	}
	boot, err := withDependencies(ctx, root, release, bootModules)
	if err != nil {
		return err
	}
	tree := filepath.Join(root, "lib/modules", release, "kernel")
	if err := filepath.WalkDir(tree, func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() || keep[path] {
			return err
		}
		return os.Remove(path)
	}); err != nil {
		return err
	}
	var compressed []string
	for path := range keep {
		if strings.HasSuffix(path, ".xz") {
			compressed = append(compressed, path)
		}
	}
	if len(compressed) > 0 {
		sort.Strings(compressed)
		if err := command(ctx, "xz", append([]string{"-d"}, compressed...)...); err != nil {
			return err
		}
	}
	if err := command(ctx, "depmod", "-b", root, release); err != nil {
		return err
	}
	var c cpio
	c.dir("modules")
	for i, path := range boot {
		path = strings.TrimSuffix(path, ".xz")
		content, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		c.file(fmt.Sprintf("modules/%02d-%s", i, filepath.Base(path)), 0o644, content)
	}
	c.dir("dev")
	c.device("dev/console", 5, 1)
	return os.WriteFile(archive, c.end(), 0o644)
}

// withDependencies returns the files of modules and of what they need, in the order
// to load them. What is built into the kernel has none.
func withDependencies(ctx context.Context, root, release string, names []string) ([]string, error) {
	var files []string
	seen := map[string]bool{}
	for _, name := range names {
		out, err := exec.CommandContext(ctx, "modprobe", "-d", root, "-S", release, "--show-depends", name).Output()
		if err != nil {
			return nil, fmt.Errorf("the kernel %s has no module %s: %w", release, name, err)
		}
		for line := range strings.Lines(string(out)) {
			f := strings.Fields(line)
			if len(f) < 2 || f[0] != "insmod" {
				continue
			}
			// Through the real path: /lib of the root is a link.
			path := filepath.Join(root, "lib/modules", release, f[1][strings.Index(f[1], "/kernel/"):])
			if !seen[path] {
				seen[path] = true
				files = append(files, path)
			}
		}
	}
	return files, nil
}

// configure does the little that packages' own scripts would have done.
func configure(ctx context.Context, root string) error {
	for path, content := range map[string]string{
		"etc/passwd":        "root:x:0:0:root:/root:/bin/bash\nnobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n",
		"etc/group":         "root:x:0:\nnogroup:x:65534:\n",
		"etc/hostname":      "guest\n",
		"etc/hosts":         "127.0.0.1 localhost\n10.0.2.15 guest\n10.0.2.2 host\n",
		"etc/resolv.conf":   "nameserver 10.0.2.3\n",
		"etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
		"etc/nvme/hostnqn":  HostNQN + "\n",
		"etc/nvme/hostid":   HostID + "\n",
		"etc/machine-id":    strings.ReplaceAll(HostID, "-", "") + "\n",
		"etc/ld.so.conf":    "include /etc/ld.so.conf.d/*.conf\n",
	} {
		full := filepath.Join(root, path)
		if err := errors.Join(os.MkdirAll(filepath.Dir(full), 0o755), os.WriteFile(full, []byte(content), 0o644)); err != nil {
			return err
		}
	}
	if err := os.Symlink("/proc/self/mounts", filepath.Join(root, "etc/mtab")); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	for _, d := range []string{"host", "scratch", "run", "tmp", "proc", "sys", "dev", "mnt"} {
		if err := os.MkdirAll(filepath.Join(root, d), 0o755); err != nil {
			return err
		}
	}
	for _, d := range []string{"usr/share/doc", "usr/share/man", "usr/share/locale", "var/cache/apt", "var/lib/apt"} {
		if err := os.RemoveAll(filepath.Join(root, d)); err != nil {
			return err
		}
	}
	if err := command(ctx, "ldconfig", "-r", root); err != nil {
		return err
	}
	// What has no package of its own comes from busybox.
	out, err := exec.CommandContext(ctx, filepath.Join(root, "bin/busybox"), "--list").Output()
	if err != nil {
		return fmt.Errorf("busybox --list: %w", err)
	}
	local := filepath.Join(root, "usr/local/bin")
	if err := os.MkdirAll(local, 0o755); err != nil {
		return err
	}
	for _, applet := range strings.Fields(string(bytes.ToValidUTF8(out, nil))) {
		if hasProgram(root, applet) || strings.Contains(applet, "/") {
			continue
		}
		if err := os.Symlink("/bin/busybox", filepath.Join(local, applet)); err != nil {
			return err
		}
	}
	return nil
}

func hasProgram(root, name string) bool {
	for _, d := range []string{"usr/bin", "usr/sbin"} {
		if _, err := os.Lstat(filepath.Join(root, d, name)); err == nil {
			return true
		}
	}
	return false
}

// command runs a program; an error holds the end of what it printed.
func command(ctx context.Context, name string, args ...string) error {
	c := exec.CommandContext(ctx, name, args...)
	c.Env = append(os.Environ(), "PATH="+os.Getenv("PATH")+":/usr/sbin:/sbin", "LC_ALL=C.UTF-8")
	out, err := c.CombinedOutput()
	if err != nil {
		out = bytes.TrimSpace(out)
		return fmt.Errorf("%s: %w:\n%s", name, err, out[max(0, len(out)-2000):])
	}
	return nil
}
