package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/thaw-project/thaw/kind"
)

// resource is something of the kernel's that several snapshots may need: a block's
// mount, a writable disk. Its methods are idempotent and are called by shared only,
// never two at a time for one key.
type resource interface {
	key() string
	// up brings the resource up and returns its block device, "" when it is a mount.
	up(ctx context.Context) (device string, err error)
	// down takes away whatever up, even a killed one, may have left.
	down(ctx context.Context) error
	// intact tells whether what up made is still there.
	intact(device string) bool
}

// shared brings resources up once however many ask, and takes them down when no
// record in the metadata uses them and nobody in this process holds them. Who uses
// what is in the records; shared only knows what this process is doing.
type shared struct {
	s *Snapshotter

	mu      sync.Mutex
	entries map[string]*entry // by key, guarded by mu; no more than resources that are up or coming up
}

type entry struct {
	resource resource // the first that was asked for by its key
	// op is held while up or down runs: one slot.
	op chan struct{}

	// The rest is guarded by shared.mu.
	holds    int       // users in this process that no record shows yet
	pins     int       // settles under way
	ready    bool      // up succeeded and no down began since
	device   string    // valid when ready
	call     *call     // the up under way
	keep     time.Time // not to be taken down before
	failures int       // downs that failed in a row
}

// errTimeout is among the causes of an error when the attach timeout was.
var errTimeout = errors.New("attach timeout")

// call is one up under way; its goroutine closes done after setting the rest.
type call struct {
	done   chan struct{}
	device string
	err    error
}

func newShared(s *Snapshotter) *shared {
	return &shared{s: s, entries: map[string]*entry{}}
}

// entry returns the entry for r. The caller holds mu.
func (sh *shared) entry(r resource) *entry {
	e := sh.entries[r.key()]
	if e == nil {
		e = &entry{resource: r, op: make(chan struct{}, 1)}
		sh.entries[r.key()] = e
	}
	return e
}

// drop removes e if nothing refers to it. The caller holds mu.
func (sh *shared) drop(e *entry) {
	if e.holds == 0 && e.pins == 0 && e.call == nil && !e.ready && e.failures == 0 {
		delete(sh.entries, e.resource.key())
	}
}

// acquire brings r up and holds it until release is called; release must be called
// after a record uses r, or when none will. It gives up when ctx ends, or after the
// attach timeout with kind.Unavailable; what is under way then ends on its own, for
// others who wait for the same resource, or is taken down again.
func (sh *shared) acquire(ctx context.Context, r resource) (device string, release func(), err error) {
	sh.mu.Lock()
	e := sh.entry(r)
	e.holds++
	ready, device := e.ready && e.call == nil, e.device
	sh.mu.Unlock()
	release = sh.releaser(e)
	if ready && r.intact(device) {
		return device, release, nil
	}

	sh.mu.Lock()
	c := e.call
	if c == nil {
		c = &call{done: make(chan struct{})}
		if !sh.s.run(func() { sh.bringUp(e, c, r) }) {
			sh.mu.Unlock()
			release()
			return "", nil, kind.Errorf(kind.Unavailable, "bring up %s: the snapshotter is closed", r.key())
		}
		e.call = c
	}
	sh.mu.Unlock()

	timer := time.NewTimer(sh.s.o.AttachTimeout)
	defer timer.Stop()
	select {
	case <-c.done:
		device, err = c.device, c.err
	case <-timer.C:
		err = kind.Errorf(kind.Unavailable, "bring up %s: not done after %v: %w", r.key(), sh.s.o.AttachTimeout, errTimeout)
	case <-ctx.Done():
		err = fmt.Errorf("bring up %s: %w", r.key(), context.Cause(ctx))
	}
	if err != nil {
		release()
		return "", nil, err
	}
	return device, release, nil
}

// bringUp runs one call. It is owned by the snapshotter, not by any caller, so that
// a caller who gives up spoils nothing for the others.
func (sh *shared) bringUp(e *entry, c *call, r resource) {
	ctx, cancel := context.WithTimeoutCause(sh.s.ctx, sh.s.o.AttachTimeout, errTimeout)
	defer cancel()
	started := time.Now()
	select {
	case e.op <- struct{}{}:
		if c.device, c.err = r.up(ctx); c.err != nil && errors.Is(ctx.Err(), context.DeadlineExceeded) {
			c.err = kind.Errorf(kind.Unavailable, "%w: %w", c.err, errTimeout)
		}
		sh.mu.Lock()
		if c.err == nil {
			e.ready, e.device = true, c.device
		}
		sh.mu.Unlock()
		<-e.op
	case <-ctx.Done():
		c.err = kind.Errorf(kind.Unavailable, "bring up %s: not begun: %w", r.key(), context.Cause(ctx))
	}
	sh.s.metrics.attached(started, c.err)
	sh.mu.Lock()
	e.call = nil
	abandoned := e.holds == 0
	sh.mu.Unlock()
	close(c.done)
	if abandoned {
		sh.settleLogged(r)
	}
}

