package keeper

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/thaw-project/thaw/kind"
)

const (
	// startTimeout bounds how long a started keeper may take to listen.
	startTimeout = 10 * time.Second
	// callTimeout bounds one request; the keeper answers from memory.
	callTimeout = 5 * time.Second
	// restartPause keeps a keeper that dies at once from being started in a busy
	// loop.
	restartPause = 250 * time.Millisecond
)

// Client talks to a keeper and keeps one alive: when the keeper dies it starts
// another and puts what it held again. Its methods may be called concurrently.
type Client struct {
	options Options
	ctx     context.Context // ends with Close
	cancel  context.CancelFunc
	wg      sync.WaitGroup // the supervisor

	callMu sync.Mutex // one request at a time; also orders changes of held with the keeper's

	mu      sync.Mutex
	link    *link          // guarded by mu: nil while there is none
	held    map[string]int // guarded by mu: our duplicates of what the keeper holds for us
	child   int            // guarded by mu: the keeper we started and have not reaped, or 0
	exiting bool           // guarded by mu: we told it to exit, so its end is no loss

	// replies carries what the supervisor, the only reader of a link, received.
	replies chan reply
}

// link is one connection to one keeper.
type link struct {
	conn *net.UnixConn
	pid  int
	lost chan struct{} // closed by the supervisor when the connection broke
}

type reply struct {
	body []byte
	fd   int
}

// Ensure connects to the keeper on options.Socket, starting options.Command in a
// session of its own if none runs, and supervises it until Close.
func Ensure(ctx context.Context, options Options) (*Client, error) {
	if err := options.validate(); err != nil {
		return nil, err
	}
	if len(options.Command) == 0 {
		return nil, kind.Errorf(kind.Invalid, "keeper: no command to start one")
	}
	c := &Client{
		options: options,
		held:    make(map[string]int),
		replies: make(chan reply),
	}
	c.ctx, c.cancel = context.WithCancel(context.Background())
	conn, err := c.connect(ctx)
	if err != nil {
		c.Close()
		return nil, err
	}
	l := c.setLink(conn)
	c.wg.Go(func() { c.supervise(l) })
	return c, nil
}

// connect reaches a keeper, starting one if nobody listens.
func (c *Client) connect(ctx context.Context) (*net.UnixConn, error) {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	addr := &net.UnixAddr{Name: c.options.Socket, Net: "unixpacket"}
	for {
		conn, err := net.DialUnix("unixpacket", nil, addr)
		if err == nil {
			return conn, nil
		}
		if !errors.Is(err, unix.ECONNREFUSED) && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EAGAIN) {
			return nil, fmt.Errorf("keeper: connect: %w", err)
		}
		if err := ctx.Err(); errors.Is(err, context.Canceled) {
			return nil, fmt.Errorf("keeper: connect: %w", err)
		} else if err != nil {
			return nil, kind.Errorf(kind.Unavailable, "keeper: nobody listens on %s: %v", c.options.Socket, err)
		}
		// A child that ended may have lost a race against another starter (then
		// that one listens soon), or a dying keeper still held the lock.
		running, reaped := c.reap()
		if reaped {
			pause(ctx, 20*time.Millisecond)
		}
		if !running {
			if err := c.start(); err != nil {
				return nil, err
			}
		}
		pause(ctx, 2*time.Millisecond)
	}
}

// start starts a keeper process that neither Ctrl-C nor our death reaches.
func (c *Client) start() error {
	cmd := exec.Command(c.options.Command[0], c.options.Command[1:]...)
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("keeper: start %s: %w", c.options.Command[0], err)
	}
	pid := cmd.Process.Pid
	c.options.Logger.Info("keeper started", "pid", pid)
	// It outlives us, so nobody can wait for it; it is reaped when it is missed.
	cmd.Process.Release()
	c.mu.Lock()
	c.child = pid
	c.mu.Unlock()
	return nil
}

