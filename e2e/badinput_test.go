package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"

	attacherv1 "github.com/thaw-project/thaw/api/attacher/v1"
	"github.com/thaw-project/thaw/attacher/rpc"
	"github.com/thaw-project/thaw/e2e/lab"
	"github.com/thaw-project/thaw/e2e/recipe"
)

// The exit statuses that "thaw --help" documents.
const (
	exitFailed      = 1
	exitInvalid     = 2
	exitNotFound    = 3
	exitInUse       = 4
	exitUnavailable = 5
	exitNoSpace     = 6
	exitCorrupt     = 7
	exitDenied      = 8
	exitUnsupported = 9
	exitInterrupted = 130
)

// commandLimit is how long one refused command may take: more than all retries of a
// registry that is away, on a busy machine.
const commandLimit = time.Minute

// bad is one command that must fail.
type bad struct {
	name string
	args []string
	code int
	// says are words of the one line it prints: what failed, where, what to do.
	says []string
	// hides are words that it must not print.
	hides []string
	bare  bool // without --root and --run
}

// ground is where bad commands are run: a server and the registries, and what they
// hold before.
type ground struct {
	*bench
	server   *lab.Thaw
	attacher attacherv1.AttacherClient // the server's
	spool    string                    // an empty directory for blobs in flight
	dir      string                    // for sources
}

func (b *bench) ground(t *testing.T) *ground { return b.groundOf(t, b.thaw(t)) }

func (b *bench) groundOf(t *testing.T, s *lab.Thaw) *ground {
	t.Helper()
	dir := t.TempDir()
	g := &ground{bench: b, server: s, spool: filepath.Join(dir, "spool"), dir: dir}
	if err := os.Mkdir(g.spool, 0o700); err != nil {
		t.Fatal(err)
	}
	connection, err := grpc.NewClient("unix://"+filepath.Join(s.Run, "thaw.sock"), rpc.DialOptions()...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { connection.Close() })
	g.attacher = attacherv1.NewAttacherClient(connection)
	return g
}

// convertArgs are the arguments of a conversion to dest, a repository of the shared
// registry.
func (g *ground) convertArgs(source, dest string, more ...string) []string {
	return append([]string{"image", "convert", "--plain-http", "--quiet", "--spool-dir", g.spool, source, g.registry.Ref(dest, "thaw")}, more...)
}

// outcome is how a command ended.
type outcome struct {
	code           int
	stdout, stderr string
}

// run runs a command to its end.
func run(t *testing.T, c *exec.Cmd) outcome {
	t.Helper()
	var stdout, stderr bytes.Buffer
	c.Stdout, c.Stderr = &stdout, &stderr
	err := c.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatalf("%s: %v", strings.Join(c.Args, " "), err)
	}
	return outcome{c.ProcessState.ExitCode(), stdout.String(), stderr.String()}
}

// errorLine returns the one line in which a command says why it failed. What a server
// logs besides must not call itself an error.
func (o outcome) errorLine(t *testing.T) string {
	t.Helper()
	var line string
	for l := range strings.Lines(o.stderr) {
		switch l = strings.TrimSuffix(l, "\n"); {
		case strings.HasPrefix(l, "thaw: ") && line == "":
			line = l
		case strings.HasPrefix(l, "time=") && !strings.Contains(l, "level=ERROR") && line == "":
		default:
			t.Errorf("standard error has more than one line of error:\n%s", o.stderr)
			return line
		}
	}
	if line == "" {
		t.Errorf("no error on standard error:\n%s", o.stderr)
	}
	return line
}

// refused checks that a command failed as it should.
func (c bad) refused(t *testing.T, o outcome) {
	t.Helper()
	line := o.errorLine(t)
	t.Logf("exit %d: %s", o.code, line)
	if o.code != c.code {
		t.Errorf("exit status %d, want %d", o.code, c.code)
	}
	for _, w := range c.says {
		if !strings.Contains(line, w) {
			t.Errorf("the error does not say %q", w)
		}
	}
	for _, w := range c.hides {
		if strings.Contains(o.stdout+o.stderr, w) {
			t.Errorf("the output holds %q", w)
		}
	}
	if len(line) > 1000 {
		t.Errorf("the error has %d characters", len(line))
	}
	if o.stdout != "" {
		t.Errorf("standard output of a failed command: %.200q", o.stdout)
	}
}

// state is what a refused command must leave as it was.
type state struct {
	Lvols     []string // name, clusters
	Images    []string
	Free      int64 // clusters
	Around    []string
	Processes []int
	Spool     []string
	Tags      []string // of the shared registry, that conversions push to
}

