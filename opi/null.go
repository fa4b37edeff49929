package opi

import (
	"context"

	opiv1 "github.com/opiproject/opi-api/storage/v1alpha1/gen/go"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/thaw-project/thaw/spdk"
)

func nullProto(v *spdk.Bdev) *opiv1.NullVolume {
	return &opiv1.NullVolume{Name: join(nullVolumes, v.Name), BlockSize: int64(v.BlockSizeBytes), BlocksCount: int64(v.NumBlocks), Uuid: v.UUID}
}

// CreateNullVolume makes a volume that keeps nothing.
func (b *Bridge) CreateNullVolume(ctx context.Context, r *opiv1.CreateNullVolumeRequest) (*opiv1.NullVolume, error) {
	want := r.GetNullVolume()
	if err := sizedBlocks(want.GetBlockSize(), want.GetBlocksCount(), want.GetUuid()); err != nil {
		return nil, err
	}
	return nullKind.create(ctx, b, r.GetNullVolumeId(), func(v *spdk.Bdev) error {
		return sameBlocks(join(nullVolumes, v.Name), v, want.BlockSize, want.BlocksCount, want.Uuid)
	}, func(name string) error {
		_, err := b.spdk.BdevNullCreate(ctx, spdk.BdevNullCreateParams{Name: name, NumBlocks: uint64(want.BlocksCount), BlockSizeBytes: uint32(want.BlockSize), UUID: want.Uuid})
		return err
	})
}

// GetNullVolume returns a volume.
func (b *Bridge) GetNullVolume(ctx context.Context, r *opiv1.GetNullVolumeRequest) (*opiv1.NullVolume, error) {
	return nullKind.get(ctx, b, r.GetName())
}

// ListNullVolumes lists all of the kind.
func (b *Bridge) ListNullVolumes(ctx context.Context, r *opiv1.ListNullVolumesRequest) (*opiv1.ListNullVolumesResponse, error) {
	list, next, err := nullKind.list(ctx, b, r.GetPageSize(), r.GetPageToken())
	return &opiv1.ListNullVolumesResponse{NullVolumes: list, NextPageToken: next}, err
}

// UpdateNullVolume changes nothing: SPDK cannot.
func (b *Bridge) UpdateNullVolume(ctx context.Context, r *opiv1.UpdateNullVolumeRequest) (*opiv1.NullVolume, error) {
	var create func(string) (*opiv1.NullVolume, error)
	if r.GetAllowMissing() {
		create = func(id string) (*opiv1.NullVolume, error) {
			return b.CreateNullVolume(ctx, &opiv1.CreateNullVolumeRequest{NullVolume: r.GetNullVolume(), NullVolumeId: id})
		}
	}
	return nullKind.update(ctx, b, r.GetNullVolume(), r.GetUpdateMask(), create)
}

// DeleteNullVolume deletes a volume, also under whoever uses it.
func (b *Bridge) DeleteNullVolume(ctx context.Context, r *opiv1.DeleteNullVolumeRequest) (*emptypb.Empty, error) {
	return nullKind.remove(ctx, b, r.GetName(), r.GetAllowMissing())
}

// StatsNullVolume returns what was read and written.
func (b *Bridge) StatsNullVolume(ctx context.Context, r *opiv1.StatsNullVolumeRequest) (*opiv1.StatsNullVolumeResponse, error) {
	stats, err := nullKind.stats(ctx, b, r.GetName())
	if err != nil {
		return nil, err
	}
	return &opiv1.StatsNullVolumeResponse{Stats: stats}, nil
}
