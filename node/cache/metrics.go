package cache

import (
	"sync/atomic"

	"github.com/prometheus/client_golang/prometheus"
)

// count is what is counted outside of the shards.
type count struct {
	misses, missBytes     atomic.Uint64
	joins                 atomic.Uint64
	passedBytes           atomic.Uint64
	fetches, fetchErrors  atomic.Uint64
	fetchedBytes          atomic.Uint64
	readAheadBytes        atomic.Uint64
	skipped               atomic.Uint64
	badBlocks, diskErrors atomic.Uint64
}

// Contents is what a cache holds.
type Contents struct {
	Dir           string `json:"dir"`
	UnitBytes     int64  `json:"unit_bytes"`
	CapacityBytes int64  `json:"capacity_bytes"`
	UsedBytes     int64  `json:"used_bytes"`
	Units         int64  `json:"units"`
}

// Stat describes an open cache. What is counted is since Open.
type Stat struct {
	Contents
	MemoryBytes int64 `json:"memory_bytes"` // of the index, if all of it was used
	Devices     int   `json:"devices"`      // open
	Paused      bool  `json:"paused"`       // the disk failed a write and is left alone for a while

	Hits         uint64 `json:"hits"` // reads of a unit, or a part of one, that needed no network
	HitBytes     uint64 `json:"hit_bytes"`
	Misses       uint64 `json:"misses"`
	MissBytes    uint64 `json:"miss_bytes"`
	Joins        uint64 `json:"joins"`         // waits for a fetch of somebody else's
	PassedBytes  uint64 `json:"passed_bytes"`  // read past the cache
	Fetches      uint64 `json:"fetches"`       // remote reads
	FetchErrors  uint64 `json:"fetch_errors"`  //
	FetchedBytes uint64 `json:"fetched_bytes"` // read-ahead included

	ReadAheadBytes       uint64 `json:"read_ahead_bytes"`
	ReadAheadUsedBytes   uint64 `json:"read_ahead_used_bytes"`
	ReadAheadWastedBytes uint64 `json:"read_ahead_wasted_bytes"` // evicted before anybody asked

	Evictions  uint64 `json:"evictions"`
	Skipped    uint64 `json:"skipped"`     // units fetched and not kept
	BadBlocks  uint64 `json:"bad_blocks"`  // dropped since they did not verify
	DiskErrors uint64 `json:"disk_errors"` // reads and writes that failed
}

// Stat returns the figures of now.
func (c *Cache) Stat() Stat {
	n := &c.count
	st := Stat{
		Contents: Contents{Dir: c.o.Dir, UnitBytes: int64(c.unit)}, Paused: c.pausedUntil.Load() != 0,
		Misses: n.misses.Load(), MissBytes: n.missBytes.Load(), Joins: n.joins.Load(), PassedBytes: n.passedBytes.Load(),
		Fetches: n.fetches.Load(), FetchErrors: n.fetchErrors.Load(), FetchedBytes: n.fetchedBytes.Load(),
		ReadAheadBytes: n.readAheadBytes.Load(), Skipped: n.skipped.Load(), BadBlocks: n.badBlocks.Load(), DiskErrors: n.diskErrors.Load(),
	}
	for _, s := range c.shards {
		s.mu.Lock()
		st.CapacityBytes += int64(len(s.slots)) * int64(c.unit)
		st.MemoryBytes += int64(len(s.slots))*(32+4+4*int64(s.blocks)) + int64(len(s.heads))*4
		st.UsedBytes += s.count.bytes
		st.Units += s.count.valid
		st.Hits += s.count.hits
		st.HitBytes += s.count.hitBytes
		st.ReadAheadUsedBytes += s.count.readAheadUsed
		st.ReadAheadWastedBytes += s.count.readAheadWaste
		st.Evictions += s.count.evictions
		s.mu.Unlock()
	}
	c.mu.Lock()
	st.Devices = len(c.devices)
	c.mu.Unlock()
	return st
}

// metrics is a prometheus.Collector of Stat.
type metrics struct {
	c          *Cache
	registerer prometheus.Registerer
}

