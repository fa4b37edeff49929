package kill

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	attacherv1 "github.com/thaw-project/thaw/api/attacher/v1"
	"github.com/thaw-project/thaw/attacher/rpc"
	"github.com/thaw-project/thaw/image/convert"
	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/nvme/host"
)

// backend is what a store keeps its lvols in.
type backend string

const (
	embedded backend = "embedded"
	overSPDK backend = "spdk" // a target without memory of its configuration, as SPDK, behind a bridge
)

const (
	storeName = "store-1"
	nodeName  = "node-a"
)

// store is a store's attacher on a chain, with an image that was converted.
type store struct {
	c       *chain
	backend backend
	storage *storage // nil for embedded
	dir     string   // root and run directories
	config  string
	port    string // where nodes read
	conn    *grpc.ClientConn
	a       attacherv1.AttacherClient
	node    attacherv1.NodeClient
	image   convert.Result
}

func newStore(t *testing.T, b backend) (*chain, *store) {
	c := newChain(t)
	s := &store{c: c, backend: b, dir: c.path("a"), config: c.path("a.toml")}
	text := fmt.Sprintf("roles = [\"store\"]\ntarget = %q\n", storeName)
	if b == embedded {
		s.port = freePort(t)
		text += fmt.Sprintf("[pool]\ncapacity = \"1GiB\"\n[export]\nnvme_tcp = [\"127.0.0.1:%s\"]\n", s.port)
	} else {
		s.storage = newStorage(c, "", nil, nil)
		s.port = s.storage.port
		text += fmt.Sprintf("[pool]\nbackend = \"spdk\"\n[pool.spdk]\nbridge = %q\nlvstore = %q\naio = %q\nportals = [\"tcp://127.0.0.1:%s\"]\n",
			s.storage.bridge, lvstoreName, s.storage.aio, s.port)
	}
	if err := os.WriteFile(s.config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(s.dir, "run", "attacher.sock")
	c.add(&member{name: "attacher", socket: socket, args: append([]string{"attacher"}, s.place()...), serves: func(ctx context.Context) error {
		conn, err := rpc.Dial(socket)
		if err != nil {
			return err
		}
		defer conn.Close()
		_, err = attacherv1.NewAttacherClient(conn).GetStore(ctx, &attacherv1.GetStoreRequest{})
		return err
	}})
	if s.storage != nil { // the attacher has made the lvstore
		if err := s.storage.foreignLvol(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	var err error
	if s.conn, err = rpc.Dial(socket); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.conn.Close() })
	s.a, s.node = attacherv1.NewAttacherClient(s.conn), attacherv1.NewNodeClient(s.conn)
	if s.image, err = s.convert(t.Context(), "", firstImage, "first"); err != nil {
		t.Fatal(err)
	}
	return c, s
}

// place are the flags that say where the store is.
func (s *store) place() []string {
	return []string{"--config", s.config, "--root", filepath.Join(s.dir, "root"), "--run", filepath.Join(s.dir, "run")}
}

func (s *store) soldier() string { return s.image.Images[0].Soldier }

// convert converts an image into the layout of the chain. With a name the process is one
// that may be killed, as if it were a member.
func (s *store) convert(ctx context.Context, name, source, tag string) (convert.Result, error) {
	var result convert.Result
	program, err := binary()
	if err != nil {
		return result, err
	}
	from, err := layoutOf(s.c, source)
	if err != nil {
		return result, err
	}
	args := append([]string{"image", "convert", "oci:" + from, "oci:" + s.c.path("layout") + ":" + tag, "--json", "--quiet", "--virtual-size", "64MiB",
		"--spool-dir", s.c.dir}, s.place()...)
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Env = os.Environ()
	if name != "" {
		cmd.Env = append(cmd.Env, "THAW_FAILPOINT_FILE="+s.c.armed(name), "THAW_FAILPOINT_TRACE="+s.c.trace(name))
	}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) && exit.Sys().(syscall.WaitStatus).Signal() == syscall.SIGKILL && s.c.guestDied(name) {
			return result, kind.Errorf(kind.Unavailable, "the converter was killed")
		}
		return result, kind.Errorf(kind.Unavailable, "convert: %w: %s", err, stderr.String())
	}
	return result, json.Unmarshal(out, &result)
}

