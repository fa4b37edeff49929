// Package device is what an lvol store keeps its clusters on: a flat range of bytes
// that can be read, written, made durable and thinned.
//
// A device knows nothing of lvols, clusters or checksums. The implementations are
// File (pread and pwrite on a file or block device), Uring (the same through
// io_uring), Mem, Fault (any of them with injected errors) and Crash (memory that
// can lose what was not synced, as a power loss does). One conformance test in this
// package holds them all to the contract below.
package device

// Device is the contract. All methods but Close may be called concurrently;
// overlapping concurrent accesses see old or new for each 512-byte sector.
type Device interface {
	// ReadAt fills p from off, wholly or with an error; a range outside the device
	// is kind.Invalid.
	ReadAt(p []byte, off int64) error

	// WriteAt writes all of p at off, or fails. A failed write leaves each sector
	// of the range old or new.
	WriteAt(p []byte, off int64) error

	// Sync makes every write and punch that returned before the call survive a
	// power loss. After a failed Sync nothing is known about them, and a later
	// success does not mean that they are durable.
	Sync() error

	// Punch gives the range back to what is below. See ZeroesOnPunch for what it
	// reads as afterwards.
	Punch(off, length int64) error

	// ZeroesOnPunch tells whether a range reads as zeros after a Punch that
	// returned nil, and before its first write.
	ZeroesOnPunch() bool

	// SizeBytes is the size, fixed while the device is open.
	SizeBytes() int64

	// Close releases the device. It does not sync.
	Close() error
}

// Mapper is a Device that knows which of its ranges occupy space below.
type Mapper interface {
	// NextData returns the first range at or after off that occupies space, or
	// io.EOF when there is none.
	NextData(off int64) (start, end int64, err error)
}

// SectorBytes is the unit that a power loss leaves old or new.
const SectorBytes = 512
