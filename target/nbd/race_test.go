//go:build race

package nbd

// raced: the race detector allocates, and empties pools.
const raced = true
