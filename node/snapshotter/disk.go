package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/node/imagemgmt"
	"github.com/thaw-project/thaw/node/present"
)

const (
	diskPrefix = "disk/"
	diskFile   = "rw.qcow2"
	diskDir    = "rw" // mount point of a disk that this package mounts
)

// disk is the writable layer of snapshot id as a disk. What up makes of it depends on
// the record: a writable root file system is a block device for containerd to mount,
// a writable upper directory is mounted by us, a committed disk is mounted read-only.
type disk struct {
	s       *Snapshotter
	id      string
	backing imagemgmt.Block
}

func (d disk) key() string    { return diskPrefix + d.id }
func (d disk) diskID() string { return d.s.diskIDPrefix + d.id }

// layer is what image-mgmt makes the disk of; where that is a file, it lies in the
// snapshot's directory.
func (d disk) layer() imagemgmt.Layer {
	return imagemgmt.Layer{Block: d.backing, Path: filepath.Join(d.s.dir(d.id), diskFile)}
}

func (d disk) mnt() string { return filepath.Join(d.s.dir(d.id), diskDir) }

func (d disk) record(ctx context.Context) (info diskInfo, err error) {
	err = d.s.view(ctx, func(_ context.Context, r records) error {
		rec, err := r.get(d.id)
		if err == nil && rec.Form != formDisk {
			err = kind.Errorf(kind.NotFound, "snapshot %s has no writable disk", d.id)
		}
		if err == nil {
			info = *rec.Disk
		}
		return err
	})
	return info, err
}

func (d disk) up(ctx context.Context) (string, error) {
	info, err := d.record(ctx)
	if err != nil {
		return "", err
	}
	shown, err := d.s.o.Images.AttachWritable(ctx, d.layer(), d.diskID())
	if err != nil {
		return "", fmt.Errorf("attach disk of snapshot %s: %w", d.id, err)
	}
	d.s.o.step("disk attached")
	if info.Layout == layoutRoot && !info.Committed {
		return d.device(ctx, shown)
	}
	if err := os.Mkdir(d.mnt(), 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return "", fmt.Errorf("mount disk of snapshot %s: %w", d.id, err)
	}
	err = d.s.mountOnce(ctx, d.key(), shown, d.mnt(), func() error {
		if info.Committed {
			return d.s.mounter.Ext4ReadOnly(ctx, shown, d.mnt())
		}
		return d.s.mounter.Ext4(ctx, shown, d.mnt())
	})
	if err == nil && !info.Committed {
		err = d.s.mounter.OverlayDirs(ctx, d.mnt(), info.UID, info.GID)
	}
	if err != nil {
		return "", fmt.Errorf("mount disk of snapshot %s: %w", d.id, err)
	}
	d.s.o.step("disk mounted")
	return "", nil
}

func (d disk) device(ctx context.Context, shown present.Disk) (string, error) {
	if shown.Block {
		d.s.drives.put(d.id, shown.Path)
		return shown.Path, nil
	}
	device, err := d.s.mounter.AttachLoop(ctx, shown.Path)
	if err != nil {
		return "", fmt.Errorf("loop device for snapshot %s: %w", d.id, err)
	}
	d.s.o.step("loop attached")
	return device, nil
}

// down takes the disk away, whatever up made of it. A disk that somebody has mounted
// is kind.InUse and stays as it is.
func (d disk) down(ctx context.Context) error {
	if err := d.s.unmount(ctx, d.key(), d.mnt()); err != nil {
		return fmt.Errorf("unmount disk of snapshot %s: %w", d.id, err)
	}
	d.s.o.step("disk unmounted")
	if err := d.detachLoop(ctx); err != nil {
		return fmt.Errorf("snapshot %s: %w", d.id, err)
	}
	d.s.o.step("loop detached")
	if err := d.s.o.Images.DetachWritable(ctx, d.backing.Name, d.diskID()); err != nil {
		return fmt.Errorf("detach disk of snapshot %s: %w", d.id, err)
	}
	d.s.drives.drop(d.id)
	d.s.o.step("disk detached")
	return nil
}

// loop returns the loop device of the disk and the file it shows, "" without one. It
// is known by the last element of its file's path, the disk's id, which is unique.
func (d disk) loop() (device, file string, err error) {
	loops, err := d.s.mounter.Loops()
	for _, l := range loops {
		if filepath.Base(l.File) == d.diskID() {
			return l.Device, l.File, nil
		}
	}
	return "", "", err
}

// loopPatience is how long a loop device that is mounted nowhere may stay in use: it
// goes away a moment after its unmount, and udev may be looking at it.
const loopPatience = 2 * time.Second

