//go:build ceph

package rbd_test

func childMain() bool { return false }
