//go:build !failpoint

package failpoint

// Enabled tells whether steps are looked at: for who would have to make up their names.
const Enabled = false

// Reach says that a step was reached.
func Reach(string) {}
