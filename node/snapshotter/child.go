package snapshotter

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"

	"github.com/thaw-project/thaw/kind"
)

// childName is the argv[0] by which a child that touches directories of a disk for
// us knows itself. Why a child does it is said in package node/mount.
const childName = "thaw-snapshotter-directories"

// maxChildBytes bounds what passes between parent and child: an image has at most
// annotation.MaxLayers layers, and a path of ours is far below 256 bytes.
const maxChildBytes = 1 << 20

// childRequest asks for one of two things: look at Lstat, or make the directories of
// an overlay in Overlay.
type childRequest struct {
	Lstat   []string `json:"lstat,omitempty"`
	Overlay string   `json:"overlay,omitempty"`
	UID     int      `json:"uid"`
	GID     int      `json:"gid"`
}

func init() {
	if len(os.Args) == 1 && os.Args[0] == childName {
		os.Exit(childMain(os.Stdin, os.Stdout, os.Stderr))
	}
}

func childMain(in io.Reader, out, errOut io.Writer) int {
	var req childRequest
	raw, err := io.ReadAll(io.LimitReader(in, maxChildBytes))
	if err == nil {
		err = json.Unmarshal(raw, &req)
	}
	var nodes []Node
	if err == nil {
		nodes, err = req.run()
	}
	if err == nil {
		raw, err = json.Marshal(nodes)
	}
	if err == nil {
		_, err = out.Write(raw)
	}
	if err != nil {
		fmt.Fprintln(errOut, err)
		return 1
	}
	return 0
}

func (r childRequest) run() ([]Node, error) {
	if r.Overlay != "" {
		return nil, makeOverlayDirs(r.Overlay, r.UID, r.GID)
	}
	nodes := make([]Node, 0, len(r.Lstat))
	for _, p := range r.Lstat {
		var st syscall.Stat_t
		switch err := syscall.Lstat(p, &st); {
		case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ENOTDIR):
			nodes = append(nodes, Node{})
		case err != nil:
			return nil, fmt.Errorf("lstat %s: %w", p, err)
		default:
			nodes = append(nodes, Node{
				Directory: st.Mode&syscall.S_IFMT == syscall.S_IFDIR,
				UID:       int(st.Uid), GID: int(st.Gid),
			})
		}
	}
	return nodes, nil
}

// makeOverlayDirs makes upper last and complete, so that one that exists is right.
func makeOverlayDirs(root string, uid, gid int) error {
	upper, temp := filepath.Join(root, "upper"), filepath.Join(root, "upper.new")
	if _, err := os.Lstat(upper); err == nil {
		return nil
	}
	for dir, mode := range map[string]os.FileMode{filepath.Join(root, "work"): 0o711, temp: 0o755} {
		if err := os.Mkdir(dir, mode); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
		if err := os.Chmod(dir, mode); err != nil { // whatever the umask is
			return err
		}
	}
	if err := os.Lchown(temp, uid, gid); err != nil {
		return err
	}
	return os.Rename(temp, upper)
}

// inChild has a child of the same executable do req. When ctx ends first the child
// is killed, and reaped once the disk it waits for answers.
func inChild(ctx context.Context, req childRequest) ([]Node, error) {
	raw, err := json.Marshal(req)
	if err != nil {
		return nil, err
	}
	if len(raw) > maxChildBytes {
		return nil, kind.Errorf(kind.Invalid, "look at directories: %d paths are too many", len(req.Lstat))
	}
	var stdout, stderr bytes.Buffer
	cmd := exec.Command("/proc/self/exe")
	cmd.Args = []string{childName}
	cmd.Env = []string{"GOMAXPROCS=1", "GOGC=off"}
	cmd.Dir = "/"
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(raw), &stdout, &stderr
	// A session of its own: Ctrl-C must not stop it half-way.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("look at directories: start child: %w", err)
	}
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	select {
	case err = <-done:
	case <-ctx.Done():
		// The kernel may not let the child end before its disk answers, so nobody
		// can wait for it; the goroutine above reaps it.
		_ = cmd.Process.Kill()
		return nil, kind.Errorf(kind.Unavailable, "look at directories: %w", context.Cause(ctx))
	}
	if err != nil {
		return nil, kind.Errorf(kind.IO, "look at directories: %w: %.500s", err, stderr.String())
	}
	var nodes []Node
	if err := json.Unmarshal(stdout.Bytes(), &nodes); err != nil {
		return nil, fmt.Errorf("look at directories: child's answer: %w", err)
	}
	if len(nodes) != len(req.Lstat) {
		return nil, fmt.Errorf("look at directories: child answered for %d of %d", len(nodes), len(req.Lstat))
	}
	return nodes, nil
}
