package mount

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/node/present"
)

// childName is the argv[0] by which a child knows what it is.
const childName = "thaw-mount"

// The operations a child can do.
const (
	opErofs        = "erofs"
	opExt4ReadOnly = "ext4-read-only"
	opExt4         = "ext4"
	opUnmount      = "unmount"
	opAttach       = "attach"
	opDetach       = "detach"
	opLstat        = "lstat"
	opOverlayDirs  = "overlay-directories"
)

// request is what a child reads from its standard input, as a line of JSON.
type request struct {
	Op     string       `json:"op"`
	Disk   present.Disk `json:"disk,omitzero"`
	Target string       `json:"target,omitempty"`
	Path   string       `json:"path,omitempty"`
	Loop   LoopOptions  `json:"loop,omitzero"`
	Paths  []string     `json:"paths,omitempty"`
	UID    int          `json:"uid,omitempty"`
	GID    int          `json:"gid,omitempty"`
}

// response is what it writes to its standard output.
type response struct {
	Device string    `json:"device,omitempty"`
	Nodes  []Node    `json:"nodes,omitempty"`
	Kind   kind.Kind `json:"kind,omitempty"`
	Error  string    `json:"error,omitempty"`
}

// maxMessageBytes bounds requests and responses: paths, a few hundred of them at
// most, and an error text.
const maxMessageBytes = 1 << 20

func (r *request) String() string {
	switch r.Op {
	case opErofs, opExt4, opExt4ReadOnly:
		return fmt.Sprintf("mount %s on %s as %s", r.Disk.Path, r.Target, r.Op)
	case opUnmount:
		return "unmount " + r.Target
	case opLstat:
		return "look at directories"
	case opOverlayDirs:
		return "make directories of an overlay in " + r.Path
	default:
		return r.Op + " loop device for " + r.Path
	}
}

func init() {
	if len(os.Args) == 1 && os.Args[0] == childName {
		os.Exit(childMain(os.Stdin, os.Stdout))
	}
}

// childMain does the operations that stdin asks for, one after the other, until it
// ends.
func childMain(stdin io.Reader, stdout io.Writer) int {
	for in := newMessages(stdin); ; {
		var req request
		var resp response
		err := in.read(&req)
		if err == io.EOF {
			return 0
		}
		last := err != nil // what follows would be read wrongly
		if err == nil {
			err = req.run(&resp)
		}
		if err != nil {
			resp.Kind, resp.Error = kind.Of(err), err.Error()
		}
		raw, err := json.Marshal(resp)
		if err == nil {
			_, err = stdout.Write(append(raw, '\n'))
		}
		if err != nil || last {
			return 1
		}
	}
}

// messages reads JSON texts of bounded size, each on a line of its own.
type messages struct{ lines *bufio.Scanner }

func newMessages(r io.Reader) messages {
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, maxMessageBytes)
	return messages{lines}
}

// read returns io.EOF when there is no further message.
func (m messages) read(v any) error {
	if m.lines.Scan() {
		return json.Unmarshal(m.lines.Bytes(), v)
	}
	if err := m.lines.Err(); err != nil {
		return err
	}
	return io.EOF
}

func (r *request) run(resp *response) (err error) {
	switch r.Op {
	case opErofs:
		return unlessMounted(r.Disk, r.Target, "erofs", func() error { return mountErofs(r.Disk, r.Target) })
	case opExt4ReadOnly:
		return unlessMounted(r.Disk, r.Target, "ext4", func() error { return mountExt4(r.Disk, r.Target, unix.MS_RDONLY, "noload") })
	case opExt4:
		return unlessMounted(r.Disk, r.Target, "ext4", func() error { return mountExt4(r.Disk, r.Target, 0, "") })
	case opUnmount:
		return unmount(r.Target)
	case opAttach:
		loop, err := attach(r.Path, r.Loop)
		if err != nil {
			return err
		}
		resp.Device = loop.Name()
		return loop.Close()
	case opDetach:
		return detach(r.Path)
	case opLstat:
		resp.Nodes, err = lstat(r.Paths)
		return err
	case opOverlayDirs:
		return makeOverlayDirs(r.Path, r.UID, r.GID)
	}
	return kind.Errorf(kind.Invalid, "unknown operation %q", r.Op)
}

// child is a process that waits for requests, or does one.
type child struct {
	cmd   *exec.Cmd
	stdin io.WriteCloser
	out   messages
	timer *time.Timer // ends it when it waited long enough; guarded by idle.Mutex
}

