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

// The database, format version 1.
//
//	bucket "attached"  target \0 block -> record, JSON
//	bucket "maps"      target \0 block -> attacherv1.BlockMap, of a block in "attached"
//
// A record is written after the store has agreed and dropped after it has let go. What
// the store has and no record says is found by asking it, at every start and after
// every attach that failed.
const (
	dbPart    = "remote"
	dbVersion = 1
)

var (
	attachedBucket = []byte("attached")
	mapsBucket     = []byte("maps")
)

// Bounds of what a store answers.
const (
	maxPortals   = 16
	maxSizeBytes = 1 << 50 // 1 PiB
)

type record struct {
	Subsystem string   `json:"subsystem"`
	HostNQN   string   `json:"host_nqn"`
	HostID    string   `json:"host_id"`
	Portals   []Portal `json:"portals"`
	NSID      uint32   `json:"nsid"`
	UUID      string   `json:"uuid"`
	SizeBytes int64    `json:"size_bytes"`
}

func (a record) equal(b record) bool {
	return a.Subsystem == b.Subsystem && a.HostNQN == b.HostNQN && a.HostID == b.HostID && a.NSID == b.NSID && a.UUID == b.UUID &&
		a.SizeBytes == b.SizeBytes && slices.Equal(a.Portals, b.Portals)
}

func (a record) export() Export {
	return Export{
		Subsystem: a.Subsystem, HostNQN: a.HostNQN, HostID: a.HostID, Portals: slices.Clone(a.Portals),
		NSID: a.NSID, UUID: a.UUID, SizeBytes: a.SizeBytes,
	}
}

// recordOf takes a store's answer, which is believed only as far as it makes sense.
func recordOf(a *attacherv1.Attachment) (record, error) {
	r := record{
		Subsystem: a.GetSubsystemNqn(), HostNQN: a.GetHostNqn(), HostID: a.GetHostId(), NSID: a.GetNsid(),
		UUID: a.GetUuid(), SizeBytes: a.GetSizeBytes(),
	}
	for _, p := range a.GetPortals() {
		r.Portals = append(r.Portals, Portal{Transport: p.GetTransport(), Address: p.GetAddress(), Service: p.GetService()})
	}
	return r, r.validate()
}

func (a record) validate() error {
	_, hostErr := uuid.Parse(a.HostID)
	_, nsErr := uuid.Parse(a.UUID)
	switch {
	case nvme.CheckNQN(a.Subsystem) != nil || nvme.CheckNQN(a.HostNQN) != nil:
		return kind.Errorf(kind.Corrupt, "NQNs %.250q and %.250q", a.Subsystem, a.HostNQN)
	case hostErr != nil || nsErr != nil:
		return kind.Errorf(kind.Corrupt, "host %.80q and nvmeNamespace %.80q are not UUIDs", a.HostID, a.UUID)
	case a.NSID == 0 || a.SizeBytes <= 0 || a.SizeBytes > maxSizeBytes || a.SizeBytes%512 != 0:
		return kind.Errorf(kind.Corrupt, "nvmeNamespace %d of %d bytes", a.NSID, a.SizeBytes)
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
	return statedb.Open(statedb.Options{Path: path, Part: dbPart, Version: dbVersion, Buckets: []string{string(attachedBucket), string(mapsBucket)}})
}

func decodeRecord(k, v []byte) (record, error) {
	var r record
	d := json.NewDecoder(bytes.NewReader(v))
	d.DisallowUnknownFields()
	err := d.Decode(&r)
	if err == nil && d.More() {
		err = kind.Errorf(kind.Corrupt, "more than one value")
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

func load(db *statedb.DB) (map[string]*record, error) {
	out := make(map[string]*record)
	err := db.View(func(tx *bbolt.Tx) error {
		return tx.Bucket(attachedBucket).ForEach(func(k, v []byte) error {
			r, err := decodeRecord(k, v)
			if err == nil {
				out[string(k)] = &r
			}
			return err
		})
	})
	return out, err
}

// putRecord writes a record, and the block's map if there is one.
func putRecord(db *statedb.DB, target, block string, r record, m *attacherv1.BlockMap) error {
	raw, err := json.Marshal(r)
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
