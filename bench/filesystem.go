package main

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/thaw-project/thaw/e2e/lab"
	"github.com/thaw-project/thaw/e2e/recipe"
	"github.com/thaw-project/thaw/node/mount"
)

// dataBytes is the size of the one file of the image that is read and written.
const dataBytes = 256 << 20

// dataImage is an image of one file of random bytes, converted and pulled, and the
// same file in file systems on plain files.
type dataImage struct {
	thaw  map[string]*lab.Thaw // by file system, as the others
	nodes map[string]*warmNode
	raw   map[string]string // file that holds the file system
}

// state is what is in the page cache when a job starts.
type state string

const (
	cold   state = "cold"   // nothing
	cached state = "cached" // the pool's file or the floor's, and nothing above it
	warm   state = "warm"   // the file as the job sees it
)

type job struct {
	name, about, unit string
	state             state
	args              []string
	fresh             bool // on a file written just before, not the image's
}

var readJobs = []job{
	{"randread-4k", "random reads of 4 KiB", "IOPS", cold, []string{"--readonly", "--rw=randread", "--bs=4k", "--io_size=12m"}, false},
	{"read-128k", "sequential reads of 128 KiB", "MiB/s", cold, []string{"--readonly", "--rw=read", "--bs=128k"}, false},
	{"randread-4k", "random reads of 4 KiB", "IOPS", cached, []string{"--readonly", "--rw=randread", "--bs=4k", "--io_size=48m"}, false},
	{"read-128k", "sequential reads of 128 KiB", "MiB/s", cached, []string{"--readonly", "--rw=read", "--bs=128k"}, false},
	{"randread-4k", "random reads of 4 KiB", "IOPS", warm, []string{"--readonly", "--rw=randread", "--bs=4k", "--io_size=512m", "--norandommap"}, false},
	{"read-128k", "sequential reads of 128 KiB", "MiB/s", warm, []string{"--readonly", "--rw=read", "--bs=128k", "--io_size=1g"}, false},
}

var writeJobs = []job{
	{"randwrite-4k-fsync", "random writes of 4 KiB, each with fsync, to a file the container wrote", "IOPS", warm,
		[]string{"--rw=randwrite", "--bs=4k", "--io_size=16m", "--fsync=1"}, true},
	{"randwrite-4k-fsync-image", "random writes of 4 KiB, each with fsync, to the image's file (copied on write, by cluster)", "IOPS", warm,
		[]string{"--rw=randwrite", "--bs=4k", "--io_size=16m", "--fsync=1"}, false},
	{"write-128k", "sequential writes of 128 KiB over a file the container wrote, one fsync at the end", "MiB/s", warm,
		[]string{"--rw=write", "--bs=128k", "--end_fsync=1"}, true},
	{"write-128k-image", "sequential writes of 128 KiB over the image's file, one fsync at the end", "MiB/s", warm,
		[]string{"--rw=write", "--bs=128k", "--end_fsync=1"}, false},
}

func (b *bench) filesystems() (all []comparison) {
	for _, fs := range []string{"erofs", "ext4"} {
		for _, j := range readJobs {
			all = append(all, b.filesystem(fs, j, j.name+"-"+string(j.state)))
		}
	}
	for _, j := range writeJobs {
		all = append(all, b.filesystem("ext4", j, j.name))
	}
	return all
}

func (b *bench) filesystem(fs string, j job, name string) comparison {
	about := j.about + ", " + fs + " in a container of Thaw next to the same on a plain file"
	switch j.state {
	case cold:
		about += "; page cache empty"
	case cached:
		about += "; the file below in the page cache, nothing above"
	case warm:
		if strings.Contains(name, "read") {
			about += "; the file itself in the page cache"
		}
	}
	return comparison{
		name: fs + "-" + name, about: about, rounds: 5, warmUp: true,
		metrics: []metric{{"", j.unit, true, 0}},
		subjects: []subject{
			{"plain", func(ctx context.Context) (sample, error) { return b.plainJob(ctx, fs, j) }},
			{"thaw", func(ctx context.Context) (sample, error) { return b.thawJob(ctx, fs, j) }},
		},
	}
}

// thawJob runs a job in the writable root of a new container of the data image.
func (b *bench) thawJob(ctx context.Context, fs string, j job) (s sample, err error) {
	d, err := b.dataImage(ctx)
	if err != nil {
		return nil, err
	}
	n := d.nodes[fs]
	err = n.node.Active(ctx, n.image, func(root string) error {
		s, err = b.runJob(ctx, root, filepath.Join(d.thaw[fs].Root, "pool/data"), j)
		return err
	})
	return s, err
}

// plainJob runs a job in the same file system on a plain file, mounted as Thaw mounts
// its disks: EROFS on the file itself and ext4 on a loop device, both past the page
// cache of the file, unless the file in the page cache is the point.
func (b *bench) plainJob(ctx context.Context, fs string, j job) (s sample, err error) {
	d, err := b.dataImage(ctx)
	if err != nil {
		return nil, err
	}
	root := filepath.Join(b.lab.Dir, b.next("plain"))
	if err := os.Mkdir(root, 0o700); err != nil {
		return nil, err
	}
	file := d.raw[fs]
	if fs == "erofs" {
		data := "directio"
		if j.state == cached {
			data = ""
		}
		err = unix.Mount(file, root, "erofs", unix.MS_RDONLY, data)
	} else {
		err = mountLoop(file, root, j.state != cached)
	}
	if err != nil {
		return nil, fmt.Errorf("mount %s: %w", file, err)
	}
	defer func() { err = errors.Join(err, unix.Unmount(root, 0), os.Remove(root)) }()
	return b.runJob(ctx, root, file, j)
}

