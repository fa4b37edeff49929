package card

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"
	opiv1 "github.com/opiproject/opi-api/storage/v1alpha1/gen/go"
	"go.uber.org/goleak"
	"google.golang.org/grpc"

	attacherv1 "github.com/thaw-project/thaw/api/attacher/v1"
	"github.com/thaw-project/thaw/attacher/identity"
	attacherrpc "github.com/thaw-project/thaw/attacher/rpc"
	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/nvme/host"
	"github.com/thaw-project/thaw/opi"
	"github.com/thaw-project/thaw/opi/functiontest"
	"github.com/thaw-project/thaw/spdk"
	"github.com/thaw-project/thaw/target"
	"github.com/thaw-project/thaw/target/rpc"
)

// These make the test binary a target in this directory, or a card's attacher.
const childTarget, childCard = "THAW_TEST_TARGET", "THAW_TEST_CARD"

func TestMain(m *testing.M) {
	for name, f := range map[string]func(ctx context.Context, root string) error{childTarget: targetChild, childCard: cardChild} {
		if root := os.Getenv(name); root != "" {
			ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
			defer stop()
			if err := f(ctx, root); err != nil {
				fmt.Fprintln(os.Stderr, err)
				os.Exit(1)
			}
			return
		}
	}
	goleak.VerifyTestMain(m)
}

func targetChild(ctx context.Context, root string) error {
	stop, err := serveTarget(root)
	if err != nil {
		return err
	}
	<-ctx.Done()
	return stop()
}

// serveTarget runs a target as SPDK is: it forgets what it was told.
func serveTarget(root string) (stop func() error, err error) {
	t, err := target.New(target.Options{Root: filepath.Join(root, "t")})
	if err != nil {
		return nil, err
	}
	l, err := rpc.Listen(filepath.Join(root, "target"))
	if err != nil {
		return nil, errors.Join(err, t.Close())
	}
	s := rpc.Serve(l, rpc.Options{Methods: t.Methods()})
	return func() error { return errors.Join(s.Close(), t.Close()) }, nil
}

const hostName = "host1"

