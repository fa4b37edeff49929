package card

import (
	"context"
	"fmt"
	"sync"
	"time"

	"google.golang.org/grpc"

	attacherv1 "github.com/thaw-project/thaw/api/attacher/v1"
	"github.com/thaw-project/thaw/attacher/rpc"
	"github.com/thaw-project/thaw/kind"
)

// holdState is where a hold is in its life.
type holdState int

const (
	// returning: known from before a restart; its owner may hold again.
	returning holdState = iota
	// live: a stream is open.
	live
	// ending: what it held is being detached.
	ending
)

type hold struct {
	owner string
	state holdState      // guarded by Card.mu
	node  string         // guarded by Card.mu: whose stream it lives by, on the network
	taken chan struct{}  // guarded by Card.mu: of the stream that it lives, or lived, by; closed when another has it
	calls sync.WaitGroup // calls that attach for the owner; Add under Card.mu while live
	gone  chan struct{}  // closed when an ending hold has left Card.holds
}

// Hold implements attacherv1.CardServer. A stream whose connection broke on a network need
// not be anybody's death: its owner has the grace to hold again.
func (c *Card) Hold(r *attacherv1.HoldRequest, stream grpc.ServerStreamingServer[attacherv1.HoldResponse]) error {
	if err := checkName("owner", r.GetOwner()); err != nil {
		return err
	}
	if err := c.enter(); err != nil {
		return err
	}
	defer c.calls.Done()
	ctx := stream.Context()
	node, remote, err := rpc.Node(ctx)
	if err != nil {
		return err
	}
	h, taken, err := c.takeHold(ctx, r.GetOwner(), node)
	if err != nil {
		return err
	}
	err = stream.Send(&attacherv1.HoldResponse{})
	if err == nil {
		select {
		case <-c.life.Done():
		case <-taken:
			return kind.Errorf(kind.InUse, "owner %s holds by a newer stream of %s", r.GetOwner(), node)
		case <-ctx.Done():
		}
	}
	select {
	case <-c.life.Done():
		// Its owner holds again at the next attacher, which knows it by its records.
		return kind.Errorf(kind.Unavailable, "the card's attacher is stopping: hold again when it is back")
	default:
	}
	c.leaveHold(h, taken, remote && rpc.Lost(ctx))
	return err
}

// takeHold makes owner's hold live for a stream of node, once an earlier one has ended, and
// returns what tells that stream that another of the same node has it now: a node that comes
// back from an interruption may be earlier than the news of its old connection's end.
func (c *Card) takeHold(ctx context.Context, owner, node string) (*hold, chan struct{}, error) {
	for {
		c.mu.Lock()
		h := c.holds[owner]
		if h == nil {
			h = &hold{owner: owner, state: returning, gone: make(chan struct{})}
			c.holds[owner] = h
		}
		if h.state == live && node != "" && h.node == node {
			close(h.taken)
			h.state = returning
		}
		switch h.state {
		case returning:
			taken := make(chan struct{})
			h.state, h.node, h.taken = live, node, taken
			c.mu.Unlock()
			return h, taken, nil
		case live:
			c.mu.Unlock()
			return nil, nil, kind.Errorf(kind.InUse, "owner %s holds already: owners must be unique", owner)
		}
		c.mu.Unlock()
		select {
		case <-h.gone:
		case <-c.life.Done():
			return nil, nil, kind.Errorf(kind.Unavailable, "the card's attacher is stopping: hold again when it is back")
		case <-ctx.Done():
			return nil, nil, fmt.Errorf("wait for the end of owner %s's earlier hold: %w", owner, context.Cause(ctx))
		}
	}
}

// leaveHold ends a hold whose stream ended, unless another stream has it by now: at once, or
// when the stream was lost after the grace.
func (c *Card) leaveHold(h *hold, taken chan struct{}, lost bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if h.state != live || h.taken != taken || c.closing {
		return
	}
	if !lost {
		c.endHoldLocked(h)
		return
	}
	h.state = returning
	c.own.Go(func() {
		grace := time.NewTimer(c.o.HoldGrace)
		defer grace.Stop()
		select {
		case <-c.life.Done():
			return
		case <-grace.C:
		}
		c.mu.Lock()
		defer c.mu.Unlock()
		if h.state == returning && h.taken == taken { // nobody has held since
			c.o.Logger.Info("an owner whose connection broke did not come back, detaching what it held", "owner", h.owner)
			c.endHoldLocked(h)
		}
	})
}

