package card

import (
	"bytes"
	"encoding/json"
	"slices"
	"strconv"
	"strings"

	"github.com/google/uuid"
	"go.etcd.io/bbolt"

	attacherv1 "github.com/thaw-project/thaw/api/attacher/v1"
	"github.com/thaw-project/thaw/attacher/identity"
	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/statedb"
)

// The database, card.db, format version 1. Values are JSON.
//
//	"disks"      purpose \0 id -> disk    written before anything is made for it, and deleted
//	                                      after the last of that is gone
//	"functions"  Function -> lease        who has it, or had it last; changed together with disks
const (
	dbPart    = "card"
	dbVersion = 1
)

var (
	disksBucket     = []byte("disks")
	functionsBucket = []byte("functions")
)

// purposes are the words for purposes in the database and in what names derive from.
var purposes = map[attacherv1.Purpose]string{
	attacherv1.Purpose_PURPOSE_BLOCK:      "block",
	attacherv1.Purpose_PURPOSE_WRITABLE:   "writable",
	attacherv1.Purpose_PURPOSE_CONVERSION: "conversion",
}

// state is where a disk is in its life.
type state string

const (
	attaching state = "attaching" // nobody was told of it yet
	attached  state = "attached"
	detaching state = "detaching" // it goes, whoever began that
)

// disk is a disk on record. Every name that it is shown by follows from the record, so that
// one write, before the first step, tells a successor all that may have been made.
type disk struct {
	ID      string             `json:"id"`
	Purpose attacherv1.Purpose `json:"purpose"`
	State   state              `json:"state"`
	// Attachment is another one after every detach.
	Attachment       uuid.UUID `json:"attachment"`
	Owner            string    `json:"owner,omitempty"`
	Function         Function  `json:"function"`
	UUID             uuid.UUID `json:"uuid"`             // of the nvmeNamespace that hosts see
	Remote           *remote   `json:"remote,omitempty"` // or
	Volume           string    `json:"volume,omitempty"`
	SizeBytes        int64     `json:"size_bytes"`
	ReadOnly         bool      `json:"read_only,omitempty"`
	CreatedUnixNanos int64     `json:"created"`

	key, nqn, controller string // derived; the last one of remote disks only
}

// remote is the part of a store's attachment by which the card finds it.
type remote struct {
	Subsystem string   `json:"subsystem"`
	HostNQN   string   `json:"host_nqn"`
	Portals   []portal `json:"portals"`
	NSID      uint32   `json:"nsid"`
	UUID      string   `json:"uuid"` // of the store's nvmeNamespace
}

type portal struct {
	RDMA    bool   `json:"rdma,omitempty"`
	Address string `json:"address"` // an IP address as netip writes it
	Port    uint16 `json:"port"`
}

// id is what the bridge calls a path to the portal.
func (p portal) id() string {
	t := "tcp:"
	if p.RDMA {
		t = "rdma:"
	}
	return t + p.Address + ":" + strconv.Itoa(int(p.Port))
}

// lease says who has a function.
type lease struct {
	Disk          string `json:"disk"` // key of the disk that has it, or had it last
	Leased        bool   `json:"leased,omitempty"`
	FreeUnixNanos int64  `json:"free,omitempty"` // since when it is free
}

func diskKey(id string, p attacherv1.Purpose) string { return purposes[p] + "\x00" + id }

// name fills in what derives from the record.
func (d *disk) name(names identity.Card) {
	d.key = diskKey(d.ID, d.Purpose)
	d.nqn = names.Subsystem(d.key)
	d.controller = ""
	if d.Remote != nil {
		d.controller = names.Remote(d.Remote.Subsystem, d.Remote.HostNQN)
	}
}

func (d *disk) proto(names identity.Card) *attacherv1.CardDisk {
	return &attacherv1.CardDisk{
		Id: d.ID, Purpose: d.Purpose, Function: d.Function.proto(), SubsystemNqn: d.nqn, Serial: names.Serial(d.UUID), Uuid: d.UUID.String(),
		SizeBytes: d.SizeBytes, ReadOnly: d.ReadOnly, CreatedUnixNanos: d.CreatedUnixNanos, Owner: d.Owner, AttachmentId: d.Attachment.String(),
		Volume: d.Volume,
	}
}

