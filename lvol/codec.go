package lvol

import (
	"encoding/binary"
	"hash/crc32"

	"github.com/thaw-project/thaw/kind"
)

// Every value in meta.db is sealed: payload, then the CRC-32C of one tag byte that
// names the bucket, the key and the payload. A value found under another key, or in
// another bucket, does not verify.
type tag byte

const (
	tagPool tag = 'P'
	tagLvol tag = 'L'
	tagName tag = 'N'
	tagPage tag = 'D'
	tagOpen tag = 'O'
)

const sealBytes = 4

func sealSum(t tag, key, payload []byte) uint32 {
	sum := crc32.Update(0, castagnoli, []byte{byte(t)})
	sum = crc32.Update(sum, castagnoli, key)
	return crc32.Update(sum, castagnoli, payload)
}

// seal appends the seal to the payload in place.
func seal(t tag, key, payload []byte) []byte {
	return binary.LittleEndian.AppendUint32(payload, sealSum(t, key, payload))
}

func unseal(t tag, key, value []byte) ([]byte, error) {
	if len(value) < sealBytes {
		return nil, kind.Errorf(kind.Corrupt, "value of %d bytes under %c %x has no checksum", len(value), t, key)
	}
	payload := value[:len(value)-sealBytes]
	if sealSum(t, key, payload) != binary.LittleEndian.Uint32(value[len(payload):]) {
		return nil, kind.Errorf(kind.Corrupt, "value under %c %x: checksum does not match", t, key)
	}
	return payload, nil
}

func key64(n uint64) []byte { return binary.BigEndian.AppendUint64(nil, n) }

// pageKey is the key that a page is sealed with and the key of an open mark: delta
// id, page index, big endian so that bbolt's order is theirs.
func pageKey(delta uint64, index uint32) []byte {
	return binary.BigEndian.AppendUint32(key64(delta), index)
}

// record is what meta.db holds of an lvol. Payload, little endian:
//
//	 0   1  version, 1
//	 1   1  flags: 1 snapshot, 2 read-only
//	 2   2  length of the name
//	 4  16  UUID
//	20   8  size in bytes
//	28   8  delta id
//	36   8  id of the parent, 0 for none
//	44   8  overlap: below it what the delta lacks is the parent's
//	52   8  created, Unix nanoseconds
//	60   -  name
type record struct {
	name     string
	uuid     uuid
	size     int64
	delta    uint64
	parent   uint64
	overlap  int64
	created  int64
	snapshot bool
	readOnly bool
}

const (
	recordVersion = 1
	recordHeader  = 60
	flagSnapshot  = 1
	flagReadOnly  = 2
)

func (r *record) encode(id uint64) []byte {
	p := make([]byte, recordHeader, recordHeader+len(r.name)+sealBytes)
	p[0] = recordVersion
	if r.snapshot {
		p[1] |= flagSnapshot
	}
	if r.readOnly {
		p[1] |= flagReadOnly
	}
	le := binary.LittleEndian
	le.PutUint16(p[2:], uint16(len(r.name)))
	copy(p[4:], r.uuid[:])
	le.PutUint64(p[20:], uint64(r.size))
	le.PutUint64(p[28:], r.delta)
	le.PutUint64(p[36:], r.parent)
	le.PutUint64(p[44:], uint64(r.overlap))
	le.PutUint64(p[52:], uint64(r.created))
	return seal(tagLvol, key64(id), append(p, r.name...))
}

func decodeRecord(id uint64, value []byte) (record, error) {
	var r record
	p, err := unseal(tagLvol, key64(id), value)
	if err != nil {
		return r, err
	}
	if len(p) < recordHeader {
		return r, kind.Errorf(kind.Corrupt, "lvol record %d: %d bytes", id, len(p))
	}
	if p[0] != recordVersion {
		return r, kind.Errorf(kind.Unsupported, "lvol record %d: version %d, this program knows %d", id, p[0], recordVersion)
	}
	le := binary.LittleEndian
	if int(le.Uint16(p[2:])) != len(p)-recordHeader {
		return r, kind.Errorf(kind.Corrupt, "lvol record %d: name of %d bytes in %d", id, le.Uint16(p[2:]), len(p)-recordHeader)
	}
	r.snapshot, r.readOnly = p[1]&flagSnapshot != 0, p[1]&flagReadOnly != 0
	copy(r.uuid[:], p[4:20])
	r.size = int64(le.Uint64(p[20:]))
	r.delta, r.parent = le.Uint64(p[28:]), le.Uint64(p[36:])
	r.overlap, r.created = int64(le.Uint64(p[44:])), int64(le.Uint64(p[52:]))
	r.name = string(p[recordHeader:])
	switch {
	case p[1]&^(flagSnapshot|flagReadOnly) != 0:
		return r, kind.Errorf(kind.Unsupported, "lvol record %d: flags %#x", id, p[1])
	case r.delta == 0 || r.parent == id:
		return r, kind.Errorf(kind.Corrupt, "lvol record %d: delta %d, parent %d", id, r.delta, r.parent)
	case r.overlap < 0 || r.overlap > MaxLvolBytes:
		return r, kind.Errorf(kind.Corrupt, "lvol record %d: overlap %d", id, r.overlap)
	}
	if err := checkName(r.name); err != nil {
		return r, kind.Errorf(kind.Corrupt, "lvol record %d: %w", id, err)
	}
	if err := checkSize(r.name, r.size); err != nil {
		return r, kind.Errorf(kind.Corrupt, "lvol record %d: %w", id, err)
	}
	return r, nil
}

