package attacher

import (
	"bytes"
	"encoding/json"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"
	"go.etcd.io/bbolt"

	attacherv1 "github.com/thaw-project/thaw/api/attacher/v1"
	"github.com/thaw-project/thaw/image/annotation"
	"github.com/thaw-project/thaw/image/block"
	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/statedb"
)

// The database, format version 3 (1 had no attachments; 2 no exports to nodes, no writable
// layers and no ids of attachments). Keys are lvol names unless said otherwise, values
// are JSON.
//
//	"work"      -> workRecord     an lvol that lives by a hold; written before it is created
//	"exports"   -> exportRecord   an lvol that is shown for a hold; written before it is shown
//	"blocks"    -> blockRecord    an lvol that came from a conversion, so that removing
//	                              images may delete it; written before it gets its name
//	"removals"  -> removalRecord  a block to delete as soon as nothing uses it; written
//	                              together with the removal of its image
//	"renames"   -> renameRecord   under the new name: what a rename is or was from
//	"attachments" node \0 block -> attachmentRecord   a block that another machine may read;
//	                              written before it may
//	"writables" node \0 id -> writableRecord   a node's writable layer; written before its
//	                              lvol is made, dropped after that is deleted
//	"images"    reference \0 platform -> imageRecord
//
// A record whose lvol does not exist means that the process died in between; it is
// harmless and dropped by the next sweep of its kind.
const (
	dbPart    = "attacher"
	dbVersion = 3
)

var (
	workBucket     = []byte("work")
	exportsBucket  = []byte("exports")
	blocksBucket   = []byte("blocks")
	removalsBucket = []byte("removals")
	renamesBucket  = []byte("renames")
	imagesBucket   = []byte("images")

	attachmentsBucket = []byte("attachments")
	writablesBucket   = []byte("writables")
)

type workRecord struct {
	Owner string `json:"owner"`
}

type exportRecord struct {
	Owner    string `json:"owner"`
	ReadOnly bool   `json:"read_only,omitempty"`

	// Of an export to another machine; empty for a file on this one.
	Node             string `json:"node,omitempty"`
	Transport        string `json:"transport,omitempty"`
	NSID             uint32 `json:"nsid,omitempty"`
	ID               string `json:"id,omitempty"`
	CreatedUnixNanos int64  `json:"created,omitempty"`
}

type blockRecord struct {
	CompletedUnixNanos int64 `json:"completed"`
}

type removalRecord struct {
	Depth int `json:"depth"` // place in its image's chain: clones before their parents
}

type renameRecord struct {
	From string `json:"from"`
}

type imageRecord struct {
	Reference        string   `json:"reference"`
	Platform         string   `json:"platform"`
	Source           string   `json:"source"`
	ManifestDigest   string   `json:"manifest_digest"`
	Mode             string   `json:"mode"`
	Filesystem       string   `json:"filesystem"`
	VirtualSizeBytes int64    `json:"virtual_size_bytes"`
	Blocks           []string `json:"blocks"`
	ChainIDs         []string `json:"chain_ids"`
	CreatedUnixNanos int64    `json:"created"`
}

// Bounds of an image record, beyond annotation.MaxLayers. A key must fit bbolt's
// 32 KiB.
const (
	maxReferenceBytes = 4096 // an OCI layout's path is one
	maxPlatformBytes  = 128
)

func openDB(path string) (*statedb.DB, error) {
	return statedb.Open(statedb.Options{
		Path: path, Part: dbPart, Version: dbVersion,
		Buckets: []string{
			string(workBucket), string(exportsBucket), string(blocksBucket),
			string(removalsBucket), string(renamesBucket), string(imagesBucket),
			string(attachmentsBucket), string(writablesBucket),
		},
		// Older programs must not open it: they would delete what nodes read and write.
		Upgrade: upgrade,
	})
}

