// Package blockdev does to block devices what a process that serves them must not do
// itself: opening, claiming, and system calls of the kernel that may wait for a device or
// for a network. A thread of the server that waited for the server could not be killed,
// and its successor could not start. So a short-lived child (the same executable, started as
// "thaw-blockdev") does them.
//
// It must not know what kind of device it is.
package blockdev

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/thaw-project/thaw/kind"
)

// childName is the argv[0] by which a child knows what it is.
const childName = "thaw-blockdev"

// maxMessageBytes bounds what a child says.
const maxMessageBytes = 64 << 10

const (
	opClaim    = "claim"
	opWrite    = "write"
	opReadOnly = "read-only"
)

// request is what a child gets as its only argument, in JSON.
type request struct {
	Op   string `json:"op"`
	Path string `json:"path"`
	// Wait is how long to try to claim.
	Wait     time.Duration `json:"wait,omitempty"`
	ReadOnly bool          `json:"read_only,omitempty"`
	Data     string        `json:"data,omitempty"`
	Reply    bool          `json:"reply,omitempty"`
}

// response is the line a child writes to its standard output.
type response struct {
	Reply string        `json:"reply,omitempty"`
	Kind  kind.Kind     `json:"kind,omitempty"`
	Errno syscall.Errno `json:"errno,omitempty"`
	Error string        `json:"error,omitempty"`
}

// failure is an error that came from a child.
type failure struct {
	text  string
	errno syscall.Errno
}

func (f *failure) Error() string { return f.text }
func (f *failure) Unwrap() error {
	if f.errno == 0 {
		return nil
	}
	return f.errno
}

func (r *response) err() error {
	if r.Error == "" {
		return nil
	}
	err := error(&failure{r.Error, r.Errno})
	if r.Kind != "" {
		err = kind.Wrap(r.Kind, err)
	}
	return err
}

func init() {
	if len(os.Args) == 2 && os.Args[0] == childName {
		os.Exit(childMain(os.Args[1]))
	}
}

func childMain(arg string) int {
	var req request
	var resp response
	var held int
	err := json.Unmarshal([]byte(arg), &req)
	if err == nil {
		switch req.Op {
		case opClaim:
			held, err = claim(req)
		case opWrite:
			resp.Reply, err = write(req)
		case opReadOnly:
			err = readOnly(req.Path)
		default:
			err = kind.Errorf(kind.Invalid, "unknown operation %q", req.Op)
		}
	}
	if err != nil {
		resp.Kind, resp.Error = kind.Of(err), err.Error()
		errors.As(err, &resp.Errno)
	}
	raw, _ := json.Marshal(resp)
	if _, err := os.Stdout.Write(append(raw, '\n')); err != nil || resp.Error != "" {
		return 1
	}
	if req.Op == opClaim {
		io.Copy(io.Discard, os.Stdin) // until our parent lets go, or dies
		unix.Close(held)
	}
	return 0
}

// claim opens the device for this process alone, and makes sure that no other has it
// open in any way.
func claim(req request) (int, error) {
	deadline := time.Now().Add(req.Wait)
	for pause := time.Millisecond; ; pause = min(2*pause, 50*time.Millisecond) {
		fd, err := unix.Open(req.Path, unix.O_RDONLY|unix.O_EXCL|unix.O_CLOEXEC, 0)
		var user string
		switch err {
		case nil:
			var st unix.Stat_t
			if err := unix.Fstat(fd, &st); err != nil {
				return -1, fmt.Errorf("stat %s: %w", req.Path, err)
			}
			if st.Mode&unix.S_IFMT != unix.S_IFBLK {
				return -1, kind.Errorf(kind.Invalid, "%s is no block device", req.Path)
			}
			user, err = findUser(req.Path, st.Rdev)
			if err != nil {
				return -1, err
			}
			if user == "" {
				if req.ReadOnly {
					if err := setReadOnly(fd); err != nil {
						return -1, fmt.Errorf("make %s read-only: %w", req.Path, err)
					}
				}
				return fd, nil
			}
			unix.Close(fd)
		case unix.EBUSY:
			user = "mounted, or held by another device"
			var st unix.Stat_t
			if unix.Stat(req.Path, &st) == nil {
				if u, err := findUser(req.Path, st.Rdev); err == nil && u != "" {
					user = u
				}
			}
		case unix.EINTR:
			continue
		case unix.ENOENT, unix.ENXIO, unix.ENODEV:
			return -1, kind.Errorf(kind.NotFound, "open %s: %w", req.Path, err)
		default:
			return -1, fmt.Errorf("open %s: %w", req.Path, err)
		}
		if time.Now().After(deadline) {
			return -1, kind.Errorf(kind.InUse, "%s is in use: %s", req.Path, user)
		}
		time.Sleep(pause)
	}
}

func readOnly(path string) error {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	switch err {
	case nil:
	case unix.ENOENT, unix.ENXIO, unix.ENODEV:
		return kind.Errorf(kind.NotFound, "open %s: %w", path, err)
	default:
		return fmt.Errorf("open %s: %w", path, err)
	}
	defer unix.Close(fd)
	if err := setReadOnly(fd); err != nil {
		return fmt.Errorf("make %s read-only: %w", path, err)
	}
	return nil
}

