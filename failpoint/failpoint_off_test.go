//go:build !failpoint

package failpoint

const tagged = false
