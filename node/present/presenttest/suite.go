package presenttest

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/node/mount"
	"github.com/thaw-project/thaw/node/present"
)

// Conformance holds a presenter to what present.Presenter says, from outside of the
// process that serves: every test has a serving process of its own, and uses the disks
// as the kernel shows them. It needs root. TestMain must call Child first.
func Conformance(t *testing.T, s Subject) {
	if s.Source == nil {
		s.Source = DefaultSource
	}
	s.ImageBytes = cmp.Or(s.ImageBytes, 8<<20)
	s.Rounds = cmp.Or(s.Rounds, 5)
	for _, c := range []struct {
		name     string
		writable bool
		test     func(*place)
	}{
		{"Contract", false, (*place).contract},
		{"ReadOnly", false, (*place).readOnly},
		{"Writable", true, (*place).writable},
		{"Discard", true, (*place).discard},
		{"BigReads", false, (*place).bigReads},
		{"InUse", false, (*place).inUse},
		{"Mounted", false, (*place).mounted},
		{"SameNameOtherContent", false, (*place).sameName},
		{"OrderlyRestart", false, (*place).restart},
		{"Kill", false, (*place).kill},
		{"KillWhileWriting", true, (*place).killWriting},
		{"Concurrent", false, (*place).concurrent},
	} {
		if c.writable && s.ReadOnlyOnly {
			continue
		}
		t.Run(c.name, func(t *testing.T) {
			pl := &place{T: t, s: s, dir: t.TempDir(), ctx: context.Background()}
			run := filepath.Join(pl.dir, "run")
			t.Cleanup(func() {
				if t.Failed() && s.Abandon != nil {
					s.Abandon(run)
				}
			})
			pl.h = startHost(t, run)
			c.test(pl)
			if t.Failed() {
				return
			}
			if err := pl.h.teardown(); err != nil {
				t.Errorf("tear down: %v", err)
			}
			if s.Left != nil {
				s.Left(t, run)
			}
		})
	}
}

// place is one test's machine.
type place struct {
	*testing.T
	s   Subject
	dir string
	ctx context.Context
	h   *host
}

// image makes a file of content that seed decides, and returns what presents it.
func (pl *place) image(name string, readOnly bool, seed uint64) (present.Source, []byte) {
	pl.Helper()
	data := make([]byte, pl.s.ImageBytes)
	fill(data, seed)
	path := filepath.Join(pl.dir, name)
	if err := os.WriteFile(path, data, 0o600); err != nil {
		pl.Fatal(err)
	}
	return pl.s.Source(path, readOnly), data
}

func fill(b []byte, seed uint64) {
	r := rand.NewPCG(seed, 1)
	for i := 0; i+8 <= len(b); i += 8 {
		*(*uint64)(unsafe.Pointer(&b[i])) = r.Uint64()
	}
}

func (pl *place) present(id string, source present.Source, readOnly bool) present.Disk {
	pl.Helper()
	d, err := pl.h.Present(pl.ctx, id, source, readOnly)
	if err != nil {
		pl.Fatal(err)
	}
	return d
}

func (pl *place) withdraw(id string) {
	pl.Helper()
	if err := pl.h.Withdraw(pl.ctx, id); err != nil {
		pl.Fatal(err)
	}
}

func (pl *place) open(d present.Disk, flags int) *user {
	pl.Helper()
	f, err := openDisk(d.Path, flags)
	if err != nil {
		pl.Fatal(err)
	}
	return f
}

func (pl *place) wantKind(err error, k kind.Kind) {
	pl.Helper()
	if kind.Of(err) != k {
		pl.Fatalf("got error %v, want kind %q", err, k)
	}
}

func (pl *place) wantContent(d present.Disk, want []byte) {
	pl.Helper()
	f := pl.open(d, unix.O_RDONLY)
	defer f.close()
	f.uncache()
	got := make([]byte, len(want))
	if _, err := f.ReadAt(got, 0); err != nil {
		pl.Fatalf("read %s: %v", d.ID, err)
	}
	if !bytes.Equal(got, want) {
		pl.Fatalf("%s has other content from byte %d", d.ID, firstDifference(got, want))
	}
}

func firstDifference(a, b []byte) int {
	for i := range a {
		if a[i] != b[i] {
			return i
		}
	}
	return len(a)
}

