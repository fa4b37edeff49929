package kill

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/thaw-project/thaw/kind"
)

// converges is how long a chain may take after the last kill.
const converges = 10 * time.Second

// subject is a chain with what is done on it. do and undo may be repeated and fail while
// members are away.
type subject interface {
	// do and undo bring the chain from one state to the other, once.
	do(ctx context.Context) error
	undo(ctx context.Context) error
	// check looks at what do made as its user would.
	check(ctx context.Context) error
	// state is all there is.
	state(ctx context.Context) (state, error)
}

// outlast repeats a call for as long as members are away.
func outlast(ctx context.Context, c *chain, call func(ctx context.Context) error) error {
	for {
		one, cancel := context.WithTimeout(ctx, converges)
		err := call(one)
		cancel()
		if err == nil {
			return nil
		}
		if broken := c.ok(); broken != nil {
			return broken
		}
		if ctx.Err() != nil || !errors.Is(err, kind.Unavailable) && !errors.Is(err, kind.Canceled) && !errors.Is(err, context.DeadlineExceeded) {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w; last: %w", ctx.Err(), err)
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// reachState waits until the chain is in a state.
func reachState(ctx context.Context, c *chain, s subject, want state) error {
	different := ""
	for {
		have, err := s.state(ctx)
		if err == nil {
			if different = have.diff(want); different == "" {
				return nil
			}
		}
		if broken := c.ok(); broken != nil {
			return broken
		}
		select {
		case <-ctx.Done():
			if different == "" {
				return fmt.Errorf("read the state: %w", err)
			}
			return fmt.Errorf("not as after a run without kills:\n%s", different)
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// outcome is what a run with kills showed.
type outcome struct {
	dead []death
	took time.Duration // from the last kill, or the beginning, to the state wanted
	// after are the points that were reached after the first death, or from the beginning,
	// by member, in order.
	after map[string][]string
}

// run does something while kills take place, and holds the chain to its end.
func run(c *chain, s subject, what func(context.Context) error, kills []kill, want state) (o outcome, err error) {
	begin := time.Now()
	if err := c.plan(kills); err != nil {
		return o, err
	}
	defer func() { o.dead = c.disarm() }()
	// Each death starts the time anew.
	ctx, cancel := context.WithTimeout(context.Background(), time.Duration(len(kills)+1)*converges)
	defer cancel()
	if err := outlast(ctx, c, what); err != nil {
		return o, err
	}
	c.disarm()
	if err := c.settled(ctx); err != nil {
		return o, err
	}
	if want != nil {
		if err := reachState(ctx, c, s, want); err != nil {
			return o, err
		}
	}
	last := begin
	if dead := c.disarm(); len(dead) > 0 {
		last = dead[len(dead)-1].at
	}
	o.took = time.Since(last)
	if o.took > converges {
		return o, fmt.Errorf("took %s after the last kill", o.took)
	}
	if o.after, err = c.reached(c.marks()); err != nil || len(kills) == 0 {
		return o, err
	}
	// What was done is done: once more changes nothing.
	if err := outlast(ctx, c, what); err != nil {
		return o, fmt.Errorf("once more: %w", err)
	}
	if err := reachState(ctx, c, s, want); err != nil {
		return o, fmt.Errorf("once more: %w", err)
	}
	return o, nil
}
