package fuse

import (
	"math/bits"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// metrics counts with plain atomics, since it is on the path of every request, and
// speaks Prometheus only when asked.
type metrics struct {
	requests     [opcodeCount]atomic.Int64
	errors       [opcodeCount]atomic.Int64
	bytesRead    atomic.Int64
	bytesWritten atomic.Int64
	latency      [len(latencyOps)]histogram
}

// latencyOps are the operations whose latency is worth knowing.
var latencyOps = [...]opcode{opRead, opWrite, opFsync, opFallocate}

// histogram has buckets of powers of two of microseconds: bucket i counts what took
// less than 2^(i+3) us, so the first ends at 8 us and the last but one at 4.2 s.
type histogram struct {
	buckets [21]atomic.Int64
	sumNs   atomic.Int64
}

func (h *histogram) observe(d time.Duration) {
	i := max(0, bits.Len64(uint64(d.Microseconds()))-3)
	h.buckets[min(i, len(h.buckets)-1)].Add(1)
	h.sumNs.Add(int64(d))
}

var (
	descRequests = prometheus.NewDesc("thaw_fuse_requests_total", "Requests from the kernel.", []string{"op"}, nil)
	descErrors   = prometheus.NewDesc("thaw_fuse_errors_total", "Requests answered with an error of the device or the request.", []string{"op"}, nil)
	descBytes    = prometheus.NewDesc("thaw_fuse_bytes_total", "Bytes read and written.", []string{"direction"}, nil)
	descLatency  = prometheus.NewDesc("thaw_fuse_request_seconds", "Time from reading a request to its reply.", []string{"op"}, nil)
)

func newMetrics() *metrics { return new(metrics) }

// done counts one request. ENOSYS and ENOENT are how a file system says no, and are
// not counted as errors.
func (m *metrics) done(op opcode, errno syscall.Errno, start time.Time) {
	if op >= opcodeCount || opcodeNames[op] == "" {
		op = 0
	}
	m.requests[op].Add(1)
	if errno != 0 && errno != syscall.ENOSYS && errno != syscall.ENOENT {
		m.errors[op].Add(1)
	}
	for i, o := range latencyOps {
		if o == op {
			m.latency[i].observe(time.Since(start))
		}
	}
}

// Describe implements prometheus.Collector.
func (m *metrics) Describe(ch chan<- *prometheus.Desc) {
	ch <- descRequests
	ch <- descErrors
	ch <- descBytes
	ch <- descLatency
}

// Collect implements prometheus.Collector.
func (m *metrics) Collect(ch chan<- prometheus.Metric) {
	for op, name := range opcodeNames {
		if name == "" {
			continue
		}
		if n := m.requests[op].Load(); n > 0 {
			ch <- prometheus.MustNewConstMetric(descRequests, prometheus.CounterValue, float64(n), name)
		}
		if n := m.errors[op].Load(); n > 0 {
			ch <- prometheus.MustNewConstMetric(descErrors, prometheus.CounterValue, float64(n), name)
		}
	}
	ch <- prometheus.MustNewConstMetric(descBytes, prometheus.CounterValue, float64(m.bytesRead.Load()), "read")
	ch <- prometheus.MustNewConstMetric(descBytes, prometheus.CounterValue, float64(m.bytesWritten.Load()), "write")
	for i, op := range latencyOps {
		h := &m.latency[i]
		buckets, total := make(map[float64]uint64), uint64(0)
		for b := range h.buckets {
			total += uint64(h.buckets[b].Load())
			if b < len(h.buckets)-1 {
				buckets[float64(uint64(8)<<b)/1e6] = total
			}
		}
		if total > 0 {
			ch <- prometheus.MustNewConstHistogram(descLatency, total, float64(h.sumNs.Load())/1e9, buckets, opcodeNames[op])
		}
	}
}
