package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/thaw-project/thaw/e2e/lab"
)

// unitFile is what systemd runs Thaw by.
const unitFile = "thaw.service"

// unit holds a unit file's settings, "Section.Key" to values in order.
type unit map[string][]string

// unitText reads a file of deploy/systemd.
func unitText(t *testing.T, name string) string {
	t.Helper()
	root, err := lab.ModuleRoot()
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(filepath.Join(root, "deploy/systemd", name))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func readUnit(t *testing.T, name string) unit {
	t.Helper()
	text := unitText(t, name)
	u, section := unit{}, ""
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		if name, ok := strings.CutPrefix(line, "["); ok {
			section = strings.TrimSuffix(name, "]")
		} else if key, value, ok := strings.Cut(line, "="); ok && !strings.HasPrefix(line, "#") {
			u[section+"."+key] = append(u[section+"."+key], value)
		}
	}
	return u
}

func (u unit) one(t *testing.T, key string) string {
	t.Helper()
	if len(u[key]) != 1 {
		t.Fatalf("%s: %s is %q, want one value", unitFile, key, u[key])
	}
	return u[key][0]
}

// before is the command that does to a process what systemd does by the unit's
// settings before it executes ExecStart.
func (u unit) before(t *testing.T) []string {
	t.Helper()
	capabilities := "-all"
	for c := range strings.FieldsSeq(u.one(t, "Service.CapabilityBoundingSet")) {
		capabilities += "," + "+" + strings.ToLower(strings.TrimPrefix(c, "CAP_"))
	}
	var files unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &files); err != nil {
		t.Fatal(err)
	}
	most, err := strconv.ParseUint(u.one(t, "Service.LimitNOFILE"), 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	most = min(most, files.Max) // more is for CAP_SYS_RESOURCE, which tests may lack
	args := []string{"prlimit", fmt.Sprintf("--nofile=%d", most), "setpriv", "--bounding-set=" + capabilities, "--inh-caps=-all"}
	if u.one(t, "Service.NoNewPrivileges") == "yes" {
		args = append(args, "--no-new-privs")
	}
	return append(args, "/bin/sh", "-c", `umask `+u.one(t, "Service.UMask")+` && exec "$0" "$@"`)
}

// TestSystemdUnit has systemd itself read the units. It needs no systemd that runs.
func TestSystemdUnit(t *testing.T) {
	analyze, err := exec.LookPath("systemd-analyze")
	if err != nil {
		t.Skip("systemd-analyze is not installed: install systemd to check the units")
	}
	// The command must exist for systemd to be content: /bin/true does.
	verify := func(name, text string) string {
		path := filepath.Join(t.TempDir(), name)
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		out, err := exec.CommandContext(t.Context(), analyze, "verify", path).CombinedOutput()
		if err != nil {
			return fmt.Sprintf("%v: %s", err, out)
		}
		return string(out) // what it does not understand it only mentions
	}
	root, err := lab.ModuleRoot()
	if err != nil {
		t.Fatal(err)
	}
	found, err := filepath.Glob(filepath.Join(root, "deploy/systemd/*.service"))
	if err != nil {
		t.Fatal(err)
	}
	// What each runs, and whether what it mounts must be seen by others.
	runs := map[string]struct {
		arguments string
		mounts    bool
	}{
		unitFile: {"server", true}, "thaw-attacher.service": {"attacher", true}, "thaw-card.service": {"attacher --role card", false},
		"thaw-image-mgmt.service": {"image-mgmt", true}, "thaw-snapshotter.service": {"snapshotter", true},
		"thaw-target.service": {"target --persist", false}, "thaw-bridge.service": {"bridge", false},
	}
	if len(found) != len(runs) {
		t.Errorf("%d units, %d known", len(found), len(runs))
	}
	for name, want := range runs {
		t.Run(name, func(t *testing.T) {
			text, u := unitText(t, name), readUnit(t, name)
			program, arguments, _ := strings.Cut(u.one(t, "Service.ExecStart"), " ")
			there := strings.Replace(text, program, "/bin/true", 1)
			if complaints := verify(name, there); complaints != "" {
				t.Errorf("systemd-analyze verify: %s", complaints)
			}
			if verify(name, strings.Replace(there, "RestartSec=", "RestrtSec=", 1)) == "" {
				t.Error("systemd-analyze verify finds nothing in a wrong unit: it checks nothing")
			}
			if arguments != want.arguments || u.one(t, "Service.Restart") != "always" {
				t.Errorf("%s %s, Restart=%s", program, arguments, u["Service.Restart"])
			}
			if !want.mounts {
				return
			}
			if u.one(t, "Service.Type") != "notify" || arguments != "snapshotter" && u.one(t, "Service.KillMode") != "process" {
				t.Errorf("KillMode=%s Type=%s: not what TestSystemd plays", u["Service.KillMode"], u["Service.Type"])
			}
			// Any of these gives the service a mount namespace, and others would not see
			// what is mounted in it.
			for _, key := range []string{"ProtectSystem", "ProtectHome", "PrivateTmp", "PrivateDevices", "PrivateMounts", "ReadOnlyPaths",
				"ReadWritePaths", "InaccessiblePaths", "BindPaths", "TemporaryFileSystem", "ProtectKernelTunables", "ProtectControlGroups",
				"ProtectKernelModules", "ProtectKernelLogs", "MountFlags", "RootDirectory", "RootImage", "DynamicUser", "ProtectProc"} {
				if values, ok := u["Service."+key]; ok {
					t.Errorf("%s=%s gives Thaw its own mounts", key, values)
				}
			}
		})
	}
}

