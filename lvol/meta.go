package lvol

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime/debug"
	"time"

	"go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"
	"golang.org/x/sys/unix"

	"github.com/thaw-project/thaw/kind"
)

// Buckets of meta.db. Keys are big endian.
var (
	bucketPool  = []byte("pool")  // see the keys below
	bucketLvol  = []byte("lvol")  // lvol id -> record
	bucketName  = []byte("name")  // name -> lvol id
	bucketDelta = []byte("delta") // delta id -> bucket of page index -> page value
	bucketOpen  = []byte("open")  // delta id, page index -> nothing (sealed)
)

// Keys of bucketPool.
var (
	keySuperblock = []byte("superblock") // as on the device
	keyNext       = []byte("next")       // the next id of an lvol or a delta: ids are never used again
	keyCheckpoint = []byte("checkpoint") // redo records up to this sequence number are in the pages
	keyClean      = []byte("clean")      // 1 if the pool was closed in order
	keyDevice     = []byte("device")     // path of the data device, empty for the file data beside meta.db
)

// meta is meta.db. bbolt trusts its file: on a damaged one it panics, or follows a
// page number out of the mapping, which is a fault. Both become errors here.
type meta struct {
	db   *bbolt.DB
	file *os.File
	path string
	// bad holds the deltas whose bucket must not be entered, by id. Fixed when the
	// file is opened.
	bad map[uint64]error
}

func openMeta(path string, readOnly bool) (m *meta, err error) {
	if st, err := os.Stat(path); err != nil {
		return nil, fmt.Errorf("open pool metadata: %w", err)
	} else if !st.Mode().IsRegular() {
		return nil, kind.Errorf(kind.Invalid, "open pool metadata: %s is not a regular file", path)
	}
	bad, err := checkTreeOf(path)
	if err != nil {
		return nil, fmt.Errorf("open pool metadata %s: %w", path, err)
	}
	var file *os.File
	defer func() {
		if err != nil && file != nil {
			unlock(file)
			file.Close() // bbolt does not on a panic; twice does no harm
		}
	}()
	defer guard(&err, "open "+path)()
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{
		// The directory's lock is held, so nobody else can hold this one.
		Timeout:      time.Second,
		FreelistType: bbolt.FreelistMapType,
		ReadOnly:     readOnly,
		NoStatistics: true,
		OpenFile: func(name string, flag int, mode os.FileMode) (*os.File, error) {
			f, err := os.OpenFile(name, flag, mode)
			file = f
			return f, err
		},
	})
	switch {
	case errors.Is(err, bolterrors.ErrTimeout):
		return nil, kind.Errorf(kind.InUse, "open pool metadata: %s is locked by another process", path)
	case err != nil && kind.Of(err) == "": // not the system's: what bbolt thinks of the file
		return nil, kind.Errorf(kind.Corrupt, "open pool metadata %s: %w", path, err)
	case err != nil:
		return nil, fmt.Errorf("open pool metadata %s: %w", path, err)
	}
	return &meta{db: db, file: file, path: path, bad: bad}, nil
}

func checkTreeOf(path string) (map[uint64]error, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return checkTree(f)
}

// guard turns a panic or memory fault of the calling function into kind.Corrupt:
//
//	defer guard(&err, "what was being done")()
func guard(err *error, doing string) func() {
	old := debug.SetPanicOnFault(true)
	return func() {
		debug.SetPanicOnFault(old)
		if r := recover(); r != nil {
			*err = kind.Errorf(kind.Corrupt, "%s: metadata is damaged: %v", doing, r)
		}
	}
}

func (m *meta) view(fn func(tx *bbolt.Tx) error) (err error) {
	defer guard(&err, "read "+m.path)()
	return m.db.View(fn)
}

func (m *meta) update(fn func(tx *bbolt.Tx) error) (err error) {
	defer guard(&err, "change "+m.path)()
	return m.db.Update(fn)
}

func (m *meta) close() (err error) {
	defer func() {
		if err != nil {
			unlock(m.file)
		}
	}()
	defer guard(&err, "close "+m.path)()
	return m.db.Close()
}

// unlock lets go of bbolt's lock where a panic kept bbolt from doing so. Closing the
// file is not enough: a mapping that was left behind holds the lock too.
func unlock(f *os.File) { unix.Flock(int(f.Fd()), unix.LOCK_UN) }

