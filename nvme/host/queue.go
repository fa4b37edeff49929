package host

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/nvme"
	"github.com/thaw-project/thaw/sockio"
)

const (
	// receiveBytes is the receive buffer of a queue. Data of reads does not stay
	// in it: it goes to the caller's memory.
	receiveBytes = 64 << 10

	// maxOut is how much a queue holds back to send in one write before those
	// that want to send more must wait.
	maxOut = 512 << 10

	// maxR2T is how many R2Ts per command the host allows.
	maxR2T = 4
)

// errPath marks errors that say nothing of the command: another path, or the same one
// later, may carry it out.
var errPath = errors.New("path failed")

// errUnsent marks those of commands that the target cannot have heard of.
var errUnsent = errors.New("not sent")

type direction uint8

const (
	none direction = iota
	toHost
	toTarget
)

// slot is one command in flight. Its index is the command identifier.
type slot struct {
	cid    uint16
	events chan event // room for all that can come of one command
	active atomic.Bool
	start  atomic.Int64 // on the queue's clock, 0 when idle

	// Set by the submitter before active, then the reader's until the last event.
	dir      direction
	data     []byte
	received int
	asked    uint32 // end of what R2Ts asked for
	status   nvme.Status
}

// event is an R2T, or the end of the command.
type event struct {
	r2t  bool
	data nvme.Data
	cqe  nvme.Completion
	err  error
}

// queue is one connection to a controller.
type queue struct {
	nc      net.Conn
	qid     uint16
	digests nvme.Digests
	align   int // of data in capsules and H2CData, in bytes
	maxData int // MAXH2CDATA
	inCap   int // bytes of data that go in the capsule
	now     *atomic.Int64
	onEvent func(result uint32) // of an Asynchronous Event Request, whose identifier is len(slots)

	slots []slot
	free  chan *slot
	dead  chan struct{}
	once  sync.Once
	done  chan struct{} // closed when the reader has ended
	err   error         // valid once dead is closed

	busy atomic.Int32 // commands in flight

	wmu      sync.Mutex
	space    sync.Cond
	out      []byte // guarded by wmu, as are all below
	spare    []byte
	flushing bool
}

// dialQueue opens a connection and exchanges ICReq and ICResp.
func dialQueue(ctx context.Context, c *Config, addr string, qid uint16, depth int, now *atomic.Int64) (*queue, error) {
	nc, err := c.Dial(ctx, addr)
	if err != nil {
		return nil, fmt.Errorf("connect queue %d to %s: %w", qid, addr, err)
	}
	q := &queue{nc: nc, qid: qid, now: now, slots: make([]slot, depth), free: make(chan *slot, depth), dead: make(chan struct{}), done: make(chan struct{})}
	q.space.L = &q.wmu
	for i := range q.slots {
		q.slots[i].cid = uint16(i)
		q.slots[i].events = make(chan event, maxR2T+1)
		q.free <- &q.slots[i]
	}
	stop := context.AfterFunc(ctx, func() { nc.Close() })
	defer stop()
	var b [nvme.ICLen]byte
	want := nvme.Digests{Header: c.HeaderDigest, Data: c.DataDigest}
	(&nvme.ICReq{Digests: want, MaxR2T: uint32(c.MaxR2T - 1)}).Put(b[:])
	var resp nvme.ICResp
	if _, err = nc.Write(b[:]); err == nil {
		if _, err = io.ReadFull(nc, b[:]); err == nil {
			err = resp.Parse(b[:])
		}
	}
	if err == nil && resp.Digests != want {
		err = kind.Errorf(kind.Unsupported, "target agreed to digests %+v, not to %+v", resp.Digests, want)
	}
	if err != nil {
		nc.Close()
		return nil, fmt.Errorf("initialize queue %d to %s: %w", qid, addr, err)
	}
	q.digests, q.align, q.maxData = resp.Digests, (int(resp.CPDA)+1)*4, int(min(resp.MaxH2CData, 1<<20))
	q.inCap = 8192 // until the controller says what its I/O queues take
	go q.read()
	return q, nil
}

// fail ends the queue. All its commands end with an error of errPath, told by the
// reader, which alone writes to their memory.
func (q *queue) fail(err error) {
	q.once.Do(func() {
		q.err = err
		close(q.dead)
		q.nc.Close()
		q.wmu.Lock()
		q.space.Broadcast()
		q.wmu.Unlock()
	})
}

// close ends the queue and waits for its reader.
func (q *queue) close() {
	q.fail(net.ErrClosed)
	<-q.done
}