func shortDir(t testing.TB) string {
	dir, err := os.MkdirTemp("", "card-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func newClient(t testing.TB, root string) *spdk.Client {
	c, err := spdk.New(spdk.Options{Socket: filepath.Join(root, "target")})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func freePort(t testing.TB) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	_, port, _ := net.SplitHostPort(l.Addr().String())
	return port
}

// store is a target that shows files to the host as a store's does.
type store struct {
	t     testing.TB
	root  string
	id    identity.Store
	ports []string
	spdk  *spdk.Client
	stop  func() error
	disks map[string]*attacherv1.Attachment // by id
	node  string
}

const diskBytes = 1 << 20

// newStore runs a store with the disks, each of random bytes.
func newStore(t testing.TB, ports int, disks ...string) *store {
	s := &store{t: t, root: shortDir(t), id: identity.Store{UUID: uuid.New()}, disks: make(map[string]*attacherv1.Attachment), node: hostName}
	for range ports {
		s.ports = append(s.ports, freePort(t))
	}
	for i, id := range disks {
		content := make([]byte, diskBytes)
		rand.Read(content)
		if err := os.WriteFile(filepath.Join(s.root, id), content, 0o600); err != nil {
			t.Fatal(err)
		}
		a := &attacherv1.Attachment{Block: id, Node: s.node, Transport: "nvme-tcp", SubsystemNqn: s.id.Subsystem(s.node), HostNqn: identity.HostNQN(s.node),
			HostId: identity.HostID(s.node).String(), Nsid: uint32(i + 1), Uuid: s.id.NvmeNamespace(uuid.New(), s.node).String(), SizeBytes: diskBytes, AttachmentId: uuid.NewString()}
		for _, p := range s.ports {
			a.Portals = append(a.Portals, &attacherv1.Portal{Transport: "tcp", Address: "127.0.0.1", Service: p})
		}
		s.disks[id] = a
	}
	s.spdk = newClient(t, s.root)
	s.start()
	t.Cleanup(s.halt)
	return s
}

func (s *store) start() {
	s.t.Helper()
	var err error
	if s.stop, err = serveTarget(s.root); err != nil {
		s.t.Fatal(err)
	}
	ctx, nqn := context.Background(), s.id.Subsystem(s.node)
	check(s.t, s.spdk.NvmfCreateTransport(ctx, spdk.TransportParams{Type: "TCP"}))
	check(s.t, s.spdk.NvmfCreateSubsystem(ctx, spdk.SubsystemParams{NQN: nqn, SerialNumber: s.id.Serial(s.node), MaxNamespaces: 1024}))
	check(s.t, s.spdk.NvmfSubsystemAddHost(ctx, nqn, identity.HostNQN(s.node), ""))
	for _, id := range slices.Sorted(maps.Keys(s.disks)) {
		s.show(id)
	}
	for _, p := range s.ports {
		s.listen(p)
	}
}

func (s *store) listen(port string) {
	check(s.t, s.spdk.NvmfSubsystemAddListener(context.Background(), s.id.Subsystem(s.node), spdk.TransportID{Type: "TCP", Family: "IPv4", Address: "127.0.0.1", Service: port}))
}

func (s *store) show(id string) {
	s.t.Helper()
	a := s.disks[id]
	if _, err := s.spdk.Bdev(context.Background(), id); err != nil {
		_, err := s.spdk.BdevAIOCreate(context.Background(), spdk.BdevAIOCreateParams{Name: id, Filename: filepath.Join(s.root, id), BlockSizeBytes: 512})
		check(s.t, err)
	}
	_, err := s.spdk.NvmfSubsystemAddNs(context.Background(), a.SubsystemNqn, spdk.NvmeNamespace{NSID: a.Nsid, BdevName: id, UUID: a.Uuid, NGUID: strings.ToUpper(strings.ReplaceAll(a.Uuid, "-", ""))})
	check(s.t, err)
}

func (s *store) hide(id string) {
	s.t.Helper()
	check(s.t, s.spdk.NvmfSubsystemRemoveNs(context.Background(), s.disks[id].SubsystemNqn, s.disks[id].Nsid))
}

func (s *store) halt() {
	if s.stop != nil {
		check(s.t, s.stop())
		s.stop = nil
	}
}

func (s *store) content(id string) []byte {
	b, err := os.ReadFile(filepath.Join(s.root, id))
	check(s.t, err)
	return b
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func want(t testing.TB, k kind.Kind, err error) {
	t.Helper()
	if !errors.Is(err, k) {
		t.Fatalf("error is %v, want %s", err, k)
	}
}

// lab is a card: a target, its bridge, functions, and what is somebody else's on it.
type lab struct {
	t         testing.TB
	root      string
	functions *functiontest.Memory
	spdk      *spdk.Client
	conn      *grpc.ClientConn
	o         Options
	others    string // what the target had before any disk
}

// newLab runs a card with this many functions.
func newLab(t testing.TB, functions int) *lab {
	l := connectLab(t, shortDir(t), functions)
	stop, err := serveTarget(l.root)
	check(t, err)
	t.Cleanup(func() { check(t, stop()) })
	l.run()
	return l
}

// connectLab prepares a card whose target runs in root, now or later.
func connectLab(t testing.TB, root string, functions int) *lab {
	l := &lab{t: t, root: root, functions: &functiontest.Memory{Physical: 2, Virtual: uint16(functions + 4)}}
	l.spdk = newClient(t, root)
	l.functions.Check = func(ctx context.Context, nqn string) error {
		list, err := l.spdk.NvmfGetSubsystems(ctx, nqn)
		if err != nil {
			return err
		}
		if len(list) != 1 || len(list[0].Namespaces) != 1 || list[0].AllowAnyHost {
			return kind.Errorf(kind.Invalid, "subsystem %s is plugged before it is whole: %+v", nqn, list)
		}
		return nil
	}
	l.o = Options{DBPath: filepath.Join(root, "card.db"), Host: hostName, Interval: 200 * time.Millisecond, HoldGrace: 300 * time.Millisecond}
	for i := range functions {
		l.o.Functions = append(l.o.Functions, Function{Physical: 1, Virtual: uint16(i + 1)})
	}
	return l
}

// run starts the bridge and puts on the target what is somebody else's.
func (l *lab) run() {
	l.t.Cleanup(serveBridge(l.t, l.root, l.functions))
	var err error
	l.conn, err = attacherrpc.Dial(filepath.Join(l.root, "bridge"))
	check(l.t, err)
	l.t.Cleanup(func() { l.conn.Close() })
	l.o.Bridge = l.conn
}

func serveBridge(t testing.TB, root string, f opi.Functions) (stop func()) {
	client, err := spdk.New(spdk.Options{Socket: filepath.Join(root, "target")})
	check(t, err)
	b, err := opi.New(opi.Options{Target: client, Functions: f})
	check(t, err)
	nl, err := rpc.Listen(filepath.Join(root, "bridge"))
	check(t, err)
	server := grpc.NewServer(append(attacherrpc.ServerOptions(), grpc.ChainUnaryInterceptor(b.Refusals))...)
	b.Register(server)
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = server.Serve(nl) // ends with Stop
	}()
	return sync.OnceFunc(func() {
		server.Stop()
		<-done
		client.Close()
	})
}

const foreignNQN = "nqn.2014-08.org.example:foreign"

// strangers puts on the target what is not the card's: subsystems, one of another card, a
// volume, a connection to a store, a function.
func (l *lab) strangers(s *store) {
	ctx := l.t.Context()
	_, err := l.spdk.BdevMallocCreate(ctx, spdk.BdevMallocCreateParams{Name: "theirs", NumBlocks: 64, BlockSizeBytes: 512, UUID: uuid.NewString()})
	check(l.t, err)
	other := identity.Card{Host: "host2"}
	for _, nqn := range []string{foreignNQN, other.Subsystem("block\x00a"), s.id.Subsystem(hostName), "nqn.2025-01.io.github.thaw-project:card:host1:notours"} {
		check(l.t, l.spdk.NvmfCreateSubsystem(ctx, spdk.SubsystemParams{NQN: nqn, SerialNumber: "theirs"}))
		check(l.t, l.spdk.NvmfSubsystemAddHost(ctx, nqn, "nqn.2014-08.org.example:somebody", ""))
	}
	_, err = l.spdk.NvmfSubsystemAddNs(ctx, foreignNQN, spdk.NvmeNamespace{BdevName: "theirs"})
	check(l.t, err)
	fe := opiv1.NewFrontendNvmeServiceClient(l.conn)
	_, err = fe.CreateNvmeController(ctx, &opiv1.CreateNvmeControllerRequest{Parent: subsystemName(foreignNQN), NvmeController: pcie(Function{Physical: 0, Virtual: 0})})
	check(l.t, err)
	for _, name := range []string{"theirs", other.Remote("nqn.a", "nqn.b")} {
		foreign := newStore(l.t, 1, "f-"+name)
		a := foreign.disks["f-"+name]
		_, err = l.spdk.BdevNVMeAttachController(ctx, spdk.BdevNVMeAttachControllerParams{Name: name, Type: "TCP", Family: "IPv4", Address: "127.0.0.1", Service: foreign.ports[0], SubNQN: a.SubsystemNqn, HostNQN: a.HostNqn})
		check(l.t, err)
	}
	l.others = l.dump(false)
}

// dump is what the target has: what bears the card's names, or all else.
func (l *lab) dump(own bool) string {
	l.t.Helper()
	ctx, names := context.Background(), identity.Card{Host: hostName}
	var lines []string
	subsystems, err := l.spdk.NvmfGetSubsystems(ctx, "")
	check(l.t, err)
	for _, s := range subsystems {
		if names.OwnsSubsystem(s.NQN) == own {
			s.Listeners = nil
			lines = append(lines, fmt.Sprintf("subsystem %+v", s))
		}
	}
	remotes, err := l.spdk.BdevNVMeGetControllers(ctx, "")
	check(l.t, err)
	owns := func(bdev string) bool {
		return slices.ContainsFunc(remotes, func(r spdk.NVMeController) bool {
			return names.OwnsRemote(r.Name) && strings.HasPrefix(bdev, r.Name+"n")
		})
	}
	for _, r := range remotes {
		if names.OwnsRemote(r.Name) == own {
			lines = append(lines, "controller "+r.Name)
		}
	}
	bdevs, err := l.spdk.BdevGetBdevs(ctx, spdk.BdevGetBdevsParams{})
	check(l.t, err)
	for _, b := range bdevs {
		if owns(b.Name) == own {
			lines = append(lines, "bdev "+b.Name+" "+b.UUID)
		}
	}
	for f, nqn := range l.functions.Shown() {
		if names.OwnsSubsystem(nqn) == own {
			lines = append(lines, "function "+f.String()+" "+nqn)
		}
	}
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}

// card starts the card's attacher.
func (l *lab) card() *Card {
	l.t.Helper()
	c, err := New(l.o)
	check(l.t, err)
	l.t.Cleanup(func() { c.Close() })
	return c
}

func fromStore(s *store, id string) *attacherv1.AttachDiskRequest {
	return &attacherv1.AttachDiskRequest{Id: id, Purpose: attacherv1.Purpose_PURPOSE_BLOCK, Source: &attacherv1.AttachDiskRequest_Attachment{Attachment: s.disks[id]}}
}

func attach(t testing.TB, c attacherv1.CardClient, r *attacherv1.AttachDiskRequest) *attacherv1.CardDisk {
	t.Helper()
	d, err := c.AttachDisk(t.Context(), r)
	check(t, err)
	return d
}

func detach(t testing.TB, c attacherv1.CardClient, id string) {
	t.Helper()
	_, err := c.DetachDisk(t.Context(), &attacherv1.DetachDiskRequest{Id: id, Purpose: attacherv1.Purpose_PURPOSE_BLOCK})
	check(t, err)
}

func function(d *attacherv1.CardDisk) opi.Function {
	return opi.Function{Port: uint16(d.Function.Port), Physical: uint16(d.Function.PhysicalFunction), Virtual: uint16(d.Function.VirtualFunction)}
}

// whole tells what is wrong with what the target shows of a disk; nil when it is right.
func (l *lab) whole(d *attacherv1.CardDisk) error {
	list, err := l.spdk.NvmfGetSubsystems(context.Background(), d.SubsystemNqn)
	if err != nil {
		return err
	}
	s := list[0]
	if s.AllowAnyHost || len(s.Hosts) != 1 || s.Hosts[0].NQN != identity.HostNQN(hostName) || s.SerialNumber != d.Serial {
		return fmt.Errorf("subsystem %+v of %v", s, d)
	}
	if len(s.Namespaces) != 1 || s.Namespaces[0].UUID != d.Uuid || !strings.EqualFold(s.Namespaces[0].NGUID, strings.ReplaceAll(d.Uuid, "-", "")) || s.Namespaces[0].NSID != 1 {
		return fmt.Errorf("nvmeNamespaces %+v of %v", s.Namespaces, d)
	}
	if nqn := l.functions.Shown()[function(d)]; nqn != d.SubsystemNqn {
		return fmt.Errorf("function %s shows %q, not %s", function(d), nqn, d.SubsystemNqn)
	}
	return nil
}

// eventually waits for what must come within ten seconds.
func eventually(t testing.TB, what func() error) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		err := what()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
}

