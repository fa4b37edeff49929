// Package recipe builds real OCI images from Debian packages, layer by layer, and
// keeps finished layers in a cache, so that images with common steps share layers and
// a second run builds nothing.
//
// It knows Debian and overlayfs and must know nothing of Thaw: what it makes is what
// any builder would.
package recipe

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/containerd/v2/pkg/archive"
	"github.com/containerd/continuity/fs"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/klauspost/compress/gzip"
	"golang.org/x/sys/unix"
)

// Step is one layer. Exactly one of Bootstrap, Install, Script or Files is set.
type Step struct {
	Comment   string
	Bootstrap []string          `json:",omitempty"` // a new Debian with these packages; only as first step
	Install   []string          `json:",omitempty"` // packages added
	Script    string            `json:",omitempty"` // shell commands run in the tree
	Files     map[string]string `json:",omitempty"` // path to content; mode 0755 where it starts with #!, else 0644
}

// Recipe is an image.
type Recipe struct {
	Name  string
	Steps []Step
	Env   []string
	Cmd   []string
}

// version is part of every cache key: raise it when the code below changes what a
// step gives.
const version = "1"

// keys returns the cache key of each step, which covers all steps below it.
func (r Recipe) keys() ([]string, error) {
	key := version
	keys := make([]string, len(r.Steps))
	for i, s := range r.Steps {
		text, err := json.Marshal(s)
		if err != nil {
			return nil, err
		}
		sum := sha256.Sum256([]byte(key + "\n" + string(text)))
		key = hex.EncodeToString(sum[:12])
		keys[i] = key
	}
	return keys, nil
}

// Builder builds recipes.
type Builder struct {
	Cache string    // folder of finished layers; survives between runs
	Log   io.Writer // a line per layer built; nil for none
}

// Build returns the image, whose layers are files of the cache.
func (b *Builder) Build(ctx context.Context, r Recipe) (v1.Image, error) {
	keys, err := r.keys()
	if err != nil {
		return nil, err
	}
	// apt-get and mount want absolute paths.
	cache, err := filepath.Abs(b.Cache)
	if err != nil {
		return nil, err
	}
	b = &Builder{Cache: cache, Log: b.Log}
	if err := os.MkdirAll(b.Cache, 0o755); err != nil {
		return nil, err
	}
	// One builder at a time per cache: a second one finds everything done.
	lock, err := os.OpenFile(filepath.Join(b.Cache, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		return nil, err
	}

	image := mutate.MediaType(empty.Image, types.OCIManifestSchema1)
	image = mutate.ConfigMediaType(image, types.OCIConfigJSON)
	var below []string
	for i, step := range r.Steps {
		dir := filepath.Join(b.Cache, keys[i])
		if _, err := os.Stat(dir); err != nil {
			start := time.Now()
			if err := b.buildLayer(ctx, dir, step, below); err != nil {
				return nil, fmt.Errorf("build layer %d of image %s (%s): %w", i, r.Name, step.Comment, err)
			}
			b.logf("built layer %d of %s (%s) in %.1f s", i, r.Name, step.Comment, time.Since(start).Seconds())
		}
		below = append(below, filepath.Join(dir, "tree"))
		layer, err := tarball.LayerFromFile(filepath.Join(dir, "layer.tar.gz"), tarball.WithMediaType(types.OCILayer))
		if err != nil {
			return nil, err
		}
		image, err = mutate.Append(image, mutate.Addendum{
			Layer:     layer,
			MediaType: types.OCILayer,
			History:   v1.History{CreatedBy: step.Comment, Created: v1.Time{Time: epoch}},
		})
		if err != nil {
			return nil, err
		}
	}
	config, err := image.ConfigFile()
	if err != nil {
		return nil, err
	}
	config = config.DeepCopy()
	config.OS, config.Architecture = "linux", debianArchitecture()
	config.Created = v1.Time{Time: epoch}
	config.Config.Env = append([]string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}, r.Env...)
	config.Config.Cmd = r.Cmd
	config.Config.WorkingDir = "/"
	return mutate.ConfigFile(image, config)
}

// epoch is when images say they were made, so that a rebuild from the cache has the
// same digest.
var epoch = time.Date(2025, 1, 1, 0, 0, 0, 0, time.UTC)

func (b *Builder) logf(format string, args ...any) {
	if b.Log != nil {
		fmt.Fprintf(b.Log, format+"\n", args...)
	}
}

// buildLayer makes dir with tree (what the step changed, in overlayfs's form) and
// layer.tar.gz.
func (b *Builder) buildLayer(ctx context.Context, dir string, step Step, below []string) error {
	temporary := dir + ".new"
	if err := os.RemoveAll(temporary); err != nil {
		return err
	}
	tree := filepath.Join(temporary, "tree")
	if err := os.MkdirAll(tree, 0o755); err != nil {
		return err
	}
	if len(step.Bootstrap) > 0 {
		if err := bootstrap(ctx, tree, step.Bootstrap); err != nil {
			return err
		}
	} else if err := onOverlay(temporary, below, func(root string) error { return apply(ctx, root, step) }); err != nil {
		return err
	}
	if err := writeLayer(filepath.Join(temporary, "layer.tar.gz"), tree); err != nil {
		return err
	}
	return os.Rename(temporary, dir)
}

