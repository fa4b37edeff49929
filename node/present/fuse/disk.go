package fuse

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/moby/sys/mountinfo"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/node/present"
	"github.com/thaw-project/thaw/target/bdev"
)

// disk is one file of the mount.
type disk struct {
	present.Disk
	node     uint64
	unixTime int64
	p        *Presenter

	leaving atomic.Bool // Withdraw is at work: no new opens

	// mu is held shared while the device is used, exclusively while it is opened
	// or closed.
	mu      sync.RWMutex
	device  bdev.Device   // guarded by mu: nil until a request needs it after a take-over
	closed  bool          // guarded by mu
	failed  error         // guarded by mu: why the last attempt to open failed
	retryAt time.Time     // guarded by mu
	backoff time.Duration // guarded by mu

	lastLog atomic.Int64 // Unix time of the last line about a failed request
}

// Bounds of the pause between attempts to open a device that fails: short enough
// that a store which is just starting is a hiccup, long enough that one which is
// broken costs nothing.
const (
	minBackoff = 10 * time.Millisecond
	maxBackoff = 5 * time.Second
)

func newDisk(p *Presenter, s stateDisk) *disk {
	return &disk{Disk: s.Disk, node: s.Node, unixTime: s.UnixTime, p: p}
}

// acquire returns the device, opening it if need be. The caller calls d.mu.RUnlock
// when it no longer uses it, unless there is an error.
func (d *disk) acquire() (bdev.Device, error) {
	for {
		d.mu.RLock()
		if d.device != nil {
			return d.device, nil
		}
		closed := d.closed
		d.mu.RUnlock()
		if closed {
			return nil, kind.Errorf(kind.IO, "%s is withdrawn", d.ID)
		}
		if err := d.open(); err != nil {
			return nil, err
		}
	}
}

// open opens the device, at most one attempt at a time, and not again too soon
// after one that failed.
func (d *disk) open() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.device != nil || d.closed {
		return nil
	}
	if time.Now().Before(d.retryAt) {
		return d.failed
	}
	device, err := d.p.options.Open(d.Source, d.ReadOnly)
	if err == nil && device.SizeBytes() != d.SizeBytes {
		err = errors.Join(kind.Errorf(kind.Corrupt, "it has %d bytes, and had %d", device.SizeBytes(), d.SizeBytes), device.Close())
	}
	if err != nil {
		d.backoff = min(max(2*d.backoff, minBackoff), maxBackoff)
		d.retryAt = time.Now().Add(d.backoff)
		// What the cause means to its own caller means nothing to whoever reads
		// or writes the file: to him the device failed.
		d.failed = kind.Errorf(kind.IO, "open %s: %v", d.ID, err)
		d.p.log.Error("fuse: disk cannot be opened again", "disk", d.ID, "retry_in", d.backoff, "error", err)
		return d.failed
	}
	d.device, d.failed, d.backoff = device, nil, 0
	return nil
}

// close waits for the requests at work and closes the device, after a flush if
// asked; the disk cannot be used afterwards. A disk taken over and not used since
// is opened for the flush: our predecessor may have left something unflushed.
func (d *disk) close(flush bool) error {
	var errs []error
	if flush {
		device, err := d.acquire()
		if err == nil {
			err = device.Flush()
			d.mu.RUnlock()
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("flush: %w", err))
		}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.device != nil {
		if err := d.device.Close(); err != nil {
			errs = append(errs, fmt.Errorf("close: %w", err))
		}
	}
	d.device, d.closed = nil, true
	return errors.Join(errs...)
}

func (d *disk) attributes() attributes {
	a := attributes{node: d.node, sizeBytes: d.SizeBytes, mode: 0o100600, unixTime: d.unixTime}
	if d.ReadOnly {
		a.mode = 0o100400
	}
	return a
}

// openFlags decides about the kernel's page cache, by measurement. What is read-only
// may be cached and stay so; a mount that has a cache of its own asks for direct I/O
// by itself (EROFS with directio, loop devices). What is written is not cached: the
// kernel would write through its cache, page by page and one writer at a time, and
// the file system or converter above reads little of what it wrote.
//
// A close must not wait for us (FLUSH): it also happens in a process that is killed
// or that executes another program, and one that waits there cannot end, and holds
// locks of the kernel which even ps needs.
func (d *disk) openFlags() uint32 {
	if d.ReadOnly {
		return openKeepCache | openNoFlush
	}
	return openDirectIO | openParallelDirectWrites | openNoFlush
}

// findUser looks in what the kernel tells in /proc and /sys for somebody who has
// the file at path open, and names one. It does not touch the file.
func findUser(path string) (string, error) {
	loops, _ := filepath.Glob("/sys/block/loop*/loop/backing_file")
	for _, l := range loops {
		if raw, err := os.ReadFile(l); err == nil && strings.TrimSuffix(string(raw), "\n") == path {
			return "/dev/" + filepath.Base(filepath.Dir(filepath.Dir(l))), nil
		}
	}
	mounts, err := mountinfo.GetMounts(func(i *mountinfo.Info) (skip, stop bool) { return i.Source != path, false })
	if err != nil {
		return "", err
	}
	if len(mounts) > 0 {
		return "mount on " + mounts[0].Mountpoint, nil
	}
	processes, err := os.ReadDir("/proc")
	if err != nil {
		return "", err
	}
	for _, process := range processes {
		if process.Name()[0] < '0' || process.Name()[0] > '9' {
			continue
		}
		dir := filepath.Join("/proc", process.Name())
		fds, _ := os.ReadDir(dir + "/fd") // it may have ended
		for _, fd := range fds {
			if to, err := os.Readlink(dir + "/fd/" + fd.Name()); err == nil && to == path {
				return "process " + process.Name(), nil
			}
		}
		if maps, err := os.ReadFile(dir + "/maps"); err == nil && strings.Contains(string(maps), " "+path+"\n") {
			return "process " + process.Name(), nil
		}
	}
	return "", nil
}
