package nvmf

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/thaw-project/thaw/nvme"
	"github.com/thaw-project/thaw/sockio"
)

// Each command on a device may hold an operating system thread, of which Go gives a
// process 10,000.
const (
	maxWorkers   = 64   // commands of one connection that run at a time
	namespaceOps = 64   // commands on one device: one that hangs takes no more than these
	deviceOps    = 4096 // commands on all devices of a target
)

// maxPending is how much may wait to be sent before the reader reads no further.
const maxPending = 1 << 20

// conn is one connection: one queue of a controller.
type conn struct {
	t    *Target
	ln   *listener
	nc   net.Conn       // what PDUs go through
	raw  net.Conn       // what was accepted: closing it ends both
	in   *sockio.Reader // of nc
	work work

	// Only the reader uses these.
	rbuf    []byte  // small, or big.b while commands with data come fast
	r, w    int     // what is received and not yet parsed lies in rbuf[r:w]
	small   []byte  // ReceiveBytes, for as long as the connection lives
	big     *buffer // nil unless rbuf is in it
	sips    bool    // see sip
	batch   *buffer
	uses    map[uint32]*use
	lastUse *use
	inCap   int // bytes of data that a capsule may carry

	// Set by the handshake, then fixed.
	digests nvme.Digests
	r2ts    int // R2Ts per command
	align   int // of data, in bytes
	dataOff int // of data in C2HData
	sub     *subsystem
	ctrl    *controller // nil until Connect
	qid     uint16
	depth   int // entries
	noFlow  bool

	sqhd      atomic.Uint32
	closed    atomic.Bool
	connected atomic.Bool
	born      int64        // on the target's clock, as are the next three, which are 0 when nothing waits
	partial   atomic.Int64 // the reader is in the middle of a PDU since then
	writing   atomic.Int64 // a write hangs since then
	awaiting  atomic.Int64 // data of an R2T was last seen then

	wmu      sync.Mutex
	drained  sync.Cond    // bytes shrank
	bytes    atomic.Int64 // in pending and sending
	pending  []*buffer    // guarded by wmu, as are all below
	flushing bool
	tail     *buffer // the last of pending, if responses fit into it
	werr     error
	ended    bool      // no goroutine may be started
	sending  []*buffer // used by who flushes
	iov      net.Buffers
	iovs     [][]byte

	wg       sync.WaitGroup // workers and flushers
	done     chan struct{}  // tells the writer of the pool's answers; nil without a pool
	mu       sync.Mutex
	freed    sync.Cond  // read budget came back
	slots    []*request // guarded by mu, as are all below
	free     []*request
	queue    []*request // ready to run, beyond maxWorkers
	waiting  []*request // writes without memory
	workers  int
	readMem  int // bytes left for reads and data in capsules
	writeMem int // bytes left for data behind R2Ts
	r2tCount int // outstanding
}

func newConn(t *Target, l *listener, nc net.Conn) *conn {
	small := make([]byte, ReceiveBytes)
	c := &conn{t: t, ln: l, nc: nc, raw: nc, rbuf: small, small: small, uses: map[uint32]*use{}, born: t.now.Load(), inCap: AdminCapsule,
		readMem: t.o.MemoryPerConn / 2, writeMem: t.o.MemoryPerConn / 2, align: 4}
	c.drained.L, c.freed.L = &c.wmu, &c.mu
	if t.pool != nil {
		c.done = make(chan struct{}, 1)
	}
	return c
}

var errClosed = errors.New("connection closed")

// close ends the connection from any goroutine; its reader cleans up.
func (c *conn) close(why string) {
	if !c.closed.Swap(true) {
		c.t.o.Log.Debug("connection closes", "peer", c.raw.RemoteAddr(), "why", why)
		c.raw.Close()
		c.wmu.Lock()
		c.drained.Broadcast()
		c.wmu.Unlock()
		c.mu.Lock()
		c.freed.Broadcast()
		c.mu.Unlock()
	}
}

// check drops a connection that exceeded a timeout, and a controller whose host is
// silent. now is the target's clock.
func (c *conn) check(now int64) {
	since := func(v *atomic.Int64, limit time.Duration) bool {
		s := v.Load()
		return s != 0 && now-s > int64(limit)
	}
	switch {
	case !c.connected.Load():
		if now-c.born > int64(c.t.o.Handshake) {
			c.close("no Connect in time")
		}
		return
	case since(&c.partial, c.t.o.PDUTimeout):
		c.close("PDU not complete in time")
	case since(&c.awaiting, c.t.o.PDUTimeout):
		c.close("data of an R2T not in time")
	case since(&c.writing, c.t.o.WriteTimeout):
		c.close("peer does not read")
	}
	if c.qid == 0 {
		c.ctrl.check(now)
	}
}

