package nvmesys

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Event is a message of the kernel about a device.
type Event struct {
	Action    string // add, remove, change
	Subsystem string
	Name      string // DEVNAME, as "nvme0n1"
}

// maxUeventBytes is the largest message (UEVENT_BUFFER_SIZE and its header).
const maxUeventBytes = 8192

// ParseEvent reads "add@/devices/...\0ACTION=add\0...".
func ParseEvent(b []byte) (e Event, ok bool) {
	if len(b) > maxUeventBytes {
		return e, false
	}
	header, rest, ok := bytes.Cut(b, []byte{0})
	if !ok || bytes.IndexByte(header, '@') < 0 {
		return e, false // udev's own messages begin with "libudev"
	}
	for field := range bytes.SplitSeq(rest, []byte{0}) {
		switch name, value, _ := strings.Cut(string(field), "="); name {
		case "ACTION":
			e.Action = value
		case "SUBSYSTEM":
			e.Subsystem = value
		case "DEVNAME":
			e.Name = value
		}
	}
	return e, e.Action != "" && e.Subsystem != ""
}

// NVMe tells whether something of NVMe came, went or changed.
func (e Event) NVMe() bool {
	switch e.Subsystem {
	case "nvme", "nvme-subsystem":
		return true
	case "block":
		return strings.HasPrefix(e.Name, "nvme")
	}
	return false
}

// ueventBufferBytes is the socket's buffer. A machine that starts a thousand disks sends
// some megabytes at once; what does not fit is told by ENOBUFS, and then all is looked at.
const ueventBufferBytes = 1 << 20

// Watch calls ready when no event can be missed any more, and changed for each event that
// wanted wants and when some may have been lost, until ctx ends; then it returns nil.
func Watch(ctx context.Context, wanted func(Event) bool, ready, changed func()) error {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_KOBJECT_UEVENT)
	if err != nil {
		return fmt.Errorf("listen for kernel events: %w", err)
	}
	f := os.NewFile(uintptr(fd), "uevent")
	defer f.Close()
	// Group 1 is the kernel's, 2 is udev's.
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: 1}); err != nil {
		return fmt.Errorf("listen for kernel events: %w", err)
	}
	if unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, ueventBufferBytes) != nil {
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, ueventBufferBytes)
	}
	raw, err := f.SyscallConn()
	if err != nil {
		return fmt.Errorf("listen for kernel events: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { f.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	ready()
	b := make([]byte, maxUeventBytes)
	for {
		var n int
		var from unix.Sockaddr
		var rerr error
		err := raw.Read(func(fd uintptr) bool {
			n, from, rerr = unix.Recvfrom(int(fd), b, unix.MSG_DONTWAIT)
			return rerr != unix.EAGAIN
		})
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil:
			return fmt.Errorf("listen for kernel events: %w", err)
		case errors.Is(rerr, unix.EINTR):
			continue
		case errors.Is(rerr, unix.ENOBUFS):
			changed()
			continue
		case rerr != nil:
			return fmt.Errorf("listen for kernel events: %w", rerr)
		}
		// Any process may send to this socket; only the kernel has number 0.
		if a, ok := from.(*unix.SockaddrNetlink); !ok || a.Pid != 0 {
			continue
		}
		if e, ok := ParseEvent(b[:n]); ok && wanted(e) {
			changed()
		}
	}
}

// News lets many wait for the next event.
type News struct {
	mu sync.Mutex
	ch chan struct{} // guarded by mu: closed by the next event
}

// Next returns what is closed by the next event. Who looks after calling it misses none.
func (n *News) Next() <-chan struct{} {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.ch == nil {
		n.ch = make(chan struct{})
	}
	return n.ch
}

// Tell says that there was an event.
func (n *News) Tell() {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.ch != nil {
		close(n.ch)
		n.ch = nil
	}
}
