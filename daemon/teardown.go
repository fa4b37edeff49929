package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/moby/sys/mountinfo"
	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sys/unix"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/node/mount"
	"github.com/thaw-project/thaw/node/present"
)

// teardownLoss is how long unmounting waits for a store that is away. Unmounting what is
// read-only needs no data, and of a writable layer only what it never read.
const teardownLoss = 10 * time.Second

// Teardown takes away what stopped processes of this machine left attached. It serves the
// disks itself meanwhile: a file system can be unmounted only while somebody answers for
// the disk it is on. Without force nothing is touched while a mount elsewhere uses
// it, and other things in use stop it where it meets them; with force they are cut
// off from their users, who get errors. keeperCommand is how each's keeper is started.
func Teardown(ctx context.Context, config Config, keeperCommand func(Config) ([]string, error), force bool, progress io.Writer) (err error) {
	all := config
	all.Process = ProcessServer
	whole := &Server{config: all, logger: slog.New(slog.DiscardHandler)}
	defer func() { err = errors.Join(err, whole.close()) }()
	if err := whole.lock(); err != nil {
		return err
	}
	for _, part := range config.left() {
		keeper, err := keeperCommand(part)
		if err != nil {
			return err
		}
		if err := teardown(ctx, part, keeper, force, progress); err != nil {
			return err
		}
	}
	return nil
}

// left are the processes that may have left something since the machine started, those whose
// disks are mounted first.
func (c *Config) left() []Config {
	as := func(p Process) Config {
		part := *c
		if err := part.As(p); err != nil {
			part.Roles = nil
		}
		return part
	}
	ran := func(part Config) bool {
		_, err := os.Stat(part.Paths().ProcessRunLock)
		return err == nil
	}
	first := as(ProcessServer)
	for _, p := range []Process{ProcessImages, ProcessSnapshots} {
		if part := as(p); ran(part) {
			first = part
			break
		}
	}
	list := []Config{first}
	if part := as(ProcessAttacher); ran(part) && part.Store() {
		list = append(list, part)
	}
	return list
}

func teardown(ctx context.Context, config Config, keeperCommand []string, force bool, progress io.Writer) (err error) {
	s := &Server{config: config, logger: slog.New(slog.DiscardHandler)}
	defer func() { err = errors.Join(err, s.close()) }()
	if config.Store() {
		if err := s.openStore(ctx, false); err != nil {
			return err
		}
	}
	if s.showsDisks() {
		// A store that is away must not make this wait for as long as containers would.
		s.config.Remote = slices.Clone(s.config.Remotes())
		for i := range s.config.Remote {
			s.config.Remote[i].LossTimeout = Duration(teardownLoss)
		}
		if err := s.openRemote(prometheus.NewRegistry()); err != nil {
			return err
		}
	}
	if err := s.startData(ctx, keeperCommand, prometheus.NewRegistry()); err != nil {
		return err
	}
	p := config.Paths()
	if !force {
		disks, err := s.shown(ctx)
		if err != nil {
			return err
		}
		target, err := usedBy(p, disks)
		if err != nil {
			return err
		}
		if target != "" {
			return kind.Errorf(kind.InUse, "%s is in use by what is mounted on %s: stop the container, or use --force", p.Dev, target)
		}
	}
	if config.Process != ProcessAttacher {
		if err := unmountAll(ctx, []string{p.Mounts, p.Snapshotter}, force, progress); err != nil {
			return err
		}
	}
	if s.closeData == nil {
		return nil
	}
	if err := detachLoops(ctx, p.Dev, progress); err != nil {
		return err
	}
	if err := s.teardownData(ctx); err != nil {
		return fmt.Errorf("%w: stop what uses it, or use --force", err)
	}
	fmt.Fprintln(progress, "unmounted", p.Dev)
	return s.exitKeeper(ctx)
}

