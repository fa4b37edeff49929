package fabrics

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/node/present"
	"github.com/thaw-project/thaw/node/present/presenttest"
	"github.com/thaw-project/thaw/target/nvmf"
)

// store is a target that shows files to this machine: a block is named by its path.
type store interface {
	Attach(ctx context.Context, target, path string) (Export, error)
	Detach(ctx context.Context, target, path string) error
}

// The serving processes learn by the environment which store they use, and where it is.
const (
	storeEnv  = "THAW_FABRICS_TEST_STORE" // "ours", "tcp" or "rdma"
	socketEnv = "THAW_FABRICS_TEST_SOCKET"
	shownEnv  = "THAW_FABRICS_TEST_SHOWN" // paths that the target shows from its start
	targetArg = "test-target"
)

func envStore() store {
	switch kind := os.Getenv(storeEnv); kind {
	case "ours":
		return ourTarget{os.Getenv(socketEnv)}
	default:
		return nvmet{kind}
	}
}

var subject = presenttest.Subject{
	Serve: func(dir string) (presenttest.Served, error) {
		s := envStore()
		return New(context.Background(), Options{
			StatePath: filepath.Join(dir, "fabrics.json"), Attach: s.Attach, Detach: s.Detach,
			HeaderDigest: true, DataDigest: true,
			Logger: slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn})),
		})
	},
	Source: func(path string, _ bool) present.Source {
		return present.Source{Kind: present.SourceLvol, Lvol: path, Target: "store", Path: path}
	},
	ReadOnlyOnly: true,
	Left: func(t testing.TB, _ string) {
		list, err := controllers(sysfs)
		if err != nil || len(list) != 0 {
			t.Errorf("controllers left: %+v, %v", list, err)
		}
	},
	Abandon: func(string) {
		list, _ := controllers(sysfs)
		for _, c := range list {
			linux{}.Write(context.Background(), "class/nvme/"+c.Name+"/delete_controller", "1")
		}
	},
}

