package imagemgmt

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"go.etcd.io/bbolt"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/node/present"
	"github.com/thaw-project/thaw/node/present/presenttest"
	"github.com/thaw-project/thaw/target/bdev"
)

// nullDevice is a device for tests in which nobody reads.
type nullDevice struct{ bdev.Device }

func (nullDevice) SizeBytes() int64 { return 512 }
func (nullDevice) Close() error     { return nil }

func crashOptions(t *testing.T, p present.Presenter, db string) Options {
	return Options{Presenter: p, DBPath: db, Lookup: func(context.Context, Block) error { return nil }}
}

// run starts a manager on db, lets call go on until it reaches step (or its end, for
// step ""), and abandons the manager there as SIGKILL would: nothing it holds in memory
// counts any more, and the goroutine never goes on.
func run(t *testing.T, p present.Presenter, db, step string, call func(*Manager) error) (reached []string) {
	t.Helper()
	m, err := New(crashOptions(t, p, db))
	if err != nil {
		t.Fatal(err)
	}
	end := make(chan error, 1)
	m.step = func(name string) {
		reached = append(reached, name)
		if name == step {
			end <- nil
			runtime.Goexit()
		}
	}
	go func() { end <- call(m) }()
	if err := <-end; err != nil {
		t.Fatal(err)
	}
	m.cancel()
	m.wg.Wait()
	m.db.Close()
	return reached
}

// TestKilledAtEveryStep kills each operation at each of its steps, on a host that goes
// on and on one that reboots, and looks at what the next manager makes of it.
func TestKilledAtEveryStep(t *testing.T) {
	ctx := context.Background()
	const block, id = "soldier-1", "rw-1"
	layer := Layer{Block: Block{Name: block}, SizeBytes: 1 << 20}
	attach := func(m *Manager) error { _, err := m.Attach(ctx, Block{Name: block}, "u"); return err }
	detach := func(m *Manager) error { return m.Detach(ctx, block, "u") }
	attachW := func(m *Manager) error { _, err := m.AttachWritable(ctx, layer, id); return err }
	detachW := func(m *Manager) error { return m.DetachWritable(ctx, block, id) }
	deleteW := func(m *Manager) error { return m.DeleteWritable(ctx, layer, id) }
	detached := func(m *Manager) error { return errors.Join(attachW(m), detachW(m)) }
	operations := []struct {
		name          string
		before, crash func(*Manager) error
		after         func(*Manager) error // what the caller does next
		used          bool                 // whether the block is in use then
	}{
		{"attach and again", nil, attach, attach, true},
		{"attach and give up", nil, attach, detach, false},
		{"detach and again", attach, detach, detach, false},
		{"attach writable and again", nil, attachW, attachW, true},
		{"attach writable and give up", nil, attachW, detachW, false},
		{"detach writable and again", attachW, detachW, detachW, false},
		{"attach writable and delete", nil, attachW, deleteW, false},
		{"attach writable once more and delete", detached, attachW, deleteW, false},
		{"delete writable and again", attachW, deleteW, deleteW, false},
		{"delete detached writable and again", detached, deleteW, deleteW, false},
	}
	for _, o := range operations {
		for _, reboot := range []bool{false, true} {
			prepare := func() (*presenttest.Presenter, string) {
				layer.Path = filepath.Join(t.TempDir(), "rw.qcow2")
				p := presenttest.New(func(present.Source, bool) (bdev.Device, error) { return nullDevice{}, nil })
				db := filepath.Join(t.TempDir(), "imagemgmt.db")
				if o.before != nil {
					run(t, p, db, "", o.before)
				}
				return p, db
			}
			p, db := prepare()
			steps := run(t, p, db, "", o.crash)
			if len(steps) == 0 {
				t.Fatalf("%s has no steps", o.name)
			}
			for _, step := range steps {
				p, db := prepare()
				run(t, p, db, step, o.crash)
				if reboot {
					p.Reboot()
				}
				m, err := New(crashOptions(t, p, db))
				if err != nil {
					t.Fatal(err)
				}
				// At once, what is shown is what is recorded.
				var want []string
				if m.Attached(block) {
					want = []string{block}
					if strings.Contains(o.name, "writable") {
						want = []string{id}
					}
				}
				if got := ids(t, p); !slices.Equal(got, want) {
					t.Errorf("%s, killed at %q, reboot %v: shown %q, want %q", o.name, step, reboot, got, want)
				}
				if err := o.after(m); err != nil {
					t.Errorf("%s, killed at %q, reboot %v: %v", o.name, step, reboot, err)
				}
				if m.Attached(block) != o.used || (len(ids(t, p)) == 1) != o.used {
					t.Errorf("%s, killed at %q, reboot %v: attached %v, shown %q", o.name, step, reboot, m.Attached(block), ids(t, p))
				}
				m.mu.Lock()
				layers := len(m.layers)
				m.mu.Unlock()
				_, ferr := os.Lstat(layer.Path)
				kept := strings.Contains(o.name, "writable") && !strings.Contains(o.name, "delete")
				if kept && ferr != nil || strings.Contains(o.name, "delete") && (ferr == nil || layers != 0) {
					t.Errorf("%s, killed at %q, reboot %v: %d records of layers, and its file: %v", o.name, step, reboot, layers, ferr)
				}
				m.Close()
			}
		}
	}
}

