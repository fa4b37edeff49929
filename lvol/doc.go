// Package lvol is the lvol store: a pool of clusters on a file or block device, and
// in it thin logical volumes that are created, snapshotted, cloned, resized and
// deleted while others are in use. An open lvol is a target/bdev.Device.
//
// The package knows nothing of images, containers, networks or who calls it.
//
// # How it works
//
// On disk an lvol owns only its delta: which clusters of its address space it wrote
// itself, where they lie, and a CRC-32C for each 4 KiB block of them. A physical
// cluster belongs to exactly one delta, so there are no reference counts. A snapshot
// takes over the delta of the lvol it is taken from, which goes on with an empty one.
//
// In memory every lvol has a flat map, made when the pool is opened, whose parts
// are shared between parent and child until the child changes them: a read never
// walks a chain. A snapshot never changes, so it is read without locks. A writable
// lvol has one lock per stripe of clusters.
//
// # What a write does
//
// A write to a cluster that the lvol does not own takes a fresh cluster, fills it
// (with what the parent has, where the write is partial), changes the map in memory
// and appends a redo record; then it is acknowledged. The record makes it survive
// the death of the process. A write to a cluster it owns goes in place.
//
// Flush makes durable in order: data, device sync, map pages and checksums in one
// bbolt transaction. Clusters freed before become reusable only then, so durable
// metadata never points at a cluster that holds another's data.
//
// A checksum that is durable must not lie after a power loss in the middle of an
// overwrite. Before the first overwrite in place of a durable cluster its map page
// (4 MiB of the lvol) is durably marked open, as md does with its write-intent
// bitmap; recovery takes what it finds in open pages as good, which it is: each
// sector is old or new. A flush closes the pages that had no writes since the last.
//
// The format and the recovery rules are in docs/lvol-format.md.
//
// # Locks
//
// In the order in which they are taken:
//
//	Store.admin     one structural change (create, delete, ...) at a time
//	Lvol.gate       Close waits for the handle's operations; not a lock
//	volume.quiesce  structural changes wait for the lvol's I/O
//	volume.stripes  ascending; a write holds its clusters', a read shares them
//	Store.flushMu   one flush, or one commit of open marks, at a time
//	Store.commit    map changes and their redo record share it; a flush takes it
//	                to capture both at one instant
//	Store.mu, volume.mapMu, Store.dirtyMu, allocator.mu   innermost, held briefly
package lvol
