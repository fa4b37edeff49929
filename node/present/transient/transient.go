// Package transient shows lvols that a store exported to this machine as files, for as
// long as one process lives: a converter that is not on the store's machine.
//
// The process that uses the files must not be the one that serves them, so a second
// process (Serve) connects to the store over NVMe/TCP and serves a FUSE mount, in a mount
// namespace that it shares with the first (Isolate) and with nobody else. It ends when the
// first does, however that ends, and with both of them the mount is gone: nothing is
// recorded and nothing is left. A user of a file writes what the kernel caches back by
// fsync, which goes through to the store.
//
// The package must not know who exports lvols, nor what is in them.
package transient

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync"
	"syscall"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/node/present"
	"github.com/thaw-project/thaw/node/present/fuse"
	"github.com/thaw-project/thaw/nvme/host"
	"github.com/thaw-project/thaw/target/bdev"
)

const (
	// isolatedEnv tells the executed program that it is in a namespace of its own, and
	// where its empty directory is.
	isolatedEnv = "THAW_ISOLATED"

	// mountPoint is where that is: a directory that every machine with FUSE has, and that
	// no converter reads.
	mountPoint = "/sys/fs/fuse/connections"

	// mostFiles bounds what is shown at once: a conversion writes one block at a time.
	mostFiles = 64

	// maxLine bounds a request: an attachment with its portals.
	maxLine = 64 << 10

	// connectPause is how long to wait after an attempt to connect that failed.
	connectPause = 200 * time.Millisecond

	// hideWait is how long Hide waits for a kernel that has the file open: a loop device
	// detaches itself a moment after its unmount.
	hideWait = 5 * time.Second

	// endWait is how long a serving process has to end by itself.
	endWait = 5 * time.Second
)

// Volume is an lvol as the store exports it to this machine.
type Volume struct {
	Subsystem string   `json:"subsystem"`
	HostNQN   string   `json:"host_nqn"`
	HostID    string   `json:"host_id"`
	UUID      string   `json:"uuid"`    // of the nvmeNamespace
	Portals   []string `json:"portals"` // NVMe/TCP, addresses with ports
	SizeBytes int64    `json:"size_bytes"`
	ReadOnly  bool     `json:"read_only"`
}

// Isolate puts this process into a mount namespace of its own, in which dir is an empty
// directory. To do so it executes the program again with the same arguments, and returns
// in the second only: call it before anything is open.
func Isolate() (dir string, err error) {
	if os.Getenv(isolatedEnv) != "" {
		return mountPoint, os.Unsetenv(isolatedEnv)
	}
	// The namespace is the thread's. The program that the thread executes gets it, and
	// all other threads end.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	exe, err := os.Executable()
	if err != nil {
		return "", fmt.Errorf("find this program: %w", err)
	}
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return "", kind.Errorf(kind.Of(err), "make a mount namespace: %w: run as root", err)
	}
	// Mounts of the machine are still seen, those of this process are nobody else's.
	if err := unix.Mount("", "/", "", unix.MS_SLAVE|unix.MS_REC, ""); err != nil {
		return "", fmt.Errorf("keep mounts apart: %w", err)
	}
	if err := unix.Mount("thaw", mountPoint, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=0700,size=1m"); err != nil {
		return "", kind.Errorf(kind.Unsupported, "mount on %s: %w: this machine needs FUSE to show a disk of another machine's store", mountPoint, err)
	}
	return "", fmt.Errorf("execute %s: %w", exe, syscall.Exec(exe, os.Args, append(os.Environ(), isolatedEnv+"=1")))
}

type request struct {
	Hide   bool    `json:"hide,omitempty"`
	ID     string  `json:"id"`
	Volume *Volume `json:"volume,omitempty"`
	// WaitNanos is how long the caller waits.
	WaitNanos int64 `json:"wait_nanos"`
}

type reply struct {
	Path  string    `json:"path,omitempty"`
	Error string    `json:"error,omitempty"`
	Kind  kind.Kind `json:"kind,omitempty"`
}

// Client has a process of its own that serves its files. Methods may be called
// concurrently.
type Client struct {
	cmd *exec.Cmd

	mu   sync.Mutex // one request at a time
	conn *net.UnixConn
	in   *bufio.Reader
}