func (g *ground) state(t *testing.T) state {
	t.Helper()
	ctx := t.Context()
	var st state
	lvols, err := g.attacher.ListLvols(ctx, &attacherv1.ListLvolsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range lvols.Lvols {
		st.Lvols = append(st.Lvols, fmt.Sprint(l.Name, " ", l.AllocatedClusters))
	}
	images, err := g.attacher.ListImages(ctx, &attacherv1.ListImagesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for _, i := range images.Images {
		st.Images = append(st.Images, i.Reference)
	}
	pool, err := g.attacher.GetStore(ctx, &attacherv1.GetStoreRequest{})
	if err != nil {
		t.Fatal(err)
	}
	st.Free = pool.FreeClusters
	st.Around = g.leftovers(t, g.server)
	st.Processes = g.lab.Pids("")
	entries, err := os.ReadDir(g.spool)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		st.Spool = append(st.Spool, e.Name())
	}
	tags, err := filepath.Glob(filepath.Join(g.registry.Dir, "docker/registry/v2/repositories/*/_manifests/tags/thaw"))
	if err != nil {
		t.Fatal(err)
	}
	st.Tags = tags
	for _, list := range [][]string{st.Lvols, st.Images, st.Around} {
		slices.Sort(list)
	}
	slices.Sort(st.Processes)
	return st
}

// unchanged waits until all is as before, and checks the store. The attacher may take
// a moment to notice the end of a command that was killed.
func (g *ground) unchanged(t *testing.T, before state) {
	t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for {
		now := g.state(t)
		if fmt.Sprint(now) == fmt.Sprint(before) {
			break
		}
		if time.Now().After(deadline) {
			t.Errorf("something was left or lost\nbefore %+v\nafter  %+v", before, now)
			break
		}
		time.Sleep(50 * time.Millisecond)
	}
	check, err := g.attacher.CheckStore(t.Context(), &attacherv1.CheckStoreRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if len(check.Problems) > 0 || len(check.ReusableBlocks) > 0 {
		t.Errorf("the store has problems or blocks of no image: %v", check)
	}
}

// refuse runs the table's commands on the server and checks each and what it left.
func (g *ground) refuse(t *testing.T, cases []bad) {
	t.Helper()
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			before := g.state(t)
			ctx, cancel := context.WithTimeout(t.Context(), commandLimit)
			defer cancel()
			command := g.server.Command(ctx, c.args...)
			if c.bare {
				command = g.lab.Command(ctx, "thaw", c.args...)
			}
			c.refused(t, run(t, command))
			g.unchanged(t, before)
		})
	}
}

// TestBadInput: whatever is wrong with what a user gives, the command says so in one
// line, with the exit status of that kind of error, and leaves nothing.
func TestBadInput(t *testing.T) {
	b := start(t)
	t.Run("commands", b.badCommands)
	t.Run("registry", b.badRegistry)
	t.Run("images", b.badImages)
	t.Run("stopping registry", b.registryStops)
	t.Run("interrupt", b.interrupt)
	t.Run("disk", b.fullDisk)
	t.Run("server", b.badServer)
	t.Run("machine", b.badMachine)
}