// geometry derives the sizes that depend on the cluster size. A map page covers
// 4 MiB of an lvol whatever the cluster size: 1,024 checksums, and 64 clusters of
// the default size.
type geometry struct {
	clusterBytes  int64
	clusterShift  uint
	clusterBlocks int // 4 KiB blocks in a cluster
	pageClusters  int // clusters in a map page
	totalClusters uint64
}

const (
	blockBytes = 4096
	blockShift = 12
	pageBytes  = 4 << 20
	pageShift  = 22
	pageBlocks = pageBytes / blockBytes
)

func newGeometry(clusterBytes int64, totalClusters uint64) geometry {
	g := geometry{clusterBytes: clusterBytes, totalClusters: totalClusters}
	for int64(1)<<g.clusterShift < clusterBytes {
		g.clusterShift++
	}
	g.clusterBlocks = int(clusterBytes / blockBytes)
	g.pageClusters = int(pageBytes / clusterBytes)
	return g
}

// entry is one cluster of a map: its state and where it lies. In memory only, own
// says that this lvol's delta holds it rather than an ancestor's, and durable that
// a flush captured it.
type entry uint64

const (
	stateAbsent    entry = 0 << 62 // nothing written: zeros
	stateZeroed    entry = 1 << 62 // zeros, whatever the parent has
	stateAllocated entry = 2 << 62
	stateDamaged   entry = 3 << 62 // the metadata is lost: reads fail
	stateMask      entry = 3 << 62
	ownBit         entry = 1 << 61
	durableBit     entry = 1 << 60
	physMask       entry = 1<<48 - 1
)

func (e entry) state() entry    { return e & stateMask }
func (e entry) allocated() bool { return e&stateMask == stateAllocated }
func (e entry) own() bool       { return e&ownBit != 0 }
func (e entry) phys() uint64    { return uint64(e & physMask) }

// A page value holds the entries that its delta owns, in order. Payload:
//
//	0  1  version, 1
//	1  1  zero
//	2  2  count of entries
//	then for each
//	0  2  index of the cluster in the page
//	2  1  state: 1 zeroed, 2 allocated, 3 damaged
//	3  1  zero
//	and if allocated
//	4  8  physical cluster
//	12 -  CRC-32C of each 4 KiB block, 4 bytes each
const (
	pageVersion = 1
	pageHeader  = 4
	entryHeader = 4
)

// appendPage appends the sealed value of pg to b, or returns b unchanged when the
// delta owns nothing in it.
func (g *geometry) appendPage(b []byte, pg *page) []byte {
	start, count := len(b), 0
	b = append(b, pageVersion, 0, 0, 0)
	le := binary.LittleEndian
	for i := range pg.entries {
		e := pg.load(i)
		if !e.own() {
			continue
		}
		count++
		b = le.AppendUint16(b, uint16(i))
		b = append(b, byte(e.state()>>62), 0)
		if e.allocated() {
			b = le.AppendUint64(b, e.phys())
			for _, sum := range pg.sums[i*g.clusterBlocks : (i+1)*g.clusterBlocks] {
				b = le.AppendUint32(b, sum)
			}
		}
	}
	if count == 0 {
		return b[:start]
	}
	le.PutUint16(b[start+2:], uint16(count))
	return le.AppendUint32(b, sealSum(tagPage, pageKey(pg.delta.id, pg.index), b[start:]))
}

