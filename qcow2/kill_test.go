package qcow2

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// The test binary is its own victim: with THAW_QCOW2_VICTIM set it writes to an image
// until it is killed.
func TestMain(m *testing.M) {
	if os.Getenv("THAW_QCOW2_VICTIM") != "" {
		if err := victim(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

const (
	killWorkers = 3
	killSize    = 6 << 20
)

// victim runs killWorkers sequences of operations, each in its own third of the disk,
// and counts what was acknowledged in a file, one number per worker.
func victim() error {
	path := os.Getenv("THAW_QCOW2_VICTIM")
	seed, err := strconv.ParseUint(os.Getenv("THAW_SEED"), 10, 64)
	if err != nil {
		return err
	}
	base, err := os.Open(filepath.Join(filepath.Dir(path), "base.raw"))
	if err != nil {
		return err
	}
	st, err := base.Stat()
	if err != nil {
		return err
	}
	acks, err := os.OpenFile(path+".acks", os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	i, err := Open(path, OpenOptions{Backing: base, BackingSizeBytes: st.Size(), CacheBytes: 1})
	if err != nil {
		return err
	}
	fmt.Println("started")
	var wg sync.WaitGroup
	errs := make([]error, killWorkers)
	for w := range killWorkers {
		wg.Go(func() {
			ops := killOps(seed, w)
			for n := uint64(1); ; n++ {
				if errs[w] = do(i, ops()); errs[w] != nil {
					return
				}
				var raw [8]byte
				binary.LittleEndian.PutUint64(raw[:], n)
				if _, errs[w] = acks.WriteAt(raw[:], int64(8*w)); errs[w] != nil {
					return
				}
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// killOps generates the operations of a worker.
func killOps(seed uint64, worker int) func() op {
	r := rand.New(rand.NewPCG(seed, uint64(worker)))
	const part = killSize / killWorkers
	return func() op {
		// Parts meet inside a cluster: 2 MiB and 24 sectors.
		o := randomOp(r, part-24*sector, 65536, "write write write write write zero discard discard flush")
		o.off += int64(worker) * part
		return o
	}
}

func TestSIGKILLLosesNothingAcknowledged(t *testing.T) {
	needQemu(t)
	seed := seedOf(t)
	r := newRand(seed)
	rounds := 12
	if testing.Short() {
		rounds = 3
	}
	for _, lazy := range []bool{true, false} {
		t.Run(fmt.Sprintf("lazy=%t", lazy), func(t *testing.T) {
			fx := newFixture(t, r, killSize, killSize-100000, CreateOptions{LazyRefcounts: lazy, ClusterBits: 14})
			for round := range rounds {
				opSeed := r.Uint64()
				acked := killRound(t, fx, opSeed, time.Duration(r.Int64N(int64(120*time.Millisecond))))
				afterKill(t, fx, lazy)

				i := fx.open(t)
				for w := range killWorkers {
					ops := killOps(opSeed, w)
					for range acked[w] {
						fx.want.apply(ops())
					}
					settle(t, i, fx.want, ops())
				}
				if err := verify(i, fx.want, 0, killSize); err != nil {
					t.Fatalf("round %d, acknowledged %v: %v", round, acked, err)
				}
				if round%2 == 0 {
					if err := i.Close(); err != nil {
						t.Fatal(err)
					}
					qemuAgrees(t, fx.path, fx.want)
				} else if err := i.Abandon(); err != nil { // killed again right after recovery
					t.Fatal(err)
				}
			}
			if report, err := Repair(fx.path); err != nil || !report.Clean {
				t.Fatalf("%+v, %v", report, err)
			}
			qemuAgrees(t, fx.path, fx.want)
		})
	}
}

// killRound starts a victim, kills it after the time, and returns what it counted.
func killRound(t *testing.T, fx *fixture, seed uint64, after time.Duration) (acked [killWorkers]uint64) {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	os.Remove(fx.path + ".acks")
	cmd := exec.Command(exe)
	cmd.Env = append(os.Environ(), "THAW_QCOW2_VICTIM="+fx.path, "THAW_SEED="+strconv.FormatUint(seed, 10))
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(out, make([]byte, 1)); err != nil {
		cmd.Wait()
		t.Fatalf("the victim did not start: %s", stderr.String())
	}
	time.Sleep(after)
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err == nil || cmd.ProcessState.ExitCode() >= 0 {
		t.Fatalf("the victim ended by itself: %v %s", err, stderr.String())
	}
	raw, err := os.ReadFile(fx.path + ".acks")
	if err != nil {
		t.Fatal(err)
	}
	for w := range acked {
		if len(raw) >= 8*w+8 {
			acked[w] = binary.LittleEndian.Uint64(raw[8*w:])
		}
	}
	return acked
}

// settle takes over what the operation in flight at the kill left: each sector old or
// new. Sectors at its ends, which it changes in part, may be a mix only of these two.
func settle(t *testing.T, i *Image, want model, inFlight op) {
	t.Helper()
	if inFlight.name == "flush" {
		return
	}
	from := inFlight.off / sector * sector
	to := min((inFlight.off+inFlight.n+sector-1)/sector*sector, int64(len(want)))
	old := append(model(nil), want[from:to]...)
	next := append(model(nil), want...)
	next.apply(inFlight)
	got := make([]byte, to-from)
	if _, err := i.ReadAt(got, from); err != nil && err != io.EOF {
		t.Fatal(err)
	}
	for at := int64(0); at < to-from; at += sector {
		is := string(got[at : at+sector])
		switch is {
		case string(old[at : at+sector]):
		case string(next[from+at : from+at+sector]):
			copy(want[from+at:], is)
		default:
			t.Fatalf("sector at %d is neither old nor new after a kill inside %v", from+at, inFlight)
		}
	}
}

// afterKill checks what the file alone says: with qemu-img, leaks at most; with lazy
// refcounts, only counts that wait for a repair under the dirty mark.
func afterKill(t *testing.T, fx *fixture, lazy bool) {
	t.Helper()
	report, err := Check(fx.path)
	if err != nil {
		t.Fatal(err)
	}
	if report.hopeless || !lazy && report.Corruptions > 0 {
		t.Fatalf("after a kill: %+v", report)
	}
	copyPath := fx.path + ".copy"
	tool(t, "cp", "--sparse=always", fx.path, copyPath)
	defer os.Remove(copyPath)
	out, err := exec.Command("qemu-img", "check", copyPath).CombinedOutput()
	var exit *exec.ExitError
	if !lazy && err != nil && (!errors.As(err, &exit) || exit.ExitCode() != 3) {
		t.Fatalf("qemu-img check after a kill: %v\n%s", err, out)
	}
	exec.Command("qemu-img", "check", "-q", "-r", "all", copyPath).Run()
	if out := tool(t, "qemu-img", "check", copyPath); !strings.Contains(out, "No errors") {
		t.Fatal(out)
	}
}
