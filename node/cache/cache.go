package cache

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/target/bdev"
)

// Cache is an open cache. Its methods may be called concurrently.
type Cache struct {
	o       Options
	log     *slog.Logger
	dir     *os.File // locked
	data    file
	index   file
	unit    int // bytes
	recBuf  int // bytes of a record
	shards  []*shard
	scratch sync.Pool     // of *scratch
	buffers [21]sync.Pool // of *buffer, by the logarithm of their size

	// pausedUntil is when the disk is tried again after it failed a write, in Unix
	// nanoseconds; 0 while it works.
	pausedUntil atomic.Int64
	lastLoud    atomic.Int64 // when bad data was last logged

	count   count
	pace    pace
	metrics metrics

	mu      sync.Mutex
	closed  bool                 // guarded by mu
	devices map[*Device]struct{} // guarded by mu
}

// retryInterval is how long a disk that failed a write is left alone: long enough that
// trying costs nothing, short enough that a start soon after space was freed gains.
const retryInterval = 10 * time.Second

// loudInterval bounds how often bad data on the disk is logged.
const loudInterval = time.Minute

// Open opens the cache in o.Dir, making it if there is none. kind.InUse when another
// process has it, kind.Unsupported when a newer program made it, kind.Invalid when the
// directory holds somebody else's files. A damaged cache is made anew. The time it
// takes is that of reading the index, 0.2 % of the data.
func Open(o Options) (*Cache, error) {
	if err := o.Validate(); err != nil {
		return nil, err
	}
	o.ensureDefaults()
	c := &Cache{o: o, log: o.Logger, devices: map[*Device]struct{}{}}
	if err := c.open(); err != nil {
		return nil, errors.Join(err, c.closeFiles())
	}
	return c, nil
}

func (c *Cache) open() (err error) {
	if c.dir, err = lockDir(c.o.Dir); err != nil {
		return err
	}
	if err := c.openFiles(); err != nil {
		return err
	}
	c.scratch.New = func() any { return &scratch{unit: make([]byte, c.unit), record: make([]byte, c.recBuf)} }
	c.load()
	if err := c.metrics.register(c, c.o.Registerer); err != nil {
		return fmt.Errorf("open node cache %s: %w", c.o.Dir, err)
	}
	c.pace.start(c)
	return nil
}

// scratch is what one read of a slot, or one write, needs beside the caller's buffer.
type scratch struct {
	unit   []byte
	record []byte
}

// openFiles opens data and index, empty if what is there is of no use, and makes shards
// for them.
func (c *Cache) openFiles() error {
	have, err := header{}, error(nil)
	if c.o.openFile == nil {
		have, err = readHeader(c.o.Dir)
		if err != nil && !errors.Is(err, kind.NotFound) {
			return fmt.Errorf("open node cache %s: %w", c.o.Dir, err)
		}
	}
	c.unit = int(c.o.UnitBytes)
	if c.unit == 0 {
		c.unit = have.unitBytes
	}
	if c.unit == 0 {
		c.unit = DefaultUnitBytes
	}
	c.recBuf = recordBytes(c.unit)
	slots, err := c.slots()
	if err != nil {
		return err
	}
	open := c.o.openFile
	if open == nil {
		open = func(name string, sizeBytes int64) (file, error) { return openDisk(c.o.Dir, name, sizeBytes) }
	}
	indexBytes := headerBytes + int64(slots)*int64(c.recBuf)
	if c.index, err = open("index", indexBytes); err != nil {
		return err
	}
	if c.data, err = open("data", int64(slots)*int64(c.unit)); err != nil {
		return err
	}
	b := make([]byte, headerBytes)
	if err := c.index.ReadAt(b, 0); err != nil {
		return fmt.Errorf("open node cache %s: read index: %w", c.o.Dir, err)
	}
	have, err = decodeHeader(b)
	if err == nil && have.unitBytes == c.unit {
		return nil
	}
	if err != nil && !errors.Is(err, kind.NotFound) {
		return fmt.Errorf("open node cache %s: %w", c.o.Dir, err)
	}
	return c.format(indexBytes, int64(slots)*int64(c.unit))
}

// slots is how many slots fit, and makes their shards.
func (c *Cache) slots() (uint32, error) {
	size := c.o.SizeBytes
	if c.o.openFile == nil {
		limit, err := room(c.o.Dir)
		if err != nil {
			return 0, err
		}
		if limit < size {
			c.log.Warn("the node cache is smaller than configured, since its file system has no more room", "dir", c.o.Dir, "bytes", limit, "configured", size)
			size = max(limit, int64(minSlots*c.unit))
		}
	}
	n, shards := uint32(size/int64(c.unit)), uint32(1)
	if n >= 8*manyShards*groupUnits {
		shards = manyShards
		n -= n % (manyShards * groupUnits)
	}
	for i := range shards {
		c.shards = append(c.shards, newShard(i, shards, n/shards, c.unit))
	}
	return n, nil
}

// format makes the files those of an empty cache.
func (c *Cache) format(indexBytes, dataBytes int64) error {
	fail := func(err error) error { return fmt.Errorf("make node cache %s: %w", c.o.Dir, err) }
	if err := c.data.Punch(0, dataBytes); err != nil {
		return fail(err)
	}
	zeros := make([]byte, 1<<20)
	for at := int64(headerBytes); at < indexBytes; at += int64(len(zeros)) {
		if err := c.index.WriteAt(zeros[:min(int64(len(zeros)), indexBytes-at)], at); err != nil {
			return fail(err)
		}
	}
	if err := c.index.WriteAt(header{unitBytes: c.unit}.encode(), 0); err != nil {
		return fail(err)
	}
	return nil
}

