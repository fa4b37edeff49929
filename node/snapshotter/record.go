package snapshotter

import (
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/google/uuid"
	bolt "go.etcd.io/bbolt"

	"github.com/thaw-project/thaw/image/annotation"
	"github.com/thaw-project/thaw/image/block"
	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/node/imagemgmt"
)

// What the snapshotter must remember beyond containerd's own metadata is in buckets
// beside it, in the same file and the same transactions:
//
//	thaw/version             "1"
//	thaw/instance            8 hex digits, drawn once
//	thaw/snapshots/<id>      record of a snapshot, JSON
//	thaw/removed/<id>        record of a removed snapshot that is not cleaned up yet
//	thaw/uses/<resource>\0<id>   snapshot id needs the resource to be up
//	thaw/leaves/<leaf>\0<id>     remote snapshot id came with image leaf
//	thaw/mounted/<resource>  device number of the file system that shows its disk
//
// A snapshot without a record is an ordinary one. Labels are what clients wrote and
// decide nothing.
var (
	bucketThaw      = []byte("thaw")
	keyVersion      = []byte("version")
	keyInstance     = []byte("instance")
	bucketSnapshots = []byte("snapshots")
	bucketRemoved   = []byte("removed")
	bucketUses      = []byte("uses")
	bucketLeaves    = []byte("leaves")
	bucketMounted   = []byte("mounted")
)

const recordVersion = 1

// form is how a snapshot keeps its content.
type form string

const (
	formDirectory form = "directory" // fs and work directories
	formRemote    form = "remote"    // blocks, nothing of its own
	formDisk      form = "disk"      // a writable layer of image-mgmt
)

// diskLayout says what the file system on a writable disk holds.
type diskLayout string

const (
	layoutRoot  diskLayout = "root"  // the root file system
	layoutUpper diskLayout = "upper" // directories upper and work of an overlay
)

type record struct {
	Form   form        `json:"form"`
	Remote *remoteInfo `json:"remote,omitempty"`
	Disk   *diskInfo   `json:"disk,omitempty"`
	// FellBack is the leaf of the converted image whose layer was unpacked the
	// ordinary way because it could not be attached.
	FellBack string `json:"fell_back,omitempty"`
	// Uses are the resources that must be up while the snapshot exists.
	Uses []string `json:"uses,omitempty"`
}

type remoteInfo struct {
	Block      string           `json:"block"`
	Leaf       string           `json:"leaf"`
	Mode       block.Mode       `json:"mode"`
	Filesystem block.Filesystem `json:"filesystem"`
	Index      int              `json:"index"`
	Count      int              `json:"count"`
	Target     string           `json:"target"`
	// Protected means that the layer's own block is among Uses in place of the
	// image's leaf, see protect.
	Protected bool `json:"protected,omitempty"`
}

func remoteOf(r annotation.LayerRef) *remoteInfo {
	return &remoteInfo{
		Block: r.Block, Leaf: r.Leaf, Mode: r.Mode, Filesystem: r.Filesystem,
		Index: r.Index, Count: r.Count, Target: r.Target,
	}
}

func (r *remoteInfo) top() bool { return r.Index == r.Count-1 }

// base is the block that shows this layer and those below: the image's leaf, which
// its containers share, or for a lower layer the layer's own.
func (r *remoteInfo) base() blockRef {
	if r.top() {
		return blockRef{r.Leaf, r.Filesystem, r.Target}
	}
	return blockRef{r.Block, r.Filesystem, r.Target}
}

type diskInfo struct {
	Backing string `json:"backing"`
	// Target stores Backing; empty is this machine's own store.
	Target    string     `json:"target,omitempty"`
	Layout    diskLayout `json:"layout"`
	Committed bool       `json:"committed"`
	// UID and GID own the root directory of an overlay on the disk.
	UID int `json:"uid,omitempty"`
	GID int `json:"gid,omitempty"`
}

// block is what the disk is over.
func (d *diskInfo) block() imagemgmt.Block { return imagemgmt.Block{Target: d.Target, Name: d.Backing} }