func (q *queue) pathError() error {
	return fmt.Errorf("%w: %w", errPath, q.err)
}

// check fails the queue when a command takes longer than limit.
func (q *queue) check(now int64, limit time.Duration) {
	for i := range q.slots {
		if s := q.slots[i].start.Load(); s != 0 && now-s > int64(limit) {
			q.fail(kind.Errorf(kind.Unavailable, "command %d of queue %d is not answered after %v", i, q.qid, limit))
			return
		}
	}
}

// do runs one command and returns its completion. data is what it reads or writes;
// nobody touches it once do has returned. An error of errPath means that nothing is
// known of the command.
func (q *queue) do(cmd *nvme.Command, dir direction, data []byte) (nvme.Completion, error) {
	var s *slot
	select {
	case s = <-q.free:
	case <-q.dead:
		return nvme.Completion{}, fmt.Errorf("%w: %w", errUnsent, q.pathError())
	}
	s.dir, s.data, s.received, s.status, s.asked = dir, data, 0, nvme.Success, 0
	inCapsule := 0
	if dir == toTarget && len(data) <= q.inCap {
		inCapsule = len(data)
		s.asked = uint32(inCapsule) // there will be no R2T
	}
	s.start.Store(max(q.now.Load(), 1))
	s.active.Store(true)
	select {
	case <-q.dead:
		// The reader may have looked at the slot before it was active.
		if s.active.CompareAndSwap(true, false) {
			s.data = nil
			return nvme.Completion{}, fmt.Errorf("%w: %w", errUnsent, q.pathError())
		}
	default:
	}
	cmd.CID, cmd.Flags = s.cid, nvme.FlagSGL
	if dir != none {
		cmd.SGL = nvme.SGL{Length: uint32(len(data)), ID: nvme.SGLTransport}
		if inCapsule > 0 {
			cmd.SGL.ID = nvme.SGLInCapsule
		}
	}
	q.busy.Add(1)
	defer q.busy.Add(-1)
	q.wmu.Lock()
	q.waitSpace()
	b := q.grow(nvme.MaxHeaderLen + 128)
	n := nvme.PutCapsuleCmd(b, cmd, inCapsule, q.digests, q.align)
	q.out = q.out[:len(q.out)+n]
	if inCapsule > 0 {
		q.appendData(data)
	}
	q.flush()
	for {
		e := <-s.events
		if e.r2t {
			q.sendData(&e.data, data)
			continue
		}
		s.start.Store(0)
		s.data = nil
		if e.err == nil {
			q.free <- s
		}
		return e.cqe, e.err
	}
}

// waitSpace waits until out is short enough. It is called with wmu held.
func (q *queue) waitSpace() {
	for len(q.out) > maxOut && q.flushing {
		q.space.Wait()
	}
}

// grow returns room for n bytes behind out. It is called with wmu held.
func (q *queue) grow(n int) []byte {
	l := len(q.out)
	if cap(q.out)-l < n {
		bigger := make([]byte, l, max(2*cap(q.out), l+n, 4096))
		copy(bigger, q.out)
		q.out = bigger
	}
	return q.out[l : l+n]
}

// appendData adds data and its digest to out. It is called with wmu held.
func (q *queue) appendData(data []byte) {
	q.out = append(q.out, data...)
	if q.digests.Data {
		b := q.grow(nvme.DigestLen)
		nvme.PutDigest(b, nvme.CRC32C(data))
		q.out = q.out[:len(q.out)+nvme.DigestLen]
	}
}

// sendData answers an R2T. The submitter runs it, not the reader: a reader that waits
// for the target to take data would not take what the target sends.
func (q *queue) sendData(r *nvme.Data, data []byte) {
	part := data[r.Offset : r.Offset+r.Length]
	for len(part) > 0 {
		n := min(len(part), q.maxData)
		d := nvme.Data{CID: r.CID, TTAG: r.TTAG, Offset: r.Offset, Length: uint32(n)}
		var flags uint8
		if n == len(part) {
			flags = nvme.FlagLast
		}
		q.wmu.Lock()
		q.waitSpace()
		b := q.grow(nvme.MaxHeaderLen + 128)
		q.out = q.out[:len(q.out)+nvme.PutData(b, nvme.TypeH2CData, flags, &d, q.digests, q.align)]
		q.appendData(part[:n])
		q.flush()
		r.Offset += uint32(n)
		part = part[n:]
	}
}

