package snapshotter

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
)

// model is what the snapshots should be: obvious and slow.
type model struct {
	l        *lab
	random   *rand.Rand
	images   []testImage
	snaps    map[string]*modelSnapshot
	sequence int
}

type modelSnapshot struct {
	kind    snapshots.Kind
	parent  string
	content tree
}

func (m *model) next(prefix string) string {
	m.sequence++
	return fmt.Sprint(prefix, m.sequence)
}

// pick returns the name of a random snapshot that fits, "" if none does.
func (m *model) pick(fits func(name string, s *modelSnapshot) bool) string {
	var names []string
	for n, s := range m.snaps {
		if fits(n, s) {
			names = append(names, n)
		}
	}
	if len(names) == 0 {
		return ""
	}
	slices.Sort(names) // the order of a map is not of the seed
	return names[m.random.IntN(len(names))]
}

func committed(_ string, s *modelSnapshot) bool { return s.kind == snapshots.KindCommitted }
func active(_ string, s *modelSnapshot) bool    { return s.kind == snapshots.KindActive }

func (m *model) childless(name string, _ *modelSnapshot) bool {
	for _, s := range m.snaps {
		if s.parent == name {
			return false
		}
	}
	return true
}

func (m *model) content(name string) tree {
	if name == "" {
		return tree{}
	}
	return maps.Clone(m.snaps[name].content)
}

func (m *model) step() (what string) {
	t, s, ctx := m.l.t, m.l.s, m.l.t.Context()
	fail := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(what, ": ", err)
		}
	}
	switch op := m.random.IntN(100); {
	case op < 12: // pull, or what is left of an image
		im := m.images[m.random.IntN(len(m.images))]
		what = "pull " + im.refs[0].Leaf
		parent := ""
		for i, id := range im.chainIDs {
			if m.snaps[id] == nil {
				_, err := s.Prepare(ctx, m.next("extract"), parent, snapshots.WithLabels(im.labels(i)))
				if !errdefs.IsAlreadyExists(err) {
					t.Fatal(what, ": ", err)
				}
				m.snaps[id] = &modelSnapshot{snapshots.KindCommitted, parent, maps.Clone(layersUpTo(i + 1))}
			}
			parent = id
		}
	case op < 32:
		parent := m.pick(committed)
		if m.random.IntN(8) == 0 {
			parent = ""
		}
		key := m.next("active")
		what = fmt.Sprintf("prepare %s on %s", key, parent)
		var opts []snapshots.Opt
		if m.random.IntN(2) == 0 {
			opts = append(opts, snapshots.WithLabels(map[string]string{snapshots.LabelSnapshotRef: "layer-" + key}))
		}
		_, err := s.Prepare(ctx, key, parent, opts...)
		fail(err)
		m.snaps[key] = &modelSnapshot{snapshots.KindActive, parent, m.content(parent)}
	case op < 37:
		parent := m.pick(committed)
		if parent == "" {
			return "nothing to view"
		}
		key := m.next("view")
		what = fmt.Sprintf("view %s of %s", key, parent)
		_, err := s.View(ctx, key, parent)
		fail(err)
		m.snaps[key] = &modelSnapshot{snapshots.KindView, parent, m.content(parent)}
	case op < 55:
		key := m.pick(active)
		if key == "" {
			return "nothing to write to"
		}
		what = "write to " + key
		mounts, err := s.Mounts(ctx, key)
		fail(err)
		withMounts(t, mounts, func(root string) { fail(m.write(root, m.snaps[key].content)) })
	case op < 65:
		key := m.pick(active)
		if key == "" {
			return "nothing to commit"
		}
		name := m.next("committed")
		what = fmt.Sprintf("commit %s as %s", key, name)
		fail(s.Commit(ctx, name, key))
		m.snaps[name] = m.snaps[key]
		m.snaps[name].kind = snapshots.KindCommitted
		delete(m.snaps, key)
	case op < 80:
		name := m.pick(m.childless)
		if name == "" {
			return "nothing to remove"
		}
		what = "remove " + name
		fail(s.Remove(ctx, name))
		delete(m.snaps, name)
	case op < 88:
		what = "check one"
		if name := m.pick(func(string, *modelSnapshot) bool { return true }); name != "" {
			what = "check " + name
			m.check(name)
		}
	case op < 94:
		what = "cleanup"
		fail(s.Cleanup(ctx))
	case op < 97:
		what = "restart"
		m.l.reopen()
	default:
		what = "reboot"
		m.l.reboot(m.random.IntN(2) == 0)
	}
	return what
}

// write changes a few files below root, and content with them.
func (m *model) write(root string, content tree) error {
	for range 1 + m.random.IntN(3) {
		files := slices.Sorted(maps.Keys(content))
		files = slices.DeleteFunc(files, func(f string) bool { return strings.HasSuffix(f, "/") })
		if len(files) > 0 && m.random.IntN(3) == 0 {
			f := files[m.random.IntN(len(files))]
			if err := os.Remove(filepath.Join(root, f)); err != nil {
				return err
			}
			delete(content, f)
			if dir := filepath.Dir(f); dir != "." {
				rest := slices.ContainsFunc(files, func(o string) bool { return o != f && filepath.Dir(o) == dir })
				if !rest {
					content[dir+"/"] = ""
				}
			}
			continue
		}
		f := fmt.Sprintf("file-%d", m.random.IntN(10))
		text := fmt.Sprint(m.random.Uint64())
		if err := os.WriteFile(filepath.Join(root, f), []byte(text), 0o644); err != nil {
			return err
		}
		content[f] = text
	}
	return nil
}

func (m *model) check(name string) {
	t, s, ctx := m.l.t, m.l.s, m.l.t.Context()
	t.Helper()
	snap := m.snaps[name]
	info, err := s.Stat(ctx, name)
	if err != nil || info.Kind != snap.kind || info.Parent != snap.parent {
		t.Fatalf("stat %s: got %+v, error %v, want a %v on %q", name, info, err, snap.kind, snap.parent)
	}
	key := name
	if snap.kind == snapshots.KindCommitted {
		key = m.next("check")
		if _, err := s.View(ctx, key, name); err != nil {
			t.Fatal(err)
		}
		defer func() {
			if err := s.Remove(ctx, key); err != nil {
				t.Error(err)
			}
		}()
	}
	mounts, err := s.Mounts(ctx, key)
	if err != nil {
		t.Fatal(err)
	}
	withMounts(t, mounts, func(root string) { expect(t, root, snap.content) })
}

// TestModel does random things to images of all kinds and compares with the model.
func TestModel(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	m := &model{l: newLab(t), random: rand.New(rand.NewPCG(seed, 0)), snaps: map[string]*modelSnapshot{}}
	for _, v := range variants {
		m.images = append(m.images, m.l.addImage("image-"+v.name, v.mode, v.filesystem, threeLayers...))
	}
	steps := 200
	if testing.Short() {
		steps = 50
	}
	for i := range steps {
		what := m.step()
		if t.Failed() {
			t.Fatalf("step %d: %s", i, what)
		}
	}
	for name := range m.snaps {
		m.check(name)
	}
}
