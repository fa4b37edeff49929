// Package filelock takes locks that belong to open files (flock), with a little
// patience.
//
// A lock of a killed process is not gone with it: a child that the process was just
// starting holds copies of its descriptors until it executes its program. Who takes
// over from a killed process therefore waits a moment before it believes that another
// process is there.
//
// It must not know what the files are for.
package filelock

import (
	"errors"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/thaw-project/thaw/kind"
)

// Patience is how long to wait where nobody but a killed predecessor is expected to
// hold the lock.
const Patience = time.Second

const pause = 2 * time.Millisecond

// Exclusive locks f for this open file alone. It returns kind.InUse when somebody else
// still holds it after wait.
func Exclusive(f *os.File, wait time.Duration) error { return take(f, unix.LOCK_EX, wait) }

// Shared locks f against Exclusive; otherwise as Exclusive.
func Shared(f *os.File, wait time.Duration) error { return take(f, unix.LOCK_SH, wait) }

func take(f *os.File, how int, wait time.Duration) error {
	return Retry(wait, func() error {
		for {
			err := unix.Flock(int(f.Fd()), how|unix.LOCK_NB)
			switch err {
			case unix.EINTR:
				continue
			case unix.EWOULDBLOCK:
				return kind.Errorf(kind.InUse, "%s is locked by another process", f.Name())
			}
			return err
		}
	})
}

// Retry calls try until it returns anything but kind.InUse, for at most wait.
func Retry(wait time.Duration, try func() error) error {
	for deadline := time.Now().Add(wait); ; time.Sleep(pause) {
		if err := try(); !errors.Is(err, kind.InUse) || !time.Now().Before(deadline) {
			return err
		}
	}
}
