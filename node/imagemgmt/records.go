package imagemgmt

import (
	"bytes"
	"encoding/json"
	"path/filepath"
	"strings"

	"go.etcd.io/bbolt"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/statedb"
)

// The database, format version 3 (1 knew no targets, 2 no layers). Values are JSON.
//
//	bucket "readers"  block \0 user -> readerRecord   one use of a block by Attach
//	bucket "writers"  disk id       -> writerRecord   one AttachWritable
//	bucket "layers"   disk id       -> layerRecord    a writable layer, attached or not
//
// A layer of version 2 has no record until it is attached again; its file is there.
//
// A record is written before the disk is shown and, for readers, removed before it
// is taken away: what is shown and not recorded is nobody's.
const (
	dbPart    = "imagemgmt"
	dbVersion = 3
)

var (
	readersBucket = []byte("readers")
	writersBucket = []byte("writers")
	layersBucket  = []byte("layers")
)

// Bounds of names, so that a record stays small and a key fits bbolt.
const (
	maxNameBytes   = 128  // blocks and disk ids, as lvol names
	maxTargetBytes = 64   // as in annotations
	maxUserBytes   = 512  // users: containerd's keys with a prefix
	maxPathBytes   = 4096 // PATH_MAX
)

type readerRecord struct {
	Target         string `json:"target,omitempty"`
	SinceUnixNanos int64  `json:"since"`
}

type writerRecord struct {
	Block          string `json:"block"`
	Target         string `json:"target,omitempty"`
	Path           string `json:"path"`
	SinceUnixNanos int64  `json:"since"`
}

// layerRecord is a writable layer. Made says that it came about: from then on one that is
// not there is lost, and not to be made.
type layerRecord struct {
	Block     string `json:"block"`
	Target    string `json:"target,omitempty"`
	Path      string `json:"path"`
	SizeBytes int64  `json:"size_bytes"`
	Made      bool   `json:"made"`
}

func openDB(path string) (*statedb.DB, error) {
	return statedb.Open(statedb.Options{
		Path: path, Part: dbPart, Version: dbVersion,
		Buckets: []string{string(readersBucket), string(writersBucket), string(layersBucket)},
		// Records of version 1 are of this machine's own store, and layers of version 2 are
		// recorded when they are next attached.
		Upgrade: func(*bbolt.Tx, uint32) error { return nil },
	})
}

func readerKey(block, user string) []byte { return []byte(block + "\x00" + user) }

func decodeReader(key, value []byte) (block Block, user string, err error) {
	b, u, found := bytes.Cut(key, []byte{0})
	var r readerRecord
	if !found || strictJSON(value, &r) != nil || checkBlock(Block{r.Target, string(b)}) != nil || checkUser(string(u)) != nil {
		return Block{}, "", kind.Errorf(kind.Corrupt, "record %.80q of a reader is damaged", key)
	}
	return Block{r.Target, string(b)}, string(u), nil
}

func decodeWriter(key, value []byte) (id string, w writerRecord, err error) {
	if checkName("disk", string(key)) != nil || strictJSON(value, &w) != nil ||
		checkBlock(w.block()) != nil || w.Path != "" && checkPath(w.Path) != nil {
		return "", writerRecord{}, kind.Errorf(kind.Corrupt, "record %.80q of a writable disk is damaged", key)
	}
	return string(key), w, nil
}

func decodeLayer(key, value []byte) (id string, l layerRecord, err error) {
	if checkName("disk", string(key)) != nil || strictJSON(value, &l) != nil || checkLayer(l.layer()) != nil {
		return "", layerRecord{}, kind.Errorf(kind.Corrupt, "record %.80q of a writable layer is damaged", key)
	}
	return string(key), l, nil
}

func strictJSON(raw []byte, into any) error {
	d := json.NewDecoder(bytes.NewReader(raw))
	d.DisallowUnknownFields()
	if err := d.Decode(into); err != nil {
		return err
	}
	if d.More() {
		return kind.Errorf(kind.Corrupt, "more than one value")
	}
	return nil
}

// load reads all records.
func load(db *statedb.DB) (readers map[Block][]string, writers map[string]writerRecord, layers map[string]layerRecord, err error) {
	readers, writers, layers = make(map[Block][]string), make(map[string]writerRecord), make(map[string]layerRecord)
	err = db.View(func(tx *bbolt.Tx) error {
		if err := tx.Bucket(readersBucket).ForEach(func(k, v []byte) error {
			block, user, err := decodeReader(k, v)
			if err == nil {
				readers[block] = append(readers[block], user)
			}
			return err
		}); err != nil {
			return err
		}
		if err := tx.Bucket(writersBucket).ForEach(func(k, v []byte) error {
			id, w, err := decodeWriter(k, v)
			if err == nil {
				writers[id] = w
			}
			return err
		}); err != nil {
			return err
		}
		return tx.Bucket(layersBucket).ForEach(func(k, v []byte) error {
			id, l, err := decodeLayer(k, v)
			if err == nil {
				layers[id] = l
			}
			return err
		})
	})
	return readers, writers, layers, err
}

