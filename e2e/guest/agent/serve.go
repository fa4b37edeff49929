package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/thaw-project/thaw/e2e/guest/wire"
)

// maxInputBytes bounds what the driver may send as a command's standard input, which
// is kept in memory.
const maxInputBytes = 64 << 20

// outputWait is how long the output of a command is waited for after it ended: what it
// left running in the background may hold the pipe for ever.
const outputWait = time.Second

type server struct {
	conn *wire.Conn

	mu       sync.Mutex
	inputs   map[uint32][]byte    // guarded by mu; of commands to come
	commands map[uint32]*exec.Cmd // guarded by mu; those that run, nil while they are started
	killed   map[uint32]bool      // guarded by mu; those signalled while they were started
}

// serve runs the driver's commands until its end of the port closes.
func serve() error {
	if err := setUp(); err != nil {
		return err
	}
	port, err := openPort("agent")
	if err != nil {
		return err
	}
	s := &server{conn: wire.New(port), inputs: map[uint32][]byte{}, commands: map[uint32]*exec.Cmd{}, killed: map[uint32]bool{}}
	if err := s.conn.Send(wire.Frame{Kind: wire.Hello}); err != nil {
		return err
	}
	for {
		f, err := s.conn.Receive()
		if errors.Is(err, io.EOF) {
			return errors.New("the driver is gone")
		}
		if err != nil {
			return err
		}
		s.handle(f)
	}
}

func (s *server) handle(f wire.Frame) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch f.Kind {
	case wire.Input:
		if len(s.inputs[f.ID])+len(f.Data) <= maxInputBytes {
			s.inputs[f.ID] = append(s.inputs[f.ID], f.Data...)
		}
	case wire.Start:
		input := s.inputs[f.ID]
		delete(s.inputs, f.ID)
		s.commands[f.ID] = nil
		// Nobody waits for these goroutines: the guest ends with the driver.
		go s.run(f, input)
	case wire.Signal:
		switch c, known := s.commands[f.ID]; {
		case c != nil:
			_ = unix.Kill(-c.Process.Pid, syscall.Signal(f.Code))
		case known:
			s.killed[f.ID] = true
		}
	}
}

func (s *server) run(f wire.Frame, input []byte) {
	end := wire.Frame{ID: f.ID, Kind: wire.Exit}
	code, err := s.execute(f, input)
	if end.Code = code; err != nil {
		end.Text = err.Error()
	}
	if err := s.conn.Send(end); err != nil {
		fmt.Fprintln(os.Stderr, "guest agent: send:", err)
	}
}

func (s *server) execute(f wire.Frame, input []byte) (int, error) {
	if len(f.Args) == 0 {
		return 0, errors.New("no command")
	}
	c := exec.Command(f.Args[0], f.Args[1:]...)
	c.Stdin = strings.NewReader(string(input))
	out := &output{s: s, id: f.ID}
	c.Stdout, c.Stderr = out, out // one writer: one pipe, and the order is kept
	c.WaitDelay = outputWait
	c.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	s.mu.Lock()
	err := c.Start()
	if err == nil {
		s.commands[f.ID] = c
		if s.killed[f.ID] {
			_ = unix.Kill(-c.Process.Pid, unix.SIGKILL)
		}
	}
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.commands, f.ID)
		delete(s.killed, f.ID)
	}()
	if err != nil {
		return 0, err
	}
	err = c.Wait()
	if status, ok := c.ProcessState.Sys().(syscall.WaitStatus); ok && status.Signaled() {
		return 128 + int(status.Signal()), nil
	}
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) && !errors.Is(err, exec.ErrWaitDelay) {
		return 0, err
	}
	return c.ProcessState.ExitCode(), nil
}

type output struct {
	s  *server
	id uint32
}

func (o *output) Write(b []byte) (int, error) {
	for n := 0; n < len(b); n += wire.ChunkBytes {
		if err := o.s.conn.Send(wire.Frame{ID: o.id, Kind: wire.Output, Data: b[n:min(len(b), n+wire.ChunkBytes)]}); err != nil {
			return n, err
		}
	}
	return len(b), nil
}

// openPort opens the virtio-serial port of that name.
func openPort(name string) (*os.File, error) {
	paths, err := filepath.Glob("/sys/class/virtio-ports/*/name")
	if err != nil {
		return nil, err
	}
	for _, p := range paths {
		text, err := os.ReadFile(p)
		if err == nil && strings.TrimSpace(string(text)) == name {
			return os.OpenFile("/dev/"+filepath.Base(filepath.Dir(p)), os.O_RDWR, 0)
		}
	}
	return nil, fmt.Errorf("no port %q among %v", name, paths)
}
