package convert

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/google/uuid"

	attacherv1 "github.com/thaw-project/thaw/api/attacher/v1"
	"github.com/thaw-project/thaw/failpoint"
	"github.com/thaw-project/thaw/image/filesystem"
	"github.com/thaw-project/thaw/image/spool"
	"github.com/thaw-project/thaw/kind"
)

const (
	// pollFirst and pollMost bound the pauses while another converter writes a
	// block that we need.
	pollFirst = 100 * time.Millisecond
	pollMost  = 2 * time.Second
	// stalled is how long that block may not grow before we give up on it. A
	// converter that died is noticed by its hold; this is for one that hangs.
	stalled = 10 * time.Minute
)

// workName is the lvol in which a block is written.
func workName(name string) string {
	_, id, _ := strings.Cut(name, "-")
	return "work-" + id
}

func blockUUID(name string) [16]byte {
	_, id, _ := strings.Cut(name, "-")
	return uuid.MustParse(id) // a derived name always has one
}

// writeBlock makes the block of layer n, of which blob is the bytes.
func (c *conversion) writeBlock(ctx context.Context, i *image, n int, blob *spool.Blob, t *tracker, out *Layer) error {
	begin := time.Now()
	name, work := i.layers[n].block, workName(i.layers[n].block)
	below := ""
	if n > 0 {
		below = i.layers[n-1].block
	}
	reused, err := c.takeWork(ctx, name, work, below)
	if err != nil || reused {
		out.Reused = reused
		t.update(n, true, func(e *Event) {
			if reused {
				e.State = StateReused
			}
		})
		return err
	}
	defer func() {
		if err != nil {
			c.dropWork(ctx, work)
		}
	}()
	t.update(n, true, func(e *Event) { e.State = StateApplying })
	failpoint.Reach("convert.block: begun")
	if err = c.fillWork(ctx, i, n, work, blob, t); err != nil {
		return err
	}
	failpoint.Reach("convert.block: written")
	if _, err = call(ctx, c.store.client.SnapshotLvol, &attacherv1.SnapshotLvolRequest{Lvol: work, Snapshot: name}); err != nil {
		return fmt.Errorf("snapshot %s as %s: %w", work, name, err)
	}
	failpoint.Reach("convert.block: complete")
	if err = c.store.remove(ctx, work); err != nil {
		return fmt.Errorf("delete %s: %w", work, err)
	}
	failpoint.Reach("convert.block: work deleted")
	l, err := c.store.lvol(ctx, name)
	if err != nil {
		return err
	}
	out.WrittenBytes = l.GetAllocatedClusters() * l.GetClusterBytes()
	out.AppliedBytes = t.get(n).AppliedBytes
	out.Duration = time.Since(begin)
	t.update(n, true, func(e *Event) { e.State = StateWritten })
	return nil
}

// takeWork makes the empty lvol, or the clone of the block below, in which block
// name will be written. While another converter writes the same block it waits, and
// tells when that one finished it.
func (c *conversion) takeWork(ctx context.Context, name, work, below string) (finished bool, err error) {
	pause := pollFirst
	grown, since := int64(-1), time.Now()
	for {
		if finished, err = c.complete(ctx, name); finished || err != nil {
			return finished, err
		}
		l, err := c.store.lvol(ctx, work)
		if err != nil {
			return false, fmt.Errorf("look for %s: %w", work, err)
		}
		if l == nil || l.GetOwner() == "" || l.GetOwner() == c.store.owner {
			if l != nil {
				// Left by an attempt that ended in the middle.
				if err := c.store.unexport(ctx, work); err != nil {
					return false, fmt.Errorf("withdraw stale %s: %w", work, err)
				}
				if err := c.store.remove(ctx, work); err != nil {
					return false, fmt.Errorf("delete stale %s: %w", work, err)
				}
			}
			if err = c.makeWork(ctx, work, below); err == nil {
				// Another converter may have finished and deleted its work since
				// we looked.
				if finished, err = c.complete(ctx, name); finished || err != nil {
					c.dropWork(ctx, work)
				}
				return finished, err
			}
			if !errors.Is(err, kind.Exists) {
				return false, err
			}
			// Another converter was faster.
		} else if l.GetAllocatedClusters() != grown {
			grown, since = l.GetAllocatedClusters(), time.Now()
		}
		if time.Since(since) > stalled {
			return false, kind.Errorf(kind.InUse, "another conversion (%s) writes block %s and has not got on for %s: stop it", l.GetOwner(), name, stalled)
		}
		select {
		case <-ctx.Done():
			return false, kind.Wrap(kind.Canceled, context.Cause(ctx))
		case <-time.After(pause):
		}
		pause = min(2*pause, pollMost)
	}
}

