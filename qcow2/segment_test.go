package qcow2

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/thaw-project/thaw/redo"
)

// redoSegment is the file that a redo log with these records makes; those that it
// refuses are left out.
func redoSegment(t testing.TB, records ...[]byte) []byte {
	t.Helper()
	prefix := filepath.Join(t.TempDir(), "log")
	log, err := redo.Open(prefix, func([]byte) error { return nil })
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range records {
		if len(r) > 0 && len(r) <= redo.MaxRecordBytes {
			if err := log.Append(r); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := log.Close(); err != nil {
		t.Fatal(err)
	}
	raw, err := os.ReadFile(prefix + ".1")
	if err != nil {
		t.Fatal(err)
	}
	return raw
}
