// Package ext4 writes layers into an ext4 through the kernel: mkfs.ext4, a loop
// device, a mount that is nowhere in the file system tree, and containerd's own
// extraction, so that the tree is what containerd's overlayfs snapshotter makes.
//
// It needs root and must not run in the process that serves the disk. The package
// knows nothing of images or lvols. Everything it holds open ends with the
// process, if need be by SIGKILL: loop device and mount go away by themselves.
package ext4

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/pkg/archive"
	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"github.com/thaw-project/thaw/image/block"
	"github.com/thaw-project/thaw/image/filesystem"
	"github.com/thaw-project/thaw/image/layer"
	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/node/mount"
)

// features are those of the file system, each known to Linux 5.4 and older.
// metadata_csum finds damage. Left out: resize_inode and backup superblocks, which
// are spread over the disk and would each take a cluster of every lowest block;
// orphan_file and others that are newer.
const features = "none,has_journal,ext_attr,dir_index,filetype,extent,64bit,flex_bg,sparse_super2," +
	"large_file,huge_file,dir_nlink,extra_isize,metadata_csum"

const (
	blockBytes = 4096
	// loopGone bounds the wait for the kernel to let go of the disk.
	loopGone = 10 * time.Second
)

// Builder implements filesystem.Builder.
type Builder struct {
	// Mkfs is the path of mkfs.ext4; empty looks for it in PATH and, as root often
	// lacks them there, /sbin and /usr/sbin.
	Mkfs string
}

var _ filesystem.Builder = (*Builder)(nil)

// Format implements filesystem.Builder. It writes a few hundred KiB, whatever the
// size of the disk, which must read as zeros.
func (b *Builder) Format(ctx context.Context, disk *os.File, options filesystem.Options) error {
	mkfs, err := b.find()
	if err != nil {
		return err
	}
	args := arguments(options)
	// An empty lvol reads as zeros, so that nothing needs to be zeroed, now or by
	// the kernel later. Older mkfs.ext4 learns the same by discarding everything.
	message, err := run(ctx, mkfs, disk, append(args, "-E", extended(options, "assume_storage_prezeroed=1,nodiscard")))
	if err != nil && strings.Contains(message, "assume_storage_prezeroed") {
		message, err = run(ctx, mkfs, disk, append(args, "-E", extended(options, "discard")))
	}
	switch {
	case ctx.Err() != nil:
		return kind.Wrap(kind.Canceled, context.Cause(ctx))
	case err != nil && strings.Contains(message, "No space left"):
		return kind.Errorf(kind.NoSpace, "mkfs.ext4: %s", message)
	case err != nil:
		return fmt.Errorf("mkfs.ext4: %w: %s", err, message)
	}
	return nil
}

func (b *Builder) find() (string, error) {
	for _, name := range []string{b.Mkfs, "mkfs.ext4", "/sbin/mkfs.ext4", "/usr/sbin/mkfs.ext4"} {
		if name == "" {
			continue
		}
		if path, err := exec.LookPath(name); err == nil {
			return path, nil
		}
	}
	return "", kind.Errorf(kind.Unsupported, "mkfs.ext4 is not installed: install e2fsprogs, or convert with file system erofs")
}

// arguments depend on options only: the same block gets the same bytes.
func arguments(o filesystem.Options) []string {
	// A journal is for containers that write to the root file system, not for the
	// conversion. What it reserves costs nothing until it is used.
	journal := min(max(o.SizeBytes>>20/32, 4), 64)
	// Small images have small files, and unused inodes cost nothing either.
	bytesPerInode := 16384
	if o.SizeBytes < 32<<30 {
		bytesPerInode = 8192
	}
	return []string{
		"-q", "-F", "-b", strconv.Itoa(blockBytes), "-I", "256", "-i", strconv.Itoa(bytesPerInode), "-m", "0",
		"-e", "remount-ro", "-J", "size=" + strconv.FormatInt(journal, 10), "-O", features, "-G", "4096",
		"-U", uuid.UUID(o.UUID).String(),
	}
}

func extended(o filesystem.Options, zeros string) string {
	return "packed_meta_blocks=1,num_backup_sb=0,lazy_itable_init=1,lazy_journal_init=1,root_owner=0:0,hash_seed=" +
		uuid.UUID(o.UUID).String() + "," + zeros
}

// maxMessage bounds what is kept of a program's output.
const maxMessage = 4096

func run(ctx context.Context, mkfs string, disk *os.File, args []string) (string, error) {
	var output bytes.Buffer
	cmd := exec.CommandContext(ctx, mkfs, append(args, "/proc/self/fd/3")...)
	cmd.ExtraFiles = []*os.File{disk}
	cmd.Stdout, cmd.Stderr = &output, &output
	cmd.WaitDelay = time.Second
	// The time in the superblock, and no configuration of the machine's own.
	cmd.Env = []string{"E2FSPROGS_FAKE_TIME=1", "MKE2FS_CONFIG=/dev/null", "LC_ALL=C", "PATH=/usr/sbin:/usr/bin:/sbin:/bin"}
	err := cmd.Run()
	message := strings.Join(strings.Fields(output.String()), " ")
	if len(message) > maxMessage {
		message = message[:maxMessage]
	}
	return message, err
}