// reap collects the keeper we started if it ended.
func (c *Client) reap() (running, reaped bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.child == 0 {
		return false, false
	}
	pid, err := unix.Wait4(c.child, nil, unix.WNOHANG, nil)
	if pid == 0 && (err == nil || err == unix.EINTR) {
		return true, false
	}
	c.child = 0
	return false, true
}

// reapSoon waits a moment for our child, which is about to end.
func (c *Client) reapSoon() {
	for deadline := time.Now().Add(time.Second); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		if running, _ := c.reap(); !running {
			return
		}
	}
}

func (c *Client) setLink(conn *net.UnixConn) *link {
	l := &link{conn: conn, pid: peerPID(conn), lost: make(chan struct{})}
	c.mu.Lock()
	c.link = l
	loser := c.child
	c.mu.Unlock()
	if loser != 0 && loser != l.pid {
		// It lost against another starter's, or is about to; it holds nothing.
		unix.Kill(loser, unix.SIGKILL)
		c.reapSoon()
	}
	return l
}

// supervise owns reading: it hands replies to the caller that waits, and when the
// connection breaks it gets a keeper back and puts everything again.
func (c *Client) supervise(l *link) {
	for l != nil {
		err := c.read(l)
		c.mu.Lock()
		c.link = nil
		exiting := c.exiting
		c.mu.Unlock()
		close(l.lost)
		l.conn.Close()
		if c.ctx.Err() != nil || exiting {
			return
		}
		c.options.Logger.Warn("keeper lost, starting another", "pid", l.pid, "error", err)
		l = c.recover()
	}
}

// read delivers replies until the connection breaks.
func (c *Client) read(l *link) error {
	defer context.AfterFunc(c.ctx, func() { l.conn.Close() })()
	buf := make([]byte, maxMessageBytes)
	for {
		body, fd, err := receive(l.conn, buf)
		if err != nil {
			return err
		}
		select {
		case c.replies <- reply{body, fd}:
			continue
		case <-c.ctx.Done():
			err = c.ctx.Err()
		case <-time.After(callTimeout):
			err = kind.Errorf(kind.Invalid, "keeper: message that nobody asked for")
		}
		if fd >= 0 {
			unix.Close(fd)
		}
		return err
	}
}

// recover connects again, however long it takes, and puts what is held. It returns
// nil when the client is closed.
func (c *Client) recover() *link {
	buf := make([]byte, maxMessageBytes)
	for c.ctx.Err() == nil {
		conn, err := c.connect(c.ctx)
		if err == nil {
			if err = c.putAll(conn, buf); err == nil {
				return c.setLink(conn)
			}
			conn.Close()
		}
		c.options.Logger.Warn("keeper: restart", "error", err)
		pause(c.ctx, restartPause)
	}
	return nil
}

// putAll gives all we hold to a new keeper before anybody else can talk to it.
func (c *Client) putAll(conn *net.UnixConn, buf []byte) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	conn.SetDeadline(time.Now().Add(callTimeout))
	defer conn.SetDeadline(time.Time{})
	for name, fd := range c.held {
		if err := send(conn, append([]byte{opPut}, name...), fd); err != nil {
			return err
		}
		body, got, err := receive(conn, buf)
		if err != nil {
			return err
		}
		if got >= 0 {
			unix.Close(got)
		}
		if _, err := parseReply(body); err != nil {
			return err
		}
	}
	return nil
}

// call sends one request and waits for its reply. After a lost connection it waits
// for the next keeper and asks again: every request is idempotent.
func (c *Client) call(ctx context.Context, op byte, name string, fd int) (string, int, error) {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	request := append([]byte{op}, name...)
	if _, _, err := parseRequest(request); err != nil {
		return "", -1, err
	}
	for {
		if c.ctx.Err() != nil {
			return "", -1, kind.Errorf(kind.Canceled, "keeper: client closed")
		}
		if err := ctx.Err(); err != nil {
			return "", -1, kind.Errorf(kind.Unavailable, "keeper: %c %s: %v", op, name, err)
		}
		c.mu.Lock()
		l := c.link
		c.mu.Unlock()
		if l == nil {
			pause(ctx, 2*time.Millisecond)
			continue
		}
		if err := send(l.conn, request, fd); err != nil {
			l.conn.Close() // wakes the supervisor
			pause(ctx, 2*time.Millisecond)
			continue
		}
		select {
		case r := <-c.replies:
			text, err := parseReply(r.body)
			if err != nil && r.fd >= 0 {
				unix.Close(r.fd)
				r.fd = -1
			}
			return text, r.fd, err
		case <-l.lost:
			if op == opExit {
				return "", -1, nil
			}
		case <-time.After(callTimeout):
			l.conn.Close() // a reply that comes now would answer the wrong question
			<-l.lost
		case <-c.ctx.Done():
		}
	}
}

