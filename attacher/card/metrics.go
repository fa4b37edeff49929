package card

import (
	"github.com/prometheus/client_golang/prometheus"
	"go.etcd.io/bbolt"
)

type metrics struct {
	c                        *Card
	steps                    *prometheus.HistogramVec
	repairs, orphans, rounds prometheus.Counter
}

var (
	descDisks     = prometheus.NewDesc("thaw_card_disks", "Disks on record, by state.", []string{"state"}, nil)
	descFunctions = prometheus.NewDesc("thaw_card_functions", "PCIe functions, by who has them.", []string{"use"}, nil)
	descProblems  = prometheus.NewDesc("thaw_card_problem_disks", "Disks that the host cannot use now, or that cannot be detached.", nil, nil)
)

func newMetrics(c *Card) *metrics {
	counter := func(name, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Name: "thaw_card_" + name, Help: help})
	}
	return &metrics{
		c: c,
		steps: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "thaw_card_step_seconds", Help: "Duration of the steps of attach, detach and repair.",
			Buckets: prometheus.ExponentialBuckets(100e-6, 3, 12), // 0.1 ms to 18 s
		}, []string{"operation", "step"}),
		repairs: counter("repairs_total", "Disks that were shown again after the target lost something of them."),
		orphans: counter("orphans_total", "What bore the card's names, was not on record, and was deleted."),
		rounds:  counter("rounds_total", "Comparisons of what the target has with what is on record."),
	}
}

// Describe implements prometheus.Collector.
func (m *metrics) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{descDisks, descFunctions, descProblems} {
		ch <- d
	}
	m.steps.Describe(ch)
	m.repairs.Describe(ch)
	m.orphans.Describe(ch)
	m.rounds.Describe(ch)
}

// Collect implements prometheus.Collector.
func (m *metrics) Collect(ch chan<- prometheus.Metric) {
	m.steps.Collect(ch)
	m.repairs.Collect(ch)
	m.orphans.Collect(ch)
	m.rounds.Collect(ch)
	gauge := func(d *prometheus.Desc, n int, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, float64(n), labels...)
	}
	m.c.mu.Lock()
	problems := len(m.c.problems)
	m.c.mu.Unlock()
	gauge(descProblems, problems)
	all, err := m.c.disks()
	if err != nil {
		return // the record is damaged: every call says so
	}
	states := map[state]int{}
	for _, d := range all {
		states[d.State]++
	}
	for _, s := range []state{attaching, attached, detaching} {
		gauge(descDisks, states[s], string(s))
	}
	var taken map[Function]lease
	if err := m.c.db.View(func(tx *bbolt.Tx) (err error) { taken, err = leases(tx); return err }); err != nil {
		return
	}
	m.c.busy.mu.Lock()
	shown := m.c.busy.shown
	m.c.busy.mu.Unlock()
	uses := map[string]int{}
	for _, f := range m.c.o.Functions {
		switch nqn := shown[f]; {
		case taken[f].Leased:
			uses["disk"]++
		case nqn != "" && !m.c.names.OwnsSubsystem(nqn):
			uses["foreign"]++
		default:
			uses["free"]++
		}
	}
	for _, u := range []string{"disk", "foreign", "free"} {
		gauge(descFunctions, uses[u], u)
	}
}
