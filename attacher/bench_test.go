package attacher_test

import (
	"context"
	"fmt"
	"net"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"google.golang.org/grpc"

	attacherv1 "github.com/thaw-project/thaw/api/attacher/v1"
	"github.com/thaw-project/thaw/attacher"
	"github.com/thaw-project/thaw/attacher/export"
	"github.com/thaw-project/thaw/attacher/rpc"
	"github.com/thaw-project/thaw/image/block"
	"github.com/thaw-project/thaw/lvol"
	"github.com/thaw-project/thaw/node/present"
	"github.com/thaw-project/thaw/node/present/presenttest"
	"github.com/thaw-project/thaw/target/bdev"
)

// What the benchmarks' store holds: 100 images of 10 blocks, and 20 nodes that have the
// soldiers of 10 images attached each.
const (
	benchImages = 100
	benchBlocks = 10
	benchNodes  = 20
	benchPer    = 10
)

// large is a store on disk with a real exporter.
type large struct {
	testing.TB
	dir      string
	lvols    *lvol.Store
	exporter *export.NVMe
	attacher *attacher.Attacher
	soldiers []string
}

func newLarge(b *testing.B) *large {
	l := &large{TB: b, dir: b.TempDir()}
	pool := filepath.Join(l.dir, "pool")
	must(b, lvol.Create(lvol.CreateOptions{Dir: pool, CapacityBytes: 1 << 30}))
	var err error
	l.lvols, err = lvol.Open(lvol.Options{Dir: pool})
	must(b, err)
	b.Cleanup(func() { must(b, l.lvols.Close()) })
	l.start()
	b.Cleanup(func() { l.stop() })
	for n := range benchImages {
		work, blocks := fmt.Sprintf("work-%d", n), []string(nil)
		_, err := l.lvols.Create(work, 1<<20)
		must(b, err)
		for i := range benchBlocks - 1 {
			scope := block.Local
			if i == 0 {
				scope = block.Global
			}
			blocks = append(blocks, blockName(scope, n*benchBlocks+i))
			_, err := l.lvols.Snapshot(work, blocks[i])
			must(b, err)
		}
		must(b, l.lvols.Delete(work))
		soldier := blockName(block.Soldier, n*benchBlocks+benchBlocks-1)
		_, err = l.lvols.Clone(blocks[len(blocks)-1], soldier)
		must(b, err)
		_, err = l.lvols.SetReadOnly(soldier, true)
		must(b, err)
		_, err = l.attacher.PutImage(ctx, &attacherv1.PutImageRequest{Image: image(fmt.Sprintf("registry/image:%d", n), append(blocks, soldier))})
		must(b, err)
		l.soldiers = append(l.soldiers, soldier)
	}
	for n := range benchNodes {
		for i := range benchPer {
			_, err := l.attacher.AttachBlock(ctx, &attacherv1.AttachBlockRequest{Node: fmt.Sprintf("node-%d", n), Block: l.soldiers[(n*benchPer+i)%benchImages]})
			must(b, err)
		}
	}
	return l
}

func (l *large) start() {
	l.Helper()
	var err error
	l.exporter, err = export.New(export.Options{
		Store: l.lvols.Stat().UUID, Portals: []string{"127.0.0.1:0"},
		Open: func(name string, readOnly bool) (bdev.Device, uuid.UUID, error) {
			d, err := l.lvols.OpenLvol(name, readOnly)
			if err != nil {
				return nil, uuid.UUID{}, err
			}
			return d, uuid.MustParse(d.UUID()), nil
		},
	})
	must(l, err)
	l.attacher, err = attacher.New(attacher.Options{
		Lvols: l.lvols, DBPath: filepath.Join(l.dir, "attacher.db"), Target: "here", Exporter: l.exporter,
		Presenter: presenttest.New(func(source present.Source, readOnly bool) (bdev.Device, error) {
			return l.lvols.OpenLvol(source.Lvol, readOnly)
		}),
		Sync: func(context.Context, string) error { return nil },
	})
	must(l, err)
}

func (l *large) stop() {
	l.Helper()
	must(l, l.attacher.Close())
	must(l, l.exporter.Close())
}

// clients are connections of that many nodes, through the store's socket.
func (l *large) clients(n int) (out []attacherv1.NodeClient) {
	l.Helper()
	socket := filepath.Join(l.TempDir(), "s")
	listener, err := net.Listen("unix", socket)
	must(l, err)
	server := grpc.NewServer(rpc.ServerOptions()...)
	attacherv1.RegisterNodeServer(server, l.attacher)
	var served sync.WaitGroup
	served.Go(func() { _ = server.Serve(listener) }) // ends with Stop
	l.Cleanup(func() { server.Stop(); served.Wait() })
	for range n {
		conn, err := rpc.Dial(socket)
		must(l, err)
		l.Cleanup(func() { conn.Close() })
		out = append(out, attacherv1.NewNodeClient(conn))
	}
	return out
}

