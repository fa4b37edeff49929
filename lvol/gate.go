package lvol

import (
	"sync/atomic"
	"time"
	"unsafe"
)

// gate counts the operations under way on a handle, so that Close can wait for them.
// Operations take no lock and, what matters more with several CPUs, seldom touch the
// same memory: each goroutine counts in the part that the place of its stack names.
// A goroutine may leave by another part than it entered by; the sum is what counts.
type gate struct {
	closed atomic.Bool
	parts  [gateParts]struct {
		n atomic.Int64
		_ [56]byte // a cache line each
	}
}

// gateParts is a power of two: 1 KiB per open lvol.
const gateParts = 16

// part is the same for a goroutine as long as its stack is not moved. Stacks are at
// least 8 KiB once a device is called from them.
func (g *gate) part() *atomic.Int64 {
	var here byte
	return &g.parts[uintptr(unsafe.Pointer(&here))>>13%gateParts].n
}

// enter begins an operation, or returns false when the gate is closed.
func (g *gate) enter() bool {
	n := g.part()
	n.Add(1)
	if g.closed.Load() {
		n.Add(-1)
		return false
	}
	return true
}

// leave ends an operation.
func (g *gate) leave() { g.part().Add(-1) }

// close lets nothing in any more and waits for what is inside; false when it was
// closed before. Who entered before closed was set has its one in a part that this
// reads afterwards, and takes it away only when it leaves, so that the sum is never
// less than how many are inside.
func (g *gate) close() bool {
	if g.closed.Swap(true) {
		return false
	}
	for pause := 10 * time.Microsecond; g.inside() > 0; pause = min(2*pause, time.Millisecond) {
		time.Sleep(pause)
	}
	return true
}

func (g *gate) inside() (n int64) {
	for i := range g.parts {
		n += g.parts[i].n.Load()
	}
	return n
}
