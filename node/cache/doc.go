// Package cache is the node's cache of immutable blocks: what a node reads over the
// network of read-only lvols it keeps on a local disk, once for all images that
// share it, over restarts and reboots.
//
// A Device stands in front of a remote one and is read-only. Its Map says which runs
// of it read as zeros (answered without I/O), which are immutable and whose (cached)
// and which are neither (passed through). What a block is known by does not depend on
// the lvol that shows it: owner and offset, so that images over one base share the
// base's blocks. Whoever makes the Map promises that owner and offset mean the same
// bytes for ever; lvol.Store.Map does.
//
// The package knows bdev.Device and nothing of networks, images, lvols or who asks.
//
// # On disk
//
// A sparse file of slots, one unit each, and an index file with a record per slot:
// what the slot holds, how much, and a CRC-32C of each 4 KiB. See docs/cache.md.
//
// Nothing is ever synced, and nothing needs to be. Every read of a slot verifies the
// checksums of what it returns, and the record, which has a checksum of its own over
// everything in it and the slot's number, binds them to the block's key. After a power loss any
// of the writes may be missing: a slot whose data or record is not what was last
// written does not verify and counts as absent. After a SIGKILL the page cache has
// everything: what a read returned before is a hit afterwards.
//
// # In memory
//
// Shards of slots, each with a hash table, a lock, and an S3-FIFO queue pair: a small
// queue takes what is new, and what is not used again while it is in there leaves
// first, so that reading much data once does not flush what is read again and again.
// A second use is a second read of the same bytes: the page cache above asks for each
// block once per start, and the several reads that go through one unit are one use.
// S3-FIFO needs no work on a hit but a counter, and an eviction looks at a
// bounded number of slots. The index needs about 72 bytes of memory per 32 KiB unit.
//
// # Misses
//
// Neighbouring units that are missing become one remote read. Whoever finds a unit
// missing fetches it; others that want it meanwhile wait for that read, of whatever
// device, and if it fails try their own. What was fetched is written to the disk
// before the read returns, after the others got theirs. A disk that cannot be
// written makes the cache pass through for a while.
//
// # Locks
//
// Device.mu, then streams.mu, then Cache.pace; shard.mu is innermost. None is held
// during I/O.
package cache
