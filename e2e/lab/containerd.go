package lab

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/client"
)

// Containerd is a containerd with folders of its own.
type Containerd struct {
	Socket string
	Root   string
	State  string
	Client *client.Client
	*Process

	lab  *Lab
	name string
	args []string
	env  []string
}

// ContainerdOptions say how a containerd runs.
type ContainerdOptions struct {
	// Thaw, when set, is added as the proxy snapshotter "thaw".
	Thaw *Thaw

	// BinDir holds another containerd with its shim, as Old returns; empty for
	// the lab's own.
	BinDir string

	// CRI keeps the Kubernetes services enabled, with Thaw as their snapshotter,
	// and Sandbox as the image of pods' sandboxes. LocalPull has them pull without
	// the transfer service.
	CRI       bool
	Sandbox   string
	LocalPull bool
}

// Namespace is the containerd namespace that everything in a lab uses.
const Namespace = "lab"

// StartContainerd starts containerd with empty folders and waits until it serves.
func (l *Lab) StartContainerd(ctx context.Context, o ContainerdOptions) (*Containerd, error) {
	bin := o.BinDir
	if bin == "" {
		bin = l.Bin
	}
	program := filepath.Join(bin, "containerd")
	if !fileExists(program) {
		return nil, fmt.Errorf("%s is missing: run make tools", program)
	}
	name := fmt.Sprintf("c%d", labNumber.Add(1))
	configFile, err := l.Path(name, "config.toml")
	if err != nil {
		return nil, err
	}
	dir := filepath.Dir(configFile)
	c := &Containerd{
		Socket: filepath.Join(dir, "c.sock"),
		Root:   filepath.Join(dir, "root"),
		State:  filepath.Join(dir, "state"),
		lab:    l, name: name,
		args: []string{program, "--config", configFile},
		// The first shim found in PATH is the one that is started.
		env: []string{"PATH=" + bin + ":" + os.Getenv("PATH") + ":/usr/sbin:/sbin"},
	}
	old, err := isOld(ctx, program)
	if err != nil {
		return nil, err
	}
	if err := os.WriteFile(configFile, []byte(c.configText(o, old)), 0o600); err != nil {
		return nil, err
	}
	if err := c.start(ctx); err != nil {
		return nil, err
	}
	return c, nil
}

func (c *Containerd) configText(o ContainerdOptions, old bool) string {
	var b strings.Builder
	disabled := []string{
		"io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs",
		"io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.blockfile",
		"io.containerd.nri.v1.nri", "io.containerd.tracing.processor.v1.otlp",
	}
	if !o.CRI {
		disabled = append(disabled, "io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime", "io.containerd.grpc.v1.cri")
	}
	version := 3
	if old {
		version = 2
	}
	fmt.Fprintf(&b, "version = %d\nroot = %q\nstate = %q\n", version, c.Root, c.State)
	fmt.Fprintf(&b, "disabled_plugins = [%s]\n", quoted(disabled))
	fmt.Fprintf(&b, "[grpc]\n  address = %q\n[ttrpc]\n  address = %q\n", c.Socket, c.Socket+".ttrpc")
	if o.Thaw != nil {
		fmt.Fprintf(&b, "[proxy_plugins.thaw]\n  type = \"snapshot\"\n  address = %q\n", o.Thaw.SnapshotterSocket())
		if !old {
			fmt.Fprintf(&b, "  [proxy_plugins.thaw.exports]\n    root = %q\n    enable_remote_snapshot_annotations = \"true\"\n", filepath.Join(o.Thaw.Root, "snapshotter"))
		}
	}
	if !old {
		b.WriteString("[plugins.\"io.containerd.transfer.v1.local\"]\n")
		snapshotters := []string{"overlayfs"}
		if o.Thaw != nil {
			snapshotters = append(snapshotters, "thaw")
		}
		for _, s := range snapshotters {
			fmt.Fprintf(&b, "  [[plugins.\"io.containerd.transfer.v1.local\".unpack_config]]\n    platform = \"linux\"\n    snapshotter = %q\n", s)
		}
	}
	if o.CRI {
		fmt.Fprintf(&b, criConfig, o.LocalPull, o.Sandbox)
	}
	return b.String()
}

