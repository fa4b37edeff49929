package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// stopTimeout is how long a program may take to end after SIGTERM before it is
// killed: more than containerd and thaw server need to close their databases on a
// busy machine.
const stopTimeout = 15 * time.Second

// Process is a program that a lab started.
type Process struct {
	name    string
	logFile string
	command *exec.Cmd
	done    chan struct{} // closed when the program ended
	err     error         // how it ended; read after done
}

// Spec says what to start.
type Spec struct {
	Name    string // of the log file, and in errors
	Args    []string
	Env     []string // added to the environment
	Network *Link    // start inside this link's network namespace
	Dir     string
}

// Start starts a program whose output goes to a log file of its name.
func (l *Lab) Start(spec Spec) (*Process, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return nil, errors.New("the lab is closed")
	}
	args := spec.Args
	if spec.Network != nil {
		// nsenter and not "ip netns exec", which mounts another /sys.
		args = append([]string{"nsenter", "--net=" + spec.Network.namespacePath()}, args...)
	}
	logFile := filepath.Join(l.Dir, "log", spec.Name+".log")
	out, err := os.OpenFile(logFile, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	defer out.Close()
	fmt.Fprintf(out, "--- %s %s\n", time.Now().Format(time.RFC3339), strings.Join(args, " "))

	p := &Process{name: spec.Name, logFile: logFile, done: make(chan struct{})}
	p.command = exec.Command(args[0], args[1:]...)
	p.command.Stdout, p.command.Stderr = out, out
	p.command.Dir = spec.Dir
	p.command.Env = append(l.environment(), spec.Env...)
	// An own process group: Ctrl-C at the terminal reaches the lab's owner alone,
	// which then stops its programs in order.
	p.command.SysProcAttr = &unix.SysProcAttr{Setpgid: true}
	if err := p.command.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", spec.Name, err)
	}
	// Stop waits for this goroutine.
	go func() {
		p.err = p.command.Wait()
		close(p.done)
	}()
	l.processes = append(l.processes, p)
	return p, nil
}

// environment is what every program of the lab sees: its own tools first in PATH.
func (l *Lab) environment() []string {
	var env []string
	for _, v := range os.Environ() {
		if !strings.HasPrefix(v, "PATH=") && !strings.HasPrefix(v, envMark) {
			env = append(env, v)
		}
	}
	return append(env, "PATH="+l.Bin+":"+os.Getenv("PATH")+":/usr/sbin:/sbin", envMark+l.Dir)
}

// Command returns a command that runs in the lab's environment and is killed when
// ctx ends.
func (l *Lab) Command(ctx context.Context, name string, args ...string) *exec.Cmd {
	if !strings.Contains(name, "/") {
		if own := filepath.Join(l.Bin, name); fileExists(own) {
			name = own
		}
	}
	c := exec.CommandContext(ctx, name, args...)
	c.Env = l.environment()
	return c
}

func fileExists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// Pid returns the program's process id.
func (p *Process) Pid() int { return p.command.Process.Pid }

// Running reports whether the program has not ended.
func (p *Process) Running() bool {
	select {
	case <-p.done:
		return false
	default:
		return true
	}
}

// Kill ends the program with SIGKILL and waits for its end.
func (p *Process) Kill() {
	_ = p.command.Process.Kill()
	<-p.done
}

// Stop ends the program with SIGTERM, or SIGKILL if that takes too long, which is an
// error.
func (p *Process) Stop() error {
	if !p.Running() {
		return nil
	}
	_ = p.command.Process.Signal(unix.SIGTERM)
	select {
	case <-p.done:
		return nil
	case <-time.After(stopTimeout):
		p.Kill()
		return fmt.Errorf("%s did not end within %v of SIGTERM and was killed; the end of its log:\n%s", p.name, stopTimeout, p.Log(2048))
	}
}

// Wait waits until the program ends by itself or ctx ends.
func (p *Process) Wait(ctx context.Context) error {
	select {
	case <-p.done:
		return p.err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Log returns at most maxBytes from the end of the program's output.
func (p *Process) Log(maxBytes int64) string { return tail(p.logFile, maxBytes) }

// LogFile returns the path of the program's output.
func (p *Process) LogFile() string { return p.logFile }

// alive returns nil while the program runs.
func (p *Process) alive() error {
	if p.Running() {
		return nil
	}
	return fmt.Errorf("%s ended (%v); the end of its log:\n%s", p.name, p.err, p.Log(4096))
}

// RSS returns the resident memory in bytes of all processes whose command line
// contains match, among those of the lab, and a line for each. Shared pages count in
// every process.
func (l *Lab) RSS(match string) (int64, []string) {
	var total int64
	var lines []string
	for _, pid := range markedProcesses(l.Dir) {
		line := commandLine(pid)
		if !strings.Contains(line, match) {
			continue
		}
		bytes, err := residentBytes(pid)
		if err != nil {
			continue // ended meanwhile
		}
		total += bytes
		lines = append(lines, fmt.Sprintf("%6.1f MB  %d %.100s", float64(bytes)/1e6, pid, line))
	}
	return total, lines
}

func residentBytes(pid int) (int64, error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	for line := range bytes.Lines(data) {
		if value, found := strings.CutPrefix(string(line), "VmRSS:"); found {
			kib, err := strconv.ParseInt(strings.Fields(value)[0], 10, 64)
			return kib << 10, err
		}
	}
	return 0, fmt.Errorf("process %d has no memory", pid)
}

// clockTick is the unit of CPU times in /proc, USER_HZ, the same on every Linux that
// Go runs on.
const clockTick = 10 * time.Millisecond

// CPU returns the CPU time, user and system, that the program used so far, without
// that of programs it ran.
func (p *Process) CPU() (time.Duration, error) {
	path := fmt.Sprintf("/proc/%d/stat", p.Pid())
	data, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	// The fields after the command's name, which may itself contain anything, begin
	// with the third; user and system time are the 14th and 15th.
	fields := strings.Fields(string(data[bytes.LastIndexByte(data, ')')+1:]))
	if len(fields) < 13 {
		return 0, fmt.Errorf("%s: unexpected form", path)
	}
	var ticks int64
	for _, f := range fields[11:13] {
		n, err := strconv.ParseInt(f, 10, 64)
		if err != nil {
			return 0, fmt.Errorf("%s: %w", path, err)
		}
		ticks += n
	}
	return time.Duration(ticks) * clockTick, nil
}

// Children returns the processes that the program has started and not reaped.
func (p *Process) Children() []int {
	files, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", p.Pid()))
	if err != nil {
		return nil
	}
	var pids []int
	for _, f := range files {
		data, err := os.ReadFile(f)
		if err != nil {
			continue // the thread ended meanwhile
		}
		for text := range strings.FieldsSeq(string(data)) {
			if pid, err := strconv.Atoi(text); err == nil {
				pids = append(pids, pid)
			}
		}
	}
	return pids
}

// Pids returns the lab's processes whose command line contains match.
func (l *Lab) Pids(match string) []int {
	var pids []int
	for _, pid := range markedProcesses(l.Dir) {
		if strings.Contains(commandLine(pid), match) {
			pids = append(pids, pid)
		}
	}
	return pids
}

// KillPids kills processes that Pids returned and waits for their end.
func (l *Lab) KillPids(pids []int) { killAll(pids) }
