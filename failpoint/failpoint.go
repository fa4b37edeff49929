// Package failpoint names the steps of operations, so that tests can kill a process
// between any two of them. In ordinary builds it does nothing; the build tag failpoint
// makes it read THAW_FAILPOINTS (failpoint_on.go).
package failpoint

// Names are "part.operation: step", as "attacher.attach: recorded". A step is named
// after what has just been done.
