package presenttest_test

import (
	"cmp"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/thaw-project/thaw/e2e/guest"
)

// TestGuest runs the tests of presenters that need another kernel, in a guest: the
// conformance suite first of all. THAW_VM_RUN chooses among them, as go test -run does;
// THAW_VM_BENCH adds benchmarks, as -bench does.
func TestGuest(t *testing.T) {
	for _, c := range []struct {
		name    string
		pkg     string
		modules []string
		match   string
		before  string
	}{
		{"nbd", "nbd", []string{"nbd"}, "^(TestConformance|TestKernel)$", ""},
		{"tcp", "fabrics", []string{"nvme-tcp", "nvmet-tcp"}, "^TestConformance(KernelTCP)?$", ""},
		{"rdma", "fabrics", []string{"nvme-rdma", "nvmet-rdma", "rdma_rxe", "crc32_generic", "rdma_ucm", "ib_uverbs"}, "^TestConformanceKernelRDMA$",
			"rdma link add rxe0 type rxe netdev eth0\nawait '[ -e /sys/class/infiniband/rxe0 ]'"},
		{"fuse", "fuse", []string{"fuse", "loop"}, "^TestConformance$", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			if os.Getenv(guest.Environment) != "1" {
				t.Skipf("needs a guest, which takes time: run make test-vm, or set %s=1", guest.Environment)
			}
			program := filepath.Join(t.TempDir(), "test")
			build := exec.Command("go", "test", "-c", "-o", program, "github.com/thaw-project/thaw/node/present/"+c.pkg)
			build.Env = append(os.Environ(), "CGO_ENABLED=0")
			if out, err := build.CombinedOutput(); err != nil {
				t.Fatalf("build the tests of %s: %v\n%s", c.pkg, err, out)
			}
			g := guest.New(t, guest.Options{Modules: c.modules, CPUs: 2, MemoryMB: 1536, Files: map[string]string{"test": program}})
			match := cmp.Or(os.Getenv("THAW_VM_RUN"), c.match)
			bench := cmp.Or(os.Getenv("THAW_VM_BENCH"), "^$")
			// What the kernel complains about counts, and so does a test that was skipped.
			p, err := g.Start(t.Context(), `set -o pipefail
				cd /tmp
				`+c.before+`
				/host/test -test.v -test.timeout=4m -test.run '`+match+`' -test.bench '`+bench+`' 2>&1 | tee /tmp/log; code=$?
				[ $code = 0 ] || { echo w > /proc/sysrq-trigger; dmesg | tail -n 150; }
				! dmesg | grep -E 'WARNING|BUG:|Oops|hung task' || code=1
				! grep -E '^ *--- SKIP' /tmp/log || code=1
				exit $code`, nil)
			if err != nil {
				t.Fatal(err)
			}
			for shown, ended := 0, false; !ended; {
				select {
				case <-p.Done():
					ended = true
				case <-time.After(time.Second):
				}
				out := p.Output()
				if testing.Verbose() {
					os.Stderr.WriteString(out[shown:])
				}
				shown = len(out)
			}
			if code, err := p.Wait(t.Context()); code != 0 || err != nil {
				t.Errorf("status %d, %v\n%s", code, err, p.Output())
			}
		})
	}
}