// onOverlay calls f with the layers below merged; what f changes goes to dir/tree.
func onOverlay(dir string, below []string, f func(root string) error) (err error) {
	merged, work := filepath.Join(dir, "merged"), filepath.Join(dir, "work")
	for _, d := range []string{merged, work} {
		if err := os.Mkdir(d, 0o755); err != nil {
			return err
		}
	}
	lower := make([]string, len(below))
	for i, d := range below {
		lower[len(below)-1-i] = d // overlayfs wants the topmost first
	}
	// The features that would put anything but plain files into the upper directory
	// are off.
	options := fmt.Sprintf("lowerdir=%s,upperdir=%s,workdir=%s,redirect_dir=off,metacopy=off,index=off",
		strings.Join(lower, ":"), filepath.Join(dir, "tree"), work)
	if err := unix.Mount("overlay", merged, "overlay", 0, options); err != nil {
		return fmt.Errorf("mount overlay to build in: %w", err)
	}
	defer func() {
		err = errors.Join(err, unix.Unmount(merged, unix.MNT_DETACH), os.RemoveAll(work), os.Remove(merged))
	}()
	return f(merged)
}

func apply(ctx context.Context, root string, step Step) error {
	switch {
	case len(step.Install) > 0:
		return install(ctx, root, step.Install)
	case step.Script != "":
		return output(exec.CommandContext(ctx, "chroot", root, "/bin/sh", "-ec", step.Script))
	}
	for path, content := range step.Files {
		full := filepath.Join(root, path)
		if err := os.MkdirAll(filepath.Dir(full), 0o755); err != nil {
			return err
		}
		mode := os.FileMode(0o644)
		if strings.HasPrefix(content, "#!") {
			mode = 0o755
		}
		if err := os.WriteFile(full, []byte(content), mode); err != nil {
			return err
		}
	}
	return nil
}

// sources returns lines for apt's sources.list with the Debian archives that this
// machine uses, so that images come from the mirror it can reach; empty when apt
// knows none.
func sources(ctx context.Context) (lines, release string, err error) {
	out, err := exec.CommandContext(ctx, "apt-get", "indextargets", "--format",
		"$(ORIGIN)|$(CODENAME)|$(REPO_URI)|$(RELEASE)|$(COMPONENT)|$(ARCHITECTURE)", "Created-By: Packages").Output()
	if err != nil {
		return "", "", fmt.Errorf("ask apt for its sources: %w", err)
	}
	seen := map[string]bool{}
	for line := range strings.Lines(string(out)) {
		f := strings.Split(strings.TrimSpace(line), "|")
		if len(f) != 6 || f[0] != "Debian" || f[5] != debianArchitecture() || seen[f[2]+f[3]+f[4]] {
			continue
		}
		seen[f[2]+f[3]+f[4]] = true
		if !strings.Contains(f[1], "-") {
			release = f[1]
		}
		lines += fmt.Sprintf("deb %s %s %s\n", f[2], f[3], f[4])
	}
	return lines, release, nil
}

func debianArchitecture() string {
	out, err := exec.Command("dpkg", "--print-architecture").Output()
	if err != nil {
		return "amd64"
	}
	return strings.TrimSpace(string(out))
}

// aptOptions are this machine's settings for how apt downloads, such as a proxy.
func aptOptions(ctx context.Context) ([]string, error) {
	out, err := exec.CommandContext(ctx, "apt-config", "dump", "Acquire").Output()
	if err != nil {
		return nil, fmt.Errorf("ask apt for its configuration: %w", err)
	}
	var options []string
	for line := range strings.Lines(string(out)) {
		line = strings.TrimSuffix(strings.TrimSpace(line), ";")
		for _, key := range []string{"Acquire::Check-", "Acquire::http::", "Acquire::https::", "Acquire::Retries "} {
			if strings.HasPrefix(line, key) && !strings.HasSuffix(line, `""`) {
				options = append(options, line)
			}
		}
	}
	return options, nil
}

func bootstrap(ctx context.Context, tree string, packages []string) error {
	if err := mmdebstrap(ctx, tree, packages, "--variant=minbase"); err != nil {
		return err
	}
	return plain(tree)
}

// Extract unpacks Debian packages and what they depend on into tree, from the archives
// that this machine's apt uses, and runs none of their scripts. Needs root.
func Extract(ctx context.Context, tree string, packages []string) error {
	return mmdebstrap(ctx, tree, packages, "--variant=extract", "--hook-dir=/usr/share/mmdebstrap/hooks/merged-usr")
}

