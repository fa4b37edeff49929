package remote

import (
	"bytes"
	"encoding/json"
	"net"
	"slices"
	"strconv"
	"strings"

	"github.com/google/uuid"
	"go.etcd.io/bbolt"
	"google.golang.org/protobuf/proto"

	attacherv1 "github.com/thaw-project/thaw/api/attacher/v1"
	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/nvme"
	"github.com/thaw-project/thaw/statedb"
)

// The database, format version 2 (1 knew no transport but nvme-tcp, and no writable layers).
//
//	bucket "attached"   target \0 block -> record, JSON
//	bucket "maps"       target \0 block -> attacherv1.BlockMap, of a block in "attached"
//	bucket "writables"  target \0 id -> record, JSON, of a writable layer that is attached
//
// A record is written after the store has agreed and dropped after it has let go. What
// the store has and no record says is found by asking it, at every start and after
// every attach that failed.
const (
	dbPart    = "remote"
	dbVersion = 2
)

var (
	attachedBucket  = []byte("attached")
	mapsBucket      = []byte("maps")
	writablesBucket = []byte("writables")
)

// Bounds of what a store answers.
const (
	maxPortals   = 16
	maxRBDBytes  = 256     // of a name of Ceph
	maxSizeBytes = 1 << 50 // 1 PiB
)

type record struct {
	Transport  string    `json:"transport,omitempty"` // TransportTCP when it is empty
	Node       string    `json:"node,omitempty"`
	Attachment string    `json:"attachment,omitempty"` // the store's identifier of it
	Subsystem  string    `json:"subsystem,omitempty"`
	HostNQN    string    `json:"host_nqn,omitempty"`
	HostID     string    `json:"host_id,omitempty"`
	Portals    []Portal  `json:"portals,omitempty"`
	NSID       uint32    `json:"nsid,omitempty"`
	UUID       string    `json:"uuid,omitempty"`
	SizeBytes  int64     `json:"size_bytes"`
	RBD        *RBDImage `json:"rbd,omitempty"`
	// Of a writable layer: the block that it was made of.
	Block string `json:"block,omitempty"`
}

func (a record) equal(b record) bool {
	return a.Transport == b.Transport && a.Node == b.Node && a.Attachment == b.Attachment &&
		a.Subsystem == b.Subsystem && a.HostNQN == b.HostNQN && a.HostID == b.HostID && a.NSID == b.NSID && a.UUID == b.UUID &&
		a.SizeBytes == b.SizeBytes && slices.Equal(a.Portals, b.Portals) && a.sameImage(b) && a.Block == b.Block
}

func (a record) sameImage(b record) bool {
	return (a.RBD == nil) == (b.RBD == nil) && (a.RBD == nil || *a.RBD == *b.RBD)
}

// sameBytes tells whether a and b are attachments of the same lvol.
func (a record) sameBytes(b record) bool {
	return a.SizeBytes == b.SizeBytes && a.UUID == b.UUID && a.sameImage(b)
}

func (a record) export() Export {
	x := Export{
		Transport: a.Transport, Subsystem: a.Subsystem, HostNQN: a.HostNQN, HostID: a.HostID, Portals: slices.Clone(a.Portals),
		NSID: a.NSID, UUID: a.UUID, SizeBytes: a.SizeBytes, Writable: a.Block != "",
	}
	if a.RBD != nil {
		x.RBD = new(RBDImage)
		*x.RBD = *a.RBD
	}
	return x
}

// proto is the store's answer again, for who reaches the store instead of this process.
func (a record) proto(block, writable string) *attacherv1.Attachment {
	out := &attacherv1.Attachment{
		Block: block, Node: a.Node, Transport: a.Transport, SubsystemNqn: a.Subsystem, HostNqn: a.HostNQN, HostId: a.HostID,
		Nsid: a.NSID, Uuid: a.UUID, SizeBytes: a.SizeBytes, AttachmentId: a.Attachment, Writable: writable != "", WritableId: writable,
	}
	for _, p := range a.Portals {
		out.Portals = append(out.Portals, &attacherv1.Portal{Transport: p.Transport, Address: p.Address, Service: p.Service})
	}
	if i := a.RBD; i != nil {
		out.Rbd = &attacherv1.RbdImage{Pool: i.Pool, Image: i.Image, Snapshot: i.Snapshot, Cluster: i.Cluster}
	}
	return out
}

