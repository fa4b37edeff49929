package nvmf_test

import (
	"bytes"
	"math/rand/v2"
	"net"
	"os"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/thaw-project/thaw/nvme"
	"github.com/thaw-project/thaw/target/nvmf"
)

// TestFatal sends PDUs that are wrong in one way each. The target names the error and
// closes the connection; a connection beside it does not notice.
func TestFatal(t *testing.T) {
	tg, addr := start(t, nvmf.Options{InCapsule: 4096, QueueDepth: 16, R2TBytes: 4096})
	nsid := add(t, tg, nvmf.NvmeNamespaceConfig{Device: &memory{data: make([]byte, 1<<20)}})
	good := admin(t, addr, subNQN, 0)
	gq := queue(t, addr, good, 1, 15, nvme.Digests{})

	common := func(h nvme.Common) []byte {
		b := make([]byte, max(int(h.PLEN), 8)%(1<<16))
		if len(b) < 128 {
			b = make([]byte, 128)
		}
		h.Put(b)
		return b
	}
	for _, c := range []struct {
		what   string
		before bool // instead of ICReq
		pdu    func(q *peer) []byte
		want   nvme.FatalError
	}{
		{"a command first", true, func(q *peer) []byte { return q.capsule(nvme.Command{}, nil) }, nvme.FatalSequence},
		{"ICReq of a later version", true, func(*peer) []byte {
			b := make([]byte, 128)
			(&nvme.ICReq{PFV: 1}).Put(b)
			return b
		}, nvme.FatalUnsupportedParm},
		{"a short ICReq", true, func(*peer) []byte { return common(nvme.Common{Type: nvme.TypeICReq, HLEN: 128, PLEN: 64}) }, nvme.FatalInvalidHeader},
		{"a second ICReq", false, func(*peer) []byte {
			b := make([]byte, 128)
			(&nvme.ICReq{}).Put(b)
			return b
		}, nvme.FatalSequence},
		{"an unknown type", false, func(*peer) []byte { return common(nvme.Common{Type: 0x42, HLEN: 24, PLEN: 24}) }, nvme.FatalInvalidHeader},
		{"a PDU of the target", false, func(*peer) []byte { return common(nvme.Common{Type: nvme.TypeR2T, HLEN: 24, PLEN: 24}) }, nvme.FatalSequence},
		{"a capsule of 4 GiB", false, func(*peer) []byte {
			return common(nvme.Common{Type: nvme.TypeCapsuleCmd, HLEN: 72, PDO: 72, PLEN: 1<<32 - 1})
		}, nvme.FatalLimitExceeded},
		{"a capsule with more data than agreed", false, func(q *peer) []byte {
			return q.capsule(rw(nvme.OpWrite, nsid, 0, 16, nvme.SGLInCapsule), make([]byte, 8192))
		}, nvme.FatalLimitExceeded},
		{"a digest that was not negotiated", false, func(*peer) []byte {
			return common(nvme.Common{Type: nvme.TypeCapsuleCmd, Flags: nvme.FlagHeaderDigest, HLEN: 72, PLEN: 76})
		}, nvme.FatalInvalidHeader},
		{"data that nobody asked for", false, func(q *peer) []byte { return h2c(q, nvme.Data{CID: 1, TTAG: 3}, 0, make([]byte, 512)) }, nvme.FatalInvalidHeader},
		{"data for a transfer tag out of range", false, func(q *peer) []byte { return h2c(q, nvme.Data{TTAG: 0xffff}, 0, make([]byte, 512)) }, nvme.FatalInvalidHeader},
		{"more commands than entries", false, func(q *peer) []byte {
			var b []byte
			for i := range uint16(17) {
				c := rw(nvme.OpWrite, nsid, 0, 1, nvme.SGLTransport)
				c.CID = i
				b = append(b, q.capsule(c, nil)...)
			}
			return b
		}, nvme.FatalSequence},
	} {
		var q *peer
		if c.before {
			q = dial(t, addr)
		} else {
			a := admin(t, addr, subNQN, 0)
			q = queue(t, addr, a, 1, 15, nvme.Digests{})
		}
		q.write(c.pdu(q))
		q.terminated(c.want, c.what)
		gq.status(nvme.Success, "read beside "+c.what, rw(nvme.OpRead, nsid, 0, 8, nvme.SGLTransport), nil)
	}

	// Wrong answers to an R2T.
	for what, c := range map[string]struct {
		change func(*nvme.Data)
		n      int
		flags  uint8
		want   nvme.FatalError
	}{
		"data of another command":     {func(d *nvme.Data) { d.CID++ }, 4096, nvme.FlagLast, nvme.FatalInvalidHeader},
		"data out of order":           {func(d *nvme.Data) { d.Offset += 512 }, 512, 0, nvme.FatalOutOfRange},
		"an offset that wraps":        {func(d *nvme.Data) { d.Offset = 1<<32 - 512 }, 512, 0, nvme.FatalOutOfRange},
		"more data than asked for":    {func(*nvme.Data) {}, 8192, nvme.FlagLast, nvme.FatalLimitExceeded},
		"no data":                     {func(*nvme.Data) {}, 0, 0, nvme.FatalOutOfRange},
		"the last PDU before the end": {func(*nvme.Data) {}, 512, nvme.FlagLast, nvme.FatalInvalidHeader},
	} {
		a := admin(t, addr, subNQN, 0)
		q := queue(t, addr, a, 1, 15, nvme.Digests{})
		q.write(q.capsule(rw(nvme.OpWrite, nsid, 0, 16, nvme.SGLTransport), nil))
		u := q.must(nvme.TypeR2T)
		var d nvme.Data
		if err := d.ParseR2T(u.header); err != nil {
			t.Fatal(err)
		}
		c.change(&d)
		q.write(h2c(q, d, c.flags, make([]byte, c.n)))
		q.terminated(c.want, what)
	}

	// A wrong header digest.
	a := admin(t, addr, subNQN, 0)
	q := queue(t, addr, a, 1, 15, nvme.Digests{Header: true})
	b := q.capsule(rw(nvme.OpRead, nsid, 0, 1, nvme.SGLTransport), nil)
	b[20] ^= 1
	q.write(b)
	q.terminated(nvme.FatalHeaderDigest, "a wrong header digest")
	gq.status(nvme.Success, "read after all", rw(nvme.OpRead, nsid, 0, 8, nvme.SGLTransport), nil)
}

