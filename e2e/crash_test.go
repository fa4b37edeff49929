package e2e

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/pkg/oci"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/thaw-project/thaw/e2e/lab"
	"github.com/thaw-project/thaw/e2e/launch"
	"github.com/thaw-project/thaw/e2e/recipe"
	"github.com/thaw-project/thaw/keeper"
)

const (
	// crashRounds is how often TestCrash kills when THAW_CRASH_ROUNDS does not say:
	// each victim once.
	crashRounds = 12
	// settleEvery is after how many rounds what a round made is removed, and
	// everything is compared with how it was.
	settleEvery = 10
	// patience bounds every wait for something that must happen. Nothing is judged
	// by time: this is for what never comes.
	patience = 3 * time.Minute
)

// crash is one run of TestCrash.
type crash struct {
	b   *bench
	s   *lab.Thaw
	n   *launch.Node
	rnd *rand.Rand

	residents  []*resident
	items      []*item
	made       int // items so far
	deck       []victim
	typical    map[string]time.Duration // by operation: how long it takes undisturbed
	converting atomic.Pointer[os.Process]
	over       <-chan struct{} // closed when the round's operation has ended
	suffix     string          // of containers' ids: runc, which labs share, must not see one twice
	temporary  string          // TMPDIR of Thaw's processes
	baseline   []string
	lastRound  int
}

// resident is a container that lives through the whole run; see crash_workload.py.
type resident struct {
	variant   variant
	id, dest  string
	dir       string // /crash inside
	container *launch.Container
	pid       int
	sum       string // of many of its files together
}

// TestCrash kills processes at random moments of what they do, and starts them again
// as a service manager would. Containers that use their file systems all the while
// see no error and lose nothing that they flushed; whatever was interrupted succeeds
// when it is done again; and in the end nothing is left.
//
// Killing server and keeper at the same moment is the one thing that containers do
// not survive. They are then started again on the same containerd snapshots, and must
// find all that was flushed.
func TestCrash(t *testing.T) {
	b := start(t)
	rounds, err := environmentNumber("THAW_CRASH_ROUNDS", crashRounds)
	if err != nil {
		t.Fatal(err)
	}
	seed, err := environmentNumber("THAW_SEED", uint64(time.Now().UnixNano())%1_000_000)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("seed %d; the same choices again: make crash ROUNDS=%d SEED=%d", seed, rounds, seed)
	begin := time.Now()
	c := newCrash(t, b, seed, crashOptions{})
	t.Logf("%d containers run after %.1f s", len(c.residents), time.Since(begin).Seconds())
	for round := range int(rounds) {
		c.lastRound = round + 1
		c.round(t)
		if c.lastRound%settleEvery == 0 {
			c.settle(t)
		}
	}
	c.finish(t)
	t.Logf("%d rounds in %.0f s", rounds, time.Since(begin).Seconds())
}

// environmentNumber is a variable's value, or without one value.
func environmentNumber(name string, value uint64) (uint64, error) {
	text := os.Getenv(name)
	if text == "" {
		return value, nil
	}
	value, err := strconv.ParseUint(text, 10, 64)
	if err != nil {
		return 0, fmt.Errorf("%s: %w", name, err)
	}
	return value, nil
}

// crashOptions say how the server is started; see lab.StartThawAs.
type crashOptions struct{ before, env []string }

// newCrash starts everything, with a resident of each variant.
func newCrash(t *testing.T, b *bench, seed uint64, o crashOptions) *crash {
	t.Helper()
	c := &crash{b: b, rnd: rand.New(rand.NewPCG(seed, 0)), typical: map[string]time.Duration{}}
	temporary, err := b.lab.Path("crash", "tmp", "x")
	if err != nil {
		t.Fatal(err)
	}
	c.temporary = filepath.Dir(temporary)
	c.suffix = strings.TrimPrefix(filepath.Base(b.lab.Dir), "thaw-e2e.")
	c.s = b.thawAs(t, o.before, append([]string{"TMPDIR=" + c.temporary}, o.env...))
	c.n = b.node(t, c.s)
	t.Cleanup(func() { c.cleanUp(t) })

	image, err := b.builder.Build(t.Context(), residentRecipe())
	if err != nil {
		t.Fatal(err)
	}
	all(t, len(variants), func(ctx context.Context, i int) error {
		v := variants[i]
		source := c.residentSource(v)
		made, err := onVariant(image, v)
		if err != nil {
			return err
		}
		if err := recipe.Push(ctx, made, source); err != nil {
			return err
		}
		_, err = c.s.Convert(ctx, source, source+"-thaw", v.mode, v.filesystem)
		return err
	})
	for _, v := range variants {
		c.startResident(t, &resident{variant: v, id: v.String() + "-" + c.suffix, dest: c.residentSource(v) + "-thaw"}, seed)
	}
	for _, r := range c.residents {
		if r.sum, err = r.readMuch(t.Context()); err != nil {
			c.fatal(t, "%v", err)
		}
	}
	c.baseline = c.stable(t)
	return c
}

