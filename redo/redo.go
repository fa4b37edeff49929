// Package redo keeps acknowledged changes across the death of a process.
//
// A store that acknowledges a write whose mapping is still only in memory loses it
// when its process is killed, although the kernel, and with it the page cache, is
// alive and the caller was told the write is done. A Log closes that gap without a
// disk flush per write: records are appended with plain pwrite, so they survive
// SIGKILL in the page cache, and they are dropped as soon as the store has made
// the same change durable in its own way (a flush).
//
// A Log promises nothing across a power loss or a kernel crash: segments carry the
// kernel's boot id and those of another boot are discarded on Open, because their
// records and the data they speak of reached the disk in no particular order. That
// loses only writes that were never flushed.
//
// The package knows nothing of what the records mean.
package redo

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"os"
	"path/filepath"
	"sort"
	"strconv"
	"strings"
	"sync"

	"github.com/thaw-project/thaw/kind"
)

// Segment file: a header, then records.
//
//	header  0  8  magic "THAWREDO"
//	        8  4  version, little endian, 1
//	       12 36  boot id, as in /proc/sys/kernel/random/boot_id
//	record  0  4  payload length, little endian, 1 to MaxRecordBytes
//	        4  4  CRC-32C of the payload
//	        8  -  payload
const (
	magic       = "THAWREDO"
	version     = 1
	bootIDBytes = 36
	headerBytes = len(magic) + 4 + bootIDBytes
	frameBytes  = 8

	// MaxRecordBytes bounds one record, so that a damaged length cannot make
	// Open allocate without limit.
	MaxRecordBytes = 1 << 20
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Segment numbers the part of a log that one checkpoint makes obsolete.
type Segment uint64

// Log is an append-only log in numbered segment files. Its methods may be called
// concurrently.
type Log struct {
	prefix string
	bootID string

	mu      sync.Mutex
	file    *os.File // guarded by mu: the newest segment
	current Segment  // guarded by mu
	offset  int64    // guarded by mu: where the next record goes
	buf     []byte   // guarded by mu: frame scratch
	oldest  Segment  // guarded by mu: first segment file that may exist
}

// Open opens the log whose segments are the files prefix.N, creating the first one,
// and calls replay for each record left by a dead process of the same boot, oldest
// first. The slice is valid only during the call. An error from replay stops Open.
// Records survive until Release, so that a process killed while it recovers loses
// nothing; replaying a record twice must be harmless.
func Open(prefix string, replay func(record []byte) error) (*Log, error) {
	raw, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return nil, fmt.Errorf("open redo log %s: %w", prefix, err)
	}
	return openBoot(prefix, strings.TrimSpace(string(raw)), replay)
}

func openBoot(prefix, bootID string, replay func([]byte) error) (*Log, error) {
	if len(bootID) != bootIDBytes {
		return nil, kind.Errorf(kind.Invalid, "open redo log %s: boot id %q is not %d characters", prefix, bootID, bootIDBytes)
	}
	l := &Log{prefix: prefix, bootID: bootID}
	segments, err := l.segments()
	if err != nil {
		return nil, err
	}
	l.oldest = 1
	for _, s := range segments {
		raw, err := os.ReadFile(l.name(s))
		if err != nil {
			return nil, fmt.Errorf("open redo log: %w", err)
		}
		if err := decode(raw, bootID, replay); err != nil {
			return nil, fmt.Errorf("replay redo log %s: %w", l.name(s), err)
		}
	}
	if len(segments) > 0 {
		l.oldest = segments[0]
		l.current = segments[len(segments)-1]
	}
	if err := l.rotateLocked(); err != nil {
		return nil, err
	}
	return l, nil
}

// Read calls replay for what Open would, and changes nothing: for looking at a store
// without taking it.
func Read(prefix string, replay func(record []byte) error) error {
	raw, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return fmt.Errorf("read redo log %s: %w", prefix, err)
	}
	l := &Log{prefix: prefix}
	segments, err := l.segments()
	if err != nil {
		return err
	}
	for _, s := range segments {
		segment, err := os.ReadFile(l.name(s))
		if err != nil {
			return fmt.Errorf("read redo log: %w", err)
		}
		if err := decode(segment, strings.TrimSpace(string(raw)), replay); err != nil {
			return fmt.Errorf("replay redo log %s: %w", l.name(s), err)
		}
	}
	return nil
}