func (b *bench) badCommands(t *testing.T) {
	g := b.ground(t)
	if _, err := g.server.Do(t.Context(), "lvol", "create", "taken", "8MiB"); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"snapshot", "taken", "frozen"}, {"clone", "frozen", "other"}} {
		if _, err := g.server.Do(t.Context(), append([]string{"lvol"}, args...)...); err != nil {
			t.Fatal(err)
		}
	}
	notPEM := g.file(t, "ca.pem", "no certificate")
	g.refuse(t, []bad{
		{name: "unknown command", args: []string{"imgae", "list"}, code: exitInvalid, says: []string{"imgae", "did you mean image", "thaw --help"}, bare: true},
		{name: "unknown verb", args: []string{"image", "covert"}, code: exitInvalid, says: []string{"covert", "did you mean convert", "thaw image --help"}},
		{name: "unknown flag", args: []string{"image", "convert", "--fast", "a", "b"}, code: exitInvalid, says: []string{"--fast", "thaw image convert --help"}},
		{name: "flag without value", args: []string{"image", "list", "--config"}, code: exitInvalid, says: []string{"--config", "--help"}, bare: true},
		{name: "missing argument", args: []string{"image", "convert", "only-one"}, code: exitInvalid, says: []string{"SOURCE DEST"}},
		{name: "too many arguments", args: []string{"lvol", "list", "x"}, code: exitInvalid, says: []string{"lvol list"}},
		{name: "size without a unit it knows", args: []string{"lvol", "create", "x", "10potatoes"}, code: exitInvalid, says: []string{"10potatoes", "20GiB"}},
		{name: "huge size", args: []string{"lvol", "create", "x", "999999999999TiB"}, code: exitInvalid, says: []string{"999999999999TiB"}},
		{name: "lvol of that name exists", args: []string{"lvol", "create", "taken", "16MiB"}, code: exitInUse, says: []string{"taken"}},
		{name: "snapshot with clones", args: []string{"lvol", "delete", "frozen"}, code: exitInUse, says: []string{"frozen", "taken", "other"}},
		{name: "unknown lvol", args: []string{"lvol", "inspect", "nobody"}, code: exitNotFound, says: []string{"nobody"}},
		{name: "delete unknown lvol", args: []string{"lvol", "delete", "nobody"}, code: exitNotFound, says: []string{"nobody"}},
		{name: "bad lvol name", args: []string{"lvol", "create", "a/b", "8MiB"}, code: exitInvalid, says: []string{"a/b"}},
		{name: "inspect unknown image", args: []string{"image", "inspect", "registry.example/none:1"}, code: exitNotFound, says: []string{"registry.example/none:1", "thaw image list"}},
		{name: "remove unknown image", args: []string{"image", "remove", "registry.example/none:1"}, code: exitNotFound, says: []string{"registry.example/none:1", "thaw image list"}},
		{name: "mounts of unknown snapshot", args: []string{"snapshot", "mounts", "none"}, code: exitNotFound, says: []string{"none", "thaw snapshot list"}},
		{name: "unknown mode", args: g.convertArgs("a", "x", "--mode", "zfs"), code: exitInvalid, says: []string{"zfs", "overlayfs or overlaybd"}},
		{name: "unknown file system", args: g.convertArgs("a", "x", "--filesystem", "zfs"), code: exitInvalid, says: []string{"zfs", "ext4 or erofs"}},
		{name: "virtual size too small for a file system", args: g.convertArgs("a", "x", "--virtual-size", "1MiB"), code: exitInvalid, says: []string{"virtual size", "1048576", "64MiB"}},
		{name: "malformed platform", args: g.convertArgs(g.good(t, "platform"), "x", "--platform", "a/b/c/d"), code: exitInvalid, says: []string{"a/b/c/d", "os/arch"}},
		{name: "malformed source", args: g.convertArgs("registry.example/UPPER:1", "x"), code: exitInvalid, says: []string{"registry.example/UPPER:1", "image reference"}},
		{name: "source with a scheme", args: g.convertArgs("https://registry.example/app:1", "x"), code: exitInvalid, says: []string{"https://"}},
		{name: "malformed destination", args: []string{"image", "convert", "--plain-http", g.good(t, "malformed"), "registry.example/app:"}, code: exitInvalid, says: []string{"registry.example/app:"}},
		{name: "destination is a digest", args: []string{"image", "convert", "--plain-http", g.good(t, "digest"), "registry.example/app@sha256:" + strings.Repeat("0", 64)}, code: exitInvalid, says: []string{"give a tag"}},
		{name: "destination is an archive", args: []string{"image", "convert", "--plain-http", g.good(t, "archive"), "oci-archive:x.tar"}, code: exitInvalid, says: []string{"oci-archive:x.tar", "oci:DIR:TAG"}},
		{name: "no such CA file", args: g.convertArgs("a", "x", "--ca-file", "/none/ca.pem"), code: exitNotFound, says: []string{"/none/ca.pem"}},
		{name: "CA file without a certificate", args: g.convertArgs("a", "x", "--ca-file", notPEM), code: exitInvalid, says: []string{notPEM, "PEM"}},
		{name: "no such spool directory", args: []string{"image", "convert", "--plain-http", "--spool-dir", "/none", g.good(t, "spool"), g.registry.Ref("x", "1")}, code: exitNotFound, says: []string{"/none"}},
		{name: "no such source file", args: g.convertArgs("docker-archive:/none.tar", "x"), code: exitNotFound, says: []string{"/none.tar"}},
		{name: "no such layout", args: g.convertArgs("oci:/none:1", "x"), code: exitNotFound, says: []string{"/none"}},
	})
	t.Run("server is not running", func(t *testing.T) {
		nowhere := filepath.Join(g.dir, "nowhere")
		c := bad{code: exitUnavailable, says: []string{nowhere, "thaw server"}}
		for _, args := range [][]string{{"image", "list"}, {"lvol", "list"}, {"snapshot", "list"}, g.convertArgs("a", "x")} {
			c.refused(t, run(t, b.lab.Command(t.Context(), "thaw", append(args, "--run", nowhere, "--root", nowhere)...)))
		}
		c = bad{code: exitNotFound, says: []string{nowhere, "--root"}}
		c.refused(t, run(t, b.lab.Command(t.Context(), "thaw", "lvol", "check", "--run", nowhere, "--root", nowhere)))
		if _, err := os.Stat(nowhere); err == nil {
			t.Error("a refused command made its directories")
		}
	})
	t.Run("not root", func(t *testing.T) {
		before := g.state(t)
		// The lab's folder and perhaps the checkout are closed to others.
		program := b.publicCopy(t, filepath.Join(b.lab.Bin, "thaw"))
		for _, c := range []bad{
			{args: []string{"lvol", "list", "--run", g.server.Run}, says: []string{g.server.Run, "root"}},
			{args: []string{"server", "--root", "/var/lib/thaw-none", "--run", "/run/thaw-none"}, says: []string{"root"}},
		} {
			c.code = exitDenied
			command := b.lab.Command(t.Context(), program, c.args...)
			command.Dir = "/"
			command.SysProcAttr = &syscall.SysProcAttr{Credential: nobody()}
			c.refused(t, run(t, command))
		}
		g.unchanged(t, before)
	})
}