func mountLoop(file, target string, direct bool) error {
	loop, err := mount.OpenLoop(file, mount.LoopOptions{DirectIO: direct, AutoClear: true})
	if err != nil {
		return err
	}
	defer loop.Close()
	return unix.Mount(loop.Name(), target, "ext4", 0, "")
}

// runJob runs j below root, a file system whose bytes are in the file under.
func (b *bench) runJob(ctx context.Context, root, under string, j job) (_ sample, err error) {
	file, sizeBytes := filepath.Join(root, "data"), int64(dataBytes)
	if j.fresh {
		file, sizeBytes = filepath.Join(root, "new"), 64<<20
		if err := writeRandom(file, sizeBytes); err != nil {
			return nil, err
		}
		// In Thaw it goes with the container's disk.
		defer func() { err = errors.Join(err, os.Remove(file)) }()
	}
	switch j.state {
	case cold, cached:
		if err := lab.DropCaches(); err != nil {
			return nil, err
		}
	}
	switch j.state {
	case cached:
		err = readData(ctx, under)
	case warm:
		err = readData(ctx, file)
	}
	if err != nil {
		return nil, err
	}
	if err := settle(); err != nil {
		return nil, err
	}
	iops, mibs, err := b.fioJob(ctx, file, append([]string{fmt.Sprintf("--size=%d", sizeBytes)}, j.args...)...)
	if j.unit == "IOPS" {
		return sample{"": iops}, err
	}
	return sample{"": mibs}, err
}

// readData reads what of a file is not a hole into the page cache.
func readData(ctx context.Context, path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	buf := make([]byte, 1<<20)
	for off := int64(0); ctx.Err() == nil; {
		start, err := unix.Seek(int(f.Fd()), off, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("find data in %s: %w", path, err)
		}
		end, err := unix.Seek(int(f.Fd()), start, unix.SEEK_HOLE)
		if err != nil {
			return fmt.Errorf("find holes in %s: %w", path, err)
		}
		for off = start; off < end && ctx.Err() == nil; {
			n, err := f.ReadAt(buf[:min(int64(len(buf)), end-off)], off)
			if n == 0 {
				return fmt.Errorf("read %s: %w", path, err)
			}
			off += int64(n)
		}
	}
	return context.Cause(ctx)
}

func writeRandom(path string, sizeBytes int64) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = io.CopyN(f, rand.NewChaCha8([32]byte{2}), sizeBytes)
	return errors.Join(err, f.Sync(), f.Close())
}

// dataImage makes the image, its two conversions and the two floors.
func (b *bench) dataImage(ctx context.Context) (*dataImage, error) {
	return b.data.get(func() (*dataImage, error) {
		progress("making an image of one file of %d MiB", dataBytes>>20)
		tree := filepath.Join(b.lab.Dir, "tree")
		if err := os.Mkdir(tree, 0o755); err != nil {
			return nil, err
		}
		if err := writeRandom(filepath.Join(tree, "data"), dataBytes); err != nil {
			return nil, err
		}
		d := &dataImage{thaw: map[string]*lab.Thaw{}, nodes: map[string]*warmNode{}, raw: map[string]string{}}
		if err := b.makeFloors(ctx, d, tree); err != nil {
			return nil, err
		}
		source, err := b.pushData(ctx, filepath.Join(tree, "data"))
		if err != nil {
			return nil, err
		}
		for _, v := range []variant{{"overlayfs", "erofs"}, {"overlaybd", "ext4"}} {
			t, refs, err := b.converted(ctx, func(context.Context) (string, error) { return source, nil }, v)
			if err != nil {
				return nil, err
			}
			d.thaw[v.filesystem] = t
			if d.nodes[v.filesystem], err = b.pulled(ctx, t, refs[0]); err != nil {
				return nil, err
			}
		}
		return d, nil
	})
}

func (b *bench) makeFloors(ctx context.Context, d *dataImage, tree string) error {
	for _, fs := range []string{"erofs", "ext4"} {
		d.raw[fs] = filepath.Join(b.lab.Dir, "plain."+fs)
	}
	for _, args := range [][]string{
		{"mkfs.erofs", "--quiet", d.raw["erofs"], tree},
		{"mkfs.ext4", "-q", "-F", "-m", "0", "-E", "lazy_itable_init=0,lazy_journal_init=0", "-d", tree, d.raw["ext4"], "2G"},
	} {
		if out, err := b.lab.Command(ctx, args[0], args[1:]...).CombinedOutput(); err != nil {
			return fmt.Errorf("%s: %w: %s", strings.Join(args, " "), err, out)
		}
	}
	// Past the page cache a file is read in whole sectors.
	info, err := os.Stat(d.raw["erofs"])
	if err != nil {
		return err
	}
	return os.Truncate(d.raw["erofs"], (info.Size()+4095)/4096*4096)
}

// pushData pushes an image whose one layer holds the file.
func (b *bench) pushData(ctx context.Context, file string) (string, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return "", err
	}
	var layer bytes.Buffer
	w := tar.NewWriter(&layer)
	if err := w.WriteHeader(&tar.Header{Name: "data", Mode: 0o644, Size: int64(len(data))}); err != nil {
		return "", err
	}
	if _, err := w.Write(data); err != nil {
		return "", err
	}
	if err := w.Close(); err != nil {
		return "", err
	}
	image, err := recipe.Layers([][]byte{layer.Bytes()})
	if err != nil {
		return "", err
	}
	registry, err := b.localRegistry(ctx)
	if err != nil {
		return "", err
	}
	ref := registry.Ref("bench/data", "1")
	return ref, recipe.Push(ctx, image, ref)
}
