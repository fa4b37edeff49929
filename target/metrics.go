package target

import (
	"github.com/prometheus/client_golang/prometheus"
)

var (
	descBdevs       = prometheus.NewDesc("thaw_target_bdevs", "Bdevs, by product.", []string{"product"}, nil)
	descFree        = prometheus.NewDesc("thaw_target_lvstore_free_bytes", "Free space of an lvstore.", []string{"lvstore"}, nil)
	descSize        = prometheus.NewDesc("thaw_target_lvstore_size_bytes", "Size of an lvstore.", []string{"lvstore"}, nil)
	descSubsystems  = prometheus.NewDesc("thaw_target_subsystems", "NVMe-oF subsystems, without discovery.", nil, nil)
	descControllers = prometheus.NewDesc("thaw_target_controllers", "Controllers of connected hosts.", nil, nil)
	descConnections = prometheus.NewDesc("thaw_target_connections", "NVMe/TCP connections.", nil, nil)
	descPending     = prometheus.NewDesc("thaw_target_pending_objects", "Objects on record that could not be restored yet.", nil, nil)
)

// Describe implements prometheus.Collector.
func (t *Target) Describe(c chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{descBdevs, descFree, descSize, descSubsystems, descControllers, descConnections, descPending} {
		c <- d
	}
}

// Collect implements prometheus.Collector.
func (t *Target) Collect(c chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, v int64, labels ...string) {
		c <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, float64(v), labels...)
	}
	products := map[string]int64{"AIO disk": 0, "Malloc disk": 0, "Null disk": 0, "Logical Volume": 0, "NVMe disk": 0}
	t.mu.RLock()
	for _, d := range t.disks {
		products[d.product]++
	}
	tg := t.nvmf
	t.mu.RUnlock()
	for p, n := range products {
		gauge(descBdevs, n, p)
	}
	for _, s := range t.listStores() {
		st := s.store.Stat()
		gauge(descFree, st.FreeClusters*st.ClusterBytes, s.named())
		gauge(descSize, st.TotalClusters*st.ClusterBytes, s.named())
	}
	controllers := 0
	subsystems := tg.Subsystems()
	for _, s := range subsystems {
		controllers += len(s.Controllers)
	}
	gauge(descSubsystems, int64(len(subsystems)))
	gauge(descControllers, int64(controllers))
	gauge(descConnections, int64(tg.Connections()))
	t.admin.Lock()
	pending := len(t.pending)
	t.admin.Unlock()
	gauge(descPending, int64(pending))
}