// connect connects to a disk as a host would, by a listener that is put there for it.
func (l *lab) connect(d *attacherv1.CardDisk) *host.Host {
	l.t.Helper()
	ctx := context.Background()
	port := freePort(l.t)
	_, err := opiv1.NewFrontendNvmeServiceClient(l.conn).CreateNvmeController(ctx, &opiv1.CreateNvmeControllerRequest{Parent: subsystemName(d.SubsystemNqn),
		NvmeController: &opiv1.NvmeController{Spec: &opiv1.NvmeControllerSpec{Trtype: opiv1.NvmeTransportType_NVME_TRANSPORT_TYPE_TCP,
			Endpoint: &opiv1.NvmeControllerSpec_FabricsId{FabricsId: &opiv1.FabricsEndpoint{Traddr: "127.0.0.1", Trsvcid: port, Adrfam: opiv1.NvmeAddressFamily_NVME_ADDRESS_FAMILY_IPV4}}}}})
	check(l.t, err)
	h, err := host.Connect(ctx, host.Config{Portals: []string{"127.0.0.1:" + port}, SubNQN: d.SubsystemNqn, HostNQN: identity.HostNQN(hostName), HostID: identity.HostID(hostName), LossTimeout: 5 * time.Second})
	check(l.t, err)
	return h
}

