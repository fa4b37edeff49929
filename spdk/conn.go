package spdk

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"sync"
	"time"

	"github.com/thaw-project/thaw/kind"
)

const (
	// maxAnswerBytes bounds one answer: SPDK sends at most 32 MiB.
	maxAnswerBytes = 32 << 20

	// maxRequestBytes bounds one request: SPDK takes no longer ones.
	maxRequestBytes = 32 << 10
)

// errClosed is why calls fail that are in flight when the client is closed.
var errClosed = errors.New("the client was closed")

// conn is a connection and the calls in flight on it.
type conn struct {
	nc      net.Conn
	writing chan struct{} // holds one element while somebody writes: a lock that can be waited for with a deadline
	done    chan struct{} // closed when the reader ended

	mu      sync.Mutex
	err     error               // guarded by mu: why the connection is of no use
	waiting map[uint64]*request // guarded by mu
	lastID  uint64              // guarded by mu
}

// request is a call that was not answered yet.
type request struct {
	began   time.Time
	answer  chan answer // takes one without waiting
	release func()      // gives back what bounds the calls in flight
}

type answer struct {
	result json.RawMessage
	err    error
}

// newConn serves nc until it breaks; close it. The reader is the connection's only
// goroutine.
func newConn(nc net.Conn) *conn {
	c := &conn{nc: nc, writing: make(chan struct{}, 1), done: make(chan struct{}), waiting: map[uint64]*request{}}
	go c.read()
	return c
}

func (c *conn) close(why error) {
	c.fail(why)
	<-c.done
}

// fail ends the connection and with it the calls in flight. Only the first reason counts.
func (c *conn) fail(why error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return
	}
	c.err = why
	c.nc.Close()
	for id, r := range c.waiting {
		delete(c.waiting, id)
		r.release()
		r.answer <- answer{err: &unanswered{kind.Wrap(kind.Unavailable, why)}}
	}
}

func (c *conn) broken() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

// oldest returns when the call began that has been in flight longest, or zero.
func (c *conn) oldest() (t time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, r := range c.waiting {
		if t.IsZero() || r.began.Before(t) {
			t = r.began
		}
	}
	return t
}

// bounded lets a decoder read at most room bytes.
type bounded struct {
	r    io.Reader
	room int
}

var errTooLong = errors.New("an answer is longer than 32 MiB")

func (b *bounded) Read(p []byte) (int, error) {
	if b.room <= 0 {
		return 0, errTooLong
	}
	n, err := b.r.Read(p[:min(len(p), b.room)])
	b.room -= n
	return n, err
}

// read hands answers to those who wait for them.
func (c *conn) read() {
	defer close(c.done)
	in := &bounded{r: c.nc}
	d := json.NewDecoder(in)
	for {
		in.room = maxAnswerBytes
		if err := c.readOne(d); err != nil {
			c.fail(err)
			return
		}
	}
}

func (c *conn) readOne(d *json.Decoder) error {
	var a struct {
		ID     json.RawMessage `json:"id"`
		Result json.RawMessage `json:"result"`
		Error  *struct {
			Code    int    `json:"code"`
			Message string `json:"message"`
		} `json:"error"`
	}
	switch err := d.Decode(&a); {
	case err == io.EOF:
		return errors.New("the target closed the connection")
	case err != nil:
		return err
	case (a.Result == nil) == (a.Error == nil):
		return errors.New("the target sent what is no answer")
	case a.Error != nil && string(a.ID) == "null":
		return fmt.Errorf("the target could not read a request: %s (%d)", printable(a.Error.Message), a.Error.Code)
	}
	id, err := strconv.ParseUint(string(a.ID), 10, 64)
	c.mu.Lock()
	defer c.mu.Unlock()
	r := c.waiting[id]
	if err != nil || r == nil {
		return errors.New("the target answered what it was not asked")
	}
	delete(c.waiting, id)
	r.release()
	got := answer{result: a.Result}
	if a.Error != nil {
		got.err = &Error{Code: a.Error.Code, Message: a.Error.Message}
	}
	r.answer <- got
	return nil
}

// do sends a request and waits for its answer or for ctx's end. release is called once,
// when the request is no longer in flight: after ctx's end that may be later.
func (c *conn) do(ctx context.Context, began time.Time, method string, params any, release func()) (json.RawMessage, error) {
	r := &request{began: began, answer: make(chan answer, 1), release: release}
	id, err := c.enter(r)
	if err != nil {
		release()
		return nil, kind.Wrap(kind.Unavailable, err)
	}
	raw, err := encode(id, method, params)
	if err != nil {
		c.leave(id)
		return nil, err
	}
	if sent, err := c.write(ctx, raw); err != nil {
		if !sent {
			c.leave(id)
			return nil, err
		}
		return nil, &unanswered{kind.Wrap(kind.Unavailable, err)}
	}
	select {
	case a := <-r.answer:
		if e, ok := a.err.(*Error); ok {
			e.Method = method
		}
		return a.result, a.err
	case <-ctx.Done():
		return nil, &unanswered{ended(ctx)}
	}
}

// ended is the error of a call whose time ran out.
func ended(ctx context.Context) error {
	why := context.Cause(ctx)
	if errors.Is(why, context.Canceled) {
		return kind.Wrap(kind.Canceled, why)
	}
	return kind.Wrap(kind.Unavailable, why)
}

func (c *conn) enter(r *request) (uint64, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return 0, c.err
	}
	c.lastID++
	c.waiting[c.lastID] = r
	return c.lastID, nil
}

// leave takes back a request that was not sent.
func (c *conn) leave(id uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if r := c.waiting[id]; r != nil {
		delete(c.waiting, id)
		r.release()
	}
}

func encode(id uint64, method string, params any) ([]byte, error) {
	raw, err := json.Marshal(struct {
		JSONRPC string `json:"jsonrpc"`
		ID      uint64 `json:"id"`
		Method  string `json:"method"`
		Params  any    `json:"params,omitempty"`
	}{"2.0", id, method, params})
	if err != nil {
		return nil, kind.Wrap(kind.Invalid, err)
	}
	if len(raw) > maxRequestBytes {
		return nil, kind.Errorf(kind.Invalid, "the request has %d bytes, a target takes %d", len(raw), maxRequestBytes)
	}
	return append(raw, '\n'), nil
}

// write sends a request whole. When it cannot, the connection is of no use: sent is false
// when nothing was written and it still is of use.
func (c *conn) write(ctx context.Context, raw []byte) (sent bool, err error) {
	select {
	case c.writing <- struct{}{}:
	case <-ctx.Done():
		return false, ended(ctx)
	case <-c.done:
		return true, c.broken()
	}
	defer func() { <-c.writing }()
	if ctx.Err() != nil {
		return false, ended(ctx)
	}
	// A target that reads nothing must not hold a caller whose time is over.
	interrupted := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(interrupted)
		_ = c.nc.SetWriteDeadline(time.Unix(1, 0)) // fails on a closed connection only
	})
	_, err = c.nc.Write(raw)
	if !stop() {
		<-interrupted
		_ = c.nc.SetWriteDeadline(time.Time{})
	}
	if err != nil {
		c.fail(err)
		if ctx.Err() != nil {
			err = ended(ctx)
		}
		return true, err
	}
	return true, nil
}