// TestSlow has peers that stop at every stage. Each is dropped, and a good one goes
// on meanwhile.
func TestSlow(t *testing.T) {
	tg, addr := start(t, nvmf.Options{Handshake: 200 * time.Millisecond, PDUTimeout: 200 * time.Millisecond, WriteTimeout: 300 * time.Millisecond})
	nsid := add(t, tg, nvmf.NvmeNamespaceConfig{Device: &memory{data: make([]byte, 1<<20)}})
	good := admin(t, addr, subNQN, 0)
	gq := queue(t, addr, good, 1, 31, nvme.Digests{})
	silent := dial(t, addr)
	half := dial(t, addr)
	half.write(make([]byte, 60))
	unconnected := dial(t, addr)
	unconnected.init(nvme.Digests{}, 0)

	q := func() *peer {
		a := admin(t, addr, subNQN, 0)
		return queue(t, addr, a, 1, 31, nvme.Digests{})
	}
	header := q()
	header.write(header.capsule(rw(nvme.OpRead, nsid, 0, 1, nvme.SGLTransport), nil)[:30])
	payload := q()
	payload.write(payload.capsule(rw(nvme.OpWrite, nsid, 0, 16, nvme.SGLInCapsule), make([]byte, 8192))[:1000])
	r2t := q()
	r2t.write(r2t.capsule(rw(nvme.OpWrite, nsid, 0, 16, nvme.SGLTransport), nil))
	r2t.must(nvme.TypeR2T)
	kato := admin(t, addr, subNQN, 300)
	deaf := q()
	_ = deaf.nc.(*net.TCPConn).SetReadBuffer(4096)
	go func() {
		// Asks for far more than socket buffers hold and reads none of it.
		for i := range uint16(4000) {
			c := rw(nvme.OpRead, nsid, 0, 256, nvme.SGLTransport)
			c.CID = i
			if _, err := deaf.nc.Write(deaf.capsule(c, nil)); err != nil {
				return
			}
		}
	}()
	// Peers that say no more: between commands, and in the middle of one.
	closed, broken := q(), q()
	broken.write(broken.capsule(rw(nvme.OpRead, nsid, 0, 1, nvme.SGLTransport), nil)[:30])
	for _, p := range []*peer{closed, broken} {
		if err := p.nc.(*net.TCPConn).CloseWrite(); err != nil {
			t.Fatal(err)
		}
	}
	for _, p := range []*peer{silent, half, unconnected, header, payload, r2t, kato, closed, broken} {
		p.gone()
		gq.status(nvme.Success, "read beside slow peers", rw(nvme.OpRead, nsid, 0, 8, nvme.SGLTransport), nil)
	}
	eventually(t, "the deaf peer is dropped", func() bool {
		n := 0
		for _, c := range tg.Subsystems()[0].Controllers {
			n += c.Queues
		}
		return n == 1
	})
	gq.status(nvme.Success, "read after slow peers", rw(nvme.OpRead, nsid, 0, 8, nvme.SGLTransport), nil)
}

