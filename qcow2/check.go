package qcow2

import (
	"fmt"
	"log/slog"
	"sync/atomic"

	"github.com/thaw-project/thaw/kind"
)

// maxProblems bounds the findings that a report tells in words.
const maxProblems = 100

// Report is what Check found.
type Report struct {
	Clean       bool     `json:"clean"`        // no leak, no corruption, nothing to recover
	Dirty       bool     `json:"dirty"`        // the writer did not close it
	Corrupt     bool     `json:"corrupt"`      // marked corrupt
	RedoPending bool     `json:"redo_pending"` // a redo log waits for a writable Open
	Leaks       int64    `json:"leaks"`        // clusters counted more often than used
	Corruptions int64    `json:"corruptions"`  // wrong entries, and clusters used more often than counted
	Problems    []string `json:"problems"`     // the first of them, in words

	// Fixed counts are what Repair put right; Leaks and Corruptions are what is left.
	FixedLeaks       int64 `json:"fixed_leaks"`
	FixedCorruptions int64 `json:"fixed_corruptions"`

	DataClusters  int64 `json:"data_clusters"`  // guest clusters with data or a cluster of their own
	TotalClusters int64 `json:"total_clusters"` // guest clusters of the disk
	EndBytes      int64 `json:"end_bytes"`      // behind the last used cluster of the file

	hopeless bool // some corruption is beyond Repair
}

func (r *Report) found(sev severity, format string, args ...any) {
	if sev == leak {
		r.Leaks++
	} else {
		r.Corruptions++
	}
	r.hopeless = r.hopeless || sev == hopeless
	if len(r.Problems) < maxProblems {
		r.Problems = append(r.Problems, fmt.Sprintf(format, args...))
	}
}

// Check reads all metadata and compares reference counts, as qemu-img check does. It
// changes nothing and does not look into the backing file. An image in use is
// kind.InUse. Damage is in the report; an error says that the check could not be done.
func Check(path string) (Report, error) {
	f, err := openOSFile(path, true)
	if err == nil {
		defer f.Close()
		if err = f.lock(true); err == nil {
			var r Report
			if r, err = checkFile(f, redoPrefix(path)); err == nil {
				return r, nil
			}
		}
	}
	return Report{}, fmt.Errorf("check qcow2 %s: %w", path, err)
}

func checkFile(f file, prefix string) (Report, error) {
	i, err := load(f, "", OpenOptions{ReadOnly: true})
	if err != nil {
		return Report{}, err
	}
	r, _, err := i.check(prefix)
	return r, err
}

// check scans and compares. It also returns the scan, whose counts are the true ones.
func (i *Image) check(prefix string) (Report, *scan, error) {
	r := Report{
		Dirty: i.head.dirty(), Corrupt: i.head.corrupt(),
		RedoPending:   i.head.dirty() && redoPending(prefix),
		TotalClusters: i.head.guestClusters(),
	}
	s := i.newScan(r.found)
	if err := s.run(); err != nil {
		return r, nil, err
	}
	if s.shared {
		if err := s.eachActive(func(t, k int, e uint64) {
			if is := e&entryCopied != 0; is != s.wantCopied(e) {
				r.found(mendable, "%s: marked copied: %t", place(t, k), is)
			}
		}); err != nil {
			return r, nil, err
		}
	}
	if err := s.compareCounts(); err != nil {
		return r, nil, err
	}
	r.DataClusters = s.dataClusters
	r.EndBytes = int64(len(s.refs)) << i.head.clusterBits
	r.Clean = !r.Dirty && !r.Corrupt && r.Leaks == 0 && r.Corruptions == 0
	return r, s, nil
}

func place(t, k int) string {
	if k < 0 {
		return fmt.Sprintf("L1 entry %d", t)
	}
	return fmt.Sprintf("L1 entry %d, L2 entry %d", t, k)
}

// wantCopied tells whether an L1 or standard L2 entry should be marked copied.
func (s *scan) wantCopied(e uint64) bool {
	c := hostOffset(e) >> s.h.clusterBits
	return c > 0 && c < int64(len(s.refs)) && s.refs[c] == 1
}

// eachActive calls visit for every sound entry of the active tables that names a
// cluster; k is -1 for an L1 entry.
func (s *scan) eachActive(visit func(t, k int, e uint64)) error {
	for t, l1 := range s.l1 {
		if l1 == 0 || s.h.checkL1(l1, s.fileBytes) != nil {
			continue
		}
		visit(t, -1, l1)
		s.budget -= int64(len(s.entries))
		if s.budget < 0 {
			return kind.Errorf(kind.Unsupported, "more L2 tables to follow than a file of %d bytes explains", s.fileBytes)
		}
		if err := s.load(int64(t), l1, true); err != nil {
			return err
		}
		for k, e := range s.entries {
			class, err := s.h.classify(e)
			if err == nil && (class == classData || class == classZero) && hostOffset(e) != 0 {
				visit(t, k, e)
			}
		}
	}
	return nil
}

