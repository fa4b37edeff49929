package remote

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"google.golang.org/grpc"

	attacherv1 "github.com/thaw-project/thaw/api/attacher/v1"
	"github.com/thaw-project/thaw/node/present"
)

// A hold that broke off is taken again after these pauses: an attacher that restarted gives
// its owners 10 seconds.
const (
	holdFirst = 50 * time.Millisecond
	holdMost  = time.Second
)

// findWait bounds how long the kernel may take to see a drive that the card shows.
const findWait = 30 * time.Second

// Finder is what sees the drives of a card: *pcie.Finder.
type Finder interface {
	Find(ctx context.Context, d present.Disk) (path string, err error)
	Leave(ctx context.Context, n present.NVMe) (release func() error, err error)
	Gone(ctx context.Context, n present.NVMe) error
}

// Card shows lvols as NVMe drives of the card that is plugged into this machine.
type Card struct {
	Card   attacherv1.CardClient
	Finder Finder
	// By is what the store is asked to export to the card by; empty leaves it the choice.
	By string

	keeping sync.WaitGroup // of Hold

	mu    sync.Mutex
	owner string                  // guarded by mu: the hold
	disks map[string]present.NVMe // guarded by mu: by lvol
}

var _ Disks = (*Card)(nil)

// Transport implements Disks.
func (c *Card) Transport() string { return c.By }

// Hold implements Disks: the card takes drives away when this process is gone. A hold that
// breaks off while ctx lives is taken again; Close waits for that to end.
func (c *Card) Hold(ctx context.Context, owner string) error {
	c.mu.Lock()
	held := c.owner == owner
	c.mu.Unlock()
	if held {
		return nil // and kept
	}
	stream, err := c.take(ctx, owner)
	if err != nil {
		return fmt.Errorf("hold drives at the card: %w", err)
	}
	c.mu.Lock()
	c.owner = owner
	c.mu.Unlock()
	c.keeping.Go(func() {
		for {
			_, err := stream.Recv()
			for pause := holdFirst; err != nil && ctx.Err() == nil; pause = min(2*pause, holdMost) {
				if stream, err = c.take(ctx, owner); err == nil {
					break
				}
				select {
				case <-ctx.Done():
				case <-time.After(pause):
				}
			}
			if ctx.Err() != nil {
				return
			}
		}
	})
	return nil
}

func (c *Card) take(ctx context.Context, owner string) (grpc.ServerStreamingClient[attacherv1.HoldResponse], error) {
	stream, err := c.Card.Hold(ctx, &attacherv1.HoldRequest{Owner: owner})
	if err == nil {
		_, err = stream.Recv()
	}
	return stream, err
}

// Close waits for what Hold began, whose context must have ended.
func (c *Card) Close() error {
	c.keeping.Wait()
	return nil
}

// Show implements Disks.
func (c *Card) Show(ctx context.Context, lvol string, a *attacherv1.Attachment) (string, error) {
	c.mu.Lock()
	owner := c.owner
	c.mu.Unlock()
	d, err := c.Card.AttachDisk(ctx, &attacherv1.AttachDiskRequest{
		Id: lvol, Purpose: attacherv1.Purpose_PURPOSE_CONVERSION, Owner: owner,
		Source: &attacherv1.AttachDiskRequest_Attachment{Attachment: a},
	})
	if err != nil {
		return "", fmt.Errorf("have the card show it: %w", err)
	}
	f := d.GetFunction()
	drive := present.NVMe{
		UUID: d.GetUuid(), Serial: d.GetSerial(),
		Function: fmt.Sprintf("%d:%d:%d", f.GetPort(), f.GetPhysicalFunction(), f.GetVirtualFunction()),
	}
	c.mu.Lock()
	if c.disks == nil {
		c.disks = make(map[string]present.NVMe)
	}
	c.disks[lvol] = drive
	c.mu.Unlock()
	find, cancel := context.WithTimeout(ctx, findWait)
	defer cancel()
	path, err := c.Finder.Find(find, present.Disk{ID: lvol, SizeBytes: a.GetSizeBytes(), ReadOnly: !a.GetWritable(), NVMe: &drive})
	if err != nil {
		return "", fmt.Errorf("find the card's drive: %w", err)
	}
	return path, nil
}

// Hide implements Disks.
func (c *Card) Hide(ctx context.Context, lvol string) error {
	c.mu.Lock()
	drive, ok := c.disks[lvol]
	c.mu.Unlock()
	if !ok {
		return nil
	}
	release, err := c.Finder.Leave(ctx, drive)
	if err != nil {
		return err
	}
	_, err = c.Card.DetachDisk(ctx, &attacherv1.DetachDiskRequest{Id: lvol, Purpose: attacherv1.Purpose_PURPOSE_CONVERSION})
	if err == nil {
		find, cancel := context.WithTimeout(ctx, findWait)
		err = c.Finder.Gone(find, drive)
		cancel()
	}
	if release != nil {
		err = errors.Join(err, release())
	}
	if err != nil {
		return err
	}
	c.mu.Lock()
	delete(c.disks, lvol)
	c.mu.Unlock()
	return nil
}
