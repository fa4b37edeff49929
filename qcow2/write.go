package qcow2

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"sync/atomic"

	"github.com/thaw-project/thaw/kind"
)

// maxAllocBytes bounds one allocation, so that writers next to each other are not
// held up by a huge write.
const maxAllocBytes = 4 << 20

// zeroCluster is never written, so that the kernel backs it with its zero page.
var zeroCluster [1 << maxClusterBits]byte

func decodeEntries(dst []uint64, raw []byte) {
	for k := range dst {
		atomic.StoreUint64(&dst[k], binary.BigEndian.Uint64(raw[8*k:]))
	}
}

// mutable checks that a change of [off, off+n) is allowed.
func (i *Image) mutable(off, n int64) error {
	if i.readOnly {
		return kind.Errorf(kind.ReadOnly, "the image is open read-only")
	}
	if off < 0 || n < 0 || off > i.head.sizeBytes || n > i.head.sizeBytes-off {
		return kind.Errorf(kind.Invalid, "the disk has %d bytes", i.head.sizeBytes)
	}
	return i.brokenError()
}

// WriteAt implements bdev.Device. An acknowledged write survives SIGKILL of this
// process at once and a power loss after Flush.
func (i *Image) WriteAt(p []byte, off int64) (int, error) {
	err := i.mutable(off, int64(len(p)))
	n := 0
	if err == nil && len(p) > 0 {
		g := i.epoch.enter()
		n, err = i.write(p, off)
		i.epoch.leave(g)
		i.wrote.Store(true)
	}
	if err != nil {
		return n, fmt.Errorf("qcow2 %s: write %d bytes at %d: %w", i.name, len(p), off, err)
	}
	return n, nil
}

// WriteZeroes implements bdev.Device.
func (i *Image) WriteZeroes(offset, lengthBytes int64) error {
	err := i.mutable(offset, lengthBytes)
	if err == nil && lengthBytes > 0 {
		g := i.epoch.enter()
		err = i.zero(offset, lengthBytes)
		i.epoch.leave(g)
		i.wrote.Store(true)
	}
	if err != nil {
		return fmt.Errorf("qcow2 %s: zero %d bytes at %d: %w", i.name, lengthBytes, offset, err)
	}
	return nil
}

// Discard implements bdev.Device: a discarded range reads as zeros, not as the base.
func (i *Image) Discard(offset, lengthBytes int64) error { return i.WriteZeroes(offset, lengthBytes) }

func (i *Image) write(p []byte, off int64) (int, error) {
	n := 0
	for n < len(p) {
		e, err := i.lookup(off+int64(n), int64(len(p)-n))
		if err != nil {
			return n, err
		}
		if e.class == classData {
			if err := i.file.WriteAt(p[n:n+int(e.bytes)], e.host); err != nil {
				return n, err
			}
			n += int(e.bytes)
			continue
		}
		m, err := i.allocate(p[n:], off+int64(n))
		if err != nil {
			return n, err
		}
		n += m
	}
	return n, nil
}

// prepare gets the image ready for a change of its tables: it is marked dirty in the
// file, and no more than a bounded amount of changes waits for a checkpoint.
func (i *Image) prepare() error {
	if !i.marked.Load() {
		if err := i.mark(); err != nil {
			return err
		}
	}
	if !i.crowded() {
		return nil
	}
	i.flushMu.Lock()
	defer i.flushMu.Unlock()
	if !i.crowded() {
		return nil // another writer's checkpoint has just made room
	}
	return i.flush()
}

func (i *Image) crowded() bool {
	i.metaMu.Lock()
	n := len(i.dirtySlices)
	i.metaMu.Unlock()
	return n >= i.cache.dirtyLimit() || i.log.SizeBytes() >= maxRedoBytes
}

// pinTable pins the slice of a guest cluster for a change, making the L2 table if
// there is none.
func (i *Image) pinTable(cluster int64) (*slice, error) {
	index := cluster >> i.head.l2Bits()
	if atomic.LoadUint64(&i.l1[index]) == 0 {
		if err := i.makeTable(index); err != nil {
			return nil, fmt.Errorf("new L2 table: %w", err)
		}
	}
	return i.cache.pin(cluster>>i.cache.entryBits, i.fillSlice)
}

func (i *Image) makeTable(index int64) error {
	i.tableMu.Lock()
	defer i.tableMu.Unlock()
	if atomic.LoadUint64(&i.l1[index]) != 0 {
		return nil
	}
	r, _, err := i.alloc.alloc(1)
	if err != nil {
		return err
	}
	host := r.first << i.head.clusterBits
	// Zeros are written even where the file has a hole, so that no flush runs out of
	// space over them.
	if err := i.file.WriteAt(zeroCluster[:i.clusterBytes], host); err != nil {
		i.alloc.release(r)
		return err
	}
	if err := i.publishL2(index, uint64(host)|entryCopied); err != nil {
		i.alloc.release(r)
		return err
	}
	return nil
}

