package fuse

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/target/bdev"
)

// TestOpenTableAgainstModel does random operations on the table and a map, "dies"
// now and then, and wants the same counts.
func TestOpenTableAgainstModel(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 3))
	path := filepath.Join(t.TempDir(), "opens")
	const token = "0123456789abcdef"
	load := func() *openTable {
		table, err := loadOpens(path, token)
		if err != nil {
			t.Fatal(err)
		}
		return table
	}
	table := load()
	type state struct {
		node uint64
		sure bool
	}
	model := make(map[uint64]state)
	unique := uint64(0)
	for step := range 20000 {
		var some uint64 // a random handle
		for h := range model {
			some = h
			break
		}
		switch rnd.IntN(10) {
		case 0, 1, 2:
			unique += 2
			node := 16 + rnd.Uint64N(5)
			if h, ok := table.add(node, unique); !ok || h != unique {
				t.Fatalf("step %d: add: %d, %t", step, h, ok)
			}
			model[unique] = state{node: node}
		case 3: // an OPEN sent again
			if s, ok := model[some]; ok {
				if h, ok := table.add(s.node, some|uniqueResent); !ok || h != some {
					t.Fatalf("step %d: add again: %d, %t", step, h, ok)
				}
			}
		case 4, 5:
			table.answered(some)
			if s, ok := model[some]; ok {
				s.sure = true
				model[some] = s
			}
		case 6, 7, 8:
			table.remove(some)
			delete(model, some)
			table.remove(some) // a RELEASE sent again
		case 9:
			if rnd.IntN(20) == 0 {
				node := 16 + rnd.Uint64N(5)
				table.forgetNode(node)
				for h, s := range model {
					if s.node == node {
						delete(model, h)
					}
				}
			}
			if rnd.IntN(20) == 0 { // SIGKILL
				table.close()
				table = load()
			}
		}
		want := make(map[uint64]opens)
		for _, s := range model {
			o := want[s.node]
			if s.sure {
				o.sure++
			} else {
				o.unsure++
			}
			want[s.node] = o
		}
		for node := uint64(16); node < 21; node++ {
			if got := table.count(node); got != want[node] {
				t.Fatalf("step %d: node %d has %+v, want %+v", step, node, got, want[node])
			}
		}
	}
	table.close()
	// Another connection's table starts empty.
	other, err := loadOpens(path, "fedcba9876543210")
	if err != nil {
		t.Fatal(err)
	}
	defer other.close()
	if len(other.slots) != 0 || other.next != 0 {
		t.Errorf("table of another connection has %d slots", len(other.slots))
	}
}

func TestOpenTableIsBounded(t *testing.T) {
	table, err := loadOpens(filepath.Join(t.TempDir(), "opens"), "0123456789abcdef")
	if err != nil {
		t.Fatal(err)
	}
	defer table.close()
	for i := range uint64(maxOpens) {
		if _, ok := table.add(16, 2*i+2); !ok {
			t.Fatalf("open %d refused", i)
		}
	}
	if _, ok := table.add(16, 1<<40); ok {
		t.Fatal("one more than there is room for")
	}
	table.remove(2)
	if _, ok := table.add(16, 1<<40); !ok {
		t.Fatal("a slot given back is not used")
	}
}

// memory is a device in memory.
type memory []byte

func (m memory) ReadAt(b []byte, off int64) (int, error)  { return copy(b, m[off:]), nil }
func (m memory) WriteAt(b []byte, off int64) (int, error) { return copy(m[off:], b), nil }
func (m memory) Flush() error                             { return nil }
func (m memory) Discard(off, n int64) error               { clear(m[off : off+n]); return nil }
func (m memory) WriteZeroes(off, n int64) error           { return m.Discard(off, n) }
func (m memory) SizeBytes() int64                         { return int64(len(m)) }
func (m memory) ReadOnly() bool                           { return false }
func (m memory) Close() error                             { return nil }

// offline returns a worker whose replies go nowhere, with disks 16 (writable) and
// 17 (read-only).
func offline(t testing.TB) (*worker, memory) {
	t.Helper()
	null, err := os.OpenFile("/dev/null", os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { null.Close() })
	p := &Presenter{initDone: make(chan struct{}), metrics: newMetrics()}
	p.options = Options{Dir: "/nowhere", StatePath: filepath.Join(t.TempDir(), "state"), Open: openFile, Workers: 1, MaxRequestBytes: 1 << 20}
	if err := p.options.validate(); err != nil {
		t.Fatal(err)
	}
	p.log = p.options.Logger
	if p.state, err = newState(); err != nil {
		t.Fatal(err)
	}
	if p.opens, err = loadOpens(p.options.StatePath+".opens", p.state.Token); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.opens.close() })
	p.disks.Store(&diskSet{})
	var mem memory
	for i, readOnly := range []bool{false, true} {
		s := stateDisk{Node: uint64(16 + i)}
		s.ID, s.SizeBytes, s.ReadOnly = fmt.Sprintf("disk%d", i), 1<<20+512, readOnly
		d := newDisk(p, s)
		mem = make(memory, s.SizeBytes)
		d.device = bdev.Device(mem)
		p.publish(d, true)
	}
	p.conn = &conn{p: p, fd: int(null.Fd()), gone: make(chan struct{})}
	return &worker{c: p.conn, p: p, buf: make([]byte, bufferBytes)}, mem
}

