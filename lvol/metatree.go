package lvol

import (
	"bytes"
	"encoding/binary"
	"hash/fnv"
	"io"
	"os"

	"github.com/thaw-project/thaw/kind"
)

// bbolt follows page numbers without asking where they lead: on a damaged file it
// may walk in circles for ever, take all memory for a list of free pages, or write
// over pages in use. So before it opens meta.db the tree is walked once here.
//
// The format of bbolt, version 2, little endian: a page is
//
//	0 8 its number    8 2 flags: 1 branch, 2 leaf, 4 meta, 16 free list
//	10 2 count        12 4 count of pages that it extends over, beyond the first
//
// then elements of 16 bytes. Of a branch: 4 key position (from the element), 4 key
// length, 8 page. Of a leaf: 4 flags (1: the value is a bucket), 4 key position,
// 4 key length, 4 value length; the value follows the key. A bucket is 8 root page,
// 8 sequence, and if the root is 0 a leaf page inline.
type treeCheck struct {
	f        *os.File
	pageSize int64
	high     uint64   // pages from here on do not exist
	seen     []uint64 // a bit per page: it has a place
}

const (
	boltPageHeader = 16
	boltElement    = 16
	boltBranch     = 1
	boltLeaf       = 2
	boltFreelist   = 16
	boltMagic      = 0xED0CDAED
	boltVersion    = 2
	boltNoFreelist = ^uint64(0)
	// maxTreeDepth bounds recursion; a tree of 4 KiB pages this deep would hold more
	// keys than there are atoms.
	maxTreeDepth = 32
	// maxMetaBytes bounds meta.db: that of a full pool of the largest capacity.
	maxMetaBytes = 1 << 43
)

func treeError(format string, args ...any) error {
	return kind.Errorf(kind.Corrupt, "metadata tree: "+format, args...)
}

// checkTree walks the tree of the bbolt file f. Damage below one delta's bucket comes
// back in bad, by delta id: the rest can be used. Anything else is an error.
func checkTree(f *os.File) (bad map[uint64]error, err error) {
	t := &treeCheck{f: f}
	root, freelist, err := t.readMeta()
	if err != nil {
		return nil, err
	}
	t.seen = make([]uint64, (t.high+63)/64)
	bad = map[uint64]error{}
	err = t.walk(root, 0, func(key, value []byte, isBucket bool) error {
		if !isBucket {
			return nil
		}
		visit := func(_, _ []byte, nested bool) error {
			if nested {
				return treeError("a bucket inside bucket %q", key)
			}
			return nil
		}
		if bytes.Equal(key, bucketDelta) {
			visit = func(key, value []byte, isBucket bool) error {
				if !isBucket || len(key) != 8 {
					return nil
				}
				if err := t.bucket(value, func([]byte, []byte, bool) error { return nil }); err != nil {
					if kind.Of(err) != kind.Corrupt {
						return err
					}
					bad[binary.BigEndian.Uint64(key)] = err
				}
				return nil
			}
		}
		return t.bucket(value, visit)
	})
	if err != nil {
		return nil, err
	}
	return bad, t.freelist(freelist)
}

// readMeta returns what the newer of the two sound meta pages says, as bbolt does.
func (t *treeCheck) readMeta() (root, freelist uint64, err error) {
	st, err := t.f.Stat()
	if err != nil {
		return 0, 0, err
	}
	if st.Size() > maxMetaBytes {
		return 0, 0, treeError("file of %d bytes", st.Size())
	}
	found, best := false, uint64(0)
	try := func(off int64) {
		p := make([]byte, 80)
		if _, err := t.f.ReadAt(p, off); err != nil {
			return
		}
		p = p[boltPageHeader:]
		le := binary.LittleEndian
		h := fnv.New64a()
		h.Write(p[:56])
		size, high, txid := int64(le.Uint32(p[8:])), le.Uint64(p[40:]), le.Uint64(p[48:])
		if le.Uint32(p) != boltMagic || le.Uint32(p[4:]) != boltVersion || le.Uint64(p[56:]) != h.Sum64() {
			return
		}
		if size < 512 || size > 64<<10 || size&(size-1) != 0 || found && txid <= best {
			return
		}
		found, best, t.pageSize, t.high = true, txid, size, high
		root, freelist = le.Uint64(p[16:]), le.Uint64(p[32:])
	}
	try(0)
	second := int64(4096)
	if found {
		second = t.pageSize
	}
	try(second)
	if !found {
		return 0, 0, treeError("neither meta page is sound")
	}
	// bbolt extends the file before it uses pages of it.
	if t.high < 3 || t.high > uint64(st.Size()/t.pageSize) {
		return 0, 0, treeError("%d pages in a file of %d bytes", t.high, st.Size())
	}
	return root, freelist, nil
}