// allocate writes the start of p into clusters that have no data of their own yet, and
// returns how much it wrote: 0 when somebody else allocated them meanwhile.
func (i *Image) allocate(p []byte, off int64) (int, error) {
	cluster, in := off>>i.head.clusterBits, off&(i.clusterBytes-1)
	perSlice := int64(1) << i.cache.entryBits
	want := min(
		(in+int64(len(p))+i.clusterBytes-1)>>i.head.clusterBits,
		perSlice-cluster&(perSlice-1),
		max(int64(maxAllocBytes)>>i.head.clusterBits, 1),
	)
	span := clusterRun{cluster, want}
	i.spans.own(span)
	defer i.spans.disown(span)
	if err := i.prepare(); err != nil {
		return 0, err
	}
	s, err := i.pinTable(cluster)
	if err != nil {
		return 0, err
	}
	defer i.cache.unpin(s)

	entries := s.entries[cluster&(perSlice-1):][:want]
	n, reserve, err := i.vacant(entries)
	if err != nil || n == 0 {
		return 0, err
	}
	r, fresh := clusterRun{reserve >> i.head.clusterBits, 1}, false
	if reserve == 0 {
		if r, fresh, err = i.alloc.alloc(n); err != nil {
			return 0, err
		}
	}
	end := min(off+int64(len(p)), (cluster+r.n)<<i.head.clusterBits)
	p = p[:end-off]
	err = i.fill(p, off, r, fresh, entries)
	if err == nil {
		var retired []clusterRun
		for _, e := range entries[:r.n] {
			retired = i.appendHost(retired, e, reserve)
		}
		err = i.publish(s, cluster, r.n, uint64(r.first<<i.head.clusterBits)|entryCopied, uint64(i.clusterBytes), retired)
	}
	if err != nil {
		if reserve == 0 {
			i.alloc.release(r)
		}
		return 0, err
	}
	return len(p), nil
}

// vacant counts the leading entries without data of their own. If the first is a zero
// cluster that holds a host cluster in reserve, that one is returned, alone.
func (i *Image) vacant(entries []uint64) (n, reserve int64, err error) {
	for _, e := range entries {
		class, err := i.head.classify(e)
		if err != nil {
			return 0, 0, i.damaged(err)
		}
		if class == classData {
			break
		}
		if class == classZero && hostOffset(e) != 0 {
			if n == 0 {
				return 1, hostOffset(e), nil
			}
			break
		}
		n++
	}
	return n, 0, nil
}

// appendHost appends the host clusters that an entry refers to, but not keep.
func (i *Image) appendHost(runs []clusterRun, entry uint64, keep int64) []clusterRun {
	var r clusterRun
	class, err := i.head.classify(entry)
	switch {
	case err != nil:
		return runs // scanned before, so it does not happen; a leak would be the outcome
	case class == classCompressed:
		off, n := i.head.compressedExtent(entry)
		// As the scan counted: not behind the end that the file had then.
		end := min(off+n, i.scannedBytes)
		r.first = off >> i.head.clusterBits
		r.n = (end-1)>>i.head.clusterBits - r.first + 1
	case hostOffset(entry) != 0 && hostOffset(entry) != keep:
		r = clusterRun{hostOffset(entry) >> i.head.clusterBits, 1}
	default:
		return runs
	}
	if k := len(runs) - 1; k >= 0 && class != classCompressed && runs[k].first+runs[k].n == r.first {
		runs[k].n += r.n
		return runs
	}
	return append(runs, r)
}

// fill writes p, which starts at off, into new host clusters r, and around it what the
// first and the last cluster read as before, all in one system call. Zeros around it
// are left out where the clusters are fresh.
func (i *Image) fill(p []byte, off int64, r clusterRun, fresh bool, entries []uint64) error {
	in := off & (i.clusterBytes - 1)
	host := r.first << i.head.clusterBits
	switch end := in + int64(len(p)); {
	case in == 0 && end == r.n<<i.head.clusterBits:
		return i.file.WriteAt(p, host)
	case r.n == 1 && in > 0 && end < i.clusterBytes:
		return i.fillAround(p, off, host, fresh, entries[0])
	}
	var bufs [3][]byte
	list := bufs[:0]
	if in > 0 {
		b := getBuffer(i.head.clusterBits)
		defer putBuffer(b)
		head := (*b)[:in]
		if err := i.readOld(head, off-in, entries[0]); err != nil {
			return err
		}
		if fresh && allZero(head) {
			host += in
		} else {
			list = append(list, head)
		}
	}
	list = append(list, p)
	if end := in + int64(len(p)); end < r.n<<i.head.clusterBits {
		b := getBuffer(i.head.clusterBits)
		defer putBuffer(b)
		tail := (*b)[:r.n<<i.head.clusterBits-end]
		if err := i.readOld(tail, off+int64(len(p)), entries[r.n-1]); err != nil {
			return err
		}
		if !fresh || !allZero(tail) {
			list = append(list, tail)
		}
	}
	return i.file.WriteVec(list, host)
}

