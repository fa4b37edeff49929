package daemon

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/thaw-project/thaw/lvol"
)

var (
	poolBytes = prometheus.NewDesc("thaw_pool_bytes", "Size of the pool.", nil, nil)
	freeBytes = prometheus.NewDesc("thaw_pool_free_bytes", "Free space of the pool.", nil, nil)
	lvolCount = prometheus.NewDesc("thaw_lvols", "Logical volumes in the pool.", nil, nil)

	exportBlocks = prometheus.NewDesc("thaw_export_attachments", "Blocks that nodes have attached, each counted once for each node.", nil, nil)
	exportNodes  = prometheus.NewDesc("thaw_export_nodes", "Nodes that have blocks attached.", nil, nil)
	exportConns  = prometheus.NewDesc("thaw_export_connections", "Open connections of nodes.", nil, nil)
)

// storeCollector reads the pool's figures when Prometheus asks.
type storeCollector struct{ store interface{ Stat() lvol.Stat } }

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

// exportCollector reads what nodes have attached.
type exportCollector struct{ exporter counted }

// counted is an exporter that knows what goes through it.
type counted interface {
	Attached() (nodes, blocks int)
	Connections() int
}

func (c exportCollector) Describe(ch chan<- *prometheus.Desc) {
	ch <- exportBlocks
	ch <- exportNodes
	ch <- exportConns
}

func (c exportCollector) Collect(ch chan<- prometheus.Metric) {
	nodes, blocks := c.exporter.Attached()
	gauge := func(d *prometheus.Desc, v int) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, float64(v))
	}
	gauge(exportBlocks, blocks)
	gauge(exportNodes, nodes)
	gauge(exportConns, c.exporter.Connections())
}
