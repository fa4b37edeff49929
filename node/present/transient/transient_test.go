package transient

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/thaw-project/thaw/kind"
)

// TestCallerGivesUp: what serves disks may be waiting for a store, and who gives up before
// that does not wait as long.
func TestCallerGivesUp(t *testing.T) {
	c, err := Start(t.TempDir(), []string{"sh", "-c", "exec sleep 300"})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	failed := make(chan error, 1)
	go func() {
		_, err := c.Show(ctx, "lvol", Volume{})
		failed <- err
	}()
	for deadline := time.Now().Add(10 * time.Second); c.mu.TryLock(); time.Sleep(time.Millisecond) {
		c.mu.Unlock() // the call is not under way yet
		if time.Now().After(deadline) {
			t.Fatal("nothing is asked")
		}
	}
	cancel()
	select {
	case err := <-failed:
		if !errors.Is(err, kind.Unavailable) && !errors.Is(err, kind.Canceled) {
			t.Errorf("%v is %q", err, kind.Of(err))
		}
	case <-time.After(callMost / 2):
		t.Error("it waits although nobody waits for it")
	}
	if err := c.Hide(t.Context(), "lvol"); !errors.Is(err, kind.Unavailable) {
		t.Errorf("hidden by a process that does not answer: %v", err)
	}
	if err := c.Close(); err == nil {
		t.Error("a process that had to be killed ended in order")
	}
}
