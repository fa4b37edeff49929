package remote

import (
	"context"
	"fmt"

	"go.etcd.io/bbolt"
	"google.golang.org/protobuf/proto"

	attacherv1 "github.com/thaw-project/thaw/api/attacher/v1"
	"github.com/thaw-project/thaw/kind"
)

// Run is a part of a block whose clusters are alike.
type Run struct {
	OffsetBytes, LengthBytes int64
	// Data is false where the block reads as zeros.
	Data bool
	// Owner and an offset mean the same bytes for ever, in all blocks of a store. It is
	// zero for zeros and for data without an owner.
	Owner [16]byte
}

// The owners of runs in attacherv1.BlockRun.
const (
	runZeros   = 0
	runUnowned = 1
	runOwned   = 2
)

const (
	// maxRuns bounds the map of a block: of 64 KiB clusters, each another's, 64 GiB.
	maxRuns = 1 << 20
	// mapAlign is what runs are aligned to: no store's clusters are smaller.
	mapAlign = 4096
)

// fetchMap asks the store for the map of a block.
func (t *target) fetchMap(ctx context.Context, c attacherv1.NodeClient, block string, sizeBytes int64) (*attacherv1.BlockMap, error) {
	whole := &attacherv1.BlockMap{SizeBytes: sizeBytes}
	index := make(map[string]uint32)
	for at := int64(0); at < sizeBytes; {
		part, err := c.GetBlockMap(ctx, &attacherv1.GetBlockMapRequest{Block: block, OffsetBytes: at})
		if err != nil {
			return nil, err
		}
		if part.GetSizeBytes() != sizeBytes || part.GetNextBytes() <= at || len(whole.Runs)+len(part.GetRuns()) > maxRuns {
			return nil, kind.Errorf(kind.Corrupt, "part of the map at %d: of %d bytes, next %d, %d runs", at, part.GetSizeBytes(), part.GetNextBytes(), len(part.GetRuns()))
		}
		for _, r := range part.GetRuns() {
			owner := r.GetOwner()
			if owner >= runOwned {
				if int(owner-runOwned) >= len(part.GetOwners()) {
					return nil, kind.Errorf(kind.Corrupt, "run of owner %d of %d", owner-runOwned, len(part.GetOwners()))
				}
				id := string(part.GetOwners()[owner-runOwned])
				i, ok := index[id]
				if !ok {
					i = uint32(len(whole.Owners))
					index[id] = i
					whole.Owners = append(whole.Owners, []byte(id))
				}
				owner = runOwned + i
			}
			whole.Runs = append(whole.Runs, &attacherv1.BlockRun{LengthBytes: r.GetLengthBytes(), Owner: owner})
		}
		at = part.GetNextBytes()
	}
	_, err := runsOf(whole, sizeBytes)
	return whole, err
}

// runsOf checks a map and returns its runs.
func runsOf(m *attacherv1.BlockMap, sizeBytes int64) ([]Run, error) {
	owners := make([][16]byte, len(m.GetOwners()))
	for i, o := range m.GetOwners() {
		if copy(owners[i][:], o) != 16 || len(o) != 16 || owners[i] == [16]byte{} {
			return nil, kind.Errorf(kind.Corrupt, "owner %d of %d bytes", i, len(o))
		}
	}
	runs := make([]Run, 0, len(m.GetRuns()))
	at := int64(0)
	for _, r := range m.GetRuns() {
		run := Run{OffsetBytes: at, LengthBytes: r.GetLengthBytes(), Data: r.GetOwner() != runZeros}
		if run.LengthBytes <= 0 || run.LengthBytes > sizeBytes-at || (at+run.LengthBytes)%mapAlign != 0 && at+run.LengthBytes != sizeBytes {
			return nil, kind.Errorf(kind.Corrupt, "run of %d bytes at %d of %d", run.LengthBytes, at, sizeBytes)
		}
		if o := r.GetOwner(); o >= runOwned {
			if int(o-runOwned) >= len(owners) {
				return nil, kind.Errorf(kind.Corrupt, "run of owner %d of %d", o-runOwned, len(owners))
			}
			run.Owner = owners[o-runOwned]
		}
		runs = append(runs, run)
		at += run.LengthBytes
	}
	if at != sizeBytes {
		return nil, kind.Errorf(kind.Corrupt, "the map ends at %d of %d bytes", at, sizeBytes)
	}
	return runs, nil
}

// Map returns the map of an attached block, as it was when the block was attached: what
// it says stays true. It is kind.NotFound when there is none.
func (r *Remote) Map(targetName, block string) ([]Run, error) {
	rec, ok := r.record(targetName, block)
	if !ok {
		return nil, kind.Errorf(kind.NotFound, "block %s of target %s is not attached", block, targetName)
	}
	m := &attacherv1.BlockMap{}
	err := r.db.View(func(tx *bbolt.Tx) error {
		raw := tx.Bucket(mapsBucket).Get([]byte(key(targetName, block)))
		if raw == nil {
			return kind.Errorf(kind.NotFound, "block %s of target %s has no map", block, targetName)
		}
		return proto.Unmarshal(raw, m)
	})
	if err != nil {
		return nil, err
	}
	runs, err := runsOf(m, rec.SizeBytes)
	if err != nil {
		return nil, fmt.Errorf("map of block %s of target %s: %w", block, targetName, err)
	}
	return runs, nil
}
