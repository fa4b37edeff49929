package lab

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/proxy"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/thaw-project/thaw/image/convert"
)

// Thaw is a thaw server with folders of its own.
type Thaw struct {
	Root string
	Run  string
	*Process

	lab       *Lab
	name      string
	args      []string
	env       []string
	config    string // path of its configuration file, empty without
	network   []string
	storeOnly bool
	parts     []*Part
}

// ThawOptions say how a thaw server runs.
type ThawOptions struct {
	Before []string // as for StartThawAs
	// Network is what Enter of the Star or Port returns that the server lives in; nil
	// for this machine's own.
	Network []string
	Env     []string
	Args    []string
	// Config, when set, is the text of a configuration file.
	Config string
	// Parts, when set, are the processes that it runs in, in the order in which they are
	// started, of "attacher", "image-mgmt" and "snapshotter". Process is that of the last. Before
	// is for each what PartBefore has for it.
	Parts      []string
	PartBefore map[string][]string
	// Elsewhere means that by Config its lvols are in another program.
	Elsewhere bool
	// StoreOnly means that by Config it has no snapshotter, NodeOnly no store.
	StoreOnly, NodeOnly bool
}

// StartThaw starts thaw server with empty folders and waits until it serves.
// Further arguments are passed on.
func (l *Lab) StartThaw(ctx context.Context, args ...string) (*Thaw, error) {
	return l.StartThawAs(ctx, nil, nil, args...)
}

// StartThawAs is StartThaw with a command before the program, which must execute it
// in its own place, and variables added to the environment: what a service manager
// does to a process before it starts it.
func (l *Lab) StartThawAs(ctx context.Context, before, env []string, args ...string) (*Thaw, error) {
	return l.StartThawWith(ctx, ThawOptions{Before: before, Env: env, Args: args})
}

// StartThawWith is StartThaw with options.
func (l *Lab) StartThawWith(ctx context.Context, o ThawOptions) (*Thaw, error) {
	program := filepath.Join(l.Bin, "thaw")
	if !fileExists(program) {
		return nil, fmt.Errorf("%s is missing: run make build", program)
	}
	name := fmt.Sprintf("t%d", labNumber.Add(1))
	root, err := l.Path(name, "root")
	if err != nil {
		return nil, err
	}
	t := &Thaw{Root: root, Run: filepath.Join(l.Dir, name, "run"), lab: l, name: name, env: o.Env, network: o.Network, storeOnly: o.StoreOnly}
	t.args = append(slices.Concat(o.Network, o.Before), program, "server", "--root", t.Root, "--run", t.Run)
	if o.Config != "" {
		t.config = filepath.Join(l.Dir, name, "config.toml")
		if err := os.WriteFile(t.config, []byte(o.Config), 0o600); err != nil {
			return nil, err
		}
		t.args = append(t.args, "--config", t.config)
	}
	t.args = append(t.args, o.Args...)
	for _, part := range o.Parts {
		args := append(slices.Concat(o.Network, o.PartBefore[part]), program, part, "--root", t.Root, "--run", t.Run)
		if t.config != "" {
			args = append(args, "--config", t.config)
		}
		t.parts = append(t.parts, &Part{Name: part, thaw: t, args: args})
	}
	if err := t.Start(ctx); err != nil {
		return nil, err
	}
	return t, nil
}

// SnapshotterSocket is where containerd finds the snapshotter.
func (t *Thaw) SnapshotterSocket() string { return filepath.Join(t.Run, "snapshotter.sock") }

// Start starts the server on its folders and waits until its snapshotter answers.
func (t *Thaw) Start(ctx context.Context) error {
	if err := t.Launch(); err != nil {
		return err
	}
	return t.WaitReady(ctx)
}

// Launch starts the server on its folders and does not wait.
func (t *Thaw) Launch() (err error) {
	for _, p := range t.parts {
		if err := p.Launch(); err != nil {
			return err
		}
	}
	if len(t.parts) > 0 {
		return nil
	}
	t.Process, err = t.lab.Start(Spec{Name: t.name, Args: t.args, Env: t.env})
	return err
}