func (c *crash) residentSource(v variant) string {
	return c.b.registry.Ref("crash-"+v.String(), "resident")
}

func (c *crash) startResident(t *testing.T, r *resident, seed uint64) {
	t.Helper()
	log, err := c.b.lab.Path("crash", t.Name(), r.id, "log")
	if err != nil {
		t.Fatal(err)
	}
	r.dir = filepath.Dir(log)
	image, err := c.n.Pull(t.Context(), r.dest)
	if err != nil {
		t.Fatal(err)
	}
	node := *c.n // the same containerd
	node.Spec = []oci.SpecOpts{
		oci.WithMounts([]specs.Mount{{Destination: "/crash", Type: "bind", Source: r.dir, Options: []string{"rbind", "rw"}}}),
		oci.WithEnv([]string{fmt.Sprintf("SEED=%d-%s", seed, r.variant)}),
	}
	if r.container, err = node.Create(t.Context(), r.id, image); err != nil {
		t.Fatal(err)
	}
	c.residents = append(c.residents, r)
	if err := r.container.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	r.pid = r.container.Pid()
	c.waitReady(t, r)
}

// waitReady waits until a resident has found everything in place that it flushed.
func (c *crash) waitReady(t *testing.T, r *resident) {
	t.Helper()
	c.eventually(t, r.id+" verifies its files", func() error {
		if err := r.healthy(); err != nil {
			return permanent{err}
		}
		_, err := os.Stat(filepath.Join(r.dir, "ready"))
		return err
	})
}

// healthy returns an error if the resident met one, or is dead.
func (r *resident) healthy() error {
	if text, err := os.ReadFile(filepath.Join(r.dir, "error")); err == nil {
		return fmt.Errorf("%s met an error: %s", r.id, text)
	}
	if err := unix.Kill(r.pid, 0); err != nil {
		return fmt.Errorf("%s is dead: %w: %s", r.id, err, r.container.Log(2000))
	}
	return nil
}

// beat is how many files the resident has read, and how often it has flushed.
func (r *resident) beat() (read, flushed int64, err error) {
	text, err := os.ReadFile(filepath.Join(r.dir, "beat"))
	if err != nil {
		return 0, 0, err
	}
	_, err = fmt.Sscan(string(text), &read, &flushed)
	return read, flushed, err
}

// readMuch reads a good part of the resident's files in another process.
func (r *resident) readMuch(ctx context.Context) (string, error) {
	return r.container.Exec(ctx, "/bin/sh", "-c", `set -e; find /usr/lib /usr/bin -xdev -type f | sort | head -n 600 >/tmp/list; xargs -a /tmp/list cat | sha256sum`)
}

// progress fails the test unless every resident is well, and goes on reading and
// flushing from now.
func (c *crash) progress(t *testing.T) {
	t.Helper()
	for _, r := range c.residents {
		read, flushed, err := r.beat()
		if err != nil {
			c.fatal(t, "%s: %v", r.id, err)
		}
		c.eventually(t, r.id+" goes on", func() error {
			if err := r.healthy(); err != nil {
				return permanent{err}
			}
			nowRead, nowFlushed, err := r.beat()
			if err == nil && (nowRead <= read || nowFlushed <= flushed) {
				err = fmt.Errorf("read %d files and flushed %d times, then %d and %d", read, flushed, nowRead, nowFlushed)
			}
			return err
		})
	}
}

// permanent is an error that waiting does not cure.
type permanent struct{ error }

// eventually waits until f returns nil.
func (c *crash) eventually(t *testing.T, what string, f func() error) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for pause := time.Millisecond; ; pause = min(2*pause, 100*time.Millisecond) {
		err := f()
		var p permanent
		switch {
		case err == nil:
			return
		case errors.As(err, &p):
			c.fatal(t, "%s: %v", what, p.error)
		case time.Now().After(deadline):
			if c.s.Running() { // its log then tells what it waits for
				_ = unix.Kill(c.s.Pid(), unix.SIGQUIT)
				time.Sleep(time.Second)
			}
			c.fatal(t, "%s: not within %v: %v", what, patience, err)
		}
		time.Sleep(pause)
	}
}