func reportQuantiles(b *testing.B, what string, took []time.Duration) {
	slices.Sort(took)
	at := func(q float64) float64 { return float64(took[int(q*float64(len(took)-1))].Microseconds()) / 1000 }
	b.ReportMetric(at(0.5), what+"-p50-ms")
	b.ReportMetric(at(0.99), what+"-p99-ms")
}

// BenchmarkScale measures the attacher with 1,000 blocks and 200 exports.
func BenchmarkScale(b *testing.B) {
	l := newLarge(b)
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	heap := float64(m.HeapAlloc) / (1 << 20)

	b.Run("list lvols", func(b *testing.B) {
		for b.Loop() {
			r, err := l.attacher.ListLvols(ctx, &attacherv1.ListLvolsRequest{})
			if err != nil || len(r.GetLvols()) != benchImages*benchBlocks {
				b.Fatal(len(r.GetLvols()), err)
			}
		}
		b.ReportMetric(heap, "heap-MiB")
	})
	b.Run("list attachments", func(b *testing.B) {
		for b.Loop() {
			r, err := l.attacher.ListAttachments(ctx, &attacherv1.ListAttachmentsRequest{})
			if err != nil || len(r.GetAttachments()) != benchNodes*benchPer {
				b.Fatal(len(r.GetAttachments()), err)
			}
		}
	})
	b.Run("list images", func(b *testing.B) {
		for b.Loop() {
			if r, err := l.attacher.ListImages(ctx, &attacherv1.ListImagesRequest{}); err != nil || len(r.GetImages()) != benchImages {
				b.Fatal(err)
			}
		}
	})
	b.Run("get image", func(b *testing.B) {
		for b.Loop() {
			if _, err := l.attacher.GetImage(ctx, &attacherv1.GetImageRequest{Reference: "registry/image:50"}); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("sweep", func(b *testing.B) {
		for b.Loop() {
			l.attacher.Sweep(ctx)
		}
	})
	b.Run("restart", func(b *testing.B) {
		var took time.Duration
		for b.Loop() {
			l.stop()
			begin := time.Now()
			l.start()
			took += time.Since(begin)
		}
		if nodes, blocks := l.exporter.Attached(); nodes != benchNodes || blocks != benchNodes*benchPer {
			b.Fatal(nodes, blocks)
		}
		b.ReportMetric(float64(took.Microseconds())/1000/float64(b.N), "start-ms")
	})
	for _, concurrent := range []int{1, 32} {
		b.Run(fmt.Sprintf("attach/concurrent=%d", concurrent), func(b *testing.B) {
			clients := l.clients(concurrent)
			var mu sync.Mutex
			var attach, detach []time.Duration
			run := func(id, n int) error {
				node := fmt.Sprintf("new-%d", id)
				for i := range n {
					soldier := l.soldiers[(id*7+i)%benchImages]
					begin := time.Now()
					x, err := clients[id].AttachBlock(ctx, &attacherv1.AttachBlockRequest{Node: node, Block: soldier})
					if err != nil {
						return err
					}
					middle := time.Now()
					if _, err := clients[id].DetachBlock(ctx, &attacherv1.DetachBlockRequest{Node: node, Block: soldier, AttachmentId: x.GetAttachmentId()}); err != nil {
						return err
					}
					end := time.Now()
					mu.Lock()
					attach, detach = append(attach, middle.Sub(begin)), append(detach, end.Sub(middle))
					mu.Unlock()
				}
				return nil
			}
			for b.Loop() { // an iteration is 20 attaches and detaches of each client
				var all sync.WaitGroup
				for id := range concurrent {
					all.Go(func() {
						if err := run(id, 20); err != nil {
							b.Error(err)
						}
					})
				}
				all.Wait()
			}
			reportQuantiles(b, "attach", attach)
			reportQuantiles(b, "detach", detach)
		})
	}
	b.Run("attach writable/concurrent=32", func(b *testing.B) {
		clients := l.clients(32)
		var mu sync.Mutex
		var attach, remove []time.Duration
		for b.Loop() {
			var all sync.WaitGroup
			for id := range clients {
				all.Go(func() {
					node := fmt.Sprintf("new-%d", id)
					begin := time.Now()
					_, err := clients[id].AttachWritable(ctx, &attacherv1.AttachWritableRequest{Node: node, Id: "c", Block: l.soldiers[id]})
					middle := time.Now()
					if err == nil {
						_, err = clients[id].DeleteWritable(ctx, &attacherv1.DeleteWritableRequest{Node: node, Id: "c"})
					}
					if err != nil {
						b.Error(err)
					}
					mu.Lock()
					attach, remove = append(attach, middle.Sub(begin)), append(remove, time.Since(middle))
					mu.Unlock()
				})
			}
			all.Wait()
		}
		reportQuantiles(b, "attach", attach)
		reportQuantiles(b, "delete", remove)
	})
}
