package nbd

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/nbd"
	"github.com/thaw-project/thaw/target/engine"
)

// raw is a client that sends what a test wants.
type raw struct {
	t testing.TB
	net.Conn
}

// dialRaw connects and reads the greeting.
func dialRaw(t testing.TB, socket string) *raw {
	t.Helper()
	c, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(10 * time.Second))
	r := &raw{t, c}
	if got := r.read(18); string(got) != "NBDMAGICIHAVEOPT\x00\x03" {
		t.Fatalf("greeting %q", got)
	}
	r.write([]byte{0, 0, 0, 3})
	return r
}

func (r *raw) read(n int) []byte {
	r.t.Helper()
	b := make([]byte, n)
	if _, err := io.ReadFull(r, b); err != nil {
		r.t.Fatalf("read: %v", err)
	}
	return b
}

func (r *raw) write(b []byte) {
	r.t.Helper()
	if _, err := r.Write(b); err != nil {
		r.t.Fatalf("write: %v", err)
	}
}

// gone waits until the server has closed the connection.
func (r *raw) gone() {
	r.t.Helper()
	if _, err := io.Copy(io.Discard, r); errors.Is(err, os.ErrDeadlineExceeded) {
		r.t.Fatal("the server keeps the connection")
	}
}

// option sends an option and returns the type of the last reply, and all before.
func (r *raw) option(option uint32, data []byte) (uint32, [][]byte) {
	r.t.Helper()
	r.write(nbd.AppendOption(nil, option, data))
	var all [][]byte
	for {
		h := r.read(nbd.OptReplyHeaderBytes)
		if binary.BigEndian.Uint64(h) != nbd.MagicOptionReply || binary.BigEndian.Uint32(h[8:]) != option {
			r.t.Fatalf("reply % x", h)
		}
		d := r.read(int(binary.BigEndian.Uint32(h[16:])))
		if reply := binary.BigEndian.Uint32(h[12:]); reply == nbd.RepAck || reply&nbd.RepErrBit != 0 {
			return reply, all
		}
		all = append(all, d)
	}
}

// goTo enters transmission, with options agreed on before.
func (r *raw) goTo(name string, options ...uint32) *raw {
	r.t.Helper()
	for _, o := range options {
		var data []byte
		if o == nbd.OptSetMetaContext {
			data = nbd.AppendString(binary.BigEndian.AppendUint32(nbd.AppendString(nil, name), 1), nbd.MetaContextAllocation)
		}
		if rep, _ := r.option(o, data); rep != nbd.RepAck {
			r.t.Fatalf("option %d: %#x", o, rep)
		}
	}
	if rep, _ := r.option(nbd.OptGo, append(nbd.AppendString(nil, name), 0, 1, 0, nbd.InfoBlockSize)); rep != nbd.RepAck {
		r.t.Fatalf("GO: %#x", rep)
	}
	return r
}

func request(req nbd.Request, extended bool) []byte {
	b := make([]byte, nbd.ExtendedRequestBytes)
	return b[:req.Encode(b, extended)]
}

// simple sends a request and returns the error of its simple reply.
func (r *raw) simple(req nbd.Request, payload ...byte) nbd.Errno {
	r.t.Helper()
	req.Cookie = 0x1122334455667788
	r.write(append(request(req, false), payload...))
	h := r.read(nbd.SimpleReplyBytes)
	if binary.BigEndian.Uint32(h) != nbd.MagicSimpleReply || binary.BigEndian.Uint64(h[8:]) != req.Cookie {
		r.t.Fatalf("reply % x", h)
	}
	return nbd.Errno(binary.BigEndian.Uint32(h[4:]))
}

