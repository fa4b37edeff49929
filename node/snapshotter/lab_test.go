package snapshotter

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/google/uuid"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/thaw-project/thaw/image/annotation"
	"github.com/thaw-project/thaw/image/block"
	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/node/imagemgmt"
	"github.com/thaw-project/thaw/node/present"
)

// fakeStorage stands in for image-mgmt with a target behind it: blocks are image files,
// a writable disk is a copy of one beside its qcow2 file. Its state is a file, so
// that it survives kill -9 of the process that uses it, as the real one's does. The
// conformance suite runs over the real image-mgmt too, see chain_test.go.
type fakeStorage struct {
	dir string

	mu    sync.Mutex
	state map[string]*stored // guarded by mu, and in the file state.json

	// attach, if set, runs at the begin of every Attach and may fail it.
	attach func(ctx context.Context, block string) error
	// attaches counts calls of Attach that reached the storage.
	attaches map[string]int
}

type stored struct {
	Users []string `json:"users,omitempty"`
}

var _ imagemgmt.Service = (*fakeStorage)(nil)

func openStorage(dir string) (*fakeStorage, error) {
	s := &fakeStorage{dir: dir, state: map[string]*stored{}, attaches: map[string]int{}}
	for _, d := range []string{s.blocks(), s.dev()} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return nil, err
		}
	}
	raw, err := os.ReadFile(filepath.Join(dir, "state.json"))
	if errors.Is(err, fs.ErrNotExist) {
		return s, nil
	}
	if err != nil {
		return nil, err
	}
	return s, json.Unmarshal(raw, &s.state)
}

func (s *fakeStorage) blocks() string { return filepath.Join(s.dir, "blocks") }
func (s *fakeStorage) dev() string    { return filepath.Join(s.dir, "dev") }

func (s *fakeStorage) save() error {
	raw, err := json.Marshal(s.state)
	if err != nil {
		return err
	}
	temp := filepath.Join(s.dir, "state.new")
	if err := os.WriteFile(temp, raw, 0o600); err != nil {
		return err
	}
	return os.Rename(temp, filepath.Join(s.dir, "state.json"))
}

func (s *fakeStorage) disk(id, block string, readOnly bool) (present.Disk, error) {
	path := filepath.Join(s.dev(), id)
	info, err := os.Stat(path)
	if err != nil {
		return present.Disk{}, err
	}
	return present.Disk{
		ID: id, Source: present.Source{Kind: present.SourceLvol, Lvol: block},
		Path: path, SizeBytes: info.Size(), ReadOnly: readOnly,
	}, nil
}

func (s *fakeStorage) use(block, user string) error {
	st := s.state[block]
	if st == nil {
		st = &stored{}
		s.state[block] = st
	}
	if !slices.Contains(st.Users, user) {
		st.Users = append(st.Users, user)
		slices.Sort(st.Users)
	}
	return s.save()
}