// usedBy returns where something is mounted that needs a presented disk and is none of
// Thaw's own mounts, as a rule the root file system of a container; empty when there
// is nothing. It reads tables only: a path on a disk would be asked of this process.
func usedBy(p Paths, disks []present.Disk) (string, error) {
	mounts, err := mountinfo.GetMounts(nil)
	if err != nil {
		return "", fmt.Errorf("list mounts: %w", err)
	}
	type number struct{ major, minor int }
	own := []string{p.Mounts + "/", p.Snapshotter + "/", p.Dev + "/"}
	ours := func(path string) bool {
		return path == p.Dev || slices.ContainsFunc(own, func(dir string) bool { return strings.HasPrefix(path, dir) })
	}
	devices := map[string]bool{} // disks that are block devices
	for _, d := range disks {
		if d.Block && d.Path != "" {
			devices[d.Path] = true
		}
	}
	systems := map[number]bool{} // the file systems on our disks
	var roots []string           // and where they are
	for _, m := range mounts {
		if ours(m.Mountpoint) {
			systems[number{m.Major, m.Minor}] = true
			roots = append(roots, m.Mountpoint)
		}
	}
	for _, m := range mounts {
		if ours(m.Mountpoint) {
			continue
		}
		if systems[number{m.Major, m.Minor}] || devices[m.Source] || onPresentedLoop(m.Source, p.Dev) || m.FSType == "overlay" && overlayOn(m.VFSOptions, roots) {
			return m.Mountpoint, nil
		}
	}
	return "", nil
}

// onPresentedLoop tells whether device is a loop device on a file of dev.
func onPresentedLoop(device, dev string) bool {
	name, ok := strings.CutPrefix(device, "/dev/loop")
	if !ok {
		return false
	}
	backing, err := os.ReadFile("/sys/block/loop" + name + "/loop/backing_file")
	return err == nil && strings.HasPrefix(string(backing), dev+"/")
}

// overlayOn tells whether one of an overlay's directories lies below one of roots. A
// directory may be named through the link to a block that a snapshot has.
func overlayOn(options string, roots []string) bool {
	for option := range strings.SplitSeq(options, ",") {
		key, value, _ := strings.Cut(option, "=")
		switch strings.TrimSuffix(key, "+") {
		case "lowerdir", "upperdir":
		default:
			continue
		}
		for dir := range strings.SplitSeq(value, ":") {
			if before, after, found := strings.Cut(dir+"/", "/lower/"); found {
				if to, err := os.Readlink(before + "/lower"); err == nil {
					dir = filepath.Join(to, after)
				}
			}
			if slices.ContainsFunc(roots, func(root string) bool { return dir == root || strings.HasPrefix(dir, root+"/") }) {
				return true
			}
		}
	}
	return false
}

// unmountAll unmounts what is mounted under dirs, the newest first, since overlays
// lie on top of blocks.
func unmountAll(ctx context.Context, dirs []string, force bool, progress io.Writer) error {
	for _, dir := range dirs {
		mounts, err := mount.Mounts(dir)
		if err != nil {
			return err
		}
		for i := len(mounts) - 1; i >= 0; i-- {
			target := mounts[i].Target
			err := mount.Unmount(ctx, target)
			if err != nil && force {
				err = unix.Unmount(target, unix.MNT_DETACH)
			}
			if err != nil {
				return kind.Errorf(kind.InUse, "unmount %s: %w: stop the containers that use it, or use --force", target, err)
			}
			fmt.Fprintln(progress, "unmounted", target)
		}
	}
	return nil
}

// detachLoops detaches the loop devices on presented disks.
func detachLoops(ctx context.Context, dev string, progress io.Writer) error {
	files, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		return err
	}
	for _, file := range files {
		raw, err := os.ReadFile(file)
		backing := strings.TrimSpace(string(raw))
		if err != nil || !strings.HasPrefix(backing, dev+"/") {
			continue
		}
		if err := mount.DetachLoop(ctx, backing); err != nil {
			return err
		}
		fmt.Fprintln(progress, "detached", backing)
	}
	return nil
}