func (m *Manager) putReader(block Block, user string) error {
	raw, err := json.Marshal(readerRecord{Target: block.Target, SinceUnixNanos: m.o.Now().UnixNano()})
	if err != nil {
		return err
	}
	return m.db.Update(func(tx *bbolt.Tx) error { return tx.Bucket(readersBucket).Put(readerKey(block.Name, user), raw) })
}

func (m *Manager) dropReader(block, user string) error {
	return m.db.Update(func(tx *bbolt.Tx) error { return tx.Bucket(readersBucket).Delete(readerKey(block, user)) })
}

// putWriter records that disk id is attached, and its layer as it is.
func (m *Manager) putWriter(id string, w writerRecord, l layerRecord) error {
	w.SinceUnixNanos = m.o.Now().UnixNano()
	raw, err := json.Marshal(w)
	if err != nil {
		return err
	}
	rawLayer, err := json.Marshal(l)
	if err != nil {
		return err
	}
	return m.db.Update(func(tx *bbolt.Tx) error {
		if err := tx.Bucket(layersBucket).Put([]byte(id), rawLayer); err != nil {
			return err
		}
		return tx.Bucket(writersBucket).Put([]byte(id), raw)
	})
}

func (m *Manager) putLayer(id string, l layerRecord) error {
	raw, err := json.Marshal(l)
	if err != nil {
		return err
	}
	return m.db.Update(func(tx *bbolt.Tx) error { return tx.Bucket(layersBucket).Put([]byte(id), raw) })
}

func (m *Manager) dropWriter(id string) error {
	return m.db.Update(func(tx *bbolt.Tx) error { return tx.Bucket(writersBucket).Delete([]byte(id)) })
}

func (m *Manager) dropLayer(id string) error {
	return m.db.Update(func(tx *bbolt.Tx) error { return tx.Bucket(layersBucket).Delete([]byte(id)) })
}

func (w writerRecord) block() Block { return Block{w.Target, w.Block} }

func (l layerRecord) layer() Layer { return Layer{Block{l.Target, l.Block}, l.Path, l.SizeBytes} }

func checkLayer(l Layer) error {
	if l.SizeBytes < 0 || l.SizeBytes%512 != 0 {
		return kind.Errorf(kind.Invalid, "writable layer of %d bytes: must be a multiple of 512", l.SizeBytes)
	}
	if l.Path != "" { // else layers are no files
		if err := checkPath(l.Path); err != nil {
			return err
		}
	}
	return checkBlock(l.Block)
}

// checkBlock holds a target's name to what configurations and annotations allow, and
// the block's to what lvols may be called.
func checkBlock(b Block) error {
	if len(b.Target) > maxTargetBytes || strings.ContainsFunc(b.Target, func(r rune) bool {
		return !(r >= 'a' && r <= 'z' || r >= '0' && r <= '9' || r == '.' || r == '-')
	}) {
		return kind.Errorf(kind.Invalid, "target name %.160q: must be at most %d of a-z 0-9 . -", b.Target, maxTargetBytes)
	}
	return checkName("block", b.Name)
}

// checkName holds names of blocks and disks to 1 to 128 of [A-Za-z0-9._-], what
// lvols and presented disks may be called.
func checkName(what, name string) error {
	if name == "" || len(name) > maxNameBytes || strings.ContainsFunc(name, func(r rune) bool {
		return !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '.' || r == '_' || r == '-')
	}) {
		return kind.Errorf(kind.Invalid, "%s name %.160q: must be 1 to %d of A-Z a-z 0-9 . _ -", what, name, maxNameBytes)
	}
	return nil
}

func checkUser(user string) error {
	if user == "" || len(user) > maxUserBytes || strings.ContainsRune(user, 0) {
		return kind.Errorf(kind.Invalid, "user %.80q of a block: must be 1 to %d bytes without NUL", user, maxUserBytes)
	}
	return nil
}

func checkPath(path string) error {
	if !filepath.IsAbs(path) || filepath.Clean(path) != path || len(path) > maxPathBytes || strings.ContainsRune(path, 0) {
		return kind.Errorf(kind.Invalid, "path %.160q of a writable layer: must be absolute and clean", path)
	}
	return nil
}