// link is one snapshot of a chain.
type link struct {
	id string
	record
}

// records are Thaw's buckets in one transaction.
type records struct{ tx *bolt.Tx }

func (s *Snapshotter) transact(ctx context.Context, writable bool, fn func(context.Context, records) error) error {
	ctx, t, err := s.ms.TransactionContext(ctx, writable)
	if err != nil {
		return fmt.Errorf("snapshot metadata: %w", err)
	}
	tx, ok := t.(*bolt.Tx)
	if !ok {
		return errors.Join(fmt.Errorf("snapshot metadata: transaction is a %T", t), t.Rollback())
	}
	if err := fn(ctx, records{tx}); err != nil || !writable {
		return errors.Join(err, tx.Rollback())
	}
	if err := tx.Commit(); err != nil {
		return fmt.Errorf("commit snapshot metadata: %w", err)
	}
	return nil
}

func (s *Snapshotter) view(ctx context.Context, fn func(context.Context, records) error) error {
	return s.transact(ctx, false, fn)
}

func (s *Snapshotter) update(ctx context.Context, fn func(context.Context, records) error) error {
	return s.transact(ctx, true, fn)
}

// init makes the buckets and refuses those of a newer program.
func (r records) init() error {
	b, err := r.tx.CreateBucketIfNotExists(bucketThaw)
	if err != nil {
		return err
	}
	if v := b.Get(keyVersion); v != nil {
		n, err := strconv.Atoi(string(v))
		if err != nil || n < 1 {
			return kind.Errorf(kind.Corrupt, "snapshot records have version %.20q", v)
		}
		if n > recordVersion {
			return kind.Errorf(kind.Unsupported, "snapshot records have version %d, this program knows %d: run the newer one", n, recordVersion)
		}
	} else if err := b.Put(keyVersion, []byte(strconv.Itoa(recordVersion))); err != nil {
		return err
	}
	if b.Get(keyInstance) == nil {
		id := uuid.New()
		if err := b.Put(keyInstance, []byte(hex.EncodeToString(id[:4]))); err != nil {
			return err
		}
	}
	for _, name := range [][]byte{bucketSnapshots, bucketRemoved, bucketUses, bucketLeaves, bucketMounted} {
		if _, err := b.CreateBucketIfNotExists(name); err != nil {
			return err
		}
	}
	return nil
}

// instance tells this snapshotter's disks from those of another on the machine.
func (r records) instance() string { return string(r.tx.Bucket(bucketThaw).Get(keyInstance)) }

func (r records) bucket(name []byte) *bolt.Bucket { return r.tx.Bucket(bucketThaw).Bucket(name) }

func decodeRecord(id string, b []byte) (record, error) {
	rec := record{Form: formDirectory}
	if b == nil {
		return rec, nil
	}
	if err := json.Unmarshal(b, &rec); err != nil {
		return rec, kind.Errorf(kind.Corrupt, "record of snapshot %s: %w", id, err)
	}
	switch {
	case rec.Form == formDirectory:
	case rec.Form == formRemote && rec.Remote != nil:
	case rec.Form == formDisk && rec.Disk != nil:
	default:
		return rec, kind.Errorf(kind.Corrupt, "record of snapshot %s: form %.40q without its fields", id, rec.Form)
	}
	return rec, nil
}

func (r records) get(id string) (record, error) {
	return decodeRecord(id, r.bucket(bucketSnapshots).Get([]byte(id)))
}

// put writes the record of id, and the index of uses and leaves with it.
func (r records) put(id string, rec record) error {
	old, err := r.get(id)
	if err != nil {
		return err
	}
	if err := r.unindex(id, old); err != nil {
		return err
	}
	b, err := json.Marshal(rec)
	if err != nil {
		return err
	}
	if err := r.bucket(bucketSnapshots).Put([]byte(id), b); err != nil {
		return err
	}
	for _, u := range rec.Uses {
		if err := r.bucket(bucketUses).Put(indexKey(u, id), nil); err != nil {
			return err
		}
	}
	if rec.Remote != nil {
		return r.bucket(bucketLeaves).Put(indexKey(rec.Remote.Leaf, id), nil)
	}
	return nil
}