func (pl *place) contract() {
	ctx := pl.ctx
	if list, err := pl.h.List(ctx); err != nil || len(list) != 0 {
		pl.Fatalf("a new presenter lists %+v, %v", list, err)
	}
	source, data := pl.image("one", true, 1)
	other, otherData := pl.image("two", true, 2)
	b := pl.present("b", source, true)
	if b.ID != "b" || b.Source != source || b.SizeBytes != int64(len(data)) || !b.ReadOnly || !filepath.IsAbs(b.Path) {
		pl.Fatalf("disk %+v", b)
	}
	var st unix.Stat_t
	if err := unix.Stat(b.Path, &st); err != nil {
		pl.Fatal(err)
	}
	if isBlock := st.Mode&unix.S_IFMT == unix.S_IFBLK; isBlock != b.Block {
		pl.Errorf("Block is %t, and it is a block device: %t", b.Block, isBlock)
	}
	pl.wantContent(b, data)
	c := pl.present("c", other, true)
	a := pl.present("a", other, true)
	// One source under two ids may be one disk, but two sources are never.
	if a.Path == b.Path || c.Path == b.Path {
		pl.Errorf("paths %s, %s, %s", a.Path, b.Path, c.Path)
	}
	pl.wantContent(a, otherData)
	if again := pl.present("b", source, true); again != b {
		pl.Errorf("the same again: %+v, was %+v", again, b)
	}
	_, err := pl.h.Present(ctx, "b", other, true)
	pl.wantKind(err, kind.Exists)
	if !pl.s.ReadOnlyOnly {
		_, err = pl.h.Present(ctx, "b", source, false)
		pl.wantKind(err, kind.Exists)
	}
	for _, id := range []string{"", ".", "..", "a/b", "a b", "ä", string(bytes.Repeat([]byte("x"), 129))} {
		_, err = pl.h.Present(ctx, id, source, true)
		pl.wantKind(err, kind.Invalid)
	}
	missing := pl.s.Source(filepath.Join(pl.dir, "missing"), true)
	_, err = pl.h.Present(ctx, "missing", missing, true)
	pl.wantKind(err, kind.NotFound)
	if err := pl.h.Withdraw(ctx, "missing"); err != nil {
		pl.Errorf("withdraw what failed to be presented: %v", err)
	}
	if list, err := pl.h.List(ctx); err != nil || !slices.Equal(list, []present.Disk{a, b, c}) {
		pl.Errorf("list: %+v, %v", list, err)
	}
	pl.withdraw("b")
	pl.withdraw("b")
	pl.withdraw("never was")
	if list, err := pl.h.List(ctx); err != nil || !slices.Equal(list, []present.Disk{a, c}) {
		pl.Errorf("list after b went: %+v, %v", list, err)
	}
	pl.withdraw("a")
	if list, err := pl.h.List(ctx); err != nil || !slices.Equal(list, []present.Disk{c}) {
		pl.Errorf("list after a went: %+v, %v", list, err)
	}
	pl.wantContent(c, otherData)
}

func (pl *place) readOnly() {
	source, data := pl.image("one", true, 1)
	d := pl.present("ro", source, true)
	if f, err := openDisk(d.Path, unix.O_RDWR); err == nil {
		// Some kernels refuse only the write.
		_, err := f.WriteAt(make([]byte, 4096), 0)
		if err == nil {
			err = f.sync()
		}
		f.close()
		if err == nil {
			pl.Error("a read-only disk takes a write")
		}
	}
	pl.wantContent(d, data)
	if raw, err := os.ReadFile(source.Path); err != nil || !bytes.Equal(raw, data) {
		pl.Error("what is behind a read-only disk has changed")
	}
}