// fatal ends the test, and keeps the logs.
func (c *crash) fatal(t *testing.T, format string, args ...any) {
	t.Helper()
	root, err := lab.ModuleRoot()
	if err == nil {
		kept := filepath.Join(root, "out", "crash")
		if err = os.RemoveAll(kept); err == nil {
			err = os.CopyFS(kept, os.DirFS(filepath.Join(c.b.lab.Dir, "log")))
		}
		t.Logf("logs are kept in %s (%v)", kept, err)
	}
	for _, r := range c.residents {
		if err := r.healthy(); err != nil {
			t.Log(err)
		}
	}
	t.Logf("containerd: %s", c.n.Containerd.Log(3000))
	t.Fatalf("round %d: "+format, append([]any{c.lastRound}, args...)...)
}

// round kills something while an operation runs.
func (c *crash) round(t *testing.T) {
	t.Helper()
	c.waitContainerd(t)
	v := c.draw()
	op := c.operation(t, v)
	delay := time.Duration(c.rnd.Float64() * 1.1 * float64(c.typicalOf(op)))
	if c.rnd.IntN(2) == 0 {
		c.dropCaches(t)
	}
	if c.rnd.IntN(3) == 0 {
		if err := c.trim(); err != nil {
			c.fatal(t, "%v", err)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*patience)
	defer cancel()
	begin := time.Now()
	done, over := make(chan error, 1), make(chan struct{})
	c.over = over
	go func() {
		done <- op.run(ctx)
		close(over)
	}()
	var first error
	ended := false
	select {
	case first = <-done:
		ended = true
		if first != nil {
			c.fatal(t, "%s failed and nothing was killed: %v", op, first)
		}
		c.learn(op, time.Since(begin))
		time.Sleep(delay - time.Since(begin))
	case <-time.After(delay):
	}
	killed := time.Since(begin)
	// The operation's end, for victims that it cannot do without.
	wait := func() {
		if !ended {
			first, ended = <-done, true
		}
	}
	v.kill(c, t, wait)
	down := time.Since(begin) - killed
	wait()
	outcome := "done meanwhile"
	if first == nil && op.starts && v.breaks {
		first = errors.New("what was started is broken")
	}
	if first != nil {
		c.waitContainerd(t)
		if op.mustPause && v.spares {
			c.fatal(t, "%s after the %s was killed %v into it: %v", op, v.name, killed, first)
		}
		again := time.Now()
		if err := op.run(ctx); err != nil {
			c.fatal(t, "%s, again after the %s was killed %v into it (%v): %v", op, v.name, killed, first, err)
		}
		c.learn(op, time.Since(again))
		outcome = fmt.Sprintf("interrupted, again in %.2f s", time.Since(again).Seconds())
	}
	if op.done != nil {
		op.done(t)
	}
	c.progress(t)
	c.checkItems(t)
	t.Logf("round %3d: %-17s %5d ms into %-36s down %5d ms, %s; %.1f s",
		c.lastRound, v.name, killed.Milliseconds(), op.String()+",", down.Milliseconds(), outcome, time.Since(begin).Seconds())
}

// dropCaches makes what comes read from below. Without a sync before, which would
// wait for every file system of the machine.
func (c *crash) dropCaches(t *testing.T) {
	t.Helper()
	if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("3\n"), 0); err != nil {
		t.Fatal(err)
	}
}

// victim is what is killed in a round.
type victim struct {
	name string
	// kill kills it, starts it again as its service manager would, and waits until
	// it serves. It calls wait before what needs the round's operation to have ended.
	kill func(c *crash, t *testing.T, wait func())
	// converts victims need a conversion to run.
	converts bool
	// mounts victims are there while something is mounted or unmounted.
	mounts bool
	// spares victims leave containers, and what containerd does in them, alone.
	spares bool
	// breaks victims take containers with them.
	breaks bool
}

