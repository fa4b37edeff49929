// Package nbd is an NBD server: it serves devices of target/bdev to any NBD client
// over Unix sockets and TCP. It knows no device but by its interface.
//
// One goroutine per connection receives requests. What the device answers fast it
// serves itself, many requests per system call; what takes longer it hands to others
// (see conn.go). Memory is bounded by Config whatever peers do.
package nbd

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/nbd"
	"github.com/thaw-project/thaw/target/bdev"
	"github.com/thaw-project/thaw/target/engine"
)

// Mapper is what a device offers beside bdev.Device when it knows where it holds data.
// With it, clients skip holes; without, everything counts as data.
type Mapper interface {
	// Extent describes the bytes at offset: the n bytes from there, 0 < n <=
	// lengthBytes, are alike. hole: nothing is allocated for them in this device or one below;
	// zero: they read as zeros. May be called concurrently with anything.
	Extent(offset, lengthBytes int64) (n int64, hole, zero bool, err error)
}

// FastZeroer is what a device offers whose WriteZeroes may be slower than writing
// zeros, or not. Without it clients that ask for nothing but a fast way are refused.
type FastZeroer interface {
	// FastZero tells whether WriteZeroes of the range is faster than WriteAt of as
	// many bytes.
	FastZero(offset, lengthBytes int64) bool
}

// Limits of the handshake. A peer is one that the file mode of a socket or a firewall let
// through; these keep it from costing more than its place.
const (
	// maxOptionBytes bounds the data of one option: a name and the queries of
	// metadata contexts.
	maxOptionBytes = 16 << 10
	// maxDrainBytes is how much of a longer option is read and thrown away, to
	// answer that it is too big. Beyond, the peer is disconnected.
	maxDrainBytes = 1 << 20
	// maxOptions bounds the options of one handshake.
	maxOptions = 128
	// maxExports bounds the exports of one server.
	maxExports = 4096
)

// Config holds the limits of a server. Zero values mean the defaults given.
type Config struct {
	// MaxConnections bounds connections, those in handshake included: 1024. Those
	// beyond are closed at once.
	MaxConnections int
	// MaxInflight bounds the requests of one connection that are served at once:
	// 64. More wait in the socket.
	MaxInflight int
	// MaxRequestBytes bounds what one request reads or writes: 32 MiB, which is
	// what clients assume.
	MaxRequestBytes int
	// MaxBufferBytes bounds buffers for requests in flight, all connections
	// together: 128 MiB. Connections have at most 136 KiB each besides.
	MaxBufferBytes int64
	// HandshakeTimeout is what a peer has to choose an export: 10 s.
	HandshakeTimeout time.Duration
	// StallTimeout is what a peer has to send the rest of a request it began, or to
	// take a reply: 30 s.
	StallTimeout time.Duration
	// TLS, if set, turns a connection into one under TLS when a client asks for
	// that. RequireTLS refuses everything before.
	TLS        func(net.Conn) (net.Conn, error)
	RequireTLS bool
	// Engine says where requests run: engine.SharedNothing.
	Engine engine.Kind
	// hand is which requests go to goroutines of their own: handSlow. Tests set it so
	// that no clock decides.
	hand hand
	// Log gets one line per connection at debug level, and per protocol violation.
	// Nil discards.
	Log *slog.Logger
}

// hand says which requests a reader hands to others.
type hand uint8

const (
	handSlow hand = iota
	handAll
	handNone
)

// Export is one device under a name.
type Export struct {
	// Name is what clients ask for, at most 4096 bytes of UTF-8.
	Name string
	// Description is shown in lists.
	Description string
	// Device is served until RemoveExport returns, which does not close it.
	Device bdev.Device
	// ReadOnly refuses changes though the device would take them.
	ReadOnly bool
	// MinBlock and PreferredBlock are powers of two in bytes: what offsets and
	// lengths must be multiples of (default 1, at most 64 KiB), and what works best
	// (default 4096).
	MinBlock       int
	PreferredBlock int
}

// export is an Export being served.
type export struct {
	Export
	size     int64
	flags    uint16
	mapper   Mapper // or nil
	fastZero FastZeroer
	owner    engine.Owner // of a writable device, for requests that readers serve

	conns   map[*conn]struct{} // guarded by Server.mu
	removed chan struct{}      // closed when removed is set and conns is empty
	leaving bool               // guarded by Server.mu
}

