package lvol

import (
	"sync/atomic"
)

// A flat map is a root of tables of pages. A page covers 4 MiB of the lvol, a table
// 512 pages (2 GiB). Tables and pages carry the delta they belong to: an lvol
// changes only those of its own delta and shares the others with its ancestors, so
// a clone costs one pointer per 2 GiB. What belongs to a snapshot's delta never
// changes.
const (
	tableShift = 9
	tablePages = 1 << tableShift
)

// delta is the identity of an lvol's own part of the map. Snapshotting an lvol
// hands its delta to the snapshot and gives the lvol a new one.
type delta struct {
	id   uint64
	gone bool // guarded by Store.flushMu: deleted, its pages must not be flushed
}

type page struct {
	delta   *delta
	index   uint32
	entries []atomic.Uint64 // entry; changed under the cluster's stripe and Store.commit
	sums    []uint32        // by block of the page; changed under the cluster's stripe and Store.commit

	dirty    atomic.Bool  // is in Store.dirty
	open     atomic.Bool  // durably marked open; changed under Store.flushMu
	inflight atomic.Int32 // overwrites in place under way; raised under Store.commit
}

func (pg *page) load(i int) entry     { return entry(pg.entries[i].Load()) }
func (pg *page) store(i int, e entry) { pg.entries[i].Store(uint64(e)) }

type table struct {
	delta *delta
	pages [tablePages]atomic.Pointer[page]
}

type root struct {
	tables []atomic.Pointer[table]
}

func newRoot(sizeBytes int64) *root {
	pages := (sizeBytes + pageBytes - 1) / pageBytes
	return &root{tables: make([]atomic.Pointer[table], (pages+tablePages-1)/tablePages)}
}

// page returns the page of index pi, or nil when nothing in it was ever written.
func (r *root) page(pi uint32) *page {
	ti := int(pi >> tableShift)
	if ti >= len(r.tables) {
		return nil
	}
	t := r.tables[ti].Load()
	if t == nil {
		return nil
	}
	return t.pages[pi&(tablePages-1)].Load()
}

// share returns a root for a child of sizeBytes that shows what r shows.
func (r *root) share(sizeBytes int64) *root {
	c := newRoot(sizeBytes)
	for i := range min(len(c.tables), len(r.tables)) {
		c.tables[i].Store(r.tables[i].Load())
	}
	return c
}

// fork returns a root that shows what r shows and whose tables of delta d are its
// own, so that put for d does not change r.
func (r *root) fork(d *delta) *root {
	c := &root{tables: make([]atomic.Pointer[table], len(r.tables))}
	for i := range r.tables {
		t := r.tables[i].Load()
		if t != nil && t.delta == d {
			t = t.copyFor(d)
		}
		c.tables[i].Store(t)
	}
	return c
}

// put stores pg for delta d, copying the table if it is another's. The caller
// excludes other changes of r.
func (r *root) put(d *delta, pi uint32, pg *page) {
	slot := &r.tables[pi>>tableShift]
	t := slot.Load()
	if t == nil || t.delta != d {
		t = t.copyFor(d)
		slot.Store(t)
	}
	t.pages[pi&(tablePages-1)].Store(pg)
}

func (t *table) copyFor(d *delta) *table {
	c := &table{delta: d}
	if t != nil {
		for i := range t.pages {
			c.pages[i].Store(t.pages[i].Load())
		}
	}
	return c
}

// each calls f for every page, in order.
func (r *root) each(f func(pi uint32, pg *page)) {
	for ti := range r.tables {
		t := r.tables[ti].Load()
		if t == nil {
			continue
		}
		for i := range t.pages {
			if pg := t.pages[i].Load(); pg != nil {
				f(uint32(ti<<tableShift|i), pg)
			}
		}
	}
}

func (g *geometry) newPage(d *delta, pi uint32) *page {
	return &page{delta: d, index: pi, entries: make([]atomic.Uint64, g.pageClusters), sums: make([]uint32, pageBlocks)}
}

// inherit returns a page for d that shows what pg (which may be nil) shows.
func (g *geometry) inherit(d *delta, pi uint32, pg *page) *page {
	c := g.newPage(d, pi)
	if pg != nil {
		for i := range pg.entries {
			c.store(i, pg.load(i)&^(ownBit|durableBit))
		}
		copy(c.sums, pg.sums)
	}
	return c
}

// ownPage returns v's own page of index pi, making it if needed. The caller holds
// v.quiesce.
func (g *geometry) ownPage(v *volume, pi uint32) *page {
	r := v.root.Load()
	if pg := r.page(pi); pg != nil && pg.delta == v.delta {
		return pg
	}
	v.mapMu.Lock()
	defer v.mapMu.Unlock()
	pg := r.page(pi)
	if pg == nil || pg.delta != v.delta {
		pg = g.inherit(v.delta, pi, pg)
		r.put(v.delta, pi, pg)
	}
	return pg
}

// cut makes everything from cluster end on absent in r, a root that nobody else
// uses yet, copying for d what it changes.
func (g *geometry) cut(r *root, d *delta, end uint64) {
	first := uint32(end / uint64(g.pageClusters))
	r.each(func(pi uint32, pg *page) {
		switch {
		case pi > first:
			r.put(d, pi, nil)
		case pi == first:
			keep := int(end % uint64(g.pageClusters))
			c := g.newPage(d, pi)
			for i := range keep {
				e := pg.load(i)
				if pg.delta != d {
					e &^= ownBit | durableBit
				}
				c.store(i, e)
			}
			copy(c.sums, pg.sums[:keep*g.clusterBlocks])
			r.put(d, pi, c)
		}
	})
}
