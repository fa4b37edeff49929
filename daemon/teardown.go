package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sys/unix"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/node/mount"
)

// Teardown takes away what a stopped server left attached. It serves the disks
// itself meanwhile: a file system can be unmounted only while somebody answers for
// the disk it is on. Without force the first thing in use stops it; with force it
// is cut off from its users, who get errors.
func Teardown(ctx context.Context, config Config, keeperCommand []string, force bool, progress io.Writer) (err error) {
	s := &Server{config: config, logger: slog.New(slog.DiscardHandler)}
	defer func() { err = errors.Join(err, s.close()) }()
	if err := s.lock(); err != nil {
		return err
	}
	if s.store, err = OpenPool(config, s.logger); err != nil {
		return err
	}
	s.onClose("pool", s.store.Close)
	if err := s.startData(ctx, keeperCommand, prometheus.NewRegistry()); err != nil {
		return err
	}
	p := config.Paths()
	if err := unmountAll(ctx, []string{p.Mounts, p.Snapshotter}, force, progress); err != nil {
		return err
	}
	if err := detachLoops(ctx, p.Dev, progress); err != nil {
		return err
	}
	if err := s.presenter.Teardown(ctx); err != nil {
		return err
	}
	s.presenter = nil
	fmt.Fprintln(progress, "unmounted", p.Dev)
	return s.keeper.Exit(ctx)
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
