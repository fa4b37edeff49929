package attacher

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"

	"go.etcd.io/bbolt"

	attacherv1 "github.com/thaw-project/thaw/api/attacher/v1"
	"github.com/thaw-project/thaw/attacher/identity"
	"github.com/thaw-project/thaw/attacher/rpc"
	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/lvol"
)

const (
	// MaxWritables bounds the writable layers that one node has, attached or not: several
	// times the containers that a node runs, and a bound on what a node that went wrong
	// can make the store keep.
	MaxWritables = 4096

	// maxWritableID bounds a node's name for a writable layer; part of the contract.
	maxWritableID = 64

	// writablePrefix begins the names of writable layers' lvols.
	writablePrefix = "rw-"
)

// writableLvol is the name of the lvol of a node's writable layer.
func writableLvol(node, id string) string {
	sum := sha256.Sum256([]byte(node + "\x00" + id))
	return writablePrefix + hex.EncodeToString(sum[:20])
}

func writableKey(node, id string) []byte { return []byte(node + "\x00" + id) }

// writableRecord is of a writable layer, from before its lvol is made until after that is
// deleted. No lvol of a writable layer is ever without one, so that none has to be looked
// for by its name.
type writableRecord struct {
	Block            string `json:"block"` // the one that was asked for
	Base             string `json:"base"`  // the snapshot that the lvol is a clone of: block, or its parent
	Made             bool   `json:"made,omitempty"`
	Deleting         bool   `json:"deleting,omitempty"`
	CreatedUnixNanos int64  `json:"created"`

	// Of the last attachment.
	ID        string `json:"id,omitempty"`
	NSID      uint32 `json:"nsid,omitempty"` // 0: it is detached
	Transport string `json:"transport,omitempty"`
}

// writable is a writable layer: its record and what its key says.
type writable struct {
	node, id string
	writableRecord
}

func (w *writable) lvol() string { return writableLvol(w.node, w.id) }

// user is how uses know it.
func (w *writable) user() string { return w.node + "\x00" + w.id }

func (w *writable) export() Export {
	return Export{Node: w.node, Block: w.lvol(), NSID: w.NSID, Transport: w.Transport, Writable: true}
}

func (w *writable) proto(x Exported) *attacherv1.Attachment {
	out := attachmentProto(w.export(), w.writableRecord.ID, w.CreatedUnixNanos, x)
	out.Block, out.WritableId = w.Block, w.id
	if w.NSID == 0 {
		out.Transport = ""
	}
	return out
}

func checkWritable(node, id string) error {
	err := errors.Join(identity.CheckNode(node), checkName("id of a writable layer", id))
	if err == nil && len(id) > maxWritableID {
		err = fmt.Errorf("id of a writable layer %.160q: must be 1 to %d of A-Z a-z 0-9 . _ -", id, maxWritableID)
	}
	return kind.Wrap(kind.Invalid, err)
}

func decodeWritable(key, raw []byte) (writable, error) {
	node, id, _ := bytes.Cut(key, []byte{0})
	w := writable{node: string(node), id: string(id)}
	err := decode(raw, &w.writableRecord)
	if err == nil {
		err = errors.Join(checkWritable(w.node, w.id), checkName("block", w.Block), checkName("block", w.Base), checkAttachmentID(w.ID))
	}
	if err == nil && w.NSID > MaxAttachments {
		err = kind.Errorf(kind.Corrupt, "nvmeNamespace %d", w.NSID)
	}
	if err != nil {
		return writable{}, kind.Errorf(kind.Corrupt, "record %.80q of writables is damaged: %w", key, err)
	}
	return w, nil
}