// releaser returns a function that ends one hold, once.
func (sh *shared) releaser(e *entry) func() {
	var once sync.Once
	return func() {
		once.Do(func() {
			sh.mu.Lock()
			e.holds--
			last := e.holds == 0 && e.call == nil
			sh.mu.Unlock()
			if last && !sh.needed(e) {
				sh.s.run(func() { sh.settleLogged(e.resource) })
			}
		})
	}
}

// needed tells whether a record uses e, or it is to be kept a while.
func (sh *shared) needed(e *entry) bool {
	sh.mu.Lock()
	kept := time.Now().Before(e.keep)
	sh.mu.Unlock()
	if kept {
		return true
	}
	used := true // when in doubt
	err := sh.s.view(context.WithoutCancel(sh.s.ctx), func(_ context.Context, r records) error {
		used = r.used(e.resource.key())
		if name, ok := strings.CutPrefix(e.resource.key(), blockPrefix); ok && !used {
			// A leaf whose lower layers are not protected otherwise yet.
			member, err := r.toProtect(name)
			used = member.id != ""
			return err
		}
		return nil
	})
	return used || err != nil
}

// lingerFor keeps the resource, if it is up, for d from now, whatever the records
// say.
func (sh *shared) lingerFor(key string, d time.Duration) {
	sh.mu.Lock()
	defer sh.mu.Unlock()
	if e := sh.entries[key]; e != nil && time.Until(e.keep) < d {
		e.keep = time.Now().Add(d)
	}
}

// keptUntil is when lingerFor ends.
func (sh *shared) keptUntil(key string) time.Time {
	sh.mu.Lock()
	defer sh.mu.Unlock()
	if e := sh.entries[key]; e != nil {
		return e.keep
	}
	return time.Time{}
}

// unkeep ends lingerFor.
func (sh *shared) unkeep(key string) {
	sh.mu.Lock()
	defer sh.mu.Unlock()
	if e := sh.entries[key]; e != nil {
		e.keep = time.Time{}
	}
}

// settle takes r down unless it is needed or held.
func (sh *shared) settle(ctx context.Context, r resource) error {
	return sh.exclusive(ctx, r, func(e *entry) error {
		sh.mu.Lock()
		busy := e.holds > 0 || e.call != nil
		if !busy {
			e.ready = false
		}
		sh.mu.Unlock()
		if busy || sh.needed(e) {
			return nil
		}
		err := r.down(ctx)
		sh.mu.Lock()
		defer sh.mu.Unlock()
		if err != nil {
			e.failures++
			return fmt.Errorf("take down %s: %w", r.key(), err)
		}
		e.failures = 0
		return nil
	})
}

func (sh *shared) settleLogged(r resource) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(sh.s.ctx), sh.s.o.AttachTimeout)
	defer cancel()
	if err := sh.settle(ctx, r); err != nil {
		sh.s.metrics.cleanupFailures.Inc()
		sh.s.log.Warn("will try again later", "error", err)
	}
}

// exclusive runs fn while nothing else brings r up or takes it down.
func (sh *shared) exclusive(ctx context.Context, r resource, fn func(*entry) error) error {
	sh.mu.Lock()
	e := sh.entry(r)
	e.pins++
	sh.mu.Unlock()
	defer func() {
		sh.mu.Lock()
		e.pins--
		sh.drop(e)
		sh.mu.Unlock()
	}()
	select {
	case e.op <- struct{}{}:
	case <-ctx.Done():
		return fmt.Errorf("wait for %s: %w", r.key(), context.Cause(ctx))
	}
	defer func() { <-e.op }()
	return fn(e)
}

// takeDown takes r down for good although a record uses it: first it runs before,
// and after going down then, before anybody can bring it up again. It is kind.InUse
// while somebody is at it.
func (sh *shared) takeDown(ctx context.Context, r resource, before func(context.Context) error, then func() error) error {
	return sh.exclusive(ctx, r, func(e *entry) error {
		sh.mu.Lock()
		busy := e.holds > 0
		if !busy {
			e.ready = false
		}
		sh.mu.Unlock()
		if busy {
			return kind.Errorf(kind.InUse, "%s is being brought up", r.key())
		}
		if err := before(ctx); err != nil {
			return err
		}
		if err := r.down(ctx); err != nil {
			return fmt.Errorf("take down %s: %w", r.key(), err)
		}
		return then()
	})
}

// sweep settles every entry that may be unneeded, and those whose taking down
// failed.
func (sh *shared) sweep(ctx context.Context) error {
	sh.mu.Lock()
	var idle []resource
	for _, e := range sh.entries {
		if e.holds == 0 && e.call == nil {
			idle = append(idle, e.resource)
		}
	}
	sh.mu.Unlock()
	var errs []error
	for _, r := range idle {
		sh.mu.Lock()
		e := sh.entries[r.key()]
		sh.mu.Unlock()
		if e == nil || sh.needed(e) {
			continue
		}
		errs = append(errs, sh.settle(ctx, r))
	}
	return errors.Join(errs...)
}
