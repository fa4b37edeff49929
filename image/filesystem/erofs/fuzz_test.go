package erofs

import (
	"bytes"
	"encoding/binary"
	"io"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/thaw-project/thaw/image/filesystem"
	"github.com/thaw-project/thaw/image/layer/torture"
	"github.com/thaw-project/thaw/kind"
)

// memory returns a file in memory, as fuzzing on a disk is slow.
func memory(t testing.TB) *os.File {
	t.Helper()
	fd, err := unix.MemfdCreate("block", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "block")
	t.Cleanup(func() { f.Close() })
	return f
}

// readAll reads every inode, directory, link and chunk map of an image.
func readAll(r io.ReaderAt) error {
	m, err := openImage(r)
	if err != nil {
		return err
	}
	root, err := newLoader(m).root()
	if err != nil {
		return err
	}
	return root.loadAll(0)
}

// FuzzApply applies any two layers in both modes and reads the result back.
func FuzzApply(f *testing.F) {
	b := torture.NewBuilder
	f.Add(b().Symlink("a", "b").File("a/f", []byte("x")).Tar(), b().Link("c", "a/f").Whiteout("b").Opaque("a").Tar())
	f.Add(b().Dir("a").File("a/f", []byte("x"), torture.Xattr("user.x", "y")).Tar(), b().File("a", nil).Dir("a").File("a/g", nil).Tar())
	f.Add(b().SparsePAX("s", 9000, []torture.Extent{{Offset: 4096, Data: []byte("x")}}).Tar(), b().Link("t", "s").File("x/y/z", nil).Tar())
	for _, bad := range torture.Bad() {
		if len(bad.Tar) < 4096 {
			f.Add(bad.Tar, bad.Tar)
		}
	}
	f.Fuzz(func(t *testing.T, lower, upper []byte) {
		for _, mode := range bothModes {
			o := filesystem.Options{Mode: mode, SizeBytes: 1 << 20}
			file := memory(t)
			if err := New().Format(ctx, file, o); err != nil {
				t.Fatal(err)
			}
			for i, l := range [][]byte{lower, upper} {
				if err := New().Apply(ctx, file, o, i, bytes.NewReader(l)); err != nil {
					if kind.Of(err) == "" {
						t.Fatalf("error without a kind: %v", err)
					}
					break
				}
			}
			// What is there must be whole, whether the last layer failed or not.
			if err := file.Truncate(o.SizeBytes); err != nil {
				t.Fatal(err)
			}
			if err := readAll(file); err != nil {
				t.Fatalf("%s: %v", mode, err)
			}
		}
	})
}

// FuzzImage changes bytes of an image: reading it, and applying a layer on it,
// must end, with or without an error, and what is applied must be whole.
// A patch is 4 bytes of offset and 4 of value; offsets count in the metadata.
func FuzzImage(f *testing.F) {
	var images [2][]byte
	for i, mode := range bothModes {
		o := filesystem.Options{Mode: mode, SizeBytes: 1 << 20}
		file := memory(f)
		if err := New().Format(ctx, file, o); err != nil {
			f.Fatal(err)
		}
		apply(f, file, o, 0, torture.NewBuilder().Dir("d").File("d/f", []byte("x"), torture.Xattr("user.x", "y")).Symlink("s", "d").Link("l", "d/f").File("big", torture.Data(1, 70_000)).File("hole", append(make([]byte, 200_000), 1)).Tar())
		apply(f, file, o, 1, torture.NewBuilder().Whiteout("s").File("d/g", nil).Dir("e").Tar())
		images[i] = used(f, file)
	}
	f.Add([]byte{0, 0, 0, 0, 1, 2, 3, 4}, false)
	f.Add([]byte{0x80, 0, 0, 0, 36, 0, 0, 0, 0x00, 0x10, 0, 0, 1, 0, 0, 0}, true)
	f.Add(binary.LittleEndian.AppendUint32([]byte{0x44, 0x10, 0, 0}, 36), true)
	upper := torture.NewBuilder().Link("a", "d/f").Link("b", "hole").File("s/x", nil).File("new/x", nil).Whiteout("d/g").Tar()
	f.Fuzz(func(t *testing.T, patches []byte, merged bool) {
		i := 0
		if merged {
			i = 1
		}
		image := bytes.Clone(images[i])
		ranges, err := MetadataRanges(bytes.NewReader(image))
		if err != nil {
			t.Fatal(err)
		}
		// The metadata as one run of bytes, from the superblock on.
		var at []int64
		for _, r := range ranges {
			for o := max(r.Offset, superOffset); o < r.Offset+r.Length; o++ {
				at = append(at, o)
			}
		}
		for ; len(patches) >= 8; patches = patches[8:] {
			for i, c := range patches[4:8] {
				image[at[(int(binary.LittleEndian.Uint32(patches))+i)%len(at)]] = c
			}
		}
		// The checksum would keep the fuzzer out.
		binary.LittleEndian.PutUint32(image[superOffset+4:], superChecksum(image))
		start := time.Now()
		_ = readAll(bytes.NewReader(image))
		file := memory(t)
		if _, err := file.Write(image); err != nil {
			t.Fatal(err)
		}
		o := filesystem.Options{Mode: bothModes[i], SizeBytes: 4 << 20}
		if err := New().Apply(ctx, file, o, 2, bytes.NewReader(upper)); err == nil {
			if err := file.Truncate(o.SizeBytes); err != nil {
				t.Fatal(err)
			}
			// In mode overlayfs the layers below are as they were.
			if err := readAll(file); err != nil && merged {
				t.Errorf("after applying on a changed image: %v", err)
			}
		}
		if d := time.Since(start); d > 10*time.Second {
			t.Errorf("took %v", d)
		}
	})
}
