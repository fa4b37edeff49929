package attacher

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"

	"go.etcd.io/bbolt"

	attacherv1 "github.com/thaw-project/thaw/api/attacher/v1"
	"github.com/thaw-project/thaw/attacher/identity"
	"github.com/thaw-project/thaw/attacher/rpc"
	"github.com/thaw-project/thaw/kind"
)

// MaxAttachments bounds the blocks that one node has attached: the nvmeNamespaces that
// a subsystem holds.
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
// concurrently, though never at the same time for one lvol and node.
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
	// requests is on its way. The last of a node takes the node's access with it.
	Withdraw(e Export) error
}

type attachmentRecord struct {
	NSID             uint32 `json:"nsid"`
	Transport        string `json:"transport"`
	CreatedUnixNanos int64  `json:"created"`
}

func attachmentKey(node, block string) []byte { return []byte(node + "\x00" + block) }

func decodeAttachment(key, raw []byte) (Export, attachmentRecord, error) {
	node, name, found := bytes.Cut(key, []byte{0})
	var r attachmentRecord
	err := decode(raw, &r)
	if err == nil {
		err = errors.Join(identity.CheckNode(string(node)), checkName("block", string(name)))
	}
	if err == nil && (!found || r.NSID < 1 || r.NSID > MaxAttachments) {
		err = kind.Errorf(kind.Corrupt, "nvmeNamespace %d", r.NSID)
	}
	if err != nil {
		return Export{}, r, kind.Errorf(kind.Corrupt, "record %.80q of attachments is damaged: %w", key, err)
	}
	return Export{Node: string(node), Block: string(name), NSID: r.NSID, Transport: r.Transport}, r, nil
}

