package statedb

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"go.etcd.io/bbolt"

	"github.com/thaw-project/thaw/kind"
)

var bucket = []byte("things")

func options(path string) Options {
	return Options{Path: path, Part: "test", Version: 1, Buckets: []string{"things"}}
}

func open(t *testing.T, o Options) *DB {
	t.Helper()
	d, err := Open(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

func wantKind(t *testing.T, err error, k kind.Kind) {
	t.Helper()
	if kind.Of(err) != k {
		t.Fatalf("got error %v, want kind %q", err, k)
	}
}

func TestRefusesWhatItMustNotTouch(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x.db")
	d := open(t, options(path))
	_, err := Open(options(path))
	wantKind(t, err, kind.InUse)
	d.Close()

	o := options(path)
	o.Part = "other"
	_, err = Open(o)
	wantKind(t, err, kind.Invalid)

	o = options(path)
	o.Version = 2
	_, err = Open(o)
	wantKind(t, err, kind.Unsupported) // no upgrade given
	o.Upgrade = func(tx *bbolt.Tx, from uint32) error {
		return tx.Bucket(bucket).Put([]byte("from"), binary.LittleEndian.AppendUint32(nil, from))
	}
	open(t, o).Close()
	o.Upgrade = func(*bbolt.Tx, uint32) error { return errors.New("upgraded twice") }
	open(t, o).Close()
	_, err = Open(options(path))
	wantKind(t, err, kind.Unsupported) // newer than the program

	if err := os.WriteFile(path, []byte("not a database at all, but text"), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err = Open(options(path))
	wantKind(t, err, kind.Corrupt)
	_, err = Open(Options{Path: path})
	wantKind(t, err, kind.Invalid)
}

// TestDamageIsAnError overwrites every page of a database in turn: whatever that
// breaks must be an error and not a panic.
func TestDamageIsAnError(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "x.db")
	d := open(t, options(path))
	for i := range 300 {
		if err := d.Update(func(tx *bbolt.Tx) error {
			return tx.Bucket(bucket).Put(fmt.Appendf(nil, "%04d", i), make([]byte, 100))
		}); err != nil {
			t.Fatal(err)
		}
	}
	d.Close()
	raw, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	failed := 0
	for page := 0; page < len(raw); page += 4096 {
		bad := append([]byte(nil), raw...)
		for i := page; i < page+4096; i++ {
			bad[i] ^= 0xa5
		}
		p := filepath.Join(dir, fmt.Sprint(page))
		if err := os.WriteFile(p, bad, 0o600); err != nil {
			t.Fatal(err)
		}
		d, err := Open(options(p))
		if err == nil {
			err = d.View(func(tx *bbolt.Tx) error {
				return tx.Bucket(bucket).ForEach(func(k, v []byte) error { return nil })
			})
			d.Close()
		}
		if err != nil {
			failed++
		}
	}
	if failed == 0 {
		t.Fatal("no damage was noticed")
	}
}

func TestGroupCommit(t *testing.T) {
	d := open(t, options(filepath.Join(t.TempDir(), "x.db")))
	boom := errors.New("boom")
	var wg sync.WaitGroup
	const n = 400
	for i := range n {
		wg.Go(func() {
			err := d.Update(func(tx *bbolt.Tx) error {
				if err := tx.Bucket(bucket).Put(fmt.Appendf(nil, "%d", i), []byte("x")); err != nil {
					return err
				}
				if i%10 == 3 {
					return boom
				}
				return nil
			})
			if want := i%10 == 3; errors.Is(err, boom) != want {
				t.Errorf("update %d: %v", i, err)
			}
		})
	}
	wg.Wait()
	if err := d.View(func(tx *bbolt.Tx) error {
		for i := range n {
			if got, want := tx.Bucket(bucket).Get(fmt.Appendf(nil, "%d", i)) != nil, i%10 != 3; got != want {
				t.Errorf("key %d is there: %v, want %v", i, got, want)
			}
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	d.Close()
	wantKind(t, d.Update(func(*bbolt.Tx) error { return nil }), kind.Unavailable)
}

func BenchmarkUpdate(b *testing.B) {
	for _, parallel := range []int{1, 50} {
		b.Run(fmt.Sprint(parallel), func(b *testing.B) {
			d, err := Open(options(filepath.Join(b.TempDir(), "x.db")))
			if err != nil {
				b.Fatal(err)
			}
			defer d.Close()
			b.SetParallelism(parallel)
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					if err := d.Update(func(tx *bbolt.Tx) error { return tx.Bucket(bucket).Put([]byte("k"), []byte("v")) }); err != nil {
						b.Error(err)
					}
				}
			})
		})
	}
}
