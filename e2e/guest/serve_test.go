package guest_test

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/thaw-project/thaw/e2e/guest"
	"github.com/thaw-project/thaw/lvol"
	"github.com/thaw-project/thaw/target/nvmf"
)

const (
	subNQN     = "nqn.2014-08.org.thaw-project:guest-test"
	lvolBytes  = 256 << 20
	anyAddress = "127.0.0.1:0"
)

func TestMain(m *testing.M) {
	if os.Getenv(ownerEnv) != "" {
		if err := own(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// newTarget makes a target in this process with one subsystem, open to the guest, that
// discovery tells to be where the guest sees this machine.
func newTarget(address string) (_ *nvmf.Target, at string, err error) {
	t, err := nvmf.New(nvmf.Options{})
	if err != nil {
		return nil, "", err
	}
	defer func() {
		if err != nil {
			t.Close()
		}
	}()
	if err := t.CreateSubsystem(nvmf.SubsystemConfig{NQN: subNQN, Serial: "GUEST1", Model: "Thaw guest test"}); err != nil {
		return nil, "", err
	}
	if err := t.AddHost(subNQN, guest.HostNQN); err != nil {
		return nil, "", err
	}
	at, err = t.AddListener(subNQN, nvmf.ListenerConfig{Address: address, Advertise: guest.HostAddress + ":0"})
	return t, at, err
}

// newPool makes a pool with an lvol called disk.
func newPool(t *testing.T) *lvol.Store {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "pool")
	if err := lvol.Create(lvol.CreateOptions{Dir: dir, CapacityBytes: 2 << 30}); err != nil {
		t.Fatal(err)
	}
	store, err := lvol.Open(lvol.Options{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := store.Create("disk", lvolBytes); err != nil {
		t.Fatal(err)
	}
	return store
}

// process is a thaw target, which keeps its configuration.
type process struct {
	program, dir string
	command      *exec.Cmd
}

// start starts it, and returns when it answers: when it serves again what it served.
func (p *process) start(t *testing.T) {
	t.Helper()
	log, err := os.OpenFile(filepath.Join(p.dir, "log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	p.command = exec.Command(p.program, "target", "--root", p.dir, "--socket", p.socket(), "--persist")
	p.command.Stderr = log
	if err := p.command.Start(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "thaw target answers", func() error { return p.call(t.Context(), "spdk_get_version", nil, nil) })
}

func (p *process) socket() string { return filepath.Join(p.dir, "s") }

// kill ends the process as a crash would; again is harmless.
func (p *process) kill() {
	if p.command.ProcessState == nil {
		_ = unix.Kill(p.command.Process.Pid, unix.SIGKILL)
		_ = p.command.Wait() // the signal
	}
}

func (p *process) call(ctx context.Context, method string, params map[string]any, result any) error {
	args := []string{"target", "--socket", p.socket(), "call", method}
	if params != nil {
		text, err := json.Marshal(params)
		if err != nil {
			return err
		}
		args = append(args, "--params", string(text))
	}
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	c := exec.CommandContext(ctx, p.program, args...)
	out, err := c.Output()
	if err != nil {
		if e, ok := err.(*exec.ExitError); ok {
			err = fmt.Errorf("%w: %s", err, e.Stderr)
		}
		return fmt.Errorf("%s: %w", method, err)
	}
	if result == nil {
		return nil
	}
	return json.Unmarshal(out, result)
}

func (p *process) must(t *testing.T, method string, params map[string]any) {
	t.Helper()
	if err := p.call(t.Context(), method, params, nil); err != nil {
		t.Fatal(err)
	}
}

// startTarget starts a thaw target that serves an lvol over NVMe/TCP, and returns the
// port where.
func startTarget(t *testing.T) (p *process, port string) {
	t.Helper()
	dir, err := os.MkdirTemp("", "thaw-target-") // short: the path of a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	p = &process{program: guest.Build(t, "cmd/thaw"), dir: dir}
	p.start(t)
	t.Cleanup(func() {
		p.kill()
		if log, err := os.ReadFile(filepath.Join(dir, "log")); t.Failed() && err == nil {
			t.Logf("thaw target:\n%s", log)
		}
	})
	l, err := net.Listen("tcp", anyAddress)
	if err != nil {
		t.Fatal(err)
	}
	_, port, err = net.SplitHostPort(l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	data := filepath.Join(dir, "data")
	f, err := os.Create(data)
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Truncate(2 << 30); err != nil {
		t.Fatal(err)
	}
	f.Close()
	p.must(t, "bdev_aio_create", map[string]any{"name": "aio0", "filename": data, "block_size": 512})
	p.must(t, "bdev_lvol_create_lvstore", map[string]any{"bdev_name": "aio0", "lvs_name": "lvs0"})
	p.must(t, "bdev_lvol_create", map[string]any{"lvol_name": "disk", "size_in_mib": lvolBytes >> 20, "thin_provision": true, "lvs_name": "lvs0"})
	p.must(t, "nvmf_create_transport", map[string]any{"trtype": "TCP"})
	p.must(t, "nvmf_create_subsystem", map[string]any{"nqn": subNQN, "serial_number": "GUEST2"})
	p.must(t, "nvmf_subsystem_add_host", map[string]any{"nqn": subNQN, "host": guest.HostNQN})
	p.must(t, "nvmf_subsystem_add_ns", map[string]any{"nqn": subNQN, "namespace": map[string]any{"bdev_name": "lvs0/disk"}})
	p.must(t, "nvmf_subsystem_add_listener", map[string]any{"nqn": subNQN,
		"listen_address": map[string]any{"trtype": "TCP", "adrfam": "IPv4", "traddr": "127.0.0.1", "trsvcid": port}})
	return p, port
}
