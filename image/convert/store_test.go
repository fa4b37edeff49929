package convert

import (
	"context"
	"encoding/json"
	"fmt"
	"math/rand"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"

	attacherv1 "github.com/thaw-project/thaw/api/attacher/v1"
	"github.com/thaw-project/thaw/attacher"
	"github.com/thaw-project/thaw/attacher/rpc"
	"github.com/thaw-project/thaw/image/block"
	"github.com/thaw-project/thaw/image/layer/torture"
	"github.com/thaw-project/thaw/keeper"
	"github.com/thaw-project/thaw/lvol"
	"github.com/thaw-project/thaw/node/present"
	"github.com/thaw-project/thaw/node/present/fuse"
	"github.com/thaw-project/thaw/target/bdev"
)

// The tests in this file convert into the real store, through the real
// presentation, served by another process, which some of them kill.

const (
	storeEnv  = "THAW_TEST_STORE"
	keeperArg = "thaw-test-keeper"
)

// storeMain is the serving process. It serves until SIGTERM.
func storeMain(dir string) error {
	pool := filepath.Join(dir, "pool")
	if _, err := os.Stat(filepath.Join(pool, "meta.db")); err != nil {
		if err := lvol.Create(lvol.CreateOptions{Dir: pool, CapacityBytes: 20 << 30}); err != nil {
			return err
		}
	}
	store, err := lvol.Open(lvol.Options{Dir: pool})
	if err != nil {
		return err
	}
	defer store.Close()
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM)
	defer stop()
	held, err := keeper.Ensure(ctx, keeper.Options{Socket: filepath.Join(dir, "keeper"), Command: []string{os.Args[0], keeperArg, filepath.Join(dir, "keeper")}})
	if err != nil {
		return err
	}
	defer held.Close()
	disks, err := fuse.New(fuse.Options{
		Dir: filepath.Join(dir, "dev"), StatePath: filepath.Join(dir, "fuse.json"), Keeper: held,
		Open: func(s present.Source, readOnly bool) (bdev.Device, error) { return store.OpenLvol(s.Lvol, readOnly) },
	})
	if err != nil {
		return err
	}
	a, err := attacher.New(attacher.Options{Lvols: store, Presenter: disks, DBPath: filepath.Join(dir, "attacher.db"), Target: "here"})
	if err != nil {
		return err
	}
	os.Remove(filepath.Join(dir, "s"))
	l, err := net.Listen("unix", filepath.Join(dir, "s"))
	if err != nil {
		return err
	}
	g := grpc.NewServer(rpc.ServerOptions()...)
	attacherv1.RegisterAttacherServer(g, a)
	done := make(chan struct{})
	go func() {
		defer close(done)
		g.Serve(l)
	}()
	<-ctx.Done()
	a.Stop()
	g.Stop()
	<-done
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	for _, err := range []error{a.Close(), disks.Teardown(ctx), held.Exit(ctx)} {
		if err != nil {
			return err
		}
	}
	return nil
}

// realStore is that process.
type realStore struct {
	t   testing.TB
	dir string
	cmd *exec.Cmd
	out *os.File
}

func newRealStore(t testing.TB) *realStore {
	t.Helper()
	needRoot(t)
	if _, err := os.Stat("/dev/fuse"); err != nil {
		t.Skip("needs /dev/fuse: modprobe fuse")
	}
	// Short: the path of a socket has at most 108 bytes.
	dir, err := os.MkdirTemp("", "thaw-convert-")
	must(t, err)
	s := &realStore{t: t, dir: dir}
	s.out, err = os.Create(filepath.Join(dir, "log"))
	must(t, err)
	s.start()
	t.Cleanup(func() {
		s.cmd.Process.Signal(unix.SIGTERM)
		if err := s.cmd.Wait(); err != nil {
			log, _ := os.ReadFile(s.out.Name())
			t.Errorf("serving process: %v: %s", err, log)
		}
		unix.Unmount(filepath.Join(dir, "dev"), unix.MNT_DETACH)
		if loops := loopsOn(dir); len(loops) > 0 {
			t.Errorf("loop devices were left: %v", loops)
		}
		s.out.Close()
		os.RemoveAll(dir)
	})
	return s
}

