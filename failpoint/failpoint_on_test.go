//go:build failpoint

package failpoint

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// The test binary is also the process that reaches points: the names in THAW_TEST_REACH,
// one after the other, each of which it prints afterwards.
func TestMain(m *testing.M) {
	if names := os.Getenv("THAW_TEST_REACH"); names != "" {
		for name := range strings.SplitSeq(names, ",") {
			if strings.HasPrefix(name, "/") { // a file to wait for
				for _, err := os.Stat(name); err != nil; _, err = os.Stat(name) {
					time.Sleep(time.Millisecond)
				}
				continue
			}
			Reach(name)
			fmt.Println(name)
		}
		return
	}
	os.Exit(m.Run())
}

func child(reach string, env ...string) (*exec.Cmd, *bytes.Buffer) {
	c := exec.Command(os.Args[0])
	c.Env = append(append(os.Environ(), "THAW_TEST_REACH="+reach), env...)
	var out bytes.Buffer
	c.Stdout, c.Stderr = &out, &out
	return c, &out
}

func signalOf(err error) syscall.Signal {
	var e *exec.ExitError
	if errors.As(err, &e) {
		if w := e.Sys().(syscall.WaitStatus); w.Signaled() {
			return w.Signal()
		}
	}
	return -1
}

func TestKill(t *testing.T) {
	for _, c := range []struct{ points, want string }{
		{"b=kill", "a\n"},
		{"a=kill@2", "a\nb\n"},
		{"x y: z=kill;a=kill@2;b=kill@3", "a\nb\n"},
		{"b=delay:1ms;b=kill@2", "a\nb\na\n"},
		{" a = kill@3 ", "a\nb\na\nb\n"},
	} {
		cmd, out := child("a,b,a,b,a", "THAW_FAILPOINTS="+c.points)
		if err := cmd.Run(); signalOf(err) != syscall.SIGKILL || out.String() != c.want {
			t.Errorf("%s: %v, %q, want %q", c.points, err, out, c.want)
		}
	}
	cmd, out := child("a,b", "THAW_FAILPOINTS=a=kill@2;c=kill")
	if err := cmd.Run(); err != nil || out.String() != "a\nb\n" {
		t.Errorf("%v, %q", err, out)
	}
}

func TestSyntax(t *testing.T) {
	for _, points := range []string{"a", "=kill", "a=", "a=die", "a=kill@0", "a=kill@x", "a=kill:1s", "a=delay", "a=delay:x", "a=delay:-1s", "a=kill;", ";", "a=stop:1s"} {
		cmd, out := child("a", "THAW_FAILPOINTS="+points)
		var e *exec.ExitError
		if err := cmd.Run(); !errors.As(err, &e) || e.ExitCode() != 2 || !strings.Contains(out.String(), "THAW_FAILPOINTS: ") || strings.Contains(out.String(), "a\n") {
			t.Errorf("%s: %v, %q", points, err, out)
		}
	}
}

func TestDelay(t *testing.T) {
	cmd, out := child("a,a", "THAW_FAILPOINTS=a=delay:100ms@2")
	begin := time.Now()
	if err := cmd.Run(); err != nil || out.String() != "a\na\n" || time.Since(begin) < 100*time.Millisecond {
		t.Errorf("%v, %q, %s", err, out, time.Since(begin))
	}
}

func TestStop(t *testing.T) {
	cmd, out := child("a,b", "THAW_FAILPOINTS=b=stop")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var status unix.WaitStatus
	if _, err := unix.Wait4(cmd.Process.Pid, &status, unix.WUNTRACED, nil); err != nil || !status.Stopped() {
		t.Fatalf("%v, %x", err, status)
	}
	if err := cmd.Process.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil || out.String() != "a\nb\n" {
		t.Errorf("%v, %q", err, out)
	}
}

func TestTrace(t *testing.T) {
	trace := filepath.Join(t.TempDir(), "trace")
	for _, reach := range []string{"a,b", "c: d,b"} {
		cmd, out := child(reach, "THAW_FAILPOINT_TRACE="+trace, "THAW_FAILPOINTS=b=kill")
		if err := cmd.Run(); signalOf(err) != syscall.SIGKILL {
			t.Fatalf("%v, %q", err, out)
		}
	}
	if got, err := os.ReadFile(trace); err != nil || string(got) != "a\nb\nc: d\nb\n" {
		t.Errorf("%q, %v", got, err)
	}
}

func put(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path+".new", []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
}

func TestFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "points")
	cmd, _ := child("a,a,"+path+",a,a,a", "THAW_FAILPOINT_FILE="+path)
	cmd.Stdout = nil
	pipe, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewReader(pipe)
	for range 2 {
		if _, err := lines.ReadString('\n'); err != nil {
			t.Fatal(err)
		}
	}
	put(t, path, "a=kill@2\n") // counts from now
	rest, err := io.ReadAll(lines)
	if err := errors.Join(err, cmd.Wait()); signalOf(err) != syscall.SIGKILL || string(rest) != "a\n" {
		t.Errorf("%v, %q", err, rest)
	}
	if _, err := os.Stat(path); !os.IsNotExist(err) {
		t.Errorf("the next process would kill itself too: %v", err)
	}
	put(t, path, "nonsense")
	cmd, out := child("a", "THAW_FAILPOINT_FILE="+path)
	if err := cmd.Run(); err != nil || !strings.HasSuffix(out.String(), "a\n") || !strings.Contains(out.String(), "THAW_FAILPOINT_FILE: ") {
		t.Errorf("%v, %q", err, out)
	}
	if _, err := os.Stat(path); !os.IsNotExist(err) {
		t.Errorf("what makes no sense stays: %v", err)
	}
}
