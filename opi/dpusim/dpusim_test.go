package dpusim

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/opi"
	"github.com/thaw-project/thaw/spdk"
	"github.com/thaw-project/thaw/target"
	"github.com/thaw-project/thaw/target/rpc"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// lab is a machine without an operating system, a target, and the card between them.
type lab struct {
	*Sim
	t      testing.TB
	dir    string
	client *spdk.Client
	stop   func() // ends the target
	off    func() // ends the machine
}

// machine starts QEMU. With native hot-plug and nobody who ever powered the slots, a device
// is gone at once when it is asked for; by ACPI the guest would have to answer, and there is none.
func machine(t testing.TB, dir string, native bool) (off func()) {
	t.Helper()
	const program = "qemu-system-x86_64"
	if _, err := exec.LookPath(program); err != nil {
		t.Skipf("needs %s: tools/install-deps guest installs it", program)
	}
	args := []string{"-nodefaults", "-no-user-config", "-display", "none", "-machine", "q35,accel=tcg", "-m", "64", "-S", "-qmp", "unix:" + filepath.Join(dir, "qmp") + ",server=on,wait=off"}
	if native {
		args = append(args, "-global", "ICH9-LPC.acpi-pci-hotplug-with-bridge-support=off")
	}
	for i := range 4 {
		args = append(args, "-device", fmt.Sprintf("pcie-root-port,id=rp%d,chassis=%d,slot=%d", i, i+1, i))
	}
	log, err := os.OpenFile(filepath.Join(dir, "log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	c := exec.Command(program, args...)
	c.Stdout, c.Stderr = log, log
	c.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	off = sync.OnceFunc(func() {
		c.Process.Kill() // it may have ended
		c.Wait()
		if said, _ := os.ReadFile(log.Name()); t.Failed() && len(said) > 0 {
			t.Logf("QEMU said:\n%s", said)
		}
	})
	t.Cleanup(off)
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		m, err := dial(t.Context(), filepath.Join(dir, "qmp"))
		if err == nil {
			m.close()
			return off
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
}

func serve(t testing.TB, dir string) (stop func()) {
	t.Helper()
	tg, err := target.New(target.Options{Root: filepath.Join(dir, "t"), Persist: true, RetryInterval: 50 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	l, err := rpc.Listen(filepath.Join(dir, "target"))
	if err != nil {
		t.Fatal(err)
	}
	s := rpc.Serve(l, rpc.Options{Methods: tg.Methods()})
	stop = sync.OnceFunc(func() {
		if err := errors.Join(s.Close(), tg.Close()); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(stop)
	return stop
}

func start(t testing.TB, native bool) *lab {
	t.Helper()
	dir, err := os.MkdirTemp("", "dpusim-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	l := &lab{t: t, dir: dir, off: machine(t, dir, native), stop: serve(t, dir)}
	if l.client, err = spdk.New(spdk.Options{Socket: filepath.Join(dir, "target")}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.client.Close() })
	l.Sim, err = New(Options{QMP: filepath.Join(dir, "qmp"), Target: l.client, Functions: 4, Dir: filepath.Join(dir, "s"), UnplugPatience: 3 * time.Second})
	if err != nil {
		t.Fatal(err)
	}
	return l
}

const prefix = "nqn.2014-08.org.example:"

// subsystem makes a subsystem with a disk filled with b.
func (l *lab) subsystem(name string, b byte) string {
	l.t.Helper()
	ctx, nqn := l.t.Context(), prefix+name
	path := filepath.Join(l.dir, name)
	if err := os.WriteFile(path, []byte(strings.Repeat(string(rune(b)), 1<<20)), 0o600); err != nil {
		l.t.Fatal(err)
	}
	_, err := l.client.BdevAIOCreate(ctx, spdk.BdevAIOCreateParams{Name: name, Filename: path, BlockSizeBytes: 512})
	if err == nil {
		err = l.client.NvmfCreateSubsystem(ctx, spdk.SubsystemParams{NQN: nqn, SerialNumber: "SN-" + name})
	}
	if err == nil {
		_, err = l.client.NvmfSubsystemAddNs(ctx, nqn, spdk.NvmeNamespace{BdevName: name})
	}
	if err != nil {
		l.t.Fatal(err)
	}
	return nqn
}

func fn(i int) opi.Function { return opi.Function{Physical: uint16(i)} }

// qmp runs f with the machine's monitor.
func (l *lab) qmp(f func(m *monitor) error) {
	l.t.Helper()
	if err := l.with(l.t.Context(), f); err != nil {
		l.t.Fatal(err)
	}
}

// wantShown fails the test unless a function is whole: QEMU has the device with the
// subsystem's serial number, and reads b from its disk.
func (l *lab) wantShown(function int, nqn, serial string, b byte) {
	l.t.Helper()
	list, err := l.Plugged(l.t.Context(), nqn)
	if err != nil || len(list) != 1 || list[0] != fn(function) {
		l.t.Fatalf("plugged: %v %v, want function %d", list, err, function)
	}
	n := name(function, nqn)
	l.qmp(func(m *monitor) error {
		parts, err := l.read(l.t.Context(), m)
		if err != nil {
			return err
		}
		if p := parts[n]; p == nil || !p.device || !p.node || p.export == nil {
			l.t.Errorf("%s: %+v", n, p)
		}
		var got string
		if err := m.do("qom-get", map[string]any{"path": "/machine/peripheral/" + n, "property": "serial"}, &got); err != nil || got != serial {
			l.t.Errorf("serial number %q %v, want %q", got, err, serial)
		}
		// What it reads, it says on its standard output.
		before, err := os.ReadFile(filepath.Join(l.dir, "log"))
		if err != nil {
			return err
		}
		if err := m.do("human-monitor-command", map[string]any{"command-line": fmt.Sprintf(`qemu-io %s "read -P %d 0 1M"`, n, b)}, nil); err != nil {
			return err
		}
		after, err := os.ReadFile(filepath.Join(l.dir, "log"))
		if said := string(after[len(before):]); !strings.Contains(said, "read 1048576/1048576 bytes") || strings.Contains(said, "failed") {
			l.t.Errorf("QEMU reads: %s", said)
		}
		return err
	})
}

// wantNothing fails the test if anything is left.
func (l *lab) wantNothing() {
	l.t.Helper()
	l.qmp(func(m *monitor) error {
		parts, err := l.read(l.t.Context(), m)
		if len(parts) != 0 {
			l.t.Errorf("left: %v", parts)
		}
		return err
	})
	if left, err := os.ReadDir(l.o.Dir); err != nil || len(left) != 0 {
		l.t.Errorf("left: %v %v", left, err)
	}
}

func (l *lab) wantKind(err error, k kind.Kind, what string) {
	l.t.Helper()
	if !errors.Is(err, k) {
		l.t.Errorf("%s: %v, want %s", what, err, k)
	}
}

func TestPlug(t *testing.T) {
	l := start(t, true)
	ctx := t.Context()
	a, b := l.subsystem("a", 'a'), l.subsystem("b", 'b')
	l.wantKind(l.Plug(ctx, a, fn(4)), kind.NotFound, "a function that is not there")
	l.wantKind(l.Plug(ctx, a, opi.Function{Virtual: 1}), kind.NotFound, "a virtual function")
	l.wantKind(l.Plug(ctx, prefix+"nosuch", fn(0)), kind.NotFound, "a subsystem that is not there")
	l.wantKind(l.Unplug(ctx, a, fn(0)), kind.NotFound, "a function that is not plugged")
	for range 2 { // again, it is there
		began := time.Now()
		if err := l.Plug(ctx, a, fn(0)); err != nil {
			t.Fatal(err)
		}
		t.Logf("plugged in %s", time.Since(began))
		l.wantShown(0, a, "SN-a", 'a')
	}
	l.wantKind(l.Plug(ctx, b, fn(0)), kind.InUse, "a function of another subsystem")
	if err := l.Plug(ctx, b, fn(3)); err != nil {
		t.Fatal(err)
	}
	l.wantShown(3, b, "SN-b", 'b')
	// A target that goes and comes back: QEMU waits. One that knows nothing has no subsystem.
	l.stop()
	l.stop = serve(t, l.dir)
	l.wantShown(0, a, "SN-a", 'a')
	for range 2 {
		if err := l.Unplug(ctx, a, fn(0)); err != nil && !errors.Is(err, kind.NotFound) {
			t.Fatal(err)
		}
	}
	if err := l.Unplug(ctx, b, fn(3)); err != nil {
		t.Fatal(err)
	}
	l.wantNothing()
}

// TestReadOnly has a disk that nobody can write: the drive is write-protected.
func TestReadOnly(t *testing.T) {
	l := start(t, true)
	ctx := t.Context()
	nqn := prefix + "ro"
	path := filepath.Join(l.dir, "ro")
	if err := os.WriteFile(path, []byte(strings.Repeat("r", 1<<20)), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := l.client.BdevAIOCreate(ctx, spdk.BdevAIOCreateParams{Name: "ro", Filename: path, BlockSizeBytes: 4096, ReadOnly: true})
	err = errors.Join(err, l.client.NvmfCreateSubsystem(ctx, spdk.SubsystemParams{NQN: nqn, SerialNumber: "RO"}))
	_, aerr := l.client.NvmfSubsystemAddNs(ctx, nqn, spdk.NvmeNamespace{BdevName: "ro"})
	if err := errors.Join(err, aerr, l.Plug(ctx, nqn, fn(1))); err != nil {
		t.Fatal(err)
	}
	l.wantShown(1, nqn, "RO", 'r')
	l.qmp(func(m *monitor) error {
		var nodes []struct {
			Name string `json:"node-name"`
			RO   bool
		}
		err := m.do("query-named-block-nodes", map[string]any{"flat": true}, &nodes)
		if len(nodes) != 1 || !nodes[0].RO {
			t.Errorf("nodes: %+v", nodes)
		}
		return err
	})
	if err := l.Unplug(ctx, nqn, fn(1)); err != nil {
		t.Fatal(err)
	}
	l.wantNothing()
}

// TestPart plugs and unplugs what somebody left behind who was killed between two steps,
// for every set of steps.
func TestPart(t *testing.T) {
	l := start(t, true)
	ctx := t.Context()
	nqn := l.subsystem("a", 'a')
	n := name(2, nqn)
	undo := map[string]func(m *monitor) error{
		"device": func(m *monitor) error {
			if err := m.do("device_del", map[string]any{"id": n}, nil); err != nil {
				return err
			}
			if !m.deleted(n, 5*time.Second) {
				return errors.New("the device stays")
			}
			return nil
		},
		"node":   func(m *monitor) error { return m.do("blockdev-del", map[string]any{"node-name": n}, nil) },
		"export": func(*monitor) error { return l.client.ThawNBDUnexport(ctx, l.socket(n)) },
	}
	for _, missing := range [][]string{{"device"}, {"device", "node"}, {"device", "node", "export"}, {"export"}, {"device", "export"}} {
		for _, finish := range []string{"plug", "unplug"} {
			t.Run(strings.Join(missing, " and ")+" missing, "+finish, func(t *testing.T) {
				if err := l.Plug(ctx, nqn, fn(2)); err != nil {
					t.Fatal(err)
				}
				for _, what := range missing {
					l.qmp(undo[what])
				}
				list, err := l.Plugged(ctx, nqn)
				if want := len(missing) < 3; err != nil || (len(list) == 1) != want {
					t.Errorf("plugged: %v %v", list, err)
				}
				if finish == "plug" {
					if err := l.Plug(ctx, nqn, fn(2)); err != nil {
						t.Fatal(err)
					}
					l.wantShown(2, nqn, "SN-a", 'a')
				}
				if err := l.Unplug(ctx, nqn, fn(2)); err != nil && !errors.Is(err, kind.NotFound) {
					t.Fatal(err)
				}
				l.wantNothing()
			})
		}
	}
}

// TestForgotten plugs a function that still shows what the target does not know any more,
// and a subsystem that was made anew under the same name.
func TestForgotten(t *testing.T) {
	l := start(t, true)
	ctx := t.Context()
	a, b := l.subsystem("a", 'a'), l.subsystem("b", 'b')
	if err := l.Plug(ctx, a, fn(0)); err != nil {
		t.Fatal(err)
	}
	if err := l.client.NvmfDeleteSubsystem(ctx, a); err != nil {
		t.Fatal(err)
	}
	if err := l.Plug(ctx, b, fn(0)); err != nil {
		t.Fatal(err)
	}
	l.wantShown(0, b, "SN-b", 'b')
	if err := l.client.NvmfDeleteSubsystem(ctx, b); err != nil {
		t.Fatal(err)
	}
	if err := l.client.NvmfCreateSubsystem(ctx, spdk.SubsystemParams{NQN: b, SerialNumber: "SN-new"}); err != nil {
		t.Fatal(err)
	}
	l.wantKind(l.Plug(ctx, b, fn(0)), kind.NotFound, "a subsystem without a disk")
	if _, err := l.client.NvmfSubsystemAddNs(ctx, b, spdk.NvmeNamespace{BdevName: "a"}); err != nil {
		t.Fatal(err)
	}
	l.wantKind(l.Plug(ctx, b, fn(0)), kind.InUse, "a function that shows an earlier subsystem of the name")
	if err := l.Unplug(ctx, b, fn(0)); err != nil {
		t.Fatal(err)
	}
	l.wantNothing()
}

// TestRestartedMachine has the host lose power: it comes back without its functions.
func TestRestartedMachine(t *testing.T) {
	l := start(t, true)
	ctx := t.Context()
	nqn := l.subsystem("a", 'a')
	if err := l.Plug(ctx, nqn, fn(0)); err != nil {
		t.Fatal(err)
	}
	l.off()
	_, err := l.Plugged(ctx, nqn)
	l.wantKind(err, kind.Unavailable, "a machine that is off")
	l.off = machine(t, l.dir, true)
	if err := l.Plug(ctx, nqn, fn(0)); err != nil {
		t.Fatal(err)
	}
	l.wantShown(0, nqn, "SN-a", 'a')
}

// TestStuckHost has a host that does not let go, and then does.
func TestStuckHost(t *testing.T) {
	l := start(t, false)
	ctx := t.Context()
	nqn := l.subsystem("a", 'a')
	if err := l.Plug(ctx, nqn, fn(0)); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	l.wantKind(l.Unplug(ctx, nqn, fn(0)), kind.InUse, "a host that does not answer")
	if took := time.Since(began); took > 10*time.Second {
		t.Errorf("it took %s", took)
	}
	l.wantShown(0, nqn, "SN-a", 'a')
	short, cancel := context.WithTimeout(ctx, 100*time.Millisecond)
	defer cancel()
	if err := l.Unplug(short, nqn, fn(0)); err == nil {
		t.Error("unplugged by a host that does not answer")
	}
}

// TestConcurrent has two bridges plug and unplug at once.
func TestConcurrent(t *testing.T) {
	l := start(t, true)
	other, err := New(l.o)
	if err != nil {
		t.Fatal(err)
	}
	var nqns []string
	for i := range 4 {
		nqns = append(nqns, l.subsystem(fmt.Sprint("d", i), byte('a'+i)))
	}
	var wg sync.WaitGroup
	for i, nqn := range nqns {
		wg.Go(func() {
			for round := range 5 {
				sim := []*Sim{l.Sim, other}[(i+round)%2]
				if err := sim.Plug(t.Context(), nqn, fn(i)); err != nil {
					t.Errorf("plug %d: %v", i, err)
				}
				if round == 4 {
					return
				}
				if err := sim.Unplug(t.Context(), nqn, fn(i)); err != nil {
					t.Errorf("unplug %d: %v", i, err)
				}
			}
		})
	}
	wg.Wait()
	for i, nqn := range nqns {
		l.wantShown(i, nqn, fmt.Sprint("SN-d", i), byte('a'+i))
	}
}

// BenchmarkPlug is what a drive takes on our side: the target's export, QEMU's connection
// to it and the device.
func BenchmarkPlug(b *testing.B) {
	l := start(b, true)
	nqn := l.subsystem("a", 'a')
	var plug, unplug time.Duration
	for b.Loop() {
		began := time.Now()
		if err := l.Plug(b.Context(), nqn, fn(0)); err != nil {
			b.Fatal(err)
		}
		plugged := time.Now()
		if err := l.Unplug(b.Context(), nqn, fn(0)); err != nil {
			b.Fatal(err)
		}
		plug, unplug = plug+plugged.Sub(began), unplug+time.Since(plugged)
	}
	b.ReportMetric(float64(plug.Microseconds())/1e3/float64(b.N), "plug-ms")
	b.ReportMetric(float64(unplug.Microseconds())/1e3/float64(b.N), "unplug-ms")
}
