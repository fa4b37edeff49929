// Package backend is the place of what an attacher can store lvols with. It has no code:
// each backend is a package of its own below it, an attacher.Backend with its own
// attacher.Exporter, and passes the suite of package backendtest.
//
//	embedded  package lvol in this process, exported by package attacher/export
//	spdk      any SPDK, or `thaw target`, through OPI's gRPC
//	rbd       images of Ceph, with the build tag ceph
//
// docs/backend.md describes them for their users.
package backend