func TestOptions(t *testing.T) {
	s, socket := start(t, Config{}, Export{Name: "a", Device: newMemory(1 << 20)}, Export{Name: "b", Device: newMemory(1 << 20), MinBlock: 4096})
	r := dialRaw(t, socket)
	name := func(n string) []byte { return nbd.AppendString(nil, n) }
	context := func(n string, queries ...string) []byte {
		b := binary.BigEndian.AppendUint32(name(n), uint32(len(queries)))
		for _, q := range queries {
			b = nbd.AppendString(b, q)
		}
		return b
	}
	for i, c := range []struct {
		option uint32
		data   []byte
		want   uint32
		before int
	}{
		{nbd.OptList, nil, nbd.RepAck, 2},
		{nbd.OptList, []byte("x"), nbd.RepErrInvalid, 0},
		{99, []byte("whatever"), nbd.RepErrUnsup, 0},
		{99, make([]byte, maxOptionBytes+1), nbd.RepErrTooBig, 0},
		{nbd.OptStartTLS, nil, nbd.RepErrUnsup, 0},
		{nbd.OptSetMetaContext, context("a", "base:allocation"), nbd.RepErrInvalid, 0}, // before structured replies
		{nbd.OptStructuredReply, []byte("x"), nbd.RepErrInvalid, 0},
		{nbd.OptStructuredReply, nil, nbd.RepAck, 0},
		{nbd.OptListMetaContext, context("a"), nbd.RepAck, 1},
		{nbd.OptListMetaContext, context("a", "base:"), nbd.RepAck, 1},
		{nbd.OptListMetaContext, context("a", "qemu:"), nbd.RepAck, 0},
		{nbd.OptSetMetaContext, context("a", "base:"), nbd.RepAck, 0},
		{nbd.OptSetMetaContext, context("a", "qemu:x", "base:allocation"), nbd.RepAck, 1},
		{nbd.OptSetMetaContext, context("c", "base:allocation"), nbd.RepErrUnknown, 0},
		{nbd.OptSetMetaContext, context("a", "base:allocation")[:20], nbd.RepErrInvalid, 0},
		{nbd.OptSetMetaContext, append(name("a"), 255, 255, 255, 255), nbd.RepErrInvalid, 0},
		{nbd.OptInfo, append(name("a"), 0, 0), nbd.RepAck, 1},
		{nbd.OptInfo, append(name("a"), 0, 3, 0, 1, 0, 3, 0, 2), nbd.RepAck, 3},
		{nbd.OptInfo, append(name("a"), 0, 9), nbd.RepErrInvalid, 0},
		{nbd.OptInfo, append(name("c"), 0, 0), nbd.RepErrUnknown, 0},
		{nbd.OptInfo, append(name(""), 0, 0), nbd.RepErrUnknown, 0}, // two exports: none is the default
		{nbd.OptInfo, []byte{255, 255, 255, 255}, nbd.RepErrInvalid, 0},
		{nbd.OptGo, append(name("b"), 0, 0), nbd.RepErrBlockSizeReqd, 0},
		{nbd.OptExtendedHeaders, nil, nbd.RepAck, 0},
		{nbd.OptExtendedHeaders, nil, nbd.RepErrInvalid, 0},
		{nbd.OptStructuredReply, nil, nbd.RepErrExtHeaderReqd, 0},
		{nbd.OptAbort, nil, nbd.RepAck, 0},
	} {
		if got, before := r.option(c.option, c.data); got != c.want || len(before) != c.before {
			t.Errorf("%d: option %d: %#x after %d, want %#x after %d", i, c.option, got, len(before), c.want, c.before)
		}
	}
	r.gone()
	// EXPORT_NAME has no errors; it disconnects.
	r = dialRaw(t, socket)
	r.write(nbd.AppendOption(nil, nbd.OptExportName, []byte("a")))
	if b := r.read(10); binary.BigEndian.Uint64(b) != 1<<20 || binary.BigEndian.Uint16(b[8:])&nbd.FlagSendFlush == 0 {
		t.Errorf("EXPORT_NAME: % x", b)
	}
	if e := r.simple(nbd.Request{Type: nbd.CmdFlush}); e != 0 {
		t.Error(e)
	}
	r.write(request(nbd.Request{Type: nbd.CmdDisc}, false))
	r.gone()
	for _, n := range []string{"c", "b"} {
		r = dialRaw(t, socket)
		r.write(nbd.AppendOption(nil, nbd.OptExportName, []byte(n)))
		r.gone()
	}
	if st, err := os.Stat(socket); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("socket: %v, %v", st.Mode(), err)
	}
	for _, c := range []struct {
		e    Export
		want kind.Kind
	}{
		{Export{Name: "a", Device: newMemory(512)}, kind.Exists},
		{Export{Name: string(make([]byte, 5000)), Device: newMemory(512)}, kind.Invalid},
		{Export{Name: "x", Device: newMemory(512), MinBlock: 3}, kind.Invalid},
		{Export{Name: "x", Device: newMemory(512), MinBlock: 4096}, kind.Invalid},
	} {
		if err := s.AddExport(c.e); kind.Of(err) != c.want {
			t.Errorf("AddExport: %v, want %v", err, c.want)
		}
	}
}