// endHoldLocked detaches what h holds, in a goroutine of the card; what it cannot detach now
// is tried again in the background. The caller has c.mu and knows the hold's state.
func (c *Card) endHoldLocked(h *hold) {
	if c.closing {
		return
	}
	h.state = ending
	c.own.Go(func() {
		defer close(h.gone)
		defer func() {
			c.mu.Lock()
			defer c.mu.Unlock()
			delete(c.holds, h.owner)
		}()
		h.calls.Wait()
		all, err := c.disks()
		if err != nil {
			c.o.Logger.Warn("cannot read what an ended hold left", "owner", h.owner, "error", err)
			return
		}
		c.parallel(all, func(d *disk) {
			if d.Owner != h.owner {
				return
			}
			if err := c.detachHeld(c.life, d); err != nil && c.life.Err() == nil {
				c.o.Logger.Warn("cannot detach what an ended hold left, will try again", "owner", h.owner, "disk", d.ID, "error", err)
				c.poke()
			}
		})
	})
}

// detachHeld detaches a disk of an owner that is gone, unless it is another's by now.
func (c *Card) detachHeld(ctx context.Context, held *disk) error {
	unlock, err := c.locks.Lock(ctx, held.nqn)
	if err != nil {
		return err
	}
	defer unlock()
	d, err := c.load(held.key)
	if err != nil || d == nil || d.Owner != held.Owner {
		return err
	}
	return c.undo(ctx, d, 0)
}

// use keeps owner's hold from ending until the returned function is called. The empty
// owner needs no hold.
func (c *Card) use(owner string) (done func(), err error) {
	if owner == "" {
		return func() {}, nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	h := c.holds[owner]
	if h == nil || h.state != live {
		return nil, kind.Errorf(kind.InUse, "owner %s holds nothing: open Hold and wait for its first message", owner)
	}
	h.calls.Add(1)
	return h.calls.Done, nil
}

// alive tells whether owner may still want what it left. The empty owner does.
func (c *Card) alive(owner string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	h := c.holds[owner]
	return owner == "" || h != nil && h.state != ending
}

// endAbsent ends, after the grace, the holds whose owners did not come back, and forgets
// the disks that a predecessor was attaching and nobody asked for again.
func (c *Card) endAbsent() {
	grace := time.NewTimer(c.o.HoldGrace)
	defer grace.Stop()
	select {
	case <-c.life.Done():
		return
	case <-grace.C:
	}
	c.mu.Lock()
	for _, h := range c.holds {
		if h.state == returning && h.taken == nil { // since the start; others have a grace of their own
			c.o.Logger.Info("an owner did not come back, detaching what it held", "owner", h.owner)
			c.endHoldLocked(h)
		}
	}
	left := c.left
	c.left = make(map[string]bool)
	c.mu.Unlock()
	all, err := c.disks()
	if err != nil {
		c.o.Logger.Error("cannot read what a predecessor was attaching", "error", err)
		return
	}
	for _, d := range all {
		if left[d.nqn] {
			c.forget(d)
		}
	}
	c.poke()
}

// forget makes a disk that nobody was told of one that goes.
func (c *Card) forget(d *disk) {
	unlock, err := c.locks.Lock(c.life, d.nqn)
	if err != nil {
		return
	}
	defer unlock()
	now, err := c.load(d.key)
	if err == nil && now != nil && now.State == attaching && now.Attachment == d.Attachment {
		now.State = detaching
		err = c.save(now)
	}
	if err != nil {
		c.o.Logger.Error("a disk that nobody asks for stays until the next start", "disk", d.ID, "error", err)
	}
}

// parallel calls f for each disk, for maxParallel at the same time, and waits.
func (c *Card) parallel(all []*disk, f func(*disk)) {
	slots := make(chan struct{}, maxParallel)
	var wg sync.WaitGroup
	for _, d := range all {
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			f(d)
		})
	}
	wg.Wait()
}
