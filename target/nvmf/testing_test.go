package nvmf_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"go.uber.org/goleak"

	"github.com/thaw-project/thaw/nvme"
	"github.com/thaw-project/thaw/target/nvmf"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	subNQN  = "nqn.2014-08.org.example:disk"
	hostNQN = "nqn.2014-08.org.example:host"
)

// memory is a device in memory whose operations can be held up.
type memory struct {
	mu   sync.RWMutex
	data []byte
	gate chan struct{} // when set, every write takes one from it
	ro   bool
}

func (m *memory) ReadAt(p []byte, off int64) (int, error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return copy(p, m.data[off:]), nil
}

func (m *memory) WriteAt(p []byte, off int64) (int, error) {
	if m.gate != nil {
		<-m.gate
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	return copy(m.data[off:], p), nil
}

func (m *memory) Flush() error { return nil }
func (m *memory) Discard(off, n int64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	clear(m.data[off : off+n])
	return nil
}
func (m *memory) WriteZeroes(off, n int64) error { return m.Discard(off, n) }
func (m *memory) SizeBytes() int64               { return int64(len(m.data)) }
func (m *memory) ReadOnly() bool                 { return m.ro }
func (m *memory) Close() error                   { return nil }

func start(t testing.TB, o nvmf.Options) (*nvmf.Target, string) {
	t.Helper()
	if o.Tick == 0 {
		o.Tick = 10 * time.Millisecond
	}
	if os.Getenv("NVME_LOG") != "" {
		o.Log = slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug}))
	}
	tg, err := nvmf.New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tg.Close() })
	if err := tg.CreateSubsystem(nvmf.SubsystemConfig{NQN: subNQN, AllowAnyHost: true, Serial: "SN1", Model: "Model"}); err != nil {
		t.Fatal(err)
	}
	addr, err := tg.AddListener(subNQN, nvmf.ListenerConfig{Address: "127.0.0.1:0"})
	if err != nil {
		t.Fatal(err)
	}
	return tg, addr
}

func add(t testing.TB, tg *nvmf.Target, c nvmf.NvmeNamespaceConfig) uint32 {
	t.Helper()
	id, err := tg.AddNvmeNamespace(subNQN, c)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// peer speaks to the target PDU by PDU, so that a test can do what no host does.
type peer struct {
	t      testing.TB
	nc     net.Conn
	g      nvme.Digests
	cid    uint16
	cntlid uint16
}

func dial(t testing.TB, addr string) *peer {
	t.Helper()
	nc, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { nc.Close() })
	_ = nc.SetDeadline(time.Now().Add(20 * time.Second)) // ends a test that has failed
	return &peer{t: t, nc: nc}
}

func (p *peer) write(b []byte) {
	p.t.Helper()
	if _, err := p.nc.Write(b); err != nil {
		p.t.Fatal(err)
	}
}

func (p *peer) init(g nvme.Digests, maxR2T uint32) nvme.ICResp {
	p.t.Helper()
	b := make([]byte, nvme.ICLen)
	(&nvme.ICReq{Digests: g, MaxR2T: maxR2T}).Put(b)
	p.write(b)
	if _, err := io.ReadFull(p.nc, b); err != nil {
		p.t.Fatal(err)
	}
	var r nvme.ICResp
	if err := r.Parse(b); err != nil {
		p.t.Fatal(err)
	}
	p.g = r.Digests
	return r
}

// capsule is the bytes of a command capsule.
func (p *peer) capsule(cmd nvme.Command, data []byte) []byte {
	b := make([]byte, 256, 256+len(data)+4)
	if cmd.Flags == 0 {
		cmd.Flags = nvme.FlagSGL
	}
	n := nvme.PutCapsuleCmd(b, &cmd, len(data), p.g, 4)
	b = append(b[:n], data...)
	if p.g.Data && len(data) > 0 {
		b = binary.LittleEndian.AppendUint32(b, nvme.CRC32C(data))
	}
	return b
}

// pdu is one received PDU.
type pdu struct {
	common nvme.Common
	header []byte
	data   []byte
}

func (p *peer) read() (pdu, error) {
	var u pdu
	b := make([]byte, nvme.CommonLen)
	if _, err := io.ReadFull(p.nc, b); err != nil {
		return u, err
	}
	u.common = nvme.ParseCommon(b)
	l, err := u.common.Layout(p.g, 1<<24)
	if err != nil {
		return u, err
	}
	b = append(b, make([]byte, int(u.common.PLEN)-len(b))...)
	if _, err := io.ReadFull(p.nc, b[nvme.CommonLen:]); err != nil {
		return u, err
	}
	u.header, u.data = b[:l.Header], b[l.Data:l.Data+l.Length]
	if p.g.Header && u.common.Type != nvme.TypeC2HTermReq {
		if err := nvme.CheckHeaderDigest(b, int(u.common.HLEN)); err != nil {
			return u, err
		}
	}
	if l.Digest > 0 && nvme.GetDigest(b[l.Data+l.Length:]) != nvme.CRC32C(u.data) {
		return u, fmt.Errorf("data digest of %v", u.common.Type)
	}
	return u, nil
}

