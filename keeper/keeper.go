// Package keeper is a tiny process that holds open file descriptors by name, so
// that they outlive the process that uses them.
//
// A server that must survive SIGKILL puts the descriptors it cannot open again
// (here: an open /dev/fuse) into the keeper; its successor gets them back. The
// server holds them too, so that the keeper may die as well: Client notices, starts
// another one and puts everything again. Only the death of both at the same moment
// loses a descriptor.
//
// The package must not know what the descriptors are.
package keeper

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"sort"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/thaw-project/thaw/filelock"
	"github.com/thaw-project/thaw/kind"
)

const (
	// maxDescriptors bounds what one keeper holds: one per kernel connection of
	// the server, of which there are a handful; the rest is room.
	maxDescriptors = 64
	// maxConnections bounds the peers connected at once: the server, its
	// successor while the two overlap, and a curious operator.
	maxConnections = 16
	// idleExit is how long a keeper that holds nothing waits for somebody to
	// connect before it leaves.
	idleExit = 30 * time.Second
)

// Options configures Run and Ensure.
type Options struct {
	// Socket is the absolute path of the keeper's Unix socket. A file of the same
	// name with ".lock" appended tells whether a keeper runs.
	Socket string
	// Command starts the keeper process; Ensure needs it, Run ignores it. The
	// process must call Run with the same Socket.
	Command []string
	// Logger gets few and short lines; nil discards them.
	Logger *slog.Logger
}

func (o *Options) validate() error {
	if !filepath.IsAbs(o.Socket) {
		return kind.Errorf(kind.Invalid, "keeper: socket %q is not an absolute path", o.Socket)
	}
	if len(o.Socket) > 107 { // sun_path, with its terminating zero
		return kind.Errorf(kind.Invalid, "keeper: socket path %q is longer than 107 bytes", o.Socket)
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	return nil
}

// server is the state of one running keeper.
type server struct {
	log      *slog.Logger
	listener *net.UnixListener
	quit     context.CancelFunc

	mu    sync.Mutex
	held  map[string]int             // guarded by mu: name to descriptor
	conns map[*net.UnixConn]struct{} // guarded by mu
	since time.Time                  // guarded by mu: when the last peer left
	wg    sync.WaitGroup             // one for each connection
}

// Run is the body of the keeper process. It returns nil when it was told to exit,
// when ctx ends, or when it holds nothing and nobody was connected for a while, and
// kind.InUse when a keeper runs on this socket already. It tunes the process it
// runs in for small memory, so it must have a process of its own.
func Run(ctx context.Context, options Options) error {
	if err := options.validate(); err != nil {
		return err
	}
	// A keeper does next to nothing; its memory is what counts.
	runtime.GOMAXPROCS(1)
	debug.SetGCPercent(10)
	debug.SetMemoryLimit(8 << 20)

	lock, err := lockFile(options.Socket + ".lock")
	if err != nil {
		return err
	}
	defer lock.Close()

	// The lock is ours, so a socket that is there belongs to a dead keeper.
	if err := os.Remove(options.Socket); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("keeper: remove dead socket: %w", err)
	}
	old := unix.Umask(0o177)
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: options.Socket, Net: "unixpacket"})
	unix.Umask(old)
	if err != nil {
		return fmt.Errorf("keeper: listen on %s: %w", options.Socket, err)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	s := &server{
		log:      options.Logger,
		listener: l,
		quit:     cancel,
		held:     make(map[string]int),
		conns:    make(map[*net.UnixConn]struct{}),
		since:    time.Now(),
	}
	s.wg.Go(func() { s.accept(ctx) })
	debug.FreeOSMemory()

	tick := time.NewTicker(idleExit / 3)
	defer tick.Stop()
	for waiting := true; waiting; {
		select {
		case <-ctx.Done():
			waiting = false
		case <-tick.C:
			waiting = !s.idle()
		}
	}
	cancel()
	l.Close() // removes the socket file
	s.mu.Lock()
	for c := range s.conns {
		c.Close()
	}
	s.mu.Unlock()
	s.wg.Wait()
	for _, fd := range s.held {
		unix.Close(fd)
	}
	return nil
}

