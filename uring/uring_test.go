package uring

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"
	"unsafe"

	"github.com/thaw-project/thaw/kind"
)

func newRing(t *testing.T, o Options) *Ring {
	t.Helper()
	r, err := New(o)
	if errors.Is(err, kind.Denied) || errors.Is(err, kind.Unsupported) {
		t.Skipf("no io_uring here: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.Close)
	return r
}

func TestLayout(t *testing.T) {
	for name, size := range map[string][2]uintptr{
		"params":       {unsafe.Sizeof(params{}), 120},
		"sqe":          {unsafe.Sizeof(SQE{}), 64},
		"big sqe":      {unsafe.Sizeof(BigSQE{}), 128},
		"cqe":          {unsafe.Sizeof(CQE{}), 16},
		"probe":        {unsafe.Sizeof(probe{}), 16 + 64*8},
		"getevents":    {unsafe.Sizeof(getEventsArg{}), 24},
		"sqe off":      {unsafe.Offsetof(SQE{}.Off), 8},
		"sqe userdata": {unsafe.Offsetof(SQE{}.UserData), 32},
		"sqe cmd":      {unsafe.Offsetof(SQE{}.Cmd), 48},
		"big more":     {unsafe.Offsetof(BigSQE{}.More), 64},
	} {
		if size[0] != size[1] {
			t.Errorf("%s is %d, must be %d", name, size[0], size[1])
		}
	}
}

// TestReadWrite fills and empties rings of each kind many times over, so that indexes
// wrap and entries are reused.
func TestReadWrite(t *testing.T) {
	for name, o := range map[string]Options{
		"plain":      {Entries: 4},
		"big":        {Entries: 4, BigEntries: true},
		"one thread": {Entries: 4, OneThread: true},
	} {
		t.Run(name, func(t *testing.T) {
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			r := newRing(t, o)
			if err := r.Supports(OpRead, OpWrite); err != nil {
				t.Fatal(err)
			}
			f, err := os.Create(filepath.Join(t.TempDir(), "file"))
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			entry := func() *SQE {
				if o.BigEntries {
					return &r.BigSQE().SQE
				}
				return r.SQE()
			}
			const block = 512
			pages := make([]byte, 4*block)
			for round := range 20 {
				for _, op := range []uint8{OpWrite, OpRead} {
					if op == OpWrite {
						for i := range pages {
							pages[i] = byte(i/block + round)
						}
					} else {
						clear(pages)
					}
					for i := range 4 {
						e := entry()
						e.Opcode, e.FD, e.Len, e.Off = op, int32(f.Fd()), block, uint64(i*block)
						e.Addr, e.UserData = uint64(uintptr(unsafe.Pointer(&pages[i*block]))), uint64(i)
					}
					if r.next() != nil {
						t.Fatal("a full ring gave an entry")
					}
					seen := 0
					for got := 0; got < 4; {
						if err := r.Wait(0); err != nil {
							t.Fatal(err)
						}
						for c, ok := r.Next(); ok; c, ok = r.Next() {
							if c.Res != block {
								t.Fatalf("op %d: %d", op, c.Res)
							}
							got++
							seen |= 1 << c.UserData
						}
					}
					if seen != 15 || r.Queued() != 0 {
						t.Fatalf("completions %b, %d queued", seen, r.Queued())
					}
				}
				for i := range 4 {
					if want := bytes.Repeat([]byte{byte(i + round)}, block); !bytes.Equal(pages[i*block:][:block], want) {
						t.Fatalf("round %d block %d differs", round, i)
					}
				}
			}
		})
	}
}

func TestTimeoutAndWithdraw(t *testing.T) {
	r := newRing(t, Options{Entries: 4})
	if err := r.Wait(time.Millisecond); err != nil {
		t.Fatal(err)
	}
	if _, ok := r.Next(); ok {
		t.Fatal("a completion of nothing")
	}
	r.SQE().Opcode = OpRead
	if r.Queued() != 1 {
		t.Fatalf("%d queued", r.Queued())
	}
	r.Withdraw()
	if r.Queued() != 0 {
		t.Fatalf("%d queued", r.Queued())
	}
	e := r.SQE() // opcode 0: no operation
	e.UserData = 7
	if err := r.Submit(); err != nil {
		t.Fatal(err)
	}
	if err := r.Wait(0); err != nil {
		t.Fatal(err)
	}
	if c, ok := r.Next(); !ok || c.UserData != 7 || c.Res != 0 {
		t.Fatalf("%+v %t", c, ok)
	}
}
