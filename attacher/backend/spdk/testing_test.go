package spdk_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/grpc"

	"github.com/thaw-project/thaw/attacher/backend/spdk"
	attacherrpc "github.com/thaw-project/thaw/attacher/rpc"
	"github.com/thaw-project/thaw/opi"
	spdkclient "github.com/thaw-project/thaw/spdk"
	"github.com/thaw-project/thaw/target"
	"github.com/thaw-project/thaw/target/rpc"
)

// These make the test binary a target in this directory, one that keeps what it was told,
// or a bridge to the target there.
const childTarget, childKeeping, childBridge = "THAW_TEST_TARGET", "THAW_TEST_KEEPING_TARGET", "THAW_TEST_BRIDGE"

func TestMain(m *testing.M) {
	run := map[string]func(root string) (stop func() error, err error){
		childTarget:  func(root string) (func() error, error) { return serveTarget(root, false, nil) },
		childKeeping: func(root string) (func() error, error) { return serveTarget(root, true, nil) },
		childBridge:  serveBridge,
	}
	for name, f := range run {
		root := os.Getenv(name)
		if root == "" {
			continue
		}
		ctx, cancel := signal.NotifyContext(context.Background(), syscall.SIGTERM)
		stop, err := f(root)
		if err == nil {
			<-ctx.Done()
			err = stop()
		}
		cancel()
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	goleak.VerifyTestMain(m)
}

const capacity = 256 << 20

// serveTarget serves a target that forgets all but its lvstores, unless persist is set.
// change is made to its methods.
func serveTarget(root string, persist bool, change func(map[string]rpc.Method)) (stop func() error, err error) {
	t, err := target.New(target.Options{Root: filepath.Join(root, "t"), Persist: persist})
	if err != nil {
		return nil, err
	}
	l, err := rpc.Listen(filepath.Join(root, "target"))
	if err != nil {
		return nil, errors.Join(err, t.Close())
	}
	m := t.Methods()
	if change != nil {
		change(m)
	}
	s := rpc.Serve(l, rpc.Options{Methods: m})
	return func() error { return errors.Join(s.Close(), t.Close()) }, nil
}

func serveBridge(root string) (stop func() error, err error) {
	client, err := spdkclient.New(spdkclient.Options{Socket: filepath.Join(root, "target")})
	if err != nil {
		return nil, err
	}
	b, err := opi.New(opi.Options{Target: client})
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
	return func() error {
		server.Stop()
		<-done
		return client.Close()
	}, nil
}

// place is a directory with a disk file, where target and bridge run or will.
type place struct {
	root, portal string
}

func newPlace(t testing.TB) *place {
	t.Helper()
	root, err := os.MkdirTemp("", "spdk-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(root) })
	f, err := os.Create(filepath.Join(root, "disk"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(capacity); err != nil {
		t.Fatal(err)
	}
	return &place{root, "tcp://127.0.0.1:" + freePort(t)}
}

func freePort(t testing.TB) string {
	t.Helper()
	l, err := net.Listen("tcp", "[::]:0") // free on all addresses
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	_, port, err := net.SplitHostPort(l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	return port
}

func (p *place) conn(t testing.TB) *grpc.ClientConn {
	t.Helper()
	conn, err := attacherrpc.Dial(filepath.Join(p.root, "bridge"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// serve runs target and bridge in this process.
func (p *place) serve(t testing.TB, change func(map[string]rpc.Method)) {
	t.Helper()
	for _, f := range []func() (func() error, error){
		func() (func() error, error) { return serveTarget(p.root, false, change) },
		func() (func() error, error) { return serveBridge(p.root) },
	} {
		stop, err := f()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := stop(); err != nil {
				t.Error(err)
			}
		})
	}
}

const clusterBytes = 64 << 10

func (p *place) options(conn grpc.ClientConnInterface) spdk.Options {
	log := slog.New(slog.DiscardHandler)
	if testing.Verbose() {
		log = slog.New(slog.NewTextHandler(os.Stderr, nil))
	}
	return spdk.Options{Conn: conn, LvStore: "store", AIO: filepath.Join(p.root, "disk"), Create: true, ClusterBytes: clusterBytes, Portals: []string{p.portal}, Logger: log}
}

func (p *place) open(t testing.TB, conn grpc.ClientConnInterface) *spdk.Backend {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	b, err := spdk.New(ctx, p.options(conn))
	if err != nil {
		t.Fatal(err)
	}
	return b
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
		p.t.Error(err)
		return
	}
	ended, cmd := make(chan struct{}), p.cmd
	p.ended = ended
	go func() {
		_ = cmd.Wait() // killed
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