// compareCounts compares what the file counts with what the tables justify.
func (s *scan) compareCounts() error {
	blockBits := s.h.clusterBits + 3 - s.h.refcountOrder
	perBlock := int64(1) << blockBits
	blocks := max(int64(len(s.refTable)), (int64(len(s.refs))+perBlock-1)>>blockBits)
	for b := range blocks {
		have := false
		if b < int64(len(s.refTable)) && s.refTable[b] != 0 {
			if err := readFull(s.f, s.raw, int64(s.refTable[b]), false); err != nil {
				return fmt.Errorf("read refcount block %d: %w", b, err)
			}
			have = true
		}
		for k := range perBlock {
			c := b<<blockBits + k
			var want, is uint64
			if c < int64(len(s.refs)) {
				want = uint64(s.refs[c])
			} else if !have {
				break
			}
			if have {
				is = decodeCount(s.raw, int(k), s.h.refcountOrder)
			}
			switch {
			case is > want:
				s.found(leak, "host cluster %d: counted %d times, used %d times", c, is, want)
			case is < want:
				s.found(recount, "host cluster %d: counted %d times, used %d times", c, is, want)
			}
		}
	}
	return nil
}

// Repair applies a pending redo log and rewrites reference counts and flags, as
// qemu-img check -r all does, and reports what is left. Damage that it cannot repair
// (entries that point nowhere, clusters with two uses) makes it change nothing.
func Repair(path string) (Report, error) {
	f, err := openOSFile(path, false)
	if err == nil {
		defer f.Close()
		if err = f.lock(false); err == nil {
			var r Report
			if r, err = repairFile(f, path, redoPrefix(path)); err == nil {
				return r, nil
			}
		}
	}
	return Report{}, fmt.Errorf("repair qcow2 %s: %w", path, err)
}

func repairFile(f file, name, prefix string) (Report, error) {
	before, err := checkFile(f, prefix)
	if err != nil || before.Clean {
		return before, err
	}
	if before.hopeless && !before.RedoPending {
		return before, nil
	}
	i, err := load(f, name, OpenOptions{Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		return before, err
	}
	left, err := i.repair(prefix)
	if i.log != nil {
		if err == nil && !left.hopeless {
			err = i.log.Remove()
		} else {
			i.log.Close()
		}
	}
	if err != nil || left.hopeless {
		return left, err
	}
	after, err := checkFile(f, prefix)
	after.FixedLeaks = max(before.Leaks-after.Leaks, 0)
	after.FixedCorruptions = max(before.Corruptions-after.Corruptions, 0)
	return after, err
}

// repair returns a report of what it found with the redo log applied.
func (i *Image) repair(prefix string) (Report, error) {
	if err := i.openLog(prefix); err != nil {
		return Report{}, err
	}
	r, s, err := i.check(prefix)
	if err != nil || r.hopeless {
		return r, err
	}
	i.adoptScan(s)
	if i.head.version >= 3 {
		if err := i.mark(); err != nil {
			return r, err
		}
	} else {
		i.marked.Store(true)
	}
	if err := i.fixCopied(s); err != nil {
		return r, err
	}
	i.wrote.Store(true)
	return r, i.finish(incompatCorrupt)
}

// fixCopied makes the copied marks of the active tables tell what the counts say. The
// changes need no redo record: made again they are the same.
func (i *Image) fixCopied(s *scan) error {
	return s.eachActive(func(t, k int, e uint64) {
		fixed := e &^ entryCopied
		if s.wantCopied(e) {
			fixed |= entryCopied
		}
		if fixed != e {
			i.fixEntry(t, k, fixed)
		}
	})
}

func (i *Image) fixEntry(t, k int, entry uint64) {
	if i.crowded() {
		if err := i.Flush(); err != nil {
			i.breakDown(err) // finish tells
		}
	}
	i.metaMu.Lock()
	defer i.metaMu.Unlock()
	if k < 0 {
		atomic.StoreUint64(&i.l1[t], entry)
		i.dirtyL1 = append(i.dirtyL1, int64(t))
		return
	}
	cluster := int64(t)<<i.head.l2Bits() + int64(k)
	c, err := i.cache.pin(cluster>>i.cache.entryBits, i.fillSlice)
	if err != nil {
		// The scan has just read the table: the disk fails.
		i.breakDown(err)
		return
	}
	i.store(c, cluster, 1, entry, 0)
	i.cache.unpin(c)
}