// load fills the shards from the index. What cannot be read or believed is free.
func (c *Cache) load() {
	r := record{sums: make([]uint32, c.unit>>blockShift)}
	chunk := make([]byte, groupUnits*c.recBuf)
	failed := 0
	var first error
	for _, s := range c.shards {
		s.mu.Lock()
		for i := uint32(0); i < uint32(len(s.slots)); {
			n := min(groupUnits, uint32(len(s.slots))-i)
			b := chunk[:int(n)*c.recBuf]
			if err := c.index.ReadAt(b, c.recordAt(s, i)); err != nil {
				clear(b)
				if failed++; first == nil {
					first = err
				}
			}
			for ; n > 0; n-- {
				c.loadSlot(s, i, &r, b[:c.recBuf])
				i, b = i+1, b[c.recBuf:]
			}
		}
		s.mu.Unlock()
	}
	if failed > 0 {
		c.log.Warn("parts of the node cache's index cannot be read; they count as empty", "dir", c.o.Dir, "parts", failed, "err", first)
	}
}

func (c *Cache) loadSlot(s *shard, i uint32, r *record, b []byte) {
	if !decodeRecord(r, b, s.number(i), c.unit) {
		return
	}
	for ; s.fresh < i; s.fresh++ { // those before it hold nothing
		s.push(&s.free, s.fresh)
	}
	s.fresh = i + 1
	if c.shard(r.key) == s && s.find(r.key) == none {
		copy(s.sumsOf(i), r.sums)
		s.put(i, r.key, r.bytes, flagHasRecord, true)
		return
	}
	s.slots[i].bits = flagHasRecord
	s.push(&s.free, i)
}

// shard is where k belongs.
func (c *Cache) shard(k key) *shard {
	if len(c.shards) == 1 {
		return c.shards[0]
	}
	return c.shards[mix(key{k.hi, k.lo / groupUnits})>>40%uint64(len(c.shards))]
}

func (c *Cache) recordAt(s *shard, i uint32) int64 {
	return headerBytes + int64(s.number(i))*int64(c.recBuf)
}

func (c *Cache) dataAt(s *shard, i uint32) int64 { return int64(s.number(i)) * int64(c.unit) }

// Device returns a read-only device that shows what remote shows and keeps what m lets
// it. It closes remote, at once if this fails: kind.Invalid when m does not describe a
// device of remote's size, kind.Unavailable when the cache is closed.
func (c *Cache) Device(remote bdev.Device, m Map) (*Device, error) {
	l, err := newLayout(m, remote.SizeBytes(), int64(c.unit))
	if err == nil {
		d := &Device{c: c, remote: remote, layout: l}
		if err = c.enlist(d); err == nil {
			return d, nil
		}
	}
	return nil, errors.Join(fmt.Errorf("node cache: %w", err), remote.Close())
}

func (c *Cache) enlist(d *Device) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return kind.Errorf(kind.Unavailable, "%s is closed", c.o.Dir)
	}
	c.devices[d] = struct{}{}
	return nil
}

// Close closes all devices and the cache. It waits for reads, which closing their
// remotes ends. A second Close does nothing.
func (c *Cache) Close() error {
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		return nil
	}
	c.closed = true
	devices := make([]*Device, 0, len(c.devices))
	for d := range c.devices {
		devices = append(devices, d)
	}
	c.mu.Unlock()
	var errs []error
	for _, d := range devices {
		errs = append(errs, d.Close())
	}
	c.pace.stop()
	c.metrics.unregister()
	return errors.Join(append(errs, c.closeFiles())...)
}

func (c *Cache) closeFiles() error {
	var errs []error
	if c.index != nil {
		errs = append(errs, c.index.Close())
	}
	if c.data != nil {
		errs = append(errs, c.data.Close())
	}
	if c.dir != nil {
		errs = append(errs, c.dir.Close())
	}
	return errors.Join(errs...)
}

// Prune evicts until at most keepBytes are left and gives the space back. What is being
// read stays. It returns how much went.
func (c *Cache) Prune(keepBytes int64) (freedBytes int64, err error) {
	if keepBytes < 0 {
		return 0, kind.Errorf(kind.Invalid, "prune node cache: keep %d bytes", keepBytes)
	}
	for _, s := range c.shards {
		n, err := c.pruneShard(s, keepBytes/int64(len(c.shards)))
		freedBytes += n
		if err != nil {
			return freedBytes, fmt.Errorf("prune node cache %s: %w", c.o.Dir, err)
		}
	}
	return freedBytes, nil
}

func (c *Cache) pruneShard(s *shard, keepBytes int64) (freed int64, err error) {
	// Each round evicts one slot, so this ends even if others fill meanwhile.
	for range len(s.slots) {
		s.mu.Lock()
		if s.count.bytes <= keepBytes {
			s.mu.Unlock()
			return freed, nil
		}
		before := s.count.bytes
		i, ok := s.evict()
		freed += before - s.count.bytes
		s.mu.Unlock()
		if !ok {
			return freed, nil // reads hold the rest
		}
		err := c.clearSlot(s, i)
		s.giveBack(i, err != nil)
		if err != nil {
			return freed, err
		}
	}
	return freed, nil
}

// clearSlot makes a slot that the caller owns hold nothing on disk.
func (c *Cache) clearSlot(s *shard, i uint32) error {
	if err := c.index.WriteAt(make([]byte, c.recBuf), c.recordAt(s, i)); err != nil {
		return err
	}
	return c.data.Punch(c.dataAt(s, i), int64(c.unit))
}