// Start starts the process that serves files in dir: command is a program that calls
// Serve with the socket that it gets as descriptor 3.
func Start(dir string, command []string) (*Client, error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("socket pair: %w", err)
	}
	theirs := os.NewFile(uintptr(pair[1]), "disks")
	defer theirs.Close()
	ours := os.NewFile(uintptr(pair[0]), "disks")
	conn, err := net.FileConn(ours)
	ours.Close()
	if err != nil {
		return nil, fmt.Errorf("socket pair: %w", err)
	}
	cmd := exec.Command(command[0], append(command[1:], "--dir", dir)...)
	cmd.ExtraFiles = []*os.File{theirs}
	cmd.Stderr = os.Stderr
	// Ctrl-C is the converter's, which still needs its disks to end in order.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		conn.Close()
		return nil, fmt.Errorf("start what serves disks: %w", err)
	}
	unixConn := conn.(*net.UnixConn)
	return &Client{cmd: cmd, conn: unixConn, in: bufio.NewReaderSize(unixConn, maxLine)}, nil
}

// Close ends the process; what is still shown is gone.
func (c *Client) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.conn.Close()
	late := time.AfterFunc(endWait, func() { c.cmd.Process.Kill() })
	defer late.Stop()
	if err := c.cmd.Wait(); err != nil {
		return fmt.Errorf("what served disks: %w", err)
	}
	return nil
}

// callMost bounds a call whose context has no deadline.
const callMost = 2 * time.Minute

func (c *Client) call(ctx context.Context, r request) (string, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := ctx.Err(); err != nil {
		return "", kind.Wrap(kind.Canceled, err)
	}
	wait := callMost
	if d, ok := ctx.Deadline(); ok {
		wait = min(wait, time.Until(d))
	}
	r.WaitNanos = int64(wait)
	// The process answers in time; if it does not, its answers can no longer be told apart.
	if err := c.conn.SetDeadline(time.Now().Add(wait + endWait)); err != nil {
		return "", kind.Wrap(kind.Unavailable, err)
	}
	// It does not hear of a caller who gives up before.
	stop := context.AfterFunc(ctx, func() { _ = c.conn.SetDeadline(time.Now().Add(endWait)) })
	defer stop()
	raw, err := json.Marshal(r)
	if err != nil {
		return "", err
	}
	if _, err := c.conn.Write(append(raw, '\n')); err != nil {
		return "", kind.Errorf(kind.Unavailable, "what serves disks is gone: %w", err)
	}
	line, err := c.in.ReadSlice('\n')
	if err != nil {
		c.conn.Close()
		return "", kind.Errorf(kind.Unavailable, "what serves disks is gone: %w", err)
	}
	var answer reply
	if err := json.Unmarshal(line, &answer); err != nil {
		return "", kind.Errorf(kind.Corrupt, "what serves disks answers %.80q: %w", line, err)
	}
	if answer.Error != "" {
		return "", kind.Errorf(answer.Kind, "%s", answer.Error)
	}
	return answer.Path, nil
}

// Show shows a volume as the file id and returns its path. The same id with the same
// volume returns the file that is there.
func (c *Client) Show(ctx context.Context, id string, v Volume) (path string, err error) {
	return c.call(ctx, request{ID: id, Volume: &v})
}

// Hide takes a file away, after what was written to it has become durable; an unknown id is
// no error. The error is kind.InUse while something has it open.
func (c *Client) Hide(ctx context.Context, id string) error {
	_, err := c.call(ctx, request{ID: id, Hide: true})
	return err
}

// server is the other end.
type server struct {
	log   *slog.Logger
	files *fuse.Presenter

	mu     sync.Mutex
	opened map[string]*connection // guarded by mu
}

type connection struct {
	volume Volume
	host   *host.Host
	device *host.Device
}

// Serve answers a Client on conn until that is closed, with a FUSE mount in dir, which must
// be in a namespace of its own.
func Serve(ctx context.Context, dir string, conn net.Conn, log *slog.Logger) (err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	s := &server{log: log, opened: make(map[string]*connection)}
	s.files, err = fuse.New(fuse.Options{
		Dir: filepath.Join(dir, "dev"), StatePath: filepath.Join(dir, "fuse.json"), Open: s.open, Interrupt: s.close, Logger: log,
	})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.files.Close()) }()
	in := bufio.NewReaderSize(conn, maxLine)
	for {
		line, err := in.ReadSlice('\n')
		if errors.Is(err, io.EOF) || errors.Is(err, unix.ECONNRESET) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read request: %w", err)
		}
		var r request
		if err := json.Unmarshal(line, &r); err != nil {
			return kind.Errorf(kind.Corrupt, "request: %w", err)
		}
		raw, err := json.Marshal(s.answer(ctx, r))
		if err != nil {
			return err
		}
		if _, err := conn.Write(append(raw, '\n')); err != nil {
			return nil // the client is gone
		}
	}
}

