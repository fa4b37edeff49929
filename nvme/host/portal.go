package host

import (
	"context"
	"fmt"
	"slices"

	"github.com/thaw-project/thaw/kind"
)

// portal is an address that the Host connects to, or did.
type portal struct {
	addr    string
	stop    context.CancelFunc
	done    chan struct{} // closed when its goroutine has ended
	removed bool
}

// addPath starts the path of a portal; the outcome of the first attempt goes to first.
func (h *Host) addPath(addr string, first chan<- error) {
	ctx, stop := context.WithCancel(h.ctx)
	p := portal{addr: addr, stop: stop, done: make(chan struct{})}
	h.mu.Lock()
	if h.closed {
		h.mu.Unlock()
		stop()
		first <- kind.Errorf(kind.Unavailable, "host of %s is closed", h.c.SubNQN)
		return
	}
	i := len(h.portals)
	h.portals = append(h.portals, p)
	h.paths = append(h.paths, nil)
	h.wg.Add(1)
	h.mu.Unlock()
	go func() {
		defer h.wg.Done()
		defer close(p.done)
		defer stop()
		h.run(ctx, i, addr, first)
	}()
}

// maxPortals bounds the portals of a Host, those that were removed included.
const maxPortals = 1024

// AddPortal adds a path over another portal of the subsystem and returns once it is
// connected; ctx bounds that. When it does not connect it is removed again. kind.Exists
// when the Host has the portal already.
func (h *Host) AddPortal(ctx context.Context, addr string) error {
	h.mu.Lock()
	closed, full := h.closed, len(h.portals) >= maxPortals
	known := slices.ContainsFunc(h.portals, func(p portal) bool { return p.addr == addr && !p.removed })
	h.mu.Unlock()
	switch {
	case closed:
		return kind.Errorf(kind.Unavailable, "host of %s is closed", h.c.SubNQN)
	case known:
		return kind.Errorf(kind.Exists, "portal %s of %s is in use already", addr, h.c.SubNQN)
	case full:
		return kind.Errorf(kind.NoSpace, "%s has had %d portals", h.c.SubNQN, maxPortals)
	}
	first := make(chan error, 1)
	h.addPath(addr, first)
	var err error
	select {
	case err = <-first:
	case <-ctx.Done():
		err = kind.Wrap(kind.Unavailable, fmt.Errorf("connect to %s at %s: %w", h.c.SubNQN, addr, ctx.Err()))
	}
	if err != nil {
		h.drop(addr)
	}
	return err
}

// RemovePortal ends the path of a portal. I/O goes on over the others. kind.NotFound
// when there is no such portal, kind.InUse when it is the last.
func (h *Host) RemovePortal(addr string) error {
	h.mu.Lock()
	left, known := 0, false
	for _, p := range h.portals {
		switch {
		case p.removed:
		case p.addr == addr:
			known = true
		default:
			left++
		}
	}
	h.mu.Unlock()
	switch {
	case !known:
		return kind.Errorf(kind.NotFound, "%s has no portal %s", h.c.SubNQN, addr)
	case left == 0:
		return kind.Errorf(kind.InUse, "portal %s is the last of %s", addr, h.c.SubNQN)
	}
	h.drop(addr)
	return nil
}

func (h *Host) drop(addr string) {
	var ended []chan struct{}
	h.mu.Lock()
	for i := range h.portals {
		if p := &h.portals[i]; p.addr == addr && !p.removed {
			p.removed = true
			p.stop()
			ended = append(ended, p.done)
		}
	}
	h.mu.Unlock()
	for _, done := range ended {
		<-done
	}
}

// PortalState is a portal and whether it is connected, and as which controller.
type PortalState struct {
	Address string
	Up      bool
	CNTLID  uint16
}

// Portals lists the portals in the order in which they were added.
func (h *Host) Portals() []PortalState {
	h.mu.Lock()
	defer h.mu.Unlock()
	var list []PortalState
	for i, p := range h.portals {
		if p.removed {
			continue
		}
		s := PortalState{Address: p.addr, Up: h.paths[i] != nil}
		if s.Up {
			s.CNTLID = h.paths[i].cntlid
		}
		list = append(list, s)
	}
	return list
}

// HostNQN is what the Host calls itself.
func (h *Host) HostNQN() string { return h.c.HostNQN }
