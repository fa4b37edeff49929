// Package client is an NBD client as a bdev.Device: a disk that another process or machine
// serves. It uses several connections where the server allows, and reconnects:
// requests that got no answer are sent again, so that a server that is restarted costs time and no
// errors.
//
// All requests are idempotent, so repeating one is safe as long as the first copy cannot
// arrive later. A server that still works on requests of a connection it believes to be
// alive, after a network that lost it, may break that: use RequestTimeout longer than
// the server needs to notice. Flush promises what the server promises: writes that it answered
// and lost by crashing are not sent again.
package client

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/nbd"
	"github.com/thaw-project/thaw/target/bdev"
)

// Config says what to connect to. Zero values mean the defaults given.
type Config struct {
	// Network and Address are those of net.Dial: "unix" or "tcp".
	Network, Address string
	// Dial, if set, is used instead, for TLS and tests.
	Dial func(context.Context) (net.Conn, error)
	// Export is the name; "" is the server's default.
	Export string
	// ReadOnly refuses changes though the server would take them.
	ReadOnly bool
	// Connections is how many to use if the server promises that a flush covers
	// them all: 4. Else one is used.
	Connections int
	// MaxInflight bounds the requests on one connection: 64. More callers wait.
	MaxInflight int
	// ConnectTimeout bounds one attempt to connect and negotiate: 10 s.
	ConnectTimeout time.Duration
	// RequestTimeout is what the server has to answer a request: 30 s. Then its
	// connection counts as dead.
	RequestTimeout time.Duration
	// LossTimeout is how long a request is tried, over all connections and
	// attempts, before it fails with kind.Unavailable: 5 min.
	LossTimeout time.Duration
	// BackoffMin and BackoffMax bound the pause before the next attempt to
	// connect, which doubles each time: 50 ms, 5 s.
	BackoffMin, BackoffMax time.Duration
	// Log gets a line when a connection is lost, and is back. Nil discards.
	Log *slog.Logger
}

// Device is a disk behind NBD. It is a bdev.Device, and also tells where it has data
// (Extent).
type Device struct {
	cfg   Config
	log   *slog.Logger
	s     session // of the first connection; later ones must agree
	links []*link
	next  atomic.Uint32
	calls sync.Pool

	// edges lets writes through that are no whole blocks of the server, which read and
	// write what is around them: alone. Others share it.
	edges sync.RWMutex

	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu      sync.Mutex
	changed chan struct{} // closed when a link comes up; guarded by mu
}

var _ bdev.Device = (*Device)(nil)

// Open connects; it fails if the first attempt does. Close ends it.
func Open(ctx context.Context, cfg Config) (*Device, error) {
	cfg.Connections = cmp.Or(cfg.Connections, 4)
	cfg.MaxInflight = min(cmp.Or(cfg.MaxInflight, 64), maxSlots)
	cfg.ConnectTimeout = cmp.Or(cfg.ConnectTimeout, 10*time.Second)
	cfg.RequestTimeout = cmp.Or(cfg.RequestTimeout, 30*time.Second)
	cfg.LossTimeout = cmp.Or(cfg.LossTimeout, 5*time.Minute)
	cfg.BackoffMin = cmp.Or(cfg.BackoffMin, 50*time.Millisecond)
	cfg.BackoffMax = max(cmp.Or(cfg.BackoffMax, 5*time.Second), cfg.BackoffMin)
	if cfg.Dial == nil {
		cfg.Dial = func(ctx context.Context) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, cfg.Network, cfg.Address)
		}
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	d := &Device{cfg: cfg, log: cfg.Log.With("nbd", cfg.Address, "export", cfg.Export), changed: make(chan struct{})}
	d.calls.New = func() any { return newCall() }
	d.ctx, d.cancel = context.WithCancel(context.Background())
	first := newLink(d)
	conn, s, err := first.connect(ctx)
	if err != nil {
		d.cancel()
		return nil, fmt.Errorf("open NBD export %q of %s: %w", cfg.Export, cfg.Address, err)
	}
	if s.size%512 != 0 {
		conn.close()
		d.cancel()
		return nil, kind.Errorf(kind.Unsupported, "open NBD export %q of %s: its %d bytes are no multiple of 512", cfg.Export, cfg.Address, s.size)
	}
	d.s = s
	n := 1
	if s.flags&nbd.FlagCanMultiConn != 0 {
		n = cfg.Connections
	}
	d.links = append(d.links, first)
	for len(d.links) < n {
		d.links = append(d.links, newLink(d))
	}
	first.up(conn)
	for i, l := range d.links {
		if i > 0 {
			conn = nil
		}
		d.wg.Add(1)
		go func(c *connection) {
			defer d.wg.Done()
			l.run(c)
		}(conn)
	}
	return d, nil
}

