package spdk

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/thaw-project/thaw/failpoint"
	"github.com/thaw-project/thaw/kind"
)

// Options say how to call. Zero fields take the defaults that each names.
type Options struct {
	// Socket is the path of the target's Unix socket.
	Socket string
	// Deadline is how long a call may take whose context allows more; default 30 s. The
	// methods that are called often take milliseconds: a target that does not answer one
	// for so long is taken for stuck, and its connection is closed.
	Deadline time.Duration
	// LongDeadline is the same for methods that copy, connect or wait; default 10 min.
	LongDeadline time.Duration
	// MaxInFlight bounds calls that were not answered yet; default 64. Further ones wait
	// for their turn within their deadline.
	MaxInFlight int
	// MaxLong bounds calls of methods that take long, each of which has a connection;
	// default 8. SPDK and `thaw target` take 64 connections from all their clients.
	MaxLong int
}

func (o *Options) fill() error {
	if o.Deadline == 0 {
		o.Deadline = 30 * time.Second
	}
	if o.LongDeadline == 0 {
		o.LongDeadline = 10 * time.Minute
	}
	if o.MaxInFlight == 0 {
		o.MaxInFlight = 64
	}
	if o.MaxLong == 0 {
		o.MaxLong = 8
	}
	return o.Validate()
}

// Validate says what is wrong with the options; zero fields are right, but for Socket.
func (o *Options) Validate() error {
	if o.Socket == "" {
		return kind.Errorf(kind.Invalid, "spdk: no socket given")
	}
	if o.Deadline < 0 || o.LongDeadline < 0 || o.MaxInFlight < 0 || o.MaxLong < 0 {
		return kind.Errorf(kind.Invalid, "spdk: a bound is negative")
	}
	return nil
}

// Client calls the methods of one target. All methods may be called concurrently. Close
// it.
type Client struct {
	o     Options
	slots chan struct{}   // an element for each call in flight on the shared connection
	long  chan struct{}   // an element for each call with a connection of its own
	ctx   context.Context // ends with Close
	stop  context.CancelCauseFunc

	mu     sync.Mutex
	closed bool  // guarded by mu
	shared *conn // guarded by mu; nil before the first call
	calls  sync.WaitGroup
}

// New returns a client. It does not connect: the first call does, and each call after a
// connection broke.
func New(o Options) (*Client, error) {
	if err := o.fill(); err != nil {
		return nil, err
	}
	ctx, stop := context.WithCancelCause(context.Background())
	return &Client{o: o, slots: make(chan struct{}, o.MaxInFlight), long: make(chan struct{}, o.MaxLong), ctx: ctx, stop: stop}, nil
}

// Close ends the calls in flight and waits for them.
func (c *Client) Close() error {
	c.mu.Lock()
	c.closed = true
	shared := c.shared
	c.shared = nil
	c.mu.Unlock()
	c.stop(errClosed)
	if shared != nil {
		shared.close(errClosed)
	}
	c.calls.Wait()
	return nil
}

// Call calls a method. params is what becomes a JSON object, nil for none; the result is
// stored in what result points to, unless that is nil. An answer that is an error comes
// back as *Error; a target that cannot be reached, that ended or that did not answer in
// time is kind.Unavailable; an answer that does not fit into result is kind.Corrupt.
//
// A method that only reads is called once more when its connection breaks; for others
// see Unanswered.
func (c *Client) Call(ctx context.Context, method string, params, result any) error {
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		return c.describe(method, kind.Wrap(kind.Unavailable, errClosed))
	}
	c.calls.Add(1)
	c.mu.Unlock()
	defer c.calls.Done()
	began := time.Now() // before the deadline is set: who reaches it has waited for all of it
	call := c.callShared
	most := c.o.Deadline
	if w, ok := params.(waiter); ok && w.waits() || longMethods[method] {
		call, most = c.callAlone, c.o.LongDeadline
	}
	ctx, cancel := context.WithTimeout(ctx, most)
	defer cancel()
	ctx, end := context.WithCancelCause(ctx)
	defer end(nil)
	stop := context.AfterFunc(c.ctx, func() { end(errClosed) })
	defer stop()
	raw, err := call(ctx, began, method, params)
	if failpoint.Enabled && !reads(method) {
		failpoint.Reach("spdk." + method + ": answered")
	}
	if err != nil && reads(method) && ctx.Err() == nil && errors.Is(err, kind.Unavailable) && Unanswered(err) {
		raw, err = call(ctx, began, method, params)
	}
	if err != nil {
		return c.describe(method, err)
	}
	if result == nil {
		return nil
	}
	if err := json.Unmarshal(raw, result); err != nil {
		return c.describe(method, kind.Errorf(kind.Corrupt, "the result is not what the method is known to answer: %w", err))
	}
	return nil
}

