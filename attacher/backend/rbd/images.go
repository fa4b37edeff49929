//go:build ceph

package rbd

import (
	"context"
	"encoding/json"
	"errors"
	"maps"
	"math/bits"
	"slices"
	"time"

	"github.com/ceph/go-ceph/rbd"

	"github.com/thaw-project/thaw/kind"
)

// features of every image: clones; one writer at a time; a map of which objects there
// are, so that a read of a chain asks no layer in vain and differences are known without
// looking; and that an image that was made independent of its parent is so with its
// snapshots.
var features = uint64(rbd.FeatureLayering | rbd.FeatureExclusiveLock | rbd.FeatureObjectMap | rbd.FeatureFastDiff | rbd.FeatureDeepFlatten)

// imageOptions are for a new image. The caller destroys them.
func (b *Backend) imageOptions(clone bool) (*rbd.ImageOptions, error) {
	o := rbd.NewRbdImageOptions()
	b.mu.RLock()
	order := bits.TrailingZeros64(uint64(b.index.store.ObjectBytes))
	b.mu.RUnlock()
	set := map[rbd.ImageOption]uint64{rbd.ImageOptionFormat: 2, rbd.ImageOptionFeatures: features, rbd.ImageOptionOrder: uint64(order)}
	if clone {
		set[rbd.ImageOptionCloneFormat] = 2
	}
	for option, value := range set {
		if err := o.SetUint64(option, value); err != nil {
			o.Destroy()
			return nil, wrap(err, "options of an image")
		}
	}
	return o, nil
}

// hold keeps collect from an image that is being made or changed.
func (b *Backend) hold(image string) (release func()) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.making[image]++
	return func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		if b.making[image]--; b.making[image] == 0 {
			delete(b.making, image)
		}
	}
}

// sweepLater has the sweeper collect soon.
func (b *Backend) sweepLater() {
	select {
	case b.wake <- struct{}{}:
	default:
	}
}