func openDB(path string) (*statedb.DB, error) {
	return statedb.Open(statedb.Options{Path: path, Part: dbPart, Version: dbVersion, Buckets: []string{string(disksBucket), string(functionsBucket)}})
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

func (c *Card) decodeDisk(key, raw []byte) (*disk, error) {
	d := &disk{}
	err := decode(raw, d)
	if err == nil {
		d.name(c.names)
		switch {
		case d.key != string(key) || purposes[d.Purpose] == "" || checkName("id", d.ID) != nil:
			err = kind.Errorf(kind.Corrupt, "it is of disk %.80q", d.ID)
		case !slices.Contains([]state{attaching, attached, detaching}, d.State):
			err = kind.Errorf(kind.Corrupt, "state %.20q", d.State)
		case (d.Remote == nil) == (d.Volume == "") || d.Remote != nil && len(d.Remote.Portals) == 0:
			err = kind.Errorf(kind.Corrupt, "it does not say what the disk shows")
		}
	}
	if err != nil {
		return nil, kind.Errorf(kind.Corrupt, "record %.80q of a disk is damaged: %w", key, err)
	}
	return d, nil
}

// load reads the record of a disk; nil when there is none.
func (c *Card) load(key string) (d *disk, err error) {
	err = c.db.View(func(tx *bbolt.Tx) error {
		raw := tx.Bucket(disksBucket).Get([]byte(key))
		if raw == nil {
			return nil
		}
		d, err = c.decodeDisk([]byte(key), raw)
		return err
	})
	return d, err
}

// disks reads all records, in order of their keys.
func (c *Card) disks() (list []*disk, err error) {
	err = c.db.View(func(tx *bbolt.Tx) error {
		return tx.Bucket(disksBucket).ForEach(func(k, v []byte) error {
			d, err := c.decodeDisk(k, v)
			if err == nil {
				list = append(list, d)
			}
			return err
		})
	})
	return list, err
}

func put(tx *bbolt.Tx, bucket []byte, key string, record any) error {
	raw, err := json.Marshal(record)
	if err != nil {
		return err
	}
	return tx.Bucket(bucket).Put([]byte(key), raw)
}

func (c *Card) save(d *disk) error {
	return c.db.Update(func(tx *bbolt.Tx) error { return put(tx, disksBucket, d.key, d) })
}

// leases reads who has or had which function.
func leases(tx *bbolt.Tx) (map[Function]lease, error) {
	all := make(map[Function]lease)
	err := tx.Bucket(functionsBucket).ForEach(func(k, v []byte) error {
		f, err := ParseFunction(string(k))
		var l lease
		if err == nil {
			err = decode(v, &l)
		}
		if err != nil {
			return kind.Errorf(kind.Corrupt, "record %.80q of a function is damaged: %w", k, err)
		}
		all[f] = l
		return nil
	})
	return all, err
}

// take gives the disk a function, of those that nobody has and that are not busy (they show
// something else): the one that it had last, else one that no disk ever had, else the one
// that is free for longest, since a host may need a while to forget a drive.
func (c *Card) take(tx *bbolt.Tx, key string, busy map[Function]string) (Function, error) {
	all, err := leases(tx)
	if err != nil {
		return Function{}, err
	}
	best, rank := Function{}, int64(-1)
	better := func(f Function, r int64) {
		if rank < 0 || r < rank {
			best, rank = f, r
		}
	}
	foreign := 0
	for _, f := range c.o.Functions {
		l, known := all[f]
		switch {
		case known && l.Leased && l.Disk != key:
		case busy[f] != "" && busy[f] != c.names.Subsystem(key):
			foreign++
		case known && l.Disk == key:
			better(f, 0)
		case !known:
			better(f, 1)
		default:
			better(f, 2+max(l.FreeUnixNanos, 0))
		}
	}
	if rank < 0 {
		return Function{}, kind.Errorf(kind.NoSpace, "no PCIe function is free: of %d, %d show what is not this card's: detach a disk, or give the card more functions", len(c.o.Functions), foreign)
	}
	return best, put(tx, functionsBucket, best.String(), lease{Disk: key, Leased: true})
}

// give takes a function back.
func (c *Card) give(tx *bbolt.Tx, f Function, key string) error {
	raw := tx.Bucket(functionsBucket).Get([]byte(f.String()))
	var l lease
	if raw == nil {
		return nil
	}
	if err := decode(raw, &l); err != nil {
		return kind.Errorf(kind.Corrupt, "record %s of a function is damaged: %w", f, err)
	}
	if l.Disk != key || !l.Leased {
		return nil
	}
	return put(tx, functionsBucket, f.String(), lease{Disk: key, FreeUnixNanos: c.o.Now().UnixNano()})
}

// checkName holds ids and owners to 1 to 128 of [A-Za-z0-9._-], as lvols' names.
func checkName(what, name string) error {
	if name == "" || len(name) > maxNameBytes || strings.ContainsFunc(name, func(r rune) bool {
		return !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '.' || r == '_' || r == '-')
	}) {
		return kind.Errorf(kind.Invalid, "%s %.160q: must be 1 to %d of A-Z a-z 0-9 . _ -", what, name, maxNameBytes)
	}
	return nil
}
