package attacher

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"google.golang.org/grpc/peer"

	attacherv1 "github.com/thaw-project/thaw/api/attacher/v1"
	"github.com/thaw-project/thaw/kind"
)

const (
	// MinScratchBytes is room for the file system's own structures and little else.
	MinScratchBytes = 64 << 20

	// MaxScratchBytes and MaxScratches bound what nodes can make the store keep.
	MaxScratchBytes = 16 << 40
	MaxScratches    = 16

	// scratchPrefix begins the names of scratch snapshots.
	scratchPrefix = "scratch-"

	// scratchOwner is the hold under which scratch lvols are made.
	scratchOwner = "thaw.scratch"

	// mkfsWait bounds mkfs.ext4, which takes well under a second.
	mkfsWait = 2 * time.Minute

	// scratchUUID is the same for all scratch file systems: they are told apart by
	// the disk they are on, and the same bytes everywhere are easier to reason about.
	scratchUUID = "5f9b4f0e-5b1e-5e3a-9d51-7a0b6f1c2d3e"
)

// ScratchName is the name of the scratch snapshot of a size.
func ScratchName(sizeBytes int64) string { return scratchPrefix + strconv.FormatInt(sizeBytes, 10) }

// Scratch makes, once for each size, a snapshot that holds an empty ext4 with
// directories "upper" and "work" (root's, mode 0755) in its root, and returns its
// name. Writable layers over read-only images start from it. A removed or interrupted
// one is made again; concurrent calls make one.
func (a *Attacher) Scratch(ctx context.Context, sizeBytes int64) (string, error) {
	if sizeBytes < MinScratchBytes || sizeBytes > MaxScratchBytes || sizeBytes%(1<<20) != 0 {
		return "", kind.Errorf(kind.Invalid, "scratch of %d bytes: must be a multiple of 1 MiB from %d to %d", sizeBytes, MinScratchBytes, int64(MaxScratchBytes))
	}
	name := ScratchName(sizeBytes)
	if err := a.enter(); err != nil {
		return "", err
	}
	defer a.calls.Done()
	// images' lock set has one other key, "": this one serialises the making.
	unlock, err := a.images.Lock(ctx, "scratch")
	if err != nil {
		return "", fmt.Errorf("wait for another scratch: %w", err)
	}
	defer unlock()
	if info, err := a.o.Lvols.Get(name); err == nil {
		if !info.Snapshot || info.SizeBytes != sizeBytes {
			return "", kind.Errorf(kind.Exists, "lvol %s is there and no scratch snapshot: delete or rename it", name)
		}
		return name, nil
	} else if !errors.Is(err, kind.NotFound) {
		return "", err
	}
	if n, err := a.scratches(); err != nil {
		return "", err
	} else if n >= MaxScratches {
		return "", kind.Errorf(kind.NoSpace, "scratch of %d bytes: there are scratches of %d other sizes, which is the most: delete one, or use its size", sizeBytes, n)
	}
	h, err := a.holds.Begin(ctx, scratchOwner, "")
	if err != nil {
		return "", err
	}
	err = a.makeScratch(ctx, name, sizeBytes)
	h.Leave(false) // deletes the work lvol, and its export if that is left
	select {
	case <-h.Gone():
	case <-a.life.Done():
	case <-ctx.Done():
	}
	if err != nil {
		return "", fmt.Errorf("make %s: %w", name, err)
	}
	return name, nil
}

// scratchSize returns the size that a scratch's name says; ok is false for other names.
func scratchSize(name string) (sizeBytes int64, ok bool) {
	digits, _ := strings.CutPrefix(name, scratchPrefix)
	sizeBytes, err := strconv.ParseInt(digits, 10, 64)
	return sizeBytes, err == nil && ScratchName(sizeBytes) == name
}

// scratches counts the scratches that there are.
func (a *Attacher) scratches() (n int, err error) {
	infos, err := a.o.Lvols.List()
	for _, i := range infos {
		if _, ok := scratchSize(i.Name); ok && i.Snapshot {
			n++
		}
	}
	return n, err
}

