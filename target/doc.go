// Package target is the storage process: it keeps block devices (SPDK's bdevs), shows
// them over NVMe/TCP, NBD and ublk, and is told what to do by SPDK's JSON-RPC methods,
// so that tools written for SPDK work on it. docs/target.md has the methods and where
// they differ from SPDK's.
//
// It knows lvols, files, memory and remote nvmeNamespaces as devices, and each front-end
// by its management API. It must not know images, containers or nodes.
//
// # State
//
// A disk is a device under a name, an alias and a UUID. Who uses a disk holds a lease:
// it says whether others may write meanwhile, and how to make the user let go when the
// disk goes. Nothing else points from a front-end to a device.
//
// Lvstores come back by themselves when their base disk does: a disk that appears is
// examined. What else there is, is gone with the process, as with SPDK, unless
// Options.Persist is set: then every object is on record as the call that made it, with
// all that was chosen for it (UUIDs, numbers), and New makes the calls again, listeners
// last. What cannot be made again yet stays on record, is said in the log, and is tried
// again.
//
// # Locks
//
//	Target.admin   one change at a time; held over all of it
//	Target.mu      what lists are answered from; held for moments
//
// Long work (copying, connecting) happens without admin.
package target
