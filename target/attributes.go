package target

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"sync"

	"go.etcd.io/bbolt"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/statedb"
)

// attributes are what an lvstore keeps beside package lvol's metadata. Bucket "lvol" has
// a JSON value per UUID, "intent" a key per name of an lvol that is being made, and
// "lvstore" the name.
//
// A call that makes an lvol with attributes is an intent, the lvol, then in one
// transaction the attributes and the end of the intent. Who is killed in between has
// answered nobody, and the lvol is deleted when the lvstore is opened again.
type attributes struct {
	db *statedb.DB

	mu        sync.Mutex
	lvols     map[string]attribute // guarded by mu, as are all below: by UUID
	externals int                  // how many have an External
	title     string
}

// attribute is of one lvol.
type attribute struct {
	Thick bool `json:"thick,omitempty"`
	// External is the UUID of the disk below an lvol without a parent of its own: what
	// neither it nor an lvol in between covers is the disk's, up to Bytes. The nearest
	// ancestor's counts.
	External string `json:"external,omitempty"`
	Bytes    int64  `json:"bytes,omitempty"`
}

var (
	lvolBucket   = []byte("lvol")
	intentBucket = []byte("intent")
	storeBucket  = []byte("lvstore")
	nameKeyBytes = []byte("name")
)

// attributesVersion is the format. Newer ones are refused.
const attributesVersion = 1

func openAttributes(path, name string) (*attributes, error) {
	db, err := statedb.Open(statedb.Options{Path: path, Part: "lvstore attributes", Version: attributesVersion, Buckets: []string{"lvol", "intent", "lvstore"}})
	if err != nil {
		return nil, err
	}
	a := &attributes{db: db, lvols: map[string]attribute{}, title: name}
	err = db.View(func(tx *bbolt.Tx) error {
		if n := tx.Bucket(storeBucket).Get(nameKeyBytes); n != nil {
			a.title = string(n)
		}
		return tx.Bucket(lvolBucket).ForEach(func(k, v []byte) error {
			var one attribute
			if err := json.Unmarshal(v, &one); err != nil {
				return kind.Errorf(kind.Corrupt, "%s: attributes of lvol %s: %w", path, k, err)
			}
			a.setLocked(string(k), one)
			return nil
		})
	})
	if err != nil {
		db.Close()
		return nil, err
	}
	return a, nil
}

func (a *attributes) close() error { return a.db.Close() }

func (a *attributes) name() string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.title
}

func (a *attributes) rename(name string) error {
	err := a.db.Update(func(tx *bbolt.Tx) error { return tx.Bucket(storeBucket).Put(nameKeyBytes, []byte(name)) })
	if err == nil {
		a.mu.Lock()
		a.title = name
		a.mu.Unlock()
	}
	return err
}

func (a *attributes) get(id string) attribute {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.lvols[id]
}

func (a *attributes) intend(name string) error {
	return a.db.Update(func(tx *bbolt.Tx) error { return tx.Bucket(intentBucket).Put([]byte(name), []byte{1}) })
}

// put sets attributes, a zero one to remove it, and ends the intents of the names
// given.
func (a *attributes) put(set map[string]attribute, done ...string) error {
	err := a.db.Update(func(tx *bbolt.Tx) error {
		for _, name := range done {
			if err := tx.Bucket(intentBucket).Delete([]byte(name)); err != nil {
				return err
			}
		}
		for id, one := range set {
			if one == (attribute{}) {
				if err := tx.Bucket(lvolBucket).Delete([]byte(id)); err != nil {
					return err
				}
				continue
			}
			value, err := json.Marshal(one)
			if err != nil {
				return err
			}
			if err := tx.Bucket(lvolBucket).Put([]byte(id), value); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	for id, one := range set {
		a.setLocked(id, one)
	}
	return nil
}

// setLocked sets attributes in memory. The caller holds mu, or nobody else has a.
func (a *attributes) setLocked(id string, one attribute) {
	if a.lvols[id].External != "" {
		a.externals--
	}
	if one.External != "" {
		a.externals++
	}
	if one == (attribute{}) {
		delete(a.lvols, id)
	} else {
		a.lvols[id] = one
	}
}

// anyExternal tells whether any lvol has an external parent.
func (a *attributes) anyExternal() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.externals > 0
}

func (a *attributes) intents() (names []string, err error) {
	err = a.db.View(func(tx *bbolt.Tx) error {
		return tx.Bucket(intentBucket).ForEach(func(k, _ []byte) error {
			names = append(names, string(k))
			return nil
		})
	})
	return names, err
}

// clean deletes what killed calls left in the lvstore: lvols not wholly made, and
// attributes of lvols that are no more.
func (s *lvstore) clean() error {
	names, err := s.attrs.intents()
	if err != nil {
		return err
	}
	for _, name := range names {
		switch err := s.store.Delete(name); {
		case err == nil:
			s.t.log.Info("lvol deleted that was not wholly made", "lvstore", s.name, "lvol", name)
		case !errors.Is(err, kind.NotFound):
			return fmt.Errorf("delete lvol %s, which was not wholly made: %w", name, err)
		}
	}
	list, err := s.store.List()
	if err != nil {
		return err
	}
	s.attrs.mu.Lock()
	gone := maps.Clone(s.attrs.lvols)
	s.attrs.mu.Unlock()
	for _, i := range list {
		delete(gone, i.UUID)
	}
	for id := range gone {
		gone[id] = attribute{}
	}
	if len(gone) == 0 && len(names) == 0 {
		return nil
	}
	return s.attrs.put(gone, names...)
}
