package filelock

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/thaw-project/thaw/kind"
)

func open(t *testing.T, path string) *os.File {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func TestExclusive(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	first, second, third := open(t, path), open(t, path), open(t, path)
	if err := Exclusive(first, 0); err != nil {
		t.Fatal(err)
	}
	if err := Exclusive(second, 5*time.Millisecond); !errors.Is(err, kind.InUse) {
		t.Fatalf("a second lock: %v", err)
	}
	if err := Shared(second, 0); !errors.Is(err, kind.InUse) {
		t.Fatalf("a shared lock beside an exclusive one: %v", err)
	}
	// The one who waits gets it as soon as it is free.
	got := make(chan error, 1)
	go func() { got <- Exclusive(second, time.Minute) }()
	first.Close()
	if err := <-got; err != nil {
		t.Fatal(err)
	}
	second.Close()
	again := open(t, path)
	if err := errors.Join(Shared(third, 0), Shared(again, 0)); err != nil {
		t.Fatalf("two shared locks: %v", err)
	}
}

func TestRetry(t *testing.T) {
	calls := 0
	other := errors.New("other")
	if err := Retry(time.Minute, func() error { calls++; return other }); err != other || calls != 1 {
		t.Errorf("%v after %d calls", err, calls)
	}
	calls = 0
	err := Retry(time.Minute, func() error {
		if calls++; calls < 3 {
			return kind.Errorf(kind.InUse, "not yet")
		}
		return nil
	})
	if err != nil || calls != 3 {
		t.Errorf("%v after %d calls", err, calls)
	}
}
