package client

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/nbd"
)

// maxSlots bounds Config.MaxInflight; a cookie holds 16 bits of slot.
const maxSlots = 1 << 12

// maxErrorBytes bounds the text a server may send with an error, which is dropped.
const maxErrorBytes = 64 << 10

// receiveBytes is the buffer of replies of one connection; longer data goes past it.
const receiveBytes = 64 << 10

type extent struct{ length, flags uint64 }

// call is one request. Between a successful register and its done it belongs to the
// link's reader, which fills into and extent; the caller waits.
type call struct {
	req     nbd.Request
	payload []byte
	into    []byte
	extent  *extent

	got  uint64 // bytes of into that arrived
	err  error  // what the server answered
	lost bool   // the connection went before the answer came
	done chan struct{}
	late *time.Timer
	head [nbd.ExtendedRequestBytes]byte
	vec  [2][]byte
	bufs net.Buffers
}

func newCall() *call {
	c := &call{done: make(chan struct{}, 1), late: time.NewTimer(time.Hour)}
	c.late.Stop()
	return c
}

func (d *Device) call(command uint16, off, n int64) *call {
	c := d.calls.Get().(*call)
	c.req = nbd.Request{Type: command, Offset: uint64(off), Length: uint64(n)}
	return c
}

func (d *Device) free(c *call) {
	c.reset()
	c.payload, c.into, c.extent = nil, nil, nil
	d.calls.Put(c)
}

func (c *call) reset() { c.got, c.err, c.lost = 0, nil, false }

// connection is one TCP or Unix connection in transmission.
type connection struct {
	net.Conn
	r *bufio.Reader
	s session
	b [32]byte // what the reader reads headers into
}

func (c *connection) close() { c.Conn.Close() }

// link is a place for one connection, which is made again when lost.
type link struct {
	d     *Device
	isUp  atomic.Bool
	slots chan uint16 // free ones

	mu         sync.Mutex
	conn       *connection // nil while down
	calls      []*call     // by slot
	generation uint64      // counts requests, so that an old answer fits no new request

	sending sync.Mutex
}

func newLink(d *Device) *link {
	l := &link{d: d, slots: make(chan uint16, d.cfg.MaxInflight), calls: make([]*call, d.cfg.MaxInflight)}
	for i := range d.cfg.MaxInflight {
		l.slots <- uint16(i)
	}
	return l
}

// connect makes a connection and negotiates.
func (l *link) connect(ctx context.Context) (*connection, session, error) {
	ctx, cancel := context.WithTimeout(ctx, l.d.cfg.ConnectTimeout)
	defer cancel()
	conn, err := l.d.cfg.Dial(ctx)
	if err != nil {
		return nil, session{}, kind.Wrap(kind.Unavailable, err)
	}
	// Negotiation ends when ctx does.
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
	r := bufio.NewReaderSize(conn, receiveBytes)
	s, err := negotiate(conn, r, l.d.cfg.Export)
	if !stop() && err == nil {
		err = kind.Wrap(kind.Unavailable, context.Cause(ctx))
	}
	if err != nil {
		conn.Close()
		return nil, session{}, err
	}
	return &connection{Conn: conn, r: r, s: s}, s, nil
}

// run keeps the link up until the device is closed. c is the first connection, or nil.
func (l *link) run(c *connection) {
	d := l.d
	pause := d.cfg.BackoffMin
	for d.ctx.Err() == nil {
		if c == nil {
			var err error
			var s session
			c, s, err = l.connect(d.ctx)
			if err == nil {
				if what := s.same(&d.s); what != "" {
					err = fmt.Errorf("the export changed: %s", what)
				} else if s.extended != d.s.extended || s.allocation != d.s.allocation || s.structured != d.s.structured || s.maxRequest < d.s.maxRequest {
					err = errors.New("the server speaks another dialect now")
				}
				if err != nil {
					c.close()
				}
			}
			if err != nil {
				c = nil
				d.log.Warn("connecting to the NBD server failed", "error", err, "again_in", pause)
				// Jitter, so that clients of a server that comes back do not all come at once.
				select {
				case <-time.After(pause/2 + rand.N(pause/2+1)):
				case <-d.ctx.Done():
				}
				pause = min(2*pause, d.cfg.BackoffMax)
				continue
			}
			l.up(c)
			if d.ctx.Err() != nil {
				c.close() // Close may have looked before it was up
			}
		}
		began := time.Now()
		err := l.receive(c)
		l.down(c)
		c = nil
		if d.ctx.Err() == nil {
			d.log.Warn("an NBD connection was lost", "error", err)
		}
		// A server that takes connections and drops them is asked more and more
		// seldom; one that worked for a while, at once.
		if time.Since(began) > d.cfg.BackoffMax {
			pause = d.cfg.BackoffMin
		} else if d.ctx.Err() == nil {
			select {
			case <-time.After(rand.N(pause)):
			case <-d.ctx.Done():
			}
			pause = min(2*pause, d.cfg.BackoffMax)
		}
	}
	if c != nil {
		l.down(c)
	}
}