func (s *fakeStorage) Attach(ctx context.Context, b imagemgmt.Block, user string) (present.Disk, error) {
	block := b.Name
	s.mu.Lock()
	hook := s.attach
	s.attaches[block]++
	s.mu.Unlock()
	if hook != nil {
		if err := hook(ctx, block); err != nil {
			return present.Disk{}, err
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	err := os.Link(filepath.Join(s.blocks(), block), filepath.Join(s.dev(), block))
	if errors.Is(err, fs.ErrNotExist) {
		return present.Disk{}, kind.Errorf(kind.NotFound, "no block %s", block)
	}
	if err != nil && !errors.Is(err, fs.ErrExist) {
		return present.Disk{}, err
	}
	if err := s.use(block, user); err != nil {
		return present.Disk{}, err
	}
	return s.disk(block, block, true)
}

// withdraw refuses what the kernel still uses, as a presenter does.
func (s *fakeStorage) withdraw(id string) error {
	path := filepath.Join(s.dev(), id)
	for deadline := time.Now().Add(2 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		users := kernelUsers(path)
		if len(users) == 0 {
			break
		}
		// A loop device goes away a moment after its mount.
		if time.Now().After(deadline) {
			return kind.Errorf(kind.InUse, "disk %s is in use by %v", id, users)
		}
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

func kernelUsers(path string) (users []string) {
	loops, _ := systemMounter{}.Loops()
	for _, l := range loops {
		if l.File == path {
			users = append(users, l.Device)
		}
	}
	mounts, _ := systemMounter{}.Mounts("/")
	for _, m := range mounts {
		if m.Source == path {
			users = append(users, m.Target)
		}
	}
	return users
}

func (s *fakeStorage) Detach(_ context.Context, block, user string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.release(block, user)
}

func (s *fakeStorage) release(block, user string) error {
	st := s.state[block]
	if st == nil {
		return nil
	}
	rest := slices.DeleteFunc(slices.Clone(st.Users), func(u string) bool { return u == user })
	if len(rest) == 0 {
		if err := s.withdraw(block); err != nil {
			return err
		}
		delete(s.state, block)
		return s.save()
	}
	st.Users = rest
	return s.save()
}

func (s *fakeStorage) Stat(_ context.Context, block string) (imagemgmt.Attachment, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.stat(block)
}

func (s *fakeStorage) stat(block string) (imagemgmt.Attachment, error) {
	st := s.state[block]
	if st == nil {
		return imagemgmt.Attachment{}, kind.Errorf(kind.NotFound, "block %s is not attached", block)
	}
	d, err := s.disk(block, block, true)
	return imagemgmt.Attachment{Block: block, Disk: d, Users: slices.Clone(st.Users)}, err
}

func (s *fakeStorage) List(context.Context) (all []imagemgmt.Attachment, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for block := range s.state {
		a, err := s.stat(block)
		if err != nil {
			return nil, err
		}
		all = append(all, a)
	}
	slices.SortFunc(all, func(a, b imagemgmt.Attachment) int { return strings.Compare(a.Block, b.Block) })
	return all, nil
}

func (s *fakeStorage) AttachWritable(_ context.Context, l imagemgmt.Layer, id string) (present.Disk, error) {
	block, path := l.Block.Name, l.Path
	s.mu.Lock()
	defer s.mu.Unlock()
	raw := path + ".raw"
	if _, err := os.Stat(raw); err != nil {
		// Under another name until complete: this process may be killed.
		if out, err := exec.Command("cp", "--sparse=always", filepath.Join(s.blocks(), block), raw+".new").CombinedOutput(); err != nil {
			return present.Disk{}, fmt.Errorf("%w: %s", err, out)
		}
		if err := os.Rename(raw+".new", raw); err != nil {
			return present.Disk{}, err
		}
	}
	for _, l := range [][2]string{{filepath.Join(s.blocks(), block), filepath.Join(s.dev(), block)}, {raw, filepath.Join(s.dev(), id)}} {
		if err := os.Link(l[0], l[1]); err != nil && !errors.Is(err, fs.ErrExist) {
			return present.Disk{}, err
		}
	}
	if err := s.use(block, id); err != nil {
		return present.Disk{}, err
	}
	return s.disk(id, block, false)
}

func (s *fakeStorage) DetachWritable(_ context.Context, block, id string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.detachWritable(block, id)
}

func (s *fakeStorage) detachWritable(block, id string) error {
	if err := s.withdraw(id); err != nil {
		return err
	}
	return s.release(block, id)
}

func (s *fakeStorage) DeleteWritable(_ context.Context, l imagemgmt.Layer, id string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.detachWritable(l.Block.Name, id); err != nil {
		return err
	}
	for _, f := range []string{l.Path + ".raw", l.Path + ".raw.new"} {
		if err := os.Remove(f); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

func (s *fakeStorage) StatWritable(_ context.Context, l imagemgmt.Layer, id string) (w imagemgmt.Writable, err error) {
	info, err := os.Stat(l.Path + ".raw")
	if errors.Is(err, fs.ErrNotExist) {
		return w, nil
	}
	if err != nil {
		return w, err
	}
	return imagemgmt.Writable{AllocatedBytes: info.Sys().(*syscall.Stat_t).Blocks * 512, Files: 1}, nil
}

func (s *fakeStorage) EnsureScratch(context.Context, string, int64) (imagemgmt.Block, error) {
	return imagemgmt.Block{Name: scratchBlock}, nil
}

func (s *fakeStorage) Prefetch(context.Context, string, []imagemgmt.Range, func(int64)) error {
	return kind.Errorf(kind.Unsupported, "nothing is kept")
}

// lab is a snapshotter over a storage, in a directory of its own.
type lab struct {
	t       testing.TB
	dir     string
	storage *fakeStorage
	options Options
	s       *Snapshotter
}

// requireKernel skips what needs root and mounts.
func requireKernel(t testing.TB) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root: run as root to mount")
	}
	if _, err := os.Stat("/dev/loop-control"); err != nil {
		t.Skip("needs loop devices: load the module loop")
	}
	for _, tool := range []string{"mkfs.ext4", "mkfs.erofs", "debugfs"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("needs %s: install e2fsprogs and erofs-utils", tool)
		}
	}
}

func newLab(t testing.TB, change ...func(*Options)) *lab {
	t.Helper()
	requireKernel(t)
	l := &lab{t: t, dir: shortDir(t)}
	l.open(change...)
	t.Cleanup(func() {
		if err := l.tearDown(); err != nil {
			t.Error(err)
		}
	})
	return l
}

// shortDir is t.TempDir with a short name, as real roots have: overlay options are
// bounded by a page.
func shortDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "snap")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func labOptions(dir string, st imagemgmt.Service) Options {
	return Options{
		Root: filepath.Join(dir, "snapshotter"), MountDir: filepath.Join(dir, "mnt"),
		Images: st, Targets: []string{"local"}, WritableBytes: 1 << 20,
		linger: time.Nanosecond, patience: time.Hour,
	}
}

func (l *lab) open(change ...func(*Options)) {
	l.t.Helper()
	var err error
	if l.storage == nil {
		if l.storage, err = openStorage(filepath.Join(l.dir, "storage")); err != nil {
			l.t.Fatal(err)
		}
		makeExt4(l.t, filepath.Join(l.storage.blocks(), scratchBlock), l.t.TempDir())
	}
	l.options = labOptions(l.dir, l.storage)
	l.options.Logger = slog.New(slog.NewTextHandler(testWriter{l.t}, &slog.HandlerOptions{Level: slog.LevelDebug}))
	for _, c := range change {
		c(&l.options)
	}
	if l.s, err = New(l.t.Context(), l.options); err != nil {
		l.t.Fatal(err)
	}
}

// reopen is what a restart of the server does.
func (l *lab) reopen(change ...func(*Options)) {
	l.t.Helper()
	if err := l.s.Close(); err != nil {
		l.t.Fatal(err)
	}
	l.storage = must(openStorage(filepath.Join(l.dir, "storage")))(l.t)
	l.open(change...)
}

type testWriter struct{ t testing.TB }

func (w testWriter) Write(p []byte) (int, error) {
	w.t.Logf("%s", p)
	return len(p), nil
}

// tearDown removes every snapshot and tells what is left then.
func (l *lab) tearDown() error {
	ctx := context.Background()
	if l.s.ctx.Err() != nil { // the test closed it
		var err error
		if l.s, err = New(ctx, l.options); err != nil {
			return err
		}
	}
	l.storage.mu.Lock()
	l.storage.attach = nil
	l.storage.mu.Unlock()
	errs := []error{removeAll(ctx, l.s), l.s.Cleanup(ctx)}
	l.s.shared.mu.Lock()
	if n := len(l.s.shared.entries); n > 0 {
		errs = append(errs, fmt.Errorf("%d resources are remembered after everything is removed", n))
	}
	l.s.shared.mu.Unlock()
	errs = append(errs, l.s.Close(), l.leaks())
	return errors.Join(errs...)
}

// removeAll removes all snapshots, children first.
func removeAll(ctx context.Context, s snapshots.Snapshotter) error {
	for {
		var names []string
		if err := s.Walk(ctx, func(_ context.Context, i snapshots.Info) error {
			names = append(names, i.Name)
			return nil
		}); err != nil {
			return err
		}
		if len(names) == 0 {
			return nil
		}
		removed := false
		for _, n := range names {
			err := s.Remove(ctx, n)
			if err != nil && !errdefs.IsFailedPrecondition(err) {
				return err
			}
			removed = removed || err == nil
		}
		if !removed {
			return fmt.Errorf("cannot remove any of %q", names)
		}
	}
}

// leaks lists what is left in the kernel, in the storage and on disk.
func (l *lab) leaks() error {
	var errs []error
	for deadline := time.Now().Add(2 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		errs = nil
		mounts, err := systemMounter{}.Mounts(l.dir)
		errs = append(errs, err)
		for _, m := range mounts {
			if m.Target == filepath.Join(l.dir, "dev") {
				continue // the presenter's
			}
			errs = append(errs, fmt.Errorf("leaked mount %s of %s", m.Target, m.Source))
		}
		loops, err := systemMounter{}.Loops()
		errs = append(errs, err)
		for _, loop := range loops {
			if strings.HasPrefix(loop.File, l.dir+"/") {
				errs = append(errs, fmt.Errorf("leaked loop device %s of %s", loop.Device, loop.File))
			}
		}
		if errors.Join(errs...) == nil || time.Now().After(deadline) {
			break
		}
	}
	attached, err := l.options.Images.List(context.Background())
	errs = append(errs, err)
	for _, a := range attached {
		errs = append(errs, fmt.Errorf("leaked attachment of %s by %v", a.Block, a.Users))
	}
	for _, dir := range []string{l.options.MountDir, filepath.Join(l.options.Root, "snapshots"), l.storage.dev()} {
		entries, err := os.ReadDir(dir)
		errs = append(errs, err)
		for _, e := range entries {
			errs = append(errs, fmt.Errorf("leaked %s", filepath.Join(dir, e.Name())))
		}
	}
	return errors.Join(errs...)
}

const scratchBlock = "scratch"

// tree describes a layer: path to content; a path that ends in "/" is a directory,
// content "\x00whiteout" deletes the path in the layers below.
type tree map[string]string

const whiteout = "\x00whiteout"

func (tr tree) write(t testing.TB, dir string, merged bool) {
	t.Helper()
	paths := make([]string, 0, len(tr))
	for p := range tr {
		paths = append(paths, p)
	}
	slices.Sort(paths)
	for _, p := range paths {
		at, content := filepath.Join(dir, p), tr[p]
		var err error
		switch {
		case content == whiteout && merged:
			err = os.RemoveAll(at)
		case content == whiteout:
			if err = os.MkdirAll(filepath.Dir(at), 0o755); err == nil {
				err = unix.Mknod(at, unix.S_IFCHR, 0)
			}
		case strings.HasSuffix(p, "/"):
			err = os.MkdirAll(at, 0o755)
		default:
			if err = os.MkdirAll(filepath.Dir(at), 0o755); err == nil {
				err = os.WriteFile(at, []byte(content), 0o644)
			}
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// testImage is a converted image in the storage.
type testImage struct {
	refs     []annotation.LayerRef
	chainIDs []string
}

// labels are what containerd passes to Prepare for layer i.
func (im testImage) labels(i int) map[string]string {
	labels := im.refs[i].Annotations()
	labels[snapshots.LabelSnapshotRef] = im.chainIDs[i]
	return labels
}

func (im testImage) top() string { return im.chainIDs[len(im.chainIDs)-1] }

// addImage converts layers into blocks of the storage. The chainIDs depend on name
// and the layers' numbers only.
func (l *lab) addImage(name string, mode block.Mode, filesystem block.Filesystem, layers ...tree) testImage {
	l.t.Helper()
	return addImage(l.t, l.storage, name, mode, filesystem, layers...)
}

func addImage(t testing.TB, st *fakeStorage, name string, mode block.Mode, filesystem block.Filesystem, layers ...tree) testImage {
	t.Helper()
	im := describeImage(name, mode, filesystem, len(layers))
	content := t.TempDir()
	if err := os.Chmod(content, 0o755); err != nil {
		t.Fatal(err)
	}
	for i, layer := range layers {
		dir := content
		if mode == block.ModeOverlayfs {
			dir = filepath.Join(content, fmt.Sprint(i))
			if err := os.Mkdir(dir, 0o755); err != nil {
				t.Fatal(err)
			}
		}
		layer.write(t, dir, mode == block.ModeOverlaybd)
		file := filepath.Join(st.blocks(), im.refs[i].Block)
		if filesystem == block.Erofs {
			makeErofs(t, file, content)
		} else {
			makeExt4(t, file, content)
		}
		if i == len(layers)-1 {
			if out, err := exec.Command("cp", "--sparse=always", file, filepath.Join(st.blocks(), im.refs[i].Leaf)).CombinedOutput(); err != nil {
				t.Fatal(err, string(out))
			}
		}
	}
	return im
}

// describeImage derives the names of an image's blocks.
func describeImage(name string, mode block.Mode, filesystem block.Filesystem, layers int) testImage {
	var im testImage
	blockName := func(scope block.Scope, i int) string {
		return string(scope) + "-" + uuid.NewSHA1(uuid.NameSpaceURL, fmt.Appendf(nil, "%s/%s/%s/%s/%d", name, mode, filesystem, scope, i)).String()
	}
	for i := range layers {
		scope := block.Local
		if i == 0 {
			scope = block.Global
		}
		im.refs = append(im.refs, annotation.LayerRef{
			Block: blockName(scope, i), Leaf: blockName(block.Soldier, 0), Mode: mode, Filesystem: filesystem,
			Index: i, Count: layers, Target: "local",
		})
		im.chainIDs = append(im.chainIDs, digest.FromString(fmt.Sprint(name, "/", i)).String())
	}
	return im
}

func makeErofs(t testing.TB, file, dir string) {
	t.Helper()
	if out, err := exec.Command("mkfs.erofs", "--quiet", file, dir).CombinedOutput(); err != nil {
		t.Fatalf("mkfs.erofs: %v: %s", err, out)
	}
}

func makeExt4(t testing.TB, file, dir string) {
	t.Helper()
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(file, 32<<20); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("mkfs.ext4", "-q", "-m", "0", "-d", dir, file).CombinedOutput(); err != nil {
		t.Fatalf("mkfs.ext4: %v: %s", err, out)
	}
	// An image's root has no such directory.
	if out, err := exec.Command("debugfs", "-w", "-R", "rmdir lost+found", file).CombinedOutput(); err != nil {
		t.Fatalf("debugfs: %v: %s", err, out)
	}
}

// pull does what containerd's unpacker does with a converted image when nothing goes
// wrong, and fails the test otherwise.
func (l *lab) pull(im testImage) {
	l.t.Helper()
	parent := ""
	for i := range im.refs {
		_, err := l.s.Prepare(l.t.Context(), fmt.Sprintf("extract-%d-%s", i, uuid.NewString()), parent, snapshots.WithLabels(im.labels(i)))
		if !errdefs.IsAlreadyExists(err) {
			l.t.Fatalf("prepare layer %d: got error %v, want already exists", i, err)
		}
		parent = im.chainIDs[i]
	}
}

// withMounts runs f on the mounted root of mounts.
func withMounts(t testing.TB, mounts []mount.Mount, f func(root string)) {
	t.Helper()
	if err := mount.WithTempMount(t.Context(), mounts, func(root string) error {
		f(root)
		return nil
	}); err != nil {
		t.Fatalf("mount %v: %v", mounts, err)
	}
}

// expect compares all files below root with want.
func expect(t testing.TB, root string, want tree) {
	t.Helper()
	got := tree{}
	err := filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
		rel, _ := filepath.Rel(root, p)
		switch {
		case err != nil || rel == ".":
			return err
		case d.IsDir():
			if entries, err := os.ReadDir(p); err != nil || len(entries) == 0 {
				got[rel+"/"] = ""
			}
			return nil
		case !d.Type().IsRegular():
			got[rel] = d.Type().String()
			return nil
		}
		raw, err := os.ReadFile(p)
		got[rel] = string(raw)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	for p, content := range want {
		if g, ok := got[p]; !ok || g != content {
			t.Errorf("%s: got %q (there: %v), want %q", p, g, ok, content)
		}
	}
	for p := range got {
		if _, ok := want[p]; !ok {
			t.Errorf("%s is there and should not be", p)
		}
	}
}

func must[T any](v T, err error) func(testing.TB) T {
	return func(t testing.TB) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

// variants are the four ways to convert an image.
var variants = []struct {
	name       string
	mode       block.Mode
	filesystem block.Filesystem
}{
	{"overlayfs-erofs", block.ModeOverlayfs, block.Erofs},
	{"overlayfs-ext4", block.ModeOverlayfs, block.Ext4},
	{"overlaybd-erofs", block.ModeOverlaybd, block.Erofs},
	{"overlaybd-ext4", block.ModeOverlaybd, block.Ext4},
}
