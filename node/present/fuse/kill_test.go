package fuse

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/thaw-project/thaw/keeper"
	"github.com/thaw-project/thaw/node/mount"
	"github.com/thaw-project/thaw/node/present"
)

var (
	killRounds = flag.Int("kill.rounds", 12, "how often the tests kill a serving process")
	killSeed   = flag.Uint64("kill.seed", 0, "seed of the moments; 0 takes the time")
)

func seeded(t *testing.T) *rand.Rand {
	seed := *killSeed
	if seed == 0 {
		seed = uint64(time.Now().UnixNano())
	}
	t.Logf("-kill.seed=%d -kill.rounds=%d", seed, *killRounds)
	return rand.New(rand.NewPCG(seed, 0))
}

// serverJob is what a serving process that a test kills has to do.
type serverJob struct {
	Base  string
	Disks []present.Disk // ID, Source, ReadOnly
	// Churn are disks which the serving process itself mounts and unmounts all the
	// time, by the name of their file system.
	Churn map[string]present.Disk
}

// serverMain serves until it is killed or told to withdraw everything and end.
func serverMain(jobPath string) {
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))
	die := func(err error) {
		if err != nil {
			log.Error("server", "error", err)
			os.Exit(1)
		}
	}
	raw, err := os.ReadFile(jobPath)
	die(err)
	var job serverJob
	die(json.Unmarshal(raw, &job))
	socket := filepath.Join(job.Base, "keeper.sock")
	ctx := context.Background()
	k, err := keeper.Ensure(ctx, keeper.Options{Socket: socket, Command: []string{os.Args[0], keeperArg, socket}})
	die(err)
	p, err := New(Options{Dir: filepath.Join(job.Base, "dev"), StatePath: filepath.Join(job.Base, "fuse.json"), Keeper: k, Open: openFile, Logger: log})
	die(err)
	if !p.Survives() {
		fmt.Println("no resend")
		select {}
	}
	for _, d := range job.Disks {
		_, err := p.Present(ctx, d.ID, d.Source, d.ReadOnly)
		die(err)
	}
	fmt.Println("ready")
	stop := make(chan struct{})
	var churn sync.WaitGroup
	for fs, d := range job.Churn {
		churn.Go(func() {
			target := filepath.Join(job.Base, "churn-"+fs)
			mounter := map[string]func(context.Context, present.Disk, string) error{"erofs": mount.ErofsReadOnly, "ext4": mount.Ext4}[fs]
			for {
				die(mounter(ctx, d, target))
				select {
				case <-stop:
					die(mount.Unmount(ctx, target))
					return
				default:
				}
				die(mount.Unmount(ctx, target))
			}
		})
	}
	switch line, _ := bufio.NewReader(os.Stdin).ReadString('\n'); strings.TrimSpace(line) {
	case "end":
		close(stop)
		churn.Wait()
		for _, d := range job.Disks {
			die(p.Withdraw(ctx, d.ID))
		}
		die(p.Teardown(ctx))
		die(k.Exit(ctx))
		fmt.Println("ended")
		os.Exit(0)
	}
	select {} // our parent died, or only wants to kill us
}

// victim is a running serving process.
type victim struct {
	cmd   *exec.Cmd
	in    io.WriteCloser
	lines chan string
	ready bool
}

func (pl place) victim(t *testing.T) *victim {
	t.Helper()
	v := &victim{cmd: exec.Command(os.Args[0], serverArg, filepath.Join(pl.base, "job")), lines: make(chan string, 4)}
	v.cmd.Stderr = os.Stderr
	var err error
	if v.in, err = v.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := v.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := v.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(v.lines)
		for s := bufio.NewScanner(out); s.Scan(); {
			v.lines <- s.Text()
		}
	}()
	return v
}

