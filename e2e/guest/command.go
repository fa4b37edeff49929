package guest

import (
	"context"
	"fmt"
	"io"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/thaw-project/thaw/e2e/guest/wire"
	"github.com/thaw-project/thaw/kind"
)

// defaultTimeout ends a command whose context has no deadline.
const defaultTimeout = 2 * time.Minute

// killWait is how long a killed command may take to end: one that the kernel holds in
// an uninterruptible wait does not.
const killWait = 10 * time.Second

// maxOutputBytes is how much output of a command is kept; what follows is dropped.
const maxOutputBytes = 16 << 20

// Process is a command that runs in the guest.
type Process struct {
	g      *Guest
	id     uint32
	script string
	done   chan struct{} // closed when the command ended, or the guest

	mu     sync.Mutex
	output []byte // guarded by mu
	code   int    // read after done
	err    error  // read after done
}

// Run runs a script of bash to its end and returns what it printed, on both streams,
// and its exit status, which is 128 + the signal's number for a script that a signal
// ended. The error is not nil when it could not be run, when ctx ended, and when the
// guest did. A ctx without deadline gets one of two minutes.
func (g *Guest) Run(ctx context.Context, script string) (output string, code int, err error) {
	p, err := g.Start(ctx, script, nil)
	if err != nil {
		return "", 0, err
	}
	code, err = p.Wait(ctx)
	return p.Output(), code, err
}

// WriteFile writes a file of the guest; at most 64 MB, for more use Options.Files.
func (g *Guest) WriteFile(ctx context.Context, path string, mode os.FileMode, content io.Reader) error {
	p, err := g.Start(ctx, fmt.Sprintf("mkdir -p -- \"$(dirname '%[1]s')\" && cat >'%[1]s' && chmod %#o '%[1]s'", path, mode.Perm()), content)
	if err != nil {
		return err
	}
	if code, err := p.Wait(ctx); err != nil || code != 0 {
		return fmt.Errorf("write guest's %s: status %d: %w: %s", path, code, err, p.Output())
	}
	return nil
}

// Start starts a script of bash and does not wait for it. Input, when not nil, is read
// to its end before the script starts; at most 64 MB. Children that the script leaves
// behind live on.
func (g *Guest) Start(ctx context.Context, script string, input io.Reader) (*Process, error) {
	p := &Process{g: g, script: script, done: make(chan struct{})}
	g.mu.Lock()
	if g.processes == nil {
		g.mu.Unlock()
		return nil, g.gone()
	}
	g.nextID++
	p.id = g.nextID
	g.processes[p.id] = p
	g.mu.Unlock()
	if err := p.send(ctx, input); err != nil {
		g.mu.Lock()
		delete(g.processes, p.id)
		g.mu.Unlock()
		return nil, fmt.Errorf("start in guest %q: %w", p.short(), err)
	}
	return p, nil
}

func (p *Process) send(ctx context.Context, input io.Reader) error {
	buffer := make([]byte, wire.ChunkBytes)
	for input != nil {
		if err := ctx.Err(); err != nil {
			return err
		}
		n, err := input.Read(buffer)
		if n > 0 {
			if err := p.g.wire.Send(wire.Frame{ID: p.id, Kind: wire.Input, Data: buffer[:n]}); err != nil {
				return err
			}
		}
		if err == io.EOF {
			break
		}
		if err != nil {
			return err
		}
	}
	return p.g.wire.Send(wire.Frame{ID: p.id, Kind: wire.Start, Args: []string{"bash", "-c", p.script}})
}

// short is the script for messages.
func (p *Process) short() string { return p.script[:min(len(p.script), 200)] }

// Wait waits for the end of the command and returns as Run does. When ctx ends before,
// the command is killed with all its process group.
func (p *Process) Wait(ctx context.Context) (code int, err error) {
	if _, ok := ctx.Deadline(); !ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, defaultTimeout)
		defer cancel()
	}
	select {
	case <-p.done:
		return p.code, p.err
	case <-ctx.Done():
	}
	p.Signal(unix.SIGKILL)
	timer := time.NewTimer(killWait)
	defer timer.Stop()
	select {
	case <-p.done:
	case <-timer.C:
		return 0, fmt.Errorf("in guest %q: %w, and it does not die; output:\n%s\nconsole:\n%s", p.short(), ctx.Err(), p.Output(), p.g.Console())
	}
	if p.err != nil {
		return 0, p.err
	}
	return p.code, fmt.Errorf("in guest %q: %w; output:\n%s", p.short(), ctx.Err(), p.Output())
}

// Signal sends a signal to the command's process group.
func (p *Process) Signal(s syscall.Signal) {
	// A guest that is gone has ended the command already.
	_ = p.g.wire.Send(wire.Frame{ID: p.id, Kind: wire.Signal, Code: int(s)})
}

// Done is closed when the command has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Output returns what the command has printed so far.
func (p *Process) Output() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return string(p.output)
}

// read hands out what the agent says, until it says no more.
func (g *Guest) read() {
	for {
		f, err := g.wire.Receive()
		if err != nil {
			break
		}
		if f.Kind == wire.Hello {
			close(g.hello)
			continue
		}
		g.mu.Lock()
		p := g.processes[f.ID]
		if f.Kind == wire.Exit {
			delete(g.processes, f.ID)
		}
		g.mu.Unlock()
		if p != nil {
			p.handle(f)
		}
	}
	<-g.ended // so that the console is whole
	g.mu.Lock()
	left := g.processes
	g.processes = nil
	g.mu.Unlock()
	for _, p := range left {
		p.err = fmt.Errorf("in guest %q: %w", p.short(), g.gone())
		close(p.done)
	}
}

func (p *Process) handle(f wire.Frame) {
	switch f.Kind {
	case wire.Output:
		p.mu.Lock()
		defer p.mu.Unlock()
		p.output = append(p.output, f.Data[:min(len(f.Data), maxOutputBytes-len(p.output))]...)
	case wire.Exit:
		p.code = f.Code
		if f.Text != "" {
			p.err = kind.Errorf(kind.Unavailable, "in guest %q: %s", p.short(), f.Text)
		}
		close(p.done)
	}
}