// Apply implements filesystem.Builder.
func (b *Builder) Apply(ctx context.Context, disk *os.File, options filesystem.Options, index int, tar io.Reader) error {
	filter, err := layer.NewFilter(layer.DefaultLimits(options.SizeBytes))
	if err != nil {
		return err
	}
	merged := options.Mode == block.ModeOverlaybd
	apply := []archive.ApplyOpt{archive.WithFilter(filter.Accept)}
	root := "/" + strconv.Itoa(index)
	var parents []string // nearest first: directories a layer leaves out are made like theirs
	switch {
	case merged && index == 0:
		root = "/"
	case merged:
		root, parents = staging, []string{"/"}
	default:
		for i := index - 1; i >= 0; i-- {
			parents = append(parents, "/"+strconv.Itoa(i))
		}
	}
	if index > 0 { // in the lowest layer there is nothing to hide, as in containerd
		apply = append(apply, archive.WithConvertWhiteout(archive.OverlayConvertWhiteout), archive.WithParents(parents))
	}
	return inside(ctx, disk, func() error {
		if index == 0 {
			// fsck makes it anew should it ever be needed. In a root file system it
			// would be an entry that the image does not have.
			if err := os.Remove("/lost+found"); err != nil && !errors.Is(err, os.ErrNotExist) {
				return err
			}
		}
		if root != "/" {
			if err := os.Mkdir(root, 0o755); err != nil {
				return err
			}
		}
		if _, err := archive.Apply(ctx, root, tar, apply...); err != nil || root != staging {
			return err
		}
		// The root of an overlay cannot be opaque: the mark has no meaning there.
		if err := merge(ctx, staging, "/"); err != nil {
			return fmt.Errorf("merge layer: %w", err)
		}
		return os.Remove(staging)
	})
}

// inside runs f with the file system on disk as its root directory, writes it out,
// and returns once the kernel has let go of disk.
func inside(ctx context.Context, disk *os.File, f func() error) (err error) {
	loop, err := mount.OpenLoop(disk.Name(), mount.LoopOptions{DirectIO: true, AutoClear: true})
	if err != nil {
		return err
	}
	defer func() {
		loop.Close()
		if gone := waitLoopGone(disk.Name()); err == nil {
			err = gone
		}
	}()
	// noload: no journal while we write. A block that was not written to its end is
	// thrown away, and a journal would cost the writes and stay in the block.
	// discard: what a layer deletes from the ones below gives its clusters back.
	root, err := mount.Ext4Detached(ctx, loop.Name(), mount.Ext4Options{
		Data: []string{"noload", "noinit_itable", "nobarrier", "noauto_da_alloc", "discard"},
	})
	if err != nil {
		return err
	}
	defer root.Close()
	if err := chroot(root, f); err != nil {
		return explain(ctx, err)
	}
	return nil
}

// explain gives errors of the extraction a kind.
func explain(ctx context.Context, err error) error {
	switch k := kind.Of(err); {
	case ctx.Err() != nil:
		return kind.Wrap(kind.Canceled, context.Cause(ctx))
	case k == kind.NoSpace:
		return kind.Errorf(kind.NoSpace, "write ext4: %w", err)
	case k != "":
		return err
	}
	// archive/tar and containerd's own complaints are about the stream.
	return kind.Errorf(kind.Corrupt, "extract layer: %w", err)
}

// waitLoopGone waits until no loop device shows path: only then may the disk be
// taken away.
func waitLoopGone(path string) error {
	for end := time.Now().Add(loopGone); ; time.Sleep(5 * time.Millisecond) {
		device, err := mount.FindLoop(path)
		if errors.Is(err, kind.NotFound) {
			return nil
		}
		if err != nil {
			return err
		}
		if time.Now().After(end) {
			return kind.Errorf(kind.InUse, "%s still shows %s after %s", device, path, loopGone)
		}
	}
}

// chroot runs f in a thread whose root directory is root, so that no name in a
// layer, whatever symbolic links it makes, leads anywhere else, and then writes out
// the file system.
func chroot(root *os.File, f func() error) error {
	result := make(chan error, 1)
	go func() {
		// A thread that has its own root is not given back: it ends with this
		// goroutine, which does not unlock it.
		runtime.LockOSThread()
		result <- inThread(root, f)
	}()
	return <-result
}

func inThread(root *os.File, f func() error) (err error) {
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return fmt.Errorf("unshare: %w", err)
	}
	before, err := unix.Open("/", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open /: %w", err)
	}
	defer unix.Close(before)
	if err := enter(int(root.Fd())); err != nil {
		return err
	}
	// The thread ends at some later time; the mount must not wait for that.
	defer func() {
		if lerr := enter(before); err == nil {
			err = lerr
		}
	}()
	unix.Umask(0)
	// Opened before the first write: syncfs reports the errors of writing back that
	// came after.
	whole, err := os.Open("/")
	if err != nil {
		return err
	}
	defer whole.Close()
	stop, err := writeEarly()
	if err != nil {
		return err
	}
	err = f()
	stop()
	if err != nil {
		return err
	}
	return mount.Syncfs(whole)
}

// writeBack is the pause between two rounds of writing out while a layer is extracted:
// long enough that the same metadata is seldom written twice.
const writeBack = 250 * time.Millisecond

// writeEarly begins to write out what is below the root directory of this thread,
// until the function it returns is called, which waits for the end of that. The kernel
// alone would begin after many seconds, so that all was written when everything was
// extracted, and neither processor nor disk had enough to do in the other half of the
// time. Errors are left to the Syncfs at the end, whose descriptor is another.
func writeEarly() (stop func(), err error) {
	whole, err := os.Open("/")
	if err != nil {
		return nil, err
	}
	end := make(chan struct{})
	var done sync.WaitGroup
	done.Go(func() {
		defer whole.Close()
		for {
			select {
			case <-end:
				return
			case <-time.After(writeBack):
			}
			if mount.Syncfs(whole) != nil {
				return
			}
		}
	})
	return func() { close(end); done.Wait() }, nil
}

func enter(fd int) error {
	if err := unix.Fchdir(fd); err != nil {
		return fmt.Errorf("change directory: %w", err)
	}
	if err := unix.Chroot("."); err != nil {
		return fmt.Errorf("change root directory: %w", err)
	}
	return nil
}
