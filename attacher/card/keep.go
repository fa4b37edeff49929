package card

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	opiv1 "github.com/opiproject/opi-api/storage/v1alpha1/gen/go"

	"github.com/thaw-project/thaw/attacher/identity"
	"github.com/thaw-project/thaw/kind"
)

// view is what the target has, as far as it concerns the card.
type view struct {
	subsystems     map[string]*opiv1.NvmeSubsystemSpec // all, by NQN
	nvmeNamespaces map[string][]string                 // UUIDs, by NQN
	functions      map[Function]string                 // NQNs
	remotes        map[string][]string                 // the card's own: ids of paths, by controller
}

// read asks the target for all of that.
func (c *Card) read(ctx context.Context) (v view, err error) {
	// Functions first: an nvmeNamespace that is not there yet while the function is
	// plugged would be taken for lost, and is just going.
	at := time.Now()
	if v.functions, err = c.bridge.functions(ctx); err != nil {
		return v, err
	}
	c.sawShown(v.functions, at)
	if v.nvmeNamespaces, err = c.bridge.nvmeNamespaces(ctx); err != nil {
		return v, err
	}
	if v.subsystems, err = c.bridge.subsystems(ctx); err != nil {
		return v, err
	}
	names, err := c.bridge.remotes(ctx)
	if err != nil {
		return v, err
	}
	v.remotes = make(map[string][]string)
	for _, name := range names {
		if !c.names.OwnsRemote(name) {
			continue
		}
		if v.remotes[name], err = c.bridge.paths(ctx, name); err != nil {
			return v, err
		}
	}
	return v, nil
}

// lacks says what of a disk the target does not have; nothing when it is whole.
func (c *Card) lacks(v view, d *disk) string {
	s := v.subsystems[d.nqn]
	switch {
	case s == nil:
		return "its subsystem"
	case s.GetSerialNumber() != c.names.Serial(d.UUID) || s.GetHostnqn() != identity.HostNQN(c.o.Host):
		return "its subsystem's identity"
	case !slices.Contains(v.nvmeNamespaces[d.nqn], d.UUID.String()):
		return "its nvmeNamespace"
	case v.functions[d.Function] != d.nqn:
		return "its function"
	case d.controller != "" && len(v.remotes[d.controller]) == 0:
		return "the connection to its store"
	}
	return ""
}

// keep makes the target have what is on record, and nothing else that is the card's, until
// the card stops.
func (c *Card) keep() {
	down := false
	for {
		err := c.converge(c.life)
		if c.life.Err() != nil {
			return
		}
		pause := c.o.Interval
		switch {
		case err != nil:
			pause = min(pause, downInterval)
			if !down {
				c.o.Logger.Warn("the card's target cannot be asked what it has, trying again", "error", err)
			}
		case down:
			c.o.Logger.Info("the card's target answers again")
		}
		down = err != nil
		timer := time.NewTimer(pause)
		select {
		case <-c.life.Done():
			timer.Stop()
			return
		case <-timer.C:
		case <-c.wake:
			timer.Stop()
		}
	}
}

// converge compares once and repairs. It waits for no other machine: connections are made
// beside it. The error says that the target does not answer; what concerns one disk only is
// that disk's problem.
func (c *Card) converge(ctx context.Context) error {
	all, err := c.disks() // first: what was attached before must be in what is read
	if err != nil {
		return err
	}
	v, err := c.read(ctx)
	if err != nil {
		return err
	}
	c.metrics.rounds.Inc()
	for _, d := range all {
		if d.State == detaching {
			c.aside(d.nqn, func() { c.goOn(ctx, d) })
		}
	}
	c.sweep(ctx, v, all)
	c.forgetPaths(v)
	wanted := connections(all)
	for controller, w := range wanted {
		c.mend(controller, w, v.remotes[controller])
	}
	var broken []*disk
	for _, d := range all {
		switch what := c.lacks(v, d); {
		case d.State != attached:
		case what == "":
			c.noteProblem(d.nqn, "")
		default:
			c.noteLack(d.nqn, "the card's target lacks "+what)
			broken = append(broken, d)
		}
	}
	err = c.repair(ctx, v, broken)
	return errors.Join(err, c.dropProblems())
}