// WaitReady waits until the server's snapshotter answers.
func (t *Thaw) WaitReady(ctx context.Context) error {
	process := t.Process
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	if err := poll(ctx, 10*time.Millisecond, process.alive, t.answers); err != nil {
		return fmt.Errorf("start thaw server: %w; the end of its log:\n%s", err, process.Log(4096))
	}
	return nil
}

func (t *Thaw) answers(ctx context.Context) error {
	if t.storeOnly {
		return t.healthy(ctx)
	}
	// A dead server's socket file refuses at once; gRPC would try again later.
	raw, err := net.Dial("unix", t.SnapshotterSocket())
	if err != nil {
		return err
	}
	raw.Close()
	s, closeSnapshotter, err := t.Snapshotter()
	if err != nil {
		return err
	}
	defer closeSnapshotter()
	ctx, cancel := context.WithTimeout(namespaces.WithNamespace(ctx, Namespace), 5*time.Second)
	defer cancel()
	return s.Walk(ctx, func(context.Context, snapshots.Info) error { return nil })
}

// healthy asks the server how it is.
func (t *Thaw) healthy(ctx context.Context) error {
	_, err := t.Metrics(ctx, "/healthz")
	return err
}

// Metrics returns what the server's metrics socket says at path: of several processes,
// that of the last.
func (t *Thaw) Metrics(ctx context.Context, path string) (string, error) {
	transport := &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		socket := "metrics.sock"
		if n := len(t.parts); n > 0 {
			socket = t.parts[n-1].Name + "-" + socket
		}
		return d.DialContext(ctx, "unix", filepath.Join(t.Run, socket))
	}}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://thaw"+path, nil)
	if err != nil {
		return "", err
	}
	response, err := (&http.Client{Transport: transport}).Do(request)
	if err != nil {
		return "", err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err == nil && response.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s: %s", path, response.Status, body)
	}
	return string(body), err
}

// Metric returns the value of a metric without labels.
func (t *Thaw) Metric(ctx context.Context, name string) (float64, error) {
	text, err := t.Metrics(ctx, "/metrics")
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(text) {
		if value, found := strings.CutPrefix(strings.TrimSpace(line), name+" "); found {
			return strconv.ParseFloat(value, 64)
		}
	}
	return 0, fmt.Errorf("the server has no metric %s", name)
}

// Snapshotter returns the server's snapshotter as containerd sees it, and a function
// that ends the connection.
func (t *Thaw) Snapshotter() (snapshots.Snapshotter, func(), error) {
	connection, err := grpc.NewClient("unix://"+t.SnapshotterSocket(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, nil, err
	}
	s := proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(connection), "thaw")
	return s, func() { connection.Close() }, nil
}

