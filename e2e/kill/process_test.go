package kill

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/thaw-project/thaw/e2e/lab"
)

// startTime bounds how long a process takes to serve after it was started.
const startTime = 20 * time.Second

// kill is a point at which a member is to die.
type kill struct {
	member, point string
	nth           int // from 1
}

func (k kill) String() string { return fmt.Sprintf("%s at %q@%d", k.member, k.point, k.nth) }

// member is a process of a chain. It is started again whenever it dies of SIGKILL.
type member struct {
	name   string
	args   []string // without the program
	socket string   // where it serves
	// serves, when set, waits until it does more than listen.
	serves func(ctx context.Context) error
	// started, when set, is called after every start: what others than the chain keep there.
	started func(ctx context.Context) error
	raw     bool // not built with failpoints: args begin with the program
}

// chain is a set of members, and who kills and starts them.
type chain struct {
	t   testing.TB
	lab *lab.Lab
	dir string

	members []*member
	guests  []string // processes that come and go, and may be killed too

	wg      sync.WaitGroup // supervisors
	mu      sync.Mutex
	running map[string]*lab.Process // guarded by mu, as all below; by name
	planned []kill                  // those to come, the first is armed
	dead    []death
	closing bool
	failed  bool
	broken  error            // of a process that died of itself or did not start
	down    int              // members that are being started
	first   map[string]int64 // how long the traces were at the first death, or when kills were planned
}

// death is a kill that took place.
type death struct {
	kill
	at    time.Time
	again time.Duration // until it served again
}

// binary is thaw with failpoints, or what THAW_KILL_BINARY names.
var binary = sync.OnceValues(func() (string, error) {
	if path := os.Getenv("THAW_KILL_BINARY"); path != "" {
		return path, nil
	}
	root, err := lab.ModuleRoot()
	if err != nil {
		return "", err
	}
	out := filepath.Join(root, "out", "kill", "thaw")
	if err := os.MkdirAll(filepath.Dir(out), 0o755); err != nil {
		return "", err
	}
	c := exec.Command("go", "build", "-tags", "failpoint", "-trimpath", "-ldflags", "-s -w", "-o", out, "./cmd/thaw")
	c.Dir = root
	c.Env = append(os.Environ(), "CGO_ENABLED=0")
	if text, err := c.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build thaw with failpoints: %w\n%s", err, text)
	}
	return out, nil
})

// newChain makes a chain without members.
func newChain(t testing.TB) *chain {
	t.Helper()
	if os.Getenv("THAW_E2E") == "" {
		t.Skip("killing the chain's processes needs root and minutes: run make e2e, or make test-kill")
	}
	if _, err := binary(); err != nil {
		t.Fatal(err)
	}
	l, err := lab.New()
	if err != nil {
		t.Fatal(err)
	}
	c := &chain{t: t, lab: l, dir: l.Dir, running: map[string]*lab.Process{}}
	t.Cleanup(c.close)
	return c
}

func (c *chain) path(elem ...string) string {
	return filepath.Join(append([]string{c.dir}, elem...)...)
}

func (c *chain) armed(name string) string { return c.path(name + ".kill") }
func (c *chain) trace(name string) string { return c.path(name + ".trace") }

// add starts a member and keeps it running.
func (c *chain) add(m *member) {
	c.t.Helper()
	c.members = append(c.members, m)
	if err := c.start(m); err != nil {
		c.t.Fatal(err)
	}
	c.wg.Add(1)
	go c.keep(m)
}

func (c *chain) start(m *member) error {
	program, err := binary()
	if err != nil {
		return err
	}
	args := append([]string{program}, m.args...)
	if m.raw {
		args = m.args
	}
	ctx, cancel := context.WithTimeout(context.Background(), startTime)
	defer cancel()
	os.Remove(m.socket)
	p, err := c.lab.Start(lab.Spec{Name: m.name, Args: args, Env: []string{
		"THAW_FAILPOINT_FILE=" + c.armed(m.name), "THAW_FAILPOINT_TRACE=" + c.trace(m.name),
	}})
	if err != nil {
		return err
	}
	c.mu.Lock()
	c.running[m.name] = p
	c.mu.Unlock()
	for {
		nc, err := net.Dial("unix", m.socket)
		if err == nil {
			nc.Close()
			break
		}
		if !p.Running() {
			return nil // keep sees how it died
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s does not serve after %s: %w; the end of its log:\n%s", m.name, startTime, err, p.Log(4096))
		case <-time.After(2 * time.Millisecond):
		}
	}
	for _, f := range []func(context.Context) error{m.serves, m.started} {
		if f == nil {
			continue
		}
		// It may be killed meanwhile.
		for err := f(ctx); err != nil && p.Running(); err = f(ctx) {
			select {
			case <-ctx.Done():
				return fmt.Errorf("%s is not ready after %s: %w; the end of its log:\n%s", m.name, startTime, err, p.Log(4096))
			case <-time.After(5 * time.Millisecond):
			}
		}
	}
	return nil
}