// dropProblems forgets what was wrong with disks that are gone.
func (c *Card) dropProblems() error {
	c.mu.Lock()
	none := len(c.problems) == 0
	c.mu.Unlock()
	if none {
		return nil
	}
	all, err := c.disks()
	if err != nil {
		return err
	}
	known := make(map[string]bool, len(all))
	for _, d := range all {
		known[d.nqn] = true
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	maps.DeleteFunc(c.problems, func(nqn, _ string) bool { return !known[nqn] })
	return nil
}

// tryLock takes a lock that nobody has; whoever has it works on what it is for.
func (c *Card) tryLock(name string) (unlock func(), ok bool) {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	unlock, err := c.locks.Lock(ctx, name)
	return unlock, err == nil
}

// aside calls f in a goroutine of the card with a lock, so that rounds wait for no host and
// no function: once, however many rounds ask for it, and not at all when somebody else has
// the lock by then. No more wait than there are disks, and what the last rounds found.
func (c *Card) aside(lock string, f func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closing || c.queued[lock] {
		return
	}
	c.queued[lock] = true
	c.own.Go(func() {
		defer func() {
			c.mu.Lock()
			defer c.mu.Unlock()
			delete(c.queued, lock)
		}()
		select {
		case c.slots <- struct{}{}:
			defer func() { <-c.slots }()
		case <-c.life.Done():
			return
		}
		if unlock, ok := c.tryLock(lock); ok {
			defer unlock()
			f()
		}
	})
}

// goOn takes away a disk whose detaching was interrupted. The caller has its lock.
func (c *Card) goOn(ctx context.Context, d *disk) {
	now, err := c.load(d.key)
	if err == nil && (now == nil || now.State != detaching) {
		return
	}
	if err == nil {
		err = c.undo(ctx, now, 0)
	}
	if err != nil && ctx.Err() == nil && c.noteProblem(d.nqn, "it cannot be detached: "+err.Error()) {
		c.o.Logger.Warn("a disk cannot be detached yet", "disk", d.ID, "purpose", purposes[d.Purpose], "error", err)
	}
}

// sweep deletes what bears the card's names and is not on record: not in all, which was read
// before v, nor when its turn comes.
func (c *Card) sweep(ctx context.Context, v view, all []*disk) {
	known := make(map[string]*disk, len(all))
	for _, d := range all {
		known[d.nqn] = d
	}
	for nqn := range v.subsystems {
		if c.names.OwnsSubsystem(nqn) && known[nqn] == nil {
			c.aside(nqn, func() { c.dropSubsystem(ctx, nqn) })
		}
	}
	for f, nqn := range v.functions {
		if d := known[nqn]; d != nil && d.Function != f {
			c.aside(nqn, func() { c.dropFunction(ctx, f, d) })
		}
	}
	for name := range v.remotes {
		if c.needed(name) {
			continue
		}
		c.aside(name, func() {
			if c.needed(name) { // by now
				return
			}
			c.o.Logger.Warn("ending a connection of this card that no disk needs", "controller", name)
			if err := c.dropUnneeded(ctx, name); err != nil {
				c.o.Logger.Warn("a connection that no disk needs stays until the next round", "controller", name, "error", err)
				return
			}
			c.metrics.orphans.Inc()
			c.step("card.sweep: controller")
		})
	}
}

// dropSubsystem deletes a subsystem, unless it is a disk's by now. The caller has its lock.
func (c *Card) dropSubsystem(ctx context.Context, nqn string) {
	all, err := c.disks()
	if err == nil && slices.ContainsFunc(all, func(d *disk) bool { return d.nqn == nqn }) {
		return
	}
	if err == nil {
		c.o.Logger.Warn("deleting a subsystem of this card that is not on record", "subsystem", nqn)
		_, err = callWithin(ctx, plugMost, c.bridge.fe.DeleteNvmeSubsystem, &opiv1.DeleteNvmeSubsystemRequest{Name: subsystemName(nqn), AllowMissing: true})
	}
	if err != nil {
		c.o.Logger.Warn("a subsystem that is not on record stays until the next round", "subsystem", nqn, "error", err)
		return
	}
	c.metrics.orphans.Inc()
	c.step("card.sweep: subsystem")
}

// dropFunction takes a function from a disk that has another by its record. The caller has
// the disk's lock.
func (c *Card) dropFunction(ctx context.Context, f Function, d *disk) {
	now, err := c.load(d.key)
	if err == nil && (now == nil || now.Function == f) {
		return
	}
	if err == nil {
		c.o.Logger.Warn("taking a function from a disk that has another", "disk", d.ID, "purpose", purposes[d.Purpose], "function", f)
		_, err = callWithin(ctx, plugMost, c.bridge.fe.DeleteNvmeController, &opiv1.DeleteNvmeControllerRequest{Name: controllerName(d.nqn, f), AllowMissing: true})
	}
	if err != nil {
		c.o.Logger.Warn("a function that a disk does not need stays until the next round", "disk", d.ID, "function", f, "error", err)
		return
	}
	c.metrics.orphans.Inc()
	c.step("card.sweep: function")
}

// forgetPaths takes note of connections that the target lost.
func (c *Card) forgetPaths(v view) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for controller := range c.paths {
		if len(v.remotes[controller]) == 0 {
			delete(c.paths, controller)
		}
	}
}

