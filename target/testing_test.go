package target_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/thaw-project/thaw/spdk"
	"github.com/thaw-project/thaw/target"
	"github.com/thaw-project/thaw/target/rpc"
)

var update = flag.Bool("update", false, "write what was answered into the transcripts")

// childRoot makes the test binary a target in this directory, for tests that kill it.
const childRoot, childPersist = "THAW_TEST_TARGET_ROOT", "THAW_TEST_TARGET_PERSIST"

func TestMain(m *testing.M) {
	if root := os.Getenv(childRoot); root != "" {
		child(root)
		return
	}
	goleak.VerifyTestMain(m)
}

// child is a target as a process of its own.
func child(root string) {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	t, err := target.New(target.Options{Root: root, Persist: os.Getenv(childPersist) != "", Log: log, RetryInterval: 100 * time.Millisecond, ListenerGrace: 2 * time.Second})
	if err == nil {
		var l net.Listener
		if l, err = rpc.Listen(filepath.Join(root, "sock")); err == nil {
			s := rpc.Serve(l, rpc.Options{Methods: t.Methods(), Log: log})
			<-ctx.Done()
			err = errors.Join(s.Close(), t.Close())
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "child:", err)
		os.Exit(1)
	}
}

// lab is a target to talk to.
type lab struct {
	t      testing.TB
	root   string
	socket string
	target *target.Target // nil for a process
	stop   func()
	proc   *exec.Cmd
	log    *bytes.Buffer
}

// shortDir is a directory whose path leaves room for a socket.
func shortDir(t testing.TB) string {
	dir, err := os.MkdirTemp("/dev/shm", "tgt-")
	if err != nil {
		if dir, err = os.MkdirTemp("", "tgt-"); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// start starts a target in this process.
func start(t testing.TB, o target.Options) *lab {
	t.Helper()
	if o.Root == "" {
		o.Root = shortDir(t)
	}
	if o.Log == nil && os.Getenv("THAW_TEST_LOG") != "" {
		o.Log = slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug}))
	}
	o.Version = "test"
	tg, err := target.New(o)
	if err != nil {
		t.Fatal(err)
	}
	l := &lab{t: t, root: o.Root, socket: filepath.Join(o.Root, "sock"), target: tg}
	ln, err := rpc.Listen(l.socket)
	if err != nil {
		t.Fatal(err)
	}
	s := rpc.Serve(ln, rpc.Options{Methods: tg.Methods(), Log: o.Log})
	l.stop = func() {
		if err := errors.Join(s.Close(), tg.Close()); err != nil {
			t.Error(err)
		}
		l.stop = func() {}
	}
	t.Cleanup(func() { l.stop() })
	return l
}

// spawn starts a target as a process that can be killed.
func spawn(t testing.TB, root string, persist bool) *lab {
	t.Helper()
	l := &lab{t: t, root: root, socket: filepath.Join(root, "sock"), log: &bytes.Buffer{}}
	l.proc = exec.Command(os.Args[0])
	l.proc.Env = append(os.Environ(), childRoot+"="+root)
	if persist {
		l.proc.Env = append(l.proc.Env, childPersist+"=1")
	}
	l.proc.Stderr = l.log
	if err := l.proc.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.kill(); l.dump() })
	ended := make(chan error, 1)
	go func() { ended <- l.proc.Wait() }()
	l.stop = func() { <-ended; ended <- nil }
	for {
		if nc, err := net.Dial("unix", l.socket); err == nil {
			nc.Close()
			return l
		}
		select {
		case err := <-ended:
			ended <- err
			t.Fatalf("target ended: %v\n%s", err, l.log)
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// kill kills the process and waits for its end.
func (l *lab) kill() {
	l.proc.Process.Signal(syscall.SIGKILL) // it may have ended
	l.stop()
}

func (l *lab) dump() {
	if l.t.Failed() && l.log != nil {
		l.t.Logf("log of the target:\n%s", l.log)
	}
}

// try calls a method with parameters in JSON.
func (l *lab) try(method, params string) (json.RawMessage, error) {
	var raw any
	if params != "" {
		raw = json.RawMessage(params)
	}
	c, err := spdk.New(spdk.Options{Socket: l.socket, Deadline: time.Minute, LongDeadline: time.Minute})
	if err != nil {
		return nil, err
	}
	defer c.Close()
	var result json.RawMessage
	err = c.Call(context.Background(), method, raw, &result)
	return result, err
}

// call is try for calls that must succeed. Arguments are formatted into params.
func (l *lab) call(method, params string, args ...any) string {
	l.t.Helper()
	if len(args) > 0 {
		params = fmt.Sprintf(params, args...)
	}
	r, err := l.try(method, params)
	if err != nil {
		l.t.Fatalf("%s %s: %v", method, params, err)
	}
	return strings.Trim(string(r), `"`)
}

// fails is for calls that must fail with a code.
func (l *lab) fails(code int, method, params string, args ...any) {
	l.t.Helper()
	if len(args) > 0 {
		params = fmt.Sprintf(params, args...)
	}
	r, err := l.try(method, params)
	var e *spdk.Error
	if !errors.As(err, &e) || e.Code != code {
		l.t.Errorf("%s %s: %s %v, want code %d", method, params, r, err, code)
	}
}

// into decodes what a method answers.
func (l *lab) into(v any, method, params string, args ...any) {
	l.t.Helper()
	if err := json.Unmarshal([]byte(l.answer(method, params, args...)), v); err != nil {
		l.t.Fatal(err)
	}
}

func (l *lab) answer(method, params string, args ...any) string {
	l.t.Helper()
	if len(args) > 0 {
		params = fmt.Sprintf(params, args...)
	}
	r, err := l.try(method, params)
	if err != nil {
		l.t.Fatalf("%s %s: %v", method, params, err)
	}
	return string(r)
}

// file makes a sparse file.
func file(t testing.TB, dir, name string, size int64) string {
	t.Helper()
	path := filepath.Join(dir, name)
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, size); err != nil {
		t.Fatal(err)
	}
	return path
}

// eventually waits for what happens in the background; the limit only ends a test that
// has failed.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain until %s", what)
		}
	}
}
