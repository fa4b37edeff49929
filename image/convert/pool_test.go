package convert

import (
	"context"

	"fmt"

	"os"
	"os/exec"
	"path/filepath"
	"sort"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"

	attacherv1 "github.com/thaw-project/thaw/api/attacher/v1"
	"github.com/thaw-project/thaw/attacher"
	"github.com/thaw-project/thaw/attacher/rpc"
	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/lvol"
	"github.com/thaw-project/thaw/node/present"
)

// pool stands for an lvol store and a presentation: an lvol is a sparse file, a
// clone is a copy. The attacher on top is the real one.
type pool struct {
	attacher.LvolStore // what conversions do not need panics

	dir string

	mu    sync.Mutex
	lvols map[string]*lvol.Info // guarded by mu
	disks map[string]present.Disk
}

func newPool(dir string) *pool {
	return &pool{dir: dir, lvols: map[string]*lvol.Info{}, disks: map[string]present.Disk{}}
}

func (p *pool) path(name string) string { return filepath.Join(p.dir, name) }

func (p *pool) info(name string) (lvol.Info, error) {
	l := p.lvols[name]
	if l == nil {
		return lvol.Info{}, kind.Errorf(kind.NotFound, "no lvol %s", name)
	}
	out := *l
	for _, o := range p.lvols {
		if o.Parent == name {
			out.Clones = append(out.Clones, o.Name)
		}
	}
	sort.Strings(out.Clones)
	var st unix.Stat_t
	if err := unix.Stat(p.path(name), &st); err != nil {
		return out, err
	}
	out.ClusterBytes = 4096
	out.AllocatedClusters = st.Blocks / 8
	return out, nil
}

func (p *pool) Create(name string, sizeBytes int64) (lvol.Info, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.lvols[name] != nil {
		return lvol.Info{}, kind.Errorf(kind.Exists, "lvol %s exists", name)
	}
	f, err := os.OpenFile(p.path(name), os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	if err != nil {
		return lvol.Info{}, err
	}
	defer f.Close()
	if err := f.Truncate(sizeBytes); err != nil {
		return lvol.Info{}, err
	}
	p.lvols[name] = &lvol.Info{Name: name, UUID: name, SizeBytes: sizeBytes, Created: time.Now()}
	return p.info(name)
}

func (p *pool) copy(from, to string) error {
	if out, err := exec.Command("cp", "--sparse=always", p.path(from), p.path(to)).CombinedOutput(); err != nil {
		os.Remove(p.path(to))
		if strings.Contains(string(out), "No space left") {
			return kind.Errorf(kind.NoSpace, "pool is full")
		}
		return fmt.Errorf("copy lvol: %s", out)
	}
	return nil
}

func (p *pool) Snapshot(name, snapshot string) (lvol.Info, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	l := p.lvols[name]
	if l == nil {
		return lvol.Info{}, kind.Errorf(kind.NotFound, "no lvol %s", name)
	}
	if p.lvols[snapshot] != nil {
		return lvol.Info{}, kind.Errorf(kind.Exists, "lvol %s exists", snapshot)
	}
	if err := p.copy(name, snapshot); err != nil {
		return lvol.Info{}, err
	}
	p.lvols[snapshot] = &lvol.Info{Name: snapshot, UUID: snapshot, SizeBytes: l.SizeBytes, Snapshot: true, ReadOnly: true, Parent: l.Parent, Created: time.Now()}
	l.Parent = snapshot
	return p.info(snapshot)
}

func (p *pool) Clone(snapshot, name string) (lvol.Info, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	s := p.lvols[snapshot]
	if s == nil {
		return lvol.Info{}, kind.Errorf(kind.NotFound, "no lvol %s", snapshot)
	}
	if p.lvols[name] != nil {
		return lvol.Info{}, kind.Errorf(kind.Exists, "lvol %s exists", name)
	}
	if err := p.copy(snapshot, name); err != nil {
		return lvol.Info{}, err
	}
	p.lvols[name] = &lvol.Info{Name: name, UUID: name, SizeBytes: s.SizeBytes, Parent: snapshot, Created: time.Now()}
	return p.info(name)
}

func (p *pool) SetReadOnly(name string, readOnly bool) (lvol.Info, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	l := p.lvols[name]
	if l == nil {
		return lvol.Info{}, kind.Errorf(kind.NotFound, "no lvol %s", name)
	}
	l.ReadOnly = readOnly
	return p.info(name)
}

func (p *pool) Delete(name string) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.lvols[name] == nil {
		return kind.Errorf(kind.NotFound, "no lvol %s", name)
	}
	i, err := p.info(name)
	if err != nil {
		return err
	}
	if i.Snapshot && len(i.Clones) > 0 {
		return kind.Errorf(kind.InUse, "snapshot %s has clones", name)
	}
	for _, d := range p.disks {
		if d.Source.Lvol == name {
			return kind.Errorf(kind.InUse, "lvol %s is open", name)
		}
	}
	delete(p.lvols, name)
	return os.Remove(p.path(name))
}

func (p *pool) Get(name string) (lvol.Info, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.info(name)
}

