package opi_test

import (
	"fmt"
	"testing"

	opiv1 "github.com/opiproject/opi-api/storage/v1alpha1/gen/go"

	lvolv1 "github.com/thaw-project/thaw/api/lvol/v1"
	"github.com/thaw-project/thaw/spdk"
)

// BenchmarkBridge measures a target with 1,000 lvols, 200 of them shown, each in a
// subsystem of its own: what one more costs, and what lists cost.
func BenchmarkBridge(b *testing.B) {
	l := start(b, nil)
	ctx := b.Context()
	must[*opiv1.MallocVolume](b)(l.malloc.CreateMallocVolume(ctx, &opiv1.CreateMallocVolumeRequest{MallocVolumeId: "m0", MallocVolume: &opiv1.MallocVolume{BlockSize: 4096, BlocksCount: 64 << 8}}))
	l.lvstore("m0")
	for i := range 1000 {
		must[string](b)(l.spdk.BdevLvolCreate(ctx, spdk.LvolCreateParams{Name: fmt.Sprintf("l%04d", i), SizeMiB: 1, ThinProvision: true, StoreName: "s"}))
	}
	port := freePort(b)
	show := func(i int) {
		name := fmt.Sprintf("%s%04d", nqn, i)
		parent := l.subsystem(name).Name
		must[*opiv1.NvmeNamespace](b)(l.fe.CreateNvmeNamespace(ctx, &opiv1.CreateNvmeNamespaceRequest{Parent: parent, NvmeNamespace: &opiv1.NvmeNamespace{Spec: &opiv1.NvmeNamespaceSpec{VolumeNameRef: lvolName(fmt.Sprintf("l%04d", i))}}}))
		must[*opiv1.NvmeController](b)(l.fe.CreateNvmeController(ctx, &opiv1.CreateNvmeControllerRequest{Parent: parent, NvmeController: fabrics(port)}))
	}
	for i := range 200 {
		show(i)
	}
	b.Run("attach+detach", func(b *testing.B) {
		for b.Loop() {
			show(200)
			if _, err := l.fe.DeleteNvmeSubsystem(ctx, &opiv1.DeleteNvmeSubsystemRequest{Name: fmt.Sprintf("%s%04d", sub, 200)}); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("clone+delete", func(b *testing.B) {
		must[*lvolv1.Lvol](b)(l.lvol.SnapshotLvol(ctx, &lvolv1.SnapshotLvolRequest{Name: lvolName("l0999"), SnapshotId: "snap"}))
		for b.Loop() {
			must[*lvolv1.Lvol](b)(l.lvol.CloneLvol(ctx, &lvolv1.CloneLvolRequest{Name: lvolName("snap"), LvolId: "c"}))
			if _, err := l.lvol.DeleteLvol(ctx, &lvolv1.DeleteLvolRequest{Name: lvolName("c")}); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("list-lvols", func(b *testing.B) {
		for b.Loop() {
			if r := must[*lvolv1.ListLvolsResponse](b)(l.lvol.ListLvols(ctx, &lvolv1.ListLvolsRequest{Parent: store, PageSize: 1000})); len(r.Lvols) != 1000 {
				b.Fatal(len(r.Lvols))
			}
		}
	})
	b.Run("list-subsystems", func(b *testing.B) {
		for b.Loop() {
			if r := must[*opiv1.ListNvmeSubsystemsResponse](b)(l.fe.ListNvmeSubsystems(ctx, &opiv1.ListNvmeSubsystemsRequest{PageSize: 1000})); len(r.NvmeSubsystems) != 200 {
				b.Fatal(len(r.NvmeSubsystems))
			}
		}
	})
}