// victims is a deck: each is drawn once before any is drawn again.
var victims = []victim{
	{name: "server", kill: (*crash).killServer, spares: true},
	{name: "server", kill: (*crash).killServer, spares: true},
	{name: "server", kill: (*crash).killServer, spares: true},
	{name: "server twice", kill: (*crash).killServerTwice, spares: true},
	{name: "keeper", kill: (*crash).killKeeper, spares: true},
	{name: "keeper, server", kill: (*crash).killInTurn, spares: true},
	{name: "converter", kill: (*crash).killConverter, converts: true, spares: true},
	{name: "server's helper", kill: (*crash).killHelper, mounts: true, spares: true},
	{name: "containerd", kill: (*crash).killContainerd},
	{name: "containerd+server", kill: (*crash).killContainerdAndServer},
	{name: "server (SIGTERM)", kill: (*crash).stopServer, spares: true},
	{name: "server+keeper", kill: (*crash).killBoth, breaks: true},
}

func (c *crash) draw() victim {
	if len(c.deck) == 0 {
		c.deck = append(c.deck, victims...)
		c.rnd.Shuffle(len(c.deck), func(i, j int) { c.deck[i], c.deck[j] = c.deck[j], c.deck[i] })
	}
	v := c.deck[0]
	c.deck = c.deck[1:]
	return v
}

// pause is the moment that a service manager takes to start a program again.
func (c *crash) pause() { time.Sleep(time.Duration(c.rnd.Int64N(int64(300 * time.Millisecond)))) }

func (c *crash) startServer(t *testing.T) {
	t.Helper()
	if err := c.s.Start(t.Context()); err != nil {
		c.fatal(t, "%v", err)
	}
}

// waitContainerd waits until containerd speaks to the snapshotter again, which it
// tries only some time after a connection was refused.
func (c *crash) waitContainerd(t *testing.T) {
	t.Helper()
	c.eventually(t, "containerd finds the snapshotter again", func() error { return c.n.ReachesSnapshotter(t.Context()) })
}

func (c *crash) killServer(t *testing.T, _ func()) {
	t.Helper()
	c.s.Process.Kill()
	c.pause()
	c.startServer(t)
}

// killServerTwice kills the server again while it starts.
func (c *crash) killServerTwice(t *testing.T, _ func()) {
	t.Helper()
	c.s.Process.Kill()
	for range 2 {
		if err := c.s.Launch(); err != nil {
			c.fatal(t, "%v", err)
		}
		c.pause()
		if !c.s.Running() {
			c.fatal(t, "the server ended by itself: %s", c.s.Log(2000))
		}
		c.s.Process.Kill()
	}
	c.startServer(t)
}

func (c *crash) stopServer(t *testing.T, _ func()) {
	t.Helper()
	if err := c.s.Process.Stop(); err != nil {
		c.fatal(t, "%v", err)
	}
	c.pause()
	c.startServer(t)
}

func (c *crash) killKeeper(t *testing.T, _ func()) {
	t.Helper()
	old := c.s.KeeperPids()
	if len(old) != 1 {
		c.fatal(t, "%d keepers run: %v", len(old), old)
	}
	c.b.lab.KillPids(old)
	c.eventually(t, "another keeper holds the descriptor", func() error {
		return c.keeperHolds(t.Context())
	})
}

// keeperHolds returns an error unless a keeper runs and holds a descriptor.
func (c *crash) keeperHolds(ctx context.Context) error {
	if len(c.s.KeeperPids()) != 1 {
		return fmt.Errorf("keepers: %v", c.s.KeeperPids())
	}
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	k, err := keeper.Ensure(ctx, keeper.Options{Socket: filepath.Join(c.s.Run, "keeper.sock"), Command: []string{"/bin/false"}})
	if err != nil {
		return err
	}
	defer k.Close()
	if held, err := k.List(ctx); err != nil || len(held) != 1 {
		return fmt.Errorf("the keeper holds %v, %v", held, err)
	}
	return nil
}

// killInTurn kills the keeper, and the server as soon as there is another keeper.
func (c *crash) killInTurn(t *testing.T, wait func()) {
	t.Helper()
	c.killKeeper(t, wait)
	c.killServer(t, wait)
}

func (c *crash) killConverter(t *testing.T, _ func()) {
	t.Helper()
	if p := c.converting.Load(); p != nil {
		_ = p.Kill() // or it has ended
	}
}

// killHelper kills the next process that the server has mount something for it.
func (c *crash) killHelper(t *testing.T, _ func()) {
	t.Helper()
	keepers := c.s.KeeperPids()
	for {
		for _, pid := range c.s.Children() {
			if !slices.Contains(keepers, pid) {
				_ = unix.Kill(pid, unix.SIGKILL) // or it has ended
				return
			}
		}
		select {
		case <-c.over:
			return
		case <-time.After(100 * time.Microsecond):
		}
	}
}

