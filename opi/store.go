package opi

import (
	"context"
	"errors"
	"strings"

	"google.golang.org/protobuf/types/known/emptypb"

	lvolv1 "github.com/thaw-project/thaw/api/lvol/v1"
	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/spdk"
)

// checkName bounds the name of an lvstore or an lvol as SPDK and `thaw target` do.
func checkName(name string) error {
	ok := func(r rune) bool {
		return r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("._-", r)
	}
	if name == "" || len(name) > 63 || strings.IndexFunc(name, func(r rune) bool { return !ok(r) }) >= 0 {
		return kind.Errorf(kind.Invalid, "name %.100q: must be 1 to 63 of A-Z a-z 0-9 . _ -", name)
	}
	return nil
}

func (b *Bridge) store(ctx context.Context, name string) (*spdk.LvolStore, error) {
	if err := checkName(name); err != nil {
		return nil, err
	}
	list, err := b.spdk.BdevLvolGetLvstores(ctx, name)
	if err != nil && !errors.Is(err, kind.NotFound) {
		return nil, err
	}
	for i := range list {
		if list[i].Name == name {
			return &list[i], nil
		}
	}
	return nil, kind.Wrap(kind.NotFound, &noStore{name})
}

// maxStores bounds the lvstores that a bridge remembers.
const maxStores = 64

// storeOf is store for who knows that it is there, with this UUID. It asks the target
// once: an lvstore's cluster size never changes.
func (b *Bridge) storeOf(ctx context.Context, name, id string) (*spdk.LvolStore, error) {
	b.mu.Lock()
	cluster := b.clusters[id]
	b.mu.Unlock()
	if cluster > 0 {
		return &spdk.LvolStore{Name: name, UUID: id, ClusterSizeBytes: cluster}, nil
	}
	s, err := b.store(ctx, name)
	if err != nil {
		return nil, err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.clusters) >= maxStores {
		clear(b.clusters)
	}
	b.clusters[s.UUID] = s.ClusterSizeBytes
	return s, nil
}

// noStore is kind.NotFound of an lvstore. Refusals tells it from that of what is in one.
type noStore struct{ name string }

func (e *noStore) Error() string { return "the target has no lvstore " + e.name }

func (b *Bridge) storeNamed(ctx context.Context, name string) (*spdk.LvolStore, error) {
	id, err := parse1(name, lvolStores)
	if err != nil {
		return nil, err
	}
	return b.store(ctx, id)
}

// storeProto describes an lvstore; base is the name of the volume it lies on.
func storeProto(s *spdk.LvolStore, base string) *lvolv1.LvolStore {
	return &lvolv1.LvolStore{Name: join(lvolStores, s.Name), VolumeNameRef: base, ClusterSizeBytes: int64(s.ClusterSizeBytes), Uuid: s.UUID,
		ClustersCount: int64(s.TotalDataClusters), FreeClustersCount: int64(s.FreeClusters)}
}

func (b *Bridge) described(ctx context.Context, s *spdk.LvolStore) (*lvolv1.LvolStore, error) {
	base, err := b.spdk.Bdev(ctx, s.BaseBdev)
	if err != nil {
		return nil, err
	}
	return storeProto(s, volumeName(base)), nil
}

// CreateLvolStore makes an lvstore on a volume, whose bytes are lost.
func (b *Bridge) CreateLvolStore(ctx context.Context, r *lvolv1.CreateLvolStoreRequest) (*lvolv1.LvolStore, error) {
	want, id := r.GetLvolStore(), r.GetLvolStoreId()
	if err := checkName(id); err != nil {
		return nil, err
	}
	if n := want.GetClusterSizeBytes(); n < 0 || n > 1<<31 {
		return nil, kind.Errorf(kind.Invalid, "cluster_size_bytes %d is not in 0 to 2 GiB", n)
	}
	base, err := b.volume(ctx, want.GetVolumeNameRef())
	if err != nil {
		return nil, err
	}
	// One that is just being loaded must not be taken for missing: its volume would be
	// made empty.
	if err := b.spdk.BdevWaitForExamine(ctx); err != nil {
		return nil, err
	}
	s, err := ensure(func() (*spdk.LvolStore, error) { return b.store(ctx, id) }, func(s *spdk.LvolStore) error {
		switch {
		case s.BaseBdev != base.Name:
			return differs(join(lvolStores, id), "volume", s.BaseBdev, base.Name)
		case want.ClusterSizeBytes != 0 && s.ClusterSizeBytes != uint64(want.ClusterSizeBytes):
			return differs(join(lvolStores, id), "cluster size", s.ClusterSizeBytes, want.ClusterSizeBytes)
		}
		return nil
	}, func() error {
		_, err := b.spdk.BdevLvolCreateLvstore(ctx, spdk.LvolStoreCreateParams{BdevName: base.Name, Name: id, ClusterSizeBytes: uint32(want.ClusterSizeBytes)})
		return err
	})
	if err != nil {
		return nil, err
	}
	return storeProto(s, volumeName(base)), nil
}

// GetLvolStore returns an lvstore.
func (b *Bridge) GetLvolStore(ctx context.Context, r *lvolv1.GetLvolStoreRequest) (*lvolv1.LvolStore, error) {
	s, err := b.storeNamed(ctx, r.GetName())
	if err != nil {
		return nil, err
	}
	return b.described(ctx, s)
}

// ListLvolStores lists all lvstores.
func (b *Bridge) ListLvolStores(ctx context.Context, r *lvolv1.ListLvolStoresRequest) (*lvolv1.ListLvolStoresResponse, error) {
	all, err := b.spdk.BdevLvolGetLvstores(ctx, "")
	if err != nil {
		return nil, err
	}
	bdevs, err := b.spdk.BdevGetBdevs(ctx, spdk.BdevGetBdevsParams{})
	if err != nil {
		return nil, err
	}
	names := make(map[string]string, len(bdevs))
	for i := range bdevs {
		names[bdevs[i].Name] = volumeName(&bdevs[i])
	}
	var list []*lvolv1.LvolStore
	for i := range all {
		list = append(list, storeProto(&all[i], names[all[i].BaseBdev]))
	}
	list, next, err := page(list, (*lvolv1.LvolStore).GetName, r.GetPageSize(), r.GetPageToken())
	return &lvolv1.ListLvolStoresResponse{LvolStores: list, NextPageToken: next}, err
}

// DeleteLvolStore destroys an lvstore and what is in it.
func (b *Bridge) DeleteLvolStore(ctx context.Context, r *lvolv1.DeleteLvolStoreRequest) (*emptypb.Empty, error) {
	err := remove(r.GetAllowMissing(), func() (*spdk.LvolStore, error) { return b.storeNamed(ctx, r.GetName()) },
		func(s *spdk.LvolStore) error { return b.spdk.BdevLvolDeleteLvstore(ctx, s.Name) })
	return &emptypb.Empty{}, err
}