// state is what attacher and target have.
func (s *store) state(ctx context.Context) (state, error) {
	all := state{}
	if s.storage != nil {
		have, err := targetState(ctx, "", s.storage.target)
		if err != nil {
			return nil, err
		}
		all.merge(have)
	}
	lvols, err := s.a.ListLvols(ctx, &attacherv1.ListLvolsRequest{})
	if err != nil {
		return nil, err
	}
	for _, v := range lvols.GetLvols() {
		v.CreatedUnixNanos, v.Uuid = 0, ""
		slices.Sort(v.Clones)
		all["lvol "+v.GetName()] = text(v)
	}
	images, err := s.a.ListImages(ctx, &attacherv1.ListImagesRequest{})
	if err != nil {
		return nil, err
	}
	for _, i := range images.GetImages() {
		i.CreatedUnixNanos = 0
		all["image "+i.GetReference()] = text(i)
	}
	attachments, err := s.node.ListAttachments(ctx, &attacherv1.ListAttachmentsRequest{})
	if err != nil {
		return nil, err
	}
	for _, a := range attachments.GetAttachments() {
		a.CreatedUnixNanos, a.AttachmentId = 0, "" // random
		all["attachment "+a.GetNode()+" "+a.GetBlock()] = text(a)
	}
	space, err := s.a.GetStore(ctx, &attacherv1.GetStoreRequest{})
	if err != nil {
		return nil, err
	}
	all["store"] = text(space)
	db, err := databaseState("attacher.db ", filepath.Join(s.dir, "root", "attacher.db"), s.c.path("attacher.db.copy"))
	if err != nil {
		return nil, err
	}
	all.merge(db)
	// What the FUSE presentation of converters shows.
	if raw, err := os.ReadFile(filepath.Join(s.dir, "run", "attacher-fuse.json")); err == nil {
		var shown struct {
			Disks []struct {
				ID string `json:"id"`
			} `json:"disks"`
		}
		if err := json.Unmarshal(raw, &shown); err != nil {
			return nil, err
		}
		for _, d := range shown.Disks {
			all["disk "+d.ID] = "shown"
		}
	}
	return all, nil
}

// text is a message in words that are the same in every run.
func text(m proto.Message) string {
	raw, err := protojson.Marshal(m)
	if err != nil {
		return err.Error()
	}
	var compact bytes.Buffer
	if err := json.Compact(&compact, raw); err != nil { // protojson adds spaces at random
		return err.Error()
	}
	return compact.String()
}

// sum reads all of an attachment as its node.
func sum(ctx context.Context, a *attacherv1.Attachment, as string) (string, error) {
	if len(a.GetPortals()) == 0 {
		return "", kind.Errorf(kind.Corrupt, "the attachment has no portal: %v", a)
	}
	p := a.GetPortals()[0]
	h, err := host.Connect(ctx, host.Config{Portals: []string{p.GetAddress() + ":" + p.GetService()}, SubNQN: a.GetSubsystemNqn(),
		HostNQN: cmp.Or(as, a.GetHostNqn()), ReconnectDelay: 5 * time.Millisecond, LossTimeout: 5 * time.Second})
	if err != nil {
		return "", err
	}
	defer h.Close()
	dev, err := h.Open(a.GetNsid())
	if err != nil {
		return "", err
	}
	defer dev.Close()
	if dev.SizeBytes() != a.GetSizeBytes() || dev.Info().UUID.String() != a.GetUuid() {
		return "", kind.Errorf(kind.Corrupt, "%d bytes of %s, want %v", dev.SizeBytes(), dev.Info().UUID, a)
	}
	hash := sha256.New()
	if _, err := io.Copy(hash, io.NewSectionReader(dev, 0, dev.SizeBytes())); err != nil {
		return "", err
	}
	return fmt.Sprintf("%x", hash.Sum(nil)), nil
}

// attach is a subject: a block given to a node.
type attach struct {
	*store
	once sync.Once
	sum  string // of the block
}

func newAttach(t *testing.T, b backend) (*chain, subject) {
	c, s := newStore(t, b)
	return c, &attach{store: s}
}