// read reads the whole disk, as the disk that it should be.
func (l *lab) read(d *attacherv1.CardDisk) []byte {
	l.t.Helper()
	h := l.connect(d)
	defer h.Close()
	all := h.NvmeNamespaces()
	if len(all) != 1 || all[0].UUID.String() != d.Uuid || all[0].NGUID != all[0].UUID {
		l.t.Fatalf("a host sees %+v, not %v", all, d)
	}
	dev, err := h.Open(all[0].NSID)
	check(l.t, err)
	defer dev.Close()
	b := make([]byte, dev.SizeBytes())
	_, err = dev.ReadAt(b, 0)
	check(l.t, err)
	return b
}

// clean checks that nothing of the card's is left, and nothing of others' was touched.
func (l *lab) clean() {
	l.t.Helper()
	if left := l.dump(true); left != "" {
		l.t.Fatalf("left behind:\n%s", left)
	}
	l.untouched()
}

func (l *lab) untouched() {
	l.t.Helper()
	if now := l.dump(false); l.others != "" && now != l.others {
		l.t.Fatalf("what is others' was\n%s\nand is\n%s", l.others, now)
	}
}

// process is a child that can be killed.
type process struct {
	t     testing.TB
	env   []string
	cmd   *exec.Cmd
	ended chan struct{}
}