// writables calls f with the writable layers of node, or of all nodes when it is empty.
func writables(tx *bbolt.Tx, node string, f func(writable) error) error {
	var prefix []byte
	if node != "" {
		prefix = writableKey(node, "")
	}
	c := tx.Bucket(writablesBucket).Cursor()
	for k, v := c.Seek(prefix); k != nil && bytes.HasPrefix(k, prefix); k, v = c.Next() {
		w, err := decodeWritable(k, v)
		if err == nil {
			err = f(w)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// writable reads a writable layer's record; known is false when there is none.
func (a *Attacher) writable(node, id string) (w writable, known bool, err error) {
	w = writable{node: node, id: id}
	err = a.db.View(func(tx *bbolt.Tx) (err error) {
		key := writableKey(node, id)
		if raw := tx.Bucket(writablesBucket).Get(key); raw != nil {
			known = true
			w, err = decodeWritable(key, raw)
		}
		return err
	})
	return w, known, err
}

func (a *Attacher) putWritable(w writable) error {
	return a.put(writablesBucket, string(writableKey(w.node, w.id)), w.writableRecord)
}

// noteWritable notes that a writable layer needs its block, its base and its own lvol.
// Whoever deletes one of them looks under its lock.
func (a *Attacher) noteWritable(w writable) {
	for _, name := range []string{w.Block, w.Base, w.lvol()} {
		a.noteUse(name, w.user())
	}
}

// isWritableLvol tells names that lvols of writable layers have.
func isWritableLvol(name string) bool { return strings.HasPrefix(name, writablePrefix) }

// checkNewName refuses names of writable layers to whoever makes an lvol by himself.
func checkNewName(name string) error {
	if isWritableLvol(name) {
		return kind.Errorf(kind.Invalid, "lvol name %s: names that begin with %s are those of nodes' writable layers", name, writablePrefix)
	}
	return nil
}

// lockWritable checks a call for a writable layer, counts it in and locks the layer's lvol
// and the lvols in more. The returned function undoes that.
func (a *Attacher) lockWritable(ctx context.Context, node, id string, more ...string) (func(), error) {
	if err := a.enter(); err != nil {
		return nil, err
	}
	unlock, err := a.names.Lock(ctx, append(more, writableLvol(node, id))...)
	if err != nil {
		a.calls.Done()
		return nil, fmt.Errorf("wait for another operation on it: %w", err)
	}
	return func() { unlock(); a.calls.Done() }, nil
}

// AttachWritable implements attacherv1.NodeServer.
func (a *Attacher) AttachWritable(ctx context.Context, r *attacherv1.AttachWritableRequest) (*attacherv1.Attachment, error) {
	node, _, err := caller(ctx, r.GetNode())
	if err != nil {
		return nil, err
	}
	if err := errors.Join(checkWritable(node, r.GetId()), checkName("block", r.GetBlock())); err != nil {
		return nil, kind.Wrap(kind.Invalid, err)
	}
	out, err := a.attachWritable(ctx, node, r.GetId(), r.GetBlock(), r.GetTransport())
	if err != nil {
		a.retryAfter(err)
		return nil, fmt.Errorf("attach writable layer %s of node %s over block %s: %w", r.GetId(), node, r.GetBlock(), err)
	}
	return out, nil
}

func (a *Attacher) attachWritable(ctx context.Context, node, id, block, asked string) (*attacherv1.Attachment, error) {
	choice, err := a.transport(asked)
	if err != nil {
		return nil, err
	}
	// The block, so that nobody deletes it meanwhile; its base has a clone: the block.
	done, err := a.lockWritable(ctx, node, id, block)
	if err != nil {
		return nil, err
	}
	defer done()
	w, known, err := a.writable(node, id)
	switch {
	case err != nil:
		return nil, err
	case known && w.Deleting:
		return nil, kind.Errorf(kind.InUse, "it is being deleted")
	case known && w.Block != block:
		return nil, kind.Errorf(kind.Exists, "it is over block %s", w.Block)
	}
	if !w.Made {
		if w, err = a.makeWritable(w, known, block); err != nil {
			return nil, err
		}
	}
	fresh := w.NSID == 0
	if fresh {
		if w.NSID, err = a.reserveNSID(node); err != nil {
			return nil, err
		}
		w.ID, w.Transport, w.Made = newAttachmentID(), choice, true
		if err := a.putWritable(w); err != nil {
			a.freeNSID(node, w.NSID)
			return nil, err
		}
		a.step("attach writable: recorded")
	} else if err := sameTransport(w.Transport, asked); err != nil {
		return nil, err
	}
	x, err := a.o.Exporter.Export(w.export(), rpc.LocalAddress(ctx))
	if err != nil {
		// What is on record as attached the node may attach again, or detach.
		if fresh {
			if derr := a.withdrawWritable(&w); derr != nil {
				a.o.Logger.Warn("cannot take back a writable layer that could not be attached: its node may detach it", "node", node, "id", id, "error", derr)
			}
		}
		return nil, err
	}
	a.step("attach writable: exported")
	return w.proto(x), nil
}

// makeWritable makes the lvol of a writable layer, once it is on record that it may exist.
func (a *Attacher) makeWritable(w writable, known bool, block string) (writable, error) {
	if !known {
		if err := a.complete(w.node, block); err != nil {
			return w, err
		}
		info, err := a.o.Lvols.Get(block)
		if err != nil {
			return w, err
		}
		base := block
		if !info.Snapshot {
			base = info.Parent // a soldier is a clone that nobody writes to: its parent's equal
		}
		if base == "" {
			return w, kind.Errorf(kind.Invalid, "it is neither a snapshot nor the clone of one")
		}
		if info, err := a.o.Lvols.Get(base); err != nil {
			return w, fmt.Errorf("its snapshot %s: %w", base, err)
		} else if !info.Snapshot {
			return w, kind.Errorf(kind.Invalid, "its parent %s is no snapshot", base)
		}
		// Nothing of this store's has that name without a record.
		if _, err := a.o.Lvols.Get(w.lvol()); err == nil {
			return w, kind.Errorf(kind.Exists, "lvol %s is there and on no record: if nobody needs it, delete it", w.lvol())
		} else if !errors.Is(err, kind.NotFound) {
			return w, err
		}
		w.writableRecord = writableRecord{Block: block, Base: base, CreatedUnixNanos: a.o.Now().UnixNano()}
		if err := a.recordWritable(w); err != nil {
			return w, err
		}
		a.noteWritable(w)
		a.step("make writable: recorded")
	}
	info, err := a.o.Lvols.Get(w.lvol())
	switch {
	case errors.Is(err, kind.NotFound):
		if _, err = a.o.Lvols.Clone(w.Base, w.lvol()); err != nil {
			a.unmakeWritable(w)
			return w, err
		}
		a.step("make writable: cloned")
	case err != nil:
		return w, err
	case info.Parent != w.Base:
		return w, kind.Errorf(kind.Exists, "lvol %s is there and no clone of %s", w.lvol(), w.Base)
	}
	return w, nil
}

// recordWritable writes the first record of a writable layer, if the node has room for it.
func (a *Attacher) recordWritable(w writable) error {
	return a.db.Update(func(tx *bbolt.Tx) error {
		n := 0
		prefix := writableKey(w.node, "")
		c := tx.Bucket(writablesBucket).Cursor()
		for k, _ := c.Seek(prefix); k != nil && bytes.HasPrefix(k, prefix); k, _ = c.Next() {
			n++
		}
		if n >= MaxWritables {
			return kind.Errorf(kind.NoSpace, "node %s has %d writable layers, which is the most", w.node, n)
		}
		return put(tx, writablesBucket, string(writableKey(w.node, w.id)), w.writableRecord)
	})
}

// unmakeWritable forgets a writable layer whose lvol could not be made, once it is sure
// that there is none; else the next attach or delete finds the record.
func (a *Attacher) unmakeWritable(w writable) {
	if _, err := a.o.Lvols.Get(w.lvol()); !errors.Is(err, kind.NotFound) {
		return
	}
	if err := a.forgetWritable(w); err != nil {
		a.o.Logger.Warn("cannot forget a writable layer that could not be made", "node", w.node, "id", w.id, "error", err)
	}
}

func (a *Attacher) forgetWritable(w writable) error {
	if err := a.drop(string(writableKey(w.node, w.id)), writablesBucket); err != nil {
		return err
	}
	a.step("delete writable: forgotten")
	for _, name := range []string{w.Block, w.Base, w.lvol()} {
		a.dropUse(name, w.user())
	}
	a.poke() // their removal may have waited for this
	return nil
}

// withdrawWritable takes a writable layer's lvol away from its node and records that.
func (a *Attacher) withdrawWritable(w *writable) error {
	if w.NSID == 0 {
		return nil
	}
	if a.o.Exporter != nil {
		if err := a.o.Exporter.Withdraw(w.export()); err != nil {
			return err
		}
	}
	a.step("detach writable: withdrawn")
	nsid := w.NSID
	w.NSID = 0
	if err := a.putWritable(*w); err != nil {
		w.NSID = nsid
		return err
	}
	a.step("detach writable: recorded")
	a.freeNSID(w.node, nsid)
	return nil
}

// DetachWritable implements attacherv1.NodeServer.
func (a *Attacher) DetachWritable(ctx context.Context, r *attacherv1.DetachWritableRequest) (*attacherv1.DetachWritableResponse, error) {
	if err := a.endWritable(ctx, r.GetNode(), r.GetId(), r.GetAttachmentId(), false); err != nil {
		return nil, fmt.Errorf("detach writable layer %.64s: %w", r.GetId(), err)
	}
	return &attacherv1.DetachWritableResponse{}, nil
}

// DeleteWritable implements attacherv1.NodeServer.
func (a *Attacher) DeleteWritable(ctx context.Context, r *attacherv1.DeleteWritableRequest) (*attacherv1.DeleteWritableResponse, error) {
	if err := a.endWritable(ctx, r.GetNode(), r.GetId(), r.GetAttachmentId(), true); err != nil {
		return nil, fmt.Errorf("delete writable layer %.64s: %w", r.GetId(), err)
	}
	return &attacherv1.DeleteWritableResponse{}, nil
}

func (a *Attacher) endWritable(ctx context.Context, requested, id, attachmentID string, remove bool) error {
	node, _, err := caller(ctx, requested)
	if err != nil {
		return err
	}
	if err := errors.Join(checkWritable(node, id), checkAttachmentID(attachmentID)); err != nil {
		return kind.Wrap(kind.Invalid, err)
	}
	done, err := a.lockWritable(ctx, node, id)
	if err != nil {
		return err
	}
	defer done()
	w, known, err := a.writable(node, id)
	if err != nil || !known {
		return err
	}
	if err := sameAttachment(w.ID, attachmentID); err != nil {
		return err
	}
	if remove {
		err = a.deleteWritable(w)
	} else {
		err = a.withdrawWritable(&w)
	}
	a.retryAfter(err)
	return err
}

// deleteWritable deletes a writable layer: the intent first, then the node's access, the
// lvol and the record. The caller has the lvol's name locked.
func (a *Attacher) deleteWritable(w writable) error {
	if !w.Deleting {
		w.Deleting = true
		if err := a.putWritable(w); err != nil {
			return err
		}
		a.step("delete writable: recorded")
	}
	if err := a.withdrawWritable(&w); err != nil {
		return err
	}
	if err := a.o.Lvols.Delete(w.lvol()); err != nil && !errors.Is(err, kind.NotFound) {
		return err
	}
	a.step("delete writable: deleted")
	return a.forgetWritable(w)
}

// deleteWritables goes on with the deletion of writable layers that was interrupted.
func (a *Attacher) deleteWritables(ctx context.Context) error {
	var going []writable
	if err := a.db.View(func(tx *bbolt.Tx) error {
		return writables(tx, "", func(w writable) error {
			if w.Deleting {
				going = append(going, w)
			}
			return nil
		})
	}); err != nil {
		return err
	}
	return untilAway(going, func(w writable) error {
		unlock, err := a.names.Lock(ctx, w.lvol())
		if err != nil {
			return err
		}
		defer unlock()
		w, known, err := a.writable(w.node, w.id)
		if err != nil || !known || !w.Deleting {
			return err
		}
		return a.deleteWritable(w)
	})
}

// complete is nil for what writable layers may be made over: a complete block of a
// converted image, or a scratch.
func (a *Attacher) complete(node, block string) error {
	size, ok := scratchSize(block)
	if !ok {
		return a.exportable(node, block)
	}
	info, err := a.o.Lvols.Get(block)
	if err == nil && (!info.Snapshot || info.SizeBytes != size) {
		err = kind.Errorf(kind.NotFound, "it is no scratch")
	}
	return err
}

// listWritables appends a node's writable layers, or all nodes', with what they occupy; 0
// while the store is away.
func (a *Attacher) listWritables(node string, out []*attacherv1.Attachment) ([]*attacherv1.Attachment, error) {
	var layers []writable
	if err := a.db.View(func(tx *bbolt.Tx) error {
		return writables(tx, node, func(w writable) error {
			layers = append(layers, w)
			return nil
		})
	}); err != nil || len(layers) == 0 {
		return out, err
	}
	occupied := make(map[string]lvol.Info, len(layers))
	infos, err := a.o.Lvols.List()
	if err != nil && !errors.Is(err, kind.Unavailable) { // what there is, is known without the store
		return nil, err
	}
	for _, i := range infos {
		if isWritableLvol(i.Name) {
			occupied[i.Name] = i
		}
	}
	for _, w := range layers {
		p := w.proto(Exported{})
		i := occupied[w.lvol()]
		p.SizeBytes, p.AllocatedBytes = i.SizeBytes, i.AllocatedClusters*i.ClusterBytes
		out = append(out, p)
	}
	return out, nil
}