// describe says what was called where. An *Error says it itself.
func (c *Client) describe(method string, err error) error {
	var e *Error
	if errors.As(err, &e) {
		return err
	}
	wrapped := fmt.Errorf("call %s on %s: %w", method, c.o.Socket, err)
	return kind.Wrap(kind.Of(err), wrapped)
}

// longMethods copy data, connect to other machines, or wait for something.
var longMethods = map[string]bool{
	"bdev_lvol_create": true, "bdev_lvol_create_lvstore": true, "bdev_lvol_delete_lvstore": true, "bdev_lvol_delete": true,
	"bdev_lvol_inflate": true, "bdev_lvol_decouple_parent": true, "bdev_lvol_resize": true,
	"bdev_nvme_attach_controller": true, "bdev_nvme_detach_controller": true,
	"bdev_wait_for_examine": true, "framework_wait_init": true,
	"bdev_rbd_register_cluster": true, "bdev_rbd_create": true,
	"nbd_start_disk": true, "nbd_stop_disk": true, "ublk_start_disk": true, "ublk_stop_disk": true,
}

// waiter is for parameters with which a method that is else short waits.
type waiter interface{ waits() bool }

// reads tells of methods that change nothing.
func reads(method string) bool {
	return strings.Contains(method, "_get_") || method == "bdev_wait_for_examine" || method == "framework_wait_init"
}

// callShared calls on the connection that all have in common.
func (c *Client) callShared(ctx context.Context, began time.Time, method string, params any) (json.RawMessage, error) {
	select {
	case c.slots <- struct{}{}:
	case <-ctx.Done():
		c.dropStuck()
		return nil, ended(ctx)
	}
	release := func() { <-c.slots }
	n, err := c.connect(ctx)
	if err != nil {
		release()
		return nil, err
	}
	raw, err := n.do(ctx, began, method, params, release)
	if ctx.Err() != nil {
		c.dropStuck()
	}
	return raw, err
}

// callAlone calls on a connection of its own.
func (c *Client) callAlone(ctx context.Context, began time.Time, method string, params any) (json.RawMessage, error) {
	select {
	case c.long <- struct{}{}:
		defer func() { <-c.long }()
	case <-ctx.Done():
		return nil, ended(ctx)
	}
	nc, err := c.dial(ctx)
	if err != nil {
		return nil, err
	}
	n := newConn(nc)
	defer n.close(errClosed)
	return n.do(ctx, began, method, params, func() {})
}

// dropStuck closes the shared connection when a call on it has waited for longer than any
// may: an answer that never comes must not hold its place for ever.
func (c *Client) dropStuck() {
	c.mu.Lock()
	n := c.shared
	c.mu.Unlock()
	if n == nil {
		return
	}
	if t := n.oldest(); !t.IsZero() && time.Since(t) >= c.o.Deadline {
		n.fail(kind.Errorf(kind.Unavailable, "the target did not answer for %s", c.o.Deadline))
	}
}

// connect returns the shared connection, made anew when it broke.
func (c *Client) connect(ctx context.Context) (*conn, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return nil, kind.Wrap(kind.Unavailable, errClosed)
	}
	if c.shared != nil {
		if c.shared.broken() == nil {
			return c.shared, nil
		}
		<-c.shared.done
		c.shared = nil
	}
	nc, err := c.dial(ctx) // a Unix socket: it takes no time, or fails
	if err != nil {
		return nil, err
	}
	c.shared = newConn(nc)
	return c.shared, nil
}

func (c *Client) dial(ctx context.Context) (net.Conn, error) {
	var d net.Dialer
	nc, err := d.DialContext(ctx, "unix", c.o.Socket)
	switch {
	case err == nil:
		return nc, nil
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return nil, kind.Errorf(kind.Unavailable, "nobody listens: start the target, or name its socket")
	case errors.Is(err, fs.ErrPermission):
		return nil, kind.Errorf(kind.Denied, "permission denied: run as root")
	case ctx.Err() != nil:
		return nil, ended(ctx)
	}
	return nil, kind.Wrap(kind.Unavailable, err)
}