func mmdebstrap(ctx context.Context, tree string, packages []string, how ...string) error {
	lines, release, err := sources(ctx)
	if err != nil {
		return err
	}
	if release == "" {
		release = "bookworm"
	}
	options, err := aptOptions(ctx)
	if err != nil {
		return err
	}
	args := append([]string{"--quiet", "--mode=root", "--include=" + strings.Join(packages, ",")}, how...)
	for _, o := range options {
		args = append(args, "--aptopt="+o)
	}
	args = append(args, release, tree)
	if lines != "" {
		args = append(args, "-")
	}
	c := exec.CommandContext(ctx, "mmdebstrap", args...)
	c.Stdin = strings.NewReader(lines)
	return output(c)
}

// install runs the host's apt against the tree, which needs no network, keys or
// /proc inside.
func install(ctx context.Context, root string, packages []string) error {
	options, err := aptOptions(ctx)
	if err != nil {
		return err
	}
	base := []string{"-q", "-y", "--no-install-recommends",
		"-o", "Dir=" + root, "-o", "DPkg::Chroot-Directory=" + root, "-o", "Dpkg::Use-Pty=0",
		"-o", "Dir::Log=/dev/null", "-o", "APT::Sandbox::User=root"}
	for _, o := range options {
		key, value, _ := strings.Cut(o, " ")
		base = append(base, "-o", key+"="+strings.Trim(value, `"`))
	}
	for _, args := range [][]string{{"update"}, append([]string{"install"}, packages...)} {
		c := exec.CommandContext(ctx, "apt-get", append(append([]string{}, base...), args...)...)
		c.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive", "LC_ALL=C.UTF-8", "APT_CONFIG=/dev/null")
		if err := output(c); err != nil {
			return err
		}
	}
	return plain(root)
}

// plain removes apt's downloads and lists, as image builders do.
func plain(root string) error {
	for _, pattern := range []string{"var/cache/apt/archives/*.deb", "var/cache/apt/*.bin", "var/lib/apt/lists/*", "var/log/apt/*", "var/log/dpkg.log"} {
		paths, err := filepath.Glob(filepath.Join(root, pattern))
		if err != nil {
			return err
		}
		for _, p := range paths {
			if err := os.RemoveAll(p); err != nil {
				return err
			}
		}
	}
	return nil
}

// output runs a command; an error holds the end of what it printed.
func output(c *exec.Cmd) error {
	out, err := c.CombinedOutput()
	if err != nil {
		out = bytes.TrimSpace(out)
		if len(out) > 2000 {
			out = out[len(out)-2000:]
		}
		return fmt.Errorf("%s: %w:\n%s", c.Args[0], err, out)
	}
	return nil
}

// writeLayer writes tree, in overlayfs's form, as a gzip layer in OCI's form.
func writeLayer(path, tree string) (err error) {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	z := gzip.NewWriter(f)
	cw := archive.NewChangeWriter(z, tree)
	if err := changes(tree, cw.HandleChange); err != nil {
		return fmt.Errorf("write layer: %w", err)
	}
	if err := cw.Close(); err != nil {
		return err
	}
	return z.Close()
}

// changes reports what an overlayfs upper directory holds as changes. containerd's own
// function for it looks each path up in the directory below, following symbolic links
// out of it.
func changes(tree string, change fs.ChangeFunc) error {
	return filepath.Walk(tree, func(path string, info os.FileInfo, err error) error {
		if err != nil || path == tree {
			return err
		}
		relative := strings.TrimPrefix(path, tree)
		st, ok := info.Sys().(*syscall.Stat_t)
		if !ok {
			return fmt.Errorf("no inode of %s", path)
		}
		if info.Mode()&os.ModeCharDevice != 0 && st.Rdev == 0 {
			return change(fs.ChangeKindDelete, relative, nil, nil)
		}
		if err := change(fs.ChangeKindAdd, relative, info, nil); err != nil || !info.IsDir() {
			return err
		}
		var value [1]byte
		if n, err := unix.Lgetxattr(path, "trusted.overlay.opaque", value[:]); err == nil && n == 1 && value[0] == 'y' {
			// The writer puts ".wh." before the name: an opaque whiteout.
			return change(fs.ChangeKindDelete, filepath.Join(relative, ".wh..opq"), nil, nil)
		}
		return nil
	})
}

// Unpacked returns how many bytes of files the image's layers hold.
func Unpacked(image v1.Image) (total int64, err error) {
	layers, err := image.Layers()
	if err != nil {
		return 0, err
	}
	for _, l := range layers {
		r, err := l.Uncompressed()
		if err != nil {
			return 0, err
		}
		tr := tar.NewReader(r)
		for {
			h, err := tr.Next()
			if err == io.EOF {
				break
			}
			if err != nil {
				return 0, errors.Join(err, r.Close())
			}
			total += h.Size
		}
		if err := r.Close(); err != nil {
			return 0, err
		}
	}
	return total, nil
}

// Compressed returns the size of the image's layers as a registry holds them.
func Compressed(image v1.Image) (total int64, err error) {
	layers, err := image.Layers()
	if err != nil {
		return 0, err
	}
	for _, l := range layers {
		n, err := l.Size()
		if err != nil {
			return 0, err
		}
		total += n
	}
	return total, nil
}