// decode calls replay for the whole records of a segment written under bootID. It
// stops without error at the first torn record: its writer died before anyone was
// told of it.
func decode(raw []byte, bootID string, replay func([]byte) error) error {
	if len(raw) < headerBytes || !bytes.HasPrefix(raw, []byte(magic)) {
		return nil // died while creating the segment
	}
	if v := binary.LittleEndian.Uint32(raw[len(magic):]); v != version {
		return kind.Errorf(kind.Unsupported, "version %d, this program knows %d", v, version)
	}
	if string(raw[len(magic)+4:headerBytes]) != bootID {
		return nil
	}
	raw = raw[headerBytes:]
	for len(raw) >= frameBytes {
		n := binary.LittleEndian.Uint32(raw)
		sum := binary.LittleEndian.Uint32(raw[4:])
		if n == 0 || n > MaxRecordBytes || int(n) > len(raw)-frameBytes {
			return nil
		}
		payload := raw[frameBytes : frameBytes+int(n)]
		if crc32.Checksum(payload, castagnoli) != sum {
			return nil
		}
		if err := replay(payload); err != nil {
			return err
		}
		raw = raw[frameBytes+int(n):]
	}
	return nil
}

// Append adds a record. When it returns nil the record survives the death of this
// process.
func (l *Log) Append(record []byte) error {
	if len(record) == 0 || len(record) > MaxRecordBytes {
		return kind.Errorf(kind.Invalid, "redo record of %d bytes: must be 1 to %d", len(record), MaxRecordBytes)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.file == nil {
		return kind.Errorf(kind.Unavailable, "redo log %s is closed", l.prefix)
	}
	l.buf = binary.LittleEndian.AppendUint32(l.buf[:0], uint32(len(record)))
	l.buf = binary.LittleEndian.AppendUint32(l.buf, crc32.Checksum(record, castagnoli))
	l.buf = append(l.buf, record...)
	// A failed or short write leaves a torn frame at offset; the next Append
	// overwrites it, so offset moves only on success.
	if _, err := l.file.WriteAt(l.buf, l.offset); err != nil {
		return fmt.Errorf("append to redo log: %w", err)
	}
	l.offset += int64(len(l.buf))
	return nil
}

// SizeBytes is the size of the newest segment; a store flushes when it grows large.
func (l *Log) SizeBytes() int64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.offset
}

// Rotate starts a new segment and returns the number of the one before it. A
// checkpoint calls Rotate in the same critical section in which it captures the
// changes it will make durable, and Release with the returned number afterwards.
func (l *Log) Rotate() (Segment, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.file == nil {
		return 0, kind.Errorf(kind.Unavailable, "redo log %s is closed", l.prefix)
	}
	before := l.current
	if err := l.rotateLocked(); err != nil {
		return 0, err
	}
	return before, nil
}

func (l *Log) rotateLocked() error {
	next := l.current + 1
	f, err := os.OpenFile(l.name(next), os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return fmt.Errorf("start redo segment: %w", err)
	}
	header := make([]byte, 0, headerBytes)
	header = append(header, magic...)
	header = binary.LittleEndian.AppendUint32(header, version)
	header = append(header, l.bootID...)
	if _, err := f.WriteAt(header, 0); err != nil {
		f.Close()
		os.Remove(f.Name())
		return fmt.Errorf("start redo segment: %w", err)
	}
	if l.file != nil {
		l.file.Close()
	}
	l.file, l.current, l.offset = f, next, int64(headerBytes)
	return nil
}

// Release removes segment s and those before it: what they say is durable elsewhere.
func (l *Log) Release(s Segment) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	for ; l.oldest <= s && l.oldest < l.current; l.oldest++ {
		if err := os.Remove(l.name(l.oldest)); err != nil && !os.IsNotExist(err) {
			return fmt.Errorf("release redo segment: %w", err)
		}
	}
	return nil
}

// Close closes the log and keeps its segments.
func (l *Log) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.file == nil {
		return nil
	}
	err := l.file.Close()
	l.file = nil
	return err
}

// Remove closes the log and deletes its segments.
func (l *Log) Remove() error {
	err := l.Close()
	segments, serr := l.segments()
	if err == nil {
		err = serr
	}
	for _, s := range segments {
		if rerr := os.Remove(l.name(s)); rerr != nil && err == nil {
			err = rerr
		}
	}
	return err
}

func (l *Log) name(s Segment) string { return l.prefix + "." + strconv.FormatUint(uint64(s), 10) }

func (l *Log) segments() ([]Segment, error) {
	entries, err := os.ReadDir(filepath.Dir(l.prefix))
	if err != nil {
		return nil, fmt.Errorf("list redo segments: %w", err)
	}
	base := filepath.Base(l.prefix) + "."
	var out []Segment
	for _, e := range entries {
		rest, ok := strings.CutPrefix(e.Name(), base)
		if !ok {
			continue
		}
		if n, err := strconv.ParseUint(rest, 10, 64); err == nil && n > 0 {
			out = append(out, Segment(n))
		}
	}
	sort.Slice(out, func(i, j int) bool { return out[i] < out[j] })
	return out, nil
}