// fillAround is fill for a write inside one cluster, which is what small writes are: the
// cluster is read as a whole, changed, and written.
func (i *Image) fillAround(p []byte, off, host int64, fresh bool, entry uint64) error {
	b := getBuffer(i.head.clusterBits)
	defer putBuffer(b)
	whole, in := (*b)[:i.clusterBytes], off&(i.clusterBytes-1)
	if err := i.readOld(whole, off-in, entry); err != nil {
		return err
	}
	end := in + int64(len(p))
	from, to := int64(0), i.clusterBytes
	if fresh && allZero(whole[:in]) {
		from = in
	}
	if fresh && allZero(whole[end:]) {
		to = end
	}
	copy(whole[in:], p)
	return i.file.WriteAt(whole[from:to], host+from)
}

// readOld reads what a cluster without data of its own reads as.
func (i *Image) readOld(p []byte, off int64, entry uint64) error {
	class, err := i.head.classify(entry)
	if err != nil {
		return err
	}
	return i.readExtent(extent{class: class, entry: entry, bytes: int64(len(p))}, p, off)
}

func allZero(p []byte) bool {
	for len(p) > 0 {
		n := min(len(p), len(zeroCluster))
		if !bytes.Equal(p[:n], zeroCluster[:n]) {
			return false
		}
		p = p[n:]
	}
	return true
}

// zero makes a range read as zeros: whole clusters by their entries, the rest by data.
func (i *Image) zero(off, n int64) error {
	end := off + n
	if in := off & (i.clusterBytes - 1); in != 0 {
		part := min(n, i.clusterBytes-in)
		if err := i.zeroPart(off, part); err != nil {
			return err
		}
		off += part
	}
	last := end >> i.head.clusterBits
	if end == i.head.sizeBytes {
		last = i.head.guestClusters() // what is left of the last cluster is all of it
	}
	for c := off >> i.head.clusterBits; off < end && c < last; {
		m, err := i.zeroClusters(c, last-c)
		if err != nil {
			return err
		}
		c += m
		off = c << i.head.clusterBits
	}
	if off < end {
		return i.zeroPart(off, end-off)
	}
	return nil
}

// zeroPart zeroes a part of one cluster.
func (i *Image) zeroPart(off, n int64) error {
	for n > 0 {
		e, err := i.lookup(off, n)
		if err != nil {
			return err
		}
		m := e.bytes
		switch {
		case e.class == classZero:
		case e.class == classUnallocated && !i.coveredByBacking(off>>i.head.clusterBits):
		case e.class == classData:
			if err := i.file.WriteAt(zeroCluster[:m], e.host); err != nil {
				return err
			}
		default:
			done, err := i.allocate(zeroCluster[:m], off)
			if err != nil {
				return err
			}
			m = int64(done)
		}
		off, n = off+m, n-m
	}
	return nil
}

// zeroClusters zeroes whole clusters from c on and returns how many, as far as one
// slice of the table reaches, or one table where there is none.
func (i *Image) zeroClusters(c, n int64) (int64, error) {
	index := c >> i.head.l2Bits()
	if atomic.LoadUint64(&i.l1[index]) == 0 && !i.coveredByBacking(c) {
		return min(n, (index+1)<<i.head.l2Bits()-c), nil
	}
	perSlice := int64(1) << i.cache.entryBits
	n = min(n, perSlice-c&(perSlice-1))
	span := clusterRun{c, n}
	i.spans.own(span)
	defer i.spans.disown(span)
	if err := i.prepare(); err != nil {
		return 0, err
	}
	s, err := i.pinTable(c)
	if err != nil {
		return 0, err
	}
	defer i.cache.unpin(s)
	entries := s.entries[c&(perSlice-1):][:n]
	for k := int64(0); k < n; {
		entry := uint64(0)
		if i.coveredByBacking(c + k) {
			entry = entryZero
		}
		var retired []clusterRun
		m := k
		for ; m < n && i.coveredByBacking(c+m) == (entry == entryZero) && entries[m] != entry && entries[m] != entryZero; m++ {
			retired = i.appendHost(retired, entries[m], 0)
		}
		if m == k {
			k++
			continue
		}
		if err := i.publish(s, c+k, m-k, entry, 0, retired); err != nil {
			return 0, err
		}
		k = m
	}
	return n, nil
}
