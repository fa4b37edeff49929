package fuse

import (
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/thaw-project/thaw/filelock"
	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/node/present"
)

const stateVersion = 1

// state is what the next process must know about a connection, in Options.StatePath.
// It is replaced by rename, so that a process killed at any moment leaves the old or
// the new one, and always before the kernel can act on what it says.
type state struct {
	Version int    `json:"version"`
	BootID  string `json:"boot_id"` // a state of another boot means nothing
	// Token names the connection: it is in the mount's source and in the name the
	// keeper knows the descriptor by.
	Token string `json:"token"`
	// Init is nil until just before INIT is answered.
	Init *Negotiated `json:"init"`
	// Clean says that the process before stopped with nothing in flight.
	Clean    bool        `json:"clean"`
	NextNode uint64      `json:"next_node"` // nodes are never reused
	Disks    []stateDisk `json:"disks"`
}

type stateDisk struct {
	present.Disk
	Node     uint64 `json:"node"`
	UnixTime int64  `json:"unix_time"` // when it was presented: the file's mtime
}

// firstNode leaves room below for the root and whatever else may come.
const firstNode = 16

func bootID() (string, error) {
	raw, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(raw)), err
}

func newState() (*state, error) {
	boot, err := bootID()
	if err != nil {
		return nil, err
	}
	var token [8]byte
	rand.Read(token[:])
	return &state{Version: stateVersion, BootID: boot, Token: hex.EncodeToString(token[:]), NextNode: firstNode}, nil
}

// loadState returns nil when there is no state that says anything about a mount of
// this boot.
func loadState(path string) (*state, error) {
	raw, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	s := new(state)
	if err := json.Unmarshal(raw, s); err != nil {
		return nil, kind.Errorf(kind.Corrupt, "%s: %w", path, err)
	}
	if s.Version > stateVersion {
		return nil, kind.Errorf(kind.Unsupported, "%s has version %d, newer than this program's %d", path, s.Version, stateVersion)
	}
	boot, err := bootID()
	if err != nil {
		return nil, err
	}
	if s.BootID != boot {
		return nil, nil
	}
	ids, nodes := make(map[string]bool), make(map[uint64]bool)
	for _, d := range s.Disks {
		if !validID(d.ID) || ids[d.ID] || d.Node < firstNode || d.Node >= s.NextNode || nodes[d.Node] || d.SizeBytes < 0 {
			return nil, kind.Errorf(kind.Corrupt, "%s: disk %q contradicts the rest", path, d.ID)
		}
		ids[d.ID], nodes[d.Node] = true, true
	}
	return s, nil
}

func (s *state) save(path string) error {
	raw, err := json.Marshal(s)
	if err != nil {
		return err
	}
	tmp := path + ".tmp"
	// No fsync: the state must survive our death, not the machine's.
	if err := os.WriteFile(tmp, raw, 0o600); err != nil {
		return fmt.Errorf("save state: %w", err)
	}
	if err := os.Rename(tmp, path); err != nil {
		return fmt.Errorf("save state: %w", err)
	}
	return nil
}

const maxIDBytes = 128

func validID(id string) bool {
	if id == "" || len(id) > maxIDBytes || id == "." || id == ".." {
		return false
	}
	for i := range len(id) {
		switch c := id[i]; {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', c == '.', c == '_', c == '-':
		default:
			return false
		}
	}
	return true
}

// openTable remembers which open files the kernel has, across the death of the
// process, in a file mapped shared. A handle is the unique of the OPEN that made it:
// an OPEN or RELEASE that is sent again says the same as the first time, so the
// table is exact whenever the process dies.
//
// There is one exception: an opener that is itself killed after our predecessor
// read its OPEN and before we read it again is never heard of. Such a handle is
// "unsure": its OPEN was not answered by the process that recorded it.
//
//	header  0   8  magic "THAWOPEN"
//	        8  16  token of the connection
//	       24   8  zero
//	slot    0   8  handle, 0 when free; uniques are even, so bit 0 says unsure
//	        8   8  node
type openTable struct {
	mu    sync.Mutex
	mem   []byte
	slots map[uint64]int   // guarded by mu: handle to slot
	nodes map[uint64]opens // guarded by mu: what a node has
	free  []int            // guarded by mu: slots given back
	next  int              // guarded by mu: first slot never used
}

type opens struct {
	sure, unsure int
}

const (
	openMagic       = "THAWOPEN"
	openHeaderBytes = 32
	openSlotBytes   = 16
	// maxOpens bounds the open files of a connection. One disk has a handful: its
	// mount or loop device, and tools that look. The file is sparse.
	maxOpens = 1 << 16

	handleUnsure = 1
)