func (s *server) answer(ctx context.Context, r request) (a reply) {
	ctx, cancel := context.WithTimeout(ctx, min(max(0, time.Duration(r.WaitNanos)), callMost))
	defer cancel()
	var err error
	switch {
	case r.Hide:
		err = s.hide(ctx, r.ID)
	case r.Volume != nil:
		a.Path, err = s.show(ctx, r.ID, *r.Volume)
	default:
		err = kind.Errorf(kind.Invalid, "request without a volume")
	}
	if err != nil {
		a = reply{Error: err.Error(), Kind: kind.Of(err)}
	}
	return a
}

func (s *server) show(ctx context.Context, id string, v Volume) (string, error) {
	s.mu.Lock()
	have, most := s.opened[id], len(s.opened) >= mostFiles
	s.mu.Unlock()
	switch {
	case have != nil && have.volume.UUID != v.UUID:
		return "", kind.Errorf(kind.Exists, "another volume is shown as %s", id)
	case have == nil && most:
		return "", kind.Errorf(kind.NoSpace, "%d volumes are shown already", mostFiles)
	case have == nil:
		c, err := s.connect(ctx, v)
		if err != nil {
			return "", err
		}
		s.mu.Lock()
		s.opened[id] = c
		s.mu.Unlock()
	}
	disk, err := s.files.Present(ctx, id, present.Source{Kind: present.SourceLvol, Lvol: id}, v.ReadOnly)
	if err != nil {
		return "", errors.Join(err, s.drop(id))
	}
	return disk.Path, nil
}

// connect reaches the nvmeNamespace of a volume that was just exported.
func (s *server) connect(ctx context.Context, v Volume) (*connection, error) {
	hostID, err := uuid.Parse(v.HostID)
	if err != nil {
		return nil, kind.Errorf(kind.Invalid, "host identifier %.80q is no UUID", v.HostID)
	}
	id, err := uuid.Parse(v.UUID)
	if err != nil {
		return nil, kind.Errorf(kind.Invalid, "nvmeNamespace %.80q is no UUID", v.UUID)
	}
	for {
		h, err := host.Connect(ctx, host.Config{Portals: v.Portals, SubNQN: v.Subsystem, HostNQN: v.HostNQN, HostID: hostID, Queues: 2, Log: s.log})
		if err == nil {
			device, err := h.OpenUUID(id)
			if err == nil && device.SizeBytes() != v.SizeBytes {
				err = kind.Errorf(kind.Corrupt, "it has %d bytes, the store says %d", device.SizeBytes(), v.SizeBytes)
			}
			if err == nil {
				return &connection{volume: v, host: h, device: device}, nil
			}
			return nil, errors.Join(fmt.Errorf("nvmeNamespace %s at %v: %w", v.UUID, v.Portals, err), h.Close())
		}
		select {
		case <-ctx.Done():
			return nil, kind.Errorf(kind.Unavailable, "connect to the store at %v: %w", v.Portals, err)
		case <-time.After(connectPause):
		}
	}
}

// open is the presenter's way to the device of a volume, which stays the connection's.
func (s *server) open(source present.Source, _ bool) (bdev.Device, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	c := s.opened[source.Lvol]
	if c == nil {
		return nil, kind.Errorf(kind.NotFound, "no volume %s", source.Lvol)
	}
	return borrowed{c.device}, nil
}

// borrowed is a device that its user must not close.
type borrowed struct{ bdev.Device }

func (borrowed) Close() error { return nil }

func (s *server) hide(ctx context.Context, id string) error {
	ctx, cancel := context.WithTimeout(ctx, hideWait)
	defer cancel()
	for {
		err := s.files.Withdraw(ctx, id)
		if err == nil {
			return s.drop(id)
		}
		if !errors.Is(err, kind.InUse) {
			return errors.Join(err, s.drop(id))
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// drop ends the connection of a volume that is shown no more.
func (s *server) drop(id string) error {
	s.mu.Lock()
	c := s.opened[id]
	delete(s.opened, id)
	s.mu.Unlock()
	if c == nil {
		return nil
	}
	return errors.Join(c.device.Close(), c.host.Close())
}

// close makes whoever waits for the store fail.
func (s *server) close() {
	s.mu.Lock()
	all := s.opened
	s.opened = make(map[string]*connection)
	s.mu.Unlock()
	for id, c := range all {
		if err := errors.Join(c.device.Close(), c.host.Close()); err != nil {
			s.log.Warn("close volume", "id", id, "error", err)
		}
	}
}
