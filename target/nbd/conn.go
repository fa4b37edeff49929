package nbd

import (
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"github.com/thaw-project/thaw/nbd"
	"github.com/thaw-project/thaw/target/bdev"
	"github.com/thaw-project/thaw/target/engine"
)

// conn is a connection in transmission.
//
// Its own goroutine, the reader, takes requests off the socket, as many as there are
// with one call. A request that will be served fast it serves itself, collecting
// replies in an arena that is sent when there is nothing more to serve: no hand-off, and one call for
// many replies. A request that will wait long goes to a goroutine of its own, which
// sends its reply itself together with others that are ready. What waits is measured
// per kind of request and connection (see cost).
type conn struct {
	s          *Server
	x          *export
	dev        bdev.Device
	stream     stream
	structured bool
	extended   bool
	allocation bool

	// The reader's own.
	in    *buffer // received bytes: in.b[r:w]
	r, w  int
	sips  bool      // see sip
	out   *buffer   // the arena: replies in out.b[:out.end]
	slots int       // made so far
	vec   [1][]byte // for sending the arena

	ready    chan struct{} // tells the writer of the pool's replies; nil without a pool
	free     chan *slot
	inflight atomic.Int32 // slots in use
	workers  sync.WaitGroup
	costs    [2][8]engine.Cost // by with FUA or not, and command

	box      outbox
	draining atomic.Bool
	warned   atomic.Int64 // when a failing device was last logged, in Unix nanoseconds
}

// slot is a request that is served by a goroutine of its own.
type slot struct {
	c     *conn
	req   nbd.Request
	data  *buffer // from the budget, or nil
	small buffer  // the reply of requests without data
	run   func()  // serve, made once so that go needs no memory
	hop   bool    // the owner of the device serves it
}

// own takes the device for a request that the reader serves. A device that never
// changes has no owner. When it returns false another connection has it.
func (c *conn) own() bool { return c.x.ReadOnly || c.x.owner.Take() }

// leave ends own.
func (c *conn) leave() {
	if !c.x.ReadOnly {
		c.x.owner.Leave()
	}
}

func newConn(s *Server, h *handshake) *conn {
	c := &conn{
		s: s, x: h.export, dev: h.export.Device,
		structured: h.structured, extended: h.extended, allocation: h.allocation,
		free: make(chan *slot, s.cfg.MaxInflight),
	}
	if k := newSocket(h.conn); k != nil {
		c.stream = k
	} else {
		h.conn.SetDeadline(time.Time{})
		c.stream = &plain{conn: h.conn}
	}
	if s.pool != nil {
		c.ready = make(chan struct{}, 1)
	}
	c.box.c = c
	c.box.cond.L = &c.box.mu
	return c
}

// drain lets the connection finish what it serves, and end.
func (c *conn) drain() {
	c.draining.Store(true)
	c.stream.closeRead()
}

// run serves the connection, which the caller closes. It returns an error when the peer broke the
// protocol or stalled, not when it left.
func (c *conn) run() error {
	var writer sync.WaitGroup
	if c.ready != nil {
		writer.Go(c.sendReplies)
	}
	err := c.receive()
	if err == nil {
		err = c.flush()
	}
	if err != nil {
		c.stream.abort()
	}
	c.workers.Wait()
	if c.ready != nil {
		close(c.ready)
		writer.Wait()
	}
	c.release()
	if e := c.box.failure(); e != nil {
		err = e // the cause of all others
	}
	switch {
	case errors.Is(err, errLeft), c.draining.Load():
		return nil
	}
	return err
}

// sendReplies sends what the pool's workers replied, all that there is at a time.
func (c *conn) sendReplies() {
	for range c.ready {
		c.box.lock()
		c.box.unlock() // which sends; the reader finds why it failed
	}
}

// errLeft says that the peer closed the connection.
var errLeft = errors.New("the peer left")

// release gives back the buffers of an idle connection.
func (c *conn) release() {
	c.vec[0] = nil
	if c.in != nil {
		putBuffer(c.in)
		c.in = nil
	}
	if c.out != nil {
		putBuffer(c.out)
		c.out = nil
	}
}

