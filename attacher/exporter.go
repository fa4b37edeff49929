package attacher

import (
	"bytes"
	"errors"
	"slices"

	"github.com/google/uuid"
	"go.etcd.io/bbolt"

	attacherv1 "github.com/thaw-project/thaw/api/attacher/v1"
	"github.com/thaw-project/thaw/attacher/identity"
	"github.com/thaw-project/thaw/kind"
)

// MaxAttachments bounds what one node has attached, blocks, writable layers and exports
// together: the nvmeNamespaces that a subsystem holds.
const MaxAttachments = 1024

// The transports of exports.
const (
	TransportTCP  = "nvme-tcp"
	TransportRDMA = "nvme-rdma"
	TransportRBD  = "rbd" // nodes open the image of Ceph themselves
)

// Export is an lvol as one node sees it.
type Export struct {
	Node, Block string
	NSID        uint32 // from 1, stays the lvol's as long as it is attached
	Transport   string
	Writable    bool
}

// Exported is where and as what a node finds an Export.
type Exported struct {
	Subsystem, HostNQN, HostID, UUID string
	Portals                          []Portal
	SizeBytes                        int64
	RBD                              *RBDImage // of TransportRBD, instead of all above but SizeBytes
}

// RBDImage is an image of Ceph, or a snapshot of one.
type RBDImage struct{ Cluster, Pool, Image, Snapshot string }

// Portal is an address at which exports are served.
type Portal struct{ Transport, Address, Service string }

// Exporter shows lvols to other machines. Its methods are idempotent and may be called
// concurrently, though never at the same time for one lvol and node. They are bounded
// in time where they reach out of the process: kind.Unavailable then.
type Exporter interface {
	// Transports are those that it serves, the default first.
	Transports() []string

	// Restore shows what was shown before a restart, all at once, before any node can
	// connect, and takes away what is shown under the store's names and is not among
	// exports. What cannot be shown now is logged; an exporter whose target is another
	// process tries again until it is, and replays what that process loses later.
	Restore(exports []Export) error

	// Export shows an lvol. It is kind.NotFound when the store has none of that name.
	// local, when not empty, is the address by which the asking node reached the store.
	Export(e Export, local string) (Exported, error)

	// Withdraw takes an lvol away from a node and returns when none of the node's
	// requests is on its way. The last of a node takes the node's access with it. What
	// is not shown is no error.
	Withdraw(e Export) error
}

// attachmentProto is an Export with what its record and its exporter say of it.
func attachmentProto(e Export, id string, created int64, x Exported) *attacherv1.Attachment {
	out := &attacherv1.Attachment{
		Block: e.Block, Node: e.Node, Transport: e.Transport, Nsid: e.NSID, Writable: e.Writable,
		AttachmentId: id, CreatedUnixNanos: created,
		SubsystemNqn: x.Subsystem, HostNqn: x.HostNQN, HostId: x.HostID, Uuid: x.UUID, SizeBytes: x.SizeBytes,
	}
	for _, p := range x.Portals {
		out.Portals = append(out.Portals, &attacherv1.Portal{Transport: p.Transport, Address: p.Address, Service: p.Service})
	}
	if r := x.RBD; r != nil {
		out.Rbd = &attacherv1.RbdImage{Cluster: r.Cluster, Pool: r.Pool, Image: r.Image, Snapshot: r.Snapshot}
	}
	return out
}

// transport returns the one that was asked for, or the store's choice.
func (a *Attacher) transport(asked string) (string, error) {
	if a.o.Exporter == nil {
		return "", kind.Errorf(kind.Unsupported, "this store exports nothing: set export.nvme_tcp in its configuration")
	}
	all := a.o.Exporter.Transports()
	switch {
	case len(all) == 0:
		return "", kind.Errorf(kind.Unsupported, "this store serves no transport")
	case asked == "":
		return all[0], nil
	case !slices.Contains(all, asked):
		return "", kind.Errorf(kind.Unsupported, "this store serves transports %v, not %.40q", all, asked)
	}
	return asked, nil
}

// sameTransport refuses what is attached by another transport than the one asked for.
func sameTransport(have, asked string) error {
	if asked != "" && asked != have {
		return kind.Errorf(kind.Exists, "it is attached by %s already: detach it first", have)
	}
	return nil
}

// newAttachmentID is an id that no other attachment ever has.
func newAttachmentID() string { return uuid.NewString() }

// sameAttachment refuses a request for another attachment than the one on record.
func sameAttachment(have, asked string) error {
	if asked != "" && asked != have {
		return kind.Errorf(kind.InUse, "it has been attached again since: this is attachment %s, not %.40q", have, asked)
	}
	return nil
}

func checkAttachmentID(id string) error {
	if id == "" {
		return nil
	}
	if _, err := uuid.Parse(id); err != nil || len(id) != 36 {
		return kind.Errorf(kind.Invalid, "attachment %.80q is not a UUID", id)
	}
	return nil
}