func (l *link) up(c *connection) {
	l.mu.Lock()
	l.conn = c
	l.mu.Unlock()
	l.isUp.Store(true)
	l.d.announce()
}

// down closes a connection and gives its calls back to their callers.
func (l *link) down(c *connection) {
	l.isUp.Store(false)
	c.close()
	l.mu.Lock()
	l.conn = nil
	for i, k := range l.calls {
		if k != nil {
			l.calls[i] = nil
			k.lost = true
			k.done <- struct{}{}
		}
	}
	l.mu.Unlock()
}

// leave says goodbye and closes the connection, if there is one.
func (l *link) leave() {
	l.mu.Lock()
	c := l.conn
	l.mu.Unlock()
	if c == nil {
		return
	}
	// Whoever is sending is cut off: with half a request before it, nothing may follow.
	if l.sending.TryLock() {
		var b [nbd.ExtendedRequestBytes]byte
		req := nbd.Request{Type: nbd.CmdDisc}
		c.SetWriteDeadline(time.Now().Add(100 * time.Millisecond))
		c.Write(b[:req.Encode(b[:], c.s.extended)])
		l.sending.Unlock()
	}
	c.close()
}

// send sends a call and waits for its answer, or until the connection is lost (c.lost).
// It returns false, with nothing sent, when the link is down.
func (l *link) send(c *call) bool {
	var slot uint16
	select {
	case slot = <-l.slots:
	default:
		// Connections that are lost give their slots back, so this ends.
		slot = <-l.slots
	}
	defer func() { l.slots <- slot }()
	l.mu.Lock()
	conn := l.conn
	if conn == nil {
		l.mu.Unlock()
		return false
	}
	l.generation++
	c.req.Cookie = l.generation<<16 | uint64(slot)
	l.calls[slot] = c
	l.mu.Unlock()

	c.late.Reset(l.d.cfg.RequestTimeout)
	head := c.head[:c.req.Encode(c.head[:], conn.s.extended)]
	l.sending.Lock()
	conn.SetWriteDeadline(time.Now().Add(l.d.cfg.RequestTimeout))
	var err error
	if len(c.payload) == 0 {
		_, err = conn.Write(head)
	} else {
		c.vec = [2][]byte{head, c.payload}
		c.bufs = c.vec[:]
		_, err = c.bufs.WriteTo(conn.Conn) // the net.Conn itself knows writev
	}
	l.sending.Unlock()
	if err != nil {
		conn.close() // the reader finds out
	}
	select {
	case <-c.done:
	case <-c.late.C:
		conn.close()
		<-c.done
	}
	c.late.Stop()
	c.vec = [2][]byte{}
	return true
}

// take returns the call an answer is for, which stays registered.
func (l *link) take(cookie uint64) (*call, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	slot := int(cookie & 0xffff)
	if slot < len(l.calls) {
		if c := l.calls[slot]; c != nil && c.req.Cookie == cookie {
			return c, nil
		}
	}
	return nil, fmt.Errorf("an answer to a request that was not made (cookie %#x)", cookie)
}

// finish gives a call back to its caller.
func (l *link) finish(c *call) {
	l.mu.Lock()
	l.calls[c.req.Cookie&0xffff] = nil
	l.mu.Unlock()
	c.done <- struct{}{}
}

// receive reads answers until the connection fails or makes no sense.
func (l *link) receive(c *connection) error {
	var b [nbd.ExtendedChunkBytes]byte
	for {
		if _, err := io.ReadFull(c.r, b[:4]); err != nil {
			return err
		}
		if binary.BigEndian.Uint32(b[:]) == nbd.MagicSimpleReply && !c.s.extended {
			if _, err := io.ReadFull(c.r, b[4:nbd.SimpleReplyBytes]); err != nil {
				return err
			}
			k, err := l.take(binary.BigEndian.Uint64(b[8:]))
			if err != nil {
				return err
			}
			errno := nbd.Errno(binary.BigEndian.Uint32(b[4:]))
			if errno == 0 && k.req.Type == nbd.CmdRead {
				if c.s.structured {
					return errors.New("a simple reply to a read where structured ones were agreed on")
				}
				if _, err := io.ReadFull(c.r, k.into); err != nil {
					return err
				}
				k.got = uint64(len(k.into))
			}
			if err := l.answer(k, errno); err != nil {
				return err
			}
			continue
		}
		if !c.s.structured {
			return errors.New("a reply without its magic number")
		}
		if _, err := io.ReadFull(c.r, b[4:nbd.ChunkLen(c.s.extended)]); err != nil {
			return err
		}
		var chunk nbd.Chunk
		if !chunk.Decode(b[:], c.s.extended) {
			return errors.New("a reply without its magic number")
		}
		if err := l.chunk(c, &chunk); err != nil {
			return err
		}
	}
}

