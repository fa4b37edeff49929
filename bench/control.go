package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"
	"google.golang.org/grpc"

	attacherv1 "github.com/thaw-project/thaw/api/attacher/v1"
	"github.com/thaw-project/thaw/attacher/rpc"
	"github.com/thaw-project/thaw/e2e/lab"
	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/nvme/host"
)

const (
	// controlBlocks and controlExports are a store of some size: each block is an lvol
	// snapshot, each export a block that a node has attached.
	controlBlocks  = 1000
	controlExports = 200
	// controlNodes share the exports: each has a subsystem.
	controlNodes = 10
	// controlCallers is how many attach at the same time where it says so.
	controlCallers = 32

	controlBlockBytes = 16 << 20
	controlStoreBytes = 8 << 30
	controlPatience   = time.Minute
)

// controlStore is a store's attacher in processes of its own, as the deployment guide has
// them, with blocks.
type controlStore struct {
	lab    *lab.Lab
	parts  []*controlPart // in order of start; the attacher is the last
	conn   *grpc.ClientConn
	a      attacherv1.AttacherClient
	node   attacherv1.NodeClient
	blocks []string
	subsys map[string]*attacherv1.Attachment // one of each node
}

// controlPart is a process that can be killed and started again.
type controlPart struct {
	name   string
	args   []string
	socket string
	proc   *lab.Process
}

func (p *controlPart) start(ctx context.Context, l *lab.Lab) (err error) {
	os.Remove(p.socket) // of one that was killed
	if p.proc, err = l.Start(lab.Spec{Name: p.name, Args: p.args}); err != nil {
		return err
	}
	for ctx, cancel := context.WithTimeout(ctx, controlPatience); ; {
		nc, err := net.Dial("unix", p.socket)
		if err == nil {
			cancel()
			return nc.Close()
		}
		if ctx.Err() != nil || !p.proc.Running() {
			cancel()
			return fmt.Errorf("%s does not serve: %w; the end of its log:\n%s", p.name, err, p.proc.Log(4096))
		}
		time.Sleep(time.Millisecond)
	}
}

// newControlStore starts a store over its own pool, or over a bridge and a target.
func (b *bench) newControlStore(ctx context.Context, overSPDK bool) (_ *controlStore, err error) {
	dir, err := b.lab.Path(b.next("control"), "x")
	if err != nil {
		return nil, err
	}
	dir = filepath.Dir(dir)
	program := filepath.Join(b.lab.Bin, "thaw")
	port, err := freePort()
	if err != nil {
		return nil, err
	}
	s := &controlStore{lab: b.lab, subsys: map[string]*attacherv1.Attachment{}}
	config := "roles = [\"store\"]\ntarget = \"bench\"\n"
	if overSPDK {
		target, bridge, file := filepath.Join(dir, "target.sock"), filepath.Join(dir, "bridge.sock"), filepath.Join(dir, "lvstore")
		if err := errors.Join(os.WriteFile(file, nil, 0o600), os.Truncate(file, controlStoreBytes)); err != nil {
			return nil, err
		}
		s.parts = []*controlPart{
			{name: filepath.Base(dir) + "-target", socket: target, args: []string{program, "target", "--root", filepath.Join(dir, "t"), "--socket", target, "--log-level", "warn"}},
			{name: filepath.Base(dir) + "-bridge", socket: bridge, args: []string{program, "bridge", "--target", target, "--socket", bridge, "--log-level", "error"}},
		}
		config += fmt.Sprintf("[pool]\nbackend = \"spdk\"\n[pool.spdk]\nbridge = %q\nlvstore = \"pool\"\naio = %q\nportals = [\"tcp://127.0.0.1:%s\"]\n", bridge, file, port)
	} else {
		config += fmt.Sprintf("[pool]\ncapacity = %d\n[export]\nnvme_tcp = [\"127.0.0.1:%s\"]\n", int64(controlStoreBytes), port)
	}
	if err := os.WriteFile(filepath.Join(dir, "config.toml"), []byte(config), 0o600); err != nil {
		return nil, err
	}
	run := filepath.Join(dir, "run")
	s.parts = append(s.parts, &controlPart{name: filepath.Base(dir) + "-attacher", socket: filepath.Join(run, "attacher.sock"),
		args: []string{program, "attacher", "--config", filepath.Join(dir, "config.toml"), "--root", filepath.Join(dir, "root"), "--run", run}})
	for _, p := range s.parts {
		if err := p.start(ctx, b.lab); err != nil {
			return nil, err
		}
	}
	if s.conn, err = rpc.Dial(s.attacher().socket); err != nil {
		return nil, err
	}
	s.a, s.node = attacherv1.NewAttacherClient(s.conn), attacherv1.NewNodeClient(s.conn)
	return s, s.fill(ctx)
}