// spawn starts a child and waits for its socket.
func spawn(t testing.TB, env, root, socket string, more ...string) *process {
	p := &process{t: t, env: append(append(os.Environ(), env+"="+root), more...)}
	p.start(filepath.Join(root, socket))
	t.Cleanup(p.kill)
	return p
}

func (p *process) start(socket string) {
	p.t.Helper()
	p.cmd = exec.Command(os.Args[0])
	p.cmd.Env = p.env
	var out bytes.Buffer
	p.cmd.Stderr = &out
	check(p.t, p.cmd.Start())
	p.ended = make(chan struct{})
	go func() {
		_ = p.cmd.Wait() // killed
		close(p.ended)
	}()
	for deadline := time.Now().Add(20 * time.Second); ; {
		if nc, err := net.Dial("unix", socket); err == nil {
			nc.Close()
			return
		}
		select {
		case <-p.ended:
			p.t.Fatalf("the child ended: %s", out.String())
		case <-time.After(2 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			p.t.Fatal("the child does not listen")
		}
	}
}

func (p *process) kill() {
	p.cmd.Process.Signal(syscall.SIGKILL) // it may have ended
	<-p.ended
}

// cardChild serves a card's attacher and kills itself at the step of THAW_TEST_STEP.
func cardChild(ctx context.Context, root string) error {
	conn, err := attacherrpc.Dial(filepath.Join(root, "bridge"))
	if err != nil {
		return err
	}
	defer conn.Close()
	o := Options{Bridge: conn, DBPath: filepath.Join(root, "card.db"), Host: hostName, Interval: 100 * time.Millisecond, HoldGrace: 300 * time.Millisecond}
	for i := range 4 {
		o.Functions = append(o.Functions, Function{Physical: 1, Virtual: uint16(i + 1)})
	}
	at := os.Getenv("THAW_TEST_STEP")
	c, err := open(o, func(step string) {
		if step == at {
			syscall.Kill(os.Getpid(), syscall.SIGKILL)
			select {}
		}
	})
	if err != nil {
		return err
	}
	nl, err := rpc.Listen(filepath.Join(root, "card"))
	if err != nil {
		return err
	}
	s := grpc.NewServer(attacherrpc.ServerOptions()...)
	attacherv1.RegisterCardServer(s, c)
	go func() {
		<-ctx.Done()
		c.Stop()
		s.Stop()
	}()
	err = s.Serve(nl)
	return errors.Join(err, c.Close())
}