func (a *Attacher) makeScratch(ctx context.Context, name string, sizeBytes int64) error {
	work := name + ".new"
	// One left by a predecessor that was killed holds nobody knows what.
	if err := a.removeOneHeld(ctx, work, scratchOwner); err != nil {
		return err
	}
	if _, err := a.CreateLvol(ctx, &attacherv1.CreateLvolRequest{Name: work, SizeBytes: sizeBytes, Owner: scratchOwner}); err != nil {
		return err
	}
	// A node may have asked; who writes is this process, which has the lvol shown here.
	x, err := a.Export(peer.NewContext(ctx, &peer.Peer{}), &attacherv1.ExportRequest{Lvol: work, Owner: scratchOwner})
	if err != nil {
		return err
	}
	a.step("scratch: exported")
	if err := FormatScratch(ctx, x.GetPath()); err != nil {
		return err
	}
	a.step("scratch: formatted")
	_, err = a.SnapshotLvol(ctx, &attacherv1.SnapshotLvolRequest{Lvol: work, Snapshot: name})
	a.step("scratch: snapshot")
	return err
}

// FormatScratch makes the file system of a scratch volume in the file at path, which reads
// as zeros: an empty ext4 with directories "upper" and "work". Everything that its
// configuration file could decide is said, so that every machine makes the same:
// no reserved blocks, because a container's root is no system's; a small journal,
// because each container's layer gets one; nothing written that reads as zeros anyway.
func FormatScratch(ctx context.Context, path string) error {
	program, err := exec.LookPath("mkfs.ext4")
	if err != nil {
		// Root's PATH has sbin, a service's may not.
		if program, err = exec.LookPath("/usr/sbin/mkfs.ext4"); err != nil {
			return kind.Errorf(kind.Unsupported, "mkfs.ext4 is not installed: install e2fsprogs")
		}
	}
	tree, err := os.MkdirTemp("", "thaw-scratch-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tree)
	for _, dir := range []string{"upper", "work"} {
		if err := os.Mkdir(filepath.Join(tree, dir), 0o755); err != nil {
			return err
		}
		if err := os.Chmod(filepath.Join(tree, dir), 0o755); err != nil { // whatever the umask
			return err
		}
	}
	if err := os.Chmod(tree, 0o755); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, mkfsWait)
	defer cancel()
	run := func(zeroed string) error {
		cmd := exec.CommandContext(ctx, program, "-q", "-F", "-b", "4096", "-I", "256", "-i", "16384", "-m", "0", "-J", "size=16",
			"-U", scratchUUID, "-d", tree,
			"-O", "none,has_journal,ext_attr,dir_index,filetype,extent,64bit,flex_bg,sparse_super,large_file,huge_file,dir_nlink,extra_isize,metadata_csum",
			"-E", "nodiscard,root_owner=0:0,packed_meta_blocks=1,hash_seed="+scratchUUID+","+zeroed, path)
		cmd.Env = append(os.Environ(), "MKE2FS_CONFIG=/dev/null", "LC_ALL=C")
		if out, err := cmd.CombinedOutput(); err != nil {
			return kind.Errorf(kind.IO, "mkfs.ext4 %s: %w: %.300s", path, err, strings.TrimSpace(string(out)))
		}
		return nil
	}
	// A new lvol reads as zeros, so inode tables need no zeroing, now or by the kernel
	// after the mount. e2fsprogs before 1.47 cannot be told so.
	err = run("assume_storage_prezeroed=1")
	if err != nil && ctx.Err() == nil {
		if lazy := run("lazy_itable_init=1,lazy_journal_init=1"); lazy == nil {
			return nil
		}
	}
	return err
}

// EnsureScratch implements attacherv1.NodeServer.
func (a *Attacher) EnsureScratch(ctx context.Context, r *attacherv1.EnsureScratchRequest) (*attacherv1.EnsureScratchResponse, error) {
	name, err := a.Scratch(ctx, r.GetSizeBytes())
	if err != nil {
		return nil, err
	}
	return &attacherv1.EnsureScratchResponse{Block: name}, nil
}
