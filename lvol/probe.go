package lvol

import "github.com/thaw-project/thaw/kind"

// ProbeBytes is how much of a device's start Probe looks at.
const ProbeBytes = superblockBytes

// Probe tells which pool a device belongs to, from its first ProbeBytes. kind.NotFound
// when it belongs to none, kind.Corrupt when its superblock is damaged, and
// kind.Unsupported when it is newer than the program.
func Probe(block []byte) (uuid, name string, err error) {
	if len(block) != superblockBytes || !hasSuperblock(block) {
		return "", "", kind.Errorf(kind.NotFound, "no superblock of a pool")
	}
	b, err := decodeSuperblock(block)
	if err != nil {
		return "", "", err
	}
	return b.uuid.String(), b.name, nil
}

// UUID is the pool's, for as long as it exists.
func (s *Store) UUID() string { return s.super.uuid.String() }

// Covered looks at the clusters that lengthBytes from offset touch and tells for how
// many bytes from offset on, at least one and at most lengthBytes, they are alike:
// covered is false where neither the lvol nor an ancestor of it ever wrote, discarded
// or zeroed anything that still counts. Who keeps something below an lvol (an external
// parent) must show that there. The range lies in the lvol, else kind.Invalid.
func (l *Lvol) Covered(offset, lengthBytes int64) (n int64, covered bool, err error) {
	if err := l.enter(); err != nil {
		return 0, false, err
	}
	defer l.leave()
	if size := l.v.size.Load(); offset < 0 || lengthBytes <= 0 || offset > size || lengthBytes > size-offset {
		return 0, false, kind.Errorf(kind.Invalid, "map of lvol %s: %d bytes at %d do not fit in %d", l.name(), lengthBytes, offset, size)
	}
	at := func(c uint64) bool {
		if l.locking {
			l.v.rlockRange(c, 1)
			defer l.v.runlockRange(c, 1)
		}
		pg := l.v.root.Load().page(uint32(c / uint64(l.s.pageClusters)))
		return pg != nil && pg.load(int(c%uint64(l.s.pageClusters))).state() != stateAbsent
	}
	c := uint64(offset >> l.s.clusterShift)
	covered = at(c)
	for c++; int64(c)<<l.s.clusterShift < offset+lengthBytes; c++ {
		if at(c) != covered {
			return int64(c)<<l.s.clusterShift - offset, covered, nil
		}
	}
	return lengthBytes, covered, nil
}
