package remote

import (
	"context"
	"errors"
	"fmt"

	"go.etcd.io/bbolt"

	attacherv1 "github.com/thaw-project/thaw/api/attacher/v1"
	"github.com/thaw-project/thaw/failpoint"
	"github.com/thaw-project/thaw/kind"
)

// lockWritable keeps others from a writable layer; block and layer may have one name.
func (r *Remote) lockWritable(ctx context.Context, targetName, id string) (unlock func(), err error) {
	return r.keys.Lock(ctx, "writable\x00"+key(targetName, id))
}

func (r *Remote) writable(targetName, id string) (record, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	rec := r.writables[key(targetName, id)]
	if rec == nil {
		return record{}, false
	}
	return *rec, true
}

// AttachWritable has the store make the writable layer id over block, unless made says
// that it did before, and lets whoever reaches the store for this node read and write it.
// For one that is on record nothing is asked, unless it is in doubt. Errors are those of Attach, kind.NotFound
// also for a layer that was made and is gone, and kind.Exists when id is over another
// block.
func (r *Remote) AttachWritable(ctx context.Context, targetName, block, id string, made bool) (*attacherv1.Attachment, error) {
	t, err := r.target(targetName)
	if err != nil {
		return nil, err
	}
	unlock, err := r.lockWritable(ctx, targetName, id)
	if err == nil {
		defer unlock()
		var rec record
		if rec, err = t.attachWritable(ctx, block, id, made); err == nil {
			return rec.proto(block, id), nil
		}
	}
	return nil, fmt.Errorf("attach writable layer %s of target %s: %w", id, targetName, err)
}

func (t *target) attachWritable(ctx context.Context, block, id string, made bool) (record, error) {
	old, known := t.r.writable(t.o.Name, id)
	switch {
	case known && old.Block != block:
		return record{}, kind.Errorf(kind.Exists, "it is over block %s", old.Block)
	case known && !t.r.doubted(t.o.Name, id):
		return old, nil
	}
	rec, err := t.askWritable(ctx, block, id, made || known)
	switch {
	case known && errors.Is(err, kind.Unavailable):
		return old, nil // the data may be there all the same, and the doubt stays
	case err != nil:
		return record{}, err
	case known && !old.sameBytes(rec):
		return record{}, kind.Errorf(kind.Corrupt, "it was deleted there and made again while it is attached here")
	}
	if err := t.r.putWritable(t.o.Name, id, &rec); err != nil {
		return record{}, err
	}
	failpoint.Reach("remote.attach writable: recorded")
	return rec, nil
}

// askWritable has the store attach a layer.
func (t *target) askWritable(ctx context.Context, block, id string, made bool) (record, error) {
	c, err := t.client()
	if err != nil {
		return record{}, err
	}
	if made {
		// The store would make one that is lost anew, and empty.
		a, err := t.findWritable(ctx, c, id)
		if err == nil && a == nil {
			err = kind.Errorf(kind.NotFound, "the store has lost it")
		}
		if err != nil {
			return record{}, err
		}
	}
	a, err := c.AttachWritable(ctx, &attacherv1.AttachWritableRequest{Block: block, Id: id, Transport: t.o.Transport})
	if err != nil {
		return record{}, err
	}
	failpoint.Reach("remote.attach writable: asked")
	rec, err := recordOf(a)
	if err == nil && rec.Block != block {
		err = kind.Errorf(kind.Corrupt, "it is over block %.140q", rec.Block)
	}
	if err != nil {
		return record{}, fmt.Errorf("the store's answer makes no sense: %w", err)
	}
	return rec, nil
}

// DoubtWritable has the next AttachWritable ask the store for a layer that could not be
// reached by what is on record.
func (r *Remote) DoubtWritable(targetName, id string) {
	k := key(targetName, id)
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.writables[k] != nil { // as many doubts as layers
		r.doubts[k] = struct{}{}
	}
}

func (r *Remote) doubted(targetName, id string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	_, yes := r.doubts[key(targetName, id)]
	return yes
}

// WritableAttachment is what AttachWritable answered for a layer that is attached, or
// kind.NotFound.
func (r *Remote) WritableAttachment(targetName, id string) (*attacherv1.Attachment, error) {
	rec, ok := r.writable(targetName, id)
	if !ok {
		return nil, kind.Errorf(kind.NotFound, "writable layer %s of target %s is not attached", id, targetName)
	}
	return rec.proto(rec.Block, id), nil
}

