package nvmesys

import (
	"bytes"
	"context"
	"errors"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestUevents(t *testing.T) {
	message := func(s ...string) []byte { return []byte(strings.Join(s, "\x00") + "\x00") }
	for _, c := range []struct {
		b         []byte
		want      Event
		ok, ofUse bool
	}{
		{message("add@/devices/virtual/nvme-subsystem/nvme-subsys0/nvme0n1", "ACTION=add", "SUBSYSTEM=block", "DEVNAME=nvme0n1", "DEVTYPE=disk"), Event{"add", "block", "nvme0n1"}, true, true},
		{message("change@/x", "ACTION=change", "SUBSYSTEM=nvme", "NVME_EVENT=connected"), Event{"change", "nvme", ""}, true, true},
		{message("add@/devices/loop0", "ACTION=add", "SUBSYSTEM=block", "DEVNAME=loop0"), Event{"add", "block", "loop0"}, true, false},
		{message("libudev", "\xfe\xed\xca\xfe", "ACTION=add"), Event{}, false, false},
		{message("add@/x"), Event{}, false, false},
		{nil, Event{}, false, false},
		{bytes.Repeat([]byte("x"), maxUeventBytes+1), Event{}, false, false},
	} {
		got, ok := ParseEvent(c.b)
		if ok != c.ok || ok && (got != c.want || got.NVMe() != c.ofUse) {
			t.Errorf("%.60q: %+v, %t", c.b, got, ok)
		}
	}
}

func FuzzUevent(f *testing.F) {
	f.Add([]byte("add@/x\x00ACTION=add\x00SUBSYSTEM=block\x00DEVNAME=nvme0n1\x00"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if e, ok := ParseEvent(b); ok && (e.Action == "" || e.Subsystem == "") {
			t.Errorf("%+v", e)
		}
	})
}

// TestWatch has the kernel send events about a device that is none of ours: they are
// received, told from ours, and the watch ends when it is told to.
func TestWatch(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	ready := make(chan struct{})
	ended := make(chan error, 1)
	go func() {
		ended <- Watch(ctx, Event.NVMe, func() { close(ready) }, func() { t.Error("an event about loop0 was taken for one of NVMe") })
	}()
	select {
	case <-ready:
	case err := <-ended:
		cancel()
		if !errors.Is(err, unix.EPERM) && !errors.Is(err, unix.EPROTONOSUPPORT) {
			t.Fatalf("watch the kernel's events: %v", err)
		}
		t.Skipf("this kernel or sandbox gives no netlink socket for kernel events, run it outside: %v", err)
	}
	if fd, err := unix.Open("/sys/block/loop0/uevent", unix.O_WRONLY|unix.O_CLOEXEC, 0); err == nil && os.Geteuid() == 0 {
		unix.Write(fd, []byte("change"))
		unix.Close(fd)
	}
	// Others may send to the socket as well; that is no event either.
	if fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, unix.NETLINK_KOBJECT_UEVENT); err == nil {
		unix.Sendto(fd, []byte("add@/x\x00ACTION=add\x00SUBSYSTEM=nvme\x00"), 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: 1})
		unix.Close(fd)
	}
	time.Sleep(20 * time.Millisecond)
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}
