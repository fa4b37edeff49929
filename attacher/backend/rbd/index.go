//go:build ceph

package rbd

import (
	"bytes"
	"context"
	"encoding/json"
	"iter"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/ceph/go-ceph/rados"
	"github.com/google/uuid"

	"github.com/thaw-project/thaw/kind"
)

// The index is the omap of one object:
//
//	format        formatVersion in decimal
//	store         storeRecord
//	session       sessionRecord, while a process has the store or after one that was killed
//	lvol.<UUID>   lvolRecord
//	image.<id>    imageRecord
//
// The object's data is the id of the session that may change it.
const (
	formatVersion = "1"
	keyFormat     = "format"
	keyStore      = "store"
	keySession    = "session"
	lvolPrefix    = "lvol."
	imagePrefix   = "image."

	// readSnap is the RBD snapshot of a read-only lvol that is no lvol snapshot. No lvol has
	// such a name.
	readSnap = "~read-only"

	// indexPage is how many keys are read at once.
	indexPage = 1024
)

type storeRecord struct {
	UUID        string `json:"uuid"`
	ObjectBytes int64  `json:"object_bytes"`
}

// lvolRecord is an lvol. Values in memory are never changed, only replaced.
type lvolRecord struct {
	UUID      string `json:"uuid"`
	Name      string `json:"name"`
	SizeBytes int64  `json:"size"`
	// ResizeBytes is what SizeBytes is about to become; 0 is nothing.
	ResizeBytes int64  `json:"resize,omitempty"`
	Parent      string `json:"parent,omitempty"` // UUID of an lvol snapshot
	Image       string `json:"image"`            // id
	Snap        string `json:"snap,omitempty"`   // of an lvol snapshot
	ReadOnly    bool   `json:"read_only,omitempty"`
	// Empty: it was made read-only as a clone that nobody wrote to. Its parent's snapshot is
	// what it shows, so that is read.
	Empty            bool  `json:"empty,omitempty"`
	CreatedUnixNanos int64 `json:"created"`
}

func (r *lvolRecord) snapshot() bool { return r.Snap != "" }
func (r *lvolRecord) fixed() bool    { return r.Snap != "" || r.ReadOnly }

// ownSnap is the RBD snapshot of its image that shows the lvol, "" for the head.
func (r *lvolRecord) ownSnap() string {
	if r.Snap == "" && r.ReadOnly && !r.Empty {
		return readSnap
	}
	return r.Snap
}

// source is the image, and the snapshot of it, that shows r.
func (b *Backend) source(r *lvolRecord) (image, snap string) {
	b.mu.RLock()
	defer b.mu.RUnlock()
	return b.sourceLocked(r)
}

func (b *Backend) sourceLocked(r *lvolRecord) (image, snap string) {
	if i := b.index.images[r.Image]; r.Empty && i != nil && i.Parent != "" {
		return i.Parent, i.ParentSnap
	}
	return r.Image, r.ownSnap()
}

// imageRecord is an RBD image, or what is left or begun of one.
type imageRecord struct {
	ID         string   `json:"id"`
	Parent     string   `json:"parent,omitempty"` // id of the image that it is a clone of
	ParentSnap string   `json:"parent_snap,omitempty"`
	Snaps      []string `json:"snaps,omitempty"` // in order of age; some may not be there
	// Headless: no lvol is the head any more, and what only it had is gone.
	Headless bool `json:"headless,omitempty"`
}

// index is the index in memory. It is read under Backend.mu.
type index struct {
	store  storeRecord
	lvols  map[string]*lvolRecord // by UUID
	names  map[string]*lvolRecord
	images map[string]*imageRecord
	clones map[string]map[string]*lvolRecord // of an lvol snapshot, by its UUID and theirs
}

func newIndex() *index {
	return &index{
		lvols: make(map[string]*lvolRecord), names: make(map[string]*lvolRecord), images: make(map[string]*imageRecord),
		clones: make(map[string]map[string]*lvolRecord),
	}
}

