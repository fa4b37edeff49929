package ublk

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/uring"
)

const (
	controlPath = "/dev/ublk-control"
	classDir    = "/sys/class/ublk-char"
)

// control is the driver's control device with a ring for commands. A command runs in
// a kernel thread and its caller waits, so each caller opens a control of its own; it
// costs some 100 us.
type control struct {
	fd   int
	ring *uring.Ring
	page []byte // arguments: mapped, because Go's stacks move
}

func openControl() (_ *control, err error) {
	c := &control{fd: -1}
	defer func() {
		if err != nil {
			c.close()
		}
	}()
	if c.fd, err = unix.Open(controlPath, unix.O_RDWR|unix.O_CLOEXEC, 0); err != nil {
		err = &os.PathError{Op: "open", Path: controlPath, Err: err}
		switch {
		case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENXIO):
			return nil, kind.Errorf(kind.Unsupported, "%w: load the module (modprobe ublk_drv) or use a kernel with CONFIG_BLK_DEV_UBLK", err)
		case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
			return nil, kind.Errorf(kind.Denied, "%w: run as root, with the device allowed", err)
		}
		return nil, err
	}
	if c.ring, err = uring.New(uring.Options{Entries: 2, BigEntries: true}); err != nil {
		return nil, err
	}
	if err = c.ring.Supports(uring.OpUringCmd); err != nil {
		return nil, err
	}
	c.page, err = unix.Mmap(-1, 0, os.Getpagesize(), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	return c, err
}

func (c *control) close() {
	if c.ring != nil {
		c.ring.Close()
	}
	if c.fd >= 0 {
		unix.Close(c.fd)
	}
	if c.page != nil {
		unix.Munmap(c.page)
	}
}

// withControl calls f with a control of its own.
func withControl(f func(c *control) error) error {
	c, err := openControl()
	if err != nil {
		return err
	}
	defer c.close()
	return f(c)
}

// do runs one command and returns the errno it ended with. arg is copied to the kernel
// and back; of a path in front of it (GET_DEV_INFO2), pathLen says how long it is.
func (c *control) do(op uint32, id uint32, arg []byte, pathLen int, data uint64) error {
	for {
		copy(c.page, arg)
		cmd := ctrlCmd{dev: id, queue: noQueue, len: uint16(len(arg)), data: data, pathLen: uint16(pathLen)}
		if len(arg) > 0 {
			cmd.addr = uint64(uintptr(unsafe.Pointer(&c.page[0])))
		}
		e := c.ring.BigSQE()
		if e == nil {
			return kind.Errorf(kind.IO, "the control ring is full")
		}
		e.Opcode, e.FD, e.Off = uring.OpUringCmd, int32(c.fd), uint64(op)
		raw := bytesOf(&cmd)
		copy(e.More[:], raw[copy(e.Cmd[:], raw):])
		if err := c.ring.Wait(0); err != nil {
			return err
		}
		done, _ := c.ring.Next()
		switch {
		case done.Res == -int32(unix.EINTR): // a signal came while it waited
			continue
		case done.Res < 0:
			return unix.Errno(-done.Res)
		}
		copy(arg, c.page)
		return nil
	}
}

func (c *control) features() (uint64, error) {
	arg := make([]byte, 8)
	if err := c.do(cmdGetFeatures, anyDevice, arg, 0, 0); err != nil {
		return 0, err
	}
	return *(*uint64)(unsafe.Pointer(&arg[0])), nil
}

func (c *control) add(info *devInfo) error {
	return explain(c.do(cmdAddDev, info.id, bytesOf(info), 0, 0), "add device", info.id)
}

func (c *control) info(id uint32) (devInfo, error) {
	// The command's second form takes the path of the character device in front and
	// so works for devices of ordinary users too.
	const pathBytes = 32
	arg := make([]byte, pathBytes+devInfoBytes)
	copy(arg, charPath(id))
	err := c.do(cmdGetDevInfo2, id, arg, pathBytes, 0)
	raw := arg[pathBytes:]
	if err != nil && !errors.Is(err, unix.ENODEV) {
		raw = make([]byte, devInfoBytes)
		err = c.do(cmdGetDevInfo, id, raw, 0, 0)
	}
	var info devInfo
	copy(bytesOf(&info), raw)
	return info, explain(err, "look at device", id)
}

func (c *control) params(id uint32) (params, error) {
	p := params{len: paramsBytes}
	err := c.do(cmdGetParams, id, bytesOf(&p)[:paramsBytes], 0, 0)
	return p, explain(err, "get parameters of device", id)
}

func (c *control) setParams(id uint32, p *params) error {
	p.len = paramsBytes
	return explain(c.do(cmdSetParams, id, bytesOf(p)[:paramsBytes], 0, 0), "set parameters of device", id)
}

func (c *control) simple(op uint32, id uint32, doing string, data uint64) error {
	return explain(c.do(op, id, nil, 0, data), doing, id)
}

// del deletes a device without waiting for those that have it open still.
func (c *control) del(id uint32) error {
	err := c.do(cmdDelDevAsync, id, nil, 0, 0)
	if errors.Is(err, unix.EOPNOTSUPP) { // before Linux 6.7
		err = c.do(cmdDelDev, id, nil, 0, 0)
	}
	if errors.Is(err, unix.ENODEV) {
		return nil
	}
	return explain(err, "delete device", id)
}

// explain gives the errno of a command a kind.
func explain(err error, doing string, id uint32) error {
	if err == nil {
		return nil
	}
	what := doing
	if id != anyDevice {
		what += " " + strconv.Itoa(int(id))
	}
	switch {
	case errors.Is(err, unix.ENODEV):
		return kind.Errorf(kind.NotFound, "ublk: %s: there is no such device", what)
	case errors.Is(err, unix.EEXIST):
		return kind.Errorf(kind.Exists, "ublk: %s: it is there already", what)
	case errors.Is(err, unix.EINVAL):
		return kind.Errorf(kind.Invalid, "ublk: %s: %w", what, err)
	}
	return fmt.Errorf("ublk: %s: %w", what, err)
}

func charPath(id uint32) string  { return "/dev/ublkc" + strconv.Itoa(int(id)) }
func blockPath(id uint32) string { return "/dev/ublkb" + strconv.Itoa(int(id)) }

// devices returns the ids of all devices of this machine.
func devices() ([]uint32, error) {
	entries, err := os.ReadDir(classDir)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	var ids []uint32
	for _, e := range entries {
		if id, err := strconv.ParseUint(strings.TrimPrefix(e.Name(), "ublkc"), 10, 32); err == nil {
			ids = append(ids, uint32(id))
		}
	}
	return ids, err
}
