package daemon

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/thaw-project/thaw/filelock"
	"github.com/thaw-project/thaw/kind"
)

// lock takes an exclusive lock on path for the life of the process. The file holds
// the owner's pid, for the message a second server prints.
func lock(path, what string) (*os.File, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, unusable(what, "create", err)
	}
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, unusable(what, "lock", err)
	}
	if err := filelock.Exclusive(f, filelock.Patience); err != nil {
		defer f.Close()
		pid, readErr := os.ReadFile(path)
		if readErr != nil {
			pid = []byte("unknown")
		}
		return nil, kind.Errorf(kind.InUse, "another thaw server (pid %s) uses %s: stop it, or choose another --%s",
			strings.TrimSpace(string(pid)), filepath.Dir(path), what)
	}
	err = f.Truncate(0)
	if err == nil {
		_, err = fmt.Fprintf(f, "%d\n", os.Getpid())
	}
	if err != nil {
		f.Close()
		return nil, unusable(what, "lock", err)
	}
	return f, nil
}

// unusable says what to do about a root or run directory that cannot be used.
func unusable(what, doing string, err error) error {
	if errors.Is(err, unix.ENOTDIR) {
		err = kind.Wrap(kind.Invalid, err)
	}
	return fmt.Errorf("%s %s directory: %w: choose another --%s", doing, what, err, what)
}