// notifications is the service manager's end of the notification socket.
type notifications struct {
	path string
	conn *net.UnixConn
	done chan struct{}

	mu   sync.Mutex
	from map[int][]string // guarded by mu: messages by sender
}

func listenNotifications(t *testing.T, path string) *notifications {
	t.Helper()
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	n := &notifications{path: path, conn: conn, done: make(chan struct{}), from: map[int][]string{}}
	raw, err := conn.SyscallConn()
	if err == nil {
		err = errors.Join(raw.Control(func(fd uintptr) {
			if e := unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_PASSCRED, 1); e != nil {
				t.Error(e)
			}
		}))
	}
	if err != nil {
		t.Fatal(err)
	}
	go n.receive()
	t.Cleanup(func() {
		conn.Close()
		<-n.done
	})
	return n
}

func (n *notifications) receive() {
	defer close(n.done)
	buf, oob := make([]byte, 4096), make([]byte, 256)
	for {
		size, oobSize, _, _, err := n.conn.ReadMsgUnix(buf, oob)
		if err != nil {
			return
		}
		messages, err := unix.ParseSocketControlMessage(oob[:oobSize])
		if err != nil || len(messages) == 0 {
			continue
		}
		if cred, err := unix.ParseUnixCredentials(&messages[0]); err == nil {
			n.mu.Lock()
			n.from[int(cred.Pid)] = append(n.from[int(cred.Pid)], strings.TrimSpace(string(buf[:size])))
			n.mu.Unlock()
		}
	}
}

// got tells whether process pid said so.
func (n *notifications) got(pid int, message string) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.Contains(n.from[pid], message)
}

