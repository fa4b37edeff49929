package mount

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"syscall"

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
)

// request is what a child reads from its standard input, as JSON.
type request struct {
	Op     string       `json:"op"`
	Disk   present.Disk `json:"disk,omitzero"`
	Target string       `json:"target,omitempty"`
	Path   string       `json:"path,omitempty"`
	Loop   LoopOptions  `json:"loop,omitzero"`
}

// response is what it writes to its standard output.
type response struct {
	Device string    `json:"device,omitempty"`
	Kind   kind.Kind `json:"kind,omitempty"`
	Error  string    `json:"error,omitempty"`
}

// maxMessageBytes bounds requests and responses: paths and an error text.
const maxMessageBytes = 64 << 10

func (r *request) String() string {
	switch r.Op {
	case opErofs, opExt4, opExt4ReadOnly:
		return fmt.Sprintf("mount %s on %s as %s", r.Disk.Path, r.Target, r.Op)
	case opUnmount:
		return "unmount " + r.Target
	default:
		return r.Op + " loop device for " + r.Path
	}
}

func init() {
	if len(os.Args) == 1 && os.Args[0] == childName {
		os.Exit(childMain(os.Stdin, os.Stdout))
	}
}

// childMain does the one operation that stdin asks for.
func childMain(stdin io.Reader, stdout io.Writer) int {
	var req request
	var resp response
	raw, err := io.ReadAll(io.LimitReader(stdin, maxMessageBytes))
	if err == nil {
		err = json.Unmarshal(raw, &req)
	}
	if err == nil {
		resp.Device, err = req.run()
	}
	if err != nil {
		resp.Kind, resp.Error = kind.Of(err), err.Error()
	}
	raw, err = json.Marshal(resp)
	if err == nil {
		_, err = stdout.Write(raw)
	}
	if err != nil {
		return 1
	}
	return 0
}

func (r *request) run() (device string, err error) {
	switch r.Op {
	case opErofs:
		return "", unlessMounted(r.Disk, r.Target, "erofs", func() error { return mountErofs(r.Disk, r.Target) })
	case opExt4ReadOnly:
		return "", unlessMounted(r.Disk, r.Target, "ext4", func() error { return mountExt4(r.Disk, r.Target, unix.MS_RDONLY, "noload") })
	case opExt4:
		return "", unlessMounted(r.Disk, r.Target, "ext4", func() error { return mountExt4(r.Disk, r.Target, 0, "") })
	case opUnmount:
		return "", unmount(r.Target)
	case opAttach:
		loop, err := attach(r.Path, r.Loop)
		if err != nil {
			return "", err
		}
		return loop.Name(), loop.Close()
	case opDetach:
		return "", detach(r.Path)
	}
	return "", kind.Errorf(kind.Invalid, "unknown operation %q", r.Op)
}

// call has a child do req. When ctx ends first, the child is killed and left to be
// reaped; one that waits for a disk ends when the disk answers.
func call(ctx context.Context, req request) (string, error) {
	if err := ctx.Err(); err != nil {
		return "", kind.Errorf(kind.Canceled, "%s: %w", &req, err)
	}
	raw, err := json.Marshal(req)
	if err != nil {
		return "", fmt.Errorf("%s: %w", &req, err)
	}
	var stdout bytes.Buffer
	cmd := exec.Command("/proc/self/exe")
	cmd.Args = []string{childName}
	cmd.Env = []string{"GOMAXPROCS=1", "GOGC=off"}
	cmd.Dir = "/"
	cmd.Stdin = bytes.NewReader(raw)
	cmd.Stdout = &stdout
	// A session of its own: Ctrl-C must not stop it half-way.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return "", fmt.Errorf("%s: start child: %w", &req, err)
	}
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	select {
	case err = <-done:
	case <-ctx.Done():
		cmd.Process.Kill()
		return "", kind.Errorf(kind.Canceled, "%s: %w", &req, ctx.Err())
	}
	if err != nil {
		return "", fmt.Errorf("%s: child: %w", &req, err)
	}
	var resp response
	if err := json.Unmarshal(stdout.Bytes(), &resp); err != nil {
		return "", fmt.Errorf("%s: child's answer: %w", &req, err)
	}
	if resp.Error != "" {
		err := fmt.Errorf("%s: %s", &req, resp.Error)
		if resp.Kind == "" {
			return "", err
		}
		return "", kind.Wrap(resp.Kind, err)
	}
	return resp.Device, nil
}

var errNoLoop = errors.New("no loop device")
