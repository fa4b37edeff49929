package kill

import (
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"

	attacherv1 "github.com/thaw-project/thaw/api/attacher/v1"
	imagemgmtv1 "github.com/thaw-project/thaw/api/imagemgmt/v1"
	"github.com/thaw-project/thaw/attacher/rpc"
)

const user = "container-1"

// images is image-mgmt on a chain.
type images struct {
	*store
	dir string
	api imagemgmtv1.ImageManagementClient
}

// newImages adds image-mgmt, whose configuration has more.
func newImages(s *store, more string) *images {
	c := s.c
	c.t.Helper()
	i := &images{store: s, dir: c.path("i")}
	config := c.path("i.toml")
	text := fmt.Sprintf("roles = [\"images\"]\nnode = %q\n[[remote]]\nname = %q\nattacher = %q\n%s",
		nodeName, storeName, filepath.Join(s.dir, "run", "attacher.sock"), more)
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		c.t.Fatal(err)
	}
	socket := filepath.Join(i.dir, "run", "image-mgmt.sock")
	c.add(&member{name: "image-mgmt", socket: socket,
		args: []string{"image-mgmt", "--config", config, "--root", filepath.Join(i.dir, "root"), "--run", filepath.Join(i.dir, "run")}})
	conn, err := rpc.Dial(socket)
	if err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(func() { conn.Close() })
	i.api = imagemgmtv1.NewImageManagementClient(conn)
	return i
}

// add is what image-mgmt has.
func (i *images) add(ctx context.Context, all state) error {
	list, err := i.api.List(ctx, &imagemgmtv1.ListRequest{})
	if err != nil {
		return err
	}
	for _, a := range list.GetAttachments() {
		all["image-mgmt "+a.GetBlock()] = text(a)
	}
	for _, name := range []string{"imagemgmt.db", "remote.db"} {
		db, err := databaseState(name+" ", filepath.Join(i.dir, "root", name), i.c.path(name+".copy"))
		if err != nil {
			return err
		}
		all.merge(db)
	}
	return nil
}

func (i *images) attach(ctx context.Context) (*imagemgmtv1.Disk, error) {
	return i.api.Attach(ctx, &imagemgmtv1.AttachRequest{Block: &imagemgmtv1.Block{Target: storeName, Name: i.soldier()}, User: user})
}

func (i *images) do(ctx context.Context) error {
	_, err := i.attach(ctx)
	return err
}

func (i *images) undo(ctx context.Context) error {
	_, err := i.api.Detach(ctx, &imagemgmtv1.DetachRequest{Block: i.soldier(), User: user})
	return err
}

// shown is a subject: a block shown by image-mgmt on the machine that it runs on.
type shown struct {
	*images
	once sync.Once
	sum  string
}

func (s *shown) state(ctx context.Context) (state, error) {
	all, err := s.store.state(ctx)
	if err != nil {
		return nil, err
	}
	return all, s.images.add(ctx, all)
}

// check reads the disk through the kernel, and the block as a node.
func (s *shown) check(ctx context.Context) error {
	d, err := s.attach(ctx)
	if err != nil {
		return err
	}
	f, err := os.Open(d.GetPath())
	if err != nil {
		return err
	}
	hash := sha256.New()
	_, err = io.Copy(hash, f)
	if err := errors.Join(err, f.Close()); err != nil {
		return err
	}
	s.once.Do(func() {
		var a *attacherv1.Attachment
		if a, err = s.node.AttachBlock(ctx, &attacherv1.AttachBlockRequest{Block: s.soldier(), Node: nodeName}); err == nil {
			s.sum, err = sum(ctx, a, "")
		}
	})
	if err != nil {
		return err
	}
	if have := fmt.Sprintf("%x", hash.Sum(nil)); have != s.sum {
		return fmt.Errorf("the disk reads as %s, the store's block as %s", have, cmp.Or(s.sum, "nothing"))
	}
	return s.untouched()
}

func newShown(t *testing.T, b backend) (*chain, subject) {
	c, s := newStore(t, b)
	return c, &shown{images: newImages(s, "[cache]\nenabled = false\n")}
}

// TestImagesEmbedded kills image-mgmt and a store with a pool of its own.
func TestImagesEmbedded(t *testing.T) {
	prove(t, 6, func(t *testing.T) (*chain, subject) { return newShown(t, embedded) })
}

// TestImages kills image-mgmt and the store's attacher, bridge and target.
func TestImages(t *testing.T) {
	inSample(t, "TestDPU")
	prove(t, 30, func(t *testing.T) (*chain, subject) { return newShown(t, overSPDK) })
}

// dpu is a subject: a block that image-mgmt on a card shows to the card's host.
type dpu struct {
	*card
	images *images
}