func setReadOnly(fd int) error {
	return unix.IoctlSetPointerInt(fd, unix.BLKROSET, 1)
}

// write writes to the file, and reads a reply from the same open file.
func write(req request) (string, error) {
	flags := unix.O_WRONLY
	if req.Reply {
		flags = unix.O_RDWR
	}
	fd, err := unix.Open(req.Path, flags|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", fmt.Errorf("open %s: %w", req.Path, err)
	}
	defer unix.Close(fd)
	if _, err := unix.Write(fd, []byte(req.Data)); err != nil {
		return "", fmt.Errorf("write %s: %w", req.Path, err)
	}
	if !req.Reply {
		return "", nil
	}
	b := make([]byte, 4096)
	n, err := unix.Read(fd, b)
	if err != nil {
		return "", fmt.Errorf("read %s: %w", req.Path, err)
	}
	return string(b[:n]), nil
}

// child is a running child.
type child struct {
	cmd   *exec.Cmd
	stdin io.WriteCloser
	lines *bufio.Reader
}

func start(req request) (*child, error) {
	raw, err := json.Marshal(req)
	if err != nil {
		return nil, err
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Args = []string{childName, string(raw)}
	// It allocates next to nothing.
	cmd.Env = []string{"GOMAXPROCS=1", "GOGC=off", "GOMEMLIMIT=32MiB"}
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
		return nil, fmt.Errorf("start child: %w", err)
	}
	return &child{cmd, stdin, bufio.NewReader(io.LimitReader(stdout, maxMessageBytes))}, nil
}

// answer waits for the child's line. When ctx ends first the child is killed and left
// to be reaped: one that waits for a device ends when the device answers.
func (c *child) answer(ctx context.Context) (response, error) {
	type answer struct {
		resp response
		err  error
	}
	done := make(chan answer, 1)
	go func() {
		var a answer
		line, err := c.lines.ReadBytes('\n')
		if err == nil {
			err = json.Unmarshal(bytes.TrimSpace(line), &a.resp)
		}
		if err != nil {
			a.err = fmt.Errorf("child: %w", err)
		} else {
			a.err = a.resp.err()
		}
		if a.err != nil {
			c.end()
		}
		done <- a
	}()
	select {
	case a := <-done:
		return a.resp, a.err
	case <-ctx.Done():
		c.cmd.Process.Kill()
		go func() {
			if a := <-done; a.err == nil {
				c.end()
			}
		}()
		return response{}, kind.Errorf(kind.Canceled, "it did not end in time: %w", context.Cause(ctx))
	}
}

// end has the child end, and reaps it.
func (c *child) end() error {
	c.stdin.Close()
	return c.cmd.Wait()
}

// Claim is a block device that nobody but the holder of the claim can mount, claim or
// stack something on.
type Claim struct{ c *child }

// ClaimOptions configures Take.
type ClaimOptions struct {
	// Wait is for how long users of the device may take to be gone; 0 is one look.
	// Programs that look at every new device, such as udev's, take a moment.
	Wait time.Duration
	// ReadOnly makes the device read-only (BLKROSET) while it is claimed.
	ReadOnly bool
}

// Take claims the block device at path. It is kind.InUse when it is mounted, when a device
// is stacked on it or a process has it open, kind.NotFound when there is none, and
// kind.Canceled when ctx ended first.
func Take(ctx context.Context, path string, o ClaimOptions) (*Claim, error) {
	c, err := start(request{Op: opClaim, Path: path, Wait: o.Wait, ReadOnly: o.ReadOnly})
	if err != nil {
		return nil, err
	}
	if _, err := c.answer(ctx); err != nil {
		return nil, err
	}
	return &Claim{c}, nil
}

// Release lets go, and returns when the device is closed. Closing writes back what is
// cached of it.
func (c *Claim) Release() error {
	if err := c.c.end(); err != nil {
		return fmt.Errorf("release block device: %w", err)
	}
	return nil
}

// SetReadOnly makes the block device at path read-only (BLKROSET), whoever looks at it
// meanwhile. It is kind.NotFound when there is none, and kind.Canceled when ctx ended first.
func SetReadOnly(ctx context.Context, path string) error {
	_, err := run(ctx, request{Op: opReadOnly, Path: path})
	return err
}

// Write writes data to the file at path, of sysfs or a control device, with one call.
func Write(ctx context.Context, path, data string) error {
	_, err := run(ctx, request{Op: opWrite, Path: path, Data: data})
	return err
}

// Ask is Write that returns what can be read from the same open file afterwards, at most
// 4 KiB.
func Ask(ctx context.Context, path, data string) (string, error) {
	return run(ctx, request{Op: opWrite, Path: path, Data: data, Reply: true})
}

func run(ctx context.Context, req request) (string, error) {
	c, err := start(req)
	if err != nil {
		return "", err
	}
	resp, err := c.answer(ctx)
	if err != nil {
		return "", err
	}
	return resp.Reply, c.end()
}