func (x *index) set(r *lvolRecord) {
	x.drop(r.UUID)
	x.lvols[r.UUID], x.names[r.Name] = r, r
	if r.Parent != "" {
		if x.clones[r.Parent] == nil {
			x.clones[r.Parent] = make(map[string]*lvolRecord)
		}
		x.clones[r.Parent][r.UUID] = r
	}
}

func (x *index) drop(id string) {
	r := x.lvols[id]
	if r == nil {
		return
	}
	delete(x.lvols, id)
	if x.names[r.Name] == r {
		delete(x.names, r.Name)
	}
	if delete(x.clones[r.Parent], id); len(x.clones[r.Parent]) == 0 {
		delete(x.clones, r.Parent)
	}
}

// readIndex reads the object.
func readIndex(pool *rados.IOContext, oid string) (*index, map[string][]byte, error) {
	values, err := pool.GetAllOmapValues(oid, "", "", indexPage)
	if err != nil {
		return nil, nil, wrap(err, "read the index %s", oid)
	}
	x := newIndex()
	if v := string(values[keyFormat]); v != formatVersion {
		return nil, nil, kind.Errorf(kind.Unsupported, "the index %s has format %.20q, this program knows %s", oid, v, formatVersion)
	}
	decode := func(key string, raw []byte, into any) error {
		if err := json.Unmarshal(raw, into); err != nil {
			return kind.Errorf(kind.Corrupt, "record %.80q of the index %s is damaged: %w", key, oid, err)
		}
		return nil
	}
	if err := decode(keyStore, values[keyStore], &x.store); err != nil {
		return nil, nil, err
	}
	if _, err := uuid.Parse(x.store.UUID); err != nil || x.store.ObjectBytes < minObjectBytes || x.store.ObjectBytes > maxObjectBytes {
		return nil, nil, kind.Errorf(kind.Corrupt, "record %s of the index %s is damaged", keyStore, oid)
	}
	for _, key := range slices.Sorted(maps.Keys(values)) {
		switch {
		case strings.HasPrefix(key, lvolPrefix):
			r := &lvolRecord{}
			if err := decode(key, values[key], r); err != nil {
				return nil, nil, err
			}
			if lvolPrefix+r.UUID != key || !plain(r.Name) || r.Image == "" || r.SizeBytes <= 0 || x.names[r.Name] != nil {
				return nil, nil, kind.Errorf(kind.Corrupt, "record %.80q of the index %s is damaged", key, oid)
			}
			x.set(r)
		case strings.HasPrefix(key, imagePrefix):
			r := &imageRecord{}
			if err := decode(key, values[key], r); err != nil {
				return nil, nil, err
			}
			if imagePrefix+r.ID != key || !plain(r.ID) {
				return nil, nil, kind.Errorf(kind.Corrupt, "record %.80q of the index %s is damaged", key, oid)
			}
			x.images[r.ID] = r
		}
	}
	for _, r := range x.lvols {
		if x.images[r.Image] == nil {
			return nil, nil, kind.Errorf(kind.Corrupt, "the index %s has lvol %s and not its image %s", oid, r.Name, r.Image)
		}
	}
	if x.endless() {
		return nil, nil, kind.Errorf(kind.Corrupt, "the index %s has an lvol, or an image, that is its own ancestor", oid)
	}
	return x, values, nil
}

// endless tells whether somebody who goes from parent to parent would never arrive.
func (x *index) endless() bool {
	lvol := func(id string) string {
		if r := x.lvols[id]; r != nil {
			return r.Parent
		}
		return ""
	}
	image := func(id string) string {
		if r := x.images[id]; r != nil {
			return r.Parent
		}
		return ""
	}
	return round(maps.Keys(x.lvols), lvol) || round(maps.Keys(x.images), image)
}

func round(ids iter.Seq[string], parent func(string) string) bool {
	ends := map[string]bool{"": true} // false: on the way that is being gone
	for id := range ids {
		var way []string
		for at := id; !ends[at]; at = parent(at) {
			if _, been := ends[at]; been {
				return true
			}
			ends[at] = false
			way = append(way, at)
		}
		for _, at := range way {
			ends[at] = true
		}
	}
	return false
}