// clock is the coarse time, never 0.
func (c *conn) clock() int64 { return max(c.t.now.Load(), 1) }

func (c *conn) run() {
	var writer sync.WaitGroup
	if c.done != nil {
		writer.Go(c.write)
	}
	err := c.serve()
	var p *nvme.PDUError
	if errors.As(err, &p) && !c.closed.Load() {
		c.terminate(p)
	}
	level := c.t.o.Log.Info
	if errors.Is(err, io.EOF) || errors.Is(err, net.ErrClosed) || c.closed.Load() {
		level = c.t.o.Log.Debug
	}
	level("connection ended", "peer", c.raw.RemoteAddr(), "queue", c.qid, "err", err)
	c.close("reader ended")
	c.cleanup(&writer)
}

// write sends what the pool's workers answered, all that there is at a time.
func (c *conn) write() {
	for range c.done {
		c.flush()
	}
}

// cleanup runs when the reader has ended: it waits for commands that still use
// devices and gives everything back.
func (c *conn) cleanup(writer *sync.WaitGroup) {
	c.mu.Lock()
	c.queue, c.waiting = nil, nil
	c.mu.Unlock()
	c.wmu.Lock()
	c.ended = true
	c.wmu.Unlock()
	c.wg.Wait()
	if c.done != nil {
		close(c.done)
		writer.Wait()
	}
	c.mu.Lock()
	for _, r := range c.slots {
		c.t.pools.put(r.buf)
		r.buf = nil
	}
	c.mu.Unlock()
	for _, b := range c.pending {
		c.t.pools.put(b)
	}
	c.pending = nil
	c.t.pools.put(c.batch)
	c.t.pools.put(c.big)
	c.batch, c.big = nil, nil
	for _, u := range c.uses {
		u.ns.unregister(u)
	}
	if c.ctrl != nil {
		if c.qid == 0 {
			// Losing the admin queue ends the association.
			c.ctrl.drop("admin queue lost")
		} else {
			c.ctrl.mu.Lock()
			if c.ctrl.queues[c.qid] == c {
				delete(c.ctrl.queues, c.qid)
				c.ctrl.gone.add(&c.work)
			}
			if len(c.ctrl.queues) == 0 && c.ctrl.cc&nvme.CCEnable == 0 {
				c.ctrl.csts &^= nvme.CSTSReady // the end of a reset
			}
			c.ctrl.mu.Unlock()
		}
		c.ctrl.leave()
	}
}

// terminate sends a C2HTermReq and waits a moment for the host to close (TCP 3.5).
func (c *conn) terminate(p *nvme.PDUError) {
	c.t.o.Log.Warn("connection terminated", "peer", c.raw.RemoteAddr(), "queue", c.qid, "err", p)
	c.flushBatch()
	b := c.t.pools.get(nvme.MaxTermLen)
	b.n = (&nvme.Term{Type: nvme.TypeC2HTermReq, Status: p.Status, Info: p.Info}).Put(b.b, c.rbuf[c.r:min(c.w, c.r+nvme.MaxHeaderLen)])
	c.enqueue(b)
	c.flush()
	c.wmu.Lock()
	for c.bytes.Load() > 0 && !c.closed.Load() && c.werr == nil {
		c.drained.Wait() // a worker sends
	}
	c.wmu.Unlock()
	if t, ok := c.nc.(*net.TCPConn); ok {
		// Bytes that nobody reads would make closing a reset, and the reset could
		// overtake the C2HTermReq.
		_ = t.CloseWrite()
		_ = t.SetReadDeadline(time.Now().Add(time.Second))
		_, _ = io.CopyN(io.Discard, t, 1<<20)
	}
}

func (c *conn) serve() error {
	if c.ln.upgrade != nil {
		ctx, cancel := context.WithTimeout(context.Background(), c.t.o.Handshake)
		nc, err := c.ln.upgrade(ctx, c.nc)
		cancel()
		if err != nil {
			return err
		}
		c.nc = nc
	}
	c.in = sockio.NewReader(c.nc)
	c.in.Park = c.park
	if err := c.handshake(); err != nil {
		return err
	}
	for {
		if err := c.pdu(); err != nil {
			return err
		}
	}
}