func ids(t *testing.T, p present.Presenter) (out []string) {
	t.Helper()
	disks, err := p.List(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range disks {
		out = append(out, d.ID)
	}
	return out
}

func TestDamagedRecordIsRefused(t *testing.T) {
	p := presenttest.New(func(present.Source, bool) (bdev.Device, error) { return nullDevice{}, nil })
	db := filepath.Join(t.TempDir(), "imagemgmt.db")
	run(t, p, db, "", func(m *Manager) error {
		return m.db.Update(func(tx *bbolt.Tx) error {
			return tx.Bucket(writersBucket).Put([]byte("rw-1"), []byte(`{"block":"../x"}`))
		})
	})
	if _, err := New(crashOptions(t, p, db)); err == nil || !strings.Contains(err.Error(), "damaged") || !strings.Contains(err.Error(), db) {
		t.Fatalf("got %v", err)
	}
}

func FuzzRecords(f *testing.F) {
	f.Add([]byte("soldier-1\x00u"), []byte(`{"since":1}`))
	f.Add([]byte("soldier-1\x00u"), []byte(`{"target":"rack-7","since":1}`))
	f.Add([]byte("rw-1"), []byte(`{"block":"b","path":"/p","since":1}`))
	f.Add([]byte("rw-1"), []byte(`{"block":"b","path":"/p","size_bytes":512,"made":true}`))
	f.Fuzz(func(t *testing.T, key, value []byte) {
		if block, user, err := decodeReader(key, value); err == nil {
			if string(readerKey(block.Name, user)) != string(key) || checkBlock(block) != nil || checkUser(user) != nil {
				t.Fatalf("accepted %q as %q of %q", key, user, block)
			}
		}
		if id, l, err := decodeLayer(key, value); err == nil {
			raw, err := json.Marshal(l)
			if err != nil {
				t.Fatal(err)
			}
			if id2, l2, err := decodeLayer([]byte(id), raw); err != nil || id2 != id || l2 != l {
				t.Fatalf("%q %+v came back as %q %+v, %v", id, l, id2, l2, err)
			}
		}
		if id, w, err := decodeWriter(key, value); err == nil {
			raw, err := json.Marshal(w)
			if err != nil {
				t.Fatal(err)
			}
			if id2, w2, err := decodeWriter([]byte(id), raw); err != nil || id2 != id || w2 != w {
				t.Fatalf("%q %+v came back as %q %+v, %v", id, w, id2, w2, err)
			}
		}
	})
}

// A database of format version 1, as the first release wrote it.
func TestGoldenVersion1(t *testing.T) {
	raw, err := os.ReadFile("testdata/v1.db")
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "imagemgmt.db")
	if err := os.WriteFile(path, raw, 0o600); err != nil {
		t.Fatal(err)
	}
	p := presenttest.New(func(present.Source, bool) (bdev.Device, error) { return nullDevice{}, nil })
	m, err := New(crashOptions(t, p, path))
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	list, err := m.List(context.Background())
	if err != nil || len(list) != 1 || list[0].Block != "soldier-1" || !slices.Equal(list[0].Users, []string{"rw-1", "u1", "u2"}) {
		t.Fatalf("%+v, %v", list, err)
	}
}

// TestAttachedBeforeLayers is an upgrade while a container runs: its disk is on record and
// its layer is not. The layer is what its file holds, and its loss is no reason for a new
// one.
func TestAttachedBeforeLayers(t *testing.T) {
	ctx := context.Background()
	p := presenttest.New(func(present.Source, bool) (bdev.Device, error) { return nullDevice{}, nil })
	db := filepath.Join(t.TempDir(), "imagemgmt.db")
	layer := Layer{Block: Block{Name: "soldier-1"}, Path: filepath.Join(t.TempDir(), "rw.qcow2"), SizeBytes: 1 << 20}
	run(t, p, db, "", func(m *Manager) error {
		if _, err := m.AttachWritable(ctx, layer, "rw-1"); err != nil {
			return err
		}
		return m.dropLayer("rw-1")
	})
	for _, lost := range []bool{false, true} {
		p.Reboot()
		if lost {
			if err := os.Remove(layer.Path); err != nil {
				t.Fatal(err)
			}
		}
		m, err := New(crashOptions(t, p, db))
		if err != nil {
			t.Fatal(err)
		}
		if got := len(ids(t, p)); (got == 0) != lost {
			t.Errorf("lost %v: %d disks are shown", lost, got)
		}
		if _, err := m.AttachWritable(ctx, layer, "rw-1"); errors.Is(err, kind.NotFound) != lost {
			t.Errorf("lost %v: %v", lost, err)
		}
		m.Close()
	}
}