func TestRequestErrors(t *testing.T) {
	m, ro := newMemory(1<<20), newMemory(1<<20)
	_, socket := start(t, Config{MaxRequestBytes: 1 << 20}, Export{Name: "a", Device: m, MinBlock: 512}, Export{Name: "ro", Device: ro, ReadOnly: true})
	r := dialRaw(t, socket).goTo("a")
	for i, c := range []struct {
		req  nbd.Request
		want nbd.Errno
	}{
		{nbd.Request{Type: nbd.CmdRead, Offset: 1 << 20, Length: 512}, nbd.EINVAL},
		{nbd.Request{Type: nbd.CmdRead, Offset: 1<<64 - 512, Length: 1024}, nbd.EINVAL},
		{nbd.Request{Type: nbd.CmdRead, Length: 0}, nbd.EINVAL},
		{nbd.Request{Type: nbd.CmdRead, Length: 100}, nbd.EINVAL},
		{nbd.Request{Type: nbd.CmdRead, Offset: 100, Length: 512}, nbd.EINVAL},
		{nbd.Request{Type: nbd.CmdRead, Flags: nbd.CmdFlagDF, Length: 512}, nbd.EINVAL}, // no structured replies
		{nbd.Request{Type: nbd.CmdWrite, Offset: 1<<20 - 512, Length: 1024}, nbd.ENOSPC},
		{nbd.Request{Type: nbd.CmdWriteZeroes, Offset: 1<<20 - 512, Length: 1024}, nbd.ENOSPC},
		{nbd.Request{Type: nbd.CmdWriteZeroes, Flags: nbd.CmdFlagFastZero, Length: 1024}, nbd.ENOTSUP},
		{nbd.Request{Type: nbd.CmdWriteZeroes, Flags: nbd.CmdFlagNoHole | nbd.CmdFlagFUA, Length: 1 << 20}, 0},
		{nbd.Request{Type: nbd.CmdTrim, Offset: 1 << 20, Length: 1024}, nbd.EINVAL},
		{nbd.Request{Type: nbd.CmdTrim, Offset: 4096, Length: 4096}, 0},
		{nbd.Request{Type: nbd.CmdCache, Length: 1 << 20}, 0},
		{nbd.Request{Type: nbd.CmdBlockStatus, Length: 512}, nbd.EINVAL},
		{nbd.Request{Type: 77, Length: 512}, nbd.EINVAL},
		{nbd.Request{Type: nbd.CmdFlush, Flags: 1 << 9}, nbd.EINVAL},
		{nbd.Request{Type: nbd.CmdFlush}, 0},
	} {
		var payload []byte
		if c.req.Type == nbd.CmdWrite {
			payload = make([]byte, c.req.Length)
		}
		if got := r.simple(c.req, payload...); got != c.want {
			t.Errorf("%d: %+v: %v, want %v", i, c.req, got, c.want)
		}
	}
	if m.mu.RLock(); !m.data[100] || m.data[1] {
		t.Error("NO_HOLE left a hole, or trim did not")
	}
	m.mu.RUnlock()
	for e, want := range map[error]nbd.Errno{
		kind.Errorf(kind.NoSpace, "full"): nbd.ENOSPC, kind.Errorf(kind.Corrupt, "bad"): nbd.EIO,
		kind.Errorf(kind.Unsupported, "no"): nbd.ENOTSUP, errors.New("?"): nbd.EIO,
	} {
		m.fail.Store(&e)
		if got := r.simple(nbd.Request{Type: nbd.CmdWrite, Length: 512}, make([]byte, 512)...); got != want {
			t.Errorf("%v becomes %v, want %v", e, got, want)
		}
		if got := r.simple(nbd.Request{Type: nbd.CmdRead, Length: 512}); got != want {
			t.Errorf("%v becomes %v, want %v", e, got, want)
		}
	}
	m.fail.Store(nil)
	w := dialRaw(t, socket).goTo("ro")
	for _, c := range []uint16{nbd.CmdWrite, nbd.CmdTrim, nbd.CmdWriteZeroes} {
		var payload []byte
		if c == nbd.CmdWrite {
			payload = make([]byte, 512)
		}
		if got := w.simple(nbd.Request{Type: c, Length: 512}, payload...); got != nbd.EPERM {
			t.Errorf("command %d on a read-only export: %v", c, got)
		}
	}
	// What cannot be answered ends the connection.
	r.write(request(nbd.Request{Type: nbd.CmdWrite, Length: 1<<20 + 1}, false))
	r.gone()
	w.write(make([]byte, nbd.RequestBytes))
	w.gone()
}