type metric struct {
	desc  *prometheus.Desc
	kind  prometheus.ValueType
	value func(*Stat) float64
}

func counter(name, help string, value func(*Stat) uint64) metric {
	return metric{prometheus.NewDesc("thaw_cache_"+name+"_total", help, nil, nil), prometheus.CounterValue, func(s *Stat) float64 { return float64(value(s)) }}
}

func gauge(name, help string, value func(*Stat) int64) metric {
	return metric{prometheus.NewDesc("thaw_cache_"+name, help, nil, nil), prometheus.GaugeValue, func(s *Stat) float64 { return float64(value(s)) }}
}

var metricList = []metric{
	gauge("capacity_bytes", "Size of the node cache.", func(s *Stat) int64 { return s.CapacityBytes }),
	gauge("used_bytes", "Bytes that the node cache holds.", func(s *Stat) int64 { return s.UsedBytes }),
	gauge("memory_bytes", "Memory of the node cache's index.", func(s *Stat) int64 { return s.MemoryBytes }),
	gauge("devices", "Open devices that read through the node cache.", func(s *Stat) int64 { return int64(s.Devices) }),
	gauge("paused", "1 while the node cache keeps nothing because its disk failed a write.", func(s *Stat) int64 {
		if s.Paused {
			return 1
		}
		return 0
	}),
	counter("hits", "Reads of cached units.", func(s *Stat) uint64 { return s.Hits }),
	counter("hit_bytes", "Bytes read of cached units.", func(s *Stat) uint64 { return s.HitBytes }),
	counter("misses", "Reads that had to fetch.", func(s *Stat) uint64 { return s.Misses }),
	counter("miss_bytes", "Bytes read by reads that had to fetch.", func(s *Stat) uint64 { return s.MissBytes }),
	counter("joins", "Reads that waited for another's fetch.", func(s *Stat) uint64 { return s.Joins }),
	counter("passed_bytes", "Bytes read past the cache.", func(s *Stat) uint64 { return s.PassedBytes }),
	counter("fetches", "Remote reads for the cache.", func(s *Stat) uint64 { return s.Fetches }),
	counter("fetch_errors", "Remote reads for the cache that failed.", func(s *Stat) uint64 { return s.FetchErrors }),
	counter("fetched_bytes", "Bytes fetched, read-ahead included.", func(s *Stat) uint64 { return s.FetchedBytes }),
	counter("readahead_bytes", "Bytes read ahead.", func(s *Stat) uint64 { return s.ReadAheadBytes }),
	counter("readahead_used_bytes", "Bytes read ahead that somebody then asked for.", func(s *Stat) uint64 { return s.ReadAheadUsedBytes }),
	counter("readahead_wasted_bytes", "Bytes read ahead that were evicted before anybody asked.", func(s *Stat) uint64 { return s.ReadAheadWastedBytes }),
	counter("evictions", "Units evicted.", func(s *Stat) uint64 { return s.Evictions }),
	counter("skipped", "Units fetched that could not be kept.", func(s *Stat) uint64 { return s.Skipped }),
	counter("bad_blocks", "Cached units dropped because a checksum did not match.", func(s *Stat) uint64 { return s.BadBlocks }),
	counter("disk_errors", "Reads and writes of the cache's disk that failed.", func(s *Stat) uint64 { return s.DiskErrors }),
}

func (m *metrics) register(c *Cache, r prometheus.Registerer) error {
	m.c = c
	if r == nil {
		return nil
	}
	m.registerer = r
	return r.Register(m)
}

func (m *metrics) unregister() {
	if m.registerer != nil {
		m.registerer.Unregister(m)
	}
}

// Describe implements prometheus.Collector.
func (m *metrics) Describe(ch chan<- *prometheus.Desc) {
	for _, x := range metricList {
		ch <- x.desc
	}
}

// Collect implements prometheus.Collector.
func (m *metrics) Collect(ch chan<- prometheus.Metric) {
	st := m.c.Stat()
	for _, x := range metricList {
		ch <- prometheus.MustNewConstMetric(x.desc, x.kind, x.value(&st))
	}
}

var _ prometheus.Collector = (*metrics)(nil)
