package attacher

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"

	"go.etcd.io/bbolt"

	attacherv1 "github.com/thaw-project/thaw/api/attacher/v1"
	"github.com/thaw-project/thaw/attacher/identity"
	"github.com/thaw-project/thaw/attacher/rpc"
	"github.com/thaw-project/thaw/kind"
)

type attachmentRecord struct {
	NSID             uint32 `json:"nsid"`
	Transport        string `json:"transport"`
	CreatedUnixNanos int64  `json:"created"`
	ID               string `json:"id"`
	// Ending: it could not be shown, and may be shown nevertheless. The sweep takes it away.
	Ending bool `json:"ending,omitempty"`
}

func attachmentKey(node, block string) []byte { return []byte(node + "\x00" + block) }

func decodeAttachment(key, raw []byte) (Export, attachmentRecord, error) {
	node, name, found := bytes.Cut(key, []byte{0})
	var r attachmentRecord
	err := decode(raw, &r)
	if err == nil {
		err = errors.Join(identity.CheckNode(string(node)), checkName("block", string(name)), checkAttachmentID(r.ID))
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

// noteUse notes that user has block: a node, or a node's writable layer.
func (a *Attacher) noteUse(block, user string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.uses[block] == nil {
		a.uses[block] = make(map[string]struct{})
	}
	a.uses[block][user] = struct{}{}
}

func (a *Attacher) dropUse(block, user string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.uses[block], user)
	if len(a.uses[block]) == 0 {
		delete(a.uses, block)
	}
}

// attachedBy names a node that has block attached, or a writable layer over it, "" when
// none has.
func (a *Attacher) attachedBy(block string) string {
	if a.o.Attached(block) {
		return "this one"
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	least := ""
	for user := range a.uses[block] {
		if node, _, _ := strings.Cut(user, "\x00"); least == "" || node < least {
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
	transport, err := a.transport(r.GetTransport())
	if err != nil {
		return nil, fmt.Errorf("attach block %s: %w", block, err)
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
	out, err := a.attachBlock(node, block, r.GetTransport(), transport, rpc.LocalAddress(ctx))
	if err != nil {
		return nil, fmt.Errorf("attach block %s to node %s: %w", block, node, err)
	}
	return out, nil
}

// attachBlock does it, by the transport asked for or else the store's choice; the caller
// has the block's name locked, so that nobody deletes it meanwhile.
func (a *Attacher) attachBlock(node, block, asked, choice, local string) (*attacherv1.Attachment, error) {
	if err := a.exportable(node, block); err != nil {
		return nil, err
	}
	e, r, known, err := a.attachment(node, block)
	if err != nil {
		return nil, err
	}
	fresh := !known || r.Ending
	if fresh {
		if e, r, err = a.recordAttachment(node, block, choice, e.NSID); err != nil {
			return nil, err
		}
	} else if err := sameTransport(e.Transport, asked); err != nil {
		return nil, err
	}
	a.noteUse(block, node)
	a.step("attach: recorded")
	x, err := a.o.Exporter.Export(e, local)
	if err != nil {
		if fresh {
			a.undoAttachment(e, r)
		}
		a.retryAfter(err)
		return nil, err
	}
	a.step("attach: exported")
	return attachmentProto(e, r.ID, r.CreatedUnixNanos, x), nil
}

// attachment reads a node's attachment of a block.
func (a *Attacher) attachment(node, block string) (e Export, r attachmentRecord, known bool, err error) {
	err = a.db.View(func(tx *bbolt.Tx) (err error) {
		key := attachmentKey(node, block)
		if raw := tx.Bucket(attachmentsBucket).Get(key); raw != nil {
			known = true
			e, r, err = decodeAttachment(key, raw)
		}
		return err
	})
	return e, r, known, err
}

// recordAttachment writes the record of a new attachment, under the identifier nsid or, if
// that is 0, the one under which the node sees the lvol already or a free one.
func (a *Attacher) recordAttachment(node, block, transport string, nsid uint32) (Export, attachmentRecord, error) {
	x, exported, err := lookup[exportRecord](a.db, exportsBucket, block)
	if err != nil {
		return Export{}, attachmentRecord{}, err
	}
	if exported = exported && x.Node == node; exported {
		if !x.ReadOnly {
			return Export{}, attachmentRecord{}, kind.Errorf(kind.InUse, "%s writes it", x.Owner)
		}
		nsid, transport = x.NSID, x.Transport
	}
	reserved := nsid == 0
	if reserved {
		if nsid, err = a.reserveNSID(node); err != nil {
			return Export{}, attachmentRecord{}, err
		}
	}
	r := attachmentRecord{NSID: nsid, Transport: transport, CreatedUnixNanos: a.o.Now().UnixNano(), ID: newAttachmentID()}
	if err := a.put(attachmentsBucket, string(attachmentKey(node, block)), r); err != nil {
		if reserved {
			a.freeNSID(node, nsid)
		}
		return Export{}, r, err
	}
	return Export{Node: node, Block: block, NSID: nsid, Transport: transport}, r, nil
}

// undoAttachment takes back an attachment that could not be shown. What cannot be taken
// away now is left to the sweep.
func (a *Attacher) undoAttachment(e Export, r attachmentRecord) {
	err := a.endAttachment(e)
	if err == nil {
		return
	}
	a.retryAfter(err)
	r.Ending = true
	if perr := a.put(attachmentsBucket, string(attachmentKey(e.Node, e.Block)), r); perr != nil {
		err = errors.Join(err, perr)
	}
	a.o.Logger.Warn("cannot take back an attachment that failed yet", "block", e.Block, "node", e.Node, "error", err)
}

// endAttachment takes a block away from a node and forgets it. The caller has the block's
// name locked.
func (a *Attacher) endAttachment(e Export) error {
	last, err := a.hide(e, attachmentsBucket)
	if err != nil {
		return err
	}
	a.step("detach: withdrawn")
	if err := a.drop(string(attachmentKey(e.Node, e.Block)), attachmentsBucket); err != nil {
		return err
	}
	a.step("detach: forgotten")
	a.dropUse(e.Block, e.Node)
	if last {
		a.freeNSID(e.Node, e.NSID)
	}
	return nil
}

// endUndone ends the attachments that failed and could not be taken back at once.
func (a *Attacher) endUndone(ctx context.Context) error {
	var ending []Export
	if err := a.db.View(func(tx *bbolt.Tx) error {
		return attachments(tx, "", func(e Export, r attachmentRecord) error {
			if r.Ending {
				ending = append(ending, e)
			}
			return nil
		})
	}); err != nil {
		return err
	}
	return untilAway(ending, func(e Export) error {
		unlock, err := a.names.Lock(ctx, e.Block)
		if err != nil {
			return err
		}
		defer unlock()
		// Read again under the lock: it may have been attached since.
		e, r, known, err := a.attachment(e.Node, e.Block)
		if err != nil || !known || !r.Ending {
			return err
		}
		return a.endAttachment(e)
	})
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
	if a.inImage(block) {
		return nil
	}
	return a.db.View(func(tx *bbolt.Tx) error {
		if tx.Bucket(attachmentsBucket).Get(attachmentKey(node, block)) == nil && tx.Bucket(blocksBucket).Get([]byte(block)) == nil {
			return refused
		}
		return nil
	})
}

// DetachBlock implements attacherv1.NodeServer.
func (a *Attacher) DetachBlock(ctx context.Context, r *attacherv1.DetachBlockRequest) (*attacherv1.DetachBlockResponse, error) {
	node, _, err := caller(ctx, r.GetNode())
	if err != nil {
		return nil, err
	}
	block := r.GetBlock()
	if err := errors.Join(identity.CheckNode(node), checkName("block", block), checkAttachmentID(r.GetAttachmentId())); err != nil {
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
	if err := a.detachBlock(node, block, r.GetAttachmentId()); err != nil {
		return nil, fmt.Errorf("detach block %s from node %s: %w", block, node, err)
	}
	a.poke() // its removal may have waited for this
	return &attacherv1.DetachBlockResponse{}, nil
}

func (a *Attacher) detachBlock(node, block, id string) error {
	e, r, known, err := a.attachment(node, block)
	if err != nil || !known {
		return err
	}
	if err := sameAttachment(r.ID, id); err != nil {
		return err
	}
	return a.endAttachment(e)
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
			out.Attachments = append(out.Attachments, attachmentProto(e, r.ID, r.CreatedUnixNanos, Exported{}))
			return nil
		})
	}); err != nil {
		return nil, fmt.Errorf("list attachments: %w", err)
	}
	if out.Attachments, err = a.listWritables(node, out.Attachments); err != nil {
		return nil, fmt.Errorf("list writable layers: %w", err)
	}
	return out, nil
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