// Server serves exports. Its methods may be called concurrently.
type Server struct {
	cfg    Config
	log    *slog.Logger
	budget budget
	wg     sync.WaitGroup // connections and Serve calls started by Listen
	pool   *engine.Pool   // nil unless that is the engine
	ending sync.Once      // closes pool

	mu        sync.Mutex
	exports   map[string]*export
	listeners map[net.Listener]struct{}
	conns     map[*conn]struct{}
	pending   int // connections, those in handshake included
	shakes    map[net.Conn]struct{}
	closed    bool

	stats Stats
}

// Stats counts since the start.
type Stats struct {
	Accepted   atomic.Int64 // connections
	Refused    atomic.Int64 // connections beyond MaxConnections
	Violations atomic.Int64 // connections ended for breaking the protocol or a limit
}

// New makes a server without exports or listeners. Shutdown ends it.
func New(cfg Config) *Server {
	cfg.MaxConnections = cmp.Or(cfg.MaxConnections, 1024)
	cfg.MaxInflight = cmp.Or(cfg.MaxInflight, 64)
	cfg.MaxRequestBytes = cmp.Or(cfg.MaxRequestBytes, 32<<20)
	cfg.MaxBufferBytes = cmp.Or(cfg.MaxBufferBytes, 128<<20)
	cfg.HandshakeTimeout = cmp.Or(cfg.HandshakeTimeout, 10*time.Second)
	cfg.StallTimeout = cmp.Or(cfg.StallTimeout, 30*time.Second)
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	s := &Server{
		cfg:       cfg,
		log:       cfg.Log,
		budget:    budget{limit: cfg.MaxBufferBytes},
		exports:   map[string]*export{},
		listeners: map[net.Listener]struct{}{},
		conns:     map[*conn]struct{}{},
		shakes:    map[net.Conn]struct{}{},
	}
	if cfg.Engine == engine.ThreadPool {
		s.pool = engine.NewPool()
	}
	return s
}

// Stats returns the server's counters, which go on counting.
func (s *Server) Stats() *Stats { return &s.stats }

// AddExport serves a device from now on. It returns kind.Exists when the name is
// taken, kind.Invalid for names and block sizes that cannot be.
func (s *Server) AddExport(e Export) error {
	e.MinBlock = cmp.Or(e.MinBlock, 1)
	e.PreferredBlock = max(cmp.Or(e.PreferredBlock, 4096), e.MinBlock)
	size := e.Device.SizeBytes()
	switch {
	case len(e.Name) > nbd.NameMaxBytes || len(e.Description) > nbd.NameMaxBytes:
		return kind.Errorf(kind.Invalid, "add NBD export: its name or description has more than %d bytes", nbd.NameMaxBytes)
	case e.MinBlock < 0 || e.MinBlock&(e.MinBlock-1) != 0 || e.MinBlock > 64<<10:
		return kind.Errorf(kind.Invalid, "add NBD export %q: block size %d is no power of two up to 64 KiB", e.Name, e.MinBlock)
	case e.PreferredBlock&(e.PreferredBlock-1) != 0 || e.PreferredBlock > s.cfg.MaxRequestBytes:
		return kind.Errorf(kind.Invalid, "add NBD export %q: preferred block size %d is no power of two up to %d", e.Name, e.PreferredBlock, s.cfg.MaxRequestBytes)
	case size%int64(e.MinBlock) != 0:
		return kind.Errorf(kind.Invalid, "add NBD export %q: size %d is no multiple of block size %d", e.Name, size, e.MinBlock)
	}
	x := &export{Export: e, size: size, conns: map[*conn]struct{}{}, removed: make(chan struct{})}
	x.ReadOnly = x.ReadOnly || e.Device.ReadOnly()
	x.mapper, _ = e.Device.(Mapper)
	x.fastZero, _ = e.Device.(FastZeroer)
	// A flush of a device covers every write that returned, whichever connection it
	// came by: that is what CAN_MULTI_CONN promises.
	x.flags = nbd.FlagHasFlags | nbd.FlagSendFlush | nbd.FlagSendFUA | nbd.FlagCanMultiConn | nbd.FlagSendCache
	if x.ReadOnly {
		x.flags |= nbd.FlagReadOnly
	} else {
		x.flags |= nbd.FlagSendTrim | nbd.FlagSendWriteZeroes | nbd.FlagSendFastZero
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.closed:
		return kind.Errorf(kind.Unavailable, "add NBD export %q: the server is shutting down", e.Name)
	case s.exports[e.Name] != nil:
		return kind.Errorf(kind.Exists, "add NBD export %q: the name is taken", e.Name)
	case len(s.exports) >= maxExports:
		return kind.Errorf(kind.NoSpace, "add NBD export %q: there are %d already", e.Name, maxExports)
	}
	s.exports[e.Name] = x
	return nil
}