// answer ends a call with what the server said.
func (l *link) answer(k *call, errno nbd.Errno) error {
	switch {
	case errno == nbd.ESHUTDOWN:
		// As good as lost: another connection, or the next server, will do it.
		return errors.New("the server is shutting down")
	case errno == nbd.EPERM && l.d.s.readOnly():
		k.err = kind.Errorf(kind.ReadOnly, "the server says: %v", errno)
	case errno != 0:
		k.err = kind.Errorf(errno.Kind(), "the server says: %v", errno)
	case k.err == nil && k.got != uint64(len(k.into)):
		return fmt.Errorf("%d bytes in answer to a read of %d", k.got, len(k.into))
	}
	l.finish(k)
	return nil
}

// chunk takes one chunk of an answer.
func (l *link) chunk(c *connection, chunk *nbd.Chunk) error {
	k, err := l.take(chunk.Cookie)
	if err != nil {
		return err
	}
	b := c.b[:]
	var errno nbd.Errno
	length := chunk.Length
	bad := func() error { return fmt.Errorf("a chunk of type %d with %d bytes", chunk.Type, length) }
	switch {
	case chunk.Type == nbd.ReplyNone:
		if length != 0 || chunk.Flags&nbd.ReplyFlagDone == 0 {
			return bad()
		}
	case chunk.Type == nbd.ReplyOffsetData || chunk.Type == nbd.ReplyOffsetHole:
		head := uint64(8)
		if chunk.Type == nbd.ReplyOffsetHole {
			head = 12
		}
		if k.req.Type != nbd.CmdRead || length < head {
			return bad()
		}
		if _, err := io.ReadFull(c.r, b[:head]); err != nil {
			return err
		}
		n := length - head
		if head == 12 {
			n = uint64(binary.BigEndian.Uint32(b[8:]))
		}
		off := binary.BigEndian.Uint64(b[:])
		if off < k.req.Offset || off > k.req.Offset+k.req.Length || n > k.req.Offset+k.req.Length-off || head == 12 && length != 12 {
			return bad()
		}
		p := k.into[off-k.req.Offset:][:n]
		if head == 12 {
			clear(p)
		} else if _, err := io.ReadFull(c.r, p); err != nil {
			return err
		}
		k.got += n
	case chunk.Type == nbd.ReplyBlockStatus || chunk.Type == nbd.ReplyBlockStatusExt:
		if err := l.status(c, k, chunk); err != nil {
			return err
		}
	case chunk.Type&nbd.ReplyErrorBit != 0:
		if length < 6 || length > maxErrorBytes {
			return bad()
		}
		if _, err := io.ReadFull(c.r, b[:6]); err != nil {
			return err
		}
		if _, err := c.r.Discard(int(length - 6)); err != nil {
			return err
		}
		if errno = nbd.Errno(binary.BigEndian.Uint32(b[:])); errno == 0 {
			errno = nbd.EINVAL
		}
		if chunk.Flags&nbd.ReplyFlagDone == 0 {
			// More chunks follow; the first error is the answer.
			if k.err == nil && errno != nbd.ESHUTDOWN {
				k.err = kind.Errorf(errno.Kind(), "the server says: %v", errno)
			}
			if errno == nbd.ESHUTDOWN {
				return errors.New("the server is shutting down")
			}
		}
	default:
		return bad()
	}
	if chunk.Flags&nbd.ReplyFlagDone == 0 {
		return nil
	}
	return l.answer(k, errno)
}

// status takes the first extent of a block status chunk and drops the rest.
func (l *link) status(c *connection, k *call, chunk *nbd.Chunk) error {
	head, each := uint64(4), uint64(8)
	if chunk.Type == nbd.ReplyBlockStatusExt {
		head, each = 8, 16
	}
	if k.req.Type != nbd.CmdBlockStatus || chunk.Length < head+each || chunk.Length > maxErrorBytes || (chunk.Length-head)%each != 0 {
		return fmt.Errorf("a block status chunk with %d bytes", chunk.Length)
	}
	b := c.b[:]
	if _, err := io.ReadFull(c.r, b[:head+each]); err != nil {
		return err
	}
	if _, err := c.r.Discard(int(chunk.Length - head - each)); err != nil {
		return err
	}
	if binary.BigEndian.Uint32(b[:]) != c.s.contextID {
		return nil
	}
	if each == 16 {
		*k.extent = extent{binary.BigEndian.Uint64(b[8:]), binary.BigEndian.Uint64(b[16:])}
	} else {
		*k.extent = extent{uint64(binary.BigEndian.Uint32(b[4:])), uint64(binary.BigEndian.Uint32(b[8:]))}
	}
	return nil
}
