package target

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"sync"
	"syscall"

	"github.com/google/uuid"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/lvol"
	"github.com/thaw-project/thaw/target/bdev"
	"github.com/thaw-project/thaw/target/rpc"
)

// A shallow copy copies the clusters that a read-only lvol holds itself to the same
// places of another disk.

// maxCopies bounds the copies under way and those whose outcome nobody asked for. The
// oldest of the latter is forgotten for a new one.
const maxCopies = 256

type copying struct {
	id uint32

	mu            sync.Mutex
	copied, total int64 // guarded by mu, as are all below
	done          bool
	err           error
}

func (t *Target) startCopy(params json.RawMessage) (any, error) {
	var p struct {
		Source string `json:"src_lvol_name"`
		Target string `json:"dst_bdev_name"`
	}
	if err := decode(params, &p); err != nil {
		return nil, err
	}
	src, l, err := t.findLvol(p.Source)
	if err != nil {
		return nil, err
	}
	dst := t.lookup(p.Target)
	i := l.info()
	switch {
	case dst == nil:
		err = rpc.Errno(syscall.ENODEV, kind.Errorf(kind.NotFound, "no bdev %.160q", p.Target))
	case !i.ReadOnly:
		err = rpc.Errno(syscall.EPERM, kind.Errorf(kind.Invalid, "lvol %s is not read-only", i.Name))
	case dst.driver.sizeBytes() < i.SizeBytes:
		err = rpc.Errno(syscall.EINVAL, kind.Errorf(kind.Invalid, "bdev %s has %d bytes, lvol %s %d", dst.name, dst.driver.sizeBytes(), i.Name, i.SizeBytes))
	case i.ClusterBytes%int64(dst.blockBytes) != 0:
		err = rpc.Errno(syscall.EINVAL, kind.Errorf(kind.Invalid, "cluster of %d bytes is no multiple of the block of bdev %s", i.ClusterBytes, dst.name))
	case !t.roomForCopy():
		err = rpc.Errno(syscall.EBUSY, kind.Errorf(kind.NoSpace, "%d copies are under way", maxCopies))
	}
	if err != nil {
		return nil, invalidOf(err)
	}
	ctx, cancel := context.WithCancel(t.ctx)
	from := &lease{what: "shallow copy", own: true, evict: func(bool) { cancel() }}
	into := &lease{what: "shallow copy of " + i.Name, claim: exclusiveWrite, write: true, evict: func(bool) { cancel() }}
	if err := t.acquire(src, from); err != nil {
		cancel()
		return nil, invalidOf(err)
	}
	if err := t.acquire(dst, into); err != nil {
		cancel()
		from.release()
		return nil, invalidOf(err)
	}
	t.copySeq++
	c := &copying{id: t.copySeq, total: i.AllocatedClusters}
	t.copies[c.id] = c
	t.wg.Add(1)
	go func() {
		defer t.wg.Done()
		err := c.run(ctx, l.s.store, i, from.dev, into.dev)
		if err == nil {
			err = into.dev.Flush()
		}
		cancel()
		into.release()
		from.release()
		c.mu.Lock()
		c.done, c.err = true, err
		c.mu.Unlock()
		if err != nil {
			t.log.Error("shallow copy failed", "lvol", i.Name, "into", dst.name, "err", err)
		}
	}()
	return struct {
		ID uint32 `json:"operation_id"`
	}{c.id}, nil
}

// roomForCopy makes room for one more copy by forgetting an old one that ended.
func (t *Target) roomForCopy() bool {
	if len(t.copies) < maxCopies {
		return true
	}
	oldest := uint32(0)
	for id, c := range t.copies {
		c.mu.Lock()
		if c.done && (oldest == 0 || id < oldest) {
			oldest = id
		}
		c.mu.Unlock()
	}
	delete(t.copies, oldest)
	return oldest != 0
}

// run copies, part by part of the map.
func (c *copying) run(ctx context.Context, store *lvol.Store, i lvol.Info, src, dst bdev.Device) error {
	self, err := uuid.Parse(i.UUID)
	if err != nil {
		return err
	}
	if !i.Snapshot {
		self = uuid.Nil // a map names snapshots only; what has no name is the lvol's own
	}
	buf := make([]byte, i.ClusterBytes)
	for at := int64(0); at < i.SizeBytes; {
		m, err := store.Map(i.Name, at, 0)
		if err != nil {
			return err
		}
		for _, r := range m.Runs {
			switch {
			case r.Data && r.Owner == [16]byte(self):
				err = c.copyRun(ctx, src, dst, r, buf)
			case !r.Data:
				err = zeroRun(ctx, src, dst, r)
			}
			if err != nil {
				return err
			}
		}
		at = m.NextBytes
	}
	return nil
}

func (c *copying) copyRun(ctx context.Context, src, dst bdev.Device, r lvol.Run, buf []byte) error {
	for off, end := r.OffsetBytes, r.OffsetBytes+r.LengthBytes; off < end; off += int64(len(buf)) {
		if ctx.Err() != nil {
			return kind.Wrap(kind.Canceled, context.Cause(ctx))
		}
		p := buf[:min(int64(len(buf)), end-off)]
		if n, err := src.ReadAt(p, off); n < len(p) || err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		if _, err := dst.WriteAt(p, off); err != nil {
			return err
		}
		c.mu.Lock()
		c.copied++
		c.mu.Unlock()
	}
	return nil
}

// zeroRun writes zeros where the lvol, or one below, zeroed what another has: there the
// disk may show something.
func zeroRun(ctx context.Context, src, dst bdev.Device, r lvol.Run) error {
	m, ok := src.(interface {
		Covered(offset, lengthBytes int64) (int64, bool, error)
	})
	if !ok {
		return nil
	}
	for off, end := r.OffsetBytes, r.OffsetBytes+r.LengthBytes; off < end; {
		if ctx.Err() != nil {
			return kind.Wrap(kind.Canceled, context.Cause(ctx))
		}
		n, covered, err := m.Covered(off, end-off)
		if err == nil && covered {
			err = dst.WriteZeroes(off, n)
		}
		if err != nil {
			return err
		}
		off += n
	}
	return nil
}

func (t *Target) checkCopy(params json.RawMessage) (any, error) {
	var p struct {
		ID uint32 `json:"operation_id"`
	}
	if err := decode(params, &p); err != nil {
		return nil, err
	}
	c := t.copies[p.ID]
	if c == nil {
		return nil, rpc.Errno(syscall.ENODEV, kind.Errorf(kind.NotFound, "no shallow copy %d, or its end was told already", p.ID))
	}
	type info struct {
		Copied int64  `json:"copied_clusters"`
		Total  int64  `json:"total_clusters"`
		State  string `json:"state"`
		Error  string `json:"error,omitempty"`
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	i := info{c.copied, c.total, "in progress", ""}
	if c.done {
		delete(t.copies, p.ID)
		i.State = "complete"
		if c.err != nil {
			i.State, i.Error = "error", rpc.Strerror(kind.Errno(c.err))
		}
	}
	return i, nil
}
