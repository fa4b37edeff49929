package guest_test

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"github.com/thaw-project/thaw/e2e/guest"
	"github.com/thaw-project/thaw/lvol"
	"github.com/thaw-project/thaw/target/nvmf"
)

const (
	subNQN     = "nqn.2014-08.org.thaw-project:guest-test"
	lvolBytes  = 256 << 20
	serveEnv   = "THAW_GUEST_TEST_SERVE" // set in a child of this test: what it is to serve, as JSON
	anyAddress = "127.0.0.1:0"
)

func TestMain(m *testing.M) {
	if text := os.Getenv(serveEnv); text != "" {
		if err := serve(text); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	if os.Getenv(ownerEnv) != "" {
		if err := own(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// served says what a target in a process of its own serves: one lvol of a pool.
type served struct {
	Pool, Lvol, Address string
	UUID                uuid.UUID // hosts take another one for another disk
}

// serve is the child process: a target that lives until its standard input ends.
func serve(text string) error {
	var s served
	if err := json.Unmarshal([]byte(text), &s); err != nil {
		return err
	}
	store, err := lvol.Open(lvol.Options{Dir: s.Pool})
	if err != nil {
		return err
	}
	defer store.Close()
	device, err := store.OpenLvol(s.Lvol, false)
	if err != nil {
		return err
	}
	target, address, err := newTarget(s.Address)
	if err != nil {
		return err
	}
	defer target.Close()
	if _, err := target.AddNvmeNamespace(subNQN, nvmf.NvmeNamespaceConfig{Device: device, UUID: s.UUID}); err != nil {
		return err
	}
	fmt.Println(address)
	_, err = io.Copy(io.Discard, os.Stdin)
	return err
}

// newTarget makes a target with one subsystem, open to the guest, that discovery tells
// to be where the guest sees this machine.
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
func newPool(t *testing.T) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "pool")
	if err := lvol.Create(lvol.CreateOptions{Dir: dir, CapacityBytes: 2 << 30}); err != nil {
		t.Fatal(err)
	}
	store := openPool(t, dir)
	if _, err := store.Create("disk", lvolBytes); err != nil {
		t.Fatal(err)
	}
	if err := store.Close(); err != nil {
		t.Fatal(err)
	}
	return dir
}

func openPool(t *testing.T, dir string) *lvol.Store {
	t.Helper()
	store, err := lvol.Open(lvol.Options{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	return store
}

// child is a target in a process of its own.
type child struct {
	command *exec.Cmd
	input   io.Closer
	address string
}

func startChild(t *testing.T, s served) *child {
	t.Helper()
	text, err := json.Marshal(s)
	if err != nil {
		t.Fatal(err)
	}
	c := &child{command: exec.Command("/proc/self/exe")}
	c.command.Env = append(os.Environ(), serveEnv+"="+string(text))
	c.command.Stderr = os.Stderr
	if c.input, err = c.command.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := c.command.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.command.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.kill)
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatalf("target did not start: %v", err)
	}
	c.address = line[:len(line)-1]
	return c
}

// kill ends the process as a crash would; again is harmless.
func (c *child) kill() {
	if c.command.ProcessState == nil {
		_ = unix.Kill(c.command.Process.Pid, unix.SIGKILL)
		_ = c.command.Wait() // the signal
	}
}