// change collects what one atomic operation changes in the index.
type change struct {
	b      *Backend
	lvols  map[string]*lvolRecord  // nil removes
	images map[string]*imageRecord // nil removes
}

func (c *change) put(r lvolRecord)       { c.lvols[r.UUID] = &r }
func (c *change) remove(id string)       { c.lvols[id] = nil }
func (c *change) putImage(r imageRecord) { c.images[r.ID] = &r }
func (c *change) removeImage(id string)  { c.images[id] = nil }

// lvol returns the lvol of that name as it is, kind.NotFound if there is none. Records
// only change by commits, one at a time, so it stays true within one.
func (c *change) lvol(name string) (lvolRecord, error) {
	r, err := c.b.find(name)
	if err != nil {
		return lvolRecord{}, err
	}
	return *r, nil
}

func (c *change) image(id string) imageRecord {
	c.b.mu.RLock()
	defer c.b.mu.RUnlock()
	r := *c.b.index.images[id]
	r.Snaps = slices.Clone(r.Snaps)
	return r
}

// commit runs f and writes what it asks for in one atomic operation. Nothing is written
// when f fails, when ctx has ended, or when another process has the store.
func (b *Backend) commit(ctx context.Context, f func(c *change) error) error {
	b.commits.Lock()
	defer b.commits.Unlock()
	c := &change{b: b, lvols: make(map[string]*lvolRecord), images: make(map[string]*imageRecord)}
	if err := f(c); err != nil {
		return err
	}
	if len(c.lvols) == 0 && len(c.images) == 0 {
		return nil
	}
	set := make(map[string][]byte)
	var removed []string
	note := func(key string, r any, gone bool) error {
		if gone {
			removed = append(removed, key)
			return nil
		}
		raw, err := json.Marshal(r)
		set[key] = raw
		return err
	}
	for id, r := range c.lvols {
		if err := note(lvolPrefix+id, r, r == nil); err != nil {
			return kind.Errorf(kind.Invalid, "encode a record: %w", err)
		}
	}
	for id, r := range c.images {
		if err := note(imagePrefix+id, r, r == nil); err != nil {
			return kind.Errorf(kind.Invalid, "encode a record: %w", err)
		}
	}
	if ctx.Err() != nil {
		return kind.Errorf(kind.Canceled, "%w", context.Cause(ctx))
	}
	if err := b.session.write(set, removed); err != nil {
		return err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	for id, r := range c.lvols {
		if r == nil {
			b.index.drop(id)
		}
	}
	for _, r := range c.lvols {
		if r != nil {
			b.index.set(r)
		}
	}
	for id, r := range c.images {
		if r == nil {
			delete(b.index.images, id)
		} else {
			b.index.images[id] = r
		}
	}
	return nil
}

// createIndex makes the object of a new store; it does nothing to one that is there.
func createIndex(pool *rados.IOContext, oid string, objectBytes int64) error {
	store, err := json.Marshal(storeRecord{UUID: uuid.NewString(), ObjectBytes: objectBytes})
	if err != nil {
		return kind.Errorf(kind.Invalid, "encode a record: %w", err)
	}
	op := rados.CreateWriteOp()
	defer op.Release()
	op.Create(rados.CreateExclusive)
	op.SetOmap(map[string][]byte{keyFormat: []byte(formatVersion), keyStore: store})
	if err := op.Operate(pool, oid, rados.OperationNoFlag); err != nil && !isExists(err) {
		return wrap(err, "create the index %s", oid)
	}
	return nil
}

// find returns the lvol of that name.
func (b *Backend) find(name string) (*lvolRecord, error) {
	b.mu.RLock()
	defer b.mu.RUnlock()
	if r := b.index.names[name]; r != nil {
		return r, nil
	}
	return nil, kind.Errorf(kind.NotFound, "no lvol %.160q", name)
}

func created() int64 { return time.Now().UnixNano() }

// pad makes the id of a session as long as the data that it is compared with.
func pad(id string) []byte { return append([]byte(id), bytes.Repeat([]byte{0}, 64-len(id))...) }