// handshake exchanges ICReq and ICResp (TCP 3.6.2.2 and 3.6.2.3).
func (c *conn) handshake() error {
	if err := c.fill(nvme.CommonLen); err != nil {
		return err
	}
	if h := nvme.ParseCommon(c.rbuf); h.Type == nvme.TypeICReq && h.HLEN == nvme.ICLen && h.PLEN == nvme.ICLen {
		if err := c.fill(nvme.ICLen); err != nil {
			return err
		}
	}
	var req nvme.ICReq
	b := c.rbuf[:c.w]
	if nvme.ParseCommon(b).Type != nvme.TypeICReq {
		return &nvme.PDUError{Status: nvme.FatalSequence, What: "the first PDU is no ICReq"}
	}
	if err := req.Parse(b); err != nil {
		return err
	}
	c.r = nvme.ICLen
	if !c.t.o.NoDigests {
		c.digests = req.Digests
	}
	c.r2ts = int(min(req.MaxR2T, maxR2T-1)) + 1
	c.align = (int(req.HPDA) + 1) * 4
	c.dataOff = nvme.DataLen
	if c.digests.Header {
		c.dataOff += nvme.DigestLen
	}
	c.dataOff = (c.dataOff + c.align - 1) / c.align * c.align
	out := c.space(nvme.ICLen)
	(&nvme.ICResp{Digests: c.digests, MaxH2CData: uint32(c.t.o.MaxH2CData)}).Put(out)
	c.batch.n += nvme.ICLen
	return nil
}

const (
	// largeData is from what length on data is worth receiving straight to where the
	// device takes it from, and sip what is received of the PDU that may follow, to
	// learn its length, once data like that was seen: a full buffer would hold data
	// again, to be copied.
	largeData = 32 << 10
	sip       = 4 << 10
)

// fill reads until need bytes are buffered. What is to be sent is sent before it
// waits.
func (c *conn) fill(need int) error {
	for c.w-c.r < need {
		switch {
		case c.r == c.w:
			c.r, c.w = 0, 0
		case len(c.rbuf)-c.r < need || c.w == len(c.rbuf):
			c.w = copy(c.rbuf, c.rbuf[c.r:c.w])
			c.r = 0
		}
		end := len(c.rbuf)
		if c.sips {
			end = min(end, max(c.w+sip, c.r+need))
		}
		var n int
		var err error
		if c.batch != nil && c.batch.n > 0 {
			// Answers leave when there is nothing to receive, so that many leave at
			// once.
			if n, err = c.in.TryRead(c.rbuf[c.w:end]); n == 0 && err == nil {
				c.flushBatch()
				continue
			}
		} else {
			if c.w > c.r {
				c.partial.Store(c.clock())
			}
			n, err = c.in.Read(c.rbuf[c.w:end])
			c.partial.Store(0)
		}
		if err != nil {
			if err == io.EOF && c.w > c.r {
				return io.ErrUnexpectedEOF
			}
			return err
		}
		c.w += n
		if c.w == len(c.rbuf) && c.big == nil && c.qid != 0 {
			c.grow()
		}
	}
	return nil
}

// grow takes a larger receive buffer: the peer sends more than fits the small one, so
// more can be had with one call.
func (c *conn) grow() {
	c.big = c.t.pools.batch()
	c.w = copy(c.big.b, c.rbuf[c.r:c.w])
	c.r, c.rbuf = 0, c.big.b
}

// park gives the large receive buffer back before the reader sleeps in a Read into p,
// if it is empty.
func (c *conn) park(p []byte) []byte {
	if c.big == nil || c.w > 0 || &p[0] != &c.rbuf[0] {
		return p
	}
	c.t.pools.put(c.big)
	c.big, c.rbuf = nil, c.small
	return c.small
}

// take copies the next len(p) bytes to p, from the buffer and then from the socket.
func (c *conn) take(p []byte) error {
	c.sips = len(p) >= largeData
	n := copy(p, c.rbuf[c.r:c.w])
	c.r += n
	if n == len(p) {
		return nil
	}
	c.flushBatch()
	c.partial.Store(c.clock())
	_, err := io.ReadFull(c.in, p[n:])
	c.partial.Store(0)
	return err
}

// skip drops the next n bytes.
func (c *conn) skip(n int) error {
	for n > 0 {
		if c.r == c.w {
			if err := c.fill(1); err != nil {
				return err
			}
		}
		m := min(n, c.w-c.r)
		c.r += m
		n -= m
	}
	return nil
}

