package rpc

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"
	"sync"
	"time"

	"github.com/thaw-project/thaw/failpoint"
	"github.com/thaw-project/thaw/kind"
)

// Method is one method. Handle is called with the parameters, nil when there are none,
// and returns what becomes the result, or an error: an *Error as it is, any other as
// -32603. ctx ends with the server, and for a method that Waits with the connection's
// eviction.
type Method struct {
	Handle func(ctx context.Context, params json.RawMessage) (any, error)
	Waits  bool // does nothing but wait for something to happen
}

// Options say how to serve. Zero fields take the defaults that each names.
type Options struct {
	Methods  map[string]Method
	MaxConns int           // open connections; default 64, as in SPDK
	Patience time.Duration // for a request to arrive and an answer to be taken; default 30 s
	Log      *slog.Logger  // default: none
	// Called, when set, is told of every request that was answered. code is 0 when it
	// succeeded. It must not block.
	Called func(method string, code int, took time.Duration)
}

func (o *Options) fill() {
	if o.MaxConns == 0 {
		o.MaxConns = 64
	}
	if o.Patience == 0 {
		o.Patience = 30 * time.Second
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Called == nil {
		o.Called = func(string, int, time.Duration) {}
	}
}

// Server answers requests on a listener. Close it.
type Server struct {
	o      Options
	l      net.Listener
	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu     sync.Mutex
	closed bool           // guarded by mu, as is below
	conns  map[*conn]bool //
}

// Listen makes the Unix socket at path, for its owner alone, in place of one that
// nobody listens on any more. kind.InUse when somebody does.
func Listen(path string) (net.Listener, error) {
	if st, err := os.Lstat(path); err == nil {
		if st.Mode()&os.ModeSocket == 0 {
			return nil, kind.Errorf(kind.Exists, "listen on %s: it is there already and is no socket", path)
		}
		if nc, err := net.DialTimeout("unix", path, time.Second); err == nil {
			nc.Close()
			return nil, kind.Errorf(kind.InUse, "listen on %s: another process does already", path)
		}
		if err := os.Remove(path); err != nil {
			return nil, fmt.Errorf("listen on %s: %w", path, err)
		}
	}
	l, err := listenPrivately(path)
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	return &named{Listener: l, path: path}, nil
}

// maxPathBytes is what fits into a sockaddr_un.
const maxPathBytes = 107

// listenPrivately makes the socket in a directory that nobody else can enter and moves it
// to path with its final rights: it never exists with wider ones. The kernel knows a
// socket by its inode.
func listenPrivately(path string) (net.Listener, error) {
	if len(path) > maxPathBytes {
		return nil, kind.Errorf(kind.Invalid, "a socket's path has at most %d bytes", maxPathBytes)
	}
	dir, err := os.MkdirTemp(filepath.Dir(path), ".socket-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	d, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	// By way of the descriptor, since the directory's own path may be too long.
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: fmt.Sprintf("/proc/self/fd/%d/s", d.Fd()), Net: "unix"})
	if err != nil {
		return nil, err
	}
	l.SetUnlinkOnClose(false)
	made := filepath.Join(dir, "s")
	if err = os.Chmod(made, 0o600); err == nil {
		err = os.Rename(made, path)
	}
	if err != nil {
		l.Close()
		return nil, err
	}
	return l, nil
}

// named removes the socket with the listener.
type named struct {
	net.Listener
	path string
	once sync.Once
}

func (n *named) Close() error {
	n.once.Do(func() { os.Remove(n.path) })
	return n.Listener.Close()
}

// Serve starts to answer on l, which it owns from then on.
func Serve(l net.Listener, o Options) *Server {
	o.fill()
	s := &Server{o: o, l: l, conns: map[*conn]bool{}}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	s.wg.Add(1)
	go s.accept()
	return s
}

