package target

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"sync"
	"sync/atomic"
	"syscall"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/lvol"
	"github.com/thaw-project/thaw/target/bdev"
	"github.com/thaw-project/thaw/target/rpc"
)

// An external parent is a disk outside the lvstore (SPDK: esnap) below an lvol and
// its descendants: a cluster that none of them covers reads as the disk does. The first
// write to such a cluster copies it. Package lvol knows nothing of it.

// clusterLocks keep writers of one cluster apart while it is copied. Writers of
// clusters that are covered do not take them.
type clusterLocks [64]sync.Mutex

// externalLvol is an open lvol over a disk.
type externalLvol struct {
	*lvol.Lvol
	below   bdev.Device
	window  *atomic.Int64 // what is shown of below; shared by all handles of the lvol
	cluster int64
	locks   *clusterLocks
}

// ReadAt implements io.ReaderAt.
func (e *externalLvol) ReadAt(p []byte, off int64) (int, error) {
	size := e.SizeBytes()
	if off < 0 || off >= size {
		return e.Lvol.ReadAt(p, off)
	}
	var eof error
	if int64(len(p)) > size-off {
		p, eof = p[:size-off], io.EOF
	}
	for n := 0; n < len(p); {
		m, covered, err := e.Covered(off+int64(n), int64(len(p)-n))
		if err == nil {
			part := p[n : n+int(m)]
			if covered {
				_, err = e.Lvol.ReadAt(part, off+int64(n))
			} else {
				err = e.readBelow(part, off+int64(n))
			}
		}
		if err != nil && !errors.Is(err, io.EOF) {
			return n, err
		}
		n += int(m)
	}
	return len(p), eof
}

// readBelow fills p with what is shown of the disk, zeros beyond it.
func (e *externalLvol) readBelow(p []byte, off int64) error {
	shown := max(0, min(int64(len(p)), min(e.window.Load(), e.below.SizeBytes())-off))
	clear(p[shown:])
	if shown == 0 {
		return nil
	}
	if n, err := e.below.ReadAt(p[:shown], off); int64(n) != shown {
		return err
	}
	return nil
}

// WriteAt implements io.WriterAt.
func (e *externalLvol) WriteAt(p []byte, off int64) (int, error) {
	if size := e.SizeBytes(); off < 0 || off > size || int64(len(p)) > size-off {
		return e.Lvol.WriteAt(p, off) // refuses
	}
	for n := 0; n < len(p); {
		at := off + int64(n)
		part := p[n:min(int64(len(p)), int64(n)+e.cluster-at%e.cluster)]
		if err := e.writeCluster(part, at); err != nil {
			return n, err
		}
		n += len(part)
	}
	return len(p), nil
}

// writeCluster writes p, which lies in one cluster, copying the rest of the cluster if
// need be. An empty p only copies.
func (e *externalLvol) writeCluster(p []byte, off int64) error {
	_, covered, err := e.Covered(off, max(1, int64(len(p))))
	start := off - off%e.cluster
	if err == nil && !covered && start < e.window.Load() {
		l := &e.locks[uint64(start/e.cluster)%uint64(len(e.locks))]
		l.Lock()
		defer l.Unlock()
		_, covered, err = e.Covered(off, max(1, int64(len(p))))
		if err == nil && !covered {
			return e.copyCluster(p, off)
		}
	}
	if err != nil || len(p) == 0 {
		return err
	}
	_, err = e.Lvol.WriteAt(p, off)
	return err
}

// copyCluster writes a whole cluster: p at off, and around it what is below.
func (e *externalLvol) copyCluster(p []byte, off int64) error {
	start := off - off%e.cluster
	buf := make([]byte, min(e.cluster, e.SizeBytes()-start))
	if int64(len(p)) < int64(len(buf)) {
		if err := e.readBelow(buf, start); err != nil {
			return err
		}
	}
	copy(buf[off-start:], p)
	_, err := e.Lvol.WriteAt(buf, start)
	return err
}

// Discard implements bdev.Device.
func (e *externalLvol) Discard(off, length int64) error {
	return e.zero(off, length, e.Lvol.Discard)
}

// WriteZeroes implements bdev.Device.
func (e *externalLvol) WriteZeroes(off, length int64) error {
	return e.zero(off, length, e.Lvol.WriteZeroes)
}

// zero writes zeros where the disk below would show if the lvol let go of a cluster,
// and lets go beyond.
func (e *externalLvol) zero(off, length int64, let func(off, length int64) error) error {
	border := (e.window.Load() + e.cluster - 1) / e.cluster * e.cluster
	if size := e.SizeBytes(); off < 0 || length < 0 || off > size || length > size-off || off >= border {
		return let(off, length)
	}
	for length > 0 && off < border {
		n := min(length, border-off, int64(len(zeros)))
		if _, err := e.WriteAt(zeros[:n], off); err != nil {
			return err
		}
		off, length = off+n, length-n
	}
	if length == 0 {
		return nil
	}
	return let(off, length)
}

