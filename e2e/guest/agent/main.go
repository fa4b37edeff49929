// Command agent is the first process of a guest: it mounts the root file system, sets
// up devices and network, and then runs the commands that the driver sends over a
// virtio-serial port.
//
// It runs three times over. As /init of the initramfs it loads modules and changes to
// the real root; as process 1 there it reaps orphans; its child serves the driver.
package main

import (
	"fmt"
	"os"
	"os/exec"

	"golang.org/x/sys/unix"
)

func main() {
	var err error
	switch {
	case len(os.Args) > 1 && os.Args[1] == "init":
		err = reap()
	case len(os.Args) > 1 && os.Args[1] == "serve":
		err = serve()
	case os.Getpid() == 1:
		err = enterRoot()
	default:
		err = fmt.Errorf("agent is the init of a guest and does nothing else")
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "guest agent:", err)
	}
	if os.Getpid() == 1 {
		unix.Sync()
		// Never returns when it works; process 1 that returns panics the kernel.
		_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	}
	os.Exit(1)
}

// reap starts the server and collects every process that ends, until the server does.
func reap() error {
	c := exec.Command("/proc/self/exe", "serve")
	c.Stdout, c.Stderr = os.Stdout, os.Stderr
	if err := c.Start(); err != nil {
		return err
	}
	for {
		var status unix.WaitStatus
		pid, err := unix.Wait4(-1, &status, 0, nil)
		switch {
		case err == unix.EINTR:
		case err != nil:
			return fmt.Errorf("wait: %w", err)
		case pid == c.Process.Pid:
			return fmt.Errorf("the server ended: status %#x", status)
		}
	}
}