// loadOpens maps the table at path, which starts empty unless it is of the same
// connection.
func loadOpens(path, token string) (*openTable, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	want := []byte(openMagic + token)
	header := make([]byte, len(want))
	if n, _ := f.ReadAt(header, 0); n < len(want) || string(header) != string(want) {
		if err := f.Truncate(0); err != nil {
			return nil, err
		}
		if _, err := f.WriteAt(want, 0); err != nil {
			return nil, err
		}
	}
	size := openHeaderBytes + maxOpens*openSlotBytes
	if err := f.Truncate(int64(size)); err != nil {
		return nil, err
	}
	mem, err := unix.Mmap(int(f.Fd()), 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map %s: %w", path, err)
	}
	t := &openTable{mem: mem, slots: make(map[uint64]int), nodes: make(map[uint64]opens)}
	// Slots are used from the front; an untouched page at the end reads as zeros,
	// but reading it costs memory, so stop at the file's last page with data.
	for t.next = usedSlots(f, size); t.next > 0 && t.slot(t.next-1).Load() == 0; t.next-- {
	}
	for i := range t.next {
		handle := t.slot(i).Load()
		if _, twice := t.slots[handle&^handleUnsure]; twice || handle&^handleUnsure == 0 {
			t.slot(i).Store(0) // free, or damaged
			t.free = append(t.free, i)
			continue
		}
		t.slots[handle&^handleUnsure] = i
		o := t.nodes[t.node(i)]
		if handle&handleUnsure != 0 {
			o.unsure++
		} else {
			o.sure++
		}
		t.nodes[t.node(i)] = o
	}
	return t, nil
}

// usedSlots is an upper bound of the slots in use, from where the sparse file ends.
func usedSlots(f *os.File, size int) int {
	end := int64(0)
	for {
		data, err := unix.Seek(int(f.Fd()), end, unix.SEEK_DATA)
		if err != nil {
			break
		}
		if end, err = unix.Seek(int(f.Fd()), data, unix.SEEK_HOLE); err != nil {
			return maxOpens
		}
	}
	return max(0, min(int(end), size)-openHeaderBytes) / openSlotBytes
}

func (t *openTable) slot(i int) *atomic.Uint64 {
	return (*atomic.Uint64)(unsafe.Pointer(&t.mem[openHeaderBytes+i*openSlotBytes]))
}

func (t *openTable) node(i int) uint64 {
	return binary.NativeEndian.Uint64(t.mem[openHeaderBytes+i*openSlotBytes+8:])
}

// add records an open that is about to be answered.
func (t *openTable) add(node, unique uint64) (handle uint64, ok bool) {
	handle = unique &^ (uniqueResent | handleUnsure)
	t.mu.Lock()
	defer t.mu.Unlock()
	if _, ok := t.slots[handle]; ok {
		return handle, true // sent again
	}
	i := t.next
	if n := len(t.free); n > 0 {
		i, t.free = t.free[n-1], t.free[:n-1]
	} else if t.next == maxOpens {
		return 0, false
	} else {
		t.next++
	}
	binary.NativeEndian.PutUint64(t.mem[openHeaderBytes+i*openSlotBytes+8:], node)
	t.slot(i).Store(handle | handleUnsure) // the node is there before the handle
	t.slots[handle] = i
	o := t.nodes[node]
	o.unsure++
	t.nodes[node] = o
	return handle, true
}

// answered makes an open sure: the kernel has the handle.
func (t *openTable) answered(handle uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	i, ok := t.slots[handle]
	if !ok || t.slot(i).Load() == handle { // released already, or sent again
		return
	}
	t.slot(i).Store(handle)
	o := t.nodes[t.node(i)]
	o.unsure--
	o.sure++
	t.nodes[t.node(i)] = o
}

// remove forgets an open; an unknown one was forgotten before.
func (t *openTable) remove(handle uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.removeLocked(handle)
}

func (t *openTable) removeLocked(handle uint64) {
	i, ok := t.slots[handle]
	if !ok {
		return
	}
	node := t.node(i)
	o := t.nodes[node]
	if t.slot(i).Load()&handleUnsure != 0 {
		o.unsure--
	} else {
		o.sure--
	}
	if o == (opens{}) {
		delete(t.nodes, node)
	} else {
		t.nodes[node] = o
	}
	t.slot(i).Store(0)
	delete(t.slots, handle)
	t.free = append(t.free, i)
}

// count returns what a node has open.
func (t *openTable) count(node uint64) opens {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.nodes[node]
}

// forgetNode drops what is recorded of a node that is gone.
func (t *openTable) forgetNode(node uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if _, ok := t.nodes[node]; !ok {
		return
	}
	for handle, i := range t.slots {
		if t.node(i) == node {
			t.removeLocked(handle)
		}
	}
}

func (t *openTable) close() error {
	return unix.Munmap(t.mem)
}

// lockState takes the lock that makes sure that one process at a time serves a
// connection. A predecessor that was just killed may hold it for a moment.
func lockState(path string, wait time.Duration) (*os.File, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if err := filelock.Exclusive(f, wait); err != nil {
		f.Close()
		if errors.Is(err, kind.InUse) {
			return nil, kind.Errorf(kind.InUse, "%s: another process serves this mount", path)
		}
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	return f, nil
}