func (p *pool) List() ([]lvol.Info, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	var out []lvol.Info
	for name := range p.lvols {
		i, err := p.info(name)
		if err != nil {
			return nil, err
		}
		out = append(out, i)
	}
	sort.Slice(out, func(a, b int) bool { return out[a].Name < out[b].Name })
	return out, nil
}

func (p *pool) Stat() lvol.Stat {
	var st unix.Statfs_t
	if err := unix.Statfs(p.dir, &st); err != nil {
		return lvol.Stat{}
	}
	return lvol.Stat{UUID: "pool", ClusterBytes: 4096, TotalClusters: int64(st.Blocks) * st.Bsize / 4096, FreeClusters: int64(st.Bavail) * st.Bsize / 4096}
}

func (p *pool) Present(_ context.Context, id string, source present.Source, readOnly bool) (present.Disk, error) {
	i, err := p.Get(source.Lvol)
	if err != nil {
		return present.Disk{}, err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	d := present.Disk{ID: id, Source: source, Path: p.path(source.Lvol), SizeBytes: i.SizeBytes, ReadOnly: readOnly}
	p.disks[id] = d
	return d, nil
}

// Withdraw refuses while a loop device shows the file, as the kernel would.
func (p *pool) Withdraw(_ context.Context, id string) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if d, ok := p.disks[id]; ok {
		if loops := loopsOn(d.Path); len(loops) > 0 {
			return kind.Errorf(kind.InUse, "%s is in use by %v", d.Path, loops)
		}
	}
	delete(p.disks, id)
	return nil
}

func (p *pool) List2() []present.Disk {
	p.mu.Lock()
	defer p.mu.Unlock()
	var out []present.Disk
	for _, d := range p.disks {
		out = append(out, d)
	}
	return out
}

// presenter is the pool as a present.Presenter.
type presenter struct{ *pool }

func (p presenter) List(context.Context) ([]present.Disk, error) { return p.List2(), nil }

// loopsOn lists loop devices whose file begins with prefix.
func loopsOn(prefix string) []string {
	var out []string
	found, _ := filepath.Glob("/sys/block/loop*/loop/backing_file")
	for _, f := range found {
		if raw, err := os.ReadFile(f); err == nil && strings.HasPrefix(string(raw), prefix) {
			out = append(out, f+": "+strings.TrimSpace(string(raw)))
		}
	}
	return out
}

// server is an attacher on a socket, on a pool.
type server struct {
	t      testing.TB
	dir    string
	pool   *pool
	socket string

	attacher *attacher.Attacher
	grpc     *grpc.Server
	served   sync.WaitGroup
}

func newServer(t testing.TB) *server {
	t.Helper()
	return newServerIn(t, t.TempDir())
}

// newServerIn keeps lvols in dir.
func newServerIn(t testing.TB, dir string) *server {
	t.Helper()
	s := &server{t: t, dir: t.TempDir(), pool: newPool(dir)}
	s.socket = filepath.Join(s.dir, "s")
	s.start()
	t.Cleanup(func() {
		s.stop()
		if loops := loopsOn(dir); len(loops) > 0 {
			t.Errorf("loop devices were left: %v", loops)
		}
	})
	return s
}

func (s *server) start() {
	s.t.Helper()
	a, err := attacher.New(attacher.Options{
		Lvols: s.pool, Presenter: presenter{s.pool}, DBPath: filepath.Join(s.dir, "attacher.db"), Target: "here",
		HoldGrace: 3 * time.Second,
		Sync:      func(context.Context, string) error { return nil },
	})
	if err != nil {
		s.t.Fatal(err)
	}
	s.attacher = a
	l := listen(s.t, s.socket)
	s.grpc = grpc.NewServer(rpc.ServerOptions()...)
	attacherv1.RegisterAttacherServer(s.grpc, a)
	s.served.Go(func() { s.grpc.Serve(l) })
}

func (s *server) stop() {
	s.attacher.Stop()
	s.grpc.Stop()
	s.served.Wait()
	if err := s.attacher.Close(); err != nil {
		s.t.Error(err)
	}
}

func (s *server) client() attacherv1.AttacherClient {
	s.t.Helper()
	conn, err := rpc.Dial(s.socket)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { conn.Close() })
	return attacherv1.NewAttacherClient(conn)
}

// names are the lvols there are.
func (s *server) names() []string {
	var out []string
	infos, err := s.pool.List()
	if err != nil {
		s.t.Fatal(err)
	}
	for _, i := range infos {
		out = append(out, i.Name)
	}
	return out
}

// unfinished waits until nothing is left of a conversion that failed or died, and
// fails the test if that does not come.
func (s *server) unfinished() {
	s.t.Helper()
	var left []string
	for end := time.Now().Add(8 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		left = loopsOn(s.pool.dir)
		for _, n := range s.names() {
			if strings.HasPrefix(n, "work-") {
				left = append(left, n)
			}
		}
		for _, d := range s.pool.List2() {
			left = append(left, "disk "+d.ID)
		}
		if len(left) == 0 {
			return
		}
	}
	s.t.Errorf("left behind: %v", left)
}

func dial(socket string) (*grpc.ClientConn, error) { return rpc.Dial(socket) }
