// Package failpoint names the steps of operations, so that tests can kill a process
// between any two of them. In ordinary builds it does nothing and costs nothing; the
// build tag failpoint makes it do what THAW_FAILPOINTS and THAW_FAILPOINT_FILE say. It
// must not know whose steps they are.
//
// Both hold points, separated by semicolons:
//
//	name=kill         SIGKILL to this process: nothing is flushed, nothing is closed
//	name=kill@3       the third time that the point is reached; kill is kill@1
//	name=stop         SIGSTOP to this process, until somebody sends SIGCONT; also stop@3
//	name=delay:100ms  a pause, each time; delay:100ms@3 only the third time
//
// THAW_FAILPOINTS is read once, and one that makes no sense ends the process at its start
// with status 2. THAW_FAILPOINT_FILE names a file with the same that may come and go
// while the process runs: it counts from when the file was put there, which is done by
// rename. The process removes it before it kills or stops itself, so that the next one
// does not do it again, and also when it makes no sense, which it says on stderr.
//
// THAW_FAILPOINT_TRACE names a file to which each point that is reached is appended as a
// line, before anything else is done.
package failpoint

// Names are "part.operation: step", as "attacher.attach: recorded". A step is named
// after what has just been done. They contain no '=', ';' or line break.