// Extent implements nbd.Mapper.
func (e *externalLvol) Extent(off, length int64) (n int64, hole, zero bool, err error) {
	n, covered, err := e.Covered(off, length)
	if !covered && off >= e.window.Load() {
		return n, true, true, err
	}
	return n, false, false, err
}

// fill copies everything that is still the disk's.
func (e *externalLvol) fill(ctx context.Context) error {
	for off := int64(0); off < min(e.window.Load(), e.SizeBytes()); off += e.cluster {
		if ctx.Err() != nil {
			return kind.Wrap(kind.Canceled, context.Cause(ctx))
		}
		if err := e.writeCluster(nil, off); err != nil {
			return err
		}
	}
	return nil
}

// external is what lies below an lvol: the nearest External of it and its ancestors,
// zero when there is none, and the lvol's own attributes. look describes other lvols by
// name.
func (s *lvstore) external(i lvol.Info, look func(name string) (lvol.Info, error)) (nearest, own attribute, err error) {
	own = s.attrs.get(i.UUID)
	if !s.attrs.anyExternal() { // the usual case, and describing an lvol with many clones takes a while
		return attribute{}, own, nil
	}
	nearest = own
	for nearest.External == "" && i.Parent != "" {
		if i, err = look(i.Parent); err != nil {
			return attribute{}, own, err
		}
		nearest = s.attrs.get(i.UUID)
	}
	if nearest.External == "" {
		return attribute{}, own, nil
	}
	return nearest, own, nil
}

// connectParent makes sure that the external parent of an lvol is at hand; false when it
// has one that is not.
func (s *lvstore) connectParent(i lvol.Info, look func(name string) (lvol.Info, error)) bool {
	e, _, err := s.external(i, look)
	if err != nil {
		s.t.log.Error("lvol's ancestors", "lvol", i.Name, "err", err)
		return false
	}
	if e.External == "" || s.parents[e.External] != nil {
		return true
	}
	d := s.t.lookup(e.External)
	if d == nil {
		return false
	}
	l := &lease{what: "lvstore " + s.name + ", as external parent", claim: nobodyWrites}
	l.evict = func(bool) { s.parentGone(e.External) }
	if err := s.t.acquire(d, l); err != nil {
		s.t.log.Warn("external parent not usable", "lvol", i.Name, "bdev", d.name, "err", err)
		return false
	}
	s.parents[e.External] = l
	return true
}

// parentGone takes the lvols over an external parent away: they are degraded.
func (s *lvstore) parentGone(id string) {
	delete(s.parents, id)
	for _, d := range s.disks() {
		if e, _, err := s.external(d.driver.(*lvolDisk).info(), s.store.Get); err == nil && e.External == id {
			s.remove(d, false)
		}
	}
}

// dropParents lets go of external parents that no lvol needs any more.
func (s *lvstore) dropParents() {
	if len(s.parents) == 0 {
		return
	}
	list, err := s.store.List()
	if err != nil {
		return
	}
	needed := map[string]bool{}
	for _, i := range list {
		needed[s.attrs.get(i.UUID).External] = true
	}
	for id, l := range s.parents {
		if !needed[id] {
			delete(s.parents, id)
			l.release()
		}
	}
}

// resolve brings lvols that waited for a disk as their external parent.
func (t *Target) resolve(d *disk) {
	for _, s := range t.listStores() {
		waits := false
		s.attrs.mu.Lock()
		for _, a := range s.attrs.lvols {
			waits = waits || a.External == d.id.String()
		}
		s.attrs.mu.Unlock()
		if waits && s.parents[d.id.String()] == nil {
			s.sync()
		}
	}
}

func (t *Target) cloneBdev(params json.RawMessage) (any, error) {
	var p struct {
		Bdev  string `json:"bdev"`
		Store string `json:"lvs_name"`
		Clone string `json:"clone_name"`
	}
	if err := decode(params, &p); err != nil {
		return nil, err
	}
	s, err := t.findStore("", p.Store)
	if err != nil {
		return nil, &rpc.Error{Code: rpc.CodeInvalidParams, Message: "lvs does not exist", Cause: err}
	}
	d := t.lookup(p.Bdev)
	if d == nil {
		return nil, &rpc.Error{Code: rpc.CodeInvalidParams, Message: "bdev does not exist"}
	}
	if l, ok := d.driver.(*lvolDisk); ok && l.s == s {
		return nil, &rpc.Error{Code: rpc.CodeInvalidParams, Message: "bdev is an lvol in same lvs as clone; use bdev_lvol_clone instead"}
	}
	if err := s.checkNew(p.Clone); err != nil {
		return nil, invalidOf(err)
	}
	size := d.driver.sizeBytes()
	cluster := s.store.Stat().ClusterBytes
	if size%cluster != 0 {
		return nil, invalidOf(kind.Errorf(kind.Invalid, "bdev %s has %d bytes, no multiple of the lvstore's cluster of %d", d.name, size, cluster))
	}
	if err := s.attrs.intend(p.Clone); err != nil {
		return nil, invalidOf(err)
	}
	i, err := s.store.Create(p.Clone, size)
	if err == nil {
		err = s.attrs.put(map[string]attribute{i.UUID: {External: d.id.String(), Bytes: size}}, p.Clone)
	}
	if err != nil {
		return nil, invalidOf(s.giveUp(p.Clone, err))
	}
	s.placeOne(i) // when the parent cannot be had, the clone is degraded, and the answer is success as in SPDK
	return i.UUID, nil
}

