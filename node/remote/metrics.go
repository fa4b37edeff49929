package remote

import (
	"errors"
	"io"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// metrics are those of all targets together: a node has few, and users look at the
// whole first.
type metrics struct {
	bytes, reads, failures, connects prometheus.Counter
	latency                          prometheus.Histogram
}

func newMetrics() *metrics {
	counter := func(name, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Name: "thaw_remote_" + name, Help: help})
	}
	return &metrics{
		bytes:    counter("read_bytes_total", "Bytes read from remote targets."),
		reads:    counter("reads_total", "Reads from remote targets."),
		failures: counter("read_failures_total", "Reads from remote targets that failed, after all waiting."),
		connects: counter("connects_total", "First connections to the subsystem of a remote target."),
		latency: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "thaw_remote_read_seconds", Help: "Duration of reads from remote targets.",
			Buckets: prometheus.ExponentialBuckets(50e-6, 4, 12), // 50 us to 200 s
		}),
	}
}

func (m *metrics) all() []prometheus.Collector {
	return []prometheus.Collector{m.bytes, m.reads, m.failures, m.connects, m.latency}
}

// Describe implements prometheus.Collector.
func (m *metrics) Describe(ch chan<- *prometheus.Desc) {
	for _, c := range m.all() {
		c.Describe(ch)
	}
}

// Collect implements prometheus.Collector.
func (m *metrics) Collect(ch chan<- prometheus.Metric) {
	for _, c := range m.all() {
		c.Collect(ch)
	}
}

func (m *metrics) read(n int, err error, took time.Duration) {
	m.reads.Inc()
	m.bytes.Add(float64(n))
	m.latency.Observe(took.Seconds())
	if err != nil && !errors.Is(err, io.EOF) {
		m.failures.Inc()
	}
}
