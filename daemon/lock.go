package daemon

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/thaw-project/thaw/filelock"
	"github.com/thaw-project/thaw/kind"
)

// lock takes a lock on path for the life of the process: alone, or shared with others that
// share it. The file of one that is alone holds its pid, for the message that others print.
func lock(path, what string, shared bool) (*os.File, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, unusable(what, "create", err)
	}
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, unusable(what, "lock", err)
	}
	take := filelock.Exclusive
	if shared {
		take = filelock.Shared
	}
	if err := take(f, filelock.Patience); err != nil {
		f.Close()
		return nil, kind.Errorf(kind.InUse, "another thaw server (%s) uses %s: stop it, or choose another --%s",
			lockedBy(filepath.Dir(path)), filepath.Dir(path), what)
	}
	if shared {
		return f, nil
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

// lockedBy names the processes that have locks in dir and are alive.
func lockedBy(dir string) string {
	var found []string
	for _, p := range []Process{ProcessServer, ProcessAttacher, ProcessImages, ProcessSnapshots} {
		name := "lock"
		if p != ProcessServer {
			name = string(p) + ".lock"
		}
		raw, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			continue
		}
		pid, err := strconv.Atoi(strings.TrimSpace(string(raw)))
		if err != nil || pid == os.Getpid() || errors.Is(unix.Kill(pid, 0), unix.ESRCH) {
			continue
		}
		found = append(found, strings.TrimPrefix(fmt.Sprintf("%s pid %d", p, pid), string(ProcessServer)+" "))
	}
	if len(found) == 0 {
		return "pid unknown"
	}
	return strings.Join(found, ", ")
}

// unusable says what to do about a root or run directory that cannot be used.
func unusable(what, doing string, err error) error {
	if errors.Is(err, unix.ENOTDIR) {
		err = kind.Wrap(kind.Invalid, err)
	}
	return fmt.Errorf("%s %s directory: %w: choose another --%s", doing, what, err, what)
}
