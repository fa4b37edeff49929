package choose

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"

	"github.com/thaw-project/thaw/keylock"
	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/node/present"
)

// Chosen is what a presenter offers beside present.Presenter.
type Chosen interface {
	present.Presenter
	// Close stops serving; the disks stay for the next process.
	Close() error
	// Teardown withdraws all disks and closes; kind.InUse changes nothing.
	Teardown(ctx context.Context) error
}

// Candidate is a presentation of this build.
type Candidate struct {
	Name string
	// Presenter may be there though it is not chosen for anything: it serves the disks
	// that an earlier process presented with it. Nil when there is none.
	Presenter Chosen
	// Unusable is why it must not be chosen, or nil.
	Unusable error
}

// Options configures New.
type Options struct {
	Candidates []Candidate
	// Force is the name of the presentation to use wherever it can; empty chooses.
	Force string
	// Logger gets what an operator should know; nil discards it.
	Logger *slog.Logger
}

// Presenter is a present.Presenter that shows each disk with the presentation that is best
// for it. A disk that is there already stays with the presentation that shows it.
type Presenter struct {
	log       *slog.Logger
	force     string
	decisions []Decision

	locks keylock.Set // by disk id

	mu         sync.Mutex
	candidates []Candidate          // guarded by mu: without those that are torn down; elements never change
	where      map[string]Candidate // guarded by mu: which shows a disk
}

var _ Chosen = (*Presenter)(nil)

// New makes a presenter of others, which it owns from then on. Errors are those of Decide,
// and of asking the presenters which disks there are.
func New(ctx context.Context, o Options) (*Presenter, error) {
	p := &Presenter{log: o.Logger, candidates: o.Candidates, force: o.Force, where: make(map[string]Candidate)}
	if p.log == nil {
		p.log = slog.New(slog.DiscardHandler)
	}
	unusable := make(map[string]error)
	for _, c := range o.Candidates {
		if c.Presenter == nil && c.Unusable == nil {
			return nil, kind.Errorf(kind.Invalid, "choose: %s has neither a presenter nor a reason why not", c.Name)
		}
		unusable[c.Name] = c.Unusable
	}
	var err error
	if p.decisions, err = Decide(unusable, o.Force); err != nil {
		return nil, err
	}
	for _, c := range p.candidates {
		if c.Presenter == nil {
			continue
		}
		disks, err := c.Presenter.List(ctx)
		if err != nil {
			return nil, fmt.Errorf("ask %s for its disks: %w", c.Name, err)
		}
		for _, d := range disks {
			if other, twice := p.where[d.ID]; twice {
				return nil, kind.Errorf(kind.Corrupt, "disk %s is shown by both %s and %s", d.ID, other.Name, c.Name)
			}
			p.where[d.ID] = c
		}
	}
	for _, d := range p.decisions {
		p.log.Info("presentation chosen", "of", string(d.Class), "presentation", d.Name, "why", d.Why)
	}
	return p, nil
}

// Decisions returns what shows which class of disks, and why.
func (p *Presenter) Decisions() []Decision { return slices.Clone(p.decisions) }

// order returns the presentations for a class, the chosen one first.
func (p *Presenter) order(class Class) (list []Candidate) {
	for _, preferred := range preferences[class] {
		if p.force != "" && preferred.name != p.force && serves(p.force, class) {
			continue
		}
		for _, c := range p.all() {
			if c.Name == preferred.name && c.Unusable == nil && c.Presenter != nil {
				list = append(list, c)
			}
		}
	}
	return list
}

func (p *Presenter) all() []Candidate {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.candidates
}

func (p *Presenter) at(id string) (Candidate, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	c, ok := p.where[id]
	return c, ok
}

func (p *Presenter) set(id string, c Candidate, there bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if there {
		p.where[id] = c
	} else {
		delete(p.where, id)
	}
}

// Present implements present.Presenter. When the chosen presentation says that it cannot
// show this disk (kind.Unsupported), the next one is tried.
func (p *Presenter) Present(ctx context.Context, id string, source present.Source, readOnly bool) (present.Disk, error) {
	unlock, err := p.locks.Lock(ctx, id)
	if err != nil {
		return present.Disk{}, kind.Errorf(kind.Canceled, "present %.140s: %w", id, err)
	}
	defer unlock()
	if c, there := p.at(id); there {
		return c.Presenter.Present(ctx, id, source, readOnly)
	}
	class := ClassOf(source, readOnly)
	var errs []error
	for _, c := range p.order(class) {
		disk, err := c.Presenter.Present(ctx, id, source, readOnly)
		if err == nil {
			p.set(id, c, true)
			return disk, nil
		}
		errs = append(errs, err)
		if p.left(ctx, c, id) {
			p.set(id, c, true) // it goes on with that the next time
			break
		}
		if !errors.Is(err, kind.Unsupported) {
			break
		}
		p.log.Warn("a presentation cannot show a disk, trying the next", "presentation", c.Name, "disk", id, "error", err)
	}
	if len(errs) == 0 {
		return present.Disk{}, kind.Errorf(kind.Unsupported, "present %.140s: nothing on this machine can show %s", id, class)
	}
	if len(errs) == 1 {
		return present.Disk{}, errs[0]
	}
	return present.Disk{}, kind.Wrap(kind.Of(errs[len(errs)-1]), errors.Join(errs...))
}

// left tells whether a failed Present left a disk that only its presenter can remove.
func (p *Presenter) left(ctx context.Context, c Candidate, id string) bool {
	disks, err := c.Presenter.List(context.WithoutCancel(ctx))
	return err == nil && slices.ContainsFunc(disks, func(d present.Disk) bool { return d.ID == id })
}

// Withdraw implements present.Presenter.
func (p *Presenter) Withdraw(ctx context.Context, id string) error {
	unlock, err := p.locks.Lock(ctx, id)
	if err != nil {
		return kind.Errorf(kind.Canceled, "withdraw %.140s: %w", id, err)
	}
	defer unlock()
	c, there := p.at(id)
	if !there {
		return nil
	}
	err = c.Presenter.Withdraw(ctx, id)
	if err == nil || !p.left(ctx, c, id) {
		// Even with an error, such as that of a last flush, the disk may be gone.
		p.set(id, c, false)
	}
	return err
}

// List implements present.Presenter.
func (p *Presenter) List(ctx context.Context) ([]present.Disk, error) {
	var all []present.Disk
	for _, c := range p.all() {
		if c.Presenter == nil {
			continue
		}
		disks, err := c.Presenter.List(ctx)
		if err != nil {
			return nil, err
		}
		all = append(all, disks...)
	}
	slices.SortFunc(all, func(a, b present.Disk) int { return cmp.Compare(a.ID, b.ID) })
	return all, nil
}

// Close closes all presenters; the disks stay for the next process.
func (p *Presenter) Close() error {
	var errs []error
	for _, c := range p.all() {
		if c.Presenter != nil {
			errs = append(errs, c.Presenter.Close())
		}
	}
	return errors.Join(errs...)
}

// Teardown tears all presenters down, one after the other: when a disk of one is in use,
// those before it are gone already, and it can be called again.
func (p *Presenter) Teardown(ctx context.Context) error {
	for _, c := range p.all() {
		if c.Presenter != nil {
			if err := c.Presenter.Teardown(ctx); err != nil {
				return fmt.Errorf("%s: %w", c.Name, err)
			}
		}
		p.mu.Lock()
		p.candidates = p.candidates[1:]
		p.mu.Unlock()
	}
	return nil
}
