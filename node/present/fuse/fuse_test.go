package fuse

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/thaw-project/thaw/kind"
)

func TestReadWriteThroughTheMount(t *testing.T) {
	needFUSE(t)
	pl := newPlace(t)
	k := pl.keeper(t)
	defer pl.endKeeper(t, k)
	p := pl.serveHere(t, pl.options(t, k))
	ctx := context.Background()
	ro, rw := pl.file(t, "base", 5<<20+512), pl.file(t, "top", 8<<20)
	want, _ := os.ReadFile(ro.Path)
	d := mustPresent(t, p, "block-1", ro, true)
	if d.Path != filepath.Join(pl.dir, "block-1") || d.SizeBytes != int64(len(want)) || d.Block {
		t.Fatalf("disk %+v", d)
	}
	got, err := os.ReadFile(d.Path)
	if err != nil || sha256.Sum256(got) != sha256.Sum256(want) {
		t.Fatalf("read %d bytes, %v; want the %d of the device", len(got), err, len(want))
	}
	if _, err := os.OpenFile(d.Path, os.O_RDWR, 0); !errors.Is(err, unix.EROFS) {
		t.Fatalf("open a read-only disk for writing: %v", err)
	}

	w := mustPresent(t, p, "rw", rw, false)
	f, err := os.OpenFile(w.Path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	data := bytes.Repeat([]byte("thaw"), 300000)
	if _, err := f.WriteAt(data, 12345); err != nil {
		t.Fatal(err)
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	back := make([]byte, len(data))
	under, _ := os.ReadFile(rw.Path)
	if _, err := f.ReadAt(back, 12345); err != nil || !bytes.Equal(back, data) || !bytes.Equal(under[12345:][:len(data)], data) {
		t.Fatalf("what was written is not there: %v", err)
	}
	if err := unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 8192, 65536); err != nil {
		t.Fatal(err)
	}
	if _, err := f.ReadAt(back[:65536], 8192); err != nil || !bytes.Equal(back[:65536], make([]byte, 65536)) {
		t.Fatalf("a punched hole does not read as zeros: %v", err)
	}
	if err := unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_ZERO_RANGE|unix.FALLOC_FL_KEEP_SIZE, 1<<20, 4096); err != nil {
		t.Fatal(err)
	}
	if _, err := f.ReadAt(back[:4096], 1<<20); err != nil || !bytes.Equal(back[:4096], make([]byte, 4096)) {
		t.Fatalf("a zeroed range does not read as zeros: %v", err)
	}
	if _, err := f.WriteAt([]byte("xx"), w.SizeBytes-1); !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("write past the end: %v, want ENOSPC", err)
	}
	if err := f.Truncate(4096); !errors.Is(err, unix.EPERM) {
		t.Fatalf("truncate: %v, want EPERM", err)
	}
	if n, err := f.ReadAt(back, w.SizeBytes-10); n != 10 || err != io.EOF {
		t.Fatalf("read across the end: %d, %v", n, err)
	}

	names, err := os.ReadDir(pl.dir)
	if err != nil || len(names) != 2 || names[0].Name() != "block-1" || names[1].Name() != "rw" {
		t.Fatalf("directory has %v, %v", names, err)
	}
	// What has changed since somebody listed the directory shows.
	mustPresent(t, p, "block-3", ro, true)
	if names, err = os.ReadDir(pl.dir); err != nil || len(names) != 3 {
		t.Fatalf("after a third disk came: directory has %v, %v", names, err)
	}
	if err := p.Withdraw(ctx, "block-3"); err != nil {
		t.Fatal(err)
	}
	if names, err = os.ReadDir(pl.dir); err != nil || len(names) != 2 {
		t.Fatalf("after the third disk went: directory has %v, %v", names, err)
	}
	if err := os.Remove(d.Path); err == nil {
		t.Fatal("a disk can be removed with unlink")
	}
	if _, err := os.Create(filepath.Join(pl.dir, "new")); err == nil {
		t.Fatal("a file can be created")
	}
	var st unix.Statfs_t
	if err := unix.Statfs(pl.dir, &st); err != nil || st.Bsize != 4096 {
		t.Fatalf("statfs: %+v, %v", st, err)
	}

	// The same again is the same disk; something else is not.
	if again := mustPresent(t, p, "block-1", ro, true); again != d {
		t.Fatalf("again: %+v", again)
	}
	_, err = p.Present(ctx, "block-1", rw, true)
	wantKind(t, err, kind.Exists)
	_, err = p.Present(ctx, "block-1", ro, false)
	wantKind(t, err, kind.Exists)
	for _, id := range []string{"", ".", "..", "a/b", "a b", "ä", string(make([]byte, 129))} {
		_, err = p.Present(ctx, id, ro, true)
		wantKind(t, err, kind.Invalid)
	}
	missing := ro
	missing.Path += "-missing"
	_, err = p.Present(ctx, "missing", missing, true)
	wantKind(t, err, kind.NotFound)

	list, err := p.List(ctx)
	if err != nil || len(list) != 2 || list[0] != d || list[1] != w {
		t.Fatalf("list: %+v, %v", list, err)
	}
	start := time.Now()
	wantKind(t, p.Withdraw(ctx, "rw"), kind.InUse)
	t.Logf("in use after %v", time.Since(start))
	if _, err := f.ReadAt(back[:10], 0); err != nil {
		t.Fatalf("after a refused withdrawal: %v", err)
	}
	wantKind(t, p.Teardown(ctx), kind.InUse)
	f.Close()
	start = time.Now()
	if err := p.Withdraw(ctx, "rw"); err != nil {
		t.Fatal(err)
	}
	t.Logf("withdrawn after %v", time.Since(start))
	if _, err := os.Stat(w.Path); !errors.Is(err, os.ErrNotExist) {
		t.Fatalf("a withdrawn disk: %v", err)
	}
	if err := p.Withdraw(ctx, "rw"); err != nil {
		t.Fatal(err)
	}
	// The same id again is another file, with no stale pages of the first.
	w2 := mustPresent(t, p, "rw", ro, true)
	if got, err := os.ReadFile(w2.Path); err != nil || !bytes.Equal(got, want) {
		t.Fatalf("presented again: %d bytes, %v", len(got), err)
	}
	if err := p.Teardown(ctx); err != nil {
		t.Fatal(err)
	}
	if names, err := k.List(ctx); err != nil || len(names) != 0 {
		t.Fatalf("the keeper holds %v, %v", names, err)
	}
	_, err = p.Present(ctx, "late", ro, true)
	wantKind(t, err, kind.Unavailable)
}