// SizeBytes is the size of the export.
func (d *Device) SizeBytes() int64 { return d.s.size }

// ReadOnly tells whether the server or the configuration refuses changes.
func (d *Device) ReadOnly() bool { return d.cfg.ReadOnly || d.s.readOnly() }

// Close disconnects. Requests under way fail with kind.Unavailable.
func (d *Device) Close() error {
	d.cancel()
	for _, l := range d.links {
		l.leave()
	}
	d.wg.Wait()
	return nil
}

// fail adds what was done to an error.
func (d *Device) fail(what string, off, n int64, err error) error {
	return fmt.Errorf("%s %d bytes at %d of NBD export %q: %w", what, n, off, d.cfg.Export, err)
}

// ReadAt reads as io.ReaderAt does.
func (d *Device) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, kind.Errorf(kind.Invalid, "read NBD export %q at %d", d.cfg.Export, off)
	}
	if len(p) == 0 {
		return 0, nil
	}
	if off >= d.s.size {
		return 0, io.EOF
	}
	var eof error
	if int64(len(p)) > d.s.size-off {
		p, eof = p[:d.s.size-off], io.EOF
	}
	if err := d.read(p, off); err != nil {
		return 0, d.fail("read", off, int64(len(p)), err)
	}
	return len(p), eof
}

// aligned tells whether a range is whole blocks of the server.
func (d *Device) aligned(off, n int64) bool { return (off|n)&(d.s.minBlock-1) == 0 }

// widen returns the whole blocks around a range.
func (d *Device) widen(off, n int64) (int64, int64) {
	mask := d.s.minBlock - 1
	start, end := off&^mask, (off+n+mask)&^mask
	return start, end - start
}

func (d *Device) read(p []byte, off int64) error {
	if !d.aligned(off, int64(len(p))) {
		start, n := d.widen(off, int64(len(p)))
		whole := make([]byte, n)
		if err := d.read(whole, start); err != nil {
			return err
		}
		copy(p, whole[off-start:])
		return nil
	}
	for len(p) > 0 {
		n := min(int64(len(p)), d.s.maxRequest)
		c := d.call(nbd.CmdRead, off, n)
		c.into = p[:n]
		if err := d.do(c); err != nil {
			return err
		}
		p, off = p[n:], off+n
	}
	return nil
}

// change checks what all changes have in common.
func (d *Device) change(what string, off, n int64) error {
	switch {
	case d.ReadOnly():
		return kind.Errorf(kind.ReadOnly, "%s NBD export %q, which is read-only", what, d.cfg.Export)
	case off < 0 || n < 0 || off > d.s.size || n > d.s.size-off:
		return kind.Errorf(kind.Invalid, "%s %d bytes at %d of NBD export %q, which has %d", what, n, off, d.cfg.Export, d.s.size)
	}
	return nil
}

// WriteAt writes as io.WriterAt does.
func (d *Device) WriteAt(p []byte, off int64) (int, error) {
	if err := d.change("write", off, int64(len(p))); err != nil {
		return 0, err
	}
	if err := d.write(p, off); err != nil {
		return 0, d.fail("write", off, int64(len(p)), err)
	}
	return len(p), nil
}

func (d *Device) write(p []byte, off int64) error {
	if len(p) == 0 {
		return nil
	}
	if d.aligned(off, int64(len(p))) {
		d.edges.RLock()
		defer d.edges.RUnlock()
		return d.writeBlocks(p, off)
	}
	d.edges.Lock()
	defer d.edges.Unlock()
	start, n := d.widen(off, int64(len(p)))
	whole := make([]byte, n)
	block := d.s.minBlock
	if err := d.read(whole[:block], start); err != nil {
		return err
	}
	if n > block {
		if err := d.read(whole[n-block:], start+n-block); err != nil {
			return err
		}
	}
	copy(whole[off-start:], p)
	return d.writeBlocks(whole, start)
}

func (d *Device) writeBlocks(p []byte, off int64) error {
	for len(p) > 0 {
		n := min(int64(len(p)), d.s.maxRequest)
		c := d.call(nbd.CmdWrite, off, n)
		c.payload = p[:n]
		if d.s.extended {
			c.req.Flags |= nbd.CmdFlagPayloadLen
		}
		if err := d.do(c); err != nil {
			return err
		}
		p, off = p[n:], off+n
	}
	return nil
}

// Flush makes what was written before survive a power loss of the server, as far as it
// can.
func (d *Device) Flush() error {
	if d.ReadOnly() || d.s.flags&nbd.FlagSendFlush == 0 {
		return nil
	}
	if err := d.do(d.call(nbd.CmdFlush, 0, 0)); err != nil {
		return fmt.Errorf("flush NBD export %q: %w", d.cfg.Export, err)
	}
	return nil
}