// Close ends all connections and waits for the methods that run.
func (s *Server) Close() error {
	s.mu.Lock()
	s.closed = true
	s.cancel()
	err := s.l.Close()
	for c := range s.conns {
		c.nc.Close()
	}
	s.mu.Unlock()
	s.wg.Wait()
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

// acceptPause is how long accepting rests after an error that may pass, such as too
// many open files.
const acceptPause = 50 * time.Millisecond

func (s *Server) accept() {
	defer s.wg.Done()
	for {
		nc, err := s.l.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			s.o.Log.Warn("accept failed", "err", err)
			select {
			case <-s.ctx.Done():
				return
			case <-time.After(acceptPause):
			}
			continue
		}
		c := &conn{s: s, nc: nc, since: time.Now(), idle: true}
		c.ctx, c.cancel = context.WithCancel(s.ctx)
		if !s.admit(c) {
			c.cancel()
			nc.Close()
			continue
		}
		go func() {
			defer s.wg.Done()
			c.run()
			s.mu.Lock()
			delete(s.conns, c)
			s.mu.Unlock()
		}()
	}
}

// admit makes c known, in place of the one that has been idle longest when there are
// too many, or returns false.
func (s *Server) admit(c *conn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return false
	}
	if len(s.conns) >= s.o.MaxConns {
		var oldest *conn
		for o := range s.conns {
			if o.idle && (oldest == nil || o.since.Before(oldest.since)) {
				oldest = o
			}
		}
		if oldest == nil {
			s.o.Log.Warn("connection refused: there are too many and none is idle", "limit", s.o.MaxConns)
			return false
		}
		oldest.cancel()
		oldest.nc.Close()
		delete(s.conns, oldest)
	}
	s.conns[c] = true
	s.wg.Add(1)
	return true
}

// conn is a connection; one goroutine runs it.
type conn struct {
	s      *Server
	nc     net.Conn
	ctx    context.Context // ends with the connection
	cancel context.CancelFunc
	idle   bool      // guarded by Server.mu: may be closed for another
	since  time.Time // guarded by Server.mu: idle since
}

func (c *conn) setIdle(idle bool) {
	c.s.mu.Lock()
	if idle && !c.idle {
		c.since = time.Now()
	}
	c.idle = idle
	c.s.mu.Unlock()
}

func (c *conn) run() {
	defer c.cancel()
	defer c.nc.Close()
	f := newFrames(c.nc, c.s.o.Patience, func(began bool) { c.setIdle(!began) })
	for {
		raw, err := f.next()
		if errors.Is(err, errSyntax) {
			c.send(reply(nil, nil, &Error{Code: CodeParse, Message: "Parse error"}))
			c.drain()
			return
		}
		if err != nil {
			return
		}
		c.setIdle(false)
		if answer := c.answer(raw); answer != nil && !c.send(answer) {
			return
		}
	}
}

// drainLimit bounds what is read of a client that is being told that it is not
// understood, so that it can read that instead of a reset.
const drainLimit = 64 << 10

func (c *conn) drain() {
	if u, ok := c.nc.(*net.UnixConn); ok {
		u.CloseWrite()
	}
	c.nc.SetReadDeadline(time.Now().Add(min(c.s.o.Patience, time.Second)))
	io.CopyN(io.Discard, c.nc, drainLimit) // an error ends it as well
}

func (c *conn) send(p []byte) bool {
	c.nc.SetWriteDeadline(time.Now().Add(c.s.o.Patience))
	_, err := c.nc.Write(p)
	return err == nil
}

// maxAnswerBytes is about what a batch is answered with at most: SPDK sends at most
// 32 MiB.
const maxAnswerBytes = 32 << 20

// answer handles one value and returns what to send, nil for nothing.
func (c *conn) answer(raw json.RawMessage) []byte {
	switch raw[0] {
	case '{':
		return c.single(raw)
	case '[':
		var list []json.RawMessage
		if json.Unmarshal(raw, &list) != nil || len(list) == 0 {
			break
		}
		var out bytes.Buffer
		for _, r := range list {
			a := tooMuch
			if out.Len() < maxAnswerBytes {
				a = c.single(r)
			}
			if a == nil {
				continue
			}
			if out.Len() == 0 {
				out.WriteByte('[')
			} else {
				out.WriteByte(',')
			}
			out.Write(bytes.TrimSuffix(a, []byte("\n")))
		}
		if out.Len() == 0 {
			return nil
		}
		out.WriteString("]\n")
		return out.Bytes()
	}
	return reply(nil, nil, errInvalidRequest)
}

