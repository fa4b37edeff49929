package host

import (
	"errors"
	"time"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/nvme"
)

// changes tells whether a command must not be carried out late.
func changes(opcode uint8) bool {
	return opcode == nvme.OpWrite || opcode == nvme.OpWriteZeroes || opcode == nvme.OpDatasetManagement
}

// fencePause is how often a target is asked again whether a controller is gone.
const fencePause = 50 * time.Millisecond

// fence returns once no command that was sent to ct, which failed, can be carried out
// any more. The first caller sees to it, the others wait for that. deadline is the
// command's, as for wait.
func (h *Host) fence(ct *controller, deadline *time.Time) error {
	if deadline.IsZero() {
		*deadline = time.Now().Add(h.c.LossTimeout)
	}
	ct.fencing.Lock()
	defer ct.fencing.Unlock()
	for !ct.fenced {
		live := h.live.Load()
		if live == nil || live == ct {
			if err := h.wait(deadline); err != nil {
				return err
			}
			continue
		}
		gone, err := live.ends(ct)
		switch {
		case errors.Is(err, errPath):
			h.failed(live, err)
		case err != nil:
			h.c.Log.Info("writes wait for the target to notice a lost path", "portal", ct.addr, "for", h.quiesce(ct), "why", err)
			err = h.pause(time.Until(ct.lost.Load().Add(h.quiesce(ct))), *deadline)
			gone = err == nil
			if err != nil {
				return err
			}
		case !gone:
			if err := h.pause(fencePause, *deadline); err != nil {
				return err
			}
		}
		ct.fenced = gone
	}
	return nil
}

// ends has the target end the failed controller ct, and tells whether it is gone. An
// error of errPath is of ct's path to the target; any other says that the target cannot do it.
func (ct *controller) ends(lost *controller) (gone bool, err error) {
	if lost.cntlid == ct.cntlid {
		return true, nil // the identifier is that of another now
	}
	if lost.id.CrossResetLimit == 0 || ct.id.CrossResetLimit == 0 {
		return false, kind.Errorf(kind.Unsupported, "target has no Cross-Controller Reset")
	}
	cmd := nvme.CrossReset(lost.cntlid, lost.id.CIU, lost.id.CIRN)
	cqe, err := ct.admin.do(&cmd, none, nil)
	if err != nil {
		return false, err
	}
	switch cqe.Status.Code() {
	case nvme.CrossResetBusy, nvme.CrossResetLimit:
		return false, nil
	}
	return cqe.Result&nvme.CrossResetDone != 0, cqe.Status.Err()
}

// quiesce is how long after its loss a controller may still carry out commands, for a
// target that does not tell.
func (h *Host) quiesce(ct *controller) time.Duration {
	switch {
	case h.c.Quiesce != 0:
		return max(h.c.Quiesce, 0)
	case h.c.KeepAlive == 0:
		return h.c.IOTimeout
	}
	return 3*h.c.KeepAlive + time.Duration(ct.id.QuiesceMs)*time.Millisecond
}

// pause waits, not past the deadline and not longer than the host is open.
func (h *Host) pause(d time.Duration, deadline time.Time) error {
	late := time.Until(deadline) < d
	if late {
		d = time.Until(deadline)
	}
	t := time.NewTimer(max(d, 0))
	defer t.Stop()
	select {
	case <-h.ctx.Done():
		return kind.Errorf(kind.Unavailable, "host of %s is closed", h.c.SubNQN)
	case <-t.C:
	}
	if late {
		return kind.Errorf(kind.Unavailable, "%s did not end a lost path for %v", h.c.SubNQN, h.c.LossTimeout)
	}
	return nil
}