// RemoveExport stops serving a device. Its connections finish what they serve and
// end. When it returns nil nothing uses the device any more; when ctx ends first the
// connections were cut, and requests the device still works on may use it for as long
// as it takes.
func (s *Server) RemoveExport(ctx context.Context, name string) error {
	s.mu.Lock()
	x := s.exports[name]
	if x == nil {
		s.mu.Unlock()
		return kind.Errorf(kind.NotFound, "remove NBD export %q: there is none", name)
	}
	if !x.leaving {
		x.leaving = true
		if len(x.conns) == 0 {
			s.forgetLocked(x)
		}
	}
	for c := range x.conns {
		c.drain()
	}
	s.mu.Unlock()
	select {
	case <-x.removed:
		return nil
	case <-ctx.Done():
	}
	s.mu.Lock()
	for c := range x.conns {
		c.stream.abort()
	}
	s.mu.Unlock()
	// Cut connections end at once unless the device itself hangs.
	select {
	case <-x.removed:
		return nil
	case <-time.After(abortGrace):
		return kind.Errorf(kind.InUse, "remove NBD export %q: requests are still being served: %w", name, context.Cause(ctx))
	}
}

// abortGrace is how long a cut connection may take to be gone.
const abortGrace = 100 * time.Millisecond

// forgetLocked frees the name of an export that nobody uses; s.mu is held.
func (s *Server) forgetLocked(x *export) {
	delete(s.exports, x.Name)
	close(x.removed)
}

// Connections returns how many clients are connected, those in handshake included.
func (s *Server) Connections() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.pending
}

// Exports lists what is served, by name.
func (s *Server) Exports() []Export {
	s.mu.Lock()
	defer s.mu.Unlock()
	var list []Export
	for _, x := range s.exports {
		if !x.leaving {
			list = append(list, x.Export)
		}
	}
	slices.SortFunc(list, func(a, b Export) int { return cmp.Compare(a.Name, b.Name) })
	return list
}

// lookup finds an export; the empty name is the only export where there is one only.
func (s *Server) lookup(name string) *export {
	s.mu.Lock()
	defer s.mu.Unlock()
	x := s.exports[name]
	if x == nil && name == "" && len(s.exports) == 1 {
		for _, x = range s.exports {
		}
	}
	if x == nil || x.leaving {
		return nil
	}
	return x
}

// ListenUnix serves on a Unix socket that only this user may connect to. A socket a
// dead process left behind is replaced; kind.InUse when somebody answers on it.
func (s *Server) ListenUnix(path string) error {
	if c, err := net.Dial("unix", path); err == nil {
		c.Close()
		return kind.Errorf(kind.InUse, "listen for NBD on %s: another process does", path)
	}
	if st, err := os.Lstat(path); err == nil {
		if st.Mode()&os.ModeSocket == 0 {
			return kind.Errorf(kind.Exists, "listen for NBD on %s: what is there is no socket", path)
		}
		if err := os.Remove(path); err != nil {
			return fmt.Errorf("listen for NBD: remove old socket: %w", err)
		}
	}
	// The socket gets its name only after its mode, so nobody slips in between.
	temporary := fmt.Sprintf("%s.%d", path, os.Getpid())
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: temporary, Net: "unix"})
	if err != nil {
		return fmt.Errorf("listen for NBD: %w", err)
	}
	l.SetUnlinkOnClose(false)
	err = os.Chmod(temporary, 0o600)
	if err == nil {
		err = os.Rename(temporary, path)
	}
	if err != nil {
		l.Close()
		os.Remove(temporary)
		return fmt.Errorf("listen for NBD on %s: %w", path, err)
	}
	return s.start(&unixListener{Listener: l, path: path})
}

// unixListener removes its socket when closed.
type unixListener struct {
	net.Listener
	path string
	once sync.Once
}

func (l *unixListener) Close() error {
	l.once.Do(func() { os.Remove(l.path) })
	return l.Listener.Close()
}

// ListenTCP serves on a TCP address, such as "127.0.0.1:10809", and returns the address
// with the port it got. Whoever reaches it may use every export.
func (s *Server) ListenTCP(address string) (net.Addr, error) {
	// Keep-alive probes find peers that vanished: after 30 s, and 3 probes of 10 s.
	lc := net.ListenConfig{KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: 30 * time.Second, Interval: 10 * time.Second, Count: 3}}
	l, err := lc.Listen(context.Background(), "tcp", address)
	if err != nil {
		return nil, fmt.Errorf("listen for NBD: %w", err)
	}
	return l.Addr(), s.start(l)
}

