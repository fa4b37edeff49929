package opi

import (
	"context"
	"errors"

	opiv1 "github.com/opiproject/opi-api/storage/v1alpha1/gen/go"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/thaw-project/thaw/kind"
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
	v, err := b.ensureBdev(ctx, r.GetNullVolumeId(), nullVolumes, spdk.ProductNull,
		func(v *spdk.Bdev) error {
			return sameBlocks(join(nullVolumes, v.Name), v, want.BlockSize, want.BlocksCount, want.Uuid)
		}, func(name string) error {
			_, err := b.spdk.BdevNullCreate(ctx, spdk.BdevNullCreateParams{Name: name, NumBlocks: uint64(want.BlocksCount), BlockSizeBytes: uint32(want.BlockSize), UUID: want.Uuid})
			return err
		})
	if err != nil {
		return nil, err
	}
	return nullProto(v), nil
}

// GetNullVolume returns a volume.
func (b *Bridge) GetNullVolume(ctx context.Context, r *opiv1.GetNullVolumeRequest) (*opiv1.NullVolume, error) {
	v, err := b.bdevNamed(ctx, r.GetName(), nullVolumes, spdk.ProductNull)
	if err != nil {
		return nil, err
	}
	return nullProto(v), nil
}

// ListNullVolumes lists all of the kind.
func (b *Bridge) ListNullVolumes(ctx context.Context, r *opiv1.ListNullVolumesRequest) (*opiv1.ListNullVolumesResponse, error) {
	all, err := b.bdevsOf(ctx, spdk.ProductNull)
	if err != nil {
		return nil, err
	}
	var list []*opiv1.NullVolume
	for _, v := range all {
		list = append(list, nullProto(v))
	}
	list, next, err := page(list, (*opiv1.NullVolume).GetName, r.GetPageSize(), r.GetPageToken())
	return &opiv1.ListNullVolumesResponse{NullVolumes: list, NextPageToken: next}, err
}

// UpdateNullVolume changes nothing: SPDK cannot.
func (b *Bridge) UpdateNullVolume(ctx context.Context, r *opiv1.UpdateNullVolumeRequest) (*opiv1.NullVolume, error) {
	want := r.GetNullVolume()
	v, err := b.bdevNamed(ctx, want.GetName(), nullVolumes, spdk.ProductNull)
	if errors.Is(err, kind.NotFound) && r.GetAllowMissing() {
		return b.CreateNullVolume(ctx, &opiv1.CreateNullVolumeRequest{NullVolume: want, NullVolumeId: want.GetName()[len(nullVolumes)+1:]})
	}
	if err != nil {
		return nil, err
	}
	return unchangeable(nullProto(v), want, r.GetUpdateMask())
}

// DeleteNullVolume deletes a volume, also under whoever uses it.
func (b *Bridge) DeleteNullVolume(ctx context.Context, r *opiv1.DeleteNullVolumeRequest) (*emptypb.Empty, error) {
	err := remove(r.GetAllowMissing(), func() (*spdk.Bdev, error) { return b.bdevNamed(ctx, r.GetName(), nullVolumes, spdk.ProductNull) },
		func(v *spdk.Bdev) error { return b.spdk.BdevNullDelete(ctx, v.Name) })
	return &emptypb.Empty{}, err
}

// StatsNullVolume returns what was read and written.
func (b *Bridge) StatsNullVolume(ctx context.Context, r *opiv1.StatsNullVolumeRequest) (*opiv1.StatsNullVolumeResponse, error) {
	v, err := b.bdevNamed(ctx, r.GetName(), nullVolumes, spdk.ProductNull)
	if err != nil {
		return nil, err
	}
	stats, err := b.stats(ctx, v.Name)
	return &opiv1.StatsNullVolumeResponse{Stats: stats}, err
}
