package opi

import (
	"context"
	"errors"
	"strings"

	opiv1 "github.com/opiproject/opi-api/storage/v1alpha1/gen/go"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/fieldmaskpb"

	lvolv1 "github.com/thaw-project/thaw/api/lvol/v1"
	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/spdk"
)

// resource is what a volume of a kind is described by.
type resource interface {
	proto.Message
	GetName() string
}

// volumeKind is what the services of all kinds of volumes have in common: all but how one
// is created.
type volumeKind[R resource] struct {
	collection, product string
	proto               func(*spdk.Bdev) R
	del                 func(*spdk.Client, context.Context, string) error
}

var (
	aioKind    = volumeKind[*opiv1.AioVolume]{aioVolumes, spdk.ProductAIO, aioProto, (*spdk.Client).BdevAIODelete}
	mallocKind = volumeKind[*opiv1.MallocVolume]{mallocVolumes, spdk.ProductMalloc, mallocProto, (*spdk.Client).BdevMallocDelete}
	nullKind   = volumeKind[*opiv1.NullVolume]{nullVolumes, spdk.ProductNull, nullProto, (*spdk.Client).BdevNullDelete}
	rbdKind    = volumeKind[*lvolv1.RbdVolume]{rbdVolumes, spdk.ProductRBD, rbdProto, (*spdk.Client).BdevRBDDelete}
)

// create makes a volume, or returns the one of that id when same has nothing against it.
func (k *volumeKind[R]) create(ctx context.Context, b *Bridge, id string, same func(*spdk.Bdev) error, create func(name string) error) (none R, err error) {
	v, err := b.ensureBdev(ctx, id, k.collection, k.product, same, create)
	if err != nil {
		return none, err
	}
	return k.proto(v), nil
}

func (k *volumeKind[R]) get(ctx context.Context, b *Bridge, name string) (none R, err error) {
	v, err := b.bdevNamed(ctx, name, k.collection, k.product)
	if err != nil {
		return none, err
	}
	return k.proto(v), nil
}

func (k *volumeKind[R]) list(ctx context.Context, b *Bridge, size int32, token string) (list []R, next string, err error) {
	all, err := b.bdevsOf(ctx, k.product)
	if err != nil {
		return nil, "", err
	}
	for _, v := range all {
		list = append(list, k.proto(v))
	}
	return page(list, R.GetName, size, token)
}

// update changes nothing: SPDK cannot. create makes a missing one; nil where that is not
// asked for.
func (k *volumeKind[R]) update(ctx context.Context, b *Bridge, want R, mask *fieldmaskpb.FieldMask, create func(id string) (R, error)) (none R, err error) {
	have, err := k.get(ctx, b, want.GetName())
	if errors.Is(err, kind.NotFound) && create != nil {
		return create(strings.TrimPrefix(want.GetName(), k.collection+"/"))
	}
	if err != nil {
		return none, err
	}
	return unchangeable(have, want, mask)
}

// remove deletes a volume, also under whoever uses it.
func (k *volumeKind[R]) remove(ctx context.Context, b *Bridge, name string, allowMissing bool) (*emptypb.Empty, error) {
	err := remove(allowMissing, func() (*spdk.Bdev, error) { return b.bdevNamed(ctx, name, k.collection, k.product) },
		func(v *spdk.Bdev) error { return k.del(b.spdk, ctx, v.Name) })
	return &emptypb.Empty{}, err
}

func (k *volumeKind[R]) stats(ctx context.Context, b *Bridge, name string) (*opiv1.VolumeStats, error) {
	v, err := b.bdevNamed(ctx, name, k.collection, k.product)
	if err != nil {
		return nil, err
	}
	return b.stats(ctx, v.Name)
}