// Put gives a duplicate of fd to the keeper under name, replacing what it held
// under it. The caller keeps fd.
func (c *Client) Put(ctx context.Context, name string, fd int) error {
	c.callMu.Lock()
	defer c.callMu.Unlock()
	own, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("keeper: duplicate %s: %w", name, err)
	}
	_, extra, err := c.call(ctx, opPut, name, own)
	if extra >= 0 {
		unix.Close(extra)
	}
	if err != nil {
		unix.Close(own)
		return err
	}
	c.remember(name, own)
	return nil
}

// Get returns a duplicate of what the keeper holds under name, or kind.NotFound.
// From then on the client puts it again when the keeper dies.
func (c *Client) Get(ctx context.Context, name string) (int, error) {
	c.callMu.Lock()
	defer c.callMu.Unlock()
	_, fd, err := c.call(ctx, opGet, name, -1)
	if err != nil {
		return -1, err
	}
	if fd < 0 {
		return -1, kind.Errorf(kind.Unavailable, "keeper: get %s: reply without a descriptor", name)
	}
	own, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("keeper: duplicate %s: %w", name, err)
	}
	c.remember(name, own)
	return fd, nil
}

func (c *Client) remember(name string, fd int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if old, ok := c.held[name]; ok {
		unix.Close(old)
	}
	c.held[name] = fd
}

// Drop makes keeper and client forget name; an unknown name is no error.
func (c *Client) Drop(ctx context.Context, name string) error {
	c.callMu.Lock()
	defer c.callMu.Unlock()
	c.mu.Lock()
	if fd, ok := c.held[name]; ok {
		unix.Close(fd)
		delete(c.held, name)
	}
	c.mu.Unlock()
	_, _, err := c.call(ctx, opDrop, name, -1)
	return err
}

// List returns the names the keeper holds, sorted.
func (c *Client) List(ctx context.Context) ([]string, error) {
	c.callMu.Lock()
	defer c.callMu.Unlock()
	text, _, err := c.call(ctx, opList, "", -1)
	if err != nil || text == "" {
		return nil, err
	}
	return strings.Split(text, "\n"), nil
}

// PID is the keeper's process id, 0 while there is none.
func (c *Client) PID() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.link == nil {
		return 0
	}
	return c.link.pid
}

// Exit tells the keeper to close what it holds and to end, and closes the client.
func (c *Client) Exit(ctx context.Context) error {
	c.callMu.Lock()
	c.mu.Lock()
	c.exiting = true
	l := c.link
	c.mu.Unlock()
	var err error
	if l != nil {
		_, _, err = c.call(ctx, opExit, "", -1)
		if err == nil {
			select {
			case <-l.lost:
			case <-ctx.Done():
			}
		}
	}
	c.callMu.Unlock()
	c.reapSoon()
	return errors.Join(err, c.Close())
}

// Close stops supervising; the keeper goes on with what it holds.
func (c *Client) Close() error {
	c.cancel()
	c.wg.Wait()
	c.reap()
	c.mu.Lock()
	defer c.mu.Unlock()
	for name, fd := range c.held {
		unix.Close(fd)
		delete(c.held, name)
	}
	return nil
}

func peerPID(conn *net.UnixConn) int {
	raw, err := conn.SyscallConn()
	if err != nil {
		return 0
	}
	pid := 0
	raw.Control(func(fd uintptr) {
		if cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
			pid = int(cred.Pid)
		}
	})
	return pid
}

func pause(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}
