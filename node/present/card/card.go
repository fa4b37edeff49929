// Package card presents disks through a DPU: it has a store let the card reach an lvol, and
// the card show it to its host as an NVMe drive on a PCIe function.
//
// It runs beside the card's attacher. A disk has no path here: which device node it gets is
// for the host to find out, by what Disk.NVMe says. All state is the card's and the store's,
// so that one process goes on where another ended. Whether the host has a drive in use the
// card cannot tell: who withdraws has asked the host before.
//
// The package must not know how stores and cards are reached, nor what is on a disk.
package card

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"

	attacherv1 "github.com/thaw-project/thaw/api/attacher/v1"
	"github.com/thaw-project/thaw/failpoint"
	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/node/present"
)

// Store lets the card reach lvols; see node/remote. What it attaches it also detaches, once
// a disk is withdrawn.
type Store interface {
	// Attachment has target's store let this host read block, and says how.
	Attachment(ctx context.Context, target, block string) (*attacherv1.Attachment, error)
	// WritableAttachment is the same for a writable layer, which is attached.
	WritableAttachment(target, id string) (*attacherv1.Attachment, error)
	// Doubt has the store asked again for a block that the card could not reach.
	Doubt(target, block string)
	// DoubtWritable has the store asked for a writable layer that the card could not reach
	// before it is shown again.
	DoubtWritable(target, id string)
}

// Options configures New.
type Options struct {
	// Card is the card's attacher, over a connection that restores error kinds.
	Card   attacherv1.CardClient
	Store  Store
	Logger *slog.Logger // nil is silence
}

// Presenter is a present.Presenter.
type Presenter struct {
	o Options

	mu       sync.Mutex
	purposes map[string]attacherv1.Purpose // guarded by mu: of the disks that this process has presented or seen
}

var _ present.Presenter = (*Presenter)(nil)