// maxZeroBytes is the most one request zeroes: a long one must be answered within
// RequestTimeout.
const maxZeroBytes = 256 << 20

// zeroes is written to servers that cannot write zeroes themselves.
var zeroes [64 << 10]byte

// WriteZeroes makes the range read as zeros; the server may free it.
func (d *Device) WriteZeroes(off, n int64) error {
	if err := d.change("write zeroes to", off, n); err != nil {
		return err
	}
	if err := d.zero(off, n); err != nil {
		return d.fail("write zeroes to", off, n, err)
	}
	return nil
}

// Discard is WriteZeroes: NBD's own trim promises nothing of what is read afterwards,
// and write zeroes lets the server free what it can as well.
func (d *Device) Discard(off, n int64) error { return d.WriteZeroes(off, n) }

func (d *Device) zero(off, n int64) error {
	canZero := d.s.flags&nbd.FlagSendWriteZeroes != 0
	for n > 0 {
		block := d.s.minBlock
		m := min(n, int64(len(zeroes)))
		switch {
		case off&(block-1) != 0: // up to the next block
			m = min(n, block-off&(block-1))
		case n < block || !canZero:
		default:
			m = min(n&^(block-1), maxZeroBytes)
			d.edges.RLock()
			err := d.do(d.call(nbd.CmdWriteZeroes, off, m))
			d.edges.RUnlock()
			switch {
			case err == nil:
				off, n = off+m, n-m
				continue
			case kind.Of(err) != kind.Unsupported:
				return err
			}
			canZero = false
			continue
		}
		if err := d.write(zeroes[:m], off); err != nil {
			return err
		}
		off, n = off+m, n-m
	}
	return nil
}

// Extent describes the bytes at off: the n bytes from there, 0 < n <= length, are alike.
// hole: nothing is allocated for them; zero: they read as zeros. A server that does not
// tell has data everywhere.
func (d *Device) Extent(off, length int64) (n int64, hole, zero bool, err error) {
	if off < 0 || length <= 0 || off > d.s.size || length > d.s.size-off {
		return 0, false, false, kind.Errorf(kind.Invalid, "extent of %d bytes at %d of NBD export %q, which has %d", length, off, d.cfg.Export, d.s.size)
	}
	if !d.s.allocation {
		return length, false, false, nil
	}
	start, wide := d.widen(off, length)
	wide = min(wide, maxStatusBytes&^(d.s.minBlock-1))
	c := d.call(nbd.CmdBlockStatus, start, wide)
	c.req.Flags |= nbd.CmdFlagReqOne
	var e extent
	c.extent = &e
	if err := d.do(c); err != nil {
		return 0, false, false, d.fail("block status of", off, length, err)
	}
	n = min(int64(min(e.length, uint64(wide))), off-start+length) - (off - start)
	if n <= 0 {
		return 0, false, false, kind.Errorf(kind.IO, "block status of NBD export %q at %d covers nothing", d.cfg.Export, off)
	}
	return n, e.flags&nbd.StateHole != 0, e.flags&nbd.StateZero != 0, nil
}

// maxStatusBytes is the longest range asked about with 32-bit lengths.
const maxStatusBytes = 1 << 31

// do sends a request until it is answered, over whatever connection there is, and
// frees it.
func (d *Device) do(c *call) error {
	start := time.Now()
	var deadline <-chan time.Time
	for {
		l, changed := d.pick()
		if l != nil && l.send(c) {
			if !c.lost {
				break
			}
			c.reset()
		} else if l == nil {
			if deadline == nil {
				t := time.NewTimer(d.cfg.LossTimeout - time.Since(start))
				defer t.Stop()
				deadline = t.C
			}
			select {
			case <-changed:
			case <-d.ctx.Done():
			case <-deadline:
			}
		}
		if d.ctx.Err() != nil {
			d.free(c)
			return kind.Errorf(kind.Unavailable, "the device is closed")
		}
		if time.Since(start) >= d.cfg.LossTimeout {
			d.free(c)
			return kind.Errorf(kind.Unavailable, "no answer for %v", d.cfg.LossTimeout)
		}
	}
	err := c.err
	d.free(c)
	return err
}

// pick returns a link that is up, each in turn, or what is closed when one comes up.
func (d *Device) pick() (*link, <-chan struct{}) {
	n := uint32(len(d.links))
	first := d.next.Add(1)
	for i := range n {
		if l := d.links[(first+i)%n]; l.isUp.Load() {
			return l, nil
		}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, l := range d.links {
		if l.isUp.Load() {
			return l, nil
		}
	}
	return nil, d.changed
}

// announce wakes those who wait for a link.
func (d *Device) announce() {
	d.mu.Lock()
	close(d.changed)
	d.changed = make(chan struct{})
	d.mu.Unlock()
}
