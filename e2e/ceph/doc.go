// Package ceph starts a Ceph cluster of one machine from the distribution's packages:
// a monitor, a manager and an OSD with BlueStore on a sparse file, in the folder of an e2e/lab, so
// that nothing is left after a test that was killed.
//
// It is for tests and benchmarks; it must not know what Thaw does with the cluster.
package ceph
