package opi

import (
	"context"
	"errors"
	"math"
	"slices"
	"strings"

	opiv1 "github.com/opiproject/opi-api/storage/v1alpha1/gen/go"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/spdk"
)

// A volume is a bdev. "aioVolumes/{bdev}" and its like name one of a kind; where any
// volume will do, so do lvols, remote nvmeNamespaces, and a bdev's bare name, alias or UUID.

// maxBdevBytes bounds a bdev's name or alias: two names of an lvstore and a lvol, and
// more than any other.
const maxBdevBytes = 255

// volumeName is the name of a volume, or of a bdev that is no resource of ours the bare
// one.
func volumeName(bdev *spdk.Bdev) string {
	switch bdev.ProductName {
	case spdk.ProductAIO:
		return join(aioVolumes, bdev.Name)
	case spdk.ProductMalloc:
		return join(mallocVolumes, bdev.Name)
	case spdk.ProductNull:
		return join(nullVolumes, bdev.Name)
	case spdk.ProductRBD:
		return join(rbdVolumes, bdev.Name)
	case spdk.ProductLvol:
		if len(bdev.Aliases) > 0 {
			if store, lvol, ok := strings.Cut(bdev.Aliases[0], "/"); ok {
				return join(lvolStores, store, lvols, lvol)
			}
		}
	}
	if c := controllerOf(bdev); c != "" {
		return join(remotes, c, remoteNamespaces, bdev.Name)
	}
	return bdev.Name
}

// bdevName is the way back, for names of all volumes.
func bdevName(ref string) (string, error) {
	collection, _, _ := strings.Cut(ref, "/")
	switch collection {
	case aioVolumes, mallocVolumes, nullVolumes, rbdVolumes:
		return parse1(ref, collection)
	case lvolStores:
		texts, err := parse(ref, lvolStores, lvols)
		if err != nil {
			return "", err
		}
		return texts[0] + "/" + texts[1], nil
	case remotes:
		texts, err := parse(ref, remotes, remoteNamespaces)
		if err != nil {
			return "", err
		}
		return texts[1], nil
	}
	return ref, checkBdev(ref)
}

func checkBdev(name string) error {
	if name == "" || len(name) > maxBdevBytes || strings.ContainsFunc(name, func(r rune) bool { return r < ' ' || r == 0x7f }) {
		return kind.Errorf(kind.Invalid, "volume %.255q: must be 1 to %d printable bytes", name, maxBdevBytes)
	}
	return nil
}

// volume finds the bdev that a caller refers to.
func (b *Bridge) volume(ctx context.Context, ref string) (*spdk.Bdev, error) {
	name, err := bdevName(ref)
	if err != nil {
		return nil, err
	}
	return b.spdk.Bdev(ctx, name)
}

// bdev reads a volume of a kind. What the target knows by this name only as an alias, or
// is of another kind, is kind.NotFound or kind.Exists.
func (b *Bridge) bdev(ctx context.Context, name, product string) (*spdk.Bdev, error) {
	v, err := b.spdk.Bdev(ctx, name)
	switch {
	case err != nil:
		return nil, err
	case v.ProductName != product:
		return nil, kind.Errorf(kind.Exists, "bdev %s is a %s, no %s", v.Name, v.ProductName, product)
	case v.Name != name:
		return nil, kind.Errorf(kind.NotFound, "the target has no bdev %.100q, only one of this alias", name)
	}
	return v, nil
}

// absent makes kind.NotFound of a volume of another kind, for what only reads.
func absent(err error) error {
	if errors.Is(err, kind.Exists) {
		return kind.Wrap(kind.NotFound, err)
	}
	return err
}

// bdevNamed is bdev for a resource's name.
func (b *Bridge) bdevNamed(ctx context.Context, name, collection, product string) (*spdk.Bdev, error) {
	id, err := parse1(name, collection)
	if err != nil {
		return nil, err
	}
	v, err := b.bdev(ctx, id, product)
	return v, absent(err)
}

// bdevsOf lists the volumes of a kind.
func (b *Bridge) bdevsOf(ctx context.Context, product string) ([]*spdk.Bdev, error) {
	all, err := b.spdk.BdevGetBdevs(ctx, spdk.BdevGetBdevsParams{})
	var list []*spdk.Bdev
	for i := range all {
		if all[i].ProductName == product {
			list = append(list, &all[i])
		}
	}
	return list, err
}

// ensureBdev makes a volume, which gets the id for its name.
func (b *Bridge) ensureBdev(ctx context.Context, id, collection, product string, same func(*spdk.Bdev) error, create func(name string) error) (*spdk.Bdev, error) {
	name, err := unescape(id)
	if err != nil {
		return nil, err
	}
	if err := checkBdev(name); err != nil {
		return nil, err
	}
	return ensure(func() (*spdk.Bdev, error) { return b.bdev(ctx, name, product) }, same, func() error { return create(name) })
}

// blocks checks what a caller wants a volume to be like. 0 is for what follows from
// elsewhere.
func blocks(size, count int64, id string) error {
	if size < 0 || size > 1<<20 || count < 0 {
		return kind.Errorf(kind.Invalid, "block_size %d, blocks_count %d: a block has at most 1 MiB, and neither is negative", size, count)
	}
	if id != "" {
		return canonical(id)
	}
	return nil
}

// sameBlocks compares a volume with that.
func sameBlocks(name string, v *spdk.Bdev, size, count int64, id string) error {
	switch {
	case size != 0 && uint32(size) != v.BlockSizeBytes:
		return differs(name, "block_size", v.BlockSizeBytes, size)
	case count != 0 && uint64(count) != v.NumBlocks:
		return differs(name, "blocks_count", v.NumBlocks, count)
	case id != "" && !strings.EqualFold(id, v.UUID):
		return differs(name, "uuid", v.UUID, id)
	}
	return nil
}

// stats adds up the figures of bdevs. OPI has 32 bits for each: more is the most that
// these can say.
func (b *Bridge) stats(ctx context.Context, names ...string) (*opiv1.VolumeStats, error) {
	one := ""
	if len(names) == 1 {
		one = names[0]
	}
	list, _, err := b.spdk.BdevGetIOStat(ctx, one)
	if err != nil {
		return nil, err
	}
	s := &opiv1.VolumeStats{}
	add := func(to *int32, n uint64) { *to = int32(min(uint64(*to)+min(n, math.MaxInt32), math.MaxInt32)) }
	for _, i := range list {
		if !slices.Contains(names, i.Name) {
			continue
		}
		add(&s.ReadBytesCount, i.BytesRead)
		add(&s.ReadOpsCount, i.NumReadOps)
		add(&s.WriteBytesCount, i.BytesWritten)
		add(&s.WriteOpsCount, i.NumWriteOps)
		add(&s.UnmapBytesCount, i.BytesUnmapped)
		add(&s.UnmapOpsCount, i.NumUnmapOps)
		add(&s.ReadLatencyTicks, i.ReadLatencyTicks)
		add(&s.WriteLatencyTicks, i.WriteLatencyTicks)
		add(&s.UnmapLatencyTicks, i.UnmapLatencyTicks)
	}
	return s, nil
}