// setParentBdev makes a disk outside the lvstore the lvol's parent.
func (t *Target) setParentBdev(params json.RawMessage) (any, error) {
	_, d, l, parent, err := t.parents(params)
	if err != nil {
		var e *rpc.Error
		if l != nil && errors.As(err, &e) { // as in SPDK, a parent that is missing is no -19
			err = invalidOf(err)
		}
		return nil, err
	}
	if p, ok := parent.driver.(*lvolDisk); ok && p.s == l.s {
		return nil, invalidOf(kind.Errorf(kind.Invalid, "bdev %s is an lvol of the same lvstore: use bdev_lvol_set_parent", parent.name))
	}
	if who := t.busy(d); who != "" {
		return nil, invalidOf(kind.Errorf(kind.InUse, "lvol %s is used by %s", l.named(), who))
	}
	i, own, s := l.info(), l.s.attrs.get(l.id), l.s
	id := parent.id.String()
	switch {
	case own.External == id && i.Parent == "":
		return nil, invalidOf(kind.Errorf(kind.Exists, "bdev %s is the parent already", parent.name))
	case i.ReadOnly:
		return nil, invalidOf(rpc.Errno(syscall.EPERM, kind.Errorf(kind.ReadOnly, "lvol %s is read-only", i.Name)))
	case parent.driver.sizeBytes() != i.SizeBytes:
		return nil, invalidOf(kind.Errorf(kind.Invalid, "lvol %s has %d bytes, bdev %s %d", i.Name, i.SizeBytes, parent.name, parent.driver.sizeBytes()))
	}
	if i.Parent != "" {
		if _, err := s.store.SetParent(i.Name, ""); err != nil {
			return nil, invalidOf(err)
		}
	}
	own.External, own.Bytes = id, i.SizeBytes
	if err := s.attrs.put(map[string]attribute{l.id: own}); err != nil {
		return nil, invalidOf(err)
	}
	s.sync()
	s.dropParents()
	return true, nil
}

// detach inflates or decouples an lvol. It copies without admin.
func (t *Target) detach(params json.RawMessage, all bool) (any, error) {
	var p struct {
		Name string `json:"name"`
	}
	if err := decode(params, &p); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(t.ctx)
	defer cancel()
	var l *lvolDisk
	var hold *lease
	var fill *externalLvol
	var i lvol.Info
	_, err := t.change(func() (any, error) {
		d, found, err := t.findLvol(p.Name)
		if err != nil {
			return nil, err
		}
		l, i = found, found.info()
		e, own, err := l.s.external(i, l.s.store.Get)
		if err != nil {
			return nil, invalidOf(err)
		}
		if i.Parent == "" && own.External == "" && !all {
			return nil, invalidOf(kind.Errorf(kind.Invalid, "lvol %s has no parent", i.Name))
		}
		if i.ReadOnly {
			return nil, invalidOf(rpc.Errno(syscall.EPERM, kind.Errorf(kind.ReadOnly, "lvol %s is read-only", i.Name)))
		}
		if !all && i.Parent != "" && e.External != "" {
			// What the parent leaves open will be found by way of the lvol itself.
			own.External, own.Bytes = e.External, e.Bytes
			if err := l.s.attrs.put(map[string]attribute{l.id: own}); err != nil {
				return nil, invalidOf(err)
			}
		}
		hold = &lease{what: "copying of clusters", own: true, evict: func(bool) { cancel() }}
		if err := t.acquire(d, hold); err != nil {
			return nil, err
		}
		if all || i.Parent == "" {
			fill, _ = hold.dev.(*externalLvol)
		}
		return nil, nil
	})
	if err != nil {
		return nil, err
	}
	defer hold.release()
	if fill != nil {
		err = fill.fill(ctx)
	}
	switch {
	case err != nil:
	case all:
		_, err = l.s.store.Inflate(ctx, i.Name)
	case i.Parent != "":
		_, err = l.s.store.Decouple(ctx, i.Name)
	}
	if err != nil {
		return nil, invalidOf(err)
	}
	return t.change(func() (any, error) {
		own := l.s.attrs.get(l.id)
		if all || i.Parent == "" {
			own.External, own.Bytes = "", 0
		}
		own.Thick = own.Thick || all
		if err := l.s.attrs.put(map[string]attribute{l.id: own}); err != nil {
			return nil, invalidOf(err)
		}
		l.s.dropParents()
		return true, nil
	})
}
