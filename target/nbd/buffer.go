package nbd

import (
	"sync"
	"sync/atomic"
)

// Sizes of buffers. Every buffer has headRoom more, for the headers that go with its
// data.
const (
	// arenaBytes is what each active connection has for requests, and for replies.
	// A peer that sent nothing for a while holds none.
	arenaBytes = 64 << 10
	// chunkBytes is the most data of one request that is held in memory at once.
	// Longer requests go through in pieces.
	chunkBytes = 1 << 20
	// headRoom holds the chunk headers of the extents of one reply.
	headRoom = 4 << 10
)

var classes = [...]int{4 << 10, 16 << 10, arenaBytes, 256 << 10, chunkBytes}

type buffer struct {
	b     []byte
	start int // what is to be sent is b[start:end]
	end   int
	class int
	slot  *slot // freed once the reply was sent, or nil
}

var pools [len(classes)]sync.Pool

func getBuffer(dataBytes int) *buffer {
	class := 0
	for classes[class] < dataBytes {
		class++
	}
	if b, _ := pools[class].Get().(*buffer); b != nil {
		b.start, b.end, b.slot = 0, 0, nil
		return b
	}
	return &buffer{b: make([]byte, classes[class]+headRoom), class: class}
}

func putBuffer(b *buffer) { pools[b.class].Put(b) }

// budget bounds the bytes of all buffers held for requests in flight, over all
// connections. When it is used up a connection makes do with its arena, so nobody
// waits for others.
type budget struct {
	limit int64
	used  atomic.Int64
}

// take returns a buffer for dataBytes, at most chunkBytes, or nil.
func (g *budget) take(dataBytes int) *buffer {
	b := getBuffer(dataBytes)
	if g.used.Add(int64(len(b.b))) > g.limit {
		g.give(b)
		return nil
	}
	return b
}

func (g *budget) give(b *buffer) {
	g.used.Add(-int64(len(b.b)))
	putBuffer(b)
}
