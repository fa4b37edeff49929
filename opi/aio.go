package opi

import (
	"context"
	"errors"

	opiv1 "github.com/opiproject/opi-api/storage/v1alpha1/gen/go"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/spdk"
)

func aioProto(v *spdk.Bdev) *opiv1.AioVolume {
	p := &opiv1.AioVolume{Name: join(aioVolumes, v.Name), BlockSize: int64(v.BlockSizeBytes), BlocksCount: int64(v.NumBlocks), Uuid: v.UUID}
	if v.Specific.AIO != nil {
		p.Filename = v.Specific.AIO.Filename
	}
	return p
}

// CreateAioVolume makes a volume of a file on the target's machine. The file says how
// large it is: a blocks_count that is not 0 must be that, or the volume is deleted again.
func (b *Bridge) CreateAioVolume(ctx context.Context, r *opiv1.CreateAioVolumeRequest) (*opiv1.AioVolume, error) {
	want := r.GetAioVolume()
	if err := blocks(want.GetBlockSize(), want.GetBlocksCount(), want.GetUuid()); err != nil {
		return nil, err
	}
	if want.GetFilename() == "" || len(want.GetFilename()) > 4095 {
		return nil, kind.Errorf(kind.Invalid, "filename: must be 1 to 4095 bytes")
	}
	made := false
	v, err := aioKind.create(ctx, b, r.GetAioVolumeId(), func(v *spdk.Bdev) error {
		name := join(aioVolumes, v.Name)
		if v.Specific.AIO == nil || v.Specific.AIO.Filename != want.Filename {
			return differs(name, "filename", aioProto(v).Filename, want.Filename)
		}
		err := sameBlocks(name, v, want.BlockSize, want.BlocksCount, want.Uuid)
		if err != nil && made {
			return kind.Wrap(kind.Invalid, errors.Join(err, b.spdk.BdevAIODelete(ctx, v.Name)))
		}
		return err
	}, func(name string) error {
		_, err := b.spdk.BdevAIOCreate(ctx, spdk.BdevAIOCreateParams{Name: name, Filename: want.Filename, BlockSizeBytes: uint32(want.BlockSize), UUID: want.Uuid})
		made = err == nil
		return err
	})
	if err == nil { // an lvstore on it is there when the volume is
		err = b.spdk.BdevWaitForExamine(ctx)
	}
	return v, err
}

// GetAioVolume returns a volume.
func (b *Bridge) GetAioVolume(ctx context.Context, r *opiv1.GetAioVolumeRequest) (*opiv1.AioVolume, error) {
	return aioKind.get(ctx, b, r.GetName())
}

// ListAioVolumes lists all of the kind.
func (b *Bridge) ListAioVolumes(ctx context.Context, r *opiv1.ListAioVolumesRequest) (*opiv1.ListAioVolumesResponse, error) {
	list, next, err := aioKind.list(ctx, b, r.GetPageSize(), r.GetPageToken())
	return &opiv1.ListAioVolumesResponse{AioVolumes: list, NextPageToken: next}, err
}

// UpdateAioVolume changes nothing: SPDK cannot.
func (b *Bridge) UpdateAioVolume(ctx context.Context, r *opiv1.UpdateAioVolumeRequest) (*opiv1.AioVolume, error) {
	var create func(string) (*opiv1.AioVolume, error)
	if r.GetAllowMissing() {
		create = func(id string) (*opiv1.AioVolume, error) {
			return b.CreateAioVolume(ctx, &opiv1.CreateAioVolumeRequest{AioVolume: r.GetAioVolume(), AioVolumeId: id})
		}
	}
	return aioKind.update(ctx, b, r.GetAioVolume(), r.GetUpdateMask(), create)
}

// DeleteAioVolume deletes a volume, also under whoever uses it.
func (b *Bridge) DeleteAioVolume(ctx context.Context, r *opiv1.DeleteAioVolumeRequest) (*emptypb.Empty, error) {
	return aioKind.remove(ctx, b, r.GetName(), r.GetAllowMissing())
}

// StatsAioVolume returns what was read and written.
func (b *Bridge) StatsAioVolume(ctx context.Context, r *opiv1.StatsAioVolumeRequest) (*opiv1.StatsAioVolumeResponse, error) {
	stats, err := aioKind.stats(ctx, b, r.GetName())
	if err != nil {
		return nil, err
	}
	return &opiv1.StatsAioVolumeResponse{Stats: stats}, nil
}