// connection is what the disks of one remote controller want.
type connection struct {
	remote  *remote
	portals []portal // of all of them
}

func connections(all []*disk) map[string]connection {
	wanted := make(map[string]connection)
	for _, d := range all {
		if d.State != attached || d.Remote == nil {
			continue
		}
		w := wanted[d.controller]
		w.remote = d.Remote
		for _, p := range d.Remote.Portals {
			if !slices.Contains(w.portals, p) {
				w.portals = append(w.portals, p)
			}
		}
		wanted[d.controller] = w
	}
	return wanted
}

// mendMost is the longest pause between attempts to connect to a portal that does not
// answer.
const mendMost = 4 * time.Second

// mending is a connection that is being repaired.
type mending struct {
	cancel context.CancelFunc // while an attempt runs
	pause  time.Duration      // after the next failure
	next   time.Time          // not before
}

// mend starts to repair a connection that lacks paths, or has too many, unless that goes on
// already. have are the ids of the paths that there are.
func (c *Card) mend(controller string, w connection, have []string) {
	var missing []portal
	var stale []string
	for _, p := range w.portals {
		if !slices.Contains(have, p.id()) {
			missing = append(missing, p)
		}
	}
	for _, id := range have {
		if !slices.ContainsFunc(w.portals, func(p portal) bool { return p.id() == id }) {
			stale = append(stale, id)
		}
	}
	none := len(missing) == len(w.portals)
	c.mu.Lock()
	defer c.mu.Unlock()
	m := c.mending[controller]
	if len(missing) == 0 && (len(stale) == 0 || none) {
		if m != nil && m.cancel == nil {
			delete(c.mending, controller)
		}
		return
	}
	if m == nil {
		m = &mending{}
		c.mending[controller] = m
	}
	if m.cancel != nil || time.Now().Before(m.next) || len(c.users[controller]) == 0 || c.closing {
		return
	}
	ctx, cancel := context.WithCancel(c.life)
	m.cancel = cancel
	c.own.Go(func() {
		err := c.mendNow(ctx, controller, w, missing, stale, none)
		unwanted := ctx.Err() != nil
		cancel()
		c.mu.Lock()
		m.cancel = nil
		first := m.pause == 0 // the others say the same
		if err != nil {
			m.pause = min(max(2*m.pause, c.o.Interval/2), mendMost)
			m.next = time.Now().Add(m.pause)
		} else { // a connection that breaks as soon as it is made must not keep us busy
			m.pause, m.next = 0, time.Now().Add(c.o.Interval/2)
		}
		c.mu.Unlock()
		if err == nil && none {
			c.poke()
		}
		if err != nil && !unwanted && first {
			c.o.Logger.Warn("a path to a store cannot be made yet", "subsystem", w.remote.Subsystem, "error", err)
		}
	})
}

