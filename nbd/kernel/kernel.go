package kernel

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"time"

	"github.com/mdlayher/genetlink"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/thaw-project/thaw/kind"
)

// answerWait bounds a call: the kernel does its work inside of our sendmsg.
const answerWait = 30 * time.Second

// modprobeWait bounds loading the module.
const modprobeWait = 30 * time.Second

// Load makes sure that the kernel has nbd, loading the module if need be. It is
// kind.Unsupported when there is none, and kind.Denied without CAP_SYS_ADMIN.
func Load(ctx context.Context) error {
	err := Probe()
	if !errors.Is(err, kind.Unsupported) {
		return err
	}
	if os.Geteuid() != 0 {
		return kind.Errorf(kind.Denied, "load the nbd module: only root may: run as root, or modprobe nbd")
	}
	ctx, cancel := context.WithTimeout(ctx, modprobeWait)
	defer cancel()
	// Devices are made as they are needed, and nobody shall look for partitions in
	// what others wrote.
	out, merr := exec.CommandContext(ctx, "modprobe", "nbd", "nbds_max=0", "max_part=0").CombinedOutput()
	if merr != nil {
		return kind.Errorf(kind.Unsupported, "%w; modprobe nbd: %w %.200s", err, merr, bytes.TrimSpace(out))
	}
	return Probe()
}

// Probe tells whether nbd can be used now: nil, kind.Unsupported when the kernel does not
// offer it here, or kind.Denied.
func Probe() error {
	if !hasSysAdmin() {
		return kind.Errorf(kind.Denied, "nbd needs CAP_SYS_ADMIN: run as root")
	}
	conn, _, err := dial()
	if err != nil {
		return err
	}
	return conn.Close()
}

func hasSysAdmin() bool {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	return unix.Capget(&header, &data[0]) == nil && data[0].Effective&(1<<unix.CAP_SYS_ADMIN) != 0
}

// dial opens a socket for one call. The family is looked up each time, because its number
// changes with the module.
func dial() (*genetlink.Conn, genetlink.Family, error) {
	conn, err := genetlink.Dial(nil)
	if err != nil {
		return nil, genetlink.Family{}, fmt.Errorf("open generic netlink: %w", err)
	}
	err = conn.SetDeadline(time.Now().Add(answerWait))
	var family genetlink.Family
	if err == nil {
		family, err = conn.GetFamily(familyName)
	}
	if err != nil {
		conn.Close()
		if errors.Is(err, os.ErrNotExist) {
			err = kind.Errorf(kind.Unsupported, "the kernel has no nbd here: modprobe nbd, and use it in the initial network namespace")
		}
		return nil, genetlink.Family{}, err
	}
	return conn, family, nil
}

// call sends one command. One that has a reply is not acknowledged besides.
func call(command uint8, data []byte, reply bool) ([]genetlink.Message, error) {
	conn, family, err := dial()
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	flags := netlink.Request
	if !reply {
		flags |= netlink.Acknowledge
	}
	return conn.Execute(genetlink.Message{Header: genetlink.Header{Command: command, Version: version}, Data: data}, family.ID, flags)
}

// Connect makes a device of a free index, which is usable when it returns.
func Connect(c Config) (index uint32, err error) {
	data, err := c.encode(nil)
	if err != nil {
		return 0, fmt.Errorf("connect nbd device: %w", err)
	}
	replies, err := call(cmdConnect, data, true)
	if err != nil {
		return 0, fmt.Errorf("connect nbd device: %w", err)
	}
	for _, m := range replies {
		if m.Header.Command == cmdConnect {
			if index, err = decodeIndex(m.Data); err != nil {
				return 0, fmt.Errorf("connect nbd device: %w", err)
			}
			return index, nil
		}
	}
	return 0, kind.Errorf(kind.Unsupported, "connect nbd device: the kernel did not say which")
}

// Reconfigure gives a device sockets in place of dead ones, and c's timeouts. When no
// connection of it is dead, the kernel drops the sockets and says nothing: their other
// ends find out. It is kind.Invalid when the device is not connected or has another Backend.
func Reconfigure(index uint32, c Config) error {
	data, err := c.encode(&index)
	if err == nil {
		_, err = call(cmdReconfigure, data, false)
	}
	if err != nil {
		return fmt.Errorf("reconfigure nbd%d: %w", index, err)
	}
	return nil
}

// Disconnect takes a device from its connections: what is under way or comes later
// fails. It is free for others once its last user has closed it. A device that is not
// connected is no error.
func Disconnect(index uint32) error {
	data, err := encodeIndex(index)
	if err == nil {
		_, err = call(cmdDisconnect, data, false)
	}
	if err != nil {
		return fmt.Errorf("disconnect nbd%d: %w", index, err)
	}
	return nil
}

// List returns all devices the kernel has, in no particular order.
func List() ([]Status, error) {
	replies, err := call(cmdStatus, nil, true)
	if err != nil {
		return nil, fmt.Errorf("list nbd devices: %w", err)
	}
	var list []Status
	for _, m := range replies {
		if m.Header.Command != cmdStatus {
			continue
		}
		some, err := decodeStatus(m.Data)
		if err != nil {
			return nil, fmt.Errorf("list nbd devices: %w", err)
		}
		list = append(list, some...)
	}
	return list, nil
}

// LinkDead calls f with the index of each device that loses a connection, until ctx
// ends, then returns nil. The kernel may drop such messages when f is slow.
func LinkDead(ctx context.Context, f func(index uint32)) error {
	conn, family, err := dial()
	if err != nil {
		return fmt.Errorf("listen for dead nbd connections: %w", err)
	}
	defer conn.Close()
	joined := false
	for _, g := range family.Groups {
		if g.Name == familyGroup {
			if err := conn.JoinGroup(g.ID); err != nil {
				return fmt.Errorf("listen for dead nbd connections: %w", err)
			}
			joined = true
		}
	}
	if !joined {
		return kind.Errorf(kind.Unsupported, "listen for dead nbd connections: the kernel has no group %s", familyGroup)
	}
	if err := conn.SetDeadline(time.Time{}); err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	for {
		messages, _, err := conn.Receive()
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, unix.ENOBUFS):
			continue // some were lost
		case err != nil:
			return fmt.Errorf("listen for dead nbd connections: %w", err)
		}
		for _, m := range messages {
			if m.Header.Command != cmdLinkDead {
				continue
			}
			if index, err := decodeIndex(m.Data); err == nil {
				f(index)
			}
		}
	}
}