func (pl *place) writable() {
	source, want := pl.image("one", false, 1)
	d := pl.present("rw", source, false)
	if d.ReadOnly {
		pl.Fatalf("%+v", d)
	}
	f := pl.open(d, unix.O_RDWR)
	r := rand.New(rand.NewPCG(3, 3))
	for i := range 64 {
		n := 512 * (1 + r.IntN(64))
		off := 512 * r.IntN((len(want)-n)/512)
		fill(want[off:off+n], uint64(i))
		if _, err := f.WriteAt(want[off:off+n], int64(off)); err != nil {
			pl.Fatal(err)
		}
	}
	if err := f.sync(); err != nil {
		pl.Fatal(err)
	}
	if raw, err := os.ReadFile(source.Path); err != nil || !bytes.Equal(raw, want) {
		pl.Errorf("after fsync what is behind differs, %v", err)
	}
	f.close()
	pl.wantContent(d, want)
	// What was not synced arrives with Withdraw at the latest.
	f = pl.open(d, unix.O_RDWR)
	fill(want[:8192], 99)
	if _, err := f.WriteAt(want[:8192], 0); err != nil {
		pl.Fatal(err)
	}
	f.close()
	pl.withdraw("rw")
	if raw, err := os.ReadFile(source.Path); err != nil || !bytes.Equal(raw, want) {
		pl.Errorf("after Withdraw what is behind differs, %v", err)
	}
}

func (pl *place) discard() {
	source, want := pl.image("one", false, 1)
	d := pl.present("rw", source, false)
	f := pl.open(d, unix.O_RDWR)
	defer f.close()
	const off, n = 1 << 20, 256 << 10
	var err error
	if d.Block {
		arg := [2]uint64{off, n}
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(f.fd), unix.BLKDISCARD, uintptr(unsafe.Pointer(&arg))); errno != 0 {
			err = errno
		}
	} else {
		err = unix.Fallocate(f.fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
	}
	if err != nil {
		pl.Fatalf("discard: %v", err)
	}
	if !pl.s.NoDiscard {
		clear(want[off:][:n])
		f.uncache()
		got := make([]byte, len(want))
		if _, err := f.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
			pl.Errorf("after a discard: %v, differs from byte %d", err, firstDifference(got, want))
		}
	}
}

func (pl *place) bigReads() {
	source, want := pl.image("one", true, 1)
	d := pl.present("ro", source, true)
	var readers sync.WaitGroup
	for i := range 4 {
		readers.Go(func() {
			f, err := openDisk(d.Path, unix.O_RDONLY)
			if err != nil {
				pl.Error(err)
				return
			}
			defer f.close()
			r := rand.New(rand.NewPCG(uint64(i), 4))
			buf := make([]byte, 4<<20)
			for range 4 {
				f.uncache()
				b := buf[:1+r.IntN(len(buf))]
				off := r.IntN(len(want) - len(b) + 1)
				if _, err := f.ReadAt(b, int64(off)); err != nil || !bytes.Equal(b, want[off:][:len(b)]) {
					pl.Errorf("read %d bytes at %d: %v, or other content", len(b), off, err)
					return
				}
			}
		})
	}
	readers.Wait()
}

func (pl *place) inUse() {
	source, want := pl.image("one", true, 1)
	d := pl.present("ro", source, true)
	f := pl.open(d, unix.O_RDONLY)
	pl.wantKind(pl.h.Withdraw(pl.ctx, "ro"), kind.InUse)
	pl.wantKind(pl.h.teardown(), kind.InUse)
	if list, err := pl.h.List(pl.ctx); err != nil || !slices.Equal(list, []present.Disk{d}) {
		pl.Fatalf("after a refused withdrawal: %+v, %v", list, err)
	}
	f.uncache()
	got := make([]byte, len(want))
	if _, err := f.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
		pl.Errorf("after a refused withdrawal: %v", err)
	}
	// The next process knows it, too.
	pl.h.kill()
	pl.h.start()
	pl.wantKind(pl.h.Withdraw(pl.ctx, "ro"), kind.InUse)
	f.close()
	pl.withdraw("ro")
}

