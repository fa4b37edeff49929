package snapshotter

import (
	"context"
	"errors"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

type metrics struct {
	remotes         prometheus.Counter
	fallbacks       *prometheus.CounterVec
	attachSeconds   *prometheus.HistogramVec
	cleanupFailures prometheus.Counter
	pending         prometheus.GaugeFunc
	registerer      prometheus.Registerer
}

func (m *metrics) init(s *Snapshotter, registerer prometheus.Registerer) error {
	m.remotes = prometheus.NewCounter(prometheus.CounterOpts{
		Name: "thaw_snapshotter_remote_layers_total", Help: "Layers of converted images that were committed without unpacking.",
	})
	m.fallbacks = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "thaw_snapshotter_fallbacks_total", Help: "Layers of converted images that were unpacked the ordinary way, by reason.",
	}, []string{"reason"})
	for _, reason := range []string{reasonLabels, reasonTarget, reasonParent, reasonConflict, reasonAttach, reasonTimeout} {
		m.fallbacks.WithLabelValues(reason)
	}
	m.attachSeconds = prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name: "thaw_snapshotter_attach_seconds", Help: "Time to attach and mount a block or a writable disk, by result.",
		Buckets: prometheus.ExponentialBuckets(0.002, 2, 13), // 2 ms to 8 s
	}, []string{"result"})
	m.cleanupFailures = prometheus.NewCounter(prometheus.CounterOpts{
		Name: "thaw_snapshotter_cleanup_failures_total", Help: "Attempts to clean up that failed and will be repeated.",
	})
	m.pending = prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "thaw_snapshotter_removals_pending", Help: "Removed snapshots that are not cleaned up yet.",
	}, func() float64 {
		n := 0
		_ = s.view(context.Background(), func(_ context.Context, r records) error {
			n = r.bucket(bucketRemoved).Stats().KeyN
			return nil
		})
		return float64(n)
	})
	if registerer == nil {
		return nil
	}
	m.registerer = registerer
	var errs []error
	for _, c := range m.collectors() {
		errs = append(errs, registerer.Register(c))
	}
	return errors.Join(errs...)
}

func (m *metrics) collectors() []prometheus.Collector {
	return []prometheus.Collector{m.remotes, m.fallbacks, m.attachSeconds, m.cleanupFailures, m.pending}
}

func (m *metrics) unregister() {
	if m.registerer == nil {
		return
	}
	for _, c := range m.collectors() {
		m.registerer.Unregister(c)
	}
}

func (m *metrics) attached(started time.Time, err error) {
	result := "ok"
	if err != nil {
		result = "error"
	}
	m.attachSeconds.WithLabelValues(result).Observe(time.Since(started).Seconds())
}
