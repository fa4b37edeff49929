package nvmf

import "sync"

// headroom is what a buffer has beside data: the header of a data PDU with digest
// and padding in front, digest and response behind.
const headroom = 256

// smallBytes is the buffer for responses that carry no data.
const smallBytes = 1024

// batchExtra lets a batch hold the largest transfer and some responses.
const batchExtra = 4096

// buffer is memory from a pool. Who holds it gives it back once, or passes it on.
type buffer struct {
	b     []byte
	n     int // bytes to send
	class int
}

// pools keep buffers by size, so that the hot path allocates nothing.
type pools struct {
	sizes []int
	pools []sync.Pool
}

func (p *pools) init(maxTransfer int) {
	p.sizes = []int{smallBytes}
	for n := 4096; n < maxTransfer; n *= 4 {
		p.sizes = append(p.sizes, n+headroom)
	}
	p.sizes = append(p.sizes, maxTransfer+batchExtra)
	p.pools = make([]sync.Pool, len(p.sizes))
	for i, n := range p.sizes {
		p.pools[i].New = func() any { return &buffer{b: make([]byte, n), class: i} }
	}
}

// get returns a buffer of at least n bytes; n is at most the largest size.
func (p *pools) get(n int) *buffer {
	i := 0
	for p.sizes[i] < n {
		i++
	}
	b := p.pools[i].Get().(*buffer)
	b.n = 0
	return b
}

func (p *pools) batch() *buffer { return p.get(p.sizes[len(p.sizes)-1]) }

func (p *pools) put(b *buffer) {
	if b != nil {
		p.pools[b.class].Put(b)
	}
}