// upgrade gives the attachments of a version without ids theirs.
func upgrade(tx *bbolt.Tx, _ uint32) error {
	b := tx.Bucket(attachmentsBucket)
	records := make(map[string]attachmentRecord)
	if err := b.ForEach(func(k, v []byte) error {
		_, r, err := decodeAttachment(k, v)
		r.ID = newAttachmentID()
		records[string(k)] = r
		return err
	}); err != nil {
		return err
	}
	for k, r := range records {
		if err := put(tx, attachmentsBucket, k, r); err != nil {
			return err
		}
	}
	return nil
}

func decode(raw []byte, into any) error {
	d := json.NewDecoder(bytes.NewReader(raw))
	d.DisallowUnknownFields()
	if err := d.Decode(into); err != nil {
		return err
	}
	if d.More() {
		return kind.Errorf(kind.Corrupt, "more than one value")
	}
	return nil
}

// get reads the record of name into a value of type T; ok is false when there is none.
func get[T any](tx *bbolt.Tx, bucket []byte, name string) (record T, ok bool, err error) {
	raw := tx.Bucket(bucket).Get([]byte(name))
	if raw == nil {
		return record, false, nil
	}
	if err := decode(raw, &record); err != nil {
		return record, false, kind.Errorf(kind.Corrupt, "record %.80q of %s is damaged: %w", name, bucket, err)
	}
	return record, true, nil
}

// all reads a bucket whose keys are lvol names.
func all[T any](tx *bbolt.Tx, bucket []byte) (map[string]T, error) {
	out := make(map[string]T)
	err := tx.Bucket(bucket).ForEach(func(k, v []byte) error {
		if err := checkName("lvol name", string(k)); err != nil {
			return kind.Errorf(kind.Corrupt, "record %.80q of %s is damaged: %w", k, bucket, err)
		}
		r, _, err := get[T](tx, bucket, string(k))
		if err == nil {
			out[string(k)] = r
		}
		return err
	})
	return out, err
}

func put(tx *bbolt.Tx, bucket []byte, name string, record any) error {
	raw, err := json.Marshal(record)
	if err != nil {
		return err
	}
	return tx.Bucket(bucket).Put([]byte(name), raw)
}

// lookup is get in a transaction of its own.
func lookup[T any](db *statedb.DB, bucket []byte, name string) (record T, ok bool, err error) {
	err = db.View(func(tx *bbolt.Tx) (err error) {
		record, ok, err = get[T](tx, bucket, name)
		return err
	})
	return record, ok, err
}

func (a *Attacher) put(bucket []byte, name string, record any) error {
	return a.db.Update(func(tx *bbolt.Tx) error { return put(tx, bucket, name, record) })
}

func (a *Attacher) drop(name string, buckets ...[]byte) error {
	return a.db.Update(func(tx *bbolt.Tx) error {
		for _, b := range buckets {
			if err := tx.Bucket(b).Delete([]byte(name)); err != nil {
				return err
			}
		}
		return nil
	})
}

func imageKey(reference, platform string) string { return reference + "\x00" + platform }

func decodeImage(key, raw []byte) (imageRecord, error) {
	var r imageRecord
	err := decode(raw, &r)
	if err == nil {
		err = r.validate()
	}
	if err == nil && string(key) != imageKey(r.Reference, r.Platform) {
		err = kind.Errorf(kind.Corrupt, "it is of %.80q", r.Reference)
	}
	if err != nil {
		return imageRecord{}, kind.Errorf(kind.Corrupt, "record %.80q of an image is damaged: %w", key, err)
	}
	return r, nil
}

// allImages reads the image records in order of reference and platform.
func allImages(tx *bbolt.Tx) ([]imageRecord, error) {
	var out []imageRecord
	err := tx.Bucket(imagesBucket).ForEach(func(k, v []byte) error {
		r, err := decodeImage(k, v)
		if err == nil {
			out = append(out, r)
		}
		return err
	})
	return out, err
}

