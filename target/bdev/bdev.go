// Package bdev is the seam between what stores bytes and what serves them.
//
// Stores (an lvol, a qcow2 image, a file, a remote NVMe namespace) implement
// Device; front-ends (FUSE, NBD, NVMe/TCP, ublk) see nothing else. The package
// must not know any of them.
package bdev

import "io"

// Device is a random-access block device.
//
// ReadAt and WriteAt follow io.ReaderAt and io.WriterAt: offsets and lengths in
// bytes, any alignment; an access that reaches past SizeBytes fails with
// kind.Invalid, except that ReadAt returns io.EOF at the end as io.ReaderAt asks.
// All methods may be called concurrently. A write that overlaps a concurrent
// access yields old or new for each 512-byte sector. Errors carry a kind of
// package kind: kind.Corrupt for a failed checksum, kind.NoSpace when the pool is
// exhausted, kind.ReadOnly for a change of a read-only device.
type Device interface {
	io.ReaderAt
	io.WriterAt

	// Flush is a barrier: every write that returned before Flush was called
	// survives a power loss once Flush returns nil.
	Flush() error

	// Discard tells that the range need not be kept: it reads as zeros from
	// then on and whole allocation units in it are freed.
	Discard(offset, lengthBytes int64) error

	// WriteZeroes makes the range read as zeros, freeing what it can.
	WriteZeroes(offset, lengthBytes int64) error

	// SizeBytes is the size, a multiple of 512.
	SizeBytes() int64

	// ReadOnly tells whether writes fail with kind.ReadOnly.
	ReadOnly() bool

	// Close releases the device. It does not flush.
	Close() error
}
