package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"path/filepath"
	"sync"
	"time"

	"github.com/thaw-project/thaw/lvol"
	"github.com/thaw-project/thaw/lvol/device"
)

const (
	// ioBytes is the size of the file and of each lvol: well within the page cache,
	// so that what differs is the code and not the disk.
	ioBytes = 256 << 20
	// ioTime is how long one run lasts.
	ioTime = 400 * time.Millisecond
)

// poolIO is a pool in this process and a raw file beside it, both filled.
type poolIO struct {
	raw   *device.File
	store *lvol.Store
	plain *lvol.Lvol
}

// blockIO is what a run reads and writes.
type blockIO interface {
	ReadAt(p []byte, off int64) (int, error)
	WriteAt(p []byte, off int64) (int, error)
	Flush() error
}

// rawIO is the floor: the same device code that the pool uses, without the pool.
type rawIO struct{ d *device.File }

func (r rawIO) ReadAt(p []byte, off int64) (int, error)  { return len(p), r.d.ReadAt(p, off) }
func (r rawIO) WriteAt(p []byte, off int64) (int, error) { return len(p), r.d.WriteAt(p, off) }
func (r rawIO) Flush() error                             { return r.d.Sync() }

// pattern is a way to use a disk.
type pattern struct {
	name    string
	bytes   int
	write   bool
	random  bool
	flush   bool // after each write
	workers int
}

var patterns = []pattern{
	{"randread-4k", 4 << 10, false, true, false, 1},
	{"randread-4k-8", 4 << 10, false, true, false, 8},
	{"randwrite-4k", 4 << 10, true, true, false, 1},
	{"randwrite-4k-8", 4 << 10, true, true, false, 8},
	{"randwrite-4k-flush", 4 << 10, true, true, true, 1},
	{"randwrite-4k-flush-8", 4 << 10, true, true, true, 8},
	{"read-128k", 128 << 10, false, false, false, 1},
	{"write-128k", 128 << 10, true, false, false, 1},
}

func (b *bench) lvols() (all []comparison) {
	for _, p := range patterns {
		m := metric{"", "IOPS", true, 0}
		if p.bytes > 4<<10 {
			m.unit = "MiB/s"
		}
		measure := func(open func(*poolIO) (blockIO, func() error, error)) func(context.Context) (sample, error) {
			return func(ctx context.Context) (_ sample, err error) {
				pool, err := b.poolIO()
				if err != nil {
					return nil, err
				}
				io, done, err := open(pool)
				if err != nil {
					return nil, err
				}
				defer func() { err = errors.Join(err, done()) }()
				if err := settle(); err != nil {
					return nil, err
				}
				perSecond, err := p.run(ctx, io)
				if m.unit == "MiB/s" {
					perSecond *= float64(p.bytes) / (1 << 20)
				}
				return sample{"": perSecond}, err
			}
		}
		nothing := func() error { return nil }
		all = append(all, comparison{
			name: "lvol-" + p.name, about: p.about(), rounds: 7, warmUp: true,
			metrics: []metric{m},
			subjects: []subject{
				{"raw", measure(func(p *poolIO) (blockIO, func() error, error) { return rawIO{p.raw}, nothing, nil })},
				{"lvol", measure(func(p *poolIO) (blockIO, func() error, error) { return p.plain, nothing, nil })},
				{"clone", measure(func(pool *poolIO) (blockIO, func() error, error) { return pool.clone(b.next("clone")) })},
			},
		})
	}
	return all
}

func (p pattern) about() string {
	what := "reads"
	if p.write {
		what = "writes"
	}
	order := "sequential"
	if p.random {
		order = "random"
	}
	text := fmt.Sprintf("%s %s of %d KiB", order, what, p.bytes>>10)
	if p.flush {
		text += ", each made durable"
	}
	return fmt.Sprintf("%s, %d at a time, on a raw file, an lvol, and a new clone of its snapshot; page cache warm", text, p.workers)
}

// run does p for ioTime and returns operations per second.
func (p pattern) run(ctx context.Context, disk blockIO) (float64, error) {
	begin := time.Now()
	deadline := begin.Add(ioTime)
	counts, errs := make([]int, p.workers), make([]error, p.workers)
	var workers sync.WaitGroup
	for w := range p.workers {
		workers.Go(func() { counts[w], errs[w] = p.worker(ctx, disk, w, deadline) })
	}
	workers.Wait()
	took := time.Since(begin).Seconds()
	total := 0
	for _, n := range counts {
		total += n
	}
	return float64(total) / took, errors.Join(errs...)
}

