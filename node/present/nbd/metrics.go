package nbd

import "github.com/prometheus/client_golang/prometheus"

var (
	descDisks      = prometheus.NewDesc("thaw_nbd_disks", "Disks presented with nbd.", nil, nil)
	descLost       = prometheus.NewDesc("thaw_nbd_disks_lost", "Disks whose device somebody else disconnected.", nil, nil)
	descReconnects = prometheus.NewDesc("thaw_nbd_reconnects_total", "Connections given to the kernel in place of dead ones.", nil, nil)
)

// collector speaks Prometheus when asked.
type collector struct{ p *Presenter }

// Describe implements prometheus.Collector.
func (c collector) Describe(ch chan<- *prometheus.Desc) {
	ch <- descDisks
	ch <- descLost
	ch <- descReconnects
}

// Collect implements prometheus.Collector.
func (c collector) Collect(ch chan<- prometheus.Metric) {
	lost := 0
	c.p.mu.Lock()
	disks := len(c.p.disks)
	for _, d := range c.p.disks {
		if d.lost.Load() {
			lost++
		}
	}
	c.p.mu.Unlock()
	ch <- prometheus.MustNewConstMetric(descDisks, prometheus.GaugeValue, float64(disks))
	ch <- prometheus.MustNewConstMetric(descLost, prometheus.GaugeValue, float64(lost))
	ch <- prometheus.MustNewConstMetric(descReconnects, prometheus.CounterValue, float64(c.p.reconnects.Load()))
}