func (c *conn) acquire() {
	if c.in == nil {
		c.in = getBuffer(arenaBytes)
		c.r, c.w = 0, 0
	}
	if c.out == nil {
		c.out = getBuffer(arenaBytes)
	}
}

func (c *conn) receive() error {
	header := nbd.RequestLen(c.extended)
	var req nbd.Request
	c.acquire()
	for {
		for c.w-c.r >= header {
			if !req.Decode(c.in.b[c.r:], c.extended) {
				return errors.New("a request without its magic number")
			}
			c.r += header
			if req.Type == nbd.CmdDisc {
				return nil
			}
			if err := c.handle(&req); err != nil {
				return err
			}
			if c.draining.Load() {
				return nil
			}
		}
		if err := c.fill(header, c.w > c.r); err != nil {
			return err
		}
	}
}

// fill receives until n bytes are there, n at most arenaBytes. mid tells that a request
// has begun, so the peer owes the rest.
func (c *conn) fill(n int, mid bool) error {
	switch {
	case c.r == c.w:
		c.r, c.w = 0, 0
	case len(c.in.b)-c.r < n:
		c.w = copy(c.in.b, c.in.b[c.r:c.w])
		c.r = 0
	}
	// Replies leave when there is nothing to receive, so that many leave at once.
	for c.out.end > 0 && c.w-c.r < n {
		m := c.stream.tryRecv(c.in.b[c.w:c.receiveEnd(n)])
		if c.w += m; m > 0 {
			continue
		}
		if err := c.flush(); err != nil {
			return err
		}
	}
	var deadline time.Time
	for c.w-c.r < n {
		m, err := c.recv(c.in.b[c.w:c.receiveEnd(n)], mid || c.w > c.r, &deadline)
		if err != nil {
			return err
		}
		c.w += m
	}
	return nil
}

// sip is how much is received with the header that may follow a long payload: a full
// arena would hold the next payload, which goes to a buffer of its own, to be copied.
const sip = 4 << 10

// receiveEnd is how far the arena is filled, of which n bytes are needed.
func (c *conn) receiveEnd(n int) int {
	if c.sips {
		return min(len(c.in.b), max(c.w+sip, c.r+n))
	}
	return len(c.in.b)
}

// recv reads into p. Between requests it waits as long as the peer likes, without
// buffers: then it may return 0, and c.in is another. Else *deadline, set at the first
// wait, is when the peer must have sent what it owes.
func (c *conn) recv(p []byte, mid bool, deadline *time.Time) (int, error) {
	for {
		n, err := c.stream.recv(p)
		switch {
		case err == nil:
			return n, nil
		case err == io.EOF && mid:
			return 0, fmt.Errorf("in the middle of a request: %w", io.ErrUnexpectedEOF)
		case err != errIdle:
			return 0, errLeft // closed, reset: the peer is gone
		}
		if mid {
			if deadline.IsZero() {
				*deadline = time.Now().Add(c.s.cfg.StallTimeout)
			}
			if err := c.stream.wait(*deadline); err != nil {
				return 0, fmt.Errorf("waiting for the rest of a request: %w", err)
			}
			continue
		}
		c.release()
		err = c.stream.wait(time.Time{})
		c.acquire()
		if err != nil {
			return 0, errLeft
		}
		return 0, nil
	}
}

// receiveInto fills p with payload, from the buffer and then from the socket.
func (c *conn) receiveInto(p []byte) error {
	n := copy(p, c.in.b[c.r:c.w])
	c.r += n
	if n == len(p) {
		return nil
	}
	if err := c.flush(); err != nil {
		return err
	}
	var deadline time.Time
	for n < len(p) {
		m, err := c.recv(p[n:], true, &deadline)
		if err != nil {
			return err
		}
		n += m
	}
	return nil
}

// discard throws payload away.
func (c *conn) discard(n uint64) error {
	for n > 0 {
		if c.r == c.w {
			if err := c.fill(1, true); err != nil {
				return err
			}
		}
		m := min(n, uint64(c.w-c.r))
		c.r += int(m)
		n -= m
	}
	return nil
}

// flush sends the arena.
func (c *conn) flush() error {
	if c.out == nil || c.out.end == 0 {
		return nil
	}
	c.box.lock()
	c.vec[0] = c.out.b[:c.out.end]
	c.box.sendLocked(c.vec[:])
	c.out.end = 0
	return c.box.unlock()
}