// start serves a listener in the background until Shutdown.
func (s *Server) start(l net.Listener) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		l.Close()
		return kind.Errorf(kind.Unavailable, "listen for NBD: the server is shutting down")
	}
	s.listeners[l] = struct{}{}
	s.wg.Add(1)
	go func() {
		defer s.wg.Done()
		s.accept(l)
	}()
	return nil
}

func (s *Server) accept(l net.Listener) {
	for delay := time.Duration(0); ; {
		c, err := l.Accept()
		if err == nil {
			delay = 0
			s.Handle(c)
			continue
		}
		s.mu.Lock()
		closed := s.closed
		s.mu.Unlock()
		if closed || errors.Is(err, net.ErrClosed) {
			return
		}
		// Out of descriptors, most likely: connections that end free some.
		delay = min(max(2*delay, 5*time.Millisecond), time.Second)
		s.log.Warn("accepting an NBD connection failed", "error", err, "again_in", delay)
		time.Sleep(delay)
	}
}

// Handle serves a connection in the background and closes it.
func (s *Server) Handle(c net.Conn) {
	if s.admit(c) {
		go s.attend(c)
	}
}

// ServeConn serves a connection, closes it, and returns when nothing uses the device
// on its behalf any more: who hands a peer another connection in place of this one
// then knows that no request of the old one is still to take effect.
func (s *Server) ServeConn(c net.Conn) {
	if s.admit(c) {
		s.attend(c)
	}
}

// admit counts a new connection, or closes it.
func (s *Server) admit(c net.Conn) bool {
	s.mu.Lock()
	if s.closed || s.pending >= s.cfg.MaxConnections {
		s.mu.Unlock()
		s.stats.Refused.Add(1)
		c.Close()
		return false
	}
	c.SetDeadline(time.Now().Add(s.cfg.HandshakeTimeout))
	s.pending++
	s.shakes[c] = struct{}{}
	s.wg.Add(1)
	s.mu.Unlock()
	s.stats.Accepted.Add(1)
	return true
}

// attend serves an admitted connection.
func (s *Server) attend(c net.Conn) {
	defer s.wg.Done()
	s.serve(c)
	s.mu.Lock()
	s.pending--
	s.mu.Unlock()
}

// serve takes a connection through handshake and transmission.
func (s *Server) serve(c net.Conn) {
	log := s.log.With("peer", c.RemoteAddr().String())
	h := handshake{s: s, conn: c}
	err := h.run()
	s.mu.Lock()
	delete(s.shakes, c)
	var t *conn
	if err == nil && h.export != nil {
		if s.closed || h.export.leaving {
			err = errors.New("shutting down")
		} else {
			t = newConn(s, &h)
			s.conns[t] = struct{}{}
			h.export.conns[t] = struct{}{}
		}
	}
	s.mu.Unlock()
	if t == nil {
		h.conn.Close()
		if err != nil && !errors.Is(err, io.EOF) {
			s.stats.Violations.Add(1)
			log.Debug("an NBD handshake failed", "error", err)
		}
		return
	}
	log = log.With("export", h.export.Name)
	log.Debug("NBD client connected")
	err = t.run()
	s.mu.Lock()
	delete(s.conns, t)
	delete(h.export.conns, t)
	if h.export.leaving && len(h.export.conns) == 0 {
		s.forgetLocked(h.export)
	}
	s.mu.Unlock()
	t.stream.Close() // nobody else knows the descriptor any more
	if err != nil {
		s.stats.Violations.Add(1)
		log.Info("an NBD connection was ended", "error", err)
	} else {
		log.Debug("NBD client disconnected")
	}
}

// Shutdown closes the listeners, lets connections finish the requests they serve, and
// waits. When ctx ends first connections are cut, and it returns an error if a device
// still works on requests.
func (s *Server) Shutdown(ctx context.Context) error {
	s.mu.Lock()
	s.closed = true
	for l := range s.listeners {
		l.Close()
	}
	clear(s.listeners)
	for c := range s.shakes {
		c.SetDeadline(time.Unix(1, 0))
	}
	for c := range s.conns {
		c.drain()
	}
	s.mu.Unlock()
	done := make(chan struct{})
	go func() {
		s.wg.Wait()
		if s.pool != nil {
			s.ending.Do(s.pool.Close)
		}
		close(done)
	}()
	select {
	case <-done:
		return nil
	case <-ctx.Done():
	}
	s.mu.Lock()
	for c := range s.conns {
		c.stream.abort()
	}
	s.mu.Unlock()
	select {
	case <-done:
		return nil
	case <-time.After(abortGrace):
		return kind.Errorf(kind.InUse, "shut down the NBD server: requests are still being served: %w", context.Cause(ctx))
	}
}
