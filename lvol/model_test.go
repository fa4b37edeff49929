package lvol

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"sort"

	"github.com/thaw-project/thaw/kind"
)

// The model is a pool as anyone would write it who need not be fast: every lvol is
// a slice of bytes of its own. The store must give the same answers.
type model struct {
	lvols map[string]*modelLvol
	next  int
}

type modelLvol struct {
	serial   int
	data     []byte
	snapshot bool
	readOnly bool
	parent   int // serial, 0 for none
	// old holds, by sector, what it held since the last flush and no longer does:
	// what a power loss may bring back.
	old map[int64][][]byte
}

func newModel() *model { return &model{lvols: map[string]*modelLvol{}} }

func (m *model) clone() *model {
	c := &model{lvols: map[string]*modelLvol{}, next: m.next}
	for n, l := range m.lvols {
		k := *l
		k.data = slices.Clone(l.data)
		k.old = maps.Clone(l.old)
		for s, v := range k.old {
			k.old[s] = slices.Clone(v)
		}
		c.lvols[n] = &k
	}
	return c
}

func (m *model) add(name string, size int64) *modelLvol {
	m.next++
	l := &modelLvol{serial: m.next, data: make([]byte, size), old: map[int64][][]byte{}}
	m.lvols[name] = l
	return l
}

func (m *model) flushed() {
	for _, l := range m.lvols {
		clear(l.old)
	}
}

func (m *model) children(l *modelLvol) (n int, one *modelLvol) {
	for _, c := range m.lvols {
		if c.parent == l.serial {
			n, one = n+1, c
		}
	}
	return n, one
}

func (m *model) bySerial(serial int) *modelLvol {
	for _, l := range m.lvols {
		if l.serial == serial {
			return l
		}
	}
	return nil
}

func (l *modelLvol) write(off int64, p []byte) {
	for s := off / 512; s*512 < off+int64(len(p)); s++ {
		end := min(s*512+512, int64(len(l.data)))
		before := slices.Clone(l.data[s*512 : end])
		from, to := max(off, s*512), min(off+int64(len(p)), end)
		copy(l.data[from:to], p[from-off:])
		if !bytes.Equal(before, l.data[s*512:end]) {
			l.old[s] = append(l.old[s], before)
		}
	}
}

// op is one operation on a pool.
type op struct {
	verb     string
	name, to string
	off, n   int64
	seed     uint64 // of the data written
	cut      bool   // a "reopen" is a power loss
}

func (o op) String() string {
	return fmt.Sprintf("%s %s %s off=%d n=%d seed=%d kill=%v", o.verb, o.name, o.to, o.off, o.n, o.seed, o.cut)
}

// data is what a write writes: random, or runs of few values so that blocks repeat.
func (o op) data() []byte {
	p := make([]byte, o.n)
	r := rand.New(rand.NewPCG(o.seed, 7))
	if o.seed%4 == 0 {
		for i := range p {
			p[i] = byte(i>>12) + byte(o.seed)
		}
		return p
	}
	for i := 0; i < len(p); i += 8 {
		v := r.Uint64()
		for j := i; j < min(i+8, len(p)); j++ {
			p[j] = byte(v)
			v >>= 8
		}
	}
	return p
}

// generator makes random operations, most of which make sense for a model.
type generator struct {
	r        *rand.Rand
	names    []string
	maxBytes int64
	crash    bool // only what the crash tests can judge
}

func newGenerator(seed uint64, maxBytes int64) *generator {
	return &generator{r: rand.New(rand.NewPCG(seed, 3)), names: []string{"a", "b", "c", "d", "e", "f", "g"}, maxBytes: maxBytes}
}

func (g *generator) name() string { return g.names[g.r.IntN(len(g.names))] }

// used prefers a name that exists.
func (g *generator) used(m *model) string {
	if len(m.lvols) == 0 || g.r.IntN(20) == 0 {
		return g.name()
	}
	list := slices.Sorted(maps.Keys(m.lvols))
	return list[g.r.IntN(len(list))]
}