// criConfig is what CRI needs where a process may not lower its OOM score.
const criConfig = `[plugins."io.containerd.cri.v1.runtime"]
  restrict_oom_score_adj = true
  disable_apparmor = true
[plugins."io.containerd.cri.v1.images"]
  snapshotter = "thaw"
  disable_snapshot_annotations = false
  use_local_image_pull = %t
  [plugins."io.containerd.cri.v1.images".pinned_images]
    sandbox = %q
`

func quoted(values []string) string {
	q := make([]string, len(values))
	for i, v := range values {
		q[i] = fmt.Sprintf("%q", v)
	}
	return strings.Join(q, ", ")
}

func isOld(ctx context.Context, program string) (bool, error) {
	path, err := filepath.EvalSymlinks(program)
	if err != nil {
		return false, err
	}
	l := &Lab{Dir: filepath.Dir(path)}
	out, err := l.Command(ctx, program, "--version").Output()
	if err != nil {
		return false, fmt.Errorf("%s --version: %w", program, err)
	}
	fields := strings.Fields(string(out))
	return len(fields) > 2 && strings.HasPrefix(strings.TrimPrefix(fields[2], "v"), "1."), nil
}

func (c *Containerd) start(ctx context.Context) error {
	process, err := c.lab.Start(Spec{Name: c.name, Args: c.args, Env: c.env})
	if err != nil {
		return err
	}
	c.Process = process
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	err = poll(ctx, 20*time.Millisecond, process.alive, func(ctx context.Context) error {
		if !fileExists(c.Socket) {
			return fmt.Errorf("%s is not there yet", c.Socket)
		}
		cl, err := client.New(c.Socket, client.WithDefaultNamespace(Namespace), client.WithTimeout(2*time.Second))
		if err != nil {
			return err
		}
		if serving, err := cl.IsServing(ctx); err != nil || !serving {
			cl.Close()
			return fmt.Errorf("not serving yet: %w", err)
		}
		c.Client = cl
		return nil
	})
	if err != nil {
		return fmt.Errorf("start containerd: %w", err)
	}
	return nil
}

// KillAndRestart ends containerd with SIGKILL and starts it again on the same
// folders.
func (c *Containerd) KillAndRestart(ctx context.Context) error {
	c.Client.Close()
	c.Process.Kill()
	return c.start(ctx)
}

// Start starts a killed containerd again. Until then calls of the dead one's client
// fail; afterwards Client is a new one.
func (c *Containerd) Start(ctx context.Context) error {
	c.Client.Close()
	return c.start(ctx)
}

// Stop ends containerd; containers and their shims go on.
func (c *Containerd) Stop() error {
	if c.Client != nil {
		c.Client.Close()
	}
	return c.Process.Stop()
}

// Old returns a folder with the containerd and shim of Debian's package, fetched and
// unpacked once below cacheDir and not installed.
func (l *Lab) Old(ctx context.Context, cacheDir string) (string, error) {
	dir := filepath.Join(cacheDir, "debian-containerd")
	bin := filepath.Join(dir, "usr/bin")
	if fileExists(filepath.Join(bin, "containerd")) {
		return bin, nil
	}
	download, err := l.Path("debian", "x")
	if err != nil {
		return "", err
	}
	download = filepath.Dir(download)
	get := l.Command(ctx, "apt-get", "-q", "download", "containerd")
	get.Dir = download
	if out, err := get.CombinedOutput(); err != nil {
		return "", fmt.Errorf("apt-get download containerd: %w: %s", err, out)
	}
	packages, err := filepath.Glob(filepath.Join(download, "containerd_*.deb"))
	if err != nil || len(packages) != 1 {
		return "", fmt.Errorf("apt-get download containerd left %d packages", len(packages))
	}
	if err := os.MkdirAll(cacheDir, 0o755); err != nil {
		return "", err
	}
	unpacked := dir + ".new"
	_ = os.RemoveAll(unpacked)
	if out, err := l.Command(ctx, "dpkg-deb", "-x", packages[0], unpacked).CombinedOutput(); err != nil {
		return "", fmt.Errorf("dpkg-deb -x: %w: %s", err, out)
	}
	return bin, os.Rename(unpacked, dir)
}