// keep starts a member again when it was killed, until the chain closes.
func (c *chain) keep(m *member) {
	defer c.wg.Done()
	for {
		c.mu.Lock()
		p := c.running[m.name]
		c.mu.Unlock()
		err := p.Wait(context.Background())
		at := time.Now()
		c.mu.Lock()
		if c.closing {
			c.mu.Unlock()
			return
		}
		if err = c.died(m, p, err, at); err != nil {
			c.broken = errors.Join(c.broken, err)
			c.mu.Unlock()
			return
		}
		n := len(c.dead) - 1
		c.down++
		c.mu.Unlock()
		err = c.start(m)
		c.mu.Lock()
		c.down--
		c.broken = errors.Join(c.broken, err)
		c.dead[n].again = time.Since(at)
		c.mu.Unlock()
		if err != nil {
			return
		}
	}
}

// died takes note of a death and arms the next kill. The caller holds c.mu.
func (c *chain) died(m *member, p *lab.Process, how error, at time.Time) error {
	var exit *exec.ExitError
	killed := errors.As(how, &exit) && exit.Sys().(syscall.WaitStatus).Signal() == syscall.SIGKILL
	if !killed || len(c.planned) == 0 || c.planned[0].member != m.name {
		return fmt.Errorf("%s ended by itself: %v; the end of its log:\n%s", m.name, how, p.Log(8192))
	}
	return c.note(at)
}

// guestDied takes note that a guest died of SIGKILL, and tells whether it was to.
func (c *chain) guestDied(name string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.planned) == 0 || c.planned[0].member != name {
		return false
	}
	c.broken = errors.Join(c.broken, c.note(time.Now()))
	return true
}

// note takes note of the death that was planned next. The caller holds c.mu.
func (c *chain) note(at time.Time) error {
	if len(c.dead) == 0 {
		c.first = c.lengths()
	}
	c.dead = append(c.dead, death{kill: c.planned[0], at: at})
	c.planned = c.planned[1:]
	return c.arm()
}

// arm tells the first of the planned kills to its member. The caller holds c.mu.
func (c *chain) arm() error {
	if len(c.planned) == 0 {
		return nil
	}
	k := c.planned[0]
	path := c.armed(k.member)
	if err := os.WriteFile(path+".new", fmt.Appendf(nil, "%s=kill@%d", k.point, k.nth), 0o600); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}

// plan arms kills, each once the one before took place.
func (c *chain) plan(kills []kill) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.planned, c.dead, c.first = slices.Clone(kills), nil, c.lengths()
	return c.arm()
}

// disarm takes back what has not taken place, and returns what has.
func (c *chain) disarm() []death {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, name := range c.names() {
		os.Remove(c.armed(name))
	}
	// One that was on its way out when its file went is still expected.
	return slices.Clone(c.dead)
}

// settled waits until all members run and serve.
func (c *chain) settled(ctx context.Context) error {
	for {
		c.mu.Lock()
		down, broken := c.down, c.broken
		for _, p := range c.running {
			if !p.Running() {
				down++
			}
		}
		c.mu.Unlock()
		if broken != nil || down == 0 {
			return broken
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%d members are not back: %w", down, ctx.Err())
		case <-time.After(2 * time.Millisecond):
		}
	}
}

// ok is what is wrong with the processes.
func (c *chain) ok() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.broken
}

// names are those of members and guests.
func (c *chain) names() []string {
	names := slices.Clone(c.guests)
	for _, m := range c.members {
		names = append(names, m.name)
	}
	return names
}

// lengths are those of the traces.
func (c *chain) lengths() map[string]int64 {
	n := make(map[string]int64)
	for _, name := range c.names() {
		if st, err := os.Stat(c.trace(name)); err == nil {
			n[name] = st.Size()
		}
	}
	return n
}

// marks are the lengths of the traces at the first death, or when kills were planned.
func (c *chain) marks() map[string]int64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.first
}

// reached returns the points that were reached since the marks, by member, in order.
func (c *chain) reached(marks map[string]int64) (map[string][]string, error) {
	all := map[string][]string{}
	for _, name := range c.names() {
		raw, err := os.ReadFile(c.trace(name))
		if err != nil && !os.IsNotExist(err) {
			return nil, err
		}
		for line := range strings.Lines(string(raw[min(marks[name], int64(len(raw))):])) {
			all[name] = append(all[name], strings.TrimSuffix(line, "\n"))
		}
	}
	return all, nil
}

func (c *chain) close() {
	c.mu.Lock()
	if c.closing {
		c.mu.Unlock()
		return
	}
	c.closing = true
	for i := len(c.members) - 1; i >= 0; i-- {
		if p := c.running[c.members[i].name]; p != nil && p.Running() {
			syscall.Kill(p.Pid(), syscall.SIGKILL)
		}
	}
	c.mu.Unlock()
	c.wg.Wait()
	if c.failed {
		c.save()
	}
	if err := c.lab.Close(); err != nil {
		c.t.Error(err)
	}
}

// save keeps the logs of a failed test.
func (c *chain) save() {
	root, err := lab.ModuleRoot()
	if err != nil {
		return
	}
	to := filepath.Join(root, "out", "kill", strings.ReplaceAll(c.t.Name(), "/", "-")+filepath.Ext(c.dir))
	os.RemoveAll(to)
	if err := os.CopyFS(to, os.DirFS(c.path("log"))); err != nil {
		c.t.Log(err)
		return
	}
	c.t.Logf("logs are in %s", to)
}