func freePort() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	defer l.Close()
	_, port, err := net.SplitHostPort(l.Addr().String())
	return port, err
}

func (s *controlStore) attacher() *controlPart { return s.parts[len(s.parts)-1] }

func (s *controlStore) close() error {
	if s == nil {
		return nil
	}
	var errs []error
	if s.conn != nil {
		errs = append(errs, s.conn.Close())
	}
	for i := len(s.parts) - 1; i >= 0; i-- {
		if s.parts[i].proc != nil {
			errs = append(errs, s.parts[i].proc.Stop())
		}
	}
	return errors.Join(errs...)
}

// fill makes the blocks as a converter does.
func (s *controlStore) fill(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	hold, err := s.a.Hold(ctx, &attacherv1.HoldRequest{Owner: "bench"})
	if err != nil {
		return err
	}
	if _, err := hold.Recv(); err != nil {
		return err
	}
	for i := range controlBlocks {
		name := "global-" + uuid.NewSHA1(uuid.NameSpaceOID, fmt.Append(nil, i)).String()
		if _, err := s.a.CreateLvol(ctx, &attacherv1.CreateLvolRequest{Name: "work", SizeBytes: controlBlockBytes, Owner: "bench"}); err != nil {
			return fmt.Errorf("make block %d: %w", i, err)
		}
		if _, err := s.a.SnapshotLvol(ctx, &attacherv1.SnapshotLvolRequest{Lvol: "work", Snapshot: name}); err != nil {
			return fmt.Errorf("make block %d: %w", i, err)
		}
		if _, err := s.a.DeleteLvol(ctx, &attacherv1.DeleteLvolRequest{Name: "work"}); err != nil {
			return fmt.Errorf("make block %d: %w", i, err)
		}
		s.blocks = append(s.blocks, name)
	}
	return nil
}

func controlNode(i int) string { return fmt.Sprintf("node-%d", i%controlNodes) }

// attachAll attaches the blocks from first on and returns how long each took, sorted.
func (s *controlStore) attachAll(ctx context.Context, first, callers int) ([]time.Duration, error) {
	var mu sync.Mutex
	return timed(callers, func(i int) error {
		a, err := s.node.AttachBlock(ctx, &attacherv1.AttachBlockRequest{Block: s.blocks[(first+i)%len(s.blocks)], Node: controlNode(i)})
		if err == nil {
			mu.Lock()
			s.subsys[a.GetNode()] = a
			mu.Unlock()
		}
		return err
	})
}

func (s *controlStore) detachAll(ctx context.Context, first, callers int) ([]time.Duration, error) {
	return timed(callers, func(i int) error {
		_, err := s.node.DetachBlock(ctx, &attacherv1.DetachBlockRequest{Block: s.blocks[(first+i)%len(s.blocks)], Node: controlNode(i)})
		return err
	})
}

// timed calls f for each export, by so many callers at a time.
func timed(callers int, f func(i int) error) ([]time.Duration, error) {
	took := make([]time.Duration, controlExports)
	errs := make([]error, callers)
	var wg sync.WaitGroup
	for c := range callers {
		wg.Go(func() {
			for i := c; i < controlExports && errs[c] == nil; i += callers {
				begin := time.Now()
				errs[c] = f(i)
				took[i] = time.Since(begin)
			}
		})
	}
	wg.Wait()
	slices.Sort(took)
	return took, errors.Join(errs...)
}

// served waits until every node sees all that it has attached.
func (s *controlStore) served(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, controlPatience)
	defer cancel()
	for i := range controlNodes {
		a := s.subsys[controlNode(i)]
		for {
			n, err := shownTo(ctx, a)
			if err == nil && n == controlExports/controlNodes {
				break
			}
			select {
			case <-ctx.Done():
				return fmt.Errorf("node %s sees %d blocks: %w", a.GetNode(), n, errors.Join(err, ctx.Err()))
			case <-time.After(2 * time.Millisecond):
			}
		}
	}
	return nil
}

// usable waits until another block can be attached, and detaches it.
func (s *controlStore) usable(ctx context.Context, block int) error {
	ctx, cancel := context.WithTimeout(ctx, controlPatience)
	defer cancel()
	name := s.blocks[block%len(s.blocks)]
	for {
		_, err := s.node.AttachBlock(ctx, &attacherv1.AttachBlockRequest{Block: name, Node: controlNode(0)})
		if err == nil {
			_, err = s.node.DetachBlock(ctx, &attacherv1.DetachBlockRequest{Block: name, Node: controlNode(0)})
		}
		if err == nil || !errors.Is(err, kind.Unavailable) || ctx.Err() != nil {
			return err
		}
		select {
		case <-ctx.Done():
		case <-time.After(2 * time.Millisecond):
		}
	}
}