// TestMemoryPerConnection has one peer open as much as a connection allows: writes
// whose data never comes and reads whose answers nobody takes.
func TestMemoryPerConnection(t *testing.T) {
	tg, addr := start(t, nvmf.Options{QueueDepth: 1024})
	nsid := add(t, tg, nvmf.NvmeNamespaceConfig{Device: &memory{data: make([]byte, 1<<20)}})
	before := heap()
	var peers []*peer
	const n = 8
	for range n {
		a := admin(t, addr, subNQN, 0)
		q := queue(t, addr, a, 1, 1023, nvme.Digests{})
		var b []byte
		for i := range uint16(500) {
			c := rw(nvme.OpWrite, nsid, 0, 256, nvme.SGLTransport)
			c.CID = i
			b = append(b, q.capsule(c, nil)...)
		}
		q.write(b)
		for range 4 { // half of 8 times MaxTransfer
			q.must(nvme.TypeR2T)
		}
		peers = append(peers, q)
		go func() {
			// Less than the queue has entries, and all that is answered is read by none.
			for i := range uint16(400) {
				c := rw(nvme.OpRead, nsid, 0, 256, nvme.SGLTransport)
				c.CID = 1000 + i
				if _, err := q.nc.Write(q.capsule(c, nil)); err != nil {
					return
				}
			}
		}()
	}
	time.Sleep(200 * time.Millisecond) // let them fill what they can
	// Per connection: 1 MiB of data, 1 MiB waiting to be sent and one batch more.
	if used := heap() - before; used > n*4<<20 {
		t.Errorf("%d greedy connections hold %d bytes", n, used)
	}
	for _, p := range peers {
		p.nc.Close()
	}
}

func heap() int64 {
	runtime.GC()
	runtime.GC() // the first only moves pools to their victims
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapInuse + m.StackInuse)
}

// rss is the process's resident memory in bytes.
func rss(t *testing.T) int64 {
	b, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Skip("no /proc to read resident memory from")
	}
	for _, l := range strings.Split(string(b), "\n") {
		if f := strings.Fields(l); len(f) > 1 && f[0] == "VmRSS:" {
			n, _ := strconv.ParseInt(f[1], 10, 64)
			return n << 10
		}
	}
	t.Fatal("no VmRSS")
	return 0
}

// TestIdle connects 1,000 queues that did some work and then idle: they fit in 64 MB,
// the peers in this process included.
func TestIdle(t *testing.T) {
	tg, addr := start(t, nvmf.Options{})
	nsid := add(t, tg, nvmf.NvmeNamespaceConfig{Device: &memory{data: make([]byte, 1<<20)}})
	runtime.GC()
	before := rss(t)
	var last *peer
	for range 500 {
		a := admin(t, addr, subNQN, 0)
		last = queue(t, addr, a, 1, 127, nvme.Digests{})
		last.status(nvme.Success, "read", rw(nvme.OpRead, nsid, 0, 8, nvme.SGLTransport), nil)
	}
	if n := tg.Connections(); n != 1000 {
		t.Fatalf("%d connections", n)
	}
	used := rss(t) - before
	t.Logf("1000 idle connections: %d KiB more resident, heap and stacks %d KiB", used>>10, heap()>>10)
	if raceDetector {
		used = heap()
	}
	if used > 64_000_000 {
		t.Errorf("1000 idle connections take %d bytes", used)
	}
	last.status(nvme.Success, "read", rw(nvme.OpRead, nsid, 0, 8, nvme.SGLTransport), nil)
}

// TestLimit refuses connections beyond the limit and serves those it has.
func TestLimit(t *testing.T) {
	tg, addr := start(t, nvmf.Options{MaxConnections: 3})
	nsid := add(t, tg, nvmf.NvmeNamespaceConfig{Device: &memory{data: make([]byte, 1<<20)}})
	a := admin(t, addr, subNQN, 0)
	q := queue(t, addr, a, 1, 31, nvme.Digests{})
	dial(t, addr)
	eventually(t, "three connections", func() bool { return tg.Connections() == 3 })
	dial(t, addr).gone()
	q.status(nvme.Success, "read", rw(nvme.OpRead, nsid, 0, 8, nvme.SGLTransport), nil)
}