// TestModes reads the same in every reply style, inline, by goroutines, in pieces and
// without memory to spare, many requests at once.
func TestModes(t *testing.T) {
	const size = 6 << 20
	for _, mode := range []string{"inline", "slow", "poor", "pool"} {
		for style, options := range [][]uint32{nil, {nbd.OptStructuredReply}, {nbd.OptExtendedHeaders}} {
			t.Run(fmt.Sprintf("%s %d", mode, style), func(t *testing.T) {
				m := newMemory(size)
				fill(t, m)
				want := m.content()
				cfg := Config{MaxInflight: 8}
				if mode == "poor" {
					cfg.MaxBufferBytes = 1
				}
				if mode == "pool" {
					cfg.Engine = engine.ThreadPool
				}
				if mode == "slow" {
					m.delay.Store(int64(200 * time.Microsecond))
				}
				_, socket := start(t, cfg, Export{Name: "d", Device: sparse{m}})
				r := dialRaw(t, socket).goTo("d", options...)
				extended := style == 2
				lengths := []int{512, 4096, 60 << 10, 64 << 10, 128 << 10, 1 << 20, 5 << 20}
				var wg sync.WaitGroup
				wg.Add(1)
				var reqs []nbd.Request
				for i := range 60 {
					n := lengths[i%len(lengths)]
					reqs = append(reqs, nbd.Request{Type: nbd.CmdRead, Cookie: uint64(i), Offset: uint64(i * 7919 * 512 % (size - n)), Length: uint64(n)})
				}
				go func() {
					defer wg.Done()
					for _, q := range reqs {
						r.Write(request(q, extended))
					}
				}()
				got := make([][]byte, len(reqs))
				for done := 0; done < len(reqs); {
					if style == 0 {
						h := r.read(nbd.SimpleReplyBytes)
						i := binary.BigEndian.Uint64(h[8:])
						if binary.BigEndian.Uint32(h[4:]) != 0 {
							t.Fatalf("% x", h)
						}
						got[i] = r.read(int(reqs[i].Length))
						done++
						continue
					}
					var c nbd.Chunk
					if !c.Decode(r.read(nbd.ChunkLen(extended)), extended) {
						t.Fatal("no magic")
					}
					q := reqs[c.Cookie]
					if extended && c.Offset != q.Offset {
						t.Errorf("offset %d in the reply, %d in the request", c.Offset, q.Offset)
					}
					if got[c.Cookie] == nil {
						got[c.Cookie] = bytes.Repeat([]byte{0xaa}, int(q.Length))
					}
					b := r.read(int(c.Length))
					at := binary.BigEndian.Uint64(b) - q.Offset
					switch c.Type {
					case nbd.ReplyOffsetData:
						copy(got[c.Cookie][at:], b[8:])
					case nbd.ReplyOffsetHole:
						clear(got[c.Cookie][at : at+uint64(binary.BigEndian.Uint32(b[8:]))])
					default:
						t.Fatalf("chunk %+v", c)
					}
					if c.Flags&nbd.ReplyFlagDone != 0 {
						done++
					}
				}
				wg.Wait()
				for i, q := range reqs {
					if !bytes.Equal(got[i], want[q.Offset:q.Offset+q.Length]) {
						t.Errorf("request %d of %d bytes differs", i, q.Length)
					}
				}
				// Writes of the same lengths, then what is there.
				for i, q := range reqs {
					q.Type = nbd.CmdWrite
					if extended {
						q.Flags = nbd.CmdFlagPayloadLen
					}
					p := bytes.Repeat([]byte{byte(i + 1)}, int(q.Length))
					r.write(append(request(q, extended), p...))
					n := nbd.SimpleReplyBytes
					if extended {
						n = nbd.ExtendedChunkBytes
					}
					if h := r.read(n); !extended && binary.BigEndian.Uint32(h[4:]) != 0 || extended && binary.BigEndian.Uint16(h[6:]) != nbd.ReplyNone {
						t.Fatalf("write %d: % x", i, h)
					}
					if !m.holds(int64(q.Offset), p) {
						t.Fatalf("write %d of %d bytes is not there", i, q.Length)
					}
				}
			})
		}
	}
}

