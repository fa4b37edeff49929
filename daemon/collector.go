package daemon

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/thaw-project/thaw/lvol"
)

var (
	poolBytes = prometheus.NewDesc("thaw_pool_bytes", "Size of the pool.", nil, nil)
	freeBytes = prometheus.NewDesc("thaw_pool_free_bytes", "Free space of the pool.", nil, nil)
	lvolCount = prometheus.NewDesc("thaw_lvols", "Logical volumes in the pool.", nil, nil)
)

// storeCollector reads the pool's figures when Prometheus asks.
type storeCollector struct{ store *lvol.Store }

func (c storeCollector) Describe(ch chan<- *prometheus.Desc) {
	ch <- poolBytes
	ch <- freeBytes
	ch <- lvolCount
}

func (c storeCollector) Collect(ch chan<- prometheus.Metric) {
	s := c.store.Stat()
	gauge := func(d *prometheus.Desc, v float64) { ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v) }
	gauge(poolBytes, float64(s.TotalClusters*s.ClusterBytes))
	gauge(freeBytes, float64(s.FreeClusters*s.ClusterBytes))
	gauge(lvolCount, float64(s.Lvols))
}
