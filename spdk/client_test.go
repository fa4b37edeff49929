package spdk_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/spdk"
	"github.com/thaw-project/thaw/target"
	"github.com/thaw-project/thaw/target/rpc"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func shortDir(t testing.TB) string {
	dir, err := os.MkdirTemp("", "spdk-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// serve starts a target on the socket in root; stop ends it.
func serve(t testing.TB, root string) (socket string, stop func()) {
	tg, err := target.New(target.Options{Root: root})
	if err != nil {
		t.Fatal(err)
	}
	socket = filepath.Join(root, "sock")
	l, err := rpc.Listen(socket)
	if err != nil {
		t.Fatal(err)
	}
	s := rpc.Serve(l, rpc.Options{Methods: tg.Methods()})
	stop = sync.OnceFunc(func() {
		if err := errors.Join(s.Close(), tg.Close()); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(stop)
	return socket, stop
}

func client(t testing.TB, o spdk.Options) *spdk.Client {
	c, err := spdk.New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func must[R any](t testing.TB) func(R, error) R {
	return func(r R, err error) R {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
}

func want(t testing.TB, err error, k kind.Kind) {
	t.Helper()
	if !errors.Is(err, k) || kind.Of(err) != k {
		t.Errorf("%v, want %s", err, k)
	}
}

const nqn = "nqn.2014-08.org.example:disk"

// TestMethods goes through the life of lvols and their exports.
func TestMethods(t *testing.T) {
	socket, _ := serve(t, shortDir(t))
	c := client(t, spdk.Options{Socket: socket})
	ctx := t.Context()
	ok := func(err error) {
		t.Helper()
		if err != nil {
			t.Error(err)
		}
	}
	if v := must[spdk.Version](t)(c.GetVersion(ctx)); v.Fields.Major != 25 {
		t.Errorf("%+v", v)
	}
	ok(c.FrameworkWaitInit(ctx))
	name := must[string](t)(c.BdevMallocCreate(ctx, spdk.BdevMallocCreateParams{Name: "m0", NumBlocks: 64 << 8, BlockSizeBytes: 4096}))
	_, err := c.BdevMallocCreate(ctx, spdk.BdevMallocCreateParams{Name: "m0", NumBlocks: 64, BlockSizeBytes: 4096})
	want(t, err, kind.Exists)
	file := filepath.Join(shortDir(t), "f")
	ok(os.WriteFile(file, make([]byte, 32<<20), 0o600))
	must[string](t)(c.BdevAIOCreate(ctx, spdk.BdevAIOCreateParams{Name: "a0", Filename: file, BlockSizeBytes: 512}))
	if b := must[*spdk.Bdev](t)(c.Bdev(ctx, "a0")); b.Specific.AIO == nil || b.Specific.AIO.Filename != file || b.ProductName != spdk.ProductAIO || b.SizeBytes() != 32<<20 {
		t.Errorf("%+v", b)
	}
	_, err = c.BdevAIOCreate(ctx, spdk.BdevAIOCreateParams{Name: "a1", Filename: file})
	want(t, err, kind.InUse)

	must[string](t)(c.BdevLvolCreateLvstore(ctx, spdk.LvolStoreCreateParams{BdevName: name, Name: "lvs", ClusterSizeBytes: 1 << 20}))
	ok(c.BdevWaitForExamine(ctx))
	if l := must[[]spdk.LvolStore](t)(c.BdevLvolGetLvstores(ctx, "")); len(l) != 1 {
		t.Errorf("%+v", l)
	}
	if l := must[[]spdk.LvolStore](t)(c.BdevLvolGetLvstores(ctx, "lvs")); len(l) != 1 || l[0].ClusterSizeBytes != 1<<20 || l[0].BaseBdev != "m0" || l[0].FreeClusters == 0 {
		t.Errorf("%+v", l)
	}
	id := must[string](t)(c.BdevLvolCreate(ctx, spdk.LvolCreateParams{Name: "x", SizeMiB: 16, ThinProvision: true, StoreName: "lvs"}))
	_, err = c.BdevLvolCreate(ctx, spdk.LvolCreateParams{Name: "x", SizeMiB: 16, StoreName: "lvs"})
	want(t, err, kind.Exists)
	must[string](t)(c.BdevLvolSnapshot(ctx, "lvs/x", "s"))
	must[string](t)(c.BdevLvolClone(ctx, "lvs/s", "y"))
	_, err = c.BdevLvolClone(ctx, "lvs/no", "z")
	want(t, err, kind.NotFound)
	if b := must[*spdk.Bdev](t)(c.Bdev(ctx, "lvs/x")); b.UUID != id || b.Specific.Lvol == nil || b.Specific.Lvol.BaseSnapshot != "s" || !b.Specific.Lvol.Clone {
		t.Errorf("%+v", b)
	}
	if b := must[*spdk.Bdev](t)(c.Bdev(ctx, "lvs/s")); !slices.Contains(b.Specific.Lvol.Clones, "x") || !b.Specific.Lvol.Snapshot {
		t.Errorf("%+v", b.Specific.Lvol)
	}
	must[string](t)(c.BdevLvolCloneBdev(ctx, "a0", "lvs", "e"))
	ok(c.BdevLvolResize(ctx, "lvs/y", 20))
	ok(c.BdevLvolRename(ctx, "lvs/y", "z"))
	ok(c.BdevLvolDecoupleParent(ctx, "lvs/z"))
	ok(c.BdevLvolInflate(ctx, "lvs/x"))
	ok(c.BdevLvolSetParent(ctx, "lvs/x", "lvs/s"))
	ok(c.BdevLvolSetReadOnly(ctx, "lvs/z"))
	lvols := map[string]spdk.Lvol{}
	for _, l := range must[[]spdk.Lvol](t)(c.BdevLvolGetLvols(ctx, "lvs")) {
		lvols[l.Alias] = l
	}
	if len(lvols) != 4 || !lvols["lvs/e"].IsEsnapClone || lvols["lvs/e"].IsDegraded || !lvols["lvs/x"].IsClone || !lvols["lvs/s"].IsSnapshot || lvols["lvs/s"].Store.Name != "lvs" {
		t.Errorf("%+v", lvols)
	}
	must[string](t)(c.BdevMallocCreate(ctx, spdk.BdevMallocCreateParams{Name: "m1", NumBlocks: 32 << 8, BlockSizeBytes: 4096}))
	op := must[uint32](t)(c.BdevLvolStartShallowCopy(ctx, "lvs/s", "m1"))
	for {
		s := must[spdk.ShallowCopy](t)(c.BdevLvolCheckShallowCopy(ctx, op))
		if s.State == "complete" {
			break
		} else if s.State != "in progress" {
			t.Fatalf("%+v", s)
		}
	}

	ok(c.NvmfCreateTransport(ctx, spdk.TransportParams{Type: "TCP"}))
	if l := must[[]spdk.TransportParams](t)(c.NvmfGetTransports(ctx)); len(l) != 1 || l[0].Type != "TCP" {
		t.Errorf("%+v", l)
	}
	ok(c.NvmfCreateSubsystem(ctx, spdk.SubsystemParams{NQN: nqn, SerialNumber: "S1", ModelNumber: "M1"}))
	nguid := "00112233445566778899aabbccddeeff"
	uid := "0f1e2d3c-4b5a-6978-8796-a5b4c3d2e1f0"
	if n := must[uint32](t)(c.NvmfSubsystemAddNs(ctx, nqn, spdk.NvmeNamespace{NSID: 3, BdevName: "lvs/x", NGUID: nguid, UUID: uid})); n != 3 {
		t.Errorf("nsid %d", n)
	}
	ok(c.NvmfSubsystemAddHost(ctx, nqn, nqn+"-host", ""))
	ok(c.NvmfSubsystemAllowAnyHost(ctx, nqn, true))
	ok(c.NvmfSubsystemAllowAnyHost(ctx, nqn, false))
	free, err := net.Listen("tcp", "127.0.0.1:0")
	ok(err)
	_, port, _ := net.SplitHostPort(free.Addr().String())
	free.Close()
	at := spdk.TransportID{Type: "TCP", Family: "IPv4", Address: "127.0.0.1", Service: port}
	ok(c.NvmfSubsystemAddListener(ctx, nqn, at))
	l := must[[]spdk.Subsystem](t)(c.NvmfGetSubsystems(ctx, nqn))
	if len(l) != 1 || l[0].SerialNumber != "S1" || len(l[0].Hosts) != 1 || len(l[0].Listeners) != 1 || l[0].Listeners[0].Service != port || len(l[0].Namespaces) != 1 ||
		l[0].Namespaces[0].UUID != uid || !strings.EqualFold(l[0].Namespaces[0].NGUID, nguid) || l[0].Subtype != spdk.SubtypeNVMe {
		t.Errorf("%+v", l)
	}
	// A target finds its own devices in what it connects to, and answers no names.
	names := must[[]string](t)(c.BdevNVMeAttachController(ctx, spdk.BdevNVMeAttachControllerParams{Name: "r", Type: "TCP", Family: "IPv4", Address: "127.0.0.1", Service: port, SubNQN: nqn, HostNQN: nqn + "-host"}))
	if !slices.Equal(names, []string{"rn3"}) {
		t.Errorf("%q", names)
	}
	if r := must[*spdk.Bdev](t)(c.Bdev(ctx, "rn3")); r.UUID != uid || len(r.Specific.NVMe) != 1 || r.Specific.NVMe[0].Namespace.ID != 3 {
		t.Errorf("%+v", r)
	}
	if r := must[[]spdk.NVMeController](t)(c.BdevNVMeGetControllers(ctx, "r")); len(r) != 1 || len(r[0].Paths) != 1 || r[0].Paths[0].TransportID.Service != port {
		t.Errorf("%+v", r)
	}
	if h := must[[]spdk.SubsystemController](t)(c.NvmfSubsystemGetControllers(ctx, nqn)); len(h) != 1 || h[0].HostNQN != nqn+"-host" {
		t.Errorf("%+v", h)
	}
	_, err = c.BdevNVMeGetControllers(ctx, "no")
	want(t, err, kind.NotFound)
	ok(c.BdevNVMeDetachController(ctx, "r", spdk.TransportID{}))
	ok(c.NvmfSubsystemRemoveListener(ctx, nqn, at))
	ok(c.NvmfSubsystemRemoveHost(ctx, nqn, nqn+"-host"))
	ok(c.NvmfSubsystemRemoveNs(ctx, nqn, 3))
	ok(c.NvmfDeleteSubsystem(ctx, nqn))
	for _, n := range []string{"lvs/x", "lvs/z", "lvs/e", "lvs/s"} {
		ok(c.BdevLvolDelete(ctx, n))
	}
	ok(c.BdevLvolRenameLvstore(ctx, "lvs", "other"))
	ok(c.BdevLvolDeleteLvstore(ctx, "other"))
	ok(c.BdevMallocDelete(ctx, "m0"))
	ok(c.BdevMallocDelete(ctx, "m1"))
	ok(c.BdevAIODelete(ctx, "a0"))
	_, err = c.Bdev(ctx, "a0")
	want(t, err, kind.NotFound)

	// What this target does not have is told apart from what failed.
	_, err = c.BdevRBDCreate(ctx, spdk.RBDCreateParams{PoolName: "p", RBDName: "i", BlockSizeBytes: 4096})
	want(t, err, kind.Unsupported)
	var e *spdk.Error
	if !errors.As(err, &e) || e.Code != spdk.CodeMethodNotFound || e.Method != "bdev_rbd_create" {
		t.Errorf("%#v", err)
	}
	if _, err := c.NBDStartDisk(ctx, "a0", "/dev/nbd0"); err == nil {
		t.Error("no error")
	}
	if d := must[[]spdk.NBDDisk](t)(c.NBDGetDisks(ctx, "")); len(d) != 0 {
		t.Errorf("%+v", d)
	}
	if err := c.UblkCreateTarget(ctx, ""); err == nil {
		t.Error("no error without a kernel")
	}
	ok(c.Call(ctx, "ublk_get_disks", nil, nil))
	methods := must[[]string](t)(c.RPCGetMethods(ctx, true))
	if !slices.Contains(methods, "bdev_get_bdevs") {
		t.Errorf("%q", methods)
	}
}

// TestPipelining has many calls in flight at once, more than the bound.
func TestPipelining(t *testing.T) {
	socket, _ := serve(t, shortDir(t))
	c := client(t, spdk.Options{Socket: socket, MaxInFlight: 8})
	var owned sync.WaitGroup
	for i := range 100 {
		owned.Go(func() {
			name := fmt.Sprintf("m%d", i)
			if got, err := c.BdevMallocCreate(t.Context(), spdk.BdevMallocCreateParams{Name: name, NumBlocks: uint64(i + 1), BlockSizeBytes: 4096}); err != nil || got != name {
				t.Errorf("%s %v", got, err)
			}
			if b, err := c.Bdev(t.Context(), name); err != nil || b.NumBlocks != uint64(i+1) {
				t.Errorf("%+v %v", b, err)
			}
		})
	}
	owned.Wait()
	if l := must[[]spdk.Bdev](t)(c.BdevGetBdevs(t.Context(), spdk.BdevGetBdevsParams{})); len(l) != 100 {
		t.Errorf("%d bdevs", len(l))
	}
}

// TestWaiting has a call that waits beside others, which must not wait for it.
func TestWaiting(t *testing.T) {
	socket, _ := serve(t, shortDir(t))
	c := client(t, spdk.Options{Socket: socket})
	var owned sync.WaitGroup
	defer owned.Wait()
	owned.Go(func() {
		l, err := c.BdevGetBdevs(t.Context(), spdk.BdevGetBdevsParams{Name: "late", TimeoutMillis: 60_000})
		if err != nil || len(l) != 1 {
			t.Errorf("%+v %v", l, err)
		}
	})
	must[string](t)(c.BdevMallocCreate(t.Context(), spdk.BdevMallocCreateParams{Name: "late", NumBlocks: 8, BlockSizeBytes: 4096}))
}

// TestReconnect calls a target that ends and comes again.
func TestReconnect(t *testing.T) {
	root := shortDir(t)
	c := client(t, spdk.Options{Socket: filepath.Join(root, "sock")})
	_, err := c.GetVersion(t.Context())
	want(t, err, kind.Unavailable)
	if spdk.Unanswered(err) {
		t.Error("what was never sent is said to be unanswered")
	}
	for range 3 {
		_, stop := serve(t, root)
		must[spdk.Version](t)(c.GetVersion(t.Context()))
		stop()
		_, err := c.GetVersion(t.Context())
		want(t, err, kind.Unavailable)
	}
	c.Close()
	_, err = c.GetVersion(t.Context())
	want(t, err, kind.Unavailable)
}

// script is a server that does to each connection what the function says.
func script(t testing.TB, f func(n int, nc *net.UnixConn, in *bufio.Reader)) string {
	socket := filepath.Join(shortDir(t), "sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	var owned sync.WaitGroup
	var mu sync.Mutex
	var open []net.Conn
	owned.Go(func() {
		for n := 0; ; n++ {
			nc, err := l.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			open = append(open, nc)
			mu.Unlock()
			owned.Go(func() {
				defer nc.Close()
				f(n, nc.(*net.UnixConn), bufio.NewReader(nc))
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		mu.Lock()
		for _, nc := range open {
			nc.Close()
		}
		mu.Unlock()
		owned.Wait()
	})
	return socket
}

type wire struct {
	ID     uint64          `json:"id"`
	Method string          `json:"method"`
	Params json.RawMessage `json:"params"`
}

func request(in *bufio.Reader) (w wire) {
	line, _ := in.ReadBytes('\n')
	_ = json.Unmarshal(line, &w) // a test sees the zero request
	return w
}

// TestHostile calls servers that do not keep to the rules.
func TestHostile(t *testing.T) {
	for name, f := range map[string]func(nc *net.UnixConn, r wire){
		"garbage":          func(nc *net.UnixConn, _ wire) { io.WriteString(nc, "}}}}garbage") },
		"a wrong id":       func(nc *net.UnixConn, r wire) { fmt.Fprintf(nc, `{"jsonrpc":"2.0","id":%d,"result":true}`, r.ID+7) },
		"an id of no kind": func(nc *net.UnixConn, _ wire) { io.WriteString(nc, `{"jsonrpc":"2.0","id":{"a":1},"result":true}`) },
		"no id":            func(nc *net.UnixConn, _ wire) { io.WriteString(nc, `{"jsonrpc":"2.0","result":true}`) },
		"neither":          func(nc *net.UnixConn, r wire) { fmt.Fprintf(nc, `{"jsonrpc":"2.0","id":%d}`, r.ID) },
		"both": func(nc *net.UnixConn, r wire) {
			fmt.Fprintf(nc, `{"id":%d,"result":1,"error":{"code":-1,"message":""}}`, r.ID)
		},
		"an array":          func(nc *net.UnixConn, _ wire) { io.WriteString(nc, `[]`) },
		"half an answer":    func(nc *net.UnixConn, r wire) { fmt.Fprintf(nc, `{"id":%d,"resu`, r.ID); nc.CloseWrite() },
		"the end":           func(nc *net.UnixConn, _ wire) { nc.CloseWrite() },
		"a code of no kind": func(nc *net.UnixConn, r wire) { fmt.Fprintf(nc, `{"id":%d,"error":{"code":"x","message":1}}`, r.ID) },
		"a parse error": func(nc *net.UnixConn, _ wire) {
			io.WriteString(nc, `{"id":null,"error":{"code":-32700,"message":"no"}}`)
		},
		"deep nesting": func(nc *net.UnixConn, _ wire) { io.WriteString(nc, strings.Repeat("[", 100_000)) },
	} {
		t.Run(name, func(t *testing.T) {
			socket := script(t, func(n int, nc *net.UnixConn, in *bufio.Reader) {
				r := request(in)
				if n == 0 {
					f(nc, r)
					io.Copy(io.Discard, in)
					return
				}
				fmt.Fprintf(nc, `{"jsonrpc":"2.0","id":%d,"result":true}`, r.ID)
				io.Copy(io.Discard, in)
			})
			c := client(t, spdk.Options{Socket: socket})
			err := c.NvmfDeleteSubsystem(t.Context(), nqn)
			if !spdk.Unanswered(err) {
				t.Errorf("%v", err)
			}
			if !strings.Contains(fmt.Sprint(err), "nvmf_delete_subsystem") {
				t.Errorf("%v does not say what was called", err)
			}
			if err := c.NvmfDeleteSubsystem(t.Context(), nqn); err != nil {
				t.Errorf("the next call: %v", err)
			}
		})
	}
}

// TestEndless is a server whose answer has no end.
func TestEndless(t *testing.T) {
	socket := script(t, func(_ int, nc *net.UnixConn, in *bufio.Reader) {
		fmt.Fprintf(nc, `{"id":%d,"result":"`, request(in).ID)
		chunk := make([]byte, 1<<20)
		for i := range chunk {
			chunk[i] = 'x'
		}
		for {
			if _, err := nc.Write(chunk); err != nil {
				return
			}
		}
	})
	c := client(t, spdk.Options{Socket: socket})
	if err := c.NvmfDeleteSubsystem(t.Context(), nqn); !spdk.Unanswered(err) || !strings.Contains(err.Error(), "32 MiB") {
		t.Errorf("%v", err)
	}
}

// TestWrongResult is a server that answers with something else.
func TestWrongResult(t *testing.T) {
	socket := script(t, func(_ int, nc *net.UnixConn, in *bufio.Reader) {
		for r := request(in); r.ID != 0; r = request(in) {
			fmt.Fprintf(nc, `{"id":%d,"result":{"a":"b"}}`, r.ID)
		}
	})
	c := client(t, spdk.Options{Socket: socket})
	_, err := c.BdevMallocCreate(t.Context(), spdk.BdevMallocCreateParams{})
	want(t, err, kind.Corrupt)
	_, err = c.BdevGetBdevs(t.Context(), spdk.BdevGetBdevsParams{})
	want(t, err, kind.Corrupt)
	_, err = c.Bdev(t.Context(), "")
	want(t, err, kind.Invalid)
}

// TestAnyOrder is a server that answers the last request first.
func TestAnyOrder(t *testing.T) {
	const calls = 16
	socket := script(t, func(_ int, nc *net.UnixConn, in *bufio.Reader) {
		var list []wire
		for range calls {
			list = append(list, request(in))
		}
		slices.Reverse(list)
		for _, r := range list {
			fmt.Fprintf(nc, `{"id":%d,"result":%s}`, r.ID, r.Params)
		}
		io.Copy(io.Discard, in)
	})
	c := client(t, spdk.Options{Socket: socket})
	var owned sync.WaitGroup
	defer owned.Wait()
	for i := range calls {
		owned.Go(func() {
			var got struct{ N int }
			if err := c.Call(t.Context(), "echo", struct{ N int }{i}, &got); err != nil || got.N != i {
				t.Errorf("%d: %+v %v", i, got, err)
			}
		})
	}
}

// TestSlow is a server that reads and answers nothing: calls end in time, one that was
// given up keeps its place until its answer comes, and in the end the connection goes.
func TestSlow(t *testing.T) {
	again := make(chan struct{})
	socket := script(t, func(n int, nc *net.UnixConn, in *bufio.Reader) {
		if n == 0 {
			io.Copy(io.Discard, in)
			close(again)
			return
		}
		for r := request(in); r.ID != 0; r = request(in) {
			fmt.Fprintf(nc, `{"id":%d,"result":true}`, r.ID)
		}
	})
	c := client(t, spdk.Options{Socket: socket, MaxInFlight: 1, Deadline: time.Second})
	ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	err := c.NvmfDeleteSubsystem(ctx, nqn)
	want(t, err, kind.Unavailable)
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v", err)
	}
	ctx, cancel = context.WithCancel(t.Context())
	cancel()
	want(t, c.NvmfDeleteSubsystem(ctx, nqn), kind.Canceled)
	want(t, c.NvmfDeleteSubsystem(t.Context(), nqn), kind.Unavailable)
	<-again
	if err := c.NvmfDeleteSubsystem(t.Context(), nqn); err != nil {
		t.Error(err)
	}
}

// TestDeaf is a server that does not even read.
func TestDeaf(t *testing.T) {
	done := make(chan struct{})
	socket := script(t, func(int, *net.UnixConn, *bufio.Reader) { <-done })
	c := client(t, spdk.Options{Socket: socket, MaxInFlight: 1000})
	ctx, cancel := context.WithCancel(t.Context())
	var owned sync.WaitGroup
	for range 1000 { // more bytes than a socket takes
		owned.Go(func() {
			err := c.Call(ctx, "m", map[string]string{"a": strings.Repeat("x", 30<<10)}, nil)
			if err == nil {
				t.Error("no error")
			}
		})
	}
	cancel()
	owned.Wait()
	close(done)
}

// TestRetry is a server that breaks off once: what reads is called again, what changes is
// not.
func TestRetry(t *testing.T) {
	var mu sync.Mutex
	var seen []string
	socket := script(t, func(n int, nc *net.UnixConn, in *bufio.Reader) {
		for r := request(in); r.ID != 0; r = request(in) {
			mu.Lock()
			seen = append(seen, r.Method)
			first := len(seen)%2 == 1
			mu.Unlock()
			if first {
				return
			}
			fmt.Fprintf(nc, `{"id":%d,"result":[]}`, r.ID)
		}
	})
	c := client(t, spdk.Options{Socket: socket})
	if _, err := c.NvmfGetSubsystems(t.Context(), ""); err != nil {
		t.Error(err)
	}
	if err := c.NvmfDeleteSubsystem(t.Context(), nqn); !spdk.Unanswered(err) {
		t.Errorf("%v", err)
	}
	mu.Lock()
	defer mu.Unlock()
	if got := strings.Join(seen, " "); got != "nvmf_get_subsystems nvmf_get_subsystems nvmf_delete_subsystem" {
		t.Error(got)
	}
}

// TestClose ends a call in flight.
func TestClose(t *testing.T) {
	asked := make(chan struct{}, 2)
	socket := script(t, func(_ int, _ *net.UnixConn, in *bufio.Reader) {
		request(in)
		asked <- struct{}{}
		io.Copy(io.Discard, in)
	})
	c := client(t, spdk.Options{Socket: socket})
	var owned sync.WaitGroup
	owned.Go(func() { want(t, c.NvmfDeleteSubsystem(t.Context(), nqn), kind.Unavailable) })
	owned.Go(func() { want(t, c.BdevLvolInflate(t.Context(), "x"), kind.Unavailable) })
	<-asked
	<-asked
	c.Close()
	owned.Wait()
}

func TestOptions(t *testing.T) {
	_, err := spdk.New(spdk.Options{})
	want(t, err, kind.Invalid)
	_, err = spdk.New(spdk.Options{Socket: "x", MaxInFlight: -1})
	want(t, err, kind.Invalid)
	c := client(t, spdk.Options{Socket: "/nonexistent/sock"})
	want(t, c.Call(t.Context(), "m", map[string]string{"a": strings.Repeat("x", 40<<10)}, nil), kind.Unavailable)
}

// BenchmarkCall measures one call after the other, and 32 at once.
func BenchmarkCall(b *testing.B) {
	socket, _ := serve(b, shortDir(b))
	c := client(b, spdk.Options{Socket: socket})
	b.Run("1", func(b *testing.B) {
		for b.Loop() {
			must[spdk.Version](b)(c.GetVersion(b.Context()))
		}
	})
	b.Run("32", func(b *testing.B) {
		b.SetParallelism(16)
		b.RunParallel(func(p *testing.PB) {
			for p.Next() {
				must[spdk.Version](b)(c.GetVersion(b.Context()))
			}
		})
	})
}