func (s *realStore) start() {
	s.t.Helper()
	s.cmd = exec.Command(os.Args[0], "-test.run=^$")
	s.cmd.Env = append(os.Environ(), storeEnv+"="+s.dir)
	s.cmd.Stdout, s.cmd.Stderr = s.out, s.out
	must(s.t, s.cmd.Start())
}

// kill kills the process with SIGKILL and starts it again.
func (s *realStore) kill() {
	s.t.Helper()
	s.cmd.Process.Kill()
	s.cmd.Wait()
	s.start()
}

func (s *realStore) client() attacherv1.AttacherClient {
	s.t.Helper()
	conn, err := rpc.Dial(filepath.Join(s.dir, "s"))
	must(s.t, err)
	s.t.Cleanup(func() { conn.Close() })
	c := attacherv1.NewAttacherClient(conn)
	_, err = call(context.Background(), c.GetStore, &attacherv1.GetStoreRequest{})
	if err != nil {
		log, _ := os.ReadFile(s.out.Name())
		s.t.Fatalf("%v: %s", err, log)
	}
	return c
}

func (s *realStore) options(source, dest string) Options {
	return Options{
		Source: source, Dest: dest, Mode: block.ModeOverlayfs, Filesystem: block.Erofs, VirtualSizeBytes: 100 << 30,
		Builders: builders, Attacher: s.client(), SpoolDir: s.t.TempDir(), DockerConfigDir: s.dir,
	}
}

// clean checks that only blocks are left, that the store is sound, and that what
// images do not use can be removed to the last cluster.
func (s *realStore) clean() {
	s.t.Helper()
	c := s.client()
	ctx := context.Background()
	var left []string
	for end := time.Now().Add(15 * time.Second); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		left = loopsOn(s.dir)
		lvols, err := c.ListLvols(ctx, &attacherv1.ListLvolsRequest{})
		must(s.t, err)
		for _, l := range lvols.Lvols {
			if _, err := block.ParseName(l.Name); err != nil {
				left = append(left, l.Name)
			}
		}
		shown, err := os.ReadDir(filepath.Join(s.dir, "dev"))
		must(s.t, err)
		for _, e := range shown {
			left = append(left, "disk "+e.Name())
		}
		if len(left) == 0 {
			break
		}
	}
	if len(left) > 0 {
		s.t.Errorf("left behind: %v", left)
	}
	r, err := c.CheckStore(ctx, &attacherv1.CheckStoreRequest{Scrub: true})
	must(s.t, err)
	for _, p := range r.Problems {
		s.t.Errorf("store: %v", p)
	}
}

// TestRealStore converts the torture image into the real store and compares what a
// node would see.
func TestRealStore(t *testing.T) {
	s := newRealStore(t)
	since := time.Now().Add(-time.Second)
	stack := torture.Stack()
	uppers := unpacked(t, stack)
	h := newHub(t)
	p := tortured()
	source := h.push(p, "source", "1")
	for _, v := range variants {
		t.Run(string(v.mode)+"/"+string(v.fs), func(t *testing.T) {
			o := s.options(source, h.host+"/dest:"+string(v.mode)+"-"+string(v.fs))
			o.Mode, o.Filesystem = v.mode, v.fs
			r := convert(t, o)
			checkManifest(t, h, p, r, "dest", v.mode, v.fs)
			written := int64(0)
			for i, l := range r.Images[0].Layers {
				written += l.WrittenBytes
				t.Logf("layer %d: %d bytes applied, %d written, %s", i, l.AppliedBytes, l.WrittenBytes, l.Duration.Round(time.Millisecond))
			}
			t.Logf("%d bytes written in %s", written, r.Duration.Round(time.Millisecond))
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			hold, err := o.Attacher.Hold(ctx, &attacherv1.HoldRequest{Owner: "test"})
			must(t, err)
			_, err = hold.Recv()
			must(t, err)
			for _, i := range []int{0, 3, len(stack) - 1} {
				name := r.Images[0].Layers[i].Block
				e, err := o.Attacher.Export(ctx, &attacherv1.ExportRequest{Lvol: name, Owner: "test", ReadOnly: true})
				must(t, err)
				var want map[string]torture.Node
				overlay(t, uppers[len(uppers)-1-i:], func(root string) { want = walk(t, root) })
				mounted(t, e.Path, v.mode, v.fs, i+1, func(root string) {
					for _, line := range torture.Diff(want, walk(t, root), since) {
						t.Errorf("block of layer %d (%s): %s", i, stack[i].Name, line)
					}
				})
				_, err = owned(ctx, o.Attacher.Unexport, &attacherv1.UnexportRequest{Lvol: name, Owner: "test"})
				must(t, err)
			}
			cancel()
			s.clean()
		})
	}
	c := s.client()
	images, err := c.ListImages(t.Context(), &attacherv1.ListImagesRequest{})
	must(t, err)
	for _, i := range images.Images {
		_, err := c.DeleteImage(t.Context(), &attacherv1.DeleteImageRequest{Reference: i.Reference})
		must(t, err)
	}
	if lvols, err := c.ListLvols(t.Context(), &attacherv1.ListLvolsRequest{}); err != nil || len(lvols.Lvols) > 0 {
		t.Errorf("lvols %v are left after all images were removed (%v)", lvols, err)
	}
}