// TestSystemd does to a server what systemd does by the unit file, under the limits it
// sets, while containers use their file systems: kill, restart, stop. With
// KillMode=process signals go to the main process alone.
func TestSystemd(t *testing.T) {
	b := start(t)
	u := readUnit(t, unitFile)
	socket, err := b.lab.Path("systemd", "notify")
	if err != nil {
		t.Fatal(err)
	}
	n := listenNotifications(t, socket)
	c := newCrash(t, b, 1, crashOptions{before: u.before(t), env: []string{"NOTIFY_SOCKET=" + socket}})
	restart, err := time.ParseDuration(u.one(t, "Service.RestartSec"))
	if err != nil {
		t.Fatal(err)
	}
	stopTimeout, err := time.ParseDuration(u.one(t, "Service.TimeoutStopSec"))
	if err != nil {
		t.Fatal(err)
	}

	// As the unit says, and not more.
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", c.s.Pid()))
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Contains(status, []byte("NoNewPrivs:\t1\n")) || bytes.Contains(status, []byte("CapBnd:\t000001ffffffffff")) {
		t.Errorf("the server does not run under the unit's limits: %s", status)
	}
	keepers := c.s.KeeperPids()
	if len(keepers) != 1 {
		t.Fatalf("keepers %v", keepers)
	}
	ready := func() {
		t.Helper()
		c.eventually(t, "READY=1 from the main process", func() error {
			if !n.got(c.s.Pid(), "READY=1") {
				return errors.New("not said")
			}
			return nil
		})
	}
	goesOn := func(after string) {
		t.Helper()
		ready()
		c.dropCaches(t)
		c.progress(t)
		if now := c.s.KeeperPids(); !slices.Equal(now, keepers) {
			t.Fatalf("after %s the keepers are %v, they were %v", after, now, keepers)
		}
		lines, err := c.inventory(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if !slices.Equal(lines, c.baseline) {
			t.Fatalf("after %s there is\n%s\nbefore there was\n%s", after, strings.Join(lines, "\n"), strings.Join(c.baseline, "\n"))
		}
	}
	goesOn("the start")

	// systemctl kill --kill-whom=main --signal=KILL, or a crash: Restart=always.
	for range 3 {
		if err := unix.Kill(c.s.Pid(), unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
		time.Sleep(restart)
		c.startServer(t)
		goesOn("SIGKILL of the main process")
	}

	// systemctl restart, with another binary for an upgrade.
	for range 2 {
		c.stopAsSystemd(t, n, stopTimeout)
		c.startServer(t)
		goesOn("a restart")
	}

	// systemctl stop, while containers run: their disks wait, and teardown does not
	// take them away.
	c.stopAsSystemd(t, n, stopTimeout)
	if now := c.s.KeeperPids(); !slices.Equal(now, keepers) {
		t.Fatalf("after a stop the keepers are %v, they were %v", now, keepers)
	}
	out, err := c.s.Do(t.Context(), "server", "teardown")
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 4 || !strings.Contains(err.Error(), "--force") || len(out) > 0 {
		t.Fatalf("teardown with containers running: %v; it did %q", err, out)
	}
	c.startServer(t)
	goesOn("a stop and a teardown that was refused")

	// Nothing in use: after the containers are gone a stop leaves nothing.
	c.waitContainerd(t)
	for _, r := range c.residents {
		if err := c.n.Remove(t.Context(), r.id); err != nil {
			c.fatal(t, "%v", err)
		}
		if err := c.n.RemoveImage(t.Context(), r.dest); err != nil {
			c.fatal(t, "%v", err)
		}
	}
	c.residents = nil
	if err := c.s.WaitNoSnapshots(t.Context()); err != nil {
		c.fatal(t, "%v", err)
	}
	c.eventually(t, "no disk is presented", func() error {
		entries, err := os.ReadDir(filepath.Join(c.s.Run, "dev"))
		if err == nil && len(entries) > 0 {
			err = fmt.Errorf("%v", entries)
		}
		return err
	})
	c.stopAsSystemd(t, n, stopTimeout)
	for _, line := range b.leftovers(t, c.s) {
		t.Errorf("a stop with nothing in use leaves %s", line)
	}
}

// stopAsSystemd sends SIGTERM to the main process alone and waits for its orderly
// end, which must come before systemd would lose its patience.
func (c *crash) stopAsSystemd(t *testing.T, n *notifications, timeout time.Duration) {
	t.Helper()
	if err := unix.Kill(c.s.Pid(), syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), timeout)
	defer cancel()
	if err := c.s.Wait(ctx); err != nil {
		c.fatal(t, "SIGTERM: %v", err)
	}
	if !n.got(c.s.Pid(), "STOPPING=1") {
		c.fatal(t, "the server did not say STOPPING=1")
	}
}
