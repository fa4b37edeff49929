// Package doctor looks at a machine and says whether Thaw can run on it, and what to
// do where it cannot. It changes nothing and knows nothing of Thaw's state.
package doctor

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net"
	"net/http"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"time"

	introspectionapi "github.com/containerd/containerd/api/services/introspection/v1"
	versionapi "github.com/containerd/containerd/api/services/version/v1"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/types/known/emptypb"
)

// State is the outcome of one check.
type State string

// The states. Only Fail keeps Thaw from working; None is what is not there and need not
// be.
const (
	OK   State = "ok"
	None State = "none"
	Warn State = "warn"
	Fail State = "fail"
)

// Finding is the outcome of one check with what to do about it.
type Finding struct {
	Check  string `json:"check"`
	State  State  `json:"state"`
	Detail string `json:"detail"`
	Advice string `json:"advice,omitempty"`
}

// Options says where to look.
type Options struct {
	Root, Run string
	// MetricsSockets are those of the processes that should run here, by name.
	MetricsSockets    map[string]string
	SnapshotterSocket string
	ContainerdSocket  string
	// Snapshotter is the plugin's name in containerd's configuration.
	Snapshotter string
	// Presentations has for each presentation (choose.Names) that this program has nil,
	// or why it cannot be used here. Nil is a machine that shows no disks itself, which leaves
	// them and FUSE out.
	Presentations map[string]error
	// PresentationDetails says more of those that can be used.
	PresentationDetails map[string]string
	// Force is the presentation that the configuration asks for, if any.
	Force string
}

// Examine runs all checks in the order an operator would fix them.
func Examine(ctx context.Context, o Options) []Finding {
	checks := []func(context.Context, Options) Finding{
		privileges, kernel, filesystem("overlay"), filesystem("erofs"), filesystem("ext4"), loop,
		tool("mkfs.ext4", "e2fsprogs", "to convert with --filesystem ext4"), disk(func(o Options) string { return o.Root }), runDir,
	}
	if o.Presentations != nil {
		checks = slices.Insert(checks, 2, fuseDevice)
	}
	for _, name := range slices.Sorted(maps.Keys(o.MetricsSockets)) {
		checks = append(checks, process(name, o.MetricsSockets[name]))
	}
	checks = append(checks, containerd)
	findings := make([]Finding, 0, len(checks))
	for _, check := range checks {
		findings = append(findings, check(ctx, o))
	}
	return append(findings, presentations(o)...)
}

func privileges(context.Context, Options) Finding {
	f := Finding{Check: "privileges", State: OK, Detail: "root with CAP_SYS_ADMIN"}
	if os.Geteuid() != 0 {
		f.State, f.Detail, f.Advice = Fail, fmt.Sprintf("running as uid %d", os.Geteuid()), "run as root: thaw mounts file systems"
		return f
	}
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		f.State, f.Detail = Warn, "capabilities unknown: "+err.Error()
	} else if data[0].Effective&(1<<unix.CAP_SYS_ADMIN) == 0 {
		f.State, f.Detail, f.Advice = Fail, "CAP_SYS_ADMIN is missing", "run outside of an unprivileged container, or grant CAP_SYS_ADMIN"
	}
	return f
}

// release parses "6.18.44-x" as 6, 18.
func release(s string) (major, minor int) {
	parts := strings.SplitN(s, ".", 3)
	if len(parts) < 2 {
		return 0, 0
	}
	major, _ = strconv.Atoi(parts[0])
	digits, _, _ := strings.Cut(parts[1], "-")
	minor, _ = strconv.Atoi(digits)
	return major, minor
}

func kernel(context.Context, Options) Finding {
	f := Finding{Check: "kernel", State: OK}
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		f.State, f.Detail = Warn, "uname: "+err.Error()
		return f
	}
	f.Detail = unix.ByteSliceToString(u.Release[:])
	major, minor := release(f.Detail)
	at := func(a, b int) bool { return major > a || major == a && minor >= b }
	switch {
	case !at(5, 15):
		f.State, f.Advice = Fail, "use Linux 5.15 or newer"
	case !at(6, 9):
		f.State, f.Advice = Warn, "before Linux 6.9 a killed server loses the requests in flight (no FUSE_NOTIFY_RESEND): drain the node before restarting thaw"
	case !at(6, 12):
		f.State, f.Advice = Warn, "before Linux 6.12 EROFS needs a loop device (no file-backed mounts): it works, a little slower"
	}
	return f
}

func fuseDevice(context.Context, Options) Finding {
	f := Finding{Check: "fuse", State: OK, Detail: "/dev/fuse"}
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		f.State, f.Detail, f.Advice = Fail, "open /dev/fuse: "+err.Error(), "load the module (modprobe fuse) or use a kernel with CONFIG_FUSE_FS"
		if errors.Is(err, fs.ErrPermission) {
			f.Advice = "run as root; in a container, pass the device to it"
		}
		return f
	}
	unix.Close(fd)
	return f
}