func (pl *place) mounted() {
	path := filepath.Join(pl.dir, "ext4")
	// Blocks of 4 KiB: some targets offer no smaller ones.
	if out, err := exec.Command("mke2fs", "-q", "-t", "ext4", "-b", "4096", "-F", path, "16M").CombinedOutput(); err != nil {
		pl.Skipf("mke2fs: %v %s", err, out)
	}
	d := pl.present("fs", pl.s.Source(path, true), true)
	target := filepath.Join(pl.dir, "mnt")
	if err := os.Mkdir(target, 0o755); err != nil {
		pl.Fatal(err)
	}
	if err := mount.Ext4ReadOnly(pl.ctx, d, target); err != nil {
		pl.Fatal(err)
	}
	mounted := true
	defer func() {
		if mounted {
			mount.Unmount(pl.ctx, target)
		}
	}()
	pl.wantKind(pl.h.Withdraw(pl.ctx, "fs"), kind.InUse)
	if _, err := os.ReadDir(target); err != nil {
		pl.Errorf("after a refused withdrawal: %v", err)
	}
	if err := mount.Unmount(pl.ctx, target); err != nil {
		pl.Fatal(err)
	}
	mounted = false
	pl.withdraw("fs")
}

// sameName presents one disk after the other under one id: no page of one may be seen in
// the next.
func (pl *place) sameName() {
	for i := range 4 {
		source, want := pl.image(fmt.Sprint("content", i), true, uint64(i))
		d := pl.present("disk", source, true)
		pl.wantContent(d, want)
		pl.withdraw("disk")
		if f, err := openDisk(d.Path, unix.O_RDONLY); err == nil {
			b := make([]byte, 4096)
			_, err := f.ReadAt(b, 0)
			f.close()
			if err == nil {
				pl.Fatalf("a withdrawn disk at %s can be read", d.Path)
			}
		}
	}
}

func (pl *place) restart() {
	source, want := pl.image("one", true, 1)
	d := pl.present("ro", source, true)
	f := pl.open(d, unix.O_RDONLY)
	defer f.close()
	for range 2 {
		if err := pl.h.close(); err != nil {
			pl.Fatal(err)
		}
		pl.h.start()
		if list, err := pl.h.List(pl.ctx); err != nil || !slices.Equal(list, []present.Disk{d}) {
			pl.Fatalf("after a restart: %+v, %v", list, err)
		}
		if again := pl.present("ro", source, true); again != d {
			pl.Fatalf("the same again: %+v, was %+v", again, d)
		}
		f.uncache()
		got := make([]byte, len(want))
		if _, err := f.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
			pl.Fatalf("after a restart: %v", err)
		}
	}
	f.close()
	pl.withdraw("ro")
}

// load is a set of goroutines that use disks; its first error is what counts.
type load struct {
	wg      sync.WaitGroup
	stop    chan struct{}
	errs    chan error
	steps   atomic.Int64
	longest atomic.Int64 // nanoseconds
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
			l.steps.Add(1)
			for took := int64(time.Since(start)); ; {
				if old := l.longest.Load(); took <= old || l.longest.CompareAndSwap(old, took) {
					break
				}
			}
		}
	})
}

// killRounds kills the serving process under load and starts the next one.
func (pl *place) killRounds(l *load) {
	r := rand.New(rand.NewPCG(uint64(time.Now().UnixNano()), 5))
	moved := func() {
		pl.Helper()
		for was, deadline := l.steps.Load(), time.Now().Add(answerWait); l.steps.Load() < was+3; time.Sleep(time.Millisecond) {
			select {
			case err := <-l.errs:
				pl.Fatal(err)
			default:
			}
			if time.Now().After(deadline) {
				pl.Fatalf("nothing moved in %v", answerWait)
			}
		}
	}
	defer func() {
		close(l.stop)
		if pl.Failed() && pl.h.tryStart() != nil {
			return // its users wait for ever
		}
		l.wg.Wait()
		pl.Logf("%d kills, %d steps, the longest took %v", pl.s.Rounds, l.steps.Load(), time.Duration(l.longest.Load()))
	}()
	for range pl.s.Rounds {
		moved()
		time.Sleep(time.Duration(r.Int64N(int64(30 * time.Millisecond))))
		pl.h.kill()
		time.Sleep(time.Duration(r.Int64N(int64(30 * time.Millisecond))))
		pl.h.start()
	}
	moved()
}

// reader reads at random places, past the page cache.
func (pl *place) reader(d present.Disk, want []byte, seed uint64) (func() error, func()) {
	f := pl.open(d, unix.O_RDONLY)
	r := rand.New(rand.NewPCG(seed, 6))
	got := make([]byte, 64<<10)
	return func() error {
		off := r.IntN(len(want) - len(got))
		if _, err := f.ReadAt(got, int64(off)); err != nil {
			return fmt.Errorf("read at %d of %s: %w", off, d.ID, err)
		}
		if !bytes.Equal(got, want[off:][:len(got)]) {
			return fmt.Errorf("%s has other content at %d", d.ID, off)
		}
		f.uncache()
		return nil
	}, f.close
}

