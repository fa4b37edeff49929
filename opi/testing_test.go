package opi_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	opiv1 "github.com/opiproject/opi-api/storage/v1alpha1/gen/go"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	lvolv1 "github.com/thaw-project/thaw/api/lvol/v1"
	attacherrpc "github.com/thaw-project/thaw/attacher/rpc"
	"github.com/thaw-project/thaw/opi"
	"github.com/thaw-project/thaw/spdk"
	"github.com/thaw-project/thaw/target"
	"github.com/thaw-project/thaw/target/rpc"
)

// These make the test binary a target in this directory, or a bridge to the target there.
const childTarget, childBridge = "THAW_TEST_TARGET", "THAW_TEST_BRIDGE"

func TestMain(m *testing.M) {
	run := map[string]func(ctx context.Context, root string) error{childTarget: targetChild, childBridge: bridgeChild}
	for name, f := range run {
		if root := os.Getenv(name); root != "" {
			ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
			defer stop()
			if err := f(ctx, root); err != nil {
				fmt.Fprintln(os.Stderr, err)
				os.Exit(1)
			}
			return
		}
	}
	goleak.VerifyTestMain(m)
}

func targetChild(ctx context.Context, root string) error {
	stop, err := serveTarget(root, true)
	if err != nil {
		return err
	}
	<-ctx.Done()
	return stop()
}

func bridgeChild(ctx context.Context, root string) error {
	stop, err := serveBridge(root, nil)
	if err != nil {
		return err
	}
	<-ctx.Done()
	stop()
	return nil
}

func serveTarget(root string, persist bool) (stop func() error, err error) {
	return serveMethods(root, persist, func(m map[string]rpc.Method) map[string]rpc.Method { return m })
}

// serveMethods serves what change makes of the target's methods.
func serveMethods(root string, persist bool, change func(map[string]rpc.Method) map[string]rpc.Method) (stop func() error, err error) {
	t, err := target.New(target.Options{Root: filepath.Join(root, "t"), Persist: persist, RetryInterval: 50 * time.Millisecond})
	if err != nil {
		return nil, err
	}
	l, err := rpc.Listen(filepath.Join(root, "target"))
	if err != nil {
		return nil, errors.Join(err, t.Close())
	}
	s := rpc.Serve(l, rpc.Options{Methods: change(t.Methods())})
	return func() error { return errors.Join(s.Close(), t.Close()) }, nil
}

func serveBridge(root string, f opi.Functions) (stop func(), err error) {
	client, err := spdk.New(spdk.Options{Socket: filepath.Join(root, "target")})
	if err != nil {
		return nil, err
	}
	b, err := opi.New(opi.Options{Target: client, Functions: f})
	if err != nil {
		return nil, err
	}
	l, err := rpc.Listen(filepath.Join(root, "bridge"))
	if err != nil {
		return nil, err
	}
	server := grpc.NewServer(append(attacherrpc.ServerOptions(), grpc.ChainUnaryInterceptor(b.Refusals))...)
	b.Register(server)
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = server.Serve(l) // ends with Stop
	}()
	return func() {
		server.Stop()
		<-done
		client.Close()
	}, nil
}

// lab is a target, a bridge and clients of both.
type lab struct {
	t    testing.TB
	root string
	conn *grpc.ClientConn
	spdk *spdk.Client

	fe     opiv1.FrontendNvmeServiceClient
	remote opiv1.NvmeRemoteControllerServiceClient
	aio    opiv1.AioVolumeServiceClient
	malloc opiv1.MallocVolumeServiceClient
	null   opiv1.NullVolumeServiceClient
	lvol   lvolv1.LogicalVolumeServiceClient
}

