package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/bits"
	"math/rand/v2"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/thaw-project/thaw/nvme/host"
)

// loadReport is what "bench load" prints.
type loadReport struct {
	IOPS     float64
	All      float64 // operations, those of the ramp included
	P50, P99 float64 // us
}

// ramp is what a load runs before its figures count.
const ramp = 200 * time.Millisecond

func contextTimeout() (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.Background(), 10*time.Second)
}

// load is the program "bench load": our host, in a process of its own, doing one
// pattern on the first nvmeNamespace of a target.
func load(args []string) (err error) {
	f := flag.NewFlagSet("load", flag.ContinueOnError)
	portal := f.String("portal", "", "address of the target")
	size := f.Int("bytes", 4096, "of one operation")
	depth := f.Int("depth", 1, "operations at a time; 0 idles after some")
	queues := f.Int("queues", 1, "I/O queues")
	write := f.Bool("write", false, "write, not read")
	sequential := f.Bool("sequential", false, "one after the other, not at random")
	duration := f.Duration("time", time.Second, "for how long, after the ramp")
	profile := f.String("profile", "", "file for a CPU profile")
	if err := f.Parse(args); err != nil {
		return err
	}
	stop, err := profileTo(*profile)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, stop()) }()
	ctx, cancel := contextTimeout()
	defer cancel()
	h, err := host.Connect(ctx, host.Config{Portals: []string{*portal}, SubNQN: benchNQN, Depth: max(*depth+1, 4), Queues: *queues})
	if err != nil {
		return err
	}
	defer h.Close()
	d, err := h.Open(1)
	if err != nil {
		return err
	}
	l := &loader{d: d, bytes: *size, write: *write, sequential: *sequential, places: d.SizeBytes() / int64(*size)}
	report, err := l.run(*depth, *duration)
	if err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(report)
}

// loader runs one pattern on a device.
type loader struct {
	d                 *host.Device
	bytes             int
	write, sequential bool
	places            int64
	next              atomic.Int64 // of a sequential pattern
	done              atomic.Int64
}

func (l *loader) run(depth int, duration time.Duration) (loadReport, error) {
	if depth == 0 {
		begin := time.Now()
		var times histogram
		err := l.worker(0, begin, begin.Add(ramp/2), &times)
		time.Sleep(time.Until(begin.Add(ramp + duration)))
		return loadReport{}, err
	}
	times := make([]histogram, depth)
	errs := make([]error, depth)
	begin := time.Now().Add(ramp)
	end := begin.Add(duration)
	var workers sync.WaitGroup
	for w := range depth {
		workers.Go(func() { errs[w] = l.worker(w, begin, end, &times[w]) })
	}
	workers.Wait()
	var all histogram
	for i := range times {
		all.add(&times[i])
	}
	return loadReport{float64(all.n) / duration.Seconds(), float64(l.done.Load()), all.quantile(0.5) / 1e3, all.quantile(0.99) / 1e3}, errors.Join(errs...)
}

func (l *loader) worker(w int, begin, end time.Time, times *histogram) error {
	random := rand.New(rand.NewPCG(uint64(w), 1))
	p := make([]byte, l.bytes)
	for i := range p {
		p[i] = byte(random.Uint32())
	}
	done := int64(0)
	defer func() { l.done.Add(done) }()
	for last := time.Now(); last.Before(end); done++ {
		place := int64(0)
		if l.sequential {
			place = (l.next.Add(1) - 1) % l.places
		} else {
			place = random.Int64N(l.places)
		}
		var err error
		if l.write {
			_, err = l.d.WriteAt(p, place*int64(l.bytes))
		} else {
			_, err = l.d.ReadAt(p, place*int64(l.bytes))
		}
		if err != nil && err != io.EOF {
			return fmt.Errorf("at %d: %w", place*int64(l.bytes), err)
		}
		now := time.Now()
		if !last.Before(begin) && !now.After(end) {
			times.record(now.Sub(last))
		}
		last = now
	}
	return nil
}

// histogram counts durations in steps of at most 1.6 %.
type histogram struct {
	n       uint64
	buckets [64 << histogramBits]uint64
}

const histogramBits = 6

func (h *histogram) record(d time.Duration) {
	v := uint64(max(d, 0))
	i := v
	if shift := bits.Len64(v) - histogramBits - 1; shift > 0 {
		i = uint64(shift)<<histogramBits + v>>shift
	}
	h.n++
	h.buckets[i]++
}

func (h *histogram) add(o *histogram) {
	h.n += o.n
	for i, n := range o.buckets {
		h.buckets[i] += n
	}
}

// quantile is the duration in ns that a share q of all does not exceed.
func (h *histogram) quantile(q float64) float64 {
	left := uint64(q * float64(h.n))
	for i, n := range h.buckets {
		if left < n {
			if shift := i>>histogramBits - 1; shift > 0 {
				return float64((uint64(i) - uint64(shift)<<histogramBits) << shift)
			}
			return float64(i)
		}
		left -= n
	}
	return 0
}