// encode builds a request as the kernel would.
func encode(op opcode, node uint64, body ...[]byte) []byte {
	b := make([]byte, inHeaderBytes)
	for _, part := range body {
		b = append(b, part...)
	}
	le.PutUint32(b, uint32(len(b)))
	le.PutUint32(b[4:], uint32(op))
	le.PutUint64(b[8:], 42)
	le.PutUint64(b[16:], node)
	return b
}

func u64(v ...uint64) []byte {
	var b []byte
	for _, x := range v {
		b = le.AppendUint64(b, x)
	}
	return b
}

// serveBytes has w serve b, as if it had been read, and returns the reply.
func serveBytes(w *worker, b []byte) (errno syscall.Errno, data []byte) {
	n := copy(w.buf[inOffset:], b)
	w.serve(w.buf[inOffset : inOffset+n])
	if r, err := parseRequest(b); err != nil && len(b) < inHeaderBytes || !r.op.hasReply() {
		return 0, nil
	}
	length := le.Uint32(w.buf[outOffset:])
	return syscall.Errno(-int32(le.Uint32(w.buf[outOffset+4:]))), w.buf[dataOffset:max(dataOffset, outOffset+int(length))]
}

func TestRequestsThatAreWrong(t *testing.T) {
	w, _ := offline(t)
	const huge = 1<<63 + 5
	for _, c := range []struct {
		what string
		b    []byte
		want syscall.Errno
	}{
		{"read past the end", encode(opRead, 16, u64(1, 1<<40, 4096, 0, 0)), 0},
		{"read of too much", encode(opRead, 16, u64(1, 0, 1<<31, 0, 0)), unix.EINVAL},
		{"read at a huge offset", encode(opRead, 16, u64(1, huge, 4096, 0, 0)), unix.EINVAL},
		{"read of an unknown node", encode(opRead, 99, u64(1, 0, 4096, 0, 0)), unix.ESTALE},
		{"short read request", encode(opRead, 16, u64(1, 0)), unix.EINVAL},
		{"write with less data than said", encode(opWrite, 16, u64(1, 0, 4096, 0, 0), make([]byte, 100)), unix.EINVAL},
		{"write with more data than said", encode(opWrite, 16, u64(1, 0, 8, 0, 0), make([]byte, 100)), unix.EINVAL},
		{"write past the end", encode(opWrite, 16, u64(1, 1<<20, 1024, 0, 0), make([]byte, 1024)), unix.ENOSPC},
		{"write at a huge offset", encode(opWrite, 16, u64(1, 1<<63-1024, 8, 0, 0), make([]byte, 8)), unix.EINVAL},
		{"write to a read-only disk", encode(opWrite, 17, u64(1, 0, 8, 0, 0), make([]byte, 8)), unix.EROFS},
		{"punch of overflowing length", encode(opFallocate, 16, u64(1, 4096, 1<<64-1, falPunchHole|falKeepSize)), 0},
		{"zero past the end", encode(opFallocate, 16, u64(1, 4096, 1<<64-1, falZeroRange)), unix.ENOSPC},
		{"punch a read-only disk", encode(opFallocate, 17, u64(1, 0, 4096, falPunchHole|falKeepSize)), unix.EROFS},
		{"allocate", encode(opFallocate, 16, u64(1, 0, 4096, 0)), unix.EOPNOTSUPP},
		{"name without end", encode(opLookup, 1, []byte("disk0")), unix.EINVAL},
		{"name with a zero in it", encode(opLookup, 1, []byte("di\x00sk\x00")), unix.EINVAL},
		{"lookup in a file", encode(opLookup, 16, []byte("x\x00")), unix.ENOTDIR},
		{"lookup", encode(opLookup, 1, []byte("disk1\x00")), 0},
		{"open a read-only disk for writing", encode(opOpen, 17, u64(unix.O_RDWR)), unix.EROFS},
		{"unknown opcode", encode(1000, 16, u64(0)), unix.ENOSYS},
		{"chmod", encode(opSetattr, 16, u64(setattrMode), make([]byte, 80)), unix.EPERM},
		{"readdir of a file", encode(opReaddir, 16, u64(0, 0, 4096, 0, 0)), unix.ENOTDIR},
	} {
		if errno, data := serveBytes(w, c.b); errno != c.want || errno != 0 && len(data) != 0 {
			t.Errorf("%s: %v with %d bytes, want %v", c.what, errno, len(data), c.want)
		}
	}
	lying := encode(opRead, 16, u64(1, 0, 4096, 0, 0))
	le.PutUint32(lying, 9999)
	if errno, _ := serveBytes(w, lying); errno != unix.EINVAL {
		t.Errorf("wrong length: %v", errno)
	}
	if _, err := parseRequest(make([]byte, 10)); !errors.Is(err, kind.Invalid) {
		t.Errorf("short header: %v", err)
	}
}

