package ublk

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/thaw-project/thaw/kind"
)

// Info is what the kernel knows of a device.
type Info struct {
	ID                        int
	Path                      string // of the block device
	State                     State
	Queues, Depth, MaxIOBytes int
	PID                       int    // of the process that serves, or last served; -1 if none
	Owner                     uint64 // Options.Owner
	Recoverable               bool   // whether it outlives its server without losing requests
}

func makeInfo(i devInfo) Info {
	return Info{
		ID: int(i.id), Path: blockPath(i.id), State: i.state,
		Queues: int(i.queues), Depth: int(i.depth), MaxIOBytes: int(i.maxIOBytes),
		PID: int(i.pid), Owner: i.owner,
		Recoverable: i.flags&(featUserRecovery|featUserRecoveryReissue) == featUserRecovery|featUserRecoveryReissue,
	}
}

// List returns the devices of this machine, whoever made them, in no order. A machine
// without ublk has none.
func List() ([]Info, error) {
	ids, err := devices()
	if err != nil || len(ids) == 0 {
		return nil, err
	}
	var list []Info
	err = withControl(func(c *control) error {
		for _, id := range ids {
			i, err := c.info(id)
			if errors.Is(err, kind.NotFound) {
				continue // deleted meanwhile
			}
			if err != nil {
				return err
			}
			list = append(list, makeInfo(i))
		}
		return nil
	})
	return list, err
}

// Delete takes a device away that this process does not serve, whoever made it, and
// frees its number. Who has it open gets errors. An unknown device is no error.
func Delete(ctx context.Context, id int) error {
	if id < 0 {
		return kind.Errorf(kind.Invalid, "ublk: delete device %d", id)
	}
	return remove(ctx, uint32(id))
}

const (
	// vanishWait is how long a deletion waits until the number is free, which it is
	// when the last user has closed the device and the kernel has cleaned up.
	vanishWait  = 2 * time.Second
	vanishPause = 2 * time.Millisecond
)

// remove deletes a device and waits a moment until it is gone. Users that are slow to
// close it do not make it fail: the kernel frees the number after them.
func remove(ctx context.Context, id uint32) error {
	if err := withControl(func(c *control) error { return c.del(id) }); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, vanishWait)
	defer cancel()
	gone := filepath.Join(classDir, filepath.Base(charPath(id)))
	for {
		if _, err := os.Lstat(gone); errors.Is(err, os.ErrNotExist) {
			return nil
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(vanishPause):
		}
	}
}

// Pauses between attempts to take over a device whose last server is still ending.
const (
	minRecoverPause = time.Millisecond
	maxRecoverPause = 50 * time.Millisecond
)

// Recover takes over the device o.ID, whose server has ended, and serves it on: its
// users see a pause and no error. Queues, depth and sizes are those it was made with.
// Recover waits until the last server is quite gone, or ctx ends (kind.InUse).
//
// kind.NotFound: there is no such device, or it was not started or is stopped: Delete
// it. kind.Denied: it is somebody else's. kind.Unsupported: it was made without user
// recovery. kind.Corrupt: o.Device does not have its size.
func Recover(ctx context.Context, o Options) (*Server, error) {
	if err := o.validate(); err != nil {
		return nil, err
	}
	if o.ID < 0 {
		return nil, kind.Errorf(kind.Invalid, "ublk: recover device %d", o.ID)
	}
	if _, err := probe(); err != nil {
		return nil, err
	}
	s := newServer(o)
	err := withControl(func(c *control) (err error) {
		if s.info, err = c.info(uint32(o.ID)); err != nil {
			return err
		}
		if err := s.mayRecover(c); err != nil {
			return err
		}
		if err := s.startRecovery(ctx, c); err != nil {
			return err
		}
		reached("recovery started")
		if err := s.serve(); err != nil {
			return errors.Join(err, s.Close())
		}
		reached("recovery ready")
		if err := c.simple(cmdEndRecovery, s.info.id, "end recovery of device", uint64(os.Getpid())); err != nil {
			return errors.Join(err, s.Close())
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return s, nil
}

// mayRecover tells whether the device is what the caller believes.
func (s *Server) mayRecover(c *control) error {
	id := s.info.id
	switch {
	case s.info.owner != s.o.Owner:
		return kind.Errorf(kind.Denied, "ublk: recover device %d: it belongs to another (owner %#x)", id, s.info.owner)
	case s.info.state == Dead:
		return kind.Errorf(kind.NotFound, "ublk: recover device %d: it is not started", id)
	case !makeInfo(s.info).Recoverable:
		return kind.Errorf(kind.Unsupported, "ublk: recover device %d: it was made without user recovery", id)
	case s.info.depth == 0 || s.info.depth > maxQueueDepth || s.info.queues == 0 || s.info.maxIOBytes > maxMaxIOBytes:
		return kind.Errorf(kind.Unsupported, "ublk: recover device %d: %d queues of %d requests of %d bytes", id, s.info.queues, s.info.depth, s.info.maxIOBytes)
	}
	p, err := c.params(id)
	if err != nil {
		return err
	}
	if size := s.o.Device.SizeBytes(); p.basic.devSectors != uint64(size>>sectorShift) {
		return kind.Errorf(kind.Corrupt, "ublk: recover device %d: it has %d bytes, and what should be behind it %d", id, p.basic.devSectors<<sectorShift, size)
	}
	return nil
}

// startRecovery has the kernel forget the last server.
//
// The order of a recovery matters, for processes killed in the midst of one. Killed
// after this, before a command waits in the kernel: the next START_USER_RECOVERY is
// refused with EINVAL, because it was done, and the next process goes on from there.
// That needs that nothing was mapped, because the kernel remembers who mapped first and
// refuses others; so queues map last. Killed after the commands: the kernel starts over.
func (s *Server) startRecovery(ctx context.Context, c *control) error {
	for pause := minRecoverPause; ; pause = min(2*pause, maxRecoverPause) {
		err := c.do(cmdStartRecovery, s.info.id, nil, 0, 0)
		if err == nil {
			return nil
		}
		if errors.Is(err, unix.EINVAL) {
			now, infoErr := c.info(s.info.id)
			if infoErr == nil && now.state == Quiesced {
				return nil
			}
		}
		if !errors.Is(err, unix.EBUSY) {
			return explain(err, "recover device", s.info.id)
		}
		select {
		case <-ctx.Done():
			return kind.Errorf(kind.InUse, "ublk: recover device %d: its last server is not gone: %w", s.info.id, context.Cause(ctx))
		case <-time.After(pause):
		}
	}
}