// room returns the free end of the arena, at least n bytes, n at most its size.
func (c *conn) room(n int) ([]byte, error) {
	if len(c.out.b)-c.out.end < n {
		if err := c.flush(); err != nil {
			return nil, err
		}
	}
	return c.out.b[c.out.end:], nil
}

// smallReply is more than the longest reply without data.
const smallReply = 128

// handle serves a request or hands it on. Errors end the connection.
func (c *conn) handle(req *nbd.Request) error {
	payload := uint64(0)
	if c.extended && req.Flags&nbd.CmdFlagPayloadLen != 0 || !c.extended && req.Type == nbd.CmdWrite {
		payload = req.Length
	}
	if payload > uint64(c.s.cfg.MaxRequestBytes) {
		return fmt.Errorf("a request with %d bytes of payload", payload)
	}
	if errno := c.check(req); errno != 0 {
		if err := c.discard(payload); err != nil {
			return err
		}
		return c.answer(req, errno)
	}
	cost := c.cost(req)
	switch req.Type {
	case nbd.CmdRead:
		return c.handleRead(req, cost)
	case nbd.CmdWrite:
		return c.handleWrite(req, cost)
	case nbd.CmdBlockStatus:
		room, err := c.room(statusRoom)
		if err == nil {
			c.out.end += c.buildStatus(room, req)
		}
		return err
	}
	// What goes through all its bytes takes long when it has many.
	long := req.Length > chunkBytes && (req.Type == nbd.CmdCache || req.Flags&nbd.CmdFlagNoHole != 0)
	if long || c.handOff(cost) {
		return c.dispatch(req, nil)
	}
	if !c.own() {
		return c.dispatchTo(req, nil, true)
	}
	w := cost.Start()
	errno := c.control(req, c.out.b[c.out.end:])
	c.leave()
	w.Stop()
	return c.answer(req, errno)
}

func (c *conn) handleRead(req *nbd.Request, cost *engine.Cost) error {
	n := int(req.Length)
	if n > chunkBytes {
		return c.streamRead(req)
	}
	slow, hop := c.handOff(cost), false
	if n <= arenaBytes && !slow {
		room, err := c.room(n + c.readRoom(req))
		if err != nil {
			return err
		}
		if c.own() {
			c.readOwned(room, req, cost)
			return nil
		}
		hop = true
	}
	data := c.s.budget.take(n)
	switch {
	case data == nil:
		return c.streamRead(req)
	case slow:
		return c.dispatch(req, data)
	case hop:
		return c.dispatchTo(req, data, true)
	}
	if err := c.flush(); err != nil {
		c.s.budget.give(data)
		return err
	}
	if !c.own() {
		return c.dispatchTo(req, data, true)
	}
	w := cost.Start()
	data.end = c.buildRead(data.b, req)
	c.leave()
	w.Stop()
	c.box.post(data)
	return nil
}

// readOwned serves a read into the arena; the reader owns the device until then.
func (c *conn) readOwned(room []byte, req *nbd.Request, cost *engine.Cost) {
	w := cost.Start()
	c.out.end += c.buildRead(room, req)
	w.Stop()
	c.leave()
}

func (c *conn) handleWrite(req *nbd.Request, cost *engine.Cost) error {
	n := int(req.Length)
	slow := c.handOff(cost)
	c.sips = n > arenaBytes
	if n <= arenaBytes && !slow {
		if c.w-c.r < n {
			if err := c.fill(n, true); err != nil {
				return err
			}
		}
		if c.own() {
			w := cost.Start()
			errno := c.write(req, c.in.b[c.r:c.r+n])
			c.leave()
			w.Stop()
			c.r += n
			return c.answer(req, errno)
		}
	}
	if n > chunkBytes {
		return c.streamWrite(req)
	}
	data := c.s.budget.take(n)
	if data == nil {
		return c.streamWrite(req)
	}
	if err := c.receiveInto(data.b[:n]); err != nil {
		c.s.budget.give(data)
		return err
	}
	if slow {
		return c.dispatch(req, data)
	}
	if !c.own() {
		return c.dispatchTo(req, data, true)
	}
	w := cost.Start()
	errno := c.write(req, data.b[:n])
	c.leave()
	w.Stop()
	c.s.budget.give(data)
	return c.answer(req, errno)
}

