package opi

import (
	"context"

	"google.golang.org/protobuf/types/known/emptypb"

	lvolv1 "github.com/thaw-project/thaw/api/lvol/v1"
	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/spdk"
)

// defaultRBDBlockBytes suits what file systems and NVMe hosts do.
const defaultRBDBlockBytes = 4096

func rbdProto(v *spdk.Bdev) *lvolv1.RbdVolume {
	p := &lvolv1.RbdVolume{Name: join(rbdVolumes, v.Name), BlockSize: int64(v.BlockSizeBytes), BlocksCount: int64(v.NumBlocks), Uuid: v.UUID}
	if r := v.Specific.RBD; r != nil {
		p.Pool, p.Image, p.Cluster = r.PoolName, r.RBDName, r.ClusterName
	}
	return p
}

// CreateRbdVolume makes a volume of a Ceph image.
func (b *Bridge) CreateRbdVolume(ctx context.Context, r *lvolv1.CreateRbdVolumeRequest) (*lvolv1.RbdVolume, error) {
	want := r.GetRbdVolume()
	if err := blocks(want.GetBlockSize(), 0, want.GetUuid()); err != nil {
		return nil, err
	}
	for _, s := range []string{want.GetPool(), want.GetImage()} {
		if err := checkBdev(s); err != nil {
			return nil, kind.Errorf(kind.Invalid, "pool and image: %w", err)
		}
	}
	size := uint32(want.BlockSize)
	if size == 0 {
		size = defaultRBDBlockBytes
	}
	return rbdKind.create(ctx, b, r.GetRbdVolumeId(), func(v *spdk.Bdev) error {
		have := rbdProto(v)
		switch {
		case have.Pool != want.Pool || have.Image != want.Image:
			return differs(have.Name, "image", have.Pool+"/"+have.Image, want.Pool+"/"+want.Image)
		case want.Cluster != "" && have.Cluster != "" && have.Cluster != want.Cluster:
			return differs(have.Name, "cluster", have.Cluster, want.Cluster)
		}
		return sameBlocks(have.Name, v, int64(size), 0, want.Uuid)
	}, func(name string) error {
		_, err := b.spdk.BdevRBDCreate(ctx, spdk.RBDCreateParams{Name: name, PoolName: want.Pool, RBDName: want.Image, BlockSizeBytes: size, ClusterName: want.Cluster, UUID: want.Uuid})
		return err
	})
}

// GetRbdVolume returns a volume.
func (b *Bridge) GetRbdVolume(ctx context.Context, r *lvolv1.GetRbdVolumeRequest) (*lvolv1.RbdVolume, error) {
	return rbdKind.get(ctx, b, r.GetName())
}

// ListRbdVolumes lists all of the kind.
func (b *Bridge) ListRbdVolumes(ctx context.Context, r *lvolv1.ListRbdVolumesRequest) (*lvolv1.ListRbdVolumesResponse, error) {
	list, next, err := rbdKind.list(ctx, b, r.GetPageSize(), r.GetPageToken())
	return &lvolv1.ListRbdVolumesResponse{RbdVolumes: list, NextPageToken: next}, err
}

// DeleteRbdVolume deletes a volume and leaves its image.
func (b *Bridge) DeleteRbdVolume(ctx context.Context, r *lvolv1.DeleteRbdVolumeRequest) (*emptypb.Empty, error) {
	return rbdKind.remove(ctx, b, r.GetName(), r.GetAllowMissing())
}