// TestServerKilled kills the process that serves the blocks while they are written:
// the conversion pauses and succeeds.
func TestServerKilled(t *testing.T) {
	seed := time.Now().UnixNano()
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewSource(seed))
	for _, v := range variants {
		t.Run(string(v.mode)+"/"+string(v.fs), func(t *testing.T) {
			s := newRealStore(t)
			h := newHub(t)
			p := small(seed, 6)
			o := s.options(h.push(p, "source", "1"), h.host+"/dest:thaw")
			o.Mode, o.Filesystem = v.mode, v.fs
			slow(h, 5*time.Millisecond)
			done := make(chan error, 1)
			var r Result
			go func() {
				var err error
				r, err = Convert(t.Context(), o)
				done <- err
			}()
			kills := 0
			for running := true; running; {
				select {
				case err := <-done:
					must(t, err)
					running = false
				case <-time.After(time.Duration(300+random.Intn(700)) * time.Millisecond):
					if kills++; kills <= 4 {
						s.kill()
					}
				}
			}
			t.Logf("%d kills", kills)
			h.setFault(nil)
			checkManifest(t, h, p, r, "dest", v.mode, v.fs)
			s.clean()
			// What was written is whole.
			layers := r.Images[0].Layers
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			hold, err := o.Attacher.Hold(ctx, &attacherv1.HoldRequest{Owner: "test"})
			must(t, err)
			_, err = hold.Recv()
			must(t, err)
			e, err := o.Attacher.Export(ctx, &attacherv1.ExportRequest{Lvol: layers[len(layers)-1].Block, Owner: "test", ReadOnly: true})
			must(t, err)
			mounted(t, e.Path, v.mode, v.fs, len(layers), func(root string) {
				for i := range layers {
					got, err := os.ReadFile(fmt.Sprint(root, "/d/", i))
					if err != nil || string(got) != string(torture.Data(seed+int64(i), 300_000)) {
						t.Errorf("file of layer %d differs: %v", i, err)
					}
				}
			})
		})
	}
}

// TestConverterKilledOnRealStore kills converters with SIGKILL.
func TestConverterKilledOnRealStore(t *testing.T) {
	seed := time.Now().UnixNano()
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewSource(seed))
	for _, v := range variants {
		t.Run(string(v.mode)+"/"+string(v.fs), func(t *testing.T) {
			s := newRealStore(t)
			h := newHub(t)
			p := small(1, 8)
			o := s.options(h.push(p, "source", "1"), h.host+"/dest:thaw")
			o.Mode, o.Filesystem = v.mode, v.fs
			raw, err := json.Marshal(childArgs{filepath.Join(s.dir, "s"), o.Source, o.Dest, o.SpoolDir, o.DockerConfigDir, o.Mode, o.Filesystem, o.VirtualSizeBytes})
			must(t, err)
			slow(h, 4*time.Millisecond)
			for range 5 {
				cmd := exec.Command(os.Args[0], "-test.run=^$")
				cmd.Env = append(os.Environ(), childEnv+"="+string(raw))
				must(t, cmd.Start())
				time.Sleep(time.Duration(random.Intn(900)) * time.Millisecond)
				cmd.Process.Kill()
				if err := cmd.Wait(); err != nil && !strings.Contains(err.Error(), "killed") {
					t.Fatal(err)
				}
				s.clean()
			}
			h.setFault(nil)
			r := convert(t, o)
			checkManifest(t, h, p, r, "dest", v.mode, v.fs)
			s.clean()
		})
	}
}