// answer puts a reply without data into the arena.
func (c *conn) answer(req *nbd.Request, errno nbd.Errno) error {
	room, err := c.room(smallReply)
	if err == nil {
		c.out.end += c.putReply(room, req, errno)
	}
	return err
}

// streamRead serves a read in pieces, when it is long or there is no memory to spare.
// Nobody else sends meanwhile.
func (c *conn) streamRead(req *nbd.Request) error {
	if err := c.flush(); err != nil {
		return err
	}
	buf := c.out
	if big := c.s.budget.take(chunkBytes); big != nil {
		defer c.s.budget.give(big)
		buf = big
	}
	piece := classes[buf.class]
	c.box.lock()
	defer c.box.unlock()
	// Simple replies have one header, and DF asks for one chunk: after it was sent an
	// error can only be told by disconnecting.
	single := !c.structured || req.Flags&nbd.CmdFlagDF != 0
	for off, left := req.Offset, req.Length; left > 0; {
		n := min(left, uint64(piece))
		head, flags := 0, uint16(0)
		if n == left {
			flags = nbd.ReplyFlagDone
		}
		switch {
		case !single:
			head = c.putDataHeader(buf.b, req, flags, off, n)
		case off == req.Offset && !c.structured:
			head = nbd.PutSimple(buf.b, 0, req.Cookie)
		case off == req.Offset:
			head = c.putDataHeader(buf.b, req, nbd.ReplyFlagDone, off, left)
		}
		if errno := c.readAt(buf.b[head:head+int(n)], int64(off)); errno != 0 {
			if single && off > req.Offset {
				return fmt.Errorf("a read failed after its reply began: %v", errno)
			}
			c.vec[0] = buf.b[:c.putReply(buf.b, req, errno)]
			c.box.sendLocked(c.vec[:])
			return nil
		}
		c.vec[0] = buf.b[:head+int(n)]
		if !c.box.sendLocked(c.vec[:]) {
			return nil // the failure is found at the next flush
		}
		off, left = off+n, left-n
	}
	return nil
}

// streamWrite serves a write in pieces, as they come.
func (c *conn) streamWrite(req *nbd.Request) error {
	if err := c.flush(); err != nil {
		return err
	}
	buf := c.out
	if big := c.s.budget.take(chunkBytes); big != nil {
		defer c.s.budget.give(big)
		buf = big
	}
	var errno nbd.Errno
	part := *req
	part.Flags &^= nbd.CmdFlagFUA // once, at the end
	for left := req.Length; left > 0; left -= part.Length {
		part.Length = min(left, uint64(classes[buf.class]))
		p := buf.b[:part.Length]
		if err := c.receiveInto(p); err != nil {
			return err
		}
		if errno == 0 {
			errno = c.write(&part, p)
		}
		part.Offset += part.Length
	}
	if errno == 0 && req.Flags&nbd.CmdFlagFUA != 0 {
		errno = c.errno("flush", c.dev.Flush())
	}
	return c.answer(req, errno)
}

// dispatch has a request served by a goroutine of its own; data is its payload, or room
// for its reply, or nil.
func (c *conn) dispatch(req *nbd.Request, data *buffer) error { return c.dispatchTo(req, data, false) }

// dispatchTo is dispatch, or with hop has whoever owns the device serve the request.
func (c *conn) dispatchTo(req *nbd.Request, data *buffer, hop bool) error {
	var s *slot
	select {
	case s = <-c.free:
	default:
		if c.slots < cap(c.free) {
			c.slots++
			s = &slot{c: c}
			s.small.b = make([]byte, smallReply)
			s.run = s.serve
			break
		}
		if err := c.flush(); err != nil {
			if data != nil {
				c.s.budget.give(data)
			}
			return err
		}
		s = <-c.free
	}
	s.req, s.data, s.hop = *req, data, hop
	c.inflight.Add(1)
	c.workers.Add(1)
	switch {
	case hop:
		c.x.owner.Submit(s)
	case c.s.pool != nil:
		c.s.pool.Submit(s)
	default:
		go s.run()
	}
	return nil
}