// pdu receives and handles one PDU.
func (c *conn) pdu() error {
	if c.closed.Load() {
		return errClosed // with commands received and not begun
	}
	if c.w-c.r < nvme.CommonLen {
		if err := c.fill(nvme.CommonLen); err != nil {
			return err
		}
	}
	h := nvme.ParseCommon(c.rbuf[c.r:])
	limit := c.inCap
	if h.Type == nvme.TypeH2CData {
		limit = c.t.o.MaxH2CData
	}
	l, err := h.Layout(c.digests, limit)
	if err != nil {
		return err
	}
	if err := c.fill(l.Header); err != nil {
		return err
	}
	b := c.rbuf[c.r : c.r+l.Header]
	if c.digests.Header && l.Header > int(h.HLEN) {
		if err := nvme.CheckHeaderDigest(b, int(h.HLEN)); err != nil {
			return err
		}
	}
	switch h.Type {
	case nvme.TypeCapsuleCmd:
		var cmd nvme.Command
		cmd.Parse(b[nvme.CommonLen:])
		c.r += l.Header
		return c.capsule(&cmd, l)
	case nvme.TypeH2CData:
		return c.h2cData(&h, b, l)
	case nvme.TypeH2CTermReq:
		var t nvme.Term
		if err := t.Parse(b); err != nil {
			return err
		}
		c.t.o.Log.Warn("host terminates the connection", "peer", c.raw.RemoteAddr(), "queue", c.qid, "status", t.Status, "info", t.Info)
		return errClosed
	}
	return &nvme.PDUError{Status: nvme.FatalSequence, What: "a PDU that a host does not send now"}
}

// capsule handles a command. The header is consumed, padding and data are not.
func (c *conn) capsule(cmd *nvme.Command, l nvme.Layout) error {
	if err := c.skip(l.Data - l.Header); err != nil {
		return err
	}
	c.throttle()
	if c.ctrl == nil {
		return c.connect(cmd, l)
	}
	if n := c.sqhd.Load() + 1; n >= uint32(c.depth) {
		c.sqhd.Store(0)
	} else {
		c.sqhd.Store(n)
	}
	if !c.ctrl.seen.Load() {
		c.ctrl.seen.Store(true)
	}
	if cmd.Flags&nvme.FlagFuse != 0 || cmd.Flags&nvme.FlagPSDT != nvme.FlagSGL {
		return c.refuse(cmd, l, nvme.InvalidField|nvme.DNR)
	}
	if cmd.Opcode == nvme.OpFabrics {
		return c.fabrics(cmd, l)
	}
	if c.qid == 0 {
		return c.adminCommand(cmd, l)
	}
	return c.ioCommand(cmd, l)
}

// refuse drops a command's data and answers with a status.
func (c *conn) refuse(cmd *nvme.Command, l nvme.Layout, s nvme.Status) error {
	if err := c.skip(l.Length + l.Digest); err != nil {
		return err
	}
	c.fail(cmd, s)
	return nil
}

// fail answers from the reader with an error status and logs it for the host.
func (c *conn) fail(cmd *nvme.Command, s nvme.Status) {
	c.logError(cmd, s)
	c.reply(cmd.CID, 0, s)
}

func (c *conn) logError(cmd *nvme.Command, s nvme.Status) {
	if c.ctrl == nil {
		return
	}
	e := nvme.ErrorEntry{SQID: c.qid, CID: cmd.CID, Status: s, Where: 0xffff, Opcode: cmd.Opcode}
	if cmd.Opcode != nvme.OpFabrics {
		e.NSID = cmd.NSID
		if c.qid != 0 {
			e.LBA = cmd.SLBA()
		}
	}
	c.ctrl.logError(e)
}

func (c *conn) completion(cid uint16, result uint64, s nvme.Status) nvme.Completion {
	cqe := nvme.Completion{Result: result, SQID: c.qid, CID: cid, Status: s}
	if !c.noFlow {
		cqe.SQHD = uint16(c.sqhd.Load())
	}
	return cqe
}

// work counts what a queue did. Each has its own, so that queues share nothing.
type work struct {
	reads, writes, readBytes, writtenBytes atomic.Uint64
}

// total is the sum of some work.
type total struct {
	reads, writes, readBytes, writtenBytes uint64
}