func TestReaddirInPieces(t *testing.T) {
	w, _ := offline(t)
	for i := range 100 {
		s := stateDisk{Node: uint64(100 + i)}
		s.ID = fmt.Sprintf("d%0*d", i, i)
		w.p.publish(newDisk(w.p, s), true)
	}
	var names []string
	for offset := uint64(0); ; {
		errno, data := serveBytes(w, encode(opReaddir, 1, u64(0, offset, 300, 0, 0)))
		if errno != 0 || len(data) > 300 {
			t.Fatalf("%v, %d bytes", errno, len(data))
		}
		if len(data) == 0 {
			break
		}
		for len(data) > 0 {
			n := int(le.Uint32(data[16:]))
			names = append(names, string(data[24:24+n]))
			offset = le.Uint64(data[8:])
			data = data[(24+n+7)&^7:]
		}
	}
	if len(names) != 104 || names[0] != "." || names[1] != ".." || names[2] != "disk0" {
		t.Errorf("%d names: %q", len(names), names)
	}
}

// TestHotPathDoesNotAllocate holds the read and write paths to no garbage at all.
func TestHotPathDoesNotAllocate(t *testing.T) {
	w, _ := offline(t)
	for _, size := range []int{4 << 10, 128 << 10} {
		read := encode(opRead, 16, u64(1, 8192, uint64(size), 0, 0))
		write := encode(opWrite, 16, u64(1, 8192, uint64(size), 0, 0), make([]byte, size))
		for name, b := range map[string][]byte{"read": read, "write": write} {
			if n := testing.AllocsPerRun(100, func() {
				if errno, _ := serveBytes(w, b); errno != 0 {
					t.Fatal(errno)
				}
			}); n != 0 {
				t.Errorf("%s of %d bytes allocates %v times", name, size, n)
			}
		}
	}
}

func FuzzServe(f *testing.F) {
	for _, b := range [][]byte{
		encode(opRead, 16, u64(1, 0, 4096, 0, 0)),
		encode(opWrite, 16, u64(1, 0, 8, 0, 0), make([]byte, 8)),
		encode(opLookup, 1, []byte("disk1\x00")),
		encode(opInit, 0, []byte{7, 0, 0, 0, 45, 0, 0, 0, 0, 0, 2, 0}, u64(1<<62-1)),
		encode(opFallocate, 16, u64(1, 0, 4096, 3)),
		encode(opOpen, 16, u64(2)),
		encode(opReaddir, 1, u64(0, 0, 4096, 0, 0)),
		encode(opBatchForget, 0, u64(1, 16, 1)),
		encode(opSetattr, 16, make([]byte, 88)),
	} {
		f.Add(b)
	}
	w, _ := offline(f)
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) > bufferBytes-inOffset {
			return
		}
		if len(b) >= 4 {
			le.PutUint32(b, uint32(len(b))) // else only the length check is tested
		}
		clear(w.buf[outOffset : outOffset+8])
		_, data := serveBytes(w, b)
		if len(data) > maxIOBytes {
			t.Fatalf("reply of %d bytes", len(data))
		}
	})
}

func FuzzLoadState(f *testing.F) {
	boot, err := bootID()
	if err != nil {
		f.Fatal(err)
	}
	f.Add([]byte(`{"version":1,"boot_id":"` + boot + `","token":"00","next_node":18,"disks":[{"id":"a","node":16,"size_bytes":512},{"id":"b","node":17}]}`))
	f.Add([]byte(`{}`))
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, b []byte) {
		path := filepath.Join(dir, "state")
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		s, err := loadState(path)
		if err != nil || s == nil {
			return
		}
		for _, d := range s.Disks {
			if d.Node < firstNode || d.Node >= s.NextNode || !validID(d.ID) {
				t.Fatalf("accepted %+v", d)
			}
		}
	})
}

func FuzzLoadOpens(f *testing.F) {
	const token = "0123456789abcdef"
	f.Add(append([]byte(openMagic+token), make([]byte, 8+32)...))
	f.Add(binary.NativeEndian.AppendUint64([]byte(openMagic+token+"........"), 7))
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, b []byte) {
		path := filepath.Join(dir, "opens")
		os.Remove(path)
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		table, err := loadOpens(path, token)
		if err != nil {
			return
		}
		defer table.close()
		for handle := range table.slots {
			table.answered(handle)
			table.remove(handle)
		}
		if len(table.nodes) != 0 {
			t.Fatalf("left: %v", table.nodes)
		}
	})
}
