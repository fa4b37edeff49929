package mount

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/thaw-project/thaw/filelock"
	"github.com/thaw-project/thaw/kind"
)

// LoopOptions says how a loop device is set up.
type LoopOptions struct {
	ReadOnly bool `json:"read_only"`
	// DirectIO makes the loop device bypass the page cache of its file, so that
	// data is cached once, by the file system above.
	DirectIO bool `json:"direct_io"`
	// AutoClear frees the device when its last user closes or unmounts it.
	AutoClear bool `json:"auto_clear"`
}

// AttachLoop returns a loop device, as "/dev/loop7", that shows the file at path.
// One that shows it already with the same access is returned again. With AutoClear
// somebody else must hold the device open, or it goes away at once; OpenLoop is
// what a process wants that holds it itself.
func AttachLoop(ctx context.Context, path string, options LoopOptions) (string, error) {
	resp, err := call(ctx, request{Op: opAttach, Path: path, Loop: options})
	return resp.Device, err
}

// OpenLoop is AttachLoop for a process that does not serve path itself: the device
// comes open, and with AutoClear it goes away when that and its other users close
// it, if need be by SIGKILL.
func OpenLoop(path string, options LoopOptions) (*os.File, error) {
	return attach(path, options)
}

// FindLoop returns the loop device that shows the file at path, or kind.NotFound.
func FindLoop(path string) (string, error) {
	device, _, err := findLoop(path)
	return device, err
}

// DetachLoop frees the loop device that shows the file at path; none is no error.
// One that is in use goes away with its last user.
func DetachLoop(ctx context.Context, path string) error {
	_, err := call(ctx, request{Op: opDetach, Path: path})
	return err
}

const (
	loopRetries = 64 // other users of the machine race for the same free device

	// lockWait bounds the wait for another who mounts or attaches the same, and who may
	// himself have to wait for a server that starts.
	lockWait = 30 * time.Second
)

// Loop is an attached loop device.
type Loop struct {
	Device string // as "/dev/loop7"
	File   string // what it shows
}

// Loops lists the attached loop devices. It looks into sysfs, which answers without
// opening any device.
func Loops() ([]Loop, error) {
	var loops []Loop
	err := eachLoop(func(l Loop) bool {
		loops = append(loops, l)
		return true
	})
	return loops, err
}

// eachLoop calls f for the attached loop devices until it returns false. A machine may
// have hundreds, and each attach and detach of a disk looks through them, so it takes
// one system call for a free device and three for one in use; filepath.Glob, which
// lists every directory on the way, takes twenty.
func eachLoop(f func(Loop) bool) error {
	dir, err := os.Open("/sys/block")
	if err != nil {
		return fmt.Errorf("list loop devices: %w", err)
	}
	defer dir.Close()
	names, err := dir.Readdirnames(-1)
	if err != nil {
		return fmt.Errorf("list loop devices: %w", err)
	}
	for _, name := range names {
		if !strings.HasPrefix(name, "loop") {
			continue
		}
		backing, err := backingFile(name)
		if err != nil {
			continue // free, or detached meanwhile
		}
		if !f(Loop{Device: "/dev/" + name, File: backing}) {
			return nil
		}
	}
	return nil
}

func findLoop(path string) (device string, readOnly bool, err error) {
	path, err = filepath.Abs(path)
	if err != nil {
		return "", false, err
	}
	err = eachLoop(func(l Loop) bool {
		if l.File != path {
			return true
		}
		ro, err := readAttribute("/sys/block/" + filepath.Base(l.Device) + "/ro")
		if err != nil {
			return true // detached meanwhile
		}
		device, readOnly = l.Device, ro == "1"
		return false
	})
	if err == nil && device == "" {
		err = kind.Errorf(kind.NotFound, "%w for %s", errNoLoop, path)
	}
	return device, readOnly, err
}

// backingFile is the file a loop device shows.
func backingFile(device string) (string, error) {
	name := filepath.Base(device)
	if !strings.HasPrefix(name, "loop") {
		return "", kind.Errorf(kind.NotFound, "%s: %w", device, errNoLoop)
	}
	return readAttribute("/sys/block/" + name + "/loop/backing_file")
}

// readAttribute reads a file of sysfs, which is at most a page long, without its last
// newline. os.ReadFile would do, at three times the system calls.
func readAttribute(path string) (string, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", &os.PathError{Op: "open", Path: path, Err: err}
	}
	defer unix.Close(fd)
	var page [4096]byte
	n, err := unix.Read(fd, page[:])
	if err != nil {
		return "", &os.PathError{Op: "read", Path: path, Err: err}
	}
	return strings.TrimSuffix(string(page[:n]), "\n"), nil
}

