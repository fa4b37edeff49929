// Package opi is the bridge: OPI's storage API (opi_api.storage.v1, NVMe front ends,
// remote NVMe controllers, AIO, malloc and null volumes) and the LogicalVolume service
// beside it (api/lvol), over the JSON-RPC methods of an SPDK. docs/opi.md has the names of
// resources and where the bridge differs from other implementations.
//
// It keeps nothing: what it answers it has just read from the target, so a bridge that was
// killed and started again knows everything, and two bridges of one target agree. For this
// the id of a resource is what the target itself knows it by; an id that a caller chooses
// must be that.
//
// The package knows OPI's resources and SPDK's objects. It must not know blocks, nodes or
// images, and no target but by package spdk.
//
// # Changes
//
// A change reads what is there, compares it with what is wanted, acts, and reads again:
// SPDK's codes do not tell "exists already" from other failures, and an answer that did
// not come says nothing. So every change may be repeated, and one that was cut off half-way
// is completed by repeating it. The bounds of package spdk on calls and their times bound
// a request's.
package opi
