package card

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	attacherv1 "github.com/thaw-project/thaw/api/attacher/v1"
	"github.com/thaw-project/thaw/spdk"
)

const benchDisks = 200

// benchLab is a card that shows benchDisks disks, and the ids of 32 more that it may show.
func benchLab(b *testing.B) (l *lab, c *Card, s *store, more []string) {
	var ids []string
	for i := range benchDisks + 32 {
		ids = append(ids, fmt.Sprintf("d%03d", i))
	}
	s = newStore(b, 1, ids...)
	l = newLab(b, benchDisks+32)
	l.o.Interval = DefaultInterval
	l.functions.Check = nil
	c = l.card()
	var wg sync.WaitGroup
	work := make(chan string)
	for range 8 {
		wg.Go(func() {
			for id := range work {
				if _, err := c.AttachDisk(context.Background(), fromStore(s, id)); err != nil {
					b.Error(err)
				}
			}
		})
	}
	for _, id := range ids[:benchDisks] {
		work <- id
	}
	close(work)
	wg.Wait()
	return l, c, s, ids[benchDisks:]
}

func report(b *testing.B, what string, times []time.Duration) {
	slices.Sort(times)
	ms := func(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }
	b.ReportMetric(ms(times[len(times)/2]), what+"-p50-ms")
	b.ReportMetric(ms(times[len(times)*99/100]), what+"-p99-ms")
}

// cpu is the processor time that this process has had: what counts where others run too.
func cpu() time.Duration {
	var u syscall.Rusage
	if syscall.Getrusage(syscall.RUSAGE_SELF, &u) != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// BenchmarkAttach attaches and detaches disks while benchDisks others are shown.
func BenchmarkAttach(b *testing.B) {
	_, c, s, ids := benchLab(b)
	for _, callers := range []int{1, 32} {
		b.Run(fmt.Sprintf("callers=%d", callers), func(b *testing.B) {
			var mu sync.Mutex
			var attaches, detaches []time.Duration
			steps := map[string][]time.Duration{}
			var left atomic.Int64
			left.Store(int64(b.N))
			had := cpu()
			var wg sync.WaitGroup
			for _, id := range ids[:callers] {
				wg.Go(func() {
					for left.Add(-1) >= 0 {
						began := time.Now()
						d, err := c.AttachDisk(context.Background(), fromStore(s, id))
						took := time.Since(began)
						if err != nil {
							b.Error(err)
							return
						}
						began = time.Now()
						_, err = c.DetachDisk(context.Background(), &attacherv1.DetachDiskRequest{Id: id, Purpose: block})
						if err != nil {
							b.Error(err)
							return
						}
						mu.Lock()
						attaches, detaches = append(attaches, took), append(detaches, time.Since(began))
						for _, st := range d.Steps {
							steps[st.Step] = append(steps[st.Step], time.Duration(st.Nanos))
						}
						mu.Unlock()
					}
				})
			}
			wg.Wait()
			b.ReportMetric(float64((cpu()-had).Microseconds())/1000/float64(b.N), "cpu-ms/op")
			report(b, "attach", attaches)
			report(b, "detach", detaches)
			for name, times := range steps {
				slices.Sort(times)
				b.ReportMetric(float64(times[len(times)/2].Microseconds())/1000, name+"-ms")
			}
		})
	}
}

// BenchmarkList lists the disks.
func BenchmarkList(b *testing.B) {
	_, c, _, _ := benchLab(b)
	for b.Loop() {
		if _, err := c.ListDisks(context.Background(), &attacherv1.ListDisksRequest{}); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkRound compares what the target has with what is on record, and finds nothing to
// do.
func BenchmarkRound(b *testing.B) {
	_, c, _, _ := benchLab(b)
	had := cpu()
	for b.Loop() {
		if err := c.converge(context.Background()); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64((cpu()-had).Microseconds())/1000/float64(b.N), "cpu-ms/op")
}

// BenchmarkRepair shows all disks again after the target lost them.
func BenchmarkRepair(b *testing.B) {
	l, c, _, _ := benchLab(b)
	list, err := c.ListDisks(context.Background(), &attacherv1.ListDisksRequest{})
	check(b, err)
	var times []time.Duration
	for b.Loop() {
		b.StopTimer()
		controllers, err := l.spdk.BdevNVMeGetControllers(context.Background(), "")
		check(b, err)
		for _, d := range list.Disks {
			check(b, l.spdk.NvmfDeleteSubsystem(context.Background(), d.SubsystemNqn))
		}
		for _, r := range controllers {
			check(b, l.spdk.BdevNVMeDetachController(context.Background(), r.Name, spdk.TransportID{}))
		}
		l.functions.Reset()
		b.StartTimer()
		began := time.Now()
		for len(l.functions.Shown()) != benchDisks {
			time.Sleep(time.Millisecond)
		}
		times = append(times, time.Since(began))
	}
	report(b, "repair", times)
}