func (p *peer) must(t nvme.PDUType) pdu {
	p.t.Helper()
	u, err := p.read()
	if err != nil {
		p.t.Fatalf("waiting for %v: %v", t, err)
	}
	if u.common.Type != t {
		p.t.Fatalf("got %v, want %v", u.common.Type, t)
	}
	return u
}

// response reads data and the completion of a command.
func (p *peer) response() (nvme.Completion, []byte) {
	p.t.Helper()
	var data []byte
	for {
		u, err := p.read()
		if err != nil {
			p.t.Fatal(err)
		}
		switch u.common.Type {
		case nvme.TypeC2HData:
			data = append(data, u.data...)
		case nvme.TypeCapsuleResp:
			var c nvme.Completion
			c.Parse(u.header[nvme.CommonLen:])
			return c, data
		default:
			p.t.Fatalf("got %v, want a response", u.common.Type)
		}
	}
}

// do runs a command with data in its capsule.
func (p *peer) do(cmd nvme.Command, data []byte) (nvme.Completion, []byte) {
	p.t.Helper()
	p.cid++
	cmd.CID = p.cid
	p.write(p.capsule(cmd, data))
	c, d := p.response()
	if c.CID != p.cid {
		p.t.Fatalf("completion of command %d, want %d", c.CID, p.cid)
	}
	return c, d
}

func (p *peer) status(want nvme.Status, what string, cmd nvme.Command, data []byte) nvme.Completion {
	p.t.Helper()
	c, _ := p.do(cmd, data)
	if c.Status.Code() != want {
		p.t.Errorf("%s: %v, want %v", what, c.Status, want)
	}
	return c
}

func connectData(sub, host string, cntlid uint16) []byte {
	b := make([]byte, nvme.ConnectDataLen)
	(&nvme.ConnectData{HostID: uuid.UUID{1}, CNTLID: cntlid, SubNQN: sub, HostNQN: host}).Put(b)
	return b
}

func connectCommand(f nvme.Connect) nvme.Command {
	var cmd nvme.Command
	f.Put(&cmd)
	return cmd
}

// admin connects and enables an admin queue.
func admin(t testing.TB, addr, sub string, kato uint32) *peer {
	t.Helper()
	p := dial(t, addr)
	p.init(nvme.Digests{}, 0)
	c := p.status(nvme.Success, "connect", connectCommand(nvme.Connect{SQSize: 31, KeepAlive: kato}), connectData(sub, hostNQN, nvme.CNTLIDDynamic))
	p.cntlid = uint16(c.Result)
	p.status(nvme.Success, "enable", nvme.PropertySet(nvme.PropCC, 0x460001), nil)
	return p
}

// queue connects an I/O queue to the controller of an admin queue.
func queue(t testing.TB, addr string, a *peer, qid, sqsize uint16, g nvme.Digests) *peer {
	t.Helper()
	p := dial(t, addr)
	p.init(g, 3)
	p.status(nvme.Success, "connect queue", connectCommand(nvme.Connect{QID: qid, SQSize: sqsize}), connectData(subNQN, hostNQN, a.cntlid))
	return p
}

func rw(op uint8, nsid uint32, lba uint64, blocks int, sgl uint8) nvme.Command {
	c := nvme.Command{Opcode: op, NSID: nsid, CDW12: uint32(blocks - 1), SGL: nvme.SGL{Length: uint32(blocks * 512), ID: sgl}}
	c.SetSLBA(lba)
	return c
}

// gone waits until the target closes the connection.
func (p *peer) gone() {
	p.t.Helper()
	if _, err := io.Copy(io.Discard, p.nc); err != nil {
		if ne, ok := err.(net.Error); ok && ne.Timeout() {
			p.t.Fatal("the target keeps the connection")
		}
	}
}

// terminated reads a C2HTermReq and waits for the end.
func (p *peer) terminated(want nvme.FatalError, what string) {
	p.t.Helper()
	for {
		u, err := p.read()
		if err != nil {
			p.t.Fatalf("%s: %v, want a C2HTermReq", what, err)
		}
		if u.common.Type != nvme.TypeC2HTermReq {
			continue
		}
		var f nvme.Term
		if err := f.Parse(u.header); err != nil || f.Status != want {
			p.t.Errorf("%s: %v (%v), want %v", what, f.Status, err, want)
		}
		break
	}
	p.nc.Close()
}

func eventually(t testing.TB, what string, f func() bool) {
	t.Helper()
	for begin := time.Now(); time.Since(begin) < 20*time.Second; time.Sleep(5 * time.Millisecond) {
		if f() {
			return
		}
	}
	t.Fatal(what)
}

func same(t testing.TB, what string, got, want []byte) {
	t.Helper()
	if !bytes.Equal(got, want) {
		t.Errorf("%s: %d bytes differ from %d expected", what, len(got), len(want))
	}
}