func (p pattern) worker(ctx context.Context, disk blockIO, worker int, deadline time.Time) (n int, err error) {
	random := rand.New(rand.NewPCG(uint64(worker), 1))
	buf := make([]byte, p.bytes)
	for i := range buf {
		buf[i] = byte(random.Uint32())
	}
	places := int64(ioBytes / p.bytes)
	for place := int64(0); ctx.Err() == nil; n++ {
		// The clock costs as much as a small read of cached data.
		if (n%16 == 0 || p.flush) && time.Now().After(deadline) {
			return n, nil
		}
		if p.random {
			place = random.Int64N(places)
		} else {
			place = (place + 1) % places
		}
		if p.write {
			_, err = disk.WriteAt(buf, place*int64(p.bytes))
		} else {
			_, err = disk.ReadAt(buf, place*int64(p.bytes))
		}
		if err == nil && p.flush {
			err = disk.Flush()
		}
		if err != nil {
			return n, err
		}
	}
	return n, context.Cause(ctx)
}

// poolIO makes the pool, with a server's options, and the raw file.
func (b *bench) poolIO() (*poolIO, error) {
	return b.pool.get(func() (_ *poolIO, err error) {
		dir, err := b.lab.Path("pool", "meta.db")
		if err != nil {
			return nil, err
		}
		dir = filepath.Dir(dir)
		p := &poolIO{}
		raw := filepath.Join(b.lab.Dir, "raw")
		if p.raw, err = device.CreateFile(raw, ioBytes); err != nil {
			return nil, err
		}
		if err := fill(rawIO{p.raw}); err != nil {
			return nil, err
		}
		if err := lvol.Create(lvol.CreateOptions{Dir: dir, CapacityBytes: 16 * ioBytes}); err != nil {
			return nil, err
		}
		if p.store, err = lvol.Open(lvol.Options{Dir: dir}); err != nil {
			return nil, err
		}
		for _, name := range []string{"plain", "parent"} {
			if _, err := p.store.Create(name, ioBytes); err != nil {
				return nil, err
			}
			l, err := p.store.OpenLvol(name, false)
			if err != nil {
				return nil, err
			}
			if err := fill(l); err != nil {
				return nil, err
			}
			if name == "plain" {
				p.plain = l
			} else if err := l.Close(); err != nil {
				return nil, err
			}
		}
		_, err = p.store.Snapshot("parent", "snapshot")
		return p, err
	})
}

func fill(disk blockIO) error {
	if err := fillBytes(disk, ioBytes); err != nil {
		return err
	}
	return disk.Flush()
}

// fillBytes writes random bytes.
func fillBytes(disk io.WriterAt, sizeBytes int64) error {
	random := rand.NewChaCha8([32]byte{1})
	// A cluster of the pool at a time: how large the pieces of a file were written
	// decides how large the folios are in which the kernel caches it, and that how
	// fast small writes are.
	buf := make([]byte, lvol.DefaultClusterBytes)
	for off := int64(0); off < sizeBytes; off += int64(len(buf)) {
		if _, err := random.Read(buf); err != nil {
			return err
		}
		if _, err := disk.WriteAt(buf, off); err != nil {
			return err
		}
	}
	return nil
}

// clone makes a new clone of the snapshot, which shares all of its clusters until it
// writes them.
func (p *poolIO) clone(name string) (blockIO, func() error, error) {
	if _, err := p.store.Clone("snapshot", name); err != nil {
		return nil, nil, err
	}
	l, err := p.store.OpenLvol(name, false)
	if err != nil {
		return nil, nil, err
	}
	return l, func() error { return errors.Join(l.Close(), p.store.Delete(name)) }, nil
}

// close ends the pool. Its folder goes with the lab's.
func (p *poolIO) close() error {
	if p == nil {
		return nil
	}
	var errs []error
	if p.plain != nil {
		errs = append(errs, p.plain.Close())
	}
	if p.store != nil {
		errs = append(errs, p.store.Close())
	}
	if p.raw != nil {
		errs = append(errs, p.raw.Close())
	}
	return errors.Join(errs...)
}