// lonely is a device that more than one request at a time may not use.
type lonely struct {
	*memory
	t      *testing.T
	inside atomic.Int32
}

func (l *lonely) visit() func() {
	if l.inside.Add(1) > 1 {
		l.t.Error("two requests at a time")
	}
	runtime.Gosched() // lets others in, if they may
	return func() { l.inside.Add(-1) }
}

func (l *lonely) ReadAt(p []byte, off int64) (int, error) {
	defer l.visit()()
	return l.memory.ReadAt(p, off)
}

func (l *lonely) WriteAt(p []byte, off int64) (int, error) {
	defer l.visit()()
	return l.memory.WriteAt(p, off)
}

// TestOneOwner has several connections use one writable device: their requests reach
// it one after the other, and all are answered rightly.
func TestOneOwner(t *testing.T) {
	const connections, size = 4, 1 << 20
	m := newMemory(connections * size)
	_, socket := start(t, Config{hand: handNone}, Export{Device: &lonely{memory: m, t: t}})
	var wg sync.WaitGroup
	for c := range connections {
		r := dialRaw(t, socket).goTo("")
		wg.Go(func() {
			for i := range 200 {
				q := nbd.Request{Type: nbd.CmdWrite, Cookie: uint64(i), Offset: uint64(c*size + i*4096), Length: 4096}
				p := bytes.Repeat([]byte{byte(c*64 + i + 1)}, 4096)
				// Two of each, so that there is more than one to serve.
				r.Write(append(append(request(q, false), p...), append(request(q, false), p...)...))
				q.Type = nbd.CmdRead
				r.Write(request(q, false))
				var b [3*nbd.SimpleReplyBytes + 4096]byte
				// Replies come in any order; only the read has data.
				if _, err := io.ReadFull(r, b[:]); err != nil {
					t.Error(err)
					return
				}
				if !m.holds(int64(q.Offset), p) {
					t.Errorf("connection %d: write %d is not there", c, i)
					return
				}
			}
		})
	}
	wg.Wait()
}

