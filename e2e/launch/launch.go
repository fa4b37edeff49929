// Package launch does what a user of containerd does (pull an image, create a
// container, start it, wait until it serves) and measures each step.
package launch

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	runc "github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/core/snapshots"
	transferimage "github.com/containerd/containerd/v2/core/transfer/image"
	"github.com/containerd/containerd/v2/core/transfer/registry"
	"github.com/containerd/containerd/v2/pkg/cio"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/oci"
	"github.com/containerd/containerd/v2/pkg/snapshotters"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/opencontainers/image-spec/identity"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/thaw-project/thaw/e2e/lab"
)

// Node is a containerd with the snapshotter to use on it.
type Node struct {
	Lab         *lab.Lab
	Containerd  *lab.Containerd
	Snapshotter string // overlayfs or thaw

	// Classic pulls with the client's own code, as containerd 1.x does, and not
	// with the transfer service.
	Classic bool

	// Spec is added to what containers are made with.
	Spec []oci.SpecOpts
}

func (n *Node) context(ctx context.Context) context.Context {
	return namespaces.WithNamespace(ctx, lab.Namespace)
}

// Pull pulls and unpacks an image of a plain HTTP registry.
func (n *Node) Pull(ctx context.Context, ref string) (client.Image, error) {
	ctx = n.context(ctx)
	c := n.Containerd.Client
	if n.Classic {
		hosts := docker.ConfigureDefaultRegistries(docker.WithPlainHTTP(docker.MatchAllHosts))
		return c.Pull(ctx, ref,
			client.WithResolver(docker.NewResolver(docker.ResolverOptions{Hosts: hosts})),
			client.WithPullUnpack, client.WithPullSnapshotter(n.Snapshotter),
			client.WithImageHandlerWrapper(snapshotters.AppendInfoHandlerWrapper(ref)))
	}
	source, err := registry.NewOCIRegistry(ctx, ref, registry.WithDefaultScheme("http"))
	if err != nil {
		return nil, err
	}
	platform := platforms.DefaultSpec()
	store := transferimage.NewStore(ref, transferimage.WithPlatforms(platform),
		transferimage.WithUnpack(platform, n.Snapshotter))
	if err := c.Transfer(ctx, source, store); err != nil {
		return nil, fmt.Errorf("pull %s: %w", ref, err)
	}
	return c.GetImage(ctx, ref)
}

// RemoveImage removes an image and waits until what only it used is collected.
func (n *Node) RemoveImage(ctx context.Context, ref string) error {
	ctx = n.context(ctx)
	if err := n.Containerd.Client.ImageService().Delete(ctx, ref); err != nil && !errdefs.IsNotFound(err) {
		return err
	}
	return n.Collect(ctx)
}

// Collect runs containerd's garbage collection to its end.
func (n *Node) Collect(ctx context.Context) error {
	ctx = n.context(ctx)
	// A lease deleted synchronously makes containerd collect before it answers. Without
	// that it may not collect at all: it forgets requests that come while a collection
	// takes snapshots away.
	s := n.Containerd.Client.LeasesService()
	lease, err := s.Create(ctx, leases.WithRandomID(), leases.WithExpiration(time.Minute))
	if err != nil {
		return err
	}
	return s.Delete(ctx, lease, leases.SynchronousDelete)
}

// ReachesSnapshotter returns an error while containerd does not get an answer from
// the snapshotter.
func (n *Node) ReachesSnapshotter(ctx context.Context) error {
	// Usage asks the snapshotter itself; Stat and Walk know most from metadata.
	ctx = n.context(ctx)
	s := n.Containerd.Client.SnapshotService(n.Snapshotter)
	var name string
	err := s.Walk(ctx, func(_ context.Context, info snapshots.Info) error { name = info.Name; return nil })
	if err != nil || name == "" {
		return err
	}
	_, err = s.Usage(ctx, name)
	return err
}

