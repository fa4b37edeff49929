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

// inGuest are the tests of presenters that need another kernel: the conformance suite
// first of all.
var inGuest = []struct {
	name, pkg, match, before string
}{
	{"nbd", "nbd", "^(TestConformance|TestKernel)$", ""}, // it loads the module itself
	{"ublk", "ublk", "^TestKernelConformance$", "modprobe ublk_drv"},
	{"tcp", "fabrics", "^(TestConformance(KernelTCP)?|TestTarget.*)$", "modprobe -a nvme-tcp nvmet-tcp"},
	{"rdma", "fabrics", "^TestConformanceKernelRDMA$", `modprobe -a crc32_generic rdma_rxe nvme-rdma nvmet-rdma rdma_ucm ib_uverbs
		rdma link add rxe0 type rxe netdev eth0
		await '[ -e /sys/class/infiniband/rxe0 ]'`},
	{"fuse", "fuse", "^TestConformance$", "modprobe -a fuse loop"},
	{"blockdev", "blockdev", "^TestServeThroughReclaim$", ""},
}

// TestGuest runs them in one guest. THAW_VM_BENCH adds benchmarks, as go test -bench
// does.
func TestGuest(t *testing.T) {
	if os.Getenv(guest.Environment) != "1" {
		t.Skipf("needs a guest, which takes time: run make test-vm, or set %s=1", guest.Environment)
	}
	dir := t.TempDir()
	files := make(map[string]string)
	for _, c := range inGuest {
		program := filepath.Join(dir, c.pkg)
		if files[c.pkg] != "" {
			continue
		}
		build := exec.Command("go", "test", "-c", "-o", program, "github.com/thaw-project/thaw/node/present/"+c.pkg)
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			t.Fatalf("build the tests of %s: %v\n%s", c.pkg, err, out)
		}
		files[c.pkg] = program
	}
	g := guest.New(t, guest.Options{CPUs: 2, MemoryMB: 1536, ScratchMB: 1024, Files: files})
	for _, c := range inGuest {
		t.Run(c.name, func(t *testing.T) {
			// What the kernel complains about counts, and so does a test that was skipped.
			p, err := g.Start(t.Context(), `set -o pipefail
				export TMPDIR=/scratch # not every kernel target serves files of a tmpfs
				cd /tmp
				`+c.before+`
				dmesg -C
				/host/`+c.pkg+` -test.v -test.timeout=4m -test.run '`+c.match+`' -test.bench '`+cmp.Or(os.Getenv("THAW_VM_BENCH"), "^$")+`' 2>&1 | tee /tmp/log; code=$?
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
