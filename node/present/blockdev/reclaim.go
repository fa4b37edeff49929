package blockdev

import (
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/thaw-project/thaw/kind"
)

// ServeThroughReclaim tells the kernel that this process serves block devices that can be
// written (PR_SET_IO_FLUSHER): when memory is short, its threads are not made to wait
// for dirty pages that only they can write. It holds for all threads and for programs
// started later. It is kind.Denied without CAP_SYS_RESOURCE, and kind.Unsupported before
// Linux 5.6 or in a program with cgo; the process serves all the same, with that risk.
func ServeThroughReclaim() error {
	_, _, errno := syscall.AllThreadsSyscall6(unix.SYS_PRCTL, unix.PR_SET_IO_FLUSHER, 1, 0, 0, 0, 0)
	switch errno {
	case 0:
		return nil
	case unix.EPERM:
		return kind.Errorf(kind.Denied, "serve through memory reclaim: CAP_SYS_RESOURCE is missing: %w", errno)
	}
	return kind.Errorf(kind.Unsupported, "serve through memory reclaim: %w", errno)
}
