package cache

import (
	"crypto/sha256"
	"encoding/binary"
	"sort"

	"github.com/thaw-project/thaw/kind"
)

// MaxRuns bounds the runs of a Map: 32 MiB of them in memory.
const MaxRuns = 1 << 20

// Run is a range of a device whose bytes are alike in how they may be kept.
type Run struct {
	OffsetBytes int64 // a multiple of 4096
	LengthBytes int64 // likewise, but for the run that ends with the device
	// Data is false where the device reads as zeros, for ever.
	Data bool
	// Owner is who the bytes belong to: an owner and an offset mean the same bytes
	// for ever, in every device of the domain. Zero: they may change, or have no
	// owner, and are not kept.
	Owner [16]byte
}

// Map describes a device.
type Map struct {
	// Domain is whose owners these are: who can name owners in a domain decides what
	// all its devices read. It must be a name that the node itself gave, of the
	// target say, and not what a peer sent. At most 256 bytes, not empty.
	Domain string
	// Runs lie side by side from 0 to the device's size, at most MaxRuns.
	Runs []Run
}

// Class of a run or a unit.
type class uint8

const (
	classZero   class = iota // zeros
	classDirect              // read from the remote, not kept
	classKept
)

// run is a Run in a device's memory. It ends where the next one starts.
type run struct {
	start int64
	owner key // of classKept: what unit numbers are added to
	class class
}

// layout is a checked Map.
type layout struct {
	runs      []run
	unitBytes int64
	sizeBytes int64
	domain    string
}

func newLayout(m Map, sizeBytes, unitBytes int64) (*layout, error) {
	if m.Domain == "" || len(m.Domain) > 256 {
		return nil, kind.Errorf(kind.Invalid, "block map: the domain %.40q must have 1 to 256 bytes", m.Domain)
	}
	if len(m.Runs) > MaxRuns {
		return nil, kind.Errorf(kind.Invalid, "block map: %d runs are more than %d", len(m.Runs), MaxRuns)
	}
	l := &layout{unitBytes: unitBytes, sizeBytes: sizeBytes, domain: m.Domain}
	owners := map[[16]byte]key{}
	at := int64(0)
	for i, r := range m.Runs {
		end := r.OffsetBytes + r.LengthBytes
		if r.OffsetBytes != at || r.LengthBytes <= 0 || end <= at || end > sizeBytes || end%blockBytes != 0 && end != sizeBytes {
			return nil, kind.Errorf(kind.Invalid, "block map: run %d, of %d bytes at %d, does not follow %d in %d bytes by multiples of %d", i, r.LengthBytes, r.OffsetBytes, at, sizeBytes, blockBytes)
		}
		x := run{start: at}
		switch {
		case !r.Data:
		case r.Owner == [16]byte{}:
			x.class = classDirect
		default:
			k, ok := owners[r.Owner]
			if !ok {
				k = l.hash("owner", r.Owner[:])
				owners[r.Owner] = k
			}
			x.class, x.owner = classKept, k
		}
		at = end
		if n := len(l.runs); n > 0 && l.runs[n-1].class == x.class && l.runs[n-1].owner == x.owner {
			continue
		}
		l.runs = append(l.runs, x)
	}
	if at != sizeBytes {
		return nil, kind.Errorf(kind.Invalid, "block map: it ends at %d of %d bytes", at, sizeBytes)
	}
	return l, nil
}

// hash makes a key of what identifies bytes. The unit is part of it: a unit's number
// means another place with another unit.
func (l *layout) hash(what string, parts []byte) key {
	b := make([]byte, 0, 512)
	b = append(append(b, "thaw node cache 1, "...), what...)
	b = binary.LittleEndian.AppendUint64(b, uint64(l.unitBytes))
	b = binary.LittleEndian.AppendUint64(b, uint64(len(l.domain)))
	b = append(append(b, l.domain...), parts...)
	sum := sha256.Sum256(b)
	return key{binary.LittleEndian.Uint64(sum[:]) | 1, binary.LittleEndian.Uint64(sum[8:])} // never zero
}

// end is where run i ends.
func (l *layout) end(i int) int64 {
	if i+1 < len(l.runs) {
		return l.runs[i+1].start
	}
	return l.sizeBytes
}

// find returns the run that holds at.
func (l *layout) find(at int64) int {
	return sort.Search(len(l.runs), func(i int) bool { return l.runs[i].start > at }) - 1
}

// unit tells of the unit that starts at, a multiple of the unit's size, what it is and
// its key if it is kept.
func (l *layout) unit(at int64) (class, key) {
	i := l.find(at)
	r := &l.runs[i]
	if end := min(at+l.unitBytes, l.sizeBytes); l.end(i) < end {
		return l.mixed(i, at, end)
	}
	return r.class, key{r.owner.hi, r.owner.lo + uint64(at/l.unitBytes)}
}

// mixed is unit for a unit of several runs, the first of which is i: it is kept under
// a key made of all of them. Only where clusters are smaller than units is there any.
func (l *layout) mixed(i int, at, end int64) (class, key) {
	parts := make([]byte, 0, 256)
	parts = binary.LittleEndian.AppendUint64(parts, uint64(at))
	all := classZero
	for ; i < len(l.runs) && l.runs[i].start < end; i++ {
		r := &l.runs[i]
		switch r.class {
		case classDirect:
			return classDirect, key{}
		case classKept:
			all = classKept
		}
		parts = binary.LittleEndian.AppendUint64(parts, uint64(max(r.start, at)))
		parts = binary.LittleEndian.AppendUint64(parts, uint64(r.class))
		parts = binary.LittleEndian.AppendUint64(parts, r.owner.hi)
		parts = binary.LittleEndian.AppendUint64(parts, r.owner.lo)
	}
	parts = binary.LittleEndian.AppendUint64(parts, uint64(end))
	return all, l.hash("mixed", parts)
}