// Tidy makes containerd take away what it forgot when it, or the snapshotter, was
// killed: leases that last for a day, and snapshots that its metadata does not know.
// It looks for those after a snapshot was removed, once, and not again when the
// snapshotter does not answer then.
func (n *Node) Tidy(ctx context.Context) error {
	ctx = n.context(ctx)
	s := n.Containerd.Client.LeasesService()
	list, err := s.List(ctx)
	if err != nil {
		return err
	}
	for _, l := range list {
		if err := s.Delete(ctx, l); err != nil && !errdefs.IsNotFound(err) {
			return err
		}
	}
	snapshotter := n.Containerd.Client.SnapshotService(n.Snapshotter)
	key := fmt.Sprintf("tidy-%d", time.Now().UnixNano())
	if _, err := snapshotter.Prepare(ctx, key, ""); err != nil {
		return err
	}
	if err := snapshotter.Remove(ctx, key); err != nil {
		return err
	}
	return n.Collect(ctx)
}

// Container is a container with its task.
type Container struct {
	ID      string
	Port    int
	node    *Node
	c       client.Container
	task    client.Task
	exited  <-chan client.ExitStatus
	logFile string
}

// Create makes a container of a pulled image, and its task, whose file system is then
// mounted. Without args the image's own command runs.
func (n *Node) Create(ctx context.Context, id string, image client.Image, args ...string) (*Container, error) {
	ctx = n.context(ctx)
	port, err := lab.FreePort()
	if err != nil {
		return nil, err
	}
	options := []oci.SpecOpts{
		oci.WithImageConfigArgs(image, args),
		oci.WithHostNamespace(specs.NetworkNamespace),
		oci.WithEnv([]string{"PORT=" + strconv.Itoa(port)}),
		oci.WithCgroup(n.Lab.Cgroup(id)),
	}
	options = append(options, n.Spec...)
	logFile, err := n.Lab.Path("log", "container-"+id+".log")
	if err != nil {
		return nil, err
	}
	container := &Container{ID: id, Port: port, node: n, logFile: logFile}
	container.c, err = n.Containerd.Client.NewContainer(ctx, id, client.WithImage(image),
		client.WithSnapshotter(n.Snapshotter), client.WithNewSnapshot(id, image),
		// runc keeps its containers by name for the whole machine unless told where.
		client.WithRuntime("io.containerd.runc.v2", &runc.Options{Root: filepath.Join(n.Lab.Dir, "runc")}), client.WithNewSpec(options...))
	if err != nil {
		return nil, fmt.Errorf("create container %s: %w", id, err)
	}
	if err := container.newTask(ctx); err != nil {
		return nil, errors.Join(err, container.Delete(ctx))
	}
	return container, nil
}

func (c *Container) newTask(ctx context.Context) (err error) {
	if c.task, err = c.c.NewTask(ctx, cio.LogFile(c.logFile)); err != nil {
		return fmt.Errorf("create task %s: %w", c.ID, err)
	}
	if c.exited, err = c.task.Wait(ctx); err != nil {
		return fmt.Errorf("wait for task %s: %w", c.ID, err)
	}
	return nil
}

// Reload finds the container's task again, after containerd was started anew.
func (c *Container) Reload(ctx context.Context) (err error) {
	ctx = c.node.context(ctx)
	if c.c, err = c.node.Containerd.Client.LoadContainer(ctx, c.ID); err != nil {
		return fmt.Errorf("load container %s: %w", c.ID, err)
	}
	if c.task, err = c.c.Task(ctx, nil); err != nil {
		return fmt.Errorf("load task %s: %w", c.ID, err)
	}
	if c.exited, err = c.task.Wait(ctx); err != nil {
		return fmt.Errorf("wait for task %s: %w", c.ID, err)
	}
	return nil
}

// Stop kills the container's process and unmounts its file system, which stays as
// it is for Restart.
func (c *Container) Stop(ctx context.Context) error {
	if _, err := c.task.Delete(c.node.context(ctx), client.WithProcessKill); err != nil && !errdefs.IsNotFound(err) {
		return fmt.Errorf("delete task %s: %w", c.ID, err)
	}
	return nil
}

// Restart mounts a stopped container's file system again and starts its process.
func (c *Container) Restart(ctx context.Context) error {
	if err := c.newTask(c.node.context(ctx)); err != nil {
		return err
	}
	return c.Start(ctx)
}

// Pid is the container's process as the host sees it.
func (c *Container) Pid() int { return int(c.task.Pid()) }