// DetachWritable ends AttachWritable and keeps what was written. A layer that is unknown is
// no error; kind.Unavailable when the store does not answer within ctx: call again.
func (r *Remote) DetachWritable(ctx context.Context, targetName, id string) error {
	return r.endWritable(ctx, targetName, id, "detach", func(c attacherv1.NodeClient, attachment string) error {
		_, err := c.DetachWritable(ctx, &attacherv1.DetachWritableRequest{Id: id, AttachmentId: attachment})
		return err
	})
}

// DeleteWritable is DetachWritable and deletes what was written.
func (r *Remote) DeleteWritable(ctx context.Context, targetName, id string) error {
	return r.endWritable(ctx, targetName, id, "delete", func(c attacherv1.NodeClient, attachment string) error {
		_, err := c.DeleteWritable(ctx, &attacherv1.DeleteWritableRequest{Id: id, AttachmentId: attachment})
		return err
	})
}

func (r *Remote) endWritable(ctx context.Context, targetName, id, what string, end func(c attacherv1.NodeClient, attachment string) error) error {
	t, err := r.target(targetName)
	if err != nil {
		return err
	}
	unlock, err := r.lockWritable(ctx, targetName, id)
	if err == nil {
		defer unlock()
		err = func() error {
			c, err := t.client()
			if err != nil {
				return err
			}
			rec, _ := r.writable(targetName, id)
			// First, so that nobody takes it for attached when only the answer is lost.
			if err := r.putWritable(targetName, id, nil); err != nil {
				return err
			}
			failpoint.Reach("remote." + what + " writable: forgotten")
			err = end(c, rec.Attachment)
			if errors.Is(err, kind.InUse) && rec.Attachment != "" {
				// It was attached again and the answer was lost.
				var a *attacherv1.Attachment
				if a, err = t.findWritable(ctx, c, id); err == nil && a != nil {
					err = end(c, a.GetAttachmentId())
				}
			}
			if errors.Is(err, kind.NotFound) {
				err = nil
			}
			if err == nil {
				failpoint.Reach("remote." + what + " writable: asked")
			}
			return err
		}()
	}
	if err != nil {
		return fmt.Errorf("%s writable layer %s of target %s: %w", what, id, targetName, err)
	}
	return nil
}

// WritableBytes is what was written to a layer occupies at the store; 0 for one that does
// not exist.
func (r *Remote) WritableBytes(ctx context.Context, targetName, id string) (int64, error) {
	t, err := r.target(targetName)
	if err != nil {
		return 0, err
	}
	c, err := t.client()
	if err == nil {
		var a *attacherv1.Attachment
		if a, err = t.findWritable(ctx, c, id); err == nil {
			return a.GetAllocatedBytes(), nil
		}
	}
	return 0, fmt.Errorf("size of writable layer %s of target %s: %w", id, targetName, err)
}

// findWritable asks the store for a layer of this node, attached or not; nil when there is
// none.
func (t *target) findWritable(ctx context.Context, c attacherv1.NodeClient, id string) (*attacherv1.Attachment, error) {
	resp, err := c.ListAttachments(ctx, &attacherv1.ListAttachmentsRequest{})
	if err != nil {
		return nil, fmt.Errorf("list attachments: %w", err)
	}
	for _, a := range resp.GetAttachments() {
		if a.GetWritable() && a.GetWritableId() == id {
			return a, nil
		}
	}
	return nil, nil
}

// EnsureScratch has the store make, once for each size, a block with an empty ext4.
func (r *Remote) EnsureScratch(ctx context.Context, targetName string, sizeBytes int64) (block string, err error) {
	t, err := r.target(targetName)
	if err != nil {
		return "", err
	}
	c, err := t.client()
	if err == nil {
		var resp *attacherv1.EnsureScratchResponse
		if resp, err = c.EnsureScratch(ctx, &attacherv1.EnsureScratchRequest{SizeBytes: sizeBytes}); err == nil {
			return resp.GetBlock(), nil
		}
	}
	return "", fmt.Errorf("scratch block of target %s: %w", targetName, err)
}

// putWritable records a layer as attached, or forgets it when rec is nil.
func (r *Remote) putWritable(targetName, id string, rec *record) error {
	k := key(targetName, id)
	if _, known := r.writable(targetName, id); rec == nil && !known {
		return nil
	}
	raw, err := encodeRecord(rec)
	if err != nil {
		return err
	}
	if err := r.db.Update(func(tx *bbolt.Tx) error {
		if rec == nil {
			return tx.Bucket(writablesBucket).Delete([]byte(k))
		}
		return tx.Bucket(writablesBucket).Put([]byte(k), raw)
	}); err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.doubts, k)
	if rec == nil {
		delete(r.writables, k)
	} else {
		r.writables[k] = rec
	}
	return nil
}