func (c *crash) killContainerd(t *testing.T, wait func()) {
	t.Helper()
	c.n.Containerd.Process.Kill()
	wait()
	c.startContainerd(t)
}

func (c *crash) killContainerdAndServer(t *testing.T, wait func()) {
	t.Helper()
	c.n.Containerd.Process.Kill()
	c.s.Process.Kill()
	c.pause()
	c.startServer(t)
	wait()
	c.startContainerd(t)
}

func (c *crash) startContainerd(t *testing.T) {
	t.Helper()
	if err := c.n.Containerd.Start(t.Context()); err != nil {
		c.fatal(t, "%v", err)
	}
	for _, r := range c.residents {
		if err := r.container.Reload(t.Context()); err != nil {
			c.fatal(t, "%v", err)
		}
	}
}

// killBoth kills server and keeper at the same moment: what runs on their disks is
// lost, and started again.
func (c *crash) killBoth(t *testing.T, wait func()) {
	t.Helper()
	keepers := c.s.KeeperPids()
	_ = unix.Kill(c.s.Pid(), unix.SIGKILL)
	c.b.lab.KillPids(keepers)
	c.s.Process.Kill() // waits for its end
	c.pause()
	c.startServer(t)
	wait()
	c.waitContainerd(t)
	for _, r := range c.residents {
		if err := r.container.Stop(t.Context()); err != nil {
			c.fatal(t, "after server and keeper died: %v", err)
		}
		c.restartResident(t, r)
	}
	for _, it := range slices.Clone(c.items) {
		if it.state == running {
			if err := c.remove(t.Context(), it); err != nil {
				c.fatal(t, "after server and keeper died: %v", err)
			}
			c.removed(it)
		}
	}
}

// restartResident starts a stopped resident on the same files, all of which it
// verifies first.
func (c *crash) restartResident(t *testing.T, r *resident) {
	t.Helper()
	for _, name := range []string{"error", "ready", "beat"} {
		if err := os.Remove(filepath.Join(r.dir, name)); err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Fatal(err)
		}
	}
	if err := r.container.Restart(t.Context()); err != nil {
		c.fatal(t, "%v", err)
	}
	r.pid = r.container.Pid()
	c.waitReady(t, r)
	c.eventually(t, r.id+" runs", func() error { _, _, err := r.beat(); return err })
}

// finish verifies what the residents flushed once more from the disks, removes
// everything, and finds nothing left.
func (c *crash) finish(t *testing.T) {
	t.Helper()
	c.settle(t)
	for _, r := range c.residents {
		if err := r.container.Stop(t.Context()); err != nil {
			c.fatal(t, "%v", err)
		}
	}
	// As over a reboot: nothing stays attached.
	if err := c.s.Shutdown(t.Context()); err != nil {
		c.fatal(t, "%v", err)
	}
	if err := c.s.CheckStore(t.Context(), "--scrub"); err != nil {
		c.fatal(t, "%v", err)
	}
	c.checkQcow2(t)
	c.dropCaches(t)
	c.startServer(t)
	c.waitContainerd(t)
	for _, r := range c.residents {
		c.restartResident(t, r)
		text, err := os.ReadFile(filepath.Join(r.dir, "ready"))
		t.Logf("%s after a new start from nothing: %s (%v)", r.id, strings.TrimSpace(string(text)), err)
	}
	c.progress(t)
	for _, r := range c.residents {
		if err := c.n.Remove(t.Context(), r.id); err != nil {
			c.fatal(t, "%v", err)
		}
		if err := c.n.RemoveImage(t.Context(), r.dest); err != nil {
			c.fatal(t, "%v", err)
		}
	}
	dests := []string{}
	for _, r := range c.residents {
		dests = append(dests, r.dest)
	}
	c.residents = nil
	if err := c.s.WaitNoSnapshots(t.Context()); err != nil {
		c.fatal(t, "%v", err)
	}
	for _, dest := range dests {
		if err := c.forget(t.Context(), dest); err != nil {
			c.fatal(t, "%v", err)
		}
	}
	c.eventually(t, "nothing is left", func() error {
		lines, err := c.inventory(t.Context())
		if err != nil {
			return err
		}
		var left []string
		for _, line := range lines {
			if !ownLine(line) {
				left = append(left, line)
			}
		}
		if len(left) > 0 {
			return fmt.Errorf("left:\n%s", strings.Join(left, "\n"))
		}
		return nil
	})
}
