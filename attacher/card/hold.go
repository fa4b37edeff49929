package card

import (
	"context"
	"sync"

	"google.golang.org/grpc"

	attacherv1 "github.com/thaw-project/thaw/api/attacher/v1"
)

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
	return c.holds.Serve(r.GetOwner(), stream)
}

// endHeld detaches what an owner held that is gone; what it cannot detach now is tried again
// in the background.
func (c *Card) endHeld(ctx context.Context, owner string) {
	all, err := c.disks()
	if err != nil {
		c.o.Logger.Warn("cannot read what an ended hold left", "owner", owner, "error", err)
		return
	}
	c.parallel(all, func(d *disk) {
		if d.Owner != owner {
			return
		}
		if err := c.detachHeld(ctx, d); err != nil && ctx.Err() == nil {
			c.o.Logger.Warn("cannot detach what an ended hold left, will try again", "owner", owner, "disk", d.ID, "error", err)
			c.poke()
		}
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

// alive tells whether owner may still want what it left. The empty owner does.
func (c *Card) alive(owner string) bool { return owner == "" || c.holds.Alive(owner) }

// endAbsent ends, after the grace, the holds whose owners did not come back, and forgets
// the disks that a predecessor was attaching and nobody asked for again.
func (c *Card) endAbsent() {
	if !c.holds.Absent() {
		return
	}
	c.mu.Lock()
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