func TestMain(m *testing.M) {
	presenttest.Child(subject)
	if len(os.Args) == 3 && os.Args[1] == targetArg {
		if err := serveTarget(os.Args[2]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// needKernel skips where the real thing cannot run; presenttest's test runs these tests
// in a guest.
func needKernel(t testing.TB, transport string) {
	t.Helper()
	if err := Probe(t.Context(), transport); kind.Of(err) == kind.Unsupported || kind.Of(err) == kind.Denied {
		t.Skipf("runs in a guest (make test-vm): %v", err)
	} else if err != nil {
		t.Fatal(err)
	}
}

// TestConformance runs the suite over our own target.
func TestConformance(t *testing.T) {
	needKernel(t, TransportTCP)
	defer startTarget(t)()
	presenttest.Conformance(t, subject)
}

// TestConformanceKernelTCP and TestConformanceKernelRDMA run it over the kernel's target.
func TestConformanceKernelTCP(t *testing.T)  { kernelTarget(t, TransportTCP) }
func TestConformanceKernelRDMA(t *testing.T) { kernelTarget(t, TransportRDMA) }

func kernelTarget(t *testing.T, transport string) {
	needKernel(t, transport)
	t.Setenv(storeEnv, transport)
	if err := (nvmet{transport}).start(); err != nil {
		t.Skipf("no kernel target over %s: %v", transport, err)
	}
	t.Cleanup(func() {
		if err := (nvmet{transport}).stop(); err != nil {
			t.Errorf("stop the kernel's target: %v", err)
		}
	})
	presenttest.Conformance(t, subject)
}

// exportOf is what every store here derives from a path.
func exportOf(path, subsystem string, portals ...Portal) (Export, error) {
	st, err := os.Stat(path)
	if err != nil {
		return Export{}, err
	}
	return Export{Subsystem: subsystem, HostNQN: testHost, HostID: testHostID, Portals: portals,
		UUID: uuid.NewSHA1(uuid.NameSpaceURL, []byte(path)).String(), SizeBytes: st.Size()}, nil
}

// ourTarget is target/nvmf in a process of its own, told what to do over a socket.
type ourTarget struct{ socket string }

type targetCall struct {
	Op, Path string
	Export   Export
	Kind     kind.Kind
	Error    string
}

func (o ourTarget) call(c targetCall) (Export, error) {
	conn, err := net.Dial("unix", o.socket)
	if err != nil {
		return Export{}, kind.Wrap(kind.Unavailable, err)
	}
	defer conn.Close()
	if err := json.NewEncoder(conn).Encode(c); err != nil {
		return Export{}, err
	}
	if err := json.NewDecoder(conn).Decode(&c); err != nil {
		return Export{}, err
	}
	if c.Error != "" {
		return Export{}, kind.Wrap(c.Kind, errors.New(c.Error))
	}
	return c.Export, nil
}

func (o ourTarget) Attach(_ context.Context, _, path string) (Export, error) {
	return o.call(targetCall{Op: "attach", Path: path})
}

func (o ourTarget) Detach(_ context.Context, _, path string) error {
	_, err := o.call(targetCall{Op: "detach", Path: path})
	return err
}

// startTarget starts a target with two portals for the test, which shows paths from its
// start. The function returned kills it.
func startTarget(t testing.TB, shown ...string) (kill func()) {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "target.sock")
	t.Setenv(storeEnv, "ours")
	t.Setenv(socketEnv, socket)
	cmd := exec.Command(os.Args[0], targetArg, socket)
	cmd.Stderr = os.Stderr
	cmd.Env = append(os.Environ(), shownEnv+"="+strings.Join(shown, ":"))
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	kill = sync.OnceFunc(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	t.Cleanup(kill)
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil {
		t.Fatalf("the target did not start: %q, %v", line, err)
	}
	return kill
}

func serveTarget(socket string) error {
	target, err := nvmf.New(nvmf.Options{})
	if err != nil {
		return err
	}
	if err := target.CreateSubsystem(nvmf.SubsystemConfig{NQN: testSubsystem, Serial: "TEST1"}); err != nil {
		return err
	}
	if err := target.AddHost(testSubsystem, testHost); err != nil {
		return err
	}
	// The ports are always the same: hosts connect again after a restart.
	portals := []Portal{{TransportTCP, "127.0.0.1", "4440"}, {TransportTCP, "127.0.0.1", "4441"}}
	l, err := net.Listen("unix", socket)
	if err != nil {
		return err
	}
	var mu sync.Mutex
	shown := make(map[string]uint32)
	act := func(c targetCall) (Export, error) {
		mu.Lock()
		defer mu.Unlock()
		if c.Op == "detach" {
			if nsid := shown[c.Path]; nsid != 0 {
				delete(shown, c.Path)
				return Export{}, target.RemoveNvmeNamespace(testSubsystem, nsid)
			}
			return Export{}, nil
		}
		e, err := exportOf(c.Path, testSubsystem, portals...)
		if err != nil {
			return e, err
		}
		if shown[c.Path] == 0 {
			device, err := presenttest.OpenFile(present.Source{Path: c.Path}, true)
			if err != nil {
				return e, err
			}
			if shown[c.Path], err = target.AddNvmeNamespace(testSubsystem, nvmf.NvmeNamespaceConfig{Device: device, UUID: uuid.MustParse(e.UUID)}); err != nil {
				return e, err
			}
		}
		e.NSID = shown[c.Path]
		return e, nil
	}
	for _, path := range strings.FieldsFunc(os.Getenv(shownEnv), func(r rune) bool { return r == ':' }) {
		if _, err := act(targetCall{Op: "attach", Path: path}); err != nil {
			return err
		}
	}
	for _, p := range portals {
		if _, err := target.AddListener(testSubsystem, nvmf.ListenerConfig{Address: net.JoinHostPort(p.Address, p.Service)}); err != nil {
			return err
		}
	}
	fmt.Println("ready")
	for {
		conn, err := l.Accept()
		if err != nil {
			return err
		}
		var c targetCall
		if json.NewDecoder(io.LimitReader(conn, 1<<16)).Decode(&c) == nil {
			c.Export, err = act(c)
			if err != nil {
				c.Kind, c.Error = kind.Of(err), err.Error()
			}
			json.NewEncoder(conn).Encode(c)
		}
		conn.Close()
	}
}

// nvmet is the kernel's target, by configfs (drivers/nvme/target/configfs.c).
type nvmet struct{ transport string }

const nvmetRoot = "/sys/kernel/config/nvmet"

func (n nvmet) subsystem() string { return "nqn.2014-08.org.thaw-project:kernel-" + n.transport }

func (n nvmet) portal() Portal {
	if n.transport == TransportRDMA {
		return Portal{TransportRDMA, rdmaAddress(), "4431"}
	}
	return Portal{TransportTCP, "127.0.0.1", "4430"}
}

// rdmaAddress is an address of an interface that has an RDMA device: loopback has none.
func rdmaAddress() string {
	addresses, _ := net.InterfaceAddrs()
	for _, a := range addresses {
		if n, ok := a.(*net.IPNet); ok && !n.IP.IsLoopback() && n.IP.To4() != nil {
			return n.IP.String()
		}
	}
	return "127.0.0.1"
}

func set(dir string, attributes ...string) error {
	for i := 0; i < len(attributes); i += 2 {
		if err := os.WriteFile(filepath.Join(dir, attributes[i]), []byte(attributes[i+1]), 0o200); err != nil {
			return err
		}
	}
	return nil
}

func (n nvmet) start() error {
	exec.Command("modprobe", "configfs").Run()
	if out, err := exec.Command("modprobe", "nvmet-"+n.transport).CombinedOutput(); err != nil {
		return fmt.Errorf("modprobe nvmet-%s: %w %s", n.transport, err, out)
	}
	if err := unix.Mount("configfs", "/sys/kernel/config", "configfs", 0, ""); err != nil && err != unix.EBUSY {
		return err
	}
	sub := filepath.Join(nvmetRoot, "subsystems", n.subsystem())
	host := filepath.Join(nvmetRoot, "hosts", testHost)
	port := filepath.Join(nvmetRoot, "ports", n.portal().Service)
	for _, dir := range []string{sub, host, port} {
		if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
	}
	p := n.portal()
	return errors.Join(
		os.Symlink(host, filepath.Join(sub, "allowed_hosts", testHost)),
		set(port, "addr_trtype", p.Transport, "addr_adrfam", "ipv4", "addr_traddr", p.Address, "addr_trsvcid", p.Service),
		os.Symlink(sub, filepath.Join(port, "subsystems", n.subsystem())))
}

func (n nvmet) stop() error {
	sub := filepath.Join(nvmetRoot, "subsystems", n.subsystem())
	port := filepath.Join(nvmetRoot, "ports", n.portal().Service)
	var errs []error
	for _, path := range []string{filepath.Join(port, "subsystems", n.subsystem()), port, filepath.Join(sub, "allowed_hosts", testHost)} {
		errs = append(errs, os.Remove(path))
	}
	left, _ := filepath.Glob(filepath.Join(sub, "namespaces", "*"))
	for _, ns := range left {
		errs = append(errs, set(ns, "enable", "0"), os.Remove(ns))
	}
	return errors.Join(append(errs, os.Remove(sub))...)
}

// nvmeNamespace finds the one with a UUID.
func (n nvmet) nvmeNamespace(id string) (dir string, last int) {
	list, _ := filepath.Glob(filepath.Join(nvmetRoot, "subsystems", n.subsystem(), "namespaces", "*"))
	for _, ns := range list {
		if i, err := strconv.Atoi(filepath.Base(ns)); err == nil {
			last = max(last, i)
		}
		if raw, err := os.ReadFile(filepath.Join(ns, "device_uuid")); err == nil && strings.TrimSpace(string(raw)) == id {
			dir = ns
		}
	}
	return dir, last
}

// nvmetLock keeps two calls from taking one number: there is one serving process.
var nvmetLock sync.Mutex

func (n nvmet) Attach(_ context.Context, _, path string) (Export, error) {
	nvmetLock.Lock()
	defer nvmetLock.Unlock()
	e, err := exportOf(path, n.subsystem(), n.portal())
	if err != nil {
		return e, err
	}
	dir, last := n.nvmeNamespace(e.UUID)
	if dir == "" {
		dir = filepath.Join(nvmetRoot, "subsystems", n.subsystem(), "namespaces", strconv.Itoa(last+1))
		if err := os.Mkdir(dir, 0o755); err != nil {
			return e, err
		}
		if err := set(dir, "device_uuid", e.UUID); err != nil {
			return e, err
		}
	}
	if raw, err := os.ReadFile(filepath.Join(dir, "enable")); err != nil || strings.TrimSpace(string(raw)) == "1" {
		return e, err
	}
	return e, set(dir, "buffered_io", "1", "device_path", path, "enable", "1")
}

func (n nvmet) Detach(_ context.Context, _, path string) error {
	nvmetLock.Lock()
	defer nvmetLock.Unlock()
	dir, _ := n.nvmeNamespace(uuid.NewSHA1(uuid.NameSpaceURL, []byte(path)).String())
	if dir == "" {
		return nil
	}
	return errors.Join(set(dir, "enable", "0"), os.Remove(dir))
}

// BenchmarkPresented measures the kernel's initiator with the kernel's target.
func BenchmarkPresented(b *testing.B) {
	needKernel(b, TransportTCP)
	b.Setenv(storeEnv, TransportTCP)
	if err := (nvmet{TransportTCP}).start(); err != nil {
		b.Skipf("no kernel target: %v", err)
	}
	defer nvmet{TransportTCP}.stop()
	presenttest.Benchmark(b, subject)
}
