package remote

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"

	attacherv1 "github.com/thaw-project/thaw/api/attacher/v1"
	"github.com/thaw-project/thaw/failpoint"
	"github.com/thaw-project/thaw/kind"
)

// target is one store.
type target struct {
	r   *Remote
	o   TargetOptions
	log *slog.Logger

	events chan struct{} // capacity 1: there is something to sweep

	mu     sync.Mutex
	conn   *grpc.ClientConn // guarded by mu, as are all below; nil until first needed
	links  map[string]*link // by subsystem and portals
	dirty  bool             // what the store has is not known
	doubts map[string]bool  // blocks that the store may have lost
	lost   map[string]error // blocks that it says it does not have
	closed bool
}

func newTarget(r *Remote, o TargetOptions) *target {
	return &target{
		r: r, o: o, log: r.log.With("target", o.Name), events: make(chan struct{}, 1), dirty: true,
		links: make(map[string]*link), doubts: make(map[string]bool), lost: make(map[string]error),
	}
}

// client returns the attacher's client. Nothing is connected before the first call.
func (t *target) client() (attacherv1.NodeClient, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return nil, kind.Errorf(kind.Unavailable, "target %s: this process is stopping", t.o.Name)
	}
	if t.conn == nil {
		conn, err := t.r.o.dial(t.o)
		if err != nil {
			return nil, fmt.Errorf("target %s: %w", t.o.Name, err)
		}
		t.conn = conn
	}
	return attacherv1.NewNodeClient(t.conn), nil
}

// attach asks the store for block and records the answer. The caller has the block's
// key locked.
func (t *target) attach(ctx context.Context, block string) error {
	c, err := t.client()
	if err != nil {
		return err
	}
	begin := time.Now()
	a, err := c.AttachBlock(ctx, &attacherv1.AttachBlockRequest{Block: block, Transport: t.o.Transport})
	if err != nil {
		return err
	}
	failpoint.Reach("remote.attach: asked")
	rec, err := recordOf(a)
	if err == nil && rec.Block != "" {
		err = kind.Errorf(kind.Corrupt, "it can be written")
	}
	if err != nil {
		return fmt.Errorf("the store's answer makes no sense: %w", err)
	}
	var m *attacherv1.BlockMap
	if _, known := t.r.record(t.o.Name, block); !known {
		m, err = t.fetchMap(ctx, c, block, rec.SizeBytes)
		if err != nil && !errors.Is(err, kind.Unsupported) {
			return fmt.Errorf("get its map: %w", err)
		}
	}
	if err := t.r.put(t.o.Name, block, rec, m); err != nil {
		return err
	}
	failpoint.Reach("remote.attach: recorded")
	t.mu.Lock()
	delete(t.doubts, block)
	delete(t.lost, block)
	t.mu.Unlock()
	t.log.Debug("block attached", "block", block, "nsid", rec.NSID, "took", time.Since(begin))
	return nil
}

// detach has the store take block away and forgets it. attachment is the store's identifier
// of what is meant, or empty. The caller has the block's key locked.
func (t *target) detach(ctx context.Context, block, attachment string) error {
	c, err := t.client()
	if err != nil {
		return err
	}
	// The last block takes the subsystem along: leave before it goes.
	t.prune(block)
	_, err = c.DetachBlock(ctx, &attacherv1.DetachBlockRequest{Block: block, AttachmentId: attachment})
	if errors.Is(err, kind.InUse) && attachment != "" {
		// What is on record is not what the store has: an answer was lost. Nobody else
		// attaches for this node, so what it has is meant.
		have, lerr := t.list(ctx)
		if lerr != nil {
			return lerr
		}
		if now, ok := have[block]; ok && now != attachment {
			_, err = c.DetachBlock(ctx, &attacherv1.DetachBlockRequest{Block: block, AttachmentId: now})
		}
	}
	if err != nil && !errors.Is(err, kind.NotFound) {
		return err
	}
	failpoint.Reach("remote.detach: asked")
	if err := t.r.drop(t.o.Name, block); err != nil {
		return err
	}
	failpoint.Reach("remote.detach: recorded")
	t.mu.Lock()
	delete(t.doubts, block)
	delete(t.lost, block)
	t.mu.Unlock()
	t.log.Debug("block detached", "block", block)
	return nil
}

// wake has the sweeper look; all means that the store is to be asked what it has.
func (t *target) wake(all bool) {
	if all {
		t.mu.Lock()
		t.dirty = true
		t.mu.Unlock()
	}
	select {
	case t.events <- struct{}{}:
	default:
	}
}

// doubt has the sweeper ask for a block again that the store was found not to show, and
// returns what it answered before.
func (t *target) doubt(block string) error {
	t.mu.Lock()
	err := t.lost[block]
	t.doubts[block] = true
	t.mu.Unlock()
	t.wake(false)
	return err
}