func (t *total) add(w *work) {
	t.reads += w.reads.Load()
	t.writes += w.writes.Load()
	t.readBytes += w.readBytes.Load()
	t.writtenBytes += w.writtenBytes.Load()
}

const respMax = nvme.CapsuleRespLen + nvme.DigestLen

// reply answers a command from the reader; it leaves with the batch.
func (c *conn) reply(cid uint16, result uint64, s nvme.Status) {
	b := c.space(respMax)
	cqe := c.completion(cid, result, s)
	c.batch.n += nvme.PutCapsuleResp(b, &cqe, c.digests)
}

// space returns room for n bytes in the batch, whose n the caller then advances.
func (c *conn) space(n int) []byte {
	if c.batch != nil && len(c.batch.b)-c.batch.n < n {
		c.flushBatch()
	}
	if c.batch == nil {
		c.batch = c.t.pools.batch()
	}
	return c.batch.b[c.batch.n:]
}

// flushBatch sends what the reader answered. It waits when too much is pending.
func (c *conn) flushBatch() {
	b := c.batch
	if b == nil || b.n == 0 {
		return
	}
	c.batch = nil
	c.enqueue(b)
	c.flush()
	c.throttle()
}

// throttle holds the reader while the peer takes too little of its answers.
func (c *conn) throttle() {
	if c.bytes.Load() <= maxPending {
		return
	}
	c.wmu.Lock()
	for c.bytes.Load() > maxPending && !c.closed.Load() && c.werr == nil {
		c.drained.Wait()
	}
	c.wmu.Unlock()
}

// respond answers a command from any goroutine; kick or flush sends it.
func (c *conn) respond(cid uint16, result uint64, s nvme.Status) {
	cqe := c.completion(cid, result, s)
	c.wmu.Lock()
	b := c.room()
	n := nvme.PutCapsuleResp(b.b[b.n:], &cqe, c.digests)
	b.n += n
	c.bytes.Add(int64(n))
	c.wmu.Unlock()
}

// room returns the last pending buffer if a response or R2T fits, else a new one. It
// is called with wmu held.
func (c *conn) room() *buffer {
	if c.tail == nil || len(c.tail.b)-c.tail.n < respMax {
		c.tail = c.t.pools.get(smallBytes)
		c.pending = append(c.pending, c.tail)
	}
	return c.tail
}

// enqueue passes a buffer to whoever sends.
func (c *conn) enqueue(b *buffer) {
	c.wmu.Lock()
	c.pending = append(c.pending, b)
	c.tail = nil
	c.bytes.Add(int64(b.n))
	c.wmu.Unlock()
}

// flush sends what is pending, unless somebody does already.
func (c *conn) flush() {
	c.wmu.Lock()
	if c.flushing || len(c.pending) == 0 {
		c.wmu.Unlock()
		return
	}
	c.flushing = true
	c.flushLocked()
}

// kick is flush on a goroutine of its own, for callers that must not wait for the
// peer.
func (c *conn) kick() {
	c.wmu.Lock()
	defer c.wmu.Unlock()
	if c.flushing || c.ended || len(c.pending) == 0 {
		return
	}
	c.flushing = true
	c.wg.Add(1)
	go func() {
		defer c.wg.Done()
		c.wmu.Lock()
		c.flushLocked()
	}()
}

// flushLocked is called with wmu held and flushing set, and releases both.
func (c *conn) flushLocked() {
	for len(c.pending) > 0 {
		c.pending, c.sending = c.sending[:0], c.pending
		c.tail = nil
		failed := c.werr != nil
		c.wmu.Unlock()
		var err error
		sent := 0
		for _, b := range c.sending {
			sent += b.n
		}
		if !failed {
			c.writing.Store(c.clock())
			if len(c.sending) == 1 {
				_, err = c.nc.Write(c.sending[0].b[:c.sending[0].n])
			} else {
				c.iovs = c.iovs[:0]
				for _, b := range c.sending {
					c.iovs = append(c.iovs, b.b[:b.n])
				}
				c.iov = c.iovs
				_, err = c.iov.WriteTo(c.nc)
			}
			c.writing.Store(0)
		}
		for i, b := range c.sending {
			c.t.pools.put(b)
			c.sending[i] = nil
		}
		if err != nil {
			c.close("write failed: " + err.Error())
		}
		c.wmu.Lock()
		if err != nil {
			c.werr = err
		}
		c.bytes.Add(-int64(sent))
		c.drained.Broadcast()
	}
	c.flushing = false
	c.wmu.Unlock()
}
