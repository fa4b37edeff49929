package presenttest

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"sync"
	"testing"
	"time"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/node/present"
)

// Served is what presenters have besides present.Presenter.
type Served interface {
	present.Presenter
	// Close stops serving; the disks stay for the next process.
	Close() error
	// Teardown withdraws all disks and closes.
	Teardown(ctx context.Context) error
}

// Subject is an implementation of present.Presenter under test.
type Subject struct {
	// Serve makes the presenter that belongs to a directory, taking over what a killed
	// process left there. It runs in a process of its own.
	Serve func(dir string) (Served, error)
	// Source names the file at path, which OpenFile opens; nil is DefaultSource.
	Source func(path string, readOnly bool) present.Source
	// ReadOnlyOnly says that only read-only disks can be presented.
	ReadOnlyOnly bool
	// NoDiscard says that discarded ranges need not read as zeros.
	NoDiscard bool
	// ImageBytes is the size of the disks; 0 means 8 MiB.
	ImageBytes int
	// Rounds is how often processes are killed; 0 means 5.
	Rounds int
	// Left, if not nil, fails the test for what is left on the machine of a directory
	// that was torn down.
	Left func(t testing.TB, dir string)
	// Abandon, if not nil, takes away what a failed test left of a directory, whose
	// disks would keep their users waiting for ever.
	Abandon func(dir string)
}

// DefaultSource is an lvol with the file's name as its own.
func DefaultSource(path string, _ bool) present.Source {
	return present.Source{Kind: present.SourceLvol, Lvol: "test", Path: path}
}

// serveArg is how a test binary knows that it is to serve.
const serveArg = "presenttest-serve"