// sweeper compares what is recorded, what the store has and what is in use, when
// something changed and until it succeeds.
func (t *target) sweeper(ctx context.Context, inUse func(target, block string) bool) {
	pause := sweepFirst
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.events:
		case <-timer.C:
		}
		err := t.sweep(ctx, func(block string) bool { return inUse(t.o.Name, block) })
		switch {
		case ctx.Err() != nil:
			return
		case err == nil:
			pause = sweepFirst
			timer.Stop()
			continue
		}
		t.log.Warn("attachments at the store are not in line yet", "again", pause, "error", err)
		// Events meanwhile would only hammer a store that is away.
		select {
		case <-ctx.Done():
			return
		case <-time.After(pause):
		}
		timer.Reset(0)
		pause = min(2*pause, sweepMost)
	}
}

func (t *target) sweep(ctx context.Context, inUse func(block string) bool) error {
	t.mu.Lock()
	dirty := t.dirty
	t.dirty = false
	t.mu.Unlock()
	records := t.r.blocks(t.o.Name)
	blocks := make(map[string]bool, len(records)) // those to look at; true: to attach again
	var have map[string]string
	for block := range records {
		blocks[block] = dirty
	}
	err := func() error {
		if dirty {
			var err error
			if have, err = t.list(ctx); err != nil {
				return err
			}
			for block := range have {
				if _, ok := records[block]; !ok {
					blocks[block] = false
				}
			}
		}
		t.mu.Lock()
		for block := range t.doubts {
			if _, ok := records[block]; ok {
				blocks[block] = true
			}
			delete(t.doubts, block)
		}
		t.mu.Unlock()
		var errs []error
		for block, again := range blocks {
			if err := t.settle(ctx, block, have[block], again, inUse); err != nil {
				errs = append(errs, err)
				if again && !dirty {
					t.mu.Lock()
					t.doubts[block] = true
					t.mu.Unlock()
				}
			}
		}
		return errors.Join(errs...)
	}()
	if err != nil && dirty {
		t.mu.Lock()
		t.dirty = true
		t.mu.Unlock()
	}
	return err
}

// list asks the store which blocks it has for this node: their identifiers, by name.
func (t *target) list(ctx context.Context) (map[string]string, error) {
	c, err := t.client()
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	resp, err := c.ListAttachments(ctx, &attacherv1.ListAttachmentsRequest{})
	if err != nil {
		return nil, fmt.Errorf("list attachments: %w", err)
	}
	blocks := make(map[string]string)
	for _, a := range resp.GetAttachments() {
		if !a.GetWritable() { // those are their owners' to end
			blocks[a.GetBlock()] = a.GetAttachmentId()
		}
	}
	return blocks, nil
}

// settle detaches a block that nobody uses, and attaches one that somebody does again if
// so asked. attachment is what the store just called it, if it was asked.
func (t *target) settle(ctx context.Context, block, attachment string, again bool, inUse func(block string) bool) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	unlock, err := t.r.keys.Lock(ctx, key(t.o.Name, block))
	if err != nil {
		return err
	}
	defer unlock()
	// Under the lock: whoever wants the block is in use before he attaches.
	if !inUse(block) {
		if rec, ok := t.r.record(t.o.Name, block); ok && attachment == "" {
			attachment = rec.Attachment
		}
		if err := t.detach(ctx, block, attachment); err != nil {
			return fmt.Errorf("detach block %s: %w", block, err)
		}
		return nil
	}
	if _, ok := t.r.record(t.o.Name, block); !ok || !again {
		return nil
	}
	err = t.attach(ctx, block)
	if err != nil && refused(err) {
		t.mu.Lock()
		first := t.lost[block] == nil
		t.lost[block] = err
		t.mu.Unlock()
		if first {
			t.log.Error("the store does not have a block that is in use here", "block", block, "error", err)
		}
		return nil
	}
	if err != nil {
		return fmt.Errorf("attach block %s again: %w", block, err)
	}
	return nil
}

// link returns the connection that serves rec, begun if need be.
func (t *target) link(rec record) (*link, error) {
	id := rec.Subsystem + " " + strings.Join(rec.addresses(), " ")
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return nil, kind.Errorf(kind.Unavailable, "target %s: this process is stopping", t.o.Name)
	}
	l := t.links[id]
	if l == nil {
		var err error
		if l, err = newLink(t, rec); err != nil {
			return nil, err
		}
		t.links[id] = l
	}
	return l, nil
}

// prune closes links that only without needs, or nobody.
func (t *target) prune(without string) {
	needed := make(map[string]bool)
	for block, rec := range t.r.blocks(t.o.Name) {
		if block != without {
			needed[rec.Subsystem+" "+strings.Join(rec.addresses(), " ")] = true
		}
	}
	var idle []*link
	t.mu.Lock()
	for id, l := range t.links {
		if !needed[id] {
			idle = append(idle, l)
			delete(t.links, id)
		}
	}
	t.mu.Unlock()
	for _, l := range idle {
		l.close()
	}
}

func (t *target) close() {
	t.mu.Lock()
	t.closed = true
	links, conn := t.links, t.conn
	t.links, t.conn = nil, nil
	t.mu.Unlock()
	for _, l := range links {
		l.close()
	}
	if conn != nil {
		conn.Close()
	}
}