// Run serves the request for an engine, on a goroutine that must not wait for the peer
// of this connection.
func (s *slot) Run() { s.serve() }

func (s *slot) serve() {
	c, req := s.c, &s.req
	defer c.workers.Done()
	w := c.cost(req).Start()
	reply := &s.small
	switch req.Type {
	case nbd.CmdRead:
		reply = s.data
		reply.end = c.buildRead(reply.b, req)
	case nbd.CmdWrite:
		reply.end = c.putReply(reply.b, req, c.write(req, s.data.b[:req.Length]))
		c.s.budget.give(s.data)
	default:
		reply.end = c.putReply(reply.b, req, c.control(req, nil))
	}
	w.Stop()
	reply.start, reply.slot = 0, s
	if s.hop {
		c.box.pass(reply)
	} else {
		c.box.post(reply)
	}
}

// outbox sends replies. Whoever finds nobody sending sends, for others as well until
// nothing is left: replies that became ready meanwhile go in one system call.
type outbox struct {
	c       *conn
	mu      sync.Mutex
	cond    sync.Cond // sending became false
	sending bool
	queue   []*buffer // at most one per slot, and one of the reader
	err     error

	// Only used by who sends.
	batch []*buffer
	vec   [][]byte
}

// lock waits until nobody sends and makes the caller the one who does.
func (o *outbox) lock() {
	o.mu.Lock()
	for o.sending {
		o.cond.Wait()
	}
	o.sending = true
	o.mu.Unlock()
}

// sendLocked sends between lock and unlock; false when the connection failed.
func (o *outbox) sendLocked(bufs [][]byte) bool {
	// err is only set by who sends.
	if o.err != nil {
		return false
	}
	if err := o.c.stream.send(bufs, o.c.s.cfg.StallTimeout); err != nil {
		o.c.stream.abort()
		o.mu.Lock()
		o.err = fmt.Errorf("sending replies: %w", err)
		o.mu.Unlock()
		return false
	}
	return true
}

// unlock sends what others queued meanwhile. It returns why the connection failed.
func (o *outbox) unlock() error {
	o.mu.Lock()
	for len(o.queue) > 0 {
		o.batch, o.queue = o.queue, o.batch[:0]
		o.mu.Unlock()
		o.vec = o.vec[:0]
		for _, b := range o.batch {
			o.vec = append(o.vec, b.b[b.start:b.end])
		}
		o.sendLocked(o.vec)
		clear(o.vec)
		for i, b := range o.batch {
			o.batch[i] = nil
			o.done(b)
		}
		o.mu.Lock()
	}
	o.sending = false
	err := o.err
	o.cond.Signal()
	o.mu.Unlock()
	return err
}

// done frees what a reply that was sent, or cannot be, held.
func (o *outbox) done(b *buffer) {
	s := b.slot
	if s == nil || b != &s.small {
		b.slot = nil
		o.c.s.budget.give(b)
	}
	if s != nil {
		s.data = nil
		o.c.inflight.Add(-1)
		o.c.free <- s
	}
}

// post queues a reply; it is sent by the caller or by who sends already.
func (o *outbox) post(b *buffer) {
	o.mu.Lock()
	o.queue = append(o.queue, b)
	if o.c.ready != nil {
		o.mu.Unlock()
		select {
		case o.c.ready <- struct{}{}:
		default: // the writer will look anyway
		}
		return
	}
	if o.sending {
		o.mu.Unlock()
		return
	}
	o.sending = true
	o.mu.Unlock()
	o.unlock()
}

// pass is post for callers that must not wait for the peer.
func (o *outbox) pass(b *buffer) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.queue = append(o.queue, b)
	if o.sending {
		return
	}
	o.sending = true
	o.c.workers.Go(func() { o.unlock() })
}

func (o *outbox) failure() error {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.err
}

// cost is what is known of requests like this one.
func (c *conn) cost(req *nbd.Request) *engine.Cost {
	return &c.costs[req.Flags&nbd.CmdFlagFUA][req.Type]
}

// handOff tells whether a request goes to another goroutine: because it will take
// long, or because the pool serves all.
func (c *conn) handOff(k *engine.Cost) bool {
	return c.s.pool != nil || c.s.cfg.hand == handAll || k.Slow() && c.s.cfg.hand == handSlow
}