// TestHostile shows that peers that stall, flood or talk nonsense cost little and are
// gone in time, while another client is served.
func TestHostile(t *testing.T) {
	m := newMemory(4 << 20)
	s, socket := start(t, Config{HandshakeTimeout: 200 * time.Millisecond, StallTimeout: 200 * time.Millisecond, MaxConnections: 20, MaxBufferBytes: 8 << 20},
		Export{Name: "d", Device: m})
	good := dialRaw(t, socket).goTo("d")
	silent := dialRaw(t, socket) // never chooses
	header := dialRaw(t, socket).goTo("d")
	header.write(request(nbd.Request{Type: nbd.CmdRead, Length: 512}, false)[:11])
	payload := dialRaw(t, socket).goTo("d")
	payload.write(append(request(nbd.Request{Type: nbd.CmdWrite, Length: 1 << 20}, false), make([]byte, 100)...))
	deaf := dialRaw(t, socket).goTo("d") // takes no replies
	for range 64 {
		deaf.write(request(nbd.Request{Type: nbd.CmdRead, Length: 1 << 20}, false))
	}
	options := dialRaw(t, socket)
	go func() {
		for range 2 * maxOptions {
			if _, err := options.Write(nbd.AppendOption(nil, 99, nil)); err != nil {
				return
			}
		}
	}()
	huge := dialRaw(t, socket)
	huge.write(binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint64(nil, nbd.MagicOption), 99), 1<<31))
	rude := dialRaw(t, socket).goTo("d")
	rude.write(bytes.Repeat([]byte("GET / "), 100))
	halfClosed := dialRaw(t, socket).goTo("d") // sends no more, in the middle of a request
	halfClosed.write(request(nbd.Request{Type: nbd.CmdRead, Length: 512}, false)[:11])
	if err := halfClosed.Conn.(*net.UnixConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	for i := range 20 {
		if e := good.simple(nbd.Request{Type: nbd.CmdWrite, Offset: uint64(i * 512), Length: 512}, make([]byte, 512)...); e != 0 {
			t.Fatal(e)
		}
	}
	for _, r := range []*raw{silent, header, payload, options, huge, rude, halfClosed} {
		r.gone()
	}
	// The deaf one gets what was under way, and then nothing more.
	time.Sleep(300 * time.Millisecond)
	if n, err := io.Copy(io.Discard, deaf); n >= 64<<20 || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the deaf peer was served %d bytes, %v", n, err)
	}
	if n := s.Stats().Violations.Load(); n != 8 {
		t.Errorf("%d violations, want 8", n)
	}
	if e := good.simple(nbd.Request{Type: nbd.CmdFlush}); e != 0 {
		t.Fatal(e)
	}
	if n := s.budget.used.Load(); n != 0 {
		t.Errorf("%d bytes of buffers are not given back", n)
	}
	// Beyond MaxConnections peers are turned away, and nobody else is hurt.
	var many []net.Conn
	for range 25 {
		c, err := net.Dial("unix", socket)
		if err != nil {
			t.Fatal(err)
		}
		many = append(many, c)
		defer c.Close()
	}
	if e := good.simple(nbd.Request{Type: nbd.CmdFlush}); e != 0 {
		t.Fatal(e)
	}
	for range 100 {
		if s.Stats().Refused.Load() >= 6 {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	if n := s.Stats().Refused.Load(); n < 6 || n > 7 {
		t.Errorf("%d connections refused of 26 with 20 places", n)
	}
	for _, c := range many {
		c.Close()
	}
}

func TestRemoveExport(t *testing.T) {
	m := newMemory(1 << 20)
	s, socket := start(t, Config{}, Export{Name: "d", Device: m}, Export{Name: "other", Device: newMemory(512)})
	r, other := dialRaw(t, socket).goTo("d"), dialRaw(t, socket).goTo("other")
	idle := dialRaw(t, socket).goTo("d")
	m.delay.Store(int64(100 * time.Millisecond))
	r.write(append(request(nbd.Request{Type: nbd.CmdWrite, Cookie: 5, Length: 512}, false), bytes.Repeat([]byte{9}, 512)...))
	for range 100 { // until the device works on it
		time.Sleep(time.Millisecond)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	if err := s.RemoveExport(ctx, "d"); err != nil {
		t.Fatal(err)
	}
	if m.content()[0] != 9 {
		t.Error("removed before its write was done")
	}
	if b := r.read(nbd.SimpleReplyBytes); binary.BigEndian.Uint32(b[4:]) != 0 {
		t.Errorf("the write under way: % x", b)
	}
	r.gone()
	idle.gone()
	if e := other.simple(nbd.Request{Type: nbd.CmdFlush}); e != 0 {
		t.Error(e)
	}
	if err := s.RemoveExport(ctx, "d"); kind.Of(err) != kind.NotFound {
		t.Errorf("removed twice: %v", err)
	}
	// It can be there again at once, and a device that hangs is told of.
	if err := s.AddExport(Export{Name: "d", Device: m}); err != nil {
		t.Fatal(err)
	}
	m.delay.Store(int64(time.Second))
	r = dialRaw(t, socket).goTo("d")
	r.write(request(nbd.Request{Type: nbd.CmdRead, Length: 512}, false))
	time.Sleep(50 * time.Millisecond)
	short, cancel2 := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel2()
	if err := s.RemoveExport(short, "d"); kind.Of(err) != kind.InUse {
		t.Errorf("removed though the device hangs: %v", err)
	}
	if err := s.RemoveExport(ctx, "d"); err != nil && kind.Of(err) != kind.NotFound {
		t.Errorf("when it no longer hangs: %v", err)
	}
}

func TestListen(t *testing.T) {
	s, socket := start(t, Config{}, Export{Device: newMemory(1 << 20)})
	if err := New(Config{}).ListenUnix(socket); kind.Of(err) != kind.InUse {
		t.Errorf("two servers on one socket: %v", err)
	}
	addr, err := s.ListenTCP("127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	c, err := net.Dial("tcp", addr.String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	r := &raw{t, c}
	r.read(18)
	r.write([]byte{0, 0, 0, 3})
	if e := r.goTo("").simple(nbd.Request{Type: nbd.CmdFlush}); e != 0 {
		t.Error(e)
	}
	// A socket file that a killed process left.
	stale := filepath.Join(t.TempDir(), "x")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: stale, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	if err := s.ListenUnix(stale); err != nil {
		t.Error(err)
	}
}

// TestPlain serves over something that is no socket, as TLS would be.
func TestPlain(t *testing.T) {
	m := newMemory(4 << 20)
	s, _ := start(t, Config{TLS: func(c net.Conn) (net.Conn, error) { return struct{ net.Conn }{c}, nil }, RequireTLS: true}, Export{Device: m})
	a, b := net.Pipe()
	s.Handle(b)
	defer a.Close()
	r := &raw{t, a}
	r.read(18)
	r.write([]byte{0, 0, 0, 3})
	if rep, _ := r.option(nbd.OptList, nil); rep != nbd.RepErrTLSReqd {
		t.Errorf("before TLS: %#x", rep)
	}
	if rep, _ := r.option(nbd.OptStartTLS, nil); rep != nbd.RepAck {
		t.Fatalf("STARTTLS: %#x", rep)
	}
	r.goTo("")
	if e := r.simple(nbd.Request{Type: nbd.CmdWrite, Offset: 3, Length: 5000}, bytes.Repeat([]byte{5}, 5000)...); e != 0 || m.content()[5002] != 5 {
		t.Error(e)
	}
	if e := r.simple(nbd.Request{Type: nbd.CmdRead, Offset: 3, Length: 3 << 20}); e != 0 {
		t.Error(e)
	}
	r.read(3 << 20)
}

// TestIdle has 1,000 idle connections and looks at what they cost.
func TestIdle(t *testing.T) {
	_, socket := start(t, Config{MaxConnections: 1100}, Export{Name: "d", Device: newMemory(1 << 20)})
	before := memoryInUse()
	for range 1000 {
		r := dialRaw(t, socket).goTo("d")
		if e := r.simple(nbd.Request{Type: nbd.CmdFlush}); e != 0 {
			t.Fatal(e)
		}
	}
	var used int64
	for range 10 { // the server takes its time to find them idle
		time.Sleep(2 * idleWait)
		if used = memoryInUse() - before; used <= 64<<20 {
			break
		}
	}
	t.Logf("1,000 idle connections hold %d KiB, client sides included", used>>10)
	if used > 64<<20 {
		t.Errorf("1,000 idle connections hold %d MiB", used>>20)
	}
}

func memoryInUse() int64 {
	runtime.GC()
	runtime.GC() // buffers in pools live through one
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapInuse + m.StackInuse)
}

// TestAllocations wants the path of a read to allocate nothing.
func TestAllocations(t *testing.T) {
	if raced {
		t.Skip("the race detector allocates")
	}
	for name, way := range map[string]hand{"inline": handNone, "by goroutine": handAll} {
		m := newMemory(1 << 20)
		_, socket := start(t, Config{hand: way}, Export{Device: m})
		r := dialRaw(t, socket).goTo("", nbd.OptStructuredReply)
		q := request(nbd.Request{Type: nbd.CmdRead, Length: 4096}, false)
		reply := make([]byte, nbd.ChunkBytes+8+4096)
		batch := bytes.Repeat(q, 8)
		one := func() {
			r.Write(batch)
			for range 8 {
				io.ReadFull(r, reply)
			}
		}
		for range 50 {
			one() // until ways are chosen and pools filled
		}
		if n := testing.AllocsPerRun(100, one); n > 0 {
			t.Errorf("%s: %v allocations for 8 reads", name, n)
		}
	}
}

// pipe is a peer that sends prepared bytes, and takes everything.
type pipe struct {
	net.Conn
	r io.Reader
}

func (p *pipe) Read(b []byte) (int, error)       { return p.r.Read(b) }
func (p *pipe) Write(b []byte) (int, error)      { return len(b), nil }
func (p *pipe) Close() error                     { return nil }
func (p *pipe) SetDeadline(time.Time) error      { return nil }
func (p *pipe) SetReadDeadline(time.Time) error  { return nil }
func (p *pipe) SetWriteDeadline(time.Time) error { return nil }

func fuzzServer(t testing.TB) (*Server, *memory) {
	s := New(Config{MaxRequestBytes: 2 << 20, MaxInflight: 4})
	m := newMemory(64 << 10)
	if err := s.AddExport(Export{Name: "d", Device: sparse{m}}); err != nil {
		t.Fatal(err)
	}
	return s, m
}

// FuzzNegotiation sends anything instead of options.
func FuzzNegotiation(f *testing.F) {
	hello := []byte{0, 0, 0, 3}
	info := append(nbd.AppendString(nil, "d"), 0, 1, 0, 3)
	all := nbd.AppendOption(bytes.Clone(hello), nbd.OptStructuredReply, nil)
	all = nbd.AppendOption(all, nbd.OptSetMetaContext, nbd.AppendString(append(nbd.AppendString(nil, "d"), 0, 0, 0, 1), "base:allocation"))
	all = nbd.AppendOption(all, nbd.OptInfo, info)
	f.Add(nbd.AppendOption(all, nbd.OptGo, info))
	f.Add(nbd.AppendOption(nbd.AppendOption(bytes.Clone(hello), nbd.OptExtendedHeaders, nil), nbd.OptExportName, []byte("d")))
	f.Add(nbd.AppendOption(nbd.AppendOption(bytes.Clone(hello), nbd.OptList, nil), nbd.OptAbort, nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		s, _ := fuzzServer(t)
		h := handshake{s: s, conn: &pipe{r: bytes.NewReader(b)}}
		err := h.run()
		if err != nil && h.export != nil && h.out != nil && len(h.out) > 0 {
			t.Error("an export with an error")
		}
		if h.allocation && !h.structured {
			t.Error("a metadata context without structured replies")
		}
		if cap(h.out) > 8*maxOptionBytes {
			t.Errorf("%d bytes held for replies", cap(h.out))
		}
	})
}

// FuzzRequests sends anything instead of requests.
func FuzzRequests(f *testing.F) {
	add := func(mode byte, reqs ...nbd.Request) {
		var b []byte
		for _, q := range reqs {
			b = append(b, request(q, mode&3 == 3)...)
			if q.Type == nbd.CmdWrite {
				b = append(b, make([]byte, q.Length)...)
			}
		}
		f.Add(b, mode)
	}
	reads := []nbd.Request{{Type: nbd.CmdRead, Length: 4096}, {Type: nbd.CmdRead, Offset: 512, Length: 60000}, {Type: nbd.CmdWrite, Length: 512}, {Type: nbd.CmdFlush},
		{Type: nbd.CmdTrim, Length: 4096}, {Type: nbd.CmdWriteZeroes, Flags: nbd.CmdFlagNoHole, Length: 70}, {Type: nbd.CmdCache, Length: 100}, {Type: nbd.CmdBlockStatus, Length: 60000}, {Type: nbd.CmdDisc}}
	for mode := range byte(8) {
		add(mode, reads...)
	}
	f.Fuzz(func(t *testing.T, b []byte, mode byte) {
		s, m := fuzzServer(t)
		x := s.exports["d"]
		if mode&8 != 0 {
			s.budget.limit = 0
		}
		c := newConn(s, &handshake{conn: &pipe{r: bytes.NewReader(b)}, export: x, structured: mode&1 != 0, extended: mode&3 == 3, allocation: mode&1 != 0})
		if mode&4 != 0 { // goroutines from the start
			s.cfg.hand = handAll
		}
		c.run()
		if s.budget.used.Load() != 0 || c.inflight.Load() != 0 {
			t.Errorf("%d bytes and %d requests are not given back", s.budget.used.Load(), c.inflight.Load())
		}
		if len(m.b) != 64<<10 {
			t.Error("the device grew")
		}
	})
}
