package daemon

// Process is one of the processes that the parts of a machine can run in.
type Process string

// The processes. Those with a name may run beside each other with the same root and run
// directories, but not beside ProcessServer.
const (
	ProcessServer    Process = ""
	ProcessAttacher  Process = "attacher"
	ProcessImages    Process = "image-mgmt"
	ProcessSnapshots Process = "snapshotter"
)
