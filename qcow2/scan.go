package qcow2

import (
	"encoding/binary"
	"fmt"
	"slices"

	"github.com/thaw-project/thaw/kind"
)

// use is what the metadata says a host cluster holds.
type use uint8

const (
	useNone use = iota
	useMeta     // header, L1, refcounts, snapshot table: once
	useL2       // once, but internal snapshots share them
	useData     // once, but internal snapshots share them
	useCompressed
)

func (u use) String() string {
	return [...]string{"nothing", "metadata", "an L2 table", "data", "compressed data"}[u]
}

// severity grades a finding.
type severity uint8

const (
	leak     severity = iota // harmless: space is lost
	recount                  // reference counts are wrong, which a dirty image may have
	mendable                 // Repair can derive the truth from the rest
	hopeless                 // only somebody who knows the data could
)

// scan walks all metadata of an image and counts the references that justify each
// host cluster. It believes nothing it reads.
type scan struct {
	f         file
	h         *header
	fileBytes int64
	l1        []uint64 // the active L1 table
	// overlay, if set, replaces entries of L2 table t of the active disk with newer
	// ones that are not in the file yet.
	overlay func(t int64, entries []uint64)
	// found is called for each finding.
	found func(s severity, format string, args ...any)

	refs     []uint16
	uses     []use
	refTable []uint64 // offsets of the sound refcount blocks, 0 where there is none
	// refTableSound is false when the table itself must be given up.
	refTableSound bool
	dataClusters  int64
	shared        bool  // internal snapshots share some cluster
	budget        int64 // L2 entries that may still be read

	raw     []byte   // one table as in the file
	entries []uint64 // and decoded
}

// scanBudget bounds the L2 entries that are read beside what the file's length
// explains, so that a small file whose snapshots all name one table ends soon.
const scanBudget = 1 << 26

func (s *scan) run() error {
	s.raw = make([]byte, s.h.clusterBytes())
	s.entries = make([]uint64, s.h.clusterBytes()/8)
	s.budget = scanBudget + s.fileBytes/2
	s.mark(0, useMeta, "header")
	if err := s.markRange(s.h.l1Offset, s.h.l1Entries*8, "L1 table"); err != nil {
		return err
	}
	if err := s.table(s.l1, true, "L1"); err != nil {
		return err
	}
	if s.h.snapshots > 0 {
		if err := s.snapshots(); err != nil {
			return err
		}
	}
	if s.h.bitmaps {
		return kind.Errorf(kind.Unsupported, "persistent bitmaps (header extension %#x)", uint32(extBitmaps))
	}
	return s.refcounts()
}

// mark counts one reference to host cluster c. It reports false, and counts nothing,
// when the cluster cannot hold this beside what it holds already.
func (s *scan) mark(c int64, u use, what string, args ...any) bool {
	if c >= maxHostClusters {
		s.found(hopeless, "%s: host cluster %d is behind the last supported one", fmt.Sprintf(what, args...), c)
		return false
	}
	if n := int(c) + 1; n > len(s.refs) {
		s.refs = append(s.refs, make([]uint16, n-len(s.refs))...)
		s.uses = append(s.uses, make([]use, n-len(s.uses))...)
	}
	switch was := s.uses[c]; {
	case was == useNone:
	case was == useCompressed && u == useCompressed:
	case was == u && (u == useData || u == useL2) && s.h.snapshots > 0:
		s.shared = true
	default:
		s.found(hopeless, "%s: host cluster %d holds %s already", fmt.Sprintf(what, args...), c, was)
		return false
	}
	s.uses[c] = u
	if !reference(s.refs, c) {
		s.found(hopeless, "%s: host cluster %d has more references than can be counted", fmt.Sprintf(what, args...), c)
		return false
	}
	return true
}

// markRange marks the clusters of a table. Failing is hopeless enough to stop.
func (s *scan) markRange(off, lengthBytes int64, what string) error {
	for c := off >> s.h.clusterBits; lengthBytes > 0 && c <= (off+lengthBytes-1)>>s.h.clusterBits; c++ {
		if !s.mark(c, useMeta, "%s", what) {
			return kind.Errorf(kind.Corrupt, "%s at %d overlaps other metadata", what, off)
		}
	}
	return nil
}

// table follows an L1 table.
func (s *scan) table(l1 []uint64, active bool, name string) error {
	for t, entry := range l1 {
		if entry == 0 {
			continue
		}
		if err := s.h.checkL1(entry, s.fileBytes); err != nil {
			s.found(hopeless, "%s entry %d: %v", name, t, err)
			continue
		}
		if !s.mark(hostOffset(entry)>>s.h.clusterBits, useL2, "%s entry %d", name, t) {
			continue
		}
		if active && s.h.snapshots == 0 && entry&entryCopied == 0 {
			s.found(mendable, "%s entry %d: not marked copied", name, t)
		}
		s.budget -= int64(len(s.entries))
		if s.budget < 0 {
			return kind.Errorf(kind.Unsupported, "more L2 tables to follow than a file of %d bytes explains", s.fileBytes)
		}
		if err := s.load(int64(t), entry, active); err != nil {
			return err
		}
		for k, e := range s.entries {
			if e != 0 {
				s.entry(e, active, name, t, k)
			}
		}
	}
	return nil
}

// load reads an L2 table into entries.
func (s *scan) load(t int64, l1Entry uint64, active bool) error {
	if err := readFull(s.f, s.raw, hostOffset(l1Entry), false); err != nil {
		return fmt.Errorf("read L2 table %d: %w", t, err)
	}
	for k := range s.entries {
		s.entries[k] = binary.BigEndian.Uint64(s.raw[8*k:])
	}
	if active && s.overlay != nil {
		s.overlay(t, s.entries)
	}
	return nil
}