func newDPU(t *testing.T, b backend) (*chain, subject) {
	c, k := newCard(t, b)
	return c, &dpu{k, newImages(k.store, fmt.Sprintf("[images]\nmode = \"dpu\"\n[images.card]\naddress = %q\n", k.socket))}
}

func (d *dpu) do(ctx context.Context) error   { return d.images.do(ctx) }
func (d *dpu) undo(ctx context.Context) error { return d.images.undo(ctx) }

func (d *dpu) state(ctx context.Context) (state, error) {
	all, err := d.card.state(ctx)
	if err != nil {
		return nil, err
	}
	return all, d.images.add(ctx, all)
}

// check is that image-mgmt says which drive it is, and the drive that of the card's.
func (d *dpu) check(ctx context.Context) error {
	disk, err := d.images.attach(ctx)
	if err != nil {
		return err
	}
	list, err := d.api.ListDisks(ctx, &attacherv1.ListDisksRequest{})
	if err != nil {
		return err
	}
	if len(list.GetDisks()) != 1 || disk.GetNvme().GetSerial() != list.GetDisks()[0].GetSerial() || disk.GetNvme().GetUuid() != list.GetDisks()[0].GetUuid() {
		return fmt.Errorf("image-mgmt says %v, the card has %v", disk, list.GetDisks())
	}
	return (&drive{d.card}).check(ctx)
}

// TestDPUEmbedded kills image-mgmt and a card, and a store with a pool of its own.
func TestDPUEmbedded(t *testing.T) {
	inSample(t, "TestDPU")
	prove(t, 50, func(t *testing.T) (*chain, subject) { return newDPU(t, embedded) })
}

// TestDPU kills every process there is between an image and a host's drive.
func TestDPU(t *testing.T) {
	prove(t, 70, func(t *testing.T) (*chain, subject) { return newDPU(t, overSPDK) })
}

// layer is a subject: a writable layer over a block, as a drive of the card's host.
type layer struct{ *dpu }

const layerID = "layer-1"

func (l *layer) layer() *imagemgmtv1.Layer {
	return &imagemgmtv1.Layer{Block: &imagemgmtv1.Block{Target: storeName, Name: l.soldier()}, Path: l.c.path(layerID)}
}

func (l *layer) do(ctx context.Context) error {
	_, err := l.images.api.AttachWritable(ctx, &imagemgmtv1.AttachWritableRequest{Layer: l.layer(), Id: layerID})
	return err
}

func (l *layer) undo(ctx context.Context) error {
	_, err := l.images.api.DeleteWritable(ctx, &imagemgmtv1.DeleteWritableRequest{Layer: l.layer(), Id: layerID})
	return err
}

// check writes to the layer as the machine does, and reads it back.
func (l *layer) check(ctx context.Context) error {
	const offset, length = 1 << 20, 4096
	if err := writeDrive(l.c, l.qmp, offset, length, 0xa5); err != nil {
		return err
	}
	have, err := readDrive(l.c, l.qmp, offset, length)
	if err != nil {
		return err
	}
	if want := strings.Repeat("a5", length); have != want {
		return fmt.Errorf("the layer reads as %.60s after it was written to", have)
	}
	return errors.Join(l.own.untouched(), l.untouched())
}

// state leaves out what was written, and calls identities by numbers: those of a layer
// follow from its lvol, which is another one each time.
func (l *layer) state(ctx context.Context) (state, error) {
	all, err := l.dpu.state(ctx)
	numbers := map[string]string{}
	for _, key := range slices.Sorted(maps.Keys(all)) {
		text := clusters.ReplaceAllString(all[key], "")
		all[key] = identities.ReplaceAllStringFunc(text, func(id string) string {
			id = strings.ToLower(strings.ReplaceAll(id, "-", ""))
			if numbers[id] == "" {
				numbers[id] = fmt.Sprintf("(identity %d)", len(numbers))
			}
			return numbers[id]
		})
	}
	return all, err
}

var (
	clusters   = regexp.MustCompile(`,?"(allocatedBytes|allocatedClusters|num_allocated_clusters|free_clusters|freeClusters)":"?[0-9]+"?`)
	identities = regexp.MustCompile(`[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}|[0-9A-F]{32}|"[0-9a-f]{20}"`)
)

// TestLayerEmbedded is TestDPUEmbedded with a layer that is written to.
func TestLayerEmbedded(t *testing.T) {
	inSample(t, "TestLayer")
	prove(t, 50, func(t *testing.T) (*chain, subject) {
		c, d := newDPU(t, embedded)
		return c, &layer{d.(*dpu)}
	})
}

// TestLayer is TestDPU with a layer that is written to.
func TestLayer(t *testing.T) {
	prove(t, 70, func(t *testing.T) (*chain, subject) {
		c, d := newDPU(t, overSPDK)
		return c, &layer{d.(*dpu)}
	})
}