// attachments calls f with the records of node, or of all nodes when it is empty.
func attachments(tx *bbolt.Tx, node string, f func(Export, attachmentRecord) error) error {
	var prefix []byte
	if node != "" {
		prefix = attachmentKey(node, "")
	}
	c := tx.Bucket(attachmentsBucket).Cursor()
	for k, v := c.Seek(prefix); k != nil && bytes.HasPrefix(k, prefix); k, v = c.Next() {
		e, r, err := decodeAttachment(k, v)
		if err == nil {
			err = f(e, r)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// restoreExports shows what nodes had attached when the predecessor ended.
func (a *Attacher) restoreExports() error {
	var all []Export
	if err := a.db.View(func(tx *bbolt.Tx) error {
		return attachments(tx, "", func(e Export, _ attachmentRecord) error {
			all = append(all, e)
			return nil
		})
	}); err != nil {
		return err
	}
	for _, e := range all {
		a.noteAttached(e.Block, e.Node)
	}
	if a.o.Exporter == nil {
		if len(all) > 0 {
			a.o.Logger.Warn("nodes have blocks attached and this store exports nothing now: configure export.nvme_tcp again", "attachments", len(all))
		}
		return nil
	}
	return a.o.Exporter.Restore(all)
}

func (a *Attacher) noteAttached(block, node string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.exports[block] == nil {
		a.exports[block] = make(map[string]struct{})
	}
	a.exports[block][node] = struct{}{}
}

func (a *Attacher) noteDetached(block, node string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.exports[block], node)
	if len(a.exports[block]) == 0 {
		delete(a.exports, block)
	}
}

// attachedBy names a node that has block attached, "" when none has.
func (a *Attacher) attachedBy(block string) string {
	if a.o.Attached(block) {
		return "this one"
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	least := ""
	for node := range a.exports[block] {
		if least == "" || node < least {
			least = node
		}
	}
	return least
}

func (a *Attacher) attached(block string) bool { return a.attachedBy(block) != "" }

// caller is the node that a call is for: on the network the one of the certificate,
// whatever the request says, and on the Unix socket the one of the request.
func caller(ctx context.Context, requested string) (node string, remote bool, err error) {
	node, remote, err = rpc.Node(ctx)
	switch {
	case err != nil:
		return "", remote, err
	case !remote:
		return requested, false, nil
	case requested != "" && requested != node:
		return "", true, kind.Errorf(kind.Denied, "node %s may not act as node %.80s", node, requested)
	}
	return node, true, nil
}

// AttachBlock implements attacherv1.NodeServer.
func (a *Attacher) AttachBlock(ctx context.Context, r *attacherv1.AttachBlockRequest) (*attacherv1.Attachment, error) {
	node, _, err := caller(ctx, r.GetNode())
	if err != nil {
		return nil, err
	}
	block := r.GetBlock()
	if err := errors.Join(identity.CheckNode(node), checkName("block", block)); err != nil {
		return nil, kind.Wrap(kind.Invalid, err)
	}
	switch t := r.GetTransport(); {
	case a.o.Exporter == nil:
		return nil, kind.Errorf(kind.Unsupported, "attach block %s: this store exports nothing: set export.nvme_tcp in its configuration", block)
	case t != "" && !slices.Contains(a.o.Exporter.Transports(), t):
		return nil, kind.Errorf(kind.Unsupported, "attach block %s: this store serves transports %v, not %.40q", block, a.o.Exporter.Transports(), t)
	}
	if err := a.enter(); err != nil {
		return nil, err
	}
	defer a.calls.Done()
	unlock, err := a.names.Lock(ctx, block)
	if err != nil {
		return nil, fmt.Errorf("attach block %s: %w", block, err)
	}
	defer unlock()
	out, err := a.attachBlock(node, block, rpc.LocalAddress(ctx))
	if err != nil {
		return nil, fmt.Errorf("attach block %s to node %s: %w", block, node, err)
	}
	return out, nil
}

// attachBlock does it; the caller has the block's name locked, so that nobody deletes
// it meanwhile.
func (a *Attacher) attachBlock(node, block, local string) (*attacherv1.Attachment, error) {
	if err := a.exportable(node, block); err != nil {
		return nil, err
	}
	e := Export{Node: node, Block: block}
	var r attachmentRecord
	var fresh bool
	if err := a.db.Update(func(tx *bbolt.Tx) error {
		fresh = false
		b := tx.Bucket(attachmentsBucket)
		key := attachmentKey(node, block)
		if raw := b.Get(key); raw != nil {
			var err error
			e, r, err = decodeAttachment(key, raw)
			return err
		}
		fresh = true
		nsid, err := freeNSID(tx, node)
		if err != nil {
			return err
		}
		e.NSID, e.Transport = nsid, a.o.Exporter.Transports()[0]
		r = attachmentRecord{NSID: nsid, Transport: e.Transport, CreatedUnixNanos: a.o.Now().UnixNano()}
		return put(tx, attachmentsBucket, string(key), r)
	}); err != nil {
		return nil, err
	}
	a.noteAttached(block, node)
	a.step("attach: recorded")
	x, err := a.o.Exporter.Export(e, local)
	if err != nil {
		if fresh {
			if derr := a.dropAttachment(e); derr != nil {
				a.o.Logger.Warn("cannot forget an attachment that failed", "block", block, "node", node, "error", derr)
			}
		}
		return nil, err
	}
	a.step("attach: exported")
	out := e.proto(r)
	out.SubsystemNqn, out.HostNqn, out.HostId, out.Uuid, out.SizeBytes = x.Subsystem, x.HostNQN, x.HostID, x.UUID, x.SizeBytes
	for _, p := range x.Portals {
		out.Portals = append(out.Portals, &attacherv1.Portal{Transport: p.Transport, Address: p.Address, Service: p.Service})
	}
	return out, nil
}

// exportable is nil for a block that a node may read: one that is complete, and so
// never changes. What a converter still works on has no such name or no record.
func (a *Attacher) exportable(node, block string) error {
	info, err := a.o.Lvols.Get(block)
	if err != nil {
		return err
	}
	refused := kind.Errorf(kind.NotFound, "it is no block of a converted image")
	if !info.Snapshot && !info.ReadOnly {
		return refused
	}
	return a.db.View(func(tx *bbolt.Tx) error {
		if tx.Bucket(attachmentsBucket).Get(attachmentKey(node, block)) != nil || tx.Bucket(blocksBucket).Get([]byte(block)) != nil {
			return nil
		}
		images, err := allImages(tx)
		if err != nil {
			return err
		}
		if !slices.ContainsFunc(images, func(i imageRecord) bool { return slices.Contains(i.Blocks, block) }) {
			return refused
		}
		return nil
	})
}

// freeNSID returns the identifier after the highest that the node has in use, and the
// lowest that is free once that is not possible: one that was just given up is not
// used again at once, for a host may not have heard of that yet.
func freeNSID(tx *bbolt.Tx, node string) (uint32, error) {
	used := make(map[uint32]bool)
	highest := uint32(0)
	if err := attachments(tx, node, func(e Export, _ attachmentRecord) error {
		used[e.NSID] = true
		highest = max(highest, e.NSID)
		return nil
	}); err != nil {
		return 0, err
	}
	if highest < MaxAttachments {
		return highest + 1, nil
	}
	for id := uint32(1); id <= MaxAttachments; id++ {
		if !used[id] {
			return id, nil
		}
	}
	return 0, kind.Errorf(kind.NoSpace, "node %s has %d blocks attached, which is the most", node, len(used))
}

func (a *Attacher) dropAttachment(e Export) error {
	err := a.db.Update(func(tx *bbolt.Tx) error { return tx.Bucket(attachmentsBucket).Delete(attachmentKey(e.Node, e.Block)) })
	if err == nil {
		a.noteDetached(e.Block, e.Node)
	}
	return err
}

// DetachBlock implements attacherv1.NodeServer.
func (a *Attacher) DetachBlock(ctx context.Context, r *attacherv1.DetachBlockRequest) (*attacherv1.DetachBlockResponse, error) {
	node, _, err := caller(ctx, r.GetNode())
	if err != nil {
		return nil, err
	}
	block := r.GetBlock()
	if err := errors.Join(identity.CheckNode(node), checkName("block", block)); err != nil {
		return nil, kind.Wrap(kind.Invalid, err)
	}
	if err := a.enter(); err != nil {
		return nil, err
	}
	defer a.calls.Done()
	unlock, err := a.names.Lock(ctx, block)
	if err != nil {
		return nil, fmt.Errorf("detach block %s: %w", block, err)
	}
	defer unlock()
	if err := a.detachBlock(node, block); err != nil {
		return nil, fmt.Errorf("detach block %s from node %s: %w", block, node, err)
	}
	select {
	case a.wake <- struct{}{}: // its removal may have waited for this
	default:
	}
	return &attacherv1.DetachBlockResponse{}, nil
}

func (a *Attacher) detachBlock(node, block string) error {
	var e Export
	var known bool
	if err := a.db.View(func(tx *bbolt.Tx) (err error) {
		key := attachmentKey(node, block)
		if raw := tx.Bucket(attachmentsBucket).Get(key); raw != nil {
			known = true
			e, _, err = decodeAttachment(key, raw)
		}
		return err
	}); err != nil || !known {
		return err
	}
	if a.o.Exporter != nil {
		if err := a.o.Exporter.Withdraw(e); err != nil {
			return err
		}
	}
	a.step("detach: withdrawn")
	return a.dropAttachment(e)
}

// ListAttachments implements attacherv1.NodeServer. What it returns has no addresses:
// AttachBlock tells those.
func (a *Attacher) ListAttachments(ctx context.Context, r *attacherv1.ListAttachmentsRequest) (*attacherv1.ListAttachmentsResponse, error) {
	node, _, err := caller(ctx, r.GetNode())
	if err != nil {
		return nil, err
	}
	if node != "" {
		if err := identity.CheckNode(node); err != nil {
			return nil, err
		}
	}
	if err := a.enter(); err != nil {
		return nil, err
	}
	defer a.calls.Done()
	out := &attacherv1.ListAttachmentsResponse{}
	if err := a.db.View(func(tx *bbolt.Tx) error {
		return attachments(tx, node, func(e Export, r attachmentRecord) error {
			out.Attachments = append(out.Attachments, e.proto(r))
			return nil
		})
	}); err != nil {
		return nil, fmt.Errorf("list attachments: %w", err)
	}
	return out, nil
}

func (e Export) proto(r attachmentRecord) *attacherv1.Attachment {
	return &attacherv1.Attachment{Block: e.Block, Node: e.Node, Transport: e.Transport, Nsid: e.NSID, CreatedUnixNanos: r.CreatedUnixNanos}
}

// mapRuns bounds the runs in one answer: with their owners well below a message's
// limit, and little memory for somebody who asks for many maps at once.
const mapRuns = 1 << 14

// The owners of runs that have none.
const (
	runZeros   = 0
	runUnowned = 1
	runOwned   = 2 // and the index of the owner
)

// GetBlockMap implements attacherv1.NodeServer.
func (a *Attacher) GetBlockMap(ctx context.Context, r *attacherv1.GetBlockMapRequest) (*attacherv1.BlockMap, error) {
	node, _, err := caller(ctx, "")
	if err != nil {
		return nil, err
	}
	block := r.GetBlock()
	if err := checkName("block", block); err != nil {
		return nil, err
	}
	if err := a.enter(); err != nil {
		return nil, err
	}
	defer a.calls.Done()
	if err := a.exportable(node, block); err != nil {
		return nil, fmt.Errorf("map of block %s: %w", block, err)
	}
	m, err := a.o.Lvols.Map(block, r.GetOffsetBytes(), mapRuns)
	if err != nil {
		return nil, err
	}
	out := &attacherv1.BlockMap{SizeBytes: m.SizeBytes, ClusterBytes: m.ClusterBytes, NextBytes: m.NextBytes}
	index := make(map[[16]byte]uint32)
	for _, run := range m.Runs {
		owner := uint32(runZeros)
		switch {
		case run.Data && run.Owner == [16]byte{}:
			owner = runUnowned
		case run.Data:
			i, ok := index[run.Owner]
			if !ok {
				i = uint32(len(out.Owners))
				index[run.Owner] = i
				out.Owners = append(out.Owners, run.Owner[:])
			}
			owner = runOwned + i
		}
		out.Runs = append(out.Runs, &attacherv1.BlockRun{LengthBytes: run.LengthBytes, Owner: owner})
	}
	return out, nil
}

// AttachWritable implements attacherv1.NodeServer.
func (a *Attacher) AttachWritable(context.Context, *attacherv1.AttachWritableRequest) (*attacherv1.Attachment, error) {
	return nil, kind.Errorf(kind.Unsupported, "writable layers are kept on the node")
}

// DetachWritable implements attacherv1.NodeServer.
func (a *Attacher) DetachWritable(context.Context, *attacherv1.DetachWritableRequest) (*attacherv1.DetachWritableResponse, error) {
	return nil, kind.Errorf(kind.Unsupported, "writable layers are kept on the node")
}

// DeleteWritable implements attacherv1.NodeServer.
func (a *Attacher) DeleteWritable(context.Context, *attacherv1.DeleteWritableRequest) (*attacherv1.DeleteWritableResponse, error) {
	return nil, kind.Errorf(kind.Unsupported, "writable layers are kept on the node")
}