// flush sends out, unless somebody does already. It is called with wmu held and
// releases it.
func (q *queue) flush() {
	if q.flushing {
		q.wmu.Unlock()
		return
	}
	q.flushing = true
	if q.busy.Load() > 1 {
		// Answers come many at a time and wake as many callers, whose next commands
		// then go in one write instead of one each.
		q.wmu.Unlock()
		runtime.Gosched()
		q.wmu.Lock()
	}
	for len(q.out) > 0 {
		b := q.out
		q.out = q.spare[:0]
		q.spare = nil
		q.space.Broadcast()
		q.wmu.Unlock()
		_, err := q.nc.Write(b)
		if err != nil {
			q.fail(fmt.Errorf("send: %w", err))
		}
		q.wmu.Lock()
		q.spare = b
	}
	q.flushing = false
	q.space.Broadcast()
	q.wmu.Unlock()
}

// await sends an Asynchronous Event Request.
func (q *queue) await() {
	cmd := nvme.Command{Opcode: nvme.AdminAsyncEvent, Flags: nvme.FlagSGL, CID: uint16(len(q.slots))}
	q.wmu.Lock()
	b := q.grow(nvme.MaxHeaderLen)
	q.out = q.out[:len(q.out)+nvme.PutCapsuleCmd(b, &cmd, 0, q.digests, q.align)]
	q.flush()
}

// read is the queue's reader. When it ends it ends all commands.
func (q *queue) read() {
	defer close(q.done)
	r := &reader{src: sockio.NewReader(q.nc), buf: make([]byte, receiveBytes)}
	for {
		if err := q.pdu(r); err != nil {
			q.fail(err)
			break
		}
	}
	for i := range q.slots {
		if s := &q.slots[i]; s.active.CompareAndSwap(true, false) {
			s.events <- event{err: q.pathError()}
		}
	}
}

func (q *queue) pdu(r *reader) error {
	b, err := r.peek(nvme.CommonLen)
	if err != nil {
		return err
	}
	h := nvme.ParseCommon(b)
	l, err := h.Layout(q.digests, 1<<24)
	if err == nil {
		b, err = r.peek(l.Header)
	}
	if err == nil && q.digests.Header && l.Header > int(h.HLEN) {
		err = nvme.CheckHeaderDigest(b, int(h.HLEN))
	}
	if err == nil {
		err = q.handle(r, &h, b, l)
	}
	if err != nil {
		q.terminate(err, b)
	}
	return err
}

// terminate tells the target what was wrong with its PDU, if that is what err says
// (TCP 3.5). It waits for nobody: if others are sending the connection just closes.
func (q *queue) terminate(err error, bad []byte) {
	var p *nvme.PDUError
	if !errors.As(err, &p) {
		return
	}
	var b [nvme.MaxTermLen]byte
	n := (&nvme.Term{Type: nvme.TypeH2CTermReq, Status: p.Status, Info: p.Info}).Put(b[:], bad)
	q.wmu.Lock()
	defer q.wmu.Unlock()
	if !q.flushing && len(q.out) == 0 {
		_ = q.nc.SetWriteDeadline(time.Now().Add(time.Second))
		_, _ = q.nc.Write(b[:n])
	}
}

const (
	// largeData is from what length on data is worth receiving straight into the
	// caller's memory, and sip what is received of the PDU that may follow, to learn
	// its length, once data like that was seen: a full buffer would hold data
	// again, to be copied.
	largeData = 32 << 10
	sip       = 4 << 10
)

// reader is a buffer in front of a connection.
type reader struct {
	src  io.Reader
	buf  []byte
	r, w int // what is there and not yet taken is buf[r:w]
	sips bool
}

// peek returns the next n bytes, at most sip of them, which stay.
func (r *reader) peek(n int) ([]byte, error) {
	for r.w-r.r < n {
		if r.r == r.w {
			r.r, r.w = 0, 0
		} else if len(r.buf)-r.r < n {
			r.w = copy(r.buf, r.buf[r.r:r.w])
			r.r = 0
		}
		end := len(r.buf)
		if r.sips {
			end = min(end, max(r.w+sip, r.r+n))
		}
		m, err := r.src.Read(r.buf[r.w:end])
		if err != nil {
			return r.buf[r.r:r.w], err
		}
		r.w += m
	}
	return r.buf[r.r : r.r+n], nil
}

// discard drops bytes that were peeked at.
func (r *reader) discard(n int) { r.r += n }

// full fills p.
func (r *reader) full(p []byte) error {
	r.sips = len(p) >= largeData
	n := copy(p, r.buf[r.r:r.w])
	r.r += n
	_, err := io.ReadFull(r.src, p[n:])
	return err
}