// New returns a presenter. Nothing is asked before the first call.
func New(o Options) (*Presenter, error) {
	if o.Card == nil || o.Store == nil {
		return nil, kind.Errorf(kind.Invalid, "presenting through a card needs a card and a store")
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	return &Presenter{o: o, purposes: make(map[string]attacherv1.Purpose)}, nil
}

// ours are the purposes of disks that this package shows.
var ours = []attacherv1.Purpose{attacherv1.Purpose_PURPOSE_BLOCK, attacherv1.Purpose_PURPOSE_WRITABLE}

// Present implements present.Presenter: blocks of images read-only, and writable layers that
// stores keep. It is kind.NoSpace when the card has no function free.
func (p *Presenter) Present(ctx context.Context, id string, source present.Source, readOnly bool) (present.Disk, error) {
	d, err := p.present(ctx, id, source, readOnly)
	if err != nil {
		return present.Disk{}, fmt.Errorf("show disk %.140s through the card: %w", id, err)
	}
	return d, nil
}

func (p *Presenter) present(ctx context.Context, id string, source present.Source, readOnly bool) (present.Disk, error) {
	r := &attacherv1.AttachDiskRequest{Id: id}
	var a *attacherv1.Attachment
	var err error
	switch {
	case source.Kind == present.SourceLvol && readOnly:
		r.Purpose = attacherv1.Purpose_PURPOSE_BLOCK
		a, err = p.o.Store.Attachment(ctx, source.Target, source.Lvol)
	case source.Kind == present.SourceWritable && !readOnly:
		r.Purpose = attacherv1.Purpose_PURPOSE_WRITABLE
		a, err = p.o.Store.WritableAttachment(source.Target, id)
	default:
		err = kind.Errorf(kind.Unsupported, "a card does not show source %.40q, read-only: %v", source.Kind, readOnly)
	}
	if err != nil {
		return present.Disk{}, err
	}
	failpoint.Reach("present/card.present: attached")
	r.Source = &attacherv1.AttachDiskRequest_Attachment{Attachment: a}
	p.note(id, r.Purpose)
	begin := time.Now()
	shown, err := p.o.Card.AttachDisk(ctx, r)
	if err != nil {
		switch unclear := ctx.Err() != nil || errors.Is(err, kind.Unavailable); {
		case !unclear:
			p.forget(id)
		case source.Kind == present.SourceLvol:
			p.o.Store.Doubt(source.Target, source.Lvol)
		default:
			p.o.Store.DoubtWritable(source.Target, id)
		}
		return present.Disk{}, err
	}
	failpoint.Reach("present/card.present: shown")
	d, err := disk(shown)
	switch {
	case err != nil:
		return present.Disk{}, err
	case d.ID != id || d.SizeBytes != a.GetSizeBytes() || d.ReadOnly != readOnly:
		return present.Disk{}, kind.Errorf(kind.Corrupt, "the card shows %.140q of %d bytes, read-only: %v; wanted are %d", d.ID, d.SizeBytes, d.ReadOnly, a.GetSizeBytes())
	}
	d.Source = source
	p.o.Logger.Debug("drive shown", "disk", id, "function", d.NVMe.Function, "took", time.Since(begin), "steps", steps(shown))
	return d, nil
}

// disk takes a card's answer, which is believed only as far as it makes sense. What the
// source was, but for its kind, the card does not know.
func disk(c *attacherv1.CardDisk) (present.Disk, error) {
	id, err := uuid.Parse(c.GetUuid())
	if err != nil || id == uuid.Nil || c.GetSerial() == "" || len(c.GetSerial()) > 20 || c.GetSizeBytes() <= 0 || c.GetFunction() == nil {
		return present.Disk{}, kind.Errorf(kind.Corrupt, "the card shows disk %.140q as nvmeNamespace %.80q of %d bytes, serial number %.80q, function %v",
			c.GetId(), c.GetUuid(), c.GetSizeBytes(), c.GetSerial(), c.GetFunction())
	}
	f := c.GetFunction()
	d := present.Disk{
		ID: c.GetId(), Block: true, SizeBytes: c.GetSizeBytes(), ReadOnly: c.GetReadOnly(),
		Source: present.Source{Kind: present.SourceWritable},
		NVMe: &present.NVMe{
			UUID: id.String(), Serial: c.GetSerial(),
			Function: fmt.Sprintf("%d:%d:%d", f.GetPort(), f.GetPhysicalFunction(), f.GetVirtualFunction()),
		},
	}
	if c.GetPurpose() == attacherv1.Purpose_PURPOSE_BLOCK {
		d.Source = present.Source{Kind: present.SourceLvol, Lvol: c.GetId()}
	}
	return d, nil
}

func steps(c *attacherv1.CardDisk) string {
	var b strings.Builder
	for i, s := range c.GetSteps() {
		if i > 0 {
			b.WriteString(", ")
		}
		fmt.Fprintf(&b, "%s %v", s.GetStep(), time.Duration(s.GetNanos()))
	}
	return b.String()
}

func (p *Presenter) note(id string, purpose attacherv1.Purpose) {
	p.mu.Lock()
	p.purposes[id] = purpose
	p.mu.Unlock()
}

func (p *Presenter) forget(id string) {
	p.mu.Lock()
	delete(p.purposes, id)
	p.mu.Unlock()
}

// Withdraw implements present.Presenter. Users of the disk on the host lose it.
func (p *Presenter) Withdraw(ctx context.Context, id string) error {
	p.mu.Lock()
	purpose, known := p.purposes[id]
	p.mu.Unlock()
	purposes := ours
	if known {
		purposes = []attacherv1.Purpose{purpose}
	}
	for _, purpose := range purposes {
		if _, err := p.o.Card.DetachDisk(ctx, &attacherv1.DetachDiskRequest{Id: id, Purpose: purpose}); err != nil && !errors.Is(err, kind.NotFound) {
			return fmt.Errorf("take disk %.140s from the card: %w", id, err)
		}
	}
	p.forget(id)
	failpoint.Reach("present/card.withdraw: done")
	return nil
}

// List implements present.Presenter. A disk that the card is still making or taking away is
// listed when the card lists it with an identity. The target of a source is not known.
func (p *Presenter) List(ctx context.Context) ([]present.Disk, error) {
	resp, err := p.o.Card.ListDisks(ctx, &attacherv1.ListDisksRequest{})
	if err != nil {
		return nil, fmt.Errorf("list the card's disks: %w", err)
	}
	var list []present.Disk
	for _, c := range resp.GetDisks() {
		if !slices.Contains(ours, c.GetPurpose()) || c.GetOwner() != "" || c.GetVolume() != "" {
			continue // somebody else's
		}
		d, err := disk(c)
		if err != nil {
			// One that cannot be used is still to be found, to be taken away.
			p.o.Logger.Warn("a disk of the card makes no sense", "disk", c.GetId(), "error", err)
			d = present.Disk{ID: c.GetId(), Source: present.Source{Kind: present.SourceWritable}, Block: true}
			if c.GetPurpose() == attacherv1.Purpose_PURPOSE_BLOCK {
				d.Source = present.Source{Kind: present.SourceLvol, Lvol: c.GetId()}
			}
		}
		p.note(c.GetId(), c.GetPurpose())
		list = append(list, d)
	}
	slices.SortFunc(list, func(a, b present.Disk) int { return strings.Compare(a.ID, b.ID) })
	return list, nil
}