func (g *generator) span(m *model, name string) (off, n int64) {
	size := g.maxBytes
	if l := m.lvols[name]; l != nil {
		size = int64(len(l.data))
	}
	switch g.r.IntN(6) {
	case 0: // a sector or so
		n = g.r.Int64N(1024) + 1
	case 1:
		n = 4096
	case 2, 3:
		n = g.r.Int64N(40000) + 1
	case 4:
		n = g.r.Int64N(300000) + 1
	default:
		n = (g.r.Int64N(64) + 1) * 4096
	}
	n = min(n, size)
	off = g.r.Int64N(size - n + 1)
	switch g.r.IntN(4) {
	case 0:
		off = off / 4096 * 4096
	case 1:
		off = off / 65536 * 65536
	case 2:
		off = off / 512 * 512
	}
	if g.r.IntN(8) == 0 {
		off = size - n // the end
	}
	if g.crash && g.r.IntN(3) == 0 { // whole clusters, so that discards free
		n = min((g.r.Int64N(4)+1)*65536, size)
		off = g.r.Int64N(size-n+1) / 65536 * 65536
	}
	if g.crash { // half a sector written twice has more states than the model keeps
		off, n = off/512*512, max(n/512*512, 512)
	}
	return off, min(n, size-off)
}

func (g *generator) size() int64 {
	size := (g.r.Int64N(g.maxBytes/512) + 1) * 512
	if g.r.IntN(2) == 0 {
		size = (size + 65535) / 65536 * 65536
	}
	return size
}

func (g *generator) op(m *model) op {
	o := op{seed: g.r.Uint64N(1 << 32)}
	roll := g.r.IntN(100)
	if len(m.lvols) < 2 {
		roll = g.r.IntN(60) + 40
	}
	switch {
	case roll < 40 || roll < 45 && !g.crash:
		o.verb, o.name = "write", g.used(m)
		o.off, o.n = g.span(m, o.name)
	case roll < 51:
		o.verb, o.name = "discard", g.used(m)
		o.off, o.n = g.span(m, o.name)
	case roll < 56:
		o.verb, o.name = "zero", g.used(m)
		o.off, o.n = g.span(m, o.name)
	case roll < 63:
		o.verb = "flush"
	case roll < 69:
		o.verb, o.name, o.n = "create", g.name(), g.size()
	case roll < 75:
		o.verb, o.name, o.to = "snapshot", g.used(m), g.name()
	case roll < 81:
		o.verb, o.name, o.to = "clone", g.used(m), g.name()
	case roll < 86:
		o.verb, o.name = "delete", g.used(m)
	case roll < 88:
		o.verb, o.name, o.to = "rename", g.used(m), g.name()
	case roll < 92:
		o.verb, o.name, o.n = "resize", g.used(m), g.size()
	case roll < 93:
		o.verb, o.name = "inflate", g.used(m)
	case roll < 95:
		o.verb, o.name = "decouple", g.used(m)
	case roll < 96:
		o.verb, o.name, o.cut = "readonly", g.used(m), g.r.IntN(2) == 0
	default:
		o.verb, o.cut = "reopen", g.r.IntN(2) == 0
	}
	return o
}

// apply does o to the model and returns the kind of error it must give.
func (m *model) apply(o op) kind.Kind {
	l := m.lvols[o.name]
	if o.name != "" && l == nil && o.verb != "create" {
		return kind.NotFound
	}
	taken := m.lvols[o.to] != nil
	switch o.verb {
	case "write", "discard", "zero":
		if l.snapshot || l.readOnly {
			return kind.ReadOnly
		}
		p := make([]byte, o.n)
		if o.verb == "write" {
			p = o.data()
		}
		l.write(o.off, p)
	case "flush", "reopen":
		if o.verb == "flush" || !o.cut {
			m.flushed()
		}
	case "create":
		if l != nil {
			return kind.Exists
		}
		m.add(o.name, o.n)
	case "snapshot":
		if l.snapshot {
			return kind.Invalid
		}
		if taken {
			return kind.Exists
		}
		s := m.add(o.to, 0)
		s.data, s.snapshot, s.parent = slices.Clone(l.data), true, l.parent
		l.parent = s.serial
		m.flushed()
	case "clone":
		if !l.snapshot {
			return kind.Invalid
		}
		if taken {
			return kind.Exists
		}
		c := m.add(o.to, 0)
		c.data, c.parent = slices.Clone(l.data), l.serial
	case "delete":
		n, one := m.children(l)
		if n > 1 {
			return kind.InUse
		}
		if n == 1 {
			one.parent = l.parent
			m.flushed()
		}
		delete(m.lvols, o.name)
	case "rename":
		if taken {
			return kind.Exists
		}
		delete(m.lvols, o.name)
		m.lvols[o.to] = l
	case "resize":
		if l.snapshot || l.readOnly {
			return kind.ReadOnly
		}
		if int(o.n) != len(l.data) {
			m.flushed()
		}
		l.data = append(l.data[:min(int(o.n), len(l.data))], make([]byte, max(0, int(o.n)-len(l.data)))...)
	case "inflate", "decouple":
		if l.snapshot || l.readOnly {
			return kind.ReadOnly
		}
		if l.parent == 0 && o.verb == "decouple" {
			return kind.Invalid
		}
		grand := 0
		if o.verb == "decouple" {
			grand = m.bySerial(l.parent).parent
		}
		l.parent = grand
		m.flushed()
	case "readonly":
		if l.snapshot && !o.cut {
			return kind.Invalid
		}
		l.readOnly = o.cut && !l.snapshot
	}
	return ""
}