const (
	// maxIdle is how many children wait for a next request: a container's disk needs
	// one at a time, and two that start at once are common.
	maxIdle = 2
	// idleTime is how long each waits. To start one costs three milliseconds of CPU
	// and, on a busy machine, several turns of waiting for it, which a burst of
	// starting containers pays once; memory is given back soon after.
	idleTime = 5 * time.Second
)

// idle holds the children that wait.
var idle struct {
	sync.Mutex
	children []*child // guarded by Mutex; the last came last
}

// takeChild returns a waiting child, or nil.
func takeChild() *child {
	idle.Lock()
	defer idle.Unlock()
	n := len(idle.children)
	if n == 0 {
		return nil
	}
	c := idle.children[n-1]
	idle.children = idle.children[:n-1]
	c.timer.Stop() // if it runs already, it does not find c
	return c
}

// giveBack keeps c for a next request, or ends it.
func (c *child) giveBack() {
	idle.Lock()
	full := len(idle.children) >= maxIdle
	if !full {
		idle.children = append(idle.children, c)
		var timer *time.Timer
		timer = time.AfterFunc(idleTime, func() {
			idle.Lock()
			i := slices.Index(idle.children, c)
			old := i < 0 || c.timer != timer // taken meanwhile, and perhaps given back
			if !old {
				idle.children = slices.Delete(idle.children, i, i+1)
			}
			idle.Unlock()
			if !old {
				c.end()
			}
		})
		c.timer = timer
	}
	idle.Unlock()
	if full {
		c.end()
	}
}

func startChild() (*child, error) {
	cmd := exec.Command("/proc/self/exe")
	cmd.Args = []string{childName}
	// It allocates next to nothing, and collects before that becomes much.
	cmd.Env = []string{"GOMAXPROCS=1", "GOGC=off", "GOMEMLIMIT=16MiB"}
	cmd.Dir = "/"
	// A session of its own: Ctrl-C must not stop it half-way.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		stdin.Close()
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	return &child{cmd: cmd, stdin: stdin, out: newMessages(stdout)}, nil
}

// end has a child that does nothing end, and reaps it. One that is killed and waits
// for a disk ends when the disk answers.
func (c *child) end() error {
	c.stdin.Close()
	return c.cmd.Wait()
}

// do has the child do req. An error says that it did not answer.
func (c *child) do(req request) (resp response, err error) {
	raw, err := json.Marshal(req)
	if err == nil && len(raw) >= maxMessageBytes {
		err = kind.Errorf(kind.Invalid, "a request of %d bytes is too long", len(raw))
	}
	if err == nil {
		_, err = c.stdin.Write(append(raw, '\n'))
	}
	if err == nil {
		err = c.out.read(&resp)
	}
	return resp, err
}

// call has a child do req. When ctx ends first, the child is killed and left to be
// reaped; one that waits for a disk ends when the disk answers. A child that died
// while it waited is replaced: whatever it began can be done again.
func call(ctx context.Context, req request) (response, error) {
	if err := ctx.Err(); err != nil {
		return response{}, kind.Errorf(kind.Canceled, "%s: %w", &req, context.Cause(ctx))
	}
	c := takeChild()
	if c != nil {
		resp, err := callChild(ctx, c, req)
		if err == nil || ctx.Err() != nil {
			return finish(&req, resp, err)
		}
	}
	c, err := startChild()
	if err != nil {
		return response{}, fmt.Errorf("%s: start child: %w", &req, err)
	}
	resp, err := callChild(ctx, c, req)
	return finish(&req, resp, err)
}

// callChild has c do req and gives it back, or ends it if it did not answer.
func callChild(ctx context.Context, c *child, req request) (response, error) {
	type answer struct {
		response
		err error
	}
	done := make(chan answer, 1)
	go func() {
		resp, err := c.do(req)
		if err != nil {
			c.cmd.Process.Kill()
			if died := c.end(); died != nil {
				err = fmt.Errorf("%w (%w)", err, died)
			}
		}
		done <- answer{resp, err}
	}()
	select {
	case a := <-done:
		if a.err != nil {
			return response{}, fmt.Errorf("child: %w", a.err)
		}
		c.giveBack()
		return a.response, nil
	case <-ctx.Done():
		// The goroutine reaps it.
		c.cmd.Process.Kill()
		return response{}, kind.Wrap(kind.Canceled, context.Cause(ctx))
	}
}

func finish(req *request, resp response, err error) (response, error) {
	switch {
	case err != nil:
		return response{}, fmt.Errorf("%s: %w", req, err)
	case resp.Error == "":
		return resp, nil
	}
	err = fmt.Errorf("%s: %s", req, resp.Error)
	if resp.Kind == "" {
		return response{}, err
	}
	return response{}, kind.Wrap(resp.Kind, err)
}

var errNoLoop = errors.New("no loop device")
