package fabrics

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"time"

	"github.com/thaw-project/thaw/kind"
)

// wake has controllers looked after.
func (p *Presenter) wake() {
	select {
	case p.kick <- struct{}{}:
	default:
	}
}

// connect makes sure that at least one portal of an export, or each if all is set, has a
// controller. The caller holds the subsystem in p.targets.
func (p *Presenter) connect(ctx context.Context, e *Export, all bool) error {
	there, err := p.connected(e)
	if err != nil {
		return err
	}
	if len(there) < len(e.Portals) && !all {
		defer p.wake() // the rest can wait, our caller need not
	}
	var errs []error
	for _, portal := range e.Portals {
		if there[portal] || len(there) > 0 && !all {
			continue
		}
		if err := p.connectPortal(ctx, e, portal); err != nil {
			errs = append(errs, err)
			continue
		}
		there[portal] = true
	}
	if len(there) > 0 && !all {
		return nil
	}
	return errors.Join(errs...)
}

// connected tells which portals of an export have a controller of ours or anybody's that
// the kernel keeps up.
func (p *Presenter) connected(e *Export) (map[Portal]bool, error) {
	list, err := controllers(p.options.driver.Sys())
	if err != nil {
		return nil, fmt.Errorf("look for controllers of %s: %w", e.Subsystem, err)
	}
	there := make(map[Portal]bool)
	for _, portal := range e.Portals {
		for _, c := range list {
			if c.of(e.Subsystem, e.HostNQN) && c.Portal == portal && c.usable() {
				there[portal] = true
			}
		}
	}
	return there, nil
}

func (p *Presenter) connectPortal(ctx context.Context, e *Export, portal Portal) error {
	if err := p.options.driver.Load(ctx, portal.Transport); err != nil {
		return err
	}
	if portal.Transport == TransportTCP {
		p.sendFromThreads(ctx)
	}
	// On record first: a controller of ours must not be taken for somebody else's.
	err := p.update(func(_ map[string]record, links map[link]bool) { links[link{e.Subsystem, e.HostNQN, portal}] = true })
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, connectWait)
	defer cancel()
	if err := p.options.driver.Connect(ctx, p.settings.options(e, portal)); err != nil {
		if err = connectError(portal, err); err != nil {
			return err
		}
	}
	p.log.Info("fabrics: connected", "subsystem", e.Subsystem, "portal", portal.String())
	return nil
}

// unboundSending is a parameter of the module nvme-tcp, below /sys.
const unboundSending = "module/nvme_tcp/parameters/wq_unbound"

// sendFromThreads keeps users of disks from being killed when a target goes away. Linux
// sends a request from the process whose I/O it is, if it can at once, and without
// MSG_NOSIGNAL: where the target has closed the connection that process gets SIGPIPE (seen
// with Linux 6.12, several times in ten restarts of a target under load). With this
// parameter only the kernel's threads send. It holds for connections made from then on.
func (p *Presenter) sendFromThreads(ctx context.Context) {
	now, err := fs.ReadFile(p.options.driver.Sys(), unboundSending)
	if err == nil && strings.TrimSpace(string(now)) == "Y" {
		return
	}
	if err == nil {
		err = p.options.driver.Write(ctx, unboundSending, "Y")
	}
	if err != nil {
		p.log.Warn("fabrics: a process that reads while its target goes away may get SIGPIPE: the kernel's "+unboundSending+" cannot be set", "err", err)
	}
}

// rescan asks the kernel to look at what the subsystem of an export has now. It returns
// false when no controller is live: then that happens as soon as one is.
func (p *Presenter) rescan(ctx context.Context, e *Export) (asked bool) {
	list, err := controllers(p.options.driver.Sys())
	if err != nil {
		return false
	}
	for _, c := range list {
		if c.of(e.Subsystem, e.HostNQN) && c.State == "live" {
			asked = p.options.driver.Write(ctx, "class/nvme/"+c.Name+"/rescan_controller", "1") == nil || asked
		}
	}
	return asked
}

// disconnectLast takes away the controllers that we made for the subsystem of r, if no
// other disk needs them. The caller holds the subsystem in p.targets.
func (p *Presenter) disconnectLast(ctx context.Context, r record) error {
	e := &r.Export
	p.mu.Lock()
	for _, other := range p.records {
		if !p.leaving[other.ID] && other.Export.Subsystem == e.Subsystem && other.Export.HostNQN == e.HostNQN {
			p.mu.Unlock()
			return nil
		}
	}
	ours := make(map[link]bool)
	for l := range p.links {
		if l.Subsystem == e.Subsystem && l.HostNQN == e.HostNQN {
			ours[l] = true
		}
	}
	p.mu.Unlock()
	list, err := controllers(p.options.driver.Sys())
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, deleteWait)
	defer cancel()
	for _, c := range list {
		if !ours[link{c.Subsystem, c.HostNQN, c.Portal}] {
			continue
		}
		err := p.options.driver.Write(ctx, "class/nvme/"+c.Name+"/delete_controller", "1")
		if err != nil && !errors.Is(err, kind.NotFound) {
			return fmt.Errorf("delete controller %s of %s: %w", c.Name, e.Subsystem, err)
		}
		p.log.Info("fabrics: disconnected", "subsystem", e.Subsystem, "portal", c.Portal.String())
	}
	return p.update(func(_ map[string]record, links map[link]bool) {
		for l := range ours {
			delete(links, l)
		}
	})
}

// tend makes the controllers that are missing, until Close: those of portals that were
// not needed at once, and those that the kernel gave up.
func (p *Presenter) tend() {
	type attempt struct {
		at    time.Time
		pause time.Duration
	}
	next := make(map[string]attempt) // by subsystem, after a failure
	timer := time.NewTimer(tendEvery)
	defer timer.Stop()
	for {
		select {
		case <-p.kick:
		case <-timer.C:
		case <-p.ctx.Done():
			return
		}
		wait := tendEvery
		for _, e := range p.exports() {
			a := next[e.Subsystem]
			if left := time.Until(a.at); left > 0 {
				wait = min(wait, left)
				continue
			}
			if err := p.tendOne(e); err != nil && p.ctx.Err() == nil {
				a.pause = min(max(2*a.pause, minRetry), maxRetry)
				a.at = time.Now().Add(a.pause)
				next[e.Subsystem] = a
				wait = min(wait, a.pause)
				p.log.Warn("fabrics: a portal is not connected", "subsystem", e.Subsystem, "again_in", a.pause, "error", err)
				continue
			}
			delete(next, e.Subsystem)
		}
		timer.Reset(wait)
	}
}

// exports returns one export of each subsystem that has disks which stay.
func (p *Presenter) exports() map[string]Export {
	p.mu.Lock()
	defer p.mu.Unlock()
	all := make(map[string]Export)
	for _, r := range p.records {
		if r.attached() && !p.leaving[r.ID] {
			all[r.Export.Subsystem] = r.Export
		}
	}
	return all
}

func (p *Presenter) tendOne(e Export) error {
	unlock, err := p.targets.Lock(p.ctx, e.Subsystem)
	if err != nil {
		return err
	}
	defer unlock()
	if _, still := p.exports()[e.Subsystem]; !still {
		return nil
	}
	return p.connect(p.ctx, &e, true)
}