// sweeper collects when it is asked to, and what could not be removed once in a while.
func (b *Backend) sweeper(ctx context.Context) {
	tick := time.NewTicker(sweepInterval)
	defer tick.Stop()
	for {
		if err := b.collect(ctx); err != nil && ctx.Err() == nil {
			b.log.Info("not all that nothing needs could be removed", "store", b.oid(), "error", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		case <-b.wake:
		}
	}
}

// withImage runs f with the head of an image: the one that is open for devices here, since
// it has the exclusive lock, or one of its own.
func (b *Backend) withImage(id string, f func(*rbd.Image) error) error {
	if h := b.open.use(id); h != nil {
		defer h.release()
		return f(h.img)
	}
	img, err := b.openImage(id, "")
	if err != nil {
		return err
	}
	err = f(img)
	return errors.Join(err, img.Close())
}

// addSnap makes an RBD snapshot of an image's head, entered in the index first.
func (b *Backend) addSnap(ctx context.Context, image, snap string) error {
	if err := b.commit(ctx, func(c *change) error {
		i := c.image(image)
		if slices.Contains(i.Snaps, snap) {
			return nil
		}
		i.Snaps = append(i.Snaps, snap)
		c.putImage(i)
		return nil
	}); err != nil {
		return err
	}
	reach("snapshot: entered")
	return b.withImage(image, func(img *rbd.Image) error {
		_, err := img.CreateSnapshot(snap)
		if isExists(err) {
			// An attempt that failed left it, and it may be of another moment.
			if err = img.GetSnapshot(snap).Remove(); err == nil {
				_, err = img.CreateSnapshot(snap)
			}
		}
		return wrap(err, "snapshot %s of image %s", snap, img.GetName())
	})
}

// freeSnap is a name for a snapshot that the image has not.
func freeSnap(i imageRecord, name, id string) string {
	if slices.Contains(i.Snaps, name) {
		return name + "~" + id
	}
	return name
}

// need is what lvols and clones need of images.
type need struct {
	heads map[string]bool
	snaps map[[2]string]bool // image, snapshot
}

func (b *Backend) needed() (need, []*imageRecord) {
	b.mu.RLock()
	defer b.mu.RUnlock()
	n := need{heads: make(map[string]bool), snaps: make(map[[2]string]bool)}
	for _, r := range b.index.lvols {
		if !r.snapshot() {
			n.heads[r.Image] = true
		}
		if s := r.ownSnap(); s != "" {
			n.snaps[[2]string{r.Image, s}] = true
		}
	}
	for _, i := range b.index.images {
		if i.Parent != "" {
			n.snaps[[2]string{i.Parent, i.ParentSnap}] = true
		}
	}
	var idle []*imageRecord
	for _, id := range slices.Sorted(maps.Keys(b.index.images)) {
		if b.making[id] == 0 {
			idle = append(idle, b.index.images[id])
		}
	}
	return n, idle
}

// collect removes images and snapshots that nothing needs, over and over, since what an
// image was a clone of may go after it. What somebody has open stays for the next time.
func (b *Backend) collect(ctx context.Context) error {
	b.sweeps.Lock()
	defer b.sweeps.Unlock()
	failed := make(map[string]error)
	for changed := true; changed; {
		changed = false
		n, idle := b.needed()
		for _, i := range idle {
			if ctx.Err() != nil {
				return kind.Wrap(kind.Canceled, context.Cause(ctx))
			}
			if failed[i.ID] != nil {
				continue
			}
			did, err := b.collectImage(ctx, i, n)
			if err != nil {
				failed[i.ID] = err
				b.log.Info("an image that nothing needs stays for now", "image", b.imageName(i.ID), "error", err)
			}
			changed = changed || did
		}
	}
	return errors.Join(slices.Collect(maps.Values(failed))...)
}

func (b *Backend) collectImage(ctx context.Context, i *imageRecord, n need) (changed bool, err error) {
	keep := make([]string, 0, len(i.Snaps))
	for _, s := range i.Snaps {
		if n.snaps[[2]string{i.ID, s}] {
			keep = append(keep, s)
		}
	}
	head := n.heads[i.ID]
	if len(keep) == len(i.Snaps) && (head || i.Headless && len(keep) > 0) {
		return false, nil
	}
	// Nobody may begin to use it now.
	defer b.hold(i.ID)()
	if len(keep) < len(i.Snaps) {
		err := b.withImage(i.ID, func(img *rbd.Image) error {
			for _, s := range i.Snaps {
				if slices.Contains(keep, s) {
					continue
				}
				if err := img.GetSnapshot(s).Remove(); err != nil && !isNotFound(err) {
					return wrap(err, "remove snapshot %s", s)
				}
				reach("collect: snapshot removed")
			}
			return nil
		})
		if err != nil && !isNotFound(err) {
			return false, err
		}
	}
	switch {
	case !head && len(keep) == 0:
		if err := rbd.RemoveImage(b.c.pool, b.imageName(i.ID)); err != nil && !isNotFound(err) {
			return false, wrap(err, "remove image %s", b.imageName(i.ID))
		}
		reach("collect: image removed")
		return true, b.commit(ctx, func(c *change) error { c.removeImage(i.ID); return nil })
	case !head && !i.Headless:
		if err := b.behead(i.ID, keep[len(keep)-1]); err != nil {
			return false, err
		}
		reach("collect: head cut")
	}
	return true, b.commit(ctx, func(c *change) error {
		now := c.image(i.ID)
		now.Snaps = slices.DeleteFunc(now.Snaps, func(s string) bool { return slices.Contains(i.Snaps, s) && !slices.Contains(keep, s) })
		now.Headless = now.Headless || !head
		c.putImage(now)
		return nil
	})
}

// behead frees what an image's head has besides its newest snapshot.
func (b *Backend) behead(id, newest string) error {
	return b.withImage(id, func(img *rbd.Image) error {
		size, err := img.GetSize()
		if err == nil && size > 0 {
			var own int64
			if own, err = objects(img, newest, size); err == nil && own > 0 {
				err = img.Resize(0)
			}
		}
		return wrap(err, "free the head of image %s", img.GetName())
	})
}

// objects counts the objects in which an image differs from an older snapshot of it, or that
// it has at all when from is empty.
func objects(img *rbd.Image, from string, size uint64) (int64, error) {
	info, err := img.Stat()
	if err != nil {
		return 0, err
	}
	n := int64(0)
	err = img.DiffIterate(rbd.DiffIterateConfig{
		SnapName: from, Length: size, IncludeParent: rbd.ExcludeParent, WholeObject: rbd.EnableWholeObject,
		Callback: func(_, length uint64, exists int, _ any) int {
			if exists != 0 {
				n += int64((length + info.Obj_size - 1) / info.Obj_size)
			}
			return 0
		},
	})
	return n, err
}

// countObjects counts what r has itself.
func (b *Backend) countObjects(r *lvolRecord) (int64, error) {
	if r.Empty {
		return 0, nil
	}
	from := b.snapBelow(r)
	if r.ownSnap() == "" {
		n := int64(0)
		err := b.withImage(r.Image, func(img *rbd.Image) (err error) {
			n, err = countHead(img, from)
			return err
		})
		return n, err
	}
	img, err := b.openImage(r.Image, r.ownSnap())
	if err != nil {
		return 0, err
	}
	n, err := countHead(img, from)
	return n, errors.Join(err, img.Close())
}

func countHead(img *rbd.Image, from string) (int64, error) {
	size, err := img.GetSize()
	if err != nil || size == 0 {
		return 0, err
	}
	return objects(img, from, size)
}

// snapBelow is the RBD snapshot of r's image that r is based on, "" for none: that of the
// next older lvol.
func (b *Backend) snapBelow(r *lvolRecord) string {
	b.mu.RLock()
	defer b.mu.RUnlock()
	i := b.index.images[r.Image]
	if i == nil {
		return ""
	}
	below := ""
	for _, s := range i.Snaps {
		if s == r.Snap && r.Snap != "" {
			break
		}
		if s != readSnap && b.isLvol(r.Image, s) {
			below = s
		}
	}
	return below
}

// isLvol tells whether an RBD snapshot is an lvol. The caller holds mu.
func (b *Backend) isLvol(image, snap string) bool {
	for _, r := range b.index.lvols {
		if r.Image == image && r.Snap == snap {
			return true
		}
	}
	return false
}

// space asks for the pool's capacity and what is free, in bytes of data: what replicas
// take is divided out. The capacity is what all pools share.
func (c *cluster) space(pool string) (space, error) {
	var df struct {
		Stats struct {
			Total int64 `json:"total_bytes"`
		} `json:"stats"`
		Pools []struct {
			Name  string `json:"name"`
			Stats struct {
				MaxAvail int64 `json:"max_avail"`
			} `json:"stats"`
		} `json:"pools"`
	}
	if err := c.ask(map[string]string{"prefix": "df", "format": "json"}, &df); err != nil {
		return space{}, err
	}
	var replicas struct {
		Size int64 `json:"size"`
	}
	if err := c.ask(map[string]string{"prefix": "osd pool get", "pool": pool, "var": "size", "format": "json"}, &replicas); err != nil {
		return space{}, err
	}
	for _, p := range df.Pools {
		if p.Name == pool {
			// With erasure coding the pieces are counted and less than a replica each.
			total := max(df.Stats.Total/max(replicas.Size, 1), p.Stats.MaxAvail)
			return space{at: time.Now(), total: total, free: p.Stats.MaxAvail}, nil
		}
	}
	return space{}, kind.Errorf(kind.NotFound, "what Ceph says of the free space has no pool %s", pool)
}

// ask has a monitor answer a command.
func (c *cluster) ask(command map[string]string, into any) error {
	what, err := json.Marshal(command)
	if err != nil {
		return kind.Errorf(kind.Invalid, "encode a command: %w", err)
	}
	raw, status, err := c.conn.MonCommand(what)
	if err != nil {
		return wrap(err, "ask Ceph %s: %s", what, status)
	}
	if err := json.Unmarshal(raw, into); err != nil {
		return kind.Errorf(kind.IO, "what Ceph says to %s: %w", what, err)
	}
	return nil
}
