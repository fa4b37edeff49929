// Package statedb opens the database in which one part of Thaw keeps what must
// survive: a bbolt file with the part's name and a format version, refused when it
// is of another part or newer than the program.
//
// It adds group commit: updates that arrive while a commit is on its way to the
// disk share the next one, so that fifty containers started at once do not wait
// for fifty disk flushes in turn. The package knows nothing of what is stored.
package statedb

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"

	"go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"

	"github.com/thaw-project/thaw/kind"
)

// Bucket "thaw" holds two keys: "part", the part's name, and "version", four bytes
// little endian.
var (
	metaBucket = []byte("thaw")
	partKey    = []byte("part")
	versionKey = []byte("version")
)

const (
	// lockWait is how long Open waits for another process to let go of the file:
	// long enough for one that was just killed to be reaped.
	lockWait = time.Second

	// maxGroup bounds the updates in one commit, so that one flush does not carry
	// an unbounded transaction.
	maxGroup = 256
)

// Options says what Open opens.
type Options struct {
	Path    string
	Part    string   // the part's name, which the file must carry
	Version uint32   // the newest format the program knows, from 1
	Buckets []string // created when absent
	// Upgrade brings a file of an older version to Version, in the transaction
	// that also records the new version. nil when there has been only one.
	Upgrade func(tx *bbolt.Tx, from uint32) error
}

// DB is an open database. Its methods may be called concurrently.
type DB struct {
	path string
	bolt *bbolt.DB

	mu      sync.Mutex
	waiting []*update // guarded by mu: in order of arrival
	leading bool      // guarded by mu: somebody is committing
}

type update struct {
	fn   func(*bbolt.Tx) error
	err  error
	done chan struct{} // closed when err is final
	lead chan struct{} // closed to make this waiter commit the next group
}

// Open opens or creates the database. A file another process has open is
// kind.InUse, a newer format kind.Unsupported, a damaged one kind.Corrupt.
func Open(o Options) (*DB, error) {
	if o.Path == "" || o.Part == "" || o.Version == 0 {
		return nil, kind.Errorf(kind.Invalid, "open state database %q of part %q version %d: all must be set", o.Path, o.Part, o.Version)
	}
	_, statErr := os.Stat(o.Path)
	fresh := errors.Is(statErr, fs.ErrNotExist)
	b, err := openBolt(o.Path)
	if err != nil {
		return nil, err
	}
	d := &DB{path: o.Path, bolt: b}
	if err := d.guard(func() error { return b.Update(func(tx *bbolt.Tx) error { return prepare(tx, o) }) }); err != nil {
		b.Close()
		return nil, fmt.Errorf("open state database %s: %w", o.Path, err)
	}
	if fresh {
		// The file's name must survive a power loss as its content does.
		if err := syncDir(filepath.Dir(o.Path)); err != nil {
			b.Close()
			return nil, fmt.Errorf("open state database %s: %w", o.Path, err)
		}
	}
	return d, nil
}

func openBolt(path string) (b *bbolt.DB, err error) {
	// bbolt reports most damage it meets by panicking.
	defer func() {
		if p := recover(); p != nil {
			b, err = nil, kind.Errorf(kind.Corrupt, "open state database %s: damaged: %v", path, p)
		}
	}()
	b, err = bbolt.Open(path, 0o600, &bbolt.Options{Timeout: lockWait, FreelistType: bbolt.FreelistMapType})
	switch {
	case errors.Is(err, bolterrors.ErrTimeout):
		return nil, kind.Errorf(kind.InUse, "open state database %s: another process has it open", path)
	case errors.Is(err, bolterrors.ErrInvalid), errors.Is(err, bolterrors.ErrVersionMismatch), errors.Is(err, bolterrors.ErrChecksum):
		return nil, kind.Errorf(kind.Corrupt, "open state database %s: %w", path, err)
	case err != nil:
		return nil, fmt.Errorf("open state database %s: %w", path, err)
	}
	return b, nil
}