// WaitNoSnapshots waits until the snapshotter has no snapshot left: containerd removes
// those of a removed image some time after it says so.
func (t *Thaw) WaitNoSnapshots(ctx context.Context) error {
	s, closeSnapshotter, err := t.Snapshotter()
	if err != nil {
		return err
	}
	defer closeSnapshotter()
	ctx, cancel := context.WithTimeout(namespaces.WithNamespace(ctx, Namespace), 30*time.Second)
	defer cancel()
	err = poll(ctx, 20*time.Millisecond, t.alive, func(ctx context.Context) error {
		var names []string
		if err := s.Walk(ctx, func(_ context.Context, info snapshots.Info) error {
			names = append(names, info.Name)
			return nil
		}); err != nil {
			return err
		}
		if len(names) > 0 {
			return fmt.Errorf("%d snapshots are left: %s", len(names), strings.Join(names, " "))
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("wait until containerd removed its snapshots: %w", err)
	}
	return nil
}

// KillAndRestart ends the server with SIGKILL and starts it again.
func (t *Thaw) KillAndRestart(ctx context.Context) error {
	t.Process.Kill()
	return t.Start(ctx)
}

// KeeperPids returns the server's keeper processes.
func (t *Thaw) KeeperPids() []int { return t.lab.Pids("thaw keeper --socket " + t.Run) }

// Shutdown stops the server for good, and takes away what outlives it on purpose: the
// keeper, the presentation and the mounts on it.
func (t *Thaw) Shutdown(ctx context.Context) error {
	if err := t.Process.Stop(); err != nil {
		return err
	}
	for i := len(t.parts) - 1; i >= 0; i-- {
		if err := t.parts[i].Stop(); err != nil {
			return err
		}
	}
	return t.Teardown(ctx)
}

// Teardown runs thaw server teardown with the arguments, in the server's network.
func (t *Thaw) Teardown(ctx context.Context, args ...string) error {
	c := t.Command(ctx, append([]string{"server", "teardown"}, args...)...)
	if len(t.network) > 0 {
		all := slices.Concat(t.network, []string{c.Path}, c.Args[1:])
		c = t.lab.Command(ctx, all[0], all[1:]...)
	}
	_, err := output(c, c.Args)
	return err
}

// Command returns a thaw command that speaks to this server. Not for server and
// keeper.
func (t *Thaw) Command(ctx context.Context, args ...string) *exec.Cmd {
	args = append(args, "--root", t.Root, "--run", t.Run)
	if t.config != "" {
		args = append(args, "--config", t.config)
	}
	return t.lab.Command(ctx, "thaw", args...)
}

// Do runs a thaw command and returns its standard output; an error holds what it
// printed on standard error.
func (t *Thaw) Do(ctx context.Context, args ...string) ([]byte, error) {
	return output(t.Command(ctx, args...), args)
}

func output(c *exec.Cmd, args []string) ([]byte, error) {
	var stderr bytes.Buffer
	c.Stderr = &stderr
	out, err := c.Output()
	if err != nil {
		return out, fmt.Errorf("thaw %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(stderr.String()))
	}
	return out, nil
}

// Converted is what thaw image convert --json prints, and what the command took.
type Converted struct {
	convert.Result
	Took         time.Duration
	CPU          time.Duration // user and system, of the command and what it ran; the server's is not in it
	PeakRSSBytes int64         // of the command, the largest of it and what it ran
}

// WrittenBytes is what the conversion added to the store, data only.
func (c *Converted) WrittenBytes() (n int64) {
	for _, image := range c.Images {
		for _, l := range image.Layers {
			n += l.WrittenBytes
		}
	}
	return n
}

// Convert converts source to destination, both in plain HTTP registries.
func (t *Thaw) Convert(ctx context.Context, source, destination, mode, filesystem string, more ...string) (*Converted, error) {
	args := []string{"image", "convert", source, destination, "--mode", mode, "--plain-http", "--json", "--quiet"}
	if filesystem != "" {
		args = append(args, "--filesystem", filesystem)
	}
	args = append(args, more...)
	command := t.Command(ctx, args...)
	start := time.Now()
	out, err := output(command, args)
	if err != nil {
		return nil, err
	}
	converted := &Converted{
		Took: time.Since(start),
		CPU:  command.ProcessState.UserTime() + command.ProcessState.SystemTime(),
	}
	if usage, ok := command.ProcessState.SysUsage().(*syscall.Rusage); ok {
		converted.PeakRSSBytes = usage.Maxrss << 10
	}
	if err := json.Unmarshal(out, &converted.Result); err != nil {
		return nil, fmt.Errorf("thaw image convert --json printed %.200q: %w", out, err)
	}
	return converted, nil
}

// CheckStore runs thaw lvol check and returns an error unless the store is clean. It
// works while the server runs and when it does not.
func (t *Thaw) CheckStore(ctx context.Context, args ...string) error {
	out, err := t.Do(ctx, append([]string{"lvol", "check"}, args...)...)
	if err != nil {
		return errors.Join(err, errors.New(string(out)))
	}
	return nil
}