func (s *scan) entry(e uint64, active bool, name string, t, k int) {
	class, err := s.h.classify(e)
	if err != nil {
		s.found(hopeless, "%s entry %d, L2 entry %d: %v", name, t, k, err)
		return
	}
	switch class {
	case classData, classZero:
		off := hostOffset(e)
		if class == classZero && off == 0 {
			return
		}
		if off >= s.fileBytes {
			s.found(hopeless, "%s entry %d, L2 entry %d: cluster at %d is behind the end of the file", name, t, k, off)
			return
		}
		if !s.mark(off>>s.h.clusterBits, useData, "%s entry %d, L2 entry %d", name, t, k) {
			return
		}
		if active && s.h.snapshots == 0 && e&entryCopied == 0 {
			s.found(mendable, "%s entry %d, L2 entry %d: not marked copied", name, t, k)
		}
	case classCompressed:
		off, n := s.h.compressedExtent(e)
		if off >= s.fileBytes {
			s.found(hopeless, "%s entry %d, L2 entry %d: compressed cluster at %d is behind the end of the file", name, t, k, off)
			return
		}
		for c := off >> s.h.clusterBits; c <= (min(off+n, s.fileBytes)-1)>>s.h.clusterBits; c++ {
			if !s.mark(c, useCompressed, "%s entry %d, L2 entry %d", name, t, k) {
				return
			}
		}
	}
	if active {
		s.dataClusters++
	}
}

// snapshots follows the snapshot table (section "Snapshots"):
//
//	0  8  l1_table_offset   12  2  length of the id     36  4  length of extra data, from 40 on
//	8  4  l1_size           14  2  length of the name   then id, name, padding to 8
func (s *scan) snapshots() error {
	at := s.h.snapshotsOffset
	var fixed [40]byte
	var l1s [][2]int64
	for n := range s.h.snapshots {
		if err := readFull(s.f, fixed[:], at, false); err != nil {
			return fmt.Errorf("read internal snapshot %d: %w", n, err)
		}
		be := binary.BigEndian
		off, entries := be.Uint64(fixed[:]), int64(be.Uint32(fixed[8:]))
		if off&uint64(s.h.clusterBytes()-1) != 0 || entries*8 > maxL1Bytes || off > uint64(s.fileBytes) || entries*8 > s.fileBytes-int64(off) {
			return kind.Errorf(kind.Corrupt, "internal snapshot %d: L1 table of %d entries at %d", n, entries, off)
		}
		l1s = append(l1s, [2]int64{int64(off), entries})
		extra := int64(be.Uint32(fixed[36:]))
		if extra > 1024 { // QEMU's limit
			return kind.Errorf(kind.Corrupt, "internal snapshot %d: %d bytes of extra data", n, extra)
		}
		at += (40 + extra + int64(be.Uint16(fixed[12:])) + int64(be.Uint16(fixed[14:])) + 7) &^ 7
	}
	if err := s.markRange(s.h.snapshotsOffset, min(at, s.fileBytes)-s.h.snapshotsOffset, "snapshot table"); err != nil {
		return err
	}
	for n, l := range l1s {
		name := fmt.Sprintf("snapshot %d: L1", n)
		if err := s.markRange(l[0], l[1]*8, name+" table"); err != nil {
			return err
		}
		l1, err := readTable(s.f, l[0], l[1])
		if err != nil {
			return fmt.Errorf("read %s table: %w", name, err)
		}
		if err := s.table(l1, false, name); err != nil {
			return err
		}
	}
	return nil
}

// readTable reads n numbers of 8 bytes. The caller has checked that they lie inside
// the file.
func readTable(f file, off, n int64) ([]uint64, error) {
	raw := make([]byte, n*8)
	if err := readFull(f, raw, off, false); err != nil {
		return nil, err
	}
	table := make([]uint64, n)
	for k := range table {
		table[k] = binary.BigEndian.Uint64(raw[8*k:])
	}
	return table, nil
}

// refcounts marks the refcount table and its blocks, last, so that what overlaps is
// blamed on them: they alone can be made anew.
func (s *scan) refcounts() error {
	s.refTableSound = s.h.refTableClusters > 0
	if !s.refTableSound {
		s.found(recount, "no refcount table")
		return nil
	}
	first := s.h.refTableOffset >> s.h.clusterBits
	for c := first; c < first+s.h.refTableClusters; c++ {
		if c < int64(len(s.uses)) && s.uses[c] != useNone {
			s.refTableSound = false
			s.found(recount, "refcount table: host cluster %d holds %s already", c, s.uses[c])
			return nil
		}
	}
	for c := first; c < first+s.h.refTableClusters; c++ {
		s.mark(c, useMeta, "refcount table")
	}
	table, err := readTable(s.f, s.h.refTableOffset, s.h.refTableClusters<<s.h.clusterBits/8)
	if err != nil {
		return fmt.Errorf("read refcount table: %w", err)
	}
	last := 0
	for b, off := range table {
		if off == 0 {
			continue
		}
		c := int64(off >> s.h.clusterBits)
		switch {
		case off&uint64(s.h.clusterBytes()-1) != 0 || off > uint64(s.fileBytes-s.h.clusterBytes()):
			s.found(recount, "refcount table entry %d: no block can be at %#x", b, off)
			table[b] = 0
		case c < int64(len(s.uses)) && s.uses[c] != useNone:
			s.found(recount, "refcount table entry %d: host cluster %d holds %s already", b, c, s.uses[c])
			table[b] = 0
		default:
			s.mark(c, useMeta, "refcount block")
			last = b + 1
		}
	}
	s.refTable = slices.Clone(table[:last]) // mostly empty: not worth keeping whole
	return nil
}