func filesystem(name string) func(context.Context, Options) Finding {
	return func(context.Context, Options) Finding {
		f := Finding{Check: name, State: OK, Detail: "in /proc/filesystems"}
		raw, err := os.ReadFile("/proc/filesystems")
		if err != nil {
			f.State, f.Detail = Warn, err.Error()
			return f
		}
		for _, line := range bytes.Split(raw, []byte("\n")) {
			if fields := bytes.Fields(line); len(fields) > 0 && string(fields[len(fields)-1]) == name {
				return f
			}
		}
		// The kernel may load the module at the first mount.
		if exec.Command("modprobe", "-n", "-q", name).Run() == nil {
			f.State, f.Detail, f.Advice = Warn, "not loaded yet", "modprobe "+name
			return f
		}
		f.State, f.Detail, f.Advice = Fail, "the kernel has no "+name, "use a kernel with "+name+" or install its module"
		if name == "erofs" {
			f.State, f.Advice = Warn, "images converted with --filesystem erofs will be unpacked the ordinary way on this node; convert with --filesystem ext4"
		}
		return f
	}
}

func loop(context.Context, Options) Finding {
	f := Finding{Check: "loop", State: OK, Detail: "/dev/loop-control"}
	fd, err := unix.Open("/dev/loop-control", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		f.State, f.Detail, f.Advice = Fail, "open /dev/loop-control: "+err.Error(), "modprobe loop"
		return f
	}
	unix.Close(fd)
	return f
}

func tool(name, pkg, why string) func(context.Context, Options) Finding {
	return func(context.Context, Options) Finding {
		path, err := exec.LookPath(name)
		if err != nil {
			return Finding{name, Warn, "not in PATH", "install " + pkg + " " + why}
		}
		return Finding{Check: name, State: OK, Detail: path}
	}
}

func disk(where func(Options) string) func(context.Context, Options) Finding {
	return func(_ context.Context, o Options) Finding {
		f := Finding{Check: "disk", State: OK}
		dir := existing(where(o))
		var st unix.Statfs_t
		if err := unix.Statfs(dir, &st); err != nil {
			f.State, f.Detail = Warn, err.Error()
			return f
		}
		free := uint64(st.Bavail) * uint64(st.Bsize)
		f.Detail = fmt.Sprintf("%d MiB free on %s", free>>20, dir)
		if st.Flags&unix.ST_RDONLY != 0 {
			f.State, f.Advice = Fail, "the file system is read-only: choose another --root"
		} else if free < 1<<30 {
			f.State, f.Advice = Warn, "less than 1 GiB: conversions will run out of space"
		}
		return f
	}
}

// existing returns the nearest ancestor of dir that exists.
func existing(dir string) string {
	for dir != "/" && dir != "." {
		if _, err := os.Stat(dir); err == nil {
			return dir
		}
		dir = dir[:max(strings.LastIndexByte(dir, '/'), 1)]
	}
	return dir
}

const tmpfsMagic = 0x01021994

func runDir(_ context.Context, o Options) Finding {
	f := Finding{Check: "run directory", State: OK}
	dir := existing(o.Run)
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		f.State, f.Detail = Warn, err.Error()
		return f
	}
	f.Detail = dir + " on tmpfs"
	if st.Type != tmpfsMagic {
		f.State, f.Detail = Warn, dir+" is not on tmpfs"
		f.Advice = "what is in it must vanish at a reboot: put --run under /run"
	}
	return f
}

// process asks a process of ours how it is.
func process(name, socket string) func(context.Context, Options) Finding {
	return func(ctx context.Context, _ Options) Finding { return healthy(ctx, name, socket) }
}

func healthy(ctx context.Context, name, socket string) Finding {
	f := Finding{Check: "thaw " + name, State: OK, Detail: "healthy"}
	client := http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", socket)
		},
		DisableKeepAlives: true,
	}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://thaw/healthz", nil)
	if err != nil {
		f.State, f.Detail = Fail, err.Error()
		return f
	}
	resp, err := client.Do(req)
	if err != nil {
		f.State, f.Detail, f.Advice = Fail, "nobody answers on "+socket, "start it: thaw "+name
		return f
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		f.State, f.Detail, f.Advice = Fail, "it says "+resp.Status, "look at its log"
	}
	return f
}

func containerd(ctx context.Context, o Options) Finding {
	f := Finding{Check: "containerd", State: OK}
	if _, err := os.Stat(o.ContainerdSocket); errors.Is(err, fs.ErrNotExist) {
		f.State, f.Detail = Fail, "no socket "+o.ContainerdSocket
		f.Advice = "install and start containerd 1.6 or newer, or name its socket with --containerd"
		return f
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	conn, err := grpc.NewClient("unix://"+o.ContainerdSocket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		f.State, f.Detail = Fail, err.Error()
		return f
	}
	defer conn.Close()
	v, err := versionapi.NewVersionClient(conn).Version(ctx, &emptypb.Empty{})
	if err != nil {
		f.State, f.Detail, f.Advice = Fail, "it does not answer: "+err.Error(), "start containerd"
		return f
	}
	f.Detail = v.Version
	plugins, err := introspectionapi.NewIntrospectionClient(conn).Plugins(ctx, &introspectionapi.PluginsRequest{
		Filters: []string{"id==" + o.Snapshotter},
	})
	if err != nil {
		f.State, f.Detail = Warn, f.Detail+"; plugins unknown: "+err.Error()
		return f
	}
	for _, p := range plugins.Plugins {
		if p.InitErr != nil {
			f.State, f.Detail, f.Advice = Fail, f.Detail+": plugin "+p.ID+" failed: "+p.InitErr.Message, "restart containerd while thaw server runs"
			return f
		}
	}
	if len(plugins.Plugins) == 0 {
		f.State, f.Detail = Warn, f.Detail+" does not know the snapshotter "+o.Snapshotter
		f.Advice = "add what 'thaw containerd-config' prints and restart containerd"
		return f
	}
	f.Detail += " with snapshotter " + o.Snapshotter
	return f
}
