package fabrics

import "github.com/prometheus/client_golang/prometheus"

var (
	descDisks       = prometheus.NewDesc("thaw_fabrics_disks", "Disks presented with nvme-fabrics.", nil, nil)
	descControllers = prometheus.NewDesc("thaw_fabrics_controllers", "Controllers of these disks, by what the kernel says of them.", []string{"state"}, nil)
)

// collector speaks Prometheus when asked.
type collector struct{ p *Presenter }

// Describe implements prometheus.Collector.
func (c collector) Describe(ch chan<- *prometheus.Desc) {
	ch <- descDisks
	ch <- descControllers
}

// Collect implements prometheus.Collector.
func (c collector) Collect(ch chan<- prometheus.Metric) {
	c.p.mu.Lock()
	disks, links := len(c.p.records), c.p.links // links are never changed once they are there
	c.p.mu.Unlock()
	ch <- prometheus.MustNewConstMetric(descDisks, prometheus.GaugeValue, float64(disks))
	states := make(map[string]int)
	list, _ := controllers(c.p.options.driver.Sys())
	for _, ctrl := range list {
		if links[link{ctrl.Subsystem, ctrl.HostNQN, ctrl.Portal}] {
			states[ctrl.State]++
		}
	}
	for state, n := range states {
		ch <- prometheus.MustNewConstMetric(descControllers, prometheus.GaugeValue, float64(n), state)
	}
}
