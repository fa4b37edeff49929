package ublk

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/thaw-project/thaw/target/ublk"
)

var (
	descDisks    = prometheus.NewDesc("thaw_ublk_disks", "Disks presented with ublk.", nil, nil)
	descWaiting  = prometheus.NewDesc("thaw_ublk_disks_waiting", "Disks of a process before this one that are not taken over yet: their users wait.", nil, nil)
	descRequests = prometheus.NewDesc("thaw_ublk_requests", "Requests of the disks there are, by operation.", []string{"op"}, nil)
	descErrors   = prometheus.NewDesc("thaw_ublk_errors", "Requests of the disks there are that were answered with an error.", nil, nil)
	descBytes    = prometheus.NewDesc("thaw_ublk_bytes", "Bytes of the disks there are, read and written.", []string{"direction"}, nil)
)

// collector speaks Prometheus when asked. What it counts is of the disks there are, so
// that it goes back when one is withdrawn: gauges.
type collector struct{ p *Presenter }

// Describe implements prometheus.Collector.
func (c collector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{descDisks, descWaiting, descRequests, descErrors, descBytes} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (c collector) Collect(ch chan<- prometheus.Metric) {
	var servers []*ublk.Server
	waiting := 0
	c.p.mu.Lock()
	disks := len(c.p.disks)
	for _, d := range c.p.disks {
		d.mu.Lock()
		if d.server != nil {
			servers = append(servers, d.server)
		} else {
			waiting++
		}
		d.mu.Unlock()
	}
	c.p.mu.Unlock()
	var reads, writes, flushes, discards, failed, in, out int64
	for _, s := range servers {
		st := s.Stats()
		reads += st.Reads.Load()
		writes += st.Writes.Load()
		flushes += st.Flushes.Load()
		discards += st.Discards.Load()
		failed += st.Errors.Load()
		in += st.BytesRead.Load()
		out += st.BytesWritten.Load()
	}
	gauge := func(d *prometheus.Desc, n int64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, float64(n), labels...)
	}
	gauge(descDisks, int64(disks))
	gauge(descWaiting, int64(waiting))
	gauge(descRequests, reads, "read")
	gauge(descRequests, writes, "write")
	gauge(descRequests, flushes, "flush")
	gauge(descRequests, discards, "discard")
	gauge(descErrors, failed)
	gauge(descBytes, in, "read")
	gauge(descBytes, out, "write")
}