// take notes that page id has a place in the tree, with those it extends over.
func (t *treeCheck) take(id, n uint64) error {
	if id < 2 || id >= t.high || n > t.high-id {
		return treeError("page %d (and %d more) of %d", id, n-1, t.high)
	}
	for p := id; p < id+n; p++ {
		if t.seen[p/64]>>(p%64)&1 != 0 {
			return treeError("page %d has two places", p)
		}
		t.seen[p/64] |= 1 << (p % 64)
	}
	return nil
}

func (t *treeCheck) read(id uint64) ([]byte, error) {
	if id < 2 || id >= t.high {
		return nil, treeError("page %d of %d", id, t.high)
	}
	header := make([]byte, boltPageHeader)
	if _, err := t.f.ReadAt(header, int64(id)*t.pageSize); err != nil {
		return nil, err
	}
	le := binary.LittleEndian
	if le.Uint64(header) != id {
		return nil, treeError("page %d says it is %d", id, le.Uint64(header))
	}
	n := 1 + uint64(le.Uint32(header[12:]))
	if err := t.take(id, n); err != nil {
		return nil, err
	}
	p := make([]byte, int64(n)*t.pageSize) // n is within the file
	if _, err := t.f.ReadAt(p, int64(id)*t.pageSize); err != nil && err != io.EOF {
		return nil, err
	}
	return p, nil
}

type treeVisit func(key, value []byte, isBucket bool) error

func (t *treeCheck) walk(id uint64, depth int, visit treeVisit) error {
	if depth > maxTreeDepth {
		return treeError("deeper than %d", maxTreeDepth)
	}
	p, err := t.read(id)
	if err != nil {
		return err
	}
	le := binary.LittleEndian
	if le.Uint16(p[8:]) != boltBranch {
		return leaf(p, visit)
	}
	count := int(le.Uint16(p[10:]))
	if count == 0 || boltPageHeader+count*boltElement > len(p) {
		return treeError("branch page %d with %d elements", id, count)
	}
	var last []byte
	for i := range count {
		at := boltPageHeader + i*boltElement
		key, err := slice(p, int64(at)+int64(le.Uint32(p[at:])), int64(le.Uint32(p[at+4:])))
		if err != nil {
			return err
		}
		if i > 0 && bytes.Compare(last, key) >= 0 {
			return treeError("keys of page %d are out of order", id)
		}
		last = key
		if err := t.walk(le.Uint64(p[at+8:]), depth+1, visit); err != nil {
			return err
		}
	}
	return nil
}

// leaf visits the elements of a leaf page, inline or not.
func leaf(p []byte, visit treeVisit) error {
	le := binary.LittleEndian
	if len(p) < boltPageHeader || le.Uint16(p[8:]) != boltLeaf {
		return treeError("a page that is neither branch nor leaf")
	}
	count := int(le.Uint16(p[10:]))
	if boltPageHeader+count*boltElement > len(p) {
		return treeError("leaf page with %d elements", count)
	}
	var last []byte
	for i := range count {
		at := boltPageHeader + i*boltElement
		pos := int64(at) + int64(le.Uint32(p[at+4:]))
		keyBytes, valueBytes := int64(le.Uint32(p[at+8:])), int64(le.Uint32(p[at+12:]))
		key, err := slice(p, pos, keyBytes)
		if err != nil {
			return err
		}
		value, err := slice(p, pos+keyBytes, valueBytes)
		if err != nil {
			return err
		}
		if i > 0 && bytes.Compare(last, key) >= 0 {
			return treeError("keys of a leaf are out of order")
		}
		last = key
		if err := visit(key, value, le.Uint32(p[at:])&1 != 0); err != nil {
			return err
		}
	}
	return nil
}

func slice(p []byte, at, n int64) ([]byte, error) {
	if at < 0 || n < 0 || at > int64(len(p)) || n > int64(len(p))-at {
		return nil, treeError("an element reaches beyond its page")
	}
	return p[at : at+n], nil
}

// bucket walks a bucket's value.
func (t *treeCheck) bucket(value []byte, visit treeVisit) error {
	if len(value) < 16 {
		return treeError("bucket of %d bytes", len(value))
	}
	if root := binary.LittleEndian.Uint64(value); root != 0 {
		return t.walk(root, 0, visit)
	}
	return leaf(value[16:], visit)
}

// freelist checks that no page is both free and in use, or free twice.
func (t *treeCheck) freelist(id uint64) error {
	if id == boltNoFreelist {
		return nil
	}
	p, err := t.read(id)
	if err != nil {
		return err
	}
	le := binary.LittleEndian
	if le.Uint16(p[8:]) != boltFreelist {
		return treeError("page %d is not a free list", id)
	}
	count, at := uint64(le.Uint16(p[10:])), boltPageHeader
	if count == 0xffff {
		count, at = le.Uint64(p[at:]), at+8
	}
	if count > uint64(len(p)-at)/8 {
		return treeError("free list of %d pages", count)
	}
	for i := range int(count) {
		if err := t.take(le.Uint64(p[at+8*i:]), 1); err != nil {
			return err
		}
	}
	return nil
}