// recordOf takes a store's answer, which is believed only as far as it makes sense.
func recordOf(a *attacherv1.Attachment) (record, error) {
	r := record{
		Transport: a.GetTransport(), Node: a.GetNode(), Attachment: a.GetAttachmentId(),
		Subsystem: a.GetSubsystemNqn(), HostNQN: a.GetHostNqn(), HostID: a.GetHostId(), NSID: a.GetNsid(),
		UUID: a.GetUuid(), SizeBytes: a.GetSizeBytes(),
	}
	if r.Transport == "" {
		r.Transport = TransportTCP
	}
	for _, p := range a.GetPortals() {
		r.Portals = append(r.Portals, Portal{Transport: p.GetTransport(), Address: p.GetAddress(), Service: p.GetService()})
	}
	if i := a.GetRbd(); i != nil {
		r.RBD = &RBDImage{Cluster: i.GetCluster(), Pool: i.GetPool(), Image: i.GetImage(), Snapshot: i.GetSnapshot()}
	}
	if a.GetWritable() {
		r.Block = a.GetBlock()
		if r.Block == "" {
			return r, kind.Errorf(kind.Corrupt, "a writable layer of no block")
		}
	}
	return r, r.validate()
}

func (a record) validate() error {
	switch {
	case a.SizeBytes <= 0 || a.SizeBytes > maxSizeBytes || a.SizeBytes%512 != 0:
		return kind.Errorf(kind.Corrupt, "%d bytes", a.SizeBytes)
	case len(a.Attachment) > maxRBDBytes || len(a.Node) > maxRBDBytes || len(a.Block) > maxRBDBytes:
		return kind.Errorf(kind.Corrupt, "attachment %.80q of %.80q to %.80q", a.Attachment, a.Block, a.Node)
	case a.Transport == TransportRBD:
		return a.validateRBD()
	case a.Transport != TransportTCP && a.Transport != TransportRDMA:
		return kind.Errorf(kind.Corrupt, "transport %.40q", a.Transport)
	}
	_, hostErr := uuid.Parse(a.HostID)
	_, nsErr := uuid.Parse(a.UUID)
	switch {
	case nvme.CheckNQN(a.Subsystem) != nil || nvme.CheckNQN(a.HostNQN) != nil:
		return kind.Errorf(kind.Corrupt, "NQNs %.250q and %.250q", a.Subsystem, a.HostNQN)
	case hostErr != nil || nsErr != nil:
		return kind.Errorf(kind.Corrupt, "host %.80q and nvmeNamespace %.80q are not UUIDs", a.HostID, a.UUID)
	case a.NSID == 0 || a.RBD != nil:
		return kind.Errorf(kind.Corrupt, "nvmeNamespace %d", a.NSID)
	case len(a.Portals) == 0 || len(a.Portals) > maxPortals:
		return kind.Errorf(kind.Corrupt, "%d portals", len(a.Portals))
	}
	for _, p := range a.Portals {
		port, err := strconv.ParseUint(p.Service, 10, 16)
		if net.ParseIP(p.Address) == nil || err != nil || port == 0 || p.Transport != "tcp" && p.Transport != "rdma" {
			return kind.Errorf(kind.Corrupt, "portal %.80q", p)
		}
	}
	return nil
}