// interrupt: Ctrl-C in the middle of a layer ends the conversion, and what was being
// written is gone.
func (b *bench) interrupt(t *testing.T) {
	g := b.ground(t)
	ref := g.pushLayers(t, "interrupt", noise(1, 4<<20), noise(2, 4<<20))
	stall := newProxy(t, b.registry.Address, 6<<20, false)
	before := g.state(t)
	command := g.server.Command(t.Context(), g.convertArgs(stall.through(ref), "interrupt-dest")...)
	var stdout, stderr bytes.Buffer
	command.Stdout, command.Stderr = &stdout, &stderr
	if err := command.Start(); err != nil {
		t.Fatal(err)
	}
	work := func() bool { // a layer is being written
		return slices.ContainsFunc(g.state(t).Lvols, func(l string) bool { return strings.HasPrefix(l, "work-") })
	}
	for deadline := time.Now().Add(30 * time.Second); !work() && time.Now().Before(deadline); {
		time.Sleep(10 * time.Millisecond)
	}
	if err := command.Process.Signal(unix.SIGINT); err != nil {
		t.Fatal(err)
	}
	_ = command.Wait()
	c := bad{code: exitInterrupted, says: []string{"interrupted", "nothing was pushed", "interrupt-dest", "thaw image prune"}}
	c.refused(t, outcome{command.ProcessState.ExitCode(), stdout.String(), stderr.String()})
	// A first layer that was complete is kept for the next run, on purpose.
	if _, err := g.server.Do(t.Context(), "image", "prune"); err != nil {
		t.Fatal(err)
	}
	g.unchanged(t, before)
}

// registryStops: the registry goes away in the middle of a blob.
func (b *bench) registryStops(t *testing.T) {
	g := b.ground(t)
	ref := g.pushLayers(t, "stops", noise(3, 4<<20))
	proxy := newProxy(t, b.registry.Address, 1<<20, true)
	g.refuse(t, []bad{{
		name: "in the middle of a blob", args: g.convertArgs(proxy.through(ref), "stops-dest"),
		code: exitUnavailable, says: []string{"layer 1 of 1", proxy.address, "refused"},
	}})
}