func (r *imageRecord) validate() error {
	if r.Reference == "" || len(r.Reference) > maxReferenceBytes || strings.ContainsFunc(r.Reference, isControl) {
		return kind.Errorf(kind.Invalid, "image reference %.80q: must be 1 to %d printable bytes", r.Reference, maxReferenceBytes)
	}
	if len(r.Source) > maxReferenceBytes || strings.ContainsFunc(r.Source, isControl) {
		return kind.Errorf(kind.Invalid, "image source %.80q: must be at most %d printable bytes", r.Source, maxReferenceBytes)
	}
	if parts := strings.Split(r.Platform, "/"); len(parts) < 2 || len(parts) > 3 || slices.Contains(parts, "") ||
		len(r.Platform) > maxPlatformBytes || strings.ContainsFunc(r.Platform, isControl) {
		return kind.Errorf(kind.Invalid, "platform %.80q of image %s is not os/arch[/variant]", r.Platform, r.Reference)
	}
	if err := digest.Digest(r.ManifestDigest).Validate(); err != nil {
		return kind.Errorf(kind.Invalid, "manifest digest %.80q of image %s: %w", r.ManifestDigest, r.Reference, err)
	}
	if _, err := block.ParseMode(r.Mode); err != nil {
		return err
	}
	if _, err := block.ParseFilesystem(r.Filesystem); err != nil {
		return err
	}
	if r.VirtualSizeBytes < 0 {
		return kind.Errorf(kind.Invalid, "virtual size %d of image %s is negative", r.VirtualSizeBytes, r.Reference)
	}
	if n := len(r.Blocks); n == 0 || n > annotation.MaxLayers+1 {
		return kind.Errorf(kind.Invalid, "image %s has %d blocks: must be 1 to %d", r.Reference, n, annotation.MaxLayers+1)
	}
	seen := make(map[string]bool, len(r.Blocks))
	for i, name := range r.Blocks {
		scope, err := block.ParseName(name)
		if err != nil {
			return err
		}
		if last := i == len(r.Blocks)-1; (scope == block.Soldier) != last {
			return kind.Errorf(kind.Invalid, "image %s: the soldier, and no other block, must be the last; %s is number %d", r.Reference, name, i+1)
		}
		if seen[name] {
			return kind.Errorf(kind.Invalid, "image %s names block %s twice", r.Reference, name)
		}
		seen[name] = true
	}
	if len(r.ChainIDs) > annotation.MaxLayers {
		return kind.Errorf(kind.Invalid, "image %s has %d chain ids: at most %d", r.Reference, len(r.ChainIDs), annotation.MaxLayers)
	}
	for _, id := range r.ChainIDs {
		if err := digest.Digest(id).Validate(); err != nil {
			return kind.Errorf(kind.Invalid, "chain id %.80q of image %s: %w", id, r.Reference, err)
		}
	}
	return nil
}

func isControl(r rune) bool { return r < ' ' || r == 0x7f }

func imageFromProto(i *attacherv1.Image) imageRecord {
	return imageRecord{
		Reference: i.GetReference(), Platform: i.GetPlatform(), Source: i.GetSource(), ManifestDigest: i.GetManifestDigest(),
		Mode: i.GetMode(), Filesystem: i.GetFilesystem(), VirtualSizeBytes: i.GetVirtualSizeBytes(),
		Blocks: i.GetBlocks(), ChainIDs: i.GetChainIds(), CreatedUnixNanos: i.GetCreatedUnixNanos(),
	}
}

func (r *imageRecord) proto() *attacherv1.Image {
	return &attacherv1.Image{
		Reference: r.Reference, Platform: r.Platform, Source: r.Source, ManifestDigest: r.ManifestDigest,
		Mode: r.Mode, Filesystem: r.Filesystem, VirtualSizeBytes: r.VirtualSizeBytes,
		Blocks: r.Blocks, ChainIds: r.ChainIDs, CreatedUnixNanos: r.CreatedUnixNanos,
	}
}