func shortDir(t testing.TB) string {
	dir, err := os.MkdirTemp("", "opi-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// newLab connects to what runs in root, now or later. The client hands status errors on
// as they are.
func newLab(t testing.TB, root string) *lab {
	conn, err := attacherrpc.Dial(filepath.Join(root, "bridge"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	client, err := spdk.New(spdk.Options{Socket: filepath.Join(root, "target")})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	return &lab{t, root, conn, client, opiv1.NewFrontendNvmeServiceClient(conn), opiv1.NewNvmeRemoteControllerServiceClient(conn),
		opiv1.NewAioVolumeServiceClient(conn), opiv1.NewMallocVolumeServiceClient(conn), opiv1.NewNullVolumeServiceClient(conn), lvolv1.NewLogicalVolumeServiceClient(conn)}
}

// start runs target and bridge in this process.
func start(t testing.TB, f opi.Functions) *lab {
	root := shortDir(t)
	stop, err := serveTarget(root, false)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := stop(); err != nil {
			t.Error(err)
		}
	})
	stopBridge, err := serveBridge(root, f)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(stopBridge)
	return newLab(t, root)
}

// process is a child that can be killed.
type process struct {
	t         testing.TB
	env, root string
	socket    string
	cmd       *exec.Cmd
	ended     chan struct{}
}

// spawn starts a child and waits for its socket.
func spawn(t testing.TB, env, root, socket string) *process {
	p := &process{t: t, env: env, root: root, socket: filepath.Join(root, socket)}
	p.start()
	t.Cleanup(p.kill)
	return p
}

func (p *process) start() {
	p.cmd = exec.Command(os.Args[0])
	p.cmd.Env = append(os.Environ(), p.env+"="+p.root)
	p.cmd.Stderr = os.Stderr
	if err := p.cmd.Start(); err != nil {
		p.t.Error(err) // it may be another goroutine's test
		return
	}
	ended := make(chan struct{})
	p.ended = ended
	go func() {
		_ = p.cmd.Wait() // killed
		close(ended)
	}()
	for {
		if nc, err := net.Dial("unix", p.socket); err == nil {
			nc.Close()
			return
		}
		select {
		case <-ended:
			p.t.Error("the child ended")
			return
		case <-time.After(2 * time.Millisecond):
		}
	}
}

func (p *process) kill() {
	if p.cmd.Process != nil {
		p.cmd.Process.Signal(syscall.SIGKILL) // it may have ended
	}
	if p.ended != nil {
		<-p.ended
	}
}

func must[R any](t testing.TB) func(R, error) R {
	return func(r R, err error) R {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
}

// want checks the code of an error.
func want[R any](t testing.TB, code codes.Code) func(R, error) {
	return func(_ R, err error) {
		t.Helper()
		if status.Code(err) != code {
			t.Errorf("%s %v, want %s", status.Code(err), err, code)
		}
	}
}

const (
	nqn     = "nqn.2014-08.org.example:disk"
	hostNQN = "nqn.2014-08.org.example:host"
	sub     = "nvmeSubsystems/" + nqn
	uid     = "0f1e2d3c-4b5a-6978-8796-a5b4c3d2e1f0"
	nguid   = "00112233445566778899aabbccddeeff"
)

func freePort(t testing.TB) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	_, port, _ := net.SplitHostPort(l.Addr().String())
	return port
}

func (l *lab) mallocVolume(name string) *opiv1.MallocVolume {
	l.t.Helper()
	return must[*opiv1.MallocVolume](l.t)(l.malloc.CreateMallocVolume(l.t.Context(), &opiv1.CreateMallocVolumeRequest{MallocVolumeId: name, MallocVolume: &opiv1.MallocVolume{BlockSize: 4096, BlocksCount: 16 << 8}}))
}

func (l *lab) subsystem(nqn string) *opiv1.NvmeSubsystem {
	l.t.Helper()
	return must[*opiv1.NvmeSubsystem](l.t)(l.fe.CreateNvmeSubsystem(l.t.Context(), &opiv1.CreateNvmeSubsystemRequest{NvmeSubsystem: &opiv1.NvmeSubsystem{
		Spec: &opiv1.NvmeSubsystemSpec{Nqn: nqn, SerialNumber: "S1", ModelNumber: "M1", MaxNamespaces: 16, Hostnqn: hostNQN}}}))
}

func fabrics(port string) *opiv1.NvmeController {
	return &opiv1.NvmeController{Spec: &opiv1.NvmeControllerSpec{Trtype: opiv1.NvmeTransportType_NVME_TRANSPORT_TYPE_TCP,
		Endpoint: &opiv1.NvmeControllerSpec_FabricsId{FabricsId: &opiv1.FabricsEndpoint{Traddr: "127.0.0.1", Trsvcid: port, Adrfam: opiv1.NvmeAddressFamily_NVME_ADDRESS_FAMILY_IPV4}}}}
}

// card is a card whose functions are in memory: what stays when a bridge ends.
type card struct {
	mu      sync.Mutex
	plugged map[opi.Function]string // guarded by mu
}