// bucket returns a bucket that every pool has.
func bucket(tx *bbolt.Tx, name []byte) (*bbolt.Bucket, error) {
	b := tx.Bucket(name)
	if b == nil {
		return nil, kind.Errorf(kind.Corrupt, "metadata has no bucket %q", name)
	}
	return b, nil
}

func putPool(tx *bbolt.Tx, key, payload []byte) error {
	b, err := bucket(tx, bucketPool)
	if err != nil {
		return err
	}
	return b.Put(key, seal(tagPool, key, append([]byte(nil), payload...)))
}

func getPool(tx *bbolt.Tx, key []byte) ([]byte, error) {
	b, err := bucket(tx, bucketPool)
	if err != nil {
		return nil, err
	}
	v := b.Get(key)
	if v == nil {
		return nil, kind.Errorf(kind.Corrupt, "metadata has no %q", key)
	}
	return unseal(tagPool, key, v)
}

func getPool64(tx *bbolt.Tx, key []byte) (uint64, error) {
	p, err := getPool(tx, key)
	if err == nil && len(p) != 8 {
		err = kind.Errorf(kind.Corrupt, "metadata: %q has %d bytes", key, len(p))
	}
	if err != nil {
		return 0, err
	}
	return binary.LittleEndian.Uint64(p), nil
}

func putPool64(tx *bbolt.Tx, key []byte, n uint64) error {
	return putPool(tx, key, binary.LittleEndian.AppendUint64(nil, n))
}

// putRecord writes lvol id's record and makes its name point at it.
func putRecord(tx *bbolt.Tx, id uint64, r record) error {
	lvols, err := bucket(tx, bucketLvol)
	if err != nil {
		return err
	}
	if err := lvols.Put(key64(id), r.encode(id)); err != nil {
		return err
	}
	names, err := bucket(tx, bucketName)
	if err != nil {
		return err
	}
	name := []byte(r.name)
	return names.Put(name, seal(tagName, name, binary.LittleEndian.AppendUint64(nil, id)))
}

func deleteRecord(tx *bbolt.Tx, id uint64, name string) error {
	lvols, err := bucket(tx, bucketLvol)
	if err != nil {
		return err
	}
	if err := lvols.Delete(key64(id)); err != nil {
		return err
	}
	return deleteName(tx, name)
}

func deleteName(tx *bbolt.Tx, name string) error {
	names, err := bucket(tx, bucketName)
	if err != nil {
		return err
	}
	return names.Delete([]byte(name))
}

// deleteDelta removes the pages and open marks of delta id; the pages of a delta
// that cannot be entered stay.
func (m *meta) deleteDelta(tx *bbolt.Tx, id uint64) error {
	deltas, err := bucket(tx, bucketDelta)
	if err != nil {
		return err
	}
	if m.bad[id] == nil && deltas.Bucket(key64(id)) != nil {
		if err := deltas.DeleteBucket(key64(id)); err != nil {
			return err
		}
	}
	open, err := bucket(tx, bucketOpen)
	if err != nil {
		return err
	}
	// Collect, then delete: a cursor may skip after a delete.
	var marks [][]byte
	c := open.Cursor()
	for k, _ := c.Seek(key64(id)); len(k) == 12 && binary.BigEndian.Uint64(k) == id; k, _ = c.Next() {
		marks = append(marks, append([]byte(nil), k...))
	}
	for _, k := range marks {
		if err := open.Delete(k); err != nil {
			return err
		}
	}
	return nil
}

// putPage stores a page's value, or removes the page if value is empty.
func putPage(tx *bbolt.Tx, delta uint64, index uint32, value []byte) error {
	deltas, err := bucket(tx, bucketDelta)
	if err != nil {
		return err
	}
	b := deltas.Bucket(key64(delta))
	if b == nil {
		if len(value) == 0 {
			return nil
		}
		if b, err = deltas.CreateBucket(key64(delta)); err != nil {
			return err
		}
	}
	key := binary.BigEndian.AppendUint32(nil, index)
	if len(value) == 0 {
		return b.Delete(key)
	}
	return b.Put(key, value)
}

func putMark(tx *bbolt.Tx, delta uint64, index uint32) error {
	open, err := bucket(tx, bucketOpen)
	if err != nil {
		return err
	}
	key := pageKey(delta, index)
	return open.Put(key, seal(tagOpen, key, nil))
}

func deleteMark(tx *bbolt.Tx, delta uint64, index uint32) error {
	open, err := bucket(tx, bucketOpen)
	if err != nil {
		return err
	}
	return open.Delete(pageKey(delta, index))
}
