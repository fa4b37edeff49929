//go:build ceph

package rbd