// tooMuch answers the requests of a batch whose answers have become too many bytes: they
// are not carried out.
var tooMuch = reply(nil, nil, Internal("", nil))

var (
	errInvalidRequest = &Error{Code: CodeInvalidRequest, Message: "Invalid request"}
	errMethodNotFound = &Error{Code: CodeMethodNotFound, Message: "Method not found"}
)

// single handles one request object. As in SPDK, success is not answered when there is
// no id, and an error is, with the id null.
func (c *conn) single(raw json.RawMessage) []byte {
	var r request
	if err := r.parse(raw); err != nil {
		return reply(r.id, nil, errInvalidRequest)
	}
	m, ok := c.s.o.Methods[r.method]
	if !ok {
		c.s.o.Called("", CodeMethodNotFound, 0)
		return reply(r.id, nil, errMethodNotFound)
	}
	start := time.Now()
	result, err := c.call(m, &r)
	var answer []byte
	if err == nil {
		answer = reply(r.id, result, nil)
		if answer == nil {
			err = fmt.Errorf("the result %T is no JSON", result)
		}
	}
	code := 0
	if err != nil {
		e := asError(err)
		code = e.Code
		c.s.o.Log.Log(context.Background(), failureLevel(r.method, e), "request failed", "method", r.method, "code", e.Code, "err", err)
		answer = reply(r.id, nil, e)
	}
	c.s.o.Called(r.method, code, time.Since(start))
	if err == nil && (r.id == nil || string(r.id) == "null") {
		return nil
	}
	return answer
}

func (c *conn) call(m Method, r *request) (result any, err error) {
	// A method that panics has a bug; the data plane goes on.
	defer func() {
		if p := recover(); p != nil {
			c.s.o.Log.Error("method panicked", "method", r.method, "panic", p, "stack", string(debug.Stack()))
			result, err = nil, Internal("", fmt.Errorf("panic: %v", p))
		}
	}()
	ctx := c.s.ctx
	if m.Waits {
		c.setIdle(true)
		defer c.setIdle(false)
		ctx = c.ctx
	}
	if !failpoint.Enabled || strings.Contains(r.method, "_get_") {
		return m.Handle(ctx, r.params)
	}
	failpoint.Reach("target." + r.method + ": received")
	defer func() { failpoint.Reach("target." + r.method + ": done") }()
	return m.Handle(ctx, r.params)
}

type request struct {
	method string
	params json.RawMessage
	id     json.RawMessage
}

var errRequest = errors.New("not a request")

// parse takes a request apart, in SPDK's order, which decides whether an invalid one is
// answered with its id.
func (r *request) parse(raw json.RawMessage) error {
	list, err := object(raw)
	if err != nil {
		return errRequest
	}
	var version, method, id, params json.RawMessage
	for _, m := range list {
		switch m.name {
		case "jsonrpc":
			version = m.raw
		case "method":
			method = m.raw
		case "id":
			id = m.raw
		case "params":
			params = m.raw
		default:
			return errRequest
		}
	}
	var v string
	if version != nil && (json.Unmarshal(version, &v) != nil || v != "2.0") {
		return errRequest
	}
	if len(method) == 0 || method[0] != '"' || json.Unmarshal(method, &r.method) != nil {
		return errRequest
	}
	if id != nil {
		if c := id[0]; c != '"' && c != '-' && c != 'n' && (c < '0' || c > '9') {
			return errRequest
		}
		r.id = id
	}
	if params != nil && params[0] != 'n' {
		if params[0] != '{' && params[0] != '[' {
			return errRequest
		}
		r.params = params
	}
	return nil
}

// reply builds an answer, with a newline as SPDK sends it. nil means that result
// cannot be encoded.
func reply(id json.RawMessage, result any, e *Error) []byte {
	if id == nil {
		id = json.RawMessage("null")
	}
	var b bytes.Buffer
	b.WriteString(`{"jsonrpc":"2.0","id":`)
	b.Write(id)
	field, value := `,"result":`, result
	if e != nil {
		field, value = `,"error":`, e
	}
	b.WriteString(field)
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(value); err != nil {
		return nil
	}
	b.Truncate(b.Len() - 1) // Encode ends with a newline
	b.WriteString("}\n")
	return b.Bytes()
}