// decodePage fills pg, whose delta, index and arrays are set, from a sealed value.
// On error pg is left in an undefined state.
func (g *geometry) decodePage(pg *page, value []byte) error {
	p, err := unseal(tagPage, pageKey(pg.delta.id, pg.index), value)
	if err != nil {
		return err
	}
	bad := func(what string) error {
		return kind.Errorf(kind.Corrupt, "page %d of delta %d: %s", pg.index, pg.delta.id, what)
	}
	if len(p) < pageHeader {
		return bad("too short")
	}
	if p[0] != pageVersion {
		return kind.Errorf(kind.Unsupported, "page %d of delta %d: version %d, this program knows %d", pg.index, pg.delta.id, p[0], pageVersion)
	}
	le := binary.LittleEndian
	count := int(le.Uint16(p[2:]))
	p = p[pageHeader:]
	last := -1
	for range count {
		if len(p) < entryHeader {
			return bad("ends inside an entry")
		}
		i, state := int(le.Uint16(p)), entry(p[2])<<62
		if i <= last || i >= g.pageClusters || p[2] == 0 || p[2] > 3 {
			return bad("entry out of order, out of range or of no known state")
		}
		last, p = i, p[entryHeader:]
		e := state | ownBit | durableBit
		if state == stateAllocated {
			if len(p) < 8+4*g.clusterBlocks {
				return bad("ends inside an entry")
			}
			phys := le.Uint64(p)
			if phys == 0 || phys >= g.totalClusters {
				return bad("cluster outside the pool")
			}
			e |= entry(phys)
			for j := range g.clusterBlocks {
				pg.sums[i*g.clusterBlocks+j] = le.Uint32(p[8+4*j:])
			}
			p = p[8+4*g.clusterBlocks:]
		}
		pg.store(i, e)
	}
	if len(p) != 0 {
		return bad("has bytes after its entries")
	}
	return nil
}

// Redo records, little endian:
//
//	0  1  type
//	1  8  sequence number
//	9  8  delta id
//	17 8  cluster
//
// type 1, an allocated cluster:
//
//	25 8  physical cluster
//	33 2  first block whose checksum follows
//	35 2  count of checksums
//	37 -  CRC-32C each
//
// type 2, a run of clusters that read as zeros:
//
//	25 4  count
//	29 1  state: 0 absent, 1 zeroed
const (
	redoSet       = 1
	redoClear     = 2
	redoHeader    = 25
	redoSetHeader = 37
	redoClearLen  = 30
)

func appendRedoSet(b []byte, seq, delta, cluster, phys uint64, first int, sums []uint32) []byte {
	le := binary.LittleEndian
	b = append(b, redoSet)
	b = le.AppendUint64(b, seq)
	b = le.AppendUint64(b, delta)
	b = le.AppendUint64(b, cluster)
	b = le.AppendUint64(b, phys)
	b = le.AppendUint16(b, uint16(first))
	b = le.AppendUint16(b, uint16(len(sums)))
	for _, s := range sums {
		b = le.AppendUint32(b, s)
	}
	return b
}

func appendRedoClear(b []byte, seq, delta, cluster uint64, count uint32, state entry) []byte {
	le := binary.LittleEndian
	b = append(b, redoClear)
	b = le.AppendUint64(b, seq)
	b = le.AppendUint64(b, delta)
	b = le.AppendUint64(b, cluster)
	b = le.AppendUint32(b, count)
	return append(b, byte(state>>62))
}

type redoRecord struct {
	set     bool
	seq     uint64
	delta   uint64
	cluster uint64
	phys    uint64   // set
	first   int      // set
	sums    []uint32 // set
	count   uint32   // clear
	state   entry    // clear
}

// maxClusterIndex bounds a cluster index: that of the largest lvol.
const maxClusterIndex = MaxLvolBytes / MinClusterBytes

func (g *geometry) decodeRedo(p []byte) (redoRecord, error) {
	var r redoRecord
	bad := kind.Errorf(kind.Corrupt, "redo record of %d bytes makes no sense", len(p))
	if len(p) < redoHeader {
		return r, bad
	}
	le := binary.LittleEndian
	r.seq, r.delta, r.cluster = le.Uint64(p[1:]), le.Uint64(p[9:]), le.Uint64(p[17:])
	if r.cluster >= maxClusterIndex {
		return r, bad
	}
	switch p[0] {
	case redoSet:
		if len(p) < redoSetHeader {
			return r, bad
		}
		r.set, r.phys, r.first = true, le.Uint64(p[25:]), int(le.Uint16(p[33:]))
		n := int(le.Uint16(p[35:]))
		if len(p) != redoSetHeader+4*n || r.first+n > g.clusterBlocks || r.phys == 0 || r.phys >= g.totalClusters {
			return r, bad
		}
		r.sums = make([]uint32, n)
		for i := range r.sums {
			r.sums[i] = le.Uint32(p[redoSetHeader+4*i:])
		}
	case redoClear:
		if len(p) != redoClearLen || p[29] > 1 {
			return r, bad
		}
		r.count, r.state = le.Uint32(p[25:]), entry(p[29])<<62
		if r.count > uint32(g.pageClusters) {
			return r, bad
		}
	default:
		return r, kind.Errorf(kind.Unsupported, "redo record of type %d: use the program that wrote it", p[0])
	}
	return r, nil
}
