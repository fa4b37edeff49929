package opi

import (
	"context"

	opiv1 "github.com/opiproject/opi-api/storage/v1alpha1/gen/go"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/spdk"
)

func mallocProto(v *spdk.Bdev) *opiv1.MallocVolume {
	return &opiv1.MallocVolume{Name: join(mallocVolumes, v.Name), BlockSize: int64(v.BlockSizeBytes), BlocksCount: int64(v.NumBlocks), Uuid: v.UUID}
}

// CreateMallocVolume makes a volume in the target's memory.
func (b *Bridge) CreateMallocVolume(ctx context.Context, r *opiv1.CreateMallocVolumeRequest) (*opiv1.MallocVolume, error) {
	want := r.GetMallocVolume()
	if err := sizedBlocks(want.GetBlockSize(), want.GetBlocksCount(), want.GetUuid()); err != nil {
		return nil, err
	}
	if want.MetadataSize != 0 {
		return nil, kind.Errorf(kind.Unsupported, "metadata_size: blocks with metadata are not supported")
	}
	return mallocKind.create(ctx, b, r.GetMallocVolumeId(), func(v *spdk.Bdev) error {
		return sameBlocks(join(mallocVolumes, v.Name), v, want.BlockSize, want.BlocksCount, want.Uuid)
	}, func(name string) error {
		_, err := b.spdk.BdevMallocCreate(ctx, spdk.BdevMallocCreateParams{Name: name, NumBlocks: uint64(want.BlocksCount), BlockSizeBytes: uint32(want.BlockSize), UUID: want.Uuid})
		return err
	})
}

// sizedBlocks is blocks for volumes whose size follows from nothing else.
func sizedBlocks(size, count int64, id string) error {
	if size == 0 || count == 0 {
		return kind.Errorf(kind.Invalid, "block_size and blocks_count must be given")
	}
	return blocks(size, count, id)
}

// GetMallocVolume returns a volume.
func (b *Bridge) GetMallocVolume(ctx context.Context, r *opiv1.GetMallocVolumeRequest) (*opiv1.MallocVolume, error) {
	return mallocKind.get(ctx, b, r.GetName())
}

// ListMallocVolumes lists all of the kind.
func (b *Bridge) ListMallocVolumes(ctx context.Context, r *opiv1.ListMallocVolumesRequest) (*opiv1.ListMallocVolumesResponse, error) {
	list, next, err := mallocKind.list(ctx, b, r.GetPageSize(), r.GetPageToken())
	return &opiv1.ListMallocVolumesResponse{MallocVolumes: list, NextPageToken: next}, err
}

// UpdateMallocVolume changes nothing: SPDK cannot.
func (b *Bridge) UpdateMallocVolume(ctx context.Context, r *opiv1.UpdateMallocVolumeRequest) (*opiv1.MallocVolume, error) {
	var create func(string) (*opiv1.MallocVolume, error)
	if r.GetAllowMissing() {
		create = func(id string) (*opiv1.MallocVolume, error) {
			return b.CreateMallocVolume(ctx, &opiv1.CreateMallocVolumeRequest{MallocVolume: r.GetMallocVolume(), MallocVolumeId: id})
		}
	}
	return mallocKind.update(ctx, b, r.GetMallocVolume(), r.GetUpdateMask(), create)
}

// DeleteMallocVolume deletes a volume, also under whoever uses it.
func (b *Bridge) DeleteMallocVolume(ctx context.Context, r *opiv1.DeleteMallocVolumeRequest) (*emptypb.Empty, error) {
	return mallocKind.remove(ctx, b, r.GetName(), r.GetAllowMissing())
}

// StatsMallocVolume returns what was read and written.
func (b *Bridge) StatsMallocVolume(ctx context.Context, r *opiv1.StatsMallocVolumeRequest) (*opiv1.StatsMallocVolumeResponse, error) {
	stats, err := mallocKind.stats(ctx, b, r.GetName())
	if err != nil {
		return nil, err
	}
	return &opiv1.StatsMallocVolumeResponse{Stats: stats}, nil
}