func prepare(tx *bbolt.Tx, o Options) error {
	meta := tx.Bucket(metaBucket)
	if meta == nil {
		if k, _ := tx.Cursor().First(); k != nil {
			return kind.Errorf(kind.Corrupt, "it holds bucket %.40q but no version", k)
		}
		var err error
		if meta, err = tx.CreateBucket(metaBucket); err != nil {
			return err
		}
		if err := meta.Put(partKey, []byte(o.Part)); err != nil {
			return err
		}
		if err := meta.Put(versionKey, binary.LittleEndian.AppendUint32(nil, o.Version)); err != nil {
			return err
		}
	}
	if part := meta.Get(partKey); string(part) != o.Part {
		return kind.Errorf(kind.Invalid, "it belongs to part %.40q, not %q", part, o.Part)
	}
	raw := meta.Get(versionKey)
	if len(raw) != 4 || binary.LittleEndian.Uint32(raw) == 0 {
		return kind.Errorf(kind.Corrupt, "its version %x is not a version", raw)
	}
	version := binary.LittleEndian.Uint32(raw)
	if version > o.Version {
		return kind.Errorf(kind.Unsupported, "it has format version %d and this program knows %d: use a newer thaw", version, o.Version)
	}
	for _, name := range o.Buckets {
		if _, err := tx.CreateBucketIfNotExists([]byte(name)); err != nil {
			return err
		}
	}
	if version < o.Version {
		if o.Upgrade == nil {
			return kind.Errorf(kind.Unsupported, "it has format version %d, which this program cannot upgrade", version)
		}
		if err := o.Upgrade(tx, version); err != nil {
			return fmt.Errorf("upgrade from format version %d: %w", version, err)
		}
		return meta.Put(versionKey, binary.LittleEndian.AppendUint32(nil, o.Version))
	}
	return nil
}

// View calls fn with a consistent state.
func (d *DB) View(fn func(*bbolt.Tx) error) error {
	return d.wrap(d.guard(func() error { return d.bolt.View(fn) }))
}

// Update calls fn in a transaction and returns once it is durable. Updates are
// applied in the order they were called; several may share a commit, so fn may be
// called more than once and must have no effect outside the transaction that a
// second call would not undo. An error from fn discards what fn did, and only that.
func (d *DB) Update(fn func(*bbolt.Tx) error) error {
	u := &update{fn: fn, done: make(chan struct{}), lead: make(chan struct{})}
	d.mu.Lock()
	d.waiting = append(d.waiting, u)
	if d.leading {
		d.mu.Unlock()
		select {
		case <-u.done:
			return d.wrap(u.err)
		case <-u.lead:
		}
	} else {
		d.leading = true
		d.mu.Unlock()
	}
	d.commitGroup()
	return d.wrap(u.err)
}

// commitGroup commits the oldest waiting updates, the caller's first among them,
// and makes one of the rest the next leader.
func (d *DB) commitGroup() {
	d.mu.Lock()
	n := min(len(d.waiting), maxGroup)
	group := append([]*update(nil), d.waiting[:n]...)
	d.waiting = d.waiting[n:]
	d.mu.Unlock()

	d.apply(group)
	for _, u := range group {
		close(u.done)
	}

	d.mu.Lock()
	if len(d.waiting) > 0 {
		close(d.waiting[0].lead)
	} else {
		d.waiting, d.leading = nil, false
	}
	d.mu.Unlock()
}

// apply runs the group in one transaction. When one of it fails, the transaction is
// rolled back and the others run again without it: at most once per member.
func (d *DB) apply(group []*update) {
	for live := group; len(live) > 0; {
		var failed *update
		var next []*update
		err := d.guard(func() error {
			return d.bolt.Update(func(tx *bbolt.Tx) error {
				for i, u := range live {
					if err := u.fn(tx); err != nil {
						failed = u
						next = append(append(next, live[:i]...), live[i+1:]...)
						return err
					}
				}
				return nil
			})
		})
		if failed == nil { // committed, or the commit itself failed for all
			for _, u := range live {
				u.err = err
			}
			return
		}
		failed.err = err
		live = next
	}
}

// guard turns bbolt's panics over damaged pages into errors.
func (d *DB) guard(fn func() error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = kind.Errorf(kind.Corrupt, "state database %s is damaged: %v", d.path, p)
		}
	}()
	return fn()
}

func (d *DB) wrap(err error) error {
	if errors.Is(err, bolterrors.ErrDatabaseNotOpen) {
		return kind.Errorf(kind.Unavailable, "state database %s is closed", d.path)
	}
	return err
}

// Path is the file.
func (d *DB) Path() string { return d.path }

// Close waits for transactions and closes the file.
func (d *DB) Close() error {
	if err := d.bolt.Close(); err != nil {
		return fmt.Errorf("close state database %s: %w", d.path, err)
	}
	return nil
}

func syncDir(path string) error {
	dir, err := os.Open(path)
	if err != nil {
		return err
	}
	defer dir.Close()
	return dir.Sync()
}
