package failpoint

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestOrdinaryBuild reads the compiled command: without the tag nothing is left of what
// kills.
func TestOrdinaryBuild(t *testing.T) {
	if got := testing.AllocsPerRun(100, func() { Reach("part.operation: step") }); got != 0 && !Enabled {
		t.Errorf("%v allocations", got)
	}
	out, err := exec.Command("go", "list", "-deps", "-f", "{{.ImportPath}}", ".").CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for path := range strings.FieldsSeq(string(out)) {
		if strings.HasPrefix(path, "golang.org/") || path == "os" {
			t.Errorf("an ordinary build brings %s", path)
		}
	}
}

// TestWithTag runs this package's tests once more, built with the tag.
func TestWithTag(t *testing.T) {
	if Enabled {
		t.Skip("this binary has the tag already, and the test builds one that has: run without -tags failpoint")
	}
	binary := filepath.Join(t.TempDir(), "failpoint.test")
	build := exec.Command("go", "test", "-c", "-tags", "failpoint", "-o", binary, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	out, err := exec.Command(binary, "-test.v").CombinedOutput()
	if err != nil || !strings.Contains(string(out), "--- PASS: TestKill") {
		t.Fatalf("%v\n%s", err, out)
	}
}