// applyStore does o to a store. "reopen" is the caller's.
func applyStore(s *Store, o op) (err error) {
	switch o.verb {
	case "write", "discard", "zero":
		l, err := s.OpenLvol(o.name, false)
		if err != nil {
			return err
		}
		defer l.Close()
		switch o.verb {
		case "write":
			_, err = l.WriteAt(o.data(), o.off)
		case "discard":
			err = l.Discard(o.off, o.n)
		case "zero":
			err = l.WriteZeroes(o.off, o.n)
		}
		return err
	case "flush":
		return s.Flush()
	case "create":
		_, err = s.Create(o.name, o.n)
	case "snapshot":
		_, err = s.Snapshot(o.name, o.to)
	case "clone":
		_, err = s.Clone(o.name, o.to)
	case "delete":
		return s.Delete(o.name)
	case "rename":
		_, err = s.Rename(o.name, o.to)
	case "resize":
		_, err = s.Resize(o.name, o.n)
	case "inflate":
		_, err = s.Inflate(context.Background(), o.name)
	case "decouple":
		_, err = s.Decouple(context.Background(), o.name)
	case "readonly":
		_, err = s.SetReadOnly(o.name, o.cut)
	}
	return err
}

// compare holds the store to the model: the same lvols with the same relations and
// the same bytes, or for a sector that a power loss may have taken back, one of its
// earlier contents.
func (m *model) compare(s *Store, exact bool) error {
	list, err := s.List()
	if err != nil {
		return err
	}
	var have []string
	for _, i := range list {
		have = append(have, i.Name)
	}
	want := slices.Sorted(maps.Keys(m.lvols))
	if !slices.Equal(have, want) {
		return fmt.Errorf("lvols %v, want %v", have, want)
	}
	for _, i := range list {
		l := m.lvols[i.Name]
		parent := ""
		var clones []string
		for n, o := range m.lvols {
			if o.serial == l.parent {
				parent = n
			}
			if o.parent == l.serial {
				clones = append(clones, n)
			}
		}
		sort.Strings(clones)
		if i.SizeBytes != int64(len(l.data)) || i.Snapshot != l.snapshot || i.ReadOnly != (l.snapshot || l.readOnly) || i.Parent != parent || !slices.Equal(i.Clones, clones) {
			return fmt.Errorf("%+v, want %d bytes, snapshot %v, read-only %v, parent %q, clones %v", i, len(l.data), l.snapshot, l.readOnly, parent, clones)
		}
		if err := l.compareData(s, i.Name, exact); err != nil {
			return err
		}
	}
	return nil
}

func (l *modelLvol) compareData(s *Store, name string, exact bool) error {
	d, err := s.OpenLvol(name, true)
	if err != nil {
		return err
	}
	defer d.Close()
	p := make([]byte, len(l.data))
	if n, err := d.ReadAt(p, 0); n != len(p) || err != nil {
		return fmt.Errorf("read %s: %d of %d, %w", name, n, len(p), err)
	}
	for off := 0; off < len(p); off += 512 {
		got := p[off:min(off+512, len(p))]
		if bytes.Equal(got, l.data[off:off+len(got)]) {
			continue
		}
		if !exact && slices.ContainsFunc(l.old[int64(off/512)], func(o []byte) bool { return bytes.Equal(o, got) }) {
			continue
		}
		return fmt.Errorf("%s: sector at %d is none of what it was: %x..., want %x...", name, off, got[:8], l.data[off:off+8])
	}
	return nil
}