func (a *attach) do(ctx context.Context) error {
	_, err := a.node.AttachBlock(ctx, &attacherv1.AttachBlockRequest{Block: a.soldier(), Node: nodeName})
	return err
}

func (a *attach) undo(ctx context.Context) error {
	_, err := a.node.DetachBlock(ctx, &attacherv1.DetachBlockRequest{Block: a.soldier(), Node: nodeName})
	return err
}

// check reads the block as the node, and tries to as another.
func (a *attach) check(ctx context.Context) error {
	x, err := a.node.AttachBlock(ctx, &attacherv1.AttachBlockRequest{Block: a.soldier(), Node: nodeName})
	if err != nil {
		return err
	}
	if _, err := sum(ctx, x, foreignHost); !errors.Is(err, kind.Denied) {
		return fmt.Errorf("another host reads it: %v", err)
	}
	have, err := sum(ctx, x, "")
	if err != nil {
		return err
	}
	a.once.Do(func() { a.sum = have })
	if have != a.sum {
		return fmt.Errorf("the block reads as %s, before as %s", have, a.sum)
	}
	return a.untouched()
}

// untouched reads what belongs to somebody else.
func (s *store) untouched() error {
	if s.storage == nil {
		return nil
	}
	return s.storage.untouched()
}

// TestAttachEmbedded kills a store with a pool of its own.
func TestAttachEmbedded(t *testing.T) {
	prove(t, 3, func(t *testing.T) (*chain, subject) { return newAttach(t, embedded) })
}

// TestAttach kills attacher, bridge and target.
func TestAttach(t *testing.T) {
	inSample(t, "TestDPU")
	prove(t, 20, func(t *testing.T) (*chain, subject) { return newAttach(t, overSPDK) })
}

// conversion is a subject: an image converted and removed.
type conversion struct {
	*store
	mu     sync.Mutex
	result string // of the first time
	sum    string
}

func newConversion(t *testing.T, b backend) (*chain, subject) {
	c, s := newStore(t, b)
	c.guests = append(c.guests, "converter")
	return c, &conversion{store: s}
}

func (v *conversion) do(ctx context.Context) error {
	r, err := v.convert(ctx, "converter", secondImage, "second")
	if err != nil {
		return err
	}
	got := r.Digest + " " + strings.Join(r.Images[0].Blocks(), " ")
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.result == "" {
		v.result = got
	}
	if got != v.result {
		return fmt.Errorf("converted to %s, before to %s", got, v.result)
	}
	return nil
}

func (v *conversion) undo(ctx context.Context) error {
	if _, err := v.a.DeleteImage(ctx, &attacherv1.DeleteImageRequest{Reference: "oci:" + v.c.path("layout") + ":second"}); err != nil && !errors.Is(err, kind.NotFound) {
		return err
	}
	_, err := v.a.PruneBlocks(ctx, &attacherv1.PruneBlocksRequest{})
	return err
}

// check reads the image as a node.
func (v *conversion) check(ctx context.Context) error {
	r, err := v.a.GetImage(ctx, &attacherv1.GetImageRequest{Reference: "oci:" + v.c.path("layout") + ":second"})
	if err != nil {
		return err
	}
	block := r.GetBlocks()[len(r.GetBlocks())-1]
	x, err := v.node.AttachBlock(ctx, &attacherv1.AttachBlockRequest{Block: block, Node: nodeName})
	if err != nil {
		return err
	}
	have, err := sum(ctx, x, "")
	if err != nil {
		return err
	}
	if _, err := v.node.DetachBlock(ctx, &attacherv1.DetachBlockRequest{Block: block, Node: nodeName}); err != nil {
		return err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	v.sum = cmp.Or(v.sum, have)
	if have != v.sum {
		return fmt.Errorf("the image reads as %s, before as %s", have, v.sum)
	}
	return v.untouched()
}

// TestConvertEmbedded kills converter and attacher.
func TestConvertEmbedded(t *testing.T) {
	prove(t, 10, func(t *testing.T) (*chain, subject) { return newConversion(t, embedded) })
}

// TestConvert kills converter, attacher, bridge and target.
func TestConvert(t *testing.T) {
	prove(t, 100, func(t *testing.T) (*chain, subject) { return newConversion(t, overSPDK) })
}