func (pl *place) kill() {
	l := &load{stop: make(chan struct{}), errs: make(chan error, 1)}
	var disks []present.Disk
	var closers []func()
	for i := range 2 {
		id := fmt.Sprint("disk", i)
		source, want := pl.image(id, true, uint64(i))
		d := pl.present(id, source, true)
		disks = append(disks, d)
		for j := range 2 {
			step, done := pl.reader(d, want, uint64(2*i+j))
			closers = append(closers, done)
			l.run(step)
		}
	}
	pl.killRounds(l)
	if list, err := pl.h.List(pl.ctx); err != nil || !slices.Equal(list, disks) {
		pl.Errorf("after the kills: %+v, %v; was %+v", list, err, disks)
	}
	pl.wantKind(pl.h.Withdraw(pl.ctx, "disk0"), kind.InUse)
	for _, c := range closers {
		c()
	}
	pl.withdraw("disk0")
}

// killWriting rewrites blocks and reads them back past all caches while servers are
// killed: nothing may be lost, nor come back.
func (pl *place) killWriting() {
	source, want := pl.image("rw", false, 1)
	d := pl.present("rw", source, false)
	const blockBytes = 16 << 10
	l := &load{stop: make(chan struct{}), errs: make(chan error, 1)}
	const writers = 2
	share := len(want) / writers
	var files []*user
	for w := range writers {
		f := pl.open(d, unix.O_RDWR)
		files = append(files, f)
		r := rand.New(rand.NewPCG(uint64(w), 7))
		mine := want[w*share:][:share]
		got := make([]byte, blockBytes)
		l.run(func() error {
			for range 1 + r.IntN(8) {
				i := r.IntN(share / blockBytes)
				block := mine[i*blockBytes:][:blockBytes]
				fill(block, r.Uint64())
				if _, err := f.WriteAt(block, int64(w*share+i*blockBytes)); err != nil {
					return fmt.Errorf("write: %w", err)
				}
			}
			if err := f.sync(); err != nil {
				return fmt.Errorf("sync: %w", err)
			}
			f.uncache()
			i := r.IntN(share / blockBytes)
			if _, err := f.ReadAt(got, int64(w*share+i*blockBytes)); err != nil {
				return fmt.Errorf("read: %w", err)
			}
			if !bytes.Equal(got, mine[i*blockBytes:][:blockBytes]) {
				return fmt.Errorf("block %d of writer %d is not what was written", i, w)
			}
			return nil
		})
	}
	pl.killRounds(l)
	for _, f := range files {
		f.close()
	}
	pl.wantContent(d, want)
	pl.withdraw("rw")
	if raw, err := os.ReadFile(source.Path); err != nil || !bytes.Equal(raw, want) {
		pl.Errorf("what is behind differs from byte %d, %v", firstDifference(raw, want), err)
	}
}

func (pl *place) concurrent() {
	source, want := pl.image("one", true, 1)
	var wg sync.WaitGroup
	for i := range 6 {
		wg.Go(func() {
			id := fmt.Sprint("disk", i%3) // two at a time for each
			for range 4 {
				d, err := pl.h.Present(pl.ctx, id, source, true)
				if err != nil {
					pl.Error(err)
					return
				}
				if f, err := openDisk(d.Path, unix.O_RDONLY); err == nil {
					b := make([]byte, 4096)
					// Another may withdraw it, and even present another there.
					if _, err := f.ReadAt(b, 4096); err == nil && !bytes.Equal(b, want[4096:8192]) {
						pl.Error("other content")
					}
					f.close()
				}
				if err := pl.h.Withdraw(pl.ctx, id); err != nil && !errors.Is(err, kind.InUse) {
					pl.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	for i := range 3 {
		pl.withdraw(fmt.Sprint("disk", i))
	}
	if list, err := pl.h.List(pl.ctx); err != nil || len(list) != 0 {
		pl.Errorf("left: %+v, %v", list, err)
	}
}