// validateRBD holds names to what Ceph's tools take as one name.
func (a record) validateRBD() error {
	if a.RBD == nil || a.RBD.Pool == "" || a.RBD.Image == "" || (a.RBD.Snapshot == "") != (a.Block != "") {
		return kind.Errorf(kind.Corrupt, "image of Ceph %+v, writable: %v", a.RBD, a.Block != "")
	}
	for _, name := range []string{a.RBD.Cluster, a.RBD.Pool, a.RBD.Image, a.RBD.Snapshot} {
		if len(name) > maxRBDBytes || strings.ContainsFunc(name, func(r rune) bool { return r <= ' ' || r == '/' || r == '@' || r == 0x7f }) {
			return kind.Errorf(kind.Corrupt, "name of Ceph %.80q", name)
		}
	}
	return nil
}

// addresses are those of the TCP portals.
func (a record) addresses() (out []string) {
	for _, p := range a.Portals {
		if p.Transport == "tcp" {
			out = append(out, net.JoinHostPort(p.Address, p.Service))
		}
	}
	return out
}

func key(target, block string) string { return target + "\x00" + block }

func splitKey(k string) (target, block string) {
	target, block, _ = strings.Cut(k, "\x00")
	return target, block
}

func openDB(path string) (*statedb.DB, error) {
	return statedb.Open(statedb.Options{
		Path: path, Part: dbPart, Version: dbVersion, Buckets: []string{string(attachedBucket), string(mapsBucket), string(writablesBucket)},
		// A record without a transport is of version 1.
		Upgrade: func(*bbolt.Tx, uint32) error { return nil },
	})
}

func decodeRecord(k, v []byte) (record, error) {
	var r record
	d := json.NewDecoder(bytes.NewReader(v))
	d.DisallowUnknownFields()
	err := d.Decode(&r)
	if err == nil && d.More() {
		err = kind.Errorf(kind.Corrupt, "more than one value")
	}
	if r.Transport == "" {
		r.Transport = TransportTCP
	}
	if err == nil {
		err = r.validate()
	}
	if target, block := splitKey(string(k)); err == nil && (target == "" || block == "") {
		err = kind.Errorf(kind.Corrupt, "its key names no block")
	}
	if err != nil {
		return record{}, kind.Errorf(kind.Corrupt, "record %.160q of an attached block is damaged: %w", k, err)
	}
	return r, nil
}

func load(db *statedb.DB) (attached, writables map[string]*record, err error) {
	attached, writables = make(map[string]*record), make(map[string]*record)
	err = db.View(func(tx *bbolt.Tx) error {
		for bucket, into := range map[string]map[string]*record{string(attachedBucket): attached, string(writablesBucket): writables} {
			if err := tx.Bucket([]byte(bucket)).ForEach(func(k, v []byte) error {
				r, err := decodeRecord(k, v)
				if err == nil && (r.Block != "") != (bucket == string(writablesBucket)) {
					err = kind.Errorf(kind.Corrupt, "record %.160q is not of %s", k, bucket)
				}
				if err == nil {
					into[string(k)] = &r
				}
				return err
			}); err != nil {
				return err
			}
		}
		return nil
	})
	return attached, writables, err
}

func encodeRecord(r *record) ([]byte, error) { return json.Marshal(r) }

// putRecord writes a record, and the block's map if there is one.
func putRecord(db *statedb.DB, target, block string, r record, m *attacherv1.BlockMap) error {
	raw, err := encodeRecord(&r)
	if err != nil {
		return err
	}
	var rawMap []byte
	if m != nil {
		if rawMap, err = proto.Marshal(m); err != nil {
			return err
		}
	}
	return db.Update(func(tx *bbolt.Tx) error {
		if rawMap != nil {
			if err := tx.Bucket(mapsBucket).Put([]byte(key(target, block)), rawMap); err != nil {
				return err
			}
		}
		return tx.Bucket(attachedBucket).Put([]byte(key(target, block)), raw)
	})
}

func dropRecord(db *statedb.DB, target, block string) error {
	return db.Update(func(tx *bbolt.Tx) error {
		if err := tx.Bucket(mapsBucket).Delete([]byte(key(target, block))); err != nil {
			return err
		}
		return tx.Bucket(attachedBucket).Delete([]byte(key(target, block)))
	})
}