// attach finds or sets up a loop device and returns it open.
func attach(path string, options LoopOptions) (*os.File, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return nil, err
	}
	mode := os.O_RDWR
	if options.ReadOnly {
		mode = os.O_RDONLY
	}
	file, err := os.OpenFile(path, mode, 0)
	if err != nil {
		return nil, fmt.Errorf("loop device: %w", err)
	}
	defer file.Close()
	// Two who attach the same file must get the same device, so from the look for one
	// to its setup the file is locked.
	if err := filelock.Exclusive(file, lockWait); err != nil {
		return nil, err
	}
	// Closing does not do it: the loop device keeps the same open file.
	defer unix.Flock(int(file.Fd()), unix.LOCK_UN)
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return nil, kind.Errorf(kind.Unsupported, "loop device: %w: load the module (modprobe loop) or use a kernel built with CONFIG_BLK_DEV_LOOP", err)
	}
	defer control.Close()
	for range loopRetries {
		if device, readOnly, err := findLoop(path); err == nil {
			loop, err := os.OpenFile(device, mode, 0)
			if err == nil {
				// It may have been cleared and reused since we looked, but not
				// any more now that we hold it open.
				if backing, err := backingFile(device); err == nil && backing == path {
					if readOnly != options.ReadOnly {
						loop.Close()
						return nil, kind.Errorf(kind.Exists, "%s shows %s with other access", device, path)
					}
					return loop, nil
				}
				loop.Close()
			} else if readOnly != options.ReadOnly {
				return nil, kind.Errorf(kind.Exists, "%s shows %s with other access", device, path)
			}
			continue
		}
		number, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return nil, fmt.Errorf("get a free loop device: %w", err)
		}
		loop, err := configure("/dev/loop"+strconv.Itoa(number), file, options)
		switch {
		case err == nil:
			return loop, nil
		case errors.Is(err, unix.EBUSY), errors.Is(err, unix.ENXIO), errors.Is(err, os.ErrNotExist):
			time.Sleep(time.Millisecond) // somebody else took it, or udev has not made it yet
		default:
			return nil, err
		}
	}
	return nil, kind.Errorf(kind.InUse, "no loop device for %s after %d attempts", path, loopRetries)
}

func configure(device string, file *os.File, options LoopOptions) (*os.File, error) {
	mode := os.O_RDWR
	config := unix.LoopConfig{Fd: uint32(file.Fd())}
	if options.ReadOnly {
		mode = os.O_RDONLY
		config.Info.Flags |= unix.LO_FLAGS_READ_ONLY
	}
	if options.DirectIO {
		config.Info.Flags |= unix.LO_FLAGS_DIRECT_IO
	}
	if options.AutoClear {
		config.Info.Flags |= unix.LO_FLAGS_AUTOCLEAR
	}
	copy(config.Info.File_name[:len(config.Info.File_name)-1], file.Name())
	loop, err := os.OpenFile(device, mode, 0)
	if err != nil {
		return nil, fmt.Errorf("open loop device: %w", err)
	}
	if err := unix.IoctlLoopConfigure(int(loop.Fd()), &config); err != nil {
		loop.Close()
		if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOTTY) {
			return nil, kind.Errorf(kind.Unsupported, "configure %s: %w: LOOP_CONFIGURE needs Linux 5.8", device, err)
		}
		return nil, fmt.Errorf("configure %s for %s: %w", device, file.Name(), err)
	}
	if config.Info.Flags&unix.LO_FLAGS_READ_ONLY == 0 {
		// Whoever had the number before may have set it read-only (blockdev --setro), which
		// outlives the file. Should this fail, the mount says what is wrong.
		_ = unix.IoctlSetPointerInt(int(loop.Fd()), unix.BLKROSET, 0)
	}
	return loop, nil
}

// detach clears the loop device of path, so that it goes away with its last user.
func detach(path string) error {
	for range loopRetries {
		device, _, err := findLoop(path)
		if errors.Is(err, kind.NotFound) {
			return nil
		}
		if err != nil {
			return err
		}
		loop, err := os.OpenFile(device, os.O_RDONLY, 0)
		if err != nil {
			continue // gone meanwhile
		}
		err = unix.IoctlSetInt(int(loop.Fd()), unix.LOOP_CLR_FD, 0)
		loop.Close()
		if err != nil && !errors.Is(err, unix.ENXIO) {
			return fmt.Errorf("detach %s from %s: %w", device, path, err)
		}
		if _, _, err := findLoop(path); errors.Is(err, kind.NotFound) {
			return nil
		}
		if err == nil {
			return nil // in use: its last user clears it
		}
	}
	return kind.Errorf(kind.InUse, "detach loop device of %s: still there after %d attempts", path, loopRetries)
}
