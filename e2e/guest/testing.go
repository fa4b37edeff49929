package guest

import (
	"context"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// Environment is the variable that must be 1 for tests to start guests.
const Environment = "THAW_VM"

// Require skips the test when guests are not wanted. New does so too; who has work to do
// before a guest starts calls it first.
func Require(t testing.TB) {
	t.Helper()
	if os.Getenv(Environment) != "1" {
		t.Skipf("needs a guest, which takes time: run make test-vm, or set %s=1", Environment)
	}
}

// New starts a guest for a test, or skips it when guests are not wanted. The guest ends
// with the test; when that failed, the end of the console is logged.
func New(t testing.TB, o Options) *Guest {
	t.Helper()
	Require(t)
	if o.Log == nil {
		o.Log = t.Output()
	}
	begin := time.Now()
	g, err := Start(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("guest is up after %.1f s", time.Since(begin).Seconds())
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the guest's console ends with:\n%s", g.Console())
		}
		if err := g.Close(); err != nil {
			t.Errorf("close guest: %v", err)
		}
	})
	return g
}

// Must runs a script with `set -e` and pipefail, and returns what it printed. It ends the
// test unless the script ends with status 0 in two minutes.
func (g *Guest) Must(t testing.TB, script string) string {
	t.Helper()
	return g.MustWithin(t, defaultTimeout, script)
}

// MustWithin is Must with another limit.
func (g *Guest) MustWithin(t testing.TB, limit time.Duration, script string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	out, code, err := g.Run(ctx, "set -e -o pipefail\n"+script)
	if err != nil {
		t.Fatal(err)
	}
	if code != 0 {
		t.Fatalf("in guest: status %d of\n%s\noutput:\n%s", code, strings.TrimSpace(script), out)
	}
	return out
}

// Build builds a program of the module, static, from the source of the moment: for this
// machine and the guest. The name is that of its package, such as cmd/thaw.
func Build(t testing.TB, name string) (file string) {
	t.Helper()
	root, err := moduleRoot()
	if err != nil {
		t.Fatal(err)
	}
	file = filepath.Join(t.TempDir(), path.Base(name))
	c := exec.CommandContext(t.Context(), "go", "build", "-trimpath", "-o", file, "./"+name)
	c.Dir = root
	c.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := c.CombinedOutput(); err != nil {
		t.Fatalf("build %s: %v\n%s", name, err, out)
	}
	return file
}
