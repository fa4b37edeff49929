package imagemgmt_test

import (
	"bufio"
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/thaw-project/thaw/keeper"
	"github.com/thaw-project/thaw/lvol"
	"github.com/thaw-project/thaw/node/imagemgmt"
	"github.com/thaw-project/thaw/node/present"
	"github.com/thaw-project/thaw/node/present/fuse"
	"github.com/thaw-project/thaw/target/bdev"
)

// The test binary is also the keeper and the process that the test kills.
const (
	keeperArg = "test-keeper"
	workerArg = "test-worker"
)

func childMain() {
	if len(os.Args) < 3 {
		return
	}
	var err error
	switch os.Args[1] {
	case keeperArg:
		err = keeper.Run(context.Background(), keeper.Options{Socket: os.Args[2]})
	case workerArg:
		err = work(os.Args[2], os.Args[3])
	default:
		return
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// host is image-mgmt of a directory over the real store and presentation.
type host struct {
	store     *lvol.Store
	keeper    *keeper.Client
	presenter *fuse.Presenter
	manager   *imagemgmt.Manager
}

func openHost(dir string) (*host, error) {
	var h host
	var err error
	if h.store, err = lvol.Open(lvol.Options{Dir: filepath.Join(dir, "pool")}); err != nil {
		return nil, err
	}
	socket := filepath.Join(dir, "keeper.sock")
	if h.keeper, err = keeper.Ensure(ctx, keeper.Options{Socket: socket, Command: []string{os.Args[0], keeperArg, socket}}); err != nil {
		return nil, err
	}
	h.presenter, err = fuse.New(fuse.Options{
		Dir: filepath.Join(dir, "dev"), StatePath: filepath.Join(dir, "fuse.json"), Keeper: h.keeper,
		Open: func(source present.Source, readOnly bool) (bdev.Device, error) {
			v, err := h.store.OpenLvol(source.Lvol, readOnly)
			if err != nil {
				return nil, err
			}
			return v, nil
		},
	})
	if err != nil {
		return nil, err
	}
	h.manager, err = imagemgmt.New(imagemgmt.Options{
		Presenter: h.presenter, DBPath: filepath.Join(dir, "imagemgmt.db"),
		Lookup: func(_ context.Context, block imagemgmt.Block) error { _, err := h.store.Get(block.Name); return err },
	})
	return &h, err
}

const killBlocks, killUsers = 3, 2

// work attaches and detaches at random until it is killed, and says before each call
// what it is about to do, and after it that it is done.
func work(dir, seed string) error {
	h, err := openHost(dir)
	if err != nil {
		return err
	}
	n, err := strconv.ParseUint(seed, 10, 64)
	if err != nil {
		return err
	}
	fmt.Println("ready")
	rng := rand.New(rand.NewPCG(n, 0))
	for {
		b, u := fmt.Sprintf("block-%d", rng.IntN(killBlocks)), fmt.Sprintf("user-%d", rng.IntN(killUsers))
		op := "attach"
		if rng.IntN(2) == 0 {
			op = "detach"
		}
		fmt.Println("begin", op, b, u)
		if op == "attach" {
			_, err = h.manager.Attach(ctx, imagemgmt.Block{Name: b}, u)
		} else {
			err = h.manager.Detach(ctx, b, u)
		}
		if err != nil {
			return err
		}
		fmt.Println("done", op, b, u)
	}
}

// TestKilledProcess kills a process that attaches and detaches. Whatever it was told is
// done must be so in the next one, what it was about to do may be, and the kernel shows
// the disks of exactly the blocks in use.
func TestKilledProcess(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root: run the tests as root")
	}
	if _, err := os.Stat("/dev/fuse"); err != nil {
		t.Skip("no /dev/fuse: load the fuse module")
	}
	dir, err := os.MkdirTemp("", "thaw-imagemgmt-") // short, for the socket in it
	must(t, err)
	defer os.RemoveAll(dir)
	defer unix.Unmount(filepath.Join(dir, "dev"), unix.MNT_DETACH) // of a failed test
	pool := filepath.Join(dir, "pool")
	must(t, lvol.Create(lvol.CreateOptions{Dir: pool, CapacityBytes: 1 << 30}))
	store, err := lvol.Open(lvol.Options{Dir: pool})
	must(t, err)
	for i := range killBlocks {
		_, err := store.Create(fmt.Sprintf("block-%d", i), blockBytes)
		must(t, err)
	}
	must(t, store.Close())
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 1))

	used := make(map[string]map[string]bool) // by block, users
	for i := range killBlocks {
		used[fmt.Sprintf("block-%d", i)] = make(map[string]bool)
	}
	calls := 0
	for round := range 8 {
		cmd := exec.Command(os.Args[0], workerArg, dir, fmt.Sprint(seed+uint64(round)))
		cmd.Stderr = os.Stderr
		out, err := cmd.StdoutPipe()
		must(t, err)
		must(t, cmd.Start())
		lines := bufio.NewScanner(out)
		if !lines.Scan() || lines.Text() != "ready" {
			cmd.Wait()
			t.Fatalf("the process said %q", lines.Text())
		}
		timer := time.AfterFunc(time.Duration(rng.IntN(60_000))*time.Microsecond, func() { cmd.Process.Kill() })
		var open []string // begun and not done
		for lines.Scan() {
			f := strings.Fields(lines.Text())
			if len(f) != 4 {
				break // cut off
			}
			open = f
			if f[0] == "done" {
				used[f[2]][f[3]] = f[1] == "attach"
				open = nil
				calls++
			}
		}
		cmd.Wait()
		timer.Stop()

		h, err := openHost(dir)
		must(t, err)
		var shown []string
		list, err := h.manager.List(ctx)
		must(t, err)
		got := make(map[string][]string)
		for _, a := range list {
			got[a.Block] = a.Users
			shown = append(shown, a.Block)
		}
		for b, users := range used {
			if open != nil && open[2] == b { // either way is right
				users[open[3]] = slices.Contains(got[b], open[3])
			}
			var want []string
			for _, u := range slices.Sorted(maps.Keys(users)) {
				if users[u] {
					want = append(want, u)
				}
			}
			if !slices.Equal(got[b], want) {
				t.Errorf("round %d: block %s has users %q, want %q (interrupted: %q)", round, b, got[b], want, open)
			}
		}
		disks, err := h.presenter.List(ctx)
		must(t, err)
		var presented []string
		for _, d := range disks {
			presented = append(presented, d.ID)
		}
		if !slices.Equal(presented, shown) {
			t.Errorf("round %d: presented %q, attached %q", round, presented, shown)
		}
		must(t, h.manager.Close())
		must(t, h.presenter.Close())
		must(t, h.keeper.Close())
		must(t, h.store.Close())
	}
	t.Logf("%d calls", calls)
	if calls == 0 {
		t.Error("the processes did nothing")
	}
	h, err := openHost(dir)
	must(t, err)
	for b := range used {
		for i := range killUsers {
			must(t, h.manager.Detach(ctx, b, fmt.Sprintf("user-%d", i)))
		}
	}
	must(t, h.manager.Close())
	must(t, h.presenter.Teardown(ctx))
	must(t, h.keeper.Exit(ctx))
	must(t, h.store.Close())
}

// BenchmarkAttachFuse is Attach through the real presentation.
func BenchmarkAttachFuse(b *testing.B) {
	if os.Geteuid() != 0 {
		b.Skip("mounting needs root: run as root")
	}
	dir, err := os.MkdirTemp("", "thaw-imagemgmt-")
	must(b, err)
	defer os.RemoveAll(dir)
	must(b, lvol.Create(lvol.CreateOptions{Dir: filepath.Join(dir, "pool"), CapacityBytes: 1 << 30}))
	h, err := openHost(dir)
	must(b, err)
	_, err = h.store.Create("block", blockBytes)
	must(b, err)
	var took []time.Duration
	for b.Loop() {
		begin := time.Now()
		_, err := h.manager.Attach(ctx, imagemgmt.Block{Name: "block"}, "u")
		must(b, err)
		took = append(took, time.Since(begin))
		must(b, h.manager.Detach(ctx, "block", "u"))
	}
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)/2].Microseconds()), "attach-p50-us")
	must(b, h.manager.Close())
	must(b, h.presenter.Teardown(ctx))
	must(b, h.keeper.Exit(ctx))
	must(b, h.store.Close())
}
