package kill

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	attacherv1 "github.com/thaw-project/thaw/api/attacher/v1"
	"github.com/thaw-project/thaw/attacher/rpc"
	"github.com/thaw-project/thaw/nvme/host"
)

// card is a card on a chain: its own target and bridge, its attacher, and the machine that
// it is plugged into.
type card struct {
	*store
	own    *storage
	dir    string
	config string
	socket string
	qmp    string
	api    attacherv1.CardClient
}

func newCard(t *testing.T, b backend) (*chain, *card) {
	c, s := newStore(t, b)
	k := &card{store: s, dir: c.path("k"), config: c.path("k.toml")}
	bridge, own := newQEMU(c)
	k.qmp = own
	k.own = newStorage(c, "card-", nil, []string{"--dpu-sim", bridge, "--dpu-sim-functions", fmt.Sprint(ports), "--dpu-sim-sockets", c.path("n")})
	text := fmt.Sprintf("roles = [\"card\"]\n[card]\nbridge = %q\nhost = %q\nfunctions = [\"0:0:0\", \"0:1:0\", \"0:2:0\"]\n", k.own.bridge, nodeName)
	if err := os.WriteFile(k.config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	k.socket = filepath.Join(k.dir, "run", "attacher.sock")
	c.add(&member{name: "card", socket: k.socket,
		args: []string{"attacher", "--config", k.config, "--root", filepath.Join(k.dir, "root"), "--run", filepath.Join(k.dir, "run")}})
	conn, err := rpc.Dial(k.socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	k.api = attacherv1.NewCardClient(conn)
	return c, k
}

func (k *card) state(ctx context.Context) (state, error) {
	all, err := k.store.state(ctx)
	if err != nil {
		return nil, err
	}
	have, err := targetState(ctx, "card's ", k.own.target)
	if err != nil {
		return nil, err
	}
	all.merge(have)
	disks, err := k.api.ListDisks(ctx, &attacherv1.ListDisksRequest{})
	if err != nil {
		return nil, err
	}
	for _, d := range disks.GetDisks() {
		d.CreatedUnixNanos, d.AttachmentId, d.Steps = 0, "", nil
		all["card's disk "+d.GetId()] = text(d)
	}
	functions, err := k.api.ListFunctions(ctx, &attacherv1.ListFunctionsRequest{})
	if err != nil {
		return nil, err
	}
	for _, f := range functions.GetFunctions() {
		all["card's function "+text(f.GetFunction())] = text(f)
	}
	db, err := databaseState("card.db ", filepath.Join(k.dir, "root", "card.db"), k.c.path("card.db.copy"))
	if err != nil {
		return nil, err
	}
	all.merge(db)
	if have, err = hostState(k.qmp); err != nil {
		return nil, err
	}
	all.merge(have)
	return all, nil
}

// drive is a subject: a block of the store as a drive of the card's host.
type drive struct{ *card }

func (d *drive) do(ctx context.Context) error {
	a, err := d.node.AttachBlock(ctx, &attacherv1.AttachBlockRequest{Block: d.soldier(), Node: nodeName})
	if err != nil {
		return err
	}
	_, err = d.api.AttachDisk(ctx, &attacherv1.AttachDiskRequest{Id: d.soldier(), Purpose: attacherv1.Purpose_PURPOSE_BLOCK,
		Source: &attacherv1.AttachDiskRequest_Attachment{Attachment: a}})
	return err
}

func (d *drive) undo(ctx context.Context) error {
	if _, err := d.api.DetachDisk(ctx, &attacherv1.DetachDiskRequest{Id: d.soldier(), Purpose: attacherv1.Purpose_PURPOSE_BLOCK}); err != nil {
		return err
	}
	_, err := d.node.DetachBlock(ctx, &attacherv1.DetachBlockRequest{Block: d.soldier(), Node: nodeName})
	return err
}

// check compares what the machine reads from the drive with what the store serves.
func (d *drive) check(ctx context.Context) error {
	a, err := d.node.AttachBlock(ctx, &attacherv1.AttachBlockRequest{Block: d.soldier(), Node: nodeName})
	if err != nil {
		return err
	}
	for _, offset := range []int64{0, 128 << 10} {
		want, err := readStore(ctx, a, offset, 4096)
		if err != nil {
			return err
		}
		have, err := readDrive(d.c, d.qmp, offset, 4096)
		if err != nil {
			return err
		}
		if have != want {
			return fmt.Errorf("the drive reads as %.200s at %d, the store's block as %.200s", have, offset, want)
		}
	}
	return errors.Join(d.own.untouched(), d.store.untouched())
}

// readStore reads bytes of an attachment as its node, in hexadecimal.
func readStore(ctx context.Context, a *attacherv1.Attachment, offset, length int64) (string, error) {
	p := a.GetPortals()[0]
	h, err := host.Connect(ctx, host.Config{Portals: []string{p.GetAddress() + ":" + p.GetService()}, SubNQN: a.GetSubsystemNqn(), HostNQN: a.GetHostNqn()})
	if err != nil {
		return "", err
	}
	defer h.Close()
	dev, err := h.Open(a.GetNsid())
	if err != nil {
		return "", err
	}
	defer dev.Close()
	p0 := make([]byte, length)
	if _, err := dev.ReadAt(p0, offset); err != nil {
		return "", err
	}
	return hex.EncodeToString(p0), nil
}

// TestCardEmbedded kills a store with a pool of its own, and a card.
func TestCardEmbedded(t *testing.T) {
	inSample(t, "TestDPU")
	prove(t, 40, func(t *testing.T) (*chain, subject) {
		c, k := newCard(t, embedded)
		return c, &drive{k}
	})
}

// TestCard kills the attachers, bridges and targets of store and card.
func TestCard(t *testing.T) {
	inSample(t, "TestDPU")
	prove(t, 60, func(t *testing.T) (*chain, subject) {
		c, k := newCard(t, overSPDK)
		return c, &drive{k}
	})
}