func (b *bench) badRegistry(t *testing.T) {
	g := b.ground(t)
	ref := g.good(t, "registry")
	secret := "s3cr3t-w0rd"
	locked, err := b.lab.StartRegistry(t.Context(), lab.RegistryOptions{User: "somebody", Password: "right-" + secret})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := locked.Stop(); err != nil {
			t.Error(err)
		}
	}()
	port, err := lab.FreePort()
	if err != nil {
		t.Fatal(err)
	}
	nobodyThere := fmt.Sprintf("127.0.0.1:%d", port)
	right := g.dockerConfig(t, "right", locked.Address, "somebody", "right-"+secret)
	wrong := g.dockerConfig(t, "wrong", locked.Address, "somebody", "wrong-"+secret)
	empty := filepath.Join(g.dir, "empty-config")
	if err := os.Mkdir(empty, 0o700); err != nil {
		t.Fatal(err)
	}
	broken := filepath.Join(g.dir, "broken")
	if err := os.Mkdir(broken, 0o700); err != nil {
		t.Fatal(err)
	}
	g.file(t, "broken/config.json", `{"auths": {"`+locked.Address+`": {"auth": "`+secret)
	helper := filepath.Join(g.dir, "helper")
	if err := os.Mkdir(helper, 0o700); err != nil {
		t.Fatal(err)
	}
	g.file(t, "helper/config.json", `{"credsStore": "thaw-none"}`)

	link, err := b.lab.NewLink("")
	if err != nil {
		t.Fatal(err)
	}
	open, err := b.lab.StartRegistry(t.Context(), lab.RegistryOptions{Behind: link})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := open.Stop(); err != nil {
			t.Error(err)
		}
	}()

	private := locked.Ref("private", "1")
	to := func(dest, config string) []string {
		return []string{"image", "convert", "--plain-http", "--quiet", "--spool-dir", g.spool, "--docker-config", config, ref, dest}
	}
	hides := []string{secret}
	g.refuse(t, []bad{
		{name: "unknown tag", args: g.convertArgs(b.registry.Ref("registry", "none"), "x"), code: exitNotFound, says: []string{b.registry.Address + "/registry", "none", "check"}},
		{name: "unknown repository", args: g.convertArgs(b.registry.Ref("no/such/thing", "1"), "x"), code: exitNotFound, says: []string{"no/such/thing"}},
		{name: "unknown digest", args: g.convertArgs(b.registry.Address+"/registry@sha256:"+strings.Repeat("1", 64), "x"), code: exitNotFound, says: []string{strings.Repeat("1", 64)}},
		{name: "platform the image lacks", args: g.convertArgs(ref, "x", "--platform", "linux/s390x"), code: exitNotFound, says: []string{"linux/s390x", "linux/"}},
		{name: "wrong password", args: g.convertArgs(private, "x", "--docker-config", wrong), code: exitDenied, says: []string{locked.Address + "/private", "refused the credentials", "docker login", "--docker-config"}, hides: hides},
		{name: "no password", args: g.convertArgs(private, "x", "--docker-config", empty), code: exitDenied, says: []string{locked.Address, "credentials"}, hides: hides},
		{name: "wrong password for the destination", args: to(locked.Ref("x", "1"), wrong), code: exitDenied, says: []string{locked.Address, "credentials"}, hides: hides},
		{name: "no password for the destination", args: to(locked.Ref("x", "1"), empty), code: exitDenied, says: []string{locked.Address, "credentials"}, hides: hides},
		{name: "right password, nothing there", args: g.convertArgs(private, "x", "--docker-config", right), code: exitNotFound, says: []string{"private"}, hides: hides},
		{name: "broken docker configuration", args: g.convertArgs(private, "x", "--docker-config", broken), code: exitInvalid, says: []string{broken}, hides: hides},
		{name: "no such docker configuration", args: g.convertArgs(private, "x", "--docker-config", "/none"), code: exitNotFound, says: []string{"/none"}},
		{name: "docker configuration that is a file", args: g.convertArgs(private, "x", "--docker-config", filepath.Join(broken, "config.json")), code: exitInvalid, says: []string{"name the directory"}},
		{name: "no such credential helper", args: g.convertArgs(private, "x", "--docker-config", helper), code: exitDenied, says: []string{"docker-credential-thaw-none"}, hides: hides},
		{name: "registry that refuses connections", args: g.convertArgs(nobodyThere+"/app:1", "x"), code: exitUnavailable, says: []string{nobodyThere, "refused"}},
		{name: "destination that refuses connections", args: to(nobodyThere+"/app:1", empty), code: exitUnavailable, says: []string{nobodyThere, "refused"}},
		{name: "registry without TLS", args: []string{"image", "convert", open.Ref("app", "1"), g.registry.Ref("x", "thaw")}, code: exitDenied, says: []string{open.Address, "TLS", "--plain-http"}},
		{name: "destination without TLS", args: []string{"image", "convert", ref, open.Ref("app", "1")}, code: exitDenied, says: []string{open.Address, "TLS", "--plain-http"}},
		{name: "registry without a name", args: g.convertArgs("registry.invalid/app:1", "x"), code: exitUnavailable, says: []string{"registry.invalid"}},
	})
	t.Run("the right password works", func(t *testing.T) {
		if _, err := g.server.Do(t.Context(), to(locked.Ref("good", "1"), right)...); err != nil {
			t.Fatal(err)
		}
	})
}

