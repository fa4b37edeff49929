// Package rbd is the backend that keeps lvols as images of Ceph: native RBD images,
// snapshots and clones through librbd, with no SPDK in between. It is built with the tag
// ceph (cgo, librbd); without it New answers kind.Unsupported.
//
// It must not know who presents or converts lvols, nor what is in them.
//
// # What an lvol is in the pool
//
// An lvol that can be written is the head of an RBD image, whose name is the store's
// prefix and the lvol's UUID. The lvol snapshot S of lvol L is an RBD snapshot of L's
// image, so that taking one moves no data and no device: who has L open here or on a
// node goes on writing to the same image. A clone of S is an RBD clone (format 2) of
// that snapshot. A read-only lvol that is no snapshot (a soldier) has an RBD snapshot
// that readers open, for librbd knows of a snapshot which objects it has and asks no
// object that is not there.
//
// Which lvols there are is in the index: the omap of the object "<prefix>store", changed
// by one atomic operation at a time. An image or snapshot that is about to be made is
// entered first, and the lvol once it is there; what no lvol and no clone needs is
// removed (collect), whoever left it. So at whatever step a process dies, each lvol is
// as before the operation or as after it, and nothing is left over.
//
// An lvol snapshot that is deleted while it has one clone goes from the index, and its
// RBD snapshot stays for as long as an RBD clone needs it.
//
// # One store, one process
//
// A lock on that object, renewed all the time, belongs to the process that has the
// store. Who takes it over from a dead one first has Ceph refuse everything of that one
// that may still be on its way (its address goes on the blocklist), and every change of
// the index compares the session that it belongs to.
//
// # Time
//
// librbd's calls wait for the cluster as long as it takes. I/O of devices does the same: a
// pause and no error. Everything else runs in a goroutine of the backend, and the caller
// is told kind.Unavailable after Options.Timeout; what it began ends when the cluster is
// back, and changes the index only if its caller still waits.
package rbd

import (
	"log/slog"
	"time"

	"github.com/thaw-project/thaw/kind"
)

const (
	// DefaultPrefix begins the names of a store's images and its index.
	DefaultPrefix = "thaw."

	// DefaultObjectBytes is the size of RADOS objects, the clusters of lvols. docs/ceph.md
	// has the measurements behind it.
	DefaultObjectBytes = 1 << 20

	// DefaultTimeout is how long a call waits for the cluster: longer than the restart of
	// an OSD.
	DefaultTimeout = 30 * time.Second

	// DefaultLease is how long the store stays its process's without a sign of life.
	DefaultLease = 30 * time.Second

	maxPrefixBytes = 40 // an image's name has at most 95, of which 36 are a UUID
	minObjectBytes = 64 << 10
	maxObjectBytes = 32 << 20
)

// Options says which cluster and pool to use.
type Options struct {
	// Pool must exist and be for RBD.
	Pool string
	// Config is Ceph's configuration file; empty is Ceph's own search (/etc/ceph/ceph.conf).
	Config string
	// User is the client's name without "client."; empty is admin.
	User string
	// Keyring overrides the configuration's when it is not empty.
	Keyring string
	// Prefix tells stores in one pool apart, 1 to 40 of A-Z a-z 0-9 . _ -; empty is
	// DefaultPrefix.
	Prefix string
	// ObjectBytes is used for a store that is made anew, a power of two from 64 KiB to
	// 32 MiB; 0 is DefaultObjectBytes. A store that exists keeps its own.
	ObjectBytes int64
	// Timeout bounds every call but Inflate, Decouple and Check, which their context
	// bounds; 0 is DefaultTimeout.
	Timeout time.Duration
	// Lease is how long a process that cannot be asked keeps the store; 0 is DefaultLease.
	Lease time.Duration
	// Logger hears of what is removed or cannot be; nil is silence.
	Logger *slog.Logger
}

func (o *Options) ensureDefaults() {
	if o.Prefix == "" {
		o.Prefix = DefaultPrefix
	}
	if o.ObjectBytes == 0 {
		o.ObjectBytes = DefaultObjectBytes
	}
	if o.User == "" {
		o.User = "admin"
	}
	if o.Timeout == 0 {
		o.Timeout = DefaultTimeout
	}
	if o.Lease == 0 {
		o.Lease = DefaultLease
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
}

func (o *Options) validate() error {
	switch {
	case o.Pool == "":
		return kind.Errorf(kind.Invalid, "rbd: a pool must be named")
	case len(o.Prefix) > maxPrefixBytes || !plain(o.Prefix):
		return kind.Errorf(kind.Invalid, "rbd: prefix %.80q: must be 1 to %d of A-Z a-z 0-9 . _ -", o.Prefix, maxPrefixBytes)
	case o.ObjectBytes < minObjectBytes || o.ObjectBytes > maxObjectBytes || o.ObjectBytes&(o.ObjectBytes-1) != 0:
		return kind.Errorf(kind.Invalid, "rbd: objects of %d bytes: must be a power of two from %d to %d", o.ObjectBytes, minObjectBytes, maxObjectBytes)
	case o.Timeout < time.Second || o.Lease < 3*time.Second:
		return kind.Errorf(kind.Invalid, "rbd: timeout %v and lease %v: must be at least 1s and 3s", o.Timeout, o.Lease)
	}
	return nil
}

// plain tells whether s has characters of lvol names only, and at least one.
func plain(s string) bool {
	for _, r := range s {
		if !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '.' || r == '_' || r == '-') {
			return false
		}
	}
	return s != ""
}