// reserveNSID returns an identifier that nothing else has at node: the one after the
// highest in use, and the lowest that is free once that is not possible. One that was just
// given up is not used again at once, for a host may not have heard of that yet.
// It is the caller's until freeNSID.
func (a *Attacher) reserveNSID(node string) (uint32, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	used := a.nsids[node]
	if used == nil {
		used = make(map[uint32]struct{})
		a.nsids[node] = used
	}
	highest := uint32(0)
	for id := range used {
		highest = max(highest, id)
	}
	id := highest + 1
	if highest >= MaxAttachments {
		for id = 1; id <= MaxAttachments; id++ {
			if _, taken := used[id]; !taken {
				break
			}
		}
	}
	if id > MaxAttachments {
		return 0, kind.Errorf(kind.NoSpace, "node %s has %d blocks attached, which is the most", node, len(used))
	}
	used[id] = struct{}{}
	return id, nil
}

func (a *Attacher) noteNSID(node string, id uint32) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.nsids[node] == nil {
		a.nsids[node] = make(map[uint32]struct{})
	}
	a.nsids[node][id] = struct{}{}
}

func (a *Attacher) freeNSID(node string, id uint32) {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.nsids[node], id)
	if len(a.nsids[node]) == 0 {
		delete(a.nsids, node)
	}
}

// recorded calls f with what is on record to be shown to nodes, or to be taken away from
// them yet. An lvol that a node has both attached and exported comes twice, with one
// identifier.
func recorded(tx *bbolt.Tx, f func(e Export, ending bool)) error {
	if err := attachments(tx, "", func(e Export, r attachmentRecord) error {
		f(e, r.Ending)
		return nil
	}); err != nil {
		return err
	}
	if err := writables(tx, "", func(w writable) error {
		if w.NSID != 0 {
			f(w.export(), w.Deleting)
		}
		return nil
	}); err != nil {
		return err
	}
	exports, err := all[exportRecord](tx, exportsBucket)
	if err != nil {
		return err
	}
	for name, r := range exports {
		if r.Node == "" {
			continue
		}
		if err := r.validate(); err != nil {
			return kind.Errorf(kind.Corrupt, "record %.80q of exports is damaged: %w", name, err)
		}
		f(r.export(name), false)
	}
	return nil
}

// restoreExports shows what nodes had when the predecessor ended.
func (a *Attacher) restoreExports() error {
	var all []Export
	seen := make(map[[2]string]bool)
	if err := a.db.View(func(tx *bbolt.Tx) error {
		return recorded(tx, func(e Export, ending bool) {
			a.noteNSID(e.Node, e.NSID)
			if key := [2]string{e.Node, e.Block}; !ending && !seen[key] {
				seen[key] = true
				all = append(all, e)
			}
		})
	}); err != nil {
		return err
	}
	if err := a.db.View(func(tx *bbolt.Tx) error {
		if err := attachments(tx, "", func(e Export, _ attachmentRecord) error {
			a.noteUse(e.Block, e.Node)
			return nil
		}); err != nil {
			return err
		}
		return writables(tx, "", func(w writable) error {
			a.noteWritable(w)
			return nil
		})
	}); err != nil {
		return err
	}
	if a.o.Exporter == nil {
		if len(all) > 0 {
			a.o.Logger.Warn("nodes have blocks attached and this store exports nothing now: configure export.nvme_tcp again", "attachments", len(all))
		}
		return nil
	}
	return a.o.Exporter.Restore(all)
}

// otherwiseShown tells whether a node sees an lvol for another reason than the record in
// bucket: as an attachment and as an export of a hold it is shown once.
func (a *Attacher) otherwiseShown(e Export, bucket []byte) (other bool, err error) {
	err = a.db.View(func(tx *bbolt.Tx) error {
		if bytes.Equal(bucket, exportsBucket) {
			other = tx.Bucket(attachmentsBucket).Get(attachmentKey(e.Node, e.Block)) != nil
			return nil
		}
		r, ok, err := get[exportRecord](tx, exportsBucket, e.Block)
		other = ok && r.Node == e.Node
		return err
	})
	return other, err
}

// hide takes an lvol away from a node unless it is shown for another reason than the
// record in bucket, which the caller drops afterwards. It returns whether the
// identifier is free then. The caller has the lvol's name locked.
func (a *Attacher) hide(e Export, bucket []byte) (last bool, err error) {
	other, err := a.otherwiseShown(e, bucket)
	if err != nil || other {
		return false, err
	}
	if a.o.Exporter != nil {
		if err := a.o.Exporter.Withdraw(e); err != nil {
			return false, err
		}
	}
	return true, nil
}

// validate holds the part of an export's record that is about a node to what it can be.
func (r exportRecord) validate() error {
	if r.Node == "" {
		return nil
	}
	if r.NSID < 1 || r.NSID > MaxAttachments {
		return kind.Errorf(kind.Corrupt, "nvmeNamespace %d", r.NSID)
	}
	return errors.Join(identity.CheckNode(r.Node), checkAttachmentID(r.ID))
}

func (r exportRecord) export(name string) Export {
	return Export{Node: r.Node, Block: name, NSID: r.NSID, Transport: r.Transport, Writable: !r.ReadOnly}
}