// lockFile takes the exclusive lock that at most one keeper per socket holds.
func lockFile(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("keeper: open lock: %w", err)
	}
	if err := filelock.Exclusive(f, 0); err != nil {
		f.Close()
		if errors.Is(err, kind.InUse) {
			return nil, kind.Errorf(kind.InUse, "keeper: another keeper runs on %s", strings.TrimSuffix(path, ".lock"))
		}
		return nil, fmt.Errorf("keeper: lock %s: %w", path, err)
	}
	return f, nil
}

// idle tells whether there is no reason to stay.
func (s *server) idle() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.held) == 0 && len(s.conns) == 0 && time.Since(s.since) >= idleExit
}

func (s *server) accept(ctx context.Context) {
	for ctx.Err() == nil {
		c, err := s.listener.AcceptUnix()
		if err != nil {
			if ctx.Err() == nil { // out of descriptors, perhaps: do not spin
				s.log.Warn("keeper: accept", "error", err)
				select {
				case <-ctx.Done():
				case <-time.After(100 * time.Millisecond):
				}
			}
			continue
		}
		s.mu.Lock()
		full := len(s.conns) >= maxConnections || ctx.Err() != nil
		if !full {
			s.conns[c] = struct{}{}
		}
		s.mu.Unlock()
		if full {
			c.Close()
			continue
		}
		s.wg.Go(func() {
			s.serve(c)
			s.mu.Lock()
			delete(s.conns, c)
			s.since = time.Now()
			s.mu.Unlock()
			c.Close()
		})
	}
}

// serve answers one peer until it goes away or breaks the protocol.
func (s *server) serve(c *net.UnixConn) {
	if err := checkPeer(c); err != nil {
		s.log.Warn("keeper: refused", "error", err)
		return
	}
	buf := make([]byte, maxMessageBytes)
	for {
		req, fd, err := receive(c, buf)
		if err != nil {
			if !errors.Is(err, io.EOF) && !errors.Is(err, net.ErrClosed) {
				s.log.Warn("keeper: receive", "error", err)
			}
			return
		}
		op, name, err := parseRequest(req)
		reply, out := []byte{statusOK}, -1
		exit := false
		if err == nil {
			switch op {
			case opPut:
				err = s.put(name, fd)
				if err == nil {
					fd = -1 // now the map's
				}
			case opGet:
				out, err = s.get(name)
			case opDrop:
				s.drop(name)
			case opList:
				reply = append(reply, s.list()...)
			case opExit:
				exit = true
			}
		}
		if fd >= 0 {
			unix.Close(fd)
		}
		if err != nil {
			reply = errorReply(err)
		}
		err = send(c, reply, out)
		if out >= 0 {
			unix.Close(out)
		}
		if exit {
			s.quit()
			return
		}
		if err != nil {
			return
		}
	}
}

func (s *server) put(name string, fd int) error {
	if fd < 0 {
		return kind.Errorf(kind.Invalid, "keeper: put %s without a descriptor", name)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if old, ok := s.held[name]; ok {
		unix.Close(old)
	} else if len(s.held) >= maxDescriptors {
		return kind.Errorf(kind.NoSpace, "keeper: put %s: %d descriptors are held already", name, maxDescriptors)
	}
	s.held[name] = fd
	return nil
}

// get returns a duplicate, so that a concurrent drop cannot close what is being sent.
func (s *server) get(name string) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	fd, ok := s.held[name]
	if !ok {
		return -1, kind.Errorf(kind.NotFound, "keeper: no descriptor %s", name)
	}
	d, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("keeper: duplicate %s: %w", name, err)
	}
	return d, nil
}

func (s *server) drop(name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if fd, ok := s.held[name]; ok {
		unix.Close(fd)
		delete(s.held, name)
	}
}

func (s *server) list() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	names := make([]string, 0, len(s.held))
	for name := range s.held {
		names = append(names, name)
	}
	sort.Strings(names)
	return strings.Join(names, "\n")
}