func (v *victim) wait(t *testing.T, want string) {
	t.Helper()
	if want == "ready" {
		if v.ready {
			return
		}
		v.ready = true
	}
	select {
	case line := <-v.lines:
		if line == "no resend" {
			t.Skip("this kernel cannot send requests again: Linux 6.9 is needed")
		}
		if line != want {
			t.Fatalf("serving process said %q, want %q", line, want)
		}
	case <-time.After(30 * time.Second):
		t.Fatalf("serving process did not say %q", want)
	}
}

func (v *victim) kill() {
	v.cmd.Process.Kill()
	for range v.lines {
	}
	v.cmd.Wait()
}

func (pl place) job(t *testing.T, churn map[string]present.Disk, disks ...present.Disk) {
	t.Helper()
	raw, err := json.Marshal(serverJob{Base: pl.base, Disks: disks, Churn: churn})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(pl.base, "job"), raw, 0o600); err != nil {
		t.Fatal(err)
	}
}

// tree makes files of random content and returns their hashes by name.
func (pl place) tree(t testing.TB, name string, files int, rnd *rand.Rand) (string, map[string][32]byte) {
	t.Helper()
	dir := filepath.Join(pl.base, name)
	sums := make(map[string][32]byte)
	for i := range files {
		data := make([]byte, rnd.IntN(2<<20))
		for j := 0; j+8 <= len(data); j += 8 {
			le.PutUint64(data[j:], rnd.Uint64())
		}
		file := filepath.Join(fmt.Sprintf("d%d", i%7), fmt.Sprintf("f%d", i))
		if err := os.MkdirAll(filepath.Join(dir, filepath.Dir(file)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, file), data, 0o644); err != nil {
			t.Fatal(err)
		}
		sums[file] = sha256.Sum256(data)
	}
	return dir, sums
}

func fileSource(path string) present.Source {
	return present.Source{Kind: present.SourceLvol, Lvol: filepath.Base(path), Path: path}
}

// uncache makes the next reads of a file come from below.
func uncache(f *os.File) { unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED) }

// load is a set of goroutines that use the disks; its first error is what counts.
type load struct {
	wg   sync.WaitGroup
	stop chan struct{}
	errs chan error
	ops  atomic.Int64
	max  atomic.Int64 // longest operation, nanoseconds
}

func (l *load) run(step func() error) {
	l.wg.Go(func() {
		for {
			select {
			case <-l.stop:
				return
			default:
			}
			start := time.Now()
			if err := step(); err != nil {
				select {
				case l.errs <- err:
				default:
				}
				return
			}
			l.ops.Add(1)
			if d := int64(time.Since(start)); d > l.max.Load() {
				l.max.Store(d)
			}
		}
	})
}

// readFiles reads one random file and compares it.
func readFiles(dir string, names []string, sums map[string][32]byte, rnd *rand.Rand) error {
	name := names[rnd.IntN(len(names))]
	f, err := os.Open(filepath.Join(dir, name))
	if err != nil {
		return err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return err
	}
	if sum := sums[name]; !bytes.Equal(h.Sum(nil), sum[:]) {
		return fmt.Errorf("%s has other content", name)
	}
	uncache(f)
	return nil
}

// rewriter writes blocks of a file, syncs, and reads past all caches that the
// blocks are what was written.
func rewriter(f *os.File, rnd *rand.Rand) (func() error, error) {
	const blocks, blockBytes = 256, 16 << 10
	if err := f.Truncate(blocks * blockBytes); err != nil {
		return nil, err
	}
	var want [blocks]uint64 // 0: never written
	fill := func(b []byte, seed uint64) {
		r := rand.New(rand.NewPCG(seed, 1))
		for i := 0; i < len(b); i += 8 {
			le.PutUint64(b[i:], r.Uint64())
		}
	}
	got, exp := make([]byte, blockBytes), make([]byte, blockBytes)
	return func() error {
		for range 1 + rnd.IntN(8) {
			i, seed := rnd.IntN(blocks), rnd.Uint64()|1
			fill(exp, seed)
			if _, err := f.WriteAt(exp, int64(i)*blockBytes); err != nil {
				return err
			}
			want[i] = seed
		}
		if err := f.Sync(); err != nil {
			return err
		}
		uncache(f)
		for range 8 {
			i := rnd.IntN(blocks)
			clear(exp)
			if want[i] != 0 {
				fill(exp, want[i])
			}
			if _, err := f.ReadAt(got, int64(i)*blockBytes); err != nil {
				return err
			}
			if !bytes.Equal(got, exp) {
				return fmt.Errorf("block %d of %s is not what was written", i, f.Name())
			}
		}
		return nil
	}, nil
}

