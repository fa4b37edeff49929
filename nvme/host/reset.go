package host

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/thaw-project/thaw/kind"
)

var errReset = errors.New("the path was reset")

// Reset ends the controllers of all paths, which connect anew, and returns once they
// have; where none was up, once one is. I/O waits meanwhile, as after a failure. ctx
// bounds the wait: kind.Unavailable.
func (h *Host) Reset(ctx context.Context) error {
	h.mu.Lock()
	if h.closed {
		h.mu.Unlock()
		return kind.Errorf(kind.Unavailable, "host of %s is closed", h.c.SubNQN)
	}
	old := slices.Clone(h.paths)
	h.mu.Unlock()
	some := false
	for _, ct := range old {
		if ct != nil {
			some = true
			h.failed(ct, errReset)
		}
	}
	for {
		h.mu.Lock()
		closed, change, missing, up := h.closed, h.change, 0, 0
		for i, ct := range h.paths {
			switch {
			case ct != nil:
				up++
			case i < len(old) && old[i] != nil && !h.portals[i].removed:
				missing++
			}
		}
		h.mu.Unlock()
		if closed {
			return kind.Errorf(kind.Unavailable, "host of %s is closed", h.c.SubNQN)
		}
		if missing == 0 && (some || up > 0) {
			return nil
		}
		select {
		case <-change:
		case <-ctx.Done():
			return kind.Wrap(kind.Unavailable, fmt.Errorf("reset %s: %d paths are not back, %d are up: %w", h.c.SubNQN, missing, up, ctx.Err()))
		}
	}
}
