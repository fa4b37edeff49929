package lvol

import (
	"fmt"

	"github.com/thaw-project/thaw/kind"
)

// SetParent makes another snapshot the parent of an lvol, or none when parent is
// empty: from then on the lvol shows that where it has nothing itself. What it wrote,
// discarded or zeroed over the old parent stays. It may be open. The snapshot has the
// lvol's size; kind.Invalid otherwise, and kind.Exists when it is the parent already.
func (s *Store) SetParent(name, parent string) (Info, error) {
	if err := s.beginAdmin(); err != nil {
		return Info{}, err
	}
	defer s.admin.Unlock()
	op := "set parent of lvol " + name
	v, err := s.findWritable("set parent", name)
	if err != nil {
		return Info{}, err
	}
	var p *volume
	if parent != "" {
		if p, err = s.findSound("set parent", parent); err != nil {
			return Info{}, err
		}
		switch {
		case !p.snapshot:
			return Info{}, kind.Errorf(kind.Invalid, "%s: %s is not a snapshot", op, parent)
		case p.size.Load() != v.size.Load():
			return Info{}, kind.Errorf(kind.Invalid, "%s: it has %d bytes, snapshot %s has %d", op, v.size.Load(), parent, p.size.Load())
		}
	}
	if p == v.parent {
		return Info{}, kind.Errorf(kind.Exists, "%s: it is %q already", op, parent)
	}
	v.quiesce.Lock()
	defer v.quiesce.Unlock()
	// All that the lvol owns is durable and closed from here on, so that only its
	// record needs to change.
	if err := s.flushFor(closing{delta: v.delta}); err != nil {
		return Info{}, fmt.Errorf("%s: %w", op, err)
	}
	changed := s.rebase(v, p)
	err = s.changeRecord(v, op, false, func(r *record) {
		r.parent, r.overlap = 0, 0
		if p != nil {
			r.parent, r.overlap = p.id, r.size
		}
	}, func() {
		if v.parent != nil {
			delete(v.parent.clones, v.id)
		}
		v.parent, v.overlap = p, 0
		if p != nil {
			v.overlap = v.size.Load()
			p.clones[v.id] = v
		}
		v.root.Store(changed)
	})
	if err != nil {
		return Info{}, err
	}
	return s.info(v), nil
}

// rebase returns the map of v over another parent, as buildOne makes it from disk.
func (s *Store) rebase(v, p *volume) *root {
	r := newRoot(v.size.Load())
	if p != nil {
		r = p.root.Load().share(v.size.Load())
	}
	v.root.Load().each(func(pi uint32, from *page) {
		if from.delta != v.delta {
			return
		}
		pg := s.inherit(v.delta, pi, r.page(pi))
		for i := range from.entries {
			e := from.load(i)
			if !e.own() {
				continue
			}
			pg.store(i, e)
			copy(pg.sums[i*s.clusterBlocks:(i+1)*s.clusterBlocks], from.sums[i*s.clusterBlocks:])
		}
		r.put(v.delta, pi, pg)
	})
	return r
}
