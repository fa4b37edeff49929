package lvol

import "time"

// Info describes an lvol.
type Info struct {
	Name string
	// UUID identifies the lvol for as long as it exists, across renames. When a
	// snapshot is taken the lvol keeps its UUID and the snapshot gets its own.
	UUID      string
	SizeBytes int64
	// AllocatedClusters counts the clusters this lvol owns itself, not those it
	// shares with its parent.
	AllocatedClusters int64
	ClusterBytes      int64
	Snapshot          bool
	ReadOnly          bool     // set for snapshots too
	Parent            string   // name of the snapshot it is a clone of, or empty
	Clones            []string // names, sorted
	Created           time.Time
	Open              bool // some handle is open
	// Damage says why the lvol cannot be opened, or is empty.
	Damage string
}

// Stat describes the pool.
type Stat struct {
	UUID          string
	Name          string
	Dir           string
	ClusterBytes  int64
	TotalClusters int64
	FreeClusters  int64 // clusters that wait for a flush to become reusable included
	Lvols         int
	DirtyPages    int   // map pages that wait for a flush
	OpenPages     int   // map pages marked open for overwrites in place
	RedoBytes     int64 // size of the newest redo segment
	ReadOnly      bool
}

// ProblemType classifies what Check finds.
type ProblemType string

// The types of problem.
const (
	ProblemLeak      ProblemType = "leak"       // space that nothing uses
	ProblemDoubleUse ProblemType = "double-use" // a cluster that two lvols claim
	ProblemDamage    ProblemType = "damage"     // a checksum or an invariant does not hold
)

// Problem is one finding of Check.
type Problem struct {
	Type        ProblemType
	Lvol        string // empty when it concerns none
	OffsetBytes int64  // in the lvol, or in the device when Lvol is empty
	Detail      string
	Repaired    bool
}

// CheckOptions says what Check does beyond looking at the metadata.
type CheckOptions struct {
	Repair bool // give leaks back and rewrite a damaged copy of the superblock
	Scrub  bool // read all data and verify its checksums
}

// Report is what Check found. Problems holds at most MaxProblems; More counts the
// rest.
type Report struct {
	Problems        []Problem
	More            int64
	CheckedClusters int64
	ScrubbedBytes   int64
}

// MaxProblems bounds a report, so that a wholly damaged pool does not fill memory.
const MaxProblems = 10000