// shownTo is how many nvmeNamespaces a node's subsystem has.
func shownTo(ctx context.Context, a *attacherv1.Attachment) (int, error) {
	p := a.GetPortals()[0]
	h, err := host.Connect(ctx, host.Config{Portals: []string{net.JoinHostPort(p.GetAddress(), p.GetService())}, SubNQN: a.GetSubsystemNqn(), HostNQN: a.GetHostNqn()})
	if err != nil {
		return 0, err
	}
	defer h.Close()
	return len(h.NvmeNamespaces()), nil
}

func milliseconds(d time.Duration) float64 { return float64(d) / 1e6 }

// once times a call.
func (s sample) once(name string, f func() error) error {
	begin := time.Now()
	err := f()
	s[name] = milliseconds(time.Since(begin))
	return err
}

func (s sample) quantiles(name string, took []time.Duration) {
	s[name+"-p50"] = milliseconds(took[len(took)/2])
	s[name+"-p99"] = milliseconds(took[len(took)*99/100])
}

// run attaches, looks, kills and detaches. Every run takes other blocks.
func (s *controlStore) run(ctx context.Context, round int) (sample, error) {
	v := sample{}
	first := round * controlExports
	for _, callers := range []int{1, controlCallers} {
		took, err := s.attachAll(ctx, first, callers)
		if err != nil {
			return nil, err
		}
		v.quantiles(fmt.Sprintf("attach-%d", callers), took)
		if callers == 1 {
			if took, err = s.detachAll(ctx, first, callers); err != nil {
				return nil, err
			}
			v.quantiles("detach-1", took)
		}
	}
	if err := errors.Join(
		v.once("list-lvols", func() error {
			l, err := s.a.ListLvols(ctx, &attacherv1.ListLvolsRequest{})
			if err == nil && len(l.GetLvols()) < controlBlocks {
				err = fmt.Errorf("%d lvols are listed", len(l.GetLvols()))
			}
			return err
		}),
		v.once("list-attachments", func() error {
			l, err := s.node.ListAttachments(ctx, &attacherv1.ListAttachmentsRequest{})
			if err == nil && len(l.GetAttachments()) != controlExports {
				err = fmt.Errorf("%d attachments are listed", len(l.GetAttachments()))
			}
			return err
		}),
		v.once("sweep", func() error {
			_, err := s.a.PruneBlocks(ctx, &attacherv1.PruneBlocksRequest{DryRun: true})
			return err
		}),
	); err != nil {
		return nil, err
	}
	for _, p := range s.parts {
		total, _ := s.lab.RSS(strings.Join(p.args, " "))
		if total == 0 {
			return nil, fmt.Errorf("%s has no memory", p.name)
		}
		v["rss-"+p.args[1]] = float64(total) / 1e6
	}
	for _, p := range s.parts {
		if err := v.once("kill-"+p.args[1], func() error {
			p.proc.Kill()
			return errors.Join(p.start(ctx, s.lab), s.usable(ctx, first+controlExports), s.served(ctx))
		}); err != nil {
			return nil, err
		}
	}
	// The attacher may have been started a moment ago.
	took, err := s.detachAll(ctx, first, controlCallers)
	v.quantiles(fmt.Sprintf("detach-%d", controlCallers), took)
	return v, err
}

// control compares a store with a pool of its own with one over a bridge and a target.
func (b *bench) control() comparison {
	measure := func(overSPDK bool, of *fixture[*controlStore]) func(context.Context) (sample, error) {
		round := 0
		return func(ctx context.Context) (sample, error) {
			s, err := of.get(func() (*controlStore, error) { return b.newControlStore(ctx, overSPDK) })
			if err != nil {
				return nil, err
			}
			round++
			return s.run(ctx, round)
		}
	}
	c := comparison{
		name: "control", rounds: 5,
		about: fmt.Sprintf("%d blocks, %d of them attached to %d nodes: calls of 1 and of %d callers at a time, lists, memory, and from a kill until another block can be attached and all nodes see all again",
			controlBlocks, controlExports, controlNodes, controlCallers),
		subjects: []subject{{"embedded", measure(false, &b.controlEmbedded)}, {"spdk", measure(true, &b.controlSPDK)}},
	}
	for _, name := range []string{"attach-1", "attach-32", "detach-1", "detach-32"} {
		c.metrics = append(c.metrics, metric{name: name + "-p50", unit: "ms"}, metric{name: name + "-p99", unit: "ms"})
	}
	for _, name := range []string{"list-lvols", "list-attachments", "sweep", "kill-attacher", "kill-bridge", "kill-target"} {
		c.metrics = append(c.metrics, metric{name: name, unit: "ms"})
	}
	for _, name := range []string{"attacher", "bridge", "target"} {
		c.metrics = append(c.metrics, metric{name: "rss-" + name, unit: "MB"})
	}
	return c
}