func (c *Card) mendNow(ctx context.Context, controller string, w connection, missing []portal, stale []string, none bool) error {
	if none {
		unlock, err := c.locks.Lock(ctx, controller)
		if err != nil {
			return err
		}
		defer unlock()
		if !c.needed(controller) {
			return nil
		}
		err = c.firstPath(ctx, controller, w.remote, missing)
		c.step("card.repair: connected")
		return err // the others in the next round
	}
	// Without the lock: whoever attaches a disk must not wait for a portal that does not
	// answer. A controller that is deleted meanwhile and comes back by this is swept.
	var errs []error
	for _, p := range missing {
		if err := c.bridge.connect(ctx, controller, w.remote, p); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", p.id(), err))
		}
	}
	for _, id := range stale {
		if _, err := call(ctx, c.bridge.remote.DeleteNvmePath, &opiv1.DeleteNvmePathRequest{Name: remoteName(controller) + "/nvmePaths/" + id, AllowMissing: true}); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", id, err))
		}
	}
	c.step("card.repair: paths")
	return errors.Join(errs...)
}

// repair makes what disks lack, as far as their stores show them.
func (c *Card) repair(ctx context.Context, v view, broken []*disk) error {
	volumes := make(map[string]map[string]string) // by controller and UUID
	for _, d := range broken {
		if d.controller == "" || volumes[d.controller] != nil || len(v.remotes[d.controller]) == 0 {
			continue
		}
		all, err := c.bridge.remoteVolumes(ctx, d.controller)
		if err != nil && !errors.Is(err, kind.NotFound) {
			return err
		}
		volumes[d.controller] = all
	}
	for _, d := range broken {
		volume := d.Volume
		if d.Remote != nil {
			if volume = volumes[d.controller][d.Remote.UUID]; volume == "" {
				c.noteProblem(d.nqn, "its store does not show it, or is not reached")
				continue
			}
		}
		c.aside(d.nqn, func() {
			if err := c.repairOne(ctx, d, volume); err != nil && ctx.Err() == nil && c.noteProblem(d.nqn, err.Error()) {
				c.o.Logger.Warn("a disk cannot be repaired yet", "disk", d.ID, "purpose", purposes[d.Purpose], "error", err)
			}
		})
	}
	return nil
}

// repairOne shows a disk again. The caller has its lock.
func (c *Card) repairOne(ctx context.Context, d *disk, volume string) error {
	now, err := c.load(d.key)
	if err != nil || now == nil || now.State != attached || now.Attachment != d.Attachment {
		return err
	}
	if now.Volume != "" {
		have, err := c.bridge.volume(ctx, now.Volume)
		if err != nil {
			return err
		}
		if c.names.NvmeNamespace(now.key, have.source) != now.UUID {
			return kind.Errorf(kind.Exists, "volume %s was made anew and is not what the disk showed: detach the disk", now.Volume)
		}
	}
	if err := c.showVolume(ctx, now, volume, c.begin("repair")); err != nil {
		return err
	}
	c.metrics.repairs.Inc()
	c.noteProblem(d.nqn, "")
	c.o.Logger.Info("a disk was shown again", "disk", d.ID, "purpose", purposes[d.Purpose], "function", d.Function)
	return nil
}
