package device

import (
	"math/rand/v2"
	"slices"
	"sync"
)

// Crash is a device in memory that knows what would survive a power loss: all that
// was synced, and of each later write any share of its sectors.
type Crash struct {
	// OnOp, if set before first use, is called before every operation that changes
	// something, with its index from 0: the place to take an Image in the middle of
	// what the store does.
	OnOp func(op Op, index int)

	mu      sync.Mutex
	now     []byte             // guarded by mu: what reads see
	durable []byte             // guarded by mu: what was synced
	pending map[int64][][]byte // guarded by mu: by sector, its contents since the last sync, oldest first
	ops     int                // guarded by mu
}

// NewCrash returns a zeroed device of sizeBytes, a multiple of SectorBytes.
func NewCrash(sizeBytes int64) *Crash {
	return &Crash{now: make([]byte, sizeBytes), durable: make([]byte, sizeBytes), pending: map[int64][][]byte{}}
}

// Image is what a power loss at this moment could leave: for each sector, what was
// synced or one of the contents it has had since, chosen by seed.
func (d *Crash) Image(seed uint64) []byte {
	d.mu.Lock()
	defer d.mu.Unlock()
	r := rand.New(rand.NewPCG(seed, 1))
	image := slices.Clone(d.durable)
	sectors := make([]int64, 0, len(d.pending))
	for s := range d.pending {
		sectors = append(sectors, s)
	}
	slices.Sort(sectors) // map order must not decide what a seed means
	// A share per image, so that some lose nearly all and some nearly nothing.
	share := r.Float64()
	for _, s := range sectors {
		if versions := d.pending[s]; r.Float64() < share {
			copy(image[s*SectorBytes:], versions[r.IntN(len(versions))])
		}
	}
	return image
}

// Now is what the device holds as a process sees it: what SIGKILL leaves.
func (d *Crash) Now() []byte {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Clone(d.now)
}

// FromImage returns a device that holds image and has all of it synced.
func FromImage(image []byte) *Crash {
	return &Crash{now: slices.Clone(image), durable: slices.Clone(image), pending: map[int64][][]byte{}}
}

func (d *Crash) step(op Op) {
	if d.OnOp == nil {
		return
	}
	d.mu.Lock()
	i := d.ops
	d.ops++
	d.mu.Unlock()
	d.OnOp(op, i)
}

func (d *Crash) ReadAt(p []byte, off int64) error {
	if err := checkRange("read", off, int64(len(p)), d.SizeBytes()); err != nil {
		return err
	}
	d.mu.Lock()
	copy(p, d.now[off:])
	d.mu.Unlock()
	return nil
}

func (d *Crash) WriteAt(p []byte, off int64) error {
	if err := checkRange("write", off, int64(len(p)), d.SizeBytes()); err != nil {
		return err
	}
	d.step(OpWrite)
	d.mu.Lock()
	defer d.mu.Unlock()
	copy(d.now[off:], p)
	d.noteLocked(off, int64(len(p)))
	return nil
}

func (d *Crash) Punch(off, length int64) error {
	if err := checkRange("punch", off, length, d.SizeBytes()); err != nil {
		return err
	}
	d.step(OpPunch)
	d.mu.Lock()
	defer d.mu.Unlock()
	clear(d.now[off : off+length])
	d.noteLocked(off, length)
	return nil
}

// noteLocked remembers the present contents of the sectors of a range that change
// anything.
func (d *Crash) noteLocked(off, length int64) {
	if length == 0 {
		return
	}
	for s := off / SectorBytes; s <= (off+length-1)/SectorBytes; s++ {
		sector := d.now[s*SectorBytes : (s+1)*SectorBytes]
		versions := d.pending[s]
		if len(versions) == 0 && slices.Equal(sector, d.durable[s*SectorBytes:(s+1)*SectorBytes]) {
			continue
		}
		d.pending[s] = append(versions, slices.Clone(sector))
	}
}

func (d *Crash) Sync() error {
	d.step(OpSync)
	d.mu.Lock()
	defer d.mu.Unlock()
	for s := range d.pending {
		copy(d.durable[s*SectorBytes:(s+1)*SectorBytes], d.now[s*SectorBytes:])
	}
	clear(d.pending)
	return nil
}

func (d *Crash) ZeroesOnPunch() bool { return true }

// NextData implements Mapper as Mem does.
func (d *Crash) NextData(off int64) (start, end int64, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	m := Mem{data: d.now}
	return m.NextData(off)
}

func (d *Crash) SizeBytes() int64 { return int64(len(d.now)) }

// Close keeps the content.
func (d *Crash) Close() error { return nil }