func (c *conversion) makeWork(ctx context.Context, work, below string) error {
	if below == "" {
		_, err := owned(ctx, c.store.client.CreateLvol, &attacherv1.CreateLvolRequest{
			Name: work, SizeBytes: c.options.VirtualSizeBytes, Owner: c.store.owner,
		})
		if err != nil {
			return fmt.Errorf("create %s: %w", work, err)
		}
		return nil
	}
	_, err := owned(ctx, c.store.client.CloneLvol, &attacherv1.CloneLvolRequest{Snapshot: below, Name: work, Owner: c.store.owner})
	return cloneError(below, work, err)
}

// dropWork removes what a failed attempt wrote. The end of the hold would too.
func (c *conversion) dropWork(ctx context.Context, work string) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanup)
	defer cancel()
	err := c.store.unexport(ctx, work)
	if err == nil {
		err = c.store.remove(ctx, work)
	}
	if err != nil {
		c.options.Logger.Warn("unfinished block is left to the attacher to remove", "lvol", work, "error", err)
	}
}

// fillWork writes layer n into the lvol work, and returns nil only when every byte
// was what the manifest and the configuration say and is on its way to the disk.
func (c *conversion) fillWork(ctx context.Context, i *image, n int, work string, blob *spool.Blob, t *tracker) error {
	export, err := owned(ctx, c.store.client.Export, &attacherv1.ExportRequest{Lvol: work, Owner: c.store.owner})
	if err != nil {
		return fmt.Errorf("export %s: %w", work, err)
	}
	disk, err := os.OpenFile(export.GetPath(), os.O_RDWR, 0)
	if err != nil {
		return fmt.Errorf("open exported %s: %w", work, err)
	}
	failpoint.Reach("convert.block: disk open")
	err = advise(c.applyLayer(ctx, i, n, disk, blob, t))
	failpoint.Reach("convert.block: layer applied")
	if err == nil {
		err = c.explainWrite(disk.Sync())
	}
	if cerr := disk.Close(); err == nil {
		err = c.explainWrite(cerr)
	}
	if err != nil {
		return err
	}
	if err := c.store.unexport(ctx, work); err != nil {
		return fmt.Errorf("withdraw %s: %w", work, err)
	}
	return nil
}

// explainWrite names the store when it is full: the error comes from deep within a
// file system and says less.
func (c *conversion) explainWrite(err error) error {
	if kind.Of(err) == kind.NoSpace {
		return kind.Errorf(kind.NoSpace, "no space left for the block (%w): free some ('thaw image prune', 'thaw image remove') or enlarge the pool ('thaw lvol pool'); if the pool has room, choose a larger --virtual-size than %dMiB",
			err, c.options.VirtualSizeBytes>>20)
	}
	return err
}

func (c *conversion) applyLayer(ctx context.Context, i *image, n int, disk *os.File, blob *spool.Blob, t *tracker) error {
	l := i.layers[n]
	builder := c.options.Builders[c.options.Filesystem]
	options := filesystem.Options{Mode: c.options.Mode, SizeBytes: c.options.VirtualSizeBytes, UUID: blockUUID(l.block)}
	if n == 0 {
		if err := builder.Format(ctx, disk, options); err != nil {
			return c.explainWrite(fmt.Errorf("format %s: %w", c.options.Filesystem, err))
		}
	}
	stream := newLayerStream(ctx, func(ctx context.Context) io.Reader { return blob.NewReader(ctx) }, c.options.VirtualSizeBytes, func(applied int64) {
		t.update(n, false, func(e *Event) { e.AppliedBytes = applied })
	})
	defer stream.Close()
	err := builder.Apply(ctx, disk, options, n, stream)
	if cause := stream.cause(); cause != nil {
		// The builder saw a stream that ends early; the reason is further up. That
		// in turn may be bytes that are not the blob's.
		if verr := blob.Verified(ctx); verr != nil {
			return verr
		}
		return cause
	}
	if err != nil {
		if k := kind.Of(err); k == kind.Corrupt || k == kind.Invalid {
			// Bytes that are not the blob's explain a tar that makes no sense.
			if verr := blob.Verified(ctx); verr != nil {
				return verr
			}
		}
		return c.explainWrite(err)
	}
	got, err := stream.finish()
	if err != nil {
		return err
	}
	if err := blob.Verified(ctx); err != nil {
		return err
	}
	if got != l.diffID {
		return kind.Errorf(kind.Corrupt, "its content has diff id %s, the image configuration says %s", got, l.diffID)
	}
	return nil
}
