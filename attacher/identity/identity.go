// Package identity derives every name under which a store shows a block to a node: NQNs,
// host identifier, serial number, nvmeNamespace UUID and NGUID.
//
// All follow from the store, the node and the block's lvol alone, so that a retry, a restart
// and whoever cleans up agree on what belongs to whom (design decision 6). The names
// of two stores never collide, so a node may read the same block from both. The
// package must not know who uses the names.
package identity

import (
	"crypto/sha256"
	"encoding/hex"
	"strings"

	"github.com/google/uuid"

	"github.com/thaw-project/thaw/kind"
)

// MaxNodeBytes bounds a node's name: what a DNS name may have in one label and more
// than any host name in practice; with the rest it keeps an NQN below its 223 bytes.
const MaxNodeBytes = 128

// prefix of the subsystems' NQNs (Base 2.0, 4.5: a date and a reversed domain name).
const prefix = "nqn.2025-01.io.github.thaw-project:"

// space is what the UUIDs of hosts are derived in (RFC 9562, version 5). It must never
// change: kernels and stores know hosts by them.
var space = uuid.MustParse("3c0a2a0e-6a6c-5b0b-9e0d-6f2b8f5b7a11")

// Store derives the names of one store.
type Store struct {
	UUID uuid.UUID // of the lvol store
}

// CheckNode holds a node's name to 1 to MaxNodeBytes of a-z 0-9 . -, beginning with a
// letter or digit; the error is kind.Invalid.
func CheckNode(node string) error {
	ok := func(r rune) bool { return r >= 'a' && r <= 'z' || r >= '0' && r <= '9' || r == '.' || r == '-' }
	if node == "" || len(node) > MaxNodeBytes || node[0] == '.' || node[0] == '-' ||
		strings.IndexFunc(node, func(r rune) bool { return !ok(r) }) >= 0 {
		return kind.Errorf(kind.Invalid, "node name %.160q: must be 1 to %d of a-z 0-9 . -", node, MaxNodeBytes)
	}
	return nil
}

// HostID is the host identifier of a node, the same at every store.
func HostID(node string) uuid.UUID { return uuid.NewSHA1(space, []byte("host\x00"+node)) }

// HostNQN is the NQN that belongs to HostID. Kernels insist that the two go together.
func HostNQN(node string) string { return "nqn.2014-08.org.nvmexpress:uuid:" + HostID(node).String() }

// Subsystem is the NQN of the subsystem that holds all nvmeNamespaces of a node.
func (s Store) Subsystem(node string) string { return prefix + s.UUID.String() + ":" + node }

// Anchor is the NQN of a subsystem that no host may connect to. It keeps a store's
// listeners when no node has anything attached. No node's name has a slash.
func (s Store) Anchor() string { return prefix + s.UUID.String() + "/" }

// Serial is the serial number of a node's subsystem, 20 hex digits.
func (s Store) Serial(node string) string {
	sum := sha256.Sum256([]byte(s.Subsystem(node)))
	return hex.EncodeToString(sum[:10])
}

// NvmeNamespace is the UUID of the nvmeNamespace that shows a block to node, and, as the
// same 16 bytes, its NGUID. It follows from the UUID of the block's lvol and not from the
// block's name: a block that is deleted and made again holds other bytes under the same
// name, and a node that still reads the old one must not find the new one in its place.
func (s Store) NvmeNamespace(lvol uuid.UUID, node string) uuid.UUID {
	return uuid.NewSHA1(s.UUID, []byte("namespace\x00"+lvol.String()+"\x00"+node))
}