// Log returns at most n bytes from the end of what the container printed.
func (c *Container) Log(n int) string {
	log, _ := os.ReadFile(c.logFile)
	return string(lastBytes(log, n))
}

// Remove removes the container of that id with all that belongs to it, whatever an
// interrupted call left of it.
func (n *Node) Remove(ctx context.Context, id string) error {
	ctx = n.context(ctx)
	c := &Container{ID: id, node: n}
	var err error
	if c.c, err = n.Containerd.Client.LoadContainer(ctx, id); err != nil && !errdefs.IsNotFound(err) {
		return fmt.Errorf("load container %s: %w", id, err)
	}
	if err == nil {
		if err := c.Delete(ctx); err != nil {
			return err
		}
	}
	err = n.Containerd.Client.SnapshotService(n.Snapshotter).Remove(ctx, id)
	if err != nil && !errdefs.IsNotFound(err) {
		return fmt.Errorf("remove snapshot of %s: %w", id, err)
	}
	return nil
}

// Start starts the container's process.
func (c *Container) Start(ctx context.Context) error {
	if err := c.task.Start(c.node.context(ctx)); err != nil {
		return fmt.Errorf("start container %s: %w", c.ID, err)
	}
	return nil
}

// readyTimeout bounds a start; with 50 at once on two cores one takes tens of
// seconds.
const readyTimeout = 3 * time.Minute

// Ready waits until the container answers HTTP and returns the answer.
func (c *Container) Ready(ctx context.Context) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, readyTimeout)
	defer cancel()
	for {
		body, err := c.Get(ctx, "/")
		if err == nil {
			return body, nil
		}
		select {
		case status := <-c.exited:
			log, _ := os.ReadFile(c.logFile)
			return "", fmt.Errorf("container %s ended with status %d before it answered: %s", c.ID, status.ExitCode(), lastBytes(log, 2000))
		case <-ctx.Done():
			return "", fmt.Errorf("container %s does not answer: %w", c.ID, err)
		case <-time.After(2 * time.Millisecond):
		}
	}
}

// Get asks the container for a path by HTTP.
func (c *Container) Get(ctx context.Context, path string) (string, error) {
	url := "http://" + net.JoinHostPort("127.0.0.1", strconv.Itoa(c.Port)) + path
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return "", err
	}
	request.Close = true
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return "", err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		return "", err
	}
	if response.StatusCode != http.StatusOK {
		return "", fmt.Errorf("GET %s: %s", url, response.Status)
	}
	return string(body), nil
}

// Exec runs a command in the container and returns its output; a status other than 0
// is an error.
func (c *Container) Exec(ctx context.Context, args ...string) (string, error) {
	ctx = c.node.context(ctx)
	spec, err := c.c.Spec(ctx)
	if err != nil {
		return "", err
	}
	process := *spec.Process
	process.Args, process.Terminal = args, false
	var out lockedBuffer
	id := fmt.Sprintf("exec-%d", time.Now().UnixNano())
	p, err := c.task.Exec(ctx, id, &process, cio.NewCreator(cio.WithStreams(nil, &out, &out), cio.WithFIFODir(c.node.Lab.Dir)))
	if err != nil {
		return "", fmt.Errorf("exec in %s: %w", c.ID, err)
	}
	exited, err := p.Wait(ctx)
	if err != nil {
		return "", err
	}
	if err := p.Start(ctx); err != nil {
		_, _ = p.Delete(ctx)
		return "", fmt.Errorf("exec in %s: %w", c.ID, err)
	}
	status := <-exited
	p.IO().Wait()
	_, err = p.Delete(ctx)
	if code := status.ExitCode(); code != 0 {
		return out.String(), fmt.Errorf("exec in %s: %s: exit status %d: %s", c.ID, strings.Join(args, " "), code, out.String())
	}
	return out.String(), err
}

// Rootfs returns where the container's root file system is mounted on the host.
func (c *Container) Rootfs() string {
	return filepath.Join(c.node.Containerd.State, "io.containerd.runtime.v2.task", lab.Namespace, c.ID, "rootfs")
}