// detachLoop detaches the disk's loop device, which nobody may have mounted, and
// waits until it is gone.
func (d disk) detachLoop(ctx context.Context) error {
	patience := time.NewTimer(loopPatience)
	defer patience.Stop()
	for {
		device, file, err := d.loop()
		if err != nil || device == "" {
			return err
		}
		at, err := d.s.mountsOf(device)
		if err != nil {
			return err
		}
		if len(at) > 0 {
			return kind.Errorf(kind.InUse, "%s is mounted at %s", device, at[0])
		}
		if err := d.s.mounter.DetachLoop(ctx, file); err != nil {
			return err
		}
		if device, _, err = d.loop(); err != nil || device == "" {
			return err
		}
		select {
		case <-time.After(10 * time.Millisecond):
		case <-patience.C:
			return kind.Errorf(kind.InUse, "%s is in use", device)
		case <-ctx.Done():
			return fmt.Errorf("wait for %s: %w", device, context.Cause(ctx))
		}
	}
}

// mountsOf lists where device is mounted.
func (s *Snapshotter) mountsOf(device string) (targets []string, err error) {
	mounts, err := s.mounter.Mounts("/")
	for _, m := range mounts {
		if m.Source == device {
			targets = append(targets, m.Target)
		}
	}
	return targets, err
}

// clean replays the journal that a crash may have left on the disk, by mounting it
// once: a committed disk is mounted without replay.
func (d disk) clean(ctx context.Context) error {
	if _, err := d.record(ctx); err != nil {
		return err
	}
	shown, err := d.s.o.Images.AttachWritable(ctx, d.layer(), d.diskID())
	if err != nil {
		return fmt.Errorf("attach disk of snapshot %s: %w", d.id, err)
	}
	device := shown.Path
	if !shown.Block {
		if device, _, err = d.loop(); err != nil {
			return err
		}
	}
	at, err := d.s.mountsOf(device)
	if err != nil {
		return err
	}
	for _, target := range at {
		if target != d.mnt() {
			return kind.Errorf(kind.InUse, "disk of snapshot %s is mounted at %s", d.id, target)
		}
	}
	if err := os.Mkdir(d.mnt(), 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("mount disk of snapshot %s: %w", d.id, err)
	}
	err = d.s.mountOnce(ctx, d.key(), shown, d.mnt(), func() error { return d.s.mounter.Ext4(ctx, shown, d.mnt()) })
	if err != nil {
		return fmt.Errorf("mount disk of snapshot %s: %w", d.id, err)
	}
	d.s.o.step("disk clean")
	return nil
}

// intact tells whether the device is still that of the disk.
func (d disk) intact(device string) bool {
	if device == "" {
		return isLiveMount(d.mnt())
	}
	if same, known := d.s.drives.same(d.id, device); known {
		return same
	}
	file, err := os.ReadFile("/sys/block/" + filepath.Base(device) + "/loop/backing_file")
	return err == nil && filepath.Base(strings.TrimSpace(string(file))) == d.diskID()
}

// drives remembers which block devices image-mgmt showed as disks. A name says little: a
// drive that went away and came back has another, and its name may be another drive's.
type drives struct {
	mu   sync.Mutex
	seqs map[string]string // guarded by mu: the kernel's number of the device, by snapshot
}

// sequence is the number that the kernel gives each disk once (Linux 5.15), "" without.
func sequence(device string) string {
	raw, err := os.ReadFile("/sys/class/block/" + filepath.Base(device) + "/diskseq")
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(raw))
}

func (d *drives) put(id, device string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.seqs == nil {
		d.seqs = map[string]string{}
	}
	d.seqs[id] = sequence(device)
}

func (d *drives) drop(id string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.seqs, id)
}

// same tells whether device is the one that was shown; known is false for a disk that was
// not shown as a block device.
func (d *drives) same(id, device string) (same, known bool) {
	d.mu.Lock()
	seq, known := d.seqs[id]
	d.mu.Unlock()
	_, err := os.Lstat(device)
	return err == nil && seq == sequence(device), known
}

// remove deletes the layer of a disk that is down, and what is in it.
func (d disk) remove(ctx context.Context) error {
	if err := d.s.o.Images.DeleteWritable(ctx, d.layer(), d.diskID()); err != nil {
		return fmt.Errorf("delete disk of snapshot %s: %w", d.id, err)
	}
	d.s.o.step("disk deleted")
	return nil
}

// usage is what the layer occupies; the files in it are not counted, for that would need a
// mount.
func (d disk) usage(ctx context.Context) (snapshots.Usage, error) {
	w, err := d.s.o.Images.StatWritable(ctx, d.layer(), d.diskID())
	if err != nil {
		return snapshots.Usage{}, fmt.Errorf("usage of snapshot %s: %w", d.id, err)
	}
	return snapshots.Usage{Size: w.AllocatedBytes, Inodes: w.Files}, nil
}
