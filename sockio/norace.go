//go:build !race

package sockio

func synced(uintptr) {}