// TestNoise sends mutated conversations; the target stays whole.
func TestNoise(t *testing.T) {
	tg, addr := start(t, nvmf.Options{Handshake: 300 * time.Millisecond, PDUTimeout: 100 * time.Millisecond})
	nsid := add(t, tg, nvmf.NvmeNamespaceConfig{Device: &memory{data: make([]byte, 1<<20)}})
	rng := rand.New(rand.NewPCG(3, 4))
	for range 200 {
		conversation(t, addr, nsid, func(b []byte) {
			for range 1 + rng.IntN(4) {
				b[rng.IntN(len(b))] = byte(rng.Uint32())
			}
		})
	}
	a := admin(t, addr, subNQN, 0)
	q := queue(t, addr, a, 1, 31, nvme.Digests{})
	q.status(nvme.Success, "read after noise", rw(nvme.OpRead, nsid, 0, 8, nvme.SGLTransport), nil)
}

// stream is what a host would send on an admin queue: enough for every admin path.
func stream(p *peer, nsid uint32) []byte {
	b := make([]byte, nvme.ICLen)
	(&nvme.ICReq{}).Put(b)
	b = append(b, p.capsule(connectCommand(nvme.Connect{SQSize: 31}), connectData(subNQN, hostNQN, 0xffff))...)
	for i, c := range []nvme.Command{nvme.PropertySet(nvme.PropCC, 0x460001), nvme.PropertyGet(nvme.PropCAP, true), identify(nvme.CNSController, 0),
		identify(nvme.CNSNvmeNamespace, nsid), feature(nvme.AdminSetFeatures, nvme.FeatQueues, 3), nvme.GetLogPage(nvme.LogError, 0, 0, 512, false),
		{Opcode: nvme.AdminAsyncEvent}, {Opcode: nvme.AdminAbort}, {Opcode: nvme.AdminKeepAlive}} {
		c.CID = uint16(i)
		b = append(b, p.capsule(c, nil)...)
	}
	return b
}

func conversation(t testing.TB, addr string, nsid uint32, mutate func([]byte)) {
	nc, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	p := &peer{t: t, nc: nc}
	b := stream(p, nsid)
	mutate(b)
	_, _ = nc.Write(b)
	_ = nc.SetReadDeadline(time.Now().Add(20 * time.Millisecond))
	_, _ = nc.Read(make([]byte, 4096))
}

// FuzzConnection gives the target whatever bytes follow a handshake on an I/O queue,
// and on a fresh connection.
func FuzzConnection(f *testing.F) {
	tg, addr := start(f, nvmf.Options{Handshake: time.Second, PDUTimeout: time.Second})
	nsid := add(f, tg, nvmf.NvmeNamespaceConfig{Device: &memory{data: make([]byte, 1<<20)}, Inline: true})
	a := admin(f, addr, subNQN, 0)
	_ = a.nc.SetDeadline(time.Time{})
	p := &peer{t: f}
	f.Add(stream(p, nsid), true)
	var b []byte
	for i, op := range []uint8{nvme.OpRead, nvme.OpWrite, nvme.OpCompare, nvme.OpFlush, nvme.OpWriteZeroes, nvme.OpDatasetManagement} {
		c := rw(op, nsid, uint64(i), 1, nvme.SGLInCapsule)
		c.CID = uint16(i)
		b = append(b, p.capsule(c, make([]byte, 512))...)
		c.SGL.ID = nvme.SGLTransport
		b = append(b, p.capsule(c, nil)...)
	}
	f.Add(append(b, h2c(p, nvme.Data{CID: 1}, nvme.FlagLast, make([]byte, 512))...), false)
	f.Fuzz(func(t *testing.T, b []byte, fresh bool) {
		q := &peer{t: t}
		var err error
		if q.nc, err = net.Dial("tcp", addr); err != nil {
			t.Fatal(err)
		}
		defer q.nc.Close()
		_ = q.nc.SetDeadline(time.Now().Add(10 * time.Second))
		if !fresh {
			q.init(nvme.Digests{}, 3)
			for qid := uint16(1); ; qid = qid%16 + 1 { // some may not be cleaned up yet
				c, _ := q.do(connectCommand(nvme.Connect{QID: qid, SQSize: 31}), connectData(subNQN, hostNQN, a.cntlid))
				if c.Status.OK() {
					break
				}
			}
		}
		if _, err := q.nc.Write(b); err != nil {
			return
		}
		_ = q.nc.(*net.TCPConn).CloseWrite()
		// The target answers what it understood and closes: it must not hang.
		var out bytes.Buffer
		_, err = out.ReadFrom(q.nc)
		if ne, ok := err.(net.Error); ok && ne.Timeout() {
			t.Fatal("the target keeps a connection that its peer ended")
		}
	})
}
