package qcow2

import (
	"encoding/binary"
	"fmt"
	"path/filepath"
	"sync/atomic"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/redo"
)

// Redo records, little endian. They say what the tables in memory say and those in
// the file not yet.
//
//	map    0  1  1          l2     0  1  2
//	       1  8  guest cluster     1  4  L1 index
//	       9  4  count             5  8  L1 entry
//	      13  8  L2 entry of the first
//	      21  8  added for each next
//
// The clusters of a map record lie in one slice.
const (
	recordMap      = 1
	recordL2       = 2
	recordMapBytes = 29
	recordL2Bytes  = 13

	// maxRedoBytes is the length of the redo log that makes a writer checkpoint: it
	// bounds what recovery reads.
	maxRedoBytes = 1 << 20

	// maxReplaySlices bounds what a redo log may make recovery hold in memory: the
	// dirty slices of two checkpoints, and what writers running at once added.
	maxReplaySlices = 4 * maxDirtySlices
)

func redoPrefix(path string) string { return path + ".redo" }

// redoPending tells whether a redo log is beside the image.
func redoPending(prefix string) bool {
	names, err := filepath.Glob(globQuote(prefix) + ".[0-9]*")
	return err == nil && len(names) > 0
}

func globQuote(s string) string {
	var out []byte
	for k := 0; k < len(s); k++ {
		switch s[k] {
		case '*', '?', '[', '\\':
			out = append(out, '\\')
		}
		out = append(out, s[k])
	}
	return string(out)
}

// openLog opens the redo log, replaying it into memory if the image is dirty. Without
// the dirty mark a log is left over from an image that was closed, repaired by another
// program, or replaced: its records are about a state that is gone.
func (i *Image) openLog(prefix string) error {
	records := 0
	log, err := redo.Open(prefix, func(record []byte) error {
		if !i.head.dirty() {
			return nil
		}
		records++
		return i.replay(record)
	})
	if err != nil {
		return err
	}
	if !i.head.dirty() {
		// Records of this session must not stand behind foreign ones. The segment
		// that Open started holds none yet.
		if log, err = withoutOldSegments(log, prefix); err != nil {
			return err
		}
	}
	if records > 0 {
		i.logger.Info("qcow2: applied the redo log of a killed writer", "image", i.name, "records", records)
	}
	i.log = log
	return nil
}

func withoutOldSegments(log *redo.Log, prefix string) (*redo.Log, error) {
	names, err := filepath.Glob(globQuote(prefix) + ".[0-9]*")
	if err != nil || len(names) <= 1 {
		return log, err
	}
	if err := log.Remove(); err != nil {
		return nil, err
	}
	return redo.Open(prefix, func([]byte) error { return nil })
}

// replay applies a record to the tables in memory. It checks what keeps memory sound;
// that the result makes sense is for the scan that follows.
func (i *Image) replay(record []byte) error {
	le := binary.LittleEndian
	switch {
	case len(record) == recordL2Bytes && record[0] == recordL2:
		index, entry := int64(le.Uint32(record[1:])), le.Uint64(record[5:])
		if index >= int64(len(i.l1)) {
			return kind.Errorf(kind.Corrupt, "redo record: L1 index %d of %d", index, len(i.l1))
		}
		if err := i.head.checkL1(entry, i.alloc.fileBytes.Load()); err != nil {
			return fmt.Errorf("redo record: %w", err)
		}
		if i.l1[index] != entry {
			i.l1[index] = entry
			i.dirtyL1 = append(i.dirtyL1, index)
		}
		return nil
	case len(record) == recordMapBytes && record[0] == recordMap:
		first, n := le.Uint64(record[1:]), int64(le.Uint32(record[9:]))
		entry, step := le.Uint64(record[13:]), le.Uint64(record[21:])
		perSlice := int64(1) << i.cache.entryBits
		if first >= uint64(i.head.guestClusters()) || n == 0 || int64(first)&(perSlice-1)+n > perSlice {
			return kind.Errorf(kind.Corrupt, "redo record: %d clusters from %d", n, first)
		}
		if i.l1[int64(first)>>i.head.l2Bits()] == 0 {
			return kind.Errorf(kind.Corrupt, "redo record: guest cluster %d has no L2 table", first)
		}
		s, err := i.cache.pin(int64(first)>>i.cache.entryBits, i.fillSlice)
		if err != nil {
			return err
		}
		i.store(s, int64(first), n, entry, step)
		i.cache.unpin(s)
		if len(i.dirtySlices) > maxReplaySlices {
			return kind.Errorf(kind.Corrupt, "redo log changes more than %d slices", maxReplaySlices)
		}
		return nil
	}
	return kind.Errorf(kind.Corrupt, "redo record of %d bytes, type %d", len(record), record[0])
}

// store puts entries into a pinned slice. The caller holds metaMu or is alone.
func (i *Image) store(s *slice, first, n int64, entry, step uint64) {
	index := first & (1<<i.cache.entryBits - 1)
	for k := range n {
		atomic.StoreUint64(&s.entries[index+k], entry+uint64(k)*step)
	}
	if !s.dirty {
		s.dirty = true
		i.cache.mu.Lock()
		s.pins++
		i.cache.mu.Unlock()
		i.dirtySlices = append(i.dirtySlices, s)
	}
}

// publish makes new entries the ones that accesses see, after recording them, and
// retires the host clusters that the old entries used.
func (i *Image) publish(s *slice, first, n int64, entry, step uint64, retired []clusterRun) error {
	i.metaMu.Lock()
	defer i.metaMu.Unlock()
	le := binary.LittleEndian
	r := append(i.record[:0], recordMap)
	r = le.AppendUint64(r, uint64(first))
	r = le.AppendUint32(r, uint32(n))
	r = le.AppendUint64(r, entry)
	r = le.AppendUint64(r, step)
	i.record = r
	if err := i.log.Append(r); err != nil {
		return err
	}
	i.store(s, first, n, entry, step)
	i.retired = append(i.retired, retired...)
	return nil
}

// publishL2 makes a new L2 table the one of an L1 entry.
func (i *Image) publishL2(index int64, entry uint64) error {
	i.metaMu.Lock()
	defer i.metaMu.Unlock()
	le := binary.LittleEndian
	r := append(i.record[:0], recordL2)
	r = le.AppendUint32(r, uint32(index))
	r = le.AppendUint64(r, entry)
	i.record = r
	if err := i.log.Append(r); err != nil {
		return err
	}
	atomic.StoreUint64(&i.l1[index], entry)
	i.dirtyL1 = append(i.dirtyL1, index)
	return nil
}