// Child must be the first call of TestMain in a package that calls Conformance. In the
// processes that Conformance starts it serves the subject and does not return.
func Child(s Subject) {
	if len(os.Args) != 3 || os.Args[1] != serveArg {
		return
	}
	if err := serve(s, os.Args[2]); err != nil {
		fmt.Fprintln(os.Stderr, "presenttest:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

// The operations of a serving process.
const (
	opPresent  = "present"
	opWithdraw = "withdraw"
	opList     = "list"
	opClose    = "close"
	opTeardown = "teardown"
)

type message struct {
	N        int            `json:"n"`
	Op       string         `json:"op,omitempty"`
	ID       string         `json:"id,omitempty"`
	Source   present.Source `json:"source,omitzero"`
	ReadOnly bool           `json:"read_only,omitempty"`

	Disk  present.Disk   `json:"disk,omitzero"`
	Disks []present.Disk `json:"disks,omitempty"`
	Kind  kind.Kind      `json:"kind,omitempty"`
	Error string         `json:"error,omitempty"`
}

func serve(s Subject, dir string) error {
	p, err := s.Serve(dir)
	var mu sync.Mutex
	send := func(m message) {
		mu.Lock()
		defer mu.Unlock()
		raw, _ := json.Marshal(m)
		os.Stdout.Write(append(raw, '\n'))
	}
	hello := message{}
	if err != nil {
		hello.Kind, hello.Error = kind.Of(err), err.Error()
	}
	send(hello)
	if err != nil {
		return err
	}
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		var m message
		if err := json.Unmarshal(lines.Bytes(), &m); err != nil {
			return err
		}
		ends := m.Op == opClose || m.Op == opTeardown
		act := func() {
			ctx := context.Background()
			answer := message{N: m.N}
			var err error
			switch m.Op {
			case opPresent:
				answer.Disk, err = p.Present(ctx, m.ID, m.Source, m.ReadOnly)
			case opWithdraw:
				err = p.Withdraw(ctx, m.ID)
			case opList:
				answer.Disks, err = p.List(ctx)
			case opClose:
				err = p.Close()
			case opTeardown:
				err = p.Teardown(ctx)
			}
			if err != nil {
				answer.Kind, answer.Error = kind.Of(err), err.Error()
				ends = false
			}
			send(answer)
		}
		if ends {
			if act(); ends {
				return nil
			}
			continue
		}
		go act() // the process ends with them: it is for tests
	}
	select {} // our parent died or only wants to kill us
}

// host is a present.Presenter in a process that can be killed.
type host struct {
	t   testing.TB
	dir string

	mu      sync.Mutex
	cmd     *exec.Cmd
	in      io.WriteCloser
	n       int
	waiting map[int]chan message // guarded by mu
	done    chan struct{}        // closed when the process has ended
}

// answerWait bounds a call; what waits for a killed process is meant to be answered by
// the next one much earlier. Guests without KVM are slow.
const answerWait = 2 * time.Minute

func startHost(t testing.TB, dir string) *host {
	h := &host{t: t, dir: dir}
	t.Cleanup(h.kill)
	h.start()
	return h
}

func (h *host) start() {
	h.t.Helper()
	if err := h.tryStart(); err != nil {
		h.t.Fatal(err)
	}
}

func (h *host) tryStart() error {
	cmd := exec.Command(os.Args[0], serveArg, h.dir)
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		return err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	hello := make(chan message, 1)
	waiting, done := map[int]chan message{0: hello}, make(chan struct{})
	h.mu.Lock()
	h.cmd, h.in, h.waiting, h.done = cmd, in, waiting, done
	h.mu.Unlock()
	go func() {
		defer close(done)
		for s := bufio.NewScanner(out); s.Scan(); {
			var m message
			if json.Unmarshal(s.Bytes(), &m) != nil {
				continue
			}
			h.mu.Lock()
			c := waiting[m.N]
			delete(waiting, m.N)
			h.mu.Unlock()
			if c != nil {
				c <- m
			}
		}
		cmd.Wait()
	}()
	select {
	case m := <-hello:
		return m.err()
	case <-done:
		return errors.New("the serving process ended at once")
	case <-time.After(answerWait):
		return errors.New("the serving process does not come up")
	}
}

func (m message) err() error {
	if m.Error == "" {
		return nil
	}
	return kind.Wrap(m.Kind, errors.New(m.Error))
}

var errDied = errors.New("the serving process died")

func (h *host) call(m message) (message, error) {
	answer := make(chan message, 1)
	h.mu.Lock()
	h.n++
	m.N = h.n
	h.waiting[m.N] = answer
	done := h.done
	raw, err := json.Marshal(m)
	if err == nil {
		_, err = h.in.Write(append(raw, '\n'))
	}
	h.mu.Unlock()
	if err != nil {
		return message{}, err
	}
	select {
	case a := <-answer:
		return a, a.err()
	case <-done:
		select {
		case a := <-answer:
			return a, a.err()
		default:
			return message{}, errDied
		}
	case <-time.After(answerWait):
		return message{}, fmt.Errorf("%s %s: no answer in %v", m.Op, m.ID, answerWait)
	}
}

func (h *host) Present(_ context.Context, id string, source present.Source, readOnly bool) (present.Disk, error) {
	m, err := h.call(message{Op: opPresent, ID: id, Source: source, ReadOnly: readOnly})
	return m.Disk, err
}

func (h *host) Withdraw(_ context.Context, id string) error {
	_, err := h.call(message{Op: opWithdraw, ID: id})
	return err
}

func (h *host) List(context.Context) ([]present.Disk, error) {
	m, err := h.call(message{Op: opList})
	return m.Disks, err
}

func (h *host) close() error {
	_, err := h.call(message{Op: opClose})
	if err == nil {
		<-h.done
	}
	return err
}

func (h *host) teardown() error {
	_, err := h.call(message{Op: opTeardown})
	if err == nil {
		<-h.done
	}
	return err
}

// kill ends the process with SIGKILL and returns when it is gone.
func (h *host) kill() {
	h.mu.Lock()
	cmd, done := h.cmd, h.done
	h.mu.Unlock()
	if cmd != nil && cmd.Process != nil {
		cmd.Process.Kill()
		<-done
	}
}