// TestKillIsOnlyAPause kills the serving process, and now and then the keeper, at
// random moments while EROFS on the file and ext4 on loop devices over it are in
// use. Nobody may see an error, and nothing is mounted again.
func TestKillIsOnlyAPause(t *testing.T) {
	needFUSE(t)
	needTools(t, "mkfs.erofs", "mke2fs")
	rnd := seeded(t)
	child := func() *rand.Rand { return rand.New(rand.NewPCG(rnd.Uint64(), 2)) }
	pl := newPlace(t)
	ctx := context.Background()

	dir, sums := pl.tree(t, "tree", 24, rnd)
	erofs, ext4, ext4ro := filepath.Join(pl.base, "erofs.img"), filepath.Join(pl.base, "ext4.img"), filepath.Join(pl.base, "ext4ro.img")
	run(t, "mkfs.erofs", "--quiet", erofs, dir)
	padTo512(t, erofs)
	run(t, "mke2fs", "-q", "-t", "ext4", "-F", ext4, "128M")
	run(t, "mke2fs", "-q", "-t", "ext4", "-F", "-d", dir, ext4ro, "128M")
	names := make([]string, 0, len(sums))
	for name := range sums {
		names = append(names, name)
	}

	disks := []present.Disk{
		{ID: "erofs", Source: fileSource(erofs), ReadOnly: true},
		{ID: "ext4", Source: fileSource(ext4)},
		{ID: "ext4ro", Source: fileSource(ext4ro), ReadOnly: true},
	}
	ext4own := filepath.Join(pl.base, "ext4own.img")
	run(t, "mke2fs", "-q", "-t", "ext4", "-F", ext4own, "32M")
	disks = append(disks, present.Disk{ID: "own", Source: fileSource(ext4own)})
	for i := range disks {
		disks[i].Path = filepath.Join(pl.dir, disks[i].ID)
	}
	for _, d := range []string{"churn-erofs", "churn-ext4"} {
		if err := os.Mkdir(filepath.Join(pl.base, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	pl.job(t, map[string]present.Disk{"erofs": disks[0], "ext4": disks[3]}, disks...)
	v := pl.victim(t)
	defer func() { v.kill() }()
	v.wait(t, "ready")

	mnt := func(id string) string {
		m := filepath.Join(pl.base, "mnt-"+id)
		if err := os.Mkdir(m, 0o755); err != nil {
			t.Fatal(err)
		}
		return m
	}
	m0, m1, m2 := mnt("erofs"), mnt("ext4"), mnt("ext4ro")
	for _, err := range []error{
		mount.ErofsReadOnly(ctx, disks[0], m0),
		mount.Ext4(ctx, disks[1], m1),
		mount.Ext4ReadOnly(ctx, disks[2], m2),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	steady := func() []string { // without those that come and go
		return slices.DeleteFunc(mountsBelow(t, pl.base), func(m string) bool { return strings.Contains(m, "/churn-") })
	}
	before := steady()

	l := &load{stop: make(chan struct{}), errs: make(chan error, 1)}
	r1, r2, r3 := child(), child(), child()
	l.run(func() error { return readFiles(m0, names, sums, r1) })
	l.run(func() error { return readFiles(m0, names, sums, r2) })
	l.run(func() error { return readFiles(m2, names, sums, r3) })
	var files []*os.File
	for i := range 2 {
		f, err := os.Create(filepath.Join(m1, fmt.Sprint("rw", i)))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		files = append(files, f)
		step, err := rewriter(f, child())
		if err != nil {
			t.Fatal(err)
		}
		l.run(step)
	}
	r4 := child()
	raw, err := os.ReadFile(erofs)
	if err != nil {
		t.Fatal(err)
	}
	l.run(func() error { // opens and closes, whose count must stay right
		f, err := os.Open(disks[0].Path)
		if err != nil {
			return err
		}
		defer f.Close()
		b := make([]byte, 4096)
		off := r4.Int64N(int64(len(raw)) - 4096)
		if _, err := f.ReadAt(b, off); err != nil || !bytes.Equal(b, raw[off:][:4096]) {
			return fmt.Errorf("read at %d of the disk: wrong content or %w", off, err)
		}
		uncache(f)
		if _, err := os.ReadDir(pl.dir); err != nil {
			return err
		}
		_, err = os.Stat(filepath.Join(pl.dir, "no such disk"))
		if !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("a missing disk: %v", err)
		}
		return nil
	})

	keepers := 0
	for round := range *killRounds {
		if round%4 == 3 {
			// The keeper dies and the server puts the descriptor into another.
			// Both at once would be too much.
			v.wait(t, "ready")
			k := pl.keeper(t)
			unix.Kill(k.PID(), unix.SIGKILL)
			keepers++
			for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
				if held, err := k.List(ctx); err == nil && len(held) == 1 {
					break
				} else if time.Now().After(deadline) {
					t.Fatalf("the next keeper holds %v, %v", held, err)
				}
			}
			k.Close()
		} else {
			if rnd.IntN(4) > 0 {
				v.wait(t, "ready")
			}
			time.Sleep(time.Duration(rnd.Int64N(int64(80 * time.Millisecond))))
		}
		v.kill()
		v = pl.victim(t)
		select {
		case err := <-l.errs:
			t.Fatalf("round %d: %v", round, err)
		default:
		}
	}
	v.wait(t, "ready")
	ops := l.ops.Load()
	time.Sleep(200 * time.Millisecond)
	if l.ops.Load() == ops {
		t.Error("nothing moves any more")
	}
	close(l.stop)
	l.wg.Wait()
	select {
	case err := <-l.errs:
		t.Fatal(err)
	default:
	}
	t.Logf("%d kills of the server, %d of the keeper, %d operations, the longest took %v",
		*killRounds, keepers, l.ops.Load(), time.Duration(l.max.Load()))
	if after := steady(); fmt.Sprint(after) != fmt.Sprint(before) {
		t.Errorf("mounts were %v, are %v", before, after)
	}

	for _, f := range files {
		f.Close()
	}
	for _, m := range []string{m0, m1, m2} {
		if err := mount.Unmount(ctx, m); err != nil {
			t.Error(err)
		}
	}
	// Counts of open files are exact in the end, so that all can be withdrawn.
	io.WriteString(v.in, "end\n")
	v.wait(t, "ended")
	v.cmd.Wait()
	for _, image := range []string{ext4, ext4own} {
		if out, err := exec.Command("e2fsck", "-fn", image).CombinedOutput(); err != nil {
			t.Errorf("e2fsck %s: %v\n%s", image, err, out)
		}
	}
	for _, d := range disks {
		if dev, err := mount.FindLoop(d.Path); err == nil {
			t.Errorf("%s is left", dev)
		}
	}
}

func padTo512(t testing.TB, path string) {
	t.Helper()
	st, err := os.Stat(path)
	if err == nil {
		err = os.Truncate(path, (st.Size()+511)&^511)
	}
	if err != nil {
		t.Fatal(err)
	}
}