// lookup finds the command of an identifier.
func (q *queue) lookup(cid uint16, dir direction) (*slot, error) {
	if int(cid) >= len(q.slots) || !q.slots[cid].active.Load() || dir != none && q.slots[cid].dir != dir {
		return nil, &nvme.PDUError{Status: nvme.FatalInvalidHeader, Info: 8, What: "no command in flight has this identifier"}
	}
	return &q.slots[cid], nil
}

// end completes a command.
func (q *queue) end(s *slot, cqe nvme.Completion) error {
	if s.status != nvme.Success {
		cqe.Status = s.status // a digest did not match
	}
	if cqe.Status.OK() && s.dir == toHost && s.received != len(s.data) {
		return &nvme.PDUError{Status: nvme.FatalOutOfRange, Info: 12, What: fmt.Sprintf("a read of %d bytes ends after %d", len(s.data), s.received)}
	}
	if cqe.Status.OK() && s.dir == toTarget && int64(s.asked) != int64(len(s.data)) {
		return &nvme.PDUError{Status: nvme.FatalOutOfRange, Info: 12, What: fmt.Sprintf("a write of %d bytes ends after %d were asked for", len(s.data), s.asked)}
	}
	s.active.Store(false)
	s.events <- event{cqe: cqe}
	return nil
}

// handle takes one PDU off r, whose header b still lies there.
func (q *queue) handle(r *reader, h *nvme.Common, b []byte, l nvme.Layout) error {
	switch h.Type {
	case nvme.TypeCapsuleResp:
		var cqe nvme.Completion
		cqe.Parse(b[nvme.CommonLen:])
		r.discard(l.Header)
		if int(cqe.CID) == len(q.slots) && q.onEvent != nil {
			if cqe.Status.OK() {
				q.onEvent(uint32(cqe.Result))
			}
			return nil
		}
		s, err := q.lookup(cqe.CID, none)
		if err != nil {
			return err
		}
		return q.end(s, cqe)
	case nvme.TypeC2HData:
		var d nvme.Data
		if err := d.Parse(b, l.Length); err != nil {
			return err
		}
		s, err := q.lookup(d.CID, toHost)
		if err != nil {
			return err
		}
		if int64(d.Offset) != int64(s.received) || l.Length > len(s.data)-s.received {
			return &nvme.PDUError{Status: nvme.FatalOutOfRange, Info: 12, What: "data does not follow what came before, or is more than was asked for"}
		}
		if h.Flags&nvme.FlagSuccess != 0 && h.Flags&nvme.FlagLast == 0 {
			return &nvme.PDUError{Status: nvme.FatalInvalidHeader, Info: 1, What: "success before the last PDU"}
		}
		if _, err := r.peek(l.Data); err != nil {
			return err
		}
		r.discard(l.Data)
		p := s.data[s.received : s.received+l.Length]
		if err := r.full(p); err != nil {
			return err
		}
		s.received += l.Length
		if l.Digest > 0 {
			g, err := r.peek(nvme.DigestLen)
			if err != nil {
				return err
			}
			if nvme.GetDigest(g) != nvme.CRC32C(p) {
				s.status = nvme.TransientTransport
			}
			r.discard(nvme.DigestLen)
		}
		if h.Flags&nvme.FlagSuccess != 0 {
			return q.end(s, nvme.Completion{CID: d.CID})
		}
		return nil
	case nvme.TypeR2T:
		var d nvme.Data
		if err := d.ParseR2T(b); err != nil {
			return err
		}
		s, err := q.lookup(d.CID, toTarget)
		if err != nil {
			return err
		}
		if d.Offset != s.asked || int64(d.Offset)+int64(d.Length) > int64(len(s.data)) {
			return &nvme.PDUError{Status: nvme.FatalOutOfRange, Info: 12, What: "an R2T for data that does not follow or does not exist"}
		}
		s.asked += d.Length
		r.discard(l.Header)
		// One place is kept for the end of the command. Only the reader sends here.
		if len(s.events) >= maxR2T {
			return &nvme.PDUError{Status: nvme.FatalLimitExceeded, What: "more R2Ts than agreed"}
		}
		s.events <- event{r2t: true, data: d}
		return nil
	case nvme.TypeC2HTermReq:
		var t nvme.Term
		if err := t.Parse(b); err != nil {
			return err
		}
		return kind.Errorf(kind.Unavailable, "target terminates the connection: %v (information %#x)", t.Status, t.Info)
	}
	return &nvme.PDUError{Status: nvme.FatalSequence, What: "a PDU that a target does not send now"}
}