func (r records) unindex(id string, rec record) error {
	for _, u := range rec.Uses {
		if err := r.bucket(bucketUses).Delete(indexKey(u, id)); err != nil {
			return err
		}
	}
	if rec.Remote != nil {
		return r.bucket(bucketLeaves).Delete(indexKey(rec.Remote.Leaf, id))
	}
	return nil
}

// retire moves the record of a removed snapshot to those that wait for cleaning up.
func (r records) retire(id string) (record, error) {
	rec, err := r.get(id)
	if err != nil {
		return rec, err
	}
	if err := r.unindex(id, rec); err != nil {
		return rec, err
	}
	b, err := json.Marshal(rec)
	if err != nil {
		return rec, err
	}
	if err := r.bucket(bucketSnapshots).Delete([]byte(id)); err != nil {
		return rec, err
	}
	return rec, r.bucket(bucketRemoved).Put([]byte(id), b)
}

// forget ends a retired record: nothing of the snapshot is left.
func (r records) forget(id string) error { return r.bucket(bucketRemoved).Delete([]byte(id)) }

// removed lists what waits for cleaning up.
func (r records) removed() ([]link, error) {
	var out []link
	err := r.bucket(bucketRemoved).ForEach(func(k, v []byte) error {
		rec, err := decodeRecord(string(k), v)
		out = append(out, link{string(k), rec})
		return err
	})
	return out, err
}

// all calls fn with every live record.
func (r records) all(fn func(link) error) error {
	return r.bucket(bucketSnapshots).ForEach(func(k, v []byte) error {
		rec, err := decodeRecord(string(k), v)
		if err != nil {
			return err
		}
		return fn(link{string(k), rec})
	})
}

// used tells whether any snapshot needs resource.
func (r records) used(resource string) bool {
	return len(r.index(bucketUses, resource, 1)) > 0
}

// leafMembers lists the remote snapshots that came with leaf.
func (r records) leafMembers(leaf string) []string { return r.index(bucketLeaves, leaf, 0) }

// index lists up to limit ids under name, all when limit is 0.
func (r records) index(bucket []byte, name string, limit int) (ids []string) {
	prefix := indexKey(name, "")
	c := r.bucket(bucket).Cursor()
	for k, _ := c.Seek(prefix); k != nil && bytes.HasPrefix(k, prefix); k, _ = c.Next() {
		ids = append(ids, string(k[len(prefix):]))
		if len(ids) == limit {
			break
		}
	}
	return ids
}

// names lists the distinct names of an index.
func (r records) names(bucket []byte) (names []string) {
	c := r.bucket(bucket).Cursor()
	for k, _ := c.First(); k != nil; k, _ = c.Next() {
		name, _, _ := bytes.Cut(k, []byte{0})
		if n := len(names); n == 0 || names[n-1] != string(name) {
			names = append(names, string(name))
		}
	}
	return names
}

func indexKey(name, id string) []byte { return []byte(name + "\x00" + id) }

// chain reads the snapshots from parent, or when parent is "" none, down to the
// lowest.
func (r records) chain(ctx context.Context, parent string) ([]link, error) {
	var out []link
	for name := parent; name != ""; {
		id, info, _, err := storage.GetInfo(ctx, name)
		if err != nil {
			return nil, fmt.Errorf("parent snapshot %q: %w", name, err)
		}
		rec, err := r.get(id)
		if err != nil {
			return nil, err
		}
		out = append(out, link{id, rec})
		name = info.Parent
	}
	return out, nil
}

func labelsOf(opts []snapshots.Opt) (map[string]string, error) {
	var info snapshots.Info
	for _, opt := range opts {
		if err := opt(&info); err != nil {
			return nil, err
		}
	}
	return info.Labels, nil
}