// fullDisk: the disk below the pool, the pool itself and the directory for blobs in
// flight each run full; what is there already goes on working.
func (b *bench) fullDisk(t *testing.T) {
	big := [][]byte{noise(10, 40<<20)}
	for _, where := range []string{"below the pool", "in the pool"} {
		t.Run(where, func(t *testing.T) {
			var s *lab.Thaw
			if where == "in the pool" {
				s = b.thaw(t, "--config", writeFile(t, filepath.Join(t.TempDir(), "c.toml"), "[pool]\ncapacity = \"24MiB\"\n"))
			} else {
				root := b.place(t).root
				mountTmpfs(t, root, 24<<20)
				s = b.thawOn(t, root)
			}
			g := b.groundOf(t, s)
			small := g.good(t, "small")
			if _, err := g.server.Do(t.Context(), g.convertArgs(small, "small-dest")...); err != nil {
				t.Fatal(err)
			}
			source := g.pushLayers(t, "big", big...)
			for _, fs := range []string{"erofs", "ext4"} {
				g.refuse(t, []bad{{
					name: fs, args: g.convertArgs(source, "big-dest", "--filesystem", fs),
					code: exitNoSpace, says: []string{"layer 1 of 1", "no space left", "thaw image remove", "thaw image prune"},
				}})
			}
			// The store and its server are as good as before.
			if _, err := g.server.Do(t.Context(), g.convertArgs(small, "small-again", "--filesystem", "ext4")...); err != nil {
				t.Error(err)
			}
			for _, dest := range []string{"small-dest", "small-again"} {
				if _, err := g.server.Do(t.Context(), "image", "remove", b.registry.Ref(dest, "thaw")); err != nil {
					t.Error(err)
				}
			}
		})
	}
	t.Run("for blobs in flight", func(t *testing.T) {
		g := b.ground(t)
		mountTmpfs(t, g.spool, 8<<20)
		source := g.pushLayers(t, "big", big...)
		g.refuse(t, []bad{{
			name: "spool", args: g.convertArgs(source, "big-dest"),
			code: exitNoSpace, says: []string{g.spool, "--spool-dir"},
		}})
	})
	t.Run("in the image", func(t *testing.T) {
		g := b.ground(t)
		source := g.pushLayers(t, "zeros", tarball(file("zeros", make([]byte, 70<<20))))
		g.refuse(t, []bad{{
			name: "virtual size too small for the files", args: g.convertArgs(source, "x", "--virtual-size", "64MiB"),
			code: exitInvalid, says: []string{"layer 1 of 1", "virtual size"},
		}, {
			name: "virtual size too small for the file system with the files", code: exitNoSpace, says: []string{"layer 1 of 1", "no space left", "--virtual-size than 64MiB"},
			args: g.convertArgs(g.pushLayers(t, "full", tarball(file("zeros", make([]byte, 62<<20)))), "x", "--virtual-size", "64MiB", "--mode", "overlaybd"),
		}})
	})
}

// good pushes an image of one small layer that can be converted.
func (g *ground) good(t *testing.T, name string) string {
	t.Helper()
	return g.pushLayers(t, name, tarball(dir("etc"), file("etc/name", []byte(name))))
}

// pushLayers pushes an image of these layers.
func (g *ground) pushLayers(t *testing.T, name string, layers ...[]byte) string {
	t.Helper()
	image, err := recipe.Layers(layers)
	if err != nil {
		t.Fatal(err)
	}
	ref := g.registry.Ref(name, "1")
	if err := recipe.Push(t.Context(), image, ref); err != nil {
		t.Fatal(err)
	}
	return ref
}

func (g *ground) file(t *testing.T, name, content string) string {
	t.Helper()
	return writeFile(t, filepath.Join(g.dir, name), content)
}

func writeFile(t *testing.T, path, content string) string {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// dockerConfig writes a config.json as docker login does and returns its directory.
func (g *ground) dockerConfig(t *testing.T, name, registry, user, password string) string {
	t.Helper()
	dir := filepath.Join(g.dir, name)
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	config, err := json.Marshal(map[string]any{"auths": map[string]any{
		registry: map[string][]byte{"auth": []byte(user + ":" + password)}, // encoded as base64
	}})
	if err != nil {
		t.Fatal(err)
	}
	writeFile(t, filepath.Join(dir, "config.json"), string(config))
	return dir
}