// Delete kills the container's process and removes container and snapshot.
func (c *Container) Delete(ctx context.Context) error {
	ctx = c.node.context(ctx)
	var errs []error
	if c.task == nil && c.c != nil {
		if task, err := c.c.Task(ctx, nil); err == nil {
			c.task = task
		}
	}
	if c.task != nil {
		if _, err := c.task.Delete(ctx, client.WithProcessKill); err != nil && !errdefs.IsNotFound(err) {
			errs = append(errs, fmt.Errorf("delete task %s: %w", c.ID, err))
		}
	}
	if c.c != nil {
		if err := c.c.Delete(ctx, client.WithSnapshotCleanup); err != nil && !errdefs.IsNotFound(err) {
			errs = append(errs, fmt.Errorf("delete container %s: %w", c.ID, err))
		}
	}
	return errors.Join(errs...)
}

// Kill signals the container's process.
func (c *Container) Kill(ctx context.Context) error {
	return c.task.Kill(c.node.context(ctx), syscall.SIGKILL)
}

// View mounts an image's file system read-only and calls f with its path.
func (n *Node) View(ctx context.Context, image client.Image, f func(root string) error) (err error) {
	return n.withSnapshot(ctx, image, snapshots.Snapshotter.View, f)
}

// Active mounts a writable file system of an image, as a container gets it, and calls
// f with its path.
func (n *Node) Active(ctx context.Context, image client.Image, f func(root string) error) (err error) {
	return n.withSnapshot(ctx, image, snapshots.Snapshotter.Prepare, f)
}

func (n *Node) withSnapshot(ctx context.Context, image client.Image,
	make func(s snapshots.Snapshotter, ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error),
	f func(root string) error) (err error) {
	ctx = n.context(ctx)
	diffIDs, err := image.RootFS(ctx)
	if err != nil {
		return err
	}
	s := n.Containerd.Client.SnapshotService(n.Snapshotter)
	key := fmt.Sprintf("walk-%d", time.Now().UnixNano())
	// A lease keeps the collector from what has no container yet.
	ctx, done, err := n.Containerd.Client.WithLease(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, done(ctx)) }()
	mounts, err := make(s, ctx, key, identity.ChainID(diffIDs).String())
	if err != nil {
		return fmt.Errorf("snapshot of %s: %w", image.Name(), err)
	}
	defer func() { err = errors.Join(err, s.Remove(ctx, key)) }()
	root, err := n.Lab.Path("view", key, "x")
	if err != nil {
		return err
	}
	root = filepath.Dir(root)
	if err := mount.All(mounts, root); err != nil {
		return fmt.Errorf("mount %+v: %w", mounts, err)
	}
	defer func() { err = errors.Join(err, mount.UnmountAll(root, 0)) }()
	return f(root)
}

// Timing is how long each step of a cold start took.
type Timing struct {
	Pull   time.Duration // including unpack
	Create time.Duration // container, snapshot and task, with the file system mounted
	Ready  time.Duration // from start to the first answer
}

// Total is the time from nothing to the first answer.
func (t Timing) Total() time.Duration { return t.Pull + t.Create + t.Ready }

// Cold pulls an image, creates a container and waits until it answers. The caller
// deletes the container.
func (n *Node) Cold(ctx context.Context, id, ref string) (*Container, Timing, error) {
	var timing Timing
	begin := time.Now()
	image, err := n.Pull(ctx, ref)
	if err != nil {
		return nil, timing, err
	}
	timing.Pull = time.Since(begin)
	container, warm, err := n.Warm(ctx, id, image)
	timing.Create, timing.Ready = warm.Create, warm.Ready
	return container, timing, err
}

// Warm is Cold for an image that is already pulled.
func (n *Node) Warm(ctx context.Context, id string, image client.Image) (*Container, Timing, error) {
	var timing Timing
	begin := time.Now()
	container, err := n.Create(ctx, id, image)
	if err != nil {
		return nil, timing, err
	}
	created := time.Now()
	timing.Create = created.Sub(begin)
	if err := container.Start(ctx); err != nil {
		return container, timing, err
	}
	if _, err := container.Ready(ctx); err != nil {
		return container, timing, err
	}
	timing.Ready = time.Since(created)
	return container, timing, nil
}
